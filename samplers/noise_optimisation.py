"""What the methods that optimise noise by gradients share.

The picture is a deterministic function G of the noise z. Gradient steps on

    loss(z) = -reward_scale r(G(z)) + reg_weight reg(z)

move z from a random start, and the best iterate wins. Every restart is a row of its own, so that
restarts and prompts share calls; clipping, optimiser and regulariser act row by row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.model import Model
from steering.requests import Decode, Denoise, Gradient, Outcome, Progress, Request, Run, Score
from steering.samplers.base import Sampler, afford, check_scale, refuse_idle, within_budget
from steering.samplers.regularisers import slope
from steering.samplers.rollout import require_noise
from steering.scoring import Scores

_EPS = 1e-12
_PUBLISHED = 50
"""Iterations that the published step size is meant for."""
_LONGEST = 16.0
"""Most times that a step may be longer: 6 % of the radius at clip=0.1."""


@dataclass(frozen=True, eq=False)
class Iterate:
    """One evaluation of all rows: states, pictures, rewards, and ascent directions of r by z."""

    x0: Tensor
    images: Tensor
    reward: Tensor
    slopes: tuple[Tensor, ...] = ()

    def better(self, other: Iterate | None) -> Iterate:
        """Row by row the one with the higher reward; the earlier one on ties."""
        if other is None:
            return replace(self, slopes=())
        wins = self.reward > other.reward
        rows = [_rows(wins, a, b) for a, b in ((self.x0, other.x0), (self.images, other.images))]
        reward = torch.where(wins, self.reward, other.reward)
        return Iterate(rows[0], rows[1], reward)


def _rows(wins: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(wins.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), a, b)


@dataclass(frozen=True, kw_only=True)
class NoiseOptimisation(Sampler):
    """Gradient ascent of the reward in noise space.

    Attributes:
        n_iterations: evaluations of each start, one trajectory each; None spends the budget (50
            where there is none). 1 is best-of-N of ``restarts`` samples.
        restarts: random starts, optimised side by side; the best iterate of all wins. None leaves
            the number to the method.
        variables: "initial" optimises the starting noise, "all" the noise of every step too
            (needs a stochastic sampler).
        differentiate_last: with "all", the number of last steps that are differentiated; the
            noise before them stays as drawn. None is all of them.
        optimizer: "sgd" (with Nesterov momentum) or "adam".
        lr: step size. None takes the published one: of "sgd" 5 for 50 iterations on the 16,384
            numbers of an SD latent, in proportion to the radius sqrt(d); of "adam" 0.01 for 100.
            Fewer iterations take longer steps, so that they can go as far: at most 16 times as
            long with "sgd", 5 times with "adam".
        momentum: of "sgd".
        clip: largest norm of a row's gradient; None leaves it as it is.
        regulariser: "radius", "probability" or "none".
        reg_weight: its weight in the loss.
        reward_scale: weight of the reward in the loss; None as in `fk`.
        checkpoint: keep no activations, run each call again in the backward pass.
    """

    n_iterations: int | None = None
    restarts: int | None = 1
    variables: Literal["initial", "all"] = "initial"
    differentiate_last: int | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    clip: float | None = 0.1
    regulariser: Literal["radius", "probability", "none"] = "radius"
    reg_weight: float = 0.01
    reward_scale: float | None = None
    checkpoint: bool = False

    name: ClassVar[str]
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = True
    unguided: ClassVar[str | None] = (
        "it differentiates the walk by its noise, and guided steps would need second derivatives. "
        "Use method='guidance', or evo or random_search with guidance."
    )
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.name, self.reward_scale)
        for option in ("n_iterations", "restarts", "differentiate_last"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{self.name}: {option} must be at least 1, got {value}.")
        for option in ("lr", "clip"):
            value = getattr(self, option)
            if value is not None and not value >= 0.0:
                raise OptionError(f"{self.name}: {option} must not be negative, got {value}.")
        if self.lr is not None and not math.isfinite(self.lr):
            raise OptionError(f"{self.name}: lr must be finite, got {self.lr}.")
        if not 0.0 <= self.momentum < 1.0 or not self.reg_weight >= 0.0:
            raise OptionError(
                f"{self.name}: momentum must lie in [0, 1) and reg_weight must not be negative, "
                f"got {self.momentum} and {self.reg_weight}."
            )
        if self.optimizer == "adam":
            refuse_idle(self, "optimizer='adam'", "momentum")
        if self.regulariser == "none":
            refuse_idle(self, "regulariser='none'", "reg_weight")
        still = self.transition == "eta" and not self.eta
        if self.variables == "all" and (still or not self.kernel().stochastic):
            raise OptionError(
                f"{self.name}: variables='all' optimises the noise of every step, but eta=0 adds "
                "none. Set eta > 0, or variables='initial'."
            )
        if self.differentiate_last is not None and self.variables != "all":
            raise OptionError(
                f"{self.name}: differentiate_last needs variables='all': the starting noise acts "
                "through every step."
            )

    def levels(self, model: Model) -> Grid:
        moves = getattr(model, "transition", None) is not None
        if self.variables == "all" and moves and model.dtype.is_floating_point:
            raise OptionError(
                f"{self.name}: {getattr(model, 'name', 'this model')!r} makes its own moves, and "
                "their noise cannot be optimised; use variables='initial'."
            )
        return super().levels(model)

    # --- cost --------------------------------------------------------------------------------

    def pass_cost(self) -> int:
        """Trajectories of one evaluation of one start."""
        return 1

    def cost(self, plan: Plan) -> Cost:
        """Every iterate is a finished sample; the last one is not differentiated."""
        starts, passes = self.restarts or 1, self.n_iterations or 1
        made, extra = starts * passes, starts * (passes - 1) * (self.pass_cost() - 1)
        return Cost(
            nfe=(made + extra) * plan.trajectory, decodes=made + extra, reward_calls=made + extra
        )

    def starts(self, plan: Plan) -> int:
        """How many random starts a run makes where ``restarts`` does not say it."""
        return 1

    def fit(self, plan: Plan) -> NoiseOptimisation:
        if self.restarts is None:
            return replace(self, restarts=self.starts(plan)).fit(plan)
        fitted = replace(self, reward_scale=plan.scale(self.reward_scale))
        if self.n_iterations is None:

            def cost(k: int) -> Cost:
                return replace(self, n_iterations=k).cost(plan)

            return replace(fitted, n_iterations=afford(plan, cost, _PUBLISHED, "iteration", self))
        what = f"{self.name} with {self.n_iterations} iterations of {self.restarts} starts"
        within_budget(plan, self.cost(plan), what, self)
        return fitted

    # --- the algorithm -----------------------------------------------------------------------

    def run(self, ctx: Context) -> Run:
        assert self.n_iterations is not None
        if self.regulariser != "none":
            require_noise(self.name, ctx)
        noise = self._start(ctx)
        optimiser = self._optimiser(noise)
        best: Iterate | None = None
        for k in range(self.n_iterations):
            iterate = yield from self._evaluate(ctx, noise, k, k + 1 < self.n_iterations)
            best = iterate.better(best)
            yield Progress(
                step=k + 1, of=self.n_iterations, preview=iterate.images,
                info={"rewards": iterate.reward, "radius": _radius(noise)},
            )  # fmt: skip
            if iterate.slopes:
                self._descend(ctx, noise, iterate.slopes, optimiser, k)
        assert best is not None
        n = len(best.reward)
        return Outcome(
            x0=best.x0, images=best.images, reward=best.reward, slots=torch.arange(n),
            log_w=torch.zeros(n, dtype=torch.float64),
        )  # fmt: skip

    def _start(self, ctx: Context) -> list[Tensor]:
        """Master copies of what is optimised, at least float32: x_T, then step noises."""
        assert self.restarts is not None  # fit() has set it
        x = ctx.noise(self.restarts)
        noise = [x.to(torch.promote_types(x.dtype, torch.float32)) / size_of_start(ctx)]
        if self.variables == "all":
            # The last step of a grid adds no noise.
            noise += [
                ctx.key("proposal", i).normal(self.restarts, x.shape[1:]).to(noise[0])
                for i in range(len(ctx.grid) - 1)
            ]
        return noise

    def _free(self, ctx: Context) -> int:
        """The first step that is differentiated, and the first noise that is optimised: noise
        k enters before step k."""
        if self.differentiate_last is None:
            return 0
        return max(0, len(ctx.grid) - self.differentiate_last)

    def _evaluate(
        self, ctx: Context, noise: list[Tensor], k: int, grad: bool
    ) -> Generator[Request, Any, Iterate]:
        """Rewards of G(z) and, with ``grad``, the directions in which they grow."""
        leaves = [z.clone().requires_grad_(grad) for z in noise]
        x0, images, scores = yield from self._score(ctx, leaves, grad)
        slopes: tuple[Tensor, ...] = ()
        if grad:
            slopes = yield from self._slopes(scores, tuple(leaves[self._free(ctx) :]))
        return Iterate(x0.detach(), images.detach(), as_float64(scores.value), slopes)

    def _warn_of_nan(self, slopes: tuple[Tensor, ...]) -> None:
        bad = sum(~torch.isfinite(s.flatten(1)).all(1) for s in slopes)
        if bool(torch.as_tensor(bad).any()):
            warnings.warn(
                f"{self.name}: the gradient of the reward has NaN or inf, which moves no noise. "
                "Look for a square root, logarithm or division at 0 in it.",
                stacklevel=2,
            )

    def _slopes(
        self, scores: Scores, free: tuple[Tensor, ...]
    ) -> Generator[Request, Any, tuple[Tensor, ...]]:
        """Directions in which rewards grow, like ``free``."""
        slopes = yield Gradient(scores.value * self._scale, free)
        self._warn_of_nan(slopes)
        return slopes

    def _score(
        self, ctx: Context, noise: list[Tensor], grad: bool
    ) -> Generator[Request, Any, tuple[Tensor, Tensor, Scores]]:
        x = yield from self._trajectory(ctx, noise, grad)
        images = yield Decode(x, grad=grad, checkpoint=grad and self.checkpoint)
        scores = yield Score(images, x.detach(), final=True, grad=grad)
        return x, images, scores

    def _trajectory(
        self, ctx: Context, noise: list[Tensor], grad: bool
    ) -> Generator[Request, Any, Tensor]:
        """G without its decoder: x0 [n, *event] as a function of the noise."""
        x, kernel = noise[0] * size_of_start(ctx), self.kernel()
        for i, (t, u) in enumerate(ctx.grid.steps()):
            live = grad and i >= self._free(ctx)
            prediction = yield Denoise(x, t, grad=live, checkpoint=live and self.checkpoint)
            if self.variables == "initial":
                x = ctx.move(x, prediction, t, u, kernel, step=i)
            else:
                z = noise[i + 1] if i + 1 < len(noise) else None
                x = kernel(x, prediction, t, u, ctx.model.path).sample(z)
        return x

    @property
    def _scale(self) -> float:
        assert self.reward_scale is not None  # fit() has set it
        return self.reward_scale

    # --- the optimiser -----------------------------------------------------------------------

    def _optimiser(self, noise: list[Tensor]) -> torch.optim.Optimizer:
        lr = self._lr(noise[0][0].numel()) if self.lr is None else self.lr
        if self.optimizer == "adam":
            return torch.optim.Adam(noise, lr=lr)
        return torch.optim.SGD(noise, lr=lr, momentum=self.momentum, nesterov=self.momentum > 0.0)

    def _lr(self, d: int) -> float:
        """The published step size, longer where fewer steps than published are made."""
        steps = max(1, (self.n_iterations or 1) - 1)
        if self.optimizer == "adam":  # every number moves by lr a step
            published, longer, most = 0.01, 99 / steps, 5.0
        else:
            longer = _reach(_PUBLISHED - 1, self.momentum) / _reach(steps, self.momentum)
            published, most = 5.0 * (d / 16384.0) ** 0.5, _LONGEST
        return published * min(most, max(1.0, longer))

    def _descend(
        self,
        ctx: Context,
        noise: list[Tensor],
        slopes: tuple[Tensor, ...],
        optimiser: torch.optim.Optimizer,
        k: int,
    ) -> None:
        """One step of the optimiser on -reward_scale r + reg_weight reg, in place."""
        free = noise[self._free(ctx) :]
        grads = [-s.to(z) for s, z in zip(slopes, free, strict=True)]
        if self.regulariser != "none" and self.reg_weight:
            flat = torch.cat([z.flatten(1) for z in free], 1)
            pull = slope(self.regulariser, flat, ctx.key("regulariser", k))
            parts = pull.split([z[0].numel() for z in free], 1)
            grads = [
                g + self.reg_weight * p.reshape(g.shape) for g, p in zip(grads, parts, strict=True)
            ]
        for z, g in zip(free, clipped(grads, self.clip), strict=True):
            z.grad = g
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def _reach(steps: int, momentum: float) -> float:
    """How far so many Nesterov steps along one direction go, in steps without momentum."""
    speeds = [(1.0 - momentum**k) / (1.0 - momentum) for k in range(1, steps + 1)]
    return steps + momentum * sum(speeds)


def size_of_start(ctx: Context) -> float:
    """The norm of a starting state over sqrt(d): 1, but for coordinates that explode.

    Regularisers, step sizes and perturbations are meant for noise of N(0, I).
    """
    first = ctx.grid.times[0]
    size = math.sqrt(first.alpha**2 + first.sigma**2)
    return size if size > 1.5 else 1.0


def clipped(grads: list[Tensor], limit: float | None) -> list[Tensor]:
    """Gradients [n, ...] with the joint norm of each row at most ``limit``; NaN is no step."""
    grads = [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in grads]
    if limit is None:
        return grads
    norm = sum(g.flatten(1).square().sum(1) for g in grads).sqrt()  # type: ignore[union-attr]
    factor = (limit / (norm + _EPS)).clamp_max(1.0)
    return [g * factor.reshape(-1, *[1] * (g.ndim - 1)) for g in grads]


def _radius(noise: list[Tensor]) -> list[float]:
    """|z| / sqrt(d) of the starting noise of each row; near 1 for noise."""
    flat = noise[0].flatten(1)
    return (torch.linalg.vector_norm(flat, dim=1) / flat.shape[1] ** 0.5).tolist()

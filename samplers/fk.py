"""Feynman-Kac steering: particles that are resampled towards reward while they are denoised.

Singhal et al. (2025), "A general framework for inference-time scaling and steering of diffusion
models", arXiv 2501.06848. At checkpoints the current estimate of x0 is scored, a cumulative log
potential phi is formed from rho = reward_scale * r, and the weights follow

    log_w += phi_t - phi_previous,    phi_0 = reward_scale * r(delivered sample)

Telescoping gives every particle the total weight exp(reward_scale r(x0)) whatever the potentials
in between, so they change variance only. Weights are carried through steps without resampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import IdleOption, OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.model import Model
from steering.particles import State, ess, resample
from steering.paths import Time
from steering.registry import METHODS
from steering.requests import Decode, Denoise, Progress, Run, Score
from steering.resampling import scheme
from steering.samplers.base import (
    Damping,
    Sampler,
    check_levels,
    check_resampling,
    check_scale,
    checkpoint_steps,
    damping,
    deliver,
    fit_population,
    lift,
    refuse_idle,
    tilt,
)
from steering.samplers.fk_authors import run_authors

Potential = Callable[[Tensor], Tensor]
"""rho [m, n] at the m checkpoints so far -> cumulative log potential [n]."""

POTENTIALS: dict[str, Potential] = {
    "difference": lambda rho: rho[-1],
    "max": lambda rho: rho.max(0).values,
    "sum": lambda rho: rho.sum(0),
    "none": lambda rho: torch.zeros_like(rho[-1]),
}


_AUTHORS: dict[str, object] = {
    "n_particles": 4,
    "potential": "max",
    "checkpoints": (0.2, 0.4, 0.6, 0.8),
    "damping": "none",
}


@METHODS.register("fk")
@dataclass(frozen=True, kw_only=True)
class FK(Sampler):
    """Feynman-Kac steering.

    Attributes:
        n_particles: how many; None spends the budget (8 where there is none).
        reward_scale: lambda of the target p(x) exp(lambda r(x)). None takes 2 / (the reward's
            spread between samples of a prompt) where that is known, else 10.
        potential: "difference", "max", "sum", "none", or a function of rho [m, n] -> [n].
        checkpoints: where to score and resample, as fractions of the steps made.
        noise_levels: the same as noise shares sigma / (alpha + sigma), instead of fractions.
        damping: "measured" lets early potentials count less, by the measured slope of final
            rewards on those of one-step estimates; "none" takes them in full, as look-ahead and
            draws always do. None is "measured", in mode "authors" "none".
        resample: "ess" when the effective sample size falls below ess_threshold * n_particles,
            "always" or "never".
        resampler: a scheme of steering.resampling.
        lookahead: deterministic-to-random steps from a checkpoint to a sample to score; 0 scores
            the one-step estimate of x0. Costs lookahead network calls per particle and draw.
        n_draws: look-ahead samples per particle; their potential is log mean exp(rho).
        mode: "exact", or "authors" for the behaviour of the published code (its weights are
            dropped when ESS is high and its last correction is of an estimate).
    """

    n_particles: int | None = None
    reward_scale: float | None = None
    potential: str | Potential = "difference"
    checkpoints: tuple[float, ...] = (0.4, 0.55, 0.7, 0.85)
    noise_levels: tuple[float, ...] | None = None
    damping: Damping | None = None
    resample: Literal["ess", "always", "never"] = "ess"
    ess_threshold: float = 0.5
    resampler: str = "systematic"
    lookahead: int = 0
    n_draws: int = 1
    mode: Literal["exact", "authors"] = "exact"
    eta: float = 1.0

    name: ClassVar[str] = "fk"
    summary: ClassVar[str] = "particles resampled towards reward while they are denoised"
    paper: ClassVar[str] = "Singhal et al. 2025, arXiv 2501.06848"
    target: ClassVar[str] = "tilted"
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Authors' scripts for SD and SDXL: 4 particles, 100 DDIM steps, checkpoints 20, 40, ...
        # 80 of 100, potential max (exact here). Their lambda is 2 or 10 by script: ours stays.
        "sd15": _AUTHORS,
        "sdxl": _AUTHORS,
        # One-step estimates of flow models carry little before a third of the steps.
        "flow": {"n_particles": 8, "checkpoints": (0.4, 0.6, 0.8), "eta": 0.5},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_particles is not None and self.n_particles < 1:
            raise OptionError(f"fk: n_particles must be at least 1, got {self.n_particles}.")
        if isinstance(self.potential, str) and self.potential not in POTENTIALS:
            raise OptionError(
                f"fk: unknown potential {self.potential!r}; known: {', '.join(POTENTIALS)}, or a "
                "function of the scaled rewards [m, n]."
            )
        if not all(0.0 <= f < 1.0 for f in self.checkpoints):
            raise OptionError(f"fk: checkpoints are fractions in [0, 1), got {self.checkpoints}.")
        if not all(0.0 <= share <= 1.0 for share in self.noise_levels or ()):
            raise OptionError(f"fk: noise_levels are shares in [0, 1], got {self.noise_levels}.")
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise OptionError(f"fk: ess_threshold must lie in [0, 1], got {self.ess_threshold}.")
        if self.lookahead < 0 or self.n_draws < 1:
            raise OptionError("fk: lookahead must be >= 0 and n_draws >= 1.")
        scheme(self.resampler)
        check_scale("fk", self.reward_scale)
        self._check_stochastic()
        # An instance is as honest as its options.
        target = "tilted" if self.mode == "exact" else "heuristic"
        object.__setattr__(self, "target", target)
        if self.mode == "authors":
            self._check_authors()
        self._check_idle()

    def _check_authors(self) -> None:
        if self.guide is not None:
            raise OptionError("fk: mode='authors' knows no guidance; use mode='exact'.")
        idle = ("lookahead", "n_draws", "ess_threshold", "resampler")
        refuse_idle(self, "mode='authors'", *idle)
        if self.damping == "measured":
            raise OptionError("fk: mode='authors' damps nothing; leave damping out.")
        if self.potential not in ("difference", "max", "sum"):
            raise OptionError(
                "fk: mode='authors' knows the potentials difference, max and sum, got "
                f"{self.potential!r}; mode='exact' takes any."
            )

    def _check_idle(self) -> None:
        if self.potential == "none":
            scoring = ("lookahead", "n_draws", "damping", "checkpoints", "noise_levels")
            resampling = ("resample", "ess_threshold", "resampler")
            refuse_idle(self, "potential='none'", *scoring, *resampling)
        if self.damping == "measured" and (self.lookahead or self.n_draws > 1):
            setting = "lookahead" if self.lookahead else "n_draws"
            raise IdleOption(
                f"fk: damping='measured' has no meaning with {setting}: samples are judged and no "
                "estimates. Leave one out.", ("damping",),
            )  # fmt: skip
        if self.noise_levels is not None:
            refuse_idle(self, "noise_levels", "checkpoints")
        check_resampling(self)

    @property
    def weighed(self) -> bool:
        return True

    def levels(self, model: Model) -> Grid:
        if self.n_draws > 1 and self.lookahead == 0 and getattr(model, "pipe", None) is not None:
            raise OptionError(
                f"fk: n_draws={self.n_draws} draws x0 from its posterior, of which the network of "
                f"{model.name!r} gives the mean only. Set lookahead=1 or more: the ends of these "
                "walks are samples."
            )
        return super().levels(model)

    def _check_stochastic(self) -> None:
        many = self.n_particles is None or self.n_particles > 1
        if many and self.resample != "never" and not self.kernel().stochastic:
            raise OptionError(
                "fk resamples, but eta=0 makes the sampler deterministic: copies of a particle "
                "would stay identical. Set eta > 0 (for flow models too: the eta-kernel keeps "
                "their marginals), or resample='never'."
            )

    def checkpoint_steps(self, grid: Grid) -> list[int]:
        """Step indices before which particles are scored.

        The last step adds no noise: copies made before it would be delivered as copies, and the
        finished samples are scored right after it. So it is never a checkpoint.
        """
        return checkpoint_steps(grid, self.checkpoints, self.noise_levels)

    def cost(self, plan: Plan) -> Cost:
        n, steps = self.n_particles or 1, self.checkpoint_steps(plan.grid)
        if self.mode == "authors":
            scored = n * len({*steps, len(plan.grid) - 1}) + n
            return Cost(nfe=n * plan.trajectory, decodes=scored, reward_calls=scored)
        if self.potential == "none":
            steps = []
        guided = sum(self.per_step(plan)[1])
        scored = n * (self.n_draws * len(steps) + guided + 1)
        ahead = sum(sum(self._ahead_costs(plan, i)) for i in steps)
        nfe = n * plan.trajectory + n * self.n_draws * ahead
        return Cost(nfe=nfe, decodes=scored, reward_calls=scored)

    def _ahead_costs(self, plan: Plan, i: int) -> list[int]:
        return [plan.costs[k] for k in self._ahead(plan.grid, i)[1:]] if self.lookahead else []

    def _ahead(self, grid: Grid, i: int) -> list[int]:
        """Nodes of a look-ahead from step i, the end excluded."""
        left = len(grid) - i
        count = min(self.lookahead + 1, left)
        return [i + (k * left) // count for k in range(count)]

    def fit(self, plan: Plan) -> FK:
        if self.mode == "exact" and self.potential != "none":
            check_levels(self, "checkpoints", plan.grid, self.checkpoint_steps(plan.grid))
        return fit_population(self, plan, 8)

    def run(self, ctx: Context) -> Run:
        if self.mode == "authors":
            return (yield from run_authors(self, ctx))
        assert self.n_particles is not None
        state, kernel, grid = State.start(ctx.noise(self.n_particles)), self.kernel(), ctx.grid
        checkpoints, history = self.checkpoint_steps(grid), torch.zeros(0, len(state)).double()
        for i, (t, u) in enumerate(grid.steps()):
            state = yield from self.ask(ctx, state, t, i)
            if i in checkpoints and self.potential != "none":
                rho = yield from self._rho(ctx, state, i)
                history = torch.cat([history, rho[None]])
                state = state.set_potential(self._factor(grid, i) * self._potential(history))
                state, history = yield from self._resample(ctx, state, history, i)
            state = self.advance(ctx, state, t, u, i, kernel)
            yield Progress(step=i + 1, of=len(grid), info={"t": t.t})
        return (yield from deliver(ctx, state, self.reward_scale))

    def _factor(self, grid: Grid, i: int) -> float:
        """What the potential of step i counts; only one-step estimates are in doubt."""
        plain = self.lookahead == 0 and self.n_draws == 1
        return damping(self.damping or "measured" if plain else "none", grid, i)

    def _potential(self, history: Tensor) -> Tensor:
        rule = POTENTIALS[self.potential] if isinstance(self.potential, str) else self.potential
        phi = rule(history)
        if not isinstance(phi, Tensor) or phi.shape != history[-1].shape:
            got = f"shape {tuple(phi.shape)}" if isinstance(phi, Tensor) else repr(phi)
            raise OptionError(
                f"fk: the potential must return one number per particle, {len(history[-1])} in "
                f"all as a tensor, got {got}."
            )
        if bool((torch.isnan(phi) | torch.isposinf(phi)).any()):
            raise OptionError(f"fk: the potential returned {phi.tolist()}: NaN or +inf.")
        return lift(phi)

    def _resample(self, ctx: Context, state: State, history: Tensor, i: int) -> Run:
        """Resamples if the rule says so; the reward history moves with its particles."""
        size = ess(state.log_w)
        info = {"ess": size, "checkpoint": i, "rewards": history[-1] / (self.reward_scale or 1.0)}
        if self.resample == "always" or (
            self.resample == "ess" and size < self.ess_threshold * len(state)
        ):
            key = ctx.key("resample", i)
            state, ancestors = resample(state, scheme(self.resampler), key)
            history = history[:, ancestors]
            info |= {"ancestors": ancestors, "roots": len(state.root.unique())}
        yield Progress(step=i, of=len(ctx.grid), info=info)
        return state, history  # type: ignore[return-value]

    def _rho(self, ctx: Context, state: State, i: int) -> Run:
        """reward_scale * r of the estimate of x0, [n]; over draws log mean exp."""
        draws = yield from self._estimates(ctx, state, i)
        values = []
        for x0 in draws:
            images = yield Decode(x0, preview=True)
            scores = yield Score(images, x0)
            values.append(tilt(as_float64(scores.value), self.reward_scale))
            yield Progress(step=i, of=len(ctx.grid), preview=images)
        rho = torch.logsumexp(torch.stack(values), 0) - math.log(len(values))
        return lift(values[0] if len(values) == 1 else rho)  # type: ignore[return-value]

    def _estimates(self, ctx: Context, state: State, i: int) -> Run:
        """Guesses of x0 given x_t: n_draws tensors [n, *event]."""
        prediction = state.prediction
        assert prediction is not None
        if self.lookahead == 0:
            if self.n_draws == 1:
                return [prediction.x0]  # type: ignore[return-value]
            return list(prediction.draw(self.n_draws, ctx.key("draw", i)))  # type: ignore[return-value]
        nodes = [ctx.grid.times[k] for k in self._ahead(ctx.grid, i)] + [ctx.grid.times[-1]]
        draws = []
        for j in range(self.n_draws):
            draws.append((yield from self._walk(ctx, state, nodes, f"lookahead/{i}/{j}")))
        return draws  # type: ignore[return-value]

    def _walk(self, ctx: Context, state: State, nodes: list[Time], stream: str) -> Run:
        """One path from x_t to the end over few nodes; the first prediction is already paid."""
        x, prediction, kernel = state.x, state.prediction, self.kernel()
        for k, (t, u) in enumerate(pairwise(nodes)):
            if k:
                prediction = yield Denoise(x, t)
            assert prediction is not None
            x = ctx.move(x, prediction, t, u, kernel, step=k, stream=stream)
        return x  # type: ignore[return-value]

"""Training-free guidance: each step leans towards reward by its gradient at the estimate of x0.

Ye et al. (2024), "TFG: unified training-free guidance for diffusion models", arXiv 2409.15761,
whose settings include DPS (Chung et al. 2023), LGD-MC (Song et al. 2023), FreeDoM (Yu et al.
2023), MPGD (He et al. 2023) and UGD (Bansal et al. 2023). With f = reward_scale * r and its
smoothed form f~(y) = ln mean_j exp f(y + xi_j), a step from t to u is

    pull = grad_{x_t} f~(x0_hat(x_t)), through the network           ("variance guidance")
    lean = y - x0_hat after n_iter moves  y += mu_t grad_y f~(y)     ("mean guidance")
    mean = base kernel at the estimate moved by lean, rho_t pull added to the score or the state

A :class:`Guide` is these settings. It is a method of its own (`guidance`) and a modifier of
others, which weigh by the ratio of the base density to the guided one where they keep weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from steering.grids import Grid
from steering.method import Context, Plan, coerce
from steering.noise import NoiseKey
from steering.particles import State
from steering.paths import Prediction, Time
from steering.requests import Decode, Denoise, Gradient, Request, Score
from steering.samplers.guide_checks import check_guide
from steering.samplers.twists import clipped, detached, draw, propose, scored, usable
from steering.transitions import Step, Transition, renoise

Visit = Callable[[int, Tensor, Prediction], None]
"""Told (node, x, prediction) wherever the network was asked."""


@dataclass(frozen=True, eq=False)
class Guided:
    """What guidance found at x_t, [n, *event] each; nothing carries a graph."""

    prediction: Prediction
    pull: Tensor
    lean: Tensor

    def rows(self, index: Tensor | slice) -> Guided:
        """The same of these rows."""
        return Guided(self.prediction.rows(index), self.pull[index], self.lean[index])


class Rows(NamedTuple):
    """Whose rows of states these are: what their random numbers and prompts are named by.

    Attributes:
        slots: of each row; None for 0 .. n - 1.
        stream: of the noise of their steps.
        cond: another prompt than the run's own.
    """

    slots: Sequence[int] | None = None
    stream: str = "proposal"
    cond: int | None = None

    def name(self, what: str) -> str:
        """The stream of further noise."""
        return what if self.stream == "proposal" else f"{what}/{self.stream}"


_OWN = Rows()


@dataclass(frozen=True, kw_only=True)
class Guide:
    """How steps are guided.

    Attributes:
        rho: strength of the gradient by x_t, through the network; 0 leaves the network alone.
        mu: strength of each move of the estimate of x0 itself; 0 makes none.
        n_iter: how many such moves.
        schedule: both strengths over the steps: "constant", or with mean 1 "increase" in
            proportion to a = (signal share at t) / (at u) and "decrease" to 1 - a, where the
            signal share is alpha^2 / (alpha^2 + sigma^2).
        space: "score" adds rho * gradient to the score (exact where f is linear and data
            Gaussian); "state" adds it to x_u, as DPS, FreeDoM and TFG do.
        keep_eps: whether eps stays what it was when the estimate of x0 moves.
        smoothing: noise xi on the estimate that f is averaged over, as a multiple of ``spread``.
        spread: "level" sigma / sqrt(alpha^2 + sigma^2), "constant" 1, "posterior" the standard
            deviation of x0 given x_t for Gaussian data of standard deviation ``data_std``.
        n_draws: samples of that noise.
        normalise: "value" divides gradients by |f|, "unit" gives them the norm of unit noise.
        clip_norm: most that a sample's gradient may measure, by a state of unit variance; None:
            any.
        recurrence: how often a step is made; in between its result is noised again.
        start, stop: shares of the steps between which steps are guided.
        micro_batch: samples differentiated at once; None differentiates all.
        checkpoint: keep no activations; costs a second forward pass.
    """

    rho: float = 1.0
    mu: float = 0.0
    n_iter: int = 1
    schedule: Literal["constant", "increase", "decrease"] = "constant"
    space: Literal["score", "state"] = "score"
    keep_eps: bool = True
    smoothing: float = 0.0
    spread: Literal["level", "constant", "posterior"] = "level"
    data_std: float = 1.0
    n_draws: int = 1
    normalise: Literal["none", "value", "unit"] = "none"
    clip_norm: float | None = None
    recurrence: int = 1
    start: float = 0.0
    stop: float = 1.0
    micro_batch: int | None = None
    checkpoint: bool = False

    name: ClassVar[str] = "guidance"

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, coerce(type(self), f.name, getattr(self, f.name)))
        check_guide(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:  # noqa: ANN401
        """Options are read by `as_guide`: pydantic would drop "preset" and unknown names."""
        from pydantic_core.core_schema import is_instance_schema

        return is_instance_schema(cls)

    @property
    def differentiates(self) -> bool:
        """Whether any gradient is asked for."""
        return self.rho > 0.0 or self.mu > 0.0

    def guided_steps(self, grid: Grid, *, weighed: bool = False) -> range:
        """The steps that are guided; where weights are kept, no quiet one: the last has
        no density, and others would be shifted by many of their standard deviations."""
        last = grid.quiet if weighed else len(grid)
        return range(grid.nearest(self.start), min(grid.nearest(self.stop), last))

    def charges(
        self, plan: Plan, *, weighed: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(network rows, decodes and reward calls) that each step of one sample asks for."""
        steps = self.guided_steps(plan.grid, weighed=weighed)
        calls = self.n_draws * ((self.rho > 0.0) + self.n_iter * (self.mu > 0.0))
        rows = [c * (self.recurrence if i in steps else 1) for i, c in enumerate(plan.costs)]
        each = [calls * self.recurrence if i in steps else 0 for i in range(len(rows))]
        return tuple(rows), tuple(each)

    # --- single trajectories ---

    def step(
        self,
        ctx: Context,
        x: Tensor,
        t: Time,
        u: Time,
        i: int,
        kernel: Transition,
        reward_scale: float,
        *,
        weighed: bool = False,
        rows: Rows = _OWN,
        prediction: Prediction | None = None,
        visit: Visit | None = None,
    ) -> Generator[Request, Any, tuple[Tensor, Tensor]]:
        """(x_u, log base density - log density of the real proposal [n]).

        Args:
            weighed: the ratio is needed, so the last step is not guided.
            prediction: at x, where it is paid for; the gradient through the network asks again.
            visit: sees what the network is asked about at x.
        """
        guided, stream = i in self.guided_steps(ctx.grid, weighed=weighed), rows.stream
        if not guided:
            if prediction is None:
                prediction = yield Denoise(x, t, cond=rows.cond)
            if visit is not None:
                visit(i, x, prediction)
            base = kernel(x, prediction, t, u, ctx.model.path)
            return draw(ctx, base, None, i, stream, rows.slots)
        for turn in range(self.recurrence):
            seen = yield from self.look(ctx, x, t, i, reward_scale, turn, rows, prediction)
            if visit is not None and turn == 0:
                visit(i, x, seen.prediction)
            base, shift = self.proposal(ctx, x, seen, t, u, i, kernel)
            if weighed and not base.random:
                shift = None  # as of a schedule of eta that starts at 0: there is no density
            y, ratio = draw(
                ctx, base, shift, i, f"{stream}/{turn}" if turn else stream, rows.slots
            )
            if turn + 1 == self.recurrence:
                return y, ratio
            key, slots = ctx.key(rows.name(f"travel/{turn}"), i), rows.slots or len(y)
            x = renoise(y, u, t, key.normal(slots, y.shape[1:], device=str(y.device)))
            prediction = None
        raise AssertionError("recurrence is at least 1")

    # --- populations ---

    def attach(
        self, ctx: Context, state: State, t: Time, i: int, reward_scale: float
    ) -> Generator[Request, Any, State]:
        """The state with its prediction and guidance, which a gather moves with the particles.

        What the state already has is not asked for again.
        """
        if i not in self.guided_steps(ctx.grid, weighed=True):
            known = state.prediction or (yield Denoise(state.x, t))
            return replace(state, prediction=known)
        if "pull" in state.memory:
            return state
        seen = yield from self.look(ctx, state.x, t, i, reward_scale, prediction=state.prediction)
        memory = {**state.memory, "pull": seen.pull, "lean": seen.lean}
        return replace(state, prediction=seen.prediction, memory=memory)

    def advance(
        self, ctx: Context, state: State, t: Time, u: Time, i: int, kernel: Transition
    ) -> State:
        """The state after a guided step, the ratio of the densities in its weights."""
        assert state.prediction is not None
        seen = Guided(state.prediction, state.memory["pull"], state.memory["lean"])
        base, shift = self.proposal(ctx, state.x, seen, t, u, i, kernel)
        return propose(ctx, state, base, shift, i)

    # --- the algorithm ---

    def look(
        self,
        ctx: Context,
        x: Tensor,
        t: Time,
        i: int,
        reward_scale: float,
        turn: int = 0,
        rows: Rows = _OWN,
        prediction: Prediction | None = None,
    ) -> Generator[Request, Any, Guided]:
        """Prediction, pull and lean at x [n, *event]."""
        size, parts = self.micro_batch or len(x), []
        key, slots = ctx.key(rows.name(f"smooth/{turn}"), i), rows.slots or range(len(x))
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            xi = self._noise(key, slots[part], x, t)
            known = None if prediction is None else prediction.rows(part)
            found = self._look(x[part], t, xi, i, ctx.grid, reward_scale, known, rows.cond)
            parts.append((yield from found))
        return Guided(
            Prediction.cat([p.prediction for p in parts]),
            torch.cat([p.pull for p in parts]),
            torch.cat([p.lean for p in parts]),
        )

    def _look(
        self,
        x: Tensor,
        t: Time,
        xi: Tensor | None,
        i: int,
        grid: Grid,
        reward_scale: float,
        known: Prediction | None = None,
        cond: int | None = None,
    ) -> Generator[Request, Any, Guided]:
        if self.rho > 0.0:
            prediction, pull = yield from self._pull(x, t, xi, reward_scale, cond)
        else:
            prediction = known or (yield Denoise(x, t, cond=cond))
            pull = torch.zeros_like(x)
        y, strength = prediction.x0, self.mu * self.weight(grid, i)
        for _ in range(self.n_iter if self.mu > 0.0 else 0):
            y = y + strength * (yield from self._slope(y, xi, reward_scale))
        return Guided(prediction, pull, y - prediction.x0)

    # What carries a graph is local to these two, so that it is freed before the next call.

    def _pull(
        self, x: Tensor, t: Time, xi: Tensor | None, reward_scale: float, cond: int | None
    ) -> Generator[Request, Any, tuple[Prediction, Tensor]]:
        """(prediction, gradient of f~ by x_t through the network)."""
        leaf = x.detach().clone().requires_grad_()
        prediction = yield Denoise(leaf, t, grad=True, checkpoint=self.checkpoint, cond=cond)
        f = yield from self._smoothed(prediction.x0, xi, reward_scale)
        slope = yield Gradient(f, leaf)
        # By a state c times as large a slope is c times as small.
        size = math.sqrt(t.alpha**2 + t.sigma**2)
        return detached(prediction), self._measured(slope, f.detach(), size)

    def _slope(
        self, y: Tensor, xi: Tensor | None, reward_scale: float
    ) -> Generator[Request, Any, Tensor]:
        """Gradient of f~ by the estimate y itself."""
        leaf = y.clone().requires_grad_()
        f = yield from self._smoothed(leaf, xi, reward_scale)
        slope = yield Gradient(f, leaf)
        return self._measured(slope, f.detach())

    def _noise(self, key: NoiseKey, slots: Sequence[int], x: Tensor, t: Time) -> Tensor | None:
        """xi [n_draws, n, *event] of these slots; None, and nothing drawn, without smoothing."""
        if not self.smoothing:
            return None
        z = key.normal(slots, (self.n_draws, *x.shape[1:])).transpose(0, 1).to(x)
        return self.noise_std(t) * z

    def noise_std(self, t: Time) -> float:
        """The standard deviation of xi at a level."""
        power = t.alpha**2 + t.sigma**2
        std = {"constant": 1.0, "level": t.sigma / math.sqrt(power)}.get(self.spread)
        if std is None:
            s = self.data_std
            std = s * t.sigma / math.sqrt((t.alpha * s) ** 2 + t.sigma**2)
        return self.smoothing * std

    def _smoothed(
        self, y: Tensor, xi: Tensor | None, reward_scale: float
    ) -> Generator[Request, Any, Tensor]:
        """ln mean_j exp f(y + xi_j), [n] float64, with a graph."""
        many = y if xi is None else (y[None] + xi).flatten(0, 1)
        images = yield Decode(many, grad=True, checkpoint=self.checkpoint)
        scores = yield Score(images, many.detach(), grad=True)
        f = reward_scale * scores.value.double().reshape(-1, len(y))
        return f[0] if len(f) == 1 else torch.logsumexp(f, 0) - math.log(len(f))

    def _measured(self, slope: Tensor, f: Tensor, scale: float = 1.0) -> Tensor:
        """A gradient [n, *event] without NaN, normalised and clipped.

        Args:
            scale: of that by which is differentiated, against unit variance.
        """
        slope, _ = usable(slope)
        if self.normalise != "none":
            size = f.abs().clamp_min(1e-6).to(slope)
            if self.normalise == "unit":
                norm = slope.flatten(1).norm(dim=1).clamp_min(1e-30)
                size = norm * scale / math.sqrt(slope[0].numel())
            slope = slope / size.reshape(-1, *[1] * (slope.ndim - 1))
        return clipped(slope, None if self.clip_norm is None else self.clip_norm / scale, None)

    def weight(self, grid: Grid, i: int) -> float:
        """The schedule at step i; its mean over all steps is 1."""
        if self.schedule == "constant":
            return 1.0
        shares = [time.alpha**2 / (time.alpha**2 + time.sigma**2) for time in grid.times]
        values = [a / b for a, b in pairwise(shares)]
        if self.schedule == "decrease":
            values = [1.0 - a for a in values]
        total = sum(values)  # 0 where one step leads from pure noise to data
        return values[i] * len(values) / total if total else 0.0

    def proposal(
        self, ctx: Context, x: Tensor, seen: Guided, t: Time, u: Time, i: int, kernel: Transition
    ) -> tuple[Step, Tensor]:
        """(base step from x [n, *event], how far guidance moves its mean)."""
        base = kernel(x, seen.prediction, t, u, ctx.model.path)
        return base, self.shift(ctx, x, seen, base, t, u, i, kernel)

    def shift(
        self,
        ctx: Context,
        x: Tensor,
        seen: Guided,
        base: Step,
        t: Time,
        u: Time,
        i: int,
        kernel: Transition,
    ) -> Tensor:
        """Mean of the guided step less that of the base step, [n, *event]."""
        strength, moved = self.rho * self.weight(ctx.grid, i), seen.prediction
        if self.space == "score":
            moved = scored(moved, strength * seen.pull, t)
        eps = moved.eps if self.keep_eps else moved.eps - (t.alpha / t.sigma) * seen.lean
        moved = Prediction(moved.x0 + seen.lean, eps)
        mean = kernel(x, moved, t, u, ctx.model.path).mean
        if self.space == "state" and not t.pure:
            # Written for VP states in the papers; the power makes it the same on any path.
            power = t.alpha**2 + t.sigma**2
            mean = mean + (strength * power * u.alpha / t.alpha) * seen.pull
        return mean - base.mean

"""Branching: particles draw candidates, the candidates are judged early, one of each survives.

What SVDD and CoDe share. With M candidates c of a particle whose log potential is phi, and
f(c) = reward_scale * r(estimate of x0 at c),

    softmax:  keep c with probability ~ exp f(c),   log_w += log mean exp f - phi,   phi = f(c)
    argmax:   keep the first best, no weights

The softmax rule with its weight is exact: weight times indicator of the survivor averages to
mean_c exp(f(c) - phi), as if all candidates had gone on. So a particle's weights telescope to
exp(reward_scale r(x0)), as in every other method here. Candidates are asked about once: the
prediction that judges the survivor is that of its next step.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.noise import NoiseKey, categorical
from steering.particles import State, ess, log_mean_exp, resample
from steering.requests import Decode, Denoise, Outcome, Progress, Request, Run, Score
from steering.resampling import scheme
from steering.samplers.base import (
    Damping,
    Sampler,
    check_resampling,
    check_scale,
    damping,
    fit_population,
    preview,
    refuse_idle,
    tilt,
)


class Segment(NamedTuple):
    """Steps start .. stop - 1 of the grid, walked by one path per particle or by M candidates."""

    start: int
    stop: int
    branched: bool


@dataclass(frozen=True, kw_only=True)
class Branches(Sampler):
    """Base of the methods that branch; a subclass says where, by its segments.

    Attributes:
        n_particles: independent particles, each delivers one sample; None spends the budget (4
            where there is none).
        n_branches: M, candidates per particle.
        reward_scale: as in `fk`; "argmax" knows only 0 (the first candidate, as without reward)
            and more than 0.
        select: "softmax" with its weights, whose target is p(x) exp(reward_scale r(x)), or
            "argmax", a greedy search for high reward.
        start: share of the steps made before which nothing is judged: one-step estimates of x0
            say little before a quarter of them.
        damping: "measured" lets early potentials count less, by the measured slope of final
            rewards on those of estimates; "none" takes them in full. "softmax" only.
        resample: resampling across particles after a choice: "never", "always", or "ess" when
            the effective sample size falls below ess_threshold * n_particles. "softmax" only.
        resampler: a scheme of steering.resampling.
    """

    n_particles: int | None = None
    n_branches: int = 4
    reward_scale: float | None = None
    select: Literal["softmax", "argmax"] = "softmax"
    start: float = 0.25
    damping: Damping = "measured"
    resample: Literal["never", "ess", "always"] = "never"
    ess_threshold: float = 0.5
    resampler: str = "systematic"
    eta: float = 1.0

    name: ClassVar[str]
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_particles is not None and self.n_particles < 1:
            raise OptionError(
                f"{self.name}: n_particles must be at least 1, got {self.n_particles}."
            )
        if self.n_branches < 1:
            raise OptionError(
                f"{self.name}: n_branches must be at least 1, got {self.n_branches}."
            )
        if not 0.0 <= self.start <= 1.0:
            raise OptionError(f"{self.name}: start is a share in [0, 1], got {self.start}.")
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise OptionError(
                f"{self.name}: ess_threshold must lie in [0, 1], got {self.ess_threshold}."
            )
        if self.select == "argmax" and self.resample != "never":
            raise OptionError(
                f"{self.name}: select='argmax' makes no weights, so resample={self.resample!r} "
                "has nothing to resample by. Use select='softmax'."
            )
        scheme(self.resampler)
        check_resampling(self)
        if self.select == "argmax":
            refuse_idle(self, "select='argmax'", "damping")
        check_scale(self.name, self.reward_scale)
        self._check_stochastic()
        # An instance is as honest as its options: only the weighted rule has a target law.
        target = "tilted" if self.select == "softmax" else "heuristic"
        object.__setattr__(self, "target", target)

    def _check_stochastic(self) -> None:
        many = self.n_branches > 1 or self.resample != "never"
        if many and not self.kernel().stochastic:
            raise OptionError(
                f"{self.name} branches, but eta=0 makes the sampler deterministic: candidates of "
                "a particle would be copies of it. Set eta > 0 (for flow models too: the "
                "eta-kernel keeps their marginals), or use best_of_n."
            )

    @property
    def weighed(self) -> bool:
        """True of "argmax" too, so that both rules guide the same steps."""
        return True

    def cut(self, grid: Grid) -> list[Segment]:
        """The segments of a walk; the last step adds no noise, so no branching starts there."""
        raise NotImplementedError

    def segments(self, grid: Grid) -> list[Segment]:
        """The same where there is a choice to make, else one plain walk."""
        segments = self.cut(grid)
        if self.n_branches == 1 and self.resample == "never":
            return [Segment(segments[0].start, len(grid), branched=False)]
        return segments

    def fan(self) -> int:
        """First states per particle: more than one where noise itself is branched."""
        return 1

    def first(self, ctx: Context, n: int) -> Tensor:
        """First states [n, *event] at the node where the first segment starts."""
        return ctx.noise(n)

    def cost(self, plan: Plan) -> Cost:
        """Every node's network rows are those of the paths that arrive there.

        Where a segment is guided from a judged node, the gradient asks the survivor again.
        """
        n, m, length = self.n_particles or 1, self.n_branches, len(plan.grid)
        segments, calls = self.segments(plan.grid), self.per_step(plan)[1]
        again = self.guide is not None and self.guide.rho > 0.0
        first = segments[0].start
        rows, judged = plan.costs[first] * self.fan(), calls[first] * (self.fan() - 1)
        known = False
        for start, stop, branched in segments:
            paths = m if branched else 1
            rows += paths * sum(plan.costs[start + 1 : min(stop, length - 1) + 1])
            rows += plan.costs[start] if known and again and calls[start] else 0
            judged += calls[start] + paths * sum(calls[start + 1 : stop])
            judged += paths if branched or stop == length else 0
            known = branched
        return Cost(nfe=n * rows, decodes=n * judged, reward_calls=n * judged)

    def fit(self, plan: Plan) -> Branches:
        chosen = any(segment.branched for segment in self.segments(plan.grid))
        if self.select == "argmax" and self.n_branches > 1 and not chosen:
            early = any(s.branched for s in replace(self, start=0.0).segments(plan.grid))
            raise OptionError(
                f"{self.name}: no step of this grid of {len(plan.grid)} branches from start="
                f"{self.start} on (the last one adds no noise), so nothing would be chosen. "
                f"{'Lower start, take' if early else 'Take'} more steps, or use best_of_n."
            )
        return fit_population(self, plan, 4)

    def run(self, ctx: Context) -> Run:
        assert self.n_particles is not None
        n, end = self.n_particles, len(ctx.grid)
        state = State.start(self.first(ctx, n * self.fan()))
        for segment in self.segments(ctx.grid):
            # Before copies are made: they share the answer.
            start = segment.start
            state = yield from self.ask(ctx, state, ctx.grid.times[start], start)
            state = _spread(state, n * self.n_branches if segment.branched else n)
            state = yield from self._walk(ctx, state, segment)
            if segment.branched or segment.stop == end:
                state = yield from self._judge(ctx, state, segment.stop)
            state = self._choose(state, n, ctx.key("branch", segment.stop))
            if segment.branched and segment.stop < end:
                state = yield from self._resample(ctx, state, segment.stop)
        reward, weighted = state.memory["reward"], self.select == "softmax"
        info = {"rewards": reward, "ess": ess(state.log_w)}
        yield Progress(step=end, of=end, info=info)
        return Outcome(
            x0=state.x,
            images=state.memory["images"],
            reward=reward,
            log_w=state.log_w,
            log_z=log_mean_exp(state.log_w) if weighted else None,
            slots=torch.arange(n),
        )

    def _walk(
        self, ctx: Context, state: State, segment: Segment
    ) -> Generator[Request, Any, State]:
        """The steps of a segment; a prediction that is still valid is used, not asked again."""
        kernel = self.kernel()
        for i in range(segment.start, segment.stop):
            t, u = ctx.grid.times[i], ctx.grid.times[i + 1]
            state = yield from self.ask(ctx, state, t, i)
            state = self.advance(ctx, state, t, u, i, kernel)
            yield Progress(step=i + 1, of=len(ctx.grid), info={"t": t.t})
        return state

    def _judge(self, ctx: Context, state: State, at: int) -> Generator[Request, Any, State]:
        """The potential of the paths at a node: of estimates of x0, at the end of samples."""
        if at < len(ctx.grid):
            prediction = yield Denoise(state.x, ctx.grid.times[at])
            state = replace(state, prediction=prediction)
            part = damping(self.damping, ctx.grid, at)
            rho = yield from preview(ctx, prediction.x0, self.reward_scale, at, part)
            return state.set_potential(rho)
        images = yield Decode(state.x)
        scores = yield Score(images, state.x, final=True)
        reward = as_float64(scores.value)
        state = replace(state, memory={"reward": reward, "images": images})
        return state.set_potential(tilt(reward, self.reward_scale))

    def _choose(self, state: State, n: int, key: NoiseKey) -> State:
        """One survivor of each particle's candidates, [n]."""
        log_w = state.log_w.reshape(n, -1)
        m = log_w.shape[1]
        if self.select == "argmax":
            chosen = state.phi.reshape(n, m).argmax(1)
        else:
            w = torch.exp(log_w - log_w.max(1, keepdim=True).values.clamp_min(-1e300))
            chosen = categorical(w, key.uniform(n)).clamp_max(m - 1)
        state = state.gather(torch.arange(n) * m + chosen)
        if self.select == "argmax":
            return replace(state, log_w=torch.zeros(n, dtype=torch.float64))
        return replace(state, log_w=torch.logsumexp(log_w, 1) - math.log(m))

    def _resample(self, ctx: Context, state: State, at: int) -> Generator[Request, Any, State]:
        size = ess(state.log_w)
        scale = (self.reward_scale or 1.0) * damping(self.damping, ctx.grid, at)
        info = {"ess": size, "node": at, "rewards": state.phi / scale}
        low = self.resample == "ess" and size < self.ess_threshold * len(state)
        if self.resample == "always" or low:
            key = ctx.key("resample", at)
            state, ancestors = resample(state, scheme(self.resampler), key)
            info |= {"ancestors": ancestors, "roots": len(state.root.unique())}
        yield Progress(step=at, of=len(ctx.grid), info=info)
        return state


def _spread(state: State, paths: int) -> State:
    """Each particle repeated as often as there are paths for it, with all that it has."""
    each = paths // len(state)
    return state if each == 1 else state.gather(torch.arange(len(state)).repeat_interleave(each))

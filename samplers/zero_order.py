"""Zero-order search: hill climbing in the space of starting noises.

Ma et al. (2025), arXiv 2501.09732. A pivot noise is compared with N neighbours on its sphere

    n' = |n| (cosine n/|n| + sqrt(1 - cosine^2) w),    w a random direction at right angles to n

each run to a sample and scored; the best becomes the pivot if it is better. The pivot's own sample
is known, so it is not made again. Each neighbour follows N(0, I) if the pivot does; noise that the
sampler adds on the way (eta > 0) is the same for all, so that only the start is searched.

Cost of R rounds of S steps: S (1 + R N) network rows, 1 + R N decodes and reward calls.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Context, Cost, Plan
from steering.noise import sphere_neighbour
from steering.registry import METHODS
from steering.requests import Progress, Request, Run
from steering.samplers.base import Sampler, afford, reaches, refuse_idle, within_budget
from steering.samplers.rollout import Winner, judge, require_continuous, require_noise, top, walk

_USUAL = 4
"""Neighbours of a round in the public code."""


@METHODS.register("zero_order")
@dataclass(frozen=True, kw_only=True)
class ZeroOrder(Sampler):
    """A pivot noise, its neighbours, a step to the best.

    Attributes:
        n_neighbours: samples of each round; 0 makes one sample and stops. None takes 4, more
            where that would leave some of the budget over, fewer where it pays for fewer.
        rounds: None spends the budget (4 where there is none).
        cosine: of the angle between pivot and neighbour: near 1 for small moves.
        restart: where no neighbour is better, "fresh" draws a new pivot, which takes the place of
            one neighbour in its round; "keep" looks for others round the same pivot. Neighbours
            have the pivot's norm, so without new pivots the search stays on one sphere.
        reward_max: stop after a round whose best reaches this reward.
    """

    n_neighbours: int | None = None
    rounds: int | None = None
    cosine: float = 0.95
    restart: Literal["fresh", "keep"] = "fresh"
    reward_max: float | None = None

    name: ClassVar[str] = "zero_order"
    summary: ClassVar[str] = "hill climbing among neighbours of the starting noise"
    paper: ClassVar[str] = "Ma et al. 2025, arXiv 2501.09732"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Public code for FLUX.1-dev: 4 rounds of 4 neighbours, a new pivot after a failure. It
        # makes the pivot again in every round; ours costs 4 samples less.
        "flux": {"n_neighbours": 4, "rounds": 4, "cosine": 0.95, "restart": "fresh"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_neighbours is not None and self.n_neighbours < 0:
            raise OptionError(f"zero_order: n_neighbours must be >= 0, got {self.n_neighbours}.")
        if self.rounds is not None and self.rounds < 1:
            raise OptionError(f"zero_order: rounds must be at least 1, got {self.rounds}.")
        if not -1.0 < self.cosine < 1.0:
            raise OptionError(f"zero_order: cosine must lie in (-1, 1), got {self.cosine}.")
        if self.n_neighbours == 0:
            refuse_idle(self, "n_neighbours=0", "rounds", "cosine", "restart", "reward_max")

    def cost(self, plan: Plan) -> Cost:
        """At most, where ``reward_max`` may stop it."""
        n, (rows, calls) = 1 + (self.rounds or 1) * self._each, self.per_step(plan)
        judged = n * (1 + sum(calls))
        return Cost(nfe=n * sum(rows), decodes=judged, reward_calls=judged)

    @property
    def _each(self) -> int:
        """Samples of each round."""
        return _USUAL if self.n_neighbours is None else self.n_neighbours

    def fit(self, plan: Plan) -> ZeroOrder:
        if self.n_neighbours is None:
            return replace(self, n_neighbours=self._filling(plan)).fit(plan)
        if self.rounds is None and self.n_neighbours > 0:
            what = f"round of {self.n_neighbours} neighbours and their pivot"
            rounds = afford(plan, lambda r: replace(self, rounds=r).cost(plan), 4, what, self)
            return replace(self, rounds=rounds)
        what = f"zero_order with {self.rounds} rounds of {self.n_neighbours} neighbours"
        within_budget(plan, self.cost(plan), what, self)
        return self

    def _filling(self, plan: Plan) -> int:
        """The usual number of neighbours, and what would be left over shared among the rounds."""

        def cost(n: int) -> Cost:
            return replace(self, n_neighbours=n, rounds=self.rounds or 1).cost(plan)

        if self.rounds is not None:
            what = f"neighbour in each of {self.rounds} rounds and their pivot"
            return afford(plan, cost, _USUAL, what, self)
        most = afford(plan, cost, 4 * _USUAL, "neighbour and its pivot", self)
        return most // max(1, most // _USUAL)

    def run(self, ctx: Context) -> Run:
        pivot, pivots, made = ctx.noise(1), 1, 1
        self._check(ctx, pivot)
        rewards, best = yield from self._try(ctx, pivot, None, 0)
        height: float | None = float(rewards[0])
        rounds = (self.rounds or 1) if self._each else 0
        for r in range(rounds):
            if reaches(best.reward, self.reward_max):
                break
            if height is None:
                key = ctx.key("init").at(slot=pivots)
                pivot, pivots = ctx.model.noise(1, key, cond=ctx.cond), pivots + 1
                around = self._neighbours(ctx, pivot, r, self._each - 1)
                noises = torch.cat([pivot, around])
            else:
                noises = self._neighbours(ctx, pivot, r, self._each)
            rewards, best = yield from self._try(ctx, noises, best, made)
            made += len(noises)
            k, floor = top(rewards), float(rewards[0]) if height is None else height
            moved = float(rewards[k]) > floor
            if moved:
                pivot, height = noises[k : k + 1], float(rewards[k])
            else:
                # A new pivot that came alone has had no neighbour yet.
                untried = height is None and len(noises) == 1
                height = floor if self.restart == "keep" or untried else None
            info = {"round": r, "rewards": rewards, "moved": moved, "best": best.reward}
            yield Progress(step=r + 1, of=rounds, info=info, preview=best.image)
        return best.outcome()

    def _try(
        self, ctx: Context, noises: Tensor, best: Winner | None, first: int
    ) -> Generator[Request, Any, tuple[Tensor, Winner]]:
        """Samples from these noises, judged; all rows share slot 0's noise on the way."""
        slots = [0] * len(noises)
        x = yield from walk(ctx, noises, self.kernel(), slots=slots, lead=self.lead(ctx))
        return (yield from judge(x, best, first))

    def _neighbours(self, ctx: Context, pivot: Tensor, r: int, n: int) -> Tensor:
        """n neighbours of pivot [1, *event]; round r has directions of its own."""
        z = ctx.key("neighbour", r).normal(n, pivot.shape[1:], device=str(pivot.device))
        return sphere_neighbour(pivot.expand(n, *pivot.shape[1:]), z, self.cosine)

    def _check(self, ctx: Context, x: Tensor) -> None:
        """Raises before anything is spent where noise has no neighbours."""
        if self._each == 0:
            return
        require_continuous(self.name, x, "a neighbour of a noise")
        require_noise(self.name, ctx)
        if math.prod(x.shape[1:]) < 2:
            raise OptionError(
                "zero_order: states of one number have no neighbours on their sphere; use "
                "random_search."
            )

"""Search over paths: re-noise promising states, denoise them again, keep the best.

Ma et al. (2025), arXiv 2501.09732. N paths follow the sampler to a seed level. Then, until the
end, each is re-noised M times by delta_f (the forward kernel, which keeps p_t) and denoised again
by delta_b > delta_f, so every round gains delta_b - delta_f; the one-step estimates of x0 at the
level reached are scored and the best N of the N M states go on. The last round reaches the data;
its samples are scored as they are, and the best one is returned.

Levels are nodes of the grid, given as shares of its steps: with S steps, seed node i, and rounds
from node i to node j by way of node v = i - delta_f, the cost is

    N S[0:i] + N M sum over rounds (S[v:j] + S[j] where j is not the end)

network rows, S[a:b] being the rows of steps a .. b - 1, and N M decodes and rewards per round.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.registry import METHODS
from steering.requests import Decode, Denoise, Progress, Request, Run, Score
from steering.samplers.base import Sampler, afford, within_budget
from steering.samplers.rollout import judge, require_continuous, walk
from steering.transitions import renoise


class Round(NamedTuple):
    """From node ``start`` back to the noisier node ``via`` and on to node ``stop``."""

    start: int
    via: int
    stop: int


@METHODS.register("search_over_paths")
@dataclass(frozen=True, kw_only=True)
class SearchOverPaths(Sampler):
    """Rounds of re-noising and denoising with a choice after each.

    Attributes:
        n_particles: N, the states kept; None spends the budget (2 where there is none).
        n_neighbours: M, re-noised copies of each.
        seed_level: share of the steps made before the search begins; 1 is best-of-N.
        delta_f: how far a round goes back towards noise, as a share of all steps.
        delta_b: how far it then goes towards data; more than delta_f.
    """

    n_particles: int | None = None
    n_neighbours: int = 4
    seed_level: float = 0.5
    delta_f: float = 0.2
    delta_b: float = 0.4

    name: ClassVar[str] = "search_over_paths"
    summary: ClassVar[str] = "re-noise promising states, denoise them again, keep the best"
    paper: ClassVar[str] = "Ma et al. 2025, arXiv 2501.09732"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # As a baseline of Kim et al. (2025), arXiv 2503.19385, on a thousand VP levels: seed at
        # 120 of 1000, 780 forward, 810 backward, which makes four rounds.
        "rewind": {"seed_level": 0.88, "delta_f": 0.78, "delta_b": 0.81},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_particles is not None and self.n_particles < 1:
            raise OptionError(
                f"search_over_paths: n_particles must be at least 1, got {self.n_particles}."
            )
        if self.n_neighbours < 1:
            raise OptionError(
                f"search_over_paths: n_neighbours must be at least 1, got {self.n_neighbours}."
            )
        if not 0.0 < self.seed_level <= 1.0:
            raise OptionError(
                f"search_over_paths: seed_level must lie in (0, 1], got {self.seed_level}."
            )
        if not 0.0 < self.delta_f < self.delta_b <= 1.0:
            raise OptionError(
                "search_over_paths: need 0 < delta_f < delta_b <= 1 for a round to make headway, "
                f"got delta_f={self.delta_f} and delta_b={self.delta_b}."
            )

    def rounds(self, grid: Grid) -> Iterator[Round]:
        """Every round's nodes. A round goes back at least one step and gains at least one."""
        steps = len(grid)
        node = max(1, grid.nearest(self.seed_level))
        forward = max(1, round(self.delta_f * steps))
        gain = max(1, round(self.delta_b * steps) - forward)
        while node < steps:
            stop = min(node + gain, steps)
            yield Round(node, max(0, node - forward), stop)
            node = stop

    def cost(self, plan: Plan) -> Cost:
        n, m, rounds = self.n_particles or 1, self.n_neighbours, list(self.rounds(plan.grid))
        first = rounds[0].start if rounds else len(plan.grid)

        def walked(each: Sequence[int]) -> int:
            return n * (sum(each[:first]) + m * sum(sum(each[v:j]) for _, v, j in rounds))

        rows, calls = self.per_step(plan)
        asked = n * m * sum(sum(plan.costs[j : j + 1]) for _, _, j in rounds)
        judged = n * max(1, m * len(rounds)) + walked(calls)
        return Cost(nfe=walked(rows) + asked, decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> SearchOverPaths:
        if self.n_particles is None:
            n = afford(plan, lambda n: replace(self, n_particles=n).cost(plan), 2, "path", self)
            return replace(self, n_particles=n)
        what = f"search_over_paths with {self.n_particles} paths of {self.n_neighbours}"
        within_budget(plan, self.cost(plan), what, self)
        return self

    def run(self, ctx: Context) -> Run:
        assert self.n_particles is not None
        rounds, kernel, lead = list(self.rounds(ctx.grid)), self.kernel(), self.lead(ctx)
        x, end = ctx.noise(self.n_particles), len(ctx.grid)
        if rounds:
            require_continuous(self.name, x, "re-noising")
        first = rounds[0].start if rounds else end
        x = yield from walk(ctx, x, kernel, stop=first, lead=lead)
        for r, (start, via, stop) in enumerate(rounds):
            x = self._back(ctx, x, start, via, r)
            x = yield from walk(
                ctx, x, kernel, start=via, stop=stop, stream=f"round/{r}", lead=lead
            )
            if stop < end:
                x = yield from self._select(ctx, x, stop, r)
        rewards, best = yield from judge(x, None)
        info = {"rewards": rewards, "best": best.reward}
        yield Progress(step=end, of=end, info=info, preview=best.image)
        return best.outcome()

    def _back(self, ctx: Context, x: Tensor, start: int, via: int, r: int) -> Tensor:
        """M re-noised copies of each row of x [n, *event], [n M, *event]."""
        copies = x.repeat_interleave(self.n_neighbours, 0)
        z = ctx.key("renoise", r).normal(len(copies), x.shape[1:], device=str(x.device))
        return renoise(copies, ctx.grid.times[start], ctx.grid.times[via], z.to(copies))

    def _select(
        self, ctx: Context, x: Tensor, node: int, r: int
    ) -> Generator[Request, Any, Tensor]:
        """The N states [n, *event] whose estimates of x0 score best, best first."""
        prediction = yield Denoise(x, ctx.grid.times[node])
        images = yield Decode(prediction.x0, preview=True)
        scores = yield Score(images, prediction.x0)
        rewards = as_float64(scores.value)
        kept = rewards.argsort(descending=True, stable=True)[: self.n_particles]
        info = {"round": r, "node": node, "rewards": rewards, "kept": kept}
        yield Progress(step=node, of=len(ctx.grid), info=info, preview=images)
        return x[kept.to(x.device)]


__all__ = ["Round", "SearchOverPaths"]

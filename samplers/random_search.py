"""Random search: best-of-N in rounds that grow, so that it can stop when a sample is good enough.

Ma et al. (2025), "Inference-time scaling for diffusion models beyond scaling denoising steps",
arXiv 2501.09732. Sample k is sample k of best-of-N whatever the rounds are, and the best of all
rounds is returned, so without a threshold this is best-of-N.

Cost: one trajectory, one decode and one reward call per sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from steering.errors import OptionError
from steering.method import Context, Cost, Plan
from steering.registry import METHODS
from steering.requests import Progress, Run
from steering.samplers.base import Sampler, afford, reaches, within_budget
from steering.samplers.rollout import Winner, judge, walk

_DEFAULT = 30  # four rounds of 2, 4, 8 and 16


@METHODS.register("random_search")
@dataclass(frozen=True, kw_only=True)
class RandomSearch(Sampler):
    """Fresh seeds in rounds.

    Attributes:
        n: most samples in all; None spends the budget, or what ``rounds`` asks for (30 where
            there is neither). The last round takes what is left.
        rounds: most rounds; None for as many as n fills.
        pool: samples of the first round.
        growth: each round is that many times the one before; 1 keeps all equal.
        reward_max: stop after a round whose best reaches this reward.
    """

    n: int | None = None
    rounds: int | None = None
    pool: int = 2
    growth: int = 2
    reward_max: float | None = None

    name: ClassVar[str] = "random_search"
    summary: ClassVar[str] = "best-of-N in growing rounds, may stop early"
    paper: ClassVar[str] = "Ma et al. 2025, arXiv 2501.09732"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Public code for FLUX.1-dev: pools of 2^j seeds, j = 1 .. 4.
        "flux": {"rounds": 4, "pool": 2, "growth": 2},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "rounds", "pool", "growth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"random_search: {name} must be at least 1, got {value}.")

    def sizes(self) -> list[int]:
        """Samples of each round."""
        n, sizes = self._total(), []
        while sum(sizes) < n and len(sizes) != self.rounds:
            size = self.pool * self.growth ** len(sizes)
            sizes.append(min(size, n - sum(sizes)))
        return sizes

    def _total(self) -> int:
        if self.n is not None:
            return self.n
        if self.rounds is None:
            return _DEFAULT
        return sum(self.pool * self.growth**j for j in range(self.rounds))

    def cost(self, plan: Plan) -> Cost:
        """At most, where ``reward_max`` may stop it."""
        n, (rows, calls) = sum(self.sizes()), self.per_step(plan)
        judged = n * (1 + sum(calls))
        return Cost(nfe=n * sum(rows), decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> RandomSearch:
        if self.n is None and self.rounds is None:
            n = afford(plan, lambda n: replace(self, n=n).cost(plan), _DEFAULT, "sample", self)
            return replace(self, n=n)
        sizes = self.sizes()
        within_budget(plan, self.cost(plan), f"random_search with rounds of {sizes} samples", self)
        return self

    def run(self, ctx: Context) -> Run:
        best: Winner | None = None
        done, kernel, sizes = 0, self.kernel(), self.sizes()
        for j, size in enumerate(sizes):
            key = ctx.key("init").at(slot=done)
            x = ctx.model.noise(size, key, cond=ctx.cond)
            slots = range(done, done + size)
            x = yield from walk(ctx, x, kernel, slots=slots, lead=self.lead(ctx))
            rewards, best = yield from judge(x, best, done)
            done += size
            info = {"round": j, "rewards": rewards, "best": best.reward}
            yield Progress(step=j + 1, of=len(sizes), info=info, preview=best.image)
            if reaches(best.reward, self.reward_max):
                break
        assert best is not None
        return best.outcome()

"""Auto: a pilot on each prompt decides how much more it gets, and by which method.

Half of what more samples gain lies in a quarter of the prompts, and an estimate of x0 ranks
particles on some prompts and misleads on others. So a few samples are made first, with a look at
their estimates half-way:

* a prompt whose pilot reaches ``target_reward`` stops, and leaves its budget to the others;
* the rest is divided in proportion to the spread of the pilot's rewards, since the expected gain
  of best-of-N is that spread times a function of N alone (``share=True``);
* where the estimates ranked the pilot well, Feynman-Kac steering spends what is left, else
  best-of-N does.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import BudgetError, NoWeightError, OptionError
from steering.grids import Grid
from steering.ledger import Budget
from steering.method import Context, Cost, Plan, as_float64
from steering.registry import METHODS
from steering.requests import Decode, Denoise, Outcome, Progress, Request, Run, Score, Share
from steering.samplers.base import (
    Sampler,
    afford,
    check_scale,
    reaches,
    refuse_idle,
    within_budget,
)
from steering.samplers.best_of_n import BestOfN
from steering.samplers.fk import FK
from steering.samplers.rollout import walk


@METHODS.register("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Sampler):
    """Spends a budget by difficulty.

    Attributes:
        n: samples that the whole run may cost, where there is no budget (32).
        pilot: samples made first.
        preview_at: fraction of the steps after which their estimates are scored.
        target_reward: reward at which a prompt needs nothing more; sensible for rewards that
            saturate and mean the same on every prompt (VQAScore, GenEval), not for HPS.
        share: prompts of one call give what they leave to each other. Results then depend on the
            company a prompt keeps.
        follow: the method after the pilot, or "auto" to choose by the pilot.
        rank_threshold: least rank correlation of estimate and final reward for "fk".
        reward_scale: of "fk" and guidance; None as in `fk`.
        eta: of all samples; "fk" needs it positive.
    """

    n: int | None = None
    pilot: int = 6
    preview_at: float = 0.5
    target_reward: float | None = None
    share: bool = False
    follow: Literal["auto", "best_of_n", "fk"] = "auto"
    rank_threshold: float = 0.6
    reward_scale: float | None = None
    eta: float = 1.0

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "a pilot decides how much each prompt gets, and by which method"
    paper: ClassVar[str] = "rules from published reward tensors; see docs/methods.md"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = True
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("auto", self.reward_scale)
        if self.pilot < 2 or (self.n is not None and self.n < self.pilot):
            raise OptionError(f"auto: pilot must lie in 2..n, got pilot={self.pilot}, n={self.n}.")
        if not 0.0 < self.preview_at < 1.0 or not -1.0 <= self.rank_threshold <= 1.0:
            raise OptionError(
                "auto: preview_at must lie in (0, 1) and rank_threshold in [-1, 1], got "
                f"{self.preview_at} and {self.rank_threshold}."
            )
        if self.follow != "auto":
            refuse_idle(self, f"follow={self.follow!r}", "rank_threshold")
        if not self.scales:
            refuse_idle(self, "follow='best_of_n'", "reward_scale")
        if self.follow != "best_of_n" and not self.kernel().stochastic:
            raise OptionError(
                "auto: particles need a stochastic sampler; set eta > 0, or follow='best_of_n'."
            )

    def cost(self, plan: Plan) -> Cost:
        """At most, where nothing is shared: the pilot is scored twice, all else as ``follow``."""
        n, (rows, calls) = (self.n or self.pilot), self.per_step(plan, weighed=False)
        look, nfe, scored = self._middle(plan.grid), sum(rows), 2 + sum(calls)
        if self.guide is not None and self.guide.rho > 0.0 and calls[look]:
            nfe += plan.costs[look]  # the gradient asks again where the estimate was scored
        unbound = replace(plan, budget=Budget())
        names = ("fk", "best_of_n") if self.follow == "auto" else (self.follow,)
        nexts = [self._next(unbound, n - self.pilot, name) for name in names]
        after = [method.cost(plan) for method in nexts if method is not None]
        nfe = self.pilot * nfe + max([cost.nfe for cost in after], default=0)
        scored = self.pilot * scored + max([cost.reward_calls for cost in after], default=0)
        return Cost(nfe=nfe, decodes=scored, reward_calls=scored)

    def fit(self, plan: Plan) -> Auto:
        fitted = self
        if self.scales:
            fitted = replace(self, reward_scale=plan.scale(self.reward_scale))
        if self.n is None:

            def cost(extra: int) -> Cost:
                return replace(fitted, n=self.pilot + extra).cost(plan)

            try:
                n = self.pilot + afford(plan, cost, 32 - self.pilot, "pilot with one more sample")
            except BudgetError:
                least = replace(fitted, n=self.pilot)
                within_budget(plan, least.cost(plan), "auto's pilot", self)
                n = self.pilot
            return replace(fitted, n=n)
        within_budget(plan, fitted.cost(plan), f"auto with n={self.n}", self)
        return fitted

    @property
    def weighed(self) -> bool:
        return self.follow != "best_of_n"

    def _middle(self, grid: Grid) -> int:
        """The step before which the pilot is scored."""
        return min(grid.nearest(self.preview_at), len(grid) - 1)

    # --- the algorithm -----------------------------------------------------------------------

    def run(self, ctx: Context) -> Run:
        assert self.n is not None
        first, ranks = yield from self._pilot(ctx)
        top, spread = float(first.reward.max()), _spread(first.reward)
        best = _top(first)
        done = reaches(top, self.target_reward)
        more, chosen = 0, "none"
        if not done:
            more = yield from self._grant(ctx, spread)
            chosen = self.follow
            if chosen == "auto":
                chosen = "fk" if ranks >= self.rank_threshold else "best_of_n"
        yield Progress(
            step=1, of=2,
            info={"rewards": first.reward, "rank": ranks, "spread": spread, "follow": chosen,
                  "samples": more},
        )  # fmt: skip
        follower = self._next(ctx.plan, more, chosen)
        if follower is not None:
            # Names of noise of its own: the pilot's slots must not be drawn again.
            seed = ctx.key("auto/follow").generator().initial_seed()
            try:
                outcome = yield from follower.run(replace(ctx, seed=seed))
            except NoWeightError:  # all that followed has a reward of -inf
                return best
            found = _top(outcome)
            best = found if float(found.reward) > float(best.reward) else best
        return best

    def _pilot(self, ctx: Context) -> Generator[Request, Any, tuple[Outcome, float]]:
        """Samples as best-of-N makes them, and how well their estimates ranked them."""
        kernel, look, lead = self.kernel(), self._middle(ctx.grid), self.lead(ctx)
        x = yield from walk(ctx, ctx.noise(self.pilot), kernel, stop=look, lead=lead)
        prediction = yield Denoise(x, ctx.grid.times[look])
        images = yield Decode(prediction.x0, preview=True)
        scores = yield Score(images, prediction.x0)
        early = as_float64(scores.value)
        yield Progress(step=look, of=len(ctx.grid), preview=images)
        x = yield from walk(ctx, x, kernel, start=look, prediction=prediction, lead=lead)
        images = yield Decode(x)
        scores = yield Score(images, x, final=True)
        reward = as_float64(scores.value)
        zero = torch.zeros(self.pilot, dtype=torch.float64)
        outcome = Outcome(x0=x, images=images, reward=reward, log_w=zero,
                          slots=torch.arange(self.pilot))  # fmt: skip
        return outcome, rank_correlation(early, reward)

    def _grant(self, ctx: Context, spread: float) -> Generator[Request, Any, int]:
        """Samples that may still be made."""
        assert self.n is not None
        # Rows can be handed on, reward calls cannot.
        if not self.share or ctx.plan.budget.reward_calls is not None:
            return self.n - self.pilot
        rows = yield Share(spread)
        if rows is None:
            return self.n - self.pilot
        return int(rows) // sum(self.per_step(ctx.plan)[0])

    def _next(self, plan: Plan, n: int, name: str) -> BestOfN | FK | None:
        """The method for n more samples."""
        if n < 1:
            return None
        shared: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("eta_end", "transition", "grid", "steps", "guidance")
        }
        if self.transition == "eta":
            shared["eta"] = self.eta
        scale = plan.scale(self.reward_scale)
        if name == "fk" and self.follow != "best_of_n":
            return FK(n_particles=n, reward_scale=scale, **shared)
        return BestOfN(n=n, reward_scale=None if self.guide is None else scale, **shared)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors [n]; 0 where one is constant."""
    from scipy.stats import spearmanr

    if len(a.unique()) == 1 or len(b.unique()) == 1:
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def _spread(reward: Tensor) -> float:
    finite = reward[torch.isfinite(reward)]
    return float(finite.std()) if len(finite) > 1 else 0.0


def _top(outcome: Outcome) -> Outcome:
    """The best sample alone; the first on ties."""
    k = int(outcome.reward.argmax())
    row = slice(k, k + 1)
    return Outcome(
        x0=outcome.x0[row], images=outcome.images[row], reward=outcome.reward[row],
        log_w=torch.zeros(1, dtype=torch.float64),
        slots=None if outcome.slots is None else outcome.slots[row],
    )  # fmt: skip

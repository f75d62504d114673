"""Best-of-N: draw N samples, keep the ones with the highest reward.

Cost: N trajectories, N decodes, N reward calls. It maximises; its soft form, weights
exp(reward_scale r), is importance sampling of p(x) exp(reward_scale r(x)) and exact as N grows,
with an unbiased normaliser. Every other method must beat it at equal cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Context, Cost, Plan, as_float64
from steering.particles import log_mean_exp, normalise
from steering.registry import METHODS
from steering.requests import Decode, Outcome, Progress, Run, Score
from steering.resampling import multinomial
from steering.samplers.base import (
    Sampler,
    afford,
    check_scale,
    refuse_idle,
    tilt,
    within_budget,
)
from steering.samplers.guided import led

_CHUNK = 16
"""Samples decoded together: pictures that do not win are not kept."""


@METHODS.register("best_of_n")
@dataclass(frozen=True, kw_only=True)
class BestOfN(Sampler):
    """Independent samples and a choice among them.

    Attributes:
        n: how many; None spends the budget (16 where there is none).
        select: "argmax" keeps the best, "top_k" the k best, "soft" draws k with weights
            exp(reward_scale r), "all" returns every sample with these weights.
        k: how many samples "top_k" and "soft" return.
        reward_scale: of "soft", "all" and guidance; None as in `fk`.
    """

    n: int | None = None
    select: Literal["argmax", "top_k", "soft", "all"] = "argmax"
    k: int = 1
    reward_scale: float | None = None

    name: ClassVar[str] = "best_of_n"
    summary: ClassVar[str] = "N independent samples, keep the best"
    paper: ClassVar[str] = "folklore; soft form: self-normalised importance sampling"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("best_of_n", self.reward_scale)
        if self.n is not None and self.n < 1:
            raise OptionError(f"best_of_n: n must be at least 1, got {self.n}.")
        if self.k < 1 or (self.n is not None and self.k > self.n):
            raise OptionError(
                f"best_of_n: k must lie in 1..n, got k={self.k}, n={self.n}. Lower k, or raise n "
                "(or the budget that n is made from)."
            )
        if self.k > 1 and self.select in ("argmax", "all"):
            raise OptionError(f"best_of_n: k={self.k} needs select='top_k' or 'soft'.")
        if not self.scales:
            refuse_idle(self, f"select={self.select!r} without guidance", "reward_scale")
        # An instance is as honest as its options.
        object.__setattr__(self, "target", "tilted" if self.weighed else "maximum")

    @property
    def weighed(self) -> bool:
        return self.select in ("soft", "all")

    def cost(self, plan: Plan) -> Cost:
        n, (rows, calls) = self.n or 1, self.per_step(plan)
        judged = n * (1 + sum(calls))
        return Cost(nfe=n * sum(rows), decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> BestOfN:
        fitted = self
        if self.scales:
            fitted = replace(self, reward_scale=plan.scale(self.reward_scale))
        if self.n is None:
            default = max(16, self.k)
            n = afford(plan, lambda n: replace(self, n=n, k=1).cost(plan), default, "sample", self)
            return replace(fitted, n=n)
        within_budget(plan, self.cost(plan), f"best_of_n with n={self.n}", self)
        return fitted

    def run(self, ctx: Context) -> Run:
        """x ~ p_T; x_u ~ p(x_u | x_t); score what comes out."""
        assert self.n is not None
        x, kernel, lead = ctx.noise(self.n), self.kernel(), self.lead(ctx)
        ratio = torch.zeros(self.n, dtype=torch.float64)
        for i, (t, u) in enumerate(ctx.grid.steps()):
            x, more = yield from led(ctx, x, t, u, i, kernel, lead, weighed=self.weighed)
            ratio = ratio + more.to(ratio.device)
            yield Progress(step=i + 1, of=len(ctx.grid), info={"t": t.t})
        images, reward = yield from self._score(ctx, x)
        chosen, log_w, log_z = self._choose(ctx, reward, ratio)
        yield Progress(step=len(ctx.grid), of=len(ctx.grid), info={"rewards": reward})
        return Outcome(
            x0=x[chosen.to(x.device)],
            images=torch.stack([images[int(k)] for k in chosen]),
            reward=reward[chosen],
            log_w=log_w,
            log_z=log_z,
            slots=chosen,
        )

    def _score(self, ctx: Context, x: Tensor) -> Run:
        """Rewards of all samples and the pictures that can still be chosen."""
        images: dict[int, Tensor] = {}
        rewards: list[Tensor] = []
        keep = self.k if self.select in ("argmax", "top_k") else len(x)
        size = _CHUNK if ctx.plan.stationary else len(x)
        for start in range(0, len(x), size):
            part = x[start : start + size]
            decoded = yield Decode(part)
            scores = yield Score(decoded, part, final=True)
            rewards.append(as_float64(scores.value))
            images |= {start + k: image for k, image in enumerate(decoded)}
            best = torch.cat(rewards).argsort(descending=True, stable=True)[:keep].tolist()
            images = {k: images[k] for k in best}
        return images, torch.cat(rewards)  # type: ignore[return-value]

    def _choose(
        self, ctx: Context, reward: Tensor, ratio: Tensor
    ) -> tuple[Tensor, Tensor, float | None]:
        """(indices, log weights, ln Z) of the samples to return; ties go to the first."""
        if self.select in ("argmax", "top_k"):
            chosen = reward.argsort(descending=True, stable=True)[: self.k]
            return chosen, torch.zeros(len(chosen), dtype=torch.float64), None
        log_w = tilt(reward, self.reward_scale) + ratio
        if self.select == "all":
            return torch.arange(len(reward)), log_w, log_mean_exp(log_w)
        chosen = multinomial(normalise(log_w), self.k, ctx.key("select"))
        return chosen, torch.zeros(self.k, dtype=torch.float64), log_mean_exp(log_w)

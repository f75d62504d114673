"""Guided trajectories: training-free guidance as a method of its own; see `guides`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.model import Model
from steering.registry import METHODS
from steering.requests import Decode, Outcome, Progress, Run, Score
from steering.samplers.base import Sampler, check_scale, fit_population
from steering.samplers.guide_presets import GUIDES
from steering.samplers.guides import Guide
from steering.samplers.twists import require_gaussian


@METHODS.register("guidance")
@dataclass(frozen=True, kw_only=True)
class Guidance(Guide, Sampler):
    """Guided trajectories, each on its own, the best first.

    Attributes:
        n_particles: how many; None spends the budget (1 where there is none).
        reward_scale: multiplies the reward before it is differentiated; None as in `fk`.
    """

    n_particles: int | None = None
    reward_scale: float | None = None

    name: ClassVar[str] = "guidance"
    summary: ClassVar[str] = "one trajectory led by the gradient of the reward"
    paper: ClassVar[str] = "Ye et al. 2024, arXiv 2409.15761"
    target: ClassVar[str] = "heuristic"
    needs_gradient: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, object]]] = GUIDES
    unguided: ClassVar[str | None] = "it is guidance itself. Set rho, mu and the rest on it."

    def __post_init__(self) -> None:
        Guide.__post_init__(self)
        Sampler.__post_init__(self)
        check_scale(self.name, self.reward_scale)
        if self.n_particles is not None and self.n_particles < 1:
            raise OptionError("guidance: n_particles must be at least 1.")
        object.__setattr__(self, "needs_gradient", self.differentiates)

    def levels(self, model: Model) -> Grid:
        require_gaussian(self.name, model)
        return super().levels(model)

    def cost(self, plan: Plan) -> Cost:
        n, (rows, calls) = self.n_particles or 1, self.charges(plan)
        judged = n * (1 + sum(calls))
        return Cost(nfe=n * sum(rows), decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> Guidance:
        return fit_population(self, plan, 1)

    def run(self, ctx: Context) -> Run:
        assert self.n_particles is not None
        assert self.reward_scale is not None  # fit() has set both
        x, kernel = ctx.noise(self.n_particles), self.kernel()
        for i, (t, u) in enumerate(ctx.grid.steps()):
            x, _ = yield from self.step(ctx, x, t, u, i, kernel, self.reward_scale)
            yield Progress(step=i + 1, of=len(ctx.grid), info={"t": t.t})
        images = yield Decode(x)
        scores = yield Score(images, x, final=True)
        reward = as_float64(scores.value)
        yield Progress(step=len(ctx.grid), of=len(ctx.grid), info={"rewards": reward})
        log_w = torch.zeros(len(x), dtype=torch.float64)
        return Outcome(x0=x, images=images, reward=reward, log_w=log_w)

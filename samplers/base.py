"""Options that every sampler shares: how it steps and on which noise levels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from steering.errors import OptionError, unknown_name
from steering.grids import SHAPES, Grid, starting_at
from steering.kernels.step import Move
from steering.method import Context, Cost, Plan, as_float64, coerce
from steering.model import Model
from steering.particles import State, ess, log_mean_exp
from steering.paths import Path, Prediction, Time, Times
from steering.requests import Decode, Denoise, Outcome, Progress, Request, Score
from steering.samplers.budgets import afford as afford
from steering.samplers.budgets import within_budget as within_budget
from steering.samplers.guided import Lead, as_guide, check_weighed
from steering.samplers.guides import Guide
from steering.samplers.idle import check_resampling as check_resampling
from steering.samplers.idle import refuse_idle as refuse_idle
from steering.samplers.twists import require_gaussian
from steering.transitions import (
    EtaKernel,
    FullRenoise,
    Step,
    Transition,
    dance_grpo,
    flow_grpo,
    memoryless,
    rbf_sde,
)

TRANSITIONS: dict[str, Callable[[], Transition]] = {
    "flow_grpo": flow_grpo,
    "dance_grpo": dance_grpo,
    "rbf": rbf_sde,
    "memoryless": memoryless,
    "full_renoise": FullRenoise,
}


@dataclass(frozen=True, kw_only=True)
class EtaSchedule:
    """The eta-kernel with ``eta`` at pure noise, ``end`` on data, a straight line between.

    The line is drawn over the noise share, which does not depend on the path.
    """

    eta: float
    end: float
    preserves_marginals = True

    @property
    def stochastic(self) -> bool:
        return max(self.eta, self.end) > 0.0

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step:
        if not isinstance(t, Time):
            raise OptionError("An eta schedule takes one noise level at a time.")
        return self.at(t)(x, pred, t, u, path)

    def weights(self, t: Time, u: Time, path: Path) -> Move:
        """The same step as weights of a fused pass."""
        return self.at(t).weights(t, u, path)

    def at(self, t: Time) -> EtaKernel:
        """The kernel of a step that starts at t."""
        return EtaKernel(eta=min(1.0, t.share * self.eta + (1.0 - t.share) * self.end))


Damping = Literal["measured", "none"]
# The first is the line through the next two: nobody has measured it.
_SLOPES = (
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0),
    (0.02, 0.19, 0.36, 0.58, 0.72, 0.82, 0.9, 1.0),
)
"""Shares of the steps made, and the slopes measured there."""

_DOUBTFUL = 10.0
"""How far below the worst finite preview a preview of -inf counts, in log weight."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Base of the methods that walk a grid.

    Attributes:
        eta: noise of the eta-kernel: 0 follows the ODE, 1 is the memoryless SDE.
        transition: "eta" for the eta-kernel, or an Euler-Maruyama preset by name.
        eta_end: where given, eta moves on a straight line from ``eta`` at pure noise to this on
            data, as the noise share sigma / (alpha + sigma) falls.
        grid: "own" for the pipeline's noise levels, or the name of another shape below its first
            level.
        steps: number of steps of another shape; the pipeline's own number by default.
        guidance: a `Guide`, its options or the name of its preset: steps lean towards reward by
            its gradient. Where weights are kept they take the ratio of the densities in.
    """

    eta: float = 0.0
    eta_end: float | None = None
    transition: str = "eta"
    grid: str = "own"
    steps: int | None = None
    guidance: Guide | str | dict[str, Any] | None = None

    name: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, object]]] = {}
    unguided: ClassVar[str | None] = (
        "its steps are written without it. Use a method whose steps can lean, such as fk."
    )
    """Why steps of this method cannot be guided and what to do instead; None where they can."""
    remembers: ClassVar[bool] = False
    """Whether it compares rewards of different calls, so that they must mean the same."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", as_guide(self.guidance))
        for f in fields(self):
            value = coerce(type(self), f.name, getattr(self, f.name))
            object.__setattr__(self, f.name, value)
        if self.transition != "eta" and self.transition not in TRANSITIONS:
            raise unknown_name("transition", self.transition, ["eta", *TRANSITIONS])
        if self.grid != "own" and self.grid not in SHAPES:
            raise unknown_name("grid", self.grid, ["own", *SHAPES])
        if self.grid == "own" and self.steps is not None:
            raise OptionError(
                "steps belongs to grids other than the pipeline's own; pass "
                "num_inference_steps to the pipeline, or name a grid."
            )
        if self.steps is not None and self.steps < 1:
            raise OptionError(f"steps must be at least 1, got {self.steps}.")
        for eta in (self.eta, self.eta_end):
            EtaKernel(eta=eta or 0.0)
        if self.eta_end is not None and self.transition != "eta":
            raise OptionError(f"eta_end belongs to transition='eta', not to {self.transition!r}.")
        if self.transition != "eta":
            refuse_idle(self, f"transition={self.transition!r}", "eta")
        if self.guide is not None:
            self._check_guide(self.guide)

    def _check_guide(self, guide: Guide) -> None:
        if self.unguided is not None:
            raise OptionError(f"{self.name} takes no guidance: {self.unguided}")
        if self.weighed:
            check_weighed(self.name, guide, self.kernel())
        if guide.differentiates:
            object.__setattr__(self, "needs_gradient", True)

    @property
    def guide(self) -> Guide | None:
        """``guidance`` as ``__post_init__`` read it."""
        return self.guidance  # type: ignore[return-value]

    @property
    def weighed(self) -> bool:
        """Whether the densities of guided steps count."""
        return False

    @property
    def scales(self) -> bool:
        """Whether reward_scale counts, in a method that makes no other use of it."""
        return self.weighed or self.guide is not None

    def kernel(self) -> Transition:
        """The transition these options name."""
        if self.transition == "eta":
            own = EtaKernel(eta=self.eta)
            return own if self.eta_end is None else EtaSchedule(eta=self.eta, end=self.eta_end)
        return TRANSITIONS[self.transition]()

    def levels(self, model: Model) -> Grid:
        """The noise levels to visit."""
        if self.guide is not None:
            require_gaussian(f"{self.name} with guidance", model)
        own = model.grid()
        if self.grid == "own":
            return own
        return starting_at(own.times[0], model.path, self.grid, self.steps or len(own))

    # --- guided steps ---

    def lead(self, where: Plan | Context) -> Lead | None:
        """The guide of a run and the scale of its reward."""
        if self.guide is None:
            return None
        plan = where.plan if isinstance(where, Context) else where
        return Lead(self.guide, plan.scale(getattr(self, "reward_scale", None)))

    def per_step(
        self, plan: Plan, weighed: bool | None = None
    ) -> tuple[Sequence[int], Sequence[int]]:
        """(network rows, further decodes and reward calls) of one sample at each step."""
        if self.guide is None:
            return plan.costs, (0,) * len(plan.costs)
        weighed = self.weighed if weighed is None else weighed
        return self.guide.charges(plan, weighed=weighed)

    def ask(self, ctx: Context, state: State, t: Time, i: int) -> Generator[Request, Any, State]:
        """A population with the network's answer and, where step i is guided, the gradient.

        Both move with the particles; what the state already has is not asked for again.
        """
        if (lead := self.lead(ctx)) is not None:
            return (yield from lead.guide.attach(ctx, state, t, i, lead.reward_scale))
        return replace(state, prediction=state.prediction or (yield Denoise(state.x, t)))

    def advance(
        self, ctx: Context, state: State, t: Time, u: Time, i: int, kernel: Transition
    ) -> State:
        """The population after step i; a guided one has the ratio of densities in its weights."""
        assert state.prediction is not None
        if self.guide is not None and "pull" in state.memory:
            return self.guide.advance(ctx, state, t, u, i, kernel)
        x = ctx.move(state.x, state.prediction, t, u, kernel, step=i)
        return replace(state, x=x, prediction=None)


def check_scale(name: str, reward_scale: float | None) -> None:
    """Raises unless weights exp(reward_scale r) favour high rewards.

    Raises:
        OptionError: negative, infinite or NaN.
    """
    if reward_scale is not None and not 0.0 <= reward_scale < math.inf:
        raise OptionError(
            f"{name}: reward_scale must be finite and not negative, got {reward_scale}. Higher "
            "rewards are better; negate the reward to turn it round."
        )


def reaches(reward: float, goal: float | None) -> bool:
    """Whether a reward is as high as asked for; None asks for nothing.

    Rewards are float32, in which a goal such as 0.9 may lie a little lower.
    """
    with np.errstate(over="ignore"):  # beyond float32 there is nothing but the goal itself
        return goal is not None and reward >= min(goal, float(np.float32(goal)))


def tilt(reward: Tensor, reward_scale: float | None) -> Tensor:
    """reward_scale * r, [n]; zero at reward_scale 0 even where r is -inf."""
    assert reward_scale is not None  # fit() has set it
    return reward_scale * reward if reward_scale else torch.zeros_like(reward)


M = TypeVar("M", bound=Sampler)


def fit_population(method: M, plan: Plan, default: int) -> M:
    """A method with options ``n_particles`` and ``reward_scale``, with both of them set.

    Args:
        default: n_particles where neither the user nor a budget says how many.

    Raises:
        BudgetError: the budget does not pay for one particle, or for as many as were asked for.
    """
    options: Any = method
    fitted: Any = replace(options, reward_scale=plan.scale(options.reward_scale))
    if options.n_particles is None:

        def cost(n: int) -> Cost:
            return replace(options, n_particles=n).cost(plan)

        return replace(fitted, n_particles=afford(plan, cost, default, "particle", options))
    what = f"{options.name} with {options.n_particles} particles"
    within_budget(plan, options.cost(plan), what, options)
    return fitted


def checkpoint_steps(
    grid: Grid, fractions: Sequence[float], noise_levels: Sequence[float] | None = None
) -> list[int]:
    """Step indices at fractions of the steps made, sorted, without the quiet ones at the end.

    Where ``noise_levels`` are given, they say it instead: shares sigma / (alpha + sigma).

    The last step adds no noise, and some grids have one before it that adds hardly any: copies
    made there would be delivered as copies, and the finished samples are scored right after it.
    """
    if noise_levels is not None:
        steps = {grid.index_of_sigma(share) for share in noise_levels}
    else:
        steps = {grid.nearest(fraction) for fraction in fractions}
    return sorted(i for i in steps if i < grid.quiet)


def check_levels(method: Sampler, option: str, grid: Grid, steps: Sequence[int]) -> None:
    """Raises where levels that the user chose leave no step of the grid.

    The defaults may, with a warning: on one or two steps nothing is judged before the end.

    Args:
        option: the name of the option that holds fractions of the steps; ``noise_levels`` stand
            in for it where they are given.
        steps: what is left of them.
    """
    if getattr(method, "noise_levels", None) is not None:
        option = "noise_levels"
    levels = getattr(method, option)
    usual = {f.name: f.default for f in fields(method)}[option]
    if levels and not steps and levels == usual:
        warnings.warn(
            f"{method.name}: the default {option} leave no step of a grid of {len(grid)}, so only "
            "finished samples are judged. Take more steps, or another method: zero_order, reno.",
            stacklevel=3,
        )
    if levels and not steps and levels != usual:
        raise OptionError(
            f"{method.name}: {option}={levels} leave no step of a grid of {len(grid)}: they round "
            f"to its last steps, which add no noise, or to its end. {_room(option, grid)} Move "
            "them towards the noise, take more steps, or pass ()."
        )


def _room(option: str, grid: Grid) -> str:
    """The last level at which something can be judged before the end."""
    step = grid.quiet - 1
    if step < 0:
        return "No share is usable here."
    if option != "noise_levels":
        return f"The largest usable share here is {step / len(grid):.4g}."
    # Rounded up: a share below that of the level belongs to the next one.
    share = math.ceil(grid.times[step].share * 1e4 - 1e-6) / 1e4
    return f"The smallest usable share here is {share:g}."


def damping(rule: Damping, grid: Grid, step: int) -> float:
    """The share of its reward that an estimate of x0 made after ``step`` steps counts.

    "measured" is the slope of the regression of final rewards on those of one-step estimates
    within a prompt, a mean over FLUX.1 and SDXL at 20 steps with ImageReward, HPS and PickScore,
    from the rewards published with TTSnap.
    """
    return 1.0 if rule == "none" else float(np.interp(step / len(grid), *_SLOPES))


def preview(
    ctx: Context, x0: Tensor, reward_scale: float | None, step: int, factor: float = 1.0
) -> Generator[Request, Any, Tensor]:
    """Decodes and scores estimates of x0 [n, *event]: finite log potentials [n], float64."""
    images = yield Decode(x0, preview=True)
    scores = yield Score(images, x0)
    yield Progress(step=step, of=len(ctx.grid), preview=images)
    return factor * lift(tilt(as_float64(scores.value), reward_scale))


def deliver(
    ctx: Context, state: State, reward_scale: float | None
) -> Generator[Request, Any, Outcome]:
    """The finished population: the last potential is reward_scale * r of the pictures that are
    delivered, so the weights and their mean are those of the target law."""
    images = yield Decode(state.x)
    scores = yield Score(images, state.x, final=True)
    reward = as_float64(scores.value)
    state = state.set_potential(tilt(reward, reward_scale))
    info = {"rewards": reward, "ess": ess(state.log_w)}
    yield Progress(step=len(ctx.grid), of=len(ctx.grid), info=info)
    return Outcome(
        x0=state.x,
        images=images,
        reward=reward,
        log_w=state.log_w,
        log_z=log_mean_exp(state.log_w),
        slots=torch.arange(len(state)),
    )


def lift(rho: Tensor) -> Tensor:
    """A preview's -inf as a low finite potential: its sample may yet come good, and any finite
    potential in between leaves the target law as it is."""
    finite = rho[torch.isfinite(rho)]
    floor = float(finite.min()) - _DOUBTFUL if len(finite) else 0.0
    return rho.masked_fill(torch.isneginf(rho), floor)

"""TDS, the twisted diffusion sampler: particles whose steps lean towards reward.

Wu, Trippe, Naesseth, Blei & Cunningham (2023), "Practical and asymptotically exact conditional
sampling in diffusion models", arXiv 2306.17775. With the twist psi_t(x_t) = exp(reward_scale *
r(x0_hat(x_t))), every step is drawn from the base kernel whose score has grad log psi_t added, and

    log_w += log p(x_u | x_t) - log q(x_u | x_t) + log psi_u(x_u) - log psi_t(x_t)

with psi = exp(reward_scale * r) of the delivered sample at the end. The total weight of a path is
exp(reward_scale r(x0)) dP/dQ whatever the twists are, so they change variance only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan
from steering.model import Model
from steering.particles import State, ess, resample
from steering.paths import Prediction, Time
from steering.registry import METHODS
from steering.requests import Denoise, Progress, Run
from steering.resampling import scheme
from steering.samplers.base import (
    Damping,
    Sampler,
    check_resampling,
    check_scale,
    damping,
    deliver,
    fit_population,
    lift,
    tilt,
)
from steering.samplers.twists import (
    base_step,
    check_positive,
    clipped,
    look,
    propose,
    require_gaussian,
    scored,
    usable,
)
from steering.transitions import Step


@dataclass(frozen=True, kw_only=True)
class Twisted(Sampler):
    """What twisted samplers share; a subclass says how a gradient moves a step.

    Attributes:
        n_particles: how many; None spends the budget (4 where there is none).
        reward_scale: lambda of the target p(x) exp(lambda r(x)); None as in `fk`.
        twist_scale: the gradient enters the proposal times this; weights stay exact.
        start: the share of the steps made before the first twist; costs nothing until then.
        clip_norm: most that a particle's gradient of reward_scale * r may measure, None: any.
        clip_value: the same of each of its entries.
        through_network: False differentiates decoder and reward only, not the network.
        micro_batch: particles differentiated at once; None differentiates all.
        checkpoint: keep no activations of network and decoder; costs a second forward pass.
        resample: "ess" when the effective sample size falls below ess_threshold * n_particles,
            "always" or "never".
        resampler: a scheme of steering.resampling.
    """

    n_particles: int | None = None
    reward_scale: float | None = None
    twist_scale: float = 1.0
    start: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    through_network: bool = True
    micro_batch: int | None = None
    checkpoint: bool = False
    resample: Literal["ess", "always", "never"] = "ess"
    ess_threshold: float = 0.5
    resampler: str = "systematic"
    eta: float = 1.0

    name: ClassVar[str]
    target: ClassVar[str] = "tilted"
    needs_gradient: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = (
        "it leans by its own twist, and a second gradient would be one too many. Set twist_scale "
        "and clip_norm, or use fk with guidance."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (
            ("n_particles", self.n_particles),
            ("micro_batch", self.micro_batch),
        ):
            if value is not None and value < 1:
                raise OptionError(f"{self.name}: {option} must be at least 1, got {value}.")
        if not 0.0 <= self.twist_scale < float("inf"):
            raise OptionError(f"{self.name}: twist_scale must be finite and not negative.")
        for option in ("start", "ess_threshold"):
            if not 0.0 <= getattr(self, option) <= 1.0:
                raise OptionError(f"{self.name}: {option} must lie in [0, 1].")
        check_positive(self.name, clip_norm=self.clip_norm, clip_value=self.clip_value)
        check_scale(self.name, self.reward_scale)
        scheme(self.resampler)
        if not self.kernel().stochastic:
            raise OptionError(
                f"{self.name} weighs its proposals by their density, and eta=0 makes the sampler "
                "deterministic: it has none. Set eta > 0 (for flow models too: the eta-kernel "
                "keeps their marginals)."
            )

    def levels(self, model: Model) -> Grid:
        require_gaussian(self.name, model)
        return super().levels(model)

    def twisted_steps(self, grid: Grid) -> range:
        """The steps that are twisted: no quiet ones. The last has no density, and where hardly
        any noise is added a shift that the score makes is many of its standard deviations."""
        return range(min(grid.nearest(self.start), grid.quiet), grid.quiet)

    def cost(self, plan: Plan) -> Cost:
        n = self.n_particles or 1
        scored = n * (len(self.twisted_steps(plan.grid)) + 1)
        return Cost(nfe=n * plan.trajectory, decodes=scored, reward_calls=scored)

    def fit(self, plan: Plan) -> Twisted:
        return fit_population(self, plan, 4)

    def run(self, ctx: Context) -> Run:
        assert self.n_particles is not None
        state, kernel, grid = State.start(ctx.noise(self.n_particles)), self.kernel(), ctx.grid
        twisted, temper = self.twisted_steps(grid), 0.0
        for i, (t, u) in enumerate(grid.steps()):
            shift = None
            if i in twisted:
                state, bad = yield from self._look(state, t)
                rho = state.memory["rho"]
                temper, ahead = self.tempers(state, grid, i, temper)
                state = state.set_potential(temper * rho)
                state = yield from self._resample(ctx, state, i, {"temper": temper, "bad": bad})
                base = base_step(ctx, state, t, u, kernel)
                shift = self.shift(ctx, state, ahead, t, u, base)
            else:
                state = replace(state, prediction=(yield Denoise(state.x, t)))
                base = base_step(ctx, state, t, u, kernel)
            state = propose(ctx, state, base, shift, i)
            yield Progress(step=i + 1, of=len(grid), info={"t": t.t})
        return (yield from deliver(ctx, state, self.reward_scale))

    def tempers(self, state: State, grid: Grid, i: int, previous: float) -> tuple[float, float]:
        """Tempers (of the potential, of the next proposal) at step i."""
        raise NotImplementedError

    def shift(
        self, ctx: Context, state: State, temper: float, t: Time, u: Time, base: Step
    ) -> Tensor:
        """How far the mean of the base step is moved, [n, *event]."""
        raise NotImplementedError

    def _look(self, state: State, t: Time) -> Run:
        """The state with log psi and its gradient, which belong to the particles from now on."""
        assert self.reward_scale is not None  # fit() has set it
        seen = yield from look(
            state.x,
            t,
            micro_batch=self.micro_batch,
            checkpoint=self.checkpoint,
            through_network=self.through_network,
        )
        slope, bad = usable(self.reward_scale * seen.slope)
        memory = {
            "rho": lift(tilt(seen.reward, self.reward_scale)),
            "slope": clipped(slope, self.clip_norm, self.clip_value),
        }
        return replace(state, prediction=seen.prediction, memory=memory), bad  # type: ignore[return-value]

    def _resample(self, ctx: Context, state: State, i: int, info: dict[str, object]) -> Run:
        size = ess(state.log_w)
        scale = self.reward_scale or 1.0
        info = {"ess": size, "checkpoint": i, "rewards": state.memory["rho"] / scale, **info}
        few = self.resample == "ess" and size < self.ess_threshold * len(state)
        if few or self.resample == "always":
            state, ancestors = resample(state, scheme(self.resampler), ctx.key("resample", i))
            info |= {"ancestors": ancestors, "roots": len(state.root.unique())}
        yield Progress(step=i, of=len(ctx.grid), info=info)
        return state  # type: ignore[return-value]


@METHODS.register("tds")
@dataclass(frozen=True, kw_only=True)
class TDS(Twisted):
    """Twisted diffusion sampler: the twist is added to the score.

    Attributes:
        start: a quarter by default: estimates of x0 say little before, and their twists cost
            variance (measured on mixtures: sd of ln Z 6.0 to 1.5 on a rippled reward).
        damping: "measured" lets early twists, potential and proposal, count less, by the measured
            slope of final rewards on those of one-step estimates (sd of ln Z of 8 particles over
            20 steps on mixtures: 0.67 to 0.40 on a bowl, 15.6 to 7.5 on a rippled reward); "none"
            takes them in full.
        clip_x0: the shifted estimate of x0 stays within +-clip_x0, for models of pixels in
            [-1, 1]; it changes the proposal only.
    """

    start: float = 0.25
    damping: Damping = "measured"
    clip_x0: float | None = None

    name: ClassVar[str] = "tds"
    summary: ClassVar[str] = "particles that lean towards reward by its gradient"
    paper: ClassVar[str] = "Wu et al. 2023, arXiv 2306.17775"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # The authors' image experiments: 4 particles, resampled systematically at every step.
        "authors": {"n_particles": 4, "resample": "always", "start": 0.0, "damping": "none"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, clip_x0=self.clip_x0)
        check_resampling(self)

    def tempers(self, state: State, grid: Grid, i: int, previous: float) -> tuple[float, float]:
        """The estimate of step i leads its proposal, so both count by its share."""
        share = damping(self.damping, grid, i)
        return share, share

    def shift(
        self, ctx: Context, state: State, temper: float, t: Time, u: Time, base: Step
    ) -> Tensor:
        """The base kernel at the prediction whose score is larger by grad log psi."""
        assert state.prediction is not None
        moved = scored(state.prediction, self.twist_scale * temper * state.memory["slope"], t)
        if self.clip_x0 is not None:
            moved = Prediction(moved.x0.clamp(-self.clip_x0, self.clip_x0), moved.eps)
        step = self.kernel()(state.x, moved, t, u, ctx.model.path)
        return step.mean - base.mean

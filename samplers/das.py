"""DAS, diffusion alignment as sampling: twisted particles under a rising temper.

Kim, Kim & Park (2025), "Test-time alignment of diffusion models without reward
over-optimization", arXiv 2501.05803. The potential at step i is lambda_i * rho, rho = reward_scale
* r(x0_hat(x_t)), with lambda_i rising from 0 to 1; the base step N(m, s^2 I) is moved by its
variance times the gradient under the temper of the step it leads to:

    x_u ~ N(m + s^2 lambda_{i+1} grad rho, s^2 I)

The paper's code leaves the gradients of resampled particles with their old owners, which biases
its weights; here they are part of the state and move with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from steering.grids import Grid
from steering.method import Context
from steering.particles import State
from steering.paths import Time
from steering.registry import METHODS
from steering.samplers.base import check_resampling, refuse_idle
from steering.samplers.tds import Twisted
from steering.samplers.twists import check_positive, doubling, raise_temper
from steering.transitions import Step


@METHODS.register("das")
@dataclass(frozen=True, kw_only=True)
class DAS(Twisted):
    """Tempered twisted particles. The temper is its damping: early rewards hardly count.

    Attributes:
        start: a quarter by default: the temper is low before, and estimates of x0 say little (on
            mixtures sd of ln Z as with 0, for a quarter less of the gradients).
        tempering: "exp" min((1 + gamma)^i - 1, 1), "poly" min((gamma i)^power, 1), "adaptive" the
            temper at which the effective sample size meets ess_threshold, "none" 1.
        gamma: its speed per step, from the first of all; None reaches 1 after 87 % of them, as
            the authors' 0.008 does on their 100.
        power: of "poly".
    """

    tempering: Literal["exp", "poly", "adaptive", "none"] = "exp"
    gamma: float | None = None
    power: float = 1.0
    start: float = 0.25
    resampler: str = "ssp"

    name: ClassVar[str] = "das"
    summary: ClassVar[str] = "tempered particles that lean towards reward by its gradient"
    paper: ClassVar[str] = "Kim et al. 2025, arXiv 2501.05803"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Authors' scripts: 4 particles, 100 DDIM steps with eta 1, guidance 5. Their kl_coeff is
        # 1 / reward_scale: 0.005 for aesthetics, 0.01 for CLIP, 0.0001 for PickScore.
        "sd15": {"n_particles": 4, "gamma": 0.008, "start": 0.0},
        "sdxl": {"n_particles": 4, "gamma": 0.008, "start": 0.0},
        # Dreamshaper v7 with 8 LCM steps, guidance 7.5.
        "lcm": {"n_particles": 4, "gamma": 0.1, "eta": 0.5, "start": 0.0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, gamma=self.gamma, power=self.power)
        check_resampling(self, threshold_counts=self.tempering == "adaptive")
        setting = f"tempering={self.tempering!r}"
        if self.tempering in ("none", "adaptive"):
            refuse_idle(self, setting, "gamma")
        if self.tempering != "poly":
            refuse_idle(self, setting, "power")

    def schedule(self, k: int, steps: int) -> float:
        """lambda_k of the fixed schedules over ``steps`` steps."""
        if self.tempering == "poly":
            gamma = 1.0 / (0.87 * steps) if self.gamma is None else self.gamma
            return min((gamma * k) ** self.power, 1.0)
        gamma = doubling(steps) if self.gamma is None else self.gamma
        return min((1.0 + gamma) ** k - 1.0, 1.0)

    def tempers(self, state: State, grid: Grid, i: int, previous: float) -> tuple[float, float]:
        """The potential has this step's temper, the proposal the next one's."""
        if self.tempering == "none":
            return 1.0, 1.0
        if self.tempering == "adaptive":
            temper = raise_temper(state, state.memory["rho"], previous, self.ess_threshold)
            return temper, temper  # the next one is not known yet
        steps = grid.quiet  # those after add no noise
        return self.schedule(i, steps), self.schedule(i + 1, steps)

    def shift(
        self, ctx: Context, state: State, temper: float, t: Time, u: Time, base: Step
    ) -> Tensor:
        """Variance of the step times the tempered gradient."""
        return (base.std * base.std * self.twist_scale * temper) * state.memory["slope"]

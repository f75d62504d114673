"""Entropic particle filtering: resampling that holds back early and looks one checkpoint ahead.

Giannone et al. (2025), "Mitigating premature exploitation in particle-based Monte Carlo for
inference-time scaling", arXiv 2510.05825. Early rewards are over-confident, so while few particles
hold the weight and the run is young the resampling probabilities are flattened:

    p ~ (W eta)^(1 / tau),    log_w -= log(N p)

eta guesses how the potential will change until the next checkpoint (an auxiliary particle filter,
Pitt & Shephard 1999); tau is :func:`temperature`. The second line keeps what p left out, so that
every p aims at the same law and the normaliser stays unbiased. The published code drops it.
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
from steering.particles import State, ess, log_mean_exp, normalise, resample
from steering.registry import METHODS
from steering.requests import Denoise, Progress, Request, Run
from steering.resampling import scheme
from steering.samplers.base import (
    Damping,
    Sampler,
    check_levels,
    check_scale,
    checkpoint_steps,
    damping,
    deliver,
    fit_population,
    preview,
    refuse_idle,
)
from steering.transitions import ODE

Anneal = Literal["off", "ess", "entropy", "base"]


@METHODS.register("epf")
@dataclass(frozen=True, kw_only=True)
class EPF(Sampler):
    """Entropic particle filtering.

    Attributes:
        n_particles: how many; None spends the budget (8 where there is none).
        reward_scale: as in `fk`.
        checkpoints: where to score and resample, as shares of the steps made.
        damping: "measured" lets early potentials count less, also those of a look-ahead, by the
            measured slope of final rewards on those of estimates; "none" takes them in full.
        anneal: rule of the temperature, "off" for none.
        ess_threshold, early_phase: annealing acts while the effective sample size is below
            ess_threshold * n_particles and the share of steps made is below early_phase.
        correct: keep the residual weight (exact). False drops it, as the published code does,
            and aims at a flatter law, without a normaliser.
        lookahead: "apf" asks the network once more per particle and checkpoint, at the noise
            level of the next one, reached along the ODE, and resamples by what it will be worth.
        defence: share of eta that is its mean, in [0, 1]. At 0 a particle whose look-ahead was
            too low keeps an unbounded weight, which costs more than the look-ahead brings.
        resample: "always" at a checkpoint (the paper), or "ess" below the threshold only.
        resampler: a scheme of steering.resampling.
    """

    n_particles: int | None = None
    reward_scale: float | None = None
    checkpoints: tuple[float, ...] = (0.25, 0.4, 0.55, 0.7, 0.85)
    damping: Damping = "measured"
    anneal: Anneal = "ess"
    ess_threshold: float = 0.5
    early_phase: float = 0.5
    correct: bool = True
    lookahead: Literal["none", "apf"] = "none"
    defence: float = 0.5
    resample: Literal["always", "ess"] = "always"
    resampler: str = "systematic"
    eta: float = 1.0

    name: ClassVar[str] = "epf"
    summary: ClassVar[str] = "particles whose resampling is tempered while the run is young"
    paper: ClassVar[str] = "Giannone et al. 2025, arXiv 2510.05825"
    target: ClassVar[str] = "tilted"
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # The published code: residual weights dropped, resampling at every checkpoint.
        "authors": {"correct": False, "anneal": "ess", "resample": "always", "damping": "none"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_particles is not None and self.n_particles < 1:
            raise OptionError(f"epf: n_particles must be at least 1, got {self.n_particles}.")
        if not all(0.0 <= f < 1.0 for f in self.checkpoints):
            raise OptionError(f"epf: checkpoints are shares in [0, 1), got {self.checkpoints}.")
        for name in ("ess_threshold", "early_phase", "defence"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise OptionError(f"epf: {name} must lie in [0, 1], got {getattr(self, name)}.")
        scheme(self.resampler)
        check_scale("epf", self.reward_scale)
        self._check_idle()
        many = self.n_particles is None or self.n_particles > 1
        if many and not self.kernel().stochastic:
            raise OptionError(
                "epf resamples, but eta=0 makes the sampler deterministic: copies of a particle "
                "would stay identical. Set eta > 0 (for flow models too: the eta-kernel keeps "
                "their marginals)."
            )
        # An instance is as honest as its options.
        target = "tilted" if self.correct else "heuristic"
        object.__setattr__(self, "target", target)

    def _check_idle(self) -> None:
        if self.anneal == "off":
            refuse_idle(self, "anneal='off'", "early_phase")
        if self.anneal == "off" and self.resample == "always":
            refuse_idle(self, "anneal='off' and resample='always'", "ess_threshold")
        if self.lookahead == "none":
            refuse_idle(self, "lookahead='none'", "defence")

    @property
    def weighed(self) -> bool:
        return True

    def cost(self, plan: Plan) -> Cost:
        n, steps = self.n_particles or 1, checkpoint_steps(plan.grid, self.checkpoints)
        nfe, scored = plan.trajectory, len(steps)
        if self.lookahead == "apf":
            nfe += sum(plan.costs[j] for j in _successors(steps, len(plan.grid)))
            scored *= 2
        judged = n * (scored + sum(self.per_step(plan)[1]) + 1)
        return Cost(nfe=n * nfe, decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> EPF:
        steps = checkpoint_steps(plan.grid, self.checkpoints)
        check_levels(self, "checkpoints", plan.grid, steps)
        return fit_population(self, plan, 8)

    def run(self, ctx: Context) -> Run:
        assert self.n_particles is not None
        state, kernel, grid = State.start(ctx.noise(self.n_particles)), self.kernel(), ctx.grid
        steps = checkpoint_steps(grid, self.checkpoints)
        after = dict(zip(steps, _successors(steps, len(grid)), strict=True))
        for i, (t, u) in enumerate(grid.steps()):
            state = yield from self.ask(ctx, state, t, i)
            if i in after:
                assert state.prediction is not None
                x0, part = state.prediction.x0, damping(self.damping, grid, i)
                rho = yield from preview(ctx, x0, self.reward_scale, i, part)
                state = state.set_potential(rho)
                ahead = yield from self._ahead(ctx, state, i, after[i])
                state = yield from self._resample(ctx, state, ahead, i, after[i])
            state = self.advance(ctx, state, t, u, i, kernel)
            yield Progress(step=i + 1, of=len(grid), info={"t": t.t})
        outcome = yield from deliver(ctx, state, self.reward_scale)
        return outcome if self.correct else replace(outcome, log_z=None)

    def _ahead(
        self, ctx: Context, state: State, i: int, j: int
    ) -> Generator[Request, Any, Tensor | None]:
        """Guess of the potential at node j, [n]: its estimate of x0, reached along the ODE."""
        if self.lookahead == "none":
            return None
        t, u = ctx.grid.times[i], ctx.grid.times[j]
        # The ODE keeps the noise at u's level; the mean of a random step would have too little.
        assert state.prediction is not None
        x = ctx.move(state.x, state.prediction, t, u, ODE, step=i, stream="lookahead")
        prediction = yield Denoise(x, u)
        part = damping(self.damping, ctx.grid, j)
        return (yield from preview(ctx, prediction.x0, self.reward_scale, i, part))

    def _log_eta(self, state: State, ahead: Tensor) -> Tensor:
        """ln of the modulation, [n]: the change to come, diluted by its mean."""
        log_eta = ahead - state.phi
        mean = torch.logsumexp(torch.log_softmax(state.log_w, 0) + log_eta, 0)
        kept, plain = torch.tensor([1.0 - self.defence, self.defence]).double().log()
        return torch.logaddexp(kept + log_eta, plain + mean)

    def _rewards(self, ctx: Context, phi: Tensor, i: int) -> Tensor:
        """The rewards of estimates at node i whose potentials are phi, [n]."""
        return phi / ((self.reward_scale or 1.0) * damping(self.damping, ctx.grid, i))

    def _resample(
        self, ctx: Context, state: State, ahead: Tensor | None, i: int, j: int
    ) -> Generator[Request, Any, State]:
        """A population drawn at checkpoint i; the look-ahead is that of node j."""
        n, u = len(state), i / len(ctx.grid)
        info: dict[str, Any] = {"checkpoint": i, "rewards": self._rewards(ctx, state.phi, i)}
        log_p = state.log_w
        if ahead is not None:
            log_p = log_p + self._log_eta(state, ahead)
            info |= {"ahead": self._rewards(ctx, ahead, j)}
        size = ess(log_p)
        tau = temperature(normalise(log_p), u, self.anneal, self.ess_threshold, self.early_phase)
        info |= {"ess": size, "tau": tau}
        if self.resample == "always" or size < self.ess_threshold * n:
            p, mean = normalise(log_p / tau), log_mean_exp(state.log_w)
            key = ctx.key("resample", i)
            state, ancestors = resample(state, scheme(self.resampler), key, probabilities=p)
            if not self.correct:
                state = replace(state, log_w=torch.full((n,), mean, dtype=torch.float64))
            info |= {"ancestors": ancestors, "roots": len(state.root.unique())}
        yield Progress(step=i, of=len(ctx.grid), info=info)
        return state


def temperature(
    w: Tensor, u: float, anneal: Anneal, ess_threshold: float = 0.5, early_phase: float = 0.5
) -> float:
    """The temperature tau >= 1 of resampling probabilities w^(1 / tau).

    Args:
        w: normalised weights [n].
        u: share of the run made, in [0, 1].
        anneal: "ess" max(1, (1 - u) n / ESS); "entropy" max(1, 1 / (H + (1 - H) u)) with the
            entropy H of w as a share of log n; "base" max(1, 2 - u); "off" 1.
        ess_threshold, early_phase: tau is 1 unless ESS / n < ess_threshold and u < early_phase.
    """
    share = float(1.0 / w.square().sum()) / len(w)
    if anneal == "off" or len(w) == 1 or share >= ess_threshold or u >= early_phase:
        return 1.0
    if anneal == "ess":
        return max(1.0, (1.0 - u) / share)
    if anneal == "base":
        return max(1.0, 2.0 - u)
    entropy = float(-torch.xlogy(w, w).sum()) / math.log(len(w))
    # One particle with all the weight at u = 0 asks for an infinite temperature.
    return max(1.0, 1.0 / max(entropy + (1.0 - entropy) * u, 1e-6))


def _successors(steps: list[int], length: int) -> list[int]:
    """The node a look-ahead of each checkpoint goes to: the next one, at last the last level."""
    return [*steps[1:], length - 1][: len(steps)]

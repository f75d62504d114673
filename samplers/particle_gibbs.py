"""Particle Gibbs with ancestor sampling: sweeps of particles round a path that is kept.

Puri et al. (2025), arXiv 2502.01618, for language models; here the exact algorithm of Andrieu,
Doucet & Holenstein (2010) with the ancestor step of Lindsten, Jordan & Schon (2014). The first
sweep is Feynman-Kac steering; one of its paths is drawn by weight. Every further sweep runs
n_particles - 1 new particles beside that path, which keeps slot 0 at every resampling, and draws
again. Each sweep leaves the law of paths p(path) exp(reward_scale r(x0)) as it is, at any size.

Where the population is resampled after step t -> u begins, the kept path x* gets a new past:

    log probability of particle i = log_w_i - phi_i + log p(x*_u | x_i) + constant

log_w - phi, because the rest of the path ends at the reward of x* whoever its ancestor is. Guided
steps change none of this, p stays the base density; log_w then holds log p - log q of all steps,
those of the kept path too, whose own proposal density is that of its present past.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import NoWeightError, OptionError
from steering.method import Context, Cost, Plan, as_float64
from steering.noise import NoiseKey, categorical
from steering.particles import State, ess, log_mean_exp, normalise, resample
from steering.paths import Prediction, Time
from steering.registry import METHODS
from steering.requests import Decode, Denoise, Progress, Request, Run, Score
from steering.resampling import multinomial, scheme
from steering.samplers.base import (
    Damping,
    Sampler,
    afford,
    check_levels,
    check_resampling,
    check_scale,
    checkpoint_steps,
    damping,
    preview,
    refuse_idle,
    tilt,
    within_budget,
)
from steering.samplers.guides import Guided, Rows
from steering.samplers.pool import Pool
from steering.samplers.twists import draw, ratio_at

_SIZE, _SWEEPS = 4, 4


@METHODS.register("particle_gibbs")
@dataclass(frozen=True, kw_only=True)
class ParticleGibbs(Sampler):
    """Particle Gibbs.

    Attributes:
        n_particles: particles of a sweep, the kept path included; None takes 4, or what the
            budget pays for.
        iterations: sweeps; None spends the budget (4 where there is none).
        reward_scale: as in `fk`.
        checkpoints: where to score and resample, as fractions of the steps made.
        noise_levels: the same as noise shares sigma / (alpha + sigma), instead of fractions.
        damping: "measured" lets early potentials count less, by the measured slope of final
            rewards on those of estimates; "none" takes them in full.
        ancestor_sampling: give the kept path a new past at resampling; without it early states
            hardly ever change. Needs the density of a transition. In many dimensions only close
            relatives of its own past can take over.
        resample: "ess" when the effective sample size falls below ess_threshold * n_particles,
            or "always".
        resampler: a scheme of steering.resampling, for the first sweep; later ones resample
            multinomially, so that the kept path does not bind the others.
        burn_in: first sweeps whose samples get no weight.

    The samples of all sweeps that have collected weight are delivered, each once, with it; the
    best one is always among them. A sweep that finds no sample of positive weight (rewards of
    -inf) is followed by another without a kept path, as far as what all sweeps may cost pays for
    it; then there is no estimate of the normaliser.
    """

    n_particles: int | None = None
    iterations: int | None = None
    reward_scale: float | None = None
    checkpoints: tuple[float, ...] = (0.4, 0.55, 0.7, 0.85)
    noise_levels: tuple[float, ...] | None = None
    damping: Damping = "measured"
    ancestor_sampling: bool = True
    resample: Literal["ess", "always"] = "ess"
    ess_threshold: float = 0.5
    resampler: str = "systematic"
    burn_in: int = 0
    eta: float = 1.0

    name: ClassVar[str] = "particle_gibbs"
    summary: ClassVar[str] = "sweeps of particles round a path that is kept and renewed"
    paper: ClassVar[str] = "Puri et al. 2025, arXiv 2502.01618; Lindsten et al. 2014"
    target: ClassVar[str] = "tilted"
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("n_particles", "iterations"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"particle_gibbs: {option} must be at least 1, got {value}.")
        if not all(0.0 <= f < 1.0 for f in self.checkpoints):
            raise OptionError(
                f"particle_gibbs: checkpoints are fractions in [0, 1), got {self.checkpoints}."
            )
        if not all(0.0 <= share <= 1.0 for share in self.noise_levels or ()):
            raise OptionError(
                f"particle_gibbs: noise_levels are shares in [0, 1], got {self.noise_levels}."
            )
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise OptionError(
                f"particle_gibbs: ess_threshold must lie in [0, 1], got {self.ess_threshold}."
            )
        if self.burn_in < 0 or self.burn_in >= (self.iterations or self.burn_in + 1):
            raise OptionError(
                f"particle_gibbs: burn_in must lie in 0..iterations - 1, got {self.burn_in}."
            )
        scheme(self.resampler)
        check_resampling(self)
        if self.noise_levels is not None:
            refuse_idle(self, "noise_levels", "checkpoints")
        check_scale("particle_gibbs", self.reward_scale)
        levels = self.checkpoints if self.noise_levels is None else self.noise_levels
        if self.n_particles != 1 and levels and not self.kernel().stochastic:
            raise OptionError(
                "particle_gibbs resamples, but eta=0 makes the sampler deterministic: copies of "
                "a particle would stay identical and its steps have no density. Set eta > 0 "
                "(for flow models too: the eta-kernel keeps their marginals)."
            )

    @property
    def weighed(self) -> bool:
        return True

    def cost(self, plan: Plan) -> Cost:
        n, sweeps = self.n_particles or 1, self.iterations or 1
        particles = n + (sweeps - 1) * (n - 1)
        scored = particles * (len(self._checkpoints(plan)) + sum(self.per_step(plan)[1]) + 1)
        return Cost(nfe=particles * plan.trajectory, decodes=scored, reward_calls=scored)

    def _checkpoints(self, where: Plan | Context) -> list[int]:
        return checkpoint_steps(where.grid, self.checkpoints, self.noise_levels)

    def fit(self, plan: Plan) -> ParticleGibbs:
        check_levels(self, "checkpoints", plan.grid, self._checkpoints(plan))
        fitted = replace(self, reward_scale=plan.scale(self.reward_scale))
        if self.n_particles is None:
            n = afford(
                plan, lambda n: replace(self, n_particles=n).cost(plan), _SIZE, "particle", self
            )
            # Where the number of sweeps is open too, the budget goes to them.
            fitted = replace(fitted, n_particles=n if self.iterations else min(n, _SIZE))
        what = f"particle_gibbs with {fitted.n_particles} particles"
        within_budget(plan, fitted.cost(plan), what, self)
        if fitted.n_particles == 1 and self.burn_in:
            way = "Take two or more particles" if self.n_particles else "Raise the budget"
            raise OptionError(
                f"particle_gibbs: one particle makes one sweep, burn_in={self.burn_in} leaves "
                f"none of it. {way}, or set burn_in=0."
            )
        if self.iterations is None:
            sweeps = 1
            if fitted.n_particles != 1:
                sweeps = afford(
                    plan, lambda k: replace(fitted, iterations=k, burn_in=0).cost(plan),
                    max(_SWEEPS, self.burn_in + 1), "sweep",
                )  # fmt: skip
            if sweeps <= self.burn_in:
                raise OptionError(
                    f"particle_gibbs: the budget pays for {sweeps} sweeps, burn_in={self.burn_in} "
                    "leaves none of them. Lower burn_in or raise the budget."
                )
            fitted = replace(fitted, iterations=sweeps)
        return fitted

    def run(self, ctx: Context) -> Run:
        assert self.n_particles is not None
        assert self.iterations is not None
        pool, reference, log_z, missed = Pool(), None, None, None
        left = self.n_particles + (self.iterations - 1) * (self.n_particles - 1)
        for sweep in range(self.iterations):
            new = self.n_particles - (reference is not None)
            if new > left:
                break  # earlier sweeps had no path to keep and took one particle more
            left -= new
            try:
                state, images = yield from self.sweep(ctx, reference, sweep)
                w, numbers = normalise(state.log_w), state.memory["number"].tolist()
            except NoWeightError as error:
                missed = error
                continue  # no path was found that could be kept: the next sweep is free, too
            fresh = slice(len(state) - len(images), None)
            rewards = state.memory["reward"][fresh]
            pool.add(numbers[fresh], state.x[fresh], images, rewards)
            if sweep >= self.burn_in:
                pool.weigh(numbers, w.tolist())
            if reference is None and missed is None:  # of the first try, or it is too high
                log_z = log_mean_exp(state.log_w)
            chosen = multinomial(w, 1, ctx.key(_name("reference", sweep)))
            pool.prune([numbers[int(chosen)]])
            reference = replace(state.gather(chosen), prediction=None)
            info = {"sweep": sweep, "rewards": state.memory["reward"],
                    "ess": ess(state.log_w), "reference": int(chosen)}  # fmt: skip
            yield Progress(step=sweep + 1, of=self.iterations, info=info)
        if reference is None and missed is not None:
            raise missed
        if not any(pool.weight.values()):  # misses took the sweeps after burn_in: one draw is left
            pool.weigh(reference.memory["number"].tolist(), [1.0])
        return pool.outcome(ctx.model.device, log_z)

    def sweep(
        self, ctx: Context, reference: State | None, sweep: int
    ) -> Generator[Request, Any, tuple[State, Tensor]]:
        """One population: (finished particles with their weights, pictures of the new ones).

        Args:
            reference: the kept path, one row: x is its sample, ``memory`` holds its "reward" and
                "number" and, for every checkpoint i, "x/i", "prediction/i", "phi/i" and its state
                after the step, "next/i"; of guided steps i "ratio/i", log p - log q, and of
                checkpoints among them "pull/i" and "lean/i". It fills slot 0; None for an
                ordinary population.
        """
        assert self.n_particles is not None
        n, kept = self.n_particles, 0 if reference is None else 1
        x = ctx.noise(n, stream=_name("init", sweep))[kept:]
        if reference is not None and n == 1:
            return reference, x  # the kept path alone: nothing can change
        numbers = torch.arange(sweep * n + kept, sweep * n + n)
        state = State.start(_beside(reference, lambda path: path.x, x))
        checkpoints, rows = self._checkpoints(ctx), Rows(range(kept, n), _name("proposal", sweep))
        for i, (t, u) in enumerate(ctx.grid.steps()):
            found = yield from self._look(ctx, state.x[kept:], t, i, rows)
            if i in checkpoints:
                part = damping(self.damping, ctx.grid, i)
                x0 = found["prediction"].x0
                found["phi"] = yield from preview(ctx, x0, self.reward_scale, i, part)
                state = _meet(reference, state, found, i)
                state = yield from self._resample(ctx, reference, state, i, sweep)
                found = {name: state.memory[f"{name}/{i}"] for name in found}
            state = self._advance(ctx, reference, state, found, t, u, i, rows)
            if i in checkpoints:
                moved = state.x[kept:]
                after = _beside(reference, lambda path, i=i: path.memory[f"next/{i}"], moved)
                state = replace(state, memory={**state.memory, f"next/{i}": after})
        images = yield Decode(state.x[kept:])
        scores = yield Score(images, state.x[kept:], final=True)
        reward = _beside(reference, lambda path: path.memory["reward"], as_float64(scores.value))
        numbers = _beside(reference, lambda path: path.memory["number"], numbers)
        x = _beside(reference, lambda path: path.x, state.x[kept:])
        memory = {**state.memory, "reward": reward, "number": numbers}
        state = replace(state, x=x, memory=memory)
        return state.set_potential(tilt(reward, self.reward_scale)), images

    def _look(
        self, ctx: Context, x: Tensor, t: Time, i: int, rows: Rows
    ) -> Generator[Request, Any, dict[str, Any]]:
        """The network's answer at x [n, *event]; where step i is guided, also pull and lean."""
        lead = self.lead(ctx)
        if lead is None or i not in lead.guide.guided_steps(ctx.grid, weighed=True):
            return {"prediction": (yield Denoise(x, t))}
        seen = yield from lead.guide.look(ctx, x, t, i, lead.reward_scale, rows=rows)
        return {"prediction": seen.prediction, "pull": seen.pull, "lean": seen.lean}

    def _advance(
        self, ctx: Context, reference: State | None, state: State, found: dict[str, Any],
        t: Time, u: Time, i: int, rows: Rows,
    ) -> State:  # fmt: skip
        """Step i of the new particles; a guided one adds log p - log q to all weights.

        Args:
            found: what ``_look`` found at the new particles; at a checkpoint at all of them.
        """
        kept, kernel = 0 if reference is None else 1, self.kernel()
        met, x = len(found["prediction"].x0) == len(state), state.x[kept:]
        own = _rows(found, slice(kept, None)) if met else found
        if self.guide is None or "pull" not in found:
            moved = ctx.move(
                x, own["prediction"], t, u, kernel, step=i, slots=rows.slots, stream=rows.stream
            )
            return replace(state, x=torch.cat([state.x[:kept], moved]), prediction=None)
        guide, mark = self.guide, f"ratio/{i}"
        base, shift = guide.proposal(ctx, x, _seen(own), t, u, i, kernel)
        shift = shift if base.random else None
        moved, ratio = draw(ctx, base, shift, i, rows.stream, rows.slots)
        ratio = ratio.to(state.log_w.device)
        if reference is not None:
            of_path = reference.memory[mark]
            if met:  # its past may be new, and the density of its own step with it
                past, after = _seen(_rows(found, slice(0, 1))), reference.memory[f"next/{i}"]
                base, shift = guide.proposal(ctx, state.x[:1], past, t, u, i, kernel)
                of_path = ratio_at(base, shift, after).to(of_path)
            ratio = torch.cat([of_path, ratio])
        return replace(
            state,
            x=torch.cat([state.x[:kept], moved]),
            log_w=state.log_w + ratio,
            prediction=None,
            memory={**state.memory, mark: ratio},
        )

    def _resample(
        self, ctx: Context, reference: State | None, state: State, i: int, sweep: int
    ) -> Generator[Request, Any, State]:
        """Resamples if the rule says so; the kept path stays in slot 0, maybe with a new past."""
        size, key = ess(state.log_w), ctx.key(_name("resample", sweep), i)
        info: dict[str, Any] = {"ess": size, "checkpoint": i}
        if self.resample == "always" or size < self.ess_threshold * len(state):
            rule = scheme(self.resampler)
            if reference is not None:
                first = self._ancestor(ctx, reference, state, i, sweep)

                def rule(w: Tensor, m: int, key: NoiseKey) -> Tensor:
                    return torch.cat([first, multinomial(w, m - 1, key)])

            mean = torch.full_like(state.log_w, log_mean_exp(state.log_w))
            state, ancestors = resample(state, rule, key)
            if reference is not None:
                # Its ancestor is chosen by more than weight, which may be too small to divide by.
                state = replace(state, log_w=mean)
            info |= {"ancestors": ancestors}
        yield Progress(step=sweep, of=self.iterations or 1, info=info)
        return state

    def _ancestor(
        self, ctx: Context, reference: State, state: State, i: int, sweep: int
    ) -> Tensor:
        """The particle from which the kept path goes on, [1]."""
        if not self.ancestor_sampling:
            return torch.zeros(1, dtype=torch.int64)
        assert state.prediction is not None
        t, u = ctx.grid.times[i], ctx.grid.times[i + 1]
        after = reference.memory[f"next/{i}"].expand_as(state.x)
        own = getattr(ctx.model, "transition", None)
        if hasattr(own, "log_prob"):
            log_p = own.log_prob(after, state.x, t, u)
        else:
            step = self.kernel()(state.x, state.prediction, t, u, ctx.model.path)
            if not step.random:  # nothing but its own past leads there
                return torch.zeros(1, dtype=torch.int64)
            log_p = step.log_prob(after)
        log_w = state.log_w - state.phi + log_p.to(state.log_w)
        return categorical(normalise(log_w), ctx.key(_name("ancestor", sweep), i).uniform(1))


def _name(stream: str, sweep: int) -> str:
    """The first sweep draws the numbers of an ordinary population."""
    return f"{stream}/{sweep}" if sweep else stream


def _beside(reference: State | None, read: Any, rows: Any) -> Any:  # noqa: ANN401
    """The kept path's row, if there is one, and the rows of the new particles."""
    if reference is None:
        return rows
    parts = [read(reference), rows]
    return Prediction.cat(parts) if isinstance(rows, Prediction) else torch.cat(parts)


def _rows(found: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {
        name: value.rows(rows) if isinstance(value, Prediction) else value[rows]
        for name, value in found.items()
    }


def _seen(found: dict[str, Any]) -> Guided:
    return Guided(found["prediction"], found["pull"], found["lean"])


def _meet(reference: State | None, state: State, found: dict[str, Any], i: int) -> State:
    """The whole population at checkpoint i, with what a path must remember of it.

    Args:
        found: of the new particles, their potential "phi" among it.
    """
    kept = 0 if reference is None else 1
    marks = {
        f"{name}/{i}": _beside(reference, lambda path, name=name: path.memory[f"{name}/{i}"], rows)
        for name, rows in {"x": state.x[kept:], **found}.items()
    }
    state = replace(
        state,
        x=marks[f"x/{i}"],
        prediction=marks[f"prediction/{i}"],
        memory={**state.memory, **marks},
    )
    return state.set_potential(marks[f"phi/{i}"])

"""Guidance where weights are kept: the laws of guided populations, sweeps and chains."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from steering.ledger import Budget
from steering.method import Context, Method, Plan
from steering.noise import NoiseKey
from steering.particles import State, normalise
from steering.requests import Outcome, Progress
from steering.resampling import multinomial
from steering.samplers import (
    EPF,
    FK,
    SVDD,
    CoDe,
    Guide,
    ParallelTempering,
    ParticleGibbs,
)
from steering.samplers.twists import ratio_at, scored
from steering.transitions import EtaKernel, Step
from tests.test_guidance import answered
from tests.twisted_worlds import (
    BOWL,
    LINE,
    WORLDS,
    affine_end,
    bell,
    distance,
    plane,
    repeated,
    steer,
    truth,
    worst,
)

STRONG = Guide(rho=0.8)
BOTH = Guide(rho=0.5, mu=0.05, n_iter=2, keep_eps=False)

# --- the law -----------------------------------------------------------------------------------

PARTICLES = {"n_particles": 32, "reward_scale": 1.0, "guidance": STRONG}
LAWS = {
    "epf": ("plane", EPF(**PARTICLES)),
    "epf-apf": (
        "plane",
        EPF(**PARTICLES, lookahead="apf", anneal="base", ess_threshold=1.0, early_phase=1.0),
    ),
    "epf-line": ("line", EPF(**{**PARTICLES, "reward_scale": 0.7}, checkpoints=(0.3, 0.6))),
    "svdd": ("plane", SVDD(**PARTICLES, n_branches=3)),
    "svdd-both": ("plane", SVDD(**{**PARTICLES, "guidance": BOTH}, n_branches=2, start=0.0)),
    "svdd-ess": (
        "plane",
        SVDD(**PARTICLES, n_branches=3, every=2, resample="ess", ess_threshold=0.9),
    ),
    "code": ("plane", CoDe(**PARTICLES, n_branches=3, block=3, select="softmax")),
    "code-single": (
        "plane",
        CoDe(
            **PARTICLES,
            n_branches=3,
            block=3,
            block_mode="single",
            select="softmax",
            resample="always",
        ),
    ),
    "code-sixteen": (
        "sixteen",
        CoDe(**{**PARTICLES, "guidance": Guide(rho=0.4)}, n_branches=2, block=2, select="softmax"),
    ),
    "particle_gibbs": (  # its first sweep, which has the normaliser
        "plane",
        ParticleGibbs(**PARTICLES, iterations=1, resample="always", damping="none"),
    ),
}


@pytest.mark.parametrize("case", sorted(LAWS))
def test_guided_populations_aim_at_the_tilted_law(case: str) -> None:
    """Z and Z E[f] of the sampler's own law. Measured: at most 1.9 standard errors."""
    assert worst(*LAWS[case]) < 5.0


def weighted_mean(world: str, method: Method) -> float:
    """How far weighted means are from the tilted one, in standard errors."""
    make, reward, _, axis = WORLDS[world]
    z, ez, zf, ezf = truth(world, 1.0)
    results = repeated(make, reward, method)
    found = [float(r.weights @ r.samples[:, axis]) for r in results]
    return distance(found, zf / z, math.hypot(ezf / z, zf * ez / z**2))


def test_guided_sweeps_sample_the_tilted_law() -> None:
    """From scratch, with particles enough to forget it. Measured: 0.1."""
    method = ParticleGibbs(**{**PARTICLES, "n_particles": 16}, iterations=3, burn_in=1)
    assert weighted_mean("plane", replace(method, resample="always")) < 5.0


class Kept(ParticleGibbs):
    """Starts every run from an exact path of the tilted law, and reports what sweeps keep."""

    def bank(self, ctx: Context) -> State:
        """Exact paths with all that a kept path remembers, one a row."""
        paths, weights = base_paths(200_000)
        generator = torch.Generator().manual_seed(5)
        x = paths[:, torch.multinomial(weights, REPEATS, generator=generator)]
        memory = {"reward": LINE(x[-1]).double(), "number": torch.full((REPEATS,), -1)}
        kernel, guide = self.kernel(), self.guide
        for i, (t, u) in enumerate(ctx.grid.steps()):
            prediction = ctx.model.predict(x[i], t)
            marks = {"x": x[i], "prediction": prediction, "next": x[i + 1]}
            marks["phi"] = self.reward_scale * LINE(prediction.x0)
            if i in guide.guided_steps(ctx.grid, weighed=True):
                seen = answered(ctx.model, LINE, guide.look(ctx, x[i], t, i, self.reward_scale))
                base, shift = guide.proposal(ctx, x[i], seen, t, u, i, kernel)
                real = Step(base.mean + shift, base.std)
                memory[f"ratio/{i}"] = base.log_prob(x[i + 1]) - real.log_prob(x[i + 1])
                marks |= {"pull": seen.pull, "lean": seen.lean}
            if i in self._checkpoints(ctx):
                memory |= {f"{k}/{i}": v for k, v in marks.items()}
        return State.start(x[-1], **memory)

    def run(self, ctx: Context):
        key = repr(self)
        if key not in BANKS:
            BANKS[key] = self.bank(ctx)
        reference = BANKS[key].gather(torch.tensor([ctx.seed]))
        for sweep in range(1, self.iterations + 1):
            state, _ = yield from self.sweep(ctx, reference, sweep)
            assert torch.equal(state.x[0], reference.x[0])
            w = normalise(state.log_w)
            kept = {"end": state.x, **{k: v for k, v in state.memory.items() if k[:2] == "x/"}}
            info = {k: (w[:, None] * torch.cat([v, v * v], 1)).sum(0) for k, v in kept.items()}
            reference = state.gather(multinomial(w, 1, ctx.key(f"reference/{sweep}")))
            yield Progress(step=sweep, of=self.iterations, info=info)
        reward = state.memory["reward"]
        return Outcome(x0=state.x, images=state.x, reward=reward, log_w=state.log_w)


REPEATS, TILT = 120, 1.5
BANKS: dict[str, State] = {}


@functools.cache
def base_paths(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n paths [T + 1, n, 1] of the base sampler and their tilted weights."""
    generator, model, kernel = torch.Generator().manual_seed(999), bell(), EtaKernel(eta=1.0)
    x = [torch.randn(n, 1, generator=generator, dtype=torch.float64)]
    for t, u in model.grid().steps():
        step = kernel(x[-1], model.posterior(x[-1], t), t, u, model.path)
        x.append(step.sample(torch.randn(n, 1, generator=generator, dtype=torch.float64)))
    return torch.stack(x), torch.softmax(TILT * LINE(x[-1]), 0)


KERNELS = {
    "three": {"n_particles": 3, "resample": "always"},
    "ess": {"n_particles": 4, "ess_threshold": 0.9},
}


@pytest.mark.parametrize("options", sorted(KERNELS))
def test_guided_sweeps_keep_the_tilted_law_of_paths(options: str) -> None:
    """Means and second moments of the sample and of two nodes on the way. Measured: 2.6."""
    method = Kept(
        iterations=3,
        reward_scale=TILT,
        checkpoints=(0.34, 0.67),
        guidance=Guide(rho=0.7),
        damping="none",
        **KERNELS[options],
    )
    results = repeated(bell, LINE, method, repeats=REPEATS)
    paths, weights = base_paths(200_000)
    for name, node in (("end", 6), ("x/2", 2), ("x/4", 4)):
        exact = weights @ torch.cat([paths[node], paths[node] ** 2], 1)
        for k in range(2):
            means = [float(torch.tensor(r.trace.column(name))[:, k].mean()) for r in results]
            assert distance(means, float(exact[k])) < 5.0, (name, k)


def log_ratios(guide: Guide, scale: float, x: torch.Tensor, after: torch.Tensor, i: int):
    """log p - log q of step i of one Gaussian with a linear reward, densities written out."""
    model, (t, u) = bell(), list(bell().grid().steps())[i]
    prediction, v = model.posterior(x, t), (0.6 * t.alpha) ** 2 + t.sigma**2
    base = EtaKernel(eta=1.0)(x, prediction, t, u, model.path)
    moved = scored(prediction, guide.rho * scale * t.alpha * 0.36 / v * torch.ones_like(x), t)
    mean = EtaKernel(eta=1.0)(x, moved, t, u, model.path).mean
    p, q = (torch.distributions.Normal(m, base.std) for m in (base.mean, mean))
    return (p.log_prob(after) - q.log_prob(after))[:, 0]


SHOWN: dict[str, State] = {}


class Open(Kept):
    """Runs two sweeps and shows the last population."""

    def run(self, ctx: Context):
        first, _ = yield from self.sweep(ctx, None, 0)
        path = first.gather(torch.tensor([1]))
        state, _ = yield from self.sweep(ctx, path, 1)
        SHOWN.update(state=state, path=path)
        reward = state.memory["reward"]
        return Outcome(x0=state.x, images=state.x, reward=reward, log_w=state.log_w)


GUIDED = {"n_particles": 5, "reward_scale": 1.5, "damping": "none", "guidance": Guide(rho=0.7)}


def test_weights_of_a_sweep_by_hand() -> None:
    """Never resampled: every weight is exp(scale r) dP/dQ of its path, the kept one's too."""
    method = Open(**GUIDED, checkpoints=(0.0, 0.17, 0.34, 0.5, 0.67), ess_threshold=0.0)
    steer(bell(), LINE, method)
    state = SHOWN["state"]
    total = 1.5 * state.x[:, 0]
    for i in range(5):
        x, after = state.memory[f"x/{i}"], state.memory[f"next/{i}"]
        total = total + log_ratios(method.guide, 1.5, x, after, i)
        assert float(state.memory[f"phi/{i}"][0]) == float(SHOWN["path"].memory[f"phi/{i}"])
    torch.testing.assert_close(state.log_w, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ancestor_sampling", [True, False])
def test_weights_after_a_new_past_by_hand(ancestor_sampling: bool) -> None:
    """Resampled before the last step with noise: what came since is known. Some seed has a new
    past, whose proposal density replaces that of the old one."""
    moved = 0
    for seed in range(6):
        method = Open(
            **GUIDED,
            checkpoints=(0.67,),
            resample="always",
            ancestor_sampling=ancestor_sampling,
        )
        steer(bell(), LINE, method, seed=seed)
        state, path, i = SHOWN["state"], SHOWN["path"], 4
        x, after = state.memory[f"x/{i}"], state.memory[f"next/{i}"]
        since = log_ratios(method.guide, 1.5, x, after, i)
        since = since + 1.5 * state.x[:, 0] - state.memory[f"phi/{i}"]
        left = state.log_w - since
        torch.testing.assert_close(left, left[0].expand(5), rtol=1e-5, atol=1e-5)
        assert torch.equal(after[0], path.memory[f"next/{i}"][0])
        moved += not torch.equal(x[0], path.memory[f"x/{i}"][0])
    assert (moved > 0) == ancestor_sampling


def test_a_new_past_is_drawn_by_the_density_of_the_base_sampler() -> None:
    """log w - phi + log p(x* | x_i), with p unguided, against frequencies."""
    model, method = bell(), ParticleGibbs(**{**GUIDED, "guidance": Guide(rho=3.0)})
    grid = method.levels(model)
    plan = Plan(grid=grid, costs=model.costs(), budget=Budget())
    t, u = grid.times[2], grid.times[3]
    x = torch.tensor([[0.3], [0.8], [1.6]], dtype=torch.float64)
    ctx = Context(model=model, cond=0, seed=0, plan=plan)
    seen = answered(model, LINE, method.guide.look(ctx, x, t, 2, 1.5))
    log_w, phi = torch.tensor([0.3, 1.0, -0.5]).double(), torch.tensor([0.9, -0.4, 0.2]).double()
    marks = {"pull/2": seen.pull, "lean/2": seen.lean}
    state = replace(State.start(x, **marks), log_w=log_w, phi=phi, prediction=seen.prediction)
    after = torch.tensor([[0.9]], dtype=torch.float64)
    path = State.start(x[:1], **{"next/2": after})
    step = EtaKernel(eta=1.0)(x, seen.prediction, t, u, model.path)
    p = torch.softmax(log_w - phi + step.log_prob(after.expand(3, 1)), 0)
    counts = torch.zeros(3)
    for seed in range(2000):
        ctx = Context(model=model, cond=0, seed=seed, plan=plan)
        counts[method._ancestor(ctx, path, state, 2, 1)] += 1
    error = torch.sqrt(p * (1 - p) / 2000)
    assert float(((counts / 2000 - p).abs() / error).max()) < 5.0


def test_a_tail_keeps_the_ratio_of_its_head() -> None:
    model = bell()
    method = ParallelTempering(
        n_particles=3, reward_scale=1.5, move="tail", eta=1.0, cuts=(0.5,), guidance=STRONG
    )
    plan = Plan(grid=method.levels(model), costs=model.costs(), budget=Budget())
    ctx = Context(model=model, cond=0, seed=0, plan=plan)
    chains, _ = answered(model, LINE, method._walk(ctx, None, ctx.noise(3), 0, 0))
    start = chains.memory["node/3"]
    tail, _ = answered(model, LINE, method._walk(ctx, chains, start, 3, 1))
    old, new = chains.memory["ratio"], tail.memory["ratio"]
    assert torch.equal(new[:, :3], old[:, :3])
    assert bool((new[:, 3:5] != old[:, 3:5]).all())
    assert bool((old[:, 1:5] != 0.0).all())
    assert not old[:, 5].any()


def test_every_guided_chain_keeps_its_own_law() -> None:
    """Tilting by x moves a Gaussian by scale * variance. Measured: at most 1.8."""
    each, shares, burn_in = 24, (0.0, 0.5, 1.0), 6
    method = ParallelTempering(
        ladder=tuple(share for share in shares for _ in range(each)),
        iterations=16,
        burn_in=burn_in,
        reward_scale=1.5,
        move="tail",
        eta=1.0,
        cuts=(0.4,),
        guidance=Guide(rho=0.7),
    )
    results = repeated(bell, LINE, method, repeats=16)
    mean, variance = affine_end(bell())
    for k, share in enumerate(shares):
        rows = [torch.tensor(r.trace.column("rewards")[burn_in:]) for r in results]
        found = [float(row[:, k * each : (k + 1) * each].mean()) for row in rows]
        assert distance(found, mean + 1.5 * share * variance) < 5.0, share
    delivered = [float(r.weights @ r.samples[:, 0]) for r in results]
    assert distance(delivered, mean + 1.5 * variance) < 5.0


def test_guided_tails_are_accepted_more_often_where_the_reward_counts() -> None:
    rates = []
    for guide in (None, Guide(rho=0.8)):
        method = ParallelTempering(
            ladder=(1.0,) * 100,
            iterations=4,
            reward_scale=2.0,
            cuts=(),
            move="tail",
            eta=1.0,
            guidance=guide,
        )
        taken = steer(bell(steps=24), LINE, method).trace.column("accepted")
        rates.append(float(torch.tensor(taken).double().mean()))
    assert rates[1] > rates[0] + 0.2


def test_the_density_at_a_state_is_that_of_its_draw() -> None:
    key = NoiseKey(3, "x")
    base, shift = Step(key.normal(5, (2,)).double(), 0.3), 0.2 * key.normal(5, (2,)).double()
    x = base.mean + shift + 0.3 * key.at(step=1).normal(5, (2,)).double()
    real = Step(base.mean + shift, 0.3)
    torch.testing.assert_close(ratio_at(base, shift, x), base.log_prob(x) - real.log_prob(x))
    assert not ratio_at(Step(base.mean, 0.0), shift, x).any()


@pytest.mark.parametrize(
    "method",
    [
        FK(n_particles=16, resample="always", checkpoints=(0.25, 0.5)),
        EPF(n_particles=12, checkpoints=(0.25, 0.5)),
        SVDD(n_particles=6, n_branches=2, resample="always"),
        CoDe(n_particles=6, n_branches=2, block=2, select="softmax", resample="always"),
        CoDe(n_particles=6, n_branches=2, block=2),
        ParticleGibbs(n_particles=6, iterations=3, resample="always"),
    ],
    ids=lambda method: f"{method.name}-{method.target}",
)
def test_every_particle_leans_by_its_own_gradient(monkeypatch, method) -> None:
    model, roots = plane(), []
    real = Guide.shift

    def checked(self, ctx, x, seen, base, t, u, i, kernel):
        leaf = x.clone().requires_grad_()
        (pull,) = torch.autograd.grad(2.0 * BOWL(model.posterior(leaf, t).x0).sum(), leaf)
        torch.testing.assert_close(seen.pull, pull, rtol=1e-5, atol=1e-5)
        roots.append(len(x.unique(dim=0)) / len(x))
        return real(self, ctx, x, seen, base, t, u, i, kernel)

    monkeypatch.setattr(Guide, "shift", checked)
    steer(model, BOWL, replace(method, reward_scale=2.0, guidance=Guide()))
    assert min(roots) < 1.0  # there were twins

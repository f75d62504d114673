"""Particle Gibbs: the law it keeps, its kept path, its limits, its cost."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from steering.analytic import FiniteChain, GaussianMixture, LinearReward, TableReward
from steering.errors import BudgetError, OptionError
from steering.ledger import Budget
from steering.method import Context
from steering.particles import State, normalise
from steering.requests import Outcome, Progress
from steering.resampling import multinomial
from steering.samplers import FK, BestOfN, ParticleGibbs
from tests.populations import (
    LINE,
    TABLE,
    TRUTHS,
    R,
    by_slot,
    chain,
    check_ledger,
    errors,
    guided,
    line,
    plan_of,
    repeated,
    steer,
)

# --- the law -----------------------------------------------------------------------------------

PRIZES = TableReward([0.0, 1.0, -1.0, 2.0])
SCALE = 1.5


def walk(prompts=("p",)) -> FiniteChain:
    """Four steps among four states."""
    generator = torch.Generator().manual_seed(5)
    logits = 1.2 * torch.randn(4, 4, 4, generator=generator, dtype=torch.float64)
    sticky = 0.6 * torch.eye(4, dtype=torch.float64) + 0.4 * torch.softmax(logits, 2)
    return FiniteChain([0.4, 0.3, 0.2, 0.1], sticky, prompts=prompts)


def bell(prompts=("p",)) -> GaussianMixture:
    """One Gaussian moved by the eta-kernel: its transitions have a density."""
    return GaussianMixture([1.0], [[0.5, -0.5]], [0.6], steps=5, prompts=prompts)


BELL_REWARD = LinearReward([1.0, 0.5])


class Kept(ParticleGibbs):
    """Starts from a path that is given, and reports the weighted state at every node.

    Under the exact kernel each sweep's weighted particles have the law of paths as their mean.
    """

    def path(self, ctx: Context) -> torch.Tensor:
        """A path of the tilted law, one state per node [T + 1, *event]."""
        generator = torch.Generator().manual_seed(ctx.seed)
        if isinstance(ctx.model, FiniteChain):
            tilted = ctx.model.tilted(PRIZES, SCALE)
            x = [torch.multinomial(tilted.initial, 1, generator=generator)]
            for matrix in tilted.transitions:
                x.append(torch.multinomial(matrix[x[-1][0]], 1, generator=generator))
            return torch.stack(x)
        paths, weights = bell_paths(4000, ctx.seed)
        return paths[:, torch.multinomial(weights, 1, generator=generator)[0]]

    def reference(self, ctx: Context) -> State:
        x = self.path(ctx)
        reward = PRIZES if isinstance(ctx.model, FiniteChain) else BELL_REWARD
        memory = {"reward": reward(x[-1:]).double(), "number": torch.tensor([-1])}
        for i in self._checkpoints(ctx):
            prediction = ctx.model.predict(x[i : i + 1], ctx.grid.times[i])
            phi = self.reward_scale * reward(prediction.x0)
            memory |= {f"x/{i}": x[i : i + 1], f"prediction/{i}": prediction, f"phi/{i}": phi}
            memory[f"next/{i}"] = x[i + 1 : i + 2]
        return State.start(x[-1:], **memory)

    def run(self, ctx: Context):
        reference = self.reference(ctx)
        for sweep in range(1, self.iterations + 1):
            state, _ = yield from self.sweep(ctx, reference, sweep)
            assert torch.equal(state.x[0], reference.x[0])
            w = normalise(state.log_w)
            kept = {"end": state.x, **{k: v for k, v in state.memory.items() if k[:2] == "x/"}}
            info = {k: (w[:, None] * self.features(ctx, v)).sum(0) for k, v in kept.items()}
            for i in self._checkpoints(ctx):
                stays = state.memory[f"x/{i}"] == state.memory[f"next/{i}"]
                info[f"stay/{i}"] = w @ stays[:, 0].double()
            chosen = multinomial(w, 1, ctx.key(f"reference/{sweep}"))
            reference = state.gather(chosen)
            yield Progress(step=sweep, of=self.iterations, info=info)
        reward = state.memory["reward"]
        return Outcome(x0=state.x, images=state.x, reward=reward, log_w=state.log_w)

    def features(self, ctx: Context, x: torch.Tensor) -> torch.Tensor:
        if isinstance(ctx.model, FiniteChain):
            return torch.nn.functional.one_hot(x[:, 0], 4).double()
        return torch.cat([x, x.square()], 1).double()


def bell_paths(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n paths of the eta-kernel [T + 1, n, 2] and their tilted weights."""
    model, generator = bell(), torch.Generator().manual_seed(1000 + seed)
    x = [torch.randn(n, 2, generator=generator, dtype=torch.float64)]
    kernel = ParticleGibbs().kernel()
    for t, u in model.grid().steps():
        step = kernel(x[-1], model.posterior(x[-1], t), t, u, model.path)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        x.append(step.sample(noise))
    return torch.stack(x), torch.softmax(SCALE * BELL_REWARD(x[-1]), 0)


KERNELS = {
    "two": {"n_particles": 2, "resample": "always"},
    "three": {"n_particles": 3},
    "five": {"n_particles": 5, "resample": "always"},
    "no new past": {"n_particles": 3, "resample": "always", "ancestor_sampling": False},
}


@pytest.mark.parametrize("options", sorted(KERNELS))
def test_sweeps_keep_the_tilted_law_of_paths_on_a_chain(options: str) -> None:
    """Started from an exact path, the law of every node and of staying there stays."""
    method = Kept(
        iterations=5, reward_scale=SCALE, checkpoints=(0.0, 0.25, 0.5), **KERNELS[options]
    )
    results = repeated(walk, PRIZES, method)
    tilted = walk().tilted(PRIZES, SCALE)
    for name, node in (("end", 4), ("x/0", 0), ("x/1", 1), ("x/2", 2)):
        law = tilted.law(tilted.grid().times[node])
        for state in range(4):
            means = [float(torch.tensor(r.trace.column(name))[:, state].mean()) for r in results]
            assert errors(means, float(law[state]), noise=0.08) < 5.0, (name, state)
    for i in (0, 1, 2):
        stays = float(tilted.law(tilted.grid().times[i]) @ tilted.transitions[i].diagonal())
        means = [float(torch.tensor(r.trace.column(f"stay/{i}")).mean()) for r in results]
        assert errors(means, stays, noise=0.08) < 5.0, i


@pytest.mark.parametrize("options", ["two", "three"])
def test_sweeps_keep_the_tilted_law_of_paths_with_densities(options: str) -> None:
    """Means and second moments at the end and at checkpoints. Measured: at most 2.9."""
    method = Kept(iterations=4, reward_scale=SCALE, checkpoints=(0.2, 0.6), **KERNELS[options])
    results = repeated(bell, BELL_REWARD, method)
    paths, weights = bell_paths(100_000, 999)
    for name, node in (("end", 5), ("x/1", 1), ("x/3", 3)):
        x = paths[node]
        exact = weights @ torch.cat([x, x.square()], 1)
        for k in range(4):
            means = [float(torch.tensor(r.trace.column(name))[:, k].mean()) for r in results]
            assert errors(means, float(exact[k]), noise=0.15) < 5.0, (name, k)


@pytest.mark.parametrize("world", sorted(TRUTHS))
def test_sweeps_sample_the_tilted_law(world: str) -> None:
    """From scratch, with particles enough to forget it. Measured: at most 1.9."""
    make, reward, scale, f = TRUTHS[world]
    n = 40
    method = ParticleGibbs(
        n_particles=n, iterations=3, burn_in=1, reward_scale=scale, checkpoints=(0.34, 0.67)
    )
    results, model = repeated(make, reward, method), make()
    if isinstance(model, FiniteChain):
        mean = float(model.tilted_law(reward, scale)[3])
    else:
        mean = float(f(model.tilted(reward, scale).moments()[0][None]))
    v = torch.tensor([float(r.weights @ f(r.samples)) for r in results])
    assert abs(float(v.mean()) - mean) < 5.0 * float(v.std()) / math.sqrt(R) + 1.0 / n
    z = [math.exp(r.log_z - model.log_normaliser(reward, scale)) for r in results]
    assert errors(z, 1.0, noise=0.2) < 5.0


def test_a_new_past_is_drawn_by_density_and_weight() -> None:
    """log w - phi + log p(x* | x_i), against frequencies."""
    model, n = walk(), 3
    method = ParticleGibbs(n_particles=n, reward_scale=1.0, checkpoints=(0.25,))
    plan = plan_of(model, method)
    t, u = plan.grid.times[1], plan.grid.times[2]
    x = torch.tensor([[0], [1], [3]])
    state = State.start(x)
    log_w, phi = torch.tensor([0.3, 1.0, -0.5]), torch.tensor([0.9, -0.4, 0.2])
    state = State(
        x=x, log_w=log_w.double(), phi=phi.double(), root=state.root,
        prediction=model.predict(x, t),
    )  # fmt: skip
    path = State.start(x[:1], **{"next/1": torch.tensor([[2]])})
    p = torch.exp(log_w - phi).double() * model.between(t, u)[x[:, 0], 2]
    counts = torch.zeros(n)
    for seed in range(3000):
        ctx = Context(model=model, cond=0, seed=seed, plan=plan)
        counts[method._ancestor(ctx, path, state, 1, 1)] += 1
    p = p / p.sum()
    error = torch.sqrt(p * (1 - p) / 3000)
    assert float(((counts / 3000 - p).abs() / error).max()) < 5.0
    stay = ParticleGibbs(n_particles=n, ancestor_sampling=False)
    assert stay._ancestor(ctx, path, state, 1, 1).tolist() == [0]


# --- what is kept and delivered ----------------------------------------------------------------


def test_the_kept_path_is_the_one_that_was_drawn() -> None:
    for options in ({}, {"resample": "always"}, {"ancestor_sampling": False}):
        method = ParticleGibbs(n_particles=4, iterations=6, reward_scale=1.0, **options)
        trace = steer(line(), LINE, method).trace
        kept = [e for e in trace.events if "reference" in e]
        assert len(kept) == 6
        for before, after in pairwise(kept):
            assert after["rewards"][0] == before["rewards"][before["reference"]]
        assert any(e["reference"] for e in kept[1:])


def test_the_path_to_keep_is_drawn_by_weight() -> None:
    """At a large scale the weights leave one choice."""
    for seed in range(4):
        method = ParticleGibbs(n_particles=4, iterations=3, reward_scale=1e6, checkpoints=())
        kept = steer(line(), LINE, method, seed=seed).trace.events
        assert all(e["rewards"][e["reference"]] == max(e["rewards"]) for e in kept[-3:])


def test_every_sample_comes_once_with_all_its_weight() -> None:
    method = ParticleGibbs(n_particles=3, iterations=7, burn_in=2, reward_scale=2.0)
    result = steer(line(), LINE, method, seed=1)
    assert len(result.slots.unique()) == len(result) == len(result.samples.unique())
    assert float(result.log_weights.exp().sum()) == pytest.approx(5.0)
    assert torch.equal(result.rewards, LINE(result.samples).float().double())
    seen = [r for e in result.trace.events if "reference" in e for r in e["rewards"]]
    assert result.best_reward == max(seen)


def test_the_best_is_delivered_though_it_has_no_weight() -> None:
    found = 0
    for seed in range(12):
        method = ParticleGibbs(n_particles=2, iterations=3, burn_in=2, reward_scale=0.1)
        result = steer(line(), LINE, method, seed=seed)
        seen = [r for e in result.trace.events if "reference" in e for r in e["rewards"]]
        assert result.best_reward == max(seen)
        weightless = torch.isneginf(result.log_weights)
        assert weightless.sum() <= 1
        assert not weightless[1:].any()
        found += int(weightless[0])
    assert found > 2


# --- limits ------------------------------------------------------------------------------------

MODELS = {"exact": lambda: line(), "path": lambda: line(kernel="path"), "chain": chain}


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("rule", ["ess", "always"])
def test_one_sweep_is_feynman_kac_steering_bit_for_bit(model: str, rule: str) -> None:
    reward = TABLE if model == "chain" else LINE
    options = {"n_particles": 8, "reward_scale": 2.0, "resample": rule}
    base = steer(MODELS[model](), reward, FK(**options), seed=3)
    ours = steer(MODELS[model](), reward, ParticleGibbs(iterations=1, **options), seed=3)
    assert torch.equal(by_slot(ours), by_slot(base))
    assert ours.log_z == base.log_z
    assert torch.allclose(ours.weights, base.weights, rtol=0, atol=1e-12)


def test_one_particle_is_the_first_sample_for_ever() -> None:
    base = steer(line(), LINE, BestOfN(n=1, eta=1.0), seed=3)
    ours = steer(line(), LINE, ParticleGibbs(n_particles=1, iterations=5), seed=3)
    assert torch.equal(ours.samples, base.samples)
    assert ours.ledger.nfe == base.ledger.nfe == 8


def test_at_reward_scale_zero_all_particles_count_the_same() -> None:
    method = ParticleGibbs(n_particles=4, iterations=5, reward_scale=0.0)
    model = line(("p",) * R)
    results = steer(model, LINE, method, seed=list(range(R)))
    weights = results[0].log_weights.exp()
    assert torch.allclose(4 * weights, (4 * weights).round(), atol=1e-9)
    means = [float(r.weights @ r.samples[:, 0]) for r in results]
    assert errors(means, float(line().moments()[0]), noise=0.2) < 5.0


def test_a_constant_added_to_the_reward_changes_nothing_but_z() -> None:
    method = ParticleGibbs(n_particles=5, iterations=4, reward_scale=2.0, resample="always")
    a, b = (steer(line(), LinearReward([1.0], c), method) for c in (0.0, 7.0))
    assert a.trace.ancestors == b.trace.ancestors
    assert len(a.trace.ancestors) > 8
    assert torch.equal(by_slot(a), by_slot(b))
    assert b.log_z - a.log_z == pytest.approx(14.0, abs=1e-5)


def test_a_kept_path_of_no_weight_goes_on() -> None:
    """At a scale where weights underflow the forced path must not get an infinite one."""
    for ancestor_sampling in (True, False):
        method = ParticleGibbs(
            n_particles=3, iterations=4, reward_scale=1e5, resample="always",
            ancestor_sampling=ancestor_sampling,
        )  # fmt: skip
        results = steer(line(("p",) * 12), LINE, method, seed=list(range(12)))
        assert all(torch.isfinite(r.samples).all() for r in results)
        assert all(float(r.log_weights.exp().sum()) == pytest.approx(4.0) for r in results)


# --- cost --------------------------------------------------------------------------------------

COSTS = {
    "plain": {},
    "one particle": {"n_particles": 1},
    "one sweep": {"iterations": 1},
    "no checkpoint": {"checkpoints": ()},
    "always": {"resample": "always", "checkpoints": (0.0, 0.3, 0.31, 0.6)},
    "noise levels": {"noise_levels": (0.8, 0.5)},
    "burn-in": {"burn_in": 3, "ancestor_sampling": False},
}


@pytest.mark.parametrize("case", sorted(COSTS))
def test_the_ledger_agrees_with_the_forecast(case: str) -> None:
    options = {"n_particles": 3, "iterations": 4, "reward_scale": 1.0, **COSTS[case]}
    check_ledger(ParticleGibbs(**options))


def test_cost_by_hand() -> None:
    """7 steps at 2 2 2 3 3 3 3 rows, checkpoints before steps 3, 4 and 5; 3 + 2 + 2 particles."""
    cost = ParticleGibbs(n_particles=3, iterations=3).cost(plan_of(guided(), ParticleGibbs()))
    assert (cost.nfe, cost.decodes, cost.reward_calls) == (7 * 18, 7 * 4, 7 * 4)


@pytest.mark.parametrize(
    ("options", "nfe", "particles"),
    [
        ({}, 71, 3), ({}, 72, 4), ({}, 125, 4), ({}, 126, 7), ({}, 400, 22),
        ({"n_particles": 3}, 90, 5), ({"n_particles": 2}, 90, 5), ({"iterations": 2}, 200, 11),
        ({"n_particles": 1}, 90, 1), ({"burn_in": 2}, 180, 10),
    ],
)  # fmt: skip
def test_budgets_are_filled_and_never_exceeded(options: dict, nfe: int, particles: int) -> None:
    ledger = steer(guided(), LINE, ParticleGibbs(reward_scale=1.0, **options), nfe=nfe).ledger
    assert ledger.nfe == 18 * particles <= nfe


def test_budgets_that_cannot_pay_are_refused_at_once() -> None:
    for options, budget, message in (
        ({}, Budget(nfe=17), "one particle needs 18"),
        ({"n_particles": 4}, Budget(nfe=71), "4 particles needs nfe=72"),
        ({"n_particles": 3, "iterations": 2}, Budget(nfe=89), "3 particles needs nfe=90"),
        ({}, Budget(reward_calls=3), "one particle needs 4"),
    ):
        model = guided()
        with pytest.raises(BudgetError, match=message):
            steer(model, LINE, ParticleGibbs(**options), budget=budget)
        assert model.rows == 0
    with pytest.raises(OptionError, match="pays for 1 sweeps"):
        steer(model, LINE, ParticleGibbs(burn_in=1), nfe=72)


# --- refusals ----------------------------------------------------------------------------------

BAD = {
    "eta=0 makes the sampler deterministic": {"eta": 0.0},
    "checkpoints are fractions": {"checkpoints": (1.0,)},
    "noise_levels are shares": {"noise_levels": (-0.1,)},
    "n_particles must be": {"n_particles": 0},
    "iterations must be": {"iterations": 0},
    "burn_in must lie in": {"iterations": 3, "burn_in": 3},
    "ess_threshold must": {"ess_threshold": 1.5},
    "reward_scale must be": {"reward_scale": math.nan},
    "resampler": {"resampler": "sytematic"},
}


@pytest.mark.parametrize("message", sorted(BAD))
def test_bad_options_are_refused(message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ParticleGibbs(**BAD[message])

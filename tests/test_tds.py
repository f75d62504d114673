"""TDS: its law, the exact ratio of its proposals, its limits, costs and refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import steering
from steering.analytic import FiniteChain, GaussianMixture, TableReward
from steering.errors import BudgetError, OptionError, RewardError
from steering.noise import NoiseKey
from steering.particles import State
from steering.paths import Linear
from steering.samplers import FK, TDS, BestOfN
from steering.samplers.twists import clipped, scored, usable
from tests.twisted_worlds import (
    BOWL,
    LINE,
    WORLDS,
    N,
    Noted,
    Paired,
    affine_end,
    bell,
    distance,
    line,
    plane,
    repeated,
    steer,
    weights_by_hand,
    worst,
)

# Measured slopes at 0, 1/5, ... 4/5 of the steps.
DAMPED = {"none": (1.0,) * 5, "measured": (0.02, 0.36, 0.72, 0.9, 0.95)}
RULES = {
    "ess": {},
    "always": {"resample": "always"},
    "never": {"resample": "never"},
    "half": {"twist_scale": 0.5, "resample": "always"},
    "double": {"twist_scale": 2.0},
    "late": {"start": 0.4, "resample": "always"},
    "clipped": {"clip_norm": 0.3, "clip_value": 0.25, "resample": "always"},
    "beside": {"through_network": False, "resample": "always"},
    "tight": {"clip_x0": 1.5},
}


# --- the law -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_has_the_same_target(rule: str) -> None:
    """2-D mixture. Measured: at most 1.8 standard errors."""
    method = TDS(n_particles=N, reward_scale=1.0, **{"start": 0.0, **RULES[rule]})
    assert worst("plane", method) < 5.0


@pytest.mark.parametrize("world", ["line", "sixteen"])
def test_in_one_and_sixteen_dimensions(world: str) -> None:
    method = TDS(start=0.0, n_particles=N, reward_scale=WORLDS[world][2], resample="always")
    assert worst(world, method) < 5.0


def test_one_gaussian_against_the_affine_recursion() -> None:
    scale = 1.5
    mean, variance = affine_end(bell())
    results = repeated(bell, LINE, TDS(start=0.0, n_particles=N, reward_scale=scale))
    log_z = scale * mean + 0.5 * scale**2 * variance
    z = [math.exp(r.log_z - log_z) for r in results]
    assert distance(z, 1.0) < 5.0
    means = [float(r.weights @ r.samples[:, 0]) for r in results]
    pairs = [a * b for a, b in zip(z, means, strict=True)]
    assert distance(pairs, mean + scale * variance) < 5.0


@pytest.mark.parametrize("damping", sorted(DAMPED))
def test_weights_by_hand_for_a_linear_reward_and_one_gaussian(damping) -> None:
    """Densities written out: normal laws with the shift that the paper's formula gives."""
    scale = 1.5
    model = Noted([1.0], [0.5], [0.6], steps=5)
    method = TDS(
        start=0.0, n_particles=7, reward_scale=scale, resample="never", eta=0.8, damping=damping
    )
    result = steer(model, LINE, method, seed=3)

    def lean(i, t, u, kept, std, gain):
        twist = DAMPED[damping][i] * scale * gain
        return u.alpha * t.sigma**2 * twist / t.alpha - kept * t.sigma * twist if t.alpha else 0.0

    total = weights_by_hand(model, result, scale, 0.8, lean)
    torch.testing.assert_close(
        result.log_weights[result.slots.argsort()], total, rtol=0, atol=1e-6
    )


def test_weights_are_flat_where_the_twist_is_nearly_exact() -> None:
    """A linear reward of one Gaussian has the exact twist; finer grids leave less to correct."""
    share = {}
    for steps in (4, 64):
        method = TDS(
            start=0.0, n_particles=256, reward_scale=2.0, resample="never", damping="none"
        )
        result = steer(bell(steps=steps), LINE, method)
        share[steps] = float(1.0 / result.weights.square().sum()) / 256
    plain = steer(bell(steps=64), LINE, BestOfN(n=256, reward_scale=2.0, select="all", eta=1.0))
    assert share[64] > 0.95 > share[4]
    assert float(1.0 / plain.weights.square().sum()) / 256 < 0.5


def test_what_a_particle_knows_moves_with_it() -> None:
    x = torch.arange(4.0)[:, None]
    state = State.start(x, slope=10.0 * x, rho=x[:, 0])
    child = state.gather(torch.tensor([2, 2, 0, 1]))
    assert torch.equal(child.memory["slope"], 10.0 * child.x)
    assert torch.equal(child.memory["rho"], child.x[:, 0])


def test_after_resampling_every_particle_leans_by_its_own_gradient() -> None:
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Checked(TDS):
        def shift(self, ctx, state, temper, t, u, base):
            leaf = state.x.clone().requires_grad_()
            value = BOWL(ctx.model.posterior(leaf, t).x0).sum()
            (slope,) = torch.autograd.grad(2.0 * value, leaf)
            torch.testing.assert_close(state.memory["slope"], slope, rtol=1e-5, atol=1e-5)
            seen.append(len(state.root.unique()))
            return super().shift(ctx, state, temper, t, u, base)

    steer(plane(), BOWL, Checked(n_particles=16, reward_scale=2.0, resample="always"))
    assert seen[-1] < 16  # there were twins


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5])
def test_reward_scale_zero_is_the_base_sampler_bit_for_bit(n: int) -> None:
    base = steer(plane(), BOWL, BestOfN(n=n, select="all", reward_scale=0.0, eta=1.0))
    result = steer(plane(), BOWL, TDS(start=0.0, n_particles=n, reward_scale=0.0, resample="ess"))
    assert torch.equal(result.samples, base.samples)
    assert torch.equal(result.log_weights, torch.zeros(n, dtype=torch.float64))
    assert result.log_z == 0.0


@pytest.mark.parametrize("damping", sorted(DAMPED))
@pytest.mark.parametrize("rule", ["ess", "always"])
def test_no_twist_is_feynman_kac_bit_for_bit(rule: str, damping) -> None:
    fractions = tuple(i / 8 for i in range(7))
    same = {"n_particles": 9, "reward_scale": 1.5, "resample": rule, "damping": damping}
    fk = FK(checkpoints=fractions, **same)
    tds = TDS(start=0.0, twist_scale=0.0, **same)
    a, b = steer(plane(), BOWL, fk), steer(plane(), BOWL, tds)
    assert torch.equal(a.samples, b.samples)
    torch.testing.assert_close(a.log_weights, b.log_weights, rtol=0, atol=1e-12)


def test_a_start_at_the_end_is_importance_sampling() -> None:
    base = steer(plane(), BOWL, BestOfN(n=5, select="all", reward_scale=2.0, eta=1.0))
    result = steer(plane(), BOWL, TDS(n_particles=5, reward_scale=2.0, start=1.0))
    assert torch.equal(result.samples, base.samples)
    assert result.ledger.nfe_backward == 0
    assert result.log_z == pytest.approx(base.log_z)


def test_one_particle_and_one_step() -> None:
    result = steer(line(steps=1), LINE, TDS(start=0.0, n_particles=1, reward_scale=2.0))
    assert result.log_z == pytest.approx(2.0 * float(result.rewards[0]), abs=1e-6)


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"micro_batch": 1, "checkpoint": True}])
def test_memory_options_change_no_number(options: dict) -> None:
    method = {"n_particles": 5, "reward_scale": 1.0, "resample": "always"}
    one = steer(plane(), BOWL, TDS(**method))
    other = steer(plane(), BOWL, TDS(**method, **options))
    torch.testing.assert_close(one.samples, other.samples, rtol=0, atol=1e-12)
    assert one.ledger.nfe == other.ledger.nfe
    assert (other.ledger.nfe_recomputed > 0) == ("checkpoint" in options)


def test_gradients_that_are_not_numbers_move_nothing_and_are_counted() -> None:
    def edge(x):
        return torch.where(x[:, 0] > 0, x[:, 0], -torch.sqrt(torch.relu(-x[:, 0]) * 0.0))

    result = steer(plane(), edge, TDS(start=0.0, n_particles=16, reward_scale=1.0))
    assert max(result.trace.column("bad")) > 0
    assert torch.isfinite(result.samples).all()
    slope = torch.tensor([[1.0, math.nan], [2.0, 3.0], [math.inf, 0.0]])
    good, bad = usable(slope)
    assert bad == 2
    assert good.tolist() == [[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]


def test_a_preview_of_minus_infinity_kills_nothing_yet() -> None:
    def cliff(x):
        return torch.where(x[:, 0] > -0.5, x[:, 0], -math.inf)

    result = steer(plane(), cliff, TDS(start=0.0, n_particles=32, reward_scale=1.0))
    assert torch.isfinite(result.log_weights).any()
    assert math.isfinite(result.log_z)


def test_clipping() -> None:
    slope = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0]])
    assert clipped(slope, None, None) is slope
    expected = torch.tensor([[0.6, 0.8], [0.3, -0.4], [0.0, 0.0]])
    torch.testing.assert_close(clipped(slope, 1.0, None), expected)
    assert clipped(slope, None, 0.35).abs().max() == pytest.approx(0.35)


def test_a_larger_score_keeps_the_state() -> None:
    """x = alpha x0 + sigma eps before and after; the score grows by what was asked."""
    model, path = plane(), Linear()
    x = model.noise(4, NoiseKey(0, "x"))
    shift = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for at in (0.9, 0.3):
        t = path.at(at)
        before = model.posterior(x, t)
        after = scored(before, shift, t)
        torch.testing.assert_close(t.alpha * after.x0 + t.sigma * after.eps, x)
        torch.testing.assert_close(after.score(t) - before.score(t), shift)
    noise = model.posterior(x, path.at(1.0))
    assert torch.equal(scored(noise, shift, path.at(1.0)).x0, noise.x0)


# --- costs and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "twisted"),
    [
        ({}, 3),
        ({"start": 0.0}, 5),
        ({"start": 0.5, "resample": "always"}, 2),
        ({"micro_batch": 1, "start": 0.2}, 4),
    ],
)
def test_the_ledger_is_the_closed_formula(options: dict, twisted: int) -> None:
    n, rows = 3, 2
    ledger = steer(Paired(), BOWL, TDS(n_particles=n, **options)).ledger
    assert ledger.nfe == n * 6 * rows
    assert ledger.nfe_backward == n * twisted * rows
    assert ledger.decodes == ledger.reward_calls == n * (twisted + 1)
    assert ledger.decodes_backward == ledger.reward_backward == n * twisted


def test_a_budget_is_filled() -> None:
    ledger = steer(plane(), BOWL, TDS(), nfe=50).ledger
    assert ledger.nfe == 48
    budget = steering.Budget(reward_calls=17)
    assert steer(plane(), BOWL, TDS(start=0.0), budget=budget).ledger.reward_calls == 16


def test_refusals_come_before_the_first_call() -> None:
    model = plane()
    blind = steering.rewards.FunctionReward(lambda x: x[:, 0], differentiable=False)
    with pytest.raises(RewardError, match="'tds' needs the gradient"):
        steer(model, blind, TDS(n_particles=2))
    with pytest.raises(BudgetError, match="needs 8"):
        steer(model, BOWL, TDS(), nfe=7)
    with pytest.raises(BudgetError, match="nfe=24"):
        steer(model, BOWL, TDS(n_particles=3), nfe=23)
    assert model.rows == 0
    exact = GaussianMixture([1.0], [0.0], [1.0], kernel="exact")
    with pytest.raises(OptionError, match="a law of its own"):
        steer(exact, LINE, TDS(n_particles=2))
    half = torch.full((2, 2), 0.5)
    with pytest.raises(OptionError, match="a law of its own"):
        steering.steer(
            FiniteChain(half[0], half[None]), reward=TableReward([0.0, 1.0]), method=TDS()
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, "deterministic"),
        ({"eta": 0.0, "n_particles": 1}, "deterministic"),
        ({"n_particles": 0}, "n_particles"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"twist_scale": -1.0}, "twist_scale"),
        ({"start": 1.5}, "start"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_x0": -1.0}, "clip_x0"),
        ({"reward_scale": -1.0}, "reward_scale"),
        ({"resampler": "best"}, "resampler"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        TDS(**options)

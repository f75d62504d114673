"""DAS: its law under every tempering, schedules by hand, costs and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from steering.errors import OptionError, RewardError
from steering.method import build_method
from steering.particles import State, ess
from steering.rewards import FunctionReward
from steering.samplers import DAS, FK, BestOfN
from steering.samplers.twists import doubling, raise_temper
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
    plane,
    repeated,
    steer,
    weights_by_hand,
    worst,
)

RULES = {
    "exp": {"resample": "always"},
    "exp-ess": {},
    "fast": {"gamma": 0.5, "resample": "always", "resampler": "systematic"},
    "poly": {"tempering": "poly", "power": 2.0, "resample": "always"},
    "adaptive": {"tempering": "adaptive", "ess_threshold": 0.8},
    "none": {"tempering": "none", "resample": "always"},
    "clipped": {"clip_norm": 0.3, "resample": "always"},
    "beside": {"through_network": False, "resample": "always"},
    "never": {"resample": "never", "twist_scale": 0.7},
}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_tempering_has_the_same_target(rule: str) -> None:
    """2-D mixture. Measured: at most 1.4 standard errors."""
    method = DAS(n_particles=N, reward_scale=1.0, **RULES[rule])
    assert worst("plane", method) < 5.0


@pytest.mark.parametrize("world", ["line", "sixteen"])
def test_in_one_and_sixteen_dimensions(world: str) -> None:
    method = DAS(n_particles=N, reward_scale=WORLDS[world][2], resample="always", eta=0.7)
    assert worst(world, method) < 5.0


def test_one_gaussian_against_the_affine_recursion() -> None:
    scale = 1.5
    mean, variance = affine_end(bell())
    results = repeated(bell, LINE, DAS(n_particles=N, reward_scale=scale))
    log_z = scale * mean + 0.5 * scale**2 * variance
    z = [math.exp(r.log_z - log_z) for r in results]
    assert distance(z, 1.0) < 5.0
    means = [float(r.weights @ r.samples[:, 0]) for r in results]
    pairs = [a * b for a, b in zip(z, means, strict=True)]
    assert distance(pairs, mean + scale * variance) < 5.0


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_weights_by_hand_for_a_linear_reward_and_one_gaussian(start: float) -> None:
    """Each proposal leans by its variance times the gradient, under the temper it leads to."""
    scale, gamma = 1.5, 0.3
    model = Noted([1.0], [0.5], [0.6], steps=5)
    method = DAS(n_particles=7, reward_scale=scale, resample="never", gamma=gamma, start=start)
    result = steer(model, LINE, method, seed=3)

    def lean(i, t, u, kept, std, gain):
        begun = i >= 5 * start
        return std**2 * min((1 + gamma) ** (i + 1) - 1, 1.0) * scale * gain if begun else 0.0

    total = weights_by_hand(model, result, scale, 1.0, lean)
    torch.testing.assert_close(
        result.log_weights[result.slots.argsort()], total, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("start", "first"), [({"start": 0.0}, 0), ({}, 2)])
def test_the_potential_has_the_temper_of_its_own_step(start, first: int) -> None:
    """ESS in the trace follows from tempered rewards: the weights of the run, rebuilt."""
    options = {"n_particles": 12, "reward_scale": (scale := 2.0), "resample": "never"}
    method = DAS(twist_scale=0.0, gamma=0.2, **options, **start)
    result = steer(plane(), BOWL, method, seed=1)
    events = [e for e in result.trace.events if "checkpoint" in e]
    assert len(events) == 7 - first
    for k, event in enumerate(events, first):
        temper = min(1.2**k - 1.0, 1.0)
        assert event["temper"] == pytest.approx(temper)
        share = torch.softmax(temper * scale * torch.tensor(event["rewards"]).double(), 0)
        assert event["ess"] == pytest.approx(float(1.0 / share.square().sum()))


def test_schedules() -> None:
    das = DAS(gamma=0.008)
    assert [das.schedule(k, 100) for k in (0, 1)] == pytest.approx([0.0, 0.008])
    assert das.schedule(86, 100) < 1.0 == das.schedule(88, 100)
    assert doubling(100) == pytest.approx(0.008, abs=1e-4)
    free = DAS()
    assert free.schedule(17, 20) < 1.0 == free.schedule(18, 20)
    poly = DAS(tempering="poly", gamma=0.1, power=2.0)
    assert [poly.schedule(k, 9) for k in (0, 3, 10, 12)] == pytest.approx([0.0, 0.09, 1.0, 1.0])
    state, grid = State.start(torch.zeros(1, 1)), plane().grid()
    assert DAS(tempering="none").tempers(state, grid, 3, 0.0) == (1.0, 1.0)
    assert DAS(gamma=0.1).tempers(state, grid, 3, 0.0) == pytest.approx((0.331, 0.4641))


def test_the_adaptive_temper_meets_its_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    rho = 5.0 * torch.randn(64, generator=generator, dtype=torch.float64)
    state = State.start(torch.zeros(64, 1))
    temper = raise_temper(state, rho, 0.0, 0.5)
    assert 0.0 < temper < 1.0
    moved = state.set_potential(temper * rho)
    assert ess(moved.log_w) == pytest.approx(32.0, abs=1e-6)
    assert ess(moved.log_w) < 32.0  # so that the rule for resampling sees it
    assert raise_temper(moved, rho, temper, 0.5) == temper  # cumulative weights, nothing to spare
    carried = replace(state, log_w=0.25 * temper * rho)
    assert raise_temper(carried, rho, 0.0, 0.5) == pytest.approx(0.75 * temper)
    assert raise_temper(state, 0.01 * rho, 0.0, 0.5) == 1.0
    assert raise_temper(state.set_potential(rho), rho, 0.3, 0.5) >= 0.3


def test_adaptive_tempers_never_fall() -> None:
    method = DAS(n_particles=24, reward_scale=4.0, tempering="adaptive")
    result = steer(plane(steps=12), BOWL, method)
    tempers = result.trace.column("temper")
    assert tempers == sorted(tempers)
    assert 0.0 < tempers[0] <= tempers[-1] <= 1.0
    assert len(result.trace.ancestors) > 0


@pytest.mark.parametrize("tempering", ["exp", "poly", "adaptive", "none"])
def test_reward_scale_zero_is_the_base_sampler_bit_for_bit(tempering: str) -> None:
    base = steer(plane(), BOWL, BestOfN(n=5, select="all", reward_scale=0.0, eta=1.0))
    method = DAS(n_particles=5, reward_scale=0.0, tempering=tempering)
    result = steer(plane(), BOWL, method)
    assert torch.equal(result.samples, base.samples)
    assert torch.equal(result.log_weights, torch.zeros(5, dtype=torch.float64))


def test_no_twist_and_no_temper_is_feynman_kac_bit_for_bit() -> None:
    fractions = tuple(i / 8 for i in range(7))
    fk = FK(
        n_particles=9, reward_scale=1.5, checkpoints=fractions, resampler="ssp", damping="none"
    )
    das = DAS(n_particles=9, reward_scale=1.5, tempering="none", twist_scale=0.0, start=0.0)
    a, b = steer(plane(), BOWL, fk), steer(plane(), BOWL, das)
    assert torch.equal(a.samples, b.samples)
    torch.testing.assert_close(a.log_weights, b.log_weights, rtol=0, atol=1e-12)


def test_one_particle() -> None:
    result = steer(plane(), BOWL, DAS(n_particles=1, reward_scale=1.0))
    assert len(result) == 1
    assert math.isfinite(result.log_z)


@pytest.mark.parametrize(
    ("options", "twisted"),
    [
        ({}, 3),
        ({"start": 0.0}, 5),
        ({"start": 0.5, "tempering": "adaptive"}, 2),
        ({"micro_batch": 2, "tempering": "poly", "start": 0.3}, 3),
    ],
)
def test_the_ledger_is_the_closed_formula(options: dict, twisted: int) -> None:
    n, rows = 3, 2
    ledger = steer(Paired(), BOWL, DAS(n_particles=n, **options)).ledger
    assert ledger.nfe == n * 6 * rows
    assert ledger.nfe_backward == n * twisted * rows
    assert ledger.decodes == ledger.reward_calls == n * (twisted + 1)
    assert ledger.decodes_backward == ledger.reward_backward == n * twisted


def test_presets_and_refusals() -> None:
    assert build_method("das/lcm").eta == 0.5
    assert build_method("das/sdxl") == DAS(n_particles=4, gamma=0.008, start=0.0)
    for options, words in (
        ({"eta": 0.0}, "deterministic"),
        ({"gamma": 0.0}, "gamma"),
        ({"power": -1.0}, "power"),
        ({"tempering": "none", "gamma": 0.1}, "no meaning"),
        ({"tempering": "linear"}, "tempering"),
    ):
        with pytest.raises(OptionError, match=words):
            DAS(**options)
    model = plane()
    with pytest.raises(RewardError, match="'das' needs the gradient"):
        steer(model, FunctionReward(lambda x: x[:, 0], differentiable=False), DAS())
    assert model.rows == 0

"""Weighted particles: nothing is left behind at a gather, and weights are never lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from steering.errors import SteeringError
from steering.noise import NoiseKey
from steering.particles import State, ess, log_mean_exp, normalise, resample
from steering.paths import Prediction
from steering.resampling import SCHEMES, systematic

LOG_W = torch.tensor([0.3, -1.2, 2.0, -700.0, 1.1], dtype=torch.float64)


NUMBERS = NoiseKey(5, "resample").uniform(1500, (16,))


class Drawn(NoiseKey):
    """A key whose numbers were drawn beforehand, so that many draws cost one call."""

    def uniform(self, slots, shape=(), *, device="cpu"):
        return NUMBERS[self.step, self.slot : self.slot + slots]


@dataclass(frozen=True, eq=False)
class Rich(Prediction):
    """A prediction that knows one thing more."""

    variance: torch.Tensor


def marked(n: int) -> State:
    """A state in which every number of particle i is i (or says i)."""
    i = torch.arange(n)
    return State(
        x=i[:, None].double().expand(n, 2).clone(),
        log_w=i.double(),
        phi=10.0 * i.double(),
        root=i,
        prediction=Rich(i[:, None] + 0.5, i[:, None] - 0.5, i[:, None] * 2.0),
        memory={"peak": i.float(), "gradient": i[:, None, None].expand(n, 3, 3).clone()},
    )


def key(i: int = 0) -> NoiseKey:
    return NoiseKey(5, "resample", i)


def weighted(log_w: torch.Tensor) -> State:
    start = State.start(torch.arange(len(log_w)).double()[:, None])
    return start.set_potential(log_w)


def test_start_gives_equal_weights_and_own_roots() -> None:
    state = State.start(torch.zeros(4, 2), peak=torch.arange(4))
    assert torch.equal(state.log_w, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(state.phi, torch.zeros(4, dtype=torch.float64))
    assert state.root.tolist() == [0, 1, 2, 3]
    assert state.memory["peak"].tolist() == [0, 1, 2, 3]


def test_gather_moves_every_field() -> None:
    a = torch.tensor([3, 3, 0, 1])
    state = marked(5).gather(a)
    assert len(state) == 4
    assert torch.equal(state.x[:, 0], a.double())
    assert torch.equal(state.log_w, a.double())
    assert torch.equal(state.phi, 10.0 * a.double())
    assert torch.equal(state.root, a)
    assert isinstance(state.prediction, Rich)
    assert torch.equal(state.prediction.x0[:, 0], a + 0.5)
    assert torch.equal(state.prediction.eps[:, 0], a - 0.5)
    assert torch.equal(state.prediction.variance[:, 0], a * 2.0)
    assert torch.equal(state.memory["peak"], a.float())
    assert torch.equal(state.memory["gradient"][:, 2, 1], a)


def test_resample_moves_every_field_but_replaces_the_weights() -> None:
    state, a = resample(marked(5), systematic, key())
    assert torch.equal(state.x[:, 0], a.double())
    assert torch.equal(state.phi, 10.0 * a.double())
    assert torch.equal(state.root, a)
    assert torch.equal(state.prediction.x0[:, 0], a + 0.5)
    assert torch.equal(state.memory["gradient"][:, 0, 0], a)
    assert float(state.log_w.std()) < 1e-12


def test_roots_survive_two_generations() -> None:
    first, a = resample(marked(5), systematic, key(0))
    second, b = resample(first.set_potential(torch.arange(5.0)), systematic, key(1))
    assert torch.equal(second.root, a[b])


def test_potentials_telescope_whatever_came_between() -> None:
    state = State.start(torch.zeros(3, 1))
    for phi in ([1.0, 2.0, 3.0], [-50.0, 80.0, 0.0], [0.5, -0.5, 4.0]):
        state = state.set_potential(torch.tensor(phi, dtype=torch.float64))
    assert state.log_w.tolist() == pytest.approx([0.5, -0.5, 4.0], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "m"),
    [(s, m) for s in sorted(SCHEMES) for m in (5, 1, 3, 12) if s != "killing" or m == 5],
)
def test_resampling_by_the_weights_keeps_the_normaliser_exactly(name: str, m: int) -> None:
    before = weighted(LOG_W)
    for i in range(10):
        after, _ = resample(before, SCHEMES[name], key(i), m=m)
        assert len(after) == m
        assert log_mean_exp(after.log_w) == pytest.approx(log_mean_exp(LOG_W), abs=1e-12)
        assert float((after.log_w - after.log_w[0]).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["multinomial", "ssp", "systematic"])
@pytest.mark.parametrize("m", [5, 3, 11])
def test_any_resampling_probabilities_are_unbiased(name: str, m: int) -> None:
    """E[mean exp(log_w) f(x)] is the same before and after, for f = 1 and f = x."""
    log_w = torch.tensor([0.3, -1.2, 2.0, -0.7, 1.1], dtype=torch.float64)
    before = weighted(log_w)
    p = torch.tensor([3.0, 1.0, 2.0, 2.0, 1.5], dtype=torch.float64)  # normalised by resample
    values = []
    for i in range(1500):
        drawn = Drawn(5, step=i)
        after, _ = resample(before, SCHEMES[name], drawn, m=m, probabilities=p)
        w = after.log_w.exp()
        values.append(torch.stack([w.mean(), (w * after.x[:, 0]).mean()]))
    found = torch.stack(values)
    w = log_w.exp()
    truth = torch.stack([w.mean(), (w * torch.arange(5.0).double()).mean()])
    error = found.std(0) / math.sqrt(len(found))
    # Measured over the nine cases: between 0.03 and 2.5 standard errors.
    assert bool(((found.mean(0) - truth).abs() < 5.0 * error).all())


def test_residual_weights_of_each_child() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    after, a = resample(weighted(LOG_W), systematic, key(), m=7, probabilities=p)
    assert torch.allclose(after.log_w, (LOG_W - torch.log(5 * p))[a], rtol=0, atol=1e-12)


def test_ess() -> None:
    assert ess(torch.zeros(7, dtype=torch.float64)) == pytest.approx(7.0)
    assert ess(torch.tensor([0.0, -1e4, -math.inf], dtype=torch.float64)) == pytest.approx(1.0)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert ess(torch.log(w)) == pytest.approx(36.0 / 14.0)
    assert ess(torch.log(w) + 1e5) == pytest.approx(36.0 / 14.0)


def test_normalise_and_log_mean_exp_at_extreme_scales() -> None:
    far = LOG_W + 1e4
    assert float(normalise(far).sum()) == pytest.approx(1.0)
    assert log_mean_exp(far) == pytest.approx(log_mean_exp(LOG_W) + 1e4)
    assert log_mean_exp(LOG_W.float()) == pytest.approx(log_mean_exp(LOG_W), rel=1e-6)


def test_one_particle_without_weight_is_fine() -> None:
    log_w = torch.tensor([-math.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    for name in SCHEMES:
        after, a = resample(weighted(log_w), SCHEMES[name], key())
        assert 0 not in a.tolist()
        assert log_mean_exp(after.log_w) == pytest.approx(math.log(3 / 4))


def test_a_particle_without_weight_stays_so_and_spoils_no_other() -> None:
    """-inf - (-inf) is NaN: a later, finite potential must not make one."""
    state = State.start(torch.zeros(3, 1))
    for phi in ([-math.inf, 1.0, 2.0], [-math.inf, 0.0, 1.0], [5.0, 0.5, -0.5]):
        state = state.set_potential(torch.tensor(phi, dtype=torch.float64))
    assert state.log_w.tolist() == [-math.inf, 0.5, -0.5]
    state, a = resample(state, systematic, key())
    state = state.set_potential(torch.ones(3))
    assert 0 not in a.tolist()
    assert bool(torch.isfinite(state.log_w).all())


@pytest.mark.parametrize(
    "act", [normalise, ess, lambda w: resample(weighted(w), systematic, key())]
)
def test_all_weights_zero_is_an_error(act) -> None:
    with pytest.raises(SteeringError, match="All 3 particles have weight zero"):
        act(torch.full((3,), -math.inf, dtype=torch.float64))


def test_equal_weights_are_all_effective() -> None:
    """However 1 / n is rounded: with a threshold of 1 they must not count as depleted."""
    assert all(ess(torch.full((n,), -0.3).double()) == n for n in range(1, 400))
    assert ess(torch.tensor([0.0, 1e-3]).double()) < 2.0

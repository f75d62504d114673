"""Named noise streams and the moves in noise space."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from steering.analytic import GaussianMixture
from steering.errors import OptionError
from steering.kernels.philox import philox
from steering.noise import (
    Ahead,
    NoiseKey,
    _philox_numpy,
    blend,
    categorical,
    crossover,
    eps_blend,
    normals,
    sphere_neighbour,
)

KEY = NoiseKey(7, "proposal", step=3, slot=5)


def errors(sample: torch.Tensor, expected: float) -> float:
    """Distance of a sample mean from its expectation, in measured standard errors."""
    flat = sample.double().flatten()
    return float((flat.mean() - expected).abs() / (flat.std() / math.sqrt(len(flat))))


def chi2_errors(x: torch.Tensor) -> tuple[float, float, float]:
    """How far coordinates and squared norms are from those of N(0, I): mean, var, var of norm."""
    d = x.shape[1]
    norm = x.double().square().sum(1)
    return errors(x, 0.0), errors(norm, d), errors((norm - d).square(), 2 * d)


@pytest.mark.parametrize(
    ("counter", "key", "out"),
    [
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], out: list[int]) -> None:
    """The vectors published with Salmon et al. 2011 (Random123, kat_vectors)."""
    words = philox(*(torch.tensor([c]) for c in counter), *key)
    assert [int(w) for w in words] == out
    words = _philox_numpy(*(np.array([c], np.uint32) for c in counter), *key)
    assert [int(w[0]) for w in words] == out


def test_both_forms_give_equal_words_on_wide_counters() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 7, 33), dtype=np.uint32)
    wide = philox(*(torch.from_numpy(c.astype(np.int64)) for c in counters), 11, 2**32 - 5)
    narrow = _philox_numpy(*counters, 11, 2**32 - 5)
    for a, b in zip(wide, narrow, strict=True):
        assert np.array_equal(a.numpy(), b.astype(np.int64))


@pytest.mark.parametrize("draw", [NoiseKey.normal, NoiseKey.uniform], ids=("normal", "uniform"))
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (3, 5, 7)])
def test_equal_bits_at_any_batch_size_and_order(draw, shape: tuple[int, ...]) -> None:
    batch = draw(KEY, 13, shape)
    assert batch.shape == (13, *shape)
    assert torch.equal(draw(KEY, list(range(13)), shape), batch)
    assert torch.equal(draw(KEY, [12, 0, 5], shape), batch[[12, 0, 5]])
    for i in (0, 6, 12):
        alone = draw(KEY.at(slot=KEY.slot + i), 1, shape)
        assert torch.equal(alone[0], batch[i])
    assert draw(KEY, 0, shape).shape == (0, *shape)


def test_a_wider_draw_begins_with_the_narrower_one() -> None:
    assert torch.equal(KEY.normal(3, (9,))[:, :5], KEY.normal(3, (5,)))
    assert torch.equal(KEY.uniform(3, (9,))[:, :5], KEY.uniform(3, (5,)))


@pytest.mark.parametrize(
    "other",
    [
        KEY.at(seed=8),
        KEY.at(stream="init"),
        KEY.at(step=4),
        KEY.at(slot=5 + 200),
        KEY.at(slot=5 + 2**32),
    ],
    ids=("seed", "stream", "step", "slot", "far slot"),
)
def test_differently_named_streams_are_independent(other: NoiseKey) -> None:
    a, b = KEY.normal(200, (500,)), other.normal(200, (500,))
    assert errors(a * b, 0.0) < 5
    assert errors(a.square() * b.square(), 1.0) < 5


def test_normal_and_uniform_of_one_key_are_independent() -> None:
    z, u = KEY.normal(100_000, (4,)).double(), KEY.uniform(100_000, (4,))
    for shift in range(4):
        moved = u.roll(shift, 1) - 0.5
        assert errors(z * moved, 0.0) < 5
        assert errors((z.square() - 1) * moved, 0.0) < 5
        assert errors(z * (moved.square() - 1 / 12), 0.0) < 5


def test_normal_numbers_are_normal() -> None:
    z = KEY.normal(1000, (1000,))
    assert z.dtype == torch.float32
    z = z.double()
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        assert errors(z**power, expected) < 5
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-5
    # Neighbouring slots, and the two halves of one Box-Muller pair.
    assert errors(z[1:] * z[:-1], 0.0) < 5
    assert errors(z[:, 1:] * z[:, :-1], 0.0) < 5
    assert errors(z[:, 0::2].square() * z[:, 1::2].square(), 1.0) < 5


def test_uniform_numbers_are_uniform_and_open() -> None:
    u = KEY.uniform(1000, (1000,))
    assert u.dtype == torch.float64
    assert 0.0 < float(u.min()) < 1e-5
    assert 1.0 - 1e-5 < float(u.max()) < 1.0
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-5
    # 52 random bits: low ones vary too.
    bits = (u * 2.0**52).long()
    assert errors((bits & 1).double(), 0.5) < 5


def test_generators_follow_the_name() -> None:
    def first(key: NoiseKey) -> float:
        return float(torch.rand(1, generator=key.generator()))

    assert first(KEY) == first(NoiseKey(7, "proposal", 3, 5))
    assert len({first(KEY.at(slot=i)) for i in range(20)}) == 20


def test_categorical_inverts_the_cumulative_sum() -> None:
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    u = torch.tensor([2.0**-53, 0.19, 0.21, 0.69, 0.71, 1 - 2.0**-53], dtype=torch.float64)
    assert categorical(p, u).tolist() == [1, 1, 3, 3, 4, 4]
    assert categorical(7.0 * p, u).tolist() == [1, 1, 3, 3, 4, 4]
    index = categorical(p, KEY.uniform(100_000))
    for k in range(6):
        hits = (index == k).double()
        assert errors(hits, float(p[k])) < 5 if p[k] > 0 else hits.sum() == 0


def test_blend_keeps_the_normal_law_and_frees_the_norm() -> None:
    x, z = (KEY.at(stream=s).normal(20_000, (64,)) for s in "xz")
    moved = blend(x, z, 0.3)
    assert max(chi2_errors(moved)) < 5
    assert errors(moved * x, math.sqrt(1 - 0.09)) < 5
    assert float((moved.norm(dim=1) - x.norm(dim=1)).std()) > 0.1
    # The check has teeth: adding noise without shrinking fails it.
    assert max(chi2_errors(x + 0.3 * z)) > 20


@pytest.mark.parametrize("cosine", [0.95, 0.5, -0.3])
def test_sphere_neighbours_keep_the_normal_law_and_each_norm(cosine: float) -> None:
    x, z = (KEY.at(stream=s).normal(20_000, (64,)).double() for s in "xz")
    moved = sphere_neighbour(x, z, cosine)
    torch.testing.assert_close(moved.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    angle = torch.nn.functional.cosine_similarity(moved, x)
    torch.testing.assert_close(angle, torch.full_like(angle, cosine), rtol=1e-12, atol=1e-12)
    assert max(chi2_errors(moved)) < 5
    assert errors(moved**4, 3.0) < 5


def test_sphere_neighbour_keeps_shape_and_dtype_and_needs_a_second_axis() -> None:
    x = KEY.normal(4, (2, 3, 3))
    moved = sphere_neighbour(x, KEY.at(step=9).normal(4, (2, 3, 3)), 0.9)
    assert moved.shape == x.shape
    assert moved.dtype == torch.float32
    with pytest.raises(OptionError, match="two dimensions"):
        sphere_neighbour(x[:, :1, 0, 0], x[:, :1, 0, 0], 0.9)


def test_crossover_takes_each_coordinate_from_one_parent() -> None:
    a, b = (KEY.at(stream=s).normal(20_000, (16,)) for s in "ab")
    mask = KEY.uniform(20_000, (16,)) < 0.3
    child = crossover(a, b, mask)
    assert bool(((child == a) | (child == b)).all())
    assert errors((child == a).double(), 0.3) < 5
    assert max(chi2_errors(child)) < 5


def test_eps_blend_refreshes_noise_and_nearly_keeps_the_level() -> None:
    model = GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.25, 0.4, 0.15])
    time, n = model.path.at(0.6), 100_000
    law = model.marginal(time)
    x = law.sample(n, KEY.generator())
    z = KEY.normal(n, (1,)).double()
    pred = model.predict(x, time)
    same = eps_blend(pred.x0, pred.eps, z, time.alpha, time.sigma, 0.0)
    torch.testing.assert_close(same, x, rtol=1e-12, atol=1e-12)

    def gap(y: torch.Tensor) -> float:
        ranks = law.cdf(y.flatten().sort().values)
        return float((ranks - torch.linspace(0, 1, n, dtype=torch.float64)).abs().max())

    moved = eps_blend(pred.x0, pred.eps, z, time.alpha, time.sigma, 0.5)
    assert float((moved - x).std()) > 0.1
    # Approximate by design, yet within the Kolmogorov bound at this n (p = 3e-6 at 2.6 / sqrt(n)),
    # where noise that is added, or blended with the whole state, is not.
    bound = 2.6 / math.sqrt(n)
    assert gap(moved) < bound
    assert gap(x + 0.5 * time.sigma * z) > 1.5 * bound
    assert gap(blend(x, z, 0.5)) > 1.5 * bound


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7)])
def test_many_streams_in_one_pass_give_the_numbers_of_each(shape: tuple[int, ...]) -> None:
    keys = [KEY, NoiseKey(9, "init", 0, 2**40 + 1), NoiseKey(-1, "proposal", 8, 0), KEY]
    assert torch.equal(normals(keys, shape), torch.cat([k.normal(1, shape) for k in keys]))
    assert normals([], shape).shape == (0, *shape)


def test_noise_drawn_ahead_is_the_noise_of_its_name() -> None:
    """Whatever was expected: in order, out of order, other slots, other streams, or twice."""
    ahead, shape = Ahead(), (2, 5)
    steps = [KEY.at(step=k, slot=0) for k in range(4)]
    ahead.expect(("proposal", k, slot) for k in range(4) for slot in (0, 2, 5))
    asked = [
        (steps[0], [0, 2]),
        (steps[2], [5, 0]),
        (steps[0].at(slot=5), 1),
        (steps[1], [0, 1, 2]),
        (steps[2], [5, 0]),
        (steps[3].at(stream="other"), 2),
    ]
    for key, slots in asked:
        assert torch.equal(ahead.normal(key, slots, shape), key.normal(slots, shape))
    ahead.expect([("proposal", 9, 9)])
    assert torch.equal(ahead.normal(steps[1], 3, shape), steps[1].normal(3, shape))


def test_what_is_expected_is_drawn_in_one_pass_within_bounds(monkeypatch) -> None:
    passes: list[int] = []

    def counted(keys, shape):
        passes.append(len(keys))
        return normals(keys, shape)

    monkeypatch.setattr("steering.noise.normals", counted)
    ahead = Ahead()
    ahead.expect(("proposal", step, slot) for step in range(6) for slot in range(2))
    for step in range(6):
        ahead.normal(NoiseKey(0, step=step), 2, (3,))
    assert passes == [12]
    ahead.expect(("proposal", step, 0) for step in range(6))
    for step in range(6):
        ahead.normal(NoiseKey(0, step=step), 1, (2**14,))
    assert passes == [12, 4, 2]
    ahead.expect(("proposal", step, 0) for step in range(6))
    ahead.normal(NoiseKey(0), 1, (2**17,))
    assert passes == [12, 4, 2]  # a large state is drawn when it is needed

"""Every resampling scheme: unbiased, within its bounds, safe at the edges of floating point."""

from __future__ import annotations

import math

import pytest
import torch

from steering.errors import OptionError
from steering.noise import NoiseKey
from steering.resampling import SCHEMES, scheme

DRAWS = 3000
W = torch.tensor([0.02, 0.4, 0.0, 0.11, 0.003, 0.217, 0.25, 0.0], dtype=torch.float64)
UNEQUAL = sorted(set(SCHEMES) - {"killing"})  # those that can change the number of particles
EVEN = ("killing", "ssp", "systematic")  # those that leave equal weights alone


NUMBERS = NoiseKey(11, "resample").uniform(DRAWS, (64,))


class Drawn(NoiseKey):
    """A key whose numbers were drawn beforehand, so that thousands of draws cost one call."""

    def uniform(self, slots, shape=(), *, device="cpu"):
        return NUMBERS[self.step, self.slot : self.slot + slots]


def key(i: int = 0) -> NoiseKey:
    return NoiseKey(11, "resample", i)


def counts(name: str, w: torch.Tensor, m: int, draws: int) -> torch.Tensor:
    """Offspring of every index in many draws, [draws, n]."""
    return torch.stack(
        [
            torch.bincount(SCHEMES[name](w, m, Drawn(11, step=i)), minlength=len(w))
            for i in range(draws)
        ]
    )


def cases() -> list[tuple[str, int]]:
    return [(name, len(W)) for name in sorted(SCHEMES)] + [
        (name, m) for name in UNEQUAL for m in (1, 3, 21)
    ]


@pytest.mark.parametrize(("name", "m"), cases())
def test_offspring_are_unbiased_and_bounded(name: str, m: int) -> None:
    found = counts(name, W, m, DRAWS).double()
    error = found.std(0) / math.sqrt(DRAWS)
    gap = (found.mean(0) - m * W).abs()
    # Largest of all cases: 2.7 standard errors (about 170 comparisons).
    assert bool((gap <= 5.0 * error + 1e-12).all()), (gap / error).tolist()
    low, high = torch.floor(m * W), torch.ceil(m * W)
    if name in ("systematic", "ssp"):
        assert bool(((found == low) | (found == high)).all())
    if name == "residual":  # its random part may send one index several children
        assert bool((found >= low).all())
    if name == "stratified":
        assert bool(((found >= low - 1) & (found <= high + 1)).all())
    assert int(found[:, W == 0].sum()) == 0


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_shape_dtype_range_and_repeatability(name: str) -> None:
    first, again = SCHEMES[name](W, 8, key()), SCHEMES[name](W, 8, key())
    assert first.dtype == torch.int64
    assert first.shape == (8,)
    assert 0 <= int(first.min()) <= int(first.max()) < 8
    assert torch.equal(first, again)
    assert any(not torch.equal(first, SCHEMES[name](W, 8, key(i))) for i in range(1, 9))


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("hot", [0, 3, 4])
def test_one_hot_weight_takes_every_child(name: str, hot: int) -> None:
    w = torch.zeros(5, dtype=torch.float64)
    w[hot] = 1.0
    for i in range(20):
        assert SCHEMES[name](w, 5, Drawn(11, step=i)).tolist() == [hot] * 5


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_equal_weights_change_nothing(name: str, n: int) -> None:
    w = torch.softmax(torch.full((n,), -312.7, dtype=torch.float64), 0)
    for i in range(3):
        assert torch.equal(SCHEMES[name](w, n, key(i)), torch.arange(n))


def test_equal_weights_under_multinomial_lose_a_third() -> None:
    """1 - (1 - 1/n)^n distinct parents: the reason why it is not the default."""
    w = torch.full((8,), 1 / 8, dtype=torch.float64)
    distinct = (counts("multinomial", w, 8, DRAWS) > 0).double().sum(1) / 8
    expected = 1 - (1 - 1 / 8) ** 8
    error = float(distinct.std()) / math.sqrt(DRAWS)
    assert abs(float(distinct.mean()) - expected) < 5 * error  # measured 2.5


def test_killing_keeps_the_number_of_particles() -> None:
    with pytest.raises(OptionError, match="asked for 5 of 8"):
        SCHEMES["killing"](W, 5, key())


def test_killing_replaces_only_what_it_kills() -> None:
    w = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    for i in range(50):
        found = SCHEMES["killing"](w, 4, Drawn(11, step=i)).tolist()
        assert found[:2] == [0, 1]
        assert set(found[2:]) <= {0, 1}


TAILS = {
    "tiny tails": [1e-17] * 50 + [1.0] + [1e-17] * 50,
    "tiny then zero": [0.5, 0.5, 1e-17, 0.0],
    "zero first": [0.0, 0.0, 1e-300, 1.0],
    "denormal": [5e-324, 1.0, 5e-324],
    "thirds": [1 / 3, 1 / 3, 1 / 3, 0.0],
    "an ulp below a whole number": [0.1] * 10 + [0.0],
}


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("case", sorted(TAILS))
def test_weights_at_the_edge_of_precision(name: str, case: str) -> None:
    w = torch.tensor(TAILS[case], dtype=torch.float64)
    w = w / w.sum()
    n = len(w)
    for i in range(10):
        found = SCHEMES[name](w, n, key(i))
        assert found.shape == (n,)
        assert 0 <= int(found.min()) <= int(found.max()) < n
        assert bool((w[found] > 0).all())


@pytest.mark.parametrize("name", UNEQUAL)
def test_points_that_round_to_one_stay_in_range(name: str) -> None:
    """(m - 1 + u) / m is 1 in float64 for u near 1; the last index has weight zero here."""

    class Edge(NoiseKey):
        def uniform(self, slots, shape=(), *, device="cpu"):
            n = slots if isinstance(slots, int) else len(slots)
            return torch.full((n, *shape), 1.0 - 2.0**-53, dtype=torch.float64)

    w = torch.tensor([0.3, 0.3, 0.4, 0.0], dtype=torch.float64)
    for m in (4, 1000):
        found = SCHEMES[name](w, m, Edge(0))
        assert len(found) == m
        assert int(found.max()) <= 2


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_many_particles(name: str) -> None:
    n = 20_000 if name == "ssp" else 200_000  # ssp walks the particles one by one
    w = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[::7] = 0.0
    w = w / w.sum()
    found = SCHEMES[name](w, n, key())
    children = torch.bincount(found, minlength=n)
    assert len(found) == n
    assert int(children[::7].sum()) == 0
    if name in ("ssp", "systematic"):
        assert bool(((children - n * w).abs() < 1.0 + 1e-9).all())


@pytest.mark.parametrize("name", sorted(set(SCHEMES) - {"multinomial"}))
def test_no_scheme_is_noisier_than_multinomial(name: str) -> None:
    """Variance of the resampled mean of a smooth integrand, sorted as particles seldom are."""
    n = 32
    x = torch.linspace(-2.0, 2.0, n, dtype=torch.float64)
    w = torch.softmax(0.5 * x, 0)
    means = [(counts(k, w, n, 1000).double() @ x / n).var() for k in (name, "multinomial")]
    # Measured shares of the multinomial variance: stratified 0.003, ssp 0.009, systematic 0.05,
    # residual 0.49, killing 0.76.
    assert float(means[0]) < 0.95 * float(means[1])


def test_systematic_moves_all_particles_with_one_number() -> None:
    """Points lie exactly 1/m apart, so gaps between children are fixed."""
    w = torch.full((4,), 0.25, dtype=torch.float64)
    for i in range(20):
        assert torch.bincount(SCHEMES["systematic"](w, 12, key(i))).tolist() == [3, 3, 3, 3]


def test_ssp_indices_compete() -> None:
    """Counts of two indices are never positively correlated (negative association)."""
    w = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    found = counts("ssp", w, 2, DRAWS).double()
    covariance = torch.cov(found.T)
    off = covariance[~torch.eye(4, dtype=torch.bool)]
    assert float(off.max()) < 0.0  # measured between -0.16 and -0.03, standard error 0.004


def test_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'systematic'"):
        scheme("sistematic")

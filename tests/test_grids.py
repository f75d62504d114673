"""Time grids: shapes, ends, published numbers, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steering.errors import OptionError
from steering.grids import (
    SHAPES,
    Grid,
    karras,
    on_path,
    rbf,
    same_log_snr,
    shifted,
    starting_at,
    sway,
    uniform,
)
from steering.paths import VE, VP, Cosine, Linear
from steering.samplers.base import checkpoint_steps


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_every_shape_falls_to_data_in_n_steps(name: str, n: int) -> None:
    ts = SHAPES[name](n)
    assert len(ts) == n + 1
    assert ts[-1] == 0.0
    assert ts[0] == (1.0 if name != "karras" else pytest.approx(80 / 81))
    assert all(a > b for a, b in itertools.pairwise(ts))
    grid = on_path(Linear(), ts)
    assert len(grid) == n
    assert [t.end for t in grid.times] == [False] * n + [True]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [0, -1])
def test_a_grid_needs_a_step(name: str, n: int) -> None:
    with pytest.raises(OptionError, match="at least one step"):
        SHAPES[name](n)


def test_karras_numbers() -> None:
    known = [0.988, 0.979, 0.961, 0.927, 0.858, 0.725, 0.508, 0.259, 0.088, 0.020]
    assert [round(t, 3) for t in karras(10)[:-1]] == known
    # The defining property: equal steps in sigma^(1/rho).
    roots = torch.tensor([(t / (1 - t)) ** (1 / 7) for t in karras(10)[:-1]], dtype=torch.float64)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(9))


def test_karras_refuses_levels_in_the_wrong_order() -> None:
    with pytest.raises(OptionError, match="sigma_min < sigma_max"):
        karras(4, sigma_min=2.0, sigma_max=1.0)


def test_shift_multiplies_the_odds() -> None:
    for base, moved in zip(uniform(9)[1:-1], shifted(9, 3.0)[1:-1], strict=True):
        assert moved / (1 - moved) == pytest.approx(3.0 * base / (1 - base), rel=1e-12)
        drop = Linear().at(base).log_snr - Linear().at(moved).log_snr
        assert drop == pytest.approx(math.log(3.0), abs=1e-12)
    assert shifted(9, 1.0) == pytest.approx(uniform(9), abs=1e-15)
    with pytest.raises(OptionError, match="positive"):
        shifted(9, 0.0)


def test_sway_is_a_cosine_at_minus_one_and_the_identity_at_zero() -> None:
    assert sway(8, 0.0) == pytest.approx(uniform(8), abs=1e-15)
    cosine = [math.cos(0.5 * math.pi * k / 8) for k in range(9)]
    assert sway(8, -1.0) == pytest.approx(cosine, abs=1e-15)


def test_sway_is_monotone_exactly_within_its_limits() -> None:
    high = 2.0 / (math.pi - 2.0)
    for coefficient in (-1.0, high):
        ts = sway(1000, coefficient)
        assert all(a > b for a, b in itertools.pairwise(ts))
    for coefficient in (-1.0001, high + 1e-4):
        with pytest.raises(OptionError, match="monotone"):
            sway(10, coefficient)
        raw = [
            u + coefficient * (math.cos(0.5 * math.pi * u) - 1 + u)
            for u in torch.linspace(0, 1, 20001, dtype=torch.float64).tolist()
        ]
        assert not all(a < b for a, b in itertools.pairwise(raw))


def test_rbf_grid() -> None:
    assert rbf(10)[:3] == pytest.approx([1.0, math.sqrt(0.99), math.sqrt(0.96)])


@pytest.mark.parametrize("target", [VP(), VE(), Cosine()], ids=("vp", "ve", "cosine"))
def test_same_log_snr_visits_the_same_levels(target) -> None:
    ts = [0.98, *uniform(10)[1:]]
    moved = on_path(target, same_log_snr(ts, Linear(), target))
    for a, b in zip(on_path(Linear(), ts).times[:-1], moved.times[:-1], strict=True):
        assert b.log_snr == pytest.approx(a.log_snr, abs=1e-9)
    back = same_log_snr([t.t for t in moved.times], target, Linear())
    assert back == pytest.approx(ts, abs=1e-9)


def test_same_log_snr_keeps_the_ends() -> None:
    moved = same_log_snr([1.0, 0.5, 0.0], Linear(), VP())
    assert (moved[0], moved[-1]) == (1.0, 0.0)
    assert VP().at(moved[1]).log_snr == pytest.approx(0.0, abs=1e-12)


def test_steps_pair_neighbours() -> None:
    grid = on_path(Linear(), uniform(3))
    assert [(round(t.t, 3), round(u.t, 3)) for t, u in grid.steps()] == [
        (1.0, 0.667),
        (0.667, 0.333),
        (0.333, 0.0),
    ]


def test_places_on_a_grid() -> None:
    grid = on_path(Linear(), uniform(10))
    assert [grid.nearest(f) for f in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)] == [0, 0, 3, 5, 10, 10]
    assert grid.times[grid.index_of_sigma(0.55)].t == pytest.approx(0.5)
    assert grid.index_of_sigma(1.0) == 0
    assert grid.index_of_sigma(0.0) == 10
    # A share of the noise is path-free: VE levels compare like linear ones.
    exploding = on_path(VE(), same_log_snr([0.98, 0.7, 0.5, 0.2, 0.0], Linear(), VE()))
    assert exploding.index_of_sigma(0.6) == 2


@pytest.mark.parametrize(
    "ts", [[], [0.0], [1.0, 0.5], [0.5, 0.7, 0.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.5, 0.0]]
)
def test_bad_times_are_refused(ts: list[float]) -> None:
    with pytest.raises(OptionError):
        on_path(Linear(), ts)


def test_a_grid_says_which_node_is_wrong() -> None:
    times = tuple(Linear().at(t) for t in (1.0, 0.5, 0.75, 0.0))
    with pytest.raises(OptionError, match=r"node 2 \(t=0.75\)"):
        Grid(times)
    with pytest.raises(OptionError, match="at least 2"):
        Grid(times[:1])


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_shape_starts_where_the_noise_fits(shape: str) -> None:
    """img2img starts late, and VE noise has the size of its own first level."""
    for path in (Linear(), VP(), VE(14.6)):
        first = path.at(0.6)
        grid = starting_at(first, path, shape, 5)
        assert grid.times[0] is first
        assert len(grid) == 5
        assert (grid.times[-1].t, grid.times[-1].end) == (0.0, True)
    if shape != "karras":
        whole = starting_at(Linear().at(1.0), Linear(), shape, 5)
        assert whole == on_path(Linear(), SHAPES[shape](5))


def test_karras_levels_are_the_same_on_every_path() -> None:
    ratios = []
    for path in (Linear(), VP(), VE(14.6)):
        first = path.at(same_log_snr([10 / 11], Linear(), path)[0])
        grid = starting_at(first, path, "karras", 6)
        ratios.append([t.sigma / t.alpha for t in grid.times[:-1]])
    known = [t / (1 - t) for t in karras(6, sigma_max=10.0)[:-1]]
    for found in ratios:
        assert found == pytest.approx(known, rel=1e-6)


def test_a_node_is_found_by_its_own_share_however_it_was_rounded():
    for n in range(2, 60):
        grid = on_path(Linear(), uniform(n))
        for i in range(1, n):
            assert grid.index_of_sigma((n - i) / n) == i


@pytest.mark.parametrize(
    ("times", "quiet"),
    [
        ((1.0, 0.0), 0),
        ((1.0, 0.5, 0.0), 1),
        ((1.0, 0.001, 0.0), 0),
        ((1.0, 0.667, 0.334, 0.001, 0.0), 2),  # SD3's own, four steps
        ((1.0, 0.75, 0.5, 0.25, 0.0), 3),
        ((1.0, 0.03, 0.02, 0.01, 0.0), 2),  # finely spaced: only what comes last
    ],
)
def test_the_quiet_steps_of_a_grid(times, quiet):
    grid = on_path(Linear(), times)
    assert grid.quiet == quiet
    assert checkpoint_steps(grid, [i / len(grid) for i in range(len(grid))]) == list(range(quiet))

"""Which noise levels rollover budget forcing searches, and that each of them adds noise."""

from __future__ import annotations

import math

import pytest

from steering.analytic import GaussianMixture
from steering.errors import OptionError
from steering.grids import Grid, karras, on_path, shifted, sway, uniform
from steering.paths import VE, VP, Linear, Path
from steering.samplers import RBF
from steering.samplers.rbf_levels import time_on
from tests.search_world import BOWL, plan_of, plane, steer

PATHS = {"linear": Linear(), "vp": VP(), "ve": VE(100.0)}


def model_of(path: Path, grid: Grid | None = None) -> GaussianMixture:
    means = [[-1.0, 0.5], [1.0, 0.0]]
    return GaussianMixture([0.5, 0.5], means, [0.4, 0.6], path=path, grid=grid, steps=7)


def ratios(grid: Grid) -> list[float]:
    """sigma / alpha of the nodes below the first."""
    return [time.sigma / time.alpha for time in grid.times[1:]]


@pytest.mark.parametrize("path", ["vp", "linear", "own"])
@pytest.mark.parametrize("world", sorted(PATHS))
def test_karras_levels_are_those_of_karras_on_every_path(world: str, path: str) -> None:
    """Karras et al. (2022), equation 5: roots of sigma / alpha fall in equal steps."""
    model = model_of(PATHS[world])
    grid = RBF(grid="karras", steps=9, path=path, finish="none", last_level=7).levels(model)
    top = min(80.0, math.exp(-model.grid().times[0].log_snr))
    roots = [top ** (1 / 7) + k / 8 * (0.02 ** (1 / 7) - top ** (1 / 7)) for k in range(1, 9)]
    assert grid.times[0] == model.grid().times[0]
    assert ratios(grid)[:-1] == pytest.approx([r**7 for r in roots], rel=1e-6)
    assert ratios(grid)[:-1] == pytest.approx(
        [t / (1 - t) for t in karras(9, sigma_max=top)[1:-1]], rel=1e-6
    )


def test_karras_levels_of_a_late_start_lie_below_it() -> None:
    """Image to image: its first level is the largest sigma, as everywhere else."""
    model = model_of(Linear(), on_path(Linear(), [0.6, 0.3, 0.0]))
    grid = RBF(grid="karras", steps=6, finish="none", last_level=4).levels(model)
    expected = [t / (1 - t) for t in karras(6, sigma_max=1.5)[1:-1]]
    assert ratios(grid)[:-1] == pytest.approx(expected, rel=1e-6)


SHAPES = {"uniform": uniform, "shifted": shifted, "sway": sway}


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("path", ["vp", "linear"])
@pytest.mark.parametrize("world", sorted(PATHS))
def test_other_shapes_live_in_the_time_of_the_path_of_the_search(world, path, shape) -> None:
    model, clock = model_of(PATHS[world]), PATHS[path]
    grid = RBF(grid=shape, steps=6, path=path, finish="none").levels(model)
    start = time_on(clock, model.grid().times[0].log_snr)
    found = [time_on(clock, time.log_snr) for time in grid.times[1:-1]]
    assert found == pytest.approx([start * t for t in SHAPES[shape](6)[1:-1]], abs=1e-9)


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"grid": "karras"}, 7),  # its last step goes from 0.02 to data, the one before to 0.02
        ({"grid": "uniform", "steps": 51, "path": "linear"}, 48),  # ... 2 / 51, 1 / 51, 0
        ({"grid": "uniform"}, 8),
        ({"level_times": (1.0, 0.5, 0.1, 0.001, 0.0), "path": "linear"}, 1),
        ({"grid": "karras", "last_level": 8}, 8),  # who asks for it gets it
    ],
    ids=str,
)
def test_levels_that_add_a_trace_of_noise_are_not_searched(options: dict, last: int) -> None:
    method = RBF(**options)
    grid = method.levels(plane())
    assert method.last(grid) == last
    if "last_level" not in options:
        u = grid.times[last + 1]
        assert u.sigma > 0.02 * (u.alpha + u.sigma)


# --- noise at every level -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({"eta": 0.0, "eta_end": 1.0}, 0),
        ({"eta": 0.005, "eta_end": 0.005}, 0),
        ({"eta": 0.22, "eta_end": 0.0, "path": "linear", "steps": 100}, 96),
    ],
    ids=str,
)
def test_a_level_without_noise_is_refused_at_once(options: dict, level: int) -> None:
    """A schedule can be stochastic as a whole and silent where its proposals are made."""
    model = plane()
    with pytest.raises(OptionError, match=f"level {level} .*all proposals .*(eta|last_level)"):
        steer(model, BOWL, RBF(n_proposals=240, n_init=2, n_chains=1, **options))
    assert model.rows == 0


@pytest.mark.parametrize(
    "options", [{"eta": 0.1, "eta_end": 1.0}, {"eta": 1.0, "eta_end": 0.0}], ids=str
)
def test_schedules_with_noise_at_every_level_are_searched(options: dict) -> None:
    method, model = RBF(n_proposals=18, n_init=2, n_chains=1, **options), plane()
    result = steer(model, BOWL, method)
    grid = plan_of(model, method).grid
    for level in range(9):
        rewards = {e["reward"] for e in result.trace.events if e.get("level") == level}
        used = [e["used"] for e in result.trace.events if e.get("level") == level]
        assert len(rewards) == used[-1], grid.times[level]

"""A model in exploding coordinates (Euler schedulers) is steered as on the linear path.

With equal signal-to-noise ratios, states differ by a factor and estimates not at all.
"""

from __future__ import annotations

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, QuadraticReward
from steering.grids import on_path, same_log_snr
from steering.method import Method
from steering.paths import VE, Linear, Path
from steering.samplers import CARINOX, DNO, Guidance, ReNO

BOWL = QuadraticReward([1.0, -1.0])
TIMES = [0.999, 0.75, 0.5, 0.25, 0.0]


def two(path: Path) -> GaussianMixture:
    grid = on_path(path, same_log_snr(TIMES, Linear(), path))
    means = [[-1.0, 0.5], [1.5, -1.0]]
    return GaussianMixture([0.5, 0.5], means, [0.5, 0.4], path=path, grid=grid)


def samples(path: Path, method: Method) -> torch.Tensor:
    return steering.steer(two(path), reward=BOWL, method=method, seed=3).samples


METHODS = {
    "reno": ReNO(n_iterations=4, restarts=2, reg_weight=0.5, clip=1.0),
    "dno": DNO(n_iterations=4, reg_weight=0.0),
    "dno-hybrid": DNO(n_iterations=3, estimator="hybrid", reg_weight=0.0),
    "carinox": CARINOX(n_iterations=3, restarts=2, reg_weight=0.5),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_noise_is_optimised_as_noise(name: str) -> None:
    exploding, linear = (samples(path, METHODS[name]) for path in (VE(2000.0), Linear()))
    torch.testing.assert_close(exploding, linear, rtol=0, atol=5e-3)


@pytest.mark.parametrize("space", ["score", "state"])
@pytest.mark.parametrize("normalise", ["none", "value", "unit"])
def test_guidance_leans_equally_far(space: str, normalise: str) -> None:
    method = Guidance(n_particles=3, rho=0.2, mu=0.1, space=space, normalise=normalise, eta=0.5)
    exploding, linear = (samples(path, method) for path in (VE(2000.0), Linear()))
    torch.testing.assert_close(exploding, linear, rtol=0, atol=5e-3)


@pytest.mark.parametrize("schedule", ["increase", "decrease"])
def test_a_single_step_has_a_schedule_too(schedule: str) -> None:
    model = GaussianMixture([1.0], [[0.0, 0.0]], [1.0], steps=1)
    method = Guidance(schedule=schedule, mu=0.1)
    assert torch.isfinite(steering.steer(model, reward=BOWL, method=method).samples).all()

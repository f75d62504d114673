"""A model in exploding coordinates (Euler schedulers) is steered as on the linear path.

With equal signal-to-noise ratios, states differ by a factor and estimates not at all.
"""

from __future__ import annotations

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, QuadraticReward
from steering.errors import OptionError
from steering.grids import on_path, same_log_snr
from steering.method import Method
from steering.paths import VE, Linear, Path
from steering.samplers import CARINOX, DNO, FK, Auto, BestOfN, Guidance, ParticleGibbs, ReNO
from steering.transitions import EtaKernel

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


def test_gradients_are_clipped_equally() -> None:
    """In both coordinates to less than they measure."""
    free, held = (Guidance(n_particles=3, clip_norm=c, eta=0.5) for c in (None, 0.1))
    exploding, linear = (samples(path, held) for path in (VE(2000.0), Linear()))
    torch.testing.assert_close(exploding, linear, rtol=0, atol=5e-3)
    assert (samples(Linear(), free) - linear).abs().max() > 0.05


@pytest.mark.parametrize("schedule", ["increase", "decrease"])
def test_a_single_step_has_a_schedule_too(schedule: str) -> None:
    model = GaussianMixture([1.0], [[0.0, 0.0]], [1.0], steps=1)
    method = Guidance(schedule=schedule, mu=0.1)
    assert torch.isfinite(steering.steer(model, reward=BOWL, method=method).samples).all()


def test_an_eta_schedule_goes_from_noise_to_data_by_the_noise_share() -> None:
    kernel = BestOfN(eta=0.9, eta_end=0.1).kernel()
    for path in (Linear(), VE(2000.0)):
        model = two(path)
        x = torch.zeros(1, 2).double()
        for t, u in model.grid().steps():
            share = t.sigma / (t.alpha + t.sigma)
            prediction = model.posterior(x, t)
            step = kernel(x, prediction, t, u, path)
            plain = EtaKernel(eta=0.1 + 0.8 * share)(x, prediction, t, u, path)
            assert step.std == pytest.approx(plain.std, rel=1e-12)
            torch.testing.assert_close(step.mean, plain.mean)
            assert kernel.weights(t, u, path).std == step.std
    method = FK(n_particles=4, reward_scale=1.0, eta=0.9, eta_end=0.1)
    exploding, linear = (samples(path, method) for path in (VE(2000.0), Linear()))
    torch.testing.assert_close(exploding, linear, rtol=0, atol=5e-3)


def test_an_eta_schedule_that_starts_or_ends_at_zero() -> None:
    """Steps without noise have no density, and nobody asks for it."""
    for ends in ({"eta": 0.0, "eta_end": 1.0}, {"eta": 1.0, "eta_end": 0.0}):
        sweeps = {"n_particles": 3, "iterations": 2, "checkpoints": (0.0, 0.5)}
        for method in (
            ParticleGibbs(resample="always", **sweeps, **ends),
            Auto(n=6, pilot=3, **ends),
        ):
            model = GaussianMixture([1.0], [[0.0, 0.0]], [1.0], steps=4)  # from pure noise on
            result = steering.steer(model, reward=BOWL, method=method)
            assert torch.isfinite(result.samples).all()
    with pytest.raises(OptionError, match="eta=0 adds none"):
        DNO(eta=0.0, eta_end=1.0)
    with pytest.raises(OptionError, match="eta_end belongs to"):
        FK(transition="rbf", eta_end=0.5)
    with pytest.raises(OptionError, match=r"eta must lie in \[0, 1\]"):
        FK(eta_end=1.5)
    with pytest.raises(OptionError, match="eta=0 makes the sampler deterministic"):
        FK(eta=0.0, eta_end=0.0)

"""The exact mixtures against quadrature and Monte Carlo: posteriors, kernels, tilted laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steering.analytic import ExactReverse, GaussianMixture, LinearReward, QuadraticReward
from steering.errors import OptionError, SteeringError
from steering.grids import on_path, uniform
from steering.model import Model
from steering.noise import NoiseKey
from steering.paths import VE, VP, Cosine, Linear, Path, Prediction
from steering.transitions import EtaKernel
from tests.sample_means import BOUND, errors

PATHS = {"linear": Linear(), "vp": VP(), "cosine": Cosine(), "ve": VE()}
LINE = torch.linspace(-9.0, 9.0, 6001, dtype=torch.float64)
REWARDS = {
    "linear": LinearReward(0.8, -0.3),
    "quadratic": QuadraticReward(1.2, 0.9),
    "repelling": QuadraticReward(0.0, -0.7),
}
over_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
over_rewards = pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)


def one_d(path: Path = PATHS["linear"], **options) -> GaussianMixture:
    return GaussianMixture(
        [0.6, 0.3, 0.1], [-2.0, 0.5, 3.0], [0.5, 0.4, 0.4], path=path, **options
    )


def three_d(**options) -> GaussianMixture:
    means = [[-1.0, 0.5, 0.0], [1.0, 1.0, -2.0]]
    return GaussianMixture([0.4, 0.6], means, [0.6, 0.9], **options)


def density(model: GaussianMixture) -> torch.Tensor:
    """The data density on LINE, from torch.distributions."""
    parts = torch.distributions.Normal(model.means[:, 0], model.stds)
    mix = torch.distributions.Categorical(model.weights)
    return torch.distributions.MixtureSameFamily(mix, parts).log_prob(LINE).exp()


def integral(f: torch.Tensor) -> torch.Tensor:
    return torch.trapezoid(f, LINE)


# --- the mixture as a model ---


def test_it_is_a_model() -> None:
    model = one_d(steps=7, prompts=("a", "b"))
    assert isinstance(model, Model)
    assert (len(model.grid()), model.costs()) == (7, (1,) * 7)
    x = model.noise(6, NoiseKey(0, "init"), cond=1)
    assert (x.shape, x.dtype) == ((6, 1), torch.float64)
    assert model.rows == 0
    model.predict(x, model.grid().times[0], cond=[0, 1, 0, 1, 0, 1])
    model.predict(x[:2], model.grid().times[0])
    assert model.rows == 8
    assert model.decode(x) is x
    assert model.transition is None
    assert isinstance(one_d(kernel="exact").transition, ExactReverse)


def test_uniform_grid_by_default() -> None:
    assert [t.t for t in one_d(steps=4).grid().times] == uniform(4)


@over_paths
@pytest.mark.parametrize("t", [0.1, 0.45, 0.9])
def test_posterior_against_quadrature(path: Path, t: float) -> None:
    """Bayes' rule on a line of x0: p(x0 | x_t) ~ p(x0) N(x_t; alpha x0, sigma^2)."""
    model, time = one_d(path), path.at(t)
    x = time.alpha * torch.tensor([-2.5, 0.3, 2.0], dtype=torch.float64) + 0.4 * time.sigma
    noise = torch.distributions.Normal(time.alpha * LINE, time.sigma)
    joint = density(model) * noise.log_prob(x[:, None]).exp()
    mass = integral(joint)
    mean = integral(joint * LINE) / mass
    spread = integral(joint * LINE**2) / mass - mean**2
    pred = model.predict(x[:, None], time)
    torch.testing.assert_close(model.log_prob(x[:, None], time), mass.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(pred.mean[:, 0], mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(pred.spread, spread, rtol=0, atol=1e-8)
    back = time.alpha * pred.x0 + time.sigma * pred.eps
    torch.testing.assert_close(back[:, 0], x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred.responsibilities.sum(1), torch.ones(3, dtype=torch.float64))


def test_both_ends_are_exact() -> None:
    model, x = three_d(), NoiseKey(0).normal(5, (3,)).double()
    noise = model.predict(x, model.path.at(1.0))
    prior = model.weights @ model.means
    torch.testing.assert_close(noise.x0, prior.expand(5, 3))
    torch.testing.assert_close(noise.eps, x)
    clean = model.predict(x, model.path.at(0.0))
    torch.testing.assert_close(clean.x0, x)
    assert float(clean.eps.abs().max()) == 0.0
    assert float(clean.spread.abs().max()) < 1e-12


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_score_and_density_in_three_dimensions(t: float) -> None:
    model = three_d()
    time = model.path.at(t)
    x = NoiseKey(0).normal(5, (3,)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x, time).sum(), x)
    torch.testing.assert_close(model.score(x, time), gradient)
    if t > 0:
        torch.testing.assert_close(model.predict(x, time).score(time), gradient)
    law = model.marginal(time)
    parts = [
        torch.distributions.MultivariateNormal(m, s**2 * torch.eye(3, dtype=torch.float64))
        for m, s in zip(law.means, law.stds, strict=True)
    ]
    logs = torch.stack([p.log_prob(x) for p in parts], 1) + law.weights.log()
    torch.testing.assert_close(model.log_prob(x, time), logs.logsumexp(1))


def test_gradients_flow_through_predictions_only_when_asked() -> None:
    model = three_d()
    time = model.path.at(0.4)
    x = NoiseKey(0).normal(3, (3,)).double().requires_grad_()
    assert not model.predict(x, time).x0.requires_grad

    def outputs(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pred = model.predict(y, time, grad=True)
        return pred.x0, pred.eps, pred.spread, model.value(y, time, QuadraticReward([0.0] * 3))

    assert torch.autograd.gradcheck(outputs, (x,))


def test_rows_at_mixed_times_are_as_alone() -> None:
    model = three_d()
    times = [model.path.at(t) for t in (1.0, 0.6, 0.2)]
    x = NoiseKey(0).normal(3, (3,)).double()
    mixed = model.predict(x, times)
    alone = Prediction.cat([model.predict(x[i : i + 1], times[i]) for i in range(3)])
    for name in ("x0", "eps", "log_resp", "means", "variances"):
        torch.testing.assert_close(getattr(mixed, name), getattr(alone, name))


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_draws_follow_the_posterior(t: float) -> None:
    model, m = three_d(), 40_000
    time = model.path.at(t)
    x = torch.tensor([[0.1, 0.4, -0.6], [0.3, 0.2, -0.2]], dtype=torch.float64)
    pred = model.predict(x, time)
    draws = pred.draw(m, NoiseKey(0, "draw"))
    assert draws.shape == (m, 2, 3)
    for i in range(2):
        for d in range(3):
            assert errors(draws[:, i, d], float(pred.x0[i, d])) < BOUND
        gap = (draws[:, i] - pred.x0[i]).square().sum(1)
        assert errors(gap, float(pred.spread[i])) < BOUND
        reward = LinearReward([0.5, -1.0, 0.2], 0.1)
        value = model.value(x, time, reward)[i]
        assert errors(reward(draws[:, i]).exp(), float(value.exp())) < BOUND


def test_draws_do_not_depend_on_the_batch() -> None:
    model = three_d()
    x, key = NoiseKey(0).normal(6, (3,)).double(), NoiseKey(0, "draw", 2, 10)
    pred = model.predict(x, model.path.at(0.5))
    whole = pred.draw(4, key)
    part = pred.rows(slice(2, 5)).draw(4, key.at(slot=12))
    assert torch.equal(part, whole[:, 2:5])


def test_mode_is_the_likeliest_component() -> None:
    model = one_d()
    pred = model.predict(torch.tensor([[-1.0], [2.0]], dtype=torch.float64), model.path.at(0.3))
    best = pred.log_resp.argmax(1)
    assert best.tolist() == [0, 2]
    assert torch.equal(pred.mode[:, 0], pred.means[[0, 1], best, 0])


def test_samples_and_moments() -> None:
    model = three_d()
    x = model.sample(50_000, torch.Generator().manual_seed(0))
    mean, cov = model.moments()
    for i, j in itertools.product(range(3), repeat=2):
        assert errors(x[:, i], float(mean[i])) < BOUND
        pair = (x[:, i] - mean[i]) * (x[:, j] - mean[j])
        assert errors(pair, float(cov[i, j])) < BOUND
    flat = model.project([0.5, -1.0, 2.0], 0.3)
    values = LinearReward([0.5, -1.0, 2.0], 0.3)(x)
    assert flat.deviation(values) < BOUND
    assert flat.deviation(values + 0.2) > 2 * BOUND


def test_expected_maximum() -> None:
    normal = GaussianMixture([1.0], [0.0], [1.0])
    for n, wanted in ((1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))):
        assert normal.expected_max(n) == pytest.approx(wanted, abs=1e-9)
    model = one_d()
    draws = model.sample(16 * 20_000, torch.Generator().manual_seed(0)).reshape(20_000, 16)
    assert errors(draws.amax(1), model.expected_max(16)) < BOUND


def test_weighted_deviation_sees_weights() -> None:
    base = one_d()
    target = base.tilted(LinearReward(0.5))
    x = base.sample(50_000, torch.Generator().manual_seed(0))
    assert target.deviation(x, (0.5 * x[:, 0]).exp()) < BOUND
    assert target.deviation(x) > 10 * BOUND


@pytest.mark.parametrize(
    ("weights", "means", "stds", "match"),
    [
        ([1.0], [[0.0], [1.0]], [1.0], "shapes"),
        ([0.5, -0.5], [0.0, 1.0], [1.0, 1.0], "negative"),
        ([0.5, 0.5], [0.0, 1.0], [1.0, 0.0], "positive"),
    ],
)
def test_bad_mixtures_are_refused(weights, means, stds, match) -> None:
    with pytest.raises(OptionError, match=match):
        GaussianMixture(weights, means, stds)


# --- the exact reverse kernel ---


@over_paths
def test_noise_has_the_law_of_the_first_level(path: Path) -> None:
    for t in (1.0, 0.6):
        model = one_d(path, grid=on_path(path, [t, 0.0]))
        start = model.noise(20_000, NoiseKey(0, "init"))
        assert model.marginal(path.at(t)).deviation(start) < BOUND
    pure = one_d().noise(3, NoiseKey(0, "init"))
    assert torch.equal(pure, NoiseKey(0, "init").normal(3, (1,)).double())


@over_paths
def test_exact_kernel_keeps_the_marginals_in_few_steps(path: Path) -> None:
    model = one_d(path, kernel="exact", grid=on_path(path, [1.0, 0.7, 0.4, 0.15, 0.0]))
    n = 50_000
    x = model.noise(n, NoiseKey(0, "init"))
    assert model.marginal(model.grid().times[0]).deviation(x) < BOUND
    one_gaussian = 0.0
    for i, (t, u) in enumerate(model.grid().steps()):
        pred, key = model.predict(x, t), NoiseKey(0, "proposal", i)
        z, coin = key.normal(n, (1,)), key.uniform(n)
        gaussian = EtaKernel(eta=1.0)(x, pred, t, u, path).sample(z)
        one_gaussian = max(one_gaussian, model.marginal(u).deviation(gaussian))
        x = model.transition.propose(x, pred, t, u, z, coin)
        assert model.marginal(u).deviation(x) < BOUND
    # Steps this long are not Gaussian: the default kernel fails even from the exact law.
    assert one_gaussian > 4 * BOUND


@pytest.mark.parametrize(("t", "u"), [(1.0, 0.6), (0.7, 0.3), (0.3, 0.05)])
def test_exact_kernel_density_is_consistent(t: float, u: float) -> None:
    """p_u(y) = int p(y | x) p_t(x) dx, and p(y | x) is normalised."""
    model = one_d()
    high, low = model.path.at(t), model.path.at(u)
    y = torch.linspace(-4, 4, 9, dtype=torch.float64)
    kernel = ExactReverse(model)
    for point in y:
        there = torch.full((len(LINE), 1), float(point), dtype=torch.float64)
        move = kernel.log_prob(there, LINE[:, None], high, low).exp()
        mixed = integral(move * model.log_prob(LINE[:, None], high).exp())
        wanted = model.log_prob(there[:1], low).exp()[0]
        assert float(mixed) == pytest.approx(float(wanted), abs=1e-9)
        here = kernel.log_prob(LINE[:, None], there, high, low).exp()
        assert float(integral(here)) == pytest.approx(1.0, abs=1e-9)


def test_exact_proposals_follow_their_density() -> None:
    model, n = one_d(), 50_000
    high, low = model.path.at(0.7), model.path.at(0.2)
    x = torch.full((n, 1), 0.2, dtype=torch.float64)
    key = NoiseKey(0)
    y = ExactReverse(model).propose(
        x, model.predict(x, high), high, low, key.normal(n, (1,)), key.uniform(n)
    )
    density_there = ExactReverse(model).log_prob(LINE[:, None], x[: len(LINE)], high, low).exp()
    for f in (lambda v: v, torch.square, torch.sin):
        assert errors(f(y), float(integral(f(LINE) * density_there))) < BOUND


def test_exact_kernel_of_a_point_is_the_ddpm_posterior() -> None:
    point = GaussianMixture([1.0], [[0.7, -0.2]], [1e-9], path=VP())
    t, u = VP().at(0.6), VP().at(0.5)
    x, z = NoiseKey(0).normal(4, (2,)).double(), NoiseKey(1).normal(4, (2,)).double()
    pred = point.predict(x, t)
    exact = ExactReverse(point).propose(x, pred, t, u, z, torch.full((4,), 0.5))
    gaussian = EtaKernel(eta=1.0)(x, pred, t, u, VP()).sample(z)
    torch.testing.assert_close(exact, gaussian, rtol=1e-9, atol=1e-9)


def test_exact_kernel_mixes_levels_and_refuses_to_be_gaussian() -> None:
    model, kernel = one_d(), ExactReverse(one_d())
    ts = [model.path.at(t) for t in (0.9, 0.5)]
    us = [model.path.at(u) for u in (0.5, 0.0)]
    x = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    z, coin = NoiseKey(0).normal(2, (1,)), NoiseKey(0).uniform(2)
    whole = kernel.propose(x, model.predict(x, ts), ts, us, z, coin)
    for i in range(2):
        row = slice(i, i + 1)
        pred = model.predict(x[row], ts[i])
        alone = kernel.propose(x[row], pred, ts[i], us[i], z[row], coin[row])
        torch.testing.assert_close(alone, whole[row])
    with pytest.raises(SteeringError, match="propose"):
        kernel(x, pred, ts[0], us[0], model.path)


# --- tilting ---


@over_rewards
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_tilted_law_against_quadrature(reward, scale: float) -> None:
    model = one_d()
    weight = density(model) * (scale * reward(LINE[:, None])).exp()
    mass = integral(weight)
    assert model.log_normaliser(reward, scale) == pytest.approx(float(mass.log()), abs=1e-9)
    tilted = model.tilted(reward, scale)
    torch.testing.assert_close(density(tilted), weight / mass, rtol=0, atol=1e-9)
    # Tilting twice by half is tilting once, and tilting by nothing changes nothing.
    again = model.tilted(reward, scale / 2).tilted(reward, scale / 2)
    torch.testing.assert_close(density(again), density(tilted))
    torch.testing.assert_close(density(model.tilted(reward, 0.0)), density(model))


@over_rewards
@over_paths
def test_value_function_against_quadrature(path: Path, reward) -> None:
    model, scale = one_d(path), 1.5
    for t in (0.2, 0.6):
        time = path.at(t)
        x = time.alpha * torch.tensor([[-1.0], [1.5]], dtype=torch.float64)
        noise = torch.distributions.Normal(time.alpha * LINE, time.sigma)
        posterior = density(model) * noise.log_prob(x).exp()
        gain = integral(posterior * (scale * reward(LINE[:, None])).exp()) / integral(posterior)
        value = model.value(x, time, reward, scale)
        torch.testing.assert_close(value, gain.log(), rtol=0, atol=1e-8)


@over_rewards
def test_value_function_at_both_ends_and_in_between(reward) -> None:
    model, scale = one_d(), 1.5
    x = torch.tensor([[-1.0], [0.7]], dtype=torch.float64)
    start = model.value(x, model.path.at(1.0), reward, scale)
    assert start.tolist() == pytest.approx([model.log_normaliser(reward, scale)] * 2)
    end = model.value(x, model.path.at(0.0), reward, scale)
    torch.testing.assert_close(end, scale * reward(x))
    # exp V is a martingale of the exact chain.
    high, low = model.path.at(0.7), model.path.at(0.3)
    move = ExactReverse(model).log_prob(LINE[:, None], x[:1], high, low).exp()
    mean = integral(move * model.value(LINE[:, None], low, reward, scale).exp())
    here = float(model.value(x[:1], high, reward, scale)[0])
    assert math.log(float(mean)) == pytest.approx(here, abs=1e-9)


@pytest.mark.parametrize(
    "reward", [LinearReward([0.4, -0.6, 0.2], 0.1), QuadraticReward([0.5, 0.0, -1.0], 0.6)]
)
def test_tilting_in_three_dimensions_against_monte_carlo(reward) -> None:
    model = three_d()
    x = model.sample(100_000, torch.Generator().manual_seed(0))
    weight = reward(x).exp()
    assert errors(weight, math.exp(model.log_normaliser(reward))) < BOUND
    ratio = weight / math.exp(model.log_normaliser(reward))
    tilted = model.tilted(reward)
    for d in range(3):
        assert errors(ratio * (x[:, d] - tilted.moments()[0][d]), 0.0) < BOUND
    mean, cov = tilted.moments()
    gap = (x - mean).square().sum(1)
    assert errors(ratio * (gap - cov.trace()), 0.0) < BOUND


def test_strong_tilts_stay_finite() -> None:
    model = one_d()
    assert math.isfinite(model.log_normaliser(LinearReward(1.0), 1e3))
    assert model.tilted(LinearReward(1.0), 1e3).means.isfinite().all()
    far = model.tilted(QuadraticReward(40.0, 1.0), 1e6)
    assert float(far.moments()[0][0]) == pytest.approx(40.0, abs=1e-3)
    with pytest.raises(OptionError, match="no finite mass"):
        model.tilted(QuadraticReward(0.0, -1.0), 4.0)


def test_rewards_are_plain_functions_of_samples() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert LinearReward([1.0, 0.5], 3.0)(x).tolist() == [5.0, 2.5]
    assert QuadraticReward([1.0, 0.0], 2.0)(x).tolist() == [-4.0, -2.0]

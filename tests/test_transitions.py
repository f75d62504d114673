"""Transitions: which law they keep, and their algebra against independent formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from steering.analytic import GaussianMixture
from steering.errors import OptionError, SteeringError
from steering.grids import on_path, uniform
from steering.noise import NoiseKey
from steering.paths import VE, VP, Cosine, Linear, Path, Prediction, Tabulated, Time, from_eps
from steering.transitions import (
    ODE,
    EtaKernel,
    EulerMaruyama,
    FullRenoise,
    Step,
    Transition,
    dance_grpo,
    eta_to_g,
    flow_grpo,
    kernel_std,
    memoryless,
    rbf_sde,
    renoise,
)

LINEAR = Linear()
BOUND = 5.0  # standard errors; eight of them are looked at each time, p < 5e-6


def normals(stream: str, *shape: int) -> torch.Tensor:
    return NoiseKey(0, stream).normal(shape[0], shape[1:]).double()


def mixture(path: Path) -> GaussianMixture:
    return GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.25, 0.4, 0.15], path=path)


@dataclass(frozen=True, kw_only=True)
class WithoutScore(EulerMaruyama):
    """Noise simply added to the flow: the mistake that the score term corrects."""

    def __call__(self, x: torch.Tensor, pred: Prediction, t: Time, u: Time, path: Path) -> Step:
        right = super().__call__(x, pred, t, u, path)
        return Step(x - (t.t - u.t) * pred.velocity(path, t.t), right.std)


def deviations(transition: Transition, path: Path, steps: int = 240, n: int = 8000) -> list[float]:
    """Standard errors between the chain and the exact p_t at t <= 0.75, 0.5, 0.25 and 0."""
    model, grid = mixture(path), on_path(path, uniform(steps))
    x = model.noise(n, NoiseKey(0, "init"))
    generator = torch.Generator().manual_seed(0)
    found, marks = [], [0.75, 0.5, 0.25, 0.0]
    for t, u in grid.steps():
        z = torch.randn(n, 1, dtype=torch.float64, generator=generator)
        x = transition(x, model.predict(x, t), t, u, path).sample(z)
        if u.t <= marks[0] + 1e-12:
            marks.pop(0)
            found.append(model.marginal(u).deviation(x))
    assert len(found) == 4
    return found


KEEPING = {
    "rbf": (rbf_sde(), VP()),
    "flow-grpo": (flow_grpo(), LINEAR),
    "dance-grpo": (dance_grpo(), LINEAR),
    "memoryless": (memoryless(), LINEAR),
    "memoryless-vp": (memoryless(), VP()),
    "memoryless-cosine": (memoryless(), Cosine()),
    "ode": (ODE, LINEAR),
    "eta-0.3": (EtaKernel(eta=0.3), LINEAR),
    "eta-0.7": (EtaKernel(eta=0.7), VP()),
    "eta-1": (EtaKernel(eta=1.0), LINEAR),
    "eta-1-vp": (EtaKernel(eta=1.0), VP()),
}


@pytest.mark.parametrize("name", KEEPING)
def test_marginals_are_kept_at_every_level(name: str) -> None:
    transition, path = KEEPING[name]
    assert transition.preserves_marginals
    assert max(deviations(transition, path)) < BOUND


@pytest.mark.parametrize("name", ["rbf", "flow-grpo", "memoryless"])
def test_noise_without_the_score_term_is_caught(name: str) -> None:
    right, path = KEEPING[name]
    assert max(deviations(WithoutScore(g=right.g), path)) > 4 * BOUND


def test_full_renoising_is_flagged_and_biased_however_many_steps() -> None:
    assert not FullRenoise().preserves_marginals
    assert FullRenoise().stochastic
    for steps in (40, 240):
        assert deviations(FullRenoise(), LINEAR, steps)[-1] > 4 * BOUND


def test_the_ode_maps_quantiles_and_its_error_halves_with_the_step() -> None:
    """In one dimension the flow is monotone, so it is the map between equal quantiles."""
    model = mixture(LINEAR)
    start = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None]
    wanted = torch.special.ndtr(start)
    errors = []
    for steps in (200, 400, 800):
        x = start
        for t, u in on_path(LINEAR, uniform(steps)).steps():
            x = ODE(x, model.predict(x, t), t, u, LINEAR).mean
        errors.append(float((model.cdf(x) - wanted).abs().mean()))
    assert errors[-1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("path", [LINEAR, VP(), VE()], ids=("linear", "vp", "ve"))
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.5, 0.6), (0.5, 1.0)])
def test_forward_renoising_keeps_the_marginals(path: Path, s: float, t: float) -> None:
    model, low, high = mixture(path), path.at(s), path.at(t)
    x = model.marginal(low).sample(100_000, NoiseKey(1, "x").generator())
    z = normals("z", 100_000, 1)
    assert model.marginal(high).deviation(renoise(x, low, high, z)) < BOUND
    # The check has teeth: noise of the whole level is too much, unless the state is clean.
    if s > 0 and t < 1:
        wrong = high.alpha / low.alpha * x + high.sigma * z
        assert model.marginal(high).deviation(wrong) > BOUND


def test_renoising_downwards_is_refused() -> None:
    with pytest.raises(OptionError, match="clean to noisy"):
        renoise(torch.zeros(1, 1), LINEAR.at(0.5), LINEAR.at(0.4), torch.zeros(1, 1))


# --- algebra ---


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("path", [LINEAR, VP(), Cosine()], ids=("linear", "vp", "cosine"))
def test_kernel_agrees_with_ddim(path: Path, eta: float) -> None:
    """Song et al. 2021 (DDIM), eqs. 12 and 16, with a-bar = alpha^2 / (alpha^2 + sigma^2)."""
    t, u = path.at(0.7), path.at(0.6)
    x0, eps = normals("x0", 5, 3), normals("eps", 5, 3)
    size_t, size_u = (math.hypot(v.alpha, v.sigma) for v in (t, u))
    abar_t, abar_u = (t.alpha / size_t) ** 2, (u.alpha / size_u) ** 2
    std = eta * math.sqrt((1 - abar_u) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_u)
    mean = math.sqrt(abar_u) * x0 + math.sqrt(1 - abar_u - std**2) * eps
    step = EtaKernel(eta=eta)(t.alpha * x0 + t.sigma * eps, Prediction(x0, eps), t, u, path)
    torch.testing.assert_close(step.mean, size_u * mean, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(size_u * std, rel=1e-12, abs=1e-15)


def test_eta_one_is_the_ddpm_posterior_on_a_discrete_table() -> None:
    """Ho et al. 2020, eqs. 6 and 7, on a linear beta table."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    path, i = Tabulated(abar), 600
    t, u = path.at((i + 1) / 1000), path.at(i / 1000)
    x, eps = normals("x", 5, 3), normals("eps", 5, 3)
    pred = from_eps(x, eps, t)
    step = EtaKernel(eta=1.0)(x, pred, t, u, path)
    b, now, before = float(beta[i]), float(abar[i]), float(abar[i - 1])
    mean = math.sqrt(before) * b / (1 - now) * pred.x0
    mean = mean + math.sqrt(1 - b) * (1 - before) / (1 - now) * x
    torch.testing.assert_close(step.mean, mean, rtol=1e-10, atol=1e-10)
    assert step.std == pytest.approx(math.sqrt((1 - before) / (1 - now) * b), rel=1e-9)


@pytest.mark.parametrize("path", [LINEAR, VP(), VE()], ids=("linear", "vp", "ve"))
def test_eta_one_is_the_first_order_sde_solver(path: Path) -> None:
    """SDE-DPM-Solver++(1), Lu et al. 2022 (arXiv 2211.01095), in log-SNR steps h."""
    t, u = path.at(0.7), path.at(0.5)
    h = u.log_snr - t.log_snr
    x0, eps = normals("x0", 5, 3), normals("eps", 5, 3)
    x = t.alpha * x0 + t.sigma * eps
    step = EtaKernel(eta=1.0)(x, Prediction(x0, eps), t, u, path)
    mean = u.sigma / t.sigma * math.exp(-h) * x - u.alpha * math.expm1(-2 * h) * x0
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(u.sigma * math.sqrt(-math.expm1(-2 * h)), rel=1e-12)


def test_eta_zero_is_the_euler_step_of_the_flow() -> None:
    t, u = LINEAR.at(0.7), LINEAR.at(0.6)
    x0, eps = normals("x0", 5, 3), normals("eps", 5, 3)
    x, pred = t.alpha * x0 + t.sigma * eps, Prediction(x0, eps)
    step = ODE(x, pred, t, u, LINEAR)
    euler = x - (t.t - u.t) * pred.velocity(LINEAR, t.t)
    torch.testing.assert_close(step.mean, euler, rtol=1e-12, atol=1e-12)
    assert step.std == 0.0
    assert not ODE.stochastic
    assert not step.random
    assert step.sample(None) is step.mean


@pytest.mark.parametrize("path", [LINEAR, VP(), Cosine()], ids=("linear", "vp", "cosine"))
def test_a_short_kernel_step_has_the_noise_of_its_sde(path: Path) -> None:
    t, dt, eta = path.at(0.5), 1e-6, 0.7
    rate = kernel_std(t, path.at(0.5 - dt), eta) ** 2 / dt
    assert rate == pytest.approx(eta_to_g(eta)(t, path) ** 2, rel=1e-4)


def test_g_of_eta_in_closed_form() -> None:
    for t in (0.2, 0.5, 0.9):
        g = eta_to_g(0.6)
        assert g(LINEAR.at(t), LINEAR) == pytest.approx(0.6 * math.sqrt(2 * t / (1 - t)))
        beta = 0.1 + 19.9 * t
        assert g(VP().at(t), VP()) == pytest.approx(0.6 * math.sqrt(beta), rel=1e-9)
        assert flow_grpo(0.7).g(LINEAR.at(t), LINEAR) == pytest.approx(
            0.7 * math.sqrt(t / (1 - t))
        )
    falling = eta_to_g(lambda t: t)
    assert falling(LINEAR.at(0.5), LINEAR) == pytest.approx(0.5 * math.sqrt(2.0))


@pytest.mark.parametrize(("t", "u"), [(1.0, 0.9), (0.6, 0.55), (0.1, 0.0)])
def test_flow_grpo_step(t: float, u: float) -> None:
    """Liu et al. 2025, eq. 9; on pure noise the denominator is that of the next level."""
    x, v, dt = normals("x", 5, 3), normals("v", 5, 3), u - t
    g = 0.7 * math.sqrt(t / (1 - (u if t == 1.0 else t)))
    mean = x * (1 + g * g / (2 * t) * dt) + v * (1 + g * g * (1 - t) / (2 * t)) * dt
    pred = Prediction(x - t * v, x + (1 - t) * v)
    step = flow_grpo(0.7)(x, pred, LINEAR.at(t), LINEAR.at(u), LINEAR)
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(0.0 if u == 0.0 else g * math.sqrt(-dt), rel=1e-12)


def test_dance_grpo_step() -> None:
    """Xue et al. 2025: x + v dt - eta^2/2 score dt with the score from x0."""
    t, dt, eta = 0.6, -0.05, 0.3
    x, v = normals("x", 5, 3), normals("v", 5, 3)
    x0 = x - t * v
    mean = x + v * dt + 0.5 * eta**2 * (x - (1 - t) * x0) / t**2 * dt
    pred = Prediction(x0, x + (1 - t) * v)
    step = dance_grpo(eta)(x, pred, LINEAR.at(t), LINEAR.at(t + dt), LINEAR)
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(eta * math.sqrt(-dt))


def test_rbf_noise_grows_with_the_square_of_time() -> None:
    assert rbf_sde().g(VP().at(0.5), VP()) == 0.75


# --- ends ---


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", [LINEAR, VP(), Cosine()], ids=("linear", "vp", "cosine"))
def test_a_whole_chain_in_one_step_is_finite_and_noiseless(path: Path, eta: float) -> None:
    model, x = mixture(path), normals("x", 16, 1)
    for transition in (EtaKernel(eta=eta), memoryless(), FullRenoise()):
        pred = model.predict(x, path.at(1.0))
        step = transition(x, pred, path.at(1.0), path.at(0.0), path)
        assert step.std == 0.0
        if not isinstance(transition, EulerMaruyama):
            torch.testing.assert_close(step.mean, pred.x0)
    for u in (0.99, 0.5):
        step = EtaKernel(eta=eta)(x, pred, path.at(1.0), path.at(u), path)
        assert bool(step.mean.isfinite().all())
        if path.at(1.0).alpha < 1e-6:
            assert step.std == pytest.approx(eta * path.at(u).sigma)


def test_a_grid_that_ends_above_zero_gets_no_noise_there_either() -> None:
    t, u = LINEAR.at(0.2), replace(LINEAR.at(0.01), end=True)
    x, model = normals("x", 4, 1), mixture(LINEAR)
    pred = model.predict(x, t)
    for transition in (EtaKernel(eta=1.0), memoryless(), FullRenoise()):
        assert transition(x, pred, t, u, LINEAR).std == 0.0


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_rows_at_different_levels_move_as_they_would_alone(eta: float) -> None:
    model, x = mixture(LINEAR), normals("x", 4, 1)
    ts = [LINEAR.at(t) for t in (1.0, 0.7, 0.4, 0.2)]
    us = [LINEAR.at(u) for u in (0.8, 0.5, 0.3, 0.0)]
    z = normals("z", 4, 1)
    for kernel in (EtaKernel(eta=eta), FullRenoise()):
        whole = kernel(x, model.predict(x, ts), ts, us, LINEAR).sample(z)
        for i in range(4):
            row = slice(i, i + 1)
            alone = kernel(x[row], model.predict(x[row], ts[i]), ts[i], us[i], LINEAR)
            torch.testing.assert_close(whole[row], alone.sample(z[row]), rtol=1e-12, atol=1e-12)
    shared = EtaKernel(eta=eta)(x, model.predict(x, ts[0]), ts[0], us, LINEAR)
    again = EtaKernel(eta=eta)(x, model.predict(x, ts[0]), [ts[0]] * 4, us, LINEAR)
    assert torch.equal(shared.mean, again.mean)


# --- densities and refusals ---


@pytest.mark.parametrize("column", [False, True])
def test_log_prob_agrees_with_torch(column: bool) -> None:
    mean, x = normals("mean", 6, 2, 3), normals("x", 6, 2, 3)
    std = torch.linspace(0.2, 2.0, 6, dtype=torch.float64)[:, None, None] if column else 0.7
    wanted = torch.distributions.Normal(mean, std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(Step(mean, std).log_prob(x), wanted, rtol=1e-12, atol=1e-12)
    single = Step(mean.float(), std.float() if column else std).log_prob(x.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, wanted, rtol=1e-5, atol=1e-4)


def test_log_prob_peaks_where_the_step_goes_without_noise() -> None:
    step = Step(normals("mean", 3, 2), 0.5)
    assert bool((step.log_prob(step.mean) > step.log_prob(step.mean + 0.1)).all())
    z = normals("z", 3, 2)
    torch.testing.assert_close(step.sample(z), step.mean + 0.5 * z)


def test_deterministic_steps_have_no_density_and_random_ones_need_noise() -> None:
    mean = normals("mean", 2, 1)
    for std in (0.0, torch.tensor([[0.3], [0.0]], dtype=torch.float64)):
        with pytest.raises(SteeringError, match="no density"):
            Step(mean, std).log_prob(mean)
    with pytest.raises(SteeringError, match="needs noise"):
        Step(mean, 0.3).sample(None)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_must_lie_in_the_unit_interval(eta: float) -> None:
    with pytest.raises(OptionError, match="eta"):
        EtaKernel(eta=eta)


def test_euler_maruyama_takes_one_level_at_a_time() -> None:
    model, x, t = mixture(LINEAR), normals("x", 2, 1), LINEAR.at(0.5)
    with pytest.raises(OptionError, match="one noise level"):
        memoryless()(x, model.predict(x, t), [t, t], LINEAR.at(0.4), LINEAR)

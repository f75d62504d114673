"""Conversions between conventions, and change of interpolant, against exact predictions."""

from __future__ import annotations

import math

import pytest
import torch

from steering.analytic import GaussianMixture
from steering.errors import SteeringError
from steering.grids import on_path, same_log_snr, uniform
from steering.noise import NoiseKey
from steering.paths import (
    VE,
    VP,
    Cosine,
    Linear,
    Path,
    Prediction,
    Tabulated,
    alpha_sigma,
    convert,
    from_eps,
    from_flow,
    from_v,
    from_velocity,
    from_x0,
)
from steering.transitions import EtaKernel


def stable_diffusion_table() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, 0)


TABLE = stable_diffusion_table()
SMOOTH = {"linear": Linear(), "vp": VP(), "cosine": Cosine(), "ve": VE()}
PATHS = {**SMOOTH, "table": Tabulated(TABLE), "table-ve": Tabulated(TABLE, exploding=True)}
TIMES = (0.05, 0.3, 0.5, 0.9, 0.98)


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request) -> Path:
    return request.param


def normals(stream: str, n: int = 64, d: int = 3) -> torch.Tensor:
    return NoiseKey(0, stream).normal(n, (d,)).double()


def mixture(path: Path) -> GaussianMixture:
    return GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.25, 0.4, 0.15], path=path)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("t", TIMES)
def test_every_convention_leads_back_to_x0_and_eps(path: Path, t: float) -> None:
    x0, eps, time = normals("x0"), normals("eps"), path.at(t)
    a, s = time.alpha, time.sigma
    x = a * x0 + s * eps
    norm = math.hypot(a, s)
    velocity = Prediction(x0, eps).velocity(path, t)
    for pred in (
        from_eps(x, eps, time),
        from_x0(x, x0, time),
        from_v(x, (a * eps - s * x0) / norm, time),
        from_velocity(x, velocity, path, t),
    ):
        close(pred.x0, x0)
        close(pred.eps, eps)


def test_flow_velocity_is_eps_minus_x0_on_the_linear_path() -> None:
    x0, eps, time = normals("x0"), normals("eps"), Linear().at(0.37)
    pred = from_flow(time.alpha * x0 + time.sigma * eps, eps - x0, time)
    close(pred.x0, x0)
    close(pred.eps, eps)
    close(pred.velocity(Linear(), 0.37), eps - x0)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("path", SMOOTH.values(), ids=SMOOTH)
def test_score_is_the_gradient_of_the_density_and_fits_the_velocity(path: Path, t: float) -> None:
    model, time = mixture(path), path.at(t)
    x = (time.alpha * normals("x", d=1) + time.sigma * normals("z", d=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x, time).sum(), x)
    x = x.detach()
    pred = model.predict(x, time)
    v, score = pred.velocity(path, t), pred.score(time)
    close(score, gradient)
    da, ds = path.slopes(t)
    a, s = time.alpha, time.sigma
    close((a * v - da * x) / (s * (da * s - a * ds)), gradient)
    close(da / a * x + (da * s * s / a - ds * s) * score, v)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("path", SMOOTH.values(), ids=SMOOTH)
def test_slopes_match_finite_differences(path: Path, t: float) -> None:
    h = 1e-6
    low, high = path.at(t - h), path.at(t + h)
    da, ds = path.slopes(t)
    assert da == pytest.approx((high.alpha - low.alpha) / (2 * h), rel=1e-7, abs=1e-8)
    assert ds == pytest.approx((high.sigma - low.sigma) / (2 * h), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("exploding", [False, True])
def test_tabulated_slopes_match_finite_differences_of_the_table(exploding: bool) -> None:
    path = Tabulated(TABLE, exploding=exploding)
    for i in (50, 300, 700, 950):
        low, high = path.at((i - 1) / 1000), path.at((i + 1) / 1000)
        da, ds = path.slopes(i / 1000)
        assert da == pytest.approx((high.alpha - low.alpha) / 2e-3, rel=1e-3, abs=1e-9)
        assert ds == pytest.approx((high.sigma - low.sigma) / 2e-3, rel=1e-3)


def test_tabulated_path_stands_on_the_table() -> None:
    vp, ve = Tabulated(TABLE), Tabulated(TABLE, exploding=True)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    close(vp.alpha(t) ** 2, TABLE, 1e-12)
    close(vp.sigma(t) ** 2, 1.0 - TABLE, 1e-12)
    close(ve.sigma(t), vp.sigma(t) / vp.alpha(t), 1e-12)
    assert (vp.at(0.0).alpha, vp.at(0.0).sigma) == (1.0, 0.0)


def test_zero_terminal_snr_table_stays_finite() -> None:
    table = torch.cat([TABLE[:-1], torch.zeros(1, dtype=torch.float64)])
    time = Tabulated(table).at(1.0)
    assert 0.0 < time.alpha < 1e-5
    assert time.sigma == pytest.approx(1.0)


def test_time_of_log_snr_inverts_log_snr(path: Path) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    close(path.t_of_log_snr(path.log_snr(t)), t)


@pytest.mark.parametrize("path", SMOOTH.values(), ids=SMOOTH)
def test_closed_inverse_agrees_with_bisection_and_stays_in_the_unit_interval(path: Path) -> None:
    inf = math.inf
    levels = torch.tensor([-inf, -30.0, -9.0, -1.0, 0.0, 1.0, 9.0, 14.0, inf], dtype=torch.float64)
    close(path.t_of_log_snr(levels), Path.t_of_log_snr(path, levels), 1e-12)
    assert path.t_of_log_snr(levels)[0] == 1.0
    assert path.t_of_log_snr(levels)[-1] == 0.0


def test_ends_of_a_path_have_infinite_log_snr() -> None:
    assert Linear().at(1.0).log_snr == -math.inf
    assert Linear().at(0.0).log_snr == math.inf
    assert Linear().at(0.0).end
    assert Linear().at(0.5).log_snr == 0.0


@pytest.mark.parametrize("target", [VP(), Cosine(), VE()], ids=("vp", "cosine", "ve"))
@pytest.mark.parametrize("r", [0.02, 0.2, 0.5, 0.8, 0.99])
def test_converted_velocity_is_the_formula_of_the_paper(target: Path, r: float) -> None:
    """Kim et al. 2025, appendix: v'(x', r) = (c'/c) x' + c (dt/dr) v(x'/c, t(r))."""
    new = target.at(r)
    da, ds = target.slopes(r)
    c, dc = new.alpha + new.sigma, da + ds
    t, dt = new.sigma / c, (ds * new.alpha - new.sigma * da) / c**2
    moved = new.sigma * normals("x", d=1)
    source = mixture(Linear())
    old = source.predict(moved / c, Linear().at(t))
    theirs = dc / c * moved + c * dt * old.velocity(Linear(), t)
    close(old.velocity(target, r), theirs, 1e-11)
    native = mixture(target).predict(moved, new)
    close(native.velocity(target, r), theirs, 1e-11)


@pytest.mark.parametrize("source", [Linear(), VP(), VE()], ids=("linear", "vp", "ve"))
@pytest.mark.parametrize("target", [Linear(), VP(), Cosine()], ids=("linear", "vp", "cosine"))
def test_a_converted_state_has_the_same_prediction(source: Path, target: Path) -> None:
    time = source.at(0.4)
    x = time.sigma * normals("x", d=1)
    moved, r = convert(x, time, target)
    here, there = mixture(source).predict(x, time), mixture(target).predict(moved, target.at(r))
    close(there.x0, here.x0)
    close(there.eps, here.eps)
    back, t = convert(moved, target.at(r), source)
    assert t == pytest.approx(0.4, abs=1e-9)
    close(back, x)


def test_conversion_at_both_ends() -> None:
    x = normals("x")
    clean, r = convert(x, Linear().at(0.0), VP())
    assert r == 0.0
    close(clean, x)
    noise, r = convert(x, Linear().at(1.0), VP())
    # VP is not quite noise at t = 1: alpha = 0.0066, so sigma is 2e-5 short of 1.
    assert r == 1.0
    close(noise, x, 5e-5)


def run_chain(path: Path, ts: list[float], x: torch.Tensor, eta: float) -> torch.Tensor:
    model, grid = mixture(path), on_path(path, ts)
    for i, (t, u) in enumerate(grid.steps()):
        z = NoiseKey(1, "proposal", i).normal(len(x), (1,)).double()
        x = EtaKernel(eta=eta)(x, model.predict(x, t), t, u, path).sample(z)
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", [VP(), Cosine(), VE()], ids=("vp", "cosine", "ve"))
def test_change_of_interpolant_is_a_no_op_under_the_eta_kernel(target: Path, eta: float) -> None:
    """At equal log-SNR and noise, two paths agree pathwise up to the scale, not just in law."""
    start = 0.9875  # within the range of log-SNR of all the targets
    ts = [start * t for t in uniform(40)]
    x = normals("start", 256, 1)
    other = same_log_snr(ts, Linear(), target)
    scale = target.at(other[0]).sigma / start
    linear = run_chain(Linear(), ts, x, eta)
    close(run_chain(target, other, scale * x, eta), linear, 1e-12)
    # The check has teeth: neither the scale nor the grid may be forgotten.
    if isinstance(target, VP):
        assert float((run_chain(target, ts, scale * x, eta) - linear).abs().max()) > 1e-2
    if isinstance(target, VE):
        assert float((run_chain(target, other, x, eta) - linear).abs().max()) > 1e-2


def test_prediction_keeps_all_that_a_subclass_knows() -> None:
    model, time = mixture(Linear()), Linear().at(0.5)
    x = normals("x", 6, 1)
    whole = model.predict(x, time)
    joined = Prediction.cat([whole.rows(slice(0, 2)), whole.rows(torch.tensor([2, 3, 4, 5]))])
    assert type(joined) is type(whole)
    for name in ("x0", "eps", "log_resp", "means", "variances"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


def test_a_network_prediction_has_no_posterior_samples() -> None:
    pred = Prediction(normals("x0"), normals("eps"))
    assert torch.equal(pred.mean, pred.x0)
    assert torch.equal(pred.mode, pred.x0)
    with pytest.raises(SteeringError, match="lookahead"):
        pred.draw(2, NoiseKey(0))


def test_rows_at_different_levels_get_a_column() -> None:
    times = [Linear().at(t) for t in (0.1, 0.5, 0.9)]
    x = torch.ones(3, 2, 2, dtype=torch.float64)
    alpha, sigma = alpha_sigma(times, x)
    assert alpha.shape == (3, 1, 1)
    close(sigma.flatten(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    eps = normals("eps", 3, 4).reshape(3, 2, 2)
    mixed = from_eps(x, eps, times)
    scores = mixed.score(times)
    for i, time in enumerate(times):
        close(mixed.x0[i], from_eps(x[i], eps[i], time).x0)
        close(scores[i], -eps[i] / time.sigma)

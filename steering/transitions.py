"""From one noise level to the next: each transition gives mean, std and log-density.

All transitions are stateless functions of (x, prediction, t, u) with u cleaner than t. The
randomness z is always an argument, so the same code serves sampling, search over z and densities.

The default is the exact-coefficient eta-kernel, which is DDIM-eta on a VP path (Song et al. 2021),
the DDPM posterior at eta = 1, SDE-DPM-Solver++(1) at eta = 1 and the Euler ODE step at eta = 0 on
the linear path, and does not depend on the path at all when the noise levels are the same:

    rho = alpha_t sigma_u / (alpha_u sigma_t),   std^2 = eta^2 sigma_u^2 (1 - rho^2)
    x_u = alpha_u x0 + sqrt(sigma_u^2 - std^2) eps + std z
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from steering.errors import OptionError, SteeringError
from steering.kernels.step import Move
from steering.paths import Path, Prediction, Time, Times, coefficient


@dataclass(frozen=True, eq=False)
class Step:
    """A Gaussian move: x_u ~ N(mean, std^2 I).

    Attributes:
        mean: [n, *event].
        std: one number, or a column [n, 1, ...] when the rows stand at different levels.
    """

    mean: Tensor
    std: float | Tensor

    @property
    def random(self) -> bool:
        """Whether any row moves at random."""
        return bool((self.std > 0).any()) if isinstance(self.std, Tensor) else self.std > 0

    def sample(self, z: Tensor | None) -> Tensor:
        """mean + std z; z may be None where nothing is random."""
        if not self.random:
            return self.mean
        if z is None:
            raise SteeringError("This transition is random: it needs noise z.")
        return self.mean + self.std * z.to(self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I) per row, [n], summed over the event in float64.

        Raises:
            SteeringError: the step is deterministic, so it has no density.
        """
        std = torch.as_tensor(self.std, dtype=torch.float64, device=x.device)
        if not bool((std > 0).all()):
            raise SteeringError("A deterministic transition has no density; use eta > 0.")
        d = (x.double() - self.mean.double()) / std
        dims = math.prod(x.shape[1:])
        logs = std.reshape(-1).log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * d.flatten(1).square().sum(1) - dims * logs


class Transition(Protocol):
    """Anything that says how x_t moves to level u."""

    preserves_marginals: bool

    @property
    def stochastic(self) -> bool:
        """Whether two samplers at the same x can part."""
        ...

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step: ...


def kernel_std(t: Time, u: Time, eta: float) -> float:
    """Noise of the eta-kernel; none on the way to the end of a grid."""
    if u.end or u.sigma == 0.0 or eta == 0.0:
        return 0.0
    rho = t.alpha * u.sigma / (u.alpha * t.sigma)
    return eta * u.sigma * math.sqrt(max(0.0, 1.0 - rho * rho))


def _kept(sigma: float, std: float) -> float:
    """The part of the noise at a level that is not fresh."""
    return math.sqrt(max(0.0, sigma * sigma - std * std))


def _per_level(
    t: Times, u: Times, f: Callable[[Time, Time], float], like: Tensor
) -> float | Tensor:
    if isinstance(t, Time) and isinstance(u, Time):
        return f(t, u)
    ts = [t] * len(u) if isinstance(t, Time) else list(t)  # type: ignore[arg-type]
    us = [u] * len(ts) if isinstance(u, Time) else list(u)
    values = torch.tensor([f(a, b) for a, b in zip(ts, us, strict=True)], dtype=like.dtype)
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class EtaKernel:
    """The exact-coefficient kernel above; eta is a path-invariant noise level.

    eta = 1 is the memoryless (DDPM) amount, 0 the ODE. flow-GRPO's a = 0.7 is eta = 0.495.
    """

    eta: float = 1.0
    preserves_marginals = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise OptionError(f"eta must lie in [0, 1], got {self.eta}.")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step:
        std = _per_level(t, u, lambda a, b: kernel_std(a, b, self.eta), x)
        kept = _per_level(t, u, lambda a, b: _kept(b.sigma, kernel_std(a, b, self.eta)), x)
        alpha = coefficient(u, lambda level: level.alpha, x)
        return Step(alpha * pred.x0 + kept * pred.eps, std)

    def weights(self, t: Time, u: Time, path: Path) -> Move:
        """The same step as weights of a fused pass."""
        std = kernel_std(t, u, self.eta)
        return Move(0.0, u.alpha, _kept(u.sigma, std), std)


ODE = EtaKernel(eta=0.0)
"""The deterministic flow, first order with exact coefficients."""


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama:
    """dx = (-v + g^2/2 score) ds + g dW in reverse time, for any g(t) >= 0.

    The g^2/2 score term is what keeps every p_t: without it noise is simply added
    (Song et al. 2021; Liu et al. 2025, flow-GRPO, eq. 8). ``g`` maps a Time and its path to a
    number. On pure noise it is handed the alpha of the next level instead of 0, as flow-GRPO does:
    g^2 dt then stays of order one however short the first step is.
    """

    g: Callable[[Time, Path], float]
    preserves_marginals = True

    @property
    def stochastic(self) -> bool:
        return True

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step:
        if not (isinstance(t, Time) and isinstance(u, Time)):
            raise OptionError("Euler-Maruyama steps take one noise level at a time.")
        dt, g = t.t - u.t, self._noise(t, u, path)
        drift = -pred.velocity(path, t.t)
        if g > 0.0:
            drift = drift + 0.5 * g * g * pred.score(t)
        return Step(x + dt * drift, self._std(g, dt, u))

    def weights(self, t: Time, u: Time, path: Path) -> Move:
        """The same step as weights of a fused pass."""
        dt, g = t.t - u.t, self._noise(t, u, path)
        da, ds = path.slopes(t.t)
        score = 0.5 * g * g / t.sigma if g > 0.0 else 0.0
        return Move(1.0, -dt * da, -dt * (ds + score), self._std(g, dt, u))

    def _noise(self, t: Time, u: Time, path: Path) -> float:
        return self.g(replace(t, alpha=u.alpha) if t.pure else t, path)

    @staticmethod
    def _std(g: float, dt: float, u: Time) -> float:
        return 0.0 if u.end or u.sigma == 0.0 else g * math.sqrt(dt)


def affine(transition: Transition) -> EtaKernel | EulerMaruyama | None:
    """The transition, where its ``weights`` say all of it: subclasses may move otherwise."""
    known = type(transition) in (EtaKernel, EulerMaruyama)
    return transition if known else None  # type: ignore[return-value]


def eta_to_g(eta: float | Callable[[float], float]) -> Callable[[Time, Path], float]:
    """g(t) of the path-invariant level eta: g^2 = 2 eta^2 sigma^2 |d ln(alpha/sigma) / dt|.

    Linear path: eta sqrt(2t / (1-t)); VP: eta sqrt(beta(t)). Needs alpha > 0.
    """

    def g(time: Time, path: Path) -> float:
        da, ds = path.slopes(time.t)
        det = path.at(time.t).alpha * ds - da * time.sigma
        level = eta(time.t) if callable(eta) else eta
        return level * math.sqrt(2.0 * time.sigma * max(det, 0.0) / time.alpha)

    return g


def flow_grpo(a: float = 0.7) -> EulerMaruyama:
    """g = a sqrt(t / (1 - t)) on the linear path (Liu et al. 2025)."""
    return EulerMaruyama(g=eta_to_g(a / math.sqrt(2.0)))


def dance_grpo(eta: float = 0.3) -> EulerMaruyama:
    """Constant g on the linear path (Xue et al. 2025)."""
    return EulerMaruyama(g=lambda time, path: eta)


def rbf_sde(scale: float = 3.0) -> EulerMaruyama:
    """g = scale t^2, meant for the VP path (Kim et al. 2025, arXiv 2503.19385)."""
    return EulerMaruyama(g=lambda time, path: scale * time.t**2)


def memoryless() -> EulerMaruyama:
    """g = sqrt(2t / (1 - t)) linear, sqrt(beta) VP: the sample forgets its starting noise."""
    return EulerMaruyama(g=eta_to_g(1.0))


@dataclass(frozen=True, kw_only=True)
class FullRenoise:
    """x_u = alpha_u x0 + sigma_u z: right for consistency-distilled models only.

    On other models it does not keep the marginals even with infinitely many steps.
    """

    preserves_marginals = False

    @property
    def stochastic(self) -> bool:
        return True

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step:
        a = coefficient(u, lambda v: v.alpha, x)
        return Step(a * pred.x0, coefficient(u, lambda v: 0.0 if v.end else v.sigma, x))


def renoise(x: Tensor, s: Time, t: Time, z: Tensor) -> Tensor:
    """Forward noising from level s to a noisier t; keeps p_t exactly.

    x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2) z
    """
    ratio = t.alpha / s.alpha
    variance = t.sigma**2 - (ratio * s.sigma) ** 2
    if variance < -1e-9:
        raise OptionError(f"renoise goes from clean to noisy, got t={s.t:.4g} to t={t.t:.4g}.")
    return ratio * x + math.sqrt(max(variance, 0.0)) * z

"""Noising paths x_t = alpha(t) x0 + sigma(t) eps, and what a network says about them.

t = 1 is noise, t = 0 is data; dots are d/dt. The pivot between all conventions is
:class:`Prediction` (x0, eps): both are finite at both ends and do not depend on the path, so a
change of interpolant is a change of (alpha, sigma) only (Albergo et al. 2023, "Stochastic
interpolants"; Kim et al. 2025, arXiv 2503.19385, appendix).

With D = alpha' sigma - alpha sigma' (negative on every noising path):

    v     = alpha' x0 + sigma' eps        x0 = (sigma v - sigma' x) / D
    score = -eps / sigma                  eps = (alpha' x - alpha v) / D
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steering.errors import SteeringError

if TYPE_CHECKING:
    from typing_extensions import Self

    from steering.noise import NoiseKey


@dataclass(frozen=True)
class Time:
    """One noise level: where the solver stands and what the network is told.

    Attributes:
        t: path time, 1 = noise, 0 = data.
        alpha, sigma: x_t = alpha x0 + sigma eps, exact.
        net: the number handed to the network (a scheduler's timestep; may be truncated by it).
        end: the last node of a grid; no noise is added on the way there.
    """

    t: float
    alpha: float
    sigma: float
    net: float
    end: bool = False

    @property
    def log_snr(self) -> float:
        """ln(alpha / sigma); +inf on clean data, -inf on pure noise."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    @property
    def share(self) -> float:
        """The noise share sigma / (alpha + sigma): the same in all coordinates."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def pure(self) -> bool:
        """Whether the state is as good as pure noise: 1 / alpha would swamp a step of any length.

        Some schedules of flow models start here, not at alpha = 0 itself (SANA: 3e-4).
        """
        return self.alpha < 0.01 * self.sigma


class Path:
    """A pair of schedules alpha, sigma over t in [0, 1] with their derivatives.

    The four methods take and return float64 tensors of any shape.
    """

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time at which ln(alpha / sigma) has the given value, within [0, 1].

        A level noisier than the path's own t = 1 gives 1 (VP ends at alpha = 0.0066, not at 0).
        The base class bisects.
        """
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(80):
            mid = (low + high) / 2
            cleaner = self.log_snr(mid) > log_snr
            low, high = torch.where(cleaner, mid, low), torch.where(cleaner, high, mid)
        return (low + high) / 2

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha / sigma)."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def at(self, t: float) -> Time:
        """The noise level at path time t."""
        tt = torch.tensor(float(t), dtype=torch.float64)
        return Time(float(t), float(self.alpha(tt)), float(self.sigma(tt)), float(t), end=t == 0)

    def slopes(self, t: float) -> tuple[float, float]:
        """(d alpha / dt, d sigma / dt) at path time t."""
        tt = torch.tensor(float(t), dtype=torch.float64)
        return float(self.d_alpha(tt)), float(self.d_sigma(tt))


@dataclass(frozen=True)
class Linear(Path):
    """alpha = 1 - t, sigma = t: rectified flow (SD3, FLUX, Wan); v = eps - x0."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving with linear beta(t) (Song et al. 2021): alpha^2 + sigma^2 = 1."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def _end(self) -> float:
        return 0.5 * (self.beta_max + self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return 0.5 * t * t * (self.beta_max - self.beta_min) + t * self.beta_min

    def beta(self, t: Tensor) -> Tensor:
        """The diffusion rate."""
        return t * (self.beta_max - self.beta_min) + self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta(t) * torch.exp(-self._integral(t)) / self.sigma(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        total = torch.logaddexp(torch.zeros_like(log_snr), -2.0 * log_snr).clamp_max(self._end)
        span = self.beta_max - self.beta_min
        # The root of a quadratic, written without the difference that loses digits near t = 0.
        return 2.0 * total / (torch.sqrt(self.beta_min**2 + 2.0 * span * total) + self.beta_min)


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr)) * (2.0 / math.pi)


@dataclass(frozen=True)
class VE(Path):
    """Variance exploding, alpha = 1, sigma = sigma_max t (Karras et al. 2022, in units of t)."""

    sigma_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (torch.exp(-log_snr) / self.sigma_max).clamp_max(1.0)


class Tabulated(Path):
    """A discrete schedule, alphas_cumprod [N]: timestep i stands at t = (i + 1) / N, data at 0.

    Between timesteps sigma / alpha is linear, which is how k-diffusion samplers read such a table.
    ``exploding=True`` describes the same model in VE coordinates, x_ve = x_vp / alpha_vp.
    """

    def __init__(self, alphas_cumprod: Tensor, *, exploding: bool = False) -> None:
        table = alphas_cumprod.detach().cpu().double()
        ratio = torch.sqrt((1.0 - table) / table.clamp_min(1e-12))
        self.ratios = torch.cat([torch.zeros(1, dtype=torch.float64), ratio])
        self.steps = len(table)
        self.exploding = exploding

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha."""
        place = (t * self.steps).clamp(0, self.steps)
        low = place.floor().long().clamp(max=self.steps - 1)
        a, b = self.ratios[low], self.ratios[low + 1]
        return a + (place - low) * (b - a)

    def d_ratio(self, t: Tensor) -> Tensor:
        """Slope of sigma / alpha: the central difference of the table."""
        h = 1.0 / self.steps
        left, right = (t - h).clamp_min(0.0), (t + h).clamp_max(1.0)
        return (self.ratio(right) - self.ratio(left)) / (right - left)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t) if self.exploding else torch.rsqrt(1.0 + self.ratio(t) ** 2)

    def sigma(self, t: Tensor) -> Tensor:
        return self.ratio(t) * self.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        if self.exploding:
            return torch.zeros_like(t)
        return -self.ratio(t) * self.d_ratio(t) * self.alpha(t) ** 3

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.d_ratio(t) * (1.0 if self.exploding else self.alpha(t) ** 3)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network believes about x0 and eps at some x_t, guidance included.

    A subclass may know more of the posterior; all its fields are tensors with the rows first.

    Attributes:
        x0, eps: tensors [n, *event] with x_t = alpha x0 + sigma eps.
    """

    x0: Tensor
    eps: Tensor

    @property
    def mean(self) -> Tensor:
        """Posterior mean of x0, [n, *event]."""
        return self.x0

    @property
    def mode(self) -> Tensor:
        """Best single guess of x0; for a Gaussian summary this is the mean."""
        return self.x0

    def draw(self, m: int, key: NoiseKey) -> Tensor:
        """m samples of x0 given x_t, [m, n, *event], where the model knows its posterior."""
        raise SteeringError(
            "This model's posterior of x0 is known by its mean only, so no samples can be drawn "
            "from it. Use n_draws=1, or look-ahead steps (lookahead=k), whose ends are samples."
        )

    def rows(self, index: Tensor | slice) -> Self:
        """The prediction of some rows."""
        kind = type(self)
        return kind(**{name: getattr(self, name)[index] for name in _names(kind)})

    def score(self, t: Times) -> Tensor:
        """Gradient of log p_t at x_t, [n, *event]; singular at sigma = 0."""
        return -self.eps / coefficient(t, lambda level: level.sigma, self.eps)

    def velocity(self, path: Path, t: float) -> Tensor:
        """dx/dt of the probability flow on ``path`` at path time t, [n, *event]."""
        da, ds = path.slopes(t)
        return da * self.x0 + ds * self.eps

    @staticmethod
    def cat(parts: Sequence[Prediction]) -> Prediction:
        """Joins predictions along the batch."""
        if len(parts) == 1:
            return parts[0]
        kind = type(parts[0])
        return kind(**{k: torch.cat([getattr(p, k) for p in parts]) for k in _names(kind)})


@functools.cache
def _names(kind: type[Prediction]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


Times = Time | Sequence[Time]


def coefficient(t: Times, read: Callable[[Time], float], like: Tensor) -> float | Tensor:
    """A number of a noise level, or a column [n, 1, ...] of them where each row has its own."""
    if isinstance(t, Time):
        return read(t)
    values = torch.tensor([read(s) for s in t], dtype=like.dtype, device=like.device)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def alpha_sigma(t: Times, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(alpha, sigma) ready to multiply ``like``."""
    return coefficient(t, lambda s: s.alpha, like), coefficient(t, lambda s: s.sigma, like)


def from_eps(x: Tensor, eps: Tensor, t: Times) -> Prediction:
    """From predicted noise; needs alpha > 0."""
    a, s = alpha_sigma(t, x)
    return Prediction((x - s * eps) / a, eps)


def from_x0(x: Tensor, x0: Tensor, t: Times) -> Prediction:
    """From a predicted clean sample; needs sigma > 0."""
    a, s = alpha_sigma(t, x)
    return Prediction(x0, (x - a * x0) / s)


def from_flow(x: Tensor, velocity: Tensor, t: Times) -> Prediction:
    """From a rectified-flow velocity eps - x0 on the linear path."""
    a, s = alpha_sigma(t, x)
    return Prediction(x - s * velocity, x + a * velocity)


def from_v(x: Tensor, v: Tensor, t: Times) -> Prediction:
    """From v = a eps - s x0 with (a, s) = (alpha, sigma) / r, r = |(alpha, sigma)|.

    Salimans & Ho 2022 define v on a variance-preserving path; in VE coordinates r is not 1.
    """
    a, s = alpha_sigma(t, x)
    r = (a * a + s * s) ** 0.5
    return Prediction((a * x / r - s * v) / r, (s * x / r + a * v) / r)


def from_velocity(x: Tensor, v: Tensor, path: Path, t: float) -> Prediction:
    """From the velocity of any path at path time t."""
    time = path.at(t)
    da, ds = path.slopes(t)
    det = da * time.sigma - time.alpha * ds
    return Prediction((time.sigma * v - ds * x) / det, (da * x - time.alpha * v) / det)


def convert(x: Tensor, source: Time, target: Path) -> tuple[Tensor, float]:
    """Moves a state to another path at equal log-SNR: (x', t') with x' = c x.

    The network is then asked at the old (x, t) and its (x0, eps) holds on both paths.
    """
    log_snr = torch.tensor(source.log_snr, dtype=torch.float64)
    t = float(target.t_of_log_snr(log_snr))
    new = target.at(t)
    scale = new.sigma / source.sigma if source.sigma > 0 else new.alpha / source.alpha
    return scale * x, t

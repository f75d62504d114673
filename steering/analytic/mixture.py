"""A mixture of isotropic Gaussians as a diffusion model with exact predictions.

With data law sum_k w_k N(m_k, s_k^2 I) and x_t = alpha x0 + sigma eps, every conditional law is a
mixture again (Bishop 2006, "Pattern recognition and machine learning", section 2.3). Per component

    v_k = alpha^2 s_k^2 + sigma^2              responsibility ~ w_k N(x; alpha m_k, v_k I)
    E[x0 | x, k]  = m_k + alpha s_k^2 / v_k (x - alpha m_k)
    E[eps | x, k] = sigma / v_k (x - alpha m_k)
    var[x0 | x, k] = s_k^2 sigma^2 / v_k       (per coordinate)

None of these divides by alpha or sigma, so both ends of the path are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steering.analytic.tilts import Tilt
from steering.errors import OptionError, SteeringError
from steering.grids import Grid, on_path, uniform
from steering.noise import NoiseKey, categorical
from steering.paths import Linear, Path, Prediction, Time, Times, alpha_sigma
from steering.transitions import Step

_LINEAR = Linear()
_Numbers = Tensor | Sequence[float]


@dataclass(frozen=True, eq=False)
class MixturePrediction(Prediction):
    """The exact posterior of x0 given x_t: a mixture again.

    Attributes:
        log_resp: log p(k | x_t), [n, K].
        means: E[x0 | x_t, k], [n, K, D].
        variances: var[x0 | x_t, k] per coordinate, [n, K].
    """

    log_resp: Tensor
    means: Tensor
    variances: Tensor

    @property
    def responsibilities(self) -> Tensor:
        """p(k | x_t), [n, K]."""
        return self.log_resp.exp()

    @property
    def mode(self) -> Tensor:
        """The mean of the likeliest component, [n, D]."""
        best = self.log_resp.argmax(1)
        return self.means[torch.arange(len(best)), best]

    @property
    def spread(self) -> Tensor:
        """Trace of the posterior covariance of x0, [n]."""
        within = self.means.shape[-1] * self.variances
        apart = (self.means - self.x0[:, None]).square().sum(-1)
        return (self.responsibilities * (within + apart)).sum(1)

    def draw(self, m: int, key: NoiseKey) -> Tensor:
        """m exact samples of x0 given x_t, [m, n, D]; row i uses slot key.slot + i."""
        n, _, d = self.means.shape
        z = key.normal(n, (m, d)).to(self.x0)
        k = categorical(self.responsibilities[:, None], key.uniform(n, (m,)))
        rows = torch.arange(n)[:, None]
        std = self.variances[rows, k].sqrt()[..., None]
        return (self.means[rows, k] + std * z).transpose(0, 1)


class GaussianMixture:
    """sum_k w_k N(m_k, s_k^2 I) in D dimensions, a :class:`~steering.model.Model` in float64.

    All prompts share the one law, so several conditions can be run through one model.

    Args:
        weights: [K], not negative; normalised here.
        means: [K, D]; a vector [K] is read as D = 1.
        stds: [K], positive.
        path: any noising path.
        steps: length of the uniform grid, unless ``grid`` is given.
        kernel: "exact" makes :class:`ExactReverse` the model's own ``transition``; with "path" it
            is None and transitions go by the prediction, as for a network.
        prompts: one entry per condition.

    Raises:
        OptionError: the shapes do not fit, or a weight or std is out of range.
    """

    name = "gaussian-mixture"
    dtype = torch.float64
    device = torch.device("cpu")
    mixed_times = True

    def __init__(
        self,
        weights: _Numbers,
        means: Tensor | Sequence[float] | Sequence[Sequence[float]],
        stds: _Numbers,
        *,
        path: Path = _LINEAR,
        steps: int = 20,
        grid: Grid | None = None,
        kernel: Literal["path", "exact"] = "path",
        prompts: tuple[str | None, ...] = (None,),
    ) -> None:
        self.weights, self.stds = _doubles(weights), _doubles(stds)
        self.means = _doubles(means)
        if self.means.ndim == 1:
            self.means = self.means[:, None]
        _check(self.weights, self.means, self.stds, kernel)
        self.weights = self.weights / self.weights.sum()
        self.kernel: Literal["path", "exact"] = kernel
        self.path, self.prompts = path, prompts
        self.event_shape = (self.means.shape[1],)
        self.rows = 0
        self._grid = on_path(path, uniform(steps)) if grid is None else grid
        self.transition = ExactReverse(self) if kernel == "exact" else None

    def grid(self) -> Grid:
        """The noise levels given at construction."""
        return self._grid

    def costs(self) -> tuple[int, ...]:
        """One row per sample and step."""
        return (1,) * len(self._grid)

    def noise(self, n: int, key: NoiseKey, *, cond: int = 0) -> Tensor:
        """Exact draws of p_t at the first node of the grid, [n, D]; N(0, I) where alpha is 0."""
        start = self._grid.times[0]
        z = key.normal(n, self.event_shape).double()
        k = categorical(self.weights, key.uniform(n))
        std = torch.sqrt(start.alpha**2 * self.stds[k] ** 2 + start.sigma**2)
        return start.alpha * self.means[k] + std[:, None] * z

    def predict(
        self, x: Tensor, t: Times, *, cond: int | Sequence[int] = 0, grad: bool = False
    ) -> MixturePrediction:
        """The exact posterior summary at x [n, D]; differentiable in x where ``grad``."""
        self.rows += len(x)
        with torch.set_grad_enabled(grad):
            return self.posterior(x, t)

    def decode(self, x0: Tensor, *, grad: bool = False) -> Tensor:
        """Samples are their own pictures: x0 itself, [n, D]."""
        return x0

    def close(self) -> None:
        """Nothing to free."""

    def posterior(self, x: Tensor, t: Times) -> MixturePrediction:
        """The posterior of x0 given x_t = x; not counted as a network call."""
        x = x.double()
        alpha, sigma = _columns(t, x)
        joint, gap, var = self._joint(x, alpha, sigma)
        log_resp = torch.log_softmax(joint, 1)
        prior = self.stds.square()
        means = self.means + (alpha * prior / var)[..., None] * gap
        resp = log_resp.exp()[..., None]
        return MixturePrediction(
            x0=(resp * means).sum(1),
            eps=(resp * (sigma / var)[..., None] * gap).sum(1),
            log_resp=log_resp,
            means=means,
            variances=(prior * sigma**2 / var).expand(len(x), -1),
        )

    def log_prob(self, x: Tensor, t: Times | None = None) -> Tensor:
        """log p_t(x), [n]; of the data law without ``t``."""
        x = x.double()
        alpha, sigma = _columns(self.path.at(0.0) if t is None else t, x)
        return torch.logsumexp(self._joint(x, alpha, sigma)[0], 1)

    def score(self, x: Tensor, t: Times) -> Tensor:
        """Gradient of log p_t at x, [n, D]; finite at sigma = 0 too."""
        x = x.double()
        joint, gap, var = self._joint(x, *_columns(t, x))
        return -(torch.softmax(joint, 1)[..., None] * gap / var[..., None]).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact draws of the data law, [n, D]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, *self.event_shape, dtype=torch.float64, generator=generator)
        return self.means[k] + self.stds[k, None] * z

    def marginal(self, t: Time) -> GaussianMixture:
        """p_t itself, as a data law."""
        stds = torch.sqrt(t.alpha**2 * self.stds**2 + t.sigma**2)
        return self._like(self.weights, t.alpha * self.means, stds)

    def project(self, b: _Numbers, c: float = 0.0) -> GaussianMixture:
        """The law of b . x + c, a mixture in one dimension."""
        b = _doubles(b).reshape(-1)
        return GaussianMixture(self.weights, self.means @ b + c, b.norm() * self.stds)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the data law."""
        mean = self.weights @ self.means
        gap = self.means - mean
        within = (self.weights @ self.stds.square()) * torch.eye(len(mean), dtype=torch.float64)
        return mean, within + (self.weights * gap.T) @ gap

    def cdf(self, x: Tensor) -> Tensor:
        """P(sample <= x) of a mixture in one dimension, of x's shape."""
        if self.event_shape != (1,):
            raise OptionError(f"cdf needs one dimension, this mixture has {self.event_shape[0]}.")
        z = (x.double()[..., None] - self.means[:, 0]) / self.stds
        return torch.special.ndtr(z) @ self.weights

    def deviation(self, x: Tensor, weights: Tensor | None = None) -> float:
        """How far samples [n] or [n, 1] in one dimension are from this law, in standard errors.

        Neyman's smooth test (1937): with u = cdf(x), each sqrt(2) cos(pi k u), k = 1 .. 8, has
        mean 0 and variance 1 exactly when x follows the law. Returns the largest |mean| over its
        standard error; for weighted samples [n] the error counts the weights as fixed.
        """
        u = self.cdf(x.flatten())
        share = torch.ones_like(u) if weights is None else weights.double()
        share = share / share.sum()
        waves = torch.cos(math.pi * torch.arange(1, 9, dtype=torch.float64) * u[:, None])
        means = math.sqrt(2.0) * (share @ waves)
        return float((means / share.norm()).abs().max())

    def expected_max(self, n: int) -> float:
        """E[largest of n draws] in one dimension: integral of 1 - F^n above the lowest value.

        ``project(b, c).expected_max(n)`` is what best-of-n earns under a linear reward.
        """
        reach = 12.0 * self.stds
        low = float((self.means[:, 0] - reach).min())
        high = float((self.means[:, 0] + reach).max())
        x = torch.linspace(low, high, 40001, dtype=torch.float64)
        return low + float(torch.trapezoid(1.0 - self.cdf(x) ** n, x))

    # --- tilting by exp(reward_scale * r) ---

    def tilted(self, reward: Tilt, reward_scale: float = 1.0) -> GaussianMixture:
        """The law proportional to p(x0) exp(reward_scale r(x0)), a mixture with this path."""
        mass, means, variances = reward.tilt(self.means, self.stds.square(), reward_scale)
        weights = torch.softmax(torch.log(self.weights) + mass, 0)
        return self._like(weights, means, variances.sqrt())

    def log_normaliser(self, reward: Tilt, reward_scale: float = 1.0) -> float:
        """log E[exp(reward_scale r(x0))] under the data law."""
        mass, _, _ = reward.tilt(self.means, self.stds.square(), reward_scale)
        return float(torch.logsumexp(torch.log(self.weights) + mass, 0))

    def value(self, x: Tensor, t: Times, reward: Tilt, reward_scale: float = 1.0) -> Tensor:
        """The soft value log E[exp(reward_scale r(x0)) | x_t = x], [n]; differentiable in x."""
        post = self.posterior(x, t)
        mass, _, _ = reward.tilt(post.means, post.variances, reward_scale)
        return torch.logsumexp(post.log_resp + mass, 1)

    def _like(self, weights: Tensor, means: Tensor, stds: Tensor) -> GaussianMixture:
        return GaussianMixture(
            weights,
            means,
            stds,
            path=self.path,
            grid=self._grid,
            kernel=self.kernel,
            prompts=self.prompts,
        )

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N(x; alpha m_k, v_k I) [n, K], x - alpha m_k [n, K, D] and v_k [n or 1, K]."""
        var = (alpha * self.stds) ** 2 + sigma**2
        gap = x[:, None] - alpha[..., None] * self.means
        dims = x.shape[1]
        log_n = -0.5 * (gap.square().sum(-1) / var + dims * torch.log(2.0 * math.pi * var))
        return torch.log(self.weights) + log_n, gap, var


class ExactReverse:
    """p(x_u | x_t) of a mixture without approximation, so no step is too long.

    A component is drawn by its responsibility, then the Gaussian conditional is drawn: the
    forward kernel x_t = r x_u + N(0, q), r = alpha_t / alpha_u, q = sigma_t^2 - r^2 sigma_u^2,
    inverted by Bayes' rule. The law is not Gaussian, so the move is ``propose``, not a Step.
    Unlike the eta-kernel, it is random on the way to the end of a grid as well.
    """

    preserves_marginals = True
    stochastic = True

    def __init__(self, model: GaussianMixture) -> None:
        self.model = model

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step:
        """Refuses: this law is no Gaussian step."""
        raise SteeringError(
            "The exact reverse kernel of a mixture is not one Gaussian, so it has no mean and "
            "std. Draw from it with propose(), or use EtaKernel for methods that need a density."
        )

    def propose(
        self, x: Tensor, pred: Prediction, t: Times, u: Times, z: Tensor, uniform: Tensor
    ) -> Tensor:
        """x_u given x_t = x, [n, D], from normals z [n, D] and uniforms [n].

        ``pred`` is what ``predict`` said at (x, t).
        """
        if not isinstance(pred, MixturePrediction):
            pred = self.model.posterior(x, t)
        means, variances = self._components(x, t, u)
        k = categorical(pred.responsibilities, uniform)
        rows = torch.arange(len(x))
        std = variances.expand(len(x), -1)[rows, k].sqrt()
        return means[rows, k] + std[:, None] * z.to(means)

    def log_prob(self, x_u: Tensor, x: Tensor, t: Times, u: Times) -> Tensor:
        """log p(x_u | x_t = x), [n]."""
        means, variances = self._components(x, t, u)
        gap = (x_u.double()[:, None] - means).square().sum(-1)
        log_n = -0.5 * (gap / variances + x.shape[1] * torch.log(2.0 * math.pi * variances))
        return torch.logsumexp(self.model.posterior(x, t).log_resp + log_n, 1)

    def _components(self, x: Tensor, t: Times, u: Times) -> tuple[Tensor, Tensor]:
        """Mean [n, K, D] and variance [n or 1, K] of x_u given x_t and the component."""
        model, x = self.model, x.double()
        (at, st), (au, su) = _columns(t, x), _columns(u, x)
        ratio = at / au
        var_u = (au * model.stds) ** 2 + su**2
        var_t = (at * model.stds) ** 2 + st**2
        forward = (st**2 - (ratio * su) ** 2).clamp_min(0.0)
        gap = x[:, None] - at[..., None] * model.means
        means = au[..., None] * model.means + (ratio * var_u / var_t)[..., None] * gap
        return means, var_u * forward / var_t


def _columns(t: Times, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma as columns, [1, 1] for one level or [n, 1] for one per row."""
    alpha, sigma = alpha_sigma(t, x)
    return (
        torch.as_tensor(alpha, dtype=x.dtype).reshape(-1, 1),
        torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1),
    )


def _doubles(values: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach()


def _check(weights: Tensor, means: Tensor, stds: Tensor, kernel: str) -> None:
    if not len(weights) == len(means) == len(stds) or means.ndim != 2:
        raise OptionError(
            "A mixture needs weights [K], means [K, D] and stds [K], got shapes "
            f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(stds.shape)}."
        )
    if not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise OptionError(f"Weights must not be negative, got {weights.tolist()}.")
    if not bool((stds > 0).all()):
        raise OptionError(f"Stds must be positive, got {stds.tolist()}.")
    if kernel not in ("path", "exact"):
        raise OptionError(f"kernel must be 'path' or 'exact', got {kernel!r}.")

"""Weighted particles: one state, one gather, weights that are carried and never dropped.

The master recursion of sequential Monte Carlo in log space is

    log_w += phi_new - phi + log p(x_u | x_t) - log q(x_u | x_t)

and resampling with probabilities p [n] sends (x, log_w) to (x[A], (log_w - log(n p))[A]). With
p proportional to the weights this leaves every particle at the mean weight, so the normaliser is
carried by the weights themselves: Z_hat = mean(exp(log_w)) at the end, whatever happened before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from steering.errors import NoWeightError
from steering.noise import NoiseKey
from steering.paths import Prediction
from steering.resampling import Scheme


@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """A population. Everything that belongs to a particle lives here and moves with it.

    Attributes:
        x: [n, *event].
        log_w: [n] float64, importance weights including the running normaliser.
        phi: [n] float64, the cumulative log potential already in ``log_w``.
        root: [n] int64, the first ancestor.
        prediction: the network's answer at this x, if still valid.
        memory: further per-particle tensors of a method (running maxima, cached gradients).
    """

    x: Tensor
    log_w: Tensor
    phi: Tensor
    root: Tensor
    prediction: Prediction | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, x: Tensor, **memory: Tensor) -> State:
        """Equal weights 1, no potential yet, each particle its own root."""
        n = len(x)
        zeros = torch.zeros(n, dtype=torch.float64)
        return cls(x=x, log_w=zeros, phi=zeros, root=torch.arange(n), memory=memory)

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, ancestors: Tensor) -> State:
        """The state of the children: every tensor is indexed, none can be forgotten."""
        return replace(
            self, **{f.name: _take(getattr(self, f.name), ancestors) for f in fields(self)}
        )

    def set_potential(self, phi: Tensor) -> State:
        """Weights for a new cumulative potential [n] (float64).

        A potential of -inf is final: such a particle keeps weight zero until it is resampled.
        """
        phi = phi.double().to(self.log_w.device)
        dead = torch.isneginf(self.phi) | torch.isneginf(phi)
        log_w = (self.log_w + phi - self.phi).masked_fill(dead, -math.inf)
        return replace(self, log_w=log_w, phi=phi.masked_fill(dead, -math.inf))


def _take(value: Any, index: Tensor) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, Prediction):
        return value.rows(index.to(value.x0.device))
    if isinstance(value, dict):
        return {k: _take(v, index) for k, v in value.items()}
    return value


def normalise(log_w: Tensor) -> Tensor:
    """exp(log_w) scaled to sum to 1, float64.

    Raises:
        NoWeightError: all weights are zero.
    """
    top = log_w.max()
    if not math.isfinite(float(top)):
        raise NoWeightError(
            f"All {len(log_w)} particles have weight zero (rewards of -inf), so none can be "
            "chosen. Check the reward, or lower reward_scale."
        )
    w = torch.exp(log_w.double() - top)
    return w / w.sum()


def ess(log_w: Tensor) -> float:
    """Effective sample size 1 / sum W^2, between 1 and n; of equal weights n, however rounded."""
    size, n = float(1.0 / normalise(log_w).square().sum()), len(log_w)
    return float(n) if size > n * (1.0 - 1e-12) else size


def log_mean_exp(log_w: Tensor) -> float:
    """ln mean exp(log_w): the estimate of ln Z."""
    return float(torch.logsumexp(log_w.double(), 0)) - math.log(len(log_w))


def resample(
    state: State,
    scheme: Scheme,
    key: NoiseKey,
    *,
    m: int | None = None,
    probabilities: Tensor | None = None,
) -> tuple[State, Tensor]:
    """Draws m children (default: as many as parents) and their residual weights.

    Args:
        probabilities: [n] resampling probabilities; the normalised weights by default. Any other
            choice (annealed, look-ahead) stays exact because the residual weight is kept.

    Returns:
        The children's state and their ancestors [m].
    """
    n = len(state)
    p = normalise(state.log_w) if probabilities is None else probabilities / probabilities.sum()
    ancestors = scheme(p, n if m is None else m, key)
    left = state.log_w - torch.log(n * p)
    return replace(state, log_w=left).gather(ancestors), ancestors

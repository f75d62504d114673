"""Rewards under which a Gaussian stays Gaussian: E[exp(scale r(x)); x ~ N(m, v I)] is closed.

Each is a plain callable, samples [n, D] -> rewards [n], so it can steer any model too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from steering.errors import OptionError

_Numbers = Tensor | Sequence[float] | float


class Tilt(Protocol):
    """A reward that knows what it does to a Gaussian."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def tilt(
        self, means: Tensor, variances: Tensor, reward_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log mass [...], means [..., D], variances [...]) of N(means, variances I) exp(scale r).

        The log mass is log E[exp(scale r(x))] under the Gaussian.
        """
        ...


class LinearReward:
    """r(x) = b . x + c. Tilting moves each Gaussian by scale * variance * b."""

    def __init__(self, b: _Numbers, c: float = 0.0) -> None:
        self.b, self.c = _vector(b), c

    def __call__(self, x: Tensor) -> Tensor:
        return x.double() @ self.b + self.c

    def tilt(
        self, means: Tensor, variances: Tensor, reward_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Tilt`; the moment generating function of a Gaussian."""
        b = reward_scale * self.b
        mass = means @ b + 0.5 * variances * b.square().sum() + reward_scale * self.c
        return mass, means + variances[..., None] * b, variances


class QuadraticReward:
    """r(x) = -precision/2 |x - center|^2: tilting is a Gaussian observation of x at ``center``."""

    def __init__(self, center: _Numbers, precision: float = 1.0) -> None:
        self.center, self.precision = _vector(center), precision

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * self.precision * (x.double() - self.center).square().sum(-1)

    def tilt(
        self, means: Tensor, variances: Tensor, reward_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Tilt`; completing the square.

        Raises:
            OptionError: a negative precision outweighs the Gaussian, so the mass is infinite.
        """
        q = reward_scale * self.precision
        shrink = 1.0 + q * variances
        if not bool((shrink > 0).all()):
            raise OptionError(
                f"The tilted law has no finite mass: reward_scale * precision = {q:.4g} outweighs "
                f"a variance of {float(variances.max()):.4g}. Need > {-1 / variances.max():.4g}."
            )
        gap = (means - self.center).square().sum(-1)
        mass = -0.5 * (means.shape[-1] * torch.log(shrink) + q * gap / shrink)
        moved = (means + (q * variances)[..., None] * self.center) / shrink[..., None]
        return mass, moved, variances / shrink


class TableReward:
    """One number per state of a finite chain, r[S].

    States [n, 1] (integers) are looked up; probabilities [n, S] (floats) give the expected reward.
    """

    def __init__(self, table: _Numbers) -> None:
        self.table = _vector(table)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype.is_floating_point and x.shape[-1] == len(self.table) > 1:
            return x.double() @ self.table
        return self.table[x.long().flatten()]


def _vector(value: _Numbers) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1)

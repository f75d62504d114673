"""Penalties that keep optimised noise where noise lives; every one is per row and 0-cost for NFE.

A network has only seen noise from N(0, I). An optimiser that leaves the typical set finds inputs
that fool the reward and pictures that nobody would call samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steering.noise import NoiseKey

_BLOCK = 4
"""Length k of the vectors whose mean and covariance DNO tests."""
_PERMUTATIONS = 16
_LN2 = math.log(2.0)


def radius(z: Tensor, key: NoiseKey) -> Tensor:
    """|z|^2 / 2 - (d - 1) ln |z|, [n]: minus the log density of the norm of N(0, I_d).

    Smallest at |z| = sqrt(d - 1). Sees the radius alone: noise that repeats itself passes.
    Source: ReNO (Eyring et al. 2024); first used for flows in D-Flow (Ben-Hamu et al. 2024).
    """
    del key
    flat = z.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    return 0.5 * norm.square() - (flat.shape[1] - 1) * norm.log()


def probability(z: Tensor, key: NoiseKey) -> Tensor:
    """Minus the log of two concentration bounds on mean and covariance, [n].

    z is cut into vectors of four numbers; their mean and covariance are tested against N(0, I),
    as z stands and after random permutations. For noise of N(0, I) it is 4 ln 2 with slope zero;
    it grows with a common offset, with repetition and with too large a radius.

    Source: DNO (Tang et al. 2024), equations of its probability regularisation.
    """
    flat = z.flatten(1)
    d = flat.shape[1] // _BLOCK * _BLOCK
    if d == 0:  # too few numbers to test anything
        return 0.0 * flat.sum(1)
    order = key.uniform(_PERMUTATIONS, (flat.shape[1],)).argsort(1).to(z.device)
    shuffled = _log_bounds(flat[:, order[:, :d]]).mean(1)
    return -_log_bounds(flat[:, :d]) - shuffled


def _log_bounds(flat: Tensor) -> Tensor:
    """ln p of the mean plus ln p of the covariance, [...]; at most -2 ln 2."""
    vectors = flat.unflatten(-1, (-1, _BLOCK))
    n = vectors.shape[-2]
    mean = vectors.mean(-2)
    eye = torch.eye(_BLOCK, dtype=flat.dtype, device=flat.device)
    covariance = vectors.transpose(-1, -2) @ vectors / n - eye
    # The spectral norm from eigenvalues: those of a symmetric matrix have a stable slope.
    spectral = torch.linalg.eigvalsh(covariance).abs().amax(-1)
    excess = (torch.sqrt(1.0 + spectral) - 1.0 - math.sqrt(_BLOCK / n)).clamp_min(0.0)
    of_mean = -n * mean.square().sum(-1) / (2 * _BLOCK)
    of_covariance = -0.5 * n * excess.square()
    return of_mean.clamp_max(-_LN2) + of_covariance.clamp_max(-_LN2)


Regulariser = Callable[[Tensor, NoiseKey], Tensor]
REGULARISERS: dict[str, Regulariser] = {"radius": radius, "probability": probability}


def slope(name: str, z: Tensor, key: NoiseKey) -> Tensor:
    """The derivative of a regulariser by z, like z; its graph is its own and ends here."""
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        value = REGULARISERS[name](leaf, key).sum()
    return torch.autograd.grad(value, leaf)[0]

"""Resampling schemes: normalised weights to ancestors.

Each scheme takes weights w [n] (float64, summing to 1), the number m of children and a
:class:`~steering.noise.NoiseKey`, and returns ancestors [m] (int64). Every scheme is unbiased:
index i gets m w_i children on average, and none where w_i = 0.

Source: Chopin & Papaspiliopoulos (2020), "An Introduction to Sequential Monte Carlo", chapter 9;
Gerber, Chopin & Whiteley (2019) for SSP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steering.errors import OptionError, unknown_name
from steering.noise import NoiseKey

Scheme = Callable[[Tensor, int, NoiseKey], Tensor]


def _inverse_cdf(w: Tensor, points: Tensor) -> Tensor:
    """The index whose share of [0, 1) holds each point; weightless indices hold none."""
    total = w.cumsum(0)
    total = total / total[-1]
    index = torch.searchsorted(total, points.contiguous(), right=True)
    last = int(w.nonzero().max())
    return index.clamp_max(last)


def multinomial(w: Tensor, m: int, key: NoiseKey) -> Tensor:
    """m independent draws, sorted. Loses a third of the particles even at equal weights."""
    return _inverse_cdf(w, key.uniform(m)).sort().values


def stratified(w: Tensor, m: int, key: NoiseKey) -> Tensor:
    """One independent point in each of m equal strata."""
    return _inverse_cdf(w, (torch.arange(m, dtype=torch.float64) + key.uniform(m)) / m)


def systematic(w: Tensor, m: int, key: NoiseKey) -> Tensor:
    """One point, repeated in m strata: i gets floor(m w_i) or ceil(m w_i) children."""
    return _inverse_cdf(w, (torch.arange(m, dtype=torch.float64) + key.uniform(1)) / m)


def residual(w: Tensor, m: int, key: NoiseKey) -> Tensor:
    """floor(m w_i) sure children, the rest multinomial on what remains."""
    counts = _floor(m * w)
    rest = m - int(counts.sum())
    sure = torch.repeat_interleave(torch.arange(len(w)), counts)
    if rest == 0:
        return sure
    left = (m * w - counts).clamp_min(0.0)
    return torch.cat([sure, multinomial(left / left.sum(), rest, key)]).sort().values


def ssp(w: Tensor, m: int, key: NoiseKey) -> Tensor:
    """Srinivasan sampling: floor or ceil of m w_i children, negatively associated.

    Fractions meet in pairs; each meeting leaves at least one of the two a whole number
    (the pivotal method). Unlike systematic resampling it is consistent for any order.
    """
    counts = _floor(m * w)
    fraction = (m * w - counts).clamp(0.0, 1.0).tolist()
    u = key.uniform(max(len(w) - 1, 1)).tolist()
    pending = 0
    for k in range(1, len(fraction)):
        pending = _meet(fraction, counts, pending, k, u[k - 1])
    if int(counts.sum()) < m:
        counts[pending] += 1  # the last fraction is 1 up to rounding
    return torch.repeat_interleave(torch.arange(len(w)), counts)


def _meet(fraction: list[float], counts: Tensor, i: int, j: int, u: float) -> int:
    """Settles two fractional counts; returns the index still pending."""
    a, b = fraction[i], fraction[j]
    if a + b <= 0.0:
        return j
    if a + b < 1.0:
        winner, loser = (i, j) if u < a / (a + b) else (j, i)
        fraction[winner], fraction[loser] = a + b, 0.0
        return winner
    spare = (1.0 - a) + (1.0 - b)
    full, other = (i, j) if spare <= 0.0 or u < (1.0 - b) / spare else (j, i)
    counts[full] += 1
    fraction[full], fraction[other] = 0.0, a + b - 1.0
    return other


def killing(w: Tensor, m: int, key: NoiseKey) -> Tensor:
    """Keeps i with probability w_i / max w, replaces it by a multinomial draw otherwise.

    Touches nothing at equal weights: the best scheme for many small steps. Needs m = n.
    """
    n = len(w)
    if m != n:
        raise OptionError(f"'killing' keeps the number of particles: asked for {m} of {n}.")
    keep = key.uniform(n) * w.max() < w
    fresh = _inverse_cdf(w, key.at(slot=key.slot + n).uniform(n))
    return torch.where(keep, torch.arange(n), fresh)


def _floor(counts: Tensor) -> Tensor:
    # m * w may fall an ulp short of a whole number, which would lose a sure child.
    return torch.floor(counts + 1e-9).long()


SCHEMES: dict[str, Scheme] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "killing": killing,
    "multinomial": multinomial,
}


def scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        OptionError: unknown name, with the nearest one.
    """
    if name not in SCHEMES:
        raise unknown_name("resampler", name, SCHEMES)
    return SCHEMES[name]

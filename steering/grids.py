"""Time grids: the noise levels a sampler visits, from noise to data.

A grid is a tuple of :class:`~steering.paths.Time`; the pipeline's own grid carries its exact
(timestep, sigma) pairs. The other grids are shapes in [0, 1] that any path can be asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from steering.errors import OptionError
from steering.paths import Linear, Path, Time

_QUIET = 0.02
"""A noise share, sigma / (alpha + sigma), at which a sample is as good as finished."""


@dataclass(frozen=True)
class Grid:
    """Noise levels from noisiest to clean; n + 1 nodes make n steps."""

    times: tuple[Time, ...]

    def __post_init__(self) -> None:
        if len(self.times) < 2:
            raise OptionError(f"A grid needs at least 2 nodes, got {len(self.times)}.")
        levels = [time.log_snr for time in self.times]
        for i, (a, b) in enumerate(pairwise(levels)):
            if not b > a:
                here, there = self.times[i].t, self.times[i + 1].t
                raise OptionError(
                    f"A grid must go from noise to data: node {i + 1} (t={there:.4g}) is not "
                    f"cleaner than node {i} (t={here:.4g})."
                )

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.times) - 1

    def steps(self) -> Iterator[tuple[Time, Time]]:
        """Pairs (from, to), noisiest first."""
        return pairwise(self.times)

    @functools.cached_property
    def quiet(self) -> int:
        """The first step that ends with hardly any noise: copies made from there on stay copies.

        The last one, as a rule; the one before it where a schedule comes to its smallest noise
        level before it comes to none, as SD3's does (0.001).
        """
        u = self.times[-2]
        return len(self) - 1 - (u.sigma <= _QUIET * (u.alpha + u.sigma) and len(self) > 1)

    def nearest(self, fraction: float) -> int:
        """The step index at which the given fraction of all steps has been made."""
        return min(len(self), max(0, math.floor(fraction * len(self) + 0.5)))

    def index_of_sigma(self, noise_fraction: float) -> int:
        """The first node whose noise share sigma / (alpha + sigma) is at or below the value."""
        for i, time in enumerate(self.times):
            # A node that was asked for by its share counts, however that was rounded.
            if time.sigma <= (1.0 + 1e-9) * noise_fraction * (time.alpha + time.sigma):
                return i
        return len(self)


def on_path(path: Path, ts: Sequence[float]) -> Grid:
    """A grid through the given path times.

    Raises:
        OptionError: the times do not fall from at most 1 to 0.
    """
    if len(ts) < 2 or ts[0] > 1.0 or ts[-1] != 0.0:
        raise OptionError(f"Path times must fall from at most 1 to 0, got {list(ts)}.")
    times = [path.at(t) for t in ts]
    return Grid((*times[:-1], replace(times[-1], end=True)))


def uniform(n: int) -> list[float]:
    """1, (n - 1) / n, ..., 0."""
    return [1.0 - u for u in _ramp(n)]


def shifted(n: int, shift: float = 3.0) -> list[float]:
    """Uniform with the odds t / (1 - t) multiplied by ``shift`` (SD3: 3; FLUX: exp(mu))."""
    if shift <= 0:
        raise OptionError(f"shift must be positive, got {shift}.")
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in uniform(n)]


def sway(n: int, coefficient: float = -1.0) -> list[float]:
    """F5-TTS sway sampling (Chen et al. 2024): more steps near noise for negative values."""
    low, high = -1.0, 2.0 / (math.pi - 2.0)
    if not low <= coefficient <= high:
        raise OptionError(
            f"sway coefficient must lie in [{low}, {high:.3f}] for the grid to be monotone, "
            f"got {coefficient}."
        )
    warped = [u + coefficient * (math.cos(0.5 * math.pi * u) - 1.0 + u) for u in _ramp(n)]
    return [1.0, *[1.0 - tau for tau in warped[1:-1]], 0.0]


def rbf(n: int) -> list[float]:
    """sqrt(1 - u^2) for uniform u (Kim et al. 2025, rollover budget forcing)."""
    return [math.sqrt(1.0 - u * u) for u in _ramp(n)]


def karras(
    n: int, sigma_min: float = 0.02, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """Karras et al. (2022), eq. 5, in VE sigma; returned as linear-path times sigma/(1+sigma).

    ``same_log_snr`` moves them to another path.
    """
    if not 0 < sigma_min < sigma_max:
        raise OptionError(f"Need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = _ramp(n - 1) if n > 1 else _ramp(n)[:1]
    sigmas = [(ends[0] + u * (ends[1] - ends[0])) ** rho for u in ramp]
    return [*[s / (1.0 + s) for s in sigmas], 0.0]


def same_log_snr(ts: Sequence[float], source: Path, target: Path) -> list[float]:
    """The same noise levels on another path; the ends 1 and 0 stay what they are."""
    inner = torch.tensor([t for t in ts if 0.0 < t < 1.0], dtype=torch.float64)
    moved = iter(target.t_of_log_snr(source.log_snr(inner)).tolist())
    return [t if t in (0.0, 1.0) else next(moved) for t in ts]


SHAPES: dict[str, Callable[..., list[float]]] = {
    "uniform": uniform,
    "shifted": shifted,
    "sway": sway,
    "karras": karras,
    "rbf": rbf,
}


def starting_at(first: Time, path: Path, shape: str, n: int) -> Grid:
    """n steps of a shape on a path, from ``first`` on: the starting noise fits no other level.

    Shapes are squeezed below its time (img2img starts late); "karras" goes by noise levels.
    """
    if shape == "karras":
        top = min(80.0, math.exp(-first.log_snr))
        ts = same_log_snr(karras(n, sigma_max=top), Linear(), path)
    else:
        ts = [first.t * t for t in SHAPES[shape](n)]
    return Grid((first, *[path.at(t) for t in ts[1:-1]], replace(path.at(0.0), end=True)))


def _ramp(n: int) -> list[float]:
    if n < 1:
        raise OptionError(f"A grid needs at least one step, got {n}.")
    return [i / n for i in range(n + 1)]

"""Levels and steps of a model on another noising path: change of interpolant without velocities.

With equal log-SNR the states of two paths differ by a scale, x' = c x with c = alpha' / alpha =
sigma' / sigma, and the estimates of x0 and eps are the same (Kim et al. 2025, arXiv 2503.19385;
Albergo et al. 2023). So only a grid of times and the coefficients of a step change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.grids import SHAPES, Grid, starting_at
from steering.paths import Linear, Path, Prediction, Time, Times
from steering.samplers.base import EtaSchedule
from steering.transitions import Step, Transition

_FAINT = 0.01
"""An eta at which proposals are as good as equal."""


def time_on(path: Path, log_snr: float) -> float:
    """The time of a path at which ln(alpha / sigma) has this value."""
    return float(path.t_of_log_snr(torch.tensor(log_snr, dtype=torch.float64)))


class OnPath:
    """A transition made in the coordinates of another path, for states of the model's own.

    The eta-kernel does not change by this; Euler-Maruyama steps do, by their g and their error.
    """

    def __init__(self, inner: Transition, path: Path) -> None:
        self.inner, self.path = inner, path
        self.preserves_marginals = inner.preserves_marginals

    @property
    def stochastic(self) -> bool:
        """Whether two samplers at the same x can part."""
        return self.inner.stochastic

    def __call__(self, x: Tensor, pred: Prediction, t: Times, u: Times, path: Path) -> Step:
        if not (isinstance(t, Time) and isinstance(u, Time)):
            raise OptionError("Steps on another path take one noise level at a time.")
        (t2, c_t), (u2, c_u) = _matched(self.path, t), _matched(self.path, u)
        step = self.inner(c_t * x, pred, t2, u2, self.path)
        return Step(step.mean / c_u, step.std / c_u)


@functools.lru_cache(maxsize=1024)  # a level is asked for once per proposal
def _matched(path: Path, time: Time) -> tuple[Time, float]:
    """The level of the same log-SNR on another path, and c; its sums are not 0/0 at either end."""
    if time.end:
        there = replace(path.at(0.0), end=True)
    else:
        there = path.at(time_on(path, time.log_snr))
    return there, (there.alpha + there.sigma) / (time.alpha + time.sigma)


def shape_of(
    name: str | Sequence[float], n: int, first: Time, path: Path | None
) -> tuple[Sequence[float] | None, Path | None]:
    """The times of a shape of n steps below a first level, and the path in whose time they are.

    Args:
        name: as in steering.grids, or the times; "own" has none (None).
        path: that of the search; "karras" goes by noise levels instead, as in other methods.
    """
    if not isinstance(name, str):
        return name, path
    if name == "own":
        return None, path
    if name != "karras":
        return SHAPES[name](n), path
    below = starting_at(first, Linear(), name, n).times[1:]
    return [time_on(Linear(), first.log_snr), *[time.t for time in below]], Linear()


def check_noise(kernel: Transition, grid: Grid, last: int) -> None:
    """Raises where an eta schedule leaves a level that is searched without noise.

    Raises:
        OptionError: names the level, its eta and what to change.
    """
    if not isinstance(kernel, EtaSchedule):
        return
    for k, time in enumerate(grid.times[: last + 1]):
        eta = kernel.at(time).eta
        if eta < _FAINT:
            end = f", or set last_level={k - 1}" if k else ""
            raise OptionError(
                f"rbf: level {k} (noise share {time.share:.3g}) adds no noise, so all proposals "
                f"there would be equal: eta is {eta:.2g} there, on the line from "
                f"eta={kernel.eta:g} at pure noise to eta_end={kernel.end:g} on data. Set both "
                f"above {_FAINT:g}{end}."
            )


def rbf_grid(
    model: Path, own: Grid, path: Path | None, shape: Sequence[float] | None, last: int, tail: int
) -> Grid:
    """Levels 0 .. last of a shape, the node after them, and ``tail`` steps from there to data.

    The first node is the pipeline's own, so that its starting noise fits; a shape is squeezed
    below it (img2img starts late).

    Args:
        model, own: path and grid of the model.
        path: in whose time the shape is given; None for the model's.
        shape: times falling from 1 to 0; None for the model's own nodes.
        last: the last level that is searched.
        tail: finishing steps, equal in the model's time.
    """
    first, end = own.times[0], own.times[-1]
    if shape is None:
        searched = list(own.times[: last + 2])
    else:
        clock = model if path is None else path
        start = first.t if path is None else time_on(path, first.log_snr)
        times = [start * r / shape[0] for r in shape[1 : last + 2]]
        searched = [first, *[_node(model, clock, r) for r in times]]
    here = searched[-1].t
    steps = [here + (end.t - here) * k / tail for k in range(1, tail)]
    return Grid((*searched, *[model.at(t) for t in steps], end))


def _node(model: Path, clock: Path, r: float) -> Time:
    """The model's level at time r of another path."""
    if clock is model:
        return model.at(r)
    level = float(clock.log_snr(torch.tensor(r, dtype=torch.float64)))
    if not math.isfinite(level):
        raise OptionError(f"rbf: levels must lie strictly between noise and data, got {r}.")
    return model.at(time_on(model, level))


__all__ = ["OnPath", "check_noise", "rbf_grid", "shape_of", "time_on"]

"""What searches share: walks along the grid, and the best finished sample so far."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Context, as_float64
from steering.paths import Prediction
from steering.requests import Decode, Denoise, Outcome, Request, Score
from steering.samplers.guided import Lead
from steering.samplers.guides import Rows, Visit
from steering.transitions import Transition

_CHUNK = 16
"""Samples decoded together: pictures that do not win are not kept."""

_SHARED = 8.0
"""Standard errors beyond which two starting states share more than chance."""


def walk(
    ctx: Context,
    x: Tensor,
    kernel: Transition,
    *,
    start: int = 0,
    stop: int | None = None,
    stream: str = "proposal",
    slots: Sequence[int] | None = None,
    prediction: Prediction | None = None,
    visit: Visit | None = None,
    cond: int | None = None,
    lead: Lead | None = None,
) -> Generator[Request, Any, Tensor]:
    """States x [n, *event] at node ``start`` moved to node ``stop`` (the end by default).

    Args:
        slots: whose noise each row takes; 0 .. n - 1 by default.
        prediction: at x, where it is already paid for.
        visit: sees every state on the way that the network was asked about.
        cond: another prompt than the run's own.
        lead: guides the steps; no weights are kept.
    """
    stop = len(ctx.grid) if stop is None else stop
    guided = lead.guide.guided_steps(ctx.grid) if lead is not None else ()
    rows = Rows(slots, stream, cond)
    for i in range(start, stop):
        t, u = ctx.grid.times[i], ctx.grid.times[i + 1]
        if lead is not None and i in guided:
            guide, scale = lead
            x, _ = yield from guide.step(
                ctx, x, t, u, i, kernel, scale, rows=rows, prediction=prediction, visit=visit
            )
            prediction = None
            continue
        if prediction is None:
            prediction = yield Denoise(x, t, cond=cond)
        assert prediction is not None
        if visit is not None:
            visit(i, x, prediction)
        x = ctx.move(x, prediction, t, u, kernel, step=i, slots=slots, stream=stream)
        prediction = None
    return x


@dataclass(frozen=True, eq=False, kw_only=True)
class Winner:
    """The best finished sample so far.

    Attributes:
        x0, image: [1, *event] and [1, ...].
        reward: of exactly this image.
        slot: its number in the order of all samples.
    """

    x0: Tensor
    image: Tensor
    reward: float
    slot: int

    def outcome(self) -> Outcome:
        """What a method that maximises returns."""
        return Outcome(
            x0=self.x0,
            images=self.image,
            reward=torch.tensor([self.reward], dtype=torch.float64),
            log_w=torch.zeros(1, dtype=torch.float64),
            slots=torch.tensor([self.slot]),
        )


def judge(
    x: Tensor, best: Winner | None, first: int = 0
) -> Generator[Request, Any, tuple[Tensor, Winner]]:
    """Rewards [n] float64 of finished samples x [n, *event], and the best of them and ``best``.

    Ties go to the earlier sample.

    Args:
        first: the number of the first of these samples in the order of all.
    """
    rewards: list[Tensor] = []
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        images = yield Decode(part)
        scores = yield Score(images, part, final=True)
        values = as_float64(scores.value)
        k = top(values)
        if best is None or float(values[k]) > best.reward:
            best = Winner(
                x0=part[k : k + 1].clone(),
                image=images[k : k + 1].clone(),
                reward=float(values[k]),
                slot=first + start + k,
            )
        rewards.append(values)
    assert best is not None
    return torch.cat(rewards), best


def top(values: Tensor) -> int:
    """The index of the largest value; ties go to the first."""
    return int(values.argsort(descending=True, stable=True)[0])


def require_noise(name: str, ctx: Context) -> None:
    """Raises where starting states are more than noise: moves that keep N(0, I) would harm them.

    Two independent states in d dimensions are orthogonal up to 1 / sqrt(d) unless they share
    something, as those of image-to-image pipelines do.

    Raises:
        OptionError: they do.
    """
    a, b = ctx.noise(2, stream="orthogonal").flatten(1).double()
    cosine = float((a @ b) / (a.norm() * b.norm()))
    if cosine > _SHARED / math.sqrt(len(a)):
        raise OptionError(
            f"{name}: this model does not start from pure noise (two starting states have a "
            f"cosine of {cosine:.2f}), as image-to-image pipelines do not. Its starts cannot be "
            "moved about; use random_search or search_over_paths."
        )


def require_continuous(name: str, x: Tensor, what: str) -> None:
    """Raises where states have no neighbours.

    Raises:
        OptionError: the model's states are integers.
    """
    if not x.dtype.is_floating_point:
        raise OptionError(
            f"{name}: {what} needs states of real numbers, this model's are {x.dtype}. Use "
            "best_of_n or fk."
        )

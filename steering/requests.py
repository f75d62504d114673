"""All that a method can say, and what it gets back.

A method is a generator: it yields a request and is sent the answer.

    prediction = yield Denoise(x, t)          # Prediction at x
    images = yield Decode(x0)                 # Tensor [n, 3, H, W] in [0, 1]
    scores = yield Score(images, x0)          # Scores, checked
    yield Progress(step=i, of=n)              # None
    return Outcome(...)
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steering.paths import Times


@dataclass(frozen=True, eq=False)
class Denoise:
    """Ask the network at x [n, *event]; ``t`` is one Time or one per row."""

    x: Tensor
    t: Times
    grad: bool = False


@dataclass(frozen=True, eq=False)
class Decode:
    """Ask for the images of x0 [n, *event]."""

    x0: Tensor
    grad: bool = False


@dataclass(frozen=True, eq=False)
class Score:
    """Ask the guiding reward about images.

    Attributes:
        images: [n, ...].
        x0: what the images were decoded from, kept for the best so far.
        final: True for finished samples, False for previews of unfinished ones.
    """

    images: Tensor
    x0: Tensor
    final: bool = False
    grad: bool = False


@dataclass(frozen=True, eq=False)
class Progress:
    """Tell the listeners and the trace where the run stands.

    Attributes:
        step, of: steps made and in all.
        info: numbers for the trace (JSON-able).
        preview: images of this moment, not kept in the trace.
    """

    step: int
    of: int
    info: dict[str, Any] = field(default_factory=dict)
    preview: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What a method returns.

    Attributes:
        x0: finished samples [n, *event].
        images: their pictures [n, ...].
        reward: [n], of exactly these pictures.
        log_w: [n] log weights; the weighted set represents the method's target law.
        log_z: estimate of ln E[exp(reward_scale r)] where the method has one.
        slots: [n] the particle each sample comes from.
    """

    x0: Tensor
    images: Tensor
    reward: Tensor
    log_w: Tensor
    log_z: float | None = None
    slots: Tensor | None = None


Request = Denoise | Decode | Score | Progress
Run = Generator[Request, Any, Outcome]

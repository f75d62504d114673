"""All that a method can say, and what it gets back.

A method is a generator: it yields a request and is sent the answer.

    prediction = yield Denoise(x, t)          # Prediction at x
    images = yield Decode(x0)                 # Tensor [n, 3, H, W] in [0, 1]
    scores = yield Score(images, x0)          # Scores, checked
    slope = yield Gradient(scores.value, x)   # Tensor like x: of what was asked with grad=True
    said = yield Ask(calls)                   # list of what the callables return
    yield Progress(step=i, of=n)              # None
    return Outcome(...)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steering.paths import Times


@dataclass(frozen=True, eq=False)
class Denoise:
    """Ask the network at x [n, *event]; ``t`` is one Time or one per row.

    With ``grad`` the answer carries a graph back to x, which only a :class:`Gradient` request may
    differentiate. ``checkpoint`` keeps no activations of the network in this graph: the call is
    made again, with the same x, when the graph is differentiated. ``cond`` asks under another
    prompt than the run's own (from ``Context.condition``).
    """

    x: Tensor
    t: Times
    grad: bool = False
    checkpoint: bool = False
    cond: int | None = None


@dataclass(frozen=True, eq=False)
class Decode:
    """Ask for the images of x0 [n, *event]; ``grad`` and ``checkpoint`` as for Denoise.

    ``preview`` says that they only guide a choice on the way: a model with a small decoder for
    such estimates uses it. ``overtime`` asks also where the budget's seconds are spent, for
    pictures without which what was found is lost.
    """

    x0: Tensor
    grad: bool = False
    checkpoint: bool = False
    preview: bool = False
    overtime: bool = False


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
class Gradient:
    """Ask for the derivatives of value.sum() by the inputs.

    The engine waits until no task has anything else to ask for, and differentiates all of their
    values in one pass. The answer is detached: one tensor, or a tuple as given, each of the shape
    of its input and at least float32.

    Attributes:
        value: [n] or one number, made from answers to requests with grad=True.
        inputs: tensors that had requires_grad_() called on them before these requests.
        retain: keep the graph for a further Gradient.

    Raises (thrown into the method):
        RewardError: the reward is not differentiable.
        OptionError: the value does not depend on an input, or the graph is gone.
    """

    value: Tensor
    inputs: Tensor | tuple[Tensor, ...]
    retain: bool = False


@dataclass(frozen=True, eq=False)
class Ask:
    """Ask callables that mostly wait, such as remote critics: those of all runs at once.

    Answered when no run asks for anything that is computed here. The answer is the list of what
    they return, in their order; what one raises is thrown into the method.

    Attributes:
        calls: without arguments; they run in threads.
        workers: most of them at the same time, of all runs together.
    """

    calls: Sequence[Callable[[], Any]]
    workers: int = 4


@dataclass(frozen=True, eq=False)
class Share:
    """Ask for a part of the network rows that all prompts of this call have left.

    Answered when no other run has anything else to ask: what is left of the caps of those that
    ended and of those that ask is divided in proportion to ``need``. The answer is the number of
    rows this run may still spend; None where there is no cap.

    Attributes:
        need: not negative.
    """

    need: float


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


Request = Denoise | Decode | Score | Gradient | Ask | Share | Progress
Run = Generator[Request, Any, Outcome]

"""Proposals shifted by a gradient, with the exact ratio of the base density to theirs.

A step x_u ~ N(m, s^2 I) of the base sampler becomes x_u = m + d + s z. Whatever d(x_t) is, with
the same z,

    log p(x_u | x_t) - log q(x_u | x_t) = -<z, d> / s - |d|^2 / (2 s^2),

so clipping, smoothing or scaling d changes the variance of the weights and not their law. (Written
like this, no two large sums are subtracted.)
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Context, as_float64
from steering.model import Model
from steering.particles import State, ess
from steering.paths import Prediction, Time
from steering.requests import Decode, Denoise, Gradient, Request, Score
from steering.transitions import Step, Transition


@dataclass(frozen=True, eq=False)
class Look:
    """What was learnt at x_t: nothing in here carries a graph.

    Attributes:
        prediction: at x_t.
        reward: r of the decoded estimate of x0, [n] float64.
        slope: its derivatives by x_t, [n, *event].
    """

    prediction: Prediction
    reward: Tensor
    slope: Tensor


def look(
    x: Tensor,
    t: Time,
    *,
    micro_batch: int | None = None,
    checkpoint: bool = False,
    through_network: bool = True,
) -> Generator[Request, Any, Look]:
    """Predicts, decodes, scores and differentiates, ``micro_batch`` rows at a time.

    Args:
        through_network: False takes the derivative of x0 by x_t from a unit-variance Gaussian,
            alpha / (alpha^2 + sigma^2), instead of the network: cheaper and rougher.
    """
    parts = []
    for rows in x.split(micro_batch or len(x)):
        one = _through(rows, t, checkpoint) if through_network else _beside(rows, t, checkpoint)
        parts.append((yield from one))
    return Look(
        Prediction.cat([p.prediction for p in parts]),
        torch.cat([p.reward for p in parts]),
        torch.cat([p.slope for p in parts]),
    )


def _through(x: Tensor, t: Time, checkpoint: bool) -> Generator[Request, Any, Look]:
    leaf = x.detach().clone().requires_grad_()
    prediction = yield Denoise(leaf, t, grad=True, checkpoint=checkpoint)
    images = yield Decode(prediction.x0, grad=True, checkpoint=checkpoint)
    scores = yield Score(images, prediction.x0.detach(), grad=True)
    slope = yield Gradient(scores.value, leaf)
    return Look(detached(prediction), as_float64(scores.value), slope)


def _beside(x: Tensor, t: Time, checkpoint: bool) -> Generator[Request, Any, Look]:
    prediction = yield Denoise(x, t)
    leaf = prediction.x0.clone().requires_grad_()
    images = yield Decode(leaf, grad=True, checkpoint=checkpoint)
    scores = yield Score(images, prediction.x0, grad=True)
    slope = yield Gradient(scores.value, leaf)
    slope = slope * (t.alpha / (t.alpha**2 + t.sigma**2))
    return Look(prediction, as_float64(scores.value), slope)


def detached(prediction: Prediction) -> Prediction:
    """The same numbers without a graph."""
    values = {f.name: getattr(prediction, f.name).detach() for f in fields(prediction)}
    return type(prediction)(**values)


def usable(slope: Tensor) -> tuple[Tensor, int]:
    """A gradient whose rows with NaN or inf are zero, and how many these were."""
    bad = ~torch.isfinite(slope.flatten(1)).all(1)
    rows = bad.reshape(-1, *[1] * (slope.ndim - 1))
    return slope.masked_fill(rows, 0.0), int(bad.sum())


def clipped(slope: Tensor, norm: float | None, value: float | None) -> Tensor:
    """Each entry within +-value, then each row's norm at most ``norm``; None means no limit."""
    if value is not None:
        slope = slope.clamp(-value, value)
    if norm is None:
        return slope
    size = slope.flatten(1).double().norm(dim=1).clamp_min(1e-30)
    factor = (norm / size).clamp_max(1.0).to(slope)
    return slope * factor.reshape(-1, *[1] * (slope.ndim - 1))


def scored(prediction: Prediction, shift: Tensor, t: Time) -> Prediction:
    """The prediction whose score is larger by ``shift`` [n, *event].

    x0 moves by sigma^2 / alpha times it, eps by -sigma times it. On pure noise, where no score
    moves a finite x0, the prediction is left as it is.
    """
    if t.pure:
        return Prediction(prediction.x0, prediction.eps)
    x0 = prediction.x0 + (t.sigma**2 / t.alpha) * shift
    return Prediction(x0, prediction.eps - t.sigma * shift)


def base_step(ctx: Context, state: State, t: Time, u: Time, kernel: Transition) -> Step:
    """The Gaussian that the base sampler draws x_u from."""
    assert state.prediction is not None
    return kernel(state.x, state.prediction, t, u, ctx.model.path)


def propose(ctx: Context, state: State, base: Step, shift: Tensor | None, step: int) -> State:
    """Draws x_u from the base step moved by ``shift``; the ratio enters the weights.

    A step without noise is never shifted: it has no density to correct by. What was cached about
    the old x is dropped.
    """
    x, ratio = draw(ctx, base, shift if base.random else None, step)
    log_w = state.log_w + ratio.to(state.log_w.device)
    return replace(state, x=x, log_w=log_w, prediction=None, memory={})


def draw(
    ctx: Context,
    base: Step,
    shift: Tensor | None,
    step: int,
    stream: str = "proposal",
    slots: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_u from the base step moved by ``shift``, log p - log q [n] float64).

    The ratio counts a step without noise as 0; whoever needs weights must not shift it.
    """
    like = base.mean
    shifted = base if shift is None else Step(like + shift.to(like), base.std)
    nothing = torch.zeros(len(like), dtype=torch.float64)
    if not base.random:
        return shifted.mean, nothing
    slots = range(len(like)) if slots is None else slots
    z = ctx.key(stream, step).normal(slots, like.shape[1:], device=str(like.device))
    return shifted.sample(z), nothing if shift is None else log_ratio(z, shift, base.std)


def log_ratio(z: Tensor, shift: Tensor, std: float | Tensor) -> Tensor:
    """log p - log q of x = mean + shift + std z, [n] float64."""
    d = shift.double() / std
    inner = (z.double().to(d.device) * d).flatten(1).sum(1)
    return -inner - 0.5 * d.flatten(1).square().sum(1)


def ratio_at(base: Step, shift: Tensor, x: Tensor) -> Tensor:
    """log p - log q of states x [n, *event] that are there already, [n] float64.

    0 where the step adds no noise: it is not shifted then.
    """
    if not base.random:
        return torch.zeros(len(x), dtype=torch.float64)
    return log_ratio((x - base.mean - shift.to(base.mean)) / base.std, shift, base.std)


def require_gaussian(name: str, model: Model) -> None:
    """Raises where the model moves by a law of its own, which cannot be shifted."""
    if hasattr(getattr(model, "transition", None), "propose"):
        raise OptionError(
            f"{name} shifts Gaussian steps, and {model.name!r} moves by a law of its own. Use a "
            "model that moves by its prediction, or a method that needs no gradient."
        )


def raise_temper(state: State, rho: Tensor, low: float, share: float) -> float:
    """The temper in [low, 1] at which the effective sample size falls to share * n.

    The potential is temper * rho [n]. 1 where it never falls so far; ``low`` where it already
    has. By bisection, as in Del Moral, Doucet & Jasra (2012), "An adaptive sequential Monte
    Carlo method for approximate Bayesian computation".
    """

    def enough(temper: float) -> bool:
        return ess(state.set_potential(temper * rho).log_w) >= share * len(state)

    if enough(1.0):
        return 1.0
    if not enough(low):
        return low
    high = 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return high  # just below the threshold, so that the rule for resampling sees it


def doubling(steps: int) -> float:
    """gamma with which (1 + gamma)^i - 1 reaches 1 after 87 % of the steps."""
    return 2.0 ** (1.0 / max(1.0, 0.87 * steps)) - 1.0


def check_positive(name: str, **values: float | None) -> None:
    """Raises unless each value that is given is positive and finite."""
    for option, value in values.items():
        if value is not None and not 0.0 < value < math.inf:
            raise OptionError(f"{name}: {option} must be positive, got {value}.")

"""Arithmetic on rewards: weighted sums in which each component is evaluated once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from PIL import Image
from torch import Tensor

from steering.errors import OptionError
from steering.scoring import Reward as RewardProtocol
from steering.scoring import Scores, Term, check_scores, labels


class Arithmetic:
    """``a + b``, ``a - b``, ``0.5 * a``, ``a / 2``, ``-a``, ``a + 1.0`` on rewards."""

    def __add__(self, other: object) -> Any:  # noqa: ANN401
        return _add(self, other, 1.0)

    def __radd__(self, other: object) -> Any:  # noqa: ANN401
        return _add(self, other, 1.0)

    def __sub__(self, other: object) -> Any:  # noqa: ANN401
        return _add(self, other, -1.0)

    def __rsub__(self, other: object) -> Any:  # noqa: ANN401
        return _add(_scaled(self, -1.0), other, 1.0)

    def __mul__(self, factor: object) -> Any:  # noqa: ANN401
        return _scaled(self, float(factor)) if _is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Any:  # noqa: ANN401
        if not _is_number(divisor):
            return NotImplemented
        if divisor == 0:
            raise OptionError("A reward cannot be divided by zero.")
        return _scaled(self, 1.0 / float(divisor))

    def __neg__(self) -> Any:  # noqa: ANN401
        return _scaled(self, -1.0)


class WeightedSum(Arithmetic):
    """A linear combination of rewards plus a constant; what arithmetic on rewards makes.

    Equal components are merged, so that each is evaluated once. ``parts`` holds every component
    before its weight. A component of weight 0 is reported and does not steer.

    Args:
        terms: (weight, reward) pairs.
        offset: the constant.
    """

    licence = "see its components"

    def __init__(self, terms: Sequence[tuple[float, RewardProtocol]], offset: float = 0.0) -> None:
        merged: list[tuple[float, RewardProtocol]] = []
        for weight, reward in terms:
            at = next((i for i, (_, old) in enumerate(merged) if _same(old, reward)), None)
            if at is None:
                merged.append((weight, reward))
            else:
                merged[at] = (merged[at][0] + weight, merged[at][1])
        if not merged or not all(map(math.isfinite, [offset, *(w for w, _ in merged)])):
            raise OptionError("A sum of rewards needs at least one reward and finite weights.")
        self.terms, self.offset = tuple(merged), float(offset)
        self.name = _linear_text(self.terms, self.offset, [r.name for _, r in merged])
        self.describe = "a weighted sum"

    def __repr__(self) -> str:
        return f"WeightedSum({self.spec or self.name})"

    @property
    def differentiable(self) -> bool:
        """Whether every component that has a weight is."""
        return all(reward.differentiable for weight, reward in self.terms if weight)

    @property
    def stationary(self) -> bool:
        """Whether no component that has a weight looks at the other images of a call."""
        return all(getattr(reward, "stationary", True) for weight, reward in self.terms if weight)

    @property
    def spec(self) -> str | None:
        """The string that rebuilds the sum; None where a component has none."""
        specs = [reward.spec for _, reward in self.terms]
        known = [s for s in specs if s is not None]
        return _linear_text(self.terms, self.offset, known) if len(known) == len(specs) else None

    @property
    def spread(self) -> float | None:
        """Of the sum, as if its components varied independently; None where one is unknown."""
        known = [(weight, getattr(reward, "spread", None)) for weight, reward in self.terms]
        parts = [weight * spread for weight, spread in known if spread is not None]
        return math.hypot(*parts) if len(parts) == len(known) else None

    @property
    def components(self) -> tuple[str, ...]:
        """The names under which ``terms`` of the scores has those that steer."""
        keys = labels([reward for _, reward in self.terms])
        return tuple(key for key, (weight, _) in zip(keys, self.terms, strict=True) if weight)

    def for_model(self, model: object) -> Arithmetic:
        """The same sum with each component adapted to the model."""
        terms = []
        for weight, reward in self.terms:
            adapt = getattr(reward, "for_model", None)
            terms.append((weight, adapt(model) if adapt else reward))
        return _simplest(terms, self.offset)

    def __call__(
        self,
        images: Any,  # noqa: ANN401
        prompts: str | Sequence[Any],
        *,
        metadata: Sequence[Any] | None = None,
    ) -> Scores:
        """The sum, with the components in ``parts`` and, with their weights, in ``terms``.

        Raises:
            RewardError: a component returned the wrong number of values, NaN or +inf.
        """
        images = [images] if isinstance(images, Image.Image) else images
        keys = labels([reward for _, reward in self.terms])
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        terms: dict[str, Term] = {}
        notes: dict[str, list[str]] = {}
        for key, (weight, reward) in zip(keys, self.terms, strict=True):
            found = reward(images, prompts, metadata=metadata)
            check_scores(found, reward.name, len(images), f", a part of {self.name!r}")
            parts[key] = found.value
            parts.update({f"{key}.{k}": v for k, v in found.parts.items()})
            notes.update({f"{key}.{k}": v for k, v in found.notes.items()})
            # Left out rather than multiplied: 0 * -inf would be NaN.
            value = weight * found.value if weight else torch.zeros_like(found.value)
            total = value if total is None else total + value.to(total.device)
            if weight:
                terms[key] = Term(torch.full_like(found.value, weight), found.value)
        assert total is not None
        return Scores(value=total + self.offset, parts=parts, notes=notes, terms=terms)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _same(a: RewardProtocol, b: RewardProtocol) -> bool:
    return a is b or (a.spec is not None and a.spec == b.spec)


def _linear(reward: Any) -> tuple[list[tuple[float, Any]], float]:  # noqa: ANN401
    if isinstance(reward, WeightedSum):
        return list(reward.terms), reward.offset
    return [(1.0, reward)], 0.0


def _simplest(terms: Sequence[tuple[float, Any]], offset: float) -> Any:  # noqa: ANN401
    total = WeightedSum(terms, offset)
    (weight, reward), *more = total.terms
    return reward if not more and weight == 1.0 and total.offset == 0.0 else total


def _scaled(reward: object, factor: float) -> Any:  # noqa: ANN401
    terms, offset = _linear(reward)
    return _simplest([(factor * weight, part) for weight, part in terms], factor * offset)


def _add(reward: object, other: object, sign: float) -> Any:  # noqa: ANN401
    terms, offset = _linear(reward)
    if _is_number(other):
        return _simplest(terms, offset + sign * float(other))
    if isinstance(other, (str, type)) or not callable(other):
        return NotImplemented
    from steering.rewards.function import FunctionReward

    more, constant = _linear(other if isinstance(other, RewardProtocol) else FunctionReward(other))
    more = [(sign * weight, part) for weight, part in more]
    return _simplest([*terms, *more], offset + sign * constant)


def _linear_text(terms: Sequence[tuple[float, Any]], offset: float, names: Sequence[str]) -> str:
    text = ""
    for (weight, _), name in zip(terms, names, strict=True):
        size = abs(weight)
        factor = "" if size == 1.0 else f"{_number_text(size)}*"
        minus = math.copysign(1.0, weight) < 0 and weight != 0
        sign = (" - " if minus else " + ") if text else ("-" if minus else "")
        text += f"{sign}{factor}{name}"
    if offset:
        text += f" {'-' if offset < 0 else '+'} {_number_text(abs(offset))}"
    return text


def _number_text(value: float) -> str:
    return repr(int(value)) if value == int(value) and value < 1e15 else repr(value)

"""What a reward is, and the check every score passes before it can steer anything.

Higher is better. Images come as a float32 tensor [n, 3, H, W] in [0, 1] (video [n, F, 3, H, W],
analytic models [n, *event]); order is kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from steering.errors import OptionError, RewardError


class Term(NamedTuple):
    """A term ``weight * value`` of a sum, [n] each; the weight has a sign and no gradient."""

    weight: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """Rewards of a batch.

    Attributes:
        value: [n], higher is better.
        parts: named components, [n] each, for reports.
        valid: [n] bool; False where no score could be had (a judge's answer did not parse).
        notes: named texts, one per image: what a judge wrote, what was read in a picture.
        terms: where ``value`` is a sum, what it is made of, but for a constant; empty elsewhere.
            What is to be differentiated piece by piece is in here, not in ``parts``.
    """

    value: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Anything that scores images against prompts.

    Attributes:
        name: for reports.
        spec: the string that rebuilds this reward, None where only the caller can.
        differentiable: whether gradients flow from ``value`` to the images.
    """

    name: str
    spec: str | None
    differentiable: bool

    def __call__(
        self, images: Tensor, prompts: Sequence[Any], *, metadata: Sequence[Any] | None = None
    ) -> Scores: ...


def resolve_reward(reward: object, model: object | None = None) -> Reward:
    """A reward from a name, a spec string, a Reward or a plain callable.

    A reward with ``for_model(model)`` may adapt to the model it will judge (the embedded model
    has a CLIP of its own).
    """
    found = importlib.import_module("steering.rewards").as_reward(reward)
    adapt = getattr(found, "for_model", None)
    return adapt(model) if adapt and model is not None else found


def recipe_reward(spec: str) -> Reward:
    """A reward named by a recipe, which may come from anywhere: no user code is imported for it.

    Raises:
        OptionError: an unknown name, or a spec that would run code.
    """
    return importlib.import_module("steering.rewards").as_reward(spec, allow_python=False)


def score(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[Any],
    *,
    metadata: Sequence[Any] | None = None,
    where: str = "",
) -> Scores:
    """Calls a reward and checks what it returned.

    Args:
        metadata: handed on where there is any, one per image.

    Raises:
        RewardError: the reward raised, or returned the wrong number of values, NaN or +inf.
    """
    n = len(images)
    extra: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
    try:
        scores = reward(images, prompts, **extra)
    except (RewardError, OptionError):
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise RewardError(
            f"Reward {reward.name!r} raised {type(error).__name__} on {n} images{where}: {error}"
        ) from error
    return check_scores(scores, reward.name, n, where)


def labels(rewards: Sequence[Reward]) -> list[str]:
    """A name per reward for reports: its own, its spec where names repeat, numbered at need."""
    names = [reward.name for reward in rewards]
    keys = [r.name if names.count(r.name) == 1 else r.spec or r.name for r in rewards]
    return [k if keys.count(k) == 1 else f"{k}#{keys[:i].count(k)}" for i, k in enumerate(keys)]


def parts_of(reward: object) -> dict[object, str]:
    """What a reward measures -> the name of it, for every component that has a weight.

    Equal measures with another unit (scale, precision) are one.
    """
    terms = getattr(reward, "terms", None)
    if terms is not None:
        return {k: v for weight, part in terms if weight for k, v in parts_of(part).items()}
    measures = getattr(reward, "measures", None) or getattr(reward, "spec", None)
    return {measures or id(getattr(reward, "fn", reward)): str(getattr(reward, "name", reward))}


def searched(guide: object, verifier: object) -> list[str]:
    """Names of the components of a verifier that the search has seen."""
    seen = parts_of(guide)
    return [name for key, name in parts_of(verifier).items() if key in seen]


def heldout_labels(guide: Reward, verifiers: Sequence[Reward]) -> list[str]:
    """`labels` of verifiers; one that shares a component with the guiding reward says so."""
    shared = [searched(guide, verifier) for verifier in verifiers]
    return [
        f"{label} (searched: {', '.join(names)})" if names else label
        for label, names in zip(labels(verifiers), shared, strict=True)
    ]


def check_scores(scores: object, name: str, n: int, where: str) -> Scores:
    """Raises where the values cannot be used as rewards of n images."""
    if not isinstance(scores, Scores):
        raise RewardError(
            f"Reward {name!r} returned {type(scores).__name__}{where}; an object with name, spec "
            "and differentiable must return steering.scoring.Scores. A plain function may return "
            "a tensor or a list."
        )
    terms = [(name, column) for name, term in scores.terms.items() for column in term]
    for part, values in [*scores.parts.items(), *terms]:
        if not isinstance(values, Tensor) or values.shape[:1] != (n,):
            raise RewardError(
                f"Reward {name!r}: part {part!r} must be a tensor with one entry per image, {n} "
                f"in all{where}."
            )
    value = scores.value
    if value.ndim != 1 or len(value) != n:
        raise RewardError(
            f"Reward {name!r} must return one number per image: expected shape ({n},), got "
            f"{tuple(value.shape)}{where}. A reward sees a batch [n, ...] and a list of n prompts."
        )
    bad = torch.isnan(value) | torch.isposinf(value)
    if scores.valid is not None:
        bad = bad | ~scores.valid.to(bad.device)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        raise RewardError(
            f"Reward {name!r} returned no usable number for {len(rows)} of {n} images{where} "
            f"(rows {rows[:8]}, values {[value[i].item() for i in rows[:8]]}). Weights made from "
            "it would be meaningless, so the run stops here. Return -inf to give an image no "
            "weight on purpose."
        )
    return scores

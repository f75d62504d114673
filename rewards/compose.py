"""Ensembles: several rewards as one.

In a spec the members come first: ``zsum(clip, 0.5*pickscore, calibration=c.json)``. An ensemble
whose value of an image depends on the other images of the call is not ``stationary``: a search may
use it, a particle method may not, because its weights would belong to another law at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError, RewardError
from steering.rewards.base import register
from steering.rewards.calibration import Calibration, groups, read_json
from steering.rewards.categories import CARINOX, guess, weight_of
from steering.rewards.ensemble import Calibrated, Ensemble
from steering.scoring import Reward, Scores


@register("zsum")
class ZSum(Calibrated):
    """Weighted sum of z-scores: every reward counts by its weight, not by its spread.

    With ``calibration`` the constants are fixed and the value of an image is its own. Without,
    they are those of the images of one prompt in one call, and particle methods refuse it.

    Args:
        members: rewards; ``0.5*clip`` counts half.
        calibration: file that `calibration.measure` wrote, or a `Calibration`.
    """

    name = "zsum"
    describe = "weighted sum of z-scores of its members"
    value_range = "about -3 to 3 for a weight of 1"

    def __init__(self, *members: object, calibration: str | Calibration | None = None) -> None:
        super().__init__(*members, calibration=calibration)
        self.stationary = self.stationary and self.calibration is not None
        if self.calibration is not None:  # as if the members varied independently
            self.spread = sum(weight**2 for weight, _ in self.terms) ** 0.5

    def added(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor]:
        if self.calibration is None:
            return self.weights(values), _per_prompt(values, prompts, _standardised)
        return self.weights(values), self.scaled(values)


@register("rank")
class RankMean(Ensemble):
    """Mean rank among the candidates of one prompt, 0 (worst) to 1 (best) (Ma et al., 2025).

    All candidates must be in one call (``max_batch`` of at least their number). Ties share their
    mean rank; a single candidate gets 0.5.
    """

    name = "rank"
    describe = "mean rank of its members among the candidates"
    value_range = "0 to 1"
    differentiable = False
    stationary = False

    def __init__(self, *members: object) -> None:
        super().__init__(*members)

    def combine(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        size = sum(abs(weight) for weight, _ in self.terms) or 1.0
        ranks = _per_prompt(values, prompts, ranked)
        # A negative weight turns the order round, so that the result stays in [0, 1].
        signs = [weight < 0 for weight, _ in self.terms]
        ranks = torch.where(torch.tensor(signs, device=ranks.device), 1 - ranks, ranks)
        weights = ranks.new_tensor([abs(weight) for weight, _ in self.terms])
        return (ranks * weights).sum(1) / size


@register("min")
class Min(Calibrated):
    """The worst of its members, so that none is traded away.

    Raw values only compare where the members share a unit; give ``calibration`` where not.
    """

    name = "min"
    describe = "the smallest of its members"
    weighted = False

    def __init__(self, *members: object, calibration: str | Calibration | None = None) -> None:
        super().__init__(*members, calibration=calibration)

    def combine(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        return self.scaled(values).amin(1)


@register("lexicographic")
class Lexicographic(Ensemble):
    """The first member decides; among equals the second, and so on.

    The value is one number with that order: the first member in whole steps, plus a fraction
    between 0 and 1 that rises with the next. Good for a hard condition before a taste:
    ``lexicographic(detector, clip)``.

    Args:
        step: values of all members but the last count as equal within this.
        scale: of the last member; differences around this size are told apart best.
    """

    name = "lexicographic"
    describe = "the first member decides, the next breaks ties"
    value_range = "whole steps of the first, plus 0 to 1"
    differentiable = False
    weighted = False

    def __init__(self, *members: object, step: float = 1.0, scale: float = 1.0) -> None:
        super().__init__(
            *members,
            step=None if step == 1.0 else step,
            scale=None if scale == 1.0 else scale,
        )
        if not (step > 0 and scale > 0):
            raise OptionError(f"lexicographic(step={step}, scale={scale}): give positive numbers.")
        self.step, self.scale = step, scale

    def combine(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        columns = list(values.double().unbind(1))
        tail = columns.pop() / self.scale
        while columns:
            tail = (columns.pop() / self.step).round() + _fraction(tail)
        return tail


@register("clipped")
class ClippedGradient(Ensemble):
    """Weighted sum in which each member's gradient is cut to one length before it is added.

    One reward with steep gradients then cannot drown the others (CARINOX, Kasaei et al., 2025,
    there in the noise, here in the pixels of each image). Values are those of the plain sum. Each
    member is differentiated on its own, so the graph of one alone is held in memory.

    Args:
        limit: largest norm of the gradient of one member over the pixels of one image.
    """

    name = "clipped"
    describe = "weighted sum with each member's gradient cut to one length"
    value_range = "the weighted sum of its members"

    def __init__(self, *members: object, limit: float = 0.1) -> None:
        super().__init__(*members, limit=None if limit == 0.1 else limit)
        if not limit > 0:
            raise OptionError(f"clipped(limit={limit}): give a positive number.")
        self.limit = limit

    def added(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor]:
        return self.weights(values), values

    def ask(
        self,
        reward: Reward,
        images: Any,  # noqa: ANN401
        prompts: Sequence[Any],
        metadata: Sequence[Any] | None,
    ) -> Scores:
        wanted = isinstance(images, Tensor) and images.requires_grad and torch.is_grad_enabled()
        if not wanted or not reward.differentiable:
            return super().ask(reward, images, prompts, metadata)
        leaf = images.detach().requires_grad_()
        found = super().ask(reward, leaf, prompts, metadata)
        (gradient,) = torch.autograd.grad(found.value.sum(), leaf)
        norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
        if not bool(torch.isfinite(norm).all()):
            raise RewardError(f"Reward {reward.name!r}, a part of 'clipped', has no finite slope.")
        cut = gradient * (self.limit / norm.clamp(min=self.limit))
        # The difference is zero and its derivative one: the value stays, the gradient is ours.
        carrier = ((images - images.detach()) * cut).flatten(1).sum(1)
        parts = {k: v.detach() for k, v in found.parts.items()}
        return Scores(value=found.value.detach() + carrier, parts=parts, notes=found.notes)


@register("category")
class ByCategory(Calibrated):
    """Weighted sum whose weights depend on what the prompt asks for.

    Args:
        members: rewards; the table knows ``hps``, ``imagereward``, ``vqascore`` and any other by
            its name.
        weights: "carinox" (T2I-CompBench categories), a JSON file or a mapping of category to
            {reward: weight}.
        categories: JSON file or mapping of prompt to category, or to a list of [category, share].
            Without, ``metadata`` with an entry "category" is asked, then the words of the prompt.
        calibration: brings the members to one scale first; without it, raw values as published.
    """

    name = "category"
    describe = "weighted sum with weights by the kind of prompt"
    value_range = "the weighted sum of its members"

    def __init__(
        self,
        *members: object,
        weights: str | Mapping[str, Mapping[str, float]] = "carinox",
        categories: str | Mapping[str, Any] | None = None,
        calibration: str | Calibration | None = None,
    ) -> None:
        super().__init__(
            *members,
            weights=None if weights == "carinox" else weights,
            categories=categories,
            calibration=calibration,
        )
        named = CARINOX if weights == "carinox" else weights
        self.table = read_json(named, "weights") if isinstance(named, (str, Path)) else named
        given = read_json(categories, "categories") if isinstance(categories, str) else categories
        self.categories: Mapping[str, Any] = given or {}
        self.columns = [_COLUMNS.get(reward.name, reward.name) for _, reward in self.terms]
        for category, column in ((c, k) for c in self.table for k in self.columns):
            weight_of(self.table, category, column)

    def added(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor]:
        rows = [
            [weight_of(self.table, self._category(p, m), column) for column in self.columns]
            for p, m in zip(prompts, metadata or [None] * len(prompts), strict=True)
        ]
        return self.weights(values) * values.new_tensor(rows), self.scaled(values)

    def _category(self, prompt: Any, metadata: Any) -> Any:  # noqa: ANN401
        if prompt in self.categories:
            return self.categories[prompt]
        if isinstance(metadata, Mapping) and "category" in metadata:
            return metadata["category"]
        return guess(prompt if isinstance(prompt, str) else "")


_COLUMNS = {"hps": "HPS", "imagereward": "ImageReward", "vqascore": "VQAScore"}


def ranked(values: Tensor) -> Tensor:
    """Mean ranks [m, k] of each column, 0 to 1; 0.5 where there is nothing to compare."""
    if len(values) < 2:
        return torch.full_like(values, 0.5)
    a, b = values.detach()[:, None], values.detach()[None]
    below, ties = (a > b).sum(1), (a == b).sum(1) - 1
    return (below + ties / 2) / (len(values) - 1)


def _standardised(values: Tensor) -> Tensor:
    """z-scores [m, k] among these rows; 0 where they do not vary; -inf stays."""
    columns = []
    for value in values.unbind(1):
        finite = torch.isfinite(value)
        mean = value[finite].mean() if bool(finite.any()) else value.new_zeros(())
        std = value[finite].std(correction=0) if bool(finite.any()) else value.new_zeros(())
        flat = torch.where(finite, torch.zeros_like(value), value)
        # A spread at the size of rounding errors is none.
        some = bool(std > 1e-6 * mean.abs().clamp(min=1e-12))
        columns.append((value - mean) / std if some else flat)
    return torch.stack(columns, 1)


def _per_prompt(values: Tensor, prompts: Sequence[Any], rule: Any) -> Tensor:  # noqa: ANN401
    """A rule applied among the images of each prompt."""
    found = torch.empty_like(values)
    for rows in groups(prompts, len(values)):
        rows = rows.to(values.device)
        found = found.index_copy(0, rows, rule(values[rows]).to(values.dtype))
    return found


def _fraction(x: Tensor) -> Tensor:
    """A strictly rising map of the line to [0, 1)."""
    return torch.where(torch.isneginf(x), torch.zeros_like(x), 0.5 + 0.5 * x / (1 + x.abs()))

"""The base of rewards made of rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.arithmetic import Arithmetic, WeightedSum
from steering.rewards.calibration import Calibration
from steering.rewards.images import check_prompts
from steering.rewards.spec import as_reward, call_spec
from steering.scoring import Reward, Scores, Term, check_scores, labels


class Ensemble(Arithmetic):
    """Base of rewards made of rewards: asks each member once and combines the values.

    Args:
        members: rewards, names or specs; ``0.5*clip`` is the member clip with weight 0.5 where
            ``weighted``, else a member of its own.
        options: what the spec has to name beside the members.

    Raises:
        OptionError: no members, or an option that cannot be used.
    """

    takes_rewards: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    name: str = "ensemble"
    describe: str = "rewards made of rewards"
    licence: str = "see its members"
    hub_id: str = "see its members"
    value_range: str = "as its members"
    memory: str = "that of its members"
    differentiable: bool = True
    stationary: bool = True
    spread: float | None = None

    def __init__(self, *members: object, **options: Any) -> None:  # noqa: ANN401
        if not members:
            raise OptionError(f"{self.name} needs rewards: {self.name}(clip, pickscore).")
        self.terms = tuple(_term(as_reward(m), self.weighted) for m in members)
        self.options = {k: v for k, v in options.items() if v is not None}
        steered = [reward for weight, reward in self.terms if weight]
        self.differentiable = type(self).differentiable and all(r.differentiable for r in steered)
        self.stationary = type(self).stationary and all(
            getattr(r, "stationary", True) for r in steered
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec or ', '.join(r.name for _, r in self.terms)})"

    @property
    def spec(self) -> str | None:
        """The string that rebuilds it; None where a member or an option has none."""
        parts = [_text(weight, reward) for weight, reward in self.terms]
        known = [part for part in parts if part is not None]
        plain = all(isinstance(v, (str, int, float)) for v in self.options.values())
        if len(known) < len(parts) or not plain:
            return None
        options = call_spec("", self.options)[1:-1]
        return f"{self.name}({', '.join([*known, *([options] if options else [])])})"

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the terms of the scores; none where the value is no sum."""
        return () if type(self).added is Ensemble.added else tuple(self._keys())

    def for_model(self, model: object) -> Ensemble:
        """The same ensemble with each member adapted to the model."""
        adapted = []
        for weight, reward in self.terms:
            adapt = getattr(reward, "for_model", None)
            mine = adapt(model) if adapt else reward
            adapted.append(mine if weight == 1.0 else WeightedSum([(weight, mine)]))
        return type(self)(*adapted, **self.options)

    def __call__(
        self,
        images: Any,  # noqa: ANN401
        prompts: str | Sequence[Any],
        *,
        metadata: Sequence[Any] | None = None,
    ) -> Scores:
        """The combined value, with every member's own value in ``parts``.

        Raises:
            RewardError: a member returned the wrong number of values, NaN or +inf.
        """
        images = [images] if isinstance(images, Image.Image) else images
        prompts = check_prompts(prompts, len(images))
        parts: dict[str, Tensor] = {}
        notes: dict[str, list[str]] = {}
        values = []
        for key, (_, reward) in zip(self._keys(), self.terms, strict=True):
            found = self.ask(reward, images, prompts, metadata)
            parts[key] = found.value
            parts.update({f"{key}.{k}": v for k, v in found.parts.items()})
            notes.update({f"{key}.{k}": v for k, v in found.notes.items()})
            values.append(found.value)
        values = [value.to(values[0].device) for value in values]
        table = torch.stack(values, 1)
        added = self.added(table, prompts, metadata)
        if added is None:
            total = self.combine(table, prompts, metadata)
            return Scores(value=total.float(), parts=parts, notes=notes)
        columns = zip(*(part.float().unbind(1) for part in added), strict=True)
        terms = dict(zip(self._keys(), (Term(w, value) for w, value in columns), strict=True))
        total = sum_of(terms.values(), like=table[:, 0].float())
        return Scores(value=total, parts=parts, notes=notes, terms=terms)

    def added(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor] | None:
        """(weights, columns), [n, k] each, whose products are added up, from the members' values
        [n, k]; None where the value is no sum. Subclasses write this, or `combine`."""
        return None

    def combine(
        self, values: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        """One value [n] from the members' values [n, k], where it is no weighted sum."""
        raise NotImplementedError

    def ask(
        self,
        reward: Reward,
        images: Any,  # noqa: ANN401
        prompts: Sequence[Any],
        metadata: Sequence[Any] | None,
    ) -> Scores:
        found = reward(images, prompts, metadata=metadata)
        return check_scores(found, reward.name, len(images), f", a part of {self.name!r}")

    def _keys(self) -> list[str]:
        return labels([reward for _, reward in self.terms])

    def weights(self, values: Tensor) -> Tensor:
        """The members' weights, like their values [n, k]."""
        return values.new_tensor([weight for weight, _ in self.terms]).expand_as(values)


def sum_of(terms: Iterable[Term], like: Tensor) -> Tensor:
    """Sum of weight * value, [n]; what has weight 0 is left out, as 0 * -inf would be NaN."""
    total = nothing = torch.zeros_like(like)
    for weight, value in terms:
        total = total + torch.where(weight == 0, nothing, weight * value)
    return total


def _term(reward: Reward, weighted: bool) -> tuple[float, Reward]:
    if weighted and isinstance(reward, WeightedSum) and len(reward.terms) == 1:
        if reward.offset == 0:
            return reward.terms[0]
    return 1.0, reward


def _text(weight: float, reward: Reward) -> str | None:
    return reward.spec if weight == 1.0 else WeightedSum([(weight, reward)]).spec


class Calibrated(Ensemble):
    """Members on one scale by constants from a file, where it is given.

    Args:
        calibration: file, or `Calibration`.
    """

    def __init__(
        self,
        *members: object,
        calibration: str | Calibration | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*members, calibration=calibration, **options)
        known = Calibration.load(calibration) if isinstance(calibration, str) else calibration
        self.calibration = known

    def for_model(self, model: object) -> Ensemble:
        """The same ensemble with each member adapted to the model, and its constants found."""
        adapted = super().for_model(model)
        assert isinstance(adapted, Calibrated)
        adapted.constants()
        return adapted

    def constants(self) -> list[tuple[float, float]]:
        """(mean, std) of each member; not looked up before the members fit the model.

        Raises:
            OptionError: a member was not measured.
        """
        if self.calibration is None:
            return []
        found = [self.calibration.of(reward) for _, reward in self.terms]
        return [(c.mean, c.std) for c in found]

    def scaled(self, values: Tensor) -> Tensor:
        """(value - mean) / std per member, or the values where there is no calibration."""
        constants = self.constants()
        if not constants:
            return values
        mean, std = values.new_tensor(constants).T
        return (values - mean) / std

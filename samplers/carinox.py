"""CARINOX: ReNO from several starts, each component of the reward with a say of its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Cost, Plan
from steering.registry import METHODS
from steering.requests import Gradient, Request
from steering.samplers.base import afford
from steering.samplers.noise_optimisation import NoiseOptimisation, clipped
from steering.scoring import Reward, Scores, Term

_STARTS, _FEWEST = 5, 3


@METHODS.register("carinox")
@dataclass(frozen=True, kw_only=True)
class CARINOX(NoiseOptimisation):
    """Category-aware reward-based initial noise optimisation and exploration (2509.17458).

    The components are the terms of a reward that is a sum (``a - 0.5*b``, ``zsum``,
    ``category``); any other reward is one component. The gradient of each is clipped by itself,
    so that none drowns the others, whatever its scale; they are added with the signs and weights
    they have in the sum, and the sum is clipped again. The radius penalty is added once (the
    published code adds it once per component).

    Every component takes a backward pass of its own, and the ledger counts each of them.

    Attributes:
        restarts: None takes 5, or fewer where the budget does not pay for 3 iterations of each:
            starts that are not climbed from are best-of-N.
        weights: further factor of a component, by its name among the terms of the reward; 1 for
            those not named, 0 leaves one out. Weights by category of the prompt belong to the
            reward itself.
        component_clip: largest norm of one component's gradient of a row, before its weight.
    """

    restarts: int | None = None
    weights: Mapping[str, float] | None = None
    component_clip: float = 0.1

    name: ClassVar[str] = "carinox"
    summary: ClassVar[str] = "noise ascent from several starts, gradients clipped per reward"
    paper: ClassVar[str] = "Kasaei et al. 2025 (2509.17458)"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "paper": {"n_iterations": 50, "restarts": 5, "lr": 5.0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.component_clip > 0.0:
            raise OptionError(
                f"carinox: component_clip must be positive, got {self.component_clip}."
            )
        if not all(0.0 <= w < math.inf for w in (self.weights or {}).values()):
            raise OptionError(
                f"carinox: weights must be finite and not negative, got {self.weights}. Turn a "
                "component round in the reward: a - b."
            )

    def check_reward(self, reward: Reward) -> None:
        """Weights against the names of the reward's terms, where it can tell them beforehand."""
        names = getattr(reward, "components", None)
        if names is not None and self.weights:
            self._check_names(names)

    def _check_names(self, names: Collection[str]) -> None:
        unknown = sorted(set(self.weights or {}) - set(names))
        if unknown:
            raise OptionError(
                f"carinox: no component {', '.join(unknown)} in this reward; it has "
                f"{', '.join(names) or 'none, because it is no sum'}."
            )

    def starts(self, plan: Plan) -> int:
        """Up to 5, each with at least 3 iterations where the budget pays for them."""
        one = replace(self, restarts=1, n_iterations=1)

        def cost(n: int) -> Cost:
            return replace(one, restarts=n).cost(plan)

        passes = self.n_iterations or _FEWEST
        samples = afford(plan, cost, _STARTS * passes, "iteration", self)
        return max(1, min(_STARTS, samples // passes))

    def _slopes(
        self, scores: Scores, free: tuple[Tensor, ...]
    ) -> Generator[Request, Any, tuple[Tensor, ...]]:
        """The weighted sum of the components' directions, each clipped by itself."""
        components = self._components(scores)
        total = [torch.zeros_like(z) for z in free]
        for j, (weight, value) in enumerate(components):
            more = j + 1 < len(components)
            slopes = yield Gradient(self._scale * value, free, retain=more)
            self._warn_of_nan(slopes)
            like = [s.to(z) for s, z in zip(slopes, free, strict=True)]
            mine = clipped(like, self.component_clip)
            total = [a + _per_row(weight, b) * b for a, b in zip(total, mine, strict=True)]
        return tuple(total)

    def _components(self, scores: Scores) -> list[Term]:
        """The reward's terms under ``weights``, or the reward where it is no sum.

        Raises:
            OptionError: a weight for a component that the reward does not have, or 0 for all.
        """
        weights, terms = dict(self.weights or {}), scores.terms
        self._check_names(terms)
        if not terms:
            return [Term(torch.ones_like(scores.value), scores.value)]
        named = [Term(weights.get(k, 1.0) * w, value) for k, (w, value) in terms.items()]
        live = [term for term in named if term.value.requires_grad and bool(term.weight.any())]
        if not live:
            raise OptionError(
                "carinox: the weights leave no component to climb; raise one of them."
            )
        return live


def _per_row(weight: Tensor, like: Tensor) -> Tensor:
    return weight.detach().to(like).reshape(-1, *[1] * (like.ndim - 1))

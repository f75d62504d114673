"""CARINOX: ReNO from several starts, each component of the reward with a say of its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.registry import METHODS
from steering.requests import Gradient, Request
from steering.samplers.noise_optimisation import NoiseOptimisation, clipped
from steering.scoring import Scores


@METHODS.register("carinox")
@dataclass(frozen=True, kw_only=True)
class CARINOX(NoiseOptimisation):
    """Category-aware reward-based initial noise optimisation and exploration (2509.17458).

    The gradient of every component of the reward is clipped by itself before they are added, so
    that no component drowns the others, whatever its scale; then the sum is clipped again. The
    radius penalty is added once (the published code adds it once per component).

    Attributes:
        weights: factor of a component's gradient before it is clipped, by its name in the parts
            of the reward; 1 for those not named. Weights by category of the prompt belong to the
            reward itself.
        component_clip: largest norm of one component's gradient of a row.
    """

    restarts: int = 5
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

    def _slopes(
        self, scores: Scores, free: tuple[Tensor, ...]
    ) -> Generator[Request, Any, tuple[Tensor, ...]]:
        """The sum of the components' directions, each clipped by itself."""
        parts = self._components(scores.value, scores.parts)
        total = [torch.zeros_like(z) for z in free]
        for j, part in enumerate(parts):
            slopes = yield Gradient(part, free, retain=j + 1 < len(parts))
            mine = clipped([s.to(z) for s, z in zip(slopes, free, strict=True)],
                           self.component_clip)  # fmt: skip
            total = [a + b for a, b in zip(total, mine, strict=True)]
        return tuple(total)

    def _components(self, value: Tensor, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The parts that can be differentiated, weighted; the reward itself where there are none.

        Raises:
            OptionError: a weight for a component that the reward does not have.
        """
        weights = dict(self.weights or {})
        unknown = sorted(set(weights) - set(parts))
        if unknown:
            raise OptionError(
                f"carinox: no component {', '.join(unknown)} in this reward; it has "
                f"{', '.join(parts) or 'none'}."
            )
        live = [
            self._scale * weights.get(name, 1.0) * part
            for name, part in parts.items()
            if part.requires_grad and weights.get(name, 1.0)
        ]
        return live or [self._scale * value]

"""Mean luminance: the smallest reward with a gradient, for first runs and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from steering.rewards.base import Reward, register

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of PIL's convert("L")


@register("brightness")
@dataclass(frozen=True, kw_only=True)
class Brightness(Reward):
    """Mean luminance of the image, from 0 (black) to 1 (white)."""

    differentiable: ClassVar[bool] = True
    value_range: ClassVar[str] = "0 to 1"

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        """Mean luminance [n]."""
        return (images.mean((-2, -1)) * images.new_tensor(_LUMA)).sum(-1)

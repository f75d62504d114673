"""JPEG size: a reward without weights and without a gradient (Black et al., 2023, DDPO)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.base import Reward, register
from steering.rewards.images import to_pil
from steering.scoring import Scores


@register("jpeg")
@dataclass(frozen=True, kw_only=True)
class Jpeg(Reward):
    """Compressibility: minus the size of the image as a JPEG file, in kB (1000 bytes).

    Attributes:
        quality: of the JPEG encoder, 1 to 100.
        sign: -1 rewards small files, +1 large ones.
    """

    differentiable: ClassVar[bool] = False
    value_range: ClassVar[str] = "below 0 kB"

    quality: int = 95
    sign: int = -1

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise OptionError(f"jpeg(quality={self.quality}): give 1 to 100.")
        if self.sign not in (-1, 1):
            raise OptionError(
                f"jpeg(sign={self.sign}): give -1 (small files are good) or 1 (large ones are)."
            )

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """``sign * kB`` [n], with the size itself as the part ``kB``."""
        sizes = []
        for image in to_pil(images):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        kilobytes = torch.tensor(sizes, device=images.device)
        return Scores(value=self.sign * kilobytes, parts={"kB": kilobytes})

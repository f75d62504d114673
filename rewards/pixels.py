"""The resize of PIL, exact to 8 bits and differentiable.

Encoders were trained on images that PIL had resized: along the width first, clamped and rounded to
8 bits, then along the height, clamped and rounded again. One float resize of both sides at once
differs from that by several levels of 255 where edges are sharp, because the overshoot of the
filter survives. Here both passes are matrix products with PIL's own coefficients.
PIL computes in integers of 30 bits, which float64 holds exactly, so the result is PIL's bit for
bit. (Pillow 13 takes the height first for tall images; the order here is that of the releases
before it, which the encoders saw.) Rounding passes gradients straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from steering.errors import OptionError
from steering.kernels.resize import Axis, axis
from steering.kernels.resize import resize as banded

Mode = Literal["shortest", "longest_pad", "squash", "pad_square"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "box"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _bilinear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _lanczos(x: float) -> float:
    if x == 0:
        return 1.0
    if not -3 <= x < 3:
        return 0.0
    return 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
    "lanczos": (_lanczos, 3.0),
    "box": (_box, 0.5),
}


@lru_cache(maxsize=128)
def coefficients(
    size_in: int,
    size_out: int,
    interpolation: str = "bicubic",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """PIL's weights of every output pixel, [size_in, size_out]; columns sum to one.

    The filter widens when scaling down (antialiasing), is cut at the border and renormalised.
    Weights are rounded to the 22 bits that PIL keeps of them.
    """
    with torch.inference_mode(False):  # what is kept here may serve a backward pass later
        return _coefficients(size_in, size_out, interpolation).to(device, dtype)


def _coefficients(size_in: int, size_out: int, interpolation: str) -> Tensor:
    kernel, support = _FILTERS[interpolation]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    matrix = torch.zeros(size_in, size_out, dtype=torch.float64)
    for column in range(size_out):
        centre = (column + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), size_in)
        weights = [kernel((row - centre + 0.5) * (1 / stretch)) for row in range(first, last)]
        total = 0.0
        for weight in weights:  # sum() of newer Pythons rounds otherwise than PIL does
            total += weight
        matrix[first:last, column] = torch.tensor(weights, dtype=torch.float64) * (1 / total)
    return torch.round(matrix * 2**22) / 2**22


@lru_cache(maxsize=128)
def _axis(size_in: int, size_out: int, interpolation: str, device: str) -> Axis | None:
    """The tables of one pass; None where the size stays."""
    if size_in == size_out:
        return None
    with torch.inference_mode(False):
        return axis(_coefficients(size_in, size_out, interpolation), device)


def resize(
    images: Tensor,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "bicubic",
    quantise: bool = True,
) -> Tensor:
    """Images [..., H, W] in [0, 1], resized to (height, width) as PIL does it, float32.

    Args:
        quantise: round to 8 bits before, between and after the passes, which gives PIL's result
            exactly (but for ties on devices without float64). False leaves the values smooth,
            within about 1/255 of PIL.
    """
    height, width = images.shape[-2:]
    wants_gradient = torch.is_grad_enabled() and images.requires_grad
    if quantise and images.device.type != "mps":
        across = _axis(width, size[1], interpolation, str(images.device))
        down = _axis(height, size[0], interpolation, str(images.device))
        if all(way is None or way.exact for way in (across, down)):
            with torch.autocast(images.device.type, enabled=False):
                return banded(images, across, down)
    if quantise and images.device.type == "cpu" and not wants_gradient:
        return _by_pil(images, size, interpolation)
    exact = quantise and images.device.type != "mps"  # which has no float64
    dtype = torch.float64 if exact else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        x = images.to(dtype).clamp(0, 1) * 255
        x = _rounded(x, torch.round(x)) if quantise else x
        if width != size[1]:
            matrix = coefficients(width, size[1], interpolation, str(x.device), dtype)
            x = _settled(x @ matrix, quantise)
        if height != size[0]:
            matrix = coefficients(height, size[0], interpolation, str(x.device), dtype)
            x = _settled(matrix.T @ x, quantise)
        return (x / 255).float()


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """How an encoder wants its pixels.

    Attributes:
        size: of the result, one number or (height, width).
        mode: "shortest" scales the shorter side and crops the centre (CLIP), "longest_pad" scales
            the longer side and pads, "squash" ignores the aspect ratio, "pad_square" pads to a
            square and scales that.
        interpolation: PIL's filter.
        mean, std: for normalisation, per channel.
        quantise: 8-bit rounding as in PIL; see `resize`.
        pad_value: of the padding, in [0, 1].
    """

    size: int | tuple[int, int] = 224
    mode: Mode = "shortest"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    quantise: bool = True
    pad_value: float = 0.0

    def __post_init__(self) -> None:
        for what, value, known in (
            ("mode", self.mode, ("shortest", "longest_pad", "squash", "pad_square")),
            ("interpolation", self.interpolation, tuple(_FILTERS)),
        ):
            if value not in known:
                raise OptionError(f"PixelSpec({what}={value!r}): give one of {', '.join(known)}.")

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> PixelSpec:
        """The spec of an open_clip ``preprocess_cfg`` (missing entries as open_clip has them)."""
        size = config.get("size", 224)
        modes: dict[str, Mode] = {"longest": "longest_pad", "squash": "squash"}
        return cls(
            size=size if isinstance(size, int) else (int(size[0]), int(size[-1])),
            mode=modes.get(config.get("resize_mode") or "shortest", "shortest"),
            interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
            mean=_three(config.get("mean") or CLIP_MEAN),
            std=_three(config.get("std") or CLIP_STD),
            pad_value=(config.get("fill_color") or 0) / 255,
        )

    @property
    def target(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def apply(self, images: Tensor) -> Tensor:
        """Normalised pixels [n, 3, *target] of images [n, 3, H, W] in [0, 1]; differentiable."""
        x = self.fit(images)
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def fit(self, images: Tensor) -> Tensor:
        """Pixels [n, 3, *target] in [0, 1], before normalisation."""
        height, width = images.shape[-2:]
        if self.mode == "pad_square":
            side = max(height, width)
            images = _centred(images, (side, side), self.pad_value)
            size = self.target
        else:
            size = self._scaled_size(height, width)
        x = resize(images, size, interpolation=self.interpolation, quantise=self.quantise)
        return _centred(x, self.target, self.pad_value)

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after scaling, before the crop or the padding."""
        target = self.target
        if self.mode == "squash":
            return target
        if self.mode == "shortest" and target[0] == target[1]:
            # torchvision truncates the longer side, open_clip's own resize below rounds it.
            short, side = min(height, width), target[0]
            long = int(side * max(height, width) / short)
            return (side, long) if height <= width else (long, side)
        pick = max if self.mode == "longest_pad" else min
        ratio = pick(height / target[0], width / target[1])
        return round(height / ratio), round(width / ratio)


def _by_pil(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """The same result by PIL, which skips the zeros of the filters; width first in any release."""
    resample = Image.Resampling[interpolation.upper()]
    rgb = images.ndim > 2 and images.shape[-3] == 3
    found = []
    # One at a time, so that the float64 copy stays in the cache.
    for one in images.detach().reshape(-1, *images.shape[-3 if rgb else -2 :]):
        levels = one.double().clamp_(0, 1).mul_(255).round_().byte()
        levels = levels.movedim(0, -1).contiguous() if rgb else levels
        picture = Image.fromarray(levels.numpy())
        picture = picture.resize((size[1], picture.height), resample)
        found.append(torch.from_numpy(np.array(picture.resize((size[1], size[0]), resample))))
    result = torch.stack(found)
    result = result.movedim(-1, -3) if rgb else result
    return (result.double() / 255).float().reshape(*images.shape[:-2], *size)


def _centred(x: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """[..., H, W] padded, then cropped around the centre, with torchvision's offsets."""
    more_h, more_w = max(size[0] - x.shape[-2], 0), max(size[1] - x.shape[-1], 0)
    if more_h or more_w:
        left, top = more_w // 2, more_h // 2
        x = F.pad(x, (left, more_w - left, top, more_h - top), value=value)
    top = round((x.shape[-2] - size[0]) / 2)
    left = round((x.shape[-1] - size[1]) / 2)
    return x[..., top : top + size[0], left : left + size[1]]


def eight_bit(images: Tensor) -> Tensor:
    """Values in [0, 1] as an 8-bit file holds them; gradients pass straight through."""
    if torch.is_grad_enabled() and images.requires_grad:
        x = images.clamp(0, 1) * 255
        return _rounded(x, torch.round(x)) / 255
    # The same in one buffer: full-size pictures are bound by memory, not by arithmetic.
    return images.clamp(0, 1).mul_(255).round_().div_(255)


def _settled(x: Tensor, quantise: bool) -> Tensor:
    """Clamped to 8 bits as PIL's passes end: halves go up."""
    x = x.clamp(0, 255)
    return _rounded(x, torch.floor(x + 0.5)) if quantise else x


def _rounded(x: Tensor, whole: Tensor) -> Tensor:
    """The rounded values with the gradient of the values before rounding."""
    return x + (whole - x).detach() if x.requires_grad else whole


def _three(values: Any) -> tuple[float, ...]:  # noqa: ANN401
    return tuple(values) if isinstance(values, (list, tuple)) else (float(values),) * 3

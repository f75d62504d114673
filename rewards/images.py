"""What rewards accept as images and prompts, and the way to PIL and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from steering.errors import OptionError, RewardError

# What Pillow raises on damaged files; a bomb is an image of too many pixels.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError
)  # fmt: skip
TOLERANCE = 1e-3  # beyond [0, 1]; decoders clamp, so anything further is another scale


def as_tensor(images: Any) -> Tensor:  # noqa: ANN401
    """Images float32 [n, 3, H, W], or video [n, F, 3, H, W], in [0, 1].

    Args:
        images: such a tensor (uint8 is divided by 255), a channel-last array [n, H, W, 3] or
            [n, F, H, W, 3], a PIL image, a list of them, or for video a list of lists.

    Raises:
        OptionError: wrong kind, rank, channels, range or an empty batch.
        RewardError: the images hold NaN.
    """
    tensor = images if isinstance(images, Tensor) else _from_other(images)
    if tensor.ndim not in (4, 5) or tensor.shape[-3] != 3:
        hint = ""
        if tensor.ndim == 3:
            hint = " One image is a batch too: images[None]."
        elif tensor.ndim > 3 and tensor.shape[-1] == 3:
            hint = " The channels are last: use images.movedim(-1, -3)."
        raise OptionError(
            "A reward takes images [n, 3, H, W] or video [n, frames, 3, H, W]; got shape "
            f"{tuple(tensor.shape)}.{hint}"
        )
    if tensor.numel() == 0:
        raise OptionError(f"There is nothing to score: images of shape {tuple(tensor.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise OptionError(f"Images must be floats in [0, 1] or uint8, not {tensor.dtype}.")
    _check_range(tensor)
    return tensor.float()


def check_prompts(prompts: str | Sequence[Any], n: int) -> list[Any]:
    """One prompt per image; a single string is repeated.

    Raises:
        OptionError: another number of prompts than images.
    """
    if isinstance(prompts, str):
        return [prompts] * n
    found = list(prompts)
    if len(found) != n:
        raise OptionError(
            f"A reward needs one prompt per image: got {len(found)} prompts for {n} images."
        )
    return found


def need_text(prompts: Sequence[Any], name: str) -> list[str]:
    """The prompts, all of them strings.

    Raises:
        OptionError: a prompt is None or not a string.
    """
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise OptionError(
                f"The reward {name!r} compares images with text, but prompt {row} is {prompt!r}. "
                "Give it a prompt (steer score: --prompt), or choose a reward that looks at "
                "images only."
            )
    return list(prompts)


def device_name(device: torch.device | str) -> str:
    """The device with its index: "cuda" and "cuda:0" must not load a model twice."""
    return str(torch.empty(0, device=device).device)


def open_picture(path: Path) -> Image.Image:
    """A picture file as RGB, upright.

    Raises:
        OptionError: not a whole picture, or one of too many pixels.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _UNREADABLE as error:
        raise OptionError(f"{path} cannot be read as a picture ({error}).") from error


def default_device() -> str:
    """Where networks go unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_pil(images: Any) -> list[Any]:  # noqa: ANN401
    """PIL images, values rounded to 8 bits; for video one list of frames per sample."""
    tensor = as_tensor(images).detach()
    array = (tensor.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
    if array.ndim == 5:
        return [[Image.fromarray(frame) for frame in video] for video in array]
    return [Image.fromarray(image) for image in array]


def _from_other(images: Any) -> Tensor:  # noqa: ANN401
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3)
    if not isinstance(images, (list, tuple)):
        raise OptionError(
            f"A reward cannot read images from {type(images).__name__}. Give a tensor "
            "[n, 3, H, W] in [0, 1], an array [n, H, W, 3] or a list of PIL images."
        )
    if not images:
        raise OptionError("There is nothing to score: an empty list of images.")
    found = [_one(image) for image in images]
    shapes = {tuple(f.shape) for f in found}
    if len(shapes) > 1:
        sizes = ", ".join(f"{s[-1]}x{s[-2]}" for s in sorted(shapes))
        raise OptionError(
            f"Images of one batch must have one size; got {sizes} (width x height). "
            "Call the reward once per size."
        )
    return torch.stack(found)


def _one(image: Any) -> Tensor:  # noqa: ANN401
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, -3)
    if isinstance(image, Tensor):
        return image
    return _from_other(image)


def _check_range(images: Tensor) -> None:
    low, high = (float(v) for v in images.detach().aminmax())
    if low != low or high != high:
        raise RewardError(
            "The images hold NaN, so no reward can judge them. The model has diverged, often by "
            "a step that is too large or by half precision in the decoder."
        )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        hint = "Divide by 255." if high > 2 else "Clamp them, or map [-1, 1] by (x + 1) / 2."
        raise OptionError(f"Images must lie in [0, 1]; these span [{low:.4g}, {high:.4g}]. {hint}")

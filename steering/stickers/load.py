"""Opens the shipped sticker models. All of them load from the package; nothing is downloaded."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from steering.stickers.world import SIZE

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from open_clip import CLIP
    from transformers import YolosForObjectDetection

WEIGHTS = Path(__file__).with_name("weights")
_T = TypeVar("_T")


def load_pipeline(
    dtype: torch.dtype = torch.bfloat16, folder: Path | str = WEIGHTS / "pipeline"
) -> StableDiffusion3Pipeline:
    """The sticker text-to-image model, with its progress bar off.

    Raises:
        steering.errors.WeightsError: weights are missing or cannot be read.
    """
    from diffusers import StableDiffusion3Pipeline

    def read() -> StableDiffusion3Pipeline:
        with _quiet("diffusers", "transformers"):
            return StableDiffusion3Pipeline.from_pretrained(
                str(folder), torch_dtype=dtype, text_encoder_3=None, tokenizer_3=None,
                feature_extractor=None, image_encoder=None, local_files_only=True,
            )  # fmt: skip

    pipe = _open(Path(folder), "model_index.json", read)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(default_height=SIZE, default_width=SIZE)
    return pipe


def load_clip(
    folder: Path | str = WEIGHTS / "clip",
) -> tuple[CLIP, Callable[[list[str]], torch.Tensor], dict[str, Any]]:
    """(open_clip model in float32, tokenizer, preprocess: size, mean, std).

    The folder also opens with stock open_clip, as the model name `f"local-dir:{folder}"`.

    Raises:
        steering.errors.WeightsError: weights are missing or cannot be read.
    """
    import open_clip

    def read() -> tuple[CLIP, Callable[[list[str]], torch.Tensor], dict[str, Any]]:
        name = f"local-dir:{folder}"
        config = json.loads((Path(folder) / "open_clip_config.json").read_text())
        with _quiet("transformers", "root"):
            model = open_clip.create_model(name).eval().requires_grad_(False)
            return model, open_clip.get_tokenizer(name), config["preprocess_cfg"]

    return _open(Path(folder), "open_clip_model.safetensors", read)


def load_detector(folder: Path | str = WEIGHTS / "detector") -> YolosForObjectDetection:
    """The sticker object detector, float32, in evaluation mode.

    Raises:
        steering.errors.WeightsError: weights are missing or cannot be read.
    """
    from transformers import YolosForObjectDetection

    def read() -> YolosForObjectDetection:
        with _quiet("transformers"):
            model = YolosForObjectDetection.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True
            )
        return model.eval().requires_grad_(False)

    return _open(Path(folder), "model.safetensors", read)


def _open(folder: Path, marker: str, read: Callable[[], _T]) -> _T:
    """Run `read`, turning a missing or broken folder into one clear error."""
    from steering.errors import WeightsError

    way_out = "Reinstall the package, or train with python -m steering.stickers.train."
    if not (folder / marker).is_file():
        raise WeightsError(f"Sticker weights are missing: {folder / marker}. {way_out}")
    try:
        return read()
    except Exception as error:
        raise WeightsError(
            f"Sticker weights in {folder} cannot be read ({type(error).__name__}: {error}). "
            f"{way_out}"
        ) from error


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Hold back warnings (AutoencoderTiny is fine here) and the bar of loaded weights."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(None if n == "root" else n) for n in names]
    before = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()

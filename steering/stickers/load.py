"""Opens the shipped sticker models. All of them load from the package; nothing is downloaded."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from open_clip import CLIP
    from transformers import ConditionalDetrForObjectDetection

WEIGHTS = Path(__file__).with_name("weights")
T5_ZEROS = 14  # tokens that stand for the T5 encoder this pipeline does without
CALL: dict[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "max_sequence_length": T5_ZEROS,
}
"""Arguments of `pipe(...)` that suit the model; a stock call adds 256 zero tokens instead of 14,
which makes a step six times as slow. `steering.steer` passes these unless told otherwise."""
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
        with quiet("diffusers", "transformers"):
            return StableDiffusion3Pipeline.from_pretrained(
                str(folder), torch_dtype=dtype, text_encoder_3=None, tokenizer_3=None,
                feature_extractor=None, image_encoder=None, local_files_only=True,
            )  # fmt: skip

    pipe = _open(Path(folder), "model_index.json", read)
    pipe.set_progress_bar_config(disable=True)
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
        with quiet("transformers", "diffusers", "root"):
            model = open_clip.create_model(name).eval().requires_grad_(False)
            return model, open_clip.get_tokenizer(name), config["preprocess_cfg"]

    return _open(Path(folder), "open_clip_model.safetensors", read)


def load_detector(folder: Path | str = WEIGHTS / "detector") -> ConditionalDetrForObjectDetection:
    """The sticker object detector, float32, in evaluation mode.

    Raises:
        steering.errors.WeightsError: weights are missing or cannot be read.
    """
    from transformers import ConditionalDetrForObjectDetection

    def read() -> ConditionalDetrForObjectDetection:
        with quiet("transformers"):
            model = ConditionalDetrForObjectDetection.from_pretrained(
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
def quiet(*names: str) -> Iterator[None]:
    """Hold back loading bars, deprecations and harmless warnings (the VAE is no AutoencoderKL)."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for module in bars:
            module.disable_progress_bar()
            stack.callback(module.enable_progress_bar)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(logging.ERROR)
            stack.callback(logger.setLevel, level)
        yield

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

from steering.turns import TURN

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from open_clip import CLIP
    from transformers import ConditionalDetrForObjectDetection

WEIGHTS = Path(__file__).with_name("weights")
T5_ZEROS = 14  # tokens that stand for the T5 encoder this pipeline does without
CALLS: dict[str, dict[str, Any]] = {
    "stickers": {
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "max_sequence_length": T5_ZEROS,
    },
    "stickers-sd": {"num_inference_steps": 20, "guidance_scale": 4.0},
    "stickers-turbo": {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "max_sequence_length": T5_ZEROS,
    },
}
"""Arguments of `pipe(...)` that suit each model. A stock call of an SD3 pipeline adds 256 zero
tokens instead of 14, which makes a step six times as slow. `steering.steer` passes these unless
told otherwise."""
CALL = CALLS["stickers"]
FOLDERS: dict[str, Path] = {
    "stickers": WEIGHTS / "pipeline",
    "stickers-sd": WEIGHTS / "sd",
    "stickers-turbo": WEIGHTS / "turbo",
}
_T = TypeVar("_T")


def load_pipeline(
    name: str = "stickers",
    dtype: torch.dtype = torch.bfloat16,
    folder: Path | str | None = None,
    base: Path | str = FOLDERS["stickers"],
) -> DiffusionPipeline:
    """A sticker text-to-image model, with its progress bar off.

    Args:
        name: "stickers" (flow), "stickers-sd" (epsilon-prediction UNet) or "stickers-turbo" (the
            flow's student of one to four steps).
        folder: other weights for it, as a training run exports them.
        base: the "stickers" folder whose autoencoder, tokenizers and (turbo) text towers the
            other two share.

    Raises:
        steering.errors.WeightsError: weights are missing or cannot be read.
        steering.errors.OptionError: an unknown name.
    """
    from steering.errors import unknown_name

    if name not in FOLDERS:
        raise unknown_name("sticker model", name, FOLDERS)
    where = FOLDERS[name] if folder is None else Path(folder)
    pipe = _open(where, "model_index.json", lambda: _read(name, where, Path(base), dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _read(name: str, folder: Path, base: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline in `folder`; parts that it does not hold come from `base`."""
    import diffusers
    import transformers

    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
    with quiet("diffusers", "transformers"):
        if name == "stickers-sd":
            return diffusers.StableDiffusionPipeline.from_pretrained(
                str(folder), **options, requires_safety_checker=False,
                safety_checker=None, feature_extractor=None, image_encoder=None,
                vae=diffusers.AutoencoderTiny.from_pretrained(base / "vae", **options),
                tokenizer=transformers.CLIPTokenizer.from_pretrained(base / "tokenizer"),
            )  # fmt: skip
        open_sd3 = diffusers.StableDiffusion3Pipeline.from_pretrained
        absent = ("text_encoder_3", "tokenizer_3", "feature_extractor", "image_encoder")
        parts: dict[str, Any] = dict.fromkeys(absent)
        if name == "stickers-turbo":
            rest = open_sd3(str(base), **options, **parts, transformer=None, scheduler=None)
            shared = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            parts |= {part: getattr(rest, part) for part in shared}
        return open_sd3(str(folder), **options, **parts)


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
            model: Any = open_clip.create_model(name).eval().requires_grad_(False)
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
        with TURN, torch.random.fork_rng(devices=[]):  # loaded weights replace random ones
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

    with TURN, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for module in (diffusers_logging, transformers_logging):
            if module.is_progress_bar_enabled():
                module.disable_progress_bar()
                stack.callback(module.enable_progress_bar)
        for logger in map(logging.getLogger, names):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield

"""Opens open_clip models, and says what is missing or does not fit before reading weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steering.errors import OptionError, WeightsError, unknown_name
from steering.rewards.checkpoints import kept

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEFAULT_TAG = "openai"
_HUB, _FOLDER = "hf-hub:", "local-dir:"


@dataclass(eq=False, kw_only=True)
class Loaded:
    """An open_clip model with all that is needed to ask it.

    Attributes:
        preprocess: open_clip's ``preprocess_cfg``.
        dtype: of the pixels it takes.
        encoder: a place for what is built on it once.
    """

    model: Any
    tokenizer: Callable[[list[str]], torch.Tensor]
    preprocess: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    encoder: Any = None


@kept(4)
def load(model: str, pretrained: str, precision: str, device: str) -> Loaded:
    """The model in evaluation mode; the last four stay loaded (``load.cache_clear()`` frees them).

    Raises:
        OptionError: unknown model or tag, or an activation that does not fit the weights.
        WeightsError: weights that cannot be found or read.
    """
    if model == "stickers":
        return _stickers(pretrained, precision, device)
    name, tag = resolve(model, pretrained)
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    try:
        # create_model would do this too, but logs a failure before raising it.
        download_pretrained(get_pretrained_cfg(name, tag) if tag else {})
        net = open_clip.create_model(
            name, pretrained=tag, precision=precision, device=device, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise WeightsError(_missing(name, tag, error)) from error
    return Loaded(
        model=net.eval().requires_grad_(False),
        tokenizer=tokenizer,
        preprocess=dict(open_clip.get_model_preprocess_cfg(net)),
        device=torch.device(device),
        dtype=_DTYPES[precision],
    )


def resolve(model: str, pretrained: str) -> tuple[str, str | None]:
    """(model name, tag or file) as ``open_clip.create_model`` takes them, checked.

    Raises:
        OptionError: unknown model or tag, or an activation that does not fit the weights.
        WeightsError: a local folder or file that is not there.
    """
    if model.startswith((_HUB, _FOLDER)):
        if pretrained not in ("", _DEFAULT_TAG):
            raise OptionError(
                f"clip(model={model}) brings its own weights; leave out pretrained={pretrained}."
            )
        return (_folder(model.removeprefix(_FOLDER)) if model.startswith(_FOLDER) else model), None
    if Path(pretrained).is_dir():
        return _folder(pretrained), None
    import open_clip

    model = model.replace("/", "-")
    if model not in open_clip.list_models():
        raise unknown_name("open_clip model", model, open_clip.list_models())
    if Path(pretrained).is_file():
        return model, pretrained
    if any(mark in pretrained for mark in ("/", "\\")) or Path(pretrained).suffix:
        raise WeightsError(
            f"clip: there is no weights file or folder at {pretrained!r} "
            f"(looked in {Path.cwd()} where it is relative)."
        )
    _check_tag(model, pretrained)
    return model, pretrained


def _check_tag(model: str, tag: str) -> None:
    """Raises unless the tag exists and was trained with the activation the model has.

    open_clip only warns of a QuickGELU mismatch, and the embeddings are then plainly wrong.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    suffix = "-quickgelu"
    twin = model.removesuffix(suffix) if model.endswith(suffix) else model + suffix
    cfg = get_pretrained_cfg(model, tag)
    if not cfg:
        if twin in open_clip.list_models() and get_pretrained_cfg(twin, tag):
            raise OptionError(_activation(model, tag, twin))
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not tags:
            raise OptionError(
                f"open_clip has no weights for {model}; give pretrained=a file or a folder."
            )
        raise unknown_name(f"weights tag of {model}:", tag, tags)
    has = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    # A model without a twin was made for its tags, whatever open_clip's table says of them.
    if has != bool(cfg.get("quick_gelu", False)) and twin in open_clip.list_models():
        raise OptionError(_activation(model, tag, twin))


def _activation(model: str, tag: str, twin: str) -> str:
    kind = "plain GELU" if model.endswith("-quickgelu") else "QuickGELU"
    return (
        f"clip: the weights {tag!r} were trained with {kind}, which {model} does not use; its "
        f"scores would be wrong without any sign of it. Use model={twin}."
    )


def _folder(path: str) -> str:
    """``local-dir:`` name of a folder that open_clip can read.

    Raises:
        WeightsError: it holds no config or no weights.
    """
    folder = Path(path).expanduser()
    config = folder / "open_clip_config.json"
    if not config.is_file():
        raise WeightsError(
            f"clip: {folder} holds no open_clip_config.json, so its architecture is unknown. Give "
            "the weights file itself: clip(model=ViT-B-32, pretrained=folder/weights.safetensors)."
        )
    try:
        if "model_cfg" not in json.loads(config.read_text()):
            raise WeightsError(f"clip: {config} has no entry 'model_cfg'.")
    except json.JSONDecodeError as error:
        raise WeightsError(f"clip: {config} is not valid JSON ({error}).") from error
    if not any(p.suffix in (".safetensors", ".bin", ".pth") for p in folder.iterdir()):
        raise WeightsError(f"clip: {folder} holds no weights (.safetensors, .bin or .pth).")
    return f"{_FOLDER}{folder}"


def _missing(name: str, tag: str | None, error: Exception) -> str:
    from open_clip.pretrained import get_pretrained_cfg

    cfg = get_pretrained_cfg(name, tag) if tag else {}
    looked = repr(cfg.get("url") or tag or name)
    if cfg.get("hf_hub"):
        looked = f"the Hugging Face id {cfg['hf_hub'].rstrip('/')!r}"
    reason = " ".join(str(error).split())[:300]
    architecture = "" if name.startswith((_HUB, _FOLDER)) else f"model={name}, "
    kind = "folder" if name.startswith((_HUB, _FOLDER)) else "file.safetensors"
    return (
        f"The weights of clip(model={name}{f', pretrained={tag}' if tag else ''}) could not be "
        f"loaded; looked for {looked} ({type(error).__name__}: {reason}). Without a network, "
        f"fetch them elsewhere and give clip({architecture}pretrained=/path/to/{kind}); a folder "
        "needs open_clip_config.json beside the weights."
    )


def _stickers(pretrained: str, precision: str, device: str) -> Loaded:
    from steering.stickers.load import load_clip

    if pretrained != _DEFAULT_TAG:
        raise OptionError(
            f"clip(model=stickers) brings its own weights; leave out pretrained={pretrained}."
        )
    if precision != "fp32":
        raise OptionError(f"clip(model=stickers) runs in fp32; leave out precision={precision}.")
    net, tokenizer, preprocess = load_clip()
    return Loaded(
        model=net.to(device),
        tokenizer=tokenizer,
        preprocess=dict(preprocess),
        device=torch.device(device),
        dtype=torch.float32,
    )

"""Opens a pipeline by name, folder or hub id, and says where a pipeline came from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from steering.errors import OptionError, WeightsError
from steering.recipe import describe_value, fingerprint
from steering.turns import TURN

EMBEDDED = "stickers"
"""The model that ships with the package and is used unless another is named."""
SHIPPED = (EMBEDDED, "stickers-sd", "stickers-turbo")
"""All models that ship with the package."""
_SAVINGS = ("slicing", "tiling")


def load(
    source: str | os.PathLike[str] = EMBEDDED,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    attention: str = "native",
    compile: bool | str = False,
    vae: str | None = None,
    channels_last: bool | str = "auto",
) -> Any:  # noqa: ANN401
    """A diffusers pipeline, ready to be steered.

    Args:
        source: "stickers", "stickers-sd" or "stickers-turbo" (embedded), a folder with a
            model_index.json, or a hub id.
        dtype: "auto" is bfloat16 where the hardware multiplies it fast, float32 elsewhere.
        device: "cuda" where there is one, by default.
        attention: "native" is torch's own; "auto" tries all there are and takes the fastest that
            gives right numbers, see :func:`steering.attention.use_attention`.
        compile: torch.compile for the denoisers: True, or a mode ("reduce-overhead" for CUDA
            graphs), see :func:`steering.compiled.compile_networks`.
        vae: "slicing" decodes one image at a time, "tiling" also in tiles: less memory for time.
        channels_last: memory format of the autoencoder's convolutions; "auto" takes it where it
            was measured to be faster: tiny autoencoders on CPUs (docs/performance.md).

    Raises:
        WeightsError: not found, not readable, or no network for a hub id.
        OptionError: an option that does not exist, or that the autoencoder does not have.
    """
    _check_options(attention, compile, vae, channels_last)
    with TURN:  # meanwhile the default dtype is another
        pipe = _open(source, dtype, device)
    _lay_out(pipe, channels_last)
    if vae is not None:
        _save_memory(pipe, *(_SAVINGS if vae == "tiling" else (vae,)))
    if attention != "native":
        from steering.attention import use_attention

        use_attention(pipe, attention)
    if compile:
        from steering.compiled import compile_networks

        compile_networks(pipe, "default" if compile is True else compile)
    return pipe


def _check_options(
    attention: str, compile: bool | str, vae: str | None, channels_last: bool | str
) -> None:
    from steering.compiled import MODES
    from steering.kernels.attention import BACKENDS

    for name, value, known in (
        ("attention", attention, ("auto", *BACKENDS)),
        ("mode of compile", compile, (True, False, *MODES)),
        ("vae", vae, (None, "slicing", "tiling")),
        ("channels_last", channels_last, (True, False, "auto")),
    ):
        if value not in known:
            said = ", ".join(str(k) for k in known)
            raise OptionError(f"Unknown {name} {value!r}. Known: {said}.")


def _lay_out(pipe: Any, channels_last: bool | str) -> None:  # noqa: ANN401
    part = getattr(pipe, "vae", None)
    if part is None or channels_last is False:
        return
    proven = type(part).__name__ == "AutoencoderTiny" and part.device.type == "cpu"
    if channels_last is True or proven:
        part.to(memory_format=torch.channels_last)


def _save_memory(pipe: Any, *savings: str) -> None:  # noqa: ANN401
    part = getattr(pipe, "vae", None)
    for what in savings:
        enable = getattr(part, f"enable_{what}", None)
        if enable is None:
            where = f"{type(part).__name__} of {type(pipe).__name__}"
            raise OptionError(f"vae={savings[-1]!r}: {where} has no {what}.")
        enable()


def _open(
    source: str | os.PathLike[str],
    dtype: str | torch.dtype,
    device: str | None,
) -> Any:  # noqa: ANN401
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(f"device={device!r}: torch finds no CUDA device here. Use 'cpu'.")
    wanted = as_dtype(dtype, device)
    if str(source) in SHIPPED:
        from steering.stickers.load import load_pipeline

        return load_pipeline(str(source), wanted).to(device)
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise WeightsError(
            f"{folder} is no diffusers pipeline: it has no model_index.json. Name the folder "
            "that pipe.save_pretrained() wrote."
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(source), torch_dtype=wanted, local_files_only=folder.exists(), **_left_out(folder)
        )
    except Exception as error:
        raise WeightsError(
            f"Model {str(source)!r} could not be opened: {error}. Give {EMBEDDED!r}, a local "
            "folder, or a hub id that is cached or can be downloaded."
        ) from error
    return pipe.to(device)


def _left_out(folder: Path) -> dict[str, None]:
    """The parts a saved pipeline did without (SD3 without T5), which diffusers wants named."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    return {name: None for name, where in parts.items() if where == [None, None]}


def call_defaults(source: str | None) -> dict[str, Any]:
    """Call arguments that suit a model better than its pipeline class's own defaults."""
    if source not in SHIPPED:
        return {}
    from steering.stickers.load import CALLS

    return dict(CALLS[source])


def as_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """A dtype from its name; "auto" looks at the hardware.

    Raises:
        OptionError: not a floating point dtype's name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    found = getattr(torch, names.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"Unknown dtype {dtype!r}. Known: auto, bfloat16, float16, float32.")
    return found


def _fast_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Matrix tiles (AMX) or dot products (AVX512-BF16); elsewhere bfloat16 is emulated and slower
    # than float32, convolutions on AVX2 by a factor of ten.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def source_of(pipe: object) -> str | None:
    """The name, folder or hub id a pipeline was loaded from, None where it was built in memory."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if not name:
        return None
    from steering.stickers.load import FOLDERS

    folder = Path(name)
    if folder.exists():
        for shipped, place in FOLDERS.items():
            if folder.resolve() == place.resolve():
                return shipped
    return str(name)


def describe(pipe: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a recipe must know about a pipeline to find it again and to know it is the same."""
    network = next(
        (getattr(pipe, n) for n in ("transformer", "unet") if getattr(pipe, n, None) is not None),
        None,
    )
    scheduler = getattr(pipe, "scheduler", None)
    with TURN:  # others freeze its parameters for a while
        setup = setup_of(pipe)
    return {
        "source": source_of(pipe),
        "class": type(pipe).__name__,
        "dtype": str(getattr(network, "dtype", None)).removeprefix("torch."),
        "device": str(getattr(pipe, "device", "cpu")),
        "scheduler": None if scheduler is None else _scheduler(scheduler),
        "fingerprint": None if network is None else fingerprint(network),
        "setup": setup,
    }


def setup_of(pipe: Any) -> dict[str, Any]:  # noqa: ANN401
    """How a pipeline was made ready, which shows in the last bits of its pictures.

    ``channels_last`` and ``frozen`` name components, the latter those without any trainable
    parameter: torch multiplies in another order where a weight wants a gradient, under ``no_grad``
    too. What else was done to modules (processors of attention, some parameters frozen) is not
    seen.
    """
    from steering.compiled import Bucketed

    parts = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    network, vae = parts.get("transformer", parts.get("unet")), parts.get("vae")
    forward = getattr(network, "forward", None)
    return {
        "attention": getattr(network, "_chosen_attention", "native"),
        "compile": forward.mode if isinstance(forward, Bucketed) else False,
        "channels_last": sorted(n for n, p in parts.items() if _is_channels_last(p)),
        **{what: bool(getattr(vae, f"use_{what}", False)) for what in _SAVINGS},
        "frozen": sorted(n for n, p in parts.items() if not _trains(p)),
    }


def _is_channels_last(part: torch.nn.Module) -> bool:
    last = torch.channels_last
    weights = (p for p in part.parameters() if p.ndim == 4 and not p.is_contiguous())
    return any(weight.is_contiguous(memory_format=last) for weight in weights)


def _trains(part: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def load_again(model: dict[str, Any]) -> Any:  # noqa: ANN401
    """The pipeline that :func:`describe` described, opened from its source."""
    setup = model.get("setup") or {}
    options = {k: setup[k] for k in ("attention", "compile") if k in setup}
    options |= {"channels_last": False} if "channels_last" in setup else {}
    pipe = load(model["source"], dtype=model["dtype"], device=model["device"], **options)
    _save_memory(pipe, *(what for what in _SAVINGS if setup.get(what)))
    for name, part in pipe.components.items():
        if name in setup.get("channels_last", ()):
            part.to(memory_format=torch.channels_last)
        if name in setup.get("frozen", ()):
            part.requires_grad_(False)
    return pipe


def _scheduler(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return {
        "class": type(scheduler).__name__,
        "config": {k: describe_value(v) for k, v in sorted(config.items())},
    }


def with_scheduler(pipe: Any, described: dict[str, Any] | None) -> Any:  # noqa: ANN401
    """The pipeline with the scheduler a recipe names."""
    if described is None or _scheduler(pipe.scheduler) == described:
        return pipe
    import diffusers

    cls = getattr(diffusers, described["class"], None)
    if not isinstance(cls, type) or not hasattr(cls, "from_config"):
        raise OptionError(f"The recipe's scheduler {described['class']!r} is unknown here.")
    pipe.scheduler = cls.from_config(described["config"])
    return pipe

"""Finds and opens checkpoints: a folder on disk or a hub id, the same way for every reward.

Pickled weights are read with ``weights_only``; code that comes with a checkpoint is never run. A
weight that the files do not hold is an error: a layer left at random gives plausible scores that
are wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from steering.errors import OptionError, WeightsError
from steering.turns import TURN

T = TypeVar("T", bound=Callable[..., Any])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFE = ("model.safetensors", "model.safetensors.index.json")
WEIGHTS = (*SAFE, "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt", "vocab.json")
IMAGES = ("preprocessor_config.json", "processor_config.json")
_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja"]


@contextmanager
def building() -> Iterator[None]:
    """Where a network is made: a backward pass can go through its parameters later, and the random
    weights that loaded ones replace leave the caller's generator as it was."""
    with TURN, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        yield


def kept(most: int) -> Callable[[T], T]:
    """Decorator of loaders: what the last few arguments gave is kept, and made once in `building`,
    whichever thread comes first. ``cache_clear()`` and ``cache_info()`` as of `lru_cache`."""

    def keep(load: T) -> T:
        cached = lru_cache(maxsize=most)(building()(load))

        @wraps(load)
        def once(*given: Any, **more: Any) -> Any:  # noqa: ANN401
            with TURN:
                return cached(*given, **more)

        vars(once).update(cache_clear=cached.cache_clear, cache_info=cached.cache_info)
        return once  # type: ignore[return-value]

    return keep


def dtype_of(precision: str, reward: str) -> torch.dtype:
    """The torch dtype of "fp32", "bf16" or "fp16".

    Raises:
        OptionError: another word.
    """
    if precision not in DTYPES:
        raise OptionError(f"{reward}(precision={precision!r}): give {', '.join(DTYPES)}.")
    return DTYPES[precision]


def find(source: str, reward: str, files: Sequence[str | tuple[str, ...]]) -> Path:
    """The folder of a checkpoint.

    Args:
        source: a folder, or a hub id, which is looked up in the cache and then on the hub.
        reward: named in messages.
        files: needed there; of a tuple, one is enough. Shards that an index names are needed too.

    Raises:
        WeightsError: no such folder, id or file; says which, where from, and how to place it.
    """
    wanted = Path(source).expanduser()
    if wanted.is_dir():
        folder = wanted
    elif source.startswith((".", "/", "~")) or source.count("/") != 1 or "\\" in source:
        raise WeightsError(
            f"{reward}: there is no folder {source!r} (looked in {Path.cwd()} where it is "
            f"relative). {_way_out(reward, source, files)}"
        )
    else:
        folder = _fetch(source, reward, files)
    missing = _missing(folder, files)
    if missing:
        raise WeightsError(
            f"{reward}: {folder} lacks {missing}. {_way_out(reward, source, files)}"
        )
    return folder


def load_part(
    cls: Any,  # noqa: ANN401
    folder: Path,
    reward: str,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """``cls.from_pretrained(folder)`` of a config, tokenizer or processor.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        return cls.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:
        raise WeightsError(_unreadable(cls, folder, reward, error)) from error


def load_model(
    cls: Any,  # noqa: ANN401
    folder: Path,
    reward: str,
    dtype: torch.dtype,
    device: str,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """A transformers model with all its weights, frozen, in evaluation mode.

    Args:
        options: for ``from_pretrained``.

    Raises:
        WeightsError: unreadable weights, or weights that do not fill the model.
    """
    try:
        model, info = cls.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise WeightsError(_unreadable(cls, folder, reward, error)) from error
    check_filled(info["missing_keys"], folder, reward)
    return model.to(device).eval().requires_grad_(False)


def check_filled(missing: Sequence[str], folder: Path, reward: str) -> None:
    """Raises WeightsError where parameters of the model are not in the files."""
    if missing:
        names = sorted(missing)
        raise WeightsError(
            f"{reward}: the weights in {folder} lack {len(names)} of the model's parameters, such "
            f"as {', '.join(names[:3])}; left at random they would give wrong scores without any "
            "sign of it. The files belong to another class of model, or are incomplete."
        )


def shards(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before pickles."""
    for name in WEIGHTS:
        path = folder / name
        if path.is_file() and name.endswith(".index.json"):
            index = json.loads(path.read_text())
            return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
        if path.is_file():
            return [path]
    return []


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one weight file, on the CPU."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _fetch(source: str, reward: str, files: Sequence[str | tuple[str, ...]]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=[*_TEXTS, "*.safetensors"]))
        if _missing(folder, files):  # older checkpoints have pickles only
            folder = Path(snapshot_download(source, allow_patterns=[*_TEXTS, "*.bin"]))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{reward}: the checkpoint {source!r} is neither a folder here, nor in the Hugging "
            f"Face cache, nor could it be fetched ({type(error).__name__}: {reason}). "
            f"{_way_out(reward, source, files)}"
        ) from error
    return folder


def _missing(folder: Path, files: Sequence[str | tuple[str, ...]]) -> str:
    """The needed files that are not there, in words; "" if all are."""
    lacking = []
    for need in files:
        names = (need,) if isinstance(need, str) else need
        if not any((folder / name).is_file() for name in names):
            lacking.append(" or ".join(names))
    lacking += [path.name for path in shards(folder) if not path.is_file()]
    return ", ".join(lacking)


def _way_out(reward: str, source: str, files: Sequence[str | tuple[str, ...]]) -> str:
    first = [name if isinstance(name, str) else name[0] for name in files]
    where = f"hf download {source} --local-dir FOLDER" if source.count("/") == 1 else "its hub id"
    return (
        f"Without a network, fetch it elsewhere ({where}) and give {reward}(model=FOLDER); the "
        f"folder must hold {', '.join(first)} and the like."
    )


def _unreadable(cls: Any, folder: Path, reward: str, error: Exception) -> str:  # noqa: ANN401
    reason = " ".join(str(error).split())[:300]
    return (
        f"{reward}: {folder} could not be opened as {cls.__name__} "
        f"({type(error).__name__}: {reason})."
    )

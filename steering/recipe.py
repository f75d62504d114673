"""A result's recipe: all that is needed to make it again, as JSON inside the PNG."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

import steering
from steering.errors import OptionError, RecipeError

FORMAT = "steering-recipe"
VERSION = 1
CHUNK = "steering"
_PACKED, _MOST = "zlib:", 2**26
_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to run to get one picture again.

    Attributes:
        model: {"source", "class", "dtype", "device", "scheduler", "fingerprint", "setup"}; source
            is None where the pipeline was handed over as an object with no known origin.
        call: keyword arguments of the pipeline call other than the prompt.
        prompts, seeds: of all prompts run together (rounding depends on the batch).
        prompt: index of this picture's prompt; ``image``: index among its pictures.
        metadata: what the rewards were given beside each prompt; None for nothing.
        method: {"name", "options"}.
        reward, heldout: spec strings, None where only the caller can rebuild them.
        budget: the caps.
        engine: {"max_batch", "threads"}.
        versions: of the packages that decide the bits.
    """

    model: dict[str, Any]
    call: dict[str, Any]
    prompts: list[str | None]
    seeds: list[int]
    prompt: int
    image: int
    method: dict[str, Any]
    reward: str | None
    heldout: list[str | None]
    budget: dict[str, Any]
    engine: dict[str, Any]
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    metadata: list[Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with its format and version."""
        return {"format": FORMAT, "version": VERSION, **self.__dict__}

    @classmethod
    def from_json(cls, data: object, where: str = "recipe") -> Recipe:
        """The recipe of a JSON object.

        Raises:
            RecipeError: foreign, damaged or of another version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise RecipeError(f"{where}: this is not a steering recipe.")
        if data.get("version") != VERSION:
            raise RecipeError(
                f"{where}: recipe version {data.get('version')!r}, this release reads {VERSION}."
            )
        values = {k: v for k, v in data.items() if k not in ("format", "version")}
        missing = sorted(set(cls.__dataclass_fields__) - {"metadata"} - set(values))
        extra = sorted(set(values) - set(cls.__dataclass_fields__))
        if missing or extra:
            raise RecipeError(f"{where}: damaged recipe (missing {missing}, unknown {extra}).")
        recipe = cls(**values)
        recipe._check(where)
        return recipe

    def _check(self, where: str) -> None:
        kinds = {"model": dict, "call": dict, "prompts": list, "seeds": list, "method": dict}
        kinds |= {"budget": dict, "engine": dict, "heldout": list, "prompt": int, "image": int}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise RecipeError(f"{where}: damaged recipe, {name!r} is not a {kind.__name__}.")
        if not 0 <= self.prompt < len(self.prompts) or len(self.seeds) != len(self.prompts):
            raise RecipeError(f"{where}: damaged recipe, prompt {self.prompt} is out of range.")
        self._check_setup(where)
        extra = self.metadata
        if extra is not None and not (isinstance(extra, list) and len(extra) == len(self.prompts)):
            raise RecipeError(f"{where}: damaged recipe, metadata is not one per prompt.")
        if not all(p is None or isinstance(p, str) for p in self.prompts):
            raise RecipeError(f"{where}: damaged recipe, prompts are no texts.")
        if not isinstance(self.engine.get("max_batch"), int | None):
            raise RecipeError(f"{where}: damaged recipe, engine.max_batch is no number.")
        if self.image < 0 or "name" not in self.method or "options" not in self.method:
            raise RecipeError(f"{where}: damaged recipe, no method or image index.")

    def _check_setup(self, where: str) -> None:
        setup = self.model.get("setup", {})
        kinds: dict[str, Any] = {"attention": str, "compile": str | bool}
        kinds |= dict.fromkeys(("slicing", "tiling"), bool)
        kinds |= dict.fromkeys(("channels_last", "frozen"), list)
        if not isinstance(setup, dict) or not all(
            isinstance(setup[name], kind) for name, kind in kinds.items() if name in setup
        ):
            raise RecipeError(f"{where}: damaged recipe, model.setup is no description.")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the bits of a picture."""
    return dict(_versions())


@functools.cache  # reading the metadata of torch takes longer than saving a small picture
def _versions() -> dict[str, str]:
    found = {"steering": steering.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_value(value: Any) -> Any:  # noqa: ANN401
    """A call argument as JSON, or a note that it cannot be stored."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.ndim == 0:
        value = value.item()  # a number in numpy's or torch's dress
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        shape = getattr(value, "shape", getattr(value, "size", None))
        sized = f" {tuple(shape)}" if isinstance(shape, tuple) else ""
        return {"$unavailable": f"{type(value).__name__}{sized}"}
    return value


def fingerprint(module: torch.nn.Module) -> str | None:
    """A short hash of a network: names, shapes and a sample of every parameter.

    None where parameters are elsewhere (offloaded: tensors without values).
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, p in module.state_dict().items():
        if not isinstance(p, torch.Tensor):  # what a quantised layer packs, or a module's extra
            digest.update(name.encode())
            continue
        if p.is_meta:
            return None
        flat = p.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def read(path: str | os.PathLike[str]) -> Recipe:
    """The recipe inside a PNG (or of a result.json beside one).

    Raises:
        RecipeError: no such file, not a PNG, no recipe in it, or a damaged one.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{file}: no such file.")
    try:
        with Image.open(file) as image:
            if image.format != "PNG":
                raise RecipeError(f"{file}: a {image.format} file; recipes live in PNG files.")
            image.load()
            text = getattr(image, "text", {}).get(CHUNK)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RecipeError(f"{file}: cannot be read as a PNG ({error}).") from error
    if text is None:
        raise RecipeError(
            f"{file}: a PNG without a recipe. Only files written by this library carry one; "
            "editing or re-saving a picture usually strips it."
        )
    try:
        data = json.loads(_unpacked(text) if text.startswith(_PACKED) else text)
    except (ValueError, zlib.error) as error:
        raise RecipeError(f"{file}: the recipe is damaged ({error}).") from error
    return Recipe.from_json(data, str(file))


def _unpacked(text: str) -> str:
    """The text of a large recipe, of at most _MOST bytes: files may come from strangers."""
    unpack = zlib.decompressobj()
    found = unpack.decompress(base64.b64decode(text.removeprefix(_PACKED)), _MOST)
    if unpack.unconsumed_tail:
        raise ValueError(f"more than {_MOST // 2**20} MiB of text")
    return found.decode()


def write_png(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Writes a picture with its recipe, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    text = json.dumps(recipe.to_json())
    if len(text) < PngImagePlugin.MAX_TEXT_CHUNK:
        info.add_itxt(CHUNK, text, zip=True)
    else:  # of thousands of prompts: readers unpack no compressed text of that size
        packed = base64.b64encode(zlib.compress(text.encode())).decode()
        info.add_itxt(CHUNK, _PACKED + packed, zip=False)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` on success and vanishes on failure."""
    # Not by mkstemp, whose files are private: results should be as readable as any other file, and
    # only the kernel knows the umask without changing it for other threads.
    if path.is_dir():
        raise OptionError(f"{path} is a folder; a file of that name cannot be written.")
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(out: str | os.PathLike[str]) -> Path:
    """The folder, made if needed and proven writable before any work is done.

    Raises:
        OptionError: it is a file, or cannot be written.
    """
    try:
        folder = Path(out)
    except TypeError:
        raise OptionError(f"out must be the path of a folder, got {out!r}.") from None
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"out={str(folder)!r} is a file; name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            f"out={str(folder)!r} cannot be written ({error.strerror}). Name another folder."
        ) from error
    return folder

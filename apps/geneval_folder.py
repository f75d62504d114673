"""What a GenEval folder holds: a run of ours, or images in the official layout made elsewhere.

    run.json              the recipe; a folder holds one
    prompts.jsonl         the records
    samples.jsonl         one line per image, written after the image itself
    00012/metadata.jsonl  the official layout: one folder per prompt
    00012/samples/0003.png
    scoring.json, results.jsonl   what scored the images, and a line per verdict

Folders that were made elsewhere have images and metadata only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.errors import OptionError, RecipeError
from steering.rewards.geneval import check_prompted, read_prompts
from steering.stickers.grammar import Metadata

FORMAT, VERSION = "steering-geneval", 1
MAX_TRIES = 2  # of an image, then it is given up
Key = tuple[int, int]
_IDENTITY = ("model", "call", "method", "reward", "nfe", "images_per_prompt", "seed")
_IMAGE = re.compile(r"(\d+)\.png")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image on disk; ``line`` is its entry in samples.jsonl, empty for foreign folders."""

    prompt: int
    image: int
    path: Path
    record: Metadata
    line: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder holds and what it lacks.

    Attributes:
        run: run.json, None for a folder made elsewhere.
        missing: images that should be there, as words; ``extra``: files that are ignored.
        quarantined: errors of images that were given up.
    """

    folder: Path
    run: dict[str, Any] | None
    records: dict[int, Metadata]
    samples: list[Sample]
    missing: list[str]
    extra: list[str]
    quarantined: dict[Key, str]


def look(folder: str | Path, *, prompts: int = 0) -> Contents:
    """What a folder holds: a run of ours, or images in the official layout.

    Args:
        prompts: how many a folder made elsewhere should hold; gaps in its numbering are missing
            anyway.

    Raises:
        OptionError: neither of them.
        RecipeError: a damaged run.json, samples.jsonl or metadata.jsonl.
    """
    where = Path(folder)
    if not where.is_dir():
        raise OptionError(f"{where}: no such folder.")
    if (where / "run.json").is_file():
        return _look_at_run(where, read_run(where / "run.json"))
    numbered = sorted(p for p in where.iterdir() if p.is_dir() and p.name.isdigit())
    if not numbered:
        raise OptionError(
            f"{where} holds neither a run (run.json) nor images in GenEval's layout "
            "(00000/metadata.jsonl, 00000/samples/0000.png, ...)."
        )
    return _look_at_foreign(where, numbered, prompts)


def _look_at_run(folder: Path, run: dict[str, Any]) -> Contents:
    records = dict(enumerate(read_prompts(folder / "prompts.jsonl")))
    lines: dict[Key, dict[str, Any]] = {}
    errors: dict[Key, list[str]] = {}
    for row in read_lines(folder / "samples.jsonl")[0]:
        key = (row["prompt"], row["image"])
        if "error" in row:
            errors.setdefault(key, []).append(row["error"])
        else:
            lines[key] = row
    samples, missing = [], []
    for i, record in records.items():
        for k in range(run["images_per_prompt"]):
            path = folder / image_path(i, k)
            if (i, k) in lines and path.is_file():
                line = lines[i, k]
                samples.append(Sample(prompt=i, image=k, path=path, record=record, line=line))
            else:
                missing.append(str(image_path(i, k)))
    known = {s.path for s in samples}
    extra = [p for p in sorted(folder.glob("[0-9]*/samples/*")) if p not in known]
    return Contents(
        folder=folder,
        run=run,
        records=records,
        samples=samples,
        missing=missing,
        extra=[str(p.relative_to(folder)) for p in extra],
        quarantined={
            k: e[-1] for k, e in errors.items() if len(e) >= MAX_TRIES and k not in lines
        },
    )


def _look_at_foreign(folder: Path, numbered: list[Path], prompts: int) -> Contents:
    records: dict[int, Metadata] = {}
    samples: list[Sample] = []
    extra: list[str] = []
    for place in numbered:
        if not (place / "metadata.jsonl").is_file():
            extra.append(f"{place.name} (no metadata.jsonl)")
            continue
        record = records[int(place.name)] = _metadata(place / "metadata.jsonl")
        for path in sorted(place.glob("samples/*")):
            match = _IMAGE.fullmatch(path.name)
            if match is None:
                extra.append(str(path.relative_to(folder)))
                continue
            i, k = int(place.name), int(match[1])
            samples.append(Sample(prompt=i, image=k, path=path, record=record))
    have = {(s.prompt, s.image) for s in samples}
    images = sorted({k for _, k in have})
    if not samples:
        raise OptionError(f"{folder}: no folder in it has images (samples/0000.png, ...).")
    wanted = range(max(prompts, 1 + max(records)))
    missing = [str(image_path(i, k)) for i in wanted for k in images if (i, k) not in have]
    return Contents(
        folder=folder, run=None, records=records, samples=samples, missing=missing, extra=extra,
        quarantined={},
    )  # fmt: skip


def check_prompts(contents: Contents, records: Sequence[Metadata]) -> None:
    """Raises unless every prompt of the folder stands at its place in a list.

    Raises:
        OptionError: a folder is of another prompt, or of none of the list.
    """
    listed = dict(enumerate(map(asked, records)))
    strange = [i for i, r in contents.records.items() if listed.get(i) != asked(r)]
    if strange:
        first = strange[0]
        there = listed[first]["prompt"] if first in listed else "no such line"
        raise OptionError(
            f"{contents.folder}: {len(strange)} of {len(contents.records)} folders are not of the "
            f"prompts file (first: {first:05d}, {contents.records[first].get('prompt')!r}; the "
            f"file has {there!r})."
        )


def asked(record: Metadata) -> dict[str, Any]:
    """What a record asks for, whatever else it notes."""
    found = {name: record.get(name) for name in ("tag", "include", "exclude", "prompt")}
    return {**found, "exclude": found["exclude"] or []}


def image_path(prompt: int, image: int) -> Path:
    """Where an image lies in the folder."""
    return Path(f"{prompt:05d}") / "samples" / f"{image:04d}.png"


def prompts_hash(records: Iterable[Metadata]) -> str:
    """SHA-256 of the records, whatever the order of their keys and the spaces of their file."""
    found = hashlib.sha256()
    for record in records:
        found.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def identity(run: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same: everything that decides the images."""
    found = {name: run.get(name) for name in _IDENTITY}
    model = dict(found["model"] or {})
    model.pop("device", None)
    prompts = run.get("prompts", {}).get("sha256")
    return json.loads(json.dumps({**found, "model": model, "prompts": prompts}))


def read_run(path: Path) -> dict[str, Any]:
    """A run.json.

    Raises:
        RecipeError: foreign, damaged or of another version.
    """
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT or run.get("version") != VERSION:
        raise RecipeError(f"{path}: not a run of this release ({FORMAT} {VERSION}).")
    return run


def read_scoring(folder: Path) -> dict[str, Any]:
    """A folder's scoring.json, empty where there is none.

    Raises:
        RecipeError: damaged.
    """
    path = folder / "scoring.json"
    if not path.is_file():
        return {}
    try:
        scoring = json.loads(path.read_text())
        detector = scoring.get("detector") if isinstance(scoring, dict) else None
        if not isinstance(detector, dict) or "name" not in detector:
            raise ValueError("it names no detector")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: damaged ({error}). Score the folder anew: "
            f"steer geneval score --again {folder}"
        ) from error
    return scoring


def check_verdicts(path: Path, rows: Iterable[Any]) -> None:
    """Raises unless these lines of a results.jsonl are of this scorer.

    Raises:
        RecipeError: names the first line that is not.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() >= {"prompt_index", "image", "sha256"}:
            raise RecipeError(
                f"{path}, line {number}: not a verdict of this scorer. Move the file away, or "
                "let it be replaced: steer geneval score --again."
            )


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows, bytes they take); a last line that was cut off is left out."""
    if not path.is_file():
        return [], 0
    rows, size = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise RecipeError(f"{path}, line {number}: damaged ({error}).") from error
        size += len(line) + 1
    return rows, size


def _metadata(path: Path) -> Metadata:
    try:
        return check_prompted(json.loads(path.read_text()), f"{path}, line 1")
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise RecipeError(f"{path}: damaged ({error}).") from error


def digest(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None

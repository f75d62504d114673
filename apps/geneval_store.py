"""Keeps a GenEval run on disk: a journal that survives kill -9, and one writer at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steering.apps.geneval_folder import (
    MAX_TRIES,
    Key,
    digest,
    identity,
    image_path,
    read_lines,
    read_run,
)
from steering.errors import OptionError, SteeringError
from steering.recipe import atomic, writable_folder
from steering.stickers.grammar import Metadata


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to make: prompt and image index, text and record, and how often it has failed."""

    prompt: int
    image: int
    text: str
    tries: int = 0
    record: Metadata | None = field(default=None, compare=False)

    @property
    def key(self) -> Key:
        return self.prompt, self.image


def job_of(record: Metadata, prompt: int, image: int, *, tries: int = 0) -> Job:
    """The job of one image of a record."""
    return Job(prompt=prompt, image=image, text=record["prompt"], tries=tries, record=record)


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """What came of a job: a PNG with its numbers, or an error.

    ``lost``: its worker died, maybe of another job's image.
    """

    job: Job
    png: bytes = b""
    line: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    lost: bool = False


class Journal:
    """A JSON lines file that only grows; a line that was cut off by a crash is dropped.

    Raises:
        RecipeError: a damaged line that is not the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, self._size = read_lines(path)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds lines in one write that has reached the disk on return, or not at all.

        Raises:
            SteeringError: the disk is full or gone; what was there before is kept.
        """
        new = list(rows)
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in new).encode()
        try:
            # Unbuffered: a buffer would try again to write what it holds when it is closed.
            with self.path.open("r+b" if self.path.exists() else "wb", buffering=0) as file:
                file.truncate(self._size)
                file.seek(self._size)
                try:
                    left = memoryview(data)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._size)
                    raise
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._size += len(data)
        self.rows += new


class Store:
    """The folder of a run that is being made; one process at a time.

    Args:
        folder: new or empty, or a run of the same recipe with ``resume``.
        run: the recipe (see `identity`), ``records`` its prompts.
        resume: go on with what is there.
        retry: give quarantined images another try.

    Raises:
        OptionError: the folder holds another run, or another process is at work in it.
    """

    def __init__(
        self,
        folder: str | Path,
        run: dict[str, Any],
        records: list[Metadata],
        *,
        resume: bool = False,
        retry: bool = False,
    ) -> None:
        self.folder, self.records = writable_folder(folder), records
        self.images = int(run["images_per_prompt"])
        self._lock = locked(self.folder)
        try:
            self._claim(run, resume)
            self.journal = Journal(self.folder / "samples.jsonl")
            self._take_stock(retry)
        except BaseException:
            self.close()
            raise

    def _claim(self, run: dict[str, Any], resume: bool) -> None:
        path = self.folder / "run.json"
        if path.is_file():
            if not resume:
                raise OptionError(
                    f"{self.folder} holds a run already. Pass --resume to go on with it, or name "
                    "another folder."
                )
            old = read_run(path)
            _same(old, run, self.folder)
            if run["heldout"] not in ([], old["heldout"]):  # they decide no pixel
                write(path, json.dumps({**old, "heldout": run["heldout"]}, indent=1).encode())
            return
        known = {"prompts.jsonl"}  # and what a killed start left half-written
        strange = [
            p.name
            for p in self.folder.iterdir()
            if p.name not in known and not p.name.startswith(".")
        ]
        if strange:
            raise OptionError(
                f"{self.folder} holds {len(strange)} files that are no run (first: "
                f"{sorted(strange)[0]}). Name a new or empty folder."
            )
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write(self.folder / "prompts.jsonl", lines.encode())
        write(path, json.dumps(run, indent=1).encode())  # last: a folder without it is empty

    def _take_stock(self, retry: bool) -> None:
        self.errors: dict[Key, list[str]] = {}
        self.done: set[Key] = set()
        for row in self.journal.rows:
            key = (int(row["prompt"]), int(row["image"]))
            if "error" in row:
                self.errors.setdefault(key, []).append(row["error"])
            elif digest(self.folder / row["file"]) == row["sha256"]:
                self.done.add(key)
        if retry:
            self.errors.clear()
        for rest in self.folder.glob("*/samples/.*.png"):  # half-written when a run was killed
            rest.unlink(missing_ok=True)

    def todo(self) -> list[Job]:
        """Images still to be made, prompt by prompt; those that failed twice are given up."""
        return [
            job_of(record, i, k, tries=len(self.errors.get((i, k), ())))
            for i, record in enumerate(self.records)
            for k in range(self.images)
            if (i, k) not in self.done and len(self.errors.get((i, k), ())) < MAX_TRIES
        ]

    def quarantined(self) -> dict[Key, str]:
        """Images that were given up, with their last error."""
        lost = {k: e[-1] for k, e in self.errors.items() if len(e) >= MAX_TRIES}
        return {k: e for k, e in lost.items() if k not in self.done}

    def add(self, made: Made) -> None:
        """Keeps an image or an error; a second image of one key is not counted.

        Raises:
            SteeringError: the disk is full; what was there before is kept.
        """
        job = made.job
        if job.key in self.done:
            return
        row: dict[str, Any] = {"prompt": job.prompt, "image": job.image}
        if made.error:
            self.journal.append([{**row, "error": made.error}])
            self.errors.setdefault(job.key, []).append(made.error)
            return
        file = image_path(job.prompt, job.image)
        path = self.folder / file
        metadata = path.parents[1] / "metadata.jsonl"
        if not metadata.is_file():
            write(metadata, json.dumps(self.records[job.prompt]).encode())
        write(path, made.png)
        sha = hashlib.sha256(made.png).hexdigest()
        self.journal.append([{**row, "file": file.as_posix(), "sha256": sha, **made.line}])
        self.done.add(job.key)

    def close(self) -> None:
        """Lets other processes at the folder."""
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    a, b = identity(old), identity(new)
    changed = [f"{k}: {a[k]!r} there, {b[k]!r} asked for" for k in a if a[k] != b[k]]
    if changed:
        raise OptionError(
            f"{folder} holds another run ({'; '.join(c[:200] for c in changed[:3])}). Repeat its "
            "options, or name another folder."
        )


def locked(folder: Path) -> FileLock:
    """The folder's lock, held until it is released.

    Raises:
        OptionError: another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OptionError(f"{folder}: another process is writing to this folder.") from None
    except OSError as error:
        raise disk_error(folder, error) from error
    return lock


def write(path: Path, data: bytes) -> None:
    """Writes a file, with the folder it lies in, whole or not at all.

    Raises:
        SteeringError: the disk is full or gone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> SteeringError:
    """What a user is told when a file could not be written."""
    return SteeringError(
        f"{path} could not be written ({error.strerror or error}). Everything finished before is "
        "kept: make room and give the command again (geneval run: with --resume)."
    )

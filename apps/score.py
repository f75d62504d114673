"""`steer score`: rewards of picture files, as a table or as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from steering.apps.bench import Bench, same_calls
from steering.errors import OptionError, RewardError, SteeringError
from steering.rewards.images import as_tensor, open_picture
from steering.scoring import Reward, Scores, labels, resolve_reward

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def find(paths: Sequence[Path]) -> list[Path]:
    """The picture files among paths; of a folder, those directly in it, by name.

    Raises:
        OptionError: a path that is not there, or nothing found.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise OptionError(f"There is no picture or folder {str(path)!r}.")
    if not found:
        raise OptionError(f"No pictures in {', '.join(map(str, paths))}.")
    return found


def prompts_of(files: Sequence[Path], prompts: Sequence[str]) -> list[str | None]:
    """One prompt per file: those given, else the one in the picture's recipe, else none.

    Raises:
        OptionError: a number of prompts that is neither one nor that of the files.
    """
    if len(prompts) == len(files):
        return list(prompts)
    if len(prompts) == 1:
        return [prompts[0]] * len(files)
    if prompts:
        raise OptionError(
            f"{len(prompts)} prompts for {len(files)} pictures: give one --prompt for all, or one "
            "for each."
        )
    return [_recorded(path) for path in files]


def score_files(
    files: Sequence[Path],
    prompts: Sequence[str | None],
    rewards: Sequence[str],
    *,
    device: str | None = None,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """One row per file: {"file", "prompt", "scores", "parts", "notes", "errors", "valid"}.

    Every reward is got ready before anything is scored. Pictures of one size go through a reward
    together. Where a reward fails, what it and the others have finished is kept; its other rows
    are NaN, with the reason in "errors".

    Raises:
        OptionError: an unknown reward, a file that is no picture, or a missing prompt.
        WeightsError: weights that cannot be found.
        RemoteError: a server that does not answer at all.
        SteeringError: the first failure, where nothing was finished.
    """
    sizes = [open_picture(path).size for path in files]  # unreadable ones are told at once
    bench = Bench(device, prompts)
    judges = [resolve_reward(text, bench) for text in rewards]
    names = labels(judges)
    rows: list[dict[str, Any]] = [
        {"file": str(f), "prompt": p, "scores": {}, "parts": {}, "notes": {}, "errors": {}}
        for f, p in zip(files, prompts, strict=True)
    ]
    for row in rows:
        row["valid"] = True
    failures: list[SteeringError] = []
    for name, judge in zip(names, judges, strict=True):
        for chosen in same_calls(sizes, judge, lambda _: batch_size):
            try:
                images = as_tensor([open_picture(files[k]) for k in chosen])
                images = images.to(device) if device else images
                _enter(rows, chosen, name, _asked(judge, images, [prompts[k] for k in chosen]))
            except SteeringError as error:
                # A sum's error may hold the scores of one of its members.
                if (done := getattr(error, "scores", None)) and not hasattr(judge, "terms"):
                    _enter(rows, chosen, name, done)
                _give_up(rows, name, error)
                failures.append(error)
                break
    if failures and all(math.isnan(v) for row in rows for v in row["scores"].values()):
        raise failures[0]
    return rows


def _asked(judge: Reward, images: Tensor, prompts: list[str | None]) -> Scores:
    """Its scores; whatever a reward raises becomes an error that the others survive."""
    try:
        with torch.no_grad():
            found = judge(images, prompts)
        if found.value.shape != (len(images),):
            raise ValueError(f"shape {tuple(found.value.shape)} for {len(images)} pictures")
        return found
    except SteeringError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RewardError(
            f"Reward {judge.name!r} raised {type(error).__name__}: {reason}"
        ) from error


def _give_up(rows: list[dict[str, Any]], name: str, error: SteeringError) -> None:
    for row in rows:
        if math.isnan(row["scores"].setdefault(name, math.nan)):
            row["valid"] = False
            row["errors"][name] = str(error)


def tabulate(rows: Sequence[dict[str, Any]]) -> Table:
    """The scores as a table, best of the first reward first."""
    names = list(rows[0]["scores"])
    short = [Path(row["file"]).name for row in rows]
    unique = len(set(short)) == len(short)
    table = Table(title=f"{len(rows)} pictures")
    table.add_column("file", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    nan_last = float("-inf")
    order = sorted(rows, key=lambda r: -(v if (v := r["scores"][names[0]]) == v else nan_last))
    for row in order:
        file = Path(row["file"]).name if unique else row["file"]
        table.add_row(file, *[f"{row['scores'][name]:.4f}" for name in names])
    return table


def _enter(rows: list[dict[str, Any]], chosen: Sequence[int], name: str, found: Any) -> None:  # noqa: ANN401
    for at, k in enumerate(chosen):
        row = rows[k]
        row["scores"][name] = float(found.value[at])
        if found.valid is not None:
            row["valid"] = row["valid"] and bool(found.valid[at])
        if found.parts:
            row["parts"][name] = {part: float(v[at]) for part, v in found.parts.items()}
        if found.notes:
            row["notes"][name] = {note: v[at] for note, v in found.notes.items()}


def _recorded(path: Path) -> str | None:
    """The prompt in the recipe that steer wrote into a PNG, if there is one."""
    from steering.errors import RecipeError
    from steering.recipe import read

    try:
        recipe = read(path)
    except RecipeError:
        return None
    return recipe.prompts[recipe.prompt]

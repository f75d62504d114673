"""Scores the images of a folder: GenEval's verdicts, held-out rewards, CLIP vectors for diversity.

A line per image goes to results.jsonl, with the columns of the published scorer (its
``summary_scores.py`` reads the file) and ours behind them. An image is scored once: the line keeps
its hash, and scoring again skips what it finds unchanged.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from steering.apps.bench import compares
from steering.apps.geneval_folder import (
    Contents,
    Sample,
    check_prompts,
    check_verdicts,
    digest,
    look,
    prompts_hash,
    read_scoring,
)
from steering.apps.geneval_judges import Embed, Judges
from steering.apps.geneval_store import Journal, disk_error, locked, write
from steering.errors import SteeringError
from steering.rewards.geneval_colors import Judged, Scorer
from steering.rewards.images import as_tensor, open_picture
from steering.scoring import Reward
from steering.stickers.grammar import Metadata

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How a scoring went: images scored now, skipped as known, and what could not be read."""

    new: int
    known: int
    unreadable: list[str]
    contents: Contents


def score_folder(
    folder: str | Path,
    scorer: Scorer,
    *,
    heldout: Sequence[Reward] = (),
    guide: Reward | None = None,
    embed: Embed | None = None,
    embed_name: str = "",
    device: str = "cpu",
    prompts: Sequence[Metadata] | None = None,
    again: bool = False,
    show: bool = True,
) -> Scored:
    """Scores every image that has no line yet.

    Where a held-out reward compares the images of a call, these are the images of one prompt, and
    all of them are scored again when one is new.

    Args:
        folder: a run, or images in the official layout.
        scorer: detector, colours and rules.
        heldout: rewards beside the verdict; those that share a component with the ``guide`` of
            the run say so.
        embed: images [n, 3, H, W] of one size to unit vectors [n, d], for diversity.
        device: where ``heldout`` and ``embed`` get their images.
        prompts: what the folder should hold; those without a folder are missing.
        again: forget earlier lines.

    Raises:
        OptionError: nothing to score, classes the detector does not know, a folder that was scored
            with something else or is of other prompts, or another process at work in it.
        RecipeError: a damaged file in the folder; ``again`` helps where it is one of the scorer's.
    """
    contents = look(folder, prompts=len(prompts or ()))
    if prompts is not None:
        check_prompts(contents, prompts)
    judges = Judges(
        scorer=scorer, heldout=heldout, guide=guide, embed=embed, embed_name=embed_name,
        device=device,
    )  # fmt: skip
    lock = locked(contents.folder)
    try:
        journal = _journal(contents, judges, prompts, again)
        return _score(contents, judges, journal, show)
    finally:
        lock.release()


def _score(contents: Contents, judges: Judges, journal: Journal, show: bool) -> Scored:
    verifiers, unreadable = judges.verifiers(), []
    whole = any(map(compares, verifiers.values()))
    known = {(r["prompt_index"], r["image"]): r["sha256"] for r in journal.rows}
    new = [s for s in contents.samples if known.get((s.prompt, s.image)) != digest(s.path)]
    touched = {s.prompt for s in new}
    todo = [s for s in contents.samples if s.prompt in touched] if whole else new
    with tqdm(total=len(todo), unit="image", desc="score", disable=None if show else True) as bar:
        for part in _parts(todo, whole):
            samples, images = _read(part, unreadable)
            if samples:
                judged = judges.scorer.judge(images, [s.record for s in samples])
                extra = _extra(samples, images, judges, verifiers)
                rows = zip(samples, images, judged, extra, strict=True)
                journal.append(_row(*one) for one in rows)
            bar.update(len(part))
    return Scored(
        new=len(todo) - len(unreadable),
        known=len(contents.samples) - len(todo),
        unreadable=unreadable,
        contents=contents,
    )


def _journal(
    contents: Contents, judges: Judges, prompts: Sequence[Metadata] | None, again: bool
) -> Journal:
    """The folder's results, after proof that the same models made them."""
    path, lines = contents.folder / "scoring.json", contents.folder / "results.jsonl"
    records, how = list(contents.records.values()), judges.describe()
    if again:
        judges.scorer.check(records)
    else:
        judges.check(contents.folder, records)
    goes_on = path.is_file() and lines.is_file() and not again
    old = read_scoring(contents.folder) if goes_on else {}
    if prompts is not None:
        how["prompts"] = {"n": len(prompts), "sha256": prompts_hash(prompts)}
    if not goes_on:
        try:
            lines.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(lines, error) from error
    if not goes_on or old.get("prompts") != how.get("prompts", old.get("prompts")):
        write(path, json.dumps({**old, **how}, indent=1).encode())
    journal = Journal(lines)
    check_verdicts(lines, journal.rows)
    return journal


def _parts(samples: Sequence[Sample], whole: bool) -> Iterator[list[Sample]]:
    """About BATCH samples at a time; ``whole`` keeps the images of a prompt together."""
    part: list[Sample] = []
    for sample in samples:
        if len(part) >= BATCH and not (whole and part[-1].prompt == sample.prompt):
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def _read(samples: Sequence[Sample], unreadable: list[str]) -> tuple[list[Sample], list[Tensor]]:
    """Samples with their images; what cannot be read is noted and left out."""
    part, images = [], []
    for sample in samples:
        try:
            images.append(read_image(sample.path))
            part.append(sample)
        except SteeringError as error:
            unreadable.append(str(error))
    return part, images


def read_image(path: Path) -> Tensor:
    """An image file as [3, H, W] in [0, 1], upright.

    Raises:
        OptionError: not a whole image.
    """
    return as_tensor(open_picture(path))[0]


@torch.no_grad()
def _extra(
    samples: Sequence[Sample],
    images: Sequence[Tensor],
    judges: Judges,
    verifiers: Mapping[str, Reward],
) -> list[dict[str, Any]]:
    """Held-out rewards and embeddings."""
    out: list[dict[str, Any]] = [{"heldout": {}} for _ in samples]
    for name, reward in verifiers.items():
        for rows in _calls(samples, images, compares(reward)):
            batch = torch.stack([images[k] for k in rows]).to(judges.device)
            records = [samples[k].record for k in rows]
            found = reward(batch, [r["prompt"] for r in records], metadata=records)
            value = found.value.double().cpu()
            ok = value.isfinite() if found.valid is None else found.valid.cpu() & value.isfinite()
            for k, v, good in zip(rows, value.tolist(), ok.tolist(), strict=True):
                out[k]["heldout"][name] = v if good else None
    if judges.embed is not None:
        for rows in _calls(samples, images, False):
            batch = torch.stack([images[k] for k in rows]).to(judges.device)
            vectors = judges.embed(batch).cpu().numpy().astype("<f2")
            for k, vector in zip(rows, vectors, strict=True):
                out[k]["embedding"] = base64.b64encode(vector.tobytes()).decode()
    return out


def _calls(
    samples: Sequence[Sample], images: Sequence[Tensor], apart: bool
) -> Iterator[list[int]]:
    """Indices of images of one size, and where they are to be ``apart`` of one prompt."""
    groups: dict[Any, list[int]] = {}
    for k, (sample, image) in enumerate(zip(samples, images, strict=True)):
        groups.setdefault((tuple(image.shape), sample.prompt if apart else None), []).append(k)
    yield from groups.values()


def _row(sample: Sample, image: Tensor, judged: Judged, extra: dict[str, Any]) -> dict[str, Any]:
    record, verdict = sample.record, judged.verdict
    found = [
        {
            "class": d.name,
            "score": round(d.score, 4),
            "box": [round(v, 1) for v in d.box],
            **({"color": judged.colors[k]} if k in judged.colors else {}),
        }
        for k, d in enumerate(judged.found)
    ]
    return {
        "filename": str(Path(*sample.path.parts[-3:]).as_posix()),
        "tag": record["tag"],
        "prompt": record["prompt"],
        "correct": verdict.correct,
        "reason": "" if verdict.correct else verdict.reason,
        "metadata": json.dumps(record),
        "details": json.dumps(found),
        "prompt_index": sample.prompt,
        "image": sample.image,
        "sha256": digest(sample.path),
        "size": [int(image.shape[-1]), int(image.shape[-2])],
        "parts": [[p.rule, p.name, p.passed] for p in verdict.parts],
        **extra,
    }

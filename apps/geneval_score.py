"""Scores the images of a folder: GenEval's verdicts, held-out rewards, CLIP vectors for diversity.

A line per image goes to results.jsonl, with the columns of the published scorer (its
``summary_scores.py`` reads the file) and ours behind them. An image is scored once: the line keeps
its hash, and scoring again skips what it finds unchanged.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from steering.apps.geneval_folder import Contents, Sample, digest, look
from steering.apps.geneval_store import Journal
from steering.errors import OptionError, SteeringError
from steering.recipe import atomic, package_versions
from steering.rewards.geneval_colors import ClipColors, Judged, Scorer
from steering.rewards.images import as_tensor, open_picture
from steering.scoring import (
    Reward,
    heldout_labels,
    labels,
    parts_of,
    recipe_reward,
    resolve_reward,
)

BATCH = 32
Embed = Callable[[Tensor], Tensor]


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
    again: bool = False,
    show: bool = True,
) -> Scored:
    """Scores every image that has no line yet.

    Args:
        folder: a run, or images in the official layout.
        scorer: detector, colours and rules.
        heldout: rewards beside the verdict; those that share a component with the ``guide`` of
            the run say so.
        embed: images [n, 3, H, W] of one size to unit vectors [n, d], for diversity.
        device: where ``heldout`` and ``embed`` get their images.
        again: forget earlier lines.

    Raises:
        OptionError: nothing to score, classes the detector does not know, or a folder that was
            scored with something else.
    """
    contents = look(folder)
    scorer.check(list(contents.records.values()))
    how = {
        "detector": scorer.detector.describe(),
        "colors": scorer.colors.describe(),
        "rules": scorer.rules.__dict__,
        "heldout": [r.spec for r in heldout],
        "diversity": embed_name,
        "versions": package_versions(),
    }
    names = labels(heldout) if guide is None else heldout_labels(guide, heldout)
    verifiers = dict(zip(names, heldout, strict=True))
    journal = _journal(contents.folder, how, again)
    known = {(r["prompt_index"], r["image"]): r["sha256"] for r in journal.rows}
    todo = [s for s in contents.samples if known.get((s.prompt, s.image)) != digest(s.path)]
    unreadable: list[str] = []
    with tqdm(total=len(todo), unit="image", desc="score", disable=None if show else True) as bar:
        for samples, images in _batches(todo, unreadable):
            judged = scorer.judge(images, [s.record for s in samples])
            extra = _extra(samples, images, verifiers, embed, device)
            rows = [_row(*one) for one in zip(samples, images, judged, extra, strict=True)]
            journal.append(rows)
            bar.update(len(rows))
    return Scored(
        new=len(todo) - len(unreadable),
        known=len(contents.samples) - len(todo),
        unreadable=unreadable,
        contents=contents,
    )


def _journal(folder: Path, how: dict[str, Any], again: bool) -> Journal:
    """The folder's results, after proof that the same models made them."""
    path, lines = folder / "scoring.json", folder / "results.jsonl"
    how = json.loads(json.dumps(how))
    if path.is_file() and lines.is_file() and not again:
        old = json.loads(path.read_text())
        changed = [k for k in how if k != "versions" and old.get(k) != how[k]]
        if changed:
            raise OptionError(
                f"{folder} was scored with another {' and '.join(changed)}. Pass --again to score "
                "it anew."
            )
        return Journal(lines)
    lines.unlink(missing_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(how, indent=1))
    return Journal(lines)


def _batches(
    samples: Sequence[Sample], unreadable: list[str]
) -> Iterator[tuple[list[Sample], list[Tensor]]]:
    """Samples with their images; what cannot be read is noted and left out."""
    for start in range(0, len(samples), BATCH):
        part, images = [], []
        for sample in samples[start : start + BATCH]:
            try:
                images.append(read_image(sample.path))
                part.append(sample)
            except SteeringError as error:
                unreadable.append(str(error))
        if part:
            yield part, images


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
    heldout: Mapping[str, Reward],
    embed: Embed | None,
    device: str,
) -> list[dict[str, Any]]:
    """Held-out rewards and embeddings, images of one size at a time."""
    out: list[dict[str, Any]] = [{"heldout": {}} for _ in samples]
    sizes: dict[Any, list[int]] = {}
    for k, image in enumerate(images):
        sizes.setdefault(tuple(image.shape), []).append(k)
    for rows in sizes.values():
        batch = torch.stack([images[k] for k in rows]).to(device)
        prompts = [samples[k].record["prompt"] for k in rows]
        records = [samples[k].record for k in rows]
        for name, reward in heldout.items():
            found = reward(batch, prompts, metadata=records)
            value = found.value.double().cpu()
            ok = value.isfinite() if found.valid is None else found.valid.cpu() & value.isfinite()
            for k, v, good in zip(rows, value.tolist(), ok.tolist(), strict=True):
                out[k]["heldout"][name] = v if good else None
        if embed is not None:
            vectors = embed(batch).cpu().numpy().astype("<f2")
            for k, vector in zip(rows, vectors, strict=True):
                out[k]["embedding"] = base64.b64encode(vector.tobytes()).decode()
    return out


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


def adapted(
    heldout: Sequence[object], run: Mapping[str, Any], device: str
) -> tuple[list[Reward], Reward | None]:
    """(held-out rewards, the guide), fitted to the run's model; no guide where none is known.

    The guide stands in a file that may be from elsewhere, so no code is imported for it.

    Raises:
        OptionError: a held-out reward measures what the guiding reward does.
    """
    model = SimpleNamespace(name=run.get("model", {}).get("source"), device=device, prompts=())
    rewards = [resolve_reward(one, model) for one in heldout]
    guide = _guide(str(run.get("reward", "")), model) if rewards else None
    for reward in rewards:
        same = reward.spec is not None and reward.spec == run.get("reward")
        if same or (guide is not None and set(parts_of(reward)) == set(parts_of(guide))):
            raise OptionError(
                f"--heldout {reward.spec or reward.name} is the guiding reward itself: a verifier "
                "that the search has seen proves nothing. Choose another one."
            )
    return rewards, guide


def _guide(spec: str, model: Any) -> Reward | None:  # noqa: ANN401
    """The guide as far as it can be had: comparing it needs no weights."""
    try:
        guide = recipe_reward(spec)
    except SteeringError:
        return None
    try:
        return resolve_reward(guide, model)
    except SteeringError:
        return guide


def embedder(scorer: Scorer, device: str) -> tuple[Embed, str]:
    """(images to CLIP vectors, its name): the colour model's CLIP, or the stickers' own."""
    if isinstance(scorer.colors, ClipColors):
        return scorer.colors.encoder.image, f"clip {scorer.colors.model}"
    from steering.rewards.clip import Encoder
    from steering.rewards.clip_loading import load

    return Encoder(load("stickers", "openai", "fp32", device)).image, "clip stickers"

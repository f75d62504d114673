"""What a scored GenEval folder says: shares with intervals, costs, diversity, a result card."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from steering.apps.geneval_folder import (
    Contents,
    asked,
    check_verdicts,
    digest,
    image_path,
    look,
    read_scoring,
)
from steering.apps.geneval_judges import is_oracle
from steering.apps.geneval_store import Journal, write
from steering.errors import OptionError
from steering.stickers.grammar import TAGS

RESAMPLES = 4000
Place = tuple[str, int]  # what is asked, and how many before it in the list ask the same
CARD = "steering-geneval-card"
COSTS = {"nfe": "network rows", "reward_calls": "reward calls", "seconds": "seconds"}
_JUDGES = {"mask2former": "HF-M2F"}  # not mmdet's weights: near the published scores, not equal


class Bootstrap:
    """95 % percentile intervals over prompts, resampled within their tags.

    The tag mix is part of the benchmark, so it is kept. One set of weights serves all statistics:
    differences of two runs are paired by prompt.

    Args:
        tags: [p] of the prompts.
        seed: of the resampling.
    """

    def __init__(self, tags: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.tags = np.asarray(tags)
        self.present = [t for t in TAGS if (self.tags == t).any()]
        rng = np.random.default_rng(seed)
        self.weights = np.zeros((resamples, len(self.tags)), np.float64)
        for tag in self.present:
            rows = np.flatnonzero(self.tags == tag)
            drawn = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples)
            self.weights[:, rows] = drawn

    def micro(self, total: np.ndarray, count: np.ndarray, tag: str | None = None) -> np.ndarray:
        """sum(total) / sum(count) over prompts (of a tag), [1 + resamples], the estimate first."""
        keep = slice(None) if tag is None else self.tags == tag
        weights = np.vstack([np.ones_like(self.weights[:1]), self.weights])[:, keep]
        with np.errstate(invalid="ignore"):
            return (weights @ total[keep]) / (weights @ count[keep])

    def macro(self, total: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The unweighted mean of the tags' shares, [1 + resamples]."""
        return np.mean([self.micro(total, count, tag) for tag in self.present], axis=0)


def interval(values: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"} of an estimate and its resamples."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


@dataclass(frozen=True, eq=False)
class Scored:
    """A folder with its verdicts.

    Attributes:
        name: for tables.
        contents: what the folder holds; ``scoring``: what judged it.
        rows: results.jsonl, stale lines left out, by (prompt, image).
        stale: how many lines were of images that have been made anew since.
    """

    name: str
    contents: Contents
    scoring: dict[str, Any]
    rows: dict[tuple[int, int], dict[str, Any]]
    stale: int

    @cached_property
    def prompts(self) -> list[int]:
        """Prompts with a verdict, in order."""
        return sorted({i for i, _ in self.rows})

    @cached_property
    def places(self) -> dict[Place, int]:
        """Prompts with a verdict by what is asked, in order; lists number them differently."""
        found, seen = {}, Counter()
        for i, record in sorted(self.contents.records.items()):
            words = json.dumps(asked(record), sort_keys=True)
            if i in self.images:
                found[words, seen[words]] = i
            seen[words] += 1
        return found

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap([self.contents.records[i]["tag"] for i in self.prompts])

    @cached_property
    def images(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of each prompt, by image."""
        found: dict[int, list[dict[str, Any]]] = {i: [] for i in self.prompts}
        for (i, _), row in sorted(self.rows.items()):
            found[i].append(row)
        return found

    def tally(self) -> tuple[np.ndarray, np.ndarray]:
        """Correct images and images of each prompt."""
        return _tally(self, self.prompts)

    def number(self, values: dict[int, list[float]]) -> dict[str, float] | None:
        """The mean of numbers of images, with its interval; None where there are none."""
        if not any(values.values()):
            return None
        total = np.array([sum(values.get(i, ())) for i in self.prompts], np.float64)
        count = np.array([len(values.get(i, ())) for i in self.prompts], np.float64)
        return interval(self.bootstrap.micro(total, count))


def open_scored(folder: str | Path) -> Scored:
    """A scored folder.

    Raises:
        OptionError: it has not been scored.
        RecipeError: a damaged file in the folder, or results of another scorer.
    """
    scoring = read_scoring(Path(folder))
    contents = look(folder, prompts=scoring.get("prompts", {}).get("n", 0))
    lines = contents.folder / "results.jsonl"
    rows = Journal(lines).rows
    if not rows or not scoring:
        raise OptionError(f"{folder} has no verdicts. Run: steer geneval score {folder}")
    check_verdicts(lines, rows)
    current = {
        (s.prompt, s.image): s.line.get("sha256") or digest(s.path) for s in contents.samples
    }
    kept = {
        key: row
        for row in rows  # of two lines for an image the later one counts
        if (key := (row["prompt_index"], row["image"])) in current
        and current[key] == row["sha256"]
    }
    if not kept:
        raise OptionError(f"{folder}: the verdicts are of other images. Score it again.")
    stale = len({(r["prompt_index"], r["image"]) for r in rows}) - len(kept)
    name = contents.folder.resolve().name
    return Scored(name=name, contents=contents, scoring=scoring, rows=kept, stale=stale)


def card(scored: Scored) -> dict[str, Any]:
    """The result card: scores with 95 % intervals, costs, and all it takes to repeat them."""
    contents, run = scored.contents, scored.contents.run or {}
    boot, (correct, count) = scored.bootstrap, scored.tally()
    hit, one = (correct > 0).astype(np.float64), np.ones_like(count)
    tags = {
        tag: {
            **interval(boot.micro(correct, count, tag)),
            "any_of_n": interval(boot.micro(hit, one, tag)),
            "prompts": int((boot.tags == tag).sum()),
            "images": int(count[boot.tags == tag].sum()),
        }
        for tag in boot.present
    }
    judge = scored.scoring["detector"]["name"]
    blank = float(np.mean([r["details"] == "[]" for r in scored.rows.values()]))
    return {
        "format": CARD,
        "version": 1,
        "benchmark": f"GenEval ({_JUDGES.get(judge, judge)})",
        "scores": {
            "macro": interval(boot.macro(correct, count)),
            "micro": interval(boot.micro(correct, count)),
            "any_of_n": interval(boot.micro(hit, one)),
            "macro_any_of_n": interval(boot.macro(hit, one)),
            "tags": tags,
        },
        "tags_present": f"{len(boot.present)} of {len(TAGS)}",
        "images_per_prompt": int(count.max()),
        "reward": _reward(scored),
        "heldout": _heldout(scored),
        "diversity": _diversity(scored),
        "cost": _cost(scored),
        "images": {
            "scored": len(scored.rows),
            "missing": contents.missing,
            "not_scored": len(contents.samples) - len(scored.rows),
            "stale_verdicts": scored.stale,
            "extra": len(contents.extra),
            "quarantined": {image_path(*k).as_posix(): e for k, e in contents.quarantined.items()},
            "without_any_object": blank,
        },
        "oracle": is_oracle(run, scored.scoring),
        "run": run or None,
        "scoring": scored.scoring,
        "interval": f"95 % percentile bootstrap over prompts within tags, {RESAMPLES} resamples",
    }


def warnings(found: dict[str, Any]) -> list[str]:
    """What a reader of the card must know, in words."""
    images, out = found["images"], []
    if images["missing"] or images["not_scored"]:
        lost, rest = len(images["missing"]), images["not_scored"]
        out.append(f"{lost} images are missing and {rest} have no verdict: the shares are partial")
    if images["stale_verdicts"]:
        out.append(
            f"{images['stale_verdicts']} verdicts are of images that were replaced or removed "
            "since, and do not count: score the folder again"
        )
    if images["quarantined"]:
        out.append(f"{len(images['quarantined'])} images were given up after two tries")
    if images["without_any_object"] > 0.5:
        share = images["without_any_object"]
        out.append(
            f"the detector found nothing at all in {share:.0%} of the images: is it broken?"
        )
    if found["tags_present"] != f"{len(TAGS)} of {len(TAGS)}":
        out.append(f"only {found['tags_present']} tags are present: macro is over these")
    if found["oracle"]:
        out.append("oracle: the search was guided by the judge that scores it")
    return out


def write_card(scored: Scored) -> tuple[Path, dict[str, Any]]:
    """Writes card.json into the folder."""
    found = card(scored)
    path = scored.contents.folder / "card.json"
    write(path, json.dumps(found, indent=1, allow_nan=False).encode())
    return path, found


def paired(first: Scored, second: Scored) -> dict[str, Any]:
    """Second minus first over the prompts both have, resampled together.

    Raises:
        OptionError: the runs have no prompt in common.
    """
    common = [place for place in first.places if place in second.places]
    if not common:
        raise OptionError(f"{first.name} and {second.name} have no prompt in common.")
    a, b = ([run.places[place] for place in common] for run in (first, second))
    boot = Bootstrap([first.contents.records[i]["tag"] for i in a])
    one, two = _tally(first, a), _tally(second, b)
    return {
        "prompts": len(common),
        "macro": interval(boot.macro(*two) - boot.macro(*one)),
        "micro": interval(boot.micro(*two) - boot.micro(*one)),
        "tags": {t: interval(boot.micro(*two, t) - boot.micro(*one, t)) for t in boot.present},
    }


def overlaps(runs: Sequence[Scored]) -> list[str]:
    """In words, where a run and the first have not all prompts in common."""
    out, first = [], runs[0]
    for run in runs[1:]:
        common = len(first.places.keys() & run.places.keys())
        if common < max(len(first.places), len(run.places)):
            out.append(
                f"{first.name} and {run.name} have {common} prompts in common, of "
                f"{len(first.places)} and {len(run.places)}: their columns are of different "
                "prompts, their paired difference is over the common ones alone"
            )
    return out


def tabulate(runs: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """One column a run: shares in percent, verifiers, cost of an image."""
    table = Table(title="GenEval, % of images (95 % interval over prompts)")
    for column in ("", *(name for name, _ in runs)):
        table.add_column(column)
    cards = [found for _, found in runs]
    for key, words in (("macro", "macro"), ("micro", "micro"), ("any_of_n", "any of n")):
        table.add_row(words, *[percent(c["scores"][key]) for c in cards])
    for tag in TAGS:
        table.add_row(f"  {tag}", *[percent(c["scores"]["tags"].get(tag)) for c in cards])
    table.add_row("reward", *[number(c["reward"]) for c in cards])
    for name in sorted({n for c in cards for n in c["heldout"]}):
        table.add_row(f"held-out {name}", *[number(c["heldout"].get(name)) for c in cards])
    table.add_row("diversity", *[number(c["diversity"]) for c in cards])
    for key, words in COSTS.items():
        table.add_row(words, *[cost(c, key) for c in cards])
    return table


def percent(found: dict[str, float] | None) -> str:
    """A share as text."""
    if found is None:
        return "-"
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def number(found: dict[str, float] | None) -> str:
    """A mean as text."""
    if found is None:
        return "-"
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def cost(found: dict[str, Any], key: str) -> str:
    """A cost of an image as text."""
    value = (found["cost"] or {}).get(key)
    return "-" if value is None else f"{value:.4g}"


def _tally(scored: Scored, prompts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    rows = [scored.images[i] for i in prompts]
    correct = [sum(r["correct"] for r in images) for images in rows]
    return np.array(correct, np.float64), np.array([len(images) for images in rows], np.float64)


def _reward(scored: Scored) -> dict[str, float] | None:
    values: dict[int, list[float]] = {}
    for sample in scored.contents.samples:
        if sample.line.get("reward") is not None:
            values.setdefault(sample.prompt, []).append(sample.line["reward"])
    return scored.number(values)


def _heldout(scored: Scored) -> dict[str, Any]:
    names = sorted({n for row in scored.rows.values() for n in row["heldout"]})
    out = {}
    for name in names:
        values = {
            i: [v for r in rows if (v := r["heldout"].get(name)) is not None]
            for i, rows in scored.images.items()
        }
        out[name] = scored.number(values)
    return out


def _diversity(scored: Scored) -> dict[str, Any] | None:
    """Mean of 1 - cos over pairs of images of one prompt, in the CLIP that scored them."""
    values = {}
    for i, rows in scored.images.items():
        vectors = [
            np.frombuffer(base64.b64decode(r["embedding"]), "<f2").astype(np.float32)
            for r in rows
            if "embedding" in r
        ]
        if len(vectors) > 1:
            unit = np.stack(vectors)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            pairs = np.triu_indices(len(unit), 1)
            values[i] = [float(np.mean(1 - (unit @ unit.T)[pairs]))]
    found = scored.number(values)
    return found and {**found, "space": scored.scoring.get("diversity", "")}


def _cost(scored: Scored) -> dict[str, float] | None:
    """Means per image, and seconds in all."""
    ledgers = [s.line["ledger"] for s in scored.contents.samples if "ledger" in s.line]
    if not ledgers:
        return None
    names = ("nfe", "nfe_backward", "decodes", "reward_calls", "seconds")
    found = {n: float(np.mean([x[n] for x in ledgers])) for n in names if n in ledgers[0]}
    return {**found, "seconds_in_all": float(sum(x["seconds"] for x in ledgers))}

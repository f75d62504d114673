"""Unsteered, best-of-N and other methods side by side at equal network calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from steering.apps.jobs import Job
from steering.recipe import atomic, writable_folder
from steering.result import Result

_SIDE = 256
_LINE = 18


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One column of a comparison."""

    label: str
    result: Result

    def to_json(self) -> dict[str, Any]:
        """Its numbers."""
        return {
            "method": self.label,
            "best_reward": self.result.best_reward,
            "heldout": {k: float(v[0]) for k, v in self.result.heldout.items()},
            "ledger": self.result.ledger.to_json(),
        }


def compare_methods(
    job: Job, prompt: str, methods: list[str], nfe: int, seed: int, out: Path, settings: list[str]
) -> list[Entry]:
    """Runs the first sample unsteered, then each method with the whole budget."""
    folder = writable_folder(out)
    _, call = job.split("best_of_n", settings, beside=methods)
    plain = {"options": {"n": 1}, "call": call}
    runs: list[tuple[str, str, int | None, dict[str, Any]]] = [
        ("unsteered", "best_of_n", None, plain)
    ]
    for method in methods:
        options, call = job.split(method, settings, beside=methods)
        runs.append((method, method, nfe, {"options": options, "call": call}))
    entries = []
    for label, method, budget, arguments in runs:
        where = folder / label.replace("/", "-")
        result = job.steer(prompt, method, nfe=budget, seed=seed, out=where, **arguments)
        entries.append(Entry(label=label, result=result))
        if result.cancelled:
            break
    return entries


def draw(entries: list[Entry], prompt: str, path: Path) -> Path:
    """Writes the pictures in a row with reward, verdict and cost under each."""
    lines = [_caption(entry) for entry in entries]
    height = 2 * _LINE + _SIDE + (max(map(len, lines)) + 1) * _LINE
    sheet = Image.new("RGB", (len(entries) * (_SIDE + 16) + 16, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    pen.text((16, 8), prompt, fill="black", font=ImageFont.load_default(15))
    for k, (entry, caption) in enumerate(zip(entries, lines, strict=True)):
        x, picture = 16 + k * (_SIDE + 16), entry.result.pictures()[0]
        enlarged = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        sheet.paste(enlarged, (x, 2 * _LINE))
        for i, line in enumerate(caption):
            pen.text((x, 2 * _LINE + _SIDE + 6 + i * _LINE), line, fill="black", font=font)
    writable_folder(path.parent)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _caption(entry: Entry) -> list[str]:
    result = entry.result
    held = [f"held-out {k}: {float(v[0]):.3f}" for k, v in result.heldout.items()]
    spent = f"{result.ledger.nfe} nfe, {result.ledger.reward_calls} rewards"
    return [entry.label, f"reward {result.best_reward:.4f}", *held, spent]


def tabulate(entries: list[Entry], prompt: str) -> Table:
    """The same numbers as a table."""
    table = Table(title=prompt)
    held = sorted({k for e in entries for k in e.result.heldout})
    for column in ("method", "reward", *held, "nfe", "reward calls", "seconds"):
        table.add_column(column)
    for entry in entries:
        result, spent = entry.result, entry.result.ledger
        # A run that was stopped may lack a verdict.
        verdicts = [
            f"{float(result.heldout[k][0]):.3f}" if k in result.heldout else "-" for k in held
        ]
        costs = [str(spent.nfe), str(spent.reward_calls), f"{spent.seconds:.1f}"]
        table.add_row(entry.label, f"{result.best_reward:.4f}", *verdicts, *costs)
    return table

"""Claim: methods that are sequential for one prompt run 16 prompts at >= 3x the prompts per second
of one after another, because the engine merges their requests."""

from __future__ import annotations

import time

import steering
from benchmarks.meters import spread
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, WIDTH, NFE = 3, 16, 160
METHODS = ("rbf", "zero_order", "dts", "reno")


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe, texts = steering.load("stickers"), sticker_prompts("heldout", n=WIDTH, seed=2)
    rows = {name: _ratio(pipe, texts, name) for name in METHODS}
    lines = [f"{WIDTH} prompts together against one by one, {NFE} rows each (bar: 3x)"]
    lines += [
        f"{name:12s} {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to "
        f"{row['ratio']['max']:.2f}); together {row['together']['median']:.1f} s, one by one "
        f"{row['one by one']['median']:.1f} s"
        for name, row in rows.items()
    ]
    return {"rows": rows, "nfe": NFE, "table": "\n".join(lines)}


def _ratio(pipe: object, texts: list[str], method: str) -> dict:
    """Both ways in turn; the first round warms up and is not counted."""
    took: dict[str, list[float]] = {"together": [], "one by one": []}
    for repeat in range(REPEATS + 1):
        for name, jobs in (("one by one", texts), ("together", [texts])):
            started = time.perf_counter()
            for job in jobs:
                steering.steer(pipe, job, reward="clip", method=method, nfe=NFE, seed=repeat)
            if repeat:
                took[name].append(time.perf_counter() - started)
    pairs = zip(took["one by one"], took["together"], strict=True)
    return {"ratio": spread([a / b for a, b in pairs])} | {k: spread(v) for k, v in took.items()}

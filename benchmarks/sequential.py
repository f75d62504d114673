"""Claim: methods that are sequential for one prompt run 16 prompts at >= 3x the prompts per second
of one after another, because the engine merges their requests."""

from __future__ import annotations

import steering
from benchmarks.meters import together_or_apart
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, WIDTH, NFE = 2, 16, 320  # rbf cannot fill its levels with 160 rows
METHODS = ("rbf", "zero_order", "dts", "reno")


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe, texts = steering.load("stickers"), sticker_prompts("heldout", n=WIDTH, seed=2)
    rows = {
        name: together_or_apart(
            lambda text, name=name: steering.steer(
                pipe, text, reward="clip", method=name, nfe=NFE
            ),
            texts,
            REPEATS,
        )
        for name in METHODS
    }
    lines = [f"{WIDTH} prompts together against one by one, {NFE} rows each (bar: 3x)"]
    lines += [
        f"{name:12s} {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to "
        f"{row['ratio']['max']:.2f}); together {row['together']['median']:.1f} s, one by one "
        f"{row['one by one']['median']:.1f} s"
        for name, row in rows.items()
    ]
    return {"rows": rows, "nfe": NFE, "table": "\n".join(lines)}

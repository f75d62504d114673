"""Claim: 16 prompts of best-of-1 run together are >= 3x as fast as one after another."""

from __future__ import annotations

import steering
from benchmarks.meters import together_or_apart
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, WIDTH = 3, 16


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe, texts = steering.load("stickers"), sticker_prompts("heldout", n=WIDTH, seed=2)
    method = steering.samplers.BestOfN(n=1)
    found = together_or_apart(
        pipe,
        lambda text: steering.steer(pipe, text, reward="clip", method=method),
        texts,
        REPEATS,
    )
    ratio = found["ratio"]
    rates = ", ".join(
        f"{name} {WIDTH / found[name]['median']:.2f} prompts/s"
        for name in ("one by one", "together")
    )
    table = (
        f"{WIDTH} prompts together against one by one (bar: 3x)\n"
        f"ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), "
        f"the networks alone {found['network']['median']:.2f}; {rates}"
    )
    return {**found, "prompts": WIDTH, "table": table}

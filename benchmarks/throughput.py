"""Claim: 16 prompts of best-of-1 run together are >= 3x as fast as one after another."""

from __future__ import annotations

import time

import steering
from benchmarks.meters import spread
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, WIDTH = 3, 16


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe, texts = steering.load("stickers"), sticker_prompts("heldout", n=WIDTH, seed=2)
    method = steering.samplers.BestOfN(n=1)

    def together() -> None:
        steering.steer(pipe, texts, reward="clip", method=method)

    def one_by_one() -> None:
        for text in texts:
            steering.steer(pipe, text, reward="clip", method=method)

    ratios, rates = [], {"together": [], "one by one": []}
    for repeat in range(REPEATS + 1):
        took = {}
        for name, job in (("one by one", one_by_one), ("together", together)):
            started = time.perf_counter()
            job()
            took[name] = time.perf_counter() - started
        if repeat:
            ratios.append(took["one by one"] / took["together"])
            for name, seconds in took.items():
                rates[name].append(WIDTH / seconds)
    found = spread(ratios)
    table = (
        f"{WIDTH} prompts together against one by one (bar: 3x)\n"
        f"ratio {found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f}); "
        + ", ".join(f"{k} {spread(v)['median']:.2f} prompts/s" for k, v in rates.items())
    )
    return {"ratio": found, "prompts_per_second": {k: spread(v) for k, v in rates.items()},
            "table": table}  # fmt: skip

"""Claim: what steering adds around its own network, decoder and reward calls is small (<= 3 %)."""

from __future__ import annotations

import time

import steering
from benchmarks.meters import spread
from benchmarks.own_share import once
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS = 5
NFE = 800  # the default of the command line


def _line(method: str, row: dict) -> str:
    share, seconds = row["own_share"], row["seconds"]
    return (
        f"{method}: {100 * share['median']:.2f} % ({100 * share['min']:.2f} to "
        f"{100 * share['max']:.2f}) of {seconds['median']:.2f} s is ours"
    )


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe = steering.load("stickers")
    (text,) = sticker_prompts("heldout", n=1, seed=1)
    rows = {}
    for method in ("best_of_n", "fk"):
        runs = [
            once(pipe, text, method, NFE, repeat, now=time.perf_counter)
            for repeat in range(REPEATS + 1)
        ][1:]  # the first run also opens the reward's weights
        rows[method] = {
            "own_share": spread([1.0 - r["paid"] / r["seconds"] for r in runs]),
            "seconds": spread([r["seconds"] for r in runs]),
        }
    lines = [_line(method, row) for method, row in rows.items()]
    return {"nfe": NFE, "rows": rows, "table": "Own share (bar: 3 %)\n" + "\n".join(lines)}

"""Claim: a steered run takes at most 1.03 times its own network, decoder and reward calls.

python benchmarks/own_share.py [--json] [--nfe N] [--repeats N]

Seconds of the process's own CPU time on one thread, so that other programs on the machine do not
count. The first run of each method opens the reward and is not used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import steering
import steering.engine
from benchmarks.meters import ModuleClock, clocked, one_thread, spread
from steering.stickers.prompts import prompts as sticker_prompts

METHODS = ("fk", "rbf", "dts", "evo")
BAR = 1.03


@contextlib.contextmanager
def scored(clock: ModuleClock) -> Iterator[None]:
    """The clock also runs while the engine is in a reward."""
    plain = steering.engine.score

    def timed(*given: object, **more: object) -> object:
        clock.enter()
        try:
            return plain(*given, **more)
        finally:
            clock.leave()

    steering.engine.score = timed
    try:
        yield
    finally:
        steering.engine.score = plain


def once(
    pipe: object,
    text: str,
    method: str,
    nfe: int,
    seed: int,
    now: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """One run: seconds in all, and inside network, decoder and reward."""
    with clocked(pipe, now=now) as clock, scored(clock):
        started = now()
        result = steering.steer(pipe, text, reward="clip", method=method, nfe=nfe, seed=seed)
        seconds = now() - started
    return {"seconds": seconds, "paid": clock.seconds, "nfe": result.ledger.nfe}


def measure(nfe: int, repeats: int) -> dict:
    with one_thread():
        pipe = steering.load("stickers")
        (text,) = sticker_prompts("heldout", n=1, seed=1)
        runs: dict[str, list[dict]] = {method: [] for method in METHODS}
        for repeat in range(repeats + 1):
            for method in METHODS:
                run = once(pipe, text, method, nfe, repeat)
                if repeat:
                    runs[method].append(run)
    rows = {m: spread([r["seconds"] / r["paid"] for r in found]) for m, found in runs.items()}
    return {
        "ratio": {method: round(row["median"], 4) for method, row in rows.items()},
        "spread": rows,
        "nfe": nfe,
        "repeats": repeats,
        "seconds": {m: spread([r["seconds"] for r in found]) for m, found in runs.items()},
        "clock": "CPU time of the process, one thread",
    }


def run(*, prompts: int, nfe: int) -> dict:
    del prompts
    found = measure(nfe, repeats=3)
    lines = [
        f"{method:4s} {row['median']:.4f} ({row['min']:.4f} to {row['max']:.4f})"
        for method, row in found["spread"].items()
    ]
    title = f"Steered run / its network, decoder and reward calls (bar: {BAR})"
    return {**found, "table": "\n".join([title, *lines])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help='print {"ratio": {method: value}}')
    parser.add_argument("--nfe", type=int, default=800)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found = measure(given.nfe, given.repeats)
    if given.json:
        print(json.dumps({"ratio": found["ratio"]}))
        return
    for method, row in found["spread"].items():
        print(f"{method:4s} {row['median']:.4f} ({row['min']:.4f} to {row['max']:.4f})")


if __name__ == "__main__":
    main()

"""Every method on held-out sticker prompts at equal network calls, resumable; writes a page.

python -m benchmarks.comparison [--prompts 60] [--budgets 48 80 128] [--seeds 3] [--steps 8]
    [--methods NAME ...] [--dtype float32] [--rows docs/comparison.jsonl]
    [--page docs/comparison.md]

The CLIP model is the reward; the detector's verdict is what no search has seen. What already
stands in the file of rows is not run again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steering
from benchmarks.comparison_page import write_page
from steering.errors import BudgetError
from steering.loading import describe
from steering.registry import METHODS
from steering.samplers import BestOfN
from steering.stickers.prompts import prompts as sticker_prompts

UNSTEERED = "unsteered"
CONTROLS: dict[str, Any] = {
    UNSTEERED: BestOfN(n=1),
    # Particles need noise on the way: what that noise is worth without any steering.
    "best_of_n_eta1": BestOfN(eta=1.0),
}
SMALL: dict[str, dict[str, Any]] = {
    "auto": {"pilot": 2},
    "code": {"n_branches": 3},
    "evo": {"elites": 1, "schedule": (0.6,)},
    "rbf": {"n_init": 4, "n_chains": 1},
    "search_over_paths": {"n_neighbours": 2, "seed_level": 0.75},
    "svdd": {"n_branches": 3},
}
"""What a method runs with where a budget does not pay for its defaults."""
Row = dict[str, Any]


def key_of(row: Row) -> tuple:
    """What a row measured; those that do not say their type were measured in float32."""
    what = ("method", "nfe_budget", "seed", "prompts", "steps")
    return (*(row[name] for name in what), row.get("dtype", "float32"))


def read(path: Path) -> list[Row]:
    """Complete lines of a file that a killed run may have cut short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def measure(pipe: object, texts: list[str], method: str, nfe: int, seed: int, steps: int) -> Row:
    """One method, budget and seed over all prompts, with its defaults or what the budget pays."""
    row = attempt(pipe, texts, method, nfe, seed, steps, {})
    small = SMALL.get(method)
    if "refused" in row and small is not None:
        row = attempt(pipe, texts, method, nfe, seed, steps, small)
    return row


def attempt(
    pipe: object, texts: list[str], method: str, nfe: int, seed: int, steps: int, options: dict
) -> Row:
    """All prompts, run together."""
    seeds = [1000 * seed + k for k in range(len(texts))]
    row: Row = {
        "method": method, "nfe_budget": nfe, "seed": seed, "prompts": len(texts), "steps": steps,
        "options": options, "dtype": describe(pipe)["dtype"],
    }  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        results = steering.steer(
            pipe, texts, reward="clip", method=CONTROLS.get(method, method), options=options,
            seed=seeds, heldout="detector",
            nfe=None if method == UNSTEERED else nfe, num_inference_steps=steps,
        )  # fmt: skip
    except BudgetError as error:
        return row | {"refused": str(error)}
    had = (time.process_time() - cpu) / (time.perf_counter() - wall)
    ledgers = [r.ledger for r in results]
    mean = {
        name: round(float(np.mean([getattr(ledger, name) for ledger in ledgers])), 4)
        for name in ("nfe", "nfe_backward", "decodes", "reward_calls", "seconds")
    }
    return (
        row
        | mean
        | {
            "reward": [round(r.best_reward, 5) for r in results],
            "heldout": [float(r.heldout["detector"][0]) for r in results],
            "threads": torch.get_num_threads(),
            "cpu_share": round(had, 4),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--budgets", type=int, nargs="+", default=[48, 80, 128])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of one sample")
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--dtype", default="float32", help="one for all rows of a table")
    parser.add_argument("--rows", type=Path, default=Path("docs/comparison.jsonl"))
    parser.add_argument("--page", type=Path, default=None, help="write this page and its plot")
    given = parser.parse_args()
    names = given.methods or [*METHODS.names(), *(set(CONTROLS) - {UNSTEERED})]
    store = given.rows
    store.parent.mkdir(parents=True, exist_ok=True)
    rows = read(store)
    done = {key_of(row) for row in rows}
    pipe = steering.load("stickers", dtype=given.dtype)
    same = (given.prompts, given.steps, describe(pipe)["dtype"])
    texts = sticker_prompts("heldout", n=given.prompts, seed=0)
    wanted = [
        (method, nfe, seed)
        for seed in range(given.seeds)
        for nfe in given.budgets
        for method in (UNSTEERED, *names)
        if (method, nfe, seed, *same) not in done
        and not (method == UNSTEERED and nfe != given.budgets[0])
    ]
    for count, (method, nfe, seed) in enumerate(wanted, 1):
        row = measure(pipe, texts, method, nfe, seed, given.steps)
        rows.append(row)
        with store.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = row.get("refused") or (
            f"reward {np.mean(row['reward']):.4f} heldout {np.mean(row['heldout']):.3f} "
            f"{row['seconds']:.1f} s a prompt"
        )
        print(f"{count}/{len(wanted)} {method} nfe={nfe} seed={seed}: {said}", flush=True)
    rows = [
        r for r in rows
        if key_of(r)[3:] == same
        and r["nfe_budget"] in given.budgets
    ]  # fmt: skip
    if given.page is not None:
        write_page(rows, given.page)


if __name__ == "__main__":
    main()

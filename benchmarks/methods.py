"""Unsteered, best-of-N and FK at equal network calls over held-out prompts, judged by a verifier
that the search never saw, with 95 % intervals over prompts (paired bootstrap)."""

from __future__ import annotations

import numpy as np

import steering
from steering.stickers.prompts import prompts as sticker_prompts


def run(*, prompts: int, nfe: int) -> dict:
    pipe, texts = steering.load("stickers"), sticker_prompts("heldout", n=prompts, seed=0)
    rows = {}
    for name, method, budget in (
        ("unsteered", steering.samplers.BestOfN(n=1), None),
        ("best_of_n", "best_of_n", nfe),
        ("fk", "fk", nfe),
    ):
        results = steering.steer(
            pipe, texts, reward="clip", method=method, nfe=budget, heldout="detector"
        )
        rows[name] = {
            "reward": [r.best_reward for r in results],
            "detector": [float(r.heldout["detector"][0]) for r in results],
            "nfe": float(np.mean([r.ledger.nfe for r in results])),
            "reward_calls": float(np.mean([r.ledger.reward_calls for r in results])),
            "seconds": float(np.sum([r.ledger.seconds for r in results])),
        }
    lines = [f"{prompts} held-out prompts, {nfe} nfe each (95 % intervals over prompts)"]
    lines += [_line(name, row) for name, row in rows.items()]
    for measure in ("reward", "detector"):
        gain = np.subtract(rows["fk"][measure], rows["best_of_n"][measure])
        lines.append(f"fk - best_of_n, {measure}: {_interval(gain)}")
    return {"prompts": texts, "rows": rows, "table": "\n".join(lines)}


def _line(name: str, row: dict) -> str:
    return (
        f"{name:10s} reward {_interval(row['reward'])}  detector {_interval(row['detector'])}  "
        f"nfe {row['nfe']:.0f}, reward calls {row['reward_calls']:.0f}, {row['seconds']:.0f} s"
    )


def _interval(values: list[float] | np.ndarray) -> str:
    """Mean and the 95 % bootstrap interval over prompts."""
    data = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(data), size=(4000, len(data)))
    low, high = np.percentile(data[picks].mean(1), [2.5, 97.5])
    return f"{data.mean():.4f} [{low:.4f}, {high:.4f}]"

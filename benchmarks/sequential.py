"""Claim: methods that are sequential for one prompt run 16 prompts at >= 3x the prompts per second
of one after another, because the engine merges their requests."""

from __future__ import annotations

import steering
from benchmarks.meters import together_or_apart
from steering.samplers import RBF
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, WIDTH, NFE, STEPS = 2, 16, 160, 8
METHODS: dict[str, object] = {
    "rbf": RBF(n_init=10),  # the default's 25 noises for each chain leave nothing of so few rows
    "zero_order": "zero_order",
    "dts": "dts",
    "reno": "reno",
}


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe, texts = steering.load("stickers"), sticker_prompts("heldout", n=WIDTH, seed=2)

    def measure(method: object) -> dict:
        def steer(text: object) -> object:
            return steering.steer(
                pipe, text, reward="clip", method=method, nfe=NFE, num_inference_steps=STEPS
            )

        return together_or_apart(pipe, steer, texts, REPEATS)

    rows = {name: measure(method) for name, method in METHODS.items()}
    lines = [f"{WIDTH} prompts together against one by one, {NFE} rows each (bar: 3x)"]
    for name, row in rows.items():
        ratio, network = row["ratio"], row["network"]["median"]
        lines.append(
            f"{name:12s} {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), the "
            f"networks alone {network:.2f}; together {row['together']['median']:.1f} s, one by "
            f"one {row['one by one']['median']:.1f} s"
        )
    return {"rows": rows, "nfe": NFE, "steps": STEPS, "table": "\n".join(lines)}

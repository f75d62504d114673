"""Claim: methods that ask about one state of a prompt at a time run 16 prompts at >= 3x the
prompts per second of one after another, because the engine merges their requests. The same with a
few states in a call (chains, neighbours, rollouts side by side) gain less: alone, they already
fill a part of a call."""

from __future__ import annotations

import steering
from benchmarks.meters import together_or_apart
from steering.samplers import DTS, RBF, ZeroOrder
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, WIDTH, NFE, STEPS, BAR = 2, 16, 160, 8, 3.0
# rbf starts a chain with 25 noises by default, which alone fill a call and leave nothing of so few
# rows: one noise here, so that it too asks about one state at a time.
ONE: dict[str, object] = {
    "rbf": RBF(n_init=1, n_chains=1),
    "zero_order": ZeroOrder(n_neighbours=1),
    "dts": DTS(width=1),
    "reno": "reno",
}
SOME: dict[str, object] = {
    "rbf, 2 chains": RBF(n_init=10),
    "zero_order, 4 neighbours": "zero_order",
    "dts, 4 rollouts": "dts",
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

    rows = {name: measure(method) for name, method in (ONE | SOME).items()}
    lines = [f"{WIDTH} prompts together against one by one, {NFE} rows each"]
    for name, row in rows.items():
        ratio, network = row["ratio"], row["network"]["median"]
        lines.append(
            f"{name:24s} {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), the "
            f"networks alone {network:.2f}; together {row['together']['median']:.1f} s, one by "
            f"one {row['one by one']['median']:.1f} s" + (f" (bar: {BAR}x)" if name in ONE else "")
        )
    return {"rows": rows, "nfe": NFE, "steps": STEPS, "bar": BAR, "table": "\n".join(lines)}

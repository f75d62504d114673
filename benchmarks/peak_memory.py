"""Claim: FK with 32 particles takes at most 1.2 times the memory of best-of-32 in equal batches.

Best-of-N decodes 16 samples at a time, so at wider calls the batches are not equal. Bytes of all
tensors made during the run that are alive at once (weights are there before), counted by
``steering.memory.Watch``: the same on every machine.
"""

from __future__ import annotations

import steering
from steering.memory import Watch
from steering.stickers.prompts import prompts as sticker_prompts

WIDTH, STEPS, BATCHES, BAR = 32, 6, (8, 16, 32), 1.2


def peak(pipe: object, text: str, method: str, max_batch: int) -> int:
    made = steering.samplers.FK if method == "fk" else steering.samplers.BestOfN
    size = {"n_particles": WIDTH} if method == "fk" else {"n": WIDTH}
    with Watch() as watch:
        steering.steer(
            pipe, text, reward="clip", method=made(**size), max_batch=max_batch,
            num_inference_steps=STEPS,
        )  # fmt: skip
    return watch.peak


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pipe = steering.load("stickers")
    (text,) = sticker_prompts("heldout", n=1, seed=1)
    peak(pipe, text, "best_of_n", 8)  # opens the reward
    rows = {}
    for batch in BATCHES:
        found = {m: peak(pipe, text, m, batch) for m in ("best_of_n", "fk")}
        rows[batch] = {**found, "ratio": found["fk"] / found["best_of_n"]}
    lines = [f"Peak of live tensors, fk with {WIDTH} particles over best-of-{WIDTH} (bar: {BAR})"]
    lines += [
        f"calls of at most {batch}: {row['ratio']:.3f} ({row['fk'] / 2**20:.1f} over "
        f"{row['best_of_n'] / 2**20:.1f} MiB)"
        for batch, row in rows.items()
    ]
    return {"rows": rows, "width": WIDTH, "steps": STEPS, "table": "\n".join(lines)}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

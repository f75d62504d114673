"""Claim: RBF, which asks for one proposal at a time, runs 64 prompts together at least three times
as fast as one by one where wide batches pay; what they pay here stands beside it.

CPU time of the process, one thread. A chain is short, so that the whole takes a minute or two.
"""

from __future__ import annotations

import time
from functools import partial

import torch

import steering
from benchmarks.meters import one_thread, together_or_apart, turns
from steering.stickers.prompts import prompts as sticker_prompts

NAME, WIDTH, BAR = "stickers", 64, 3.0
METHOD = {"n_chains": 1, "n_init": 2, "n_proposals": 8, "steps": 6, "finish_steps": 2}


def alone(pipe: object, texts: list[str]) -> dict[str, float]:
    """What 64 rows in one call are worth over 64 calls of one row: network and decoder."""
    with steering.wrap(pipe, prompt=texts) as model:
        x = torch.cat([model.noise(1, steering.NoiseKey(0), cond=c) for c in range(WIDTH)])
        t, conds = model.grid().times[3], list(range(WIDTH))
        calls = {
            "network": lambda rows: model.predict(x[rows], t, cond=[conds[r] for r in rows]),
            "decoder": lambda rows: model.decode(x[rows]),
        }
        found = {}
        for name, call in calls.items():
            ways = {"wide": partial(call, conds), "narrow": lambda c=call: [c([k]) for k in conds]}
            took = turns(ways, 1)
            found[name] = took["narrow"][0] / took["wide"][0]
    return found


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe

    def steer(text: object) -> object:
        return steering.steer(
            pipe, text, reward="clip", method="rbf", options=METHOD, num_inference_steps=10
        )

    with one_thread():
        pipe, texts = steering.load(NAME), sticker_prompts("heldout", n=WIDTH, seed=2)
        found = together_or_apart(pipe, steer, list(texts), 1, now=time.process_time)
        worth = alone(pipe, list(texts))
    ratio, network, rest, together, apart = (
        found[key]["median"] for key in ("ratio", "network", "rest", "together", "one by one")
    )
    table = (
        f"{WIDTH} prompts x RBF together against one by one (bar: {BAR:.0f}x): {ratio:.2f}x "
        f"({together:.1f} against {apart:.1f} s); their networks {network:.2f}x, all else "
        f"{rest:.2f}x.\nOne call of {WIDTH} rows against {WIDTH} of one row, nothing steered: "
        f"network {worth['network']:.2f}x, decoder {worth['decoder']:.2f}x"
    )
    return {**found, "calls alone": worth, "options": METHOD, "table": table}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

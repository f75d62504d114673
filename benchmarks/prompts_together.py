"""Claim: RBF, which asks for one proposal at a time, runs 64 prompts together at least three times
as fast as one by one where wide batches pay; what they pay here stands beside it.

CPU time of the process, one thread. A chain is short, so that the whole takes a minute or two.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import steering
from benchmarks.meters import clocked
from steering.loading import call_defaults
from steering.stickers.prompts import prompts as sticker_prompts

NAME, WIDTH, BAR = "stickers", 64, 3.0
METHOD = {"n_chains": 1, "n_init": 2, "n_proposals": 8, "steps": 6, "finish_steps": 2}


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def steered(pipe: object, jobs: list[object]) -> dict[str, float]:
    """Seconds of all jobs, and of these inside the networks."""

    def all_jobs() -> None:
        for k, job in enumerate(jobs):
            seed = list(range(len(job))) if isinstance(job, list) else k
            steering.steer(
                pipe, job, reward="clip", method="rbf", options=METHOD, seed=seed,
                num_inference_steps=10,
            )  # fmt: skip

    with clocked(pipe, now=time.process_time) as clock:
        took = seconds(all_jobs)
    return {"seconds": took, "networks": clock.seconds}


def alone(pipe: object, texts: list[str]) -> dict[str, float]:
    """What 64 rows in one call are worth over 64 calls of one row: network and decoder."""
    with steering.wrap(pipe, name=NAME, prompt=texts, **call_defaults(NAME)) as model:
        x = torch.cat([model.noise(1, steering.NoiseKey(0), cond=c) for c in range(WIDTH)])
        t, conds = model.grid().times[3], list(range(WIDTH))
        calls = {
            "network": lambda rows: model.predict(x[rows], t, cond=[conds[r] for r in rows]),
            "decoder": lambda rows: model.decode(x[rows]),
        }
        found = {}
        for name, call in calls.items():
            call([0]), call(conds)
            wide = seconds(lambda call=call: call(conds))
            narrow = seconds(lambda call=call: [call([c]) for c in conds])
            found[name] = narrow / wide
    return found


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipe, texts = steering.load(NAME), sticker_prompts("heldout", n=WIDTH, seed=2)
        steered(pipe, texts[:1])
        apart, together = steered(pipe, list(texts)), steered(pipe, [list(texts)])
        worth = alone(pipe, list(texts))
    finally:
        torch.set_num_threads(threads)
    ratios = {key: apart[key] / together[key] for key in ("seconds", "networks")}
    own = {k: v["seconds"] - v["networks"] for k, v in (("a", apart), ("t", together))}
    table = (
        f"{WIDTH} prompts x RBF together against one by one (bar: {BAR:.0f}x): "
        f"{ratios['seconds']:.2f}x ({together['seconds']:.1f} against {apart['seconds']:.1f} s); "
        f"their networks {ratios['networks']:.2f}x, all else {own['a'] / own['t']:.2f}x.\n"
        f"One call of {WIDTH} rows against {WIDTH} of one row, nothing steered: network "
        f"{worth['network']:.2f}x, decoder {worth['decoder']:.2f}x"
    )
    return {
        "ratio": ratios, "together": together, "one by one": apart, "calls alone": worth,
        "options": METHOD, "table": table,
    }  # fmt: skip


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

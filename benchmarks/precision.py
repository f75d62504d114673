"""Claim: bfloat16 against float32 on this processor: time of the denoiser at batch 32, and whether
rewards rank the same samples alike. CPU time of the process, one thread, taking turns."""

from __future__ import annotations

from functools import partial

import torch

import steering
from benchmarks.meters import one_thread, spread, turns
from steering.loading import as_dtype
from steering.stickers.prompts import prompts as sticker_prompts

REPEATS, BATCH = 3, 32


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    with one_thread():
        return measure()


def measure() -> dict:
    (text,) = sticker_prompts("heldout", n=1, seed=4)
    names = ("float32", "bfloat16")
    models = {n: steering.wrap(steering.load("stickers", dtype=n), prompt=text,
                               num_inference_steps=10, max_sequence_length=14, guidance_scale=4.0)
              for n in names}  # fmt: skip
    x = models["float32"].noise(BATCH, steering.NoiseKey(1))
    level = models["float32"].grid().times[3]
    calls = {name: partial(model.predict, x, level) for name, model in models.items()}
    seconds = turns(calls, REPEATS)
    method = steering.samplers.BestOfN(n=BATCH, select="all")
    found = {n: steering.steer(m, reward="clip(model=stickers)", method=method, seed=2).rewards
             for n, m in models.items()}  # fmt: skip
    ranks = [found[n].argsort().argsort().double() for n in names]
    spearman = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    ratios = [a / b for a, b in zip(seconds["float32"], seconds["bfloat16"], strict=True)]
    ratio, chosen = spread(ratios), str(as_dtype("auto", "cpu")).removeprefix("torch.")
    table = (
        f"float32 / bfloat16 at batch {BATCH}: {ratio['median']:.2f}x ({ratio['min']:.2f} to "
        f"{ratio['max']:.2f}); Spearman of the rewards {spearman:.3f}; dtype='auto' takes {chosen}"
    )
    return {"ratio": ratio, "spearman": spearman, "auto": chosen, "table": table}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

"""Claim: rewards score 16 images at least twice as fast as a loop over PIL images does.

The loop is what papers' code does: per image PIL's transform, one forward pass of each tower. Same
model, same images, same run, taking turns. Rewards without a CLIP stand below, against one call
for each PIL image: they are not bound by the bar. Also: 32 images of one prompt cost one text
encoding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.meters import spread
from benchmarks.reward_models import CLIP_FAMILY, NETWORKS, PROMPT, one_by_one
from steering.stickers.train.loop import seeded_init

REPEATS, BATCH, SIDE = 5, 16, 512
OTHERS = ("detector", "brightness", "jpeg")
FEW = {"ocr": 2}  # images, of what takes half a second for one


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pictures = photographs(32)
    with tempfile.TemporaryDirectory() as folder, seeded_init(0):
        rows = []
        for make in (*CLIP_FAMILY, *NETWORKS):
            place = Path(folder) / make.__name__
            place.mkdir()
            name, spec, plain = make(place)
            count = FEW.get(make.__name__, BATCH)
            repeats = REPEATS if make in CLIP_FAMILY else 3
            rows.append(compare(name, spec, pictures[:count], plain, repeats))
        rows += [compare(s, s, pictures[:BATCH], one_by_one(s)) for s in OTHERS]
        encodings = text_encodings(f"local-dir:{folder}/clip", pictures)
    lines = [f"{BATCH} images of {SIDE} px, one prompt, against a loop over PIL (bar: 2x)"]
    for row in rows:
        lines.append(
            f"{row['name']:34s} ratio {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to "
            f"{row['ratio']['max']:.2f}); {row['batched']['median']:.1f} against "
            f"{row['loop']['median']:.1f} images/s, values differ by {row['difference']:.1e}"
        )
    lines.append(f"32 images of one prompt: {encodings} text encoding(s)")
    return {"rewards": rows, "text_encodings_of_32": encodings, "table": "\n".join(lines)}


def photographs(n: int) -> torch.Tensor:
    """Smooth random images [n, 3, SIDE, SIDE], 8-bit values in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 12, 12, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (x * 255).round() / 255


def compare(
    name: str, spec: str, x: torch.Tensor, plain: Callable, repeats: int = REPEATS
) -> dict:
    """Images per second of both ways, in turns."""
    from steering.rewards import as_reward
    from steering.rewards.images import to_pil

    reward = as_reward(spec)
    rates: dict[str, list[float]] = {"batched": [], "loop": []}
    values = {}
    for repeat in range(repeats + 1):
        with torch.no_grad():
            started = time.perf_counter()
            values["batched"] = reward(x, PROMPT).value
            middle = time.perf_counter()
            # the loop starts from the decoder's tensor too, as pipelines return it
            values["loop"] = plain(to_pil(x))
            ended = time.perf_counter()
        if repeat:
            rates["batched"].append(len(x) / (middle - started))
            rates["loop"].append(len(x) / (ended - middle))
    ratios = [a / b for a, b in zip(rates["batched"], rates["loop"], strict=True)]
    difference = float((values["batched"] - values["loop"]).abs().max())
    return {"name": name, "ratio": spread(ratios), "difference": difference,
            **{k: spread(v) for k, v in rates.items()}}  # fmt: skip


def text_encodings(name: str, x: torch.Tensor) -> int:
    """Rows through the text tower for 32 images of one new prompt, scored twice."""
    from steering.rewards.clip import Clip

    reward = Clip(model=name)
    reward(x[:1], "warm up")
    rows: list[int] = []
    tower = reward._ready("cpu").model.token_embedding
    handle = tower.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    reward(x, "thirty-two images of one prompt")
    reward(x, "thirty-two images of one prompt")
    handle.remove()
    return sum(rows)

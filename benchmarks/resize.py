"""Claim: 16 images are resized, cropped and normalised at least twice as fast as by a loop over
PIL images, to the same bits. CPU time of the process, one thread, taking turns."""

from __future__ import annotations

from functools import partial

import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.meters import one_thread, spread, turns
from steering.rewards.images import to_pil
from steering.rewards.pixels import CLIP_MEAN, CLIP_STD, PixelSpec

REPEATS, BATCH, TARGET = 5, 16, 224


def pictures(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (BATCH, 3, height, width), generator=generator).float() / 255


def ways() -> dict:
    spec = PixelSpec(size=TARGET)
    tail = [v2.CenterCrop(TARGET), v2.Normalize(CLIP_MEAN, CLIP_STD)]
    cubic = v2.InterpolationMode.BICUBIC
    per_image = v2.Compose([
        v2.Resize(TARGET, interpolation=Image.Resampling.BICUBIC), v2.CenterCrop(TARGET),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), tail[1],
    ])  # fmt: skip
    tensors = v2.Compose([v2.Resize(TARGET, interpolation=cubic, antialias=True), *tail])
    return {
        "ours": spec.apply,
        "PIL loop": lambda x: torch.stack([per_image(image) for image in to_pil(x)]),
        "torchvision on tensors": tensors,
    }


def measure(height: int, width: int) -> dict:
    x, functions = pictures(height, width), ways()
    results = {name: function(x) for name, function in functions.items()}
    calls = {name: partial(function, x) for name, function in functions.items()}
    seconds = turns(calls, REPEATS)
    levels = 255 * min(CLIP_STD)  # a difference of one level or more, in levels
    apart = {n: float((r - results["PIL loop"]).abs().max()) * levels for n, r in results.items()}
    ratios = {
        name: spread([a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)])
        for name in functions
        if name != "ours"
    }
    return {"size": [height, width], "seconds": {n: spread(v) for n, v in seconds.items()},
            "ratio": ratios, "levels_from_pil": apart}  # fmt: skip


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    with one_thread():
        rows = [measure(*size) for size in ((512, 512), (1024, 1024), (768, 1344), (64, 64))]
    lines = [f"{BATCH} images to {TARGET}, cropped and normalised, against ours (bar: 2x)"]
    for row in rows:
        said = ", ".join(
            f"{name} {r['median']:.2f}x (off PIL by {row['levels_from_pil'][name]:.1f} levels)"
            for name, r in row["ratio"].items()
        )
        ours = row["seconds"]["ours"]["median"]
        lines.append(f"{row['size']}: ours {1e3 * ours:.0f} ms; {said}")
    return {"rows": rows, "table": "\n".join(lines)}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

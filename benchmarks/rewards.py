"""Claim: rewards score 16 images at least twice as fast as a loop over PIL images does.

The loop is what papers' code does: per image PIL's transform, one forward pass of each tower. Same
model, same images, same run, taking turns. Also: 32 images of one prompt cost one text encoding.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.meters import spread

REPEATS, BATCH, SIDE = 5, 16, 512
PROMPT = "a photo of a red apple and a blue clock"
# A CLIP of a size that a CPU can time, with random weights: the time does not depend on them.
CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 384, "head_width": 64,
                   "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4,
                 "layers": 6},
}  # fmt: skip
PREPROCESS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    pictures = photographs(32)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        rows = [clip_row(Path(folder), pictures[:BATCH]), stickers_row(pictures[:BATCH])]
        encodings = text_encodings(Path(folder), pictures)
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


def clip_row(folder: Path, x: torch.Tensor) -> dict:
    import open_clip
    from safetensors.torch import save_file

    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    name = f"local-dir:{folder}"
    net, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    return compare("clip (ViT-S/32, random)", f"clip(model='{name}')", x,
                   loop(net.eval(), transform, tokenizer))  # fmt: skip


def stickers_row(x: torch.Tensor) -> dict:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from steering.stickers.load import load_clip

    net, tokenizer, config = load_clip()
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    return compare("clip(model=stickers)", "clip(model=stickers)", x,
                   loop(net.eval(), transform, tokenizer))  # fmt: skip


def loop(net: torch.nn.Module, transform: Callable, tokenizer: Callable) -> Callable:
    """CLIPScore one PIL image at a time."""

    @torch.no_grad()
    def scores(pictures: list[Image.Image]) -> torch.Tensor:
        values = []
        for picture in pictures:
            image = net.encode_image(transform(picture)[None])
            text = net.encode_text(tokenizer([PROMPT]))
            values.append(torch.nn.functional.cosine_similarity(image, text))
        return torch.cat(values)

    return scores


def compare(name: str, spec: str, x: torch.Tensor, plain: Callable) -> dict:
    """Images per second of both ways, in turns."""
    from steering.rewards import as_reward
    from steering.rewards.images import to_pil

    reward = as_reward(spec)
    rates: dict[str, list[float]] = {"batched": [], "loop": []}
    values = {}
    for repeat in range(REPEATS + 1):
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


def text_encodings(folder: Path, x: torch.Tensor) -> int:
    """Rows through the text tower for 32 images of one new prompt, scored twice."""
    from steering.rewards.clip import Clip

    reward = Clip(model=f"local-dir:{folder}")
    reward(x[:1], "warm up")
    rows: list[int] = []
    tower = reward._encoder("cpu").model.token_embedding
    handle = tower.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    reward(x, "thirty-two images of one prompt")
    reward(x, "thirty-two images of one prompt")
    handle.remove()
    return sum(rows)

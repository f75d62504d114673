"""Samples the sticker flow on held-out prompts and judges the images.

python -m steering.stickers.train.evaluate [--pipeline DIR] [--n 120] [--grid FILE.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from steering.stickers.grammar import TAGS, parse
from steering.stickers.judge import StickerJudge, Verdict
from steering.stickers.load import T5_ZEROS, WEIGHTS, load_pipeline
from steering.stickers.prompts import prompts
from steering.stickers.train.data import to_tensor


def sample(
    pipe: StableDiffusion3Pipeline,
    text: list[str],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch_size: int = 20,
) -> np.ndarray:
    """One image for each prompt, uint8 [n, 64, 64, 3]."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, len(text), batch_size):
        images = pipe(
            text[start : start + batch_size], num_inference_steps=steps, guidance_scale=guidance,
            generator=generator, output_type="np", max_sequence_length=T5_ZEROS,
        ).images  # fmt: skip
        out.append((np.asarray(images) * 255.0 + 0.5).astype(np.uint8))
    return np.concatenate(out)


def shares(text: list[str], verdicts: list[Verdict]) -> dict[str, float]:
    """Share of images that show their prompt, per tag and over all images."""
    tags = [parse(p)["tag"] for p in text]
    right = np.array([v.correct for v in verdicts], float)
    by_tag = {tag: float(right[[t == tag for t in tags]].mean()) for tag in TAGS if tag in tags}
    return by_tag | {"overall": float(np.mean(list(by_tag.values()))), "images": right.mean()}


def save_grid(images: np.ndarray, path: Path, columns: int = 12, zoom: int = 1) -> None:
    """A contact sheet, row by row."""
    n, h, w, _ = images[: len(images) // columns * columns].shape
    rows = images[:n].reshape(-1, columns, h, w, 3).swapaxes(1, 2)
    sheet = Image.fromarray(rows.reshape(-1, columns * w, 3))
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
    sheet.save(path, optimize=True)


def main() -> None:
    """Print the share of held-out prompts satisfied, per tag."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=WEIGHTS / "pipeline")
    parser.add_argument("--n", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    text = prompts("heldout", args.n)
    pipe = load_pipeline("stickers", torch.float32, args.pipeline)
    images = sample(pipe, text, steps=args.steps, guidance=args.guidance, seed=args.seed)
    verdicts = StickerJudge().judge(to_tensor(images), text)
    for name, share in shares(text, verdicts).items():
        print(f"{name:14s} {share:.3f}")
    if args.grid is not None:
        save_grid(images, args.grid)


if __name__ == "__main__":
    main()

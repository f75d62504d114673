"""Trains the sticker autoencoder: AutoencoderTiny, 4x down, 8 channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steering.stickers.train.data import chunks, draw, encode, to_tensor
from steering.stickers.train.loop import Loop, Recipe, autocast, seeded_init
from steering.stickers.world import SPRITE, Scene, StickerWorld

BATCH = 32
OBJECT_WEIGHT = 7.0  # of a pixel inside a box; the background alone would win otherwise
LATENT_NOISE = 0.02  # keeps the latents usable for a flow that is never exact


def build(warm_start: Path | None) -> torch.nn.Module:
    """A fresh autoencoder of 0.65 M parameters, or the one in a folder."""
    from diffusers import AutoencoderTiny

    if warm_start is not None:
        return AutoencoderTiny.from_pretrained(warm_start, torch_dtype=torch.float32)
    with seeded_init(0):
        return AutoencoderTiny(
            encoder_block_out_channels=(48,) * 3, decoder_block_out_channels=(48,) * 3,
            num_encoder_blocks=(1, 1, 2), num_decoder_blocks=(2, 2, 1), latent_channels=8,
        )  # fmt: skip


def object_mask(scenes: list[Scene]) -> Tensor:
    """1 inside the boxes, else 0: [n, 1, 64, 64]."""
    mask = torch.zeros(len(scenes), 1, 64, 64)
    for n, scene in enumerate(scenes):
        for o in scene.objects:
            mask[n, :, o.y : o.y + SPRITE, o.x : o.x + SPRITE] = 1.0
    return mask


def reconstruction(y: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """L1, L2 and image-gradient error, weighted towards objects."""
    error = y - x
    weight = 0.3 * (1.0 + (OBJECT_WEIGHT - 1.0) * mask)
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return (weight * (error.abs() + 2.0 * error.square())).mean() + 0.5 * gradient


def train(recipe: Recipe, warm_start: Path | None = None) -> None:
    """Train, then write a diffusers folder to `recipe.out / "export"`."""
    world, model = StickerWorld("all"), build(warm_start)
    model.to(memory_format=torch.channels_last)
    loop = Loop(recipe, {"autoencoder": model}, lambda: evaluate(model, 64)["psnr_boxes"])
    for step in loop.steps():
        images, scenes = draw(world, np.random.default_rng([recipe.seed, step]), BATCH)
        x = to_tensor(images).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with autocast():
            z = model.encode(x).latents
            noise = LATENT_NOISE * torch.randn(z.shape, generator=generator)
            y = model.decode(z + noise).sample
        spread = (z.float().square().mean() - 1.0).clamp(min=0.0)
        loop.update(reconstruction(y.float(), x, object_mask(scenes)) + 1e-3 * spread)
    loop.use_best()
    export(model, recipe.out / "export")
    loop.log(**evaluate(model))


def export(model: torch.nn.Module, folder: Path) -> None:
    """Write the folder, with the latents' mean and spread in the config as SD3 reads them."""
    images, _ = draw(StickerWorld(), np.random.default_rng(9_200_000), 1024)
    latents = encode(model, images).float()
    model.register_to_config(
        shift_factor=float(latents.mean()), scaling_factor=float(1.0 / latents.std())
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32)


@torch.no_grad()
def evaluate(model: torch.nn.Module, n: int = 256) -> dict[str, float]:
    """PSNR in dB over the whole image and inside the boxes (the background alone is easy)."""
    images, scenes = draw(StickerWorld("heldout"), np.random.default_rng(9_300_000), n)
    x, mask = to_tensor(images), object_mask(scenes)
    y = torch.cat([model(x[p].mul(2).sub(1)).sample for p in chunks(n, 32)])
    squared = (y.add(1).div(2).clamp(0, 1) - x).square()
    inside = (squared * mask).sum() / (3 * mask.sum())
    return {
        "psnr": float(-10 * squared.mean().log10()), "psnr_boxes": float(-10 * inside.log10())
    }  # fmt: skip

"""Training data: rendered scenes, and scenes seen through the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steering.stickers.load import quiet
from steering.stickers.train.loop import autocast, write_atomic
from steering.stickers.world import Scene, StickerWorld

POOL_SEED = 7_000_000  # apart from the seeds of training steps


def draw(world: StickerWorld, rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[Scene]]:
    """`n` fresh scenes and their images uint8 [n, 64, 64, 3]."""
    scenes = [world.sample(rng) for _ in range(n)]
    return np.stack([world.render(s) for s in scenes]), scenes


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255.0).contiguous()


def chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


@torch.no_grad()
def encode(vae: torch.nn.Module, images: np.ndarray, size: int = 16) -> Tensor:
    """Raw latents float16 [n, 8, 16, 16] of uint8 images."""
    out = []
    for part in chunks(len(images), size):
        x = to_tensor(images[part]).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        with autocast():
            out.append(vae.encode(x).latents.half().clone(memory_format=torch.contiguous_format))
    return torch.cat(out)


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: Tensor, size: int = 16) -> np.ndarray:
    """Images uint8 [n, 64, 64, 3] of raw latents."""
    out = []
    for part in chunks(len(latents), size):
        z = latents[part].float().contiguous(memory_format=torch.channels_last)
        with autocast():
            y = vae.decode(z).sample
        out.append(y.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(out).contiguous().numpy()


class DecodedPool:
    """Scenes after a trip through the autoencoder with noisy latents, made once and kept.

    Judges trained on clean renders alone would meet decoder blur for the first time in
    generated images. Scenes are redrawn from their seeds; only images are stored.
    """

    def __init__(self, path: Path, vae_folder: Path, n: int = 2048, noise: float = 0.2) -> None:
        world = StickerWorld()
        self.scenes = [world.sample(np.random.default_rng([POOL_SEED, k])) for k in range(n)]
        if not path.exists():
            write_atomic(path, lambda p: np.savez(p, images=self._make(world, vae_folder, noise)))
        with np.load(path) as file:
            self.images = file["images"]

    def _make(self, world: StickerWorld, vae_folder: Path, noise: float) -> np.ndarray:
        vae = load_vae(vae_folder)
        latents = encode(vae, np.stack([world.render(s) for s in self.scenes])).float()
        generator = torch.Generator().manual_seed(POOL_SEED)
        level = torch.rand(len(latents), 1, 1, 1, generator=generator) * noise
        spread = latents.std() * level
        return decode(vae, latents + spread * torch.randn(latents.shape, generator=generator))

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[Scene]]:
        chosen = rng.integers(len(self.scenes), size=n)
        return self.images[chosen], [self.scenes[k] for k in chosen]


def load_vae(folder: Path) -> torch.nn.Module:
    from diffusers import AutoencoderTiny

    with quiet("diffusers"):
        vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval()
    return vae.to(memory_format=torch.channels_last)

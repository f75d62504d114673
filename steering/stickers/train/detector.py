"""Trains the sticker detector: a small YOLOS with one detection token for each grid place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steering.stickers.grammar import CLASSES, TAGS
from steering.stickers.load import WEIGHTS
from steering.stickers.train.data import DecodedPool, draw, to_tensor
from steering.stickers.train.loop import Loop, Recipe, autocast
from steering.stickers.world import GRID, SIZE, SPRITE, Scene, StickerWorld, paste, sprite

BATCH = 64
DECODED = 16  # of the batch, scenes that went through the autoencoder
PLACES = (SIZE - SPRITE) // GRID + 1  # object places along one axis
BLANK = len(CLASSES)
BLANK_WEIGHT = 0.3
MUSH_SHARE = 0.25  # of the scenes get a half-formed object that must not be found
SHIFT = 1  # px; generated objects sit slightly off the grid


def build():  # noqa: ANN201 - transformers is imported lazily
    """A fresh YOLOS of 0.9 M parameters, patches on the world's grid."""
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)  # transformers initialises from the global generator
    config = YolosConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        image_size=[SIZE, SIZE], patch_size=GRID, num_detection_tokens=PLACES**2,
        use_mid_position_embeddings=False, id2label=dict(enumerate(CLASSES)),
        label2id={name: k for k, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    _place_tokens(model)
    return model


@torch.no_grad()
def _place_tokens(model: torch.nn.Module) -> None:
    """Start each detection token at the mean position of the 3x3 patches it answers for.

    A fixed token for each place needs no bipartite matching, the slow part of DETR training.
    """
    side, width = SIZE // GRID, model.config.hidden_size
    frequency = torch.exp(-torch.arange(width // 4) / (width // 4) * np.log(100.0))
    angle = torch.arange(side)[:, None] * frequency * 1.5
    wave = torch.cat([angle.sin(), angle.cos()], -1)  # [side, width / 2]
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], -1).permute(2, 0, 1)
    places = F.avg_pool2d(grid, SPRITE // GRID, stride=1)
    position = model.vit.embeddings.position_embeddings
    position[0, 1 : 1 + side**2] = grid.flatten(1).T
    position[0, 1 + side**2 :] = places.flatten(1).T


def targets(scenes: list[Scene], shifts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Class [n, places] and box [n, places, 4] (centre and size over `SIZE`) of each token."""
    labels = torch.full((len(scenes), PLACES**2), BLANK)
    boxes = torch.zeros(len(scenes), PLACES**2, 4)
    for n, (scene, (dx, dy)) in enumerate(zip(scenes, shifts, strict=True)):
        for o in scene.objects:
            k = (o.y // GRID) * PLACES + o.x // GRID
            labels[n, k] = CLASSES.index(o.name)
            centre = torch.tensor([o.x + dx, o.y + dy], dtype=torch.float32) + SPRITE / 2
            boxes[n, k] = torch.cat([centre, torch.full((2,), float(SPRITE))]) / SIZE
    return labels, boxes


def spoil(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Add one half-formed object on free ground: two sprites at half strength each."""
    x, y = GRID * rng.integers(PLACES, size=2)
    if any(abs(x - o.x) < SPRITE and abs(y - o.y) < SPRITE for o in scene.objects):
        return image
    a, b = rng.choice(len(CLASSES), 2, replace=False)
    mix = 0.5 * sprite(CLASSES[a]) + (0.5 if rng.random() < 0.7 else 0.0) * sprite(CLASSES[b])
    out = image.astype(np.float32) / 255.0
    paste(out, mix, int(x), int(y))
    return (out * 255.0 + 0.5).astype(np.uint8)


def shift(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Move the image by whole px; the border repeats."""
    padded = np.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return padded[SHIFT - dy : SHIFT - dy + SIZE, SHIFT - dx : SHIFT - dx + SIZE]


def make_batch(
    world: StickerWorld, pool: DecodedPool, rng: np.random.Generator
) -> tuple[np.ndarray, list[Scene], np.ndarray]:
    """Images uint8, scenes, and by how many px each image was moved [n, 2]."""
    fresh, seen = draw(world, rng, BATCH - DECODED), pool.draw(rng, DECODED)
    images, scenes = np.concatenate([fresh[0], seen[0]]), [*fresh[1], *seen[1]]
    shifts = rng.integers(-SHIFT, SHIFT + 1, (BATCH, 2)) * (rng.random((BATCH, 1)) < 0.5)
    for n, scene in enumerate(scenes):
        if rng.random() < MUSH_SHARE:
            images[n] = spoil(images[n], scene, rng)
        images[n] = shift(images[n], *shifts[n])
    return images, scenes, shifts


def train(recipe: Recipe, warm_start: Path | None = None) -> None:
    """Train, then write a transformers folder to `recipe.out / "export"`."""
    pool = DecodedPool(recipe.out.parent / "decoded.npz", WEIGHTS / "pipeline" / "vae")
    model = build() if warm_start is None else build().from_pretrained(warm_start)
    world, loop = StickerWorld("all"), Loop(recipe, {"detector": model})
    weight = torch.ones(BLANK + 1)
    weight[BLANK] = BLANK_WEIGHT
    for step in loop.steps():
        rng = np.random.default_rng([recipe.seed, step])
        images, scenes, shifts = make_batch(world, pool, rng)
        labels, boxes = targets(scenes, shifts)
        with autocast():
            out = model(to_tensor(images).mul(2).sub(1))
        logits, guess, found = out.logits.float(), out.pred_boxes.float(), labels < BLANK
        classes = F.cross_entropy(logits.transpose(1, 2), labels, weight=weight)
        loop.update(classes + 5.0 * F.l1_loss(guess[found], boxes[found]))
    loop.use_average()
    model.save_pretrained(recipe.out / "export")
    loop.log(**evaluate(recipe.out / "export", pool))


def evaluate(folder: Path, pool: DecodedPool, n: int = 600) -> dict[str, float]:
    """Share of scenes judged right per tag: rendered, and decoded by the autoencoder."""
    from steering.stickers.judge import StickerJudge
    from steering.stickers.load import load_detector

    judge = StickerJudge(load_detector(folder))
    rng = np.random.default_rng(9_100_000)
    out: dict[str, float] = {}
    for kind, (images, scenes) in {
        "rendered": draw(StickerWorld("heldout"), rng, n),
        "decoded": pool.draw(rng, n),
    }.items():
        verdicts = judge.judge(to_tensor(images), [s.metadata for s in scenes])
        for tag in TAGS:
            right = [
                v.correct
                for v, s in zip(verdicts, scenes, strict=True)
                if s.metadata["tag"] == tag
            ]
            out[f"{kind}/{tag}"] = float(np.mean(right))
    return out

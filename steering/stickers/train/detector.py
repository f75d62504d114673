"""Trains the sticker detector: a small Conditional DETR with one query for each grid place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig
from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrFrozenBatchNorm2d,
    replace_batch_norm,
)

from steering.errors import OptionError
from steering.stickers.grammar import CLASSES, TAGS
from steering.stickers.load import WEIGHTS
from steering.stickers.train.data import DecodedPool, draw, to_tensor
from steering.stickers.train.loop import Loop, Recipe, autocast, seeded_init
from steering.stickers.world import GRID, SIZE, SPRITE, Scene, StickerWorld, paste, sprite

BATCH = 64
DECODED = 16  # of the batch, scenes that went through the autoencoder
PLACES = (SIZE - SPRITE) // GRID + 1  # object places along one axis
BLANK = len(CLASSES)
WIDTH, HEADS = 128, 4
SHARPNESS = 8.5  # of the first attention: its square over 8 is the logit of a right row
MUSH_SHARE = 0.25  # of the scenes get a half-formed object that must not be found
SHIFT = 1  # px; generated objects sit slightly off the grid


def build() -> ConditionalDetrForObjectDetection:
    """A fresh Conditional DETR of 0.7 M parameters: two residual stages, one decoder layer.

    Its batch norms are live; `export` freezes them, as DETR has them.
    """
    backbone = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = ConditionalDetrConfig(
        backbone_config=backbone, d_model=WIDTH, num_queries=PLACES**2, encoder_layers=0,
        decoder_layers=1, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=256, decoder_ffn_dim=256, dropout=0.0, position_embedding_type="learned",
        id2label=dict(enumerate(CLASSES)), label2id={name: k for k, name in enumerate(CLASSES)},
    )  # fmt: skip
    with seeded_init(0):
        model = ConditionalDetrForObjectDetection(config)
    _thaw(model.model.backbone)
    _look_at_places(model)
    return model.requires_grad_(True)


def _thaw(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConditionalDetrFrozenBatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(len(child.weight)))
        else:
            _thaw(child)


@torch.no_grad()
def _look_at_places(model: ConditionalDetrForObjectDetection) -> None:
    """Start each query at one grid place: its box, and attention to the cell at its middle.

    Positions start as one-hot columns and rows. Fixed places need no bipartite matching, the
    slow part of DETR training, and classes are learned as a sliding window would.
    """
    cells, half, head = SIZE // GRID, WIDTH // 2, WIDTH // HEADS
    used = torch.cat([torch.arange(cells), half + torch.arange(cells)])  # columns, then rows
    one_hot = torch.zeros(50, half)  # DETR's learned tables have 50 rows
    one_hot[:cells, :cells] = torch.eye(cells)
    core, decoder = model.model, model.model.decoder
    core.position_embedding.column_embeddings.weight.copy_(one_hot)
    core.position_embedding.row_embeddings.weight.copy_(one_hot)
    middle = torch.arange(PLACES) + SPRITE // GRID // 2
    row, column = (m.flatten() for m in torch.meshgrid(middle, middle, indexing="ij"))
    places = torch.cat([one_hot[column], one_hot[row]], -1)
    core.query_position_embeddings.weight.copy_(places)
    look = decoder.layers[0].encoder_attn
    for projection in (look.q_pos_proj, look.k_pos_proj):
        projection.weight.zero_()
        for h in range(HEADS):
            projection.weight[h * head + torch.arange(len(used)), used] = SHARPNESS
    for projection in (look.q_content_proj, look.k_content_proj, look.q_pos_sine_proj):
        projection.weight.zero_()
    first, last = decoder.ref_point_head.layers
    first.weight.copy_(torch.eye(WIDTH))
    last.weight.zero_()
    centres = ((torch.arange(cells) + 0.5) / cells).logit()
    last.weight[0, :cells] = last.weight[1, half : half + cells] = centres
    model.bbox_predictor.layers[-1].weight.zero_()
    size = torch.tensor(SPRITE / SIZE).logit()
    model.bbox_predictor.layers[-1].bias.copy_(torch.stack([0 * size, 0 * size, size, size]))
    model.class_labels_classifier.bias.fill_(-4.0)


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
    """Train, then write a transformers folder to `recipe.out / "export"`.

    There is no average of the weights: it would not fit the batch norms' statistics.
    """
    if warm_start is not None:
        raise OptionError("The detector trains from scratch; leave --warm-start out.")
    pool = DecodedPool(recipe.out.parent / "decoded.npz", WEIGHTS / "pipeline" / "vae")
    world, model = StickerWorld("all"), build()
    held = np.random.default_rng(9_100_001)
    fixed = make_batch(StickerWorld("heldout"), pool, held)
    loop = Loop(
        recipe, {"detector": model}, lambda: -float(errors(model, fixed)["loss"]), averaged=False
    )
    for step in loop.steps():
        rng = np.random.default_rng([recipe.seed, step])
        loop.update(**errors(model, make_batch(world, pool, rng)))
    loop.use_best()
    export(model, recipe.out / "export")
    loop.log(**evaluate(recipe.out / "export", pool))


def errors(
    model: ConditionalDetrForObjectDetection, batch: tuple[np.ndarray, list[Scene], np.ndarray]
) -> dict[str, torch.Tensor]:
    """The loss of a batch and its parts."""
    images, scenes, shifts = batch
    labels, boxes = targets(scenes, shifts)
    with autocast():
        out = model(to_tensor(images).mul(2).sub(1))
    logits, guess, found = out.logits.float(), out.pred_boxes.float(), labels < BLANK
    wanted = F.one_hot(labels, BLANK + 1)[..., :BLANK].float()
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1)
    # Two means: blanks outnumber objects 17 to 1 and would drown the classes.
    objects, blanks = each[found].mean(), each[~found].mean()
    place = F.l1_loss(guess[found], boxes[found])
    loss = objects + blanks + 5.0 * place
    return {"loss": loss, "objects": objects, "blanks": blanks, "place": place}


def export(model: ConditionalDetrForObjectDetection, folder: Path) -> None:
    """Freeze the batch norms and write the folder."""
    model.eval()
    with torch.no_grad():
        replace_batch_norm(model.model.backbone)
    model.save_pretrained(folder)


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

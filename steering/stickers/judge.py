"""Says whether an image shows its prompt, by GenEval's rules (Ghosh et al., 2023, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steering.stickers.grammar import CLASSES, COLORS, Metadata, parse
from steering.stickers.load import load_detector
from steering.stickers.rules import Box, decide
from steering.stickers.world import SIZE, SPRITE, sprite

if TYPE_CHECKING:
    from transformers import ConditionalDetrForObjectDetection

MIN_SCORE = 0.5
MAX_OVERLAP = 0.3  # IoU above which two detections are one object
REACH = 2  # px a crop may be off its box in the colour match


@dataclass(frozen=True, kw_only=True)
class Found:
    """A detected object: class, probability, box (x0, y0, x1, y1) in px of the 64 px scene.

    `color` is read only where the prompt asks for one.
    """

    name: str
    score: float
    box: Box
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the image shows its prompt; `reason` names the clauses that fail."""

    correct: bool
    reason: str
    objects: list[Found]


class StickerJudge:
    """GenEval on stickers: a detector finds objects, a matched filter names their colours.

    Args:
        detector: a Conditional DETR over the sticker classes; None opens the shipped one.
        batch_size: images the detector sees at once.
    """

    def __init__(
        self, detector: ConditionalDetrForObjectDetection | None = None, *, batch_size: int = 64
    ) -> None:
        self.detector = load_detector() if detector is None else detector
        self.batch_size = batch_size

    def judge(self, images: Tensor, prompts: Sequence[str | Metadata]) -> list[Verdict]:
        """One verdict for each image.

        Args:
            images: [n, 3, H, W] in [0, 1], any size; resized to 64x64.
            prompts: n prompts of the grammar or GenEval records.

        Raises:
            steering.errors.OptionError: wrong shape, unequal lengths, prompt outside the grammar.
        """
        records = [parse(p) if isinstance(p, str) else p for p in prompts]
        images = _scenes(images)
        if len(images) != len(records):
            raise _error(f"{len(images)} images came with {len(records)} prompts.")
        found = self.detect(images)
        pixels = images.permute(0, 2, 3, 1).numpy()
        return [
            check(record, [_with_color(o, record, p) for o in objects])
            for record, objects, p in zip(records, found, pixels, strict=True)
        ]

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Found]]:
        """Objects of each image [n, 3, H, W], most certain first."""
        out: list[list[Found]] = []
        device = next(self.detector.parameters()).device
        for part in _scenes(images).split(self.batch_size) if len(images) else ():
            answer = self.detector(part.to(device) * 2.0 - 1.0)
            scores, labels = answer.logits.sigmoid().max(-1)
            boxes = answer.pred_boxes * SIZE
            rows = zip(scores.cpu(), labels.cpu(), boxes.cpu(), strict=True)
            out.extend(_objects(*row) for row in rows)
        return out


def check(record: Metadata, objects: list[Found]) -> Verdict:
    """GenEval's rules (`steering.stickers.rules`) on a list of objects, most certain first."""
    groups: dict[str, list[Found]] = {}
    for o in objects:
        groups.setdefault(o.name, []).append(o)
    boxes = {name: [o.box for o in group] for name, group in groups.items()}
    found = decide(record, boxes, lambda name, k: str(groups[name][k].color))
    return Verdict(correct=found.correct, reason=found.reason, objects=objects)


def read_color(pixels: np.ndarray, name: str, box: Box) -> str:
    """The tint of `name` that fits best in `pixels` [64, 64, 3] at `box`.

    Each of the ten tints is drawn over the local background and compared where the sprite is
    opaque, at every offset of up to `REACH` px; the smallest squared error wins.
    """
    margin = REACH + SPRITE
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    x, y = (round((box[k] + box[k + 2] - SPRITE) / 2) + margin for k in (0, 1))
    x, y = (int(np.clip(v, REACH, SIZE + margin)) for v in (x, y))
    window = padded[y - REACH : y + SPRITE + REACH, x - REACH : x + SPRITE + REACH]
    ring = np.ones(window.shape[:2], bool)
    ring[REACH:-REACH, REACH:-REACH] = False
    background = np.median(window[ring], axis=0)
    crops = np.lib.stride_tricks.sliding_window_view(window, (SPRITE, SPRITE), axis=(0, 1))
    crops = crops.transpose(0, 1, 3, 4, 2).reshape(-1, 1, SPRITE, SPRITE, 3)
    rgb, alpha = _tints(name)
    error = (crops - rgb - (1.0 - alpha) * background) * alpha
    return COLORS[int((error**2).mean(axis=(2, 3, 4)).min(axis=0).argmin())]


@cache
def _tints(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colours [10, 24, 24, 3] and opacity [24, 24, 1] of a class."""
    drawn = np.stack([sprite(name, color) for color in COLORS])
    return drawn[..., :3], drawn[0, ..., 3:]


def _with_color(found: Found, record: Metadata, pixels: np.ndarray) -> Found:
    if not any("color" in c and c["class"] == found.name for c in record["include"]):
        return found
    color = read_color(pixels, found.name, found.box)
    return Found(name=found.name, score=found.score, box=found.box, color=color)


def _objects(scores: Tensor, labels: Tensor, boxes: Tensor) -> list[Found]:
    """Detections above `MIN_SCORE`, overlapping ones reduced to the most certain."""
    kept: list[Found] = []
    for k in scores.argsort(descending=True).tolist():
        if scores[k] < MIN_SCORE:
            break
        cx, cy, w, h = boxes[k].tolist()
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        if all(overlap(box, other.box) < MAX_OVERLAP for other in kept):
            kept.append(Found(name=CLASSES[labels[k]], score=float(scores[k]), box=box))
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (areas - w * h) if areas > w * h else 0.0


def _scenes(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise _error(f"images have shape {tuple(images.shape)}, not [n, 3, H, W].")
    images = images.detach().float().cpu()
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)


def _error(what: str) -> Exception:
    from steering.errors import OptionError

    return OptionError(f"The sticker judge cannot judge this: {what}")

"""Object detectors for GenEval behind one protocol: Mask2Former, the DETR family, stickers.

GenEval names mmdet's Mask2Former (Swin-S). transformers has Meta's own training of the same
network, so scores are near the published ones, not equal: report the detector with the number. The
decoding here is mmdet's, not ``post_process_instance_segmentation``, which resamples the masks and
paints overlapping ones over each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.errors import OptionError, WeightsError, unknown_name
from steering.recipe import fingerprint
from steering.rewards import checkpoints
from steering.rewards.geneval import CLASSES, PUBLISHED, Box, Objects, Rules
from steering.rewards.images import default_device

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
SIZE, STRIDE = (800, 1333), 32  # mmdet's test size of the shorter and longer side, padding
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of 8-bit RGB
TOP = 100  # detections kept of an image
KINDS = ("mask2former", "detr", "stickers")
# Names that other ports of COCO use for classes of GenEval's list.
_ALIASES: dict[str, str] = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch",
    "pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv",
    "hair dryer": "hair drier", "television": "tv",
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection:
    """A found object: box (x1, y1, x2, y2) in px of its image, mask [H, W] where there is one."""

    name: str
    score: float
    box: Box
    mask: Tensor | None = None


class Detector(Protocol):
    """Finds objects in images.

    Attributes:
        name: for reports.
        classes: what it can find.
        rules: the thresholds its scores are meant for.
    """

    name: str
    classes: frozenset[str]
    rules: Rules

    def detect(self, images: Sequence[Tensor]) -> list[list[Detection]]:
        """Objects of each image [3, H, W] in [0, 1], any sizes, most certain first."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result card must say about it."""
        ...


def by_class(found: Sequence[Detection]) -> Objects:
    """Detections as `steering.rewards.geneval.judge` takes them."""
    objects: dict[str, list[tuple[Box, float]]] = {}
    for d in found:
        objects.setdefault(d.name, []).append((d.box, d.score))
    return objects


class Mask2Former:
    """mmdet's instance decoding on the Mask2Former of transformers.

    The image is scaled (bilinear, no antialiasing, as OpenCV does it) to fit 800 x 1333, and
    padded to multiples of 32. A query's score is its class probability times the mean mask
    probability inside its mask; the best 100 pairs of query and class stay.

    Args:
        model: a Mask2FormerForUniversalSegmentation trained on COCO's things.
        source: where it came from, for reports.
        rules: thresholds; the published ones.
        batch_size: images of one size seen at once.
        size: px of the shorter and the longer side that the image is scaled to fit.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        *,
        source: str = "",
        rules: Rules = PUBLISHED,
        batch_size: int = 4,
        size: tuple[int, int] = SIZE,
    ) -> None:
        self.model, self.source, self.rules = model.eval(), source, rules
        self.batch_size, self.size = batch_size, size
        self.names = class_names(model.config)
        self.classes = frozenset(n for n in self.names if n)
        self.name = "mask2former"

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[list[Detection]]:
        """Objects of each image [3, H, W] in [0, 1]."""
        found: list[list[Detection]] = [[] for _ in images]
        for rows in _batches(images, self.batch_size):
            pixels, inner = mmdet_pixels(torch.stack([images[k] for k in rows]), self.size)
            answer = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
            (h, w), (height, width) = pixels.shape[-2:], images[rows[0]].shape[-2:]
            heads = zip(answer.class_queries_logits, answer.masks_queries_logits, strict=True)
            for k, (classes, masks) in zip(rows, heads, strict=True):
                sizes = (h, w), inner, (height, width)
                found[k] = self._decode(classes.float(), masks.float(), *sizes)
        return found

    def _decode(
        self,
        classes: Tensor,
        masks: Tensor,
        padded: tuple[int, int],
        inner: tuple[int, int],
        size: tuple[int, int],
    ) -> list[Detection]:
        """Detections of one image from logits [q, classes + 1] and [q, h, w].

        The masks go up to the padded input, lose the padding and go on to the image.
        """
        probability = classes.softmax(-1)[:, :-1].flatten()
        top = probability.topk(min(TOP, len(probability))).indices
        # A score is at most its class probability: masks of the others need not be drawn.
        top = top[probability[top] > _least(self.rules)]
        found = []
        for pair in top.tolist():
            query, label = divmod(pair, len(self.names))
            logits = _upsample(masks[query], padded)[: inner[0], : inner[1]]
            logits = _upsample(logits, size)
            mask = logits > 0
            name = self.names[label]
            if name is None or not bool(mask.any()):
                continue
            score = float(probability[pair] * logits.sigmoid()[mask].mean())
            found.append(Detection(name=name, score=score, box=box_of(mask), mask=mask.cpu()))
        return sorted(found, key=lambda d: -d.score)

    def describe(self) -> dict[str, Any]:
        how = f"{self.size[0]}/{self.size[1]} bilinear, pad {STRIDE}; mmdet's decoding; HF weights"
        return _describe(self, how)


class Detr:
    """Any detector of transformers that answers with ``logits`` and ``pred_boxes``.

    Where it has one output more than classes, the last is "no object" and a query has one class
    (DETR, YOLOS); else every pair of query and class has its own probability (Conditional,
    Deformable, DAB, RT-DETR). It sees boxes only, so colours are read with the background.

    Args:
        model: an object detection model of transformers.
        processor: its image processor; None scales and pads as for `Mask2Former`.
        source, rules, batch_size: as for `Mask2Former`.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        processor: Any = None,  # noqa: ANN401
        *,
        source: str = "",
        rules: Rules = PUBLISHED,
        batch_size: int = 4,
    ) -> None:
        self.model, self.processor, self.rules = model.eval(), processor, rules
        self.source, self.batch_size = source, batch_size
        self.names = class_names(model.config)
        self.classes = frozenset(n for n in self.names if n)
        self.name = f"detr ({model.config.model_type})"

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[list[Detection]]:
        """Objects of each image [3, H, W] in [0, 1]."""
        found: list[list[Detection]] = [[] for _ in images]
        for rows in _batches(images, self.batch_size):
            inputs = self._inputs(torch.stack([images[k] for k in rows]))
            answer = self.model(**inputs)
            height, width = images[rows[0]].shape[-2:]
            heads = zip(answer.logits.float(), answer.pred_boxes.float(), strict=True)
            for k, (logits, boxes) in zip(rows, heads, strict=True):
                found[k] = self._decode(logits, boxes, height, width)
        return found

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        if self.processor is not None:
            levels = list((images * 255).round().to(torch.uint8).cpu())
            inputs = dict(self.processor(images=levels, return_tensors="pt"))
        else:
            pixels, (h, w) = mmdet_pixels(images)
            mask = torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.int64)
            mask[:, :h, :w] = 1
            inputs = {"pixel_values": pixels, "pixel_mask": mask}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        return {k: v.to(device) for k, v in inputs.items()}

    def _decode(self, logits: Tensor, boxes: Tensor, height: int, width: int) -> list[Detection]:
        """Detections from logits [q, classes (+ 1)] and boxes [q, 4] (centre, size; relative)."""
        if logits.shape[-1] == len(self.names) + 1:
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)
            queries = torch.arange(len(logits), device=logits.device)
        else:
            scores, pairs = logits.sigmoid().flatten().topk(min(TOP, logits.numel()))
            queries, labels = pairs // logits.shape[-1], pairs % logits.shape[-1]
        cx, cy, w, h = boxes[queries].cpu().unbind(-1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
        corners = (corners.clamp(0, 1) * torch.tensor([width, height, width, height])).tolist()
        found = [
            Detection(name=name, score=score, box=tuple(box))
            for score, label, box in zip(scores.tolist(), labels.tolist(), corners, strict=True)
            if (name := self.names[label]) and score > _least(self.rules)
        ]
        return sorted(found, key=lambda d: -d.score)

    def describe(self) -> dict[str, Any]:
        how = "800/1333 bilinear, pad 32" if self.processor is None else "its own processor"
        return _describe(self, how)


class Stickers:
    """The detector of the sticker world; its scores are meant for one threshold of 0.5."""

    def __init__(self, model: Any = None) -> None:  # noqa: ANN401
        from steering.stickers.grammar import CLASSES as STICKER_CLASSES
        from steering.stickers.judge import MIN_SCORE, StickerJudge

        self.judge = StickerJudge(model)
        self.model, self.source, self.name = self.judge.detector, "stickers", "stickers"
        self.classes = frozenset(STICKER_CLASSES)
        self.rules = Rules(threshold=MIN_SCORE, counting_threshold=MIN_SCORE)

    def detect(self, images: Sequence[Tensor]) -> list[list[Detection]]:
        """Objects of each image [3, H, W] in [0, 1]."""
        from steering.stickers.world import SIZE as SCENE

        out: list[list[Detection]] = [[] for _ in images]
        for rows in _batches(images, self.judge.batch_size):
            height, width = images[rows[0]].shape[-2:]
            sx, sy = width / SCENE, height / SCENE
            for k, objects in zip(
                rows, self.judge.detect(torch.stack([images[k] for k in rows])), strict=True
            ):
                out[k] = [
                    Detection(name=o.name, score=o.score, box=_scaled(o.box, sx, sy))
                    for o in objects
                ]
        return out

    def describe(self) -> dict[str, Any]:
        return _describe(self, "64 px; overlapping detections reduced to the most certain")


def open_detector(spec: str, *, device: str | None = None, rules: Rules | None = None) -> Detector:
    """A detector from "stickers", "mask2former", "mask2former=SOURCE" or "detr=SOURCE".

    A source is a folder or a hub id.

    Raises:
        OptionError: an unknown kind, or classes that are not COCO's.
        WeightsError: weights that cannot be found or read.
    """
    kind, _, source = spec.partition("=")
    if kind not in KINDS:
        raise unknown_name("detector", kind, KINDS)
    device = device or default_device()
    if kind == "stickers":
        from steering.stickers.load import load_detector

        return Stickers(load_detector().to(device))  # type: ignore[arg-type]
    if kind == "detr" and not source:
        raise OptionError("The detector 'detr' needs weights: write detr=FOLDER or detr=HUB_ID.")
    source, chosen = source or MASK2FORMER, rules or PUBLISHED
    with checkpoints.building():
        model, processor = _read(kind, source)
    model = model.to(device).requires_grad_(False)
    if kind == "mask2former":
        return Mask2Former(model, source=source, rules=chosen)
    return Detr(model, processor, source=source, rules=chosen)


def _read(kind: str, source: str) -> tuple[Any, Any]:
    """(model, image processor or None) of a folder or a hub id."""
    from transformers import (
        AutoImageProcessor,
        AutoModelForObjectDetection,
        Mask2FormerForUniversalSegmentation,
    )

    local = Path(source).exists()
    cls = (
        Mask2FormerForUniversalSegmentation
        if kind == "mask2former"
        else AutoModelForObjectDetection
    )
    try:
        opened: Any = cls.from_pretrained(
            source, local_files_only=local, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise WeightsError(
            f"The detector {kind}={source!r} could not be opened ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Where there is a network: hf download "
            f"{_hub_id(kind, source)} --local-dir FOLDER; then give --detector {kind}=FOLDER."
        ) from error
    model, info = opened
    if info["missing_keys"]:
        raise WeightsError(
            f"The weights in {source!r} lack {len(info['missing_keys'])} tensors of a "
            f"{cls.__name__} (first: {sorted(info['missing_keys'])[0]}): they are of another "
            "model, and every score would be zero."
        )
    if kind == "mask2former":
        return model, None
    try:
        return model, AutoImageProcessor.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
    except (OSError, ValueError):
        return model, None


def _hub_id(kind: str, source: str) -> str:
    """What to fetch where a source could not be opened."""
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        return source
    return MASK2FORMER if kind == "mask2former" else "HUB_ID"


def class_names(config: Any) -> tuple[str | None, ...]:  # noqa: ANN401
    """GenEval's name of each output; None for outputs that are none of its classes.

    Eighty outputs are COCO's in their order, whatever their labels are called; other numbers are
    matched by name.

    Raises:
        OptionError: fewer than half of GenEval's classes were recognised.
    """
    labels = config.id2label
    if len(labels) == len(CLASSES) and str(labels[0]).lower() in (CLASSES[0], "label_0"):
        return CLASSES
    known = frozenset(CLASSES)
    plain = [str(labels[k]).lower() for k in range(len(labels))]
    names = [_ALIASES.get(n, n) for n in plain]
    found = tuple(n if n in known else None for n in names)
    if sum(n is not None for n in found) < len(CLASSES) / 2:
        raise OptionError(
            f"This detector knows {len(labels)} classes ({', '.join(plain[:4])}, ...), which are "
            "not COCO's: every verdict would be 'found 0'. Use weights trained on COCO."
        )
    return found


def mmdet_pixels(images: Tensor, size: tuple[int, int] = SIZE) -> tuple[Tensor, tuple[int, int]]:
    """(network input [n, 3, H', W'], (height, width) inside the padding) of images in [0, 1].

    The sides are scaled together until the shorter or the longer one has its ``size``, and
    rounded half up.
    """
    height, width = images.shape[-2:]
    scale = min(size[0] / min(height, width), size[1] / max(height, width))
    inner = (int(height * scale + 0.5), int(width * scale + 0.5))
    levels = (images.float() * 255).round()
    if inner != (height, width):
        levels = F.interpolate(levels, inner, mode="bilinear", align_corners=False).round()
    mean, std = (levels.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    right, below = -inner[1] % STRIDE, -inner[0] % STRIDE
    return F.pad((levels - mean) / std, (0, right, 0, below)), inner


def box_of(mask: Tensor) -> Box:
    """(x1, y1, x2, y2) around the set pixels of [H, W], ends exclusive."""
    ys, xs = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(xs[0]), float(ys[0]), float(xs[-1]) + 1, float(ys[-1]) + 1


def _upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _least(rules: Rules) -> float:
    return min(rules.threshold, rules.counting_threshold)


def _scaled(box: Box, sx: float, sy: float) -> Box:
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


def _batches(images: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    """Indices of images of one size, at most ``size`` at once."""
    groups: dict[Any, list[int]] = {}
    for k, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(k)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _describe(detector: Any, how: str) -> dict[str, Any]:  # noqa: ANN401
    return {
        "name": detector.name,
        "source": detector.source,
        "fingerprint": fingerprint(detector.model),
        "how": how,
        "rules": detector.rules.__dict__,
    }

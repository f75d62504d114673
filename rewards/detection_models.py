"""Open and closed detectors of transformers behind one question: where is what, how surely?

OWL-ViT and OWLv2, Grounding DINO, Mask2Former, and every model of the DETR family. Scores keep
their gradient with respect to the images; boxes do not matter for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError, WeightsError, unknown_name
from steering.rewards import checkpoints


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes:
    """What a detector sees in n images.

    Attributes:
        scores: [n, queries, names], the probability that a query shows a thing of that name.
        corners: [n, queries, 4], (x1, y1, x2, y2) as shares of the image; no gradient.
    """

    scores: Tensor
    corners: Tensor


class Finder:
    """Base of the four kinds.

    Args:
        model: loaded and frozen.
        processor: of the same checkpoint.

    Attributes:
        threshold: score from which a box usually counts.
    """

    threshold = 0.5

    def __init__(self, model: Any, processor: Any) -> None:  # noqa: ANN401
        self.model, self.processor = model, processor

    def find(self, images: Tensor, names: Sequence[str]) -> Boxes:
        """Boxes of things of these names in images [n, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    def _pixels(self, images: Tensor) -> dict[str, Tensor]:
        """The processor's tensors: 8-bit values, with the gradient of the same path on floats."""
        image_side = getattr(self.processor, "image_processor", self.processor)
        levels = [(i.detach().clamp(0, 1) * 255).round().byte() for i in images]
        found = dict(image_side(images=levels, return_tensors="pt"))
        if torch.is_grad_enabled() and images.requires_grad:
            floats = list(images.float().clamp(0, 1))
            smooth = image_side(images=floats, do_rescale=False, return_tensors="pt")
            smooth = smooth["pixel_values"]
            exact = found["pixel_values"].to(smooth.device)
            found["pixel_values"] = exact + (smooth - smooth.detach())
        device, dtype = self.model.device, self.model.dtype
        return {
            k: v.to(device, dtype if v.is_floating_point() else None)
            for k, v in found.items()
            if k in ("pixel_values", "pixel_mask")
        }


class Owl(Finder):
    """OWL-ViT and OWLv2 (Minderer et al., 2022 and 2023); each name is encoded once a call."""

    threshold = 0.2

    def find(self, images: Tensor, names: Sequence[str]) -> Boxes:
        model, n = self.model, len(images)
        base = getattr(model, model.config.model_type)
        with torch.no_grad():
            words = self.processor.tokenizer(
                [f"a photo of a {name}" for name in names],
                padding="max_length",
                max_length=model.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            ).to(model.device)
            text = base.get_text_features(words["input_ids"], words["attention_mask"])
            text = getattr(text, "pooler_output", text)
            text = text / text.norm(dim=-1, keepdim=True)
        maps = model.image_embedder(self._pixels(images)["pixel_values"])[0]
        features = maps.flatten(1, 2)
        logits = model.class_predictor(features, text.expand(n, -1, -1))[0]
        with torch.no_grad():
            corners = _corners(model.box_predictor(features, maps).float())
            if model.config.model_type == "owlv2":  # which pads to a square, right and below
                height, width = images.shape[-2:]
                shares = [max(height, width) / side for side in (width, height)]
                corners = corners * corners.new_tensor(shares * 2)
        return Boxes(scores=logits.float().sigmoid(), corners=corners.clamp(0, 1))


class Grounding(Finder):
    """Grounding DINO (Liu et al., 2023), asked "name. name."; a name scores by its best token."""

    threshold = 0.3

    def find(self, images: Tensor, names: Sequence[str]) -> Boxes:
        text, spans = "", []
        for name in names:
            clean = name.lower().strip().rstrip(".")
            spans.append((len(text), len(text) + len(clean)))
            text += f"{clean}. "
        words = self.processor.tokenizer(
            [text.strip()] * len(images), return_tensors="pt", return_offsets_mapping=True
        )
        offsets = words.pop("offset_mapping")[0].tolist()
        if len(offsets) > self.model.config.max_text_len:
            raise OptionError(
                f"{len(names)} names are more text than this detector reads "
                f"({self.model.config.max_text_len} tokens); ask for fewer at once."
            )
        out = self.model(**words.to(self.model.device), **self._pixels(images))
        scores = out.logits.float().sigmoid()
        columns = []
        for first, last in spans:
            at = [k for k, (a, b) in enumerate(offsets) if first <= a < b <= last]
            columns.append(scores[..., at].amax(-1))
        return Boxes(
            scores=torch.stack(columns, -1), corners=_corners(out.pred_boxes.detach().float())
        )


class Closed(Finder):
    """DETR and its relatives, with a fixed list of names.

    One output more than names means softmax with a last "no object", and a query has one class;
    else every pair of query and name has a probability of its own.
    """

    def find(self, images: Tensor, names: Sequence[str]) -> Boxes:
        out = self.model(**self._pixels(images))
        return Boxes(
            scores=self._named(out.logits.float(), names),
            corners=_corners(out.pred_boxes.detach().float()),
        )

    def _named(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        known = {str(v).lower(): int(k) for k, v in self.model.config.id2label.items()}
        unknown = [name for name in names if name.lower() not in known]
        if unknown:
            raise unknown_name("class of this detector:", unknown[0], known)
        columns = [known[name.lower()] for name in names]
        if logits.shape[-1] == len(known):
            return logits.sigmoid()[..., columns]
        p = logits.softmax(-1)[..., :-1]
        best = p.detach().argmax(-1, keepdim=True)
        return torch.stack([p[..., c] * (best[..., 0] == c) for c in columns], -1)


class Masks(Closed):
    """Mask2Former (Cheng et al., 2022): class probability times the mean inside the mask."""

    def find(self, images: Tensor, names: Sequence[str]) -> Boxes:
        out = self.model(**self._pixels(images))
        masks = out.masks_queries_logits.float()
        inside = (masks > 0).to(masks)
        quality = (masks.sigmoid() * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp_min(1)
        scores = self._named(out.class_queries_logits.float(), names) * quality.unsqueeze(-1)
        return Boxes(scores=scores, corners=_extents(inside))


@checkpoints.kept(2)
def load(source: str, reward: str, precision: str, device: str) -> Finder:
    """The detector of a folder or hub id; the last two stay loaded.

    Raises:
        WeightsError: missing, unreadable or unfitting files.
    """
    import transformers as tf

    dtype = checkpoints.dtype_of(precision, reward)
    needs = ("config.json", checkpoints.WEIGHTS, checkpoints.IMAGES)
    folder = checkpoints.find(source, reward, needs)
    kind = _kind(folder, reward)
    kinds: dict[str, tuple[type[Finder], Any, Any]] = {
        "owlvit": (Owl, tf.AutoModelForZeroShotObjectDetection, tf.AutoProcessor),
        "owlv2": (Owl, tf.AutoModelForZeroShotObjectDetection, tf.AutoProcessor),
        "grounding-dino": (Grounding, tf.AutoModelForZeroShotObjectDetection, tf.AutoProcessor),
        "mm-grounding-dino": (Grounding, tf.AutoModelForZeroShotObjectDetection, tf.AutoProcessor),
        "mask2former": (Masks, tf.AutoModelForUniversalSegmentation, tf.AutoImageProcessor),
    }
    closed = (Closed, tf.AutoModelForObjectDetection, tf.AutoImageProcessor)
    cls, model_cls, processor_cls = kinds.get(kind, closed)
    model = checkpoints.load_model(model_cls, folder, reward, dtype, device)
    return cls(model, checkpoints.load_part(processor_cls, folder, reward))


def _kind(folder: Path, reward: str) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{reward}: {folder}/config.json names no model_type.") from error


def _corners(boxes: Tensor) -> Tensor:
    """(centre, size) to corners, within the image."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1).clamp(0, 1)


def _extents(inside: Tensor) -> Tensor:
    """Corners [n, q, 4] of masks [n, q, h, w]; zero for empty ones."""

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        size = line.shape[-1]
        first = line.argmax(-1)
        last = size - line.flip(-1).argmax(-1)
        return first / size, last / size

    with torch.no_grad():
        (x1, x2), (y1, y2) = ends(inside.amax(-2)), ends(inside.amax(-1))
        corners = torch.stack([x1, y1, x2, y2], -1)
        return corners * inside.amax((-2, -1)).unsqueeze(-1)

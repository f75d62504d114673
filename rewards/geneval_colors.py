"""Colours of found objects, and the scorer that joins detector, colours and rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.errors import OptionError, unknown_name
from steering.rewards.geneval import COLORS, Rules, Verdict, judge
from steering.rewards.geneval_detectors import Detection, Detector, by_class
from steering.rewards.images import default_device
from steering.stickers.grammar import Metadata

GREY = 0x99 / 255  # of the background outside a mask
TEMPLATES = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")


class ColorReader(Protocol):
    """Names the colours of objects."""

    name: str

    def read(self, crops: Sequence[tuple[Tensor, Detection]]) -> list[str]:
        """One of GenEval's ten colours for each (image [3, H, W], object in it)."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result card must say about it."""
        ...


class ClipColors:
    """CLIP zero-shot over ten colours, on the object's box with grey outside its mask.

    The weights are OpenAI's ViT-L/14, which was trained with QuickGELU; a model without it would
    name other colours without any sign of it, and is refused.

    Args:
        model, pretrained: as for the reward `clip`.
        batch_size: crops encoded at once.

    Raises:
        OptionError, WeightsError: as the reward `clip`.
    """

    name = "clip"

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        pretrained: str = "openai",
        *,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        from steering.rewards.clip import Encoder
        from steering.rewards.clip_loading import load

        device = device or default_device()
        self.encoder = Encoder(load(model, pretrained, "fp32", device))
        self.model, self.pretrained, self.batch_size = model, pretrained, batch_size
        self._classifier = cache(self._make_classifier)

    @torch.no_grad()
    def read(self, crops: Sequence[tuple[Tensor, Detection]]) -> list[str]:
        """The colour whose three sentences fit each crop best."""
        out: list[str] = []
        for start in range(0, len(crops), self.batch_size):
            part = crops[start : start + self.batch_size]
            pixels = torch.cat([self.encoder.pixels.fit(crop(*c)[None]) for c in part])
            features = self.encoder.image(pixels.to(self.encoder.device))
            texts = torch.stack([self._classifier(d.name) for _, d in part])
            best = torch.einsum("nd,ncd->nc", features, texts).argmax(-1)
            out += [COLORS[k] for k in best.tolist()]
        return out

    def _make_classifier(self, name: str) -> Tensor:
        """Unit vectors [10, d]: per colour the mean of its sentences' unit vectors."""
        sentences = [t.format(c=c, n=name) for c in COLORS for t in TEMPLATES]
        vectors = self.encoder.text(sentences).view(len(COLORS), len(TEMPLATES), -1)
        return F.normalize(vectors.mean(1), dim=-1)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name, "model": self.model, "pretrained": self.pretrained,
            "how": "zero-shot, 3 templates, masked crops on #999",
        }  # fmt: skip


class StickerColors:
    """The matched filter of the sticker world (`steering.stickers.judge.read_color`)."""

    name = "stickers"

    def read(self, crops: Sequence[tuple[Tensor, Detection]]) -> list[str]:
        """The tint that fits each object best."""
        from steering.stickers.judge import read_color
        from steering.stickers.world import SIZE

        out = []
        for image, found in crops:
            height, width = image.shape[-2:]
            small = image[None].float().cpu()
            if (height, width) != (SIZE, SIZE):
                small = F.interpolate(small, (SIZE, SIZE), mode="bilinear", antialias=True)
            scale = (SIZE / width, SIZE / height) * 2
            box = tuple(v * s for v, s in zip(found.box, scale, strict=True))
            out.append(read_color(small[0].permute(1, 2, 0).numpy(), found.name, box))  # type: ignore[arg-type]
        return out

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "how": "matched filter over ten tints"}


def crop(image: Tensor, found: Detection) -> Tensor:
    """The object's box of an image [3, H, W], grey outside its mask; at least one pixel."""
    height, width = image.shape[-2:]
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, image.new_tensor(GREY))
    x1, y1, x2, y2 = (round(v) for v in found.box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return image[:, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]


def open_colors(spec: str, *, device: str | None = None) -> ColorReader:
    """A colour reader from "stickers", "clip" or "clip=MODEL:PRETRAINED".

    Raises:
        OptionError, WeightsError: an unknown reader, or weights that cannot be had.
    """
    kind, _, source = spec.partition("=")
    if kind not in ("clip", "stickers"):
        raise unknown_name("colour model", kind, ("clip", "stickers"))
    if kind == "stickers":
        return StickerColors()
    if not source:
        return ClipColors(device=device)
    model, colon, pretrained = source.partition(":")
    if not colon:
        raise OptionError(f"--colors {spec!r}: write clip=MODEL:PRETRAINED, or clip alone.")
    return ClipColors(model, pretrained, device=device)


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """One image's verdict, what was found in it, and the colours that were read (by index)."""

    verdict: Verdict
    found: list[Detection]
    colors: dict[int, str] = field(default_factory=dict)


class Scorer:
    """GenEval on batches of images: one detector pass, one pass over all crops, then the rules.

    Args:
        detector, colors: the models.
        rules: thresholds; the detector's own unless given.
    """

    def __init__(
        self, detector: Detector, colors: ColorReader, *, rules: Rules | None = None
    ) -> None:
        self.detector, self.colors = detector, colors
        self.rules = rules or detector.rules

    def check(self, records: Sequence[Metadata]) -> None:
        """Raises where a record asks for a class that the detector cannot find.

        Raises:
            OptionError: names the classes.
        """
        asked = {c["class"] for r in records for c in [*r["include"], *r.get("exclude", ())]}
        lost = sorted(asked - self.detector.classes)
        if lost:
            raise OptionError(
                f"The detector {self.detector.name!r} does not know {', '.join(lost[:8])} "
                f"({len(lost)} of {len(asked)} classes asked for), so such prompts could only "
                "fail. Choose another --detector."
            )

    def judge(self, images: Sequence[Tensor], records: Sequence[Metadata]) -> list[Judged]:
        """A verdict for each image [3, H, W] in [0, 1] with its record."""
        found = self.detector.detect(images)
        wanted = [self._asked(r, f) for r, f in zip(records, found, strict=True)]
        crops = [(images[i], found[i][k]) for i, rows in enumerate(wanted) for k in rows]
        answers = iter(self.colors.read(crops) if crops else ())
        read = [{k: next(answers) for k in rows} for rows in wanted]
        out = []
        for record, objects, colors in zip(records, found, read, strict=True):
            places = _places(objects)
            verdict = judge(
                record,
                by_class(objects),
                lambda name, k, c=colors, p=places: c[p[name][k]],
                rules=self.rules,
            )
            out.append(Judged(verdict=verdict, found=objects, colors=colors))
        return out

    def _asked(self, record: Metadata, objects: Sequence[Detection]) -> list[int]:
        """The detections whose colours the rules ask for: a rehearsal that writes them down."""
        places, asked = _places(objects), []

        def color_of(name: str, k: int) -> str:
            asked.append(places[name][k])
            return ""

        judge(record, by_class(objects), color_of, rules=self.rules)
        return list(dict.fromkeys(asked))


def _places(objects: Sequence[Detection]) -> dict[str, list[int]]:
    """Where the detections of each class stand in the list."""
    places: dict[str, list[int]] = {}
    for i, d in enumerate(objects):
        places.setdefault(d.name, []).append(i)
    return places

"""How many of what are in the picture: counting and presence rewards on any detector."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards import checkpoints, detection_models
from steering.rewards.base import Reward, register
from steering.rewards.images import device_name
from steering.rewards.memory import in_batches
from steering.rewards.networked import Placed, at_work, needs_gradient, put_away
from steering.scoring import Scores

_ITEM = re.compile(r"(?:(\d+)\s+)?(\S.*)")
Wants = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class _Detection(Reward):
    """Options that both rewards share.

    Attributes:
        model: a folder or hub id of OWL-ViT, OWLv2, Grounding DINO, Mask2Former or any detector
            of the DETR family.
        objects: what is wanted, as in "3 apple; dog" (a bare name means one); ``metadata`` goes
            before: a GenEval record with "include", or that list.
        mode: "hard" counts boxes above the threshold; "smooth" is differentiable.
        threshold: of the score; none takes 0.2 (OWL), 0.3 (Grounding DINO), 0.5 (others).
        temperature: of the smooth threshold.
        overlap: boxes of one name that overlap a surer one by more (IoU) do not count; 1 keeps
            all.
        precision, device: of the detector.
        batch_size: images at once; halved for a call whose memory runs out.
        offload: keep the detector on the CPU between calls, unless a gradient is still to come.
    """

    differentiable: ClassVar[bool] = False  # of "hard"; an instance in the other mode has True
    hub_id: ClassVar[str] = "google/owlv2-base-patch16-ensemble (or any other detector)"
    licence: ClassVar[str] = "Apache-2.0 (OWLv2, Grounding DINO, DETR); others: their model card"
    memory: ClassVar[str] = "0.6 GB (OWLv2 base, fp32)"

    model: str = "google/owlv2-base-patch16-ensemble"
    objects: str = ""
    mode: Literal["hard", "smooth"] = "hard"
    threshold: float | None = None
    temperature: float = 0.05
    overlap: float = 0.5
    precision: str = "fp32"
    device: str | None = None
    batch_size: int = 8
    offload: bool = False

    def __post_init__(self) -> None:
        checkpoints.dtype_of(self.precision, self.name)
        object.__setattr__(self, "differentiable", self.mode == "smooth")
        if self.mode not in ("hard", "smooth"):
            raise OptionError(f"{self.name}(mode={self.mode!r}): give hard or smooth.")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise OptionError(f"{self.name}(threshold={self.threshold}): give 0 to 1.")
        if self.temperature <= 0 or not 0 < self.overlap <= 1 or self.batch_size < 1:
            raise OptionError(
                f"{self.name}: temperature must be above 0, overlap in (0, 1], batch_size 1 or "
                "more."
            )
        if self.objects:
            _read(self.objects, self.name)

    def for_model(self, model: Any) -> Any:  # noqa: ANN401
        """This reward, with its weights loaded before any image is made."""
        finder = self._finder(getattr(model, "device", "cpu"))
        if self.offload:
            put_away(finder)
        return self

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Values [n]; images that want the same things go through the detector together."""
        finder = self._finder(images.device)
        wants = [self._wants(metadata[k] if metadata is not None else None, p)
                 for k, p in enumerate(prompts)]  # fmt: skip
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        net = Placed(model=finder.model, device=self._place(images.device))
        follows = self.mode == "smooth" and needs_gradient(images)
        with at_work(net, offload=self.offload and not follows):
            for want in dict.fromkeys(wants):
                mine = [k for k, w in enumerate(wants) if w == want]

                def found(part: slice, mine: list[int] = mine, want: Wants = want) -> list[Any]:
                    return self._batch(finder, images[mine[part]].to(net.device), want)

                parts = in_batches(found, len(mine), self.batch_size, self.name)
                rows.update(zip(mine, itertools.chain(*parts), strict=True))
        value = torch.stack([rows[k][0] for k in range(len(images))]).to(images.device)
        names = list(dict.fromkeys(name for want in wants for name, _ in want))
        parts = {name: torch.full((len(images),), torch.nan) for name in names}
        for k, want in enumerate(wants):
            for (name, _), count in zip(want, rows[k][1].tolist(), strict=True):
                parts[name][k] = count
        return Scores(value=value, parts={k: v.to(images.device) for k, v in parts.items()})

    def _batch(
        self, finder: detection_models.Finder, images: Tensor, want: Wants
    ) -> list[tuple[Tensor, Tensor]]:
        """(value, counts per name) of each image."""
        names = [name for name, _ in want]
        target = torch.tensor([float(n) for _, n in want])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode == "smooth"):
            found = finder.find(images, names)
            found_rows = zip(found.scores, found.corners, strict=True)
            out = []
            for scores, corners in found_rows:
                kept = [self._kept(scores, corners, c) for c in range(len(names))]
                threshold = self.threshold or finder.threshold
                counts = torch.stack([self._count(s, threshold) for s in kept])
                value = self._value(kept, counts, target.to(counts), threshold)
                out.append((value, counts.detach().cpu()))
        return out

    def _kept(self, scores: Tensor, corners: Tensor, column: int) -> Tensor:
        """Scores of one name, surest first, after suppressing what overlaps a surer box.

        A query counts for the name it fits best.
        """
        best = scores.detach().argmax(-1) == column
        mine, boxes = scores[best, column], corners[best]
        if self.overlap < 1:
            from torchvision.ops import nms

            return mine[nms(boxes, mine.detach(), self.overlap)]
        return mine.sort(descending=True).values

    def _count(self, scores: Tensor, threshold: float) -> Tensor:
        if self.mode == "hard":
            return (scores > threshold).sum().float()
        return ((scores - threshold) / self.temperature).sigmoid().sum()

    def _value(
        self, kept: list[Tensor], counts: Tensor, target: Tensor, threshold: float
    ) -> Tensor:
        raise NotImplementedError

    def _finder(self, device: torch.device | str) -> detection_models.Finder:
        where = str(self._place(device))
        return detection_models.load(self.model, self.name, self.precision, where)

    def _place(self, device: torch.device | str) -> torch.device:
        return torch.device(device_name(self.device or device))

    def _wants(self, extra: Any, prompt: Any) -> Wants:  # noqa: ANN401
        include = extra.get("include") if isinstance(extra, dict) else extra
        if include:
            try:
                wants = tuple((str(i["class"]), int(i.get("count", 1))) for i in include)
                if all(n > 0 for _, n in wants):
                    return wants
                raise ValueError("a count below 1")
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise OptionError(
                    f"{self.name}: metadata must be a GenEval record, "
                    '{"include": [{"class": "apple", "count": 3}]}; got '
                    f"{str(extra)[:100]}."
                ) from error
        if not self.objects:
            raise OptionError(
                f"{self.name} does not guess from the prompt {str(prompt)[:60]!r} what to look "
                f"for: give {self.name}(objects='3 apple; dog') or metadata with \"include\"."
            )
        return _read(self.objects, self.name)


@register("count")
@dataclass(frozen=True, kw_only=True)
class Count(_Detection):
    """Minus the distance between wanted and found numbers of things, summed over the things.

    "hard" compares the boxes above the threshold; "smooth" the sum over boxes of
    ``sigmoid((score - threshold) / temperature)``, which has a gradient. With ``power=2`` this is
    the counting reward of rejection-based forcing for flows (RBF; Kim et al., 2025).

    Parts: one per name, the number found.

    Attributes:
        power: of the distance, 1 or 2.
    """

    value_range: ClassVar[str] = "0 and below"

    power: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power not in (1, 2):
            raise OptionError(f"count(power={self.power}): give 1 or 2.")

    def _value(
        self, kept: list[Tensor], counts: Tensor, target: Tensor, threshold: float
    ) -> Tensor:
        return -((counts - target).abs() ** self.power).sum()


@register("presence")
@dataclass(frozen=True, kw_only=True)
class Presence(_Detection):
    """Whether all wanted things are there, each at least as often as wanted.

    "hard" gives 1 or 0; "smooth" the score of the least sure box that is needed (0 where there
    are too few boxes), which has a gradient.

    Parts: one per name, the number found.
    """

    value_range: ClassVar[str] = "0 to 1"

    def _value(
        self, kept: list[Tensor], counts: Tensor, target: Tensor, threshold: float
    ) -> Tensor:
        if self.mode == "hard":
            return (counts >= target).all().float()
        needed = []
        for scores, number in zip(kept, target.int().tolist(), strict=True):
            needed.append(scores[number - 1] if len(scores) >= number else counts.new_zeros(()))
        return torch.stack(needed).amin()


def _read(text: str, reward: str) -> Wants:
    """ "3 apple; dog" as (("apple", 3), ("dog", 1))."""
    found = [_ITEM.fullmatch(item.strip()) for item in text.split(";") if item.strip()]
    wants = tuple((m[2], int(m[1] or 1)) for m in found if m)
    if not wants or any(n < 1 for _, n in wants) or len({k for k, _ in wants}) < len(wants):
        raise OptionError(
            f"{reward}(objects={text!r}): name each thing once, as in '3 apple; dog'."
        )
    return wants

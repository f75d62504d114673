"""How different the pictures of one prompt are, so that a search that collapses is seen.

`mean_distance` and `vendi` take features; the reward `diversity` gives each picture its own share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards import checkpoints
from steering.rewards.base import register
from steering.rewards.calibration import groups
from steering.rewards.clip import Encoder, _encoder
from steering.rewards.clip_loading import Loaded, load
from steering.rewards.memory import in_batches
from steering.rewards.networked import Networked, Pooled, at_work, needs_gradient, no_text
from steering.rewards.pixels import PixelSpec
from steering.scoring import Scores

_DINO = "facebook/dinov2-base"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Features(Networked):
    """Base of rewards that compare image features with each other.

    Attributes:
        features: "clip" (what is shown) or "dino" (also how it looks).
        model: an open_clip name for "clip", a folder or hub id of a DINOv2 or v3 for "dino".
        pretrained: open_clip tag, file or folder, for "clip".
    """

    differentiable: ClassVar[bool] = True
    video: ClassVar[str] = "whole"
    licence: ClassVar[str] = "Apache-2.0 (DINOv2), MIT (CLIP)"
    hub_id: ClassVar[str] = _DINO
    memory: ClassVar[str] = "0.35 GB (DINOv2 base, fp32)"

    features: Literal["clip", "dino"] = "dino"
    model: str = ""
    pretrained: str = "openai"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features not in ("clip", "dino"):
            raise OptionError(f"{self.name}(features={self.features!r}): give clip or dino.")

    def _load(self, where: str) -> Encoder:
        if self.features == "dino":
            return dino(self.model or _DINO, self.precision, where, self.name)
        model = self.model or "ViT-L-14-quickgelu"
        return _encoder(load(model, self.pretrained, self.precision, where))

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors float32 [n, d] of images [n, 3, H, W], in micro-batches."""
        net = self._ready(images.device)
        with at_work(net, offload=self.offload and not needs_gradient(images)):
            found = in_batches(
                lambda rows: net.image(images[rows].to(net.device)),
                len(images),
                self.batch_size,
                self.name,
            )
        return torch.cat(found).to(images.device)


@register("diversity")
@dataclass(frozen=True, kw_only=True)
class Diversity(Features):
    """Mean cosine distance of a picture to the others of its prompt, 0 where it is alone.

    The mean over a prompt's pictures is their mean pairwise distance. A picture is never compared
    with itself, nor with those of another prompt. A video counts by the mean of its frames'
    features. (FK steering reports squared distances of unit vectors: twice this number.)
    """

    value_range: ClassVar[str] = "0 to 2, mostly below 0.8"
    stationary: ClassVar[bool] = False

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Distances [n], and with how many others each was compared."""
        if images.ndim == 5:
            frames = self.embed(images.flatten(0, 1)).view(*images.shape[:2], -1)
            found = torch.nn.functional.normalize(frames.mean(1), dim=-1)
        else:
            found = self.embed(images)
        value, others = found.new_zeros(len(found)), found.new_zeros(len(found))
        for rows in groups(prompts, len(found)):
            rows = rows.to(found.device)
            value = value.index_copy(0, rows, distances(found[rows]))
            others[rows] = float(len(rows) - 1)
        return Scores(value=value, parts={"others": others})


def distances(features: Tensor) -> Tensor:
    """Mean cosine distance [n] of each unit vector [n, d] to the others; 0 for one alone."""
    n = len(features)
    if n < 2:
        return (features * 0).sum(-1)
    cosines = features @ features.T
    others = cosines.sum(1) - cosines.diagonal()
    return 1 - others / (n - 1)


def mean_distance(features: Tensor) -> float:
    """Mean pairwise cosine distance of unit vectors [n, d], over pairs of different rows."""
    return float(distances(features.detach().float()).mean())


def vendi(features: Tensor) -> float:
    """Effective number of different pictures, 1 to n (Friedman and Dieng, 2023).

    The exponential of the entropy of the eigenvalues of the cosine matrix over n.
    """
    x = features.detach().double()
    values = torch.linalg.eigvalsh(x @ x.T / len(x)).clamp(min=0)
    values = values[values > 1e-12]
    return float(torch.exp(-(values * values.log()).sum()))


class _Crop:
    """DINO's evaluation pixels: shorter side to 8/7 of the size, centre, ImageNet's mean."""

    def __init__(self, size: int) -> None:
        self.size, self.outer = size, PixelSpec(size=round(size * 8 / 7))

    def apply(self, images: Tensor) -> Tensor:
        x = self.outer.fit(images)
        edge = (x.shape[-1] - self.size) // 2
        x = x[..., edge : edge + self.size, edge : edge + self.size]
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        return (x - mean) / std


@checkpoints.kept(2)
def dino(source: str, precision: str, device: str, reward: str) -> Encoder:
    """A DINO image tower: the normalised CLS token, at 224 pixels."""
    from transformers import AutoModel

    folder = checkpoints.find(source, reward, ["config.json", checkpoints.WEIGHTS])
    dtype = checkpoints.dtype_of(precision, reward)
    net = checkpoints.load_model(AutoModel, folder, reward, dtype, device)
    loaded = Loaded(
        model=Pooled(net), tokenizer=no_text, preprocess={}, device=torch.device(device),
        dtype=dtype,
    )  # fmt: skip
    encoder = Encoder(loaded, reward)
    patch = int(getattr(net.config, "patch_size", 14))
    encoder.pixels = _Crop(min(224, int(net.config.image_size)) // patch * patch)
    return encoder

"""LAION's aesthetic scores: one affine map on a normalised image embedding.

The published heads (v1: one layer; v2 and v2.5: five layers with dropout and no activation between
them) are affine maps, so they are folded into one vector and one number when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError, WeightsError
from steering.rewards import checkpoints
from steering.rewards.base import register
from steering.rewards.clip import Encoder, _encoder
from steering.rewards.clip_loading import Loaded, load
from steering.rewards.networked import Networked, Pooled, find_file, no_text, read_state

_HEAD_V2 = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
_FILES = {
    "v1": "sa_0_4_vit_l_14_linear.pth",
    "v2": "sac+logos+ava1-l14-linearMSE.pth",
    "v2.5": "aesthetic_predictor_v2_5.pth",
}
_SIGLIP = "google/siglip-so400m-patch14-384"
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(weight|bias)$")


@register("aesthetic")
@dataclass(frozen=True, kw_only=True)
class Aesthetic(Networked):
    """LAION aesthetic score: how much people would like the look of the picture, 1 to 10.

    ``v2`` (sac+logos+ava1-l14-linearMSE) is the score that papers mean. ``v1`` heads
    (sa_0_4_vit_*_linear) are one linear layer; give the encoder that fits. ``v2.5``
    (discus0434) sits on SigLIP and its weights are AGPL-3.0: only by your own path.

    The map is affine and unbounded: away from photographs, and so under gradients, it goes to any
    height. Hold another reward out.

    Attributes:
        version: "v1", "v2" or "v2.5".
        head: file, folder or hub id of the head. v2 finds it on the hub; v1 and v2.5 need yours.
        model: of the encoder: an open_clip name (v1, v2) or a SigLIP folder or hub id (v2.5).
        pretrained: open_clip tag, file or folder of the encoder (v1, v2).

    Raises:
        OptionError: no head for v1 or v2.5, or a head made for another encoder.
        WeightsError: weights that are missing or unreadable, or a head with activations.
    """

    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "Apache-2.0 (v2 head), MIT (v1 heads, encoder), AGPL-3.0 (v2.5 head)"
    hub_id: ClassVar[str] = _HEAD_V2[0]
    value_range: ClassVar[str] = "about 4.5 to 7 on pictures; unbounded"
    memory: ClassVar[str] = "1.7 GB (ViT-L/14, fp32)"

    version: Literal["v1", "v2", "v2.5"] = "v2"
    head: str = ""
    model: str = ""
    pretrained: str = "openai"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in _FILES:
            raise OptionError(f"aesthetic(version={self.version!r}): give {', '.join(_FILES)}.")
        if self.version == "v1" and not self.head:
            raise OptionError(
                "aesthetic(version=v1) needs head=/path/to/sa_0_4_vit_l_14_linear.pth, from "
                "https://github.com/LAION-AI/aesthetic-predictor (MIT); it is on no hub."
            )
        if self.version == "v2.5" and not self.head:
            raise OptionError(
                "aesthetic(version=v2.5) needs head=/path/to/aesthetic_predictor_v2_5.pth. It is "
                "never fetched for you, because its licence is AGPL-3.0: read it, then take the "
                "file from https://github.com/discus0434/aesthetic-predictor-v2-5."
            )

    def _load(self, where: str) -> Scorer:
        source, name = (self.head, _FILES[self.version]) if self.head else _HEAD_V2
        path = find_file(source, name, self.name, "head")
        model = self.model or ("ViT-L-14-quickgelu" if self.version != "v2.5" else _SIGLIP)
        if self.version == "v2.5":
            encoder = siglip(model, self.precision, where)
        else:
            encoder = _encoder(load(model, self.pretrained, self.precision, where))
        return _scorer(encoder, path)

    def _values(self, net: Scorer, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return net.values(images)


class Scorer:
    """An encoder with the affine map on its unit vectors."""

    def __init__(self, encoder: Encoder, weight: Tensor, bias: Tensor) -> None:
        self.encoder, self.model, self.device = encoder, encoder.model, encoder.device
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)

    def values(self, images: Tensor) -> Tensor:
        features = self.encoder.image(images)
        if features.shape[1] != len(self.weight):
            raise OptionError(
                f"aesthetic: the head takes embeddings of {len(self.weight)} numbers and this "
                f"encoder gives {features.shape[1]}. Heads of 768 belong to ViT-L/14, of 512 to "
                "ViT-B/32 or B/16 (their file names say which), of 1152 to SigLIP so400m (v2.5)."
            )
        return features @ self.weight + self.bias


@checkpoints.kept(8)
def _scorer(encoder: Encoder, path: Path) -> Scorer:
    weight, bias = collapse(read_state(path, "aesthetic"), str(path))
    return Scorer(encoder, weight, bias)


def collapse(state: dict[str, Tensor], where: str = "head") -> tuple[Tensor, Tensor]:
    """(weight [d], bias []) float32 of a head without activations, multiplied out in float64.

    Args:
        state: ``weight`` and ``bias`` of one layer, or ``...N.weight`` and ``...N.bias`` of
            several in the order of N.

    Raises:
        WeightsError: layers that do not fit each other, no single output, or a gap in N that only
            an activation between the layers explains.
    """
    layers = _layers(state, where)
    numbers = [number for number, _, _ in layers]
    if any(b - a > 2 for a, b in pairwise(numbers)):
        raise WeightsError(
            f"aesthetic: {where} has activations between its layers (numbered {numbers}), so it "
            "is no affine map; take the linear head, sac+logos+ava1-l14-linearMSE.pth."
        )
    _, weight, bias = layers[0]
    for number, after, shift in layers[1:]:
        if after.shape[1] != weight.shape[0]:
            raise WeightsError(
                f"aesthetic: layer {number} of {where} does not fit the one before."
            )
        weight, bias = after @ weight, after @ bias + shift
    if weight.shape[0] != 1:
        raise WeightsError(f"aesthetic: {where} has {weight.shape[0]} outputs instead of one.")
    return weight[0].float(), bias[0].float()


def _layers(state: dict[str, Tensor], where: str) -> list[tuple[int, Tensor, Tensor]]:
    if {"weight", "bias"} == set(state):
        return [(0, state["weight"].double(), state["bias"].double())]
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _LAYER.search(key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value.double()
    if not found or any(len(entry) != 2 or entry["weight"].ndim != 2 for entry in found.values()):
        raise WeightsError(
            f"aesthetic: {where} is no aesthetic head; it holds {', '.join(list(state)[:4])}..."
        )
    return [(n, found[n]["weight"], found[n]["bias"]) for n in sorted(found)]


@checkpoints.kept(2)
def siglip(source: str, precision: str, device: str) -> Encoder:
    """The SigLIP image tower behind v2.5 (pooled output; both sides scaled to 384)."""
    from transformers import SiglipVisionModel

    folder = checkpoints.find(source, "aesthetic", ["config.json", checkpoints.WEIGHTS])
    dtype = checkpoints.dtype_of(precision, "aesthetic")
    net = checkpoints.load_model(SiglipVisionModel, folder, "aesthetic", dtype, device)
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = {"size": net.config.image_size, "resize_mode": "squash", **half}
    return Encoder(
        Loaded(
            model=Pooled(net),
            tokenizer=no_text,
            preprocess=config,
            device=torch.device(device),
            dtype=dtype,
        ),
        "aesthetic",
    )

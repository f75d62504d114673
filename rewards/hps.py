"""Human Preference Score v2 and v2.1 (Wu et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.errors import OptionError, unknown_name
from steering.rewards.base import register
from steering.rewards.checkpoints import dtype_of, kept
from steering.rewards.clip import Encoder
from steering.rewards.clip_loading import Loaded
from steering.rewards.images import need_text
from steering.rewards.networked import Networked, fill, find_file, read_state
from steering.rewards.pixels import CLIP_MEAN, CLIP_STD, eight_bit

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@register("hps")
@dataclass(frozen=True, kw_only=True)
class HPS(Networked):
    """Human Preference Score: cosine of a ViT-H/14 CLIP tuned on ranked pictures.

    Values of v2 and v2.1 cannot be compared with each other. Tables print ``scale=100``.

    Attributes:
        version: "v2.1" or "v2".
        model: weights file, folder or hub id.
        architecture: name of it in open_clip.
        antialias: of the resize. True is what torchvision does since 0.17; numbers published
            before were made without, on visibly different pixels.
        scale: factor on the cosine.
    """

    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "Apache-2.0"
    hub_id: ClassVar[str] = "xswu/HPSv2"
    value_range: ClassVar[str] = "about 0.2 to 0.35 at scale 1"
    memory: ClassVar[str] = "3.9 GB (ViT-H/14, fp32)"

    version: Literal["v2", "v2.1"] = "v2.1"
    model: str = "xswu/HPSv2"
    architecture: str = "ViT-H-14"
    antialias: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in FILES:
            raise OptionError(f"hps(version={self.version!r}): give {' or '.join(FILES)}.")

    def _load(self, where: str) -> Encoder:
        return _hps(self.model, self.version, self.architecture, self.precision, where)

    def _values(self, net: Encoder, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        pixels = author_pixels(images, net.pixels.target[0], antialias=self.antialias)
        text = net.text(need_text(prompts, self.name))
        return self.scale * (net.embed(pixels) * text).sum(-1)


def author_pixels(images: Tensor, size: int = 224, *, antialias: bool = True) -> Tensor:
    """Normalised pixels [n, 3, size, size], by the authors' own transform; differentiable.

    It resizes the float tensor of an 8-bit picture in one pass, the longer side to ``size``, keeps
    the overshoot of the filter, and pads with black before the normalisation. So here, unlike for
    other CLIPs, the float path is the exact one.
    """
    exact = eight_bit(images)
    height, width = images.shape[-2:]
    ratio = size / max(height, width)
    new = (round(height * ratio), round(width * ratio))
    if (height, width) == new:
        resized = exact
    else:
        with torch.autocast(images.device.type, enabled=False):
            resized = F.interpolate(
                exact.float(), new, mode="bicubic", align_corners=False, antialias=antialias
            )
    more_h, more_w = size - new[0], size - new[1]
    left, top = more_w // 2, more_h // 2
    square = F.pad(resized, (left, more_w - left, top, more_h - top))
    mean, std = (square.new_tensor(v).view(-1, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (square - mean) / std


@kept(2)
def _hps(source: str, version: str, architecture: str, precision: str, device: str) -> Encoder:
    import open_clip

    if architecture not in open_clip.list_models():
        raise unknown_name("open_clip model", architecture, open_clip.list_models())
    path = find_file(source, FILES[version], "hps")
    state = read_state(path, "hps")
    net = open_clip.create_model(architecture, pretrained=None, precision=precision, device=device)
    fill(net, state, path, "hps")
    size = net.visual.image_size
    return Encoder(
        Loaded(
            model=net.eval().requires_grad_(False),
            tokenizer=open_clip.get_tokenizer(architecture),
            preprocess={"size": size[0] if isinstance(size, tuple) else size},
            device=torch.device(device),
            dtype=dtype_of(precision, "hps"),
        ),
        "hps",
    )

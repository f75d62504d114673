"""PickScore: which of two pictures people pick for a prompt (Kirstain et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.rewards import checkpoints
from steering.rewards.base import register
from steering.rewards.clip import Encoder
from steering.rewards.clip_loading import Loaded
from steering.rewards.images import need_text
from steering.rewards.networked import Networked, as_features
from steering.rewards.pixels import CLIP_MEAN, CLIP_STD


@register("pickscore")
@dataclass(frozen=True, kw_only=True)
class PickScore(Networked):
    """PickScore: ``exp(logit_scale) * cos`` of a ViT-H/14 CLIP tuned on human choices.

    The softmax of the values of one prompt's images is the model's probability of each being
    picked, so a difference of 1 means odds of e.

    Attributes:
        model: folder or hub id of the weights.
        tokenizer: folder or hub id of the tokenizer; by default ``model`` where it has one.
        scale: a further factor; ``1/26`` gives the unit that some training code uses.
    """

    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "MIT (code); weights: their model card"
    hub_id: ClassVar[str] = "yuvalkirstain/PickScore_v1"
    value_range: ClassVar[str] = "about 17 to 24"
    memory: ClassVar[str] = "3.9 GB (ViT-H/14, fp32)"

    model: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = ""
    scale: float = 1.0

    def _load(self, where: str) -> Encoder:
        return clip_towers(self.model, self.tokenizer, self.precision, where, self.name)

    def _values(self, net: Encoder, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        cosines = (net.image(images) * net.text(need_text(prompts, self.name))).sum(-1)
        return self.scale * net.model.logit_scale.exp() * cosines


@checkpoints.kept(2)
def clip_towers(source: str, tokenizer: str, precision: str, device: str, reward: str) -> Encoder:
    """Image and text towers of a transformers ``CLIPModel``; the last two stay loaded.

    Raises:
        WeightsError: missing or unreadable weights or tokenizer.
    """
    from transformers import AutoTokenizer, CLIPModel

    folder = checkpoints.find(source, reward, ["config.json", checkpoints.WEIGHTS])
    words = _tokenizer_folder(folder, tokenizer, reward)
    dtype = checkpoints.dtype_of(precision, reward)
    net = checkpoints.load_model(CLIPModel, folder, reward, dtype, device)
    room = net.config.text_config.max_position_embeddings
    size = net.config.vision_config.image_size
    return Encoder(
        Loaded(
            model=Towers(net, _logit_scale(folder, net).to(device)),
            tokenizer=Tokens(checkpoints.load_part(AutoTokenizer, words, reward), room),
            preprocess={"size": size, "mean": CLIP_MEAN, "std": CLIP_STD},
            device=torch.device(device),
            dtype=dtype,
        ),
        reward,
    )


def _logit_scale(folder: Path, net: Any) -> Tensor:  # noqa: ANN401
    """As the file has it: in bf16 its exponential would be 1 % off, in every value."""
    from safetensors import safe_open

    for path in checkpoints.shards(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if "logit_scale" in file.keys():
                    return file.get_tensor("logit_scale").float()
    return net.logit_scale.float()


def _tokenizer_folder(folder: Path, tokenizer: str, reward: str) -> Path:
    """The checkpoint holds the tokenizer, or the model it was tuned from does."""
    if not tokenizer and any((folder / name).is_file() for name in checkpoints.TOKENIZER):
        return folder
    source = tokenizer or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    return checkpoints.find(source, f"{reward} (tokenizer)", [checkpoints.TOKENIZER])


class Towers(torch.nn.Module):
    """A ``CLIPModel`` with the two calls that an `Encoder` makes."""

    def __init__(self, net: Any, logit_scale: Tensor) -> None:  # noqa: ANN401
        super().__init__()
        self.net, self.logit_scale = net, logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        return as_features(self.net.get_image_features(pixel_values=pixels))

    def encode_text(self, tokens: Any) -> Tensor:  # noqa: ANN401
        return as_features(self.net.get_text_features(**tokens))


class Tokens:
    """A transformers tokenizer, cut and padded to what the text tower reads."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:  # noqa: ANN401
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Any:  # noqa: ANN401
        found = self.tokenizer(
            texts,
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        found.pop("token_type_ids", None)
        return found

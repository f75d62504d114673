"""ImageReward on stock transformers BLIP classes (Xu et al., 2023)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import WeightsError
from steering.rewards import checkpoints
from steering.rewards.aesthetic import collapse
from steering.rewards.base import register
from steering.rewards.images import need_text
from steering.rewards.networked import Networked, fill, find_file, read_state
from steering.rewards.pixels import PixelSpec

MEAN, STD = 0.16717362830052426, 1.0333394966054072
ROOM = 35
_HEAD_WIDTH = 64  # of one attention head, in ViT-L and in BERT; no tensor of the file tells it


@register("imagereward")
@dataclass(frozen=True, kw_only=True)
class ImageReward(Networked):
    """ImageReward: a BLIP that reads the picture with the prompt, tuned on human rankings.

    The value is standardised over the authors' data and is relative to its prompt. The text reads
    35 tokens; a longer prompt is cut, with a warning. Picture and text meet inside the text
    encoder, so only the tokens of a prompt can be kept, no features.

    Attributes:
        model: ImageReward.pt, a folder that holds it, or a hub id.
        tokenizer: folder or hub id of BERT's uncased word pieces.
    """

    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "Apache-2.0"
    hub_id: ClassVar[str] = "THUDM/ImageReward"
    value_range: ClassVar[str] = "about -2 to 2"
    memory: ClassVar[str] = "1.8 GB (fp32)"

    model: str = "THUDM/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"

    def _load(self, where: str) -> Blip:
        return _blip(self.model, self.tokenizer, self.precision, where)

    def _values(self, net: Blip, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return net.values(images, need_text(prompts, self.name))


class Blip:
    """The two towers and the affine head."""

    def __init__(self, towers: Towers, head: tuple[Tensor, Tensor], tokenizer: Any) -> None:  # noqa: ANN401
        self.model, self.tokenizer = towers, tokenizer
        self.device = next(towers.parameters()).device
        self.dtype = next(towers.parameters()).dtype
        self.weight, self.bias = (part.to(self.device) for part in head)
        self.pixels = PixelSpec(size=towers.vision.config.image_size)
        self._tokens: dict[str, Tensor] = {}

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Standardised rewards float32 [n]."""
        seen = self.model.vision(pixel_values=self.pixels.apply(images).to(self.dtype))
        ids = torch.stack([self.tokens(p) for p in prompts]).to(self.device)
        # The layers with cross-attention exist in a decoder only; the attention is an encoder's.
        read = self.model.text(
            input_ids=ids,
            attention_mask=(ids != self.tokenizer.pad_token_id).long(),
            encoder_hidden_states=seen.last_hidden_state,
            is_decoder=False,
        )
        logit = read.last_hidden_state[:, 0].float() @ self.weight + self.bias
        return (logit - MEAN) / STD

    def tokens(self, prompt: str) -> Tensor:
        """Token ids [35] of a prompt, kept."""
        if prompt not in self._tokens:
            length = len(self.tokenizer(prompt)["input_ids"])
            if length > ROOM:
                warnings.warn(
                    f"imagereward reads {ROOM} tokens and this prompt has {length}; the rest is "
                    f"not scored: {prompt[:60]!r}...",
                    stacklevel=2,
                )
            if len(self._tokens) >= 4096:
                self._tokens.clear()
            found = self.tokenizer(
                prompt, padding="max_length", truncation=True, max_length=ROOM, return_tensors="pt"
            )
            self._tokens[prompt] = found["input_ids"][0]
        return self._tokens[prompt]


class Towers(torch.nn.Module):
    """BLIP's ViT and its text encoder with cross-attention, sized by a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        positions, width = state["vision.embeddings.position_embedding"].shape[1:]
        patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_count(state, r"vision\.encoder\.layers\.(\d+)\."),
                num_attention_heads=width // _HEAD_WIDTH,
                image_size=patch * math.isqrt(positions - 1),
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        words, hidden = state["text.embeddings.word_embeddings.weight"].shape
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words,
                hidden_size=hidden,
                encoder_hidden_size=width,
                intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_count(state, r"text\.encoder\.layer\.(\d+)\."),
                num_attention_heads=hidden // _HEAD_WIDTH,
                max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[
                    0
                ],
                layer_norm_eps=1e-12,
                is_decoder=True,
            ),
            add_pooling_layer=False,
        )


@checkpoints.kept(2)
def _blip(source: str, tokenizer: str, precision: str, device: str) -> Blip:
    from transformers import AutoTokenizer

    path = find_file(source, "ImageReward.pt", "imagereward")
    words = checkpoints.find(tokenizer, "imagereward (tokenizer)", [checkpoints.TOKENIZER])
    state, head = rename(read_state(path, "imagereward"), path)
    towers = Towers(state)
    fill(towers, state, path, "imagereward")
    dtype = checkpoints.dtype_of(precision, "imagereward")
    towers = towers.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Blip(towers, head, checkpoints.load_part(AutoTokenizer, words, "imagereward"))


_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)


def rename(
    state: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The authors' keys as `Towers` has them, and the head as one affine map.

    Raises:
        WeightsError: the file is no ImageReward checkpoint.
    """
    found: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("mlp."):
            head[key] = value
        elif key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, to in _VISION:
                name = re.sub(pattern, to, name)
            found[f"vision.{name}"] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            found[f"text.{key.removeprefix('blip.text_encoder.')}"] = value
    needed = ("vision.embeddings.class_embedding", "text.embeddings.word_embeddings.weight")
    if not head or any(key not in found for key in needed):
        raise WeightsError(
            f"imagereward: {path} is no ImageReward checkpoint; it holds "
            f"{', '.join(list(state)[:3])}."
        )
    return found, collapse(head, str(path))


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(pattern, key)))

"""CLIPScore with any open_clip model: how well an image fits its text."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from steering.rewards.base import register
from steering.rewards.images import need_text
from steering.rewards.networked import Networked
from steering.rewards.pixels import PixelSpec
from steering.scoring import Scores

if TYPE_CHECKING:
    from steering.rewards.clip_loading import Loaded

STICKERS = "stickers"
_CACHED_PROMPTS = 4096


@register("clip")
@dataclass(frozen=True, kw_only=True)
class Clip(Networked):
    """Cosine of image and text in an open_clip model (CLIPScore; Hessel et al., 2021).

    The value is ``scale * cos``, unclipped, so that images which fit badly still have a gradient.
    ``scale=100`` gives the unit of most tables, ``scale=2.5`` Hessel's. Scores of different
    models or scales cannot be compared: always report the spec with the number.

    On the embedded sticker model a reward without ``model`` and ``pretrained`` becomes
    ``clip(model=stickers)``, which was trained on its pictures.

    Attributes:
        model: a name open_clip knows, "hf-hub:owner/name", "local-dir:folder" or "stickers".
        pretrained: a tag of that model, a weights file, or a folder with open_clip_config.json
            (which then also says the architecture).
        scale: factor on the cosine.

    Raises:
        OptionError: an unknown model or tag, or a tag trained with another activation than the
            model has (QuickGELU); both before any weights are read.
        WeightsError: weights that cannot be found or read.
    """

    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "MIT (code and OpenAI weights; other weights: their model card)"
    hub_id: ClassVar[str] = "timm/vit_large_patch14_clip_224.openai (default)"
    value_range: ClassVar[str] = "about 0.15 to 0.4 at scale 1"
    memory: ClassVar[str] = "1.7 GB (ViT-L/14, fp32)"

    model: str = "ViT-L-14-quickgelu"
    pretrained: str = "openai"
    scale: float = 1.0

    def for_model(self, model: Any) -> Clip:  # noqa: ANN401
        """This reward for images of `model`, with its weights loaded before any image is made."""
        bare = (self.model, self.pretrained) == (Clip.model, Clip.pretrained)
        adapted = self
        if bare and str(getattr(model, "name", "")).startswith(STICKERS):
            adapted = replace(self, model=STICKERS)
        return super(Clip, adapted).for_model(model)

    @property
    def spread(self) -> float | None:
        """Measured for the sticker CLIP on samples of the sticker model, 12 held-out prompts."""
        return abs(self.scale) * 0.1 if self.model == STICKERS else None

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor | Scores:
        """``scale * cos`` [n] on the images' device."""
        return super().score(images, need_text(prompts, self.name), metadata)

    def _load(self, where: str) -> Encoder:
        from steering.rewards.clip_loading import load

        return _encoder(load(self.model, self.pretrained, self.precision, where))

    def _values(self, net: Encoder, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return self.scale * (net.image(images) * net.text(prompts)).sum(-1)


class Encoder:
    """Image and text towers of one loaded model; text features are kept.

    Args:
        loaded: what `clip_loading.load` returns.
        name: of the reward, for messages.
    """

    def __init__(self, loaded: Loaded, name: str = "clip") -> None:
        self.loaded, self.name = loaded, name
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.pixels = PixelSpec.from_open_clip(loaded.preprocess)
        self._text: OrderedDict[str, Tensor] = OrderedDict()

    def image(self, images: Tensor) -> Tensor:
        """Unit vectors float32 [n, d] of images [n, 3, H, W] in [0, 1]; differentiable."""
        return self.embed(self.pixels.apply(images))

    def embed(self, pixels: Tensor) -> Tensor:
        """Unit vectors float32 [n, d] of pixels that are resized and normalised already."""
        found = self.model.encode_image(pixels.to(self.loaded.dtype))
        return torch.nn.functional.normalize(found.float(), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [n, d]; each prompt is encoded once and kept."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._text]
        for start in range(0, len(new), 64):
            chunk = new[start : start + 64]
            self._warn_of_truncation(chunk)
            with torch.no_grad():
                found = self.model.encode_text(self.tokenizer(chunk).to(self.device)).float()
            found = torch.nn.functional.normalize(found, dim=-1)
            self._text.update(zip(chunk, found, strict=True))
        for prompt in dict.fromkeys(prompts):
            self._text.move_to_end(prompt)
        result = torch.stack([self._text[p] for p in prompts])
        while len(self._text) > _CACHED_PROMPTS:
            self._text.popitem(last=False)
        return result

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        room = getattr(self.tokenizer, "context_length", None)
        for prompt in prompts:
            length = _token_count(self.tokenizer, prompt)
            if room and length > room:
                warnings.warn(
                    f"{self.name} reads {room} tokens and this prompt has {length}; the rest is "
                    f"not scored: {prompt[:60]!r}...",
                    stacklevel=2,
                )


def _encoder(loaded: Loaded) -> Encoder:
    """One encoder per loaded model, so that all rewards on it share their text features."""
    if loaded.encoder is None:
        loaded.encoder = Encoder(loaded)
    return loaded.encoder


def _token_count(tokenizer: Callable[..., Any], prompt: str) -> int:
    """Tokens of the whole prompt with its start and end marks; 0 where it cannot be told."""
    inner = getattr(tokenizer, "tokenizer", None)  # open_clip's wrapper of a transformers one
    if inner is not None:
        clean = getattr(tokenizer, "clean_fn", None)
        return len(inner(clean(prompt) if clean else prompt)["input_ids"])
    encode = getattr(tokenizer, "encode", None)
    return len(encode(prompt)) + 2 if encode else 0

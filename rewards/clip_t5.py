"""CLIP-FlanT5, the model of VQAScore (Lin et al., 2024), on stock classes of transformers.

A CLIP vision tower's second last hidden states, without the class token, pass a two-layer GELU
projector and take the place of the image in the text that a FLAN-T5 encoder reads. The score is
``exp(-mean CE)`` over the tokens of the answer and of the end mark, which is the root of
P(Yes) P(end | Yes), row by row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steering.errors import OptionError, WeightsError
from steering.rewards import checkpoints
from steering.rewards.pixels import PixelSpec

MODEL_TYPE = "clip_t5"
VISION = "openai/clip-vit-large-patch14-336"
TOKENIZER = "google/flan-t5-xxl"
# The conversation that the checkpoint was tuned on. The tokenizer ends each piece with </s>, so
# an end mark also stands before the image.
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = "\n{question} ASSISTANT: "
_TOWER, _PROJECTOR = "vision_tower.", "mm_projector."


class ClipT5(nn.Module):
    """The three networks with their tokenizer and pixels.

    Args:
        t5: a T5ForConditionalGeneration.
        vision: a CLIPVisionModel.
        projector: from vision width to T5 width.
        layer: index into the hidden states.
        with_class: whether the class token is kept ("cls_patch").
    """

    def __init__(
        self,
        t5: Any,  # noqa: ANN401
        vision: Any,  # noqa: ANN401
        projector: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        pixels: PixelSpec,
        *,
        layer: int = -2,
        with_class: bool = False,
    ) -> None:
        super().__init__()
        self.t5, self.vision, self.projector = t5, vision, projector
        self.tokenizer, self.pixels = tokenizer, pixels
        self.layer, self.with_class = layer, with_class
        self._tokens: dict[str, Tensor] = {}
        colour = [int(m * 255) / 255 for m in pixels.mean]
        self.register_buffer("colour", torch.tensor(colour).view(-1, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised pixels of images [n, 3, H, W], padded to a square with the mean colour."""
        height, width = images.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        colour = self.get_buffer("colour").to(images)
        square = colour.expand(len(images), -1, side, side).clone()
        square[..., top : top + height, left : left + width] = images
        return self.pixels.apply(square)

    def log_answer(self, pixels: Tensor, questions: Sequence[str], answer: str) -> Tensor:
        """Log-probabilities [n, tokens] of the answer's tokens, its end mark the last."""
        t5 = self.t5
        image = self._image(pixels)
        before = self._embed(BEFORE)
        rows = [
            torch.cat([before, image[k], self._embed(AFTER.replace("{question}", question))])
            for k, question in enumerate(questions)
        ]
        mask = [row.new_ones(len(row), dtype=torch.long) for row in rows]
        labels = self._ids(answer).expand(len(rows), -1)
        start = labels.new_full((len(rows), 1), t5.config.decoder_start_token_id)
        logits = t5(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),
            attention_mask=nn.utils.rnn.pad_sequence(mask, batch_first=True),
            decoder_input_ids=torch.cat([start, labels[:, :-1]], 1),
            use_cache=False,
        ).logits
        logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def _image(self, pixels: Tensor) -> Tensor:
        dtype = next(self.projector.parameters()).dtype
        hidden = self.vision(pixels.to(dtype), output_hidden_states=True).hidden_states
        return self.projector(hidden[self.layer][:, 0 if self.with_class else 1 :])

    def _embed(self, text: str) -> Tensor:
        return self.t5.get_input_embeddings()(self._ids(text))

    def _ids(self, text: str) -> Tensor:
        """Token ids of a text, kept."""
        if text not in self._tokens:
            if len(self._tokens) >= 4096:
                self._tokens.clear()
            self._tokens[text] = torch.tensor(self.tokenizer(text).input_ids)
        return self._tokens[text].to(self.t5.device)


@checkpoints.kept(1)
def load(
    source: str, vision: str, tokenizer: str, reward: str, precision: str, device: str
) -> ClipT5:
    """The model of a folder or hub id; the last one stays loaded.

    Args:
        vision: the CLIP vision tower, for its configuration, and for its weights where the
            checkpoint holds none.
        tokenizer: of FLAN-T5, where the checkpoint holds none.

    Raises:
        OptionError: fp16, in which FLAN-T5 overflows.
        WeightsError: missing, unreadable or unfitting files.
    """
    if precision == "fp16":
        raise OptionError(f"{reward}(precision=fp16): FLAN-T5 overflows in fp16; take bf16.")
    dtype = checkpoints.dtype_of(precision, reward)
    folder = checkpoints.find(source, reward, ("config.json", checkpoints.WEIGHTS))
    config = json.loads((folder / "config.json").read_text())
    words = folder
    if not any((folder / name).is_file() for name in checkpoints.TOKENIZER):
        words = checkpoints.find(tokenizer, reward, (checkpoints.TOKENIZER,))
    tower = checkpoints.find(vision, reward, ("config.json", "preprocessor_config.json"))
    return _assemble(folder, config, words, tower, reward, dtype, device)


def _assemble(
    folder: Path,
    config: dict[str, Any],
    words: Path,
    tower: Path,
    reward: str,
    dtype: torch.dtype,
    device: str,
) -> ClipT5:
    from transformers import AutoTokenizer

    extra = _extra_weights(folder)
    model = ClipT5(
        _t5(folder, config, reward, dtype, device),
        _vision(tower, extra, reward, dtype, device),
        _projector(config, extra, folder, reward).to(device, dtype),
        checkpoints.load_part(AutoTokenizer, words, reward),
        _pixels(tower),
        layer=int(config.get("mm_vision_select_layer", -2)),
        with_class=config.get("mm_vision_select_feature", "patch") == "cls_patch",
    )
    return model.to(device).eval().requires_grad_(False)


def _t5(
    folder: Path,
    config: dict[str, Any],
    reward: str,
    dtype: torch.dtype,
    device: str,
) -> Any:  # noqa: ANN401
    from transformers import T5Config, T5ForConditionalGeneration

    plain = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    return checkpoints.load_model(
        T5ForConditionalGeneration,
        folder,
        reward,
        dtype,
        device,
        config=T5Config.from_dict(plain),
    )


def _vision(
    tower: Path,
    extra: dict[str, Tensor],
    reward: str,
    dtype: torch.dtype,
    device: str,
) -> Any:  # noqa: ANN401
    from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

    weights = {k.rpartition(_TOWER)[2]: v for k, v in extra.items() if k.startswith(_TOWER)}
    if not weights:
        return checkpoints.load_model(CLIPVisionModel, tower, reward, dtype, device)
    config = json.loads((tower / "config.json").read_text())
    whole = config.get("model_type") == "clip"
    net = CLIPVisionModel(
        CLIPConfig.from_dict(config).vision_config if whole else CLIPVisionConfig.from_dict(config)
    )
    prefix = "vision_model."
    own = prefix if next(iter(net.state_dict())).startswith(prefix) else ""
    renamed = {own + k.removeprefix(prefix): v for k, v in weights.items()}
    found = net.load_state_dict(renamed, strict=False)
    checkpoints.check_filled(found.missing_keys, tower, reward)
    return net.to(device, dtype)


def _projector(
    config: dict[str, Any], extra: dict[str, Tensor], folder: Path, reward: str
) -> nn.Module:
    kind = str(config.get("mm_projector_type", "mlp2x_gelu"))
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and not depth:
        raise WeightsError(f"{reward}: {folder} has a projector of the unknown type {kind!r}.")
    wide, narrow = int(config["d_model"]), int(config["mm_hidden_size"])
    layers: list[nn.Module] = [nn.Linear(narrow, wide)]
    for _ in range(1, int(depth[1]) if depth else 1):
        layers += [nn.GELU(), nn.Linear(wide, wide)]
    net = nn.Sequential(*layers)
    weights = {k.removeprefix(_PROJECTOR): v for k, v in extra.items() if k.startswith(_PROJECTOR)}
    if kind == "linear":
        weights = {f"0.{k}": v for k, v in weights.items()}
    found = net.load_state_dict(weights, strict=False)
    checkpoints.check_filled([_PROJECTOR + k for k in found.missing_keys], folder, reward)
    return net


def _pixels(tower: Path) -> PixelSpec:
    config = json.loads((tower / "preprocessor_config.json").read_text())
    size = config.get("crop_size") or config.get("size")
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    return PixelSpec(
        size=int(side), mean=tuple(config["image_mean"]), std=tuple(config["image_std"])
    )


def _extra_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of tower and projector; of shards only those that hold some are read."""
    wanted = (_TOWER, _PROJECTOR)
    paths = checkpoints.shards(folder)
    index = next((p for n in checkpoints.WEIGHTS if (p := folder / n).is_file()), None)
    if index is not None and index.name.endswith(".index.json"):
        where = json.loads(index.read_text())["weight_map"]
        paths = sorted({folder / f for k, f in where.items() if k.startswith(wanted)})
    found: dict[str, Tensor] = {}
    for path in paths:
        tensors = checkpoints.read_weights(path)
        found.update({k: v for k, v in tensors.items() if k.startswith(wanted)})
    return found

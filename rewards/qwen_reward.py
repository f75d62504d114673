"""A Qwen2-VL with a regression head on special tokens: the body of HPSv3 and VideoReward.

Two things differ from Qwen2-VL as a chat model, because the heads were trained so. The authors
hand embeddings to the language model without position ids, so every token counts up by one on all
three rotary axes, those of the picture too. And casting the model casts its rotary frequencies.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError, WeightsError
from steering.rewards import checkpoints
from steering.rewards.networked import as_features, fill
from steering.rewards.pixels import CLIP_MEAN, CLIP_STD, resize

_PATCH, _MERGE, _FRAMES = 14, 2, 2
SIDE = _PATCH * _MERGE
_BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>"
)
_AFTER = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"


class QwenReward:
    """The loaded network with its tokenizer.

    Args:
        body: `Body`, filled.
        marks: the special tokens whose hidden states the head reads, in order.
    """

    def __init__(self, body: Body, tokenizer: Any, marks: Sequence[str], device: str) -> None:  # noqa: ANN401
        self.model, self.tokenizer, self.device = body, tokenizer, torch.device(device)
        self.marks = [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
        self._ids: dict[tuple[str, int, int], list[int]] = {}

    def logits(self, frames: Tensor, texts: Sequence[str], *, video: bool) -> Tensor:
        """float32 [n, marks, outputs] for frames [n, F, 3, h, w], sides multiples of 28."""
        config = self.model.net.config
        pixels, grid = patches(frames)
        seen = as_features(self.model.net.visual(pixels.to(self.dtype), grid_thw=grid))
        place = config.video_token_id if video else config.image_token_id
        count = int(grid[0].prod()) // _MERGE**2
        rows = [self.ids(text, place, count) for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        embedded = self.model.net.language_model.get_input_embeddings()(ids)
        slots = ((ids == place) & mask)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(slots, seen.to(embedded.dtype))
        places = torch.arange(longest, device=self.device).expand(3, len(rows), -1)
        hidden = self.model.net.language_model(
            inputs_embeds=embedded, attention_mask=mask.long(), position_ids=places,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        marks = torch.stack([((ids == mark) & mask).long().argmax(1) for mark in self.marks], 1)
        chosen = hidden.gather(1, marks[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.model.head(chosen.float())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.net.parameters()).dtype

    def ids(self, text: str, place: int, count: int) -> list[int]:
        """Token ids of the whole conversation around ``count`` places of the picture, kept."""
        key = (text, place, count)
        if key not in self._ids:
            if len(self._ids) >= 4096:
                self._ids.clear()
            before, after = (
                self.tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (_BEFORE, _AFTER.format(text))
            )
            for mark in self.marks:
                if after.count(mark) != 1:
                    raise OptionError(
                        "The rubric must hold each special token of the model once, and the "
                        f"prompt none; {after.count(mark)} of token {mark} in {text[-80:]!r}."
                    )
            self._ids[key] = before + [place] * count + after
        return self._ids[key]


class Body(torch.nn.Module):
    """Qwen2-VL without its word head, and the regression head in float32."""

    def __init__(self, config: Any, head: torch.nn.Module) -> None:  # noqa: ANN401
        from transformers import Qwen2VLModel

        super().__init__()
        self.net = Qwen2VLModel(config)
        self.head = head


def build(
    state: dict[str, Tensor],
    base: str,
    marks: Sequence[str],
    path: Path,
    reward: str,
    precision: str,
    device: str,
) -> QwenReward:
    """The network from a checkpoint's state dict, and config and tokenizer of its base model.

    Raises:
        WeightsError: the base is missing, or the state dict is of another model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoTokenizer

    folder = checkpoints.find(base, f"{reward} (base)", ["config.json", checkpoints.TOKENIZER])
    config = checkpoints.load_part(AutoConfig, folder, reward)
    tokenizer = checkpoints.load_part(AutoTokenizer, folder, reward)
    tokenizer.add_tokens(list(marks), special_tokens=True)
    state = rename(state)
    words = state.get("net.language_model.embed_tokens.weight")
    if words is None:
        raise WeightsError(f"{reward}: {path} holds no Qwen2-VL; it holds {list(state)[:3]}.")
    config.text_config.vocab_size = len(words)
    if max(tokenizer.convert_tokens_to_ids(list(marks))) >= len(words):
        raise WeightsError(
            f"{reward}: {path} has {len(words)} word embeddings, too few for the tokenizer in "
            f"{folder} with {', '.join(marks)}. Give the base model it was made from."
        )
    with init_empty_weights():  # parameters come from the file; buffers are computed
        body = Body(config, _head(state))
    fill(body, state, path, reward)
    body.net.to(checkpoints.dtype_of(precision, reward))
    body.head.float()
    return QwenReward(body.to(device).eval().requires_grad_(False), tokenizer, marks, device)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of `Body` from those of the authors' class, as saved by any transformers version."""
    found = {}
    for key, value in state.items():
        if key.startswith("lm_head."):
            continue
        key = re.sub(r"^rm_head\.", "head.", key)
        key = re.sub(r"^(?:model\.)?visual\.", "net.visual.", key)
        key = re.sub(r"^model\.(?:language_model\.)?", "net.language_model.", key)
        found[key] = value
    return found


def merge_lora(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A plain state dict from one saved with its low-rank updates beside it.

    W + scale * B A; what was trained whole replaces what it was copied from.
    """
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("base_model.model.")
        if ".lora_A." in key or ".lora_B." in key or ".original_module." in key:
            continue
        key = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        plain[key] = value
    for key, down in state.items():
        if ".lora_A." not in key:
            continue
        up = state[key.replace(".lora_A.", ".lora_B.")]
        name = re.sub(r"\.lora_A(\.\w+)?\.weight$", ".weight", key)
        name = name.removeprefix("base_model.model.")
        plain[name] = (plain[name].double() + scale * (up.double() @ down.double())).to(up.dtype)
    return plain


def _head(state: dict[str, Tensor]) -> torch.nn.Module:
    """One bare layer, or layers at 0, 3 and 5 with ReLU between (and dropout after the first)."""
    if "head.weight" in state:
        out, into = state["head.weight"].shape
        return torch.nn.Linear(into, out, bias="head.bias" in state)
    sizes = [
        tuple(state[f"head.{i}.weight"].shape) for i in (0, 3, 5) if f"head.{i}.weight" in state
    ]
    if len(sizes) != 3:
        raise WeightsError("The checkpoint has no regression head of a known shape.")
    (a, into), (b, _), (out, _) = sizes
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    return torch.nn.Sequential(
        linear(into, a), relu(), torch.nn.Identity(), linear(a, b), relu(), linear(b, out)
    )


def fitted_size(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """Sides in multiples of 28, the aspect kept, least <= pixels <= most, as Qwen has it."""
    if max(height, width) > 200 * min(height, width):
        raise OptionError(f"A picture of {width}x{height} is too narrow for Qwen2-VL.")
    high, wide = (max(SIDE, round(side / SIDE) * SIDE) for side in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (max(SIDE, math.floor(s / shrink / SIDE) * SIDE) for s in (height, width))
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(s * grow / SIDE) * SIDE for s in (height, width))
    return high, wide


def fit_frames(frames: Tensor, least: int, most: int) -> Tensor:
    """Frames [n, F, 3, H, W] in [0, 1], resized as PIL does to Qwen's size, normalised."""
    size = fitted_size(*frames.shape[-2:], least, most)
    x = resize(frames, size)
    mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def patches(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(patches [n * t * gh * gw, 3 * 2 * 14 * 14], grid [n, 3]) in Qwen's order.

    Two frames make one patch in time; the last frame is repeated where one is lacking, so a
    single picture counts twice. Patches that will be merged stand next to each other.
    """
    if frames.shape[1] % _FRAMES:
        frames = torch.cat([frames, frames[:, -1:]], 1)
    n, count, channels, height, width = frames.shape
    t, gh, gw = count // _FRAMES, height // _PATCH, width // _PATCH
    x = frames.reshape(
        n, t, _FRAMES, channels, gh // _MERGE, _MERGE, _PATCH, gw // _MERGE, _MERGE, _PATCH
    )
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    grid = torch.tensor([[t, gh, gw]] * n, device=frames.device)
    return x.reshape(n * t * gh * gw, -1), grid


def read_rubric(path: Path, names: Sequence[str], reward: str) -> str:
    """The texts that these variables hold in a Python file, joined; any other file as it is.

    The file is parsed, never run.

    Raises:
        WeightsError: missing, or without these variables.
    """
    try:
        source = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise WeightsError(
            f"{reward}: the rubric {str(path)!r} cannot be read: {error}."
        ) from error
    if path.suffix != ".py":
        return source
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    found[target.id] = node.value.value
    lacking = [name for name in names if name not in found]
    if lacking:
        raise WeightsError(f"{reward}: {path} has no text named {', '.join(lacking)}.")
    return "".join(found[name] for name in names)

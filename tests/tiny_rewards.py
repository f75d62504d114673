"""Tiny checkpoints of the classes that real rewards load, with random weights, written to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers as H
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from steering.rewards import chat_local, pixels, qwen_reward

WORDS = "a an apple red two dogs cat left of pizza snow the photo blue green in style".split()
PROMPTS = [
    "a red apple",
    "two dogs",
    "a red apple",
    "a cat left of a pizza",
    "snow",
    "a dogs",
    "a",
]


def seeded(make: Callable[[], torch.nn.Module], seed: int = 0, gain: float = 3.0):
    """A module from a seed, with weights large enough that its output depends on its input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().eval()
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.data *= gain
            elif name.endswith("bias"):
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return module


def tokenizer(folder: Path, start: str, end: str, pad: str, extra: tuple[str, ...] = ()) -> None:
    """One token a word, start and end marks around the text."""
    vocab = {w: i for i, w in enumerate(dict.fromkeys([pad, start, "<unk>", end, *extra, *WORDS]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    H.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=start, eos_token=end, unk_token="<unk>"
    ).save_pretrained(folder)


def clip_folder(folder: Path, tokens: bool = True, seed: int = 0) -> Path:
    """A CLIPModel that reads 9 tokens and pictures of 32 pixels."""
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 9, "bos_token_id": 1,
        "eos_token_id": 3, "pad_token_id": 0, "hidden_act": "gelu",
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "hidden_act": "gelu",
    }  # fmt: skip
    config = H.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    seeded(lambda: H.CLIPModel(config), seed).save_pretrained(folder)
    if tokens:
        # CLIP pads with its end mark in open models; here another, to see that the mask works.
        tokenizer(folder, "<start>", "<end>", "<pad>")
    return folder


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip


def open_clip_name(folder: Path, name: str = "Tiny-Reward") -> str:
    """Registers a tiny open_clip architecture."""
    import open_clip

    (folder / f"{name}.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def open_clip_weights(path: Path, seed: int = 0, wrap: bool = False) -> dict[str, torch.Tensor]:
    """Writes a state dict of that architecture, as safetensors or as the authors' pickle."""
    import open_clip

    state = seeded(lambda: open_clip.CLIP(**OPEN_CLIP), seed, 4.0).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if wrap else state, path)
    return state


def pictures(n: int = 7, size: tuple[int, int] = (90, 70), seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures, width by height."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 6, 9, 3)).astype(np.uint8)
    return [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC) for c in coarse]


def tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(p)).movedim(-1, 0) for p in images]) / 255


def _smooth(resize, images, size, *, interpolation="bicubic", quantise=True):
    return resize(images, size, interpolation=interpolation, quantise=False)


def slope_error(
    reward,
    images: torch.Tensor,
    prompts: list[str],
    step: float = 4e-4,
    *,
    compares: bool = False,
) -> float:
    """Relative error of the gradient along itself against central differences.

    Rounding to 8 bits is left out for both: its gradient is passed straight through by design.

    Args:
        compares: the value of a row depends on the others, so that only their sum has this slope.
    """
    smooth = partial(_smooth, pixels.resize)
    with (
        mock.patch.object(chat_local, "_bytes", lambda image: image.detach().clamp(0, 1) * 255),
        mock.patch.object(pixels, "_rounded", lambda x, whole: x),
        mock.patch.object(pixels, "resize", smooth),
        mock.patch.object(qwen_reward, "resize", smooth),
    ):
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(x, prompts).value.sum(), x)
        direction = gradient / gradient.flatten(1).abs().amax(1).view(-1, *[1] * (x.ndim - 1))
        # With a gradient asked for, as pixels that need none may take another way.
        ahead, behind = (
            reward((images + s * step * direction).requires_grad_(), prompts)
            .value.detach()
            .double()
            for s in (1, -1)
        )
    exact = (gradient * direction).flatten(1).sum(1).double()
    slope = (ahead - behind) / (2 * step)
    if compares:
        exact, slope = exact.sum(), slope.sum()
    return float(((slope - exact).abs() / exact.abs()).max())


def check_contract(
    reward, images: torch.Tensor, prompts: list[str], atol: float = 2e-5
) -> torch.Tensor:
    """What every reward keeps: rows stand alone and stay attached, whatever the batch."""
    with torch.no_grad():
        whole = reward(images, prompts).value
        assert whole.dtype == torch.float32
        assert whole.shape == (len(images),)
        single = [reward(images[i : i + 1], [prompts[i]]).value for i in range(len(images))]
        torch.testing.assert_close(torch.cat(single), whole, rtol=1e-4, atol=atol)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
        mixed = reward(images[order], [prompts[i] for i in order]).value
        torch.testing.assert_close(mixed, whole[order], rtol=1e-4, atol=atol)
    return whole

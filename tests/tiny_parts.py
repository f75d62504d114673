"""Parts of tiny pipelines: tokenizers, text encoders and autoencoders with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers as D
import torch
import transformers as H
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FOX = "a painting of a red fox in the snow"
BOAT = "two blue boats near an old harbour"
AVOID = "blurry dark drawing"
WORDS = f"{FOX} {BOAT} {AVOID}".split()
_CHAT = (
    "{% for m in messages %}{{ m['content'] if m['content'] is string "
    "else m['content'][0]['text'] }} {% endfor %}"
)
Setup = tuple[Any, dict[str, Any]]


# --- tokenizers and text encoders -----------------------------------------------------------


def clip_tokenizer() -> H.CLIPTokenizer:
    """Bytes only: every letter is a token."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + k) for k in range(256 - len(shown))]
    words = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    vocab = {word: k for k, word in enumerate(dict.fromkeys(words))}
    return H.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def word_tokenizer(chat: bool = False) -> H.PreTrainedTokenizerFast:
    """One token a known word, </s> at the end (T5, Gemma, Llama, Qwen)."""
    vocab = {w: k for k, w in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *WORDS]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    out = H.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77,
    )
    if chat:
        out.chat_template = _CHAT
    return out


def alive(make: Callable[[], torch.nn.Module], seed: int = 0) -> Any:
    """A module with no parameter left at zero, at a constant or unset."""
    torch.manual_seed(seed)
    module = make().eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("pad_token"):  # left uninitialised by diffusers
                p.zero_()
            if p.numel() == 1 or float(p.std()) < 1e-8:
                p.add_(0.1 * torch.randn_like(p))
    return module


def clip_text(projection: bool = False, hidden: int = 32) -> Any:
    config = H.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=hidden,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    kind = H.CLIPTextModelWithProjection if projection else H.CLIPTextModel
    return alive(lambda: kind(config))


def t5() -> Any:
    config = H.T5Config(vocab_size=200, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return alive(lambda: H.T5EncoderModel(config))


def language_model(kind: Any, config: Any, hidden: int, **more: Any) -> Any:
    made = config(
        vocab_size=200,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        **more,
    )
    return alive(lambda: kind(made))


# --- autoencoders ---------------------------------------------------------------------------

TWO_LEVELS = {
    "block_out_channels": (4, 8),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}
FLOW_VAE = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.06,
    "scaling_factor": 1.5,
}


def kl(latent_channels: int = 4, **more: Any) -> Any:
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4,),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 1,
        "sample_size": 32,
        **more,
    }
    return alive(lambda: D.AutoencoderKL(**config))


def picture(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5))

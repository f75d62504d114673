"""Tiny random checkpoints of the classes that judge pictures, saved as the real ones are."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

CORPUS = [
    *"Yes yes YES No no NO 0 1 2 3 4 5 6 7 8 9".split(),
    "Yes yes YES No no NO 0 1 2 3 4 5 6 7 8 9 . , : \" ' { } ? Answer the question with",
    "This image was made for the text show a red apple Judge its quality mark from worst best",
    "Does this image show a photo of a blue dog and two cats Final Score Image 1 is better",
]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextlib.contextmanager
def seeded(seed: int):
    """transformers initialises from the global generator; it is put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def byte_tokenizer(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as Qwen's is, trained on a few sentences."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )


def qwen_vl(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL of two layers, with its processor, saved in `folder`."""
    tokenizer = byte_tokenizer()
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 48, "patch_size": 14, "spatial_merge_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1], "temporal_patch_size": 2,
    }  # fmt: skip
    text = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size":
        len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id":
        ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id":
        ids["<|endoftext|>"], "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2],
                            "rope_theta": 1e4},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(seed):
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5  # so that answers depend on what is asked and shown
        words = ["Yes", "No", *"0123456789"]
        # most other tokens alike and unlikely, so that answers have some probability
        model.lm_head.weight *= 0.3
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(words)] *= 10
    model.save_pretrained(folder)
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 9}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def word_tokenizer(end_last: bool = False) -> PreTrainedTokenizerFast:
    """Words and punctuation, each text ended by </s> as T5 does it.

    Args:
        end_last: give </s> the highest id, where CLIP's text towers look for it.
    """
    words = sorted({w for line in CORPUS for w in line.replace("?", " ?").split()})
    words += list("abcdefghijklmnopqrstuvwxyz.,:?'\"\n")
    first = ["<pad>", "<unk>"] if end_last else ["<pad>", "</s>", "<unk>"]
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*first, *words, "</s>"]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def clip_t5(folder: Path, *, tower_inside: bool, pickled: bool, seed: int = 0) -> dict[str, str]:
    """CLIP-FlanT5 in three folders, as the hub has them: options of the reward."""
    tokenizer = word_tokenizer()
    vision_config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with seeded(seed):
        t5, tower = T5ForConditionalGeneration(t5_config), CLIPVisionModel(vision_config)
        projector = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32))
    with torch.no_grad():
        for name, parameter in [*tower.named_parameters(), *projector.named_parameters()]:
            if parameter.ndim > 1:
                parameter *= 6 if "position" not in name else 1
        t5.lm_head.weight *= 0.1
    tower.save_pretrained(folder / "tower")
    CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder / "tower")
    tokenizer.save_pretrained(folder / "words")
    weights = dict(t5.state_dict())
    weights |= {f"mm_projector.{k}": v for k, v in projector.state_dict().items()}
    if tower_inside:
        name = "vision_tower.vision_tower.vision_model."
        weights |= {name + k.removeprefix("vision_model."): v for k, v in
                    tower.state_dict().items()}  # fmt: skip
        CLIPVisionModel(vision_config).save_pretrained(folder / "tower")  # must not be used
    config = t5_config.to_dict() | {
        "model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"],
        "mm_hidden_size": 24, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_feature":
        "patch",
    }  # fmt: skip
    main = folder / "main"
    main.mkdir()
    (main / "config.json").write_text(json.dumps(config))
    save_weights(weights, main, pickled)
    return {"model": str(main), "vision": str(folder / "tower"), "tokenizer":
            str(folder / "words")}  # fmt: skip


def save_weights(weights: dict[str, torch.Tensor], folder: Path, pickled: bool) -> None:
    """One safetensors file, or two pickled shards with an index."""
    weights = {k: v.clone().contiguous() for k, v in weights.items()}
    if not pickled:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2],
              "pytorch_model-00002-of-00002.bin": names[1::2]}  # fmt: skip
    for file, keys in halves.items():
        torch.save({k: weights[k] for k in keys}, folder / file)
    where = {k: file for file, keys in halves.items() for k in keys}
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

"""CLIP-family rewards of a size that a CPU can time, each with the loop over PIL that papers use.

Weights are random: the time does not depend on them. Every maker writes a checkpoint into a folder
and gives (title, spec of the reward, function from PIL images to scores [n]).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Loop = Callable[[list[Image.Image]], Tensor]
Row = tuple[str, str, Loop]

PROMPT = "a photo of a red apple and a blue clock"
CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 384, "head_width": 64,
                   "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4,
                 "layers": 6},
}  # fmt: skip
PREPROCESS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}


def open_clip_folder(folder: Path) -> str:
    """An open_clip checkpoint; its name."""
    import open_clip
    from safetensors.torch import save_file

    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def clip(folder: Path) -> Row:
    import open_clip

    name = open_clip_folder(folder)
    net, _, transform = open_clip.create_model_and_transforms(name)
    plain = cosines(net.eval(), transform, open_clip.get_tokenizer(name))
    return "clip (ViT-S/32)", f"clip(model='{name}')", plain


def stickers(folder: Path) -> Row:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from steering.stickers.load import load_clip

    del folder
    net, tokenizer, config = load_clip()
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    plain = cosines(net.eval(), transform, tokenizer)
    return "clip(model=stickers)", "clip(model=stickers)", plain


def aesthetic(folder: Path) -> Row:
    import open_clip

    name = open_clip_folder(folder)
    widths = (CONFIG["embed_dim"], 256, 64, 16, 1)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    head = torch.nn.Sequential(*layers)
    torch.save(head.state_dict(), folder / "head.pth")
    net, _, transform = open_clip.create_model_and_transforms(name)

    @torch.no_grad()
    def plain(pictures: list[Image.Image]) -> Tensor:
        embed = net.eval().encode_image
        return torch.cat(
            [head(F.normalize(embed(transform(p)[None]), dim=-1))[:, 0] for p in pictures]
        )

    return "aesthetic (ViT-S/32)", f"aesthetic(head='{folder}/head.pth', model='{name}')", plain


def hps(folder: Path) -> Row:
    import open_clip
    import torchvision.transforms.functional as TF

    from steering.rewards.hps import FILES
    from steering.rewards.pixels import CLIP_MEAN, CLIP_STD

    (folder / "Bench-HPS.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "Bench-HPS.json")
    net = open_clip.CLIP(**CONFIG).eval()
    torch.save({"state_dict": net.state_dict()}, folder / FILES["v2.1"])

    def transform(picture: Image.Image) -> Tensor:
        pixels = TF.resize(
            TF.to_tensor(picture), [224, 224], TF.InterpolationMode.BICUBIC, antialias=True
        )
        return TF.normalize(pixels, CLIP_MEAN, CLIP_STD)

    plain = cosines(net, transform, open_clip.get_tokenizer("Bench-HPS"))
    return "hps (ViT-S/32)", f"hps(model='{folder}', architecture=Bench-HPS)", plain


def pickscore(folder: Path) -> Row:
    """As the authors' snippet does it: processor, two embeddings, exp(logit_scale) * cosine."""
    import transformers as H
    from open_clip.tokenizer import SimpleTokenizer

    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
            "num_attention_heads": 4, "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
              "num_attention_heads": 6, "image_size": 224, "patch_size": 32}  # fmt: skip
    config = H.CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)
    net = H.CLIPModel(config).eval()
    net.save_pretrained(folder)
    words = clip_tokenizer(SimpleTokenizer())
    words.save_pretrained(folder)
    processor = H.CLIPImageProcessor()

    @torch.no_grad()
    def plain(pictures: list[Image.Image]) -> Tensor:
        values = []
        for picture in pictures:
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            tokens = words(PROMPT, padding="max_length", max_length=77, return_tensors="pt")
            image = net.get_image_features(pixel_values=pixels).pooler_output
            told = net.get_text_features(**tokens).pooler_output
            values.append(net.logit_scale.exp() * F.cosine_similarity(image, told))
        return torch.cat(values)

    return "pickscore (ViT-S/32)", f"pickscore(model='{folder}')", plain


def clip_tokenizer(simple) -> object:
    """open_clip's byte pairs as a transformers tokenizer, so that no download is needed."""
    import transformers as H

    merges = [tuple(pair) for pair in simple.bpe_ranks]
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {marks.get(word, word): number for word, number in simple.encoder.items()}
    return H.CLIPTokenizer(vocab=vocab, merges=merges)


def cosines(net: torch.nn.Module, transform: Callable, tokenizer: Callable) -> Loop:
    """CLIPScore one PIL image at a time."""

    @torch.no_grad()
    def scores(pictures: list[Image.Image]) -> Tensor:
        values = []
        for picture in pictures:
            image = net.encode_image(transform(picture)[None])
            text = net.encode_text(tokenizer([PROMPT]))
            values.append(F.cosine_similarity(image, text))
        return torch.cat(values)

    return scores


CLIP_FAMILY = (clip, stickers, pickscore, hps, aesthetic)

"""Trains the sticker CLIP: an open_clip model with the pipeline's own tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steering.stickers.load import WEIGHTS, load_clip
from steering.stickers.train.data import DecodedPool, draw, to_tensor
from steering.stickers.train.loop import Loop, Recipe, autocast, seeded_init, write_atomic
from steering.stickers.world import Scene, StickerWorld

BATCH = 256
DECODED = 64  # of the batch, scenes that went through the autoencoder
HARD = 0.25  # of the scenes with two colours or a relation, those that meet their swapped caption
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 64, "layers": 4, "width": 192, "head_width": 48, "patch_size": 8,
    },
    # The end token has id 1, not the highest id, so pooling must look for it.
    "text_cfg": {
        "context_length": 14, "vocab_size": 492, "width": 128, "heads": 4, "layers": 3,
        "pool_type": "eos", "eos_id": 1, "pad_id": 1, "hf_tokenizer_name": "sticker",
    },
}  # fmt: skip
PREPROCESS: dict[str, Any] = {
    "size": 64,
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build(warm_start: Path | None) -> nn.Module:
    """A fresh model, or one with every tensor of `warm_start` whose shape fits."""
    from open_clip.model import CLIP

    with seeded_init(0):
        model = CLIP(**MODEL)
    if warm_start is not None:
        own, old = model.state_dict(), load_file(warm_start)
        length = MODEL["text_cfg"]["context_length"]
        old["positional_embedding"] = old["positional_embedding"][:length]
        fits = {k: v for k, v in old.items() if k in own and v.shape == own[k].shape}
        model.load_state_dict(own | fits)
    return model


def normalise(images: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(PREPROCESS[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (to_tensor(images) - mean) / std


def contrastive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """InfoNCE in which every copy of a caption in the batch counts as right.

    `text` and `ids` may hold more rows than `image`: hard negatives, captions of no image, that
    stand among the wrong answers of every image (Yuksekgonul et al. 2023, arXiv:2210.01936).
    """
    n = len(image)
    logits = scale.float() * image.float() @ text.float().T
    same = (ids[:n, None] == ids[None]).all(-1).float()
    of_image = F.cross_entropy(logits, same / same.sum(-1, keepdim=True))
    of_text = same[:, :n] / same[:, :n].sum(-1, keepdim=True)
    return (of_image + F.cross_entropy(logits[:, :n].T, of_text)) / 2


def hard_negatives(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """Swapped captions of a part HARD of the scenes that have one.

    Few of them, so that the model keeps CLIP's weakness for the order of words.
    """
    told = [s.prompt for s in scenes if s.metadata["tag"] in ("color_attr", "position")]
    return [swap(caption) for caption in told if rng.random() < HARD]


def train(recipe: Recipe, warm_start: Path | None = None) -> None:
    """Train, then write an open_clip folder to `recipe.out / "export"`."""
    from transformers import CLIPTokenizer

    pipeline = WEIGHTS / "pipeline"
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    pool = DecodedPool(recipe.out.parent / "decoded.npz", pipeline / "vae")
    world, model = StickerWorld(), build(warm_start)
    loop = Loop(recipe, {"clip": model}, lambda: caption_among(model, tokenizer))
    for step in loop.steps():
        rng = np.random.default_rng([recipe.seed, step])
        fresh, seen = draw(world, rng, BATCH - DECODED), pool.draw(rng, DECODED)
        scenes = [*fresh[1], *seen[1]]
        text = [s.prompt for s in scenes] + hard_negatives(scenes, rng)
        ids = tokenizer(text, padding="max_length", max_length=14, return_tensors="pt").input_ids
        with autocast():
            image, caption, scale = model(normalise(np.concatenate([fresh[0], seen[0]])), ids)
        loop.update(contrastive(image, caption, scale, ids))
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)
    loop.use_best()
    export(model, recipe.out / "export")
    loop.log(**evaluate(recipe.out / "export"))


@torch.no_grad()
def caption_among(model: nn.Module, tokenizer: Any, n: int = 256) -> float:  # noqa: ANN401
    """Minus the contrastive error on scenes with held-out pairs, in groups of 64."""
    images, scenes = draw(StickerWorld("heldout"), np.random.default_rng(9_000_001), n)
    text = [s.prompt for s in scenes]
    ids = tokenizer(text, padding="max_length", max_length=14, return_tensors="pt").input_ids
    groups = zip(normalise(images).split(64), ids.split(64), strict=True)
    return -float(np.mean([contrastive(*model(x, part), part) for x, part in groups]))


def export(model: nn.Module, folder: Path) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:...")` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(WEIGHTS / "pipeline" / "tokenizer" / name, folder / name)
    state = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items()}
    write_atomic(folder / "open_clip_model.safetensors", lambda path: save_file(state, path))


@torch.no_grad()
def evaluate(folder: Path, n: int = 1024) -> dict[str, float]:
    """Right caption among 64, and a caption told from its copy with colours or places swapped.

    Scenes hold held-out pairs, except single-object tags, which have no pairs.
    """
    model, tokenizer, _ = load_clip(folder)
    rng = np.random.default_rng(9_000_000)
    images, scenes = draw(StickerWorld("heldout"), rng, n)
    image = model.encode_image(normalise(images), normalize=True)
    captions = [s.prompt for s in scenes]
    text = model.encode_text(tokenizer(captions), normalize=True)
    best = (image.view(-1, 64, 1, 128) * text.view(-1, 1, 64, 128)).sum(-1).argmax(-1)
    picked = [captions[64 * (k // 64) + int(j)] for k, j in enumerate(best.flatten())]
    right = float(np.mean([p == c for p, c in zip(picked, captions, strict=True)]))
    out = {"caption_among_64": right}
    for name, tag in (("swapped_colors_told", "color_attr"), ("swapped_places_told", "position")):
        pairs = [k for k, s in enumerate(scenes) if s.metadata["tag"] == tag]
        swapped = model.encode_text(tokenizer([swap(captions[k]) for k in pairs]), normalize=True)
        told = (image[pairs] * text[pairs]).sum(-1) > (image[pairs] * swapped).sum(-1)
        out[name] = float(told.float().mean())
    return out


def swap(caption: str) -> str:
    """The caption with its two colours, or its two objects, in each other's place."""
    from steering.stickers.grammar import parse, record

    first, second = parse(caption)["include"]
    names = (first["class"], second["class"])
    if "position" in second:  # the clauses of a relation stand in the order target, subject
        return record("position", names, relation=second["position"][0])["prompt"]
    return record("color_attr", names, colors=(second["color"], first["color"]))["prompt"]

"""Rewards of a size that a CPU can time, the CLIPs each with the loop over PIL that papers use.

Weights are random: the time does not depend on them. Every maker writes a checkpoint into a folder
and gives (title, spec of the reward, function from PIL images to scores [n]). Beyond the CLIPs
that function is the same reward, asked about one image after another.
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

from steering.rewards import as_reward
from steering.rewards.images import as_tensor

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
# The same towers as transformers spells them.
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
          "num_attention_heads": 6, "image_size": 224, "patch_size": 32}  # fmt: skip
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

    config = H.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=256)
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


def diversity(folder: Path) -> Row:
    """Features picture by picture, compared once all are there."""
    import transformers as H

    from steering.rewards.diversity import Diversity, distances

    config = H.Dinov2Config(hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
                            image_size=224, patch_size=28)  # fmt: skip
    H.Dinov2Model(config).save_pretrained(folder)
    reward = Diversity(model=str(folder))

    def loop(pictures: list[Image.Image]) -> Tensor:
        return distances(torch.cat([reward.embed(as_tensor([picture])) for picture in pictures]))

    return "diversity (DINOv2 S/28)", f"diversity(model='{folder}')", loop


def imagereward(folder: Path) -> Row:
    from open_clip.tokenizer import SimpleTokenizer

    torch.save(blip_state(), folder / "ImageReward.pt")
    clip_tokenizer(SimpleTokenizer()).save_pretrained(folder)
    spec = f"imagereward(model='{folder}', tokenizer='{folder}')"
    return "imagereward (BLIP S/32)", spec, one_by_one(spec)


def blip_state() -> dict[str, Tensor]:
    """Weights under the names of ImageReward's file: 6 layers of 384 above 4 of 256."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes |= {f"{eye}cls_token": (1, 1, 384), f"{eye}pos_embed": (1, 50, 384),
               f"{eye}patch_embed.proj.weight": (384, 3, 32, 32),
               f"{eye}patch_embed.proj.bias": (384,)}  # fmt: skip
    for k in range(6):
        block = f"{eye}blocks.{k}."
        norm(f"{block}norm1", 384)
        norm(f"{block}norm2", 384)
        for name, out, into in (("attn.qkv", 1152, 384), ("attn.proj", 384, 384),
                                ("mlp.fc1", 1536, 384), ("mlp.fc2", 384, 1536)):  # fmt: skip
            linear(f"{block}{name}", out, into)
    norm(f"{eye}norm", 384)
    shapes |= {f"{text}embeddings.word_embeddings.weight": (49408, 256),
               f"{text}embeddings.position_embeddings.weight": (64, 256)}  # fmt: skip
    norm(f"{text}embeddings.LayerNorm", 256)
    for k in range(4):
        layer = f"{text}encoder.layer.{k}."
        for kind, width in (("attention", 256), ("crossattention", 384)):
            for name, into in (("query", 256), ("key", width), ("value", width)):
                linear(f"{layer}{kind}.self.{name}", 256, into)
            linear(f"{layer}{kind}.output.dense", 256, 256)
            norm(f"{layer}{kind}.output.LayerNorm", 256)
        linear(f"{layer}intermediate.dense", 1024, 256)
        linear(f"{layer}output.dense", 256, 1024)
        norm(f"{layer}output.LayerNorm", 256)
    for number, (into, out) in zip(
        (0, 2, 4, 6, 7), pairwise((256, 128, 64, 16, 4, 1)), strict=True
    ):
        linear(f"mlp.layers.{number}", out, into)
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(shape, generator=generator) * 0.05 for k, shape in shapes.items()}


def vqascore(folder: Path) -> Row:
    """CLIP-FlanT5 in three folders, as the hub has it."""
    import transformers as H
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors.torch import save_file

    H.CLIPVisionModel(H.CLIPVisionConfig(**VISION)).save_pretrained(folder / "tower")
    H.CLIPImageProcessor().save_pretrained(folder / "tower")
    clip_tokenizer(SimpleTokenizer()).save_pretrained(folder / "words")
    config = H.T5Config(vocab_size=49408, d_model=256, d_kv=64, d_ff=512, num_layers=4,
                        num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                        decoder_start_token_id=0)  # fmt: skip
    parts = torch.nn.Sequential(
        torch.nn.Linear(384, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)
    )
    weights = {k: v.clone() for k, v in H.T5ForConditionalGeneration(config).state_dict().items()}
    weights |= {f"mm_projector.{k}": v for k, v in parts.state_dict().items()}
    (folder / "main").mkdir()
    save_file(weights, folder / "main" / "model.safetensors", metadata={"format": "pt"})
    named = {"model_type": "clip_t5", "mm_hidden_size": 384, "mm_projector_type": "mlp2x_gelu"}
    (folder / "main" / "config.json").write_text(json.dumps(config.to_dict() | named))
    spec = (
        f"vqascore(model='{folder}/main', vision='{folder}/tower', tokenizer='{folder}/words', "
        "precision=fp32)"
    )
    return "vqascore (CLIP S/32, T5 of 4 layers)", spec, one_by_one(spec)


def count(folder: Path) -> Row:
    import transformers as H
    from open_clip.tokenizer import SimpleTokenizer

    config = H.Owlv2Config(text_config=TEXT, vision_config=VISION, projection_dim=256)
    H.Owlv2ForObjectDetection(config).save_pretrained(folder)
    eye = H.Owlv2ImageProcessor(size={"height": 224, "width": 224})
    H.Owlv2Processor(eye, clip_tokenizer(SimpleTokenizer())).save_pretrained(folder)
    spec = f"count(model='{folder}', objects='apple; clock', mode=smooth)"
    return "count (OWLv2 S/32)", spec, one_by_one(spec)


def ocr(folder: Path) -> Row:
    del folder
    spec = "ocr(text='red apple')"
    return "ocr (PP-OCR)", spec, one_by_one(spec)


def one_by_one(spec: str) -> Loop:
    """A reward called with one image after another."""
    reward = as_reward(spec)
    return lambda pictures: torch.cat([reward([picture], PROMPT).value for picture in pictures])


CLIP_FAMILY = (clip, stickers, pickscore, hps, aesthetic)
NETWORKS = (diversity, imagereward, vqascore, count, ocr)

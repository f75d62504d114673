"""Tiny random detectors of four kinds, saved with their processors."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    SwinConfig,
)

from tests.tiny_judges import seeded, word_tokenizer

NAMES = {0: "apple", 1: "dog", 2: "cat", 3: "blue"}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "apple", "dog", "cat", "blue", "red"]
    inner = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def grow(model, factor: float, skip: tuple[str, ...] = ()) -> None:
    """Larger weights, so that answers depend on the picture."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not any(word in name for word in skip):
                parameter *= factor


def owlv2(folder: Path) -> Path:
    tokenizer = word_tokenizer(end_last=True)
    config = Owlv2Config(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24,
                     "num_hidden_layers": 1, "num_attention_heads": 2,
                     "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": None,
                     "eos_token_id": tokenizer.eos_token_id},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 48, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    with seeded(0):
        model = Owlv2ForObjectDetection(config)
    grow(model, 3)
    grow(model.owlv2.text_model.embeddings.token_embedding, 30)
    with torch.no_grad():
        head = model.class_head  # unsaturated, so that names differ
        head.logit_scale.weight.zero_()
        head.logit_scale.bias.fill_(1.0)
        head.logit_shift.weight.zero_()
        head.logit_shift.bias.zero_()
    model.save_pretrained(folder)
    size = {"height": 48, "width": 48}
    Owlv2Processor(Owlv2ImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


def grounding_dino(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            window_size=4, out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=24, max_position_embeddings=64,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12, max_text_len=32,
        num_feature_levels=4,
    )  # fmt: skip
    with seeded(1):
        model = GroundingDinoForObjectDetection(config)
    grow(model, 1.5)
    model.save_pretrained(folder)
    image = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(image, tokenizer).save_pretrained(folder)
    return folder


def detr(folder: Path) -> Path:
    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1],
            layer_type="basic", out_features=["stage4"],
        ),
        use_timm_backbone=False, use_pretrained_backbone=False, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=10, id2label=NAMES,
        label2id={v: k for k, v in NAMES.items()},
    )  # fmt: skip
    with seeded(2):
        model = DetrForObjectDetection(config)
    grow(model, 4, skip=("backbone",))
    with torch.no_grad():
        model.model.query_position_embeddings.weight *= 60
        head = model.class_labels_classifier
        head.weight /= 4
        head.bias += torch.tensor([1.5, 1.5, 0.0, 0.0, 0.0])
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def rt_detr(folder: Path) -> Path:
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
            layer_type="basic", out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2, num_queries=10,
        decoder_n_points=2, num_denoising=0, id2label=NAMES,
        label2id={v: k for k, v in NAMES.items()},
    )  # fmt: skip
    with seeded(3):
        model = RTDetrForObjectDetection(config)
    grow(model, 5, skip=("backbone",))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name and name.endswith("bias"):
                parameter += 4  # its prior is far below one half
    model.save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def mask2former(folder: Path) -> Path:
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=24,
        encoder_feedforward_dim=24, num_queries=10, id2label=NAMES,
        label2id={v: k for k, v in NAMES.items()},
    )  # fmt: skip
    with seeded(4):
        model = Mask2FormerForUniversalSegmentation(config)
    grow(model, 4, skip=("backbone",))
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32
    ).save_pretrained(folder)
    return folder


BUILD = {"owlv2": owlv2, "grounding": grounding_dino, "detr": detr, "rt_detr": rt_detr,
         "mask2former": mask2former}  # fmt: skip

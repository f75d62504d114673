"""Detectors for GenEval: decoding against a straightforward twin, colours, scenes end to end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from steering.errors import OptionError, WeightsError
from steering.rewards.geneval import CLASSES, COLORS, Rules
from steering.rewards.geneval_colors import (
    TEMPLATES,
    ClipColors,
    Scorer,
    StickerColors,
    crop,
    open_colors,
)
from steering.rewards.geneval_detectors import (
    Detection,
    Detr,
    Mask2Former,
    Stickers,
    box_of,
    class_names,
    mmdet_pixels,
    open_detector,
)
from steering.stickers import TAGS, StickerWorld, parse
from steering.stickers.grammar import record
from steering.stickers.load import WEIGHTS
from steering.stickers.prompts import sample_metadata

ALL = Rules(threshold=0.0, counting_threshold=0.0)
COCO_91 = {0: "N/A", 1: "person", 74: "mouse", 75: "remote", 76: "keyboard", 81: "toothbrush"}


def tiny_mask2former(seed: int = 0):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    torch.manual_seed(seed)  # the initialisation of transformers has no other source
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=12, num_labels=80,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # random logits are flat: spread them, so that classes and masks differ
        model.class_predictor.weight.mul_(40)
        model.class_predictor.bias[-1] += 4
    return model


def tiny_detr(kind: str, seed: int = 1):
    from transformers import (
        AutoModelForObjectDetection,
        ConditionalDetrConfig,
        DetrConfig,
        ResNetConfig,
    )

    torch.manual_seed(seed)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    cls = {"detr": DetrConfig, "conditional": ConditionalDetrConfig}[kind]
    config = cls(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=8, num_labels=80,
        use_pretrained_backbone=False,
    )  # fmt: skip
    return AutoModelForObjectDetection.from_config(config).eval()


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth random colours, [3, H, W] in 8-bit levels."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 6, 6, generator=g)
    big = F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)[0]
    return (big * 255).round() / 255


def bilinear(a: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> size: pixel centres aligned, edges repeated, one weight matrix an axis."""
    matrices = []
    for n_in, n_out in zip(a.shape, size, strict=True):
        matrix = np.zeros((n_out, n_in))
        for i in range(n_out):
            x = max((i + 0.5) * n_in / n_out - 0.5, 0)
            matrix[i, int(x)] += 1 - (x - int(x))
            matrix[i, min(int(x) + 1, n_in - 1)] += x - int(x)
        matrices.append(matrix)
    return matrices[0] @ a @ matrices[1].T


def pixels_by_hand(image: torch.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, tuple]:
    """The network input [1, 3, H, W] and the (height, width) inside its padding."""
    _, height, width = image.shape
    scale = min(size[0] / min(height, width), size[1] / max(height, width))
    inner = (int(height * scale + 0.5), int(width * scale + 0.5))
    levels = np.stack([np.round(bilinear(c.double().numpy() * 255, inner)) for c in image])
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    pixels = np.zeros((1, 3, *(-(-s // 32) * 32 for s in inner)))
    pixels[0, :, : inner[0], : inner[1]] = (levels - mean[:, None, None]) / std[:, None, None]
    return pixels, inner


def by_hand(model, image: torch.Tensor, size: tuple[int, int]) -> list[tuple]:
    """mmdet's instance decoding of one image, step by step in numpy: (class, score, box, mask)."""
    _, height, width = image.shape
    pixels, inner = pixels_by_hand(image, size)
    padded = pixels.shape[-2:]
    mine, _ = mmdet_pixels(image[None], size)
    apart = np.abs(mine.numpy() - pixels) * 58
    assert apart.max() < 1.02  # levels; ties of the rounding fall either way
    assert np.mean(apart > 0.01) < 0.01
    with torch.no_grad():
        answer = model(pixel_values=mine)
    logits = answer.class_queries_logits[0].double().numpy()
    masks = answer.masks_queries_logits[0].double().numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[:, :80]
    out = []
    for pair in np.argsort(-p.ravel())[:100]:
        query, label = pair // 80, pair % 80
        mask = bilinear(bilinear(masks[query], padded)[: inner[0], : inner[1]], (height, width))
        inside = mask > 0
        if not inside.any():
            continue
        ys, xs = np.where(inside)
        score = p[query, label] * (1 / (1 + np.exp(-mask[inside]))).mean()
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        out.append((CLASSES[label], score, box, inside))
    return sorted(out, key=lambda row: -row[1])


@pytest.mark.parametrize(("height", "width"), [(40, 72), (61, 33), (100, 100)])
def test_mask2former_decodes_as_the_straightforward_twin(height, width):
    model, size = tiny_mask2former(), (64, 96)
    image = photo(height, width)
    found = Mask2Former(model, rules=ALL, size=size).detect([image])[0]
    expected = by_hand(model, image, size)
    assert len(found) == len(expected) > 30
    for mine, (name, score, box, mask) in zip(found, expected, strict=True):
        assert mine.score == pytest.approx(score, rel=2e-3)
        twin = next(e for e in expected if abs(e[1] - mine.score) < 2e-3 * score)
        if sum(abs(e[1] - mine.score) < 4e-3 * score for e in expected) > 1:
            continue  # two that close may change places
        assert (mine.name, twin[0]) == (name, name)
        wrong = np.mean(mine.mask.numpy() != mask)
        assert wrong < 0.01
        assert np.abs(np.subtract(mine.box, box)).max() <= (0 if wrong == 0 else 2)


def test_pruning_by_class_probability_loses_nothing():
    """What the thresholds would drop anyway need not be drawn: the rest is the same bits."""
    image, model = photo(50, 70), tiny_mask2former()
    everything = Mask2Former(model, rules=ALL, size=(64, 96)).detect([image])[0]
    least = everything[len(everything) // 3].score
    some = Rules(threshold=least, counting_threshold=0.99)
    pruned = Mask2Former(model, rules=some, size=(64, 96)).detect([image])[0]
    above = [(d.name, d.score, d.box) for d in everything if d.score > least]
    assert [(d.name, d.score, d.box) for d in pruned if d.score > least] == above
    assert 0 < len(pruned) < len(everything)


def test_detections_do_not_depend_on_company():
    images = [photo(40, 72, 1), photo(60, 60, 2), photo(40, 72, 3)]
    detector = Mask2Former(tiny_mask2former(), rules=ALL, size=(64, 96))
    together = detector.detect(images)
    for image, found in zip(images, together, strict=True):
        alone = detector.detect([image])[0]
        assert [d.name for d in alone][:5] == [d.name for d in found][:5]
        torch.testing.assert_close(
            torch.tensor([d.score for d in alone]), torch.tensor([d.score for d in found])
        )
    assert detector.detect([]) == []


@pytest.mark.parametrize(
    ("given", "inner", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((768, 1344), (762, 1333), (768, 1344)),
        ((512, 512), (800, 800), (800, 800)),
        ((100, 400), (333, 1333), (352, 1344)),
    ],
)
def test_images_are_scaled_and_padded_as_mmdet_does(given, inner, padded):
    image = torch.full((1, 3, *given), 0.5)
    pixels, found = mmdet_pixels(image)
    assert found == inner
    assert tuple(pixels.shape[-2:]) == padded
    value = (128 - 123.675) / 58.395  # 127.5 rounds to the even level
    assert pixels[0, 0, 0, 0].item() == pytest.approx(value, abs=1e-5)
    assert not pixels[..., inner[0] :, :].any()
    assert not pixels[..., :, inner[1] :].any()


def test_boxes_end_behind_the_last_pixel():
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[2:5, 3:9] = True
    assert box_of(mask) == (3, 2, 9, 5)


def test_outputs_get_genevals_names():
    config = SimpleNamespace(id2label=dict(enumerate(f"LABEL_{k}" for k in range(80))))
    assert class_names(config) == CLASSES
    renamed = {"computer mouse": "mouse", "tv remote": "remote", "couch": "sofa"}
    plain = [renamed.get(c, c) for c in CLASSES]
    config.id2label = dict(enumerate(["N/A", *plain]))
    assert class_names(config) == (None, *CLASSES)
    config.id2label = {k: f"thing {k}" for k in range(20)}
    with pytest.raises(OptionError, match="not COCO's"):
        class_names(config)


@pytest.mark.parametrize("kind", ["detr", "conditional"])
def test_detr_family_decodes_both_kinds_of_heads(kind):
    model, images = tiny_detr(kind), [photo(48, 64), photo(48, 64, 5)]
    pixels, (h, w) = mmdet_pixels(torch.stack(images))
    mask = torch.zeros(2, *pixels.shape[-2:], dtype=torch.int64)
    mask[:, :h, :w] = 1
    with torch.no_grad():
        answer = model(pixel_values=pixels, pixel_mask=mask)
    found = Detr(model, rules=ALL).detect(images)
    for k, image_found in enumerate(found):
        logits, boxes = answer.logits[k].numpy(), answer.pred_boxes[k].numpy()
        rows = []
        for q in range(len(logits)):
            if kind == "detr":
                e = np.exp(logits[q] - logits[q].max())
                scores = (e / e.sum())[:80]
                pairs = [(scores.max(), int(scores.argmax()))]
            else:
                scores = 1 / (1 + np.exp(-logits[q]))
                pairs = [(s, c) for c, s in enumerate(scores)]
            cx, cy, bw, bh = boxes[q]
            box = np.clip([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], 0, 1)
            rows += [(s, CLASSES[c], box * [64, 48, 64, 48]) for s, c in pairs]
        rows = sorted(rows, key=lambda r: -r[0])[:100]
        assert len(image_found) == len(rows)
        np.testing.assert_allclose([d.score for d in image_found], [r[0] for r in rows], rtol=1e-4)
        assert image_found[0].name == rows[0][1]
        np.testing.assert_allclose(image_found[0].box, rows[0][2], atol=1e-2)


def test_a_detector_with_a_processor_sees_what_the_processor_makes(tmp_path):
    from transformers import AutoImageProcessor, DetrImageProcessor

    size = {"shortest_edge": 64, "longest_edge": 96}
    DetrImageProcessor(size=size).save_pretrained(tmp_path)
    tiny_detr("conditional").save_pretrained(tmp_path)
    opened = open_detector(f"detr={tmp_path}", device="cpu", rules=ALL)
    image = photo(50, 70)
    level = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(images=level, return_tensors="pt")
    assert max(inputs["pixel_values"].shape[-2:]) <= 96
    with torch.no_grad():
        expected = opened.model(**inputs).logits[0].sigmoid().max()
    assert opened.detect([image])[0][0].score == pytest.approx(float(expected), abs=2e-3)


def test_saved_detectors_open_again_and_missing_ones_say_so(tmp_path, monkeypatch):
    tiny_mask2former().save_pretrained(tmp_path / "m2f")
    detector = open_detector(f"mask2former={tmp_path / 'm2f'}", device="cpu")
    image = photo(40, 40)
    small = Mask2Former(detector.model, rules=ALL, size=(64, 64))
    first = Mask2Former(tiny_mask2former(), rules=ALL, size=(64, 64)).detect([image])[0]
    assert [d.box for d in small.detect([image])[0]] == [d.box for d in first]
    assert detector.rules == Rules()
    assert detector.describe()["source"] == str(tmp_path / "m2f")
    tiny_detr("conditional").save_pretrained(tmp_path / "detr")
    assert open_detector(f"detr={tmp_path / 'detr'}", device="cpu").name.startswith("detr")
    with pytest.raises(WeightsError, match=r"lack .* tensors"):
        open_detector(f"mask2former={_wrong_architecture(tmp_path)}", device="cpu")
    with pytest.raises(WeightsError, match="could not be opened"):
        open_detector(f"mask2former={tmp_path}", device="cpu")
    with pytest.raises(WeightsError, match="--detector mask2former=FOLDER"):
        open_detector("mask2former=nobody/nothing", device="cpu")
    with pytest.raises(OptionError, match="mask2former"):
        open_detector("mask3former")
    with pytest.raises(OptionError, match="needs weights"):
        open_detector("detr")


def _wrong_architecture(tmp_path):
    """A Mask2Former's config beside weights of something else."""
    folder = tmp_path / "wrong"
    tiny_detr("detr").save_pretrained(folder)
    config = json.loads((tmp_path / "m2f/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_crops_are_grey_outside_the_mask_like_pils():
    image = photo(20, 30)
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:12, 5:9] = mask[6:8, 3:20] = True
    found = Detection(name="cup", score=0.9, box=box_of(mask), mask=mask)
    levels = (image * 255).byte().permute(1, 2, 0).numpy()
    blank = Image.new("RGB", (30, 20), "#999")
    expected = Image.composite(Image.fromarray(levels), blank, Image.fromarray(mask.numpy()))
    expected = np.asarray(expected.crop((3, 4, 20, 12)))
    mine = (crop(image, found) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(mine, expected)
    plain = crop(image, Detection(name="cup", score=0.9, box=(2.6, 1.2, 9.4, 7.5)))
    assert torch.equal(plain, image[:, 1:8, 3:9])
    assert crop(image, Detection(name="cup", score=0.9, box=(40, 25, 41, 26))).numel() == 3


@pytest.fixture(scope="module")
def clip_colors() -> ClipColors:
    return ClipColors("stickers", device="cpu", batch_size=3)


def test_clip_colours_are_the_zero_shot_classifier_of_each_crop(clip_colors):
    """Batched over all crops, equal to one classifier and one crop at a time by open_clip."""
    import open_clip

    name = f"local-dir:{WEIGHTS / 'clip'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    crops = []
    for k, cls in enumerate(["cup", "dog", "cup", "car", "cat"]):
        image = photo(40 + 7 * k, 60, k)
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[5:30, 8 : 30 + 5 * k] = True
        crops.append((image, Detection(name=cls, score=1, box=box_of(mask), mask=mask)))
    expected = []
    for image, found in crops:
        with torch.no_grad():
            rows = []
            for color in COLORS:
                texts = [t.format(c=color, n=found.name) for t in TEMPLATES]
                each = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
                rows.append(F.normalize(each.mean(0), dim=0))
            levels = (crop(image, found) * 255).round().byte().permute(1, 2, 0).numpy()
            feature = model.encode_image(transform(Image.fromarray(levels))[None])[0]
            expected.append(COLORS[int((torch.stack(rows) @ feature).argmax())])
    assert clip_colors.read(crops) == expected
    assert clip_colors.read([]) == []


def test_the_colour_model_without_its_activation_is_refused():
    with pytest.raises(OptionError, match="quickgelu"):
        open_colors("clip=ViT-L-14:openai")
    with pytest.raises(WeightsError, match="ViT-L-14-quickgelu"):
        open_colors("clip")
    with pytest.raises(OptionError, match="MODEL:PRETRAINED"):
        open_colors("clip=ViT-L-14")
    with pytest.raises(OptionError, match="colour model"):
        open_colors("eyes")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(Stickers(), StickerColors())


def test_rendered_scenes_pass_and_agree_with_the_sticker_judge(scorer):
    """The whole chain on 180 scenes, half of them with another scene's prompt."""
    from steering.stickers.judge import StickerJudge

    world, rng = StickerWorld(), np.random.default_rng(8)
    records = [sample_metadata(rng, split="heldout", tag=t) for t in TAGS for _ in range(15)]
    drawn = np.stack([world.render(world.place(r, rng)) for r in records])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    own = scorer.judge(list(images), records)
    assert np.mean([j.verdict.correct for j in own]) >= 0.95
    others = [records[k] for k in rng.permutation(len(records))]
    mixed = scorer.judge(list(images), others)
    expected = StickerJudge(scorer.detector.judge.detector).judge(images, others)
    assert [j.verdict.reason for j in mixed] == [v.reason for v in expected]


def test_colours_are_read_only_where_they_are_asked_for(scorer):
    world = StickerWorld()
    scene = world.render("a photo of a red cup and a blue dog", 3)
    image = torch.from_numpy(scene).permute(2, 0, 1).float() / 255
    large = F.interpolate(image[None], scale_factor=4, mode="nearest")[0]
    prompts = ["a photo of a cup and a dog", "a photo of a red cup and a blue dog"]
    plain, colored = scorer.judge([large, large], [parse(p) for p in prompts])
    assert plain.verdict.correct
    assert colored.verdict.correct
    assert plain.colors == {}
    assert {colored.found[k].name: c for k, c in colored.colors.items()} == {
        "cup": "red", "dog": "blue",
    }  # fmt: skip
    assert max(max(d.box) for d in colored.found) > 100  # px of the image it was given


def test_classes_the_detector_does_not_know_are_named_before_any_work(scorer):
    scorer.check([record("single_object", ("dog",))])
    with pytest.raises(OptionError, match="does not know fork"):
        scorer.check([record("single_object", ("dog",)), record("two_object", ("cat", "fork"))])

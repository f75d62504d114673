"""Counting and presence on tiny detectors of five kinds, against transformers' own decoding."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward
from steering.rewards.detection import Count, Presence
from steering.rewards.detection_models import Boxes, Finder, Masks, _extents
from tests import tiny_detectors

KINDS = tuple(tiny_detectors.BUILD)
LEVEL = {"owlv2": 0.6, "grounding": 0.5, "detr": 0.3, "rt_detr": 0.7, "mask2former": 0.2}
# How far counts in bf16 may be off, as a share; the weights of these nets are blown up.
ROUGH = {"owlv2": 0.02, "grounding": 0.15, "detr": 0.06, "rt_detr": 0.3, "mask2former": 0.01}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def build(kind):
        if kind not in made:
            made[kind] = tiny_detectors.BUILD[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return build


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (7, 5, 6, 3)).astype(np.uint8)
    return [Image.fromarray(c).resize((80, 60), Image.Resampling.BICUBIC) for c in coarse]


def tensor(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).movedim(-1, 0) for p in pictures]) / 255


@torch.no_grad()
def plain_counts(kind, folder, picture, names, level):
    """Counts by the processor's own post-processing, one PIL image at a time, no suppression."""
    size = torch.tensor([[picture.height, picture.width]])
    if kind in ("owlv2", "grounding"):
        model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
    if kind == "owlv2":
        texts = [[f"a photo of a {n}" for n in names]]
        inputs = processor(text=texts, images=picture, return_tensors="pt", max_length=8)
        found = processor.post_process_grounded_object_detection(
            model(**inputs), threshold=level, target_sizes=size
        )[0]
        return [int((found["labels"] == k).sum()) for k in range(len(names))]
    if kind == "grounding":
        inputs = processor(text="apple. dog.", images=picture, return_tensors="pt")
        p = model(**inputs).logits[0].sigmoid()[:, [1, 3]]  # [CLS] apple . dog . [SEP]
        best, label = p.max(-1)
        return [int(((label == k) & (best > level)).sum()) for k in range(2)]
    if kind == "mask2former":
        model = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        out = model(**processor(images=picture, return_tensors="pt"))
        p, label = out.class_queries_logits[0].softmax(-1)[:, :-1].max(-1)
        counts = [0, 0]
        for query, mask in enumerate(out.masks_queries_logits[0]):
            inside = mask[mask > 0].sigmoid()
            good = len(inside) and float(p[query] * inside.mean()) > level
            if good and int(label[query]) < 2:
                counts[int(label[query])] += 1
        return counts
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    out = model(**processor(images=picture, return_tensors="pt"))
    if kind == "rt_detr":  # a query counts for the better one of the names asked for
        best, label = out.logits[0].sigmoid()[:, :2].max(-1)
        return [int(((label == k) & (best > level)).sum()) for k in range(2)]
    found = processor.post_process_object_detection(out, threshold=level, target_sizes=size)[0]
    return [int((found["labels"] == k).sum()) for k in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_plain_decoding(kind, folders, pictures):
    folder, level = folders(kind), LEVEL[kind]
    reward = Count(
        model=str(folder), objects="2 apple; dog", threshold=level, overlap=1.0, batch_size=4
    )
    found = reward(tensor(pictures[:4]), "x")
    counts = [plain_counts(kind, folder, p, ["apple", "dog"], level) for p in pictures[:4]]
    assert found.parts["apple"].tolist() == [a for a, _ in counts]
    assert found.parts["dog"].tolist() == [b for _, b in counts]
    assert found.value.tolist() == [-abs(a - 2) - abs(b - 1) for a, b in counts]
    assert sum(map(sum, counts)) > 0
    assert as_reward(reward.spec) == reward


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_single_calls_in_any_order(kind, folders, pictures):
    reward = Count(model=str(folders(kind)), mode="smooth", threshold=LEVEL[kind], batch_size=3)
    x = tensor(pictures)
    metadata = [
        {"include": [{"class": "apple", "count": k % 3 + 1}, {"class": "dog", "count": 1}]}
        if k % 2 else [{"class": "dog"}] for k in range(7)
    ]  # fmt: skip
    together = reward(x, "x", metadata=metadata)
    alone = [reward(x[k : k + 1], "x", metadata=metadata[k : k + 1]).value for k in range(7)]
    torch.testing.assert_close(together.value, torch.cat(alone), rtol=1e-3, atol=1e-3)
    order = [4, 1, 6, 0, 2, 5, 3]
    mixed = reward(x[order], "x", metadata=[metadata[k] for k in order])
    torch.testing.assert_close(mixed.value, together.value[order], rtol=1e-3, atol=1e-3)
    assert together.parts["apple"].isnan().tolist() == [k % 2 == 0 for k in range(7)]


@pytest.mark.parametrize("kind", ["owlv2", "grounding", "detr", "mask2former"])
def test_smooth_counts_have_a_gradient_that_raises_them(kind, folders, pictures):
    reward = Count(
        model=str(folders(kind)), mode="smooth", threshold=LEVEL[kind],
        objects="12 dog" if kind == "detr" else "12 apple", temperature=0.5, overlap=1.0,
    )  # fmt: skip
    x = tensor(pictures[:2]).requires_grad_()
    value = reward(x, "x").value
    (gradient,) = torch.autograd.grad(value.sum(), x)
    with torch.no_grad():
        torch.testing.assert_close(reward(x, "x").value, value, rtol=1e-4, atol=1e-4)
        step = 0.02 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
        assert (reward((x + step).clamp(0, 1), "x").value > value).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close(kind, folders, pictures):
    """A smooth count of the few boxes of a tiny detector, in counts."""
    options = {"model": str(folders(kind)), "mode": "smooth", "threshold": LEVEL[kind],
               "objects": "12 apple", "temperature": 0.5, "overlap": 1.0}  # fmt: skip
    exact, rough = (
        Count(**options, precision=p)(tensor(pictures[:3]), "x").value for p in ("fp32", "bf16")
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=ROUGH[kind], atol=0)


class Blobs(Finder):
    """A detector with exact answers: five fixed boxes, scored by the brightness inside."""

    threshold = 0.4
    corners = torch.tensor(
        [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0],
         [0.05, 0.0, 0.5, 0.5]]
    )  # fmt: skip

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1), None)
        self.model.device = torch.device("cpu")

    def find(self, images, names):
        halves = images.unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((1, 3, 5)).flatten(1)
        scores = torch.cat([halves, 0.9 * halves[:, :1]], 1)
        columns = [scores if name == "apple" else 0.5 * scores for name in names]
        return Boxes(
            scores=torch.stack(columns, -1), corners=self.corners.expand(len(images), -1, -1)
        )


@pytest.fixture
def blobs(monkeypatch):
    monkeypatch.setattr("steering.rewards.detection_models.load", lambda *a: Blobs())


def quarters(*levels):
    return torch.tensor(levels).view(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(
        4, 3
    ).expand(1, 3, 8, 8).contiguous()  # fmt: skip


@pytest.mark.usefixtures("blobs")
def test_overlapping_boxes_count_once():
    x = quarters(0.9, 0.8, 0.5, 0.1)
    for overlap, number in ((0.5, 3), (0.95, 4), (1.0, 4)):
        found = Count(objects="3 apple", overlap=overlap)(x, "x")
        assert (float(found.parts["apple"]), float(found.value)) == (number, 3 - number)
    assert float(Count(objects="5 apple", power=2)(x, "x").value) == -4.0


def test_a_hard_count_claims_no_gradient():
    for name in ("count", "presence"):
        assert as_reward(f"{name}(objects=apple)").differentiable is False
        assert as_reward(f"{name}(objects=apple, mode=smooth)").differentiable is True
    assert not as_reward("brightness + count(objects=apple)").differentiable


@pytest.mark.usefixtures("blobs")
def test_smooth_count_is_a_sum_of_sigmoids():
    levels = torch.tensor([0.9, 0.8, 0.5, 0.1])
    found = Count(objects="3 apple", mode="smooth", temperature=0.1)(quarters(*levels), "x")
    expected = ((levels - 0.4) / 0.1).sigmoid().sum()
    assert float(found.value) == pytest.approx(-abs(float(expected) - 3), abs=1e-5)


@pytest.mark.usefixtures("blobs")
@pytest.mark.parametrize("name", ["count", "presence"])
def test_smooth_gradient_against_central_differences(name):
    reward = as_reward(f"{name}(objects=2 apple, mode=smooth, temperature=0.2)")
    x = quarters(0.9, 0.7, 0.5, 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, "x").value.sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    h = 1e-2
    with torch.no_grad():
        ends = [reward((x + s * h * direction).clamp(0, 1), "x").value for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert float(slope.abs()) > 1e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02)


@pytest.mark.usefixtures("blobs")
def test_presence_needs_every_thing_often_enough():
    x = quarters(0.9, 0.8, 0.5, 0.1)
    for objects, hard, smooth in (
        ("apple", 1, 0.9), ("3 apple", 1, 0.5), ("4 apple", 0, 0.1), ("9 apple", 0, 0.0),
        ("apple; dog", 0, 0.0),
    ):  # fmt: skip
        assert float(Presence(objects=objects)(x, "x").value) == hard
        value = float(Presence(objects=objects, mode="smooth")(x, "x").value)
        assert value == pytest.approx(smooth, abs=1e-6)


class Fixed(Masks):
    """Mask2Former's decoding of logits that are given."""

    def __init__(self, classes, masks):
        out = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
        labels = {0: "apple", 1: "dog"}
        self.model = type("Net", (), {"__call__": lambda _: out})()
        self.model.config = SimpleNamespace(id2label=labels)

    def _pixels(self, images):
        return {}


def test_a_query_scores_its_class_times_the_mean_of_its_mask():
    """The second thinks "no object" likelier than its class, which keeps its probability."""
    classes = torch.tensor([[[0.5, 0.1, 0.4], [0.1, 0.3, 0.6]]]).log()
    masks = torch.full((1, 2, 2, 2), -3.0)
    masks[0, 0, 0, 0], masks[0, 0, 0, 1] = math.log(3), math.log(9)  # 0.75 and 0.9 inside
    masks[0, 1] = math.log(4)
    found = Fixed(classes, masks).find(torch.zeros(1, 3, 2, 2), ["apple", "dog"])
    expected = torch.tensor([[[0.5 * 0.825, 0.0], [0.0, 0.3 * 0.8]]])
    torch.testing.assert_close(found.scores, expected)


def test_masks_have_tight_boxes():
    mask = torch.zeros(1, 2, 4, 8)
    mask[0, 0, 1:3, 2:5] = 1
    corners = _extents(mask)
    assert corners[0, 0].tolist() == [2 / 8, 1 / 4, 5 / 8, 3 / 4]
    assert corners[0, 1].tolist() == [0, 0, 0, 0]


def test_owl_boxes_are_shares_of_the_unpadded_picture(folders, pictures):
    """Against the processor's own boxes in pixels."""
    from steering.rewards import detection_models

    folder = folders("owlv2")
    picture = pictures[0]
    found = detection_models.load(str(folder), "count", "fp32", "cpu").find(
        tensor([picture]), ["apple"]
    )
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(
            text=[["a photo of a apple"]], images=picture, return_tensors="pt", max_length=8
        )
        own = processor.post_process_grounded_object_detection(
            model(**inputs), threshold=-1, target_sizes=[(60, 80)]
        )[0]["boxes"]
    scale = torch.tensor([80, 60, 80, 60])
    torch.testing.assert_close(
        found.corners[0] * scale, own.clamp(min=0).minimum(scale), rtol=1e-3, atol=0.05
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objects": "3"}, None),
        ({"objects": "0 apple"}, "name each thing once"),
        ({"objects": "apple; 2 apple"}, "name each thing once"),
        ({"mode": "soft"}, "hard or smooth"),
        ({"threshold": 1.5}, "0 to 1"),
        ({"overlap": 0.0}, "overlap"),
        ({"power": 3}, "1 or 2"),
        ({"precision": "int8"}, "fp32"),
    ],
)
def test_options_are_checked_at_once(options, said):
    if said is None:
        assert Count(**options).objects == "3"  # a thing may be called so
        return
    with pytest.raises(OptionError, match=said):
        Count(**options)


def test_what_to_look_for_must_be_said(folders):
    x = torch.rand(1, 3, 60, 80)
    model = str(folders("detr"))
    with pytest.raises(OptionError, match="does not guess from the prompt"):
        Count(model=model)(x, "three apples")
    with pytest.raises(OptionError, match="GenEval record"):
        Count(model=model)(x, "x", metadata=[{"include": [{"count": 3}]}])
    with pytest.raises(OptionError, match=r"class of this detector.*Did you mean 'apple'"):
        Count(model=model, objects="aple")(x, "x")
    with pytest.raises(WeightsError, match="no folder"):
        Count(model="/no/where", objects="apple").for_model(None)

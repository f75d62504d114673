"""Diversity and the video rewards: pairs counted by hand, DINO against its own processor."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
import transformers as H

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward
from steering.rewards.diversity import (
    _IMAGENET_MEAN,
    _IMAGENET_STD,
    Diversity,
    _Crop,
    distances,
    mean_distance,
    vendi,
)
from steering.rewards.video import Frames, Temporal
from tests.tiny_rewards import PROMPTS, pictures, seeded, slope_error, tensor

TWO = ["a", "b", "a", "b", "a", "c", "b"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino")
    config = H.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=56, patch_size=14,
    )  # fmt: skip
    seeded(lambda: H.Dinov2Model(config)).save_pretrained(path)
    return path


@torch.no_grad()
def plain_features(folder, images):
    """Processor and model as the model card has them."""
    processor = H.BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    net = H.Dinov2Model.from_pretrained(folder).eval()
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    found = net(pixel_values=pixels).last_hidden_state[:, 0]
    return found / found.norm(dim=-1, keepdim=True)


def test_distance_is_the_mean_over_pairs_of_one_prompt(folder):
    images = pictures(size=(90, 70))
    reward = Diversity(model=str(folder), batch_size=3)
    found = reward(images, TWO)
    x = plain_features(folder, images)
    for row, prompt in enumerate(TWO):
        others = [j for j, p in enumerate(TWO) if p == prompt and j != row]
        expected = np.mean([1 - float(x[row] @ x[j]) for j in others]) if others else 0.0
        assert found.value[row] == pytest.approx(expected, abs=5e-3)
        assert found.parts["others"][row] == len(others)
    assert found.value.max() > 0.05
    assert as_reward(reward.spec) == reward
    assert not reward.stationary


@pytest.mark.parametrize("size", [(512, 512), (300, 451), (640, 480)])
def test_dino_pixels_are_those_of_pil(size):
    (image,) = pictures(1, size=size)
    resized = TF.resize(image, 256, interpolation=TF.InterpolationMode.BICUBIC)
    expected = TF.to_tensor(TF.center_crop(resized, [224, 224])) * 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    got = (_Crop(224).apply(tensor([image]))[0] * std + mean) * 255
    error = (got - expected).abs()
    assert error.max() <= 1.001
    assert error.mean() <= 0.01


def test_micro_batches_and_order_change_nothing(folder):
    images = tensor(pictures())
    one = Diversity(model=str(folder))(images, TWO).value
    torch.testing.assert_close(Diversity(model=str(folder), batch_size=2)(images, TWO).value, one)
    order = [3, 1, 6, 0, 2, 5, 4]
    mixed = Diversity(model=str(folder))(images[order], [TWO[i] for i in order]).value
    torch.testing.assert_close(mixed, one[order], rtol=1e-4, atol=1e-5)


def test_distances_of_known_vectors():
    angle = 2 * math.pi / 3
    star = torch.tensor([[math.cos(k * angle), math.sin(k * angle)] for k in range(3)])
    torch.testing.assert_close(distances(star), torch.full((3,), 1.5))
    same = torch.tensor([[1.0, 0.0]] * 4)
    assert mean_distance(same) == pytest.approx(0)
    assert distances(same[:1]).tolist() == [0]
    x = torch.nn.functional.normalize(
        torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    )
    pairs = [1 - float(a @ b) for a, b in itertools.combinations(x, 2)]
    assert mean_distance(x) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_vendi_counts_what_differs():
    assert vendi(torch.eye(5)) == pytest.approx(5)
    assert vendi(torch.eye(5)[:1].expand(4, 5)) == pytest.approx(1)
    assert vendi(torch.eye(5)[[0, 0, 1, 1]]) == pytest.approx(2)


@pytest.mark.parametrize("prompts", [["a"] * 4, ["a", "b", "a", "b"]])
def test_gradient_is_the_slope_of_the_sum(folder, prompts):
    x = 0.2 + 0.6 * tensor(pictures(4))
    reward = Diversity(model=str(folder), batch_size=3)
    assert slope_error(reward, x, prompts, compares=True) < 0.02


def test_bfloat16_is_close(folder):
    images = tensor(pictures())
    video = images[:6].view(2, 3, *images.shape[1:])
    for cls, x, prompts in ((Diversity, images, TWO), (Temporal, video, ["a", "b"])):
        exact, rough = (
            cls(model=str(folder), precision=p)(x, prompts).value for p in ("fp32", "bf16")
        )
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, rtol=0, atol=5e-3)


def test_gradient_pushes_apart(folder):
    x = 0.2 + 0.6 * tensor(pictures(2))
    # Moving both pictures at once, the slope along both gradients is that of the sum.
    reward = Diversity(model=str(folder))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, "a").value.sum(), x)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    step = 0.05 * gradient / gradient.abs().amax()
    with torch.no_grad():
        assert reward((x + step).clamp(0, 1), "a").value.sum() > reward(x, "a").value.sum()


def test_steadiness_is_that_of_vbench(folder):
    frames = pictures(6, size=(70, 70))
    video = tensor(frames).view(2, 3, 3, 70, 70)
    reward = Temporal(model=str(folder), batch_size=4)
    x = plain_features(folder, frames).view(2, 3, -1)
    expected = []
    for clip in x:
        terms = [
            (max(float(clip[k] @ clip[k - 1]), 0) + max(float(clip[k] @ clip[0]), 0)) / 2
            for k in (1, 2)
        ]
        expected.append(np.mean(terms))
    np.testing.assert_allclose(reward(video, "a").value, expected, atol=5e-3)
    still = video[:, :1].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(reward(still, "a").value, torch.ones(2))
    assert slope_error(reward, 0.2 + 0.6 * video, ["a", "a"]) < 0.03
    for bad in (video[:, :1], video[:, 0]):
        with pytest.raises(OptionError, match="2 frames or more"):
            reward(bad, "a")


def test_a_video_has_one_vote_in_diversity(folder):
    video = tensor(pictures(6)).view(3, 2, 3, 70, 90)
    found = Diversity(model=str(folder))(video, ["a", "a", "b"])
    assert found.value.shape == (3,)
    assert found.parts["others"].tolist() == [1, 1, 0]
    torch.testing.assert_close(found.value[0], found.value[1])
    assert found.value[2] == 0


def test_frames_are_chosen_and_summed_up():
    video = torch.rand(2, 7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    light = as_reward("brightness")
    each = light(video.flatten(0, 1), "x").value.view(2, 7)
    for spec, expected in (
        ("frames(brightness)", each.mean(1)),
        ("frames(brightness, every=3)", each[:, ::3].mean(1)),
        ("frames(brightness, reduce=min)", each.amin(1)),
        ("frames(brightness, every=3, reduce=last)", each[:, -1]),
    ):
        reward = as_reward(spec)
        found = reward(video, ["a", "b"])
        torch.testing.assert_close(found.value, expected)
        assert as_reward(reward.spec).spec == reward.spec == spec
    torch.testing.assert_close(Frames("brightness")(video[:, 0], "x").value, each[:, 0])
    with pytest.raises(OptionError, match="one reward"):
        as_reward("frames(brightness, jpeg)")
    with pytest.raises(OptionError, match="mean, min, last"):
        as_reward("frames(brightness, reduce=max)")


def test_frames_keep_prompts_and_records_beside_their_video():
    seen = []

    def look(images, prompts, metadata=None):
        seen.append((list(prompts), list(metadata)))
        return images.mean((1, 2, 3))

    Frames(look)(torch.rand(2, 2, 3, 4, 4), ["a", "b"], metadata=[1, 2])
    assert seen == [(["a", "a", "b", "b"], [1, 1, 2, 2])]


def test_what_cannot_be_loaded():
    with pytest.raises(OptionError, match="clip or dino"):
        Diversity(features="lpips")
    with pytest.raises(WeightsError, match="facebook/dinov2-base"):
        as_reward("diversity").for_model(None)
    assert len(PROMPTS) == len(TWO)


def test_clip_features_are_those_of_the_clip_reward():
    images = tensor(pictures(3))
    reward = Diversity(features="clip", model="stickers")
    clip = as_reward("clip(model=stickers)")
    x = clip._ready("cpu").image(images)
    torch.testing.assert_close(reward(images, "a").value, distances(x))

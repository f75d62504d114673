"""Aesthetic heads: the folding against the layers, the whole score against plain torch."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers as H
from PIL import Image

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward
from steering.rewards.aesthetic import Aesthetic, collapse
from steering.rewards.networked import read_state
from steering.rewards.pixels import PixelSpec
from tests.tiny_rewards import (
    PROMPTS,
    check_contract,
    open_clip_name,
    open_clip_weights,
    pictures,
    seeded,
    slope_error,
    tensor,
)

DATA = Path(os.environ.get("STEERING_TEST_DATA", "no-test-data")) / "aesthetic"
WIDTHS = (24, 16, 12, 8, 4, 1)
NUMBERS = {"v2": (0, 2, 4, 6, 7), "v2.5": (0, 2, 4, 6, 8)}


def head(numbers, widths=WIDTHS, prefix="layers.", seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (a, b) in zip(numbers, pairwise(widths), strict=True):
        state[f"{prefix}{number}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        state[f"{prefix}{number}.bias"] = torch.randn(b, generator=generator)
    return state


def layer_by_layer(state, x):
    weights = [v for k, v in state.items() if k.endswith("weight")]
    biases = [v for k, v in state.items() if k.endswith("bias")]
    for weight, bias in zip(weights, biases, strict=True):
        x = torch.nn.functional.linear(x, weight.float(), bias.float())
    return x[:, 0]


def unit(n, d, seed=1):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("version", NUMBERS)
def test_a_head_of_the_published_shape_folds_into_one_map(version):
    widths = (768 if version == "v2" else 1152, 1024, 128, 64, 16, 1)
    state = head(NUMBERS[version], widths)
    x = unit(256, widths[0])
    weight, bias = collapse(state)
    torch.testing.assert_close(x @ weight + bias, layer_by_layer(state, x), rtol=0, atol=1e-5)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no published heads in {DATA}")
@pytest.mark.parametrize("path", sorted(DATA.glob("*.pth")), ids=lambda p: p.name)
def test_the_published_heads_fold_into_one_map(path):
    state = read_state(path, "aesthetic")
    weight, bias = collapse(state, path.name)
    x = unit(256, len(weight))
    torch.testing.assert_close(x @ weight + bias, layer_by_layer(state, x), rtol=0, atol=1e-5)
    if path.name == "sac+logos+ava1-l14-linearMSE.pth":
        assert float(weight.norm()) == pytest.approx(18.0, abs=0.1)
        assert float(bias) == pytest.approx(5.24, abs=0.01)


def test_heads_that_are_no_affine_map_are_refused():
    with pytest.raises(WeightsError, match="has activations between its layers"):
        collapse(head((0, 3, 6, 9, 11)))
    broken = head((0, 1, 2), (24, 16, 12, 1))
    broken["layers.1.weight"] = torch.ones(12, 15)
    with pytest.raises(WeightsError, match="layer 1 of head does not fit"):
        collapse(broken)
    with pytest.raises(WeightsError, match="3 outputs instead of one"):
        collapse({"weight": torch.ones(3, 5), "bias": torch.ones(3)})
    with pytest.raises(WeightsError, match="no aesthetic head; it holds conv"):
        collapse({"conv": torch.ones(1)})


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("aesthetic")
    open_clip_name(path, "Tiny-Aesthetic")
    open_clip_weights(path / "clip.safetensors")
    torch.save(head(NUMBERS["v2"]), path / "v2.pth")
    torch.save({"weight": 9 * head((0,), (24, 1))["layers.0.weight"],
                "bias": torch.tensor([3.5])}, path / "v1.pth")  # fmt: skip
    return path


def reward_of(folder, version="v2", **options):
    return Aesthetic(
        version=version, head=str(folder / f"{version}.pth"), model="Tiny-Aesthetic",
        pretrained=str(folder / "clip.safetensors"), **options,
    )  # fmt: skip


@torch.no_grad()
def plain(folder, version, images):
    """The published recipe: open_clip's own transform on PIL, unit vector, layer by layer."""
    model, _, preprocess = open_clip.create_model_and_transforms(
        "Tiny-Aesthetic", pretrained=str(folder / "clip.safetensors")
    )
    found = model.eval().encode_image(torch.stack([preprocess(p) for p in images]))
    state = torch.load(folder / f"{version}.pth", weights_only=True)
    return layer_by_layer(state, found / found.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_score_equals_the_published_recipe(folder, version):
    images = pictures()
    reward = reward_of(folder, version, batch_size=3)
    whole = check_contract(reward, tensor(images), PROMPTS)
    assert whole.std() > 0.01
    torch.testing.assert_close(whole, plain(folder, version, images), rtol=0, atol=2e-5)
    assert as_reward(reward.spec) == reward


def test_gradient_and_bfloat16(folder):
    x = 0.2 + 0.6 * tensor(pictures(3))
    assert slope_error(reward_of(folder), x, PROMPTS[:3]) < 0.02
    exact = reward_of(folder)(x, "a").value
    rough = reward_of(folder, precision="bf16")(x, "a").value
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


def test_siglip_head_takes_the_squashed_picture_and_the_pooled_output(tmp_path):
    config = H.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    net = seeded(lambda: H.SiglipVisionModel(config))
    net.save_pretrained(tmp_path)
    state = head(NUMBERS["v2.5"], (32, 16, 12, 8, 4, 1), prefix="scoring_head.")
    torch.save({k: v.bfloat16() for k, v in state.items()}, tmp_path / "head.pth")
    reward = Aesthetic(version="v2.5", head=str(tmp_path / "head.pth"), model=str(tmp_path))
    images = pictures()
    got = check_contract(reward, tensor(images), PROMPTS)
    processor = H.SiglipImageProcessor(size={"height": 28, "width": 28})
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = net(pixel_values=pixels).pooler_output
    saved = torch.load(tmp_path / "head.pth", weights_only=True)
    expected = layer_by_layer(saved, pooled / pooled.norm(dim=-1, keepdim=True))
    assert got.std() > 0.005
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (700, 451)])
def test_siglip_pixels_are_those_of_pil(size):
    (image,) = pictures(1, size=size)
    expected = np.array(image.resize((384, 384), Image.Resampling.BICUBIC), np.float32)
    half = (0.5, 0.5, 0.5)
    pixels = PixelSpec(size=384, mode="squash", mean=half, std=half).apply(tensor([image]))
    error = ((pixels[0] * 0.5 + 0.5) * 255 - torch.from_numpy(expected).movedim(-1, 0)).abs()
    assert error.max() <= 1.001
    assert error.mean() <= 0.01


def test_a_head_for_another_encoder_is_refused(folder, tmp_path):
    torch.save(head((0,), (768, 1)), tmp_path / "other.pth")
    reward = Aesthetic(
        head=str(tmp_path / "other.pth"), model="Tiny-Aesthetic",
        pretrained=str(folder / "clip.safetensors"),
    )  # fmt: skip
    with pytest.raises(OptionError, match="embeddings of 768 numbers and this encoder gives 24"):
        reward(torch.rand(1, 3, 40, 40), "a")


def test_heads_that_are_not_fetched_say_where_they_are():
    with pytest.raises(OptionError, match=r"AGPL-3\.0"):
        as_reward("aesthetic(version='v2.5')")
    with pytest.raises(OptionError, match="LAION-AI/aesthetic-predictor"):
        as_reward("aesthetic(version=v1)")
    with pytest.raises(OptionError, match=r"v1, v2, v2\.5"):
        Aesthetic(version="v3")
    assert "AGPL-3.0" in Aesthetic.licence


def test_a_missing_head_says_which_file_and_how_to_place_it(tmp_path):
    with pytest.raises(WeightsError) as caught:
        as_reward("aesthetic").for_model(None)
    for word in ("aesthetic-model.pth", "'trl-lib/ddpo-aesthetic-predictor'", "--local-dir"):
        assert word in str(caught.value)
    with pytest.raises(WeightsError, match=r"holds no sac\+logos\+ava1-l14-linearMSE\.pth"):
        Aesthetic(head=str(tmp_path)).for_model(None)
    with pytest.raises(WeightsError, match=r"no file or folder '/no/where\.pth'"):
        Aesthetic(head="/no/where.pth").for_model(None)

"""Brightness, JPEG size and the sticker detector."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from steering.errors import OptionError
from steering.rewards import as_reward
from steering.scoring import resolve_reward
from steering.stickers import StickerWorld


def test_brightness_is_the_luminance_of_pil():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float64).mean() / 255
    assert as_reward("brightness")(image[None], "x").value.item() == pytest.approx(grey, abs=3e-3)
    ends = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    torch.testing.assert_close(as_reward("brightness")(ends, "x").value, torch.tensor([0.0, 1.0]))


def test_brightness_of_video_and_of_red_green_blue():
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 2, 2)
    reward = as_reward("brightness")
    torch.testing.assert_close(reward(colours, "x").value, torch.tensor([0.299, 0.587, 0.114]))
    torch.testing.assert_close(reward(colours[None], "x").value, torch.tensor([1 / 3]))


def test_jpeg_counts_the_bytes_of_the_file():
    rng = np.random.default_rng(0)
    flat = np.full((64, 64, 3), 90, np.uint8)
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sizes = []
    for image in (flat, noise):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=80)
        sizes.append(len(file.getvalue()) / 1000)
    batch = np.stack([flat, noise])
    scores = as_reward("jpeg(quality=80)")(batch, "x")
    torch.testing.assert_close(scores.value, -torch.tensor(sizes))
    torch.testing.assert_close(scores.parts["kB"], torch.tensor(sizes))
    large = as_reward("jpeg(quality=80, sign=1)")(batch, "x")
    torch.testing.assert_close(large.value, torch.tensor(sizes))
    assert not as_reward("jpeg").differentiable
    lower = as_reward("jpeg(quality=20)")(batch, "x").value
    assert lower[1] > scores.value[1]


@pytest.mark.parametrize("spec", ["jpeg(quality=101)", "jpeg(sign=2)"])
def test_jpeg_options(spec):
    with pytest.raises(OptionError, match="give"):
        as_reward(spec)


PROMPTS = (
    "a photo of a red apple",
    "a photo of three dogs",
    "a photo of a cat left of a pizza",
    "a photo of a red bus and a blue clock",
)


@pytest.fixture(scope="module")
def drawn():
    world = StickerWorld("all")
    images = [world.render(p, seed=s) for p in PROMPTS for s in range(4)]
    prompts = [p for p in PROMPTS for _ in range(4)]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255, prompts


def test_detector_accepts_true_scenes_and_counts_their_objects(drawn):
    images, prompts = drawn
    scores = as_reward("detector")(images, prompts)
    assert set(scores.value.tolist()) <= {0.0, 1.0}
    assert scores.value.mean() >= 0.85
    expected = torch.tensor([1.0] * 4 + [3.0] * 4 + [2.0] * 8)
    assert (scores.parts["objects"] == expected).float().mean() >= 0.85


def test_detector_refuses_other_prompts(drawn):
    images, prompts = drawn
    assert as_reward("detector")(images, prompts[4:] + prompts[:4]).value.mean() <= 0.1
    wrong = ["a photo of a blue apple", "a photo of two dogs", "a photo of a cat right of a pizza"]
    assert as_reward("detector")(images[:12:4], wrong).value.sum() == 0


def test_detector_takes_records_and_refuses_free_text(drawn):
    images, prompts = drawn
    records = [StickerWorld().parse(p) for p in prompts]
    by_record = as_reward("detector")(images, "ignored", metadata=records)
    torch.testing.assert_close(by_record.value, as_reward("detector")(images, prompts).value)
    with pytest.raises(OptionError, match="sticker model cannot read 'an astronaut'"):
        as_reward("detector")(images[:1], "an astronaut")
    with pytest.raises(OptionError, match="prompt 0 is None"):
        as_reward("detector")(images[:1], [None])


def test_detector_is_ready_before_a_run():
    model = SimpleNamespace(device=torch.device("cpu"), prompts=("an astronaut",))
    with pytest.raises(OptionError, match="cannot read 'an astronaut'"):
        resolve_reward("brightness + detector", model)
    model.prompts = PROMPTS
    assert resolve_reward("detector", model).spec == "detector"

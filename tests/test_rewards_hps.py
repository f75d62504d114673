"""HPS against the authors' transform written with torchvision, and open_clip's towers."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward
from steering.rewards.hps import FILES, HPS, author_pixels
from steering.rewards.pixels import CLIP_MEAN, CLIP_STD
from tests.tiny_rewards import (
    PROMPTS,
    check_contract,
    open_clip_name,
    open_clip_weights,
    pictures,
    slope_error,
    tensor,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hps")
    open_clip_name(path, "Tiny-HPS")
    open_clip_weights(path / FILES["v2.1"], wrap=True)
    open_clip_weights(path / FILES["v2"], seed=7, wrap=True)
    return path


def published_transform(image, size, antialias=True):
    """ToTensor, longest side to `size`, black bars, CLIP's normalisation."""
    x = TF.to_tensor(image)
    ratio = size / float(max(x.shape[1:]))
    if ratio != 1.0:
        new = [round(d * ratio) for d in x.shape[1:]]
        x = TF.resize(x, new, interpolation=TF.InterpolationMode.BICUBIC, antialias=antialias)
        high, wide = size - new[0], size - new[1]
        x = TF.pad(x, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    return TF.normalize(x, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(512, 512), (300, 200), (201, 333), (224, 224), (100, 90)])
def test_pixels_equal_the_published_transform(size, antialias):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8))
    expected = published_transform(image, 224, antialias)
    got = author_pixels(tensor([image]), 224, antialias=antialias)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_pixels_are_not_those_of_clip():
    binary = np.random.default_rng(0).integers(0, 2, (400, 400, 3)).astype(np.uint8) * 255
    pixels = author_pixels(tensor([Image.fromarray(binary)])) * torch.tensor(CLIP_STD).view(
        3, 1, 1
    )
    pixels = pixels + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert pixels.max() > 1  # the overshoot of the filter stays


@torch.no_grad()
def plain(path, images, prompts):
    net = open_clip.create_model("Tiny-HPS", pretrained=None)
    net.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    net.eval()
    pixels = torch.stack([published_transform(p, 32) for p in images])
    image = net.encode_image(pixels, normalize=True)
    text = net.encode_text(open_clip.get_tokenizer("Tiny-HPS")(prompts), normalize=True)
    return (image @ text.T).diagonal()


def reward_of(folder, **options):
    return HPS(model=str(folder), architecture="Tiny-HPS", **options)


@pytest.mark.parametrize("version", FILES)
def test_score_equals_the_published_recipe(folder, version):
    images = pictures()
    reward = reward_of(folder, version=version, batch_size=3)
    whole = check_contract(reward, tensor(images), PROMPTS)
    assert whole.std() > 0.01
    expected = plain(folder / FILES[version], images, PROMPTS)
    torch.testing.assert_close(whole, expected, rtol=0, atol=2e-5)
    assert as_reward(reward.spec) == reward
    in_table = reward_of(folder, version=version, scale=100.0)(images, PROMPTS).value
    torch.testing.assert_close(in_table, 100 * whole, rtol=1e-4, atol=1e-3)


def test_versions_differ_and_the_default_is_the_newer(folder):
    images = pictures(2)
    old, new = (reward_of(folder, version=v)(images, "a red apple").value for v in FILES)
    assert (old - new).abs().min() > 1e-3
    torch.testing.assert_close(reward_of(folder)(images, "a red apple").value, new)


def test_gradient_and_bfloat16(folder):
    x = 0.2 + 0.6 * tensor(pictures(3))
    assert slope_error(reward_of(folder), x, PROMPTS[:3]) < 0.02
    exact = reward_of(folder)(x, PROMPTS[:3]).value
    rough = reward_of(folder, precision="bf16")(x, PROMPTS[:3]).value
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(OptionError, match=r"v2 or v2\.1"):
        HPS(version="v3")
    with pytest.raises(OptionError, match="ViT-H-14"):
        HPS(architecture="ViT-H-13").for_model(None)
    with pytest.raises(WeightsError) as caught:
        as_reward("hps").for_model(None)
    for word in ("HPS_v2.1_compressed.pt", "'xswu/HPSv2'", "hf download xswu/HPSv2"):
        assert word in str(caught.value)
    with pytest.raises(WeightsError, match=r"holds no HPS_v2\.1_compressed\.pt"):
        reward_of(tmp_path).for_model(None)
    with pytest.raises(WeightsError, match=r"no file or folder 'weights/hps\.pt'"):
        HPS(model="weights/hps.pt").for_model(None)
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="is of another model"):
        HPS(model=str(tmp_path / "other.pt"), architecture="Tiny-HPS").for_model(None)


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_with_code_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        HPS(model=str(tmp_path / "bad.pt"), architecture="ViT-B-32").for_model(None)
    assert "must not run" not in capsys.readouterr().out

"""The CLIP reward against open_clip's own preprocessing and encoders, on tiny random models."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from steering.errors import OptionError, WeightsError
from steering.rewards import Clip, as_reward, clip
from steering.rewards.clip_loading import load, resolve
from steering.scoring import resolve_reward
from steering.stickers import StickerWorld
from tests import tiny_rewards

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
PROMPTS = ["a red apple", "two dogs", "a red apple", "a cat left of a pizza", "snow"]


def tiny(quick_gelu=False, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # open_clip initialises from the global generator
        model = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu)
    # Random towers hardly look at their input; larger weights make scores differ.
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data *= 4 if "embedding" not in name else 20
    return model.eval()


@pytest.fixture(scope="module", params=["shortest", "longest", "squash"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS | {"resize_mode": request.param}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tiny().state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 6, 9, 3)).astype(np.uint8)
    return [Image.fromarray(c).resize((90, 70), Image.Resampling.BICUBIC) for c in coarse]


def tensor(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).movedim(-1, 0) for p in pictures]) / 255


@torch.no_grad()
def plain_clipscore(name, pictures, prompts, **options):
    model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    tokens = open_clip.get_tokenizer(name)(prompts)
    image = model.eval().encode_image(torch.stack([preprocess(p) for p in pictures]))
    text = model.encode_text(tokens)
    return torch.nn.functional.cosine_similarity(image, text)


def test_equals_open_clip_on_pil(folder, pictures):
    expected = plain_clipscore(f"local-dir:{folder}", pictures, PROMPTS)
    assert expected.std() > 0.02
    for spec in (f"clip(model='local-dir:{folder}')", f"clip(pretrained='{folder}')"):
        reward = as_reward(spec)
        for images in (tensor(pictures), pictures):
            torch.testing.assert_close(reward(images, PROMPTS).value, expected, rtol=0, atol=1e-5)
        assert as_reward(reward.spec) == reward


def test_micro_batches_and_scale_change_nothing_else(folder, pictures):
    one = Clip(pretrained=str(folder))(pictures, PROMPTS).value
    two = Clip(pretrained=str(folder), batch_size=2, scale=100.0)(pictures, PROMPTS).value
    torch.testing.assert_close(two, 100 * one, rtol=1e-4, atol=1e-4)


def test_rows_stand_alone_and_stay_attached(folder):
    images = tensor(tiny_rewards.pictures(7))
    for options in ({}, {"batch_size": 3}):
        reward = Clip(pretrained=str(folder), **options)
        assert tiny_rewards.check_contract(reward, images, tiny_rewards.PROMPTS).std() > 0.02


def test_gradient_is_the_slope(folder, pictures):
    x = 0.2 + 0.6 * tensor(pictures[:3])
    reward = Clip(pretrained=str(folder), batch_size=2)
    assert tiny_rewards.slope_error(reward, x, PROMPTS[:3]) < 0.02


def test_gradient_raises_the_score(folder, pictures):
    reward = Clip(pretrained=str(folder), batch_size=2)
    x = tensor(pictures).requires_grad_()
    value = reward(x, PROMPTS).value
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    # A step long enough to survive 8-bit rounding, too short to leave the linear regime.
    step = 0.02 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    with torch.no_grad():
        assert (reward((x + step).clamp(0, 1), PROMPTS).value > value).all()


def test_each_prompt_is_encoded_once(folder, pictures, monkeypatch):
    load.cache_clear()
    reward = Clip(pretrained=str(folder))
    reward(pictures[:1], "warm up")
    encoder = reward._ready("cpu")
    rows = []
    encoder.model.token_embedding.register_forward_hook(lambda m, x, y: rows.append(len(y)))
    first = reward(pictures, PROMPTS).value
    assert rows == [4]
    again = Clip(pretrained=str(folder), scale=2.0)(pictures, PROMPTS).value
    assert rows == [4]
    torch.testing.assert_close(again, 2 * first)

    monkeypatch.setattr(clip, "_CACHED_PROMPTS", 2)
    reward(pictures[:3], ["x", "y", "z"])
    assert list(encoder._text) == ["y", "z"]
    assert rows == [4, 3]
    reward(pictures[:2], ["z", "x"])
    assert rows == [4, 3, 1]


def test_long_prompts_warn_once(folder, pictures):
    reward = Clip(pretrained=str(folder))
    long = "apple " * 15
    with pytest.warns(UserWarning, match="reads 16 tokens and this prompt has 17"):
        reward(pictures[:1], long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(pictures[:1], long)
        reward(pictures[:1], "apple " * 14)


def test_a_weights_file_with_a_named_model(tmp_path, pictures, monkeypatch):
    (tmp_path / "Tiny-Test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path)
    file = tmp_path / "weights.safetensors"
    save_file(tiny(seed=3).state_dict(), file)
    expected = plain_clipscore("Tiny-Test", pictures, PROMPTS, pretrained=str(file))
    reward = as_reward(f"clip(model=Tiny-Test, pretrained={file})")
    torch.testing.assert_close(reward(pictures, PROMPTS).value, expected, rtol=0, atol=1e-5)


def test_bfloat16_is_close(folder, pictures):
    exact = Clip(pretrained=str(folder))(pictures, PROMPTS).value
    rough = Clip(pretrained=str(folder), precision="bf16")(pictures, PROMPTS).value
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


def test_video_is_the_mean_of_its_frames(folder, pictures):
    reward = Clip(pretrained=str(folder))
    frames = tensor(pictures)[:4]
    each = reward(frames, ["snow", "snow", "two dogs", "two dogs"]).value
    video = reward(frames.view(2, 2, *frames.shape[1:]), ["snow", "two dogs"]).value
    torch.testing.assert_close(video, each.view(2, 2).mean(1))


def test_inference_mode_leaves_nothing_that_blocks_gradients(folder, pictures):
    load.cache_clear()
    reward = Clip(pretrained=str(folder))
    with torch.inference_mode():
        reward(pictures, PROMPTS)
    x = tensor(pictures).requires_grad_()
    reward(x, PROMPTS).value.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("stickers", [False, True])
def test_loading_leaves_the_callers_random_state(folder, stickers):
    load.cache_clear()
    before = torch.get_rng_state()
    reward = Clip(model="stickers") if stickers else Clip(pretrained=str(folder))
    reward.for_model(SimpleNamespace(device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_must_be_text(folder, pictures):
    with pytest.raises(OptionError, match="prompt 1 is None"):
        Clip(pretrained=str(folder))(pictures[:2], ["a", None])


@pytest.mark.parametrize(
    ("model", "pretrained", "right"),
    [
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-B/32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-H-14", "dfn5b", "ViT-H-14-quickgelu"),
    ],
)
def test_wrong_activation_is_refused_before_any_weights(model, pretrained, right):
    # Offline, anything that went for the weights would raise WeightsError instead.
    with pytest.raises(OptionError, match=f"Use model={right}\\."):
        Clip(model=model, pretrained=pretrained).for_model(None)


def test_right_activations_pass():
    for model, tag in (
        ("ViT-L-14-quickgelu", "openai"),
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-H-14", "laion2b_s32b_b79k"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k"),
    ):
        assert resolve(model, tag) == (model, tag)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("clip(model=ViT-B-23)", OptionError, "Did you mean 'ViT-B-32'"),
        ("clip(model=ViT-H-14, pretrained=laion2b_s32b)", OptionError, "'laion2b_s32b_b79k'"),
        ("clip(model=hf-hub:a/b, pretrained=laion2b)", OptionError, "its own weights"),
        ("clip(model=stickers, pretrained=laion2b)", OptionError, "its own weights"),
        ("clip(model=stickers, precision=bf16)", OptionError, "fp32"),
        ("clip(pretrained=/no/where.safetensors)", WeightsError, "no weights file or folder at"),
        ("clip(model=local-dir:/no/where)", WeightsError, "no open_clip_config.json"),
    ],
)
def test_what_cannot_be_loaded(spec, error, message):
    with pytest.raises(error, match=message):
        as_reward(spec)(torch.rand(1, 3, 8, 8), "x")


def test_options_are_checked_at_once():
    with pytest.raises(OptionError, match="fp32, bf16, fp16"):
        as_reward("clip(precision=int8)")
    with pytest.raises(OptionError, match="1 or more"):
        as_reward("clip(batch_size=0)")


def test_missing_weights_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        Clip(model="ViT-B-32", pretrained="laion2b_s34b_b79k").for_model(None)
    message = str(caught.value)
    assert "'laion/CLIP-ViT-B-32-laion2B-s34B-b79K'" in message
    assert "clip(model=ViT-B-32, pretrained=/path/to/file.safetensors)" in message


def test_a_folder_without_weights_does_not_run_on_random_ones(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    with pytest.raises(WeightsError, match="holds no weights"):
        Clip(pretrained=str(tmp_path)).for_model(None)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(WeightsError, match="could not be loaded"):
        Clip(pretrained=str(tmp_path)).for_model(None)


def test_bare_clip_becomes_the_sticker_clip_on_the_sticker_model(folder):
    model = SimpleNamespace(name="stickers", device=torch.device("cpu"))
    assert resolve_reward("clip", model).spec == "clip(model=stickers)"
    assert resolve_reward("2*clip + brightness", model).spec == (
        "2*clip(model=stickers) + brightness"
    )
    assert resolve_reward("clip(scale=100)", model).spec == "clip(model=stickers, scale=100.0)"
    other = f"clip(pretrained={folder})"
    assert resolve_reward(other, model).spec == other


def test_the_sticker_clip_tells_stickers_apart():
    prompts = ["a photo of a red apple", "a photo of a blue bus", "a photo of a green clock"]
    drawn = np.stack([StickerWorld().render(prompt, seed=1) for prompt in prompts])
    reward = as_reward("clip(model=stickers)")
    table = torch.stack([reward(drawn, prompt).value for prompt in prompts])
    assert table.argmax(0).tolist() == [0, 1, 2]
    assert table.diagonal().min() > 0.3
    large = torch.nn.functional.interpolate(
        torch.from_numpy(drawn).movedim(-1, 1) / 255, (128, 128)
    )
    torch.testing.assert_close(reward(large, prompts).value, table.diagonal(), rtol=0, atol=0.05)

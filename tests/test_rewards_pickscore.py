"""PickScore against transformers' own processor and model, on a tiny checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers as H

from steering.errors import OptionError, RewardError, WeightsError
from steering.rewards import as_reward
from steering.rewards.networked import at_work
from steering.rewards.pickscore import PickScore, clip_towers
from tests.tiny_rewards import (
    PROMPTS,
    check_contract,
    clip_folder,
    pictures,
    slope_error,
    tensor,
    tokenizer,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("pickscore"))


@torch.no_grad()
def plain(folder, images, prompts):
    """The authors' snippet: processor, two normalised embeddings, exp(logit_scale) * dot."""
    net = H.CLIPModel.from_pretrained(folder).eval()
    size = {"shortest_edge": 32}
    processor = H.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    words = H.AutoTokenizer.from_pretrained(folder)
    tokens = words(prompts, padding=True, truncation=True, max_length=9, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    image = net.get_image_features(pixel_values=pixels).pooler_output
    text = net.get_text_features(**tokens).pooler_output
    image, text = (v / v.norm(dim=-1, keepdim=True) for v in (image, text))
    return net.logit_scale.exp() * (image * text).sum(-1)


def test_score_equals_the_published_recipe(folder):
    images = pictures()
    reward = PickScore(model=str(folder), batch_size=3)
    whole = check_contract(reward, tensor(images), PROMPTS, atol=2e-4)
    assert whole.std() > 0.1
    torch.testing.assert_close(whole, plain(folder, images, PROMPTS), rtol=0, atol=0.02)
    assert as_reward(reward.spec) == reward
    halved = PickScore(model=str(folder), scale=0.5)(images, PROMPTS).value
    torch.testing.assert_close(halved, 0.5 * whole, rtol=1e-4, atol=1e-4)


def test_each_prompt_is_encoded_once(folder):
    reward = PickScore(model=str(folder))
    encoder = reward._ready("cpu")
    encoder._text.clear()
    rows = []
    embedding = encoder.model.net.text_model.embeddings
    handle = embedding.register_forward_hook(lambda m, x, y: rows.append(len(y)))
    images = tensor(pictures())
    reward(images, PROMPTS)
    PickScore(model=str(folder), scale=2.0)(images, PROMPTS)
    handle.remove()
    assert rows == [len(set(PROMPTS))]


def test_another_checkpoint_has_its_own_text(folder, tmp_path):
    other = clip_folder(tmp_path, seed=5)
    images = pictures(2)
    first = PickScore(model=str(folder))(images, PROMPTS[:2]).value
    second = PickScore(model=str(other))(images, PROMPTS[:2]).value
    assert (first - second).abs().min() > 1e-3
    torch.testing.assert_close(second, plain(other, images, PROMPTS[:2]), rtol=0, atol=0.02)


def test_the_tokenizer_may_live_elsewhere(folder, tmp_path):
    bare, words = tmp_path / "bare", tmp_path / "words"
    clip_folder(bare, tokens=False)
    tokenizer(words, "<start>", "<end>", "<pad>")
    images = pictures(2)
    got = PickScore(model=str(bare), tokenizer=str(words))(images, "a red apple").value
    torch.testing.assert_close(got, PickScore(model=str(folder))(images, "a red apple").value)
    with pytest.raises(WeightsError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        PickScore(model=str(bare)).for_model(None)


def test_gradient_is_the_slope(folder):
    x = 0.2 + 0.6 * tensor(pictures(3))
    assert slope_error(PickScore(model=str(folder), batch_size=2), x, PROMPTS[:3]) < 0.02


PRECISIONS = ("fp32", "bf16")


def test_bfloat16_is_close(folder):
    images = pictures()
    exact = PickScore(model=str(folder))(images, PROMPTS).value
    rough = PickScore(model=str(folder), precision="bf16")(images, PROMPTS).value
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.03 * 14.3)
    scales = [clip_towers(str(folder), "", p, "cpu", "x").model.logit_scale for p in PRECISIONS]
    assert float(scales[0]) == float(scales[1])  # a rounded one would shift every value


def test_offload_moves_the_network_only_when_no_gradient_can_follow(folder, monkeypatch):
    reward = PickScore(model=str(folder), offload=True)
    net = reward._ready("cpu")
    moves = []
    monkeypatch.setattr(net.model, "to", lambda where: moves.append(str(where)))
    images = tensor(pictures(2))
    reward(images, "a")
    assert moves == ["cpu"]
    reward(images.requires_grad_(), "a")
    assert moves == ["cpu"]
    with torch.no_grad():
        reward(images, "a")
    assert len(moves) == 2
    with pytest.raises(KeyError), at_work(net, offload=True):
        raise KeyError
    assert len(moves) == 3


def test_long_prompts_warn(folder):
    with pytest.warns(UserWarning, match="pickscore reads 9 tokens and this prompt has 14"):
        PickScore(model=str(folder))(pictures(1), "apple " * 12)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (torch.full((1, 3, 8, 8), 200.0), "a", OptionError, "Divide by 255"),
        (torch.rand(3, 8, 8), "a", OptionError, r"images\[None\]"),
        (torch.rand(2, 3, 8, 8), ["a"], OptionError, "1 prompts for 2 images"),
        (torch.full((1, 3, 8, 8), torch.nan), "a", RewardError, "NaN"),
        (torch.rand(1, 3, 8, 8), [None], OptionError, "prompt 0 is None"),
    ],
)
def test_bad_input(folder, images, prompts, error, message):
    with pytest.raises(error, match=message):
        PickScore(model=str(folder))(images, prompts)


def test_bad_options_and_missing_weights():
    with pytest.raises(OptionError, match="fp32, bf16, fp16"):
        as_reward("pickscore(precision=int8)")
    with pytest.raises(OptionError, match="1 or more"):
        as_reward("pickscore(batch_size=0)")
    with pytest.raises(WeightsError) as caught:
        as_reward("pickscore").for_model(None)
    assert "yuvalkirstain/PickScore_v1" in str(caught.value)
    assert "--local-dir" in str(caught.value)
    with pytest.raises(WeightsError, match="no folder '/no/where'"):
        as_reward("pickscore(model=/no/where)").for_model(None)

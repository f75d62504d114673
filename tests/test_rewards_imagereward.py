"""ImageReward: the authors' keys and mathematics, written out here in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as H

from steering.errors import OptionError, RewardError, WeightsError
from steering.rewards import as_reward
from steering.rewards.imagereward import ImageReward
from steering.rewards.pixels import PixelSpec
from tests.tiny_rewards import PROMPTS, check_contract, pictures, slope_error, tensor, tokenizer

WIDE, HIDDEN, PATCH, SIDE, WORDS, ROOM = 128, 128, 8, 32, 40, 35


def author_state(seed=0):
    """Random weights under the names of the published checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, out, into, gain=1.5):
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) * gain / into**0.5
        state[f"{name}.bias"] = 0.2 * torch.randn(out, generator=generator)

    def norm(name, d):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(d, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(d, generator=generator)

    v = "blip.visual_encoder."
    state[f"{v}cls_token"] = torch.randn(1, 1, WIDE, generator=generator)
    n = (SIDE // PATCH) ** 2 + 1
    state[f"{v}pos_embed"] = torch.randn(1, n, WIDE, generator=generator)
    kernel = torch.randn(WIDE, 3, PATCH, PATCH, generator=generator)
    state[f"{v}patch_embed.proj.weight"] = kernel / PATCH
    state[f"{v}patch_embed.proj.bias"] = torch.randn(WIDE, generator=generator)
    for i in range(2):
        b = f"{v}blocks.{i}."
        norm(f"{b}norm1", WIDE)
        norm(f"{b}norm2", WIDE)
        linear(f"{b}attn.qkv", 3 * WIDE, WIDE)
        linear(f"{b}attn.proj", WIDE, WIDE)
        linear(f"{b}mlp.fc1", 96, WIDE)
        linear(f"{b}mlp.fc2", WIDE, 96)
    norm(f"{v}norm", WIDE)
    t = "blip.text_encoder."
    words = torch.randn(WORDS, HIDDEN, generator=generator)
    state[f"{t}embeddings.word_embeddings.weight"] = words
    places = torch.randn(48, HIDDEN, generator=generator)
    state[f"{t}embeddings.position_embeddings.weight"] = places
    state[f"{t}embeddings.position_ids"] = torch.arange(48)[None]
    norm(f"{t}embeddings.LayerNorm", HIDDEN)
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        for kind, into in (("attention", HIDDEN), ("crossattention", WIDE)):
            linear(f"{b}{kind}.self.query", HIDDEN, HIDDEN)
            linear(f"{b}{kind}.self.key", HIDDEN, into)
            linear(f"{b}{kind}.self.value", HIDDEN, into)
            linear(f"{b}{kind}.output.dense", HIDDEN, HIDDEN)
            norm(f"{b}{kind}.output.LayerNorm", HIDDEN)
        linear(f"{b}intermediate.dense", 96, HIDDEN)
        linear(f"{b}output.dense", HIDDEN, 96)
        norm(f"{b}output.LayerNorm", HIDDEN)
    for number, (out, into) in zip(
        (0, 2, 4, 6, 7), ((32, HIDDEN), (16, 32), (8, 16), (4, 8), (1, 4)), strict=True
    ):
        linear(f"mlp.layers.{number}", out, into, 1.0)
    return state


def attend(q, k, v, mask=None):
    n, heads = len(q), q.shape[-1] // 64
    q, k, v = (x.view(n, -1, heads, 64).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(64)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain(state, images, ids):
    """The published network, operation by operation."""

    def lin(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    pixels = torch.stack([H_pixels(image) for image in images])
    kernel, bias = state[f"{v}patch_embed.proj.weight"], state[f"{v}patch_embed.proj.bias"]
    x = F.conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{v}pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        q, k, val = lin(f"{b}attn.qkv", norm(f"{b}norm1", x, 1e-6)).chunk(3, -1)
        x = x + lin(f"{b}attn.proj", attend(q, k, val))
        x = x + lin(f"{b}mlp.fc2", F.gelu(lin(f"{b}mlp.fc1", norm(f"{b}norm2", x, 1e-6))))
    seen = norm(f"{v}norm", x, 1e-6)
    mask = ids != 0
    h = F.embedding(ids, state[f"{t}embeddings.word_embeddings.weight"])
    h = h + state[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(f"{t}embeddings.LayerNorm", h, 1e-12)
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        for kind, source, where in (("attention", None, mask), ("crossattention", seen, None)):
            s, other = f"{b}{kind}.", h if source is None else source
            keys, values = lin(f"{s}self.key", other), lin(f"{s}self.value", other)
            found = lin(f"{s}output.dense", attend(lin(f"{s}self.query", h), keys, values, where))
            h = norm(f"{s}output.LayerNorm", h + found, 1e-12)
        more = lin(f"{b}output.dense", F.gelu(lin(f"{b}intermediate.dense", h)))
        h = norm(f"{b}output.LayerNorm", h + more, 1e-12)
    x = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = lin(f"mlp.layers.{number}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def H_pixels(image):
    from open_clip.transform import image_transform

    from steering.rewards.pixels import CLIP_MEAN, CLIP_STD

    return image_transform(SIDE, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(image)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(author_state(), path / "ImageReward.pt")
    tokenizer(path, "[CLS]", "[SEP]", "[PAD]")
    return path


def reward_of(folder, **options):
    return ImageReward(model=str(folder), tokenizer=str(folder), **options)


def ids_of(folder, prompts):
    words = H.AutoTokenizer.from_pretrained(folder)
    return words(
        prompts, padding="max_length", truncation=True, max_length=ROOM, return_tensors="pt"
    )["input_ids"]


def test_score_equals_the_published_network(folder):
    images = pictures()
    reward = reward_of(folder, batch_size=3)
    whole = check_contract(reward, tensor(images), PROMPTS)
    assert whole.std() > 0.02
    expected = plain(author_state(), images, ids_of(folder, PROMPTS))
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=2e-4)
    assert as_reward(reward.spec) == reward


def test_text_matters_and_is_cut_at_35_tokens(folder):
    images = pictures(1)
    reward = reward_of(folder)
    some = torch.stack([reward(images, p).value[0] for p in ("two dogs", "snow", "a pizza")])
    assert some.std() > 1e-3
    long = "apple " * 33
    with pytest.warns(UserWarning, match="imagereward reads 35 tokens and this prompt has 36"):
        cut = reward(images, long + "dogs").value
    torch.testing.assert_close(cut, reward(images, long).value)


def test_gradient_is_the_slope(folder):
    x = 0.2 + 0.6 * tensor(pictures(2))
    assert slope_error(reward_of(folder), x, PROMPTS[:2]) < 0.02


def test_bfloat16_is_close(folder):
    images = pictures()
    exact, rough = (
        reward_of(folder, precision=p)(images, PROMPTS).value for p in ("fp32", "bf16")
    )
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)


def test_pixels_are_those_of_clip(folder):
    net = reward_of(folder)._ready("cpu")
    assert net.pixels == PixelSpec(size=SIDE)
    got = net.pixels.apply(tensor(pictures(1)))[0]
    torch.testing.assert_close(got, H_pixels(pictures(1)[0]), rtol=0, atol=1.01 / 255 / 0.26)


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(WeightsError) as caught:
        as_reward("imagereward").for_model(None)
    for word in ("ImageReward.pt", "'THUDM/ImageReward'", "--local-dir"):
        assert word in str(caught.value)
    with pytest.raises(WeightsError, match="bert-base-uncased"):
        ImageReward(model=str(folder)).for_model(None)
    broken = author_state()
    del broken["blip.visual_encoder.norm.weight"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(WeightsError, match="post_layernorm"):
        ImageReward(model=str(tmp_path / "broken.pt"), tokenizer=str(folder)).for_model(None)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="no ImageReward checkpoint"):
        ImageReward(model=str(tmp_path / "other.pt"), tokenizer=str(folder)).for_model(None)
    with pytest.raises(OptionError, match="prompt 0 is None"):
        reward_of(folder)(pictures(1), [None])
    with pytest.raises(RewardError, match="NaN"):
        reward_of(folder)(torch.full((1, 3, 40, 40), torch.nan), "a")

"""VQAScore on tiny checkpoints of its two kinds, against a plain loop over PIL images."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    T5ForConditionalGeneration,
)

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward, checkpoints, clip_t5
from steering.rewards.vqascore import VQAScore
from tests import tiny_judges, tiny_rewards

PROMPTS = ["a red apple", "two cats and a blue dog", "apple", "a photo of cats", "red", "", "a"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (7, 5, 6, 3)).astype(np.uint8)
    return [Image.fromarray(c).resize((50, 40), Image.Resampling.BICUBIC) for c in coarse]


def tensor(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).movedim(-1, 0) for p in pictures]) / 255


@pytest.fixture(scope="module", params=["tower inside", "pickled shards"])
def flan(request, tmp_path_factory):
    inside = request.param == "tower inside"
    folder = tmp_path_factory.mktemp("flan")
    return tiny_judges.clip_t5(folder, tower_inside=inside, pickled=not inside)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_judges.qwen_vl(tmp_path_factory.mktemp("qwen"))


@torch.no_grad()
def plain_flan(options, pictures, prompts):
    """One image at a time with PIL, the processor, and the loss of stock T5."""
    weights = {}
    for path in checkpoints.shards(checkpoints.Path(options["model"])):
        weights |= checkpoints.read_weights(path)
    loaded = clip_t5.load(**{k: v for k, v in zip(
        ("source", "vision", "tokenizer", "reward", "precision", "device"),
        (*options.values(), "vqascore", "fp32", "cpu"), strict=True)})  # fmt: skip
    t5 = T5ForConditionalGeneration(loaded.t5.config).eval()
    t5.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("mm_", "vision"))})
    tower = CLIPVisionModel.from_pretrained(options["vision"]).eval()
    inside = {k.removeprefix("vision_tower.vision_tower.vision_model."): v
              for k, v in weights.items() if k.startswith("vision_tower")}  # fmt: skip
    if inside:
        tower.load_state_dict(inside)
    processor = CLIPImageProcessor.from_pretrained(options["vision"])
    words = AutoTokenizer.from_pretrained(options["tokenizer"])
    w0, b0, w2, b2 = (weights[f"mm_projector.{k}"] for k in
                      ("0.weight", "0.bias", "2.weight", "2.bias"))  # fmt: skip
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    values = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in processor.image_mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        small = torch.from_numpy(np.array(square.resize((28, 28), Image.Resampling.BICUBIC)))
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        pixels = ((small / 255 - mean) / std).movedim(-1, 0)[None]
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = torch.nn.functional.gelu(patches @ w0.T + b0) @ w2.T + b2
        text = f'{system} USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '  # noqa: E501
        first, second = (torch.tensor([words(t).input_ids]) for t in text.split("<image>"))
        embedded = [t5.shared(first), features, t5.shared(second)]
        labels = torch.tensor([words("Yes").input_ids])
        loss = t5(inputs_embeds=torch.cat(embedded, 1), labels=labels).loss
        values.append(math.exp(-float(loss)))
    return torch.tensor(values)


def test_clip_flan_t5_is_the_authors_score(flan, pictures):
    reward = VQAScore(**flan, precision="fp32", batch_size=3)
    found = reward(tensor(pictures), PROMPTS)
    expected = plain_flan(flan, pictures, PROMPTS)
    assert expected.log().std() > 0.01
    torch.testing.assert_close(found.value, expected, rtol=2e-4, atol=0)
    assert (found.parts["p_yes"] >= found.value**2).all()
    assert as_reward(reward.spec) == reward


@torch.no_grad()
def plain_chat(folder, pictures, prompts, normalise):
    """One image at a time, all logits, spellings by hand."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    values = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        ask = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        text = (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            f"{ask}<|im_end|>\n<|im_start|>assistant\n"
        )
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        p = model(**inputs).logits[0, -1].softmax(-1)
        ids = processor.tokenizer.get_vocab()
        yes = sum(float(p[ids[w]]) for w in ("Yes", "yes", "YES", "ĠYes", "Ġyes") if w in ids)
        no = sum(float(p[ids[w]]) for w in ("No", "no", "NO", "ĠNo", "Ġno") if w in ids)
        values.append(yes / (yes + no) if normalise else yes)
    return torch.tensor(values)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_chat_model_gives_yes_over_yes_and_no(qwen, pictures, normalise):
    reward = VQAScore(model=str(qwen), precision="fp32", batch_size=4, normalise=normalise)
    found = reward(tensor(pictures), PROMPTS).value
    expected = plain_chat(qwen, pictures, PROMPTS, normalise)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["flan", "qwen"])
def test_a_batch_equals_single_calls_in_any_order(flan, qwen, pictures, kind):
    options = flan if kind == "flan" else {"model": str(qwen)}
    reward = VQAScore(**options, precision="fp32", batch_size=7)
    x = tensor(pictures)
    together = reward(x, PROMPTS).value
    alone = torch.cat([reward(x[k : k + 1], PROMPTS[k]).value for k in range(7)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = reward(x[order], [PROMPTS[k] for k in order]).value
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-6)


def test_one_forward_pass_a_batch(qwen, pictures):
    reward = VQAScore(model=str(qwen), precision="fp32", batch_size=7)
    reward(tensor(pictures[:1]), "apple")
    model = reward._open("cpu").model
    calls = []
    handle = model.register_forward_hook(lambda m, i, out: calls.append(out.logits.shape[:2]))
    reward(tensor(pictures), PROMPTS)
    handle.remove()
    assert calls == [(7, 1)]  # and the logits of one place only


def test_gradient_of_the_forward_against_central_differences(flan):
    loaded = VQAScore(**flan, precision="fp32")._open("cpu").model
    model = clip_t5.ClipT5(
        loaded.t5.double(), loaded.vision.double(), loaded.projector.double(),
        loaded.tokenizer, clip_t5.PixelSpec(size=28, quantise=False),
    )  # fmt: skip
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(2, 3, 28, 28, generator=generator, dtype=torch.float64)
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)

        def value(pixels):
            return model.log_answer(pixels, PROMPTS[:2], "Yes").mean(1).exp()

        x.requires_grad_()
        (gradient,) = torch.autograd.grad(value(x).sum(), x)
        h = 1e-3  # T5 takes its softmax in float32
        with torch.no_grad():
            near, far = (value(x + s * h * direction) - value(x - s * h * direction)
                         for s in (1, 2))  # fmt: skip
            slope = (8 * near - far) / (12 * h)
        along = (gradient * direction).sum((1, 2, 3))
        assert along.abs().min() > 1e-4
        torch.testing.assert_close(along, slope, rtol=2e-3, atol=0)
    finally:
        clip_t5.load.cache_clear()


@pytest.mark.parametrize("normalise", [True, False])
def test_gradient_of_the_chat_model_against_central_differences(qwen, normalise):
    # Of the size it is asked at, as the processor rounds what it resizes.
    x = 0.2 + 0.6 * tensor(tiny_rewards.pictures(2, size=(56, 56)))
    reward = VQAScore(model=str(qwen), precision="fp32", normalise=normalise)
    assert tiny_rewards.slope_error(reward, x, PROMPTS[:2]) < 0.03


@pytest.mark.parametrize("kind", ["flan", "qwen"])
def test_bfloat16_is_close(flan, qwen, pictures, kind):
    options = flan if kind == "flan" else {"model": str(qwen)}
    exact, rough = (
        VQAScore(**options, precision=p)(tensor(pictures), PROMPTS).value for p in ("fp32", "bf16")
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["flan", "qwen"])
def test_following_the_gradient_raises_the_score(flan, qwen, pictures, kind):
    options = flan if kind == "flan" else {"model": str(qwen)}
    reward = VQAScore(**options, precision="fp32")
    x = tensor(pictures).requires_grad_()
    value = reward(x, PROMPTS).value
    with torch.no_grad():
        torch.testing.assert_close(reward(x, PROMPTS).value, value)  # with and without gradient
    (gradient,) = torch.autograd.grad(value.sum(), x)
    step = 0.01 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    with torch.no_grad():
        better = reward((x + step).clamp(0, 1), PROMPTS).value > value
    assert better.all()


def test_loading_leaves_the_callers_random_state(flan):
    clip_t5.load.cache_clear()
    before = torch.get_rng_state()
    VQAScore(**flan).for_model(SimpleNamespace(device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    options = tiny_judges.clip_t5(tmp_path, tower_inside=False, pickled=False)
    path = tmp_path / "main" / "model.safetensors"
    weights = checkpoints.read_weights(path)
    for lost in ("mm_projector.2.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"):
        kept = {k: v for k, v in weights.items() if k != lost}
        tiny_judges.save_weights(kept, tmp_path / "main", pickled=False)
        with pytest.raises(WeightsError, match=f"lack 1 of the model's parameters.*{lost}"):
            VQAScore(**options)(torch.rand(1, 3, 8, 8), "x")


def test_what_is_missing_is_named(tmp_path, qwen):
    with pytest.raises(WeightsError, match=r"no folder '/no/where'.*give vqascore\(model=FOLDER"):
        VQAScore(model="/no/where").for_model(None)
    with pytest.raises(WeightsError, match="hf download owner/name --local-dir"):
        VQAScore(model="owner/name").for_model(None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors or"):
        VQAScore(model=str(tmp_path)).for_model(None)
    options = tiny_judges.clip_t5(tmp_path / "t", tower_inside=True, pickled=False)
    with pytest.raises(OptionError, match="overflows in fp16"):
        VQAScore(**options, precision="fp16").for_model(None)
    with pytest.raises(OptionError, match="must hold"):
        VQAScore(question="is it good?")


def test_a_missing_shard_is_named(tmp_path):
    options = tiny_judges.clip_t5(tmp_path, tower_inside=False, pickled=True)
    (tmp_path / "main" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match="lacks pytorch_model-00002-of-00002"):
        VQAScore(**options).for_model(None)

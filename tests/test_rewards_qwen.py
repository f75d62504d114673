"""HPSv3 and VideoReward on a tiny Qwen2-VL, against transformers' own processor and model."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers as H
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from steering.errors import OptionError, WeightsError
from steering.rewards import as_reward, hps3, qwen_reward
from steering.rewards.hps3 import HPS3
from steering.rewards.qwen_reward import fitted_size, merge_lora, patches, read_rubric, rename
from steering.rewards.videoreward import VideoReward
from tests.tiny_rewards import (
    PROMPTS,
    WORDS,
    check_contract,
    pictures,
    seeded,
    slope_error,
    tensor,
)

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
CHAT = "system user assistant You are helpful . rate this picture text - END".split()
RUBRIC = "rate this picture\ntext - {text_prompt}\nrate this <|Reward|>\nEND\n"
VIDEO_RUBRIC = "rate <|VQ_reward|> this <|MQ_reward|> text - {text_prompt} <|TA_reward|> END"
SMALL = 8 * 28 * 28


def words():
    listed = dict.fromkeys(["<pad>", "<unk>", *CHAT, *WORDS])
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    out = H.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    out.add_tokens(list(SPECIAL), special_tokens=True)
    return out


def config(tokenizer, more):
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer) + more,
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    }  # fmt: skip
    image, video = (tokenizer.convert_tokens_to_ids(t) for t in SPECIAL[4:])
    return H.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video
    )


def old_names(net):
    """Keys as transformers saved them when the checkpoints were made."""
    found = {}
    for key, value in net.state_dict().items():
        key = key if key.startswith("visual.") else key.replace("language_model.", "model.", 1)
        found[key] = value.contiguous()
    return found


def ranknet(seed=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = {0: (12, 32), 3: (6, 12), 5: (2, 6)}
    state = {}
    for k, (out, into) in shapes.items():
        weight = torch.randn(out, into, generator=generator) / math.sqrt(into)
        state[f"rm_head.{k}.weight"] = weight
        state[f"rm_head.{k}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return state


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hps3")
    tokenizer = words()
    tokenizer.save_pretrained(path)
    conf = config(tokenizer, more=1)
    net = seeded(lambda: H.Qwen2VLModel(conf), gain=4.0)
    conf.text_config.vocab_size += 7  # the base model has more words than the checkpoint
    conf.save_pretrained(path)
    head = {"lm_head.weight": torch.zeros(3, 32)}
    save_file({**old_names(net), **head, **ranknet()}, path / "HPSv3.safetensors")
    (path / "rubric.txt").write_text(RUBRIC)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(hps3, "PIXELS", SMALL)


def reward_of(folder, **options):
    return HPS3(
        model=str(folder), base=str(folder), rubric=str(folder / "rubric.txt"),
        **{"precision": "fp32"} | options,
    )  # fmt: skip


def body(folder, more=1):
    """The network in transformers' own class, filled by hand."""
    tokenizer = words()
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    net = H.Qwen2VLModel(config(words(), more))
    state = {}
    for key, value in (
        torch.load(folder, weights_only=True).items()
        if folder.suffix == ".pth"
        else (__import__("safetensors.torch").torch.load_file(folder).items())
    ):
        if key.startswith(("lm_head", "rm_head")):
            continue
        visual = key.startswith("visual.")
        state[key if visual else key.replace("model.", "language_model.", 1)] = value
    net.load_state_dict(state)
    return net.eval(), tokenizer


def hidden(net, tokenizer, text, pixels, grid, place):
    """The authors' forward for one picture: embeddings in, no token ids and no positions."""
    count = int(grid.prod()) // 4
    shown = "<|video_pad|>" if place == net.config.video_token_id else "<|image_pad|>"
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{shown * count}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat, return_tensors="pt")["input_ids"]
    embedded = net.get_input_embeddings()(ids)
    seen = net.visual(pixels, grid_thw=grid).pooler_output
    embedded = embedded.masked_scatter((ids == place)[..., None].expand_as(embedded), seen)
    out = net(input_ids=None, inputs_embeds=embedded, attention_mask=torch.ones_like(ids))
    return ids[0], out.last_hidden_state[0]


@torch.no_grad()
def plain(folder, images, prompts):
    net, tokenizer = body(folder / "HPSv3.safetensors")
    processor = H.Qwen2VLImageProcessor(min_pixels=SMALL, max_pixels=SMALL)
    head, values = ranknet(), []
    for image, prompt in zip(images, prompts, strict=True):
        batch = processor(
            images=[image], size={"shortest_edge": SMALL, "longest_edge": SMALL},
            return_tensors="pt",
        )  # fmt: skip
        text = RUBRIC.format(text_prompt=prompt)
        place = net.config.image_token_id
        ids, states = hidden(
            net, tokenizer, text, batch["pixel_values"], batch["image_grid_thw"], place
        )
        x = states[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")][0]
        for k in (0, 3, 5):
            x = torch.nn.functional.linear(
                x, head[f"rm_head.{k}.weight"], head[f"rm_head.{k}.bias"]
            )
            x = x.relu() if k < 5 else x
        values.append(x)
    return torch.stack(values)


def test_hps3_equals_the_published_recipe(folder):
    images = pictures(size=(100, 80))
    reward = reward_of(folder, batch_size=3)
    whole = check_contract(reward, tensor(images), PROMPTS)
    assert whole.std() > 1e-3
    expected = plain(folder, images, PROMPTS)
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found.value, expected[:, 0], rtol=0, atol=2e-3)
    torch.testing.assert_close(found.parts["sigma"], expected[:, 1], rtol=0, atol=2e-3)
    assert float((found.value - expected[:, 0]).abs().max()) < 0.1 * float(whole.std())
    assert as_reward(reward.spec) == reward


def test_prompt_and_picture_both_matter(folder):
    reward = reward_of(folder)
    texts = torch.stack([reward(pictures(1), p).value[0] for p in ("dogs", "snow", "a pizza")])
    assert texts.std() > 1e-4
    assert reward(pictures(3), "dogs").value.std() > 1e-4


def test_gradient_is_the_slope_and_bfloat16_is_close(folder):
    x = 0.2 + 0.6 * tensor(pictures(2))
    assert slope_error(reward_of(folder), x, PROMPTS[:2], 1e-4) < 0.01
    exact = reward_of(folder)(x, PROMPTS[:2]).value
    rough = reward_of(folder, precision="bf16")(x, PROMPTS[:2]).value
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [(100, 80), (512, 512), (77, 300), (1024, 576), (40, 40)])
def test_sizes_and_patches_are_those_of_the_processor(size):
    (image,) = pictures(1, size=size)
    limits = {"shortest_edge": SMALL, "longest_edge": SMALL}
    batch = H.Qwen2VLImageProcessor(size=limits)(images=[image], return_tensors="pt")
    frames = qwen_reward.fit_frames(tensor([image])[:, None], SMALL, SMALL)
    found, grid = patches(frames)
    assert grid.tolist() == batch["image_grid_thw"].tolist()
    error = (found - batch["pixel_values"]).abs() * 0.27 * 255
    assert error.max() <= 1.1
    assert error.mean() <= 0.02


def test_known_sizes():
    pixels = 256 * 28 * 28
    assert fitted_size(1024, 1024, pixels, pixels) == (448, 448)
    assert fitted_size(448, 448, pixels, pixels) == (448, 448)
    for side in ((768, 1344), (64, 64), (2000, 300)):
        high, wide = fitted_size(*side, pixels, pixels)
        assert high % 28 == wide % 28 == 0
        assert high * wide == pytest.approx(pixels, rel=0.25)
    with pytest.raises(OptionError, match="too narrow"):
        fitted_size(2000, 5, pixels, pixels)


def test_keys_of_any_release_are_understood():
    one = torch.zeros(1)
    new = {"model.visual.a": one, "model.language_model.b": one, "rm_head.weight": one}
    old = {"visual.a": one, "model.b": one, "rm_head.weight": one, "lm_head.weight": one}
    expected = {"net.visual.a", "net.language_model.b", "head.weight"}
    assert set(rename(new)) == set(rename(old)) == expected


ASPECT = {"VQ": (0.5, 2.0), "MQ": (-0.25, 0.5), "TA": (1.0, 4.0)}


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("videoreward")
    tokenizer = words()
    tokenizer.save_pretrained(path)
    conf = config(tokenizer, more=3)
    conf.save_pretrained(path)
    net = seeded(lambda: H.Qwen2VLModel(conf), seed=4, gain=4.0)
    generator = torch.Generator().manual_seed(1)
    plain_state, saved = old_names(net), {}
    for key, value in plain_state.items():
        name = f"base_model.model.{key}"
        if key.endswith("q_proj.weight"):
            down = torch.randn(2, value.shape[1], generator=generator)
            up = torch.randn(value.shape[0], 2, generator=generator)
            stem = name.removesuffix(".weight")
            saved[f"{stem}.lora_A.default.weight"] = down
            saved[f"{stem}.lora_B.default.weight"] = up
            saved[f"{stem}.base_layer.weight"] = value - 2.0 * up @ down
        else:
            saved[name] = value
    head = torch.randn(3, 32, generator=generator) / math.sqrt(32)
    saved["base_model.model.rm_head.original_module.weight"] = torch.zeros(3, 32)
    saved["base_model.model.rm_head.modules_to_save.default.weight"] = head
    for step, state in ((9, {"a": head}), (11, saved)):
        (path / f"checkpoint-{step}").mkdir()
        torch.save(state, path / f"checkpoint-{step}" / "model.pth")
    torch.save(plain_state, path / "plain.pth")
    torch.save(head, path / "head.pt")
    inference = {f"{a}_{k}": v for a, pair in ASPECT.items()
                 for k, v in zip(("mean", "std"), pair, strict=True)}  # fmt: skip
    (path / "model_config.json").write_text(json.dumps({
        "data_config": {"max_frame_pixels": SMALL, "prompt_template_type": "detailed_special"},
        "peft_lora_config": {"lora_r": 16, "lora_alpha": 32},
        "inference_config": inference,
    }))  # fmt: skip
    (path / "prompt_template.py").write_text(
        f"import nothing_of_this_name\nOTHER = 1\n"
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {VIDEO_RUBRIC!r}\n"
    )
    return path


def video_of(folder, **options):
    return VideoReward(
        model=str(folder), base=str(folder), rubric=str(folder / "prompt_template.py"),
        **{"precision": "fp32"} | options,
    )  # fmt: skip


@torch.no_grad()
def plain_video(folder, videos, prompts):
    net, tokenizer = body(folder / "plain.pth", more=3)
    marks = [f"<|{a}_reward|>" for a in ASPECT]
    tokenizer = words()
    tokenizer.add_tokens(marks, special_tokens=True)
    head = torch.load(folder / "head.pt", weights_only=True)
    values = []
    for video, prompt in zip(videos, prompts, strict=True):
        frames = qwen_reward.fit_frames(video[None], SMALL, SMALL)[0]
        if len(frames) % 2:
            frames = torch.cat([frames, frames[-1:]])
        t, (h, w) = len(frames) // 2, (side // 14 for side in frames.shape[-2:])
        rows = [
            frames[2 * a : 2 * a + 2, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
            .transpose(0, 1).flatten()
            for a in range(t) for by in range(h // 2) for bx in range(w // 2)
            for y in (2 * by, 2 * by + 1) for x in (2 * bx, 2 * bx + 1)
        ]  # fmt: skip
        grid = torch.tensor([[t, h, w]])
        text = VIDEO_RUBRIC.format(text_prompt=prompt)
        place = net.config.video_token_id
        ids, states = hidden(net, tokenizer, text, torch.stack(rows), grid, place)
        logits = torch.stack([
            (states[ids == tokenizer.convert_tokens_to_ids(m)] @ head.T)[0, k]
            for k, m in enumerate(marks)
        ])  # fmt: skip
        constants = torch.tensor(list(ASPECT.values()))
        values.append((logits - constants[:, 0]) / constants[:, 1])
    return torch.stack(values)


@pytest.mark.parametrize("frames", [4, 3, 1])
def test_videoreward_equals_the_published_recipe(video_folder, frames):
    video = tensor(pictures(3 * frames, size=(60, 40))).view(3, frames, 3, 40, 60)
    prompts = ["two dogs", "snow", "a red apple left of a pizza"]
    reward = video_of(video_folder, batch_size=2)
    whole = check_contract(reward, video, prompts)
    found = reward(video, prompts)
    expected = plain_video(video_folder, video, prompts)
    assert whole.std() > 1e-3
    torch.testing.assert_close(found.value, expected.sum(1), rtol=1e-3, atol=1e-3)
    for k, aspect in enumerate(ASPECT):
        torch.testing.assert_close(found.parts[aspect], expected[:, k], rtol=1e-3, atol=1e-3)


def test_videoreward_has_its_slope_and_bfloat16_is_close(video_folder):
    video = 0.2 + 0.6 * tensor(pictures(4, size=(60, 40))).view(2, 2, 3, 40, 60)
    prompts = ["two dogs", "snow"]
    assert slope_error(video_of(video_folder), video, prompts, 1e-4) < 0.01
    exact, rough = (
        video_of(video_folder, precision=p)(video, prompts).value for p in ("fp32", "bf16")
    )
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


def test_videoreward_takes_every_kth_frame(video_folder):
    video = tensor(pictures(6, size=(60, 40)))[None]
    thin = video_of(video_folder, every=2)(video, "snow").value
    torch.testing.assert_close(thin, video_of(video_folder)(video[:, ::2], "snow").value)


def test_low_rank_updates_are_added():
    generator = torch.Generator().manual_seed(0)
    down, up, base = (torch.randn(s, generator=generator) for s in ((2, 5), (4, 2), (4, 5)))
    saved = {
        "base_model.model.x.base_layer.weight": base,
        "base_model.model.x.lora_A.default.weight": down,
        "base_model.model.x.lora_B.default.weight": up,
        "base_model.model.y.bias": base[0],
    }
    found = merge_lora(saved, 0.5)
    assert set(found) == {"x.weight", "y.bias"}
    torch.testing.assert_close(found["x.weight"], base + 0.5 * up @ down)
    assert merge_lora({"a": base}, 1.0) == {"a": base}


def test_rubrics_are_read_and_not_run(tmp_path):
    file = tmp_path / "texts.py"
    file.write_text('raise SystemExit\nA = "one "\nB = """two"""\n')
    assert read_rubric(file, ["A", "B"], "x") == "one two"
    with pytest.raises(WeightsError, match="no text named C"):
        read_rubric(file, ["C"], "x")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_rubric(tmp_path / "none.py", ["A"], "x")


def test_what_is_missing_is_said_first(folder, video_folder, tmp_path):
    with pytest.raises(WeightsError, match=r"hpsv3/dataset/data_collator_qwen\.py of https"):
        as_reward("hps3").for_model(None)
    with pytest.raises(OptionError, match="KwaiVGI/VideoAlign"):
        as_reward("videoreward")
    rubric = folder / "rubric.txt"
    with pytest.raises(WeightsError, match=r"HPSv3\.safetensors of the Hugging Face repository"):
        HPS3(rubric=str(rubric)).for_model(None)
    with pytest.raises(WeightsError, match=r"hps3 \(base\).*Qwen/Qwen2-VL-7B-Instruct"):
        HPS3(model=str(folder), rubric=str(rubric)).for_model(None)
    with pytest.raises(WeightsError, match="hf download KwaiVGI/VideoReward"):
        VideoReward(
            model=str(tmp_path), rubric=str(video_folder / "prompt_template.py")
        ).for_model(None)
    (tmp_path / "short.txt").write_text("no mark {text_prompt}")
    with pytest.raises(WeightsError, match=r"<\|Reward\|> once"):
        HPS3(model=str(folder), base=str(folder), rubric=str(tmp_path / "short.txt")).for_model(
            None
        )
    with pytest.raises(OptionError, match="special token of the model once"):
        reward_of(folder)(pictures(1), "dogs <|Reward|>")
    save_file(ranknet(), tmp_path / "HPSv3.safetensors")
    with pytest.raises(WeightsError, match="holds no Qwen2-VL"):
        HPS3(model=str(tmp_path), base=str(folder), rubric=str(rubric)).for_model(None)

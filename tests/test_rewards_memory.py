"""Micro-batches by memory, and networks that wait on the CPU between calls."""

from __future__ import annotations

import itertools
import json
import warnings
from unittest import mock

import pytest
import torch
import transformers as H
from safetensors.torch import save_file

from steering.batch import out_of_memory
from steering.errors import RewardError
from steering.rewards import as_reward
from steering.rewards.memory import RewardMemoryError, in_batches
from steering.rewards.networked import Placed, at_work
from tests import tiny_detectors, tiny_judges
from tests.tiny_rewards import OPEN_CLIP, open_clip_weights, pictures, seeded, tensor

PROMPTS = ["a red apple", "two dogs", "apple", "a cat", "snow"]
GRADIENT = ("clip", "diversity", "vqascore", "vqascore chat", "count")
KINDS = (*GRADIENT, "vlm", "vlm text", "unified")


def memory_for(most, sizes):
    def job(rows):
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
        return list(range(rows.start, rows.stop))

    return job


@pytest.mark.parametrize(
    ("size", "most", "tried"),
    [
        (4, 9, [4, 4, 2]),
        (16, 9, [10, 5, 5]),
        (8, 3, [8, 4, 2, 2, 2, 2, 2]),
        (3, 1, [3, 1, *[1] * 9]),
    ],
)
def test_rows_are_halved_until_they_fit_and_keep_their_order(size, most, tried):
    sizes = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = in_batches(memory_for(most, sizes), 10, size, "clip")
    assert list(itertools.chain(*found)) == list(range(10))
    assert sizes == tried
    assert len(said) == (min(size, 10) > most)
    for warning in said:
        assert "clip: no memory for" in str(warning.message)
        assert f"batch_size={tried[0] // 2} avoids" in str(warning.message)


def test_one_row_that_does_not_fit_is_a_clear_error():
    with (
        pytest.warns(UserWarning, match="no memory"),
        pytest.raises(RewardMemoryError, match=r"clip: .* a single image \(CUDA out of") as caught,
    ):
        in_batches(memory_for(0, []), 4, 4, "clip")
    assert isinstance(caught.value, RewardError)
    assert out_of_memory(caught.value)  # so that a search asks for less at once


def test_other_failures_are_not_tried_again():
    calls = []

    def job(rows):
        calls.append(rows)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(job, 4, 4, "clip")
    assert len(calls) == 1


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Kind -> (spec without its closing parenthesis, the module that does the work)."""
    at = tmp_path_factory.mktemp("memory")
    for name in ("clip", "dino", "qwen", "flan", "detr"):
        (at / name).mkdir()
    (at / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {"size": 32}})
    )
    save_file(
        open_clip_weights(at / "clip" / "w.safetensors"),
        at / "clip" / "open_clip_model.safetensors",
    )
    config = H.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=56, patch_size=14,
    )  # fmt: skip
    seeded(lambda: H.Dinov2Model(config)).save_pretrained(at / "dino")
    qwen = tiny_judges.qwen_vl(at / "qwen")
    flan = tiny_judges.clip_t5(at / "flan", tower_inside=False, pickled=False)
    parts = ", ".join(f"{k}='{v}'" for k, v in flan.items())
    tiny_detectors.BUILD["detr"](at / "detr")
    chat = f"model='{qwen}', precision=fp32"
    return {
        "clip": (f"clip(model='local-dir:{at / 'clip'}'", lambda r: r._ready("cpu").model.visual),
        "diversity": (f"diversity(model='{at / 'dino'}'", lambda r: r._ready("cpu").model.net),
        "vqascore": (f"vqascore({parts}, precision=fp32", lambda r: r._open("cpu").model.vision),
        "vqascore chat": (f"vqascore({chat}", lambda r: r._open("cpu").model),
        "count": (
            f"count(model='{at / 'detr'}', objects=apple, mode=smooth, threshold=0.3, "
            "temperature=0.5",
            lambda r: r._finder("cpu").model,
        ),
        "vlm": (f"vlm({chat}, task=yes_no, min_mass=0", lambda r: r._chat("cpu").model),
        "vlm text": (
            f"vlm({chat}, read=text, max_new_tokens=2, on_invalid=worst",
            lambda r: r._chat("cpu").model,
        ),
        "unified": (
            f"unified({chat}, max_new_tokens=2, on_invalid=worst",
            lambda r: r._chat("cpu").model,
        ),
    }


def asked(reward, x, prompts=PROMPTS):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be read")
        return reward(x, prompts).value


class Small:
    """A module with memory for few rows."""

    def __init__(self, module, most):
        self.most, self.widths = most, []
        self.handle = module.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, options):
        first = args[0] if args else options.get("input_ids", options.get("pixel_values"))
        self.widths.append(len(first))
        if len(first) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_reward_with_a_network_goes_on_with_smaller_batches(rewards, kind):
    spec, module = rewards[kind]
    reward = as_reward(f"{spec}, batch_size=5)")
    prompts = ["a"] * 5 if kind == "diversity" else PROMPTS
    x = tensor(pictures(5, size=(56, 56)))
    with torch.no_grad():
        whole = asked(reward, x, prompts)
        small = Small(module(reward), 1 if kind == "clip" else 2)
        try:
            with pytest.warns(UserWarning, match=f"{reward.name}: no memory for 5 images"):
                parts = asked(reward, x, prompts)
            small.most = 0
            with (
                pytest.warns(UserWarning, match="no memory"),
                pytest.raises(RewardMemoryError, match=f"{reward.name}: memory does not suffice"),
            ):
                asked(reward, x, prompts)
        finally:
            small.handle.remove()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert small.widths[:2] == [5, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_offload_leaves_the_network_on_the_cpu_unless_a_gradient_follows(rewards, kind):
    spec, module = rewards[kind]
    plain, reward = (as_reward(f"{spec}, offload={word})") for word in ("false", "true"))
    x = tensor(pictures(2, size=(56, 56)))
    moves = []

    def to(self, *where, **options):
        moves.append(str(where[0]))
        return self

    module(reward)
    with mock.patch.object(torch.nn.Module, "to", to):
        with torch.no_grad():
            first = asked(plain, x, "apple")
            assert moves == []  # it is where the images are
            assert torch.equal(asked(reward, x, "apple"), first)
            assert moves == ["cpu"]
        if kind in GRADIENT:
            asked(reward, x.requires_grad_(), "apple")
            assert moves == ["cpu"]
        moves.clear()
        reward.for_model(None)
        assert moves == ["cpu"]
    assert reward.measures == plain.measures


def test_a_network_that_is_in_its_place_is_not_moved_there_again():
    """``to`` walks all layers, at every call."""
    here = torch.device("cpu")
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    moves = []
    with mock.patch.object(module, "to", moves.append):
        with at_work(Placed(model=module, device=here), offload=False):
            assert moves == []
        module[1].running_mean = torch.empty(2, device="meta")  # half-way, as after an interrupt
        with at_work(Placed(model=module, device=here), offload=False):
            assert moves == [here]
        with at_work(Placed(model=module, device=here), offload=True):
            pass
    assert moves == [here, here, "cpu"]

"""Spec strings: what they mean, what they refuse, and that they rebuild the same reward."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from steering.errors import OptionError
from steering.rewards import (
    Brightness,
    Clip,
    FunctionReward,
    Jpeg,
    Reward,
    WeightedSum,
    as_reward,
    register,
)


@register("test_channel")
def channel(images, prompts, *, index: int = 0, gain: float = 1.0, label: str | None = None):
    """One channel."""
    return gain * images[:, index].mean((-2, -1))


def terms(spec):
    found = as_reward(spec)
    return [(w, r.spec) for w, r in found.terms], found.offset


@pytest.mark.parametrize(
    ("spec", "expected", "offset"),
    [
        ("brightness + 0.5*jpeg", [(1.0, "brightness"), (0.5, "jpeg")], 0.0),
        ("-brightness/2", [(-0.5, "brightness")], 0.0),
        ("jpeg*2 - 3 + 1.5", [(2.0, "jpeg")], -1.5),
        ("2*(brightness - jpeg/4) - brightness", [(1.0, "brightness"), (-0.5, "jpeg")], 0.0),
        ("- -1e-1*jpeg + brightness*-3", [(0.1, "jpeg"), (-3.0, "brightness")], 0.0),
        ("1 - brightness", [(-1.0, "brightness")], 1.0),
        ("brightness + jpeg(quality=95)", [(1.0, "brightness"), (1.0, "jpeg")], 0.0),
    ],
)
def test_arithmetic_of_specs(spec, expected, offset):
    assert terms(spec) == (expected, offset)


@pytest.mark.parametrize(
    "spec",
    [
        "clip",
        "clip + 0.5*brightness",
        "-0.5*brightness",
        "0.1*jpeg - 1e-07*brightness + 2",
        "clip(model=ViT-B-32, pretrained=laion2b_s34b_b79k) - 0.1*jpeg(quality=80)",
        "clip(pretrained='/data/my models/a, (b).pt', scale=2.5)",
        'clip(pretrained="it\'s here.pt")',
        r"clip(pretrained=C:\weights\clip.safetensors)",
        "test_channel(index=2, gain=0.30000000000000004)",
        "test_channel(label='3')",
        "brightness - 0*jpeg",
        "jpeg(sign=1)*(2 - 3)",
    ],
)
def test_round_trip(spec):
    once = as_reward(spec).spec
    assert as_reward(once).spec == once


def test_spec_of_objects_rebuilds_equal_objects():
    for reward in (
        Clip(model="hf-hub:apple/DFN2B-CLIP-ViT-L-14", scale=100.0),
        Clip(pretrained="none", device="cuda:0"),
        Jpeg(quality=7, sign=1),
        Brightness(),
    ):
        assert as_reward(reward.spec) == reward


def test_bare_words_take_the_type_of_the_option():
    assert as_reward("clip(pretrained=42)").pretrained == "42"
    assert as_reward("clip(scale=100)").scale == 100.0
    assert as_reward("clip(device=none)").device is None
    assert as_reward("clip(device='none')").device == "none"
    assert as_reward("clip( model = ViT-B-32 ,)").model == "ViT-B-32"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brigthness", "position 0.*Did you mean 'brightness'"),
        ("jpeg + brigthness", "position 7.*Did you mean 'brightness'"),
        ("jpeg(qualty=3)", "'qualty'. Did you mean 'quality'"),
        ("brightness(gain=1)", "no options"),
        ("jpeg(quality=high)", r"jpeg\(quality\) must be int; got 'high'"),
        ("jpeg(quality=9.5)", "must be int"),
        ("jpeg(quality=0)", "give 1 to 100"),
        ("jpeg(95)", "position 5.*option=value"),
        ("jpeg(quality=1, quality=2)", "twice"),
        ("jpeg(quality=1", r"at its end: expected , or \)"),
        ("jpeg*brightness", "numbers only"),
        ("1/jpeg", "numbers only"),
        ("jpeg/0", "division by zero"),
        ("jpeg jpeg", "position 5"),
        ("(jpeg", r"expected \)"),
        ("", "expected a reward"),
        ("3 + 4", "no reward"),
        ("1e999*jpeg", "too large"),
        ("(" * 50 + "jpeg" + ")" * 50, "parentheses"),
        ("__import__('os').system('true')", "position 0"),
        ("python:os:nothing_here", "Cannot import"),
        ("python:no_such_package.x:f", "Cannot import"),
        ("python:decimal:Decimal", "not a function"),
    ],
)
def test_errors_say_where_and_what(spec, message):
    with pytest.raises(OptionError, match=message):
        as_reward(spec)


def test_python_functions_only_with_consent(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "def red(images, *, gain: float = 1.0):\n    return gain * images[:, 0].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "0.5*python:my_rewards_for_test:red(gain=4.0)"
    images = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    found = as_reward(spec)
    torch.testing.assert_close(found(images, "x").value, torch.tensor([0.5, 1.0]))
    assert found.spec == spec
    with pytest.raises(OptionError, match="would run code"):
        as_reward(spec, allow_python=False)
    assert as_reward("0.5*jpeg", allow_python=False).spec == "0.5*jpeg"


@pytest.mark.parametrize(
    "spec",
    ["vlm(url=http://elsewhere/v1)", "clip + unified(url='https://127.0.0.1.elsewhere/v1')",
     "zsum(vlm(url='http://127.0.0.1@elsewhere/v1'), clip)", "vlm(key_env=AWS_SECRET)",
     "unified_pairs(url=http://127.0.0.1:8000/v1, key_env=AWS_SECRET)"],
)  # fmt: skip
def test_a_spec_from_a_file_does_not_say_who_gets_a_key(spec):
    with pytest.raises(OptionError, match=r"would send a key.*give the reward yourself"):
        as_reward(spec, allow_python=False)
    assert as_reward(spec).spec is not None


def test_a_spec_from_a_file_may_ask_this_machine_or_send_no_key():
    for spec in ("vlm(url=http://127.0.0.1:8000/v1)", "vlm(model=m)", "remote(url=http://far:1)"):
        assert as_reward(spec, allow_python=False).spec == spec


def test_a_lone_backslash_in_quotes_is_told():
    with pytest.raises(OptionError, match="written twice"):
        as_reward(r"clip(pretrained='C:\Users\clip.pt')")
    assert as_reward(r"clip(pretrained='C:\\Users')").pretrained == r"C:\Users"


def test_registered_function_has_options_and_a_spec():
    images = torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    found = as_reward("test_channel(index=2, gain=2)")
    torch.testing.assert_close(found(images, "x").value, torch.full((2,), 0.8))
    assert found.spec == "test_channel(index=2, gain=2.0)"
    assert as_reward(channel).spec == "test_channel"


def test_registered_class_gets_its_name_and_subclasses_do_not_pretend():
    @register("test_constant")
    @dataclass(frozen=True, kw_only=True)
    class Constant(Reward):
        """Always the same.

        More text.
        """

        value: float = 1.0

        def score(self, images, prompts, metadata):
            return images.new_full((len(images),), self.value)

    class Unregistered(Constant):
        pass

    assert Constant(value=2.0).spec == "test_constant(value=2.0)"
    assert as_reward("test_constant").describe == "Always the same"
    assert Unregistered().spec is None
    with pytest.raises(OptionError, match="registered twice"):
        register("test_constant")(lambda images: images)


def test_what_is_no_reward():
    with pytest.raises(OptionError, match="int is not a reward"):
        as_reward(3)
    with pytest.raises(OptionError, match=r"give Brightness\(\)"):
        as_reward(Brightness)
    reward = Brightness()
    assert as_reward(reward) is reward
    assert isinstance(as_reward(lambda images: images), FunctionReward)
    assert isinstance(as_reward("jpeg + 1"), WeightedSum)


def test_importing_the_package_loads_no_encoder_library():
    code = (
        "import sys, steering.rewards; "
        "assert not {'open_clip', 'transformers', 'diffusers', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_of_the_documentation_run():
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    scope = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "@register" in block:
            exec(block, scope)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    value = as_reward("channel(index=2) + sharpness(power=2)")(images, "x").value
    sharpness = images.diff(dim=-1).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(value, images[:, 2].mean((1, 2)) + sharpness)

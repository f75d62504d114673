"""Plain callables as rewards, and what rewards accept as images and prompts."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from steering.errors import OptionError, RewardError
from steering.rewards import Brightness, FunctionReward, as_reward
from steering.rewards.images import as_tensor, to_pil
from steering.scoring import score


@pytest.fixture
def images():
    return torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def mean(images):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    "convert",
    [
        lambda v: v,
        lambda v: v.double(),
        lambda v: v.numpy(),
        lambda v: v.tolist(),
        lambda v: tuple(v),
        lambda v: list(v.numpy()),
    ],
)
def test_any_list_of_numbers_will_do(images, convert):
    value = as_reward(lambda x: convert(mean(x)))(images, "x").value
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, mean(images))


def test_the_signature_decides_what_is_passed(images):
    prompts = ["a", "bb", "ccc"]
    lengths = torch.tensor([1.0, 2.0, 3.0])

    class Method:
        def __call__(self, batch, texts):
            return [len(t) for t in texts]

    class Module(torch.nn.Module):
        def forward(self, images, prompts):
            return torch.tensor([float(len(p)) for p in prompts])

    for fn in (
        lambda x, p: [len(t) for t in p],
        lambda *both: [len(t) for t in both[1]],
        lambda x, prompts=(): [len(t) for t in prompts],
        Method(),
        Module(),
        functools.partial(lambda k, x, p: [len(t) for t in p], 1),
    ):
        torch.testing.assert_close(as_reward(fn)(images, prompts).value, lengths)

    for fn in (mean, lambda x, gain=1.0: gain * mean(x)):
        torch.testing.assert_close(as_reward(fn)(images, prompts).value, mean(images))
    with_metadata = as_reward(lambda x, *, metadata: [m["k"] for m in metadata])
    found = with_metadata(images, prompts, metadata=[{"k": 1}, {"k": 2}, {"k": 3}]).value
    torch.testing.assert_close(found, lengths)


def test_signatures_that_cannot_work():
    for fn in (lambda: 1, lambda a, b, c: 1, lambda *, images: 1):
        with pytest.raises(OptionError, match=r"must take \(images, prompts\) or \(images\)"):
            as_reward(fn)


@pytest.mark.parametrize(
    "result",
    [1.0, torch.tensor(1.0), torch.zeros(3, 1), [1.0, 2.0], torch.zeros(4)],
)
def test_wrong_shapes_are_not_hidden(images, result):
    with pytest.raises(RewardError, match=r"expected shape \(3,\)"):
        score(as_reward(lambda x: result), images, ["x"] * 3)


@pytest.mark.parametrize("result", [None, {"a": 1}, ["x", "y", "z"], [[1.0], [1.0, 2.0], [3.0]]])
def test_what_is_no_number_at_all(images, result):
    with pytest.raises(RewardError, match="cannot be read as one number"):
        as_reward(lambda x: result)(images, "x")


def test_a_gradient_that_got_lost_is_an_error(images):
    x = images.clone().requires_grad_()
    with pytest.raises(RewardError, match="cut off from the images"):
        as_reward(lambda x: mean(x).tolist())(x, "x")
    assert not FunctionReward(lambda x: mean(x).tolist(), differentiable=False)(
        x, "x"
    ).value.requires_grad
    with torch.no_grad():
        as_reward(lambda x: mean(x).tolist())(x, "x")
    as_reward(mean)(x, "x").value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 90))


def test_pil_images_and_frames():
    images = torch.tensor([0, 100, 200, 255]).view(4, 1, 1, 1).expand(4, 3, 2, 7) / 255
    seen = FunctionReward(lambda pils: [p.getpixel((6, 1))[0] for p in pils], images="pil")
    assert seen(images, "x").value.tolist() == [0, 100, 200, 255]
    assert not seen.differentiable
    count = FunctionReward(lambda videos: [len(frames) for frames in videos], images="pil")
    assert count(images.view(2, 2, 3, 2, 7), "x").value.tolist() == [2, 2]
    with pytest.raises(OptionError, match="give 'tensor' or 'pil'"):
        FunctionReward(mean, images="numpy")


def test_callables_take_states_of_any_shape():
    points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) * 10
    value = as_reward(lambda x: -(x**2).sum(1))(points, [None] * 5).value
    torch.testing.assert_close(value, -(points**2).sum(1))


def test_a_function_may_write_into_what_it_is_given(images):
    def careless(x):
        return x.mul_(2).mean((1, 2, 3))

    before = images.clone()
    assert torch.allclose(as_reward(careless)(images, "x").value, 2 * mean(before))
    assert torch.equal(images, before)


def test_names(images):
    assert as_reward(mean).name == "mean"
    assert as_reward(mean).spec is None
    assert FunctionReward(mean, name="grey").name == "grey"


def test_every_kind_of_images_is_the_same_batch(images):
    eight = (images * 255).round().byte()
    last = eight.movedim(1, -1).numpy()
    pils = [Image.fromarray(a) for a in last]
    expected = eight.float() / 255
    for kind in (eight, expected, last, last.astype(np.float32) / 255, pils, list(expected)):
        torch.testing.assert_close(as_tensor(kind), expected)
    torch.testing.assert_close(as_tensor(pils[0]), expected[:1])
    torch.testing.assert_close(as_tensor([pils, pils]), expected.expand(2, 3, 3, 6, 5))
    assert as_tensor(pils[0].convert("L")).shape == (1, 3, 6, 5)
    back = np.stack([np.array(p) for p in to_pil(expected)])
    np.testing.assert_array_equal(back, last)
    half = as_tensor(expected.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 4, 4), OptionError, r"images\[None\]"),
        (torch.rand(2, 4, 4, 3), OptionError, "channels are last"),
        (torch.rand(2, 4, 4, 4), OptionError, r"got shape \(2, 4, 4, 4\)"),
        (torch.rand(0, 3, 4, 4), OptionError, "nothing to score"),
        ([], OptionError, "empty list"),
        (torch.rand(2, 3, 4, 4) * 2 - 1, OptionError, r"\(x \+ 1\) / 2"),
        (torch.rand(2, 3, 4, 4) * 255, OptionError, "Divide by 255"),
        (torch.full((2, 3, 4, 4), 1.002), OptionError, "1.002"),
        (torch.full((2, 3, 4, 4), float("nan")), RewardError, "NaN"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), OptionError, "int64"),
        ("picture.png", OptionError, "cannot read images from str"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], OptionError, "4x4, 5x4"),
    ],
)
def test_images_that_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        Brightness()(images, "x")


def test_overshoot_within_the_tolerance_passes():
    assert Brightness()(torch.full((1, 3, 2, 2), 1.0005), "x").value.item() > 1


def test_prompts(images):
    assert len(Brightness()(images, "one for all").value) == 3
    with pytest.raises(OptionError, match="2 prompts for 3 images"):
        Brightness()(images, ["a", "b"])
    with pytest.raises(OptionError, match="2 prompts for 3 images"):
        as_reward(lambda x, p: mean(x))(images, ["a", "b"])

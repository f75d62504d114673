"""Weighted sums: values, parts, single evaluation, and errors that name the component."""

from __future__ import annotations

import pytest
import torch

from steering.errors import OptionError, RewardError
from steering.rewards import Brightness, FunctionReward, Jpeg, Scores, as_reward
from steering.scoring import score


class Counted:
    """A reward of one's own, outside any class of the package."""

    spec = None
    differentiable = True

    def __init__(self, name, index):
        self.name, self.index, self.calls = name, index, 0

    def __call__(self, images, prompts, *, metadata=None):
        self.calls += 1
        value = images[:, self.index].mean((1, 2))
        return Scores(value=value, parts={"square": value**2})


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def red(images):
    return images[:, 0].mean((1, 2))


def blue(images):
    return images[:, 2].mean((1, 2))


def test_every_operator(images):
    a, b = as_reward(red), as_reward(blue)
    r, s = red(images), blue(images)
    for made, expected in [
        (a + b, r + s),
        (a - b, r - s),
        (0.5 * a, 0.5 * r),
        (a * 2, 2 * r),
        (a / 4, r / 4),
        (-a, -r),
        (a + 1.0, r + 1),
        (1 - a, 1 - r),
        (3 + a, r + 3),
        (2 * (a - b) / 4 + a - 1, 1.5 * r - 0.5 * s - 1),
        (sum([a, b, b]), r + 2 * s),
        (a + blue, r + s),
        (a - (b - 1), r - s + 1),
    ]:
        torch.testing.assert_close(made(images, "x").value, expected)


def test_parts_are_the_components_before_their_weights(images):
    mine = Counted("mine", 1)
    made = 0.5 * as_reward(red) - as_reward(blue) * 3 + mine
    scores = made(images, "x")
    green = images[:, 1].mean((1, 2))
    assert list(scores.parts) == ["red", "blue", "mine", "mine.square"]
    torch.testing.assert_close(scores.parts["red"], red(images))
    torch.testing.assert_close(scores.parts["mine.square"], green**2)
    torch.testing.assert_close(scores.value, 0.5 * red(images) - 3 * blue(images) + green)


def test_each_component_is_evaluated_once(images):
    mine = Counted("mine", 0)
    base = Brightness()
    made = base + mine - 0.25 * (base + mine) + 2 * Brightness()
    assert len(made.terms) == 2
    made(images, "x")
    assert mine.calls == 1
    assert made.terms[0][0] == 2.75


def test_two_components_of_one_name_keep_their_own_parts(images):
    scores = (Jpeg(quality=10) + Jpeg(quality=90))(images, "x")
    names = ["jpeg(quality=10)", "jpeg(quality=90)"]
    assert [k for k in scores.parts if not k.endswith(".kB")] == names
    assert (scores.parts["jpeg(quality=10)"] > scores.parts["jpeg(quality=90)"]).all()
    one, two = (FunctionReward(lambda x, k=k: k * red(x), name="same") for k in (1, 2))
    assert len((one + two)(images, "x").parts) == 2


def test_differentiable_if_all_weighted_parts_are():
    assert (Brightness() + red).differentiable
    assert not (Brightness() + Jpeg()).differentiable
    assert (Brightness() + 0 * Jpeg()).differentiable


def test_gradient_is_the_weighted_sum(images):
    x = images.clone().requires_grad_()
    (2 * as_reward(red) - 0.5 * Brightness())(x, "x").value.sum().backward()
    expected = torch.tensor([2 - 0.5 * 0.299, -0.5 * 0.587, -0.5 * 0.114]) / 64
    torch.testing.assert_close(x.grad, expected.view(3, 1, 1).expand_as(x))


def test_weight_zero_reports_and_does_not_steer(images):
    never = FunctionReward(lambda x: torch.full((len(x),), -torch.inf), name="never")
    scores = (as_reward(red) + 0 * never)(images, "x")
    torch.testing.assert_close(scores.value, red(images))
    assert torch.isinf(scores.parts["never"]).all()


def test_minus_infinity_stays_minus_infinity(images):
    veto = FunctionReward(lambda x: torch.where(torch.arange(len(x)) == 1, -torch.inf, 0.0))
    value = (as_reward(red) + 0.5 * veto)(images, "x").value
    assert torch.isinf(value).tolist() == [False, True, False, False]


def test_a_bad_component_is_named(images):
    short = FunctionReward(lambda x: x.new_zeros(1), name="short")
    with pytest.raises(RewardError, match=r"'short' must return.*a part of 'brightness \+ short'"):
        score(Brightness() + short, images, ["x"] * 4)
    nan = FunctionReward(lambda x: x.new_full((len(x),), torch.nan), name="broken")
    with pytest.raises(RewardError, match="'broken' returned no usable number for 4 of 4"):
        score(nan - Brightness(), images, ["x"] * 4)


def test_spec_is_lost_with_a_component_that_has_none():
    assert (Brightness() + red).spec is None
    assert (Brightness() + red).name == "brightness + red"
    assert (Brightness() + 2).spec == "brightness + 2"


def test_what_cannot_be_computed():
    with pytest.raises(OptionError, match="zero"):
        Brightness() / 0
    with pytest.raises(OptionError, match="finite"):
        Brightness() * float("nan")
    for bad in (lambda: Brightness() * Jpeg(), lambda: Brightness() + "jpeg", lambda: 1 / Jpeg()):
        with pytest.raises(TypeError):
            bad()


def test_for_model_reaches_every_component():
    class Adapting(Counted):
        def for_model(self, model):
            return Counted(f"for {model}", self.index)

    made = (2 * (Brightness() + Adapting("a", 0)) - 1).for_model("m")
    assert [(w, r.name) for w, r in made.terms] == [(2.0, "brightness"), (2.0, "for m")]
    assert made.offset == -1.0


def test_a_sum_is_scaled_with_its_constant(images):
    one = as_reward("brightness")(images, "x").value
    found = (2 * (as_reward("brightness") + 3.0))(images, "x").value
    torch.testing.assert_close(found, 2 * one + 6)


def test_minus_infinity_of_weight_zero_does_not_count(images):
    def never(images):
        return torch.full((len(images),), -torch.inf)

    found = (as_reward("brightness") + 0 * FunctionReward(never))(images, "x").value
    torch.testing.assert_close(found, as_reward("brightness")(images, "x").value)

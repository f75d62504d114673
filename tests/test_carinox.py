"""CARINOX climbs the reward it was given, one term at a time; the ledger counts every pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import steering
from steering.analytic import GaussianMixture
from steering.errors import OptionError
from steering.rewards import as_reward
from steering.rewards.calibration import Calibration, Constants
from steering.rewards.compose import ByCategory, ClippedGradient, Min, ZSum
from steering.samplers import CARINOX, DNO, ReNO
from steering.scoring import Scores


def first(images, prompts):
    return 3.0 * images[:, 0]


def second(images, prompts):
    return 0.5 * images[:, 1]


def bowl(images, prompts):
    return -(images - 0.3).square().sum(1)


def with_sigma(images, prompts):
    """A reward with a diagnostic that points the other way."""
    return Scores(value=images[:, 0], parts={"sigma": -3.0 * images[:, 0]})


for fn in (first, second, bowl, with_sigma):
    fn.differentiable = True

A, B, C = as_reward(first), as_reward(second), as_reward(bowl)
DIAGNOSED = as_reward(with_sigma)
MEASURED = Calibration({"first": Constants(1.0, 3.0, 8, 1), "second": Constants(0.0, 0.5, 8, 1)})
COLOURS = {"color": {"first": 0.25, "second": 2.0}, "shape": {"first": 1.0, "second": 0.0}}


def by_category(kind: str) -> ByCategory:
    kinds = {"p": kind, "q": "shape", "r": "color"}
    return ByCategory(A, 2.0 * B, weights=COLOURS, categories=kinds)


def world(steps: int = 3, prompts: str = "p") -> GaussianMixture:
    return GaussianMixture([1.0], [[0.0, 0.0]], [1.0], steps=steps, prompts=tuple(prompts))


def step(cls: type, reward: object, **options: object) -> torch.Tensor:
    """How far one small step of plain ascent moves the sample, over its length, [2]."""
    plain = {"momentum": 0.0, "regulariser": "none", "reward_scale": 1.0, "clip": None, "lr": 1e-3}
    seen: list[torch.Tensor] = []

    def listen(task: object, progress: Any) -> None:
        seen.extend([] if progress.preview is None else [progress.preview[0]])

    method = cls(n_iterations=2, restarts=1, **{**plain, **options})
    steering.steer(world(), reward=reward, method=method, seed=4, listener=listen)
    return (seen[1] - seen[0]) / 1e-3


def spent(method: object, reward: object = C, steps: int = 8) -> Any:
    return steering.steer(world(steps), reward=reward, method=method).ledger


# --- what is climbed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward",
    [
        A - B,
        -2.0 * A + 3.0,
        A + 0.0 * B,
        DIAGNOSED,
        DIAGNOSED + B,
        by_category("color"),
        by_category("shape"),
        0.5 * by_category("color") - C,
        Min(A, B),
        Min(A, B) + C,
        ZSum(A, 2.0 * B, calibration=MEASURED),
        ClippedGradient(A, -1.0 * B, limit=0.7),
        C,
    ],
    ids=str,
)
def test_without_clips_the_sum_of_all_components_is_the_slope_of_the_reward(reward):
    """So that no sign and no weight is lost, and nothing counts twice."""
    wanted = step(ReNO, reward)
    assert wanted.norm() > 0.01
    torch.testing.assert_close(step(CARINOX, reward, component_clip=1e9), wanted)


def test_what_is_subtracted_goes_down():
    ahead = step(CARINOX, A - B)
    assert ahead[0] > 0.01
    assert ahead[1] < -0.01


def test_a_member_of_weight_zero_in_this_category_stands_still():
    ahead = step(CARINOX, by_category("shape"))
    assert ahead[0] > 0.01
    assert ahead[1] == 0.0
    ledger = spent(CARINOX(n_iterations=3, restarts=2), by_category("shape"))
    assert ledger.nfe_backward == 32  # nor is it differentiated


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", [{}, {"clip": 0.1}], ids=["component", "both"])
def test_weights_count_after_the_clip(clips):
    """Both gradients are cut to one length first; their ratio is what the weights make of it."""
    for reward, weights, ratio in (
        (A + B, None, 1.0),
        (A + B, {"first": 3.0}, 3.0),
        (3.0 * A - B, None, -3.0),
        (0.5 * A + 2.0 * B, {"first": 3.0}, 0.75),
        (ZSum(A, 4.0 * B, calibration=MEASURED), None, 0.25),
        (by_category("color"), None, 0.0625),
    ):
        ahead = step(CARINOX, reward, weights=weights, **clips)
        assert float(ahead[0] / ahead[1]) == pytest.approx(ratio, rel=1e-3)


def test_a_component_of_weight_zero_stands_still():
    ahead = step(CARINOX, A + B, weights={"second": 0.0})
    assert ahead[0] > 0.01
    assert ahead[1] == 0.0


@pytest.mark.parametrize(
    ("reward", "weights", "word"),
    [
        (A + B, {"frist": 2.0}, "frist.*first, second"),
        (C, {"bowl": 2.0}, "no sum"),
        (DIAGNOSED + B, {"with_sigma.sigma": 2.0}, "no component"),
        (A + B, {"first": 0.0, "second": 0.0}, "no component to climb"),
    ],
)
def test_weights_that_fit_no_component(reward, weights, word):
    with pytest.raises(OptionError, match=word):
        step(CARINOX, reward, weights=weights)


@pytest.mark.parametrize("reward", [A + B, ZSum(A, B, calibration=MEASURED), by_category("color")])
def test_names_of_sums_are_checked_before_the_first_call(reward):
    model = world(prompts="p")
    method = CARINOX(n_iterations=2, restarts=1, weights={"frist": 2.0})
    with pytest.raises(OptionError, match=r"frist.*first, second"):
        steering.steer(model, reward=reward, method=method)
    assert model.rows == 0
    for weights in ({"first": 2.0}, {"second": 0.5}):
        method = CARINOX(n_iterations=2, restarts=1, weights=weights)
        assert steering.steer(model, reward=reward, method=method).ledger.nfe_backward > 0


def test_a_reward_that_compares_has_no_components():
    with pytest.raises(OptionError, match="no sum"):
        CARINOX(weights={"first": 1.0}).check_reward(Min(A, B))


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_weights_that_are_none(weight):
    with pytest.raises(OptionError, match="weights"):
        CARINOX(weights={"first": weight})


@pytest.mark.parametrize("max_batch", [4, 64])
@pytest.mark.parametrize("reward", [A - 2.0 * B + 0.1 * C, by_category("color")], ids=str)
def test_terms_of_many_prompts_stay_with_their_rows(reward, max_batch):
    """Rows merged and split by the engine climb as they do alone, each by its own weights."""
    method = CARINOX(n_iterations=3, restarts=2, lr=0.1)
    many = steering.steer(
        world(prompts="pqr"), reward=reward, method=method, seed=[3, 4, 5], max_batch=max_batch
    )
    for k, prompt in enumerate("pqr"):
        one = steering.steer(world(prompts=prompt), reward=reward, method=method, seed=3 + k)
        torch.testing.assert_close(many[k].samples, one.samples, rtol=0, atol=1e-6)


# --- what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (ReNO(n_iterations=3), 16),
        (ReNO(n_iterations=3, restarts=4), 64),
        (ReNO(n_iterations=1, restarts=4), 0),
        (DNO(n_iterations=3), 16),
        (DNO(n_iterations=3, differentiate_last=2), 4),
        (DNO(n_iterations=5, differentiate_last=3, restarts=2, estimator="hybrid"), 24),
        (CARINOX(n_iterations=3, restarts=2), 32),
        (CARINOX(n_iterations=2, restarts=5), 40),
        (CARINOX(n_iterations=3, restarts=2, variables="all", eta=1.0, differentiate_last=2), 8),
    ],
)
def test_rows_differentiated_in_closed_form(method, rows):
    """restarts (K - 1) steps that are differentiated: the last iterate is only looked at."""
    ledger = spent(method)
    assert ledger.nfe_backward == rows
    pairs = method.restarts * (method.n_iterations - 1)
    assert ledger.decodes_backward == pairs
    hybrid = isinstance(method, DNO) and method.estimator == "hybrid"
    assert ledger.reward_backward == (0 if hybrid else pairs)


@pytest.mark.parametrize(
    ("samples", "options", "starts", "passes"),
    [(2, {}, 1, 2), (5, {}, 1, 5), (8, {}, 2, 4), (15, {}, 5, 3), (40, {}, 5, 8),
     (8, {"n_iterations": 4}, 2, 4), (8, {"restarts": 5}, 5, 1)],
)  # fmt: skip
def test_no_more_starts_than_the_budget_climbs_from(samples, options, starts, passes):
    """At least three iterations of each start, or one start."""
    result = steering.steer(
        world(steps=3), reward=C, method="carinox", options=options, nfe=3 * samples + 2
    )
    assert len(result.trace.column("radius")) == passes
    assert {len(rows) for rows in result.trace.column("radius")} == {starts}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_every_component_is_charged_its_backward_pass(checkpoint):
    method = CARINOX(n_iterations=3, restarts=2, checkpoint=checkpoint)
    one, two, three = (spent(method, reward) for reward in (C, A + B, A - B + C))
    assert [x.nfe_backward for x in (one, two, three)] == [32, 64, 96]
    assert [x.decodes_backward for x in (one, two, three)] == [4, 8, 12]
    assert one.nfe == two.nfe == three.nfe == 48
    again = [x.nfe_recomputed for x in (one, two, three)]
    assert again == ([32, 64, 96] if checkpoint else [0, 0, 0])

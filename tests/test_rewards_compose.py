"""Ensembles against their formulas, on rewards whose values are read off the pixels."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import steering
from steering.analytic import GaussianMixture
from steering.errors import OptionError, RewardError
from steering.registry import REWARDS
from steering.rewards import (
    ByCategory,
    Calibration,
    ClippedGradient,
    Lexicographic,
    Min,
    RankMean,
    Reward,
    ZSum,
    as_reward,
    measure,
    register,
)
from steering.rewards.calibration import Constants, groups
from steering.rewards.categories import CARINOX, CATEGORIES, guess
from steering.scoring import heldout_labels, searched

DATA = Path(os.environ.get("STEERING_TEST_DATA", "no-test-data"))


@register("test_plane")
@dataclass(frozen=True, kw_only=True)
class Channel(Reward):
    """Sum of one channel."""

    differentiable = True
    index: int = 0
    scale: float = 1.0
    steep: float = 1.0

    def score(self, images, prompts, metadata):
        return self.scale * self.steep * images[:, self.index].sum((1, 2))


@pytest.fixture(scope="module", autouse=True)
def known():
    """Under its name while this file's tests run, also where other files' run in between."""
    register("test_plane")(Channel)
    yield
    REWARDS._entries.pop("test_plane", None)


R, G, B = (f"test_plane(index={i})" for i in range(3))
RED = "test_plane"


def pixels(values):
    """Images of one pixel whose channels are the given numbers [n, 3] in [0, 1]."""
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)[:, :, None, None]


@pytest.fixture
def values():
    return np.random.default_rng(0).random((9, 3))


PROMPTS = ["a"] * 4 + ["b"] * 5


def constants(**pairs):
    table = {R: "r", RED: "r", G: "g", B: "b"}
    return Calibration(
        {k: Constants(*pairs[v], 10, 2) for k, v in table.items() if v in pairs}, "test"
    )


def test_calibrated_sum_uses_fixed_constants(values):
    known = constants(r=(0.4, 0.1), g=(0.5, 0.2))
    reward = ZSum(RED, 0.5 * as_reward(G), calibration=known)
    found = reward(pixels(values), PROMPTS)
    expected = (values[:, 0] - 0.4) / 0.1 + 0.5 * (values[:, 1] - 0.5) / 0.2
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)
    np.testing.assert_allclose(found.parts[G], values[:, 1], rtol=1e-6)
    assert reward.stationary
    assert reward.spread == pytest.approx(1.25**0.5)
    alone = reward(pixels(values[:1]), "a").value
    torch.testing.assert_close(alone, found.value[:1])


def test_without_constants_scores_are_standardised_per_prompt(values):
    reward = ZSum(RED, 0.5 * as_reward(G))
    found = reward(pixels(values), PROMPTS).value.numpy()
    for rows in (slice(0, 4), slice(4, 9)):
        z = stats.zscore(values[rows], axis=0)
        np.testing.assert_allclose(found[rows], z[:, 0] + 0.5 * z[:, 1], rtol=1e-3, atol=1e-5)
    assert not reward.stationary
    assert not (as_reward(R) + reward).stationary
    assert (as_reward(R) + 0 * reward).stationary
    assert reward(pixels(values[:1]), "a").value.item() == 0
    tied = reward(pixels(np.full((3, 3), 0.3)), "a").value
    assert tied.tolist() == [0, 0, 0]


def test_rank_mean_is_that_of_scipy(values):
    values[5] = values[6]
    found = RankMean(RED, 3 * as_reward(G), -1 * as_reward(B))(pixels(values), PROMPTS).value
    for rows in (slice(0, 4), slice(4, 9)):
        n = len(values[rows])
        ranks = (stats.rankdata(values[rows].astype("f4"), axis=0) - 1) / (n - 1)
        expected = (ranks[:, 0] + 3 * ranks[:, 1] + 1 - ranks[:, 2]) / 5
        np.testing.assert_allclose(found[rows], expected, rtol=1e-5)
    assert RankMean(RED)(pixels(values[:1]), "a").value.item() == 0.5


def test_minus_infinity_ranks_last_and_stays_last():
    def hard(images):
        return torch.where(images[:, 0, 0, 0] > 0.5, images[:, 0, 0, 0], -torch.inf)

    images = pixels([[0.9, 0.5, 0], [0.2, 0.5, 0], [0.6, 0.5, 0]])
    assert RankMean(hard)(images, "a").value.tolist() == [1, 0, 0.5]
    z = ZSum(hard, G)(images, "a").value
    assert torch.isneginf(z).tolist() == [False, True, False]
    assert z[0] > z[2]
    order = Lexicographic(R, hard)(images, "a").value
    assert torch.isfinite(order).all()
    assert order[1] == 0
    assert torch.isneginf(Lexicographic(hard, R)(images, "a").value).tolist() == [0, 1, 0]
    table = {"x": {"hard": 0.0, "test_plane": 1.0}}
    assert torch.isfinite(
        ByCategory(hard, R, weights=table, categories={"a": "x"})(images, "a").value
    ).all()


def test_nan_never_wins():
    def broken(images):
        return torch.tensor([1.0, torch.nan])

    images = pixels([[0.9, 0, 0], [0.2, 0, 0]])
    for make in (RankMean, ZSum, Min, Lexicographic, ClippedGradient):
        with pytest.raises(RewardError, match=r"'broken'.* no usable number for 1 of 2"):
            make(R, broken)(images, "a")


def test_min_takes_the_worst_after_calibration(values):
    raw = Min(R, G, B)(pixels(values), PROMPTS).value
    np.testing.assert_allclose(raw, values.min(1), rtol=1e-6)
    known = constants(r=(0.5, 0.1), g=(0.0, 1.0))
    scaled = Min(R, G, calibration=known)(pixels(values), PROMPTS).value
    expected = np.minimum((values[:, 0] - 0.5) / 0.1, values[:, 1])
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-6)
    # 2*red is another reward than red here, not red with a weight.
    doubled = Min(2 * as_reward(R), G)(pixels(values), PROMPTS).value
    np.testing.assert_allclose(doubled, np.minimum(2 * values[:, 0], values[:, 1]), rtol=1e-6)


def test_lexicographic_orders_as_tuples(values):
    coarse = np.c_[np.round(values[:, 0] * 2) / 2, np.round(values[:, 1] * 4) / 4, values[:, 2]]
    images = pixels(np.r_[coarse, coarse[:, [0, 2, 1]]])
    triples = np.r_[coarse, coarse[:, [0, 2, 1]]]
    reward = Lexicographic(R, G, B, step=0.25, scale=0.5)
    found = reward(images, "a").value
    keys = [(round(a / 0.25), round(b / 0.25), c) for a, b, c in triples]
    by_tuple = sorted(range(len(keys)), key=lambda i: keys[i])
    by_value = sorted(range(len(keys)), key=lambda i: float(found[i]))
    assert [keys[i] for i in by_tuple] == [keys[i] for i in by_value]
    assert reward.stationary
    assert not reward.differentiable


def test_clipped_gradient_is_cut_per_member_and_image():
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    steep = "test_plane(steep=1000.0)"
    reward = ClippedGradient(steep, 0.5 * as_reward("test_plane(index=1, steep=0.01)"), limit=2.0)
    found = reward(images, "a")
    red, green = images[:, 0].sum((1, 2)), images[:, 1].sum((1, 2))
    torch.testing.assert_close(found.value, 1000 * red + 0.005 * green)
    (gradient,) = torch.autograd.grad((3 * found.value).sum(), images)
    expected = torch.zeros_like(images)
    expected[:, 0] = 3 * 2.0 / 4  # sixteen equal entries of norm 2
    expected[:, 1] = 3 * 0.5 * 0.01  # below the limit: untouched
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        torch.testing.assert_close(reward(images, "a").value, found.value.detach())
    assert reward.differentiable


def test_category_weights_are_those_of_carinox(values):
    def hps(images):
        return images[:, 0, 0, 0]

    def imagereward(images):
        return images[:, 1, 0, 0]

    prompts = ["a red apple", "three dogs", "a dog on the left of a cat"] * 3
    found = ByCategory(hps, 2 * as_reward(imagereward))(pixels(values), prompts).value
    kinds = ["color", "numeracy", "2d_spatial"] * 3
    weights = [(CARINOX[k]["HPS"], 2 * CARINOX[k]["ImageReward"]) for k in kinds]
    np.testing.assert_allclose(found, (values[:, :2] * weights).sum(1), rtol=1e-5)


def test_categories_come_from_the_file_then_the_record_then_the_words(tmp_path):
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({k: {"test_plane": i + 1} for i, k in enumerate(CATEGORIES)}))
    known = tmp_path / "categories.json"
    known.write_text(json.dumps({"a red apple": [["shape", 1], ["texture", 3]]}))
    reward = as_reward(f"category(test_plane, weights={weights}, categories={known})")
    images = pixels([[1.0, 0, 0]] * 3)
    records = [{"category": "numeracy"}, {"category": "numeracy"}, {}]
    found = reward(images, ["a red apple", "a red bus", "a red bus"], metadata=records).value
    assert found.tolist() == [0.25 * 2 + 0.75 * 3, 7, 1]
    with pytest.raises(OptionError, match="'numbers'"):
        reward(images[:1], ["x"], metadata=[{"category": "numbers"}])
    with pytest.raises(OptionError, match="'test_plane'"):
        ByCategory(R)


def test_the_table_of_carinox_is_the_released_one():
    path = DATA / "carinox" / "weights.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    released = json.loads(path.read_text())
    assert released.pop("none") == dict.fromkeys(CARINOX["color"], 1)
    assert released == CARINOX


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a green bench and a red car", "color"),
        ("a round bowl and a square table", "shape"),
        ("a wooden floor and a fluffy rug", "texture"),
        ("a vase on the right of a cat", "2d_spatial"),
        ("a dog behind a tree", "3d_spatial"),
        ("four apples", "numeracy"),
        ("someone is reading in a park", "non_spatial"),
        ("a red apple on top of a wooden table", "complex"),
    ],
)
def test_a_category_is_guessed_from_the_words(prompt, category):
    assert guess(prompt) == category


def test_guesses_on_the_published_prompts():
    folder = DATA / "t2i-compbench"
    if not folder.is_dir():
        pytest.skip(f"no prompts in {folder}")
    right = Counter()
    for path in folder.glob("*_val.txt"):
        kind = path.stem.removesuffix("_val").replace("3d_spatial", "3d").replace(
            "non_spatial", "non").replace("spatial", "2d_spatial")  # fmt: skip
        kind = {"3d": "3d_spatial", "non": "non_spatial"}.get(kind, kind)
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        right[kind] = sum(guess(line) == kind for line in lines) / len(lines)
    assert set(right) == set(CATEGORIES)
    assert np.mean(list(right.values())) > 0.9
    assert min(v for k, v in right.items() if k != "complex") > 0.9


def test_calibration_is_measured_within_prompts_and_survives_its_file(values, tmp_path):
    values[4:, 0] += 5  # prompts differ far more than the images of one
    images = torch.as_tensor(values, dtype=torch.float32)[:, :, None, None] / 10
    known = measure(["test_plane(scale=10.0)", G], images, PROMPTS, model="tiny")
    scaled = known.rewards["test_plane(scale=10.0)"]
    squares = sum(
        ((values[r, 0] - values[r, 0].mean()) ** 2).sum() for r in (slice(4), slice(4, 9))
    )
    assert scaled.std == pytest.approx((squares / 7) ** 0.5, rel=1e-4)
    assert scaled.mean == pytest.approx(values[:, 0].mean(), rel=1e-4)
    assert (scaled.images, scaled.prompts) == (9, 2)
    path = known.save(tmp_path / "c.json")
    assert Calibration.load(path) == known
    reward = as_reward(f"zsum(test_plane(scale=10.0), 0.5*{G}, calibration={path})")
    assert reward.spec == f"zsum(test_plane(scale=10.0), 0.5*{G}, calibration={path})"
    assert as_reward(reward.spec)(images, PROMPTS).value.tolist() == (
        reward(images, PROMPTS).value.tolist()
    )
    one_each = measure([G], images, list("abcdefghi")).rewards[G]
    assert one_each.std == pytest.approx((values[:, 1] / 10).std(ddof=1), rel=1e-4)


def test_constants_are_those_of_the_reward_that_fits_the_model():
    known = Calibration({"clip(model=stickers)": Constants(0.2, 0.1, 10, 2)})
    model = SimpleNamespace(name="stickers", device=torch.device("cpu"))
    adapted = ZSum("clip", calibration=known).for_model(model)
    assert adapted.constants() == [(0.2, 0.1)]
    assert adapted.terms[0][1].spec == "clip(model=stickers)"


def test_what_is_wrong_with_a_calibration_is_said(tmp_path, values):
    lacking = ZSum(R, B, calibration=constants(r=(0, 1)))
    with pytest.raises(OptionError, match="no constants for"):
        lacking.for_model(None)
    with pytest.raises(OptionError, match="no constants for"):
        lacking(pixels(values), "a")
    with pytest.raises(OptionError, match="does not vary"):
        measure([R], pixels(np.full((3, 3), 0.5)), ["a", "b", "c"])
    with pytest.raises(OptionError, match="2 or more images with a prompt each"):
        measure([R], pixels(values), "a")
    bad = tmp_path / "bad.json"
    for text, message in (
        ("{", "is not JSON"),
        ('{"format": "other", "rewards": {}}', "is no calibration file"),
        (
            '{"format": "steering-calibration/1", "rewards": '
            '{"x": {"mean": 0, "std": 0, "images": 1, "prompts": 1}}}',
            "std above 0",
        ),
    ):
        bad.write_text(text)
        with pytest.raises(OptionError, match=message):
            as_reward(f"zsum({R}, calibration={bad})")
    with pytest.raises(OptionError, match="cannot be read"):
        as_reward(f"zsum({R}, calibration=/no/where.json)")


def test_images_of_a_prompt_stay_together_in_any_order(values):
    assert [g.tolist() for g in groups(["a", "b", "a"], 3)] == [[0, 2], [1]]
    order = np.random.default_rng(1).permutation(9)
    for reward in (RankMean(R, G), ZSum(R, G)):
        straight = reward(pixels(values), PROMPTS).value
        mixed = reward(pixels(values[order]), [PROMPTS[i] for i in order]).value
        torch.testing.assert_close(mixed, straight[order])


@pytest.mark.parametrize(
    "spec",
    [
        f"rank({R}, 3*{G})",
        f"min({R}, 2*{G} + {B})",
        f"lexicographic({R}, {G}, step=0.5)",
        f"2*rank({R}, {G}) - {B}",
        f"rank({R}, min({G}, {B}))",
        f"clipped({R}, -{G}, limit=0.25)",
    ],
)
def test_specs_round_trip(spec, values):
    reward = as_reward(spec)
    again = as_reward(reward.spec)
    assert again.spec == reward.spec
    torch.testing.assert_close(
        reward(pixels(values), PROMPTS).value, again(pixels(values), PROMPTS).value
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rank()", "rank needs rewards"),
        ("rank(1)", "expected a reward, not a number"),
        (f"rank({R} {G})", "expected , or"),
        (f"rank({R}, limit=2)", "no options|Unknown option"),
        (f"lexicographic({R}, step=0)", "positive"),
        (f"clipped({R}, limit=-1)", "positive"),
        (f"rank({R}, {G}", "expected"),
        ("brightness(clip)", "expected option=value"),
    ],
)
def test_specs_that_cannot_be_read(spec, message):
    with pytest.raises(OptionError, match=message):
        as_reward(spec)


def world():
    return GaussianMixture(torch.tensor([1.0]), torch.tensor([[0.0]]), torch.tensor([1.0]))


def test_particle_methods_refuse_rewards_that_look_at_the_batch():
    def first(x):
        return x[:, 0]

    for reward in (RankMean(first), as_reward(first) + ZSum(first)):
        with pytest.raises(OptionError, match="changes with the other samples of the call"):
            steering.steer(world(), reward=reward, method="fk", nfe=200, options={"eta": 1.0})
    found = steering.steer(world(), reward=RankMean(first), method="best_of_n", nfe=200)
    assert found.best_reward == 1.0
    assert found.samples[0, 0] == found.samples[:, 0].max()


@pytest.mark.parametrize("method", ["best_of_n", "best_of_majority"])
def test_all_samples_of_a_prompt_are_ranked_against_each_other(method):
    """More than are decoded in one call: the best of all, not of the first sixteen."""

    def first(x):
        return x[:, 0]

    options = {"n": 40} | ({"min_frequency": 0.0} if method == "best_of_majority" else {})
    slots = {
        tuple(
            int(steering.steer(world(), reward=r, method=method, options=options, seed=s).slots[0])
            for s in range(6)
        )
        for r in (RankMean(first), first)
    }
    assert len(slots) == 1
    assert max(slots.pop()) >= 16


REMEMBER = ("rbf", "random_search", "zero_order", "search_over_paths", "evo", "dts", "dts_star")


@pytest.mark.parametrize("method", [*REMEMBER, "auto", "reflect"])
def test_searches_over_several_calls_refuse_rewards_that_look_at_the_batch(method):
    model = world()
    with pytest.raises(OptionError, match=r"compares rewards of different calls.*best_of_n"):
        steering.steer(model, reward=RankMean(lambda x: x[:, 0]), method=method, nfe=4000)
    assert model.rows == 0


def test_a_verifier_that_the_search_has_seen_says_so():
    guide = as_reward(f"zsum({R}, {G})")
    assert searched(guide, as_reward(f"{G} + {B}")) == ["test_plane"]
    assert searched(guide, as_reward(B)) == []
    assert searched(as_reward(f"{R} + 0*{G}"), as_reward(G)) == []
    scaled = as_reward("test_plane(scale=100.0)")
    assert searched(as_reward(R), scaled) == ["test_plane"]
    assert heldout_labels(guide, [as_reward(B), scaled]) == [
        B, "test_plane(scale=100.0) (searched: test_plane)",
    ]  # fmt: skip


def test_results_carry_that_mark_and_a_mere_change_of_unit_is_refused():
    def first(x):
        return x[:, 0]

    def second(x):
        return -x[:, 0].abs()

    result = steering.steer(
        world(), reward=as_reward(first) + second, heldout=[first, second],
        method="best_of_n", nfe=200,
    )  # fmt: skip
    assert list(result.heldout) == ["first (searched: first)", "second (searched: second)"]
    with pytest.raises(OptionError, match="guiding reward itself"):
        steering.steer(
            world(), reward=first, heldout=2 * as_reward(first), method="best_of_n", nfe=200
        )

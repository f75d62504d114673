"""Rows of one call that are copies are computed once, and nobody can tell but the ledger."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.duplicates import distinct
from steering.ledger import Ledger
from steering.method import Cost
from steering.paths import Linear
from steering.requests import Decode, Denoise, Gradient, Outcome, Score
from steering.samplers import DTS, DTSStar
from steering.samplers.base import Sampler

LINE = LinearReward([1.0])
HIGH, LOW = Linear().at(0.8), Linear().at(0.3)


class Counted(GaussianMixture):
    """A mixture that remembers how many rows each call had."""

    def __init__(self, prompts=("p",), **options) -> None:
        super().__init__([0.5, 0.5], [-1.0, 1.0], [0.4, 0.6], prompts=prompts, **options)
        self.widths: list[int] = []

    def predict(self, x, t, *, cond=0, grad=False):
        self.widths.append(len(x))
        return super().predict(x, t, cond=cond, grad=grad)


@dataclass(frozen=True, kw_only=True)
class Copies(Sampler):
    """Asks once about given rows at given levels, in one call."""

    rows: tuple[float, ...] = (0.5, 0.5, -1.0, 0.5)
    at: tuple[int, ...] = (2, 2, 2, 2)
    differentiate: bool = False

    name, summary, paper, target = "copies", "", "", "heuristic"
    needs_gradient = needs_stochastic = anytime = False

    def fit(self, plan):
        return self

    def cost(self, plan):
        return Cost(nfe=len(self.rows), decodes=len(self.rows), reward_calls=len(self.rows))

    def run(self, ctx):
        x = torch.tensor(self.rows)[:, None].requires_grad_(self.differentiate)
        times = [ctx.grid.times[k] for k in self.at]
        prediction = yield Denoise(x, times, grad=self.differentiate)
        x0 = prediction.x0
        if self.differentiate:
            x0 = yield Gradient(prediction.x0.sum(1), x)
        images = yield Decode(x0)
        scores = yield Score(images, x0, final=True)
        return Outcome(x0=x0, images=images, reward=scores.value, log_w=torch.zeros(len(x)))


def steer(model, method, **options):
    return steering.steer(model, reward=LINE, method=method, **options)


def test_copies_are_found_and_told_who_answers_them() -> None:
    x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    assert distinct(x, HIGH, [0] * 6) is None
    assert distinct(x[:1], HIGH, [0]) is None
    copies = x[[2, 0, 2, 1, 0, 2]]
    assert distinct(copies, HIGH, [0] * 6) == ([0, 1, 3], [0, 1, 0, 2, 1, 0])
    kept, back = distinct(copies, [HIGH, LOW, HIGH, LOW, LOW, LOW], [0] * 6)
    assert (kept, back) == ([0, 1, 3, 5], [0, 1, 0, 2, 1, 3])
    assert distinct(copies, HIGH, [0, 0, 1, 0, 1, 2]) is None
    assert distinct(copies.long(), HIGH, [0] * 6)[1][2] == 0


@pytest.mark.parametrize("place", range(37))
def test_one_number_anywhere_makes_another_question(place: int) -> None:
    x = torch.zeros(2, 37)
    x[1, place] = 1e-30
    assert distinct(x, HIGH, [0, 0]) is None


def test_a_copy_is_computed_once_counted_as_asked_and_answered_in_its_place() -> None:
    model = Counted(steps=4)
    result, plain = steer(model, Copies()), steer(Counted(steps=4), Copies(), deduplicate=False)
    assert model.widths == [2]
    assert (result.ledger.nfe, result.ledger.deduplicated) == (4, 2)
    assert (plain.ledger.nfe, plain.ledger.deduplicated) == (4, 0)
    assert model.rows == result.ledger.nfe - result.ledger.deduplicated
    torch.testing.assert_close(result.samples, plain.samples, rtol=0, atol=1e-12)
    assert len(set(result.samples.flatten().tolist())) == 2


def test_equal_states_at_other_levels_or_of_other_prompts_are_other_questions() -> None:
    model = Counted(steps=4)
    mixed = steer(model, Copies(rows=(0.5,) * 4, at=(1, 2, 2, 3)))
    assert (model.rows, mixed.ledger.nfe, mixed.ledger.deduplicated) == (3, 4, 1)
    assert len(set(mixed.samples.flatten().tolist())) == 3
    model = Counted(("a", "b"), steps=4)
    for result in steer(model, Copies(), seed=[0, 1]):
        assert (result.ledger.nfe, result.ledger.deduplicated) == (4, 2)
    assert model.widths == [4]


def test_derivatives_of_copies_are_each_their_own() -> None:
    model = Counted(steps=4)
    result = steer(model, Copies(differentiate=True))
    slopes = steer(Counted(steps=4), Copies(differentiate=True), deduplicate=False).samples
    assert model.widths == [4]
    torch.testing.assert_close(result.samples, slopes, rtol=0, atol=0)
    assert bool((result.samples != 0).all())


@pytest.mark.parametrize(
    "method",
    [
        DTS(trajectories=40, width=16),
        DTSStar(trajectories=40, width=16, branch_levels=(0.5,)),
    ],
    ids=("sampling", "searching"),
)
def test_methods_give_the_same_samples_for_fewer_rows(method) -> None:
    model, plain = Counted(steps=8), Counted(steps=8)
    with_, without = steer(model, method, seed=3), steer(plain, method, seed=3, deduplicate=False)
    torch.testing.assert_close(with_.samples, without.samples, rtol=0, atol=1e-9)
    torch.testing.assert_close(with_.rewards, without.rewards, rtol=0, atol=1e-9)
    assert with_.ledger.nfe == without.ledger.nfe == plain.rows
    assert model.rows == with_.ledger.nfe - with_.ledger.deduplicated < plain.rows


def test_a_recipe_says_how_it_was_computed() -> None:
    for value in (True, False):
        result = steer(Counted(steps=4), Copies(), deduplicate=value)
        assert result.recipe.engine["deduplicate"] is value
    assert Ledger().to_json()["deduplicated"] == 0

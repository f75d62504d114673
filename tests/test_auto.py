"""Auto: pilots, targets, the choice of what follows, and budgets that prompts share."""

from __future__ import annotations

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.errors import BudgetError, OptionError
from steering.ledger import Budget
from steering.samplers import Auto, BestOfN
from steering.samplers.auto import rank_correlation

UP = LinearReward([1.0])
PROMPTS = ("easy", "flat", "wide", "wider")
SPREAD = {"easy": 1.0, "flat": 0.0, "wide": 1.0, "wider": 3.0}


def line(prompts=("p",), steps: int = 6) -> GaussianMixture:
    return GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.4, 0.4], steps=steps, prompts=prompts)


def by_prompt(images, prompts):
    scale = torch.tensor([SPREAD[p] for p in prompts]).double()
    easy = torch.tensor([p == "easy" for p in prompts])
    return scale * images[:, 0] + 100.0 * easy


def follow(result) -> str:
    return result.trace.column("follow")[0]


def test_the_pilot_alone_is_best_of_n():
    mine = steering.steer(line(), reward=UP, method=Auto(n=5, pilot=5), seed=4)
    bon = steering.steer(line(), reward=UP, method=BestOfN(n=5, eta=1.0), seed=4)
    assert torch.equal(mine.samples, bon.samples)
    assert mine.ledger.nfe == bon.ledger.nfe


def test_what_follows_has_noise_of_its_own():
    method = Auto(n=10, pilot=5, follow="best_of_n")
    rows = steering.steer(line(), reward=UP, method=method, seed=4).trace.column("rewards")
    assert len({r for row in rows for r in row}) == 10


def test_a_prompt_that_reaches_its_target_stops():
    method = Auto(n=20, pilot=4, target_reward=50.0)
    easy, wide = steering.steer(line(("easy", "wide")), reward=by_prompt, method=method)
    assert easy.ledger.nfe == 4 * 6
    assert follow(easy) == "none"
    assert wide.ledger.nfe > 4 * 6


def test_particles_follow_where_estimates_rank_and_samples_where_they_mislead():
    """Previews that are the final reward, and previews that are its opposite."""

    calls = []

    def misleading(images, prompts):
        calls.append(len(images))
        return (-1.0 if len(calls) == 1 else 1.0) * images[:, 0]

    late = {"preview_at": 0.99, "n": 14, "pilot": 8}
    good = steering.steer(line(), reward=UP, method=Auto(**late))
    bad = steering.steer(line(), reward=misleading, method=Auto(**late))
    assert good.trace.column("rank")[0] > 0.9
    assert (follow(good), follow(bad)) == ("fk", "best_of_n")
    assert bad.trace.column("rank")[0] < -0.9


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_as_scipy_has_it(ties):
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 4 if ties else 10**6, (12,), generator=generator) for _ in range(2))
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert rank_correlation(a.double(), b.double()) == pytest.approx(expected)
    assert rank_correlation(a.double(), torch.zeros(12)) == 0.0


# --- sharing --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    method = Auto(pilot=4, share=True, target_reward=50.0, follow="best_of_n")
    return dict(
        zip(
            PROMPTS,
            steering.steer(line(PROMPTS), reward=by_prompt, method=method, nfe=180),
            strict=True,
        )
    )


def test_what_an_easy_prompt_leaves_goes_to_the_wide_ones(shared):
    assert shared["easy"].ledger.nfe == 24
    assert shared["flat"].ledger.nfe == 24
    assert shared["wide"].ledger.nfe > 24
    assert shared["wider"].ledger.nfe > 180
    samples = {p: shared[p].trace.column("samples")[0] for p in PROMPTS}
    ratio = shared["wider"].trace.column("spread")[0] / shared["wide"].trace.column("spread")[0]
    assert samples["wider"] / samples["wide"] == pytest.approx(ratio, rel=0.15)


def test_the_sum_of_all_budgets_is_kept(shared):
    spent = sum(r.ledger.nfe for r in shared.values())
    assert 4 * 180 - 4 * 6 <= spent <= 4 * 180


def test_alone_a_prompt_shares_with_itself():
    runs = [
        steering.steer(line(), reward=UP, nfe=100, seed=1,
                       method=Auto(pilot=4, share=share, follow="best_of_n"))
        for share in (False, True)
    ]  # fmt: skip
    assert torch.equal(runs[0].samples, runs[1].samples)
    assert [r.ledger.nfe for r in runs] == [96, 96]


def test_a_cap_on_reward_calls_is_not_shared_away():
    method = Auto(pilot=3, share=True, follow="best_of_n")
    budget = Budget(nfe=100, reward_calls=12)
    for result in steering.steer(line(PROMPTS), reward=by_prompt, method=method, budget=budget):
        assert result.ledger.reward_calls <= 12


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pilot": 1}, "pilot"),
        ({"n": 3, "pilot": 6}, "pilot"),
        ({"preview_at": 1.0}, "preview_at"),
        ({"eta": 0.0}, "eta"),
        ({"reward_scale": -1.0}, "reward_scale"),
    ],
)
def test_options_that_make_no_sense(options, word):
    with pytest.raises(OptionError, match=word):
        Auto(**options)


def test_a_budget_below_the_pilot():
    model = line()
    with pytest.raises(BudgetError, match="pilot"):
        steering.steer(model, reward=UP, method="auto", nfe=20)
    assert model.rows == 0

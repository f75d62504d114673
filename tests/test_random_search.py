"""Random search is best-of-N however it is cut into rounds, and can stop early."""

from __future__ import annotations

import pytest
import torch

from steering.errors import BudgetError, OptionError
from steering.ledger import Budget
from steering.method import build_method
from steering.samplers import BestOfN, RandomSearch
from tests.search_world import (
    BOWL,
    TABLE,
    calls_of,
    chain,
    counts,
    forecast,
    guided,
    mean_best,
    plan_of,
    plane,
    repeated,
    steer,
)


def same(a, b) -> bool:
    return (
        torch.equal(a.samples, b.samples)
        and torch.equal(a.rewards, b.rewards)
        and torch.equal(a.slots, b.slots)
    )


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_one_round_is_best_of_n_bit_for_bit(eta: float) -> None:
    for seed in range(4):
        ours = steer(plane(), BOWL, RandomSearch(rounds=1, pool=23, eta=eta), seed=seed)
        assert same(ours, steer(plane(), BOWL, BestOfN(n=23, eta=eta), seed=seed))
    discrete = steer(chain(), TABLE, RandomSearch(rounds=1, pool=9))
    assert same(discrete, steer(chain(), TABLE, BestOfN(n=9)))


@pytest.mark.parametrize(
    "rounds",
    [{"rounds": 4}, {"n": 30, "growth": 1, "pool": 7}, {"n": 30, "pool": 1, "growth": 3}],
)
def test_rounds_change_nothing_and_the_best_of_all_is_kept(rounds: dict) -> None:
    early = 0
    for seed in range(8):
        ours = steer(plane(), BOWL, RandomSearch(eta=0.3, **rounds), seed=seed)
        assert same(ours, steer(plane(), BOWL, BestOfN(n=30, eta=0.3), seed=seed))
        found = [r for part in ours.trace.column("rewards") for r in part]
        assert len(found) == 30
        assert ours.best_reward == max(found)
        early += max(ours.trace.column("rewards")[-1]) < ours.best_reward
    assert early > 0, "the best should lie in an earlier round at least once"


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"rounds": 4}, [2, 4, 8, 16]),
        ({"rounds": 3, "pool": 5, "growth": 1}, [5, 5, 5]),
        ({"n": 9}, [2, 4, 3]),
        ({"n": 9, "rounds": 2}, [2, 4]),
        ({"n": 1}, [1]),
        ({}, [2, 4, 8, 16]),
    ],
)
def test_sizes_of_rounds(options: dict, sizes: list[int]) -> None:
    assert RandomSearch(**options).sizes() == sizes


@pytest.mark.parametrize("options", [{"rounds": 3}, {"n": 5, "pool": 1}, {"rounds": 1, "pool": 4}])
def test_the_ledger_agrees_with_the_formula(options: dict) -> None:
    model, method = guided(), RandomSearch(**options)
    n = sum(method.sizes())
    result = steer(model, BOWL, method)
    assert counts(result.ledger) == forecast(model, method) == (n * 7 * 2, n, n)
    assert model.rows == n * 14


def test_budgets_are_filled() -> None:
    result = steer(guided(), BOWL, RandomSearch(), nfe=333)
    assert result.ledger.nfe == 23 * 14
    result = steer(guided(), BOWL, RandomSearch(), budget=Budget(reward_calls=11))
    assert result.ledger.reward_calls == 11
    for method, nfe in ((RandomSearch(), 13), (RandomSearch(rounds=2), 83)):
        model = guided()
        with pytest.raises(BudgetError):
            steer(model, BOWL, method, nfe=nfe)
        assert model.rows == 0


def test_a_good_sample_stops_the_rounds() -> None:
    stopped = 0
    for result in repeated(plane, BOWL, RandomSearch(rounds=5, reward_max=-0.3), 16):
        rounds = result.trace.column("rewards")
        best = [max(r) for r in rounds]
        assert all(b < -0.3 for b in best[:-1])
        assert best[-1] >= -0.3 or len(rounds) == 5
        assert result.best_reward == max(best)
        assert result.ledger.reward_calls == sum(map(len, rounds))
        stopped += len(rounds) < 5
    assert stopped > 4


def test_more_budget_comes_nearer_to_the_optimum() -> None:
    found = [mean_best(plane, "random_search", nfe=nfe) for nfe in (30, 300, 3000)]
    assert found == sorted(found)  # measured -1.16, -0.22 and -0.05
    assert found[-1] > -0.1


def test_all_rewards_minus_infinity_still_deliver() -> None:
    result = steer(plane(), lambda x: torch.full((len(x),), -torch.inf), RandomSearch(rounds=2))
    assert result.best_reward == -torch.inf
    assert int(result.slots[0]) == 0


@pytest.mark.parametrize("name", ["n", "rounds", "pool", "growth"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        RandomSearch(**{name: 0})


def test_the_preset_has_the_published_cost() -> None:
    method = build_method("random_search/flux")
    cost = method.cost(plan_of(plane(steps=50), method))
    assert (cost.nfe, cost.reward_calls) == (1500, 30)


def test_many_prompts_share_every_network_call() -> None:
    method = RandomSearch(rounds=3)
    assert calls_of(plane, method, 8) == calls_of(plane, method, 1)

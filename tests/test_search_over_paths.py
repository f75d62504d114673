"""Search over paths: its rounds, the law it keeps, its choices and its cost."""

from __future__ import annotations

import pytest
import torch

from steering.errors import BudgetError, OptionError
from steering.grids import on_path, uniform
from steering.method import build_method
from steering.paths import Linear
from steering.samplers import BestOfN, SearchOverPaths
from tests.search_world import (
    BOWL,
    TABLE,
    calls_of,
    chain,
    constant,
    counts,
    forecast,
    guided,
    line,
    mean_best,
    plan_of,
    plane,
    steer,
)


def rounds(steps: int, **options: float) -> list[tuple[int, int, int]]:
    grid = on_path(Linear(), uniform(steps))
    return [tuple(r) for r in SearchOverPaths(**options).rounds(grid)]


def test_rounds_by_hand() -> None:
    assert rounds(10) == [(5, 3, 7), (7, 5, 9), (9, 7, 10)]
    assert rounds(6) == [(3, 2, 4), (4, 3, 5), (5, 4, 6)]
    # Forward past the noisiest level stops there; every round gains at least one step.
    assert rounds(4, seed_level=0.25, delta_f=0.9, delta_b=1.0) == [
        (1, 0, 2),
        (2, 0, 3),
        (3, 0, 4),
    ]
    assert rounds(10, seed_level=1.0) == []
    published = rounds(1000, seed_level=0.88, delta_f=0.78, delta_b=0.81)
    assert published[0] == (880, 100, 910)
    assert len(published) == 4


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_seed_level_at_the_end_is_best_of_n_bit_for_bit(eta: float) -> None:
    ours = steer(plane(), BOWL, SearchOverPaths(n_particles=9, seed_level=1.0, eta=eta), seed=2)
    base = steer(plane(), BOWL, BestOfN(n=9, eta=eta), seed=2)
    assert torch.equal(ours.samples, base.samples)
    assert torch.equal(ours.slots, base.slots)
    assert counts(ours.ledger) == counts(base.ledger)


@pytest.mark.parametrize(
    "levels",
    [
        {},
        {"seed_level": 0.2, "delta_f": 0.5, "delta_b": 0.7},
        {"seed_level": 0.9, "delta_f": 0.3, "delta_b": 0.5},
    ],
)
def test_without_preference_the_law_is_the_models(levels: dict) -> None:
    """Exact reverse kernel, all kept: re-noising and denoising keep every p_t."""
    model = line()
    steer(model, constant, SearchOverPaths(n_particles=1500, n_neighbours=1, **levels))
    law = model.marginal(model.grid().times[7])
    assert law.deviation(model.at(7)[-1]) < 5.0  # measured up to 2.0


def test_every_round_starts_from_the_states_that_scored_best() -> None:
    """With delta_f of one step: each kept state has n_neighbours re-noised copies."""
    method = SearchOverPaths(n_particles=2, n_neighbours=3)
    for seed in range(4):
        model = plane()
        result = steer(model, BOWL, method, seed=seed)
        for event in result.trace.events:
            if "kept" not in event:
                continue
            rewards = torch.tensor(event["rewards"])
            assert len(rewards) == 6
            assert event["kept"] == rewards.argsort(descending=True, stable=True)[:2].tolist()
        finals = result.trace.column("rewards")[-1]
        assert len(finals) == 6
        assert result.best_reward == max(finals)
        assert torch.allclose(BOWL(result.samples), result.rewards, atol=1e-6)


def test_copies_stay_near_the_kept_and_differ() -> None:
    """A small way back: copies of one state are alike, of two states they are not."""
    model = plane(steps=40)
    method = SearchOverPaths(
        n_particles=2, n_neighbours=8, seed_level=0.9, delta_f=0.025, delta_b=0.05
    )
    steer(model, BOWL, method)
    first = model.at(35)[1]  # node 36 re-noised to node 35; call 0 was the seed paths'
    assert first.shape == (16, 2)
    assert len(first.unique(dim=0)) == 16
    groups = first.reshape(2, 8, 2)
    assert float(groups.std(1).max()) < 0.1
    assert float((groups[0].mean(0) - groups[1].mean(0)).norm()) > 0.3


CASES = [
    {"n_particles": 2, "n_neighbours": 3},
    {"n_particles": 1, "n_neighbours": 2, "seed_level": 0.2, "delta_f": 0.4, "delta_b": 0.6},
    {"n_particles": 3, "n_neighbours": 1, "seed_level": 0.9, "eta": 0.5},
]


@pytest.mark.parametrize("options", CASES)
def test_the_ledger_agrees_with_the_formula(options: dict) -> None:
    model, method = guided(), SearchOverPaths(**options)
    result = steer(model, BOWL, method)
    assert counts(result.ledger) == forecast(model, method)
    assert model.rows == result.ledger.nfe


def test_cost_by_hand() -> None:
    """10 steps of 1 row: 2 * 5, then 2 * 3 paths over 4 + 1, 4 + 1 and 3 rows."""
    method = SearchOverPaths(n_particles=2, n_neighbours=3)
    cost = method.cost(plan_of(plane(steps=10), method))
    assert (cost.nfe, cost.reward_calls) == (10 + 6 * (5 + 5 + 3), 18)


def test_budgets_are_filled() -> None:
    result = steer(guided(), BOWL, SearchOverPaths(), nfe=333)
    one = SearchOverPaths(n_particles=1)
    each = one.cost(plan_of(guided(), one)).nfe
    assert result.ledger.nfe == (333 // each) * each
    model = guided()
    with pytest.raises(BudgetError, match="one path needs"):
        steer(model, BOWL, SearchOverPaths(), nfe=each - 1)
    with pytest.raises(BudgetError):
        steer(model, BOWL, SearchOverPaths(n_particles=4), nfe=4 * each - 1)
    assert model.rows == 0


def test_more_budget_comes_nearer_to_the_optimum() -> None:
    found = [mean_best(plane, "search_over_paths", nfe=nfe) for nfe in (40, 300, 2400)]
    assert found == sorted(found)  # measured -0.87, -0.10 and -0.01
    assert found[-1] > -0.05


def test_states_without_neighbours_are_refused_before_anything_is_spent() -> None:
    model = chain()
    with pytest.raises(OptionError, match="re-noising"):
        steer(model, TABLE, SearchOverPaths(n_particles=1))
    assert model.rows == 0
    assert len(steer(model, TABLE, SearchOverPaths(n_particles=3, seed_level=1.0))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"n_particles": 0},
        {"n_neighbours": 0},
        {"seed_level": 0.0},
        {"delta_f": 0.4, "delta_b": 0.4},
        {"delta_f": 0.0},
        {"delta_b": 1.2},
    ],
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match="search_over_paths"):
        SearchOverPaths(**options)


def test_the_preset_is_known() -> None:
    assert build_method("search_over_paths/rewind").delta_b == 0.81


def test_many_prompts_share_every_network_call() -> None:
    method = SearchOverPaths(n_particles=2)
    assert calls_of(plane, method, 8) == calls_of(plane, method, 1)

"""Tree search: its cost by hand and in the ledger, its budgets, options that make no sense."""

from __future__ import annotations

from itertools import pairwise

import pytest

from steering.errors import BudgetError, OptionError
from steering.ledger import Budget
from steering.method import Plan
from steering.samplers import DTS, DTSStar
from tests.kept_trees import kept
from tests.populations import LINE, guided, line, plan_of, steer

# --- cost --------------------------------------------------------------------------------------

COSTS = {
    "plain": DTS(trajectories=7),
    "sequential": DTS(trajectories=5, width=1, branch_levels=(0.4,)),
    "wide": DTS(trajectories=6, width=20),
    "noise levels": DTSStar(trajectories=7, noise_levels=(0.9, 0.6, 0.3), width=3),
    "no branching": DTS(trajectories=4, branch_levels=()),
    "full": DTS(trajectories=50, widening=2, widening_power=0.0, branch_levels=(0.3, 0.6)),
    "few children": DTSStar(trajectories=90, max_children=3, branch_levels=(0.5,), k=2),
}


@pytest.mark.parametrize("case", sorted(COSTS))
def test_a_tree_costs_the_steps_between_its_nodes(tmp_path, case: str) -> None:
    method, model = COSTS[case], guided()
    tree, result = kept(tmp_path, model, LINE, method)
    starts = [0, *tree.levels]
    prices = [sum(model.costs()[a:b]) for a, b in pairwise(starts)]
    spent = sum(prices[tree.depth[n] - 1] for n in range(1, len(tree)))
    cost = method.cost(plan_of(model, method))
    ledger = result.ledger
    assert ledger.nfe == model.rows + ledger.deduplicated == spent <= cost.nfe
    assert ledger.decodes == ledger.reward_calls == len(tree.leaves) <= cost.reward_calls
    if case in ("no branching", "full", "few children"):
        assert (ledger.nfe, ledger.reward_calls) == (cost.nfe, cost.reward_calls)
    else:
        assert ledger.nfe > cost.nfe - prices[-1], "what is left must not pay for a rollout"


def test_cost_by_hand() -> None:
    """7 steps at 2 2 2 3 3 3 3 rows; levels 2 and 4, so rollouts cost 18, 14 or 9."""
    method = DTS(branch_levels=(0.3, 0.6), trajectories=10)
    plan = plan_of(guided(), method)
    assert [price.rows for price in method.prices(plan)] == [18, 14, 9]
    cost = method.cost(plan)
    assert (cost.nfe, cost.reward_calls) == (180, 1 + (180 - 18) // 9)
    assert (
        DTS(branch_levels=(0.3, 0.6), widening_power=0.0).cost(plan).nfe == 2 * 4 + 4 * 5 + 8 * 9
    )


@pytest.mark.parametrize("method", [DTS(), DTS(width=1), DTSStar(), DTSStar(width=9)], ids=str)
@pytest.mark.parametrize("nfe", [18, 35, 100, 333])
def test_budgets_are_spent_to_the_last_rollout(method, nfe: int) -> None:
    ledger = steer(guided(), LINE, method, nfe=nfe).ledger
    deepest = method.prices(plan_of(guided(), method))[-1].rows
    assert nfe - deepest < ledger.nfe <= nfe


def test_budgets_that_cannot_pay_are_refused_at_once() -> None:
    for method, nfe in ((DTS(), 17), (DTSStar(trajectories=3), 53)):
        model = guided()
        with pytest.raises(BudgetError, match=f"{nfe}"):
            steer(model, LINE, method, nfe=nfe)
        assert model.rows == 0


def test_reward_calls_are_a_budget_too() -> None:
    for calls in (1, 5, 13):
        result = steer(guided(), LINE, DTS(), budget=Budget(reward_calls=calls))
        assert result.ledger.reward_calls == len(result) == calls
    assert steer(guided(), LINE, DTS(), nfe=60, budget=Budget(reward_calls=50)).ledger.nfe <= 60


# --- refusals ----------------------------------------------------------------------------------

BAD = {
    "eta=0 makes the sampler deterministic": {"eta": 0.0},
    "branch_levels are fractions": {"branch_levels": (0.5, 1.0)},
    "noise_levels are shares": {"noise_levels": (1.5,)},
    "widening must be positive": {"widening": 0.0},
    "widening_power lie in": {"widening_power": 1.5},
    "max_children must be": {"max_children": 0},
    "width must be": {"width": 0},
    "trajectories must be": {"trajectories": 0},
    "reward_scale must be": {"reward_scale": -1.0},
    "k must be": {"k": 0},
}


@pytest.mark.parametrize("message", sorted(BAD))
def test_bad_options_are_refused(message: str) -> None:
    for method in (DTS, DTSStar):
        with pytest.raises(OptionError, match=message):
            method(**BAD[message])


def test_the_last_step_never_branches() -> None:
    method = DTS(branch_levels=(0.5, 0.95, 0.99))
    assert method.tree_levels(line().grid()) == [4, 8]
    assert method.tree_levels(line(steps=2).grid()) == [2]
    assert DTS(noise_levels=(0.5, 0.1)).tree_levels(line().grid()) == [4, 8]


def test_a_fixed_tree_claims_its_law_only_where_the_budget_fills_it() -> None:
    method, model = DTS(widening_power=0.0, widening=2.0, branch_levels=(0.5,)), line()

    def plan(nfe: int) -> Plan:
        return Plan(grid=model.grid(), costs=model.costs(), budget=Budget(nfe=nfe))

    rows = method.cost(plan(10**6)).nfe
    assert rows < 10**6
    assert method.fit(plan(rows)).target == "tilted"
    assert method.fit(plan(rows - 1)).target == "heuristic"
    assert DTS(branch_levels=()).fit(plan(rows)).target == "tilted"

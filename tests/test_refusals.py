"""Every method refuses what cannot work before the first call, and says the way out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import steering
from steering.errors import BudgetError, OptionError, RewardError, SteeringError
from steering.ledger import Budget
from steering.method import Plan, build_method, default_costs
from steering.registry import METHODS
from steering.rewards import FunctionReward
from tests.test_contract import CASES, near, world

NAMES = METHODS.names()


def refused(name: str, options: dict[str, Any], kind: type, *, steps: int = 6, **call: Any) -> str:
    """The message with which a method is refused, nothing having been asked."""
    model = world(steps=steps)
    call = {"reward": near, **call}
    with pytest.raises(kind) as caught:
        steering.steer(model, method=name, options=options, **call)
    assert isinstance(caught.value, SteeringError)
    assert model.rows == 0
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- budgets that cannot pay for one step ------------------------------------------------------


UNITS = {"reward_calls": {
    "best_of_majority", "best_of_n", "dno", "dts", "dts_star", "random_search", "reflect", "reno",
    "carinox",
}, "nfe": set()}  # fmt: skip
"""Methods that can do with one of these."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cap", ["nfe", "reward_calls"])
def test_a_budget_that_pays_for_nothing(name: str, cap: str) -> None:
    """It says how much is needed, and that much is enough."""
    one = {"budget": Budget(**{cap: 1})}
    if name in UNITS[cap]:
        assert steering.steer(world(), reward=near, method=name, **one).ledger.reward_calls == 1
        return
    message = refused(name, {}, BudgetError, **one)
    assert "Raise" in message
    need = int(re.findall(r"needs (?:\w+=)?(\d+)", message)[0])
    enough = Budget(**{cap: need})
    ledger = steering.steer(world(), reward=near, method=name, budget=enough).ledger
    assert 0 < getattr(ledger, cap) <= getattr(enough, cap)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_the_budget_does_not_pay_for(name: str) -> None:
    case, model = CASES[name][0], world()
    grid = case.levels(model)
    plan = Plan(grid=grid, costs=default_costs(model, grid), budget=Budget())
    cost = case.fit(plan).cost(plan)
    with pytest.raises(BudgetError, match=f"needs nfe={cost.nfe}, .*Raise the budget, or lower"):
        steering.steer(model, reward=near, method=case, nfe=cost.nfe - 1)
    assert model.rows == 0


# --- levels outside the grid -------------------------------------------------------------------

LEVELS = {
    "auto": ({"preview_at": 1.0}, r"preview_at must lie in \(0, 1\)"),
    "code": ({"start": 1.5}, r"start is a share in \[0, 1\]"),
    "dts": ({"branch_levels": [1.0]}, r"branch_levels are fractions in \[0, 1\)"),
    "dts_star": ({"noise_levels": [1.2]}, r"noise_levels are shares in \[0, 1\]"),
    "epf": ({"checkpoints": [1.0]}, r"checkpoints are shares in \[0, 1\)"),
    "evo": ({"schedule": [0.2, 1.0]}, r"schedule holds shares in \[0, 1\)"),
    "fk": ({"checkpoints": [-0.1]}, r"checkpoints are fractions in \[0, 1\)"),
    "guidance": ({"start": 0.8, "stop": 0.2}, "start <= stop"),
    "parallel_tempering": ({"cuts": [1.0]}, r"cuts are fractions in \[0, 1\)"),
    "particle_gibbs": ({"checkpoints": [1.0]}, r"checkpoints are fractions in \[0, 1\)"),
    "rbf": ({"last_level": 40}, r"lies in 0\.\.\d+"),
    "search_over_paths": ({"seed_level": 0.0}, r"seed_level must lie in \(0, 1\]"),
    "svdd": ({"start": -0.5}, r"start is a share in \[0, 1\]"),
    "tds": ({"start": 1.5}, r"start must lie in \[0, 1\]"),
    "das": ({"start": -1.0}, r"start must lie in \[0, 1\]"),
}
UNLEVELLED = {
    "best_of_majority", "best_of_n", "carinox", "dno", "random_search", "reflect", "reno",
    "zero_order",
}  # fmt: skip
SHORT = {
    "fk": {"checkpoints": [0.95]},
    "epf": {"checkpoints": [0.95]},
    "particle_gibbs": {"noise_levels": [0.01]},
    "parallel_tempering": {"cuts": [0.95], "move": "tail", "eta": 1.0},
    "dts": {"branch_levels": [0.95]},
    "dts_star": {"noise_levels": [0.01]},
}


def test_every_method_with_levels_is_in_the_table() -> None:
    assert set(LEVELS) | UNLEVELLED == set(NAMES)


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_levels_outside_the_grid(name: str) -> None:
    options, words = LEVELS[name]
    assert re.search(words, refused(name, options, OptionError))


@pytest.mark.parametrize("name", sorted(SHORT))
def test_levels_that_leave_no_step_of_this_grid(name: str) -> None:
    """They round to the last step; a longer grid has room for them."""
    message = refused(name, SHORT[name], OptionError)
    assert re.search(r"leave no step of a grid of 6.*take more steps, or pass \(\)", message)
    method = build_method(name, SHORT[name])
    plan = Plan(grid=(model := world(steps=1500)).grid(), costs=model.costs(), budget=Budget())
    method.fit(plan)
    few = world(steps=1)
    assert len(steering.steer(few, reward=near, method=type(method)())) > 0  # defaults are fine


@pytest.mark.parametrize("name", ["svdd", "code"])
def test_a_greedy_search_with_nothing_to_choose(name: str) -> None:
    options = {"select": "argmax", "block_mode": "single"} if name == "code" else {
        "select": "argmax"
    }  # fmt: skip
    message = refused(name, options, OptionError, steps=1)
    assert "Take more steps, or use best_of_n" in message
    assert "Lower start" in refused(name, {**options, "start": 1.0}, OptionError)


# --- populations that cannot be filled ---------------------------------------------------------

SIZES = {
    "auto": ({"n": 3, "pilot": 4}, r"pilot must lie in 2\.\.n"),
    "best_of_majority": ({"n": 2, "k": 3}, r"k must lie in 1\.\.n"),
    "best_of_n": ({"n": 0}, "n must be at least 1"),
    "carinox": ({"restarts": 0}, "restarts must be at least 1"),
    "code": ({"n_branches": 0}, "n_branches must be at least 1"),
    "das": ({"n_particles": 0}, "n_particles must be at least 1"),
    "dno": ({"n_iterations": 0}, "n_iterations must be at least 1"),
    "dts": ({"trajectories": 0}, "trajectories must be at least 1"),
    "dts_star": ({"max_children": 0}, "max_children must be at least 1"),
    "epf": ({"n_particles": 0}, "n_particles must be at least 1"),
    "evo": ({"n_particles": 3, "elites": 3}, "Lower elites, or raise n_particles"),
    "fk": ({"n_particles": 0}, "n_particles must be at least 1"),
    "guidance": ({"n_particles": 0}, "n_particles must be at least 1"),
    "parallel_tempering": ({"ladder": [0.5, 1.0], "n_particles": 3}, "Leave n_particles out"),
    "particle_gibbs": ({"iterations": 2, "burn_in": 2}, r"burn_in must lie in 0\.\.iterations"),
    "random_search": ({"pool": 0}, "pool must be at least 1"),
    "rbf": ({"n_proposals": 3, "quota": 2}, "Raise n_proposals"),
    "reflect": ({"rounds": 0}, "rounds must be at least 1"),
    "reno": ({"restarts": 0}, "restarts must be at least 1"),
    "search_over_paths": ({"n_neighbours": 0}, "n_neighbours must be at least 1"),
    "svdd": ({"n_particles": 0}, "n_particles must be at least 1"),
    "tds": ({"n_particles": 0}, "n_particles must be at least 1"),
    "zero_order": ({"n_neighbours": -1}, "n_neighbours must be >= 0"),
}


@pytest.mark.parametrize("name", NAMES)
def test_populations_that_cannot_be_filled(name: str) -> None:
    options, words = SIZES[name]
    assert re.search(words, refused(name, options, SteeringError))


def test_a_budget_that_does_not_fill_a_population() -> None:
    assert "lower schedule, elites or" in refused("evo", {}, BudgetError, nfe=59)
    assert "Lower burn_in" in refused("particle_gibbs", {"burn_in": 2}, OptionError, nfe=30)
    assert "Lower burn_in" in refused("parallel_tempering", {"burn_in": 4}, OptionError, nfe=60)


# --- gradients, noise --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS.get(n).needs_gradient])
def test_gradients_of_a_reward_that_has_none(name: str) -> None:
    blind = FunctionReward(lambda x: x[:, 0], differentiable=False)
    message = refused(name, {}, RewardError, reward=blind)
    assert "Use a differentiable reward" in message


NOISELESS = {
    "best_of_n": {"select": "soft", "guidance": "dps"},
    "auto": {"follow": "fk"},
    "parallel_tempering": {"move": "tail"},
}
"""Options with which a method needs noise that otherwise does not."""


@pytest.mark.parametrize(
    "name", sorted({*(n for n in NAMES if METHODS.get(n).needs_stochastic), *NOISELESS})
)
def test_deterministic_transitions_where_noise_is_needed(name: str) -> None:
    message = refused(name, {**NOISELESS.get(name, {}), "eta": 0.0}, OptionError)
    assert re.search(r"[Ss]et eta > 0|\(eta > 0\)", message)


def test_noise_that_is_there_is_not_refused() -> None:
    for name in NAMES:
        if METHODS.get(name).needs_stochastic:
            case = CASES[name][0]
            assert replace(case, eta=0.5).kernel().stochastic

"""What a refusal names is what helps: options that make one unit cheaper, levels with room."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest

import steering
from steering.analytic import GaussianMixture
from steering.errors import BudgetError, OptionError
from steering.grids import on_path, shifted
from steering.ledger import Budget
from steering.method import Method, Plan, default_costs
from steering.paths import Linear
from steering.samplers import (
    CARINOX,
    DNO,
    DTS,
    EPF,
    FK,
    RBF,
    SVDD,
    Auto,
    BestOfN,
    CoDe,
    DTSStar,
    Evo,
    ParallelTempering,
    ParticleGibbs,
    Reflect,
    ReNO,
    SearchOverPaths,
    ZeroOrder,
)
from tests.test_contract import near, world


def message(method: Method, kind: type, steps: int = 6, **call: Any) -> str:
    """The error a run is refused with before anything is asked."""
    model = world(steps=steps)
    with pytest.raises(kind) as caught:
        steering.steer(model, reward=near, method=method, **call)
    assert model.rows == 0
    return str(caught.value)


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (BestOfN(), []),
        (ReNO(), []),
        (CARINOX(), []),
        (CARINOX(restarts=5), ["restarts"]),
        (CARINOX(n_iterations=4, restarts=5), ["n_iterations", "restarts"]),
        (DNO(n_iterations=4, estimator="hybrid"), ["n_iterations", "n_perturbations"]),
        (ZeroOrder(), []),
        (ZeroOrder(n_neighbours=4), ["n_neighbours"]),
        (SearchOverPaths(), ["n_neighbours"]),
        (CoDe(), ["n_branches"]),
        (SVDD(), ["n_branches"]),
        (FK(lookahead=2, n_draws=3), ["checkpoints", "lookahead", "n_draws"]),
        (EPF(checkpoints=(0.4, 0.7), lookahead="apf"), ["checkpoints"]),
        (Evo(elites=1), ["elites", "schedule"]),
        (RBF(n_chains=3, n_init=4), ["n_chains", "n_init", "finish_steps"]),
        (ParallelTempering(iterations=3), ["iterations"]),
        (ParticleGibbs(n_particles=5), ["n_particles"]),
        (ParticleGibbs(n_particles=5, iterations=2), ["n_particles", "iterations"]),
        (Reflect(n=3), ["n"]),
        (Auto(), ["pilot"]),
        (DTS(), []),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_budget_too_small_names_the_options_to_lower(method, options):
    said = message(method, BudgetError, nfe=1)
    (listed,) = re.findall(r"lower (?:(.*) or )?the number of steps\.", said)
    assert sorted(filter(None, listed.split(", "))) == sorted(options)
    model = world()
    plan = Plan(grid=(grid := method.levels(model)), costs=default_costs(model, grid),
                budget=Budget())  # fmt: skip
    for name in options:
        value = getattr(method, name)
        less = replace(method, **{name: value[1:] if isinstance(value, tuple) else value - 1})
        assert less.cost(plan).nfe < method.cost(plan).nfe


def test_reward_calls_have_options_of_their_own():
    said = message(FK(), BudgetError, budget=Budget(reward_calls=2))
    assert "lower checkpoints or the number of steps" in said
    said = message(BestOfN(n=9), BudgetError, budget=Budget(reward_calls=2))
    assert "needs reward_calls=9" in said
    assert said.endswith("Raise the budget, or lower n.")  # steps change nothing


def test_steps_are_not_named_where_fewer_change_nothing():
    one = Budget(reward_calls=1)
    said = message(ZeroOrder(), BudgetError, steps=1, budget=one)
    assert said.endswith("Raise it to that.")
    assert message(ZeroOrder(rounds=3), BudgetError, budget=one).endswith("or lower rounds.")
    assert message(ParallelTempering(n_particles=3), BudgetError, budget=one).endswith(
        "or lower n_particles."
    )


@pytest.mark.parametrize(
    "method", [ZeroOrder(rounds=3), DTS(trajectories=2), DTSStar(trajectories=3)]
)
def test_the_budget_that_is_named_at_first_is_enough(method):
    (need,) = re.findall(r"needs (?:nfe=)?(\d+)", message(method, BudgetError, nfe=1))
    message(method, BudgetError, nfe=int(need) - 1)
    steering.steer(world(steps=6), reward=near, method=method, nfe=int(need))


def test_a_single_particle_has_no_sweep_to_burn():
    said = message(ParticleGibbs(n_particles=1, burn_in=1), OptionError)
    assert "one particle makes one sweep" in said
    assert "budget" not in said
    said = message(ParticleGibbs(burn_in=1), OptionError, nfe=8)
    assert "Raise the budget" in said


# --- levels -----------------------------------------------------------------------------------


def test_an_earlier_start_is_named_only_where_it_helps():
    said = message(SVDD(select="argmax", start=1.0), OptionError)
    assert "Lower start" in said
    said = message(SVDD(select="argmax"), OptionError, steps=1)
    assert "Take more steps" in said
    assert "start, " not in said


@pytest.mark.parametrize("cls", [FK, ParticleGibbs, DTS])
def test_the_smallest_share_that_is_named_can_be_used(cls):
    def run(share):
        grid = on_path(Linear(), shifted(3))
        model = GaussianMixture([1.0], [[0.5]], [0.5], grid=grid, prompts=("a",))
        steering.steer(model, reward=near, method=cls(noise_levels=(share,)), nfe=12)

    with pytest.raises(OptionError, match="smallest usable share") as caught:
        run(0.1)
    (share,) = re.findall(r"share here is ([\d.]+)[.]", str(caught.value))
    run(float(share))


@pytest.mark.parametrize(
    ("method", "steps", "words"),
    [
        (FK(checkpoints=(0.4, 0.6), resample="always"), 2, "largest usable share here is 0[.]"),
        (DTS(branch_levels=(0.95,)), 8, "largest usable share here is 0.75[.]"),
        (EPF(checkpoints=(0.9,)), 4, "largest usable share here is 0.5[.]"),
        (FK(checkpoints=(0.4,)), 1, "No share is usable here"),
        (ParticleGibbs(noise_levels=(0.01,)), 4, "smallest usable share here is 0.5[.]"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_levels_without_a_step_name_the_last_one_that_has(method, steps, words):
    assert re.search(words, message(method, OptionError, steps))


@pytest.mark.parametrize(
    "method",
    [
        FK(checkpoints=(0.75,), n_particles=2),
        DTS(branch_levels=(0.75,), trajectories=2),
        FK(noise_levels=(0.2501,), n_particles=2),
    ],
)
def test_the_level_that_is_named_can_be_used(method):
    steering.steer(world(steps=8), reward=near, method=method)


@pytest.mark.parametrize("cls", [FK, EPF, ParticleGibbs, DTS])
@pytest.mark.parametrize("steps", [1, 2])
def test_defaults_without_a_step_are_a_warning(cls, steps):
    with pytest.warns(UserWarning, match=f"{cls.name}: the default .* a grid of {steps}"):
        steering.steer(world(steps=steps), reward=near, method=cls())


@pytest.mark.parametrize(
    "method",
    [
        FK(checkpoints=()),
        FK(potential="none"),
        FK(mode="authors"),
        DTS(branch_levels=()),
        ParallelTempering(),
    ],
)
def test_who_asks_for_none_is_not_warned(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steering.steer(world(steps=2), reward=near, method=method)

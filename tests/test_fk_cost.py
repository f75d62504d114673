"""Feynman-Kac steering: its cost, and rewards and potentials that misbehave."""

from __future__ import annotations

import math

import pytest
import torch

import steering
from steering.errors import BudgetError, OptionError, SteeringError
from steering.ledger import Budget
from steering.samplers import FK
from tests.fk_world import CHECKPOINTS, Tweedie
from tests.populations import LINE, line, plan_of, steer
from tests.search_world import Guided
from tests.tiny_pipelines import build


def guided() -> Guided:
    return Guided([0.5, 0.5], [-1.0, 1.0], [0.4, 0.4], steps=7, prompts=("p",))


# --- cost -----------------------------------------------------------------------------------

COSTS = {
    "plain": {},
    "draws": {"n_draws": 3},
    "lookahead": {"lookahead": 2, "n_draws": 2},
    "lookahead beyond the end": {"lookahead": 99},
    "none": {"potential": "none"},
    "no checkpoint": {"checkpoints": ()},
    "same step twice": {"checkpoints": (0.3, 0.31, 0.32)},
    "noise levels": {"noise_levels": (0.8, 0.5, 0.2)},
    "authors": {"mode": "authors"},
}


@pytest.mark.parametrize("case", sorted(COSTS))
def test_the_ledger_agrees_with_the_forecast(case: str) -> None:
    method = FK(n_particles=5, reward_scale=1.0, **COSTS[case])
    model = Tweedie if case == "authors" else Guided
    model = model([0.5, 0.5], [-1.0, 1.0], [0.4, 0.4], steps=7, prompts=("p",))
    cost = method.cost(plan_of(model, method))
    result = steer(model, LINE, method)
    ledger = result.ledger
    assert (ledger.nfe, ledger.decodes, ledger.reward_calls) == (
        cost.nfe,
        cost.decodes,
        cost.reward_calls,
    )
    assert ledger.nfe == model.rows
    assert ledger.nfe_backward == 0


def test_cost_by_hand() -> None:
    """5 particles, 7 guided steps, checkpoints before steps 3, 4 and 5 (6 is the last)."""
    cost = FK(n_particles=5).cost(plan_of(guided(), FK()))
    assert (cost.nfe, cost.decodes, cost.reward_calls) == (5 * 7 * 2, 5 * 3 + 5, 5 * 3 + 5)
    ahead = FK(n_particles=5, checkpoints=(0.5,), lookahead=2, n_draws=3)
    assert ahead.cost(plan_of(guided(), FK())).nfe == 70 + 5 * 3 * 2 * 2


@pytest.mark.parametrize("options", [{}, {"lookahead": 1, "n_draws": 2}], ids=["plain", "ahead"])
@pytest.mark.parametrize("nfe", [40, 70, 71, 83, 84, 85, 333])
def test_budgets_are_filled_and_never_exceeded(options: dict, nfe: int) -> None:
    method = FK(reward_scale=1.0, **options)
    each = FK(n_particles=1, **options).cost(plan_of(guided(), method)).nfe
    if each > nfe:
        with pytest.raises(BudgetError, match=f"one particle needs {each} here"):
            steer(guided(), LINE, method, nfe=nfe)
        return
    result = steer(guided(), LINE, method, nfe=nfe)
    assert len(result) == nfe // each
    assert result.ledger.nfe == len(result) * each <= nfe


def test_reward_calls_are_a_budget_too() -> None:
    result = steer(guided(), LINE, FK(), nfe=1000, budget=Budget(reward_calls=19))
    assert len(result) == 4
    assert result.ledger.reward_calls == 16


def test_a_population_that_costs_more_than_the_budget_is_refused_at_once() -> None:
    model = guided()
    with pytest.raises(BudgetError, match="fk with 9 particles needs nfe=126, the budget is 125"):
        steer(model, LINE, FK(n_particles=9), nfe=125)
    assert model.rows == 0


# --- rewards of -inf, potentials that misbehave -----------------------------------------------


def test_previews_without_weight_are_dropped_and_the_rest_goes_on() -> None:
    def picky(images: torch.Tensor) -> torch.Tensor:
        reward = images[:, 0].clone()
        reward[reward < -1.0] = -torch.inf
        return reward

    for rule in ("ess", "always", "never"):
        method = FK(n_particles=32, reward_scale=1.0, resample=rule, checkpoints=CHECKPOINTS)
        result = steer(line(), picky, method)
        assert not bool(torch.isnan(result.log_weights).any())
        assert math.isfinite(result.log_z)
        assert float(result.weights @ (result.rewards == -torch.inf).double()) == 0.0


def test_no_weight_anywhere_is_a_clear_error() -> None:
    with pytest.raises(SteeringError, match="All 6 particles have weight zero"):
        steer(line(), lambda images: torch.full((len(images),), -torch.inf), FK(n_particles=6))


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        (lambda rho: rho.mean(), "one number per particle"),
        (lambda rho: rho, "one number per particle"),
        (lambda rho: rho[-1] * torch.nan, "NaN"),
    ],
)
def test_a_potential_that_makes_no_weights_is_refused(potential, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        steer(line(), LINE, FK(n_particles=4, potential=potential))


def test_a_potential_of_minus_infinity_is_no_verdict() -> None:
    """Whatever was said on the way, the weight is exp(reward_scale r) of the delivered sample."""

    def gives_up(rho):
        return rho[-1].masked_fill(rho[-1] < rho[-1].median(), float("-inf"))

    method = FK(n_particles=16, reward_scale=0.7, potential=gives_up, resample="never")
    result = steer(line(), LINE, method)
    torch.testing.assert_close(result.log_weights, 0.7 * result.rewards)


def test_a_potential_that_returns_no_tensor_is_named() -> None:
    method = FK(n_particles=2, potential=lambda rho: rho[-1].tolist())
    with pytest.raises(
        OptionError, match=r"one number per particle, 2 in all as a tensor, got \["
    ):
        steer(line(), LINE, method)


def test_draws_that_a_network_cannot_give_are_refused_before_it_is_asked() -> None:
    pipe, call = build("sd", steps=2)
    with steering.wrap(pipe, **call) as model:
        with pytest.raises(OptionError, match="the mean only"):
            steering.steer(
                model, reward=lambda images: images.mean((1, 2, 3)), method=FK(n_draws=2)
            )
        assert model.rows == 0

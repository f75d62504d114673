"""Constraints that most samples break, and goals that end a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from steering.errors import NoWeightError
from steering.ledger import Budget
from steering.samplers import RBF, Auto, ParticleGibbs, RandomSearch, Reflect, ZeroOrder
from tests.populations import errors, line, plan_of, plane, steer


def far(images, prompts):
    """Nothing counts but samples beyond 2: one in ten."""
    return torch.where(images[:, 0] > 2.0, 0.0, -torch.inf)


def test_a_sweep_without_any_weight_costs_a_sweep_and_not_the_run():
    weights, means, stds = np.array([0.6, 0.3, 0.1]), np.array([-2.0, 0.5, 3.0]), [0.5, 0.4, 0.4]
    beyond = (2.0 - means) / stds
    mass = weights * norm.sf(beyond)
    truth = float(
        (weights * (means * norm.sf(beyond) + stds * norm.pdf(beyond))).sum() / mass.sum()
    )
    method = ParticleGibbs(n_particles=4, iterations=12, reward_scale=1.0, checkpoints=())
    budget = Budget(nfe=method.cost(plan_of(line(), method)).nfe)
    found, again = [], 0
    for seed in range(80):
        try:
            result = steer(line(), far, method, seed=seed, budget=budget)
        except NoWeightError:
            continue
        alive = result.weights > 0
        assert (result.samples[alive, 0] > 2.0).all()
        assert result.ledger.nfe <= budget.nfe
        again += result.log_z is None
        found.append(float(result.weights @ result.samples[:, 0].double()))
    assert len(found) > 65
    assert 30 < again < 75  # 0.9^4 of the first sweeps find nothing
    assert errors(found, truth) < 5.0


def test_what_was_found_before_the_burn_in_ended_is_delivered():
    """Misses cost a particle more each, so that the sweeps after it may not be paid for."""
    method = ParticleGibbs(n_particles=3, iterations=4, burn_in=3, checkpoints=())
    late = 0
    for seed in range(40):
        try:
            result = steer(line(), far, method, seed=seed)
        except NoWeightError:
            continue
        alive = result.weights > 0
        assert (result.samples[alive, 0] > 2.0).all()
        late += result.ledger.nfe < method.cost(plan_of(line(), method)).nfe
    assert late > 3


def test_a_run_that_finds_nothing_says_so():
    method = ParticleGibbs(n_particles=2, iterations=3)
    with pytest.raises(NoWeightError, match="All 2 particles have weight zero"):
        steer(line(), lambda images: torch.full((len(images),), -torch.inf), method)


def half(images, prompts):
    """The sum of the coordinates where it is positive, -inf elsewhere."""
    total = images.flatten(1).sum(1)
    return torch.where(total > 0, total, torch.full_like(total, -torch.inf))


def test_what_the_pilot_found_is_kept_where_all_that_follows_is_forbidden():
    """With one particle more, half of the populations have no weight at all."""
    method = Auto(n=7, follow="fk")
    for seed in range(20):
        found = steer(line(), half, method, seed=seed)
        pilot = steer(line(), half, Auto(n=6, pilot=6), seed=seed)
        assert float(found.rewards[0]) >= float(pilot.rewards[0])


# --- goals -------------------------------------------------------------------------------------

GOAL = 0.9  # the float32 beside it is lower
METHODS = {
    "random_search": (RandomSearch(n=30, reward_max=GOAL), 2),
    "zero_order": (ZeroOrder(rounds=4, reward_max=GOAL), 1),
    "rbf": (RBF(n_proposals=40, n_init=2, n_chains=1, reward_max=GOAL), 3),
    "reflect": (Reflect(target_reward=GOAL), 1),
    "auto": (Auto(n=20, target_reward=GOAL), 12),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_goal_is_reached_by_the_float32_nearest_to_it(name):
    method, calls = METHODS[name]
    found = steer(plane(), lambda images: torch.full((len(images),), GOAL), method)
    assert found.ledger.reward_calls <= calls
    missed = steer(plane(), lambda images: torch.full((len(images),), GOAL - 1e-6), method)
    assert missed.ledger.reward_calls > calls

"""Mutants of what happens where rewards are -inf, and of goals."""

from __future__ import annotations

from mutant import Mutant

HERE = "tests/test_forbidden.py::test_"
SWEEP = (f"{HERE}a_sweep_without_any_weight_costs_a_sweep_and_not_the_run",)

MUTANTS = (
    Mutant(
        "auto: what follows takes the pilot's find with it",
        "samplers/auto.py",
        "except NoWeightError:  # all",
        "except ZeroDivisionError:  # all",
        (f"{HERE}what_the_pilot_found_is_kept_where_all_that_follows_is_forbidden",),
    ),
    Mutant(
        "particle_gibbs: ends with the first sweep that finds nothing",
        "samplers/particle_gibbs.py",
        "                continue  # no path",
        "                break  # no path",
        SWEEP,
    ),
    Mutant(
        "particle_gibbs: free sweeps are not paid for",
        "samplers/particle_gibbs.py",
        "            if new > left:",
        "            if False:",
        SWEEP,
    ),
    Mutant(
        "particle_gibbs: the normaliser of the sweeps that found something",
        "samplers/particle_gibbs.py",
        "if reference is None and missed is None:",
        "if reference is None:",
        SWEEP,
    ),
    Mutant(
        "particle_gibbs: what was found before burn_in ended is lost",
        "samplers/particle_gibbs.py",
        "if reference is None and missed is not None:",
        "if missed is not None and not any(pool.weight.values()):",
        (f"{HERE}what_was_found_before_the_burn_in_ended_is_delivered",),
    ),
    Mutant(
        "a goal is compared in float64",
        "samplers/base.py",
        "goal is not None and reward >= min(goal, float(np.float32(goal)))",
        "goal is not None and reward >= goal",
        (f"{HERE}a_goal_is_reached_by_the_float32_nearest_to_it",),
    ),
)

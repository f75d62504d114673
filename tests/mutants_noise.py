"""Mutants of the methods that optimise noise."""

from __future__ import annotations

from mutant import Mutant

NOISE, CARINOX = "tests/test_noise_optimisation.py", "tests/test_carinox.py"

MUTANTS = (
    Mutant(
        "momentum is not Nesterov's",
        "samplers/noise_optimisation.py",
        "nesterov=self.momentum > 0.0",
        "nesterov=False",
        (f"{NOISE}::test_momentum_is_nesterovs",),
    ),
    Mutant(
        "step sizes in proportion to the number of numbers",
        "samplers/noise_optimisation.py",
        "5.0 * (d / 16384.0) ** 0.5",
        "5.0 * (d / 16384.0)",
        (f"{NOISE}::test_step_sizes_grow_with_the_radius_of_the_noise",),
    ),
    Mutant(
        "master noise in half precision",
        "samplers/noise_optimisation.py",
        "torch.promote_types(x.dtype, torch.float32)",
        "x.dtype",
        (f"{NOISE}::test_master_noise_is_at_least_float32",),
    ),
    Mutant(
        "the latest of equal iterates is delivered",
        "samplers/noise_optimisation.py",
        "wins = self.reward > other.reward",
        "wins = self.reward >= other.reward",
        (f"{NOISE}::test_the_first_of_equal_iterates_is_delivered",),
    ),
    Mutant(
        "dno: nudges where nothing is optimised",
        "samplers/dno.py",
        "z if i < free else z + self",
        "z + self",
        (f"{NOISE}::test_nudges_differ_and_touch_only_what_is_optimised",),
    ),
    Mutant(
        "dno: one nudge for all",
        "samplers/dno.py",
        'f"nudge/{i}/{j}"',
        'f"nudge/{i}"',
        (f"{NOISE}::test_nudges_differ_and_touch_only_what_is_optimised",),
    ),
    Mutant(
        "dno: infinite gains",
        "samplers/dno.py",
        "gain = _gain(as_float64(scores.value), reward).to(images)",
        "gain = (as_float64(scores.value) - reward).nan_to_num().to(images)",
        (f"{NOISE}::test_the_hybrid_estimate_leaves_what_the_reward_refuses",),
    ),
    Mutant(
        "carinox: five starts whatever the budget pays for",
        "samplers/carinox.py",
        "return max(1, min(_STARTS, samples // passes))",
        "return min(_STARTS, samples)",
        (f"{CARINOX}::test_no_more_starts_than_the_budget_climbs_from",),
    ),
    Mutant(
        "zero_order: what rounds of four leave is not spent",
        "samplers/zero_order.py",
        "return most // max(1, most // _USUAL)",
        "return min(most, _USUAL)",
        (
            "tests/test_zero_order.py::"
            "test_what_rounds_of_four_would_leave_goes_to_more_neighbours",
        ),
    ),
    Mutant(
        "radius penalty with the wrong sign",
        "samplers/regularisers.py",
        "0.5 * norm.square() - (flat.shape[1] - 1) * norm.log()",
        "(flat.shape[1] - 1) * norm.log() - 0.5 * norm.square()",
        (f"{NOISE}::test_radius_is_smallest_at_its_typical_value_and_rises_on_both_sides",),
    ),
    Mutant(
        "penalty pushes instead of pulling",
        "samplers/noise_optimisation.py",
        "g + self.reg_weight * p.reshape",
        "g - self.reg_weight * p.reshape",
        (f"{NOISE}::test_the_radius_penalty_holds_the_noise_where_the_reward_pulls_it_away",),
    ),
    Mutant(
        "descent instead of ascent",
        "samplers/noise_optimisation.py",
        "grads = [-s.to(z) for",
        "grads = [s.to(z) for",
        (f"{NOISE}::test_the_step_is_the_slope_of_the_whole_sampler",),
    ),
    Mutant(
        "the last iterate is delivered",
        "samplers/noise_optimisation.py",
        "wins = self.reward > other.reward",
        "wins = torch.ones_like(self.reward, dtype=torch.bool)",
        (f"{NOISE}::test_the_best_iterate_is_delivered_not_the_last",),
    ),
    Mutant(
        "clipping over the batch instead of per row",
        "samplers/noise_optimisation.py",
        "factor.reshape(-1, *[1] * (g.ndim - 1))",
        "factor.min()",
        (f"{NOISE}::test_clipping_is_per_row_and_joint_over_tensors",),
    ),
    Mutant(
        "components clipped together",
        "samplers/carinox.py",
        "components = self._components(scores)",
        "components = [Term(torch.ones_like(scores.value), scores.value)]",
        (f"{NOISE}::test_components_are_clipped_apart",),
    ),
    Mutant(
        "weights of components before the clip",
        "samplers/carinox.py",
        "mine = clipped(like, self.component_clip)\n"
        "            total = [a + _per_row(weight, b) * b for",
        "mine = clipped([_per_row(weight, s) * s for s in like], self.component_clip)\n"
        "            total = [a + b for",
        (f"{CARINOX}::test_weights_count_after_the_clip",),
    ),
    Mutant(
        "parts before their weights are climbed",
        "rewards/arithmetic.py",
        "Term(torch.full_like(found.value, weight), found.value)",
        "Term(torch.ones_like(found.value), found.value)",
        (f"{CARINOX}::test_without_clips_the_sum_of_all_components_is_the_slope_of_the_reward",),
    ),
    Mutant(
        "a member's weight is no part of its term",
        "rewards/compose.py",
        "return self.weights(values) * values.new_tensor(rows), self.scaled(values)",
        "return values.new_tensor(rows), self.scaled(values)",
        (f"{CARINOX}::test_weights_count_after_the_clip",),
    ),
    Mutant(
        "terms are dropped where rows are split",
        "steering/batch.py",
        "return Scores(whole.value[index], parts, notes=notes, terms=terms)",
        "return Scores(whole.value[index], parts, notes=notes)",
        (f"{CARINOX}::test_terms_of_many_prompts_stay_with_their_rows",),
    ),
    Mutant(
        "only the first backward pass of a graph is charged",
        "steering/gradients.py",
        "2 * charged - booked[name]",
        "charged",
        (f"{CARINOX}::test_every_component_is_charged_its_backward_pass",),
    ),
    Mutant(
        "probability test without its covariance",
        "samplers/regularisers.py",
        "of_covariance.clamp_max(-_LN2)",
        "of_covariance.clamp(-_LN2, -_LN2)",
        (f"{NOISE}::test_probability_is_silent_on_noise_and_loud_on_what_is_none",),
    ),
    Mutant(
        "one step too many differentiated",
        "samplers/noise_optimisation.py",
        "max(0, len(ctx.grid) - self.differentiate_last)",
        "max(0, len(ctx.grid) - self.differentiate_last - 1)",
        (f"{NOISE}::test_noise_before_the_differentiated_steps_stays",),
    ),
    Mutant(
        "noise of exploding coordinates is not scaled down",
        "samplers/noise_optimisation.py",
        "return size if size > 1.5 else 1.0",
        "return 1.0",
        ("tests/test_coordinates.py::test_noise_is_optimised_as_noise",),
    ),
    Mutant(
        "noise optimisation: short runs take short steps",
        "samplers/noise_optimisation.py",
        "min(most, max(1.0, longer))",
        "min(1.0, max(1.0, longer))",
        ("tests/test_noise_optimisation.py::test_short_runs_can_go_as_far_as_the_published_ones",),
    ),
)

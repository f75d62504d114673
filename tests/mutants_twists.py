"""Mistakes in gradients, twisted proposals and guidance that the tests must notice."""

from __future__ import annotations

from mutant import Mutant

_LAW = (
    "tests/test_tds.py::test_every_rule_has_the_same_target",
    "tests/test_das.py::test_every_tempering_has_the_same_target",
)
_HAND = (
    "tests/test_tds.py::test_weights_by_hand_for_a_linear_reward_and_one_gaussian",
    "tests/test_das.py::test_weights_by_hand_for_a_linear_reward_and_one_gaussian",
)
_GUIDED = "tests/test_guidance.py"
_TOGETHER = "tests/test_engine_gradients.py"

MUTANTS = (
    Mutant(
        "gradients: requests with a graph are served one task at a time",
        "steering/engine.py",
        "return (reward, *keeps)",
        "return (reward, *keeps, id(task) if keeps[0] else 0)",
        (f"{_TOGETHER}::test_eight_tasks_share_calls_and_get_what_each_gets_alone",),
    ),
    Mutant(
        "gradients: served before the others have arrived",
        "steering/engine.py",
        "_ORDER: tuple[type, ...] = (Score, Decode, Denoise, Gradient",
        "_ORDER: tuple[type, ...] = (Gradient, Score, Decode, Denoise",
        (f"{_TOGETHER}::test_the_fast_wait_for_the_slow_before_anything_is_differentiated",),
    ),
    Mutant(
        "gradients: a graph is freed that others hold",
        "steering/gradients.py",
        "keep = len(part) > 1 or outside or any(requests[k].retain for k in part)",
        "keep = False",
        (_TOGETHER,),
    ),
    Mutant(
        "gradients: graphs are not bounded",
        "steering/gradients.py",
        "if wide[kind] and wide[kind] + rows > self.limits[kind]:",
        "if False:",
        (f"{_TOGETHER}::test_rows_alive_in_graphs_are_never_more_than_a_batch",),
    ),
    Mutant(
        "gradients: a method may differentiate by itself",
        "steering/gradients.py",
        "if not ctx.lock.open:",
        "if False:",
        (f"{_TOGETHER}::test_mistakes_are_named_with_and_without_company",),
    ),
    Mutant(
        "gradients: an input without influence gets zeros",
        "steering/gradients.py",
        "if len(used) < len(grads):",
        "if not used:",
        (f"{_TOGETHER}::test_mistakes_are_named_with_and_without_company",),
    ),
    Mutant(
        "gradients: a dead task keeps its place",
        "steering/engine.py",
        "        if task not in pending:\n            self.graphs.release(task)\n",
        "",
        (f"{_TOGETHER}::test_a_task_that_dies_in_between_frees_its_place",),
    ),
    Mutant(
        "gradients: a reward without one is found out late",
        "steering/api.py",
        "    _check_gradient(model, fitted, reward)\n",
        "",
        (f"{_TOGETHER}::test_a_reward_without_gradient_is_refused_before_the_first_call",),
    ),
    Mutant(
        "twists: stale gradients after resampling",
        "samplers/tds.py",
        'state, ancestors = resample(state, scheme(self.resampler), ctx.key("resample", i))',
        "old = state.memory\n"
        "            state, ancestors = resample("
        'state, scheme(self.resampler), ctx.key("resample", i))\n'
        "            state = replace(state, memory=old)",
        ("tests/test_tds.py::test_after_resampling_every_particle_leans_by_its_own_gradient",),
    ),
    Mutant(
        "twists: the ratio of the densities is missing",
        "samplers/twists.py",
        "    log_w = state.log_w + ratio.to(state.log_w.device)\n",
        "    log_w = state.log_w\n",
        (*_HAND, *_LAW),
    ),
    Mutant(
        "twists: the ratio has the wrong sign",
        "samplers/twists.py",
        "return -inner - 0.5 * d.flatten(1).square().sum(1)",
        "return inner + 0.5 * d.flatten(1).square().sum(1)",
        (*_HAND, *_LAW),
    ),
    Mutant(
        "twists: the ratio as seen from the base proposal",
        "samplers/twists.py",
        "return -inner - 0.5 * d",
        "return -inner + 0.5 * d",
        (*_HAND, *_LAW),
    ),
    Mutant(
        "twists: the density of the unclipped proposal",
        "samplers/twists.py",
        "return slope * factor.reshape(-1, *[1] * (slope.ndim - 1))",
        "return slope",
        ("tests/test_tds.py::test_clipping",),
    ),
    Mutant(
        "twists: a shift that is larger than the one in the ratio",
        "samplers/twists.py",
        "Step(like + shift.to(like), base.std)",
        "Step(like + 1.2 * shift.to(like), base.std)",
        (*_HAND, *_LAW),
    ),
    Mutant(
        "twists: away from reward",
        "samplers/tds.py",
        "usable(self.reward_scale * seen.slope)",
        "usable(-self.reward_scale * seen.slope)",
        (
            "tests/test_tds.py::test_weights_are_flat_where_the_twist_is_nearly_exact",
            *_HAND,
        ),
    ),
    Mutant(
        "twists: the last potential is that of an estimate",
        "samplers/base.py",
        "    state = state.set_potential(tilt(reward, reward_scale))\n",
        "",
        (*_HAND, *_LAW),
    ),
    Mutant(
        "twists: the last step is twisted too",
        "samplers/tds.py",
        "return range(min(grid.nearest(self.start), grid.quiet), grid.quiet)",
        "return range(min(grid.nearest(self.start), len(grid)), len(grid))",
        ("tests/test_tds.py::test_the_ledger_is_the_closed_formula",),
    ),
    Mutant(
        "tds: the noise of the prediction is left alone",
        "samplers/twists.py",
        "prediction.eps - t.sigma * shift",
        "prediction.eps",
        ("tests/test_tds.py::test_a_larger_score_keeps_the_state",),
    ),
    Mutant(
        "das: the potential has the next step's temper",
        "samplers/das.py",
        "return self.schedule(i, steps), self",
        "return self.schedule(i + 1, steps), self",
        ("tests/test_das.py::test_the_potential_has_the_temper_of_its_own_step",),
    ),
    Mutant(
        "das: the proposal has this step's temper",
        "samplers/das.py",
        "self.schedule(i + 1, steps)",
        "self.schedule(i, steps)",
        ("tests/test_das.py::test_weights_by_hand_for_a_linear_reward_and_one_gaussian",),
    ),
    Mutant(
        "das: the standard deviation for the variance",
        "samplers/das.py",
        "base.std * base.std * self",
        "base.std * self",
        ("tests/test_das.py::test_weights_by_hand_for_a_linear_reward_and_one_gaussian",),
    ),
    Mutant(
        "das: the adaptive temper forgets the weights carried",
        "samplers/twists.py",
        "return ess(state.set_potential(temper * rho).log_w) >= share",
        "return ess(temper * rho) >= share",
        ("tests/test_das.py::test_the_adaptive_temper_meets_its_threshold",),
    ),
    Mutant(
        "guidance: stale after resampling",
        "samplers/fk.py",
        "            state, ancestors = resample(state, scheme(self.resampler), key)\n",
        "            old = state.memory\n"
        "            state, ancestors = resample(state, scheme(self.resampler), key)\n"
        "            state = replace(state, memory=old)\n",
        ("tests/test_guided_laws.py::test_every_particle_leans_by_its_own_gradient",),
    ),
    Mutant(
        "guidance: best_of_n forgets the densities",
        "samplers/best_of_n.py",
        "log_w = tilt(reward, self.reward_scale) + ratio",
        "log_w = tilt(reward, self.reward_scale)",
        (f"{_GUIDED}::test_guided_soft_best_of_n_is_importance_sampling",),
    ),
    Mutant(
        "guidance: the last step is guided where weights are kept",
        "samplers/guides.py",
        "last = grid.quiet if weighed else len(grid)",
        "last = len(grid)",
        (f"{_GUIDED}::test_the_last_step_is_guided_only_where_no_weights_are_kept",),
    ),
    Mutant(
        "guidance: time travel starts from the level it goes to",
        "samplers/guides.py",
        "x = renoise(y, u, t, key.normal",
        "x = (lambda y, u, t, z: t.alpha * y + t.sigma * z)(y, u, t, key.normal",
        (f"{_GUIDED}::test_time_travel_alone_keeps_the_law",),
    ),
    Mutant(
        "guidance: one stream of noise for all turns",
        "samplers/guides.py",
        'f"{stream}/{turn}" if turn else stream',
        "stream",
        (f"{_GUIDED}::test_every_turn_has_noise_of_its_own",),
    ),
    Mutant(
        "guidance: eps is kept although the estimate moved",
        "samplers/guides.py",
        "moved.eps if self.keep_eps else",
        "moved.eps if True else",
        (f"{_GUIDED}::test_eps_follows_the_estimate_where_it_is_not_kept",),
    ),
    Mutant(
        "guidance: the mean of the draws is not divided by their number",
        "samplers/guides.py",
        "torch.logsumexp(f, 0) - math.log(len(f))",
        "torch.logsumexp(f, 0)",
        (f"{_GUIDED}::test_the_mean_over_draws_of_a_constant_is_the_constant",),
    ),
    Mutant(
        "guidance: the power of the state is left out",
        "samplers/guides.py",
        "(strength * power * u.alpha / t.alpha)",
        "(strength * u.alpha / t.alpha)",
        (f"{_GUIDED}::test_guidance_does_not_depend_on_the_path",),
    ),
    Mutant(
        "guidance: the schedule of the next step",
        "samplers/guides.py",
        "return values[i] * len",
        "return values[min(i + 1, len(values) - 1)] * len",
        (f"{_GUIDED}::test_the_step_by_hand",),
    ),
    Mutant(
        "guidance: smoothing named by the place in the micro-batch",
        "samplers/guides.py",
        "self._noise(key, slots[part], x, t)",
        "self._noise(key, range(len(x[part])), x, t)",
        (f"{_GUIDED}::test_memory_options_change_no_number",),
    ),
    Mutant(
        "guidance: repeated steps are weighed",
        "samplers/guided.py",
        "if guide.recurrence > 1:",
        "if False:",
        (f"{_GUIDED}::test_bad_options",),
    ),
    Mutant(
        "guidance: unit slopes of another size in other coordinates",
        "samplers/guides.py",
        "size = norm * scale / math",
        "size = norm / math",
        ("tests/test_coordinates.py::test_guidance_leans_equally_far",),
    ),
    Mutant(
        "guidance: a schedule without a sum",
        "samplers/guides.py",
        "/ total if total else 0.0",
        "/ total",
        ("tests/test_coordinates.py::test_a_single_step_has_a_schedule_too",),
    ),
    Mutant(
        "tds: twists are not damped",
        "samplers/tds.py",
        "share = damping(self.damping, grid, i)",
        "share = 1.0",
        (
            "tests/test_tds.py::test_weights_by_hand_for_a_linear_reward_and_one_gaussian",
            "tests/test_tds.py::test_no_twist_is_feynman_kac_bit_for_bit",
        ),
    ),
    Mutant(
        "das: the temper starts with the twists",
        "samplers/das.py",
        "steps = grid.quiet  # those after add no noise",
        "steps, i = grid.quiet, i - self.twisted_steps(grid).start",
        ("tests/test_das.py::test_the_potential_has_the_temper_of_its_own_step",),
    ),
)

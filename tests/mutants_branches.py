"""Mutants of the branching, tempered and screened methods."""

from __future__ import annotations

from mutant import Mutant

BRANCHES = "samplers/branches.py"
EPF = "samplers/epf.py"
MAJORITY = "samplers/best_of_majority.py"
LAW = "tests/test_svdd.py::test_weighted_softmax_aims_at_the_tilted_law[line]"
FINITE = "tests/test_svdd.py::test_weighted_softmax_aims_at_the_tilted_law[chain]"
COST = "tests/test_svdd.py::test_cost_by_hand"
TRACE = "tests/test_epf.py::test_weights_follow_from_the_trace"
COUNTER = "tests/test_best_of_majority.py::test_labels_agree_with_a_counter"

MUTANTS = (
    Mutant(
        "branches: argmax for softmax",
        BRANCHES,
        "chosen = categorical(w, key.uniform(n)).clamp_max(m - 1)",
        "chosen = w.argmax(1)",
        (LAW,),
    ),
    Mutant(
        "branches: weight of the choice dropped",
        BRANCHES,
        "return replace(state, log_w=torch.logsumexp(log_w, 1) - math.log(m))",
        "return replace(state, log_w=torch.zeros(n, dtype=torch.float64))",
        (LAW,),
    ),
    Mutant(
        "branches: the survivor keeps its own weight",
        BRANCHES,
        "return replace(state, log_w=torch.logsumexp(log_w, 1) - math.log(m))",
        "return state",
        (LAW,),
    ),
    Mutant(
        "branches: normaliser off by log M",
        BRANCHES,
        "torch.logsumexp(log_w, 1) - math.log(m)",
        "torch.logsumexp(log_w, 1)",
        (LAW,),
    ),
    Mutant(
        "branches: stale prediction after selection",
        BRANCHES,
        "        state = state.gather(torch.arange(n) * m + chosen)\n",
        "        stale = state.prediction and state.prediction.rows(torch.arange(n) * m)\n"
        "        state = replace(state.gather(torch.arange(n) * m + chosen), prediction=stale)\n",
        (LAW, "tests/test_svdd.py::test_weighted_softmax_aims_at_the_tilted_law[line-ess]"),
    ),
    Mutant(
        "branches: the parent's potential counted twice",
        BRANCHES,
        "            return state.set_potential(rho)\n",
        "            return replace(state.set_potential(rho), log_w=state.log_w + rho)\n",
        (FINITE,),
    ),
    Mutant(
        "branches: the delivered sample is not judged",
        BRANCHES,
        "return state.set_potential(tilt(reward, self.reward_scale))",
        "return state",
        (FINITE,),
    ),
    Mutant(
        "branches: copies ask for themselves",
        BRANCHES,
        "            state = yield from self.ask(ctx, state, ctx.grid.times[start], start)\n",
        "            if not segment.branched:\n"
        "                state = yield from self.ask(ctx, state, ctx.grid.times[start], start)\n",
        ("tests/test_svdd.py::test_nothing_is_asked_twice", COST),
    ),
    Mutant(
        "branches: the judging prediction is asked again",
        "samplers/base.py",
        "state.prediction or (yield Denoise(state.x, t))",
        "(yield Denoise(state.x, t))",
        ("tests/test_svdd.py::test_nothing_is_asked_twice",),
    ),
    Mutant(
        "branches: greedy search with weights",
        BRANCHES,
        "            return replace(state, log_w=torch.zeros(n, dtype=torch.float64))\n",
        "            return state\n",
        ("tests/test_svdd.py::test_argmax_has_no_normaliser_and_equal_weights",),
    ),
    Mutant(
        "branches: the target does not follow the options",
        BRANCHES,
        '"tilted" if self.select == "softmax" else "heuristic"',
        '"tilted"',
        ("tests/test_svdd.py::test_argmax_has_no_normaliser_and_equal_weights",),
    ),
    Mutant(
        "svdd: a step without noise is branched",
        "samplers/svdd.py",
        "range(begin, quiet, every)",
        "range(begin, end, every)",
        (COST, "tests/test_svdd.py::test_the_survivors_go_on_with_their_own_predictions"),
    ),
    Mutant(
        "svdd: judged from the first step on",
        "samplers/svdd.py",
        "max(0, grid.nearest(self.start) - 1)",
        "0",
        (COST,),
    ),
    Mutant(
        "code: a block begins at the last step",
        "samplers/code.py",
        "range(begin + self.block, grid.quiet, self.block)",
        "range(begin + self.block, end, self.block)",
        ("tests/test_code.py::test_blocks_begin_and_end_where_they_should",),
    ),
    Mutant(
        "code: candidates share their first noise",
        "samplers/code.py",
        'return self.n_branches if self.block_mode == "full" else 1',
        "return 1",
        ("tests/test_code.py::test_one_block_is_best_of_n_bit_for_bit",),
    ),
    Mutant(
        "code: the reference is not scaled to its noise level",
        "samplers/code.py",
        "t.alpha * self.reference",
        "self.reference",
        ("tests/test_code.py::test_the_walk_starts_from_the_noised_reference",),
    ),
    Mutant(
        "epf: tempering uncorrected",
        EPF,
        "            if not self.correct:\n",
        "            if True:\n",
        ("tests/test_epf.py::test_corrected_resampling_aims_at_the_tilted_law[line-base]",),
    ),
    Mutant(
        "epf: nothing is tempered",
        EPF,
        "normalise(log_p / tau)",
        "normalise(log_p)",
        (TRACE,),
    ),
    Mutant(
        "epf: sharpened instead of flattened",
        EPF,
        "normalise(log_p / tau)",
        "normalise(log_p * tau)",
        (TRACE,),
    ),
    Mutant(
        "epf: the last potential is damped too",
        EPF,
        "deliver(ctx, state, self.reward_scale)",
        "deliver(ctx, state, damping(self.damping, grid, steps[-1]) * self.reward_scale)",
        (
            TRACE,
            "tests/test_epf.py::test_corrected_resampling_aims_at_the_tilted_law[line-damped]",
        ),
    ),
    Mutant(
        "epf: nothing is damped",
        EPF,
        "x0, part = state.prediction.x0, damping(self.damping, grid, i)",
        "x0, part = state.prediction.x0, 1.0",
        (TRACE, "tests/test_epf.py::test_damping_steadies_a_reward_with_many_peaks"),
    ),
    Mutant(
        "epf: the look-ahead is damped as its start",
        EPF,
        "part = damping(self.damping, ctx.grid, j)",
        "part = damping(self.damping, ctx.grid, i)",
        ("tests/test_epf.py::test_constant_rewards_change_nothing",),
    ),
    Mutant(
        "epf: a temperature below one",
        EPF,
        "return max(1.0, (1.0 - u) / share)",
        "return (1.0 - u) / share",
        ("tests/test_epf.py::test_the_temperature_never_sharpens_and_rests_where_it_should",),
    ),
    Mutant(
        "epf: annealing never ends",
        EPF,
        " or u >= early_phase",
        "",
        ("tests/test_epf.py::test_the_temperature_never_sharpens_and_rests_where_it_should",),
    ),
    Mutant(
        "epf: the look-ahead counts the present potential twice",
        EPF,
        "log_eta = ahead - state.phi",
        "log_eta = ahead",
        (TRACE,),
    ),
    Mutant(
        "epf: the mean of eta forgets the weights",
        EPF,
        "torch.log_softmax(state.log_w, 0) + log_eta",
        "torch.log_softmax(torch.zeros_like(log_eta), 0) + log_eta",
        (TRACE,),
    ),
    Mutant(
        "epf: the look-ahead goes where its particle goes",
        EPF,
        'step=i, stream="lookahead")',
        "step=i)",
        ("tests/test_epf.py::test_the_lookahead_has_noise_of_its_own",),
    ),
    Mutant(
        "majority: frequency screen after top-k",
        MAJORITY,
        "frequent = by_frequency[frequency[by_frequency] >= wanted]",
        "frequent = (lambda top: top[frequency[top] >= wanted])(order[: self.k])",
        (COUNTER,),
    ),
    Mutant(
        "majority: no screen at all",
        MAJORITY,
        "if wanted > 0.0:",
        "if False:",
        (
            "tests/test_best_of_majority.py::"
            "test_regret_of_best_of_n_grows_and_that_of_best_of_majority_does_not",
        ),
    ),
    Mutant(
        "majority: ties of the reward go to the first, not to the frequent",
        MAJORITY,
        "by_frequency = frequency.argsort(descending=True, stable=True)",
        "by_frequency = torch.arange(len(reward))",
        ("tests/test_best_of_majority.py::test_a_constant_reward_leaves_the_majority",),
    ),
    Mutant(
        "majority: frequency decides ties although nothing is asked of it",
        MAJORITY,
        "if wanted > 0.0:",
        "if wanted >= 0.0:",
        ("tests/test_best_of_majority.py::test_no_least_frequency_is_best_of_n_bit_for_bit",),
    ),
    Mutant(
        "majority: clusters end at the nearest neighbours",
        MAJORITY,
        "        if torch.equal(further, near):\n",
        "        if True:\n",
        ("tests/test_best_of_majority.py::test_clusters_are_chains_of_near_neighbours",),
    ),
    Mutant(
        "majority: distinct takes the worst of a group",
        MAJORITY,
        "for i in order.tolist():",
        "for i in order.flip(0).tolist():",
        ("tests/test_best_of_majority.py::test_distinct_takes_one_of_each",),
    ),
)

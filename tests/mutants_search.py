"""Mutants of the searches: random, zero-order, over paths, evolution, rollover budget forcing."""

from __future__ import annotations

from mutant import Mutant

QUOTAS = "tests/test_rbf.py::test_quotas_are_kept_and_roll_over"
MOVES = "tests/test_rbf.py::test_what_a_chain_moves_to_and_what_it_must_beat"
CHAIN = "tests/test_rbf.py::test_one_proposal_a_level"
PLAIN = "tests/test_rbf.py::test_without_preference_states_follow_the_plain_sde"
LEAST = "tests/test_rbf.py::test_the_budget_that_an_error_asks_for_is_enough_and_no_more"
ELITES = "tests/test_evo.py::test_elites_survive_unchanged_at_the_level_they_were_found"
MIDDLE = "tests/test_evo.py::test_the_law_of_states_mutated_on_the_way"
PIVOT = "tests/test_zero_order.py::test_every_round_searches_round_the_pivot"

MUTANTS = (
    Mutant(
        "rbf: rollover lost",
        "samplers/rbf_chain.py",
        "kept = self.quota - self.used if early and self.quotas.rollover else 0",
        "kept = 0",
        (f"{QUOTAS}[equal]",),
    ),
    Mutant(
        "rbf: a forced move hands on a quota too",
        "samplers/rbf_chain.py",
        "kept = self.quota - self.used if early and self.quotas.rollover else 0",
        "kept = self.quota if self.quotas.rollover else 0",
        (f"{QUOTAS}[list]",),
    ),
    Mutant(
        "rbf: forced move to the last proposal",
        "samplers/rbf_chain.py",
        "if self.best is None or best.reward > self.best.reward:",
        "if True:",
        (f"{MOVES}[global-best]",),
    ),
    Mutant(
        "rbf: best of a level carried to the next",
        "samplers/rbf_chain.py",
        "self.first = self.best = self.seen = None",
        "self.first = self.seen = None",
        (f"{MOVES}[global-best]",),
    ),
    Mutant(
        "rbf: a forced move lowers the global bar",
        "samplers/rbf.py",
        'if self.bar == "level":',
        "if True:",
        (f"{MOVES}[global-best]",),
    ),
    Mutant(
        "rbf: ties accepted by >",
        "samplers/rbf.py",
        'return reward > wanted if self.accept == ">" else reward >= wanted',
        "return reward >= wanted",
        ("tests/test_rbf.py::test_ties_and_margins",),
    ),
    Mutant(
        "rbf: proposals of a level share their noise",
        "samplers/rbf.py",
        "slots = range(chain.spent, chain.spent + m)",
        "slots = range(m)",
        ("tests/test_rbf.py::test_proposals_differ",),
    ),
    Mutant(
        "rbf: another path without its scale",
        "samplers/rbf_levels.py",
        "self.inner(c_t * x, pred, t2, u2, self.path)",
        "self.inner(x, pred, t2, u2, self.path)",
        ("tests/test_rbf.py::test_euler_maruyama_on_another_path_keeps_the_law",),
    ),
    Mutant(
        "rbf: the estimate is delivered although a finish was asked for",
        "samplers/rbf.py",
        'if self.finish == "none":\n            x',
        "if True:\n            x",
        ("tests/test_rbf.py::test_the_delivered_sample_is_denoised_and_scored_again",),
    ),
    Mutant(
        "rbf: proposals of one level share their noise with the next",
        "samplers/rbf.py",
        "kernel, step=k, slots=slots, stream=chain.stream",
        "kernel, step=0, slots=slots, stream=chain.stream",
        (f"{CHAIN}_without_preference_is_the_plain_chain_bit_for_bit",),
    ),
    Mutant(
        "rbf: levels of img2img not squeezed",
        "samplers/rbf_levels.py",
        "[start * r / shape[0] for r in shape[1 : last + 2]]",
        "list(shape[1 : last + 2])",
        ("tests/test_rbf.py::test_a_pipeline_that_starts_late_keeps_its_first_level",),
    ),
    Mutant(
        "rbf: karras levels read in the time of the search",
        "samplers/rbf_levels.py",
        '    if name != "karras":',
        "    if True:",
        ("tests/test_rbf_levels.py::test_karras_levels_are_those_of_karras_on_every_path",),
    ),
    Mutant(
        "rbf: karras levels squeezed below the first",
        "samplers/rbf_levels.py",
        "return [time_on(Linear(), first.log_snr), *",
        "return [1.0, *",
        ("tests/test_rbf_levels.py::test_karras_levels_of_a_late_start_lie_below_it",),
    ),
    Mutant(
        "rbf: quiet levels of shapes searched",
        "samplers/rbf.py",
        "shape, count - 2, 1).quiet - 1",
        "shape, count - 2, 1).quiet * 0 + count - 2",
        ("tests/test_rbf_levels.py::test_levels_that_add_a_trace_of_noise_are_not_searched",),
    ),
    Mutant(
        "rbf: a level without noise searched",
        "samplers/rbf.py",
        "        check_noise(self.kernel(), grid, last)\n",
        "",
        ("tests/test_rbf_levels.py::test_a_level_without_noise_is_refused_at_once",),
    ),
    Mutant(
        "rbf: only the first level must have noise",
        "samplers/rbf_levels.py",
        "enumerate(grid.times[: last + 1])",
        "enumerate(grid.times[:1])",
        ("tests/test_rbf_levels.py::test_a_level_without_noise_is_refused_at_once",),
    ),
    Mutant(
        "rbf: an error that asks for the cost of one proposal",
        "samplers/rbf.py",
        "max(_DEFAULT, least), what, self, least)",
        "max(_DEFAULT, least), what, self)",
        (LEAST,),
    ),
    Mutant(
        "rbf: quotas forgotten in what a budget must pay",
        "samplers/rbf.py",
        "return sum(each_level(self.quota, self.last(grid) + 1))",
        "return self.last(grid) + 1",
        (LEAST,),
    ),
    Mutant(
        "evo: elites mutated",
        "samplers/evo.py",
        "return torch.cat([parents.x[elites.to(place)], mutated])",
        "return self._mutate(ctx, parents, torch.cat([elites, chosen]).to(place), node, g)",
        (f"{ELITES}[True]",),
    ),
    Mutant(
        "evo: states archived a level late",
        "samplers/evo.py",
        "            if node in later:\n                passed[node] = (x, prediction)\n",
        "            if node - 1 in later:\n                passed[node - 1] = (x, prediction)\n",
        (f"{ELITES}[True]",),
    ),
    Mutant(
        "evo: children start a level late",
        "samplers/evo.py",
        "walk(ctx, x, kernel, start=start, stream",
        "walk(ctx, x, kernel, start=start + (g > 0), stream",
        ("tests/test_evo.py::test_every_generation_starts_at_its_own_node",),
    ),
    Mutant(
        "evo: noise added without taking any away",
        "samplers/evo.py",
        "return eps_blend(prediction.x0, prediction.eps, z, t.alpha, t.sigma, share)",
        "return x + share * t.sigma * z",
        (f"{MIDDLE}[strong blend]",),
    ),
    Mutant(
        "evo: noise mutated without rescale",
        "steering/noise.py",
        "return math.sqrt(1.0 - beta * beta) * x + beta * z",
        "return x + beta * z",
        ("tests/test_evo.py::test_mutated_noise_follows_the_law_of_noise",),
    ),
    Mutant(
        "evo: the archive forgets",
        "samplers/evo.py",
        "earlier = self.kept.get(node) if self.all else None",
        "earlier = None",
        (f"{ELITES}[True]",),
    ),
    Mutant(
        "evo: one tournament for all children",
        "samplers/evo.py",
        "subsets = key.uniform(n, (m,)).argsort(1)",
        "subsets = key.uniform(1, (m,)).expand(n, m).argsort(1)",
        ("tests/test_evo.py::test_tournaments",),
    ),
    Mutant(
        "best of the last round instead of all",
        "samplers/rollout.py",
        "    rewards: list[Tensor] = []\n",
        "    rewards: list[Tensor] = []\n    best = None\n",
        (
            "tests/test_random_search.py::test_rounds_change_nothing_and_the_best_of_all_is_kept",
            "tests/test_zero_order.py::test_the_best_of_all_rounds_is_kept",
            "tests/test_evo.py::test_the_best_of_all_generations_is_kept",
        ),
    ),
    Mutant(
        "random search: every round has the same seeds",
        "samplers/random_search.py",
        'key = ctx.key("init").at(slot=done)',
        'key = ctx.key("init")',
        ("tests/test_random_search.py::test_rounds_change_nothing_and_the_best_of_all_is_kept",),
    ),
    Mutant(
        "zero order: pivot made again",
        "samplers/zero_order.py",
        "noises = self._neighbours(ctx, pivot, r, self._each)",
        "noises = self._neighbours(ctx, pivot, r, self._each)\n"
        "                noises[0] = pivot[0]",
        ("tests/test_zero_order.py::test_the_pivot_is_not_made_again",),
    ),
    Mutant(
        "zero order: moves to the best neighbour even if it is worse",
        "samplers/zero_order.py",
        "moved = float(rewards[k]) > floor",
        "moved = True",
        (f"{PIVOT}[fresh]",),
    ),
    Mutant(
        "zero order: the same directions in every round",
        "samplers/zero_order.py",
        'ctx.key("neighbour", r)',
        'ctx.key("neighbour")',
        ("tests/test_zero_order.py::test_rounds_round_one_pivot_look_elsewhere",),
    ),
    Mutant(
        "zero order: noise on the way differs between neighbours",
        "samplers/zero_order.py",
        "slots = [0] * len(noises)",
        "slots = list(range(len(noises)))",
        ("tests/test_zero_order.py::test_noise_on_the_way_is_the_same_for_all",),
    ),
    Mutant(
        "search over paths: re-noised by the level's whole sigma",
        "samplers/search_over_paths.py",
        "return renoise(copies, ctx.grid.times[start], ctx.grid.times[via], z.to(copies))",
        "return copies + ctx.grid.times[via].sigma * z.to(copies)",
        ("tests/test_search_over_paths.py::test_without_preference_the_law_is_the_models",),
    ),
    Mutant(
        "search over paths: keeps the worst",
        "samplers/search_over_paths.py",
        "rewards.argsort(descending=True, stable=True)",
        "rewards.argsort(stable=True)",
        (
            "tests/test_search_over_paths.py::test_every_round_starts_from_the_states_that_scored_best",
        ),
    ),
    Mutant(
        "search over paths: the last round stops short",
        "samplers/search_over_paths.py",
        "stop = min(node + gain, steps)",
        "stop = min(node + gain, steps - 1)\n            if stop <= node:\n                return",
        ("tests/test_search_over_paths.py::test_rounds_by_hand",),
    ),
    Mutant(
        "zero_order: a pivot that came alone is dropped untried",
        "samplers/zero_order.py",
        'self.restart == "keep" or untried',
        'self.restart == "keep"',
        (
            "tests/test_zero_order.py::"
            "test_a_new_pivot_that_comes_alone_gets_neighbours_of_its_own",
        ),
    ),
)

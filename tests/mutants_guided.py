"""Mistakes in methods that take guidance, and in what methods refuse."""

from __future__ import annotations

from mutant import Mutant

_LAWS, _METHODS = "tests/test_guided_laws.py", "tests/test_guided_methods.py"
_POPULATIONS = f"{_LAWS}::test_guided_populations_aim_at_the_tilted_law"
_OWN = f"{_LAWS}::test_every_particle_leans_by_its_own_gradient"
_SWEEPS = f"{_LAWS}::test_guided_sweeps_keep_the_tilted_law_of_paths"
_CHAINS = f"{_LAWS}::test_every_guided_chain_keeps_its_own_law"
_LEDGER = f"{_METHODS}::test_the_ledger_agrees_with_the_forecast"
_SAME = f"{_METHODS}::test_samples_of_a_guided_search_are_those_of_guidance"
_SEARCHES = "tests/test_guided_searches.py"
_RATIOS = f"{_SEARCHES}::test_ratios_of_a_tree_by_hand"
_FULL = f"{_SEARCHES}::test_a_guided_tree_of_fixed_width_is_unbiased[plane]"
_COUNTS = f"{_SEARCHES}::test_children_count_as_often_as_their_ratios_say"
_ALONE = f"{_SEARCHES}::test_one_proposal_a_level_is_a_guided_walk"
_SHARED = f"{_SEARCHES}::test_proposals_from_a_state_share_one_gradient_whatever_their_batch"
_HAND = f"{_METHODS}::test_costs_by_hand"
TREE, ROLLOUT, SEARCH, RBF = (
    f"samplers/{name}.py" for name in ("tree", "tree_rollout", "tree_search", "rbf")
)
GIBBS, CHAINS, GUIDES = (
    f"samplers/{name}.py" for name in ("particle_gibbs", "parallel_tempering", "guides")
)
_STEP = "state = self.advance(ctx, state, t, u, i, kernel)"
_UNWEIGHED = "state = replace(self.advance(ctx, state, t, u, i, kernel), log_w=state.log_w)"

MUTANTS = (
    Mutant(
        "gradients are clipped in the path's coordinates",
        "samplers/guides.py",
        "self.clip_norm / scale",
        "self.clip_norm",
        ("tests/test_coordinates.py::test_gradients_are_clipped_equally",),
    ),
    Mutant(
        "guided: epf forgets the densities",
        "samplers/epf.py",
        _STEP,
        _UNWEIGHED,
        (f"{_POPULATIONS}[epf]",),
    ),
    Mutant(
        "guided: svdd forgets the densities",
        "samplers/branches.py",
        _STEP,
        _UNWEIGHED,
        (f"{_POPULATIONS}[svdd]",),
    ),
    Mutant(
        "guided: code forgets the densities",
        "samplers/branches.py",
        _STEP,
        _UNWEIGHED,
        (f"{_POPULATIONS}[code]",),
    ),
    Mutant(
        "guided: fk forgets the densities",
        "samplers/fk.py",
        _STEP,
        _UNWEIGHED,
        ("tests/test_guidance.py::test_guided_fk_has_the_target_of_fk[both]",),
    ),
    Mutant(
        "guided: particle_gibbs forgets the densities of new particles",
        GIBBS,
        "log_w=state.log_w + ratio,",
        "log_w=state.log_w + torch.cat([ratio[:kept], 0.0 * ratio[kept:]]),",
        (f"{_POPULATIONS}[particle_gibbs]", f"{_SWEEPS}[three]"),
    ),
    Mutant(
        "guided: particle_gibbs forgets the density of its kept path",
        GIBBS,
        "log_w=state.log_w + ratio,",
        "log_w=state.log_w + torch.cat([0.0 * ratio[:kept], ratio[kept:]]),",
        (f"{_LAWS}::test_weights_of_a_sweep_by_hand",),
    ),
    Mutant(
        "guided: a kept path with a new past has the density of the old one",
        GIBBS,
        "            if met:  # its past",
        "            if False:  # its past",
        (f"{_LAWS}::test_weights_after_a_new_past_by_hand",),
    ),
    Mutant(
        "guided: a new past is drawn by the density of the proposal",
        GIBBS,
        "            log_p = step.log_prob(after)\n",
        '            seen = Guided(state.prediction, *(state.memory[f"{k}/{i}"] for k in '
        '("pull", "lean")))\n'
        "            _, lean = self.guide.proposal(ctx, state.x, seen, t, u, i, self.kernel())\n"
        "            log_p = type(step)(step.mean + lean, step.std).log_prob(after)\n",
        (f"{_LAWS}::test_a_new_past_is_drawn_by_the_density_of_the_base_sampler",),
    ),
    Mutant(
        "guided: particle_gibbs goes on with what it found before resampling",
        GIBBS,
        '                found = {name: state.memory[f"{name}/{i}"] for name in found}\n',
        "",
        (_OWN, f"{_SWEEPS}[three]"),
    ),
    Mutant(
        "guided: the weight of a forced path divided by its probability",
        GIBBS,
        "                state = replace(state, log_w=mean)\n",
        "                pass\n",
        ("tests/test_particle_gibbs.py::test_a_kept_path_of_no_weight_goes_on",),
    ),
    Mutant(
        "guided: tails are accepted as if drawn from the model",
        CHAINS,
        '                (proposal.memory["ratio"] - chains.memory["ratio"]).sum(1),\n',
        "",
        (_CHAINS,),
    ),
    Mutant(
        "guided: the ratio of a tail forgets its head",
        CHAINS,
        'ratio, lead = memory["ratio"].clone(), self.lead(ctx)',
        'ratio, lead = torch.zeros_like(memory["ratio"]), self.lead(ctx)',
        (f"{_LAWS}::test_a_tail_keeps_the_ratio_of_its_head",),
    ),
    Mutant(
        "guided: epf leans by the gradients of before resampling",
        "samplers/epf.py",
        "                state = yield from self._resample(ctx, state, ahead, i, after[i])\n",
        "                old = state.memory\n"
        "                state = yield from self._resample(ctx, state, ahead, i, after[i])\n"
        "                state = replace(state, memory=old)\n",
        (_OWN,),
    ),
    Mutant(
        "guided: what was found at the old state is kept",
        "samplers/twists.py",
        "prediction=None, memory={})",
        "memory=state.memory)",
        (_OWN,),
    ),
    Mutant(
        "guided: the row asked again is not in the forecast",
        "samplers/branches.py",
        "again = self.guide is not None and self.guide.rho > 0.0",
        "again = False",
        (_LEDGER,),
    ),
    Mutant(
        "guided: smoothing named by the place in the batch",
        GUIDES,
        "rows.slots or range(len(x))",
        "range(len(x))",
        (_SAME,),
    ),
    Mutant(
        "guided: repeated steps of a walk are not in the forecast",
        GUIDES,
        "c * (self.recurrence if i in steps else 1)",
        "c",
        (_LEDGER,),
    ),
    Mutant(
        "guided: a walk goes on unguided",
        "samplers/rollout.py",
        "guided = lead.guide.guided_steps(ctx.grid) if lead is not None else ()",
        "guided = ()",
        (_SAME,),
    ),
    Mutant(
        "guided: dts forgets the densities",
        ROLLOUT,
        "r.ratios[-1] += more",
        "r.ratios[-1] += 0.0 * more",
        (_FULL, _RATIOS),
    ),
    Mutant(
        "guided: the ratio of a tree's edge counts those above it",
        ROLLOUT,
        "r.ratios.append(0.0)",
        "r.ratios.append(r.ratios[-1])",
        (_FULL, _RATIOS),
    ),
    Mutant(
        "guided: values of a tree forget the densities",
        TREE,
        "combine(values, self.backup, ratios)",
        "combine(values, self.backup)",
        (_FULL, _COUNTS),
    ),
    Mutant(
        "guided: descents of a tree forget the densities",
        TREE,
        "return [self.value[c] + self._counts(c) for c in self.children[node]]",
        "return [self.value[c] for c in self.children[node]]",
        (_COUNTS,),
    ),
    Mutant(
        "guided: the last step of a weighed tree is led",
        ROLLOUT,
        "weighed=weighed, rows=rows",
        "weighed=False, rows=rows",
        (f"{_SEARCHES}::test_without_branching_a_guided_tree_is_guided_best_of_n",),
    ),
    Mutant(
        "guided: a tree is read back without its ratios",
        TREE,
        'tensors["ratio"] = torch.tensor(self.ratio, dtype=torch.float64)',
        "pass",
        (f"{_SEARCHES}::test_ratios_are_kept_and_gone_on_with",),
    ),
    Mutant(
        "guided: a tree whose densities nobody kept is taken",
        SEARCH,
        "if self.weighed and any(map(math.isnan, tree.ratio)):",
        "if False:",
        (f"{_SEARCHES}::test_a_tree_whose_densities_nobody_kept_is_refused_where_they_count",),
    ),
    Mutant(
        "guided: gradients of a tree are not in its budget",
        SEARCH,
        "1 + sum(calls[start:])",
        "1",
        (f"{_SEARCHES}::test_reward_calls_pay_for_gradients_of_a_tree",),
    ),
    Mutant(
        "guided: rbf looks again for every proposal",
        RBF,
        "c.seen is None and c.level in guided",
        "c.level in guided",
        (_HAND, _SHARED),
    ),
    Mutant(
        "guided: rbf goes on with the gradient of the state before",
        "samplers/rbf_chain.py",
        "self.first = self.best = self.seen = None",
        "self.first = self.best = None",
        (_ALONE, f"{_SEARCHES}::test_chains_lean_by_gradients_of_their_own"),
    ),
    Mutant(
        "guided: chains of rbf lean by the gradient of the first",
        RBF,
        "seen.rows(slice(i, i + 1))",
        "seen.rows(slice(0, 1))",
        (_ALONE,),
    ),
    Mutant(
        "guided: proposals of rbf do not lean",
        RBF,
        "return draw(ctx, base, shift, k, chain.stream, slots)[0]",
        "return draw(ctx, base, None, k, chain.stream, slots)[0]",
        (_ALONE,),
    ),
    Mutant(
        "guided: rbf finishes unguided",
        RBF,
        "lead=self.lead(ctx),",
        "lead=None,",
        (_HAND, _ALONE),
    ),
    Mutant(
        "guided: what the finish asks again is not in the forecast",
        RBF,
        "(2 if self.finish",
        "(1 if self.finish",
        (f"{_LEDGER}[rbf-0]",),
    ),
    Mutant(
        "guided: a method of the user's own swallows the option",
        "samplers/base.py",
        "        if self.unguided is not None:\n",
        "        if False:\n",
        (f"{_METHODS}::test_a_method_of_the_users_own_does_not_swallow_guidance",),
    ),
    Mutant(
        "refusals: levels that leave no step are dropped in silence",
        "samplers/base.py",
        "    if levels and not steps and levels != usual:\n",
        "    if False:\n",
        ("tests/test_refusals.py::test_levels_that_leave_no_step_of_this_grid",),
    ),
    Mutant(
        "refusals: a greedy search without a choice runs",
        "samplers/branches.py",
        "        chosen = any(segment.branched for",
        "        chosen = True or any(segment.branched for",
        ("tests/test_refusals.py::test_a_greedy_search_with_nothing_to_choose",),
    ),
    Mutant(
        "guidance: only alpha = 0 is pure noise",
        "steering/paths.py",
        "self.alpha < 0.01 * self.sigma",
        "self.alpha < 1e-6",
        (
            "tests/test_guidance.py::"
            "test_a_grid_that_starts_near_pure_noise_is_guided_as_one_that_starts_there",
        ),
    ),
    Mutant(
        "guidance: a step without noise is shifted where weights are kept",
        "samplers/guides.py",
        "if weighed and not base.random:",
        "if False:",
        (
            "tests/test_guidance.py::"
            "test_a_step_without_noise_is_not_guided_where_weights_are_kept",
        ),
    ),
)

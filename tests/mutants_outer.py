"""Mutants of the methods that decide from round to round."""

from __future__ import annotations

from mutant import Mutant

REFLECT, AUTO = "tests/test_reflect.py", "tests/test_auto.py"
WAYS, IDLE = "tests/test_ways_out.py", "tests/test_idle_options.py"

MUTANTS = (
    Mutant(
        "presets: values that nobody typed are refused",
        "steering/method.py",
        "if not idle or not idle <= set(preset):",
        "if idle:",
        (f"{IDLE}::test_what_a_preset_says_gives_way_to_what_makes_it_useless",),
    ),
    Mutant(
        "answers of slow critics in the order they come",
        "steering/task.py",
        "said = [_result(future) for future in asked]",
        "from concurrent.futures import as_completed\n"
        "        said = [_result(future) for future in as_completed(asked)]",
        (f"{REFLECT}::test_slow_critics_answer_out_of_turn_and_stay_in_order",),
    ),
    Mutant(
        "critics of one prompt after those of another",
        "steering/engine.py",
        "answers = ask_all(group, requests)  # type: ignore[arg-type]",
        "answers = [a for t, r in zip(group, requests) for a in ask_all([t], [r])]",
        (f"{REFLECT}::test_critics_of_all_prompts_are_asked_together",),
    ),
    Mutant(
        "the last round is delivered",
        "samplers/reflect.py",
        "float(new.reward[k]) <= float(old.reward[0])",
        "False",
        (f"{REFLECT}::test_rounds_are_independent_and_the_best_of_all_is_kept",),
    ),
    Mutant(
        "every round draws the same noise",
        "samplers/reflect.py",
        'stream = "" if k == 0 else f"/{k}"',
        'stream = ""',
        (f"{REFLECT}::test_rounds_are_independent_and_the_best_of_all_is_kept",),
    ),
    Mutant(
        "rewritten prompt not used",
        "steering/batch.py",
        "task.cond if request.cond is None else request.cond",
        "task.cond",
        (f"{REFLECT}::test_rewritten_prompts_reach_the_network",),
    ),
    Mutant(
        "auto: what follows the pilot is thrown away",
        "samplers/auto.py",
        "best = found if float(found.reward) > float(best.reward) else best",
        "best = best if float(found.reward) > float(best.reward) else found",
        ("tests/test_optimum.py::test_the_maximum_of_a_quadratic_reward_is_found[auto]",),
    ),
    Mutant(
        "what follows the pilot draws its noise again",
        "samplers/auto.py",
        "replace(ctx, seed=seed)",
        "ctx",
        (f"{AUTO}::test_what_follows_has_noise_of_its_own",),
    ),
    Mutant(
        "shared rows are made from nothing",
        "steering/task.py",
        "task.extra += int(pool * part) - task.left",
        "task.extra += int(pool * part)",
        (f"{AUTO}::test_the_sum_of_all_budgets_is_kept",),
    ),
    Mutant(
        "shares for all alike",
        "steering/task.py",
        "part = need / total if total > 0.0 else 1.0 / len(capped)",
        "part = 1.0 / len(capped)",
        (f"{AUTO}::test_what_an_easy_prompt_leaves_goes_to_the_wide_ones",),
    ),
    Mutant(
        "options that do not help are named",
        "samplers/budgets.py",
        "getattr(less.cost(plan), counter) < now",
        "getattr(less.cost(plan), counter) <= now",
        (f"{WAYS}::test_a_budget_too_small_names_the_options_to_lower",),
    ),
    Mutant(
        "default levels without a step pass in silence",
        "samplers/base.py",
        "if levels and not steps and levels == usual:",
        "if False:",
        (f"{WAYS}::test_defaults_without_a_step_are_a_warning",),
    ),
    Mutant(
        "options without meaning pass in silence",
        "samplers/idle.py",
        "    if idle:\n",
        "    if False:\n",
        (f"{IDLE}::test_an_option_that_would_be_ignored_is_refused",),
    ),
    Mutant(
        "an eta beside another transition passes in silence",
        "samplers/base.py",
        'refuse_idle(self, f"transition={self.transition!r}", "eta")',
        "pass",
        (f"{IDLE}::test_an_option_that_would_be_ignored_is_refused",),
    ),
    Mutant(
        "a resampler is taken where nothing is resampled",
        "samplers/idle.py",
        'if options.resample == "never":',
        "if False:",
        (f"{IDLE}::test_an_option_that_would_be_ignored_is_refused",),
    ),
    Mutant(
        "das: the threshold of adaptive tempers is refused",
        "samplers/das.py",
        'threshold_counts=self.tempering == "adaptive"',
        "threshold_counts=False",
        (f"{IDLE}::test_where_it_counts_it_is_taken",),
    ),
    Mutant(
        "auto hands its eta on beside every transition",
        "samplers/auto.py",
        'if self.transition == "eta":',
        "if True:",
        (f"{IDLE}::test_auto_hands_on_what_counts",),
    ),
    Mutant(
        "reflect makes one round less",
        "samplers/reflect.py",
        "for k in range(self.rounds):",
        "for k in range(max(1, self.rounds - 1)):",
        ("tests/test_contract.py::test_the_ledger_agrees_with_the_forecast",),
    ),
)

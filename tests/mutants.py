"""Breaks the code on purpose, one line at a time, and asks the tests to notice.

    python tests/mutants.py            all mutants
    python tests/mutants.py phi cfg    those whose name contains one of the words

Each mutant replaces a text that must occur exactly once in a copy of the tree, and runs only the
tests that are meant to catch it. Exit status 1 where a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("steering", "samplers", "rewards", "kernels", "apps", "tests")
TARGET = "tests/test_fk.py::test_every_potential_and_rule_has_the_same_target"
TRACE = "tests/test_fk.py::test_weights_follow_from_the_trace"
LEDGER = "tests/test_fk.py::test_the_ledger_agrees_with_the_forecast"
BATCH = "tests/test_engine.py::test_different_times_share_a_batch_and_each_task_gets_its_own_rows"


@dataclass(frozen=True)
class Mutant:
    """A mistake: ``old`` becomes ``new`` in ``file``; one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "weights dropped when ESS is high",
        "samplers/fk.py",
        "        yield Progress(step=i, of=len(ctx.grid), info=info)\n",
        "        else:\n"
        "            state = replace(state, log_w=torch.zeros_like(state.log_w))\n"
        "        yield Progress(step=i, of=len(ctx.grid), info=info)\n",
        (f"{TARGET}[difference-ess]",),
    ),
    Mutant(
        "phi not gathered",
        "steering/particles.py",
        "for f in fields(self)}",
        'for f in fields(self) if f.name != "phi"}',
        (f"{TARGET}[difference-always]",),
    ),
    Mutant(
        "stale prediction after resampling",
        "steering/particles.py",
        "for f in fields(self)}",
        'for f in fields(self) if f.name != "prediction"}',
        (f"{TARGET}[difference-always]",),
    ),
    Mutant(
        "memory of a method not gathered",
        "steering/particles.py",
        "for f in fields(self)}",
        'for f in fields(self) if f.name != "memory"}',
        ("tests/test_particles.py::test_gather_moves_every_field",),
    ),
    Mutant(
        "reward history not gathered",
        "samplers/fk.py",
        "            history = history[:, ancestors]\n",
        "",
        (f"{TRACE}[always-max]",),
    ),
    Mutant(
        "one resampling key for all prompts",
        "samplers/fk.py",
        'ctx.key("resample", i)',
        'ctx.key("resample", i).at(seed=0)',
        ("tests/test_fk.py::test_every_resampling_has_numbers_of_its_own",),
    ),
    Mutant(
        "one resampling key for all checkpoints",
        "samplers/fk.py",
        'ctx.key("resample", i)',
        'ctx.key("resample")',
        ("tests/test_fk.py::test_every_resampling_has_numbers_of_its_own",),
    ),
    Mutant(
        "prompts of a batch mixed for the reward",
        "steering/batch.py",
        "[self.tasks[k].prompt for",
        "[self.tasks[0].prompt for",
        ("tests/test_fk.py::test_prompts_run_together_as_they_run_alone[64]",),
    ),
    Mutant(
        "prompts of a batch mixed for the network",
        "steering/batch.py",
        "[self.tasks[k].cond for",
        "[self.tasks[0].cond for",
        ("tests/test_engine.py::test_tasks_meet_in_full_batches",),
    ),
    Mutant(
        "answers left in the order of evaluation",
        "steering/batch.py",
        "back[rows] = torch.arange(len(rows))",
        "back[:] = torch.arange(len(back))",
        (BATCH,),
    ),
    Mutant(
        "one noise level for a batch of several",
        "steering/batch.py",
        "return found[0] if all(t == found[0] for t in found) else found",
        "return found[0]",
        (BATCH,),
    ),
    Mutant(
        "terminal reward of the x0 prediction",
        "samplers/fk.py",
        "images = yield Decode(state.x)",
        "images = yield Decode(prediction.mode)",
        ("tests/test_fk.py::test_rewards_belong_to_the_delivered_samples",),
    ),
    Mutant(
        "terminal correction skipped",
        "samplers/fk.py",
        "        state = state.set_potential(tilt(reward, self.reward_scale))\n",
        "",
        (f"{TRACE}[always-difference]",),
    ),
    Mutant(
        "reward_scale applied twice",
        "samplers/fk.py",
        "values.append(tilt(",
        "values.append(self.reward_scale * tilt(",
        ("tests/test_fk.py::test_scaling_the_reward_against_reward_scale_changes_nothing",),
    ),
    Mutant(
        "ESS measured against a batch of two populations",
        "samplers/fk.py",
        "self.ess_threshold * len(state)",
        "self.ess_threshold * 2 * len(state)",
        (f"{TRACE}[ess-difference]",),
    ),
    Mutant(
        "noise keyed by ancestor",
        "samplers/fk.py",
        "x = ctx.move(state.x, state.prediction, t, u, kernel, step=i)",
        "x = ctx.move(state.x, state.prediction, t, u, kernel, step=i, slots=state.root.tolist())",
        ("tests/test_fk.py::test_twins_part_after_resampling",),
    ),
    Mutant(
        "mean of the draws instead of log mean exp",
        "samplers/fk.py",
        "rho = torch.logsumexp(torch.stack(values), 0) - math.log(len(values))",
        "rho = torch.logsumexp(torch.stack(values), 0)",
        (
            f"{LEDGER}[draws]",
            "tests/test_fk.py::test_the_potential_of_draws_is_their_log_mean_exp",
        ),
    ),
    Mutant(
        "log_z off by log n",
        "steering/particles.py",
        "return float(torch.logsumexp(log_w.double(), 0)) - math.log(len(log_w))",
        "return float(torch.logsumexp(log_w.double(), 0))",
        (f"{TARGET}[none-ess]",),
    ),
    Mutant(
        "residual weights off by log n",
        "steering/particles.py",
        "torch.log(n * p)",
        "torch.log(p)",
        (f"{TARGET}[difference-always]",),
    ),
    Mutant(
        "normaliser reset at resampling",
        "steering/particles.py",
        "left = state.log_w - torch.log(n * p)",
        "left = torch.zeros_like(state.log_w)",
        (f"{TARGET}[difference-always]",),
    ),
    Mutant(
        "-inf minus -inf",
        "steering/particles.py",
        "dead = torch.isneginf(self.phi) | torch.isneginf(phi)",
        "dead = torch.zeros(len(phi), dtype=torch.bool)",
        ("tests/test_particles.py::test_a_particle_without_weight_stays_so_and_spoils_no_other",),
    ),
    Mutant(
        "the last index is drawn though its weight is zero",
        "steering/resampling.py",
        "index.clamp_max(last)",
        "index.clamp_max(len(w) - 1)",
        ("tests/test_resampling.py::test_points_that_round_to_one_stay_in_range",),
    ),
    Mutant(
        "systematic with independent points",
        "steering/resampling.py",
        "torch.float64) + key.uniform(1)) / m)",
        "torch.float64) + key.uniform(m)) / m)",
        ("tests/test_resampling.py::test_offspring_are_unbiased_and_bounded[systematic-8]",),
    ),
    Mutant(
        "ssp settles pairs by the wrong odds",
        "steering/resampling.py",
        "u < (1.0 - b) / spare",
        "u < (1.0 - a) / spare",
        ("tests/test_resampling.py::test_offspring_are_unbiased_and_bounded",),
    ),
    Mutant(
        "killing against the mean weight",
        "steering/resampling.py",
        "key.uniform(n) * w.max() < w",
        "key.uniform(n) * w.mean() < w",
        ("tests/test_resampling.py::test_offspring_are_unbiased_and_bounded[killing-8]",),
    ),
    Mutant(
        "noise without the score term",
        "steering/transitions.py",
        "drift = drift + 0.5 * g * g * pred.score(t)",
        "pass",
        ("tests/test_transitions.py::test_marginals_are_kept_at_every_level[flow-grpo]",),
    ),
    Mutant(
        "the model's own reverse law ignored",
        "steering/method.py",
        "if propose is not None:",
        "if False:",
        (f"{TARGET}[none-ess]",),
    ),
    Mutant(
        "seed ignored",
        "steering/method.py",
        "NoiseKey(self.seed, stream, step)",
        "NoiseKey(0, stream, step)",
        ("tests/test_engine.py::test_seeds_name_the_noise",),
    ),
    Mutant(
        "NFE halved",
        "steering/batch.py",
        "round(float(expected[k]) * scale)",
        "round(float(expected[k]) * scale / 2)",
        (f"{LEDGER}[plain]",),
    ),
    Mutant(
        "calls counted instead of rows",
        "steering/engine.py",
        "self.model.rows - rows_before",
        "1",
        (f"{LEDGER}[plain]",),
    ),
    Mutant(
        "look-ahead not in the forecast",
        "samplers/fk.py",
        "nfe = n * plan.trajectory + n * self.n_draws * ahead",
        "nfe = n * plan.trajectory",
        (f"{LEDGER}[lookahead]",),
    ),
    Mutant(
        "guidance in one call counted once",
        "steering/pipelines/meter.py",
        "return len(kwargs[name])",
        "return max(1, len(kwargs[name]) // 2)",
        ("tests/test_pipelines_setups.py::test_rows_are_counted_on_the_network[sd3]",),
    ),
    Mutant(
        "the call that breaks the budget is made",
        "steering/ledger.py",
        "used + more > cap",
        "used > cap",
        ("tests/test_ledger.py",),
    ),
    Mutant(
        "one prompt's failure becomes everybody's",
        "steering/engine.py",
        "errors[next(iter(owners))] = error",
        "errors.update(dict.fromkeys(range(len(batch.tasks)), error))",
        ("tests/test_engine.py::test_one_failing_prompt_does_not_cost_the_others_anything",),
    ),
    Mutant(
        "one graph for the gradients of several prompts",
        "steering/engine.py",
        "shared = id(task)  #",
        "shared = None  #",
        ("tests/test_engine.py::test_every_task_gets_a_graph_of_its_own",),
    ),
    Mutant(
        "an interrupt is not noted",
        "steering/engine.py",
        "task.cancelled = task.outcome is None and task.error is None",
        "task.cancelled = task in pending",
        ("tests/test_engine.py::test_an_interrupt_inside_a_method_marks_it_as_cancelled",),
    ),
    Mutant(
        "a preview beats a finished picture",
        "steering/task.py",
        "better = request.final\n",
        "better = False\n",
        ("tests/test_engine.py::test_a_finished_picture_beats_any_preview",),
    ),
    Mutant(
        "NaN rewards let through",
        "steering/scoring.py",
        "bad = torch.isnan(value) | torch.isposinf(value)",
        "bad = torch.isposinf(value)",
        ("tests/test_best_of_n.py::test_nan_is_an_error_and_minus_infinity_loses",),
    ),
    Mutant(
        "soft choice is greedy",
        "samplers/best_of_n.py",
        "multinomial(normalise(log_w), self.k",
        "multinomial(normalise(1e6 * log_w), self.k",
        ("tests/test_best_of_n.py::test_soft_draws_follow_the_weights",),
    ),
    Mutant(
        "ties go to the last",
        "samplers/best_of_n.py",
        "chosen = reward.argsort(descending=True, stable=True)[: self.k]",
        "chosen = (reward + 1e-9 * torch.arange(len(reward))).argsort(descending=True)[: self.k]",
        ("tests/test_best_of_n.py::test_ties_go_to_the_first",),
    ),
)


def copy_tree(to: Path) -> None:
    """Code and tests; trained weights are linked, as no mutant touches them."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "weights", "*.safetensors")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=skip)
    for weights in ROOT.glob("steering/**/weights"):
        (to / weights.relative_to(ROOT)).symlink_to(weights)
    shutil.copy(ROOT / "pyproject.toml", to)


def pytest_status(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and last words of a run: 0 all passed, 1 some failed, others mean no verdict."""
    # A second-old byte code file would hide a mutant of the same length.
    paths = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, **paths}, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, lines[-1] if lines else done.stderr[-300:]


def check(mutant: Mutant, tree: Path) -> str:
    """ "killed", "SURVIVED" or what kept it from being tried."""
    path = tree / mutant.file
    source = path.read_text()
    found = source.count(mutant.old)
    if found != 1:
        return f"STALE: its text occurs {found} times in {mutant.file}"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        status, words = pytest_status(tree, mutant.tests)
    finally:
        path.write_text(source)
    return {0: "SURVIVED", 1: "killed"}.get(status, f"NO VERDICT ({status}): {words}")


def main(words: list[str]) -> int:
    """Prints a table; returns the exit status."""
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    if not chosen:
        print(f"No mutant's name contains any of: {', '.join(words)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        everything = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
        status, said = pytest_status(tree, everything)
        if status != 0:
            print(f"The tests fail without any mutant: {said}")
            return 1
        bad = 0
        for mutant in chosen:
            started = time.perf_counter()
            verdict = check(mutant, tree)
            bad += verdict != "killed"
            seconds = time.perf_counter() - started
            print(f"{mutant.name:52s} {verdict:10s} {seconds:5.1f} s", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

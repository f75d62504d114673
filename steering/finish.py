"""From ended tasks to results: pictures of stopped runs, held-out scores, recipes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.engine import Engine
from steering.ledger import Ledger
from steering.loading import describe
from steering.method import as_float64, method_options
from steering.model import Model
from steering.recipe import Recipe, describe_value
from steering.requests import Outcome, Request, Score
from steering.result import Result
from steering.scoring import Reward, heldout_labels, score
from steering.task import Best, Task


class Finisher:
    """Makes the Result of every task of one run.

    Args:
        model, tasks, engine: of the run.
        verifiers: held-out rewards.
        folder: where each result is saved as soon as it exists, one subfolder per prompt.
    """

    def __init__(
        self,
        model: Model,
        tasks: Sequence[Task],
        verifiers: Sequence[Reward],
        engine: Engine,
        folder: Path | None = None,
    ) -> None:
        self.model, self.tasks, self.verifiers = model, tasks, verifiers
        self.engine, self.folder = engine, folder

    def check(self) -> None:
        """Tries a recipe: what cannot be written down fails before anything is spent."""
        self._recipe(self.tasks[0])

    def all(self) -> list[Result | None]:
        """One Result per task, in order; None where there is nothing to show."""
        outcomes = [task.outcome or self._best_so_far(task) for task in self.tasks]
        heldout = self._heldout(outcomes)
        results: list[Result | None] = []
        for task, outcome, scores in zip(self.tasks, outcomes, heldout, strict=True):
            result = None if outcome is None else self._result(task, outcome, scores)
            if result is not None and self.folder is not None:
                result.save(self.folder / f"{task.index:04d}")
            results.append(result)
        return results

    def _best_so_far(self, task: Task) -> Outcome | None:
        """A stopped run's best picture; one is decoded if none had been yet."""
        best = task.best
        if best.image is None and best.guess is not None:
            try:
                best.x0 = best.guess[:1]
                best.image = self.model.decode(best.x0)
                task.ledger.charge("decodes", 1)
                extra = None if task.metadata is None else [task.metadata]
                scores = score(task.reward, best.image, [task.prompt], metadata=extra)
                task.ledger.charge("reward_calls", 1)
                best.reward = float(scores.value[0])
            except Exception:
                # A picture is worth keeping without its score, and what fails here has failed
                # the task already: it must not take the other tasks' results with it.
                best.reward = float("nan")
        if best.image is None or best.x0 is None:
            return None
        return Outcome(
            x0=best.x0,
            images=best.image,
            reward=torch.tensor([best.reward], dtype=torch.float64),
            log_w=torch.zeros(1, dtype=torch.float64),
            slots=torch.zeros(1, dtype=torch.int64),
        )

    def _heldout(self, outcomes: Sequence[Outcome | None]) -> list[dict[str, Tensor]]:
        """Held-out scores of all pictures. A verifier that fails for a prompt is an error of that
        prompt, whose pictures are kept; memory is handled as in the search."""
        found: list[dict[str, Tensor]] = [{} for _ in outcomes]
        rows = [(i, o) for i, o in enumerate(outcomes) if o is not None]
        names = heldout_labels(self.tasks[0].reward, self.verifiers)
        for name, verifier in zip(names, self.verifiers, strict=True):
            # Tasks of their own: a verifier's calls must not count as the search's.
            judged = [
                replace(self.tasks[i], reward=verifier, ledger=Ledger(), best=Best())
                for i, _ in rows
            ]
            try:
                answers = self._judge(judged, [o for _, o in rows])
            except KeyboardInterrupt:
                for i, _ in rows:
                    self.tasks[i].cancelled = True
                break
            for (i, _), own, answer in zip(rows, judged, answers, strict=True):
                task = self.tasks[i]
                task.ledger.charge("heldout_calls", own.ledger.reward_calls)
                task.ledger.charge_seconds("heldout", own.ledger.seconds)
                if isinstance(answer, BaseException):
                    task.error = task.error or answer
                else:
                    found[i][name] = as_float64(answer.value)
        return found

    def _judge(self, tasks: list[Task], outcomes: list[Outcome]) -> list[Any]:
        """Scores or an error per task, from one merged batch."""
        requests: list[Request] = [Score(o.images, o.x0, final=True) for o in outcomes]
        return self.engine.answers(tasks, requests) if tasks else []

    def _result(self, task: Task, outcome: Outcome, heldout: dict[str, Tensor]) -> Result:
        order = outcome.reward.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        slots = torch.arange(len(order)) if outcome.slots is None else outcome.slots
        return Result(
            prompt=task.prompt,
            # On the CPU: the results of many prompts outlive the run and need no accelerator.
            pixels=outcome.images.detach().cpu()[order],
            samples=outcome.x0.detach().cpu()[order],
            rewards=outcome.reward[order],
            heldout={k: v[order] for k, v in heldout.items()},
            log_weights=outcome.log_w[order],
            log_z=outcome.log_z,
            slots=slots[order],
            ledger=task.ledger,
            trace=task.trace,
            recipe=self._recipe(task),
            cancelled=task.cancelled,
            preview=task.outcome is None and not task.best.final,
        )

    @functools.cached_property
    def _described(self) -> dict[str, Any]:
        pipe = getattr(self.model, "pipe", None)
        if pipe is not None:
            return describe(pipe)
        return {"source": None, "class": type(self.model).__name__}

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        """What the recipes of all prompts have in common, written down once."""
        call = getattr(self.model, "call_kwargs", {})
        extra = [describe_value(t.metadata) for t in self.tasks]
        return {
            "model": self._described,
            "call": {k: describe_value(v) for k, v in call.items() if k != "prompt"},
            "prompts": [t.prompt for t in self.tasks],
            "seeds": [t.seed for t in self.tasks],
            "metadata": None if all(m is None for m in extra) else extra,
        }

    def _recipe(self, task: Task) -> Recipe:
        return Recipe(
            **self._shared,
            prompt=task.index,
            image=0,
            method={"name": task.method.name, "options": _json_options(task)},
            reward=task.reward.spec,
            heldout=[v.spec for v in self.verifiers],
            budget=asdict(task.budget),
            engine={
                "max_batch": self.engine.max_batch,
                "limits": {k.__name__: v for k, v in self.engine.limits.items()},
                "deduplicate": self.engine.deduplicate,
                "threads": torch.get_num_threads(),
                "stopped": task.outcome is None,
            },
        )


def _json_options(task: Task) -> dict[str, Any]:
    return {k: describe_value(v) for k, v in method_options(task.method).items()}

"""One prompt's run: what it is, what it has spent, and the best it has seen."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steering.ledger import Budget, Ledger
from steering.method import Method, Plan
from steering.paths import Prediction, Time
from steering.requests import Ask, Outcome, Request, Run, Score
from steering.scoring import Reward, Scores
from steering.trace import Trace


@dataclass(eq=False)
class Best:
    """The best picture so far: a finished one beats any preview, then the reward decides.

    ``guess`` is the latest estimate of x0 [n, *event], for runs stopped before any picture.
    """

    x0: Tensor | None = None
    image: Tensor | None = None
    reward: float = float("nan")
    final: bool = False
    guess: Tensor | None = None

    def note(self, request: Request, answer: object) -> None:
        """Learns from an answer on its way to the method."""
        if isinstance(answer, Prediction):
            self.guess = answer.mode.detach()
        elif isinstance(answer, Scores) and isinstance(request, Score):
            self.scored(request, torch.arange(len(answer.value)), answer.value.detach())

    def seen(self, request: Score) -> None:
        """Keeps pictures that are about to be scored, in case the reward fails."""
        if self.image is None:
            self._keep(request, 0)
            self.final = request.final

    def scored(self, request: Score, rows: Tensor, value: Tensor) -> None:
        """Learns what some of a request's pictures are worth: values [n] of these rows."""
        k = int(value.argmax())
        top = float(value[k])
        if request.final == self.final:
            better = math.isnan(self.reward) or top > self.reward
        else:
            better = request.final
        if better:
            self._keep(request, int(rows[k]))
            self.reward, self.final = top, request.final

    def _keep(self, request: Score, k: int) -> None:
        # Copies: a view would keep the whole batch it was cut from.
        self.x0 = request.x0[k : k + 1].detach().clone()
        self.image = request.images[k : k + 1].detach().clone()


@dataclass(eq=False)
class Task:
    """One prompt's run: its method, budget, spending, trace, and how it ended."""

    index: int
    prompt: str | None
    cond: int
    seed: int
    method: Method
    plan: Plan
    reward: Reward
    ledger: Ledger = field(default_factory=Ledger)
    trace: Trace = field(default_factory=Trace)
    best: Best = field(default_factory=Best)
    outcome: Outcome | None = None
    error: BaseException | None = None
    cancelled: bool = False
    run: Run | None = None
    metadata: Any = None  # what the reward gets beside the prompt
    extra: int = 0  # network rows taken over from other runs, or (negative) left to them

    @property
    def ended(self) -> bool:
        """Whether its run is over, however it ended."""
        return self.cancelled or self.outcome is not None or self.error is not None

    @property
    def budget(self) -> Budget:
        cap = self.plan.budget
        if not self.extra or cap.nfe is None:
            return cap
        return replace(cap, nfe=max(1, cap.nfe + self.extra))

    @property
    def left(self) -> int:
        """Network rows under the cap that are not spent; 0 where there is no cap."""
        cap = self.budget.nfe
        return 0 if cap is None else max(0, cap - self.ledger.nfe)

    def cost(self, t: Time) -> int:
        """Network rows that one sample at this level is expected to need."""
        known, most = self._costs
        return known.get(t.net, most)

    @functools.cached_property
    def _costs(self) -> tuple[dict[float, int], int]:
        """Costs by what the network is told, and the largest."""
        steps = list(zip(self.plan.grid.times, self.plan.costs, strict=False))
        return {node.net: cost for node, cost in reversed(steps)}, max(self.plan.costs)


def share_out(ended: Sequence[Task], asking: Sequence[Task], needs: Sequence[float]) -> list[Any]:
    """What is left of all caps, divided among those that ask: rows for each, None without cap."""
    capped = [(t, need) for t, need in zip(asking, needs, strict=True) if t.budget.nfe is not None]
    pool = sum(t.left for t in ended) + sum(t.left for t, _ in capped)
    total = sum(need for _, need in capped)
    for task in ended:
        task.extra -= task.left
    for task, need in capped:
        part = need / total if total > 0.0 else 1.0 / len(capped)
        task.extra += int(pool * part) - task.left
    return [None if t.budget.nfe is None else t.left for t in asking]


def ask_all(tasks: Sequence[Task], requests: Sequence[Ask]) -> list[Any]:
    """What the callables of each task return, or the first error among them; all wait together.

    Every task is charged its share of the seconds, under "ask".
    """
    started, calls = time.perf_counter(), [call for r in requests for call in r.calls]
    with ThreadPoolExecutor(max(1, min(max(r.workers for r in requests), len(calls)))) as pool:
        asked = [pool.submit(call) for call in calls]
        said = [_result(future) for future in asked]
    seconds, answers = time.perf_counter() - started, []
    for task, request in zip(tasks, requests, strict=True):
        mine, said = said[: len(request.calls)], said[len(request.calls) :]
        failed = [answer for answer in mine if isinstance(answer, _Failure)]
        answers.append(failed[0].error if failed else mine)
        task.ledger.charge_seconds("ask", seconds * len(mine) / max(1, len(calls)))
    return answers


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _result(future: Future[Any]) -> Any:  # noqa: ANN401
    try:
        return future.result()
    except Exception as error:  # it is the asking run's alone
        return _Failure(error)

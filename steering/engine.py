"""Runs many methods at once on one model.

Every task is one prompt's generator. The engine collects what the tasks ask, merges requests of
one kind into full batches across prompts, charges each task its share and sends the answers back.
Scores and decodes are served before network calls, so that the tasks meet again at the network
with as many rows as possible; gradients come after them, so that one backward pass serves all
tasks, then callables that mostly wait (Ask), so that all tasks wait together, and last what can
only be settled when all runs have come to it (Share).
Nothing a task sees depends on its neighbours except rounding.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steering.batch import Batch, out_of_memory, rows_of, times_of
from steering.duplicates import distinct
from steering.errors import BudgetError, DecodeError, OptionError, SteeringError, TimeUp
from steering.gradients import Graphs, no_gradient
from steering.memory import Care
from steering.method import Context
from steering.model import Model
from steering.paths import Prediction
from steering.requests import (
    Ask,
    Decode,
    Denoise,
    Gradient,
    Outcome,
    Progress,
    Request,
    Score,
    Share,
)
from steering.scoring import Scores, score
from steering.task import Task, ask_all, share_out
from steering.turns import waited

Listener = Callable[[Task, Progress], None]
# A decoder holds far more per row than a network, and wider calls of it are no faster.
_DECODES = 16
_ORDER: tuple[type, ...] = (Score, Decode, Denoise, Gradient, Ask, Share)


class Engine:
    """Serves the requests of many tasks with few large calls.

    Args:
        model: answers Denoise and Decode; its prompts are the tasks' conditions.
        max_batch: most rows per call; halved when memory runs out, for the rest of the run.
        listener: called with every Progress.
        cancelled: asked between calls; True stops all tasks at their best so far.
        deduplicate: rows of one call that are copies of each other are computed once.
        careful: where memory could be short, look what one row takes before wide calls.

    Raises:
        OptionError: max_batch below 1.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 64,
        listener: Listener | None = None,
        cancelled: Callable[[], bool] | None = None,
        deduplicate: bool = True,
        careful: bool = False,
    ) -> None:
        if not isinstance(max_batch, Integral) or max_batch < 1:
            raise OptionError(f"max_batch must be at least 1, a whole number, got {max_batch!r}.")
        self.model = model
        self.listener = listener
        self.cancelled = cancelled or (lambda: False)
        self.max_batch, self.deduplicate = max_batch, deduplicate
        self.limits: dict[type, int] = dict.fromkeys((Score, Decode, Denoise), max_batch)
        self.care = Care(model.device, self.limits) if careful else None
        self.graphs = Graphs(self.limits)
        self._tasks: list[Task] = []
        self._done: deque[Task] = deque()

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs all tasks to their end; outcomes and errors are left on the tasks."""
        for _ in self.stream(tasks):
            pass

    def stream(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Runs tasks and gives each as soon as it has ended; an interrupt ends the stream."""
        self._tasks, waiting = list(tasks), list(reversed(tasks))
        pending: dict[Task, Request] = {}
        try:
            while waiting or pending:
                if self.cancelled():
                    raise KeyboardInterrupt
                self._admit(waiting, pending)
                self._serve(self._ready(pending), pending)
                while self._done:
                    yield self._done.popleft()
        except (KeyboardInterrupt, GeneratorExit):
            # Not only those in `pending`: the interrupt may fall between two of a task's requests.
            for task in tasks:
                task.cancelled = task.outcome is None and task.error is None
                if task.cancelled and task.run is not None:
                    task.run.close()
        finally:
            rest: Callable[[], None] = getattr(self.model, "rest", lambda: None)
            rest()

    def _admit(self, waiting: list[Task], pending: dict[Task, Request]) -> None:
        """Starts tasks while the requests at hand do not fill two batches.

        One batch where graphs are held: what cannot be merged would only take memory.
        """
        while waiting:
            batches = 1 if waiting[-1].method.needs_gradient else 2
            if sum(rows_of(r) for r in pending.values()) >= batches * self.max_batch:
                break
            task = waiting.pop()
            context = Context(model=self.model, cond=task.cond, seed=task.seed, plan=task.plan)
            task.run = task.method.run(context)
            self._advance(task, pending, None)

    def _ready(self, pending: dict[Task, Request]) -> list[Task]:
        """The tasks to serve next: all that ask for one kind and have room for their graphs."""
        for kind in _ORDER:
            asking = [t for t, r in pending.items() if isinstance(r, kind)]
            if ready := self.graphs.with_room(asking, pending):
                return ready
        return list(pending)[:1]  # graphs that wait for each other: one must be let through

    def _advance(self, task: Task, pending: dict[Task, Request], answer: Any) -> None:  # noqa: ANN401
        """Sends an answer (or throws an error) and notes the next request."""
        assert task.run is not None
        pending.pop(task, None)
        started, before = _clock(), task.ledger.seconds
        try:
            while True:
                throw = isinstance(answer, BaseException)
                request = task.run.throw(answer) if throw else task.run.send(answer)
                if isinstance(request, _ORDER):
                    break
                answer = None
                if isinstance(request, Progress):
                    self._report(task, request)
                else:
                    answer = TypeError(f"{task.method.name!r} asked for {request!r}, no Request.")
            pending[task] = request
        except StopIteration as stop:
            task.outcome, task.error = _ended(task, stop.value)
        except TimeUp:
            task.cancelled = True
        except Exception as error:
            task.error = error
        if task not in pending:
            self.graphs.release(task)
            self._done.append(task)
        own = _clock() - started - (task.ledger.seconds - before)
        task.ledger.charge_seconds("own", max(own, 0.0))

    def _report(self, task: Task, progress: Progress) -> None:
        if progress.info:
            task.trace.add(progress, task.ledger)
        if self.listener is not None:
            self.listener(task, progress)

    def _serve(self, tasks: list[Task], pending: dict[Task, Request]) -> None:
        """Answers one kind of request of these tasks, in groups that can share a call."""
        groups: dict[Any, list[Task]] = {}
        for task in tasks:
            request = pending[task]
            try:
                self._check(task, request)
            except BudgetError as error:
                self._advance(task, pending, error)
                continue
            groups.setdefault(_shared(task, request), []).append(task)
        for group in groups.values():
            requests = [pending[t] for t in group]
            if isinstance(requests[0], Gradient):
                answers = self._gradients(group, requests)
            elif isinstance(requests[0], Ask):
                answers = ask_all(group, requests)  # type: ignore[arg-type]
            elif isinstance(requests[0], Share):
                ended = [t for t in self._tasks if t not in pending]
                answers = share_out(ended, group, [r.need for r in requests])  # type: ignore[union-attr]
            else:
                answers = self.answers(group, requests)
            for task, request, answer in zip(group, requests, answers, strict=True):
                if isinstance(request, Decode) and isinstance(answer, Exception):
                    answer = _undecoded(self.model, request.x0.detach(), answer)
                task.best.note(request, answer)
                if isinstance(request, Score) and isinstance(answer, Scores):
                    task.trace.note(answer, request.final, task.ledger)
                if getattr(request, "grad", False) and not isinstance(answer, BaseException):
                    answer = self.graphs.hold(task, request, answer)
                self._advance(task, pending, answer)

    def _check(self, task: Task, request: Request) -> None:
        n = rows_of(request)
        if isinstance(request, Denoise):
            task.ledger.check(task.budget, nfe=sum(task.cost(t) * m for t, m in times_of(request)))
        elif isinstance(request, Score):
            task.ledger.check(task.budget, reward_calls=n)
        else:
            self._check_time(task, request)

    def _check_time(self, task: Task, request: Request) -> None:
        if not getattr(request, "overtime", False):
            task.ledger.check(task.budget)

    def answers(self, tasks: list[Task], requests: list[Request]) -> list[Any]:
        """One answer or error per task, for requests of one kind and one reward."""
        try:
            batch = Batch(tasks, requests)
        except Exception as error:  # rows of different shapes
            if len(tasks) == 1:
                return [error]
            pairs = zip(tasks, requests, strict=True)
            return [answer for t, r in pairs for answer in self.answers([t], [r])]
        return self._call(batch)

    def _gradients(self, tasks: list[Task], requests: list[Any]) -> list[Any]:
        """Derivatives or an error per task; seconds and recomputed rows are split by rows."""
        started, before = _clock(), self.model.rows
        answers = self.graphs.differentiate(tasks, requests)
        self._finish_device()
        seconds, again = _clock() - started, self.model.rows - before
        total = sum(rows_of(r) for r in requests)
        for task, request in zip(tasks, requests, strict=True):
            share = rows_of(request) / total
            task.ledger.charge("nfe_recomputed", round(again * share))
            task.ledger.charge_seconds("backward", seconds * share)
        return answers

    def _call(self, batch: Batch) -> list[Any]:
        """Runs a merged batch in chunks that memory holds; halves the limit when it does not.

        A chunk that fails in company is repeated task by task to find whose error it is. Rows
        that succeeded are not run, and not charged, a second time.
        """
        look = (
            self.care is not None
            and not _whole(batch.tasks[0], batch.kind)
            and self.care.wants(batch)
        )
        alone = len(batch.tasks) == 1 and batch.in_order
        if alone and not look and len(batch) <= self._size(batch):
            try:
                return [self._evaluate(batch, None)]
            except Exception as error:
                if not self._halved(batch, len(batch), error):
                    return [error]
        todo, parts = [batch.order], []
        errors: dict[int, Exception] = {}
        while todo:
            if parts:
                self._look_up(batch, errors)
            rows = batch.without(todo.pop(), errors)
            size = 1 if look else self._size(batch)
            if len(rows) > size:
                todo.append(rows[size:])
            rows = rows[:size]
            if len(rows) == 0:
                continue
            watch = self.care.watching(batch) if self.care and look else contextlib.nullcontext()
            look = False
            try:
                with watch:
                    answer = self._evaluate(batch, rows)
                parts.append((rows, answer))
                if todo:  # or it is all there, and noted as an answer
                    batch.note(rows, answer)
            except Exception as error:
                owners = batch.by_owner(rows)
                if self._halved(batch, len(rows), error):
                    todo.append(rows)
                elif len(owners) > 1:
                    todo += reversed(owners.values())
                else:
                    errors[next(iter(owners))] = error
        return batch.split(parts, errors)

    def _look_up(self, batch: Batch, errors: dict[int, Exception]) -> None:
        """Between the chunks of a call: a stop ends it, and whose seconds are spent leave it."""
        if any(task.ended for task in batch.tasks):
            return  # verdicts on what a run has delivered
        if self.cancelled():
            raise KeyboardInterrupt
        for k, (task, request) in enumerate(zip(batch.tasks, batch.requests, strict=True)):
            try:
                self._check_time(task, request)
            except TimeUp as error:
                errors.setdefault(k, error)

    def _halved(self, batch: Batch, rows: int, error: Exception) -> bool:
        """Whether a call that failed is worth another attempt with fewer rows."""
        if not out_of_memory(error) or rows < 2 or _whole(batch.tasks[0], batch.kind):
            return False
        self.limits[batch.kind] = rows // 2
        return True

    def _size(self, batch: Batch) -> int:
        """Most rows of one call."""
        if _whole(batch.tasks[0], batch.kind):
            return len(batch)
        limit = self.limits[batch.kind]
        return min(limit, _DECODES) if batch.kind is Decode and not batch.grad else limit

    def _evaluate(self, batch: Batch, rows: Tensor | None) -> Prediction | Tensor | Scores:
        """One call over the given rows (None: all); charges rows and seconds to their owners."""
        started, rows_before = _clock(), self.model.rows
        whole = rows is None or (len(rows) == len(batch) and batch.in_order)
        data = batch.data if whole else batch.data[rows]
        answer: Any
        kept: list[int] | None = None
        if batch.kind is Denoise:
            answer, kept = self._predict(batch, data, rows)
        elif batch.kind is Decode:
            small = getattr(self.model, "decode_preview", None) if batch.preview else None
            answer = _call_of(batch, small or self.model.decode)(data)
        else:
            for task, request in zip(batch.tasks, batch.requests, strict=True):
                task.best.seen(request)
            if batch.grad and not batch.tasks[0].reward.differentiable:
                raise no_gradient(batch.tasks[0].method.name, batch.tasks[0].reward.name)
            with torch.set_grad_enabled(batch.grad):
                prompts, extra = batch.prompts(rows), batch.metadata(rows)
                answer = score(batch.tasks[0].reward, data, prompts, metadata=extra)
        self._finish_device()
        seconds = _clock() - started
        batch.charge(rows, self.model.rows - rows_before, seconds, kept)
        return answer

    def _predict(
        self, batch: Batch, x: Tensor, rows: Tensor | None
    ) -> tuple[Prediction, list[int] | None]:
        """The network's answer, and which rows were computed where some are copies of others."""
        t, conds = batch.times(rows), batch.conds(rows)
        predict = _call_of(batch, self.model.predict)
        # The derivatives of copies are each their own.
        found = distinct(x, t, conds) if self.deduplicate and not batch.grad else None
        if found is None:
            return predict(x, t=t, cond=conds), None
        kept, back = found
        levels = [t[k] for k in kept] if isinstance(t, list) else t
        asked = x[torch.tensor(kept, device=x.device)]
        prediction = predict(asked, t=levels, cond=[conds[k] for k in kept])
        return prediction.rows(torch.tensor(back, device=prediction.x0.device)), kept

    def _finish_device(self) -> None:
        """Waits for the accelerator, so that seconds are those of the call."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def _clock() -> float:
    """Seconds that this thread has not spent waiting for others."""
    return time.perf_counter() - waited()


def _call_of(batch: Batch, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the model; a checkpointed one keeps its input only and runs again backwards."""
    call = functools.partial(call, grad=batch.grad)
    if not batch.checkpoint:
        return call
    return functools.partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)


def _undecoded(model: Model, states: Tensor, error: Exception) -> Exception:
    """What a decoder's failure is to the user: the states are not lost with it."""
    if isinstance(error, SteeringError):
        return error
    parts = [
        f"{model.name} could not decode {len(states)} states: {type(error).__name__}: {error}."
    ]
    if out_of_memory(error):
        parts.append("Let it work in tiles: `steering.load(..., vae='tiling')`.")
    found = DecodeError(" ".join([*parts, "What it was given is in `.states` of this error."]))
    found.states, found.__cause__ = states, error
    return found


def _shared(task: Task, request: Request) -> tuple[object, ...]:
    """Requests of one kind that agree in this may share a call."""
    if isinstance(request, Gradient | Ask | Share):
        return ()
    reward = id(task.reward) if isinstance(request, Score) else None
    if _whole(task, type(request)):
        reward = id(task)
    keeps = (getattr(request, name, False) for name in ("grad", "checkpoint", "preview"))
    return (reward, *keeps)


def _whole(task: Task, kind: type) -> bool:
    """Whether a reward compares the pictures of a request, so that they must come in one call."""
    return kind is Score and not getattr(task.reward, "stationary", True)


def _ended(task: Task, value: object) -> tuple[Outcome | None, TypeError | None]:
    """What a method returned, or the error that it returned something else."""
    if isinstance(value, Outcome):
        return value, None
    return None, TypeError(f"{task.method.name!r} returned {value!r}, no Outcome.")

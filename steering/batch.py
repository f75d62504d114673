"""Requests of one kind from several tasks, merged into one batch and split again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from steering.paths import Prediction, Time
from steering.requests import Decode, Denoise, Gradient, Request, Score
from steering.scoring import Scores
from steering.task import Task

_KIND = {Score: "reward", Decode: "decode", Denoise: "denoise"}
_COUNTER = {Score: "reward_calls", Decode: "decodes", Denoise: "nfe"}


class Batch:
    """The rows of several requests, sorted by time so that chunks cut few equal-time groups.

    Attributes:
        kind: Denoise, Decode or Score.
        data: all rows, [n, ...], in the order of the requests.
        owner: [n] index of the task each row belongs to.
        order: [n] the order in which rows are evaluated.
    """

    def __init__(self, tasks: list[Task], requests: list[Any]) -> None:
        self.tasks, self.requests = tasks, requests
        self.kind = type(requests[0])
        self.grad = bool(requests[0].grad)
        self.checkpoint = self.grad and bool(getattr(requests[0], "checkpoint", False))
        self.preview = bool(getattr(requests[0], "preview", False))
        self.counts = [rows_of(r) for r in requests]
        self.data = _one([_data(r) for r in requests])
        if len(tasks) == 1:
            self.owner = torch.zeros(self.counts[0], dtype=torch.int64)
        else:
            self.owner = torch.arange(len(tasks)).repeat_interleave(torch.tensor(self.counts))
        self._levels: list[Time] | None = None
        self.order = torch.arange(len(self.owner))
        if self.kind is Denoise:
            self._sort_by_time()
        self.in_order = self._levels is None

    def __len__(self) -> int:
        return len(self.owner)

    def _sort_by_time(self) -> None:
        first = times_of(self.requests[0])[0][0]
        if all(t == first for r in self.requests for t, _ in times_of(r)):
            return
        self._levels = [t for r in self.requests for t, m in times_of(r) for _ in range(m)]
        nets = torch.tensor([t.net for t in self._levels], dtype=torch.float64)
        self.order = nets.argsort(descending=True, stable=True)

    def without(self, rows: Tensor, owners: Collection[int]) -> Tensor:
        """The rows that belong to none of the owners."""
        if not owners:
            return rows
        return rows[~torch.isin(self.owner[rows], torch.tensor(list(owners)))]

    def by_owner(self, rows: Tensor) -> dict[int, Tensor]:
        """The rows of each task that has any."""
        mine = self.owner[rows]
        return {k: rows[mine == k] for k in mine.unique().tolist()}

    def times(self, rows: Tensor) -> Time | list[Time]:
        """The level of the rows: one where they agree."""
        if self._levels is None:
            return times_of(self.requests[0])[0][0]
        found = [self._levels[i] for i in rows.tolist()]
        return found[0] if all(t == found[0] for t in found) else found

    def conds(self, rows: Tensor) -> list[int]:
        """The prompt index of each row."""
        asked = [
            task.cond if request.cond is None else request.cond
            for task, request in zip(self.tasks, self.requests, strict=True)
        ]
        return [asked[k] for k in self.owner[rows].tolist()]

    def prompts(self, rows: Tensor) -> list[str | None]:
        """The prompt of each row."""
        return [self.tasks[k].prompt for k in self.owner[rows].tolist()]

    def charge(self, rows: Tensor, evaluated: int, seconds: float) -> None:
        """Books a call. Network rows are measured for the call and split as costs expect."""
        if len(self.tasks) == 1:
            ledger = self.tasks[0].ledger
            spent = evaluated if self.kind is Denoise else len(rows)
            ledger.charge(_COUNTER[self.kind], spent, backward=self.grad)
            ledger.charge_seconds(_KIND[self.kind], seconds)
            return
        share = torch.bincount(self.owner[rows], minlength=len(self.tasks))
        expected = self._expected(rows, share) if self.kind is Denoise else share.double()
        scale = evaluated / float(expected.sum()) if self.kind is Denoise else 1.0
        for k in share.nonzero().flatten().tolist():
            ledger = self.tasks[k].ledger
            ledger.charge(
                _COUNTER[self.kind], round(float(expected[k]) * scale), backward=self.grad
            )
            ledger.charge_seconds(_KIND[self.kind], seconds * int(share[k]) / len(rows))

    def _expected(self, rows: Tensor, share: Tensor) -> Tensor:
        if self._levels is None:
            level = times_of(self.requests[0])[0][0]
            return share.double() * torch.tensor([float(t.cost(level)) for t in self.tasks])
        total = torch.zeros(len(self.tasks), dtype=torch.float64)
        for i, k in zip(rows.tolist(), self.owner[rows].tolist(), strict=True):
            total[k] += self.tasks[k].cost(self._levels[i])
        return total

    def split(self, parts: list[tuple[Tensor, Any]], errors: dict[int, Exception]) -> list[Any]:
        """Answers in request order, from (rows, answer) pairs; errors stand in for answers."""
        answers: list[Any] = [errors.get(k) for k in range(len(self.tasks))]
        if len(errors) == len(self.tasks):
            return answers
        if len(self.tasks) == 1 and len(parts) == 1 and self.in_order:
            return [parts[0][1]]
        whole, rows = _join([answer for _, answer in parts]), _one([r for r, _ in parts])
        back = torch.empty_like(self.order)
        back[rows] = torch.arange(len(rows))
        straight = torch.equal(rows, torch.arange(len(self)))
        start = 0
        for k, n in enumerate(self.counts):
            if k not in errors:
                index = slice(start, start + n)
                answers[k] = _take(whole, index if straight else back[index])
            start += n
        return answers


def rows_of(request: Request) -> int:
    """How many rows a request has."""
    if isinstance(request, Gradient):
        inputs = request.inputs if isinstance(request.inputs, tuple) else (request.inputs,)
        return max((len(x) for x in inputs if isinstance(x, Tensor) and x.ndim), default=1)
    return 0 if not isinstance(request, Denoise | Decode | Score) else len(_data(request))


def times_of(request: Denoise) -> list[tuple[Time, int]]:
    """(level, rows at it) pairs in row order."""
    if isinstance(request.t, Time):
        return [(request.t, len(request.x))]
    return [(t, 1) for t in request.t]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def _data(request: Any) -> Tensor:  # noqa: ANN401
    if isinstance(request, Denoise):
        return request.x
    return request.x0 if isinstance(request, Decode) else request.images


def _one(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _join(parts: list[Any]) -> Any:  # noqa: ANN401
    if isinstance(parts[0], Prediction):
        return Prediction.cat(parts)
    if isinstance(parts[0], Scores):
        names = set.intersection(*[set(p.parts) for p in parts])
        merged = {k: _one([p.parts[k] for p in parts]) for k in sorted(names)}
        kept = set.intersection(*[set(p.notes) for p in parts])
        notes = {k: [text for p in parts for text in p.notes[k]] for k in sorted(kept)}
        return Scores(_one([p.value for p in parts]), merged, notes=notes)
    return _one(parts)


def _take(whole: Any, index: Any) -> Any:  # noqa: ANN401
    if isinstance(whole, Prediction):
        return whole.rows(index)
    if isinstance(whole, Scores):
        notes = {}
        if whole.notes:
            rows = torch.arange(len(whole.value))[index].tolist()
            notes = {k: [texts[i] for i in rows] for k, texts in whole.notes.items()}
        parts = {k: v[index] for k, v in whole.parts.items()}
        return Scores(whole.value[index], parts, notes=notes)
    return whole[index]

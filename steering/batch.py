"""Requests of one kind from several tasks, merged into one batch and split again."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.paths import Prediction, Time
from steering.requests import Decode, Denoise, Gradient, Request, Score
from steering.scoring import Scores, Term
from steering.task import Task

_KIND = {Score: "reward", Decode: "decode", Denoise: "denoise"}
_ROWS = (Denoise, Decode, Score)
_COUNTER = {Score: "reward_calls", Decode: "decodes", Denoise: "nfe"}


class Batch:
    """The rows of several requests, sorted by time so that chunks cut few equal-time groups.

    Attributes:
        kind: Denoise, Decode or Score.
        data: all rows, [n, ...], in the order of the requests.
        owner: [n] index of the task each row belongs to.
        order: [n] the order in which rows are evaluated.
        in_order: whether that is the order of the requests.

    Where ``rows`` are asked for, None means all of them, as they come.
    """

    def __init__(self, tasks: list[Task], requests: list[Any]) -> None:
        self.tasks, self.requests = tasks, requests
        self.kind = type(requests[0])
        self.grad = bool(requests[0].grad)
        self.checkpoint = self.grad and bool(getattr(requests[0], "checkpoint", False))
        self.preview = bool(getattr(requests[0], "preview", False))
        self.counts = [rows_of(r) for r in requests]
        self.data = _one([_data(r) for r in requests])
        self._levels = self._different_levels() if self.kind is Denoise else None
        self._order: list[int] | None = None
        if self._levels is not None:
            nets = [-t.net for t in self._levels]
            order = sorted(range(len(nets)), key=nets.__getitem__)
            self._order = None if order == list(range(len(order))) else order
        self.in_order = self._order is None

    def __len__(self) -> int:
        return self.data.shape[0]

    @functools.cached_property
    def owner(self) -> Tensor:
        return torch.arange(len(self.tasks)).repeat_interleave(torch.tensor(self.counts))

    @functools.cached_property
    def order(self) -> Tensor:
        return torch.arange(len(self)) if self._order is None else torch.tensor(self._order)

    def _different_levels(self) -> list[Time] | None:
        """The level of each row; None where all stand at one."""
        listed = [times_of(r) for r in self.requests]
        first = listed[0][0][0]
        if all(t is first or t == first for pairs in listed for t, _ in pairs):
            return None
        return [t for pairs in listed for t, m in pairs for _ in range(m)]

    def without(self, rows: Tensor, owners: Collection[int]) -> Tensor:
        """The rows that belong to none of the owners."""
        if not owners:
            return rows
        return rows[~torch.isin(self.owner[rows], torch.tensor(list(owners)))]

    def by_owner(self, rows: Tensor) -> dict[int, Tensor]:
        """The rows of each task that has any."""
        mine = self.owner[rows]
        return {k: rows[mine == k] for k in mine.unique().tolist()}

    def times(self, rows: Tensor | None) -> Time | list[Time]:
        """The level of the rows: one where they agree."""
        if self._levels is None:
            return times_of(self.requests[0])[0][0]
        if rows is None:
            return self._levels
        found = [self._levels[i] for i in rows.tolist()]
        return found[0] if all(t == found[0] for t in found) else found

    def conds(self, rows: Tensor | None) -> list[int]:
        """The prompt index of each row."""
        asked = [
            task.cond if request.cond is None else request.cond
            for task, request in zip(self.tasks, self.requests, strict=True)
        ]
        return self._per_row(asked, rows)

    def prompts(self, rows: Tensor | None) -> list[str | None]:
        """The prompt of each row."""
        return self._per_row([task.prompt for task in self.tasks], rows)

    def metadata(self, rows: Tensor | None) -> list[Any] | None:
        """What goes with the prompt of each row; None where no task has any."""
        own = [task.metadata for task in self.tasks]
        return None if all(m is None for m in own) else self._per_row(own, rows)

    def _per_row(self, values: list[Any], rows: Tensor | None) -> list[Any]:
        """What belongs to the owner of each row."""
        if rows is None:
            return [v for v, n in zip(values, self.counts, strict=True) for _ in range(n)]
        return [values[k] for k in self.owner[rows].tolist()]

    def charge(
        self,
        rows: Tensor | None,
        evaluated: int,
        seconds: float,
        kept: Sequence[int] | None = None,
    ) -> None:
        """Books a call. Network rows are measured for the call and split as costs expect.

        Args:
            kept: places among the rows of those that were computed, where the others are copies.
        """
        if len(self.tasks) == 1 and kept is None:
            ledger = self.tasks[0].ledger
            asked = len(self) if rows is None else len(rows)
            spent = evaluated if self.kind is Denoise else asked
            ledger.charge(_COUNTER[self.kind], spent, backward=self.grad)
            ledger.charge_seconds(_KIND[self.kind], seconds)
            return
        rows = self.order if rows is None else rows
        share = self._share(rows)
        expected = self._expected(rows, share) if self.kind is Denoise else share.double()
        computed = expected
        if kept is not None:
            some = rows[torch.tensor(kept)]
            computed = self._expected(some, self._share(some))
        scale = evaluated / float(computed.sum()) if self.kind is Denoise else 1.0
        for k in share.nonzero().flatten().tolist():
            ledger, asked = self.tasks[k].ledger, round(float(expected[k]) * scale)
            ledger.charge(_COUNTER[self.kind], asked, backward=self.grad)
            ledger.charge("deduplicated", asked - round(float(computed[k]) * scale))
            ledger.charge_seconds(_KIND[self.kind], seconds * int(share[k]) / len(rows))

    def _share(self, rows: Tensor) -> Tensor:
        """How many of the rows are each task's."""
        return torch.bincount(self.owner[rows], minlength=len(self.tasks))

    def _expected(self, rows: Tensor, share: Tensor) -> Tensor:
        if self._levels is None:
            level = times_of(self.requests[0])[0][0]
            return share.double() * torch.tensor([float(t.cost(level)) for t in self.tasks])
        total = torch.zeros(len(self.tasks), dtype=torch.float64)
        for i, k in zip(rows.tolist(), self.owner[rows].tolist(), strict=True):
            total[k] += self.tasks[k].cost(self._levels[i])
        return total

    def note(self, rows: Tensor, answer: object) -> None:
        """Tells tasks what some rows are worth before the rest of a call can fail."""
        if not isinstance(answer, Prediction | Scores):
            return
        for k, mine in self.by_owner(rows).items():
            best, at = self.tasks[k].best, (self.owner[rows] == k).nonzero().flatten()
            if isinstance(answer, Prediction):
                best.guess = answer.rows(at).mode.detach()
            else:
                value = answer.value.detach()[at.to(answer.value.device)]
                best.scored(self.requests[k], mine - sum(self.counts[:k]), value)

    def split(self, parts: list[tuple[Tensor, Any]], errors: dict[int, Exception]) -> list[Any]:
        """Answers in request order, from (rows, answer) pairs; errors stand in for answers."""
        answers: list[Any] = [errors.get(k) for k in range(len(self.tasks))]
        if len(errors) == len(self.tasks):
            return answers
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
    return 0 if not isinstance(request, _ROWS) else _data(request).shape[0]


def times_of(request: Denoise) -> list[tuple[Time, int]]:
    """(level, rows at it) pairs in row order."""
    if isinstance(request.t, Time):
        return [(request.t, request.x.shape[0])]
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
        merged = _columns([p.parts for p in parts])
        kept = set.intersection(*[set(p.notes) for p in parts])
        notes = {k: [text for p in parts for text in p.notes[k]] for k in sorted(kept)}
        terms = _columns([p.terms for p in parts], _joined)
        return Scores(_one([p.value for p in parts]), merged, notes=notes, terms=terms)
    return _one(parts)


def _columns(parts: list[dict[str, Any]], join: Any = _one) -> dict[str, Any]:  # noqa: ANN401
    """The columns that every part has."""
    names = set.intersection(*map(set, parts))
    return {k: join([p[k] for p in parts]) for k in sorted(names)}


def _joined(terms: list[Term]) -> Term:
    return Term(_one([t.weight for t in terms]), _one([t.value for t in terms]))


def _take(whole: Any, index: Any) -> Any:  # noqa: ANN401
    if isinstance(whole, Prediction):
        return whole.rows(index)
    if isinstance(whole, Scores):
        notes = {}
        if whole.notes:
            rows = torch.arange(len(whole.value))[index].tolist()
            notes = {k: [texts[i] for i in rows] for k, texts in whole.notes.items()}
        parts = {k: v[index] for k, v in whole.parts.items()}
        terms = {k: Term(w[index], v[index]) for k, (w, v) in whole.terms.items()}
        return Scores(whole.value[index], parts, notes=notes, terms=terms)
    return whole[index]

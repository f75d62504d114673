"""Graphs that several tasks share: who holds one, and how all are differentiated together.

A call with ``grad=True`` may serve many tasks, so there is one graph for all of them. Nobody but
the engine may run backwards through it: the first to do so would free what the others need. Every
answer therefore passes a :class:`_Seal` on its way to the method, and ``Gradient`` requests of all
tasks are answered by one backward pass. Rows do not depend on each other, so the derivatives of
the sum of all values are each task's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.batch import out_of_memory, rows_of
from steering.errors import OptionError, RewardError, SteeringError
from steering.paths import Prediction
from steering.requests import Gradient, Request
from steering.scoring import Scores, Term

if TYPE_CHECKING:
    from steering.task import Task


_BACKWARD = ("nfe_backward", "decodes_backward", "reward_backward")


class _Lock:
    """Whether the engine is running a backward pass."""

    open = False


class _Seal(torch.autograd.Function):
    """The identity; its backward pass is the engine's alone."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, lock: _Lock) -> Tensor:  # noqa: ANN401
        ctx.lock = lock
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        if not ctx.lock.open:
            raise SteeringError(
                "A method differentiated an answer of the engine by itself. The graph behind it "
                "is shared with other prompts' runs: use `yield Gradient(value, inputs)`."
            )
        return grads[0], None


class Graphs:
    """The graphs alive in one run.

    Args:
        limits: most rows by kind of request. They bound the rows that hold a graph at one time
            as they bound the rows of a call, and are halved where a backward pass finds no memory.
    """

    def __init__(self, limits: dict[type, int]) -> None:
        self.limits = limits
        self._held: dict[Task, dict[type, int]] = {}
        self._booked: dict[Task, dict[str, int]] = {}  # charged before the graph now held
        self._lock = _Lock()

    def with_room(self, tasks: Sequence[Task], pending: dict[Task, Request]) -> list[Task]:
        """Those whose request may be served now: a graph of theirs fits beside the others'."""
        served, wide = [], dict.fromkeys(self.limits, 0)
        for held in self._held.values():
            for kind, rows in held.items():
                wide[kind] += rows
        for task in tasks:
            request = pending[task]
            kind = type(request)
            if kind in wide and request.grad and kind not in self._held.get(task, {}):  # type: ignore[union-attr]
                rows = rows_of(request)
                if wide[kind] and wide[kind] + rows > self.limits[kind]:
                    continue
                wide[kind] += rows
            served.append(task)
        return served

    def hold(self, task: Task, request: Request, answer: Any) -> Any:  # noqa: ANN401
        """Notes that a task got an answer with a graph; returns the answer sealed."""
        if not _attached(answer):
            return answer
        held = self._held.setdefault(task, {})
        held[type(request)] = max(held.get(type(request), 0), rows_of(request))
        return self._sealed(answer)

    def release(self, task: Task) -> None:
        """The task needs no graph any more."""
        self._held.pop(task, None)
        self._booked[task] = {name: getattr(task.ledger, name) for name in _BACKWARD}

    def _again(self, task: Task) -> None:
        """Charges the rows of a graph once more: it is kept for another backward pass."""
        booked = self._booked.setdefault(task, dict.fromkeys(_BACKWARD, 0))
        for name in _BACKWARD:
            charged = getattr(task.ledger, name)
            setattr(task.ledger, name, 2 * charged - booked[name])
            booked[name] = charged

    def _sealed(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, Tensor):
            return _Seal.apply(value, self._lock) if value.requires_grad else value
        if isinstance(value, Prediction):
            names = [f.name for f in fields(value)]
            return type(value)(**{k: self._sealed(getattr(value, k)) for k in names})
        if isinstance(value, Scores):
            parts = {k: self._sealed(v) for k, v in value.parts.items()}
            terms = {k: Term(w, self._sealed(v)) for k, (w, v) in value.terms.items()}
            return replace(value, value=self._sealed(value.value), parts=parts, terms=terms)
        return value

    def differentiate(self, tasks: Sequence[Task], requests: Sequence[Gradient]) -> list[Any]:
        """One answer or error per task, by as few backward passes as memory and errors allow."""
        answers: list[Any] = [self._fault(t, r) for t, r in zip(tasks, requests, strict=True)]
        todo = [[k for k, fault in enumerate(answers) if fault is None]]
        while todo:
            part = todo.pop()
            if not part:
                continue
            outside = any(task not in [tasks[k] for k in part] for task in self._held)
            # Kept where it may be needed again: by others, by the method, by a second attempt.
            keep = len(part) > 1 or outside or any(requests[k].retain for k in part)
            try:
                found = self._backward([requests[k] for k in part], keep)
            except Exception as error:
                if out_of_memory(error):
                    half = max(1, sum(rows_of(requests[k]) for k in part) // 2)
                    self.limits.update({k: min(half, v) for k, v in self.limits.items()})
                if len(part) == 1:
                    answers[part[0]] = error
                half = len(part) // 2
                todo += [part[half:], part[:half]] if half else []
                continue
            for k, answer in zip(part, found, strict=True):
                answers[k] = answer
                if requests[k].retain:
                    self._again(tasks[k])
                else:
                    self.release(tasks[k])
        return answers

    def _fault(self, task: Task, request: Gradient) -> Exception | None:
        value, inputs = request.value, _listed(request.inputs)
        if not isinstance(value, Tensor) or value.ndim > 1:
            return OptionError("Gradient: value must be a tensor [n] or one number.")
        if not inputs or not all(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return OptionError(
                "Gradient: inputs must be tensors made with requires_grad_() before the requests "
                "that lead to the value."
            )
        if not value.requires_grad:
            if not task.reward.differentiable:
                return no_gradient(task.method.name, task.reward.name)
            return OptionError(
                "Gradient: the value does not depend on any input that requires a gradient; ask "
                "Denoise, Decode and Score with grad=True on the way from inputs to value."
            )
        if task not in self._held:
            return OptionError(
                "Gradient: there is no graph (any more). Ask with grad=True first, and pass "
                "retain=True to all but the last Gradient of one graph."
            )
        return None

    def _backward(self, requests: Sequence[Gradient], keep: bool) -> list[Any]:
        leaves = [x for r in requests for x in _listed(r.inputs)]
        values = [r.value for r in requests]
        ones = [torch.ones_like(v) for v in values]
        self._lock.open = True
        try:
            found = torch.autograd.grad(values, leaves, ones, retain_graph=keep, allow_unused=True)
        finally:
            self._lock.open = False
        rest = iter(found)
        return [self._answer(r, [next(rest) for _ in _listed(r.inputs)]) for r in requests]

    @staticmethod
    def _answer(request: Gradient, grads: list[Tensor | None]) -> Any:  # noqa: ANN401
        used = [g for g in grads if g is not None]
        if len(used) < len(grads):
            lost = [k for k, g in enumerate(grads) if g is None]
            return OptionError(f"Gradient: the value does not depend on inputs {lost}.")
        wide = [g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for g in used]
        return tuple(wide) if isinstance(request.inputs, tuple) else wide[0]


def _attached(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, Prediction):
        return any(getattr(value, f.name).requires_grad for f in fields(value))
    return (value.value if isinstance(value, Scores) else value).requires_grad


def no_gradient(method: str, reward: str) -> RewardError:
    """The error of a reward that cannot be differentiated."""
    return RewardError(
        f"Method {method!r} needs the gradient of the reward, and reward {reward!r} has none. Use "
        "a differentiable reward (`steer rewards` says which), or a method that needs none."
    )


def _listed(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)

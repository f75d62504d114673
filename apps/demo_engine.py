"""One engine for all sessions: tasks come in and leave while others run, and share its calls."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.api import plan_run
from steering.apps.demo_live import Live, Shot
from steering.apps.demo_order import Offer, Order
from steering.apps.demo_recipes import check_scheduler
from steering.batch import rows_of
from steering.engine import Engine
from steering.errors import OptionError, RecipeError
from steering.finish import Finisher
from steering.ledger import Ledger
from steering.loading import describe
from steering.method import build_method
from steering.requests import Progress, Request, Score
from steering.result import Result
from steering.scoring import Reward, Scores, parts_of, recipe_reward
from steering.task import Best, Task

_REWARDS = 6
_PROMPTS = 200
"""After so many prompts a lane is wrapped anew: a wrapped pipeline keeps what it encoded."""


class SharedEngine(Engine):
    """An engine whose tasks need not be known when it starts.

    Args:
        arrivals: asked for more tasks while there is room; [] for none now.
        leaving: whether a task is to stop at its best so far.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        *,
        max_batch: int,
        listener: Callable[[Task, Progress], None],
        arrivals: Callable[[], list[Task]],
        leaving: Callable[[Task], bool],
    ) -> None:
        super().__init__(model, max_batch=max_batch, listener=listener)
        self.arrivals, self.leaving = arrivals, leaving

    def _admit(self, waiting: list[Task], pending: dict[Task, Request]) -> None:
        for task in [t for t in (*waiting, *pending) if self.leaving(t)]:
            self._dismiss(task, waiting, pending)
        super()._admit(waiting, pending)
        while not waiting and self._room(pending) and (fresh := self.arrivals()):
            waiting.extend(reversed(fresh))
            super()._admit(waiting, pending)
        self._tasks = list(pending)  # what ended is nobody's, and must not be kept

    def _room(self, pending: dict[Task, Request]) -> bool:
        return sum(rows_of(r) for r in pending.values()) < 2 * self.max_batch

    def _dismiss(self, task: Task, waiting: list[Task], pending: dict[Task, Request]) -> None:
        if task in waiting:
            waiting.remove(task)
        pending.pop(task, None)
        if task.run is not None:
            task.run.close()
        self.graphs.release(task)
        task.cancelled = True
        self._done.append(task)


class Watched(Best):
    """The best so far of a task, which also shows every scored picture."""

    def __init__(self, live: Live, ledger: Ledger) -> None:
        super().__init__()
        self.live, self.ledger = live, ledger
        self.next_look = 0.0

    def note(self, request: Request, answer: object) -> None:
        super().note(request, answer)
        if isinstance(request, Score) and isinstance(answer, Scores):
            values = answer.value.detach().cpu().tolist()
            self.live.scored(request.images.detach(), values, request.final, self.ledger.nfe)


class Lane:
    """A model called in one way, with the engine that serves all orders for it.

    Args:
        pipe: the pipeline; lanes of one model share it.
        order: the first order; its call is the lane's.
    """

    def __init__(
        self,
        pipe: Any,  # noqa: ANN401
        order: Order,
        offer: Offer,
        arrivals: Callable[[], list[Task]],
        leaving: Callable[[Task], bool],
    ) -> None:
        from steering.pipelines import wrap

        self.key, self.pipe, self.offer, self.prompts = order.lane, pipe, offer, 0
        self.model = wrap(pipe, name=order.model, prompt=order.prompts[0] or "", **order.call)
        limit = getattr(self.model, "max_batch", None) or 64
        self.engine = SharedEngine(
            self.model, max_batch=limit, listener=self._listen, arrivals=arrivals, leaving=leaving
        )
        self._rewards: OrderedDict[str, Reward] = OrderedDict()

    @property
    def worn(self) -> bool:
        """Whether the lane should be opened anew before it takes more prompts."""
        return self.prompts >= _PROMPTS

    def close(self) -> None:
        self.model.close()

    def tasks(self, order: Order, live: Live) -> list[Task]:
        """Tasks of an order, checked against the model before anything is spent.

        Raises:
            SteeringError: what steer() raises before it starts.
        """
        self._check_model(order)
        guide = self.reward(order.reward)
        for verifier in (self.reward(spec) for spec in order.heldout):
            if set(parts_of(verifier)) == set(parts_of(guide)):
                raise OptionError(f"{verifier.name!r} guides the search; hold out another one.")
        method = build_method(order.method, order.options)
        fitted, plan = plan_run(self.model, method, guide, order.budget)
        fitted = self.offer.fitted(fitted, plan, trimmed=order.trimmed)
        tasks, extra = [], order.metadata or (None,) * len(order.prompts)
        for i, (prompt, seed) in enumerate(zip(order.prompts, order.seeds, strict=True)):
            task = Task(
                index=i, prompt=prompt, cond=self._condition(prompt or ""), seed=seed,
                method=fitted, plan=plan, reward=guide, metadata=extra[i],
            )  # fmt: skip
            task.best = Watched(live, task.ledger)
            tasks.append(task)
        return tasks

    def _check_model(self, order: Order) -> None:
        """Raises where a recipe's model is not the one of this lane."""
        if order.fingerprint is None and order.scheduler is None:
            return
        here = describe(self.pipe)
        if order.fingerprint and here["fingerprint"] != order.fingerprint:
            raise RecipeError(
                "This server's weights are not those of the recipe, so the picture cannot be "
                "repeated here."
            )
        check_scheduler(order.scheduler, here["scheduler"])

    def _condition(self, prompt: str) -> int:
        """The number of a prompt in the model, which learns new ones as they come."""
        if prompt in self.model.prompts:
            return self.model.prompts.index(prompt)
        self.prompts += 1
        cond = self.model.add_prompt(prompt)
        known = self.model.prompts
        self.model.prompts = (*known, *[None] * (cond - len(known)), prompt)
        return cond

    def reward(self, spec: str) -> Reward:
        """A reward, opened once for all who ask for it."""
        found = self._rewards.pop(spec, None)
        if found is None:
            found = recipe_reward(spec)
            adapt = getattr(found, "for_model", None)
            found = adapt(self.model) if adapt else found
        self._rewards[spec] = found
        while len(self._rewards) > _REWARDS:
            self._rewards.popitem(last=False)
        return found

    def results(self, order: Order, tasks: Sequence[Task]) -> list[Result | None]:
        """What ended tasks of one order came to."""
        verifiers = [self.reward(spec) for spec in order.heldout]
        return Finisher(self.model, tasks, verifiers, self.engine).all()

    def _listen(self, task: Task, progress: Progress) -> None:
        best = task.best
        assert isinstance(best, Watched)
        best.live.progressed(progress, task.ledger)
        now = time.perf_counter()
        early = progress.step < 2 or now < best.next_look
        if best.guess is None or best.live.has_pictures or early:
            return
        # Pictures before the first score cost decodes of their own: a tenth of the time at most.
        shots = self._peek(best.guess[:4])
        best.next_look = now + max(1.0, 11 * (time.perf_counter() - now))
        best.live.guessed(shots, task.ledger.nfe)

    def _peek(self, x0: Tensor) -> list[Shot]:
        with torch.no_grad():
            return [Shot.of(image) for image in self.model.decode(x0)]

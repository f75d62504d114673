"""Sessions, their runs in a fair queue, and the one worker thread that owns the models."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steering.apps.demo_engine import Lane
from steering.apps.demo_live import Live
from steering.apps.demo_order import Busy, Offer, Order
from steering.apps.demo_queue import Chore, FairQueue, Outcome, Ticket
from steering.errors import SteeringError
from steering.loading import load
from steering.recipe import write_png
from steering.result import Result, picture_name
from steering.task import Task

log = logging.getLogger("steering.demo")
_KEPT = 12  # runs of a session that can still be looked at
_MODELS, _LANES = 2, 4
_FORGET = 3600.0  # seconds after which an unseen session's runs and files go
_UNWATCHED = 60.0  # seconds after which a run that nobody looks at any more stops


class Host:
    """All sessions of a demo server.

    One thread owns the models, since a wrapped pipeline is not safe in two; everything else only
    hands tickets over and looks at them.

    Args:
        offer: models, rewards and limits.
        root: folder of all that is written: uploads, and a folder per session; a temporary one by
            default.
        dtype, device: of the models.
        threads: of the worker; torch's own number by default.
    """

    def __init__(
        self,
        offer: Offer | None = None,
        *,
        root: Path | None = None,
        dtype: str = "auto",
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.offer = offer or Offer()
        self.root = Path(tempfile.mkdtemp(prefix="steer-demo-")) if root is None else root
        self.dtype, self.device = dtype, device
        self.threads = threads or torch.get_num_threads()
        self.paces: dict[str, float] = {}
        self._numbers = itertools.count(1)
        self._queue = FairQueue()
        self._tickets: dict[str, deque[Ticket]] = {}
        self._uploads: dict[str, set[Path]] = {}
        self._running: dict[int, Ticket] = {}
        self._owner: dict[int, Ticket] = {}
        self._pipes: OrderedDict[str, Any] = OrderedDict()
        self._lanes: OrderedDict[str, Lane] = OrderedDict()
        self._wake = threading.Condition()
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="steer-demo", daemon=True)
        self._worker.start()

    # --- for any thread -------------------------------------------------------------------------

    def submit(
        self,
        session: str,
        order: Order,
        *,
        chore: Callable[[Lane], Chore] | None = None,
        pictures: int = 8,
    ) -> Ticket:
        """Queues a run, or a chore for the thread that owns the order's model.

        Raises:
            Busy: the queue, or this session's share of it, is full.
        """
        limits = self.offer.limits
        with self._wake:
            mine = [t for t in self._tickets.get(session, ()) if not t.over]
            if len(mine) >= limits.per_session:
                raise Busy(
                    f"You have {len(mine)} runs waiting or running, as many as one person may "
                    "have here. Wait for one of them or cancel it."
                )
            if len(self._queue) >= limits.waiting:
                raise Busy(
                    f"The queue is full ({limits.waiting} runs are waiting). Try again in a "
                    "moment."
                )
            number = next(self._numbers)
            ticket = Ticket(
                number, session, order, Live(budget=order.budget.nfe or 0),
                self.folder(session) / f"{number:06d}", chore, pictures,
            )  # fmt: skip
            kept = self._tickets.setdefault(session, deque())
            kept.append(ticket)
            self._trim(kept)
            self._queue.add(ticket)
            self._wake.notify_all()
        return ticket

    def folder(self, session: str) -> Path:
        """The folder of a session; its name says nothing about the outside."""
        safe = "".join(c for c in session if c.isalnum())[:40] or "nobody"
        return self.root / "sessions" / safe

    def tickets(self, session: str) -> list[Ticket]:
        """A session's runs, oldest first."""
        with self._wake:
            return list(self._tickets.get(session, ()))

    def cancel(self, session: str) -> int:
        """Stops all of a session's runs at their best so far; how many there were."""
        going = [t for t in self.tickets(session) if not t.over]
        for ticket in going:
            ticket.cancel.set()
        with self._wake:
            for ticket in going:
                if ticket.state == "waiting" and self._queue.remove(ticket):
                    self._end(ticket, "stopped", "Cancelled before it started.")
            self._wake.notify_all()
        return len(going)

    def remember(self, session: str, paths: Iterable[object]) -> None:
        """Uploads that go when this session is over."""
        named = [Path(p).resolve() for p in paths if isinstance(p, str | Path)]
        kept = {p for p in named if p.parent.parent == self.root.resolve()}
        with self._wake:
            self._uploads.setdefault(session, set()).update(kept)

    def _forget_uploads(self, session: str) -> None:
        """Removes a session's uploads, but for those that another session has too.

        An upload lies in a folder named by its content, so equal ones are one file.
        """
        with self._wake:
            mine = self._uploads.pop(session, set())
            gone = mine.difference(*self._uploads.values())
            for path in gone:
                with contextlib.suppress(OSError):  # the same content under another name stays
                    path.unlink(missing_ok=True)
                    path.parent.rmdir()

    def leave(self, session: str) -> None:
        """The session is over: its runs stop, its files go."""
        for ticket in self.tickets(session):
            ticket.left = True
        self.cancel(session)
        with self._wake:
            self._tickets.pop(session, None)
        self._forget_uploads(session)
        shutil.rmtree(self.folder(session), ignore_errors=True)

    def ahead(self, ticket: Ticket) -> int:
        """How many runs will be started before this one."""
        with self._wake:
            return self._queue.ahead(ticket)

    @property
    def load(self) -> tuple[int, int]:
        """(runs running, runs waiting)."""
        with self._wake:
            return len(self._running), len(self._queue)

    def pace(self, order: Order) -> float | None:
        """Seconds per network row, all else of a run included; None where nothing was measured."""
        return self.paces.get(f"{order.lane} {order.method}", self.paces.get(order.lane))

    def close(self) -> None:
        """Stops the worker and removes what sessions wrote."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._worker.join(timeout=30)
        shutil.rmtree(self.root, ignore_errors=True)

    # --- the worker's thread --------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        while True:
            with self._wake:
                while not self._closing and not len(self._queue):
                    self._wake.wait(timeout=30)
                    self._sweep()
                if self._closing:
                    break
                ticket = self._queue.take()
            if ticket is not None:
                self._serve(ticket)
        for lane in self._lanes.values():
            lane.close()

    def _serve(self, ticket: Ticket) -> None:
        """Runs a ticket, and all for the same lane that come while the engine is going."""
        try:
            assert ticket.order is not None
            lane = self._lane(ticket.order)
            for task in lane.engine.stream(self._start(ticket, lane)):
                self._ended(task, lane)
        except Exception as error:
            self._fail(ticket, error)
            for other in list(self._running.values()):
                self._fail(other, error)

    def _arrivals(self, key: str) -> list[Task]:
        """The next ticket's tasks, where it is for the lane that is running."""
        while not self._closing:
            lane = self._lanes[key]
            with self._wake:
                head = self._queue.head()
                fits = head is not None and head.order is not None and head.order.lane == key
                if not fits or lane.worn:
                    return []
                ticket = self._queue.take()
            if ticket is not None and (tasks := self._start(ticket, lane)):
                return tasks
        return []

    def _start(self, ticket: Ticket, lane: Lane) -> list[Task]:
        """A ticket's tasks; [] where it was a chore or cannot be run."""
        assert ticket.order is not None
        ticket.started, ticket.state = time.time(), "running"
        try:
            if ticket.chore is not None:
                self._do(ticket, ticket.chore(lane))
                return []
            ticket.tasks = lane.tasks(ticket.order, ticket.live)
        except Exception as error:
            self._fail(ticket, error)
            return []
        with self._wake:
            for other in self._running.values():
                other.company += 1
            ticket.company = len(self._running)
            self._running[ticket.number] = ticket
        self._owner |= {id(task): ticket for task in ticket.tasks}
        return list(ticket.tasks)

    def _do(self, ticket: Ticket, chore: Chore) -> None:
        """A chore, call by call, for as long as a run may take."""
        limit = self.offer.limits.seconds
        try:
            while ticket.seconds < limit and not self._unwanted(ticket):
                next(chore)
        except StopIteration as end:
            ticket.answer = end.value
            self._end(ticket, "finished")
            return
        chore.close()
        late = f"The limit of {limit:g} s was reached" if ticket.seconds >= limit else "Cancelled"
        self._end(ticket, "stopped", f"{late} before all was done.")

    def _leaving(self, task: Task) -> bool:
        return self._unwanted(self._owner[id(task)])

    def _unwanted(self, ticket: Ticket) -> bool:
        if time.monotonic() - ticket.watched > _UNWATCHED and not ticket.cancel.is_set():
            log.info("run %d: nobody is looking any more; stopped", ticket.number)
            ticket.cancel.set()
        return ticket.cancel.is_set() or self._closing

    def _ended(self, task: Task, lane: Lane) -> None:
        """One task of a ticket has ended; with the last of them its results are made."""
        ticket = self._owner.pop(id(task))
        if any(id(t) in self._owner for t in ticket.tasks):
            return
        assert ticket.order is not None
        try:
            for result in [] if ticket.left else lane.results(ticket.order, ticket.tasks):
                if result is not None:
                    ticket.results.append(self._write(ticket, result))
        except Exception as error:
            self._fail(ticket, error)
            return
        if ticket.left:  # closed while they were being written: nobody can fetch them
            shutil.rmtree(ticket.folder, ignore_errors=True)
        self._measure(ticket)
        errors = [t.error for t in ticket.tasks if t.error is not None]
        if errors:
            self._fail(ticket, errors[0])
        elif any(t.cancelled for t in ticket.tasks):
            self._end(ticket, "stopped", self._why(ticket))
        else:
            self._end(ticket, "finished")

    def _why(self, ticket: Ticket) -> str:
        """What the person is told of a run that did not come to its end."""
        kept = "this is the best so far" if ticket.results else "there was no picture yet"
        if ticket.cancel.is_set() or self._closing:
            return kept
        return f"the limit of {self.offer.limits.seconds:g} s was reached; {kept}"

    def _write(self, ticket: Ticket, result: Result) -> Outcome:
        ticket.folder.mkdir(parents=True, exist_ok=True)
        engine = {**result.recipe.engine, "company": ticket.company}
        recipe, files = replace(result.recipe, engine=engine), []
        start = len(list(ticket.folder.glob("*.png")))
        for k, picture in enumerate(result.pictures()[: ticket.pictures]):
            files.append(ticket.folder / picture_name(start + k))
            write_png(picture, files[-1], replace(recipe, image=k))
        return Outcome(
            files=files,
            summary=result.summary(),
            events=result.trace.to_json(),
            recipe=recipe.to_json(),
        )

    def _measure(self, ticket: Ticket) -> None:
        """Learns how long a network row takes with all that goes with it."""
        assert ticket.order is not None
        spent = sum(t.ledger.seconds for t in ticket.tasks)
        rows = sum(t.ledger.nfe for t in ticket.tasks)
        if rows < 1:
            return
        for key in (ticket.order.lane, f"{ticket.order.lane} {ticket.order.method}"):
            before = self.paces.get(key, spent / rows)
            self.paces[key] = 0.5 * before + 0.5 * spent / rows
        while len(self.paces) > 200:
            self.paces.pop(next(iter(self.paces)))

    def _lane(self, order: Order) -> Lane:
        """The lane of an order, opened if need be."""
        lane = self._lanes.pop(order.lane, None)
        if lane is not None and lane.worn:
            lane.close()
            lane = None
        if lane is None:
            key = order.lane
            lane = Lane(
                self._pipe(order.model), order, self.offer,
                lambda: self._arrivals(key), self._leaving,
            )  # fmt: skip
        self._lanes[order.lane] = lane
        while len(self._lanes) > _LANES:
            self._lanes.popitem(last=False)[1].close()
        return lane

    def _pipe(self, name: str) -> Any:  # noqa: ANN401
        pipe = self._pipes.pop(name, None)
        if pipe is None:
            pipe = load(name, dtype=self.dtype, device=self.device)
            pipe.set_progress_bar_config(disable=True)
        self._pipes[name] = pipe
        while len(self._pipes) > _MODELS:
            gone, old = self._pipes.popitem(last=False)
            for key in [k for k, lane in self._lanes.items() if lane.pipe is old]:
                self._lanes.pop(key).close()
            log.info("closed model %s", gone)
        return pipe

    def _end(self, ticket: Ticket, state: str, error: str = "") -> None:
        with self._wake:
            self._running.pop(ticket.number, None)
            ticket.tasks, ticket.chore = [], None
            ticket.ended, ticket.error, ticket.state = time.time(), error, state
            with ticket.live.lock:
                ticket.live.version += 1

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        for task in ticket.tasks:
            self._owner.pop(id(task), None)
        if isinstance(error, SteeringError):
            log.warning("run %d of %s: %s", ticket.number, ticket.session[:8], error)
            self._end(ticket, "failed", str(error))
            return
        log.error("run %d of %s failed", ticket.number, ticket.session[:8], exc_info=error)
        self._end(
            ticket,
            "failed",
            f"Something went wrong inside the server ({type(error).__name__}). Its log has the "
            f"details under run {ticket.number}.",
        )

    def _trim(self, kept: deque[Ticket]) -> None:
        """Forgets a session's oldest runs, with their files."""
        while len(kept) > _KEPT and kept[0].over:
            shutil.rmtree(kept.popleft().folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Forgets sessions that nobody has looked at for long."""
        now = time.monotonic()
        for session, kept in list(self._tickets.items()):
            if all(t.over and now - t.watched > _FORGET for t in kept):
                del self._tickets[session]
                self._forget_uploads(session)
                shutil.rmtree(self.folder(session), ignore_errors=True)
        for session, files in list(self._uploads.items()):
            if not any(map(Path.exists, files)):  # gradio itself removes what is an hour old
                del self._uploads[session]

"""Runs on their way: a ticket for each, and a queue that serves sessions in turn."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.apps.demo_engine import Lane
from steering.apps.demo_live import Live
from steering.apps.demo_order import Order
from steering.task import Task

Chore = Generator[None, None, Any]
"""Work that is no run: it stops between its calls to be asked whether to go on; -> its answer."""


@dataclass(eq=False)
class Ticket:
    """One run of one session, from the queue to its files.

    Attributes:
        state: "waiting", "running", "finished", "stopped" or "failed".
        company: how many other runs shared the engine with it.
        pictures: of each result that are written.
        left: its session is over, so nothing is made of it any more.
        results: summaries with the files written, best picture first, one per prompt.
    """

    number: int
    session: str
    order: Order | None
    live: Live
    folder: Path
    chore: Callable[[Lane], Chore] | None = None
    pictures: int = 8
    state: str = "waiting"
    error: str = ""
    left: bool = False
    company: int = 0
    created: float = field(default_factory=time.time)
    started: float = 0.0
    ended: float = 0.0
    watched: float = field(default_factory=time.monotonic)
    tasks: list[Task] = field(default_factory=list)
    results: list[Outcome] = field(default_factory=list)
    answer: Any = None
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def seconds(self) -> float:
        """Wall time since it started."""
        end = self.ended if self.over else time.time()
        return end - self.started if self.started else 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A result without its tensors: files on disk and plain numbers."""

    files: list[Path]
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    recipe: dict[str, Any]

    @property
    def reward(self) -> float:
        return float(self.summary["best_reward"])

    @property
    def nfe(self) -> int:
        return int(self.summary["ledger"]["nfe"])


class FairQueue:
    """Tickets of many sessions: sessions take turns, each session's own come in order."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, ticket: Ticket) -> None:
        self._waiting.setdefault(ticket.session, deque()).append(ticket)

    def head(self) -> Ticket | None:
        """The ticket whose turn it is."""
        return next((mine[0] for mine in self._waiting.values()), None)

    def take(self) -> Ticket | None:
        """Takes that ticket; its session goes to the end."""
        ticket = self.head()
        if ticket is not None:
            self.remove(ticket)
            if ticket.session in self._waiting:
                self._waiting.move_to_end(ticket.session)
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """Whether the ticket was waiting; it no longer is."""
        mine = self._waiting.get(ticket.session, deque())
        if ticket not in mine:
            return False
        mine.remove(ticket)
        if not mine:
            del self._waiting[ticket.session]
        return True

    def ahead(self, ticket: Ticket) -> int:
        """How many tickets come before this one, if no more are added."""
        sessions = list(self._waiting)
        if ticket.session not in self._waiting:
            return 0
        at, mine = sessions.index(ticket.session), list(self._waiting[ticket.session])
        if ticket not in mine:
            return 0
        place = mine.index(ticket)
        return place + sum(
            min(len(self._waiting[s]), place + (k < at))
            for k, s in enumerate(sessions)
            if s != ticket.session
        )

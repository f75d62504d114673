"""Threads use networks one after another.

A call of a network is never quite alone: pipelines move weights, freeze parameters, scale LoRAs
and set the padding of tokenizers; attention kernels are chosen, and loading sets the default dtype
and the filters of warnings, for the whole process. Nothing of that belongs to a thread, and much
of it is shared by pipelines that look separate. So all of it happens in turn. Functions that are
the user's own, and answers from elsewhere, take no turn.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TURN = threading.RLock()
"""Held while a pipeline's own code runs, while a reward's network works and while weights are
read, those of a hub id with their download. ``with TURN:`` is safe from interrupts."""

_OWN = threading.local()


def renewed_by_forks(lock: threading.RLock) -> None:
    """A process that was forked begins with a free lock: who held it has stayed behind."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]


renewed_by_forks(TURN)


@contextmanager
def in_turn() -> Iterator[None]:
    """``with TURN:``, whose waiting counts as such."""
    started = time.perf_counter()
    with TURN:
        _OWN.waited = waited() + time.perf_counter() - started
        yield


def waited() -> float:
    """Seconds that this thread has waited for its turns."""
    return getattr(_OWN, "waited", 0.0)

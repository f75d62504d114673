"""Threads use networks one after another.

A call of a network is never quite alone: pipelines move weights, freeze parameters, scale LoRAs
and set the padding of tokenizers; attention kernels are chosen, and loading sets the default dtype
and the filters of warnings, for the whole process. Nothing of that belongs to a thread, and much
of it is shared by pipelines that look separate. So all of it happens in turn.
"""

from __future__ import annotations

import os
import threading
import time


class Turn:
    """A re-entrant lock that knows how long each thread has waited for it.

    A process that was forked begins with a free one: who held it has stayed behind.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @property
    def waited(self) -> float:
        """Seconds that this thread has waited so far."""
        return getattr(self._own, "waited", 0.0)

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        started = time.perf_counter()
        self._lock.acquire()
        self._own.waited = self.waited + time.perf_counter() - started

    def __exit__(self, *_: object) -> None:
        self._lock.release()


TURN = Turn()
"""Held while a pipeline's own code runs, while a reward's network works and while weights are
read. Never held while something from outside is waited for."""

"""Threads that share a pipeline, a network or a reward take turns."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

_MAKING = threading.Lock()
_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def turn_of(network: nn.Module) -> threading.RLock:
    """The lock of a network.

    Held while a pipeline's own code runs, while parameters are frozen and while a reward scores:
    offloading moves weights, encoders scale their LoRAs and caches keep states between calls, all
    on modules that other threads may be using.
    """
    with _MAKING:
        return _TURNS.setdefault(network, threading.RLock())

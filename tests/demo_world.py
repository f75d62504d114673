"""A demo server on the sticker model whose runs a test can hold and let go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from steering.apps.demo_order import Limits, Offer, Order
from steering.apps.demo_session import Host
from steering.rewards.base import Reward, register

PATIENCE = 120.0
PROMPT = "a photo of a red apple"
REWARDS = ("brightness", "clip", "detector", "gated")


class Gate:
    """Scores pass while it is open; one call each where it was told to let some through."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free, self._permits, self._waiting = True, 0, 0

    @property
    def blocked(self) -> bool:
        """Whether a score waits, and none was told to go on."""
        with self._changed:
            return self._waiting > 0 and not self._free and not self._permits

    def shut(self) -> None:
        self._set(False, 0)

    def open(self) -> None:
        self._set(True, 0)

    def let(self, calls: int) -> None:
        self._set(False, calls)

    def _set(self, free: bool, permits: int) -> None:
        with self._changed:
            self._free, self._permits = free, permits
            self._changed.notify_all()

    def pass_through(self) -> None:
        """Waits for its turn; gives up after a while, so that no test can hang."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._free or self._permits > 0, timeout=PATIENCE)
            self._waiting -= 1
            self._permits -= not self._free


GATE = Gate()


@register("gated")
@dataclass(frozen=True, kw_only=True)
class Gated(Reward):
    """Mean of the pixels, once the gate lets it through."""

    describe: ClassVar[str] = "waits for a test"

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        GATE.pass_through()
        return images.mean((1, 2, 3))


@register("told")
@dataclass(frozen=True, kw_only=True)
class Told(Reward):
    """Mean of the pixels, times what is told beside the prompt; not offered by these servers."""

    describe: ClassVar[str] = "listens to metadata"

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor:
        return images.mean((1, 2, 3)) * images.new_tensor([m["times"] for m in metadata or ()])


@contextlib.contextmanager
def held() -> Iterator[Gate]:
    """The gate, shut; open again afterwards whatever happened."""
    GATE.shut()
    try:
        yield GATE
    finally:
        GATE.open()


@contextlib.contextmanager
def hosting(*models: str, root: Path | None = None, **limits: Any) -> Iterator[Host]:
    """A host of the sticker model, within limits."""
    offer = Offer(
        models=("stickers", *models), rewards=REWARDS, limits=Limits(**{"nfe": 4000, **limits})
    )
    host = Host(offer, root=root)
    try:
        yield host
    finally:
        GATE.open()
        host.close()


def order(host: Host, **changes: Any) -> Order:
    """A small run: FK, two particles of four steps."""
    given = {
        "prompt": PROMPT,
        "model": "stickers",
        "method": "fk",
        "rewards": {"brightness": 1.0},
        "nfe": 16,
        "call": {"num_inference_steps": 4},
    }
    return host.offer.order(**{**given, **changes})


def eventually(true: Callable[[], Any], what: str) -> None:
    """Waits until something is so."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


def ended(*tickets):
    for ticket in tickets:
        eventually(lambda ticket=ticket: ticket.over, f"run {ticket.number} is over")
    return tickets[0] if len(tickets) == 1 else tickets


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest.fixture(scope="module")
def host():
    with hosting(waiting=3, per_session=2, seconds=120.0) as found:
        yield found


@pytest.fixture(autouse=True)
def quiet_afterwards(request):
    yield
    if "host" in request.fixturenames:
        shared = request.getfixturevalue("host")
        for session in list(shared._tickets):
            shared.leave(session)
        eventually(lambda: shared.load == (0, 0), "the host is idle")

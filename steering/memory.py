"""What fits into memory: bytes per row of each kind of call, and what a split of a batch costs.

Two uses. :func:`plan_memory` asks a model and a reward about 1 and 4 rows before a run and says
how wide its calls may be. :class:`Care` serves a running engine that was given no ``max_batch``:
where a rough guess says that memory could be short, the first row of a kind is run alone and
watched, and the width of the calls after it follows from what it took. Nothing is asked twice.

Memory is counted as tensors that are alive at once, on any device; what kernels take for
themselves is in the margin.
"""

# ruff: noqa: ANN401 - what torch dispatches has no common type

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steering.batch import Batch
from steering.model import Model
from steering.noise import NoiseKey
from steering.requests import Decode, Denoise, Score
from steering.scoring import Reward, score

_SHARE = 0.8
"""Of the memory that is free, how much is used."""

_MARGIN = 1.25
"""What kernels take beside the tensors they make."""

_GUESS: dict[type, float] = {Denoise: 4e3, Decode: 2e4, Score: 200.0}
"""Bytes a row may take at most, in units of its data: on the high side, and only to decide
whether it is worth while to look."""

_LEAST = 2**25
"""The least that a row of a reward is taken for: its network has an input size of its own."""


class Watch(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive at once.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._note(given, made=False)
        out = func(*args, **kwargs)
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._note(made, made=True)
        return out

    def _note(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self._sizes:
            return
        size = storage.nbytes() if made else 0  # what was there before is not counted
        self._sizes[name] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, name)

    def _gone(self, name: int) -> None:
        self.live -= self._sizes.pop(name, 0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nobody knows."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _free_ram() if device.type == "cpu" else None


def _free_ram() -> int | None:
    """What the machine and, inside a container, its control group still give."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())
        found.append(max(0, most - int((group / "memory.current").read_text())))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def rows_that_fit(bytes_per_row: float, free: int | None, most: int) -> int:
    """Rows of one call; at least one, at most ``most``."""
    if free is None or bytes_per_row <= 0.0:
        return most
    return max(1, min(most, int(_SHARE * free / (_MARGIN * bytes_per_row))))


class Care:
    """Keeps the calls of a running engine within memory, without a limit from the user.

    Args:
        limits: most rows by kind of request, lowered here.
        free: bytes that can be had on a device, by default what it says itself.
    """

    def __init__(
        self,
        device: torch.device,
        limits: dict[type, int],
        free: Callable[[torch.device], int | None] | None = None,
    ) -> None:
        self.device, self.limits, self.free = device, limits, free or free_memory
        self._safe: dict[tuple[type, bool], float] = {}  # rows that need no further look

    def wants(self, batch: Batch) -> bool:
        """Whether one row of this batch should be run alone and watched first."""
        key = (batch.kind, batch.grad)
        rows = min(len(batch), self.limits[batch.kind])
        if rows <= self._safe.get(key, 1):
            return False
        row = batch.data[:1]
        guess = _GUESS[batch.kind] * row.numel() * max(4, row.element_size())
        guess = max(guess, _LEAST) if batch.kind is Score else guess
        free = self.free(self.device)
        short = free is not None and rows * guess * (2 if batch.grad else 1) > 0.5 * free
        self._safe[key] = math.inf if short else rows
        return short

    @contextlib.contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Around the call of one row: its kind's limit follows from what it takes."""
        free = self.free(self.device)
        with Watch() as watch:
            yield
        # A backward pass needs about as much again as its forward pass has left behind.
        taken = watch.peak * (2 if batch.grad else 1)
        self.limits[batch.kind] = rows_that_fit(taken, free, self.limits[batch.kind])


# --- before a run ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of call.

    Attributes:
        name: "network", "network with gradient", "decoder", "reward", ...
        row: bytes that one more row takes.
        fits: rows of one call; ``most`` where memory is no limit.
        calls: calls that ``most`` rows take at this width.
        split: seconds that this split costs over one call of ``most`` rows, as a share of it.
            Calls are taken to last a + b rows, from 1 and 4 rows; a GPU that is not full at 4
            rows gains more from wide calls than that says.
    """

    name: str
    row: int
    fits: int
    calls: int
    split: float


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What fits beside what is loaded.

    Attributes:
        device, free: bytes that can still be had there; None where nobody knows.
        most: rows wished for in one call.
        parts: by kind of call.
    """

    device: str
    free: int | None
    most: int
    parts: tuple[Part, ...]

    @property
    def max_batch(self) -> int:
        """The widest call that fits for all kinds."""
        return min(part.fits for part in self.parts)

    def __str__(self) -> str:
        free = "unknown" if self.free is None else _size(self.free)
        lines = [f"free on {self.device}: {free}; {self.most} rows wished for in one call"]
        lines += [
            f"{p.name:26s} {_size(p.row):>9s} a row, {p.fits} rows fit: "
            f"{p.calls} call{'s' if p.calls > 1 else ''} ({100 * p.split:+.0f} % time)"
            for p in self.parts
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        parts = {p.name: {k: v for k, v in vars(p).items() if k != "name"} for p in self.parts}
        top = {"device": self.device, "free": self.free, "most": self.most}
        return {**top, "max_batch": self.max_batch, "parts": parts}


def plan_memory(
    model: Model,
    reward: Reward | None = None,
    *,
    gradient: bool = False,
    most: int = 64,
    free: int | None = None,
    widths: Sequence[int] = (1, 4),
) -> MemoryPlan:
    """Asks about a few rows of each kind, and says how wide calls may be.

    Args:
        reward: left out where None.
        gradient: also with a graph, differentiated.
        most: rows wished for in one call.
        free: bytes to plan for; by default what the device has.
        widths: of the two calls of each kind.
    """
    free = free_memory(model.device) if free is None else free
    parts = []
    for name, call in _calls(model, reward, gradient).items():
        call(min(widths))  # what is made once is no row's
        (few, some), (short, long) = zip(*[_measured(call, n) for n in widths], strict=True)
        span = widths[1] - widths[0]
        row = max(1, int((some - few) / span))
        fits = rows_that_fit(row, free, most)
        calls = math.ceil(most / fits)
        slope = max(0.0, (long - short) / span)
        once = max(0.0, short - slope * widths[0])
        whole = once + slope * most
        split = (calls - 1) * once / whole if whole > 0.0 else 0.0
        parts.append(Part(name=name, row=row, fits=fits, calls=calls, split=split))
    return MemoryPlan(device=str(model.device), free=free, most=most, parts=tuple(parts))


def _calls(
    model: Model, reward: Reward | None, gradient: bool
) -> dict[str, Callable[[int], object]]:
    """What a run may ask, by name, for a number of rows."""
    t = model.grid().times[0]
    prompt = model.prompts[0]

    def states(n: int, grad: bool) -> Tensor:
        x = model.noise(n, NoiseKey(0, "plan"))
        return x.requires_grad_() if grad else x

    def network(n: int, grad: bool = False) -> object:
        x = states(n, grad)
        x0 = model.predict(x, t, cond=[0] * n, grad=grad).x0
        return torch.autograd.grad(x0.sum(), x) if grad else x0

    def decoder(n: int, grad: bool = False) -> object:
        x = states(n, grad)
        images = model.decode(x, grad=grad)
        return torch.autograd.grad(images.sum(), x) if grad else images

    def judge(n: int, grad: bool = False) -> object:
        assert reward is not None
        # Its own pictures, so that only the reward is counted.
        images = torch.zeros(n, *picture, device=model.device).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            value = score(reward, images, [prompt] * n).value
        return torch.autograd.grad(value.sum(), images) if grad else value

    found: dict[str, Callable[..., object]] = {"network": network, "decoder": decoder}
    if reward is not None:
        picture = model.decode(states(1, False)).shape[1:]
        found["reward"] = judge
    for name, call in list(found.items()) if gradient else ():
        if name != "reward" or getattr(reward, "differentiable", False):
            found[f"{name} with gradient"] = functools.partial(call, grad=True)
    return found


def _measured(call: Callable[[int], object], n: int) -> tuple[int, float]:
    """(most bytes alive at once, seconds) of a call; the seconds without anyone watching."""
    _wait()  # for what was asked before
    started = time.perf_counter()
    call(n)
    _wait()
    seconds = time.perf_counter() - started
    with Watch() as watch:
        call(n)
    return watch.peak, seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _size(count: int) -> str:
    """Bytes for people."""
    power = min(3, int(math.log(max(1, count), 1024)))
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"

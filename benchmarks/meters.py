"""Seconds spent inside networks, decoders and rewards, read by hooks on the modules themselves."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch


class ModuleClock:
    """Adds up the time between entering and leaving some modules (outermost call only)."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds = 0.0
        self.depth = 0
        self.since = 0.0

    def enter(self, *_: object) -> None:
        if self.depth == 0:
            self.since = self.now()
        self.depth += 1

    def leave(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += self.now() - self.since


@contextlib.contextmanager
def clocked(pipe: object, now: Callable[[], float] = time.perf_counter) -> Iterator[ModuleClock]:
    """A clock over every network of a pipeline: denoiser, text encoders, decoder."""
    clock, handles = ModuleClock(now), []
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    for module in modules:
        targets = [module]
        # a VAE is used through decode(), which runs its decoder module
        targets += [m for n, m in module.named_children() if n in ("decoder", "post_quant_conv")]
        for target in targets:
            handles.append(target.register_forward_pre_hook(clock.enter))
            handles.append(target.register_forward_hook(clock.leave))
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, for CPU time that other programs disturb little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def turns(
    ways: dict[str, Callable[[], object]], repeats: int, calls: int = 1
) -> dict[str, list[float]]:
    """CPU seconds a call of each way, in turn; the first turn warms up and is not counted."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            for _ in range(calls):
                way()
            if repeat:
                took[name].append((time.process_time() - started) / calls)
    return took


def together_or_apart(
    pipe: object,
    steer: Callable[[object], object],
    texts: list[str],
    repeats: int,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Seconds of all prompts in one call and of a call for each, in turn, and their ratio.

    "network" is the same ratio for the pipeline's networks alone (forward passes): what wider
    batches are worth on this machine, whatever steers. "rest" is that of all else. One prompt
    warms up and is not counted.
    """
    steer(texts[0])
    took: dict[str, list[float]] = {"together": [], "one by one": []}
    inside: dict[str, list[float]] = {"together": [], "one by one": []}
    for _ in range(repeats):
        for name, jobs in (("one by one", texts), ("together", [texts])):
            with clocked(pipe, now) as clock:
                started = now()
                for job in jobs:
                    steer(job)
                took[name].append(now() - started)
            inside[name].append(clock.seconds)
    rest = {k: [a - b for a, b in zip(took[k], inside[k], strict=True)] for k in took}
    ratios, network, others = (
        spread([a / b for a, b in zip(v["one by one"], v["together"], strict=True)])
        for v in (took, inside, rest)
    )
    seconds = {name: spread(v) for name, v in took.items()}
    return {"ratio": ratios, "network": network, "rest": others, **seconds}


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}

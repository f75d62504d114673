"""Claim: our own time grows at most in proportion to particles, prompts, steps and rollouts.

An analytic model with states as large as those of the stickers, so that nearly all time is ours.
CPU time of the process, one thread; the exponent is the slope of a line through the logarithms,
over all sizes and over the larger half.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import steering
from benchmarks.meters import one_thread
from steering.analytic import GaussianMixture
from steering.ledger import Budget
from steering.samplers import DTS, FK, DTSStar

DIMS, REPEATS = 2048, 2
SIZES = {
    "particles": (1, 2, 4, 8, 16, 32, 64),
    "prompts": (1, 2, 4, 8, 16, 32, 64),
    "steps": (10, 20, 40, 70, 100),
    "rollouts": (10, 30, 100, 300, 1000),
    "rollouts, best only": (10, 30, 100, 300, 1000),
}


def model(prompts: int = 1, steps: int = 20) -> GaussianMixture:
    means = torch.stack([torch.full((DIMS,), -0.5), torch.full((DIMS,), 0.5)]).tolist()
    names = tuple(f"p{i}" for i in range(prompts))
    return GaussianMixture([0.5, 0.5], means, [0.3, 0.3], steps=steps, prompts=names)


def bright(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).mean(1)


def job(curve: str, n: int) -> Callable[[], tuple[object, object]]:
    """A run of one size: (model, options of steer)."""
    if curve == "particles":
        return lambda: (model(), FK(n_particles=n, reward_scale=5.0))
    if curve == "prompts":
        return lambda: (model(n), FK(n_particles=4, reward_scale=5.0))
    if curve == "steps":
        return lambda: (model(steps=n), FK(n_particles=8, reward_scale=5.0))
    return lambda: (model(), (DTS if curve == "rollouts" else DTSStar)(reward_scale=5.0))


@contextlib.contextmanager
def clock(made: object) -> Iterator[dict[str, float]]:
    """Seconds inside a model's answers."""
    inside = {"seconds": 0.0}
    for name in ("predict", "decode"):
        plain = getattr(made, name)

        def timed(*given: object, plain: Callable = plain, **more: object) -> object:
            started = time.process_time()
            try:
                return plain(*given, **more)
            finally:
                inside["seconds"] += time.process_time() - started

        setattr(made, name, timed)
    yield inside


def once(curve: str, n: int) -> tuple[float, float]:
    """(our own seconds, all seconds) of a run."""
    made, method = job(curve, n)()
    seeds = list(range(len(made.prompts)))
    budget = Budget(reward_calls=n) if "rollouts" in curve else None
    with clock(made) as inside:
        started = time.process_time()
        steering.steer(made, reward=bright, method=method, seed=seeds, budget=budget)
        seconds = time.process_time() - started
    return seconds - inside["seconds"], seconds


def slope(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The exponent of a power law through the points."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(curve: str, sizes: tuple[int, ...]) -> dict:
    once(curve, sizes[0])
    runs = {n: [once(curve, n) for _ in range(REPEATS if n < 300 else 1)] for n in sizes}
    own = [min(r[0] for r in runs[n]) for n in sizes]
    total = [min(r[1] for r in runs[n]) for n in sizes]
    half = len(sizes) // 2
    return {
        "sizes": list(sizes),
        "own": own,
        "total": total,
        "exponent": slope(sizes, own),
        "exponent of the larger half": slope(sizes[half:], own[half:]),
    }


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    with one_thread():
        found = {curve: measure(curve, sizes) for curve, sizes in SIZES.items()}
    lines = [f"Our own CPU seconds on states of {DIMS} numbers, fastest of {REPEATS}"]
    for curve, row in found.items():
        points = ", ".join(f"{n}: {s:.3f}" for n, s in zip(row["sizes"], row["own"], strict=True))
        lines.append(
            f"{curve}: exponent {row['exponent']:.2f}, larger half "
            f"{row['exponent of the larger half']:.2f} ({points})"
        )
    return {"curves": found, "dims": DIMS, "table": "\n".join(lines)}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

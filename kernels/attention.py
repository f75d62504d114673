"""Which attention to use on a device: tried on numbers and on the clock before it is believed.

Every candidate is compared with plain attention in float32 on the same device. What raises, or
differs by more than rounding, is out, with its reason; of the rest the fastest is taken. xformers
imports on machines where none of its operators runs, so importing it proves nothing.
"""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("native", "flash", "efficient", "cudnn", "xformers", "math")
"""native is torch's own choice among flash, efficient, cudnn and math."""
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference from float32; CUDA's float32 products may run in TF32."""
WORTH = 0.95
"""torch's own choice is kept unless another takes less than this share of its time."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one candidate.

    Attributes:
        error: largest difference from float32; None where it did not run.
        seconds: median of a call; None where it was not timed.
        reason: why it is out; None where it may be used.
    """

    backend: str
    error: float | None = None
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The attention chosen for a device and a dtype, and how."""

    backend: str
    device: str
    dtype: str
    trials: tuple[Trial, ...]

    @property
    def line(self) -> str:
        """One line for a report."""
        parts = []
        for trial in self.trials:
            if trial.reason is not None:
                parts.append(f"{trial.backend} out ({trial.reason})")
            elif trial.seconds is not None:
                parts.append(f"{trial.backend} {1e3 * trial.seconds:.2f} ms")
        where = f"{self.device} {self.dtype}"
        return f"attention: {self.backend} on {where}; " + ", ".join(parts)


def choose(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, int]] = ((8, 64),),
    tokens: int = 256,
    prefer: str = "auto",
) -> Choice:
    """The fastest attention that gives right numbers.

    Args:
        shapes: (heads, size of a head) of the layers it is for; it must do all of them.
        tokens: length of the trial's sequences.
        prefer: "auto", or a backend that is taken if it gives right numbers; where it does not,
            one warning says why and the others are tried.

    Raises:
        ValueError: an unknown backend.
    """
    if prefer not in ("auto", *BACKENDS):
        raise ValueError(f"unknown attention {prefer!r}; known: auto, {', '.join(BACKENDS)}")
    device = torch.device(device)
    cases = [_case(device, dtype, heads, size, tokens) for heads, size in shapes]
    trials = []
    if prefer != "auto":
        trials.append(_try(prefer, cases, timed=False))
        if trials[0].reason is None:
            return _chosen(prefer, device, dtype, trials)
        warnings.warn(
            f"Attention {prefer!r} is not used on {device}: {trials[0].reason}. Another is.",
            stacklevel=2,
        )
    rest = [name for name in BACKENDS if name != prefer]
    trials += [_try(name, cases, timed=True) for name in rest]
    times = {t.backend: t.seconds for t in trials if t.reason is None and t.seconds is not None}
    if not times:  # nothing agrees with itself in float32: leave torch alone
        return _chosen("native", device, dtype, trials)
    best = min(times, key=lambda name: times[name])
    if "native" in times and times[best] > WORTH * times["native"]:
        best = "native"
    return _chosen(best, device, dtype, trials)


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [batch, heads, tokens, size] by one backend and no other."""
    if backend == "xformers":
        ops: Any = importlib.import_module("xformers.ops")
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return ops.memory_efficient_attention(q, k, v).transpose(1, 2)
    if backend == "native":
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel([SDPA[backend]]):
        return F.scaled_dot_product_attention(q, k, v)


def within(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with one of SDPA's backends first; masks that it cannot take go to the others."""
    order = [SDPA[backend], *(b for b in SDPA.values() if b is not SDPA[backend])]

    def called(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with sdpa_kernel(order, set_priority=True):
            return call(*args, **kwargs)

    return called


_Case = tuple[Tensor, Tensor, Tensor, Tensor]


def _case(device: torch.device, dtype: torch.dtype, heads: int, size: int, tokens: int) -> _Case:
    """q, k, v and what attention gives in float32; keys and queries of different length."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, tokens, size, generator=generator)
    k, v = (torch.randn(2, heads, tokens + 13, size, generator=generator) for _ in range(2))
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    scores = q.float() @ k.float().transpose(-1, -2) / size**0.5
    return q, k, v, scores.softmax(-1) @ v.float()


def _try(backend: str, cases: Sequence[_Case], *, timed: bool) -> Trial:
    worst = 0.0
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            for q, k, v, want in cases:
                got = attend(backend, q, k, v).float()
                worst = max(worst, float((got - want).abs().max()))
                if not bool(torch.isfinite(got).all()):
                    worst = float("inf")
            allowed = TOLERANCE.get(cases[0][0].dtype, 0.0)
            if worst > allowed:
                reason = f"differs from float32 by {worst:.2g}, allowed {allowed:.2g}"
                return Trial(backend=backend, error=worst, reason=reason)
            seconds = _clock(backend, cases) if timed else None
    except Exception as why:  # each backend refuses in its own words
        lines = str(why).strip().splitlines()
        reason = f"{type(why).__name__}: {lines[0].rstrip('.:') if lines else 'no message'}"
        return Trial(backend=backend, reason=reason[:120])
    return Trial(backend=backend, error=worst, seconds=seconds)


def _clock(backend: str, cases: Sequence[_Case], repeats: int = 5) -> float:
    device, found = cases[0][0].device, []
    for _ in range(repeats):
        started = time.perf_counter()
        for q, k, v, _ in cases:
            attend(backend, q, k, v)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _chosen(
    backend: str, device: torch.device, dtype: torch.dtype, trials: Sequence[Trial]
) -> Choice:
    name = str(dtype).removeprefix("torch.")
    return Choice(backend=backend, device=str(device), dtype=name, trials=tuple(trials))

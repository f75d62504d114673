"""Systematic resampling of many prompts at once, on the device that holds the weights.

Weights to ancestors is one kernel, the gather of each tensor of the state one more; the host waits
for none of them. That is why a prompt whose particles all have weight zero raises nothing here: it
keeps its particles, and ``alive`` says so when the host next looks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steering.kernels.support import ready

MOST = 4096
"""Particles of one prompt up to which its weights fit one program."""


class Resampled(NamedTuple):
    """Ancestors and what is left of the weights.

    Attributes:
        ancestors: [prompts, m] int64, each within its own prompt.
        log_w: [prompts] float64, of every child: the log mean weight of the parents.
        alive: [prompts] bool; False where no weight was finite and particles stay as they are.
    """

    ancestors: Tensor
    log_w: Tensor
    alive: Tensor


def systematic(log_w: Tensor, uniform: Tensor, m: int | None = None) -> Resampled:
    """Ancestors of m children (default: as many as parents); fused on CUDA, plain elsewhere.

    Args:
        log_w: [prompts, n] log weights, -inf allowed.
        uniform: [prompts] float64 in (0, 1), one number per prompt.

    Raises:
        ValueError: shapes that do not fit.
    """
    if log_w.ndim != 2 or uniform.shape != log_w.shape[:1] or not log_w.numel():
        raise ValueError(f"weights {tuple(log_w.shape)} and uniform {tuple(uniform.shape)}")
    m = log_w.shape[1] if m is None else m
    log_w, uniform = log_w.double().contiguous(), uniform.double().contiguous()
    fits = log_w.shape[1] <= MOST
    if log_w.is_cuda and fits and ready("resample", log_w, (torch.float64,), _trial, 1e-9):
        return launch(log_w, uniform, m)
    return systematic_plain(log_w, uniform, m)


def systematic_plain(log_w: Tensor, uniform: Tensor, m: int) -> Resampled:
    """The twin; like the kernel it never waits for the device."""
    n = log_w.shape[1]
    top = log_w.max(1).values
    alive = torch.isfinite(top)
    shifted = torch.where(alive[:, None], log_w - top[:, None], -math.inf)
    w = torch.exp(shifted)
    up_to = w.cumsum(1)
    total = torch.where(alive, up_to[:, -1], 1.0)
    k = torch.arange(m, device=log_w.device)
    points = (k.double() + uniform[:, None]) / m
    found = torch.searchsorted(up_to / total[:, None], points, right=True)
    place = torch.arange(n, device=log_w.device)
    last = torch.where(w > 0.0, place, 0).max(1).values
    ancestors = torch.where(alive[:, None], torch.minimum(found, last[:, None]), k % n)
    left = torch.where(alive, top + torch.log(total / n), top)
    return Resampled(ancestors, left, alive)


def gather(ancestors: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """The children [prompts, m, ...] of tensors [prompts, n, ...], one pass over each."""
    prompts, m = ancestors.shape
    found = []
    for value in state:
        n = value.shape[1]
        start = torch.arange(prompts, device=ancestors.device)[:, None] * n
        rows = (ancestors + start).flatten().to(value.device)
        taken = value.reshape(prompts * n, *value.shape[2:]).index_select(0, rows)
        found.append(taken.reshape(prompts, m, *value.shape[2:]))
    return tuple(found)


def resample(
    log_w: Tensor, uniform: Tensor, state: Mapping[str, Tensor], m: int | None = None
) -> tuple[Resampled, dict[str, Tensor]]:
    """Ancestors and the gathered state, tensors [prompts, n, ...] by name."""
    done = systematic(log_w, uniform, m)
    return done, dict(zip(state, gather(done.ancestors, *state.values()), strict=True))


def launch(log_w: Tensor, uniform: Tensor, m: int) -> Resampled:
    """Runs the kernel, whatever the device (the interpreter takes tensors on the CPU)."""
    from steering.kernels import resample_triton

    prompts, n = log_w.shape
    ancestors = torch.empty(prompts, m, dtype=torch.int64, device=log_w.device)
    left = torch.empty(prompts, dtype=torch.float64, device=log_w.device)
    alive = torch.empty(prompts, dtype=torch.int8, device=log_w.device)
    wide = max(16, 1 << (n - 1).bit_length())
    on = torch.cuda.device(log_w.device) if log_w.is_cuda else contextlib.nullcontext()
    with on:
        resample_triton.systematic[(prompts,)](
            log_w, uniform, ancestors, left, alive, n, m, N=wide, M=tile(wide)
        )
    return Resampled(ancestors, left, alive.bool())


def tile(wide: int) -> int:
    """Children handled at a time, so that the table of comparisons stays in registers."""
    return max(1, min(64, 2048 // wide))


def _trial(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between kernel and twin, with weights of zero among them."""
    generator = torch.Generator().manual_seed(0)
    log_w = 3.0 * torch.randn(5, 37, generator=generator, dtype=dtype)
    log_w[1, ::3], log_w[2], log_w[3, 4] = -math.inf, -math.inf, math.nan
    uniform = torch.rand(5, generator=generator, dtype=dtype)
    given = log_w.to(device), uniform.to(device), 29
    want, got = systematic_plain(*given), launch(*given)
    same = torch.equal(got.ancestors, want.ancestors) and torch.equal(got.alive, want.alive)
    lived = want.alive
    error = float((got.log_w - want.log_w)[lived].abs().max())
    return error if same else math.inf

"""The Triton kernel of :mod:`steering.kernels.resample`; imported only with Triton installed."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# ruff: noqa: ANN001, ANN201 - Triton's functions take what its compiler gives them

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def systematic(
    log_w_ptr, uniform_ptr, ancestor_ptr, left_ptr, alive_ptr, n, m,
    N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: the n weights of one prompt to its m ancestors."""
    prompt = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    inside = i < n
    log_w = tl.load(log_w_ptr + prompt * n + i, mask=inside, other=float("-inf"))
    top = tl.max(log_w, 0)
    broken = tl.sum((log_w != log_w).to(tl.int32), 0)
    alive = (broken == 0) & (top > float("-inf")) & (top < float("inf"))
    shifted = tl.where(alive & inside, log_w - tl.where(alive, top, 0.0), float("-inf"))
    w = tl.exp(shifted)
    up_to = tl.cumsum(w, 0)
    total = tl.max(up_to, 0)
    share = up_to / tl.where(alive, total, 1.0)
    last = tl.max(tl.where(w > 0.0, i, 0), 0)
    u = tl.load(uniform_ptr + prompt)
    for start in range(0, m, M):
        k = start + tl.arange(0, M)
        point = (k.to(tl.float64) + u) / m
        below = (share[:, None] <= point[None, :]) & inside[:, None]
        found = tl.minimum(tl.sum(below.to(tl.int32), 0), last)
        chosen = tl.where(alive, found, k % n)
        tl.store(ancestor_ptr + prompt * m + k, chosen.to(tl.int64), mask=k < m)
    mean = top + tl.log(tl.where(alive, total, 1.0) / n)
    tl.store(left_ptr + prompt, tl.where(alive, mean, top))
    tl.store(alive_ptr + prompt, alive.to(tl.int8))

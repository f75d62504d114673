"""The Triton kernels of :mod:`steering.kernels.resize`; imported only where Triton is installed.

Each pass sees its input as [outer, size_in, inner] and its output as [outer, size_out, inner]; for
the width inner is 1, for the height it is the width. One program makes BLOCK numbers of it.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# ruff: noqa: ANN001, ANN201 - Triton's functions take what its compiler gives them

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squeeze(
    in_ptr, out_ptr, mask_ptr, start_ptr, weight_ptr, total, taps, size_in, size_out, inner,
    FIRST: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PIL's pass, in its integers. FIRST rounds float input to 8 bits, LAST gives v / 255."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    column = at % inner
    line = at // inner
    place = line % size_out
    outer = line // size_out
    start = tl.load(start_ptr + place, mask=inside, other=0)
    base = (outer * size_in + start) * inner + column
    sum_ = tl.zeros([BLOCK], dtype=tl.int32)
    for k in range(taps):
        here = inside & (start + k < size_in)
        weight = tl.load(weight_ptr + place * taps + k, mask=here, other=0)
        if FIRST:
            value = tl.load(in_ptr + base + k * inner, mask=here, other=0.0).to(tl.float32)
            level = value * 255.0
            level = tl.minimum(tl.maximum(level, 0.0), 255.0)
            low = tl.floor(level)
            rest = level - low
            whole = low.to(tl.int32)
            # halves go to the even neighbour, as torch.round does
            up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
            pixel = whole + up.to(tl.int32)
        else:
            pixel = tl.load(in_ptr + base + k * inner, mask=here, other=0).to(tl.int32)
        sum_ += weight * pixel
    level = (sum_ + (1 << 21)) >> 22
    level = tl.minimum(tl.maximum(level, 0), 255)
    if LAST:
        tl.store(out_ptr + at, tl.div_rn(level.to(tl.float32), 255.0), mask=inside)
    else:
        tl.store(out_ptr + at, level.to(tl.uint8), mask=inside)
    if MASKED:
        # as the twin: up to 2^-11 of a level above 255 still counts as inside
        passed = (sum_ >= 0) & (sum_ < (255 << 22) + (1 << 11))
        tl.store(mask_ptr + at, passed.to(tl.uint8), mask=inside)


@triton.jit
def spread(
    grad_ptr, mask_ptr, out_ptr, start_ptr, weight_ptr, total, taps, size_in, size_out, inner,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The transposed pass on gradients, where the mask let the value through."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    column = at % inner
    line = at // inner
    place = line % size_out
    outer = line // size_out
    start = tl.load(start_ptr + place, mask=inside, other=0)
    base = (outer * size_in + start) * inner + column
    sum_ = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(taps):
        here = inside & (start + k < size_in)
        weight = tl.load(weight_ptr + place * taps + k, mask=here, other=0.0)
        grad = tl.load(grad_ptr + base + k * inner, mask=here, other=0.0)
        passed = tl.load(mask_ptr + base + k * inner, mask=here, other=0)
        sum_ += tl.where(passed != 0, weight * grad, 0.0)
    tl.store(out_ptr + at, sum_, mask=inside)

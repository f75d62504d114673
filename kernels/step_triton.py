"""The Triton kernel of :mod:`steering.kernels.step`; imported only where Triton is installed.

All arithmetic is float32 whatever the tensors hold. The words of Philox are bit for bit those of
the twin; the normal numbers differ from it by float32 rounding, because the twin's Box-Muller runs
in float64. Logarithm and sine are written out, since the GPU's fast ones lose digits near 1 and
for large angles: here the angle is reduced in integers, without error.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# ruff: noqa: ANN001, ANN201, ANN202 - Triton's functions take what its compiler gives them

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _radius(w):
    """sqrt(-2 ln u) of u = (w + 1/2) / 2^32."""
    scale: tl.constexpr = 2.3283064365386963e-10
    u = (w.to(tl.float32) + 0.5) * scale
    # Above one half ln u is a series in 1 - u, which the complement of w holds exactly.
    m = ((w ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * scale
    s = m / (2.0 - m)
    q = s * s
    series = 1.0 / 17.0
    series = series * q + 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    series = series * q + 1.0
    minus_log = tl.where(u < 0.5, -tl.log(u), 2.0 * s * series)
    return tl.sqrt(2.0 * minus_log)


@triton.jit
def _cos_sin(w):
    """cos and sin of 2 pi (w + 1/2) / 2^32."""
    turn = (w + 0x20000000) >> 30  # the nearest quarter
    rest = (w - (turn << 30)).to(tl.int32, bitcast=True)
    a = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09
    b = a * a
    sine = b * 2.7557319e-06 - 1.9841270e-04
    sine = sine * b + 8.3333333e-03
    sine = sine * b - 1.6666667e-01
    sine = sine * b * a + a
    cosine = b * -2.7557319e-07 + 2.4801587e-05
    cosine = cosine * b - 1.3888889e-03
    cosine = cosine * b + 4.1666667e-02
    cosine = cosine * b - 0.5
    cosine = cosine * b + 1.0
    odd = (turn & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where((turn == 1) | (turn == 2), -cos, cos)
    return cos, tl.where(turn >= 2, -sin, sin)


@triton.jit
def normals(block, low, high, k0, k1):
    """Four normal numbers per block index, as NoiseKey orders them."""
    zero = block ^ block
    w0, w1, w2, w3 = philox(block, zero + low, zero, zero + high, k0, k1)
    r0 = _radius(w0)
    c0, s0 = _cos_sin(w1)
    r1 = _radius(w2)
    c1, s1 = _cos_sin(w3)
    even = tl.interleave(r0 * c0, r1 * c1)
    odd = tl.interleave(r0 * s0, r1 * s1)
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["k0", "k1", "first"])
def step(
    x_ptr, a_ptr, b_ptr, next_ptr, x0_ptr, eps_ptr, square_ptr, table_ptr, slot_ptr,
    x_stride, a_stride, b_stride, width, k0, k1, first,
    guidance, read_x0_x, read_x0_out, read_eps_x, read_eps_out, move_x, move_x0, move_eps, std,
    RAW: tl.constexpr, GUIDED: tl.constexpr, USE_X: tl.constexpr, RANDOM: tl.constexpr,
    PER_ROW: tl.constexpr, LISTED: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK numbers of one row.

    RAW: a is the network's output (b the one without prompt, if GUIDED), else a, b are x0, eps.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    if PER_ROW:
        read_x0_x = tl.load(table_ptr + row * 8)
        read_x0_out = tl.load(table_ptr + row * 8 + 1)
        read_eps_x = tl.load(table_ptr + row * 8 + 2)
        read_eps_out = tl.load(table_ptr + row * 8 + 3)
        move_x = tl.load(table_ptr + row * 8 + 4)
        move_x0 = tl.load(table_ptr + row * 8 + 5)
        move_eps = tl.load(table_ptr + row * 8 + 6)
        std = tl.load(table_ptr + row * 8 + 7)
    a = tl.load(a_ptr + row * a_stride + at, mask=inside, other=0.0).to(tl.float32)
    if RAW:
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        out = a
        if GUIDED:
            b = tl.load(b_ptr + row * b_stride + at, mask=inside, other=0.0).to(tl.float32)
            out = b + guidance * (a - b)
        x0 = read_x0_x * x + read_x0_out * out
        eps = read_eps_x * x + read_eps_out * out
        tl.store(x0_ptr + row * width + at, x0, mask=inside)
        tl.store(eps_ptr + row * width + at, eps, mask=inside)
        moved = move_x0 * x0 + move_eps * eps
        if USE_X:
            moved += move_x * x
    else:
        b = tl.load(b_ptr + row * b_stride + at, mask=inside, other=0.0).to(tl.float32)
        moved = move_x0 * a + move_eps * b
        if USE_X:
            x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
            moved += move_x * x
    if RANDOM:
        if LISTED:
            slot = tl.load(slot_ptr + row)
        else:
            slot = row + first
        low = (slot & 0xFFFFFFFF).to(tl.uint32)
        high = ((slot >> 32) & 0xFFFFFFFF).to(tl.uint32)
        block = (part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        key0 = k0.to(tl.uint32, bitcast=True)
        key1 = k1.to(tl.uint32, bitcast=True)
        z = normals(block, low, high, key0, key1)
        moved += std * z
        if SQUARE:
            total = tl.sum(tl.where(inside, z * z, 0.0), 0)
            tl.store(square_ptr + row * tl.num_programs(1) + part, total)
    tl.store(next_ptr + row * width + at, moved.to(next_ptr.dtype.element_ty), mask=inside)

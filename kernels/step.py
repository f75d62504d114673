"""One fused pass from the network's output to the next state.

    out = uncond + guidance (cond - uncond)
    x0, eps = a linear reading of (x, out)
    x_u = move.x x + move.x0 x0 + move.eps eps + move.std z

Every first-order sampler is of this form: the eta-kernel has move.x = 0, Euler-Maruyama
move.x = 1. In plain torch it makes a dozen passes over the state and stores the noise; the kernel
makes one and draws the noise in registers. Where the kernel cannot run its twin does the same.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from steering.kernels.philox import MASK, Stream
from steering.kernels.support import ready

Number = float | Tensor
"""One number for all rows, or one per row [n]."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024
TOLERANCE = 2e-5


class Move(NamedTuple):
    """x_u = x x_t + x0 x0_hat + eps eps_hat + std z."""

    x: Number
    x0: Number
    eps: Number
    std: Number

    @property
    def random(self) -> bool:
        """Whether noise is added anywhere."""
        return isinstance(self.std, Tensor) or self.std > 0.0


class Reading(NamedTuple):
    """x0 = x0_x x + x0_out out, eps = eps_x x + eps_out out."""

    x0_x: Number
    x0_out: Number
    eps_x: Number
    eps_out: Number


class Stepped(NamedTuple):
    """What one pass gives.

    Attributes:
        x: the next state [n, *event], in the dtype of the state before.
        x0, eps: the prediction [n, *event], float32 (as given, where it was given).
        log_density: [n] float64, of ``x`` under its own Gaussian; None unless asked for.
    """

    x: Tensor
    x0: Tensor
    eps: Tensor
    log_density: Tensor | None


def move(
    x: Tensor,
    x0: Tensor,
    eps: Tensor,
    how: Move,
    noise: Stream | None,
    *,
    log_density: bool = False,
) -> Stepped:
    """The next state from a prediction [n, *event]; fused on CUDA, plain elsewhere.

    Raises:
        ValueError: shapes that differ, noise that is missing, or a density without noise.
    """
    _check(x, (x0, eps), how, noise, log_density)
    if x.is_cuda and ready("step", x, DTYPES, _trial, TOLERANCE):
        return launch(x, x0, eps, None, 1.0, None, how, noise, log_density)
    return _finish(x, x0, eps, how, noise, log_density)


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    reading: Reading,
    how: Move,
    noise: Stream | None,
    *,
    log_density: bool = False,
) -> Stepped:
    """Guidance, reading and move in one pass; fused on CUDA, plain elsewhere.

    Args:
        cond, uncond: the network's outputs [n, *event], any floating dtype; None where it was
            not asked without prompt.

    Raises:
        ValueError: shapes that differ, noise that is missing, or a density without noise.
    """
    outs = (cond,) if uncond is None else (cond, uncond)
    _check(x, outs, how, noise, log_density)
    if x.is_cuda and ready("step", x, DTYPES, _trial, TOLERANCE):
        return launch(x, cond, uncond, uncond, guidance, reading, how, noise, log_density)
    return guided_step_plain(x, cond, uncond, guidance, reading, how, noise, log_density)


def guided_step_plain(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    reading: Reading,
    how: Move,
    noise: Stream | None,
    log_density: bool = False,
) -> Stepped:
    """The twin: the same formulas, one torch operation each, in float32."""
    out, wide = cond.float(), x.float()
    if uncond is not None:
        out = uncond.float() + guidance * (out - uncond.float())
    a, b, c, d = (_column(v, wide) for v in reading)
    return _finish(x, a * wide + b * out, c * wide + d * out, how, noise, log_density)


def _finish(
    x: Tensor, x0: Tensor, eps: Tensor, how: Move, noise: Stream | None, log_density: bool
) -> Stepped:
    wide = x0 if x0.dtype == torch.float64 else x0.float()
    moved = _column(how.x0, wide) * wide + _column(how.eps, wide) * eps.to(wide.dtype)
    if isinstance(how.x, Tensor) or how.x != 0.0:
        moved = moved + _column(how.x, wide) * x.to(wide.dtype)
    square = None
    if how.random:
        assert noise is not None
        z = noise.normal(math.prod(x.shape[1:]), x.device)
        moved = moved + _column(how.std, wide) * z.reshape(x.shape).to(wide.dtype)
        square = z.double().square().sum(1) if log_density else None
    return Stepped(moved.to(x.dtype), x0, eps, _density(square, how, x))


def launch(
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    uncond: Tensor | None,
    guidance: float,
    reading: Reading | None,
    how: Move,
    noise: Stream | None,
    log_density: bool = False,
) -> Stepped:
    """Runs the kernel, whatever the device (the interpreter takes tensors on the CPU).

    Args:
        a, b: x0 and eps without a ``reading``, else the network's output(s).
    """
    from steering.kernels import step_triton

    n, width = len(x), math.prod(x.shape[1:])
    raw = reading is not None
    x, a = _rows(x), _rows(a)
    b = a if b is None else _rows(b)
    x0, eps = (torch.empty(x.shape, device=x.device) for _ in range(2)) if raw else (a, b)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = -(-width // BLOCK)
    square = torch.empty(n, parts, device=x.device) if log_density else out
    numbers = [*(reading or (0.0,) * 4), *how]
    table, scalars = out, numbers
    per_row = any(isinstance(v, Tensor) for v in numbers)
    if per_row:
        columns = [torch.as_tensor(v, device=x.device).float().expand(n) for v in numbers]
        table, scalars = torch.stack(columns, 1).contiguous(), [0.0] * 8
    first, listed, slots = 0, False, out
    if noise is not None:
        first, listed = noise.slots[0] if len(noise.slots) else 0, not _following(noise)
        if listed:
            slots = torch.tensor(list(noise.slots), dtype=torch.int64, device=x.device)
    k0, k1 = (_signed(k) for k in (0, 0)) if noise is None else _key(noise)
    on = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on:
        step_triton.step[(n, parts)](
            x, a, b, out, x0, eps, square, table, slots,
            _stride(x), _stride(a), _stride(b), width, k0, k1, first,
            float(guidance), *scalars,
            RAW=raw, GUIDED=uncond is not None, RANDOM=how.random, PER_ROW=per_row,
            USE_X=isinstance(how.x, Tensor) or how.x != 0.0,
            LISTED=listed, SQUARE=log_density, BLOCK=BLOCK,
        )  # fmt: skip
    total = square.double().sum(1) if log_density else None
    return Stepped(out, x0, eps, _density(total, how, x))


def _trial(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between kernel and twin on odd sizes, all options on."""
    generator = torch.Generator().manual_seed(0)
    x, cond, uncond = (
        torch.randn(3, 5, 421, generator=generator).to(device, dtype) for _ in range(3)
    )
    rows = torch.tensor([0.3, 0.5, 0.7], device=device)
    reading, how = Reading(1.0, -rows, 1.0, 1.0 - rows), Move(0.1, 0.6, 0.2, 0.3)
    worst = 0.0
    for noise in (Stream(2**63 + 12345, range(2**33, 2**33 + 3)), Stream(7, [5, 1, 2**40])):
        given = (x, cond, uncond, 4.0, reading, how, noise, True)
        want = guided_step_plain(*given)
        got = launch(x, cond, uncond, uncond, 4.0, reading, how, noise, True)
        # The state is rounded to its dtype; what is kept in float32 shows any mistake.
        unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        worst = max(worst, float((got.x.float() - want.x.float()).abs().max()) / unit)
        worst = max(worst, float((got.x0 - want.x0).abs().max()))
        assert got.log_density is not None
        assert want.log_density is not None
        worst = max(worst, float((got.log_density - want.log_density).abs().max()) / 2105)
    return worst


def _check(
    x: Tensor, others: tuple[Tensor, ...], how: Move, noise: Stream | None, log_density: bool
) -> None:
    if any(o.shape != x.shape for o in others):
        raise ValueError(f"state {tuple(x.shape)} and {[tuple(o.shape) for o in others]} differ")
    if how.random and (noise is None or len(noise.slots) != len(x)):
        raise ValueError(f"a random step of {len(x)} rows needs noise for as many slots")
    if log_density and not (how.random and bool(torch.as_tensor(how.std > 0).all())):
        raise ValueError("a deterministic step has no density")


def _density(square: Tensor | None, how: Move, x: Tensor) -> Tensor | None:
    if square is None:
        return None
    std = torch.as_tensor(how.std, dtype=torch.float64, device=x.device)
    return -0.5 * square - math.prod(x.shape[1:]) * (std.log() + 0.5 * math.log(2 * math.pi))


def _column(value: Number, like: Tensor) -> Number:
    if not isinstance(value, Tensor):
        return value
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _rows(x: Tensor) -> Tensor:
    """Rows may lie anywhere, the numbers of a row must follow each other."""
    return x if len(x) == 0 or x[0].is_contiguous() else x.contiguous()


def _stride(x: Tensor) -> int:
    return x.stride(0) if len(x) > 1 else math.prod(x.shape[1:])


def _following(noise: Stream) -> bool:
    return isinstance(noise.slots, range) and noise.slots.step == 1


def _key(noise: Stream) -> tuple[int, int]:
    return _signed(noise.key & MASK), _signed(noise.key >> 32)


def _signed(word: int) -> int:
    """32 bits as a signed number, so that the kernel is compiled for one type of argument."""
    return word - 2**32 if word >= 2**31 else word

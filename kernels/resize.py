"""PIL's resize, exact to 8 bits: two passes of a banded matrix, rounded in between.

PIL keeps 22 bits of each weight and adds up in integers. The Triton kernel does just that. The
twin does it with float32 matrix products that make no rounding error: each weight is split into
two parts of 11 bits, so that every partial sum is a whole number below 2^24. A weight matrix has
few entries that are not zero, so columns go in groups, each with the rows it needs.

Rounding passes gradients straight through; values that PIL clamps pass none.
"""

# ruff: noqa: ANN401 - torch's autograd contexts have no type

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.kernels.support import ready

GROUP = 32
BLOCK = 512
MOST_TAPS = 32
"""Weights per output up to which the twin's sums are exact: 32 * 255 * 2^11 < 2^24."""


class Band(NamedTuple):
    """Columns first..last of a weight matrix and the rows top..bottom they need."""

    top: int
    bottom: int
    first: int
    last: int
    high: Tensor
    low: Tensor
    whole: Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """The weights of one pass.

    Attributes:
        size_in, size_out: pixels before and after.
        bands: for the twin.
        start, weights: [out] first input and [out, taps] weights times 2^22, int32.
        back_start, back_weights: the same of the transposed matrix, float32 weights.
    """

    size_in: int
    size_out: int
    bands: tuple[Band, ...]
    start: Tensor
    weights: Tensor
    back_start: Tensor
    back_weights: Tensor

    @property
    def exact(self) -> bool:
        """Whether the twin's sums are exact."""
        return self.weights.shape[1] <= MOST_TAPS


def axis(matrix: Tensor, device: torch.device | str = "cpu") -> Axis:
    """The tables of a float64 weight matrix [in, out] whose entries have 22 bits."""
    whole = torch.round(matrix.double() * 2**22)
    bands = []
    for first in range(0, whole.shape[1], GROUP):
        part = whole[:, first : first + GROUP]
        rows = part.abs().sum(1).nonzero().flatten()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        part = part[top:bottom]
        high = torch.floor(part / 2**11)
        # Scaled by powers of two, which are exact: sums come out in units of 1 and of 2^-11.
        parts = (high / 2**11, (part - high * 2**11) / 2**11, part / 2**22)
        last = first + part.shape[1]
        bands.append(Band(top, bottom, first, last, *(v.float().to(device) for v in parts)))
    start, weights = _table(whole)
    back_start, back = _table(whole.T)
    return Axis(
        whole.shape[0], whole.shape[1], tuple(bands),
        start.to(device), weights.to(torch.int32).contiguous().to(device),
        back_start.to(device), (back / 2**22).float().contiguous().to(device),
    )  # fmt: skip


def _table(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """First nonzero row of each column, and the column from there on, as wide as any needs."""
    used = matrix != 0
    start = used.int().argmax(0)
    stop = matrix.shape[0] - used.flip(0).int().argmax(0)
    stop = torch.where(used.any(0), stop, start + 1)
    taps = int((stop - start).max())
    rows = start[:, None] + torch.arange(taps)
    inside = rows < stop[:, None]
    weights = matrix.T.gather(1, rows.clamp_max(matrix.shape[0] - 1)) * inside
    return start.to(torch.int32), weights


def resize(images: Tensor, across: Axis | None, down: Axis | None) -> Tensor:
    """Images [..., H, W] in [0, 1], float32, resized along the width, then along the height.

    Fused on CUDA, plain elsewhere; differentiable once.

    Args:
        across, down: the passes; None leaves a side as it is.
    """
    return _Resize.apply(images, across, down)


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, across: Axis | None, down: Axis | None) -> Tensor:
        masked = bool(ctx.needs_input_grad[0])
        kernel = images.is_cuda and ready("resize", images.float(), (torch.float32,), _trial, 0.0)
        run = launch if kernel else resize_plain
        out, masks = run(images, across, down, masked)
        ctx.kernel, ctx.axes, ctx.dtype = kernel, (across, down), images.dtype
        ctx.save_for_backward(*masks)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        run = launch_back if ctx.kernel else resize_back_plain
        return run(grad, *ctx.axes, ctx.saved_tensors).to(ctx.dtype), None, None


def resize_plain(
    images: Tensor, across: Axis | None, down: Axis | None, masked: bool
) -> tuple[Tensor, list[Tensor]]:
    """The twin: (resized images, what each clamp let through: input, width, height).

    One picture at a time through buffers that stay in cache: fresh memory for a whole batch costs
    as much as the arithmetic.
    """
    pictures = images.reshape(-1, *images.shape[-2:])
    stages, (height, width) = [], images.shape[-2:]
    for way, tall in ((across, False), (down, True)):
        if way is not None:
            height, width = (way.size_out, width) if tall else (height, way.size_out)
            made, low = (images.new_empty(height, width, dtype=torch.float32) for _ in range(2))
            count = len(pictures) if masked else 0
            passed = torch.empty(count, height, width, dtype=torch.bool, device=images.device)
            stages.append((way, tall, made, low, passed))
    level = torch.empty(images.shape[-2:], device=images.device)
    out = torch.empty(len(pictures), height, width, device=images.device)
    for k, picture in enumerate(pictures):
        x = torch.mul(picture.float(), 255.0, out=level).round_().clamp_(0.0, 255.0)
        for way, tall, made, low, passed in stages:
            x = _pass(x, way, tall, made, low, passed[k] if masked else None)
        torch.div(x, 255.0, out=out[k])
    masks = [(images >= 0) & (images <= 1), *(stage[4] for stage in stages)] if masked else []
    return out.reshape(*images.shape[:-2], height, width), masks


def _pass(
    x: Tensor, way: Axis, tall: bool, made: Tensor, low: Tensor, passed: Tensor | None
) -> Tensor:
    """One pass over whole numbers [H, W], into ``made``."""
    for band in way.bands:
        rows, columns = slice(band.top, band.bottom), slice(band.first, band.last)
        if tall:
            torch.mm(band.high.T, x[rows], out=made[columns])
            torch.mm(band.low.T, x[rows], out=low[columns])
        else:
            torch.mm(x[:, rows], band.high, out=made[:, columns])
            torch.mm(x[:, rows], band.low, out=low[:, columns])
    made.add_(low.floor_().add_(1024.0), alpha=2.0**-11)  # 1024 * 2^-11: half a level
    if passed is not None:
        torch.logical_and(made >= 0.5, made <= 255.5, out=passed)
    return made.floor_().clamp_(0.0, 255.0)


def resize_back_plain(
    grad: Tensor, across: Axis | None, down: Axis | None, masks: tuple[Tensor, ...]
) -> Tensor:
    """The twin of the way back."""
    shape, left = grad.shape[:-2], list(masks)
    g = grad.float().reshape(-1, *grad.shape[-2:])
    if down is not None:
        g = g * left.pop()
        out = g.new_zeros(len(g), down.size_in, g.shape[2])
        for band in down.bands:
            out[:, band.top : band.bottom] += band.whole @ g[:, band.first : band.last]
        g = out
    if across is not None:
        g = g * left.pop()
        out = g.new_zeros(len(g), g.shape[1], across.size_in)
        for band in across.bands:
            out[:, :, band.top : band.bottom] += g[:, :, band.first : band.last] @ band.whole.T
        g = out
    return g.reshape(*shape, *g.shape[-2:]) * left.pop()


def launch(
    images: Tensor, across: Axis | None, down: Axis | None, masked: bool
) -> tuple[Tensor, list[Tensor]]:
    """Runs the kernel, whatever the device (the interpreter takes tensors on the CPU)."""
    x = images.contiguous()
    shape, masks = x.shape[:-2], [(x >= 0) & (x <= 1)] if masked else []
    passes = [(way, tall) for way, tall in ((across, False), (down, True)) if way is not None]
    if not passes:
        return _eight_bit(x), masks
    for i, (way, tall) in enumerate(passes):
        x, mask = _launch(x, way, tall, first=i == 0, last=i == len(passes) - 1, masked=masked)
        masks += [mask] if masked else []
    return x.reshape(*shape, *x.shape[-2:]), masks


def _launch(
    x: Tensor, way: Axis, tall: bool, *, first: bool, last: bool, masked: bool
) -> tuple[Tensor, Tensor]:
    from steering.kernels import resize_triton

    outer, size = _sizes(x, way.size_out, tall)
    out = torch.empty(size, dtype=torch.float32 if last else torch.uint8, device=x.device)
    mask = torch.empty(size if masked else (1,), dtype=torch.uint8, device=x.device)
    with _on(x):
        resize_triton.squeeze[(-(-out.numel() // BLOCK),)](
            x, out, mask, way.start, way.weights, out.numel(), way.weights.shape[1],
            way.size_in, way.size_out, out.numel() // (outer * way.size_out),
            FIRST=first, LAST=last, MASKED=masked, BLOCK=BLOCK,
        )  # fmt: skip
    return out, mask


def launch_back(
    grad: Tensor, across: Axis | None, down: Axis | None, masks: tuple[Tensor, ...]
) -> Tensor:
    """Runs the kernel of the way back."""
    from steering.kernels import resize_triton

    g, left, shape = grad.float().contiguous(), list(masks), grad.shape[:-2]
    for way, tall in ((down, True), (across, False)):
        if way is None:
            continue
        outer, size = _sizes(g, way.size_in, tall)
        out = torch.empty(size, device=g.device)
        with _on(g):
            resize_triton.spread[(-(-out.numel() // BLOCK),)](
                g, left.pop(), out, way.back_start, way.back_weights, out.numel(),
                way.back_weights.shape[1], way.size_out, way.size_in,
                out.numel() // (outer * way.size_in), BLOCK=BLOCK,
            )  # fmt: skip
        g = out
    return g.reshape(*shape, *g.shape[-2:]) * left.pop()


def _sizes(x: Tensor, size: int, tall: bool) -> tuple[int, tuple[int, ...]]:
    """(how many lines or pictures the pass treats alike, shape of its result)."""
    height, width = x.shape[-2:]
    pictures = x.numel() // (height * width)
    if tall:
        return pictures, (pictures, size, width)
    return pictures * height, (pictures, height, size)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _eight_bit(x: Tensor) -> Tensor:
    return (x.float() * 255.0).round_().clamp_(0.0, 255.0).div_(255.0)


def _trial(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between kernel and twin, forwards and back, on odd sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 13, 37, generator=generator).to(device, dtype) * 1.2 - 0.1
    ways = []
    for size, out in ((37, 11), (13, 20)):
        matrix = torch.randn(size, out, generator=generator, dtype=torch.float64).softmax(0)
        matrix = matrix * (torch.arange(size)[:, None] * out // size - torch.arange(out) < 3)
        ways.append(axis(torch.round(matrix * 2**22) / 2**22, device))
    across, down = ways
    want, masks = resize_plain(x, across, down, True)
    got, seen = launch(x, across, down, True)
    worst = float((got - want).abs().max())
    worst += float(sum((a.bool() ^ b).sum() for a, b in zip(seen, masks, strict=True)))
    grad = torch.randn(want.shape, generator=generator).to(device)
    back = launch_back(grad, across, down, tuple(seen))
    error = float((back - resize_back_plain(grad, across, down, tuple(masks))).abs().max())
    return worst + (error if error > 1e-4 else 0.0)

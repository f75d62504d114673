"""Claim: under gradients on CPUs, attention of short sequences in bfloat16 is faster by torch's
plain formula than by its fused kernel, and from some two hundred tokens on slower. Both passes,
CPU time of the process, one thread, taking turns."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.meters import one_thread, spread, turns
from steering.kernels.short_attention import SHORT

REPEATS, HEADS, SIZE = 7, 8, 64
TOKENS = (16, 44, 64, 96, 128, 192, 256, 512)


def both_passes(backend: SDPBackend, inputs: list[Tensor]) -> None:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*inputs)
    torch.autograd.grad(out.float().square().sum(), inputs)


def measure(tokens: int, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(tokens)
    rows = max(1, 2048 // tokens)
    inputs = [
        torch.randn(rows, tokens, HEADS, SIZE, generator=generator)
        .to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]  # fmt: skip
    ways = {
        "fused": partial(both_passes, SDPBackend.FLASH_ATTENTION, inputs),
        "formula": partial(both_passes, SDPBackend.MATH, inputs),
    }
    took = turns(ways, REPEATS)
    return spread([a / b for a, b in zip(took["fused"], took["formula"], strict=True)])


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    with one_thread():
        rows = {
            str(dtype).removeprefix("torch."): {n: measure(n, dtype) for n in TOKENS}
            for dtype in (torch.bfloat16, torch.float32)
        }
    lines = [
        f"fused kernel / plain formula, both passes (the rule takes the formula up to {SHORT})"
    ]
    lines += [
        f"{name:9s} " + ", ".join(f"{n} tokens {r['median']:.2f}x" for n, r in found.items())
        for name, found in rows.items()
    ]
    return {"rows": rows, "short": SHORT, "table": "\n".join(lines)}

"""Philox4x32-10 in plain torch: the twin of the generator inside the kernels.

Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3". The counter of a block of
four words is (block, slot low, kind, slot high); kind 0 is for normal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(NamedTuple):
    """Normal numbers by name: one row per slot.

    Attributes:
        key: 64 bits.
        slots: of the rows; a range where they follow each other.
    """

    key: int
    slots: Sequence[int]

    def words(self, blocks: int, device: torch.device | str, kind: int = 0) -> Tensor:
        """Philox output as int64 in [0, 2**32): [n, blocks, 4]."""
        block = torch.arange(blocks, device=device).expand(len(self.slots), blocks)
        low = torch.tensor([k & MASK for k in self.slots], device=device)
        high = torch.tensor([k >> 32 & MASK for k in self.slots], device=device)
        c1, c3 = (c[:, None].expand_as(block) for c in (low, high))
        c2 = torch.full_like(block, kind)
        return torch.stack(philox(block, c1, c2, c3, self.key & MASK, self.key >> 32), -1)

    def normal(self, width: int, device: torch.device | str) -> Tensor:
        """Standard normal numbers, float32 [n, width]."""
        return box_muller(self.words(-(-width // 4), device), width)


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on counters as int64 in [0, 2**32), any device."""
    # int64 products wrap modulo 2**64, which leaves both 32-bit halves of the product intact.
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & MASK) ^ c1 ^ k0,
            p1 & MASK,
            (p0 >> 32 & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def box_muller(words: Tensor, width: int) -> Tensor:
    """Normal numbers from words [n, blocks, 4], in float64, rounded once: float32 [n, width]."""
    return from_uniform((words.double() + 0.5) * 2.0**-32, width)


def from_uniform(u: Tensor, width: int) -> Tensor:
    """Normal numbers from uniform ones [n, blocks, 4], float64."""
    radius = torch.log(u[..., 0::2]).mul_(-2.0).sqrt_()
    angle = u[..., 1::2] * (2.0 * math.pi)
    pair = torch.empty(*angle.shape, 2, dtype=u.dtype, device=u.device)
    torch.mul(radius, torch.cos(angle), out=pair[..., 0])
    torch.mul(radius, angle.sin_(), out=pair[..., 1])
    return pair.flatten(1)[:, :width].float()

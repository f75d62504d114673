"""Rows of a network call that ask the same question: one is asked, the answer serves all.

Copies meet in one call where a tree starts several rollouts from one node, and after resampling
under a deterministic step. Most calls have none, so what tells most rows apart must be cheap: a
few numbers of each. Only rows that agree in these are compared whole, bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from steering.paths import Times

_PROBES = 4


def distinct(x: Tensor, t: Times, conds: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """The rows to ask, and for every row which of these answers it; None where all rows differ.

    Args:
        x: states [n, *event]; two rows are one question where their bits, times and conds agree.
        t: one level, or one per row.
        conds: the prompt of each row.
    """
    n = x.shape[0]
    if n < 2:
        return None
    flat = x.detach().reshape(n, -1)
    width = flat.shape[1]
    probes = flat[:, :: max(1, -(-width // _PROBES))].tolist()
    levels = t if isinstance(t, Sequence) else [None] * n
    marks = [(*row, level, cond) for row, level, cond in zip(probes, levels, conds, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for k, mark in enumerate(marks):
        groups.setdefault(mark, []).append(k)
    if len(groups) == n:
        return None
    return _compared(flat, list(groups.values()))


def _compared(flat: Tensor, groups: list[list[int]]) -> tuple[list[int], list[int]] | None:
    """The same, from groups of rows that may be equal."""
    first = list(range(flat.shape[0]))
    for group in groups:
        seen: dict[bytes, int] = {}
        for k in group if len(group) > 1 else ():
            first[k] = seen.setdefault(_bits(flat[k]), k)
    asked = sorted(set(first))
    if len(asked) == len(first):
        return None
    place = {k: i for i, k in enumerate(asked)}
    return asked, [place[k] for k in first]


def _bits(row: Tensor) -> bytes:
    return row.cpu().contiguous().view(torch.uint8).numpy().tobytes()

"""Attention of short sequences under gradients on CPUs.

torch's fused attention for CPUs has a slow backward pass in half precision: for 44 tokens both
passes together take 2 to 4.5 times as long as torch's plain formula, and err more. From some two
hundred tokens on it is the faster one and, unlike the formula, keeps no scores. Which of the two
serves is a rule of shapes and not of the clock, so that a run repeats bit for bit.
``python -m benchmarks.run attention`` measures both.
"""

# ruff: noqa: ANN401 - what torch functions take and give has no common type

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

SHORT = 96
"""Most tokens, of queries and of keys, of a short sequence."""


class ShortAttention:
    """The attention of one network's calls that keep a graph.

    Contexts belong into a turn (steering.turns): which kernels may serve is set for the process.
    The first call is watched, which makes it some milliseconds slower. Where all of its sequences
    were short, later calls take the plain formula from the start.

    Attributes:
        helps: whether there is anything to gain on this device, in this dtype.
        longest: most tokens of a sequence in the first call; None before it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.helps = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
        self.longest: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context for a call that keeps a graph."""
        if not self.helps or (self.longest or 0) > SHORT:
            yield
        elif self.longest is not None:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            with _Watch() as watch:
                yield
            self.longest = watch.longest


class _Watch(TorchFunctionMode):
    """Notes the longest sequence; the short ones take the plain formula at once, so that the
    first call gives the same numbers as later ones."""

    longest = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(func, *args, **(kwargs or {}))

    def _attend(
        self, func: Callable[..., Any], query: Any, key: Any, *args: Any, **kwargs: Any
    ) -> Any:
        tokens = max(query.shape[-2], key.shape[-2])
        self.longest = max(self.longest, tokens)
        if tokens > SHORT:
            return func(query, key, *args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            return func(query, key, *args, **kwargs)

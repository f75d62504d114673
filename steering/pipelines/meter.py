"""Counts network rows where they are spent: on the denoising networks themselves."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steering.errors import PipelineError
from steering.turns import TURN, in_turn

_DENOISER = re.compile(r"(transformer|unet|prior|dit|denoiser)(_\d+)?$")


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that denoise (transformer, transformer_2, unet, ...)."""
    found = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and _DENOISER.match(name)
    }
    if not found:
        raise PipelineError(
            f"{type(pipe).__name__} has no component named transformer or unet, so network "
            f"evaluations cannot be counted. Components: {', '.join(pipe.components)}."
        )
    return found


def count_rows(args: tuple, kwargs: dict[str, Any]) -> int:
    """Batch rows of one network call: the length of its state argument."""
    for name in ("hidden_states", "sample", "x", "latents"):
        if name in kwargs:
            return len(kwargs[name])
    return next((len(v) for v in args if isinstance(v, (Tensor, list)) and len(v)), 1)


class Meter:
    """Row counter on a pipeline's denoisers; counts only while ``on``.

    Attributes:
        rows: network rows so far.
        probes: rows spent on finding out how the pipeline behaves.
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.rows = self.probes = 0
        self.closed = False
        self._counter: str | None = None
        self._thread: int | None = None
        hook: Any = torch.compiler.disable(self._count)
        with TURN:  # a hook is registered in two steps, which a call must not fall between
            self._hooks = [
                net.register_forward_pre_hook(hook, with_kwargs=True) for net in networks.values()
            ]

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._counter is not None and self._thread == threading.get_ident():
            setattr(self, self._counter, getattr(self, self._counter) + count_rows(args, kwargs))

    @contextmanager
    def on(self, counter: str = "rows") -> Iterator[None]:
        """Counts the calls made inside, by this thread; not those of the user's own pipeline
        beside it. One thread at a time."""
        with in_turn():
            before = self._counter, self._thread
            self._counter, self._thread = counter, threading.get_ident()
            try:
                yield
            finally:
                self._counter, self._thread = before

    def close(self) -> None:
        self.closed = True
        with TURN:
            for hook in self._hooks:
                hook.remove()

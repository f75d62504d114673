"""Graphs through a pipeline lead to its inputs and to no parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def frozen(pipe: Any, grad: bool) -> Iterator[None]:  # noqa: ANN401
    """No parameter of the pipeline joins a graph made inside: that would keep every layer's input
    for derivatives that nobody asks for."""
    parts = pipe.components.values() if grad else ()
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    live = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in live:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_()

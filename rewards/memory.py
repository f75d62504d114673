"""Micro-batches by memory: as many rows at once as fit, found by halving."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from steering.batch import out_of_memory
from steering.errors import RewardError

T = TypeVar("T")


class RewardMemoryError(RewardError, MemoryError):
    """A reward has no memory for a single row. A search that asked for more may ask for less."""


def in_batches(job: Callable[[slice], T], n: int, size: int, reward: str) -> list[T]:
    """Results of ``job`` for the rows 0 to n in order, at most ``size`` at once.

    Where memory runs out, half as many rows are tried, down to one, and no more than that for the
    rest of the call; the first time warns.

    Args:
        job: from a slice of rows to what is known of them.
        reward: its name, for messages.

    Raises:
        RewardMemoryError: a single row does not fit.
    """
    found: list[T] = []
    start, wanted = 0, size
    while start < n:
        rows = slice(start, min(start + size, n))
        done, failure = _tried(job, rows)
        if failure is None:
            found += done
            start = rows.stop
            continue
        # Here and not in a handler, whose traceback would hold on to what the job had made.
        _free()
        count = rows.stop - rows.start
        if count == 1:
            raise RewardMemoryError(
                f"{reward}: memory does not suffice for a single image ({failure}). Give it "
                "precision=bf16, offload=true where it can, another device=, or serve it from "
                "another machine (steer serve-reward)."
            )
        if size == wanted:
            warnings.warn(
                f"{reward}: no memory for {count} images at once ({failure}); going on with "
                f"{count // 2} or fewer. batch_size={count // 2} avoids the first try.",
                stacklevel=3,
            )
        size = count // 2
    return found


def _tried(job: Callable[[slice], T], rows: slice) -> tuple[list[T], str | None]:
    """(the result, None), or (nothing, what memory ran out of)."""
    try:
        return [job(rows)], None
    except Exception as error:
        if not out_of_memory(error):
            raise
        return [], " ".join(str(error).split())[:200] or type(error).__name__


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

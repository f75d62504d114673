"""Scoring without a model: what a reward is shown in its place, and what goes into one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Bench:
    """Stands for a model where only the device and the prompts are known.

    Args:
        device: where networks go that are told nothing else; the CPU by default.
        prompts: that will be scored, as far as they are known.
    """

    name = "none"

    def __init__(self, device: str | None = None, prompts: Sequence[Any] = ()) -> None:
        self.device, self.prompts = device or "cpu", tuple(prompts)


def same_calls(
    sizes: Sequence[tuple[int, int]],
    reward: Any,  # noqa: ANN401
    most: Callable[[tuple[int, int]], int],
) -> Iterator[list[int]]:
    """Pictures that go together: ``most`` of one size; all of them where a reward compares."""
    for size in dict.fromkeys(sizes):
        group = [k for k, s in enumerate(sizes) if s == size]
        step = len(group) if compares(reward) else most(size)
        for start in range(0, len(group), step):
            yield group[start : start + step]


def compares(reward: Any) -> bool:  # noqa: ANN401
    """Whether it looks at the other pictures of a call; of a sum also a part of weight zero."""
    parts = [part for _, part in getattr(reward, "terms", ())]
    return not getattr(reward, "stationary", True) or any(map(compares, parts))

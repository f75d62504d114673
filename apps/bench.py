"""What `steer score` and `steer serve-reward` show a reward in place of a model."""

from __future__ import annotations

from collections.abc import Sequence
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

"""What a model is: something that can be asked for noise, predictions and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from steering.grids import Grid
from steering.noise import NoiseKey
from steering.paths import Path, Prediction, Times


@runtime_checkable
class Model(Protocol):
    """A denoiser with its path, grid and decoder, over one or more prompts.

    ``cond`` is the index of a prompt in ``prompts``: one number for all rows, or one per row.
    States x are float32 (float64 for analytic models), [n, *event_shape].

    Two more methods are used where they exist: ``decode_preview``, which is ``decode`` by a
    smaller decoder for estimates on the way, and ``rest()``, called at the end of a run, which
    frees what the model holds for the calling thread.

    Attributes:
        name: for reports.
        path: the noising path in the model's own coordinates.
        prompts: one entry per condition (None where a model takes no text).
    """

    name: str
    path: Path
    event_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    prompts: tuple[str | None, ...]

    @property
    def mixed_times(self) -> bool:
        """Whether rows at different times may share one call of ``predict``."""
        ...

    @property
    def rows(self) -> int:
        """Network rows evaluated so far, counted by a hook on the network itself."""
        ...

    def grid(self) -> Grid:
        """The model's own noise levels."""
        ...

    def costs(self) -> tuple[int, ...]:
        """Network rows per sample at each step of ``grid()`` (2 where guidance doubles it)."""
        ...

    def noise(self, n: int, key: NoiseKey, *, cond: int = 0) -> Tensor:
        """Starting states for slots key.slot .. key.slot + n - 1, [n, *event_shape]."""
        ...

    def predict(
        self, x: Tensor, t: Times, *, cond: int | Sequence[int] = 0, grad: bool = False
    ) -> Prediction:
        """The guided prediction at x [n, *event]; ``t`` is one Time or one per row."""
        ...

    def decode(self, x0: Tensor, *, grad: bool = False) -> Tensor:
        """Images [n, 3, H, W] or video [n, F, 3, H, W] in [0, 1], float32."""
        ...

    def close(self) -> None:
        """Frees what the model holds beyond the user's pipeline."""
        ...


def is_model(thing: object) -> TypeGuard[Model]:
    """Whether an object can be asked as a Model; its attributes are not evaluated."""
    asked = ("grid", "costs", "noise", "predict", "decode")
    return all(callable(getattr(type(thing), name, None)) for name in asked)

"""Samples of a method that iterates: each kept once, with the weight that it has collected."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from steering.requests import Outcome


class Pool:
    """Distinct samples by number; the best one is kept even where it has no weight."""

    def __init__(self) -> None:
        self.reward: dict[int, float] = {}
        self.weight: dict[int, float] = {}
        self._x0: dict[int, Tensor] = {}
        self._image: dict[int, Tensor] = {}

    def add(self, numbers: Iterable[int], x0: Tensor, images: Tensor, reward: Tensor) -> None:
        """Takes new samples, without weight."""
        rows = zip(numbers, x0.detach(), images.detach(), reward.tolist(), strict=True)
        for k, x, image, r in rows:
            self.reward[k], self.weight[k] = r, 0.0
            # Copies: a view would keep the whole batch it was cut from.
            self._x0[k], self._image[k] = x.to("cpu", copy=True), image.to("cpu", copy=True)

    def weigh(self, numbers: Iterable[int], weights: Iterable[float]) -> None:
        """Adds weights to samples."""
        for k, w in zip(numbers, weights, strict=True):
            self.weight[k] += w

    def prune(self, alive: Iterable[int]) -> None:
        """Drops what has no weight, is not in use any more and is not the best."""
        keep = {*alive, self.best, *(k for k, w in self.weight.items() if w > 0.0)}
        for table in (self._x0, self._image, self.reward, self.weight):
            for k in set(table) - keep:
                del table[k]

    @property
    def best(self) -> int:
        """The sample of the highest reward; ties go to the first."""
        return max(self.reward, key=lambda k: self.reward[k])

    def outcome(self, device: torch.device, log_z: float | None = None) -> Outcome:
        """All samples with weight, and the best one with log weight -inf where it has none."""
        self.prune([])
        chosen = [k for k in self.reward if self.weight[k] > 0.0 or k == self.best]
        logs = [math.log(self.weight[k]) if self.weight[k] > 0.0 else -math.inf for k in chosen]
        return Outcome(
            x0=torch.stack([self._x0[k] for k in chosen]).to(device),
            images=torch.stack([self._image[k] for k in chosen]).to(device),
            reward=torch.tensor([self.reward[k] for k in chosen], dtype=torch.float64),
            log_w=torch.tensor(logs, dtype=torch.float64),
            log_z=log_z,
            slots=torch.tensor(chosen),
        )

"""What can be seen of a run while it goes on: small pictures and numbers, bounded in size."""

from __future__ import annotations

import io
import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from steering.ledger import Ledger
from steering.requests import Progress
from steering.result import strip, to_pil

THUMB = 128
_TILES = 32
_POINTS = 400


@dataclass(frozen=True)
class Shot:
    """A small picture as PNG bytes, and its reward where it has one."""

    png: bytes
    reward: float | None = None

    @classmethod
    def of(cls, image: Tensor, reward: float | None = None) -> Shot:
        """Of pixels [3, H, W] or a video [F, 3, H, W] in [0, 1]."""
        clip = image if image.ndim == 4 else image[None]
        picture = strip([to_pil(frame) for frame in clip[:: max(1, len(clip) // 4)]])
        picture.thumbnail((THUMB * len(clip), THUMB))
        return cls(png_bytes(picture), reward)


@dataclass
class Checkpoint:
    """Scored pictures of one moment of a run."""

    nfe: int
    final: bool
    shots: list[Shot] = field(default_factory=list)
    more: int = 0


@dataclass(eq=False)
class Live:
    """What viewers of a run may see; written by the worker, read by any thread.

    Attributes:
        version: grows with every change.
        best: the best scored picture so far; before any score, an estimate.
        curve: (network rows, best reward so far).
        ess: (network rows, effective sample size), resampled: (rows, roots left).
    """

    budget: int
    version: int = 0
    nfe: int = 0
    step: int = 0
    of: int = 0
    best: Shot | None = None
    best_final: bool = False
    checkpoints: deque[Checkpoint] = field(default_factory=lambda: deque(maxlen=12))
    guesses: list[Shot] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    ess: list[tuple[int, float]] = field(default_factory=list)
    resampled: list[tuple[int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def has_pictures(self) -> bool:
        return bool(self.checkpoints)

    def progressed(self, progress: Progress, ledger: Ledger) -> None:
        """A method said where it stands."""
        with self.lock:
            self.nfe, self.step, self.of = ledger.nfe, progress.step, progress.of
            info = progress.info
            if "ess" in info and math.isfinite(float(info["ess"])):
                _add(self.ess, (ledger.nfe, float(info["ess"])))
            if "ancestors" in info:
                roots = info.get("roots", len(set(_plain(info["ancestors"]))))
                _add(self.resampled, (ledger.nfe, int(roots)))
            self.version += 1

    def guessed(self, shots: list[Shot], nfe: int) -> None:
        """Estimates before anything was scored."""
        with self.lock:
            self.guesses, self.nfe = shots, nfe
            self.version += 1

    def scored(self, images: Tensor, rewards: Sequence[float], final: bool, nfe: int) -> None:
        """Pictures and their rewards, as the method sees them."""
        order = sorted(range(len(rewards)), key=lambda k: -_low(rewards[k]))
        shots = {k: Shot.of(images[k], rewards[k]) for k in order[:_TILES]}
        with self.lock:
            last = self.checkpoints[-1] if self.checkpoints else None
            if last is None or last.nfe != nfe or last.final != final:
                last = Checkpoint(nfe, final)
                self.checkpoints.append(last)
            kept = [shots[k] for k in sorted(shots)][: max(0, _TILES - len(last.shots))]
            last.shots += kept
            last.more += len(rewards) - len(kept)
            top = shots[order[0]]
            if self._beats(top, final):
                self.best, self.best_final = top, final
            if top.reward is not None and math.isfinite(top.reward):
                before = self.curve[-1][1] if self.curve else -math.inf
                _add(self.curve, (nfe, max(before, top.reward)))
            self.nfe = nfe
            self.version += 1

    def _beats(self, shot: Shot, final: bool) -> bool:
        if self.best is None or final != self.best_final:
            return self.best is None or final
        return _low(shot.reward) > _low(self.best.reward)

    def snapshot(self) -> dict[str, Any]:
        """A copy that no longer changes."""
        with self.lock:
            shown = {k: v for k, v in self.__dict__.items() if k != "lock"}
            for name in ("curve", "ess", "resampled", "guesses"):
                shown[name] = list(shown[name])
            shown["checkpoints"] = [
                Checkpoint(c.nfe, c.final, list(c.shots), c.more) for c in self.checkpoints
            ]
            return shown


def png_bytes(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _add(points: list[Any], point: Any) -> None:  # noqa: ANN401
    """Appends; of too many points every second one goes."""
    points.append(point)
    if len(points) > _POINTS:
        del points[1:-1:2]


def _low(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def _plain(values: Any) -> list[int]:  # noqa: ANN401
    return values.tolist() if isinstance(values, Tensor) else list(values)

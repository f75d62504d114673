"""What a steered run gives back."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steering.ledger import Ledger
from steering.particles import normalise
from steering.recipe import Recipe, atomic, writable_folder, write_png
from steering.trace import Trace


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Result:
    """Samples of one prompt, best reward first.

    Attributes:
        prompt: the text.
        pixels: what the reward saw, [n, 3, H, W] in [0, 1] (video [n, F, 3, H, W]; analytic
            models: the samples).
        samples: finished states in the model's own space, [n, *event].
        rewards: [n] float64, of exactly these pixels.
        heldout: verifiers that the search never saw, name -> [n].
        log_weights: [n] float64; the weighted set stands for the method's target law.
        log_z: estimate of ln E[exp(reward_scale r)], None where the method has none.
        slots: [n] the particle each sample comes from.
        ledger, trace, recipe: what was spent, what happened, how to repeat it.
        cancelled: True where the run was stopped early and this is its best so far.
        preview: True where the picture is of an unfinished sample (stopped runs only).
    """

    prompt: str | None
    pixels: Tensor
    samples: Tensor
    rewards: Tensor
    heldout: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor
    log_z: float | None = None
    slots: Tensor
    ledger: Ledger
    trace: Trace
    recipe: Recipe
    cancelled: bool = False
    preview: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return (
            f"Result({self.prompt!r}, {len(self)} samples, best_reward={self.best_reward:.4g}, "
            f"nfe={self.ledger.nfe}, reward_calls={self.ledger.reward_calls})"
        )

    @property
    def images(self) -> Any:  # noqa: ANN401
        """PIL images, best first (video: a list of frames each; analytic models: the samples)."""
        if self.pixels.ndim == 4 and self.pixels.shape[1] == 3:
            return [to_pil(p) for p in self.pixels]
        if self.pixels.ndim == 5:
            return [[to_pil(frame) for frame in clip] for clip in self.pixels]
        return self.pixels

    @property
    def weights(self) -> Tensor:
        """Normalised weights [n]."""
        return normalise(self.log_weights)

    @property
    def best_reward(self) -> float:
        """The reward of the first sample."""
        return float(self.rewards[0])

    def summary(self) -> dict[str, Any]:
        """Numbers of this result as JSON values."""
        return {
            "prompt": self.prompt,
            "best_reward": self.best_reward,
            "rewards": self.rewards.tolist(),
            "heldout": {k: v.tolist() for k, v in self.heldout.items()},
            "log_weights": self.log_weights.tolist(),
            "log_z": self.log_z,
            "slots": self.slots.tolist(),
            "ledger": self.ledger.to_json(),
            "cancelled": self.cancelled,
            "preview": self.preview,
        }

    def save(self, out: str | os.PathLike[str], *, prefix: str = "") -> list[Path]:
        """Writes PNGs that carry their recipe, and result.json; each file whole or not at all.

        Returns:
            The files, best picture first, result.json last.

        Raises:
            OptionError: the folder cannot be written.
        """
        folder = writable_folder(out)
        files: list[Path] = []
        for k, picture in enumerate(self.pictures()):
            path = folder / picture_name(k, prefix)
            write_png(picture, path, replace(self.recipe, image=k))
            files.append(path)
        report = folder / f"{prefix}result.json"
        data = {**self.summary(), "trace": self.trace.to_json(), "recipe": self.recipe.to_json()}
        with atomic(report) as temporary:
            temporary.write_text(json.dumps(finite(data), indent=1, allow_nan=False))
        return [*files, report]

    def pictures(self) -> list[Image.Image]:
        """One PIL image per sample, as `save` writes them; none for analytic models."""
        images = self.images
        if isinstance(images, Tensor):
            return []
        # A video is kept as a strip of its frames: one lossless file that can carry a recipe.
        return [strip(im) if isinstance(im, list) else im for im in images]


def picture_name(k: int, prefix: str = "") -> str:
    """The file that `Result.save` writes picture k to."""
    return f"{prefix}{k:03d}.png"


def finite(value: Any) -> Any:  # noqa: ANN401
    """The same JSON values with NaN and the infinities as null, which strict readers accept."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_pil(pixels: Tensor) -> Image.Image:
    """An 8-bit image of [3, H, W] in [0, 1], rounded as diffusers does."""
    data = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(data.permute(1, 2, 0).cpu().numpy())


def strip(frames: list[Image.Image]) -> Image.Image:
    """Frames side by side."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (width * len(frames), height))
    for k, frame in enumerate(frames):
        sheet.paste(frame, (k * width, 0))
    return sheet

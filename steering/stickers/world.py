"""The sticker world: 64x64 scenes of 24 px emoji on an 8 px grid, with exact ground truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from steering.stickers.grammar import CLASSES, Metadata, parse
from steering.stickers.prompts import sample_metadata

SIZE = 64  # side of a scene in px
SPRITE = 24  # side of an object in px
GRID = 8  # objects snap to multiples of this
ATLAS = Path(__file__).with_name("atlas.png")
ATLAS_COLUMNS = 8

RGB: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 40),
    "green": (50, 165, 70),
    "blue": (50, 95, 225),
    "purple": (140, 65, 190),
    "pink": (250, 140, 190),
    "brown": (130, 80, 45),
    "black": (35, 35, 38),
    "white": (245, 245, 245),
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One object: class, tint (None: the emoji's own colours) and top-left corner in px."""

    name: str
    color: str | None
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in px, ends exclusive."""
        return self.x, self.y, self.x + SPRITE, self.y + SPRITE


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn prompt: GenEval metadata, objects in clause order, background colour and shade."""

    metadata: Metadata
    objects: tuple[Placement, ...]
    background: tuple[float, float, float]
    shade: float

    @property
    def prompt(self) -> str:
        return self.metadata["prompt"]

    @property
    def boxes(self) -> np.ndarray:
        """Exact boxes [n, 4] as (x0, y0, x1, y1) in px."""
        return np.array([o.box for o in self.objects], dtype=np.int64).reshape(-1, 4)


class StickerWorld:
    """Draws scenes for prompts of the grammar; every random choice comes from the seed.

    Args:
        split: "train" never draws a held-out pair of classes, "heldout" only those, "all" both.
    """

    def __init__(self, split: str = "train") -> None:
        self.split = split

    def sample(self, seed: int | np.random.Generator) -> Scene:
        """A random prompt of the training mix, placed."""
        rng = np.random.default_rng(seed)
        return self.place(sample_metadata(rng, split=self.split), rng)

    def place(self, metadata: Metadata, seed: int | np.random.Generator) -> Scene:
        """A scene that satisfies `metadata`, uniform over its layouts."""
        rng = np.random.default_rng(seed)
        wanted = [
            (c["class"], c.get("color")) for c in metadata["include"] for _ in range(c["count"])
        ]
        relation = metadata["include"][-1].get("position", (None,))[0]
        options = layouts(len(wanted), relation)
        corners = options[rng.integers(len(options))]
        return Scene(
            metadata=metadata,
            objects=tuple(
                Placement(name=name, color=color, x=int(x), y=int(y))
                for (name, color), (x, y) in zip(wanted, corners, strict=True)
            ),
            background=tuple(rng.uniform(0.75, 1.0, 3).tolist()),
            shade=float(rng.uniform(0.0, 0.12)),
        )

    def render(
        self, scene: Scene | Metadata | str, seed: int | np.random.Generator = 0
    ) -> np.ndarray:
        """uint8 [64, 64, 3]. Metadata and prompts are placed first, with `seed`."""
        if isinstance(scene, str):
            scene = parse(scene)
        if not isinstance(scene, Scene):
            scene = self.place(scene, seed)
        ramp = 1.0 - scene.shade * np.linspace(0.0, 1.0, SIZE, dtype=np.float32)
        image = np.empty((SIZE, SIZE, 3), np.float32)
        image[:] = ramp[:, None, None] * np.asarray(scene.background, np.float32)
        for o in scene.objects:
            paste(image, sprite(o.name, o.color), o.x, o.y)
        return (image * 255.0 + 0.5).astype(np.uint8)

    def parse(self, prompt: str) -> Metadata:
        """GenEval metadata of a prompt; raises OptionError outside the grammar."""
        return parse(prompt)


def paste(image: np.ndarray, rgba: np.ndarray, x: int, y: int) -> None:
    """Blend a premultiplied sprite [h, w, 4] into `image` [H, W, 3] in place."""
    h, w = rgba.shape[:2]
    patch = image[y : y + h, x : x + w]
    patch *= 1.0 - rgba[..., 3:]
    patch += rgba[..., :3]


@cache
def sprite(name: str, color: str | None = None) -> np.ndarray:
    """Premultiplied float32 RGBA [24, 24, 4] in [0, 1], tinted if a colour is given."""
    row, column = divmod(CLASSES.index(name), ATLAS_COLUMNS)
    cell = _atlas()[row * SPRITE :, column * SPRITE :][:SPRITE, :SPRITE]
    rgb, alpha = cell[..., :3], cell[..., 3:]
    if color is not None:
        rgb = _tint(rgb, alpha[..., 0], np.array(RGB[color], np.float32) / 255.0)
    return np.concatenate([rgb * alpha, alpha], axis=-1)


@cache
def _atlas() -> np.ndarray:
    with Image.open(ATLAS) as image:
        return np.asarray(image.convert("RGBA"), np.float32) / 255.0


def _tint(rgb: np.ndarray, alpha: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Recolour by luminance: dark parts to a shade of `color`, the brightest towards white.

    Luminance is stretched between its 5th and 95th percentile inside the sprite, so that a
    black emoji and a white one give the same contrast.
    """
    luminance = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
    low, high = np.percentile(luminance[alpha > 0.3], [5, 95])
    tone = np.clip((luminance - low) / (high - low + 1e-3), 0.0, 1.0)[..., None]
    highlight = 0.5 * np.clip(tone - 0.75, 0.0, 0.25) * (1.0 - color)
    return np.clip(color * (0.45 + 0.55 * tone) + highlight, 0.0, 1.0).astype(np.float32)


@cache
def layouts(n: int, relation: str | None = None) -> np.ndarray:
    """All placements of `n` objects without overlap: corners (x, y) in px, [m, n, 2].

    With a relation, object 1 stands in it to object 0 (GenEval's clause order), aligned to
    within one grid step on the other axis, so that GenEval's rule holds with room to spare.
    """
    axis = np.arange(0, SIZE - SPRITE + 1, GRID)
    cells = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    gap = np.abs(cells[:, None] - cells[None])
    apart = (gap >= SPRITE).any(-1)
    if relation is not None:
        step = cells[None] - cells[:, None]  # [target, subject]
        main, sign = {
            "left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1),
        }[relation]  # fmt: skip
        apart &= (sign * step[..., main] >= SPRITE) & (gap[..., 1 - main] <= GRID)
    chosen = np.arange(len(cells))[:, None]
    for _ in range(n - 1):
        free = apart[chosen].all(axis=1)
        rows, new = np.nonzero(free)
        chosen = np.concatenate([chosen[rows], new[:, None]], axis=1)
    return cells[chosen].astype(np.int16)

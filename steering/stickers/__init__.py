"""The embedded text-to-image world: 64x64 scenes of emoji with exact ground truth.

`StickerWorld` draws and parses, `load` opens the shipped models, `judge` says whether an image
shows its prompt, `train` made the weights. Nothing here needs a network or a font.
"""

from __future__ import annotations

from steering.stickers.grammar import CLASSES, COLORS, RELATIONS, TAGS, describe, parse
from steering.stickers.prompts import is_heldout, prompts
from steering.stickers.world import Placement, Scene, StickerWorld

__all__ = [
    "CLASSES",
    "COLORS",
    "RELATIONS",
    "TAGS",
    "Placement",
    "Scene",
    "StickerWorld",
    "describe",
    "is_heldout",
    "parse",
    "prompts",
]

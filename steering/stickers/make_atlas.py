"""Draws `atlas.png`, the 52 sprites of 24 px, from the Noto Color Emoji font.

    python -m steering.stickers.make_atlas FONT.ttf

Needed only to change the atlas: the package ships the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from steering.stickers.grammar import CLASSES
from steering.stickers.world import ATLAS, ATLAS_COLUMNS, SPRITE

EMOJI = (
    "🚲🚗✈🚌🚆🚚⛵🚦🛑🐦🐱🐶🐴🐑🐄🐘🐻🦓🦒🎒☂👜👔🧳⚽🪁"
    "🍾🍷☕🍌🍎🥪🍊🥦🥕🌭🍕🍩🎂🪑🛋🪴🛏🚽📺💻📱📕🕐🏺✂🧸"
)
BITMAP = 109  # the only size of the font's bitmaps


def draw(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cropped to its ink, centred on a transparent square of `SPRITE` px."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), emoji, font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)


def main(font_path: str, target: Path = ATLAS) -> None:
    """Write the atlas: sprites row by row in the order of `CLASSES`."""
    font = ImageFont.truetype(font_path, BITMAP)
    rows = -(-len(CLASSES) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * SPRITE, rows * SPRITE))
    for k, emoji in enumerate(EMOJI):
        row, column = divmod(k, ATLAS_COLUMNS)
        atlas.paste(draw(emoji, font), (column * SPRITE, row * SPRITE))
    atlas.save(target, optimize=True)


if __name__ == "__main__":
    if len(EMOJI) != len(CLASSES):
        raise SystemExit(f"{len(EMOJI)} emoji for {len(CLASSES)} classes")
    main(sys.argv[1])

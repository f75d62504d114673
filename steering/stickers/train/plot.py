"""Draws the loss curves of training logs side by side.

python -m steering.stickers.train.plot flow=DIR/log.jsonl:flow unet=DIR/log.jsonl:noise --out F.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 300, 200, 44
INK, LINE, FAINT = (40, 40, 40), (30, 90, 180), (190, 205, 230)
SMOOTH = 3  # log lines in the running mean


def read(log: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Minutes and values of the lines that have `column`."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if column in line]
    return (
        np.array([line["seconds"] / 60.0 for line in lines]),
        np.array([line[column] for line in lines]),
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last `SMOOTH` values."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTH, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def panel(title: str, minutes: np.ndarray, values: np.ndarray) -> Image.Image:
    """One curve with its ends written on the axes; the few highest values are cut off."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    low, high = float(values.min()), float(np.quantile(values, 0.97))
    span = max(high - low, 1e-9)
    x = MARGIN + (WIDTH - 1.5 * MARGIN) * minutes / minutes.max()
    frame = (MARGIN, 24, WIDTH - MARGIN // 2, HEIGHT - 28)
    for curve, ink, wide in ((values, FAINT, 1), (smooth(values), LINE, 2)):
        y = frame[3] - (frame[3] - frame[1]) * np.clip((curve - low) / span, 0.0, 1.0)
        pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=ink, width=wide)
    pen.rectangle(frame, outline=INK)
    pen.text((MARGIN, 8), title, fill=INK)
    pen.text((4, frame[1]), f"{high:.3f}", fill=INK)
    pen.text((4, frame[3] - 12), f"{low:.3f}", fill=INK)
    pen.text((MARGIN, frame[3] + 6), "0", fill=INK)
    pen.text((frame[2] - 40, frame[3] + 6), f"{minutes.max():.0f} min", fill=INK)
    return image


def main() -> None:
    """One panel a log, left to right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", help="TITLE=LOG:COLUMN")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    panels = []
    for item in args.logs:
        title, _, rest = item.partition("=")
        log, _, column = rest.rpartition(":")
        panels.append(panel(title, *read(Path(log), column)))
    sheet = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    for k, one in enumerate(panels):
        sheet.paste(one, (WIDTH * k, 0))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()

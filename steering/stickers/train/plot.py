"""Draws the loss curves of training logs side by side.

python -m steering.stickers.train.plot flow=DIR/log.jsonl:flow unet=DIR/log.jsonl:noise --out F.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

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


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], out: Path) -> None:
    """One panel a curve; the few highest values are cut off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(curves), 2.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, (minutes, values)) in zip(axes, curves.items(), strict=True):
        axis.plot(minutes, values, color="tab:blue", alpha=0.3)
        axis.plot(minutes, smooth(values), color="tab:blue")
        axis.set_ylim(values.min(), np.quantile(values, 0.97))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("minutes", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.savefig(out, dpi=90)


def main() -> None:
    """One panel a log, left to right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", help="TITLE=LOG:COLUMN")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    curves = {}
    for item in args.logs:
        title, _, rest = item.partition("=")
        log, _, column = rest.rpartition(":")
        curves[title] = read(Path(log), column)
    draw(curves, args.out)


if __name__ == "__main__":
    main()

"""Trains one sticker model; resumable. See docs/stickers.md for the recipes behind the weights.

python -m steering.stickers.train MODEL --minutes M --out DIR [--resume]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from steering.stickers.train.loop import Recipe

# Learning rate, weight decay, Adam betas and EMA of each model.
DEFAULTS: dict[str, dict[str, object]] = {
    "autoencoder": {"lr": 2e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)},
    "clip": {"lr": 1e-3, "weight_decay": 0.05, "ema": 0.98},
    "detector": {"lr": 2e-3, "weight_decay": 0.01, "warmup": 30},
    "flow": {"lr": 5e-4, "weight_decay": 0.01, "betas": (0.9, 0.99), "ema": 0.995},
    "unet": {"lr": 8e-4, "weight_decay": 0.01, "betas": (0.9, 0.99), "ema": 0.998},
    "turbo": {"lr": 3e-4, "weight_decay": 0.0, "betas": (0.9, 0.99), "ema": 0.99},
}


def main() -> None:
    """Parse the command line and run one training."""
    parser = argparse.ArgumentParser(prog="python -m steering.stickers.train", description=__doc__)
    parser.add_argument("model", choices=sorted(DEFAULTS))
    parser.add_argument("--minutes", type=float, required=True, help="of all sittings together")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log and export")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--warm-start", type=Path, help="weights to begin from")
    parser.add_argument("--fresh", action="store_true", help="flow: from random weights")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = dict(DEFAULTS[args.model])
    if args.lr is not None:
        options["lr"] = args.lr
    recipe = Recipe(
        minutes=args.minutes, out=args.out, resume=args.resume, seed=args.seed, **options
    )
    module = importlib.import_module(f"steering.stickers.train.{args.model}")
    if args.fresh and args.model != "flow":
        parser.error("--fresh is an option of flow only.")
    more = {"fresh": True} if args.fresh else {}
    module.train(recipe, args.warm_start, **more)


if __name__ == "__main__":
    main()

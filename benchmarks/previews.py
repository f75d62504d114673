"""Claim: a preview decoder ranks unfinished samples as the full decoder does, for less time.

No small decoder ships with the stickers, so one is fitted here: three 3x3 convolutions from
latents to blocks of 4x4 pixels, on pictures of other prompts. Estimates of x0 on the way of 32
samples a prompt are decoded by both and scored. CPU time of the process, one thread, taking turns.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import steering
from benchmarks.meters import one_thread, spread, turns
from steering.loading import call_defaults
from steering.scoring import resolve_reward, score
from steering.stickers.prompts import prompts as sticker_prompts
from steering.stickers.train.loop import seeded_init
from steering.transitions import ODE

NAME, WIDTH, PROMPTS, TRAINING, STEPS, REPEATS = "stickers", 32, 4, 12, 10, 7
HIDDEN, FITTING = 48, 400
SHARES = (0.3, 0.5, 0.7, 0.9)


class Small(nn.Module):
    """Latents [n, c, h, w] to pixels in [-1, 1] by three convolutions and a shuffle."""

    def __init__(self, channels: int, block: int, config: object) -> None:
        super().__init__()
        widths = [channels, HIDDEN, HIDDEN, 3 * block * block]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.net = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2],
                                 nn.PixelShuffle(block))  # fmt: skip
        self.config = config

    def fit(self, z: Tensor, pixels: Tensor) -> None:
        """Mean squares between its pictures and those in [-1, 1] of the full decoder."""
        generator = torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(FITTING):
            rows = torch.randint(0, len(z), (16,), generator=generator)
            optimiser.zero_grad()
            (self.net(z[rows]) - pixels[rows]).square().mean().backward()
            optimiser.step()

    def decode(self, z: Tensor, return_dict: bool = True, **_: object) -> object:
        image = self.net(z)
        return SimpleNamespace(sample=image) if return_dict else (image,)


def estimates(model: object, texts: list[str]) -> dict[float, Tensor]:
    """Estimates of x0 at shares of the steps made, and finished samples at 1: rows by prompt."""
    conds = [c for c in range(len(texts)) for _ in range(WIDTH)]
    parts = [model.noise(WIDTH, steering.NoiseKey(3), cond=c) for c in range(len(texts))]
    x, grid, found = torch.cat(parts), model.grid(), {}
    wanted = {grid.nearest(share): share for share in SHARES}
    for i, (t, u) in enumerate(grid.steps()):
        prediction = model.predict(x, t, cond=conds)
        if i in wanted:
            found[wanted[i]] = prediction.x0
        x = ODE(x, prediction, t, u, model.path).mean
    return {**found, 1.0: x}


def fitted(pipe: object, call: dict) -> Small:
    """The small decoder, from samples of prompts that are not measured."""
    texts = sticker_prompts("train", n=TRAINING, seed=5)
    with steering.wrap(pipe, prompt=texts, **call) as model:
        conds = list(range(TRAINING)) * 3
        x = torch.cat([model.noise(1, steering.NoiseKey(4, slot=k), cond=c)
                       for k, c in enumerate(conds)])  # fmt: skip
        for t, u in model.grid().steps():
            x = ODE(x, model.predict(x, t, cond=conds), t, u, model.path).mean
        config = pipe.vae.config
        images = model.decode(x)
    with seeded_init(0):
        small = Small(x.shape[1], images.shape[-1] // x.shape[-1], config)
    shift = getattr(config, "shift_factor", None) or 0.0
    small.fit(x / config.scaling_factor + shift, images * 2.0 - 1.0)
    return small


def measure() -> dict:
    pipe = steering.load(NAME, dtype="float32")
    call = {**call_defaults(NAME), "num_inference_steps": STEPS}
    texts = sticker_prompts("heldout", n=PROMPTS, seed=6)
    with steering.wrap(
        pipe, name=NAME, prompt=texts, preview_decoder=fitted(pipe, call), **call
    ) as model:
        reward = resolve_reward("clip", model)
        rows: dict[float, dict] = {}
        names = [text for text in texts for _ in range(WIDTH)]
        found = estimates(model, texts)
        final = score(reward, model.decode(found[1.0]), names).value.view(PROMPTS, WIDTH)
        for share, x0 in found.items():
            full, small = (
                score(reward, decode(x0), names).value.view(PROMPTS, WIDTH)
                for decode in (model.decode, model.decode_preview)
            )
            pairs = {"preview and full": (small, full), "preview and final": (small, final),
                     "full and final": (full, final)}  # fmt: skip
            rows[share] = {
                name: sum(float(spearmanr(a, b)[0]) for a, b in zip(one, two, strict=True))
                / PROMPTS
                for name, (one, two) in pairs.items()
            }
        x0 = found[1.0][:WIDTH]
        ways = {"full": partial(model.decode, x0), "preview": partial(model.decode_preview, x0)}
        took = turns(ways, REPEATS)
    ratio = [a / b for a, b in zip(took["full"], took["preview"], strict=True)]
    seconds = {name: spread(v) for name, v in took.items()}
    return {"rows": rows, "ratio": spread(ratio), "seconds": seconds}


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    with one_thread():
        found = measure()
    ratio, seconds = found["ratio"], found["seconds"]
    lines = [
        f"Preview against full decoder, {WIDTH} pictures: {ratio['median']:.1f}x as fast "
        f"({ratio['min']:.1f} to {ratio['max']:.1f}; full {1e3 * seconds['full']['median']:.0f} "
        f"ms). Rank correlation of rewards within a prompt, mean over {PROMPTS}:"
    ]
    lines += [
        f"{share:.0%} of the steps: "
        + ", ".join(f"{name} {value:.2f}" for name, value in row.items())
        for share, row in found["rows"].items()
    ]
    return {**found, "width": WIDTH, "steps": STEPS, "table": "\n".join(lines)}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

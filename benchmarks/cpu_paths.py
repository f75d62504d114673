"""Claim: on CPUs the step stays eager and a UNet contiguous, because little is gained; a tiny
autoencoder goes channels-last, because it pays. Compiled against eager step, channels-last against
contiguous UNet and decoder of stickers-sd. CPU time of the process, one thread, taking turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor

import steering
from benchmarks.meters import one_thread, spread, turns
from steering.kernels.step import Move, Reading, guided_step_plain

REPEATS, BAR = 7, 1.05
STATES = {"stickers, 4 rows": (4, 8, 16, 16), "stickers, 64 rows": (64, 8, 16, 16),
          "SDXL, 1 row": (1, 4, 128, 128), "SD3.5, 4 rows": (4, 16, 128, 128)}  # fmt: skip


def eager(x: Tensor, cond: Tensor, uncond: Tensor, z: Tensor) -> Tensor:
    """The twin of the fused step; its noise is drawn before, by the same numbers in both ways."""
    reading = Reading(1.0, -0.7, 1.0, 0.3)
    how = Move(0.0, 0.5, 0.4, 0.0)
    return guided_step_plain(x, cond, uncond, 4.0, reading, how, None).x + 0.3 * z


def step() -> dict[str, dict]:
    fast, found = torch.compile(eager, dynamic=False), {}
    for name, shape in STATES.items():
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(shape, generator=generator) for _ in range(4)]
        started = time.process_time()
        fast(*given)
        made = time.process_time() - started
        error = float((fast(*given) - eager(*given)).abs().max())
        ways = {"eager": lambda g=given: eager(*g), "compiled": lambda g=given: fast(*g)}
        took = turns(ways, REPEATS, 20)
        ratio = [a / b for a, b in zip(took["eager"], took["compiled"], strict=True)]
        saved = [a - b for a, b in zip(took["eager"], took["compiled"], strict=True)]
        found[name] = {
            "ratio": spread(ratio),
            "eager": spread(took["eager"]),
            "error": error,
            "compiling": made,  # in this process; further ones are compiled beside it
            "steps to earn it": made / max(1e-9, spread(saved)["median"]),
        }
    return found


def pairs(pipe: object, x: Tensor) -> dict[str, list[Callable[[], Tensor]]]:
    """UNet and decoder, contiguous and channels-last."""
    text = torch.zeros(len(x), 16, pipe.unet.config.cross_attention_dim)
    last = x.to(memory_format=torch.channels_last)

    def unet(part: torch.nn.Module, given: Tensor) -> Callable[[], Tensor]:
        return lambda: part(given, torch.tensor(500), encoder_hidden_states=text).sample

    def decoder(part: torch.nn.Module, given: Tensor) -> Callable[[], Tensor]:
        return lambda: part.decode(given).sample

    def other(part: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(part).to(memory_format=torch.channels_last)

    return {
        "UNet": [unet(pipe.unet, x), unet(other(pipe.unet), last)],
        "decoder": [decoder(pipe.vae, x), decoder(other(pipe.vae), last)],
    }


def formats() -> dict[str, dict]:
    name = "stickers-sd"
    pipe = steering.load(name, dtype="float32", channels_last=False)
    model = steering.wrap(pipe, prompt="a cat")
    found = {}
    for rows in (2, 32):
        x = model.noise(rows, steering.NoiseKey(1)).to(pipe.unet.dtype)
        for part, (plain, last) in pairs(pipe, x).items():
            with torch.no_grad():
                error = float((plain() - last()).abs().max() / plain().abs().max())
                took = turns({"contiguous": plain, "channels last": last}, REPEATS, 2)
            ratio = [a / b for a, b in zip(*took.values(), strict=True)]
            found[f"{part}, {rows} rows"] = {
                "ratio": spread(ratio),
                "contiguous": spread(took["contiguous"]),
                "error": error,
            }
    return found


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    with one_thread():
        found = {"step": step(), "formats": formats()}
    lines = [f"Times as fast as eager and contiguous (worth a change: {BAR}x)"]
    for title, rows in found.items():
        base = "eager" if title == "step" else "contiguous"
        lines += [
            f"{title:8s} {name:18s} {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to "
            f"{row['ratio']['max']:.2f}) of {1e3 * row[base]['median']:.2f} ms, "
            f"difference {row['error']:.1g}"
            + (f", compiled in {row['compiling']:.1f} s" if "compiling" in row else "")
            for name, row in rows.items()
        ]
    return {**found, "table": "\n".join(lines)}


if __name__ == "__main__":
    print(run(prompts=0, nfe=0)["table"])

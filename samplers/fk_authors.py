"""Feynman-Kac steering as the authors' published code runs it, for reproducing their numbers.

It differs from the exact method: weights computed at a checkpoint are dropped when nothing is
resampled although the reward memory moves on, the last correction is gated by ESS and taken from
the one-step estimate at the last level, rewards belong to the parents of the particles that are
resampled, weights are clamped in linear space, and the max potential starts at reward 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steering.method import Context, as_float64
from steering.requests import Decode, Denoise, Outcome, Progress, Run, Score
from steering.resampling import multinomial

if TYPE_CHECKING:
    from steering.samplers.fk import FK

_CLAMP = 1e10
_ESS = 0.5


def run_authors(fk: FK, ctx: Context) -> Run:
    """The loop of the reference implementation for potentials difference, max and sum."""
    assert fk.n_particles is not None
    n, grid, kernel = fk.n_particles, ctx.grid, fk.kernel()
    checkpoints = {*fk.checkpoint_steps(grid), len(grid) - 1}
    x = ctx.noise(n)
    memory, product = torch.zeros(n).double(), torch.ones(n).double()
    for i, (t, u) in enumerate(grid.steps()):
        prediction = yield Denoise(x, t)
        x = ctx.move(x, prediction, t, u, kernel, step=i)
        if i not in checkpoints:
            continue
        images = yield Decode(prediction.x0, preview=True)
        scores = yield Score(images, prediction.x0)
        rewards = _merge(str(fk.potential), as_float64(scores.value), memory)
        last = i == len(grid) - 1
        w = _weights(fk, rewards, memory, product, last)
        size = float(w.sum() ** 2 / w.square().sum()) if float(w.sum()) > 0 else 0.0
        gated = (fk.resample == "ess" or last) and size >= _ESS * n
        if not gated and fk.resample != "never":
            ancestors = multinomial(w / w.sum(), n, ctx.key("resample", i))
            x, rewards = x[ancestors.to(x.device)], rewards[ancestors]
            product = (product * w)[ancestors]
        memory = rewards
        yield Progress(step=i + 1, of=len(grid), info={"ess": size, "rewards": rewards})
    images = yield Decode(x)
    scores = yield Score(images, x, final=True)
    reward = as_float64(scores.value)
    zeros = torch.zeros(n, dtype=torch.float64)
    return Outcome(x0=x, images=images, reward=reward, log_w=zeros, slots=torch.arange(n))


def _merge(potential: str, reward: Tensor, memory: Tensor) -> Tensor:
    if potential == "max":
        return torch.maximum(reward, memory)
    return reward + memory if potential == "sum" else reward


def _weights(fk: FK, rewards: Tensor, memory: Tensor, product: Tensor, last: bool) -> Tensor:
    assert fk.reward_scale is not None  # fit() has set it
    if fk.potential == "difference":
        w = torch.exp(fk.reward_scale * (rewards - memory))
    else:
        w = torch.exp(fk.reward_scale * rewards)
        if last:
            w = w / product
    w = w.clamp(0.0, _CLAMP)
    w[torch.isnan(w)] = 0.0
    return w if float(w.sum()) > 0 else torch.ones_like(w)

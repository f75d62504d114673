"""Models that remember their calls, and a method to watch the engine by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.ledger import Budget
from steering.method import Plan
from steering.requests import Decode, Denoise, Outcome, Score
from steering.samplers import BestOfN
from steering.scoring import resolve_reward
from steering.task import Task

LINE = LinearReward([1.0])


class Watched(GaussianMixture):
    """A mixture that remembers its calls and has a memory of limited width."""

    def __init__(self, prompts=("p",), *, steps=4, width=10**9, decode_width=10**9) -> None:
        super().__init__(
            [0.5, 0.5], [-1.0, 1.0], [0.4, 0.6], steps=steps, kernel="exact", prompts=prompts
        )
        self.width, self.decode_width = width, decode_width
        self.calls: list[int] = []
        self.conds: list[list[int]] = []
        self.times: list[object] = []
        self.decoded: list[int] = []

    def predict(self, x, t, *, cond=0, grad=False):
        if len(x) > self.width:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.calls.append(len(x))
        self.conds.append(list(cond))
        self.times.append(t)
        return super().predict(x, t, cond=cond, grad=grad)

    def decode(self, x0, *, grad=False):
        if len(x0) > self.decode_width:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        self.decoded.append(len(x0))
        return x0


class Pixels(GaussianMixture):
    """Two-dimensional samples shown as 4x4 images: red and green are the coordinates."""

    def __init__(self, prompts=("p",)) -> None:
        super().__init__([1.0], [[0.5, 0.5]], [0.1], steps=4, kernel="exact", prompts=prompts)

    def decode(self, x0, *, grad=False):
        blue = torch.zeros(len(x0), 1, dtype=x0.dtype)
        colours = torch.cat([x0, blue], 1).clamp(0, 1).float()
        return colours[:, :, None, None].expand(-1, -1, 4, 4).contiguous()


@dataclass(frozen=True, kw_only=True)
class Echo(BestOfN):
    """Denoises its own slots at its own pace, then scores: for watching the engine."""

    delay: int = 0

    def run(self, ctx):
        x = ctx.noise(self.n)
        for i, (t, u) in enumerate(ctx.grid.steps()):
            for _ in range(self.delay if i == 0 else 0):
                yield Denoise(x, t)
            prediction = yield Denoise(x, t)
            assert len(prediction.x0) == len(x)
            x = ctx.move(x, prediction, t, u, self.kernel(), step=i)
        images = yield Decode(x)
        assert torch.equal(images, x)
        scores = yield Score(images, x, final=True)
        assert torch.allclose(scores.value.double(), LINE(images), atol=1e-6)
        log_w = torch.zeros(self.n, dtype=torch.float64)
        return Outcome(x0=x, images=images, reward=scores.value.double(), log_w=log_w)


def tasks_of(model, methods, reward=LINE, budget=None, seeds=None) -> list[Task]:
    grid, guide = model.grid(), resolve_reward(reward)
    plan = Plan(grid=grid, costs=model.costs(), budget=budget or Budget())
    return [
        Task(
            index=i,
            prompt=model.prompts[i],
            cond=i,
            seed=i if seeds is None else seeds[i],
            method=method,
            plan=plan,
            reward=guide,
        )
        for i, method in enumerate(methods)
    ]


def steer(model, reward, method, *, seed=0, **more):
    prompts = model.prompts[0] if len(model.prompts) == 1 else list(model.prompts)
    return steering.steer(model, prompts, reward=reward, method=method, seed=seed, **more)

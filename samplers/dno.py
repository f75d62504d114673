"""DNO: gradient ascent of the reward in the noise of every step, with a test for noise."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Context, as_float64
from steering.registry import METHODS
from steering.requests import Decode, Gradient, Request, Score
from steering.samplers.base import refuse_idle
from steering.samplers.noise_optimisation import Iterate, NoiseOptimisation


@METHODS.register("dno")
@dataclass(frozen=True, kw_only=True)
class DNO(NoiseOptimisation):
    """Direct noise optimisation (Tang et al. 2024, arXiv 2405.18881).

    Authors: all noises of a DDIM sampler at eta 1, AdamW at lr 0.01 (Adam here), gradient norm at
    most 1, 100 iterations, probability regularisation with weight 1 (their switch; off by default
    there).

    Attributes:
        estimator: "autograd" differentiates the reward. "hybrid" is for black boxes: the slope of
            the reward by the *picture* is estimated from ``n_perturbations`` noises nearby, and
            the picture's slope by the noise is exact.
        n_perturbations: trajectories of each estimate.
        perturbation: their distance in noise space.
    """

    variables: Literal["initial", "all"] = "all"
    eta: float = 1.0
    optimizer: Literal["sgd", "adam"] = "adam"
    clip: float | None = 1.0
    regulariser: Literal["radius", "probability", "none"] = "probability"
    reg_weight: float = 1.0
    estimator: Literal["autograd", "hybrid"] = "autograd"
    n_perturbations: int = 4
    perturbation: float = 0.01

    name: ClassVar[str] = "dno"
    summary: ClassVar[str] = "gradient ascent in the noise of every step"
    paper: ClassVar[str] = "Tang et al. 2024 (2405.18881)"
    needs_stochastic: ClassVar[bool] = True  # but for variables="initial"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "paper": {"n_iterations": 100},
        # The authors draw 4 on each of at least two processes; 16 is ours.
        "black-box": {"estimator": "hybrid", "n_perturbations": 16},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_perturbations < 1 or not self.perturbation > 0.0:
            raise OptionError(
                "dno: n_perturbations must be at least 1 and perturbation positive, got "
                f"{self.n_perturbations} and {self.perturbation}."
            )
        if self.estimator == "autograd":
            refuse_idle(self, "estimator='autograd'", "n_perturbations", "perturbation")

    @property
    def differentiates_reward(self) -> bool:
        """Whether the reward itself must have a gradient."""
        return self.estimator == "autograd"

    def pass_cost(self) -> int:
        return 1 + (self.n_perturbations if self.estimator == "hybrid" else 0)

    def _evaluate(
        self, ctx: Context, noise: list[Tensor], k: int, grad: bool
    ) -> Generator[Request, Any, Iterate]:
        if self.estimator == "autograd" or not grad:
            return (yield from super()._evaluate(ctx, noise, k, grad))
        return (yield from self._hybrid(ctx, noise, k))

    def _hybrid(
        self, ctx: Context, noise: list[Tensor], k: int
    ) -> Generator[Request, Any, Iterate]:
        """g = mean (r_j - r)(x_j - x), of unit length; then the slope of <g, x> by the noise."""
        leaves = [z.clone().requires_grad_() for z in noise]
        x0 = yield from self._trajectory(ctx, leaves, True)
        images = yield Decode(x0, grad=True, checkpoint=self.checkpoint)
        scores = yield Score(images.detach(), x0.detach(), final=True)
        reward, free = as_float64(scores.value), self._free(ctx)
        direction = torch.zeros_like(images)
        for j in range(self.n_perturbations):
            near = [
                z if i < free else z + self.perturbation * self._nudge(ctx, z, i, j, k)
                for i, z in enumerate(noise)
            ]
            _, pictures, scores = yield from self._score(ctx, near, False)
            gain = _gain(as_float64(scores.value), reward).to(images)
            direction += gain.reshape(-1, *[1] * (images.ndim - 1)) * (pictures - images.detach())
        length = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_min(1e-12)
        direction /= length.reshape(-1, *[1] * (images.ndim - 1))
        along = (images * direction).flatten(1).sum(1) * self._scale
        slopes = yield Gradient(along, tuple(leaves[free:]))
        return Iterate(x0.detach(), images.detach(), reward, slopes)

    def _nudge(self, ctx: Context, z: Tensor, i: int, j: int, k: int) -> Tensor:
        return ctx.key(f"nudge/{i}/{j}", k).normal(len(z), z.shape[1:]).to(z)


def _gain(near: Tensor, here: Tensor) -> Tensor:
    """near - here [n], rewards of -inf counted as one spread of the others below the lowest.

    So a nudge out of what a reward refuses is a step up, and no sum of them is infinite.
    """
    both = torch.stack([near, here])
    finite = both[torch.isfinite(both)]
    if not len(finite):
        return torch.zeros_like(near)
    floor = finite.min() - torch.clamp(finite.max() - finite.min(), min=1.0)
    near, here = (torch.where(torch.isneginf(r), floor, r) for r in both)
    return near - here

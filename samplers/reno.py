"""ReNO: gradient ascent of the reward in the starting noise, made for one- to four-step models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steering.registry import METHODS
from steering.samplers.noise_optimisation import NoiseOptimisation


@METHODS.register("reno")
@dataclass(frozen=True, kw_only=True)
class ReNO(NoiseOptimisation):
    """Reward-based noise optimisation (Eyring et al. 2024, arXiv 2406.04312).

    Defaults are the authors': SGD with Nesterov momentum 0.9, lr 5 at d = 16,384, the joint
    gradient of reward and radius penalty (0.01) clipped to norm 0.1, 50 iterations. With so small
    a clip every step has one length, and the scale of the reward matters against the penalty only.
    """

    name: ClassVar[str] = "reno"
    summary: ClassVar[str] = "gradient ascent in the starting noise"
    paper: ClassVar[str] = "Eyring et al. 2024 (2406.04312)"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # The published script: 50 iterations of one-step models, HyperSDXL at lr 10.
        "paper": {"n_iterations": 50, "lr": 5.0},
        "hyper-sdxl": {"n_iterations": 50, "lr": 10.0},
    }

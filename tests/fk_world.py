"""What the tests of Feynman-Kac steering share beside tests/populations.py."""

from __future__ import annotations

import torch

from steering.analytic import GaussianMixture
from steering.paths import Prediction

N = 128
CHECKPOINTS = (0.25, 0.5, 0.75)


def mean_rho(rho: torch.Tensor) -> torch.Tensor:
    """A potential of the user's own."""
    return rho.mean(0)


class Tweedie(GaussianMixture):
    """Knows the posterior mean only, like a network."""

    def predict(self, x, t, *, cond=0, grad=False):
        prediction = super().predict(x, t, cond=cond, grad=grad)
        return Prediction(prediction.x0, prediction.eps)

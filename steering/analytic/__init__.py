"""Models whose every law is known in closed form, and the exact answers to check methods against.

:class:`GaussianMixture` is a diffusion model without a network: exact predictions on any path,
exact reverse kernel, exact tilted law. :class:`FiniteChain` is a generator small enough to be
enumerated. Both are :class:`steering.model.Model`, so every method runs on them unchanged.
"""

from steering.analytic.chain import ChainPrediction, ChainStep, FiniteChain
from steering.analytic.masked import MaskedChain
from steering.analytic.mixture import ExactReverse, GaussianMixture, MixturePrediction
from steering.analytic.tilts import LinearReward, QuadraticReward, TableReward, Tilt

__all__ = [
    "ChainPrediction",
    "ChainStep",
    "ExactReverse",
    "FiniteChain",
    "GaussianMixture",
    "LinearReward",
    "MaskedChain",
    "MixturePrediction",
    "QuadraticReward",
    "TableReward",
    "Tilt",
]

"""How far the mean of a sample may be from its expectation."""

from __future__ import annotations

import math

import torch

BOUND = 5.0


def errors(sample: torch.Tensor, expected: float) -> float:
    """Distance of a sample mean from its expectation, in measured standard errors."""
    flat = sample.flatten()
    return float((flat.mean() - expected).abs() / (flat.std() / math.sqrt(len(flat))))

"""Steering methods, one file a method; importing this package registers them."""

from __future__ import annotations

from steering.samplers.best_of_n import BestOfN
from steering.samplers.fk import FK

__all__ = ["FK", "BestOfN"]

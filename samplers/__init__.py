"""Steering methods, one file a method; importing this package registers them."""

from __future__ import annotations

from steering.samplers.best_of_majority import BestOfMajority
from steering.samplers.best_of_n import BestOfN
from steering.samplers.code import CoDe
from steering.samplers.epf import EPF
from steering.samplers.fk import FK
from steering.samplers.svdd import SVDD

__all__ = ["EPF", "FK", "SVDD", "BestOfMajority", "BestOfN", "CoDe"]

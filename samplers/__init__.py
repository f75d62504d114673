"""Steering methods, one file a method; importing this package registers them."""

from __future__ import annotations

from steering.samplers.best_of_majority import BestOfMajority
from steering.samplers.best_of_n import BestOfN
from steering.samplers.code import CoDe
from steering.samplers.das import DAS
from steering.samplers.epf import EPF
from steering.samplers.evo import Evo
from steering.samplers.fk import FK
from steering.samplers.random_search import RandomSearch
from steering.samplers.rbf import RBF
from steering.samplers.search_over_paths import SearchOverPaths
from steering.samplers.svdd import SVDD
from steering.samplers.tds import TDS
from steering.samplers.zero_order import ZeroOrder

__all__ = [
    "DAS",
    "EPF",
    "FK",
    "RBF",
    "SVDD",
    "TDS",
    "BestOfMajority",
    "BestOfN",
    "CoDe",
    "Evo",
    "RandomSearch",
    "SearchOverPaths",
    "ZeroOrder",
]

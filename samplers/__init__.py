"""Steering methods, one file a method; importing this package registers them."""

from __future__ import annotations

from steering.samplers.auto import Auto
from steering.samplers.best_of_majority import BestOfMajority
from steering.samplers.best_of_n import BestOfN
from steering.samplers.carinox import CARINOX
from steering.samplers.code import CoDe
from steering.samplers.das import DAS
from steering.samplers.dno import DNO
from steering.samplers.dts import DTS, DTSStar
from steering.samplers.epf import EPF
from steering.samplers.evo import Evo
from steering.samplers.fk import FK
from steering.samplers.guidance import Guidance
from steering.samplers.guides import Guide
from steering.samplers.parallel_tempering import ParallelTempering
from steering.samplers.particle_gibbs import ParticleGibbs
from steering.samplers.random_search import RandomSearch
from steering.samplers.rbf import RBF
from steering.samplers.reflect import Critique, Reflect
from steering.samplers.reno import ReNO
from steering.samplers.search_over_paths import SearchOverPaths
from steering.samplers.svdd import SVDD
from steering.samplers.tds import TDS
from steering.samplers.tree import Tree
from steering.samplers.zero_order import ZeroOrder

__all__ = [
    "CARINOX",
    "DAS",
    "DNO",
    "DTS",
    "EPF",
    "FK",
    "RBF",
    "SVDD",
    "TDS",
    "Auto",
    "BestOfMajority",
    "BestOfN",
    "CoDe",
    "Critique",
    "DTSStar",
    "Evo",
    "Guidance",
    "Guide",
    "ParallelTempering",
    "ParticleGibbs",
    "RandomSearch",
    "ReNO",
    "Reflect",
    "SearchOverPaths",
    "Tree",
    "ZeroOrder",
]

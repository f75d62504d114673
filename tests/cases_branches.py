"""Three small settings of each branching, tempered or screened method for the contract."""

from __future__ import annotations

from steering.method import Method
from steering.samplers import EPF, SVDD, BestOfMajority, CoDe

CASES: dict[str, tuple[Method, ...]] = {
    "best_of_majority": (
        BestOfMajority(n=3),
        BestOfMajority(n=4, k=2, frequency="clusters", min_frequency=0.3),
        BestOfMajority(n=4, k=3, frequency="labels", min_frequency=0.0, eta=0.5),
    ),
    "svdd": (
        SVDD(n_particles=2, n_branches=3),
        SVDD(n_particles=3, n_branches=2, select="argmax", every=2, start=0.0, eta=0.7),
        SVDD(n_particles=4, n_branches=2, resample="ess", transition="flow_grpo"),
    ),
    "code": (
        CoDe(n_particles=2, n_branches=2, block=2),
        CoDe(n_particles=3, n_branches=2, block=2, block_mode="single", start=0.0),
        CoDe(n_particles=2, n_branches=2, block=3, select="softmax", resample="always"),
    ),
    "epf": (
        EPF(n_particles=3),
        EPF(n_particles=4, lookahead="apf", anneal="entropy", checkpoints=(0.2, 0.6)),
        EPF(n_particles=2, correct=False, anneal="base", resample="ess", eta=0.6),
    ),
}

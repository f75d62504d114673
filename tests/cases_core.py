"""Three small settings of each core method for the contract that all methods keep."""

from __future__ import annotations

from steering.samplers import FK, BestOfN

CASES = {
    "best_of_n": (BestOfN(n=3), BestOfN(n=5, select="soft", k=2), BestOfN(n=2, eta=0.5)),
    "fk": (
        FK(n_particles=3),
        FK(n_particles=4, potential="max", resample="always", checkpoints=(0.2, 0.6)),
        FK(n_particles=2, lookahead=1, n_draws=2),
    ),
}

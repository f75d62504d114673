"""Three small settings of each search method for the contract that all methods keep."""

from __future__ import annotations

from steering.samplers import RBF, Evo, RandomSearch, SearchOverPaths, ZeroOrder

CASES = {
    "random_search": (
        RandomSearch(rounds=2),
        RandomSearch(n=5, pool=1, growth=1, eta=0.5),
        RandomSearch(n=6, pool=1, growth=3),
    ),
    "zero_order": (
        ZeroOrder(n_neighbours=2, rounds=2),
        ZeroOrder(n_neighbours=1, rounds=3, restart="keep", cosine=0.7),
        ZeroOrder(n_neighbours=3, rounds=1, eta=0.5),
    ),
    "search_over_paths": (
        SearchOverPaths(n_particles=2, n_neighbours=2),
        SearchOverPaths(n_particles=1, n_neighbours=3, seed_level=0.2, delta_f=0.5, delta_b=0.9),
        SearchOverPaths(n_particles=3, n_neighbours=1, seed_level=0.8, eta=0.5),
    ),
    "evo": (
        Evo(n_particles=3, schedule=(0.0, 0.5), elites=1),
        Evo(n_particles=(4, 3, 2), schedule=(0.2, 0.6), elites=1, mutation="additive"),
        Evo(n_particles=3, schedule=(0.0, 0.0), elites=0, eta=0.0, archive=False),
    ),
    "rbf": (
        RBF(n_proposals=6, n_init=2, n_chains=2, steps=4, finish_steps=2),
        RBF(n_proposals=7, n_init=3, n_chains=1, grid="own", bar="level", batch=2, eta=0.5),
        RBF(
            n_proposals=8,
            n_init=2,
            n_chains=2,
            steps=5,
            quota=(1, 2, 1, 1),
            transition="rbf",
            grid="rbf",
            finish="none",
            forced="first",
        ),
    ),
}

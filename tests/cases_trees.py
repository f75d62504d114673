"""Three small settings of each tree and chain method for the contract that all methods keep."""

from __future__ import annotations

from steering.method import Method
from steering.samplers import DTS, DTSStar, ParallelTempering, ParticleGibbs

CASES: dict[str, tuple[Method, ...]] = {
    "dts": (
        DTS(trajectories=3, width=2),
        DTS(trajectories=4, width=1, branch_levels=(0.34,), widening=1.0, widening_power=0.8, k=3),
        DTS(trajectories=4, width=4, noise_levels=(0.7, 0.4), max_children=2, backup="mean"),
    ),
    "dts_star": (
        DTSStar(trajectories=3, width=2),
        DTSStar(trajectories=4, width=1, select="puct", k=2, backup="max"),
        DTSStar(trajectories=2, width=3, branch_levels=(0.0, 0.5), c_uct=0.0),
    ),
    "particle_gibbs": (
        ParticleGibbs(n_particles=3, iterations=2),
        ParticleGibbs(n_particles=2, iterations=3, resample="always", checkpoints=(0.2, 0.6)),
        ParticleGibbs(n_particles=3, iterations=3, ancestor_sampling=False, burn_in=1),
    ),
    "parallel_tempering": (
        ParallelTempering(n_particles=2, iterations=3),
        ParallelTempering(n_particles=3, iterations=4, move="tail", eta=1.0, cuts=(0.4, 0.6)),
        ParallelTempering(ladder=(0.2, 1.0, 1.0), iterations=2, blend=0.9, swap_every=2),
    ),
}

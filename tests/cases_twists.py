"""Three small settings of each gradient-steered method for the contract that all methods keep."""

from __future__ import annotations

from steering.samplers import DAS, TDS, Guidance

CASES = {
    "das": (
        DAS(n_particles=3),
        DAS(n_particles=2, tempering="adaptive", resample="always", micro_batch=1),
        DAS(n_particles=3, tempering="poly", start=0.3, clip_norm=1.0, checkpoint=True),
    ),
    "guidance": (
        Guidance(n_particles=2),
        Guidance(n_particles=1, space="state", normalise="unit", rho=0.1, recurrence=2),
        Guidance(n_particles=2, mu=0.05, n_iter=2, smoothing=0.1, n_draws=2, eta=0.5, start=0.3),
    ),
    "tds": (
        TDS(n_particles=3),
        TDS(n_particles=2, resample="always", start=0.5, micro_batch=1),
        TDS(n_particles=3, resample="never", twist_scale=0.5, eta=0.6),
    ),
}

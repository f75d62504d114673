"""Three small settings of each gradient-steered method for the contract that all methods keep."""

from __future__ import annotations

from steering.samplers import DAS, TDS

CASES = {
    "das": (
        DAS(n_particles=3),
        DAS(n_particles=2, tempering="adaptive", resample="always", micro_batch=1),
        DAS(n_particles=3, tempering="poly", start=0.3, clip_norm=1.0, checkpoint=True),
    ),
    "tds": (
        TDS(n_particles=3),
        TDS(n_particles=2, resample="always", start=0.5, micro_batch=1),
        TDS(n_particles=3, resample="never", twist_scale=0.5, eta=0.6),
    ),
}

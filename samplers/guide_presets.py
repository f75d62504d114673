"""Published settings of guidance, by name; see `samplers.guides`."""

from __future__ import annotations

GUIDES: dict[str, dict[str, object]] = {
    # Diffusion posterior sampling: the gradient divided by |f|, added to the state.
    "dps": {"space": "state", "normalise": "value"},
    # Loss-guided diffusion: the same with f averaged over noise of the size of the level.
    "lgd": {"space": "state", "normalise": "value", "smoothing": 1.0, "n_draws": 4},
    # FreeDoM: repeats every step after noising its result again. Its schedule is the authors', rho
    # and the number of repeats are ours.
    "freedom": {
        "space": "state",
        "schedule": "increase",
        "normalise": "unit",
        "recurrence": 2,
        "rho": 0.2,
    },
    # Manifold-preserving: one move of the estimate, no gradient through the network.
    "mpgd": {"rho": 0.0, "mu": 1.0},
    # Universal guidance: both moves change the score.
    "ugd": {"mu": 1.0, "n_iter": 4, "keep_eps": False, "recurrence": 2},
    # Defaults of the TFG authors' code, and their setting for style with SD1.5 and CLIP.
    "tfg": {
        "space": "state",
        "schedule": "increase",
        "mu": 1.0,
        "n_iter": 4,
        "smoothing": 0.01,
        "n_draws": 4,
    },
    "tfg-style": {
        "space": "state",
        "schedule": "increase",
        "rho": 0.25,
        "mu": 2.0,
        "n_iter": 4,
        "smoothing": 0.1,
    },
}

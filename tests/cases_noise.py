"""Small settings of the methods that optimise noise."""

from __future__ import annotations

from steering.samplers import CARINOX, DNO, ReNO

CASES = {
    "reno": (
        ReNO(n_iterations=3),
        ReNO(n_iterations=2, restarts=2, clip=None, lr=0.1, momentum=0.0),
        ReNO(n_iterations=3, eta=0.5, optimizer="adam", lr=0.05, regulariser="none"),
    ),
    "dno": (
        DNO(n_iterations=3),
        DNO(n_iterations=2, restarts=2, differentiate_last=2),
        DNO(n_iterations=2, estimator="hybrid", n_perturbations=2, perturbation=0.1),
    ),
    "carinox": (
        CARINOX(n_iterations=3, restarts=2),
        CARINOX(n_iterations=2, restarts=3, component_clip=1.0, clip=None, lr=0.2),
        CARINOX(n_iterations=2, restarts=1, checkpoint=True),
    ),
}

"""Small settings of the methods that decide from round to round."""

from __future__ import annotations

from steering.samplers import Auto, Reflect

CASES = {
    "reflect": (
        Reflect(rounds=2),
        Reflect(rounds=3, n=2, target_reward=10.0),
        Reflect(rounds=2, n=3, eta=0.5, target_reward=-0.01),
    ),
    "auto": (
        Auto(n=5, pilot=3),
        Auto(n=6, pilot=3, follow="best_of_n"),
        Auto(n=4, pilot=2, follow="fk", target_reward=5.0),
    ),
}

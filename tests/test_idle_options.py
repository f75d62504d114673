"""Options that another option makes useless are refused, not ignored."""

from __future__ import annotations

import pytest

from steering.errors import OptionError
from steering.samplers import CARINOX, DAS, DNO, FK, RBF, Auto, ParallelTempering, ReNO

AUTHORS = {"mode": "authors"}
TAIL = {"move": "tail", "eta": 1.0}


@pytest.mark.parametrize(
    ("cls", "setting", "idle"),
    [
        (FK, AUTHORS, {"lookahead": 1}),
        (FK, AUTHORS, {"n_draws": 2}),
        (FK, AUTHORS, {"damping": "measured"}),
        (FK, AUTHORS, {"ess_threshold": 0.9}),
        (FK, AUTHORS, {"resampler": "residual"}),
        (RBF, {"level_times": (1.0, 0.5, 0.0)}, {"grid": "rbf"}),
        (RBF, {"level_times": (1.0, 0.5, 0.0)}, {"steps": 5}),
        (RBF, {"finish": "none"}, {"finish_steps": 3}),
        (DAS, {"tempering": "adaptive"}, {"gamma": 0.1}),
        (DAS, {"tempering": "none"}, {"gamma": 0.1}),
        (DAS, {"tempering": "none"}, {"power": 2.0}),
        (DAS, {}, {"power": 2.0}),
        (ParallelTempering, {}, {"cuts": (0.5,)}),
        (ParallelTempering, TAIL, {"blend": 0.7}),
        (DNO, {}, {"n_perturbations": 8}),
        (DNO, {}, {"perturbation": 0.1}),
        (ReNO, {"optimizer": "adam"}, {"momentum": 0.5}),
        (CARINOX, {"regulariser": "none"}, {"reg_weight": 0.5}),
        (Auto, {"follow": "fk"}, {"rank_threshold": 0.2}),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(cls, setting, idle):
    cls(**setting)
    (name,) = idle
    with pytest.raises(OptionError, match=rf"{name}"):
        cls(**setting, **idle)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FK, {"mode": "authors", "damping": "none"}),
        (FK, {"lookahead": 1, "n_draws": 2, "damping": "measured", "resampler": "residual"}),
        (DAS, {"gamma": 0.1}),
        (DAS, {"tempering": "poly", "gamma": 0.1, "power": 2.0}),
        (DNO, {"estimator": "hybrid", "n_perturbations": 8, "perturbation": 0.1}),
        (ReNO, {"momentum": 0.5}),
        (ParallelTempering, {"blend": 0.7}),
        (ParallelTempering, {"cuts": (0.5,), **TAIL}),
        (Auto, {"rank_threshold": 0.2}),
    ],
)
def test_where_it_counts_it_is_taken(cls, options):
    method = cls(**options)
    assert all(getattr(method, name) == value for name, value in options.items())

"""Options that another option makes useless are refused, not ignored."""

from __future__ import annotations

from dataclasses import fields

import pytest

from steering.errors import OptionError
from steering.method import build_method, plain
from steering.registry import METHODS
from steering.samplers import (
    CARINOX,
    DAS,
    DNO,
    DTS,
    EPF,
    FK,
    RBF,
    SVDD,
    TDS,
    Auto,
    BestOfMajority,
    BestOfN,
    CoDe,
    DTSStar,
    Evo,
    Guidance,
    Guide,
    ParallelTempering,
    ParticleGibbs,
    Reflect,
    ReNO,
    ZeroOrder,
)
from tests.search_world import BOWL, plane, steer

AUTHORS = {"mode": "authors"}
TAIL = {"move": "tail", "eta": 1.0}
FLOW = {"transition": "flow_grpo"}
ALWAYS, NEVER = {"resample": "always"}, {"resample": "never"}
PLAIN = {"potential": "none"}
SHARES = {"noise_levels": (0.8, 0.5)}
ONE = {"n_branches": 1}
STILL = {"n_neighbours": 0}
COUNTED = {"frequency_fn": len}


def never(*_):
    return False


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
        (Auto, {"follow": "best_of_n"}, {"reward_scale": 2.0}),
        (FK, FLOW, {"eta": 0.5}),
        (BestOfN, FLOW, {"eta": 1.0}),
        (Guidance, FLOW, {"eta": 1.0}),
        (FK, PLAIN, {"lookahead": 1}),
        (FK, PLAIN, {"n_draws": 2}),
        (FK, PLAIN, {"damping": "none"}),
        (FK, PLAIN, {"checkpoints": (0.5,)}),
        (FK, PLAIN, SHARES),
        (FK, PLAIN, ALWAYS),
        (FK, {"lookahead": 1}, {"damping": "measured"}),
        (FK, {"n_draws": 2}, {"damping": "measured"}),
        (FK, PLAIN, {"ess_threshold": 0.9}),
        (FK, PLAIN, {"resampler": "residual"}),
        (FK, SHARES, {"checkpoints": (0.5,)}),
        (ParticleGibbs, SHARES, {"checkpoints": (0.5,)}),
        (DTS, SHARES, {"branch_levels": (0.5,)}),
        (DTSStar, SHARES, {"branch_levels": ()}),
        *[
            (cls, NEVER, idle)
            for cls in (FK, TDS, DAS, SVDD, CoDe)
            for idle in ({"resampler": "residual"}, {"ess_threshold": 0.9})
        ],
        (DAS, {"tempering": "adaptive", **NEVER}, {"resampler": "residual"}),
        *[(cls, ALWAYS, {"ess_threshold": 0.9}) for cls in (FK, TDS, DAS, SVDD, ParticleGibbs)],
        (CoDe, {"select": "softmax", **ALWAYS}, {"ess_threshold": 0.9}),
        (EPF, {"anneal": "off"}, {"early_phase": 0.9}),
        (EPF, {"anneal": "off"}, {"ess_threshold": 0.9}),
        (EPF, {}, {"defence": 0.1}),
        (SVDD, {"select": "argmax"}, {"damping": "none"}),
        (CoDe, {}, {"damping": "none"}),
        (SVDD, ONE, {"every": 2}),
        (BestOfN, {}, {"reward_scale": 2.0}),
        (BestOfN, {"n": 4, "k": 2, "select": "top_k"}, {"reward_scale": 2.0}),
        (BestOfMajority, {"frequency": "labels"}, {"radius": 1.0}),
        (BestOfMajority, COUNTED, {"radius": 1.0}),
        (BestOfMajority, COUNTED, {"embed": len}),
        (BestOfMajority, COUNTED, {"frequency": "labels"}),
        (ZeroOrder, STILL, {"rounds": 5}),
        (ZeroOrder, STILL, {"cosine": 0.5}),
        (ZeroOrder, STILL, {"restart": "keep"}),
        (ZeroOrder, STILL, {"reward_max": 1.0}),
        (Reflect, {"critic": never}, {"target_reward": 1.0}),
        (Reflect, {"critic": never}, {"memory": 2}),
        (Reflect, {"rewriter": never}, {"workers": 2}),
        *[
            (cls, setting, idle)
            for cls in (Guide, Guidance)
            for setting, idle in (
                ({}, {"n_iter": 2}),
                ({}, {"keep_eps": False}),
                ({}, {"spread": "posterior"}),
                ({}, {"data_std": 0.5}),
                ({"smoothing": 0.1}, {"data_std": 0.5}),
                ({"rho": 0.0, "mu": 1.0}, {"space": "state"}),
            )
        ],
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
        (FK, {"lookahead": 1, "n_draws": 2, "damping": "none", "resampler": "residual"}),
        (DAS, {"gamma": 0.1}),
        (DAS, {"tempering": "poly", "gamma": 0.1, "power": 2.0}),
        (DNO, {"estimator": "hybrid", "n_perturbations": 8, "perturbation": 0.1}),
        (ReNO, {"momentum": 0.5}),
        (ParallelTempering, {"blend": 0.7}),
        (ParallelTempering, {"cuts": (0.5,), **TAIL}),
        (Auto, {"rank_threshold": 0.2}),
        (Auto, {"reward_scale": 2.0}),
        (Auto, {"follow": "best_of_n", "reward_scale": 2.0, "guidance": Guide()}),
        (FK, {"eta": 1.0, **FLOW}),
        (FK, {"resampler": "residual", **ALWAYS}),
        (FK, {"checkpoints": (0.5,), "ess_threshold": 0.9}),
        (DAS, {"tempering": "adaptive", "ess_threshold": 0.9, **NEVER}),
        (SVDD, {"every": 2, **ONE, **ALWAYS}),
        (CoDe, {"select": "softmax", "damping": "none", "block": 2}),
        (SVDD, {"start": 0.5, "damping": "none", **ONE}),  # a limit, as in a sweep over M
        (BestOfN, {"reward_scale": 2.0, "guidance": Guide()}),
        (BestOfN, {"reward_scale": 2.0, "select": "soft"}),
        (EPF, {"early_phase": 0.9, "ess_threshold": 0.9}),
        (EPF, {"anneal": "off", "resample": "ess", "ess_threshold": 0.9}),
        (EPF, {"lookahead": "apf", "defence": 0.1}),
        (BestOfMajority, {"radius": 1.0, "embed": len}),
        (BestOfMajority, {"frequency": "labels", "embed": len}),
        (ZeroOrder, {"n_neighbours": 1, "rounds": 5, "restart": "keep", "reward_max": 1.0}),
        (Reflect, {"critic": never, "workers": 2}),
        (Reflect, {"rewriter": never, "memory": 2, "target_reward": 1.0}),
        (Guide, {"mu": 0.1, "n_iter": 2, "keep_eps": False}),
        (Guide, {"smoothing": 0.1, "spread": "posterior", "data_std": 0.5}),
    ],
)
def test_where_it_counts_it_is_taken(cls, options):
    method = cls(**options)
    assert all(getattr(method, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    ("schedule", "idle"),
    [((0.0,), {"mutation": "additive"}), ((0.0,), {"strength": 0.5}), ((0.4,), {"beta": 0.5})],
)
def test_mutations_of_nodes_that_evo_does_not_start_from(schedule, idle):
    """Which nodes those are, the grid says."""
    (name,) = idle
    with pytest.raises(OptionError, match=name):
        steer(plane(), BOWL, Evo(n_particles=4, schedule=schedule, **idle))
    both = steer(plane(), BOWL, Evo(n_particles=4, schedule=(0.0, 0.4), **idle))
    assert both.ledger.nfe > 0


@pytest.mark.parametrize("name", METHODS.names())
def test_no_preset_holds_an_idle_option(name):
    for preset in getattr(METHODS.get(name), "presets", {}):
        build_method(f"{name}/{preset}")


@pytest.mark.parametrize("follow", ["auto", "best_of_n", "fk"])
def test_auto_hands_on_what_counts(follow):
    """Neither an eta beside another transition nor a scale that it would refuse itself."""
    method = Auto(n=6, pilot=3, follow=follow, **FLOW)
    result = steer(plane(), BOWL, method)
    assert result.ledger.reward_calls > 6


@pytest.mark.parametrize(
    ("method", "options", "dropped"),
    [
        ("fk/flow", {"noise_levels": [0.5, 0.3]}, "checkpoints"),
        ("das/sd15", {"tempering": "adaptive"}, "gamma"),
        ("fk", {"guidance": {"preset": "tfg", "mu": 0.0}}, None),
    ],
)
def test_what_a_preset_says_gives_way_to_what_makes_it_useless(method, options, dropped):
    made = build_method(method, options)
    assert all(plain(getattr(made, k)) == v for k, v in options.items() if k != "guidance")
    if dropped is None:
        assert made.guidance == Guide(
            space="state", schedule="increase", smoothing=0.01, n_draws=4
        )
    else:
        name, _, preset = method.partition("/")
        usual = {f.name: f.default for f in fields(METHODS.get(name))}
        assert METHODS.get(name).presets[preset][dropped] != usual[dropped]
        assert getattr(made, dropped) == usual[dropped]


def test_what_the_user_says_does_not_give_way():
    with pytest.raises(OptionError, match=r"gamma=0\.3 has no meaning"):
        build_method("das/sd15", {"tempering": "adaptive", "gamma": 0.3})
    with pytest.raises(OptionError, match="n_iter=2 has no meaning"):
        build_method("fk", {"guidance": {"preset": "tfg", "mu": 0.0, "n_iter": 2}})

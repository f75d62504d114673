"""Entropic particle filtering: its temperature, the corrected law, its limits, its cost."""

from __future__ import annotations

import math

import pytest
import torch

from steering.errors import BudgetError, OptionError, SteeringError
from steering.method import build_method
from steering.particles import log_mean_exp
from steering.requests import Denoise
from steering.samplers import EPF, FK, BestOfN
from steering.samplers.epf import temperature
from tests.populations import (
    LINE,
    TABLE,
    R,
    by_slot,
    chain,
    check_law,
    check_ledger,
    guided,
    line,
    plan_of,
    repeated,
    served,
    steer,
)

RULES = ("ess", "entropy", "base")
CHECKPOINTS = (0.25, 0.5, 0.75)

# --- the temperature ---------------------------------------------------------------------------


def weights(n: int, spread: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(spread * torch.randn(n, dtype=torch.float64, generator=generator), 0)


@pytest.mark.parametrize("rule", ["off", *RULES])
def test_the_temperature_never_sharpens_and_rests_where_it_should(rule: str) -> None:
    acted = 0
    for seed in range(40):
        w = weights(2 + seed % 7, 0.1 * seed, seed)
        share = float(1.0 / w.square().sum()) / len(w)
        for u in (0.0, 0.2, 0.49, 0.5, 0.9, 1.0):
            tau = temperature(w, u, rule)
            assert 1.0 <= tau < math.inf
            if rule == "off" or share >= 0.5 or u >= 0.5:
                assert tau == 1.0
            acted += tau > 1.0
            assert temperature(w, u, rule, 1.0, 1.0) >= 1.0
    assert acted > 20 or rule == "off"


def test_the_temperature_by_hand() -> None:
    w = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    size = 1.0 / (0.97**2 + 3 * 0.01**2)
    assert temperature(w, 0.2, "ess") == pytest.approx(0.8 * 4 / size)
    entropy = -(0.97 * math.log(0.97) + 0.03 * math.log(0.01)) / math.log(4)
    assert temperature(w, 0.2, "entropy") == pytest.approx(1 / (entropy + (1 - entropy) * 0.2))
    assert temperature(w, 0.2, "base") == pytest.approx(1.8)
    one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert temperature(one, 0.25, "entropy") == pytest.approx(4.0)
    assert temperature(one, 0.0, "entropy") == pytest.approx(1e6)
    assert temperature(torch.ones(1, dtype=torch.float64), 0.0, "entropy") == 1.0
    assert temperature(w, 0.2, "ess", ess_threshold=0.1) == 1.0
    assert temperature(w, 0.2, "ess", early_phase=0.2) == 1.0
    even = torch.full((4,), 0.25, dtype=torch.float64)
    assert temperature(even, 0.2, "ess", ess_threshold=1.0) == 1.0


# --- the law -----------------------------------------------------------------------------------

# Annealing acts at every checkpoint.
HOT = {"ess_threshold": 1.0, "early_phase": 1.0}
# Less weight on early rewards, so that annealing has less to do; one checkpoint early enough.
DAMPED = {"damping": "measured", "checkpoints": (0.13, 0.25, 0.5)}
LAWS = {
    **{f"line-{rule}": ("line", {"anneal": rule, "reward_scale": 0.7}) for rule in RULES},
    "line-default": ("line", {"reward_scale": 0.7, "ess_threshold": 0.5, "early_phase": 0.5}),
    "line-apf": ("line", {"anneal": "off", "reward_scale": 0.7, "lookahead": "apf"}),
    "plane-apf-plain": ("plane", {"anneal": "off", "lookahead": "apf", "defence": 0.0}),
    "line-ess-only": ("line", {"anneal": "base", "reward_scale": 0.7, "resample": "ess"}),
    "plane-apf": ("plane", {"lookahead": "apf", "anneal": "base"}),
    "cloud": ("cloud", {"anneal": "base", "resampler": "ssp"}),
    "cloud-apf": ("cloud", {"anneal": "entropy", "lookahead": "apf"}),
    "chain": ("chain", {"anneal": "base"}),
    "chain-apf": ("chain", {"anneal": "ess", "lookahead": "apf", "resampler": "killing"}),
    "line-damped": ("line", {**DAMPED, "reward_scale": 0.7}),
    "plane-damped-apf": ("plane", {**DAMPED, "lookahead": "apf", "anneal": "base"}),
    "chain-damped": ("chain", {**DAMPED, "anneal": "base", "resample": "ess"}),
}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_corrected_resampling_aims_at_the_tilted_law(law: str) -> None:
    """Measured: at most 1.8 standard errors, for Z and Z f."""
    world, options = LAWS[law]
    rule = {"n_particles": 128, "reward_scale": 1.0, "checkpoints": CHECKPOINTS}
    rule |= HOT if options.get("anneal") != "off" else {}
    results = check_law(world, EPF(**{**rule, "damping": "none", **options}))
    assert sum(len(r.trace.ancestors) for r in results) > R
    hot = [tau > 1.0 for r in results for tau in r.trace.column("tau")]
    if options.get("anneal") != "off" and law != "line-default" and "damped" not in law:
        assert sum(hot) >= R, sum(hot)


def test_uncorrected_tempering_aims_at_a_flatter_law() -> None:
    """Base mean -0.75, target 1.81; measured 1.03 without the residual weight."""
    means = {}
    for correct in (True, False):
        rule = {"n_particles": 128, "reward_scale": 0.7, "checkpoints": (0.5, 0.7, 0.85), **HOT}
        method = EPF(anneal="base", correct=correct, damping="none", **rule)
        results = repeated(line, LINE, method)
        means[correct] = [float(r.weights @ r.samples[:, 0]) for r in results]
        assert all((r.log_z is None) == (not correct) for r in results)
    target = float(line().tilted(LINE, 0.7).moments()[0])
    flat = torch.tensor(means[False])
    assert float(flat.mean()) < target - 10.0 * float(flat.std()) / math.sqrt(R)
    assert abs(sum(means[True]) / R - target) < 0.1


def test_the_defence_keeps_the_lookahead_from_doing_harm() -> None:
    """Variance of ln Z, measured: 0.17 without look-ahead, 0.88 with the plain one, 0.22."""
    variances = {}
    for defence in (0.0, 0.5, 1.0):
        rule = {"n_particles": 64, "reward_scale": 1.5, "checkpoints": CHECKPOINTS}
        rule["damping"] = "none"
        method = EPF(anneal="off", lookahead="apf", defence=defence, **rule)
        results = repeated(line, LINE, method)
        variances[defence] = float(torch.tensor([r.log_z for r in results]).var())
    assert variances[0.5] < 2.0 * variances[1.0]
    assert variances[0.5] < 0.5 * variances[0.0]


def test_damping_steadies_a_reward_with_many_peaks() -> None:
    """Spread of ln Z, measured: 0.60 undamped, 0.46 damped."""

    def peaks(images: torch.Tensor) -> torch.Tensor:
        return (torch.cos(3.0 * images) - 0.1 * images.square()).sum(1)

    spreads = []
    for damped in ("none", "measured"):
        method = EPF(n_particles=16, reward_scale=2.0, damping=damped)
        results = repeated(line, peaks, method)
        spreads.append(float(torch.tensor([r.log_z for r in results]).std()))
    assert spreads[1] < 0.9 * spreads[0]


def test_the_lookahead_has_noise_of_its_own() -> None:
    """Where a model only knows random moves, a look-ahead is one: not the move to be made."""
    method = EPF(n_particles=40, reward_scale=1.0, checkpoints=(0.34, 0.5), lookahead="apf")
    _, requests = served(chain(), method, lambda x: torch.zeros(len(x)))
    asked = [r for r in requests if isinstance(r, Denoise)]
    node = chain().grid().times[3]
    ahead, arrived = (r.x for r in asked if r.t == node)
    assert ahead.shape == arrived.shape
    assert 0.2 < float((ahead == arrived).double().mean()) < 1.0


def test_a_full_defence_is_no_lookahead() -> None:
    rule = {"n_particles": 16, "reward_scale": 1.5, "checkpoints": CHECKPOINTS, **HOT}
    one = steer(line(), LINE, EPF(lookahead="apf", defence=1.0, **rule))
    two = steer(line(), LINE, EPF(**rule))
    assert one.trace.ancestors == two.trace.ancestors
    assert torch.equal(one.samples, two.samples)
    assert one.log_z == pytest.approx(two.log_z, abs=1e-9)


# Shares of the potential before steps 2, 4, 6 and 8 of 10; at node 9 it is all of it.
SHARES = {"none": [1.0] * 5, "measured": [0.36, 0.72, 0.9, 0.95, 0.975]}


@pytest.mark.parametrize("damped", sorted(SHARES))
@pytest.mark.parametrize("rule", [*RULES, "off"])
@pytest.mark.parametrize("resample", ["always", "ess"])
@pytest.mark.parametrize("lookahead", ["none", "apf"])
def test_weights_follow_from_the_trace(
    rule: str, resample: str, lookahead: str, damped: str
) -> None:
    """The recursion again, from the rewards, look-aheads and ancestors that the run reports."""
    n, scale, shares = 12, 1.3, SHARES[damped]
    method = EPF(
        n_particles=n,
        reward_scale=scale,
        checkpoints=(0.2, 0.4, 0.6, 0.8),
        anneal=rule,
        resample=resample,
        lookahead=lookahead,
        damping=damped,
        **({"defence": 0.25} if lookahead == "apf" else {}),
    )
    seen = set()
    for seed in range(3):
        result = steer(line(steps=10), LINE, method, seed=seed)
        log_w, phi = torch.zeros(n).double(), torch.zeros(n).double()
        events = [e for e in result.trace.events if "checkpoint" in e]
        assert [e["checkpoint"] for e in events] == [2, 4, 6, 8]
        for k, event in enumerate(events):
            rho = shares[k] * scale * torch.tensor(event["rewards"], dtype=torch.float64)
            log_w, phi = log_w + rho - phi, rho
            log_p = log_w.clone()
            if lookahead == "apf":
                ahead = torch.tensor(event["ahead"], dtype=torch.float64)
                ahead = shares[k + 1] * scale * ahead
                eta = torch.exp(ahead - rho)
                mean = torch.softmax(log_w, 0) @ eta
                log_p = log_p + torch.log(0.75 * eta + 0.25 * mean)
            share = torch.softmax(log_p, 0)
            size = float(1 / share.square().sum())
            assert event["ess"] == pytest.approx(size)
            assert event["tau"] == pytest.approx(temperature(share, event["step"] / 10, rule))
            seen.add(event["tau"] > 1.0)
            assert ("ancestors" in event) == (resample == "always" or size < 0.5 * n)
            if "ancestors" in event:
                a = torch.tensor(event["ancestors"])
                p = torch.softmax(log_p / event["tau"], 0)
                log_w, phi = (log_w - torch.log(n * p))[a], phi[a]
        log_w = log_w + scale * result.rewards[result.slots.argsort()] - phi
        found = result.log_weights[result.slots.argsort()]
        assert torch.allclose(found, log_w, rtol=0, atol=1e-9)
        assert result.log_z == pytest.approx(log_mean_exp(log_w), abs=1e-9)
    assert rule == "off" or seen == {True, False}


# --- limits ------------------------------------------------------------------------------------

MODELS = {"exact": line, "path": lambda: line(kernel="path"), "chain": chain}
LIMITS = {
    "reward_scale 0": {"reward_scale": 0.0, "n_particles": 8},
    "reward_scale 0, apf": {"reward_scale": 0.0, "n_particles": 8, "lookahead": "apf"},
    "one particle": {"n_particles": 1},
    "one particle, apf": {"n_particles": 1, "lookahead": "apf", "anneal": "entropy"},
    "no checkpoint": {"checkpoints": (), "n_particles": 8},
}


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("limit", sorted(LIMITS))
def test_limits_are_the_base_sampler_bit_for_bit(model: str, limit: str) -> None:
    options = {"reward_scale": 3.0, **LIMITS[limit]}
    reward = TABLE if model == "chain" else LINE
    base = BestOfN(n=options["n_particles"], select="all", eta=1.0)
    base = steer(MODELS[model](), reward, base, seed=3)
    ours = steer(MODELS[model](), reward, EPF(**options), seed=3)
    assert torch.equal(by_slot(ours), by_slot(base))
    assert torch.equal(ours.rewards, base.rewards)
    assert torch.allclose(
        ours.log_weights, options["reward_scale"] * ours.rewards, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_constant_rewards_change_nothing(rule: str, correct: bool) -> None:
    base = steer(line(), LINE, BestOfN(n=8, select="all", eta=1.0))
    method = EPF(n_particles=8, anneal=rule, correct=correct, lookahead="apf", **HOT)
    ours = steer(line(), lambda images: torch.full((len(images),), 1.5), method)
    assert set(ours.trace.column("tau")) == {1.0}
    for told in ("rewards", "ahead"):  # undamped
        for found in ours.trace.column(told):
            assert list(found) == pytest.approx([1.5] * 8)
    assert torch.equal(by_slot(ours), base.samples[base.slots.argsort()])
    assert ours.log_z == (pytest.approx(15.0) if correct else None)


@pytest.mark.parametrize("damped", sorted(SHARES))
@pytest.mark.parametrize("resample", ["always", "ess"])
def test_without_annealing_it_is_fk_bit_for_bit(resample: str, damped: str) -> None:
    rule = {"n_particles": 16, "reward_scale": 1.0, "checkpoints": CHECKPOINTS}
    rule["damping"] = damped
    ours = steer(line(), LINE, EPF(anneal="off", resample=resample, **rule))
    fk = steer(line(), LINE, FK(resample=resample, **rule))
    assert len(fk.trace.ancestors) > 0
    assert ours.trace.ancestors == fk.trace.ancestors
    assert torch.equal(ours.samples, fk.samples)
    assert ours.log_z == pytest.approx(fk.log_z, abs=1e-9)


def test_a_constant_added_to_the_reward_changes_nothing_but_z() -> None:
    method = EPF(n_particles=16, reward_scale=2.0, lookahead="apf")
    one = steer(line(), LINE, method)
    two = steer(line(), lambda images: LINE(images) + 4.0, method)
    assert one.trace.ancestors == two.trace.ancestors
    assert torch.equal(by_slot(one), by_slot(two))
    assert two.log_z - one.log_z == pytest.approx(8.0, abs=1e-5)


# --- cost, budget, options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"lookahead": "apf"}, {"checkpoints": (0.3, 0.31, 0.9), "lookahead": "apf"}],
)
def test_the_ledger_agrees_with_the_forecast(options: dict) -> None:
    check_ledger(EPF(n_particles=5, reward_scale=1.0, **options))


def test_cost_by_hand() -> None:
    """7 steps at 2, 2, 2, 3, 3, 3, 3 rows, checkpoints before steps 1, 3 and 5."""
    rule = {"n_particles": 5, "checkpoints": (0.15, 0.4, 0.7)}
    cost = check_ledger(EPF(**rule))
    assert (cost.nfe, cost.decodes, cost.reward_calls) == (5 * 18, 5 * 4, 5 * 4)
    ahead = check_ledger(EPF(lookahead="apf", **rule))
    # Look-aheads go to nodes 3, 5 and 6.
    assert (ahead.nfe, ahead.decodes, ahead.reward_calls) == (5 * (18 + 9), 5 * 7, 5 * 7)


def test_budgets_are_filled_and_refused_before_the_first_call() -> None:
    each = EPF(n_particles=1, lookahead="apf").cost(plan_of(guided(), EPF())).nfe
    assert steer(guided(), LINE, EPF(lookahead="apf"), nfe=7 * each + 1).ledger.nfe == 7 * each
    model = guided()
    with pytest.raises(BudgetError, match="one particle needs 18 here"):
        steer(model, LINE, EPF(), nfe=17)
    with pytest.raises(BudgetError, match="epf with 9 particles needs nfe=162"):
        steer(model, LINE, EPF(n_particles=9), nfe=161)
    assert model.rows == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_particles": 0}, "n_particles"),
        ({"anneal": "hot"}, "anneal"),
        ({"lookahead": "far"}, "lookahead"),
        ({"damping": "some"}, "damping"),
        ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"early_phase": -0.1}, "early_phase"),
        ({"defence": 1.1}, "defence"),
        ({"checkpoints": (1.0,)}, "checkpoints"),
        ({"resampler": "sytematic"}, "systematic"),
        ({"reward_scale": -1.0}, "reward_scale"),
        ({"eta": 0.0}, "deterministic"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EPF(**options)


def test_preset_and_target() -> None:
    authors = build_method("epf/authors", {"n_particles": 2})
    assert not authors.correct
    assert (authors.damping, EPF().damping) == ("none", "measured")
    assert authors.target == "heuristic"
    assert EPF().target == EPF.target == "tilted"


@pytest.mark.parametrize("lookahead", ["none", "apf"])
def test_previews_without_weight_are_dropped_and_the_rest_goes_on(lookahead: str) -> None:
    def picky(images: torch.Tensor) -> torch.Tensor:
        return torch.where(images[:, 0] < -1.0, -torch.inf, images[:, 0])

    result = steer(line(), picky, EPF(n_particles=32, reward_scale=1.0, lookahead=lookahead))
    assert not bool(torch.isnan(result.log_weights).any())
    assert math.isfinite(result.log_z)
    with pytest.raises(SteeringError, match="All 6 particles have weight zero"):
        steer(line(), lambda images: torch.full((len(images),), -torch.inf), EPF(n_particles=6))

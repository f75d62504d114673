"""CoDe: blocks against best-of-N and SVDD, the weighted rule, references, cost."""

from __future__ import annotations

import pytest
import torch

from steering.errors import BudgetError, OptionError
from steering.method import build_method
from steering.requests import Denoise
from steering.samplers import SVDD, BestOfN, CoDe
from tests.populations import (
    BOWL,
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
    plane,
    repeated,
    served,
    steer,
)

MODELS = {"exact": line, "path": lambda: line(kernel="path"), "chain": chain}
LAWS = {
    "line": ("line", {"n_particles": 96, "reward_scale": 0.7, "block": 3, "start": 0.0}),
    "line-single": (
        "line",
        {"n_particles": 96, "reward_scale": 0.7, "block": 2, "block_mode": "single"},
    ),
    "plane": ("plane", {"block": 2, "resample": "always", "start": 0.0}),
    "cloud": ("cloud", {"block": 2, "start": 0.0}),
    "cloud-single": ("cloud", {"block": 2, "block_mode": "single", "resample": "always"}),
    "chain": ("chain", {"block": 2, "start": 0.0}),
}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_weighted_softmax_aims_at_the_tilted_law(law: str) -> None:
    """Measured: at most 1.2 standard errors, for Z and Z f."""
    world, options = LAWS[law]
    options = {"n_particles": 64, "n_branches": 3, "reward_scale": 1.0, **options}
    results = check_law(world, CoDe(select="softmax", **options))
    if "resample" in options:
        assert sum(len(r.trace.ancestors) for r in results) >= 2 * R


# --- limits ------------------------------------------------------------------------------------


def rewards_of(model: str):
    return TABLE if model == "chain" else LINE


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("options", [{"block": 99}, {"block": 2, "start": 1.0}])
def test_one_block_is_best_of_n_bit_for_bit(model: str, options: dict) -> None:
    n, m = 3, 5
    reward = rewards_of(model)
    everything = steer(MODELS[model](), reward, BestOfN(n=n * m, select="all", eta=1.0), seed=3)
    rewards = everything.rewards[everything.slots.argsort()].reshape(n, m)
    samples = by_slot(everything).reshape(n, m, -1)
    method = CoDe(n_particles=n, n_branches=m, reward_scale=1.0, **options)
    ours = steer(MODELS[model](), reward, method, seed=3)
    best = rewards.argmax(1)
    assert torch.equal(by_slot(ours), samples[torch.arange(n), best])
    assert torch.equal(ours.rewards[ours.slots.argsort()], rewards.max(1).values)
    assert ours.ledger.nfe == everything.ledger.nfe
    assert ours.ledger.reward_calls == everything.ledger.reward_calls
    one = steer(MODELS[model](), reward, CoDe(n_particles=1, n_branches=m, **options), seed=3)
    alone = steer(MODELS[model](), reward, BestOfN(n=m, eta=1.0), seed=3)
    assert torch.equal(one.samples, alone.samples)


def test_one_block_of_the_weighted_rule_is_importance_sampling() -> None:
    whole = steer(line(), LINE, BestOfN(n=30, select="all", reward_scale=0.7, eta=1.0), seed=3)
    rule = {"select": "softmax", "reward_scale": 0.7, "block": 99}
    ours = steer(line(), LINE, CoDe(n_particles=6, n_branches=5, **rule), seed=3)
    assert ours.log_z == pytest.approx(whole.log_z, abs=1e-12)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("select", ["softmax", "argmax"])
def test_single_steps_are_svdd_bit_for_bit(model: str, select: str) -> None:
    rule = {"n_particles": 3, "n_branches": 4, "reward_scale": 1.0, "select": select, "start": 0.4}
    for every in (1, 2):
        svdd = steer(MODELS[model](), rewards_of(model), SVDD(every=every, **rule), seed=5)
        code = CoDe(block=every, block_mode="single", **rule)
        code = steer(MODELS[model](), rewards_of(model), code, seed=5)
        assert torch.equal(code.samples, svdd.samples)
        assert code.log_z == svdd.log_z
        assert code.ledger.nfe == svdd.ledger.nfe


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("mode", ["full", "single"])
def test_one_candidate_is_the_base_sampler_bit_for_bit(model: str, mode: str) -> None:
    base = BestOfN(n=6, select="all", eta=1.0)
    base = steer(MODELS[model](), rewards_of(model), base, seed=3)
    method = CoDe(n_particles=6, n_branches=1, block=2, block_mode=mode, start=0.0)
    ours = steer(MODELS[model](), rewards_of(model), method, seed=3)
    assert torch.equal(by_slot(ours), by_slot(base))
    assert ours.ledger.nfe == base.ledger.nfe
    assert ours.ledger.reward_calls == 6


@pytest.mark.parametrize("select", ["softmax", "argmax"])
def test_reward_scale_zero_has_the_law_of_the_base(select: str) -> None:
    method = CoDe(n_particles=4000, n_branches=3, reward_scale=0.0, select=select, block=2)
    result = steer(line(steps=5), LINE, method)
    assert float(result.log_weights.abs().max()) < 1e-12
    assert line().deviation(result.samples) < 5.0


# --- what blocks do ----------------------------------------------------------------------------


def test_argmax_approaches_the_optimum_of_a_quadratic() -> None:
    means = []
    for m in (1, 4, 16, 64):
        rule = {"n_particles": 64, "n_branches": m, "block": 3, "start": 0.0, "reward_scale": 1.0}
        means.append(float(steer(plane(steps=12), BOWL, CoDe(**rule)).rewards.mean()))
    assert means == sorted(means)
    assert means[0] < -1.5
    assert means[-1] > -0.05


def test_shorter_blocks_steer_harder() -> None:
    """At the same network rows: blocks of the whole walk (best-of-N), of 4 and of 2 steps."""
    means = []
    for block in (99, 4, 2):
        method = CoDe(n_particles=16, n_branches=4, block=block, start=0.0, reward_scale=1.0)
        results = repeated(lambda prompts: plane(prompts, steps=12), BOWL, method)
        means.append(sum(float(r.rewards.mean()) for r in results) / R)
        assert {r.ledger.nfe for r in results} == {16 * 4 * 12}
    assert means[0] + 0.02 < means[1]
    assert means[1] + 0.02 < means[2]


def test_blocks_begin_and_end_where_they_should() -> None:
    grid = line(steps=12).grid()

    def nodes(**options) -> list[tuple[int, int, bool]]:
        return [tuple(s) for s in CoDe(**options).segments(grid)]

    full = nodes(block=5, start=0.0)
    assert full == [(0, 5, True), (5, 10, True), (10, 12, True)]
    # No block begins at the last step, which adds no noise, and none ends before `start`.
    assert nodes(block=11, start=0.0) == [(0, 12, True)]
    assert nodes(block=2, start=0.5) == [(0, 6, True), (6, 8, True), (8, 10, True), (10, 12, True)]
    single = nodes(block=5, start=0.0, block_mode="single")
    assert single == [(0, 1, True), (1, 5, False), (5, 6, True), (6, 10, False), (10, 12, True)]
    late = nodes(block=5, start=0.5, block_mode="single")
    assert late == [(0, 5, False), (5, 6, True), (6, 10, False), (10, 12, True)]
    reference = {"reference": torch.zeros(1), "strength": 0.5}
    assert nodes(block=4, **reference) == [(6, 10, True), (10, 12, True)]
    assert nodes(block=4, **{**reference, "strength": 1e-3}) == [(11, 12, True)]


@pytest.mark.parametrize("mode", ["full", "single"])
def test_nothing_is_asked_twice(mode: str) -> None:
    method = CoDe(n_particles=3, n_branches=4, block=3, block_mode=mode, reward_scale=1.0)
    outcome, requests = served(line(), method, LINE)
    rows = [(r.t.net, float(v)) for r in requests if isinstance(r, Denoise) for v in r.x[:, 0]]
    assert len(set(rows)) == len(rows)
    assert torch.equal(outcome.reward, LINE(outcome.x0))


# --- references --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "single"])
def test_the_walk_starts_from_the_noised_reference(mode: str) -> None:
    model, reference = plane(steps=10), torch.tensor([3.0, -2.0])
    rule = {"n_particles": 500, "n_branches": 4, "block": 3, "block_mode": mode}
    method = CoDe(reference=reference, strength=0.6, reward_scale=1.0, **rule)
    _, requests = served(model, method, BOWL)
    first = next(r for r in requests if isinstance(r, Denoise))
    t = model.grid().times[4]
    assert first.t == t
    assert len(first.x) == (2000 if mode == "full" else 500)
    assert first.x.dtype == torch.float64
    z = (first.x - t.alpha * reference) / t.sigma
    error = 5.0 / len(z) ** 0.5
    assert float(z.mean(0).abs().max()) < error
    assert float((z.var(0) - 1.0).abs().max()) < error * 2**0.5
    assert len(z.unique(dim=0)) == len(z)


def test_a_weaker_strength_stays_closer_to_the_reference() -> None:
    reference, gaps = torch.tensor([1.0, 1.0]), []
    for strength in (0.1, 0.5, 0.9):
        rule = {"n_particles": 64, "n_branches": 2, "block": 3, "reward_scale": 1.0}
        method = CoDe(reference=reference, strength=strength, **rule)
        result = steer(plane(steps=10), BOWL, method)
        gaps.append(float((result.samples - reference).square().sum(1).mean()))
        assert len(result.samples.unique(dim=0)) == 64
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.3 < gaps[2]


def test_a_reference_of_which_nothing_is_left_is_refused() -> None:
    """A flow starts from pure noise: at full strength the reference would change nothing."""
    model = plane(steps=10)
    with pytest.raises(OptionError, match="nothing of the reference in it"):
        steer(model, BOWL, CoDe(reference=torch.ones(2), select="softmax"))
    assert model.rows == 0


def test_a_reference_is_checked_before_the_first_call() -> None:
    model = plane()
    with pytest.raises(OptionError, match="one clean state of shape"):
        steer(model, BOWL, CoDe(reference=torch.zeros(1, 2)))
    assert model.rows == 0
    integers = chain()
    with pytest.raises(OptionError, match="integers"):
        steer(integers, TABLE, CoDe(reference=torch.zeros(1)))
    assert integers.rows == 0
    with pytest.raises(OptionError, match="strength belongs to a reference"):
        CoDe(strength=0.5)
    for strength in (0.0, 1.1):
        with pytest.raises(OptionError, match="strength is a share"):
            CoDe(reference=torch.zeros(2), strength=strength)
    with pytest.raises(OptionError, match="reference"):
        CoDe(reference="photo.png")


def test_a_reference_has_a_recipe_without_it() -> None:
    method = CoDe(n_particles=1, reference=torch.zeros(2), strength=0.5)
    recipe = steer(plane(), BOWL, method).recipe
    assert list(recipe.method["options"]["reference"]) == ["$unavailable"]
    assert recipe.method["options"]["strength"] == 0.5


# --- cost, budget, options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"block": 2, "start": 0.0},
        {"block": 3, "select": "softmax"},
        {"block": 2, "block_mode": "single"},
        {"block": 99},
        {"block": 2, "reference": torch.zeros(1), "strength": 0.4},
        {"block": 3, "block_mode": "single", "reference": torch.zeros(1), "strength": 0.7},
    ],
)
def test_the_ledger_agrees_with_the_forecast(options: dict) -> None:
    check_ledger(CoDe(n_particles=3, n_branches=2, reward_scale=1.0, **options))


def test_cost_by_hand() -> None:
    """7 steps at 2, 2, 2, 3, 3, 3, 3 rows."""
    rule = {"n_particles": 3, "n_branches": 4, "start": 0.0}
    cost = check_ledger(CoDe(block=3, **rule))
    assert cost.nfe == 3 * 4 * 18  # blocks end at nodes 3 and 7; the trajectory has 18 rows
    assert cost.decodes == cost.reward_calls == 3 * 4 * 2
    single = check_ledger(CoDe(block=3, block_mode="single", **rule))
    # Branched steps 0 and 3 are judged at nodes 1 and 4, single rows at nodes 0, 2, 3, 5, 6.
    assert single.nfe == 3 * (2 + 4 * 2 + 2 + 3 + 4 * 3 + 3 + 3)
    assert single.decodes == single.reward_calls == 3 * (4 + 4 + 1)


def test_budgets_are_filled_and_refused_before_the_first_call() -> None:
    each = CoDe(n_particles=1).cost(plan_of(guided(), CoDe())).nfe
    assert each == 4 * 18
    assert steer(guided(), LINE, CoDe(), nfe=3 * each + 1).ledger.nfe == 3 * each
    model = guided()
    with pytest.raises(BudgetError, match="one particle needs 72 here"):
        steer(model, LINE, CoDe(), nfe=each - 1)
    assert model.rows == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block"),
        ({"block_mode": "half"}, "block_mode"),
        ({"n_branches": 0}, "code: n_branches"),
        ({"eta": 0.0}, "code branches, but eta=0"),
        ({"resample": "ess"}, "no weights"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CoDe(**options)


def test_preset_and_target() -> None:
    method = build_method("code/sd15", {"n_particles": 2})
    assert (method.n_branches, method.block, method.select) == (40, 5, "argmax")
    assert method.target == CoDe.target == "heuristic"
    assert CoDe(select="softmax").target == "tilted"

"""Feynman-Kac steering against exact laws, weights and limits.

One call of steer() runs R prompts with R seeds, which are R independent repetitions.
"""

from __future__ import annotations

import math

import pytest
import torch

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.particles import log_mean_exp
from steering.samplers import FK, BestOfN
from steering.samplers.fk import POTENTIALS
from tests.fk_world import CHECKPOINTS, N, mean_rho
from tests.populations import (
    BOWL,
    LINE,
    SLOPE,
    TABLE,
    R,
    by_slot,
    chain,
    cloud,
    errors,
    line,
    plane,
    repeated,
    steer,
)


def check_law(results, log_z: float, f, mean: float, allowance: float = 4.0) -> None:
    """Z and Z E[f] are unbiased at any size; the weighted mean of f is biased by O(1/N)."""
    z = [math.exp(r.log_z - log_z) for r in results]
    means = [float(r.weights @ f(r.samples)) for r in results]
    assert errors(z, 1.0) < 5.0
    assert errors([a * b for a, b in zip(z, means, strict=True)], mean) < 5.0
    v = torch.tensor(means, dtype=torch.float64)
    bound = 5.0 * float(v.std()) / math.sqrt(R) + allowance / N
    assert abs(float(v.mean()) - mean) < bound


RULES = [
    *[(p, rule) for p in ("difference", "max", "sum", mean_rho) for rule in ("ess", "always")],
    ("difference", "never"),
    ("none", "ess"),
]


@pytest.mark.parametrize(("potential", "rule"), RULES)
def test_every_potential_and_rule_has_the_same_target(potential, rule: str) -> None:
    """1-D mixture, exact kernel. Measured: at most 1.4 standard errors, for Z, Zf and mean."""
    scale = 0.4 if potential == "sum" else 0.7
    method = FK(
        n_particles=N,
        reward_scale=scale,
        potential=potential,
        resample=rule,
        **({} if potential == "none" else {"checkpoints": CHECKPOINTS}),
    )
    results = repeated(line, LINE, method)
    model = line()
    mean = float(model.tilted(LINE, scale).moments()[0])
    check_law(results, model.log_normaliser(LINE, scale), lambda x: x[:, 0], mean)
    times = [len(r.trace.ancestors) for r in results]
    expected = {"always": len(CHECKPOINTS), "never": 0}.get(rule)
    if potential == "none":
        expected = 0
    assert sum(times) >= R // 2 if expected is None else set(times) == {expected}, times


VALUES = {
    "mode": {},
    "draws": {"n_draws": 4},
    "lookahead": {"lookahead": 1, "n_draws": 2},
    "max-ssp": {"potential": "max", "resampler": "ssp"},
    "sum-killing": {"potential": "sum", "resampler": "killing"},
    "residual-ess": {"resampler": "residual", "resample": "ess", "ess_threshold": 0.9},
}


@pytest.mark.parametrize("value", sorted(VALUES))
def test_every_value_has_the_same_target_in_two_dimensions(value: str) -> None:
    """Measured: at most 2.1 standard errors."""
    rule = {"resample": "always", **VALUES[value]}
    method = FK(n_particles=N, reward_scale=1.0, checkpoints=CHECKPOINTS, **rule)
    model = plane()
    mean = float(model.tilted(BOWL, 1.0).moments()[0][0])
    results = repeated(plane, BOWL, method)
    check_law(results, model.log_normaliser(BOWL, 1.0), lambda x: x[:, 0], mean)
    assert sum(len(r.trace.ancestors) for r in results) > R


@pytest.mark.parametrize("value", ["mode", "draws", "max-ssp"])
def test_every_value_has_the_same_target_in_sixteen_dimensions(value: str) -> None:
    """Measured: at most 1.5 standard errors."""
    rule = {"resample": "always", **VALUES[value]}
    method = FK(n_particles=N, reward_scale=1.0, checkpoints=CHECKPOINTS, **rule)
    results, model = repeated(cloud, SLOPE, method), cloud()
    mean = float(model.tilted(SLOPE, 1.0).moments()[0].mean())
    check_law(results, model.log_normaliser(SLOPE, 1.0), lambda x: x.mean(1), mean)
    assert sum(len(r.trace.ancestors) for r in results) > R


@pytest.mark.parametrize("value", ["mode", "draws", "lookahead", "max-ssp", "sum-killing"])
def test_every_value_has_the_same_target_on_a_finite_chain(value: str) -> None:
    """Measured: at most 2.6 standard errors."""
    rule, scale = {"resample": "always", **VALUES[value]}, 0.3 if "sum" in value else 1.0
    method = FK(n_particles=N, reward_scale=scale, checkpoints=(0.0, 0.34, 0.67), **rule)
    results = repeated(chain, TABLE, method)
    law, log_z = chain().tilted_law(TABLE, scale), chain().log_normaliser(TABLE, scale)
    check_law(results, log_z, lambda x: (x[:, 0] == 3).double(), float(law[3]))
    assert sum(len(r.trace.ancestors) for r in results) > R


def affine_end(model: GaussianMixture, method: FK) -> tuple[float, float]:
    """Mean and variance of what the kernel makes of one Gaussian: every step is affine."""
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, u in model.grid().steps():
        step = method.kernel()(probe, model.posterior(probe, t), t, u, model.path)
        at0, at1 = step.mean[:, 0].tolist()
        mean, variance = at0 + (at1 - at0) * mean, (at1 - at0) ** 2 * variance + step.std**2
    return mean, variance


@pytest.mark.parametrize("options", [{}, {"lookahead": 2}, {"lookahead": 1, "n_draws": 3}])
def test_gaussian_kernel_chain_with_lookahead(options: dict) -> None:
    """The law of the sampler itself is tilted, not the law of the data. Measured: 2.0."""
    scale = 1.5
    rule = {"resample": "always", **options}
    method = FK(n_particles=N, reward_scale=scale, checkpoints=CHECKPOINTS, **rule)

    def make(prompts):
        return GaussianMixture([1.0], [0.5], [0.6], steps=5, prompts=prompts)

    mean, variance = affine_end(make(("p",)), method)
    assert abs(variance - 0.36) > 0.01, "the kernel should be visibly inexact"
    results = repeated(make, LINE, method)
    log_z = scale * mean + 0.5 * scale**2 * variance
    check_law(results, log_z, lambda x: x[:, 0], mean + scale * variance)


# What potentials count after 2, 4, 6 and 8 of 10 steps.
DAMPED = {"none": (1.0, 1.0, 1.0, 1.0), "measured": (0.36, 0.72, 0.9, 0.95)}


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("rule", ["ess", "always", "never"])
@pytest.mark.parametrize("damping", sorted(DAMPED))
def test_weights_follow_from_the_trace(potential: str, rule: str, damping: str) -> None:
    """The recursion again, from the rewards and ancestors that the run reports."""
    n, scale = 12, 1.3
    method = FK(
        n_particles=n,
        reward_scale=scale,
        potential=potential,
        resample=rule,
        checkpoints=(0.2, 0.4, 0.6, 0.8),
        damping=damping,
    )
    decisions = set()
    for seed in range(4):
        result = steer(line(steps=10), LINE, method, seed=seed)
        log_w, phi, rho = torch.zeros(n).double(), torch.zeros(n).double(), []
        root = torch.arange(n)
        for event in result.trace.events:
            if "checkpoint" not in event:
                continue
            rho.append(scale * torch.tensor(event["rewards"], dtype=torch.float64))
            new = DAMPED[damping][len(rho) - 1] * POTENTIALS[potential](torch.stack(rho))
            log_w, phi = log_w + new - phi, new
            share = torch.softmax(log_w, 0)
            assert event["ess"] == pytest.approx(float(1 / share.square().sum()))
            low = event["ess"] < 0.5 * n
            assert ("ancestors" in event) == {"ess": low, "always": True, "never": False}[rule]
            decisions.add("ancestors" in event)
            if "ancestors" in event:
                a = torch.tensor(event["ancestors"])
                log_w = torch.full((n,), log_mean_exp(log_w), dtype=torch.float64)
                phi, rho, root = phi[a], [r[a] for r in rho], root[a]
                assert event["roots"] == len(root.unique())
        log_w = log_w + scale * result.rewards[result.slots.argsort()] - phi
        found = result.log_weights[result.slots.argsort()]
        assert torch.allclose(found, log_w, rtol=0, atol=1e-9)
        assert result.log_z == pytest.approx(log_mean_exp(log_w), abs=1e-9)
    assert rule != "ess" or decisions == {True, False}


@pytest.mark.parametrize("options", [{"lookahead": 1}, {"n_draws": 2}])
def test_samples_and_draws_are_never_damped(options: dict) -> None:
    """Only a one-step estimate is in doubt."""
    runs = [
        steer(line(kernel="path"), LINE, FK(n_particles=4, damping=d, **options))
        for d in (None, "none")
    ]
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)


def test_rewards_belong_to_the_delivered_samples() -> None:
    result = steer(line(), LINE, FK(n_particles=9, reward_scale=2.0))
    assert torch.equal(result.rewards, LINE(result.samples).float().double())
    assert torch.equal(result.rewards, result.rewards.sort(descending=True).values)


def test_twins_part_after_resampling() -> None:
    """Noise is named by slot: children of one parent must not be copies of each other."""
    method = FK(n_particles=16, reward_scale=20.0, checkpoints=(0.6,), resample="always")
    result = steer(line(), LINE, method)
    assert result.trace.column("roots")[0] < 8
    assert len(result.samples.unique()) == 16


def test_nothing_is_resampled_before_a_step_without_noise() -> None:
    method = FK(n_particles=8, reward_scale=3.0, resample="always", checkpoints=(0.5, 0.75, 0.9))
    result = steer(line(kernel="path", steps=4), LINE, method)
    assert result.trace.column("checkpoint") == [2]
    assert len(result.samples.unique()) == 8


def test_no_copies_are_delivered_where_the_grid_comes_to_its_smallest_level_before_none() -> None:
    """SD3's own four steps end at noise 0.001, then 0: what is resampled there stays a copy."""
    pipe = steering.load("stickers", dtype="float32")
    method = FK(
        n_particles=4, reward_scale=200.0, resample="always", checkpoints=(0.25, 0.5, 0.75)
    )
    result = steering.steer(
        pipe, "a photo of a dog", reward="clip", method=method, num_inference_steps=4
    )
    assert [e["checkpoint"] for e in result.trace.events if "ancestors" in e] == [1]
    x = result.samples.flatten(1)
    apart = torch.cdist(x, x)[torch.triu_indices(4, 4, 1).unbind()] / x.norm(dim=1).mean()
    assert float(apart.min()) > 0.05


def test_every_resampling_has_numbers_of_its_own() -> None:
    """Ancestors differ between prompts and between checkpoints, also where weights agree."""
    method = FK(
        n_particles=16,
        reward_scale=0.0,
        resample="always",
        resampler="multinomial",
        checkpoints=CHECKPOINTS,
    )
    results = steer(line(("p", "p", "p")), LINE, method, seed=[0, 1, 0])
    found = [r.trace.ancestors for r in results]
    assert found[0] == found[2]
    drawn = {tuple(a) for run in found for a in run}
    assert len(drawn) == 2 * len(CHECKPOINTS)


def test_the_potential_of_draws_is_their_log_mean_exp() -> None:
    """With a constant reward every number of draws gives that constant."""
    for draws in (1, 4):
        method = FK(n_particles=3, reward_scale=2.0, n_draws=draws, checkpoints=(0.5,))
        result = steer(line(), lambda images: torch.full((len(images),), 1.5), method)
        assert result.trace.column("rewards")[0] == pytest.approx([1.5] * 3)
        assert result.log_z == pytest.approx(3.0)


# --- limits ---------------------------------------------------------------------------------

MODELS = {"exact": lambda: line(), "path": lambda: line(kernel="path"), "chain": chain}
LIMITS = {
    "reward_scale 0": {"reward_scale": 0.0, "n_particles": 8},
    "reward_scale 0, always": {"reward_scale": 0.0, "n_particles": 8, "resample": "always"},
    "one particle": {"n_particles": 1, "reward_scale": 3.0, "resample": "always"},
    "no checkpoint": {"checkpoints": (), "n_particles": 8, "reward_scale": 3.0},
    "no potential": {"potential": "none", "n_particles": 8, "reward_scale": 3.0},
    "never": {"resample": "never", "n_particles": 8, "reward_scale": 3.0},
}


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("limit", sorted(LIMITS))
def test_limits_are_the_base_sampler_bit_for_bit(model: str, limit: str) -> None:
    options = LIMITS[limit]
    reward = TABLE if model == "chain" else LINE
    base = BestOfN(n=options["n_particles"], select="all", eta=1.0)
    base = steer(MODELS[model](), reward, base, seed=3)
    ours = steer(MODELS[model](), reward, FK(**options), seed=3)
    assert torch.equal(by_slot(ours), by_slot(base))
    assert torch.equal(ours.rewards, base.rewards)
    weights = options["reward_scale"] * ours.rewards
    assert torch.allclose(ours.log_weights, weights, rtol=0, atol=1e-12)


def test_a_constant_added_to_the_reward_changes_nothing_but_z() -> None:
    method = FK(n_particles=32, reward_scale=2.0, checkpoints=CHECKPOINTS)
    for potential in ("difference", "max"):  # a sum counts the constant at every checkpoint
        method = FK(n_particles=32, reward_scale=2.0, checkpoints=CHECKPOINTS, potential=potential)
        a = steer(line(), LINE, method)
        b = steer(line(), LinearReward([1.0], 7.0), method)
        assert a.trace.ancestors == b.trace.ancestors
        assert len(a.trace.ancestors) > 0
        assert torch.equal(by_slot(a), by_slot(b))
        assert b.log_z - a.log_z == pytest.approx(14.0, abs=1e-5)


def test_scaling_the_reward_against_reward_scale_changes_nothing() -> None:
    a = steer(line(), LINE, FK(n_particles=32, reward_scale=2.0, potential="sum"))
    b = steer(line(), LinearReward([0.5]), FK(n_particles=32, reward_scale=4.0, potential="sum"))
    assert len(a.trace.ancestors) > 0
    assert a.trace.ancestors == b.trace.ancestors
    assert torch.equal(by_slot(a), by_slot(b))
    assert a.log_z == b.log_z


def favourite(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Another reward for each prompt: pooling across prompts could not go unseen."""
    signs = torch.tensor([float(p) for p in prompts], dtype=torch.float64)
    return signs * images[:, 0]


TOGETHER = ("1", "-1", "0.5", "2", "-2", "0", "1.5", "-0.25")


@pytest.fixture(scope="module")
def alone() -> list:
    method = FK(n_particles=12, reward_scale=1.0, checkpoints=CHECKPOINTS, lookahead=1)
    return [steer(line((p,)), favourite, method, seed=k) for k, p in enumerate(TOGETHER)]


@pytest.mark.parametrize("max_batch", [1, 7, 64])
def test_prompts_run_together_as_they_run_alone(alone: list, max_batch: int) -> None:
    method = FK(n_particles=12, reward_scale=1.0, checkpoints=CHECKPOINTS, lookahead=1)
    seeds = list(range(len(TOGETHER)))
    many = steer(line(TOGETHER), favourite, method, seed=seeds, max_batch=max_batch)
    assert sum(len(r.trace.ancestors) for r in alone) > 4
    for one, other in zip(alone, many, strict=True):
        assert one.prompt == other.prompt
        assert one.trace.ancestors == other.trace.ancestors
        assert one.trace.column("ess") == pytest.approx(other.trace.column("ess"), abs=1e-9)
        assert torch.allclose(by_slot(one), by_slot(other), rtol=0, atol=1e-10)
        assert one.log_z == pytest.approx(other.log_z, abs=1e-9)
        counts = ("nfe", "decodes", "reward_calls")
        assert [getattr(one.ledger, c) for c in counts] == [
            getattr(other.ledger, c) for c in counts
        ]

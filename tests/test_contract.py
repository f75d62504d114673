"""What every registered method keeps: exact costs, the batch law, real pipelines, its budget.

The settings come from ``CASES`` in the files ``cases_*.py``; a method without settings fails.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import steering
from steering.analytic import GaussianMixture
from steering.errors import BudgetError
from steering.ledger import Budget
from steering.method import Method, Plan, build_method, default_costs, method_options
from steering.registry import METHODS
from steering.samplers import Auto, Reflect
from tests.tiny_pipelines import build

PROMPTS = tuple("abcdefgh")
COUNTS = ("nfe", "nfe_backward", "decodes", "reward_calls")
PIPELINES = ("sd", "sdxl", "sd3", "flux", "wan")


def collect() -> dict[str, tuple[Method, ...]]:
    """All settings of all families."""
    files = sorted(Path(__file__).parent.glob("cases_*.py"))
    return {k: v for f in files for k, v in import_module(f"tests.{f.stem}").CASES.items()}


CASES = collect()
NAMES = sorted(CASES)
EVERY = [
    pytest.param(case, id=f"{name}-{k}") for name in NAMES for k, case in enumerate(CASES[name])
]


def world(prompts: tuple[str, ...] = ("a",), steps: int = 6) -> GaussianMixture:
    means = [[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]]
    return GaussianMixture([0.5, 0.3, 0.2], means, [0.5, 0.3, 0.6], steps=steps, prompts=prompts)


def near(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    """A bowl round a place that depends on the prompt; differentiable."""
    place = torch.tensor([PROMPTS.index(p) / 4.0 - 1.0 for p in prompts]).to(images)
    return -(images.flatten(1) - place[:, None]).square().mean(1)


def bright(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images.flatten(1).float().mean(1)


near.differentiable = bright.differentiable = True  # type: ignore[attr-defined]


def test_every_method_has_three_settings():
    missing = [name for name in METHODS.names() if len(CASES.get(name, ())) < 3]
    assert not missing


def exact(method: Method) -> bool:
    """Whether nothing may end a run early: rewards of ``near`` are never above 0."""
    if isinstance(method, (Auto, Reflect)):
        fixed = isinstance(method, Reflect) or method.follow != "auto"
        return fixed and (method.target_reward is None or method.target_reward > 0.0)
    return not method.anytime


@pytest.mark.parametrize("method", EVERY)
def test_the_ledger_agrees_with_the_forecast(method):
    model = world()
    grid = method.levels(model)
    plan = Plan(grid=grid, costs=default_costs(model, grid), budget=Budget())
    fitted = method.fit(plan)
    cost = fitted.cost(plan)
    ledger = steering.steer(model, reward=near, method=method).ledger
    spent = (ledger.nfe, ledger.decodes, ledger.reward_calls)
    forecast = (cost.nfe, cost.decodes, cost.reward_calls)
    assert ledger.nfe - ledger.deduplicated + ledger.nfe_recomputed == model.rows
    if not exact(method):
        assert all(s <= f for s, f in zip(spent, forecast, strict=True))
        assert ledger.nfe >= 0.3 * cost.nfe
    else:
        assert spent == forecast
    assert (ledger.nfe_backward > 0) == method.needs_gradient


@pytest.mark.parametrize("method", EVERY)
def test_prompts_run_together_as_they_run_alone(method):
    seeds = list(range(len(PROMPTS)))
    many = steering.steer(world(PROMPTS), reward=near, method=method, seed=seeds, max_batch=24)
    for k in (0, 3, 7):
        one = steering.steer(world((PROMPTS[k],)), reward=near, method=method, seed=k)
        torch.testing.assert_close(many[k].samples, one.samples, rtol=0, atol=1e-5)
        torch.testing.assert_close(many[k].rewards, one.rewards, rtol=0, atol=1e-5)
        assert [getattr(many[k].ledger, c) for c in COUNTS] == [
            getattr(one.ledger, c) for c in COUNTS
        ]


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_bits_and_options_survive_json(name):
    method = CASES[name][0]
    again = build_method(name, method_options(method))
    assert again == method
    one, two = (steering.steer(world(), reward=near, method=m, seed=5) for m in (method, again))
    assert torch.equal(one.samples, two.samples)
    other = steering.steer(world(), reward=near, method=method, seed=6)
    assert not torch.equal(one.samples, other.samples)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_filled_and_never_passed(name):
    for nfe in (150, 333):
        ledger = steering.steer(world(), reward=near, method=name, nfe=nfe).ledger
        assert 0.5 * nfe <= ledger.nfe <= nfe
    with pytest.raises(BudgetError, match=r"Raise .* or lower .*the number of steps"):
        steering.steer(model := world(), reward=near, method=name, nfe=1)
    assert model.rows == 0


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", NAMES)
def test_real_pipelines(name, pipeline):
    pipe, call = build(pipeline, steps=6)
    result = steering.steer(pipe, reward=bright, method=CASES[name][0], **call)
    assert torch.isfinite(result.rewards).all()
    frames = result.pixels.flatten(1)
    assert 0.0 <= frames.min() <= frames.max() <= 1.0
    torch.testing.assert_close(result.rewards.float(), frames.float().mean(1), rtol=0, atol=1e-3)

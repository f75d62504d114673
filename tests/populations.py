"""Small exact models and checks that the tests of population methods share.

One call of steer() runs R prompts with R seeds, which are R independent repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steering
from steering.analytic import (
    FiniteChain,
    GaussianMixture,
    LinearReward,
    QuadraticReward,
    TableReward,
)
from steering.ledger import Budget
from steering.method import Context, Cost, Method, Plan, default_costs
from steering.requests import Decode, Denoise, Progress, Score
from steering.scoring import Scores

R = 48
LINE = LinearReward([1.0])
BOWL = QuadraticReward([1.0, -1.0])
SLOPE = LinearReward([0.25] * 16)
TABLE = TableReward([0.0, 1.0, -1.0, 2.0, 0.5])


def line(prompts=("p",), kernel="exact", steps=8) -> GaussianMixture:
    weights, means, stds = [0.6, 0.3, 0.1], [-2.0, 0.5, 3.0], [0.5, 0.4, 0.4]
    return GaussianMixture(weights, means, stds, steps=steps, kernel=kernel, prompts=prompts)


def plane(prompts=("p",), kernel="exact", steps=8) -> GaussianMixture:
    means = [[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]]
    weights, stds = [0.5, 0.3, 0.2], [0.5, 0.3, 0.6]
    return GaussianMixture(weights, means, stds, steps=steps, kernel=kernel, prompts=prompts)


def cloud(prompts=("p",)) -> GaussianMixture:
    """Two components in 16 dimensions."""
    means = [[0.3] * 16, [-0.3] * 8 + [0.2] * 8]
    return GaussianMixture([0.4, 0.6], means, [0.5, 0.8], steps=6, kernel="exact", prompts=prompts)


def chain(prompts=("p",)) -> FiniteChain:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, 5, generator=generator, dtype=torch.float64)
    sticky = 0.75 * torch.eye(5, dtype=torch.float64) + 0.25 * torch.softmax(2 * logits, 2)
    return FiniteChain([0.3, 0.2, 0.2, 0.1, 0.2], sticky, prompts=prompts)


class Guided(GaussianMixture):
    """Two network rows per sample, three from the middle on."""

    def costs(self) -> tuple[int, ...]:
        n = len(self.grid())
        return tuple(2 if i < n // 2 else 3 for i in range(n))

    def predict(self, x, t, *, cond=0, grad=False):
        times = [t] * len(x) if not isinstance(t, list | tuple) else t
        prices = dict(zip((level.net for level in self.grid().times), self.costs(), strict=False))
        self.rows += sum(prices[level.net] - 1 for level in times)
        return super().predict(x, t, cond=cond, grad=grad)


def guided() -> Guided:
    return Guided([0.5, 0.5], [-1.0, 1.0], [0.4, 0.4], steps=7, prompts=("p",))


def steer(model, reward, method, *, seed=0, max_batch=10**6, **more) -> Any:
    """One result, or one for each prompt where there are several."""
    prompts = model.prompts[0] if len(model.prompts) == 1 else list(model.prompts)
    return steering.steer(
        model, prompts, reward=reward, method=method, seed=seed, max_batch=max_batch, **more
    )


def repeated(make, reward, method) -> list:
    return steer(make(("p",) * R), reward, method, seed=list(range(R)))


def by_slot(result) -> Tensor:
    return result.samples[result.slots.argsort()]


def errors(values: list[float], truth: float, noise: float = 0.06) -> float:
    """Distance of the mean from the truth in standard errors, which must be small enough."""
    v = torch.tensor(values, dtype=torch.float64)
    error = float(v.std()) / math.sqrt(len(v))
    assert error < noise * max(1.0, abs(truth)), "too noisy to prove anything"
    return abs(float(v.mean()) - truth) / max(error, 1e-12)


TRUTHS = {
    "line": (line, LINE, 0.7, lambda x: x[:, 0]),
    "plane": (plane, BOWL, 1.0, lambda x: x[:, 0]),
    "cloud": (cloud, SLOPE, 1.0, lambda x: x.mean(1)),
    "chain": (chain, TABLE, 1.0, lambda x: (x[:, 0] == 3).double()),
}
"""name -> (model, reward, reward_scale, a function f of samples)"""


def check_law(world: str, method: Method) -> list:
    """exp(log_z) and exp(log_z) * weighted mean of f are unbiased at any size."""
    make, reward, scale, f = TRUTHS[world]
    results, model = repeated(make, reward, method), make()
    if isinstance(model, FiniteChain):
        mean = float(model.tilted_law(reward, scale)[3])
    else:
        mean = float(f(model.tilted(reward, scale).moments()[0][None]))
    log_z = model.log_normaliser(reward, scale)
    z = [math.exp(r.log_z - log_z) for r in results]
    zf = [a * float(r.weights @ f(r.samples)) for a, r in zip(z, results, strict=True)]
    found = errors(z, 1.0), errors(zf, mean)
    assert max(found) < 5.0, found
    return results


def plan_of(model, method: Method, **caps: int) -> Plan:
    grid = method.levels(model)
    return Plan(grid=grid, costs=default_costs(model, grid), budget=Budget(**caps))


def check_ledger(method: Method) -> Cost:
    """The forecast is what a guided model's ledger says; returns it."""
    model = guided()
    cost = method.cost(plan_of(model, method))
    ledger = steer(model, LINE, method).ledger
    spent = ledger.nfe, ledger.decodes, ledger.reward_calls
    assert spent == (cost.nfe, cost.decodes, cost.reward_calls)
    assert ledger.nfe - ledger.deduplicated == model.rows
    assert ledger.nfe_backward == 0
    return cost


def served(model, method: Method, reward: Callable[[Tensor], Tensor], seed: int = 0) -> tuple:
    """(outcome, requests) of a run answered by hand, one request at a time."""
    plan = plan_of(model, method)
    run = method.fit(plan).run(Context(model=model, cond=0, seed=seed, plan=plan))
    requests, answer = [], None
    while True:
        try:
            request = run.send(answer)
        except StopIteration as stop:
            return stop.value, requests
        requests.append(request)
        if isinstance(request, Denoise):
            answer = model.predict(request.x, request.t)
        elif isinstance(request, Decode):
            answer = model.decode(request.x0)
        elif isinstance(request, Score):
            answer = Scores(reward(request.images))
        else:
            assert isinstance(request, Progress)
            answer = None

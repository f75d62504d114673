"""Worlds, short cuts and a notebook for the tests of the search methods."""

from __future__ import annotations

import math

import torch

import steering
from steering.analytic import FiniteChain, GaussianMixture, QuadraticReward, TableReward
from steering.ledger import Budget
from steering.method import Cost, Plan, default_costs

BOWL = QuadraticReward([1.0, -1.0])  # its optimum, 0, lies between the modes of `plane`
TABLE = TableReward([0.0, 1.0, -1.0, 2.0, 0.5])


def constant(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images))


def plane(prompts=("p",), steps=6, kernel="path") -> GaussianMixture:
    means = [[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]]
    return Notebook(
        [0.5, 0.3, 0.2], means, [0.5, 0.3, 0.6], steps=steps, kernel=kernel, prompts=prompts
    )


def line(prompts=("p",), steps=8, kernel="exact") -> GaussianMixture:
    weights, means, stds = [0.6, 0.3, 0.1], [-2.0, 0.5, 3.0], [0.5, 0.4, 0.4]
    return Notebook(weights, means, stds, steps=steps, kernel=kernel, prompts=prompts)


def bell(prompts=("p",), steps=6, dims=2, std=0.6, kernel="path") -> GaussianMixture:
    """One Gaussian, for which every step is affine."""
    mean = [[0.5] * dims]
    return Notebook([1.0], mean, [std], steps=steps, kernel=kernel, prompts=prompts)


def chain(prompts=("p",)) -> FiniteChain:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, 5, generator=generator, dtype=torch.float64)
    return FiniteChain([0.3, 0.2, 0.2, 0.1, 0.2], torch.softmax(logits, 2), prompts=prompts)


class Notebook(GaussianMixture):
    """Writes down what it is asked: (t, x [n, D]) per call, in the float64 it was given."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.asked: list[tuple[float, torch.Tensor]] = []
        self.calls = 0

    def predict(self, x, t, *, cond=0, grad=False):
        self.calls += 1
        times = [t] * len(x) if not isinstance(t, list | tuple) else list(t)
        for level in dict.fromkeys(times):
            rows = torch.tensor([s == level for s in times])
            self.asked.append((level.t, x[rows].clone()))
        return super().predict(x, t, cond=cond, grad=grad)

    def at(self, node: int) -> list[torch.Tensor]:
        """What was asked at a node of its own grid, call by call."""
        return [x for t, x in self.asked if t == self.grid().times[node].t]


class ImageToImage(Notebook):
    """Starts from a picture with noise on it."""

    def noise(self, n, key, *, cond=0):
        return 0.5 + super().noise(n, key, cond=cond)


def calls_of(make, method, prompts: int) -> int:
    """Network calls for so many prompts at once."""
    model = make(("p",) * prompts)
    steer(model, BOWL, method, seed=list(range(prompts)) if prompts > 1 else 0)
    return model.calls


class Guided(GaussianMixture):
    """Two network rows per sample, as with classifier-free guidance."""

    def costs(self) -> tuple[int, ...]:
        return (2,) * len(self.grid())

    def predict(self, x, t, *, cond=0, grad=False):
        self.rows += len(x)
        return super().predict(x, t, cond=cond, grad=grad)


def guided(steps=7) -> Guided:
    means = [[-1.0, 0.0], [1.0, 1.0]]
    return Guided([0.5, 0.5], means, [0.4, 0.4], steps=steps, prompts=("p",))


def steer(model, reward, method, *, seed=0, max_batch=10**6, **more):
    """One result, or one for each prompt where there are several."""
    prompts = model.prompts[0] if len(model.prompts) == 1 else list(model.prompts)
    return steering.steer(
        model, prompts, reward=reward, method=method, seed=seed, max_batch=max_batch, **more
    )


def repeated(make, reward, method, times: int, **more):
    """Independent repetitions, as prompts of one call."""
    return steer(make(("p",) * times), reward, method, seed=list(range(times)), **more)


def mean_best(make, method: str, times: int = 12, **more) -> float:
    results = repeated(make, BOWL, method, times, **more)
    return sum(r.best_reward for r in results) / times


def plan_of(model, method, **caps: int) -> Plan:
    grid = method.levels(model)
    return Plan(grid=grid, costs=default_costs(model, grid), budget=Budget(**caps))


def forecast(model, method) -> tuple[int, int, int]:
    plan = plan_of(model, method)
    return counts(method.fit(plan).cost(plan))


def counts(spent) -> tuple[int, int, int]:
    """(nfe, decodes, reward calls) of a Cost or a Ledger."""
    assert isinstance(spent, Cost) or spent.nfe_backward == 0
    return spent.nfe, spent.decodes, spent.reward_calls


def errors(values: torch.Tensor, truth: float) -> float:
    """Distance of the mean of independent values from the truth, in standard errors."""
    v = values.double().flatten()
    return abs(float(v.mean()) - truth) / (float(v.std()) / math.sqrt(len(v)))


def spread_errors(values: torch.Tensor, mean: float, variance: float) -> float:
    """The same for the variance about a known mean."""
    return errors((values.double().flatten() - mean).square(), variance)

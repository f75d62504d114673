"""Worlds and checks for twisted proposals: the sampler's own law is the one that is tilted.

With Gaussian steps the law at the end of a grid is not the data law, so truths come from the
affine recursion of one Gaussian, or from many unsteered chains with their standard error.
"""

from __future__ import annotations

import functools
import math

import torch

import steering
from steering.analytic import GaussianMixture, LinearReward, QuadraticReward
from steering.transitions import EtaKernel

R, N = 48, 32
LINE = LinearReward([1.0])
BOWL = QuadraticReward([1.0, -1.0])
FAR = LinearReward([0.4] * 16)
CROWD = 100_000


def line(prompts=("p",), steps=8) -> GaussianMixture:
    weights, means, stds = [0.6, 0.3, 0.1], [-2.0, 0.5, 3.0], [0.5, 0.4, 0.4]
    return GaussianMixture(weights, means, stds, steps=steps, prompts=prompts)


def plane(prompts=("p",), steps=8) -> GaussianMixture:
    means = [[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]]
    return GaussianMixture([0.5, 0.3, 0.2], means, [0.5, 0.3, 0.6], steps=steps, prompts=prompts)


def sixteen(prompts=("p",), steps=8) -> GaussianMixture:
    means = [[-0.5] * 16, [0.5] * 8 + [0.0] * 8]
    return GaussianMixture([0.5, 0.5], means, [0.4, 0.5], steps=steps, prompts=prompts)


def bell(prompts=("p",), steps=6) -> GaussianMixture:
    """One Gaussian: every step is affine."""
    return GaussianMixture([1.0], [0.5], [0.6], steps=steps, prompts=prompts)


class Paired(GaussianMixture):
    """Two network rows per sample, as with classifier-free guidance."""

    def __init__(self, prompts=("p",), steps=6) -> None:
        super().__init__(
            [0.5, 0.5], [[-1.0, 0.0], [1.0, 1.0]], [0.5, 0.3], steps=steps, prompts=prompts
        )

    def costs(self) -> tuple[int, ...]:
        return (2,) * len(self.grid())

    def predict(self, x, t, *, cond=0, grad=False):
        self.rows += len(x)
        return super().predict(x, t, cond=cond, grad=grad)


class Noted(GaussianMixture):
    """Remembers the states it was asked about."""

    def predict(self, x, t, *, cond=0, grad=False):
        self.__dict__.setdefault("seen", []).append(x.detach().clone())
        return super().predict(x, t, cond=cond, grad=grad)


def weights_by_hand(model: Noted, result, scale: float, eta: float, lean) -> torch.Tensor:
    """ln dP/dQ + scale * x0 of every path, by slot, from normal densities written out.

    The model is one Gaussian; ``lean(i, t, u, kept, std, gain)`` is how far the mean of proposal
    i stands from the base kernel's, with gain = d x0 / d x.
    """
    m, s = float(model.means[0, 0]), float(model.stds[0])
    order = result.slots.argsort()
    states = [x[:, 0] for x in model.seen] + [result.samples[order, 0]]
    total = torch.zeros(len(order), dtype=torch.float64)
    for i, (t, u) in enumerate(model.grid().steps()):
        if u.end:
            break
        v = (t.alpha * s) ** 2 + t.sigma**2
        gain = t.alpha * s * s / v
        x0 = m + gain * (states[i] - t.alpha * m)
        eps = t.sigma / v * (states[i] - t.alpha * m)
        rho = t.alpha * u.sigma / (u.alpha * t.sigma)
        std = eta * u.sigma * math.sqrt(1 - rho * rho)
        kept = math.sqrt(u.sigma**2 - std**2)
        mean = u.alpha * x0 + kept * eps
        base = torch.distributions.Normal(mean, std)
        real = torch.distributions.Normal(mean + lean(i, t, u, kept, std, gain), std)
        total += base.log_prob(states[i + 1]) - real.log_prob(states[i + 1])
    return total + scale * states[-1]


WORLDS = {
    "line": (line, LINE, 0.7, 0),
    "plane": (plane, BOWL, 1.0, 0),
    "sixteen": (sixteen, FAR, 1.0, 3),
}


def steer(model, reward, method, *, seed=0, max_batch=10**6, **more):
    """One result, or one for each prompt where there are several."""
    prompts = model.prompts[0] if len(model.prompts) == 1 else list(model.prompts)
    return steering.steer(
        model, prompts, reward=reward, method=method, seed=seed, max_batch=max_batch, **more
    )


def repeated(make, reward, method, repeats=R):
    return steer(make(("p",) * repeats), reward, method, seed=list(range(repeats)))


def unsteered(model: GaussianMixture, n: int = CROWD, eta: float = 1.0) -> torch.Tensor:
    """Samples of the eta-kernel chain itself."""
    generator, kernel = torch.Generator().manual_seed(77), EtaKernel(eta=eta)
    shape = (n, *model.event_shape)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for t, u in model.grid().steps():
        step = kernel(x, model.posterior(x, t), t, u, model.path)
        x = step.sample(torch.randn(shape, generator=generator, dtype=torch.float64))
    return x


@functools.cache
def truth(world: str, eta: float = 1.0) -> tuple[float, float, float, float]:
    """(E w, its error, E w f, its error) with w = exp(scale r) and f one coordinate."""
    make, reward, scale, axis = WORLDS[world]
    x = unsteered(make(), eta=eta)
    w = torch.exp(scale * reward(x))
    both = torch.stack([w, w * x[:, axis]])
    error = both.std(1) / math.sqrt(x.shape[0])
    (z, zf), (ez, ezf) = both.mean(1).tolist(), error.tolist()
    return z, ez, zf, ezf


def affine_end(model: GaussianMixture, eta: float = 1.0) -> tuple[float, float]:
    """Mean and variance of what the kernel makes of one Gaussian: every step is affine."""
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, u in model.grid().steps():
        step = EtaKernel(eta=eta)(probe, model.posterior(probe, t), t, u, model.path)
        at0, at1 = step.mean[:, 0].tolist()
        mean, variance = at0 + (at1 - at0) * mean, (at1 - at0) ** 2 * variance + step.std**2
    return mean, variance


def distance(values: list[float], want: float, error: float = 0.0) -> float:
    """Of the mean from the truth, in standard errors, which must prove something."""
    v = torch.tensor(values, dtype=torch.float64)
    own = float(v.std()) / math.sqrt(len(v))
    assert own < 0.1 * max(1.0, abs(want)), f"too noisy to prove anything: {own} of {want}"
    return abs(float(v.mean()) - want) / math.hypot(own, error)


def worst(world: str, method, repeats: int = R) -> float:
    """How far Z and Z E[f] are from the truth, in standard errors."""
    make, reward, _, axis = WORLDS[world]
    results = repeated(make, reward, method, repeats)
    z, ez, zf, ezf = truth(world, getattr(method, "eta", 1.0))
    found = [math.exp(r.log_z) for r in results]
    means = [float(r.weights @ r.samples[:, axis]) for r in results]
    products = [a * b for a, b in zip(found, means, strict=True)]
    return max(distance(found, z, ez), distance(products, zf, ezf))

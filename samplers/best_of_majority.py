"""Best-of-majority: of N samples drop those the model rarely makes, keep the k best of the rest.

Di et al. (2025), "Best-of-majority: minimax-optimal strategy for pass@k inference scaling",
arXiv 2510.03199. A wrong reward is highest on some rare sample, so best-of-N finds it sooner or
later: its regret grows with N. Asking for a frequency of at least ``min_frequency`` first removes
that sample from the choice, and the regret does not grow.

The paper counts equal answers. Pictures never coincide, so what counts as the same is an option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from steering.errors import OptionError
from steering.method import Context, Cost, Plan, as_float64
from steering.registry import METHODS
from steering.requests import Decode, Outcome, Progress, Run, Score
from steering.samplers.base import Sampler, afford, refuse_idle, within_budget
from steering.samplers.rollout import walk

_CHUNK = 16
"""Samples decoded together."""
_SIDE = 8
"""Pixels a side of the default embedding."""


def thumbnails(images: Tensor) -> Tensor:
    """Pictures [n, ..., H, W] averaged down to 8 x 8, other samples as they are: [n, d] float32.

    Needs no model, and tells compositions and colours apart, not meanings: pass the image
    features of a CLIP or DINO as ``embed`` for these.
    """
    x = images.detach().float()
    if x.ndim >= 4 and min(x.shape[-2:]) > _SIDE:
        x = adaptive_avg_pool2d(x.flatten(1, -3), _SIDE)
    return x.flatten(1)


@METHODS.register("best_of_majority")
@dataclass(frozen=True, kw_only=True)
class BestOfMajority(Sampler):
    """The k best of those samples that are not rare.

    Attributes:
        n: how many samples; None spends the budget (16 where there is none).
        k: how many to return, at most: no rare sample is added where fewer are frequent enough.
            Where none is, the k most frequent are returned.
        frequency: "labels" share of the samples with an equal embedding; "clusters" share of the
            samples in the same cluster (linked by steps of at most ``radius``); "density" mean
            over the samples of exp(-d^2 / (2 radius^2)), itself included.
        min_frequency: what a sample needs to be chosen, in [0, 1]; 0 is best-of-N's top k, None
            half of the mean frequency of the samples.
        radius: distance in the embedding's units; None takes the median distance of two samples
            ("clusters": half of it).
        distinct: at most one sample of each label or cluster, as in the paper.
        embed: images [n, ...] -> features [n, d] or labels (any n values), for "labels" of
            anything but exact copies; by default :func:`thumbnails`.
        frequency_fn: images [n, ...] -> frequencies [n], instead of all of the above.
    """

    n: int | None = None
    k: int = 1
    frequency: Literal["labels", "clusters", "density"] = "density"
    min_frequency: float | None = None
    radius: float | None = None
    distinct: bool = False
    embed: Callable[[Tensor], Any] | None = None
    frequency_fn: Callable[[Tensor], Any] | None = None

    name: ClassVar[str] = "best_of_majority"
    summary: ClassVar[str] = "of N samples the best that is not a rarity"
    paper: ClassVar[str] = "Di et al. 2025, arXiv 2510.03199"
    target: ClassVar[str] = "heuristic"
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n is not None and self.n < 1:
            raise OptionError(f"best_of_majority: n must be at least 1, got {self.n}.")
        if self.k < 1 or (self.n is not None and self.k > self.n):
            raise OptionError(
                f"best_of_majority: k must lie in 1..n, got k={self.k}, n={self.n}. Lower k, or "
                "raise n (or the budget that n is made from)."
            )
        if self.min_frequency is not None and not 0.0 <= self.min_frequency <= 1.0:
            raise OptionError(
                f"best_of_majority: min_frequency is a share in [0, 1], got {self.min_frequency}."
            )
        if self.radius is not None and not 0.0 < self.radius < float("inf"):
            raise OptionError(f"best_of_majority: radius must be positive, got {self.radius}.")
        if self.distinct and (self.frequency == "density" or self.frequency_fn is not None):
            raise OptionError(
                "best_of_majority: distinct needs frequency='labels' or 'clusters': a density "
                "has no groups to take one sample of."
            )
        if self.frequency_fn is not None:
            refuse_idle(self, "frequency_fn", "frequency", "radius", "embed")
        if self.frequency == "labels":
            refuse_idle(self, "frequency='labels'", "radius")

    def cost(self, plan: Plan) -> Cost:
        n, (rows, calls) = self.n or 1, self.per_step(plan)
        judged = n * (1 + sum(calls))
        return Cost(nfe=n * sum(rows), decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> BestOfMajority:
        if self.n is None:
            one = replace(self, k=1)
            default = max(16, self.k)
            n = afford(plan, lambda n: replace(one, n=n).cost(plan), default, "sample", self)
            return replace(self, n=n)
        within_budget(plan, self.cost(plan), f"best_of_majority with n={self.n}", self)
        return self

    def run(self, ctx: Context) -> Run:
        """Best-of-N's samples, the screen, the k best of what passes."""
        assert self.n is not None
        x, kernel, lead = ctx.noise(self.n), self.kernel(), self.lead(ctx)
        for i, (t, _) in enumerate(ctx.grid.steps()):
            x = yield from walk(ctx, x, kernel, start=i, stop=i + 1, lead=lead)
            yield Progress(step=i + 1, of=len(ctx.grid), info={"t": t.t})
        pictures, rewards = [], []
        for part in x.split(_CHUNK if ctx.plan.stationary else len(x)):
            images = yield Decode(part)
            scores = yield Score(images, part, final=True)
            pictures.append(images)
            rewards.append(as_float64(scores.value))
        images, reward = torch.cat(pictures), torch.cat(rewards)
        frequency, groups = self._frequency(images)
        chosen = self._choose(reward, frequency, groups)
        info = {"rewards": reward, "frequencies": frequency}
        yield Progress(step=len(ctx.grid), of=len(ctx.grid), info=info)
        return Outcome(
            x0=x[chosen.to(x.device)],
            images=images[chosen.to(images.device)],
            reward=reward[chosen],
            log_w=torch.zeros(len(chosen), dtype=torch.float64),
            slots=chosen,
        )

    def _frequency(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(frequency of each sample [n] float64, number of its group [n])."""
        n = len(images)
        each = torch.arange(n)
        if self.frequency_fn is not None:
            return _shares(self.frequency_fn(images), n), each
        parts = [(self.embed or thumbnails)(part) for part in images.split(_CHUNK)]
        if self.frequency == "labels":
            groups = _numbered([label for part in parts for label in _labels(part)], n)
            return _group_shares(groups), groups
        distances = _distances(parts, n)
        apart = distances[each[:, None] < each]
        middle = float(apart.median()) if n > 1 else 0.0
        if self.frequency == "clusters":
            groups = _linked(distances <= (0.5 * middle if self.radius is None else self.radius))
            return _group_shares(groups), groups
        radius = middle if self.radius is None else self.radius
        if radius == 0.0:  # most samples coincide
            return (distances == 0.0).double().mean(1), each
        return torch.exp(-0.5 * (distances / radius).square()).mean(1), each

    def _choose(self, reward: Tensor, frequency: Tensor, groups: Tensor) -> Tensor:
        """Indices of the samples to return, best first."""
        wanted = self.min_frequency
        if wanted is None:
            wanted = 0.5 * float(frequency.mean())
        order = reward.argsort(descending=True, stable=True)
        if wanted > 0.0:
            by_frequency = frequency.argsort(descending=True, stable=True)
            frequent = by_frequency[frequency[by_frequency] >= wanted]
            # Stable: of equal rewards the more frequent comes first.
            order = frequent[reward[frequent].argsort(descending=True, stable=True)]
            order = order if len(order) else by_frequency
        if self.distinct:
            firsts: dict[int, int] = {}
            for i in order.tolist():
                firsts.setdefault(int(groups[i]), i)
            order = torch.tensor(list(firsts.values()))
        return order[: self.k]


def _shares(values: Any, n: int) -> Tensor:  # noqa: ANN401
    """Frequencies of the user's own, checked: [n] float64."""
    shares = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if shares.shape != (n,) or not bool(torch.isfinite(shares).all()):
        raise OptionError(
            f"best_of_majority: frequency_fn must return one finite number per sample, {n} in "
            f"all, got {shares.tolist()}."
        )
    return shares


def _labels(values: Any) -> Sequence[Any]:  # noqa: ANN401
    """Something hashable for each sample."""
    if isinstance(values, np.ndarray | Tensor):
        return [tuple(row.flatten().tolist()) for row in values]
    return [tuple(v) if isinstance(v, list) else v for v in values]


def _numbered(labels: Sequence[Any], n: int) -> Tensor:
    """Labels as numbers of groups [n], in order of appearance."""
    if len(labels) != n:
        raise OptionError(f"best_of_majority: embed gave {len(labels)} labels for {n} samples.")
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])


def _distances(parts: Sequence[Any], n: int) -> Tensor:
    """Euclidean distances of the embeddings, [n, n] float64."""
    rows = [torch.as_tensor(part).detach().to("cpu", torch.float64) for part in parts]
    if any(row.ndim != 2 for row in rows) or sum(len(row) for row in rows) != n:
        raise OptionError(
            "best_of_majority: embed must return features [n, d] for images [n, ...], got "
            f"{[tuple(row.shape) for row in rows]}."
        )
    features = torch.cat(rows)
    if not bool(torch.isfinite(features).all()):
        raise OptionError("best_of_majority: embed returned NaN or infinity.")
    # Not by the matrix product: its rounding would part exact copies.
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def _group_shares(groups: Tensor) -> Tensor:
    """The share of samples in the same group, [n]."""
    return (groups[:, None] == groups).double().mean(1)


def _linked(near: Tensor) -> Tensor:
    """Connected components of a symmetric relation [n, n]: the first member of each, [n]."""
    while True:
        further = (near.double() @ near.double()) > 0
        if torch.equal(further, near):
            return near.int().argmax(1)
        near = further

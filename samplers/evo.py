"""EvoSearch: a population evolves along the trajectory, judged by finished samples only.

He et al. (2025), "Scaling image and video generation via test-time evolutionary search",
arXiv 2505.17618. Generation 0 is n_0 noises run to the end. Generation g starts from an archive of
everything that ever passed the node s_{g-1} with the reward it ended in: the elites go on
unchanged, the others are winners of tournaments, mutated. All are run from that node to the end,
leaving their states in the archives of later nodes. The best sample ever seen is returned.

Mutation keeps the law of the states it is applied to. At the starting noise

    x' = sqrt(1 - beta^2) x + beta z

and at a later node, with s = strength times the noise std of the sampler's own step there,

    blend:     x' = alpha x0 + sqrt(sigma^2 - s^2) eps + s z     from the cached prediction
    additive:  x' = x + s z                                      the published rule; adds variance

Blend keeps p_t up to fourth order in s / sigma. A state is denoised from the very node it was
archived at (the published code moves it a step late).

Cost with S[a:] the rows of the steps from a on: n_0 S[0:] + sum over g of n_g S[s_{g-1}:] network
rows, and one decode and reward call per individual.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan
from steering.noise import NoiseKey, blend, eps_blend
from steering.paths import Prediction
from steering.registry import METHODS
from steering.requests import Progress, Request, Run
from steering.samplers.base import Sampler, afford, refuse_idle, within_budget
from steering.samplers.rollout import judge, require_continuous, require_noise, walk


@dataclass(frozen=True, eq=False)
class Archive:
    """States at one node and the rewards they ended in.

    Attributes:
        x: [n, *event]; prediction: at these states; reward: [n] float64.
    """

    x: Tensor
    prediction: Prediction
    reward: Tensor

    def join(self, other: Archive) -> Archive:
        """Both, this one first."""
        return Archive(
            torch.cat([self.x, other.x]),
            Prediction.cat([self.prediction, other.prediction]),
            torch.cat([self.reward, other.reward]),
        )


@METHODS.register("evo")
@dataclass(frozen=True, kw_only=True)
class Evo(Sampler):
    """Evolution of noises and of states on the way.

    Attributes:
        n_particles: population of every generation, or a list with one size each (one more than
            ``schedule`` has entries); None spends the budget (8 where there is none).
        schedule: where generations 1, 2, ... start, as shares of the steps made; 0 is the
            starting noise. Empty makes one generation, which is best-of-N.
        elites: individuals of each generation that go on unchanged.
        tournament: share of the archive that competes for each parent: 1 takes the best always,
            0 a random one.
        beta: mutation of the starting noise.
        mutation: "blend" or "additive", at later nodes.
        strength: of these, in units of the noise of the sampler's step.
        archive: choose among all that ever passed a node; False for the last generation only.
    """

    n_particles: int | tuple[int, ...] | None = None
    schedule: tuple[float, ...] = (0.0, 0.4, 0.6, 0.8)
    elites: int = 2
    tournament: float = 0.9
    beta: float = 0.2
    mutation: Literal["blend", "additive"] = "blend"
    strength: float = 1.0
    archive: bool = True
    eta: float = 1.0

    name: ClassVar[str] = "evo"
    summary: ClassVar[str] = "a population evolves along the trajectory, judged when finished"
    paper: ClassVar[str] = "He et al. 2025, arXiv 2505.17618"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Authors' README and scripts, of 50 steps: SD 2.1 at 0, 20, 30, 40; FLUX.1-dev at 5, 20,
        # 30, 40; Wan at 5, 20, 30, 45. Their costs are 100, 29.3 and 20 trajectories.
        "sd21": {"n_particles": (42, 26, 26, 26, 30), "elites": 5},
        "flux": {
            "n_particles": (14, 7, 7, 7, 10),
            "schedule": (0.1, 0.4, 0.6, 0.8),
            "elites": 3,
        },
        "wan": {"n_particles": (10, 5, 5, 5, 5), "schedule": (0.1, 0.4, 0.6, 0.9), "elites": 2},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0.0 <= s < 1.0 for s in self.schedule):
            raise OptionError(f"evo: schedule holds shares in [0, 1), got {self.schedule}.")
        if list(self.schedule) != sorted(self.schedule):
            raise OptionError(f"evo: schedule must not go back, got {self.schedule}.")
        for name, low, high in (("tournament", 0.0, 1.0), ("beta", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"evo: {name} must lie in [0, 1], got {getattr(self, name)}.")
        if not 0.0 <= self.strength < float("inf"):
            raise OptionError(f"evo: strength must be finite and >= 0, got {self.strength}.")
        if self.elites < 0:
            raise OptionError(f"evo: elites must be >= 0, got {self.elites}.")
        self._check_stochastic()
        if self.n_particles is not None:
            self._check_sizes()

    def _check_stochastic(self) -> None:
        if self.kernel().stochastic:
            return
        if any(s > 0.0 for s in self.schedule):
            raise OptionError(
                "evo starts generations on the way, but eta=0 makes the sampler deterministic: "
                "the children of a state would end where it ended. Set eta > 0, or schedule=[0]."
            )
        if self.elites and self.schedule:
            raise OptionError(
                "evo: with eta=0 an elite repeats its sample exactly, which buys nothing. Set "
                "elites=0: the archive keeps the best parents anyway."
            )

    def _check_sizes(self) -> None:
        sizes, generations = self.sizes(), len(self.schedule) + 1
        if isinstance(self.n_particles, tuple) and len(sizes) != generations:
            raise OptionError(
                f"evo: schedule makes {generations} generations, n_particles has {len(sizes)} "
                "sizes. Give one number for all, or one per generation."
            )
        if min(sizes) < 1:
            raise OptionError(f"evo: n_particles must be at least 1, got {self.n_particles}.")
        if self.schedule and (sizes[0] < self.elites or min(sizes[1:]) <= self.elites):
            raise OptionError(
                f"evo: {self.elites} elites leave no room for children in generations of "
                f"{sizes}. Lower elites, or raise n_particles above it."
            )

    def sizes(self) -> tuple[int, ...]:
        """The population of each generation."""
        if isinstance(self.n_particles, tuple):
            return self.n_particles
        each = self.least if self.n_particles is None else self.n_particles
        return (each,) * (len(self.schedule) + 1)

    @property
    def least(self) -> int:
        """The smallest generations: elites, and one that is new."""
        return self.elites + 1 if self.schedule else 1

    def nodes(self, grid: Grid) -> list[int]:
        """The node that each generation after the first starts from.

        Quiet steps add no noise, so nothing is started there.
        """
        return [max(0, min(grid.nearest(s), grid.quiet - 1)) for s in self.schedule]

    def cost(self, plan: Plan) -> Cost:
        sizes, starts = self.sizes(), [0, *self.nodes(plan.grid)]
        rows, calls = (
            sum(n * sum(each[s:]) for n, s in zip(sizes, starts, strict=True))
            for each in self.per_step(plan)
        )
        judged = sum(sizes) + calls
        return Cost(nfe=rows, decodes=judged, reward_calls=judged)

    def _check_idle(self, plan: Plan) -> None:
        nodes = self.nodes(plan.grid)
        if nodes and 0 not in nodes:
            refuse_idle(self, "a schedule without the starting noise", "beta")
        if nodes and not any(nodes):
            refuse_idle(self, "a schedule of the starting noise alone", "mutation", "strength")

    def fit(self, plan: Plan) -> Evo:
        self._check_idle(plan)
        if self.n_particles is not None:
            what = f"evo with generations of {list(self.sizes())}"
            within_budget(plan, self.cost(plan), what, self)
            return self

        def cost(n: int) -> Cost:
            return replace(self, n_particles=n).cost(plan)

        what = f"search of {len(self.schedule) + 1} generations of {self.least}"
        usual = max(8, 2 * self.elites)
        return replace(self, n_particles=afford(plan, cost, usual, what, self, self.least))

    def run(self, ctx: Context) -> Run:
        sizes, starts = self.sizes(), [0, *self.nodes(ctx.grid)]
        x = ctx.noise(sizes[0])
        if self.schedule:
            require_continuous(self.name, x, "mutation")
        if 0 in starts[1:]:
            require_noise(self.name, ctx)
        best, made, archives = None, 0, Archives(nodes=starts[1:], all=self.archive)
        for g, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if g:
                x = self._children(ctx, archives.at(g), start, size, g)
            passed: dict[int, tuple[Tensor, Prediction]] = {}
            x = yield from self._complete(ctx, x, start, g, passed)
            rewards, best = yield from judge(x, best, made)
            archives.add(g, passed, rewards)
            made += size
            info = {"generation": g, "node": start, "rewards": rewards, "best": best.reward}
            yield Progress(step=g + 1, of=len(sizes), info=info, preview=best.image)
        assert best is not None
        return best.outcome()

    def _complete(
        self,
        ctx: Context,
        x: Tensor,
        start: int,
        g: int,
        passed: dict[int, tuple[Tensor, Prediction]],
    ) -> Generator[Request, Any, Tensor]:
        """Generation g run from node ``start`` to the end; what it passed is left behind."""
        later = set(self.nodes(ctx.grid)[g:])

        def visit(node: int, x: Tensor, prediction: Prediction) -> None:
            if node in later:
                passed[node] = (x, prediction)

        stream = f"generation/{g}" if g else "proposal"
        kernel, lead = self.kernel(), self.lead(ctx)
        return (
            yield from walk(ctx, x, kernel, start=start, stream=stream, visit=visit, lead=lead)
        )

    def _children(self, ctx: Context, parents: Archive, node: int, size: int, g: int) -> Tensor:
        """Generation g at its node, [size, *event]: elites as they are, then mutated winners."""
        order = parents.reward.argsort(descending=True, stable=True)
        elites = order[: self.elites]
        uniform = ctx.key("tournament", g)
        chosen = tournament(parents.reward, size - len(elites), self.tournament, uniform)
        place = parents.x.device
        mutated = self._mutate(ctx, parents, chosen.to(place), node, g)
        return torch.cat([parents.x[elites.to(place)], mutated])

    def _mutate(self, ctx: Context, parents: Archive, rows: Tensor, node: int, g: int) -> Tensor:
        """These rows of the archive at ``node``, changed, [len(rows), *event]."""
        x, t, u = parents.x[rows], ctx.grid.times[node], ctx.grid.times[node + 1]
        if node == 0:
            # The model's own starting law: not every model starts at N(0, I).
            return blend(x, ctx.noise(len(x), stream=f"mutation/{g}"), self.beta)
        z = ctx.key("mutation", g).normal(len(x), x.shape[1:], device=str(x.device)).to(x)
        prediction = parents.prediction.rows(rows)
        std = self.strength * float(self.kernel()(x, prediction, t, u, ctx.model.path).std)
        if self.mutation == "additive":
            return x + std * z
        share = min(1.0, std / t.sigma)
        return eps_blend(prediction.x0, prediction.eps, z, t.alpha, t.sigma, share)


@dataclass(eq=False)
class Archives:
    """What passed the start of each generation after the first.

    Attributes:
        nodes: where generations 1, 2, ... start.
        all: keep earlier generations too.
    """

    nodes: list[int]
    all: bool
    kept: dict[int, Archive] = field(default_factory=dict)

    def at(self, g: int) -> Archive:
        """The parents that generation g chooses from."""
        return self.kept[self.nodes[g - 1]]

    def add(self, g: int, passed: dict[int, tuple[Tensor, Prediction]], reward: Tensor) -> None:
        """States of generation g by node, and the rewards [n] they ended in."""
        for node, (x, prediction) in passed.items():
            found = Archive(x, prediction, reward)
            earlier = self.kept.get(node) if self.all else None
            self.kept[node] = found if earlier is None else earlier.join(found)


def tournament(reward: Tensor, n: int, share: float, key: NoiseKey) -> Tensor:
    """n winners [n]: each the best of a random subset of the rewards [m], its own every time.

    Args:
        share: of the m that enter each subset, without repeats; at least one does.
    """
    m = len(reward)
    entrants = max(1, round(share * m))
    subsets = key.uniform(n, (m,)).argsort(1)[:, :entrants]
    order = reward.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(m)
    return order[rank[subsets].min(1).values]

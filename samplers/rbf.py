"""Rollover budget forcing: at each noise level try next states one by one until one is better.

Kim et al. (2025), "Inference-time scaling for flow models via stochastic generation and rollover
budget forcing", arXiv 2503.19385. A flow is turned into an SDE and moved to a variance-preserving
path, whose early levels give more varied proposals. Per chain:

    start    the best of n_init noises; its estimate of x0 sets the bar R*
    level k  propose x_u ~ p(x_u | x_t), score its estimate of x0
             better than R*: R* = its reward, go to it, Q_{k+1} = Q_k - used_k + q_{k+1}
             quota Q_k used up: go to the best proposal of the level, Q_{k+1} = q_{k+1}
    last     spend all that is left, then denoise the best proposal to the end

The network's answer at a proposal is its drift later, so a proposal costs one network row, one
decode and one reward call. Chains do not meet until the best of their finished samples is chosen.
With guidance all proposals from a state lean by one gradient, which is asked for once.

Cost of C chains: C (n_init + n_proposals + k - 1) network rows for k finishing steps, and
C (n_init + n_proposals + 1) decodes and reward calls; at most, where ``reward_max`` or
``spend_rest=False`` stop it early. Guidance adds its decodes and reward calls once a level and
finishing step, and where it goes through the network a row a level and one before the finish.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import BudgetError, OptionError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.model import Model
from steering.paths import VP, Linear, Path
from steering.registry import METHODS
from steering.requests import Decode, Denoise, Progress, Request, Run, Score
from steering.samplers.base import Sampler, afford, reaches, refuse_idle, within_budget
from steering.samplers.guides import Guide, Rows
from steering.samplers.rbf_chain import Chain, Quotas, Stand, best_of, each_level
from steering.samplers.rbf_levels import OnPath, check_noise, rbf_grid, shape_of
from steering.samplers.rollout import judge, walk
from steering.samplers.twists import draw, require_gaussian
from steering.transitions import ODE, Transition

PATHS: dict[str, Path | None] = {"vp": VP(), "linear": Linear(), "own": None}
_LEVELS = 10
_AHEAD = 8  # proposals of a level whose noise is drawn in one pass
_DEFAULT = 225  # proposals of a chain: 500 rows for two chains of 25 + 225


@METHODS.register("rbf")
@dataclass(frozen=True, kw_only=True)
class RBF(Sampler):
    """Rollover budget forcing.

    Attributes:
        n_proposals: proposals of each chain; None spends the budget (225 where there is none).
        n_init: starting noises of each chain, of which the best is kept.
        n_chains: independent searches.
        quota: proposals per level: one number, a list with one per level, or None for equal
            shares. The last level has what is left over.
        rollover: what an early success leaves of a quota goes to the next level; without it, to
            the last level.
        accept, margin: a proposal succeeds when its reward is ``accept`` bar + margin.
        bar: "global" is the best reward so far; "level" that of the state stood on.
        forced: where a level's quota is used up, go to its "best" proposal or to its "first",
            which is a plain step of the sampler.
        batch: proposals tried at once; the best of them counts, all of them are used.
        spend_rest: the last level spends all that is left; False ends it at its own quota.
        last_level: the last level searched, from 0; by default the last one that adds more than
            a trace of noise.
        reward_max: stop as soon as an estimate reaches this reward, and finish that state.
        finish: "ode" denoises the end of the search in ``finish_steps`` steps and scores the
            result; "none" delivers the one-step estimate of x0, which suits distilled models.
        path: where levels and Euler-Maruyama steps live: "vp", "linear", or the model's "own". The
            eta-kernel and the grids "karras" and "own" are the same on all of them.
        grid, steps: the shape of the levels in that path's time (10 by default); "karras" goes by
            noise levels, "own" takes the pipeline's own. The authors' shape "rbf" ends its search
            at a noise share of 0.71: where the sample differs from the one-step estimate, what
            was found is lost.
        level_times: explicit times of the path instead, falling from 1 to 0.
        transition, eta: as everywhere; "rbf" is the authors' g = 3 t^2.
    """

    n_proposals: int | None = None
    n_init: int = 25
    n_chains: int = 2
    quota: int | tuple[int, ...] | None = None
    rollover: bool = True
    accept: Literal[">", ">="] = ">"
    margin: float = 0.0
    bar: Literal["global", "level"] = "global"
    forced: Literal["best", "first"] = "best"
    batch: int = 1
    spend_rest: bool = True
    last_level: int | None = None
    reward_max: float | None = None
    finish: Literal["ode", "none"] = "ode"
    finish_steps: int = 8
    path: Literal["vp", "linear", "own"] = "vp"
    grid: str = "uniform"
    level_times: tuple[float, ...] | None = None
    eta: float = 1.0

    name: ClassVar[str] = "rbf"
    summary: ClassVar[str] = "proposals one by one at each level, unused quota rolls over"
    paper: ClassVar[str] = "Kim et al. 2025, arXiv 2503.19385"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = True
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Published configuration for FLUX.1-schnell: 500 rows of which 498 are spent, 10 levels
        # sqrt(1 - u^2) of VP(0.1, 20), g = 3 t^2, 2 chains of 25 noises, quota (500 - 50) / 20;
        # the last transition is never made and the one-step estimate is delivered.
        "flux": {
            "n_proposals": 224,
            "n_init": 25,
            "n_chains": 2,
            "quota": 22,
            "grid": "rbf",
            "steps": 10,
            "path": "vp",
            "transition": "rbf",
            "finish": "none",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_proposals", "n_init", "n_chains", "batch", "finish_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"rbf: {name} must be at least 1, got {value}.")
        quotas = self.quota if isinstance(self.quota, tuple) else (self.quota,)
        if any(q is not None and q < 1 for q in quotas):
            raise OptionError(f"rbf: every level's quota must be at least 1, got {self.quota}.")
        if self.last_level is not None and self.last_level < 0:
            raise OptionError(f"rbf: last_level must be >= 0, got {self.last_level}.")
        if not 0.0 <= self.margin < float("inf"):
            raise OptionError(f"rbf: margin must be finite and >= 0, got {self.margin}.")
        times = self.level_times
        if times is not None and (len(times) < 3 or times[0] != 1.0 or times[-1] != 0.0):
            raise OptionError(
                f"rbf: level_times must fall from 1 to 0 with a level between, got {times}."
            )
        if times is not None:
            refuse_idle(self, "level_times", "grid", "steps")
        if self.finish == "none":
            refuse_idle(self, "finish='none'", "finish_steps")
        if not self.kernel().stochastic:
            raise OptionError(
                "rbf proposes next states, but eta=0 makes the sampler deterministic: all "
                "proposals would be equal. Set eta > 0, or transition='rbf'."
            )

    def _check_guide(self, guide: Guide) -> None:
        super()._check_guide(guide)
        if guide.recurrence > 1:
            raise OptionError(
                "rbf: proposals from a state share its gradient, and a repeated step would need "
                "one of its own for each. Set recurrence=1 in its guidance, or use random_search."
            )

    def kernel(self) -> Transition:
        """The transition these options name, made on ``path``."""
        kernel, path = super().kernel(), PATHS[self.path]
        # The eta-kernel is the same on every path.
        return kernel if path is None or self.transition == "eta" else OnPath(kernel, path)

    def levels(self, model: Model) -> Grid:
        """The levels to search, then those of the finishing steps."""
        if self.guide is not None:
            require_gaussian("rbf with guidance", model)
        own = model.grid()
        name, steps = self.level_times or self.grid, self.steps or _LEVELS
        shape, clock = shape_of(name, steps, own.times[0], PATHS[self.path])
        count = len(own) if shape is None else len(shape) - 1
        if count < 2:
            raise OptionError(
                "rbf: one step has no level to search (the step to the end adds no noise). Give "
                "it steps >= 2, or levels of its own instead of grid='own'."
            )
        usual = rbf_grid(model.path, own, clock, shape, count - 2, 1).quiet - 1
        last = max(0, usual) if self.last_level is None else self.last_level
        if not 0 <= last <= count - 2:
            raise OptionError(
                f"rbf: with {count} levels the last one to search lies in 0..{count - 2} (the "
                f"step to the end adds no noise), got {last}."
            )
        grid = rbf_grid(model.path, own, clock, shape, last, self._tail)
        check_noise(self.kernel(), grid, last)
        return grid

    @property
    def _tail(self) -> int:
        return self.finish_steps if self.finish == "ode" else 1

    def last(self, grid: Grid) -> int:
        """The last level searched on a grid made by ``levels``."""
        return len(grid) - self._tail - 1

    def least(self, grid: Grid) -> int:
        """The fewest proposals of a chain: the quotas of its levels, or one each."""
        return sum(each_level(self.quota, self.last(grid) + 1))

    def quotas(self, grid: Grid) -> Quotas:
        """Proposals of each level.

        Raises:
            OptionError, BudgetError: they do not fit the levels, or the proposals.
        """
        levels, total = self.last(grid) + 1, self.n_proposals or self.least(grid)
        each = each_level(self.quota, levels, total)
        if sum(each) > total:
            raise BudgetError(
                f"rbf: {total} proposals do not fill {levels} levels with quotas that sum to "
                f"{sum(each)}. Raise n_proposals to {sum(each)}, or lower quota or the levels."
            )
        return Quotas(each=each, total=total, rollover=self.rollover, spend_rest=self.spend_rest)

    def cost(self, plan: Plan) -> Cost:
        """Exact where nothing stops early and all rows cost the same, else at most.

        Without n_proposals a lower bound: how many levels there are is for ``fit`` to say.
        """
        quota = self.quota if isinstance(self.quota, tuple) else (self.quota or 1,)
        tried = self.n_init + (self.n_proposals or sum(quota))
        again, calls = self._guided(plan)
        rows = self.n_chains * max(plan.costs)
        judged = self.n_chains * (tried + 1 + calls)
        nfe = rows * (tried + self._tail - 1 + again)
        return Cost(nfe=nfe, decodes=judged, reward_calls=judged)

    def _guided(self, plan: Plan) -> tuple[int, int]:
        """What guidance adds for a chain: states asked again, and decodes and reward calls."""
        if self.guide is None:
            return 0, 0
        # Where a search ends, a state is known and the finishing walk starts.
        known = self.last(plan.grid) + (2 if self.finish == "ode" else 1)
        end = len(plan.grid) if self.finish == "ode" else known
        again = [i for i in self.guide.guided_steps(plan.grid) if i < known]
        return len(again) * (self.guide.rho > 0.0), sum(self.per_step(plan)[1][:end])

    def fit(self, plan: Plan) -> RBF:
        self.quotas(plan.grid)
        if self.n_proposals is not None:
            within_budget(plan, self.cost(plan), f"rbf with {self.n_proposals} proposals", self)
            return self
        least = self.least(plan.grid)

        def cost(n: int) -> Cost:
            return replace(self, n_proposals=n).cost(plan)

        levels, each = self.last(plan.grid) + 1, f"{self.n_init} noises and {least} proposals"
        what = f"search of {levels} levels (by {self.n_chains} chains, {each} each)"
        n = afford(plan, cost, max(_DEFAULT, least), what, self, least)
        return replace(self, n_proposals=n)

    def run(self, ctx: Context) -> Run:
        chains = yield from self._start(ctx)
        goal = self._goal([chain.stand for chain in chains])
        while goal is None and (searching := [c for c in chains if c.size(self.batch)]):
            found = yield from self._propose(ctx, searching)
            for chain, stands in zip(searching, found, strict=True):
                yield Progress(
                    step=chain.level,
                    of=self.last(ctx.grid) + 1,
                    info={"chain": chain.index, **self._learn(chain, stands)},
                )
            goal = self._goal([s for stands in found for s in stands])
        return (yield from self._finish(ctx, [c.end for c in chains] if goal is None else [goal]))

    def _start(self, ctx: Context) -> Generator[Request, Any, list[Chain]]:
        """The best of n_init noises for each chain."""
        x, n = ctx.noise(self.n_chains * self.n_init), self.n_init
        stands = yield from self._ask(ctx, x, [0] * len(x))
        chains, quotas = [], self.quotas(ctx.grid)
        for c in range(self.n_chains):
            own = stands[c * n : (c + 1) * n]
            chains.append(Chain(index=c, stand=best_of(own), quotas=quotas))
        rewards = [stand.reward for stand in stands]
        yield Progress(step=0, of=self.last(ctx.grid) + 1, info={"rewards": rewards})
        return chains

    def _propose(
        self, ctx: Context, chains: list[Chain]
    ) -> Generator[Request, Any, list[list[Stand]]]:
        """Next states of every chain, asked about together."""
        yield from self._lean(ctx, chains)
        plain = [chain for chain in chains if chain.seen is None]
        ctx.foresee(name for chain in plain for name in chain.noise(_AHEAD))
        kernel = self.kernel()
        states = [self._next(ctx, chain, kernel) for chain in chains]
        nodes = [
            chain.level + 1 for chain, x in zip(chains, states, strict=True) for _ in range(len(x))
        ]
        stands = yield from self._ask(ctx, torch.cat(states), nodes)
        sizes = [len(x) for x in states]
        return [stands[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]

    def _lean(self, ctx: Context, chains: list[Chain]) -> Generator[Request, Any, None]:
        """Gradients at the states of chains that are new at a guided level, once for each."""
        if (lead := self.lead(ctx)) is None:
            return
        guided = lead.guide.guided_steps(ctx.grid)
        new = [c for c in chains if c.seen is None and c.level in guided]
        for k in sorted({chain.level for chain in new}):
            group = [chain for chain in new if chain.level == k]
            x = torch.cat([chain.stand.x for chain in group])
            known = type(group[0].stand.prediction).cat([c.stand.prediction for c in group])
            rows = Rows([chain.index for chain in group], "lean")
            seen = yield from lead.guide.look(
                ctx, x, ctx.grid.times[k], k, lead.reward_scale, rows=rows, prediction=known
            )
            for i, chain in enumerate(group):
                chain.seen = seen.rows(slice(i, i + 1))

    def _next(self, ctx: Context, chain: Chain, kernel: Transition) -> Tensor:
        """Proposals of a chain [m, *event]: draws from the kernel, which may lean."""
        m, k, here = chain.size(self.batch), chain.level, chain.stand
        t, u = ctx.grid.times[k], ctx.grid.times[k + 1]
        rows = torch.zeros(m, dtype=torch.long, device=here.x.device)
        x = here.x[rows] if m > 1 else here.x
        slots = range(chain.spent, chain.spent + m)
        if chain.seen is not None and self.guide is not None:
            seen = chain.seen.rows(rows)
            base, shift = self.guide.proposal(ctx, x, seen, t, u, k, kernel)
            return draw(ctx, base, shift, k, chain.stream, slots)[0]
        prediction = here.prediction.rows(rows) if m > 1 else here.prediction
        return ctx.move(x, prediction, t, u, kernel, step=k, slots=slots, stream=chain.stream)

    def _ask(
        self, ctx: Context, x: Tensor, nodes: list[int]
    ) -> Generator[Request, Any, list[Stand]]:
        """States x [n, *event] with the network's answer and the reward of its estimate."""
        prediction = yield Denoise(x, [ctx.grid.times[k] for k in nodes])
        images = yield Decode(prediction.x0, preview=True)
        scores = yield Score(images, prediction.x0)
        rewards = as_float64(scores.value).tolist()
        rows = [slice(i, i + 1) for i in range(len(x))]
        return [
            Stand(x[r], prediction.rows(r), reward, node)
            for r, reward, node in zip(rows, rewards, nodes, strict=True)
        ]

    def _learn(self, chain: Chain, stands: list[Stand]) -> dict[str, Any]:
        """Moves a chain by what its proposals earned; says what happened."""
        best, level, quota = best_of(stands), chain.level, chain.quota
        chain.note(stands, best)
        passed = self._passes(best.reward, chain.bar)
        info = {"level": level, "quota": quota, "used": chain.used, "reward": best.reward}
        if passed:
            chain.bar = best.reward
        if level < chain.quotas.last:
            if passed:
                chain.advance(best, early=True)
            elif chain.used == chain.quota:
                to = chain.first if self.forced == "first" else chain.best
                assert to is not None
                chain.advance(to, early=False)
                if self.bar == "level":
                    chain.bar = to.reward
        moved, stand = chain.level > level, chain.stand.reward
        return {**info, "accepted": passed, "moved": moved, "bar": chain.bar, "stand": stand}

    def _passes(self, reward: float, bar: float) -> bool:
        wanted = bar + self.margin
        return reward > wanted if self.accept == ">" else reward >= wanted

    def _goal(self, stands: list[Stand]) -> Stand | None:
        """The best of these if it reaches reward_max."""
        best = best_of(stands)
        return best if reaches(best.reward, self.reward_max) else None

    def _finish(self, ctx: Context, ends: list[Stand]) -> Run:
        """The best of the ends, which share a node, once they are samples."""
        x = torch.cat([end.x for end in ends])
        prediction = type(ends[0].prediction).cat([end.prediction for end in ends])
        if self.finish == "none":
            x = prediction.x0
        else:
            x = yield from walk(
                ctx,
                x,
                ODE,
                start=ends[0].node,
                prediction=prediction,
                stream="finish",
                lead=self.lead(ctx),
            )
        rewards, best = yield from judge(x, None)
        of = self.last(ctx.grid) + 1
        info = {"finished": rewards, "best": best.reward}
        yield Progress(step=of, of=of, info=info, preview=best.image)
        return best.outcome()

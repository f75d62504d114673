"""Parallel tempering: chains of whole samples at rising reward_scale that exchange their states.

Chain k keeps the law p(x0) exp(lambda_k r(x0)) by Metropolis-Hastings moves of what the sample is
made from, proposed so that the model's own law is kept (Cotter et al. 2013):

    blend   the starting noise z becomes sqrt(1 - b^2) z + b xi, and the ODE is followed again
    tail    the path up to a noise level stays, the rest is drawn again

both accepted with probability min(1, exp(lambda_k (r' - r))). Neighbours are then exchanged with
probability min(1, exp((lambda_j - lambda_i)(r_i - r_j))), which asks the network nothing, so that
samples found where the reward counts little can climb (Swendsen & Wang 1986; Geyer 1991; for
language models Puri et al. 2025, arXiv 2502.01618).

Guided tails are drawn from a density q, the same for all chains. The first probability is then
min(1, exp(lambda_k (r' - r) + s' - s)) with s = log p - log q of a path; the second is the same.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.method import Context, Cost, Plan, as_float64
from steering.noise import blend
from steering.particles import State
from steering.registry import METHODS
from steering.requests import Decode, Progress, Request, Run, Score
from steering.samplers.base import (
    Sampler,
    afford,
    check_levels,
    check_scale,
    checkpoint_steps,
    refuse_idle,
    within_budget,
)
from steering.samplers.guided import led
from steering.samplers.guides import Guide, Rows
from steering.samplers.pool import Pool
from steering.samplers.rollout import require_noise

_CHAINS, _ITERATIONS = 4, 12


@METHODS.register("parallel_tempering")
@dataclass(frozen=True, kw_only=True)
class ParallelTempering(Sampler):
    """Parallel tempering.

    Attributes:
        n_particles: chains; None takes as many as ``ladder`` has, else 4, or what the budget
            pays for.
        ladder: reward_scale of each chain as a share of the full one, from low to high, ending
            at 1; equal entries are chains side by side. None spaces them evenly from 0 to 1.
        iterations: moves of every chain; None spends the budget (12 where there is none).
        reward_scale: of the last chain, whose samples are delivered; None as in `fk`.
        move: "blend" for deterministic transitions (eta=0), "tail" for random ones. "blend"
            needs starting states that are centred Gaussian noise.
        blend: share b of fresh noise in a proposal of the last chain; a chain at share s of
            the ladder takes b^s, so that one at 0 draws afresh.
        cuts: where "tail" cuts a path, as fractions of the steps made. Moves go round: a whole
            new path, then a new tail from each level.
        swap_every: iterations between exchanges.
        burn_in: first iterations whose samples get no weight; None takes a quarter of them.

    Samples of the last chain are delivered, each once, with the number of iterations it stayed
    as weight; the best sample of any chain is always among them.
    """

    n_particles: int | None = None
    ladder: tuple[float, ...] | None = None
    iterations: int | None = None
    reward_scale: float | None = None
    move: Literal["blend", "tail"] = "blend"
    blend: float = 0.4
    cuts: tuple[float, ...] = (0.25, 0.5, 0.75)
    swap_every: int = 1
    burn_in: int | None = None

    name: ClassVar[str] = "parallel_tempering"
    summary: ClassVar[str] = "chains of samples at rising reward_scale that exchange states"
    paper: ClassVar[str] = "Swendsen & Wang 1986; Geyer 1991; Puri et al. 2025, arXiv 2502.01618"
    target: ClassVar[str] = "tilted"
    needs_gradient: ClassVar[bool] = False
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("n_particles", "iterations", "swap_every"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"parallel_tempering: {option} must be at least 1, got {value}.")
        if self.ladder is not None:
            self._check_ladder(self.ladder)
        if not 0.0 < self.blend <= 1.0:
            raise OptionError(f"parallel_tempering: blend must lie in (0, 1], got {self.blend}.")
        if not all(0.0 <= f < 1.0 for f in self.cuts):
            raise OptionError(
                f"parallel_tempering: cuts are fractions in [0, 1), got {self.cuts}."
            )
        if self.burn_in is not None and not 0 <= self.burn_in < (
            self.iterations or self.burn_in + 1
        ):
            raise OptionError(
                f"parallel_tempering: burn_in must lie in 0..iterations - 1, got {self.burn_in}."
            )
        check_scale("parallel_tempering", self.reward_scale)
        idle = "cuts" if self.move == "blend" else "blend"
        refuse_idle(self, f"move={self.move!r}", idle)
        if self.kernel().stochastic != (self.move == "tail"):
            raise OptionError(
                "parallel_tempering: move='blend' moves the starting noise of deterministic "
                "transitions (eta=0), move='tail' draws the end of a random path again (eta > 0); "
                f"got move={self.move!r} with eta={self.eta}, transition={self.transition!r}."
            )

    def _check_ladder(self, ladder: Sequence[float]) -> None:
        rising = all(a <= b for a, b in pairwise(ladder))
        if not ladder or not rising or ladder[0] < 0.0 or ladder[-1] != 1.0:
            raise OptionError(
                "parallel_tempering: ladder holds shares of reward_scale that rise from 0 or more "
                f"to exactly 1, got {ladder}."
            )
        if self.n_particles not in (None, len(ladder)):
            raise OptionError(
                f"parallel_tempering: a ladder of {len(ladder)} is for as many chains, not for "
                f"n_particles={self.n_particles}. Leave n_particles out."
            )

    def _check_guide(self, guide: Guide) -> None:
        if self.move == "blend":
            raise OptionError(
                "parallel_tempering: guided steps of move='blend' would bend the ODE, whose "
                "density nobody knows. Set move='tail' and eta=1."
            )
        super()._check_guide(guide)

    @property
    def weighed(self) -> bool:
        return True

    # --- what it costs ---

    def _starts(self, where: Plan | Context) -> list[int]:
        """Where the moves of one round start on the grid; 0 is a new or a blended noise."""
        if self.move == "blend":
            return [0]
        return [0, *[i for i in checkpoint_steps(where.grid, self.cuts) if i]]

    def cost(self, plan: Plan) -> Cost:
        n, moves, starts = len(self.shares()), self.iterations or 1, self._starts(plan)
        begun = [0, *(starts[m % len(starts)] for m in range(moves))]
        rows, calls = (n * sum(sum(each[a:]) for a in begun) for each in self.per_step(plan))
        judged = calls + n * len(begun)
        return Cost(nfe=rows, decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> ParallelTempering:
        if self.move == "tail":
            check_levels(self, "cuts", plan.grid, checkpoint_steps(plan.grid, self.cuts))
        n = self.n_particles or (len(self.ladder) if self.ladder else None)
        if n is None:
            most = afford(
                plan, lambda n: replace(self, n_particles=n).cost(plan), _CHAINS, "chain", self
            )
            # Where the number of moves is open too, the budget goes to them.
            n = most if self.iterations else min(most, _CHAINS)
        fitted = replace(self, reward_scale=plan.scale(self.reward_scale), n_particles=n)
        within_budget(plan, fitted.cost(plan), f"parallel_tempering with {n} chains", self)
        moves = self.iterations or fitted._moves(plan)
        burn_in = moves // 4 if self.burn_in is None else self.burn_in
        if burn_in >= moves:
            raise OptionError(
                f"parallel_tempering: the budget pays for {moves} iterations, burn_in={burn_in} "
                "leaves none of them. Lower burn_in or raise the budget."
            )
        return replace(fitted, iterations=moves, burn_in=burn_in)

    def _moves(self, plan: Plan) -> int:
        """As many moves as the budget pays for."""
        n, nfe, calls = self.n_particles or 1, plan.budget.nfe, plan.budget.reward_calls
        if nfe is None and calls is None:
            return max(_ITERATIONS, (self.burn_in or 0) + 1)
        rows, more = self.per_step(plan)
        left = float("inf") if nfe is None else nfe // n - sum(rows)
        asks = float("inf") if calls is None else calls // n - 1 - sum(more)
        moves = 0
        for start in cycle(self._starts(plan)):
            left, asks = left - sum(rows[start:]), asks - 1 - sum(more[start:])
            if left < 0 or asks < 0:
                return moves
            moves += 1
        return moves

    # --- the algorithm ---

    def shares(self) -> list[float]:
        """The ladder, one share of reward_scale per chain."""
        n = self.n_particles or 1
        return list(self.ladder) if self.ladder else [1.0] if n == 1 else [
            k / (n - 1) for k in range(n)
        ]  # fmt: skip

    def run(self, ctx: Context) -> Run:
        assert self.iterations is not None
        assert self.burn_in is not None
        assert self.reward_scale is not None
        self._check_model(ctx)
        pool, n, starts = Pool(), len(self.shares()), self._starts(ctx)
        scales = self.reward_scale * torch.tensor(self.shares(), dtype=torch.float64)
        coldest = [k for k, share in enumerate(self.shares()) if share == 1.0]
        chains, images = yield from self._walk(ctx, None, ctx.noise(n), 0, 0)
        pool.add(range(n), chains.x, images, chains.memory["reward"])
        for m in range(1, self.iterations + 1):
            start = starts[(m - 1) % len(starts)]
            proposal, images = yield from self._propose(ctx, chains, start, m)
            numbers = proposal.memory["number"].tolist()
            pool.add(numbers, proposal.x, images, proposal.memory["reward"])
            accept = accepted(
                scales, chains.memory["reward"], proposal.memory["reward"],
                ctx.key("accept", m).uniform(n),
                (proposal.memory["ratio"] - chains.memory["ratio"]).sum(1),
            )  # fmt: skip
            chains = _choose(accept, proposal, chains)
            order = torch.arange(n)
            if m % self.swap_every == 0:
                uniform = ctx.key("swap", m).uniform(n)
                first = (m // self.swap_every) % 2
                order = exchanged(scales, chains.memory["reward"], uniform, first)
                chains = chains.gather(order)
            held = chains.memory["number"].tolist()
            if m > self.burn_in:
                pool.weigh([held[k] for k in coldest], [1.0] * len(coldest))
            pool.prune(held)
            info = {"rewards": chains.memory["reward"], "accepted": accept, "order": order}
            yield Progress(step=m, of=self.iterations, info=info)
        return pool.outcome(ctx.model.device)

    def _check_model(self, ctx: Context) -> None:
        if self.move == "tail":
            return
        if getattr(getattr(ctx.model, "transition", None), "stochastic", False):
            raise OptionError(
                f"parallel_tempering: {ctx.model.name!r} moves at random by itself, so its "
                "samples are not a function of the starting noise. Use move='tail' with eta=1."
            )
        require_noise(self.name, ctx)

    def _propose(
        self, ctx: Context, chains: State, start: int, m: int
    ) -> Generator[Request, Any, tuple[State, Tensor]]:
        """A proposal for every chain: (finished samples, their pictures)."""
        if start:
            x = chains.memory[f"node/{start}"]
        else:
            x = ctx.noise(len(chains), stream=f"fresh/{m}")
            if self.move == "blend":
                rows = zip(chains.memory["node/0"], x, self.shares(), strict=True)
                x = torch.stack([blend(z, xi, self.blend**share) for z, xi, share in rows])
        return (yield from self._walk(ctx, chains, x, start, m))

    def _walk(
        self, ctx: Context, chains: State | None, x: Tensor, start: int, m: int
    ) -> Generator[Request, Any, tuple[State, Tensor]]:
        """From grid node ``start`` to the end; what lies before it is taken from ``chains``."""
        kernel, n, keep = self.kernel(), len(x), self._starts(ctx)
        keep = keep if self.move == "blend" else keep[1:]
        zeros = torch.zeros(n, len(ctx.grid), dtype=torch.float64)
        memory = {"ratio": zeros} if chains is None else dict(chains.memory)
        ratio, lead = memory["ratio"].clone(), self.lead(ctx)
        stream = f"proposal/{m}" if m else "proposal"
        for i, (t, u) in enumerate(ctx.grid.steps()):
            if i < start:
                continue
            if i in keep:
                memory[f"node/{i}"] = x
            x, ratio[:, i] = yield from led(
                ctx, x, t, u, i, kernel, lead, weighed=True, rows=Rows(stream=stream)
            )
        memory["ratio"] = ratio
        images = yield Decode(x)
        scores = yield Score(images, x, final=True)
        memory["reward"] = as_float64(scores.value)
        memory["number"] = torch.arange(m * n, (m + 1) * n)
        return State.start(x, **memory), images


def accepted(
    scales: Tensor,
    reward: Tensor,
    proposed: Tensor,
    uniform: Tensor,
    ratio: Tensor | float = 0.0,
) -> Tensor:
    """Which Metropolis-Hastings proposals are taken, [n] bool: u < exp(scale (r' - r) + ratio).

    Between two rewards of -inf, and at scale 0, only the ratio counts.

    Args:
        ratio: change of log p - log q where proposals were not drawn from the model's own law p.
    """
    return uniform.log() < (scales * (proposed - reward)).nan_to_num(nan=0.0) + ratio


def exchanged(scales: Tensor, reward: Tensor, uniform: Tensor, first: int) -> Tensor:
    """The order of the chains [n] after neighbours k, k + 1 (k = first, first + 2, ...) met."""
    order = torch.arange(len(scales))
    for k in range(first, len(scales) - 1, 2):
        odds = (scales[k + 1] - scales[k]) * (reward[k] - reward[k + 1])
        if uniform[k].log() < odds.nan_to_num(nan=0.0):
            order[k], order[k + 1] = k + 1, k
    return order


def _choose(accept: Tensor, proposal: State, chains: State) -> State:
    """Each chain's proposal where accepted, its present state elsewhere."""
    n = len(accept)
    memory = {k: torch.cat([chains.memory[k], v]) for k, v in proposal.memory.items()}
    both = State.start(torch.cat([chains.x, proposal.x]), **memory)
    return both.gather(torch.arange(n) + n * accept.long())

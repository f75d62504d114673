"""What tree searches share: rollouts in rounds, progressive widening, a budget, a file.

Every rollout walks from a node of a tree to the end of the grid; its states at the branch levels
become nodes, its reward is backed up (steering.samplers.tree has the equations). The next rollout
descends from the root and leaves the tree at the first node that has fewer children than

    B(visits) = ceil(widening * visits^widening_power)              (progressive widening)

Cost: a rollout from a node at grid node g makes the steps g, g + 1, ..., one network call each, so
a tree costs the steps between its nodes, each once. Rollouts end where the next would exceed the
budget. One decode and one reward call per rollout; only finished samples are scored. Guided steps
add the calls of their gradients, each once too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from steering.errors import BudgetError, OptionError, TimeUp
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.noise import NoiseKey
from steering.requests import Decode, Outcome, Progress, Request, Run, Score
from steering.samplers.base import (
    Sampler,
    check_levels,
    check_scale,
    checkpoint_steps,
    refuse_idle,
    within_budget,
)
from steering.samplers.tree import ROOT, Backup, Tree, writable
from steering.samplers.tree_files import decode_again, load_for, noise_of, tree_file
from steering.samplers.tree_rollout import roll_out

_DEFAULT = 16
"""Trajectories where neither the user nor a budget says how many."""

_FREE = 8
"""Descents in a row that may end at a finished sample before a node above it branches anyway."""


class Price(NamedTuple):
    """Network rows, and decodes and reward calls: of rollouts, or left to spend on them."""

    rows: int
    calls: float

    def covers(self, other: Price) -> bool:
        return self.rows >= other.rows and self.calls >= other.calls

    def minus(self, other: Price) -> Price:
        return Price(self.rows - other.rows, self.calls - other.calls)


@dataclass(frozen=True, kw_only=True)
class TreeSearch(Sampler):
    """Base of the tree searches; a subclass says how to descend and what to deliver.

    Attributes:
        trajectories: network rows to spend, in units of one rollout from noise to data; None
            spends the budget (16 where there is none).
        reward_scale: lambda of the values; None as in `fk`.
        branch_levels: where states are kept and may branch, as fractions of the steps made.
            Fresh noise always branches; () leaves nothing else, which is best-of-N.
        noise_levels: the same as noise shares sigma / (alpha + sigma), instead of fractions.
        widening, widening_power: a node visited v times may have widening * v^widening_power
            children, rounded up; power 0 fixes their number.
        max_children: most children of any node; None sets no limit.
        backup: a node's value from its children's: "soft" (log mean exp), "mean" or "max".
        width: rollouts chosen before any of them is finished, and run in one batch. Their visits
            count at once; 1 is the sequential algorithm.
        save_tree: file for the tree, written at the end, also of a stopped or failed run. With
            several prompts the index of each is put before the suffix.
        load_tree: file of a tree to go on with. Its rewards are taken as they are, so the
            reward must be the same; its samples are decoded again where they are delivered, also
            past a cap on seconds. Branch levels, and the noise levels of the grid, must be the
            same too.
    """

    trajectories: int | None = None
    reward_scale: float | None = None
    branch_levels: tuple[float, ...] = (0.25, 0.5, 0.75)
    noise_levels: tuple[float, ...] | None = None
    widening: float = 2.0
    widening_power: float = 0.5
    max_children: int | None = None
    backup: Backup = "soft"
    width: int = 4
    save_tree: str | None = None
    load_tree: str | None = None
    eta: float = 1.0

    name: ClassVar[str]
    unguided: ClassVar[str | None] = None
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.name, self.reward_scale)
        if not all(0.0 <= f < 1.0 for f in self.branch_levels):
            raise OptionError(
                f"{self.name}: branch_levels are fractions in [0, 1), got {self.branch_levels}."
            )
        if not all(0.0 <= share <= 1.0 for share in self.noise_levels or ()):
            raise OptionError(
                f"{self.name}: noise_levels are shares in [0, 1], got {self.noise_levels}."
            )
        if not (0.0 < self.widening < math.inf and 0.0 <= self.widening_power <= 1.0):
            raise OptionError(
                f"{self.name}: widening must be positive and widening_power lie in [0, 1], got "
                f"{self.widening} and {self.widening_power}."
            )
        for option in ("trajectories", "max_children", "width"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{self.name}: {option} must be at least 1, got {value}.")
        if self.noise_levels is not None:
            refuse_idle(self, "noise_levels", "branch_levels")
        levels = self.branch_levels if self.noise_levels is None else self.noise_levels
        if levels and self._most > 1 and not self.kernel().stochastic:
            raise OptionError(
                f"{self.name} branches, but eta=0 makes the sampler deterministic: all children "
                "of a state would be equal. Set eta > 0 (for flow models too: the eta-kernel "
                "keeps their marginals), or branch_levels=()."
            )

    # --- what it costs ---

    @property
    def _most(self) -> float:
        """The most children any node can have."""
        limit = math.inf if self.widening_power else math.ceil(self.widening)
        return min(limit, self.max_children or math.inf)

    def _quota(self, visits: int) -> float:
        return min(self._most, math.ceil(self.widening * visits**self.widening_power))

    def tree_levels(self, grid: Grid) -> list[int]:
        """Grid nodes at which states are kept: the branch levels, then the end."""
        return [*checkpoint_steps(grid, self.branch_levels, self.noise_levels), len(grid)]

    def prices(self, plan: Plan) -> list[Price]:
        """Of a rollout from depth 0 (fresh noise), 1, 2, ..."""
        rows, calls = self.per_step(plan)
        starts = [0, *self.tree_levels(plan.grid)[:-1]]
        return [Price(sum(rows[start:]), 1 + sum(calls[start:])) for start in starts]

    def _everything(self, prices: list[Price]) -> Price:
        """A full tree: most^d nodes at depth d, each walked to once."""
        edges = [a.minus(b) for a, b in pairwise([*prices, Price(0, 0)])]
        nodes = [int(self._most) ** (d + 1) for d in range(len(edges))]
        rows, calls = (sum(n * e[k] for n, e in zip(nodes, edges, strict=True)) for k in (0, 1))
        return Price(int(rows), calls)

    def cap(self, plan: Plan) -> int:
        """Network rows that the rollouts may spend together."""
        prices, caps = self.prices(plan), []
        if self.trajectories:
            caps.append(self.trajectories * prices[0].rows)
        if plan.budget.nfe:
            caps.append(plan.budget.nfe)
        if plan.budget.reward_calls:
            caps.append(int(plan.budget.reward_calls // prices[-1].calls) * prices[0].rows)
        if self._most < math.inf:
            caps.append(self._everything(prices).rows)
        return min(caps) if caps else _DEFAULT * prices[0].rows

    def cost(self, plan: Plan) -> Cost:
        """At most what a run spends: where rollouts start depends on the rewards.

        Of rollouts all but the first may start at the deepest level. Samples of a loaded tree
        that are decoded again are not counted.
        """
        nfe, prices = self.cap(plan), self.prices(plan)
        first = Price(0, 0) if self.load_tree else prices[0]
        left = max(0, nfe - first.rows)
        judged = first.calls + max(left * price.calls // price.rows for price in prices)
        if self._most < math.inf:
            judged = min(judged, self._everything(prices).calls)
        if plan.budget.reward_calls is not None:
            judged = min(judged, plan.budget.reward_calls)
        return Cost(nfe=nfe, decodes=int(judged), reward_calls=int(judged))

    def fit(self, plan: Plan) -> TreeSearch:
        levels = self.tree_levels(plan.grid)[:-1]
        check_levels(self, "branch_levels", plan.grid, levels)
        fitted = replace(self, reward_scale=plan.scale(self.reward_scale))
        one, caps = self.prices(plan)[0], (plan.budget.nfe, plan.budget.reward_calls)
        if self.trajectories is not None:
            need = Cost(nfe=self.trajectories * one.rows, decodes=0, reward_calls=0)
            within_budget(plan, need, f"{self.name} with {self.trajectories} trajectories", self)
        for name, cap, need in zip(("nfe", "reward_calls"), caps, one, strict=True):
            if cap is not None and cap < need:
                raise BudgetError(
                    f"{name}={cap} is too small: one rollout needs {need} here "
                    f"({len(plan.grid)} steps at {max(plan.costs)} network rows a step). Raise it "
                    "to that, or lower the number of steps."
                )
        for path in (self.save_tree, self.load_tree):
            if path is not None and not Path(path).parent.is_dir():
                raise OptionError(f"{self.name}: {path!r} is in no folder that exists.")
        if self.save_tree is not None and not writable(Path(self.save_tree)):
            raise OptionError(
                f"{self.name}: save_tree={self.save_tree!r} is a folder, or its folder takes no "
                "files. Name a file in a folder that can be written."
            )
        if self.trajectories is None and plan.budget.nfe is None:
            return replace(fitted, trajectories=plan.budget.reward_calls or _DEFAULT)
        return fitted

    # --- the algorithm ---

    def run(self, ctx: Context) -> Run:
        tree = self._start(ctx)
        pictures: dict[int, Tensor] = {}
        try:
            yield from self._search(ctx, tree, pictures)
        except TimeUp:
            if not tree.leaves:
                raise
        finally:
            if self.save_tree is not None and tree.leaves:
                tree.save(tree_file(self.save_tree, ctx))
        return (yield from self._deliver(ctx, tree, pictures))

    def _search(self, ctx: Context, tree: Tree, pictures: dict[int, Tensor]) -> Run:
        """Rounds of rollouts until the budget is spent or the tree is full."""
        assert self.reward_scale is not None
        plan, of, prices = ctx.plan, self.cap(ctx.plan), self.prices(ctx.plan)
        left = Price(of, plan.budget.reward_calls or math.inf)
        uniforms = stream(ctx.key(f"descend/{len(tree.leaves)}"))
        while parents := self._round(tree, prices, left, uniforms):
            for parent in parents:
                left = left.minus(prices[tree.depth[parent]])
            leaves = yield from self._roll_out(ctx, tree, parents, pictures)
            tree.back_up(leaves)
            self._forget(tree, pictures)
            info = {
                "parents": [tree.place(p) for p in parents],
                "rewards": [tree.reward[leaf] for leaf in leaves],
                "leaves": len(tree.leaves),
                "root_value": tree.value[ROOT],
            }
            yield Progress(step=of - left.rows, of=of, info=info)
        return None  # type: ignore[return-value]

    def _round(
        self, tree: Tree, prices: list[Price], left: Price, uniforms: Iterator[float]
    ) -> list[int]:
        """The nodes from which the next rollouts start, as many as width and budget allow."""
        parents: list[int] = []
        pending: Counter[int] = Counter()
        while len(parents) < self.width and left.covers(prices[-1]):
            node = self._open(tree, prices, left, pending, uniforms)
            if node is None:
                break
            parents.append(node)
            pending[node] += 1
            left = left.minus(prices[tree.depth[node]])
        return parents

    def _open(
        self,
        tree: Tree,
        prices: list[Price],
        left: Price,
        pending: Counter[int],
        uniforms: Iterator[float],
    ) -> int | None:
        """Descends until it meets a node that gets a child; None where there is none.

        A descent that ends at a finished sample costs nothing. Its visits widen the nodes above.
        """

        def has_room(node: int, quota: float) -> bool:
            children = len(tree.children[node]) + pending[node]
            payable = not tree.is_leaf(node) and left.covers(prices[tree.depth[node]])
            return payable and children < quota

        path: list[int] = []
        for _ in range(_FREE):
            path = self._descent(tree, has_room, uniforms)
            node = path[-1]
            if not (tree.is_leaf(node) or has_room(node, self._most)):
                return None  # all that may still grow is waiting for its first child
            tree.visit(path)
            if not tree.is_leaf(node):
                return node
        # Widening is slower than the descents: branch above the last sample, else anywhere.
        near = [n for n in reversed(path[:-1]) if has_room(n, self._most)]
        rest = near or [n for n in range(len(tree)) if has_room(n, self._most)]
        if not rest:
            return None
        node = near[0] if near else max(rest, key=lambda n: tree.value[n])
        tree.visit(tree.path(node))
        return node

    def _descent(
        self, tree: Tree, has_room: Callable[[int, float], bool], uniforms: Iterator[float]
    ) -> list[int]:
        """From the root to a node that wants a child, or to a leaf."""
        node, path = ROOT, [ROOT]
        while not (tree.is_leaf(node) or has_room(node, self._quota(tree.visits[node] + 1))):
            if not tree.children[node]:
                break
            node = self._descend(tree, node, uniforms)
            path.append(node)
        return path

    def _roll_out(
        self, ctx: Context, tree: Tree, parents: list[int], pictures: dict[int, Tensor]
    ) -> Generator[Request, Any, list[int]]:
        """A leaf for each parent."""
        found = yield from roll_out(
            ctx, tree, parents, self.kernel(), self.lead(ctx), self.weighed
        )
        x = torch.stack([rollout.states[-1] for rollout in found])
        images = yield Decode(x)
        scores = yield Score(images, x, final=True)
        leaves = []
        for r, image, reward in zip(found, images, as_float64(scores.value).tolist(), strict=True):
            leaves.append(tree.grow(r.parent, r.states, reward, r.ratios))
            pictures[leaves[-1]] = image.detach().to("cpu", copy=True)
        return leaves

    def _start(self, ctx: Context) -> Tree:
        """An empty tree, or the one to go on with.

        Raises:
            OptionError: a tree that does not fit, or whose weights are not known.
        """
        assert self.reward_scale is not None
        levels = self.tree_levels(ctx.grid)
        options: Any = {"reward_scale": self.reward_scale, "backup": self.backup}
        options["weighed"] = self.weighed
        if self.load_tree is None:
            return Tree(levels, prompt=ctx.prompt, nodes=noise_of(ctx.grid), **options)
        path = tree_file(self.load_tree, ctx)
        tree = load_for(ctx, path, levels)
        if self.weighed and any(map(math.isnan, tree.ratio)):
            raise OptionError(
                f"{path}: rollouts of this tree were guided and their densities not kept, so its "
                f"weights are unknown to {self.name}. Go on with dts_star, or start a new tree."
            )
        tree.revalue(**options)
        return tree

    def _descend(self, tree: Tree, node: int, uniforms: Iterator[float]) -> int:
        """The child to go on to."""
        raise NotImplementedError

    def _forget(self, tree: Tree, pictures: dict[int, Tensor]) -> None:
        """Drops pictures that cannot be delivered any more."""

    def _chosen(self, ctx: Context, tree: Tree) -> tuple[list[int], Tensor, float | None]:
        """(leaves to deliver, their log weights, ln Z)."""
        raise NotImplementedError

    def _deliver(self, ctx: Context, tree: Tree, pictures: dict[int, Tensor]) -> Run:
        leaves, log_w, log_z = self._chosen(ctx, tree)
        lost = [leaf for leaf in dict.fromkeys(leaves) if leaf not in pictures]
        pictures |= yield from decode_again(ctx, tree, lost)
        number = {leaf: k for k, leaf in enumerate(tree.leaves)}
        return Outcome(
            x0=tree.stack(leaves).to(ctx.model.device),
            images=torch.stack([pictures[leaf] for leaf in leaves]).to(ctx.model.device),
            reward=torch.tensor([tree.reward[leaf] for leaf in leaves], dtype=torch.float64),
            log_w=log_w,
            log_z=log_z,
            slots=torch.tensor([number[leaf] for leaf in leaves]),
        )


def stream(key: NoiseKey) -> Iterator[float]:
    """Uniform numbers without end."""
    for block in count():
        yield from key.at(step=block).uniform(256).tolist()

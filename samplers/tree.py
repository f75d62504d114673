"""A search tree: states at branch levels, their soft values, and a file to keep it in.

Node 0 stands before the noise: its children are fresh noises, walked to the first branch level.
A node at depth d >= 1 is a state at grid node ``levels[d - 1]``; the deepest are finished samples,
the leaves. Leaves carry rewards, all other values come from them (Jain et al. 2025, arXiv
2506.20701; soft Bellman equation). In log units, with children drawn from the model itself,

    V(leaf) = reward_scale * r,     V(node) = log mean_c exp V(c)        (backup "soft")

so V(node) estimates log E[exp(reward_scale r(x0)) | node]. Descending with probability
softmax_c V(c) reaches a leaf with probability exp(V(leaf) - V(root)) / prod of the numbers of
children on its way, which is its importance weight.

Children drawn from another law q count p / q times: with rho(c) = log p - log q of the steps from
the node to c, V(c) + rho(c) takes the place of V(c) wherever children are averaged or chosen.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering.errors import OptionError
from steering.noise import NoiseKey
from steering.particles import normalise
from steering.recipe import atomic
from steering.resampling import multinomial

ROOT = 0
FORMAT, VERSION = "steering-tree", 1
Backup = Literal["soft", "mean", "max"]
Node = tuple[float, float]
"""(alpha, sigma) of a grid node."""


class Tree:
    """Everything a tree search has found.

    Args:
        levels: grid nodes of the branch levels, rising; the last is the end of the grid.
        reward_scale: lambda of the values.
        backup: how a node's value follows from its children's: "soft" (log mean exp), "mean" or
            "max".
        prompt: whose tree it is.
        weighed: whether ratios count; a search for the maximum takes children as drawn from the
            model, however they were found.
        nodes: (alpha, sigma) of every grid node; () where nobody knows them.

    Attributes:
        parent, visits, reward, value: lists over nodes; rewards are NaN but for leaves, values
            are in log units (reward_scale times reward).
        ratio: log p - log q of the steps that lead to each node; NaN where nobody knows it.
        children: lists of nodes.
        states: [*event] on the CPU; None for the root.
        leaves: the finished samples in the order in which they were found.
        low, high: the range of their finite values.
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        reward_scale: float,
        backup: Backup = "soft",
        prompt: str | None = None,
        weighed: bool = True,
        nodes: Sequence[Node] = (),
    ) -> None:
        self.levels, self.reward_scale = tuple(levels), reward_scale
        self.nodes = tuple(nodes)
        self.backup: Backup = backup
        self.prompt, self.weighed = prompt, weighed
        self.parent, self.depth, self.visits = [-1], [0], [0]
        self.reward, self.value, self.ratio = [math.nan], [math.nan], [0.0]
        self.children: list[list[int]] = [[]]
        self.states: list[Tensor | None] = [None]
        self.leaves: list[int] = []
        self.low, self.high = math.inf, -math.inf
        self._odds: dict[int, list[float]] = {}

    def __len__(self) -> int:
        """The number of nodes, the root included."""
        return len(self.parent)

    def __repr__(self) -> str:
        return f"Tree({self.prompt!r}, {len(self)} nodes, {len(self.leaves)} leaves)"

    def is_leaf(self, node: int) -> bool:
        return self.depth[node] == len(self.levels)

    def place(self, node: int) -> int:
        """The grid node of a tree node; -1 for the root, which stands before the noise."""
        return self.levels[self.depth[node] - 1] if node != ROOT else -1

    def path(self, node: int) -> list[int]:
        """From the root to a node."""
        found = [node]
        while found[-1] != ROOT:
            found.append(self.parent[found[-1]])
        return found[::-1]

    # --- growing ---

    def visit(self, path: Iterable[int]) -> None:
        """Counts one more descent along a path."""
        for node in path:
            self.visits[node] += 1

    def grow(
        self,
        parent: int,
        states: Sequence[Tensor],
        reward: float,
        ratios: Sequence[float] | None = None,
    ) -> int:
        """Adds a chain of states below a node, one for each deeper level; returns its leaf.

        Values above are not touched until :meth:`back_up`.

        Args:
            ratios: one for each state; 0 by default, as of draws from the model.
        """
        if len(states) != len(self.levels) - self.depth[parent]:
            raise OptionError("A chain of a tree needs one state for each level below its parent.")
        for state, ratio in zip(states, ratios or [0.0] * len(states), strict=True):
            parent = self._add(parent, state, 1, ratio)
        self.reward[parent] = reward
        self.leaves.append(parent)
        return parent

    def _add(self, parent: int, state: Tensor, visits: int, ratio: float) -> int:
        node = len(self)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.visits.append(visits)
        self.reward.append(math.nan)
        self.value.append(math.nan)
        self.ratio.append(ratio)
        self.children.append([])
        # A copy: a view would keep the whole batch it was cut from.
        self.states.append(state.detach().to("cpu", copy=True))
        self.children[parent].append(node)
        return node

    def back_up(self, leaves: Iterable[int]) -> None:
        """Values of these leaves and of everything above them, each node once."""
        changed: set[int] = set()
        for leaf in leaves:
            # At scale 0 a reward of -inf must not become 0 * inf.
            self.value[leaf] = self.reward_scale * self.reward[leaf] if self.reward_scale else 0.0
            if math.isfinite(self.value[leaf]):
                self.low = min(self.low, self.value[leaf])
                self.high = max(self.high, self.value[leaf])
            changed.update(self.path(leaf)[:-1])
        for node in sorted(changed, reverse=True):  # children always come after their parents
            below = self.children[node]
            values, ratios = [self.value[c] for c in below], [self._counts(c) for c in below]
            self.value[node] = combine(values, self.backup, ratios)
            self._odds.pop(node, None)

    def _counts(self, node: int) -> float:
        """The log of how often a node counts beside its siblings."""
        return self.ratio[node] if self.weighed else 0.0

    def _worth(self, node: int) -> list[float]:
        """What the children of a node are chosen by."""
        return [self.value[c] + self._counts(c) for c in self.children[node]]

    def revalue(self, *, reward_scale: float, backup: Backup, weighed: bool = True) -> None:
        """All values again, at another scale, with another backup or other use of ratios."""
        self.reward_scale, self.backup, self.weighed = reward_scale, backup, weighed
        self.low, self.high = math.inf, -math.inf
        self.back_up(self.leaves)

    def move_to(self, nodes: Sequence[Node]) -> None:
        """Takes all states to other coordinates of the same noise levels (steering.paths).

        Args:
            nodes: (alpha, sigma) of every grid node there.
        """
        pairs = zip(self.nodes, nodes, strict=True)
        scale = [(a + b) / (alpha + sigma) for (alpha, sigma), (a, b) in pairs]
        for node in range(1, len(self)):
            c, state = scale[self.place(node)], self.states[node]
            # Equal up to rounding, or integers: the bits stay.
            if state is not None and not math.isclose(c, 1.0, rel_tol=1e-4):
                self.states[node] = c * state
        self.nodes = tuple(nodes)

    # --- descending ---

    def choose(self, node: int, uniform: float) -> int:
        """A child drawn with probability softmax of the children's values and ratios."""
        if node not in self._odds:
            self._odds[node] = list(accumulate(softmax(self._worth(node))))
        odds = self._odds[node]
        return self.children[node][min(bisect_left(odds, uniform * odds[-1]), len(odds) - 1)]

    def log_weights(self) -> Tensor:
        """Log importance weights of the leaves, [n] float64, in the order of ``leaves``.

        Proportional to the law of a descent; their mean exp is exp(value of the root).
        """
        reach = [0.0] * len(self)
        for node in range(len(self)):
            worth = self._worth(node)
            total = logsumexp(worth)
            for c, own in zip(self.children[node], worth, strict=True):
                gone = math.isinf(total) or math.isinf(own)
                reach[c] = -math.inf if gone else reach[node] + own - total
        logs = torch.tensor([reach[leaf] for leaf in self.leaves], dtype=torch.float64)
        return logs + math.log(max(1, len(self.leaves))) + self.value[ROOT]

    def draw(self, n: int, key: NoiseKey) -> list[int]:
        """n leaves as n descents by soft values reach them; a leaf may come more than once.

        Raises:
            OptionError: the tree has no leaves yet.
            SteeringError: all of them have reward -inf.
        """
        if not self.leaves or n < 1:
            raise OptionError(f"Cannot draw {n} of {len(self.leaves)} leaves of a tree.")
        picks = multinomial(normalise(self.log_weights()), n, key)
        return [self.leaves[int(k)] for k in picks]

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """n finished samples drawn by soft values, [n, *event], on the CPU; see :meth:`draw`."""
        return self.stack(self.draw(n, NoiseKey(seed, "tree-sample")))

    def best(self, k: int = 1) -> list[int]:
        """The k leaves of the highest reward; ties go to the first found."""
        return sorted(self.leaves, key=lambda leaf: -self.reward[leaf])[:k]

    def stack(self, nodes: Sequence[int]) -> Tensor:
        """The states of some nodes, [n, *event]."""
        return torch.stack([state for n in nodes if (state := self.states[n]) is not None])

    # --- keeping ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file with a JSON header, whole or not at all."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "levels": self.levels,
            "reward_scale": self.reward_scale,
            "backup": self.backup,
            "prompt": self.prompt,
            "weighed": self.weighed,
        }
        tensors = {
            "parent": torch.tensor(self.parent),
            "visits": torch.tensor(self.visits),
            "reward": torch.tensor(self.reward, dtype=torch.float64),
        }
        if self.nodes:
            tensors["nodes"] = torch.tensor(self.nodes, dtype=torch.float64)
        if any(self.ratio):
            tensors["ratio"] = torch.tensor(self.ratio, dtype=torch.float64)
        if len(self) > 1:
            tensors["x"] = self.stack(range(1, len(self)))
        with atomic(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"tree": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tree:
        """Reads a tree back; values are made again from the rewards.

        Raises:
            OptionError: no such file, not a tree, a damaged one or one of another version.
        """
        about, tensors = _read(Path(path))
        try:
            tree = cls(
                [int(k) for k in about["levels"]],
                reward_scale=float(about["reward_scale"]),
                backup=about["backup"],
                prompt=about["prompt"],
                weighed=bool(about.get("weighed", True)),
            )
            tree._fill(tensors)
        except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise OptionError(f"{path}: the tree is damaged ({error!r}).") from error
        return tree

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        parents, visits = tensors["parent"].tolist(), tensors["visits"].tolist()
        rewards, x = tensors["reward"].tolist(), iter(tensors.get("x", torch.zeros(0)))
        ratios = tensors["ratio"].tolist() if "ratio" in tensors else [0.0] * len(parents)
        if not len(parents) == len(visits) == len(rewards) == len(ratios):
            raise ValueError("lists of different lengths")
        if self.backup not in ("soft", "mean", "max"):
            raise ValueError(f"backup {self.backup!r}")
        if "nodes" in tensors:
            self.nodes = tuple((alpha, sigma) for alpha, sigma in tensors["nodes"].tolist())
            if len(self.nodes) != self.levels[-1] + 1:
                raise ValueError(f"{len(self.nodes)} grid nodes for levels {self.levels}")
        self.visits[ROOT] = visits[0]
        for node, parent in enumerate(parents[1:], 1):
            if not 0 <= parent < node or self.is_leaf(parent):
                raise ValueError(f"node {node} hangs on {parent}")
            self._add(parent, next(x).clone(), visits[node], ratios[node])
            if self.is_leaf(node):
                if math.isnan(rewards[node]):
                    raise ValueError(f"leaf {node} has no reward")
                self.reward[node] = rewards[node]
                self.leaves.append(node)
        if any(not self.children[n] and not self.is_leaf(n) for n in range(1, len(self))):
            raise ValueError("a node has neither children nor a reward")
        self.back_up(self.leaves)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("tree", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise OptionError(f"{path}: no such file, so there is no tree to go on with.") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise OptionError(f"{path}: cannot be read as a tree ({error}).") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise OptionError(f"{path}: not a tree written by this library.")
    if about.get("version") != VERSION:
        raise OptionError(
            f"{path}: tree version {about.get('version')!r}, this release reads {VERSION}."
        )
    return about, tensors


def combine(
    values: Sequence[float], backup: Backup, ratios: Sequence[float] | None = None
) -> float:
    """The value of a node from its children's.

    Args:
        ratios: logs of how often each child counts; 0 by default. A maximum counts nothing.
    """
    ratios = ratios or [0.0] * len(values)
    if backup == "max":
        return max(values)
    if backup == "mean":
        counts = [math.exp(r - max(ratios)) for r in ratios]
        return sum(n * v for n, v in zip(counts, values, strict=True) if n) / sum(counts)
    worth = [v + r for v, r in zip(values, ratios, strict=True)]
    return logsumexp(worth) - math.log(len(values))


def logsumexp(values: Sequence[float]) -> float:
    """log sum exp; -inf of nothing."""
    top = max(values, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(sum(math.exp(v - top) for v in values))


def softmax(values: Sequence[float]) -> list[float]:
    """exp(values) scaled to sum to 1; equal shares where all are -inf."""
    total = logsumexp(values)
    if math.isinf(total):
        return [1.0 / len(values)] * len(values)
    return [math.exp(v - total) for v in values]


def writable(path: Path) -> bool:
    """Whether a file of this name, or one beside it, can be made."""
    return not path.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)

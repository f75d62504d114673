"""Rollouts of a tree search: walks from nodes of a tree to the end of the grid, in step."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.method import Context
from steering.requests import Request
from steering.samplers.guided import Lead, led
from steering.samplers.guides import Rows
from steering.samplers.tree import ROOT, Tree
from steering.transitions import Transition


@dataclass(eq=False)
class Rollout:
    """A way from a node to a finished sample.

    Attributes:
        parent, place: the tree node it starts from and the grid node of that, -1 before the noise.
        slot: names its noise.
        states: at the branch levels below the parent, then the sample, [*event] each.
        ratios: log p - log q of the steps that lead to each of these; NaN where it is not known.
    """

    parent: int
    place: int
    slot: int
    states: list[Tensor] = field(default_factory=list)
    ratios: list[float] = field(default_factory=lambda: [0.0])

    @property
    def start(self) -> int:
        """The first step it makes."""
        return max(0, self.place)


def roll_out(
    ctx: Context,
    tree: Tree,
    parents: Sequence[int],
    kernel: Transition,
    lead: Lead | None,
    weighed: bool,
) -> Generator[Request, Any, list[Rollout]]:
    """One rollout from each parent, all in one batch: each joins where its parent stands.

    Args:
        lead: guides the steps.
        weighed: ratios are needed, so the last step is not guided.
    """
    rollouts = [Rollout(p, tree.place(p), len(tree.leaves) + j) for j, p in enumerate(parents)]
    ordered, levels = sorted(rollouts, key=lambda r: r.start), set(tree.levels)
    if kernel.stochastic and lead is None:  # the last step adds no noise
        steps = range(len(ctx.grid) - 1)
        ctx.foresee(("proposal", i, r.slot) for i in steps for r in ordered if r.start <= i)
    walking: list[Rollout] = []
    x = torch.empty(0)
    for i, (t, u) in enumerate(ctx.grid.steps()):
        if joining := [r for r in ordered if r.start == i]:
            x = torch.cat([*([x] if walking else []), *[_first(ctx, tree, r) for r in joining]])
        walking += joining
        if not walking:
            continue
        for r, row in zip(walking, x, strict=True):
            if i in levels and i > r.place:
                r.states.append(row)
                r.ratios.append(0.0)
        rows = Rows([r.slot for r in walking])
        x, ratio = yield from led(ctx, x, t, u, i, kernel, lead, weighed=weighed, rows=rows)
        known = lead is None or weighed
        for r, more in zip(walking, ratio.tolist(), strict=True):
            r.ratios[-1] += more if known else math.nan
    for r, row in zip(walking, x, strict=True):
        r.states.append(row)
    return rollouts


def _first(ctx: Context, tree: Tree, rollout: Rollout) -> Tensor:
    """The state a rollout starts from, [1, *event]."""
    if rollout.parent == ROOT:
        return ctx.model.noise(1, ctx.key("init").at(slot=rollout.slot), cond=ctx.cond)
    return tree.stack([rollout.parent]).to(ctx.model.device)

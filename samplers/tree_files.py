"""Files of tree searches: which is a prompt's, whether its tree fits, the pictures it lacks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context
from steering.requests import Decode, Request
from steering.samplers.tree import Node, Tree

_SAME = 1e-4
"""Noise shares this near are one level: schedulers round in float32, other schedules lie further
apart."""

_NAMED = 3
"""Levels that an error names."""

_CHUNK = 16
"""Samples decoded together where their pictures are needed again."""


def tree_file(path: str, ctx: Context) -> Path:
    """The file of this prompt's tree."""
    file = Path(path)
    if len(ctx.model.prompts) == 1:
        return file
    return file.with_name(f"{file.stem}-{ctx.cond:04d}{file.suffix}")


def noise_of(grid: Grid) -> tuple[Node, ...]:
    """(alpha, sigma) of every node."""
    return tuple((time.alpha, time.sigma) for time in grid.times)


def load_for(ctx: Context, path: Path, levels: Sequence[int]) -> Tree:
    """The tree of a file, in this run's coordinates.

    Args:
        levels: grid nodes of this run's branch levels, then the end.

    Raises:
        OptionError: a tree of another prompt, another kind of state or other noise levels.
    """
    tree = Tree.load(path)
    shape = tuple(tree.stack([1]).shape[1:]) if len(tree) > 1 else ctx.model.event_shape
    for what, here, there in (
        ("prompt", ctx.prompt, tree.prompt),
        ("branch levels", tuple(levels), tree.levels),
        ("shape of a state", tuple(ctx.model.event_shape), shape),
    ):
        if here != there:
            raise OptionError(
                f"{path}: the tree's {what} is {there!r}, not {here!r}. Go on as it was grown, or "
                "start a new tree."
            )
    nodes = noise_of(ctx.grid)
    _check_noise(path, tree, nodes)
    tree.move_to(nodes)
    return tree


def _check_noise(path: Path, tree: Tree, nodes: Sequence[Node]) -> None:
    """Raises unless the tree was grown on these nodes, in whatever coordinates.

    All of them count, not the branch levels alone: children are draws of the steps between.
    """
    if not tree.nodes:
        # Values from other levels would be wrong without a sign of it, and indices of grid nodes
        # agree for any schedule of as many steps. What was found can still be read.
        raise OptionError(
            f"{path}: an older release wrote this tree and did not keep its noise levels, so "
            "whether they are this run's cannot be told. Read its samples with Tree.load(...), "
            "and start a new tree to search on."
        )
    pairs = [(_share(a), _share(b)) for a, b in zip(tree.nodes, nodes, strict=True)]
    off = [
        f"node {i} ({a:.4g}, here {b:.4g})"
        for i, (a, b) in enumerate(pairs)
        if not abs(a - b) <= _SAME
    ]
    if off:
        more = f" and {len(off) - _NAMED} more" if len(off) > _NAMED else ""
        raise OptionError(
            f"{path}: the tree was grown at other noise shares sigma / (alpha + sigma): "
            f"{', '.join(off[:_NAMED])}{more}. Its values hold at its own levels only. Run with "
            "the scheduler, shift, strength, grid and steps it was grown with, or start a new "
            "tree."
        )


def _share(node: Node) -> float:
    alpha, sigma = node
    return sigma / (alpha + sigma)


def decode_again(
    ctx: Context, tree: Tree, leaves: Sequence[int]
) -> Generator[Request, Any, dict[int, Tensor]]:
    """The pictures of leaves, on the CPU; past a cap on seconds, for want of one is no leaf
    delivered."""
    pictures: dict[int, Tensor] = {}
    for k in range(0, len(leaves), _CHUNK):
        part = leaves[k : k + _CHUNK]
        images = yield Decode(tree.stack(part).to(ctx.model.device), overtime=True)
        pictures |= dict(zip(part, images.detach().cpu(), strict=True))
    return pictures

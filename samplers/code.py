"""CoDe: blockwise control. Every B steps, of N candidate continuations the best goes on.

Singh et al. (2025), "CoDe: blockwise control for denoising diffusion models", arXiv 2502.00968.
A block as long as the whole walk is best-of-N, blocks of one step are SVDD. With a reference the
walk starts from it, noised to a part of the way (the paper's CoDe(eta); Meng et al. 2021, SDEdit).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.grids import Grid
from steering.method import Context
from steering.model import Model
from steering.registry import METHODS
from steering.samplers.branches import Branches, Segment
from steering.samplers.svdd import single_steps


@METHODS.register("code")
@dataclass(frozen=True, kw_only=True)
class CoDe(Branches):
    """Blockwise best-of-N; the options of :class:`Branches`, and

    Attributes:
        block: B, steps from one choice to the next.
        block_mode: "full" walks every candidate through the whole block, the first one from
            noise of its own; "single" branches the first step of a block only, as the published
            code does, which costs N + B - 1 rows a block instead of N B.
        reference: a clean state x0 [*event] to start from, in the model's own coordinates (a
            latent, encoded by the caller: a model can decode, not encode). Recipes do not store
            it.
        strength: share of the steps that are walked from the noised reference; 1 walks all.
    """

    select: Literal["softmax", "argmax"] = "argmax"
    block: int = 5
    block_mode: Literal["full", "single"] = "full"
    reference: Tensor | None = field(default=None, compare=False)
    strength: float = 1.0

    name: ClassVar[str] = "code"
    summary: ClassVar[str] = "blocks of steps: of several candidate continuations the best goes on"
    paper: ClassVar[str] = "Singh et al. 2025, arXiv 2502.00968"
    target: ClassVar[str] = "heuristic"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # 40 candidates, a choice every 5 of 500 DDIM steps (the published template has 10).
        "sd15": {"n_branches": 40, "block": 5, "start": 0.0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise OptionError(f"code: block must be at least 1 step, got {self.block}.")
        if not 0.0 < self.strength <= 1.0:
            raise OptionError(f"code: strength is a share in (0, 1], got {self.strength}.")
        if self.reference is None and self.strength != 1.0:
            raise OptionError("code: strength belongs to a reference; pass reference=x0.")

    def levels(self, model: Model) -> Grid:
        """The noise levels to visit.

        Raises:
            OptionError: the reference is no state of this model, or nothing of it is left where
                the walk starts.
        """
        if self.reference is not None:
            if tuple(self.reference.shape) != tuple(model.event_shape):
                raise OptionError(
                    f"code: the reference must be one clean state of shape "
                    f"{tuple(model.event_shape)}, got {tuple(self.reference.shape)}. Encode "
                    "pictures first: a model decodes, but does not encode."
                )
            if not model.dtype.is_floating_point:
                raise OptionError("code: states of this model are integers, which take no noise.")
        grid = super().levels(model)
        if self.reference is not None and grid.times[self.begin(grid)].alpha == 0.0:
            raise OptionError(
                f"code: with strength={self.strength:g} a walk of {len(grid)} steps starts from "
                "pure noise, with nothing of the reference in it. Lower strength, say to 0.6."
            )
        return grid

    def begin(self, grid: Grid) -> int:
        """The node at which the walk starts."""
        if self.reference is None:
            return 0
        return min(len(grid) - 1, len(grid) - grid.nearest(self.strength))

    def cut(self, grid: Grid) -> list[Segment]:
        begin, end, start = self.begin(grid), len(grid), grid.nearest(self.start)
        if self.block_mode == "single":
            return single_steps(grid, max(begin, start - 1), self.block, begin)
        stops = range(begin + self.block, grid.quiet, self.block)
        nodes = [begin, *[i for i in stops if i >= start], end]
        return [Segment(a, b, branched=True) for a, b in pairwise(nodes)]

    def fan(self) -> int:
        return self.n_branches if self.block_mode == "full" else 1

    def first(self, ctx: Context, n: int) -> Tensor:
        if self.reference is None:
            return ctx.noise(n)
        t, model = ctx.grid.times[self.begin(ctx.grid)], ctx.model
        like = {"device": model.device, "dtype": torch.promote_types(model.dtype, torch.float32)}
        z = ctx.key("init").normal(n, model.event_shape)
        return t.alpha * self.reference.to(**like) + t.sigma * z.to(**like)

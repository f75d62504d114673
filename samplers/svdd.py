"""SVDD: at every step a particle draws M children, and the most promising one goes on.

Li et al. (2024), "Derivative-free guidance in continuous and discrete diffusion models with soft
value-based decoding", arXiv 2408.08252. The value of a child is reward_scale * r of its one-step
estimate of x0 (the paper's posterior-mean variant). The paper draws the child from the softmax of
the values, its published code takes the argmax. Without weights the softmax rule tilts too little
at any finite M; with the weights of :mod:`steering.samplers.branches` it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steering.errors import OptionError
from steering.grids import Grid
from steering.registry import METHODS
from steering.samplers.base import refuse_idle
from steering.samplers.branches import Branches, Segment


@METHODS.register("svdd")
@dataclass(frozen=True, kw_only=True)
class SVDD(Branches):
    """Soft value-based decoding; the options of :class:`Branches`, and

    Attributes:
        every: branch at every so many steps; single steps in between.
    """

    every: int = 1

    name: ClassVar[str] = "svdd"
    summary: ClassVar[str] = "each step draws candidates and keeps one by its predicted reward"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2408.08252"
    target: ClassVar[str] = "tilted"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        # Published code for SD1.5: 20 candidates at each of 50 steps, the best is kept.
        "sd15": {"n_branches": 20, "select": "argmax", "start": 0.0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise OptionError(f"svdd: every must be at least 1, got {self.every}.")
        if self.n_branches == 1 and self.resample == "never":
            refuse_idle(self, "n_branches=1 and resample='never'", "every")

    def cut(self, grid: Grid) -> list[Segment]:
        return single_steps(grid, max(0, grid.nearest(self.start) - 1), self.every)


def single_steps(grid: Grid, begin: int, every: int, first: int = 0) -> list[Segment]:
    """Branched single steps begin, begin + every, ..., plain steps between them.

    The candidates of the last branched step before the end walk the quiet steps there, too:
    it makes their estimate the sample, which is then judged once instead of twice.
    """
    end, quiet = len(grid), grid.quiet
    segments, done = [], first
    for i in range(begin, quiet, every):
        if i > done:
            segments.append(Segment(done, i, branched=False))
        done = i + 1 if i + 1 < quiet else end
        segments.append(Segment(i, done, branched=True))
    if done < end:
        segments.append(Segment(done, end, branched=False))
    return segments

"""The book-keeping of rollover budget forcing: where a chain stands and what it may still try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from steering.errors import OptionError
from steering.noise import Name
from steering.paths import Prediction
from steering.samplers.guides import Guided


class Stand(NamedTuple):
    """A state the network has been asked about.

    ``x`` [1, *event] at grid node ``node``; ``reward`` is that of the estimate of x0.
    """

    x: Tensor
    prediction: Prediction
    reward: float
    node: int


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """How many proposals a chain may make.

    Attributes:
        each: at each level.
        total: in all; more than the sum of ``each`` goes to the last level.
        rollover: an early success hands on what it leaves.
        spend_rest: the last level spends all that is left.
    """

    each: tuple[int, ...]
    total: int
    rollover: bool = True
    spend_rest: bool = True

    @property
    def last(self) -> int:
        """The last level."""
        return len(self.each) - 1


def each_level(
    quota: int | tuple[int, ...] | None, levels: int, total: int = 0
) -> tuple[int, ...]:
    """Proposals of each level.

    Args:
        quota: as in `rbf`; None takes equal shares of the total, one each at least.

    Raises:
        OptionError: a list for another number of levels.
    """
    each = quota if isinstance(quota, tuple) else (quota or max(1, total // levels),) * levels
    if len(each) != levels:
        raise OptionError(f"rbf: {levels} levels are searched, quota has {len(each)} entries.")
    return each


@dataclass(eq=False, kw_only=True)
class Chain:
    """One search.

    Attributes:
        index: names its noise.
        stand: where it stands, at node ``level`` of the grid.
        quotas: its allowance.
        bar: the reward to beat.
        quota, used: of the present level.
        spent: proposals so far.
        first, best: of the present level.
        seen: what guidance found where it stands; None where it has not looked.
    """

    index: int
    stand: Stand
    quotas: Quotas
    bar: float = field(init=False)
    level: int = field(init=False)
    quota: int = field(init=False)
    used: int = 0
    spent: int = 0
    first: Stand | None = None
    best: Stand | None = None
    seen: Guided | None = None

    def __post_init__(self) -> None:
        self.bar, self.level = self.stand.reward, self.stand.node
        self.quota = self.quotas.each[self.level]

    def size(self, batch: int) -> int:
        """How many proposals to make now; 0 when the search is over."""
        if self.level == self.quotas.last and self.quotas.spend_rest:
            return min(batch, self.quotas.total - self.spent)
        return min(batch, self.quota - self.used)

    @property
    def stream(self) -> str:
        """The name of its noise."""
        return f"chain/{self.index}"

    def noise(self, ahead: int) -> list[Name]:
        """The rows of noise of its next proposals, should it stay at this level."""
        upto = self.spent + self.size(ahead)
        return [(self.stream, self.level, slot) for slot in range(self.spent, upto)]

    def note(self, stands: Sequence[Stand], best: Stand) -> None:
        """Counts proposals and keeps the first and the best of the level."""
        self.used += len(stands)
        self.spent += len(stands)
        self.first = self.first or stands[0]
        if self.best is None or best.reward > self.best.reward:
            self.best = best

    def advance(self, to: Stand, *, early: bool) -> None:
        """Goes to a proposal of this level. What an early success left of the quota is kept."""
        kept = self.quota - self.used if early and self.quotas.rollover else 0
        self.stand, self.level = to, to.node
        self.quota, self.used = kept + self.quotas.each[self.level], 0
        self.first = self.best = self.seen = None

    @property
    def end(self) -> Stand:
        """What the search has found: the best proposal of the level it ended at."""
        return self.best or self.stand


def best_of(stands: Sequence[Stand]) -> Stand:
    """The highest reward; ties go to the first."""
    return max(stands, key=lambda stand: stand.reward)

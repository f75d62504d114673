"""One budget: every network, decoder and reward call is charged, so equal compute is a fact."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from steering.errors import BudgetError, OptionError, TimeUp


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Caps of one run; None means no cap.

    Attributes:
        nfe: rows through the denoising network; guidance by two rows counts 2.
        reward_calls: images scored by the guiding reward.
        seconds: wall time of this run's own calls.
    """

    nfe: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise OptionError(f"Budget: {name} must be a number, got {value!r}.")
            if not float(value) > 0:
                raise OptionError(f"Budget: {name} must be positive, got {value!r}.")
            if name != "seconds":
                if not float(value).is_integer():
                    raise OptionError(f"Budget: {name} must be a whole number, got {value!r}.")
                object.__setattr__(self, name, int(float(value)))


@dataclass(eq=False)
class Ledger:
    """What one run has spent.

    Attributes:
        nfe: rows asked of the denoising network, counted by a hook on it.
        deduplicated: of these, rows not computed, because another row of the same call asked the
            same; what was computed is ``nfe - deduplicated``. Budgets and forecasts speak of
            ``nfe``, so equal compute does not depend on it.
        nfe_backward: of these, rows asked with a graph, to be differentiated; those of a graph
            that is differentiated more than once count once for each time.
        nfe_recomputed: rows run again to differentiate checkpointed calls; not in ``nfe``.
        decodes: images (or videos) decoded; ``decodes_backward`` of them differentiated.
        reward_calls: images scored by the guiding reward; ``reward_backward`` differentiated.
        heldout_calls: images scored by held-out verifiers, after the search.
        spent: seconds by kind; calls shared with other runs are split by rows.
    """

    nfe: int = 0
    deduplicated: int = 0
    nfe_backward: int = 0
    nfe_recomputed: int = 0
    decodes: int = 0
    decodes_backward: int = 0
    reward_calls: int = 0
    reward_backward: int = 0
    heldout_calls: int = 0
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return sum(self.spent.values())

    def charge(self, counter: str, rows: int, *, backward: bool = False) -> None:
        """Adds rows to a counter, and to its backward twin."""
        setattr(self, counter, getattr(self, counter) + rows)
        if backward:
            twin = {"nfe": "nfe_backward", "decodes": "decodes_backward"}
            name = twin.get(counter, "reward_backward")
            setattr(self, name, getattr(self, name) + rows)

    def charge_seconds(self, kind: str, seconds: float) -> None:
        """Adds time under a kind ("denoise", "decode", "reward", "backward", ...)."""
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    def check(self, budget: Budget, *, nfe: int = 0, reward_calls: int = 0) -> None:
        """Raises before something is run that the budget does not pay for.

        Raises:
            BudgetError: says which cap, what was spent and what the next call needs.
        """
        for name, more in (("nfe", nfe), ("reward_calls", reward_calls)):
            cap, used = getattr(budget, name), getattr(self, name)
            if cap is not None and more and used + more > cap:
                raise BudgetError(
                    f"Budget of {cap} {name} reached: {used} spent, the next call needs {more}."
                )
        if budget.seconds is not None and self.seconds >= budget.seconds:
            raise TimeUp(f"Budget of {budget.seconds:g} s reached after {self.seconds:.1f} s.")

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, seconds rounded to the millisecond."""
        counts = {k: v for k, v in asdict(self).items() if k != "spent"}
        parts = {k: round(v, 3) for k, v in sorted(self.spent.items())}
        return {**counts, "seconds": round(self.seconds, 3), "seconds_by_kind": parts}

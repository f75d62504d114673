"""What happened in a run, step by step, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steering.ledger import Ledger
from steering.requests import Progress
from steering.scoring import Scores


@dataclass(eq=False)
class Trace:
    """One event per Progress of a method: {"step", "of", "nfe", ...info}, and one per call of a
    reward that leaves notes: {"nfe", "final", "notes"}."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, progress: Progress, ledger: Ledger) -> None:
        """Records an event with the spending at that moment."""
        self.events.append(
            {
                "step": progress.step,
                "of": progress.of,
                "nfe": ledger.nfe,
                "reward_calls": ledger.reward_calls,
                **{k: _plain(v) for k, v in progress.info.items()},
            }
        )

    def note(self, scores: Scores, final: bool, ledger: Ledger) -> None:
        """Records what a judge wrote about the pictures of one call, where it wrote anything."""
        if scores.notes:
            spent = {"nfe": ledger.nfe, "reward_calls": ledger.reward_calls}
            self.events.append({**spent, "final": final, "notes": scores.notes})

    def column(self, name: str) -> list[Any]:
        """The values of one entry over the events that have it."""
        return [event[name] for event in self.events if name in event]

    @property
    def ancestors(self) -> list[list[int]]:
        """Ancestors of each resampling, in order."""
        return self.column("ancestors")

    def to_json(self) -> list[dict[str, Any]]:
        return self.events


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value

"""Errors that say what happened, where, what was seen and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class SteeringError(Exception):
    """Base of every error this library raises on purpose.

    ``result`` holds the best so far (a ``steering.Result``) where work had already been done.
    """

    result: Any = None


class OptionError(SteeringError, ValueError):
    """A value the user gave cannot be used."""


class IdleOption(OptionError):
    """Options that another one makes useless.

    Attributes:
        options: their names.
    """

    def __init__(self, message: str, options: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.options = options


class NoWeightError(SteeringError):
    """All particles of a population have weight zero."""


class BudgetError(SteeringError):
    """The budget does not pay for what was asked."""


class TimeUp(BudgetError):
    """The seconds are over. Uncaught by a method, its run ends with its best so far."""


class RewardError(SteeringError):
    """A reward raised, or returned values that cannot steer anything."""


class PipelineError(SteeringError):
    """A diffusers pipeline cannot be driven from outside, or not in the way asked for."""


class DecodeError(SteeringError):
    """A model's decoder failed.

    ``states`` [n, *event] is what it was given: samples, or estimates of them, as they are after
    all network calls made so far. ``model.decode(error.states)`` makes pictures of them.
    """

    states: Tensor | None = None


class RecipeError(SteeringError):
    """A recipe is missing, foreign, damaged or of another version."""


class WeightsError(SteeringError):
    """Model weights are missing or unreadable."""


class TaskErrors(SteeringError):
    """Some prompts of a list failed; the others were finished.

    ``results`` has one entry per prompt (None where it failed); ``errors`` maps index to error.
    """

    def __init__(self, results: list[Any], errors: dict[int, BaseException]) -> None:
        first = min(errors)
        super().__init__(
            f"{len(errors)} of {len(results)} prompts failed; the others are in `.results`. "
            f"First failure, prompt {first}: {errors[first]}"
        )
        self.results = results
        self.errors = errors


def unknown_name(kind: str, name: object, known: Iterable[str]) -> OptionError:
    """An error for a name that is not in a list, naming the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")

"""One registry idiom for methods and rewards: a name leads to a class or function.

The core names no entry. Built-in ones register when their package is imported, which happens on
the first look-up; third parties join through entry points of the same group.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from steering.errors import OptionError, unknown_name
from steering.turns import TURN

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Names of one kind of thing.

    Args:
        kind: the word used in messages ("method", "reward").
        package: imported on first use, so that its modules can register themselves.
        group: entry point group for other distributions.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._entries: dict[str, Any] = {}
        self._loading = self._complete = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a class or function under a name."""

        def add(thing: T) -> T:
            known = self._entries.get(name, thing)
            if known is not thing and _place(known) != _place(thing):  # a module may be run again
                raise OptionError(f"The {self.kind} {name!r} is registered twice.")
            self._entries[name] = thing
            return thing

        return add

    def load(self) -> None:
        """Imports the built-in package and lists other distributions' entry points."""
        if self._complete:
            return
        with TURN:  # other threads wait for all names; modules being imported may ask
            if self._loading or self._complete:
                return
            self._loading = True
            try:
                importlib.import_module(self.package)
            finally:
                self._loading = False  # where it failed, the next look-up says so again
            for entry in entry_points(group=self.group):
                self._entries.setdefault(entry.name, entry)
            self._complete = True

    def names(self) -> list[str]:
        """All names, sorted."""
        self.load()
        return sorted(self._entries)

    def get(self, name: str) -> Any:  # noqa: ANN401
        """The class or function of that name.

        Raises:
            OptionError: unknown name; the message has the nearest known one.
        """
        self.load()
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        entry = self._entries[name]
        if hasattr(entry, "load") and hasattr(entry, "group"):
            entry = self._entries[name] = entry.load()
        return entry


def _place(thing: Any) -> tuple[str | None, str | None]:  # noqa: ANN401
    return getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)


METHODS = Registry("method", "steering.samplers", "steering.methods")
REWARDS = Registry("reward", "steering.rewards", "steering.rewards")

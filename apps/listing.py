"""The tables of `steer methods` and `steer rewards`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

from steering.method import plain
from steering.registry import METHODS, REWARDS


def method_rows() -> list[dict[str, Any]]:
    """One row per method: its facts and options."""
    rows = []
    for name in METHODS.names():
        cls = METHODS.get(name)
        needs = [
            word
            for word, flag in (("gradient", cls.needs_gradient), ("noise", cls.needs_stochastic))
            if flag
        ]
        options = {f.name: plain(f.default) for f in dataclasses.fields(cls)}
        rows.append(
            {
                "name": name,
                "target": cls.target,
                "needs": ", ".join(needs) or "-",
                "summary": cls.summary,
                "paper": cls.paper,
                "anytime": cls.anytime,
                "options": options,
                "presets": {
                    k: {a: plain(b) for a, b in v.items()} for k, v in cls.presets.items()
                },
            }
        )
    return rows


def reward_rows() -> list[dict[str, Any]]:
    """One row per reward."""
    rows = []
    for name in REWARDS.names():
        entry = REWARDS.get(name)
        rows.append(
            {
                "name": name,
                "hub_id": _fact(entry, "hub_id"),
                "licence": _fact(entry, "licence"),
                "range": _fact(entry, "value_range"),
                "differentiable": bool(getattr(entry, "differentiable", False)),
                "memory": _fact(entry, "memory"),
                "summary": getattr(entry, "describe", "") or "",
                "options": _options(entry),
            }
        )
    return rows


def _options(entry: Any) -> dict[str, Any]:  # noqa: ANN401
    """The options of its spec with their defaults; no members."""
    known = importlib.import_module("steering.rewards.spec").known_options(entry)
    parameters = inspect.signature(entry).parameters
    defaults = {name: parameters[name].default for name in known}
    return {k: None if v is inspect.Parameter.empty else plain(v) for k, v in defaults.items()}


def _fact(entry: object, name: str) -> str:
    """A class fact as text; functions of the user's may have none."""
    found = getattr(entry, name, None)
    return found if isinstance(found, str) and found else "-"

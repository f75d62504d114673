"""How many samples a budget pays for, and what to change where it pays for none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from steering.errors import BudgetError, SteeringError
from steering.method import Cost, Plan

if TYPE_CHECKING:
    from steering.samplers.base import Sampler


def afford(
    plan: Plan,
    cost: Callable[[int], Cost],
    default: int,
    what: str,
    method: Sampler | None = None,
    least: int = 1,
) -> int:
    """The largest population that the budget pays for, or the default where there is no cap.

    Args:
        method: whose options the error names, where lower ones would make one cheaper.
        least: the smallest population there is; ``what`` names it.

    Raises:
        BudgetError: not even the smallest; says how much that needs, and what to change.
    """
    limits = []
    for name in ("nfe", "reward_calls"):
        cap = getattr(plan.budget, name)
        if cap is None:
            continue
        one, two = getattr(cost(least), name), getattr(cost(least + 1), name)
        if one > cap:
            raise BudgetError(
                f"{name}={cap} is too small: one {what} needs {one} here "
                f"({len(plan.grid)} steps at {max(plan.costs)} network rows a step). Raise it to "
                f"that, or lower {levers(method, plan, name)}."
            )
        limits.append(least + (cap - one) // (two - one))
    return min(limits) if limits else default


def within_budget(plan: Plan, cost: Cost, what: str, method: Sampler | None = None) -> None:
    """Raises where a size the user chose costs more than the budget.

    Args:
        method: whose options the error names, where lower ones would make it cheaper.

    Raises:
        BudgetError: says what is needed, and what to change.
    """
    for name in ("nfe", "reward_calls"):
        cap, need = getattr(plan.budget, name), getattr(cost, name)
        if cap is not None and need > cap:
            lower = "the number of samples or steps"
            if method is not None:
                lower = levers(method, plan, name)
            raise BudgetError(
                f"{what} needs {name}={need}, the budget is {cap}. Raise the budget, or lower "
                f"{lower}."
            )


def levers(method: Sampler | None, plan: Plan, counter: str) -> str:
    """The options of a method that make it cheaper when they are lowered, in words."""
    found = []
    if method is not None:
        now = getattr(method.cost(plan), counter)
        for f in fields(method):
            for value in _less(getattr(method, f.name)):
                with contextlib.suppress(SteeringError):  # it is as low as it can be
                    less = replace(method, **{f.name: value})
                    if f.name not in found and getattr(less.cost(plan), counter) < now:
                        found.append(f.name)
    steps = "the number of steps"
    return f"{', '.join(found)} or {steps}" if found else steps


def _less(value: Any) -> list[Any]:  # noqa: ANN401
    """One less of a number, one entry less of a list; nothing of anything else."""
    if isinstance(value, tuple) and value:
        return [value[:-1], value[1:]]
    return [value - 1] if type(value) is int else []

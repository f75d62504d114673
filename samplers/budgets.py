"""How many samples a budget pays for, and what to change where it pays for none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from steering.errors import BudgetError, SteeringError
from steering.grids import Grid
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
                f"that{or_lower(method, plan, name)}."
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
            raise BudgetError(
                f"{what} needs {name}={need}, the budget is {cap}. Raise the budget"
                f"{or_lower(method, plan, name)}."
            )


def or_lower(method: Sampler | None, plan: Plan, counter: str) -> str:
    """ ", or lower ..." with what makes a method cheaper: options, the number of steps."""
    found = []
    if method is not None:
        now = getattr(method.cost(plan), counter)
        for f in fields(method):
            for value in _less(getattr(method, f.name)):
                with contextlib.suppress(SteeringError):  # it is as low as it can be
                    less = replace(method, **{f.name: value})
                    if f.name not in found and getattr(less.cost(plan), counter) < now:
                        found.append(f.name)
    steps = ["the number of steps"] if _steps_count(method, plan, counter) else []
    named = " or ".join([", ".join(found), *steps] if found else steps)
    return f", or lower {named}" if named else ""


def _steps_count(method: Sampler | None, plan: Plan, counter: str) -> bool:
    """Whether some smaller number of steps is cheaper."""
    if counter == "nfe" or method is None:
        return len(plan.grid) > 1
    now = getattr(method.cost(plan), counter)
    for k in range(1, len(plan.grid)):
        shorter = replace(plan, grid=Grid(plan.grid.times[-k - 1 :]), costs=plan.costs[-k:])
        with contextlib.suppress(SteeringError):  # not every grid suits every method
            if getattr(method.cost(shorter), counter) < now:
                return True
    return False


def _less(value: Any) -> list[Any]:  # noqa: ANN401
    """One less of a number, one entry less of a list; nothing of anything else."""
    if isinstance(value, tuple) and value:
        return [value[:-1], value[1:]]
    return [value - 1] if type(value) is int else []

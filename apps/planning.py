"""What a run will spend and what fits into memory, asked before it."""

from __future__ import annotations

from typing import Any

from steering.api import plan_run
from steering.apps.jobs import Job
from steering.ledger import Budget
from steering.memory import MemoryPlan, plan_memory
from steering.method import Cost, build_method
from steering.pipelines import wrap
from steering.scoring import resolve_reward


def forecast(
    job: Job, method: str, options: dict[str, Any], call: dict[str, Any], *, nfe: int, most: int
) -> tuple[Cost, MemoryPlan]:
    """(the method's forecast under the budget, widths of calls): a few rows are asked for real.

    Raises:
        OptionError, BudgetError, RewardError: as a run with these arguments.
    """
    arguments = {"prompt": "a photo of a red apple", **call}
    with wrap(job.pipe, **arguments) as model:
        reward = resolve_reward(job.reward, model)
        fitted, plan = plan_run(model, build_method(method, options), reward, Budget(nfe=nfe))
        memory = plan_memory(model, reward, gradient=fitted.needs_gradient, most=most)
    return fitted.cost(plan), memory

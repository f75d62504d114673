"""steer(): pipeline + prompt + reward + method + budget -> Result."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch

from steering.engine import Engine, Listener
from steering.errors import OptionError, PipelineError, SteeringError, TaskErrors
from steering.finish import Finisher
from steering.gradients import no_gradient
from steering.ledger import Budget
from steering.method import Method, Plan, build_method, default_costs
from steering.model import Model, is_model
from steering.recipe import writable_folder
from steering.result import Result
from steering.scoring import Reward, parts_of, resolve_reward
from steering.task import Task


@torch.inference_mode(False)
@torch.enable_grad()
def steer(
    pipe: object,
    prompt: str | Sequence[str] | None = None,
    *,
    reward: object,
    method: str | Method = "fk",
    nfe: int | None = None,
    seed: int | Sequence[int] = 0,
    heldout: object = None,
    metadata: Sequence[Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    options: dict[str, Any] | None = None,
    budget: Budget | None = None,
    max_batch: int | None = None,
    deduplicate: bool = True,
    listener: Listener | None = None,
    cancelled: Callable[[], bool] | None = None,
    **call_kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Spends compute at sampling time so that the samples score better.

    Args:
        pipe: a diffusers pipeline, a wrapped one, or an analytic model.
        prompt: one text or a list; None for models without text.
        reward: name, spec string ("clip + 0.5*aesthetic"), Reward, or callable(images, prompts).
        method: name ("fk", or "fk/sdxl" for a preset) or instance.
        nfe: rows through the network that each prompt may spend; guidance counts 2.
        seed: one for all prompts, or one per prompt. Equal seeds give equal noise.
        heldout: verifiers the search never sees: like ``reward``, or a list of these.
        metadata: what rewards may need beside the prompt, such as GenEval records: one per prompt.
        out: folder for PNGs with recipes and result.json; proven writable first. A list of
            prompts writes one subfolder per prompt. Stopped and failed runs leave their best so
            far there.
        options: options of the method named by ``method``.
        budget: further caps (reward calls, seconds). A run whose seconds are over returns its
            best so far, as a cancelled one does.
        max_batch: most rows per network call. By default the model's own wish, or 64, and less
            where memory could be short and one row, run alone, shows that fewer fit. Halves by
            itself when memory runs out.
        deduplicate: rows of one network call that are copies of each other are computed once;
            they still count as asked, see ``Ledger.deduplicated``.
        listener: called as listener(task, progress) while running.
        cancelled: asked between calls; True returns the best so far.
        **call_kwargs: what ``pipe(...)`` takes besides the prompt (checked against it).

    Returns:
        A Result; a list of them for a list of prompts (None for those that a stop kept from
        starting).

    Raises:
        OptionError, BudgetError, PipelineError: before anything is spent.
        RewardError: the reward failed; ``error.result`` holds the best so far. Also, before
            anything is spent, where a method needs a gradient that the reward does not have.
        DecodeError: the model's decoder failed; ``error.states`` holds what it was given.
        TaskErrors: some prompts of a list failed; ``.results`` has the others.
    """
    chosen = build_method(method, options)
    if prompt is not None:
        check_prompts(prompt)
    model, mine = _model(pipe, prompt, call_kwargs)
    many = len(model.prompts) > 1 or not (prompt is None or isinstance(prompt, str))
    try:
        guide = resolve_reward(reward, model)
        listed = _listed(heldout)
        verifiers = [guide if r is reward else resolve_reward(r, model) for r in listed]
        _distinct(guide, verifiers)
        tasks = _tasks(model, chosen, guide, _caps(nfe, budget), seed, metadata)
        folder = None if out is None else writable_folder(out)
        limit = getattr(model, "max_batch", None) or 64 if max_batch is None else max_batch
        engine = Engine(
            model,
            max_batch=limit,
            listener=listener,
            cancelled=cancelled,
            deduplicate=deduplicate,
            careful=max_batch is None,
        )
        finish = Finisher(model, tasks, verifiers, engine, folder if many else None)
        finish.check()
        engine.run(tasks)
        results = finish.all()
        if many:
            return _several(results, tasks)
        return _single(results[0], tasks[0], folder)
    finally:
        if mine:
            model.close()


def _model(pipe: object, prompt: Any, call_kwargs: dict[str, Any]) -> tuple[Model, bool]:  # noqa: ANN401
    """(the model, whether we made it and must close it)."""
    if is_model(pipe):
        if call_kwargs:
            raise OptionError(
                f"{', '.join(sorted(call_kwargs))}: arguments of the pipeline call belong to "
                "steering.wrap(pipe, ...) when a wrapped model is given."
            )
        wanted = (prompt,) if prompt is None or isinstance(prompt, str) else tuple(prompt)
        if prompt is not None and tuple(pipe.prompts) != wanted:
            if all(p is None for p in pipe.prompts) and len(wanted) == len(pipe.prompts):
                return pipe, False
            raise OptionError(
                f"This model was wrapped for {list(pipe.prompts)}, not for {list(wanted)}. Wrap "
                "it for the new prompts, or leave prompt out."
            )
        return pipe, False
    if isinstance(pipe, str | os.PathLike):
        raise OptionError(
            f"{pipe!r} is a name, not a pipeline. Open it first: steering.load({str(pipe)!r})."
        )
    from steering.pipelines import wrap

    call = call_kwargs if prompt is None else {**call_kwargs, "prompt": prompt}
    return wrap(pipe, **call), True


def check_prompts(prompt: object) -> None:
    """Raises unless this is a non-empty text or a non-empty list of them."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not texts:
        raise OptionError(f"prompt must be a text or a list of texts, got {prompt!r}.")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise OptionError(f"prompt {i} must be a non-empty text, got {text!r}.")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise OptionError(f"prompt {i} holds half a surrogate pair, no text: {text!r}.")


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _distinct(guide: Reward, verifiers: Sequence[Reward]) -> None:
    for verifier in verifiers:
        same = verifier is guide or (guide.spec is not None and verifier.spec == guide.spec)
        if same or set(parts_of(verifier)) == set(parts_of(guide)):
            raise OptionError(
                f"heldout={verifier.name!r} is the guiding reward itself: a verifier that the "
                "search has seen proves nothing. Choose another one."
            )


def _caps(nfe: int | None, budget: Budget | None) -> Budget:
    if budget is None:
        return Budget(nfe=nfe)
    if not isinstance(budget, Budget):
        raise OptionError(f"budget must be a steering.Budget, got {budget!r}; nfe= is a number.")
    if nfe is None:
        return budget
    if budget.nfe is not None:
        raise OptionError("nfe is given twice: as nfe= and inside budget=.")
    return Budget(**{**asdict(budget), "nfe": nfe})


def _tasks(
    model: Model,
    method: Method,
    reward: Reward,
    budget: Budget,
    seed: int | Sequence[int],
    metadata: Sequence[Any] | None,
) -> list[Task]:
    n = len(model.prompts)
    seeds, extra = _seeds(seed, n), _metadata(metadata, n)
    _warn_of_twins(model, seeds)
    fitted, plan = plan_run(model, method, reward, budget)
    return [
        Task(
            index=i, prompt=text, cond=i, seed=seeds[i], method=fitted, plan=plan, reward=reward,
            metadata=extra[i],
        )
        for i, text in enumerate(model.prompts)
    ]  # fmt: skip


def plan_run(model: Model, method: Method, reward: Reward, budget: Budget) -> tuple[Method, Plan]:
    """The method with its sizes set, and what it knows of the model, the budget and the reward.

    Raises:
        BudgetError, OptionError, RewardError: they do not fit together.
    """
    grid = method.levels(model)
    spread = getattr(reward, "spread", None)
    stationary = getattr(reward, "stationary", True)
    plan = Plan(
        grid=grid,
        costs=default_costs(model, grid),
        budget=budget,
        spread=spread,
        stationary=stationary,
    )
    fitted = method.fit(plan)
    _check_gradient(model, fitted, reward)
    if not stationary:
        _check_law(fitted, reward)
    if (check := getattr(fitted, "check_reward", None)) is not None:
        check(reward)
    return fitted, plan


def _check_gradient(model: Model, method: Method, reward: Reward) -> None:
    if not method.needs_gradient:
        return
    # A method may estimate the reward's slope and differentiate the network alone.
    if getattr(method, "differentiates_reward", True) and not reward.differentiable:
        raise no_gradient(method.name, reward.name)
    if getattr(getattr(model, "pipe", None), "safety_checker", None) is not None:
        raise PipelineError(
            f"Method {method.name!r} needs gradients, and none pass the safety checker of "
            f"{model.name!r}. Set pipe.safety_checker = None, or use a method that needs none."
        )
    if not model.dtype.is_floating_point:
        raise OptionError(
            f"Method {method.name!r} needs gradients, and the states of {model.name!r} are "
            "integers. Use a method that needs none."
        )


def _check_law(method: Method, reward: Reward) -> None:
    """Raises where a reward that is no function of x meets a law p(x) exp(reward_scale r(x)), or a
    search that holds what it finds against what it has found before."""
    if method.target == "tilted":
        raise OptionError(
            f"Method {method.name!r} samples p(x) exp(reward_scale r(x)), but the reward "
            f"{reward.name!r} of a sample changes with the other samples of the call, so the law "
            "would be another one at every step. Give it fixed constants (zsum(..., "
            "calibration=FILE)), or take a method that looks for a maximum, such as best_of_n."
        )
    if getattr(method, "remembers", False):
        raise OptionError(
            f"Method {method.name!r} compares rewards of different calls, but the reward "
            f"{reward.name!r} of a sample changes with the other samples of its call. Give it "
            "fixed constants (zsum(..., calibration=FILE)), or take best_of_n or "
            "best_of_majority, which score all samples of a prompt in one call."
        )


def _warn_of_twins(model: Model, seeds: Sequence[int]) -> None:
    runs = list(zip(model.prompts, seeds, strict=True))
    twin = next((i for i, run in enumerate(runs) if run in runs[:i]), None)
    if twin is not None:
        warnings.warn(
            f"prompt {twin} and an earlier one are equal and share the seed {seeds[twin]}, so "
            "their pictures will be equal. Pass seed=[...] with one number per prompt.",
            stacklevel=4,
        )


def _seeds(seed: Any, n: int) -> list[int]:  # noqa: ANN401
    listed = [seed] * n if isinstance(seed, Integral) else seed
    if (
        isinstance(listed, str | bytes)
        or not isinstance(listed, Iterable)
        or len(listed := list(listed)) != n
        or not all(isinstance(s, Integral) for s in listed)
    ):
        raise OptionError(f"seed must be one integer or one per prompt ({n}), got {seed!r}.")
    return [int(s) for s in listed]


def _metadata(metadata: Any, n: int) -> list[Any]:  # noqa: ANN401
    if metadata is None:
        return [None] * n
    if not isinstance(metadata, list | tuple) or len(metadata) != n:
        raise OptionError(f"metadata must be a list with one entry per prompt ({n}).")
    return list(metadata)


def _single(result: Result | None, task: Task, folder: Any) -> Result:  # noqa: ANN401
    if result is not None and folder is not None:
        result.save(folder)
    if task.error is not None:
        task.error.result = result  # type: ignore[attr-defined]
        raise task.error
    if result is None:
        raise SteeringError("The run was cancelled before there was anything to show.")
    return result


def _several(results: list[Result | None], tasks: list[Task]) -> list[Result]:
    errors: dict[int, BaseException] = {}
    for task, result in zip(tasks, results, strict=True):
        if task.error is not None:
            task.error.result = result  # type: ignore[attr-defined]
            errors[task.index] = task.error
    if errors:
        good = [None if t.error is not None else r for t, r in zip(tasks, results, strict=True)]
        raise TaskErrors(good, errors)
    return results  # type: ignore[return-value]

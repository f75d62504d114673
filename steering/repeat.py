"""Runs a recipe again and compares the picture bit for bit."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from steering.api import steer
from steering.errors import OptionError, RecipeError
from steering.ledger import Budget
from steering.loading import describe, load_again, with_scheduler
from steering.method import Method, build_method
from steering.recipe import Recipe, package_versions, read
from steering.result import Result
from steering.scoring import recipe_reward
from steering.turns import renewed_by_forks

_REPLAYING = threading.RLock()
renewed_by_forks(_REPLAYING)


@dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """A repeated run beside the picture it was to repeat.

    Attributes:
        result: of the repeated prompt.
        image: index of the picture in ``result.images``.
        identical: whether every pixel is equal.
        difference: largest difference of any 8-bit value.
        changed: packages whose version is not the recipe's.
    """

    result: Result
    image: int
    identical: bool
    difference: int
    changed: dict[str, tuple[str | None, str | None]]


def replay(
    path: str | os.PathLike[str],
    *,
    pipe: Any = None,  # noqa: ANN401
    reward: object = None,
    method: Method | None = None,
    metadata: Sequence[Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **call_kwargs: Any,  # noqa: ANN401
) -> Replay:
    """Makes the picture of a PNG again from the recipe inside it.

    Args:
        path: a PNG written by ``Result.save``.
        pipe: the pipeline, where the recipe cannot name one; its weights must match.
        reward: the reward, where the recipe's was a plain callable.
        method: the method, where the recipe's is not registered or holds a function.
        metadata: one per prompt of the recipe, where it could not store them.
        out: folder for the repeated pictures.
        **call_kwargs: call arguments the recipe could not store (images, tensors).

    Raises:
        RecipeError: no or a damaged recipe, a stopped run, or something it cannot rebuild.
    """
    recipe = read(path)
    if recipe.engine.get("stopped"):
        raise RecipeError(f"{path}: made by a run that was stopped; such a run has no repeat.")
    call, metadata = _call(recipe, call_kwargs), _metadata(recipe, metadata)
    pipe = _pipe(recipe, pipe)
    method = _method(recipe, path) if method is None else build_method(method)
    if reward is None and recipe.reward is None:
        raise RecipeError(f"{path}: the reward was a plain callable. Pass it as reward=.")
    guide = reward if reward is not None else recipe_reward(str(recipe.reward))
    textless = all(p is None for p in recipe.prompts)
    with _threads(recipe.engine.get("threads")):
        results = steer(
            pipe,
            None if textless else recipe.prompts,  # type: ignore[arg-type]
            reward=guide,
            method=method,
            budget=_budget(recipe, path),
            seed=recipe.seeds,
            metadata=metadata,
            heldout=[recipe_reward(spec) for spec in recipe.heldout if spec is not None] or None,
            max_batch=recipe.engine.get("max_batch"),
            deduplicate=recipe.engine.get("deduplicate", False),
            **call,
        )
    result = results[recipe.prompt] if isinstance(results, list) else results
    return _compare(path, recipe, result, out)


def _method(recipe: Recipe, path: Any) -> Method:  # noqa: ANN401
    try:
        return build_method(recipe.method["name"], recipe.method["options"])
    except OptionError as error:
        raise RecipeError(
            f"{path}: the recipe's method cannot be rebuilt ({error}) Pass it as method=."
        ) from None


def _budget(recipe: Recipe, path: Any) -> Budget:  # noqa: ANN401
    try:
        return Budget(**recipe.budget)
    except (TypeError, OptionError) as error:
        raise RecipeError(f"{path}: damaged recipe, budget {recipe.budget} ({error}).") from None


def _call(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    call = {**recipe.call, **given}
    lost = [k for k, v in call.items() if isinstance(v, dict) and "$unavailable" in v]
    taken = sorted(set(call) & set(inspect.signature(steer).parameters))
    if taken:
        raise RecipeError(f"Arguments of the call cannot be named {', '.join(taken)}.")
    if lost:
        raise RecipeError(
            f"The recipe could not store {', '.join(lost)}. Pass them again as keyword arguments."
        )
    return call


def _metadata(recipe: Recipe, given: Sequence[Any] | None) -> Sequence[Any] | None:
    found = recipe.metadata if given is None else given
    if any(isinstance(m, dict) and "$unavailable" in m for m in found or ()):
        raise RecipeError("The recipe could not store the prompts' metadata. Pass metadata=[...].")
    return found


def _pipe(recipe: Recipe, pipe: Any) -> Any:  # noqa: ANN401
    """The recipe's pipeline, proven to hold the same weights."""
    if pipe is None:
        if recipe.model.get("source") is None:
            raise RecipeError(
                f"The recipe's {recipe.model.get('class')} was built in memory. Pass it as pipe=."
            )
        pipe = load_again(recipe.model)
    # A copy: the caller's pipeline keeps its scheduler.
    pipe = with_scheduler(copy.copy(pipe), recipe.model.get("scheduler"))
    found = describe(pipe)
    # None is a print that could not be taken: the weights were, or are, elsewhere.
    known = {found["fingerprint"], recipe.model.get("fingerprint", "missing")} - {None}
    if len(known) > 1:
        raise RecipeError(
            f"The weights of this {found['class']} are not those of the recipe (fingerprint "
            f"{found['fingerprint']}, recipe {recipe.model.get('fingerprint')}), so the picture "
            "cannot be repeated with them."
        )
    return pipe


@contextlib.contextmanager
def _threads(wanted: object) -> Iterator[None]:
    """The recipe's number of CPU threads: sums are split by it, which shows in the last bits."""
    with _REPLAYING:  # the number is the process's: others that replay would put back this one
        before = torch.get_num_threads()
        try:
            if isinstance(wanted, int) and wanted > 0:
                torch.set_num_threads(wanted)
            yield
        finally:
            torch.set_num_threads(before)


def _compare(path: Any, recipe: Recipe, result: Result, out: Any) -> Replay:  # noqa: ANN401
    if recipe.image >= len(result):
        raise RecipeError(
            f"{path}: picture {recipe.image} of {len(result)}; the recipe is damaged."
        )
    new = np.asarray(result.pictures()[recipe.image].convert("RGB"), dtype=np.int16)
    with Image.open(path) as image:
        old = np.asarray(image.convert("RGB"), dtype=np.int16)
    same_size = old.shape == new.shape
    difference = int(np.abs(old - new).max()) if same_size else 255
    if out is not None:
        result.save(out)
    here = package_versions()
    names = {*here, *recipe.versions}
    changed = {n: (recipe.versions.get(n), here.get(n)) for n in sorted(names)}
    changed = {n: pair for n, pair in changed.items() if pair[0] != pair[1]}
    return Replay(
        result=result,
        image=recipe.image,
        identical=same_size and difference == 0,
        difference=difference,
        changed=changed,
    )

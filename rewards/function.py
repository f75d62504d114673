"""Plain callables as rewards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steering.errors import OptionError, RewardError
from steering.rewards.arithmetic import Arithmetic
from steering.rewards.images import as_tensor, check_prompts, to_pil
from steering.scoring import Scores


class FunctionReward(Arithmetic):
    """A plain callable as a reward.

    The callable gets ``(images, prompts)``, or ``(images)`` where its signature takes one
    positional argument, and also ``metadata=`` where it has a parameter of that name. It returns
    one number per image: a tensor, an array, a list, or ``Scores``.

    Args:
        fn: the callable; a ``torch.nn.Module`` is asked by its ``forward``.
        images: "tensor" hands over the batch as it is, "pil" a list of PIL images (for video, a
            list of lists of frames).
        differentiable: whether gradients may be asked for; by default the callable's attribute of
            that name, else yes for tensors.
        name: for reports; the callable's own name by default.
        spec: a string that rebuilds it, where one exists.
        options: keyword arguments for every call.
    """

    licence = "your own"

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        images: Literal["tensor", "pil"] = "tensor",
        differentiable: bool | None = None,
        name: str | None = None,
        spec: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if images not in ("tensor", "pil"):
            raise OptionError(f"FunctionReward(images={images!r}): give 'tensor' or 'pil'.")
        if inspect.iscoroutinefunction(fn):
            raise OptionError(
                f"The reward {fn!r} is an async function. Pass a plain one, such as "
                "lambda images, prompts: asyncio.run(fn(images, prompts))."
            )
        self.fn, self.images, self.spec = fn, images, spec
        self.name = name or getattr(fn, "__name__", type(fn).__name__)
        if differentiable is None:
            differentiable = images == "tensor" and getattr(fn, "differentiable", True)
        self.differentiable = bool(differentiable)
        self.describe = first_line(fn) or "A function of yours"
        self.options = dict(options or {})
        self._takes_prompts, self._takes_metadata = _call_style(fn, self.name)

    def __repr__(self) -> str:
        return f"FunctionReward({self.spec or self.name})"

    def __call__(
        self,
        images: Any,  # noqa: ANN401
        prompts: str | Sequence[Any],
        *,
        metadata: Sequence[Any] | None = None,
    ) -> Scores:
        """What the callable returns, as float32 ``Scores``.

        Raises:
            RewardError: the result cannot be read as numbers, or lost the gradient on its way.
        """
        # A copy: what a function does in place must not reach the pictures that are delivered.
        given = images.clone() if isinstance(images, Tensor) else as_tensor(images)
        n = len(given)
        if self.images == "pil":
            given = to_pil(given)
        arguments = [given]
        if self._takes_prompts:
            arguments.append(check_prompts(prompts, n))
        extra = {"metadata": metadata} if self._takes_metadata else {}
        found = as_scores(self.fn(*arguments, **self.options, **extra), self.name)
        wants_gradient = torch.is_grad_enabled() and getattr(images, "requires_grad", False)
        if self.differentiable and wants_gradient and not found.value.requires_grad:
            raise RewardError(
                f"Reward {self.name!r} returned values that are cut off from the images, so it "
                "has no gradient. Compute them with torch operations on the tensor it is given, "
                "or declare it with FunctionReward(fn, differentiable=False)."
            )
        return found


def first_line(thing: object) -> str:
    """The first line of a docstring, without its full stop."""
    return (inspect.getdoc(thing) or "").split("\n")[0].rstrip(".")


def _call_style(fn: Callable[..., Any], name: str) -> tuple[bool, bool]:
    """(takes prompts, takes metadata), read off the signature."""
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # a builtin that does not tell
        return True, False
    kinds = inspect.Parameter
    named = "metadata" in [p.name for p in parameters if p.kind != kinds.POSITIONAL_ONLY]
    if any(p.kind == kinds.VAR_POSITIONAL for p in parameters):
        return True, named
    simple = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    places = [p for p in parameters if p.kind in simple and p.name != "metadata"]
    required = [p for p in places if p.default is kinds.empty]
    if not places or len(required) > 2:
        raise OptionError(
            f"The reward function {name!r} must take (images, prompts) or (images); its signature "
            f"is {name}{inspect.signature(target)}."
        )
    # A second parameter with a default is an option of the function unless its name says prompts.
    second = len(places) > 1 and (len(required) == 2 or places[1].name in ("prompts", "prompt"))
    return second, named


def as_scores(found: Any, name: str = "reward") -> Scores:  # noqa: ANN401
    """Whatever a scoring function returned, as float32 ``Scores``; shapes are left alone."""
    if isinstance(found, Scores):
        return dataclasses.replace(found, value=found.value.float())
    try:
        if isinstance(found, (list, tuple)) and any(isinstance(v, Tensor) for v in found):
            found = torch.stack([torch.as_tensor(v) for v in found])
        return Scores(value=torch.as_tensor(found).float())
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"Reward {name!r} returned {type(found).__name__}, which cannot be read as one number "
            f"per image ({error}). Return a tensor, an array or a list of n numbers, or Scores."
        ) from error

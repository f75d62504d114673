"""What a pipeline's source must look like to be driven, checked before any work is spent."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import Any

from torch import nn

from steering.errors import PipelineError
from steering.pipelines.meter import denoisers
from steering.pipelines.schedule import family_of

_CACHES = re.compile(r"cache|fbc|broadcast|taylor", re.IGNORECASE)


def require_drivable(pipe: Any) -> bool:
    """Checks the idioms control inversion relies on.

    Returns:
        Whether the loop may alter the state after scheduler.step, which a dry run must settle.

    Raises:
        PipelineError: the idiom that is missing, or the feature that is unsafe.
    """
    name = type(pipe).__name__
    for part in ("scheduler", "prepare_latents", "components"):
        if getattr(pipe, part, None) is None:
            raise PipelineError(
                f"{name} has no `{part}`, which a wrapped pipeline needs. "
                "Text-to-image and text-to-video pipelines of diffusers have it."
            )
    for part in ("set_timesteps", "step", "config"):
        if not hasattr(pipe.scheduler, part):
            raise PipelineError(f"{name}: its scheduler has no `{part}`.")
    family_of(pipe.scheduler)
    _refuse_caches(name, denoisers(pipe))
    if getattr(getattr(pipe, "guider", None), "momentum", None):
        raise PipelineError(
            f"{name} has a guider with momentum, which remembers earlier calls; set momentum to 0."
        )
    return _read_source(type(pipe))


def _refuse_caches(name: str, networks: dict[str, nn.Module]) -> None:
    for label, network in networks.items():
        registries: list[Any] = [getattr(m, "_diffusers_hook", None) for m in network.modules()]
        hooks = [
            hook for registry in registries if registry is not None for hook in registry.hooks
        ]
        caches = sorted({hook for hook in hooks if _CACHES.search(hook)})
        if caches or getattr(network, "is_cache_enabled", False):
            raise PipelineError(
                f"{name}.{label} has a cache between steps ({', '.join(caches) or 'enabled'}), "
                "which assumes that times only fall; call `disable_cache()` first."
            )


@functools.cache  # finding and parsing a source costs more than a step of a small model
def _read_source(kind: type) -> bool:
    call, name = inspect.unwrap(kind.__call__), kind.__name__
    try:
        source = textwrap.dedent(inspect.getsource(call))
        tree = ast.parse(source)
    except (OSError, SyntaxError):  # no source at hand: the first frame decides
        return False
    if re.search(r"deepcopy\(\s*self\.scheduler", source):
        raise PipelineError(
            f"{name} steps a copy of its scheduler beside the first (joint audio and video); the "
            "second stream would not follow ours, so it cannot be driven."
        )
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and _enumerates(node) and _steps(node)
    ]
    if not loops:
        raise PipelineError(
            f"{name}.__call__ has no loop `for i, t in enumerate(timesteps)` with "
            "`self.scheduler.step` in it, so it cannot be driven from outside."
        )
    return any(_alters_after_step(loop) for loop in loops)


def _enumerates(loop: ast.For) -> bool:
    call = loop.iter
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and (call.func.id == "enumerate")
    )


def _steps(node: ast.AST) -> bool:
    return any(
        isinstance(child, ast.Attribute)
        and child.attr == "step"
        and isinstance(child.value, (ast.Attribute, ast.Name))
        and "scheduler" in ast.unparse(child.value)
        for child in ast.walk(node)
    )


def _alters_after_step(loop: ast.For) -> bool:
    """Whether the state may be changed between two steps, as inpainting does by blending."""
    changes = [n for n in ast.walk(loop) if isinstance(n, ast.Assign)]
    stepping = [n for n in changes if _steps(n)]
    for step in stepping:
        names = {n.id for t in step.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        for other in changes:
            assigned = {ast.unparse(target) for target in other.targets}
            if other.lineno > step.lineno and assigned & names and not _harmless(other.value):
                return True
        if "latents" not in names:  # put together from the step and something else
            return True
        if any(_cuts(call) for call in ast.walk(step) if isinstance(call, ast.Call)):
            return True
    return not stepping


def _harmless(value: ast.expr) -> bool:
    """A cast, or what a callback hands back."""
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr in ("to", "pop", "type", "float")
    )


def _cuts(call: ast.Call) -> bool:
    """scheduler.step on a part of the state."""
    return ast.unparse(call.func).endswith("scheduler.step") and any(
        isinstance(argument, ast.Subscript) and "latents" in ast.unparse(argument)
        for argument in call.args
    )

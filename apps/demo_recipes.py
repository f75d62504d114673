"""What a recipe from anywhere may ask for, and why its repeat may not be equal to its picture.

A recipe is whatever someone wrote into a PNG. Its rewards and methods may be told numbers, flags
and choices among names; a text could be a file of the server, a hub id or an address.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from steering.apps.demo_forms import Field, option_fields
from steering.errors import RecipeError
from steering.loading import SHIPPED
from steering.recipe import Recipe
from steering.rewards import as_reward
from steering.rewards.spec import known_options
from steering.samplers.guide_presets import GUIDES
from steering.samplers.guides import Guide

_CLIPS = ("aesthetic", "clip", "diversity", "temporal")
"""Rewards whose option ``model`` may name the CLIP that ships."""
_REWARDS, _CHARS = 16, 500
_WHOLE, _NUMBER = 100, 1000.0
"""Largest values of a reward's options, where its default is not larger still."""
_METHOD_WHOLE, _METHOD_NUMBER = 10_000, 1e6
_METADATA_CHARS = 20_000
_DECISIVE = ("max_batch", "threads", "deduplicate")
"""What of the engine decides the last bits, with what the recipe says of packages and hardware."""
_OWN = "`steer replay` on a machine of your own repeats others too."


def check_rewards(specs: Sequence[str], offered: Collection[str]) -> None:
    """Raises unless all rewards are offered, with options that anybody may set.

    Raises:
        RecipeError, OptionError: names the reward and the option; no file was opened for it.
    """
    seen: list[str] = []

    def check(name: str, entry: Any, options: Mapping[str, Any]) -> None:  # noqa: ANN401
        seen.append(name)
        if name not in offered:
            raise RecipeError(f"The recipe's reward {name!r} is not offered by this server.")
        if len(seen) > _REWARDS:
            raise RecipeError(f"The recipe has more than {_REWARDS} rewards.")
        for option, value in options.items():
            if option == "model" and name in _CLIPS and value in SHIPPED:
                continue
            _check_option(name, entry, option, value)

    for spec in specs:
        if not isinstance(spec, str) or len(spec) > _CHARS:
            raise RecipeError(f"The recipe's reward {str(spec)[:80]!r} is not one that is read.")
        as_reward(spec, allow_python=False, check=check)


def _check_option(name: str, entry: Any, option: str, value: Any) -> None:  # noqa: ANN401
    default = inspect.signature(entry).parameters[option].default
    if value == default and type(value) is type(default):
        return
    said = f"The recipe's reward {name!r} has the option {option}={str(value)[:80]!r}"
    kinds = _kinds(known_options(entry)[option])
    if isinstance(value, str) and not any(isinstance(k, str) for k in kinds):
        raise RecipeError(
            f"{said}, a text that could lead to files or addresses of this server. Numbers, "
            f"flags and named choices are repeated here. {_OWN}"
        )
    if not _simple(value, kinds):
        raise RecipeError(f"{said}, which cannot be set from a recipe here. {_OWN}")
    if _is_number(value):
        whole = isinstance(value, int) and float not in kinds
        most: float = _WHOLE if whole else _NUMBER
        most = max(most, abs(default)) if _is_number(default) else most
        if not abs(value) <= most:  # NaN too
            raise RecipeError(f"{said}; it must lie between {-most:g} and {most:g} here.")


def _kinds(hint: Any) -> list[Any]:  # noqa: ANN401
    """Types of a hint; the choices themselves where it names them."""
    return [kind for part in typing.get_args(hint) for kind in _kinds(part)] or [hint]


def _simple(value: Any, kinds: Sequence[Any]) -> bool:  # noqa: ANN401
    """Whether a value is a flag, a number or a choice, and one that its option takes."""
    if value is None:
        return type(None) in kinds
    if isinstance(value, str):
        return value in kinds
    return type(value) in kinds or (_is_number(value) and float in kinds)


def _is_number(value: object) -> typing.TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_method_options(cls: type, options: Mapping[str, Any], where: str) -> None:
    """Raises unless a method's options are numbers, flags and choices of the form.

    Raises:
        RecipeError: names the option.
    """
    for field in option_fields(cls):
        value = options.get(field.name, field.default)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if value is None or (value == default and type(value) is type(default)):
            continue
        if field.name == "guidance" and isinstance(value, Mapping):
            _check_guidance(value)
        elif not _fits(field, value):
            raise RecipeError(
                f"The recipe's option {field.name}={str(value)[:80]!r} of {where} is not one "
                f"that this server takes. {_OWN}"
            )


def _check_guidance(value: Mapping[str, Any]) -> None:
    if value.get("preset", "dps") not in GUIDES:
        raise RecipeError(f"The recipe's guidance {str(value['preset'])[:80]!r} is unknown.")
    check_method_options(Guide, value, "its guidance")


def _fits(field: Field, value: Any) -> bool:  # noqa: ANN401
    if field.kind == "flag":
        return isinstance(value, bool)
    if field.kind == "choice":
        return isinstance(value, str) and value in field.choices
    values = value if field.kind == "list" and isinstance(value, list | tuple) else [value]
    return all(_bounded(v, whole=field.kind == "whole") for v in values)


def _bounded(value: Any, *, whole: bool) -> bool:  # noqa: ANN401
    if not _is_number(value) or (whole and not isinstance(value, int)):
        return False
    return abs(value) <= (_METHOD_WHOLE if isinstance(value, int) else _METHOD_NUMBER)


def metadata_of(recipe: Recipe) -> tuple[Any, ...] | None:
    """What the rewards were given beside each prompt.

    Raises:
        RecipeError: it was not stored, or is longer than is read here.
    """
    found = recipe.metadata
    if found is None:
        return None
    if any(isinstance(m, dict) and "$unavailable" in m for m in found):
        raise RecipeError(
            "The recipe could not store what its rewards were given beside the prompts, so it "
            "cannot be repeated here."
        )
    if len(json.dumps(found)) > _METADATA_CHARS:
        raise RecipeError(f"The recipe's metadata is longer than {_METADATA_CHARS} characters.")
    return tuple(found)


def check_scheduler(wanted: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> None:
    """Raises where the model's scheduler is not the one of the recipe.

    Raises:
        RecipeError: names both, or what differs between their settings.
    """
    if wanted is None or (own := _as_json(here)) == _as_json(wanted):
        return
    if not isinstance(wanted, Mapping):
        raise RecipeError("Damaged recipe: its scheduler is no object.")
    name, mine = wanted.get("class"), (own or {}).get("class")
    if name != mine:
        what = f"its scheduler is {str(name)[:80]}, this server's model has {mine}"
    else:
        old, new = (dict(s.get("config") or {}) for s in (wanted, own or {}))
        keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        what = f"its {mine} has other settings than here ({', '.join(keys)[:200]})"
    raise RecipeError(f"The recipe cannot be repeated by this server: {what}. {_OWN}")


def _as_json(value: Any) -> Any:  # noqa: ANN401
    return json.loads(json.dumps(value))


def differences(recipe: Recipe, again: Mapping[str, Any]) -> list[str]:
    """What decides the last bits and was not the same, each as "name then (here now)".

    Args:
        again: the recipe of the repeat, as JSON.
    """
    old = {**recipe.engine, "deduplicate": recipe.engine.get("deduplicate", False)}
    pairs = {k: (old.get(k), again["engine"].get(k)) for k in _DECISIVE}
    pairs |= {k: (recipe.model.get(k), again["model"].get(k)) for k in ("dtype", "device")}
    ready, mine = recipe.model.get("setup"), again["model"].get("setup", {})
    if isinstance(ready, dict):
        pairs |= {k: (ready.get(k), value) for k, value in mine.items()}
    found = {k: pair for k, pair in pairs.items() if pair[0] is not None}
    versions, here = recipe.versions, again["versions"]
    if isinstance(versions, dict):
        found |= {k: (versions.get(k), here.get(k)) for k in sorted({*versions, *here})}
    return [
        f"{str(name)[:40]} {str(then)[:40]} (here {now})"
        for name, (then, now) in found.items()
        if then != now
    ]

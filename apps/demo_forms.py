"""Forms made from dataclasses: the type of an option chooses its control, its docstring line is
the help beside it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steering.errors import OptionError
from steering.grids import SHAPES

_CLOSED = ("share",)
"""Options that reach into other people's runs: budgets are never shared between sessions."""
_AUTO = "(automatic)"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One option as a control.

    Attributes:
        kind: "whole", "number", "flag", "choice" or "list" (numbers with commas).
        optional: whether None is a value, shown as an empty control.
        single: of a list: whether a number alone is another thing than a list of one.
        choices: of a choice.
        help: the option's line in the class docstring.
    """

    name: str
    kind: Literal["whole", "number", "flag", "choice", "list"]
    default: Any
    optional: bool
    choices: tuple[str, ...]
    help: str
    single: bool = False

    @property
    def written(self) -> bool:
        """Whether a number is written as text: number fields of browsers turn empty into 0."""
        return self.kind in ("whole", "number") and self.optional

    def shown(self, value: Any) -> Any:  # noqa: ANN401
        """A value as the control holds it."""
        if self.kind == "list":
            several = isinstance(value, Sequence) and not isinstance(value, str)
            return ", ".join(f"{v:g}" for v in value) if several else _text(value)
        if self.written:
            return _text(value)
        if self.kind == "choice":
            return _AUTO if value is None else str(value)
        return value

    def read(self, value: Any) -> Any:  # noqa: ANN401
        """A control's value as the option's; None stands for the default.

        Raises:
            OptionError: no number, or no list of numbers.
        """
        if value is None or value in ("", _AUTO):
            return None
        if self.written and isinstance(value, str):
            value = self._number(value)
        if self.kind == "whole" and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.kind != "list" or not isinstance(value, str):
            return value
        try:
            parts = [json.loads(part) for part in value.split(",") if part.strip()]
            return parts[0] if len(parts) == 1 and self.single else parts
        except json.JSONDecodeError:
            raise OptionError(
                f"Option {self.name!r} takes numbers with commas between them, got {value!r}."
            ) from None

    def _number(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise OptionError(f"Option {self.name!r} takes a number, got {text!r}.") from None


def option_fields(cls: type) -> list[Field]:
    """The options of a method that a form can hold, in their order.

    Left out are functions, tensors and texts of any content (which may be paths of files).
    """
    hints, lines, found = typing.get_type_hints(cls), doc_lines(cls), []
    for f in dataclasses.fields(cls):
        control = _control(f.name, hints[f.name])
        if control is None or f.name in _CLOSED:
            continue
        kind, choices = control
        kinds = typing.get_args(hints[f.name])
        optional = type(None) in kinds
        if kind == "choice" and optional and _AUTO not in choices:
            choices = (_AUTO, *choices)
        found.append(
            Field(
                name=f.name,
                kind=kind,
                default=f.default,
                optional=optional,
                choices=choices,
                help=lines.get(f.name, ""),
                single=int in kinds or float in kinds,
            )
        )
    return sorted(found, key=lambda f: f.name in ("eta", "eta_end", "transition", "grid", "steps"))


def read_options(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Control values by option name -> the options that differ from the defaults."""
    options = {}
    for f in option_fields(cls):
        value = f.read(values.get(f.name))
        if value is not None and value != f.default and value != _listed(f.default):
            options[f.name] = value
    return options


def doc_lines(cls: type) -> dict[str, str]:
    """Option -> its line in the "Attributes:" part of the class docstring or of a base's."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        _, _, block = text.partition("Attributes:\n")
        for name, line in re.findall(
            r"^    ([\w, ]+): ((?:.+\n?)(?:        .+\n?)*)", block, re.M
        ):
            for one in name.split(","):
                found[one.strip()] = " ".join(line.split())
    return found


def _control(name: str, hint: Any) -> tuple[Any, tuple[str, ...]] | None:  # noqa: ANN401
    """(kind of control, choices) of a type, None where no control can hold it."""
    from steering.resampling import SCHEMES
    from steering.samplers.base import TRANSITIONS

    known = {
        "transition": ("eta", *TRANSITIONS),
        "grid": ("own", *SHAPES),
        "resampler": tuple(SCHEMES),
        "potential": ("difference", "max", "sum", "none"),
    }
    if name in known:
        return "choice", known[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [h for h in (typing.get_args(hint) if union else (hint,)) if h is not type(None)]
    if name == "guidance" and len(parts) > 1:
        from steering.samplers.guide_presets import GUIDES

        return "choice", (_AUTO, *GUIDES)
    if any(typing.get_origin(h) is tuple for h in parts):
        return "list", ()
    if len(parts) != 1:
        return None
    only = parts[0]
    if typing.get_origin(only) is Literal:
        return "choice", tuple(str(a) for a in typing.get_args(only))
    simple = {bool: "flag", int: "whole", float: "number"}
    return (simple[only], ()) if only in simple else None


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _text(value: object) -> str:
    return "" if value is None else str(value)

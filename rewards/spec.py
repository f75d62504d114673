"""Spec strings: ``clip + 0.5*brightness``, ``-jpeg/2``, ``clip(model=ViT-B-32, scale=100)``.

    expression = term {("+" | "-") term}         names, numbers and parentheses; rewards are
    term       = factor {("*" | "/") factor}     multiplied and divided by numbers only
    factor     = {"+" | "-"} atom
    atom       = number | "(" expression ")" | name ["(" [item {"," item}] ")"]
    item       = key "=" value | expression    (rewards made of rewards take expressions, first)

A value is a quoted string or a bare word, which may hold anything but spaces at its ends, commas
and parentheses. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any

from steering.errors import OptionError, unknown_name
from steering.registry import REWARDS
from steering.rewards.function import FunctionReward
from steering.scoring import Reward

_PYTHON = "python:"
_MAX_DEPTH = 20
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAME = re.compile(r"python:[\w.]+:[\w.]+|[A-Za-z_][\w.]*")
_KEY = re.compile(r"([A-Za-z_]\w*)\s*=\s*")
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_BARE = re.compile(r"[^,()'\"]+")
_SAFE = re.compile(r"[\w./:@+\\~-]+")
_LOCAL = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/[\w./-]*)?")

Check = Callable[[str, Any, Mapping[str, Any]], None]
"""Is told (name, what is registered under it, options as read) and raises what it refuses."""


def as_reward(obj: object, *, allow_python: bool = True, check: Check | None = None) -> Reward:
    """A reward from whatever a user may give.

    Args:
        obj: a reward object, a registered name, a spec string (``python:package.module:function``
            names code of your own) or a callable ``fn(images, prompts)`` or ``fn(images)``.
        allow_python: whether ``python:`` may import the user's code, and a judge's ``url`` may
            send a key of this machine away. Pass False for a spec that came out of a file.
        check: asked about every reward of a spec string before that reward is built.

    Raises:
        OptionError: none of these, an unknown name or option, or a spec that cannot be read.
    """
    if isinstance(obj, str):
        return _Parser(obj, allow_python, check).parse()
    if isinstance(obj, type):
        raise OptionError(
            f"A reward must be an object, not the class {obj.__name__}: give {obj.__name__}()."
        )
    if isinstance(obj, Reward):
        return obj
    if callable(obj):
        return FunctionReward(obj, spec=getattr(obj, "reward_name", None))
    raise OptionError(
        f"{type(obj).__name__} is not a reward. Give a name ({', '.join(REWARDS.names())}), a "
        "spec such as 'clip + 0.5*brightness', a Reward, or a function fn(images, prompts) that "
        "returns one number per image."
    )


def call_spec(name: str, options: Mapping[str, Any]) -> str:
    """``name(key=value, ...)`` as `as_reward` reads it back; the bare name without options."""
    if not options:
        return name
    return f"{name}({', '.join(f'{k}={_value_text(v)}' for k, v in options.items())})"


class _Parser:
    """Recursive descent over one spec string; ``at`` is the position of the next character."""

    def __init__(self, text: str, allow_python: bool, check: Check | None = None) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.allow_python, self.check = allow_python, check

    def parse(self) -> Reward:
        found = self.expression()
        if self.peek():
            raise self.error("expected +, -, * or the end")
        if isinstance(found, float):
            raise self.error("there is a number and no reward", at=0)
        return found

    def expression(self) -> Any:  # noqa: ANN401
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.error(f"more than {_MAX_DEPTH} parentheses within each other")
        total = self.term()
        while sign := self.take("+-"):
            more = self.term()
            total = total + more if sign == "+" else total - more
        self.depth -= 1
        return total

    def term(self) -> Any:  # noqa: ANN401
        value = self.factor()
        while operator := self.take("*/"):
            start, more = self.at, self.factor()
            if not isinstance(more, float) and (operator == "/" or not isinstance(value, float)):
                raise self.error("rewards are multiplied and divided by numbers only", at=start)
            if operator == "/" and more == 0:
                raise self.error("division by zero", at=start)
            value = value * more if operator == "*" else value / more
        return value

    def factor(self) -> Any:  # noqa: ANN401
        minus = False
        while sign := self.take("+-"):
            minus ^= sign == "-"
        value = self.atom()
        return -value if minus else value

    def atom(self) -> Any:  # noqa: ANN401
        self.peek()
        if self.take("("):
            found = self.expression()
            if not self.take(")"):
                raise self.error("expected )")
            return found
        if number := _NUMBER.match(self.text, self.at):
            if not math.isfinite(float(number[0])):
                raise self.error("the number is too large")
            self.at = number.end()
            return float(number[0])
        if name := _NAME.match(self.text, self.at):
            return self.reward(name[0])
        raise self.error("expected a reward or a number")

    def reward(self, name: str) -> Reward:
        start = self.at
        self.at += len(name)
        if not name.startswith(_PYTHON):
            try:
                entry = REWARDS.get(name)
            except OptionError as error:
                raise self.error(str(error).rstrip("."), at=start) from None
        elif self.allow_python:
            entry = _import(name)
        else:
            what = f"{name!r} would run code. If you trust it, give the reward yourself"
            raise self.error(what, at=start)
        if not self.take("("):
            return self.build(name, entry, {})
        members = self.members() if getattr(entry, "takes_rewards", False) else []
        options = self.options()
        if not self.allow_python and _tells_a_key(entry, options):
            what = f"{name!r} would send a key of this machine to an address of its own choice. "
            raise self.error(f"{what}If you trust it, give the reward yourself", at=start)
        return self.build(name, entry, options, members)

    def build(
        self,
        name: str,
        entry: Any,  # noqa: ANN401
        given: Mapping[str, tuple[str, bool]],
        members: Sequence[Reward] = (),
    ) -> Reward:
        options = _read_options(name, entry, given)
        if self.check is not None:
            self.check(name, entry, options)
        return _build(name, entry, options, members)

    def members(self) -> list[Reward]:
        """The rewards that stand before the options of a reward made of rewards."""
        found: list[Reward] = []
        while self.peek() not in ("", ")") and not _KEY.match(self.text, self.at):
            start, member = self.at, self.expression()
            if isinstance(member, float):
                raise self.error("expected a reward, not a number", at=start)
            found.append(member)
            if not self.take(",") and self.peek() != ")":
                raise self.error("expected , or )")
        return found

    def options(self) -> dict[str, tuple[str, bool]]:
        """key -> (text, was quoted), up to and with the closing parenthesis."""
        found: dict[str, tuple[str, bool]] = {}
        while not self.take(")"):
            self.peek()
            key = _KEY.match(self.text, self.at)
            if not key:
                raise self.error("expected option=value")
            if key[1] in found:
                raise self.error(f"the option {key[1]!r} is given twice")
            self.at = key.end()
            if value := _QUOTED.match(self.text, self.at):
                found[key[1]] = (self.unquoted(value[0]), True)
            elif value := _BARE.match(self.text, self.at):
                found[key[1]] = (value[0].strip(), False)
            else:
                raise self.error(f"expected a value for {key[1]!r}")
            self.at = value.end()
            if not self.take(",") and self.peek() != ")":
                raise self.error("expected , or )")
        return found

    def unquoted(self, text: str) -> str:
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            raise self.error("a backslash in quotes is written twice") from None

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, characters: str) -> str:
        """The next character if it is one of these, else ""."""
        found = self.peek()
        if not found or found not in characters:
            return ""
        self.at += 1
        return found

    def error(self, what: str, at: int | None = None) -> OptionError:
        at = self.at if at is None else at
        rest = self.text[at : at + 20]
        seen = f"at position {at}, {rest!r}" if rest else "at its end"
        return OptionError(f"Cannot read the reward {self.text!r} {seen}: {what}.")


def _tells_a_key(entry: Any, options: Mapping[str, tuple[str, bool]]) -> bool:  # noqa: ANN401
    """Whether these options choose who gets the key that an environment variable holds."""
    if "key_env" not in known_options(entry):
        return False
    url, _ = options.get("url", ("", False))
    return "key_env" in options or (bool(url) and not _LOCAL.fullmatch(url))


def _read_options(
    name: str,
    entry: Any,  # noqa: ANN401
    given: Mapping[str, tuple[str, bool]],
) -> dict[str, Any]:
    """The options of a registered class or function, read as their types."""
    known = known_options(entry)
    for key in given:
        if key not in known:
            if not known:
                raise OptionError(f"The reward {name!r} has no options; got {key!r}.")
            raise unknown_name(f"option of the reward {name!r}:", key, known)
    return {k: _read(f"{name}({k})", *v, known[k]) for k, v in given.items()}


def _build(
    name: str,
    entry: Any,  # noqa: ANN401
    options: Mapping[str, Any],
    members: Sequence[Reward] = (),
) -> Reward:
    """The registered class or function with its members and options."""
    if isinstance(entry, type):
        return entry(*members, **options)
    label = name.rpartition(":")[2]
    return FunctionReward(entry, name=label, spec=call_spec(name, options), options=options)


def known_options(entry: Any) -> dict[str, Any]:  # noqa: ANN401
    """Option name -> type: keyword arguments of a class, keyword-only ones of a function."""
    kinds = inspect.Parameter
    allowed = {kinds.KEYWORD_ONLY}
    if isinstance(entry, type):
        allowed.add(kinds.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(entry).parameters.values()
    target = entry.__init__ if isinstance(entry, type) else entry
    try:
        hints = typing.get_type_hints(entry if dataclasses.is_dataclass(entry) else target)
    except NameError:  # a hint that is imported for type checkers only
        hints = {}
    return {
        p.name: hints.get(p.name, None if p.default in (None, kinds.empty) else type(p.default))
        for p in parameters
        if p.kind in allowed and p.name != "metadata"
    }


def _read(where: str, text: str, quoted: bool, hint: Any) -> Any:  # noqa: ANN401
    """A value of the hinted type; without a hint, what the text looks like."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    wanted = list(typing.get_args(hint)) if union else [hint]
    if typing.get_origin(hint) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"{where} must be one of {', '.join(choices)}; got {text!r}.{guess}")
        return choices[text]
    guess = text if quoted else _guess(text)
    if guess is None and NoneType in wanted:
        return None
    if hint is None or (type(guess) in wanted and type(guess) is not str):
        return guess
    if str in wanted:
        return text
    if float in wanted and type(guess) is int:
        return float(guess)
    names = " or ".join(getattr(t, "__name__", str(t)) for t in wanted)
    raise OptionError(f"{where} must be {names}; got {text!r}.")


def _guess(text: str) -> Any:  # noqa: ANN401
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _value_text(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, str):
        plain = _SAFE.fullmatch(value) and isinstance(_guess(value), str)
        return value if plain else repr(value)
    return repr(value)


def _import(path: str) -> Callable[..., Any]:
    """The callable that ``python:package.module:name`` points to."""
    module, _, name = path.removeprefix(_PYTHON).partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"Cannot import the reward {path!r}: {error}. The form is "
            "python:package.module:function, and the module must be on the Python path."
        ) from error
    if not callable(found) or isinstance(found, type):
        raise OptionError(f"{path!r} is {type(found).__name__}, not a function.")
    return found

"""The sticker grammar: GenEval's prompt templates over 52 COCO classes and ten colours.

Prompts and metadata follow GenEval (Ghosh et al., 2023): "a photo of a red apple and a blue
clock", "a photo of three dogs", "a photo of a cat left of a pizza".
"""

from __future__ import annotations

import difflib
import re
from typing import Any

Metadata = dict[str, Any]

CLASSES: tuple[str, ...] = (
    "bicycle", "car", "airplane", "bus", "train", "truck", "boat", "traffic light", "stop sign",
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "sports ball", "kite", "bottle",
    "wine glass", "cup", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog",
    "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "toilet", "tv", "laptop",
    "cell phone", "book", "clock", "vase", "scissors", "teddy bear",
)  # fmt: skip
COLORS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
TAGS: tuple[str, ...] = (
    "single_object", "two_object", "counting", "colors", "position", "color_attr",
)  # fmt: skip
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
# English plurals, understood besides GenEval's own (which only ever adds "s" or "es").
ENGLISH_PLURALS: dict[str, str] = {
    "sheep": "sheep", "sandwich": "sandwiches", "couch": "couches", "scissors": "scissors",
}  # fmt: skip

_CLASS_SET, _COLOR_SET = frozenset(CLASSES), frozenset(COLORS)
_NOUN = r"an? (?P<{0}>[a-z ]+?)"
_PATTERNS = (
    re.compile(r"(?P<number>two|three|four) (?P<a>[a-z ]+)"),
    re.compile(
        _NOUN.format("a") + r" (?P<relation>left of|right of|above|below) " + _NOUN.format("b")
    ),
    re.compile(_NOUN.format("a") + r" and " + _NOUN.format("b")),
    re.compile(_NOUN.format("a")),
)


def with_article(noun: str) -> str:
    """The noun with "a" or "an", chosen by its first letter as GenEval does."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(name: str) -> str:
    """GenEval's plural: "es" after an s, else "s" ("buses", but also "sandwichs")."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def describe(metadata: Metadata) -> str:
    """The prompt of a GenEval record, written as GenEval writes it."""
    include = metadata["include"]
    first = include[0]
    if first["count"] > 1:
        return f"a photo of {NUMBERS[first['count']]} {plural(first['class'])}"
    nouns = [with_article(f"{c.get('color', '')} {c['class']}".strip()) for c in include]
    if metadata["tag"] == "position":
        return f"a photo of {nouns[1]} {include[1]['position'][0]} {nouns[0]}"
    return f"a photo of {' and '.join(nouns)}"


def record(
    tag: str,
    classes: tuple[str, ...],
    *,
    colors: tuple[str, ...] = (),
    count: int = 1,
    relation: str | None = None,
) -> Metadata:
    """A GenEval record. For `position`, `classes` is (subject, target) in prompt order."""
    include: list[dict[str, Any]] = [{"class": c, "count": count} for c in classes]
    for clause, color in zip(include, colors, strict=False):
        clause["color"] = color
    metadata: Metadata = {"tag": tag, "include": include}
    if relation is not None:
        include.reverse()
        include[1]["position"] = [relation, 0]
    if tag == "counting":
        metadata["exclude"] = [{"class": classes[0], "count": count + 1}]
    metadata["prompt"] = describe(metadata)
    return metadata


def parse(prompt: str) -> Metadata:
    """GenEval metadata of a prompt of the grammar; the inverse of `describe`.

    Case, spare spaces, a missing "a photo of" and a final stop are forgiven.

    Raises:
        steering.errors.OptionError: the prompt is outside the grammar.
    """
    text = " ".join(prompt.lower().split()).rstrip(" .")
    text = text.removeprefix("a photo of ")
    for pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match:
            return _read(prompt, match.groupdict())
    raise _outside(prompt, "it matches none of the six templates")


def _read(prompt: str, parts: dict[str, str]) -> Metadata:
    if "number" in parts:
        count = next(n for n, word in NUMBERS.items() if word == parts["number"])
        return record("counting", (_singular(prompt, parts["a"]),), count=count)
    nouns = [_noun(prompt, parts[key]) for key in ("a", "b") if key in parts]
    names = tuple(name for name, _ in nouns)
    colors = tuple(color for _, color in nouns if color)
    if len(names) == 2 and names[0] == names[1]:
        raise _outside(prompt, f"it names the class {names[0]!r} twice")
    if "relation" in parts:
        if colors:
            raise _outside(prompt, "a position prompt carries no colours")
        return record("position", names, relation=parts["relation"])
    if len(names) == 1:
        return record("colors" if colors else "single_object", names, colors=colors)
    if len(colors) == 1:
        raise _outside(prompt, "colour both objects or neither")
    return record("color_attr" if colors else "two_object", names, colors=colors)


def _noun(prompt: str, text: str) -> tuple[str, str | None]:
    """(class, colour or None); "orange" alone is the fruit."""
    if text in _CLASS_SET:
        return text, None
    color, _, name = text.partition(" ")
    if color in _COLOR_SET and name in _CLASS_SET:
        return name, color
    raise _outside(prompt, _unknown(name if color in _COLOR_SET else text))


def _singular(prompt: str, text: str) -> str:
    for name in CLASSES:
        if text in (plural(name), ENGLISH_PLURALS.get(name)):
            return name
    raise _outside(prompt, _unknown(text))


def _unknown(text: str) -> str:
    near = difflib.get_close_matches(text, CLASSES, n=1)
    return f"{text!r} is not a sticker class" + (f" (did you mean {near[0]!r}?)" if near else "")


def _outside(prompt: str, why: str) -> Exception:
    from steering.errors import OptionError

    return OptionError(
        f"The sticker model cannot read {prompt!r}: {why}. Write 'a photo of ...' with one of: "
        "'a cat', 'a cat and a dog', 'three cats', 'a red cat', 'a cat left of a dog', "
        "'a red cat and a blue dog'; steering.stickers.CLASSES and COLORS list the words."
    )

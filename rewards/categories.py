"""What kind of thing a prompt asks for, and how much each reward is worth there.

The kinds are those of T2I-CompBench++ (Huang et al., 2023). `guess` looks for words; a file of
known categories is better where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from steering.errors import OptionError, unknown_name

CATEGORIES = (
    "color",
    "shape",
    "texture",
    "2d_spatial",
    "3d_spatial",
    "non_spatial",
    "numeracy",
    "complex",
)

CARINOX: dict[str, dict[str, float]] = {
    "color": {"HPS": 0.40, "ImageReward": 1.06, "DAscore": 1.41, "VQAScore": 1.14},
    "shape": {"HPS": 0.95, "ImageReward": 1.12, "DAscore": 1.00, "VQAScore": 0.92},
    "texture": {"HPS": 0.90, "ImageReward": 1.10, "DAscore": 1.07, "VQAScore": 0.93},
    "2d_spatial": {"HPS": 1.06, "ImageReward": 1.02, "DAscore": 0.82, "VQAScore": 1.10},
    "3d_spatial": {"HPS": 0.96, "ImageReward": 0.92, "DAscore": 0.68, "VQAScore": 1.43},
    "non_spatial": {"HPS": 1.01, "ImageReward": 0.96, "DAscore": 0.85, "VQAScore": 1.17},
    "numeracy": {"HPS": 1.02, "ImageReward": 1.05, "DAscore": 1.00, "VQAScore": 0.93},
    "complex": {"HPS": 0.67, "ImageReward": 1.05, "DAscore": 1.21, "VQAScore": 1.06},
    "overall": {"HPS": 0.59, "ImageReward": 0.94, "DAscore": 1.12, "VQAScore": 1.34},
}
"""Weights by correlation with human scores, per category (CARINOX, Kasaei et al., 2025,
arXiv 2509.17458, as released with its code under the MIT licence). No reward here computes the
column DAscore (Decompositional-Alignment-Score); one of yours of that name would be weighed."""

_NUMBERS = r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+"
_KINDS = {
    "3d_spatial": r"in front of|behind|hidden (?:by|behind)|in the back(?:ground)? of",
    "2d_spatial": (
        r"(?:to|on|at) the (?:left|right|top|bottom|side)|(?:left|right) of|on side of|"
        r"on top of|on the (?:top|bottom)|above|below|under(?:neath)?|beneath|next to|near|beside"
    ),
    "numeracy": rf"\b(?:{_NUMBERS})\b",
    "color": (
        r"red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y|gold(?:en)?|silver|"
        r"turquoise|violet|beige|colou?red"
    ),
    "shape": (
        r"round|square|rectangular|circular|oval|oblong|triangular|cub(?:ic|e)|spher(?:ical|e)|"
        r"cylindrical|conical|pyramidal|pentagonal|hexagonal|octagonal|diamond|teardrop|crescent|"
        r"curved|flat|big|small|large|tiny|tall|short|long|narrow|wide|thick|thin|huge|elongated"
    ),
    "texture": (
        r"wood(?:en)?|metal(?:lic)?|fluffy|rubber|plastic|fabric|glass|leather|ceramic|stone|"
        r"cotton|wool(?:en)?|silk|velvet|paper|concrete|furry|smooth|rough|soft|porcelain"
    ),
}
_PATTERNS = {
    kind: re.compile(pattern if kind == "numeracy" else rf"\b(?:{pattern})\b", re.IGNORECASE)
    for kind, pattern in _KINDS.items()
}
_ATTRIBUTES = ("color", "shape", "texture")


def guess(prompt: str) -> str:
    """The category of a prompt by its words.

    Attributes of two kinds, or an attribute with a relation or a number, make it "complex"; no
    word of any list makes it "non_spatial".
    """
    found = {kind: len(pattern.findall(prompt)) for kind, pattern in _PATTERNS.items()}
    attributes = [kind for kind in _ATTRIBUTES if found[kind]]
    relations = [k for k in ("3d_spatial", "2d_spatial", "numeracy") if found[k]]
    if len(attributes) > 1 and min(found[k] for k in attributes) >= 1:
        strongest = max(attributes, key=lambda k: found[k])
        rest = sum(found[k] for k in attributes) - found[strongest]
        return strongest if found[strongest] > rest and not relations else "complex"
    if attributes and relations:
        return "complex"
    if relations:
        return relations[0]
    return attributes[0] if attributes else "non_spatial"


def mixture(entry: Any) -> list[tuple[str, float]]:  # noqa: ANN401
    """(category, share) pairs of a category's name or of a list of [name, weight].

    Raises:
        OptionError: anything else, or shares that do not add up to something above zero.
    """
    pairs = [(entry, 1.0)] if isinstance(entry, str) else entry
    try:
        found = [(str(name), float(share)) for name, share in pairs]
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"A category is a name or a list of [name, share]; got {entry!r}."
        ) from error
    total = sum(share for _, share in found)
    if total <= 0 or any(share < 0 for _, share in found):
        raise OptionError(f"The shares of {entry!r} must not be negative, nor all zero.")
    return [(name, share / total) for name, share in found]


def weight_of(
    table: Mapping[str, Mapping[str, float]],
    entry: Any,  # noqa: ANN401
    column: str,
) -> float:
    """The weight of one reward for a category or a mixture of them.

    Raises:
        OptionError: a category or a reward that the table does not have.
    """
    total = 0.0
    for category, share in mixture(entry):
        if category not in table:
            raise unknown_name("category of the weight table:", category, table)
        if column not in table[category]:
            raise unknown_name(f"reward in the weights of {category!r}:", column, table[category])
        total += share * float(table[category][column])
    return total

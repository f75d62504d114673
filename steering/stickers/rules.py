"""What a GenEval record demands of the objects in an image (Ghosh et al., 2023, section 3).

Pure rules: boxes and colours in, a verdict with its reasons out. Which detections count as objects
(thresholds) is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
ColorOf = Callable[[str, int], str]
MARGIN = 0.1  # dead zone of a position, in units of the two objects' summed sizes


@dataclass(frozen=True, kw_only=True)
class Part:
    """One demand: ``rule`` is "count", "color", "position" or "exclude"; ``reason`` if not met."""

    rule: str
    name: str
    passed: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether all demands are met; ``reason`` lists those that are not, or says "correct"."""

    correct: bool
    reason: str
    parts: tuple[Part, ...]


def decide(
    record: Mapping[str, Any],
    boxes: Mapping[str, Sequence[Box]],
    color_of: ColorOf,
    *,
    margin: float = MARGIN,
) -> Decision:
    """The verdict on an image.

    Every ``include`` clause needs its count; colour and position are asked of the most certain
    objects, as many as the clause names. A position is looked at only where count and colour
    hold, and fails where the clause it refers to did. An ``exclude`` clause fails at its count.

    Args:
        record: GenEval metadata.
        boxes: (x1, y1, x2, y2) by class, most certain first.
        color_of: the colour of object k of a class; asked only where a clause names a colour.
        margin: dead zone of positions.
    """
    parts: list[Part] = []
    groups: list[list[Box] | None] = []
    for clause in record["include"]:
        found = _include(clause, record, boxes, color_of, groups, margin)
        parts += found
        group = list(boxes.get(clause["class"], ())[: clause["count"]])
        groups.append(group if all(p.passed for p in found) else None)
    for clause in record.get("exclude", ()):
        name, seen = clause["class"], len(boxes.get(clause["class"], ()))
        reason = f"found {seen} {name}, {clause['count']} are too many"
        parts.append(_part("exclude", name, "" if seen < clause["count"] else reason))
    wrong = [p.reason for p in parts if not p.passed]
    return Decision(correct=not wrong, reason="; ".join(wrong) or "correct", parts=tuple(parts))


def _include(
    clause: Mapping[str, Any],
    record: Mapping[str, Any],
    boxes: Mapping[str, Sequence[Box]],
    color_of: ColorOf,
    groups: Sequence[list[Box] | None],
    margin: float,
) -> list[Part]:
    name, count = clause["class"], clause["count"]
    group = boxes.get(name, ())[:count]
    if len(group) < count:
        return [_part("count", name, f"found {len(group)} of {count} {name}")]
    parts = [_part("count", name, "")]
    if "color" in clause:
        wrong = [c for k in range(count) if (c := color_of(name, k)) != clause["color"]]
        reason = f"{name} is {wrong[0]}, not {clause['color']}" if wrong else ""
        parts.append(_part("color", name, reason))
    if "position" in clause and parts[-1].passed:
        relation, target = clause["position"]
        other = record["include"][target]["class"]
        reason = _misplaced(group, relation, groups[target], margin)
        reason = reason and reason.format(name=name, relation=relation, other=other)
        parts.append(_part("position", name, reason))
    return parts


def _misplaced(
    group: Sequence[Box], relation: str, targets: Sequence[Box] | None, margin: float
) -> str:
    """What is wrong with a group's place, to be filled in; empty if nothing."""
    if targets is None:
        return "no {other} for {name} to be {relation}"
    pairs = ((box, target) for box in group for target in targets)
    if all(relation in relations(*pair, margin) for pair in pairs):
        return ""
    return "{name} is not {relation} {other}"


def relations(box: Box, target: Box, margin: float = MARGIN) -> set[str]:
    """The relations `box` has to `target` (GenEval's relative_position; y points down)."""
    a, b = (np.asarray(x, np.float64).reshape(2, 2) for x in (box, target))
    offset = a.mean(0) - b.mean(0)
    dead = margin * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - dead, 0.0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    # By the whole offset, not the shortened one: this is what makes diagonals count less.
    dx, dy = beyond / np.linalg.norm(offset)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def _part(rule: str, name: str, reason: str) -> Part:
    return Part(rule=rule, name=name, passed=not reason, reason=reason)

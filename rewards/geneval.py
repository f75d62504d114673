"""GenEval's verdict on one image, without a model (Ghosh et al., 2023; the published script).

`judge` turns detections into objects by the published thresholds and asks the rules; the clauses
themselves are in `steering.stickers.rules`, which the sticker judge shares. `read_prompts` opens a
file of records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.errors import OptionError, unknown_name
from steering.stickers.grammar import COLORS, RELATIONS, TAGS, Metadata
from steering.stickers.rules import MARGIN, Box, Decision, Part, decide, relations

__all__ = [
    "CLASSES", "COLORS", "PUBLISHED", "TAGS", "Box", "Objects", "Part", "Rules", "Verdict",
    "check_prompted", "check_record", "judge", "read_prompts", "relations",
]  # fmt: skip

Objects = Mapping[str, Sequence[tuple[Box, float]]]
Verdict = Decision

# COCO's 80 classes in their order, three renamed by GenEval (mouse, remote, keyboard).
CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which detections count; the defaults are the published ones.

    Attributes:
        threshold: a score must exceed it.
        counting_threshold: the same for prompts of the tag "counting".
        max_objects: most objects of one class, the most certain ones.
        max_overlap: IoU above which the less certain of two boxes of a class goes; 1 keeps all.
        margin: dead zone of positions, in units of the two objects' summed sizes.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    margin: float = MARGIN

    def keep(self, found: Sequence[tuple[Box, float]], tag: str) -> list[int]:
        """Indices of the detections of one class that count, most certain first."""
        least = self.counting_threshold if tag == "counting" else self.threshold
        order = sorted(range(len(found)), key=lambda k: -found[k][1])
        order = [k for k in order if found[k][1] > least][: self.max_objects]
        if self.max_overlap >= 1:
            return order
        kept: list[int] = []
        for k in order:
            if all(_overlap(found[k][0], found[j][0]) < self.max_overlap for j in kept):
                kept.append(k)
        return kept


PUBLISHED = Rules()


def judge(
    metadata: Metadata,
    objects: Objects,
    color_of: Callable[[str, int], str],
    *,
    rules: Rules = PUBLISHED,
) -> Verdict:
    """Whether an image shows what its record asks for.

    Args:
        metadata: a GenEval record (tag, include, exclude).
        objects: all detections by class: ((x1, y1, x2, y2) in px, score), in any order.
        color_of: the colour of ``objects[name][k]``, called as color_of(name, k) and only for
            objects whose colour is asked for.
        rules: thresholds, the published ones unless given.

    Returns:
        Verdict(correct, reason, parts): the reason in words and every demand on its own.

    Raises:
        OptionError: the record is no GenEval record.
    """
    check_record(metadata)
    kept = {name: rules.keep(found, metadata["tag"]) for name, found in objects.items()}
    boxes = {name: [objects[name][k][0] for k in rows] for name, rows in kept.items()}
    return decide(
        metadata, boxes, lambda name, k: color_of(name, kept[name][k]), margin=rules.margin
    )


def check_record(record: object, where: str = "record") -> Metadata:
    """The record itself, proven to be one of GenEval's.

    Raises:
        OptionError: says what is wrong, and where.
    """
    if not isinstance(record, dict) or not isinstance(record.get("tag"), str):
        raise OptionError(f"{where}: not a GenEval record (an object with tag, include, prompt).")
    include, exclude = record.get("include"), record.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        raise OptionError(f"{where}: 'include' must be a list with one clause or more.")
    if record["tag"] not in TAGS:
        raise unknown_name(f"tag in {where}", record["tag"], TAGS)
    for k, clause in enumerate([*include, *exclude]):
        _check_clause(clause, min(k, len(include)), where)
    return record


def check_prompted(record: object, where: str = "record") -> Metadata:
    """The record itself, proven to be one of GenEval's and to say its prompt.

    Raises:
        OptionError: says what is wrong, and where.
    """
    found = check_record(record, where)
    if not isinstance(found.get("prompt"), str) or not found["prompt"].strip():
        raise OptionError(f"{where}: the record has no prompt.")
    return found


def _check_clause(clause: Any, before: int, where: str) -> None:  # noqa: ANN401
    """Raises unless this is a clause that refers only to the ``before`` ones in front of it."""
    count = clause.get("count") if isinstance(clause, dict) else None
    if not isinstance(count, int) or count < 1 or not isinstance(clause.get("class"), str):
        raise OptionError(f"{where}: a clause needs a class and a count of 1 or more: {clause!r}.")
    if "color" in clause and clause["color"] not in COLORS:
        raise unknown_name(f"colour in {where}", clause["color"], COLORS)
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, list | tuple) or len(position) != 2:
            raise OptionError(f"{where}: a position is [relation, clause], got {position!r}.")
        relation, target = position
        if relation not in RELATIONS:
            raise unknown_name(f"relation in {where}", relation, RELATIONS)
        if not isinstance(target, int) or not 0 <= target < before:
            raise OptionError(f"{where}: a position must refer to an earlier clause: {clause!r}.")


def read_prompts(path: str | Path) -> list[Metadata]:
    """The records of a JSON lines file such as GenEval's evaluation_metadata.jsonl.

    Raises:
        OptionError: no such file, or a line that is no record; names the line.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise OptionError(f"{file}: no such prompts file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            records.append(check_prompted(json.loads(line), where))
        except json.JSONDecodeError as error:
            hint = " The file seems to be cut off." if not text.endswith("\n") else ""
            raise OptionError(f"{where}: not a JSON object ({error}).{hint}") from None
    if not records:
        raise OptionError(f"{file}: the file holds no prompts.")
    return records


def _overlap(a: Box, b: Box) -> float:
    """IoU with GenEval's pixel areas, where a box holds its last row and column."""
    area = lambda x: max(x[2] - x[0] + 1, 0) * max(x[3] - x[1] + 1, 0)  # noqa: E731
    both = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return both / (area(a) + area(b) - both)

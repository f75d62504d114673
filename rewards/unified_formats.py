"""What the UnifiedReward models are asked, and how their answers are read.

The forms of the answers are those of the published checkpoints. The questions ask for these forms
in words of our own; the wording that a checkpoint was tuned on can be given as a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from steering.rewards.chat import Reply, expected_number
from steering.rewards.vlm import json_object, number

_NUMBER = r"\s*\**\s*(\d+(?:\.\d+)?)"
FINAL = re.compile(r"Final Score:" + _NUMBER)
RANK = re.compile(r"Image ([12]) is better")
TIE = re.compile(r"images are equally good", re.IGNORECASE)
ANSWER = re.compile(r"<answer>\s*Image ([12]) is better\W*</answer>")
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
TOTAL = re.compile(r"Image ([12]):[^\n=]*=\s*(\d+(?:\.\d+)?)")
WORD = re.compile(r"^\s*.+?\(.+?\):\s*([01])\s*$", re.MULTILINE)
ASPECTS = ("alignment", "coherence", "style")
NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an answer said: its number, NaN where it cannot be read, and details."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One form of question and answer.

    Attributes:
        question: with {prompt} in it.
        read: what an answer says; True asks for the probabilities behind its digits.
        parts: names of the details.
    """

    question: str
    read: Callable[[Reply, bool], Found]
    parts: tuple[str, ...] = ()


def final(reply: Reply, expected: bool) -> Found:
    """Version 1: a list of elements, each 0 or 1, and "Final Score: 4", from 1 to 5."""
    present = [float(v) for v in WORD.findall(reply.text)]
    share = sum(present) / len(present) if present else NAN
    return Found(value=_mark(reply, FINAL, expected), parts={"elements": share})


def aspects(reply: Reply, expected: bool) -> Found:
    """Version 1.5 and 2.0: "Alignment Score (1-5): 3.2", likewise Coherence and Style."""
    parts = {name: _mark(reply, _aspect(name), expected) for name in ASPECTS}
    return Found(value=sum(parts.values()) / len(parts), parts=parts)


def rank(reply: Reply, expected: bool) -> Found:
    """Version 1, two images: one is better, or both are equally good."""
    ranks, ties = list(RANK.finditer(reply.text)), list(TIE.finditer(reply.text))
    if ties and (not ranks or ties[-1].start() > ranks[-1].start()):
        return Found(value=0.5)
    return Found(value=_first_wins(reply, RANK, expected))


def shares(reply: Reply, expected: bool) -> Found:
    """Version 2.0, two images: for each aspect two numbers that sum to 1."""
    parts = {}
    for name in ASPECTS:
        lines = r"\**\s*Image 1:" + _NUMBER + r"\s*\**\s*Image 2:" + _NUMBER
        found = re.findall(name.title() + r" Score:" + lines, reply.text)
        first, second = (float(v) for v in found[-1]) if found else (NAN, NAN)
        fits = abs(first + second - 1) < 0.05  # False for NaN
        parts[name] = first / (first + second) if fits else NAN
    return Found(value=sum(parts.values()) / len(parts), parts=parts)


def think(reply: Reply, expected: bool) -> Found:
    """Think: reasons with marks in <think>, the verdict in <answer>, which alone decides."""
    totals = {k: float(v) for k, v in TOTAL.findall(reply.text)}
    whole = sum(totals.values())
    share = totals["1"] / whole if len(totals) == 2 and whole else NAN
    return Found(value=_first_wins(reply, ANSWER, expected), parts={"share": share})


def flex(reply: Reply, expected: bool) -> Found:
    """Flex: JSON with categories, marks of both images that sum to 10, and a winner."""
    data = json_object(reply.text)
    pairs = [_pair(dim) for dim in _dims(data)]
    share = sum(a / 10 for a, _ in pairs) / len(pairs) if pairs else NAN
    winner = re.fullmatch(r"\s*Image ([12])\s*", str(data.get("winner", "")))
    value = float(winner[1] == "1") if winner else NAN
    return Found(value=value, parts={"share": share})


def thoughts(text: str) -> str:
    """The chain of thought of an answer; "" where it has none."""
    found = THOUGHT.search(text)
    return found[1].strip() if found else ""


def _mark(reply: Reply, pattern: re.Pattern[str], expected: bool) -> float:
    if expected:
        return expected_number(reply, pattern, 1, 5)
    found = pattern.findall(reply.text)
    mark = float(found[-1]) if found else NAN
    return mark if 1 <= mark <= 5 else NAN


def _first_wins(reply: Reply, pattern: re.Pattern[str], expected: bool) -> float:
    """1 where image 1 is better, 0 where image 2 is; in between by the digit's probability."""
    if expected:
        return 2.0 - expected_number(reply, pattern, 1, 2)
    found = pattern.findall(reply.text)
    return 2.0 - float(found[-1]) if found else NAN


def _aspect(name: str) -> re.Pattern[str]:
    return re.compile(name.title() + r" Score \(1-5\):" + _NUMBER)


def _dims(data: dict[str, Any]) -> list[Any]:
    groups = data.get("categories")
    groups = groups if isinstance(groups, list) else []
    return [d for g in groups if isinstance(g, dict) for d in g.get("dims") or []]


def _pair(dim: Any) -> tuple[float, float]:  # noqa: ANN401
    """The marks of one sub-dimension, NaN where they do not sum to 10."""
    marks = dim if isinstance(dim, dict) else {}
    first, second = number(marks.get("score_1")), number(marks.get("score_2"))
    return (first, second) if abs(first + second - 10) < 0.5 else (NAN, NAN)


_CAPTION = "\nThe caption: [{prompt}]"
_TWO = "Compare two images, Image 1 and Image 2, that were generated from one caption. "

POINT = {
    "final": Format(
        question="Judge an image that was generated from a caption, by its alignment with the "
        "caption and by its overall quality. List the key elements of the caption, one a line, "
        "as 'element (type): value', with value=1 for those that the image shows and value=0 for "
        "the others. Then give one score from 1 to 5 behind 'Final Score:'." + _CAPTION,
        read=final,
        parts=("elements",),
    ),
    "acs": Format(
        question="Judge an image that was generated from a caption, with three scores from 1 to "
        "5. Alignment: does it show what the caption says? Coherence: is it consistent, without "
        "glitches and distorted objects? Style: how appealing does it look, whatever the caption "
        "says? Answer in this form:\n\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\n"
        "Style Score (1-5): Z\n" + _CAPTION,
        read=aspects,
        parts=ASPECTS,
    ),
}
PAIR = {
    "rank": Format(
        question=_TWO + "Consider their alignment with the caption and their visual quality. "
        'End with one of: "Image 1 is better than Image 2.", "Image 2 is better than Image 1." '
        'or "Both images are equally good."' + _CAPTION,
        read=rank,
    ),
    "shares": Format(
        question=_TWO + "For alignment with the caption, for coherence and for style, divide 1.0 "
        "between the images: the better one gets the larger share. Answer in this form:\n\n"
        + "\n\n".join(f"{a.title()} Score:\n Image 1: X\n Image 2: Y" for a in ASPECTS)
        + "\n"
        + _CAPTION,
        read=shares,
        parts=ASPECTS,
    ),
    "think": Format(
        question=_TWO + "Within <think> and </think> reason step by step: mark both images from "
        "1 to 10 in semantic consistency, aesthetics, authenticity and whatever else matters, "
        "each as 'Image 1 (8/10) - why; Image 2 (6/10) - why', then add the marks up as 'Image 1: "
        "8+7=15' and 'Image 2: 6+8=14'. After that write exactly <answer>Image 1 is better"
        "</answer> or <answer>Image 2 is better</answer>." + _CAPTION,
        read=think,
        parts=("share",),
    ),
    "flex": Format(
        question=_TWO + "Choose sub-dimensions that tell them apart in three categories: semantic "
        "alignment and accuracy, image quality and realism, aesthetics and artistry; add one of "
        "your own if the caption calls for it. In every sub-dimension the marks of the two "
        'images sum to 10. Answer with one JSON object: {"prompt": ..., "categories": [{"name": '
        '..., "dims": [{"name": ..., "reason_1": ..., "reason_2": ..., "score_1": 0-10, '
        '"score_2": 0-10}], "cat_reason": ..., "cat_winner": "Image 1/2"}], "reason": ..., '
        '"winner": "Image 1/2"}' + _CAPTION,
        read=flex,
        parts=("share",),
    ),
}

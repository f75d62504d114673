"""Asking a vision-language model: questions, answers, and numbers read off its probabilities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

YES = ("Yes", "yes", " Yes", " yes", "YES")
NO = ("No", "no", " No", " no", "NO")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """One question about some images [3, H, W] in [0, 1], in the order it speaks of them."""

    text: str
    images: tuple[Tensor, ...]
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model wrote.

    Attributes:
        text: without special tokens.
        tokens: its pieces, where the model gives them.
        top: for each piece, the log-probabilities of the likeliest pieces at that place.
    """

    text: str
    tokens: tuple[str, ...] = ()
    top: tuple[Mapping[str, float], ...] = ()


class Chat(Protocol):
    """A model that can be asked."""

    def choices(self, asks: Sequence[Ask], labels: Sequence[Sequence[str]]) -> Tensor:
        """Log-probabilities [n, k] that an answer begins with label k, in any of its spellings."""
        ...

    def write(
        self, asks: Sequence[Ask], max_new_tokens: int, *, probabilities: bool = True
    ) -> list[Reply]:
        """Greedy answers, with ``tokens`` and ``top`` where probabilities are asked for."""
        ...


def digits(low: int, high: int) -> list[tuple[str, str]]:
    """The spellings of the numbers low to high (at most 9): one token each in common models."""
    return [(str(k), f" {k}") for k in range(low, high + 1)]


def expected_number(reply: Reply, pattern: re.Pattern[str], low: int, high: int) -> float:
    """The last number in group 1 of `pattern`, with its first digit averaged over the model.

    The digit d counts by its probability among the digits low to high, ``sum p(d) (d + rest)``,
    where rest is what the model wrote behind the point. Less coarse than the written number, and
    equal to it where the model is sure.

    Returns:
        NaN where the pattern is not found, or the reply has no probabilities there.
    """
    spelled = "".join(reply.tokens)
    places = list(pattern.finditer(spelled))
    found = places[-1] if places else None
    if found is None or len(reply.top) != len(reply.tokens):
        return math.nan
    at = end = 0
    for k, token in enumerate(reply.tokens):
        end += len(token)
        if end > found.start(1):
            at = k
            break
    weights: dict[int, float] = {}
    for token, logp in reply.top[at].items():
        word = token.strip()
        if word.isascii() and word.isdigit() and low <= int(word) <= high:
            weights[int(word)] = weights.get(int(word), 0.0) + math.exp(logp)
    total = sum(weights.values())
    if not total:
        return math.nan
    rest = float(found[1]) % 1.0
    mean = sum(d * p for d, p in weights.items()) / total
    return min(max(mean + rest, low), high)

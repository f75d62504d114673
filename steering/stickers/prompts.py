"""Which prompts are asked: the training mix, held-out pairs and fixed evaluation lists."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np

from steering.stickers.grammar import CLASSES, COLORS, NUMBERS, RELATIONS, TAGS, Metadata, record

# GenEval's 553 prompts by tag, and the share of each tag in training.
GENEVAL_MIX: dict[str, int] = dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))
TRAINING_MIX: dict[str, float] = dict(zip(TAGS, (0.12, 0.20, 0.20, 0.13, 0.17, 0.18), strict=True))
HELDOUT_SHARE = 8  # one pair of classes in this many is never trained on
SPLITS = ("train", "heldout", "all")


def is_heldout(a: str, b: str) -> bool:
    """Whether the unordered pair of classes is kept out of training (a stable hash)."""
    pair = "+".join(sorted((a, b))).encode()
    return hashlib.sha256(pair).digest()[0] % HELDOUT_SHARE == 0


def pairs(split: str) -> list[tuple[str, str]]:
    """The unordered pairs of classes of a split."""
    if split not in SPLITS:
        from steering.errors import OptionError

        raise OptionError(f"split={split!r} is unknown. Use one of {SPLITS}.")
    every = combinations(CLASSES, 2)
    return [p for p in every if split == "all" or is_heldout(*p) == (split == "heldout")]


_PAIRS: dict[str, list[tuple[str, str]]] = {}


def sample_metadata(
    rng: np.random.Generator, *, split: str = "train", tag: str | None = None
) -> Metadata:
    """One record; its tag from the training mix unless given."""
    if split not in _PAIRS:
        _PAIRS[split] = pairs(split)
    if tag is None:
        tag = TAGS[int(np.searchsorted(_CUMULATIVE, rng.random(), side="right"))]
    first = CLASSES[rng.integers(len(CLASSES))]
    if tag == "single_object":
        return record(tag, (first,))
    if tag == "counting":
        return record(tag, (first,), count=int(rng.integers(min(NUMBERS), max(NUMBERS) + 1)))
    if tag == "colors":
        return record(tag, (first,), colors=(COLORS[rng.integers(len(COLORS))],))
    pair = _PAIRS[split][rng.integers(len(_PAIRS[split]))]
    names = pair if rng.random() < 0.5 else pair[::-1]
    if tag == "two_object":
        return record(tag, names)
    if tag == "position":
        return record(tag, names, relation=RELATIONS[rng.integers(len(RELATIONS))])
    i, j = rng.choice(len(COLORS), 2, replace=False)
    return record(tag, names, colors=(COLORS[i], COLORS[j]))


_CUMULATIVE = np.cumsum(list(TRAINING_MIX.values()))[:-1]


def prompts(split: str = "heldout", n: int = 120, seed: int = 0) -> list[str]:
    """A fixed list of `n` prompts in GenEval's tag mix, tags in GenEval's order.

    Prompts repeat only when a tag has no unused one left. Single-object tags have no pair, so
    nothing can be held out there.
    """
    rng = np.random.default_rng(seed)
    total = sum(GENEVAL_MIX.values())
    ends = np.round(np.cumsum(list(GENEVAL_MIX.values())) * n / total).astype(int)
    out: list[str] = []
    for tag, end in zip(TAGS, ends, strict=True):
        seen: set[str] = set()
        while len(out) < end:
            prompt = _fresh(rng, split, tag, seen)
            seen.add(prompt)
            out.append(prompt)
    return out


def _fresh(rng: np.random.Generator, split: str, tag: str, seen: set[str]) -> str:
    for _ in range(1000):
        prompt = sample_metadata(rng, split=split, tag=tag)["prompt"]
        if prompt not in seen:
            break
    return prompt

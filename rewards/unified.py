"""UnifiedReward (Wang et al., 2025): marks for one image, or verdicts on two in both orders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.base import register
from steering.rewards.chat import Ask, Reply
from steering.rewards.images import need_text
from steering.rewards.unified_formats import PAIR, POINT, Format, Found, thoughts
from steering.rewards.vlm import Judge
from steering.rewards.wire import RemoteError
from steering.scoring import Scores

_MODEL = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"


@dataclass(frozen=True, kw_only=True)
class _Unified(Judge):
    """Options that both rewards share.

    Attributes:
        read: "text" takes the numbers as written, "expected" averages the deciding digit over
            the model's probabilities.
        template: a text file with {prompt} in it, to ask as the checkpoint's authors do.
        max_new_tokens: of an answer.
    """

    differentiable: ClassVar[bool] = False
    licence: ClassVar[str] = "MIT (code); weights: their model card"
    memory: ClassVar[str] = "18 GB (8B, bf16)"

    model: str = _MODEL
    read: Literal["text", "expected"] = "text"
    template: str | None = None
    max_new_tokens: int = 2048

    def _check(self, form: str, known: Mapping[str, Format]) -> None:
        if form not in known:
            raise OptionError(f"{self.name}(form={form!r}): give one of {', '.join(known)}.")
        if self.read not in ("text", "expected"):
            raise OptionError(f"{self.name}(read={self.read!r}): give text or expected.")
        if self.template is not None:
            path = Path(self.template)
            if not path.is_file() or "{prompt}" not in path.read_text():
                raise OptionError(
                    f"{self.name}(template={self.template!r}) must be a text file with "
                    "{prompt} in it."
                )

    def _question(self, known: Format, prompt: str) -> str:
        text = known.question if self.template is None else Path(self.template).read_text()
        return text.replace("{prompt}", prompt)

    def _found(
        self, known: Format, asks: Sequence[Ask]
    ) -> tuple[list[Found], list[Reply | None], RemoteError | None]:
        expected = self.read == "expected"
        replies, error = self._write(asks, self.max_new_tokens, probabilities=expected)
        lost = Found(value=math.nan)
        return [lost if r is None else known.read(r, expected) for r in replies], replies, error


@register("unified")
@dataclass(frozen=True, kw_only=True)
class Unified(_Unified):
    """UnifiedReward's marks for one image: the mean of its aspects, 1 to 5.

    Parts: one per aspect, and ``parsed``. Notes: ``reply``.

    Attributes:
        form: "acs" for version 1.5 and 2.0 (alignment, coherence, style), "final" for version 1.
    """

    hub_id: ClassVar[str] = _MODEL
    value_range: ClassVar[str] = "1 to 5"

    form: Literal["acs", "final"] = "acs"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.form, POINT)

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Marks [n]."""
        known = POINT[self.form]
        asks = [
            Ask(text=self._question(known, prompt), images=(image,))
            for image, prompt in zip(images, need_text(prompts, self.name), strict=True)
        ]
        found, replies, error = self._found(known, asks)
        parts = {
            name: torch.tensor([f.parts.get(name, math.nan) for f in found], device=images.device)
            for name in known.parts
        }
        notes = {"reply": [r.text if r else "" for r in replies]}
        value = torch.tensor([f.value for f in found], device=images.device)
        return self._finish(value, 1.0, parts, notes, error)


@register("unified_pairs")
@dataclass(frozen=True, kw_only=True)
class UnifiedPairs(_Unified):
    """UnifiedReward's verdicts on pairs: the share of images of the same prompt that one beats.

    Every pair is shown in both orders and counts the mean, since these models favour a position
    (part ``bias``: how much more often the image shown first won than by chance, 0 if never).
    The value of an image depends on its rivals in the call: a rate to rank by, no weight for a
    particle method.

    Parts: ``parsed``, the share of readable comparisons; ``bias``; details of the form. Notes:
    ``replies`` and, with "think", ``thoughts``: the chains of thought.

    Attributes:
        form: "shares" (version 2.0), "rank" (version 1), "think" or "flex".
        opponents: images that each is compared with, its neighbours in a ring (an odd number is
            rounded up); None takes all.
    """

    hub_id: ClassVar[str] = f"{_MODEL}; -Think-, -Flex-"
    value_range: ClassVar[str] = "0 to 1"
    stationary: ClassVar[bool] = False

    form: Literal["shares", "rank", "think", "flex"] = "shares"
    opponents: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.form, PAIR)
        if self.opponents is not None and self.opponents < 1:
            raise OptionError(f"unified_pairs(opponents={self.opponents}): give 1 or more.")
        if self.read == "expected" and self.form in ("shares", "flex"):
            raise OptionError(
                f"unified_pairs(form={self.form}, read=expected): this form has no deciding digit "
                "whose probability could be read; use read=text, or form=rank or think."
            )
        if self.form in ("think", "flex") and self.model == _MODEL and not self.url:
            raise OptionError(
                f"unified_pairs(form={self.form}) needs a UnifiedReward-{self.form.title()} "
                f"checkpoint, which {_MODEL} is not; give model=."
            )

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Win rates [n] among the images of one prompt.

        Raises:
            OptionError: an image without another of its prompt.
        """
        known, texts = PAIR[self.form], need_text(prompts, self.name)
        pairs = [(a, b) for a, b in self._pairs(texts) for a, b in ((a, b), (b, a))]
        asks = [
            Ask(text=self._question(known, texts[a]), images=(images[a], images[b]))
            for a, b in pairs
        ]
        found, replies, error = self._found(known, asks)
        table = _Table(len(images), known.parts)
        for k in range(0, len(pairs), 2):
            table.add(*pairs[k], found[k], found[k + 1])
        value, parts = table.columns(images.device)
        parsed = parts.pop("parsed")
        scores = self._finish(value, 0.0, parts, _notes(pairs, replies, len(images)), error)
        return Scores(
            value=scores.value,
            parts={**scores.parts, "parsed": parsed},
            valid=scores.valid,
            notes=scores.notes,
        )

    def _pairs(self, prompts: Sequence[str]) -> list[tuple[int, int]]:
        """Pairs of rows of one prompt, each once."""
        groups: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt].append(row)
        found = []
        for prompt, rows in groups.items():
            n = len(rows)
            if n < 2:
                raise OptionError(
                    "unified_pairs compares the images of one prompt with each other, and "
                    f"{prompt[:60]!r} has a single one in this call."
                )
            reach = n // 2 if self.opponents is None else min((self.opponents + 1) // 2, n // 2)
            ring = {
                tuple(sorted((i, (i + step) % n)))
                for i in range(n)
                for step in range(1, reach + 1)
            }
            found += [(rows[i], rows[j]) for i, j in sorted(ring)]
        return found


class _Table:
    """Comparisons as they come in, and the means per image."""

    def __init__(self, n: int, names: Sequence[str]) -> None:
        self.n = n
        self.rows: dict[str, list[list[float]]] = {
            name: [[] for _ in range(n)] for name in ("value", "parsed", "bias", *names)
        }

    def add(self, a: int, b: int, straight: Found, swapped: Found) -> None:
        """One pair: the answer with a shown first, and that with b shown first."""
        wins = (straight.value + 1 - swapped.value) / 2
        self._put("value", a, b, wins)
        good = float(not math.isnan(wins))
        self.rows["parsed"][a].append(good)
        self.rows["parsed"][b].append(good)
        bias = straight.value + swapped.value - 1
        self.rows["bias"][a].append(bias)
        self.rows["bias"][b].append(bias)
        for name in straight.parts:
            share = (straight.parts[name] + 1 - swapped.parts.get(name, math.nan)) / 2
            self._put(name, a, b, share)

    def _put(self, name: str, a: int, b: int, share: float) -> None:
        self.rows[name][a].append(share)
        self.rows[name][b].append(1 - share)

    def columns(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """(win rates, everything else) [n]; unreadable comparisons are left out of a mean."""
        found = {
            name: torch.stack([torch.tensor(v).nanmean() for v in rows]).to(device)
            for name, rows in self.rows.items()
        }
        return found.pop("value"), found


def _notes(
    pairs: Sequence[tuple[int, int]], replies: Sequence[Reply | None], n: int
) -> dict[str, list[str]]:
    """Per image the answers on it, those with it shown first before the others."""
    said: list[list[str]] = [[] for _ in range(n)]
    thought: list[list[str]] = [[] for _ in range(n)]
    for (a, b), reply in zip(pairs, replies, strict=True):
        text = reply.text if reply else ""
        for row in (a, b):
            said[row].append(f"[{a} against {b}] {text}")
            if chain := thoughts(text):
                thought[row].append(f"[{a} against {b}] {chain}")
    notes = {"replies": ["\n\n".join(s) for s in said]}
    if any(thought):
        notes["thoughts"] = ["\n\n".join(t) for t in thought]
    return notes

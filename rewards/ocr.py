"""Does a picture hold the text that its prompt asks for? RapidOCR reads it, weights included."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.base import Reward, register
from steering.rewards.images import to_pil
from steering.scoring import Scores

_QUOTED = re.compile("\"([^\"]+)\"|\N{LEFT DOUBLE QUOTATION MARK}(.+?)"
                     "\N{RIGHT DOUBLE QUOTATION MARK}|«(.+?)»")  # fmt: skip


@register("ocr")
@dataclass(frozen=True, kw_only=True)
class OCR(Reward):
    """How much of the text that the prompt puts in double quotes can be read in the picture.

    ``1 - min(d, L) / L`` with the edit distance d and the text's length L, without spaces and
    case; 1 where the text occurs within what was read (Flow-GRPO's reward; Liu et al., 2025).
    Beyond that reward, d is taken to the nearest line where that is less than to all lines
    together, and several quoted texts count their mean.

    Parts: ``distance``, summed over the texts; ``confidence``, the mean of what was read (NaN if
    nothing). Notes: ``read``.

    Attributes:
        text: to look for instead; ``metadata`` {"text": ...} per image goes before.
        within: whether other text around it costs nothing.
        max_side: px; larger pictures are reduced to look for text.
        threads: of one recogniser.

    Raises:
        OptionError: no text to look for, or RapidOCR is not installed.
    """

    differentiable: ClassVar[bool] = False
    hub_id: ClassVar[str] = "in the package rapidocr (PP-OCR)"
    licence: ClassVar[str] = "Apache-2.0"
    value_range: ClassVar[str] = "0 to 1"
    memory: ClassVar[str] = "0.3 GB, on the CPU"

    text: str = ""
    within: bool = True
    max_side: int = 960
    threads: int = 1

    def __post_init__(self) -> None:
        if self.max_side < 32 or self.threads < 1:
            raise OptionError("ocr: max_side must be 32 px or more and threads 1 or more.")

    def for_model(self, model: Any) -> OCR:  # noqa: ANN401
        """This reward, after a look at the model's prompts and with its weights loaded."""
        for prompt in getattr(model, "prompts", ()):
            self._targets(prompt, None)
        _engine(self.max_side, self.threads)
        return self

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Shares [n] of the text that can be read."""
        wanted = [
            self._targets(prompt, metadata[k] if metadata is not None else None)
            for k, prompt in enumerate(prompts)
        ]
        read = _engine(self.max_side, self.threads)
        rows, notes = [], []
        for picture, targets in zip(to_pil(images), wanted, strict=True):
            lines, confidence = read(picture)
            distances = [self._distance(_plain(t), lines) for t in targets]
            lengths = [len(_plain(t)) for t in targets]
            shares = [1 - min(d, n) / n for d, n in zip(distances, lengths, strict=True)]
            rows.append((sum(shares) / len(shares), float(sum(distances)), confidence))
            notes.append("\n".join(lines))
        value, distance, confidence = torch.tensor(rows, device=images.device).unbind(1)
        parts = {"distance": distance, "confidence": confidence}
        return Scores(value=value, parts=parts, notes={"read": notes})

    def _distance(self, target: str, lines: Sequence[str]) -> int:
        """To all that was read, or where other text is free to the nearest line."""
        whole = _plain("".join(lines))
        if not self.within:
            return edit_distance(target, whole)
        if target in whole:
            return 0
        return min(edit_distance(target, seen) for seen in (whole, *map(_plain, lines)))

    def _targets(self, prompt: Any, extra: Any) -> list[str]:  # noqa: ANN401
        """The texts to look for, each with at least one character that counts."""
        given = extra.get("text") if isinstance(extra, dict) else None
        if given or self.text:
            found = [str(given or self.text)]
        else:
            found = ["".join(groups) for groups in _QUOTED.findall(str(prompt))]
        found = [text for text in found if _plain(text)]
        if not found:
            raise OptionError(
                f"ocr looks for text in double quotes, and the prompt {str(prompt)[:60]!r} has "
                'none. Write it as in: a sign that says "open", or give text= or metadata with '
                '{"text": ...}.'
            )
        return found


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements that turn a into b."""
    row = np.arange(len(b) + 1)
    letters = np.array(list(b))
    steps = np.arange(len(b) + 1)
    for k, letter in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        # a run of insertions: the running minimum of best - position
        row = np.minimum.accumulate(np.concatenate([[k], best]) - steps) + steps
    return int(row[-1])


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


@lru_cache(maxsize=2)
def _engine(max_side: int, threads: int) -> Any:  # noqa: ANN401
    """A function from a PIL image to (lines, mean confidence); one call at a time."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise OptionError(
            "ocr needs rapidocr and onnxruntime: pip install 'diffusion-steering[rewards]'."
        ) from error
    run = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": max_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": threads,
        }
    )
    turn = threading.Lock()

    def read(picture: Any) -> tuple[list[str], float]:  # noqa: ANN401
        array = np.asarray(picture)[..., ::-1]  # it was trained on BGR
        with turn:
            found = run(np.ascontiguousarray(array))
        lines, scores = list(found.txts or ()), list(found.scores or ())
        return lines, sum(scores) / len(scores) if scores else float("nan")

    return read

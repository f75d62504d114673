"""A reward that runs in another process, on another machine: `steer serve-reward` is its server.

    POST /score   {"images": [PNG as base64, ...], "prompts": [...], "metadata": [...] or null}
              ->  {"value": [...], "parts": {...}, "valid": [...] or null, "notes": {...}}
    GET  /about   {"name", "spec", "licence", "value_range", "stationary", "limits": {...}}

JSON and PNG only. Numbers that JSON cannot hold travel as the words "nan", "inf" and "-inf".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.base import Reward, register
from steering.rewards.wire import RemoteError, Wire, base64_png, in_order
from steering.scoring import Scores

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@register("remote")
@dataclass(frozen=True, kw_only=True)
class RemoteReward(Reward):
    """A reward served over HTTP by `steer serve-reward`; images travel as PNG, exact to 8 bits.

    Requests run ``concurrency`` at a time and answers keep their order. A broken connection, a
    time-out or a busy server is tried again ``retries`` times. If the server dies for good,
    `RemoteError.scores` has what was finished, and the next call with the same images asks for
    the rest only.

    Attributes:
        url: the server's address.
        batch_size: images in one request.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        retries: further tries of a request.
        pause: seconds before the first retry, then doubled up to 8.
        max_bytes: of one request.

    Raises:
        RemoteError: no answer, a refusal, or an answer that is none.
        OptionError: a request over ``max_bytes``.
    """

    differentiable: ClassVar[bool] = False
    hub_id: ClassVar[str] = "on the server"
    licence: ClassVar[str] = "the served reward's"
    value_range: ClassVar[str] = "the served reward's"
    memory: ClassVar[str] = "none here"

    url: str = "http://127.0.0.1:8000"
    batch_size: int = 16
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 3
    pause: float = 0.5
    max_bytes: int = 64 * 2**20
    _kept: dict[str, dict[str, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self._wire()
        if self.batch_size < 1 or self.concurrency < 1:
            raise OptionError("remote: batch_size and concurrency must be 1 or more.")

    def _wire(self) -> Wire:
        return Wire(
            url=self.url,
            timeout=self.timeout,
            retries=self.retries,
            pause=self.pause,
            max_bytes=self.max_bytes,
        )

    def about(self) -> dict[str, Any]:
        """What the server says of its reward and its limits."""
        found = self._wire().get("/about")
        if not isinstance(found, dict) or "name" not in found:
            raise RemoteError(f"{self.url} is no reward server: {str(found)[:200]}")
        return found

    def for_model(self, model: Any) -> RemoteReward:  # noqa: ANN401
        """This reward, after the server has answered.

        One that compares the images of a call is no law for a particle method here either, and
        gets each call in one request.
        """
        object.__setattr__(self, "stationary", bool(self.about().get("stationary", True)))
        return self

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """The server's scores [n], in order."""
        rows = [
            {
                "image": base64_png(image),
                "prompt": prompt,
                "metadata": None if metadata is None else metadata[k],
            }
            for k, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        ]
        keys = [_key(row) for row in rows]
        open_rows = [k for k, key in enumerate(keys) if key not in self._kept]
        step = self.batch_size if self.stationary else len(rows)
        parts = [open_rows[k : k + step] for k in range(0, len(open_rows), step)]
        answers, error = in_order(
            lambda part: self._ask([rows[k] for k in part]), parts, self.concurrency
        )
        found: list[dict[str, Any] | None] = [self._kept.get(key) for key in keys]
        for part, answer in zip(parts, answers, strict=True):
            for k, one in zip(part, answer or [], strict=bool(answer)):
                found[k] = one
        if error is not None:
            self._kept.update({key: one for key, one in zip(keys, found, strict=True) if one})
            if isinstance(error, RemoteError):
                error.scores = _joined(found, images.device)
            raise error
        for key in keys:
            self._kept.pop(key, None)
        return _joined(found, images.device)

    def _ask(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One request: per image its value, valid, parts and notes."""
        extra = [row["metadata"] for row in rows]
        body = {
            "images": [row["image"] for row in rows],
            "prompts": [row["prompt"] for row in rows],
            "metadata": extra if any(m is not None for m in extra) else None,
        }
        return _rows(self._wire().post("/score", body), len(rows), self.url)


def to_json(scores: Scores) -> dict[str, Any]:
    """What a server answers."""
    return {
        "value": _plain(scores.value),
        "parts": {k: _plain(v) for k, v in scores.parts.items()},
        "valid": None if scores.valid is None else scores.valid.tolist(),
        "notes": scores.notes,
    }


def _rows(data: Any, n: int, url: str) -> list[dict[str, Any]]:  # noqa: ANN401
    try:
        columns = {"value": data["value"], "valid": data.get("valid") or [True] * n}
        parts, notes = data.get("parts") or {}, data.get("notes") or {}
        lists = [*columns.values(), *parts.values(), *notes.values()]
        if any(not isinstance(v, list) or len(v) != n for v in lists):
            raise ValueError(f"expected {n} entries of each")
        return [
            {
                "value": _number(columns["value"][k]),
                "valid": bool(columns["valid"][k]),
                "parts": {name: _number(v[k]) for name, v in parts.items()},
                "notes": {name: str(v[k]) for name, v in notes.items()},
            }
            for k in range(n)
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(
            f"{url} did not answer with scores of {n} images ({error}): {str(data)[:200]}"
        ) from error


def _joined(found: Sequence[dict[str, Any] | None], device: torch.device) -> Scores:
    """Scores of all rows; NaN and not valid where there is none."""
    done = [one for one in found if one is not None]
    names = sorted({name for one in done for name in one["parts"]})
    texts = sorted({name for one in done for name in one["notes"]})
    lost: dict[str, Any] = {"value": math.nan, "valid": False, "parts": {}, "notes": {}}
    rows = [lost if one is None else one for one in found]
    valid = torch.tensor([row["valid"] for row in rows], device=device)
    return Scores(
        value=torch.tensor([row["value"] for row in rows], device=device),
        parts={
            name: torch.tensor([row["parts"].get(name, math.nan) for row in rows], device=device)
            for name in names
        },
        valid=None if bool(valid.all()) else valid,
        notes={name: [row["notes"].get(name, "") for row in rows] for name in texts},
    )


def _plain(values: Tensor) -> list[float | str]:
    return [v if math.isfinite(v) else str(v) for v in values.detach().float().cpu().tolist()]


def _number(value: Any) -> float:  # noqa: ANN401
    if isinstance(value, str):
        return _WORDS[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _key(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()

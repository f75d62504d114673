"""A vision-language model as judge: rubrics, yes/no questions and checklists."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards.base import Reward, register
from steering.rewards.chat import NO, YES, Ask, Chat, Reply, digits
from steering.rewards.chat_local import LocalChat, load_chat
from steering.rewards.chat_server import ServerChat, Unfinished
from steering.rewards.checkpoints import dtype_of
from steering.rewards.images import device_name, need_text
from steering.rewards.networked import put_away
from steering.rewards.wire import RemoteError, Wire
from steering.scoring import Scores

ASPECTS = "match with the text; visual quality; realism; composition"
QUESTION = 'Does this image show "{prompt}"? Answer the question with Yes or No.'
_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_LITTLE = 0.5  # of the mass, where what a server leaves out may count as much as what it tells


@dataclass(frozen=True, kw_only=True)
class Judge(Reward):
    """Base of the rewards that ask a model: where it is, and what becomes of unusable answers.

    Attributes:
        model: a folder or hub id; with ``url`` the name that the server knows it by.
        url: of an OpenAI-compatible server, up to and with its "/v1"; none runs the model here.
        on_invalid: "nan" gives NaN and not valid, which stops a run; "worst" gives the lowest
            score there is. Either way the part ``parsed`` is 0 and a warning counts them.
        precision: "fp32", "bf16" or "fp16".
        device: of the model here; none follows the images.
        batch_size: questions in one forward pass; halved for a call whose memory runs out.
        offload: keep the model here on the CPU between calls.
        timeout, retries, concurrency: of requests to the server.
        key_env: environment variable with the server's key.
    """

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    url: str | None = None
    on_invalid: Literal["nan", "worst"] = "nan"
    precision: str = "bf16"
    device: str | None = None
    batch_size: int = 8
    offload: bool = False
    timeout: float = 120.0
    retries: int = 3
    concurrency: int = 8
    key_env: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        dtype_of(self.precision, self.name)
        if self.on_invalid not in ("nan", "worst"):
            raise OptionError(f"{self.name}(on_invalid={self.on_invalid!r}): give nan or worst.")
        if self.batch_size < 1 or self.concurrency < 1:
            raise OptionError(f"{self.name}: batch_size and concurrency must be 1 or more.")
        if self.url:
            self._server()

    def for_model(self, model: Any) -> Any:  # noqa: ANN401
        """This reward, with its weights loaded before any image is made."""
        chat = self._chat(getattr(model, "device", "cpu"))
        if self.offload and isinstance(chat, LocalChat):
            put_away(chat)
        return self

    def _chat(self, device: torch.device | str) -> Chat:
        if self.url:
            return self._server()
        where = device_name(self.device or device)
        return load_chat(
            self.model, self.name, self.precision, where, self.batch_size, self.offload
        )

    def _server(self) -> ServerChat:
        wire = Wire(url=self.url or "", timeout=self.timeout, retries=self.retries)
        return ServerChat(
            wire=wire, model=self.model, key_env=self.key_env, concurrency=self.concurrency
        )

    def _choices(
        self, asks: Sequence[Ask], labels: Sequence[Sequence[str]]
    ) -> tuple[Tensor, RemoteError | None]:
        """(probabilities [n, k] of the labels, what broke off); NaN rows were not answered."""
        device = asks[0].images[0].device
        try:
            return self._chat(device).choices(asks, labels).exp().to(device), None
        except Unfinished as error:
            lost = torch.full((len(labels),), math.nan)
            rows = [lost if row is None else row for row in error.results]
            return torch.stack(rows).exp().to(device), error

    def _write(
        self, asks: Sequence[Ask], max_new_tokens: int, *, probabilities: bool = False
    ) -> tuple[list[Reply | None], RemoteError | None]:
        chat = self._chat(asks[0].images[0].device)
        try:
            return [*chat.write(asks, max_new_tokens, probabilities=probabilities)], None
        except Unfinished as error:
            return error.results, error

    def _finish(
        self,
        value: Tensor,
        worst: float,
        parts: dict[str, Tensor],
        notes: dict[str, list[str]],
        error: RemoteError | None,
    ) -> Scores:
        """Scores with unusable rows counted; raises what broke off, with what was finished."""
        good = ~value.isnan()
        parts = {**parts, "parsed": good.float()}
        if error is not None:
            error.scores = Scores(value=value, parts=parts, valid=good, notes=notes)
            raise error
        if not bool(good.all()):
            row = int((~good).nonzero()[0])
            seen = next(iter(notes.values()))[row] if notes else "no weight on its answers"
            warnings.warn(
                f"{self.name}: {int((~good).sum())} of {len(value)} answers could not be read; "
                f"row {row}: {seen[:200]!r}",
                stacklevel=3,
            )
        if self.on_invalid == "worst":
            return Scores(value=value.nan_to_num(nan=worst), parts=parts, notes=notes)
        return Scores(value=value, parts=parts, valid=good, notes=notes)


@register("vlm")
@dataclass(frozen=True, kw_only=True)
class VLM(Judge):
    """A vision-language model asked for marks, for yes or no, or through a checklist.

    ``read="expected"`` takes one forward pass a question and averages over the model's own
    probabilities of the answers, which separates images that get the same word; ``read="text"``
    lets it write and reads that.

    Parts: ``parsed``, ``mass`` (the probability on readable answers, with "expected"), and one
    per aspect or checklist item. Notes: ``reply``, with "text".

    Attributes:
        task: "rubric" gives the mean mark from low to high, "yes_no" the probability of yes,
            "checklist" the (weighted) mean probability of yes over several questions.
        read: "expected" or "text".
        question: for "yes_no", with {prompt} in it.
        aspects: of the rubric, separated by semicolons.
        checklist: questions separated by semicolons; ``metadata`` with "questions" (and
            "weights") per image goes before.
        low, high: ends of the scale; single digits.
        min_mass: below this ``mass`` an answer counts as unreadable. A server tells the 20
            likeliest tokens only: spellings that are not among them add nothing, with a warning
            where less than half of the probability is left.
        max_new_tokens: for "text".
    """

    differentiable: ClassVar[bool] = False
    hub_id: ClassVar[str] = "Qwen/Qwen2.5-VL-3B-Instruct"
    licence: ClassVar[str] = "the model's own (Qwen2.5-VL-3B: Qwen Research; 7B: Apache-2.0)"
    value_range: ClassVar[str] = "1 to 5 (rubric); 0 to 1 (yes_no, checklist)"
    memory: ClassVar[str] = "8 GB (3B, bf16)"

    task: Literal["rubric", "yes_no", "checklist"] = "rubric"
    read: Literal["expected", "text"] = "expected"
    question: str = QUESTION
    aspects: str = ASPECTS
    checklist: str = ""
    low: int = 1
    high: int = 5
    min_mass: float = 0.01
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"task": ("rubric", "yes_no", "checklist"), "read": ("expected", "text")}
        for key, words in known.items():
            if getattr(self, key) not in words:
                raise OptionError(f"vlm({key}={getattr(self, key)!r}): give {', '.join(words)}.")
        if not 0 <= self.low < self.high <= 9:
            raise OptionError(
                f"vlm(low={self.low}, high={self.high}): give 0 <= low < high <= 9, so that each "
                "mark is one token."
            )

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Marks or probabilities [n]."""
        if self.task == "rubric":
            return self._rubric(images, need_text(prompts, self.name))
        if self.task == "yes_no":
            texts = need_text(prompts, self.name)
            questions = [[self.question.replace("{prompt}", text)] for text in texts]
            return self._questions(images, questions, [[1.0]] * len(images))
        lists, weights = self._lists(prompts, metadata)
        return self._questions(images, lists, weights)

    def _rubric(self, images: Tensor, prompts: list[str]) -> Scores:
        aspects = _items(self.aspects)
        if not aspects:
            raise OptionError("vlm(aspects=...): name at least one aspect.")
        if self.read == "text":
            asks = [
                Ask(text=_all_marks(p, aspects, self.low, self.high), images=(image,))
                for image, p in zip(images, prompts, strict=True)
            ]
            replies, error = self._write(asks, self.max_new_tokens)
            rows = [self._marks(reply, aspects) for reply in replies]
            marks = torch.tensor(rows, device=images.device)
            parts = dict(zip(map(_key, aspects), marks.T, strict=True))
            return self._finish(marks.mean(1), self.low, parts, _replies(replies), error)
        asks = [
            Ask(text=_one_mark(p, aspect, self.low, self.high), images=(image,))
            for image, p in zip(images, prompts, strict=True)
            for aspect in aspects
        ]
        p, error = self._choices(asks, digits(self.low, self.high))
        p, mass = self._normalised(p.view(len(images), len(aspects), -1))
        marks = (p * torch.arange(self.low, self.high + 1, device=p.device)).sum(-1)
        parts = dict(zip(map(_key, aspects), marks.T, strict=True))
        return self._finish(marks.mean(1), self.low, {**parts, "mass": mass.amin(1)}, {}, error)

    def _marks(self, reply: Reply | None, aspects: Sequence[str]) -> list[float]:
        found = {_key(k): v for k, v in json_object(reply.text if reply else "").items()}
        marks = [number(found.get(_key(aspect))) for aspect in aspects]
        return [m if self.low <= m <= self.high else math.nan for m in marks]

    def _questions(
        self, images: Tensor, lists: list[list[str]], weights: list[list[float]]
    ) -> Scores:
        asks = [
            Ask(text=q, images=(image,))
            for image, questions in zip(images, lists, strict=True)
            for q in questions
        ]
        parts: dict[str, Tensor] = {}
        notes: dict[str, list[str]] = {}
        sizes = [len(questions) for questions in lists]
        if self.read == "text":
            replies, error = self._write(asks, self.max_new_tokens)
            yes = torch.tensor([_yes_or_no(r) for r in replies], device=images.device)
            rows = torch.arange(len(asks)).split(sizes)
            notes = {
                k: ["\n".join(v[int(i)] for i in row) for row in rows]
                for k, v in _replies(replies).items()
            }
        else:
            p, error = self._choices(asks, (YES, NO))
            p, mass = self._normalised(p)
            yes = p[:, 0]
            parts["mass"] = torch.stack([m.amin() for m in mass.split(sizes)])
        answers = yes.split(sizes)
        value = torch.stack(
            [(a * a.new_tensor(w)).sum() / sum(w) for a, w in zip(answers, weights, strict=True)]
        )
        if self.task == "checklist":
            table = torch.nn.utils.rnn.pad_sequence(list(answers), True, math.nan)
            parts.update({f"q{k}": column for k, column in enumerate(table.T)})
        return self._finish(value, 0.0, parts, notes, error)

    def _normalised(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """(p over its sum, the sum), with NaN where the sum is too small to mean anything."""
        mass = p.sum(-1)
        if self.url and bool((mass < _LITTLE).any()):
            warnings.warn(
                f"{self.name}: less than {_LITTLE:.0%} of the probability lies on readable "
                "answers. A server tells the 20 likeliest tokens only, so the marks that are not "
                "among them are missing from the mean; see the part 'mass', or use read=text.",
                stacklevel=5,
            )
        p = p / mass.unsqueeze(-1)
        return torch.where((mass >= self.min_mass).unsqueeze(-1), p, math.nan), mass

    def _lists(
        self, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Questions and weights per image."""
        lists, weights = [], []
        for row, prompt in enumerate(prompts):
            extra = metadata[row] if metadata is not None else None
            given = extra if isinstance(extra, dict) else {}
            questions = list(given.get("questions") or _items(self.checklist))
            weight = [float(w) for w in given.get("weights") or [1.0] * len(questions)]
            if not questions or len(weight) != len(questions) or sum(weight) <= 0:
                raise OptionError(
                    f"vlm(task=checklist): image {row} has {len(questions)} questions and "
                    f"{len(weight)} weights. Give checklist='...; ...' or metadata with "
                    '{"questions": [...], "weights": [...]}, with a positive sum of weights.'
                )
            texts = [str(q).replace("{prompt}", str(prompt)) for q in questions]
            lists.append([f"{text} Answer the question with Yes or No." for text in texts])
            weights.append(weight)
        return lists, weights


def json_object(text: str) -> dict[str, Any]:
    """The first JSON object in a text, which may stand in a code fence; {} if there is none."""
    decoder = json.JSONDecoder()
    for at in (m.start() for m in re.finditer(r"\{", text)):
        try:
            found, _ = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def number(value: Any) -> float:  # noqa: ANN401
    """A number, also when written as text or as "4/5"; NaN for anything else."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 1e9 else math.nan
    text = str(value).partition("/")[0].strip()
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else math.nan


def _yes_or_no(reply: Reply | None) -> float:
    """1, 0, or NaN where neither or both are said."""
    said = {w.lower() for w in _WORD.findall(reply.text if reply else "")}
    return {frozenset({"yes"}): 1.0, frozenset({"no"}): 0.0}.get(frozenset(said), math.nan)


def _replies(replies: Sequence[Reply | None]) -> dict[str, list[str]]:
    return {"reply": [reply.text if reply else "" for reply in replies]}


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(";") if item.strip()]


def _key(text: str) -> str:
    return re.sub(r"\W+", "_", str(text).strip().lower())


def _one_mark(prompt: str, aspect: str, low: int, high: int) -> str:
    return (
        f'This image was made for the text "{prompt}". Judge its {aspect} with a mark from {low} '
        f"(worst) to {high} (best). Answer with the number only."
    )


def _all_marks(prompt: str, aspects: Sequence[str], low: int, high: int) -> str:
    form = json.dumps({_key(aspect): "mark" for aspect in aspects})
    return (
        f'This image was made for the text "{prompt}". Judge it with marks from {low} (worst) to '
        f"{high} (best) in each of these: {'; '.join(aspects)}. Answer with one JSON object of "
        f"the form {form} and nothing else."
    )

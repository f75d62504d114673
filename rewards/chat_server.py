"""Any server that speaks OpenAI's chat format: vLLM, SGLang, llama.cpp, a hosted model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.rewards.chat import Ask, Reply
from steering.rewards.wire import RemoteError, Wire, base64_png, in_order

_TOP = 20  # the most that the format allows


class Unfinished(RemoteError):
    """The server failed in mid-batch; ``results`` holds what it had answered, None elsewhere."""

    def __init__(self, message: str, results: list[Any]) -> None:
        super().__init__(message)
        self.results = results


@dataclass(frozen=True, kw_only=True)
class ServerChat:
    """A model behind ``url`` + ``/chat/completions``.

    Attributes:
        key_env: the environment variable that holds the key, if there is one.
        concurrency: requests under way at once; answers keep their order.
    """

    wire: Wire
    model: str
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8

    def choices(self, asks: Sequence[Ask], labels: Sequence[Sequence[str]]) -> Tensor:
        """Log-probabilities [n, k] among the 20 likeliest first tokens; -inf for the others.

        Raises:
            RemoteError: the server gives no log-probabilities.
        """

        def row(ask: Ask) -> Tensor:
            reply = self._ask(ask, 1, probabilities=True)
            if reply.text and not reply.top:
                raise RemoteError(
                    f"{self.wire.url} gives no log-probabilities of {self.model}, so answers "
                    "cannot be weighed. Use read=text."
                )
            top = reply.top[0] if reply.top else {}
            return torch.tensor(
                [_total([top[s] for s in set(spelled) if s in top]) for spelled in labels]
            )

        return torch.stack(self._all(asks, row))

    def write(
        self, asks: Sequence[Ask], max_new_tokens: int, *, probabilities: bool = True
    ) -> list[Reply]:
        """Greedy answers, with the likeliest tokens where asked for and given."""
        return self._all(asks, lambda ask: self._ask(ask, max_new_tokens, probabilities))

    def _all(self, asks: Sequence[Ask], job: Callable[[Ask], Any]) -> list[Any]:
        found, error = in_order(job, asks, self.concurrency)
        if isinstance(error, RemoteError):
            raise Unfinished(str(error), found) from error
        if error is not None:
            raise error
        return found

    def _ask(self, ask: Ask, max_new_tokens: int, probabilities: bool) -> Reply:
        urls = [f"data:image/png;base64,{base64_png(image)}" for image in ask.images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        user = {"role": "user", "content": [*content, {"type": "text", "text": ask.text}]}
        system = {"role": "system", "content": ask.system}
        body = {
            "model": self.model,
            "messages": [system, user] if ask.system else [user],
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        if probabilities:  # not every server knows the word
            body.update({"logprobs": True, "top_logprobs": _TOP})
        key = os.environ.get(self.key_env, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return _reply(self.wire.post("/chat/completions", body, headers), self.wire.url)


def _reply(data: Any, url: str) -> Reply:  # noqa: ANN401
    try:
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        steps = (choice.get("logprobs") or {}).get("content") or []
        return Reply(
            text=str(text),
            tokens=tuple(str(step["token"]) for step in steps),
            top=tuple(
                {str(t["token"]): float(t["logprob"]) for t in step["top_logprobs"]}
                for step in steps
            ),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(
            f"{url} did not answer in OpenAI's chat format ({type(error).__name__}: {error}): "
            f"{str(data)[:200]}"
        ) from error


def _total(logps: list[float]) -> float:
    return float(torch.tensor(logps).logsumexp(0)) if logps else -torch.inf

"""JSON over HTTP with time limits, few retries and size limits; many requests, one order.

Only the standard library. Pictures travel as PNG, which is exact, and nothing is unpickled.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from steering.errors import OptionError, RewardError
from steering.rewards.images import to_pil
from steering.scoring import Scores

MAX_ANSWER = 32 * 2**20
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 8.0
T, R = TypeVar("T"), TypeVar("R")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key along to another host."""

    def redirect_request(self, *_: Any) -> None:  # noqa: ANN401
        return None


_OPENER = urllib.request.build_opener(_Stay)


class RemoteError(RewardError):
    """A server did not answer, or not with scores.

    Attributes:
        scores: of the images that were finished before it failed, NaN and not valid elsewhere;
            None where there are none.
    """

    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How to reach a server.

    Attributes:
        url: with http:// or https://.
        timeout: seconds for one request.
        retries: further tries after a broken connection, a time-out or a busy server.
        pause: seconds before the first retry; doubled up to 8 seconds.
        max_bytes: of a request; a larger one is refused before it is sent.
    """

    url: str
    timeout: float = 120.0
    retries: int = 3
    pause: float = 0.5
    max_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise OptionError(f"The address {self.url!r} must begin with http:// or https://.")
        if self.timeout <= 0 or not 0 <= self.retries <= 20 or self.max_bytes < 1:
            raise OptionError(
                f"timeout={self.timeout}, retries={self.retries}, max_bytes={self.max_bytes}: "
                "give seconds above 0, 0 to 20 retries and 1 byte or more."
            )

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401
        """The JSON answer to a JSON request.

        Raises:
            RemoteError: no answer after all retries, a refusal, or an answer that is not JSON.
            OptionError: the request is larger than ``max_bytes``.
        """
        data = json.dumps(body, allow_nan=False).encode()
        if len(data) > self.max_bytes:
            raise OptionError(
                f"A request of {len(data) / 2**20:.1f} MiB is over the limit of "
                f"{self.max_bytes / 2**20:.1f} MiB for {self.url}. Send fewer or smaller images, "
                "or raise max_bytes."
            )
        return self._tried(path, data, {"Content-Type": "application/json", **(headers or {})})

    def get(self, path: str) -> Any:  # noqa: ANN401
        """The JSON answer to a GET request; raises as `post`."""
        return self._tried(path, None, {})

    def _tried(self, path: str, data: bytes | None, headers: Mapping[str, str]) -> Any:  # noqa: ANN401
        where = self.url.rstrip("/") + path
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(where, data=data, headers=dict(headers))
            try:
                with _OPENER.open(request, timeout=self.timeout) as answer:
                    return _json(answer.read(MAX_ANSWER + 1), where)
            except urllib.error.HTTPError as error:
                text = error.read(2000).decode(errors="replace")
                problem = f"HTTP {error.code}: {' '.join(text.split())[:300]}"
                if error.code not in _BUSY:
                    raise RemoteError(f"{where} refused the request ({problem}).") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(min(self.pause * 2**attempt, _LONGEST_PAUSE))
        raise RemoteError(
            f"{where} gave no answer in {self.retries + 1} tries of at most {self.timeout:g} s "
            f"({problem}). Is the server running, and the address right?"
        )


def in_order(
    job: Callable[[T], R], items: Sequence[T], concurrency: int
) -> tuple[list[R | None], Exception | None]:
    """(results in the order of the items, the first failure), at most ``concurrency`` at once.

    After a failure no further job is started; those under way are finished and kept.
    """
    failed = threading.Event()

    def guarded(item: T) -> tuple[R | None, Exception | None]:
        if failed.is_set():
            return None, None
        try:
            return job(item), None
        except Exception as error:
            failed.set()
            return None, error

    with concurrent.futures.ThreadPoolExecutor(max(1, min(concurrency, len(items)))) as pool:
        found = list(pool.map(guarded, items))
    errors = [error for _, error in found if error is not None]
    return [result for result, _ in found], errors[0] if errors else None


def png(image: Tensor) -> bytes:
    """One image [3, H, W] in [0, 1] as PNG, rounded to 8 bits."""
    buffer = io.BytesIO()
    to_pil(image[None])[0].save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def base64_png(image: Tensor) -> str:
    """The same as text."""
    return base64.b64encode(png(image)).decode()


def _json(data: bytes, where: str) -> Any:  # noqa: ANN401
    if len(data) > MAX_ANSWER:
        raise RemoteError(f"The answer of {where} is over {MAX_ANSWER // 2**20} MiB.")
    try:
        return json.loads(data)
    except ValueError as error:
        raise RemoteError(f"The answer of {where} is not JSON: {data[:200]!r}.") from error

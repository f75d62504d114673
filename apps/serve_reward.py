"""The server behind `steer serve-reward`: any reward over HTTP, as JSON and PNG.

Requests are limited in bytes, images and pixels before anything is decoded in full. One request is
scored at a time; further ones wait, and beyond a limit are told to come back (503).
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import threading
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from steering.apps.bench import Bench
from steering.errors import OptionError, SteeringError
from steering.rewards.remote import to_json
from steering.scoring import Reward, resolve_reward

_LOG = logging.getLogger("steering.serve_reward")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may hold.

    Attributes:
        max_images: in one request.
        max_bytes: of its body.
        max_pixels: of one image; ``max_total``: of all images of a request.
        max_prompt: characters of one prompt.
        max_waiting: requests that wait for their turn.
    """

    max_images: int = 64
    max_bytes: int = 64 * 2**20
    max_pixels: int = 4096 * 4096
    max_total: int = 64 * 2**20
    max_prompt: int = 10_000
    max_waiting: int = 64


class Refused(Exception):
    """A request that is not served: HTTP status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Desk:
    """Checks requests and scores them, one at a time.

    Args:
        reward: what is served.
    """

    def __init__(self, reward: Reward, limits: Limits) -> None:
        self.reward, self.limits = reward, limits
        self._turn, self._count = threading.Lock(), threading.Lock()
        self._waiting = 0

    def about(self) -> dict[str, Any]:
        """The reward and the limits."""
        reward = self.reward
        return {
            "name": reward.name,
            "spec": reward.spec,
            "licence": getattr(reward, "licence", None),
            "value_range": getattr(reward, "value_range", None),
            "stationary": getattr(reward, "stationary", True),
            "limits": asdict(self.limits),
        }

    def score(self, body: Any) -> dict[str, Any]:  # noqa: ANN401
        """The answer to one request.

        Raises:
            Refused: it is malformed, too large, too many wait, or the reward failed.
        """
        texts, prompts, metadata = self._read(body)
        with self._count:
            if self._waiting >= self.limits.max_waiting:
                raise Refused(503, "too many requests are waiting")
            self._waiting += 1
        try:
            with self._turn:
                # Unpacked only now: of all that wait, one request fills the memory.
                return self._scored(self._images(texts), prompts, metadata)
        finally:
            with self._count:
                self._waiting -= 1

    def _scored(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Any] | None
    ) -> dict[str, Any]:
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            raise Refused(400, f"images of one request must have one size; got {sorted(sizes)}")
        batch = np.stack([np.asarray(image) for image in images])
        try:
            return to_json(self.reward(batch, prompts, metadata=metadata))
        except OptionError as error:
            raise Refused(400, str(error)) from error
        except SteeringError as error:
            raise Refused(422, str(error)) from error
        except Exception as error:
            _LOG.exception("the reward failed")
            raise Refused(422, f"the reward raised {type(error).__name__}: {error}") from error

    def _read(self, body: Any) -> tuple[list[Any], list[str], list[Any] | None]:  # noqa: ANN401
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        images, prompts, metadata = (body.get(k) for k in ("images", "prompts", "metadata"))
        if not isinstance(images, list) or not isinstance(prompts, list) or not images:
            raise Refused(400, "give lists: images (PNG as base64) and prompts, not empty")
        if len(images) > self.limits.max_images:
            raise Refused(
                413,
                f"{len(images)} images in one request; at most {self.limits.max_images} here. "
                f"Serve with --max-images {len(images)} or more to take them at once",
            )
        if len(prompts) != len(images):
            raise Refused(400, f"{len(prompts)} prompts for {len(images)} images")
        if metadata is not None and (
            not isinstance(metadata, list) or len(metadata) != len(images)
        ):
            raise Refused(400, "metadata must be null or one entry per image")
        for k, prompt in enumerate(prompts):
            if prompt is not None and not isinstance(prompt, str):
                raise Refused(400, f"prompt {k} is neither a string nor null")
            if prompt is not None and len(prompt) > self.limits.max_prompt:
                raise Refused(413, f"prompt {k} is over {self.limits.max_prompt} characters")
        return images, prompts, metadata

    def _images(self, texts: list[Any]) -> list[Image.Image]:
        found, room = [], self.limits.max_total
        for k, text in enumerate(texts):
            image = self._image(k, text)
            room -= image.width * image.height
            if room < 0:
                raise Refused(
                    413,
                    f"the images hold more than {self.limits.max_total} pixels together; send "
                    "fewer at once, or serve with a larger --max-megapixels",
                )
            found.append(image)
        return found

    def _image(self, k: int, text: Any) -> Image.Image:  # noqa: ANN401
        if not isinstance(text, str):
            raise Refused(400, f"image {k} is not a string")
        try:
            data = base64.b64decode(text, validate=True)
            # The size stands in the header: a bomb is refused before it is unpacked.
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            if image.width * image.height > self.limits.max_pixels:
                raise Refused(413, f"image {k} is {image.width}x{image.height}, too large")
            return image.convert("RGB")
        except Image.DecompressionBombError as error:
            raise Refused(413, f"image {k} is too large") from error
        except (binascii.Error, ValueError, OSError, SyntaxError) as error:
            raise Refused(400, f"image {k} is no PNG in base64 ({error})") from error


def build(desk: Desk) -> Any:  # noqa: ANN401
    """The ASGI application."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise OptionError(
            "serve-reward needs fastapi and uvicorn: pip install 'diffusion-steering[serve]'."
        ) from error
    app = FastAPI(title="steering reward", openapi_url=None)

    async def about() -> Any:  # noqa: ANN401
        return desk.about()

    async def score(request: Request) -> Any:  # noqa: ANN401
        try:
            body = await _body(request, desk.limits.max_bytes)
            return await run_in_threadpool(desk.score, body)
        except Refused as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)

    # Annotations are strings here, and FastAPI would look for `Request` in this module.
    score.__annotations__ = {"request": Request}
    about.__annotations__ = {}
    app.get("/about")(about)
    app.post("/score")(score)
    return app


async def _body(request: Any, most: int) -> Any:  # noqa: ANN401
    """The JSON of a request, which is not read beyond its limit."""
    import json

    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise Refused(413, f"the request is over {most} bytes; serve with a larger --max-mib")
        chunks.append(chunk)
    try:
        return json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({error})") from error


def run(name: str, *, host: str, port: int, device: str | None, limits: Limits) -> None:
    """Serves a reward until it is stopped; weights are loaded before the port opens.

    Raises:
        OptionError: an unknown reward, or fastapi and uvicorn are missing.
        WeightsError: weights that cannot be found.
    """
    reward = resolve_reward(name, Bench(device))
    reward = _Placed(reward, device) if device else reward
    app = build(Desk(reward, limits))
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="info")


class _Placed:
    """A reward whose images are put on a device first."""

    def __init__(self, reward: Any, device: str) -> None:  # noqa: ANN401
        self.reward, self.device = reward, device

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.reward, name)

    def __call__(self, images: Any, prompts: Any, *, metadata: Any = None) -> Any:  # noqa: ANN401
        """Scores of the images on the device."""
        from steering.rewards.images import as_tensor

        return self.reward(as_tensor(images).to(self.device), prompts, metadata=metadata)

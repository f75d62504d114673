"""Real servers on a free port of this machine: one that speaks OpenAI's chat format, any app."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse
from PIL import Image


@contextlib.contextmanager
def serve(app: Any) -> Iterator[str]:
    """The address of a running app; ends it afterwards."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


def pictures_of(body: dict[str, Any]) -> tuple[list[Image.Image], str]:
    """Images and text of the last message."""
    content = body["messages"][-1]["content"]
    images = []
    for part in content:
        if part["type"] == "image_url":
            kind, _, data = part["image_url"]["url"].partition(",")
            assert kind == "data:image/png;base64"
            images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    return images, next(part["text"] for part in content if part["type"] == "text")


def answer(text: str, steps: list[tuple[str, dict[str, float]]] | None = None) -> dict[str, Any]:
    """A completion in OpenAI's form; `steps` are (token, log-probabilities) in order."""
    content = [
        {
            "token": token,
            "logprob": top.get(token, -99.0),
            "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()],
        }
        for token, top in steps or []
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": content} if steps is not None else None,
        "finish_reason": "stop",
    }
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def scripted(reply: Callable[[list[Image.Image], str, int], Any]) -> FastAPI:
    """An app that answers ``reply(images, text, number of the request)``.

    The reply is a text, a completion, an integer (that HTTP status), or bytes (sent raw).
    """
    app, lock = FastAPI(), threading.Lock()
    app.state.requests = []

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        with lock:
            app.state.requests.append((body, dict(request.headers)))
            number = len(app.state.requests) - 1
        images, text = pictures_of(body)
        found = await asyncio.to_thread(reply, images, text, number)
        if isinstance(found, int):
            raise HTTPException(found, "no")
        if isinstance(found, bytes):
            return PlainTextResponse(found.decode())
        return answer(found) if isinstance(found, str) else found

    return app


def model_app(folder: Any) -> FastAPI:
    """A chat server that runs a checkpoint by plain transformers, one request at a time."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    words, lock = processor.tokenizer, asyncio.Lock()
    app = FastAPI()

    @torch.no_grad()
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        images, text = pictures_of(body)
        marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        prompt = f"<|im_start|>user\n{marks}{text}<|im_end|>\n<|im_start|>assistant\n"
        inputs = dict(processor(text=[prompt], images=images, return_tensors="pt"))
        steps = []
        for _ in range(body["max_tokens"]):
            logp = model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
            # more than asked for where one token is read, so that both sides see the same sums
            top = logp.topk(body.get("top_logprobs", 1) if body["max_tokens"] > 1 else len(logp))
            token = int(logp.argmax())
            if token == words.eos_token_id:
                break
            steps.append((words.decode([token]), {
                words.decode([i]): v for i, v in
                zip(top.indices.tolist(), top.values.tolist(), strict=True)}))  # fmt: skip
            one = torch.tensor([[token]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], one], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                zero = torch.zeros_like(one)
                inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zero], 1)
        return answer("".join(t for t, _ in steps), steps)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        async with lock:
            return await asyncio.to_thread(complete, body)

    return app

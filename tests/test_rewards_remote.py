"""Rewards over HTTP: the real server in this process, order, limits, retries, sudden death."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from PIL import Image

from steering.apps.serve_reward import Desk, Limits, Refused, build
from steering.errors import OptionError, RewardError
from steering.rewards import FunctionReward, Reward, as_reward
from steering.rewards.remote import RemoteReward
from steering.rewards.vlm import VLM
from steering.rewards.wire import RemoteError, base64_png, in_order
from steering.scoring import Scores, score
from tests import tiny_server


class Telling(Reward):
    """Brightness with parts, notes and an unusable value, and slower for dark pictures."""

    def score(self, images, prompts, metadata):
        value = images.mean((1, 2, 3))
        time.sleep(0.05 * float(value[0] < 0.3))
        bad = torch.tensor([p == "bad" for p in prompts])
        extra = [m["add"] if m else 0.0 for m in metadata or [None] * len(images)]
        return Scores(
            value=torch.where(bad, math.nan, value + torch.tensor(extra)),
            parts={"dark": 1 - value, "inf": torch.full_like(value, -math.inf)},
            valid=~bad,
            notes={"said": [f"on {p}" for p in prompts]},
        )


def shades(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 6, 5).contiguous()


@pytest.fixture(scope="module")
def url():
    with tiny_server.serve(build(Desk(Telling(), Limits(max_images=8, max_bytes=200_000)))) as it:
        yield it


def test_the_far_reward_equals_the_near_one(url):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (11, 3, 6, 5), generator=generator) / 255
    prompts = [f"p{k}" for k in range(11)]
    metadata = [{"add": float(k)} if k % 2 else None for k in range(11)]
    near = Telling()(x, prompts, metadata=metadata)
    far = RemoteReward(url=url, batch_size=3)(x, prompts, metadata=metadata)
    torch.testing.assert_close(far.value, near.value)
    assert far.value.dtype == torch.float32
    assert far.valid is None
    assert far.notes == near.notes
    for name, values in near.parts.items():
        torch.testing.assert_close(far.parts[name], values)


def test_order_is_kept_under_concurrency(url):
    levels = torch.tensor([0.0, 1.0, 0.2, 0.8, 0.4, 0.6, 0.2])
    for batch_size, concurrency in ((1, 7), (2, 3), (7, 1)):
        reward = RemoteReward(url=url, batch_size=batch_size, concurrency=concurrency)
        found = reward(shades(*levels), "x").value
        torch.testing.assert_close(found, levels, atol=1e-6, rtol=0)


def test_unusable_values_travel(url):
    found = RemoteReward(url=url)(shades(0.2, 0.4), ["bad", "good"])
    assert found.valid.tolist() == [False, True]
    assert math.isnan(float(found.value[0]))
    assert found.parts["inf"].tolist() == [-math.inf] * 2
    with pytest.raises(RewardError, match="no usable number for 1 of 2"):
        score(RemoteReward(url=url), shades(0.2, 0.4), ["bad", "good"])


def test_it_has_a_spec_and_knows_its_server(url):
    reward = as_reward(f"0.5*remote(url={url}, batch_size=2)")
    assert as_reward(reward.spec).spec == reward.spec
    about = RemoteReward(url=url).about()
    assert (about["name"], about["limits"]["max_images"]) == ("telling", 8)
    with pytest.raises(RemoteError, match="gave no answer in 1 tries"):
        RemoteReward(url="http://127.0.0.1:9", retries=0).for_model(None)


def post(url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/score", data)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def picture(width=4, height=4, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"not json", 400, "not JSON"),
        (b"\x80\x04\x95pickle", 400, "not JSON"),
        ([1], 400, "JSON object"),
        ({"images": [], "prompts": []}, 400, "not empty"),
        ({"images": ["x"], "prompts": "x"}, 400, "lists"),
        ({"images": [picture()], "prompts": []}, 400, "0 prompts for 1"),
        ({"images": [picture()] * 9, "prompts": ["x"] * 9}, 413, "at most 8"),
        ({"images": ["%%"], "prompts": ["x"]}, 400, "no PNG"),
        ({"images": [picture(kind="JPEG")], "prompts": ["x"]}, 400, "no PNG"),
        ({"images": [7], "prompts": ["x"]}, 400, "not a string"),
        ({"images": [picture()], "prompts": [7]}, 400, "neither a string"),
        ({"images": [picture()], "prompts": ["x" * 10_001]}, 413, "characters"),
        ({"images": [picture()], "prompts": ["x"], "metadata": {}}, 400, "metadata"),
        ({"images": [picture(), picture(8, 8)], "prompts": ["x"] * 2}, 400, "one size"),
        ({"images": [picture(5000, 5000)], "prompts": ["x"]}, 413, "5000x5000"),
        (b" " * 200_001, 413, "over 200000 bytes"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(url, body, status, said):
    found, answer = post(url, body)
    assert found == status
    assert said in answer["error"]


def test_a_reward_that_fails_is_one_refusal_and_the_server_lives():
    def shaky(images, prompts):
        if "bad" in prompts:
            raise RuntimeError("broken inside")
        return images.mean((1, 2, 3))

    with tiny_server.serve(build(Desk(FunctionReward(shaky), Limits()))) as url:
        reward = RemoteReward(url=url, batch_size=1, concurrency=1)
        with pytest.raises(RemoteError, match="broken inside") as caught:
            reward(shades(0.0, 0.2, 0.4), ["x", "bad", "x"])
        assert caught.value.scores.valid.tolist() == [True, False, False]
        assert reward(shades(1.0), "x").value.tolist() == [1.0]


def test_too_many_waiting_are_told_to_come_back():
    started, gate = threading.Event(), threading.Event()

    def slow(images, prompts):
        started.set()
        gate.wait(10)
        return images.mean((1, 2, 3))

    desk = Desk(FunctionReward(slow), Limits(max_waiting=1))
    body = {"images": [picture()], "prompts": ["x"]}
    thread = threading.Thread(target=desk.score, args=(body,))
    thread.start()
    started.wait(10)
    with pytest.raises(Refused, match="waiting") as caught:
        desk.score(body)
    gate.set()
    thread.join(10)
    assert caught.value.status == 503
    assert desk.score(body)["value"] == [0.0]


@contextlib.contextmanager
def mortal(desk, port, lives):
    """A server that closes its connections and its port after so many requests."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if len(seen) >= lives:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                self.server.socket.close()
                return
            seen.append(len(body["images"]))
            data = json.dumps(desk.score(body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_a_server_that_dies_in_mid_batch_loses_nothing_that_was_done():
    desk = Desk(Telling(), Limits())
    levels = [0.4, 0.6, 0.8, 1.0, 0.4, 0.6]
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mortal(desk, port, lives=2) as (url, seen):
        reward = RemoteReward(
            url=url, batch_size=2, concurrency=1, retries=1, pause=0.01, timeout=5
        )
        with pytest.raises(RemoteError, match="in 2 tries") as caught:
            reward(shades(*levels), [f"p{k}" for k in range(6)])
        assert seen == [2, 2]
    kept = caught.value.scores
    assert kept.valid.tolist() == [True] * 4 + [False] * 2
    assert kept.value[:4].tolist() == pytest.approx(levels[:4])
    assert kept.notes["said"][3:] == ["on p3", "", ""]
    with mortal(desk, port, lives=99) as (_, seen):
        whole = reward(shades(*levels), [f"p{k}" for k in range(6)])
        assert seen == [2]  # only what was not done
        assert whole.value.tolist() == pytest.approx(levels)
        reward(shades(*levels), [f"p{k}" for k in range(6)])
        assert sum(seen) == 8  # and nothing is kept once a call has been finished


class Rivals(Reward):
    """Brightness above that of the call."""

    stationary = False

    def score(self, images, prompts, metadata):
        value = images.mean((1, 2, 3))
        return value - value.mean()


def test_a_served_reward_that_compares_a_call_gets_it_whole():
    x = shades(0.0, 1.0, 0.2, 0.8, 0.6)
    with tiny_server.serve(build(Desk(Rivals(), Limits()))) as url:
        reward = RemoteReward(url=url, batch_size=2).for_model(None)
        assert reward.stationary is False
        torch.testing.assert_close(reward(x, "x").value, Rivals()(x, "x").value)
        assert (0.5 * as_reward(f"remote(url={url})")).for_model(None).stationary is False


def test_a_request_holds_only_so_many_pixels():
    desk = Desk(Telling(), Limits(max_total=100))
    body = {"images": [picture(6, 6)] * 3, "prompts": ["x"] * 3}
    with pytest.raises(Refused, match="more than 100 pixels together") as caught:
        desk.score(body)
    assert caught.value.status == 413
    assert len(desk.score({k: v[:2] for k, v in body.items()})["value"]) == 2


def test_no_redirect_takes_the_key_along(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    app, seen = FastAPI(), []

    @app.post("/v1/chat/completions")
    async def chat():
        return RedirectResponse("/caught", 302)

    @app.get("/caught")
    async def caught(request: Request):
        seen.append(request.headers.get("authorization"))
        return {}

    with tiny_server.serve(app) as url:
        judge = VLM(model="m", url=f"{url}/v1", read="text", key_env="MY_KEY", retries=0)
        with pytest.raises(RemoteError, match="HTTP 302"):
            judge(shades(0.5), "x")
    assert seen == []


def test_a_busy_server_is_asked_again_but_not_for_ever():
    calls = []

    def busy(images, prompts):
        calls.append(1)
        return images.mean((1, 2, 3))

    desk = Desk(FunctionReward(busy), Limits())
    scores, left = desk.score, [2]

    def sometimes(body):
        if left[0]:
            left[0] -= 1
            raise Refused(503, "busy")
        return scores(body)

    desk.score = sometimes
    with tiny_server.serve(build(desk)) as url:
        assert RemoteReward(url=url, pause=0.01)(shades(1.0), "x").value.tolist() == [1.0]
        left[0] = 99
        with pytest.raises(RemoteError, match="HTTP 503"):
            RemoteReward(url=url, pause=0.01, retries=2)(shades(1.0), "x")
    assert left[0] == 96
    assert len(calls) == 1


def test_time_outs_and_sizes(url):
    desk = Desk(FunctionReward(lambda images: time.sleep(0.5) or images.mean((1, 2, 3))), Limits())
    with (
        tiny_server.serve(build(desk)) as slow,
        pytest.raises(RemoteError, match=r"1 tries of at most 0\.1 s"),
    ):
        RemoteReward(url=slow, timeout=0.1, retries=0)(shades(1.0), "x")
    with pytest.raises(OptionError, match="over the limit of"):
        RemoteReward(url=url, max_bytes=100)(shades(1.0), "x")
    with pytest.raises(OptionError, match="http://"):
        RemoteReward(url="localhost")
    with pytest.raises(OptionError, match="0 to 20 retries"):
        RemoteReward(retries=99)


@pytest.mark.parametrize(
    "answer",
    [{}, {"value": [1.0]}, {"value": ["high", 1]}, {"value": [True, 1]}, [1, 2], {"value": None},
     {"value": [1, 2], "parts": {"a": [1]}}, {"value": [1, 2], "notes": {"a": "xy"}}],
)  # fmt: skip
def test_answers_that_are_no_scores(answer):
    desk = Desk(Telling(), Limits())
    desk.score = lambda body: answer
    with (
        tiny_server.serve(build(desk)) as url,
        pytest.raises(RemoteError, match="did not answer with scores of 2 images"),
    ):
        RemoteReward(url=url, retries=0)(shades(0.4, 0.5), "x")


def test_pictures_travel_exactly():
    x = (torch.arange(300).view(3, 10, 10) % 256) / 255
    with Image.open(io.BytesIO(base64.b64decode(base64_png(x)))) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), (x * 255).round().byte().movedim(0, -1).numpy())


def test_after_a_failure_no_further_job_starts():
    done = []

    def job(k):
        if k == 2:
            raise ValueError("no")
        done.append(k)
        return 10 * k

    found, error = in_order(job, range(50), 1)
    assert found[:3] == [0, 10, None]
    assert str(error) == "no"
    assert done == [0, 1]
    assert in_order(job, [5, 3, 4], 3) == ([50, 30, 40], None)


def test_the_command_serves(tmp_path):
    """The real command in a process of its own; its port is told by its log."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "steering.apps.cli", "serve-reward", "brightness", "--port",
         str(port), "--max-images", "2"],
        stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    try:
        reward = RemoteReward(
            url=f"http://127.0.0.1:{port}", batch_size=2, retries=20, pause=0.5, timeout=30
        )
        assert reward.about()["spec"] == "brightness"
        assert reward(shades(0.0, 1.0, 0.2), "x").value.tolist() == pytest.approx([0, 1, 0.2])
        with pytest.raises(RemoteError, match="at most 2"):
            RemoteReward(url=reward.url)(shades(0.0, 1.0, 0.2), "x")
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()

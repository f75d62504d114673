"""The demo's endpoints through gradio_client and plain HTTP, on the sticker model."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AuthenticationError

from steering.apps.demo import launch, warm_up
from steering.apps.demo_command import read_logins
from steering.errors import OptionError
from steering.recipe import read
from tests.demo_world import eventually, held, hosting, order

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "demo.md"
SMALL = {"num_inference_steps": 3}
RUN = {"prompt": "a photo of a cat", "method": "fk", "nfe": 24, "call": SMALL}
DARK = {**RUN, "rewards": {"brightness": -1.0}}


@pytest.fixture(scope="module")
def server():
    """(host, address)."""
    with hosting(nfe=400) as host:
        page, url = launch(host, wait=False)
        yield host, url
        page.close(verbose=False)


@pytest.fixture(scope="module")
def client(server):
    return Client(server[1], verbose=False)


def saved(picture: str, file: Path) -> Path:
    file.write_bytes(base64.b64decode(picture.partition(",")[2]))
    return file


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """A PNG with its recipe."""
    run = client.predict(**DARK, seed=2, api_name="/steer")
    return saved(run["results"][0]["pictures"][0], tmp_path_factory.mktemp("made") / "cat.png")


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def raw(url: str, endpoint: str, *data) -> str:
    """An answer as it goes over the wire: gradio_client would upload files of its own machine."""
    call = f"{url}gradio_api/call/{endpoint}"
    event = httpx.post(call, json={"data": list(data)}).json()["event_id"]
    return httpx.get(f"{call}/{event}", timeout=60).text


# --- every action -------------------------------------------------------------------------------


def test_every_endpoint_is_in_the_guide(client):
    offered = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    guide = GUIDE.read_text()
    written = set(re.findall(r"`(/\w+)`", guide.partition("| endpoint |")[2]))
    assert offered == written
    assert "guess" not in " ".join(offered)


def test_a_run_over_the_api(client):
    run = client.predict(**RUN, heldout=["detector"], api_name="/steer")
    assert run["state"] == "finished"
    again = client.predict(**RUN, heldout=["detector"], api_name="/steer")
    first, second = (r["results"][0]["rewards"] for r in (run, again))
    assert second == pytest.approx(first, abs=1e-5)
    assert run["results"][0]["pictures"][0].startswith("data:image/png;base64,")


def test_progress_of_a_run(server, client):
    with held() as gate:
        job = client.submit(**{**RUN, "rewards": {"gated": 1.0}}, api_name="/steer_live")
        eventually(lambda: any(o["nfe"] for o in job.outputs()), "rows are spent")
        gate.open()
        *shown, last = job.result() and job.outputs()
    assert {"waiting", "running"} & {o["state"] for o in shown}
    assert [o["nfe"] for o in shown] == sorted(o["nfe"] for o in shown)
    assert last["state"] == "finished"
    assert last["results"][0]["ledger"]["nfe"] == 24


def test_cancel_stops_the_callers_runs_only(server, client):
    other = Client(server[1], verbose=False)
    with held() as gate:
        order = {**RUN, "nfe": 240, "rewards": {"gated": 1.0}}
        # One after the other: two that come at once may be started together.
        jobs = [client.submit(**order, api_name="/steer")]
        eventually(lambda: len(server[0]._running) == 1, "the first one runs")
        jobs.append(other.submit(**order, api_name="/steer"))
        eventually(lambda: len(server[0]._running) == 1 and server[0].load[1] == 1, "both are in")
        assert client.predict(api_name="/cancel") == 1
        gate.open()
        mine, theirs = (job.result() for job in jobs)
    assert (mine["state"], theirs["state"]) == ("stopped", "finished")


def test_methods_are_compared_at_one_budget(client):
    given = {k: v for k, v in RUN.items() if k != "method"}
    found = client.predict(**given, methods=["svdd"], api_name="/compare")
    assert set(found) == {"best_of_n", "svdd"}
    assert {run["state"] for run in found.values()} == {"finished"}
    assert all(0 < r["results"][0]["ledger"]["nfe"] <= 24 for r in found.values())


def test_a_recipe_and_its_replay(client, made, tmp_path):
    recipe, shown, words = client.predict(handle_file(made), api_name="/recipe")
    assert recipe == json.loads(json.dumps(read(made).to_json()))
    assert "carries its recipe" in words
    assert "a photo of a cat" in shown
    job = client.submit(handle_file(made), api_name="/replay")
    _, _, last = job.result()
    assert last["identical"]
    again = saved(last["results"][0]["pictures"][0], tmp_path / "again.png")
    assert (pixels(again) == pixels(made)).all()


def test_scores_of_pictures(client, made, tmp_path):
    with Image.open(made) as image:
        image.resize((32, 32)).save(tmp_path / "small.jpg")
    files = [handle_file(made), handle_file(tmp_path / "small.jpg")]
    shown, found = client.predict(files, "a cat", ["brightness", "detector"], api_name="/score")
    assert [row["file"] for row in found["rows"]] == ["cat.png", "small.jpg"]
    light = pixels(made) @ np.array([0.299, 0.587, 0.114]) / 255
    assert found["rows"][0]["scores"]["brightness"] == pytest.approx(light.mean(), abs=1e-4)
    assert f"{found['rows'][0]['scores']['brightness']:.4f}" in shown


def test_uploads_go_with_their_session(server, tmp_path):
    host, url = server
    other = Client(url, verbose=False)
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file, color in zip(files, ("teal", "navy"), strict=True):
        Image.new("RGB", (8, 8), color).save(file)
    for data, endpoint in (
        ((handle_file(files[0]),), "/recipe"),
        (([handle_file(files[1])], "a cat", ["brightness"]), "/score"),
    ):
        other.predict(*data, api_name=endpoint)
    uploads = host._uploads[other.session_hash]
    assert sorted(file.name for file in uploads) == ["one.png", "two.png"]
    assert all(file.is_file() for file in uploads)
    host.leave(other.session_hash)
    assert not any(file.exists() for file in uploads)


def test_what_is_offered_and_how_long_it_takes(server, client):
    assert {m["name"] for m in client.predict(api_name="/methods")} >= {"fk", "best_of_n"}
    names = {r["name"] for r in client.predict(api_name="/rewards")}
    assert names == set(server[0].offer.rewards)
    first = warm_up(server[0])
    eventually(lambda: first.over, "the pace is measured")
    found = client.predict(nfe=100, api_name="/estimate")
    assert found["nfe"] == 100
    assert found["seconds"] > 0


def test_two_clients_at_once_get_their_own_results(server, tmp_path):
    prompts = ("a photo of a red apple", "a photo of a blue clock")
    clients = [Client(server[1], verbose=False) for _ in prompts]
    jobs = [
        c.submit(**{**DARK, "prompt": p, "seed": k}, api_name="/steer")
        for k, (c, p) in enumerate(zip(clients, prompts, strict=True))
    ]
    for k, job in enumerate(jobs):
        result = job.result()["results"][0]
        recipe = read(saved(result["pictures"][0], tmp_path / "one.png"))
        assert (recipe.prompts, recipe.seeds) == ([prompts[k]], [k])
        assert (result["recipe"]["prompts"], result["recipe"]["seeds"]) == ([prompts[k]], [k])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt": " "}, "prompt"),
        ({"method": "fkk"}, "fk"),
        ({"options": {"n_particles": -3}}, "n_particles"),
        ({"nfe": 10**9}, "nfe|rows|at most"),
        ({"rewards": {"nothing": 1.0}}, "nothing"),
        ({"model": "/etc/passwd"}, "stickers"),
    ],
)
def test_bad_input_is_a_message_and_the_server_stays_up(client, change, word):
    with pytest.raises(Exception, match=f"(?i){word}"):
        client.predict(**{**RUN, **change}, api_name="/steer")
    assert {m["name"] for m in client.predict(api_name="/methods")} >= {"fk", "best_of_n"}


def test_a_large_upload_is_refused_and_logged_and_leaves_nothing(server, caplog):
    caplog.set_level(logging.INFO, logger="steering.demo")
    host, url = server
    file = {"files": ("large.png", io.BytesIO(bytes(50 * 2**20)), "image/png")}
    answer = httpx.post(f"{url}gradio_api/upload", files=file)
    assert answer.status_code == 413
    assert "maximum allowed size of 10485760 bytes" in answer.text
    assert "refused: POST '/gradio_api/upload' with status 413" in caplog.text
    assert sum(f.stat().st_size for f in host.root.rglob("*") if f.is_file()) < 5 * 2**20


@pytest.mark.parametrize("name", ["../../../evil.png", "/tmp/evil.png", "..", "a/../../evil.png"])
def test_names_of_uploads_lead_nowhere_else(server, name):
    host, url = server
    file = {"files": (name, b"not a picture", "image/png")}
    answer = httpx.post(f"{url}gradio_api/upload", files=file)
    if answer.status_code == 200:
        (path,) = answer.json()
        assert host.root.resolve() in Path(path).resolve().parents
    assert [p for p in host.root.parent.glob("evil*")] == []


def test_files_of_the_server_cannot_be_read(server, made):
    host, url = server
    outside = made.with_name("secret.png")
    shutil.copy(made, outside)
    tricks = [
        outside,
        f"{host.root}/gradio/../../{outside.relative_to(outside.anchor)}",
        f"{host.root}/sessions/../..{outside}",
        "/etc/passwd",
    ]
    for path in map(str, tricks):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for endpoint in ("recipe", "replay"):
            answer = raw(url, endpoint, file)
            assert "event: error" in answer
            assert "steering-recipe" not in answer
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
    assert "event: complete" in raw(url, "cancel")


# --- logins -------------------------------------------------------------------------------------


def test_a_login_is_asked_for_where_there_is_one(tmp_path):
    file = tmp_path / "people"
    file.write_text("ann:secret\n\nbob:other:word\n")
    with hosting() as host:
        page, url = launch(host, people=read_logins(file), wait=False)
        try:
            with pytest.raises(AuthenticationError):
                Client(url, verbose=False)
            with pytest.raises(ValueError, match="Could not login"):
                Client(url, auth=("ann", "wrong"), verbose=False)
            assert httpx.post(f"{url}gradio_api/call/cancel", json={"data": []}).status_code == 401
            assert httpx.post(f"{url}gradio_api/upload", files={"files": b"x"}).status_code == 401
            for person in (("ann", "secret"), ("bob", "other:word")):
                client = Client(url, auth=person, verbose=False)
                assert client.predict(api_name="/cancel") == 0
        finally:
            page.close(verbose=False)


@pytest.mark.parametrize("text", ["", "\n", "ann", "ann:", ":secret", "ann:secret\nbob"])
def test_a_file_of_logins_that_holds_none_is_refused(tmp_path, text):
    file = tmp_path / "people"
    file.write_text(text)
    with pytest.raises(OptionError, match="write name:password on each line"):
        read_logins(file)
    with pytest.raises(OptionError, match="cannot be read"):
        read_logins(tmp_path / "nothing")


def test_the_server_listens_on_this_machine_only_unless_told_otherwise():
    import inspect

    from steering.apps.demo_command import demo

    known = inspect.signature(demo).parameters
    assert known["host"].default == inspect.signature(launch).parameters["name"].default
    assert known["host"].default == "127.0.0.1"
    assert known["share"].default is False


def test_closing_takes_everything_that_was_written_along():
    with hosting() as host:
        ticket = host.submit("ann", order(host))
        eventually(lambda: ticket.over, "the run is over")
        assert ticket.results[0].files[0].is_file()
        root = host.root
    assert not root.exists()

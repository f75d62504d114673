"""The demo behind its page: sessions, queue, limits, uploads, models that vanish."""

from __future__ import annotations

import logging
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from steering.apps import demo_actions as actions
from steering.apps import demo_views as views
from steering.apps.demo_order import Busy, Limits
from steering.errors import OptionError, RecipeError, SteeringError
from steering.ledger import Budget
from steering.method import Cost
from steering.recipe import read
from steering.stickers.load import FOLDERS
from tests import demo_world
from tests.demo_world import ended, eventually, held, hosting, order, pixels

GATED = {"rewards": {"gated": 1.0}}
host, _quiet_afterwards = demo_world.host, demo_world.quiet_afterwards


# --- sessions -----------------------------------------------------------------------------------


def test_sessions_that_share_the_engine_get_their_own_results(host):
    own = {"ann": ("a photo of a red apple", 3), "bob": ("a photo of a blue clock", 4)}
    with held() as gate:
        first = host.submit("ann", order(host, prompt=own["ann"][0], seed=3, **GATED))
        eventually(lambda: first.live.guesses, "the first run has begun")
        second = host.submit("bob", order(host, prompt=own["bob"][0], seed=4, **GATED))
        gate.open()
        together = dict(zip(own, ended(first, second), strict=True))
    assert first.company == second.company == 1
    for name, (prompt, seed) in own.items():
        ticket = together[name]
        recipe = read(ticket.results[0].files[0])
        assert (recipe.prompts, recipe.seeds) == ([prompt], [seed])
        assert host.folder(name) in ticket.results[0].files[0].parents
        alone = ended(host.submit(name, order(host, prompt=prompt, seed=seed, **GATED)))
        assert alone.company == 0
        difference = pixels(alone.results[0].files[0]) - pixels(ticket.results[0].files[0])
        assert np.abs(difference).mean() < 3  # rounding depends on the batch; pictures do not
    assert host.folder("ann") != host.folder("bob")
    # the seed of one with the prompt of the other is neither
    crossed = ended(host.submit("eve", order(host, prompt=own["bob"][0], seed=3, **GATED)))
    for ticket in together.values():
        difference = pixels(crossed.results[0].files[0]) - pixels(ticket.results[0].files[0])
        assert np.abs(difference).mean() > 5


def test_cancel_stops_a_sessions_own_runs_at_their_best_so_far(host):
    with held() as gate:
        mine = host.submit("ann", order(host, nfe=320, **GATED))
        eventually(lambda: mine.live.guesses, "the first run has begun")
        later = host.submit("ann", order(host, call={"num_inference_steps": 5}))
        other = host.submit("bob", order(host, **GATED))
        assert host.cancel("ann") == 2
        gate.open()
        ended(mine, later, other)
    assert [t.state for t in (mine, later, other)] == ["stopped", "stopped", "finished"]
    assert later.error == "Cancelled before it started."
    assert mine.error == "this is the best so far"
    assert 0 < mine.results[0].nfe < 320
    picture = mine.results[0].files[0]
    assert picture.is_file()
    with pytest.raises(RecipeError, match="stopped run"):
        actions.replay_order(picture, host.offer)


def test_who_leaves_takes_runs_and_files_along(host):
    done = ended(host.submit("ann", order(host)))
    folder = host.folder("ann")
    assert done.results[0].files[0].is_file()
    with held() as gate:
        going = host.submit("ann", order(host, nfe=320, **GATED))
        eventually(lambda: going.live.guesses, "the run has begun")
        host.leave("ann")
        assert not folder.exists()
        gate.open()
        ended(going)
    assert (going.state, going.results) == ("stopped", [])
    assert not folder.exists()
    assert host.load == (0, 0)


def test_a_run_that_nobody_looks_at_stops(host, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="steering.demo")
    monkeypatch.setattr("steering.apps.demo_session._UNWATCHED", 0.0)
    ticket = ended(host.submit("ann", order(host, nfe=320)))
    assert ticket.state == "stopped"
    assert "nobody is looking any more" in caplog.text


@pytest.mark.parametrize("session", ["../../etc", "/etc/passwd", "a/b", "..", ""])
def test_a_session_lives_in_its_own_folder_whatever_its_name(host, session):
    folder = host.folder(session)
    assert folder.resolve().parent == (host.root / "sessions").resolve()
    assert folder.name.isalnum()


# --- the queue ----------------------------------------------------------------------------------


def test_sessions_take_turns(host):
    other = {"call": {"num_inference_steps": 5}}
    with held() as gate:
        going = host.submit("eve", order(host, **GATED))
        eventually(lambda: going.live.guesses, "the first run has begun")
        tickets = [host.submit(s, order(host, **other)) for s in ("ann", "ann", "bob")]
        assert [host.ahead(t) for t in tickets] == [0, 2, 1]
        gate.open()
        ended(*tickets)
    assert tickets[2].started < tickets[1].started


def test_a_full_queue_and_a_greedy_session_are_told_so(host):
    other = {"call": {"num_inference_steps": 5}}
    with held() as gate:
        going = host.submit("eve", order(host, **GATED))
        eventually(lambda: going.live.guesses, "the first run has begun")
        tickets = [host.submit("ann", order(host, **other)) for _ in range(2)]
        with pytest.raises(Busy, match="You have 2 runs waiting or running"):
            host.submit("ann", order(host, **other))
        tickets.append(host.submit("bob", order(host, **other)))
        with pytest.raises(Busy, match=r"The queue is full \(3 runs are waiting\)"):
            host.submit("bob", order(host, **other))
        gate.open()
        ended(going, *tickets)
    assert {t.state for t in tickets} == {"finished"}
    assert ended(host.submit("bob", order(host))).state == "finished"


def test_the_limit_of_time_ends_a_run_with_its_best_and_says_so():
    with hosting(seconds=1.0) as host:
        ticket = ended(host.submit("ann", order(host, nfe=4000, call={})))
        words = views.status(ticket, ticket.live.snapshot(), 0)
    assert ticket.state == "stopped"
    assert "the limit of 1 s was reached" in words
    assert ticket.results[0].nfe < 4000


# --- what may be asked --------------------------------------------------------------------------

ABSURD = {
    "empty prompt": ({"prompt": " \n"}, "non-empty text"),
    "endless prompt": ({"prompt": "a" * 1001}, "1001 characters; at most 1000"),
    "rows": ({"nfe": 10**9}, r"nfe must lie in \[1, 4000\]"),
    "no rows": ({"nfe": 0}, "nfe must lie in"),
    "half a row": ({"nfe": 1.5}, "whole number"),
    "rows as text": ({"nfe": "many"}, "nfe must be a number"),
    "no number": ({"nfe": float("nan")}, "nfe must lie in"),
    "seed": ({"seed": 1e300}, "seed must lie in"),
    "steps": ({"call": {"num_inference_steps": 10**6}}, r"num_inference_steps must lie in \[1, "),
    "side": ({"call": {"height": 10**6}}, "height must lie in"),
    "call argument": ({"call": {"callback_on_step_end": 1}}, "cannot be set here"),
    "particles": ({"options": {"n_particles": 10**6}}, "at most 256"),
    "no particles": ({"options": {"n_particles": -3}}, "n_particles must be at least 1"),
    "samples": ({"method": "best_of_n", "options": {"n": 10**6}}, "at most 256"),
    "own grid": ({"options": {"grid": "karras", "steps": 10**6}}, "steps=1000000.*at most 100"),
    "method": ({"method": "fkk"}, "Did you mean 'fk'"),
    "preset": ({"preset": "huge"}, "preset"),
    "model": ({"model": "/etc"}, "This server offers 'stickers', not '/etc'"),
    "unknown reward": ({"rewards": {"gold": 1.0}}, "gold"),
    "reward that calls": ({"rewards": {"remote": 1.0}}, "remote"),
    "no reward": ({"rewards": {}}, "at least one reward"),
    "weight": ({"rewards": {"clip": float("inf")}}, "weight of clip must lie in"),
    "judge and party": ({"heldout": ["brightness"]}, "cannot be held out too"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_what_is_absurd_is_refused_before_it_is_queued(host, name):
    changes, words = ABSURD[name]
    with pytest.raises(SteeringError, match=f"(?s){words}"):
        order(host, **changes)


def test_a_run_may_not_do_too_much_beside_the_network(host):
    most = Cost(nfe=4000, reward_calls=16_000, decodes=16_000)
    host.offer.check_cost(most, Budget(nfe=4000))
    for name in ("nfe", "reward_calls", "decodes"):
        with pytest.raises(OptionError, match="These options need"):
            host.offer.check_cost(replace(most, **{name: 20_000}), Budget(nfe=4000))


@pytest.mark.parametrize(
    ("method", "size"), [("fk", "n_particles=2000"), ("best_of_n", "n=2000"), ("evo", "n_partic")]
)
def test_a_population_made_by_the_budget_keeps_to_the_limit_too(host, method, size):
    large = order(host, method=method, nfe=4000, call={"num_inference_steps": 1})
    ticket = ended(host.submit("ann", large))
    assert (ticket.state, ticket.live.nfe) == ("failed", 0)
    assert size in ticket.error
    assert "at most 256. Lower the budget (a sample takes 2 network rows)" in ticket.error


def test_a_comparison_has_as_many_samples_as_the_limit_allows():
    with hosting(particles=3) as host:
        run = order(host, nfe=16, options={"n_particles": 2}, call={"num_inference_steps": 1})
        compared = ended(host.submit("ann", actions.baseline(run, 16)))
        assert compared.state == "finished"
        assert sorted(compared.results[0].summary["slots"]) == [0, 1, 2]
        few = ended(host.submit("ann", actions.baseline(run, 4)))
        assert sorted(few.results[0].summary["slots"]) == [0, 1]


def test_no_guidance_is_a_choice_and_no_steps_are_none(host):
    call = order(host, call={"guidance_scale": 0, "num_inference_steps": 0}).call
    assert (call["guidance_scale"], call["num_inference_steps"]) == (0.0, 20)


# --- uploads ------------------------------------------------------------------------------------


def picture(path, side=8, kind="PNG"):
    Image.new("RGB", (side, side), "red").save(path, format=kind)
    return path


def bomb(path, side):
    """A PNG that says it is large and holds next to nothing."""
    parts = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(b""), b""
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in zip((b"IHDR", b"IDAT", b"IEND"), parts, strict=True):
        data += struct.pack(">I", len(part)) + name + part
        data += struct.pack(">I", zlib.crc32(name + part))
    path.write_bytes(data)
    return path


def damaged(path):
    whole = picture(path, 64).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def text(path):
    path.write_text("not a picture")
    return path


def large(path):
    with path.open("wb") as file:
        file.truncate(50 * 2**20)
    return path


UPLOADS = {
    "text": (text, "is no picture"),
    "gif": (lambda p: picture(p, kind="GIF"), "is no picture"),
    "damaged": (damaged, "is no picture"),
    "large": (lambda p: bomb(p, 5_000), "5000 x 5000 pixels, which is too many"),
    "bomb": (lambda p: bomb(p, 30_000), "more pixels than are taken"),
    "50 MB": (large, "50.0 MiB; at most 10 MiB"),
    "gone": (lambda p: p, "The file is gone"),
    "folder": (lambda p: p.mkdir() or p, "The file is gone"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads_are_judged_by_what_they_hold(tmp_path, name):
    make, words = UPLOADS[name]
    with pytest.raises(OptionError, match=words):
        actions.check_upload(make(tmp_path / "picture.png"), Limits())
    assert actions.check_upload(picture(tmp_path / "good.txt"), Limits()).name == "good.txt"


@pytest.mark.parametrize("nothing", [None, 3, [], {"path": "/etc/passwd"}])
def test_no_file_is_no_upload(nothing):
    with pytest.raises(OptionError, match="Choose a file first"):
        actions.check_upload(nothing, Limits())


# --- the model folder ---------------------------------------------------------------------------


def test_a_model_folder_that_vanishes_is_a_message_and_a_log_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="steering.demo")
    folder = tmp_path / "model"
    shutil.copytree(FOLDERS["stickers-sd"], folder)
    with hosting(str(folder)) as host:
        hidden = folder.rename(tmp_path / "elsewhere")
        ticket = ended(host.submit("ann", order(host, model=str(folder))))
        assert ticket.state == "failed"
        assert f"Model {str(folder)!r} could not be opened" in ticket.error
        assert "run 1 of ann" in caplog.text
        assert ended(host.submit("ann", order(host))).state == "finished"
        hidden.rename(folder)

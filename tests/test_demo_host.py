"""The demo behind its page: sessions, queue, limits, uploads and recipes from anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytest.importorskip("gradio")

import gradio as gr

from steering.apps import demo_actions as actions
from steering.apps import demo_views as views
from steering.apps.demo_buttons import buttons
from steering.apps.demo_forms import option_fields, read_options
from steering.apps.demo_order import COMPOSED, Busy, Limits, Offer, offered_rewards
from steering.errors import OptionError, RecipeError, SteeringError
from steering.ledger import Budget
from steering.method import Cost, build_method, method_options
from steering.recipe import read
from steering.registry import METHODS
from steering.stickers.load import FOLDERS
from tests.demo_world import eventually, held, hosting, order

GATED = {"rewards": {"gated": 1.0}}


@pytest.fixture(scope="module")
def host():
    with hosting(waiting=3, per_session=2, seconds=120.0) as found:
        yield found


@pytest.fixture(autouse=True)
def _quiet_afterwards(request):
    yield
    if "host" in request.fixturenames:
        shared = request.getfixturevalue("host")
        for session in list(shared._tickets):
            shared.leave(session)
        eventually(lambda: shared.load == (0, 0), "the host is idle")


def ended(*tickets):
    for ticket in tickets:
        eventually(lambda ticket=ticket: ticket.over, f"run {ticket.number} is over")
    return tickets[0] if len(tickets) == 1 else tickets


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


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


# --- recipes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(host, tmp_path_factory):
    """A PNG with its recipe, kept beyond its session."""
    ticket = ended(host.submit("maker", order(host, rewards={"clip": 1.0})))
    kept = tmp_path_factory.mktemp("made") / "apple.png"
    shutil.copy(ticket.results[0].files[0], kept)
    return kept


def test_a_picture_made_alone_repeats_pixel_by_pixel(host, made):
    file, recipe, again = actions.replay_order(made, host.offer)
    ticket = ended(host.submit("ann", again, pictures=recipe.image + 1))
    assert actions.verdict(file, recipe, ticket) == (True, "Identical: every pixel is the same.")
    assert (pixels(file) == pixels(ticket.results[0].files[0])).all()


def test_an_edited_picture_is_told_from_its_repeat(host, made, tmp_path):
    with Image.open(made) as image:
        info = PngInfo()
        for key, value in image.text.items():
            info.add_itxt(key, value)
        image.putpixel((0, 0), (0, 255, 0))
        image.save(tmp_path / "edited.png", pnginfo=info)
    file, recipe, again = actions.replay_order(tmp_path / "edited.png", host.offer)
    same, words = actions.verdict(file, recipe, ended(host.submit("ann", again)))
    assert not same
    assert "The pixels were edited" in words


def test_what_was_not_the_same_is_named_before_an_edit_is(host, made, tmp_path):
    ticket = ended(host.submit("ann", host.offer.repeat(read(made))))
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png")
    here, recipe = read(made).engine, read(made)
    for changes, words in (
        ({"threads": here["threads"] + 3}, f"threads {here['threads'] + 3} (here"),
        ({"max_batch": 7}, f"max_batch 7 (here {here['max_batch']})"),
        ({"deduplicate": not here["deduplicate"]}, "deduplicate"),
        ({"company": 2}, "other runs shared its batches"),
    ):
        other = replace(recipe, engine={**here, **changes})
        same, said = actions.verdict(tmp_path / "other.png", other, ticket)
        assert not same
        assert words in said
        assert "need not be an edit" in said
    older = replace(recipe, versions={**recipe.versions, "torch": "1.0"})
    assert "torch 1.0 (here" in actions.verdict(tmp_path / "other.png", older, ticket)[1]
    assert "were edited" in actions.verdict(tmp_path / "other.png", recipe, ticket)[1]


def test_a_repeat_tells_the_reward_what_the_recipe_told_it(host, made):
    told = replace(host.offer, rewards=(*host.offer.rewards, "told"))
    recipe = replace(read(made), reward="told", metadata=[{"times": -3.0}])
    assert host.offer.repeat(read(made)).metadata is None
    outcome = ended(host.submit("ann", told.repeat(recipe))).results[0]
    assert -3.0 < outcome.reward < -0.1
    assert outcome.recipe["metadata"] == recipe.metadata
    lost = replace(recipe, metadata=[{"$unavailable": "Tensor (3,)"}])
    with pytest.raises(RecipeError, match="could not store"):
        told.repeat(lost)
    with pytest.raises(RecipeError, match="longer than"):
        told.repeat(replace(recipe, metadata=["a" * 10**6]))


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"class": "DDIMScheduler", "config": {}}, "its scheduler is DDIMScheduler, this"),
        ({"config": {"shift": 9.0}}, r"other settings than here \(shift\)"),
        ("Euler", "Damaged recipe"),
    ],
)
def test_a_recipe_with_another_scheduler_is_refused(host, made, scheduler, words):
    recipe = read(made)
    own = recipe.model["scheduler"]
    if isinstance(scheduler, dict):
        config = {**own["config"], **scheduler["config"]}
        scheduler = {**own, **scheduler, "config": config}
    other = replace(recipe, model={**recipe.model, "scheduler": scheduler})
    ticket = ended(host.submit("ann", host.offer.repeat(other)))
    assert (ticket.state, ticket.live.nfe) == ("failed", 0)
    assert re.search(words, ticket.error)


RECIPES = {
    "address": ({"reward": "remote(url=http://10.0.0.1)"}, "not offered by this server"),
    "file": ({"reward": "aesthetic(head=/etc/passwd)"}, "not offered by this server"),
    "weights": ({"reward": "clip(pretrained=/etc)"}, "lead to files or addresses"),
    "judge's weights": ({"heldout": ["clip(pretrained=/etc)"]}, "lead to files or addresses"),
    "endless": ({"reward": "clip(scale=1" + 600 * "0" + ")"}, "not one that is read"),
    "options": ({"method": {"name": "fk", "options": [1]}}, "options of its method"),
    "not offered": ({"reward": "jpeg"}, "not offered by this server"),
    "code": ({"reward": "python:os.system"}, "(?i)python"),
    "model": ({"model": {"source": "/etc"}}, "This server offers"),
    "rows": ({"budget": {"nfe": 10**9}}, "nfe must lie in"),
    "particles": ({"method": {"name": "fk", "options": {"n_particles": 999}}}, "at most 256"),
    "steps": ({"call": {"num_inference_steps": 10**6}}, "num_inference_steps must lie in"),
    "many": ({"prompts": ["a"] * 17, "seeds": [0] * 17}, "17 prompts, too many"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_from_anywhere_reach_no_further_than_the_form(host, made, name):
    changes, words = RECIPES[name]
    recipe = replace(read(made), **changes)
    with pytest.raises(SteeringError, match=words):
        repeat(host, recipe)


EVERY = Offer(rewards=(*offered_rewards(), *COMPOSED))
"""What an operator offers at most."""
PATH = "lead to files or addresses"
REACHING = {
    "clip(pretrained=/tmp/weights.pt)": PATH,
    "clip(model=local-dir:/etc)": PATH,
    "clip(model=hf-hub:a/b)": PATH,
    "clip(model='/etc')": PATH,
    "clip(device=cuda:7)": PATH,
    "imagereward(tokenizer=/etc)": PATH,
    "pickscore(tokenizer=/etc)": PATH,
    "pickscore(model=stickers)": PATH,
    "vqascore(vision=a/b, tokenizer=/etc)": PATH,
    "vqascore(question='what?')": PATH,
    "hps3(base=/etc)": PATH,
    "hps3(rubric=/etc/passwd)": PATH,
    "videoreward(base=/etc)": PATH,
    "count(model=/etc)": PATH,
    "vlm(url=http://127.0.0.1:8000)": PATH,
    "unified(template=/etc/passwd)": PATH,
    "remote(url=http://10.0.0.1)": "not offered",
    "2*brightness - (jpeg + 0.5*clip(pretrained=/etc))/2": PATH,
    "zsum(clip, aesthetic, calibration=/etc/passwd)": PATH,
    "zsum(brightness, min(jpeg, aesthetic(head=/etc)))": PATH,
    "frames(clip(pretrained=/etc), every=2)": PATH,
    "category(clip, weights=/etc/passwd)": PATH,
    "category(clip, categories=/etc/passwd)": PATH,
    "vqascore(batch_size=100000000)": "between -100 and 100",
    "clip(batch_size=-1000)": "between -100 and 100",
    "vlm(high=1000)": "between -100 and 100",
    "clip(scale=1e30)": "between -1000 and 1000",
    "lexicographic(clip, jpeg, step=nan)": "between -1000 and 1000",
    " + ".join(["brightness"] * 17): "more than 16 rewards",
}
HARMLESS = (
    "2*clip(model=stickers, scale=100) - brightness/3",
    "clip(model=ViT-L-14-quickgelu, pretrained=openai)",  # what clip is anyway
    "diversity(features=clip, batch_size=2)",
    "hps(antialias=false)",
    "presence(mode=smooth, threshold=0.5)",
    "presence(threshold=none)",
    "unified(max_new_tokens=2048)",
    "vqascore(precision=fp16)",
    "frames(min(brightness, jpeg(quality=80)), every=2, reduce=min)",
)


@pytest.mark.parametrize("spec", REACHING)
def test_rewards_of_a_recipe_lead_to_no_file_and_no_address(made, spec):
    for change in ({"reward": spec}, {"heldout": [spec]}):
        with pytest.raises(RecipeError, match=REACHING[spec]):
            EVERY.repeat(replace(read(made), **change))


@pytest.mark.parametrize("spec", HARMLESS)
def test_numbers_flags_and_choices_of_a_recipe_are_repeated(made, spec):
    assert EVERY.repeat(replace(read(made), reward=spec)).reward == spec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transition": "/etc/passwd"}, "transition='/etc/passwd'"),
        ({"potential": {"$unavailable": "function"}}, "potential"),
        ({"guidance": "/etc/passwd"}, "guidance='/etc/passwd'"),
        ({"guidance": {"preset": "/etc/passwd"}}, "guidance '/etc/passwd' is unknown"),
        ({"guidance": {"space": "/etc/passwd"}}, "of its guidance"),
        ({"guidance": {"n_draws": 10**9}}, "n_draws=.* of its guidance"),
        ({"n_particles": "4"}, "n_particles"),
        ({"reward_scale": 1e300}, "reward_scale"),
        ({"checkpoints": ["/etc/passwd"]}, "checkpoints"),
        ({"checkpoints": [[0.5]]}, "checkpoints"),
        ({"steps": True}, "steps"),
    ],
)
def test_options_of_a_recipes_method_are_numbers_flags_and_choices(made, options, words):
    recipe = read(made)
    method = {"name": "fk", "options": {**recipe.method["options"], **options}}
    with pytest.raises(RecipeError, match=words):
        EVERY.repeat(replace(recipe, method=method))


@pytest.mark.parametrize("name", METHODS.names())
def test_every_methods_own_recipe_is_repeated(made, name):
    presets = getattr(METHODS.get(name), "presets", {})
    built = [build_method(name), *(build_method(f"{name}/{p}") for p in presets)]
    for method in built:
        options = json.loads(json.dumps(method_options(method)))
        order = EVERY.repeat(replace(read(made), method={"name": name, "options": options}))
        assert build_method(name, order.options) == method


def repeat(host, recipe):
    """Some are refused at once, the others by the worker."""
    raise OptionError(ended(host.submit("ann", host.offer.repeat(recipe))).error)


# --- the form -----------------------------------------------------------------------------------


def test_numbers_that_may_be_left_out_are_written_as_text():
    fields = {f.name: f for f in option_fields(METHODS.get("fk"))}
    assert fields["eta_end"].shown(None) == ""
    assert fields["ess_threshold"].shown(0.5) == 0.5
    given = {"eta_end": "0.25", "reward_scale": "3", "steps": " 8 ", "n_particles": ""}
    assert read_options(METHODS.get("fk"), given) == {
        "eta_end": 0.25, "reward_scale": 3.0, "steps": 8,
    }  # fmt: skip
    with pytest.raises(OptionError, match="'steps' takes a number, got 'eight'"):
        fields["steps"].read("eight")


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_runs_from_its_untouched_form(host, name):
    fields = option_fields(METHODS.get(name))
    untouched = {f.name: f.shown(f.default) for f in fields}
    assert read_options(METHODS.get(name), untouched) == {}
    assert None not in [f.shown(f.default) for f in fields if f.kind in ("whole", "number")]
    wrong = [f.name for f in fields if f.kind == "choice" and untouched[f.name] not in f.choices]
    assert wrong == []
    host.offer.method(name, {})


PRESETS = [(name, p) for name in METHODS.names() for p in METHODS.get(name).presets]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_passes_through_the_form_unchanged(name, preset):
    cls = METHODS.get(name)
    given = cls.presets[preset]
    fields = option_fields(cls)
    shown = {f.name: f.shown(given.get(f.name, f.default)) for f in fields}
    assert [f.name for f in fields if f.kind == "choice" and shown[f.name] not in f.choices] == []
    assert build_method(name, read_options(cls, shown)) == build_method(f"{name}/{preset}")


def test_a_number_alone_is_a_list_only_where_it_must_be_one():
    options = {"quota": " 22 ", "level_times": "0.5"}
    assert read_options(METHODS.get("rbf"), options) == {"quota": 22, "level_times": [0.5]}
    assert read_options(METHODS.get("rbf"), {"quota": "3, 4"}) == {"quota": [3, 4]}
    assert read_options(METHODS.get("evo"), {"n_particles": "9"}) == {"n_particles": 9}


# --- views --------------------------------------------------------------------------------------


def test_texts_of_people_stay_text():
    evil = "<script>alert(1)</script>"
    shown = views.message(evil) + views.table([evil], [[evil]], evil) + views.recipe({evil: evil})
    assert "<script" not in shown
    assert json.dumps(evil)[1:-1].replace("<", "&lt;").replace(">", "&gt;") in shown


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


# --- buttons ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [(None, ""), (OptionError("too many"), "too many"), (KeyError("x"), "inside the server")],
)
def test_start_comes_back_however_a_run_ends(error, words):
    with gr.Blocks():
        pressed = buttons("Steer", "Steering ...", "steer", cancels="cancel")
        status = gr.HTML()

    async def work():
        yield {status: "on its way"}
        if error is not None:
            raise error

    async def shown():
        return [update async for update in pressed.during("ann", work(), status)]

    def seen(update):
        return [(update[b].value, update[b].interactive) for b in pressed.listed()]

    for _ in range(2):  # the second press counts like the first
        first, running, *told, last = asyncio.run(shown())
        assert seen(first)[0] == ("Steering ...", False)
        assert seen(first)[1][1] is True
        assert running == {status: "on its way"}
        assert len(told) == (error is not None)
        assert all(words in update[status] for update in told)
        assert seen(last)[0] == ("Steer", True)
        assert seen(last)[1][1] is False


def test_a_press_in_mid_run_starts_nothing_and_a_form_drawn_anew_waits():
    with gr.Blocks():
        pressed = buttons("Steer", "Steering ...", "steer", cancels="cancel")
        status = gr.HTML()
    begun = []

    async def work(name):
        begun.append(name)
        yield {status: name}

    async def story():
        run = pressed.during("ann", work("first"), status)
        await anext(run)
        await anext(run)
        second = [u async for u in pressed.during("ann", work("second"), status)]
        assert [list(update) for update in second] == [[status]]  # no button is touched
        others = [u async for u in pressed.during("bob", work("bob"), status)]
        assert len(others) == 3
        ready = asyncio.ensure_future(pressed.ready(SimpleNamespace(session_hash="ann")))
        await asyncio.sleep(0.5)
        assert not ready.done()
        assert len([u async for u in run]) == 1
        start, cancel = await asyncio.wait_for(ready, 10)
        assert (start.interactive, cancel.interactive) == (True, False)

    asyncio.run(story())
    assert begun == ["first", "bob"]

"""The demo's form, views and buttons, without a page."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import gradio as gr

from steering.apps import demo_views as views
from steering.apps.demo_buttons import buttons
from steering.apps.demo_forms import option_fields, read_options
from steering.errors import OptionError
from steering.method import build_method
from steering.registry import METHODS
from tests import demo_world

host = demo_world.host


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

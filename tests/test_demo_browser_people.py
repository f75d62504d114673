"""The demo in a real browser: several people, their mistakes, their keyboards and windows."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from playwright.sync_api import expect

import steering
from steering.recipe import read
from tests import demo_visitor
from tests.demo_visitor import STEER, Visitor
from tests.demo_world import PROMPT, eventually, held, pixels

SERIOUS = ("serious", "critical")
TABS = ("Steer", "Compare", "Replay", "Score")
# One server and one Chromium for all tests of this file.
vanishing, server, browser = demo_visitor.vanishing, demo_visitor.server, demo_visitor.browser
visitor, made = demo_visitor.visitor, demo_visitor.made


# --- several people -----------------------------------------------------------------------------


def test_two_browsers_at_once_get_their_own_results(browser, server, tmp_path):
    own = [("a photo of a red apple", 3), ("a photo of a blue clock", 4)]
    visitors = [Visitor(browser, server[1]) for _ in own]
    with held() as gate:
        for visitor, (prompt, seed) in zip(visitors, own, strict=True):
            visitor.guide("gated")
            visitor.ask(prompt, seed=seed, nfe=64)
            visitor.unfold("Model call and verifiers")
            visitor.page.get_by_label("Compare with unsteered").uncheck()
            visitor.steer()
            visitor.says("Running" if seed == 3 else "Starting")
        visitors[0].says("First estimates", "#best")
        gate.open()
        for visitor in visitors:
            visitor.says("Finished")
    pipe = steering.load("stickers")
    for visitor, (prompt, seed) in zip(visitors, own, strict=True):
        file = visitor.download(tmp_path)
        recipe = read(file)
        assert (recipe.prompts, recipe.seeds) == ([prompt], [seed])
        assert recipe.engine["company"] == 1  # they shared the engine
        alone = steering.steer(
            pipe, prompt, seed=seed, nfe=64, method="fk", num_inference_steps=8,
            reward=lambda images: images.mean((1, 2, 3)),
        )  # fmt: skip
        difference = pixels(file) - np.asarray(alone.pictures()[0], dtype=np.int16)
        assert np.abs(difference).mean() < 3  # rounding depends on the batch; pictures do not
        visitor.context.close()


def test_a_closed_tab_stops_its_run_and_frees_the_queue(browser, server, visitor):
    host, address = server
    leaving = Visitor(browser, address)
    leaving.guide("gated")
    leaving.ask(nfe=640)
    with held() as gate:
        leaving.steer()
        leaving.says("First estimates", "#best")
        (gone,) = host._running.values()
        visitor.ask(steps=7)  # called in another way, so it must wait for the first to end
        visitor.steer()
        visitor.says("Starting")
        leaving.context.close()
        eventually(gone.cancel.is_set, "the server knows that the tab is closed")
        gate.open()
        visitor.says("Finished")
    assert gone.state == "stopped"
    assert gone.live.nfe < 640
    assert not gone.folder.parent.exists()
    eventually(lambda: host.load == (0, 0), "nothing is left in the queue")


def test_a_closed_tab_takes_its_pictures_and_uploads_along(browser, server, tmp_path):
    host, address = server
    before = set(host.root.rglob("*.png"))
    leaving = Visitor(browser, address)
    leaving.ask(nfe=16)
    leaving.steer()
    leaving.says("Finished")
    run = leaving.download(tmp_path)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (9, 9), "teal").save(plain)
    leaving.tab("Replay")
    leaving.at("#png input[type=file]").set_input_files(run)
    leaving.says("carries its recipe", "#replay-status")
    leaving.tab("Score")
    leaving.at("#pictures input[type=file]").set_input_files([plain])
    uploads = host._uploads  # a file is on the disk before the page tells whose it is
    eventually(
        lambda: any(p.name == "plain.png" for files in list(uploads.values()) for p in files),
        "the picture is there",
    )
    own = set(host.root.rglob("*.png")) - before
    assert {run.name, "plain.png"} <= {p.name for p in own}
    leaving.context.close()
    eventually(lambda: not any(p.exists() for p in own), "its files are gone")


# --- bad input ----------------------------------------------------------------------------------


def test_what_is_wrong_in_the_form_is_a_message_and_the_server_stays_up(visitor):
    visitor.ask()

    def refused(words: str) -> None:
        visitor.steer()
        expect(visitor.at("#status [role=alert]")).to_contain_text(words)
        visitor.ready(*STEER)

    visitor.at("#prompt textarea").fill("  ")
    refused("non-empty text")
    visitor.at("#prompt textarea").fill("a" * 1001)
    refused("at most 1000 are taken")
    visitor.at("#prompt textarea").fill(PROMPT)
    visitor.number("Budget", 10**9)
    refused("nfe must lie in [1, 4000]")
    visitor.number("Budget", 64)
    visitor.number("Denoising steps", 10**6)
    refused("num_inference_steps must lie in [1, 100]")
    visitor.number("Denoising steps", 8)
    visitor.unfold("Options of fk")
    visitor.number("n particles", -3)
    refused("n_particles must be at least 1, got -3")
    visitor.number("n particles", "many")
    refused("Option 'n_particles' takes a number, got 'many'")
    visitor.number("n particles", 10**6)
    refused("at most 256")
    visitor.number("n particles", 2)
    visitor.page.get_by_label("Model", exact=True).locator("visible=true").fill("../../etc/passwd")
    visitor.page.keyboard.press("Enter")
    refused("not '../../etc/passwd'")
    visitor.page.get_by_label("Model", exact=True).locator("visible=true").fill("stickers")
    visitor.page.keyboard.press("Enter")
    visitor.steer()
    visitor.says("Finished: 32 of 64")


def test_wrong_uploads_are_messages_and_nothing_leaves_the_folder(visitor, server, made, tmp_path):
    host, _ = server
    text = {"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture"}
    evil = {**text, "name": "../../<img src=x onerror=alert(1)>.png"}
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(50 * 2**20)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    visitor.tab("Replay")
    upload, alert = visitor.at("#png input[type=file]"), visitor.at("#replay-status [role=alert]")
    for file, words in (
        (text, "notes.png is no picture"),
        (plain, "a PNG without a recipe"),
        (evil, "onerror=alert(1).png is no picture"),
    ):
        upload.set_input_files(file)
        expect(alert).to_contain_text(words)
        visitor.at("#again").click()
        expect(alert).to_contain_text(words)
        visitor.at("#png").get_by_label("Clear").click()
    upload.set_input_files(large)
    expect(visitor.page.get_by_text("exceed the maximum allowed size of 10.0 Mb")).to_be_visible()
    upload.set_input_files(made)
    visitor.says("carries its recipe", "#replay-status")

    visitor.tab("Score")
    visitor.at("#pictures input[type=file]").set_input_files([evil, text])
    visitor.at("#score").click()
    visitor.says("is no picture", "#score-status")
    strays = list(host.root.parent.rglob("*onerror*"))
    assert strays  # the name reached the disk: what follows can fail
    assert all(stray.parent.parent == host.root for stray in strays)
    assert list(host.root.parent.iterdir()) == [host.root]


def test_a_vanished_model_folder_is_a_message_and_a_log_line(visitor, vanishing, caplog):
    caplog.set_level(logging.INFO, logger="steering.demo")
    hidden = vanishing.rename(vanishing.with_name("elsewhere"))
    visitor.ask(steps=4, nfe=16)
    visitor.guide("brightness")
    model = visitor.page.get_by_label("Model", exact=True).locator("visible=true")
    model.click()
    visitor.page.get_by_role("option", name=str(vanishing)).click()
    visitor.steer()
    expect(visitor.at("#status [role=alert]")).to_contain_text("could not be opened")
    visitor.ready(*STEER)
    assert f"Model {str(vanishing)!r} could not be opened" in caplog.text
    hidden.rename(vanishing)
    visitor.steer()
    visitor.says("Finished")
    expect(visitor.page.get_by_text("Best of 2")).to_be_visible()
    vanishing.rename(hidden)  # once open it lives in memory
    visitor.number("Budget", 24)
    visitor.steer()
    visitor.says("Finished: 24 of 24")


# --- everybody ----------------------------------------------------------------------------------


def serious(page) -> list[str]:
    """What axe-core finds wrong and calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    # A button that comes back fades in: its contrast on the way is nobody's.
    page.wait_for_function("document.getAnimations().every(a => a.playState !== 'running')")
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in SERIOUS]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_tab(browser, server, made, scheme):
    visitor = Visitor(browser, server[1], color_scheme=scheme)
    page = visitor.page
    for name in TABS if scheme == "light" else ():
        visitor.tab(name)
        assert serious(page) == [], f"{name}, untouched"
    visitor.tab("Steer")
    visitor.ask("", nfe=32, steps=4)
    visitor.steer()
    expect(visitor.at("#status [role=alert]")).to_be_visible()
    assert serious(page) == [], "Steer with a message"
    visitor.ask(nfe=32, steps=4)
    visitor.unfold("Options of fk")
    visitor.unfold("The same run elsewhere")
    visitor.steer()
    expect(visitor.at("#result figure")).to_have_count(3)
    assert serious(page) == [], "Steer after a run"
    visitor.tab("Compare")
    visitor.number("Budget of each", 32)
    visitor.number("Steps", 4)
    visitor.at("#compare").click()
    expect(visitor.at("#compare-result figure.st-card")).to_have_count(3)
    assert serious(page) == [], "Compare after a run"
    visitor.tab("Replay")
    visitor.at("#png input[type=file]").set_input_files(made)
    visitor.says("carries its recipe", "#replay-status")
    visitor.at("#again").click()
    visitor.says("Identical", "#replay-status")
    assert serious(page) == [], "Replay after a run"
    visitor.tab("Score")
    visitor.at("#pictures input[type=file]").set_input_files(made)
    expect(visitor.at("#pictures")).to_contain_text("apple")
    visitor.at("#score").click()
    expect(visitor.at("#score-status table")).to_be_visible()
    assert serious(page) == [], "Score after a run"
    visitor.context.close()


def test_the_main_job_by_keyboard_alone(visitor, tmp_path):
    focused = "document.activeElement"

    def tab_to(what: str, most: int = 60) -> None:
        for _ in range(most):
            visitor.page.keyboard.press("Tab")
            if visitor.page.evaluate(
                f"{focused}.matches('{what}') || {focused}.closest('{what}')"
            ):
                return
        raise AssertionError(f"{what} is not reached by Tab")

    tab_to("#prompt")
    visitor.page.keyboard.press("ControlOrMeta+a")
    visitor.page.keyboard.type("a photo of a blue clock")
    tab_to("#nfe")
    visitor.page.keyboard.press("ControlOrMeta+a")
    visitor.page.keyboard.type("80")
    tab_to("#steer")
    ring = visitor.page.evaluate(
        f"(s => s.outlineStyle + s.boxShadow)(getComputedStyle({focused}))"
    )
    assert ring != "nonenone"  # the focus can be seen
    visitor.page.keyboard.press("Enter")
    expect(visitor.at("#result figure")).to_have_count(3)
    tab_to("#download")
    with visitor.page.expect_download() as waiting:
        visitor.page.keyboard.press("Enter")
    waiting.value.save_as(tmp_path / "clock.png")
    recipe = read(tmp_path / "clock.png")
    assert (recipe.prompts, recipe.budget["nfe"]) == (["a photo of a blue clock"], 80)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_tab_is_wider_than_the_window(visitor, width):
    visitor.page.set_viewport_size({"width": width, "height": 800})
    for name in TABS:
        visitor.tab(name)
        wide = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, name

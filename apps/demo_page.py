"""The other tabs of the page and its style."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from steering.apps import demo_actions as actions
from steering.apps import demo_views as views
from steering.apps.demo_api import refusal, session_of
from steering.apps.demo_buttons import QUIET, buttons
from steering.apps.demo_controls import (
    EXAMPLE,
    heldout_control,
    model_control,
    rewards_control,
)
from steering.apps.demo_score import score
from steering.apps.demo_session import Host
from steering.apps.demo_steer import STOPPED, baseline_entries
from steering.registry import METHODS
from steering.result import finite

HEAD = """<meta name="color-scheme" content="light dark">
<script>
// Groups of checkboxes have a caption that nothing ties to them.
new MutationObserver(() => {
  for (const group of document.querySelectorAll("fieldset:not([aria-label])")) {
    const caption = group.querySelector("[data-testid=block-info]");
    if (caption) group.setAttribute("aria-label", caption.textContent.trim());
  }
}).observe(document, { childList: true, subtree: true });
</script>"""
CSS = """
.st-note { padding: 8px 12px; border-left: 4px solid #1d4ed8; margin: 4px 0;
  background: #eff6ff; color: #0f172a; }
.st-note.st-bad { border-color: #b91c1c; background: #fef2f2; color: #7f1d1d; }
.st-note progress { display: block; width: 100%; margin-top: 6px; height: 10px; }
.st-large { width: 100%; max-width: 256px; image-rendering: auto; border-radius: 6px; }
.st-tiles, .st-cards { display: flex; flex-wrap: wrap; gap: 10px; }
.st-tiles figure { margin: 0; width: 84px; text-align: center; font-size: 13px; }
.st-tiles img { width: 84px; border-radius: 4px; }
.st-card { margin: 0; width: 220px; }
.st-card table, .st-table { border-collapse: collapse; font-size: 14px; width: 100%; }
.st-card th, .st-table th { text-align: left; font-weight: 600; padding: 2px 8px 2px 0; }
.st-card td, .st-table td { padding: 2px 8px 2px 0; }
.st-scroll { overflow-x: auto; }
.st-svg { width: 100%; max-width: 640px; background: #ffffff; border-radius: 6px; }
.st-svg text { font: 12px system-ui, sans-serif; fill: #0f172a; }
.st-point summary { cursor: pointer; padding: 4px 0; }
.st-many .wrap { max-height: 180px; overflow-y: auto; }
#best img:not(.st-large) { width: 96px; margin-right: 8px; border-radius: 4px; }
figure { margin: 6px 0; }
button.primary { background: #1d4ed8 !important; color: #ffffff !important; }
.or { color: #52525b !important; }
.st-recipe { max-height: 320px; overflow: auto; font-size: 13px; }
/* a button in a button, with a label that is never translated; Clear and choose again instead */
#pictures .icon-button:has(button) { display: none; }
.dark .or { color: #d4d4d8 !important; }
.info-text, footer a, footer button, footer { color: #52525b !important; }
.dark .info-text, .dark footer a, .dark footer button { color: #d4d4d8 !important; }
"""


def compare_tab(host: Host) -> None:
    """Several methods on one prompt at one budget."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(EXAMPLE, label="Prompt", max_lines=4, interactive=True)
            methods = gr.CheckboxGroup(
                METHODS.names(),
                value=["fk"],
                label="Methods beside best-of-N",
                elem_classes="st-many",
                interactive=True,
            )
            model = model_control(host)
            rewards = rewards_control(host)
            heldout = heldout_control(host)
            with gr.Row():
                nfe, seed = (
                    gr.Number(value, label=label, precision=0, min_width=120, interactive=True)
                    for value, label in ((320, "Budget of each"), (0, "Seed"))
                )
                steps = gr.Textbox("", label="Steps", min_width=120, interactive=True)
            pressed = buttons("Compare", "Comparing ...", "compare", cancels="compare-cancel")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(elem_id="compare-status")
            result = gr.HTML(elem_id="compare-result")

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:  # noqa: ANN401
        text, chosen, name, guides, verifiers, rows, number, count = values
        given = {
            "model": name,
            "rewards": dict.fromkeys(guides, 1.0),
            "heldout": verifiers,
            "nfe": rows,
            "seed": number,
            "call": {"num_inference_steps": count},
        }
        yield {status: "", result: ""}
        try:
            tickets = actions.compare(host, session_of(request), text, chosen, given)
        except Exception as error:
            yield {status: views.message(refusal(error), wrong=True)}
            return
        async for snaps in actions.follow(host, *tickets.values()):
            lines = zip(tickets.items(), snaps, strict=True)
            yield {
                status: "".join(
                    f"<strong>{n}</strong>{views.status(t, s, host.ahead(t))}"
                    for (n, t), s in lines
                )
            }
        yield {result: _compared(tickets)}

    inputs = [prompt, methods, model, rewards, heldout, nfe, seed, steps]
    pressed.on_press(run, inputs, [status, result], api_visibility="private")
    pressed.on_cancel(host, status)


def _compared(tickets: dict[str, Any]) -> str:
    entries, lines = [], []
    for name, ticket in tickets.items():
        if not ticket.results:
            continue
        outcome, whole = ticket.results[0], ticket.state == "finished"
        if name == "best_of_n" and whole:
            entries += baseline_entries(ticket)
            lines.append(("best-of-N", views.best_of_n_line(outcome)))
            continue
        title = "best-of-N" if name == "best_of_n" else name
        png = views.file_bytes(outcome.files[0])
        if png is not None:  # of a stopped run only the best is kept, and no unsteered sample
            entries.append((title + STOPPED * (not whole), png, views.facts(outcome)))
        lines.append((title, ticket.live.snapshot()["curve"]))
    return views.columns(entries) + views.reward_plot([(n, p) for n, p in lines if p])


def replay_tab(host: Host) -> None:
    """Drop a PNG, see its recipe, run it again."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = gr.File(
                label="PNG made by this library",
                file_types=[".png"],
                elem_id="png",
                interactive=True,
            )
            pressed = buttons("Run it again", "Running ...", "again", cancels="again-cancel")
            shown = gr.HTML(elem_id="recipe")
            carried = gr.JSON(visible=False)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(elem_id="replay-status")
            result = gr.HTML(elem_id="replay-result")
            report = gr.JSON(visible=False)

    async def show(request: gr.Request, path: str | None) -> tuple[Any, str, str]:
        if path is None:
            return None, "", ""
        host.remember(session_of(request), [path])
        try:
            _, recipe, _ = actions.replay_order(path, host.offer)
        except Exception as error:
            return None, "", views.message(refusal(error), wrong=True)
        words = views.message("This picture carries its recipe.")
        data = recipe.to_json()
        return actions.unlike_files(data), views.recipe(data), words

    async def run(request: gr.Request, path: str | None) -> AsyncIterator[tuple[Any, ...]]:
        host.remember(session_of(request), [path])
        try:
            source, recipe, order = actions.replay_order(path, host.offer)
            ticket = host.submit(session_of(request), order, pictures=recipe.image + 1)
        except Exception as error:
            words = refusal(error)
            yield views.message(words, wrong=True), "", {"state": "refused", "error": words}
            return
        async for (snap,) in actions.follow(host, ticket):
            doing = actions.progress(ticket, snap, host.ahead(ticket))
            yield views.status(ticket, snap, host.ahead(ticket)), "", doing
        if ticket.state != "finished":
            return
        same, words = actions.verdict(source, recipe, ticket)
        outcome = ticket.results[recipe.prompt]
        pair = [("Given", source.read_bytes(), [])]
        again = views.file_bytes(outcome.files[recipe.image])
        if again is not None:
            pair.append(("Made again", again, views.facts(outcome, recipe.image)))
        done = {**actions.summary(ticket), "identical": same, "words": words}
        yield views.message(words, wrong=not same), views.columns(pair), done

    file.change(show, file, [carried, shown, status], api_name="recipe", show_progress="hidden")
    pressed.on_press(run, file, [status, result, report], api_name="replay")
    pressed.on_cancel(host, status)


def score_tab(host: Host) -> None:
    """Drop images and a prompt, get all chosen rewards."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.File(
                label="Pictures",
                file_count="multiple",
                elem_id="pictures",
                file_types=["image"],
                interactive=True,
            )
            prompt = gr.Textbox(EXAMPLE, label="Prompt", max_lines=4, interactive=True)
            chosen = rewards_control(host, "Rewards")
            pressed = buttons("Score", "Scoring ...", "score", cancels="score-cancel")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(elem_id="score-status")
            report = gr.JSON(visible=False)

    async def chosen_files(request: gr.Request, paths: list[str] | None) -> None:
        host.remember(session_of(request), paths or [])

    async def run(
        request: gr.Request, paths: list[str] | None, text: str, names: list[str]
    ) -> tuple[str, Any]:
        host.remember(session_of(request), paths or [])
        try:
            rows = await score(host, session_of(request), paths or [], text, names)
        except Exception as error:
            words = refusal(error)
            return views.message(words, wrong=True), {"error": words, "rows": []}
        head = ["file", *names]
        body = [[r["file"], *[views.number(r["scores"][n]) for n in names]] for r in rows]
        return views.table(head, body, f"{len(rows)} pictures"), finite({"rows": rows})

    files.change(chosen_files, files, None, **QUIET)
    pressed.on_press(run, [files, prompt, chosen], [status, report], api_name="score")
    pressed.on_cancel(host, status)

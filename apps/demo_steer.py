"""The Steer tab: the form, the live view and the result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from steering.apps import demo_actions as actions
from steering.apps import demo_views as views
from steering.apps.demo_api import refusal, session_of
from steering.apps.demo_buttons import Buttons, buttons
from steering.apps.demo_controls import (
    Shown,
    controls,
    first_reward,
    form,
    rewards_control,
    show,
    weight_controls,
)
from steering.apps.demo_forms import option_fields, read_options
from steering.apps.demo_order import Order
from steering.apps.demo_queue import Ticket
from steering.apps.demo_session import Host
from steering.registry import METHODS

STOPPED = " (stopped: best so far)"
_PLAIN = "(defaults)"


def steer_tab(host: Host) -> None:
    """Builds the tab."""
    with gr.Row(elem_classes="st-main"):
        with gr.Column(scale=2, min_width=300):
            asked = form(host)
            method = gr.Dropdown(
                METHODS.names(), value="fk", interactive=True, label="Method", elem_id="method"
            )
            preset = gr.Dropdown(
                [_PLAIN], value=_PLAIN, interactive=True, label="Preset of the method"
            )
            chosen = rewards_control(host)
            weights = weight_controls(host, chosen)
            options_at = gr.Column()
            guess = gr.HTML(elem_id="estimate")
            pressed = buttons("Steer", "Steering ...", "steer", cancels="cancel", ready=False)
        with gr.Column(scale=3, min_width=300):
            shown = show()
    timed = [asked.nfe, method, asked.model, asked.steps, asked.scale, asked.compare]
    gr.on(  # with no trigger named: when the page opens, and with every change
        fn=_estimator(host),
        inputs=timed,
        outputs=guess,
        show_progress="hidden",
        api_visibility="private",
    )
    method.change(_presets, method, preset, show_progress="hidden", api_visibility="private")
    pressed.on_cancel(host, shown.status)
    with options_at:
        # Drawn anew only where other options are asked for: what was filled in is lost then.
        @gr.render(inputs=[method, preset], show_progress="hidden")
        def options_form(name: str, chosen_preset: str) -> None:
            fields = option_fields(METHODS.get(name))
            options = controls(name, chosen_preset, fields)
            event = gr.on(
                [pressed.start.click, asked.prompt.submit],
                _steerer(host, shown, pressed, name, [f.name for f in fields]),
                [*asked.listed(), chosen, *weights, *options],
                [*shown.listed(), *pressed.listed()],
                trigger_mode="multiple",  # a second press is answered, not lost
                api_visibility="private",
                show_progress="hidden",
                concurrency_limit=None,
            )
            pressed.on_failure(event)
            # Its listener comes with the form, and a press before that would be lost.
            gr.on(
                fn=pressed.ready,
                outputs=pressed.listed(),
                api_visibility="private",
                show_progress="hidden",
            )


def _presets(method: str) -> Any:  # noqa: ANN401
    names = [_PLAIN, *METHODS.get(method).presets]
    return gr.Dropdown(names, value=_PLAIN)


def _estimator(host: Host) -> Any:  # noqa: ANN401
    async def guess(
        nfe: float, method: str, model: str, steps: str, scale: str, beside: bool
    ) -> str:
        call = {"num_inference_steps": steps, "guidance_scale": scale}
        try:
            order = host.offer.order(
                "any",
                model=model,
                method=method,
                rewards={first_reward(host): 1.0},
                nfe=nfe,
                call=call,
            )
        except Exception as error:
            return views.message(refusal(error), wrong=True)
        found = actions.estimate(host, order, 2 if beside else 1)
        busy = f" {found['running'] + found['waiting']} runs are on their way already."
        words = (
            "No run like this was measured yet."
            if found["seconds"] is None
            else f"About {found['seconds']:.0f} s{' with its comparison' * beside}."
        )
        return views.message(words + busy * (found["running"] + found["waiting"] > 0))

    return guess


def _steerer(
    host: Host,
    shown: Shown,
    pressed: Buttons,
    method: str,
    options: list[str],
) -> Any:  # noqa: ANN401
    rewards = host.offer.rewards

    async def run(session: str, *values: Any) -> AsyncIterator[dict[Any, Any]]:  # noqa: ANN401
        prompt, model, heldout, nfe, seed, steps, scale, beside, chosen = values[:9]
        weights = dict(zip(rewards, values[9:], strict=False))
        given = dict(zip(options, values[9 + len(rewards) :], strict=True))
        yield shown.cleared()
        order = host.offer.order(
            prompt,
            model=model,
            method=method,
            options=read_options(METHODS.get(method), given),
            rewards={name: weights[name] for name in chosen},
            heldout=heldout,
            nfe=nfe,
            seed=seed,
            call={"num_inference_steps": steps, "guidance_scale": scale},
        )
        ticket = host.submit(session, order)
        async for update in _watch(host, shown, ticket):
            yield update
        if ticket.results:
            async for update in _finish(host, shown, ticket, order, beside):
                yield update

    async def steer(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:  # noqa: ANN401
        session = session_of(request)
        async for update in pressed.during(session, run(session, *values), shown.status):
            yield update

    return steer


async def _watch(host: Host, shown: Shown, ticket: Ticket) -> AsyncIterator[dict[Any, Any]]:
    """The live view of a run; parts that did not change are not sent again."""
    last: dict[Any, str] = {}
    async for (snap,) in actions.follow(host, ticket):
        parts = {
            shown.status: views.status(ticket, snap, host.ahead(ticket)),
            shown.best: views.best(snap),
            shown.plots: views.plots(snap),
            shown.gallery: views.gallery(snap),
        }
        changed = {k: v for k, v in parts.items() if last.get(k) != v}
        last |= changed
        if changed:
            yield changed


async def _finish(
    host: Host, shown: Shown, ticket: Ticket, order: Order, beside: bool
) -> AsyncIterator[dict[Any, Any]]:
    """The result, then best-of-N for as many network rows, and both side by side."""
    outcome = ticket.results[0]
    yield {
        shown.result: _columns(ticket, None),
        shown.tree: views.family_tree(outcome),
        shown.file: gr.DownloadButton(value=str(outcome.files[0]), interactive=True),
        shown.python: actions.as_python(outcome.recipe),
        shown.command: actions.as_command(outcome.recipe),
    }
    if not beside or ticket.left or ticket.state != "finished":
        return
    done, snap = views.status(ticket, ticket.live.snapshot(), 0), ticket.live.snapshot()
    wait = views.message("Now best-of-N and the unsteered picture for the same cost.")
    yield {shown.status: done + wait}
    try:
        other = host.submit(ticket.session, actions.baseline(order, outcome.nfe), pictures=256)
    except Exception as error:
        yield {shown.status: done + views.message(refusal(error), wrong=True)}
        return
    async for _ in actions.follow(host, other):
        pass
    if not other.results or other.state != "finished":
        failed = other.state == "failed"
        words = other.error if failed else "The comparison was stopped."
        yield {shown.status: done + views.message(words, wrong=failed)}
        return
    yield {
        shown.status: done,
        shown.result: _columns(ticket, other),
        shown.plots: views.plots(snap, views.best_of_n_line(other.results[0])),
    }


def _columns(ticket: Ticket, other: Ticket | None) -> str:
    """Unsteered, best-of-N and steered, as far as they exist."""
    outcome = ticket.results[0]
    title = outcome.recipe["method"]["name"]
    if ticket.state == "stopped":
        title += STOPPED
    entries = []
    if other is not None:
        entries = baseline_entries(other)
    steered = views.file_bytes(outcome.files[0])
    if steered is not None:
        entries.append((f"Steered by {title}", steered, views.facts(outcome)))
    return views.columns(entries)


def baseline_entries(other: Ticket) -> list[tuple[str, bytes, list[tuple[str, str]]]]:
    """Cards of the unsteered sample and of the best of N."""
    found, entries = other.results[0], []
    first = actions.first_sample(found)
    count = len(found.summary["slots"])
    plain = views.file_bytes(found.files[first]) if first < len(found.files) else None
    if plain is not None:
        facts = [f for f in views.facts(found, first) if f[0] not in ("network rows",)]
        cost = ("network rows", str(round(found.nfe / count)))
        entries.append(("Unsteered", plain, [*facts[:-1], cost, ("reward calls", "1")]))
    top = views.file_bytes(found.files[0])
    if top is not None:
        entries.append((f"Best of {count}", top, views.facts(found)))
    return entries

"""Start and Cancel of a tab: while a run goes on Cancel can be pressed and Start cannot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from steering.apps import demo_views as views
from steering.apps.demo_api import refusal, session_of
from steering.apps.demo_session import Host

_POLL = 0.2  # seconds
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of a listener that is no action of its own."""


@dataclass(frozen=True, eq=False)
class Buttons:
    """A pair of buttons and what they say.

    Attributes:
        start: starts a run; ``label`` and ``doing`` are its words before and during one.
        cancel: stops all runs of the session.
        going: sessions whose run goes on, for those who use `during`.
    """

    start: gr.Button
    cancel: gr.Button
    label: str
    doing: str
    going: set[str] = field(default_factory=set)

    def listed(self) -> list[Any]:
        return [self.start, self.cancel]

    def _changes(self, busy: bool) -> list[dict[str, Any]]:
        """What both say and do while a run goes on, or while none does."""
        words = self.doing if busy else self.label
        return [{"value": words, "interactive": not busy}, {"interactive": busy}]

    def states(self, busy: bool) -> dict[Any, Any]:
        """Both buttons while a run goes on, and while none does."""
        states = [gr.Button(**change) for change in self._changes(busy)]
        return dict(zip(self.listed(), states, strict=True))

    def on_press(
        self,
        run: Any,  # noqa: ANN401
        inputs: Sequence[Any] | Any,  # noqa: ANN401
        outputs: Sequence[Any],
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Listens to Start. The browser itself takes it out of use and gives it back.

        ``run`` may be an endpoint too: what it gives says nothing of buttons.
        """
        self.start.click(None, None, self.listed(), js=self._script(busy=True), **QUIET)
        event = self.start.click(
            run, inputs, outputs, show_progress="hidden", concurrency_limit=None, **options
        )
        event.then(None, None, self.listed(), js=self._script(busy=False), **QUIET)
        self.on_failure(event)

    def on_failure(self, event: Any) -> None:  # noqa: ANN401
        """Start comes back after an error, of which gradio's `then` is not told."""
        event.failure(None, None, self.listed(), js=self._script(busy=False), **QUIET)

    def _script(self, *, busy: bool) -> str:
        return f"() => {json.dumps([{'__type__': 'update', **c} for c in self._changes(busy)])}"

    def on_cancel(self, host: Host, status: gr.HTML) -> None:
        """Listens to Cancel."""

        async def cancel(request: gr.Request) -> Any:  # noqa: ANN401
            if not host.cancel(session_of(request)):
                return views.message("Nothing of yours is running.")
            return gr.skip()  # the run itself says how it ended

        self.cancel.click(cancel, None, status, **QUIET)

    async def during(
        self, session: str, run: AsyncIterator[dict[Any, Any]], status: gr.HTML
    ) -> AsyncIterator[dict[Any, Any]]:
        """What a run shows, with the buttons as they are while it goes on and afterwards.

        For a listener that may be drawn anew in mid-run: what follows the old one is lost then.
        """
        if session in self.going:  # Enter in the form, or a press before the button had changed
            gr.Info("Your run is still going. Cancel it, or wait for its end.")
            yield {status: gr.skip()}  # gradio empties the page where nothing is given
            return
        self.going.add(session)
        try:
            yield self.states(busy=True)
            async for update in run:
                yield update
        except Exception as error:
            yield {status: views.message(refusal(error), wrong=True)}
        finally:
            self.going.discard(session)  # before the button comes back, so that a press counts
        yield self.states(busy=False)

    async def ready(self, request: gr.Request) -> list[Any]:
        """Both buttons as they are once no run of this session goes on."""
        while session_of(request) in self.going:
            await asyncio.sleep(_POLL)
        return list(self.states(busy=False).values())


def buttons(label: str, doing: str, name: str, *, cancels: str, ready: bool = True) -> Buttons:
    """Draws them side by side.

    Args:
        name, cancels: of the elements in the page.
        ready: whether Start can be pressed from the beginning.
    """
    with gr.Row():
        start = gr.Button(label, variant="primary", elem_id=name, interactive=ready)
        cancel = gr.Button("Cancel", elem_id=cancels, interactive=False)
    return Buttons(start, cancel, label, doing)

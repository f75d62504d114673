"""The Gradio demo: steer in the browser and see why it won."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steering.apps.demo_api import add_endpoints, session_of
from steering.apps.demo_order import Offer
from steering.apps.demo_page import CSS, HEAD, compare_tab, replay_tab, score_tab
from steering.apps.demo_queue import Ticket
from steering.apps.demo_session import Host
from steering.apps.demo_steer import steer_tab

log = logging.getLogger("steering.demo")
TITLE = "Diffusion steering"


class Refusals:
    """A log line for every request that the web server itself refuses, such as a large upload."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                what = (scope["method"], scope["path"][:200], message["status"])
                log.info("refused: %s %r with status %d", *what)
            await send(message)

        await self.app(scope, receive, watched)


def build(host: Host) -> gr.Blocks:
    """The page and its endpoints over a host."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        add_endpoints(host)  # first, so that they and no listener of the page get the names
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Spend more compute on one picture and see what it buys. Every "
            "number counts rows through the network, so methods are compared at equal cost.</p>"
        )
        with gr.Tabs():
            with gr.Tab("Steer"):
                steer_tab(host)
            with gr.Tab("Compare"):
                compare_tab(host)
            with gr.Tab("Replay"):
                replay_tab(host)
            with gr.Tab("Score"):
                score_tab(host)
        page.unload(_leaver(host))
    page.queue(default_concurrency_limit=None, max_size=256)
    return page


def launch(
    host: Host,
    *,
    name: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    people: list[tuple[str, str]] | None = None,
    wait: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serves the page; (page, its address)."""
    # Uploads lie in the host's folder and go with it. The sessions' folders lie in it too, so that
    # gradio serves their files as they are: its copies would outlive a session.
    os.environ["GRADIO_TEMP_DIR"] = str(host.root)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    page = build(host)
    _, address, _ = page.launch(
        server_name=name,
        server_port=port or None,
        share=share,
        auth=people,
        max_file_size=host.offer.limits.upload_bytes,
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
        ssr_mode=False,
        css=CSS,
        head=HEAD,
        theme=theme(),
        footer_links=["api"],
        allowed_paths=[str(host.root / "sessions")],
        app_kwargs={"middleware": [Middleware(Refusals)]},
    )
    if wait:
        page.block_thread()
    return page, address


def serve(
    offer: Offer,
    *,
    host: str,
    port: int,
    share: bool,
    people: list[tuple[str, str]] | None,
    dtype: str = "auto",
    device: str | None = None,
) -> None:
    """`steer demo`: opens the first model, serves until interrupted, and tidies up."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    desk = Host(offer, dtype=dtype, device=device)
    try:
        warm_up(desk)
        page, address = launch(desk, name=host, port=port, share=share, people=people, wait=False)
        log.info("serving at %s; interrupt to stop", address)
        page.block_thread()
    finally:
        desk.close()


def warm_up(host: Host) -> Ticket:
    """Opens the first model and measures its pace, so that nobody waits for it later."""
    first = "clip" if "clip" in host.offer.rewards else host.offer.rewards[0]
    order = host.offer.order(
        "a photo of a red apple",
        model=host.offer.models[0],
        method="best_of_n",
        options={"n": 1},
        rewards={first: 1.0},
        nfe=host.offer.limits.nfe,
    )
    return host.submit("server", order)


def theme() -> Any:  # noqa: ANN401
    """Gradio's own look with the machine's fonts: nothing is fetched from elsewhere."""
    return gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def _leaver(host: Host) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        # Files are removed from another thread: a closing tab must not hold the server up.
        threading.Thread(target=host.leave, args=(session_of(request),), daemon=True).start()

    return leave

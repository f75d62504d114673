"""`steer demo`: the page that steers in the browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from steering.errors import OptionError


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A model to offer; may be given several times."),
    ] = None,
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 7860,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 to be reached from outside.")] = (
        "127.0.0.1"
    ),
    share: Annotated[bool, typer.Option("--share", help="A public link through gradio.")] = False,
    login: Annotated[
        Path | None, typer.Option("--login", help="File with a name:password on each line.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", help="A reward to offer; all by default."),
    ] = None,
    any_model: Annotated[
        bool | None,
        typer.Option(help="Whether people may name other folders and hub ids."),
    ] = None,
    max_nfe: Annotated[int, typer.Option("--max-nfe", min=1, help="Of one run.")] = 4000,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", min=0.1, help="Of one run.")
    ] = 600.0,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Of one run.")] = 100,
    max_side: Annotated[int, typer.Option("--max-side", min=8, help="Of a picture.")] = 1024,
    max_particles: Annotated[
        int, typer.Option("--max-particles", min=1, help="Of one run.")
    ] = 256,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Runs in the queue, of all people.")
    ] = 64,
    dtype: Annotated[str, typer.Option("--dtype")] = "auto",
    device: Annotated[str | None, typer.Option("--device")] = None,
) -> None:
    """Steer in the browser: candidates improve live, and the winner takes its recipe along."""
    if importlib.util.find_spec("gradio") is None:
        raise OptionError("The demo needs gradio: pip install 'diffusion-steering[demo]'.")
    from steering.apps.demo import serve
    from steering.apps.demo_order import Limits, Offer
    from steering.loading import SHIPPED

    local = host in ("127.0.0.1", "localhost", "::1") and not share
    models = tuple(model or ()) or SHIPPED
    offer = Offer(
        models=models,
        any_model=local if any_model is None else any_model,
        rewards=tuple(reward or ()),
        limits=Limits(
            nfe=max_nfe,
            seconds=max_seconds,
            steps=max_steps,
            side=max_side,
            particles=max_particles,
            waiting=max_waiting,
        ),
    )
    people = None if login is None else read_logins(login)
    serve(offer, host=host, port=port, share=share, people=people, dtype=dtype, device=device)


def read_logins(path: Path) -> list[tuple[str, str]]:
    """Names and passwords of a file with a name:password on each line.

    Raises:
        OptionError: unreadable, empty, or a line without a colon.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise OptionError(f"--login {path}: cannot be read ({error.strerror}).") from None
    pairs = [line.partition(":")[::2] for line in lines]
    if not pairs or not all(name and password for name, password in pairs):
        raise OptionError(f"--login {path}: write name:password on each line.")
    return pairs

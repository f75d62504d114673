"""The demo's actions as endpoints, plain JSON in and out; the page calls the same functions."""

# No `from __future__ import annotations`: gradio makes the schema from the annotations themselves.

import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from steering.apps import demo_actions as actions
from steering.apps.demo_session import Host
from steering.apps.listing import method_rows, reward_rows
from steering.errors import SteeringError
from steering.result import finite

log = logging.getLogger("steering.demo")


def session_of(request: gr.Request | None) -> str:
    """The session that a request belongs to."""
    return getattr(request, "session_hash", None) or "nobody"


def refusal(error: Exception) -> str:
    """What the person is told; the log keeps the rest."""
    if isinstance(error, SteeringError):
        log.info("refused: %s", error)
        return str(error)
    log.error("an action failed", exc_info=error)
    return f"Something went wrong inside the server ({type(error).__name__}); see its log."


def told(action: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of an endpoint as gradio errors, whose text reaches the client."""

    @functools.wraps(action)
    async def answer(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return await action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(refusal(error), print_exception=False) from None

    return answer


def add_endpoints(host: Host) -> None:
    """Registers the endpoints in the Blocks that is being built."""
    for action in (*_runs(host), _comparison(host), *_questions(host)):
        gr.api(action, api_name=action.__name__, concurrency_limit=None)


def _runs(host: Host) -> tuple[Callable[..., Any], ...]:
    """/steer and /steer_live."""
    offer = host.offer
    model = offer.models[0]

    @told
    async def steer(
        prompt: str,
        method: str = "fk",
        options: dict = {},  # noqa: B006 - read only; the API shows the default
        rewards: dict = {"clip": 1.0},  # noqa: B006
        heldout: list = [],  # noqa: B006
        nfe: int = 320,
        seed: int = 0,
        model: str = model,
        call: dict = {},  # noqa: B006
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:
        """One steered run: waits for its end and returns numbers, recipe and pictures."""
        order = offer.order(
            prompt, model=model, method=method, options=options, rewards=rewards,
            heldout=heldout, nfe=nfe, seed=seed, call=call,
        )  # fmt: skip
        ticket = host.submit(session_of(request), order)
        async for _ in actions.follow(host, ticket):
            pass
        if ticket.state == "failed" and not ticket.results:
            raise gr.Error(ticket.error, print_exception=False)
        return actions.summary(ticket)

    async def steer_live(
        prompt: str,
        method: str = "fk",
        options: dict = {},  # noqa: B006
        rewards: dict = {"clip": 1.0},  # noqa: B006
        heldout: list = [],  # noqa: B006
        nfe: int = 320,
        seed: int = 0,
        model: str = model,
        call: dict = {},  # noqa: B006
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> AsyncIterator[dict]:
        """As /steer, with progress on the way; the last item is the whole result."""
        try:
            order = offer.order(
                prompt, model=model, method=method, options=options, rewards=rewards,
                heldout=heldout, nfe=nfe, seed=seed, call=call,
            )  # fmt: skip
            ticket = host.submit(session_of(request), order)
        except Exception as error:
            raise gr.Error(refusal(error), print_exception=False) from None
        async for (shown,) in actions.follow(host, ticket):
            yield actions.progress(ticket, shown, host.ahead(ticket))
        yield actions.summary(ticket)

    steer_live.__annotations__["return"] = dict  # of each item
    return steer, steer_live


def _comparison(host: Host) -> Callable[..., Any]:
    """/compare."""
    model = host.offer.models[0]

    @told
    async def compare(
        prompt: str,
        methods: list,
        rewards: dict = {"clip": 1.0},  # noqa: B006
        heldout: list = [],  # noqa: B006
        nfe: int = 320,
        seed: int = 0,
        model: str = model,
        call: dict = {},  # noqa: B006
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:
        """Several methods on one prompt at one budget, unsteered and best-of-N among them."""
        given = {
            "model": model, "rewards": rewards, "heldout": heldout, "nfe": nfe, "seed": seed,
            "call": call,
        }  # fmt: skip
        tickets = actions.compare(host, session_of(request), prompt, methods, given)
        async for _ in actions.follow(host, *tickets.values()):
            pass
        return {name: actions.summary(ticket) for name, ticket in tickets.items()}

    return compare


def _questions(host: Host) -> tuple[Callable[..., Any], ...]:
    """/cancel, /estimate, /methods and /rewards."""
    offer = host.offer
    model = offer.models[0]

    @told
    async def cancel(request: gr.Request = None) -> int:  # type: ignore[assignment]
        """Stops this session's runs at their best so far; returns how many there were."""
        return host.cancel(session_of(request))

    @told
    async def estimate(
        nfe: int = 320,
        method: str = "fk",
        model: str = model,
        call: dict = {},  # noqa: B006
    ) -> dict:
        """Expected seconds of a run, and how busy the server is."""
        first = offer.rewards[0]
        order = offer.order(
            "any", model=model, method=method, rewards={first: 1.0}, nfe=nfe, call=call
        )
        return actions.estimate(host, order)

    async def methods() -> list:
        """The methods with their options, presets and papers."""
        return actions.unlike_files(method_rows())

    async def rewards() -> list:
        """The rewards that may be mixed here."""
        return [row for row in finite(reward_rows()) if row["name"] in offer.rewards]

    return cancel, estimate, methods, rewards

"""What the demo shows: pictures, plots and the family tree, as HTML and SVG without scripts."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.apps.demo_live import Checkpoint, Shot
from steering.apps.demo_queue import Outcome, Ticket

_W, _H, _PAD = 560, 200, 44
_MOST = 48  # particles drawn in a family tree
_SERIES = ("#1d4ed8", "#b45309", "#047857", "#be185d", "#6d28d9", "#334155", "#0e7490")


def message(text: str, *, wrong: bool = False) -> str:
    """A line for the person; an alert where something is wrong."""
    role, kind = ("alert", "bad") if wrong else ("status", "good")
    return f'<div role="{role}" class="st-note st-{kind}">{html.escape(text)}</div>'


def status(ticket: Ticket, shown: dict[str, Any], ahead: int) -> str:
    """State, network rows spent and time left, with a progress bar."""
    if ticket.state == "waiting":
        words = f"Waiting: {ahead} run{'s' * (ahead != 1)} before yours."
        return message(words) if ahead else message("Starting.")
    if ticket.state == "failed":
        return message(ticket.error, wrong=True)
    budget, nfe = max(1, shown["budget"]), shown["nfe"]
    share = min(1.0, nfe / budget) if not ticket.over else 1.0
    left = ticket.seconds * (1 - share) / share if share > 0.02 else None
    words = f"{nfe} of {budget} network rows, {ticket.seconds:.0f} s"
    if ticket.state == "running":
        words = f"Running: {words}" + ("" if left is None else f", about {left:.0f} s left")
    elif ticket.state == "stopped":
        words = f"Stopped: {ticket.error} ({words})."
    else:
        words = f"Finished: {words}."
    bar = (
        f'<progress max="100" value="{100 * share:.0f}" aria-label="Network rows spent">'
        f"{100 * share:.0f} %</progress>"
    )
    return f'<div role="status" class="st-note st-good">{html.escape(words)}{bar}</div>'


def picture(shot: Shot | None, alt: str, *, large: bool = False) -> str:
    """A small picture inline."""
    if shot is None:
        return ""
    size = ' class="st-large"' if large else ""
    return f'<img{size} src="{data_uri(shot.png)}" alt="{html.escape(alt)}">'


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def best(shown: dict[str, Any]) -> str:
    """The best picture so far, or the first estimates before anything was scored."""
    if shown["best"] is not None:
        kind = "finished" if shown["best_final"] else "estimate of an unfinished one"
        return _figure(
            picture(shown["best"], "best so far", large=True),
            f"Best so far: reward {number(shown['best'].reward)} ({kind})",
        )
    if not shown["guesses"]:
        return ""
    tiles = "".join(picture(s, f"estimate {k + 1}") for k, s in enumerate(shown["guesses"]))
    return _figure(tiles, f"First estimates after {shown['nfe']} network rows, not scored yet")


def gallery(shown: dict[str, Any]) -> str:
    """Particles of every checkpoint, the newest open."""
    points: list[Checkpoint] = shown["checkpoints"]
    if not points:
        return ""
    blocks = []
    for k, point in enumerate(reversed(points)):
        what = "finished samples" if point.final else "estimates"
        more = f", {point.more} more not shown" if point.more else ""
        title = f"{len(point.shots)} {what} at {point.nfe} network rows{more}"
        tiles = "".join(
            _figure(picture(s, f"particle {i + 1}"), number(s.reward))
            for i, s in enumerate(point.shots)
        )
        state = " open" if k == 0 else ""
        blocks.append(
            f'<details{state} class="st-point"><summary>{title}</summary>'
            f'<div class="st-tiles">{tiles}</div></details>'
        )
    return "".join(blocks)


def plots(shown: dict[str, Any], baseline: Sequence[tuple[int, float]] = ()) -> str:
    """Best reward over network rows with best-of-N's line, and ESS with resampling events."""
    lines = [("this run", shown["curve"]), ("best-of-N", list(baseline))]
    figure = reward_plot([(n, p) for n, p in lines if p])
    if shown["ess"]:
        marks = [(x, f"{roots} roots left") for x, roots in shown["resampled"]]
        title = "Effective sample size; dashed lines are resamplings"
        figure += _chart(title, [("ESS", shown["ess"])], marks, floor=0.0)
    return figure


def reward_plot(lines: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """Best reward so far over network rows, a line per run."""
    return _chart("Best reward over network rows", lines) if lines else ""


def best_of_n_line(outcome: Outcome) -> list[tuple[int, float]]:
    """Expected best of the first k of N samples, at the rows that k samples cost."""
    pairs = zip(outcome.summary["slots"], outcome.summary["rewards"], strict=True)
    rewards = sorted(r for _, r in pairs if math.isfinite(r))
    n, points = len(rewards), []
    for k in range(1, n + 1):
        # P(the i-th smallest is the largest of k drawn without replacement)
        weights = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
        expected = sum(w * r for w, r in zip(weights, rewards, strict=True))
        points.append((round(outcome.nfe * k / n), expected))
    return points


def columns(entries: Sequence[tuple[str, bytes, Sequence[tuple[str, str]]]]) -> str:
    """Pictures side by side, each with a title and rows of facts."""
    cards = []
    for title, png, facts in entries:
        rows = "".join(
            f"<tr><th scope='row'>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>"
            for k, v in facts
        )
        cards.append(
            f'<figure class="st-card"><figcaption><strong>{html.escape(title)}</strong>'
            f'</figcaption><img class="st-large" src="{data_uri(png)}" '
            f'alt="{html.escape(title)}"><table>{rows}</table></figure>'
        )
    return f'<div class="st-cards">{"".join(cards)}</div>' if cards else ""


def facts(outcome: Outcome, k: int = 0) -> list[tuple[str, str]]:
    """Reward, held-out verdicts and costs of one picture of a result."""
    summary = outcome.summary
    rows = [("reward", number(summary["rewards"][k]))]
    rows += [(f"held-out {name}", number(v[k])) for name, v in summary["heldout"].items()]
    ledger = summary["ledger"]
    rows += [("network rows", str(ledger["nfe"])), ("reward calls", str(ledger["reward_calls"]))]
    return rows


def file_bytes(path: Path) -> bytes | None:
    """A written picture, None where it is gone (the session has ended)."""
    return path.read_bytes() if path.is_file() else None


def recipe(data: Mapping[str, Any]) -> str:
    """A recipe as text that can be scrolled by keyboard."""
    text = html.escape(json.dumps(data, indent=1, ensure_ascii=False))
    return (
        "<details open><summary>Recipe</summary>"
        f'<pre class="st-recipe" tabindex="0" role="region" aria-label="Recipe">{text}</pre>'
        "</details>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of texts."""
    top = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="st-scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f'<table class="st-table"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def lineage(ancestors: Sequence[Sequence[int]], slot: int) -> list[int]:
    """The winner's particle before each resampling, then its own slot."""
    path = [slot]
    for step in reversed(ancestors):
        path.append(int(step[path[-1]]))
    return path[::-1]


def family_tree(outcome: Outcome) -> str:
    """Which particle came from which, with the winner's line drawn strong."""
    ancestors = [e["ancestors"] for e in outcome.events if "ancestors" in e]
    at = [e["nfe"] for e in outcome.events if "ancestors" in e]
    if not ancestors:
        return message("No particle was copied in this run, so every sample stands for itself.")
    n, slot = len(ancestors[0]), int(outcome.summary["slots"][0])
    same = all(len(a) == n and all(0 <= int(p) < n for p in a) for a in ancestors)
    if not same or slot >= n or n > _MOST:
        rounds = f"{len(ancestors)} resamplings of {n} particles"
        return message(f"{rounds}: more than a drawing of the family tree can hold.")
    line = lineage(ancestors, slot)
    names = " → ".join(str(p + 1) for p in line)
    caption = f"The winner's line, from the start: particle {names}"
    return _figure(_tree(ancestors, line, at), caption)


def _tree(ancestors: Sequence[Sequence[int]], line: Sequence[int], at: Sequence[int]) -> str:
    n, levels = len(ancestors[0]), len(ancestors)
    high, wide = 16 * n + 40, max(320, 110 * levels + 60)
    step = (wide - 60) / levels
    x, y = (lambda c: 30 + c * step), (lambda p: 24 + 16 * p)
    parts = []
    for c, parents in enumerate(ancestors):
        for child, parent in enumerate(parents):
            strong = line[c] == parent and line[c + 1] == child
            style = 'stroke="#1d4ed8" stroke-width="3"' if strong else 'stroke="#94a3b8"'
            parts.append(
                f'<line x1="{x(c):.0f}" y1="{y(int(parent))}" x2="{x(c + 1):.0f}" '
                f'y2="{y(child)}" {style}/>'
            )
    for c in range(levels + 1):
        for p in range(n):
            colour = "#1d4ed8" if line[c] == p else "#64748b"
            parts.append(f'<circle cx="{x(c):.0f}" cy="{y(p)}" r="4" fill="{colour}"/>')
        words = "start" if c == 0 else f"{at[c - 1]} rows"
        parts.append(f'<text x="{x(c):.0f}" y="{high - 6}" text-anchor="middle">{words}</text>')
    return _svg(wide, high, "Family tree of the particles", "".join(parts))


def number(value: object) -> str:
    """A number in four digits, a dash where there is none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "-"
    return f"{value:.4f}"


def _figure(body: str, caption: str) -> str:
    return f"<figure>{body}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _svg(wide: float, high: float, title: str, body: str) -> str:
    return (
        f'<svg class="st-svg" viewBox="0 0 {wide:.0f} {high:.0f}" role="img" '
        f'aria-label="{html.escape(title)}"><title>{html.escape(title)}</title>{body}</svg>'
    )


def _chart(
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[int, float]]]],
    marks: Sequence[tuple[int, str]] = (),
    floor: float | None = None,
) -> str:
    """A line chart; a single point is a dot."""
    xs = [p[0] for _, points in lines for p in points] + [m[0] for m in marks]
    ys = [p[1] for _, points in lines for p in points]
    right, low, top = max([*xs, 1]), min(ys) if floor is None else floor, max(ys)
    span = (top - low) or 1.0

    def at(point: tuple[int, float]) -> tuple[float, float]:
        share = (point[1] - low) / span
        return _PAD + (_W - _PAD - 12) * point[0] / right, _H - 28 - (_H - 62) * share

    parts = [
        f'<line x1="{_PAD}" y1="{_H - 28}" x2="{_W - 12}" y2="{_H - 28}" stroke="#64748b"/>',
        f'<text x="{_PAD - 4}" y="{_H - 28}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{_PAD - 4}" y="40" text-anchor="end">{top:.3g}</text>',
        f'<text x="{_W - 12}" y="{_H - 10}" text-anchor="end">{right} rows</text>',
    ]
    for spot, words in marks:
        x = at((spot, low))[0]
        parts.append(
            f'<line x1="{x:.0f}" y1="30" x2="{x:.0f}" y2="{_H - 28}" stroke="#be185d" '
            f'stroke-dasharray="4 3"><title>{html.escape(words)}</title></line>'
        )
    for k, (name, points) in enumerate(lines):
        colour, spots = _SERIES[k % len(_SERIES)], [at(p) for p in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        parts.append(
            f'<text x="{_PAD + 130 * k}" y="18" style="fill:{colour}">{html.escape(name)}</text>'
        )
    return _figure(_svg(_W, _H, title, "".join(parts)), title)

"""The comparison page: several runs in one HTML file, with plots and the images behind them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from steering.apps.geneval_report import (
    COSTS,
    Place,
    Scored,
    cost,
    number,
    overlaps,
    paired,
    percent,
    warnings,
)
from steering.apps.geneval_store import write
from steering.recipe import writable_folder
from steering.stickers.grammar import TAGS

_INK = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:right;vertical-align:top}td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:2px;width:112px}img{width:104px;height:104px;object-fit:cover;
border:4px solid #c33}img.ok{border-color:#2a2}figcaption{font-size:11px;color:#555;
text-align:left;overflow-wrap:anywhere}.warn{background:#fff3cd;padding:.4em .8em;margin:.3em 0}
.prompt{border-top:1px solid #ddd;padding:.5em 0}.runs{display:flex;gap:1em;flex-wrap:wrap}
.runs>div{flex:1;min-width:240px}small{color:#666}svg text{font:12px system-ui,sans-serif}
"""
_SCRIPT = """
function show(){const tag=document.getElementById('tag').value,
which=document.getElementById('which').value;
for(const row of document.querySelectorAll('.prompt'))row.hidden=
(tag&&row.dataset.tag!==tag)||(which==='differ'&&row.dataset.differ!=='1')||
(which==='wrong'&&row.dataset.wrong!=='1')}
"""


def write_page(runs: Sequence[tuple[Scored, dict[str, Any]]], path: Path) -> Path:
    """Writes the page; the images stay where they are and are linked.

    Args:
        runs: scored folders with their cards; the first is what the others are compared with.
    """
    writable_folder(path.parent)
    body = [
        "<h1>GenEval</h1>",
        *_cautions(runs),
        _table(runs),
        bars(runs),
        _legend(runs),
        scatter(runs),
        _differences(runs),
        _gallery(runs, path.parent),
    ]
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>GenEval</title>"
        f"<style>{_STYLE}</style><body>{''.join(body)}<script>{_SCRIPT}</script></body></html>"
    )
    write(path, page.encode())
    return path


def _cautions(runs: Sequence[tuple[Scored, dict[str, Any]]]) -> list[str]:
    lines = [f"{s.name}: {word}" for s, found in runs for word in warnings(found)]
    lines += overlaps([scored for scored, _ in runs])
    judges = {found["benchmark"] for _, found in runs}
    if len(judges) > 1:
        lines.append(f"the runs were scored by different judges: {', '.join(sorted(judges))}")
    return [f"<div class='warn'>{escape(line)}</div>" for line in lines]


def _table(runs: Sequence[tuple[Scored, dict[str, Any]]]) -> str:
    heldout = sorted({n for _, found in runs for n in found["heldout"]})
    head = ["run", "macro", "micro", "any of n", *TAGS, "reward"]
    head += [*(f"held-out {n}" for n in heldout), "diversity", *COSTS.values()]
    lines = [_row("th", head)]
    for scored, found in runs:
        scores = found["scores"]
        cells = [scored.name, *(percent(scores[k]) for k in ("macro", "micro", "any_of_n"))]
        cells += [percent(scores["tags"].get(tag)) for tag in TAGS]
        cells += [number(found["reward"]), *(number(found["heldout"].get(n)) for n in heldout)]
        cells += [number(found["diversity"])]
        cells += [cost(found, key) for key in COSTS]
        lines.append(_row("td", cells))
    note = runs[0][1]["interval"]
    return (
        f"<table>{''.join(lines)}</table><p><small>Percent of images with {escape(note)}. Macro "
        "is the mean of the tags, micro the mean over images, any of n the share of prompts with "
        "at least one right image. Costs are means per image.</small></p>"
    )


def _differences(runs: Sequence[tuple[Scored, dict[str, Any]]]) -> str:
    if len(runs) < 2:
        return ""
    lines = [_row("th", ["paired difference", "macro", "micro", *TAGS, "prompts"])]
    for scored, _ in runs[1:]:
        found = paired(runs[0][0], scored)
        cells = [f"{scored.name} - {runs[0][0].name}", percent(found["macro"])]
        cells += [percent(found["micro"]), *(percent(found["tags"].get(t)) for t in TAGS)]
        lines.append(_row("td", [*cells, str(found["prompts"])]))
    return f"<table>{''.join(lines)}</table>"


def bars(runs: Sequence[tuple[Scored, dict[str, Any]]]) -> str:
    """Bars per tag with whiskers, as SVG."""
    groups = ["macro", *TAGS]
    wide, height, step = 140, 240, 120 / max(len(runs), 1)
    parts = [_grid(len(groups) * wide + 50, height)]
    for g, group in enumerate(groups):
        x0 = 50 + g * wide
        parts.append(f"<text x='{x0 + 60}' y='{height + 38}' text-anchor='middle'>{group}</text>")
        for r, (_, found) in enumerate(runs):
            scores = found["scores"]
            value = scores["macro"] if group == "macro" else scores["tags"].get(group)
            if value is None:
                continue
            x, (top, low, high) = (
                x0 + r * step,
                (_y(value[k], height) for k in ("value", "low", "high")),
            )
            parts.append(
                f"<rect x='{x:.1f}' y='{top:.1f}' width='{step * 0.85:.1f}' "
                f"height='{height + 20 - top:.1f}' fill='{_ink(r)}'/>"
                f"<line x1='{x + step * 0.42:.1f}' x2='{x + step * 0.42:.1f}' y1='{low:.1f}' "
                f"y2='{high:.1f}' stroke='#222'/>"
            )
    width = len(groups) * wide + 60
    return f"<svg viewBox='0 0 {width} {height + 50}' width='100%'>{''.join(parts)}</svg>"


def scatter(runs: Sequence[tuple[Scored, dict[str, Any]]]) -> str:
    """Macro share over network rows of an image, as SVG; empty where no run knows its cost."""
    points = [
        (r, f["cost"]["nfe"], f["scores"]["macro"]) for r, (_, f) in enumerate(runs) if f["cost"]
    ]
    if not points:
        return ""
    most, height = max(nfe for _, nfe, _ in points) or 1.0, 240
    parts = [_grid(560, height)]
    for r, nfe, value in points:
        x = 60 + 470 * nfe / most
        y, low, high = (_y(value[k], height) for k in ("value", "low", "high"))
        parts.append(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{low:.1f}' y2='{high:.1f}' stroke='#222'/>"
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{_ink(r)}'/>"
            f"<text x='{x:.1f}' y='{height + 36}' text-anchor='middle'>{nfe:.0f}</text>"
        )
    parts.append(f"<text x='290' y='{height + 52}'>network rows per image</text>")
    return f"<svg viewBox='0 0 570 {height + 60}' width='570'>{''.join(parts)}</svg>"


def _grid(width: int, height: int) -> str:
    return "".join(
        f"<line x1='45' x2='{width}' y1='{_y(s, height):.1f}' y2='{_y(s, height):.1f}' "
        f"stroke='#ddd'/><text x='38' y='{_y(s, height) + 4:.1f}' text-anchor='end'>"
        f"{100 * s:.0f}</text>"
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    )


def _legend(runs: Sequence[tuple[Scored, dict[str, Any]]]) -> str:
    words = [
        f"<span style='color:{_ink(r)}'>&#9632;</span> {escape(s.name)}"
        for r, (s, _) in enumerate(runs)
    ]
    return f"<p>{' &nbsp; '.join(words)}</p>"


def _gallery(runs: Sequence[tuple[Scored, dict[str, Any]]], base: Path) -> str:
    """The images of every prompt, run beside run.

    Runs are paired by what is asked: another list of prompts has other ones at the same index.
    """
    options = "".join(f"<option>{tag}</option>" for tag in TAGS)
    head = (
        "<h2>Images</h2><p><select id='tag' onchange='show()'><option value=''>all tags</option>"
        f"{options}</select> <select id='which' onchange='show()'><option value=''>all prompts"
        "</option><option value='differ'>where the runs differ</option><option value='wrong'>with "
        "a wrong image</option></select></p>"
    )
    shown = [scored for scored, _ in runs]
    first: dict[Place, int] = {}
    for scored in shown:
        first = {**scored.places, **first}
    return head + "".join(_prompt(at, shown, base) for at in sorted(first, key=first.__getitem__))


def _prompt(at: Place, runs: Sequence[Scored], base: Path) -> str:
    have = {scored: scored.places[at] for scored in runs if at in scored.places}
    record = next(scored.contents.records[i] for scored, i in have.items())
    columns, shares = [], []
    for scored in runs:
        rows = scored.images[have[scored]] if scored in have else []
        if rows:
            shares.append(sum(r["correct"] for r in rows) / len(rows))
        pictures = "".join(_picture(scored, row, base) for row in rows)
        columns.append(f"<div><small>{escape(scored.name)}</small><br>{pictures}</div>")
    numbers = " / ".join(map(str, dict.fromkeys(have.values())))
    differ, wrong = len(set(shares)) > 1, any(s < 1 for s in shares)
    return (
        f"<div class='prompt' data-tag='{escape(record['tag'])}' data-differ='{int(differ)}' "
        f"data-wrong='{int(wrong)}'><b>{escape(record['prompt'])}</b> <small>{numbers}, "
        f"{escape(record['tag'])}</small><div class='runs'>{''.join(columns)}</div></div>"
    )


def _picture(scored: Scored, row: dict[str, Any], base: Path) -> str:
    file = scored.contents.folder / row["filename"]
    link = quote(Path(os.path.relpath(file.resolve(), base.resolve())).as_posix())
    word = "correct" if row["correct"] else row["reason"]
    return (
        f"<figure><a href='{link}'><img loading='lazy' class='{'ok' if row['correct'] else ''}' "
        f"src='{link}' alt='{escape(word)}' title='{escape(word)}'></a>"
        f"<figcaption>{escape(word)}</figcaption></figure>"
    )


def _row(cell: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(v)}</{cell}>" for v in values) + "</tr>"


def _ink(k: int) -> str:
    return _INK[k % len(_INK)]


def _y(share: float, height: int) -> float:
    return 20 + height * (1 - share)

"""The page and the plot of a comparison: means, 95 % intervals, differences from best-of-N."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
_DRAWS = 4000
BASES = ("best_of_n", "best_of_n_eta1")
_HEAD = """# Methods compared at equal network calls

{prompts} held-out sticker prompts, {seeds} seed{s}, budgets of {budgets} network rows a prompt
(guidance counts two: a sample of {steps} steps costs {cost}). The sticker CLIP is the reward of
every search; the detector's verdict (GenEval's rules) is seen by none. Brackets are 95 % intervals
from a bootstrap over prompts; differences from best-of-N are paired by prompt and seed. Rows that
are differentiated cost about three of the others in time: compare the seconds too, which are the
run's share of all calls on {threads} CPU thread{t} in {dtype}, all prompts together, less what
other jobs on the machine took.

Made by `python -m benchmarks.comparison --dtype {dtype}`; defaults of every method, no tuning
for this world. Where a budget does not pay for the defaults, smaller settings stand behind the
name. `best_of_n_eta1` is best-of-N with the noise that particle methods add on the way: what that
noise is worth without steering.

![reward and verdict against rows and seconds]({plot})
"""
_CELLS = (
    "method", "seeds", "reward", "detector", "reward - best_of_n", "detector - best_of_n",
    "reward - best_of_n_eta1", "detector - best_of_n_eta1", "rows", "of them backward",
    "reward calls", "decodes", "seconds",
)  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and the 95 % bootstrap interval over the first axis (prompts)."""
    picks = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    draws = values[picks].mean(axis=tuple(range(1, values.ndim + 1)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def text(values: np.ndarray, digits: int = 3) -> str:
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def grouped(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows of one method and budget, by seed."""
    out: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: r["seed"]):
        if "refused" not in row:
            out[row["method"], row["nfe_budget"]].append(row)
    return out


def per_prompt(rows: list[Row], name: str) -> np.ndarray:
    """[prompts, seeds]."""
    return np.array([row[name] for row in rows]).T


def rows_each(rows: list[Row]) -> float:
    """Network rows a prompt."""
    return float(np.mean([row["nfe"] for row in rows]))


def seconds(rows: list[Row]) -> float:
    """A prompt's, less the time that other jobs on the machine took."""
    return float(np.mean([row["seconds"] * min(row["cpu_share"], 1.0) for row in rows]))


def settings(rows: list[Row]) -> str:
    """Options that are not the defaults, in words."""
    options = rows[0].get("options") or {}
    said = ", ".join(f"{k} {v[0] if isinstance(v, list) else v}" for k, v in options.items())
    return f" ({said})" if said else ""


def gain(mine: list[Row], other: list[Row], name: str) -> str:
    """Difference from another method on the same prompts and seeds; empty from itself."""
    seeds = {row["seed"] for row in mine} & {row["seed"] for row in other}
    if not seeds or mine is other:
        return ""
    ours, theirs = ([row for row in rows if row["seed"] in seeds] for rows in (mine, other))
    return text(per_prompt(ours, name) - per_prompt(theirs, name))


def table(rows: list[Row], nfe: int) -> str:
    """One budget, highest reward first."""
    groups = grouped(rows)
    lines = []
    for (method, budget), mine in groups.items():
        if budget != nfe and method != "unsteered":
            continue
        cells = [f"`{method}`{settings(mine)}" if method != "unsteered" else method]
        cells.append(str(len(mine)))
        cells += [text(per_prompt(mine, name)) for name in ("reward", "heldout")]
        for base in BASES:
            other = groups.get((base, nfe), [])
            cells += [gain(mine, other, name) for name in ("reward", "heldout")]
        for name in ("nfe", "nfe_backward", "reward_calls", "decodes"):
            cells.append(f"{np.mean([row[name] for row in mine]):.0f}")
        cells.append(f"{seconds(mine):.2f}")
        lines.append((-float(per_prompt(mine, "reward").mean()), "| " + " | ".join(cells) + " |"))
    head = "| " + " | ".join(_CELLS) + " |\n|" + "---|" * len(_CELLS)
    return "\n".join([head, *(line for _, line in sorted(lines))])


def draw(rows: list[Row], path: Path) -> None:
    """Reward and verdict against rows and seconds; both kinds of best-of-N are thick lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = grouped(rows)
    methods = sorted({m for m, _ in groups} - {"unsteered"})
    colours, markers = plt.get_cmap("tab10").colors, "os^Dv"  # pairs tell more lines apart
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), sharey="row")
    measures = (("reward", "CLIP reward"), ("heldout", "detector verdict (held out)"))
    scales = ((rows_each, "network rows a prompt"), (seconds, "seconds a prompt"))
    for line, (measure, label) in zip(axes, measures, strict=True):
        for axis, (cost, title) in zip(line, scales, strict=True):
            for k, method in enumerate(methods):
                colour, marker = colours[k % 10], markers[k // 10 + k % 2]
                mine = [groups[m, b] for m, b in sorted(groups) if m == method]
                x = [cost(g) for g in mine]
                y = [per_prompt(g, measure).mean() for g in mine]
                thick = method in BASES
                axis.plot(x, y, ":" if method == BASES[1] else "-", label=method, markersize=5,
                          marker=marker, color="black" if thick else colour,
                          linewidth=3.0 if thick else 1.2)  # fmt: skip
            axis.set(xlabel=title, ylabel=label, xscale="log")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.subplots_adjust(right=0.84, left=0.06, top=0.97, bottom=0.07, wspace=0.08)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_page(rows: list[Row], page: Path, notes: str = "") -> None:
    """Writes the page; a section of remarks by hand at its end survives."""
    plot = page.with_suffix(".png")
    draw(rows, plot)
    ran = [row for row in rows if "refused" not in row]
    budgets = sorted({row["nfe_budget"] for row in ran})
    seeds, threads = len({row["seed"] for row in ran}), ran[0]["threads"]
    parts = [
        _HEAD.format(
            prompts=ran[0]["prompts"],
            steps=ran[0]["steps"],
            cost=2 * ran[0]["steps"],
            seeds=seeds,
            s="s" * (seeds > 1),
            threads=threads,
            dtype=ran[0].get("dtype", "float32"),
            t="s" * (threads > 1),
            plot=plot.name,
            budgets=", ".join(map(str, budgets)),
        )
    ]
    for nfe in budgets:
        parts.append(f"## {nfe} network rows a prompt\n\n{table(rows, nfe)}\n")
    refused = {(r["method"], r["nfe_budget"]): r["refused"] for r in rows if "refused" in r}
    if refused:
        said = [f"* `{m}` at {b}: {why}" for (m, b), why in refused.items()]
        parts.append("## Refused: the budget is too small\n\n" + "\n".join(said) + "\n")
    mark = "## What this says"
    if page.exists() and mark in page.read_text():
        notes = mark + page.read_text().split(mark, 1)[1]
    parts.append(notes)
    page.write_text("\n".join(part for part in parts if part))

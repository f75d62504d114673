"""`steer stickers eval`: how good the embedded models are, as one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(help="The embedded sticker world.", no_args_is_help=True)

Rows = list[tuple[str, str, float, str]]
"""(part, figure, value, bar); the bar is text such as ">= 0.90", or empty."""
BARS: dict[str, str] = {
    "autoencoder/psnr_boxes": ">= 26",
    "objects/right": ">= 0.98",
    "clip/caption_among_64": ">= 0.92",
    "clip/swapped_colors_told": "< 0.85",
    "clip/swapped_places_told": "< 0.85",
    "stickers/single_object": ">= 0.90",
    "stickers/two_object": ">= 0.60",
    "stickers/colors": ">= 0.70",
    "stickers/overall": "0.40 - 0.75",
}
WITHIN = 0.15  # of the overall share of `stickers`, for the other two
HEADROOM = 0.2  # by which the best of many beats one image
ORACLE_PROMPTS = 60


@app.callback()
def root() -> None:
    """The embedded sticker world."""


@app.command("eval")
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="May be given several times; all by default."),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Held-out prompts, in GenEval's mix.")] = 553,
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt")] = 4,
    oracle: Annotated[
        int, typer.Option("--oracle", help="Best of so many by the judge; 0 leaves it out.")
    ] = 64,
    quick: Annotated[
        bool, typer.Option("--quick", help="120 prompts, one image each, best of 16.")
    ] = False,
    parts: Annotated[
        bool, typer.Option("--parts/--no-parts", help="Autoencoder, detector and CLIP too.")
    ] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the pipeline call.")
    ] = None,
    grids: Annotated[Path | None, typer.Option("--grids", help="Folder for sheets.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, last line.")] = False,
) -> None:
    """Measure the sticker models on held-out scenes and prompts, by the judge."""
    from steering.apps.jobs import parse_settings
    from steering.loading import SHIPPED

    if quick:
        n, images_per_prompt, oracle = min(n, 120), 1, min(oracle, 16)
    check_sizes(n, images_per_prompt, oracle)
    call = parse_settings(settings or [])
    data: dict[str, Any] = measure_parts(quick) if parts else {}
    for name in model or SHIPPED:
        data[name] = measure_model(name, call, n, images_per_prompt, oracle, grids)
    table = rows(data)
    Console().print(tabulate(table))
    if as_json:
        setup = {"n": n, "images_per_prompt": images_per_prompt, "oracle": oracle, "call": call}
        typer.echo(json.dumps({"setup": setup, **data, "bars": verdicts(table)}))


def check_sizes(n: int, images_per_prompt: int, oracle: int) -> None:
    """Raises OptionError for sizes that measure nothing."""
    from steering.errors import OptionError
    from steering.stickers.prompts import GENEVAL_MIX

    if n < len(GENEVAL_MIX) or images_per_prompt < 1 or oracle < 0:
        raise OptionError(
            f"--n {n} --images-per-prompt {images_per_prompt} --oracle {oracle}: give at least "
            f"{len(GENEVAL_MIX)} prompts (one a tag), 1 image and 0 or more draws."
        )


def measure_parts(quick: bool) -> dict[str, Any]:
    """Autoencoder, detector and CLIP."""
    from steering.stickers import measure

    size = 4 if quick else 1
    return {
        "autoencoder": measure.autoencoder(256 // size),
        "detector": measure.detector(100 // size),
        "clip": measure.clip(1024 // size),
    }


def measure_model(
    name: str,
    call: dict[str, Any],
    n: int,
    images_per_prompt: int,
    oracle: int,
    grids: Path | None,
) -> dict[str, Any]:
    """Shares per tag, Frechet distance and the headroom of one generator."""
    from steering.stickers import measure, prompts
    from steering.stickers.judge import StickerJudge

    texts, judge = prompts("heldout", n), StickerJudge()
    with tqdm(desc=name, unit="image", leave=False, disable=None) as bar:

        def report(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        generator = measure.Generator(name, call, report=report)
        figures, right, first = measure.generator(generator, texts, judge, images_per_prompt)
        if grids is not None:
            write_grid(first, grids / f"stickers-samples-{name}.png", texts)
        if not oracle:
            return dict(figures)
        every = max(1, round(n / ORACLE_PROMPTS))
        best = measure.oracle(generator, texts[::every], judge, oracle, right[::every])
    return {**figures, "oracle": {**best, "draws": oracle, "prompts": len(texts[::every])}}


def write_grid(images: Tensor, path: Path, texts: list[str], columns: int = 6) -> None:
    """The first six prompts of each tag, one row a tag."""
    from steering.stickers import TAGS, parse
    from steering.stickers.train.evaluate import save_grid

    tags = [parse(text)["tag"] for text in texts]
    firsts = [[k for k, t in enumerate(tags) if t == tag][:columns] for tag in TAGS]
    columns = min(map(len, firsts))
    chosen = images[[k for row in firsts for k in row[:columns]]]
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = chosen.permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    save_grid(pixels, path, columns=columns, zoom=2)


def rows(data: dict[str, Any]) -> Rows:
    """The figures with their bars, in the order of measurement."""
    out: Rows = []
    for part, figures in data.items():
        if part == "detector":
            for kind, group in figures.items():
                bar = ">= 0.95"
                out += [(kind, k, v, BARS.get(f"{kind}/{k}", bar)) for k, v in group.items()]
            continue
        best = figures.get("oracle")
        out += [(part, k, v, bar_of(part, k, data)) for k, v in figures.items() if k != "oracle"]
        if best:
            label = f"best of {best['draws']}, {best['prompts']} prompts"
            gain = best["overall"] - best["one_image"]
            out += [
                (part, f"one image, {best['prompts']} prompts", best["one_image"], ""),
                (part, label, best["overall"], ""),
                (part, "headroom", gain, f">= {HEADROOM}"),
            ]
    return out


def bar_of(part: str, figure: str, data: dict[str, Any]) -> str:
    """The bar of a figure; those of the other generators hang on `stickers`."""
    if figure == "overall" and part.startswith("stickers-") and "stickers" in data:
        middle = data["stickers"]["overall"]
        return f"{middle - WITHIN:.3f} - {middle + WITHIN:.3f}"
    return BARS.get(f"{part}/{figure}", "")


def met(value: float, bar: str) -> bool | None:
    """Whether a value passes its bar; None without one."""
    if not bar:
        return None
    if " - " in bar:
        low, high = map(float, bar.split(" - "))
        return low <= value <= high
    sign, limit = bar.split()
    return value >= float(limit) if sign == ">=" else value < float(limit)


def verdicts(table: Rows) -> dict[str, bool]:
    """Which bars are met, by "part/figure"."""
    return {f"{p}/{f}": bool(met(v, bar)) for p, f, v, bar in table if bar}


def tabulate(table: Rows) -> Table:
    """A rich table; figures under their bar are marked."""
    out = Table(title="Sticker models")
    for column in ("part", "figure", "value", "bar", ""):
        out.add_column(column, justify="right" if column == "value" else "left")
    last = ""
    for part, figure, value, bar in table:
        word = {None: "", True: "met", False: "[red]missed[/red]"}[met(value, bar)]
        out.add_row(part if part != last else "", figure, f"{value:.3f}", bar, word)
        last = part
    return out

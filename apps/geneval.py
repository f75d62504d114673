"""`steer geneval`: images for a list of prompts, their verdicts, and a report on several runs."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from steering.errors import OptionError, SteeringError

if TYPE_CHECKING:
    from steering.apps.geneval_run import Settings
    from steering.apps.geneval_store import Job
    from steering.stickers.grammar import Metadata

app = typer.Typer(
    help="GenEval: make images for prompts, score them, report on runs.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console(stderr=True)

STICKERS = "stickers"
UNSTEERED = "unsteered"
Detector = Annotated[
    str | None,
    typer.Option("--detector", help="stickers, mask2former, mask2former=FOLDER or detr=FOLDER."),
]
Colors = Annotated[
    str | None, typer.Option("--colors", help="stickers, clip or clip=MODEL:PRETRAINED.")
]
Heldout = Annotated[
    list[str] | None, typer.Option("--heldout", help="Reward that scores but never guides.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Method = Annotated[
    str, typer.Option("--method", help="See `steer methods`; 'unsteered' is one sample.")
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help="A file like GenEval's evaluation_metadata.jsonl."),
]
Images = Annotated[
    int,
    typer.Option("--images-per-prompt", help="Each a run of its own with the whole --nfe."),
]
MaxBatch = Annotated[
    int | None,
    typer.Option("--max-batch", help="Most rows of one network call; the model's wish, or 64."),
]
Listed = Annotated[
    str | None,
    typer.Option("--prompts", help="What the folder should hold: a prompts file, or 'stickers'."),
]
Number = Annotated[
    int | None, typer.Option("--n", help="Only so many prompts, spread over the list.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: an option of the method, or of the pipeline call."),
]
Retry = Annotated[
    bool, typer.Option("--retry-quarantined", help="Another try for images given up.")
]
Address = Annotated[
    str | None, typer.Option("--address", help="Of a Ray cluster; none starts one here.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Ray workers; one per GPU, or one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def run(
    out: Annotated[Path, typer.Option("--out", help="Folder of this run.")],
    model: Annotated[str, typer.Option("--model", help="'stickers', folder, hub id.")] = STICKERS,
    method: Method = "fk",
    reward: Annotated[str, typer.Option("--reward", help="Guiding reward.")] = "clip",
    heldout: Heldout = None,
    nfe: Annotated[int | None, typer.Option("--nfe", help="Network rows of one image.")] = None,
    images_per_prompt: Images = 4,
    prompts: Prompts = None,
    n: Number = None,
    settings: Setting = None,
    seed: Annotated[int, typer.Option("--seed", help="The seeds of all images follow.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    retry: Retry = False,
    engine: Annotated[str, typer.Option("--engine", help="local or ray.")] = "local",
    address: Address = None,
    workers: Workers = None,
    max_batch: MaxBatch = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, ...")] = "auto",
    device: Device = None,
    score: Annotated[
        bool,
        typer.Option("--score/--no-score", help="Score at the end; what scores is tried first."),
    ] = True,
    detector: Detector = None,
    colors: Colors = None,
    as_json: AsJson = False,
) -> None:
    """Make images for every prompt, then score them and write a result card."""
    from steering.apps.geneval_folder import look
    from steering.apps.geneval_run import Settings
    from steering.apps.geneval_store import job_of

    records, source = _prompts(prompts, model, n)
    method, options, call = _split(method, settings or [])
    wanted = Settings(
        model=model, dtype=dtype, device=device, method=method, options=options, call=call,
        reward=reward, heldout=tuple(heldout or ()), nfe=nfe, seed=seed, max_batch=max_batch,
        images_per_prompt=images_per_prompt,
    )  # fmt: skip
    if engine not in ("local", "ray"):
        raise OptionError(f"--engine {engine!r}: give local or ray.")
    if score:
        _check_judges(out, wanted, records, detector, colors, heldout)
    with _workers(wanted, job_of(records[0], 0, 0), engine, address, workers) as (opened, samples):
        _make(out, wanted, opened, samples, records, source, resume, retry)
    given_up = look(out).quarantined
    for key, error in given_up.items():
        console.print(
            f"Given up after two tries: prompt {key[0]}, image {key[1]}: {error}", markup=False
        )
    if score:
        _score(out, detector, colors, heldout, False, device)
        report([out], as_json=as_json)
    elif as_json:
        typer.echo(json.dumps({"out": str(out), "images": len(look(out).samples)}))
    if given_up:
        raise typer.Exit(1)


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="A run, or images in GenEval's layout.")],
    detector: Detector = None,
    colors: Colors = None,
    heldout: Heldout = None,
    prompts: Listed = None,
    again: Annotated[bool, typer.Option("--again", help="Forget earlier verdicts.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score the images of a folder; those that have a verdict are skipped."""
    done = _score(folder, detector, colors, heldout, again, device, prompts)
    if as_json:
        problems = {"unreadable": done.unreadable, "missing": done.contents.missing}
        typer.echo(json.dumps({"new": done.new, "known": done.known, **problems}))
    if done.unreadable or done.contents.missing:
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Scored folders; the first is the base.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="Also a page with plots and images.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a table, write card.json into each folder, and with --html a comparison page."""
    from steering.apps.geneval_page import write_page
    from steering.apps.geneval_report import (
        open_scored,
        overlaps,
        tabulate,
        warnings,
        write_card,
    )

    runs = [(scored, write_card(scored)[1]) for scored in map(open_scored, folders)]
    console.print(tabulate([(scored.name, found) for scored, found in runs]))
    for scored, found in runs:
        for word in warnings(found):
            console.print(f"{scored.name}: {word}", markup=False)
    for word in overlaps([scored for scored, _ in runs]):
        console.print(word, markup=False)
    if html is not None:
        console.print(f"Page: {write_page(runs, html)}")
    if as_json:
        typer.echo(json.dumps({scored.name: found for scored, found in runs}))


def _prompts(given: str | None, model: str, n: int | None) -> tuple[list[Metadata], str]:
    """(records, where they are from): a file's, or the sticker set."""
    from steering.rewards.geneval import read_prompts
    from steering.stickers import parse
    from steering.stickers import prompts as sticker_prompts

    if given is None and not model.startswith(STICKERS):
        raise OptionError(
            "Give --prompts FILE, a list such as GenEval's evaluation_metadata.jsonl."
        )
    if given in (None, STICKERS):
        records, source = [parse(p) for p in sticker_prompts("heldout", n=553)], STICKERS
    else:
        records, source = read_prompts(str(given)), Path(str(given)).name
    if n is not None:
        if not 1 <= n <= len(records):
            raise OptionError(f"--n {n}: give 1 to {len(records)}.")
        records = [records[k * len(records) // n] for k in range(n)]
    return records, source


def _split(method: str, settings: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(method, its options, arguments of the pipeline call)."""
    from steering.apps.jobs import parse_settings
    from steering.registry import METHODS

    values = parse_settings(settings)
    if method == UNSTEERED:
        method, values = "best_of_n", {"n": 1, **values}
    known = {f.name for f in dataclasses.fields(METHODS.get(method.partition("/")[0]))}
    options = {k: v for k, v in values.items() if k in known}
    return method, options, {k: v for k, v in values.items() if k not in known}


@contextmanager
def _workers(
    settings: Settings, first: Job, engine: str, address: str | None, workers: int | None
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(what the opened model says of itself, results for jobs)."""
    from steering.method import build_method

    build_method(settings.method, settings.options)  # a typing error is told before any start
    if engine == "ray":
        from steering.apps.cluster import Cluster

        with Cluster(settings, address=address, workers=workers) as cluster:
            yield cluster.describe(first), cluster.samples
        return
    from steering.apps.geneval_run import Worker

    worker = Worker(settings)
    yield worker.describe(first), worker.samples


def _make(
    out: Path,
    settings: Settings,
    opened: dict[str, Any],
    samples: Any,  # noqa: ANN401
    records: list[Metadata],
    source: str,
    resume: bool,
    retry: bool,
) -> None:
    from steering.apps.geneval_run import make, run_json
    from steering.apps.geneval_store import Store

    recipe = run_json(settings, opened, records, source)
    with Store(out, recipe, records, resume=resume, retry=retry) as store:
        try:
            make(store, samples)
        except KeyboardInterrupt:
            console.print(f"Stopped with {len(store.done)} images; go on with --resume.")
            raise typer.Exit(130) from None


def _check_judges(
    out: Path,
    settings: Settings,
    records: list[Metadata],
    detector: str | None,
    colors: str | None,
    heldout: list[str] | None,
) -> None:
    """Opens what will score the images, so that a mistake in it costs no image."""
    from steering.apps.geneval_folder import read_run
    from steering.apps.geneval_judges import open_judges

    path = out / "run.json"
    before = read_run(path).get("heldout", []) if path.is_file() else []
    run = {"model": {"source": settings.model}, "reward": settings.reward, "heldout": before}
    # on the CPU: the accelerator's memory is the model's
    judges = open_judges(run, detector=detector, colors=colors, heldout=heldout, device="cpu")
    judges.check(out, records)


def _score(
    folder: Path,
    detector: str | None,
    colors: str | None,
    heldout: list[str] | None,
    again: bool,
    device: str | None,
    prompts: str | None = None,
) -> Any:  # noqa: ANN401
    """Scores a folder and says what is wrong with it."""
    from steering.apps.geneval_folder import look
    from steering.apps.geneval_judges import open_judges
    from steering.apps.geneval_score import score_folder
    from steering.rewards.images import default_device

    gc.collect()  # the pipeline, whose room the detector may need
    listed = None if prompts is None else _prompts(prompts, STICKERS, None)[0]
    judges = open_judges(
        look(folder).run or {}, detector=detector, colors=colors, heldout=heldout,
        device=device or default_device(),
    )  # fmt: skip
    done = score_folder(
        folder, judges.scorer, heldout=judges.heldout, guide=judges.guide, embed=judges.embed,
        embed_name=judges.embed_name, device=judges.device, prompts=listed, again=again,
    )  # fmt: skip
    for title, lines in (
        ("cannot be read", done.unreadable),
        ("missing", done.contents.missing),
        ("ignored: no image of this run", done.contents.extra),
    ):
        if lines:
            console.print(f"{len(lines)} {title}: {'; '.join(lines[:5])}", markup=False)
    if not done.new and not done.known:
        raise SteeringError(f"{folder}: not one image could be scored.")
    return done

"""The `steer` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steering.apps.demo_command import demo
from steering.apps.geneval import app as geneval
from steering.apps.stickers import app as stickers
from steering.errors import SteeringError

app = typer.Typer(
    help="Steer diffusion and flow models at inference time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
app.add_typer(stickers, name="stickers")
app.add_typer(geneval, name="geneval")
app.command("demo")(demo)

MODEL_HELP = "'stickers', 'stickers-sd', 'stickers-turbo', a folder, or a hub id."
Prompt = Annotated[str, typer.Argument(help="What the picture should show.")]
ModelOption = Annotated[
    str,
    typer.Option("--model", help=MODEL_HELP),
]
RewardOption = Annotated[
    str, typer.Option("--reward", help="Guiding reward: a name or 'clip + 0.5*brightness'.")
]
Heldout = Annotated[
    list[str] | None,
    typer.Option("--heldout", help="Verifier the search never sees; may be given several times."),
]
Nfe = Annotated[int, typer.Option("--nfe", help="Network rows to spend; guidance counts 2.")]
Seed = Annotated[int, typer.Option("--seed", help="Names all random numbers of the run.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for pictures and result.json.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of output.")
]
AsJsonList = Annotated[
    bool, typer.Option("--json", help="Print one JSON list of objects instead of the table.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: an option of the method, or of the pipeline call."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Particles = Annotated[
    int | None, typer.Option("--n-particles", help="n_particles (or n) of methods that have it.")
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
) -> None:
    if version:
        import steering

        typer.echo(steering.__version__)
        raise typer.Exit


@app.command()
def generate(
    prompt: Prompt,
    model: ModelOption = "stickers",
    method: Annotated[str, typer.Option("--method", help="See `steer methods`.")] = "fk",
    reward: RewardOption = "clip",
    heldout: Heldout = None,
    nfe: Nfe = 800,
    n_particles: Particles = None,
    settings: Setting = None,
    seed: Seed = 0,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make a picture of PROMPT that the reward likes."""
    from steering.apps.jobs import Job, report
    from steering.result import finite, picture_name

    job = Job(model=model, dtype=dtype, device=device, reward=reward, heldout=heldout or [])
    folder = out or Path("out/steer")
    options, call = job.split(method, settings or [], n_particles)
    result = job.steer(prompt, method, nfe=nfe, seed=seed, out=folder, options=options, call=call)
    report(console, result, method)
    if as_json:
        files = [str(folder / picture_name(k)) for k in range(len(result))]
        data = {
            "best_reward": result.best_reward,
            "heldout": {k: v.tolist() for k, v in result.heldout.items()},
            "ledger": result.ledger.to_json(),
            "files": files,
            "recipe": result.recipe.to_json(),
        }
        typer.echo(json.dumps(finite(data), allow_nan=False))


@app.command()
def compare(
    prompt: Prompt,
    model: ModelOption = "stickers",
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated.")] = "best_of_n,fk",
    reward: RewardOption = "clip",
    heldout: Heldout = None,
    nfe: Nfe = 800,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.png.")] = Path("out"),
    settings: Setting = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Unsteered beside several methods at equal network calls, in one picture."""
    from steering.apps.comparison import compare_methods, draw, tabulate
    from steering.apps.jobs import Job
    from steering.result import finite

    job = Job(model=model, dtype=dtype, device=device, reward=reward, heldout=heldout or [])
    names = [m.strip() for m in methods.split(",") if m.strip()]
    entries = compare_methods(job, prompt, names, nfe, seed, out, settings or [])
    picture = draw(entries, prompt, out / "compare.png")
    console.print(tabulate(entries, prompt))
    console.print(f"Picture: {picture}")
    if as_json:
        rows = [entry.to_json() for entry in entries]
        typer.echo(json.dumps(finite({"prompt": prompt, "picture": str(picture), "rows": rows})))


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A PNG written by steer.")],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Make the picture in FILE again from the recipe inside it and compare the pixels."""
    from steering.repeat import replay as run

    found = run(file, out=out)
    words = "identical" if found.identical else f"different (by up to {found.difference} of 255)"
    console.print(f"{file}: {words}; reward {found.result.rewards[found.image]:.4f}")
    for name, (old, new) in found.changed.items():
        console.print(f"  {name}: made with {old}, here {new}")
    if as_json:
        data = {"identical": found.identical, "difference": found.difference}
        typer.echo(json.dumps({**data, "changed": found.changed}))
    if not found.identical:
        raise typer.Exit(1)


@app.command()
def methods(as_json: AsJsonList = False) -> None:
    """List the steering methods, what they target and what they need."""
    from steering.apps.listing import method_rows

    rows = method_rows()
    _show("Methods", rows, ("name", "target", "needs", "summary", "paper"), as_json)


@app.command()
def rewards(as_json: AsJsonList = False) -> None:
    """List the rewards."""
    from steering.apps.listing import reward_rows

    rows = reward_rows()
    columns = ("name", "hub_id", "licence", "range", "differentiable", "memory", "summary")
    _show("Rewards", rows, columns, as_json)


@app.command()
def score(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="One for all or one each; else from their recipes."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward", help="A name or spec, clip by default; may be given several times."
        ),
    ] = None,
    device: Device = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            min=1,
            help="Pictures of one size in a call; a reward that compares them gets them all.",
        ),
    ] = 16,
    as_json: AsJsonList = False,
) -> None:
    """Score picture files with any rewards."""
    from steering.apps import score as scoring
    from steering.result import finite

    files = scoring.find(images)
    texts = scoring.prompts_of(files, prompt or [])
    rows = scoring.score_files(
        files, texts, reward or ["clip"], device=device, batch_size=batch_size
    )
    if as_json:
        typer.echo(json.dumps(finite(rows), allow_nan=False))
    else:
        Console().print(scoring.tabulate(rows))
    failures = dict.fromkeys(error for row in rows for error in row["errors"].values())
    for error in failures:
        console.print(error, markup=False)
    if failures:
        raise typer.Exit(1)


@app.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward: a name or a spec.")],
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 to be reached from outside.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="To listen on.")] = 8000,
    device: Device = None,
    max_images: Annotated[int, typer.Option("--max-images", help="In one request.")] = 64,
    max_mib: Annotated[int, typer.Option("--max-mib", help="Of one request.")] = 64,
    max_megapixels: Annotated[
        int, typer.Option("--max-megapixels", help="Of all images of one request.")
    ] = 64,
) -> None:
    """Serve a reward over HTTP for remote(url=...)."""
    from steering.apps.serve_reward import Limits, run

    limits = Limits(
        max_images=max_images, max_bytes=max_mib * 2**20, max_total=max_megapixels * 2**20
    )
    run(name, host=host, port=port, device=device, limits=limits)


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(help=MODEL_HELP),
    ],
    prompt: Annotated[str, typer.Option("--prompt")] = "a photo of a red apple",
    settings: Setting = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prove that a pipeline can be driven: it must reproduce its own pipe(...) exactly."""
    from steering.apps.jobs import parse_settings
    from steering.loading import call_defaults, load
    from steering.pipelines.check import check as run

    pipe = load(model, dtype=dtype, device=device)
    report = run(pipe, prompt=prompt, **{**call_defaults(model), **parse_settings(settings or [])})
    console.print(str(report))
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help=MODEL_HELP),
    ] = "stickers",
    method: Annotated[str, typer.Option("--method", help="See `steer methods`.")] = "fk",
    reward: RewardOption = "clip",
    nfe: Nfe = 800,
    most: Annotated[int, typer.Option("--most", help="Rows wished for in one call.")] = 64,
    settings: Setting = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say before a run what it will spend, how wide its calls may be, and what a split costs."""
    from steering.apps.jobs import Job
    from steering.apps.planning import forecast

    job = Job(model=model, dtype=dtype, device=device, reward=reward)
    options, call = job.split(method, settings or [])
    cost, memory = forecast(job, method, options, call, nfe=nfe, most=most)
    console.print(
        f"{method}: at most {cost.nfe} network rows, {cost.decodes} decodes, "
        f"{cost.reward_calls} reward calls"
    )
    console.print(str(memory), markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"cost": vars(cost), "memory": memory.to_json()}))


def _show(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*[str(row[c]) for c in columns])
    Console().print(table)


def guarded(run: Callable[[], Any]) -> int:
    """Runs a command; every error the library raises on purpose becomes one line and exit 2."""
    try:
        run()
    except SteeringError as error:
        console.print("[red]Error:[/red]", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2
    return 0


def main() -> None:
    """Entry point of the `steer` command."""
    sys.exit(guarded(app))


if __name__ == "__main__":
    main()

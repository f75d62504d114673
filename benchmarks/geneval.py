"""GenEval on stickers: the full comparison, its ceiling, kills, throughput, Ray's overhead.

python -m benchmarks.geneval full|ceiling|kills|throughput|ray [--model M] [--nfe N] [--steps T]
                             [--prompts P] [--images K] [--out DIR] [--workers W]
                             [--set key=value ...]

full        unsteered (all rows in one sample's steps), best-of-N and FK at equal network rows;
            a run that was begun by an earlier call is resumed, and its seconds are null
ceiling     rendered scenes instead of generated ones: what the judge itself gets wrong
kills       a run killed at 20 random moments and resumed, against an undisturbed one
throughput  prompts together against one at a time, best-of-1 and best-of-8
ray         one Ray worker against the local engine
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from steering.apps.geneval_folder import look
from steering.apps.geneval_page import write_page
from steering.apps.geneval_report import open_scored, paired, write_card
from steering.apps.geneval_run import Settings, Worker
from steering.apps.geneval_score import score_folder
from steering.apps.geneval_store import Job, Journal
from steering.rewards.geneval_colors import Scorer, StickerColors
from steering.rewards.geneval_detectors import Stickers
from steering.stickers import StickerWorld, parse
from steering.stickers import prompts as sticker_prompts

KILLS = 20


def command(given, name: str, method: str, steps: int, *more: str) -> list[str]:
    """`steer geneval run` as a list of words."""
    settings = [f"num_inference_steps={steps}", *given.set]
    return [
        sys.executable, "-m", "steering.apps.cli", "geneval", "run",
        "--out", str(given.out / name), "--model", given.model, "--method", method,
        "--n", str(given.prompts), "--images-per-prompt", str(given.images), "--resume",
        *[word for s in settings for word in ("--set", s)], *more,
        *(["--engine", "ray", "--workers", str(given.workers)] if given.workers else []),
    ]  # fmt: skip


def full(given) -> dict:
    """All three methods at equal network rows, one table, one page."""
    rows = 2 * given.steps  # guidance asks the network twice
    whole = given.nfe // 2
    runs = {
        "unsteered": ("unsteered", whole, []),
        "best_of_n": ("best_of_n", given.steps, ["--nfe", str(given.nfe)]),
        "fk": ("fk", given.steps, ["--nfe", str(given.nfe)]),
    }
    seconds: dict[str, float | None] = {}
    for name, (method, steps, more) in runs.items():
        resumed = (given.out / name / "samples.jsonl").is_file()
        started = time.perf_counter()
        subprocess.run(command(given, name, method, steps, *more), check=True)
        # of a resumed run only the last part was timed
        seconds[name] = None if resumed else time.perf_counter() - started
    scored = [open_scored(given.out / name) for name in runs]
    cards = {s.name: write_card(s)[1] for s in scored}
    page = write_page([(s, cards[s.name]) for s in scored], given.out / "index.html")
    return {
        "nfe": given.nfe, "rows_per_sample": rows, "seconds": seconds,
        "resumed": [name for name, spent in seconds.items() if spent is None],
        "page": str(page),
        "scores": {name: c["scores"] for name, c in cards.items()},
        "against_unsteered": {s.name: paired(scored[0], s) for s in scored[1:]},
    }  # fmt: skip


def ceiling(given) -> dict:
    """Rendered scenes of every prompt in the official layout, scored."""
    folder, world = given.out / "rendered", StickerWorld()
    shutil.rmtree(folder, ignore_errors=True)
    for i, text in enumerate(sticker_prompts("heldout", n=553)[: given.prompts]):
        place = folder / f"{i:05d}" / "samples"
        place.mkdir(parents=True)
        (place.parent / "metadata.jsonl").write_text(json.dumps(parse(text)))
        for k in range(given.images):
            Image.fromarray(world.render(text, 1000 * i + k)).save(place / f"{k:04d}.png")
    started = time.perf_counter()
    score_folder(folder, Scorer(Stickers(), StickerColors()), show=False)
    seconds = time.perf_counter() - started
    return {"scores": write_card(open_scored(folder))[1]["scores"], "scoring_seconds": seconds}


def table(folder: Path) -> dict:
    """Verdicts by image."""
    score_folder(folder, Scorer(Stickers(), StickerColors()), again=True, show=False)
    rows = Journal(folder / "results.jsonl").rows
    return {(r["prompt_index"], r["image"]): (r["correct"], r["reason"]) for r in rows}


def kills(given) -> dict:
    """The process is killed when a random number of images is there, and a random moment later."""
    for name in ("whole", "killed"):
        shutil.rmtree(given.out / name, ignore_errors=True)
    words = command(
        given, "whole", "best_of_n", given.steps, "--nfe", str(given.nfe), "--no-score"
    )
    subprocess.run(words, check=True)
    words = command(
        given, "killed", "best_of_n", given.steps, "--nfe", str(given.nfe), "--no-score"
    )
    rng, journal = np.random.default_rng(0), given.out / "killed/samples.jsonl"
    total, at = given.prompts * given.images, []

    def count() -> int:
        return journal.read_bytes().count(b"\n") if journal.is_file() else 0

    for k in range(KILLS):
        target = count() + int(rng.integers(0, max(2, 2 * total // KILLS)))
        process = subprocess.Popen(words)
        while process.poll() is None and count() < min(target, total - (KILLS - k)):
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.5)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        at.append(count())
    subprocess.run(words, check=True)
    keys = [(r["prompt"], r["image"]) for r in Journal(journal).rows]
    missing = look(given.out / "killed").missing
    return {
        "killed_with_images": at, "images": total, "twice": len(keys) - len(set(keys)),
        "missing": len(missing),
        "verdicts_equal": table(given.out / "whole") == table(given.out / "killed"),
    }  # fmt: skip


def jobs_of(given) -> list[Job]:
    texts = sticker_prompts("heldout", n=given.prompts)
    return [
        Job(prompt=i, image=k, text=t) for i, t in enumerate(texts) for k in range(given.images)
    ]


def timed(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def throughput(given) -> dict:
    """Seconds of all jobs together and of the same jobs one at a time, turn about."""
    found = {}
    for n in (1, 8):
        call = {"num_inference_steps": given.steps}
        worker = Worker(Settings(model=given.model, options={"n": n}, call=call))
        jobs = jobs_of(given)
        list(worker.samples(jobs[:2]))
        ratios = []
        for _ in range(3):
            alone = timed(lambda w=worker, j=jobs: [list(w.samples([job])) for job in j])
            ratios.append(alone / timed(lambda w=worker, j=jobs: list(w.samples(j))))
        found[f"best_of_{n}"] = {"ratios": ratios, "median": float(np.median(ratios))}
    return {**found, "bars": {"best_of_1": 3.0, "best_of_8": 1.5}}


def ray(given) -> dict:
    """Seconds of the same jobs, turn about, after both have warmed up."""
    from steering.apps.cluster import Cluster

    settings = Settings(
        model=given.model, options={"n": 4}, call={"num_inference_steps": given.steps}
    )
    local, jobs, ratios = Worker(settings), jobs_of(given), []
    with Cluster(settings, workers=1) as cluster:
        cluster.describe()
        for source in (local.samples, cluster.samples):
            list(source(jobs[:4]))
        for _ in range(3):
            there = timed(lambda: list(cluster.samples(jobs)))
            ratios.append(there / timed(lambda: list(local.samples(jobs))))
    return {"ray_over_local": ratios, "median": float(np.median(ratios)), "bar": 1.10}


CLAIMS = {f.__name__: f for f in (full, ceiling, kills, throughput, ray)}


def run(*, prompts: int, nfe: int) -> dict:
    """The two claims about speed; the others take their own command."""
    del prompts, nfe
    given = parser().parse_args(["throughput", "--prompts", "16", "--images", "2"])
    found, lines = {"throughput": throughput(given)}, []
    for name, bar in found["throughput"]["bars"].items():
        row = found["throughput"][name]
        lines.append(
            f"{given.prompts} prompts x {given.images} images together against one at a time, "
            f"{name}: {row['median']:.2f} ({min(row['ratios']):.2f} to "
            f"{max(row['ratios']):.2f}; bar: {bar})"
        )
    if find_spec("ray") is None:
        return {**found, "table": "\n".join([*lines, "Ray is not installed: pip install ray"])}
    found["ray"] = ray(given)
    over, ratios = found["ray"]["median"], found["ray"]["ray_over_local"]
    lines.append(f"one Ray worker over this process: {over:.3f} ({min(ratios):.3f} to "
                 f"{max(ratios):.3f}; bar: {found['ray']['bar']:.2f})")  # fmt: skip
    return {**found, "table": "\n".join(lines)}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("claim", choices=CLAIMS)
    found.add_argument("--model", default="stickers")
    found.add_argument("--nfe", type=int, default=64)
    found.add_argument("--steps", type=int, default=8)
    found.add_argument("--prompts", type=int, default=553)
    found.add_argument("--images", type=int, default=4)
    found.add_argument("--workers", type=int, default=0, help="Ray workers; 0: in this process")
    found.add_argument("--set", action="append", default=[])
    found.add_argument("--out", type=Path, default=Path("out/geneval"))
    return found


def main() -> None:
    given = parser().parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = CLAIMS[given.claim](given)
    text = json.dumps(found, indent=1, default=str)
    (given.out / f"{given.claim}.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""Claim: the demo serves 8 clients at once: no error, no mixed results, memory flat within 10 %,
and at least twice as many runs a second as one after another.

The server is a process of its own. Beside the ratio stands what the network itself gains from the
rows of 8 clients in one call: shared calls cannot gain more than that. A browser, where there is
one, also tells how long the page takes to open and the first picture to appear.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import steering
from benchmarks.meters import one_thread, spread
from steering.loading import call_defaults
from steering.stickers.prompts import prompts as sticker_prompts

CLIENTS, RUNS, NFE, PARTICLES = 8, 5, 160, 4
LOOKS = 5
SAME, APART = 3.0, 8.0  # mean difference of pixels, of 255: of one picture made twice, of two
SERVE = "from benchmarks.demo_load import serve; serve()"


def run(*, prompts: int, nfe: int) -> dict:
    del prompts, nfe
    return measure(CLIENTS, RUNS, NFE)


def measure(clients: int, runs: int, nfe: int) -> dict:
    """Both ways of doing the same runs, with the server's memory before and after."""
    jobs = sticker_prompts("heldout", n=clients, seed=3)
    with server() as (process, address):
        page = browse(address)
        people = [client(address) for _ in jobs]
        alone, apart = timed(lambda: [
            [one(c, text, 100 * k + r, nfe) for r in range(runs)]
            for k, (c, text) in enumerate(zip(people, jobs, strict=True))
        ])  # fmt: skip
        together(people, jobs, 1, nfe)
        before = resident(process.pid)
        shared, at_once = timed(lambda: together(people, jobs, runs, nfe))
        after = resident(process.pid)
    found = {
        "clients": clients, "runs": runs, "nfe": nfe, "page": page,
        "seconds": {"one after another": apart, "together": at_once},
        "ratio": apart / at_once,
        "network": widening(list(jobs), PARTICLES),
        "memory": {"before": before, "after": after, "growth": after / before - 1},
        **compared(alone, shared, jobs),
    }  # fmt: skip
    return {**found, "table": table(found)}


# --- the server ---------------------------------------------------------------------------------


def serve() -> None:
    """The child process: prints the address once the first model is open."""
    from steering.apps.demo import launch, warm_up
    from steering.apps.demo_order import Offer
    from steering.apps.demo_session import Host

    logging.basicConfig(level=logging.ERROR)
    host = Host(Offer(rewards=("clip", "detector")))
    try:
        ticket = warm_up(host)
        while not ticket.over:
            time.sleep(0.1)
        page, address = launch(host, wait=False)
        print(address, flush=True)
        sys.stdin.read()  # until the parent has had enough
        page.close(verbose=False)
    finally:
        host.close()


@contextlib.contextmanager
def server() -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, address)."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.communicate()


def resident(pid: int) -> float:
    """MiB of memory that a process holds (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


# --- the clients --------------------------------------------------------------------------------


def client(address: str):
    from gradio_client import Client

    return Client(address, verbose=False)


def one(person, text: str, seed: int, nfe: int) -> dict:
    """One run, or the words of its error."""
    try:
        return person.predict(
            text, method="fk", options={"n_particles": PARTICLES}, rewards={"clip": 1.0},
            nfe=nfe, seed=seed, api_name="/steer",
        )  # fmt: skip
    except Exception as error:
        return {"state": "error", "error": str(error), "results": []}


def together(people: list, jobs: list[str], runs: int, nfe: int) -> list[list[dict]]:
    """All clients at once, each doing its own runs in turn."""

    def mine(k: int) -> list[dict]:
        return [one(people[k], jobs[k], 100 * k + r, nfe) for r in range(runs)]

    with ThreadPoolExecutor(len(people)) as pool:
        return list(pool.map(mine, range(len(people))))


def timed(work: Callable[[], list]) -> tuple[list, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def compared(alone: list[list[dict]], shared: list[list[dict]], jobs: list[str]) -> dict:
    """Errors, and results that are not those of the client's own prompt and seed."""
    errors = [r["error"] for rs in (*alone, *shared) for r in rs if r["state"] != "finished"]
    if errors:
        return {"errors": errors, "mixed": None, "differences": None}
    mixed, same, other = 0, [], []
    for k, rows in enumerate(shared):
        for r, run_ in enumerate(rows):
            recipe = run_["results"][0]["recipe"]
            own = pixels(run_)
            same.append(float(np.abs(own - pixels(alone[k][r])).mean()))
            other.append(float(np.abs(own - pixels(alone[(k + 1) % len(jobs)][r])).mean()))
            mine = (recipe["prompts"], recipe["seeds"]) == ([jobs[k]], [100 * k + r])
            mixed += not mine or same[-1] > min(SAME, other[-1])
    return {"errors": [], "mixed": mixed, "differences": {"same": max(same), "other": min(other)}}


def pixels(found: dict) -> np.ndarray:
    data = base64.b64decode(found["results"][0]["pictures"][0].partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


# --- the network and the page -------------------------------------------------------------------


def widening(texts: list[str], particles: int) -> dict:
    """Network rows a second of guided predictions, in turn, and their ratio.

    Of each text's particles alone, and of all texts' in one call, called as the demo calls them.
    One thread's CPU time, which other programs disturb little; on a GPU wall time.
    """
    rows = torch.arange(len(texts) * particles)
    pipe, call = steering.load("stickers"), call_defaults("stickers")
    rates: dict[str, list[float]] = {}
    with one_thread(), steering.wrap(pipe, prompt=texts, **call) as model:
        now = clock(model.device)
        x, middle = model.noise(len(rows), steering.NoiseKey(0)), len(model.grid().times) // 2
        t = model.grid().times[middle]
        for repeat in range(LOOKS + 1):
            for parts in (rows.split(particles), (rows,)):
                before = model.rows
                started = now()
                for part in parts:
                    model.predict(x[part], t, cond=(part // particles).tolist())
                seconds = now() - started
                spent = model.rows - before
                if repeat:
                    rates.setdefault(str(spent // len(parts)), []).append(spent / seconds)
    narrow, wide = rates.values()
    ratios = [b / a for a, b in zip(narrow, wide, strict=True)]
    return {"ratio": spread(ratios), "rows": {n: spread(r) for n, r in rates.items()}}


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds until all that was asked of a device is done."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def browse(address: str) -> dict | None:
    """Seconds until the page can be used, and from pressing Steer to the first picture."""
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        return None
    from playwright.sync_api import sync_playwright

    opened, seen = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for look in range(LOOKS + 1):
            page = browser.new_page()
            page.set_default_timeout(120_000)
            opening = timed(lambda page=page: [
                page.goto(address), page.get_by_text("Options of fk").wait_for(),
            ])[1]  # fmt: skip
            steering_ = timed(lambda page=page: [
                page.locator("#steer").click(), page.locator("#best img").first.wait_for(),
            ])[1]  # fmt: skip
            if look:  # the first one fills caches
                opened.append(opening)
                seen.append(steering_)
            page.close()
        browser.close()
    return {"opened": spread(opened), "first picture": spread(seen)}


def table(found: dict) -> str:
    seconds, memory, network = found["seconds"], found["memory"], found["network"]
    total = found["clients"] * found["runs"]
    rates = ", ".join(f"{name} {total / s:.2f} runs/s" for name, s in seconds.items())
    lines = [
        f"{found['clients']} clients x {found['runs']} runs of {found['nfe']} rows: "
        f"{len(found['errors'])} errors, {found['mixed']} mixed results",
        *found["errors"][:1],
        f"ratio {found['ratio']:.2f} (bar: 2x); {rates}",
        "guided predictions alone, network rows/s: "
        + ", ".join(f"{v['median']:.0f} at {n} rows" for n, v in network["rows"].items())
        + f", ratio {network['ratio']['median']:.2f} "
        f"({network['ratio']['min']:.2f} to {network['ratio']['max']:.2f})",
        f"memory {memory['before']:.0f} MiB after a round, {memory['after']:.0f} MiB at the end: "
        f"{100 * memory['growth']:+.1f} % (bar: 10 %)",
    ]
    if (page := found["page"]) is not None:
        lines += [
            f"{name}: {page[key]['median']:.2f} s ({page[key]['min']:.2f} to "
            f"{page[key]['max']:.2f}; bar: {bar} s)"
            for name, key, bar in (
                ("page opened", "opened", 2),
                ("first picture after Steer", "first picture", 3),
            )
        ]
    return "\n".join(lines)

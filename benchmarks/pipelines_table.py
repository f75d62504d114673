"""Every pipeline set-up against ``pipe(...)`` itself, as one table.

    python -m benchmarks.pipelines_table              all set-ups, tiny random weights
    python -m benchmarks.pipelines_table sd3 flux     some of them
    python -m benchmarks.pipelines_table --throughput 16 sd3

Latents, pixels: largest difference to pipe(...), 0 expected. Prompts, times: relative difference
of a batch over prompts (times) to its rows alone. Gradient: finite difference over gradient.
Query and step: process time of a width-1 predict and of one more step of pipe(...).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import diffusers
import torch
from rich.console import Console
from rich.table import Table

from steering.noise import NoiseKey
from steering.pipelines import check, wrap
from tests import tiny_pipelines as tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(tiny.NAMES), metavar="SET-UP")
    parser.add_argument("--throughput", type=int, metavar="N", help="N prompts at once instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    if options.throughput:
        for name in options.names:
            print(throughput(name, options.throughput))
        return
    columns = "set-up family latents pixels prompts times mixed gradient rows query step ratio ok"
    table = Table(*columns.split(), title="wrapped pipelines against pipe(...)")
    for name in options.names:
        table.add_row(*row(name))
    Console(width=150).print(table)


def row(name: str) -> list[str]:
    """One line of the table."""
    pipe, kwargs = tiny.build(name)
    report = check(pipe, **kwargs)
    query, step = timings(name)
    latents = [d for d in report.latents.values() if d is not None]
    return [
        name,
        f"{report.family} {report.prediction}",
        f"{max(latents):.2g}" if latents else "n/a",
        f"{report.pixels:.2g}",
        f"{report.mixed_prompts:.1e}",
        f"{report.several_times:.1e}",
        "yes" if report.mixed_times else "grouped",
        f"{report.gradient_ratio:.4f}",
        " ".join(map(str, report.costs)),
        f"{1e6 * query:.0f} us",
        f"{1e6 * step:.0f} us",
        f"{query / step:.2f}",
        "yes" if report.ok else "; ".join(report.failures),
    ]


def timings(name: str, few: int = 4, many: int = 16, repeats: int = 9) -> tuple[float, float]:
    """(seconds of a predict, seconds of one more step of pipe(...)), medians."""
    pipe, kwargs = tiny.build(name, steps=many)
    with wrap(pipe, **kwargs) as model:
        x, times = model.noise(1, NoiseKey(1)), model.grid().times[:-1]
        queries, steps = [], []
        for _ in range(repeats):
            begin = time.process_time()
            for t in times:
                model.predict(x, t)
            queries.append((time.process_time() - begin) / len(times))
            spent = [_plain(pipe, {**kwargs, "num_inference_steps": n}) for n in (few, many)]
            turns = (many - few) * len(times) / many  # img2img makes a part of its steps
            steps.append((spent[1] - spent[0]) / turns)
    return statistics.median(queries), max(statistics.median(steps), 1e-9)


def _plain(pipe, kwargs) -> float:
    generator = torch.Generator().manual_seed(1)
    begin = time.process_time()
    pipe(**kwargs, generator=generator, output_type="latent", return_dict=False)
    return time.process_time() - begin


def throughput(name: str, n: int) -> str:
    """n prompts in one batch against one after the other, side by side."""
    prompts = [
        f"{tiny.WORDS[k % len(tiny.WORDS)]} {tiny.WORDS[(3 * k + 1) % len(tiny.WORDS)]}"
        for k in range(n)
    ]
    pipe, kwargs = tiny.build(name, prompt=prompts)
    with wrap(pipe, **kwargs) as model:
        x, times = model.noise(n, NoiseKey(1)), model.grid().times[:-1]
        together, alone = [], []
        for t in [times[0], *times]:  # the first round makes the frames
            begin = time.process_time()
            model.predict(x, t, cond=list(range(n)))
            middle = time.process_time()
            for k in range(n):
                model.predict(x[k : k + 1], t, cond=k)
            together.append(middle - begin)
            alone.append(time.process_time() - middle)
    gain = min(alone[1:]) / min(together[1:])
    return f"{name}: {n} prompts together run {gain:.2f} times as fast as one by one"


if __name__ == "__main__":
    main()

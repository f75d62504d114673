"""All benchmarks: one script a claim, each side by side in one process, JSON beside the table.

python -m benchmarks.run [CLAIM ...] [--out DIR] [--prompts N] [--nfe N]

Claims: share, throughput, sequential, methods, rewards, own_share, resize, precision,
demo_load, growth, peak_memory, previews, prompts_together, cpu_paths, attention, geneval.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from benchmarks import (
    attention,
    cpu_paths,
    demo_load,
    geneval,
    growth,
    methods,
    own_share,
    peak_memory,
    precision,
    previews,
    prompts_together,
    resize,
    rewards,
    sequential,
    share,
    throughput,
)

CLAIMS = {
    "share": share.run,
    "throughput": throughput.run,
    "sequential": sequential.run,
    "methods": methods.run,
    "rewards": rewards.run,
    "own_share": own_share.run,
    "resize": resize.run,
    "precision": precision.run,
    "demo_load": demo_load.run,
    "growth": growth.run,
    "peak_memory": peak_memory.run,
    "previews": previews.run,
    "prompts_together": prompts_together.run,
    "cpu_paths": cpu_paths.run,
    "attention": attention.run,
    "geneval": geneval.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="all by default")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--nfe", type=int, default=320)
    given = parser.parse_args()
    unknown = sorted(set(given.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"unknown claim {', '.join(unknown)}; known: {', '.join(CLAIMS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for name in given.claims or CLAIMS:
        found = {"claim": name, "machine": machine, "torch": torch.__version__}
        found |= CLAIMS[name](prompts=given.prompts, nfe=given.nfe)
        (given.out / f"{name}.json").write_text(json.dumps(found, indent=1))
        print(f"\n{found.pop('table')}\n", flush=True)


if __name__ == "__main__":
    main()

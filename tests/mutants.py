"""Breaks the code on purpose, one line at a time, and asks the tests to notice.

    python tests/mutants.py            all mutants
    python tests/mutants.py phi cfg    those whose name contains one of the words

Each mutant replaces a text that must occur exactly once in a copy of the tree, and runs only the
tests that are meant to catch it. Exit status 1 where a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from mutant import Mutant

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("steering", "samplers", "rewards", "kernels", "apps", "tests")


def mutants() -> list[Mutant]:
    """All mutants of the lists beside this file."""
    lists = sorted(Path(__file__).parent.glob("mutants_*.py"))
    return [mutant for path in lists for mutant in import_module(path.stem).MUTANTS]


def copy_tree(to: Path) -> None:
    """Code and tests; trained weights are linked, as no mutant touches them."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "weights", "*.safetensors")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=skip)
    for weights in ROOT.glob("steering/**/weights"):
        (to / weights.relative_to(ROOT)).symlink_to(weights)
    shutil.copy(ROOT / "pyproject.toml", to)


def pytest_status(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and last words of a run: 0 all passed, 1 some failed (these are named), others
    mean no verdict."""
    # A second-old byte code file would hide a mutant of the same length.
    paths = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, **paths}, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, "; ".join(failed + lines[-1:]) or done.stderr[-300:]


def check(mutant: Mutant, tree: Path) -> str:
    """ "killed", "SURVIVED" or what kept it from being tried."""
    path = tree / mutant.file
    source = path.read_text()
    found = source.count(mutant.old)
    if found != 1:
        return f"STALE: its text occurs {found} times in {mutant.file}"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        status, words = pytest_status(tree, mutant.tests)
    finally:
        path.write_text(source)
    return {0: "SURVIVED", 1: "killed"}.get(status, f"NO VERDICT ({status}): {words}")


def main(words: list[str]) -> int:
    """Prints a table; returns the exit status."""
    chosen = [m for m in mutants() if not words or any(w in m.name for w in words)]
    if not chosen:
        print(f"No mutant's name contains any of: {', '.join(words)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        everything = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
        status, said = pytest_status(tree, everything)
        if status != 0:
            print(f"The tests fail without any mutant: {said}")
            return 1
        bad = 0
        for mutant in chosen:
            started = time.perf_counter()
            verdict = check(mutant, tree)
            bad += verdict != "killed"
            seconds = time.perf_counter() - started
            print(f"{mutant.name:52s} {verdict:10s} {seconds:5.1f} s", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

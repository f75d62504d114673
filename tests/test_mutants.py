"""The lists of mutants stay fresh: a stale one would be a promise nobody checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    sys.modules.pop("mutants", None)
    import mutants as runner

    return runner.mutants()


def test_every_mutant_has_its_text_once_and_tests_that_exist(mutants):
    wrong = [
        f"{mutant.name}: its text is not once in {mutant.file}"
        for mutant in mutants
        if (ROOT / mutant.file).read_text().count(mutant.old) != 1
    ]
    tests = {test: mutant.name for mutant in mutants for test in mutant.tests}
    files = sorted({test.partition("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    known = set(found.stdout.splitlines())
    # A function stands for all of its cases, a file for all of its functions.
    known |= {line.partition("[")[0] for line in known} | set(files)
    wrong += [f"{name}: no test {test}" for test, name in tests.items() if test not in known]
    assert not wrong


def test_names_of_mutants_differ(mutants):
    names = [m.name for m in mutants]
    assert len(set(names)) == len(names)

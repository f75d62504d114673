"""The lists of mutants stay fresh: a stale one would be a promise nobody checks."""

from __future__ import annotations

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
    wrong = []
    for mutant in mutants:
        if (ROOT / mutant.file).read_text().count(mutant.old) != 1:
            wrong.append(f"{mutant.name}: its text is not once in {mutant.file}")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            name = name.partition("[")[0].split("::")[-1]
            if name and f"def {name}(" not in (ROOT / file).read_text():
                wrong.append(f"{mutant.name}: no test {test}")
    assert not wrong


def test_names_of_mutants_differ(mutants):
    names = [m.name for m in mutants]
    assert len(set(names)) == len(names)

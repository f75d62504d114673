"""The command line run in this process."""

from __future__ import annotations

import sys

import pytest

from steering.apps import cli


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``steer`` with these words."""
    before = sys.argv
    sys.argv = ["steer", *words]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err

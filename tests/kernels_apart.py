"""Runs Triton kernels in its interpreter, in a process of their own.

Triton decides at import whether functions are interpreted or compiled, so a test process can do
one of the two only. The interpreter runs on the CPU; so does the compiler. No GPU is used.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_MISSING = importlib.util.find_spec("triton") is None
INTERPRETED = pytest.mark.skipif(_MISSING, reason="Triton is not installed: nothing interpreted")
COMPILED = pytest.mark.skipif(_MISSING, reason="Triton is not installed: nothing compiled")


def apart(code: str) -> str:
    """What the code printed with TRITON_INTERPRET=1; an error fails the test."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT)
    code = "import torch; torch.set_num_threads(1)\n" + code
    # A file, because Triton reads the source of what it interprets.
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


RUNNER = """
import pathlib, runpy, sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "interpreted.py")
    path.write_text(sys.argv[1])
    runpy.run_path(str(path), run_name="__main__")
"""

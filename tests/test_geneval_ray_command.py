"""`steer geneval run --engine ray` from end to end, and a cluster that is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from steering.apps.geneval_store import Journal
from tests.command import run

ROOT = Path(__file__).resolve().parent.parent
GUIDE = """
import os
def pressed(images, prompts):
    return [float(os.getpriority(os.PRIO_PROCESS, 0))] * len(images)
"""
WORDS = [
    "geneval", "run", "--method", "unsteered", "--n", "2", "--images-per-prompt", "1",
    "--set", "num_inference_steps=1", "--engine", "ray",
]  # fmt: skip


def test_the_command_runs_on_workers_of_its_own(capsys, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    (tmp_path / "guides_pressed.py").write_text(GUIDE)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "r"
    words = [
        *WORDS,
        "--out",
        str(out),
        "--workers",
        "1",
        "--reward",
        "python:guides_pressed:pressed",
    ]
    code, text, err = run(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(text.strip().splitlines()[-1])["r"]["images"]["scored"] == 2
    rows = Journal(out / "samples.jsonl").rows
    # the workers are as urgent as this process, and the cluster is gone
    assert [r["reward"] for r in rows] == [os.getpriority(os.PRIO_PROCESS, 0)] * 2
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_one_clear_error(capsys, tmp_path, address):
    pytest.importorskip("ray")
    out = tmp_path / "r"
    code, _, err = run(capsys, *WORDS, "--out", str(out), "--address", address)
    assert (code, f"No Ray cluster at '{address}'" in " ".join(err.split())) == (2, True), err
    assert not out.exists()

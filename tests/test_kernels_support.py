"""Fallbacks of the fused kernels: one warning that names the reason, then the twin. The devices
here are pretended; nothing ran on a GPU."""

from __future__ import annotations

import re
import sys
import warnings

import pytest
import torch

from steering.kernels import support
from steering.kernels.step import _trial, launch, move
from steering.kernels.support import obstacle, ready, toolchain

CUDA = torch.device("cuda", 0)
X = torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def _afresh():
    support.forget()
    yield
    support.forget()


def judged(probe=lambda device, dtype: 0.0, x=X):
    return ready("step", x, (torch.float32,), probe, 1e-5)


def test_cpus_are_no_place_for_triton():
    assert "run on CUDA, not on cpu" in (obstacle(torch.device("cpu")) or "")


def test_triton_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert obstacle(CUDA) == "Triton is not installed"


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(support.shutil, "which", lambda name: None)
    assert "no C compiler" in (toolchain() or "")


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(support, "toolchain", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
    assert "Old One has compute capability (6, 1)" in (obstacle(CUDA) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert obstacle(CUDA) is None


@pytest.mark.parametrize(
    ("probe", "x", "reason"),
    [
        (lambda d, t: 0.5, X, "differs from its twin by 0.5"),
        (lambda d, t: float("nan"), X, "differs from its twin by nan"),
        (lambda d, t: 1 / 0, X, "ZeroDivisionError"),
        (lambda d, t: 0.0, X.double(), "not written for float64"),
    ],
)
def test_each_refusal_is_said_once(monkeypatch, probe, x, reason):
    monkeypatch.setattr(support, "obstacle", lambda device: None)
    with pytest.warns(UserWarning, match=reason):
        assert not judged(probe, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not judged(lambda d, t: 0.0, x)  # decided once


@pytest.mark.parametrize(
    "reason",
    [
        "Triton is not installed",
        "there is no C compiler (Triton looks for $CC, gcc, clang)",
        "Old One has compute capability (6, 1), below (8, 0)",
    ],
)
def test_a_machine_that_cannot_is_told_so_once_whatever_is_asked(monkeypatch, reason):
    monkeypatch.setattr(support, "obstacle", lambda device: reason)
    with pytest.warns(UserWarning, match=re.escape(reason)) as said:
        assert not any(judged(lambda d, t: 0.0) for _ in range(3))
    assert len(said) == 1
    assert "results are the same" in str(said[0].message)


def test_a_kernel_that_agrees_is_tried_once(monkeypatch):
    monkeypatch.setattr(support, "obstacle", lambda device: None)
    tried = []
    for _ in range(3):
        assert judged(lambda d, t: tried.append(1) or 0.0)
    assert len(tried) == 1


def test_the_entry_points_use_the_twin_on_a_cpu():
    from steering.kernels.step import Move

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert move(X, X, X, Move(0.0, 1.0, 0.0, 0.0), None).x.shape == X.shape
    assert callable(launch)
    assert callable(_trial)

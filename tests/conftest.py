"""Shared settings: no network, few threads, everything deterministic."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

# Workers of pytest-xdist share the cores; tiny tensors gain nothing from threads.
torch.set_num_threads(1)

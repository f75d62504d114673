"""Gives a pipeline's denoisers the attention that :mod:`steering.kernels.attention` chooses."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from steering.errors import OptionError
from steering.kernels.attention import BACKENDS, Choice, choose, within
from steering.pipelines.meter import denoisers
from steering.turns import TURN

logger = logging.getLogger("steering")


def use_attention(pipe: Any, prefer: str = "auto") -> Choice:
    """Sets the attention of a pipeline's denoising networks and logs one line about it.

    Args:
        prefer: "auto", "native" (leaves torch its own choice), "flash", "efficient", "cudnn",
            "xformers" or "math". What cannot run here, or gives other numbers than plain
            attention in float32, is not used: one warning says why.

    Raises:
        OptionError: an unknown name.
    """
    if prefer not in ("auto", *BACKENDS):
        raise OptionError(f"Unknown attention {prefer!r}. Known: auto, {', '.join(BACKENDS)}.")
    networks = denoisers(pipe)
    one = next(iter(networks.values()))
    like = next(one.parameters())
    shapes = sorted({s for network in networks.values() for s in head_shapes(network)})
    with TURN:  # what is tried is set for the process
        choice = choose(like.device, like.dtype, shapes=shapes or [(8, 64)], prefer=prefer)
        for network in networks.values():
            _give(network, choice.backend)
    logger.info(choice.line)
    return choice


def head_shapes(network: nn.Module) -> set[tuple[int, int]]:
    """(heads, size of a head) of the attention layers of a network."""
    found = set()
    for module in network.modules():
        heads, to_q = getattr(module, "heads", None), getattr(module, "to_q", None)
        if isinstance(heads, int) and isinstance(to_q, nn.Linear):
            found.add((heads, to_q.out_features // heads))
    return found


def _give(network: Any, backend: str) -> None:
    network._chosen_attention = backend
    plain = getattr(network, "_plain_forward", None)
    if plain is not None:  # an earlier choice of ours
        network.forward = plain
        del network._plain_forward
    if getattr(network, "_has_xformers", False):
        network.disable_xformers_memory_efficient_attention()
        del network._has_xformers
    if backend == "native":
        return
    if backend == "xformers":
        network.enable_xformers_memory_efficient_attention()
        network._has_xformers = True
        return
    network._plain_forward = network.forward
    network.forward = within(backend, network.forward)

"""A small decoder for estimates on the way: opened, and shown to fit the pipeline."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import os
from typing import Any

from torch import nn

from steering.errors import OptionError, WeightsError
from steering.turns import TURN


def open_preview(pipe: Any, decoder: Any) -> nn.Module:
    """The decoder, on the pipeline's device, in its dtype, without gradients of its own.

    Args:
        decoder: an autoencoder of diffusers, or the folder of an AutoencoderTiny.

    Raises:
        OptionError: no decoder, or one of other latents than the pipeline's.
        WeightsError: the folder cannot be read.
    """
    own = getattr(pipe, "vae", None)
    if own is None:
        raise OptionError(
            f"preview_decoder: {type(pipe).__name__} has no autoencoder to stand for."
        )
    if isinstance(decoder, str | os.PathLike):
        from diffusers import AutoencoderTiny

        try:
            with TURN:
                decoder = AutoencoderTiny.from_pretrained(str(decoder), local_files_only=True)
        except Exception as error:
            raise WeightsError(
                f"preview_decoder: {decoder} is no folder of an AutoencoderTiny: {error}"
            ) from error
    if not isinstance(decoder, nn.Module) or not hasattr(decoder, "decode"):
        raise OptionError(f"preview_decoder must be an autoencoder or a folder, got {decoder!r}.")
    mine, theirs = (getattr(v.config, "latent_channels", None) for v in (decoder, own))
    if mine != theirs:
        raise OptionError(
            f"preview_decoder decodes latents of {mine} channels, the pipeline's have {theirs}: "
            "take the small decoder made for this model."
        )
    tensor = next(own.parameters())
    return decoder.to(tensor.device, tensor.dtype).eval().requires_grad_(False)

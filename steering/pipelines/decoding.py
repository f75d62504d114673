"""Decoding without a frame, where a pipeline is seen to do nothing but decode.

A frame runs the whole call of a pipeline, of which decoding needs the last lines only. The first
decode goes through a frame with a listener in the autoencoder's place. Where what reached the
autoencoder is the state over the scaling factor plus the shift, and the pictures are its output
brought to [0, 1], both bit for bit, later decodes do just that.
"""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KNOWN = ("AutoencoderKL", "AutoencoderTiny")


class Listener:
    """Stands for an autoencoder and remembers what was decoded."""

    def __init__(self, vae: Any) -> None:
        self.__dict__.update(_vae=vae, heard=[])

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_vae"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_vae"], name)

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.__dict__["_vae"].decode(z, *args, **kwargs)
        self.__dict__["heard"].append((z, args, kwargs, out))
        return out


class Shortcut:
    """The last lines of a pipeline's call: scale, shift, decode, bring to [0, 1]."""

    def __init__(self, vae: Any, state: torch.dtype, latent: torch.dtype, shifted: bool) -> None:
        self.vae, self.state, self.latent = vae, state, latent
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor) if shifted else 0.0
        self.shifted = shifted

    def enter(self, x: Tensor) -> Tensor:
        """What the autoencoder is given for state x."""
        z = x.to(self.state) / self.scale
        return (z + self.shift if self.shifted else z).to(self.latent)

    @staticmethod
    def leave(out: Tensor) -> Tensor:
        """The pictures of what the autoencoder returned."""
        return (out * 0.5).add_(0.5).clamp_(0, 1)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.leave(self.vae.decode(self.enter(x), return_dict=False)[0])


def learn(vae: Any, listener: Any, x: Tensor, images: object, state: torch.dtype) -> Any:
    """A Shortcut that gives these very images for x, or None."""
    heard = listener.heard
    if type(vae).__name__ not in _KNOWN or len(heard) != 1 or not isinstance(images, Tensor):
        return None
    z, args, kwargs, out = heard[0]
    asked = {k: v for k, v in kwargs.items() if k != "generator"}  # these two ignore it
    if args or asked != {"return_dict": False}:
        return None
    has_shift = getattr(vae.config, "shift_factor", None) is not None
    with torch.no_grad():
        for shifted in (True, False) if has_shift else (False,):  # some have one and ignore it
            found = Shortcut(vae, state, z.dtype, shifted)
            same = torch.equal(found.enter(x), z)
            if same and torch.equal(found.leave(out[0]).float(), images):
                return found
    return None

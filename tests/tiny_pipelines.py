"""Tiny pipelines of diffusers with random weights, built offline from configs.

``build(name)`` gives (pipeline, call arguments) for each of the set-ups in ``NAMES``. Weights
that start at zero or at a constant are drawn anew, so that no comparison passes on zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests import tiny_images as images
from tests import tiny_videos as videos
from tests.tiny_parts import AVOID, BOAT, FOX, WORDS, Setup, alive
from tests.tiny_videos import stable_video

__all__ = [
    "AVOID",
    "BOAT",
    "FOX",
    "NAMES",
    "WORDS",
    "alive",
    "build",
    "shared",
    "stable_video",
]

_BUILDERS: dict[str, Callable[[], Setup]] = {
    "sd": images.sd,
    "sd_v": lambda: images.sd("v_prediction"),
    "sdxl": images.sdxl,
    "sd_controlnet": images.sd_controlnet,
    "sd_img2img": images.sd_img2img,
    "sd3": images.sd3,
    "sd3_skip_layers": images.sd3_skip_layers,
    "flux": images.flux,
    "flux_true_cfg": images.flux_true_cfg,
    "flux2_klein": images.flux2_klein,
    "sana": images.sana,
    "pixart_sigma": images.pixart_sigma,
    "lumina2": images.lumina2,
    "aura_flow": images.aura_flow,
    "qwen_image": images.qwen_image,
    "z_image": images.z_image,
    "wan": videos.wan,
    "wan_unipc": videos.wan_unipc,
    "wan_experts": lambda: videos.wan(experts=True),
    "ltx": videos.ltx,
    "cogvideox": videos.cogvideox,
    "cogvideox_dpm": videos.cogvideox_dpm,
    "hunyuan_video": videos.hunyuan_video,
}
NAMES = tuple(_BUILDERS)
_WITHOUT_NEGATIVE = ("flux", "flux2_klein", "hunyuan_video")


def build(name: str, *, steps: int = 4, prompt: str | list[str] = FOX) -> Setup:
    """A fresh pipeline and what to pass to it.

    Args:
        name: one of ``NAMES``.
        steps: num_inference_steps.
        prompt: as for the pipeline itself.
    """
    pipe, kwargs = _BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"prompt": prompt, **kwargs, "num_inference_steps": steps}
    if name not in _WITHOUT_NEGATIVE:
        kwargs["negative_prompt"] = AVOID
    return pipe, kwargs


@functools.cache
def shared(name: str) -> Setup:
    """``build(name)``, once: for tests that do not change the pipeline."""
    return build(name)

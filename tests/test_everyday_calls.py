"""What everyday calls of a pipeline bring along: pictures, numpy, checkers, modes of torch."""

from __future__ import annotations

import copy
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

import steering
from steering.errors import OptionError, PipelineError
from steering.recipe import describe_value, fingerprint
from steering.rewards import FunctionReward
from steering.samplers import BestOfN
from steering.stickers.train.loop import seeded_init
from tests.tiny_pipelines import BOAT, FOX, build

TWO = BestOfN(n=2, select="all")


def light(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def call_of(name: str, steps: int = 3, *without: str):
    pipe, call = build(name, steps=steps)
    for part in ("prompt", "negative_prompt", *without):
        call.pop(part, None)
    return pipe, call


# --- what is written down ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        (torch.tensor(5.0), 5.0),
        (np.array(2), 2),
        ({"a": 1}, {"a": 1}),
        (torch.zeros(2, 3), {"$unavailable": "Tensor (2, 3)"}),
        (Image.new("RGB", (16, 16)), {"$unavailable": "Image (16, 16)"}),
        (len, {"$unavailable": "builtin_function_or_method"}),
    ],
)
def test_call_arguments_are_written_as_numbers_or_said_to_be_lost(value, plain) -> None:
    found = describe_value(value)
    assert found == plain
    assert json.loads(json.dumps(found)) == plain


def test_numbers_of_numpy_in_the_call_are_repeated(tmp_path) -> None:
    pipe, call = call_of("sd", 3)
    call |= {"num_inference_steps": np.int64(3), "guidance_scale": np.float32(5.0)}
    steering.steer(pipe, FOX, reward="brightness", method=TWO, out=tmp_path, **call)
    assert steering.replay(tmp_path / "000.png", pipe=pipe).identical


class Packed(torch.nn.Module):
    """Keeps its weights as quantised layers do: packed, not as tensors of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> dict[str, object]:
        return {"packed": (torch.qint8, b"weights")}

    def set_extra_state(self, state: object) -> None:
        del state


def test_weights_that_cannot_be_read_have_no_fingerprint() -> None:
    assert isinstance(fingerprint(Packed()), str)
    assert fingerprint(torch.nn.Linear(2, 2, device="meta")) is None
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))


def test_what_cannot_be_written_down_fails_before_the_first_row(monkeypatch) -> None:
    def broken(value: object) -> object:
        raise TypeError(f"{value!r} is no JSON")

    pipe, call = call_of("sd", 3)
    with steering.wrap(pipe, prompt=FOX, **call) as model:
        monkeypatch.setattr("steering.finish.describe_value", broken)
        with pytest.raises(TypeError, match="no JSON"):
            steering.steer(model, reward=light, method=TWO)
        assert model.rows == 0


def test_a_replay_takes_the_recipes_scheduler(tmp_path) -> None:
    pipe, call = call_of("sd", 3)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    steering.steer(pipe, FOX, reward="brightness", method=TWO, out=tmp_path, **call)
    other = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = other
    assert steering.replay(tmp_path / "000.png", pipe=pipe).identical
    assert pipe.scheduler is other


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd_img2img", "sd_controlnet"])
@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_a_picture_for_each_prompt(name: str, kind: str) -> None:
    pipe, call = call_of(name, 4, "image")
    levels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    given = [Image.fromarray(picture) for picture in levels]
    if kind == "tensor":
        given = torch.from_numpy(levels).movedim(-1, 1) / 255
    both = steering.steer(
        pipe, [FOX, BOAT], reward=light, method=TWO, image=given, seed=[1, 2], **call
    )
    for k, (text, found) in enumerate(zip((FOX, BOAT), both, strict=True)):
        one = given[k : k + 1] if kind == "tensor" else given[k]
        alone = steering.steer(pipe, text, reward=light, method=TWO, image=one, seed=k + 1, **call)
        torch.testing.assert_close(found.pixels, alone.pixels, rtol=0, atol=2e-5)
        swapped = given[1 - k : 2 - k] if kind == "tensor" else given[1 - k]
        other = steering.steer(
            pipe, text, reward=light, method=TWO, image=swapped, seed=k + 1, **call
        )
        assert not torch.allclose(found.pixels, other.pixels, rtol=0, atol=5e-5)


def test_a_strength_that_leaves_no_step_says_so() -> None:
    pipe, call = call_of("sd_img2img", 4, "strength")
    with pytest.raises(PipelineError, match="strength times num_inference_steps leaves no step"):
        steering.steer(pipe, FOX, reward=light, method=TWO, strength=0.1, **call)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"eta": 0.5}, r"options=\{'eta'"),
        ({"num_images_per_prompt": 2}, r"options=\{'n'"),
        ({"latents": torch.zeros(1)}, "starting noise comes from the seed"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
    ],
)
def test_arguments_that_belong_elsewhere(more, words) -> None:
    pipe, call = call_of("sd", 3)
    with pytest.raises(OptionError, match=words):
        steering.steer(pipe, FOX, reward=light, method=TWO, **(call | more))


def test_an_async_reward_is_refused_at_once() -> None:
    async def later(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    with pytest.raises(OptionError, match=r"async function.*asyncio\.run"):
        FunctionReward(later)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(OptionError, match="no CUDA device here"):
        steering.load("stickers", device="cuda", dtype="float32")


# --- checkers and modes ------------------------------------------------------------------------


class Blackens(StableDiffusionSafetyChecker):
    """Finds something in every picture that is brighter than a limit."""

    limit = 0.5

    def forward(self, clip_input: torch.Tensor, images: torch.Tensor):
        found = [bool(image.mean() > self.limit) for image in images]
        for k in np.flatnonzero(found):
            images[k] = 0.0
        return images, found


def checked() -> tuple[diffusers.StableDiffusionPipeline, dict]:
    pipe, call = call_of("sd", 3)
    parts = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    with seeded_init(0):
        checker = Blackens(CLIPConfig(vision_config=parts, text_config=parts, projection_dim=8))
    size = {"height": 224, "width": 224}
    whole = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "safety_checker": checker,
           "feature_extractor": CLIPImageProcessor(crop_size=size, size={"shortest_edge": 224})},
    )  # fmt: skip
    whole.set_progress_bar_config(disable=True)
    return whole, call


def test_every_picture_passes_the_safety_checker() -> None:
    """Also those after a first one in which nothing was found."""
    pipe, call = checked()
    with steering.wrap(pipe, prompt=FOX, **call) as model:
        x = model.noise(8, steering.NoiseKey(0))
        with torch.no_grad():
            level = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.mean((1, 2, 3))
        pipe.safety_checker.limit = float(level.sort().values[3:5].mean())
        dark = level < pipe.safety_checker.limit
        for _ in range(2):
            assert float(model.decode(x[dark]).mean((1, 2, 3)).min()) > 0.0
        assert float(model.decode(x[~dark]).abs().max()) == 0.0


def test_gradients_through_a_safety_checker_are_refused_before_the_first_row() -> None:
    pipe, call = checked()
    with steering.wrap(pipe, prompt=FOX, **call) as model:
        with pytest.raises(PipelineError, match="safety_checker = None"):
            steering.steer(model, reward=light, method="reno", nfe=40)
        assert model.rows == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["reno", "tds"])
def test_gradients_are_there_whatever_mode_steer_is_called_in(mode, method) -> None:
    pipe, call = call_of("sd", 3)
    plain = steering.steer(pipe, FOX, reward=light, method=method, nfe=24, **call)
    with mode():
        found = steering.steer(pipe, FOX, reward=light, method=method, nfe=24, **call)
    assert torch.equal(found.pixels, plain.pixels)

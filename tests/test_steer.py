"""steer() on real diffusers classes: what an engineer types."""

from __future__ import annotations

import pytest
import torch

import steering
from steering.errors import OptionError, PipelineError, RewardError, TaskErrors
from tests.tiny_pipelines import build

STEPS = {"num_inference_steps": 6}


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana", "pixart_sigma"])
def test_every_convention_is_steered(name):
    """VP, VE and flow pipelines; the reward is of the delivered pictures, best first."""
    pipe, call = build(name)
    call = {**call, **STEPS}
    prompt = call.pop("prompt")
    result = steering.steer(
        pipe, prompt, reward=redness, method=steering.samplers.FK(n_particles=3), **call
    )
    assert len(result.images) == 3
    assert torch.allclose(result.rewards, redness(result.pixels, None).double())
    assert (result.rewards.diff() <= 0).all()
    # 0.85 of 6 steps is the last: no checkpoint. SD3's own last but one adds no noise either.
    assert result.ledger.reward_calls == 3 * (3 if name == "sd3" else 4)
    assert torch.isfinite(result.samples).all()


def test_more_compute_gives_more_reward():
    pipe, call = build("sd3")
    call = {**call, **STEPS}
    prompt = call.pop("prompt")

    def best(n):
        method = steering.samplers.BestOfN(n=n)
        return steering.steer(pipe, prompt, reward=redness, method=method, **call).best_reward

    assert best(6) >= best(2) >= best(1)
    assert best(6) > best(1)


def test_one_sample_of_the_ode_is_the_pipelines_own_picture():
    """eta = 0 on the linear path is the Euler step of the pipeline's own scheduler."""
    pipe, call = build("flux")
    call = {**call, **STEPS}
    prompt = call.pop("prompt")
    method = steering.samplers.BestOfN(n=1)
    result = steering.steer(pipe, prompt, reward=redness, method=method, seed=5, **call)
    generator = steering.NoiseKey(5, "init").generator()
    own = pipe(prompt, **call, generator=generator, output_type="pt").images
    assert torch.allclose(result.pixels, own.float(), atol=2e-5)


def test_a_list_gives_one_result_per_prompt_as_if_run_alone():
    pipe, call = build("sd3")
    call = {**call, **STEPS}
    call.pop("prompt")
    prompts = ["a cat", "a dog", "a burger"]
    method = steering.samplers.FK(n_particles=4, reward_scale=200.0, resample="always")
    together = steering.steer(pipe, prompts, reward=redness, method=method, seed=1, **call)
    assert [r.prompt for r in together] == prompts
    for prompt, result in zip(prompts, together, strict=True):
        alone = steering.steer(pipe, prompt, reward=redness, method=method, seed=1, **call)
        assert alone.trace.ancestors == result.trace.ancestors
        assert alone.trace.ancestors
        assert torch.allclose(alone.samples, result.samples, atol=1e-4)
        assert alone.ledger.nfe == result.ledger.nfe


def test_a_wrapped_model_is_used_as_it_is():
    pipe, call = build("sd")
    with steering.wrap(pipe, **{**call, **STEPS}) as model:
        method = steering.samplers.BestOfN(n=2)
        first = steering.steer(model, reward=redness, method=method)
        second = steering.steer(model, reward=redness, method=method)
        assert torch.equal(first.samples, second.samples)
        with pytest.raises(OptionError, match=r"steering\.wrap"):
            steering.steer(model, reward=redness, num_inference_steps=3)
        with pytest.raises(OptionError, match="was wrapped for"):
            steering.steer(model, "something else", reward=redness)
        assert repr(first).startswith(f"Result({model.prompts[0]!r}, 1 samples, best_reward=")
    with pytest.raises(PipelineError, match="is closed"):  # its rows would not be counted
        steering.steer(model, reward=redness, method=method)


def test_call_arguments_are_checked_against_the_pipeline():
    pipe, _ = build("sd")
    with pytest.raises(OptionError, match="num_inference_steps"):
        steering.steer(pipe, "a cat", reward=redness, num_inference_step=3)
    with pytest.raises(OptionError, match="seed"):
        steering.steer(pipe, "a cat", reward=redness, generator=torch.Generator())


def test_the_pipeline_is_left_as_it_was():
    pipe, call = build("sd3")
    call = {**call, **STEPS}
    before, state = dict(pipe.__dict__), pipe.scheduler.__dict__.copy()
    prompt = call.pop("prompt")
    steering.steer(pipe, prompt, reward=redness, method=steering.samplers.BestOfN(n=2), **call)
    assert all(pipe.__dict__[k] is v for k, v in before.items())
    assert pipe.scheduler.__dict__.keys() == state.keys()
    assert not pipe.transformer._forward_hooks


def test_a_failing_reward_keeps_the_best_so_far(tmp_path):
    """The third call, of the last pictures, fails: the best preview is kept, also on disk."""
    pipe, call = build("sd3")
    call = {**call, **STEPS}
    prompt = call.pop("prompt")
    calls = []

    def brittle(images, prompts):
        calls.append(len(images))
        if len(calls) == 3:
            raise ValueError("out of tokens")
        return redness(images, prompts)

    method = steering.samplers.FK(n_particles=2, checkpoints=(0.2, 0.5))
    with pytest.raises(RewardError, match="out of tokens") as caught:
        steering.steer(pipe, prompt, reward=brittle, method=method, out=tmp_path, **call)
    result = caught.value.result
    assert result.preview
    assert result.best_reward > 0
    assert (tmp_path / "000.png").is_file()
    assert (tmp_path / "result.json").is_file()


def test_one_bad_prompt_does_not_lose_the_others(tmp_path):
    pipe, call = build("sd3")
    call = {**call, **STEPS}
    call.pop("prompt")

    def picky(images, prompts):
        if "a dog" in prompts:
            raise ValueError("no dogs")
        return redness(images, prompts)

    prompts = ["a cat", "a dog", "a burger"]
    with pytest.raises(TaskErrors, match="no dogs") as caught:
        steering.steer(pipe, prompts, reward=picky, method=steering.samplers.BestOfN(n=2),
                       out=tmp_path, **call)  # fmt: skip
    assert [r is not None for r in caught.value.results] == [True, False, True]
    assert list(caught.value.errors) == [1]
    assert (tmp_path / "0000" / "000.png").is_file()
    assert (tmp_path / "0002" / "000.png").is_file()


def test_video_is_steered():
    pipe, call = build("wan")
    call = {**call, "num_inference_steps": 3}
    prompt = call.pop("prompt")
    result = steering.steer(
        pipe, prompt, reward=lambda clips, prompts: clips[:, :, 0].mean((1, 2, 3)),
        method=steering.samplers.FK(n_particles=2, checkpoints=(0.4,)), **call,
    )  # fmt: skip
    assert result.pixels.ndim == 5
    assert len(result.images[0]) == result.pixels.shape[1]

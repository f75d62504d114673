"""Parked pipelines: what they hold, what they survive, and what is refused before any work."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import diffusers as D
import pytest
import torch

from steering.errors import OptionError, PipelineError
from steering.model import Model
from steering.noise import NoiseKey
from steering.pipelines import WrappedPipeline, check, wrap
from steering.pipelines import script as script_module
from tests import tiny_pipelines as tiny


def wrapped(name: str, **changes):
    pipe, kwargs = tiny.build(name, prompt=[tiny.FOX, tiny.BOAT])
    return pipe, wrap(pipe, **{**kwargs, **changes})


def draw(model, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *model.event_shape, generator=generator)


def test_it_is_a_model():
    _, model = wrapped("flux")
    assert isinstance(model, Model)
    assert model.name == "FluxPipeline"
    assert model.guidance == 3.5
    assert model.dtype == torch.float32
    model.close()


def test_the_users_pipeline_is_left_alone():
    pipe, kwargs = tiny.build("flux_true_cfg")
    pipe._progress_bar_config = {"desc": "mine"}
    before = dict(pipe.__dict__)
    scheduler = copy.deepcopy(pipe.scheduler.__dict__)
    hooks = {k: len(m._forward_pre_hooks) for k, m in pipe.transformer.named_modules()}
    random = torch.get_rng_state()
    model = wrap(pipe, **kwargs)
    x = model.noise(2, NoiseKey(1))
    model.predict(x, model.grid().times[0])
    model.costs()
    assert model.mixed_times
    model.decode(x)
    model.close()
    assert pipe.__dict__.keys() == before.keys()
    assert all(pipe.__dict__[k] is v for k, v in before.items())
    assert str(pipe.scheduler.__dict__) == str(scheduler)
    assert {k: len(m._forward_pre_hooks) for k, m in pipe.transformer.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_a_plain_call_beside_it_changes_nothing_and_is_not_counted():
    pipe, kwargs = tiny.build("sdxl")
    model = wrap(pipe, **kwargs)
    x, times = draw(model, 2), model.grid().times
    first = model.predict(x, times[1]).x0
    rows = model.rows

    def plain():
        made = torch.Generator().manual_seed(4)
        return pipe(**kwargs, generator=made, output_type="latent", return_dict=False)[0]

    one = plain()
    assert model.rows == rows
    assert torch.equal(model.predict(x, times[1]).x0, first)
    assert torch.equal(plain(), one)
    model.close()


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl", "wan", "qwen_image"])
def test_bfloat16(name):
    pipe, kwargs = tiny.build(name)
    pipe.to(dtype=torch.bfloat16)
    report = check(pipe, **kwargs)
    assert report.dtype == "bfloat16"
    assert report.latents == {1: 0.0, 2: 0.0}
    assert report.pixels == 0.0
    assert report.ok, report.table()
    with wrap(pipe, **kwargs) as model:
        pred = model.predict(model.noise(2, NoiseKey(1)), model.grid().times[0])
        assert pred.x0.dtype == pred.eps.dtype == torch.float32
        assert model.decode(pred.x0).dtype == torch.float32


def test_an_error_inside_kills_one_frame_only():
    pipe, model = wrapped("sd3")
    x, t = draw(model, 2), model.grid().times[0]
    want, other = model.predict(x, t).x0, model.predict(x[:1], t).x0

    def fail(module, args):
        raise RuntimeError("out of luck")

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        model.predict(x, t)
    hook.remove()
    assert torch.equal(model.predict(x, t).x0, want)
    assert torch.equal(model.predict(x[:1], t).x0, other)
    assert torch.is_grad_enabled()
    model.close()


def test_graphs_are_freed_with_their_results():
    _, model = wrapped("flux")
    x = draw(model, 2).requires_grad_()
    out = model.predict(x, model.grid().times[1], grad=True)
    out.x0.sum().backward()
    ref = weakref.ref(x)
    gc.disable()  # a graph in a reference cycle would keep an accelerator's memory
    try:
        del out, x
        assert ref() is None
        x = draw(model, 2).requires_grad_()
        images, ref = model.decode(x, grad=True), weakref.ref(x)
        del images, x
        assert ref() is None
    finally:
        gc.enable()
    model.close()


def test_frames_are_few_and_close():
    pipe, model = wrapped("flux")
    x, t = draw(model, 1), model.grid().times[0]
    rows = [
        model.predict(x.expand(n, *x.shape[1:]), t, cond=[0] * (n - 1) + [1]).x0
        for n in range(1, 40)
    ]
    frames = model._script._frames
    assert len(frames) <= script_module._MAX_FRAMES
    assert sum(f.width for f in frames.values()) <= script_module._MAX_ROWS
    torch.testing.assert_close(rows[0][0], rows[-1][-1], rtol=1e-4, atol=1e-5)
    kept = list(frames.values())
    model.close()
    assert not any(f.alive for f in kept)
    assert not pipe.transformer._forward_pre_hooks


def test_the_order_of_prompts_makes_no_new_frame():
    _, model = wrapped("flux")
    x, t = draw(model, 3), model.grid().times[0]
    a = model.predict(x, t, cond=[0, 1, 0]).x0
    frames = len(model._script._frames)
    b = model.predict(x[[1, 0, 2]], t, cond=[1, 0, 0]).x0
    assert len(model._script._frames) == frames
    torch.testing.assert_close(b, a[[1, 0, 2]], rtol=1e-4, atol=1e-5)
    model.close()


def test_another_thread_has_its_own_frames():
    _, model = wrapped("sd3")
    x, t = draw(model, 1), model.grid().times[0]
    want, got = model.predict(x, t).x0, []
    thread = threading.Thread(target=lambda: got.append(model.predict(x, t).x0))
    thread.start()
    thread.join()
    assert torch.equal(got[0], want)
    model.close()


def test_forced_mixing_and_grouping():
    calls = []
    pipe, model = wrapped("flux", mixed_times=False)
    pipe.transformer.register_forward_pre_hook(lambda m, a: calls.append(1))
    times = model.grid().times
    x = draw(model, 3)
    grouped = model.predict(x, times[:3]).x0
    assert len(calls) == 3
    assert not model.mixed_times
    assert model.mixing_reason == "switched off"
    model.close()
    with wrap(pipe, **model.call_kwargs, mixed_times=True) as mixed:
        calls.clear()
        together = mixed.predict(x, times[:3]).x0
        assert len(calls) == 1
    torch.testing.assert_close(together, grouped, rtol=1e-4, atol=1e-5)


def test_a_self_test_inside_a_run_is_not_charged_to_it():
    _, model = wrapped("flux")
    x, times = draw(model, 3), model.grid().times
    model.predict(x, times[:3])
    assert model.rows == 3
    assert 0 < model.probe_rows <= 20
    model.close()


def test_wrong_forcing_is_what_the_self_test_is_for():
    # Truncated guidance depends on the loop's index: one call for two times must be wrong.
    _, right = wrapped("lumina2")
    _, wrong = wrapped("lumina2", mixed_times=True)
    times = right.grid().times
    x = draw(right, 2)
    a, b = (m.output(x, [times[0], times[3]]) for m in (right, wrong))
    assert float((a - b).abs().max()) > 1e-2
    right.close()
    wrong.close()


def test_probes_are_few():
    _, model = wrapped("sd3_skip_layers")
    assert model.costs() == (2, 3, 3, 2)
    assert model.probe_rows == 2  # one real call; the other steps are walked with stand-ins
    assert model.rows == 0
    assert "step 1" in model.mixing_reason
    model.close()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": (2, 3)}, "states must be"),
        ({"cond": [0]}, "1 conds"),
        ({"cond": 7}, "cond 7 is not one of 2"),
        ({"times": 3}, "3 times"),
    ],
)
def test_rows_that_do_not_fit(change, match):
    _, model = wrapped("flux")
    x = torch.zeros(change["x"]) if "x" in change else draw(model, 2)
    t = list(model.grid().times[:3]) if "times" in change else model.grid().times[0]
    with pytest.raises(OptionError, match=match):
        model.predict(x, t, cond=change.get("cond", 0))
    model.close()


# --- refused before any work ----------------------------------------------------------------


def test_a_cache_between_steps_is_refused():
    pipe, kwargs = tiny.build("flux")
    pipe.transformer.enable_cache(D.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PipelineError, match="cache between steps"):
        wrap(pipe, **kwargs)
    pipe.transformer.disable_cache()
    wrap(pipe, **kwargs).close()


def test_blending_inpainting_is_refused():
    base, kwargs = tiny.build("sd")
    pipe = D.StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    with pytest.raises(PipelineError, match="alters the state"):
        wrap(pipe, **kwargs, image=image, mask_image=mask, strength=1.0)
    assert not pipe.unet._forward_pre_hooks  # nothing is left behind on the user's network


def test_arguments_the_pipeline_chokes_on_are_an_error_of_its_name():
    pipe, kwargs = tiny.build("sd3")
    with pytest.raises(PipelineError, match="does not take these arguments: TypeError"):
        wrap(pipe, **{**kwargs, "num_inference_steps": "many"})


def test_inpainting_by_input_channels_is_driven():
    base, kwargs = tiny.build("sd")
    config = {**base.unet.config, "in_channels": 9}
    parts = {**base.components, "unet": tiny.alive(lambda: type(base.unet).from_config(config))}
    pipe = D.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    report = check(pipe, **kwargs, image=image, mask_image=mask)
    assert report.latents == {1: 0.0, 2: 0.0}
    assert report.ok, report.table()


def test_keeping_a_first_frame_is_refused():
    base, kwargs = tiny.build("ltx")
    pipe = D.LTXImageToVideoPipeline(**base.components)
    with pytest.raises(PipelineError, match="alters the state"):
        wrap(pipe, **kwargs, image=torch.zeros(1, 3, 32, 32))


def test_a_decoder_that_wants_what_the_loop_made():
    base, kwargs = tiny.build("sd")
    config = {k: v for k, v in base.unet.config.items() if k != "_use_default_values"}
    unet = tiny.alive(lambda: type(base.unet).from_config({**config, "time_cond_proj_dim": 32}))
    scheduler = D.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {**base.components, "unet": unet, "scheduler": scheduler}
    pipe = D.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    del kwargs["negative_prompt"]
    report = check(pipe, **kwargs)
    assert report.latents == {1: 0.0, 2: 0.0}
    assert report.pixels == 0.0
    assert report.costs == (1, 1, 1, 1)
    assert report.ok, report.table()


def test_an_unknown_scheduler_is_refused():
    pipe, kwargs = tiny.build("sana")
    pipe.scheduler = D.SCMScheduler()
    with pytest.raises(PipelineError, match="SCMScheduler is not supported"):
        wrap(pipe, **kwargs)


class WithoutLoop(D.FluxPipeline):
    def __call__(self, prompt=None, num_inference_steps=4):
        return self.scheduler.step(prompt, 1.0, prompt)


class TwoStreams(D.FluxPipeline):
    def __call__(self, prompt=None, num_inference_steps=4):
        audio = copy.deepcopy(self.scheduler)
        for _i, t in enumerate(self.scheduler.timesteps):
            self.scheduler.step(prompt, t, prompt)
            audio.step(prompt, t, prompt)


class OwnTimes(D.FluxPipeline):
    """Has the loop, but over numbers of its own."""

    def __call__(self, prompt=None, num_inference_steps=4, generator=None):
        latents, _ = self.prepare_latents(
            len(prompt), 1, 16, 16, torch.float32, torch.device("cpu"), generator
        )
        self.scheduler.set_timesteps(num_inference_steps, mu=1.0)
        for _i, t in enumerate([1.0, 0.5]):
            latents = self.scheduler.step(latents, t, latents)[0]
        return (latents,)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (WithoutLoop, "no loop"),
        (TwoStreams, "copy of its scheduler"),
        (OwnTimes, "for i, t in enumerate"),
    ],
)
def test_other_loops_are_refused(kind, match):
    base, _ = tiny.shared("flux")
    with pytest.raises(PipelineError, match=match):
        wrap(kind(**base.components), prompt=tiny.FOX)


def test_pipelines_without_the_idioms_are_refused():
    unet, scheduler = tiny.shared("sd")[0].unet, D.DDPMScheduler()
    with pytest.raises(PipelineError, match="prepare_latents"):
        wrap(D.DDPMPipeline(unet=unet, scheduler=scheduler))


# --- the check itself -----------------------------------------------------------------------


class Askew(D.FluxPipeline):
    """Its decoder looks at the neighbours in the batch."""

    def _unpack_latents(self, latents, height, width, factor):
        out = D.FluxPipeline._unpack_latents(latents, height, width, factor)
        return out + 0.1 * torch.arange(len(out)).reshape(-1, 1, 1, 1)


def test_check_reports_and_finds_what_is_wrong():
    base, kwargs = tiny.shared("flux")
    good = check(base, **kwargs)
    assert good.ok
    assert "identical to pipe(...)" in good.table()
    assert good.to_json()["latents"] == {"1": 0.0, "2": 0.0}
    bad = check(Askew(**base.components), **kwargs)
    assert not bad.ok
    assert bad.decode_order > 1e-2
    assert "FAILED" in str(bad)


def test_check_finds_a_wrong_schedule(monkeypatch):
    pipe, kwargs = tiny.build("sdxl")
    kind = type(wrap(pipe, **kwargs).schedule)
    monkeypatch.setattr(kind, "scale_input", lambda self, x, times: x)
    report = check(pipe, **kwargs)
    assert not report.ok
    assert report.latents[1] > 1e-2


def test_image_to_video_without_text():
    pipe, kwargs = tiny.stable_video()
    report = check(pipe, **kwargs)
    assert report.latents == {1: 0.0, 2: 0.0}
    assert report.pixels == 0.0
    assert (report.family, report.prediction) == ("ve", "v")
    assert report.ok, report.table()
    with wrap(pipe, **kwargs) as model:
        assert model.prompts == (None,)
        assert model.decode(model.noise(2, NoiseKey(1))).shape == (2, 2, 3, 16, 16)


def test_check_takes_a_wrapped_model():
    pipe, kwargs = tiny.build("sd3")
    with wrap(pipe, **kwargs) as model:
        report = check(model)
        assert report.ok
        assert isinstance(model, WrappedPipeline)
        assert model.predict(draw(model, 1), model.grid().times[0]).x0.shape[0] == 1


def test_parameters_stay_out_of_the_graph_and_keep_their_flags():
    pipe, call = tiny.build("sd3")
    pipe.transformer.requires_grad_(True)
    flags = [p.requires_grad for p in pipe.transformer.parameters()]
    model = wrap(pipe, **call)
    x = model.noise(1, NoiseKey(0, "x")).requires_grad_()
    x0 = model.predict(x, model.grid().times[1], grad=True).x0
    total = model.decode(x0, grad=True).sum()
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags
    total.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in pipe.transformer.parameters())
    assert all(p.grad is None for p in pipe.vae.parameters())

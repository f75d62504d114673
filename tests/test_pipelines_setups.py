"""Every set-up of tests/tiny_pipelines.py, driven from outside, against the pipeline itself."""

from __future__ import annotations

import functools

import pytest
import torch

from steering.noise import NoiseKey
from steering.pipelines import WrappedPipeline, check, wrap
from tests import tiny_pipelines as tiny

# Network rows per sample at each of 4 steps: guidance doubles them, Lumina2 drops guidance half
# way, skipped layers add a call inside their window, img2img at strength 0.7 makes 2 of 4 steps.
ROWS = {
    "flux": (1, 1, 1, 1),
    "hunyuan_video": (1, 1, 1, 1),
    "lumina2": (2, 2, 1, 1),
    "sd3_skip_layers": (2, 3, 3, 2),
    "sd_img2img": (2, 2),
}
GROUPED = {"sd_controlnet", "sd3_skip_layers", "lumina2", "aura_flow", "wan_experts"}
FAMILY = {
    "sd": ("vp", "epsilon"),
    "sd_v": ("vp", "v"),
    "sdxl": ("ve", "epsilon"),
    "sd_controlnet": ("vp", "epsilon"),
    "sd_img2img": ("vp", "epsilon"),
    "pixart_sigma": ("vp", "epsilon"),
    "cogvideox": ("vp", "v"),
    "cogvideox_dpm": ("vp", "v"),
}
CLOSE = 1e-5


@functools.cache
def model_of(name: str) -> WrappedPipeline:
    pipe, kwargs = tiny.build(name, prompt=[tiny.FOX, tiny.BOAT])
    return wrap(pipe, **kwargs)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_same_latents_and_pixels_as_the_pipeline(name):
    pipe, kwargs = tiny.shared(name)
    report = check(pipe, **kwargs)
    same_shape = name != "flux2_klein"  # it returns its latents in another shape
    assert report.latents == ({1: 0.0, 2: 0.0} if same_shape else {1: None, 2: None})
    assert report.pixels == 0.0
    # Some CPUs' 3-d convolutions (AVX2) round by a row's place: two units in the last place of 1.
    assert report.decode_order <= 2.0**-22
    assert report.noise_equal
    assert (report.family, report.prediction) == FAMILY.get(name, ("flow", "flow"))
    assert report.ok, report.table()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_queries_depend_on_nothing_but_their_row(name):
    model = model_of(name)
    steps = model.grid().times[:-1]
    x = model.noise(4, NoiseKey(1))
    first = [model.output(x, t, cond=[1, 0, 1, 0]) for t in steps]
    scale = max(float(out.abs().max()) for out in first)
    assert float((first[0] - first[-1]).abs().max()) > 1e-3 * scale  # time matters
    for k in torch.randperm(3 * len(steps), generator=torch.Generator().manual_seed(2)).tolist():
        k %= len(steps)
        assert torch.equal(model.output(x, steps[k], cond=[1, 0, 1, 0]), first[k])
    alone = [model.output(x[k : k + 1], steps[0], cond=c) for k, c in enumerate([1, 0, 1, 0])]
    assert relative(first[0], torch.cat(alone)) < CLOSE
    other = model.output(x[:1], steps[0], cond=0)
    assert relative(other, alone[0]) > 10 * CLOSE  # the prompt matters


@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_at_several_times(name):
    model = model_of(name)
    assert model.mixed_times == (name not in GROUPED)
    assert bool(model.mixing_reason) == (name in GROUPED)
    times = model.grid().times
    levels = [times[-2], times[0], times[len(times) // 2], times[0], times[-2]]
    x = model.noise(5, NoiseKey(2))
    conds = [0, 1, 1, 0, 1]
    one_by_one = [model.output(x[k : k + 1], levels[k], cond=conds[k]) for k in range(5)]
    together = model.output(x, levels, cond=conds)
    assert relative(together, torch.cat(one_by_one)) < CLOSE
    pred = model.predict(x, levels, cond=conds)
    for k, time in enumerate(levels):
        single = model.predict(x[k : k + 1], time, cond=conds[k])
        torch.testing.assert_close(pred.x0[k : k + 1], single.x0, rtol=1e-4, atol=1e-4)
        back = time.alpha * pred.x0[k] + time.sigma * pred.eps[k]
        torch.testing.assert_close(back, x[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_are_counted_on_the_network(name):
    model = model_of(name)
    want = ROWS.get(name, (2, 2, 2, 2))
    assert model.costs() == want
    x = model.noise(3, NoiseKey(3))
    for time, cost in zip(model.grid().times, want, strict=False):
        before = model.rows
        model.predict(x, time)
        assert model.rows - before == 3 * cost


@pytest.mark.parametrize("name", tiny.NAMES)
def test_max_batch_splits_and_noise_has_no_width(name):
    model = model_of(name)
    x = model.noise(3, NoiseKey(4, slot=5))
    rows = [model.noise(1, NoiseKey(4, slot=5 + k)) for k in range(3)]
    assert torch.equal(x, torch.cat(rows))
    assert x.dtype == torch.float32
    assert x.shape[1:] == model.event_shape
    t = model.grid().times[1]
    whole, images = model.output(x, t), model.decode(x)
    model.max_batch = 2
    try:
        assert relative(model.output(x, t), whole) < CLOSE
        torch.testing.assert_close(model.decode(x), images, rtol=1e-4, atol=1e-5)
    finally:
        model.max_batch = None
    assert images.ndim == (5 if hasattr(model.pipe, "video_processor") else 4)
    assert images.shape[0] == 3
    assert images.shape[-3] == 3
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0


@pytest.mark.parametrize("name", tiny.NAMES)
def test_gradients_against_finite_differences(name):
    model = model_of(name)
    t = model.grid().times[1]
    x = model.noise(1, NoiseKey(5))

    def energy(z: torch.Tensor, grad: bool = False) -> torch.Tensor:
        return model.predict(z, t, cond=1, grad=grad).x0.double().square().mean()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(leaf, grad=True), leaf)
    assert torch.is_grad_enabled()
    ratios = []
    for h in (1e-2, 3e-3):
        d = h * gradient / gradient.square().mean().sqrt()
        change = (energy(x + d) - energy(x - d)) / 2.0
        ratios.append(float(change / (gradient.double() * d.double()).sum()))
    assert min(abs(r - 1.0) for r in ratios) < 0.03, ratios
    assert not model.predict(leaf, t).x0.requires_grad
    leaf = x.clone().requires_grad_()
    images = model.decode(model.predict(leaf, t, grad=True).x0, grad=True)
    (gradient,) = torch.autograd.grad(images.mean(), leaf)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0

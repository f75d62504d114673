"""Schedules and predictions against the schedulers' own arithmetic and against closed forms."""

from __future__ import annotations

import math

import diffusers as D
import pytest
import torch

from steering.errors import PipelineError
from steering.paths import Linear, Tabulated, Time
from steering.pipelines.schedule import family_of, read_schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule_of(scheduler, steps=6, tail=None):
    scheduler.set_timesteps(steps)
    walked = scheduler.timesteps if tail is None else scheduler.timesteps[tail:]
    return read_schedule(scheduler, walked)


def draw(seed, shape=(2, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (D.DDIMScheduler, {"clip_sample": False}),
        (D.DDPMScheduler, {"clip_sample": False}),
        (D.EulerDiscreteScheduler, {}),
        (D.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        (D.EulerAncestralDiscreteScheduler, {}),
    ],
)
def test_x0_is_the_one_of_step(kind, more, prediction):
    if kind is D.EulerAncestralDiscreteScheduler and prediction == "sample":
        pytest.skip("that scheduler has no such prediction")
    scheduler = kind(**BETAS, **more, prediction_type=prediction)
    schedule = schedule_of(scheduler)
    for k in (0, 3, 5):
        time = schedule.loop[k]
        x, out = draw(k) * math.hypot(time.alpha, time.sigma), draw(10 + k)
        fresh = kind(**BETAS, **more, prediction_type=prediction)
        fresh.set_timesteps(6)
        t = fresh.timesteps[k]
        fresh.scale_model_input(x, t)
        want = fresh.step(out, t, x).pred_original_sample
        pred = schedule.predict(x, out, time)
        torch.testing.assert_close(pred.x0, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        torch.testing.assert_close(
            time.alpha * pred.x0 + time.sigma * pred.eps, x, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("kind", [D.DPMSolverMultistepScheduler, D.UniPCMultistepScheduler])
@pytest.mark.parametrize(
    "config",
    [
        {**BETAS, "prediction_type": "epsilon"},
        {**BETAS, "prediction_type": "v_prediction"},
        {**BETAS, "prediction_type": "sample", "use_karras_sigmas": True},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ],
)
def test_x0_is_the_one_of_multistep_solvers(kind, config):
    scheduler = kind(**config)
    schedule = schedule_of(scheduler)
    for k in (0, 2, 5):
        scheduler._step_index = k
        x, out = draw(k), draw(20 + k)
        want = scheduler.convert_model_output(out, sample=x)
        got = schedule.predict(x, out, schedule.loop[k]).x0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_against_the_formula_of_karras(prediction):
    scheduler = D.EDMEulerScheduler(sigma_data=0.5, prediction_type=prediction)
    schedule = schedule_of(scheduler)
    assert schedule.family == "edm"
    sign = 1.0 if prediction == "epsilon" else -1.0
    for time in schedule.grid.times[:-1]:
        s = time.sigma
        assert time.net == pytest.approx(0.25 * math.log(s), abs=1e-6)
        x, out = draw(1) * s, draw(2)
        want = x * 0.25 / (s**2 + 0.25) + sign * out * s * 0.5 / math.sqrt(s**2 + 0.25)
        pred = schedule.predict(x, out, time)
        torch.testing.assert_close(pred.x0, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pred.eps, (x - want) / s, rtol=1e-3, atol=1e-4)
        scaled = schedule.scale_input(x, [time])
        torch.testing.assert_close(scaled, x / math.sqrt(s**2 + 0.25))
    assert schedule.path.at(0.5).sigma == pytest.approx(40.0)
    assert schedule.path.at(0.5).net == pytest.approx(0.25 * math.log(40.0))


def test_gaussian_data_is_denoised_exactly_in_edm():
    # For data N(0, sigma_data^2) the network is 0 and D(x) = c_skip x is the posterior mean.
    schedule = schedule_of(D.EDMEulerScheduler(sigma_data=0.7))
    time = schedule.grid.times[2]
    x = draw(3) * time.sigma
    pred = schedule.predict(x, torch.zeros_like(x), time)
    torch.testing.assert_close(pred.x0, x * 0.49 / (0.49 + time.sigma**2))


@pytest.mark.parametrize("kind", [D.DPMSolverMultistepScheduler, D.UniPCMultistepScheduler])
def test_truncated_timesteps_keep_their_exact_sigma(kind):
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    schedule = schedule_of(scheduler, 7)
    assert not scheduler.timesteps.is_floating_point()
    for time, sigma, net in zip(
        schedule.grid.times, scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), strict=False
    ):
        assert time.sigma == sigma
        assert time.t == sigma
        assert time.net == net
    assert any(abs(t.sigma - t.net / 1000) > 1e-4 for t in schedule.grid.times[:-1])
    between = schedule.path.at(0.7777)
    assert between.sigma == pytest.approx(0.7777)
    assert between.net == 778.0


def test_flow_grid_is_the_shifted_one():
    schedule = schedule_of(D.FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
    assert isinstance(schedule.path.base, Linear)
    for time, t in zip(schedule.grid.times, schedule.scheduler.sigmas.tolist(), strict=True):
        assert (time.alpha, time.sigma, time.t) == (1.0 - t, t, t)
        assert time.net == pytest.approx(1000 * t, rel=1e-6)
    assert schedule.grid.times[-1] == Time(0.0, 1.0, 0.0, 0.0, end=True)


def test_inverted_sigmas_run_from_noise_to_data_too():
    scheduler = D.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    schedule = schedule_of(scheduler, 5)
    assert schedule.grid.times[0].sigma > 0.9
    assert schedule.grid.times[-1].sigma == 0.0
    x0, eps, time = draw(1), draw(2), schedule.grid.times[2]
    x = time.alpha * x0 + time.sigma * eps
    pred = schedule.predict(x, x0 - eps, time)  # the slope along the inverted sigma
    torch.testing.assert_close(pred.x0, x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to_one", [True, False])
def test_vp_grid_ends_where_the_scheduler_says(to_one):
    scheduler = D.DDIMScheduler(**BETAS, set_alpha_to_one=to_one, steps_offset=1)
    schedule = schedule_of(scheduler, 5)
    products = scheduler.alphas_cumprod.double()
    for time, t in zip(schedule.grid.times, scheduler.timesteps.tolist(), strict=False):
        assert time.alpha**2 == pytest.approx(float(products[t]), rel=1e-6)
        assert time.alpha**2 + time.sigma**2 == pytest.approx(1.0)
        assert time.t == pytest.approx((t + 1) / 1000)
    end = schedule.grid.times[-1]
    assert end.end
    want = 1.0 if to_one else float(products[0])
    assert end.alpha**2 == pytest.approx(want, rel=1e-6)
    assert end.t == pytest.approx(0.0 if to_one else 1e-3, abs=1e-6)


def test_zero_terminal_snr_starts_at_pure_noise():
    scheduler = D.DDIMScheduler(
        **BETAS,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    schedule = schedule_of(scheduler, 5)
    first = schedule.grid.times[0]
    assert (first.alpha, first.sigma, first.t) == (0.0, 1.0, 1.0)
    x, out = draw(1), draw(2)
    pred = schedule.predict(x, out, first)
    torch.testing.assert_close(pred.x0, -out)
    torch.testing.assert_close(pred.eps, x)


def test_img2img_tail_and_second_order_loops():
    scheduler = D.DDIMScheduler(**BETAS)
    whole, tail = schedule_of(scheduler, 10), schedule_of(scheduler, 10, tail=4)
    assert tail.grid.times == whole.grid.times[4:]
    heun = schedule_of(D.HeunDiscreteScheduler(**BETAS), 6)
    euler = schedule_of(D.EulerDiscreteScheduler(**BETAS), 6)
    assert len(heun.loop) == 11
    for a, b in zip(heun.grid.times, euler.grid.times, strict=True):
        assert (a.sigma, a.net, a.t) == pytest.approx((b.sigma, b.net, b.t), rel=1e-6)


def test_path_between_nodes_agrees_with_nodes():
    for exploding, kind in ((False, D.DDIMScheduler), (True, D.EulerDiscreteScheduler)):
        schedule = schedule_of(kind(**BETAS, steps_offset=1, timestep_spacing="leading"), 8)
        assert isinstance(schedule.path.base, Tabulated)
        assert schedule.path.base.exploding == exploding
        for time in schedule.grid.times[:-1]:
            node = schedule.path.at(time.t)
            assert (node.alpha, node.sigma) == pytest.approx((time.alpha, time.sigma), rel=1e-5)
            assert node.net == pytest.approx(time.net, abs=1e-6)
    whole = schedule_of(D.DDIMScheduler(**BETAS), 8)
    assert whole.path.at(0.50049).net == float(round(0.50049 * 1000 - 1))


def test_one_model_in_two_coordinates():
    # x_ve = x_vp / alpha: the same network output must mean the same x0 and eps.
    vp = schedule_of(D.DDIMScheduler(**BETAS, prediction_type="v_prediction"), 8)
    ve = schedule_of(
        D.EulerDiscreteScheduler(
            **BETAS, prediction_type="v_prediction", timestep_spacing="leading"
        ),
        8,
    )
    a, b = vp.grid.times[3], ve.grid.times[3]
    assert a.net == b.net
    x, out = draw(1), draw(2)
    one, two = vp.predict(x, out, a), ve.predict(x / a.alpha, out, b)
    torch.testing.assert_close(one.x0, two.x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.eps, two.eps, rtol=1e-4, atol=1e-5)
    scaled = ve.scale_input(x / a.alpha, [b])
    torch.testing.assert_close(scaled, x, rtol=1e-5, atol=1e-6)


def test_rows_at_their_own_levels_are_scaled_alone():
    schedule = schedule_of(D.EulerDiscreteScheduler(**BETAS), 6)
    times = schedule.grid.times[1:3]
    x = draw(1)
    twice = schedule.scale_input(torch.cat([x, x]), times)  # guidance doubles the batch
    for k, time in enumerate(times):
        want = schedule.scale_input(x[k : k + 1], [time])
        assert torch.equal(twice[k : k + 1], want)
        assert torch.equal(twice[2 + k : 3 + k], want)


def test_learned_variance_is_cut_off():
    schedule = schedule_of(D.DDPMScheduler(**BETAS, variance_type="learned_range"), 6)
    x, out, time = draw(1), draw(2, (2, 6, 4, 4)), schedule.grid.times[2]
    whole, cut = schedule.predict(x, out, time), schedule.predict(x, out[:, :3], time)
    assert torch.equal(whole.x0, cut.x0)


@pytest.mark.parametrize("kind", [D.SCMScheduler, D.CMStochasticIterativeScheduler])
def test_other_states_are_refused(kind):
    with pytest.raises(PipelineError, match="not supported"):
        family_of(kind())


def test_a_subclass_keeps_its_family():
    class Mine(D.DDIMScheduler):
        pass

    assert family_of(Mine()) == "vp"

"""The fused step: interpreted on the CPU against its twin, compiled for GPUs that are not here.

What these tests did is in their names: "interpreted" ran the Triton kernel in Triton's Python
interpreter, "compiled" made PTX and machine code from it. Nothing here ran on a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch

from steering.grids import on_path, uniform
from steering.kernels.philox import Stream
from steering.kernels.step import Move, Reading, guided_step, move
from steering.noise import NoiseKey
from steering.paths import VP, Linear, Prediction, from_flow
from steering.transitions import (
    EtaKernel,
    EulerMaruyama,
    FullRenoise,
    affine,
    dance_grpo,
    flow_grpo,
    memoryless,
)
from tests.kernels_apart import COMPILED, INTERPRETED, apart


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the twin, against what the samplers do ----------------------------------------------------

STEPS = [EtaKernel(eta=e) for e in (0.0, 0.5, 1.0)] + [flow_grpo(), dance_grpo(), memoryless()]


@pytest.mark.parametrize("path", [Linear(), VP()], ids=["linear", "vp"])
@pytest.mark.parametrize("transition", STEPS, ids=lambda s: type(s).__name__)
def test_the_twin_makes_the_step_of_every_transition(transition, path):
    """Fused weights against the transition's own arithmetic, in float64, with its density."""
    grid, key = on_path(path, uniform(7)), NoiseKey(3, "proposal", 2, slot=5)
    x = randn(4, 3, 5).double()
    prediction = Prediction(randn(4, 3, 5, seed=1).double(), randn(4, 3, 5, seed=2).double())
    for t, u in grid.steps():
        step = transition(x, prediction, t, u, path)
        want = step.sample(key.normal(4, (3, 5)))
        how = transition.weights(t, u, path)
        got = move(x, prediction.x0, prediction.eps, how, key.numbers(4), log_density=step.random)
        assert torch.allclose(got.x, want, rtol=1e-12, atol=1e-12)
        if step.random:
            assert torch.allclose(got.log_density, step.log_prob(want), rtol=1e-6)


def test_only_transitions_whose_weights_say_all_are_fused():
    class Bent(EtaKernel):
        def __call__(self, x, pred, t, u, path):
            raise NotImplementedError

    assert affine(EtaKernel(eta=0.3)) is not None
    assert affine(EulerMaruyama(g=lambda t, p: 1.0)) is not None
    assert affine(Bent(eta=0.3)) is None
    assert affine(FullRenoise()) is None


@pytest.mark.parametrize("slots", [3, [0, 7, 2**33]])
def test_the_named_numbers_are_those_of_the_key(slots):
    key = NoiseKey(11, "proposal", 4, slot=2**32 - 2)
    want = key.normal(slots, (3, 7))
    assert torch.equal(key.numbers(slots).normal(21, "cpu").reshape(3, 3, 7), want)


def test_guidance_and_reading_are_those_of_a_flow():
    x, cond, uncond = (randn(3, 4, seed=s) for s in range(3))
    t = Linear().at(0.4)
    want = from_flow(x, uncond + 4.0 * (cond - uncond), t)
    reading, how = Reading(1.0, -t.sigma, 1.0, t.alpha), Move(0.0, 0.8, 0.2, 0.0)
    got = guided_step(x, cond, uncond, 4.0, reading, how, None)
    assert torch.allclose(got.x0, want.x0, atol=1e-6)
    assert torch.allclose(got.eps, want.eps, atol=1e-6)
    assert torch.allclose(got.x, 0.8 * want.x0 + 0.2 * want.eps, atol=1e-6)


def test_a_row_of_each_level_is_that_row_alone():
    x, out = randn(3, 8), randn(3, 8, seed=1)
    column = torch.tensor([0.2, 0.5, 0.9])
    reading, how = Reading(1.0, -column, 1.0, 1 - column), Move(0.1, column, 0.3, column)
    key = NoiseKey(0)
    whole = guided_step(x, out, None, 1.0, reading, how, key.numbers(3), log_density=True)
    for k in range(3):
        c = float(column[k])
        alone = guided_step(
            x[k : k + 1], out[k : k + 1], None, 1.0, Reading(1.0, -c, 1.0, 1 - c),
            Move(0.1, c, 0.3, c), key.at(slot=k).numbers(1), log_density=True,
        )  # fmt: skip
        assert torch.allclose(whole.x[k], alone.x[0], atol=1e-6)
        assert torch.allclose(whole.log_density[k], alone.log_density[0], rtol=1e-6)


def test_what_does_not_fit_is_refused():
    x = randn(2, 4)
    with pytest.raises(ValueError, match="needs noise"):
        move(x, x, x, Move(0.0, 1.0, 0.0, 1.0), None)
    with pytest.raises(ValueError, match="as many slots"):
        move(x, x, x, Move(0.0, 1.0, 0.0, 1.0), Stream(1, range(3)))
    with pytest.raises(ValueError, match="no density"):
        move(x, x, x, Move(0.0, 1.0, 0.0, 0.0), None, log_density=True)
    with pytest.raises(ValueError, match="differ"):
        move(x, x[:1], x, Move(0.0, 1.0, 0.0, 0.0), None)


# --- the kernel, interpreted -------------------------------------------------------------------

CASES = """
import torch
from steering.kernels.philox import Stream
from steering.kernels.step import Move, Reading, guided_step_plain, launch, _finish

def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def rows_apart(x):
    # every second row of a wider tensor: contiguous rows, a stride of their own
    wide = torch.zeros(2 * len(x), *x.shape[1:], dtype=x.dtype)
    wide[::2] = x
    return wide[::2]

def turned(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)  # numbers of a row lie apart

shapes = [(1, 1), (2, 3), (3, 5, 7), (2, 16, 8, 8), (2, 1025), (1, 3, 683)]
dtypes = [torch.float32, torch.bfloat16, torch.float16]
layouts = {"dense": lambda x: x, "rows apart": rows_apart, "turned": turned}
cases = [(s, dtypes[(i + j) % 3], l) for i, s in enumerate(shapes) for j, l in enumerate(layouts)]
for number, (shape, dtype, layout) in enumerate(cases):
    if layout == "turned" and len(shape) < 3:
        continue
    x, a, b = (layouts[layout](randn(*shape, seed=s).to(dtype)) for s in range(3))
    n = len(x)
    per_row, log = number % 2 == 0, number % 3 != 0
    v = torch.linspace(0.2, 0.8, n) if per_row else 0.6
    how = Move(0.3 * (number % 4 == 0), v, 0.2, v)
    noise = Stream(2**63 + number, range(2**32 - 1, 2**32 - 1 + n) if number % 2 else [9] * n)
    reading = Reading(1.0, -0.3, 1.0, v)
    uncond = b if number % 5 else None
    pairs = [
        (guided_step_plain(x, a, uncond, 4.5, reading, how, noise, log),
         launch(x, a, uncond, uncond, 4.5, reading, how, noise, log)),
        (_finish(x, a, b, how, noise, log), launch(x, a, b, None, 1.0, None, how, noise, log)),
        (_finish(x, a, b, how._replace(std=0.0), None, False),
         launch(x, a, b, None, 1.0, None, how._replace(std=0.0), None, False)),
    ]
    for want, got in pairs:
        assert got.x.dtype == dtype and got.x.shape == x.shape, (shape, dtype, layout)
        unit = torch.finfo(dtype).eps
        error = float((got.x.float() - want.x.float()).abs().max())
        scale = 1 + float(want.x.float().abs().max())
        assert error <= 4 * unit * scale + 2e-6, (shape, dtype, layout, error)
        assert torch.allclose(got.x0.float(), want.x0.float(), atol=1e-6)
        assert torch.allclose(got.eps.float(), want.eps.float(), atol=1e-6)
        assert (got.log_density is None) == (want.log_density is None)
        if log and got.log_density is not None:
            assert torch.allclose(got.log_density, want.log_density, rtol=2e-6, atol=1e-5)
print("cases", number + 1)
"""

NUMBERS = """
import torch, triton, triton.language as tl
from steering.kernels.philox import Stream, philox
from steering.kernels import step_triton

@triton.jit
def raw(out, c0, c1, c2, c3, k0, k1, B: tl.constexpr):
    at = tl.arange(0, B)
    words = step_triton.philox(
        tl.load(c0 + at).to(tl.uint32, bitcast=True), tl.load(c1 + at).to(tl.uint32, bitcast=True),
        tl.load(c2 + at).to(tl.uint32, bitcast=True), tl.load(c3 + at).to(tl.uint32, bitcast=True),
        k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True))
    tl.store(out + at, words[0].to(tl.int64))
    tl.store(out + B + at, words[1].to(tl.int64))
    tl.store(out + 2 * B + at, words[2].to(tl.int64))
    tl.store(out + 3 * B + at, words[3].to(tl.int64))

B = 256
generator = torch.Generator().manual_seed(0)
counters = [torch.randint(0, 2**32, (B,), generator=generator) for _ in range(4)]
out = torch.zeros(4, B, dtype=torch.int64)
signed = [c.to(torch.int32) for c in counters]
raw[(1,)](out, *signed, 11, -5, B=B)
assert torch.equal(out, torch.stack(philox(*counters, 11, 2**32 - 5)))

@triton.jit
def pair(words, out, B: tl.constexpr):
    at = tl.arange(0, B)
    w = tl.load(words + at).to(tl.uint32, bitcast=True)
    c, s = step_triton._cos_sin(w)
    tl.store(out + at, step_triton._radius(w))
    tl.store(out + B + at, c)
    tl.store(out + 2 * B + at, s)

# the corners of every range, and words between
corners = [k + d for k in (0, 2**29, 2**30, 2**31, 3 * 2**30, 2**32) for d in range(-3, 4)]
words = torch.cat([torch.tensor([c for c in corners if 0 <= c < 2**32]),
                   torch.randint(0, 2**32, (4096,), generator=generator)])[:4096]
out = torch.zeros(3, 4096)
pair[(1,)](words.to(torch.int32), out, B=4096)
u = (words.double() + 0.5) / 2**32
angle = 2 * torch.pi * u
want = torch.stack([torch.sqrt(-2 * torch.log(u)), torch.cos(angle), torch.sin(angle)])
error = (out.double() - want).abs() / want.abs().clamp_min(1e-3)
print("words equal; radius, cos, sin:", error.max(1).values.tolist())
assert float(error[0].max()) < 5e-7 and float((out - want)[1:].abs().max()) < 3e-7
"""


@INTERPRETED
@pytest.mark.parametrize("code", [CASES, NUMBERS], ids=["cases", "numbers"])
def test_interpreted_kernel_equals_its_twin(code):
    apart(code)


# --- the kernel, compiled ----------------------------------------------------------------------


def signature(dtype):
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "a", "b", "next")}
    pointers |= {f"{name}_ptr": "*fp32" for name in ("x0", "eps", "square", "table")}
    scalars = (
        "guidance", "read_x0_x", "read_x0_out", "read_eps_x", "read_eps_out", "move_x", "move_x0",
        "move_eps", "std",
    )  # fmt: skip
    return (
        pointers
        | {"slot_ptr": "*i64"}
        | dict.fromkeys(("x_stride", "a_stride", "b_stride", "width", "k0", "k1", "first"), "i32")
        | dict.fromkeys(scalars, "fp32")
    )


@COMPILED
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_kernel_does_not_spill(capability, dtype):
    from steering.kernels import step_triton
    from steering.kernels.offline import compile_for
    from steering.kernels.step import BLOCK

    raw = dtype != "fp32"
    flags = dict.fromkeys(("RAW", "GUIDED", "PER_ROW", "LISTED", "SQUARE"), raw)
    made = compile_for(
        capability, step_triton.step, signature(dtype),
        {**flags, "USE_X": True, "RANDOM": True, "BLOCK": BLOCK},
    )  # fmt: skip
    assert f"sm_{capability}" in made.target
    assert (made.spill_stores, made.spill_loads, made.stack) == (0, 0, 0)
    assert made.shared <= 48 * 1024


def test_the_density_of_a_standard_step_is_known():
    """Closed form: the density of what a unit step drew, from its own numbers."""
    zero, stream = torch.zeros(2, 6), NoiseKey(1).numbers(2)
    got = move(zero, zero, zero, Move(0.0, 0.0, 0.0, 1.0), stream, log_density=True)
    want = -0.5 * got.x.double().square().sum(1) - 3 * math.log(2 * math.pi)
    assert torch.allclose(got.log_density, want, rtol=1e-6)

"""Resampling of many prompts at once: the twin against the samplers' own scheme, the kernel
interpreted on the CPU against the twin, and compiled. Nothing here ran on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from steering.kernels.resample import gather, resample, systematic, tile
from steering.noise import NoiseKey
from steering.particles import State
from steering.particles import resample as one_prompt
from steering.resampling import systematic as scheme
from tests.kernels_apart import COMPILED, INTERPRETED, apart


def weights(prompts, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_w = 3 * torch.randn(prompts, n, generator=generator, dtype=torch.float64)
    log_w[:, ::5] = -math.inf
    return log_w


@pytest.mark.parametrize("m", [8, 5, 13])
def test_each_prompt_gets_what_it_would_get_alone(m):
    log_w, keys = weights(6, 8), [NoiseKey(s, "resample", 3) for s in range(6)]
    uniform = torch.cat([key.uniform(1) for key in keys])
    x = torch.arange(48.0).reshape(6, 8, 1)
    done, state = resample(log_w, uniform, {"x": x}, m)
    assert bool(done.alive.all())
    for k, key in enumerate(keys):
        before = State.start(x[k]).set_potential(log_w[k])
        after, ancestors = one_prompt(before, scheme, key, m=m)
        assert torch.equal(done.ancestors[k], ancestors)
        assert torch.equal(state["x"][k], after.x)
        assert torch.allclose(done.log_w[k].expand(m), after.log_w, rtol=0, atol=1e-12)


def test_children_are_as_many_as_the_weights_say():
    log_w = weights(3, 64)
    shares = log_w.softmax(1)
    for seed in range(5):
        uniform = NoiseKey(seed).uniform(3)
        counts = torch.stack([a.bincount(minlength=64) for a in systematic(log_w, uniform)[0]])
        assert float((counts - 64 * shares).abs().max()) < 1.0  # floor or ceil
        assert int(counts[:, ::5].sum()) == 0


def test_a_prompt_without_weight_keeps_its_particles_and_says_so():
    log_w = weights(4, 6)
    log_w[1], log_w[2, 3], log_w[3, 0] = -math.inf, math.nan, math.inf
    done = systematic(log_w, NoiseKey(0).uniform(4))
    assert done.alive.tolist() == [True, False, False, False]
    assert torch.equal(done.ancestors[1:], torch.arange(6).expand(3, 6))


def test_gather_moves_every_tensor_of_its_own_prompt():
    ancestors = torch.tensor([[2, 2, 0], [1, 1, 1]])
    a = torch.arange(12.0).reshape(2, 3, 2)
    b = torch.arange(6).reshape(2, 3)
    got_a, got_b = gather(ancestors, a, b)
    assert got_b.tolist() == [[2, 2, 0], [4, 4, 4]]
    assert torch.equal(got_a[0, 0], a[0, 2])
    assert torch.equal(got_a[1, 2], a[1, 1])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="uniform"):
        systematic(torch.zeros(2, 3), torch.zeros(3))


INTERPRETER = """
import math
from steering.kernels.resample import launch, systematic_plain
generator = torch.Generator().manual_seed(1)
for prompts, n, m in ((1, 1, 1), (3, 2, 7), (4, 16, 16), (2, 33, 50), (2, 300, 17)):
    log_w = 4 * torch.randn(prompts, n, generator=generator, dtype=torch.float64)
    if n > 2:
        log_w[:, 1::4], log_w[0, -1] = -math.inf, -math.inf
    if prompts > 3:
        log_w[1], log_w[2, 1], log_w[3, 0] = -math.inf, math.nan, math.inf
    uniform = torch.rand(prompts, generator=generator, dtype=torch.float64)
    want, got = systematic_plain(log_w, uniform, m), launch(log_w, uniform, m)
    assert torch.equal(got.ancestors, want.ancestors), (n, m)
    assert torch.equal(got.alive, want.alive)
    lived = want.alive
    assert torch.allclose(got.log_w[lived], want.log_w[lived], rtol=0, atol=1e-12)
equal = launch(torch.zeros(1, 48, dtype=torch.float64), torch.tensor([0.5]).double(), 48)
assert torch.equal(equal.ancestors[0], torch.arange(48))
"""


@INTERPRETED
def test_interpreted_kernel_equals_its_twin():
    apart(INTERPRETER)


@COMPILED
@pytest.mark.parametrize("wide", [16, 64, 1024])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_kernel_does_not_spill(capability, wide):
    from steering.kernels import resample_triton
    from steering.kernels.offline import compile_for

    types = {
        "log_w_ptr": "*fp64", "uniform_ptr": "*fp64", "ancestor_ptr": "*i64", "left_ptr": "*fp64",
        "alive_ptr": "*i8", "n": "i32", "m": "i32",
    }  # fmt: skip
    made = compile_for(capability, resample_triton.systematic, types, {"N": wide, "M": tile(wide)})
    assert (made.spill_stores, made.spill_loads, made.stack) == (0, 0, 0)
    assert made.shared <= 48 * 1024

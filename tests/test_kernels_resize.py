"""The banded resize: the twin against PIL and against float64 products, the kernel interpreted on
the CPU against the twin, and compiled. Nothing here ran on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from steering.kernels.resize import MOST_TAPS, axis, resize
from steering.rewards.pixels import coefficients
from tests.kernels_apart import COMPILED, INTERPRETED, apart

FILTERS = ("bicubic", "bilinear", "lanczos", "box")


def ways(size_in, size_out, name="bicubic"):
    return axis(coefficients(size_in, size_out, name, "cpu", torch.float64))


def picture(height, width, seed=0):
    """Black and white dots: every filter overshoots and is clamped."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (2, 3, height, width), generator=generator).float()


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [(7, 90), (50, 50), (31, 200), (1, 1)])
def test_the_twin_is_pil_bit_for_bit(name, size):
    x = picture(31, 97)
    got = resize(x, ways(97, size[1], name), ways(31, size[0], name))
    for image, result in zip(x, got, strict=True):
        source = Image.fromarray((image.movedim(0, -1) * 255).byte().numpy())
        kind = Image.Resampling[name.upper()]
        # one side at a time: releases of Pillow differ in which goes first
        want = source.resize((size[1], 31), kind).resize((size[1], size[0]), kind)
        found = (result.movedim(0, -1) * 255).round().byte().numpy()
        np.testing.assert_array_equal(found, np.array(want))


def in_float64(x, across, down):
    """The same by dense products in float64, with autograd's own straight-through rounding."""

    def settled(v):
        v = v.clamp(0, 255)
        return v + (torch.floor(v + 0.5) - v).detach()

    x = x.double().clamp(0, 1) * 255
    x = x + (torch.round(x) - x).detach()
    return settled(down.T @ settled(x @ across)) / 255


@pytest.mark.parametrize("size", [(11, 9), (40, 33)])
def test_gradients_are_those_of_straight_through_rounding(size):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 3, 19, 23, generator=generator) * 1.2 - 0.1
    matrices = [coefficients(a, b, "bicubic", "cpu", torch.float64)
                for a, b in ((23, size[1]), (19, size[0]))]  # fmt: skip
    weight = torch.randn(2, 3, *size, generator=generator)
    grads = []
    for run in (in_float64, lambda v, a, d: resize(v, axis(a), axis(d))):
        leaf = x.clone().requires_grad_()
        out = run(leaf, *matrices)
        (out.float() * weight).sum().backward()
        grads.append((out.detach().float(), leaf.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=1e-6)
    apart_ = ~torch.isclose(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-5)
    # a value within 2^-11 of a level above white may count as clamped or not
    assert float(apart_.float().mean()) < 1e-3
    assert float((grads[1][1] == 0).float().mean()) > 0.05  # what was clamped passes nothing


def test_a_side_may_stay_and_halves_come_back_as_floats():
    x = picture(8, 12)
    assert torch.equal(resize(x, None, None), x)
    assert resize(x.half(), ways(12, 5), None).dtype == torch.float32
    assert resize(x[0, 0], None, ways(8, 3)).shape == (3, 12)


def test_long_filters_are_known_to_be_inexact():
    assert ways(160, 20, "lanczos").weights.shape[1] > MOST_TAPS
    assert not ways(160, 20, "lanczos").exact
    assert ways(1024, 224).exact


INTERPRETER = """
from steering.kernels.resize import (
    _trial, axis, launch, launch_back, resize_back_plain, resize_plain)
from steering.rewards.pixels import coefficients

generator = torch.Generator().manual_seed(0)
cases = [((1, 1), (3, 2)), ((9, 14), (5, 21)), ((20, 17), (20, 6)), ((17, 20), (6, 20)),
         ((64, 48), (7, 5))]
for k, ((height, width), (high, wide)) in enumerate(cases):
    x = torch.rand(2, 3, height, width, generator=generator) * 1.4 - 0.2
    x = x.to((torch.float32, torch.bfloat16, torch.float16)[k % 3])
    x = x.transpose(0, 1) if k % 2 else x  # strides of another order
    name = ("bicubic", "lanczos", "bilinear", "box")[k % 4]
    across, down = (
        axis(coefficients(a, b, name, "cpu", torch.float64)) if a != b else None
        for a, b in ((width, wide), (height, high)))
    want, masks = resize_plain(x, across, down, True)
    got, seen = launch(x, across, down, True)
    assert torch.equal(got, want), (k, float((got - want).abs().max()))
    assert all(torch.equal(a.bool(), b.reshape(a.shape)) for a, b in zip(seen, masks))
    assert torch.equal(launch(x, across, down, False)[0], want)
    grad = torch.randn(want.shape, generator=generator)
    back = launch_back(grad, across, down, tuple(seen))
    torch.testing.assert_close(
        back, resize_back_plain(grad, across, down, tuple(masks)), rtol=1e-5, atol=1e-5)
assert _trial(torch.device("cpu"), torch.float32) == 0.0
half = torch.tensor([[[0.5]]])  # 127.5 goes to 128 as torch.round takes it
assert torch.equal(launch(half, None, axis(torch.ones(1, 1).double()), False)[0] * 255, half * 256)
"""


@INTERPRETED
def test_interpreted_kernel_equals_its_twin():
    apart(INTERPRETER)


@COMPILED
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_kernels_do_not_spill(capability):
    from steering.kernels import resize_triton
    from steering.kernels.offline import compile_for
    from steering.kernels.resize import BLOCK

    sizes = dict.fromkeys(("total", "taps", "size_in", "size_out", "inner"), "i32")
    tables = {"start_ptr": "*i32", "weight_ptr": "*i32"}
    for first, dtype in ((True, "*fp32"), (False, "*u8")):
        pointers = {"in_ptr": dtype, "out_ptr": "*u8" if first else "*fp32", "mask_ptr": "*u8"}
        made = compile_for(
            capability, resize_triton.squeeze, {**pointers, **tables, **sizes},
            {"FIRST": first, "LAST": not first, "MASKED": True, "BLOCK": BLOCK},
        )  # fmt: skip
        assert (made.spill_stores, made.spill_loads, made.stack) == (0, 0, 0)
    pointers = {"grad_ptr": "*fp32", "mask_ptr": "*u8", "out_ptr": "*fp32",
                "start_ptr": "*i32", "weight_ptr": "*fp32"}  # fmt: skip
    made = compile_for(capability, resize_triton.spread, {**pointers, **sizes}, {"BLOCK": BLOCK})
    assert (made.spill_stores, made.spill_loads, made.stack) == (0, 0, 0)

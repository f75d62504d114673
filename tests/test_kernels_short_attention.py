"""Attention of short sequences under gradients on CPUs: who does it, and with which numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import steering
from steering.kernels.short_attention import SHORT, ShortAttention

FUSED = "ScaledDotProductFlashAttentionForCpuBackward0"


def short(dtype=torch.bfloat16):
    return ShortAttention(torch.device("cpu"), dtype)


def given(tokens, keys=None, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    sizes = (tokens, keys or tokens, keys or tokens)
    return [
        torch.randn(3, 2, n, 16, generator=generator).to(dtype).requires_grad_() for n in sizes
    ]


def who(out):
    return type(out.grad_fn).__name__


def answer(context, inputs):
    """Attention and its derivatives."""
    with context():
        out = F.scaled_dot_product_attention(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return out, [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def test_short_sequences_are_not_done_by_the_fused_kernel():
    inputs, context = given(SHORT), short()
    for _ in ("watched", "later"):
        out, _numbers = answer(context, inputs)
        assert who(out) != FUSED
    assert context.longest == SHORT
    assert who(F.scaled_dot_product_attention(*inputs)) == FUSED  # it ends with the call


def test_the_watched_call_gives_the_bits_of_later_ones():
    inputs, context = given(44), short()
    (_, first), (_, later) = answer(context, inputs), answer(context, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@pytest.mark.parametrize("sizes", [(SHORT + 1, SHORT + 1), (SHORT + 1, 7), (7, SHORT + 1)])
def test_longer_sequences_are_left_to_torch(sizes):
    inputs, context = given(*sizes), short()
    for _ in range(2):
        assert who(answer(context, inputs)[0]) == FUSED
    assert context.longest == SHORT + 1


def test_one_long_sequence_leaves_all_later_calls_to_torch():
    context = short()
    with context():
        F.scaled_dot_product_attention(*given(SHORT + 1))
        assert who(F.scaled_dot_product_attention(*given(8))) != FUSED
    assert who(answer(context, given(8))[0]) == FUSED


def test_full_precision_and_other_devices_are_left_alone():
    context = short(torch.float32)
    assert who(answer(context, given(8, dtype=torch.float32))[0]) == FUSED
    assert context.longest is None
    assert not ShortAttention(torch.device("cuda"), torch.bfloat16).helps


def test_derivatives_err_no_more_than_those_of_the_fused_kernel():
    exact = given(44, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in exact]
    _, want = answer(short(torch.float64), wide)
    _, ours = answer(short(), exact)
    _, fused = answer(short(torch.float32), exact)  # which changes nothing

    def errors(found):
        return [
            float((a.double() - b).norm() / b.norm()) for a, b in zip(found, want, strict=True)
        ]

    assert all(a <= 1.05 * b for a, b in zip(errors(ours), errors(fused), strict=True))
    assert max(errors(ours)) < 0.01


def test_a_wrapped_network_takes_it_where_a_graph_is_kept():
    pipe = steering.load("stickers", dtype="bfloat16")
    call = steering.loading.call_defaults("stickers") | {"num_inference_steps": 4}
    with steering.wrap(pipe, prompt="a photo of a dog", **call) as model:
        level, start = model.grid().times[1], model.noise(2, steering.NoiseKey(3))
        model.predict(start, level)
        assert model._attention.longest is None

        def slope():
            x = start.clone().requires_grad_()
            return torch.autograd.grad(model.predict(x, level, grad=True).x0.sum(), x)[0]

        first, later = slope(), slope()
        assert model._attention.longest == 44  # 16 patches, 28 tokens of text
        assert torch.equal(first, later)

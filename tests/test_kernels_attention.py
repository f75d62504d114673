"""The choice of attention, on the CPU: nothing here ran on a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import steering
from steering.attention import _give as give
from steering.attention import head_shapes, use_attention
from steering.errors import OptionError
from steering.kernels import attention
from steering.kernels.attention import Choice, attend, choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_chosen_gives_the_numbers_of_plain_attention(dtype):
    choice = choose("cpu", dtype, shapes=[(2, 16), (3, 40)], tokens=33)
    assert choice.backend in ("native", "flash", "math")
    by_name = {trial.backend: trial for trial in choice.trials}
    assert by_name[choice.backend].reason is None
    assert by_name["math"].error <= attention.TOLERANCE[dtype]
    assert choice.line.startswith(f"attention: {choice.backend} on cpu")
    assert "\n" not in choice.line


def test_what_cannot_run_here_is_out_with_its_reason():
    trials = {t.backend: t for t in choose("cpu", torch.float32, shapes=[(2, 16)]).trials}
    for name in ("xformers", "cudnn"):
        assert trials[name].reason, name
        assert trials[name].seconds is None


def test_xformers_that_imports_but_does_not_run_is_never_chosen(monkeypatch):
    """As its wheels do on a CPU: the import works, every operator raises."""

    def refuse(*given):
        raise NotImplementedError("No operator found for memory_efficient_attention_forward")

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = refuse
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with pytest.warns(UserWarning, match="xformers.*No operator found"):
        choice = choose("cpu", torch.float32, shapes=[(2, 16)], prefer="xformers")
    assert choice.backend != "xformers"


def test_a_head_size_that_a_backend_does_not_do_is_named_and_another_serves(monkeypatch):
    """One layer is enough: what is chosen must do all of them."""

    def narrow(backend, q, k, v):
        if backend == "flash" and q.shape[-1] > 256:
            raise RuntimeError("FlashAttention only supports head dimension at most 256")
        return attend(backend, q, k, v)

    monkeypatch.setattr(attention, "attend", narrow)
    assert choose("cpu", torch.float32, shapes=[(2, 16)], prefer="flash").backend == "flash"
    with pytest.warns(UserWarning, match="head dimension at most 256") as said:
        choice = choose("cpu", torch.float32, shapes=[(2, 16), (1, 320)], tokens=9, prefer="flash")
    assert choice.backend != "flash"
    assert len(said) == 1
    assert "flash out (RuntimeError: FlashAttention only supports head" in choice.line


def test_a_fast_backend_with_wrong_numbers_is_out(monkeypatch):
    def wrong(backend, q, k, v):
        return q if backend == "flash" else attend(backend, q, k, v)

    monkeypatch.setattr(attention, "attend", wrong)
    choice = choose("cpu", torch.float32, shapes=[(2, 16)])
    trial = next(t for t in choice.trials if t.backend == "flash")
    assert "differs" in trial.reason
    assert choice.backend != "flash"


def test_nan_is_a_wrong_number(monkeypatch):
    def broken(backend, q, k, v):
        return q * float("nan") if backend == "native" else attend(backend, q, k, v)

    monkeypatch.setattr(attention, "attend", broken)
    assert choose("cpu", torch.float32, shapes=[(2, 16)]).backend != "native"


def test_a_wish_is_granted_where_it_runs():
    choice = choose("cpu", torch.float32, shapes=[(2, 16)], prefer="math")
    assert choice.backend == "math"
    assert len(choice.trials) == 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="known: auto"):
        choose("cpu", torch.float32, prefer="fast")
    with pytest.raises(OptionError, match="Known: auto"):
        steering.load("stickers", attention="fast")


def test_a_pipeline_keeps_its_pictures_and_its_network_sees_the_choice(caplog):
    pipe = steering.load("stickers", dtype="float32")
    assert head_shapes(pipe.transformer)
    call = {"num_inference_steps": 1, "max_sequence_length": 14, "output_type": "latent"}

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipe("a photo of a cat", generator=generator, **call).images

    before = latents()
    with caplog.at_level("INFO", logger="steering"):
        choice = use_attention(pipe, "math")
    assert isinstance(choice, Choice)
    assert [r.message for r in caplog.records] == [choice.line]
    assert pipe.transformer._plain_forward is not None
    after = latents()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    use_attention(pipe, "native")
    assert not hasattr(pipe.transformer, "_plain_forward")


def test_a_later_choice_takes_xformers_out_again():
    """Its processors would go on serving under another backend's name."""

    class Network(torch.nn.Module):
        served = "default"

        def enable_xformers_memory_efficient_attention(self):
            self.served = "xformers"

        def disable_xformers_memory_efficient_attention(self):
            self.served = "default"

    network = Network()
    network.served = "adapter"  # a processor of the user's own, which native attention keeps
    give(network, "native")
    assert network.served == "adapter"
    for backend in ("native", "flash"):
        give(network, "xformers")
        assert network.served == "xformers"
        give(network, backend)
        assert network.served == "default"

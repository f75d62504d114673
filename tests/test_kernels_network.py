"""Options of the network side: compiled widths, tiles, equal rows. Nothing here ran on a GPU;
compiled code is made by torch's own eager backends, so what is tested is what we put around it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import steering
from steering.compiled import Bucketed, compile_networks
from steering.errors import OptionError
from steering.loading import as_dtype


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 4)


def bucketed(plain, backend="eager"):
    return Bucketed(plain, "default", (1, 2, 4), backend)


class Kept:
    """A backend of torch.compile that runs the graph and notes the widths it was made for."""

    def __init__(self, wrong=0.0):
        self.widths, self.wrong = [], wrong

    def __call__(self, graph, examples):
        self.widths.append(max(len(e) for e in examples if isinstance(e, torch.Tensor)))

        def run(*given):
            return tuple(v + self.wrong for v in graph(*given))

        return run


@torch.no_grad()
def test_rows_are_padded_to_few_widths_and_come_back_alone():
    layer = small()

    def forward(hidden_states, timestep):
        return (layer(hidden_states) * timestep[:, None],)

    torch._dynamo.reset()
    backend = Kept()
    network = bucketed(forward, backend)
    for rows in (1, 2, 3, 4, 3, 1):
        x, t = (
            torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)),
            torch.ones(rows),
        )
        got = network(hidden_states=x, timestep=t)[0]
        torch.testing.assert_close(got, forward(x, t)[0])
    assert network.refused is None
    assert network.made == {1, 2, 4}
    assert len(backend.widths) <= 3


@torch.no_grad()
def test_wider_calls_and_calls_with_a_graph_stay_eager():
    network = bucketed(lambda hidden_states: (small()(hidden_states),), Kept(wrong=1.0))
    assert network(hidden_states=torch.ones(5, 4))[0].shape == (5, 4)
    with torch.enable_grad():
        x = torch.ones(2, 4, requires_grad=True)
        assert network(hidden_states=x)[0].requires_grad
    assert network.refused is None


@torch.no_grad()
def test_wrong_numbers_are_never_returned():
    torch._dynamo.reset()
    layer = small()
    network = bucketed(lambda hidden_states: (layer(hidden_states),), Kept(wrong=0.5))
    x = torch.ones(2, 4)
    with pytest.warns(UserWarning, match="differs from the eager one by 0.[45]"):
        got = network(hidden_states=x)[0]
    torch.testing.assert_close(got, layer(x))
    with warnings.catch_warnings():  # one warning, then silence
        warnings.simplefilter("error")
        torch.testing.assert_close(network(hidden_states=x)[0], layer(x))


@torch.no_grad()
def test_a_compiler_that_fails_is_named_once():
    def broken(graph, examples):
        raise RuntimeError("no C++ compiler")

    torch._dynamo.reset()
    layer = small()
    network = bucketed(lambda hidden_states: (layer(hidden_states),), broken)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        got = network(hidden_states=torch.ones(1, 4))[0]
    torch.testing.assert_close(got, layer(torch.ones(1, 4)))


@torch.no_grad()
def test_a_table_as_long_as_the_batch_is_found_out():
    """Padding takes it for rows; the check sees it and the eager network serves."""
    torch._dynamo.reset()

    def forward(hidden_states, table):
        return (hidden_states + table.sum(0),)

    network = bucketed(forward, Kept())
    x, table = torch.ones(3, 4), torch.ones(3, 4)
    with pytest.warns(UserWarning, match="differs"):
        got = network(hidden_states=x, table=table)[0]
    torch.testing.assert_close(got, forward(x, table)[0])


def test_a_compiled_pipeline_is_charged_for_the_rows_asked():
    torch._dynamo.reset()
    pipe = steering.load("stickers", dtype="float32", compile=False)
    call = {"num_inference_steps": 2, "max_sequence_length": 14, "guidance_scale": 4.0}
    model = steering.wrap(pipe, prompt="a photo of a cat", **call)
    x = model.noise(3, steering.NoiseKey(0))
    t = model.grid().times[0]
    want, rows = model.predict(x, t).x0, model.rows
    compile_networks(pipe, backend="eager")
    got = model.predict(x, t).x0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert pipe.transformer.forward.refused is None
    assert pipe.transformer.forward.made == {8}  # six rows, with guidance
    assert model.rows == 2 * rows
    model.close()


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="Unknown mode"):
        steering.load("stickers", compile="fastest")
    with pytest.raises(OptionError, match="slicing"):
        steering.load("stickers", vae="tiled")


def test_decoding_in_slices_gives_the_same_pictures():
    pipe = steering.load("stickers", dtype="float32", vae="slicing")
    assert pipe.vae.use_slicing
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x[:, : pipe.vae.config.latent_channels]
    with torch.no_grad():
        sliced = pipe.vae.decode(x).sample
        pipe.vae.disable_slicing()
        torch.testing.assert_close(sliced, pipe.vae.decode(x).sample, rtol=1e-4, atol=1e-4)


# --- decoding ----------------------------------------------------------------------------------

CALL = {"num_inference_steps": 4, "max_sequence_length": 14, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return steering.load("stickers", dtype="float32")


def states(model, n=2):
    return model.noise(n, steering.NoiseKey(5))


def test_the_memory_format_changes_no_picture_and_only_the_autoencoder():
    pipes = {
        f: steering.load("stickers-sd", dtype="float32", channels_last=f)
        for f in ("auto", True, False)
    }
    last = {
        name: {
            part: any(
                p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
                for p in getattr(pipe, part).parameters()
                if p.ndim == 4
            )
            for part in ("vae", "unet")
        }
        for name, pipe in pipes.items()
    }
    assert last == {name: {"vae": bool(name), "unet": False} for name in pipes}
    z = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, auto = (pipes[f].vae.decode(z).sample for f in (False, "auto"))
    torch.testing.assert_close(auto, plain, rtol=0, atol=1e-4)
    with pytest.raises(OptionError, match="channels_last"):
        steering.load("stickers-sd", channels_last="always")


@pytest.mark.parametrize(
    ("tiles", "dots", "dtype"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (None, None, torch.float32),  # a torch that cannot say
    ],
)
def test_auto_takes_bfloat16_where_the_processor_computes_it(monkeypatch, tiles, dots, dtype):
    for test, answer in (("_is_amx_tile_supported", tiles), ("_is_avx512_bf16_supported", dots)):
        if answer is None:
            monkeypatch.delattr(torch.cpu, test)
        else:
            monkeypatch.setattr(torch.cpu, test, lambda answer=answer: answer)
    assert as_dtype("auto", "cpu") is dtype
    assert next(steering.load("stickers").transformer.parameters()).dtype is dtype


@pytest.mark.parametrize("name", ["stickers", "stickers-sd"])
def test_decoding_without_a_frame_gives_the_same_bits(name):
    pipe = steering.load(name, dtype="bfloat16")
    call = CALL if name == "stickers" else {"num_inference_steps": 4}
    with steering.wrap(pipe, prompt="a photo of a cat", **call) as model:
        x = states(model)
        through_a_frame = model._decode(x, False, None)
        assert torch.equal(model.decode(x), through_a_frame)
        assert model._shortcuts[False] is not None
        assert torch.equal(model.decode(x), through_a_frame)


def test_a_pipeline_that_does_more_than_decode_keeps_its_frames(pipe, monkeypatch):
    plain = pipe.image_processor.postprocess
    monkeypatch.setattr(
        pipe.image_processor, "postprocess", lambda image, **how: 1 - plain(image, **how)
    )
    with steering.wrap(pipe, prompt="a photo of a cat", **CALL) as model:
        x = states(model)
        first = model.decode(x)
        assert model._shortcuts[False] is None
        assert torch.equal(model.decode(x), first)


def other_decoder(pipe):
    """The sticker decoder with a darker last layer: cheap, and told apart from the real one."""
    import copy

    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        list(vae.decoder.parameters())[-1].sub_(0.3)
    return vae


def test_previews_come_from_the_small_decoder_and_samples_from_the_full_one(pipe):
    small, seen = other_decoder(pipe), []
    plain = small.decode

    def decode(*given, **how):
        seen.append(len(given[0]))
        return plain(*given, **how)

    small.decode = decode
    method = steering.samplers.FK(n_particles=3, checkpoints=(0.25,), reward_scale=1.0)
    with steering.wrap(pipe, prompt="a photo of a cat", preview_decoder=small, **CALL) as model:
        x = states(model)
        assert (model.decode(x) - model.decode_preview(x)).abs().mean() > 0.01
        seen.clear()
        result = steering.steer(model, reward="brightness", method=method)
        assert seen == [3]  # one checkpoint
        assert torch.equal(model.decode(result.samples), result.pixels)
        assert result.ledger.decodes == 6


def test_a_small_decoder_of_other_latents_is_refused(pipe, tmp_path):
    from diffusers import AutoencoderTiny

    from steering.errors import WeightsError

    tiny = AutoencoderTiny(latent_channels=7, encoder_block_out_channels=(8,),
                           decoder_block_out_channels=(8,), num_encoder_blocks=(1,),
                           num_decoder_blocks=(1,))  # fmt: skip
    with pytest.raises(OptionError, match="7 channels"):
        steering.wrap(pipe, prompt="a cat", preview_decoder=tiny, **CALL)
    with pytest.raises(WeightsError, match="no folder of an AutoencoderTiny"):
        steering.wrap(pipe, prompt="a cat", preview_decoder=str(tmp_path), **CALL)
    with pytest.raises(OptionError, match="an autoencoder or a folder"):
        steering.wrap(pipe, prompt="a cat", preview_decoder=3, **CALL)

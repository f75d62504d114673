"""Arguments row by row, and prompt encodings put together from single ones."""

from __future__ import annotations

import pytest
import torch

from steering.errors import OptionError
from steering.pipelines import wrap
from steering.pipelines.prompts import Arguments, PromptMemo
from tests import tiny_pipelines as tiny


def letters(text: str, length: int) -> torch.Tensor:
    codes = [float(ord(c)) for c in text[:length]] + [0.0] * (length - len(text[:length]))
    return torch.tensor(codes)[None, :, None] * torch.tensor([1.0, -0.5])


class Encoder:
    """Encodes letters; ``style`` says how a batch is laid out."""

    def __init__(self, style: str) -> None:
        self.style = style
        self.batches: list[list[str]] = []

    def __call__(self, prompt, device="cpu", negative_prompt=None):
        self.batches.append(list(prompt))
        length = 6 if self.style in ("fixed", "ids", "blocks", "list") else max(map(len, prompt))
        rows = torch.cat([letters(p, length) for p in prompt])
        if self.style == "list":
            return [letters(p, len(p))[0] for p in prompt], None
        if self.style == "ids":
            return rows, torch.arange(6)
        if self.style == "blocks":  # all negatives first: not rows put one after the other
            return torch.cat([rows * 0 - 1, rows])
        if self.style == "masked":
            mask = torch.tensor([[int(k < len(p)) for k in range(length)] for p in prompt])
            return rows, None if mask.all() else mask
        if self.style == "mixing":  # a batch is not what its rows are
            return rows + 0.1 * len(prompt)
        return rows


@pytest.mark.parametrize("style", ["fixed", "ids", "list", "longest", "masked"])
def test_batches_are_put_together_from_single_encodings(style):
    encoder, memo = Encoder(style), PromptMemo(1e-6)
    texts = ["cat", "horse", "cat", "dog"]
    memo(encoder, prompt=texts[:2])
    used = len(encoder.batches)
    for rows in (texts, ["horse", "horse"], ["cat"], ["horse", "cat", "horse"], ["cat", "cat"]):
        made, want = memo(encoder, prompt=rows), Encoder(style)(rows)
        _same(made, want)
    again = [b for b in encoder.batches[used:] if "dog" not in b]
    assert again == []  # other make-ups of known prompts run no encoder
    assert memo.calls == len(encoder.batches) <= 5


def _same(a, b):
    if isinstance(b, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(b, (tuple, list)):
        assert len(a) == len(b)
        for u, v in zip(a, b, strict=True):
            _same(u, v)
    else:
        assert a is b


@pytest.mark.parametrize("style", ["blocks", "mixing"])
def test_joint_encodings_are_kept_where_rows_do_not_add_up(style):
    encoder, memo = Encoder(style), PromptMemo(1e-6)
    for _ in range(3):
        for rows in (["cat", "dog"], ["dog", "dog", "cat"]):
            _same(memo(encoder, prompt=rows), Encoder(style)(rows))
    assert len(encoder.batches) <= 5


def test_equal_lengths_first_then_others():
    encoder, memo = Encoder("masked"), PromptMemo(1e-6)
    for rows in (["cat", "dog"], ["cat", "horse"], ["cat", "dog", "ox"], ["dog", "cat"]):
        _same(memo(encoder, prompt=rows), Encoder("masked")(rows))


def test_encodings_of_one_row_are_copies():
    memo, encoder = PromptMemo(1e-6), Encoder("fixed")
    memo(encoder, prompt=["cat"]).zero_()
    assert float(memo(encoder, prompt=["cat"]).abs().max()) > 0


def test_wrapped_encoder_runs_once_per_prompt():
    pipe, kwargs = tiny.build("sd3", prompt=[tiny.FOX, tiny.BOAT, "a cup"])
    with wrap(pipe, **kwargs) as model:
        t = model.grid().times[0]
        x = torch.randn(6, *model.event_shape, generator=torch.Generator().manual_seed(1))
        model.predict(x, t, cond=[0, 1, 2, 0, 1, 2])
        runs = []
        hook = pipe.text_encoder.register_forward_pre_hook(lambda *a: runs.append(1))
        for conds in ([2, 1, 0, 0, 0, 1], [1] * 6, [0, 2, 2, 2, 2, 2]):
            model.predict(x, t, cond=conds)
        model.decode(x)
        hook.remove()
        assert runs == []


def test_prompts_per_row_may_have_their_own_negative():
    pipe, kwargs = tiny.build("sd", prompt=[tiny.FOX, tiny.BOAT])
    kwargs["negative_prompt"] = ["dark", "bright"]
    with (
        wrap(pipe, **kwargs) as both,
        wrap(pipe, **{**kwargs, "prompt": tiny.BOAT, "negative_prompt": "bright"}) as second,
    ):
        assert both.prompts == (tiny.FOX, tiny.BOAT)
        t = both.grid().times[1]
        x = torch.randn(1, *both.event_shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(both.predict(x, t, cond=1).x0, second.predict(x, t).x0)


def test_prompt_embeddings_instead_of_prompts():
    pipe, kwargs = tiny.build("sd", prompt=[tiny.FOX, tiny.BOAT])
    pos, neg = pipe.encode_prompt(kwargs["prompt"], "cpu", 1, True, [tiny.AVOID] * 2)
    more = {k: v for k, v in kwargs.items() if "prompt" not in k}
    with (
        wrap(pipe, **kwargs) as words,
        wrap(pipe, prompt_embeds=pos, negative_prompt_embeds=neg, **more) as vectors,
    ):
        assert vectors.prompts == (None, None)
        t = words.grid().times[1]
        x = torch.randn(3, *words.event_shape, generator=torch.Generator().manual_seed(1))
        a, b = (m.predict(x, t, cond=[1, 0, 1]).x0 for m in (words, vectors))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"generator": None}, "seed"),
        ({"latents": None}, "predict"),
        ({"output_type": "pil"}, "decode"),
        ({"num_images_per_prompt": 4}, "number of samples belongs to the method"),
        ({"callback_on_step_end": print}, "every step"),
        ({"guidance_scales": 3.0}, "guidance_scale"),
        ({"prompt": []}, "empty"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "3 entries for 2"),
    ],
)
def test_arguments_that_cannot_be_used(wrong, match):
    pipe, kwargs = tiny.shared("sd")
    with pytest.raises(OptionError, match=match):
        wrap(pipe, **{**kwargs, **wrong})


def test_dictionaries_are_not_shared_between_calls():
    pipe, kwargs = tiny.shared("hunyuan_video")
    arguments = Arguments(pipe, kwargs)
    arguments.for_rows([0], output_type="pt", generator=None)["prompt_template"]["template"] = "x"
    assert kwargs["prompt_template"]["template"] == "{}"


@pytest.mark.parametrize(
    ("owner", "net", "each"),
    [
        ("StableDiffusionControlNetPipeline", "ControlNetModel", True),
        ("StableDiffusionControlNetPipeline", "MultiControlNetModel", False),
        ("FluxControlNetPipeline", "FluxMultiControlNetModel", False),
        ("StableDiffusionXLControlNetUnionPipeline", "ControlNetUnionModel", False),
        ("FluxInpaintPipeline", "NoneType", True),
        ("QwenImageEditPlusPipeline", "NoneType", False),
    ],
)
def test_whose_pictures_a_list_of_them_holds(owner: str, net: str, each: bool):
    def call(self, prompt=None, image=None): ...

    pipe = type(owner, (), {"__call__": call})()
    pipe.controlnet = type(net, (), {})()
    found = Arguments(pipe, {"prompt": ["a", "b"], "image": ["one", "two"]})
    assert ("image" in found.per_prompt) == each
    assert found.for_rows([1, 0], output_type="pt", generator=None)["image"] == (
        ["two", "one"] if each else ["one", "two"]
    )

"""The user's arguments row by row, and text encodings made once per prompt."""

# ruff: noqa: ANN401 - diffusers' objects have no common type

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.errors import OptionError, unknown_name

_WIDTH = (
    "the number of samples belongs to the method and its budget: options={'n': ...} of best_of_n, "
    "{'n_particles': ...} of others"
)
_INSTEAD = {
    "generator": "noise comes from named streams: give steer() a seed, or noise() a NoiseKey",
    "latents": "the starting noise comes from the seed; predict() takes states of your own",
    "output_type": "decode() returns tensors in [0, 1]",
    "return_dict": "predict() and decode() return tensors",
    "num_images_per_prompt": _WIDTH,
    "num_videos_per_prompt": _WIDTH,
    "eta": "how much noise a step adds is an option of the method: options={'eta': ...}",
    "callback": "a method sees every step itself",
    "callback_steps": "a method sees every step itself",
    "callback_on_step_end": "a method sees every step itself",
    "callback_on_step_end_tensor_inputs": "a method sees every step itself",
}
_PICTURES = ("image", "mask_image", "control_image")
_EACH_ITS_OWN = re.compile("Img2Img|Inpaint|ControlNet")
"""Classes where a list of pictures is one for each prompt, not several for all of them."""
_EMBEDS = ("prompt_embeds", "prompt_attention_mask", "prompt_embeds_mask")


class Arguments:
    """call_kwargs split into what each prompt has and what all rows share.

    Attributes:
        prompts: one entry per condition.

    Raises:
        OptionError: an argument the pipeline does not have, or that a wrapped pipeline decides.
    """

    def __init__(self, pipe: Any, call_kwargs: Mapping[str, Any]) -> None:
        self.known = inspect.signature(type(pipe).__call__).parameters
        owner = type(pipe).__name__
        for name in call_kwargs:
            if name in _INSTEAD:
                raise OptionError(f"`{name}` cannot be given: {_INSTEAD[name]}.")
            if name not in self.known or name == "self":
                raise unknown_name(f"argument of {owner}", name, set(self.known) - {"self"})
        self.shared: dict[str, Any] = {}
        self.per_prompt: dict[str, Any] = {}
        nets = type(getattr(pipe, "controlnet", None)).__name__
        several = "Multi" in nets or "Union" in nets  # there a list has a picture for each net
        self._own_pictures = bool(_EACH_ITS_OWN.search(owner)) and not several
        self._check_steps(call_kwargs.get("num_inference_steps"))
        self._split(call_kwargs)

    @staticmethod
    def _check_steps(steps: object) -> None:
        if isinstance(steps, int) and steps < 1:
            raise OptionError(f"`num_inference_steps` must be at least 1, got {steps}.")

    def _split(self, call_kwargs: Mapping[str, Any]) -> None:
        prompt = call_kwargs.get("prompt")
        embeds = call_kwargs.get("prompt_embeds")
        if isinstance(prompt, (list, tuple)):
            count = len(prompt)
        elif prompt is None and isinstance(embeds, Tensor):
            count = embeds.shape[0]
        else:
            count = 1
        if count == 0:
            raise OptionError("`prompt` is an empty list.")
        for name, value in call_kwargs.items():
            if name.endswith(_EMBEDS) and isinstance(value, Tensor):
                self._row_values(name, list(value.split(1)), count)
            elif name in _PICTURES and self._own_pictures and _one_each(value, count):
                self._row_values(name, [_as_row(picture) for picture in value], count)
            elif name.startswith(("prompt", "negative_prompt")) and isinstance(value, str):
                self.per_prompt[name] = [value] * count
            elif name.startswith(("prompt", "negative_prompt")) and _strings(value):
                self._row_values(name, list(value), count)
            else:
                self.shared[name] = value
        texts = self.per_prompt.get("prompt")
        self.prompts = tuple(texts) if texts else (None,) * count
        #: num_images_per_prompt, num_videos_per_prompt: what says the width without prompts
        self.counter = next(
            (k for k in self.known if k.startswith("num_") and k in _INSTEAD), None
        )

    def _row_values(self, name: str, values: list, count: int) -> None:
        if len(values) == 1:
            values = values * count
        if len(values) != count:
            raise OptionError(
                f"`{name}` has {len(values)} entries for {count} prompts; "
                "give one for all or one each."
            )
        self.per_prompt[name] = values

    def add(self, prompt: str, like: int) -> int:
        """The row values of prompt ``like`` with another text, as a condition of its own.

        Raises:
            OptionError: the prompts were given as embeddings, or in words for each text encoder.
        """
        given = [k for k in self.per_prompt if k.startswith("prompt")]
        if given != ["prompt"]:
            raise OptionError(
                "Another text can stand in for `prompt` alone; this call was given "
                f"{', '.join(given) or 'no prompt'}."
            )
        texts = self.per_prompt["prompt"]
        others = [values for name, values in self.per_prompt.items() if name != "prompt"]
        for cond in range(len(self.prompts), len(texts)):
            if texts[cond] == prompt and all(v[cond] is v[like] for v in others):
                return cond
        for name, values in self.per_prompt.items():
            values.append(prompt if name == "prompt" else values[like])
        return len(texts) - 1

    @property
    def conds(self) -> int:
        """How many conditions there are: prompts, and texts added since."""
        return max([len(self.prompts), *(len(v) for v in self.per_prompt.values())])

    def for_rows(
        self,
        conds: Sequence[int],
        *,
        output_type: str,
        generator: Any,
    ) -> dict[str, Any]:
        """Arguments of pipe(...) for rows with these prompts."""
        out = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in self.shared.items()}
        for name, values in self.per_prompt.items():
            rows = [values[c] for c in conds]
            out[name] = torch.cat(rows) if isinstance(rows[0], Tensor) else rows
        if self.counter and not self.per_prompt:
            out[self.counter] = len(conds)
        decided = {"output_type": output_type, "generator": generator, "return_dict": False}
        out.update({k: v for k, v in decided.items() if k in self.known})
        return out


def _one_each(pictures: object, count: int) -> bool:
    """Whether these are pictures of several prompts, one for each."""
    if isinstance(pictures, Tensor):
        return count > 1 and pictures.ndim == 4 and len(pictures) == count
    listed = isinstance(pictures, (list, tuple)) and len(pictures) == count > 1
    return listed and not any(isinstance(p, (list, tuple)) for p in pictures)


def _as_row(picture: Any) -> Any:
    return picture[None] if isinstance(picture, Tensor) and picture.ndim == 3 else picture


def _strings(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(v, str) for v in value)
    )


class Mismatch(Exception):
    """Encodings made one by one do not add up to a joint call."""


class PromptMemo:
    """A pipeline's encode_prompt that encodes each prompt once and puts batches together.

    How single encodings make up a batch is learned from one joint call on two prompts (distinct
    ones where there are two) and verified by value: concatenated rows, values that all rows share,
    right-padding with zeros to the longest, masks that are absent where they are all ones. Where
    nothing of that fits, joint encodings are kept per make-up.

    Attributes:
        calls: how often the pipeline's own encode_prompt has run.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.calls = 0
        self._encode: Callable | None = None
        self._single: dict[tuple, Any] = {}
        self._joint: dict[tuple, Any] = {}
        self._rules: dict[str, tuple[Any, bool]] = {}

    def __call__(self, encode: Callable, *args: Any, **kwargs: Any) -> Any:
        """encode(*args, **kwargs), from memory where it can be; ``encode`` is bound to a copy."""
        self._encode = encode
        try:
            return self._assemble(encode, args, kwargs)
        finally:
            self._encode = None  # it is bound to a frame's pipeline

    def _assemble(self, encode: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        bound = inspect.signature(encode).bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        lists = {k: v for k, v in bound.items() if _strings(v)}
        widths = {len(v) for v in lists.values()}
        if len(widths) != 1 or any(isinstance(v, Tensor) for v in bound.values()):
            return self._call(bound)
        rest = {k: v for k, v in bound.items() if k not in lists}
        kind = repr((sorted(lists), sorted(rest.items())))
        rows = [tuple(row) for row in zip(*lists.values(), strict=True)]
        if len(rows) == 1:
            return _join([self._row(kind, lists, rest, rows[0])], _COPY)
        return self._batch(kind, lists, rest, rows)

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        assert self._encode is not None
        self.calls += 1
        with torch.no_grad():
            return self._encode(**arguments)

    def _row(self, kind: str, names: Mapping, rest: Mapping, row: tuple) -> Any:
        key = (kind, row)
        if key not in self._single:
            texts = {name: [text] for name, text in zip(names, row, strict=True)}
            self._single[key] = self._call({**rest, **texts})
        return self._single[key]

    def _together(self, kind: str, names: Mapping, rest: Mapping, rows: list) -> Any:
        key = (kind, *rows)
        if key not in self._joint:
            texts = {
                n: list(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)
            }
            self._joint[key] = self._call({**rest, **texts})
        return self._joint[key]

    def _batch(self, kind: str, names: Mapping, rest: Mapping, rows: list) -> Any:
        distinct = list(dict.fromkeys(rows))
        rule, sure = self._rules.get(kind, (None, False))
        if kind not in self._rules or (not sure and len(distinct) > 1):
            pair = distinct[:2] if len(distinct) > 1 else [rows[0], rows[0]]
            rule = self._learn(kind, names, rest, pair)
        if rule is not None:
            singles = [self._row(kind, names, rest, row) for row in rows]
            try:
                return _join(singles, rule)
            except Mismatch:  # lengths that were equal so far part: learn again on such a pair
                shapes = [_shape(single) for single in singles]
                odd = next(
                    (r for r, s in zip(rows, shapes, strict=True) if s != shapes[0]), rows[0]
                )
                rule = self._learn(kind, names, rest, [rows[0], odd])
                if rule is not None:
                    return _join(singles, rule)
        return self._together(kind, names, rest, rows)

    def _learn(self, kind: str, names: Mapping, rest: Mapping, pair: list) -> Any:
        joint = self._together(kind, names, rest, pair)
        singles = [self._row(kind, names, rest, row) for row in pair]
        try:
            rule = _rule(singles, joint, self.tolerance)
            _verify(_join(singles, rule), joint, self.tolerance)
        except Mismatch:
            rule = None
        self._rules[kind] = (rule, pair[0] != pair[1])
        return rule


_COPY = "copy"


def _shape(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(_shape(v) for v in value) if isinstance(value, (tuple, list)) else value is None


def _rule(singles: Sequence[Any], joint: Any, tolerance: float) -> Any:
    """How the encodings of two prompts become that of both: a name, or a tuple of rules."""
    first = singles[0]
    if joint is None and all(s is None for s in singles):
        return "none"
    if isinstance(joint, Tensor):
        if any(s is None for s in singles):
            return "mask"
        rows = sum(s.shape[0] for s in singles)
        tails = {tuple(s.shape[1:]) for s in singles}
        if joint.shape[0] == rows and len(tails) == 1:
            return "cat"
        if joint.shape[0] == rows and first.ndim > 1:
            return "pad"
        if joint.shape == first.shape:
            return "shared"
    if isinstance(joint, list) and len(joint) == sum(len(s) for s in singles):
        return "list"
    if isinstance(joint, tuple) and isinstance(first, tuple):
        parts = zip(*singles, strict=True)
        return tuple(_rule(p, j, tolerance) for p, j in zip(parts, joint, strict=True))
    raise Mismatch


def _join(singles: Sequence[Any], rule: Any) -> Any:
    first = singles[0]
    if rule == _COPY:
        if isinstance(first, Tensor):
            return first.clone()
        return type(first)(_join([v], _COPY) for v in first) if _many(first) else first
    if isinstance(rule, tuple):
        lengths = _lengths(singles)
        columns = zip(*singles, strict=True)
        return tuple(
            _masks(c, lengths) if r == "mask" else _join(c, r)
            for c, r in zip(columns, rule, strict=True)
        )
    if rule == "none":
        if any(s is not None for s in singles):
            raise Mismatch
        return None
    if rule == "list":
        return [v for s in singles for v in s]
    if rule == "shared":
        if any(s.shape != first.shape for s in singles):
            raise Mismatch
        return first
    if rule == "cat" and any(s is None or s.shape[1:] != first.shape[1:] for s in singles):
        raise Mismatch
    return _padded(singles)


def _many(value: object) -> bool:
    return isinstance(value, (tuple, list))


def _padded(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim < 2:
        return torch.cat(list(parts))
    longest = max(p.shape[1] for p in parts)
    out = []
    for part in parts:
        gap = part.new_zeros(part.shape[0], longest - part.shape[1], *part.shape[2:])
        out.append(torch.cat([part, gap], 1) if gap.shape[1] else part)
    return torch.cat(out)


def _lengths(singles: Sequence[tuple]) -> list[int]:
    leaf = next((k for k, v in enumerate(singles[0]) if isinstance(v, Tensor) and v.ndim > 1), 0)
    return [s[leaf].shape[1] if isinstance(s[leaf], Tensor) else 0 for s in singles]


def _masks(column: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor | None:
    if all(c is None for c in column) and len(set(lengths)) == 1:
        return None
    like = next((c for c in column if c is not None), torch.ones(1, 1, dtype=torch.int64))
    rows = [
        c if c is not None else like.new_ones(1, n) for c, n in zip(column, lengths, strict=True)
    ]
    return _padded(rows)


def _verify(made: Any, joint: Any, tolerance: float) -> None:
    if isinstance(joint, Tensor):
        if not isinstance(made, Tensor) or made.shape != joint.shape:
            raise Mismatch
        a, b = made.double(), joint.to(made.device).double()
        if float((a - b).abs().max()) > tolerance * (float(b.abs().max()) + 1e-12):
            raise Mismatch
    elif _many(joint):
        for a, b in zip(made, joint, strict=True):
            _verify(a, b, tolerance)
    elif made is not joint and made != joint:
        raise Mismatch

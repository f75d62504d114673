"""Any image-text-to-text model of transformers, asked in batches with one forward pass each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from steering.errors import WeightsError
from steering.rewards import checkpoints
from steering.rewards.chat import Ask, Reply
from steering.rewards.memory import in_batches
from steering.rewards.networked import at_work, needs_gradient
from steering.turns import TURN

_TOP = 20
T = TypeVar("T")


class LocalChat:
    """A loaded model with its processor; see `load_chat`.

    Args:
        reward: named in messages.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        processor: Any,  # noqa: ANN401
        *,
        reward: str,
        device: str,
        batch_size: int,
        offload: bool = False,
    ) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.reward, self.device = reward, torch.device(device)
        self.batch_size, self.offload = batch_size, offload
        self.dtype: torch.dtype = model.dtype

    def choices(self, asks: Sequence[Ask], labels: Sequence[Sequence[str]]) -> Tensor:
        """Log-probabilities [n, k] of the first answer token; gradients reach the images."""
        ids = [self._ids(spellings) for spellings in labels]

        def row(part: Sequence[Ask]) -> Tensor:
            logits = self.model(**self._inputs(part), logits_to_keep=1).logits[:, -1]
            logp = logits.float().log_softmax(-1)
            return torch.stack([logp[:, i].logsumexp(-1) for i in ids], -1)

        return torch.cat(self._all(asks, row))

    @torch.no_grad()
    def write(
        self, asks: Sequence[Ask], max_new_tokens: int, *, probabilities: bool = True
    ) -> list[Reply]:
        """Greedy answers, with the likeliest tokens at every place where asked for."""

        def replies(part: Sequence[Ask]) -> list[Reply]:
            inputs, top = self._inputs(part), _Top()
            written = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                logits_processor=[top] if probabilities else [],
                pad_token_id=self.tokenizer.pad_token_id,
            )
            start = inputs["input_ids"].shape[1]
            return [
                self._reply(tokens, [step[row] for step in top.steps])
                for row, tokens in enumerate(written[:, start:].tolist())
            ]

        return [reply for part in self._all(asks, replies) for reply in part]

    def _reply(self, written: list[int], steps: list[dict[int, float]]) -> Reply:
        special = set(self.tokenizer.all_special_ids)
        keep = [k for k, token in enumerate(written) if token not in special]
        spell = self._spell
        text = self.tokenizer.decode([written[k] for k in keep])
        if not steps:
            return Reply(text=text)
        return Reply(
            text=text,
            tokens=tuple(spell(written[k]) for k in keep),
            top=tuple({spell(i): v for i, v in steps[k].items()} for k in keep),
        )

    def _spell(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def _all(self, asks: Sequence[Ask], job: Callable[[Sequence[Ask]], T]) -> list[T]:
        """Results of a job for all questions in order, as many at once as memory has room for."""
        follows = any(needs_gradient(image) for ask in asks for image in ask.images)
        with at_work(self, offload=self.offload and not follows):
            return in_batches(
                lambda rows: job(asks[rows]), len(asks), self.batch_size, self.reward
            )

    def _ids(self, spellings: Sequence[str]) -> list[int]:
        """The single tokens among the spellings."""
        found = [self.tokenizer.encode(s, add_special_tokens=False) for s in spellings]
        unknown = self.tokenizer.unk_token_id
        ids = sorted({i[0] for i in found if len(i) == 1 and i[0] != unknown})
        if not ids:
            raise WeightsError(
                f"{self.reward}: the tokenizer of this model has no single token for "
                f"{spellings[0]!r}, so its probability cannot be read in one step. Use read=text."
            )
        return ids

    def _inputs(self, asks: Sequence[Ask]) -> dict[str, Any]:
        texts = [self._template(ask) for ask in asks]
        exact = self._processed(texts, [[_bytes(i) for i in ask.images] for ask in asks])
        if any(needs_gradient(image) for ask in asks for image in ask.images):
            # The values of 8-bit images, with the gradient of the same resize on floats.
            images = [[i.float().clamp(0, 1) for i in ask.images] for ask in asks]
            smooth = self._processed(texts, images, do_rescale=False)["pixel_values"]
            pixels = exact["pixel_values"].to(smooth.device)
            exact["pixel_values"] = pixels + (smooth - smooth.detach())
        return {
            k: v.to(self.device, self.dtype if v.is_floating_point() else None)
            for k, v in exact.items()
            if isinstance(v, Tensor)
        }

    def _processed(self, texts: list[str], images: list[list[Tensor]], **options: Any) -> Any:  # noqa: ANN401
        return dict(
            self.processor(text=texts, images=images, padding=True, return_tensors="pt", **options)
        )

    def _template(self, ask: Ask) -> str:
        content = [{"type": "image"} for _ in ask.images]
        message = {"role": "user", "content": [*content, {"type": "text", "text": ask.text}]}
        system = {"role": "system", "content": [{"type": "text", "text": ask.system}]}
        return self.processor.apply_chat_template(
            [system, message] if ask.system else [message],
            add_generation_prompt=True,
            tokenize=False,
        )


class _Top:
    """Keeps the likeliest tokens of each step: whole logits of long answers fill a device."""

    def __init__(self) -> None:
        self.steps: list[list[dict[int, float]]] = []

    def __call__(self, written: Tensor, logits: Tensor) -> Tensor:
        logp = logits.float().log_softmax(-1)
        values, tokens = logp.topk(min(_TOP, logp.shape[-1]), -1)
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        self.steps.append([dict(zip(*pair, strict=True)) for pair in pairs])
        return logits


def _bytes(image: Tensor) -> Tensor:
    return (image.detach().clamp(0, 1) * 255).round().byte()


_LOADED: OrderedDict[tuple[str, str, str], tuple[Any, Any]] = OrderedDict()
_KEPT = 2


def load_chat(
    source: str,
    reward: str,
    precision: str,
    device: str,
    batch_size: int,
    offload: bool = False,
) -> LocalChat:
    """The model of a folder or hub id; the last two stay loaded, whichever rewards use them.

    Raises:
        WeightsError: missing or unreadable files, or a model without a chat template.
    """
    key = (source, precision, device)
    with TURN:  # a second thread finds what the first has loaded
        if key not in _LOADED:
            dtype = checkpoints.dtype_of(precision, reward)
            with checkpoints.building():
                _LOADED[key] = _open(source, reward, dtype, device)
            while len(_LOADED) > _KEPT:
                _LOADED.popitem(last=False)
        _LOADED.move_to_end(key)
        model, processor = _LOADED[key]
    return LocalChat(
        model, processor, reward=reward, device=device, batch_size=batch_size, offload=offload
    )


def _open(source: str, reward: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    needs = ("config.json", checkpoints.WEIGHTS, checkpoints.TOKENIZER, checkpoints.IMAGES)
    folder = checkpoints.find(source, reward, needs)
    processor: Any = checkpoints.load_part(AutoProcessor, folder, reward)
    tokenizer = processor.tokenizer
    if not (processor.chat_template or tokenizer.chat_template):
        raise WeightsError(
            f"{reward}: {folder} has no chat template (chat_template.jinja), so it is unknown "
            "how this model is asked. Take an instruction-tuned checkpoint."
        )
    # Answers begin at the end of every row, so the padding must be in front.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = checkpoints.load_model(AutoModelForImageTextToText, folder, reward, dtype, device)
    return model, processor

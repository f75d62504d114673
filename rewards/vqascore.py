"""VQAScore: how probable "Yes" is as the answer to "does this figure show ...?"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import OptionError
from steering.rewards import checkpoints, clip_t5
from steering.rewards.base import Reward, register
from steering.rewards.chat import NO, YES, Ask
from steering.rewards.chat_local import LocalChat, load_chat
from steering.rewards.images import device_name, need_text
from steering.rewards.memory import in_batches
from steering.rewards.networked import Placed, at_work, needs_gradient, put_away
from steering.scoring import Scores

FLAN_QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
CHAT_QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


@register("vqascore")
@dataclass(frozen=True, kw_only=True)
class VQAScore(Reward):
    """Probability of yes when a model is asked whether the image shows the prompt (VQAScore).

    Lin et al., "Evaluating text-to-visual generation with image-to-text generation", 2024. With a
    CLIP-FlanT5 checkpoint this is the authors' score: ``exp(-mean CE)`` over the tokens of "Yes"
    and of the end mark. With any other image-text-to-text model it is P(yes) over P(yes) + P(no)
    at the first place of the answer, summed over their spellings, from one forward pass.

    Parts: ``p_yes``, the plain probability of yes, and with a chat model ``p_no``.

    Attributes:
        model: a folder or hub id.
        question: with {prompt} in it; none takes the one that fits the kind of model.
        normalise: with a chat model, whether p_yes is divided by p_yes + p_no.
        vision, tokenizer: where CLIP-FlanT5's other two parts are.
        precision: "bf16" or "fp32" ("fp16" for chat models only).
        device: None follows the images.
        batch_size: images scored at once; halved for a call whose memory runs out.
        offload: keep the model on the CPU between calls, unless a gradient is still to come.

    Raises:
        WeightsError: files that are missing, unreadable or do not fill the model.
    """

    differentiable: ClassVar[bool] = True
    hub_id: ClassVar[str] = "zhiqiulin/clip-flant5-xxl (or -xl, or any chat model)"
    licence: ClassVar[str] = "Apache-2.0 (CLIP-FlanT5); chat models: their own"
    value_range: ClassVar[str] = "0 to 1"
    memory: ClassVar[str] = "23 GB (xxl), 7 GB (xl), bf16"

    model: str = "zhiqiulin/clip-flant5-xxl"
    question: str | None = None
    normalise: bool = True
    vision: str = clip_t5.VISION
    tokenizer: str = clip_t5.TOKENIZER
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    device: str | None = None
    batch_size: int = 8
    offload: bool = False

    def __post_init__(self) -> None:
        checkpoints.dtype_of(self.precision, self.name)
        if self.batch_size < 1:
            raise OptionError(f"vqascore(batch_size={self.batch_size}): give 1 or more.")
        if self.question is not None and "{prompt}" not in self.question:
            raise OptionError(f"vqascore(question={self.question!r}) must hold {{prompt}}.")

    def for_model(self, model: Any) -> VQAScore:  # noqa: ANN401
        """This reward, with its weights loaded before any image is made."""
        found = self._open(getattr(model, "device", "cpu"))
        if self.offload:
            put_away(found)
        return self

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Scores:
        """Probabilities [n] on the images' device."""
        texts = need_text(prompts, self.name)
        model = self._open(images.device)
        judge = self._flan if isinstance(model, Placed) else self._chat
        value, parts = judge(model, images, texts)
        return Scores(value=value, parts={k: v.detach() for k, v in parts.items()})

    def _flan(
        self, net: Placed, images: Tensor, texts: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        asked = _asked(self.question or FLAN_QUESTION, texts)

        def answers(rows: slice) -> Tensor:
            pixels = net.model.prepare(images[rows].to(net.device))
            return net.model.log_answer(pixels, asked[rows], "Yes")

        with at_work(net, offload=self.offload and not needs_gradient(images)):
            parts = in_batches(answers, len(images), self.batch_size, self.name)
        logp = torch.cat(parts).to(images.device)
        return logp.mean(1).exp().float(), {"p_yes": logp[:, :-1].sum(1).exp()}

    def _chat(
        self,
        model: LocalChat,
        images: Tensor,
        texts: list[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        asked = _asked(self.question or CHAT_QUESTION, texts)
        asks = [Ask(text=t, images=(i,)) for t, i in zip(asked, images, strict=True)]
        logp = model.choices(asks, (YES, NO)).to(images.device)
        value = logp.softmax(-1)[:, 0] if self.normalise else logp[:, 0].exp()
        return value, {"p_yes": logp[:, 0].exp(), "p_no": logp[:, 1].exp()}

    def _open(self, device: torch.device | str) -> Placed | LocalChat:
        where = device_name(self.device or device)
        folder = checkpoints.find(self.model, self.name, ("config.json", checkpoints.WEIGHTS))
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind == clip_t5.MODEL_TYPE:
            flan = clip_t5.load(
                str(folder), self.vision, self.tokenizer, self.name, self.precision, where
            )
            return Placed(model=flan, device=torch.device(where))
        return load_chat(
            str(folder), self.name, self.precision, where, self.batch_size, self.offload
        )


def _asked(question: str, texts: Sequence[str]) -> list[str]:
    return [question.replace("{prompt}", text) for text in texts]

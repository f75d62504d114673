"""Reflection: generate, let a critic look, rewrite the prompt, again; keep the best.

The outer loop of Reflect-DiT (Li et al. 2025), whose in-context refinement needs trained weights,
in the training-free form: what the critic says goes into the words of the next prompt. The reward
always judges against the prompt that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.errors import OptionError, RewardError
from steering.grids import Grid
from steering.method import Context, Cost, Plan, as_float64
from steering.model import Model
from steering.registry import METHODS
from steering.requests import Ask, Decode, Outcome, Progress, Request, Run, Score
from steering.samplers.base import Sampler, afford, reaches, refuse_idle, within_budget
from steering.samplers.rollout import walk
from steering.scoring import Scores


@dataclass(frozen=True)
class Critique:
    """What a critic says of one picture: whether it is right, and what is wrong with it."""

    correct: bool
    feedback: str = ""


Critic = Callable[[Tensor, "str | None"], "Critique | bool | tuple[bool, str]"]
"""(picture [3, H, W] in [0, 1] or video [F, 3, H, W], prompt) -> judgement."""
Rewriter = Callable[[str, Sequence[Critique]], str]
"""(the prompt asked for, latest critiques first) -> the next prompt."""


@METHODS.register("reflect")
@dataclass(frozen=True, kw_only=True)
class Reflect(Sampler):
    """Generate, judge, rewrite, until a picture is right.

    Without critic and rewriter it is best-of-N, one round at a time, that stops at the first
    picture whose reward reaches ``target_reward``.

    Attributes:
        rounds: most rounds; None spends the budget (8 where there is none).
        n: pictures of each round.
        critic: judges each picture; by default ``reward >= target_reward``, with what the reward
            noted about it (a VLM's words) as feedback.
        rewriter: makes the next prompt from the one asked for and the critiques; without one the
            prompt stays.
        target_reward: what counts as right where there is no critic.
        memory: most critiques the rewriter sees; equal feedback counts once.
        workers: critics asked at the same time (they are mostly remote), of all prompts together;
            order is kept.
    """

    rounds: int | None = None
    n: int = 1
    critic: Critic | None = None
    rewriter: Rewriter | None = None
    target_reward: float | None = None
    memory: int = 3
    workers: int = 4

    name: ClassVar[str] = "reflect"
    summary: ClassVar[str] = "generate, criticise, rewrite the prompt, stop when right"
    paper: ClassVar[str] = "after Reflect-DiT, Li et al. 2025 (2503.12271)"
    target: ClassVar[str] = "maximum"
    needs_gradient: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    needs_stochastic: ClassVar[bool] = False
    anytime: ClassVar[bool] = True
    unguided: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rounds", "n", "memory", "workers"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"reflect: {option} must be at least 1, got {value}.")
        if self.critic is not None:
            refuse_idle(self, "critic", "target_reward")
        else:
            refuse_idle(self, "critic=None", "workers")
        if self.rewriter is None:
            refuse_idle(self, "rewriter=None", "memory")

    def levels(self, model: Model) -> Grid:
        if self.rewriter is not None and getattr(model, "add_prompt", None) is None:
            raise OptionError(
                f"reflect: {getattr(model, 'name', 'this model')!r} cannot be asked about other "
                "prompts than it was made for, so there is nothing to rewrite. Leave rewriter out."
            )
        return super().levels(model)

    def cost(self, plan: Plan) -> Cost:
        """At most: a right picture ends the run."""
        n, (rows, calls) = self.n * (self.rounds or 1), self.per_step(plan)
        judged = n * (1 + sum(calls))
        return Cost(nfe=n * sum(rows), decodes=judged, reward_calls=judged)

    def fit(self, plan: Plan) -> Reflect:
        if self.rounds is not None:
            what = f"reflect with {self.rounds} rounds of {self.n}"
            within_budget(plan, self.cost(plan), what, self)
            return self

        def cost(rounds: int) -> Cost:
            return replace(self, rounds=rounds).cost(plan)

        return replace(self, rounds=afford(plan, cost, 8, "round", self))

    def run(self, ctx: Context) -> Run:
        assert self.rounds is not None
        best: Outcome | None = None
        judged, cond, prompt = [], None, ctx.prompt
        for k in range(self.rounds):
            outcome, scores = yield from self._generate(ctx, k, cond)
            critiques = yield from self._criticise(outcome.images, ctx.prompt, scores)
            right = torch.tensor([c.correct for c in critiques])
            best = _best(outcome, right, best)
            yield Progress(
                step=k + 1, of=self.rounds, preview=outcome.images,
                info={
                    "rewards": outcome.reward, "correct": right.tolist(), "prompt": prompt,
                    "feedback": [c.feedback for c in critiques],
                },
            )  # fmt: skip
            if bool(right.any()):
                break
            judged = [*reversed(critiques), *judged]
            if self.rewriter is not None and k + 1 < self.rounds:
                prompt = self._rewrite(ctx, judged)
                cond = ctx.condition(prompt)
        assert best is not None
        return best

    def _generate(
        self, ctx: Context, k: int, cond: int | None
    ) -> Generator[Request, Any, tuple[Outcome, Scores]]:
        """The samples of one round under the present prompt."""
        stream = "" if k == 0 else f"/{k}"
        x = ctx.noise(self.n, stream=f"init{stream}")
        x = yield from walk(
            ctx, x, self.kernel(), stream=f"proposal{stream}", cond=cond, lead=self.lead(ctx)
        )
        images = yield Decode(x)
        scores = yield Score(images, x, final=True)
        outcome = Outcome(
            x0=x, images=images, reward=as_float64(scores.value),
            log_w=torch.zeros(self.n, dtype=torch.float64),
            slots=k * self.n + torch.arange(self.n),
        )  # fmt: skip
        return outcome, scores

    def _criticise(
        self, images: Tensor, prompt: str | None, scores: Scores
    ) -> Generator[Request, Any, list[Critique]]:
        """One critique for each picture, in their order."""
        if self.critic is None:
            right = [reaches(float(r), self.target_reward) for r in scores.value]
            words = [
                "; ".join(text for texts in scores.notes.values() if (text := texts[i]))
                for i in range(len(images))
            ]
            return [Critique(r, w) for r, w in zip(right, words, strict=True)]
        said = yield Ask([partial(self.critic, image, prompt) for image in images], self.workers)
        return [_critique(answer) for answer in said]

    def _rewrite(self, ctx: Context, judged: Sequence[Critique]) -> str:
        assert self.rewriter is not None
        latest: dict[str, Critique] = {}
        for critique in judged:
            latest.setdefault(critique.feedback, critique)
        seen = list(latest.values())[: self.memory]
        prompt = self.rewriter(ctx.prompt or "", seen)
        if not isinstance(prompt, str) or not prompt.strip():
            raise OptionError(f"reflect: the rewriter must return a prompt, got {prompt!r}.")
        return prompt


def _critique(answer: object) -> Critique:
    if isinstance(answer, Critique):
        return answer
    if isinstance(answer, bool):
        return Critique(answer)
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], bool):
        return Critique(answer[0], str(answer[1]))
    raise RewardError(
        f"reflect: the critic must return a Critique, True or False, or (bool, feedback), got "
        f"{answer!r}."
    )


def _best(new: Outcome, right: Tensor, old: Outcome | None) -> Outcome:
    """The best picture so far: right before wrong, then by reward, then the earlier one.

    A run ends with its first right picture, so an older one is never right.
    """
    k = max(range(len(right)), key=lambda k: (bool(right[k]), float(new.reward[k]), -k))
    if old is not None and not bool(right[k]) and float(new.reward[k]) <= float(old.reward[0]):
        return old
    row = slice(k, k + 1)
    return Outcome(
        x0=new.x0[row], images=new.images[row], reward=new.reward[row], log_w=new.log_w[row],
        slots=None if new.slots is None else new.slots[row],
    )  # fmt: skip

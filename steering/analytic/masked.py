"""Masked text diffusion over so few words that it is a finite chain."""

from __future__ import annotations

import torch
from torch import Tensor

from steering.analytic.chain import FiniteChain
from steering.errors import OptionError

_MOST_STATES = 4096


class MaskedChain(FiniteChain):
    """All tokens start masked; each step reveals one, at a place chosen uniformly.

    The token is drawn from its exact law given those already revealed, so the final word follows
    ``joint``: absorbing-state diffusion (Austin et al. 2021, D3PM) with a perfect denoiser.

    Args:
        joint: law of the word, one axis of V entries per place, L axes; normalised here.
        prompts: one entry per condition; all share the one law.

    Attributes:
        words: the word of every state, [S, L] with S = (V + 1)^L; the token V is the mask.

    Raises:
        OptionError: the axes differ in length, or there are too many words to list.
    """

    name = "masked-chain"

    def __init__(self, joint: Tensor, *, prompts: tuple[str | None, ...] = (None,)) -> None:
        joint = torch.as_tensor(joint, dtype=torch.float64)
        places, tokens = joint.ndim, joint.shape[0] if joint.ndim else 0
        square = places > 0 and joint.shape == (tokens,) * places
        if not square or (tokens + 1) ** places > _MOST_STATES:
            raise OptionError(
                "A masked chain needs a joint law with one axis of V tokens per place and at most "
                f"{_MOST_STATES} words of V + 1 tokens, got shape {tuple(joint.shape)}."
            )
        alphabet = torch.arange(tokens + 1)
        self.words = torch.cartesian_prod(*[alphabet] * places).reshape(-1, places)
        super().__init__(*_reveal(joint / joint.sum(), self.words), prompts=prompts)

    def tokens(self, x: Tensor) -> Tensor:
        """The word of each state x [n, 1], [n, L]; the token V is the mask."""
        return self.words[x.long().flatten()]


def _reveal(joint: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The law of the first state and the transitions, one per place to reveal."""
    states, places = words.shape
    mask = joint.shape[0]
    # mass[s]: the probability that the final word agrees with what s reveals.
    mass = torch.stack([_agreeing(joint, word, mask) for word in words])
    hidden = (words == mask).sum(1)
    stay = torch.eye(states, dtype=torch.float64)
    matrices = stay.repeat(places, 1, 1)
    for s, word in enumerate(words):
        masks = int(hidden[s])
        if masks == 0 or mass[s] == 0:
            continue
        row = torch.zeros(states, dtype=torch.float64)
        for place in (word == mask).nonzero().flatten().tolist():
            # Words are numbers in base V + 1, so a token less is a smaller number.
            unit = (mask + 1) ** (len(word) - 1 - place)
            for token in range(mask):
                target = s - (mask - token) * unit
                row[target] = mass[target] / (masks * mass[s])
        matrices[places - masks, s] = row
    return stay[-1], matrices


def _agreeing(joint: Tensor, word: Tensor, mask: int) -> Tensor:
    return joint[tuple(slice(None) if v == mask else v for v in word.tolist())].sum()

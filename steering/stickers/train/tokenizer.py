"""Makes the stickers' tokenizer: byte pairs in which every word of the grammar is one token.

python -m steering.stickers.train.tokenizer DIR

Other words fall back to characters. The merges are learned on the words alone, each as often as
any other, until nothing is left to merge. The learner breaks ties by chance: a new tokenizer has
the tokens of the shipped one, a few of them in another order. Models belong to the one they were
trained with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import CLIPTokenizer

from steering.stickers.grammar import (
    CLASSES,
    COLORS,
    ENGLISH_PLURALS,
    NUMBERS,
    RELATIONS,
    plural,
)

ROOM = 14  # tokens of a caption, both end marks included
STOPS = ("a", "an", "photo", "of", "and")


def words() -> list[str]:
    """Every word that a prompt can hold, plurals in English, sorted."""
    names = [*CLASSES, *(ENGLISH_PLURALS.get(name, plural(name)) for name in CLASSES)]
    rest = (*COLORS, *RELATIONS, *NUMBERS.values(), *STOPS)
    return sorted({word for text in (*names, *rest) for word in text.split()})


def make() -> CLIPTokenizer:
    """The tokenizer: two marks, ASCII with and without the end of a word, then the merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, end_of_word_suffix="</w>", show_progress=False
    )  # fmt: skip
    learner.train_from_iterator([" ".join(words())] * 50, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    signs = [chr(code) for code in range(33, 127)]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*marks, *signs, *(s + "</w>" for s in signs), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=ROOM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    make().save_pretrained(parser.parse_args().out)


if __name__ == "__main__":
    main()

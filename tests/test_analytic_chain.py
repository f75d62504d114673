"""The exact finite chains, masked ones too, against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steering.analytic import FiniteChain, MaskedChain, TableReward
from steering.errors import OptionError, SteeringError
from steering.model import Model
from steering.noise import NoiseKey
from tests.sample_means import BOUND, errors

TABLE = [0.0, 1.0, -0.5, 2.0]


def chain(**options) -> FiniteChain:
    logits = NoiseKey(3).normal(3, (4, 4)).double()
    moves = torch.softmax(2.0 * logits, -1)
    moves[1, 2] = torch.tensor([0.0, 0.25, 0.0, 0.75])
    return FiniteChain([0.1, 0.2, 0.3, 0.4], moves, **options)


def every_path(model: FiniteChain) -> list[tuple[tuple[int, ...], float]]:
    """All paths with their probabilities, by plain loops."""
    found = []
    for path in itertools.product(range(4), repeat=4):
        p = float(model.initial[path[0]])
        for i in range(3):
            p *= float(model.transitions[i, path[i], path[i + 1]])
        found.append((path, p))
    return found


def close(a: torch.Tensor, b: list[float]) -> None:
    assert a.tolist() == pytest.approx(b, abs=1e-12)


def test_chain_is_a_model() -> None:
    model = chain(prompts=("a", "b"))
    assert isinstance(model, Model)
    assert model.costs() == (1, 1, 1)
    x = model.noise(5, NoiseKey(0, "init"))
    assert (x.shape, x.dtype) == ((5, 1), torch.int64)
    model.predict(x, model.grid().times[0])
    assert model.rows == 5
    assert model.decode(x) is x


def test_chain_laws_against_enumeration() -> None:
    model = chain()
    paths = every_path(model)
    listed, probs = model.paths()
    assert [tuple(p) for p in listed.tolist()] == [p for p, _ in paths]
    close(probs, [p for _, p in paths])
    for i, time in enumerate(model.grid().times):
        assert model.node(time) == i
        law = [sum(p for path, p in paths if path[i] == s) for s in range(4)]
        close(model.law(time), law)
        for s in range(4):
            ends = [
                sum(p for path, p in paths if path[i] == s and path[3] == e) / law[s]
                for e in range(4)
            ]
            pred = model.predict(torch.tensor([[s]]), time)
            close(pred.mean[0], ends)
            assert int(pred.mode) == int(pred.x0) == max(range(4), key=ends.__getitem__)
    close(model.law(), law)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_chain_tilting_against_enumeration(scale: float) -> None:
    model = chain()
    paths = every_path(model)
    gains = [p * math.exp(scale * TABLE[path[3]]) for path, p in paths]
    total = sum(gains)
    assert model.log_normaliser(TABLE, scale) == pytest.approx(math.log(total), abs=1e-12)
    law = [
        sum(g for (path, _), g in zip(paths, gains, strict=True) if path[3] == s) / total
        for s in range(4)
    ]
    close(model.tilted_law(TABLE, scale), law)
    for i, time in enumerate(model.grid().times):
        for s in range(4):
            here = [(p, g) for (path, p), g in zip(paths, gains, strict=True) if path[i] == s]
            value = math.log(sum(g for _, g in here) / sum(p for p, _ in here))
            found = model.value(torch.tensor([[s]]), time, TableReward(TABLE), scale)
            assert float(found) == pytest.approx(value, abs=1e-12)
    # The h-transformed chain walks the tilted law over whole paths.
    _, tilted = model.tilted(TABLE, scale).paths()
    close(tilted, [g / total for g in gains])


def test_chain_steps_follow_their_law() -> None:
    model, n = chain(), 40_000
    x = model.noise(n, NoiseKey(0, "init"))
    for i, (t, u) in enumerate(model.grid().steps()):
        before = x
        coin = NoiseKey(0, "proposal", i).uniform(n)
        x = model.transition.propose(x, model.predict(x, t), t, u, None, coin)
        for a, b in itertools.product(range(4), repeat=2):
            hits = (x[before == a] == b).double()
            wanted = float(model.transitions[i, a, b])
            assert hits.sum() == 0 if wanted == 0.0 else errors(hits, wanted) < BOUND
        for s in range(4):
            assert errors((x == s).double(), float(model.law(u)[s])) < BOUND


def test_chain_draws_densities_and_mixed_times() -> None:
    model, times = chain(), chain().grid().times
    x = torch.tensor([[0], [2], [2]])
    pred = model.predict(x, times[1])
    draws = pred.draw(20_000, NoiseKey(0, "draw"))
    assert draws.shape == (20_000, 3, 1)
    for i, s in itertools.product(range(3), range(4)):
        wanted = float(pred.probs[i, s])
        assert wanted == 0.0 or errors((draws[:, i] == s).double(), wanted) < BOUND
    mixed = model.predict(x, [times[0], times[1], times[3]])
    close(mixed.probs[1], pred.probs[1].tolist())
    close(mixed.probs[2], [0.0, 0.0, 1.0, 0.0])
    two = model.transitions[0] @ model.transitions[1]
    logs = model.transition.log_prob(torch.tensor([[3], [1], [0]]), x, times[0], times[2])
    close(logs.exp(), [float(two[0, 3]), float(two[2, 1]), float(two[2, 0])])
    us = [times[1], times[2], times[3]]
    coin = NoiseKey(0).uniform(3)
    whole = model.transition.propose(x, pred, [times[0], times[1], times[0]], us, None, coin)
    alone = model.transition.propose(x[1:2], pred, times[1], times[2], None, coin[1:2])
    assert int(whole[1]) == int(alone)


def test_table_rewards_read_states_and_probabilities() -> None:
    reward = TableReward(TABLE)
    assert reward(torch.tensor([[3], [0]])).tolist() == [2.0, 0.0]
    probs = torch.tensor([[0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
    assert reward(probs).tolist() == [1.0]


def test_chain_refusals() -> None:
    with pytest.raises(OptionError, match="probability vector"):
        FiniteChain([0.5, 0.5], [[[0.5, 0.6], [0.5, 0.5]]])
    with pytest.raises(OptionError, match="shapes"):
        FiniteChain([0.5, 0.5], [[0.5, 0.5]])
    with pytest.raises(OptionError, match="one number per state"):
        chain().log_normaliser([0.0, 1.0])
    eye = torch.eye(4, dtype=torch.float64)
    with pytest.raises(OptionError, match="too many"):
        FiniteChain([0.25] * 4, eye.expand(12, 4, 4)).paths()
    model, x = chain(), torch.tensor([[0]])
    t, u = model.grid().times[:2]
    pred = model.predict(x, t)
    for call in (lambda: pred.score(t), lambda: pred.velocity(model.path, 0.5)):
        with pytest.raises(SteeringError, match="chain"):
            call()
    with pytest.raises(SteeringError, match="propose"):
        model.transition(x, pred, t, u, model.path)


def test_masked_words_follow_the_joint_law() -> None:
    joint = NoiseKey(0, "joint").uniform(1, (3, 3, 3))[0] ** 3
    joint[0, 1] = 0.0
    joint = joint / joint.sum()
    model = MaskedChain(joint)
    assert model.tokens(model.noise(2, NoiseKey(0))).tolist() == [[3, 3, 3]] * 2
    law = model.law()
    for s, word in enumerate(model.words.tolist()):
        wanted = 0.0 if 3 in word else float(joint[tuple(word)])
        assert float(law[s]) == pytest.approx(wanted, abs=1e-12)
    # What is revealed stays, and one place more is shown at each step.
    x = model.noise(2000, NoiseKey(0))
    for i, (t, u) in enumerate(model.grid().steps()):
        before = model.tokens(x)
        x = model.transition.propose(
            x, model.predict(x, t), t, u, None, NoiseKey(1, step=i).uniform(2000)
        )
        after = model.tokens(x)
        assert bool(((after == before) | (before == 3)).all())
        assert bool(((after == 3).sum(1) == 2 - i).all())
    # A prediction from a half-masked word is the conditional law.
    half = (model.words == torch.tensor([2, 3, 0])).all(1).nonzero()
    pred = model.predict(half, model.grid().times[2])
    for token in range(3):
        full = (model.words == torch.tensor([2, token, 0])).all(1)
        wanted = float(joint[2, token, 0] / joint[2, :, 0].sum())
        assert float(pred.probs[0, full]) == pytest.approx(wanted, abs=1e-12)


def test_masked_chain_refusals() -> None:
    for shape in ((2, 3), (9, 9, 9, 9), ()):
        with pytest.raises(OptionError, match="masked chain"):
            MaskedChain(torch.ones(shape))

"""Budgets and ledgers: what is counted, what is refused, and before what."""

from __future__ import annotations

import json
import math

import pytest

from steering.errors import BudgetError, OptionError
from steering.ledger import Budget, Ledger


@pytest.mark.parametrize("cap", ["nfe", "reward_calls", "seconds"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_caps_are_positive(cap: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"Budget: {cap} must be positive"):
        Budget(**{cap: value})


def test_charges_add_up() -> None:
    ledger = Ledger()
    ledger.charge("nfe", 8)
    ledger.charge("nfe", 4, backward=True)
    ledger.charge("decodes", 3, backward=True)
    ledger.charge("decodes", 2)
    ledger.charge("reward_calls", 5)
    ledger.charge("reward_calls", 1, backward=True)
    assert (ledger.nfe, ledger.nfe_backward) == (12, 4)
    assert (ledger.decodes, ledger.decodes_backward) == (5, 3)
    assert (ledger.reward_calls, ledger.reward_backward) == (6, 1)
    assert ledger.heldout_calls == 0


def test_seconds_by_kind() -> None:
    ledger = Ledger()
    for kind, seconds in (("denoise", 0.5), ("own", 0.25), ("denoise", 1.0)):
        ledger.charge_seconds(kind, seconds)
    assert ledger.spent == {"denoise": 1.5, "own": 0.25}
    assert ledger.seconds == 1.75


def test_the_last_call_that_fits_is_allowed_and_the_next_refused() -> None:
    ledger, budget = Ledger(nfe=6), Budget(nfe=10)
    ledger.check(budget, nfe=4)
    with pytest.raises(
        BudgetError, match="Budget of 10 nfe reached: 6 spent, the next call needs"
    ):
        ledger.check(budget, nfe=5)
    ledger.charge("nfe", 4)
    ledger.check(budget)  # asking for nothing costs nothing
    ledger.check(budget, reward_calls=99)
    with pytest.raises(BudgetError, match="reward_calls"):
        ledger.check(Budget(reward_calls=3), reward_calls=4)


def test_time_is_checked_before_every_call() -> None:
    ledger = Ledger()
    ledger.charge_seconds("reward", 2.0)
    ledger.check(Budget(seconds=2.5))
    with pytest.raises(BudgetError, match=r"Budget of 2 s reached after 2\.0 s"):
        ledger.check(Budget(seconds=2))


def test_no_cap_is_no_limit() -> None:
    ledger = Ledger(nfe=10**9, reward_calls=10**9)
    ledger.charge_seconds("own", 1e9)
    ledger.check(Budget(), nfe=10**9, reward_calls=10**9)


def test_plain_numbers() -> None:
    ledger = Ledger(nfe=3)
    ledger.charge_seconds("own", 0.12345)
    data = json.loads(json.dumps(ledger.to_json()))
    assert data["nfe"] == 3
    assert data["seconds"] == 0.123
    assert data["seconds_by_kind"] == {"own": 0.123}
    assert data["heldout_calls"] == 0


def test_ledgers_do_not_share_their_seconds() -> None:
    one, two = Ledger(), Ledger()
    one.charge_seconds("own", 1.0)
    assert two.spent == {}

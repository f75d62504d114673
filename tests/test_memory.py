"""What fits into memory: counted bytes against closed forms, and the widths that follow."""

from __future__ import annotations

import pytest
import torch

import steering
from steering.analytic import GaussianMixture
from steering.batch import Batch
from steering.memory import Care, Watch, free_memory, plan_memory, rows_that_fit
from steering.requests import Decode, Denoise, Score
from steering.samplers import BestOfN
from steering.scoring import resolve_reward

KIB = 1024
CPU = torch.device("cpu")


def test_bytes_alive_at_once_are_counted() -> None:
    before = torch.ones(4 * KIB)
    with Watch() as watch:
        a = before * 2.0  # 16 KiB
        view = before.view(64, -1).t()  # an alias of what was there
        b = a + 1.0  # 32 KiB alive
        del a
        c = b.double()  # 16 + 32 KiB alive
        del b
        d = c[:10].clone()
        c.add_(1.0)
    assert watch.peak == 48 * KIB
    assert watch.live == 32 * KIB + 80
    del c, d, view
    assert watch.live == 0


def test_a_graph_keeps_what_its_backward_pass_needs() -> None:
    x = torch.ones(KIB, requires_grad=True)
    with Watch() as watch:
        y = (x.sin().sin().sin() * 1.0).sum()
    assert watch.live == 2 * 4 * KIB + 4  # inputs of the second and third sine, and the sum
    del y
    with torch.no_grad(), Watch() as watch:
        x.sin().sin().sin().sum()
    assert watch.peak == 2 * 4 * KIB
    assert watch.live == 0


def test_rows_that_fit() -> None:
    assert rows_that_fit(100.0, 12_500, 64) == 80 - 16  # the wish is the limit
    assert rows_that_fit(1000.0, 12_500, 64) == 8  # 0.8 of what is free, and a quarter on top
    assert rows_that_fit(1e9, 12_500, 64) == 1
    assert rows_that_fit(1e9, None, 64) == 64
    assert rows_that_fit(0.0, 1, 64) == 64


def test_free_memory_of_this_machine() -> None:
    free = free_memory(CPU)
    assert free is not None
    assert 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


class Wide(GaussianMixture):
    """A plane whose network makes one tensor of ``row`` float32 numbers for each row asked."""

    row = 25_000
    dtype = torch.float32

    def __init__(self, prompts=("p",)) -> None:
        super().__init__([1.0], [[0.5, 0.5]], [0.2], steps=4, kernel="exact", prompts=prompts)
        self.widths: list[int] = []

    def predict(self, x, t, *, cond=0, grad=False):
        self.widths.append(len(x))
        wide = torch.ones(len(x), self.row)
        del wide
        return super().predict(x, t, cond=cond, grad=grad)


def bright(images):
    return images.flatten(1).mean(1)


def test_a_plan_before_the_run() -> None:
    model = Wide()
    plan = plan_memory(model, resolve_reward(bright), most=64, free=2_500_000)
    network = next(p for p in plan.parts if p.name == "network")
    assert 100_000 <= network.row < 101_000
    assert (network.fits, network.calls) == (15, 5)
    assert network.split >= 0.0
    assert plan.max_batch == 15
    assert {p.name for p in plan.parts} == {"network", "decoder", "reward"}
    assert all(p.fits == 64 and p.calls == 1 and p.split == 0.0 for p in plan.parts[1:])
    assert plan.to_json()["parts"]["network"]["fits"] == 15
    assert "15 rows fit: 5 calls" in str(plan)
    unknown = plan_memory(model, most=64)
    assert unknown.max_batch == 64


def test_gradients_are_planned_for_themselves() -> None:
    reward = resolve_reward(bright)
    names = ["network", "decoder", "reward"]
    for differentiable, more in ((False, names[:2]), (True, names)):
        reward.differentiable = differentiable
        plan = plan_memory(Wide(), reward, gradient=True, free=2_500_000)
        assert [p.name for p in plan.parts] == names + [f"{name} with gradient" for name in more]


def batch_of(n: int, kind=Denoise, *, size: int = 2) -> Batch:
    x = torch.zeros(n, size)
    request = Denoise(x, Wide().grid().times[0]) if kind is Denoise else Decode(x)
    if kind is Score:
        request = Score(x, x)
    return Batch([None], [request])  # type: ignore[list-item]


def care(free: int | None, limits: dict) -> Care:
    return Care(CPU, limits, free=lambda device: free)


def test_nobody_looks_where_memory_is_plenty_unknown_or_one_row_is_all() -> None:
    limits = dict.fromkeys((Score, Decode, Denoise), 64)
    assert not care(2**34, limits).wants(batch_of(64))
    assert not care(None, limits).wants(batch_of(64))
    assert not care(2**10, limits).wants(batch_of(1))
    assert not care(2**10, dict.fromkeys(limits, 1)).wants(batch_of(64))
    short = care(2**20, limits)
    assert short.wants(batch_of(64))
    assert not short.wants(batch_of(64))  # once
    assert short.wants(batch_of(64, Decode))
    assert care(2**30, limits).wants(batch_of(64, Score))


def test_a_machine_is_asked_for_its_memory_only_when_calls_grow_wider() -> None:
    asked = []
    limits = dict.fromkeys((Score, Decode, Denoise), 64)
    watchful = Care(CPU, limits, free=lambda device: asked.append(1) or 2**34)
    for rows in (8, 8, 4, 16, 16, 8):
        assert not watchful.wants(batch_of(rows))
    assert len(asked) == 2


def test_a_run_short_of_memory_looks_at_one_row_and_keeps_to_what_fits(monkeypatch) -> None:
    monkeypatch.setattr("steering.memory.free_memory", lambda device: 2_500_000)
    method = BestOfN(n=40, select="all")
    plain = Wide()
    want = steering.steer(plain, reward=bright, method=method, max_batch=64)
    assert plain.widths[0] == 40  # what the user says is done
    model = Wide()
    result = steering.steer(model, reward=bright, method=method)
    assert model.widths[:5] == [1, 15, 15, 9, 15]
    torch.testing.assert_close(result.samples, want.samples, rtol=0, atol=1e-12)
    assert result.ledger.nfe == want.ledger.nfe == model.rows


def test_a_row_that_fails_while_it_is_watched_fails_as_ever(monkeypatch) -> None:
    class Broken(Wide):
        def predict(self, x, t, *, cond=0, grad=False):
            raise ValueError("no")

    monkeypatch.setattr("steering.memory.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="no"):
        steering.steer(Broken(), reward=bright, method=BestOfN(n=4))

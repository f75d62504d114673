"""One pipeline, several threads: as a server's request handlers would use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import pytest
import torch

import steering
from steering.kernels.short_attention import ShortAttention
from steering.pipelines.frozen import frozen
from steering.registry import Registry
from steering.rewards.networked import Networked, Placed
from tests.tiny_pipelines import BOAT, FOX, build

SLOW = Registry("thing", "slow_names", "steering.none")
METHODS = ("best_of_n", "fk", "reno", "dts")


def light(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def tiny(name: str = "sd"):
    pipe, call = build(name, steps=4)
    for part in ("prompt", "negative_prompt"):
        call.pop(part, None)
    return pipe, call


@contextmanager
def visits(network: torch.nn.Module, seconds: float = 0.0) -> Iterator[list[int]]:
    """How many threads were inside a network, at each of its calls, which last some time."""
    inside, seen = set(), []

    def enter(*_: object) -> None:
        inside.add(threading.get_ident())
        seen.append(len(inside))
        time.sleep(seconds)

    handles = (
        network.register_forward_pre_hook(enter),
        network.register_forward_hook(lambda *_: inside.discard(threading.get_ident())),
    )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_threads_that_share_a_pipeline_get_what_each_gets_alone(name) -> None:
    pipe, call = tiny(name)

    def one(job: tuple[str, int]):
        method, seed = job
        text = FOX if seed else BOAT
        return steering.steer(pipe, text, reward=light, method=method, nfe=64, seed=seed, **call)

    jobs = [(method, seed) for method in METHODS for seed in range(2)]
    alone = [one(job) for job in jobs]
    network = pipe.unet if name == "sd" else pipe.transformer
    with visits(network, 0.001) as seen, ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(one, jobs))
    assert max(seen) == 1, "the network was entered by two threads at once"
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.ledger.nfe == b.ledger.nfe > 0
        assert a.ledger.nfe_backward == b.ledger.nfe_backward
    assert all(p.requires_grad for p in network.parameters())


def test_rows_of_the_users_own_pipeline_in_another_thread_are_not_counted() -> None:
    pipe, call = tiny()
    ran: list[object] = []
    armed = threading.Event()

    def beside(*_: object) -> None:
        if armed.is_set() and not ran:
            own = {"prompt": BOAT, "num_inference_steps": 3, "output_type": "latent"}
            thread = threading.Thread(target=lambda: ran.append(pipe(**{**call, **own})))
            ran.append(thread)
            thread.start()
            thread.join()

    plain = steering.steer(pipe, FOX, reward=light, method="best_of_n", nfe=32, **call)
    handle = pipe.unet.register_forward_pre_hook(beside)
    with steering.wrap(pipe, prompt=FOX, **call) as model:
        model.costs()
        armed.set()
        found = steering.steer(model, reward=light, method="best_of_n", nfe=32)
    handle.remove()
    assert len(ran) == 2, "the user's own call failed"
    assert found.ledger.nfe == plain.ledger.nfe


def test_pipelines_that_share_a_network_take_turns() -> None:
    pipe, call = tiny()
    twin = type(pipe)(**pipe.components)
    twin.set_progress_bar_config(disable=True)

    def one(which: object):
        return steering.steer(which, FOX, reward=light, method="fk", nfe=32, **call)

    with visits(pipe.unet, 0.001) as seen, ThreadPoolExecutor(2) as pool:
        a, b = pool.map(one, (pipe, twin))
    assert max(seen) == 1
    assert torch.equal(a.pixels, b.pixels)


def test_the_choice_of_attention_is_put_back_when_threads_leave_in_another_order() -> None:
    attend = ShortAttention(torch.device("cpu"), torch.bfloat16)
    attend.longest = 8
    first_in, second_waits = threading.Event(), threading.Event()

    def first() -> None:
        with attend():
            first_in.set()
            second_waits.wait(0.2)

    def second() -> None:
        first_in.wait()
        with attend():
            second_waits.set()
            time.sleep(0.05)

    before = torch.backends.cuda.flash_sdp_enabled()
    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.cuda.flash_sdp_enabled() is before is True


def test_frozen_parameters_come_back_when_a_call_fails() -> None:
    pipe, _ = tiny()

    def fail() -> None:
        with frozen(pipe, True):
            assert not any(p.requires_grad for p in pipe.unet.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(p.requires_grad for p in pipe.unet.parameters())


# --- what is loaded on first use ---------------------------------------------------------------


def test_threads_that_come_first_together_all_find_every_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_names.py").write_text(
        "import time\nfrom tests.test_threads import SLOW\n"
        "time.sleep(0.2)\nSLOW.register('thing')(dict)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: SLOW.get("thing"), range(4))) == {dict}


def test_a_package_that_cannot_be_imported_says_so_each_time() -> None:
    registry = Registry("thing", "no_such_package_here", "steering.none")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_here"):
            registry.get("thing")


@dataclass(frozen=True, kw_only=True)
class Slow(Networked):
    """Loads and scores slowly, and notes how many are at it."""

    name: ClassVar[str] = "slow"
    loads: ClassVar[list[int]] = []
    inside: ClassVar[list[int]] = []
    most: ClassVar[list[int]] = []

    def _load(self, where: str) -> Placed:
        return slow_network(where)

    def _values(self, net: Placed, images: torch.Tensor, prompts: object) -> torch.Tensor:
        self.inside.append(1)
        self.most.append(len(self.inside))
        time.sleep(0.01)
        self.inside.pop()
        return light(images)


@lru_cache(maxsize=1)
def slow_network(where: str) -> Placed:
    Slow.loads.append(1)
    time.sleep(0.1)
    return Placed(model=torch.nn.Identity(), device=torch.device(where))


def test_a_reward_is_loaded_once_and_scores_for_one_thread_at_a_time() -> None:
    slow_network.cache_clear()
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Slow().score(images, ["a", "b"], None), range(4)))
    assert all(torch.equal(values, light(images)) for values in found)
    assert len(Slow.loads) == 1
    assert max(Slow.most) == 1

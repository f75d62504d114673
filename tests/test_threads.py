"""One pipeline, several threads: as a server's request handlers would use it."""

from __future__ import annotations

import copy
import gc
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import pytest
import torch

import steering
from steering.attention import use_attention
from steering.errors import OptionError
from steering.loading import describe
from steering.pipelines.frozen import frozen
from steering.registry import METHODS, Registry
from steering.repeat import _threads
from steering.rewards import as_reward, detector
from steering.rewards.networked import Networked, Placed
from steering.turns import TURN
from tests.tiny_pipelines import BOAT, FOX, build

SLOW = Registry("thing", "slow_names", "steering.none")
BROKEN = Registry("thing", "broken_names", "steering.none")
RUNS = ("best_of_n", "fk", "reno", "dts")


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

    jobs = [(method, seed) for method in RUNS for seed in range(2)]
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


def test_pipelines_that_share_parts_take_turns() -> None:
    """A gradient freezes the parameters of its pipeline, the decoder of both among them, and torch
    multiplies in another order then."""
    pipe, call = tiny()
    twin = type(pipe)(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)})
    twin.set_progress_bar_config(disable=True)

    def one(job: tuple[object, str]):
        which, method = job
        return steering.steer(which, FOX, reward=light, method=method, nfe=64, **call)

    jobs = [(pipe, "reno"), (twin, "fk")] * 4
    alone = [one(job) for job in jobs[:2]]
    with visits(pipe.unet, 0.001) as seen, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, jobs))
    assert max(seen) == 1
    for k, found in enumerate(together):
        assert torch.equal(found.pixels, alone[k % 2].pixels)


WAITS = {
    "noise": lambda pipe, model: model.noise(1, steering.NoiseKey(0)),
    "attention": lambda pipe, model: use_attention(pipe, "native"),
    "how it is made ready": lambda pipe, model: describe(pipe),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_its_turn(name) -> None:
    pipe, call = tiny()
    with steering.wrap(pipe, prompt=FOX, **call) as model:
        thread = threading.Thread(target=WAITS[name], args=(pipe, model), daemon=True)
        with TURN:
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join(10)
        assert not thread.is_alive()


def test_names_are_looked_up_without_a_turn() -> None:
    METHODS.load()
    thread = threading.Thread(target=METHODS.get, args=("fk",), daemon=True)
    with TURN:
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_the_choice_of_attention_reaches_no_other_call() -> None:
    """Gradients in bfloat16 choose a kernel for the process."""
    half, own = tiny("flux")
    half.to(dtype=torch.bfloat16)
    pipe, call = tiny()
    flags: set[bool] = set()
    seen = pipe.unet.register_forward_pre_hook(
        lambda *_: flags.add(torch.backends.cuda.flash_sdp_enabled())
    )
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(steering.steer, p, FOX, reward=light, method=m, nfe=48, **c)
            for p, m, c in ((half, "reno", own), (pipe, "fk", call)) * 3
        ]
        assert all(run.result().ledger.nfe for run in runs)
    seen.remove()
    assert flags == {True}


def test_frozen_parameters_come_back_when_a_call_fails() -> None:
    pipe, _ = tiny()

    def fail() -> None:
        with frozen(pipe, True):
            assert not any(p.requires_grad for p in pipe.unet.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_what_is_frozen_comes_back_after_an_interrupt_half_way() -> None:
    pipe, _ = tiny()
    *_, last = pipe.vae.parameters()

    def interrupt(wanted: bool = True) -> torch.nn.Parameter:
        if wanted:
            return type(last).requires_grad_(last, wanted)
        raise KeyboardInterrupt

    last.requires_grad_ = interrupt
    with pytest.raises(KeyboardInterrupt), frozen(pipe, True):
        raise AssertionError
    assert all(p.requires_grad for p in pipe.vae.parameters())


# --- threads that come and go ------------------------------------------------------------------


def parked() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "_FrameGreenlet" for thing in gc.get_objects())


def pass_round() -> list[torch.Tensor]:
    """Pictures that four threads, one after another, make with one model, and then this one."""
    pipe, call = tiny()
    found: list[torch.Tensor] = []
    with steering.wrap(pipe, prompt=FOX, **call) as model:

        def work() -> None:
            found.append(steering.steer(model, reward=light, nfe=32).pixels)

        for _ in range(4):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        work()
    return found


def test_a_model_passes_from_thread_to_thread_and_leaves_nothing_behind() -> None:
    """Numbers of threads that have ended are given again, and greenlets cannot move."""
    before = parked()
    first, *others = pass_round()
    assert len(others) == 4
    assert all(torch.equal(first, pixels) for pixels in others)
    assert parked() == before


def test_waiting_for_others_is_no_time_of_the_run() -> None:
    pipe, call = tiny()
    go, held = threading.Event(), threading.Event()

    def hold() -> None:
        go.wait(20)
        with TURN:
            held.set()
            time.sleep(0.8)

    def slow(images: torch.Tensor) -> torch.Tensor:
        go.set()
        held.wait(5)
        return light(images)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    method = steering.samplers.FK(n_particles=2)
    budget = steering.Budget(seconds=60)
    started = time.perf_counter()
    found = steering.steer(pipe, FOX, reward=slow, method=method, budget=budget, **call)
    thread.join()
    waited = time.perf_counter() - started - found.ledger.seconds
    assert waited > 0.6
    assert not found.cancelled


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_begins_with_a_free_turn() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with TURN:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if TURN.acquire(timeout=10) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0


def test_replays_side_by_side_leave_the_number_of_threads_as_it_was(tmp_path) -> None:
    pipe, call = tiny()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        steering.steer(pipe, FOX, reward="brightness", nfe=16, out=tmp_path, **call)
    finally:
        torch.set_num_threads(before)
    inside = threading.Barrier(2)

    def again(first: bool) -> bool:
        with _threads(before + 1) if first else nullcontext():
            if first:
                inside.wait()
                time.sleep(0.05)
                return True
        inside.wait()
        return steering.replay(tmp_path / "000.png", pipe=pipe).identical

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(again, (True, False)))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


# --- what is loaded on first use ---------------------------------------------------------------


def test_threads_that_come_first_together_all_find_every_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_names.py").write_text(
        "import time\nfrom tests.test_threads import SLOW\n"
        "time.sleep(0.2)\nSLOW.register('thing')(dict)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: SLOW.get("thing"), range(4))) == {dict}


def test_a_package_that_cannot_be_imported_says_so_each_time(tmp_path, monkeypatch) -> None:
    """Also where it fails after a name has been registered."""
    (tmp_path / "broken_names.py").write_text(
        "from tests.test_threads import BROKEN\n"
        "@BROKEN.register('thing')\nclass Thing: ...\n"
        "import no_such_package_here\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_here"):
            BROKEN.get("thing")
    with pytest.raises(OptionError, match="registered twice"):
        BROKEN.register("thing")(dict)


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


@pytest.mark.parametrize("source", ["stickers-turbo", "folder"])
def test_pipelines_are_loaded_by_several_threads_at_once(source, tmp_path) -> None:
    """diffusers and transformers set the default dtype, and we hold back warnings, meanwhile."""
    filters, dtype = list(warnings.filters), torch.get_default_dtype()
    levels = [logging.getLogger(name).level for name in ("diffusers", "transformers")]

    if source == "folder":
        tiny("sd3")[0].save_pretrained(source := tmp_path)

    def work(_: int) -> torch.dtype:
        return steering.load(source, dtype="bfloat16").transformer.dtype

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {torch.bfloat16}
    assert torch.get_default_dtype() == dtype
    assert warnings.filters == filters
    assert levels == [logging.getLogger(name).level for name in ("diffusers", "transformers")]


def test_the_detector_is_read_once() -> None:
    detector._judge.cache_clear()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    judge = as_reward("detector")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: judge.score(image, ["a photo of a red apple"], None), range(4)))
    assert detector._judge.cache_info().misses == 1

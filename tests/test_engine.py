"""The engine: what it merges, what it charges, and what is left when something goes wrong."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

import steering
from steering.analytic import GaussianMixture, LinearReward
from steering.engine import Engine
from steering.errors import BudgetError, OptionError, RewardError, SteeringError, TaskErrors
from steering.ledger import Budget
from steering.method import Plan
from steering.requests import Decode, Denoise, Outcome, Progress, Score
from steering.samplers import FK, BestOfN
from steering.scoring import Scores, resolve_reward
from steering.task import Task

LINE = LinearReward([1.0])


class Watched(GaussianMixture):
    """A mixture that remembers its calls and has a memory of limited width."""

    def __init__(self, prompts=("p",), *, steps=4, width=10**9, decode_width=10**9) -> None:
        super().__init__(
            [0.5, 0.5], [-1.0, 1.0], [0.4, 0.6], steps=steps, kernel="exact", prompts=prompts
        )
        self.width, self.decode_width = width, decode_width
        self.calls: list[int] = []
        self.conds: list[list[int]] = []
        self.times: list[object] = []
        self.decoded: list[int] = []

    def predict(self, x, t, *, cond=0, grad=False):
        if len(x) > self.width:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.calls.append(len(x))
        self.conds.append(list(cond))
        self.times.append(t)
        return super().predict(x, t, cond=cond, grad=grad)

    def decode(self, x0, *, grad=False):
        if len(x0) > self.decode_width:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        self.decoded.append(len(x0))
        return x0


class Pixels(GaussianMixture):
    """Two-dimensional samples shown as 4x4 images: red and green are the coordinates."""

    def __init__(self, prompts=("p",)) -> None:
        super().__init__([1.0], [[0.5, 0.5]], [0.1], steps=4, kernel="exact", prompts=prompts)

    def decode(self, x0, *, grad=False):
        blue = torch.zeros(len(x0), 1, dtype=x0.dtype)
        colours = torch.cat([x0, blue], 1).clamp(0, 1).float()
        return colours[:, :, None, None].expand(-1, -1, 4, 4).contiguous()


@dataclass(frozen=True, kw_only=True)
class Echo(BestOfN):
    """Denoises its own slots at its own pace, then scores: for watching the engine."""

    delay: int = 0

    def run(self, ctx):
        x = ctx.noise(self.n)
        for i, (t, u) in enumerate(ctx.grid.steps()):
            for _ in range(self.delay if i == 0 else 0):
                yield Denoise(x, t)
            prediction = yield Denoise(x, t)
            assert len(prediction.x0) == len(x)
            x = ctx.move(x, prediction, t, u, self.kernel(), step=i)
        images = yield Decode(x)
        assert torch.equal(images, x)
        scores = yield Score(images, x, final=True)
        assert torch.allclose(scores.value.double(), LINE(images), atol=1e-6)
        log_w = torch.zeros(self.n, dtype=torch.float64)
        return Outcome(x0=x, images=images, reward=scores.value.double(), log_w=log_w)


def tasks_of(model, methods, reward=LINE, budget=None, seeds=None) -> list[Task]:
    grid, guide = model.grid(), resolve_reward(reward)
    plan = Plan(grid=grid, costs=model.costs(), budget=budget or Budget())
    return [
        Task(
            index=i,
            prompt=model.prompts[i],
            cond=i,
            seed=i if seeds is None else seeds[i],
            method=method,
            plan=plan,
            reward=guide,
        )
        for i, method in enumerate(methods)
    ]


def steer(model, reward, method, *, seed=0, **more):
    prompts = model.prompts[0] if len(model.prompts) == 1 else list(model.prompts)
    return steering.steer(model, prompts, reward=reward, method=method, seed=seed, **more)


# --- merging ----------------------------------------------------------------------------------


def test_tasks_meet_in_full_batches() -> None:
    model = Watched(("a", "b", "c"))
    tasks = tasks_of(model, [Echo(n=5), Echo(n=3), Echo(n=4)])
    Engine(model, max_batch=64).run(tasks)
    assert model.calls == [12] * 4
    assert model.decoded == [12]
    assert model.conds[0] == [0] * 5 + [1] * 3 + [2] * 4
    assert [len(t.outcome.x0) for t in tasks] == [5, 3, 4]
    assert [t.ledger.nfe for t in tasks] == [20, 12, 16]


@pytest.mark.parametrize("max_batch", [1, 5, 7, 100])
def test_different_times_share_a_batch_and_each_task_gets_its_own_rows(max_batch: int) -> None:
    """One task lags by a step, so levels mix; every task must end where it ends alone."""
    prompts = ("a", "b", "c")
    methods = [Echo(n=5, delay=2), Echo(n=3), Echo(n=4, delay=1)]
    model = Watched(prompts)
    tasks = tasks_of(model, methods)
    Engine(model, max_batch=max_batch).run(tasks)
    assert max(model.calls) <= max_batch
    if max_batch == 100:
        assert any(isinstance(t, list) for t in model.times)
        assert model.calls[:2] == [12, 12]
    for i, task in enumerate(tasks):
        alone = tasks_of(Watched(prompts), methods)[i]
        Engine(Watched(prompts)).run([alone])
        assert torch.allclose(task.outcome.x0, alone.outcome.x0, rtol=0, atol=1e-12)
        assert task.ledger.nfe == alone.ledger.nfe == methods[i].n * (4 + methods[i].delay)


def test_waiting_tasks_start_when_there_is_room() -> None:
    model = Watched(("p",) * 20)
    tasks = tasks_of(model, [Echo(n=4)] * 20)
    Engine(model, max_batch=8).run(tasks)
    assert set(model.calls) == {8}  # always full: 20 tasks of 4 rows over 4 steps
    assert len(model.calls) == 20 * 4 * 4 // 8
    for i, task in enumerate(tasks):
        alone = tasks_of(Watched(("p",) * 20), [Echo(n=4)] * 20)[i]
        Engine(Watched(("p",))).run([alone])
        assert torch.allclose(task.outcome.x0, alone.outcome.x0, rtol=0, atol=1e-12)


def test_two_runs_are_bit_identical() -> None:
    method = FK(n_particles=6, reward_scale=2.0)
    a, b = (
        steer(Watched(("a", "b")), LINE, method, seed=[4, 5], max_batch=5, nfe=200)
        for _ in range(2)
    )
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.samples, y.samples)
        assert torch.equal(x.log_weights, y.log_weights)
        events = [[{**e} for e in r.trace.events] for r in (x, y)]
        assert events[0] == events[1]


def test_seeds_name_the_noise() -> None:
    method = BestOfN(n=2, select="all")
    a, b, c = steer(Watched(("a", "b", "c")), LINE, method, seed=[1, 2, 1])
    assert torch.equal(a.samples, c.samples)
    assert not torch.equal(a.samples, b.samples)


# --- memory ------------------------------------------------------------------------------------


def test_batches_are_halved_until_memory_holds_them() -> None:
    free = steer(Watched(), LINE, BestOfN(n=40, select="all"))
    model = Watched(width=9, decode_width=5)
    tight = steer(model, LINE, BestOfN(n=40, select="all"))
    assert max(model.calls) == 5  # 40 -> 20 -> 10 -> 5, and never wider again
    assert model.calls == [5] * 8 * 4
    assert max(model.decoded) <= 5
    assert tight.ledger.nfe == 160
    assert tight.ledger.decodes == 40
    assert torch.allclose(tight.samples, free.samples, rtol=0, atol=1e-12)
    assert tight.recipe.engine["limits"]["Denoise"] == 5


def test_wide_decodes_are_cut_where_network_calls_are_not() -> None:
    model = Watched()
    Engine(model, max_batch=64).run(tasks_of(model, [Echo(n=40)]))
    assert model.calls == [40] * 4
    assert model.decoded == [16, 16, 8]


def test_a_reward_without_memory_is_halved_too() -> None:
    widths = []

    def hungry(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")
        widths.append(len(images))
        return images[:, 0]

    result = steer(Watched(), hungry, BestOfN(n=10, select="all"))
    assert max(widths) == 2
    assert sum(widths) == 10 == result.ledger.reward_calls


def test_memory_that_does_not_hold_one_row_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        steer(Watched(width=0), LINE, BestOfN(n=3))


def test_max_batch_must_be_positive() -> None:
    for bad in (0, -3):
        with pytest.raises(OptionError, match="max_batch must be at least 1"):
            steer(Watched(), LINE, BestOfN(n=3), max_batch=bad)


# --- failures -----------------------------------------------------------------------------------


def fails_on(word: str, how):
    """A reward that fails whenever a prompt of the batch is ``word``."""

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return how(images) if word in prompts else images[:, 0]

    return reward


def boom(images: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("the judge fell asleep")


def test_one_failing_prompt_does_not_cost_the_others_anything() -> None:
    model = Watched(("a", "bad", "c"))
    method = BestOfN(n=4, select="all")
    with pytest.raises(TaskErrors, match="1 of 3 prompts failed") as caught:
        steer(model, fails_on("bad", boom), method, seed=[0, 1, 2])
    results, errors = caught.value.results, caught.value.errors
    assert list(errors) == [1]
    assert isinstance(errors[1], RewardError)
    assert "judge fell asleep" in str(errors[1])
    assert results[1] is None
    assert errors[1].result is not None
    whole = steer(Watched(("a", "b", "c")), LINE, method, seed=[0, 1, 2])
    for i in (0, 2):
        assert torch.equal(results[i].samples, whole[i].samples)
        assert results[i].ledger.reward_calls == 4
        assert results[i].ledger.nfe == 16


@pytest.mark.parametrize("max_batch", [1, 3, 4, 64])
def test_rows_that_succeeded_are_charged_once(max_batch: int) -> None:
    """A budget of exactly what is needed must be enough beside a failing neighbour."""
    model = Watched(("a", "bad", "c", "d"))
    method = FK(n_particles=4, reward_scale=1.0)
    calls = 4 + 4  # of four steps one has checkpoints: two are at its place, two at the last
    with pytest.raises(TaskErrors) as caught:
        steer(
            model,
            fails_on("bad", boom),
            method,
            budget=Budget(reward_calls=calls, nfe=16),
            max_batch=max_batch,
        )
    assert list(caught.value.errors) == [1]
    for i in (0, 2, 3):
        assert caught.value.results[i].ledger.reward_calls == calls
        assert caught.value.results[i].ledger.nfe == 16


BAD = {
    "raises": (boom, "raised ZeroDivisionError on .* images: the judge fell asleep"),
    "nan": (lambda images: images.flatten(1)[:, 0] * torch.nan, "no usable number for"),
    "inf": (lambda images: images.flatten(1)[:, 0] + torch.inf, "no usable number for"),
    "too few": (lambda images: images.flatten(1)[1:, 0], "one number per image"),
    "a scalar": (lambda images: images.mean(), "one number per image"),
    "a picture": (lambda images: images, "one number per image"),
    "text": (lambda images: "very good", "cannot be read as one number"),
}


@pytest.mark.parametrize("bad", sorted(BAD))
@pytest.mark.parametrize("late", [False, True], ids=["at once", "at the end"])
def test_a_failed_reward_leaves_the_best_so_far(tmp_path, bad: str, late: bool) -> None:
    how, message = BAD[bad]
    seen = []

    def reward(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return how(images) if len(seen) > 2 or not late else images[:, 0, 0, 0]

    method = FK(n_particles=4, reward_scale=1.0, checkpoints=(0.25, 0.5))
    with pytest.raises(RewardError, match=message) as caught:
        steer(Pixels(), reward, method, out=tmp_path)
    result = caught.value.result
    assert result is not None
    assert result.preview
    assert len(result) == 1
    assert (result.best_reward == result.best_reward) is late
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["000.png", "result.json"]
    with Image.open(tmp_path / "000.png") as picture:
        assert picture.size == (4, 4)
        assert "steering" in picture.text
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["preview"] is True
    assert report["ledger"]["reward_calls"] == (8 if late else 0)


def test_the_best_preview_is_kept_not_the_latest() -> None:
    kept = []

    def reward(images: torch.Tensor) -> torch.Tensor:
        if len(kept) == 3:
            raise ValueError("end")
        kept.append(images[:, 0, 0, 0] - 10.0 * len(kept))  # later previews score far lower
        return kept[-1]

    method = FK(n_particles=6, reward_scale=0.1, checkpoints=(0.0, 0.25, 0.5))
    with pytest.raises(RewardError) as caught:
        steer(Pixels(), reward, method)
    assert caught.value.result.best_reward == pytest.approx(float(kept[0].max()))


def test_a_list_with_a_failure_still_writes_every_folder(tmp_path) -> None:
    reward = fails_on("bad", boom)

    def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return reward(images[:, :, 0, 0], prompts)

    with pytest.raises(TaskErrors):
        steer(Pixels(("a", "bad")), red, BestOfN(n=3), out=tmp_path)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    assert names == ["0000/000.png", "0000/result.json", "0001/000.png", "0001/result.json"]


def test_a_failing_model_is_an_error_of_its_task_only() -> None:
    class Broken(Watched):
        def decode(self, x0, *, grad=False):
            if bool((x0 > 0).any()):
                raise FileNotFoundError("decoder lost")
            return x0

    with pytest.raises(TaskErrors) as caught:
        steer(Broken(("p",) * 12), LINE, BestOfN(n=1), seed=list(range(12)))
    bad = set(caught.value.errors)
    assert 0 < len(bad) < 12
    assert {i for i, r in enumerate(caught.value.results) if r is None} == bad


def test_a_failing_heldout_verifier_keeps_the_result() -> None:
    with pytest.raises(RewardError, match="fell asleep") as caught:
        steer(Watched(), LINE, BestOfN(n=3, select="all"), heldout=boom)
    assert len(caught.value.result) == 3


def test_a_verifier_that_fails_for_one_prompt_keeps_the_scores_of_the_others() -> None:
    def picky(images, prompts):
        if "b" in prompts:
            raise ValueError("no b")
        return images[:, 0]

    model = Watched(("a", "b", "c"))
    with pytest.raises(TaskErrors, match="no b") as caught:
        steer(model, LINE, BestOfN(n=2, select="all"), heldout=picky)
    assert list(caught.value.errors) == [1]
    assert caught.value.errors[1].result.prompt == "b"
    first, none, last = caught.value.results
    assert none is None
    for result in (first, last):
        assert torch.equal(result.heldout["picky"], result.samples[:, 0].float().double())
        assert result.ledger.heldout_calls == result.ledger.reward_calls == 2


def test_a_verifier_without_memory_is_halved_too() -> None:
    widths = []

    def wide(images, prompts):
        widths.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images[:, 0]

    results = steer(Watched(("a", "b")), LINE, BestOfN(n=3, select="all"), heldout=wide)
    assert widths[0] == 6
    assert all(len(r.heldout["wide"]) == 3 for r in results)


def test_an_interrupt_inside_a_verifier_keeps_the_pictures() -> None:
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    result = steer(Watched(), LINE, BestOfN(n=2), heldout=interrupted)
    assert result.cancelled
    assert not result.preview
    assert result.heldout == {}


def test_verifiers_of_one_name_are_told_apart() -> None:
    ways = [lambda x, p: x[:, 0], lambda x, p: -x[:, 0]]
    held = steer(Watched(), LINE, BestOfN(n=1), heldout=ways).heldout
    assert list(held) == ["<lambda>#0", "<lambda>#1"]
    assert torch.equal(held["<lambda>#0"], -held["<lambda>#1"])


@pytest.mark.parametrize("part", [0.5, None, torch.zeros(()), torch.zeros(1)])
def test_parts_that_do_not_fit_are_an_error_of_the_reward(part) -> None:
    def odd(images, prompts):
        return Scores(images[:, 0], {"odd": part})

    with pytest.raises(RewardError, match="part 'odd' must be a tensor with one entry per image"):
        steer(Watched(), odd, BestOfN(n=2))


def test_a_reward_object_that_returns_no_scores() -> None:
    class Bare:
        name, spec, differentiable = "bare", None, False

        def __call__(self, images, prompts, *, metadata=None):
            return images[:, 0]

    with pytest.raises(RewardError, match="'bare' returned Tensor"):
        steer(Watched(), Bare(), BestOfN(n=2))


def test_a_method_must_return_an_outcome() -> None:
    class Silent(BestOfN):
        def run(self, ctx):
            yield Progress(step=1, of=1)

    with pytest.raises(TypeError, match="returned None, no Outcome"):
        steer(Watched(), LINE, Silent(n=1))


def test_a_request_that_is_none_is_refused() -> None:
    class Odd(Echo):
        def run(self, ctx):
            yield "a picture, please"

    with pytest.raises(TypeError, match="no Request"):
        steer(Watched(), LINE, Odd(n=1))


# --- stopping -----------------------------------------------------------------------------------


class Switch:
    """Turns to True at the k-th time it is asked."""

    def __init__(self, k: int) -> None:
        self.left = k

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_cancelling_returns_the_best_so_far(tmp_path) -> None:
    method = FK(n_particles=4, reward_scale=1.0, checkpoints=(0.25, 0.5))

    def red(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, 0]

    result = steer(Pixels(), red, method, cancelled=Switch(6), out=tmp_path)
    assert result.cancelled
    assert result.preview
    assert len(result) == 1
    assert result.best_reward == pytest.approx(float(result.pixels[0, 0, 0, 0]))
    assert result.ledger.nfe < 16
    assert json.loads((tmp_path / "result.json").read_text())["cancelled"] is True
    assert (tmp_path / "000.png").is_file()


def test_a_finished_picture_beats_any_preview() -> None:
    """Previews score high, finished pictures low; the run stops between two chunks of them."""

    @dataclass(frozen=True, kw_only=True)
    class Slow(Echo):
        def run(self, ctx):
            x = ctx.noise(4)
            yield Score(x + 100.0, x)
            yield Score(x, x, final=True)
            yield Score(x + 200.0, x)
            yield Score(x - 1.0, x - 1.0, final=True)
            raise KeyboardInterrupt

    result = steer(Watched(), LINE, Slow(n=4))
    assert result.cancelled
    assert not result.preview
    assert result.best_reward == pytest.approx(float(result.samples[0]))
    assert result.best_reward < 50.0


def test_cancelling_before_any_preview_decodes_one() -> None:
    result = steer(Watched(), LINE, BestOfN(n=4), cancelled=Switch(2))
    assert result.cancelled
    assert result.preview
    assert result.ledger.decodes == 1
    assert result.best_reward == pytest.approx(float(result.samples[0]))


def test_cancelling_at_once_is_an_error_not_an_empty_result() -> None:
    with pytest.raises(SteeringError, match="before there was anything"):
        steer(Watched(), LINE, BestOfN(n=4), cancelled=lambda: True)


def test_cancelling_many_keeps_the_finished_ones() -> None:
    model = Watched(("p",) * 6)
    results = steer(model, LINE, BestOfN(n=2, select="all"), max_batch=2, cancelled=Switch(12))
    done = [r for r in results if r is not None and not r.cancelled]
    assert 0 < len(done) < 6
    assert all(len(r) == 2 and not r.preview for r in done)


def test_an_interrupt_inside_a_method_marks_it_as_cancelled() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Interrupted(Echo):
        def run(self, ctx):
            t, _ = next(ctx.grid.steps())
            yield Denoise(ctx.noise(self.n), t)
            raise KeyboardInterrupt

    result = steer(Watched(), LINE, Interrupted(n=2))
    assert result.cancelled


def test_an_interrupt_inside_a_reward_keeps_the_pictures() -> None:
    def stop(images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    result = steer(Watched(), stop, BestOfN(n=2))
    assert result.cancelled
    assert len(result) == 1


def test_seconds_are_a_budget() -> None:
    """A run whose time is over ends like a cancelled one, with its best so far."""

    class Slow(Watched):
        def predict(self, *args, **kwargs):
            time.sleep(0.02)
            return super().predict(*args, **kwargs)

    short = steer(Slow(), LINE, BestOfN(n=4), budget=Budget(seconds=0.05))
    assert short.cancelled
    assert short.preview
    assert len(short) == 1
    with pytest.raises(SteeringError, match="before there was anything to show"):
        steer(Watched(), LINE, BestOfN(n=4), budget=Budget(seconds=1e-9))
    result = steer(Watched(), LINE, BestOfN(n=4), budget=Budget(seconds=3600.0))
    assert 0.0 < result.ledger.seconds < 3600.0


def test_a_method_may_catch_the_end_of_its_budget() -> None:
    """That is what an anytime method does."""

    class Anytime(Echo):
        def run(self, ctx):
            t, _ = next(ctx.grid.steps())
            x, count = ctx.noise(1), 0
            try:
                while True:
                    yield Denoise(x, t)
                    count += 1
            except BudgetError:
                pass
            images = yield Decode(x)
            scores = yield Score(images, x, final=True)
            log_w = torch.full((1,), float(count), dtype=torch.float64)
            return Outcome(x0=x, images=images, reward=scores.value.double(), log_w=log_w)

    result = steer(Watched(), LINE, Anytime(n=1), nfe=7)
    assert result.log_weights.tolist() == [7.0]
    assert result.ledger.nfe == 7


# --- progress -----------------------------------------------------------------------------------


def test_listeners_hear_every_step_of_every_task_in_order() -> None:
    heard: list[tuple[int, int, int, int]] = []

    def listener(task: Task, progress: Progress) -> None:
        heard.append((task.index, progress.step, progress.of, task.ledger.nfe))

    results = steer(Watched(("a", "b")), LINE, BestOfN(n=3), listener=listener)
    for i in (0, 1):
        mine = [h[1:] for h in heard if h[0] == i]
        assert mine == [(1, 4, 3), (2, 4, 6), (3, 4, 9), (4, 4, 12), (4, 4, 12)]
        events = results[i].trace.events
        assert [(e["step"], e["of"], e["nfe"]) for e in events] == mine
    json.dumps(results[0].trace.to_json())


def test_previews_reach_the_listener_and_stay_out_of_the_trace() -> None:
    previews = []

    def listener(task: Task, progress: Progress) -> None:
        if progress.preview is not None:
            previews.append(tuple(progress.preview.shape))

    method = FK(n_particles=5, reward_scale=1.0, checkpoints=(0.5,))
    result = steer(Watched(), LINE, method, listener=listener)
    assert previews == [(5, 1)]
    assert not any("preview" in e for e in result.trace.events)


def test_charges_of_a_merged_call_are_split_by_rows() -> None:
    class Double(Watched):
        def costs(self):
            return (2,) * len(self.grid())

        def predict(self, x, t, *, cond=0, grad=False):
            self.rows += len(x)
            return super().predict(x, t, cond=cond, grad=grad)

    model = Double(("a", "b", "c"))
    tasks = tasks_of(model, [Echo(n=5, delay=1), Echo(n=3), Echo(n=4)])
    Engine(model, max_batch=7).run(tasks)
    assert [t.ledger.nfe for t in tasks] == [50, 24, 32]
    assert sum(t.ledger.nfe for t in tasks) == model.rows
    kinds = {"denoise", "decode", "reward", "own"}
    assert all(set(t.ledger.spent) == kinds for t in tasks)


def test_tasks_with_different_rewards_do_not_share_a_call() -> None:
    model = Watched(("a", "b"))
    one, two = tasks_of(model, [BestOfN(n=2), BestOfN(n=2)])
    two.reward = resolve_reward(lambda images: images[:, 0] + 100.0)
    Engine(model).run([one, two])
    assert float(one.outcome.reward[0]) < 50 < float(two.outcome.reward[0])


def test_a_reward_that_compares_pictures_sees_each_request_whole_and_alone() -> None:
    sizes = []

    class Rank:
        name, spec, differentiable, stationary = "rank", None, False, False

        def __call__(self, images, prompts, *, metadata=None):
            sizes.append((len(images), len(set(prompts))))
            return Scores(images[:, 0].argsort().argsort().double())

    model = GaussianMixture([1.0], [0.0], [1.0], steps=2, prompts=("a", "b", "c"))
    steering.steer(model, reward=Rank(), method=BestOfN(n=6), max_batch=4)
    assert sizes == [(6, 1)] * 3

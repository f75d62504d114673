"""What every training command shares: clock, learning rate, EMA, checkpoints and the loss log."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINT_SECONDS = 120.0


def half_is_fast() -> bool:
    """Whether the CPU has bf16 matrix tiles; without them float32 trains 1.6 times faster."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def autocast() -> torch.autocast:
    """bf16 autocast where it pays."""
    return torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast())


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Libraries initialise layers from the global generator: seed it, then put it back."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    write(part)
    part.replace(path)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of one training run; `minutes` counts all sittings of a resumed run together."""

    minutes: float
    out: Path
    resume: bool = False
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    ema: float = 0.998
    warmup: int = 100
    log_every: int = 50
    seed: int = 0


class Loop:
    """AdamW on float32 master weights, cosine decay to the end of the time, EMA, checkpoints.

    Modules may be float32 (run them under autocast) or bfloat16 (fastest on a CPU with bf16
    matrix units); the optimiser always works on float32 copies of the latter.

    Args:
        measure: a number of the modules on held-out data, higher is better. It is taken at every
            checkpoint and at the end, and `use_best` brings back the weights of the highest.
        averaged: whether the EMA weights are what is measured and shipped.
    """

    def __init__(
        self,
        recipe: Recipe,
        modules: dict[str, nn.Module],
        measure: Callable[[], float],
        *,
        averaged: bool = True,
    ) -> None:
        torch.set_num_threads(2)
        self.recipe, self.modules = recipe, modules
        self.measure, self.averaged = measure, averaged
        self.best = -math.inf
        self.best_weights: dict[str, dict[str, Tensor]] = {}
        live = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.live = live
        self.master = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in live
        ]
        self.average = [p.detach().clone() for p in self.master]
        self.optimizer = torch.optim.AdamW(
            self.master, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas,
            fused=True,
        )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        self._recent: dict[str, list[float]] = {}
        recipe.out.mkdir(parents=True, exist_ok=True)
        if recipe.resume and self.checkpoint.exists():
            self._restore()

    @property
    def checkpoint(self) -> Path:
        return self.recipe.out / "checkpoint.pt"

    @property
    def log_file(self) -> Path:
        return self.recipe.out / "log.jsonl"

    def steps(self) -> Iterator[int]:
        """Step numbers until the time is up; sets the learning rate and saves on the way."""
        total = self.recipe.minutes * 60.0
        mark, saved = time.monotonic(), self.seconds
        while self.seconds < total:
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr(self.seconds / total)
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.seconds - saved > CHECKPOINT_SECONDS:
                self.judge()
                self.save()
                saved = self.seconds
        self.judge()
        self.save()

    def update(self, loss: Tensor, **parts: Tensor) -> None:
        """One optimiser and EMA step; `parts` of the loss are logged beside it."""
        loss.backward()
        for master, live in zip(self.master, self.live, strict=True):
            if master is not live:
                master.grad = None if live.grad is None else live.grad.float()
                live.grad = None
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.master[0] is not self.live[0]:
                torch._foreach_copy_(self.live, self.master)
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.master], 1.0 - decay)
        for name, value in {"loss": loss, **parts}.items():
            self._recent.setdefault(name, []).append(float(value.detach()))
        if len(self._recent["loss"]) == self.recipe.log_every:
            self.log(**{name: sum(v) / len(v) for name, v in self._recent.items()})
            self._recent.clear()

    def log(self, **values: float) -> None:
        """Append one JSON line and print it."""
        record = {"step": self.step, "seconds": round(self.seconds, 1)}
        line = json.dumps(record | {k: round(float(v), 5) for k, v in values.items()})
        with self.log_file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @torch.no_grad()
    def judge(self) -> None:
        """Measure what would be shipped now, and keep it if nothing before was better."""
        training = [m.training for m in self.modules.values()]
        kept = [p.detach().clone() for p in self.live]
        if self.averaged:
            torch._foreach_copy_(self.live, self.average)
        for module in self.modules.values():
            module.eval()
        value = self.measure()
        self.log(heldout=value)
        if value > self.best:
            self.best = value
            self.best_weights = {
                name: copy.deepcopy(module.state_dict()) for name, module in self.modules.items()
            }
        torch._foreach_copy_(self.live, kept)
        for module, mode in zip(self.modules.values(), training, strict=True):
            module.train(mode)

    def use_best(self) -> None:
        """Put the weights of the best measure into the modules, for export."""
        for name, weights in self.best_weights.items():
            self.modules[name].load_state_dict(weights)

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "master": [p.detach() for p in self.master],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_weights": self.best_weights,
        }
        write_atomic(self.checkpoint, lambda path: torch.save(state, path))

    @torch.no_grad()
    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        torch._foreach_copy_(self.master, state["master"])
        torch._foreach_copy_(self.live, state["master"])
        torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_weights = state["best"], state["best_weights"]

    def _lr(self, done: float) -> float:
        warm = min(1.0, (self.step + 1) / self.recipe.warmup)
        return self.recipe.lr * warm * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)) + 0.01)

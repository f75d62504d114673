"""Named noise: equal names give equal numbers, at any batch size, in any order.

A :class:`NoiseKey` names one stream of random numbers. Its numbers come from the counter-based
generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), with
the slot in the counter, so a whole batch of slots is drawn at once and each slot is independent of
how many neighbours it has. Box-Muller runs in float64 and is rounded to float32 at the end.

The second half holds moves in noise space; each says which law it keeps.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from steering.errors import OptionError
from steering.kernels.philox import MASK as _MASK
from steering.kernels.philox import MULTIPLIERS as _MULTIPLIERS
from steering.kernels.philox import WEYL as _WEYL
from steering.kernels.philox import Stream, box_muller, from_uniform


@dataclass(frozen=True)
class NoiseKey:
    """Names a stream of random numbers.

    ``slot`` is the position of a particle, never its ancestor: twins made by resampling must part.
    """

    seed: int
    stream: str = "proposal"
    step: int = 0
    slot: int = 0

    def at(self, **changes: object) -> NoiseKey:
        """The same key with some of its parts replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def generator(self) -> torch.Generator:
        """A CPU generator for code that wants one (diffusers' ``generator=``)."""
        digest = self._digest(f"/{self.slot}")
        return torch.Generator("cpu").manual_seed(digest >> 1)

    def normal(
        self, slots: int | Sequence[int], shape: Sequence[int], *, device: str = "cpu"
    ) -> Tensor:
        """Standard normal numbers, one row per slot: float32 [n, *shape].

        ``slots`` is a count n (slots ``self.slot`` to ``self.slot + n - 1``) or a list of offsets.
        """
        width = math.prod(shape)
        blocks = -(-width // 4)
        if torch.device(device).type == "cpu":
            u = np.empty((slots if isinstance(slots, int) else len(slots), blocks, 4))
            self._fill(u, slots, kind=0)
            rows = _normal(u, width)
        else:
            rows = box_muller(self._words(slots, blocks, device, kind=0), width)
        return rows.reshape(rows.shape[0], *shape)

    def uniform(
        self, slots: int | Sequence[int], shape: Sequence[int] = (), *, device: str = "cpu"
    ) -> Tensor:
        """Uniform numbers in (0, 1), one row per slot: float64 [n, *shape]."""
        width = math.prod(shape)
        words = self._words(slots, -(-width // 2), device, kind=1)
        high, low = words[..., 0::2], words[..., 1::2]
        u = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52
        return u.flatten(1)[:, :width].reshape(-1, *shape)

    def numbers(self, slots: int | Sequence[int]) -> Stream:
        """The numbers of :meth:`normal` as a fused kernel draws them, by name."""
        offsets = range(slots) if isinstance(slots, int) else slots
        if isinstance(offsets, range) and offsets.step == 1:
            rows: Sequence[int] = range(self.slot + offsets.start, self.slot + offsets.stop)
        else:
            rows = [self.slot + k for k in offsets]
        return Stream(self._digest(), rows)

    def _digest(self, suffix: str = "") -> int:
        return _digest(f"{self.seed}/{self.stream}/{self.step}{suffix}")

    def _words(self, slots: int | Sequence[int], blocks: int, device: str, *, kind: int) -> Tensor:
        """Philox output as int64 in [0, 2**32): [n, blocks, 4].

        ``kind`` keeps the normal and the uniform numbers of one key independent.
        """
        stream = self.numbers(slots)
        if torch.device(device).type != "cpu":
            return stream.words(blocks, device, kind)
        words = np.empty((len(stream.slots), blocks, 4), np.int64)
        self._fill(words, slots, kind=kind)
        return torch.from_numpy(words)

    def _fill(self, out: np.ndarray, slots: int | Sequence[int], *, kind: int) -> None:
        """Philox output into numbers of any type that holds it, [n, blocks, 4]."""
        digest, rows = self.numbers(slots)
        _philox_rows(out, rows, digest & _MASK, digest >> 32, kind)


@functools.lru_cache(maxsize=1024)
def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def normals(keys: Sequence[NoiseKey], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers under many keys in one pass, a row each: float32 [n, *shape].

    Row i is ``keys[i].normal(1, shape)``, on the CPU. Small draws cost by the call, not by size.
    """
    width = math.prod(shape)
    u = np.empty((len(keys), -(-width // 4), 4))
    digests = np.array([key._digest() for key in keys], np.uint64)
    low, high = ((digests >> s & _MASK).astype(np.uint32) for s in (np.uint64(0), np.uint64(32)))
    _philox_rows(u, [key.slot for key in keys], low, high, kind=0)
    return _normal(u, width).reshape(len(keys), *shape)


Name = tuple[str, int, int]
"""(stream, step, slot) of one row of noise."""

_AHEAD = 2**16
"""Most numbers drawn in one pass ahead of their use: more would leave the cache."""


class Ahead:
    """Rows of noise drawn before they are asked for, many in one pass; the numbers are the same.

    A draw of few rows costs more by its calls than by its numbers, the more so between two calls
    of a network. Nothing is drawn for large states, where a pass of one row is long enough.
    """

    def __init__(self) -> None:
        self._coming: dict[Name, None] = {}
        self._rows: dict[Name, Tensor] = {}

    def expect(self, names: Iterable[Name]) -> None:
        """Says which rows will be asked for next, in this order; others are dropped."""
        coming = dict.fromkeys(names)
        self._rows = {name: row for name, row in self._rows.items() if name in coming}
        self._coming = {name: None for name in coming if name not in self._rows}

    def normal(self, key: NoiseKey, slots: int | Sequence[int], shape: Sequence[int]) -> Tensor:
        """The same as ``key.normal(slots, shape)``."""
        if not (self._rows or self._coming):
            return key.normal(slots, shape)
        offsets = range(slots) if isinstance(slots, int) else slots
        wanted = [(key.stream, key.step, key.slot + k) for k in offsets]
        if missing := [name for name in wanted if name not in self._rows]:
            further = [name for name in self._coming if name not in missing]
            room = _AHEAD // max(1, math.prod(shape)) - len(missing)
            if not further or room < 1:
                return key.normal(slots, shape)
            names = [*missing, *further[:room]]
            for name in names:
                self._coming.pop(name, None)
            drawn = normals([NoiseKey(key.seed, *name) for name in names], shape)
            self._rows.update(zip(names, drawn, strict=True))
        return torch.stack([self._rows.pop(name) for name in wanted])


def _normal(words: np.ndarray, width: int) -> Tensor:
    """Normal numbers of Philox output held as float64, which is used up."""
    words += 0.5
    words *= 2.0**-32
    return from_uniform(torch.from_numpy(words), width)


def _philox_rows(
    out: np.ndarray,
    slots: Sequence[int],
    k0: int | np.ndarray,
    k1: int | np.ndarray,
    kind: int,
) -> None:
    """Philox output, a row per slot, into [n, blocks, 4]; one key for all rows or one each."""
    low, high = [k & _MASK for k in slots], [k >> 32 & _MASK for k in slots]
    even, odd = (np.empty((2, *out.shape[:2]), np.uint32) for _ in range(2))
    even[0], even[1] = np.arange(out.shape[1], dtype=np.uint32), kind
    odd[0] = np.array(low, np.uint32)[:, None]
    odd[1] = np.array(high, np.uint32)[:, None]
    _rounds(even, odd, k0, k1)
    out[..., 0], out[..., 1], out[..., 2], out[..., 3] = even[0], odd[0], even[1], odd[1]


def _philox_numpy(
    c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, k0: int, k1: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`steering.kernels.philox.philox` on uint32 counters on the CPU, in half the time."""
    even, odd = np.stack([c0, c2]), np.stack([c1, c3])
    _rounds(even, odd, k0, k1)
    return even[0], odd[0], even[1], odd[1]


def _rounds(even: np.ndarray, odd: np.ndarray, k0: int | np.ndarray, k1: int | np.ndarray) -> None:
    """Ten rounds in place, on counters (c0, c2) and (c1, c3): [2, ...] uint32 each.

    Small arrays cost by the call, not by size, so the halves of a round share their calls. Keys
    are numbers, or [n] uint32 for counters [2, n, ...].
    """
    column = (2, *[1] * (even.ndim - 1))
    multipliers = np.array(_MULTIPLIERS, np.uint64).reshape(column)
    product = np.empty(even.shape, np.uint64)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    halves = product.view(np.uint32).reshape(*even.shape, 2)
    lows, highs = halves[::-1, ..., low], halves[::-1, ..., high]
    if isinstance(k0, int):
        keys = [((k0 + r * _WEYL[0]) & _MASK, (k1 + r * _WEYL[1]) & _MASK) for r in range(10)]
        schedule = np.array(keys, np.uint32).reshape(10, *column)
    else:
        steps = np.array([[r * w & _MASK for w in _WEYL] for r in range(10)], np.uint32)
        rows = (10, 2, len(k0), *[1] * (even.ndim - 2))
        schedule = (np.stack([k0, k1]) + steps[..., None]).reshape(rows)  # wraps at 2**32
    for key in schedule:
        np.multiply(even, multipliers, out=product)
        np.bitwise_xor(highs, odd, out=even)
        even ^= key
        odd[...] = lows


def categorical(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn by inverting the cumulative sum; an index of probability 0 is never drawn.

    Args:
        probabilities: [..., K], not negative, any positive sum; broadcast against ``uniform``.
        uniform: numbers in (0, 1), [...].
    """
    total = probabilities.cumsum(-1)
    below = total < (uniform * total[..., -1])[..., None]
    return below.sum(-1)


# --- moves in noise space -------------------------------------------------------------------


def blend(x: Tensor, z: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) x + beta z: keeps N(0, I) and lets the norm move.

    Preconditioned Crank-Nicolson (Cotter et al. 2013); EvoSearch's first level (2025).
    """
    return math.sqrt(1.0 - beta * beta) * x + beta * z


def sphere_neighbour(x: Tensor, z: Tensor, cosine: float) -> Tensor:
    """A point at the given cosine from each row of ``x``, at the same norm (Ma et al. 2025).

    Keeps N(0, I) over random ``x``, but stays on the sphere of each ``x``.

    Raises:
        OptionError: a state of one number has no neighbours on its sphere.
    """
    if math.prod(x.shape[1:]) < 2:
        raise OptionError(f"Sphere neighbours need at least two dimensions, got {x.shape[1:]}.")
    flat, other = x.flatten(1).double(), z.flatten(1).double()
    norm = flat.norm(dim=1, keepdim=True)
    u = flat / norm
    w = other - (other * u).sum(1, keepdim=True) * u
    w = w / w.norm(dim=1, keepdim=True)
    moved = norm * (cosine * u + math.sqrt(1.0 - cosine * cosine) * w)
    return moved.reshape(x.shape).to(x.dtype)


def crossover(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Takes each coordinate from ``a`` where ``mask`` else from ``b``: keeps N(0, I) for
    independent parents."""
    return torch.where(mask, a, b)


def eps_blend(
    x0: Tensor, eps: Tensor, z: Tensor, alpha: float, sigma: float, beta: float
) -> Tensor:
    """Keeps the clean estimate and refreshes part of the noise: alpha x0 + sigma blend(eps, z).

    Approximately keeps the marginal at this noise level; exact for beta = 0.
    """
    return alpha * x0 + sigma * blend(eps, z, beta)

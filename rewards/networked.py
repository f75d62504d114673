"""What every reward with a network shares: where it lives, how much it takes at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steering.errors import OptionError, WeightsError
from steering.rewards.base import Reward
from steering.rewards.checkpoints import dtype_of, read_weights
from steering.rewards.images import device_name
from steering.rewards.memory import in_batches
from steering.scoring import Scores
from steering.turns import TURN, in_turn


class Net(Protocol):
    """A loaded network: its module, and the device where it computes."""

    @property
    def model(self) -> Any: ...  # noqa: ANN401

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, kw_only=True)
class Networked(Reward):
    """Base of rewards with a network: micro-batches, device, precision, offload.

    A subclass writes ``_load(where)``, which returns its `Net` from a cache (`checkpoints.kept`),
    and ``_values``.

    Attributes:
        precision: "fp32", "bf16" or "fp16", for the network; values are float32.
        device: where the network computes; None follows the images.
        batch_size: images taken at once; halved for a call whose memory runs out.
        offload: keep the network on the CPU between calls. A call that needs a gradient leaves it
            where it computed, as the backward pass is still to come.

    Raises:
        OptionError: an option that cannot be used, at once.
        WeightsError: weights that cannot be found or read, before a run or at the first call.
        RewardMemoryError: a single image does not fit into memory.
    """

    precision: str = "fp32"
    device: str | None = None
    batch_size: int = 32
    offload: bool = False

    def __post_init__(self) -> None:
        dtype_of(self.precision, self.name)
        if self.batch_size < 1:
            raise OptionError(f"{self.name}(batch_size={self.batch_size}): give 1 or more.")

    def for_model(self, model: Any) -> Any:  # noqa: ANN401
        """This reward, with its weights loaded before any image is made."""
        net = self._ready(getattr(model, "device", "cpu"))
        if self.offload:
            put_away(net)
        return self

    def score(
        self, images: Tensor, prompts: Sequence[Any], metadata: Sequence[Any] | None
    ) -> Tensor | Scores:
        """Values [n] on the images' device, from micro-batches."""
        net = self._ready(images.device)

        def values(rows: slice) -> Tensor:
            return self._values(net, images[rows].to(net.device), prompts[rows])

        with at_work(net, offload=self.offload and not needs_gradient(images)):
            parts = in_batches(values, len(images), self.batch_size, self.name)
        return torch.cat(parts).float().to(images.device)

    def _ready(self, device: torch.device | str) -> Any:  # noqa: ANN401
        with TURN, torch.inference_mode(False):  # parameters kept for a backward pass later
            return self._load(device_name(self.device or device))

    def _load(self, where: str) -> Net:
        raise NotImplementedError

    def _values(self, net: Any, images: Tensor, prompts: Sequence[Any]) -> Tensor:  # noqa: ANN401
        raise NotImplementedError


def needs_gradient(images: Tensor) -> bool:
    """Whether a backward pass through this call may follow."""
    return torch.is_grad_enabled() and images.requires_grad


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A module and the device where it computes, as a `Net`."""

    model: Any
    device: torch.device


@contextmanager
def at_work(net: Net, *, offload: bool) -> Iterator[None]:
    """The network on its device, and back on the CPU afterwards where asked; one thread at a
    time, so that none takes it from under another."""
    with in_turn():
        if not is_at(net.model, net.device):
            net.model.to(net.device)
        try:
            yield
        finally:
            if offload:
                put_away(net)


def put_away(net: Net) -> None:
    """The network goes to the CPU, once nobody works with it."""
    with TURN:
        net.model.to("cpu")


def is_at(module: torch.nn.Module, device: torch.device) -> bool:
    """Whether all of a module is there already.

    Asked before every call: ``to`` is slower to find that out, and ``parameters()``, which gathers
    names and shared tensors, takes five times as long as this walk.
    """
    own = itertools.chain(module._parameters.values(), module._buffers.values())
    here = all(tensor is None or tensor.device == device for tensor in own)
    parts = module._modules.values()
    return here and all(part is None or is_at(part, device) for part in parts)


def as_features(found: Any) -> Tensor:  # noqa: ANN401
    """The projected embedding: transformers 4 returned the tensor, 5 an output that holds it."""
    return found if isinstance(found, Tensor) else found.pooler_output


class Pooled(torch.nn.Module):
    """A transformers image tower, asked as open_clip's are: its pooled output is the embedding."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def encode_image(self, pixels: Tensor) -> Tensor:
        return as_features(self.net(pixel_values=pixels))


def no_text(texts: list[str]) -> Tensor:
    """Stands where a tokenizer would, for towers that read pictures only."""
    raise NotImplementedError("this tower reads no text")


def find_file(source: str, name: str, reward: str, option: str = "model") -> Path:
    """A weights file: given itself, in a folder, or on the hub.

    Args:
        source: the file, a folder that holds ``name``, or a hub id.
        name: of the file in the folder or the repository.
        reward, option: for messages.

    Raises:
        WeightsError: it is not there; says which file, where from, and how to place it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / name).is_file():
        return path / name
    way_out = (
        f"Fetch {name} elsewhere (hf download HUB_ID {name} --local-dir FOLDER) and give "
        f"{reward}({option}=FOLDER), or the file itself."
    )
    if path.is_dir():
        raise WeightsError(f"{reward}: {path} holds no {name}. {way_out}")
    is_file = path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_file or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise WeightsError(
            f"{reward}: there is no file or folder {source!r} (looked in {Path.cwd()} where it is "
            f"relative). {way_out}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{reward}: {name} of the Hugging Face repository {source!r} is not in the cache and "
            f"could not be fetched ({type(error).__name__}: {reason}). "
            f"{way_out.replace('HUB_ID', source)}"
        ) from error


def read_state(path: Path, reward: str) -> dict[str, Tensor]:
    """The state dict in a weights file, without the wrapping that trainers put around it.

    Raises:
        WeightsError: it cannot be read without running code, or holds something else.
    """
    try:
        found: Any = read_weights(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{reward}: {path} cannot be read as weights ({type(error).__name__}: {reason})."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values())
    if not tensors or not found:
        raise WeightsError(f"{reward}: {path} holds no state dict of tensors.")
    return found


def fill(module: torch.nn.Module, state: dict[str, Tensor], path: Path, reward: str) -> None:
    """Loads a state dict that must fit exactly; a module without storage takes its tensors over.

    Raises:
        WeightsError: keys or shapes do not fit; a layer left at random gives plausible nonsense.
    """
    try:
        empty = any(parameter.is_meta for parameter in module.parameters())
        module.load_state_dict(state, strict=True, assign=empty)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise WeightsError(f"{reward}: {path} is of another model: {reason}") from error

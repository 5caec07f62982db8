"""Networks trained beforehand, for tasks that fine-tune them: made once per machine and kept in the user's cache."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .base import Task, Tensors, one_thread

_CHECKSUM = "checksum"


@dataclass(frozen=True)
class Recipe:
    """How a network is pre-trained: ``make_task().length`` steps of AdamW with cosine decay.

    Attributes:
        name: unique; the file in the cache begins with it.
        make_task: the task to train on. A function of a module that, with those of ``tasks/``, determines it: when
            their source changes the network is made again.
        seed: of initial parameters (``seed``) and batches (``seed + 1``).
        lr: highest learning rate.
    """

    name: str
    make_task: Callable[[], Task]
    seed: int = 0
    lr: float = 3e-3


@functools.cache
def pretrained_state(recipe: Recipe) -> Tensors:
    """Parameters and buffers of the trained network under their names in ``state_dict``; not to be changed.

    The first call on a machine trains, on one thread and whatever the global random state, which is left as it was.
    Later ones read ``learned_optim/pretrained`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; a damaged file is replaced.
    Where nothing can be written there the network is kept for this process only, with a warning.

    Raises:
        RuntimeError: the training diverged.
    """
    task = recipe.make_task()
    path = cache_folder() / f"{recipe.name}-{_key(recipe)}.safetensors"
    state = _stored(path, task)
    if state is None:
        state = _train(task, recipe)
        try:
            _store(path, state)
        except OSError as error:
            warnings.warn(
                f"pre-trained networks cannot be kept in {path.parent} ({error}): every process will train them "
                "again; point XDG_CACHE_HOME at a folder that can be written",
                stacklevel=2,
            )
    return state


def cache_folder() -> Path:
    """Where pre-trained networks are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "learned_optim" / "pretrained"


def _train(task: Task, recipe: Recipe) -> Tensors:
    with one_thread(), torch.enable_grad():
        params, buffers = task.init(torch.Generator().manual_seed(recipe.seed))
        leaves = [p.requires_grad_() for p in params.values()]
        optimizer = torch.optim.AdamW(leaves, lr=recipe.lr, foreach=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.length)
        batches = task.batches(torch.Generator().manual_seed(recipe.seed + 1))
        for _ in range(task.length):
            loss = task.loss(params, buffers, next(batches))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    state = {k: t.detach() for k, t in (params | buffers).items()}
    if not all(bool(t.isfinite().all()) for t in state.values()):
        raise RuntimeError(f"pre-training of {recipe.name!r} diverged at lr {recipe.lr}; lower the recipe's lr")
    return state


def _key(recipe: Recipe) -> str:
    """Equal if and only if the network is, bit for bit: of recipe, source, Python (whose text is data) and machine."""
    family = Path(str(sys.modules[recipe.make_task.__module__].__file__))
    sources = [path.read_text(encoding="utf-8") for path in [*sorted(Path(__file__).parent.glob("*.py")), family]]
    machine = platform.machine(), torch.backends.cpu.get_cpu_capability(), str(torch.get_default_dtype())
    parts = [recipe.name, str(recipe.seed), str(recipe.lr), sys.version, torch.__version__, *machine, *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _store(path: Path, state: Tensors) -> None:
    """Replaces the file as a whole, so that processes may share the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(save({k: t.contiguous() for k, t in state.items()} | {_CHECKSUM: _checksum(state)}))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _stored(path: Path, task: Task) -> Tensors | None:
    """The state in a file, or ``None`` if there is none or it is damaged."""
    try:
        state = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    params, buffers = task.init(torch.Generator().manual_seed(0))
    shapes = {k: (t.shape, t.dtype) for k, t in (params | buffers).items()}
    checksum = state.pop(_CHECKSUM, None)
    whole = {k: (t.shape, t.dtype) for k, t in state.items()} == shapes
    return state if whole and checksum is not None and torch.equal(checksum, _checksum(state)) else None


def _checksum(state: Tensors) -> Tensor:
    """Safetensors notices a damaged header, but not a damaged tensor."""
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].detach().contiguous().numpy().tobytes(), crc)
    return torch.tensor(crc)


def without_head(network: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Takes the last linear layer out of a network, in place: ``(body, head)``.

    Raises:
        ValueError: the network has no linear layer.
    """
    linear = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"a {type(network).__name__} without a linear layer has no head to take off")
    path, head = linear[-1]
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network, head


class LowRank(nn.Module):
    """A frozen layer plus ``up(down(x))``, of which only these two are trained (Hu et al. 2021, "LoRA").

    Args:
        frozen: linear or convolutional; ``down`` has its geometry with ``rank`` outputs, ``up`` begins at zero.
        rank: of the correction.
        scale: factor of the correction, ``alpha / rank`` in the paper.
    """

    def __init__(self, frozen: nn.Linear | nn.Conv2d, rank: int, scale: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scale = scale
        if isinstance(frozen, nn.Linear):
            self.down: nn.Module = nn.Linear(frozen.in_features, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, frozen.out_features, bias=False)
        else:
            size, stride, padding = frozen.kernel_size, frozen.stride, frozen.padding
            self.down = nn.Conv2d(frozen.in_channels, rank, size, stride, padding, bias=False)  # pyright: ignore
            self.up = nn.Conv2d(rank, frozen.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.up(self.down(x))


TUNED = ("all", "head", "upper", "low_rank")


def freeze(body: nn.Module, tuned: str, *, share: float = 0.5, rank: int = 4, scale: float = 1.0) -> nn.Module:
    """Freezes a part of a pre-trained network in place, and returns it.

    Args:
        body: the network without its head, which is always trained.
        tuned: ``"all"`` of it; nothing (``"head"``); the ``"upper"`` layers; or ``"low_rank"`` corrections beside
            the matrices and filters, all else frozen.
        share: of the layers that are frozen, from the input on, where the upper ones are tuned.
        rank: of the corrections.
        scale: factor of the corrections.

    Raises:
        ValueError: ``tuned`` is none of ``TUNED``.
    """
    if tuned not in TUNED:
        raise ValueError(f"tuned must be one of {', '.join(TUNED)}, got {tuned!r}")
    if tuned == "all":
        return body
    owners = [m for m in body.modules() if m._parameters]
    frozen = owners[: math.ceil(share * len(owners))] if tuned == "upper" else owners
    for module in frozen:
        for p in module._parameters.values():
            if p is not None:
                p.requires_grad_(False)
    if tuned == "low_rank":
        layers = [(path, m) for path, m in body.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for path, layer in layers:
            parent, _, name = path.rpartition(".")
            setattr(body.get_submodule(parent), name, LowRank(layer, rank, scale))
    return body

"""Several processes: each computes its slots of the meta-batch, all then make the same outer step.

Started by ``torchrun --nproc-per-node N -m learned_optim meta-train ...``; in one process every call is trivial.
Results are gathered in the order of the slots, so that the sum does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[None]:
    """A gloo process group for the body, if torchrun has started this process and none is there yet."""
    begin = "WORLD_SIZE" in os.environ and dist.is_available() and not dist.is_initialized()
    if begin:
        _init_process_group()
    try:
        yield
    finally:
        if begin:
            dist.destroy_process_group()


def _init_process_group() -> None:
    """A gloo group of torchrun's processes, which finds no addresses of those that it has restarted.

    torchrun keeps one store over its restarts, and torch looks addresses up in it under the same names each time: a
    process that is quicker than its neighbour would connect to the neighbour's dead predecessor. The count of restarts
    keeps the attempts apart; on several nodes it may differ from node to node, and torch's own way is taken.
    """
    environ = os.environ
    if "TORCHELASTIC_RESTART_COUNT" not in environ or environ.get("LOCAL_WORLD_SIZE") != environ["WORLD_SIZE"]:
        dist.init_process_group("gloo")
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(rendezvous("env://"))
    attempt = PrefixStore(f"attempt_{environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=attempt, rank=number, world_size=size)


def rank() -> int:
    """This process's number; 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mine(count: int) -> range:
    """The numbers below ``count`` that this process works on."""
    return range(rank(), count, world_size())


def gather(values: list[Any]) -> list[Any]:
    """Everyone's values in everyone's hands; the order is that of the processes."""
    if world_size() == 1:
        return values
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def from_first(value: Any) -> Any:
    """Process 0's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]

"""Parameters that are spread over processes: DTensors, as FSDP2 and tensor parallelism make them.

The update works on the local shards; what a tensor's shards must know of each other are seven sums per tensor, which
one all-reduce adds up for all tensors of a step. Where updates are orthogonalised, there is one more for the
matrices that are cut (:mod:`learned_optim.engine.cut_matrices`). A matrix that lies in one process, as those of a stack
do that is cut along the stack, is orthogonalised there. Replicated tensors need no sums: every process has all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.kinds import Part, TensorKind, real_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


#: Dimensions along which processes have cut a tensor, and how long the pieces of its parameter are there; empty where
#: that is not known.
Cuts = tuple[tuple[int, int], ...]


class Sharded(NamedTuple):
    """A tensor of which processes hold parts."""

    part: Part
    dtype: torch.dtype  #: of the arithmetic
    cut: Cuts | None  #: ``None`` where one process has all of it


class Shards(NamedTuple):
    """The tensors that are spread in the same way."""

    mesh: DeviceMesh
    dims: tuple[int, ...]  #: of the mesh, over which the parameters are cut
    tensors: dict[tuple[int, int, int], Sharded]  #: by group, position in it, and number in the parameter; in order
    device: torch.device

    def add_up(self, sums: Tensor) -> None:
        """Add what the other processes have, in place; all processes of the mesh must call it."""
        for dim in self.dims:
            torch.distributed.all_reduce(sums, group=self.mesh.get_group(dim))


def find_shards(groups: Iterable[dict[str, Any]]) -> list[Shards]:
    """All parameters of which this process holds a part, with or without a gradient.

    Every process then adds up the same number of sums, also where some of them have no gradient or an empty shard.
    """
    by_mesh: dict[tuple, Shards] = {}
    spread = [((g, i), p, of) for g, of in enumerate(groups) for i, p in enumerate(of["params"]) if is_dtensor(p)]
    for place, p, group in spread:
        if any(placement.is_partial() for placement in p.placements):
            raise RuntimeError(f"a parameter cannot be updated that is placed as {p.placements}: redistribute it first")
        mesh = p.device_mesh
        dims = tuple(i for i, s in enumerate(p.placements) if not s.is_replicate() and mesh.size(i) > 1)
        if dims:
            shards = by_mesh.setdefault((mesh, dims), Shards(mesh, dims, {}, local(p).device))
            dtype = torch.promote_types(local(p).dtype.to_real(), torch.float32)
            for k, part in enumerate(TensorKind.of(group).parts(p)):
                shards.tensors[(*place, k)] = Sharded(part, dtype, cuts_of(part, p))
    return list(by_mesh.values())


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is spread over processes, or replicated by them."""
    if type(tensor) in (torch.nn.Parameter, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # a second to import: where nobody has, there are none
    return module is not None and isinstance(tensor, module.DTensor)


def offset_of(p: Tensor) -> tuple[int, ...]:
    """Where the piece that is here begins in the whole parameter, by dimension, seen as real numbers."""
    if not is_dtensor(p) or p.ndim == 0:
        return (0,) * len(real_shape(p))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # pyright: ignore
    return (*offset, *[0] * p.is_complex())


def cuts_of(part: Part, p: Tensor) -> Cuts | None:
    """Where a part of a DTensor is cut, so that no process sees all of it; the same answer in all of them."""
    if not is_dtensor(p) or 0 in part.lengths:
        return None
    from torch.distributed.tensor import Shard

    mesh = p.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    chunks: dict[int, int] = {}
    for i, placement in enumerate(p.placements):  # pyright: ignore[reportAttributeAccessIssue]
        if placement.is_replicate() or mesh.size(i) == 1:
            continue
        if type(placement) is not Shard or placement.dim in chunks:
            return ()
        chunks[placement.dim] = -(-p.shape[placement.dim] // mesh.size(i))
    ends = {dim: (part.start[dim], part.start[dim] + part.lengths[dim] - 1) for dim in chunks}
    cuts = tuple((dim, n) for dim, n in chunks.items() if ends[dim][0] // n != ends[dim][1] // n)
    return cuts or None


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here; any other tensor as it is."""
    # Not to_local(), which wraps a parameter's shard anew at every call: views of it are kept from step to step.
    if not is_dtensor(tensor):
        return tensor
    shard: Any = tensor._local_tensor  # pyright: ignore[reportAttributeAccessIssue]
    wait = getattr(shard, "wait", None)  # of what is still being communicated
    return shard if wait is None else wait()


def gradient_as(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient, cut like its parameter.

    Raises:
        RuntimeError: one of the two is a DTensor and the other is not.
    """
    if not is_dtensor(p) and not is_dtensor(grad):
        return grad
    placed, wanted = getattr(grad, "placements", None), getattr(p, "placements", None)
    if placed == wanted:
        return grad
    if placed is None or wanted is None:
        kinds = type(p).__name__, type(grad).__name__
        raise RuntimeError(f"a parameter of type {kinds[0]} has a gradient of type {kinds[1]}: both must be DTensors")
    return grad.redistribute(placements=wanted)  # pyright: ignore[reportAttributeAccessIssue]

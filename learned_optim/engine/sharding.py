"""Parameters that are spread over processes: DTensors, as FSDP2 and tensor parallelism make them.

The update works on the local shards; what a tensor's shards must know of each other are seven sums per tensor, which
one all-reduce adds up for all tensors of a step. Where updates are orthogonalised, one more for each matrix brings the
whole update to every process, and each orthogonalises all of it. Replicated tensors need none: every process has all
of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Shards(NamedTuple):
    """The parameters that are spread in the same way."""

    mesh: DeviceMesh
    dims: tuple[int, ...]  #: of the mesh, over which the parameters are cut
    shapes: dict[tuple[int, int], torch.Size]  #: by group and position in it, of the whole parameters; in order
    dtypes: dict[tuple[int, int], torch.dtype]  #: of the arithmetic
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
    spread = [((g, i), p) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if is_dtensor(p)]
    for index, p in spread:
        if any(placement.is_partial() for placement in p.placements):
            raise RuntimeError(f"a parameter cannot be updated that is placed as {p.placements}: redistribute it first")
        mesh = p.device_mesh
        dims = tuple(i for i, s in enumerate(p.placements) if not s.is_replicate() and mesh.size(i) > 1)
        if dims:
            shards = by_mesh.setdefault((mesh, dims), Shards(mesh, dims, {}, {}, local(p).device))
            shards.shapes[index] = real_shape(p)
            shards.dtypes[index] = torch.promote_types(local(p).dtype.to_real(), torch.float32)
    return list(by_mesh.values())


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is spread over processes, or replicated by them."""
    if type(tensor) in (torch.nn.Parameter, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # a second to import: where nobody has, there are none
    return module is not None and isinstance(tensor, module.DTensor)


def real_shape(p: Tensor) -> torch.Size:
    """The shape of a parameter seen as real numbers."""
    return torch.Size((*p.shape, 2)) if p.is_complex() else p.shape


def origin(p: Tensor) -> tuple[int, int]:
    """Row and column of the whole parameter at which the part begins that is here; columns are all but dimension 0.

    Raises:
        RuntimeError: a parameter that is cut along its third dimension or a later one.
    """
    if not is_dtensor(p) or p.ndim == 0:
        return 0, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # pyright: ignore
    if shape[2:] != tuple(p.shape[2:]):
        raise RuntimeError(f"a parameter of shape {tuple(p.shape)} was cut along a later dimension than 0 and 1")
    if 0 in shape:
        return 0, 0
    return offset[0], 0 if p.ndim == 1 else offset[1] * math.prod(real_shape(p)[2:])


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

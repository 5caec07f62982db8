"""The rule run by plain torch operations.

Everything here is bookkeeping: which coordinates are shown to the rule together. Results do not depend on it: a
tensor's update is bit-identical whatever other tensors are in its group, and in what order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from learned_optim.engine.head import TensorHead
from learned_optim.engine.packing import bins, copy_all, limit, packing
from learned_optim.engine.param_state import FlatViews, ParamState
from learned_optim.engine.step import Bucket
from learned_optim.rule import update
from learned_optim.rule.layouts import Segments, Whole
from learned_optim.rule.stochastic_rounding import rounded_state
from learned_optim.rule.types import Coefficients, CoordinateState, TensorSums

#: Tensors up to this many coordinates are run side by side, in vectors of up to this many coordinates. Below torch's
#: grain size for threads, so that no thread boundary can fall differently when tensors are grouped differently.
SMALL = 1 << 15
#: Larger tensors are run in chunks of this many coordinates: temporaries stay in the cache, 256 KB each.
CHUNK = 1 << 16
#: Padding of small tensors: a multiple of every SIMD vector's length.
ALIGN = 64


@lru_cache(maxsize=1024)
def _whole(shape: torch.Size, device: torch.device) -> Whole:
    return Whole(shape, device)


@lru_cache(maxsize=256)
def _segments(shapes: tuple[torch.Size, ...], device: torch.device) -> Segments:
    return Segments(shapes, align=ALIGN, device=device)


class EagerBackend:
    """Plain torch operations: small tensors side by side, large ones in chunks. Needs no compiler.

    Args:
        head: the policy's, with configuration and weights.
    """

    name = "eager"

    def __init__(self, head: TensorHead) -> None:
        self.head, self.settings = head, head.config.orthogonalization
        self.weights = {name: self.head.weights[name].tolist() for name in head.config.coordinate_weights()}

    def prepare(self, params: list[ParamState]) -> None:
        pass

    def before_capture(self, params: list[ParamState]) -> None:
        pass

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        small: dict[tuple, list[ParamState]] = {}
        for p in params:
            as_matrix = self.settings.matrix_shape(p.shape, p.role) is not None
            if p.numel > limit(SMALL, p.format.device):
                yield _Large(self, p, as_matrix)
            elif p.numel > 0:
                small.setdefault((p.context, p.format, as_matrix), []).append(p)
        for (_, form, as_matrices), alike in small.items():
            for some in bins(alike, lambda p: -(-p.numel // ALIGN) * ALIGN, limit(SMALL, form.device)):
                yield _SideBySide(self, some, as_matrices)

    def spread(self, bucket: _Large | _SideBySide, stacked: Tensor) -> Coefficients:
        """Stacked coefficients [C, K], over the bucket's coordinates."""
        return update.spread_coefficients(self.head.config, bucket.layout, stacked, bucket.dtype)

    def apply(
        self, bucket: _Large | _SideBySide, coeff: Coefficients, param: Tensor, grad: Tensor, state: CoordinateState
    ) -> tuple[Tensor, CoordinateState]:
        """Directions where matrices are to be orthogonalised, else new parameters; and the state as it is kept."""
        scalars = bucket.params[0].context.scalars
        d, state = update.apply(self.weights, self.head.config, coeff, param, grad, state, scalars)
        moved = d if bucket.as_matrices else update.move(param, d, scalars, coeff.decay)
        return moved, rounded_state(state, bucket.params[0].format.state)


class _Large:
    """One tensor, in chunks."""

    def __init__(self, backend: EagerBackend, param: ParamState, as_matrix: bool) -> None:
        self.backend, self.params, self.as_matrices = backend, [param], as_matrix
        self.dtype = param.arithmetic
        self.layout = _whole(param.param.shape, param.param.device)
        self.flat = FlatViews(param, as_matrix)
        self.copied = param.numel if self.flat.copied else 0
        self.chunk = limit(CHUNK, param.param.device)

    def measure(self) -> TensorSums:
        scalars = self.params[0].context.scalars
        parts = [update.measure(self.layout, *self._inputs(chunk), scalars) for chunk in self._chunks()]
        return TensorSums(*(torch.stack(s).double().sum(0) for s in zip(*parts, strict=True)))

    def apply(self, coefficients: Tensor) -> list[Tensor]:
        coeff = self.backend.spread(self, coefficients)
        first = self.flat.vectors[0]
        written = torch.empty_like(first, dtype=self.dtype) if self.as_matrices else first
        for chunk, target in zip(self._chunks(), written.split(self.chunk), strict=True):
            moved, state = self.backend.apply(self, coeff, *self._inputs(chunk))
            copy_all([target, *chunk[2:]], [moved, *state.tensors])
        self.flat.write_back()
        return [written] if self.as_matrices else []

    def _chunks(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(t.split(self.chunk) for t in self.flat.vectors), strict=True)

    def _inputs(self, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, CoordinateState]:
        param, grad, *state = (t.to(self.dtype) for t in chunk)
        return param, grad, CoordinateState.of(state)


class _SideBySide:
    """Small tensors of the same dtype, device and step, side by side in one vector."""

    def __init__(self, backend: EagerBackend, params: list[ParamState], as_matrices: bool) -> None:
        self.backend, self.params, self.as_matrices = backend, params, as_matrices
        device, self.dtype = params[0].format.device, params[0].arithmetic
        self.layout = _segments(tuple([p.param.shape for p in params]), device)
        self.copied = sum(self.layout.sizes)
        self.packing = packing(tuple([p.numel for p in params]), ALIGN, device)
        self.vectors = [_vectors(p) for p in params]
        columns = list(zip(*(one.vectors for one in self.vectors), strict=True))
        param, grad, *state = self.packing.pack(columns, [self.dtype] * len(columns))
        self.inputs = param, grad, CoordinateState.of(state)

    def measure(self) -> TensorSums:
        sums = update.measure(self.layout, *self.inputs, self.params[0].context.scalars)
        return TensorSums(*(s.double() for s in sums))

    def apply(self, coefficients: Tensor) -> list[Tensor]:
        coeff = self.backend.spread(self, coefficients)
        moved, state = self.backend.apply(self, coeff, *self.inputs)
        written, _, *old_state = zip(*(one.vectors for one in self.vectors), strict=True)
        if self.as_matrices:
            written = [torch.empty_like(vector, dtype=self.dtype) for vector in written]
        self.packing.write([written, *old_state], [moved, *state.tensors])
        for one in self.vectors:
            if one.flat is not None:
                one.flat.write_back()
        return list(written) if self.as_matrices else []


class _Vectors:
    """A small parameter's tensors as vectors, in the order of their indices; cached where they need no copies."""

    def __init__(self, param: ParamState) -> None:
        flat = FlatViews(param, in_order=True)
        self.flat, self.vectors = flat if flat.copied else None, flat.vectors

    def release_grad(self) -> None:
        self.vectors[1] = self.vectors[0]


def _vectors(param: ParamState) -> _Vectors:
    views = param.cached_views
    if isinstance(views, _Vectors):
        views.vectors[1] = param.grad.reshape(-1)
        return views
    views = _Vectors(param)
    param.cached_views = None if views.flat else views
    return views

"""The rule run by kernels that torch.compile makes, for GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from learned_optim.engine.head import TensorHead, head_pass
from learned_optim.engine.kernels import WIDTH, Kernels, Kind, compiled_head, flat_weights, kernels
from learned_optim.engine.packing import COPIED, Packing, bins, limit, packing, to_device
from learned_optim.engine.param_state import FlatViews, Format, ParamState, arithmetic_dtype, format_of, piece_of
from learned_optim.engine.products import directions_dtype
from learned_optim.engine.step import Bucket
from learned_optim.rule.types import TensorSums

#: Tensors of fewer rows than this are copied as a whole, on CPUs (kernels take two rows or more) and on GPUs, where the
#: launches of one tensor take as long as copying a million coordinates.
IN_PLACE, IN_PLACE_ON_GPU = 2, 2048
#: Bytes, a multiple of which kernels on GPUs take addresses for.
ALIGNMENT = 16


class CompiledBackend:
    """Two kernels per tensor, straight on its memory; what does not fill a row is copied into rows side by side.

    Args:
        head: the policy's, with configuration and weights.
    """

    name = "compiled"

    def __init__(self, head: TensorHead) -> None:
        self.head, self.settings = head, head.config.orthogonalization
        self._weights: dict[tuple, Tensor] = {}
        self._kernels: dict[Format, Kernels] = {}

    def prepare(self, params: list[ParamState]) -> None:
        pass

    def load(self, form: Format) -> Kernels:
        """Those for tensors like these."""
        if form not in self._kernels:
            kind = Kind(self.head.config, str(form.device), (form.param, form.grad, *form.state))
            self._kernels[form] = kernels(kind)
            if form.device.type != "cpu":  # where each small operation is a launch
                self.head.compiled[form.device] = compiled_head(head_pass)
        return self._kernels[form]

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        kinds: dict[tuple[Format, bool], list[ParamState]] = {}
        for p in params:
            if p.numel > 0:
                as_matrix = self.settings.matrix_shape(p.shape, p.role) is not None
                form = p.format
                if as_matrix:
                    directions = directions_dtype(arithmetic_dtype(form.param), form.device)
                    form = format_of(form.device, directions, form.grad, form.state)
                kinds.setdefault((form, as_matrix), []).append(p)
        for (form, as_matrix), alike in kinds.items():
            all_views = (self.views(p, as_matrix) for p in alike)
            for some in bins(all_views, lambda views: views.size, limit(COPIED, form.device)):
                yield _Rows(self, form, some)

    def views(self, param: ParamState, as_matrix: bool) -> _Views:
        """Views of the parameter's tensors; those of the last step, where all is as it was but for the gradient."""
        views = param.cached_views
        if not isinstance(views, _Views) or not views.set_grad(param.grad):
            views = _Views(param, as_matrix)
            param.cached_views = None if views.copied else views
        return views

    def weights(self, like: Tensor) -> Tensor:
        """The cell's weights as the kernels take them, with dtype and device of ``like``."""
        key = (like.dtype, like.device)
        if key not in self._weights:
            self._weights[key] = flat_weights(self.head.config, self.head.weights, like)
        return self._weights[key]


class _Views:
    """A parameter's tensors as the rows that the kernels run over in place, and the rest that is copied."""

    def __init__(self, param: ParamState, as_matrix: bool) -> None:
        flat = FlatViews(param, in_order=as_matrix)
        self.param, self.as_matrix, self.copied = param, as_matrix, flat if flat.copied else None
        aligned = _aligned(flat.tensors)
        self.split = rows, rest = _split(param.numel, param.format.device) if aligned else (0, param.numel)
        self.in_place = flat.piece(0, rows, WIDTH) if rows else []
        self.tail = flat.piece(rows * WIDTH, rest) if rest else []
        self.size = max(param.numel if flat.copied or as_matrix else 0, -(-rest // WIDTH) * WIDTH)  #: that is copied
        self._strides = param.grad.stride()

    def set_grad(self, grad: Tensor) -> bool:
        """A new gradient, if it has the strides of the old one."""
        if grad.stride() != self._strides:
            return False
        rows, rest = self.split
        if rows:
            self.in_place[1] = piece_of(grad, 0, rows, WIDTH)
        if rest:
            self.tail[1] = piece_of(grad, rows * WIDTH, rest)
        return True

    def vector(self) -> Tensor:
        """The parameter, as the views see it."""
        return piece_of((self.in_place or self.tail)[0], 0, self.param.numel)

    def writing_to(self, target: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """``in_place`` and ``tail``; with a vector, if there is one, for the parameter."""
        if target is None:
            return self.in_place, self.tail
        rows, rest = self.split
        in_place = [piece_of(target, 0, rows, WIDTH), *self.in_place[1:]] if rows else []
        return in_place, [piece_of(target, rows * WIDTH, rest), *self.tail[1:]] if rest else []

    def release_grad(self) -> None:
        for views in (self.in_place, self.tail):
            if views:
                views[1] = views[0]


def _split(numel: int, device: torch.device) -> tuple[int, int]:
    """Rows that are used where they lie, and coordinates that are copied."""
    rows = numel // WIDTH
    fewest = IN_PLACE if device.type == "cpu" else IN_PLACE_ON_GPU
    return (rows, numel - rows * WIDTH) if rows >= fewest else (0, numel)


def _aligned(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels may be run on their memory: not on pieces of a parameter that begin just anywhere."""
    return all(t.storage_offset() * t.element_size() % ALIGNMENT == 0 for t in tensors)


class _Plan:
    """Which rows belong to which tensor: first the rows of each tensor in place, then the copied ones.

    Args:
        split: rows in place, and coordinates to be copied, of each tensor.
    """

    def __init__(self, split: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.in_place = [k for k, (rows, _) in enumerate(split) if rows]
        self.copied = [k for k, (_, rest) in enumerate(split) if rest]
        self.pieces = [split[k][0] for k in self.in_place]  #: rows of each run of the kernels
        lengths = [*self.pieces, *(-(-split[k][1] // WIDTH) for k in self.copied)]
        owners = [*self.in_place, *self.copied]
        self.packing: Packing | None = None
        if self.copied:
            spare = int(sum(lengths[len(self.pieces) :]) == 1)  # kernels take two rows or more
            lengths[-1] += spare
            self.packing = packing(tuple([split[k][1] for k in self.copied]), WIDTH, device, spare * WIDTH)
            self.pieces.append(self.packing.total // WIDTH)
        of_rows = torch.tensor(owners).repeat_interleave(torch.tensor(lengths))
        self.owner_of_row = of_rows.to(device)
        # Where the sums of each tensor are, those in place and those copied; of what it has none, a column of zeros.
        columns = [{k: i for i, k in enumerate(owners) if (i < len(self.in_place)) == here} for here in (True, False)]
        sources = [[by_owner.get(k, len(owners)) for k in range(len(split))] for by_owner in columns]
        self.sources = torch.tensor(sources, device=device).flatten()
        self.lengths = torch.tensor(lengths * len(TensorSums._fields), device=device)  #: of each sum's rows


@lru_cache(maxsize=64)
def _plan(split: tuple[tuple[int, int], ...], device: torch.device) -> _Plan:
    return _Plan(split, device)


class _Rows:
    """Tensors of the same dtypes on the same device, as rows.

    Kernels read a matrix that is orthogonalised from a copy, in the dtype of the arithmetic, and write d over it.
    """

    def __init__(self, backend: CompiledBackend, form: Format, views: list[_Views]) -> None:
        self.backend, self.views = backend, views
        self.params = [one.param for one in views]
        self.copied = sum(one.size for one in views)
        self.kernels = backend.load(form)
        self.plan = plan = _plan(tuple([one.split for one in views]), form.device)
        self.directions = [one.vector().to(form.param, copy=True) for one in views if one.as_matrix]
        targets = self.directions or [None] * len(views)
        self.used = [one.writing_to(target) for one, target in zip(views, targets, strict=True)]
        self.pieces = [self.used[k][0] for k in plan.in_place]
        if plan.packing:
            tails = list(zip(*(self.used[k][1] for k in plan.copied), strict=True))
            packed = plan.packing.pack(tails, (form.param, form.grad, *form.state))
            self.pieces.append([vector.view(-1, WIDTH) for vector in packed])
        dtype = arithmetic_dtype(form.param)
        contexts = [one.param.context for one in views]
        each = [c.for_directions if self.directions else c.scalars for c in contexts]
        if all(scalars is each[0] for scalars in each):
            of_all = to_device([each[0]], dtype, form.device)
            scalars = of_all.expand(len(plan.owner_of_row), -1).contiguous()
        else:
            by_param = to_device(each, dtype, form.device)
            scalars = by_param.index_select(0, plan.owner_of_row)
        self.scalars = scalars.split_with_sizes(plan.pieces)

    def measure(self) -> TensorSums:
        plan, measure = self.plan, self.kernels.measure
        sums = [measure([*rows[:5], scalars])[0] for rows, scalars in zip(self.pieces, self.scalars, strict=True)]
        # A GPU has a block of threads for each segment of a vector, for those of a matrix one thread; and would be
        # waited for without `unsafe`.
        rows = torch.cat(sums, 1).double().flatten()
        by_piece = torch.segment_reduce(rows, "sum", lengths=plan.lengths, unsafe=True).view(len(sums[0]), -1)
        with_zeros = torch.nn.functional.pad(by_piece, (0, 1))
        in_place, copied = with_zeros.index_select(1, plan.sources).chunk(2, 1)
        return TensorSums(*(in_place + copied).unbind())

    def apply(self, coefficients: Tensor) -> list[Tensor]:
        by_param = coefficients.T.to(self.scalars[0].dtype).contiguous()
        by_row = by_param.index_select(0, self.plan.owner_of_row)
        weights = self.backend.weights(by_row)
        split = by_row.split_with_sizes(self.plan.pieces)
        for rows, scalars, c in zip(self.pieces, self.scalars, split, strict=True):
            self.kernels.apply([*rows, scalars, c, weights])
        if self.plan.packing:
            param, _, *state = zip(*(self.used[k][1] for k in self.plan.copied), strict=True)
            new_param, _, *new_state = (rows.view(-1) for rows in self.pieces[-1])
            self.plan.packing.write([param, *state], [new_param, *new_state])
        for one in self.views:
            if one.copied:
                one.copied.write_back()
        return self.directions

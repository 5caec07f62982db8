"""The update rule run by compiled kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from learned_optim.backends import Packing, Unit, is_balanced, packing
from learned_optim.balance import Squares
from learned_optim.features import TensorSums
from learned_optim.jobs import Flat, Format, Job, piece_of
from learned_optim.kernels import (
    WIDTH,
    Kernels,
    Kind,
    compiled_head,
    flat_weights,
    kernels,
)
from learned_optim.policy import Policy
from learned_optim.waves import COPIED, Head, limit, tensor_numbers, to_device

#: Rows that are run at once where rows and columns are balanced: what that needs besides is 4 MB then.
PART = 2048
#: Tensors of fewer rows than this are copied as a whole, on CPUs (kernels take two rows or more) and on GPUs, where the
#: launches of one tensor take as long as copying a million coordinates.
IN_PLACE, IN_PLACE_ON_GPU = 2, 2048


class CompiledBackend:
    """Two kernels per tensor, straight on its memory; what does not fill a row is copied into rows side by side."""

    def __init__(self, policy: Policy, why: str = "") -> None:
        self.name = f"compiled ({why})" if why else "compiled"
        self.head = Head(policy)
        self._weights: dict[tuple, Tensor] = {}
        self._kernels: dict[Format, Kernels] = {}

    def prepare(self, jobs: list[Job]) -> None:
        pass

    def kernels(self, form: Format) -> Kernels:
        """Those for tensors like these."""
        if form not in self._kernels:
            kind = Kind(self.head.config, str(form.device), (form.param, form.grad, *form.planes))
            self._kernels[form] = kernels(kind)
            if form.device.type != "cpu":  # where each small operation is a launch
                self.head.compute[form.device] = compiled_head(tensor_numbers)
        return self._kernels[form]

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        kinds: dict[Format, list[Job]] = {}
        for job in jobs:
            if job.numel > 0:
                kinds.setdefault(job.format, []).append(job)
        for form, same_kind in kinds.items():
            for several, copied in self._waves(same_kind):
                yield _Rows(self, form, several), copied

    def views(self, job: Job) -> _Views:
        """Views of the job's tensors; those of the last step, where all is as it was but for the gradient."""
        views = job.kept
        if not isinstance(views, _Views) or not views.take(job.grad):
            views = _Views(job, is_balanced(self.head.config, job))
            job.kept = None if views.copied else views
        return views

    def weights(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._weights:
            self._weights[key] = flat_weights(self.head.config, self.head.weights, like)
        return self._weights[key]

    def _waves(self, jobs: list[Job]) -> Iterator[tuple[list[_Views], int]]:
        """Jobs in order, cut where more than ``COPIED`` coordinates would be copied."""
        wave: list[_Views] = []
        copied, most = 0, limit(COPIED, jobs[0].format.device)
        for job in jobs:
            views = self.views(job)
            if wave and copied + views.size > most:
                yield wave, copied
                wave, copied = [], 0
            wave.append(views)
            copied += views.size
        if wave:
            yield wave, copied


class _Views:
    """A job's tensors as the rows that the kernels run over in place, and the rest that is copied."""

    def __init__(self, job: Job, in_order: bool) -> None:
        flat = Flat(job, in_order)
        self.job, self.copied = job, flat if flat.copied else None
        self.split = rows, rest = _split(job.numel, job.format.device)
        self.in_place = flat.piece(0, rows, WIDTH) if rows else []
        self.tail = flat.piece(rows * WIDTH, rest) if rest else []
        self.size = max(job.numel if flat.copied else 0, -(-rest // WIDTH) * WIDTH)  #: that is copied
        self._strides = job.grad.stride()

    def take(self, grad: Tensor) -> bool:
        """A new gradient, if it has the strides of the old one."""
        if grad.stride() != self._strides:
            return False
        rows, rest = self.split
        if rows:
            self.in_place[1] = piece_of(grad, 0, rows, WIDTH)
        if rest:
            self.tail[1] = piece_of(grad, rows * WIDTH, rest)
        return True

    def let_go(self) -> None:
        for views in (self.in_place, self.tail):
            if views:
                views[1] = views[0]


def _split(numel: int, device: torch.device) -> tuple[int, int]:
    """Rows that are used where they lie, and coordinates that are copied."""
    rows = numel // WIDTH
    fewest = IN_PLACE if device.type == "cpu" else IN_PLACE_ON_GPU
    return (rows, numel - rows * WIDTH) if rows >= fewest else (0, numel)


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
        self.owners, self.owner_of_row = torch.tensor(owners, device=device), of_rows.to(device)
        self.lengths = torch.tensor(lengths * len(TensorSums._fields), device=device)  #: of each sum's rows


@lru_cache(maxsize=64)
def _plan(split: tuple[tuple[int, int], ...], device: torch.device) -> _Plan:
    return _Plan(split, device)


class _Rows:
    """Tensors of the same dtypes on the same device, as rows."""

    def __init__(self, backend: CompiledBackend, form: Format, views: list[_Views]) -> None:
        self.backend, self.views = backend, views
        self.jobs = [one.job for one in views]
        self.kernels = backend.kernels(form)
        self.balanced = backend.head.config.balance > 0.0
        self.plan = plan = _plan(tuple([one.split for one in views]), form.device)
        self.pieces = [views[k].in_place for k in plan.in_place]
        if plan.packing:
            tails = list(zip(*(views[k].tail for k in plan.copied), strict=True))
            copied = plan.packing.pack(tails, (form.param, form.grad, *form.planes))
            self.pieces.append([plane.view(-1, WIDTH) for plane in copied])
        dtype = torch.promote_types(form.param, torch.float32)
        moments = [job.moment for job in self.jobs]
        if all(moment is moments[0] for moment in moments):
            of_all = to_device([moments[0].numbers], dtype, form.device)
            numbers = of_all.expand(len(plan.owner_of_row), -1).contiguous()
        else:
            by_job = to_device([moment.numbers for moment in moments], dtype, form.device)
            numbers = by_job.index_select(0, plan.owner_of_row)
        self.numbers = numbers.split_with_sizes(plan.pieces)

    def measure(self, squares: Squares | None) -> TensorSums:
        plan, measure = self.plan, self.kernels.measure
        sums: list[Tensor] = []
        for piece, first, (*planes, now) in self._parts(self.numbers):
            found, *square = measure([*planes[:5], now])
            sums.append(found)
            if squares is not None:
                for job, start, part in self._owners(piece, first, square[0]):
                    squares.add(job, part, start)
        # A GPU has a block of threads for each segment of a vector, for those of a matrix one thread; and would be
        # waited for without `unsafe`.
        rows = torch.cat(sums, 1).double().flatten()
        by_piece = torch.segment_reduce(rows, "sum", lengths=plan.lengths, unsafe=True).view(len(sums[0]), -1)
        by_job = by_piece.new_zeros(len(by_piece), len(self.jobs)).index_add_(1, plan.owners, by_piece)
        return TensorSums(*by_job.unbind())

    def apply(self, values: Tensor, shares: Squares | None) -> None:
        by_job = values.T.to(self.numbers[0].dtype).contiguous()
        coefficients = by_job.index_select(0, self.plan.owner_of_row)
        weights = self.backend.weights(coefficients)
        split = coefficients.split_with_sizes(self.plan.pieces)
        for piece, first, (*planes, now, c) in self._parts(self.numbers, split):
            factor = [self._factor(shares, piece, first, now)] if self.balanced else []
            self.kernels.apply([*planes, *factor, now, c, weights])
        if self.plan.packing:
            p, _, *state = zip(*(self.views[k].tail for k in self.plan.copied), strict=True)
            p_new, _, *state_new = (plane.view(-1) for plane in self.pieces[-1])
            self.plan.packing.write([p, *state], [p_new, *state_new])
        for one in self.views:
            if one.copied:
                one.copied.write_back()

    def _parts(self, *more: Sequence[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Number of a piece, its first row, and its planes and what is given besides; cut where rows are balanced."""
        part = limit(PART, self.jobs[0].format.device)
        for number, (piece, *others) in enumerate(zip(self.pieces, *more, strict=True)):
            planes = [*piece, *others]
            rows = self.plan.pieces[number]
            if not self.balanced or rows <= part + 1:  # no part of a single row
                yield number, 0, planes
                continue
            for first, last in itertools.pairwise((*range(0, rows - 1, part), rows)):
                yield number, first, [t[first:last] for t in planes]

    def _owners(self, piece: int, first: int, plane: Tensor) -> Iterator[tuple[Job, int, Tensor]]:
        """Jobs with coordinates in the rows of a piece from ``first`` on: where they begin, and a vector of them."""
        if piece < len(self.plan.in_place):
            yield self.jobs[self.plan.in_place[piece]], first * WIDTH, plane.reshape(-1)
        elif self.plan.packing:
            places = self.plan.packing.unpack(plane.view(-1))
            for k, size, place in zip(self.plan.copied, self.plan.packing.sizes, places, strict=True):
                yield self.jobs[k], self.jobs[k].numel - size, place

    def _factor(self, shares: Squares | None, piece: int, first: int, like: Tensor) -> Tensor:
        """r_i c_j, 1 where there are none, in as many rows as ``like`` has."""
        if shares is not None and piece < len(self.plan.in_place):
            job = self.jobs[self.plan.in_place[piece]]
            factor = shares.factor(job, first * WIDTH, len(like) * WIDTH, like.dtype)
            if factor is not None:
                return factor.view(-1, WIDTH)
        plane = like.new_ones(len(like), WIDTH)
        if shares is not None and piece >= len(self.plan.in_place):
            for job, start, place in self._owners(piece, 0, plane):
                shares.write(job, place, start)
        return plane

"""The update rule run by compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from learned_optim.backends import Packing, Unit, arithmetic_dtype, is_orthogonalised, packing
from learned_optim.features import TensorSums
from learned_optim.jobs import Flat, Format, Job, format_of, piece_of
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
        kinds: dict[tuple[Format, bool], list[Job]] = {}
        for job in jobs:
            if job.numel > 0:
                as_matrix = is_orthogonalised(self.head.config, job)
                form = job.format
                if as_matrix:
                    form = format_of(form.device, arithmetic_dtype(form.param), form.grad, form.planes)
                kinds.setdefault((form, as_matrix), []).append(job)
        for (form, _), same_kind in kinds.items():
            for several, copied in self._waves(same_kind):
                yield _Rows(self, form, several), copied

    def views(self, job: Job) -> _Views:
        """Views of the job's tensors; those of the last step, where all is as it was but for the gradient."""
        views = job.kept
        if not isinstance(views, _Views) or not views.take(job.grad):
            views = _Views(job, is_orthogonalised(self.head.config, job))
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

    def __init__(self, job: Job, as_matrix: bool) -> None:
        flat = Flat(job, in_order=as_matrix)
        self.job, self.as_matrix, self.copied = job, as_matrix, flat if flat.copied else None
        self.split = rows, rest = _split(job.numel, job.format.device)
        self.in_place = flat.piece(0, rows, WIDTH) if rows else []
        self.tail = flat.piece(rows * WIDTH, rest) if rest else []
        self.size = max(job.numel if flat.copied or as_matrix else 0, -(-rest // WIDTH) * WIDTH)  #: that is copied
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

    def vector(self) -> Tensor:
        """The parameter, as the views see it."""
        return piece_of((self.in_place or self.tail)[0], 0, self.job.numel)

    def writing_to(self, target: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """``in_place`` and ``tail``; with a vector, if there is one, in the parameter's place."""
        if target is None:
            return self.in_place, self.tail
        rows, rest = self.split
        in_place = [piece_of(target, 0, rows, WIDTH), *self.in_place[1:]] if rows else []
        return in_place, [piece_of(target, rows * WIDTH, rest), *self.tail[1:]] if rest else []

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
    """Tensors of the same dtypes on the same device, as rows.

    Kernels read a matrix that is orthogonalised from a copy, in the dtype of the arithmetic, and write d over it.
    """

    def __init__(self, backend: CompiledBackend, form: Format, views: list[_Views]) -> None:
        self.backend, self.views = backend, views
        self.jobs = [one.job for one in views]
        self.kernels = backend.kernels(form)
        self.plan = plan = _plan(tuple([one.split for one in views]), form.device)
        self.found = {k: one.vector().to(form.param, copy=True) for k, one in enumerate(views) if one.as_matrix}
        self.used = [one.writing_to(self.found.get(k)) for k, one in enumerate(views)]
        self.pieces = [self.used[k][0] for k in plan.in_place]
        if plan.packing:
            tails = list(zip(*(self.used[k][1] for k in plan.copied), strict=True))
            copied = plan.packing.pack(tails, (form.param, form.grad, *form.planes))
            self.pieces.append([plane.view(-1, WIDTH) for plane in copied])
        dtype = torch.promote_types(form.param, torch.float32)
        each = [one.job.moment.for_directions if one.as_matrix else one.job.moment.numbers for one in views]
        if all(numbers is each[0] for numbers in each):
            of_all = to_device([each[0]], dtype, form.device)
            numbers = of_all.expand(len(plan.owner_of_row), -1).contiguous()
        else:
            by_job = to_device(each, dtype, form.device)
            numbers = by_job.index_select(0, plan.owner_of_row)
        self.numbers = numbers.split_with_sizes(plan.pieces)

    def measure(self) -> TensorSums:
        plan, measure = self.plan, self.kernels.measure
        sums = [measure([*planes[:5], now])[0] for planes, now in zip(self.pieces, self.numbers, strict=True)]
        # A GPU has a block of threads for each segment of a vector, for those of a matrix one thread; and would be
        # waited for without `unsafe`.
        rows = torch.cat(sums, 1).double().flatten()
        by_piece = torch.segment_reduce(rows, "sum", lengths=plan.lengths, unsafe=True).view(len(sums[0]), -1)
        by_job = by_piece.new_zeros(len(by_piece), len(self.jobs)).index_add_(1, plan.owners, by_piece)
        return TensorSums(*by_job.unbind())

    def apply(self, values: Tensor) -> dict[tuple[int, int], Tensor]:
        by_job = values.T.to(self.numbers[0].dtype).contiguous()
        coefficients = by_job.index_select(0, self.plan.owner_of_row)
        weights = self.backend.weights(coefficients)
        split = coefficients.split_with_sizes(self.plan.pieces)
        for planes, now, c in zip(self.pieces, self.numbers, split, strict=True):
            self.kernels.apply([*planes, now, c, weights])
        if self.plan.packing:
            p, _, *state = zip(*(self.used[k][1] for k in self.plan.copied), strict=True)
            p_new, _, *state_new = (plane.view(-1) for plane in self.pieces[-1])
            self.plan.packing.write([p, *state], [p_new, *state_new])
        for one in self.views:
            if one.copied:
                one.copied.write_back()
        return {self.jobs[k].place: d for k, d in self.found.items()}

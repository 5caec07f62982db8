"""The passes of an optimizer's step, composed once for whole and for sharded parameters.

    measure        the sums of every tensor                              bucket by bucket
    head           from sums to coefficients                             all tensors of some buckets at once
    apply          directions and new state; moves what is no matrix     bucket by bucket
    orthogonalize  and move what is a matrix                             equal matrices at once

The passes are those of :func:`learned_optim.rule.update.update`. Sums of a tensor's parts, be they chunks or the shards
of several processes, add up between the first two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.engine.cut_matrices import Matrix, orthogonalize_cut
from learned_optim.engine.head import LengthFactors, StepRecord, StepReport, TensorHead
from learned_optim.engine.packing import COPIED, bins, copy_all, limit, stacked_tensors, to_device
from learned_optim.engine.param_state import ParamIndex, ParamState, uncount
from learned_optim.engine.products import gram as gram_of
from learned_optim.engine.products import padded, padded_together
from learned_optim.engine.sharding import Shards
from learned_optim.engine.uncounted import at_rest, is_finite, suspects, take_back, without
from learned_optim.rule import update
from learned_optim.rule.layouts import indices_by
from learned_optim.rule.orthogonalize import (
    Orthogonalization,
    along_blocks,
    as_blocks,
    block_scales,
    from_blocks,
)
from learned_optim.rule.types import Coefficients, Spread, TensorSums

#: Coordinates of equal matrices that are multiplied as one batch: more of them only leave the processor's cache.
MULTIPLIED = 1 << 16


class Bucket(Protocol):
    """Some tensors of a step that are run together."""

    params: list[ParamState]
    copied: int  #: coordinates that it has copied

    def measure(self) -> TensorSums:
        """The sums of each parameter, [len(params)] each, in float64."""
        ...

    def apply(self, coefficients: Tensor) -> Sequence[Tensor | None]:
        """Write the new state, given the stacked coefficients [C, len(params)].

        Returns:
            Directions of matrices that are orthogonalised, [numel] each in the order of the indices; these parameters
            stay where they are. ``None`` for others, which have moved. Nothing where there are no such matrices.
        """
        ...


class Backend(Protocol):
    """How buckets are made and run."""

    @property
    def name(self) -> str:
        """What is used, and why."""
        ...

    @property
    def head(self) -> TensorHead: ...

    def prepare(self, params: list[ParamState]) -> None:
        """Hear of all parameters of a step before it."""
        ...

    def before_capture(self, params: list[ParamState]) -> None:
        """Send to the device what a graph of such a step will read there, and what no graph can bring."""
        ...

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        """All parameters that have coordinates, each in one bucket.

        Buckets are made one by one, as they are wanted. The same parameters give the same buckets again.
        """
        ...


def run_step(
    backend: Backend, params: list[ParamState], shards: Sequence[Shards], skip_nonfinite: bool = False
) -> StepReport:
    """Update every parameter and its state in place.

    Args:
        backend: makes the buckets.
        params: those that have a gradient.
        shards: those that are spread over processes, with a gradient or without. All processes must call this.
        skip_nonfinite: leave out those whose gradient is not finite. On a GPU this waits for what there is to do.
    """
    backend.prepare(params)
    report = StepReport()
    whole = params
    for some in shards:
        here = [p for p in whole if p.param_index in some.tensors]
        whole = [p for p in whole if p.param_index not in some.tensors]
        _run_shards(backend, here, some, report, skip_nonfinite)
    for device, of_device in groupby(backend.buckets(whole), lambda bucket: bucket.params[0].param.device):
        for buckets in bins(of_device, lambda bucket: bucket.copied, limit(COPIED, device)):
            _run_buckets(backend, buckets, report, skip_nonfinite)
    if skip_nonfinite:
        report.skipped = {p.param_index: p.skipped for p in params if p.skipped is not None}
    if report.left_out:
        report.records.append(StepRecord.of_left_out(backend.head.config, report.left_out))
        uncount([p.count for p in report.left_out])
        for p in report.left_out:
            report.skipped[p.param_index].add_(1.0)
    return report


def _run_buckets(backend: Backend, buckets: list[Bucket], report: StepReport, skip_nonfinite: bool) -> None:
    """All passes over whole parameters."""
    head = backend.head
    params = list(chain.from_iterable(bucket.params for bucket in buckets))
    measured = [bucket.measure() for bucket in buckets]
    sums = measured[0] if len(measured) == 1 else TensorSums(*map(torch.cat, zip(*measured, strict=True)))
    if skip_nonfinite and (suspect := suspects(torch.stack(sums))):
        left_out = [params[i] for i in suspect if not is_finite(params[i])]
        if left_out:
            report.left_out += left_out
            rest = without(params, left_out)
            for again in bins(backend.buckets(rest), lambda bucket: bucket.copied, limit(COPIED, sums.u_u.device)):
                _run_buckets(backend, again, report, skip_nonfinite=False)
            return
    stacked, records = head(params, sums)
    report.records.extend(records)
    most = limit(COPIED, stacked.device)
    for matrices in bins(_apply(buckets, stacked), lambda matrix: matrix.param.numel, most):
        with torch.autocast(stacked.device.type, enabled=False):
            report.length_factors.extend(_orthogonalize_and_move(head, matrices))
    take_back(at_rest(params, sums))


def _run_shards(
    backend: Backend, params: list[ParamState], shards: Shards, report: StepReport, skip_nonfinite: bool
) -> None:
    """All passes over parameters of which every process holds a part: all are measured before one is updated.

    Sums are added up once, whatever has a gradient; every process then adds up each matrix that is orthogonalised and
    cut, and sees it as a whole. Buckets are made a second time where keeping them would copy more than ``COPIED``
    coordinates.

    Args:
        backend: makes the buckets.
        params: shards with a gradient; empty ones too, since their per-tensor state is that of the whole parameter.
        shards: the parameters that may have a gradient.
        report: to be added to.
        skip_nonfinite: leave out what has a gradient that is not finite, in any process.
    """
    columns = {index: column for column, index in enumerate(shards.tensors)}
    sums = torch.zeros(len(TensorSums._fields), len(columns), dtype=torch.float64, device=shards.device)
    buckets: list[Bucket] = []
    order: list[ParamState] = []
    copied, most = 0, limit(COPIED, shards.device)
    for bucket in backend.buckets(params):
        sums[:, [columns[p.param_index] for p in bucket.params]] = torch.stack(bucket.measure())
        order += bucket.params
        copied += bucket.copied
        if copied <= most:
            buckets.append(bucket)
    shards.add_up(sums)
    if skip_nonfinite and (suspect := suspects(sums)):  # the same in all processes
        bad = torch.zeros(len(columns), dtype=torch.float64, device=shards.device)
        for p in params:
            if columns[p.param_index] in suspect and not is_finite(p):
                bad[columns[p.param_index]] = 1.0
        shards.add_up(bad)
        bad = bad.tolist()
        left_out = [p for p in params if bad[columns[p.param_index]] > 0.0]
        report.left_out += left_out
        if left_out:
            params = without(params, left_out)
            buckets, copied = [], most + 1
            order = [p for bucket in backend.buckets(params) for p in bucket.params]
    matrices: dict[ParamIndex, Matrix] = {}
    resting: list[ParamState] = []
    if params:
        order += [p for p in params if p.numel == 0]
        here = TensorSums(*sums[:, [columns[p.param_index] for p in order]].unbind())
        stacked, records = backend.head(order, here)
        report.records.extend(records)
        resting = at_rest(order, here)
        again = buckets if copied <= most else backend.buckets(params)
        matrices = {matrix.param.param_index: matrix for matrix in _apply(again, stacked)}
    settings = backend.head.config.orthogonalization
    cut = {
        index: tensor for index, tensor in shards.tensors.items()
        if tensor.cut is not None and settings.matrix_shape(tensor.part.shape, tensor.part.role) is not None
    }  # fmt: skip
    report.length_factors.extend(orthogonalize_cut(settings, cut, matrices, shards, partial(_move, backend.head)))
    for some in bins((m for index, m in matrices.items() if index not in cut), lambda matrix: matrix.param.numel, most):
        report.length_factors.extend(_orthogonalize_and_move(backend.head, some))
    take_back(resting)


def _apply(buckets: Iterable[Bucket], stacked: Tensor) -> Iterator[Matrix]:
    """Apply coefficients [C, K], whose columns are in the order of the buckets; what is still to be orthogonalised."""
    shares, decays = (stacked[Coefficients._fields.index(name)].split(1) for name in ("orthogonal", "decay"))
    begin = 0
    for bucket in buckets:
        end = begin + len(bucket.params)
        if directions := bucket.apply(stacked[:, begin:end]):
            of_all = zip(bucket.params, directions, shares[begin:end], decays[begin:end], strict=True)
            yield from (Matrix(param, d, *rest) for param, d, *rest in of_all if d is not None)
        begin = end


class _Alike(NamedTuple):
    """Matrices of one shape and dtype; large ones alone."""

    params: list[ParamState]
    shares: list[Tensor]
    decays: list[Tensor]
    shape: tuple[int, int, int]  #: how many, rows, columns
    blocks: Tensor  #: see ``as_blocks``

    @classmethod
    def of(cls, settings: Orthogonalization, matrices: list[Matrix]) -> Iterator[_Alike]:
        keys = ((m.param.param.shape, m.param.param.dtype, m.param.transposed) for m in matrices)
        for indices in indices_by(keys).values():
            first = matrices[indices[0]]
            shape = first.param.shape[0], first.param.numel // first.param.shape[0]
            at_once = max(1, limit(MULTIPLIED, first.d.device) // first.param.numel)
            for start in range(0, len(indices), at_once):
                some = [matrices[i] for i in indices[start : start + at_once]]
                params, ds, shares, decays = (list(parts) for parts in zip(*some, strict=True))
                d = first.param.matrices(stacked_tensors(ds))
                yield cls(params, shares, decays, (len(params), *shape), as_blocks(settings, d))


def _orthogonalize_and_move(head: TensorHead, matrices: list[Matrix]) -> Iterator[LengthFactors]:
    """Orthogonalise directions and move the parameters."""
    others: list[Matrix] = []
    taken: dict[tuple[torch.dtype, torch.dtype], list[Matrix]] = {}
    for m in matrices:
        native = head.orthogonalizers.get(m.d.dtype) if m.d.device.type == "cpu" else None
        dtypes = m.param.format.param, m.d.dtype
        (taken.setdefault(dtypes, []) if native and native.takes(m.param, m.d) else others).append(m)
    for (_, dtype), some in taken.items():
        params, ds, shares, decays = (list(parts) for parts in zip(*some, strict=True))
        yield LengthFactors([p.param_index for p in params], head.orthogonalizers[dtype](params, ds, shares))
        _move(head, params, ds, decays)
    yield from _orthogonalize_batches_and_move(head, others)


def _orthogonalize_batches_and_move(head: TensorHead, matrices: list[Matrix]) -> Iterator[LengthFactors]:
    """The same by products of a library, everything at once that has blocks of one size."""
    settings = head.config.orthogonalization
    groups = list(_Alike.of(settings, matrices))
    sizes = [(len(g.blocks) // len(g.params), g.blocks.shape[1], g.blocks.dtype) for g in groups]
    for indices in indices_by(sizes).values():
        batches = padded_together([groups[i].blocks for i in indices], MULTIPLIED)
        batches = [[groups[indices[k]] for k in batch] for batch in batches]
        xs = [padded([g.blocks for g in batch]) for batch in batches]
        same, grams = list(chain.from_iterable(batches)), [gram_of(x) for x in xs]
        gram = grams[0] if len(grams) == 1 else torch.cat(grams)
        params = [p for g in same for p in g.params]
        share: Spread = settings.share
        if params[0].is_guarded:  # else it is the same for all
            share = torch.cat([share for g in same for share in g.shares]).to(gram.dtype)
        scales, factors = block_scales(settings, gram, len(params), share)
        for batch, x, scale in zip(batches, xs, scales.split([len(x) for x in xs]), strict=True):
            _move_along_blocks(head, batch, x, scale.to(x.dtype))
        yield LengthFactors([p.param_index for p in params], factors)


def _move_along_blocks(head: TensorHead, batch: list[_Alike], x: Tensor, scale: Tensor) -> None:
    """Move the parameters of a batch X along S_b X_b; a large one in a single pass over its memory."""
    _, rows, columns = batch[0].shape
    first = batch[0].params[0]
    param = first.param.detach()
    large = 2 * rows * columns > limit(MULTIPLIED, x.device)
    viewed = param.is_contiguous() and not (first.transposed and param.ndim > 2)
    fits = param.dtype == x.dtype and viewed and x.shape[0] * x.shape[1] == min(rows, columns)
    # A device would make the host wait for its answer.
    if large and fits and x.device.type == "cpu" and int(x.count_nonzero()) == x.numel():
        matrix = first.matrices(param.unsqueeze(0))[0]
        matrix = matrix.mT if rows > columns else matrix
        scalars: Any = first.context.scalars
        retained = scalars.retained_with(float(batch[0].decays[0]))
        matrix.unflatten(0, x.shape[:2]).baddbmm_(scale, x, beta=retained, alpha=-scalars.lr)
    else:
        for g, d in zip(batch, along_blocks(scale, x).split([len(g.blocks) for g in batch]), strict=True):
            own = g.params[0].stored(from_blocks(d[..., : g.blocks.shape[2]], g.shape))
            _move(head, g.params, own.to(g.params[0].arithmetic).unbind(), g.decays)


def _move(head: TensorHead, params: Sequence[ParamState], ds: Sequence[Tensor], decays: Sequence[Tensor]) -> None:
    """Move parameters of one dtype along directions, in the order of their indices."""
    move = head.moves.get(params[0].format.param)
    if move is not None and ds[0].device.type == "cpu" and all(p.param.is_contiguous() for p in params):
        move(list(params), [d.contiguous() for d in ds], torch.cat(list(decays)))
        return
    for indices in indices_by(p.param.shape for p in params).values():
        decay = torch.cat([decays[i] for i in indices])
        _move_alike([params[i] for i in indices], stacked_tensors([ds[i] for i in indices]), decay)


def _move_alike(params: Sequence[ParamState], d: Tensor, decay: Tensor) -> None:
    """The same for parameters of one shape, d [len(params), ...], decay [len(params)], in torch."""
    tensors = [p.param.detach() for p in params]
    before = stacked_tensors(tensors).to(d.dtype)
    scalars = [p.context.scalars for p in params]
    # As tensors also where all are the same: with floats the last bit may differ, and then neighbours would matter.
    names = "lr", "retained", "decay_lr"
    of_each = to_device([[getattr(s, name) for s in scalars] for name in names], d.dtype, d.device)
    column = len(params), *[1] * (before.ndim - 1)
    now = scalars[0]._replace(**dict(zip(names, of_each.view(-1, *column), strict=True)))
    copy_all(tensors, update.move(before, d.reshape(before.shape), now, decay.to(d.dtype).view(column)).unbind())

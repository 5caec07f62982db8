"""The update rule run by compiled kernels, and the choice between that and plain torch operations."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.backends import Backend, EagerBackend, Flat, Job, Unit, is_balanced
from learned_optim.balance import Squares
from learned_optim.features import TensorSums
from learned_optim.kernels import (
    WIDTH,
    CompilationError,
    Kernels,
    Kind,
    compiled_head,
    find_compiler,
    flat_weights,
    kernels,
)
from learned_optim.policy import Policy
from learned_optim.waves import COPIED, Head, copy_all, limit, tensor_numbers, to_device

#: ``auto`` compiles for a dtype of which a model has this many parameters. A kernel saves some 15 ns per parameter and
#: step, so that 20 s of compilation are repaid within about 1,300 steps, and there is nothing to wait for later.
WORTH_COMPILING = 1_000_000


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
        self._kernels: dict[tuple, Kernels] = {}
        self._views: dict[int, _Views] = {}

    def prepare(self, params: list[Tensor]) -> None:
        if len(self._views) > len(params):
            self._views.clear()  # of parameters that are no longer trained, among them

    def kernels(self, job: Job) -> Kernels:
        """Those for tensors like these."""
        device = job.param.device
        key = (device, tuple([t.dtype for t in job.tensors]))
        if key not in self._kernels:
            self._kernels[key] = kernels(Kind(self.head.config, str(device), key[1]))
            if device.type != "cpu":  # where each small operation is a launch
                self.head.compute[device] = compiled_head(tensor_numbers)
        return self._kernels[key]

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        kinds: dict[tuple, list[Job]] = {}
        for job in jobs:
            if job.param.numel() > 0:
                kinds.setdefault((job.param.device, *(t.dtype for t in job.tensors)), []).append(job)
        for same_kind in kinds.values():
            for several, copied in self._waves(same_kind):
                yield _Rows(self, several), copied

    def views(self, job: Job) -> _Views:
        """Views of the job's tensors; those of the last step, where the tensors are the same but for the gradient."""
        views = self._views.get(id(job.param))
        if views is None or not views.take(job):
            views = _Views(job, is_balanced(self.head.config, job))
            if not views.flat.copied:
                self._views[id(job.param)] = views
        return views

    def weights(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._weights:
            self._weights[key] = flat_weights(self.head.config, self.head.weights, like)
        return self._weights[key]

    def _waves(self, jobs: list[Job]) -> Iterator[tuple[list[_Views], int]]:
        """Jobs in order, cut where more than ``COPIED`` coordinates would be copied."""
        wave: list[_Views] = []
        copied = 0
        for job in jobs:
            views = self.views(job)
            size = max(job.param.numel() if views.flat.copied else 0, -(-views.rest // WIDTH) * WIDTH)
            if wave and copied + size > limit(COPIED, job.param.device):
                yield wave, copied
                wave, copied = [], 0
            wave.append(views)
            copied += size
        if wave:
            yield wave, copied


class _Views:
    """A job's tensors as the rows that the kernels run over in place, and the rest that is copied."""

    def __init__(self, job: Job, in_order: bool) -> None:
        self.flat = flat = Flat(job, in_order)
        self.rows, self.rest = _split(job.param.numel(), job.param.device)
        self.in_place = flat.piece(0, self.rows, WIDTH) if self.rows else []
        self.tail = flat.piece(self.rows * WIDTH, self.rest) if self.rest else []
        self._known = (job.param, *job.planes)
        self._places = [t.data_ptr() for t in self._known]
        self._grad = (job.grad.stride(), job.grad.dtype)

    def take(self, job: Job) -> bool:
        """Whether this step's tensors lie where the last step's did, but for the gradient, whose views are renewed."""
        grad, tensors = job.grad, (job.param, *job.planes)
        if self._grad != (grad.stride(), grad.dtype) or self.rows * WIDTH + self.rest != job.param.numel():
            return False
        for new, known, place in zip(tensors, self._known, self._places, strict=True):
            if new is not known or new.data_ptr() != place:
                return False
        self.flat.job = job
        if self.rows:
            self.in_place[1] = grad.as_strided((self.rows, WIDTH), (WIDTH, 1))
        if self.rest:
            self.tail[1] = grad.as_strided((self.rest,), (1,), grad.storage_offset() + self.rows * WIDTH)
        return True

    def finish(self) -> None:
        """Write copies back, and let go of the gradient."""
        self.flat.write_back()
        self.flat.job, self.flat.tensors = self.flat.job._replace(grad=self._known[0]), ()
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
        self.in_place = [(k, rows) for k, (rows, _) in enumerate(split) if rows]
        self.copied = [(k, size) for k, (_, size) in enumerate(split) if size]
        self.copied_rows = [-(-size // WIDTH) for _, size in self.copied]
        pieces = [rows for _, rows in self.in_place]
        lengths = [*pieces, *self.copied_rows]
        owners = [k for k, _ in (*self.in_place, *self.copied)]
        if self.copied:
            empty = int(sum(self.copied_rows) == 1)  # kernels take two rows or more
            lengths[-1] += empty
            pieces.append(sum(self.copied_rows) + empty)
        self.pieces = pieces  #: rows of each run of the kernels
        of_rows = torch.tensor(owners).repeat_interleave(torch.tensor(lengths))
        self.owners, self.owner_of_row = torch.tensor(owners, device=device), of_rows.to(device)
        self.lengths = torch.tensor(lengths * len(TensorSums._fields), device=device)  #: of each sum's rows
        self.places = [n for _, size in self.copied for n in (size, -size % WIDTH)]  #: copied, and the gaps behind


@lru_cache(maxsize=64)
def _plan(split: tuple[tuple[int, int], ...], device: torch.device) -> _Plan:
    return _Plan(split, device)


class _Rows:
    """Tensors of the same dtypes on the same device, as rows."""

    def __init__(self, backend: CompiledBackend, views: list[_Views]) -> None:
        self.backend, self.views = backend, views
        self.jobs = [one.flat.job for one in views]
        first = self.jobs[0]
        self.kernels = backend.kernels(first)
        self.balanced = backend.head.config.balance > 0.0
        device, dtype = first.param.device, torch.promote_types(first.param.dtype, torch.float32)
        self.plan = plan = _plan(tuple((one.rows, one.rest) for one in views), device)
        self.pieces = [views[k].in_place for k, _ in plan.in_place]
        if plan.copied:
            copied = [torch.zeros(plan.pieces[-1], WIDTH, dtype=t.dtype, device=device) for t in first.tensors]
            self.places = [self._places(plane) for plane in copied]
            self.tails = list(zip(*(views[k].tail for k, _ in plan.copied), strict=True))
            self._copy(self.places, self.tails)
            self.pieces.append(copied)
        kinds = {key: update_rule.step_numbers(*key) for key in {(job.step, job.hyper) for job in self.jobs}}
        numbers = to_device([kinds[job.step, job.hyper] for job in self.jobs], dtype, device)
        self.numbers = numbers.index_select(0, plan.owner_of_row).split(plan.pieces)

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
        split = coefficients.split(self.plan.pieces)
        for piece, first, (*planes, now, c) in self._parts(self.numbers, split):
            factor = [self._factor(shares, piece, first, now)] if self.balanced else []
            self.kernels.apply([*planes, *factor, now, c, weights])
        if self.plan.copied:
            self._copy(*([planes[0], *planes[2:]] for planes in (self.tails, self.places)))  # the gradient stays
        for one in self.views:
            one.finish()

    def _parts(self, *more: Sequence[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Number of a piece, its first row, and its planes and what is given besides; cut where rows are balanced."""
        part = limit(PART, self.jobs[0].param.device)
        for number, tensors in enumerate(zip(self.pieces, *more, strict=True)):
            planes: list[Tensor] = [*tensors[0], *tensors[1:]]
            rows = len(planes[0])
            starts = range(0, max(rows - 1, 1), part) if self.balanced else (0,)  # no part of a single row
            for first, last in itertools.pairwise((*starts, rows)):
                yield number, first, planes if last - first == rows else [t[first:last] for t in planes]

    def _owners(self, piece: int, first: int, plane: Tensor) -> Iterator[tuple[Job, int, Tensor]]:
        """Jobs with coordinates in the rows of a piece from ``first`` on: where they begin, and a vector of them."""
        if piece < len(self.plan.in_place):
            yield self.jobs[self.plan.in_place[piece][0]], first * WIDTH, plane.reshape(-1)
            return
        for (k, size), place in zip(self.plan.copied, self._places(plane), strict=True):
            yield self.jobs[k], self.jobs[k].param.numel() - size, place

    def _factor(self, shares: Squares | None, piece: int, first: int, like: Tensor) -> Tensor:
        """r_i c_j, 1 where there are none, in as many rows as ``like`` has."""
        if shares is not None and piece < len(self.plan.in_place):
            job = self.jobs[self.plan.in_place[piece][0]]
            factor = shares.factor(job, first * WIDTH, len(like) * WIDTH, like.dtype)
            if factor is not None:
                return factor.view(-1, WIDTH)
        plane = like.new_ones(len(like), WIDTH)
        if shares is not None and piece >= len(self.plan.in_place):
            for job, start, place in self._owners(piece, 0, plane):
                shares.write(job, place, start)
        return plane

    def _places(self, plane: Tensor) -> list[Tensor]:
        """The copied coordinates of each tensor in a plane of rows."""
        return list(plane.view(-1)[: sum(self.plan.places)].split(self.plan.places)[::2])

    @staticmethod
    def _copy(targets: Sequence[Sequence[Tensor]], sources: Sequence[Sequence[Tensor]]) -> None:
        """Planes in parts, with one call for all planes of a dtype."""
        for key in dict.fromkeys((new[0].dtype, old[0].dtype) for new, old in zip(targets, sources, strict=True)):
            both = [pair for pair in zip(targets, sources, strict=True) if (pair[0][0].dtype, pair[1][0].dtype) == key]
            copy_all(*([part for planes in several for part in planes] for several in zip(*both, strict=True)))


class ChosenBackend:
    """Compiled kernels where they are wanted and can be had, plain torch operations elsewhere.

    What is used is decided at the first step, per device and dtype, from the number of parameters in it and from
    whether there is a compiler: a run that is resumed in the same environment goes on with the same bits.

    Args:
        policy: the rule's.
        always: compile whatever the size of the model.
    """

    def __init__(self, policy: Policy, always: bool) -> None:
        self.always = always
        self._eager, self._compiled = EagerBackend(policy), CompiledBackend(policy)
        self._chosen: dict[tuple[str, torch.dtype], bool] = {}
        self._reasons: dict[str, None] = {}
        self._failed = False

    @property
    def name(self) -> str:
        return "; ".join(self._reasons) or "not chosen before the first step"

    @property
    def head(self) -> Head:
        return self._eager.head

    def prepare(self, params: list[Tensor]) -> None:
        sizes: dict[tuple[str, torch.dtype], int] = {}
        for p in params:
            key = (p.device.type, p.dtype.to_real())
            if key not in self._chosen:
                sizes[key] = sizes.get(key, 0) + p.numel() * (2 if p.is_complex() else 1)
        for (device, dtype), size in sizes.items():
            count = f"{size:,} parameters" if not self._chosen and len(sizes) == 1 else f"{size:,} {dtype} parameters"
            compiled, why = self._choice(device, size)
            self._chosen[device, dtype] = compiled
            self._reasons[f"{'compiled' if compiled else 'eager'} ({count}{why})"] = None

    def _choice(self, device: str, size: int) -> tuple[bool, str]:
        if self._failed:
            return False, "; compilation failed"
        if self.always:
            return True, ""
        if self._eager.head.config.cell != "gated":
            return False, "; only the gated cell is compiled"
        if size < WORTH_COMPILING:
            return False, f", compiled from {WORTH_COMPILING:,}"
        if find_compiler(device) is None:
            return False, f"; no compiler for {device}"
        return True, ""

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        compiled, eager = [], []
        for job in jobs:
            key = (job.param.device.type, job.param.dtype)
            (compiled if self._chosen.get(key, False) else eager).append(job)
        try:
            for job in compiled:
                self._compiled.kernels(job)
        except CompilationError as error:
            self._fail(error)
            compiled, eager = [], jobs
        yield from self._compiled.units(compiled)
        yield from self._eager.units(eager)

    def _fail(self, error: CompilationError) -> None:
        self._failed = True
        self._chosen = dict.fromkeys(self._chosen, False)
        self._reasons = {f"eager (compilation failed: {error})": None}
        _warn_once(str(error))


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"learned_optim: the update rule could not be compiled and runs as plain torch operations, about five times "
        f"slower: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def make_backend(name: str, policy: Policy) -> Backend:
    """The backend of that name: ``"eager"``, ``"compiled"`` or ``"auto"``.

    Raises:
        ValueError: another name.
    """
    if name not in ("auto", "eager", "compiled"):
        raise ValueError(f"Invalid backend: {name!r}; choose 'auto', 'eager' or 'compiled'")
    return EagerBackend(policy) if name == "eager" else ChosenBackend(policy, always=name == "compiled")

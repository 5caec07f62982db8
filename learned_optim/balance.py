"""Balancing: rows of a matrix that would move far are held back, those that would move little are pushed; columns too.

With e the base mixture of this step's directions, R_i and C_j its sums of squares over row i and column j:

    d_ij times f_ij = share(R)_i share(C)_j          kept within [1/bound, bound]
    share(S)_i = y_i / sqrt(mean(x y^2)),  x_i = S_i / mean(S),  y_i = ((x_i + floor) / (1 + floor))^-exponent

so that the rms of an e whose squares are a product of rows and columns stays what it was. Without the floor, inputs
that are nearly always dead, as the borders of images, would get by far the longest steps. Rows are outputs, columns all
that is connected to one output (torch's convention); vectors and numbers are left alone. A cheap relative of whitening
an update (Muon, Shampoo): no matrix product, no state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_optim.policy import PolicyConfig

if TYPE_CHECKING:
    from learned_optim.jobs import Job


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int] | None:
    """How many of each a tensor of this shape has; ``None`` where there is nothing to balance."""
    if len(shape) < 2 or shape[0] < 2:
        return None
    columns = math.prod(shape[1:])
    return (shape[0], columns) if columns > 1 else None


def lengths_of(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Rows and columns of each tensor that has them, one after the other."""
    return tuple(n for shape in shapes for n in rows_and_columns(shape) or ())


def squared_mixture(config: PolicyConfig, u: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """e^2, [n], of the directions u and b and the first hidden unit h (before this step), mixed as configured."""
    e = config.momentum_weight * b + config.gradient_weight * u
    if config.hidden_weights:
        e = e + config.hidden_weights[0] * h
    return e * e


def sums_of(square: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Sums over rows and over columns of a whole tensor in a vector; nothing where there are none."""
    sizes = rows_and_columns(shape)
    if sizes is None:
        return []
    matrix = square[: math.prod(shape)].view(sizes)
    return [matrix.sum(1), matrix.sum(0)]


def add_sums(square: Tensor, start: int, rows: Tensor, columns: Tensor) -> None:
    """Add, in place, what a piece of a tensor has to its sums.

    Args:
        square: of the tensor's coordinates from number ``start`` on, [m].
        start: see ``square``.
        rows: [R], sums so far.
        columns: [C], sums so far.
    """
    for first, last, part in _rectangles(square, start, len(columns)):
        row = first // len(columns)
        if part.ndim == 1:
            rows[row] += part.sum()
            columns[first % len(columns) : first % len(columns) + last - first] += part
        else:
            rows[row : row + len(part)] += part.sum(1)
            columns += part.sum(0)


def _rectangles(vector: Tensor, start: int, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """A piece of a matrix, cut into the end of a row, whole rows [r, width], and the beginning of a row."""
    end = start + len(vector)
    cuts = [start, min(-(-start // width) * width, end), max(end // width * width, start), end]
    cuts[2] = max(cuts[1], cuts[2])
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        if last > first:
            part = vector[first - start : last - start]
            yield first, last, part.view(-1, width) if number == 1 else part


def shares(config: PolicyConfig, sums: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """See the module; ``sums`` holds vectors of these lengths side by side, [S], and so does the result, in float64."""
    if not lengths:
        return sums.double()
    owner, sizes = _owners(lengths, sums.device)

    def mean(x: Tensor) -> Tensor:
        return (torch.zeros_like(sizes).index_add(0, owner, x) / sizes).index_select(0, owner)

    sums = sums.double()
    average = mean(sums)
    # Before anything has moved all are alike.
    x = torch.where(average > 0.0, sums / average.clamp(min=1e-300), torch.ones_like(sums))
    x = torch.where(average.isnan(), average, x)
    y = ((x + config.balance_floor) / (1.0 + config.balance_floor)).clamp(min=1e-12) ** -config.balance
    return y / mean(x * y * y).sqrt()


@lru_cache(maxsize=256)
def _owners(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(sizes), sizes.double()


def products(rows: Tensor, columns: Tensor, start: int, length: int) -> Tensor:
    """r_i c_j of ``length`` coordinates of a matrix in a vector, from number ``start`` on."""
    width = len(columns)
    first, last = start // width, -(-(start + length) // width)
    return torch.outer(rows[first:last], columns).view(-1)[start - first * width :][:length]


def whole_products(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """r_i c_j of whole tensors side by side, each padded to its size; 1 where there is nothing to balance.

    Args:
        parts: rows' and columns' shares of each tensor that has them.
        shapes: of the tensors.
        sizes: coordinates of each in the vector, padding included.
    """
    left = iter(parts)
    pieces: list[Tensor] = []
    for shape, size in zip(shapes, sizes, strict=True):
        numel = math.prod(shape)
        if rows_and_columns(shape) is not None:
            pieces.append(torch.outer(next(left), next(left)).view(-1))
            size -= numel
        pieces.append(parts[0].new_ones(size))
    return torch.cat(pieces)


Place = tuple[int, int]


class Squares:
    """A number for each row and each column of the tensors that have them: sums of squares, or shares.

    Args:
        shapes: of the whole tensors, by the place of their jobs.
        jobs: some of the tensors, or shards of them.
        vector: the numbers, one tensor after the other, [S].
    """

    def __init__(self, shapes: Mapping[Place, Sequence[int]], jobs: Sequence[Job], vector: Tensor) -> None:
        self.shapes, self.jobs, self.vector = shapes, jobs, vector
        self._lengths = lengths_of(shapes.values())
        ends = itertools.accumulate(sum(rows_and_columns(shape) or ()) for shape in shapes.values())
        begin = dict(zip(shapes, (0, *ends), strict=False))
        self._views: dict[Place, tuple[Tensor, Tensor]] = {}
        for job in jobs:
            sizes = rows_and_columns(job.shape)
            if sizes is not None and job.param.numel() > 0:
                (row, column), rows = job.origin, job.param.shape[0]
                row += begin[job.place]
                column += begin[job.place] + sizes[0]
                self._views[job.place] = vector[row : row + rows], vector[column : column + job.param.numel() // rows]

    @staticmethod
    def size(config: PolicyConfig, shapes: Iterable[Sequence[int]]) -> int:
        """Length of the vector for tensors of these shapes; 0 where nothing is balanced."""
        return sum(lengths_of(shapes)) if config.balance else 0

    def shares(self, config: PolicyConfig) -> Squares:
        """From sums of squares to shares."""
        return Squares(self.shapes, self.jobs, shares(config, self.vector, self._lengths))

    def add(self, job: Job, square: Tensor, start: int = 0) -> None:
        """Add the squares of a job's coordinates from number ``start`` on."""
        if job.place in self._views:
            add_sums(square, start, *self._views[job.place])

    def factor(self, job: Job, start: int, length: int, dtype: torch.dtype) -> Tensor | None:
        """r_i c_j of a job's coordinates from number ``start`` on; ``None`` for a tensor without rows and columns."""
        if job.place not in self._views:
            return None
        rows, columns = self._views[job.place]
        return products(rows.to(dtype), columns.to(dtype), start, length)

    def write(self, job: Job, place: Tensor, start: int = 0) -> None:
        """Fill a vector with r_i c_j of a job's coordinates from number ``start`` on, if the tensor has them."""
        factor = self.factor(job, start, len(place), place.dtype)
        if factor is not None:
            place.copy_(factor)

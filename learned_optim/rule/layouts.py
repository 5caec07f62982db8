"""How tensors lie in a flat vector of coordinates: sums over each, and per-tensor values spread over it.

The update rule sees vectors of coordinates. A vector may be a piece of a tensor (:class:`Whole`) or hold several small
tensors side by side (:class:`Segments`). The rule cannot tell, since everything that crosses coordinates goes through
``inner``, ``total`` and ``spread``.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from learned_optim.rule.types import Spread

Key = TypeVar("Key", bound=Hashable)

#: What a tensor is in its model, where somebody has said so.
Role = Literal["matrix", "embedding", "head", "vector", "conv"]
ROLES: tuple[Role, ...] = get_args(Role)
#: The roles of tensors that are orthogonalised, whatever their aspect ratio; those of other roles never are.
ORTHOGONALIZED: tuple[Role, ...] = ("matrix", "conv")
#: Rows per column from which a matrix without a role counts as an embedding, as a head of that shape does.
EMBEDDING_ASPECT = 16.0
#: Rows and columns of the smallest of these that is no first layer of few inputs.
SMALLEST_EMBEDDING = 256, 16
#: Smaller side of a matrix up to which it is not large, and from which it is. Orthogonalising makes all directions of a
#: matrix alike; those of the signal are few, those of the noise as many as its smaller side.
LARGE_SIDES = 64, 128
#: Rows per column from which a matrix without a role does not count as large: it may be the embedding of a small
#: vocabulary.
LARGE_ASPECT = 8.0
#: Embeddings of up to so many rows are treated like any other tensor.
FEW_ROWS = 1000.0


def indices_by(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The indices at which each key stands in a sequence; keys in the order in which they first occur."""
    indices: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    return indices


def constant_column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Floats of the configuration as a column [len(values), 1], of the dtype and on the device of ``like``.

    Cached: a GPU would have to wait for each copy. Compiled they are part of the code.
    """
    if torch.compiler.is_compiling():
        return torch.cat([like.new_full((1, 1), value) for value in values])
    return _constant_column(values, like.dtype, like.device)


@lru_cache(maxsize=256)
def _constant_column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made there could not be used with gradients later
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


class ShapeContext(NamedTuple):
    """What the tensor head knows of a parameter's shape and role: floats of one tensor, or [K] of many.

    Convention of torch: ``shape[0]`` counts outputs, ``shape[1]`` inputs, what follows is the kernel. Without a role
    the shape decides: up to one dimension is a vector, three and more are a convolution.
    """

    log_numel: Any
    is_vector: Any
    is_convolution: Any
    log_fan_ratio: Any  #: logarithm of outputs over inputs
    log_embedding_rows: Any  #: logarithm of an embedding's rows over ``FEW_ROWS``, if there are more; 0 elsewhere
    is_embedding: Any  #: 1 for embeddings and heads; without a role, for tall matrices from ``SMALLEST_EMBEDDING`` on
    is_large: Any  #: of other matrices and of convolutions, 0 up to the first of ``LARGE_SIDES``, 1 from the second on

    @classmethod
    def of(cls, shape: Sequence[int], role: Role | None = None) -> ShapeContext:
        is_vector = len(shape) <= 1 or role == "vector"
        is_convolution = role == "conv" or (role is None and len(shape) >= 3)
        fan_ratio = 0.0 if is_vector else math.log(max(shape[0], 1) / max(shape[1], 1))
        log_numel = math.log(max(math.prod(shape), 1))
        tall = len(shape) == 2 and shape[0] >= EMBEDDING_ASPECT * shape[1]
        counts_rows = role == "embedding" or (role is None and tall)
        log_rows = math.log(max(shape[0] / FEW_ROWS, 1.0)) if counts_rows else 0.0
        large = tall and shape[0] >= SMALLEST_EMBEDDING[0] and shape[1] >= SMALLEST_EMBEDDING[1]
        is_embedding = role in ("embedding", "head") or (role is None and large)
        embedding = log_rows, float(is_embedding)
        is_large = 0.0 if is_vector or is_embedding else _is_large(shape, role)
        return cls(log_numel, float(is_vector), float(is_convolution), fan_ratio, *embedding, is_large)


def _is_large(shape: Sequence[int], role: Role | None) -> float:
    rows, columns, (low, high) = shape[0], math.prod(shape[1:]), LARGE_SIDES
    if role is None and rows >= LARGE_ASPECT * columns:
        return 0.0
    return min(max(math.log(max(min(rows, columns), 1) / low) / math.log(high / low), 0.0), 1.0)


class TensorShapes(NamedTuple):
    """What the head needs to know about the shapes of K tensors, in float64."""

    numel: Tensor  #: [K], coordinates of each whole tensor; 1 for empty ones
    context: Tensor  #: [7, K], rows as in :class:`ShapeContext`

    @classmethod
    def of(
        cls,
        shapes: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        roles: Sequence[Role | None] | None = None,
    ) -> TensorShapes:
        contexts = list(map(ShapeContext.of, shapes, roles or [None] * len(shapes)))
        context = torch.tensor(contexts, dtype=torch.float64, device=device)
        numel = torch.tensor([float(max(math.prod(s), 1)) for s in shapes], dtype=torch.float64, device=device)
        return cls(numel, context.T.contiguous())

    def counting(self, numbers: Sequence[int]) -> TensorShapes:
        """The same with other numbers of coordinates: of tensors of which only some rows are updated."""
        return self._replace(numel=self.numel.new_tensor(numbers).clamp(min=1.0))

    def to(self, device: torch.device | str) -> TensorShapes:
        return TensorShapes(self.numel.to(device), self.context.to(device))


class Layout(Protocol):
    """K tensors in a vector of n coordinates."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """[n], [n] -> [K]: sums of products over each tensor."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """[n] -> [K]: sums over each tensor."""
        ...

    def spread(self, values: Tensor) -> Sequence[Spread]:
        """[C, K] -> C values, each to be broadcast over the [n] coordinates."""
        ...


class ShapedLayout(Layout, Protocol):
    """A layout that knows the shapes of its tensors."""

    @property
    def tensor_shapes(self) -> TensorShapes: ...


class WholeLayout(ShapedLayout, Protocol):
    """A layout in which every tensor lies as a whole."""

    @property
    def shapes(self) -> Sequence[Sequence[int]]:
        """Of the tensors."""
        ...

    @property
    def roles(self) -> Sequence[Role | None]:
        """Of the tensors; ``None`` where the shape decides."""
        ...

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each tensor in the vector, padding included."""
        ...


class Whole:
    """One tensor, or a chunk of one: per-tensor values apply to every coordinate alike.

    Args:
        shape: of the whole parameter.
        device: where per-tensor values live.
        role: of the parameter.
    """

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu", role: Role | None = None) -> None:
        self.shapes, self.sizes = [shape], [math.prod(shape)]
        self.roles: list[Role | None] = [role]
        self.tensor_shapes = TensorShapes.of([shape], device, self.roles)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.dot(x, y).unsqueeze(0)

    def total(self, x: Tensor) -> Tensor:
        return x.sum().unsqueeze(0)

    def spread(self, values: Tensor) -> Sequence[Spread]:
        if values.device.type == "cpu" and not values.requires_grad:
            return values[:, 0].tolist()  # floats, which elementwise kernels take at full speed
        return values[:, 0].unbind()


class Pieces:
    """Pieces of a vector, each followed by a gap that may be empty.

    Args:
        sizes: of the pieces.
        gaps: coordinates behind each.
    """

    def __init__(self, sizes: Sequence[int], gaps: Sequence[int]) -> None:
        # Empty gaps are left out: every part of a split costs as much as the sum of a small tensor.
        self._lengths = [n for size, gap in zip(sizes, gaps, strict=True) for n in ((size, gap) if gap else (size,))]
        starts = itertools.accumulate((1 + bool(gap) for gap in gaps), initial=0)
        self._used = None if not any(gaps) else list(starts)[:-1]

    def of(self, vector: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
        """Views of the pieces."""
        parts = vector.split_with_sizes(self._lengths)
        return parts if self._used is None else [parts[i] for i in self._used]


class Segments:
    """K tensors side by side, each padded to a multiple of ``align`` coordinates; sums leave the padding out.

    Args:
        shapes: of the parameters, in order.
        align: with 64 no tensor shares a SIMD vector with another, so that rounding does not depend on the
            neighbours; 1 packs densely.
        device: where per-tensor values live.
        roles: of the parameters; ``None`` leaves all of them to their shapes.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        align: int = 1,
        device: torch.device | str = "cpu",
        roles: Sequence[Role | None] | None = None,
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self.shapes, self.roles = shapes, roles or [None] * len(shapes)
        self.sizes = [-(-size // align) * align for size in sizes]
        self._pieces = Pieces(sizes, [padded - size for size, padded in zip(sizes, self.sizes, strict=True)])
        self.tensor_shapes = TensorShapes.of(shapes, device, self.roles)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(self.sizes, dtype=torch.int64))
        self.owner = owner.to(device)

    def to(self, device: torch.device | str) -> Segments:
        """The same layout on another device."""
        moved = copy.copy(self)
        moved.tensor_shapes, moved.owner = self.tensor_shapes.to(device), self.owner.to(device)
        return moved

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        of_x = self._pieces.of(x)
        of_y = of_x if x is y and not x.requires_grad else self._pieces.of(y)
        return torch.stack(list(map(torch.dot, of_x, of_y)))

    def total(self, x: Tensor) -> Tensor:
        return torch.stack([a.sum() for a in self._pieces.of(x)])

    def spread(self, values: Tensor) -> Sequence[Spread]:
        if values.requires_grad:
            return _SpreadWithGradient.apply(values, self.sizes)  # pyright: ignore[reportReturnType]
        return values.index_select(1, self.owner).unbind()


class _SpreadWithGradient(torch.autograd.Function):
    """[C, K] -> C vectors [n]. The derivative of ``index_select`` would add the n coordinates up one by one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        columns = values.split(1, dim=1)
        return torch.cat([c.expand(-1, size) for c, size in zip(columns, sizes, strict=True)], dim=1).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pieces = torch.stack(grads).split(ctx.sizes, dim=1)
        return torch.stack([piece.sum(1) for piece in pieces], dim=1), None

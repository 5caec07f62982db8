"""The rule run by compiled C++ on a CPU: one call per pass, straight on the memory of all tensors."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Iterator
from functools import partial
from operator import is_

import torch
from torch import Tensor

from learned_optim.engine.head import StepRecord, TensorHead, coefficient_count
from learned_optim.engine.hyperparameters import StepContext
from learned_optim.engine.native_library import CompilationError, Kind, library
from learned_optim.engine.native_matrices import NativeMatrices, at
from learned_optim.engine.packing import COPIED, bins
from learned_optim.engine.param_state import FlatViews, Format, ParamState, arithmetic_dtype, contexts_of, have_changed
from learned_optim.engine.step import Bucket
from learned_optim.rule.layouts import TensorShapes
from learned_optim.rule.types import TensorState, TensorSums


class NativeBackend:
    """Kernels generated from the rule and compiled by the C++ compiler that is there.

    Args:
        head: the policy's, with configuration and weights.
    """

    name = "compiled"

    def __init__(self, head: TensorHead) -> None:
        self.head, self.settings = head, head.config.orthogonalization
        self.weights = head.flat_weights(head.config.coordinate_weights()).cpu()
        self._libraries: dict[Format, ctypes.CDLL] = {}
        self._groups: dict[tuple[Format, bool, int], _Group] = {}

    def prepare(self, params: list[ParamState]) -> None:
        pass

    def before_capture(self, params: list[ParamState]) -> None:
        pass

    def load(self, form: Format) -> None:
        """Compile or load what tensors like these need.

        Raises:
            CompilationError: it cannot be had, and why.
        """
        if form not in self._libraries:
            made = library(Kind(self.head.config, (form.param, form.grad, *form.state)))
            if isinstance(made, CompilationError):
                raise made
            self._libraries[form] = made
            dtype = arithmetic_dtype(form.param)
            if dtype not in self.head.native:
                self.head.native[dtype] = _NativeHead(self.head, made, dtype)
                self.head.orthogonalizers[dtype] = NativeMatrices(made, self.settings)
            self.head.moves.setdefault(form.param, partial(_move_along, made))

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        kinds: dict[tuple[Format, bool], list[ParamState]] = {}
        for p in params:
            if p.grad.is_neg():  # as an imaginary part of autograd's is: kernels read memory, which lacks the sign
                p.grad = p.grad.resolve_neg()
            if p.numel > 0:
                as_matrix = self.settings.matrix_shape(p.shape, p.role) is not None
                kinds.setdefault((p.format, as_matrix), []).append(p)
        for (form, as_matrices), alike in kinds.items():
            self.load(form)
            group = self._group((form, as_matrices, 0), alike)
            in_order = group.in_order(alike)
            if in_order and not as_matrices:
                yield _Native(self, self._libraries[form], group, alike, [], as_matrices)
                continue
            items = ((p, None if in_order else FlatViews(p, in_order=as_matrices)) for p in alike)
            for number, some in enumerate(bins(items, partial(_copied, as_matrices), COPIED), 1):
                group = self._group((form, as_matrices, number), [p for p, _ in some])
                flats = [flat for _, flat in some if flat]
                yield _Native(self, self._libraries[form], group, [p for p, _ in some], flats, as_matrices)

    def _group(self, key: tuple[Format, bool, int], params: list[ParamState]) -> _Group:
        group = self._groups.get(key)
        if group is None or not group.is_of(params):
            group = self._groups[key] = _Group(params)
        return group


def _copied(as_matrix: bool, item: tuple[ParamState, FlatViews | None]) -> int:
    """Coordinates that a bucket copies; of matrices the directions are kept until they are orthogonal."""
    param, flat = item
    return param.numel if as_matrix or (flat and flat.copied) else 0


class _Same:
    """Some parameters in one order, which this does not keep alive."""

    def __init__(self, params: list[ParamState]) -> None:
        self._params = [weakref.ref(p) for p in params]

    def is_of(self, params: list[ParamState]) -> bool:
        """Whether these are the very same parameters, in the same order."""
        return len(self._params) == len(params) and all(map(is_, [ref() for ref in self._params], params))


class _Group(_Same):
    """Parameters of one format, with what does not change from step to step.

    Raises:
        RuntimeError: a tensor that the kernels would read or write beyond its end, or on another device.
    """

    def __init__(self, params: list[ParamState]) -> None:
        super().__init__(params)
        for p in params:
            for t in p.tensors:
                if t.shape != p.param.shape or t.device != p.param.device:
                    mine, its = f"{tuple(p.param.shape)} on {p.param.device}", f"{tuple(t.shape)} on {t.device}"
                    raise RuntimeError(f"a parameter of shape {mine} has a gradient or state of shape {its}")
        self.sizes = array("q", [p.numel for p in params])
        self.addresses = array("q", [t.data_ptr() for p in params for t in p.tensors])
        self.stride = len(params[0].tensors)
        self._contiguous = all(t.is_contiguous() for p in params for t in (p.param, *p.state_tensors))

    def in_order(self, params: list[ParamState]) -> bool:
        """Whether all tensors lie in the order of their indices."""
        return self._contiguous and all(p.grad.is_contiguous() for p in params)


class _Native:
    """Tensors of the same dtypes, where they lie; of those that lie in different orders, copies.

    Args:
        backend: of the policy.
        lib: of tensors of these dtypes.
        group: of the parameters.
        params: with gradients.
        flats: views of all of them, or none if everything lies in order.
        as_matrices: whether they are orthogonalised.
    """

    def __init__(
        self,
        backend: NativeBackend,
        lib: ctypes.CDLL,
        group: _Group,
        params: list[ParamState],
        flats: list[FlatViews],
        as_matrices: bool,
    ) -> None:
        self.backend, self.lib, self.group, self.as_matrices = backend, lib, group, as_matrices
        self.params, self.flats = params, flats
        self.copied = sum(p.numel for p, flat in zip(params, flats, strict=False) if flat.copied)
        if flats:
            self.addresses = array("q", [t.data_ptr() for flat in flats for t in flat.tensors])
        else:
            self.addresses = array("q", group.addresses)
            self.addresses[1 :: group.stride] = array("q", [p.grad.data_ptr() for p in params])
        contexts, self.which = contexts_of(params)
        self.scalars = scalars_of(contexts)

    def measure(self) -> TensorSums:
        sums = torch.empty(len(TensorSums._fields), len(self.params), dtype=torch.float64, device="cpu")
        self.lib.measure(
            len(self.params), at(self.group.sizes), at(self.addresses), at(self.scalars), at(self.which),
            sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return TensorSums(*sums.unbind())

    def apply(self, coefficients: Tensor) -> list[Tensor]:
        directions: list[Tensor] = []
        targets = array("q")
        if self.as_matrices:
            sizes = self.group.sizes.tolist()
            directions = list(torch.empty(sum(sizes), dtype=self.params[0].arithmetic, device="cpu").split(sizes))
            targets = array("q", [d.data_ptr() for d in directions])
        self.lib.apply(
            len(self.params), at(self.group.sizes), at(self.addresses), at(targets) if targets else None,
            at(self.scalars), at(self.which), coefficients.data_ptr(), coefficients.stride(0),
            self.backend.weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        for flat in self.flats:
            flat.write_back()
        if not self.as_matrices:
            have_changed(self.params)
        return directions


class _NativeHead:
    """The tensor head in one call.

    Args:
        head: the policy's, with configuration and weights.
        lib: of tensors with the same dtype of the arithmetic as those that it will be asked for.
        arithmetic: that dtype.
    """

    def __init__(self, head: TensorHead, lib: ctypes.CDLL, arithmetic: torch.dtype) -> None:
        config = head.config
        self.rows = coefficient_count(config)
        names = [k for k in config.weight_shapes() if k not in config.coordinate_weights()]
        self.weights = head.flat_weights(names).cpu()
        self.lib, self.dtype = lib, arithmetic
        self._last: _HeadGroup | None = None

    def __call__(self, params: list[ParamState], sums: TensorSums) -> tuple[Tensor, list[StepRecord]]:
        """As :class:`TensorHead`."""
        group = self._last
        if group is None or not group.is_of(params):
            group = self._last = _HeadGroup(params, self.dtype)
        contexts, which = contexts_of(params)
        step = array("d", [context.step for context in contexts])
        stacked_sums = torch.stack(sums)
        stacked = torch.empty(self.rows, len(params), dtype=torch.float64, device="cpu")
        seen = torch.empty(group.keys, len(params), dtype=torch.float64, device="cpu")
        group.copy_in()
        run = self.lib.guarded_head if group.keys == len(TensorState._fields) else self.lib.head
        run(
            len(params), self.weights.data_ptr(), group.shapes.numel.data_ptr(), group.shapes.context.data_ptr(),
            stacked_sums.data_ptr(), at(step), at(which), at(group.addresses), seen.data_ptr(), stacked.data_ptr(),
        )  # fmt: skip
        group.copy_out()
        state = TensorState(*seen.unbind())
        record = StepRecord(group.indices, [p.context for p in params], group.shapes.numel, sums, stacked, state)
        return stacked, [record]


class _HeadGroup(_Same):
    """Parameters with what does not change from step to step.

    Args:
        params: in one order.
        dtype: in which the kernel takes the tensor state; that of a checkpoint may be another.
    """

    def __init__(self, params: list[ParamState], dtype: torch.dtype) -> None:
        super().__init__(params)
        self.indices = [p.param_index for p in params]
        self.keys = len(params[0].tensor_state)
        shapes = TensorShapes.of([p.shape for p in params], roles=[p.role for p in params])
        self.shapes = shapes.counting([p.counted for p in params])
        self._state = [t for p in params for t in p.tensor_state]
        self._lay = [t.data_ptr() for t in self._state]
        used = [t.to("cpu", dtype) for t in self._state]  # mostly the same tensors
        self._copies = [(t, copy) for t, copy in zip(self._state, used, strict=True) if t is not copy]
        self.addresses = array("q", [t.data_ptr() for t in used])

    def is_of(self, params: list[ParamState]) -> bool:
        return super().is_of(params) and [t.data_ptr() for t in self._state] == self._lay

    def copy_in(self) -> None:
        for t, copy in self._copies:
            copy.copy_(t)

    def copy_out(self) -> None:
        for t, copy in self._copies:
            t.copy_(copy)


def _move_along(lib: ctypes.CDLL, params: list[ParamState], directions: list[Tensor], decays: Tensor) -> None:
    """Move contiguous parameters of one dtype along contiguous directions; decays are [len(params)] in float64."""
    contexts, which = contexts_of(params)
    scalars = scalars_of(contexts)
    sizes = array("q", [p.numel for p in params])
    targets = array("q", [p.param.data_ptr() for p in params])
    along = array("q", [d.data_ptr() for d in directions])
    threads = torch.get_num_threads()
    lib.move_along(
        len(params), at(sizes), at(targets), at(along), at(scalars), at(which), decays.data_ptr(), threads
    )  # fmt: skip
    have_changed(params)


def scalars_of(contexts: list[StepContext]) -> array:
    """Those of each context, one after the other."""
    return array("d", [float(x) for context in contexts for x in context.scalars])

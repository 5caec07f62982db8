"""Whether state belongs to its parameter: both may have been replaced, cut or cast by hand between two steps.

Kernels go by the parameter's size, so that state of another shape would be read beyond its end, or in another order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.param_state import ParamState
from learned_optim.engine.sharding import is_dtensor, local

#: Of tensors that are kept from step to step, seen as real numbers.
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Those that hold the number of a step without rounding it.
_COUNTS = (torch.float32, torch.float64)


class StateMismatch(RuntimeError):
    """State that does not fit its parameter; nothing has been changed."""


def check_fits(
    name: str,
    p: Tensor,
    state: Mapping[str, Any],
    coordinate_keys: Sequence[str],
    tensor_keys: Sequence[str],
    numbers: Sequence[int] = (),
    offloaded: bool = False,
) -> None:
    """Check the state of one parameter.

    Args:
        name: of the parameter, for the message.
        p: the parameter.
        state: its state, not empty.
        coordinate_keys: of the tensors in it that have the parameter's shape.
        tensor_keys: of the per-tensor state in it.
        numbers: shape of the per-tensor state: of a parameter that holds several tensors, how many.
        offloaded: state tensors lie on the host, wherever the parameter does.

    Raises:
        StateMismatch: something is missing, or of another shape, dtype, device or placement.
    """
    missing = [key for key in ("step", *coordinate_keys, *tensor_keys) if key not in state]
    if missing:
        raise _mismatch(name, f"{missing} are missing")
    for key in coordinate_keys:
        value = state[key]
        if found := _kind(value, p, offloaded) or _shape(value, p.shape) or _memory(value):
            raise _mismatch(name, f"{key} {found}, the parameter {_described(p)}")
    for key in tensor_keys:
        value = state[key]
        if found := _kind(value, None) or _shape(value, torch.Size(numbers)):
            raise _mismatch(name, f"{key} {found}, {_expected(numbers)}")
    step = state["step"]
    fits = isinstance(step, Tensor) and (step.numel() == 1 if not numbers else step.shape == torch.Size(numbers))
    if not fits or step.dtype not in _COUNTS:
        found = f"a tensor of shape {tuple(step.shape)} and {step.dtype}" if isinstance(step, Tensor) else repr(step)
        counts = f", {_expected(numbers)}" if numbers else ", expected a count in float32, torch.tensor(10.0)"
        raise _mismatch(name, f"step is {found}{counts}")


def _expected(numbers: Sequence[int]) -> str:
    if not numbers:
        return "expected a number of its own: a tensor without dimensions"
    return f"expected shape {tuple(numbers)}: a number for each tensor that stacked and split of its group say it holds"


def _kind(value: Any, p: Tensor | None, offloaded: bool = False) -> str:
    """What is wrong with type, dtype and place of a state tensor, or nothing."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if value.dtype.to_real() not in STATE_DTYPES or value.is_complex() != (p is not None and p.is_complex()):
        return f"is of {value.dtype}"
    if p is None:
        return ""
    if offloaded and value.device.type != "cpu":
        return f"lies on {value.device}, where offload=True keeps it on the host"
    if not offloaded and value.device != p.device:
        return f"lies on {value.device}"
    if is_dtensor(value) != is_dtensor(p):
        return "is sharded (a DTensor)" if is_dtensor(value) else "is whole (no DTensor)"
    if is_dtensor(p) and (value.placements, value.device_mesh) != (p.placements, p.device_mesh):  # pyright: ignore
        return f"is placed as {value.placements}"  # pyright: ignore[reportAttributeAccessIssue]
    return ""


def _shape(value: Tensor, expected: torch.Size) -> str:
    return "" if value.shape == expected else f"has shape {tuple(value.shape)}"


def _memory(value: Tensor) -> str:
    if value.layout is not torch.strided:
        return f"is of {value.layout}"
    spread = not is_dtensor(value) and any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True))
    return "is expanded: some of its entries lie in the same place" if spread else ""


def _described(p: Tensor) -> str:
    placed = f", placed as {p.placements}" if is_dtensor(p) else ""  # pyright: ignore[reportAttributeAccessIssue]
    return f"has shape {tuple(p.shape)}, {p.dtype}, on {p.device}{placed}"


def _mismatch(name: str, what: str) -> StateMismatch:
    return StateMismatch(
        f"the state of parameter {name!r} does not fit it: {what}. Nothing was changed. Change what is in "
        "opt.state[p] as p was changed, or let p start afresh: del opt.state[p]"
    )


def check_param(name: str, p: Tensor, grad: Tensor) -> None:
    """Check what torch checks where a gradient is set, since the parameter may have been replaced after that.

    Raises:
        StateMismatch: it has another shape, or lies elsewhere; or the parameter cannot be written to entry by entry,
            or holds no numbers, or not in memory of its own, or others than lie there.
    """
    if p.device.type == "meta":
        raise StateMismatch(
            f"parameter {name!r} is on the meta device, which holds no numbers to update. Nothing was changed. Give "
            "it some first, as model.to_empty() does"
        )
    if type(p) not in (Tensor, torch.nn.Parameter) and not _has_memory(local(p)):
        raise StateMismatch(
            f"parameter {name!r} is a {type(p).__name__}, a tensor without memory of its own, to which kernels could "
            "write. Nothing was changed. Give the optimizer plain tensors, such as those that it wraps"
        )
    if p.is_conj() or p.is_neg():
        raise StateMismatch(
            f"parameter {name!r} is a view that conjugates or negates what lies in memory. Nothing was changed. Make "
            "it a tensor of its own: torch.nn.Parameter(p.detach().resolve_conj().resolve_neg())"
        )
    if grad.shape != p.shape or grad.device != p.device:
        raise StateMismatch(
            f"the gradient of parameter {name!r} has shape {tuple(grad.shape)} on {grad.device}, the parameter has "
            f"shape {tuple(p.shape)} on {p.device}. Nothing was changed. Call zero_grad() after replacing p.data"
        )
    if found := _memory(p):
        raise StateMismatch(f"parameter {name!r} cannot be updated: it {found}. Nothing was changed. Copy it first")


def _has_memory(tensor: Tensor) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fake tensors, which have an address that is 0
        return tensor.numel() == 0 or tensor.data_ptr() != 0


def check_sparse(name: str, p: Tensor, grad: Tensor, is_packed: bool) -> None:
    """Check a gradient that is not strided.

    Raises:
        RuntimeError: it is not that of an embedding, whose rows are sparse, or the parameter is more than a tensor.
    """
    if grad.layout is not torch.sparse_coo or grad.sparse_dim() != 1 or p.ndim != 2:
        what = f"layout {grad.layout}, of the sparse ones only those of embeddings can be used: whole rows of a matrix"
    elif is_dtensor(p) or p.is_complex() or is_packed:
        what = "sparse rows, which go with real parameters alone that are neither sharded nor stacked nor split"
    else:
        return
    raise RuntimeError(
        f"the gradient of parameter {name!r} of shape {tuple(p.shape)} has {what}. Nothing was changed. Use "
        "sparse=False in the embedding"
    )


class Named(NamedTuple):
    """A parameter and what it is called."""

    name: str
    param: ParamState


def check_apart(params: Iterable[Named]) -> None:
    """Check that no two parameters share memory, or state: each would be changed by the other's step too.

    Raises:
        StateMismatch: two do.
    """
    owners: dict[tuple[bool, int], tuple[Named, str]] = {}
    for one in params:
        for key, what in one.param.identities():
            other, others_what = owners.setdefault(key, (one, what))
            if other.param.is_for(one.param):
                continue
            if what == others_what == "param":
                raise StateMismatch(
                    f"parameters {other.name!r} and {one.name!r} lie in the same memory, and each would undo the "
                    "other's step. Nothing was changed. Tie modules by the parameter itself, b.weight = a.weight, and "
                    "give the optimizer one of them"
                )
            raise StateMismatch(
                f"parameters {other.name!r} and {one.name!r} share state ({others_what}, {what}), and each would "
                "change it in its step. Nothing was changed. Give each its own: clone() every entry of opt.state[p]"
            )

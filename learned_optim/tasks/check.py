"""``check_task``: finds the usual mistakes in a user's task before hours are spent on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Task


def check_task(task: Any) -> None:
    """Runs one step of ``task`` and raises if the task cannot be trained on.

    Costs one ``init``, a few batches and two losses. The task's parameters are not changed, the global random
    state is not touched.

    Raises:
        TypeError: a member is missing, ``init`` does not return two dicts of tensors, the parameters are not
            floating point, or the loss is not a scalar tensor.
        ValueError: there are no parameters, the batches end or repeat differently from the same seed, the loss is
            NaN or infinite at the start, depends on the global random state, or reaches no parameter.
    """
    name = f"task {getattr(task, 'name', type(task).__name__)!r}"
    missing = [m for m in ("name", "length", "init", "batches", "loss") if not hasattr(task, m)]
    if missing or not isinstance(task, Task):
        raise TypeError(f"{name} lacks {', '.join(missing)}: see learned_optim.tasks.Task")
    if not isinstance(task.length, int) or task.length < 1:
        raise ValueError(f"{name}: length must be a positive int (inner steps), got {task.length!r}")
    params, buffers = _check_init(task, name)

    rng_state = torch.get_rng_state()
    try:
        batch = next(iter(task.batches(torch.Generator().manual_seed(0))))
    except StopIteration:
        raise ValueError(f"{name}: batches() must yield batches for ever, but yielded none") from None
    leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    with torch.enable_grad():
        loss = task.loss(leaves, {k: b.clone() for k, b in buffers.items()}, batch)
        _check_loss(loss, f"{name}: loss")
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else ()
    if not any(g is not None for g in grads):
        raise ValueError(f"{name}: the loss ignores the parameters it is given (no gradient reaches any of them)")
    bad = [k for k, g in zip(leaves, grads, strict=True) if g is not None and not bool(torch.isfinite(g).all())]
    if bad:
        raise ValueError(f"{name}: the gradient is NaN or infinite at the start for {', '.join(bad)}")

    evaluate = getattr(task, "eval_loss", None)
    if evaluate is not None:
        with torch.no_grad():
            _check_loss(evaluate(params, {k: b.clone() for k, b in buffers.items()}), f"{name}: eval_loss")
    if not torch.equal(rng_state, torch.get_rng_state()):
        raise ValueError(
            f"{name}: batches, loss or eval_loss draws from torch's global random state (dropout?); "
            "draw noise in batches(rng) and pass it in the batch"
        )


def _check_init(task: Task, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rng_state = torch.get_rng_state()
    result = task.init(torch.Generator().manual_seed(0))
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(d, dict) for d in result)):
        raise TypeError(f"{name}: init() must return two dicts (params, buffers), got {_describe(result)}")
    params, buffers = result
    for what, tensors in (("params", params), ("buffers", buffers)):
        for key, value in tensors.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: {what}[{key!r}] must be a tensor, got {_describe(value)}")
    if not params:
        raise ValueError(f"{name}: init() returned no parameters")
    for key, value in params.items():
        if not value.is_floating_point():
            raise TypeError(f"{name}: params[{key!r}] must be floating point, got {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: params[{key!r}] holds NaN or infinity at the start")
    again, _ = task.init(torch.Generator().manual_seed(0))
    same = again.keys() == params.keys() and all(torch.equal(again[k], params[k]) for k in params)
    if not same or not torch.equal(rng_state, torch.get_rng_state()):
        raise ValueError(f"{name}: init(rng) must depend on rng alone and leave torch's global random state untouched")
    return params, buffers


def _check_loss(loss: Any, name: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must return a scalar tensor, got {_describe(loss)}")
    if loss.dim() != 0:
        raise TypeError(f"{name} must return a scalar tensor, got shape {tuple(loss.shape)}: take .mean()?")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"{name} is {loss.item()} at the initial parameters")


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"

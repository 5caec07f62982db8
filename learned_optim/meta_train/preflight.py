"""What is found out before a run begins: a start that fails costs seconds, is explained, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from learned_optim.meta_train import distributed
from learned_optim.meta_train.checkpoint import check_folder
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.meta_optimizer import optimizer_class
from learned_optim.meta_train.trajectories import Plan, hyperparameters
from learned_optim.meta_train.vectorized import UnequalBatches, run_vectorized
from learned_optim.policy.policy import PARTS, Policy
from learned_optim.rule.config import PolicyConfig
from learned_optim.tasks import FAMILIES, TaskFamily, check_task
from learned_optim.tasks.base import Task, batches_of


def starting_policy(config: MetaTrainConfig, teacher: Policy | None) -> Policy:
    """The policy that ``config.start`` names. A GRU that is to imitate has all but its cell from its teacher."""
    if config.start == "new":
        return Policy(PolicyConfig())
    if config.start == "gru":
        around = {} if teacher is None else teacher.config.surroundings
        return Policy(PolicyConfig.gru(**around), generator=torch.Generator().manual_seed(config.seed))
    return Policy.from_pretrained(config.start)


def teacher_of(config: MetaTrainConfig) -> Policy | None:
    """The policy that is imitated, if any."""
    return Policy.from_pretrained(config.teacher) if config.estimator == "imitation" else None


def check_pupil(config: MetaTrainConfig, start: Policy, teacher: Policy | None, meta_loss: object) -> None:
    """Raise where imitation could not learn anything, or would not heed what it is given.

    Raises:
        ValueError: the start is the teacher, or there is a meta-loss of one's own.
    """
    if teacher is None:
        return
    if meta_loss is not None:
        raise ValueError("estimator 'imitation' has a meta-loss of its own: leave out meta_loss")
    if start.fingerprint() == teacher.fingerprint():
        raise ValueError(f"the start is the teacher itself, {config.teacher!r}: there is nothing to learn")


def check_same_run(saved: Mapping[str, Any], teacher: Policy | None, validation: Sequence[Task | TaskFamily]) -> None:
    """Raise where a checkpoint's teacher, by its fingerprint, or its validation tasks, by name, are other ones.

    Raises:
        ValueError: they are.
    """
    if teacher is not None and teacher.fingerprint() != saved.get("teacher"):
        raise ValueError("the teacher's weights have changed since the run began: resume with those it began with")
    before = sorted({name.rpartition("/")[0] for name in saved["before"]})
    now = sorted(task.name for task in validation)
    if before and before != now:
        raise ValueError(f"the run began with the validation tasks {before}, found {now}: resume with the same tasks")


def learned_names(config: MetaTrainConfig, policy: Policy) -> list[str]:
    """Names of what is learned: meta-parameters of the policy, and ``init`` for initial parameters.

    Raises:
        ValueError: the policy has none of the parts.
    """
    present = policy.weights()
    names = list(dict.fromkeys(n for part in config.parts for n in PARTS[part] if n in present))
    if config.learn == "init":
        return ["init"]
    if not names:
        raise ValueError(f"the policy (cell {policy.config.cell!r}) has none of the parts {config.parts}")
    return [*names, "init"] if config.learn == "both" else names


def check_settings(config: MetaTrainConfig, out: str | Path | None, resume: bool) -> None:
    """Raise unless there is the device that the run asks for, the meta-optimizer, and room for the run.

    Raises:
        ValueError: there is not.
        OSError: those of :func:`~learned_optim.meta_train.checkpoint.check_folder`.
    """
    if out is not None and distributed.rank() == 0:  # who will lock it
        check_folder(out, resume)
    optimizer_class(config.meta_optimizer)
    if config.device == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise ValueError(f"device 'cuda' cannot be used: {why}; take device 'cpu'")


def check_tasks(
    config: MetaTrainConfig,
    training: Sequence[Task | TaskFamily],
    validation: Sequence[Task | TaskFamily],
    policy: Policy,
) -> None:
    """Try every task, and of every family the first one.

    Tasks are checked by :func:`~learned_optim.tasks.check_task`, of the zoo's families the data and the first loss.
    Where runs are vectorized, two steps of that are made of tasks and families that are not the zoo's.

    With ``config.keep_going`` families to train on are not tried: others of their tasks may be sound.

    Raises:
        TypeError, ValueError: no task, two of one name, an unsound one, or one that cannot be vectorized; named, with
            what to do.
        ImportError: a module that a task needs is not installed.
    """
    vectorized = config.pairs > 1 or config.device != "cpu"
    _check_names("train", training)
    if config.validate_every:
        _check_names("validate", validation)
    tried = [family for family in training if not (config.keep_going and isinstance(family, TaskFamily))]
    for family in {id(family): family for family in (*tried, *validation)}.values():
        if isinstance(family, TaskFamily) and FAMILIES.get(family.name) is family:
            _try(family.name, lambda family=family: _first_loss(family.task(0)))
            continue
        task = family.task(0) if isinstance(family, TaskFamily) else family
        _try(family.name, lambda task=task: check_task(task))
        if vectorized and any(family is other for other in tried):
            check_vectorized(config, task, policy)


def _check_names(what: str, families: Sequence[Task | TaskFamily]) -> None:
    """Metrics, outcomes and gradients' sizes are kept by name: of two tasks of one name, one would not count."""
    if not families:
        raise ValueError(f"there is no task to {what} on: give at least one")
    by_name: dict[str, Task | TaskFamily] = {}
    for family in families:
        if not isinstance(name := getattr(family, "name", None), str):
            raise TypeError(f"expected tasks or families to {what} on, found {type(family).__name__} {family!r:.80}")
        if by_name.setdefault(name, family) is not family:
            raise ValueError(f"two tasks to {what} on are called {name!r}: give each a name of its own")


def check_vectorized(config: MetaTrainConfig, task: Task, policy: Policy) -> None:
    """Make two steps of two runs of a sound task as one batch of tensors.

    Raises:
        ValueError: that cannot be done; names the layer.
    """
    weights = {name: torch.stack([w, w]).detach() for name, w in policy.weights().items()}
    hyper = hyperparameters(policy.config, config.inner_lr, config.inner_weight_decay)
    plan = Plan(task.name, task, 0, 2, hyper)
    evaluate_at = (2,) if config.held_out_share > 0.0 else ()
    list(islice(batches_of(task, torch.Generator()), plan.length))  # what goes wrong here has other reasons
    with _entered_modules() as entered:
        try:
            run_vectorized(policy.config, weights, plan, 2, device=config.device, evaluate_at=evaluate_at)
        except UnequalBatches:
            pass  # such tasks are run one by one
        except Exception as error:  # what torch.func and what a task's own code raise is no closed list
            remedy = "pairs=1" if config.device == "cpu" else f"pairs=1 and device='cpu' in place of {config.device!r}"
            what = _layer(entered) or "something outside of its layers"
            internal = any(word in str(error) for word in ("vmap", "torch.func", "functorch", "atching rule"))
            why = "" if internal else f" ({type(error).__name__}: {error})"
            raise ValueError(
                f"the runs of task {task.name!r} cannot be vectorized because of {what}{why}: take {remedy}"
            ) from error


@contextmanager
def _entered_modules() -> Iterator[list[nn.Module]]:
    """The modules whose ``forward`` is under way, from the outermost on; after an error those it came from."""
    entered: list[nn.Module] = []

    def enter(module: nn.Module, args: object) -> None:
        entered.append(module)

    def leave(module: nn.Module, args: object, output: object) -> None:
        entered.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _layer(entered: Sequence[nn.Module]) -> str:
    """The innermost of the modules, by its name in the outermost one; empty if there is none."""
    if not entered:
        return ""
    name = next(name for name, module in entered[0].named_modules() if module is entered[-1])
    own = f"{type(entered[-1]).__name__}({entered[-1].extra_repr()})"
    return f"its layer {name!r}, {own}" if name else f"its module {own}"


def _first_loss(task: Task) -> None:
    params, buffers = task.init(torch.Generator().manual_seed(0))
    with torch.no_grad():
        task.loss(params, buffers, next(batches_of(task, torch.Generator().manual_seed(0))))


def _try(name: str, check: Callable[[], None]) -> None:
    """The check, whose errors name the task."""
    try:
        check()
    except ImportError as error:
        raise ImportError(f"task {name!r} cannot be used: {error}") from error
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise ValueError(
            f"task {name!r} holds tensors that were made in torch.inference_mode(), which nothing can be trained with: "
            "make it outside, or in torch.no_grad()"
        ) from error

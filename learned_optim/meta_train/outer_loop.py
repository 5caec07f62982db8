"""The outer loop: estimate the meta-gradient, step the meta-optimizer, validate, save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from learned_optim.meta_train import distributed, preflight
from learned_optim.meta_train.aggregate import GradientAggregator
from learned_optim.meta_train.backend import chosen_backend
from learned_optim.meta_train.checkpoint import RunFolder
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimator_choice import make_estimator
from learned_optim.meta_train.estimators import Estimate, GradientEstimator, Weights, with_weights, within_parts
from learned_optim.meta_train.guided import remember
from learned_optim.meta_train.meta_loss import META_LOSSES, MetaLossFn
from learned_optim.meta_train.meta_optimizer import meta_optimizer
from learned_optim.meta_train.problem import Problem
from learned_optim.meta_train.progress import Progress
from learned_optim.meta_train.result import MetaTrainResult, validations
from learned_optim.meta_train.signals import collected_signals, deliver
from learned_optim.meta_train.time_ratio import Outcome
from learned_optim.meta_train.trajectories import TaskSource, Trajectory
from learned_optim.meta_train.validation import mean_difference, validate
from learned_optim.policy.files import write_atomically
from learned_optim.policy.policy import Policy
from learned_optim.rule.cells import CELLS
from learned_optim.rule.config import PolicyConfig
from learned_optim.tasks import TaskFamily, get_families
from learned_optim.tasks.base import Task

COMPILING = "compiling the update rule, a minute or two the first time on a machine"

#: Attributes of a run that a checkpoint holds as they are.
_PLAIN = ("outer_step", "inner_steps", "seconds", "best_value", "stale", "failures")


def meta_train(
    config: MetaTrainConfig,
    tasks: Sequence[Task | TaskFamily] | None = None,
    *,
    validation: Sequence[Task | TaskFamily] | None = None,
    start: Policy | None = None,
    meta_loss: MetaLossFn | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    show_progress: bool | None = None,
) -> MetaTrainResult:
    """Meta-train a policy.

    Args:
        config: everything that decides the result.
        tasks: tasks or families to train on; ``None`` takes ``config.tasks`` from the zoo. A single task varies by
            its seed: initial parameters and batches.
        validation: tasks or families to validate on; ``None`` takes ``tasks`` (on seeds of their own) where those
            are given, and ``config.validation_tasks`` otherwise.
        start: policy to start from; ``None`` takes ``config.start``.
        meta_loss: ``(losses [T], reference) -> scalar`` in place of ``config.meta_loss`` (backprop, pes).
        out: folder for checkpoints, metrics and the resulting policies; ``None`` writes nothing.
        resume: continue the run in ``out``; with no checkpoint there, start from the beginning.
        show_progress: ``None`` shows a progress bar on terminals, and elsewhere a line every half minute; ``False``
            nothing.

    Returns:
        The policy with what led to it.

    Gradients are enabled inside, whatever is the case outside.

    On SIGINT or SIGTERM the outer step under way is finished and saved; standard error says so, with the time that is
    left. Then the signal is delivered again: SIGINT raises ``KeyboardInterrupt``, SIGTERM ends the process, and where
    the program has a handler that returns, ``stopped_by`` says which signal it was. A second signal does not wait.
    Neither does one before the first outer step.

    Raises:
        ValueError: settings that do not fit together, no such device, an unsound task, or one that cannot be
            vectorized (``pairs``); nothing has been run or written then.
        ImportError: a task needs a module that is not installed; likewise.
        KeyboardInterrupt: on SIGINT.
        OSError: ``out`` is a file, is in use, or holds a run and ``resume`` is false; likewise.
        RuntimeError: a task raised in the middle of the run (named), unless ``config.keep_going``.
    """
    families = get_families(config.tasks) if tasks is None else list(tasks)
    if validation is None:
        validation = get_families(config.validation_tasks) if tasks is None else families
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.inference_mode(False), torch.enable_grad(), distributed.process_group():
            preflight.check_settings(config, out, resume)
            teacher = preflight.teacher_of(config)
            start = start or preflight.starting_policy(config, teacher)
            config = config.with_parts(CELLS[start.config.cell].is_mixture)
            preflight.check_pupil(config, start, teacher, meta_loss)
            preflight.check_tasks(config, families, validation if config.validate_every else (), start)
            run = _Run(config, families, validation, start, teacher, meta_loss)
            folder = RunFolder(out, resume) if out is not None and distributed.rank() == 0 else None
            try:
                result = run.run(folder, resume, show_progress)
            finally:
                if folder is not None:
                    folder.close()
    finally:
        torch.set_num_threads(threads)
    if result.stopped_by is not None:
        deliver(result.stopped_by)
    return result


class _Run:
    """A run under way: the meta-parameters and all that a checkpoint holds."""

    def __init__(
        self,
        config: MetaTrainConfig,
        families: Sequence[Task | TaskFamily],
        validation: Sequence[Task | TaskFamily],
        start: Policy,
        teacher: Policy | None,
        meta_loss: MetaLossFn | None,
    ) -> None:
        self.config, self.families, self.validation, self.teacher = config, families, validation, teacher
        self.policy = with_weights(start, start.weights())
        self.policy.source = "meta-trained"
        self.source = TaskSource(families, config, start.config)
        self.meta_loss = meta_loss or META_LOSSES[config.meta_loss]
        self.backend: str = chosen_backend(config, start.config, families)
        self.trajectories: dict[int, Trajectory] = {}  #: under way, by slot
        self.guides: list[Weights] = []  #: recent back-propagated gradients (``guided``)
        self.aggregator = GradientAggregator(config.clip, by_family=not config.compares_runs)
        self.learned = preflight.learned_names(config, self.policy)
        self.init: torch.nn.Parameter | None = None
        self.init_problem: Problem | None = None
        if config.learn != "policy":
            self.init_problem = Problem(self.source.draw(0, 0).task, config.seed)
            self.init = torch.nn.Parameter(self.init_problem.start(start.config).params)
        weights = self.policy.weights()
        params = [weights[n] if n != "init" else self.init for n in self.learned]
        self.meta_optimizer = meta_optimizer(config, [p for p in params if p is not None])
        self.outer_step = self.inner_steps = 0
        self.seconds = 0.0
        self.before: dict[str, Outcome] = {}  #: validation of the start
        self.best_value = 0.0  #: see ``mean_difference``; lower is better
        self.best = self._copy()
        self.stale = 0  #: validations since the best one
        self.failures: dict[str, int] = {}
        self.start_source = start.source

    def run(self, folder: RunFolder | None, resume: bool, show_progress: bool | None) -> MetaTrainResult:
        config = self.config
        history: list[dict[str, Any]] = []
        saved = distributed.from_first(folder.load(config) if folder is not None and resume else None)
        if saved is not None:
            self._restore(saved)
        if folder is not None:
            folder.start(config)
            history = folder.rewind(self.outer_step)
        under_way = (self.trajectories, self.guides, self.teacher)
        estimator = make_estimator(self.source, config, self.meta_loss, self.backend, *under_way)
        compiling = COMPILING if self.backend == "compiled" else ""
        bar = Progress(
            config, self.outer_step, folder.path if folder else None,
            show_progress if distributed.rank() == 0 else False, compiling,
        )  # fmt: skip
        try:
            if saved is None and config.validate_every:  # nothing is lost yet by an end at once
                bar.doing(f"validating the start; {compiling}".removesuffix("; "))
                self.before = self._validation_outcomes()
                bar.doing(compiling)
            stop = self._outer_steps(estimator, folder, history, bar)
        finally:
            bar.close()
        policy, init = self.best
        return MetaTrainResult(policy, self._copy()[0], history, init, stop)

    def _outer_steps(
        self, estimator: GradientEstimator, folder: RunFolder | None, history: list[dict[str, Any]], bar: Progress
    ) -> int | None:
        """Those that are left, each logged; returns the number of the signal that came in."""
        config = self.config
        stop = None
        with collected_signals(bar.stopping, together=0.0 if distributed.world_size() == 1 else 1.0) as received:

            def ends() -> bool:  # on entry too: a run that is resumed may have come to its end
                return stop is not None or self.outer_step >= config.outer_steps or 0 < config.patience <= self.stale

            while not ends():
                metrics = self._outer_step(estimator)
                history.append(metrics)
                if folder is not None:
                    folder.log(metrics)
                bar.update(metrics, self.best_value)
                caught = [s for s in distributed.gather(list(received)) if s]
                stop = caught[0] if caught else None
                if ends() or self.outer_step % config.save_every == 0:
                    self._save(folder)
            last = self._copy()
            if not validations(history):
                self.best = last  # nobody was asked yet
            if folder is not None:
                self._write(folder, "best", self.best)
                self._write(folder, "final", last)
        return stop or next(iter(received), None)

    def _outer_step(self, estimator: GradientEstimator) -> dict[str, Any]:
        begun, config = time.perf_counter(), self.config
        init = None if self.init is None else self.init.detach().clone()
        estimates: list[Estimate] = []
        failed: list[tuple[str, str]] = []
        for slot in distributed.mine(config.meta_batch):
            try:
                estimates.append(estimator.estimate(self.policy, self.learned, slot, self.outer_step, init))
            except Exception as error:
                trajectory = self.trajectories.pop(slot, None)
                name = (trajectory.plan if trajectory else self.source.draw(slot, self.outer_step)).task.name
                what = f"{type(error).__name__}: {error}"
                if not config.keep_going:
                    raise RuntimeError(f"task {name!r} raised at outer step {self.outer_step}: {what}") from error
                failed.append((name, what))
        estimates = sorted(distributed.gather(estimates), key=lambda e: e.slot)
        failed = distributed.gather(failed)
        for name, _ in failed:
            self.failures[name] = self.failures.get(name, 0) + 1
        remember(self.guides, estimates, config.guides)
        gradient = within_parts(self.aggregator(estimates, self.learned), config)
        self._apply(gradient)
        self.inner_steps += sum(e.inner_steps for e in estimates)
        metrics: dict[str, Any] = {
            "outer_step": self.outer_step,
            "meta_loss": sum(e.meta_loss for e in estimates) / max(len(estimates), 1),
            "gradient_norm": sum(float(g.square().sum()) for g in gradient.values()) ** 0.5,
            "inner_steps": self.inner_steps,
            "dropped": self.aggregator.dropped,
            "clipped": self.aggregator.clipped,
            "families": {e.family: round(e.meta_loss, 6) for e in estimates},
        }
        if self.failures:
            metrics["failures"] = dict(self.failures)
        if failed:
            metrics["errors"] = dict(failed)
        self.outer_step += 1
        if config.validate_every and self.outer_step % config.validate_every == 0:
            metrics["validation"] = self._validate()
        self.seconds += max(0.0, time.perf_counter() - begun)  # of a machine whose clocks were set back
        metrics["seconds"] = round(self.seconds, 3)
        return metrics

    def _apply(self, gradient: dict[str, Tensor]) -> None:
        weights = self.policy.weights()
        for name in self.learned:
            target = self.init if name == "init" else weights[name]
            if target is not None:
                target.grad = gradient.get(name)
        self.meta_optimizer.step()

    def _validate(self) -> float:
        """Change of the time to train the validation tasks, against the start; keeps the policy if it is the best."""
        after = self._validation_outcomes()
        value = mean_difference(after, self.before, self.config.held_out_share)
        if value < self.best_value:
            self.best_value, self.best, self.stale = value, self._copy(), 0
        else:
            self.stale += 1
        return value

    def _validation_outcomes(self) -> dict[str, Outcome]:
        return validate(self.policy, self.validation, self.config, self.backend, self._learned_init())

    def _learned_init(self) -> dict[str, Tensor] | None:
        """The learned initial parameters as they stand, by name."""
        if self.init is None or self.init_problem is None:
            return None
        return {n: t.clone() for n, t in self.init_problem.views(self.init.detach()).items()}

    def _copy(self) -> tuple[Policy, dict[str, Tensor] | None]:
        return with_weights(self.policy, self.policy.weights()), self._learned_init()

    def _write(self, folder: RunFolder, name: str, what: tuple[Policy, dict[str, Tensor] | None]) -> None:
        policy, init = what
        config = self.config
        training = {
            "method": config.estimator,
            "start": self.start_source,
            "tasks": sorted(family.name for family in self.families),
            "outer_steps": self.outer_step,
            "inner_steps": self.inner_steps,
            "core_hours": round(self.seconds * distributed.world_size() / 3600, 4),
            "seeds": [config.seed],
            "settings": config.to_dict(),
        }
        results = {"training": training}
        if config.validate_every:
            value = self.best_value if name == "best" else None
            results["validation"] = {"tasks": sorted(self.before), "mean_log_time_change": value}
        policy.save_pretrained(folder.path / name, results=results)
        if init is not None:
            data = save({k: v.contiguous() for k, v in init.items()})
            write_atomically(folder.path / name / "init.safetensors", data)

    def _save(self, folder: RunFolder | None) -> None:
        trajectories = distributed.gather([t.saved() for t in self.trajectories.values()])
        if folder is None:
            return
        best, best_init = self.best
        folder.save(
            {
                "config": self.config.to_dict(),
                **{name: getattr(self, name) for name in _PLAIN},
                "before": {name: list(outcome) for name, outcome in self.before.items()},
                "policy_config": self.policy.config.to_dict(),
                "weights": {n: w.detach().clone() for n, w in self.policy.weights().items()},
                "init": None if self.init is None else self.init.detach().clone(),
                "best": {n: w.detach().clone() for n, w in best.weights().items()},
                "best_init": best_init,
                "meta_optimizer": self.meta_optimizer.state_dict(),
                "aggregator": self.aggregator.state(),
                "guides": list(self.guides),
                "teacher": self.teacher and self.teacher.fingerprint(),
                "backend": self.backend,
                "trajectories": trajectories,
            }
        )
        self._write(folder, "best", self.best)

    def _restore(self, saved: dict[str, Any]) -> None:
        if PolicyConfig.from_dict(saved["policy_config"]) != self.policy.config:
            raise ValueError("the checkpoint holds a policy of another architecture than the one to start from")
        preflight.check_same_run(saved, self.teacher, self.validation)
        self.policy.load_state_dict(saved["weights"])
        if self.init is not None:
            with torch.no_grad():
                self.init.copy_(saved["init"])
        self.best = (with_weights(self.policy, saved["best"]), saved["best_init"])
        for name in _PLAIN:
            setattr(self, name, saved[name])
        self.before = {name: Outcome(*marks) for name, marks in saved["before"].items()}
        self.meta_optimizer.load_state_dict(saved["meta_optimizer"])
        self.aggregator.load(saved["aggregator"])
        self.guides[:] = saved["guides"]
        self.backend = saved["backend"]  # of the run as it began, however long it is to be by now
        mine = set(distributed.mine(self.config.meta_batch))
        for values in saved["trajectories"]:
            if values["slot"] in mine:
                trajectory = Trajectory.restored(values, self.source, self.backend == "compiled")
                self.trajectories[trajectory.slot] = trajectory

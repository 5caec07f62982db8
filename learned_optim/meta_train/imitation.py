"""Imitation: a new rule learns to go where another one would go (Chen et al. 2020, "Training stronger baselines for
learning to optimize", arXiv 2010.09089).

The teacher trains a network. The student sees the same parameters and gradients, keeps a state of its own, and is asked
at every step in which direction d it would go. With d* the teacher's, before matrices are orthogonalised, the meta-loss
of a window is the mean over its steps and the network's tensors of

    log(1 + |d - d*|^2 / |d*|^2)

back-propagated through the student's state; vectors count as much as matrices. It is 0 for a student that goes the
teacher's way, and log 2 for one that stands still. Nothing is back-propagated through the network that is trained, so
gradients do not explode, and a window teaches as much at the end of a run as at its beginning.

Two things a student does not learn here. It never sees its own mistakes, only the teacher's way: other estimators go on
from there. And what comes after d is not imitated, orthogonalising and weight decay: a student does what its own
configuration says. A ``start="gru"`` takes all but the cell from the teacher's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimators import Estimate, Truncated
from learned_optim.meta_train.meta_loss import final
from learned_optim.meta_train.trajectories import TaskSource, Trajectory, hyperparameters
from learned_optim.policy.policy import Policy
from learned_optim.rule.layouts import WholeLayout
from learned_optim.rule.update import direction, orthogonalize_and_move


class Imitation(Truncated):
    """See the module's docstring.

    Args:
        source: where trajectories come from.
        config: of the run.
        teacher: who is imitated.
        trajectories: those under way, by slot, which are kept up to date.
    """

    def __init__(
        self,
        source: TaskSource,
        config: MetaTrainConfig,
        teacher: Policy,
        trajectories: dict[int, Trajectory] | None = None,
    ) -> None:
        super().__init__(source, config, final, "eager", trajectories)  # the meta-loss is its own
        self.teacher = teacher

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        trajectory, batches = self._window(policy, slot, outer_step, 2, init)
        plan, problem, teacher = trajectory.plan, trajectory.problem, self.teacher.config
        student, led = trajectory.states
        if led.step == 0:
            led = problem.start(teacher)
        weights = {name: w.detach().requires_grad_(name in learned) for name, w in policy.weights().items()}
        of_teacher = {name: w.detach() for name, w in self.teacher.weights().items()}
        params, state, tensor_state, step, buffers = student
        errors = []
        for batch in batches[:-1]:
            grad = problem.clipped(problem.gradient(params, buffers, batch)[1])
            hyper, step = plan.hyper_at(step), step + 1
            t = float(problem.steps_before + step)
            with torch.no_grad():
                its_hyper = hyperparameters(teacher, float(hyper.lr), float(hyper.weight_decay))
                wanted, coeff, of_led, of_led_tensors = direction(
                    of_teacher, teacher, problem.layout, params, grad, led.coordinate_state, led.tensor_state, t,
                    its_hyper,
                )  # fmt: skip
                led = led._replace(coordinate_state=of_led, tensor_state=of_led_tensors)
            d, _, state, tensor_state = direction(
                weights, policy.config, problem.layout, params, grad, state, tensor_state, t, hyper
            )
            errors.append(error(problem.layout, d, wanted))
            with torch.no_grad():
                decay = torch.as_tensor(coeff.decay)
                params = orthogonalize_and_move(
                    teacher, problem.layout, params, wanted, t, its_hyper, teacher.orthogonal, decay
                )
        meta_loss = torch.stack(errors).mean()
        asked = {name: w for name, w in weights.items() if name in learned}
        grads = torch.autograd.grad(meta_loss, list(asked.values()), allow_unused=True, materialize_grads=True)
        student = student._replace(
            params=params, coordinate_state=state, tensor_state=tensor_state, step=step, buffers=buffers
        )
        trajectory.states = [student.detached(), led._replace(params=params, step=step).detached()]
        gradient = dict(zip(asked, grads, strict=True))
        return Estimate(slot, plan.family, gradient, float(meta_loss.detach()), len(batches) - 1)


def error(layout: WholeLayout, d: Tensor, wanted: Tensor) -> Tensor:
    """The mean over the tensors that the teacher moves of log(1 + |d - d*|^2 / |d*|^2)."""
    off, length = layout.inner(d - wanted, d - wanted), layout.inner(wanted, wanted)
    moved = length != 0.0  # what is not a number counts, and is not learned from
    relative = off / torch.where(moved, length, 1.0)
    return torch.where(moved, relative, 0.0).log1p().sum() / moved.sum().clamp(min=1)

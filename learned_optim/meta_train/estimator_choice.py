"""The estimator that a configuration names."""

from __future__ import annotations

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimators import ES, PES, BackpropTruncated, GradientEstimator, Mixed, Weights
from learned_optim.meta_train.guided import GuidedES
from learned_optim.meta_train.imitation import Imitation
from learned_optim.meta_train.meta_loss import MetaLossFn
from learned_optim.meta_train.trajectories import TaskSource, Trajectory
from learned_optim.policy.policy import Policy


def make_estimator(
    source: TaskSource,
    config: MetaTrainConfig,
    meta_loss: MetaLossFn,
    backend: str,
    trajectories: dict[int, Trajectory] | None = None,
    guides: list[Weights] | None = None,
    teacher: Policy | None = None,
) -> GradientEstimator:
    """The estimator of a run.

    Args:
        source: where trajectories come from.
        config: of the run.
        meta_loss: of a window; ``es`` and ``guided`` compare the time of whole trajectories instead.
        backend: how the update rule is run: ``eager`` or ``compiled``.
        trajectories: those under way, by slot, which the estimator keeps up to date; ``es`` and ``guided`` have none.
        guides: recent back-propagated gradients, which the caller keeps up to date (``guided``).
        teacher: who is imitated (``imitation``).
    """
    if config.estimator == "es":
        return ES(source, config, None, backend)
    if config.estimator == "guided":
        return GuidedES(source, config, backend, [] if guides is None else guides)
    if teacher is not None:
        return Imitation(source, config, teacher, trajectories)
    cls = {"backprop": BackpropTruncated, "pes": PES, "mixed": Mixed}[config.estimator]
    return cls(source, config, meta_loss, backend, trajectories)

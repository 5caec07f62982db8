"""The numbers of a step as tensors of the device, where launches that are captured or replayed can read them.

Step count, learning rate and what follows from both (:class:`~learned_optim.rule.types.StepScalars`) change with every
step. As Python floats they would be frozen into a CUDA graph. Here each context of a step (:class:`StepContext`) is a
row of ``WIDTH`` numbers in float64, whose 0-d views :class:`DeviceContext` names. There are two ways to fill rows:

    DeviceRows        the host computes them and sends them in one copy, so their bits are those of the plain step
    contexts_on_gpu   the device computes them from step counts that lie there: ``capturable=True``, where a replay of
                      the user's own graph never comes by the host
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.engine.hyperparameters import StepContext
from learned_optim.engine.packing import to_device
from learned_optim.rule.types import Hyperparameters, StepScalars

_SCALARS = len(StepScalars._fields)
#: The step and its scalars.
WIDTH = 1 + _SCALARS


class DeviceContext(StepContext):
    """A row of numbers on the device, by name.

    Args:
        row: [WIDTH], float64.
        hyper: for diagnostics.
    """

    def __init__(self, row: Tensor, hyper: Hyperparameters) -> None:
        step, *rest = row.unbind()
        self.step, self.hyper, self.scalars = step, hyper, StepScalars(*rest)


class DeviceRows:
    """Rows at fixed addresses, written anew for each step.

    Args:
        contexts: one for each row, of the step in which they are made.
        device: where the rows lie.
    """

    def __init__(self, contexts: Sequence[StepContext], device: torch.device) -> None:
        self._rows = torch.zeros(len(contexts), WIDTH, dtype=torch.float64, device=device)
        self.contexts = [DeviceContext(row, c.hyper) for row, c in zip(self._rows, contexts, strict=True)]

    def write(self, contexts: Sequence[StepContext]) -> None:
        """Send the numbers of a step, in one copy that waits for nothing.

        The memory on the host is new each time: it must stay as it is until a GPU that lags behind has read it.
        """
        rows = [(c.step, *c.scalars) for c in contexts]
        self._rows.copy_(to_device(rows, torch.float64, self._rows.device), non_blocking=True)


def contexts_on_gpu(counts: Sequence[Tensor], hyper: Hyperparameters) -> list[StepContext]:
    """The contexts of parameters of a group, from their step counts, without the host looking at any of them.

    Args:
        counts: 0-d each, on one device.
        hyper: the group's; what is a tensor is read on the device.
    """
    step = torch.stack([count.view(()) for count in counts]).double()
    scalars = StepScalars.at(step, hyper)
    values = [step, *scalars]
    columns = [x.expand(len(step)) if isinstance(x, Tensor) else torch.full_like(step, x) for x in values]
    return [DeviceContext(row, hyper) for row in torch.stack(columns, dim=1)]

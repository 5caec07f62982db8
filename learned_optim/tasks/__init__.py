"""Tasks to train on: the protocol, an adapter for ``nn.Module``, and a zoo of small tasks that need no download."""

from .augment import augment
from .base import Batch, ModuleTask, Task, TaskFamily, Tensors, map_batch, to_device
from .check import check_task
from .registry import FAMILIES, get_families

__all__ = [
    "FAMILIES",
    "Batch",
    "ModuleTask",
    "Task",
    "TaskFamily",
    "Tensors",
    "augment",
    "check_task",
    "get_families",
    "map_batch",
    "to_device",
]

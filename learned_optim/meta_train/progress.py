"""What a user sees of a run: a progress bar on terminals, TensorBoard where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class Progress:
    """Outer step, meta-loss, speed and time left; silent where standard error is no terminal.

    Args:
        total: outer steps of the whole run.
        done: outer steps made before.
        folder: TensorBoard's logs go to its ``tensorboard`` folder, if TensorBoard is installed.
        show: ``False`` shows nothing; ``None`` shows the bar on terminals.
        first: what is said until the first outer step is done.
    """

    def __init__(self, total: int, done: int, folder: Path | None, show: bool | None, first: str) -> None:
        from tqdm import tqdm

        disable = None if show is None else not show
        self._bar = tqdm(
            total=total, initial=done, unit="outer step", disable=disable, file=sys.stderr, dynamic_ncols=True,
            desc=first or None,
        )  # fmt: skip
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def update(self, metrics: dict[str, Any]) -> None:
        """Show one outer step."""
        shown = {k: f"{metrics[k]:.3f}" for k in ("meta_loss", "validation") if metrics.get(k) is not None}
        self._bar.set_description_str(refresh=False)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "outer_step":
                    self._writer.add_scalar(name, value, metrics["outer_step"])

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

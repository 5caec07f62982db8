"""What a user sees of a run: a bar on terminals, a line now and then elsewhere, TensorBoard where it is installed."""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learned_optim.meta_train.config import MetaTrainConfig

#: Seconds between two lines, where there is no terminal for a bar.
LINE_EVERY = 30.0


class TimedLines:
    """A line on standard error every ``LINE_EVERY`` seconds until it is closed; none where that comes sooner.

    A thread writes it: what is under way may take longer than that.

    Args:
        describe: what is written.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe, self._closed = describe, threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while not self._closed.wait(LINE_EVERY):
            sys.stderr.write(f"{self._describe()}\n")
            sys.stderr.flush()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def how_far(done: float, total: float, seconds: float) -> str:
    """``"in 01:20, about 02:40 left"``.

    Args:
        done: what was done in this time, in any unit.
        total: what is to be done, in the same one.
        seconds: time that passed.
    """
    return _passed(seconds, seconds * (total - done) / done if done > 0 else None)


def _passed(seconds: float, left: float | None) -> str:
    from tqdm import tqdm

    text = f"in {tqdm.format_interval(seconds)}"
    return text if left is None else f"{text}, about {tqdm.format_interval(left)} left"


class Progress:
    """Outer step, meta-loss, validation, speed and time left.

    Args:
        config: of the run.
        done: outer steps made before.
        folder: TensorBoard's logs go to its ``tensorboard`` folder, if TensorBoard is installed.
        show: ``False`` shows nothing; ``None`` shows a bar on terminals and lines elsewhere; ``True`` always a bar.
        first: what is said until the first outer step is done.
    """

    def __init__(self, config: MetaTrainConfig, done: int, folder: Path | None, show: bool | None, first: str) -> None:
        from tqdm import tqdm

        self._config, self._done = config, done
        self._show, self._doing = show, first
        self._metrics: dict[str, str] = {}  #: the last of each
        self._start = self._step_start = time.monotonic()
        self._took: dict[bool, list[float]] = {False: [], True: []}  #: seconds of outer steps, by whether they validate
        self._validating_took = 0.0  #: seconds, of the start
        self._late: list[str] = []
        disable = None if show is None else not show
        self._bar = tqdm(
            total=config.outer_steps, initial=done, unit="outer step", disable=disable, file=sys.stderr,
            dynamic_ncols=True, desc=first or None,
        )  # fmt: skip
        self._lines = TimedLines(self._line) if show is None and self._bar.disable else None
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def doing(self, what: str) -> None:
        """Say what is done before the first outer step: validating the start, and what is to follow."""
        now = time.monotonic()
        self._validating_took, self._step_start = now - self._step_start, now
        self._doing = what
        self._bar.set_description_str(what)
        self._bar.unpause()  # its rate is that of outer steps

    def update(self, metrics: dict[str, Any], best: float) -> None:
        """Show one outer step.

        Args:
            metrics: of it.
            best: lowest validation so far; 0 is the start's.
        """
        now = time.monotonic()
        self._took["validation" in metrics].append(now - self._step_start)
        self._step_start = now
        self._done, self._doing = metrics["outer_step"] + 1, ""
        self._metrics |= {k: f"{metrics[k]:.3f}" for k in ("meta_loss", "validation") if metrics.get(k) is not None}
        if "validation" in metrics:
            self._metrics["best"] = f"{best:.3f}" if best < 0.0 else "the start"
        self._say_late()
        self._bar.set_description_str(refresh=False)
        self._bar.set_postfix(self._metrics, refresh=False)
        self._bar.update()
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "outer_step":
                    self._writer.add_scalar(name, value, metrics["outer_step"])

    def stopping(self) -> None:
        """Say that the run ends after the outer step under way; called where a signal comes in."""
        validates, about = self._validates(), ""
        if self._took[validates]:
            left = self._took[validates][-1] - (time.monotonic() - self._step_start)
            about = f" (about {max(left, 1.0):.0f} s)"
        what = "this outer step and its validation" if validates else "this outer step"
        self.say(f"finishing {what}{about}; again to stop now")

    def say(self, text: str) -> None:
        """A line of its own, at once; for the log where nothing is to be shown."""
        if self._show is False:
            logging.getLogger(__name__).info(text)
            return
        clear = "" if self._bar.disable else "\r\x1b[K"
        try:
            sys.stderr.write(f"{clear}{text}\n")
            sys.stderr.flush()
        except RuntimeError:  # in a signal handler, in the middle of another write, which cannot be entered twice
            self._late.append(text)

    def _say_late(self) -> None:
        late, self._late = self._late, []
        for text in late:
            self.say(text)

    def _validates(self) -> bool:
        """Whether the outer step under way does, in its end."""
        every = self._config.validate_every
        return bool(every) and (self._done + 1) % every == 0

    def _left(self, now: float) -> float | None:
        """Seconds until the run ends, if any outer step has been timed. Validations take many times as long."""
        plain, validating = self._took[False], self._took[True]
        if not plain and not validating:
            return None
        each = statistics.fmean(plain or validating)
        validating_each = statistics.fmean(validating) if validating else each + self._validating_took
        total, every = self._config.outer_steps, self._config.validate_every
        validations = total // every - self._done // every if every else 0
        under_way = min(now - self._step_start, validating_each if self._validates() else each)
        return max(0.0, validations * validating_each + (total - self._done - validations) * each - under_way)

    def _line(self) -> str:
        now = time.monotonic()
        details = [self._doing] if self._doing else [f"{k} {v}" for k, v in self._metrics.items()]
        if self._validates() and not self._doing:
            details.append("this one validates")
        steps = f"{self._done} of {self._config.outer_steps} outer steps"
        return "; ".join([f"{steps} {_passed(now - self._start, self._left(now))}", *details])

    def close(self) -> None:
        self._say_late()
        if self._lines is not None:
            self._lines.close()
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

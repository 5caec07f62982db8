"""SIGINT and SIGTERM wait until an outer step is done; a second one does not."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def collected_signals(notice: Callable[[], None], together: float = 0.0) -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM for the body instead of letting it end it.

    A second one is the program's own again: SIGINT raises KeyboardInterrupt, SIGTERM ends the process, unless handlers
    of its own say otherwise.

    Args:
        notice: called when the first one comes.
        together: seconds within which signals count as one. torchrun passes on what the terminal has sent to the same
            processes already.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    first_at = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first_at
        if not received:
            received.append(number)
            first_at = time.monotonic()
            notice()
        elif time.monotonic() - first_at >= together:
            restore()
            deliver(number)

    def restore() -> None:
        for number, handler in previous.items():
            if handler is not None:  # None: not set from Python, and not to be set from it
                signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def deliver(number: int) -> None:
    """What a signal would have done if it had not been collected.

    Raises:
        KeyboardInterrupt: for SIGINT, where nobody has set a handler; also where it is ignored, as in processes that
            a script has put into the background, for somebody has sent it nevertheless.
    """
    if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(number)

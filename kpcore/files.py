"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

_ENDING = ("SIGTERM", "SIGHUP")  # that end a process without an exception, where nobody handles them


@contextmanager
def whole(path):
    """The path of a file to write, beside `path` and of its kind; it takes its place after the block, or is removed.

    Also by a signal that ends the process, in the main thread: Python hears of signals only there.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with _removed_by_signals(part):
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _removed_by_signals(part):
    def remove_and_end(number, frame):
        part.unlink(missing_ok=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        there = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
        numbers = [number for number in there if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, remove_and_end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

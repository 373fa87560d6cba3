"""Shared by the commands: what they print and where, progress, the error for invalid options, output folders.

Results go to standard output; progress, warnings and errors to standard error. `say` prints what is said on the way
to a result, which --quiet leaves out; results themselves are printed by `print`. With --json all of that is left out,
as `kpcore.cli` then prints one object.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.config import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO

    from kpcore.pipeline.voting import Scores

SECONDS_BETWEEN_LINES = 60.0  # of progress, where no terminal shows a bar
_BAR = {"leave": False, "nrows": 24, "unit": " steps"}
_COLUMNS = (110, 140)  # of a bar, if the terminal does not say how many it has, and at most
_WITH_RATE = "{desc:WIDTH}{bar:30}{percentage:4.0f} %  {rate_fmt}  {elapsed}<{remaining}{postfix}"
_WITHOUT_RATE = "{desc:WIDTH}{bar:30}{percentage:4.0f} %  {elapsed}<{remaining}{postfix}"


class Refused(ValueError):
    """The options of a command are invalid or do not fit its input."""


@dataclass
class _Printing:
    """What is printed by the command that runs, and its bar, which lines must not be printed into."""

    quiet: bool = False
    verbose: bool = False
    bar: Progress | None = None


_printing = _Printing()


@contextmanager
def printing(quiet: bool, verbose: bool) -> Iterator[None]:
    """Let `say`, `detail` and `Progress` print in the block as the options --quiet and -v say."""
    global _printing
    before, _printing = _printing, _Printing(quiet, verbose)
    try:
        yield
    finally:
        _printing = before


def say(*lines: object) -> None:
    """Print lines on standard output, unless --quiet."""
    if not _printing.quiet:
        for line in lines:
            print_line(line)


def detail(line: object) -> None:
    """Print a line on standard output, with -v only."""
    if _printing.verbose:
        print_line(line)


def print_line(line: object, file: TextIO | None = None) -> None:
    """Print a line on standard output or on `file`, above the bar if there is one."""
    if _printing.bar:
        _printing.bar.write(str(line), file)
    else:
        print(line, file=file)


class Progress:
    """The progress of a command: a bar on a terminal, else a line a minute on standard error; none with --quiet.

    Parameters
    ----------
    what : str
        What is done at the moment.
    total : float
        Steps, or the default 1 for a fraction.
    done : float
        What was done before, by a run that is resumed.
    rate : bool
        Whether the bar shows the number of steps in a second.
    width : int
        Of the text before the bar.
    """

    def __init__(self, what: str, total: float = 1.0, done: float = 0.0, rate: bool = False,
                 width: int = 26) -> None:  # fmt: skip
        self.what, self.total, self.done = what, total, done
        self._format = (_WITH_RATE if rate else _WITHOUT_RATE).replace("WIDTH", str(width))
        self._first, self._began = done, time.perf_counter()
        self._printed = self._began
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not _printing.quiet and sys.stderr.isatty():
            unknown, most = _COLUMNS
            columns = min(most, shutil.get_terminal_size((unknown, 24)).columns)
            self._bar = require("tqdm", "io").tqdm(
                desc=self.what, total=self.total, initial=self.done, bar_format=self._format, ncols=columns, **_BAR
            )
            _printing.bar = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            _printing.bar = None
            self._bar.close()

    def to(self, done: float, what: str | None = None, note: str = "", more: str = "") -> None:
        """Show that `done` of the total is done; `note` is shown beside the bar, and in a line after `more`."""
        is_new, is_back = what not in (None, self.what), done < self.done
        self.what, self.done = what or self.what, done
        if is_back:  # another task begins, of which nothing is known of the time that is left
            self._first, self._began = done, time.perf_counter()
            if self._bar is not None:
                self._bar.reset()
        if self._bar is not None:
            self._bar.set_description_str(self.what, refresh=False)
            self._bar.set_postfix_str(f"  {note}" if note else "", refresh=False)
            self._bar.update(done - self._bar.n)
            if is_new:
                self._bar.refresh()
        elif not _printing.quiet and time.perf_counter() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.perf_counter()
            parts = [self.what, more, note, f"{100 * self.done / self.total:.0f} % done", self._left()]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def step(self, what: str | None = None, note: str = "", more: str = "") -> None:
        """Show that one more step is done."""
        self.to(self.done + 1, what, note, more)

    def write(self, line: str, file: TextIO | None = None) -> None:
        """Print a line above the bar."""
        self._bar.write(line, file)

    def _left(self) -> str:
        if self.done <= self._first:
            return ""
        seconds = (time.perf_counter() - self._began) / (self.done - self._first) * (self.total - self.done)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time in words, rounded to what matters."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(number: int, what: str) -> str:
    """A number with what it counts: "1 file", "2,000 files"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def classes_in_mean(scores: Scores) -> str:
    """Text after a mean IoU that says over how many classes it is."""
    counted, number = sum(value is not None for value in scores["iou"].values()), len(scores["iou"])
    return f" over {number} classes" if counted == number else f" over {counted} of {number} classes"


def make_folder(out: Path) -> None:
    """Make the folder of --out, unless it exists."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {out}: {error.strerror}") from None


def plain(value: Any) -> Any:
    """A value of types that JSON has; numbers that are not finite, which it has not, become null."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)

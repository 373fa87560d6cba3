"""The console script `kpcore`. It is outside the package, so that it runs before the package is imported: a Ctrl-C, a
closed pipe or a wrong environment variable during the import does not end in a traceback."""

from __future__ import annotations

import os
import signal
import sys

_BROKEN_PIPE = 128 + 13  # the exit code that a shell reports for programs ended by SIGPIPE


def main() -> int:
    """Exit code of the command: 0; 2 after an error, with one line that says why; 130 after Ctrl-C; 141 after a closed
    pipe."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # otherwise SIGINT is ignored, as for background jobs of a script
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # nothing to clean up during the import
    _open_closed_streams()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # file names and terminals may not be UTF-8
        code = _run(interrupt)
        sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
    except OSError as error:
        code = _report(f"standard output: {error.strerror}")
    _discard_output()
    return code


def _run(interrupt) -> int:
    try:
        from kpcore.cli import main
    except (ImportError, ValueError) as error:  # a wrong KPCORE_NUM_THREADS, for example, or an incompatible NumPy
        return _report(" ".join(str(error).split()))
    during_import = signal.signal(signal.SIGINT, interrupt)
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # raised by argparse, after its error message
        return end.code
    finally:
        signal.signal(signal.SIGINT, during_import)


def _report(reason: str) -> int:
    """Print an error; the exit code 2."""
    try:  # noqa: SIM105 - contextlib takes 2 ms to import, during which a Ctrl-C would print a traceback
        print(f"kpcore: {reason}", file=sys.stderr)
    except OSError:  # stderr is closed too
        pass
    return 2


def _open_closed_streams() -> None:
    """Open closed standard streams on /dev/null. Otherwise the next file opened for writing would get the descriptor of
    a closed stream, and everything printed would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _discard_output() -> None:
    """Redirect streams that cannot be flushed to /dev/null: Python flushes them at exit, and would report errors."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""The console script `kpcore`. It is outside the package, so that it is at work while that is imported: a Ctrl-C, a
closed pipe or a wrong environment variable then is no traceback either."""

from __future__ import annotations

import os
import signal
import sys

_BROKEN_PIPE = 128 + 13  # as a shell says of other programs, which SIGPIPE ends


def main() -> int:
    """Exit code of the command: 0; 2 with a line for what cannot be done; 130 after Ctrl-C; 141 after a closed pipe."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # else it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # while importing there is nothing to tidy up
    _open_what_is_closed()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor the terminal
        code = _run(interrupt)
        sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
    except OSError as error:
        code = _refused(f"standard output: {error.strerror}")
    _drop_what_is_left()
    return code


def _run(interrupt) -> int:
    try:
        from kpcore.cli import main
    except (ImportError, ValueError) as error:  # a variable such as KPCORE_NUM_THREADS, a NumPy of another version
        return _refused(" ".join(str(error).split()))
    during_import = signal.signal(signal.SIGINT, interrupt)
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # of argparse, which has said why
        return end.code
    finally:
        signal.signal(signal.SIGINT, during_import)


def _refused(reason: str) -> int:
    try:  # noqa: SIM105 - contextlib takes 2 ms to import, in which a Ctrl-C would be a traceback
        print(f"kpcore: {reason}", file=sys.stderr)
    except OSError:  # there is nowhere else to say it
        pass
    return 2


def _open_what_is_closed() -> None:
    """A file that is written would get the number of a closed stream, and all that is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _drop_what_is_left() -> None:
    """Python writes what is in the streams' buffers when it ends, and would report that they are closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

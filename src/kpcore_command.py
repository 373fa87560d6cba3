"""The console script `kpcore`.

It is outside the package so that Ctrl-C, a closed pipe or an invalid environment variable ends the command without a
traceback also while kpcore is imported.
"""

from __future__ import annotations

import os
import signal
import sys

_BROKEN_PIPE = 128 + 13  # the exit code that a shell reports for programs that SIGPIPE ends


def main() -> int:
    """Run the command. Exit codes: 0; 2 with one line for an error; 130 after Ctrl-C; 141 after a closed pipe."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # otherwise Ctrl-C is ignored, as in the background of a script
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # nothing to clean up during import
    _open_closed_streams()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # file names may not be UTF-8, nor the terminal
        code = _run(interrupt)
        sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
    except OSError as error:
        code = _refused(f"standard output: {error.strerror}")
    _discard_buffered_output()
    return code


def _run(interrupt) -> int:
    try:
        from kpcore.cli import main
    except (ImportError, ValueError) as error:  # an invalid KPCORE_NUM_THREADS, or an incompatible NumPy
        return _refused(" ".join(str(error).split()))
    during_import = signal.signal(signal.SIGINT, interrupt)
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # raised by argparse, which has printed the reason
        return end.code
    finally:
        signal.signal(signal.SIGINT, during_import)


def _refused(reason: str) -> int:
    try:  # noqa: SIM105 - importing contextlib takes 2 ms, in which Ctrl-C would print a traceback
        print(f"kpcore: {reason}", file=sys.stderr)
    except OSError:  # stderr is closed
        pass
    return 2


def _open_closed_streams() -> None:
    """Open closed standard streams to the null device.

    Otherwise the first file that is opened would get the number of a closed stream, and with it all printed text.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _discard_buffered_output() -> None:
    """Discard output in the buffers of closed streams: Python would write it at exit and report an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

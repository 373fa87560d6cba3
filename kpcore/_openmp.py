"""Loads the extension `cpu`, and with it OpenMP, with a short spin time for waiting threads; imported before all else.

A waiting thread of GCC's OpenMP (libgomp) spins for 300,000 rounds, some 10 ms, before it sleeps. On a machine with
other busy processes the thread it waits for may need the core that it spins on: two threads were ten times slower than
one. libgomp reads GOMP_SPINCOUNT once, when it is loaded, so that the variable must be set before.
"""

from __future__ import annotations

import os
from pathlib import Path

MOST_THREADS = 2**16
SPINS = "1000"  # 25 to 50 us: in a sweep the fewest rounds that cost two threads on an idle machine nothing
_set_by_user = [f"{name}={os.environ[name]}" for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if os.environ.get(name)]


def _requested_threads() -> tuple[int, str] | None:
    """(number of threads, variable that requests it), or None. Checked before OpenMP, which would print a warning."""
    for name in ("KPCORE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = (
            os.environ.get(name, "").split(",")[0].strip()
        )  # OpenMP allows a list, with a number for each nesting level
        if text:
            if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_THREADS:
                expected = f"a number of threads from 1 to {MOST_THREADS}"
                raise ValueError(f"{name}: expected {expected}, got {os.environ[name][:80]!r}")
            return int(text), f"{name}={os.environ[name]}"
    return None


def _loaded_libgomp() -> set[str] | None:
    """The libgomp files that this process has loaded; None if /proc is missing."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return {line.split(maxsplit=5)[5] for line in lines if "gomp" in line}


def waiting() -> str:
    """A description of the OpenMP library and of how long its waiting threads spin."""
    if not cpu.has_openmp():
        return "no: built without it, one thread"
    if cpu.openmp_library() is None:  # Windows
        return "yes; how long waiting threads spin is not set by kpcore (OMP_WAIT_POLICY)"
    library = os.path.realpath(cpu.openmp_library())
    if _set_by_user:
        return f"{library}; waiting threads spin as set by {', '.join(_set_by_user)}"
    if "gomp" not in os.path.basename(library) or _loaded_before is None:
        return f"{library}; how long waiting threads spin is not set by kpcore (OMP_WAIT_POLICY)"
    if library in _loaded_before:
        return (
            f"{library}, loaded before kpcore; waiting threads spin for some 10 ms, slow on a busy machine: import "
            f"kpcore first, or set GOMP_SPINCOUNT={SPINS} before Python starts"
        )
    return f"{library}; waiting threads spin {SPINS} rounds, then sleep (GOMP_SPINCOUNT, OMP_WAIT_POLICY)"


requested_threads = _requested_threads()
_loaded_before, _spin_count_before = _loaded_libgomp(), os.environ.get("GOMP_SPINCOUNT")
if not _set_by_user:
    os.environ["GOMP_SPINCOUNT"] = SPINS
try:
    from kpcore.backends import cpu
except ImportError as error:
    if (Path(__file__).parent / "backends" / "cpu.pyx").exists():
        raise ImportError(
            f"kpcore: expected an installed package, got its sources in {Path(__file__).parents[1]}: install them (pip "
            "install .) and start Python in another folder"
        ) from error
    if not Path(__file__).exists():
        raise ImportError(
            f"kpcore: expected an installed package, got {Path(__file__).parent} in an archive, from which Python "
            "loads no extension modules: install it (pip install)"
        ) from error
    raise
finally:
    if _spin_count_before is None:
        os.environ.pop("GOMP_SPINCOUNT", None)
    else:
        os.environ["GOMP_SPINCOUNT"] = _spin_count_before

"""Loads `cpu`, and with it OpenMP, in a way that lets waiting threads sleep soon. So it is imported first.

A thread of GCC's OpenMP that waits for another spins for 300,000 rounds, some 10 ms, before it sleeps. Where other
processes are busy, what it waits for is a thread that has no core, because it spins on one: two threads were ten times
slower than one. OpenMP reads how long when it is loaded, hence only what is loaded first can choose.
"""

from __future__ import annotations

import os
from pathlib import Path

MOST_THREADS = 2**16
SPINS = "1000"  # 25 to 50 us: by a sweep, the fewest with which two threads on an idle machine are as fast as with all
_chosen = [f"{name}={os.environ[name]}" for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if os.environ.get(name)]


def _threads_asked_for() -> tuple[int, str] | None:
    """By the environment, and by what of it; None: nothing. Before OpenMP is loaded, which would print a line too."""
    for name in ("KPCORE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").split(",")[0].strip()  # OpenMP allows a list, one per level of nesting
        if text:
            if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_THREADS:
                expected = f"a number of threads from 1 to {MOST_THREADS}"
                raise ValueError(f"{name}: expected {expected}, got {os.environ[name][:80]!r}")
            return int(text), f"{name}={os.environ[name]}"
    return None


def _loaded() -> set[str] | None:
    """The files of GCC's OpenMP that this process has loaded; None where that cannot be seen."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return {line.split(maxsplit=5)[5] for line in lines if "gomp" in line}


def waiting() -> str:
    """In words: which OpenMP, and how long its threads spin."""
    if not cpu.has_openmp():
        return "no: built without it, one thread"
    library = os.path.realpath(cpu.openmp_library())
    if _chosen:
        return f"{library}; waiting threads spin as said by {', '.join(_chosen)}"
    if "gomp" not in os.path.basename(library) or _before is None:
        return f"{library}; how long waiting threads spin is its own matter (OMP_WAIT_POLICY)"
    if library in _before:
        return (
            f"{library}, loaded before kpcore; waiting threads spin for some 10 ms, slow beside busy processes: import "
            f"kpcore first, or set GOMP_SPINCOUNT={SPINS} before Python starts"
        )
    return f"{library}; waiting threads spin {SPINS} rounds, then sleep (GOMP_SPINCOUNT, OMP_WAIT_POLICY)"


asked_for = _threads_asked_for()
_before, _as_it_was = _loaded(), os.environ.get("GOMP_SPINCOUNT")
if not _chosen:
    os.environ["GOMP_SPINCOUNT"] = SPINS
try:
    from kpcore.backends import cpu
finally:
    if _as_it_was is None:
        os.environ.pop("GOMP_SPINCOUNT", None)
    else:
        os.environ["GOMP_SPINCOUNT"] = _as_it_was

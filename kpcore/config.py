"""Threads, instruction set and what this build can do."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np

from kpcore import _array, _cpu

__version__ = _cpu.version()


def _available_cores():
    """Cores this process may use: its affinity, and its control group's quota where that is lower."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    for quota in (_quota_v2, _quota_v1):
        try:
            return max(1, math.ceil(min(cores, quota())))
        except (OSError, ValueError):
            continue
    return cores


def _quota_v2():
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1():
    folder = Path("/sys/fs/cgroup/cpu")
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return math.inf if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def _initial_threads():
    if not _cpu.has_openmp():
        return 1
    for name in ("KPCORE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").split(",")[0].strip()  # OpenMP allows a list, one per level of nesting
        if text:
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{name}: expected a number of threads, at least 1, got {os.environ[name]!r}")
            return int(text)
    return _available_cores()


_threads = _initial_threads()
if os.environ.get("KPCORE_ISA"):
    _cpu.set_isa(os.environ["KPCORE_ISA"])
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_cpu.pause_threads)


def set_num_threads(threads):
    """Use this many threads in every later call, in all Python threads.

    Until then it is ``KPCORE_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the cores that this process may use. No
    result depends on it. A build without OpenMP has one.

    Examples
    --------
    >>> import kpcore as kp
    >>> kp.set_num_threads(2)
    >>> kp.get_num_threads()
    2
    """
    global _threads
    threads = _array.integer("threads", threads, 1, 2**16)
    _threads = threads if _cpu.has_openmp() else 1


def get_num_threads():
    """The number of threads that calls use; see `set_num_threads`."""
    return _threads


def show_config():
    """Print the version, instruction set, threads and libraries in use, as a bug report should quote them."""
    cupy = sys.modules.get("cupy")
    rows = {
        "kpcore": __version__,
        "instruction set": f"{_cpu.isa()} (of {', '.join(_cpu.isas())}; KPCORE_ISA overrides)",
        "threads": f"{get_num_threads()} (KPCORE_NUM_THREADS, kpcore.set_num_threads)",
        "OpenMP": "yes" if _cpu.has_openmp() else "no: built without it, one thread",
        "Python": sys.version.split()[0],
        "NumPy": np.__version__,
        "GPU": f"cupy {cupy.__version__} is imported, but this version runs on the CPU only" if cupy else "not used",
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")

"""Threads, memory limit, optional packages, and the report of `show_config`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kpcore import _openmp
from kpcore.backends import checks, cpu

__all__ = ["KpcoreWarning", "__version__", "get_memory_limit", "get_num_threads", "set_memory_limit",
           "set_num_threads", "show_config"]  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

__version__: str = cpu.version()
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class KpcoreWarning(UserWarning):
    """A result may not be trusted, and why: input unlike that of the training, classes without points, other units."""


def _available_cores() -> tuple[int, str]:
    """(number of cores this process may use, reason): its affinity, or the limit of its control group or OpenMP."""
    try:
        cores = cpu.bound_processors() or len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    limits = [(cores, "the cores this process may use")]
    limits.append((cpu.thread_limit(), f"OMP_THREAD_LIMIT={os.environ.get('OMP_THREAD_LIMIT')}"))
    for quota in (_quota_v2, _quota_v1):
        with contextlib.suppress(OSError, ValueError):
            limits.append((max(1, math.ceil(min(cores, quota()))), "the quota of this control group"))
            break
    return min(limits, key=lambda limit: limit[0])  # the first of equal ones


def _quota_v2() -> float:
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1() -> float:
    folder = Path("/sys/fs/cgroup/cpu")
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return math.inf if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def _threads_and_why() -> tuple[int, str]:
    """(number of threads of a call, reason)."""
    global _chosen
    if _chosen:
        return _chosen
    process = sys.modules.get("multiprocessing.process")
    if not cpu.has_openmp():
        choice = 1, "built without OpenMP"
    elif _openmp.requested_threads:
        choice = _openmp.requested_threads
    elif process and process.current_process().daemon:
        choice = 1, "a worker process (daemonic, as those of a DataLoader or Pool), one of several"
    else:
        choice = _available_cores()
    # A spawned child runs its parent's main module and reads its arguments before it knows whether it is daemonic:
    # the choice is not kept yet. multiprocessing says so by this attribute.
    if not (process and getattr(process.current_process(), "_inheriting", False)):
        _chosen = choice
    return choice


def _before_fork() -> None:
    global _threads_survive_forks
    _threads_survive_forks = cpu.pause_threads()


def _after_fork_in_child() -> None:
    """Choose again after a fork, as the child may be a worker process; a number set by `set_num_threads` stays."""
    global _chosen, _is_limited_to_one
    if not _threads_survive_forks:
        _chosen, _is_limited_to_one = (1, f"a forked child, and {_OLD_OPENMP}"), True
    elif _chosen and _chosen[1] != _SET:
        _chosen = None


_SET = "kpcore.set_num_threads"
_OLD_OPENMP = "the OpenMP that this process has loaded is older than 5.0, which cannot start threads in one"
_chosen: tuple[int, str] | None = None  # the result of _threads_and_why, once it is final
_threads_survive_forks, _is_limited_to_one = True, False
if os.environ.get("KPCORE_ISA"):
    cpu.set_isa(os.environ["KPCORE_ISA"])
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def set_num_threads(threads: int) -> None:
    """Use this many threads in every later call, in all Python threads.

    The default is ``KPCORE_NUM_THREADS``, else ``OMP_NUM_THREADS``, else 1 in a daemonic process of `multiprocessing`
    (the workers of a DataLoader or Pool), else the number of cores that this process may use. A forked child keeps the
    number set here. Small calls use fewer threads. Results do not depend on the number of threads. A build without
    OpenMP always uses one.

    Examples
    --------
    >>> import kpcore as kp
    >>> kp.set_num_threads(2)
    >>> kp.get_num_threads()
    2
    """
    global _chosen
    threads = checks.integer("threads", threads, 1, _openmp.MOST_THREADS)
    if threads > 1 and _is_limited_to_one:
        raise RuntimeError(
            f"threads: expected 1 in a forked child, because {_OLD_OPENMP} ({cpu.openmp_library()}), got {threads}; "
            "start processes by spawn, or import kpcore before what loads that OpenMP"
        )
    if cpu.has_openmp():
        _chosen = threads, _SET


def get_num_threads() -> int:
    """The largest number of threads that a call uses; see `set_num_threads`."""
    return getattr(_of_thread, "number", None) or (_chosen or _threads_and_why())[0]


_of_thread = threading.local()


@contextlib.contextmanager
def threads_of_calls_here(number: int) -> Iterator[None]:
    """Let calls in the block, and in this Python thread alone, use this many threads."""
    before, _of_thread.number = getattr(_of_thread, "number", None), number
    try:
        yield
    finally:
        _of_thread.number = before


_memory_limit: int | None = None


def set_memory_limit(limit: int | None) -> None:
    """Set the largest size in bytes of a search result; a larger one raises a MemoryError before it is allocated.

    With ``None``, the default, the limit is the memory that is free at the time of the call: what Linux calls
    available, or what is left of the control group's limit if that is less. Other systems then have no limit.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.set_memory_limit(100)
    >>> kp.radius_search(np.zeros((10, 3)), None, 1.0)
    Traceback (most recent call last):
    MemoryError: 100 neighbours would take 400 bytes, more than the limit of 100 (kpcore.set_memory_limit); of 10 \
queries the one at (0.0, 0.0, 0.0) has the most, 10
    >>> kp.set_memory_limit(None)
    """
    global _memory_limit
    _memory_limit = None if limit is None else checks.integer("limit", limit, 0)


def get_memory_limit() -> int | None:
    """The limit in bytes, or None; see `set_memory_limit`."""
    return _memory_limit


def free_memory() -> float:
    """The limit in bytes if one is set, else the memory that is free, or infinity where the system does not say."""
    return _free_memory() if _memory_limit is None else _memory_limit


@functools.cache
def cupy() -> ModuleType:
    """The module CuPy; an error that says what is missing if it cannot be used."""
    missing = "expected CuPy, for arrays on a GPU: pip install kpcore[cuda12] or kpcore[cuda13], as the driver is"
    cupy = _imported("cupy", missing)
    if not cupy.cuda.is_available():
        raise RuntimeError("expected a GPU and its driver, for arrays on it: CuPy finds none")
    return cupy


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package; an error says how to install it, or why the import fails."""
    return _imported(module, f'{module.partition(".")[0]} is not installed: pip install "kpcore[{extra}]"')


def _imported(module: str, missing: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        with contextlib.nullcontext() if module in sys.modules else _interrupt_afterwards():
            return importlib.import_module(module)
    except Exception as error:  # a package built for another NumPy can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ModuleNotFoundError(missing, name=package) from None
        reason = " ".join(str(error).split()) or "no reason given"
        raise ImportError(
            f"{package} is installed but cannot be imported: {type(error).__name__}: {reason}", name=package
        ) from error


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended.

    In the initialisation of an extension module, KeyboardInterrupt becomes an ImportError, after which those made with
    pybind11 end the process with a fatal error.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        raise KeyboardInterrupt


def check_room(num_neighbors: int, size: int, estimated: bool = False, free: Callable[[], float] | None = None) -> None:
    """Raise a MemoryError if a result of `size` bytes exceeds the limit; for an estimate, twice the limit.

    `free` returns the free bytes of the memory that the result goes to, unless that is the host's.
    """
    smallest_size = size // 2 if estimated else size
    if _memory_limit is not None and smallest_size > _memory_limit:
        limit = f"the limit of {_memory_limit} (kpcore.set_memory_limit)"
    elif (
        _memory_limit is None and smallest_size > 2**28 and smallest_size > (room := (free or _free_memory)())
    ):  # reading /proc takes 30 us
        limit = f"the {room} that are free (kpcore.set_memory_limit)"
    else:
        return
    about = "about " if estimated else ""
    raise MemoryError(f"{about}{num_neighbors} neighbours would take {size} bytes, more than {limit}")


def _free_memory() -> float:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
    return min([free, *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """The bytes left of the limit of each control group of this process and of the groups above.

    Cached files count as used in a control group, but are freed when memory is needed; they are added here.
    """
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, most, used, cached = _GROUPS, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root, most, used = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file", "total_active_file"
        else:
            continue
        inner = root / path.strip("/")  # does not exist in a container whose own group is its root
        for group in (inner, *inner.parents)[: 1 + len(inner.relative_to(root).parts)]:
            try:
                room = int((group / most).read_text()) - int((group / used).read_text())  # "max" has no limit
                numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield room + sum(int(numbers[name]) for name in cached)
            except (OSError, ValueError, KeyError):
                continue


def _gpu() -> str:
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return "not used: CuPy is not installed (kpcore[cuda12], kpcore[cuda13])"
    try:
        module = cupy()
    except (ImportError, RuntimeError) as error:
        return f"not used: {error}"
    device, version = module.cuda.Device(), module.cuda.runtime.driverGetVersion()
    name = module.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    driver = f"{version // 1000}.{version % 1000 // 10}"
    return (
        f"{name}, compute capability {device.compute_capability}, driver for CUDA {driver}, CuPy {module.__version__}"
    )


def config_rows() -> dict[str, str]:
    """What `show_config` prints, by name."""
    threads, why = _threads_and_why()
    return {
        "kpcore": __version__,
        "instruction set": f"{cpu.isa()} (of {', '.join(cpu.isas())}; KPCORE_ISA overrides)",
        "threads": f"{threads}: {why} (KPCORE_NUM_THREADS and kpcore.set_num_threads override)",
        "OpenMP": _openmp.waiting(),
        "Python": sys.version.split()[0],
        "NumPy": np.__version__,
        "GPU": _gpu(),
    }


def show_config() -> None:
    """Print version, instruction set, threads and libraries in use, for bug reports."""
    for name, value in config_rows().items():
        print(f"{name:16} {value}")

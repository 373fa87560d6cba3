"""Where independent tasks run: in this process, in several processes, or on the workers of an executor or of Dask.

An engine calls a function once for each task, and yields what came out in the order in which the tasks end. Tasks read
from and write to storage that all workers share; only small values travel. `concurrent.futures` and Dask schedule.

>>> from kpcore.pipeline import engines
>>> with engines.here() as engine:
...     dict(engine.run(abs, [-1, 2]))
{-1: 1, 2: 2}
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from kpcore import _openmp, config
from kpcore.backends import checks, cpu
from kpcore.config import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import distributed

_SECONDS_TO_CONNECT = 5  # to a scheduler of Dask, and until it has a worker
_SECONDS_WITHOUT_WORKERS = 600  # until a run ends, during which a cluster may start new ones
_SILENT = logging.CRITICAL + 1  # level of a log
_LOSSES_IN_COMPANY = 2  # of a task, before it runs alone
_STARTS = 3  # attempts to start processes after others were killed


class Machine(NamedTuple):
    """What a worker says of itself."""

    host: str
    process: int
    architecture: str  #: as `platform.machine`, in lower case: x86_64, aarch64
    instruction_sets: tuple[str, ...]  #: of kpcore that it runs, best last; up to KPCORE_ISA if that is set there
    threads: int  #: of a call of kpcore
    memory: float  #: bytes that are free, or kpcore.set_memory_limit; infinite where the system does not say


class WorkerKilled(RuntimeError):
    """The outcome of a task during which its worker ended, again and again, as when there is not enough memory."""


class Unfit(RuntimeError):
    """A worker cannot compute what the others compute: another version of kpcore, or another instruction set."""


def machine() -> Machine:
    """This machine, as seen by this process."""
    sets, limit = cpu.isas(), os.environ.get("KPCORE_ISA")
    return Machine(socket.gethostname(), os.getpid(), platform.machine().lower(),
                   sets[: sets.index(limit) + 1] if limit else sets, config.get_num_threads(),
                   config.free_memory())  # fmt: skip


def common_instruction_set(machines: Iterable[Machine]) -> str:
    """The best instruction set that all machines run, with which they compute the same bits.

    KPCORE_ISA limits it, on each machine and here. A RuntimeError if there is none, as for x86-64 and ARM together.

    Examples
    --------
    >>> from kpcore.pipeline import engines
    >>> old, new = (engines.Machine(host, 1, "x86_64", sets, 2, 8e9) for host, sets in
    ...             [("old", ("base", "avx2")), ("new", ("base", "avx2", "avx512"))])
    >>> engines.common_instruction_set([new, old])
    'avx2'
    """
    machines = [*machines]
    if not machines:
        raise ValueError("machines: expected at least one, got none")
    by_architecture = {one.architecture.replace("amd64", "x86_64").replace("arm64", "aarch64"): one for one in machines}
    if len(by_architecture) > 1:
        hosts = ", ".join(f"{one.host} ({name})" for name, one in sorted(by_architecture.items()))
        raise RuntimeError(f"workers: expected machines of one architecture, which compute the same bits, got {hosts}")
    common = [name for name in machines[0].instruction_sets if all(name in one.instruction_sets for one in machines)]
    limit = os.environ.get("KPCORE_ISA")
    order = max((one.instruction_sets for one in (machine(), *machines)), key=len)
    if limit in order:
        common = [name for name in common if name in order[: order.index(limit) + 1]]
    if not common:
        hosts = "; ".join(sorted({f"{one.host} ({', '.join(one.instruction_sets)})" for one in machines}))
        limited = f", at most {limit} (KPCORE_ISA)" if limit else ""
        raise RuntimeError(f"workers: expected an instruction set that all run{limited}, got {hosts}")
    return common[-1]


_changing = threading.Condition()
_users, _before = 0, ""  # calls inside at_instruction_set in this process, and the instruction set before the first


@contextlib.contextmanager
def at_instruction_set(name: str | None) -> Iterator[None]:
    """Compute with an instruction set in the block; None: with that which is set.

    It is set for the process. A block in another thread that asks for another one waits; when the last ends, the
    instruction set is that of before. Raises `Unfit` if this machine does not run it.
    """
    global _users, _before
    if name is None:
        yield
        return
    if name not in cpu.isas():
        raise Unfit(f"{socket.gethostname()}: expected a machine that runs the instruction set {name}, got one that "
                    f"runs {', '.join(cpu.isas())} ({platform.machine()})")  # fmt: skip
    with _changing:
        _changing.wait_for(lambda: _users == 0 or cpu.isa() == name)
        if _users == 0:
            _before = cpu.isa()
            cpu.set_isa(name)
        _users += 1
    try:
        yield
    finally:
        with _changing:
            _users -= 1
            if _users == 0:
                cpu.set_isa(_before)
                _changing.notify_all()


class _Call(NamedTuple):
    """What a worker is sent: the call of a function with a task, the result of which travels as bytes."""

    function: Callable[[Any], Any]
    task: Any
    instruction_set: str | None
    version: str

    def __call__(self) -> bytes:
        if self.version != config.__version__:
            raise Unfit(f"{socket.gethostname()}: expected kpcore {self.version}, as here, got {config.__version__}")
        with at_instruction_set(self.instruction_set):
            return _packed(*_outcome(self.function, self.task))


def _outcome(function: Callable[[Any], Any], task: Any) -> tuple[Any, BaseException | None]:
    """(result, None) of a call, or (None, exception)."""
    try:
        return function(task), None
    except Unfit:
        raise
    except (Exception, SystemExit) as error:
        error.traceback_text = traceback.format_exc()
        return None, error


def _packed(result: Any, error: BaseException | None) -> bytes:
    """The outcome as bytes that the other side can read for sure.

    An exception of a class that unpickles only with other arguments would break a process pool.
    """
    try:
        pickle.loads(data := pickle.dumps((result, error)))
    except Exception as unpicklable:
        what = f"the result cannot travel between processes: {unpicklable}" if error is None else str(error)
        kind = type(unpicklable if error is None else error).__name__
        plain = RuntimeError(" ".join(f"{kind}: {what}".split()))
        plain.traceback_text = getattr(error, "traceback_text", "")
        return pickle.dumps((None, plain))
    return data


class _Job:
    """A task that waits or runs, and how often its worker was killed."""

    def __init__(self, task: Any) -> None:
        self.task, self.losses = task, 0


class Engine:
    """Runs tasks; made by `here`, `processes`, `executor` and `dask`, and closed at the end of a with statement."""

    description: str  #: in words: "4 processes"

    def __init__(self, description: str, workers: Callable[[], int], submit: Callable[..., Future[Any]] | None,
                 machines: Callable[[], list[Machine]], renew: Callable[[], None] | None = None,
                 end: Callable[[], None] | None = None, killed: tuple[type[Exception], ...] = ()) -> None:  # fmt: skip
        self.description, self._workers, self._submit, self._machines = description, workers, submit, machines
        self._renew, self._end, self._killed = renew, end, killed

    def __repr__(self) -> str:
        return f"<engine: {self.description}>"

    @property
    def is_here(self) -> bool:
        """Whether tasks run in this process, one after the other."""
        return self._submit is None

    @property
    def workers(self) -> int:
        """The number of tasks that run at the same time; of a cluster, now."""
        return self._workers()

    def machines(self) -> list[Machine]:
        """What each worker says of itself: their instruction sets, free memory, threads.

        An executor does not say on which worker a call runs: it is asked as often as it has workers, and some may
        answer twice.
        """
        return self._machines()

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any], *, instruction_set: str | None = None,
            after: Callable[[Any, Any], Iterable[Any] | None] | None = None,
            beside: Callable[[Any], bool] | None = None) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        """Call a function with each task, and yield (task, outcome), each task once, as they end.

        The outcome is the result, or the exception that the function raised, with the text of its traceback as
        ``traceback_text``; the other tasks go on. A task that its worker did not survive is run again; after two such
        losses at the end, when no other runs; if that worker is killed as well, the outcome is a `WorkerKilled`.

        If the iteration ends early, by an exception or Ctrl-C, waiting tasks are cancelled. Processes are ended at
        once; other workers complete the task that they are at.

        Parameters
        ----------
        function : callable
            Picklable: of a module that the workers can import, such as a functools.partial of such a function.
        tasks : iterable
            Small picklable values, taken when there is room: a few for each worker are under way.
        instruction_set : str, optional
            In which all workers compute, see `common_instruction_set`; by default each in its best.
        after : function, optional
            after(task, outcome) returns more tasks, or None; they are next.
        beside : function, optional
            beside(task) says which tasks, such as writing a file, the engine of `here` runs in a thread beside the
            others. Other engines run them as any task.

        Raises
        ------
        Unfit
            A worker has another version of kpcore, or does not run the instruction set.
        TypeError
            Processes cannot import the function.
        RuntimeError, ConnectionError
            Processes cannot be started; the connection to Dask is lost, or all its workers for ten minutes.
        BrokenExecutor
            An executor of the caller is broken.
        """
        if self._submit is None:
            return _run_here(function, tasks, instruction_set, after, beside)
        return self._run(function, tasks, instruction_set, after)

    def _run(self, function, tasks, instruction_set, after):
        coming, jobs, suspects = iter(tasks), deque(), deque()
        under_way: dict[Future[Any], _Job] = {}
        finished: list[tuple[Any, Any]] = []
        before, completed = cpu.isa(), False

        def next_job():
            if jobs:
                return jobs.popleft()
            for task in coming:
                return _Job(task)
            return suspects.popleft() if suspects and not under_way else None

        def end_of(job, outcome):
            finished.append((job.task, outcome))
            jobs.extendleft(reversed([_Job(task) for task in (after(job.task, outcome) if after else None) or ()]))

        def lost(job, losses):
            job.losses += losses
            if job.losses > _LOSSES_IN_COMPANY:
                end_of(job, WorkerKilled("its worker was killed each time it was run, also when no other task ran; "
                                         "probably the machine has not enough memory for it"))  # fmt: skip
            else:
                (suspects if job.losses == _LOSSES_IN_COMPANY else jobs).append(job)

        if self._renew:
            self._check_importable(function)
        try:
            while True:
                alone = any(job.losses == _LOSSES_IN_COMPANY for job in under_way.values())
                while not alone and len(under_way) < max(1, self._workers()) and (job := next_job()):
                    call = _Call(function, job.task, instruction_set, config.__version__)
                    try:
                        under_way[self._submit(call)] = job
                    except BrokenExecutor:  # a worker was killed since the last task; this one has not run
                        if self._renew is None:
                            raise
                        (suspects if job.losses == _LOSSES_IN_COMPANY else jobs).appendleft(job)
                        if under_way:
                            break
                        self._renew()
                    alone = job.losses == _LOSSES_IN_COMPANY
                yield from finished
                finished.clear()
                if not under_way:
                    if jobs or suspects:
                        continue
                    completed = True
                    return
                done, _ = wait_for(under_way, 1, FIRST_COMPLETED)
                if self._renew and any(isinstance(_exception(one), BrokenProcessPool) for one in done):
                    self._renew()  # all of the old pool have ended after this
                    done = [*under_way]
                for future in done:
                    job, error = under_way.pop(future), _exception(future)
                    if error is None:
                        result, raised = pickle.loads(future.result())
                        end_of(job, result if raised is None else raised)
                    elif self._renew and isinstance(error, BrokenProcessPool):
                        lost(job, 1)
                    elif isinstance(error, self._killed):
                        lost(job, _LOSSES_IN_COMPANY if job.losses == 0 else 1)
                    elif isinstance(error, CancelledError):
                        raise ConnectionError(f"{self.description}: lost the tasks, as when the scheduler has ended")
                    else:
                        raise error
        finally:
            if not completed:
                for future in under_way:
                    future.cancel()
                if self._renew:
                    self._end()
            if cpu.isa() != before and _users == 0:
                cpu.set_isa(before)

    def _check_importable(self, function: Callable[[Any], Any]) -> None:
        """Raise an error for a function that processes cannot load: each would end, as if it had been killed."""
        try:
            data = pickle.dumps(function)
            try:
                self._submit(functools.partial(_load, data)).result()
            except BrokenProcessPool:  # killed since the last run
                self._renew()
                self._submit(functools.partial(_load, data)).result()
        except (pickle.PicklingError, AttributeError, ImportError, TypeError) as error:
            raise TypeError(f"function: expected one of a module that workers can import, got {function!r}: {error}"
                            ) from None  # fmt: skip

    def close(self) -> None:
        """End the workers that the engine has started."""
        if self._end:
            self._end()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _load(data: bytes) -> None:
    pickle.loads(data)


def _exception(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception()
    except CancelledError as error:
        return error


def here() -> Engine:
    """One task after the other in this process, with all threads of kpcore."""
    return Engine("this process", lambda: 1, None, lambda: [machine()])


def _run_here(function, tasks, instruction_set, after, beside):
    coming, added = iter(tasks), deque()
    under_way: dict[Future[Any], Any] = {}
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as cancelled:
        cancelled.callback(lambda: [future.cancel() for future in under_way])
        while True:
            ended = []
            task = added.popleft() if added else next(coming, under_way)  # under_way: no task is left
            if task is under_way:
                if not under_way:
                    return
                wait_for(under_way, return_when=FIRST_COMPLETED)
            elif beside and beside(task):
                under_way[thread.submit(_outcome_at, function, task, instruction_set)] = task
            else:
                ended.append((task, *_outcome_at(function, task, instruction_set)))
            ended += [(under_way.pop(future), *future.result()) for future in [*under_way] if future.done()]
            ended = [(task, result if error is None else error) for task, result, error in ended]
            for task, outcome in ended:
                added.extend((after(task, outcome) if after else None) or ())
            yield from ended


def _outcome_at(function, task, instruction_set):
    with at_instruction_set(instruction_set):
        return _outcome(function, task)


# ---- processes


def processes(workers: int, *, memory: int | None = None) -> Engine:
    """Tasks in processes of this machine, which share its threads (`kpcore.get_num_threads`).

    Processes are spawned: a script that calls this does so under ``if __name__ == "__main__":``. They end with this
    process, however it ends. A worker that is killed costs the tasks that were running a repetition, see `Engine.run`.

    Parameters
    ----------
    workers : int
        The number of processes.
    memory : int, optional
        Bytes for each process: its `kpcore.set_memory_limit`.

    Raises
    ------
    RuntimeError
        The processes do not start.
    """
    workers = checks.integer("workers", workers, 1, 1024)
    _end_in_import_of_main()
    context = multiprocessing.get_context("spawn")
    threads = max(1, config.get_num_threads() // workers)
    pool: ProcessPoolExecutor | None = None
    worker_end: Any = None  # the ends of a pipe: when this process closes `parent_end` the others end
    parent_end: Any = None

    def start(attempts: int) -> None:
        nonlocal pool, parent_end, worker_end
        worker_end, parent_end = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(workers, context, _begin_worker, (worker_end, threads, memory))
        try:
            for ready in [pool.submit(machine) for _ in range(workers)]:  # a submission starts a process
                ready.result()
        except BaseException as error:
            end()
            if not isinstance(error, BrokenProcessPool):
                raise
            if attempts == 1:
                raise _no_start() from None
            start(attempts - 1)

    def end() -> None:
        nonlocal pool
        if pool:
            parent_end.close()
            pool.shutdown(wait=True, cancel_futures=True)
            worker_end.close()
            pool = None

    def renew() -> None:
        end()
        start(_STARTS)

    def submit(call: Callable[[], Any]) -> Future[Any]:
        if pool is None:
            start(1)
        return pool.submit(call)

    start(1)
    return Engine(f"{workers} process{'es' * (workers != 1)}", lambda: workers, submit,
                  lambda: [submit(machine).result()], renew, end)  # fmt: skip


def _end_in_import_of_main() -> None:
    """End a spawned process that imports the script of its parent and comes to the start of processes there."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit("kpcore: a worker that imports this script came to the start of workers")


def _no_start() -> RuntimeError:
    return RuntimeError('workers: expected processes that start, got one that ended at once; a script starts them '
                        'under if __name__ == "__main__":')  # fmt: skip


def _begin_worker(worker_end: Any, threads: int, memory: int | None) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(worker_end,), daemon=True).start()
    config.set_num_threads(threads)
    config.set_memory_limit(memory)


def _end_with_parent(worker_end: Any) -> None:
    """End this process, also amid a task, when the parent closes its end of the pipe or is killed.

    The workers of a ProcessPoolExecutor would otherwise wait for ever for a parent that was killed.
    """
    with contextlib.suppress(EOFError, OSError):
        worker_end.recv()
    os._exit(1)


# ---- executors and Dask


def executor(pool: Executor, workers: int | None = None) -> Engine:
    """Tasks on an executor of the caller, which stays open.

    Parameters
    ----------
    pool : concurrent.futures.Executor
        A ThreadPoolExecutor, MPIPoolExecutor, the `get_executor()` of a Dask client, or any other.
    workers : int, optional
        Of the executor; needed if it does not say how many it has.
    """
    if not isinstance(pool, Executor):
        raise TypeError(f"pool: expected a concurrent.futures.Executor, got {type(pool).__name__}")
    if workers is None:  # the attribute of concurrent.futures and loky, and that of mpi4py
        workers = getattr(pool, "_max_workers", None) or getattr(pool, "num_workers", None)
    if workers is None:
        raise TypeError(f"workers: expected a number, as {type(pool).__name__} does not say how many it has")
    workers = checks.integer("workers", workers, 1)

    def machines() -> list[Machine]:
        return [future.result() for future in [pool.submit(machine) for _ in range(workers)]]

    name = f"{type(pool).__name__} of {workers} worker{'s' * (workers != 1)}"
    return Engine(name, lambda: workers, pool.submit, machines)


def dask(cluster: str | distributed.Client, *, memory: int | None = None) -> Engine:
    """Tasks on the workers of Dask: of a scheduler anywhere, of a client, or started here.

    A task runs in each thread of each worker. Dask runs the tasks of a worker that was killed on another one.

    Parameters
    ----------
    cluster : str or distributed.Client
        The address of a scheduler, ``"tcp://host:8786"``; ``"local:4"`` starts four workers here; or a client, which
        stays open.
    memory : int, optional
        Bytes for each worker that is started here: its `kpcore.set_memory_limit`. Dask itself sets them no limit:
        it counts the pages of memory-mapped files, and would stop a worker that has read many.

    Raises
    ------
    ConnectionError
        There is no scheduler at the address, or it has no workers.
    Unfit
        Workers have no kpcore, or another version.
    """
    distributed = require("distributed", "dask")
    local = re.fullmatch(r"local:(.*)", cluster) if isinstance(cluster, str) else None
    with contextlib.ExitStack() as stack:
        if isinstance(cluster, str):
            _silence_dask(stack)
        if local:
            client, where, threads = _local_client(distributed, local[1], stack)
        elif isinstance(cluster, str):
            client, where, threads = _remote_client(distributed, cluster, stack), f"Dask at {cluster}", None
        elif isinstance(cluster, distributed.Client) and not cluster.asynchronous:
            client, where, threads = cluster, f"Dask at {cluster.scheduler.address}", None
        else:
            raise TypeError(f"cluster: expected an address or a distributed.Client that is not asynchronous, got "
                            f"{type(cluster).__name__}")  # fmt: skip
        _check_workers(client, where)
        limit, is_local = memory if local else None, bool(local)

        class Prepare(distributed.WorkerPlugin):  # also of workers that start later, as after one was killed
            name = "kpcore"

            def setup(self, worker: Any) -> None:
                _prepare(threads, limit, is_local, worker)

        client.register_plugin(Prepare())
        counted, workers, had_workers = -1.0, 1, time.monotonic()

        def count() -> int:
            nonlocal counted, workers, had_workers
            if (now := time.monotonic()) > counted + 2:
                workers, counted = sum(client.nthreads().values()), now
                if workers:
                    had_workers = now
                elif now > had_workers + _SECONDS_WITHOUT_WORKERS:
                    raise ConnectionError(f"{where}: expected workers, got none for {_SECONDS_WITHOUT_WORKERS} s")
            return workers

        tasks = client.get_executor(pure=False)
        stack.callback(tasks.shutdown, wait=False)
        end = stack.pop_all().close
        description = f"{where}, {count()} worker{'s' * (workers != 1)}"
        return Engine(description, count, tasks.submit, lambda: [*client.run(machine).values()], None, end,
                      (distributed.KilledWorker,))  # fmt: skip


def _silence_dask(stack: contextlib.ExitStack) -> None:
    """Leave out Dask's log, which is on standard error; what matters are exceptions."""
    for name in ("distributed", "distributed.client", "tornado.application"):
        logger = logging.getLogger(name)
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(_SILENT)


def _local_client(distributed: Any, workers: str, stack: contextlib.ExitStack) -> tuple[distributed.Client, str, int]:
    if not re.fullmatch(r"[1-9]\d{0,2}", workers):
        raise ValueError(f"cluster: expected local:N with 1 to 999 workers, got 'local:{workers}'")
    _end_in_import_of_main()
    try:
        cluster = distributed.LocalCluster(n_workers=int(workers), threads_per_worker=1, processes=True, memory_limit=0,
                                           dashboard_address="127.0.0.1:0", silence_logs=_SILENT, scheduler_kwargs={
                                               "dashboard": False, "allowed_failures": _LOSSES_IN_COMPANY - 1,
                                           })  # fmt: skip
    except RuntimeError as error:
        raise _no_start() from error
    client = stack.enter_context(distributed.Client(stack.enter_context(cluster), set_as_default=False))
    return client, "Dask here", max(1, config.get_num_threads() // int(workers))


def _remote_client(distributed: Any, address: str, stack: contextlib.ExitStack) -> distributed.Client:
    if not re.fullmatch(r"(\w+://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", address):
        raise ValueError(f"cluster: expected tcp://host:port or local:N, got {address!r}")
    made: Future[Any] = Future()

    def connect() -> None:
        try:
            made.set_result(distributed.Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False))
        except Exception as error:
            made.set_exception(error)

    # In a thread, as a client waits for ever for the answer of another server, such as that of Dask's web pages.
    threading.Thread(target=connect, daemon=True).start()
    try:
        client = made.result(_SECONDS_TO_CONNECT + 1)
    except Exception as error:
        reason = " ".join(str(error).split()) if isinstance(error, OSError) and str(error) else "no answer of Dask"
        raise ConnectionError(f"{address}: expected a scheduler of Dask, got none: {reason}") from None
    stack.enter_context(client)
    try:
        client.wait_for_workers(1, timeout=_SECONDS_TO_CONNECT)
    except TimeoutError:
        raise ConnectionError(f"{address}: expected workers, got a scheduler without any") from None
    return client


def _check_workers(client: distributed.Client, where: str) -> None:
    """Raise an error unless all workers have this version of kpcore."""
    versions = client.get_versions(packages=["kpcore"])["workers"]
    for address, of_worker in versions.items():
        version = (of_worker or {}).get("packages", {}).get("kpcore")
        if version != config.__version__:
            got = "one without it, or where it cannot be imported" if version is None else f"version {version}"
            raise Unfit(f"{where}: expected workers with kpcore {config.__version__}, as here, got {got} ({address})")


def _prepare(threads: int | None, memory: int | None, is_local: bool, worker: Any) -> None:
    """Set the threads of calls in a worker of Dask, which runs as many tasks at once as it has threads."""
    if is_local:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the process that started this one ends it
    if threads is None and not _openmp.requested_threads:
        threads = max(1, config._available_cores()[0] // worker.state.nthreads)
    if threads:
        config.set_num_threads(threads)
    if memory:
        config.set_memory_limit(memory)

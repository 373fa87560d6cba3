"""Engines: each task once, whatever fails; workers that are killed; the same instruction set everywhere."""

import contextlib
import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import engine_tasks
import pytest

import kpcore as kp
from kpcore.backends import cpu
from kpcore.pipeline import engines

COMMON = ("here", "threads", "processes", "dask")


@pytest.fixture(scope="module")
def opened():
    """Engines with two workers by name, made when they are first asked for."""
    made = {}
    with contextlib.ExitStack() as stack:

        def engine(name):
            if name not in made:
                if name == "dask":
                    pytest.importorskip("distributed")
                start = {
                    "here": engines.here,
                    "threads": lambda: engines.executor(stack.enter_context(ThreadPoolExecutor(2))),
                    "processes": lambda: engines.processes(2, memory=10**9),
                    "dask": lambda: engines.dask("local:2", memory=10**9),
                }[name]
                made[name] = stack.enter_context(start())
            return made[name]

        yield engine


@pytest.mark.parametrize("name", COMMON)
def test_each_task_once(opened, name):
    engine, after = opened(name), []

    def more(task, outcome):
        after.append((task, outcome))
        return [10 * task, 10 * task + 1] if task in (1, 2) else None

    outcomes = [*engine.run(engine_tasks.square, iter([1, "odd", 2, 3, "exit", 4, 5]), after=more)]
    assert after == outcomes and len(outcomes) == 11
    outcomes = dict(outcomes)
    odd, end = outcomes.pop("odd"), outcomes.pop("exit")
    assert outcomes == {task: task**2 for task in (1, 2, 3, 4, 5, 10, 11, 20, 21)}
    assert "first" in str(odd) and "second" in str(odd) and 'raise Odd("first", "second")' in odd.traceback_text
    assert isinstance(end, SystemExit) and end.args == (5,)
    assert [*engine.run(engine_tasks.square, [])] == []
    if name != "here":
        ((_, unreadable),) = engine.run(engine_tasks.square, ["result"])
        assert "the result cannot travel between processes: invalid literal" in str(unreadable)


def test_tasks_are_taken_when_there_is_room_and_added_ones_are_next(opened):
    taken = []

    def coming():
        for task in range(1000):
            taken.append(task)
            yield task

    for name in ("here", "threads"):
        taken.clear()
        running = opened(name).run(abs, coming(), after=lambda task, _: [-10] if task == 1 else None)
        first = [next(running)[0] for _ in range(6)]
        running.close()
        assert -10 in first[:5] and len(taken) <= 10


def test_light_tasks_run_beside_the_others(opened):
    started, go_on = threading.Event(), threading.Event()

    def task(name):
        if name == "write":
            started.set()
            assert go_on.wait(10)
        if name == "last":
            assert started.wait(10)
            go_on.set()
        return threading.current_thread() is threading.main_thread()

    outcomes = [*opened("here").run(task, ["write", "compute", "last"], beside=lambda name: name == "write")]
    assert sorted(outcomes) == [("compute", True), ("last", True), ("write", False)] and outcomes[0][0] == "compute"


@pytest.mark.parametrize("name", ["processes", "dask"])
def test_workers_share_the_threads_and_have_one_instruction_set(opened, name, set_threads):
    engine, lowest = opened(name), cpu.isas()[0]
    machines = engine.machines()
    assert engine.workers == 2 and os.getpid() not in {one.process for one in machines}
    assert {one.instruction_sets for one in machines} == {engines.machine().instruction_sets}
    share = max(1, kp.get_num_threads() // 2)
    assert {outcome for _, outcome in engine.run(engine_tasks.seen, range(4), instruction_set=lowest)} == {
        (lowest, share, 10**9)
    }
    assert {outcome[0] for _, outcome in engine.run(engine_tasks.seen, range(4))} == {cpu.isa()}
    with pytest.raises(
        engines.Unfit, match=rf"expected a machine that runs the instruction set neon, got one .*{lowest}"
    ):
        [*engine.run(abs, range(4), instruction_set="neon")]


@pytest.mark.parametrize("name", ["processes", "dask"])
def test_a_killed_worker_costs_a_repetition(opened, name, tmp_path):
    """kill -9 of a worker amid a task, twice; then a task that no worker survives: it alone fails."""
    engine = opened(name)
    task = functools.partial(engine_tasks.killed, str(tmp_path), (2,), 2)
    assert sorted(engine.run(task, range(6))) == [(each, each) for each in range(6)]
    assert {path.name for path in tmp_path.glob("2-*")} == {"2-0", "2-1", "2-2"}
    for path in tmp_path.iterdir():
        path.unlink()
    outcomes = dict(engine.run(functools.partial(engine_tasks.killed, str(tmp_path), (0,), 100), range(4)))
    assert isinstance(failed := outcomes.pop(0), engines.WorkerKilled) and "not enough memory" in str(failed)
    assert outcomes == {1: 1, 2: 2, 3: 3}
    begun = {task: len([*tmp_path.glob(f"{task}-*")]) for task in range(4)}
    assert begun[0] == (3 if name == "processes" else 4)  # twice in company, and alone, twice by Dask
    assert name == "dask" or max(begun[task] for task in (1, 2, 3)) <= 3


def test_an_iteration_that_ends_early_ends_the_processes(opened):
    before, begin, engine = cpu.isa(), time.monotonic(), opened("processes")
    workers = {one.process for one in engine.machines()}
    running = engine.run(time.sleep, [0.01, 100, 100, 100], instruction_set=cpu.isas()[0])
    with pytest.raises(KeyboardInterrupt):
        for _ in running:
            raise KeyboardInterrupt
    running.close()
    assert cpu.isa() == before and time.monotonic() - begin < 60
    assert {one.process for one in engine.machines()}.isdisjoint(workers)  # new ones, which take new tasks
    assert [*engine.run(abs, [-1])] == [(-1, 1)]


def test_a_broken_executor_of_the_caller_is_an_error(tmp_path):
    class Silent(Executor):
        pass

    with pytest.raises(TypeError, match="workers: expected a number, as Silent does not say how many it has"):
        engines.executor(Silent())
    with pytest.raises(TypeError, match=r"pool: expected a concurrent\.futures\.Executor, got int"):
        engines.executor(3)


def machine(host, architecture, *sets):
    return engines.Machine(host, 1, architecture, sets, 1, 1e9)


def test_the_common_instruction_set(monkeypatch):
    monkeypatch.delenv("KPCORE_ISA", raising=False)
    old, new = machine("old", "x86_64", "base", "avx2"), machine("new", "amd64", "base", "avx2", "avx512")
    arm, mac = machine("arm", "aarch64", "base"), machine("mac", "arm64", "base")
    assert engines.common_instruction_set([new]) == "avx512"
    assert engines.common_instruction_set(iter([new, old])) == "avx2"
    assert engines.common_instruction_set([arm, mac]) == "base"
    with pytest.raises(RuntimeError, match=r"one architecture.*, got arm \(aarch64\), new \(x86_64\)"):
        engines.common_instruction_set([new, arm])
    with pytest.raises(ValueError, match="machines: expected at least one"):
        engines.common_instruction_set([])
    monkeypatch.setenv("KPCORE_ISA", "base")
    assert engines.common_instruction_set([new, old]) == "base" and engines.machine().instruction_sets == ("base",)
    with pytest.raises(RuntimeError, match=r"that all run, at most base \(KPCORE_ISA\), got odd \(avx2\)"):
        engines.common_instruction_set([machine("odd", "x86_64", "avx2")])


def test_the_instruction_set_of_threads(set_isa):
    """Blocks that ask for the same one run together; one that asks for another waits; the one of before comes back."""
    lowest, best = cpu.isas()[0], cpu.isas()[-1]
    if lowest == best:
        pytest.skip("optional: this machine runs one instruction set")
    set_isa(best)
    inside, done = threading.Event(), []

    def other():
        with engines.at_instruction_set(best):
            done.append(cpu.isa())

    with engines.at_instruction_set(lowest):
        thread = threading.Thread(target=other)
        thread.start()
        with engines.at_instruction_set(lowest):
            inside.wait(0.1)
            assert cpu.isa() == lowest and not done
        assert cpu.isa() == lowest
    thread.join(10)
    assert done == [best] and cpu.isa() == best


def run_script(folder, text, name="script.py", **more):
    (folder / name).write_text(text)
    return subprocess.run([sys.executable, name], cwd=folder, capture_output=True, text=True, timeout=60, **more)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = 'from kpcore.pipeline import engines\nprint("begins")\nengines.processes(1)\nprint("goes on")\n'
    done = run_script(tmp_path, script)
    assert done.returncode == 1 and done.stdout.splitlines() in (["begins"], ["begins", "begins"])
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: workers: expected processes that start, got one that ended at once; a script starts them under "
        'if __name__ == "__main__":'
    )
    assert "a worker that imports this script" in done.stderr and done.stderr.count("Traceback") == 1


def test_code_without_a_file_as_in_a_notebook(python):
    """Needs no guard; a function that is defined there is refused, as processes cannot import it."""
    done = python("from kpcore.pipeline import engines\nengine = engines.processes(1)\nprint(*engine.run(abs, [-3]))\n"
                  "def mine(task): pass\nfor one in engine.run(mine, [1]): print(one)")  # fmt: skip
    assert done.stdout == "(-3, 3)\n"
    expected = "TypeError: function: expected one of a module that workers can import, got <function mine at"
    assert done.stderr.splitlines()[-1].startswith(expected)


def alive(process):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="optional: no /proc, which says what runs")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process(tmp_path, number):
    """Also amid a task, and if it is killed; Ctrl-C reaches all processes of the terminal, and is told once."""
    script = ("import functools, sys, engine_tasks\nfrom kpcore.pipeline import engines\n"
              "if __name__ == '__main__':\n"
              "    import signal\n"  # tests may run in a shell that lets processes in the background ignore Ctrl-C
              "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "    with engines.processes(2) as engine:\n"
              "        [*engine.run(functools.partial(engine_tasks.slow, sys.argv[1]), range(9))]\n")  # fmt: skip
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "began").mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen([sys.executable, "script.py", "began"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:  # fmt: skip
        try:
            wait_until(lambda: len([*(tmp_path / "began").iterdir()]) == 2)
            workers = [int(path.name.split("-")[1]) for path in (tmp_path / "began").iterdir()]
            assert all(map(alive, workers))
            if number == signal.SIGINT:
                os.killpg(parent.pid, number)
            else:
                parent.kill()
            wait_until(lambda: not any(map(alive, [parent.pid, *workers])))
            assert number == signal.SIGKILL or parent.stderr.read().count("Traceback") == 1
        finally:
            parent.kill()  # else the end of the block would wait for it


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_addresses_of_dask_that_are_wrong(monkeypatch, capfd):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "_SECONDS_TO_CONNECT", 1)
    for address in ("nonsense", "local:0", "local:two", "local:", "tcp://host", ""):
        with pytest.raises(ValueError, match="cluster: expected "):
            engines.dask(address)
    with pytest.raises(TypeError, match=r"cluster: expected an address or a distributed\.Client .*, got int"):
        engines.dask(8786)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"^tcp://127\.0\.0\.1:{free}: expected a scheduler of Dask, got none"):
        engines.dask(f"tcp://127.0.0.1:{free}")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionError, match=r"expected a scheduler of Dask, got none: no answer of Dask$"):
            engines.dask(f"127.0.0.1:{web.server_address[1]}")
        web.shutdown()
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as cluster:
        with pytest.raises(ConnectionError, match="expected workers, got a scheduler without any"):
            engines.dask(cluster.scheduler_address)
        cluster.scale(1)
        with distributed.Client(cluster) as client, engines.dask(client) as engine:
            assert [*engine.run(abs, [-1])] == [(-1, 1)]
            monkeypatch.setattr(engines.config, "__version__", "9.9.9")
            versions = client.get_versions(packages=["kpcore"])
            versions["workers"] = {
                "tcp://a:1": {"packages": {"kpcore": "0.1.0"}},
            }
            for got, said in (("0.1.0", "got version 0.1.0"), (None, "got one without it, or where it cannot be imp")):
                versions["workers"]["tcp://a:1"]["packages"]["kpcore"] = got
                monkeypatch.setattr(client, "get_versions", lambda **_: versions)
                with pytest.raises(engines.Unfit, match=rf"expected workers with kpcore 9\.9\.9, as here, {said}.*a:1"):
                    engines.dask(client)
    assert "Traceback" not in capfd.readouterr().err

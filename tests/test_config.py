"""Threads, instruction sets, environment, what an import costs, and the rule that CI skips nothing."""

import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kpcore as kp
from kpcore.backends import cpu

needs_openmp = pytest.mark.skipif(not cpu.has_openmp(), reason="built without OpenMP")
USE = "import numpy as np, kpcore as kp; kp.radius_search(np.zeros((9, 3)), None, 1.0); "


# ---- import


def test_import_loads_no_framework(python):
    heavy = {"scipy", "torch", "jax", "cupy", "matplotlib", "laspy", "plyfile", "tqdm"}
    done = python(f"import sys, kpcore; print(*{heavy} & set(sys.modules))")
    assert (done.stdout.split(), done.stderr, done.returncode) == ([], "", 0)


def test_what_import_may_load_beyond_numpy(python):
    # The number that stands for "under 50 ms": modules that numpy does not load itself.
    code = "import sys, numpy; before = set(sys.modules); import kpcore; print(*sorted(set(sys.modules) - before))"
    extra = [name for name in python(code).stdout.split() if not name.startswith("kpcore")]
    assert len(extra) <= 40, extra


def test_kernels_load_no_scipy(python):
    assert python(USE + "import sys; print('scipy' in sys.modules)").stdout == "False\n"


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert kp.__version__ == version("kpcore")


def test_public_names_exist():
    assert set(kp.__all__) <= set(dir(kp))


# ---- threads


@needs_openmp
@pytest.mark.parametrize("num", [1, 2, 3])
def test_set_num_threads(num, set_threads):
    set_threads(num)
    assert kp.get_num_threads() == num


@needs_openmp
def test_num_threads_is_the_same_in_every_python_thread(set_threads):
    set_threads(3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(kp.get_num_threads).result() == 3


@pytest.mark.parametrize(
    ("num", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (None, TypeError)]
)
def test_wrong_num_threads(num, error, set_threads):
    before = kp.get_num_threads()
    with pytest.raises(error):
        set_threads(num)
    assert kp.get_num_threads() == before


@needs_openmp
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"KPCORE_NUM_THREADS": "3"}, 3),
        ({"KPCORE_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"KPCORE_NUM_THREADS": "3", "OMP_NUM_THREADS": "1"}, 3),
    ],
)
def test_threads_from_the_environment(env, expected, python, monkeypatch):
    monkeypatch.delenv("KPCORE_NUM_THREADS", raising=False)
    assert python("import kpcore; print(kpcore.get_num_threads())", **env).stdout == f"{expected}\n"


# ---- threads that OpenMP binds, and that wait

needs_gomp = pytest.mark.skipif("gomp" not in (cpu.openmp_library() or ""), reason="not GCC's OpenMP")
SPINS = "ctypes.CDLL(kp.backends.cpu.openmp_library()).omp_display_env(1)"  # OpenMP itself says it, to stderr


@pytest.fixture
def no_wish(monkeypatch):
    """An environment that says nothing of threads."""
    for name in ("KPCORE_NUM_THREADS", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


@needs_openmp
@pytest.mark.parametrize(
    "env",
    [{"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "cores"}, {"OMP_PLACES": "threads", "OMP_PROC_BIND": "spread"}],
    ids=str,
)
def test_threads_that_openmp_binds_are_as_many(env, python, no_wish):
    """OpenMP binds the thread that loads it to one core, and then the system says that this thread may use one."""
    code = "import os, kpcore as kp; print(kp.config._available_cores())"
    assert python(code, **env).stdout == python(code).stdout != ""


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no threads")
def test_threads_are_no_more_than_openmp_may_use(python, no_wish):
    code = "import kpcore as kp; print(kp.get_num_threads())"
    core = str(min(os.sched_getaffinity(0)))
    assert python(code, GOMP_CPU_AFFINITY=core, OMP_PLACES=f"{{{core}}}").stdout == "1\n"
    assert (
        python("import kpcore; kpcore.show_config()", OMP_THREAD_LIMIT="1").stdout.count("1: OMP_THREAD_LIMIT=1 (") == 1
    )


def spins(done):
    return re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr).group(1)


@needs_gomp
@pytest.mark.parametrize(
    ("env", "expected", "words"),
    [
        ({}, "1000", "waiting threads spin 1000 rounds, then sleep"),
        ({"GOMP_SPINCOUNT": ""}, "1000", "waiting threads spin 1000 rounds, then sleep"),
        ({"GOMP_SPINCOUNT": "77"}, "77", "as set by GOMP_SPINCOUNT=77"),
        ({"OMP_WAIT_POLICY": "passive"}, "0", "as set by OMP_WAIT_POLICY=passive"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000", "as set by OMP_WAIT_POLICY=active"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(env, expected, words, python, no_wish):
    """And the environment is what it was, for Python and for a child."""
    code = f"""
import ctypes, os, subprocess
before = dict(os.environ)
import kpcore as kp
assert dict(os.environ) == before
child = subprocess.check_output("echo $GOMP_SPINCOUNT", shell=True, text=True)
assert child.strip() == before.get("GOMP_SPINCOUNT", "")
kp.show_config()
{SPINS}
"""
    done = python(code, **env)
    assert done.returncode == 0, done.stderr
    assert spins(done) == expected
    assert words in done.stdout


@needs_gomp
def test_config_says_that_an_openmp_loaded_before_does_not_know_of_the_short_wait(python, no_wish):
    """As when torch, which brings its own, is imported first."""
    first = f"import ctypes; ctypes.CDLL({cpu.openmp_library()!r}); "
    done = python(f"{first}import kpcore as kp; kp.show_config(); {SPINS}")
    assert spins(done) == "300000"
    assert "loaded before kpcore" in done.stdout and "set GOMP_SPINCOUNT=1000 before Python starts" in done.stdout
    done = python(f"{first}import kpcore as kp; kp.show_config(); {SPINS}", GOMP_SPINCOUNT="50")
    assert spins(done) == "50"
    assert "as set by GOMP_SPINCOUNT=50" in done.stdout


@needs_gomp
@pytest.mark.parametrize(("names", "first"), [("torch, kpcore", True), ("kpcore, torch", False)])
def test_config_knows_the_openmp_of_torch(names, first, python, no_wish):
    pytest.importorskip("torch")
    done = python(f"import {names}; kpcore.show_config()")
    assert ("loaded before kpcore" in done.stdout) is first
    assert ("torch" in re.search(r"OpenMP +(\S+)", done.stdout).group(1)) is first


# ---- the version


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("meson.build", r"^  version: '(.*)',$"),
        ("CHANGELOG.md", r"^## (\d\S*)"),
        ("CITATION.cff", r"^version: (.*)$"),
        (".ci/conda/recipe.yaml", r"^  version: (\d.*)$"),
        ("README.md", r"kpcore-(.*?)-cp310-abi3"),
    ],
)
def test_the_version_is_the_same_in_every_file(file, pattern):
    text = (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
    assert re.search(pattern, text, re.MULTILINE).group(1) == kp.__version__


# ---- systems that lack what Linux has


def test_without_an_affinity_all_cores_are_used(monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.delattr(kp.config.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(kp.config.os, "cpu_count", lambda: 7)
    monkeypatch.setattr(kp.config.cpu, "bound_processors", lambda: 0)
    monkeypatch.setattr(kp.config, "_quota_v2", lambda: float("inf"))
    assert kp.config._available_cores() == (7, "the cores this process may use")


def test_config_without_the_file_of_openmp(monkeypatch, capsys):
    """As on Windows."""
    monkeypatch.setattr(kp._openmp, "cpu", SimpleNamespace(has_openmp=lambda: True, openmp_library=lambda: None))
    kp.show_config()
    assert "how long waiting threads spin is not set by kpcore" in capsys.readouterr().out


def test_the_package_is_imported_where_processes_do_not_fork(python):
    """As on Windows, which has no os.register_at_fork, os.sched_getaffinity, /proc or module resource."""
    code = """
import pathlib, os, sys
for name in ("fork", "register_at_fork", "sched_getaffinity"):
    delattr(os, name)
sys.modules["resource"] = None
read_text = pathlib.Path.read_text
def refused(path, *arguments):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(path)
    return read_text(path, *arguments)
pathlib.Path.read_text = refused
import numpy as np, kpcore as kp
kp.show_config()
kp.radius_search(np.zeros((9, 3)), None, 1.0)
from kpcore import demo
print(demo._peak_memory())
"""
    done = python(code)
    assert done.stdout.endswith("nan\n"), done.stderr


# ---- how many threads a worker process has

WORKERS = """
import multiprocessing
import kpcore as kp

kp.config._available_cores = lambda: (5, "the cores of some machine")

def in_process(queue):
    queue.put(kp.get_num_threads())

if {early}:  # in a spawned child too, which does not know yet that it is one
    kp.get_num_threads()
if {explicit}:
    kp.set_num_threads(3)
if __name__ == "__main__":
    found = [kp.get_num_threads()]
    context = multiprocessing.get_context({method!r})
    with context.Pool(1) as pool:
        found.append(pool.apply(kp.get_num_threads))
        pool.close()
        pool.join()
    for daemon in (True, False):
        queue = context.SimpleQueue()
        process = context.Process(target=in_process, args=(queue,), daemon=daemon)
        process.start()
        found.append(queue.get())
        process.join()
    print(*found)
"""


def run_workers(folder, **choices):
    """The numbers of threads of a main process, of a Pool's worker, of a daemonic child and of another child."""
    script = folder / "main.py"
    script.write_text(WORKERS.format(**choices))
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@needs_openmp
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_daemonic_children_take_one_thread_and_others_all(method, early, tmp_path, no_wish):
    found = run_workers(tmp_path, method=method, early=early, explicit=False)
    assert found == [5, 1, 1, 5]


@needs_openmp
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_explicit_number_of_threads_wins_in_worker_processes(method, tmp_path, no_wish, monkeypatch):
    assert run_workers(tmp_path, method=method, early=True, explicit=True) == [3, 3, 3, 3]
    monkeypatch.setenv("KPCORE_NUM_THREADS", "4")
    assert run_workers(tmp_path, method=method, early=True, explicit=False) == [4, 4, 4, 4]
    monkeypatch.delenv("KPCORE_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "6,2")
    assert run_workers(tmp_path, method=method, early=False, explicit=False) == [6, 6, 6, 6]


def test_the_choice_is_kept_where_multiprocessing_is_loaded(python, no_wish):
    """As torch does; each search then read the files of the control group again, which took longer than the search."""
    code = "import multiprocessing, kpcore as kp; kp.get_num_threads(); kp.config._available_cores = None"
    done = python(f"{code}; print(kp.get_num_threads() > 0)")
    assert done.stdout == "True\n", done.stderr


LOADER = """
import torch
import kpcore as kp

def num_threads(item):
    return kp.get_num_threads()

if __name__ == "__main__":
    kp.get_num_threads()
    loader = torch.utils.data.DataLoader(range(2), batch_size=None, collate_fn=num_threads, num_workers=1,
                                         multiprocessing_context={method!r})
    print(*loader)
"""


@needs_openmp
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(("env", "expected"), [({}, "1 1"), ({"KPCORE_NUM_THREADS": "3"}, "3 3")])
def test_workers_of_a_dataloader_take_one_thread_unless_told_otherwise(method, env, expected, tmp_path, no_wish):
    pytest.importorskip("torch")
    script = tmp_path / "main.py"
    script.write_text(LOADER.format(method=method))
    done = subprocess.run([sys.executable, script], env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == expected, done.stderr


FORKED = """
import os, numpy as np, kpcore as kp
kp.config.cpu.pause_threads = lambda: False
points = np.random.default_rng(0).uniform(size=(100_000, 3))
kp.set_num_threads(2)
expected = kp.radius_search(points, None, 0.02).num_pairs
if os.fork() == 0:
    threads = kp.get_num_threads()
    same = kp.radius_search(points, None, 0.02).num_pairs == expected
    try:
        kp.set_num_threads(2)
        print(threads, same, "set", flush=True)
    except RuntimeError as error:
        print(threads, same, error, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_child_of_a_process_whose_openmp_cannot_pause_its_threads_takes_one(python, no_wish):
    """As the one of torch 2.6 cannot: a second thread would wait for ever."""
    done = python(FORKED, timeout=60)
    assert done.stdout.startswith("1 True threads: expected 1 in a forked child, because the OpenMP"), done


@needs_openmp
def test_a_child_of_a_process_whose_openmp_pauses_its_threads_keeps_their_number(python, no_wish):
    code = FORKED.replace("kp.config.cpu.pause_threads = lambda: False", "")
    assert python(code, timeout=60).stdout == "2 True set\n"


@pytest.mark.parametrize(
    ("quota", "limit", "expected"),
    [
        (1.5, 99, (2, "the quota of this control group")),
        (0.2, 99, (1, "the quota of this control group")),
        (7.5, 99, (8, "the cores this process may use")),
        (math.inf, 99, (8, "the cores this process may use")),
        (3.0, 2, (2, "OMP_THREAD_LIMIT=2")),
        (2.0, 3, (2, "the quota of this control group")),
    ],
)
def test_the_least_limit_is_the_number_of_threads(quota, limit, expected, monkeypatch):
    monkeypatch.setattr(kp.config.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(kp.config.cpu, "bound_processors", lambda: 0)
    monkeypatch.setattr(kp.config.cpu, "thread_limit", lambda: limit)
    monkeypatch.setenv("OMP_THREAD_LIMIT", str(limit))
    monkeypatch.setattr(kp.config, "_quota_v2", lambda: quota)
    assert kp.config._available_cores() == expected


@needs_openmp
@pytest.mark.parametrize(
    ("env", "code", "expected"),
    [
        ({"KPCORE_NUM_THREADS": "3"}, "", "3: KPCORE_NUM_THREADS=3 "),
        ({"OMP_NUM_THREADS": "3,1"}, "", "3: OMP_NUM_THREADS=3,1 "),
        ({"OMP_NUM_THREADS": "3"}, "kp.set_num_threads(2)", "2: kpcore.set_num_threads "),
        ({}, "kp.config._quota_v2 = lambda: 0.5", "1: the quota of this control group "),
        ({}, "import multiprocessing as m; m.current_process().daemon = True", "1: a worker process "),
    ],
)
def test_config_says_how_many_threads_and_why(env, code, expected, python, no_wish):
    done = python(f"import kpcore as kp\n{code}\nkp.show_config()", **env)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("threads ")]
    assert line.split(maxsplit=1)[1].startswith(expected)


def test_the_source_folder_is_not_the_package(python):
    """As Python finds it in a checkout that is the working directory."""
    root = Path(__file__).parents[1]
    done = python(f"import sys; sys.path.insert(0, {str(root)!r}); import kpcore")
    assert f"ImportError: kpcore: expected an installed package, got its sources in {root}: install" in done.stderr


def test_the_package_says_that_an_archive_cannot_be_imported(python, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "k"), "zip", Path(kp.__file__).parents[1], "kpcore")
    done = python(f"import sys; sys.path.insert(0, {archive!r}); import kpcore")
    assert f"expected an installed package, got {archive}/kpcore in an archive" in done.stderr


# ---- small problems

NUM_TASKS = """
import sys
sys.path.insert(0, {tests!r})
import examples, numpy as np, kpcore as kp, ops
def num_threads():
    return int(open("/proc/self/status").read().split("Threads:")[1].split()[0])
before = num_threads()
num, points = {num}, examples.cloud({num}, np.float32)[0]
kp.radius_search(points, None, 0.1)
kp.knn_search(points, None, 3)
kp.KDTree(points)
kp.farthest_point_sampling(points, num // 4, row_splits=np.array([0, num // 2, num]))
kp.build_pyramid(points, voxel_size=0.1, num_levels=3)
for variant in ops.VARIANTS if {operators} else ():
    op, arguments = ops.call(variant, num)
    out, pullback = ops.vjp(op, arguments, ops.diff(op, arguments))
    pullback(ops.covector(out))
print(num_threads() - before)
"""


@needs_openmp
@pytest.mark.parametrize(
    ("num", "operators", "started"), [(10, True, False), (200, True, False), (50_000, False, True)]
)
def test_small_problems_start_no_threads(num, operators, started, python):
    """OpenMP keeps a thread that it has started."""
    code = NUM_TASKS.format(tests=str(Path(__file__).parent), num=num, operators=operators)
    done = python(code, KPCORE_NUM_THREADS="8")
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 0) is started


# ---- instruction sets


def test_base_is_always_usable():
    assert "base" in cpu.isas()
    assert set(cpu.isas()) <= {"base", "avx2", "avx512"}


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs Linux on x86-64"
)
def test_instruction_sets_are_those_that_the_system_lists():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1).split())
    needed = {"avx2": {"avx2", "fma", "bmi2"}, "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "fma", "bmi2"}}
    listed = {isa for isa, names in needed.items() if names <= flags}
    assert set(cpu.isas()) - {"base"} <= listed
    assert not listed or len(cpu.isas()) == 1 or max(listed) in cpu.isas()  # a build may have fewer


@pytest.mark.parametrize("name", ["sse9", "", "AVX2 "])
def test_unknown_isa(name, set_isa):
    with pytest.raises(ValueError, match="base"):
        set_isa(name)


def test_kpcore_isa_is_what_show_config_says(python):
    printed = {isa: python("import kpcore; kpcore.show_config()", KPCORE_ISA=isa).stdout for isa in cpu.isas()}
    assert len(set(printed.values())) == len(printed)
    for isa, text in printed.items():
        assert isa in text


def test_show_config_says_what_a_bug_report_needs(capsys, set_threads):
    set_threads(3)
    kp.show_config()
    text = capsys.readouterr().out
    for word in (kp.__version__, "openmp", "numpy", "threads", "3", "gpu"):
        assert word in text.lower()


# ---- wrong environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KPCORE_ISA", "sse9"),
        ("KPCORE_NUM_THREADS", "0"),
        ("KPCORE_NUM_THREADS", "-1"),
        ("KPCORE_NUM_THREADS", "two"),
        ("KPCORE_NUM_THREADS", "1.5"),
    ],
)
def test_a_wrong_variable_is_a_clear_error(name, value, python):
    done = python(USE, **{name: value})
    assert done.returncode == 1
    assert name in done.stderr.splitlines()[-1] and value in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["KPCORE_ISA", "KPCORE_NUM_THREADS"])
def test_an_empty_variable_is_as_none(name, python):
    done = python(USE, **{name: ""})
    assert (done.returncode, done.stderr) == (0, "")


# ---- the rules of a run


@pytest.mark.parametrize("body", ["def test(): pytest.skip('why')", "pytest.skip('why', allow_module_level=True)"])
@pytest.mark.parametrize(("no_skip", "returncodes"), [("1", {1, 2}), ("", {0, 5})])
def test_a_skip_is_a_failure_where_none_is_allowed(body, no_skip, returncodes, tmp_path, monkeypatch):
    monkeypatch.setenv("KPCORE_NO_SKIP", no_skip)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(f"import pytest\n{body}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode in returncodes
    assert "why" in done.stdout


def test_a_result_over_the_limit_is_an_error_before_it_is_made():
    points = np.zeros((100, 3), np.float32)
    try:
        kp.set_memory_limit(4 * 100 * 100 - 1)
        assert kp.get_memory_limit() == 39_999
        with pytest.raises(MemoryError, match="10000 neighbours would take 40000 bytes, more than the limit of 39999"):
            kp.radius_search(points, None, 1.0)
        with pytest.raises(MemoryError, match="80000"):
            kp.knn_search(points, None, 100, return_distances=True)
        assert kp.radius_search(points, None, 1.0, count_only=True).sum() == 10_000
        kp.set_memory_limit(4 * 100 * 100)
        assert kp.radius_search(points, None, 1.0).num_pairs == 10_000
    finally:
        kp.set_memory_limit(None)


def test_a_result_larger_than_the_free_memory_is_an_error_before_it_is_made(monkeypatch):
    monkeypatch.setattr(kp.config, "_free_memory", lambda: 2**29)  # half of it would be too much
    with pytest.raises(
        MemoryError, match=r"about 400000000 neighbours would take 1600000000 bytes, more than the 536870912 "
    ):
        kp.radius_search(np.zeros((20_000, 3), np.float32), None, 1.0)


@pytest.mark.parametrize("indexed", [False, True])
def test_the_error_of_a_result_too_large_names_the_crowded_place(indexed):
    """Queries that are the points, and others; in the digits of the dtype."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.random((1000, 3)), np.full((300, 3), (0.1, 0.7, 0.3))]).astype(np.float32)
    counts = kp.radius_search(points, None, 0.05, count_only=True)
    assert counts.max() == counts[1000] >= 300

    def assert_refused(message, queries, **options):
        with pytest.raises(MemoryError, match=message):
            if indexed:
                kp.GridIndex(points, 0.05).radius_search(queries, 0.05, **options)
            else:
                kp.radius_search(points, queries, 0.05, **options)

    place = r"queries the one at \(0\.1, 0\.7, 0\.3\) has the most,"
    try:
        kp.set_memory_limit(1000)
        assert_refused(
            rf"^{counts.sum()} neighbours .* \(kpcore.set_memory_limit\); of 1300 {place} {counts.max()}$", None
        )
        assert_refused(rf"; of 2 {place} {counts.max()}$", points[[5, 1200]])
        assert_refused(r"\(kpcore.set_memory_limit\)$", None, max_neighbors=8)  # no place has more than others
    finally:
        kp.set_memory_limit(None)


def test_the_error_of_an_estimate_names_the_place_too(monkeypatch):
    monkeypatch.setattr(kp.config, "_free_memory", lambda: 2**29)
    place = r"of 256 queries the one at \(0\.0, 0\.0, 0\.0\) has the most, 20000"
    with pytest.raises(MemoryError, match=f"^about .*; {place}$"):
        kp.radius_search(np.zeros((20_000, 3)), None, 1.0)


def test_free_memory_is_some():
    assert 2**20 < kp.config._free_memory() < 2**50


GIB = 2**30


def groups(tmp_path, monkeypatch, own, files):
    """A machine of 64 GiB, this process in the control group `own`, and what the groups' files say, in GiB."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(f"MemTotal: {2**27} kB\nMemAvailable: {2**26} kB\n")
    (tmp_path / "self/cgroup").write_text(own)
    for name, value in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, dict):
            path.write_text("".join(f"{key} {int(number * GIB)}\n" for key, number in value.items()))
        else:
            path.write_text(f"{value if isinstance(value, str) else int(value * GIB)}\n")
    monkeypatch.setattr(kp.config, "_PROC", tmp_path)
    monkeypatch.setattr(kp.config, "_GROUPS", tmp_path / "groups")
    return kp.config._free_memory() / GIB


def v2(folder, most, used, **stat):
    stat = {"anon": 1, "inactive_file": 0, "active_file": 0, "shmem": 3} | stat
    return {f"{folder}memory.max": most, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def v1(folder, most, used, **stat):
    names = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"
    stat = {"inactive_file": 9, "total_inactive_file": 0, "total_active_file": 0} | stat
    return {f"memory/{folder}{name}": value for name, value in zip(names, (most, used, stat), strict=True)}


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", v2("", 16, 4), 12),
        ("0::/\n", v2("", 16, 15, inactive_file=6, active_file=5), 12),  # files that were read, and nothing else
        ("0::/\n", v2("", "max", 15), 64),
        ("0::/a/b\n", v2("a/", 16, 15, inactive_file=6) | v2("a/b/", "max", 3), 7),  # the group above has the limit
        ("0::/a/b\n", v2("a/", 16, 8) | v2("a/b/", 4, 3, active_file=1), 2),
        ("0::/elsewhere\n", v2("", 16, 4), 12),  # a container's own group, named as outside of it
        ("12:cpu:/x\n5:memory:/\n", v1("", 16, 15, total_inactive_file=2, total_active_file=3), 6),
        ("5:memory,cpu:/a/b\n", v1("a/", 16, 4) | v1("a/b/", 2**33, 3), 12),
        ("0::/\n4:memory:/a\n", v1("a/", 8, 4), 4),  # both at once
        ("0::/\n", v2("", 16, 4) | {"memory.stat": "gone"}, 64),
    ],
)
def test_what_is_free_in_a_control_group(tmp_path, monkeypatch, own, files, free):
    assert groups(tmp_path, monkeypatch, own, files) == free


def test_show_config_names_the_gpu_or_what_it_lacks(python):
    run = python("import kpcore; kpcore.show_config()", CUDA_VISIBLE_DEVICES="")
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("GPU")]
    assert "not used: CuPy is not installed" in line or "not used: expected a GPU and its driver" in line
    run = python("import sys, types; sys.modules['cupy'] = None; import kpcore.config as c; c.cupy()")
    assert (
        "NotFoundError: expected CuPy, for arrays on a GPU: pip install kpcore[cuda12] or kpcore[cuda13]" in run.stderr
    )


def test_ctrl_c_waits_for_the_end_of_an_import(tmp_path, monkeypatch):
    (tmp_path / "interrupted_package.py").write_text(
        "import signal\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:  # as pybind11 does\n"
        "    raise ImportError('initialization failed')\n"
        "complete = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            kp.config.require("interrupted_package", "io")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sys.modules.pop("interrupted_package").complete
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a handler of somebody else stays in force
        kp.config.require("interrupted_package", "io")
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.modules.pop("interrupted_package", None)


def test_no_function_imports_cupy(python):
    """Who has no GPU waits for nothing of it."""
    code = """
import sys
import numpy as np
import kpcore as kp
points = np.random.default_rng(0).random((50, 3))
kp.build_pyramid(points, voxel_size=0.2, num_levels=2)
nb = kp.knn_search(points, None, 3).to("cpu")
kp.kpconv(points, None, nb, points, np.ones((1, 3, 2)), np.zeros((1, 3)), 1.0)
print("cupy" in sys.modules or "kpcore.backends.gpu" in sys.modules)
"""
    assert python(code).stdout == "False\n"

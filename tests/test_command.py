"""The console script in processes of its own: closed pipes, full disks, signals, encodings, a wrong environment."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

START = "import sys, kpcore_command; sys.exit(kpcore_command.main())"
# As in a terminal, also where the tests run in the background of a script, which ignores it.
AWAKE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.fixture
def start(tmp_path):
    """A process of the console script in a folder of its own, as subprocess.Popen."""

    def start(*words, code=START, env=(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more):
        # Elsewhere: in the repository's root the package folder would shadow the installed one.
        command = [sys.executable, "-c", AWAKE + code, *map(os.fspath, words)]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | dict(env), stdout=stdout, stderr=stderr, **more)

    return start


@pytest.fixture
def run(start):
    def run(*words, **more):
        """(exit code, stdout, stderr), both as bytes."""
        process = start(*words, **more)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    return run


def test_the_package_runs_as_the_command(tmp_path):
    """Where the folder of scripts is not on the PATH."""
    done = subprocess.run([sys.executable, "-m", "kpcore", "config"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("kpcore ")
    done = subprocess.run([sys.executable, "-m", "kpcore", "no"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("kpcore: argument COMMAND: invalid choice: ")


def closed_pipe():
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["config"], ["--version"], ["--help"], ["demo", "a.npy", "--voxel", "9"]])
def test_a_closed_pipe_is_quiet(run, tmp_path, words, unbuffered):
    np.save(tmp_path / "a.npy", np.eye(3))
    pipe = closed_pipe()
    code, _, err = run(*words, stdout=pipe, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(pipe)
    assert err == b""
    assert code == 141 or words[0].startswith("--")  # argparse itself takes a closed pipe for no error


@pytest.mark.parametrize("words", [["demo", "none.npy"], ["demo", "--hue"]])
def test_a_closed_pipe_of_errors_is_quiet(run, words):
    pipe = closed_pipe()
    code, out, _ = run(*words, stderr=pipe)
    os.close(pipe)
    assert code in (2, 141) and out == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_meets_a_full_disk(run, unbuffered):
    with open("/dev/full", "wb") as full:
        code, _, err = run("config", stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
        assert (code, err) == (2, b"kpcore: standard output: No space left on device\n")
        assert run("demo", "none.npy", stderr=full)[0] == 2


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]])
def test_streams_that_are_closed(run, tmp_path, closed):
    """A picture would get the number of the stream, and all that is printed."""
    np.save(tmp_path / "a.npy", np.eye(3))
    shut = f"import os; [os.close(n) for n in {closed}]; os.execv({sys.executable!r}, [{sys.executable!r}, '-c', "
    words = ["demo", "a.npy", "--levels", "1", "--channels", "2"]
    code, _, _ = run(code=f"{shut}{START!r}, *{words!r}])")
    assert code == 0
    assert (tmp_path / "kpcore-a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KPCORE_NUM_THREADS", "abc"),
        ("KPCORE_NUM_THREADS", "0"),
        ("KPCORE_NUM_THREADS", "65537"),
        ("KPCORE_NUM_THREADS", "9" * 5000),
        ("OMP_NUM_THREADS", "abc"),
        ("OMP_NUM_THREADS", "1e3"),
        ("KPCORE_ISA", "xyz"),
    ],
)
def test_a_wrong_variable_is_one_line(run, name, value):
    code, out, err = run("config", env={"KPCORE_NUM_THREADS": "", name: value})
    assert (code, out) == (2, b"")
    assert re.fullmatch(rf"kpcore: {name}: expected [^\n]+, got '{value[:20]}[^\n]*'\n", err.decode())


ENCODINGS = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}]


@pytest.mark.parametrize(
    ("name", "env"),
    [(b"B\xe4ume.npy", ENCODINGS[1]), *zip(("Bäume 木.npy".encode(), b"two\nlines.npy"), ENCODINGS[::2], strict=True)],
)  # fmt: skip
def test_names_and_encodings_of_any_kind(run, tmp_path, name, env):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "b.npy", np.eye(3))
    os.rename(tmp_path / "b.npy", os.path.join(os.fsencode(tmp_path), name))
    code, out, err = run("demo", os.fsdecode(name), "--levels", "1", "--channels", "2", env=env)
    assert (code, err) == (0, b"") and b"picture: " in out
    assert b"kpcore-" + name[:-4] + b".png" in os.listdir(os.fsencode(tmp_path))
    code, _, err = run("demo", os.fsdecode(b"no" + name), env=env)
    assert code == 2 and err.count(b"\n") == 1 and b"Traceback" not in err


SLOW_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(name, *more):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100): pass  # where Python hears of it
            print("went on", file=sys.stderr)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("module", ["kpcore", "numpy.linalg", "kpcore.backends.cpu", "kpcore.cli"])
def test_ctrl_c_while_kpcore_is_imported(run, module):
    code, out, err = run("config", code=SLOW_IMPORT.format(module=module) + START)
    assert (code, out, err) == (130, b"", b"")


def test_ctrl_c_that_is_ignored_stays_so(run):
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code, out, _ = run("config", code=ignored + SLOW_IMPORT.format(module="kpcore.cli") + START)
    assert code == 0 and b"instruction set" in out


@pytest.mark.slow
def test_ctrl_c_at_any_moment(start, tmp_path):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((200_000, 3)))
    for wait in np.linspace(0.05, 2, 12):
        process = start("demo", "a.npy", "--voxel", "0.02", "--levels", "2")
        time.sleep(float(wait))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
        if b"kpcore" in err or process.returncode not in (0, 130):  # before the console script is at work
            assert b"_command" not in err and b"kpcore: " not in err and b"state is NULL" not in err, err
    assert not [name for name in os.listdir(tmp_path) if "part" in name]


def test_home_folders_and_empty_names(run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    np.save(home / "a.npy", np.eye(3))
    code, _, err = run("demo", "~/a.npy", "--out=~/out", "--levels", "1", "--channels", "2", env={"HOME": str(home)})
    assert (code, err) == (0, b"") and os.listdir(home / "out") == ["kpcore-a.png"]
    for words in (["demo", ""], ["demo", "a.npy", "--out", ""], ["train", "", "--out", "x"], ["test", ""]):
        code, out, err = run(*words)
        assert (code, out) == (2, b"") and b"expected a path, got an empty one" in err


# ---- commands that take long: progress, and what ends them

SETTINGS = """
[data]
train = [{ indoor = 0, points = 2000 }]
[data.classes]
flat = [0, 1]
upright = [2, 3, 4, 5]
[network]
voxel_size = 0.3
levels = 2
width = 8
kernel_size = 5
[training]
batch_points = 1000
batch_clouds = 2
epochs = 1
steps = 100000
"""
LINES = "import kpcore.console; kpcore.console.SECONDS_BETWEEN_LINES = 0.2\n"


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=10)
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_ended_says_how_to_resume_it(start, tmp_path, number):
    pytest.importorskip("safetensors")
    (tmp_path / "a b.toml").write_text(SETTINGS)
    process = start("train", "a b.toml", "--out", "run", code=LINES + START)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 2, process)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    *lines, last = err.decode().splitlines()
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert last == "kpcore: interrupted; resume with: kpcore train 'a b.toml' --out run --resume"
    step = r"epoch 1 of 1, step \d+ of 100000, loss [\d.]+, 0 % done, [\d.]+ (s|min|h) left"
    assert lines and all(re.fullmatch(step, line) for line in lines), lines
    assert b"points to train on" in out and not [one for one in os.listdir(tmp_path / "run") if "part" in one]
    if number == signal.SIGTERM:
        return
    words, before = shlex.split(last.partition("with: ")[2])[1:], log.stat().st_ino
    process = start(*words, "--quiet")
    wait_for(lambda: log.stat().st_ino != before and log.read_bytes(), process)  # cut to its checkpoint, and goes on
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err.decode()) == (b"", f"{last} --quiet\n")


SLOW_SECOND = """
import kpcore.pipeline.segmentation as s
import pathlib, time
segment, calls = s.segment, []
def slow(*args, **more):
    calls.append(args)
    if len(calls) == 2:
        pathlib.Path("second").touch()
        time.sleep(60)
    return segment(*args, **more)
s.segment = slow
"""


def test_labelling_that_is_ended_keeps_what_is_done(start, run, tmp_path):
    from kpcore.pipeline import training
    from kpcore.pipeline.settings import read_settings

    pytest.importorskip("safetensors")
    (tmp_path / "a.toml").write_text(SETTINGS)
    training.Training(read_settings(tmp_path / "a.toml"), tmp_path, tmp_path)._save("m.safetensors", {})
    (tmp_path / "scans").mkdir()
    for name in "abc":
        np.savez(tmp_path / "scans" / f"{name}.npz", points=np.random.default_rng(0).random((300, 3)) * 3)
    process = start("segment", "m.safetensors", "scans", "--out", "out", "--json", code=SLOW_SECOND + START)
    wait_for((tmp_path / "second").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and os.listdir(tmp_path / "out") == ["a.npz"]
    resume = "kpcore segment m.safetensors scans --out out --json --resume"
    assert err.decode().splitlines()[-1] == f"kpcore: interrupted; resume with: {resume}"
    assert json.loads(out)["error"] == "interrupted"
    code, out, _ = run(*shlex.split(resume)[1:])
    assert code == 0 and json.loads(out)["skipped"] == ["scans/a.npz"] and len(os.listdir(tmp_path / "out")) == 3


def test_json_meets_a_closed_pipe_and_a_full_disk(run):
    pipe = closed_pipe()
    code, _, err = run("config", "--json", stdout=pipe)
    os.close(pipe)
    assert (code, err) == (141, b"")
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            code, _, err = run("config", "--json", stdout=full)
        assert (code, err) == (2, b"kpcore: standard output: No space left on device\n")

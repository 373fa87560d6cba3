"""The command `kpcore segment` on surveys: what it says, its exit codes, faults of files, disks and other runs."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_tiled import HIGH, LOW, digests, model_with

from kpcore import cli, console, nn
from kpcore.io import ReadError
from kpcore.pipeline import engines, groups, merging, tiled
from kpcore.scenes.city import write_city

pytestmark = pytest.mark.filterwarnings("ignore::kpcore.KpcoreWarning")


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """A model, four tiles, and their labelled copies."""
    folder = tmp_path_factory.mktemp("command")
    model = model_with()
    nn.save(folder / "model.safetensors", model.net, model.params, model.state, **model.about())
    write_city(folder / "tiles", LOW, HIGH, density=1, tiles=(2, 2))
    assert segment(folder, folder / "tiles", "--out", folder / "expected")[0] == cli.DONE
    return folder


@pytest.fixture
def tiles(survey, tmp_path, monkeypatch):
    """Copies of the four tiles, of which a run makes several groups."""
    monkeypatch.setattr(tiled, "_MOST_IN_GROUP", 2500)
    shutil.copytree(survey / "tiles", tmp_path / "tiles")
    return sorted((tmp_path / "tiles").iterdir())


def segment(survey, *words):
    """(exit code, standard output, standard error) of the command."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = cli.main(["segment", str(survey / "model.safetensors"), *map(str, words)])
    return code, out.getvalue(), error.getvalue()


def test_what_is_said(survey, tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    code, out, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "-v")
    lines = out.splitlines()
    assert code == cli.DONE
    assert "are labelled as one survey" in lines[1] and lines[2].startswith("disk: some ")
    assert "a worker needs some" in out and "point of group" not in out.replace("1 point of", "")
    assert f"{tmp_path / 'out' / tiles[0].name}: " in out and "4 files: " in out
    assert "points of group 2 in " in out and " wrote " in out  # -v
    assert " of 4 files, " in error and "points, " in error and "/s, " in error and " left" in error
    assert digests(tmp_path / "out") == digests(survey / "expected")
    code, out, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume", "--json")
    results = json.loads(out)
    assert results["exit_code"] == code == cli.DONE and len(results["files"]) == 4 and results["failed"] == []
    assert {"counts", "seconds", "points_per_second", "peak_memory", "groups"} <= results.keys()
    code, out, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume", "-q")
    assert (code, error) == (cli.DONE, "") and out.startswith("4 files: 5,099 points") and "done already" not in out
    _, out, _ = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume")
    assert "the 4 files are done already" in out and "all of which an earlier run has labelled" in out


def test_one_of_each(survey, tmp_path):
    """One file, one group: no plural."""
    tile = sorted((survey / "tiles").iterdir())[0]
    code, out, _ = segment(survey, tile, "--out", tmp_path / "out.laz", "--scratch", tmp_path)
    assert code == cli.DONE and "1 file: " in out and not [word for word in ("1 files", "1 groups") if word in out]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.laz", "out.segment.json"]


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda content: content[: len(content) // 2], "truncated"),
    (lambda content: content[:1500] + bytes(200) + content[1700:], "damaged"),
    pytest.param(lambda content: b"", "is empty", marks=pytest.mark.slow),
    pytest.param(lambda content: b"no points but words " * 50, "is not a LAS file", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_damaged_tile(survey, tiles, tmp_path, damage, reason):
    bad, content = tiles[1], tiles[1].read_bytes()
    bad.write_bytes(damage(content))
    code, out, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out")
    assert code == cli.FAILED
    first, second = error.splitlines()
    assert first.startswith(f"kpcore: {bad}: ") and reason in first and first.count(bad.name) == 1
    assert second == "kpcore: 1 of 4 files failed"
    assert digests(tmp_path / "out").keys() == {tile.name for tile in tiles if tile != bad}
    bad.write_bytes(content)
    code, out, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume")
    assert code == cli.DONE and "are done already" in out and not error
    assert digests(tmp_path / "out") == digests(survey / "expected")


@pytest.mark.parametrize("change", [
    pytest.param("gone", marks=pytest.mark.slow), "another", pytest.param("touched", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_tile_that_changes_while_it_is_labelled(survey, tiles, tmp_path, monkeypatch, change):
    tile, content, label_group = tiles[2], tiles[2].read_bytes(), groups.label_group

    def label(job, *rest):
        if len([*job.folder.glob("groups/*")]) == 3:
            if change == "gone":
                tile.unlink(missing_ok=True)
            else:
                tile.write_bytes(tiles[0].read_bytes() if change == "another" else content)
                os.utime(tile, ns=(1, 1))
        return label_group(job, *rest)

    monkeypatch.setattr(groups, "label_group", label)
    code, _, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out")
    assert code == cli.FAILED and error.startswith(f"kpcore: {tile}: {'was' if change == 'gone' else 'has changed'}")
    assert digests(tmp_path / "out").keys() == {one.name for one in tiles if one != tile}
    monkeypatch.setattr(groups, "label_group", label_group)
    tile.write_bytes(content)
    assert segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume")[0] == cli.DONE
    assert digests(tmp_path / "out") == digests(survey / "expected")


def test_a_tile_that_changes_while_its_copy_is_written(survey, tiles, tmp_path, monkeypatch):
    write, tile = merging.write_pieces, tiles[3]

    def write_and_touch(field, source, *rest):
        differs = write(field, source, *rest)
        if source == str(tile):
            os.utime(tile, ns=(1, 1))
        return differs

    monkeypatch.setattr(merging, "write_pieces", write_and_touch)
    code, _, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out")
    assert code == cli.FAILED and f"{tile}: has changed since the start" in error
    assert tile.name not in digests(tmp_path / "out")


def test_a_full_disk_amid_the_copies(survey, tiles, tmp_path, monkeypatch):
    write = merging.write_pieces

    def write_two(field, source, *rest):
        if len(digests(tmp_path / "out")) == 2:
            refused = ReadError(f"{source}: No space left on device")  # as the writer says it
            refused.errno = errno.ENOSPC
            raise refused
        return write(field, source, *rest)

    monkeypatch.setattr(merging, "write_pieces", write_two)
    code, _, error = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out")
    first, second = error.splitlines()
    assert code == cli.REFUSED and first.endswith(".laz: No space left on device")
    assert "what is done is kept; resume with: kpcore segment" in second and second.endswith("--resume")
    monkeypatch.setattr(merging, "write_pieces", write)
    code, out, _ = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume")
    assert code == cli.DONE and "2 of 4 files are done already" in out
    assert digests(tmp_path / "out") == digests(survey / "expected")


def test_two_runs_to_one_folder(survey, tiles, tmp_path, monkeypatch):
    """The second is refused, and leaves the first alone."""
    pytest.importorskip("fcntl")
    label_group, second = groups.label_group, []

    def label(*args):
        if not second:
            second.append(None)
            second[0] = segment(survey, tmp_path / "tiles", "--out", tmp_path / "out")
            second.append(segment(survey, tmp_path / "tiles", "--out", tmp_path / "out", "--resume"))
        return label_group(*args)

    monkeypatch.setattr(groups, "label_group", label)
    assert segment(survey, tmp_path / "tiles", "--out", tmp_path / "out")[0] == cli.DONE
    for code, _, error in second:
        assert code == cli.REFUSED
        assert error == f"kpcore: --out: another run is labelling to {tmp_path / 'out'}\n"
    assert digests(tmp_path / "out") == digests(survey / "expected")


@pytest.mark.parametrize(("options", "reason"), [
    (["--memory", "1MB"], "--memory: expected at least 2"),
    (["--memory", "9000TB"], "--memory: expected at most the"),
    (["--memory", "5 apples"], "argument --memory: expected a size such as 8GB or 500MB, got '5 apples'"),
    (["--workers", "0"], "argument --workers: expected 1 to 1024, got 0"),
    (["--workers", "10000"], "argument --workers: expected 1 to 1024, got 10000"),
    (["--workers", "two"], "argument --workers: expected 1 to 1024, got 'two'"),
    (["--dask", ""], "--dask: expected tcp://host:port or local:N"),
    (["--dask", "local:0"], "--dask: expected local:N with 1 to 999 workers, got 'local:0'"),
    (["--dask", "tcp://127.0.0.1:1"], "tcp://127.0.0.1:1: expected a scheduler of Dask, got none"),
    (["--workers", "2", "--separate"], "--workers: only valid for a survey"),
])  # fmt: skip
def test_options_that_are_refused(survey, tmp_path, monkeypatch, options, reason):
    monkeypatch.setattr(engines, "_SECONDS_TO_CONNECT", 0.2)
    if "--dask" in options:
        pytest.importorskip("distributed")
    code, _, error = segment(survey, survey / "tiles", "--out", tmp_path / "out", *options)
    assert code == cli.REFUSED and error.startswith(f"kpcore: {reason}") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("manifest", ["{", "[]", '{"format": 0}'])
def test_resume_with_another_manifest(survey, tmp_path, manifest):
    (tmp_path / tiled.MANIFEST).write_text(manifest)
    code, _, error = segment(survey, survey / "tiles", "--out", tmp_path, "--resume")
    assert code == cli.REFUSED and error.count("\n") == 1 and tiled.MANIFEST in error
    assert (tmp_path / tiled.MANIFEST).read_text() == manifest


def test_names_of_any_kind(survey, tiles, tmp_path):
    (tmp_path / "tiles" / "a [b]*.laz").write_bytes(tiles[0].read_bytes())
    tiles[0].unlink()
    tiles[1].rename(tmp_path / "tiles" / "gr\u00fc\u00dfe.laz")
    tiles[2].rename(tmp_path / "tiles" / "two\nlines.laz")
    out = tmp_path / "out\nput"
    code, printed, _ = segment(survey, tmp_path / "tiles", "--out", out)
    assert code == cli.DONE and "two lines.laz: " in printed and not [*printed.split("\nput")][1:]
    assert {path.name for path in out.glob("*.laz")} == {path.name for path in (tmp_path / "tiles").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, cli.TERMINATED), (signal.SIGINT, cli.INTERRUPTED)])
def test_signals(survey, tiles, tmp_path, sent, code):
    """The command says how to resume, and no process is left."""
    program = (
        "import signal, sys\n"
        "from kpcore import cli\n"
        "from kpcore.pipeline import tiled\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    tiled._MOST_IN_GROUP = 1000\n"
        "    sys.exit(cli.main(sys.argv[1:]))\n"
    )
    (tmp_path / "program.py").write_text(program)
    words = ["segment", survey / "model.safetensors", tmp_path / "tiles", "--out", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-P", tmp_path / "program.py", *map(str, words)],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               start_new_session=True)  # fmt: skip
    end = time.monotonic() + 60
    while not [*(tmp_path / "out").glob(".segment*/groups/*.safetensors")]:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.startswith("kpcore: interrupted; resume with: kpcore segment ") and error.count("\n") == 1
    end = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert segment(survey, *words[2:-2], "--resume")[0] == cli.DONE
    assert digests(tmp_path / "out") == digests(survey / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"workers": 2}, {"dask": "local:2"}])
def test_workers_that_are_killed(survey, tiles, tmp_path, engine):
    """Twice a worker that has just done a task: the others go on, and the result is the same."""
    if "dask" in engine:
        pytest.importorskip("distributed")
    killed = set()

    def watch(what, done, note):
        process = int(note.partition(": ")[0].split()[-1]) if what == "worker" else os.getpid()
        if process not in {os.getpid(), *killed} and len(killed) < 2:
            killed.add(process)
            os.kill(process, signal.SIGKILL)

    done = tiled.segment_tiles(survey / "model.safetensors", tiles, tmp_path / "out", watch=watch, **engine)
    assert len(killed) == 2 and not done.failed
    assert digests(tmp_path / "out") == digests(survey / "expected")

"""The commands in this process: options of all of them, exit codes, what is printed where, several scans at once."""

import contextlib
import io
import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import kpcore as kp
from kpcore import cli, console
from kpcore.nn import checkpoints
from kpcore.pipeline import filenames, segmentation, training
from kpcore.pipeline.settings import SettingsError, from_dict

pytest.importorskip("safetensors")

FLAT, UPRIGHT = [0, 1], [2, 3, 4, 5]


def write_scan(path, seed, num=1500):
    cloud = kp.scenes.indoor(num, seed)
    np.savez(path, points=cloud.points, labels=cloud.labels, colors=cloud.colors)
    return path


def settings_dict(**more):
    """Settings of seconds; `more` by section."""
    sections = {
        "data": {"train": ["t0.npz"], "classes": {"flat": FLAT, "upright": UPRIGHT}, "features": ["one", "height"]},
        "network": {"voxel_size": 0.3, "levels": 2, "width": 8, "kernel_size": 5},
        "training": {"radius": 1.5, "batch_points": 1000, "batch_clouds": 2, "epochs": 1, "steps": 3, "workers": 0},
    }
    return {name: values | more.get(name, {}) for name, values in sections.items()}


def write_toml(path, sections):
    lines = []
    for name, values in sections.items():
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in tables)]
        for key, table in tables.items():
            lines += [f"[{name}.{key}]", *(f"{one} = {json.dumps(value)}" for one, value in table.items())]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Without curves and pictures, which take more time than the runs."""
    from kpcore import picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "curves", lambda out, **more: None)
        patch.setattr(picture, "draw", lambda *args, **more: None)
        yield


@pytest.fixture(scope="module")
def tiles(tmp_path_factory, no_pictures):
    """A folder with three scans, and a run on the first of them in `run`."""
    folder = tmp_path_factory.mktemp("tiles")
    for number in range(3):
        write_scan(folder / f"t{number}.npz", number)
    training.Training(from_dict(settings_dict()), folder / "run", folder).run()
    return folder


@pytest.fixture
def model(tiles):
    return tiles / "run" / "best.safetensors"


@pytest.fixture
def objects(command):
    """Run a command with --json: (exit code, its object, stderr)."""

    def run(*words):
        code, out, err = command(*words, "--json")
        assert out.count("\n") == 1
        result = json.loads(out, parse_constant=pytest.fail)
        assert result["exit_code"] == code and result["command"] == words[0]
        return code, result, err

    return run


# ---- options and help


def subcommands():
    return next(action.choices for action in cli.parser()._actions if action.dest == "command")


@pytest.mark.parametrize("name", [*subcommands()])
def test_every_command_has_examples_that_parse_and_exit_codes(name):
    command = subcommands()[name]
    examples, codes = command.epilog.split("\n\n")
    for line in examples.splitlines()[1:]:
        words = shlex.split(line)
        args = cli.parser().parse_args([*words[1:], "--threads", "3", "--json", "-v"])
        assert (words[0], words[1]) == ("kpcore", name) and callable(args.run)
        assert (args.threads, args.json, args.amount) == (3, True, "verbose")
    assert {"  0 ", "  2 ", "  130 "} <= {line[: line.index(" ", 3)] + " " for line in codes.splitlines()[1:]}
    assert ("  4 " in codes) == any("--strict" in action.option_strings for action in command._actions)


def test_the_page_of_the_commands_is_that_of_the_parser(monkeypatch):
    docs = Path(__file__).parents[1] / "docs"
    monkeypatch.syspath_prepend(docs)
    import commands

    assert commands.page() == (docs / "commands.md").read_text(encoding="utf-8"), "run python docs/commands.py"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config", "--threads", "0"], "--threads: expected 1 to 65536, got 0"),
        (["segment", "m", "a", "--out", "b", "--keep", "7,x"], "--keep: expected labels such as 7,9,18, got '7,x'"),
        (["segment", "m", "a", "--out", "b", "--ignore", "7,held"], "--ignore: expected labels, and flags of withheld"),
        (["segment", "m", "a", "--out", "b", "--unclassified", "1.5"], "expected a probability above 0, at most 1"),
        (["segment", "m", "a", "--out", "b", "--scale", "1,2,3"], "--scale: expected one factor, or two"),
        (["segment", "m", "a", "--out", "b", "--scale", "feet"], "--scale: expected a number, got 'feet'"),
        (["segment", "m", "a", "--out", "b", "--scale", "0"], "--scale: expected a length from 1e-09"),
    ],
)
def test_values_that_are_refused(capsys, words, message):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and err.startswith("kpcore: ")
    assert cli.main([*words, "--json"]) == 2
    described = json.loads(capsys.readouterr().out)
    assert message in described["error"] and described["exit_code"] == 2


def test_values_of_segment():
    def parsed(*words):
        return cli.parser().parse_args(["segment", "m", "a", "--out", "b", *words])

    assert parsed("--scale", "0.3048").scale == (0.3048, 0.3048) and parsed("--scale", "0.3048,1").scale == (0.3048, 1)
    assert parsed("--scale", "auto").scale == "auto" and parsed().scale is None
    assert parsed("--keep", "7,9,18").keep == (7, 9, 18)
    assert parsed("--ignore", "7,withheld,-1").ignore == (7, "withheld", -1)


def test_the_number_of_threads_is_that_of_one_command(command, monkeypatch):
    before, during = kp.get_num_threads(), []
    monkeypatch.setattr(kp, "show_config", lambda: during.append(kp.get_num_threads()))
    assert command("config", "--threads", 3)[0] == 0
    assert during == [3] and kp.get_num_threads() == before


# ---- what is printed, and exit codes


def test_quiet_leaves_results_and_nothing_else(command, tiles, model, tmp_path):
    code, out, err = command("segment", model, tiles / "t1.npz", "--out", tmp_path / "a.npz", "-q")
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path / 'a.npz'}: 1,500 points labelled\n") and "mIoU" in out
    write_toml(tmp_path / "a.toml", settings_dict())
    code, out, err = command("train", tmp_path / "a.toml", "--data", tiles, "--out", tmp_path / "run", "--quiet")
    assert (code, err) == (0, "") and re.fullmatch(r"(test after epoch \d: mIoU .*\n)+|", out)
    assert command("demo", tiles / "t1.npz", "--voxel", 0.3, "--levels", 1, "--channels", 2, "--out", tmp_path,
                   "--quiet") == (0, "", "")  # fmt: skip
    code, out, err = command("config", "--quiet")
    assert (code, err) == (0, "") and out.startswith("kpcore ")


def test_json_is_one_object_with_the_results(objects, tiles, model, tmp_path):
    code, result, err = objects("config")
    assert (code, err) == (0, "") and result["config"]["kpcore"] == kp.__version__
    code, result, _ = objects(
        "demo", tiles / "t1.npz", "--voxel", 0.3, "--levels", 1, "--channels", 2, "--out", tmp_path
    )
    assert code == 0 and result["levels"][0]["points"] > 100 and result["picture"].endswith("kpcore-t1.png")
    code, result, _ = objects("segment", model, tiles / "t1.npz", "--out", tmp_path / "a.npz")
    (one,) = result["files"]
    with np.load(tmp_path / "a.npz") as copy:
        assert one["counts"] == {"flat": (copy["labels"] == 0).sum(), "upright": (copy["labels"] == 2).sum()}
    confusion = np.array(one["confusion"])
    assert code == 0 and one["points"] == 1500 and one["out"] == str(tmp_path / "a.npz")
    assert np.isclose(one["scores"]["accuracy"], np.trace(confusion) / confusion.sum())
    code, result, err = objects("segment", model, tiles / "none.npz", "--out", tmp_path / "b.npz")
    assert code == 2 and err == f"kpcore: {result['error']}\n" and "none.npz" in result["error"]


def test_json_has_no_numbers_that_are_not_finite():
    plain = console.plain({"a": np.array([1.5, np.nan]), 2: (np.float32(0.5), np.int64(3), -np.inf), "p": Path("x")})
    assert plain == {"a": [1.5, None], "2": [0.5, 3, None], "p": "x"}


def test_an_error_of_kpcore_is_one_line(objects, monkeypatch, model, tiles, tmp_path):
    def fails(*args, **kwargs):
        raise KeyError("x")

    monkeypatch.setattr(segmentation, "check_out", fails)
    code, result, err = objects("segment", model, tiles / "t1.npz", "--out", tmp_path / "a.npz")
    assert code == 1 and err.count("\n") == 1 and "this is an error in kpcore, please report it: KeyError: 'x'" in err
    assert "cli.py line " in err and "in _copies" in err and result["error"] in err


@pytest.mark.filterwarnings("ignore")  # which must not keep them from being counted
@pytest.mark.parametrize("command_name", ["segment", "test"])
def test_warnings_that_a_result_may_not_be_trusted(objects, monkeypatch, model, tiles, tmp_path, command_name):
    from kpcore.pipeline import labelling

    def doubtful(function):
        def call(*args, **kwargs):
            warnings.warn("97 % of height lies beyond the training range", kp.KpcoreWarning, stacklevel=2)
            warnings.warn("something else", UserWarning, stacklevel=2)
            return function(*args, **kwargs)

        return call

    if command_name == "segment":
        monkeypatch.setattr(segmentation, "segment", doubtful(segmentation.segment))
        words = ["segment", model, tiles / "t1.npz", tiles / "t2.npz", "--out", tmp_path / "out"]
        about = [f"{tiles / name}: " for name in ("t1.npz", "t2.npz")]
    else:
        monkeypatch.setattr(labelling, "evaluate_scores", doubtful(labelling.evaluate_scores))
        groups, content = checkpoints.read(model)
        content["settings"]["data"]["test"] = [content["settings"]["data"]["train"][0]]
        checkpoints.write(tmp_path / "m.safetensors", groups, content)
        words, about = ["test", tmp_path / "m.safetensors", "--data", tiles], [""]
    code, result, err = objects(*words)
    lines = [f"{file}97 % of height lies beyond the training range" for file in about]
    assert code == 0 and [one for one in result["warnings"] if "97 %" in one] == lines
    assert all(err.count(f"kpcore: {line}\n") == 1 for line in lines)
    if command_name == "segment":
        assert [[w for w in one["warnings"] if "97" in w] for one in result["files"]] == [[line] for line in lines]
    code, result, _ = objects(*words, "--strict")
    assert code == result["exit_code"] == 4


@pytest.mark.filterwarnings("default")
def test_other_warnings_are_no_reason_for_exit_code_4(command, monkeypatch, model, tiles, tmp_path):
    monkeypatch.setattr(segmentation, "check_out", lambda *args: warnings.warn("old", UserWarning, stacklevel=1))
    code, _, err = command("segment", model, tiles / "t1.npz", "--out", tmp_path / "a.npz", "--strict")
    assert code == 0 and "kpcore: old\n" in err, err


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_is_a_line_at_intervals(capsys, monkeypatch):
    clock = iter(np.arange(0, 1000, 25.0))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with console.Progress("training", 8, 2) as progress:  # began at 0 s; each step below reads the clock at least once
        for step in range(2, 8):
            progress.step("epoch 1 of 2", f"loss {step}.000", f"step {step + 1} of 4")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 1 of 2, step 5 of 4, loss 4.000, 62 % done, 125 s left".replace("125 s", "2 min")
    assert 1 <= len(lines) <= 3
    with console.printing(quiet=True, verbose=False), console.Progress("x", 2) as progress:
        for _ in range(2):
            progress.step()
    assert capsys.readouterr().err == ""


def test_lines_are_printed_above_the_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.Progress("labelling") as progress:
        progress.to(0.5, note="a.laz")
        console.say("done: 1")
        console.print_line("kpcore: careful", sys.stderr)
    shown = sys.stderr.getvalue()
    assert capsys.readouterr().out == "done: 1\n" and "50 %" in shown and "a.laz" in shown
    assert "kpcore: careful\n" in shown.replace("\r", "\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (89, "89 s"), (100, "2 min"), (5300, "88 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


# ---- several scans


def test_a_folder_of_scans_goes_on_after_one_that_fails(objects, command, model, tiles, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("b.npz", "a.npz"):
        (scans / name).write_bytes((tiles / "t1.npz").read_bytes())
    (scans / "bad.npz").write_text("no")
    for name in (".hidden.npz", "notes.txt", "view.png"):
        (scans / name).write_text("no scan")
    (scans / "deeper").mkdir()
    write_scan(scans / "deeper" / "c.npz", 2)
    out = tmp_path / "new" / "out"
    code, result, err = objects("segment", model, scans, "--out", out)
    assert code == 3 and sorted(path.name for path in out.iterdir()) == ["a.npz", "b.npz"]
    assert [one["file"] for one in result["files"]] == [str(scans / "a.npz"), str(scans / "b.npz")]
    assert [one["file"] for one in result["failed"]] == [str(scans / "bad.npz")]
    assert err == f"kpcore: {scans / 'bad.npz'}: is not a NPZ file\nkpcore: 1 of 3 files failed\n"
    matrices = [np.array(one["confusion"]) for one in result["files"]]
    assert (
        result["confusion"] == sum(matrices).tolist()
        and result["counts"]["flat"] == 2 * result["files"][0]["counts"]["flat"]
    )
    assert segmentation.read_cloud(training.Model.load(model).settings, out / "a.npz").labels.tolist() == (
        segmentation.read_cloud(training.Model.load(model).settings, out / "b.npz").labels.tolist()
    )

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "b.npz").unlink()
    (scans / "bad.npz").unlink()
    code, result, _ = objects("segment", model, scans / "*.npz", "--out", out, "--resume")
    assert code == 0 and result["skipped"] == [str(scans / "a.npz")] and len(result["files"]) == 1
    assert (out / "a.npz").stat().st_mtime_ns == before["a.npz"] and (out / "b.npz").exists()
    code, printed, _ = command("segment", model, scans / "**" / "*.npz", "--out", out)
    assert code == 0 and (out / "c.npz").exists() and "3 scans: 4,500 points labelled" in printed
    assert "confusion, a row for each true class:" in printed


def test_if_all_scans_fail_they_are_refused(objects, model, tiles, tmp_path):
    for name in ("x.npz", "y.npz"):
        (tmp_path / name).write_bytes(b"")
    code, result, err = objects("segment", model, tmp_path / "x.npz", tmp_path / "y.npz", "--out", tmp_path / "out")
    assert code == 2 and len(result["failed"]) == 2 and "2 of 2 files failed" in err


def test_an_error_of_kpcore_in_one_scan_leaves_the_others(objects, monkeypatch, model, tiles, tmp_path):
    segment = segmentation.segment

    def fails(model, source, out, **options):
        if source.name == "t1.npz":
            raise IndexError("7")
        return segment(model, source, out, **options)

    monkeypatch.setattr(segmentation, "segment", fails)
    code, result, err = objects("segment", model, tiles, "--out", tmp_path / "out")
    assert code == 3 and len(result["files"]) == 2 and f"{tiles / 't1.npz'}: this is an error in kpcore" in err


def test_scans_that_are_refused_before_the_work(command, model, tiles, tmp_path):
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "T1.npz").write_bytes(b"")
    (tmp_path / "t1.ply").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.xyz").write_text("0 0 0\n")
    scan, out = tiles / "t1.npz", tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "t1.npz").symlink_to(scan)
    for words, message in (
        ([scan, tmp_path / "tiles" / "T1.npz", "--out", out], "T1.npz: its copy would be "),
        ([scan, tmp_path / "t1.ply", "--out", out, "--format", "laz"], "t1.laz, as that of "),
        ([scan, scan, "--out", out], "expected each scan once, got it twice"),
        ([tiles, "--out", tiles], "t0.npz would be replaced by a copy; expected another folder"),
        ([scan, "--out", tmp_path / "linked"], "t1.npz would be replaced by a copy; expected another folder"),
        ([tiles, "--out", tmp_path / "x.laz"], "expected the name of a folder for 3 scans, got that of a file"),
        ([tiles, "--out", tmp_path / "file"], "file: expected a folder for 3 scans, got a file"),
        ([tiles, "--out", out, "--picture", tmp_path / "p.png"], "--picture: only valid for one FILE"),
        ([scan, "--out", tmp_path / "x.npz", "--resume"], "--resume: only valid where --out is a folder"),
        ([scan, "--out", tmp_path / "x.npz", "--format", "ply"], "--format: only valid where --out is a folder"),
        ([tmp_path / "empty", "--out", out], "empty: expected a folder of LAS, LAZ, PCD, PLY, NPZ files, got none"),
        ([tmp_path / "texts", "--out", out], "got none; name others by a pattern such as"),
        ([tmp_path / "*.las", "--out", out], "*.las: expected files that match, got none"),
    ):
        code, printed, err = command("segment", model, *words)
        assert (code, printed) == (2, "") and message in err and err.count("\n") == 1, err
    assert not out.exists() and not (tmp_path / "x.npz").exists()


def test_options_are_passed_on(command, monkeypatch, model, tiles, tmp_path):
    calls, segment = [], segmentation.segment

    def spy(model, source, out, **options):
        calls.append((source, out, options))
        return segment(model, source, out)

    monkeypatch.setattr(segmentation, "segment", spy)
    words = ["--method", "potentials", "--votes", 2, "--keep", "2", "--into", "new", "--confidence", "--unclassified",
             "0.5", "--ignore", "7,withheld", "--scale", "2,1"]  # fmt: skip
    assert command("segment", model, tiles / "t1.npz", "--out", tmp_path / "out", *words)[0] == 0
    ((source, out, options),) = calls
    assert callable(options.pop("watch")) and options.pop("report") is console.say
    assert (source, out) == (tiles / "t1.npz", tmp_path / "out" / "t1.npz") and options == {
        "method": "potentials", "votes": 2, "category": None, "keep": (2,), "into": "new", "confidence": True,
        "unclassified": 0.5, "ignore": (7, "withheld"), "scale": (2.0, 1.0),
    }  # fmt: skip


# ---- patterns in settings


def test_patterns_stand_for_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.npz", "a.npz", "c.txt", "[x].npz", ".d.npz", "in/e.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "f.npz").mkdir()
    assert filenames.matching("*.npz", tmp_path) == ["[x].npz", "a.npz", "b.npz"]
    assert filenames.matching("**/*.npz", tmp_path) == ["[x].npz", "a.npz", "b.npz", "in/e.npz"]
    assert filenames.matching("[x].npz", tmp_path) == ["[x].npz"]  # of a file that exists
    assert filenames.matching("[ab].npz", tmp_path) == ["a.npz", "b.npz"]
    assert filenames.matching("in/", tmp_path) == ["in/e.npz"] == filenames.matching("in", tmp_path)
    assert filenames.matching(tmp_path / "in") == [str(tmp_path / "in" / "e.npz")]
    assert filenames.matching("none.npz", tmp_path) == ["none.npz"]  # reading it says that it does not exist
    with pytest.raises(SettingsError, match=r"^z\*: expected files that match, got none in the folder /"):
        filenames.matching("z*", tmp_path)


def test_scenes_of_patterns_keep_their_box_and_are_checked(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_scan(tmp_path / name, 0)
    box = {"file": "*.npz", "min": [0.0]}
    scenes = filenames.expand(from_dict(settings_dict(data={"train": [box]})), tmp_path).data.train
    assert [(one.file, one.min) for one in scenes] == [("a.npz", [0.0]), ("b.npz", [0.0])]
    config = from_dict(settings_dict(data={"train": ["*.npz"], "validation": ["b.npz"]}))
    with pytest.raises(SettingsError, match=r"\[data\] validation\[0\]: expected points that are not in train, got b"):
        training.Training(config, tmp_path / "run", tmp_path)
    config = from_dict(settings_dict(data={"train": ["x/*.npz"]}))
    with pytest.raises(SettingsError, match=r"^\[data\] train: x/\*\.npz: expected files that match, got none"):
        training.Training(config, tmp_path / "run", tmp_path)
    config = from_dict(settings_dict(data={"train": ["*.npz"], "folds": "file"}))
    assert [*filenames.expand(config, tmp_path).by_fold()] == ["a.npz", "b.npz"]


def test_a_pattern_that_stands_for_a_test_scene_too_is_warned_about(tiles, tmp_path):
    def config(**data):
        return from_dict(settings_dict(data=data))

    message = r"\[data\] test: expected points that are not in train, got t1\.npz, so that their scores are too good"
    with pytest.warns(kp.KpcoreWarning, match=message):
        training.Training(config(train=["t*.npz"], test=["t1.npz"]), tmp_path, tiles)
    box = {"file": "t1.npz", "min": [0.0]}
    for train, test in ((["t[02].npz"], "t1.npz"), (["t1.npz"], "t1.npz"), ([{"file": "t*.npz", "max": [0.0]}], box)):
        assert filenames.trained_and_tested(config(train=train, test=[test]), tiles) == []


# ---- resuming, beginning with a model, memory


def run_of(config, out, folder, **more):
    lines = []
    run = training.Training(config, out, folder, say=lines.append, **more)
    run.run()
    return run, lines


def assert_same_weights(run, other):
    for name, value in run.model.params.items():
        np.testing.assert_array_equal(value, other.model.params[name])


def test_a_run_with_a_pattern_is_resumed_with_the_same_files(tiles, tmp_path):
    for name in ("t0.npz", "t1.npz"):
        (tmp_path / name).write_bytes((tiles / name).read_bytes())
    config = from_dict(settings_dict(data={"train": ["t*.npz"]}))
    run, lines = run_of(config, tmp_path / "run", tmp_path)
    assert run.files["train"] == ["t0.npz", "t1.npz"] and lines[0] == "reading the data: 2 for train"
    assert (
        checkpoints.read(tmp_path / "run" / "best.safetensors")[1]["settings"]["data"]["train"][0]["file"] == "t*.npz"
    )
    training.Training(config, tmp_path / "run", tmp_path, resume=True)
    (tmp_path / "t2.npz").write_bytes((tiles / "t2.npz").read_bytes())
    (tmp_path / "t0.npz").unlink()
    message = "expected the files of the run to resume, got others: new in train: t2.npz; missing in train: t0.npz"
    with pytest.raises(ValueError, match=message):
        training.Training(config, tmp_path / "run", tmp_path, resume=True)


@pytest.mark.parametrize("schedule", ["exponential", "one_cycle"])
def test_more_epochs_than_before(tiles, tmp_path, schedule):
    def config(**more):
        return from_dict(settings_dict(training={"schedule": schedule, "optimizer": "adamw", **more}))

    run_of(config(epochs=1), tmp_path / "run", tiles)
    resumed, lines = run_of(config(epochs=2, validate=1, workers=1), tmp_path / "run", tiles, resume=True)
    assert (resumed.epoch, resumed.optimizer.num_steps) == (2, 6)
    assert resumed.model.settings.training.epochs == 2
    (said,) = [line for line in lines if line.startswith("2 epochs instead of 1")]
    if schedule == "exponential":
        assert_same_weights(resumed, run_of(config(epochs=2), tmp_path / "whole", tiles)[0])
        assert "stretched" not in said
    else:
        rates = [kp.nn.one_cycle(0.01, steps)(3) for steps in (6, 3)]
        assert said.endswith(f"is stretched to them, which is now {rates[0]:.3g} instead of {rates[1]:.3g}")
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert log[3]["lr"] == rates[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"training": {"lr": 0.004}}, r"\[training\] lr: 0.01 in the run, 0.004 in the file"),
        ({"network": {"momentum": 0.5}}, r"\[network\] momentum: None in the run, 0.5 in the file"),
        (
            {"data": {"classes": {"flat": [0], "upright": UPRIGHT}}},
            r"\[data.classes\] flat: \[0, 1\] in the run, \[0\] in",
        ),
        ({"data": {"train": ["t0.npz", "t1.npz"]}}, r"\[data\] train: none in the run, t1.npz in the file"),
        ({"data": {"train": [{"file": "t0.npz", "min": [0.5]}]}}, r"\[data\] train: Part\(file='t0.npz', min=None"),
        ({"data": {"ground": {"cell": 2.0}}}, r"\[data.ground\] cell: 1.0 in the run, 2.0 in the file"),
    ],
)
def test_other_settings_than_those_of_the_run_are_named(tiles, more, message):
    with pytest.raises(
        ValueError, match=rf"last\.safetensors: expected the settings of the run .*: {message}"
    ) as refused:
        training.Training(from_dict(settings_dict(**more)), tiles / "run", tiles, resume=True)
    assert "\n" not in str(refused.value) and "workers" not in str(refused.value)


def test_fewer_epochs_than_before_are_refused(tiles, tmp_path):
    run_of(from_dict(settings_dict(training={"epochs": 2, "steps": 1})), tmp_path / "run", tiles)
    with pytest.raises(ValueError, match=r"\[training\] epochs: 2 in the run, 1 in the file$"):
        training.Training(from_dict(settings_dict(training={"steps": 1})), tmp_path / "run", tiles, resume=True)


def test_a_training_begins_with_a_model(tiles, model, tmp_path):
    before = training.Model.load(model)
    config = from_dict(settings_dict(data={"train": ["t2.npz"]}))
    lines = []
    same = training.Training(config, tmp_path / "a", tiles, init=model, seed=5, say=lines.append)
    for arrays, source in ((same.model.params, before.params), (same.model.state, before.state)):
        assert all((value == source[name]).all() for name, value in arrays.items())
    assert same.model.columns == before.columns != training.Training(config, tmp_path / "a", tiles).model.columns
    assert lines[-1].startswith(f"begins with {model}: ") and "are new" not in lines[-1]
    for classes in ({"upright": UPRIGHT, "flat": FLAT}, {"flat": FLAT, "wall": [2], "rest": [3, 4, 5]}):
        config = from_dict(settings_dict(data={"train": ["t2.npz"], "classes": classes}))
        new, untrained = (
            training.Training(config, tmp_path / "b", tiles, init=one, seed=5, say=lines.append)
            for one in (model, None)
        )
        different = {name for name, value in new.model.params.items()
                     if value.shape != before.params[name].shape or (value != before.params[name]).any()}  # fmt: skip
        assert {name.rpartition(".")[0] for name in different} == {"head.1"}
        assert (new.model.params["head.1.weights"] == untrained.model.params["head.1.weights"]).all()
        numbers = sum(new.model.params[f"head.1.{one}"].size for one in ("weights", "bias"))
        assert (
            f"; {numbers} are new, of the layer for the classes, which are {' '.join(classes)}, there flat upright"
            in (" ".join(lines))
        )


def test_a_run_that_began_with_a_model_is_resumed(tiles, model, tmp_path):
    config = from_dict(settings_dict(data={"train": ["t2.npz"]}, training={"epochs": 2}))
    whole, _ = run_of(config, tmp_path / "whole", tiles, init=model)
    run_of(from_dict(settings_dict(data={"train": ["t2.npz"]})), tmp_path / "run", tiles, init=model)
    resumed, _ = run_of(config, tmp_path / "run", tiles, resume=True, init=model)
    assert_same_weights(resumed, whole)
    assert resumed.model.columns == whole.model.columns and resumed.init == str(model)
    with pytest.raises(ValueError, match=r"init: expected none, as the run to resume in .* began without"):
        training.Training(from_dict(settings_dict()), tiles / "run", tiles, resume=True, init=model)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"network": {"width": 16}}, "width 8 in the model, 16 here$"),
        ({"network": {"levels": 3, "voxel_size": 0.2}}, "architecture .* here; voxel_size 0.3 in the model, 0.2 here$"),
        ({"data": {"features": ["height", "one"]}}, "features one, height in the model, height, one here$"),
        ({"network": {"kind": "kpnext", "size": "S"}}, "Network in the model, KPNeXt here$"),
    ],
)
def test_a_model_of_another_network_is_refused(tiles, model, tmp_path, more, message):
    sections = settings_dict(**more)
    if "kind" in sections["network"]:
        sections["network"] = {"voxel_size": 0.3, "kind": "kpnext", "size": "S"}
    with pytest.raises(ValueError, match=f"init: .*expected the network of the settings, got another: {message}"):
        training.Training(from_dict(sections), tmp_path, tiles, init=model)


def test_what_a_network_needs_is_known_before_it_is_made(objects, tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(kp.nn.Network, "init", lambda *args: pytest.fail("parameters were drawn"))
    write_toml(tmp_path / "a.toml", settings_dict(network={"levels": 8}))
    with contextlib.ExitStack() as after:
        after.callback(kp.set_memory_limit, None)
        kp.set_memory_limit(10**6)
        code, result, err = objects("train", tmp_path / "a.toml", "--data", tiles, "--out", tmp_path / "run")
    assert code == 2 and "not enough memory for train " in err and err.count("\n") == 1
    assert "[network] levels = 8, width = 8: " in result["error"] and "and 976.6 KiB are free" in result["error"]
    params = sum(map(np.prod, kp.nn.networks.shapes(from_dict(settings_dict(network={"levels": 8})).net())[0].values()))
    assert f"{params:,} parameters" in result["error"]

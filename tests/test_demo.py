"""The command line, run in this process: what it prints, what it draws, and how it refuses."""

import io
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

import kpcore as kp
from kpcore import cli, demo, scenes
from kpcore.pipeline.settings import Objects, Part

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROW = re.compile(r"^ +\d+ +[\d.e+-]+ +[\d,]+ .*$", re.MULTILINE)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A small scan of the flat, as a file."""
    cloud = scenes.indoor(30_000)
    path = tmp_path_factory.mktemp("scan") / "flat.npz"
    points = cloud.points + np.array([5e5, 4e6, 100])
    np.savez(path, points=points, colors=cloud.colors, labels=cloud.labels)
    return path


@pytest.fixture
def run(tmp_path, capsys):
    def run(*words):
        """(exit code, stdout, stderr) of `kpcore demo ... --out` a fresh folder."""
        code = cli.main(["demo", *map(str, words), "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return run


def save(path, points):
    np.save(path, np.asarray(points, np.float64))
    return path


def table(out):
    """The rows of the table as numbers."""
    return np.array([[float(cell.replace(",", "")) for cell in row.split()] for row in ROW.findall(out)])


def picture(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_the_main_job_on_a_file(run, tmp_path, flat):
    code, out, err = run(flat, "--voxel", 0.1, "--levels", 3, "--channels", 8)
    assert (code, err) == (0, "")
    assert "flat.npz: 30,000 points" in out
    assert "15 classes" in out
    assert "subtracted in float64: 499999 3999999 99" in out
    rows = table(out)
    points = scenes.read(flat).points
    assert rows.shape == (3, 10)
    for level, row in enumerate(rows):
        voxel = 0.1 * 2**level
        points = kp.grid_subsample(points, voxel).points
        pairs = kp.radius_search(points, None, 2.5 * voxel).num_pairs
        np.testing.assert_allclose(row[:4], [level, voxel, len(points), pairs / len(points)], atol=0.05)
        assert (row[4:8] >= 0).all()
    assert (rows[:, 9] > 10).all()
    image = picture(tmp_path / "out" / "kpcore-flat.png")
    assert image.shape == (1470, 2400, 3)
    for corner in (
        image[200:900, 100:1500],
        image[150:850, 1650:2350],
        image[1080:1360, 50:480],
        image[1080:1360, 970:1400],
    ):
        assert corner.std() > 0.05  # something is drawn in each panel


@pytest.fixture
def small(monkeypatch):
    """A demo of seconds."""
    part = {"indoor": 0, "points": 20_000}
    training_dict = {
        "data": demo.TRAINING["data"] | {"train": [part]},
        "network": {"voxel_size": 0.2, "levels": 2, "width": 8, "momentum": 0.3},
    }
    monkeypatch.setattr(demo, "TRAINING", training_dict | {"training": {"epochs": 1, "steps": 12, "batch_clouds": 2}})
    monkeypatch.setattr(demo, "UNSEEN", Part(indoor=100, mirror=True, points=10_000))


@pytest.mark.filterwarnings("ignore:.*few points:kpcore.KpcoreWarning")
def test_without_a_file_it_trains_and_labels(run, tmp_path, small):
    pytest.importorskip("safetensors")
    code, out, err = run()
    assert code == 0 and re.fullmatch(r"kpcore: \[data\] train: few points of plant .*\n", err)
    assert re.search(r"^KP-FCNN of [\d,]+ parameters: 12 steps on 1 furnished flats$", out, re.MULTILINE)
    rows = re.findall(r"^ +(\w+) +([\d.]+|-) +([\d,]+)$", out, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(scenes.indoor(1).names)
    assert sum(int(points.replace(",", "")) for _, _, points in rows) == 10_000
    mean, accuracy = re.search(r"mean +([\d.]+) over \d+ classes +accuracy ([\d.]+)", out).groups()
    assert float(mean) > 0.02 and float(accuracy) > 0.2  # ceiling, floor and walls are learned at once
    assert os.listdir(tmp_path / "out") == ["kpcore-indoor.png"]
    image = picture(tmp_path / "out" / "kpcore-indoor.png")
    for begin in (60, 1184, 2308):
        assert image[200:850, begin : begin + 1000].std() > 0.05


def test_objects_are_trained_on_and_classified(run, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    few = {
        "data": {"kind": "objects", "train": [{"shapes": 0, "number": 4, "points": 300}]},
        "network": {"voxel_size": 0.2, "levels": 2, "width": 8, "momentum": 0.3},
        "training": {"epochs": 1, "steps": 12, "batch_clouds": 8},
    }
    monkeypatch.setattr(demo, "OBJECTS", few)
    monkeypatch.setattr(demo, "UNSEEN_OBJECTS", Objects(shapes=100, number=3, points=300))
    code, out, err = run("--objects")
    assert (code, err) == (0, "")
    assert re.search(r"^KP-CNN of [\d,]+ parameters: 12 steps on 40 generated objects$", out, re.MULTILINE)
    assert re.search(r"^30 other objects classified in [\d.]+ s, with 5 votes for each$", out, re.MULTILINE)
    rows = re.findall(r"^ +(\w+) +([\d.]+)$", out, re.MULTILINE)
    assert [name for name, _ in rows] == [*scenes.CATEGORIES, "all"]
    accuracies = [float(value) for _, value in rows]
    assert accuracies[-1] == pytest.approx(np.mean(accuracies[:-1]), abs=1e-3) and accuracies[-1] > 0.1
    assert os.listdir(tmp_path / "out") == ["kpcore-objects.png"]
    assert picture(tmp_path / "out" / "kpcore-objects.png")[200:600].std() > 0.05
    assert run("a.npy", "--objects")[::2] == (2, "kpcore: --objects: only valid without FILE, got a.npy\n")
    assert run("--objects", "--voxel", 1)[0] == 2


def test_the_demo_is_that_of_the_settings():
    from kpcore.pipeline.settings import from_dict

    settings = from_dict(demo.TRAINING)
    assert settings.names == scenes.indoor(1).names and len(settings.data.train) == 5
    assert demo.UNSEEN not in settings.data.train and demo.UNSEEN.indoor not in range(5)
    objects = from_dict(demo.OBJECTS)
    (part,) = objects.data.train
    assert objects.names == tuple(scenes.CATEGORIES) and demo.UNSEEN_OBJECTS.shapes >= part.shapes + part.number


@pytest.mark.parametrize("points", [[[1, 2, 3]], [[1, 2, 3]] * 4, [[0, 0, 0], [9, 0, 0]]])
def test_tiny_clouds_go_down_to_one_point(run, tmp_path, points):
    code, out, err = run(save(tmp_path / "tiny.npy", points), "--levels", 11, "--channels", 3)
    assert (code, err) == (0, "")
    assert (table(out)[0, 2], table(out)[-1, 2]) == (len(np.unique(points, axis=0)), 1)
    assert picture(tmp_path / "out" / "kpcore-tiny.png").std() > 0.01


def test_what_was_left_out_is_reported(run, tmp_path):
    points = np.random.default_rng(0).random((100, 3))
    points[:7, 1] = np.nan
    code, out, _ = run(save(tmp_path / "holes.npy", points), "--voxel", 0.2, "--levels", 1, "--channels", 2)
    assert code == 0
    assert "holes.npy: 93 points" in out
    assert "left out: 7 points with NaN or infinite coordinates" in out
    sweep = np.concatenate([np.zeros((11, 4)), np.random.default_rng(0).random((100, 4))]).astype(np.float32)
    (tmp_path / "sweep.bin").write_bytes(sweep.tobytes())
    _, out, _ = run(tmp_path / "sweep.bin", "--voxel", 0.2, "--levels", 1, "--channels", 2)
    assert "sweep.bin: 100 points" in out
    assert "left out: 11 points at (0, 0, 0), as without a return" in out


def test_what_float32_changes_is_reported(run, tmp_path):
    points = np.random.default_rng(0).random((1000, 3)) * 300 + [5e5, 4e6, 0]
    points[:, 0] += 1e-4
    _, out, _ = run(save(tmp_path / "utm.npy", points), "--voxel", 20, "--levels", 1, "--channels", 2)
    said = re.search(r"^subtracted in float64: ([\d ]+); float32 changes coordinates by at most (\de-\d+)$", out, re.M)
    low = np.array(said[1].split(), float)
    largest = np.abs(points - low - (points - low).astype(np.float32)).max()
    assert largest <= float(said[2]) <= 2 * largest
    _, out, _ = run(save(tmp_path / "b.npy", [[0, 0, 0], [1, 2, 3]]), "--levels", 1, "--channels", 2)
    assert "float32 changes" not in out


def test_a_table_without_names_is_given_some(run, tmp_path):
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.random((200, 3)), rng.integers(0, 256, 200), rng.integers(0, 256, (200, 3))])
    path = save(tmp_path / "a.npy", table)
    options = ["--voxel", 0.2, "--levels", 1, "--channels", 2]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run(path, *options)
        assert code == 0 and err.startswith(f"kpcore: {path}: its 7 columns") and err.count("\n") == 1
        code, out, err = run(path, *options, "--columns", "x y z label r g b")
    assert (code, err) == (0, "") and f"{np.unique(table[:, 3]).size} classes" in out
    code, out, err = run(path, *options, "--columns", "x y z")
    assert (code, out) == (2, "") and "has 7 columns, got 3 names in columns=: x y z" in err
    code, out, err = run("--columns", "x y z")
    assert (code, out) == (2, "") and "--columns: only valid together with FILE" in err


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("Unable to allocate 9 GiB"), ValueError("x: wrong\nreally")]
)
def test_what_ends_the_work_is_one_line(run, flat, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kp, "radius_search", fail)
    code, _, err = run(flat, "--levels", 2)
    assert code == 2 and err.startswith("kpcore: ") and err.count("\n") == 1
    if isinstance(error, MemoryError):
        assert f"not enough memory for demo {flat} --levels 2" in err and str(error) in err


@pytest.mark.parametrize(
    ("voxel", "said"), [("50", "leaves 1 of 30,000 points"), ("0.001", r"leaves 1\.\d neighbours per point")]
)
def test_a_voxel_out_of_scale_is_pointed_out_but_used(run, flat, voxel, said):
    code, out, err = run(flat, "--voxel", voxel, "--levels", 1, "--channels", 2)
    assert code == 0
    assert re.fullmatch(rf"kpcore: --voxel {voxel} {said}.*; is it in the file's unit\? Try --voxel 0\.\d+\n", err)
    assert table(out)[0, 1] == float(voxel)


def test_a_voxel_too_small_for_the_grid_is_refused(run, flat):
    code, out, err = run(flat, "--voxel", "1e-7", "--levels", 1)
    assert code == 2
    assert re.fullmatch(r"kpcore: --voxel 1e-07: .* Try --voxel 0\.\d+\n", err)
    assert not table(out).size


@pytest.mark.parametrize(
    "words",
    [
        "--voxel 0",
        "--voxel -1",
        "--voxel nan",
        "--voxel big",
        "--voxel 1e19",
        "--voxel 1e-30",
        "--levels 0",
        "--levels 99",
        "--channels 0",
        "--hue 3",
    ],
)
def test_options_that_make_no_sense(run, words):
    code, out, err = run(*words.split())
    assert (code, out) == (2, "") and words.split()[0] in err and err.count("\n") == 1


def test_bad_files_get_one_line_and_exit_code_2(run, tmp_path):
    cut = save(tmp_path / "cut.npy", np.ones((50, 3)))
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "empty.ply").touch()
    for name in ("cut.npy", "empty.ply", "missing.las", "what.docx"):
        code, out, err = run(tmp_path / name)
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"kpcore: {re.escape(str(tmp_path / name))}: [^\n]+\n", err)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"kpcore: --out {tmp_path / 'file'}: File exists\n"


def test_a_picture_that_cannot_be_written_is_refused(run, tmp_path, flat):
    (tmp_path / "out" / "kpcore-flat.png").mkdir(parents=True)
    code, _, err = run(flat, "--voxel", 0.2, "--levels", 1, "--channels", 2)
    assert (code, err) == (2, f"kpcore: {tmp_path / 'out' / 'kpcore-flat.png'}: is a folder\n")


@pytest.mark.parametrize(("package", "extra"), [("matplotlib", "plot"), ("tqdm", "io")])
def test_a_missing_package_says_how_to_install_it(run, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    assert run() == (2, "", f'kpcore: {package} is not installed: pip install "kpcore[{extra}]"\n')


def test_ctrl_c_is_quiet(run, flat, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(kp, "radius_search", interrupt)
    code, _, err = run(flat)
    assert (code, err) == (130, "")


def test_the_bar_shows_on_a_terminal_and_vanishes(run, flat, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(flat, "--voxel", 0.2, "--levels", 2, "--channels", 2)[0] == 0
    shown = sys.stderr.getvalue()
    assert re.search(r"level 1: backward .*%", shown)
    assert "\n" not in shown
    assert shown.rpartition("\r")[0].endswith(" ")  # wiped


def test_version_and_config(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"kpcore {kp.__version__}\n")
    assert cli.main(["config"]) == 0
    assert kp.__version__ in capsys.readouterr().out
    assert cli.main([]) == 2


def test_importing_kpcore_imports_neither_the_demo_nor_its_packages(tmp_path):
    lazy = {"kpcore.cli", "kpcore.demo", "kpcore.nn", "kpcore.scenes", "tqdm", "matplotlib"}
    code = f"import sys, kpcore; print({lazy} & set(sys.modules))"
    # Elsewhere: in the repository's root the package folder would shadow the installed one.
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "voxel"), [("lone-star.laz", 0.4), ("region_growing_rgb_tutorial.pcd", 0.04), ("source.ply", 0.2)]
)
def test_real_scans(run, shared, tmp_path, name, voxel):
    pytest.importorskip({"laz": "lazrs"}.get(name.rpartition(".")[2], "numpy"))
    code, out, err = run(shared / "data" / name, "--voxel", voxel, "--levels", 3, "--channels", 8)
    assert (code, err) == (0, "")
    rows = table(out)
    assert (np.diff(rows[:, 2]) < 0).all()
    assert ((rows[:, 3] > 8) & (rows[:, 3] < 60)).all()
    assert len(list((tmp_path / "out").glob("*.png"))) == 1

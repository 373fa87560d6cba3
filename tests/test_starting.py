"""Settings that `kpcore init` writes: what they say of the files, and that `kpcore train` takes them as they are."""

import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kpcore as kp
from kpcore.io import Reference
from kpcore.pipeline import starting
from kpcore.pipeline.settings import from_dict, read_settings, toml_parser


@pytest.fixture(scope="module")
def room():
    return kp.scenes.indoor(6_000, seed=3)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_part(points, part):
    """Which points belong to a part of settings, by its definition."""
    inside = np.ones(len(points), bool)
    for axis, limit in enumerate(part.min or []):
        inside &= points[:, axis] >= limit
    for axis, limit in enumerate(part.max or []):
        inside &= points[:, axis] < limit
    return inside


def counts_in_comments(text):
    """{label: (number of points, percent in test)} of the lines of classes."""
    lines = re.findall(r"\[(-?\d+)\] .*?([\d,]+) points, [\d.e-]+ %; (\d+) % of them in test", text)
    return {int(label): (int(num.replace(",", "")), int(percent)) for label, num, percent in lines}


@pytest.mark.filterwarnings("ignore:.*few points:kpcore.KpcoreWarning")
def test_a_file_is_cut_and_trains_as_it_is(command, here, room):
    np.savez("room.npz", points=room.points, colors=room.colors, labels=room.labels)
    code, out, err = command("init", "room.npz")
    assert (code, err) == (0, "")
    (here / "a.toml").write_text(out, encoding="utf-8")
    config = read_settings("a.toml")
    test = in_part(room.points, config.data.test[0])
    assert 0.1 < test.mean() < 0.5
    assert np.array_equal(test, ~in_part(room.points, config.data.train[0]))  # no point on both sides, none left out
    of_test = Counter(room.labels[test].tolist())
    assert counts_in_comments(out) == {
        label: (num, round(100 * of_test[label] / num)) for label, num in Counter(room.labels.tolist()).items()
    }
    assert config.data.features == ["one", "height", "color"]
    assert config.data.validation == 0.1
    for name, labels in config.data.classes.items():
        assert name == f"class_{labels[0]}"
        assert (room.labels[~test] == labels[0]).sum() >= 200
    short = out
    for name, value in (("epochs", 1), ("steps", 2), ("width", 8)):
        short = re.sub(rf"^{name} = \d+", f"{name} = {value}", short, flags=re.MULTILINE)
    (here / "short.toml").write_text(short, encoding="utf-8")
    code, out, err = command("train", "short.toml", "--out", "run")
    assert code == 0 and "test of the best network, that after epoch 1: mIoU" in out, err


def test_files_are_listed_with_the_last_ones_to_test(command, here, room):
    names = [f'raum "{number}" \\ ä.csv' for number in range(6)]
    for number, name in enumerate(names):
        moved = room.points + np.array([5e5, 4e6, 0])
        same = np.full(len(moved), 7 if number else 8)
        rows = np.column_stack([moved, 1 + room.labels % 3, same, room.labels])[number::6]
        lines = [",".join(map(str, row)) for row in rows]
        Path(name).write_text("\n".join(["X,Y,Z,Scalar_Intensity,same,Sem Class", *lines]))
    code, out, err = command("init", ".", "--label", "Sem Class", "--out", "all.toml")
    assert (code, err) == (0, "") and "all.toml: read it" in out
    config = read_settings("all.toml")
    assert [part.file for part in (*config.data.train, *config.data.test)] == names
    assert len(config.data.test) == 1
    assert config.data.label == "Sem Class" and config.data.features == ["one", "height", "intensity"]
    text = Path("all.toml").read_text(encoding="utf-8")
    assert "#   intensity: 1 to 3, the middle nine tenths 1 to 3" in text
    assert "#   same: not used, as kpcore does not know it; 7 to 8" in text
    code, out, err = command("init", ".", "--label", "Sem Class", "--out", "all.toml")
    assert code == 2 and "--out all.toml: expected a new file, got one that exists" in err
    assert Path("all.toml").read_text(encoding="utf-8") == text


def test_names_are_relative_to_the_settings(command, here, room):
    for folder in ("~", "in", "out"):
        (here / folder).mkdir()
    np.save("~/a.npy", np.column_stack([room.points, room.labels]))
    columns = ("--columns", "x y z label")
    for path, out, name in (
        ("./~/a.npy", "a.toml", "./~/a.npy"),
        ("./~/a.npy", "out/a.toml", "../~/a.npy"),
        (here / "~/a.npy", "out/b.toml", (here / "~/a.npy").as_posix()),
    ):
        assert command("init", path, *columns, "--out", out)[::2] == (0, "")
        config = read_settings(out)
        assert config.data.train[0].file == name and config.data.columns == ["x", "y", "z", "label"]
    code, _, err = command("init", "./~/a.npy")
    assert code == 2 and "a.npy: expected labels, got none" in err and "--label" in err


def las_settings(shared, name, folder):
    pytest.importorskip("lazrs")
    text = starting.draft([shared / "data" / name], folder)
    return text, from_dict(toml_parser().loads(text)), kp.io.read(shared / "data" / name, exact=True)


@pytest.mark.parametrize(
    ("name", "classes", "more", "voxel", "said"),
    [
        ("autzen_trim.laz", {"unclassified": [1], "ground": [2]}, ["color"], 3.0, "lengths here: 0.3048 m"),
        ("ign_50x100m.las", {"unclassified": [1], "ground": [2], "building": [6]}, ["color"], 0.5, "nir: not used, 0"),
    ],
)
def test_airborne_scans(shared, tmp_path, name, classes, more, voxel, said):
    text, config, cloud = las_settings(shared, name, tmp_path)
    assert said in text and config.data.classes == classes
    measured = ["intensity", "return_number", "number_of_returns"]
    assert config.data.features == ["one", "height_above_ground", *more, *measured]
    assert (config.network.voxel_size, config.training.radius) == (voxel, 100.0 if voxel == 3 else 15.0)
    assert config.data.ground.window == pytest.approx(40 / (0.3048 if voxel == 3 else 1), rel=0.3)
    test = in_part(cloud.exact, config.data.test[0])
    for label, (num, percent) in counts_in_comments(text).items():
        assert num == (cloud.labels == label).sum()
        assert percent == round(100 * test[cloud.labels == label].mean())


def test_rare_classes_are_comments_and_stay_in_training(shared, tmp_path):
    text, config, _ = las_settings(shared, "brighton_small.laz", tmp_path)
    assert [*config.data.classes] == ["ground", "low_vegetation", "building"]
    assert re.search(r"# never_classified = \[0\]   # ignored, never classified: 2,791 points", text)
    assert counts_in_comments(text)[6][1] < 90  # all buildings are at one end: there is one to train on
    assert config.training.class_weights == "root"


def test_spacing_and_lengths_follow_the_density():
    rng = np.random.default_rng(0)
    for density in (1.0, 100.0):
        points = np.column_stack([rng.uniform(0, 50, (int(2500 * density), 2)), np.zeros(int(2500 * density))])
        corners = np.quantile(points, (0.005, 0.995), axis=0)
        spacings = starting._spacings(Path("a"), points.astype(np.float32), *corners)
        assert np.median(spacings) == pytest.approx(density**-0.5, rel=0.05)
    far = np.concatenate([points, [[1e8, 0, 0]]]).astype(np.float32)  # one point far away changes nothing
    spacings = starting._spacings(Path("a"), far, *corners)
    assert np.median(spacings) == pytest.approx(density**-0.5, rel=0.05)


def test_points_that_are_there_many_times(here, room):
    sizes = {}
    for times in (1, 2, 10):
        np.savez("a.npz", points=np.repeat(room.points, times, 0), labels=np.repeat(room.labels, times))
        sizes[times] = from_dict(toml_parser().loads(starting.draft([Path("a.npz")], Path()))).network.voxel_size
    assert 0.5 < sizes[2] / sizes[1] <= 1 and sizes[10] == sizes[1]


def test_a_batch_has_room_for_a_sphere(here, room, monkeypatch):
    np.savez("a.npz", points=room.points, labels=room.labels)
    monkeypatch.setattr(starting, "_points_in_spheres", lambda *_: 33_333)
    assert from_dict(toml_parser().loads(starting.draft([Path("a.npz")], Path()))).training.batch_points == 40_000


def test_many_files_are_read_in_part(here, room, monkeypatch):
    for number in range(10):
        np.savez(f"{number}.npz", points=room.points[number::4], labels=room.labels[number::4])
    monkeypatch.setattr(starting, "MOST_POINTS", 2500)
    text = starting.draft([Path()], Path())
    assert "from 2 of 10 files with " in text
    assert "# 8 files were not read, as the others have 2,500 points or more; they may hold other labels." in text
    config = from_dict(toml_parser().loads(text))
    assert (len(config.data.train), len(config.data.test)) == (8, 2) and "in test" not in text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"a\.npz: expected labels, got none: .*; its fields are .*; name the one that holds classes with --label"),
        ({"labels": np.arange(5000)}, r"a\.npz: expected at most 256 different labels, got 5,000: are they object num"),
        ({"labels": np.full(5000, 3)}, r"a\.npz: expected labels of two classes or more to train on, got 3 \("),
        ({"points": np.ones((5000, 3)), "labels": np.arange(5000) % 2}, r"a\.npz: expected points at more than 8 "),
        ({"points": np.eye(3), "labels": np.arange(3)}, r"a\.npz: expected points at more than 8 places, got 3 points"),
    ],
)  # fmt: skip
def test_files_that_no_settings_fit(command, here, room, arrays, message):
    np.savez("a.npz", **{"points": room.points[:5000]} | arrays)
    code, out, err = command("init", "a.npz")
    assert (code, out) == (2, "") and re.fullmatch(f"kpcore: {message}.*\n", err), err


def test_paths_that_are_not_scans(command, here):
    (here / "empty").mkdir()
    for path, message in (("empty", "expected a folder with files in .ply"), ("no.laz", "No such file"),
                          ("b.docx", "unknown extension")):  # fmt: skip
        if path == "b.docx":
            Path(path).write_text("x")
        code, out, err = command("init", path)
        assert (code, out) == (2, "") and err.startswith(f"kpcore: {path}: {message}") and err.count("\n") == 1, err
    code, _, err = command("init", "b.docx", "--out", "missing/a.toml")
    assert code == 2 and "there is no folder missing" in err


def test_a_folder_of_several_formats(here, room):
    (here / "scans" / "more").mkdir(parents=True)
    (here / "scans" / "notes.txt").write_text("not a scan")
    for name in ("scans/b", "scans/more/a", "scans/._c"):
        np.savez(f"{name}.npz", points=room.points, labels=room.labels)
    with pytest.warns(kp.KpcoreWarning, match=r"scans: 2 \.npz files; left out: 1 \.txt$"):
        config = from_dict(toml_parser().loads(starting.draft([Path("scans")], Path())))
    assert [part.file for part in (*config.data.train, *config.data.test)] == ["scans/b.npz", "scans/more/a.npz"]


def test_units_of_reference_systems():
    def scans(*units):
        return [SimpleNamespace(reference=one and Reference(*one, source="WKT")) for one in units]

    feet, metres = ("Oregon (ft)", "projected", 0.3048, None), ("UTM", "projected", 1.0, 1.0)
    assert "0.3048 m (Oregon (ft))." in starting._unit(scans(feet, None, feet))
    assert "unknown (a\\nb)" in starting._unit(scans(("a\nb", "projected", None, None)))
    assert "0.3048 m, of z 1 m" in starting._unit(scans((None, "projected", 0.3048, 1.0)))
    assert "do not say" in starting._unit(scans(None))
    with pytest.raises(kp.io.ReadError, match=r"one unit, got those of Oregon \(ft\), UTM: convert some first"):
        starting._unit(scans(feet, metres))


@pytest.mark.parametrize("split", [True, False])
def test_a_folder_of_objects(command, here, split):
    for name in ("chair", "table"):
        for number in range(4):
            folder = here / "objects" / name / (("train" if number else "test") if split else "")
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"{name}_{number}.npz", points=kp.scenes.shapes(name, number, 300).points)
    assert command("init", "objects", "--out", "a.toml")[::2] == (0, "")
    config = read_settings("a.toml")
    assert config.data.kind == "objects" and config.data.classes == ["chair", "table"]
    assert [part.split for part in (*config.data.train, *config.data.test)] == (["train", "test"] if split else [None])
    if split:
        (here / "objects" / "table" / "other").mkdir()
        (here / "objects" / "table" / "test").rename(here / "objects" / "table" / "exam")
        (here / "objects" / "chair" / "test").rename(here / "objects" / "chair" / "exam")
        code, _, err = command("init", "objects")
        assert code == 2 and "or in its folders train and test, got exam, train" in err


@settings(max_examples=100)
@example('\x7f\t\\ "😀\n#')
@given(st.text(max_size=30))
def test_text_in_toml_is_read_back(value):
    try:
        value.encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="expected a name in UTF-8"):
            starting.toml_text(value)
        return
    line = f"{starting.toml_key(value)} = {starting.toml_text(value)} # {starting.printable(value)}"
    assert toml_parser().loads(line) == {value: value}


@settings(max_examples=100)
@given(st.floats(1e-9, 1e9))
def test_nice_numbers_are_near(value):
    number = starting.nice(value)
    assert 0.75 < number / value < 1.34 and float(f"{number:.2g}") == number


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_not_utf_8(command, here, room):
    with open(b"\xff.npz", "wb") as file:
        np.savez(file, points=room.points, labels=room.labels)
    code, out, err = command("init", os.fsdecode(b"\xff.npz"))
    assert (code, out) == (2, "") and "expected a name in UTF-8, as TOML is, got '\\udcff.npz'" in err

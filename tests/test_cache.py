"""[data] cache: runs equal to those in memory, entries that are reused, made again, damaged, or made by two at once."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from reference import assert_same_bits
from test_training import CLASSES, settings_dict

import kpcore as kp
from kpcore import scenes
from kpcore.pipeline import batches, boxes, cache, data, training, voting
from kpcore.pipeline.settings import SettingsError, from_dict

pytest.importorskip("safetensors")

COLUMNS = ["x", "y", "z", "red", "green", "blue", "intensity", "label"]
OFFSET = (84_000.0, 447_000.0, 10.0)  # of a map, so that scenes have a shift


def write_scene(path, seed, num=2200):
    room = scenes.indoor(num, seed)
    intensity = np.random.default_rng(seed).gamma(2, 50, len(room.points)).round()
    points = room.points.astype(np.float64).round(3) + OFFSET
    np.save(path, np.column_stack([points, room.colors, intensity, room.labels]))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """A folder with three scenes."""
    where = tmp_path_factory.mktemp("rooms")
    for seed, name in enumerate("abc"):
        write_scene(where / f"{name}.npy", seed)
    return where


@pytest.fixture
def folder(tmp_path, rooms):
    """A copy of that folder."""
    shutil.copytree(rooms, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config(cache=None, training=None, **more):
    """Settings of a second, whose features are of all kinds."""
    described = {
        "train": ["a.npy", {"file": "b.npy", "max": [84_003.0]}], "test": ["c.npy"], "columns": COLUMNS,
        "features": ["one", "color", "height", "height_above_ground", "verticality", "normals", "intensity"],
        "ignore": [14], "classes": CLASSES,
    }  # fmt: skip
    sections = settings_dict(data=described | ({} if cache is None else {"cache": cache}) | more)
    sections["network"] |= {"voxel_size": 0.25, "width": 4}
    sections["training"] |= {"epochs": 1, "steps": 2, "workers": 1} | (training or {})
    sections["blocks"] = {"lattices": 1}
    return from_dict(sections)


def entries(where, kind=""):
    return sorted(path.name for path in where.glob(f"{kind}*"))


def log_of(out):
    """The log without times."""
    logged = [json.loads(line) for line in (out / training.LOG).read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in ("seconds", "waited")} for entry in logged]


def assert_same_runs(one, other):
    for name in (training.LAST, training.BEST):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert log_of(one) == log_of(other)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(training, "curves", lambda *args, **options: None)  # half of the time of a run


@pytest.fixture
def reads(monkeypatch):
    """The files that are read."""
    names, read = [], data.read_columns
    monkeypatch.setattr(
        data, "read_columns", lambda path, *more, **options: (names.append(path.name), read(path, *more, **options))[1]
    )
    return names


# ---- results


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"training": {"sampling": "balanced", "class_weights": "root"}, "features": ["one", "intensity"]},
        {"validation": 0.2, "training": {"epochs": 2}},
        {"features": ["one", "local", "color"], "training": {"votes": 2}},  # labelled by potentials
        {"validation": ["c.npy"], "test": [{"file": "b.npy", "min": [84_003.0]}], "features": ["one", "height"]},
    ],
    ids=["regular", "balanced", "validation", "potentials", "validation-scene"],
)
def test_a_run_with_a_cache_equals_one_without_to_the_bit(folder, reads, more):
    training.Training(config(**more), folder / "memory", folder, seed=3).run()
    read = len(reads)
    training.Training(config("cache", **more), folder / "first", folder, seed=3).run()
    assert len(reads) == 2 * read  # no file is read twice
    training.Training(config("cache", **more), folder / "second", folder, seed=3).run()
    assert len(reads) == 2 * read
    assert_same_runs(folder / "memory", folder / "first")
    assert_same_runs(folder / "memory", folder / "second")


def test_scenes_of_a_cache_are_those_in_memory(folder):
    settings = config()
    expected, _ = data.load(settings, settings.data.train, folder)
    stored, _ = data.load(settings, settings.data.train, folder, cache=cache.Cache(folder / "cache"))
    for one, other in zip(expected, stored, strict=True):
        assert one.name == other.name
        for name in ("points", "columns", "labels", "full"):
            assert_same_bits(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.full_labels, other.full_labels)
        assert_same_bits(data.coordinates(one.cloud, one.rows), data.coordinates(other.cloud, other.rows))
        assert_same_bits(one.cloud.colors[one.rows], other.cloud.colors[other.rows])
        for name, values in one.cloud.fields.items():
            assert_same_bits(values[one.rows], other.cloud.fields[name][other.rows])
        for name in ("shift", "names", "up", "reference", "rounding", "dropped", "left_out"):
            np.testing.assert_equal(getattr(other.cloud, name), getattr(one.cloud, name))
        assert not other.points.flags.owndata
        assert not other.columns.flags.writeable


def test_no_array_of_a_training_scene_is_in_memory(folder):
    run = training.Training(config("cache", test=[]), folder / "run", folder)
    for scene in run.scenes:
        assert scene.full is scene.cloud is scene.rows is scene.full_labels is None
        for array in (scene.points, scene.columns, scene.labels, scene.stored.by_class()[0], scene.stored.places(0.15)):
            assert isinstance(array.base, np.memmap)


@pytest.mark.parametrize("dimension", [2, 3])
def test_boxes_are_searched_as_a_tree(dimension):
    rng = np.random.default_rng(0)
    places = rng.uniform(-50, 50, (60_000, dimension)) * np.array([1, 1, 0.02])[:dimension]
    points = kp.grid_subsample(places.astype(np.float32), 0.1).points
    assert len(points) > boxes._RUN**2  # three levels of boxes
    index, tree = boxes.Boxes(points), kp.KDTree(points)
    centers = [*points[:: len(points) // 20], *rng.uniform(-60, 60, (20, dimension)).astype(np.float32)]
    for center, radius in zip(centers, np.tile([0.05, 1.0, 7.3, 200.0], 10), strict=False):
        expected = tree.radius_search(center[None], radius).index
        assert_same_bits(expected, index.within(center, radius))


def test_boxes_hold_points_at_exactly_the_radius():
    points = np.array([[0.1], [0.3], [0.7]], np.float32) * np.ones(2, np.float32)
    for radius in np.float32(0.1) * np.arange(1, 12, dtype=np.float32):
        index = boxes.Boxes(points)
        for center in np.array([[0.0, 0.1], [0.3, 0.9], [1.1, 0.7]], np.float32):
            expected = kp.KDTree(points).radius_search(center[None], float(radius)).index
            assert_same_bits(expected, index.within(center, float(radius)))


@pytest.mark.parametrize("move", [True, False])
def test_potentials_rise_as_if_all_were_computed(move):
    rng = np.random.default_rng(1)
    loaded = []
    for size in ([30, 20, 1], [3, 3, 3], [25, 40, 2]):
        points = kp.grid_subsample(rng.uniform(0, size, (30_000, 3)).astype(np.float32), 0.3).points
        loaded.append(data.Scene(points, None, None, kp.KDTree(points), None, None))
    sampler = batches.Potentials(loaded, 2.0, np.random.default_rng(2), move)
    rng = np.random.default_rng(2)
    places = [kp.grid_subsample(scene.points, 0.2).points for scene in loaded]
    bounds = np.cumsum([0, *map(len, places)])
    values = rng.uniform(0, 1e-3, bounds[-1])
    for _ in range(300):
        at = int(values.argmin())
        number = int(np.searchsorted(bounds, at, "right")) - 1
        center = places[number][at - bounds[number]]
        if move:
            center = (center + np.clip(rng.normal(0, 0.2, 3), -1, 1)).astype(np.float32)
        squared = ((places[number] - center) ** 2).sum(axis=1, dtype=np.float64) / 4
        values[bounds[number] : bounds[number + 1]] += np.where(squared < 1, (1 - squared) ** 2, 0)
        sphere = sampler.next()
        assert sphere.scene == number
        assert_same_bits(sphere.center, center)
        assert_same_bits(sphere.rows, loaded[number].tree.radius_search(center[None], 2.0).index)
    assert_same_bits(sampler.values, values)
    assert sampler.lowest == values.min()


def test_balanced_spheres_are_drawn_as_from_lists_of_rows():
    loaded = [data.Scene(np.zeros((n, 3), np.float32), None, np.random.default_rng(n).integers(-1, 4, n), None, None,
                         None) for n in (50, 7, 30)]  # fmt: skip
    drawn = batches.Balanced(loaded, 1.0, np.random.default_rng(5))
    labels, rng = np.concatenate([scene.labels for scene in loaded]), np.random.default_rng(5)
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    for scene in loaded:
        scene.points[:, 0] = np.arange(len(scene.points))
    bounds = np.cumsum([0, 50, 7, 30])
    batches_at, batches.sphere_at = batches.sphere_at, lambda scenes, number, center, radius: (number, center[0])
    try:
        for _ in range(200):
            at = int(rng.choice(rows[rng.integers(len(rows))]))
            number = int(np.searchsorted(bounds, at, "right")) - 1
            assert drawn.next() == (number, at - bounds[number])
    finally:
        batches.sphere_at = batches_at


# ---- entries


def test_what_changes_an_entry(folder, reads):
    def load(**more):
        settings = from_dict(config("cache").asdict() | more.pop("network", {}))
        settings = from_dict({**settings.asdict(), "data": {**settings.asdict()["data"], **more}})
        return data.load(settings, settings.data.train, folder, cache=cache.Cache(folder / "cache"))

    scenes_before, columns = load()
    assert sorted(reads) == ["a.npy", "b.npy"]
    reads.clear()
    assert load(classes={"low": [0], "high": [2, 3]})[0][0].labels.max() == 1  # labels are kept as in the files
    network = {"network": config().asdict()["network"] | {"voxel_size": 0.3}}
    assert len(load(network=network)[0][0].points) < len(scenes_before[0].points)
    assert not reads
    load(ignore=[7])
    load(ground={"cell": 2.0})
    load(features=["one", "intensity"])
    load(drop_zeros=True)
    assert sorted(reads) == 4 * ["a.npy"] + 4 * ["b.npy"]
    reads.clear()
    write_scene(folder / "b.npy", 7)
    scenes_after, columns_after = load()
    assert reads == ["b.npy"]
    assert columns_after != columns
    assert not np.array_equal(scenes_after[1].points, scenes_before[1].points)
    assert_same_bits(scenes_after[0].points, scenes_before[0].points)
    with pytest.raises(AssertionError):  # features are scaled by the values of both scenes
        assert_same_bits(scenes_after[0].columns, scenes_before[0].columns)


def test_a_file_of_the_same_size_and_time(folder, reads):
    settings, path = config(), folder / "a.npy"

    def load():
        return data.load(settings, settings.data.train[:1], folder, cache=cache.Cache(folder / "cache"))[0][0]

    load()
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-8:] = np.float64(3).tobytes()  # the label of the last point
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    load()
    assert len(reads) == 2
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    load()
    assert len(reads) == 3
    path.unlink()
    with pytest.raises(data.ReadError, match=r"a\.npy"):
        load()


def damage(path, how):
    if how == "bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "other":  # of another entry
        other = next(one for one in path.parent.parent.glob(f"scene-*/{path.name}") if one != path)
        shutil.copy(other, path)
    elif how == "number":  # of what is known about the scene
        content = (path.parent / "about.json").read_text()
        (path.parent / "about.json").write_text(content.replace('"num_points": ', '"num_points": 1'))
    elif how == "file":
        shutil.rmtree(path.parent)
        path.parent.write_text("something else")


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "missing", "other", "file", "number"])
@pytest.mark.parametrize("name", ["columns.npy", "about.json"])
def test_a_damaged_entry_is_made_again(folder, name, how):
    settings = config("cache", features=["one", "intensity"])

    def load():
        return data.load(settings, settings.data.train, folder, cache=cache.Cache(folder / "cache"))[0]

    expected = [(scene.columns.copy(), scene.stored.num_points) for scene in load()]
    before = entries(folder / "cache")
    damage(next((folder / "cache").glob("scene-*")) / name, how)
    for scene, (columns, num_points) in zip(load(), expected, strict=True):
        assert_same_bits(scene.columns, columns)
        assert scene.stored.num_points == num_points
    assert entries(folder / "cache") == before
    assert not list((folder / "cache").glob(".*"))


def test_entries_of_another_format_are_not_used(folder, reads, monkeypatch):
    settings = config("cache")
    for _ in range(2):
        data.load(settings, settings.data.train, folder, cache=cache.Cache(folder / "cache"))
        monkeypatch.setattr(cache, "_FORMAT", cache._FORMAT + 1)
    assert len(reads) == 4


def test_warnings_of_a_file_are_told_each_time(folder):
    table = np.load(folder / "a.npy")
    table[:2000, :3] = table[0, :3]  # duplicates
    np.save(folder / "a.npy", table)
    settings = config("cache")
    told = []
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"a\.npy") as caught:
            data.load(settings, settings.data.train, folder, cache=cache.Cache(folder / "cache"))
        told.append([str(one.message) for one in caught])
    assert told[0] == told[1]


KILLED = """
import json, os, sys
from kpcore.pipeline import cache, data
from kpcore.pipeline.settings import from_dict
settings = from_dict(json.loads(sys.argv[2]))
written = cache._write
def end(path, array):
    number = written(path, array)
    if path.name == {last!r}:
        os.kill(os.getpid(), 9)
    return number
cache._write = end
data.load(settings, settings.data.train, sys.argv[1], cache=cache.Cache(sys.argv[1] + "/cache"))
"""


def start(text, folder):
    settings = json.dumps(config().asdict())
    return subprocess.Popen([sys.executable, "-c", text, str(folder), settings], cwd=folder)


def test_a_process_that_is_killed_leaves_nothing_that_is_used(folder, reads):
    assert start(KILLED.format(last="value_2.npy"), folder).wait() == -9
    where = folder / "cache"
    left = list(where.glob(".part-*.part"))
    assert len(left) == 1
    assert entries(where) == [left[0].name]
    settings = config("cache")
    data.load(settings, settings.data.train, folder, cache=cache.Cache(where))
    assert len(reads) == 2
    assert left[0].exists()  # another training may be writing it
    for path in (left[0], *left[0].iterdir()):
        os.utime(path, (0, time.time() - 2 * cache._LEFT_OVER))
    cache.Cache(where)
    assert not left[0].exists()


BOTH = """
import json, sys
from kpcore.pipeline import cache, data
from kpcore.pipeline.settings import from_dict
settings = from_dict(json.loads(sys.argv[2]))
data.load(settings, settings.data.train, sys.argv[1], cache=cache.Cache(sys.argv[1] + "/cache"))
"""


def test_two_processes_make_a_cache_at_once(folder, reads):
    running = [start(BOTH, folder) for _ in range(2)]
    assert [one.wait() for one in running] == [0, 0]
    assert not list((folder / "cache").glob(".*"))
    settings = config()
    stored, _ = data.load(settings, settings.data.train, folder, cache=cache.Cache(folder / "cache"))
    assert not reads
    expected, _ = data.load(settings, settings.data.train, folder)
    for one, other in zip(expected, stored, strict=True):
        assert_same_bits(one.columns, other.columns)


def test_the_entry_of_another_process_that_was_first_is_used(folder):
    made = cache.Made({"x": np.arange(3)})
    where = cache.Cache(folder / "cache")

    def make():
        cache.Cache(folder / "cache").entry("test", {"a": 1}, lambda: made)
        return made

    entry = where.entry("test", {"a": 1}, make)
    assert entry["x"].tolist() == [0, 1, 2]
    assert entries(folder / "cache") == [entry.name]


# ---- runs


def test_a_run_goes_on_with_another_cache_and_without(folder, monkeypatch):
    settings = config("cache", training={"epochs": 3})
    training.Training(config(training={"epochs": 3}), folder / "whole", folder, seed=3).run()

    class Stop(Exception):
        pass

    def stop(entry):
        if "test" in entry:
            raise Stop

    monkeypatch.setattr(training, "_BETWEEN_CHECKPOINTS", 0)
    with pytest.raises(Stop):
        training.Training(settings, folder / "part", folder, seed=3).run(stop)
    for other in (config("other", training={"epochs": 3}), config(training={"epochs": 3})):
        with pytest.raises(Stop):
            training.Training(other, folder / "part", folder, seed=3, resume=True).run(stop)
    shutil.rmtree(folder / "cache")
    training.Training(settings, folder / "part", folder, seed=3, resume=True).run()
    assert training.saved_run(folder / "part" / training.LAST, settings, 3).run["epoch"] == 3
    assert_same_runs(folder / "whole", folder / "part")


def test_a_cache_serves_all_folds(folder, reads, command):
    sections = config().asdict()
    parts = [{"file": f"{name}.npy"} for name in "abc"]
    settings = from_dict(sections | {"data": sections["data"] | {
        "train": parts, "test": [], "folds": "file", "cache": "cache"}})  # fmt: skip
    for name, fold in settings.by_fold().items():
        run = training.Training(fold, folder / name, folder)
        assert run.settings.data.cache is None
    assert sorted(reads) == ["a.npy", "b.npy", "c.npy"]
    assert len(entries(folder / "cache", "scene")) == 9  # scaled by the values of two scenes each


def test_errors_of_a_cache(folder, monkeypatch):
    (folder / "file").write_text("")
    with pytest.raises(SettingsError, match=r"^\[data\] cache: expected a folder, got .*file"):
        training.Training(config("file"), folder / "run", folder)
    sections = settings_dict(data={"cache": "x", "kind": "objects", "train": [{"shapes": 0}], "test": [],
                                   "features": ["one"], "classes": []})  # fmt: skip
    with pytest.raises(SettingsError, match=r"\[data\] cache: only valid for scenes, got objects"):
        from_dict(sections)
    with pytest.raises(SettingsError, match=r"\[data\] cache: expected str"):
        config(3)

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(OSError, match=r"\[data\] cache: No space left on device: .*cache"):
        training.Training(config("cache"), folder / "run", folder)
    assert not list((folder / "cache").iterdir())


def test_a_file_that_changes_while_it_is_read(folder, monkeypatch):
    load = data.load_part

    def changing(settings, part, where):
        cloud = load(settings, part, where)
        os.utime(folder / part.file)
        return cloud

    monkeypatch.setattr(data, "load_part", changing)
    with pytest.raises(data.ReadError, match=r"a\.npy: .* changed while it was read"):
        training.Training(config("cache"), folder / "run", folder)


def test_votes_take_the_nearest_points_from_the_cache(folder):
    settings = config(features=["one", "local"])
    kept = cache.Cache(folder / "cache")
    (scene,), _ = data.load(settings, settings.data.test, folder, cache=kept)
    (other,), _ = data.load(settings, settings.data.test, folder)
    assert_same_bits(scene.stored.nearest(scene.full), other.tree.knn_search(other.full, 1).index)
    assert voting.IGNORED == data.IGNORED

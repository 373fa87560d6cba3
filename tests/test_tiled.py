"""Surveys: labels are equal to the bit for any tiles, memory, workers and interruptions."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import copc_files
import numpy as np
import pytest

import kpcore as kp
from kpcore import nn
from kpcore.io import scans
from kpcore.nn import checkpoints
from kpcore.pipeline import groups, segmentation, tiled
from kpcore.pipeline.blocks import BlockSize
from kpcore.pipeline.data import Columns
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict
from kpcore.scenes.city import write_city

LOW, HIGH = (154_970.0, 462_985.0), (155_050.0, 463_045.0)
SETTINGS = {
    "data": {"train": ["a.laz"], "classes": {"ground": [2], "building": [6], "vegetation": [5]},
             "features": ["one", "height", "height_above_ground", "intensity"], "ground": {"window": 6.0}},
    "network": {"voxel_size": 1.0, "levels": 2, "width": 8, "kernel_size": 5},
    "training": {"radius": 5.0},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::kpcore.KpcoreWarning")


def model_with(**data):
    """A network with random weights, which tells the slightest change of its input."""
    config = from_dict(SETTINGS | {"data": SETTINGS["data"] | data})
    net = config.net()
    center = {name: 3.0 for name in config.widths if name not in ("one", "color")}
    columns = Columns(config.widths, center, dict.fromkeys(center, 40.0))
    return Model(net, *net.init(0), config, columns, BlockSize(20.0, 5.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and one survey as one file, in 4 tiles, in 9 tiles and in 4 tiles with buffers."""
    folder = tmp_path_factory.mktemp("survey")
    model = model_with()
    nn.save(folder / "model.safetensors", model.net, model.params, model.state, **model.about())
    write_city(folder / "one.laz", LOW, HIGH, density=3)
    for name, number, buffer in (("four", 2, 0), ("nine", 3, 0), ("buffered", 2, 6)):
        write_city(folder / name, LOW, HIGH, density=3, tiles=(number, number), buffer=buffer)
    segmentation.segment(Model.load(folder / "model.safetensors"), folder / "one.laz", folder / "whole.laz",
                         confidence=True)  # fmt: skip
    return folder


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(tiled, "_MOST_IN_GROUP", 8000)


def label(folder, name, out, **options):
    path = folder / name
    sources = sorted(path.iterdir()) if path.is_dir() else path
    return tiled.segment_tiles(folder / "model.safetensors", sources, out, confidence=True, **options)


def labelled(path):
    """(n, 7) coordinates, GPS time, return, label and confidence of each point of files, sorted."""
    files = sorted(path.glob("*.la[sz]")) if path.is_dir() else [path]
    clouds = [kp.io.read(file, fields=["gps_time", "return_number", "confidence"], exact=True) for file in files]
    rows = np.concatenate([np.column_stack([cloud.exact, *cloud.fields.values(), cloud.labels]) for cloud in clouds])
    return np.unique(rows, axis=0)


def digests(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.la[sz]")}


@pytest.mark.parametrize("name", ["one.laz", "four", "nine", "buffered"])
def test_labels_do_not_depend_on_tiles_memory_or_threads(folder, name, tmp_path, monkeypatch, set_threads):
    expected = labelled(folder / "whole.laz")
    assert len({*expected[:, 6]}) > 1
    for limit, threads in ((10**7, 2), (8000, 1)):
        monkeypatch.setattr(tiled, "_MOST_IN_GROUP", limit)
        set_threads(threads)
        survey = label(folder, name, tmp_path / "out")
        assert not survey.failed and (survey.groups > 3) == (limit == 8000)
        np.testing.assert_array_equal(labelled(tmp_path / "out"), expected)
        assert sum(survey.counts.values()) == sum(one.points for one in survey.files)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {tiled.MANIFEST, tiled.SUMMARY}
    assert not [*(tmp_path / "out").glob(".*")]


def test_engines_label_alike(folder, tmp_path, small_groups):
    expected = labelled(folder / "whole.laz")
    label(folder, "four", tmp_path / "processes", workers=2)
    with ThreadPoolExecutor(2) as pool:
        label(folder, "four", tmp_path / "threads", executor=pool)
    for out in ("processes", "threads"):
        np.testing.assert_array_equal(labelled(tmp_path / out), expected)


def test_dask_labels_alike(folder, tmp_path, small_groups):
    pytest.importorskip("distributed")
    label(folder, "four", tmp_path / "out", dask="local:2")
    np.testing.assert_array_equal(labelled(tmp_path / "out"), labelled(folder / "whole.laz"))


def test_copc_by_bounds(folder, tmp_path, small_groups):
    (tmp_path / "in").mkdir()
    for tile in sorted((folder / "four").iterdir()):
        scan = scans.opened(tile)
        x, y, z = scan.dimensions[:3]
        records = np.concatenate([records for _, records in scans.records(scan)])
        content = copc_files.copc(records, scan.point_format, x.scale, (x.offset, y.offset, z.offset))
        (tmp_path / "in" / f"{tile.stem}.copc.laz").write_bytes(content)
    shutil.copy(folder / "model.safetensors", tmp_path)
    first = sorted((tmp_path / "in").iterdir())[0]
    first.unlink()  # so that a plain file and those with an index are read together
    shutil.copy(folder / "four" / f"{first.name.partition('.')[0]}.laz", tmp_path / "in")
    survey = label(tmp_path, "in", tmp_path / "out")
    assert digests(tmp_path / "out").keys() == {file.name for file in (folder / "four").iterdir()}
    np.testing.assert_array_equal(labelled(tmp_path / "out"), labelled(folder / "whole.laz"))
    assert survey.groups > 3


def test_what_a_whole_cloud_gets_a_survey_gets(folder, tmp_path, small_groups):
    """Labels to keep, points to ignore, doubtful points, another field, another unit: as `segment` has it."""
    options = {"keep": [6], "ignore": [64, "overlap"], "unclassified": 0.4, "into": "predicted", "scale": (0.9, 1.1)}
    model = Model.load(folder / "model.safetensors")
    whole = segmentation.segment(model, folder / "one.laz", tmp_path / "whole.laz", confidence=True, **options)
    survey = label(folder, "one.laz", tmp_path / "out.laz", **options)
    assert (tmp_path / "out.laz").read_bytes() == (tmp_path / "whole.laz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.laz", "out.segment.json", "whole.laz"]
    assert survey.counts == dict(zip(model.classes, whole.counts.tolist(), strict=True))
    np.testing.assert_array_equal(survey.confusion.sum(), (whole.true >= 0).sum())
    np.testing.assert_equal(survey.scores, whole.scores)
    assert [*survey.notes, *survey.files[0].notes] == whole.labelled.notes


def test_probabilities(folder, tmp_path, small_groups):
    zarr = pytest.importorskip("zarr")
    label(folder, "four", tmp_path / "out", probabilities=True, ignore=[6])
    store = zarr.open(str(tmp_path / "out" / tiled.PROBABILITIES), mode="r")
    for file in (tmp_path / "out").glob("*.laz"):
        cloud, source = kp.io.read(file, fields=["confidence"]), kp.io.read(folder / "four" / file.name)
        shares = store[file.name][:]
        ignored = source.labels == 6
        assert np.isnan(shares[ignored]).all() and ignored.any()
        np.testing.assert_array_equal(np.array([2, 6, 5])[shares[~ignored].argmax(axis=1)], cloud.labels[~ignored])
        percent = np.round(100 * shares[~ignored].max(axis=1))
        np.testing.assert_array_equal(percent, cloud.fields["confidence"][~ignored])


# ---- interruptions and faults


def begun(folder, out, after):
    """A process that labels the four tiles, once it has results of `after` groups."""
    code = (
        "import sys\nfrom kpcore.pipeline import groups, tiled\ntiled._MOST_IN_GROUP = 8000\n"
        "sources = sorted(__import__('pathlib').Path(sys.argv[1], 'four').iterdir())\n"
        "tiled.segment_tiles(sys.argv[1] + '/model.safetensors', sources, sys.argv[2], confidence=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", code, folder, out], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len([*out.glob(".segment*/groups/*.safetensors")]) < after:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.002)
    return process


@pytest.mark.slow
def test_resume_after_kill(folder, tmp_path, small_groups):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    label(folder, "four", undisturbed)
    for number in (2, 4):
        process = begun(folder, out, number)
        process.kill()
        process.wait()
        process.stderr.close()
        if number == 2:
            assert json.loads((out / tiled.MANIFEST).read_text())["state"] == "running"
    lines = []
    survey = label(folder, "four", out, resume=True, report=lines.append)
    assert any("are done already" in line for line in lines), lines
    assert not survey.failed and 0 < survey.points < sum(one.points for one in survey.files)
    assert digests(out) == digests(undisturbed)
    label(folder, "four", out, resume=True, report=lines.append)
    assert lines[-1] == "the 4 files are done already"


def test_resume_is_refused_for_another_run(folder, tmp_path, small_groups, monkeypatch):
    out = tmp_path / "out"
    label(folder, "four", out)
    with pytest.raises(ValueError, match=r"resume: expected options keep \[\], as in .*, got \[6\]"):
        label(folder, "four", out, resume=True, keep=[6])
    monkeypatch.setattr(kp.pipeline.engines, "common_instruction_set", lambda machines: "another")
    with pytest.raises(ValueError, match="resume: expected instruction_set"):
        label(folder, "four", out, resume=True)
    monkeypatch.undo()
    model = model_with()
    model.params = {name: values + 1 for name, values in model.params.items()}
    with pytest.raises(ValueError, match="resume: expected model another one"):
        tiled.segment_tiles(model, sorted((folder / "four").iterdir()), out, confidence=True, resume=True)
    assert digests(out).keys() == {file.name for file in (folder / "four").iterdir()}


def test_damaged_file(folder, tmp_path, small_groups):
    shutil.copytree(folder / "four", tmp_path / "four")
    shutil.copy(folder / "model.safetensors", tmp_path)
    bad = sorted((tmp_path / "four").iterdir())[1]
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    survey = label(tmp_path, "four", tmp_path / "out")
    assert [*survey.failed] == [str(bad)] and len(survey.files) == 3
    assert bad.name not in digests(tmp_path / "out")
    assert json.loads((tmp_path / "out" / tiled.SUMMARY).read_text())["failed"].keys() == survey.failed.keys()
    bad.write_bytes(whole)
    lines = []
    survey = label(tmp_path, "four", tmp_path / "out", resume=True, report=lines.append)
    assert not survey.failed and any("are done already" in line for line in lines)
    np.testing.assert_array_equal(labelled(tmp_path / "out"), labelled(folder / "whole.laz"))


def test_full_disk(folder, tmp_path, small_groups, monkeypatch):
    written, write = [], checkpoints.write

    def write_some(path, *rest):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(checkpoints, "write", write_some)
    with pytest.raises(OSError, match="No space left"):
        label(folder, "four", tmp_path / "out")
    monkeypatch.setattr(checkpoints, "write", write)
    survey = label(folder, "four", tmp_path / "out", resume=True)
    assert survey.groups > 3 and not survey.failed
    np.testing.assert_array_equal(labelled(tmp_path / "out"), labelled(folder / "whole.laz"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ValueError, match=r"scratch: expected some .* of free disk"):
        label(folder, "four", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_too_little_memory(folder, tmp_path):
    with pytest.raises(ValueError, match="memory: expected at least"):
        label(folder, "four", tmp_path / "out", memory=10_000_000)
    assert not (tmp_path / "out").exists()


def test_points_of_several_files():
    """Those that are the same in two files are one; those that are twice in one file are two."""
    points = np.array([[1.0, 2, 3]] * 7 + [[4.0, 5, 6]])
    identity = np.array([[0.5, 1]] * 6 + [[0.5, 2]] + [[0.5, 1]])
    files = np.array([0, 0, 1, 2, 2, 2, 1, 1])
    intensity = np.array([7.0, 5, 5, 9, 5, 8, 5, 5])
    first = groups.same_points(points, identity, files, {"intensity": intensity})
    # by value: 5, 7 in file 0; 5 in file 1; 5, 8, 9 in file 2
    assert first[1] == first[2] == first[4] and first[0] == first[5] == 0 and first[3] == 3
    assert first[6] == 6 and first[7] == 7
    order = np.random.default_rng(0).permutation(8)
    other = groups.same_points(points[order], identity[order], files[order], {"intensity": intensity[order]})
    same = intensity[order][other]
    np.testing.assert_array_equal(same, intensity[first][order])


def test_files_around_are_input_alone(folder, tmp_path, small_groups):
    """A tile that is labelled with its neighbours has the labels that it has in the survey; without them it has not."""
    tiles = sorted((folder / "four").iterdir())
    label(folder, "four", tmp_path / "all")
    tiled.segment_tiles(folder / "model.safetensors", tiles[:1], tmp_path / "one", around=tiles[1:], confidence=True)
    assert [*digests(tmp_path / "one")] == [tiles[0].name]
    assert digests(tmp_path / "one").items() <= digests(tmp_path / "all").items()
    tiled.segment_tiles(folder / "model.safetensors", tiles[:1], tmp_path / "alone", confidence=True)
    assert digests(tmp_path / "alone") != digests(tmp_path / "one")
    lines = []
    again = {"around": tiles[1:], "confidence": True, "resume": True, "report": lines.append}
    tiled.segment_tiles(folder / "model.safetensors", tiles[:1], tmp_path / "one", **again)
    assert lines == ["the 1 file is done already"]
    folder_of_all = {"around": folder / "four", "confidence": True}
    tiled.segment_tiles(folder / "model.safetensors", tiles[0], tmp_path / "two", **folder_of_all)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    with pytest.raises(ValueError, match=r"around: expected LAS, LAZ and COPC files, got .*none\.laz"):
        tiled.segment_tiles(folder / "model.safetensors", tiles, tmp_path / "two", around=[folder / "none.laz"])


def test_resume_with_other_files(folder, tmp_path, small_groups, monkeypatch):
    """Results of an interrupted run hold for the points of a file, whatever its place in the list."""
    tiles, out = sorted((folder / "four").iterdir()), tmp_path / "out"
    model, write, written = folder / "model.safetensors", checkpoints.write, []

    def write_some(path, *rest):
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, *rest)

    for files in (tiles[1:], tiles[::-1], tiles[:1] + tiles[2:]):
        shutil.rmtree(out, ignore_errors=True)
        written.clear()
        monkeypatch.setattr(checkpoints, "write", write_some)
        with pytest.raises(OSError, match="No space left"):
            tiled.segment_tiles(model, tiles, out, confidence=True)
        monkeypatch.setattr(checkpoints, "write", write)
        tiled.segment_tiles(model, files, out, confidence=True, resume=True)
        tiled.segment_tiles(model, files, tmp_path / "fresh", confidence=True)
        names = {file.name for file in files}
        for name in names:
            assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
        shutil.rmtree(tmp_path / "fresh")


def test_colours_of_16_bits_that_are_no_feature(folder, tmp_path):
    rng = np.random.default_rng(0)
    points = np.round(rng.uniform((0, 0, 0), (30, 30, 4), (4000, 3)), 2) + np.array([155_000, 463_000, 0])
    colors = rng.integers(0, 65_536, (4000, 3))
    content = copc_files.las(copc_files.records(points, offset=(155_000.0, 463_000.0, 0.0), colors=colors),
                             offset=(155_000.0, 463_000.0, 0.0))  # fmt: skip
    (tmp_path / "a.las").write_bytes(content)
    survey = label(folder, tmp_path / "a.las", tmp_path / "out")
    assert not survey.failed
    segmentation.segment(Model.load(folder / "model.safetensors"), tmp_path / "a.las", tmp_path / "b.las",
                         confidence=True)  # fmt: skip
    assert (tmp_path / "out" / "a.las").read_bytes() == (tmp_path / "b.las").read_bytes()


def test_a_model_that_is_replaced_does_not_change_under_its_workers(folder, tmp_path):
    """The file in the folder of the job is mapped by workers: it gets another inode, not another content."""
    from kpcore.pipeline.model import kept

    run = tiled._Run(Model.load(folder / "model.safetensors"), folder / "model.safetensors", {}, tmp_path, None, "dark",
                     print, None)  # fmt: skip
    run.job = groups.Job(tmp_path / "job", [], groups.Options([], None), [0, 0], [1, 1])
    run.folder = tmp_path / "job"
    run._make_folder(None)
    run.open_files.close()
    before = os.stat(run.job.model_path).st_ino, kept(run.job.model_path)
    run._make_folder({})
    assert os.stat(run.job.model_path).st_ino != before[0]
    run.open_files.close()

"""The Zarr of probabilities: rows in the order of the points, block by block, whole or not at all."""

import errno
import os
import pickle

import numpy as np
import pytest

pytest.importorskip("zarr")
import zarr

import kpcore as kp
from kpcore.pipeline import probabilities
from kpcore.pipeline.probabilities import array_names, create_store

FILES = ["a/tile.laz", "b/tile.laz", "b/other.laz"]
CLASSES, LABELS = ["ground", "Gebäude"], [2, 6]


def store_in(folder, files=FILES, **options):
    return create_store(folder / "p.zarr", files, CLASSES, LABELS, **options)


def rows(number, seed=0):
    values = np.random.default_rng(seed).random((number, 2), np.float32)
    values[::7] = np.nan
    return values


def write(store, file, values, sizes=(1, 2, 5, 100)):
    with store.writer(file, len(values)) as writer:
        at = 0
        for size in (*sizes, len(values)):
            writer.append(values[at : at + size])
            at = min(at + size, len(values))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- what is written


@pytest.mark.parametrize("number", [0, 1, 9, 10, 11, 57, 300])
def test_rows_are_those_that_were_appended(tmp_path, number, monkeypatch):
    monkeypatch.setattr(probabilities, "_CHUNK_ROWS", 10)
    store, values = store_in(tmp_path, model="best"), rows(number)
    write(store, FILES[1], values)
    group = zarr.open(str(tmp_path / "p.zarr"), mode="r")
    array = group["b_tile.laz"]
    np.testing.assert_array_equal(array[:], values)
    assert array.dtype == np.float32 and array.shape == (number, 2) and array.chunks == (min(10, max(1, number)), 2)
    assert dict(array.attrs) == {"file": FILES[1], "classes": CLASSES}
    assert [*group.array_keys()] == ["b_tile.laz"]
    assert dict(group.attrs) == {
        "classes": CLASSES, "labels": LABELS, "model": "best", "layout": 1, "kpcore": kp.__version__,
        "arrays": {"a_tile.laz": FILES[0], "b_tile.laz": FILES[1], "other.laz": FILES[2]},
    }  # fmt: skip


def test_blocks_do_not_show_in_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(probabilities, "_CHUNK_ROWS", 16)
    for name, sizes in (("x", (100,)), ("y", (1, 15, 17, 3))):
        (tmp_path / name).mkdir()
        write(store_in(tmp_path / name), FILES[0], rows(100), sizes)
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_chunks_are_bounded(tmp_path):
    """64 MB at most, and neither a writer nor its file takes more for fewer points."""
    for number, classes, expected in ((10**9, 3, 1 << 18), (10**9, 1000, 16_777), (5, 3, 5), (10**9, 10**8, 1)):
        array = probabilities._new_array(zarr, tmp_path / f"{number}_{classes}", number, classes)
        assert array.chunks == (expected, classes)


def test_a_writer_holds_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(probabilities, "_CHUNK_ROWS", 10)
    with store_in(tmp_path).writer(FILES[0], 95) as writer:
        for _ in range(19):
            writer.append(np.zeros((5, 2), np.float32))
        assert writer._buffer.shape == (10, 2) and writer._written == 90


def test_many_processes_write(tmp_path):
    store = pickle.loads(pickle.dumps(store_in(tmp_path)))
    with store.writer(FILES[0], 3) as one, store.writer(FILES[1], 2) as other:
        other.append(rows(2, 1))
        one.append(rows(3, 2))
    group = zarr.open(str(store.path), mode="r")
    np.testing.assert_array_equal(group["a_tile.laz"][:], rows(3, 2))
    np.testing.assert_array_equal(group["b_tile.laz"][:], rows(2, 1))
    assert sorted(os.listdir(tmp_path)) == ["p.zarr"]


# ---- resumption


def test_an_unfinished_array_is_not_there_and_an_earlier_one_stays(tmp_path):
    store = store_in(tmp_path)
    write(store, FILES[0], rows(20))
    before = content(tmp_path)
    for file in FILES[:2]:
        with pytest.raises(KeyboardInterrupt), store.writer(file, 5) as writer:
            writer.append(rows(3))
            raise KeyboardInterrupt
    assert content(tmp_path) == before
    assert [store.is_complete(file) for file in FILES] == [True, False, False]
    write(store, FILES[0], rows(30, 1))  # replaces it
    np.testing.assert_array_equal(zarr.open(str(store.path), mode="r")["a_tile.laz"][:], rows(30, 1))


def test_a_killed_process_leaves_nothing_that_counts(tmp_path, python):
    code = """
import os, signal, sys
import numpy as np
from kpcore.pipeline import probabilities
probabilities._CHUNK_ROWS = 4
store = probabilities.create_store("p.zarr", ["a.laz", "b.laz"], ["x", "y"], [0, 1], resume=sys.argv[1:] == ["resume"])
with store.writer("a.laz", 10) as writer:
    writer.append(np.ones((10, 2), np.float32))
with store.writer("b.laz", 10) as writer:
    writer.append(np.ones((9, 2), np.float32))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code).returncode == -9
    assert (tmp_path / ".p.zarr.parts").is_dir()
    store = create_store(tmp_path / "p.zarr", ["a.laz", "b.laz"], ["x", "y"], [0, 1], resume=True)
    assert os.listdir(tmp_path) == ["p.zarr"]
    assert (store.is_complete("a.laz"), store.is_complete("b.laz")) == (True, False)
    with store.writer("b.laz", 10) as writer:
        writer.append(np.ones((10, 2), np.float32))
    group = zarr.open(str(store.path), mode="r")
    assert (group["a.laz"][:] == 1).all() and (group["b.laz"][:] == 1).all()


@pytest.mark.parametrize("where", ["_new_array", "to_disk", "rows"])
def test_a_full_disk_is_told_with_the_array(tmp_path, where, monkeypatch):
    monkeypatch.setattr(probabilities, "_CHUNK_ROWS", 4)
    store = store_in(tmp_path)

    class Full:
        chunks, shape = (4, 2), (9, 2)

        def __setitem__(self, rows, values):
            full()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        probabilities, "_new_array" if where == "rows" else where, (lambda *_: Full()) if where == "rows" else full
    )
    with pytest.raises(OSError, match=r"No space left on device: .*p\.zarr.a_tile\.laz"):
        write(store, FILES[0], rows(9))
    assert os.listdir(tmp_path) == ["p.zarr"] and not store.is_complete(FILES[0])
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"source\.laz"), store.writer(FILES[0], 1):  # of the block, as it was
        raise OSError(errno.EIO, "error of the source", "source.laz")


@pytest.mark.parametrize(("change", "message"), [
    ({"classes": ["ground", "roof"]}, "the same classes to resume, got .*Gebäude"),
    ({"labels": [2, 7]}, r"the same labels to resume, got \[2, 6\]"),
    ({"model": "last"}, "the same model to resume, got best"),
    ({"files": [*FILES, "c.laz"]}, r"the same arrays to resume, got other ones \(3\)"),
])  # fmt: skip
def test_another_run_cannot_be_resumed(tmp_path, change, message):
    arguments = {"files": FILES, "classes": CLASSES, "labels": LABELS, "model": "best"}
    write(create_store(tmp_path / "p.zarr", **arguments), FILES[0], rows(5))
    assert create_store(tmp_path / "p.zarr", **arguments, resume=True).is_complete(FILES[0])
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_store(tmp_path / "p.zarr", **(arguments | change), resume=True)
    assert content(tmp_path) == before
    store = create_store(tmp_path / "p.zarr", **(arguments | change))  # begins anew
    assert not store.is_complete(FILES[0])


def test_nothing_else_is_replaced(tmp_path):
    (tmp_path / "p.zarr").mkdir()
    (tmp_path / "p.zarr" / "photo.jpg").write_bytes(b"1")
    for resume in (False, True):
        with pytest.raises(ValueError, match="path: expected a new folder, or a Zarr with probabilities, got"):
            store_in(tmp_path, resume=resume)
    (tmp_path / "p.zarr" / ".zgroup").write_text('{"zarr_format": 2}')  # somebody's Zarr
    with pytest.raises(ValueError, match="path: expected a new folder"):
        store_in(tmp_path)
    (tmp_path / "p.zarr" / ".zattrs").write_text("{damaged")
    with pytest.raises(ValueError, match="path: expected a new folder"):
        store_in(tmp_path)
    assert (tmp_path / "p.zarr" / "photo.jpg").read_bytes() == b"1"
    (tmp_path / "file").write_bytes(b"2")
    with pytest.raises(ValueError, match="path: expected a new folder"):
        create_store(tmp_path / "file", FILES, CLASSES, LABELS)
    (tmp_path / "empty").mkdir()
    create_store(tmp_path / "empty", FILES, CLASSES, LABELS)


# ---- errors


def test_bad_rows(tmp_path):
    store = store_in(tmp_path)
    for values, message in (
        (np.zeros((2, 3), np.float32), r"expected \(n, 2\) float32, got \(2, 3\) float32"),
        (np.zeros((2, 2)), r"expected \(n, 2\) float32, got \(2, 2\) float64"),
        (np.zeros((9, 2), np.float32), "expected 8 rows, got 9 or more"),
        (np.zeros((7, 2), np.float32), "expected 8 rows, got 7"),
    ):
        with pytest.raises(ValueError, match=f"probabilities: {message}"), store.writer(FILES[0], 8) as writer:
            writer.append(values)
    assert not store.is_complete(FILES[0])
    with pytest.raises(ValueError, match=r"file: expected one of those of the store, got c\.laz"):
        store.is_complete("c.laz")
    with pytest.raises(ValueError, match="file: expected"), store.writer("c.laz", 1):
        pass


def test_bad_stores(tmp_path):
    with pytest.raises(ValueError, match="labels: expected one for each of the 2 classes, got 1"):
        create_store(tmp_path / "p.zarr", FILES, CLASSES, [1])
    with pytest.raises(ValueError, match=r"path: expected the name of a folder such as .*, got .*p\.zip"):
        create_store(tmp_path / "p.zip", FILES, CLASSES, LABELS)
    with pytest.raises(ValueError, match="files: expected each file once"):
        store_in(tmp_path, ["a.laz", "a.laz"])


# ---- names


@pytest.mark.parametrize(("files", "names"), [
    (["x/a.laz", "x/b.laz"], ["a.laz", "b.laz"]),
    (["x/a.laz", "y/a.laz", "y/b.laz"], ["x_a.laz", "y_a.laz", "b.laz"]),
    (["p/x/a.laz", "q/x/a.laz", "y/a.laz"], ["p_x_a.laz", "q_x_a.laz", "y_a.laz"]),
    (["/data/A.laz", "/other/a.laz"], ["data_A.laz", "other_a.laz"]),
    (["../a b+(1).laz"], ["a b+(1).laz"]),
    ([".zarray", ".zgroup"], ["_zarray", "_zgroup"]),
    (["Straße 5/Höhe.laz"], ["Höhe.laz"]),
    (["a:b*?.laz"], ["a_b__.laz"]),
    (["...", "x/..."], ["_", "x__"]),
    (["a. "], ["a_"]),
])  # fmt: skip
def test_names(files, names):
    assert array_names(files) == names
    assert array_names(files[::-1]) == names[::-1]


def test_names_that_are_equal_even_so():
    files = ["x/a.laz", "y/a.laz", "x_a.laz", "a?.laz", "a*.laz", "x/../x/a.laz", "Ä.laz", "A\u0308.laz"]
    files += ["\udce4.laz", "n" * 250, "n" * 251, "n" * 249 + "m"]
    names = array_names(files)
    assert len({name.casefold() for name in names}) == len(files)
    assert all(len(name.encode()) < 200 and "/" not in name and not name.startswith((".", "__")) for name in names)
    assert dict(zip(files[::-1], array_names(files[::-1]), strict=True)) == dict(zip(files, names, strict=True))


def test_files_with_odd_names_stay_in_the_folder(tmp_path):
    files = [
        "../../escaped.laz",
        "/etc/passwd.laz",
        "..",
        ".zarray",
        "\udce4.laz",
        "a\nb\\c.laz",
        "n" * 250,
        "Größe/ü.laz",
    ]
    store = store_in(tmp_path, files)
    for number, file in enumerate(files):
        write(store, file, rows(5, number))
    group = zarr.open(str(store.path), mode="r")
    for number, file in enumerate(files):
        np.testing.assert_array_equal(group[store.names[file]][:], rows(5, number))
    assert os.listdir(tmp_path) == ["p.zarr"]
    assert store_in(tmp_path, files, resume=True).is_complete(files[0])

"""NumPy's files: arrays that are read only if they are needed, and labels written beside what else is there."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from files import COLORS, LABELS, POINTS, npy, npz, refusal

from kpcore import io as clouds
from kpcore import scenes


def archive(members, method=zipfile.ZIP_DEFLATED, encrypted=(), comment=b""):
    """An NPZ of members as bytes, in their order; those that are encrypted only say so."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.comment = comment
        for at, (name, data) in enumerate(members.items()):
            info = zipfile.ZipInfo(name, (2020, 1, 1 + at, 10, 20, 30))
            info.compress_type = method if at % 2 else zipfile.ZIP_STORED
            info.comment = f"member {at}".encode()
            file.writestr(info, data)
    data = bytearray(out.getvalue())
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        if info.filename in encrypted:
            data[info.header_offset + 6] |= 1
            data[data.index(info.filename.encode(), data.index(b"PK\1\2")) - 46 + 8] |= 1
    return bytes(data)


HUGE = npy(np.ones((4, 3))).replace(b"(4, 3), }", b"(4000000000, 3), }").replace(b" " * 9 + b"\n", b"\n")
OTHERS = {
    "an object": {"meta.npy": npy(np.array({"sensor": "lidar"}, object))},
    "a README": {"README.txt": b"hello", "labels.txt": b"no array"},
    "a folder": {"data/": b"", "data/other.npy": npy(np.ones(3))},
    "words": {"names.npy": npy(np.array(["wall", "floor"]))},
    "a lie": {"more.npy": HUGE},
    "no array": {"more.npy": b"hello", "none.npy": b""},
    "a bomb": {"x.npy": b"", "bomb.npy": bytes(50_000_000)},
    "a long header": {"more.npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{" * 100},
    "an odd header": {"more.npy": b"\x93NUMPY\1\0" + struct.pack("<H", 100) + b"(" * 100},
    "another version": {"more.npy": b"\x93NUMPY\x09\0" + bytes(100)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("points", ["points", "my_points"])
def test_members_that_are_not_requested_are_not_read(write, name, first, points):
    wanted = {f"{points}.npy": npy(POINTS), "colors.npy": npy(COLORS), "labels.npy": npy(LABELS)}
    path = write("a.npz", archive(OTHERS[name] | wanted if first else wanted | OTHERS[name]))
    tracemalloc.start()
    try:
        cloud = scenes.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    np.testing.assert_array_equal(cloud.labels, LABELS)
    assert peak < 20e6


@pytest.mark.parametrize("members", [{"secret.npy": npy(np.ones(4))}, {"secret.txt": b"hello"}])
def test_an_encrypted_member(write, members):
    path = write("a.npz", archive({**members, "points.npy": npy(POINTS)}, encrypted=members))
    np.testing.assert_array_equal(scenes.read(path).points, POINTS)
    with pytest.raises(scenes.ReadError, match=r"secret.* cannot be read: .*encrypted"):
        clouds.write_labels(path, path.with_name("b.npz"), LABELS)
    if "secret.npy" in members:
        with pytest.raises(scenes.ReadError, match=r"secret cannot be read: .*encrypted"):
            scenes.read(path, fields=["secret"])


def test_a_damaged_member(write):
    data = archive({"points.npy": npy(POINTS), "more.npy": npy(np.arange(4.0))}, zipfile.ZIP_STORED)
    at = data.index(struct.pack("<d", 3.0), data.index(b"more.npy"))
    path = write("a.npz", data[:at] + b"\1" + data[at + 1 :])
    np.testing.assert_array_equal(scenes.read(path).points, POINTS)
    with pytest.raises(scenes.ReadError, match="more cannot be read: Bad CRC-32"):
        scenes.read(path, fields=["more"])
    with pytest.raises(scenes.ReadError, match=r"more\.npy cannot be read: Bad CRC-32"):
        clouds.write_labels(path, path.with_name("b.npz"), LABELS)


def test_a_damaged_folder(write):
    data = archive({"data/": b"", "points.npy": npy(POINTS)})
    path = write("a.npz", b"PK\3\4" + bytes(26) + data[30:])
    np.testing.assert_array_equal(scenes.read(path).points, POINTS)
    with pytest.raises(scenes.ReadError, match="data/ cannot be read"):
        clouds.write_labels(path, path.with_name("b.npz"), LABELS)


REFUSED = {
    "object": (
        {"points.npy": npy(np.array([[None] * 3]))},
        "points holds Python objects, which kpcore does not unpickle",
    ),
    "lie": ({"points.npy": HUGE}, "points of shape (4000000000, 3) needs 96000000000 bytes, got 96"),
    "bomb": ({"points.npy": npy(np.zeros((4, 3)))[:-96] + bytes(50_000_000)}, None),
    "header": (
        {"a.txt": b"", "points.npy": OTHERS["a long header"]["more.npy"]},
        "points declares a header of 4294967295",
    ),
    "words": ({"points.npy": OTHERS["an odd header"]["more.npy"]}, "points cannot be read: "),
    "version": ({"points.npy": OTHERS["another version"]["more.npy"]}, "points is not a NumPy array"),
    "cut": ({"points.npy": npy(POINTS)[:-1]}, "points of shape (4, 3) needs 96 bytes, got 95"),
    "sideways": ({"points.npy": npy(np.ones((3, 10)))}, "expected a row for each point, got (3, 10): transpose"),
    "two tables": ({"a.npy": npy(POINTS), "b.npy": npy(POINTS)}, "has no array named points, only a b"),
    "twice": ({"Points.npy": npy(POINTS), "POINTS.npy": npy(POINTS)}, "has 2 fields named points"),
    "none": ({"README": b"hello"}, "has no array named points, only none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_needed_and_wrong(write, name):
    members, reason = REFUSED[name]
    data = archive(members) if members else archive({"a.txt": b"", "points.npy": npy(POINTS)})
    if members is None:  # the size in the directory
        at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
        data = data[: at + 24] + struct.pack("<I", 4_000_000_000) + data[at + 28 :]
    path = write("a.npz", data)
    if reason is None:
        assert scenes.read(path).points.shape == (4, 3)  # what follows an array is not looked at
    else:
        assert reason in refusal(path)


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3, 3), (1, 6), (3, 9), (11, 11)])
def test_tables_of_few_points(write, shape):
    table = np.arange(np.prod(shape)).reshape(shape) * 100.0
    for path in (write("a.npy", npy(table)), write("a.npz", npz(points=table))):
        np.testing.assert_array_equal(scenes.read(path).points, table[:, :3])


def test_columns_name_those_of_the_points(write):
    table = np.column_stack([[1, 2, 0, 2], POINTS, COLORS, [0.5, 1, 2, 3]])
    names = ("class", *"xyzrgb", "height")
    path = write("a.npz", npz(points=table, echo=np.arange(4), other=np.ones(7)))
    cloud = scenes.read(path, columns=names, fields=["height", "echo"])
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    np.testing.assert_array_equal(cloud.labels, [1, 2, 0, 2])
    np.testing.assert_array_equal(cloud.fields["height"], table[:, -1])
    np.testing.assert_array_equal(cloud.fields["echo"], np.arange(4))
    assert scenes.read(path, columns=names, label="echo").labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(scenes.ReadError, match="has no field low; there are echo other class x y z r g b height"):
        scenes.read(path, columns=names, fields=["low"])
    with pytest.raises(scenes.ReadError, match="has 8 columns, got 3 names in columns="):
        scenes.read(path, columns=[*"xyz"])
    path = write("a.npz", npz(points=table, labels=LABELS))  # a member of that name is meant
    assert scenes.read(path, columns=names).labels.tolist() == LABELS.tolist()


def test_points_as_a_structured_array_and_as_three_members(write):
    table = np.zeros(4, [("class", ">i2"), ("x", ">f8"), ("y", ">f8"), ("z", ">f8"), ("rgb", ">u4")])
    table["x"], table["y"], table["z"] = POINTS.T
    table["class"], table["rgb"] = LABELS, COLORS @ np.array([1 << 16, 1 << 8, 1])
    both = write("a.npy", npy(table)), write("a.npz", npz(points=table))
    three = write("b.npz", npz(X=POINTS[:, 0], Y=POINTS[:, 1], Z=POINTS[:, 2], rgb=table["rgb"], label=LABELS))
    for path in (*both, three):
        cloud = scenes.read(path)
        np.testing.assert_array_equal(cloud.points, POINTS)
        np.testing.assert_array_equal(cloud.colors, COLORS)
        np.testing.assert_array_equal(cloud.labels, LABELS)


def test_a_coordinate_is_no_label(write):
    """y is also a usual name for labels."""
    whole = np.arange(12).reshape(4, 3)
    for arrays in ({"points": whole}, {"pos": whole, "rgb": COLORS}, dict(zip("xyz", whole.T, strict=True))):
        cloud = scenes.read(write("a.npz", npz(**arrays)))
        np.testing.assert_array_equal(cloud.points, whole)
        assert cloud.labels is None and cloud.unlabeled == "no field has a usual name for labels"
    for name in ("X", "features"):
        with pytest.warns(UserWarning, match=f"it has no array named points: {name} was read as the points"):
            cloud = scenes.read(write("a.npz", npz(**{name: whole, "y": LABELS})))
        assert cloud.labels.tolist() == LABELS.tolist()
    path = write("a.npz", npz(pos=whole, y=LABELS))  # as PyTorch Geometric names them
    assert scenes.read(path, label="y", fields=["x"]).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "colors", "points"])
def test_names_that_no_labels_have(write, tmp_path, name):
    path = write("a.npz", npz(points=POINTS))
    with pytest.raises(scenes.ReadError, match=r"a\.npz: "):
        clouds.write_labels(path, tmp_path / "b.npz", LABELS, into=name)


@pytest.mark.parametrize("kind", ["<u4", ">u4", "<f4", ">f4", "<i4", ">i4"])
def test_packed_colours_of_either_byte_order(write, kind):
    bits = np.array([0x0A141E, 0x28323C, 0x010203, 0xFE0000], "<u4")
    packed = np.frombuffer(bits.tobytes() if kind[0] == "<" else bits.byteswap().tobytes(), kind)
    table = np.zeros(4, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("rgb", kind)])
    table["rgb"] = packed
    cloud = scenes.read(write("a.npy", npy(table)))
    assert cloud.colors.tolist() == [[10, 20, 30], [40, 50, 60], [1, 2, 3], [254, 0, 0]]


@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", ">f8", ">i4", "<i8", "u1"])
def test_types_of_tables(write, dtype):
    table = np.abs(POINTS).round().astype(dtype)
    for path in (write("a.npy", npy(table)), write("a.npy", npy(np.asfortranarray(table)))):
        np.testing.assert_array_equal(scenes.read(path).points, np.abs(POINTS).round())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HUGE, "the array of shape (4000000000, 3) needs 96000000000 bytes, got 96"),
        (OTHERS["a long header"]["more.npy"], "the array declares a header of 4294967295 bytes"),
        (npy(POINTS)[:-1], "needs 96 bytes, got 95"),
        (npy(np.ones((3, 10))), "got (3, 10): transpose"),
        (npy(np.ones((10, 2))), "got (10, 2)"),
        (npy(np.array(3.0)), "got ()"),
    ],
)
def test_an_npy_that_is_refused(write, data, reason):
    assert reason in refusal(write("a.npy", data))


# ---- labels


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", ["<i4", ">i4", "u1", "<u8", ">f4", "<f8"])
def test_labels_of_one_column(write, shape, dtype):
    path = write("a.npz", npz(points=POINTS, labels=LABELS.astype(dtype).reshape(shape)))
    np.testing.assert_array_equal(scenes.read(path).labels, LABELS)
    out, kept = path.with_name("b.npz"), np.array([True, False, True, True])
    clouds.write_labels(path, out, np.array([9, 8, 7], np.int32), kept=kept)
    with np.load(out) as after:
        assert (after["labels"].shape, after["labels"].dtype) == (shape, np.dtype(dtype))
        assert after["labels"].ravel().tolist() == [9, 0, 8, 7]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([2, np.nan, 6, 2]), [2, -1, 6, 2]),
        (np.array([2, 2**32 - 1, 6, 2], "u4"), [2, -1, 6, 2]),
        (np.array([2, 2**64 - 1, 6, 2], ">u8"), [2, -1, 6, 2]),
    ],
)
def test_one_point_without_a_label(write, values, expected):
    assert scenes.read(write("a.npz", npz(points=POINTS, labels=values))).labels.tolist() == expected


@pytest.mark.parametrize("names", [("labels",), ("a", "labels"), ("label", "z"), ()])
def test_all_else_stays_as_it_is(write, names):
    members = {
        "README.txt": b"hello",
        "data/": b"",
        "points.npy": npy(POINTS),
        "meta.npy": OTHERS["an object"]["meta.npy"],
    }
    members |= {f"{name}.npy": npy(np.zeros(4, np.int16)) for name in names}
    members |= {"größe.npy": npy(np.ones(2)), "data/more.npy": npy(np.ones(3)), "tail.bin": bytes(1000)}
    path = write("a.npz", archive(members, comment=b"of the archive"))
    out = path.with_name("b.npz")
    clouds.write_labels(path, out, LABELS)
    label = next((name for name in ("labels", "label") if name in names), "labels")
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(out) as after:
        assert after.comment == b"of the archive" and after.testzip() is None
        old, new = before.infolist(), after.infolist()
        if not names:
            assert new.pop().filename == "labels.npy"
        for one, two in zip(old, new, strict=True):
            for name in ("filename", "date_time", "compress_type", "comment", "external_attr"):
                assert getattr(one, name) == getattr(two, name)
            if one.filename != f"{label}.npy":
                assert before.read(one) == after.read(two)
    with np.load(out) as after:
        np.testing.assert_array_equal(after[label], LABELS)
        assert after[label].dtype == (np.int16 if names else np.int32)
    assert scenes.read(out).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("points", r"points: expected one number for each of 4 points, got \(4, 3\) float64"),
        ("flags", r"flags: expected one number for each of 4 points, got \(4,\) bool"),
        ("words", r"words: expected one number for each of 4 points, got \(4,\) <U1"),
        ("meta", "meta holds Python objects"),
        ("x", "got x, which is a coordinate"),
    ],
)
def test_labels_that_cannot_be_written(write, label, reason):
    more = {"flags": np.ones(4, bool), "words": np.array([*"abcd"]), "meta": np.array([None] * 4)}
    path = write("a.npz", npz(points=POINTS, **more))
    with pytest.raises(scenes.ReadError, match=reason):
        clouds.write_labels(path, path.with_name("b.npz"), LABELS, label=label)
    assert not path.with_name("b.npz").exists()


def test_labels_of_points_in_three_members(write):
    path = write("a.npz", npz(x=POINTS[:, 0], y=POINTS[:, 1], z=POINTS[:, 2]))
    clouds.write_labels(path, path.with_name("b.npz"), LABELS)
    cloud = scenes.read(path.with_name("b.npz"))
    np.testing.assert_array_equal(cloud.labels, LABELS)
    np.testing.assert_array_equal(cloud.points, POINTS)


def test_labels_in_a_column_of_the_points_are_not_doubled(write, tmp_path):
    table = np.zeros(4, [("x", "f8"), ("y", "f8"), ("z", "f8"), ("Label", "i4")])
    table["x"], table["y"], table["z"] = POINTS.T
    path = write("a.npz", npz(points=table))
    with pytest.raises(
        scenes.ReadError, match=r"a\.npz: label is a column of the points, which labels cannot be written to"
    ):
        clouds.write_labels(path, tmp_path / "b.npz", LABELS, label="label")

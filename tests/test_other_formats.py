"""Labels written from every format that is read into every format that is written, read again by other readers."""

import csv
import itertools
import os
import re
import warnings

import numpy as np
import pytest

from kpcore.io import ReadError, formats, read, write_labels
from kpcore.io import las as las_format
from kpcore.io import pcd as pcd_format
from kpcore.io import table as table_module
from kpcore.io import text as text_format

NUM = 40
KEPT = np.arange(NUM) % 7 != 3
LABELS = np.arange(NUM, dtype=np.int32)[KEPT] % 20 + 3
PERCENT = (np.arange(NUM) * 6 % 256).astype(np.uint8)[KEPT]
SCORES = np.linspace(0, 1, KEPT.sum(), dtype=np.float32)
TYPES = {
    "f4": "float",
    "f8": "double",
    "u1": "uchar",
    "u2": "ushort",
    "i4": "int",
    "u8": "uint64",
    "i2": "short",
    "i1": "char",
}


def cloud(with_nan=False):
    """A table with UTM coordinates to the millimetre, 16-bit colours, NaN, integers beyond float64, UTF-8."""
    rng = np.random.default_rng(0)
    table = np.zeros(NUM, [("x", "f8"), ("y", "f8"), ("z", "f8"), ("red", "u2"), ("green", "u2"), ("blue", "u2"),
                           ("intensity", "u2"), ("gps_time", "f8"), ("dichte é", "f4"), ("id", "u8"),
                           ("return_number", "u1"), ("number_of_returns", "u1"), ("label", "u1")])  # fmt: skip
    for axis, low in zip("xyz", (515_368_000, 4_918_340_000, -2_000), strict=True):
        table[axis] = (low + rng.integers(0, 90_000, NUM)) / 1000
    for name in ("red", "green", "blue", "intensity"):
        table[name] = rng.integers(0, 65_536, NUM)
    table["gps_time"] = 283_412_345.25 + np.arange(NUM) / 7
    table["dichte é"] = rng.random(NUM)
    table["dichte é"][5] = np.nan
    table["id"] = 2**63 + np.arange(NUM, dtype=np.uint64) * 3
    table["return_number"], table["number_of_returns"] = np.arange(NUM) % 3 + 1, 3
    table["label"] = np.arange(NUM) % 5 + 1
    if with_nan:
        table["x"][~KEPT] = np.nan
        table["z"][3] = -np.inf
    return table


def packed(table, names):
    new = np.zeros(len(table), [(name, table[old].dtype) for name, old in zip(names, table.dtype.names, strict=True)])
    for name, old in zip(names, table.dtype.names, strict=True):
        new[name] = table[old]
    return new.tobytes()


def write_ply(path, table):
    names = [name.replace(" ", "_") for name in table.dtype.names]
    lines = [f"property {TYPES[table[old].dtype.str[1:]]} {name}\n" for name, old in
             zip(names, table.dtype.names, strict=True)]  # fmt: skip
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{''.join(lines)}end_header\n"
    path.write_bytes(head.encode() + packed(table, names))


def write_pcd(path, table):
    names = [name.replace(" ", "_") for name in table.dtype.names]
    kinds = [table[old].dtype for old in table.dtype.names]
    head = (f"VERSION 0.7\nFIELDS {' '.join(names)}\nSIZE {' '.join(str(kind.itemsize) for kind in kinds)}\n"
            f"TYPE {' '.join(kind.kind.upper() for kind in kinds)}\nCOUNT {' '.join('1' for _ in kinds)}\n"
            f"WIDTH {len(table)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(table)}\nDATA binary\n")  # fmt: skip
    path.write_bytes(head.encode() + packed(table, names))


def write_text(path, table):
    comma = path.suffix == ".csv"
    names = [name if comma else name.replace(" ", "_") for name in table.dtype.names]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter="," if comma else " ")
        out.writerow(names)
        out.writerows([str(value) for value in row] for row in table)


def write_las(path, table):
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=7, version="1.4")
    header.scales, header.offsets = [0.001] * 3, [515_000, 4_918_000, -10]
    header.add_extra_dims([laspy.ExtraBytesParams("dichte é", "f4"), laspy.ExtraBytesParams("id", "u8")])
    data = laspy.LasData(header)
    data.x, data.y, data.z = table["x"], table["y"], table["z"]
    for name in table.dtype.names[3:-1]:
        data[name] = table[name]
    data.classification = table["label"]
    data.write(path, **({"laz_backend": laspy.LazBackend.Lazrs} if path.suffix == ".laz" else {}))


def write_npz(path, table):
    points = np.column_stack([table[axis] for axis in "xyz"])
    colors = np.column_stack([table[name] for name in ("red", "green", "blue")])
    arrays = {name: table[name] for name in table.dtype.names[6:]}
    np.savez(path, points=points, colors=colors, **arrays)


WRITE = {
    ".ply": write_ply, ".pcd": write_pcd, ".csv": write_text, ".xyz": write_text, ".las": write_las,
    ".laz": write_las, ".npz": write_npz, ".npy": lambda path, table: np.save(path, table),
}  # fmt: skip


def read_ply(path):
    head, _, body = path.read_bytes().partition(b"end_header\n")
    lines = head.decode().split("\n")
    kinds = {name: code for code, name in TYPES.items()}
    assert lines[1] == "format binary_little_endian 1.0"
    names = [tuple(line.split()[1:]) for line in lines if line.startswith("property")]
    table = np.frombuffer(body, [(name, "<" + kinds[kind]) for kind, name in names])
    return {name: table[name] for name in table.dtype.names}


def read_pcd(path):
    head, _, body = path.read_bytes().partition(b"DATA binary\n")
    words = {line.split()[0]: line.split()[1:] for line in head.decode().splitlines() if not line.startswith("#")}
    kinds = [f"<{kind.lower()}{size}" for kind, size in zip(words["TYPE"], words["SIZE"], strict=True)]
    shapes = [(int(count),) if count != "1" else () for count in words["COUNT"]]
    table = np.frombuffer(body, list(zip(words["FIELDS"], kinds, shapes, strict=True)))
    assert words["POINTS"] == words["WIDTH"] == [str(len(table))]
    columns = {name: table[name] for name in table.dtype.names}
    if "rgb" in columns:
        bits = columns["rgb"].view(np.uint32)
        columns |= {name: bits >> shift & 255 for name, shift in (("red", 16), ("green", 8), ("blue", 0))}
    return columns


def read_text(path):
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file, delimiter="," if path.suffix == ".csv" else " ")
    columns = {}
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        is_whole = all(re.fullmatch(r"\d+", cell) for cell in cells)
        columns[name] = np.array([int(cell) if is_whole else float(cell) for cell in cells])
    return columns


def read_las(path):
    data = pytest.importorskip("laspy").read(path)
    assert data.header.version.minor == 4
    np.testing.assert_allclose(data.header.mins, data.xyz.min(axis=0), atol=1e-9)
    np.testing.assert_allclose(data.header.maxs, data.xyz.max(axis=0), atol=1e-9)
    assert data.header.number_of_points_by_return.sum() == len(data.points)
    return {name: np.array(data[name]) for name in ("x", "y", "z", *list(data.point_format.dimension_names)[3:])}


def read_npz(path):
    with np.load(path) as file:
        columns = dict(file)
    columns |= zip("xyz", columns.pop("points").T, strict=True)
    if "colors" in columns:
        columns |= zip(("red", "green", "blue"), columns.pop("colors").T, strict=True)
    return columns


READ = {
    ".ply": read_ply, ".pcd": read_pcd, ".csv": read_text, ".xyz": read_text, ".txt": read_text, ".las": read_las,
    ".laz": read_las, ".npz": read_npz,
}  # fmt: skip
LAS = (".las", ".laz")


def written(source, out, *args, **more):
    """What the file holds by another reader, and the warning of writing it, without the path."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_labels(source, out, *args, **more)
    assert len(caught) <= 1
    notes = [str(one.message) for one in caught]
    assert all(note.startswith(f"{out}: ") and "\n" not in note for note in notes)
    return READ[out.suffix](out), "".join(notes).removeprefix(f"{out}: ")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WRITE, READ)))
def test_every_format_into_every_other(tmp_path, monkeypatch, before, after):
    for module, name in ((las_format, "BLOCK"), (table_module, "BLOCK"), (pcd_format, "BLOCK"), (text_format, "ROWS")):
        monkeypatch.setattr(module, name, 7)  # several blocks
    if {before, after} & {".laz"}:
        pytest.importorskip("lazrs")
    table = cloud()
    WRITE[before](tmp_path / f"a{before}", table)
    extra = {"confidence": PERCENT, "score": SCORES}
    after_write, note = written(tmp_path / f"a{before}", tmp_path / f"b{after}", LABELS, kept=KEPT, extra=extra)

    name = "label"
    if after in LAS:
        name = "classification"
    elif before in LAS:
        name = "labels" if after == ".npz" else "classification"
    expected = table["label"].astype(int)
    expected[KEPT] = LABELS
    np.testing.assert_array_equal(after_write[name], expected)
    for other, values in extra.items():
        assert after_write[other].dtype == values.dtype or after in (".csv", ".txt", ".xyz")
        np.testing.assert_array_equal(after_write[other][KEPT].astype(values.dtype), values)
        assert not after_write[other][~KEPT].any()
    for axis in "xyz":
        if after in LAS or before in LAS:
            np.testing.assert_allclose(after_write[axis], table[axis], rtol=4e-16)
        else:
            np.testing.assert_array_equal(after_write[axis], table[axis])
    for other in ("red", "green", "blue", "intensity", "gps_time", "return_number", "number_of_returns"):
        np.testing.assert_array_equal(after_write[other], table[other])
    spelled = "dichte_é" if {before, after} & {".ply", ".pcd", ".xyz", ".txt"} else "dichte é"
    np.testing.assert_array_equal(after_write[spelled].astype(np.float32), table["dichte é"])
    is_copy = before == after or {before, after} <= {*LAS}
    if is_copy or after != ".ply":
        np.testing.assert_array_equal(after_write["id"], table["id"])
    else:
        assert "id" not in after_write and "1 part is not carried over: id" in note
    renamed = before not in (".ply", ".pcd", ".xyz") and after in (".ply", ".pcd", ".xyz", ".txt")
    assert ("renamed: dichte é to dichte_é" in note) == renamed
    assert "rounded" not in note
    if after in LAS:
        laspy = pytest.importorskip("laspy")
        encoding = laspy.read(tmp_path / f"b{after}").header.global_encoding
        assert before in LAS or (encoding.wkt, encoding.gps_time_type) == (True, 1)  # times beyond a week
    again = read(tmp_path / f"b{after}", label=name if after == ".npz" else None)  # by kpcore too
    np.testing.assert_array_equal(again.labels, expected)


@pytest.mark.parametrize("before", [suffix for suffix in WRITE if suffix not in LAS])
def test_points_that_are_not_finite(tmp_path, before):
    """Other formats than LAS hold them; a LAS is refused before anything is written."""
    pytest.importorskip("lazrs")
    table = cloud(with_nan=True)
    WRITE[before](tmp_path / f"a{before}", table)
    kept = read(tmp_path / f"a{before}").kept
    assert kept.sum() == NUM - 6
    for after in (".ply", ".pcd", ".csv", ".txt", ".npz"):
        columns, _ = written(tmp_path / f"a{before}", tmp_path / f"b{after}", np.arange(NUM - 6), kept=kept)
        for axis in "xyz":
            np.testing.assert_array_equal(columns[axis], table[axis])
        np.testing.assert_array_equal(columns["label"][kept], np.arange(NUM - 6))
    there = sorted(os.listdir(tmp_path))
    for after in LAS:
        reason = r"LAS holds no coordinates that are NaN or infinite, as 6 points have \(the first is point 3\)"
        with pytest.raises(ReadError, match=rf"a\{before}: {reason}"):
            formats.label_field(tmp_path / f"a{before}", tmp_path / f"b{after}", NUM)
    assert sorted(os.listdir(tmp_path)) == there


def saved(path, points, **arrays):
    np.savez(path, points=points, **arrays)
    return path


@pytest.mark.parametrize(
    ("points", "scale", "rounding"),
    [
        ([[0.5, 1.25, 2], [3, 4, 5]], 1e-3, None),  # exact
        ([[0.1234567, 0, 0], [1, 1, 1]], 1e-7, None),
        ([[1 / 3, 0, 0], [5, 5, 5]], 1e-6, 3.4e-7),
        ([[1 / 3, 0, 0], [500, 5, 5]], 1e-4, 3.4e-5),
        ([[500_000 + 1 / 3, 5e6, 1], [503_000, 5e6, 9]], 1e-3, 3.4e-4),
        ([[500_000.001, 5_000_000.002, 1], [0, 0, 0]], 2e-3, 1.1e-3),  # 32 bits of millimetres are not enough
        ([[-7.123456789, 50.0, 1], [-7.123456788, 50.0, 1]], 1e-9, None),  # degrees
        ([[2.5, 2.5, 2.5]], 1e-3, None),
        ([[2e7, 1 / 3, 0], [-2e7, 0, 0]], 1e-2, 3.4e-3),
    ],
)
def test_coordinates_of_a_new_las(tmp_path, points, scale, rounding):
    laspy = pytest.importorskip("laspy")
    points = np.array(points)
    source = saved(tmp_path / "a.npz", points)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_labels(source, tmp_path / "a.las", np.zeros(len(points), int))
    data = laspy.read(tmp_path / "a.las")
    np.testing.assert_allclose(data.header.scales, scale, rtol=1e-12)
    change = np.abs(data.xyz - points).max()
    if rounding is None:
        assert change <= np.spacing(np.abs(points).max()) * 2 and not caught
    else:
        said = re.search(r"a\.las: coordinates are rounded to (\S+), by up to (\S+)$", str(caught[0].message))
        assert float(said[1]) == scale
        assert change <= rounding and abs(float(said[2]) - change) <= 0.05 * change


@pytest.mark.parametrize("far", [1e9, 1e30, 1.7e308])
def test_coordinates_that_a_las_cannot_hold(tmp_path, far):
    source = saved(tmp_path / "a.npz", np.array([[far, 0, 0], [-far, 1, 2], [1.25, 3, 4]]))
    with pytest.raises(
        ReadError, match=r"a\.npz: LAS cannot hold coordinates from -.* to .*: its 32 bits need steps of"
    ):
        write_labels(source, tmp_path / "a.las", [1, 2, 3])
    assert os.listdir(tmp_path) == ["a.npz"]


def test_float32_coordinates_of_a_new_las(tmp_path):
    """Ten digits of 0.1 in float32 are no reason for a scale of 1e-9, nor for a warning."""
    laspy = pytest.importorskip("laspy")
    points = np.float32([[0.1, 0.25, 7.7], [3.3, 4, 5.123]])
    write_labels(saved(tmp_path / "a.npz", points), tmp_path / "a.las", [1, 2])
    data = laspy.read(tmp_path / "a.las")
    assert np.array_equal(np.float32(data.xyz), points) and data.header.scales[0] == 0.001


@pytest.mark.parametrize(
    ("colors", "las_colors", "ply_colors", "note"),
    [
        (np.uint8([1, 2, 255]), [256, 512, 65_280], np.uint8([1, 2, 255]), ""),
        (np.uint16([256, 512, 65_280]), [256, 512, 65_280], np.uint8([1, 2, 255]), ""),
        (np.uint16([1, 2, 255]), [256, 512, 65_280], np.uint8([1, 2, 255]), ""),
        (np.uint16([256, 513, 65_535]), [256, 513, 65_535], np.uint16([256, 513, 65_535]), "16 bits"),
        (np.float32([0, 0.5, 1]), [0, 32_768, 65_535], np.float32([0, 0.5, 1]), "rounded to 16 bits"),
        (np.float64([0.25, np.nan, 1]), [16_384, 0, 65_535], np.float64([0.25, np.nan, 1]), "rounded to 16 bits"),
    ],
)  # fmt: skip
def test_colours(tmp_path, colors, las_colors, ply_colors, note):
    laspy, plyfile = pytest.importorskip("laspy"), pytest.importorskip("plyfile")
    source = saved(tmp_path / "a.npz", np.zeros((2, 3)), colors=np.stack([colors, colors[::-1]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_labels(source, tmp_path / "a.las", [1, 2])
        write_labels(source, tmp_path / "a.ply", [1, 2])
        write_labels(source, tmp_path / "a.pcd", [1, 2])
        write_labels(tmp_path / "a.pcd", tmp_path / "b.npz", [1, 2])
    data = laspy.read(tmp_path / "a.las")
    assert np.column_stack([data.red, data.green, data.blue]).tolist() == [las_colors, las_colors[::-1]]
    vertex = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert vertex["red"].dtype == ply_colors.dtype
    both = np.stack([ply_colors, ply_colors[::-1]])
    np.testing.assert_array_equal(np.column_stack([vertex[name] for name in ("red", "green", "blue")]), both)
    with np.load(tmp_path / "b.npz") as file:
        assert file["colors"].dtype == ply_colors.dtype
        np.testing.assert_array_equal(file["colors"], both)
    assert note in "".join(str(one.message) for one in caught) and bool(note) == bool(caught)


def test_standard_dimensions_by_their_names(tmp_path):
    """Those of PDAL and CloudCompare too; what does not fit goes into an extra dimension, and is said."""
    laspy = pytest.importorskip("laspy")
    arrays = {
        "Intensity": np.float64([0, 7, 65_535]), "ReturnNumber": [1, 2, 3], "scalar_Gps_Time": [1, 2, 3],
        "user_data": np.int64([3, 2, 256]), "nir": np.uint16([4, 5, 6]), "withheld": [True, False, True],
        "curve": np.arange(6.0).reshape(3, 2), "Classification": [9, 9, 9], "text": np.array(["a", "b", "c"]),
        "other": np.arange(7), "ä" * 20: np.int16([-1, 0, 1]), "half": np.float16([1, 2, 3]),
        "objects": np.array([None, 1, 2], object),
    }  # fmt: skip
    expected = {
        "intensity": [0, 7, 65_535], "return_number": [1, 2, 3], "number_of_returns": [0] * 3, "gps_time": [1, 2, 3],
        "user_data_2": [3, 2, 256], "user_data": [0, 0, 0], "nir": [4, 5, 6], "withheld": [1, 0, 1],
        "curve_0": [0, 2, 4], "curve_1": [1, 3, 5], "classification": [1, 2, 255], "Classification_2": [9] * 3,
        "ä" * 16: [-1, 0, 1], "half": [1, 2, 3],
    }  # fmt: skip
    source = saved(tmp_path / "a.npz", np.zeros((3, 3)), **arrays)
    columns, note = written_las(laspy, source, tmp_path / "a.las", [1, 2, 255])
    assert columns.point_format.id == 8
    for name, values in expected.items():
        assert np.array(columns[name]).tolist() == values, name
    assert "3 parts are not carried over: array text, array other, array objects" in note
    assert "user_data to user_data_2" in note and "it has no colours, which are 0" in note
    assert not columns.header.global_encoding.gps_time_type


def test_which_field_labels_go_into(tmp_path):
    """As the table in the docstring of write_labels says."""
    laspy = pytest.importorskip("laspy")
    source = saved(tmp_path / "a.npz", np.zeros((2, 3)), truth=np.int16([7, 8]), classes=np.uint8([3, 4]))
    for suffix, more, expected in (
        (".las", {}, {"classification": [1, 200], "truth": [7, 8]}),
        (".las", {"label": "truth"}, {"classification": [1, 200], "classes": [3, 4]}),
        (".las", {"label": "none"}, {"classification": [1, 200], "truth": [7, 8], "classes": [3, 4]}),
        (".las", {"into": "truth"}, {"truth": [1, 200], "classification": [3, 4]}),
        (".las", {"into": "new"}, {"new": [1, 200], "truth": [7, 8], "classification": [3, 4]}),
        (".las", {"into": "Classification"}, {"classification": [1, 200], "truth": [7, 8], "classes": [3, 4]}),
        (".ply", {}, {"label": [1, 200], "truth": [7, 8]}),
        (".ply", {"label": "truth"}, {"truth": [1, 200], "classes": [3, 4]}),
        (".ply", {"label": "none"}, {"none": [1, 200], "truth": [7, 8], "classes": [3, 4]}),
        (".csv", {"into": "TRUTH"}, {"truth": [1, 200], "classes": [3, 4]}),
        (".pcd", {"into": "new"}, {"new": [1, 200], "truth": [7, 8], "classes": [3, 4]}),
    ):
        out = tmp_path / f"b{suffix}"
        write_labels(source, out, [1, 200], **more)
        if suffix == ".las":
            data = laspy.read(out)
            columns = {name: data[name] for name in ("classification", *data.point_format.extra_dimension_names)}
        else:
            columns = {name: values for name, values in READ[suffix](out).items() if name not in ("x", "y", "z")}
        assert {name: values.tolist() for name, values in columns.items()} == expected | (
            {} if "classification" in expected or suffix != ".las" else {"classification": [0, 0]}
        ), (suffix, more)  # fmt: skip
    with pytest.raises(ReadError, match="into: expected a field of one number for each point, got y, a coordinate"):
        write_labels(source, tmp_path / "c.ply", [1, 2], into="y")
    with pytest.raises(
        ReadError, match="classification holds 0 to 255, got labels 1 to 256; name another or a new field"
    ):
        write_labels(source, tmp_path / "c.las", [1, 256])
    with pytest.raises(ReadError, match=r"a\.npz: has 2 points, got labels for 3"):
        write_labels(source, tmp_path / "c.las", [1, 2, 3])


def test_old_labels_that_a_las_does_not_hold(tmp_path):
    """A point without a label becomes 0, never classified; what is lost is said."""
    laspy = pytest.importorskip("laspy")
    old = np.array([np.nan, 300, 7, -1, 2.5, 9])
    source = saved(tmp_path / "a.npz", np.zeros((6, 3)), label=old)
    kept = np.arange(6) == 5
    data, note = written_las(laspy, source, tmp_path / "a.las", [1], kept=kept)
    assert np.array(data.classification).tolist() == [0, 0, 7, 0, 0, 1]
    assert "2 points that get no new label have one that classification does not hold: it is 0" in note


def test_more_extra_dimensions_than_a_las_has(tmp_path):
    laspy = pytest.importorskip("laspy")
    names = [f"n{number:03}" for number in range(350)]
    source = saved(tmp_path / "a.npz", np.zeros((2, 3)), **{name: np.uint8([1, 2]) for name in names})
    data, note = written_las(laspy, source, tmp_path / "a.las", [1, 2])
    assert [*data.point_format.extra_dimension_names] == names[:341]
    assert "9 parts are not carried over: n341, n342" in note
    with pytest.raises(ReadError, match="confidence: a LAS has at most 341 extra dimensions"):
        write_labels(source, tmp_path / "b.las", [1, 2], extra={"confidence": np.uint8([1, 2])})


def test_tables_without_names_and_sweeps(tmp_path):
    """Named as when they are read."""
    sweep = np.float32([[1, 2, 3, 0.5], [40, 5, 6, 0.25]])
    sweep.tofile(tmp_path / "a.bin")
    (tmp_path / "a.pts").write_text("2\n1.5 2 3 -100 10 20 250\n4 5 6 7 50 80 40\n")
    (tmp_path / "a.xyz").write_text("1 2 3 9\n4 5 6 8.5\n")
    np.save(tmp_path / "a.npy", np.float32([[1, 2, 3, 255, 40, 50], [4, 5, 6, 90, 80, 70]]))
    for name, expected in (
        ("a.bin", "x,y,z,intensity,label\n1.0,2.0,3.0,0.5,1\n40.0,5.0,6.0,0.25,2\n"),
        ("a.pts", "x,y,z,red,green,blue,intensity,label\n1.5,2.0,3.0,10,20,250,-100,1\n4.0,5.0,6.0,50,80,40,7,2\n"),
        ("a.xyz", "x,y,z,column_4,label\n1.0,2.0,3.0,9.0,1\n4.0,5.0,6.0,8.5,2\n"),
        ("a.npy", "x,y,z,red,green,blue,label\n1.0,2.0,3.0,255,40,50,1\n4.0,5.0,6.0,90,80,70,2\n"),
    ):
        write_labels(tmp_path / name, tmp_path / "b.csv", [1, 2])
        assert (tmp_path / "b.csv").read_text() == expected
    columns = ["x", "y", "z", "time", "intensity"]
    write_labels(tmp_path / "a.xyz", tmp_path / "b.csv", [1, 2], columns=columns[:4])
    assert (tmp_path / "b.csv").read_text().startswith("x,y,z,time,label\n")
    write_labels(tmp_path / "a.xyz", tmp_path / "b.csv", [1, 2], columns=columns)  # not those of the file
    assert (tmp_path / "b.csv").read_text().startswith("x,y,z,column_4,label\n")


@pytest.mark.parametrize("suffix", READ)
def test_names_of_fields_that_are_hard_to_write(tmp_path, suffix):
    """Each field arrives under a name by which kpcore reads it, and the new names are said."""
    if suffix == ".laz":
        pytest.importorskip("lazrs")
    names = ["a,b", "a b", "a_b", 'q"', "#h", "h//i", " lead", "X2", "tab\tbed", "line\nbreak", "_", "n" * 40, "n" * 41,
             "classification", "intensity", "xyz", "Ω", "property", "count"]  # fmt: skip
    table = np.zeros(2, [("x", "f8"), ("y", "f8"), ("z", "f8"), *((name, "f4") for name in names)])
    for number, name in enumerate(names):
        table[name] = number + 0.5, -number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about names that are not ASCII
        np.save(tmp_path / "a.npy", table)
    columns, note = written(tmp_path / "a.npy", tmp_path / f"b{suffix}", [1, 2], into="new")
    arrived = {tuple(values.tolist()): name for name, values in columns.items() if len(values) == 2}
    for number, name in enumerate(names):
        there = arrived[number + 0.5, -number]
        assert there == name or f" to {there}" in note, (name, there, note)
        assert read(tmp_path / f"b{suffix}", fields=[there]).fields[there.lower()].tolist() == [number + 0.5, -number]
    assert columns["new"].tolist() == [1, 2]


def test_what_a_ply_or_pcd_has_besides_points_is_said(tmp_path):
    head = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    head += "property list uchar int near\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "a.ply").write_text(head + "0 0 0 1 2\n1 0 0 0\n0 1 0 0\n3 0 1 2\n")
    columns, note = written(tmp_path / "a.ply", tmp_path / "a.csv", [1, 2, 3])
    assert note == "2 parts are not carried over: element face, list near"
    assert [*columns] == ["x", "y", "z", "label"]
    head = "FIELDS x y z n\nSIZE 4 4 4 2\nTYPE F F F U\nCOUNT 1 1 1 2\nWIDTH 1\nHEIGHT 2\nVIEWPOINT 1 0 0 1 0 0 0\n"
    (tmp_path / "a.pcd").write_text(head + "DATA ascii\n0 0 0 1 2\n1 0 0 3 4\n")
    columns, note = written(tmp_path / "a.pcd", tmp_path / "a.ply", [1, 2])
    assert note == "2 parts are not carried over: its 1 x 2 layout, viewpoint"
    assert (columns["n_0"].tolist(), columns["n_1"].dtype.str) == ([1, 3], "<u2")
    columns, _ = written(tmp_path / "a.ply", tmp_path / "b.pcd", [1, 2])
    assert [*columns] == ["x", "y", "z", "n_0", "n_1", "label"]


def test_a_file_that_changes_during_the_work(tmp_path):
    """It is read again when the labels are there."""
    (tmp_path / "a.csv").write_text("x,y,z\n1,2,3\n4,5,6\n")
    for out in ("b.csv", "b.las", "b.npz"):
        field = formats.label_field(tmp_path / "a.csv", tmp_path / out, 2)
        for rows in (3, 1):
            (tmp_path / "a.csv").write_text("x,y,z\n" + "1,2,3\n" * rows)
            with pytest.raises(ReadError, match=r"a\.csv: changed while it was read: had 2 points"):
                formats.write_to(field, tmp_path / "a.csv", tmp_path / out, np.array([1, 2]), np.ones(2, bool))
        (tmp_path / "a.csv").write_text("x,y,z\n1,2,3\n4,5,6\n")
    assert os.listdir(tmp_path) == ["a.csv"]


@pytest.mark.parametrize("suffix", READ)
def test_a_full_disk(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    if suffix == ".laz":
        pytest.importorskip("lazrs")
    np.random.default_rng(0).random((9_000, 4), np.float32).tofile(tmp_path / "a.bin")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with warnings.catch_warnings(), pytest.raises(ReadError, match=rf"/out{suffix}: File too large$"):
            warnings.simplefilter("ignore")
            write_labels(tmp_path / "a.bin", tmp_path / f"out{suffix}", np.zeros(9_000, int))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(("name", "after", "note"), [
    ("autzen_trim.laz", ".ply", "2 parts are not carried over: coordinate reference system, 1 record of the header"),
    ("fragment.pcd", ".laz", ""),
    ("car_cloud400.csv", ".las", "coordinates are rounded to 0.0001, by up to 5e-05"),
])  # fmt: skip
def test_real_files(shared, tmp_path, name, after, note):
    pytest.importorskip("lazrs")
    before = read(shared / "data" / name, exact=True)
    labels = np.arange(len(before.points)) % 9
    _, said = written(shared / "data" / name, tmp_path / f"a{after}", labels)
    there = read(tmp_path / f"a{after}", exact=True)
    assert said == note
    assert np.abs(there.exact - before.exact).max() <= (5.1e-5 if note.startswith("coord") else 1e-8)
    np.testing.assert_array_equal(there.labels, labels)
    if before.colors is not None:
        np.testing.assert_array_equal(there.colors, before.colors)


def written_las(laspy, source, out, labels, **more):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_labels(source, out, labels, **more)
    return laspy.read(out), "".join(str(one.message) for one in caught)

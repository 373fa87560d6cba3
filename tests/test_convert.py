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
TYPES = {"f4": "float", "f8": "double", "u1": "uchar", "u2": "ushort", "i4": "int", "u8": "uint64", "i2": "short"}


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
    assert (data.header.version.minor, data.header.point_count) == (4, NUM)
    np.testing.assert_allclose(data.header.mins, data.xyz.min(axis=0), atol=1e-9)
    np.testing.assert_allclose(data.header.maxs, data.xyz.max(axis=0), atol=1e-9)
    assert data.header.number_of_points_by_return.sum() == NUM
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
    for module, name in ((las_format, "_BLOCK"), (table_module, "BLOCK"), (pcd_format, "BLOCK"), (text_format, "ROWS")):
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
    again = read(tmp_path / f"b{after}", label=name if after == ".npz" else None)  # by kpcore too
    np.testing.assert_array_equal(again.labels, expected)


@pytest.mark.parametrize("before", WRITE)
def test_points_that_are_not_finite(tmp_path, before):
    """Other formats than LAS hold them; a LAS is refused before anything is written."""
    if before in LAS:
        pytest.skip("a LAS holds no NaN")
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
        ([[1e12, 1, 0], [0, 0, 0]], 500, 250),
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


def written_las(laspy, source, out, labels, **more):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_labels(source, out, labels, **more)
    return laspy.read(out), "".join(str(one.message) for one in caught)

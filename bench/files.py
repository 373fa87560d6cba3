"""Measures reading and labelling of files: ``python bench/run.py files``.

Each file is written here from the procedural flat (`kpcore.scenes.indoor`) at UTM coordinates and is in the page cache.
A peer is called as its documentation says, up to the same arrays in memory: coordinates, colours, labels. Only kpcore
moves points near the origin and converts them to float32, which its time includes. plyfile maps the file and converts
nothing. pandas rounds decimal numbers to within a few units in the last place; NumPy and kpcore round correctly.
"""

import importlib.util
import struct
from functools import partial

import numpy as np

import kpcore as kp
from kpcore import io

SIZES = {"full": {"points": 1_000_000, "faces": 40_000}, "quick": {"points": 500, "faces": 50}}
TASKS = {"laz": [{}], "ply": [{}], "faces": [{}], "text": [{}]}
TARGETS = {}  # there are no targets for files; all rows are for information
FIELDS = [("x", "<f8"), ("y", "<f8"), ("z", "<f8"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "<i4")]


def prepare(folder, size):
    """Part of the interface to run.py; the cases here make their inputs themselves."""


def table(num):
    """A structured array of points at UTM coordinates, whole millimetres."""
    flat, out = kp.scenes.indoor(num), np.empty(num, FIELDS)
    for name, values, origin in zip("xyz", flat.points.T, (515_368, 4_918_340, 2_322), strict=True):
        out[name] = np.round(values.astype(float), 3) + origin
    for name, values in zip(("red", "green", "blue"), flat.colors.T, strict=True):
        out[name] = values
    out["label"] = flat.labels
    return out


def same(cloud, rows):
    """Check that a cloud holds the rows of the table, with coordinates to 1 mm."""
    for axis, name in enumerate("xyz"):
        assert np.abs(cloud.points[:, axis] + cloud.shift[axis] - rows[name]).max() < 1e-3
    assert all(np.array_equal(cloud.colors[:, i], rows[name]) for i, name in enumerate(("red", "green", "blue")))
    assert np.array_equal(cloud.labels, rows["label"])


def compare(bench, what, call, module, name, other, check=None):
    """Compare with another package, if it is installed; `check` gets its result."""
    if importlib.util.find_spec(module) is None:
        bench.absent(what, name, f"{module} is not installed")
        return
    if check:
        check(other())
    bench.compare(what, call, name, other)


def laz(bench):
    rows, path, out = table(bench.sizes["points"]), bench.folder / "a.laz", bench.folder / "b.laz"
    bench.label("", f"{len(rows):,}")
    if importlib.util.find_spec("laspy") is None:
        bench.absent("read a LAZ", "laspy", "laspy is not installed")
        return
    import laspy

    las = laspy.LasData(laspy.LasHeader(point_format=7, version="1.4"))
    las.header.scales, las.header.offsets = [0.001] * 3, [515_000, 4_918_000, 2_000]
    las.x, las.y, las.z, las.classification = rows["x"], rows["y"], rows["z"], rows["label"]
    las.red, las.green, las.blue = (rows[name].astype(np.uint16) * 256 for name in ("red", "green", "blue"))
    rng = np.random.default_rng(0)
    las.intensity, las.gps_time = rng.integers(0, 4000, len(rows)), 3e8 + np.sort(rng.random(len(rows))) * 60
    las.write(path)
    same(io.read(path), rows)

    def read():
        las = laspy.read(path)  # on all cores
        return las.xyz, np.column_stack([las.red, las.green, las.blue]), np.asarray(las.classification)

    def label():
        las = laspy.read(path)
        las.classification = labels
        las.write(out)

    labels = (rows["label"] + 1) % 32
    bench.compare("read a LAZ", lambda: io.read(path), "laspy", read)
    io.write_labels(path, out, labels)
    assert np.array_equal(laspy.read(out).classification, labels)
    bench.compare("write labels of a LAZ", lambda: io.write_labels(path, out, labels), "laspy", label)


def ply_file(path, rows, faces=None, first=False):
    """Write a binary PLY with `faces` triangles, which come before the vertices if `first`."""
    kinds = {"<f8": "double", "u1": "uchar", "<i4": "int"}
    vertex = f"element vertex {len(rows)}\n" + "".join(f"property {kinds[kind]} {name}\n" for name, kind in FIELDS)
    face, data = "", b""
    if faces:
        face = f"element face {faces}\nproperty list uchar int vertex_indices\n"
        data = struct.pack("<B3i", 3, 0, 1, 2) * faces
    parts = [(face, data), (vertex, rows.tobytes())] if first else [(vertex, rows.tobytes()), (face, data)]
    head = "ply\nformat binary_little_endian 1.0\n" + "".join(head for head, _ in parts) + "end_header\n"
    path.write_bytes(head.encode() + b"".join(data for _, data in parts))


def read_with_plyfile(path):
    from plyfile import PlyData

    vertex = PlyData.read(path)["vertex"]
    xyz, rgb = (np.column_stack([vertex[name] for name in names]) for names in ("xyz", ("red", "green", "blue")))
    return xyz, rgb, np.array(vertex["label"])


def ply(bench):
    rows, path = table(bench.sizes["points"]), bench.folder / "a.ply"
    bench.label("", f"{len(rows):,}")
    ply_file(path, rows)
    same(io.read(path), rows)
    compare(bench, "read a binary PLY", lambda: io.read(path), "plyfile", "plyfile", lambda: read_with_plyfile(path))


def faces(bench):
    rows, count = table(bench.sizes["faces"]), bench.sizes["faces"]
    for first in (False, True):
        path = bench.folder / f"faces-{first}.ply"
        bench.label("faces first" if first else "faces last", f"{len(rows):,}")
        ply_file(path, rows, count, first)
        same(io.read(path), rows)
        what = "read a PLY of as many triangles"
        compare(bench, what, partial(io.read, path), "plyfile", "plyfile", partial(read_with_plyfile, path))


def text(bench):
    rows, path = table(bench.sizes["points"]), bench.folder / "a.csv"
    bench.label("", f"{len(rows):,}")
    columns = np.column_stack([rows[name].astype(float) for name, _ in FIELDS])
    np.savetxt(path, columns, ["%.3f"] * 3 + ["%d"] * 4, ",", header=",".join(rows.dtype.names), comments="")
    same(io.read(path), rows)

    def loadtxt():
        return np.loadtxt(path, delimiter=",", skiprows=1)

    bench.compare("read a CSV", lambda: io.read(path), "numpy.loadtxt", loadtxt)

    def pandas():
        import pandas

        return pandas.read_csv(path).to_numpy()

    compare(bench, "read a CSV", lambda: io.read(path), "pandas", "pandas.read_csv", pandas)

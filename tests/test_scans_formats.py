"""Formats other than LAS piece by piece: what `read` reads of a whole file, each block by itself."""

import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
from files import POINTS, npy, npz, ply, structured

from kpcore import io
from kpcore.io import ReadError, formats, layout, read, scans, write_labels
from kpcore.io.cloud import Request, field_values

RNG = np.random.default_rng(0)
NUM = 40
XYZ = RNG.normal(0, 20, (NUM, 3)).round(2) + np.array([515_000, 4_918_000, 0])
BAD = XYZ.copy()
BAD[3, 1], BAD[17, 2], BAD[18, 0], BAD[30, 2] = np.nan, np.inf, -np.inf, 1e39


def vertices(order="<", xyz=XYZ, kind="double", **fields):
    """A binary PLY with an element before the vertices, and one after them."""
    types = {"u1": "uchar", "u2": "ushort", "i4": "int", "u4": "uint", "f4": "float", "f8": "double", "i2": "short"}
    layout = [(axis, order + {"double": "f8", "float": "f4"}[kind]) for axis in "xyz"]
    layout += [(name, order + values.dtype.str[1:]) for name, values in fields.items()]
    table = np.zeros(len(xyz), layout)
    for axis, values in zip("xyz", xyz.T, strict=True):
        table[axis] = values
    for name, values in fields.items():
        table[name] = values
    lines = "".join(f"property {types[kind[1:]]} {name}\n" for name, kind in layout)
    form = "little" if order == "<" else "big"
    head = f"ply\nformat binary_{form}_endian 1.0\nelement camera 2\nproperty uchar id\nelement vertex {len(table)}\n"
    end = "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    face = np.array([3], "u1").tobytes() + np.array([0, 1, 2], order + "i4").tobytes()
    return f"{head}{lines}{end}".encode() + b"\7\10" + table.tobytes() + face


def colored(colors, **more):
    return dict(zip(("red", "green", "blue"), np.asarray(colors).T, strict=True)) | more


EIGHT = RNG.integers(0, 256, (NUM, 3), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 200, (NUM, 3), dtype=np.uint16)
SIXTEEN[-1, 1] = 60_000  # decides for all, in the last block
FRACTION = RNG.uniform(0, 1, (NUM, 3)).astype(np.float32).round(2)
FRACTION[5] = np.nan
TRUTH = RNG.integers(0, 9, NUM, dtype=np.int32)
SPARSE = np.where(np.arange(NUM) == 22, 5, 0).astype(np.uint8)  # labels are there at all in one block
MISSING = np.where(np.arange(NUM) < 30, np.nan, TRUTH).astype(np.float32)
NOT = np.where(np.arange(NUM) == 25, 0.5, 1).astype(np.float32)
PACKED = (EIGHT.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).astype(np.uint32)
FIELD = RNG.normal(size=NUM).astype(np.float32)


def records_of(xyz=XYZ, **fields):
    table = np.zeros(len(xyz), [*((axis, "f8") for axis in "XYZ"), *((name, v.dtype) for name, v in fields.items())])
    for name, values in [*zip("XYZ", xyz.T, strict=True), *fields.items()]:
        table[name] = values
    return table


FILES = {
    "little.ply": vertices("<", **colored(EIGHT), label=TRUTH, field=FIELD),
    "big.ply": vertices(">", **colored(SIXTEEN), scalar_Classification=SPARSE, field=FIELD),
    "single.ply": vertices(xyz=XYZ - XYZ.min(0), kind="float", **colored(FRACTION), label=MISSING),
    "bad.ply": vertices(xyz=BAD, **colored(EIGHT), label=TRUTH, field=FIELD),
    "no_labels.ply": vertices(label=NOT, field=FIELD),
    "zeros.ply": vertices(label=0 * TRUTH, **colored(0 * EIGHT), r=EIGHT[:, 0], g=EIGHT[:, 1], b=EIGHT[:, 2]),
    "two_labels.ply": vertices(label=TRUTH, class_id=SPARSE),
    "wrong_colors.ply": vertices(**colored(np.where(np.arange(NUM * 3).reshape(-1, 3) == 80, -1, EIGHT).astype("i2"))),
    "packed.ply": vertices(rgb=PACKED.view(np.float32), label=TRUTH.astype(np.uint32)),
    "packed64.ply": vertices(rgb=PACKED.astype(np.float64)),
    "unpacked.ply": vertices(rgb=NOT.astype(np.float64)),
    "black.ply": vertices(rgb=PACKED & np.uint32(0xFF000000) | np.uint32(1 << 24)),
    "hand.ply": ply(POINTS),
    "text.ply": ply(POINTS, binary=False, kind="double"),
    "hand.npy": npy(structured(POINTS)),
    "structured.npy": npy(records_of(BAD, **colored(SIXTEEN), Label=TRUTH.astype(np.int64), field=FIELD)),
    "nameless.npy": npy(np.column_stack([XYZ, EIGHT])),
    "uncolored.npy": npy(np.column_stack([XYZ, np.where(SPARSE[:, None], 0.5, EIGHT)])),
    "dark.npy": npy(np.column_stack([XYZ, np.where(EIGHT.max() == EIGHT, 32, EIGHT % 32)])),
    "fortran.npy": npy(np.asfortranarray(np.column_stack([BAD, EIGHT]))),
    "wide.npy": npy(np.column_stack([XYZ, EIGHT, EIGHT, EIGHT])),
    "points.npz": npz(points=BAD, colors=SIXTEEN, labels=TRUTH, field=FIELD),
    "transposed.npz": npz(points=np.ascontiguousarray(XYZ.astype(">f4").T).T, rgb=np.asfortranarray(EIGHT), y=SPARSE),
    "axes.npz": npz(x=BAD[:, 0], y=BAD[:, 1], z=BAD[:, 2], red=SIXTEEN[:, 0], green=SIXTEEN[:, 1], blue=SIXTEEN[:, 2],
                    classes=TRUTH[:, None], field=FIELD),
    "table.npz": npz(anything=np.column_stack([XYZ, EIGHT]), field=FIELD),
    "structured.npz": npz(xyz=records_of(**colored(FRACTION), label=TRUTH), field=FIELD),
    "hidden.npz": npz(points=XYZ, z=FIELD, labels=np.zeros((NUM, 2)), features=np.zeros((NUM, 64)), field=FIELD),
    "half.npz": npz(points=XYZ, colors=FRACTION.astype(np.float16), labels=TRUTH.astype(np.float16), field=FIELD),
    "names.npz": npz(points=XYZ, classes=np.array(["ground", "house"]), field=FIELD),
    "black.npz": npz(points=records_of(**colored(EIGHT)), colors=0 * EIGHT, labels=NOT, field=FIELD),
}  # fmt: skip
BLOCK = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("kpcore.io.layout.BLOCK", BLOCK)
    monkeypatch.setattr("kpcore.io.ply.TEXT_BLOCK", 60)


@pytest.fixture(params=[*FILES])
def path(request, tmp_path):
    (tmp_path / request.param).write_bytes(FILES[request.param])
    return tmp_path / request.param


def pieces_of(scan, request):
    return [scans.decoded(scan, block, request, True) for _, block in scans.records(scan, scans.needed(scan, request))]


def check_same(path, columns=None, ignore=(), label=None, fields=()):
    """Everything that `read` reads, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cloud = read(path, fields=fields, label=label, exact=True, ignore=ignore, columns=columns)
    scan = scans.opened(path, columns)
    assert scan.num_points == len(cloud.points) + cloud.left_out + sum(cloud.dropped.values())
    scan = scans.measured(scan, label)
    assert pickle.loads(pickle.dumps(scan)) == scan
    kept = np.ones(scan.num_points, bool) if cloud.kept is None else cloud.kept
    pieces = pieces_of(scan, Request(fields, label, ignore=ignore))
    assert {*map(len, (piece.points for piece in pieces[:-1]))} <= {BLOCK} or path.name == "text.ply"
    points = np.concatenate([piece.points for piece in pieces])
    np.testing.assert_array_equal(points[kept], cloud.exact)
    assert (scans.are_points(points) == kept).all() or ignore
    assert all(np.array_equal(scans.coordinates(scan, block), piece.points, equal_nan=True)
               for (_, block), piece in zip(scans.records(scan), pieces, strict=True))  # fmt: skip
    for name in ("colors", "labels"):
        parts, expected = [getattr(piece, name) for piece in pieces], getattr(cloud, name)
        if expected is None:
            assert parts == [None] * len(parts), name
        else:
            np.testing.assert_array_equal(np.concatenate(parts)[kept], expected, err_msg=name)
    for name in fields:
        values = field_values(name, np.concatenate([piece.fields[name] for piece in pieces]))
        np.testing.assert_array_equal(values[kept], cloud.fields[name], strict=True)
    assert scan.has_colors == (cloud.colors is not None)
    if not ignore:
        inside = cloud.exact
        assert (scan.low, scan.high) == (tuple(inside.min(axis=0)), tuple(inside.max(axis=0)))
    told = [str(one.message).removeprefix(f"{path}: ") for one in caught]
    if cloud.left_out:
        told.append(io.faults(cloud)[0])
    assert scan.warning == ("; ".join(told) or None)


def test_pieces_are_what_read_reads(path):
    check_same(path, fields=tuple(name for name in io.field_names(path) if name == "field"))


ROWS, PLACE = 60, 37
BYTES, ONES = 100.0 + np.arange(ROWS) % 3, np.ones(ROWS)
SAME, ALL_BITS = np.full(ROWS, 9, np.uint8), np.full(ROWS, 2**32 - 1)


@pytest.mark.parametrize(
    ("names", "values", "others"),
    [
        ("red green blue", BYTES, [-1, 0.5, 300, 65_536, np.nan, np.inf, 1.5]),
        ("red green blue", 0 * BYTES, [1, 0.5, -1, np.nan]),
        ("red green blue", BYTES / 255, [1, 1.5, 2, 255, -0.1, np.nan]),
        ("red green blue", BYTES.astype(np.int16), [-1, 256]),
        ("rgb", np.full(ROWS, 0xFF000000, np.uint32), [0xFF000001]),
        ("rgb", (np.arange(ROWS) % 3 << 24).astype(np.uint32), [1 << 24 | 1]),
        ("rgb", np.full(ROWS, 70_000.0), [0.5, -1, np.nan, 2**33]),
        ("label", ONES, [0.5, np.nan, 2.0**31, np.inf, 5, 2.0**32 - 1]),
        ("label", 0 * ONES, [3, -1, np.nan]),
        ("label", ONES * np.nan, [4, 0, 0.5]),
        ("label", ALL_BITS.astype(np.uint32), [7, 0, 2**31]),
        ("label", np.where(np.arange(ROWS) % 2, ALL_BITS, -1), [7, 3_000_000_000]),
        ("label", np.select([np.arange(ROWS) % 3 == 0, np.arange(ROWS) % 3 == 1], [5, -1], ALL_BITS), [3_000_000_000]),
        ("label class_id", np.arange(ROWS, dtype=np.uint8) % 5, [3]),
        ("label class_id", SAME, [8]),
        ("class_id label", SAME, [8]),
    ],
)
def test_one_point_decides_for_all(names, values, others):
    """Whatever point it is, any other points of the file are read as in the whole file."""
    for other in [None, *others]:
        for column in names.split():
            kinds = [(name, values.dtype) for name in names.split()]
            table = np.zeros(ROWS, [*((axis, "f4") for axis in "xyz"), *kinds])
            for name in names.split():
                table[name] = values
            if other is not None:
                table[column][PLACE] = other
            records = table.view(np.uint8).reshape(ROWS, -1)
            fields = layout.of_fields(ROWS, records.shape[1], layout.named(table.dtype))
            telling = records[:0]
            for begin in range(0, ROWS, 20):
                block = layout.telling(fields.deciding, records[begin : begin + 20])
                telling = layout.telling(fields.deciding, np.concatenate([telling, block]))
            assert len(telling) < 20
            whole = layout.content(fields, records, Request())
            for rows in (slice(0, 3), slice(PLACE, PLACE + 1)):
                part = layout.content(fields, np.concatenate([telling, records[rows]]), Request(is_part=True))
                assert part.warning == whole.warning, (column, other)
                for name in ("colors", "labels"):
                    one, all_rows = getattr(part, name), getattr(whole, name)
                    assert (one is None) == (all_rows is None), (column, other, name)
                    if one is not None:
                        np.testing.assert_array_equal(one[len(telling) :], all_rows[rows], err_msg=f"{column} {other}")


def test_names_for_columns(tmp_path):
    """Those that do not fit are not used, as in the pipeline."""
    table = np.column_stack([XYZ, TRUTH, FIELD, *EIGHT.T])
    names = ("x", "y", "z", "truth", "field", "red", "green", "blue")
    for name, data in (("a.npy", npy(table)), ("a.npz", npz(points=table))):
        (tmp_path / name).write_bytes(data)
        check_same(tmp_path / name, names, label="truth", fields=("field",))
        assert scans.opened(tmp_path / name, names[:5]).names == ("x", "y", "z")
    (tmp_path / "a.ply").write_bytes(FILES["little.ply"])
    assert scans.opened(tmp_path / "a.ply", names).names == ("x", "y", "z", "red", "green", "blue", "label", "field")


@pytest.mark.parametrize("name", ["bad.ply", "structured.npy", "axes.npz", "zeros.ply"])
@pytest.mark.parametrize("ignore", [(0,), (3, 5, "withheld")])
def test_points_to_ignore(write, name, ignore):
    """0 among the labels to ignore makes labels of zeros."""
    path = write(name, FILES[name])
    if name == "zeros.ply" and 0 in ignore:
        label = scans.decoded(
            scans.measured(scan := scans.opened(path)), scan.no_records, Request(ignore=ignore)
        ).labels
        assert label is not None
        return
    check_same(path, ignore=ignore)


def test_a_label_by_name(write):
    path = write("a.ply", FILES["two_labels.ply"])
    check_same(path, label="class_id")
    check_same(write("b.ply", FILES["single.ply"]), label="Label")
    check_same(write("d.npz", npz(points=XYZ, Truth=MISSING, labels=TRUTH)), label="truth")
    path = write("e.npz", npz(points=XYZ, Truth=NOT))
    with pytest.raises(ReadError, match=r"e\.npz: field truth holds 0\.5, which is not a label"):
        scans.measured(scans.opened(path), "truth")
    path = write("c.ply", FILES["no_labels.ply"])
    reason = r"c\.ply: field label holds 0\.5, which is not a label: expected 32-bit whole numbers$"
    with pytest.raises(ReadError, match=reason):
        scans.measured(scans.opened(path), "label")
    with pytest.raises(ReadError, match=r"c\.ply: has no field height; there are x y z label field"):
        scans.needed(scans.opened(path), Request(("height",)))


def test_a_scan_that_is_not_measured_decides_nothing(write):
    scan = scans.opened(write("a.ply", FILES["little.ply"]))
    with pytest.raises(ValueError, match=r"scan: expected one of `measured` for .*a\.ply, got one of `opened`"):
        scans.decoded(scan, scan.no_records, Request())
    with pytest.raises(ValueError, match="got one of `opened`"):
        scan.has_colors  # noqa: B018


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.ply", FILES["little.ply"][:-500], "truncated: declares 40 vertex elements"),
        ("a.ply", vertices(xyz=XYZ[:0]), "holds no points"),
        (
            "a.ply",
            vertices(xyz=XYZ * np.nan),
            "has no finite points: all 40 have a coordinate that is NaN, infinite or",
        ),
        ("a.ply", FILES["hand.ply"].replace(b"float y", b"float v"), "has no field y; there are x v z red green"),
        ("a.npy", npy(XYZ)[:-8], "truncated: the array of shape"),
        ("a.npy", npy(XYZ.T), r"expected a row for each point, got \(3, 40\)"),
        ("a.npy", npy(XYZ[None]), r"expected an \(N, 3 or more\) table"),
        ("a.npy", npy(XYZ[:, 0]), r"expected an \(N, 3 or more\) table of numbers, got \(40,\) float64"),
        ("a.npy", npy(records_of()[:, None]), "expected a row for each point, got an array of shape"),
        ("a.npz", npz(points=XYZ, labels=TRUTH[:5]), "holds 40 points but 5 labels"),
        ("a.npz", npz(points=XYZ, labels=np.array([{}] * NUM)), "labels holds Python objects"),
        ("a.npz", npz(colors=EIGHT), "has no array named points, only colors"),
        ("a.npz", npz(points=XYZ[:, :2]), r"expected an \(N, 3 or more\) table"),
        (
            "a.npz",
            FILES["points.npz"].replace(FILES["points.npz"][200:220], bytes(20)),
            "cannot be read|damaged|is not",
        ),
    ],
)
def test_damaged_files(write, name, data, reason):
    path = write(name, data)
    with pytest.raises(ReadError, match=rf"a\.np.: .*({reason})|a\.ply: {reason}") as error:
        scan = scans.measured(scans.opened(path))
        scans.decoded(scan, scan.no_records, Request())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["little.ply", "points.npz", "fortran.npy"])
def test_a_file_that_changes(write, name):
    path = write(name, FILES[name])
    scan = scans.opened(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ReadError, match="has changed since its header was read"):
        next(scans.records(scan))
    if name != "fortran.npy":
        out = path.with_name(f"out{path.suffix}")
        field = formats.label_field(path, out, NUM)
        os.utime(path, ns=(2, 2))
        with pytest.raises(ReadError, match="has changed since its header was read"):
            formats.write_pieces(field, path, out, lambda first, records: (records[:, 0] < 0, np.zeros(0, int), {}))
        assert os.listdir(path.parent) == [path.name]


# ---- labels


@pytest.mark.parametrize("name", ["little.ply", "big.ply", "bad.ply", "text.ply", "points.npz", "transposed.npz",
                                  "axes.npz", "structured.npz", "structured.npy", "nameless.npy"])  # fmt: skip
@pytest.mark.parametrize("into", [None, "truth"])
def test_labels_in_pieces_are_those_of_arrays(write, name, into):
    """And each piece gets the records that it is about."""
    path = write(name, FILES[name])
    after = ".csv" if path.suffix == ".npy" else path.suffix
    if name in ("structured.npz", "transposed.npz") and into is None:
        with pytest.raises(ReadError, match=r"label is a column of the points|got y, which is a coordinate"):
            formats.label_field(path, path.with_name("b.npz"), NUM, label="label" if name[0] == "s" else None)
        return
    scan = scans.opened(path)
    num = scan.num_points
    rng = np.random.default_rng(1)
    kept = rng.random(num) < 0.7
    labels, share = rng.integers(0, 9, num), rng.random(num).astype(np.float32)
    whole, out = path.with_name(f"whole{after}"), path.with_name(f"out{after}")
    write_labels(path, whole, labels[kept], kept=kept, into=into, extra={"share": share[kept]})
    field = formats.label_field(path, out, num, into=into, extra={"share": np.float32}, values=labels)
    rows, seen = [], []

    def pieces(first, records):
        chosen = kept[first : first + len(records)]
        rows.append(first)
        seen.append(records.copy())
        assert not records.flags.writeable
        return (
            chosen,
            labels[first : first + len(records)][chosen],
            {"share": share[first : first + len(records)][chosen]},
        )

    formats.write_pieces(field, path, out, pieces)
    assert out.read_bytes() == whole.read_bytes()
    expected = [block for _, block in scans.records(scan)]
    assert all(np.array_equal(one, other) for one, other in zip(seen, expected, strict=True))
    assert rows == [first for first, _ in scans.records(scan)] and (len(rows) > 1 or name == "text.ply")
    assert sorted(os.listdir(path.parent)) == sorted([path.name, whole.name, out.name])


def test_every_other_byte_is_kept(write):
    """Also the element before the vertices and the one after them, and other members of an NPZ."""
    path = write("a.ply", FILES["big.ply"])
    out = path.with_name("b.ply")
    field = formats.label_field(path, out, NUM)

    def pieces(first, records):
        return np.arange(first, first + len(records)) % 2 == 0, np.full((len(records) + 1 - first % 2) // 2, 77), {}

    formats.write_pieces(field, path, out, pieces)
    before, after = (np.frombuffer(one.read_bytes(), np.uint8) for one in (path, out))
    scan = scans.opened(path)
    at = next(one.at for one in scan.dimensions if one.name == "scalar_Classification")
    start = FILES["big.ply"].index(b"end_header\n") + 11 + 2
    places = start + np.arange(0, NUM, 2) * scan.record_size + at
    expected = before.copy()
    expected[places] = 77
    np.testing.assert_array_equal(after, expected)
    path = write("a.npz", FILES["hidden.npz"])
    field = formats.label_field(path, path.with_name("b.npz"), NUM, into="truth")
    formats.write_pieces(field, path, path.with_name("b.npz"), pieces)
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(path.with_name("b.npz")) as other:
        assert other.namelist() == [*one.namelist(), "truth.npy"]
        assert all(one.read(name) == other.read(name) for name in one.namelist())
    assert np.load(path.with_name("b.npz"))["truth"].tolist() == [77, 0] * (NUM // 2)
    path = write("c.npz", FILES["axes.npz"])
    formats.write_pieces(formats.label_field(path, path.with_name("d.npz"), NUM), path, path.with_name("d.npz"), pieces)
    expected = np.where(np.arange(NUM)[:, None] % 2 == 0, 77, TRUTH[:, None])
    np.testing.assert_array_equal(np.load(path.with_name("d.npz"))["classes"], expected, strict=True)


def test_what_is_not_written_in_pieces(write):
    path = write("a.npz", FILES["points.npz"])
    field = formats.label_field(path, path.with_name("b.ply"), NUM)
    reason = r"a\.npz: a NPZ is not labelled in parts as a PLY: write a NPZ$"
    with pytest.raises(ReadError, match=reason):
        formats.write_pieces(field, path, path.with_name("b.ply"), lambda first, records: None)
    for before in (".las", ".ply", ".npy", ".npz", ".pcd", ".csv", ".bin"):
        for after in (".laz", ".ply", ".npz", ".pcd", ".csv"):
            is_written = formats.why_no_pieces(f"a{before}", f"b{after}") is None
            assert is_written == ((before, after) in WRITTEN), (before, after)


WRITTEN = {(".las", ".laz"), (".npz", ".npz")} | {
    (before, after) for before in (".ply", ".npy") for after in (".laz", ".ply", ".pcd", ".csv")
}

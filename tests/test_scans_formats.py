"""Formats other than LAS piece by piece: what `read` reads of a whole file, each block by itself."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from files import COLORS, LABELS, POINTS, npy, npz, pcd, ply, structured, text

from kpcore import io
from kpcore.io import ReadError, formats, read, scans, write_labels
from kpcore.io.cloud import Request

RNG = np.random.default_rng(0)
NUM = 40
XYZ = RNG.normal(0, 20, (NUM, 3)).round(2) + [515_000, 4_918_000, 0]
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
    "dark.npy": npy(np.column_stack([XYZ, np.where(EIGHT == EIGHT.max(), 32, EIGHT % 32)])),
    "fortran.npy": npy(np.asfortranarray(np.column_stack([BAD, EIGHT]))),
    "wide.npy": npy(np.column_stack([XYZ, EIGHT, EIGHT, EIGHT])),
    "points.npz": npz(points=BAD, colors=SIXTEEN, labels=TRUTH, field=FIELD),
    "transposed.npz": npz(points=np.ascontiguousarray(XYZ.astype(">f4").T).T, rgb=np.asfortranarray(EIGHT), y=SPARSE),
    "axes.npz": npz(x=BAD[:, 0], y=BAD[:, 1], z=BAD[:, 2], red=SIXTEEN[:, 0], green=SIXTEEN[:, 1], blue=SIXTEEN[:, 2],
                    classes=TRUTH[:, None], field=FIELD),
    "table.npz": npz(anything=np.column_stack([XYZ, EIGHT]), field=FIELD),
    "structured.npz": npz(xyz=records_of(**colored(FRACTION), label=TRUTH), field=FIELD),
    "hidden.npz": npz(points=XYZ, z=FIELD, labels=np.zeros((NUM, 2)), features=np.zeros((NUM, 64)), field=FIELD),
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
    with pytest.warns() as caught:
        cloud = read(path, fields=fields, label=label, exact=True, ignore=ignore, columns=columns)
        scans.warnings = None
        import warnings

        warnings.warn("another", stacklevel=1)
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
        values = formats_values(name, np.concatenate([piece.fields[name] for piece in pieces]))
        np.testing.assert_array_equal(values[kept], cloud.fields[name], strict=True)
    assert scan.has_colors == (cloud.colors is not None)
    if not ignore:
        inside = cloud.exact
        assert (scan.low, scan.high) == (tuple(inside.min(axis=0)), tuple(inside.max(axis=0)))
    told = [str(one.message).removeprefix(f"{path}: ") for one in caught][:-1]
    if cloud.left_out:
        told.append(io.faults(cloud)[0])
    assert scan.warning == ("; ".join(told) or None)


def formats_values(name, values):
    from kpcore.io.cloud import field_values

    return field_values(name, values)


def test_pieces_are_what_read_reads(path):
    check_same(path, fields=tuple(name for name in io.field_names(path) if name == "field"))

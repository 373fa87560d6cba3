"""Scans piece by piece: what `read` reads, in blocks; labels written in blocks; files that change or are damaged."""

import os
import pickle
import threading

import copc_files
import numpy as np
import pytest
from files import COLORS, LABELS, POINTS, las, laz, patched, ply

from kpcore.io import ReadError, formats, read, scans, write_labels
from kpcore.io.cloud import Request

RNG = np.random.default_rng(0)
BOX = 179  # place of the box in a header


def joined(scan, request, wide=True, **more):
    """The arrays of all pieces."""
    needed = scans.needed(scan, request)
    pieces = [scans.decoded(scan, block, request, wide, **more) for _, block in scans.records(scan, needed)]
    arrays = {name: [getattr(piece, name) for piece in pieces] for name in ("points", "colors", "labels")}
    for kind in ("fields", "flags"):
        arrays |= {name: [getattr(piece, kind)[name] for piece in pieces] for name in getattr(pieces[0], kind)}
    return {name: None if values[0] is None else np.concatenate(values) for name, values in arrays.items()}


@pytest.mark.parametrize("name", ["autzen_trim.laz", "lion_takanawa.copc.laz", "ign_50x100m.las"])
def test_pieces_of_real_files_are_what_read_reads(shared, name, monkeypatch):
    laspy = pytest.importorskip("laspy")
    pytest.importorskip("lazrs")
    monkeypatch.setattr("kpcore.io.las.BLOCK", 50_000)
    path = shared / "data" / name
    scan = scans.opened(path)
    assert pickle.loads(pickle.dumps(scan)) == scan == scans.opened(str(path)) and scan.path == str(path.absolute())
    with laspy.open(path) as file:
        header = file.header
        assert (scan.num_points, scan.point_format) == (header.point_count, header.point_format.id)
        assert (scan.low, scan.high) == (tuple(header.mins), tuple(header.maxs))
        assert scan.is_copc == name.endswith(".copc.laz")
    request = Request(fields=("gps_time", "return_number", "Z"), ignore=("overlap", "withheld", 7))
    actual, expected = joined(scan, request), read(path, fields=request.fields, label="classification", exact=True)
    np.testing.assert_array_equal(actual["points"], expected.exact)
    np.testing.assert_array_equal(actual["labels"], expected.labels)
    for field in request.fields:
        np.testing.assert_array_equal(actual[field], expected.fields[field.lower()])
    points = laspy.read(path)
    is_overlap = points.overlap if "overlap" in points.point_format.dimension_names else points.classification == 12
    np.testing.assert_array_equal(actual["overlap"] != 0, is_overlap)
    np.testing.assert_array_equal(actual["withheld"] != 0, points.withheld)
    if scan.has_colors:
        rgb = np.column_stack([points.red, points.green, points.blue])
        blocks = [scans.widest_color(scan, block) for _, block in scans.records(scan)]
        assert max(blocks) == rgb.max() and len(blocks) == -(-len(rgb) // 50_000)
        np.testing.assert_array_equal(actual["colors"], rgb // 256)
    assert expected.reference == scan.reference


@pytest.mark.parametrize("form", [las, laz, lambda points: laz(points, 7)])
def test_nothing_is_decided_by_the_values_of_a_piece(write, form, monkeypatch):
    """8 or 16 bits of a colour, and whether zeros are labels; both are in the first piece of a file."""
    monkeypatch.setattr("kpcore.io.las.BLOCK", 2)
    path = write("a.las" if form is las else "a.laz", form(POINTS))
    scan = scans.opened(path)
    actual = joined(scan, Request())
    assert np.array_equal(actual["colors"], COLORS) and np.array_equal(actual["labels"], LABELS)
    assert np.array_equal(actual["points"], POINTS)
    assert joined(scan, Request(), None)["colors"] is None
    write_labels(path, path.with_name("b.las"), np.zeros(4, int))
    zeros = joined(scans.opened(path.with_name("b.las")), Request())["labels"]
    assert zeros.dtype == np.int32 and zeros.tolist() == [0] * 4 and read(path.with_name("b.las")).labels is None
    with pytest.raises(ReadError, match=r"a\.la[sz]: wide_colors: expected True for a colour of 65280, got False"):
        joined(scan, Request(), False)


def test_colours_of_8_bits(write):
    records = copc_files.records(POINTS, colors=COLORS)
    scan = scans.opened(write("a.las", copc_files.las(records)))
    assert scans.widest_color(scan, records) == COLORS.max()
    assert np.array_equal(joined(scan, Request(), False)["colors"], COLORS)
    assert not joined(scan, Request(), True)["colors"].any()
    plain = scans.opened(write("b.las", copc_files.las(copc_files.records(POINTS, 6), 6)))
    assert scans.widest_color(plain, copc_files.records(POINTS, 6)) == 0 and not plain.has_colors
    assert joined(plain, Request())["colors"] is None


def test_labels_in_a_field(write, tmp_path, monkeypatch):
    """Those without a label are -1 in a piece of nothing else, too."""
    monkeypatch.setattr("kpcore.io.las.BLOCK", 2)
    missing = 2**32 - 1
    write_labels(write("a.las", las(POINTS)), tmp_path / "b.las", LABELS,
                 extra={"truth": np.uint32([missing, missing, 3, 0]), "share": np.float32([0, 1, 2, 0.5])})  # fmt: skip
    scan = scans.opened(tmp_path / "b.las")
    assert joined(scan, Request(label="Truth"))["labels"].tolist() == [-1, -1, 3, 0]
    with pytest.raises(ReadError, match=r"b\.las: field share holds 0\.5, which is not a label: expected 32-bit whole"):
        joined(scan, Request(label="share"))
    for bad in (Request(fields=("height",)), Request(label="class")):
        with pytest.raises(ReadError, match=r"b\.las: has no field (height|class); there are x y z"):
            scans.needed(scan, bad)


def test_tiles_with_other_offsets_have_the_same_coordinates(write):
    """Bit for bit, also where one stores hundredths and one thousandths of a metre."""
    points = (RNG.integers(0, 2**30, (500, 3)) / 100).round(2) * [1, 1, 0.001] + [515_000, 4_918_000, 0]
    points = points.round(2)
    exact = []
    for scale, offset in ((0.01, (0, 0, 0)), (0.01, (515_123.45, 4_918_340.5, -7.25)), (0.02 / 2, (1e7, 5e6, 100))):
        data = copc_files.las(copc_files.records(points, scale=scale, offset=offset), scale=scale, offset=offset)
        scan = scans.opened(write("a.las", data))
        exact.append(joined(scan, Request())["points"])
        assert np.array_equal(read(scan.path, exact=True).exact, exact[-1])
    for one in exact:
        np.testing.assert_array_equal(one, points)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks(write, threads, set_threads, monkeypatch):
    set_threads(threads)
    pytest.importorskip("lazrs")
    before = threading.active_count()
    monkeypatch.setattr("kpcore.io.las.BLOCK", 70)
    made = copc_files.records(RNG.uniform(0, 50, (200, 3)))
    for path in (write("a.las", copc_files.las(made)), write("b.copc.laz", copc_files.copc(made))):
        blocks = [*scans.records(scans.opened(path))]
        assert [first for first, _ in blocks] == [0, 70, 140]
        whole = np.concatenate([block for _, block in blocks])
        assert sorted(map(bytes, whole)) == sorted(map(bytes, made))
        some = np.concatenate([block for _, block in scans.records(scans.opened(path), {"x", "classification"})])
        assert np.array_equal(some[:, :8], whole[:, :8]) and np.array_equal(some[:, 16], whole[:, 16])
        stopped = scans.records(scans.opened(path))
        next(stopped)
        stopped.close()  # closes the file, and ends its thread
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("box", "is_known"),
    [
        ([50, 0, 50, 0, 50, 0], True), ([0] * 6, False), ([0, 50, 50, 0, 50, 0], False),
        ([np.inf, -np.inf] * 3, False), ([np.nan] * 6, False), ([1e300, 0, 50, 0, 50, 0], False),
        ([-1e8, -2e8, 50, 0, 50, 0], False),
    ],
)  # fmt: skip
def test_a_box_that_cannot_be_right_is_none(write, box, is_known):
    """Zeros and infinities that writers leave there; the points tell it then."""
    points = RNG.uniform(1, 49, (30, 3)).round(2)
    path = write("a.las", patched(copc_files.las(copc_files.records(points)), BOX, "<6d", *box))
    scan = scans.opened(path)
    assert (scan.low is None) == (scan.high is None) == (not is_known)
    if is_known:
        assert (scan.low, scan.high) == ((0, 0, 0), (50, 50, 50))
    actual = scans.measured(scan)
    assert (actual.low, actual.high) == (tuple(points.min(axis=0)), tuple(points.max(axis=0)))
    assert pickle.loads(pickle.dumps(scan)) == scan


def test_a_file_that_changes(write, monkeypatch):
    monkeypatch.setattr("kpcore.io.las.BLOCK", 50)
    data = copc_files.las(copc_files.records(RNG.uniform(0, 50, (200, 3))))
    path = write("a.las", data)
    scan = scans.opened(path)
    assert len([*scans.records(scan)]) == 4
    os.utime(path, ns=(1, 1))
    for function in (scans.records, lambda scan: [scans.measured(scan)]):
        with pytest.raises(ReadError, match=r"a\.las: has changed since its header was read"):
            next(iter(function(scan)))
    assert scan != scans.opened(path)
    for change in (data, data[:-4000]):  # a file that is being written is short for a moment
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        blocks = scans.records(scans.opened(path))
        next(blocks)
        path.write_bytes(change)
        with pytest.raises(ReadError, match=r"a\.las: (has changed|truncated)"):
            next(blocks)
    path.unlink()
    with pytest.raises(ReadError, match=r"a\.las: No such file"):
        [*scans.records(scan)]


def test_a_laz_that_is_damaged_in_its_middle(write, monkeypatch):
    """The blocks before the damage come."""
    monkeypatch.setattr("kpcore.io.las.BLOCK", 50)
    data = copc_files.copc(copc_files.records(RNG.uniform(0, 50, (200, 3))))
    at = len(data) // 2
    scan = scans.opened(write("a.laz", data))
    broken = False
    for place in range(at, at + 3000, 500):
        path = write("b.laz", patched(data, place, "<20s", b"\xff" * 20))
        try:
            whole = [block for _, block in scans.records(scans.opened(path))]
            assert sum(map(len, whole)) == scan.num_points
        except ReadError as error:
            broken = True
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert broken


def test_what_is_no_las(write, tmp_path):
    for name, data, reason in (
        ("a.las", b"PK\x03\x04" * 200, "is a NPZ file"),
        ("b.las", b"", "is empty"),
        ("c.ply", ply(POINTS)[:40], "damaged: expected end_header"),
        ("c.pcd", b"VERSION", r"a PCD is not labelled in parts: write it as a LAZ or a PLY first$"),
        ("d.las", las(POINTS)[:300], "truncated: 4 points of 26 bytes from byte 227 exceed 300 bytes"),
    ):
        path = write(name, data)
        with pytest.raises(ReadError, match=f"{name}: {reason}"):
            scans.opened(path)
    with pytest.raises(ReadError, match=r"e\.las: No such file"):
        scans.opened(tmp_path / "e.las")
    with pytest.raises(ReadError, match="is a directory"):
        scans.opened(tmp_path)


# ---- labels block by block


def test_labels_are_written_block_by_block(write, tmp_path, monkeypatch):
    """What pieces get is the records as they are in the file; the result is that of whole arrays, byte for byte."""
    monkeypatch.setattr("kpcore.io.las.BLOCK", 64)
    source = write("a.las", copc_files.las(copc_files.records(RNG.uniform(0, 50, (200, 3)))))
    labels, kept = RNG.integers(0, 200, 150), np.zeros(200, bool)
    kept[RNG.permutation(200)[:150]] = True
    confidence, seen = RNG.integers(0, 101, 150, np.uint8), []
    whole = np.zeros(200, int)
    whole[kept] = labels
    percent = np.zeros(200, np.uint8)
    percent[kept] = confidence

    def pieces(first_row, records):
        rows = slice(first_row, first_row + len(records))
        seen.append((first_row, records.copy()))
        with pytest.raises(ValueError, match="read-only"):
            records[:] = 0
        return kept[rows], whole[rows][kept[rows]], {"confidence": percent[rows][kept[rows]]}

    for out in (tmp_path / "b.las", tmp_path / "b.laz"):
        seen.clear()
        field = formats.label_field(source, out, 200, extra={"confidence": np.uint8}, values=labels)
        formats.write_pieces(field, source, out, pieces)
        assert [first for first, _ in seen] == [0, 64, 128, 192]
        blocks = [block for _, block in scans.records(scans.opened(source))]
        assert np.array_equal(np.concatenate([records for _, records in seen]), np.concatenate(blocks))
        other = out.with_stem("c")
        write_labels(source, other, labels, kept=kept, extra={"confidence": confidence})
        assert other.read_bytes() == out.read_bytes()
        cloud = read(out, fields=["confidence"], label="classification")
        assert np.array_equal(cloud.fields["confidence"], percent) and np.array_equal(cloud.labels[kept], labels)
        assert np.array_equal(cloud.labels[~kept], read(source, label="classification").labels[~kept])


def test_pieces_that_fail_leave_no_file(write, tmp_path):
    source, out = write("a.las", las(POINTS)), tmp_path / "b.las"
    field = formats.label_field(source, out, 4, extra={"share": np.float32})
    good = np.ones(4, bool), LABELS, {"share": np.float32([1, 2, 3, 4])}

    class Stop(BaseException):
        pass

    def stops(first_row, records):
        raise Stop("in the middle")

    with pytest.raises(Stop, match=r"^in the middle$"):
        formats.write_pieces(field, source, out, stops)
    for at, wrong, reason in (
        (0, np.ones(3, bool), r"expected \(4,\) bool for the points of a block, got \(3,\) bool"),
        (0, np.ones(4, int), r"expected \(4,\) bool for the points of a block, got \(4,\) int64"),
        (1, LABELS[:3], r"expected \(4,\) integers as labels, got \(3,\) int32"),
        (1, LABELS + 0.5, r"expected \(4,\) integers as labels, got \(4,\) float64"),
        (1, LABELS - 1, "expected labels from 0 to 31 in classification, got -1 to 6"),
        (2, {}, r"expected the further fields \['share'\], got \[\]"),
        (2, {"share": np.ones(4)}, r"expected \(4,\) float32 as share, got \(4,\) float64"),
        (2, {"share": np.ones(3, np.float32)}, r"expected \(4,\) float32 as share, got \(3,\) float32"),
    ):
        piece = [*good[:at], wrong, *good[at + 1 :]]
        with pytest.raises(ValueError, match=f"^pieces: {reason}"):
            formats.write_pieces(field, source, out, lambda first_row, records, piece=piece: piece)
    os.utime(source, ns=(1, 1))
    with pytest.raises(ReadError, match=r"a\.las: has changed since its header was read"):
        formats.write_pieces(field, source, out, stops)
    field = formats.label_field(source, out, 4, extra={"share": np.float32})

    def changes(first_row, records):
        os.utime(source, ns=(2, 2))
        return good

    with pytest.raises(ReadError, match=r"a\.las: has changed since its header was read"):
        formats.write_pieces(field, source, out, changes)
    field = formats.label_field(source, tmp_path / "b.ply", 4)
    with pytest.raises(ReadError, match=r"a\.las: a LAS is not labelled in parts as a PLY: write a LAS$"):
        formats.write_pieces(field, source, tmp_path / "b.ply", lambda first_row, records: good)
    assert os.listdir(tmp_path) == ["a.las"]

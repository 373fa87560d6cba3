"""LAS and LAZ: read as laspy reads them, and written again with labels, compared field by field and byte by byte."""

import io
import itertools
import os
import struct
import tracemalloc
from decimal import Decimal

import copc_files
import numpy as np
import pytest
from files import LABELS, POINTS, las, laz, patched, refusal

from kpcore.io import ReadError, formats, read, write_labels
from kpcore.io import las as las_reader

SIZES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)  # of points, by their format
START, COUNT, FORM, WAVES, EXTENDED = 96, 100, 104, 227, 235  # places in a header


def record(user, number, data, extended=False):
    """A variable-length record; its reserved bytes are not zero, as in LAS 1.0."""
    return struct.pack("<H16sHQ32s" if extended else "<H16sHH32s", 0xAABB, user, number, len(data), b"of a test") + data


def described(name, kind, options=0, scale=1.0, offset=0.0):
    """The description of an extra dimension, its minimum 7 and its maximum 5."""
    layout = "<2xBB32s4x24xQ16xQ16xd16xd16x32s"
    return struct.pack(layout, kind, options, name, 7, 5, scale, offset, b"\xe9 in latin-1")


def ascii_only(data):
    """The same file where laspy, which decodes these, can."""
    data = data.replace(b"\xe9 in", b"e in")
    return data.replace(b"caf\xe9", b"cafe").replace(b"\xff" * 32, bytes(32)).replace(b"confid\xe9", b"confide")


def made(form, minor=4, extra=b"", described_in=(), records=(), padding=b"", behind=b"", extended=(), num=100, seed=0):
    """A LAS file of random points, each with extra bytes as long as `extra`; waveforms are at the start of `behind`."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 256, (num, SIZES[form] + len(extra)), dtype=np.uint8)
    points[:, 3:12:4] = 0  # coordinates within 24 bits
    points[:, 15] &= 0xCF if form >= 6 else 0xFF  # one channel: see test_wave_packets_that_lazrs_loses
    if form != 0 and form != 2:
        at = 20 if form < 6 else 22
        points[:, at : at + 8] = rng.random(num).astype("<f8").view(np.uint8).reshape(num, 8)
    for at in {4: [41, 45, 49, 53], 5: [47, 51, 55, 59], 9: [43, 47, 51, 55], 10: [51, 55, 59, 63]}.get(form, ()):
        points[:, at : at + 4] = rng.random(num).astype("<f4").view(np.uint8).reshape(num, 4)
    if form in (4, 5, 9, 10):
        at = {4: 35, 5: 41, 9: 37, 10: 45}[form]
        points[:, at : at + 2] = 0  # positions of waveforms, within 48 bits
    points[:, SIZES[form] :] = np.frombuffer(extra, np.uint8) + np.arange(num, dtype=np.uint8)[:, None] % 7
    size = {3: 235}.get(minor, 227 if minor < 3 else 375)
    before = b"".join(record(*one) for one in (*records, *((b"LASF_Spec", 4, data) for data in described_in)))
    start = size + len(before) + len(padding)
    guid, system, software = bytes(range(16)), b"caf\xe9", b"\xff" * 32
    head = struct.pack("<4sHH16sBB32s32sHH", b"LASF", 0, 1, guid, 1, minor, system, software, 200, 2020)
    count, old = len(records) + len(described_in), num if form < 6 else 0
    head += struct.pack("<HIIBHI20x", size, start, count, form, points.shape[1], old)
    head += struct.pack("<12d", 0.01, 0.01, 0.01, 1000.0, 2000.0, 3000.0, *[0.0] * 6)
    end = start + points.size
    if minor >= 3:
        head += struct.pack("<Q", end if behind else 0)
    if minor >= 4:
        head += struct.pack("<QIQ120x", end + len(behind) if extended else 0, len(extended), num)
    tail = behind + b"".join(record(*one, extended=True) for one in extended)
    return head + before + padding + points.tobytes() + tail


HEIGHT = described(b"height", 5, 24, 0.5, 9)
CASES = {
    **{f"format {form}": made(form, 4 if form >= 6 else 2) for form in range(11) if form not in (4, 5, 9, 10)},
    "version 1.0": made(1, 0, padding=b"\xdd\xcc"),
    "version 1.1": made(0, 1, records=[(b"LASF_Projection", 34735, struct.pack("<4H", 1, 1, 0, 0))]),
    "waveforms of 1.3": made(4, 3, behind=b"RIFF" + bytes(range(100))),
    "waveforms of 1.4": made(9, 4, behind=b"RIFF" + bytes(99), extended=[(b"me", 9, b"odd")]),
    "waveforms and colours": made(10, 4, behind=b"RIFF" + bytes(range(200))),
    "waveforms and colours of 1.3": made(5, 3, behind=b"RIFF"),
    "extended records": made(6, extended=[(b"me", 1, b"x" * 70_000), (b"you", 2, b"")], behind=b""),
    "what nothing points to": made(7, padding=b"between", extended=[(b"me", 1, b"1")]) + b"after all",
    "extra bytes": made(
        3,
        2,
        bytes(11),
        [described(b"confid\xe9nce", 1, 7) + described(b"height", 5, 24, 0.5, 9), described(b"more", 4)],
    ),
    "bytes that nothing describes": made(6, 4, b"12345", records=[(b"odd", 3, b"4")]),
}


def parts(data):
    """(header, records, padding, points, what is behind them) of a LAS file, or of a LAZ with its points unpacked."""
    lazrs = pytest.importorskip("lazrs")
    size, start, count, form, length, num = struct.unpack_from("<HIIBHI", data, 94)
    if data[25] >= 4:
        num = struct.unpack_from("<Q", data, 247)[0] or num
    records, at, laszip = [], size, None
    for _ in range(count):
        end = at + 54 + struct.unpack_from("<H", data, at + 20)[0]
        records.append(data[at:end])
        if data[at + 2 : at + 16] == b"laszip encoded":
            laszip = data[at + 54 : end]
        at = end
    padding = data[at:start]
    if not form & 0x80:
        end = start + num * length
        return data[:size], records, padding, np.frombuffer(data[start:end], np.uint8).reshape(num, length), data[end:]
    points = np.zeros((num, length), np.uint8)
    file = io.BytesIO(data)
    file.seek(start)
    lazrs.LasZipDecompressor(file, laszip).decompress_many(points.reshape(-1))
    if laszip[0] == 1:
        return data[:size], records, padding, points, b""
    table = struct.unpack_from("<q", data, start)[0]
    file.seek(start)
    again = io.BytesIO()
    lazrs.write_chunk_table(again, lazrs.read_chunk_table(file, lazrs.LazVlr(laszip)), lazrs.LazVlr(laszip))
    return data[:size], records, padding, points, data[table + len(again.getvalue()) :]


def copc(record):
    return record[2:7] == b"copc\0"


def assert_passed_through(before, after, labels):
    """All bytes are the same but for labels, and for what says where things are."""
    head, records, padding, points, behind = parts(before)
    head2, records2, padding2, points2, behind2 = parts(after)
    same, zipped = before[FORM] & 0x80 == after[FORM] & 0x80, b"laszip encoded"
    others = [[one for one in some if one[2:16] != zipped and not copc(one)] for some in (records, records2)]
    assert others[0] == others[1] and padding == padding2
    is_copc = any(map(copc, records))
    if not is_copc:
        assert behind == behind2
    changed = {*range(START, START + 9)} if not same or is_copc else set()
    changed |= {*range(WAVES, WAVES + 8), *range(EXTENDED, EXTENDED + 12)} if len(before) != len(after) else set()
    assert [i for i, (a, b) in enumerate(zip(head, head2, strict=True)) if a != b and i not in changed] == []
    assert before[FORM] & 0x3F == after[FORM] & 0x3F
    moved = len(before) - len(behind) - (len(after) - len(behind2))
    for place in (WAVES, EXTENDED):
        if len(head) > place and (byte := struct.unpack_from("<Q", head, place)[0]) and not is_copc:
            assert struct.unpack_from("<Q", head2, place)[0] == byte - moved
    expected = points.copy()
    if before[FORM] & 0x3F < 6:
        expected[:, 15] = expected[:, 15] & 0xE0 | labels
    else:
        expected[:, 16] = labels
    np.testing.assert_array_equal(points2, expected)


@pytest.mark.parametrize("out", ["las", "laz"])
@pytest.mark.parametrize("name", CASES)
def test_all_but_the_labels_stays_as_it_was(tmp_path, name, out):
    """From LAS, and from the LAZ of it, to both."""
    pytest.importorskip("lazrs")
    (tmp_path / "a.las").write_bytes(CASES[name])
    write_labels(tmp_path / "a.las", tmp_path / "b.laz", np.arange(100) % 32)
    for source, begin in (("a.las", 0), ("b.laz", 7)):
        labels = (np.arange(100) + begin) % 32
        write_labels(tmp_path / source, tmp_path / f"c.{out}", labels)
        before, after = (tmp_path / source).read_bytes(), (tmp_path / f"c.{out}").read_bytes()
        assert_passed_through(before, after, labels)
        if source == "a.las" and out == "las":
            assert len(before) == len(after)
        assert_passed_through(CASES[name], after, labels)
        np.testing.assert_array_equal(read(tmp_path / f"c.{out}", label="classification").labels, labels)


def dimensions_of(path):
    """Every dimension of a file, by name, as laspy reads it."""
    laspy = pytest.importorskip("laspy")
    data = path.read_bytes()
    points = laspy.read(io.BytesIO(ascii_only(patched(data, 25, "<B", max(data[25], 1)))))
    return {name: np.asarray(points[name]) for name in points.point_format.dimension_names}


@pytest.mark.parametrize("name", [*CASES, "copc 6", "copc 7", "copc 8"])
def test_labels_written_in_blocks_change_no_other_dimension(tmp_path, name, monkeypatch):
    """Of every point format, from LAS, LAZ and COPC, to LAS and LAZ, as laspy reads them, and byte by byte."""
    pytest.importorskip("lazrs")
    monkeypatch.setattr("kpcore.io.las.BLOCK", 33)
    if name in CASES:
        (tmp_path / "a.las").write_bytes(CASES[name])
        write_labels(tmp_path / "a.las", tmp_path / "b.laz", np.arange(100) % 32)
        sources = [tmp_path / "a.las", tmp_path / "b.laz"]
    else:
        form = int(name[5:])
        made = copc_files.records(np.random.default_rng(form).uniform(0, 50, (100, 3)), form)
        sources = [tmp_path / "a.copc.laz"]
        sources[0].write_bytes(copc_files.copc(made, form))
    labels = (np.arange(100) * 7 + 3) % 32
    for source, out in itertools.product(sources, [tmp_path / "c.las", tmp_path / "c.laz"]):
        field = formats.label_field(source, out, 100, values=labels)
        assert field.write_pieces is not None

        def pieces(first_row, records):
            rows = np.arange(first_row, first_row + len(records))
            return rows % 3 != 0, labels[rows[rows % 3 != 0]], {}

        formats.write_pieces(field, source, out, pieces)
        before, after = dimensions_of(source), dimensions_of(out)
        assert [*before] == [*after] and len(before) >= 15
        is_new = np.arange(100) % 3 != 0
        for one, values in before.items():
            expected = np.where(is_new, labels, values) if one == "classification" else values
            np.testing.assert_array_equal(after[one], expected, one)
        assert_passed_through(source.read_bytes(), out.read_bytes(), np.where(is_new, labels, before["classification"]))


@pytest.mark.parametrize("out", ["las", "laz"])
def test_real_files_pass_through(shared, tmp_path, out):
    pytest.importorskip("lazrs")
    sources = sorted(path for path in shared.rglob("*") if path.suffix in (".las", ".laz"))
    assert len(sources) >= 12
    for source in sources:
        num = len(read(source).points)
        labels = np.random.default_rng(0).integers(0, 32, num)
        write_labels(source, tmp_path / f"a.{out}", labels)
        assert_passed_through(source.read_bytes(), (tmp_path / f"a.{out}").read_bytes(), labels)


def test_real_files_are_read_as_laspy_reads_them(shared):
    laspy = pytest.importorskip("laspy")
    for source in (*shared.rglob("*.las"), *shared.rglob("*.laz")):
        expected = laspy.read(source)
        names = [name for name in expected.point_format.dimension_names if name not in "XYZ"]
        cloud = read(source, fields=[*names, "x", "Y"], label="classification", exact=True)
        for name in names:
            np.testing.assert_array_equal(cloud.fields[name.lower()], np.asarray(expected[name], np.float64), name)
        rounding = 2 * np.spacing(np.abs(expected.xyz).max(axis=0))  # laspy's X * scale + offset is rounded twice
        assert (np.abs(cloud.exact - expected.xyz) <= rounding).all()
        assert np.array_equal(cloud.fields["x"], cloud.exact[:, 0])
        assert np.array_equal(cloud.fields["y"], cloud.exact[:, 1])
        assert np.abs(cloud.points + cloud.shift - cloud.exact).max() == cloud.rounding < 1e-4


@pytest.mark.parametrize(
    ("scale", "offset", "is_whole"),
    [
        ("0.001", "4918340.123", True), ("0.01", "0", True), ("0.00025", "515368.25", True), ("1", "-7", True),
        ("-0.01", "87.5", True), ("0.125", "0.5", True), ("1e-9", "0.5", True), ("0.05", "1000", True),
        ("0.001", "0.0005", False), ("0.01", "4918340.123456", False), ("0.003", "0", False), ("2", "1", False),
        ("1e-9", "9.1e6", False), ("0.0101", "0", False), ("0.001", "1e30", False), ("1e-300", "0", False),
    ],
)  # fmt: skip
def test_coordinates_are_nearest_to_decimal_numbers(write, scale, offset, is_whole):
    """In whatever steps from whatever offset a file stores them; else, stored * scale + offset."""
    data = patched(made(6, num=50), 131, "<6d", *[float(scale)] * 3, *[float(offset)] * 3)
    stored = np.random.default_rng(1).integers(-(2**31), 2**31, (50, 3), dtype=np.int32)
    stored[:2] = [[-(2**31)] * 3, [2**31 - 1] * 3]
    points = parts(data)[3].copy()
    points[:, :12] = stored.astype("<i4").view(np.uint8)
    fields = read(write("a.las", data[:375] + points.tobytes()), fields=["x", "y", "z"]).fields
    exact = [[float(Decimal(int(x)) * Decimal(scale) + Decimal(offset)) for x in row] for row in stored]
    expected = np.array(exact) if is_whole else stored * float(scale) + float(offset)
    np.testing.assert_array_equal(np.column_stack([*fields.values()]), expected)
    assert las_reader._standard_dimensions(6, [float(scale)] * 3, [float(offset)] * 3)[0].whole is None or is_whole


@pytest.mark.parametrize("name", CASES)
def test_all_formats_are_read_as_laspy_reads_them(write, name):
    """But for LAS 1.0 and what it cannot decode, in whose place it is given ASCII, and for a second description."""
    laspy = pytest.importorskip("laspy")
    path = write("a.las", CASES[name])
    expected = laspy.read(io.BytesIO(ascii_only(patched(CASES[name], 25, "<B", max(CASES[name][25], 1)))))
    names = [name for name in expected.point_format.dimension_names if name not in "XYZ" and name != "ExtraBytes"]
    cloud = read(path, fields=[name.replace("confide", "confidé") for name in names], label="classification")
    for name in names:
        np.testing.assert_array_equal(
            cloud.fields[name.replace("confide", "confidé")], np.asarray(expected[name], np.float64), name
        )
    np.testing.assert_allclose(cloud.points + cloud.shift, expected.xyz, atol=0.01)


def test_a_second_record_of_extra_bytes(write):
    """laspy 2.7 reads the first."""
    path = write("a.las", CASES["extra bytes"])
    cloud = read(path, fields=["confidénce", "height", "more"])
    points = parts(CASES["extra bytes"])[3][:, 34:]
    np.testing.assert_array_equal(cloud.fields["confidénce"], points[:, 0])
    np.testing.assert_array_equal(cloud.fields["height"], points[:, 1:5].copy().view("<u4")[:, 0] * 0.5 + 9)
    np.testing.assert_array_equal(cloud.fields["more"], points[:, 5:7].copy().view("<i2")[:, 0])
    assert cloud.fields["more"].dtype == np.float32 and cloud.fields["height"].dtype == np.float64


def test_more_extra_bytes_are_described_than_there_are(write, tmp_path):
    """By scanners' software, in records without any (pylas issue 12). A new field would be taken for these."""
    extra = described(b"Amplitude", 3) + described(b"Reflectance", 4)
    path = write("a.las", made(3, 2, b"", [extra]))
    write_labels(path, tmp_path / "b.las", np.arange(100) % 32)
    np.testing.assert_array_equal(read(tmp_path / "b.las").labels, np.arange(100) % 32)
    with pytest.raises(ReadError, match="has no field Amplitude; there are x y z"):
        read(path, fields=["Amplitude"])
    with pytest.raises(ReadError, match=r"a\.las: into: cannot add a field truth, as its extra bytes are described"):
        write_labels(path, tmp_path / "c.las", np.arange(100), into="truth")


def test_extra_bytes_described_behind_the_points(write, tmp_path):
    data = made(6, 4, b"12", extended=[(b"LASF_Spec", 4, described(b"pair", 3))])
    path = write("a.las", data)
    expected = parts(data)[3][:, 30:].copy().view("<u2")[:, 0]
    np.testing.assert_array_equal(read(path, fields=["pair"]).fields["pair"], expected)
    write_labels(path, tmp_path / "b.las", np.arange(100), into="pair")
    np.testing.assert_array_equal(read(tmp_path / "b.las", fields=["pair"]).fields["pair"], np.arange(100))
    with pytest.raises(
        ReadError, match=r"a\.las: into: cannot add a field class, as its extra bytes are described after"
    ):
        write_labels(path, tmp_path / "c.las", np.arange(100), into="class")


@pytest.mark.parametrize(("before", "after"), [*itertools.product(["las", "laz"], repeat=2)])
@pytest.mark.parametrize("name", ["format 0", "format 7", "extra bytes", "bytes that nothing describes", "version 1.0",
                                  "extended records", "waveforms of 1.3"])  # fmt: skip
def test_labels_in_a_new_dimension(tmp_path, name, before, after):
    """Records get longer, the description is added to the last there is; all else is as it was."""
    laspy = pytest.importorskip("laspy")
    (tmp_path / "a.las").write_bytes(CASES[name])
    if before == "laz":
        write_labels(tmp_path / "a.las", tmp_path / "a.laz", np.zeros(100, int), into="classification")
    labels = np.arange(100) * 1_000_003 - 5
    write_labels(tmp_path / f"a.{before}", tmp_path / f"b.{after}", labels, into="truth é")
    data = (tmp_path / f"a.{before}").read_bytes(), (tmp_path / f"b.{after}").read_bytes()
    (_, records, padding, points, behind), (_, records2, padding2, points2, behind2) = map(parts, data)
    np.testing.assert_array_equal(points2[:, :-4], points)
    np.testing.assert_array_equal(points2[:, -4:].copy().view("<i4")[:, 0], labels)
    assert (padding, behind) == (padding2, behind2)
    is_other = [one for one in records if one[2:16] not in (b"laszip encoded", b"LASF_Spec\0\0\0\0\0")]
    assert is_other == [one for one in records2 if one[2:16] not in (b"laszip encoded", b"LASF_Spec\0\0\0\0\0")]
    spec = [[one for one in some if one[2:11] == b"LASF_Spec"] for some in (records, records2)]
    assert b"".join(one[54:] for one in spec[1]).startswith(b"".join(one[54:] for one in spec[0]))
    again = read(tmp_path / f"b.{after}", label="truth é")
    np.testing.assert_array_equal(again.labels, labels)
    if data[1][25] and name != "extra bytes":  # neither LAS 1.0 nor a second record is for laspy
        np.testing.assert_array_equal(np.asarray(laspy.read(io.BytesIO(ascii_only(data[1])))["truth é"]), labels)
    write_labels(tmp_path / f"b.{after}", tmp_path / f"c.{before}", labels[::-1], into="TRUTH É")
    np.testing.assert_array_equal(read(tmp_path / f"c.{before}", label="truth é").labels, labels[::-1])


def test_which_field_labels_go_into(write, tmp_path):
    """label: if it is there; into: a new one if it is not."""
    path, labels = write("a.las", las(POINTS)), np.arange(4)
    for names, field in (
        ({}, "classification"),
        ({"label": "truth"}, "classification"),
        ({"label": "User_Data"}, "user_data"),
        ({"into": "truth"}, "truth"),
        ({"label": "user_data", "into": "truth"}, "truth"),
    ):
        write_labels(path, tmp_path / "b.las", labels, **names)
        np.testing.assert_array_equal(read(tmp_path / "b.las", label=field).labels, labels)
        if field != "classification":
            np.testing.assert_array_equal(read(tmp_path / "b.las").labels, LABELS)


def test_points_that_are_not_kept_keep_their_label(write, tmp_path):
    for form, name in ((las, "las"), (laz, "laz")):
        path = write(f"a.{name}", form(POINTS))
        write_labels(path, tmp_path / f"b.{name}", np.array([1, 2]), kept=np.array([False, True, True, False]))
        assert read(tmp_path / f"b.{name}").labels.tolist() == [LABELS[0], 1, 2, LABELS[3]]


def test_labels_that_do_not_fit_are_refused_before_anything_is_written(write, tmp_path):
    path = write("a.las", CASES["extra bytes"])
    zeros = np.zeros(100, int)
    for labels, more, reason in (
        (
            zeros + 32,
            {},
            r"a\.las: classification holds 0 to 31, got labels 32 to 32; name another or a new field \(into=, --into\)",
        ),
        (zeros - 1, {}, "holds 0 to 31, got labels -1 to -1"),
        (zeros + 2**31, {"into": "truth"}, "truth holds -2147483648 to 2147483647"),
        (zeros, {"label": "height"}, "field height has a scale or an offset"),
        (zeros, {"into": "x"}, "field x has a scale or an offset"),
        (zeros, {"into": "n" * 33}, "into: expected a name of 1 to 32 bytes"),
        (zeros[:5], {}, "has 100 points, got labels for 5"),
    ):
        with pytest.raises(ReadError, match=reason):
            write_labels(path, tmp_path / "b.las", labels, **more)
    for labels, more, reason in (
        (zeros + 0.5, {}, r"labels: expected \(N,\) integers, got \(100,\) float64"),
        (zeros, {"kept": np.ones(99, bool)}, "kept: expected"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_labels(path, tmp_path / "b.las", labels, **more)
    assert [one.name for one in tmp_path.iterdir()] == ["a.las"]


def test_wave_packets_that_lazrs_loses(write, tmp_path):
    """If scanner channels alternate, lazrs 0.8.2 mixes up the wave packets of different channels."""
    data = made(9, behind=b"RIFF")
    points = np.frombuffer(data, np.uint8, 5900, 375).reshape(100, 59).copy()
    points[:, 15] = np.arange(100) % 4 << 4
    path = write("a.las", patched(data, 375, "<5900s", points.tobytes()))
    with pytest.raises(ReadError, match=r"a\.las: its wave packets would be lost in a LAZ file"):
        write_labels(path, tmp_path / "b.laz", np.zeros(100, int))
    write_labels(path, tmp_path / "b.las", np.zeros(100, int))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.las", "b.las"]


def test_waveforms_in_another_file_are_not_forgotten(write, tmp_path):
    path = write("a.las", patched(made(4, 3), 6, "<H", 4))
    with pytest.warns(UserWarning, match=r"b\.las: its waveforms are in a separate \.wdp file"):
        write_labels(path, tmp_path / "b.las", np.zeros(100, int))


def test_a_copc_becomes_a_plain_laz(shared, tmp_path):
    laspy = pytest.importorskip("laspy")
    source = shared / "data" / "lion_takanawa.copc.laz"
    labels = (np.arange(341_989) % 30).astype(np.int32)
    write_labels(source, tmp_path / "a.laz", labels)
    after = laspy.read(tmp_path / "a.laz")
    assert (np.asarray(after.classification) == labels).all()
    assert [record.user_id for record in after.vlrs] == ["LASF_Spec"] and not after.evlrs  # laspy hides LASzip's


def test_only_the_old_count_is_filled_in(write):
    """As some writers of 1.4 do."""
    path = write("a.las", patched(made(3, 4), 247, "<Q", 0))
    assert len(read(path).points) == 100


def test_an_extra_dimension_never_replaces_a_standard_one(write):
    extra = described(b"x", 2) + described(b"Classification", 1) + described(b"RED", 1)
    path = write("a.las", made(7, 4, b"1234", [extra]))
    cloud, expected = read(path, label="classification"), parts(path.read_bytes())[3]
    np.testing.assert_array_equal(cloud.labels, expected[:, 16])
    assert cloud.colors is not None and np.abs(cloud.points + cloud.shift - 1500).max() > 1000
    with pytest.raises(ReadError, match="has 2 fields named x"):
        read(path, fields=["x"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            lambda: patched(las(POINTS), 131, "<d", 0.0),
            "expected finite scales other than 0 and finite offsets, got (0.0, 0",
        ),
        (lambda: patched(las(POINTS), 147, "<d", np.nan), "expected finite scales"),
        (lambda: patched(las(POINTS), 155, "<d", np.inf), "expected finite scales"),
        (lambda: patched(las(POINTS), 104, "<B", 11), "point format 11 does not fit records of 26 bytes"),
        (lambda: patched(las(POINTS), 104, "<B", 5), "point format 5 does not fit records of 26 bytes"),
        (lambda: patched(las(POINTS), 24, "<B", 2), "expected LAS 1.0 to 1.5, got 2.2"),
        (lambda: patched(made(6), 94, "<H", 227), "expected a header of at least 375 bytes for LAS 1.4, got 227"),
        (lambda: patched(las(POINTS), 94, "<H", 60_000), "truncated: the points start at byte 227"),
    ],
)
def test_the_error_for_a_damaged_header(write, data, reason):
    assert reason in refusal(write("a.las", data()))


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [(EXTENDED + 8, "<I", 2**32 - 1), (EXTENDED, "<Q", 2**62), (-20 - 60 + 20, "<Q", 2**62), (WAVES, "<Q", 2**63)],
)
def test_wrong_counts_of_extended_records_are_copied(write, tmp_path, at, layout, value):
    """An extended record of 2**62 bytes, or 2**32 - 1 of them: nothing is allocated, every byte is kept."""
    data = made(6, extended=[(b"me", 1, b"x" * 20)])
    data = patched(data, at % len(data), layout, value)
    path = write("a.las", data)
    tracemalloc.start()
    write_labels(path, tmp_path / "b.las", np.zeros(100, int))
    write_labels(path, tmp_path / "b.laz", np.zeros(100, int))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    after = (tmp_path / "b.las").read_bytes()
    points = slice(375, 375 + 3000)
    assert data[: points.start] + data[points.stop :] == after[: points.start] + after[points.stop :]
    assert parts((tmp_path / "b.laz").read_bytes())[4] == parts(data)[4]


@pytest.mark.parametrize("version", [2, 7])
def test_a_wrong_chunk_table_is_refused(write, version):
    """The sizes of the chunks do not add up to the byte where the table starts."""
    pytest.importorskip("lazrs")
    data = laz(POINTS, version)
    start = struct.unpack_from("<I", data, START)[0]
    table = struct.unpack_from("<q", data, start)[0]
    moved = data[:table] + b"\0" * 5 + data[table:]
    assert "the chunk table starts at byte" in refusal(write("a.laz", patched(moved, start, "<q", table + 5)))


@pytest.mark.parametrize(("version", "compressor"), [(7, 1), (7, 2), (2, 3), (2, 0), (2, 9)])
def test_a_compressor_that_does_not_fit_the_points(write, version, compressor):
    """lazrs would take the points' bytes for lengths of layers, and allocate a gigabyte."""
    pytest.importorskip("lazrs")
    data = laz(POINTS, version)
    path = write("a.laz", patched(data, data.index(b"laszip encoded") + 52, "<H", compressor))
    assert f"damaged: LASzip compressor {compressor} does not fit items of types" in refusal(path)


def test_first_laszip_files_are_read(shared):
    """Compressed point by point, without chunks (LASzip's compressor 1)."""
    laspy = pytest.importorskip("laspy")
    path = shared / "bugs" / "06_pointwise_laz" / "pointwise.laz"
    np.testing.assert_allclose(read(path).points + read(path).shift, laspy.read(path).xyz, atol=1e-3)


def test_las_needs_no_package(tmp_path, monkeypatch):
    for package in ("laspy", "lazrs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "a.las").write_bytes(las(POINTS))
    write_labels(tmp_path / "a.las", tmp_path / "b.las", LABELS)
    np.testing.assert_array_equal(read(tmp_path / "b.las").points, POINTS)


def test_threads_change_nothing(tmp_path, set_threads):
    """Three chunks, unpacked and packed by one thread and by two."""
    pytest.importorskip("lazrs")
    (tmp_path / "a.las").write_bytes(made(7, num=120_000))
    labels, data = np.arange(120_000) % 32, {}
    for threads in (1, 2):
        set_threads(threads)
        write_labels(tmp_path / "a.las", tmp_path / "b.laz", labels)
        data[threads] = (tmp_path / "b.laz").read_bytes()
        np.testing.assert_array_equal(read(tmp_path / "b.laz").labels, labels)
    assert data[1] == data[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_reads_what_its_parent_read(python, tmp_path):
    """The threads that unpacked points in the parent do not exist in the child."""
    pytest.importorskip("lazrs")
    (tmp_path / "a.laz").write_bytes(laz(POINTS))
    code = """if True:
        import os, kpcore as kp
        kp.set_num_threads(2)
        first = kp.io.read("a.laz").points
        child = os.fork()
        if not child:
            os._exit(not (kp.io.read("a.laz").points == first).all())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = python(code, timeout=60)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


@pytest.mark.parametrize("version", [2, 7])
def test_a_chunk_that_declares_200_gigabytes_does_not_end_the_process(write, set_threads, version):
    """Each thread of lazrs would allocate a chunk, and the process would be aborted."""
    set_threads(2)
    data = laz(POINTS, version)
    at = data.index(b"laszip encoded") + 52 + 12
    assert len(read(write("a.laz", patched(data, at, "<I", 3_540_042_576))).points) == 4


@pytest.mark.parametrize("form", [6, 8])
def test_a_field_of_a_laz_is_unpacked_with_what_it_needs(tmp_path, form):
    """Only the layers that hold requested dimensions are unpacked."""
    laspy = pytest.importorskip("laspy")
    (tmp_path / "a.las").write_bytes(made(form, 4, b"12", [described(b"pair", 3)]))
    write_labels(tmp_path / "a.las", tmp_path / "b.laz", np.arange(100) % 32)
    expected = laspy.read(io.BytesIO(ascii_only((tmp_path / "b.laz").read_bytes())))
    plain = read(tmp_path / "a.las")
    for name in set(expected.point_format.dimension_names) - {*"XYZ"}:
        cloud = read(tmp_path / "b.laz", fields=[name])
        np.testing.assert_array_equal(cloud.fields[name], np.asarray(expected[name], np.float64), name)
        np.testing.assert_array_equal(cloud.points, plain.points)
        np.testing.assert_array_equal(cloud.labels, np.arange(100) % 32)
        assert (cloud.colors is None) == (plain.colors is None) == (form == 6)
        np.testing.assert_array_equal(cloud.colors, plain.colors)


def test_an_extra_dimension_called_classification(write, tmp_path):
    """Labels go into the standard one."""
    path = write("a.las", made(7, 4, b"1", [described(b"classification", 1)]))
    write_labels(path, tmp_path / "b.las", np.arange(100) % 256)
    np.testing.assert_array_equal(read(tmp_path / "b.las").labels, np.arange(100) % 256)


def test_a_full_disk_is_named_as_the_reason(write, tmp_path):
    """lazrs only reports "Failed to call write"."""
    resource = pytest.importorskip("resource")
    pytest.importorskip("lazrs")
    path, limits = write("a.las", made(7, num=40_000)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(ReadError, match=r"/b\.laz: File too large$"):
            write_labels(path, tmp_path / "b.laz", np.zeros(40_000, int))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["a.las"]


def test_a_limited_number_of_extended_records_is_read(write, monkeypatch):
    """A header can declare 2**32 - 1 of them, and zeros after the points look like empty ones."""
    path = write("a.las", patched(made(6, extended=[(b"", 0, b"")] * 9), EXTENDED + 8, "<I", 2**32 - 1))
    monkeypatch.setattr("kpcore.io.las._MOST_RECORDS", 5)
    with path.open("rb") as file:
        assert len([*las_reader.extended_records(file, file.read(375), 4, path.stat().st_size)]) == 5

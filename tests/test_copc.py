"""COPC by bounds: rows and records as in the whole file, counts as laspy's CopcReader has them; damage is told."""

import os
import struct

import copc_files
import numpy as np
import pytest
from files import patched

from kpcore.io import ReadError, copc, read, scans

pytest.importorskip("lazrs")
RNG = np.random.default_rng(0)
POINTS = RNG.uniform([300, 500, 0], [340, 520, 10], (3000, 3))
INFO = 375 + 54  # place of the octree's record


@pytest.fixture
def small(write):
    return write("a.copc.laz", copc_files.copc(copc_files.records(POINTS)))


def xy(scan, records):
    return np.column_stack([dimension.read(records) for dimension in scan.dimensions[:2]])


def boxes(scan, number, seed=0):
    """Corners of boxes at steps of the coordinates, as laspy rounds a box to steps."""
    rng = np.random.default_rng(seed)
    low, high = np.array(scan.low)[:2] - 1, np.array(scan.high)[:2] + 1
    corners = rng.uniform(low, high, (number, 2, 2)).round(2)
    return [(one.min(axis=0), one.max(axis=0)) for one in corners]


def check(path, number):
    laspy = pytest.importorskip("laspy")
    scan = scans.opened(path)
    whole = np.concatenate([records for _, records in scans.records(scan)])
    places = xy(scan, whole)
    for low, high in boxes(scan, number):
        rows, records = copc.records_in(scan, low, high)
        expected = np.flatnonzero(((places >= low) & (places <= high)).all(axis=1))
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(records, whole[expected])
        assert len(rows) <= copc.num_points_in(scan, low, high) <= scan.num_points
        with laspy.CopcReader.open(path) as reader:
            bounds = laspy.copc.Bounds(np.append(low, -1e4), np.append(high, 1e4))
            of_laspy = reader.query(bounds).array.view(np.uint8).reshape(-1, scan.record_size)
        weights = RNG.integers(2**64, size=scan.record_size, dtype=np.uint64)  # sums of 64 bits stand for the records
        sums, expected = (np.sort(one.astype(np.uint64) @ weights) for one in (records, of_laspy))
        np.testing.assert_array_equal(sums, expected)
    return scan, whole


def test_a_real_file(shared):
    scan, whole = check(shared / "data" / "lion_takanawa.copc.laz", 3)
    octree = copc.nodes(scan)
    assert scan.is_copc and octree.count.sum() == scan.num_points == len(whole)
    cloud = read(scan.path, exact=True)
    places = np.repeat(np.arange(len(octree.count)), octree.count)
    assert (cloud.exact >= octree.low[places]).all() and (cloud.exact <= octree.high[places]).all()
    assert (octree.high - octree.low < 5.76).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_octree_of_pages(small, threads, set_threads, monkeypatch):
    """By one thread and by two, and in groups of fewer points than there are."""
    set_threads(threads)
    scan, _ = check(small, 6)
    assert len(copc.nodes(scan).count) > 50
    low, high = np.array(scan.low)[:2], np.array(scan.high)[:2]
    expected = copc.records_in(scan, low, high)
    monkeypatch.setattr("kpcore.io.las.BLOCK", 500)
    for one, other in zip(expected, copc.records_in(scan, low, high), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(copc.records_in(scan, [0, 0], [1, 1])[0]) == 0 == copc.num_points_in(scan, [0, 0], [1, 1])


def test_an_octree_taller_than_its_points(write):
    """laspy takes the z of a box from the header, and skips nodes of such an octree (its issue 370)."""
    made = copc_files.records(POINTS)
    data = copc_files.copc(made, depth=8, cube=(np.array([300, 500, -3000.0]), 4000.0))
    scan, whole = check(write("a.copc.laz", data), 5)
    assert len(copc.nodes(scan).count) > 10 and np.ptp(copc.nodes(scan).low[:, 2]) > 2900
    assert len(copc.records_in(scan, [300, 500], [340, 520])[0]) == len(whole)


def test_edges_belong_to_a_box(small):
    scan = scans.opened(small)
    point = read(small, exact=True).exact[1234, :2]
    rows, records = copc.records_in(scan, point, point)
    assert 1234 in rows and (xy(scan, records) == point).all()
    assert 1234 not in copc.records_in(scan, np.nextafter(point, np.inf), point + 1)[0]


def test_only_what_is_named_is_unpacked(small):
    scan = scans.opened(small)
    (rows, some), (_, whole) = (
        copc.records_in(scan, [310, 505], [320, 515], names) for names in (["classification"], None)
    )
    assert len(rows) and np.array_equal(some[:, 16], whole[:, 16]) and np.array_equal(xy(scan, some), xy(scan, whole))
    assert not np.array_equal(some[:, 30:], whole[:, 30:])


def test_corners_that_are_no_box(small):
    scan = scans.opened(small)
    for low, high in (([1, 1], [0, 2]), ([0, np.nan], [1, 1]), ([0, 0, 0], [1, 1, 1]), (0, 1)):
        with pytest.raises(ValueError, match="low, high: expected x and y of two corners, low <= high, got"):
            copc.records_in(scan, low, high)


def test_a_laz_that_is_no_copc(shared, write):
    scan = scans.opened(shared / "data" / "autzen_trim.laz")
    with pytest.raises(ReadError, match=r"autzen_trim\.laz: expected a COPC"):
        copc.records_in(scan, [0, 0], [1, 1])


def test_a_file_that_changes(small):
    scan = scans.opened(small)
    copc.records_in(scan, [310, 505], [320, 515])
    with small.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ReadError, match=r"a\.copc\.laz: has changed since its header was read"):
        copc.records_in(scan, [310, 505], [320, 515])


def entry(data, place):
    """(place in the file, key, begin, size, count) of an entry of the first page."""
    at = struct.unpack_from("<Q", data, INFO + 40)[0] + 32 * place
    *key, begin, size, count = struct.unpack_from("<4iQii", data, at)
    return at, key, begin, size, count


def damaged_page(data, layout, place, *values):
    at, *_, count = entry(data, 1)
    assert count == -1  # a further page
    return patched(data, at + place, layout, *values)


DAMAGES = {
    "page in itself": (lambda data: damaged_page(data, "<Qi", 16, *struct.unpack_from("<QQ", data, INFO + 40)),
                       "is in another page or in itself"),
    "page beyond the file": (lambda data: damaged_page(data, "<Q", 16, 2**63), "from byte 9223372036854775808 of"),
    "page of no bytes": (lambda data: damaged_page(data, "<i", 24, 0), "a page of its octree has 0 bytes"),
    "page of negative bytes": (lambda data: damaged_page(data, "<i", 24, -32), "a page of its octree has -32 bytes"),
    "half an entry": (lambda data: damaged_page(data, "<i", 24, 33), "a page of its octree has 33 bytes"),
    "negative count": (lambda data: damaged_page(data, "<i", 28, -2), "a node of its octree has -2 points"),
    "no further page": (lambda data: damaged_page(data, "<i", 28, 0), "which are not its"),
    "count": (lambda data: patched(data, entry(data, 0)[0] + 28, "<i", entry(data, 0)[-1] + 1), "301 points, which"),
    "begin": (lambda data: patched(data, entry(data, 0)[0] + 16, "<Q", 600), "which are not its"),
    "size": (lambda data: patched(data, entry(data, 0)[0] + 24, "<i", 7), "which are not its"),
    "level": (lambda data: patched(data, entry(data, 0)[0], "<i", -1), "is outside of the octree"),
    "deep level": (lambda data: patched(data, entry(data, 0)[0], "<i", 2**30), "is outside of the octree"),
    "key": (lambda data: patched(data, entry(data, 0)[0] + 4, "<i", 1), "is outside of the octree"),
    "cube": (lambda data: patched(data, INFO, "<d", 320.0), "outside of their cube"),
    "centre": (lambda data: patched(data, INFO, "<d", np.nan), "the finite centre and size of an octree"),
    "size of the octree": (lambda data: patched(data, INFO + 24, "<d", -1.0), "the finite centre and size"),
    "root": (lambda data: patched(data, INFO + 40, "<Q", 2**64 - 1), "a page of its octree has"),
    "root of 2**64 bytes": (lambda data: patched(data, INFO + 48, "<Q", 2**64 - 32), "a page of its octree has"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_octree_is_an_error(write, name):
    damage, reason = DAMAGES[name]
    path = write("a.copc.laz", damage(copc_files.copc(copc_files.records(POINTS[:300]))))
    scan = scans.opened(path)
    with pytest.raises(ReadError, match=reason) as refused:
        copc.records_in(scan, [300, 500], [340, 520])
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    assert sum(len(records) for _, records in scans.records(scan)) == 300  # it is a LAZ all the same


def test_pages_in_each_other_end(write):
    """Each page begins 32 bytes after the other, so none begins at the same byte."""
    data = copc_files.copc(copc_files.records(POINTS[:300]))
    begin, _ = struct.unpack_from("<QQ", data, INFO + 40)
    room = (len(data) - begin) // 32
    pages = b"".join(struct.pack("<4iQii", 0, 0, 0, 0, begin + 32 * (i + 1), 32 * (room - i - 1), -1)
                     for i in range(room - 1))  # fmt: skip
    data = patched(data[:begin] + pages + data[begin + len(pages) :], INFO + 48, "<Q", 32 * room)
    with pytest.raises(ReadError, match="damaged: "):
        copc.nodes(scans.opened(write("a.copc.laz", data)))


def test_a_page_in_itself_is_read_once(write, monkeypatch):
    """Or else a file of 10 GB would be read for hours."""
    scan = scans.opened(write("a.copc.laz", DAMAGES["page in itself"][0](copc_files.copc(copc_files.records(POINTS)))))
    assert len(next(scans.records(scan))[1]) == 3000
    read_at, read_from = copc.las.read_at, []
    monkeypatch.setattr(
        copc.las, "read_at", lambda file, begin, size: [read_from.append(begin), read_at(file, begin, size)][1]
    )
    with pytest.raises(ReadError, match="is in another page or in itself"):
        copc.nodes(scan)
    assert len(read_from) == len({*read_from}) > 1


def test_chunks_with_other_counts_than_the_table_says(write):
    """Their sum is right."""
    data = copc_files.copc(copc_files.records(POINTS[:300]))
    for begin, change in (
        (entry(data, 0)[2], 1),
        (entry(data, 2 + struct.unpack_from("<Q", data, INFO + 48)[0] // 32)[2], -1),
    ):
        count = struct.unpack_from("<I", data, begin + 36)[0]
        data = patched(data, begin + 36, "<I", count + change)
    with pytest.raises(
        ReadError, match=r"a\.copc\.laz: damaged: chunks have other numbers of points or bytes than the ch"
    ):
        scans.opened(write("a.copc.laz", data))


def test_a_chunk_that_is_damaged_in_its_middle(write):
    data = copc_files.copc(copc_files.records(POINTS[:300]))
    _, _, begin, size, _ = entry(data, 0)
    for place, new in ((36 + 4 * 9, b"\xff" * 40), (30, b"\xff\xff\xff\xff\xff\xff\xff\xff")):
        path = write("a.copc.laz", patched(data, begin + min(place, size - 8), f"<{len(new)}s", new))
        with pytest.raises(ReadError, match=r"a\.copc\.laz: "):
            copc.records_in(scans.opened(path), [300, 500], [340, 520])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_and_another_process_read_the_same(python, small):
    """The threads that unpacked points in the parent do not exist in a forked child; scans travel to a spawned one."""
    code = f"""if True:
        import os, pickle, kpcore as kp
        from kpcore.io import copc, scans
        kp.set_num_threads(2)
        scan = pickle.loads(pickle.dumps(scans.opened({str(small)!r})))
        first = copc.records_in(scan, [310, 505], [330, 515])[1]
        child = os.fork()
        if not child:
            os._exit(not (copc.records_in(scan, [310, 505], [330, 515])[1] == first).all())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = python(code, timeout=60)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr

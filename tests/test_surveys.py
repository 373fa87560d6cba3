"""Which files are one survey: what headers state, boxes that overlap, and the sentence about it."""

import os
import pickle
import time
from typing import NamedTuple

import files
import numpy as np
import pytest

from kpcore.io import Reference
from kpcore.io.scans import opened
from kpcore.pipeline import surveys

RD = Reference("Amersfoort / RD New", "projected", 1.0, 1.0, "WKT")
FEET = RD._replace(horizontal=0.3048)


class Scan(NamedTuple):
    path: str
    low: tuple
    high: tuple
    reference: Reference | None = RD
    num_points: int = 1000


def tile(column, row=0, *, size=100.0, buffer=0.0, origin=(85_000.0, 446_000.0), name=None, **more):
    low = np.array(origin) + np.array([column, row]) * size - buffer
    return Scan(name or f"t{column}_{row}.laz", (*low, -1.0), (*(low + size + 2 * buffer), 9.0), **more)


def decided(*scans, **options):
    return surveys.decide(scans, **options)


def brute_force(scans, touching=False):
    """All pairs, one by one."""
    pairs = []
    for i, a in enumerate(scans):
        for j, b in enumerate(scans[:i]):
            sizes = [min(a.high[k], b.high[k]) - max(a.low[k], b.low[k]) for k in (0, 1)]
            if a.num_points and b.num_points and min(sizes) >= 0 and (touching or min(sizes) > 0):
                pairs.append((j, i))
    return sorted(pairs)


# ---- one survey


def test_tiles_side_by_side_are_one_survey():
    decision = decided(tile(0), tile(1), tile(1, 1, num_points=2_000_000))
    assert decision == (
        True, "3 files, 2,002,000 points, are labelled as one survey (--separate labels each by itself)"
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(decision)) == decision


def test_options_decide():
    scans = tile(0), tile(1)
    assert decided(*scans, together=False) == (False, "each of the 2 files is labelled by itself (--separate)")
    assert decided(*scans, together=True) == (True, "2 files, 2,000 points, are labelled as one survey (--together)")


def test_a_single_file():
    assert decided(tile(0, num_points=1)) == (True, "1 file, 1 point")
    assert decided(tile(0), together=False).together
    assert decided(others=["a.ply"], together=True) == (True, "1 file")
    with pytest.raises(ValueError, match="scans: expected at least one file, got none"):
        decided()


# ---- reference systems


@pytest.mark.parametrize(("other", "words"), [
    (None, "b.laz states none"),
    (RD._replace(name="RGF93 v1 / Lambert-93"), "b.laz states RGF93 v1 / Lambert-93"),
    (RD._replace(name="Amersfoort / RD New + NAP height"), "b.laz states Amersfoort / RD New + NAP height"),
    (RD._replace(kind="local"), "RD New, projected, and b.laz states Amersfoort / RD New, local,"),
    (RD._replace(vertical=None), "metres as the vertical unit and b.laz states nothing as the vertical unit"),
    (RD._replace(horizontal=None), "b.laz states nothing as the horizontal unit"),
    (Reference(None, "projected", 1.0, 1.0, "GeoTIFF keys"), "b.laz states a projected system without a name"),
    (Reference(None, "unknown", 1.0, None, "GeoTIFF keys"), "b.laz states none by name"),
])  # fmt: skip
def test_files_of_other_systems_are_labelled_by_themselves_unless_together(other, words):
    scans = tile(0, name="a.laz"), tile(1, name="a2.laz"), tile(2, name="b.laz", reference=other)
    decision = decided(*scans)
    assert not decision.together
    assert decision.reason.startswith("each of the 3 files is labelled by itself: a.laz states ")
    assert decision.reason.endswith(f"{words} (--together labels them as one survey)")
    decision = decided(*scans, together=True)
    assert decision.together
    assert "3 files, 3,000 points, are labelled as one survey (--together), although a.laz states " in decision.reason
    assert decision.reason.endswith(words)


def test_spelling_of_names_and_source_do_not_count():
    other = RD._replace(name="AMERSFOORT_RD_New", source="GeoTIFF keys", horizontal=1 + 1e-12)
    assert decided(tile(0), tile(1, reference=other)).together
    assert not decided(tile(0), tile(1, reference=RD._replace(name="Amersfoort / RD New 2"))).together


@pytest.mark.parametrize("together", [None, True])
@pytest.mark.parametrize(("other", "words"), [
    (FEET, "a.laz has x and y in metres and b.laz in feet"),
    (RD._replace(horizontal=1200 / 3937), "a.laz has x and y in metres and b.laz in US survey feet"),
    (RD._replace(horizontal=1 + 1e-8), "a.laz has x and y in metres and b.laz in units of 1.00000001 m"),
    (RD._replace(kind="geographic", horizontal=None), "a.laz has x and y in metres and b.laz in degrees"),
    (RD._replace(vertical=0.3048), "a.laz has heights in metres and b.laz in feet"),
])  # fmt: skip
def test_files_in_other_units_are_never_one_survey(other, words, together):
    scans = tile(0, name="a.laz"), tile(1, reference=None), tile(2, name="b.laz", reference=other)
    if together:
        with pytest.raises(ValueError) as error:
            decided(*scans, together=True)
        assert str(error.value) == f"together: expected files in one unit, got {words}"
    else:  # without advice that would fail
        assert decided(*scans) == (False, f"each of the 3 files is labelled by itself: {words}")


@pytest.mark.parametrize("reference", [
    None, Reference(None, "unknown", 1.0, None, "WKT"), Reference("Unknown", "local", 1.0, 1.0, "WKT"),
])  # fmt: skip
def test_files_that_name_no_system_are_one_survey_only_far_from_the_origin(reference):
    far = [tile(i, reference=reference) for i in range(3)]
    assert decided(*far).together
    near = tile(5, origin=(0.0, 0.0), reference=reference, name="near.laz")
    reason = decided(*far, near).reason
    assert (
        "t0_0.laz and near.laz name no reference system, and the coordinates of near.laz are near the origin" in reason
    )
    assert "near.laz and t0_0.laz name no" in decided(near, *far).reason
    assert decided(*far, near, together=True).together
    assert decided(*(one._replace(reference=RD) for one in (near, *far))).together


@pytest.mark.parametrize(("x", "extent", "is_far"), [
    (1000.0 - 50, 50, False), (1000.5 - 50, 50, True), (-1001.0, 50, True), (4900, 500, True), (4500, 500, False),
])  # fmt: skip
def test_far_is_beyond_1000_and_ten_extents(x, extent, is_far):
    scans = [Scan(f"{i}.las", (x, -5 - i, 0), (x + extent, -4 - i, 1e6), None) for i in range(2)]
    assert decided(*scans).together == is_far


# ---- boxes


@pytest.mark.parametrize(("buffer", "together"), [(0, True), (9, True), (13, False)])
def test_boxes_may_overlap_by_less_than_a_fifth(buffer, together):
    scans = [tile(c, r, buffer=buffer) for r in range(3) for c in range(3)]  # 9: 18 / 118 = 15 %; 13: 26 / 126 = 21 %
    decision = decided(*scans)
    assert decision.together == together
    if not together:
        assert "overlap by 21 % of the smaller one (--together labels" in decision.reason
        assert decided(*scans, together=True).together


def test_the_share_that_is_too_large():
    one = tile(0, name="one.laz")  # 100 wide
    for width, together in ((19.999, True), (20.0, False)):
        low, high = one.high[0] - width, one.high[0] + 500
        other = one._replace(path="other.laz", low=(low, *one.low[1:]), high=(high, *one.high[1:]))
        decision = decided(tile(-1), one, other)
        assert decision.together == together
    assert "the boxes of one.laz and other.laz overlap by 20 % of the smaller one" in decision.reason


def test_the_smaller_box_counts():
    large = tile(0, size=1000.0)
    small = tile(0, size=10.0, name="small.laz", origin=(85_500.0, 446_500.0))
    assert "overlap by 100 % of the smaller one" in decided(large, small).reason


@pytest.mark.filterwarnings("error")
def test_boxes_without_area_do_not_overlap():
    point = Scan("point.las", (85_050.0, 446_050.0, 0.0), (85_050.0, 446_050.0, 0.0), RD, 1)
    line = Scan("line.las", (85_000.0, 446_050.0, 0.0), (85_100.0, 446_050.0, 0.0), RD)
    assert decided(tile(0), point, line, tile(1)).together
    assert surveys.overlapping([tile(0), point, line, line]).tolist() == []
    assert surveys.overlapping([tile(0), point, line], touching=True).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_files_without_points_are_left_out():
    empty = Scan("empty.laz", (0.0, 0.0, 0.0), (np.nan, 0.0, 0.0), None, 0)
    decision = decided(empty, tile(0), tile(1))
    assert decision == (
        True, "3 files, 2,000 points, are labelled as one survey (--separate labels each by itself)"
    )  # fmt: skip
    assert decided(empty, empty._replace(path="b.laz")).together
    assert surveys.overlapping([empty, tile(0), tile(0)]).tolist() == [[1, 2]]


def test_a_header_without_a_box():
    damaged = tile(1, name="damaged.laz")._replace(low=None, high=None)
    words = "damaged.laz, which states no box of its points that can be right"
    assert decided(tile(0), damaged) == (False, f"each of the 2 files is labelled by itself: {words}")
    with pytest.raises(ValueError, match=f"together: expected boxes .* got {words}"):
        decided(tile(0), damaged, together=True)


def test_scans_of_files(tmp_path):
    square = np.array([[0.0, 0, 0], [100, 0, 1], [0, 100, 2], [100, 100, 3]])
    for name, x in (("a", 85_000.0), ("b", 85_099.0), ("c", 85_050.0)):
        (tmp_path / f"{name}.las").write_bytes(files.las(square + np.array([x, 446_000, 0]), (x, 446_000, 0)))
    a, b, c = (opened(tmp_path / f"{name}.las") for name in "abc")
    assert surveys.decide([a, b]).reason.startswith("2 files, 8 points, are labelled as one survey")
    assert "the boxes of a.las and c.las overlap by 50 % of the smaller one" in surveys.decide([a, c]).reason
    assert surveys.overlapping([a, c, b]).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert "a.las and a.las" not in surveys.decide([a, a]).reason and "twice" in surveys.decide([a, a]).reason


@pytest.mark.parametrize("high", [(np.nan, 1, 1), (np.inf, 1, 1), (-1, 1, 1)])
def test_a_box_that_is_none_is_named(high):
    damaged = Scan("damaged.laz", (0.0, 0.0, 0.0), high)
    assert "damaged.laz, with [0.0, 0.0, 0.0] to [" in decided(tile(0), damaged).reason
    with pytest.raises(ValueError, match=r"together: expected boxes with finite low <= high, got damaged.laz, with"):
        decided(tile(0), damaged, together=True)
    with pytest.raises(ValueError, match=r"scans: expected boxes with finite low <= high, got damaged.laz"):
        surveys.overlapping([tile(0), damaged])


# ---- files


def test_other_formats_are_no_survey():
    assert decided(tile(0), others=["scans/a.ply"]) == (
        False, "each of the 2 files is labelled by itself: a.ply, which is no LAS, LAZ or COPC file"
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"together: expected LAS, LAZ and COPC files, got a.ply, which is no"):
        decided(tile(0), others=["scans/a.ply"], together=True)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_twice_is_no_survey(tmp_path, link):
    first, second = tmp_path / "a.laz", tmp_path / "b.laz"
    first.write_bytes(b"LASF")
    link(first, second)
    scans = tile(0, name=first), tile(0, name=second)
    assert "a.laz and b.laz, which are one file" in decided(*scans).reason
    with pytest.raises(ValueError, match=r"together: expected each file once, got a.laz and b.laz, which are one file"):
        decided(*scans, together=True)
    with pytest.raises(ValueError, match=r"got .*a.laz twice"):
        decided(scans[0], scans[0], together=True)
    second.unlink()
    second.write_bytes(b"LASF")  # a copy is another file
    assert decided(*scans, together=True).together


def test_equal_names_are_told_with_their_folders_in_one_line():
    scans = tile(0, name="x/a.laz"), tile(1, name="y/a.laz", reference=RD._replace(name="Two\nlines"))
    assert "x/a.laz states Amersfoort / RD New and y/a.laz states Two lines" in decided(*scans).reason


# ---- pairs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("touching", [False, True])
def test_pairs_equal_those_of_brute_force(seed, touching, monkeypatch):
    monkeypatch.setattr(surveys, "_BLOCK", 7)
    rng = np.random.default_rng(seed)
    number = int(rng.integers(0, 90))
    spread = [(20, 20), (1, 200), (200, 1), (3, 3)][seed % 4]
    low = rng.integers(0, 20, (number, 2)) * spread  # integers, so that many edges are equal
    high = low + rng.integers(0, 5, (number, 2)) * [(4, 4), (1, 90), (90, 1), (1, 1)][seed % 4]
    counts = rng.integers(0, 8, number)
    scans = [Scan(str(i), (*map(float, a), 0.0), (*map(float, b), 0.0), RD, int(n))
             for i, (a, b, n) in enumerate(zip(low, high, counts, strict=True))]  # fmt: skip
    pairs = surveys.overlapping(scans, touching)
    assert pairs.dtype == np.int64
    assert [*map(tuple, pairs.tolist())] == brute_force(scans, touching)


def test_too_many_pairs_are_an_error(monkeypatch):
    monkeypatch.setattr(surveys, "_MOST_PAIRS", 5)
    with pytest.raises(ValueError, match="scans: expected at most 5 pairs of boxes that overlap, got more"):
        surveys.overlapping([tile(0)] * 4)


@pytest.mark.parametrize("shape", ["grid", "corridor", "cross"])
def test_many_tiles_take_seconds(shape):
    number = 10_000
    i = np.arange(number)
    if shape == "grid":
        at = np.column_stack([i % 100, i // 100]) * 100.0
    elif shape == "corridor":
        at = np.column_stack([i % 7, 100.0 * i])
    else:
        arm = np.where(i % 2, i // 2 - number // 4, 0) * 100.0
        at = np.column_stack([np.where(i % 2, arm, i % 7), np.where(i % 2, i % 5, (i // 2) * 100.0 + 200)])
    low = np.random.default_rng(0).permutation(at + 1e5)
    scans = [Scan(str(k), (*a, 0.0), (*(a + 105), 0.0)) for k, a in enumerate(low)]
    begin = time.process_time()
    assert decided(*scans).together
    assert time.process_time() - begin < 10  # all pairs would take minutes

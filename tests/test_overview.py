"""The picture of a whole survey: counts of points in the pixels of a map, and what is drawn of them."""

import io
import math

import numpy as np
import pytest

from kpcore import picture
from kpcore.io import Reference
from kpcore.pipeline import colors, overview
from kpcore.pipeline.overview import Overview

LOW, HIGH = (85_000.0, 446_000.0), (86_000.0, 446_500.0)
NAMES = ["ground", "building", "water"]


def points(number, seed=0, low=LOW, high=HIGH):
    rng = np.random.default_rng(seed)
    return low + rng.random((number, 2)) * np.subtract(high, low), rng.integers(-1, 3, number)


def filled(number=20_000, most_pixels=30, **options):
    one = Overview(LOW, HIGH, 3, most_pixels)
    one.add(*points(number, **options))
    return one


def brute_force(one, xy, classes):
    counts = np.zeros(one.counts.shape, int)
    for (x, y), number in zip(xy, classes, strict=True):
        place = math.floor((y - LOW[1]) / one.pixel), math.floor((x - LOW[0]) / one.pixel)
        counts[(number if number >= 0 else 3, *place)] += 1
    return counts


# ---- counting


@pytest.mark.parametrize("block", [1 << 18, 100, 7])
def test_counts_equal_those_of_one_point_after_another(block, monkeypatch):
    """Also where points of a block are far apart, in which case only their pixels are looked at."""
    monkeypatch.setattr(overview, "_BLOCK", block)
    one = filled(2000, 100)
    xy, classes = points(2000)
    np.testing.assert_array_equal(one.counts, brute_force(one, xy, classes))
    assert one.totals.tolist() == [*np.bincount(classes[classes >= 0]), np.count_nonzero(classes < 0)]
    assert one.counts.dtype == np.uint32 and one.outside == 0


def test_a_part_of_the_map():
    xy, classes = points(500, low=(85_400, 446_200), high=(85_410, 446_290))
    one = Overview(LOW, HIGH, 3, 100)
    one.add(np.column_stack([xy, xy[:, 0]]), classes.astype(np.int16))
    np.testing.assert_array_equal(one.counts, brute_force(one, xy, classes))


@pytest.mark.parametrize(
    "size", [(1000, 500), (700, 700), (1, 1), (20_000, 3), (3, 20_000), (0, 5), (5, 0), (0, 0), (7e5, 7e4)]
)
@pytest.mark.parametrize("most_pixels", [1, 2, 3, 7, 50, 1000])
def test_the_number_of_pixels_is_bounded_and_the_box_is_covered(size, most_pixels):
    high = np.add(LOW, size)
    one = Overview((*LOW, -3), (*high, 8), 1, most_pixels)
    rows, columns = one.counts.shape[1:]
    assert rows * columns <= max(most_pixels**2, 2 * most_pixels) and max(rows, columns) <= 2 * most_pixels
    one.add(np.array([LOW, high]), np.array([0, 0]))
    assert one.outside == 0 and one.counts[0, 0, 0] >= 1 and one.counts[0, -1, -1] >= 1
    aspect = max(size) / max(min(size), 1e-9)
    if most_pixels == 1000 and aspect < 4 and max(size):
        assert rows * columns > 0.9 * most_pixels**2
    elif most_pixels == 1000 and aspect > 4 and max(size):
        assert max(rows, columns) >= 1990


def test_points_outside_are_counted_apart():
    one = Overview(LOW, HIGH, 3, 30)
    edge = one.pixel / 2  # as in headers that are rounded
    far = np.array(
        [[np.nan, LOW[1]], [LOW[0] - 1e6, LOW[1]], [LOW[0], 1e300], [np.inf, -np.inf], [LOW[0] - edge, LOW[1] - edge]]
    )
    one.add(far, np.array([0, 1, 2, 0, 1]))
    assert one.outside == 4 and one.counts.sum() == 1 and one.counts[1, 0, 0] == 1
    assert one.totals.tolist() == [2, 2, 1, 0]
    one.add(np.zeros((0, 2)), np.zeros(0, int))
    one.add(far[:3], np.array([0, 0, 0]))
    assert one.outside == 7
    for step in (-1, 1):  # in pixels from the edges, on either side
        for corner, axis in ((LOW, 0), (LOW, 1), (HIGH, 0), (HIGH, 1)):
            before = one.outside
            place = np.array([85_500.0, 446_250.0])
            place[axis] = corner[axis] + step * (1.6 if corner is LOW else 2.1) * one.pixel
            one.add(place[None], np.array([0]))
            assert one.outside - before == (step == (-1 if corner is LOW else 1))


def test_numbers_beyond_32_bits_stay_at_the_largest():
    one, other = filled(10), filled(10)
    place = np.array([LOW, LOW])
    for counted in (one, other):
        counted.add(place, np.array([0, 0]))
        counted.counts[0, 0, 0], counted.totals[0] = 2**31 + 5, 2**31 + 5
    one.merge(other)
    assert one.counts[0, 0, 0] == 2**32 - 1 and one.totals[0] == 2**32 + 10
    one.add(place, np.array([0, 0]))
    assert one.counts[0, 0, 0] == 2**32 - 1 and one.totals[0] == 2**32 + 12


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.zeros((3, 2), np.float32), np.zeros(3, int)), r"xy: expected \(n, 2\) float64, got \(3, 2\) float32"),
    ((np.zeros((3, 4)), np.zeros(3, int)), r"xy: expected \(n, 2\) float64, got \(3, 4\)"),
    ((np.zeros((3, 2)), np.zeros(2, int)), r"classes: expected \(3,\) integers, got \(2,\)"),
    ((np.zeros((3, 2)), np.zeros(3)), r"classes: expected \(3,\) integers, got \(3,\) float64"),
    ((np.zeros((3, 2)), np.array([0, 3, 1])), "classes: expected at most 2, got 3"),
])  # fmt: skip
def test_bad_points(arguments, message):
    one = Overview(LOW, HIGH, 3)
    with pytest.raises(ValueError, match=message):
        one.add(*arguments)
    assert one.totals.sum() == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (((0, np.nan), (1, 1), 3), "low: expected two finite"), (((0, 0), (1, -1), 3), "high: expected at least low"),
    (((0,), (1, 1), 3), "low: expected two finite"), (((0, 0), (1, 1), 0), "num_classes: expected at least 1, got 0"),
    (((0, 0), (1, 1), 1, 0), "most_pixels: expected at least 1, got 0"),
])  # fmt: skip
def test_bad_boxes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Overview(*arguments)


# ---- workers


def test_overviews_of_workers_add_up(tmp_path):
    xy, classes = points(3000)
    whole, merged = Overview(LOW, HIGH, 3, 50), Overview(LOW, HIGH, 3, 50)
    whole.add(xy, classes)
    order = np.argsort(xy[:, 0])
    for number, part in enumerate([order[:1000], order[1000:1001], order[:0], order[1001:]]):
        one = Overview(LOW, HIGH, 3, 50)
        one.add(xy[part], classes[part])
        one.outside += number
        one.save(tmp_path / f"{number}.npz")
    for number in (2, 0, 3, 1):
        merged.merge(Overview.load(tmp_path / f"{number}.npz"))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_array_equal(merged.totals, whole.totals)
    assert merged.outside == 6
    merged.save(tmp_path / "merged.npz")
    again = Overview.load(tmp_path / "merged.npz")
    np.testing.assert_array_equal(again.counts, whole.counts)
    again.merge(whole)  # which the loaded one can still do
    np.testing.assert_array_equal(again.counts, 2 * whole.counts)


def test_a_file_holds_only_the_part_with_points(tmp_path):
    one = Overview(LOW, HIGH, 20, 1000)
    one.add(np.array([[85_500.0, 446_100.0], [85_510.0, 446_110.0]]), np.array([0, 1]))
    one.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").stat().st_size < 5000  # the raster has 84 MB


@pytest.mark.parametrize("other", [
    Overview(LOW, HIGH, 2, 30), Overview(LOW, HIGH, 3, 31), Overview(LOW, (86_000.0, 446_501.0), 3, 30),
])  # fmt: skip
def test_overviews_of_other_surveys_do_not_add_up(other):
    with pytest.raises(ValueError, match=r"other: expected (num_classes 3|most_pixels 30|high .*446500.0.*), got "):
        Overview(LOW, HIGH, 3, 30).merge(other)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"PK" + data[:9], lambda data: b""]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "a.npz"
    filled().save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.npz: expected an overview of a survey, got a damaged file"):
        Overview.load(path)
    np.savez(path, low=LOW)
    with pytest.raises(ValueError, match=r"a\.npz: expected an overview of a survey, got a damaged file: .*high"):
        Overview.load(path)
    with pytest.raises(FileNotFoundError):
        Overview.load(tmp_path / "missing.npz")


# ---- the classes of pixels


def test_the_class_of_most_points_counts():
    one = Overview((0, 0), (4, 4), 3, 5)
    middle = 0.5 * one.pixel
    places = np.array([[middle, middle]])
    one.add(places.repeat(6, axis=0), np.array([2, 2, 1, 0, 1, 2]))
    one.add(places.repeat(5, axis=0) + np.array([one.pixel, 0]), np.array([-1, -1, 1, 0, 2]))
    one.add(places.repeat(4, axis=0) + np.array([0, one.pixel]), np.array([2, 1, 2, 1]))
    classes, size = one._majority()
    assert size == 1 and classes[0, 0] == 2 and classes[0, 1] == 3 and classes[1, 0] == 1  # ties: the first class
    assert (classes >= 0).sum() == 3


@pytest.mark.parametrize(("number", "size"), [(0, 1), (3_000_000, 1), (30_000, 8)])
def test_sparse_points_are_taken_together(number, size):
    one = Overview(LOW, HIGH, 3, 700)
    one.add(*points(number))
    classes, taken = one._majority()
    assert taken == size
    if number:
        assert (classes >= 0).mean() > 0.9
        rows, columns = one.counts.shape[1:]
        part = one.counts[:, size : 2 * size, :size].reshape(4, -1).sum(axis=1)
        assert part[classes[1, 0]] == part.max()
        assert classes.shape == (-(-rows // size), -(-columns // size))


def test_gaps_stay_empty():
    """A survey of which most is empty, as a corridor across its box is."""
    rng = np.random.default_rng(0)
    along = rng.random(400_000)
    xy = LOW + np.column_stack([1000 * along, 500 * along + 10 * rng.random(along.size)])
    one = Overview(LOW, (86_000.0, 446_510.0), 3)
    one.add(xy, np.zeros(len(xy), int))
    classes, size = one._majority()
    assert size == 1 and (classes >= 0).mean() < 0.05


# ---- pictures


def drawn(one, names=NAMES, boxes=(), **options):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    calls, draw_map = [], picture.draw_map

    def draw_in_memory(_, *args, **more):
        calls.append((args, more))
        draw_map(file, *args, **more)

    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "draw_map", draw_in_memory)
        one.draw("a.png", "Title", "Subtitle", names, boxes, **options)
    file.seek(0)
    (((_, subtitle, _, _, _, _, _, legend), more),) = calls
    return (255 * imread(file)[..., :3]).round().astype(np.uint8), subtitle, legend, more


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def has(image, color):
    return (image == color).all(axis=2)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_classes_have_their_colours_places_and_shares(theme):
    one = Overview(LOW, HIGH, 3, 100)
    xy, _ = points(30_000)
    east, north = xy[:, 0] > 85_500, xy[:, 1] > 446_250
    one.add(xy, np.where(east & north, 0, np.where(east, 1, -1)))
    image, subtitle, legend, _ = drawn(one, theme=theme)
    of_classes = [*colors.distinct_colors(3)[:2], picture.rgb(picture.THEMES[theme].unlabeled)]
    rows, columns = picture.TOP + np.array([100, 500]), picture.MARGIN + np.array([200, 1100])
    assert image.shape[1] > columns[1]
    for place, color in (
        ((0, 1), of_classes[0]),
        ((1, 1), of_classes[1]),
        ((0, 0), of_classes[2]),
        ((1, 0), of_classes[2]),
    ):
        assert (image[rows[place[0]], columns[place[1]]] == color).all()
    assert [[name for name, _, _ in group] for group in legend] == [["ground", "building"], ["without a class"]]
    shares = [float(words.removesuffix(" %")) for group in legend for _, words, _ in group]
    assert shares == pytest.approx([25, 25, 50], abs=1)
    assert subtitle == "Subtitle"


def test_the_scale_bar_has_the_length_that_it_says(monkeypatch):
    said, words = [], picture.length_words
    monkeypatch.setattr(picture, "length_words", lambda *args: said.append(args) or words(*args))
    one = Overview(LOW, HIGH, 3, 100)
    one.add(points(100_000)[0], np.zeros(100_000, int))
    image, *_ = drawn(one, theme="light", unit="m")
    columns = np.flatnonzero(has(image, colors.distinct_colors(1)[0])[picture.TOP + 100])
    assert said == [(200, "m")]
    metre = (np.ptp(columns) + 1) / 1000
    dark = has(image, picture.rgb(picture.THEMES["light"].text))
    row = dark[:, picture.MARGIN - 3 : 600].sum(axis=1).argmax()
    bar = np.flatnonzero(dark[row])
    bar = bar[: 1 + np.argmax(np.append(np.diff(bar), 99) > 2)]
    assert (np.ptp(bar) + 1 - 3) / metre == pytest.approx(said[0][0], rel=0.02)  # between the middles of its ends


@pytest.mark.parametrize(("kind", "low", "is_map"), [
    ("projected", (0, 0), True), ("local", LOW, False), ("unknown", LOW, True), (None, LOW, True),
    (None, (0, 0), False),
])  # fmt: skip
def test_the_north_of_maps_and_the_unit(kind, low, is_map):
    one = Overview(low, np.add(low, 10), 3, 5)
    reference = kind and Reference("a", kind, 0.3048, None, "WKT")
    _, _, _, more = drawn(one, reference=reference)
    assert more["is_map"] == is_map and more["unit"] == ("ft" if kind else None)


@pytest.mark.parametrize(
    ("tiles", "size"), [((1, 1), (0, 0)), ((2, 2), HIGH), ((20, 20), HIGH), ((30, 1), (30_000, 5)), ((1, 9), (2, 9000))]
)
@pytest.mark.parametrize("number", [0, 500])
def test_any_survey_is_drawn(tiles, size, number, monkeypatch):
    monkeypatch.setattr(picture, "_LONGEST_MAP", 400)
    high = HIGH if size is HIGH else np.add(LOW, size)
    one = Overview(LOW, high, 3, 100)
    one.add(*points(number, high=high))
    steps = np.subtract(high, LOW) / tiles
    boxes = [(f"$tile {i}$_{j}.laz", (*(LOW + steps * (i, j)), 0), (*(LOW + steps * (i + 1, j + 1)), 9))
             for i in range(tiles[0]) for j in range(tiles[1])]  # fmt: skip
    image, _, legend, _ = drawn(one, boxes=boxes)
    assert 900 <= image.shape[1] < 2500 and 300 < image.shape[0] < 2800
    if number == 500:
        for _, _, color in legend[0]:
            assert np.count_nonzero(has(image, color)) > 390  # a swatch has 20 x 20 pixels


def test_tiles_are_outlined_and_filled_where_no_point_is():
    one = Overview(LOW, HIGH, 3, 100)
    boxes = [("a", LOW, (85_400.0, 446_500.0))]
    theme = picture.THEMES["dark"]
    image, *_ = drawn(one, boxes=boxes)
    inside = has(image, picture.rgb(theme.empty))
    columns = np.flatnonzero(inside[picture.TOP + 300])
    assert np.ptp(columns) == pytest.approx(0.4 * 1410, rel=0.02)
    image, *_ = drawn(one)
    assert not has(image, picture.rgb(theme.empty)).any()


def test_points_outside_are_told():
    one = filled(100)
    one.add(np.array([[0.0, 0.0]]), np.array([1]))
    assert drawn(one)[1] == "Subtitle · 1 point outside of the map"
    with pytest.raises(ValueError, match="names: expected 3 classes, got 2"):
        one.draw("a.png", "", "", NAMES[:2])
    with pytest.raises(ValueError, match="theme: expected dark or light, got 'blue'"):
        one.draw("a.png", "", "", NAMES, theme="blue")

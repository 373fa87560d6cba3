"""Pictures of clouds: the view, scale bar and north arrow, the legend, themes, confusion matrices."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from kpcore import picture
from kpcore.io import Cloud, Reference
from kpcore.pipeline import colors, segmentation, voting
from kpcore.pipeline.data import IGNORED
from kpcore.pipeline.settings import from_dict

RED, GRAY = (255, 0, 0), (120, 120, 120)
UTM = np.array([430_000.0, 5_300_000.0, 200.0])


def tile(num=20_000, size=(60, 30, 4), seed=0):
    return (np.random.default_rng(seed).random((num, 3)) * size).astype(np.float32)


def cloud_of(points, shift=(0, 0, 0), up=(0, 0, 1)):
    return Cloud(points, None, None, np.array(shift, float), up=up)


def is_red(image):
    return (image[..., 0] > 0.6) & (image[..., 1] < 0.2) & (image[..., 2] < 0.2)


def place_in(image):
    """(x, y) of the middle of the red pixels."""
    rows, columns = np.nonzero(is_red(image))
    return np.array([columns.mean(), rows.mean()])


def page_of(draw, *args, **options):
    file = io.BytesIO()
    draw(file, *args, **options)
    file.seek(0)
    return imread(file)[..., :3]


# ---- the view


@pytest.mark.parametrize("up", [(0, 0, 1), (0, -1, 0)])
@pytest.mark.parametrize("far", [
    np.array([[10_000.0, 20, 3]]),
    np.array([[0, 0, -1e7]]),
    np.broadcast_to(-UTM, (8000, 3)),  # returns of nothing, at (0, 0, 0) of the file
])  # fmt: skip
def test_far_outliers_do_not_shrink_the_view(far, up):
    points = tile()
    expected = picture.View(points, np.array(up, float))
    view = picture.View(np.concatenate([points, far]).astype(np.float32), np.array(up, float))
    np.testing.assert_allclose(view.axes, expected.axes)
    np.testing.assert_allclose(view.box, expected.box, atol=0.5)
    assert view.pixel(800, 600) < 1.05 * expected.pixel(800, 600)
    assert [view.low, view.high] == pytest.approx([expected.low, expected.high], abs=0.05)  # of the colours


def test_what_is_no_outlier():
    some = tile(1000)
    assert picture._are_near(some).all()
    tower = np.concatenate([some, [[30, 15, 120]]])  # four times as high as the tile is wide
    assert picture._are_near(tower).all()
    most = np.concatenate([np.zeros((900, 3)), some[:100]])
    assert picture._are_near(most).all()  # not the points that are no duplicates
    assert picture._are_near(np.ones((1, 3))).all() and picture._are_near(np.ones((7, 3))).all()


def test_the_whole_tile_is_seen():
    """A scan that is dense near the scanner, as those of terrestrial scanners are, loses none of its far parts."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-5, 5, (50_000, 3)) * [1, 1, 0.1]
    points[:2000, 0] = rng.uniform(5, 30, 2000) * rng.choice([-1, 1], 2000)
    points = points.astype(np.float32)
    view = picture.View(points, np.array([0.0, 0, 1]))
    flat = points @ view.axes.T
    inside = ((flat >= view.box[0] - 1e-3) & (flat <= view.box[1] + 1e-3))[:, :2].all(axis=1)
    assert inside.mean() > 0.99


# ---- scale bar and north


@pytest.mark.parametrize(("largest", "expected"), [
    (1, 1), (0.99, 0.5), (2.4, 2), (19.99, 10), (20, 20), (0.3, 0.2), (7e-7, 5e-7), (999, 500), (5e8, 5e8),
    (0.001, 0.001),
])  # fmt: skip
def test_round_lengths(largest, expected):
    assert picture.round_length(largest) == pytest.approx(expected)


@pytest.mark.parametrize(("length", "unit", "expected"), [
    (50, "m", "50 m"), (5000, "metre", "5 km"), (0.5, "Meter", "50 cm"), (0.002, "m", "2 mm"), (1, "m", "1 m"),
    (0.01, "m", "1 cm"), (2e-4, "m", "0.2 mm"), (200, "ft", "200 ft"), (200, "US survey foot", "200 ft"),
    (20, None, "20 units"), (20, "chain", "20 chain"),
])  # fmt: skip
def test_lengths_with_their_unit(length, unit, expected):
    assert picture.length_words(length, unit) == expected


def marked(points, at):
    """Colours that are red near a point, grey elsewhere."""
    near = np.linalg.norm(points - at, axis=1) < 1.0
    return np.where(near[:, None], np.array(RED), np.array(GRAY)).astype(np.uint8)


def test_the_scale_bar_has_the_length_that_it_says():
    points = tile(15_000, (60, 30, 0.1))
    view = picture.View(points, np.array([0.0, 0, 1]))
    ends = np.array([[10, 15, 0.05], [50, 15, 0.05]])
    pages = [
        page_of(picture.draw_classes, "", "", cloud_of(points), [("a", marked(points, end))],
                [[("a", "1 %", np.array(GRAY))]], theme="light", unit="m", width=500)
        for end in ends
    ]  # fmt: skip
    apart = np.subtract(*[place_in(page) for page in pages])
    level = abs((ends[1] - ends[0]) @ view.axes[0])  # the distance along the width of the image, 15 to 40 m
    assert 15 < level < 40
    dark = (pages[0] < 0.15).all(axis=2)[:, picture.MARGIN - 5 : 300]
    row = np.flatnonzero(dark.sum(axis=1) == dark.sum(axis=1).max())[0]  # of the bar
    bar = np.flatnonzero(dark[row])
    bar = bar[: 1 + np.argmax(np.append(np.diff(bar), 99) > 2)]  # without the letters after it
    metres = (np.ptp(bar) + 1 - 3) * level / abs(apart[0])  # between the middles of its ends, 3 pixels wide
    assert metres == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("up", [(0, 0, 1), (0, -1, 0)])
def test_the_pixels_of_a_length(up):
    """Against the image itself, also along the height, where lengths are seen obliquely."""
    points = tile(8000, (30, 30, 30))
    view = picture.View(points, np.array(up, float), cut=False)
    ends = np.array([[15, 15, 15], [15, 15, 15]]) + 10 * np.array([[-1], [1]]) * (view.axes[0] + view.axes[1])
    points = np.concatenate([points, *(end + 1e-3 * points[:200] for end in ends)]).astype(np.float32)
    # The marks are the last and nearest points.
    images = []
    for number in range(2):
        seen = np.full(points.shape, GRAY, np.uint8)
        begin = 8000 + 200 * number
        seen[begin : begin + 200] = RED
        moved = points.copy()
        moved[8000:] += 40 * view.axes[2]
        images.append(view.render(moved, seen, 0.4, 480, 360))
    apart = place_in(images[1]) - place_in(images[0])
    scale = picture.pixels_of_unit(view.box, 0.4, 480, 360)
    np.testing.assert_allclose(apart, [20 * scale, -20 * scale], atol=2)


def test_the_arrow_points_to_the_north():
    points = tile(10_000, (30, 60, 0.1))
    view = picture.View(points, np.array([0.0, 0, 1]))
    north, south = (place_in(view.render(points, marked(points, [15, y, 0]), 0.2, 600, 600)) for y in (50, 10))
    lines = []
    page = SimpleNamespace(line=lambda x, y: lines.append((x, y)), text=lambda *_, **__: None)
    picture.draw_north(page, view, 100, 100)
    (x, y), _ = lines
    arrow, seen = np.array([x[1] - x[0], y[1] - y[0]]), north - south
    assert arrow @ seen / np.linalg.norm(arrow) / np.linalg.norm(seen) > 0.999
    assert np.linalg.norm(arrow) > 40


def test_which_clouds_are_on_a_map():
    points = tile(10)
    assert picture.on_map(cloud_of(points, UTM)) and not picture.on_map(cloud_of(points))
    assert not picture.on_map(cloud_of(points, UTM, up=(0, -1, 0)))  # of a camera
    for kind, far, expected in (("projected", False, True), ("local", True, False), ("unknown", True, True)):
        cloud = cloud_of(points, UTM if far else (0, 0, 0))
        assert picture.on_map(replace(cloud, reference=Reference(None, kind, 1.0, None, "WKT"))) == expected


@pytest.mark.parametrize(("metres", "unit"), [
    (1.0, "m"), (0.3048, "ft"), (1200 / 3937, "ft"), (None, None), (0.01, None),
])  # fmt: skip
def test_the_unit_that_a_file_states(metres, unit):
    assert picture.unit_of(cloud_of(tile(3))) is None
    reference = Reference(None, "projected", metres, None, "WKT")
    assert picture.unit_of(replace(cloud_of(tile(3)), reference=reference)) == unit


# ---- segmented clouds


def segmented(true, classes, names=3):
    scores = None if true is None else voting.scores(voting.confusion(true, classes, names), "abcdefg"[:names])
    return segmentation.Segmented(
        cloud_of(tile(len(classes)), UTM), classes, np.bincount(classes, minlength=names), true, scores
    )


SETTINGS = from_dict({
    "data": {"train": ["a.laz"], "classes": {"sol": [2], "toit": [6], "eau": [9]}},
    "network": {"voxel_size": 1.0, "levels": 2},
})  # fmt: skip


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("labelled", [True, False, "not everywhere"])
def test_every_colour_is_in_the_legend_and_no_other(labelled, theme, monkeypatch):
    rng = np.random.default_rng(0)
    classes = rng.integers(2, size=5000)  # none of the third class
    true = None if not labelled else np.where(rng.random(5000) < 0.2, 1 - classes, classes)
    if labelled == "not everywhere":
        true[:100] = IGNORED
    calls = []
    monkeypatch.setattr(picture, "draw_classes", lambda *args, **options: calls.append((args, options)))
    segmentation.draw("a.png", "Title", segmented(true, classes), SETTINGS, theme=theme, unit="m")
    (((_, _, subtitle, _, panels, legend), options),) = calls
    drawn = {tuple(color) for _, of_points in panels for color in np.unique(of_points, axis=0)}
    entries = [entry for group in legend for entry in group]
    assert drawn == {tuple(color) for _, _, color in entries} and len(drawn) == len(entries)
    names = [name for name, _, _ in entries]
    assert names == ["sol", "toit"] + (["as labelled", "another class"] if labelled else []) + (
        ["of no class in the file"] if labelled == "not everywhere" else []
    )
    assert [panel for panel, _ in panels] == ["predicted", "labels", "where they differ"][: 3 if labelled else 1]
    share = f"{picture.share_words(np.mean(classes == 0))} %"
    assert entries[0][1].split(", labels ")[0] == share and options == {"theme": theme, "unit": "m", "width": None}
    assert ("mIoU" in subtitle) == bool(labelled) and "5,000 points" in subtitle
    expected = colors.class_colors(SETTINGS)
    assert (panels[0][1] == expected[classes]).all()
    if labelled:
        differs = (true != IGNORED) & (true != classes)
        np.testing.assert_array_equal((panels[2][1] == picture.rgb(picture.THEMES[theme].differs)).all(axis=1), differs)


def test_names_without_settings_have_colours_of_their_number(monkeypatch):
    calls = []
    monkeypatch.setattr(picture, "draw_classes", lambda *args, **_: calls.append(args))
    segmentation.draw("a.png", "", segmented(None, np.arange(3)), ["a", "b", "c"])
    assert (calls[0][4][0][1] == colors.distinct_colors(3)).all()


def test_shares():
    values = [0, 1e-5, 4e-4, 5e-4, 0.0123, 0.0994, 0.0996, 0.5, 0.994, 0.9951, 0.99999, 1]
    words = ["0", "<0.1", "<0.1", "0.1", "1.2", "9.9", "10", "50", "99", "99.5", "99.9", "100"]
    assert [*map(picture.share_words, values)] == words


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_themes(theme):
    rng = np.random.default_rng(0)
    classes = rng.integers(3, size=3000)
    image = page_of(segmentation.draw, "Title", segmented(None, classes), SETTINGS, theme=theme, width=400)
    background = picture.rgb(picture.THEMES[theme].background) / 255
    for corner in (
        image[:10, :10],
        image[-10:, -10:],
        image[picture.TOP : picture.TOP + 5, picture.MARGIN : picture.MARGIN + 5],
    ):
        np.testing.assert_allclose(corner, np.broadcast_to(background, corner.shape), atol=0.01)
    assert np.abs(image - background).max(axis=2).mean() > 0.05
    with pytest.raises(ValueError, match="theme: expected dark or light, got 'blue'"):
        segmentation.draw("a.png", "", segmented(None, classes), SETTINGS, theme="blue")


@pytest.mark.parametrize("number", [2, 15, 30, 45])
def test_confusion_matrices(number):
    """The cells are shaded by the shares of their rows, and a row without points is empty."""
    confusion = np.zeros((number, number), int)
    confusion[0, :2] = [1_000_000, 3_000_000]
    image = page_of(picture.draw_confusion, "", "", [f"$class {i}$" for i in range(number)], confusion, theme="light")
    cell = 92 if number <= 12 else 58 if number <= 24 else 38 if number <= 40 else 16
    left, top = picture.MARGIN + 250, picture.TOP + 50
    corners = np.array([image[top + cell * i + 3, left + cell * j + 3] for i in range(2) for j in range(2)])
    empty, full = (picture.rgb(getattr(picture.THEMES["light"], name)) / 255 for name in ("empty", "full"))
    shares = np.array([0.25, 0.75, 0, 0])[:, None]
    np.testing.assert_allclose(corners, empty + shares * (full - empty), atol=0.02)


def test_short_numbers():
    values = [0, 7, 9999, 10_000, 12_345, 999_999, 1_000_000, 23_456_789, 5_000_000_000]
    words = ["0", "7", "9999", "10.0k", "12.3k", "1000k", "1.0M", "23.5M", "5.0G"]
    assert [*map(picture._short_number, values)] == words

"""The made-up city: one world whatever box is asked for, and its files."""

import itertools

import numpy as np
import pytest

from kpcore import io, scenes
from kpcore.scenes.city import CELL, FIELDS

LOW, HIGH = (155_037.5, 463_002.25), (155_211.123, 463_120.0)
FEW = {"density": 1.0, "seed": 5}


def rows(cloud):
    """All values of the points in an order of their own."""
    values = np.column_stack([cloud.exact, cloud.labels, *(cloud.fields[name] for name in FIELDS)])
    return values[np.lexsort(values.T)]


def read(path):
    return io.read(path, fields=FIELDS, exact=True)


@pytest.fixture(scope="module")
def whole():
    return scenes.city(LOW, HIGH, **FEW)


def test_the_city_is_one_value_for_a_seed(whole):
    np.testing.assert_array_equal(rows(whole), rows(scenes.city(LOW, HIGH, **FEW)))
    other = scenes.city(LOW, HIGH, density=1.0, seed=6)
    assert len(np.intersect1d(whole.exact[:, 2], other.exact[:, 2])) < 0.5 * len(whole.points)


@pytest.mark.parametrize("number", [2, 3])
def test_boxes_have_the_points_of_the_world_in_them(whole, number):
    edges = [np.linspace(a, b, number + 1) for a, b in zip(LOW, HIGH, strict=True)]
    parts = [
        scenes.city((edges[0][i], edges[1][j]), (edges[0][i + 1], edges[1][j + 1]), **FEW)
        for i, j in itertools.product(range(number), repeat=2)
    ]
    assert all(len(part.points) for part in parts)
    values = np.concatenate([rows(part) for part in parts])
    np.testing.assert_array_equal(values[np.lexsort(values.T)], rows(whole))
    assert len(np.unique(values, axis=0)) == len(values)


def test_a_box_is_half_open_and_holds_all_of_its_points(whole):
    assert (whole.exact[:, :2] >= LOW).all()
    assert (whole.exact[:, :2] < HIGH).all()
    wide = scenes.city(np.subtract(LOW, 200), np.add(HIGH, 100), **FEW)
    inside = ((wide.exact[:, :2] >= LOW) & (wide.exact[:, :2] < HIGH)).all(axis=1)
    assert inside.sum() == len(whole.points)
    on_an_edge = whole.exact[0, :2]
    assert len(scenes.city(on_an_edge, on_an_edge + 0.001, **FEW).points) == 1
    assert len(scenes.city(on_an_edge - 0.001, on_an_edge, **FEW).points) == 0


def test_no_two_cells_are_alike():
    cells = [(155_040, 463_040), (155_120, 463_040), (155_040, 463_120), (463_040, 155_040)]
    places = [scenes.city(low, np.add(low, CELL), **FEW).exact[:, :2] - low for low in cells]
    for one, other in itertools.combinations(places, 2):
        assert len(np.intersect1d(np.round(one[:, 0], 3), np.round(other[:, 0], 3))) < 0.2 * len(one)


def test_the_city_goes_on_beyond_the_origin():
    cloud = scenes.city((-100, -50), (100, 50), **FEW)
    quarters = [(cloud.exact[:, 0] < 0) & (cloud.exact[:, 1] < 0), (cloud.exact > 0)[:, :2].all(axis=1)]
    assert all(quarter.sum() > 0.2 * len(cloud.points) for quarter in quarters)


def test_the_cloud_is_the_exact_coordinates_less_the_shift(whole):
    assert (whole.points.dtype, whole.labels.dtype, whole.exact.dtype) == (np.float32, np.int32, np.float64)
    assert np.abs(whole.points + whole.shift - whole.exact).max() == whole.rounding < 1e-5
    np.testing.assert_array_equal(np.round(whole.exact, 3), np.round(whole.exact, 9))


@pytest.fixture(scope="module")
def town():
    return scenes.city((155_000, 463_000), (155_480, 463_480), density=6.0)


def of(cloud, name):
    return cloud.labels == scenes.CITY_CLASSES[name]


def test_the_city_has_all_classes_in_likely_shares(town):
    shares = {name: of(town, name).mean() for name in scenes.CITY_CLASSES}
    assert sum(shares.values()) == pytest.approx(1)
    assert 0.4 < shares["ground"] < 0.8
    assert 0.1 < shares["building"] < 0.4
    assert 0.04 < shares["vegetation"] < 0.3
    assert 0.005 < shares["car"] < 0.05
    assert 0.0005 < shares["wire"] < 0.01
    assert 0.00005 < shares["pole"] < 0.002


def test_density_is_of_pulses(town):
    first = town.fields["return_number"] == 1
    seen = first.sum() / 480**2
    assert 6.0 <= seen < 6.5  # the rest is on walls
    assert town.fields["return_number"].max() == town.fields["number_of_returns"].max() >= 4


def test_returns_of_a_pulse_are_counted_and_go_down(town):
    number, count, time = (town.fields[name] for name in ("return_number", "number_of_returns", "gps_time"))
    assert (number <= count).all()
    last = np.flatnonzero(number == count)
    starts = np.concatenate([[0], last[:-1] + 1])
    np.testing.assert_array_equal(number[starts], 1)
    np.testing.assert_array_equal(last - starts + 1, count[last])
    same = number[1:] > 1
    np.testing.assert_array_equal(time[1:][same], time[:-1][same])
    falls = np.diff(town.exact[:, 2])[same]
    assert (falls < 0.15).all()  # the noise
    assert falls.mean() < -0.5


def test_terrain_rolls_with_slopes_of_at_most_a_tenth(town):
    ground = town.exact[of(town, "ground")]
    at = ((ground[:, :2] - (155_000, 463_000)) // 40).astype(int) @ (12, 1)
    height = (np.bincount(at, ground[:, 2], 144) / np.bincount(at, minlength=144)).reshape(12, 12)
    assert np.ptp(height) > 2
    for axis in (0, 1):
        assert 0.5 < np.abs(np.diff(height, axis=axis)).max() < 0.1 * 40 + 0.12  # the kerb


def test_things_stand_on_the_ground_where_they_should(town):
    ground = town.exact[of(town, "ground")]

    def above(name):
        """Heights above the mean ground within the same 8 m."""
        where = [((points[:, :2] - (155_000, 463_000)) // 8).astype(int) @ (60, 1) for points in
                 (ground, town.exact[of(town, name)])]  # fmt: skip
        number = np.bincount(where[0], minlength=3600)
        mean = np.bincount(where[0], ground[:, 2], 3600) / np.maximum(number, 1)
        good = number[where[1]] > 20
        return (town.exact[of(town, name), 2] - mean[where[1]])[good]

    assert np.percentile(above("car"), [1, 99]) == pytest.approx([0.9, 2.2], abs=0.5)
    assert 7.0 < np.median(above("wire")) < 10.0
    assert np.percentile(above("building"), 90) > 5
    assert above("building").max() < 60
    assert 2 < np.median(above("vegetation")) < 8
    x = town.exact[of(town, "car"), 0] % CELL
    near_street = np.minimum(x, CELL - x) < 5
    assert near_street.mean() > 2 * 10 / CELL


def test_wires_sag_between_poles_and_continue_across_cells():
    world = scenes.city((155_000, 463_000), (155_800, 463_160), density=8.0)
    wire = world.exact[of(world, "wire")]
    along_y = np.abs(wire[:, 0] - np.median(wire[:, 0])) < 2
    wire = wire[along_y & (np.abs(wire[:, 0] - np.median(wire[along_y, 0])) < 0.1)]
    assert len(wire) > 150
    assert np.diff(np.sort(wire[:, 1])).max() < 4
    at = wire[:, 1] % 40  # poles stand at 20
    pole, middle = np.abs(at - 20) < 2, np.minimum(at, 40 - at) < 2
    highest = [np.percentile(wire[chosen, 2], 90) for chosen in (pole, middle)]
    assert 0.4 < highest[0] - highest[1] < 2.5


def test_objects_are_the_same_for_every_density():
    box = (155_080, 463_080), (155_160, 463_160)
    fine, coarse = (scenes.city(*box, density=density) for density in (16.0, 4.0))

    def roofs(cloud):
        chosen = cloud.exact[of(cloud, "building")]
        counts = np.zeros((20, 20), int)
        np.add.at(counts, tuple(((chosen[:, :2] - box[0]) // 4).astype(int).T), 1)
        return counts * (64 / np.count_nonzero(cloud.fields["return_number"] == 1) * 100)

    assert np.corrcoef(roofs(fine).ravel(), roofs(coarse).ravel())[0, 1] > 0.97


# ---- files


@pytest.mark.parametrize("name", ["a.las", "a.laz"])
def test_a_file_has_the_points_of_the_box(whole, tmp_path, name):
    assert scenes.write_city(tmp_path / name, LOW, HIGH, **FEW) == [tmp_path / name]
    np.testing.assert_array_equal(rows(read(tmp_path / name)), rows(whole))


def test_tiles_have_each_point_once(whole, tmp_path):
    files = scenes.write_city(tmp_path / "new" / "tiles", LOW, HIGH, tiles=(3, 2), **FEW)
    assert [file.name for file in files[:3]] == ["155038_463002.laz", "155038_463061.laz", "155095_463002.laz"]
    values = np.concatenate([rows(read(file)) for file in files])
    np.testing.assert_array_equal(values[np.lexsort(values.T)], rows(whole))


def test_buffered_tiles_repeat_the_points_near_their_edges(whole, tmp_path):
    files = scenes.write_city(tmp_path, LOW, HIGH, tiles=(2, 2), buffer=10.0, **FEW)
    edges = [np.linspace(a, b, 3) for a, b in zip(LOW, HIGH, strict=True)]
    everything = rows(whole)
    for file, (i, j) in zip(files, itertools.product(range(2), repeat=2), strict=True):
        low, high = (np.array([edges[0][i + at], edges[1][j + at]]) for at in (0, 1))
        inside = ((everything[:, :2] >= low - 10) & (everything[:, :2] < high + 10)).all(axis=1)
        np.testing.assert_array_equal(rows(read(file)), everything[inside])


def test_laspy_reads_the_files(whole, tmp_path):
    laspy = pytest.importorskip("laspy")
    (file,) = scenes.write_city(tmp_path / "a.laz", LOW, HIGH, **FEW)
    las = laspy.read(file)
    assert (str(las.header.version), las.header.point_format.id, len(las)) == ("1.4", 6, len(whole.points))
    xyz = np.column_stack([las.X, las.Y, las.Z]) / 1000
    np.testing.assert_allclose(las.xyz, xyz, rtol=1e-15)
    values = np.column_stack([xyz, las.classification, *(las[name] for name in FIELDS)])
    np.testing.assert_array_equal(values[np.lexsort(values.T)], rows(whole))
    np.testing.assert_allclose(las.header.mins, whole.exact.min(axis=0), rtol=1e-15)
    np.testing.assert_allclose(las.header.maxs, whole.exact.max(axis=0), rtol=1e-15)
    number = whole.fields["return_number"].astype(int)
    np.testing.assert_array_equal(las.header.number_of_points_by_return, np.bincount(number, minlength=16)[1:])
    assert las.header.global_encoding.gps_time_type == laspy.header.GpsTimeType.STANDARD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": LOW}, r"^low, high: expected a box of \(x, y\) within 2,000,000 m of the origin, low < high, got "),
        ({"high": (2.1e6, 463_100)}, "^low, high: expected a box"),
        ({"low": (np.nan, 0)}, "^low, high: expected a box"),
        ({"low": (0, 0, 0)}, "^low, high: expected a box"),
        ({"density": 0}, "^density: expected 0.01 to 1000 pulses per square metre, got 0$"),
        ({"seed": -1}, "^seed: expected at least 0, got -1$"),
        ({"tiles": (2, 0)}, r"^tiles: expected two numbers of at least 1, got \(2, 0\)$"),
        ({"tiles": (2, 1), "out": "a.laz"}, "^out: expected a folder for 2 x 1 tiles, got .*a.laz$"),
        ({"tiles": (2000, 1)}, r"^tiles: expected tiles of at least 1 m, got \(2000, 1\)$"),
        ({"buffer": -1}, "^buffer: expected a distance of at least 0, got -1$"),
    ],
)
def test_errors_name_the_argument(tmp_path, change, message):
    arguments = {"out": "tiles", "low": LOW, "high": HIGH} | change
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(ValueError, match=message):
        scenes.write_city(**arguments)
    assert not any(tmp_path.iterdir())

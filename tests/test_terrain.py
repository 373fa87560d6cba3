"""Heights above the ground: shapes whose heights are known, and ground that others have marked."""

import numpy as np
import pytest

import kpcore as kp

SIDE = 60  # metres, a point each metre unless said


def terrain(ground, objects=None, side=SIDE, step=1.0):
    """(points, true height of each) of a ground z(x, y) with objects above it; jittered inside cells, seed 0."""
    x, y = np.meshgrid(np.arange(0, side, step), np.arange(0, side, step))
    rng = np.random.default_rng(0)
    x, y = (axis.ravel() + rng.uniform(0.3, 0.7, axis.size) * step for axis in (x, y))
    height = np.zeros(len(x)) if objects is None else objects(x, y)
    return np.stack([x, y, ground(x, y) + height], axis=1), height


def flat(x, y):
    return np.zeros_like(x)


def block(x, y):
    return np.where((abs(x - 30) < 6) & (abs(y - 25) < 8), 7.0, 0.0)


@pytest.mark.parametrize("rise", [0.0, 0.1, 0.25])
def test_a_building_on_a_slope(rise):
    points, true = terrain(lambda x, y: rise * x - 0.5 * rise * y, block)
    height = kp.height_above_ground(points, slope=0.3)
    # The ground is known once a cell, somewhere in it: to within the rise in a cell.
    assert abs(height - true).max() <= 2 * rise + 1e-9


def test_a_building_wider_than_the_window_is_ground():
    points, true = terrain(flat, block)
    assert np.median(kp.height_above_ground(points, window=8.0)[true > 0]) == 0


def test_a_bridge_over_a_road():
    """The deck has a height above the road below it and above the fields beside."""
    points, _ = terrain(flat)
    along = np.arange(0, SIDE, 0.5)
    deck = np.stack(np.meshgrid(along, np.arange(25, 35, 0.5)), axis=-1).reshape(-1, 2)
    deck = np.column_stack([deck, np.full(len(deck), 6.0)])
    below = (points[:, 0] > 20) & (points[:, 0] < 40)  # elsewhere the deck hides the ground
    hidden = (points[:, 1] > 24) & (points[:, 1] < 36) & ~below
    height = kp.height_above_ground(np.concatenate([points[~hidden], deck]))
    assert abs(height[-len(deck) :] - 6).max() < 1e-9
    assert abs(height[: -len(deck)]).max() < 1e-9


def test_noise_below_the_ground():
    points, true = terrain(lambda x, y: 0.1 * x, block)
    noise = np.array([[10.2, 10.4, -30.0], [44.0, 50.0, -8.0], [30.0, 25.0, -50.0], [0.0, 0.0, -12.0]])
    height = kp.height_above_ground(np.concatenate([points, noise]))
    assert abs(height[:-4] - true).max() < 0.5
    assert (height[-4:] < -5).all()


def test_a_hole_in_a_slope_is_filled():
    points, true = terrain(lambda x, y: 0.2 * x)
    water = (abs(points[:, 0] - 30) < 12) & (abs(points[:, 1] - 30) < 12)
    over = np.array([[30.0, 30.0, 6.0 + 5.0]])  # a bird above the water: 5 m
    height = kp.height_above_ground(np.concatenate([points[~water], over]))
    assert abs(height[:-1] - true[~water]).max() < 0.5
    assert height[-1] == pytest.approx(5, abs=1.5)


def test_the_lattice_is_that_of_the_map():
    """Raised, or moved by a whole number of cells, as neighbouring tiles are: the same heights but for roundings."""
    points, _ = terrain(lambda x, y: 0.1 * x, block)
    height = kp.height_above_ground(points)
    for moved in ([0, 0, 100], [0, 0, 100.3], [84_900, 447_300, -3]):
        assert kp.height_above_ground(points + moved) == pytest.approx(height, abs=1e-9)


def test_other_units():
    """All lengths in feet."""
    points, _ = terrain(lambda x, y: 0.1 * x, block)
    feet = kp.height_above_ground(points / 0.3048, cell=1 / 0.3048, window=40 / 0.3048)
    assert feet * 0.3048 == pytest.approx(kp.height_above_ground(points), abs=1e-9)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (np.zeros((0, 3)), []),
        (np.array([[5.0, 5.0, 2.0]]), [0]),
        (np.array([[5.0, 5.0, 2.0], [5.0, 5.0, 3.0]]), [0, 1]),
        (np.array([[0.5, 0.5, 1.0], [9.5, 0.5, 1.0], [4.5, 0.5, 1.5]], np.float32), [0, 0, 0.5]),
    ],
)
def test_few_points(points, expected):
    height = kp.height_above_ground(points)
    assert height.dtype == np.float64
    assert height == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (np.zeros((3, 2)), {}, r"points: expected \(N, D\) with D = 3"),
        (np.zeros((3, 3), int), {}, "points: expected"),
        (np.array([[0, 0, np.nan]]), {}, "points"),
        (np.zeros((3, 3)), {"cell": 0}, "cell: expected a finite number above zero, got 0"),
        (np.zeros((3, 3)), {"window": -1}, "window: expected a finite number above zero, got -1"),
        (np.zeros((3, 3)), {"slope": -1}, "slope"),
    ],
)
def test_what_is_refused(points, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kp.height_above_ground(points, **options)


@pytest.mark.parametrize(("sample", "most"), [("samp11", 0.14), ("samp12", 0.035)])
def test_ground_that_others_marked(sample, most, shared):
    """Samples of the ISPRS test of filters, a steep slope with houses (samp11) and a town: points below half a metre
    are those that were marked as ground, but for the fraction `most`."""
    points, ground = (
        (cloud := kp.io.read(shared / f"data/isprs_terrain/{sample}-utm{what}.pcd")).points + cloud.shift
        for what in ("", "-ground")
    )
    is_ground = kp.radius_search(ground, points, 1e-3).counts > 0
    assert ((kp.height_above_ground(points) < 0.5) != is_ground).mean() < most


def test_tiles_and_points_far_away(monkeypatch):
    points, _ = terrain(lambda x, y: 0.05 * x, block)
    whole = kp.height_above_ground(points, window=20.0)
    far = np.array([[1e7, -3e6, 5.0], [-2e8, 4e8, -7.0]])
    with_far = kp.height_above_ground(np.concatenate([points, far]), window=20.0)
    assert abs(with_far[:-2] - whole).max() < 0.11 and (with_far[-2:] == 0).all()
    monkeypatch.setattr(kp.terrain, "_TILE", 32)
    monkeypatch.setattr(kp.terrain, "_MARGIN", 1.0)
    order = np.random.default_rng(0).permutation(len(points))
    tiled = kp.height_above_ground(points[order], window=8.0)
    assert abs(tiled - kp.height_above_ground(points, window=8.0)[order]).max() < 1e-12
    monkeypatch.setattr(kp.terrain, "_TILE", 1024)
    whole = kp.height_above_ground(points, window=8.0)[order]
    assert abs(tiled - whole).max() < 0.11  # the rise in two cells, where a margin ends
    with pytest.raises(ValueError, match=r"cell: expected a side with which the points lie within 2\*\*50 cells"):
        kp.height_above_ground(points * 1e15, cell=1e-3)

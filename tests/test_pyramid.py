"""build_pyramid against results of the published pipeline, and calibrate_neighbor_limits against its rule."""

import pickle
from pathlib import Path

import clouds
import numpy as np
import pytest
import reference
from reference import assert_same_bits

import kpcore as kp

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {"conv_radius": 2.5, "deform_radius": 4.0}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def renumbered_sets(padded, queries, new_index, num_points):
    """The set of neighbours of each of `queries`, with point i renumbered to ``new_index[i]``."""
    rows = [{int(new_index[i]) for i in row if i < num_points} for row in padded]
    return [rows[q] for q in queries]


def matching(ours, published):
    """For each of our points the index of the same point, up to rounding, in the published result."""
    a, b = (np.lexsort(np.round(p.astype(np.float64), 5).T) for p in (ours, published))
    assert len(a) == len(b) and np.abs(ours[a] - published[b]).max(initial=0) < 1e-6
    number = np.empty(len(a), int)
    number[a] = b
    return number


@pytest.mark.parametrize(("name", "deform_levels"), [("network_kpcnn", (2, 3)), ("network_kpfcnn", (2, 3))])
def test_the_published_pyramid(name, deform_levels):
    g = golden(name)
    pyramid = kp.build_pyramid(
        g["points/0"],
        row_splits=kp.row_splits(g["lengths/0"]),
        voxel_size=0.03,
        num_levels=4,
        subsampled=True,
        origin="published",
        deform_levels=deform_levels,
        **SETTINGS,
    )
    numbers = [matching(level.points, g[f"points/{i}"]) for i, level in enumerate(pyramid)]
    for i, level in enumerate(pyramid):
        assert kp.lengths(level.row_splits).tolist() == g[f"lengths/{i}"].tolist()
        n = len(level.points)
        inverse = np.argsort(numbers[i])
        ours = [set(row[row < n].tolist()) for row in level.neighbors.to_padded()]
        assert ours == renumbered_sets(g[f"neighbors/{i}"], numbers[i], inverse, n)
        if i == 3:
            assert level.pools is None and level.upsamples is None
            continue
        ours = [set(row[row < n].tolist()) for row in level.pools.to_padded()]
        assert ours == renumbered_sets(g[f"pools/{i}"], numbers[i + 1], inverse, n)
        nearest = level.upsamples.index
        assert level.upsamples.counts.tolist() == [1] * n
        assert np.argsort(numbers[i + 1])[g[f"upsamples/{i}"][numbers[i], 0]].tolist() == nearest.tolist()


@pytest.mark.parametrize("origin", [0, "published"])
def test_levels_are_the_functions_one_by_one(origin):
    points, _ = clouds.uniform(3000, dtype=np.float64)
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(3000, 2)), rng.integers(0, 5, 3000)
    splits = np.array([0, 1000, 1000, 3000])
    limits = [9, 20, 400]
    pyramid = kp.build_pyramid(
        points, voxel_size=0.06, num_levels=3, row_splits=splits, features=features, labels=labels,
        neighbor_limits=limits, deform_levels=[1], origin=origin,
    )  # fmt: skip
    assert len(pyramid) == 3
    for i, (level, radius) in enumerate(zip(pyramid, (2.5 * 0.06, 5 * 0.12, 2.5 * 0.24), strict=True)):
        sub = kp.grid_subsample(points, 0.06 * 2**i, features=features, labels=labels, row_splits=splits, origin=origin)
        points, features, labels, splits = sub[:4]
        for name in ("points", "features", "labels", "row_splits"):
            assert_same_bits(getattr(level, name), getattr(sub, name))
        assert (level.voxel_size, level.radius) == (0.06 * 2**i, radius)
        options = {"max_neighbors": limits[i], "points_row_splits": splits}
        expected = kp.radius_search(points, None, radius, **options)
        assert_same_bits(level.neighbors.index, expected.index)
        if i < 2:
            following = pyramid[i + 1]
            options["queries_row_splits"] = following.row_splits
            assert_same_bits(level.pools.index, kp.radius_search(points, following.points, radius, **options).index)
            nearest = reference.knn_search(
                following.points, points, 1, points_row_splits=following.row_splits, queries_row_splits=splits
            )[0]
            reference.assert_rows(level.upsamples, nearest)


@pytest.mark.parametrize("limits", [None, (20, 5, 3)])
def test_lists_for_convolutions_that_upsample(limits):
    points, _ = clouds.uniform(1000)
    splits = np.array([0, 300, 300, 1000])
    settings = {"voxel_size": 0.1, "num_levels": 3, "row_splits": splits, "deform_levels": [1]}
    nearest = kp.build_pyramid(points, **settings, neighbor_limits=limits)
    pyramid = kp.build_pyramid(points, **settings, neighbor_limits=limits, upsample_levels=[0])
    fine, coarse = pyramid[:2]
    expected = kp.radius_search(
        coarse.points, fine.points, 5 * 0.2, points_row_splits=coarse.row_splits, queries_row_splits=fine.row_splits,
        max_neighbors=limits and limits[1]
    )  # fmt: skip
    for name in ("index", "row_splits"):
        assert_same_bits(getattr(fine.upsamples, name), getattr(expected, name))
        for number in range(3):
            for kind in ("neighbors", "pools", "upsamples")[: 3 if number == 1 else 2 if number == 0 else 1]:
                assert_same_bits(*(getattr(getattr(p[number], kind), name) for p in (pyramid, nearest)))
    assert pyramid[2].upsamples is None


@pytest.mark.parametrize("limits", [None, (20, 9, 5)])
def test_an_exclusive_radius(limits):
    # Twice integers, so that the first two levels have the same points, and pairs at exactly the radius on every level.
    points = 2 * np.stack(np.meshgrid(*[np.arange(9.0)] * 3), -1).reshape(-1, 3)
    sizes = {"voxel_size": 1.0, "num_levels": 3, "conv_radius": 2.0}
    settings = {"row_splits": np.array([0, 243, 729]), "subsampled": True, "upsample_levels": [0]}
    settings |= sizes | {"neighbor_limits": limits}
    pyramid, inclusive = (kp.build_pyramid(points, **settings, inclusive=i) for i in (False, True))

    def check(got, number, queries, largest):
        level = pyramid[number]
        options = {"points_row_splits": level.row_splits, "queries_row_splits": queries.row_splits, "inclusive": False}
        limit = limits and limits[number]
        expected = reference.radius_search(level.points, queries.points, level.radius, max_neighbors=limit, **options)
        reference.assert_rows(got, expected[0])
        assert limits or got.num_pairs < largest.num_pairs

    for number, (level, other) in enumerate(zip(pyramid, inclusive, strict=True)):
        check(level.neighbors, number, level, other.neighbors)
        if number < 2:
            check(level.pools, number, pyramid[number + 1], other.pools)
    check(pyramid[0].upsamples, 1, pyramid[0], inclusive[0].upsamples)
    for inclusive, most in ((True, 7), (False, 1)):
        assert kp.calibrate_neighbor_limits([points], **sizes, fraction=1.0, inclusive=inclusive)[0] == most


def lattice():
    """Two float32 scans on a lattice; most points lie on the faces of voxels."""
    steps = np.random.default_rng(0).integers(0, 32, (2, 800, 3)) * 0.0125
    return (np.array([0.3, -0.3])[:, None, None] + steps).astype(np.float32)


@pytest.mark.parametrize("subsampled", [False, True])
def test_every_level_has_the_published_origin_of_its_points(subsampled):
    scans, splits = lattice(), np.array([0, 800, 800, 1600])
    settings = {"voxel_size": 0.025, "num_levels": 4, "row_splits": splits, "subsampled": subsampled}
    pyramid = kp.build_pyramid(scans.reshape(-1, 3), origin="published", **settings)
    at_zero = kp.build_pyramid(scans.reshape(-1, 3), **settings)
    points = scans.reshape(-1, 3)
    for number, level in enumerate(pyramid):
        if number or not subsampled:
            expected = reference.grid_subsample(points, 0.025 * 2**number, row_splits=splits, origin="published")
            assert_same_bits(level.row_splits, expected["row_splits"])
            reference.assert_close(level.points, expected["points"], 6e-8)
        points, splits = level.points, level.row_splits
    assert any(len(a.points) != len(b.points) for a, b in zip(pyramid, at_zero, strict=True))


@pytest.mark.parametrize("origin", [0, 0.0, "published"])
def test_limits_are_of_the_same_pyramid(origin):
    scans = lattice()
    limits = kp.calibrate_neighbor_limits(scans, voxel_size=0.025, num_levels=2, fraction=1.0, origin=origin)
    counts = [
        [level.neighbors.counts.max() for level in kp.build_pyramid(s, voxel_size=0.025, num_levels=2, origin=origin)]
        for s in scans
    ]
    assert limits == np.max(counts, 0).tolist()
    other = kp.calibrate_neighbor_limits(
        scans, voxel_size=0.025, num_levels=2, fraction=1.0, origin=0 if origin else "published"
    )
    assert limits != other


@pytest.mark.parametrize("origin", [0.1, None, "Published", (0, 0, 0), np.zeros((1, 3))])
def test_origins_that_no_pyramid_has(origin):
    for call in (kp.build_pyramid, lambda p, **more: kp.calibrate_neighbor_limits([p], **more)):
        with pytest.raises(ValueError, match="origin: expected 0 or 'published', got "):
            call(clouds.uniform(10)[0], voxel_size=0.1, num_levels=1, origin=origin)


@pytest.mark.parametrize("name", ["empty", "one_point", "all_equal", "collinear", "cluster_and_outliers"])
def test_nasty_clouds(name):
    points, _ = clouds.nasty(name)
    pyramid = kp.build_pyramid(points, voxel_size=0.01, num_levels=5)
    assert len(pyramid) == 5
    for level in pyramid:
        assert level.neighbors.counts.min(initial=1) >= 1


def test_a_pyramid_goes_through_a_worker_without_growing():
    points, _ = clouds.uniform(5000)
    pyramid = kp.build_pyramid(points, voxel_size=0.03, num_levels=3)
    pyramid[0].neighbors.transpose()
    data = pickle.dumps(pyramid)
    arrays = [
        array
        for level in pyramid
        for array in (level.points, level.row_splits, *(
            part for nb in (level.neighbors, level.pools, level.upsamples) if nb for part in (nb.index, nb.row_splits)
        ))
    ]  # fmt: skip
    assert len(data) < sum(array.nbytes for array in arrays) + 10_000
    copy = pickle.loads(data)
    for ours, copied in zip(pyramid, copy, strict=True):
        assert_same_bits(ours.points, copied.points)
        assert_same_bits(ours.neighbors.index, copied.neighbors.index)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 1.0])
def test_limits_leave_a_fraction_untouched(fraction):
    sample = [clouds.uniform(1000, seed=i)[0] for i in range(3)]
    limits = kp.calibrate_neighbor_limits(sample, voxel_size=0.05, num_levels=3, fraction=fraction)
    for number, limit in enumerate(limits):
        counts = np.concatenate(
            [kp.build_pyramid(c, voxel_size=0.05, num_levels=3)[number].neighbors.counts for c in sample]
        )
        # The published rule: the number of bins of the histogram whose cumulative sum is below the fraction.
        below = np.cumsum(np.bincount(counts)) < fraction * len(counts)
        assert limit == below.sum()
        assert np.mean(counts <= limit) >= fraction > np.mean(counts <= limit - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_levels": 0}, "num_levels: expected 1 to 64"),
        ({"neighbor_limits": [1]}, "neighbor_limits: expected 2 numbers"),
        ({"neighbor_limits": [1, -1]}, "neighbor_limits: expected at least 0"),
        ({"deform_levels": [2]}, "deform_levels: expected 0 to 1"),
        ({"conv_radius": 0}, "conv_radius: expected a finite number above zero"),
        ({"voxel_size": -1}, "voxel_size: expected a finite number above zero"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        kp.build_pyramid(clouds.uniform(10)[0], **{"voxel_size": 0.1, "num_levels": 2} | options)


def test_limits_need_some_points():
    with pytest.raises(ValueError, match="clouds: expected at least one point"):
        kp.calibrate_neighbor_limits([], voxel_size=0.1, num_levels=2)


@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize("subsampled", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", np.ones((4, 2), np.float32), ValueError),
        ("features", np.ones(5, np.float32), ValueError),
        ("features", np.ones((5, 2), np.int32), TypeError),
        ("labels", np.ones(6, np.int32), ValueError),
        ("labels", np.ones(5, np.float32), TypeError),
    ],
)
def test_features_and_labels_are_checked_on_every_way(num_levels, subsampled, name, value, error):
    points = np.random.default_rng(0).random((5, 3), np.float32)
    with pytest.raises(error, match=rf"^{name}: expected"):
        kp.build_pyramid(points, voxel_size=0.1, num_levels=num_levels, subsampled=subsampled, **{name: value})


@pytest.mark.parametrize("fraction", ["1", None, 10**400, np.nan, 0, 1.1])
def test_a_fraction_that_is_none_is_named(fraction):
    with pytest.raises((TypeError, ValueError), match=r"^fraction: expected"):
        kp.calibrate_neighbor_limits([], voxel_size=0.1, num_levels=1, fraction=fraction)

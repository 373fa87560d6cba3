"""Searches, indexes and Neighbors. Neighbours and their order are compared exactly."""

import itertools
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clouds
import numpy as np
import ops
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_rows, assert_same_bits

import kpcore as kp
from kpcore.backends import checks, cpu

both_dims = pytest.mark.parametrize("dim", [2, 3])
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
nasty_names = pytest.mark.parametrize("name", clouds.NASTY)


def check_search(points, queries, radius, engines=("function", "tree", "grid"), **options):
    """Assert that radius_search, with every index, equals brute force in neighbours, order and distances."""
    expected = reference.radius_search(points, queries, radius, **options)
    for neighbors in search_results("radius_search", engines, points, queries, radius, **options):
        assert_search_result(neighbors, expected, points)


def check_knn(points, queries, k, engines=("function", "tree"), **options):
    if not reference.is_measurable(points, queries, **options):
        for engine in engines:
            with pytest.raises(ValueError, match=r"points: expected .*distances that float.* rescale them"):
                next(search_results("knn_search", (engine,), points, queries, k, **options))
        return
    expected = reference.knn_search(points, queries, k, **options)
    for neighbors in search_results("knn_search", engines, points, queries, k, **options):
        assert_search_result(neighbors, expected, points)


def search_results(
    function, engines, points, queries, number, points_row_splits=None, queries_row_splits=None, **options
):
    """The results of a search function, and of the same method of every index that takes such points."""
    options["return_distances"] = True
    splits = {"points_row_splits": points_row_splits, "queries_row_splits": queries_row_splits}
    if "function" in engines:
        yield getattr(kp, function)(points, queries, number, **splits, **options)
    options["queries_row_splits"] = queries_row_splits
    if "tree" in engines:
        tree = kp.KDTree(points, row_splits=points_row_splits)
        yield getattr(tree, function)(queries, number, **options)
    if "grid" in engines and points.shape[1] in (2, 3):
        for cells in (1, 0.4, 7):
            cell = float(np.max(number) if np.ndim(number) == 0 or len(number) else 1) * cells
            grid = kp.GridIndex(points, cell, row_splits=points_row_splits)
            yield getattr(grid, function)(queries, number, **options)


def assert_search_result(neighbors, expected, points):
    rows, distances = expected
    assert_rows(neighbors, rows)
    assert neighbors.distance.dtype == points.dtype and not np.signbit(neighbors.distance).any()
    np.testing.assert_array_max_ulp(neighbors.distance, np.concatenate([*distances, np.empty(0, points.dtype)]), 1)
    assert neighbors.num_points == len(points)


# ---- against the brute force


@pytest.mark.parametrize("sort", ["index", "distance"])
@both_dtypes
@both_dims
@nasty_names
def test_nasty_clouds(name, dim, dtype, sort):
    check_search(*insert_none(clouds.nasty(name, dim, dtype)), sort=sort)


def insert_none(points_and_radius):
    points, radius = points_and_radius
    return points, None, radius


@pytest.mark.parametrize("num", clouds.SIZES)
@both_dims
def test_sizes_of_points_and_queries(dim, num):
    points, radius = clouds.uniform(num, dim)
    check_search(points, None, radius)
    check_search(points, clouds.uniform(70, dim, seed=1)[0], radius)
    check_search(clouds.uniform(70, dim, seed=1)[0], points, radius)


@pytest.mark.parametrize("sort", ["index", "distance"])
@pytest.mark.parametrize("max_neighbors", [0, 1, 2, 7, 8, 9, 40, 1000, 2**40])
@pytest.mark.parametrize("name", ["duplicates", "lattice_ties", "all_equal", "mixed_density", "far_away"])
def test_max_neighbors_keeps_the_nearest_ties_by_index(name, max_neighbors, sort):
    points, radius = clouds.nasty(name)
    check_search(points, None, radius, max_neighbors=max_neighbors, sort=sort)


def test_max_neighbors_of_64_bits():
    points, radius = clouds.uniform(50)
    check_search(points, None, radius, max_neighbors=2**63 - 1)
    with pytest.raises(ValueError, match="max_neighbors"):
        kp.radius_search(points, None, radius, max_neighbors=2**63)


@given(st.data())
def test_any_cloud_any_options(data):
    points, radius = data.draw(clouds.clouds())
    queries = data.draw(
        st.none() | st.just(points[::3]) | clouds.clouds(points.shape[1], points.dtype.type).map(lambda c: c[0])
    )
    options = {
        "max_neighbors": data.draw(st.none() | st.integers(1, 20)),
        "sort": data.draw(st.sampled_from(["index", "distance"])),
    }
    if data.draw(st.booleans()):
        options["points_row_splits"] = data.draw(clouds.row_splits_of(len(points)))
        if queries is not None:
            num_items = len(options["points_row_splits"]) - 1
            options["queries_row_splits"] = data.draw(clouds.row_splits_of(len(queries), num_items))
    check_search(points, queries, radius * data.draw(st.sampled_from([0.5, 1, 1, 2])), **options)


@pytest.mark.parametrize("queries", [np.empty((0, 3)), np.full((5, 3), 9.0)])
def test_queries_that_find_nothing(queries):
    check_search(clouds.uniform(100, dtype=np.float64)[0], queries, 0.1)


@pytest.mark.parametrize("factor", [1e10, -1e30, 3e38])
def test_queries_and_points_very_far_from_each_other(factor):
    near, far = clouds.uniform(100)[0], clouds.uniform(100)[0] * np.float32(factor)
    check_search(near, far, 0.1)
    check_search(far, near, 0.1)
    check_search(np.concatenate([near, far, -far]), None, 0.1)


def test_queries_none_means_the_points():
    points, radius = clouds.nasty("lattice_ties")
    row_splits = np.array([0, 100, 100, len(points)])
    none = kp.radius_search(points, None, radius, points_row_splits=row_splits, return_distances=True)
    same = kp.radius_search(
        points, points, radius, points_row_splits=row_splits, queries_row_splits=row_splits, return_distances=True
    )
    for name in ("index", "row_splits", "distance"):
        assert_same_bits(getattr(same, name), getattr(none, name))


def test_the_radius_is_inclusive_and_the_query_its_own_neighbor():
    neighbors = kp.radius_search(np.array([[0.0, 0], [3, 4], [3, 4.0000001]]), None, 5, return_distances=True)
    assert neighbors.index[:2].tolist() == [0, 1]
    assert neighbors.distance[:2].tolist() == [0, 5]
    assert neighbors.counts.tolist() == [2, 3, 2]


@pytest.mark.parametrize("radius", [0.1, 0.3])
def test_a_radius_is_rounded_to_the_dtype_before_it_is_squared(radius):
    # Both are above themselves in float32, and float32(0.1 * 0.1) is below float32(0.1) * float32(0.1).
    points = np.float32([[0, 0], [radius, 0]])
    assert kp.radius_search(points, None, radius).num_pairs == 4


# ---- metrics, radii, ignored points, dimensions


metrics = pytest.mark.parametrize("metric", ["l2", "l1", "linf"])
ignoring = pytest.mark.parametrize("ignore", [True, "index"])


@pytest.mark.parametrize("sort", ["index", "distance"])
@metrics
@both_dtypes
@both_dims
@nasty_names
def test_nasty_clouds_in_any_metric(name, dim, dtype, metric, sort):
    points, radius = clouds.nasty(name, dim, dtype, num=150)
    check_search(points, None, radius, metric=metric, sort=sort)


@metrics
@ignoring
@pytest.mark.parametrize("name", ["duplicates", "all_equal", "lattice_ties", "one_point", "empty"])
def test_ignored_points(name, ignore, metric):
    points, radius = clouds.nasty(name)
    for max_neighbors in (None, 3):
        check_search(points, None, radius, metric=metric, ignore_query_point=ignore, max_neighbors=max_neighbors)
    check_knn(points, None, 4, metric=metric, ignore_query_point=ignore)
    check_search(points, points[::-1].copy(), radius, metric=metric, ignore_query_point=ignore)


@metrics
@both_dtypes
@both_dims
@pytest.mark.parametrize("name", ["empty", "duplicates", "lattice_ties", "mixed_density", "cluster_and_outliers"])
def test_a_radius_for_each_query(name, dim, dtype, metric):
    points, radius = clouds.nasty(name, dim, dtype)
    spread = np.random.default_rng(3).choice([0.3, 1, 1, 1.9, 30], len(points))
    for factor in (np.ones(len(points)), np.minimum(spread, 2), spread):
        check_search(points, None, (radius * factor).astype(dtype), metric=metric)
        check_search(points, points[::2].copy(), (radius * factor[::2]).astype(dtype), metric=metric, max_neighbors=5)


@metrics
@both_dtypes
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 16])
def test_any_dimension(dim, dtype, metric):
    points = np.random.default_rng(dim).uniform(0, 1, (400, dim)).astype(dtype)
    queries = np.random.default_rng(50).uniform(-0.2, 1.2, (90, dim)).astype(dtype)
    for radius in (0.1 * dim**0.5, 0.5 * dim**0.5):
        check_search(points, None, radius, metric=metric)
        check_search(points, queries, radius, metric=metric)
    for k in (1, 16):
        check_knn(points, None, k, metric=metric)
        check_knn(points, queries, k, metric=metric)


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@both_dtypes
@metrics
def test_zeros_of_either_sign_are_equal(metric, dtype, dim):
    points = np.round(np.random.default_rng(dim).normal(size=(200, dim))).astype(dtype)  # -0.3 becomes -0.0
    assert 0 < np.signbit(points[points == 0]).mean() < 1
    for queries in (None, points[::5] + dtype(0), -points[::5]):
        check_knn(points, queries, 9, metric=metric)
        for most in (None, 1, 2, 9):
            check_search(points, queries, 1.5, metric=metric, sort="distance", max_neighbors=most)
            check_search(points, queries, 1.5, metric=metric, ignore_query_point=True, max_neighbors=most)


# ---- an exclusive radius


def integers(dim, dtype, num=240, scale=1.0):
    """Points with integer coordinates, times a scale, some of them twice: many pairs are at exactly the radius 2."""
    return (np.random.default_rng(0).integers(0, {1: 60, 2: 9, 3: 5, 5: 3}[dim], (num, dim)) * scale).astype(dtype)


@metrics
@both_dtypes
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_an_exclusive_radius(dim, dtype, metric):
    # 0.1 has no exact square in either dtype: what rounding puts at exactly the radius is excluded, and nothing else.
    for scale in (1, 0.1):
        points = integers(dim, dtype, scale=scale)
        queries, radius = points[::3] + dtype(scale), 2 * scale
        excluded = [kp.radius_search(points, None, radius, metric=metric, inclusive=i).num_pairs for i in (True, False)]
        assert excluded[0] > excluded[1] > 0
        for sort in ("index", "distance"):
            check_search(points, None, radius, metric=metric, inclusive=False, sort=sort)
        check_search(points, queries, radius, metric=metric, inclusive=False, ignore_query_point=True)
        for most in (1, 5, 300):
            check_search(points, queries, radius, metric=metric, inclusive=False, max_neighbors=most)
        radii = (np.random.default_rng(1).integers(1, 4, len(queries)) * scale).astype(dtype)
        check_search(points, queries, radii, metric=metric, inclusive=False)
        check_search(points, queries, radii, metric=metric, inclusive=False, max_neighbors=5)
        splits, others = np.array([0, 100, 100, len(points)]), np.array([0, 20, 40, len(queries)])
        check_search(points, queries, radius, points_row_splits=splits, queries_row_splits=others, inclusive=False)


@metrics
@both_dtypes
@pytest.mark.parametrize("dim", [2, 3])
def test_an_exclusive_radius_in_a_crowd(dim, dtype, metric):
    # Many points in a cell: searches for a few of them take the kd-tree. All other points are at exactly the radius.
    corners = np.stack(np.meshgrid(*[[0, 1]] * dim), -1).reshape(-1, dim) * 2
    points = np.repeat(corners, 300, axis=0).astype(dtype)
    assert kp.GridIndex(points, 2.0)._index.crowding > 8 * (9 + 16)
    queries = np.concatenate([points[::100], points[:1] + dtype(1)])
    for most in (1, 9):
        check_search(points, queries, 2.0, metric=metric, max_neighbors=most, inclusive=False)
        check_search(points, queries, 2.0, metric=metric, max_neighbors=most, inclusive=False, ignore_query_point=True)
        radii = np.full(len(queries), 2, dtype)
        check_search(points, queries, radii, metric=metric, max_neighbors=most, inclusive=False, sort="distance")


def test_an_exclusive_radius_is_counted_and_estimated():
    points = integers(3, np.float64)
    expected = [len(row) for row in reference.radius_search(points, None, 2, inclusive=False)[0]]
    for search in (kp.GridIndex(points, 2).radius_search, kp.KDTree(points).radius_search):
        assert search(None, 2, count_only=True, inclusive=False).tolist() == expected
        assert search(None, 2, inclusive=False).counts.tolist() == expected
    two = np.repeat([[0.0, 0, 0], [1, 0, 0]], 6000, axis=0)
    kp.set_memory_limit(100 << 20)
    try:
        for inclusive, pairs in ((True, 144_000_000), (False, 72_000_000)):
            with pytest.raises(MemoryError, match=f"about {pairs} neighbours"):
                kp.radius_search(two, None, 1.0, inclusive=inclusive)
    finally:
        kp.set_memory_limit(None)


@pytest.mark.parametrize(("dtype", "radius"), [(np.float32, 1.6e-19), (np.float64, 2.2e-154), (np.float32, 1.84e19)])
def test_the_least_and_the_largest_exclusive_radius(dtype, radius):
    for metric in ("l2", "l1", "linf"):
        below = np.nextafter(dtype(radius), dtype(0))
        points = np.array([[0, 0, 0], [radius, 0, 0], [-below, 0, 0]], dtype)
        check_search(points, None, radius, ("function", "tree"), metric=metric, inclusive=False)
        check_search(points, None, radius, ("function", "tree"), metric=metric)


@pytest.mark.parametrize("case", ["one", "two", "tenth", "half_steps"])
def test_the_exclusive_radius_of_released_code(case):
    with np.load(Path(__file__).parent / "golden" / "clients_core.npz") as file:
        supports, queries, radius, expected = (
            file[f"kpconv/batch_query/exact_{case}/{name}"]
            for name in ("in/supports", "in/queries", "in/radius", "out/neighbors")
        )
    rows = [sorted(row[row < len(supports)].tolist()) for row in expected]
    got = kp.radius_search(supports, queries, float(radius), inclusive=False)
    assert [row.tolist() for row in np.split(got.index, got.row_splits[1:-1])] == rows
    assert kp.radius_search(supports, queries, float(radius)).num_pairs > got.num_pairs


def test_inclusive_is_true_or_false():
    for value in (0, 1, None, "no"):
        with pytest.raises(TypeError, match="inclusive: expected True or False, got "):
            kp.radius_search(np.zeros((2, 3)), None, 1.0, inclusive=value)
        with pytest.raises(TypeError, match="inclusive: expected True or False, got "):
            kp.build_pyramid(np.zeros((2, 3)), voxel_size=1.0, num_levels=1, inclusive=value)


# ---- outliers


def crowding(points, cell, row_splits=None):
    """Average number of points in the cell of a point; infinity if a kd-tree is used instead of a grid."""
    return kp.GridIndex(points, cell, row_splits=row_splits)._index.crowding


@pytest.mark.parametrize("num", [1, 5, 300])
@pytest.mark.parametrize("far", [1e6, 1e9, 1e15, 1e18])
@both_dtypes
@both_dims
def test_outliers_crowd_no_cell(dim, dtype, far, num):
    rng, radius = np.random.default_rng(0), 0.03
    points = rng.uniform(0, 1, (1500, dim)).astype(dtype)
    alone = crowding(points, radius)
    points[rng.permutation(1500)[:num]] = rng.choice([-1, 1], (num, dim)) * rng.uniform(0.5, 1, (num, dim)) * far
    got = crowding(points, radius)
    assert got == np.inf or got < 2 * alone
    queries = rng.uniform(0, 1, (400, dim)).astype(dtype)
    queries[:num] = points[:num] + dtype(radius / 2)
    check_search(points, None, radius, ("function", "grid"))
    check_search(points[num:], queries, radius, ("function", "grid"), sort="distance", max_neighbors=3)
    both = kp.GridIndex(points, radius)._search_points_and(queries, np.array([0, len(queries)]), radius, True, None)
    for neighbors, others in zip(both, (None, queries), strict=True):  # build_pyramid searches a level like this
        assert_rows(neighbors, reference.radius_search(points, others, radius)[0])


@both_dims
def test_queries_may_be_far_from_all_points(dim):
    rng, radius = np.random.default_rng(0), 0.2
    points = rng.uniform(0, 1, (400, dim))
    for far in (0.3, 1e3, 1e9, 1e15, 1e300):
        queries = rng.uniform(0, 1, (200, dim)) + rng.integers(-1, 2, (200, dim)) * far
        check_search(points, queries, radius)


@both_dims
@both_dtypes
def test_items_of_a_batch_may_lie_anywhere(dtype, dim):
    rng, radius = np.random.default_rng(0), 0.05
    local = rng.uniform(0, 1, (700, dim)) * ([1, 1, 0.01][:dim])
    items = [local, local + [4.5e5, 5.4e6, 100][:dim], np.empty((0, dim)), local[:200] - 1e5]
    items = [item.astype(dtype) for item in items]
    points, row_splits = np.concatenate(items), kp.row_splits([len(item) for item in items])
    alone = sum(len(item) * crowding(item, radius) for item in items) / len(points)
    assert crowding(points, radius, row_splits) == pytest.approx(alone)
    check_search(points, None, radius, points_row_splits=row_splits)
    check_search(points, points, radius, points_row_splits=row_splits, queries_row_splits=row_splits, max_neighbors=4)
    others = row_splits[::-1].max() - row_splits[::-1]  # queries of an item are far from the points of the same item
    check_search(points, points[::-1].copy(), radius, points_row_splits=row_splits, queries_row_splits=others)


def test_a_sparse_cloud_stays_in_cells():
    points = np.random.default_rng(0).uniform(0, 1, (500, 3))
    assert crowding(points, 1e-9) == 1  # the bounding box has 10^27 cells
    check_search(points, None, 1e-9)


# ---- distances that the dtype cannot hold

EXTREMES = [(np.float32, s) for s in (1e30, 3e38, 1e-22, 1e-30)] + [(np.float64, s) for s in (1e200, 1e-200)]


@pytest.mark.parametrize(("dtype", "scale"), EXTREMES)
def test_squares_that_overflow_or_vanish_are_an_error(dtype, scale):
    points = (np.random.default_rng(0).uniform(0, 1, (90, 3)) * scale).astype(dtype)
    queries, features, zero = points[::3].copy(), np.ones((90, 2)), np.zeros((1, 3), dtype)
    calls = {
        "knn_search": lambda: kp.knn_search(points, None, 4),
        "of queries": lambda: kp.knn_search(zero, queries, 1),
        "tree": lambda: kp.KDTree(points).knn_search(queries, 2),
        "grid": lambda: kp.GridIndex(points, 1.0).knn_search(None, 2),
        "interpolate": lambda: kp.interpolate(points, queries, features),
        "farthest points": lambda: kp.farthest_point_sampling(points, 5),
        "buckets": lambda: kp.farthest_point_sampling(points, 5, method="bucketed"),
    }
    if scale < 1:
        calls["nearest within"] = lambda: kp.radius_search(points, None, 1.0, max_neighbors=4)
        calls["of a crowd"] = lambda: kp.KDTree(points).radius_search(queries, 1.0, max_neighbors=4)
    convert = "convert them to float64 or " * (dtype == np.float32)
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        expected = (
            rf"points: expected squared distances that {np.dtype(dtype)} can hold, got points( and queries)? up to "
            rf"[\d.]+e[+-]\d+ apart; {convert}rescale them"
        )
        assert re.fullmatch(expected, str(caught.value)), (name, str(caught.value))


@pytest.mark.parametrize(("dtype", "scale"), EXTREMES)
def test_what_does_not_overflow_is_found_at_any_scale(dtype, scale):
    rng = np.random.default_rng(0)
    points = (rng.uniform(0, 0.3, (90, 3)) * scale).astype(dtype)
    for metric in ("l1", "linf"):  # these do not square distances
        check_knn(points, points[::3].copy(), 4, metric=metric)
    radius = {np.float32: 1e18, np.float64: 1e150}[dtype]
    check_search(points, None, radius)  # a distance that overflows is beyond the radius, one that vanishes within
    if scale > 1:
        check_search(points, None, radius, max_neighbors=4, sort="distance")
    same = np.full((90, 3), scale, dtype)
    check_knn(same, None, 4)
    assert kp.farthest_point_sampling(same, 4).index.tolist() == [0, 1, 2, 3]


def test_the_item_with_squares_that_overflow_is_named():
    points = np.random.default_rng(0).uniform(0, 1, (90, 3)).astype(np.float32)
    points[50:60] *= np.float32(1e25)
    splits = np.array([0, 50, 50, 60, 90])
    for call in (lambda: kp.knn_search(points, None, 3, points_row_splits=splits),
                 lambda: kp.farthest_point_sampling(points, 3, row_splits=splits)):  # fmt: skip
        with pytest.raises(ValueError, match=r"points: .* got points up to .*e\+25 apart in item 2; convert them"):
            call()
    near = np.array([0, 5, 5, 5, 9])  # no queries in item 2
    check_knn(points, points[:9], 3, points_row_splits=splits, queries_row_splits=near)
    check_knn(points, points[:0], 3)
    # Items are far from each other, but the points within an item are not.
    points[50:60] = points[0] + np.float32(1e25)
    check_knn(points, None, 3, points_row_splits=splits)


# ---- the k nearest


@pytest.mark.parametrize("k", [1, 2, 16, 200, 10_000])
@metrics
@both_dtypes
@both_dims
@nasty_names
def test_nearest_of_nasty_clouds(name, dim, dtype, metric, k):
    check_knn(clouds.nasty(name, dim, dtype, num=150)[0], None, k, metric=metric)


@pytest.mark.parametrize("num", clouds.SIZES)
def test_nearest_with_sizes_of_points_and_queries(num):
    points, queries = clouds.uniform(num)[0], clouds.uniform(70, seed=1)[0]
    check_knn(points, None, 7)
    check_knn(points, queries, 7)
    check_knn(queries, points, 7)


@given(st.data())
def test_nearest_of_any_cloud(data):
    points, _ = data.draw(clouds.clouds())
    queries = data.draw(
        st.none() | st.just(points[::3]) | clouds.clouds(points.shape[1], points.dtype.type).map(lambda c: c[0])
    )
    options = {
        "metric": data.draw(st.sampled_from(["l2", "l1", "linf"])),
        "ignore_query_point": data.draw(st.sampled_from([False, True])),
    }
    if data.draw(st.booleans()):
        options["points_row_splits"] = data.draw(clouds.row_splits_of(len(points)))
        if queries is not None:
            num_items = len(options["points_row_splits"]) - 1
            options["queries_row_splits"] = data.draw(clouds.row_splits_of(len(queries), num_items))
    check_knn(points, queries, data.draw(st.integers(1, 40)), **options)


@pytest.mark.parametrize("factor", [1e10, -1e30, 3e38])
def test_nearest_of_queries_very_far_away(factor):
    near, far = clouds.uniform(100)[0], clouds.uniform(100)[0] * np.float32(factor)
    for points, queries in ((near, far), (far, near), (np.concatenate([near, far, -far]), None)):
        check_knn(points, queries, 5)


@both_dtypes
@pytest.mark.parametrize("name", ["uniform", "lattice", "plane"])
def test_nearest_are_the_same_bits_with_any_instructions_and_threads(name, dtype, set_isa, set_threads):
    points, _ = DECISIONS[name](dtype)
    results = []
    for isa, threads in itertools.product(cpu.isas(), (1, 2, 3)):
        set_isa(isa)
        set_threads(threads)
        results.append(kp.knn_search(points, None, 9, return_distances=True))
    for part in ("index", "row_splits", "distance"):
        for other in results[1:]:
            assert_same_bits(getattr(other, part), getattr(results[0], part))


# ---- k nearest in more than 16 dimensions: a product selects, and the formula decides

WIDE = [name for name in clouds.NASTY if "lattice" not in name]  # a lattice in 17 dimensions has 131,072 points
ADVERSE = {  # distances closer to each other than the rounding error of |x|^2 + |q|^2 - 2 x.q, or equal
    "far from the origin": lambda rng, shape: 1e4 + 1e-2 * rng.normal(size=shape),
    "two far clusters": lambda rng, shape: rng.choice([-1e4, 1e4], (shape[0], 1)) + 1e-3 * rng.normal(size=shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "equal": lambda rng, shape: np.full(shape, 0.1),
    "repeated": lambda rng, shape: rng.normal(size=(20, shape[1]))[rng.integers(0, 20, shape[0])],
    "one-hot": lambda rng, shape: np.eye(shape[1])[rng.integers(0, shape[1], shape[0])],
    "integers": lambda rng, shape: rng.integers(0, 3, shape),
    "activations": lambda rng, shape: np.maximum(rng.normal(size=shape), 0) * (rng.random((shape[0], 1)) < 0.7),
    "an outlier": lambda rng, shape: rng.normal(size=shape) * np.where(np.arange(shape[0]) == 7, 1e6, 1)[:, None],
    "subnormal steps": lambda rng, shape: 1e-18 * (rng.random(shape) < 0.1) + 1e-42 * rng.integers(0, 9, shape),
    "nearly overflowing": lambda rng, shape: 1e18 / np.sqrt(shape[1]) * rng.normal(size=shape),
    "one axis": lambda rng, shape: rng.normal(size=(shape[0], 1)) * (np.arange(shape[1]) == shape[1] - 1),
}
wide_dims = pytest.mark.parametrize("dim", [17, 64, 131])


def check_wide(points, queries, k, **options):
    check_knn(points, queries, k, engines=("function",), **options)


@pytest.mark.parametrize("k", [1, 20, 10_000])
@wide_dims
@both_dtypes
@pytest.mark.parametrize("name", WIDE)
def test_nearest_in_many_dimensions(name, dtype, dim, k):
    check_wide(clouds.nasty(name, dim, dtype, num=250)[0], None, k)


@ignoring
@pytest.mark.parametrize("k", [1, 9, 300])
@pytest.mark.parametrize("dim", [17, 40])
@both_dtypes
@pytest.mark.parametrize("name", ADVERSE)
def test_nearest_where_the_product_cannot_tell_points_apart(name, dtype, dim, k, ignore):
    points = ADVERSE[name](np.random.default_rng(dim), (300, dim)).astype(dtype)
    check_wide(points, None, k, ignore_query_point=ignore)


@both_dtypes
@pytest.mark.parametrize("dim", [17, 1024])
@pytest.mark.parametrize(("num", "num_queries"), [(1, 1), (63, 1), (65, 13), (700, 3), (13, 300), (0, 5), (5, 0)])
def test_sizes_of_wide_points_and_queries(num, num_queries, dim, dtype):
    rng = np.random.default_rng(num)
    points, queries = rng.normal(size=(num, dim)).astype(dtype), rng.normal(size=(num_queries, dim)).astype(dtype)
    for k in (1, num + 1):
        check_wide(points, queries, k)


@given(st.data())
def test_nearest_in_any_number_of_dimensions(data):
    dtype, dim, num = data.draw(clouds.float_types), data.draw(st.integers(17, 80)), data.draw(st.integers(0, 150))
    rng = np.random.default_rng(data.draw(clouds.seeds))
    points = ADVERSE[data.draw(st.sampled_from(sorted(ADVERSE)))](rng, (num, dim)).astype(dtype)
    queries = data.draw(st.sampled_from([None, points[::3], points + dtype(1)]))
    options = {"ignore_query_point": data.draw(st.sampled_from([False, True]))}
    if data.draw(st.booleans()):
        options["points_row_splits"] = data.draw(clouds.row_splits_of(num))
        if queries is not None:
            items = len(options["points_row_splits"]) - 1
            options["queries_row_splits"] = data.draw(clouds.row_splits_of(len(queries), items))
    check_wide(points, queries, data.draw(st.integers(1, 40)), **options)


@both_dtypes
@pytest.mark.parametrize("name", ["two far clusters", "activations", "repeated"])
def test_wide_batches_with_empty_items(name, dtype):
    points = ADVERSE[name](np.random.default_rng(4), (600, 21)).astype(dtype)
    points_row_splits = np.array([0, 0, 210, 210, 215, 600, 600])
    check_wide(points, None, 8, points_row_splits=points_row_splits, ignore_query_point="index")
    queries, queries_row_splits = points[::2] + dtype(0.5), np.array([0, 20, 20, 45, 140, 300, 300])
    check_wide(points, queries, 8, points_row_splits=points_row_splits, queries_row_splits=queries_row_splits)
    check_wide(points, points[::-1].copy(), 300, points_row_splits=points_row_splits,
               queries_row_splits=np.array([0, 5, 10, 300, 301, 302, 600]), ignore_query_point="index")  # fmt: skip


@both_dtypes
@pytest.mark.parametrize("name", ["two far clusters", "activations", "integers"])
@pytest.mark.parametrize("dim", [1, 2, 3, 16])
def test_products_and_boxes_find_the_same_neighbors(dim, name, dtype, monkeypatch):
    points = ADVERSE[name](np.random.default_rng(dim), (900, dim)).astype(dtype)
    searches = [(points, None, 20), (points, points[::4] * dtype(1.1), 3)]
    by_boxes = [kp.knn_search(*search, return_distances=True) for search in searches]
    monkeypatch.setattr(checks, "DIMENSIONS", range(0))
    for search, expected in zip(searches, by_boxes, strict=True):
        by_product = kp.knn_search(*search, return_distances=True)
        for part in ("index", "row_splits", "distance"):
            assert_same_bits(getattr(by_product, part), getattr(expected, part))


@both_dtypes
@pytest.mark.parametrize("name", ["two far clusters", "activations", "far from the origin"])
def test_wide_neighbors_are_the_same_bits_with_any_instructions_and_threads(name, dtype, set_isa, set_threads):
    points = ADVERSE[name](np.random.default_rng(0), (1500, 70)).astype(dtype)
    results = []
    for isa, threads in itertools.product(cpu.isas(), (1, 2, 5)):
        set_isa(isa)
        set_threads(threads)
        for queries in (None, points[:31] + dtype(0.01)):
            results.append(kp.knn_search(points, queries, 9, return_distances=True))
    for part in ("index", "row_splits", "distance"):
        for other, first in zip(results[2:], itertools.cycle(results[:2])):
            assert_same_bits(getattr(other, part), getattr(first, part))


@pytest.mark.parametrize("scale", [1e-21, 1e19])
def test_wide_squares_that_overflow_or_vanish_are_an_error(scale):
    points = (clouds.uniform(50, 33)[0] * np.float32(scale)).astype(np.float32)
    with pytest.raises(ValueError, match=r"points: expected squared distances that float32 can hold, got points up to"):
        kp.knn_search(points, None, 3)
    with pytest.raises(ValueError, match=r"points and queries up to .* apart in item 1"):
        kp.knn_search(np.zeros((4, 33), np.float32), points, 3, points_row_splits=np.array([0, 2, 4]),
                      queries_row_splits=np.array([0, 0, 50]))  # fmt: skip


@pytest.mark.parametrize("kind", ["normal", "repeated"])
def test_a_wide_search_makes_no_matrix_of_queries_and_points(kind, python):
    done = python(PEAK.format(kind=kind), KPCORE_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 2**20  # the matrix would take 381 MiB


PEAK = """
import numpy as np, kpcore as kp
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
rng = np.random.default_rng(0)
points = rng.normal(size=(10_000, 32)).astype(np.float32)
if "{kind}" == "repeated":
    points = points[rng.integers(0, 9, len(points))]
kp.knn_search(points[:300], None, 5)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far becomes the present size
before = peak()
neighbors = kp.knn_search(points, None, 5)
print(peak() - before - neighbors.index.nbytes - neighbors.row_splits.nbytes)
"""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_wide_coordinates_that_are_not_finite(bad):
    points = clouds.uniform(50, 20)[0]
    queries = points.copy()
    queries[43, 19] = bad
    with pytest.raises(ValueError, match=r"queries: expected finite coordinates, got .* in row 43"):
        kp.knn_search(points, queries, 3)
    with pytest.raises(ValueError, match=r"queries: expected finite coordinates, got .* in row 43"):
        kp.knn_search(points[:0], queries, 3)
    with pytest.raises(ValueError, match=r"points: expected finite coordinates, got .* in row 43"):
        kp.knn_search(queries, None, 3)


def test_what_many_dimensions_do_not_take():
    points = np.zeros((4, 17))
    with pytest.raises(ValueError, match="metric: expected 'l2' for points with more than 16 dimensions, got 'l1' for"):
        kp.knn_search(points, None, 2, metric="l1")
    with pytest.raises(ValueError, match=r"points: expected \(N, D\) with D = 1 to 1024, got \(4, 1025\)"):
        kp.knn_search(np.zeros((4, 1025)), None, 2)
    for search in (kp.KDTree, lambda points: kp.radius_search(points, None, 1)):
        with pytest.raises(ValueError, match=r"points: expected \(N, D\) with D = 1 to 16, got \(4, 17\)"):
            search(points)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        kp.knn_search(points, None, 0)
    with pytest.raises(ValueError, match="ignore_query_point: expected True or False for 2 queries of 4 points"):
        kp.knn_search(points, points[:2], 1, ignore_query_point="index")


@pytest.mark.parametrize(
    ("dim", "dtype", "metric"),
    [(3, np.float32, "l2"), (2, np.float64, "l2"), (2, np.float32, "l1"), (3, np.float64, "linf")],
)
def test_ten_thousand_small_searches(dim, dtype, metric):
    rng = np.random.default_rng(9)
    row_splits = clouds.splits(rng.integers(0, 12, 10_000))
    points = rng.integers(0, 6, (row_splits[-1], dim)).astype(dtype) / dtype(4)  # many ties
    radius = rng.choice([0.25, 0.4, 0.5, 1], len(points)).astype(dtype)
    check_search(points, None, radius, points_row_splits=row_splits, metric=metric)
    check_knn(points, None, 4, points_row_splits=row_splits, metric=metric)


@pytest.mark.parametrize("dim", range(1, 9))
@pytest.mark.parametrize(("metric", "p"), [("l2", 2), ("l1", 1), ("linf", np.inf)])
def test_against_scipy_in_any_dimension(dim, metric, p):
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(dim)
    points, queries = rng.uniform(size=(20_000, dim)), rng.uniform(-0.1, 1.1, (500, dim))
    tree = cKDTree(points)
    distance, index = tree.query(queries, 10, p=p)
    neighbors = kp.knn_search(points, queries, 10, metric=metric, return_distances=True)
    assert np.allclose(neighbors.distance.reshape(-1, 10), distance, rtol=1e-12)
    assert np.mean(neighbors.index.reshape(-1, 10) == index) > 0.999  # except ties
    radius = np.median(distance[:, -1])
    rows = tree.query_ball_point(queries, radius * (1 + 1e-12), p=p)
    counts = kp.radius_search(points, queries, radius, metric=metric, count_only=True)
    assert counts.tolist() == list(map(len, rows))


# ---- crowds


@pytest.mark.parametrize("sort", ["index", "distance"])
@pytest.mark.parametrize("name", ["all_equal", "duplicates", "everything_within", "cluster_and_outliers"])
def test_max_neighbors_of_a_crowd(name, sort):
    points, radius = clouds.nasty(name, num=1500)
    for ignore in (False, True, "index"):
        for max_neighbors in (1, 5):
            check_search(points, None, radius, max_neighbors=max_neighbors, sort=sort, ignore_query_point=ignore)


@ignoring
def test_nearest_among_many_equal_points(ignore):
    rng = np.random.default_rng(0)
    points = np.concatenate([np.full((700, 3), 0.5), rng.uniform(0, 1, (300, 3))])[rng.permutation(1000)]
    for k in (1, 3, 40, 650, 900):
        check_knn(points, None, k)
        check_knn(points, None, k, ignore_query_point=ignore)


def test_a_hopeless_search_says_so_before_it_counts(monkeypatch):
    monkeypatch.setattr(kp.config, "_free_memory", lambda: 2**33)
    cluster = np.random.default_rng(0).normal(size=(10**6, 3)).astype(np.float32) * np.float32(1e-3)
    with pytest.raises(
        MemoryError, match=r"about \d{13} neighbours would take \d{13} bytes"
    ):  # counting would take minutes
        kp.radius_search(cluster, None, 1.0)
    assert kp.radius_search(cluster[: 10**5], None, 1.0, max_neighbors=8).num_pairs == 8 * 10**5
    same = np.zeros((10**6, 3), np.float32)
    assert kp.radius_search(same, None, 1.0, max_neighbors=8).index[-8:].tolist() == list(range(8))
    assert kp.knn_search(same, None, 8, ignore_query_point="index").index[:8].tolist() == list(range(1, 9))


# ---- indexes


def test_an_index_serves_any_radius_and_keeps_its_own_points():
    points, radius = clouds.uniform(500)
    copy = points.copy()
    tree, grid = kp.KDTree(copy), kp.GridIndex(copy, radius)
    copy[:] = 0
    for factor in (0.3, 1, 3, 4.5, 20):
        expected = reference.radius_search(points, None, radius * factor)[0]
        assert_rows(tree.radius_search(None, radius * factor), expected)
        assert_rows(grid.radius_search(None, radius * factor), expected)
    assert_rows(grid.knn_search(None, 6), reference.knn_search(points, None, 6)[0])


@pytest.mark.parametrize("splits", [None, np.array([0, 30, 200])])
@pytest.mark.parametrize("make", [kp.KDTree, lambda points, **o: kp.GridIndex(points, 0.3, **o)])
def test_an_index_goes_through_pickle(make, splits):
    points, _ = clouds.uniform(200)
    index = make(points, row_splits=splits)
    copy = pickle.loads(pickle.dumps(index))
    assert type(copy) is type(index)
    assert_same_bits(copy.radius_search(None, 0.3).index, index.radius_search(None, 0.3).index)
    assert_same_bits(copy.knn_search(None, 3).index, index.knn_search(None, 3).index)


def test_an_index_serves_many_threads_at_once():
    points, radius = clouds.uniform(3000)
    tree, grid = kp.KDTree(points), kp.GridIndex(points, radius)
    jobs = [(index, radius * factor) for index in (tree, grid) for factor in (0.5, 1, 1.5)] * 4
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: job[0].radius_search(None, job[1]), jobs))
    for (_, r), neighbors in zip(jobs, together, strict=True):
        assert_same_bits(neighbors.index, kp.radius_search(points, None, r).index)


@pytest.mark.parametrize("make", [kp.KDTree, lambda p, **o: kp.GridIndex(p, 0.3, **o)])
def test_queries_of_a_batched_index_need_their_splits(make):
    points, _ = clouds.uniform(60)
    index = make(points, row_splits=np.array([0, 20, 60]))
    with pytest.raises(ValueError, match="queries_row_splits: expected an array"):
        index.radius_search(points, 0.2)
    with pytest.raises(ValueError, match="queries_row_splits: expected None"):
        index.radius_search(None, 0.2, queries_row_splits=np.array([0, 20, 60]))


def test_ignoring_by_index_takes_as_many_queries_as_points():
    points, radius = clouds.uniform(60)
    with pytest.raises(ValueError, match=r"ignore_query_point: .* 30 queries of 60"):
        kp.radius_search(points, points[::2], radius, ignore_query_point="index")


@pytest.mark.parametrize(
    ("radius", "error"),
    [(np.ones(59, np.float32), "60"), (np.ones(60), "float32"), (np.zeros(60, np.float32), "row 0")],
)
def test_bad_radii(radius, error):
    with pytest.raises((ValueError, TypeError), match=f"radius: .*{error}"):
        kp.radius_search(clouds.uniform(60)[0], None, radius)


# ---- what the options promise


@pytest.mark.parametrize("max_neighbors", [None, 3])
@nasty_names
def test_count_only(name, max_neighbors):
    points, radius = clouds.nasty(name)
    counts = kp.radius_search(points, None, radius, count_only=True, max_neighbors=max_neighbors)
    assert counts.dtype == np.int64
    assert counts.tolist() == [len(row[:max_neighbors]) for row in reference.radius_search(points, None, radius)[0]]


@pytest.mark.parametrize("max_neighbors", [None, 3])
@nasty_names
def test_unsorted_rows_are_the_sorted_ones_in_another_order(name, max_neighbors):
    points, radius = clouds.nasty(name)
    got = kp.radius_search(points, None, radius, sort=None, max_neighbors=max_neighbors, return_distances=True)
    expected = kp.radius_search(points, None, radius, max_neighbors=max_neighbors, return_distances=True)
    order = np.lexsort((got.index, np.repeat(np.arange(len(points)), got.counts)))
    assert_same_bits(got.row_splits, expected.row_splits)
    assert_same_bits(got.index[order], expected.index)
    assert_same_bits(got.distance[order], expected.distance)


def test_distances_only_on_request():
    assert kp.radius_search(*insert_none(clouds.uniform(50))).distance is None


def test_a_batch_is_its_items_one_after_the_other():
    lengths, radius = [40, 0, 1, 129, 0], 0.4
    row_splits, (points, _) = kp.row_splits(lengths), clouds.uniform(170)
    got = kp.radius_search(points, None, radius, points_row_splits=row_splits, return_distances=True)
    parts = [
        kp.radius_search(points[a:b], None, radius, return_distances=True) for a, b in itertools.pairwise(row_splits)
    ]
    shifted = [part.index + np.int32(a) for part, a in zip(parts, row_splits[:-1], strict=True)]
    assert_same_bits(got.index, np.concatenate(shifted))
    assert_same_bits(got.distance, np.concatenate([part.distance for part in parts]))
    assert_same_bits(got.counts, np.concatenate([part.counts for part in parts]))


@nasty_names
def test_permuting_the_points_permutes_the_neighbors(name):
    points, radius = clouds.nasty(name)
    order = np.random.default_rng(1).permutation(len(points))
    expected = kp.radius_search(points, None, radius).to_sparse().toarray() != 0
    got = kp.radius_search(points[order], None, radius).to_sparse().toarray() != 0
    assert_same_bits(got, expected[np.ix_(order, order)])


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@both_dtypes
@pytest.mark.parametrize("name", ["lattice_ties", "mixed_density", "far_away"])
def test_scaling_by_a_power_of_two_changes_only_distances(name, dtype, factor):
    points, radius = clouds.nasty(name, dtype=dtype)
    expected = kp.radius_search(points, None, float(dtype(radius)), sort="distance", return_distances=True)
    scaled = kp.radius_search(
        points * dtype(factor), None, float(dtype(radius)) * factor, sort="distance", return_distances=True
    )
    assert_same_bits(scaled.index, expected.index)
    assert_same_bits(scaled.distance, expected.distance * dtype(factor))


# ---- the same bits everywhere

DECISIONS = {
    "uniform": lambda dtype: clouds.uniform(20_000, dtype=dtype, per_ball=37),
    "lattice": lambda dtype: clouds.nasty("lattice_ties", dtype=dtype, num=8_000),
    "plane": lambda dtype: clouds.nasty("planar", dtype=dtype, num=2_000),
}


@pytest.mark.parametrize("sort", ["index", "distance"])
@both_dtypes
@pytest.mark.parametrize("name", DECISIONS)
def test_same_bits_with_any_instructions_and_threads(name, dtype, sort, set_isa, set_threads):
    points, radius = DECISIONS[name](dtype)
    results = []
    for isa, threads in itertools.product(cpu.isas(), (1, 2, 3)):
        set_isa(isa)
        set_threads(threads)
        results.append(kp.radius_search(points, None, radius, sort=sort, max_neighbors=30, return_distances=True))
    for part in ("index", "row_splits", "distance"):
        for other in results[1:]:
            assert_same_bits(getattr(other, part), getattr(results[0], part))


@pytest.mark.parametrize("name", clouds.NASTY)
def test_nasty_clouds_with_any_instructions(name, isa):
    check_search(*insert_none(clouds.nasty(name, num=130)), sort="distance")


# ---- scipy on real scans


@pytest.mark.parametrize("voxels", [0.5, 1, 2.5])
@both_dtypes
@pytest.mark.parametrize("name", clouds.SCANS)
def test_real_scans_against_scipy(shared, name, dtype, voxels):
    from scipy.spatial import cKDTree

    file, read, voxel = clouds.SCANS[name]
    points = read(shared / "data" / file)[::3]
    if dtype == np.float32:
        points = points - np.floor(points.mean(0))
    points = np.ascontiguousarray(points, dtype)
    queries, radius = points[::11], voxels * voxel
    neighbors = kp.radius_search(points, queries, radius)
    tree, of_queries = cKDTree(points.astype(np.float64)), cKDTree(queries.astype(np.float64))
    expected = of_queries.sparse_distance_matrix(tree, radius * (1 + 1e-5), output_type="coo_matrix")
    inside = expected.data <= radius
    reference.assert_same_pairs(
        np.stack([np.repeat(np.arange(len(queries)), neighbors.counts), neighbors.index], 1),
        np.stack([expected.row, expected.col], 1)[inside],
        lambda pairs: np.linalg.norm(points[pairs[:, 1]].astype(np.float64) - queries[pairs[:, 0]], axis=1),
        radius,
        band=radius * 4 * np.finfo(dtype).eps,
    )


# ---- Neighbors

ROWS = [[2, 0], [], [1], [3, 1, 0], []]


def make(rows=ROWS, num_points=4, **arrays):
    index = np.array([i for row in rows for i in row], np.int32)
    return kp.Neighbors(index, clouds.splits([len(row) for row in rows]), num_points, **arrays)


def lists(neighbors):
    bounds = neighbors.row_splits.tolist()
    return [neighbors.index[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@st.composite
def neighbor_rows(draw):
    """-> (rows, num_points); entries may repeat."""
    num_points = draw(st.integers(1, 40))
    return draw(st.lists(st.lists(st.integers(0, num_points - 1), max_size=9), max_size=20)), num_points


def test_sizes_and_counts():
    neighbors = make()
    assert (neighbors.num_queries, neighbors.num_pairs, neighbors.num_points) == (5, 6, 4)
    assert neighbors.counts.dtype == np.int64
    assert neighbors.counts.tolist() == [2, 0, 1, 3, 0]
    assert neighbors.distance is None and neighbors.width is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[2, 0, 4], [4, 4, 4], [1, 4, 4], [3, 1, 0], [4, 4, 4]]),
        ({"width": 4}, [[2, 0, 4, 4], [4, 4, 4, 4], [1, 4, 4, 4], [3, 1, 0, 4], [4, 4, 4, 4]]),
        ({"width": 1}, [[2], [4], [1], [3], [4]]),
        ({"width": 0}, [[], [], [], [], []]),
        ({"fill": -1}, [[2, 0, -1], [-1, -1, -1], [1, -1, -1], [3, 1, 0], [-1, -1, -1]]),
    ],
)
def test_to_padded(options, expected):
    padded = make().to_padded(**options)
    assert padded.dtype == np.int32
    assert padded.tolist() == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_from_padded_keeps_columns_and_skips_none(dtype):
    padded = np.array([[-1, 2, 0], [4, 4, -1], [1, -1, -1], [3, 1, 0], [-1, -1, 4]], dtype)
    neighbors = kp.Neighbors.from_padded(padded, 4)
    assert lists(neighbors) == ROWS
    assert neighbors.width == 3
    assert neighbors.index.dtype == np.int32


def test_from_coo_keeps_the_order_of_a_rows_pairs():
    pairs = np.array([(3, 3), (0, 2), (3, 1), (2, 1), (0, 0), (3, 0)])
    neighbors = kp.Neighbors.from_coo(pairs[:, 0], pairs[:, 1], 5, 4)
    assert lists(neighbors) == ROWS
    assert neighbors.num_points == 4


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("flow, rows", [("source_to_target", (0, 1)), ("target_to_source", (1, 0))])
def test_edges_and_back(flow, rows, dtype):
    points, queries = [2, 0, 1, 3, 1, 0], [0, 0, 2, 3, 3, 3]
    edges = make().edge_index(flow)
    assert edges.dtype == np.int64
    assert edges[rows[0]].tolist() == points and edges[rows[1]].tolist() == queries
    shuffled = edges[:, np.random.default_rng(0).permutation(6)].astype(dtype)
    neighbors, order = kp.Neighbors.from_edge_index(shuffled, 4, 5, flow=flow, return_order=True)
    expected = [[p for p, q in shuffled[list(rows)].T if q == query] for query in range(5)]
    assert lists(neighbors) == expected != ROWS  # the edges of a query are in their order
    assert order.dtype == np.int64
    assert_same_bits(neighbors.edge_index(flow), shuffled[:, order].astype(np.int64))
    assert lists(kp.Neighbors.from_edge_index(edges, 4, 5, flow=flow)) == ROWS
    assert kp.Neighbors.from_edge_index(edges, 5, flow=flow).num_queries == 5


def test_edges_of_nothing():
    empty = kp.Neighbors(np.empty(0, np.int32), np.zeros(4, np.int64), 0)
    assert empty.edge_index().shape == (2, 0)
    assert kp.Neighbors.from_edge_index(empty.edge_index(), 0, 3).counts.tolist() == [0, 0, 0]


@given(neighbor_rows())
def test_padded_and_back(rows_and_num):
    rows, num_points = rows_and_num
    neighbors = make(rows, num_points)
    for fill in (None, -1):
        for dtype in (np.int32, np.int64):
            padded = neighbors.to_padded(fill=fill, dtype=dtype)
            assert padded.dtype == dtype
            assert lists(kp.Neighbors.from_padded(padded, num_points)) == rows


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("width", [0, 1, 15, 16, 17, 300])
def test_large_padded_matrices(dtype, width, isa):
    """Matrices that several threads convert, with gaps in any column and rows cut to the width."""
    rng = np.random.default_rng(width)
    padded = rng.integers(-1, 1001, (3000, width)).astype(dtype)
    padded[::2, width // 2 :] = 1000
    neighbors = kp.Neighbors.from_padded(padded, 1000)
    rows = [[int(i) for i in row if 0 <= i < 1000] for row in padded]
    assert lists(neighbors) == rows
    for columns in (width, width // 2):
        expected = [(row + [-7] * columns)[:columns] for row in rows]
        got = neighbors.to_padded(columns, -7, dtype=dtype)
        assert got.dtype == dtype and got.tolist() == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("value", [-2, 1001, 2**31 - 1, -(2**31), 2**32 + 3, -(2**63)])
def test_one_padded_number_out_of_range_is_found_anywhere(dtype, value, isa):
    if not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        return
    for row, column in ((0, 0), (1999, 36), (1234, 17)):
        padded = np.random.default_rng(0).integers(-1, 1001, (2000, 37)).astype(dtype)
        padded[row, column] = value
        with pytest.raises(ValueError, match=rf"index: expected .* got {value} in row {row}, column {column}"):
            kp.Neighbors.from_padded(padded, 1000)


@pytest.mark.parametrize("fill", [2**40, -(2**63)])
def test_what_64_bits_may_be_filled_with(fill):
    assert make().to_padded(fill=fill, dtype=np.int64)[1].tolist() == [fill] * 3
    with pytest.raises(ValueError, match="fill"):
        make().to_padded(fill=fill)
    with pytest.raises(TypeError, match="dtype: expected int32 or int64, got float32"):
        make().to_padded(dtype=np.float32)


@given(neighbor_rows())
def test_transpose_turns_every_pair_around(rows_and_num):
    rows, num_points = rows_and_num
    transpose = make(rows, num_points).transpose()
    expected = [[q for q, row in enumerate(rows) for j in row if j == i] for i in range(num_points)]
    assert [sorted(row) for row in lists(transpose)] == expected
    assert (transpose.num_queries, transpose.num_points) == (num_points, len(rows))


def test_transpose_takes_distances_along():
    points, radius = clouds.uniform(60)
    neighbors = kp.radius_search(points, points[::3].copy(), radius, return_distances=True)
    transpose = neighbors.transpose()
    expected = neighbors.to_sparse(neighbors.distance).T
    assert_same_bits(transpose.to_sparse(transpose.distance).toarray(), expected.toarray())


def test_transpose_is_cached():
    neighbors = make()
    assert neighbors.transpose() is neighbors.transpose()


@pytest.mark.parametrize("values", [None, np.arange(1.0, 7), np.arange(1, 7, dtype=np.float32)])
def test_to_sparse(values):
    sparse = make().to_sparse(values)
    expected = np.zeros((5, 4))
    for value, (q, i) in zip(
        np.ones(6) if values is None else values, [(q, i) for q, r in enumerate(ROWS) for i in r], strict=True
    ):
        expected[q, i] = value
    assert sparse.format == "csr"
    assert sparse.toarray().tolist() == expected.tolist()
    assert values is None or sparse.dtype == values.dtype


def test_pickle_keeps_the_values():
    neighbors = kp.radius_search(*insert_none(clouds.uniform(60)), return_distances=True)
    neighbors.transpose()
    copy = pickle.loads(pickle.dumps(neighbors))
    for name in ("index", "row_splits", "distance", "counts"):
        assert_same_bits(getattr(copy, name), getattr(neighbors, name))
    assert copy.num_points == neighbors.num_points
    assert lists(copy.transpose()) == lists(neighbors.transpose())


ARRAYS = ("index", "row_splits", "distance")
WRITES = {
    "an entry": lambda a: a.__setitem__(0, 1),
    "all": lambda a: a.fill(1),
    "the flag": lambda a: a.setflags(write=True),
    "the flag of a part": lambda a: a[:2].setflags(write=True),
    "the flag of a view": lambda a: a.view(np.uint8).setflags(write=True),
    "a buffer": lambda a: memoryview(a).__setitem__(0, 1),
    "the flag of an array over its buffer": lambda a: np.asarray(memoryview(a)).setflags(write=True),
    "sorted": lambda a: a.sort(),
    "resized": lambda a: a.resize(2),
}


def with_distances():
    return make(distance=np.arange(6.0))


LISTS = {
    "made": with_distances,
    "a transpose": lambda: with_distances().transpose(),
    "with its transpose": lambda: with_distances().with_transpose(),
    "with a width": lambda: with_distances().with_width(4),
    "unpickled": lambda: pickled(with_distances()),
    "within a radius": lambda: kp.radius_search(*insert_none(clouds.uniform(60)), return_distances=True),
    "nearest": lambda: kp.knn_search(clouds.uniform(60)[0], None, 3, return_distances=True),
}


@pytest.mark.parametrize("of", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_arrays_of_a_list_cannot_be_written_to(of, write):
    neighbors = of()
    neighbors.transpose()  # also checks a list that comes from a pickle
    for name in ARRAYS:
        array = getattr(neighbors, name)
        before = array.copy()
        with pytest.raises((ValueError, TypeError)):
            write(array)
        assert_same_bits(getattr(neighbors, name), before)


def test_what_is_done_to_the_shape_of_an_array_is_not_done_to_the_list():
    neighbors, before = with_distances(), with_distances()
    for name in ARRAYS:
        array = getattr(neighbors, name)
        array.__setstate__((1, (2,), array.dtype, False, bytes(2 * array.itemsize)))
        assert len(array) == 2
        assert_same_bits(getattr(neighbors, name), getattr(before, name))


def test_a_list_is_not_changed_by_what_happens_to_the_arrays_it_was_made_of():
    before = with_distances()
    arrays = {name: getattr(before, name).copy() for name in ARRAYS}
    neighbors = kp.Neighbors(**arrays, num_points=4)
    padded = before.to_padded()
    from_padded = kp.Neighbors.from_padded(padded, 4)
    for array in (*arrays.values(), padded):
        array.fill(10**6)
    for name in ARRAYS:
        assert_same_bits(getattr(neighbors, name), getattr(before, name))
    assert lists(from_padded) == ROWS


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("splits_dtype", [np.int32, np.int64])
def test_either_integer_makes_a_list(dtype, splits_dtype):
    plain = make()
    neighbors = kp.Neighbors(plain.index.astype(dtype), plain.row_splits.astype(splits_dtype), 4)
    assert (neighbors.index.dtype, neighbors.row_splits.dtype) == (np.int32, np.int64)
    assert lists(neighbors) == ROWS
    with pytest.raises(ValueError, match="index: expected values from 0 to 3"):
        kp.Neighbors(np.array([2**32], np.int64), np.array([0, 1], splits_dtype), 4)  # its low 32 bits are 0


def pickled(neighbors, **changes):
    """A list from a pickle with some fields changed."""
    make_again, fields = neighbors.__reduce__()
    names = ("index", "row_splits", "num_points", "distance", "width", "carries_transpose")
    parts = dict(zip(names, fields, strict=True))
    return make_again(*({**parts, **changes}[name] for name in names))


REBUILT = {
    "int64": ({"index": lambda a: a.astype(np.int64)}, None),
    "int32 bounds": ({"row_splits": lambda a: a.astype(np.int32)}, None),
    "both": ({"index": lambda a: a.astype(np.int64), "row_splits": lambda a: a.astype(np.int32)}, None),
    "columns of a matrix": ({"index": lambda a: np.stack([a, a], 1)[:, 0]}, None),
    "float": ({"index": lambda a: a.astype(np.float32)}, "neighbors.index: expected int32 or int64, got float32"),
    "float bounds": ({"row_splits": lambda a: a.astype(np.float64)}, "neighbors.row_splits: expected int32 or int64"),
    "too large": ({"index": lambda a: a + 10**8}, "neighbors.index: expected values from 0 to"),
    "negative": ({"index": lambda a: a - 100}, "neighbors.index: expected values from 0 to"),
    "too large for 32 bits": ({"index": lambda a: a.astype(np.int64) + 2**32}, "neighbors.index: expected"),
    "falling bounds": ({"row_splits": lambda a: np.concatenate([a[:1], a[:0:-1]])}, "neighbors.row_splits: expected"),
    "bounds beyond the index": ({"row_splits": lambda a: 1000 * a}, "neighbors.row_splits: expected a last value"),
    "negative bounds": ({"row_splits": lambda a: a - 1}, "neighbors.row_splits: expected values from 0"),
    "no bounds": ({"row_splits": lambda a: a[:0]}, "neighbors.row_splits: expected"),
    "two axes": ({"index": lambda a: a[None]}, "neighbors.index: expected"),
    "a list": ({"index": lambda a: a.tolist()}, "neighbors.index: expected a NumPy or CuPy array, got list"),
    "fewer points": ({"num_points": lambda n: 1}, "neighbors.index: expected values from 0 to 0"),
    "points that are no number": ({"num_points": lambda n: "n"}, "neighbors.num_points: expected an integer"),
    "fewer distances": ({"distance": lambda a: a[1:]}, "neighbors.distance: expected"),
}


@pytest.mark.parametrize("variant", [v for v in ops.TRACED if "neighbors" in ops.call(v)[1]])
@pytest.mark.parametrize(("changes", "error"), REBUILT.values(), ids=REBUILT)
def test_a_list_put_together_again_is_checked_where_it_is_used(variant, changes, error):
    op, arguments = ops.call(variant)
    plain = arguments["neighbors"]
    plain = kp.Neighbors(plain.index, plain.row_splits, plain.num_points, np.ones(plain.num_pairs), plain.width)
    parts = {name: change(getattr(plain, name)) for name, change in changes.items()}
    public = getattr(kp, op.name)
    if error is None:
        expected = public(**arguments | {"neighbors": plain})
        assert_same_bits(public(**arguments | {"neighbors": pickled(plain, **parts)}), expected)
    else:
        with pytest.raises((TypeError, ValueError), match=error):
            public(**arguments | {"neighbors": pickled(plain, **parts)})


METHODS = {
    "counts": lambda nb: nb.counts,
    "num_pairs": lambda nb: nb.num_pairs,
    "to_padded": lambda nb: nb.to_padded(),
    "transpose": lambda nb: nb.transpose(),
    "with_transpose": lambda nb: nb.with_transpose(),
    "with_width": lambda nb: nb.with_width(3),
    "to_sparse": lambda nb: nb.to_sparse(),
    "edge_index": lambda nb: nb.edge_index(),
    "to": lambda nb: nb.to("cpu"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_check_a_list_put_together_again(method):
    wide = {"index": make().index.astype(np.int64), "row_splits": make().row_splits.astype(np.int32)}
    method(pickled(make(), **wide))
    wrong = pickled(make(), row_splits=2**40 * make().row_splits)
    for _ in range(2):  # after an error the list is still not checked
        with pytest.raises(ValueError, match=r"neighbors.row_splits"):
            method(wrong)


def test_the_transpose_is_carried_on_request_only():
    plain = make()
    plain.transpose()
    assert not plain.carries_transpose
    carrying = plain.with_transpose()
    assert carrying.carries_transpose and lists(carrying) == ROWS
    assert carrying.transpose() is plain.transpose()
    assert pickle.loads(pickle.dumps(carrying)).carries_transpose
    assert carrying.with_width(5).carries_transpose and not carrying.with_transpose(False).carries_transpose


def test_with_width():
    assert make().with_width(5).width == 5
    assert lists(make().with_width(5)) == ROWS
    with pytest.raises(ValueError, match="width"):
        make().with_width(-1)


def test_neighbors_are_frozen_and_compare_by_identity():
    neighbors = make()
    with pytest.raises(AttributeError):
        neighbors.num_points = 3
    assert neighbors == neighbors and neighbors != make() and len({neighbors, make()}) == 2


def test_neighbors_move_to_the_cpu_they_are_on():
    assert lists(make().to("cpu")) == ROWS


def test_neighbors_index_may_be_longer_than_its_rows():
    neighbors = kp.Neighbors(np.array([2, 0, 1, 0, 0, 0], np.int32), np.array([0, 2, 3]), 3)
    assert neighbors.num_pairs == 3
    assert neighbors.to_padded().tolist() == [[2, 0], [1, 3]]
    assert [sorted(row) for row in lists(neighbors.transpose())] == [[0], [1], [0]]
    assert neighbors.to_sparse().toarray().tolist() == [[1, 0, 1], [0, 1, 0]]
    assert neighbors.edge_index().tolist() == [[2, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("lengths", [[], [0], [3], [0, 2, 0, 5, 0]])
def test_row_splits_and_lengths(lengths):
    row_splits = kp.row_splits(lengths)
    assert row_splits.dtype == np.int64 and kp.lengths(row_splits).dtype == np.int64
    assert row_splits.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert kp.lengths(row_splits).tolist() == lengths


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("lengths", [[], [0], [3], [0, 2, 0, 5, 0]])
def test_batch_vectors_and_row_splits(lengths, dtype):
    row_splits, batch = kp.row_splits(lengths), np.repeat(np.arange(len(lengths)), lengths)
    assert_same_bits(kp.row_splits_to_batch(row_splits), batch)
    assert_same_bits(kp.batch_to_row_splits(batch.astype(dtype), len(lengths)), row_splits)
    last = len(np.trim_zeros(lengths, "b"))  # items after the last row are not in the vector
    assert_same_bits(kp.batch_to_row_splits(batch.astype(dtype)), row_splits[: last + 1])


@pytest.mark.parametrize("flow, rows", [("source_to_target", (0, 1)), ("target_to_source", (1, 0))])
@pytest.mark.parametrize("loop", [False, True])
def test_knn_graph(loop, flow, rows):
    """As torch_cluster defines it: the edges of a point come from the k nearest of its item, by distance."""
    rng, k = np.random.default_rng(0), 4
    points, row_splits = rng.random((60, 5)), np.array([0, 30, 30, 33, 60])
    points[7] = points[3]  # another point with the same coordinates is a neighbour, whether or not there are loops
    edges = kp.knn_graph(points, k, row_splits=row_splits, loop=loop, flow=flow)
    assert edges.dtype == np.int64
    expected = []
    for begin, end in itertools.pairwise(row_splits):
        for query in range(begin, end):
            distance = np.linalg.norm(points[begin:end] - points[query], axis=1)
            near = begin + np.argsort(distance, kind="stable")
            expected += [(point, query) for point in near[loop | (near != query)][:k]]
    assert edges[list(rows)].T.tolist() == [list(map(int, pair)) for pair in expected]
    assert (edges[0] == edges[1]).any() == loop


@pytest.mark.parametrize("dimensions", [1, 16, 17, 64])
def test_knn_graph_takes_the_dimensions_of_knn_search(dimensions):
    points = np.random.default_rng(0).random((40, dimensions))

    def outcome(search):
        try:
            return search().tolist()
        except ValueError as error:
            return str(error)

    assert outcome(lambda: kp.knn_graph(points, 3, loop=True)) == outcome(
        lambda: kp.knn_search(points, None, 3).edge_index()
    )

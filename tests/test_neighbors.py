"""radius_search and Neighbors. Which pairs are neighbours, and in which order, is compared exactly."""

import itertools
import pickle

import clouds
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_rows, assert_same_bits

import kpcore as kp
from kpcore import _cpu

both_dims = pytest.mark.parametrize("dim", [2, 3])
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
nasty_names = pytest.mark.parametrize("name", clouds.NASTY)


def check_search(points, queries, radius, **options):
    """radius_search equals the brute force in neighbours, order and distances."""
    rows, distances = reference.radius_search(points, queries, radius, **options)
    neighbors = kp.radius_search(points, queries, radius, return_distances=True, **options)
    assert_rows(neighbors, rows)
    assert neighbors.distance.dtype == points.dtype
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


def test_max_neighbors_beyond_64_bits():
    points, radius = clouds.uniform(50)
    check_search(points, None, radius, max_neighbors=2**70)


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
    for isa, threads in itertools.product(_cpu.isas(), (1, 2, 3)):
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


@given(neighbor_rows())
def test_padded_and_back(rows_and_num):
    rows, num_points = rows_and_num
    neighbors = make(rows, num_points)
    for fill in (None, -1):
        assert lists(kp.Neighbors.from_padded(neighbors.to_padded(fill=fill), num_points)) == rows


@given(neighbor_rows())
def test_transpose_turns_every_pair_around(rows_and_num):
    rows, num_points = rows_and_num
    transpose = make(rows, num_points).transpose()
    expected = [[q for q, row in enumerate(rows) for j in row if j == i] for i in range(num_points)]
    assert [sorted(row) for row in lists(transpose)] == expected
    assert (transpose.num_queries, transpose.num_points) == (num_points, len(rows))


def test_transpose_takes_distances_along():
    points, radius = clouds.uniform(60)
    found = kp.radius_search(points, points[::3].copy(), radius, return_distances=True)
    transpose = found.transpose()
    expected = found.to_sparse(found.distance).T
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


@pytest.mark.parametrize("lengths", [[], [0], [3], [0, 2, 0, 5, 0]])
def test_row_splits_and_lengths(lengths):
    row_splits = kp.row_splits(lengths)
    assert row_splits.dtype == np.int64 and kp.lengths(row_splits).dtype == np.int64
    assert row_splits.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert kp.lengths(row_splits).tolist() == lengths

"""The oracles against answers known by hand, and the comparers against inputs they must accept and must refuse."""

import clouds
import gradcheck
import numpy as np
import pytest
import reference

POINTS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"radius": 1}, [[0, 1, 3], [0, 1, 3], [2], [0, 1, 3]]),
        ({"radius": 0.999}, [[0], [1, 3], [2], [1, 3]]),
        ({"radius": 1, "sort": "distance"}, [[0, 1, 3], [1, 3, 0], [2], [1, 3, 0]]),
        ({"radius": 1, "max_neighbors": 2}, [[0, 1], [1, 3], [2], [1, 3]]),
        ({"radius": 1, "points_row_splits": np.array([0, 1, 1, 4])}, [[0], [1, 3], [2], [1, 3]]),
    ],
)
def test_radius_search_by_hand(options, expected):
    rows, distances = reference.radius_search(POINTS, None, **options)
    assert [row.tolist() for row in rows] == expected
    assert [d.tolist() for d in distances] == [
        [np.linalg.norm(POINTS[i] - POINTS[q]) for i in r] for q, r in enumerate(expected)
    ]


@pytest.mark.parametrize(("dtype", "expected"), [(np.float32, [0, 1]), (np.float64, [0])])
def test_radius_search_decides_in_the_dtype(dtype, expected):
    points = np.float32([[0, 0], [0.3, 0]]).astype(dtype)  # float32(0.3) is above 0.3
    assert reference.radius_search(points, points[:1], 0.3)[0][0].tolist() == expected


def test_grid_subsample_by_hand():
    points = np.array([[1.5, -0.5], [0.5, 0.5], [1.25, 1.5], [-0.5, -0.5], [1.75, -1.0], [0.5, 0.5]])
    labels = np.array([3, 7, 9, 1, 2, 8])
    got = reference.grid_subsample(points, 1.0, points[:, :1] * 2, labels, ignore_label=9)
    # Voxels counted from (-1, -1), in Morton order with x lowest: (0,0), (1,1), (2,0), (2,2).
    assert got["points"].tolist() == [[-0.5, -0.5], [0.5, 0.5], [1.625, -0.75], [1.25, 1.5]]
    assert got["features"].tolist() == [[-1], [1], [3.25], [2.5]]
    assert got["labels"].tolist() == [1, 7, 2, 9]
    assert got["inverse"].tolist() == [2, 1, 3, 0, 2, 1]
    assert got["counts"].tolist() == [1, 2, 2, 1]
    assert got["row_splits"].tolist() == [0, 4]


def test_morton_key_interleaves_from_x():
    assert reference.morton_key([0b10, 0b01, 0b11]) == 0b101_110
    assert reference.morton_key([2**20, 0]) == 2**40


def test_kpconv_by_hand():
    # One neighbour at distance 0.5 of kernel point 0 and 1 of kernel point 1, with extent 2: influences 0.75 and 0.5.
    kernel_points, weights = np.array([[0.0, 0], [1.5, 0]]), np.array([[[1.0], [10]], [[100], [1000]]])
    rows = [(np.array([0]), reference.influences(np.array([[0.5, 0]]), kernel_points, 2.0, "linear", "sum"))]
    assert reference.kpconv(rows, np.array([[2.0, 3]]), weights).tolist() == [[0.75 * 32 + 0.5 * 3200]]
    grad_features, grad_weights = reference.kpconv_vjp(rows, np.array([[2.0, 3]]), weights, np.array([[4.0]]))
    assert grad_features.tolist() == [[4 * (0.75 + 50), 4 * (7.5 + 500)]]
    assert grad_weights.tolist() == [[[6], [9]], [[4], [6]]]


@pytest.mark.parametrize(
    ("influence", "aggregation", "expected"),
    [
        ("linear", "sum", [[1, 0], [0.5, 0.5]]),
        ("gaussian", "sum", [[1, np.exp(-1 / 0.18)], [np.exp(-0.25 / 0.18), np.exp(-0.25 / 0.18)]]),
        ("constant", "sum", [[1, 1], [1, 1]]),
        ("constant", "closest", [[1, 0], [1, 0]]),  # the second is a tie
        ("linear", "closest", [[1, 0], [0.5, 0]]),
    ],
)
def test_influences_by_hand(influence, aggregation, expected):
    got = reference.influences(
        np.array([[0.0, 0], [0.5, 0]]), np.array([[0.0, 0], [1, 0]]), 1.0, influence, aggregation
    )
    np.testing.assert_allclose(got, expected, rtol=1e-14)


@pytest.mark.parametrize(("normalization", "expected"), [(None, 1), ("count", 1 / 3), ("positive", 1 / 2)])
def test_normalization_by_hand(normalization, expected):
    features = np.array([[1.0, 1], [-3, 1], [2, -1]])
    ((_, h),) = reference.kpconv_rows(
        np.zeros((3, 2)), np.zeros((1, 2)), [np.arange(3)], features, np.zeros((1, 2)), 1.0, normalization=normalization
    )
    assert h.tolist() == [[expected]] * 3


# ---- the comparers


@pytest.mark.parametrize(
    ("got", "valid"),
    [
        ([1.0, -2.0, np.nan], True),
        ([1.0 + 1.9e-5, -2.0, np.nan], True),
        ([1.0 + 2.1e-5, -2.0, np.nan], False),
        ([1.0, 2.0, np.nan], False),
        ([1.0, -2.0, 0.0], False),
        ([np.nan, -2.0, np.nan], False),
        ([np.inf, -2.0, np.nan], False),
        ([1.0, -2.0], False),
        ([[1.0, -2.0, np.nan]], False),
    ],
)
def test_assert_close(got, valid):
    check(valid, reference.assert_close, np.array(got), [1, -2, np.nan], 1e-5)


def check(valid, comparer, *args):
    if valid:
        comparer(*args)
    else:
        with pytest.raises(AssertionError):
            comparer(*args)


@pytest.mark.parametrize(
    ("got", "valid"),
    [
        (np.float32([0.0, np.nan]), True),
        (np.float32([-0.0, np.nan]), False),
        (np.float64([0.0, np.nan]), False),
        (np.float32([[0.0, np.nan]]), False),
        (np.nextafter(np.float32([0.0, np.nan]), np.float32(1)), False),
    ],
)
def test_assert_same_bits(got, valid):
    check(valid, reference.assert_same_bits, got, np.float32([0.0, np.nan]))


@pytest.mark.parametrize(
    ("got", "valid"),
    [
        ([(0, 0), (1, 1), (0, 1)], True),
        ([(1, 1), (0, 1), (0, 0)], True),  # in another order
        ([(0, 0), (1, 1), (0, 1), (2, 10), (2, 11)], True),  # two extra at the radius
        ([(0, 0), (1, 1)], True),  # one missing at the radius
        ([(0, 0), (1, 1), (0, 1), (2, 10), (0, 2)], False),  # one extra at the radius, one beyond
        ([(1, 1), (0, 1)], False),  # one missing well inside
        ([(0, 1)], False),  # two missing well inside
        ([(0, 0), (1, 1), (0, 1), (1, 1)], False),  # one twice
        ([], False),
    ],
)
def test_assert_same_pairs(got, valid):
    def distance(pairs):  # pairs (0, 1), (2, 10) and (2, 11) lie at the radius
        return np.array([1 + 1e-9 if (q, i) in {(0, 1), (2, 10), (2, 11)} else abs(2.0 * (q - i)) for q, i in pairs])

    pairs = np.array(got, int).reshape(-1, 2)
    check(valid, reference.assert_same_pairs, pairs, np.array([(0, 0), (1, 1), (0, 1)]), distance, 1.0, 1e-6)


@pytest.mark.parametrize(
    ("index", "row_splits", "valid"),
    [
        ([3, 5, 4], [0, 2, 2, 3], True),
        ([5, 3, 4], [0, 2, 2, 3], False),
        ([3, 5, 4], [0, 2, 3, 3], False),
        ([3, 5], [0, 2, 2, 2], False),
        ([3, 5, 4], [0, 2, 3], False),
    ],
)
def test_assert_rows(index, row_splits, valid):
    class Record:
        pass

    record = Record()
    record.index, record.row_splits = np.array(index, np.int32), np.array(row_splits, np.int64)
    check(valid, reference.assert_rows, record, [np.array([3, 5]), np.array([], int), np.array([4])])


@pytest.mark.parametrize(("factor", "valid"), [(1, True), (1.001, False), (0.999, False)])
def test_gradcheck_objects_to_a_planted_error(factor, valid):
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3))

    def pullback(g):
        return g * np.cos(x) * y, factor * g * np.sin(x)

    check(valid, gradcheck.check_vjp, lambda x, y: np.sin(x) * y, pullback, (x, y))


@pytest.mark.parametrize("normalization", [None, "count", "positive"])
@pytest.mark.parametrize("influence", ["linear", "gaussian", "constant"])
def test_vjp_of_the_oracle(influence, normalization):
    case = clouds.random_case(geometry_type=np.float64, feature_type=np.float64)
    rows = reference.kpconv_rows(
        case.points,
        case.queries,
        case.rows,
        case.features,
        case.kernel_points,
        case.extent,
        influence,
        "sum",
        normalization,
    )
    gradcheck.check_vjp(
        lambda f, w: reference.kpconv(rows, f, w),
        lambda g: reference.kpconv_vjp(rows, case.features, case.weights, g),
        (case.features, case.weights),
    )

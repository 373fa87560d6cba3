"""Pooling over neighbours and batch items, gather and upsampling: values, gradients and edge cases."""

import inspect
import itertools

import clouds
import examples
import numpy as np
import pytest
import reference
from gradcheck import check_vjp
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, assert_same_bits, tolerance

import kpcore as kp
from kpcore.ops import OPS, Call

CHANNELS = [0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 130, 257]
REDUCES = ["mean", "sum", "max", "min"]
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_reduce = pytest.mark.parametrize("reduce", REDUCES)


def random_rows(num_queries, num_points, longest=40, seed=0):
    """Random neighbours; a third of the queries have none, and some points occur twice in a row."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, longest, num_queries) * (rng.uniform(size=num_queries) > 0.3)
    return [rng.integers(0, num_points, count) for count in counts]


def neighbors_of(rows, num_points, width=None):
    index = np.concatenate([*rows, np.empty(0, int)]).astype(np.int32)
    return kp.Neighbors(index, clouds.splits([len(row) for row in rows]), num_points, width=width)


def values(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def check_neighbor_reduce(features, rows, reduce, weights=None, width=None, **options):
    """Assert that values and gradients are those of the formulas; exactly for a maximum or minimum."""
    neighbors = neighbors_of(rows, len(features), width)
    expected, chosen = neighbor_reduce(features, rows, reduce, weights, width=width or 0, **options)
    primals = (features,) if weights is None else (features, weights)

    def fn(f, w=None):
        return kp.neighbor_reduce(f, neighbors, reduce, weights=w, **options)

    out, pullback = kp.autodiff.vjp(fn, *primals)
    grad = values(*expected.shape, dtype=features.dtype, seed=2)
    gradients = pullback(grad)
    wanted = neighbor_reduce_vjp(features, rows, grad, reduce, chosen, weights)
    assert out.dtype == features.dtype
    assert_same_bits(out, fn(*primals))
    if reduce in ("max", "min"):
        assert np.array_equal(out, expected.astype(out.dtype), equal_nan=True)
    else:
        absolute = [None if a is None else np.abs(a) for a in (features, weights)]
        magnitude = neighbor_reduce(absolute[0], rows, reduce, absolute[1], **options)[0]
        assert_close(out, expected, tolerance(features.dtype), magnitude)
    for got, want in zip(gradients, wanted, strict=False):
        assert_close(got, want, tolerance(features.dtype), np.max(np.abs(want), initial=1))


# ---- the formulas in float64


def neighbor_reduce(features, rows, reduce="mean", weights=None, empty=0.0, pad_value=None, width=0):
    """-> (out, chosen), both (M, C): `chosen` is the point with the maximum or minimum, -1 if no point has it.

    Of equal points the first is chosen, and the first NaN if there is one. With a `pad_value`, it is appended to each
    row shorter than `width`.
    """
    features, channels = features.astype(np.float64), np.arange(features.shape[1])
    out, chosen = np.full((len(rows), len(channels)), float(empty)), np.full((len(rows), len(channels)), -1)
    ends = np.cumsum([len(row) for row in rows])
    for q, row in enumerate(rows):
        seen, numbers = features[row], np.asarray(row, int)
        if reduce in ("mean", "sum"):
            w = np.ones(len(row)) if weights is None else weights[ends[q] - len(row) : ends[q]].astype(np.float64)
            if len(row):
                out[q] = w @ seen / (len(row) if reduce == "mean" else 1)
            continue
        if pad_value is not None and len(row) < width:
            seen, numbers = np.vstack([seen, np.full((1, len(channels)), pad_value)]), np.append(numbers, -1)
        if len(seen):
            at = seen.argmax(0) if reduce == "max" else seen.argmin(0)
            out[q], chosen[q] = seen[at, channels], numbers[at]
    return out, chosen


def neighbor_reduce_vjp(features, rows, grad, reduce, chosen, weights=None):
    """-> (grad_features, grad_weights); grad_weights for a mean or sum only"""
    features, grad = features.astype(np.float64), grad.astype(np.float64)
    grad_features, grad_weights = np.zeros_like(features), []
    for q, row in enumerate(rows):
        if reduce in ("mean", "sum"):
            share = grad[q] / (len(row) if reduce == "mean" and len(row) else 1)
            w = np.ones(len(row)) if weights is None else weights[len(grad_weights) :][: len(row)].astype(np.float64)
            np.add.at(grad_features, np.asarray(row, int), w[:, None] * share)
            grad_weights.extend(features[row] @ share)
        else:
            channels = np.flatnonzero(chosen[q] >= 0)
            np.add.at(grad_features, (chosen[q, channels], channels), grad[q, channels])
    return grad_features, np.array(grad_weights)


def inverse_distance_rows(points, queries, k, power, **splits):
    """-> (rows, weights): the k nearest points of each query and their weights, which sum to one.

    Weights are proportional to d_i^-power; if some d_i are zero, those points have equal weights and all others none.
    """
    rows, distances = reference.knn_search(points, queries, k, **splits)
    weights = []
    for distance in distances:
        distance = distance.astype(np.float64)
        w = (distance == 0).astype(float) if (distance == 0).any() else distance ** -float(power)
        weights.append(w / w.sum() if len(w) else w)
    return rows, weights


# ---- example calls


def pooling_arguments(num, geometry, features):
    call = examples.convolution(num, geometry, features)
    return {name: call[name] for name in ("neighbors", "features")}


def weights_of_pairs(call):
    num_pairs = call["neighbors"].num_pairs
    return {"weights": np.random.default_rng(5).uniform(size=num_pairs).astype(call["features"].dtype)}


def interpolate_arguments(num, geometry, features):
    call = examples.convolution(num, geometry, features)
    return {name: call[name] for name in ("points", "queries", "features")}


def segment_arguments(num, geometry, features):
    row_splits = np.array([0, num // 3, num // 3, num])
    return examples.rows_of_features(num, geometry, features) | {"row_splits": row_splits}


def gather_arguments(num, geometry, features):
    index = np.random.default_rng(1).integers(0, max(1, num), 2 * num).astype(np.int32)
    return examples.rows_of_features(num, geometry, features) | {"index": index}


CALLS = {
    "neighbor_reduce": (pooling_arguments, [{}, {"reduce": "max"}, weights_of_pairs]),
    "nearest_upsample": (pooling_arguments, [{}]),
    "interpolate": (interpolate_arguments, [{}]),
    "segment_reduce": (segment_arguments, [{}, {"reduce": "min"}]),
    "gather": (gather_arguments, [{}]),
}


# ---- neighbor_reduce


@both_dtypes
@each_reduce
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels, reduce, dtype, isa):
    check_neighbor_reduce(values(50, channels, dtype=dtype), random_rows(61, 50), reduce)


@both_dtypes
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("channels", [1, 3, 16, 33, 128])
def test_weights(channels, reduce, dtype, isa):
    rows = random_rows(61, 50)
    weights = values(sum(map(len, rows)), dtype=dtype, seed=3)
    check_neighbor_reduce(values(50, channels, dtype=dtype), rows, reduce, weights)


ROWS = {
    "all_empty": [[]] * 70,
    "thousands_for_one": [[], range(5000), [], [3]],
    "repeated_and_unsorted": [[7, 7, 3, 9, 3], [4999, 0, 4999]],
    "one_point_for_all": [[11]] * 200,
    "no_queries": [],
    "exactly_a_block": [range(511), range(512), range(513), range(1024), range(1025)],
}


@each_reduce
@pytest.mark.parametrize("name", ROWS)
def test_neighborhoods_of_any_size(name, reduce):
    rows = [np.array(row, int) for row in ROWS[name]]
    check_neighbor_reduce(values(5000, 17), rows, reduce)
    if reduce in ("mean", "sum"):
        check_neighbor_reduce(values(5000, 17), rows, reduce, values(sum(map(len, rows)), seed=3))


@given(st.data())
def test_any_neighborhoods(data):
    num_points, dtype = data.draw(st.integers(1, 30)), data.draw(clouds.float_types)
    rows = random_rows(
        data.draw(st.integers(0, 70)), num_points, data.draw(st.integers(1, 60)), data.draw(clouds.seeds)
    )
    features = values(num_points, data.draw(st.integers(0, 40)), dtype=dtype, seed=data.draw(clouds.seeds))
    reduce, options = data.draw(st.sampled_from(REDUCES)), {"empty": data.draw(st.sampled_from([0.0, -2.5]))}
    if reduce in ("max", "min"):
        features = features.round()  # with equal ones
        if data.draw(st.booleans()):
            longest = max(map(len, rows), default=0)
            options |= {"pad_value": data.draw(st.sampled_from([0.0, -1.0, 7.0]))}
            options |= {"width": longest + data.draw(st.integers(0, 2))}
    elif data.draw(st.booleans()):
        options["weights"] = values(sum(map(len, rows)), dtype=dtype, seed=4)
    check_neighbor_reduce(features, rows, reduce, **options)


@both_dtypes
@each_reduce
def test_no_points_and_no_channels(reduce, dtype):
    nothing = np.empty((0, 5), dtype)
    got = kp.neighbor_reduce(nothing, neighbors_of([[], []], 0), reduce, empty=-1.5)
    assert_same_bits(got, np.full((2, 5), -1.5, dtype))
    check_neighbor_reduce(nothing, [], reduce)
    check_neighbor_reduce(nothing, [np.empty(0, int)] * 3, reduce)


@each_reduce
def test_an_unused_end_of_the_index_changes_nothing(reduce):
    features, rows = values(50, 17), random_rows(61, 50)
    exact = neighbors_of(rows, 50)
    longer = kp.Neighbors(np.concatenate([exact.index, exact.index[:9]]), exact.row_splits, 50)
    weights = values(len(longer.index)) if reduce in ("mean", "sum") else None

    def results(neighbors):
        primals = (features,) if weights is None else (features, weights[: len(neighbors.index)])
        out, pullback = kp.autodiff.vjp(lambda f, w=None: kp.neighbor_reduce(f, neighbors, reduce, weights=w), *primals)
        return out, *pullback(out)

    (*got, more), (*expected, last) = results(longer), results(exact)
    if weights is not None:
        assert not more[len(last) :].any()
        more = more[: len(last)]
    for a, b in zip((*got, more), (*expected, last), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_the_zero_shadow_of_the_published_max_pooling(reduce):
    # The published formula: a row of zeros is appended to the features, and missing neighbours index it.
    features, padded = values(50, 33), random_rows(61, 50, longest=12)
    padded = neighbors_of(padded, 50).to_padded()
    shadowed = np.concatenate([features, np.zeros_like(features[:1])])[padded]
    expected = shadowed.max(1) if reduce == "max" else shadowed.min(1)
    neighbors = kp.Neighbors.from_padded(padded, 50)
    assert np.array_equal(kp.neighbor_reduce(features, neighbors, reduce, pad_value=0.0), expected)
    assert not np.array_equal(kp.neighbor_reduce(features, neighbors, reduce), expected)


def test_a_neighbor_as_large_as_the_padding_gets_the_gradient():
    features = np.array([[0.0, -1.0, 1.0]])
    neighbors = kp.Neighbors.from_padded(np.array([[0, -1]]), 1)
    _, pullback = kp.autodiff.vjp(lambda f: kp.neighbor_reduce(f, neighbors, "max", pad_value=0.0), features)
    assert pullback(np.ones((1, 3)))[0].tolist() == [[1, 0, 1]]


NAN = float("nan")


@both_dtypes
@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize(
    ("column", "which"),  # for a maximum; the minimum is tested with the negated column
    [
        ([1, 3, 2], 1),
        ([3, 3, 3], 0),
        ([-np.inf, -np.inf, -5], 2),
        ([-0.0, 0.0, -0.0], 0),  # equal
        ([0.0, -0.0, -1.0], 0),
        ([1, NAN, np.inf], 1),
        ([NAN, 1, NAN], 0),
        ([np.inf, 1, NAN], 2),
    ],
)
def test_equal_values_and_nan(column, which, reduce, dtype, isa):
    column = np.array(column, dtype) * (1 if reduce == "max" else -1)
    for channels in 1, 3, 21, 64, 150:
        features = np.repeat(column[:, None], channels, 1)
        everything = neighbors_of([range(3)], 3)
        for fn in (
            lambda f, nb=everything: kp.neighbor_reduce(f, nb, reduce),
            lambda f: kp.segment_reduce(f, None, reduce),
        ):
            out, pullback = kp.autodiff.vjp(fn, features)
            assert_same_bits(out, features[which : which + 1])
            assert (pullback(np.ones_like(out))[0] == (np.arange(3) == which)[:, None]).all()


@each_reduce
def test_a_nan_reaches_only_queries_that_see_it(reduce, isa):
    features, rows = values(50, 17), random_rows(61, 50)
    features[42, 3] = np.nan
    sees = np.array([42 in row for row in rows])
    assert 0 < sees.sum() < len(sees)
    out = kp.neighbor_reduce(features, neighbors_of(rows, 50), reduce)
    assert np.array_equal(np.isnan(out), sees[:, None] & (np.arange(17) == 3))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_million_neighbors_in_float32(reduce):
    features = np.random.default_rng(0).uniform(size=(1_000_000, 3)).astype(np.float32)
    everyone = kp.Neighbors(np.arange(1_000_000, dtype=np.int32), np.array([0, 1_000_000]), 1_000_000)
    expected = features.astype(np.float64).sum(0) / (1_000_000 if reduce == "mean" else 1)
    out = kp.neighbor_reduce(features, everyone, reduce)[0]
    assert np.abs(out / expected - 1).max() < 2e-6  # one running float32 sum would be off by 1e-4


@each_reduce
def test_neighbor_reduce_by_central_differences(reduce):
    features, neighbors = values(50, 7, dtype=np.float64), neighbors_of(random_rows(61, 50), 50)
    weights = values(neighbors.num_pairs, dtype=np.float64)
    primals = (features, weights) if reduce in ("mean", "sum") else (features,)

    def fn(f, w=None):
        return kp.neighbor_reduce(f, neighbors, reduce, weights=w)

    pullback = kp.autodiff.vjp(fn, *primals)[1]
    check_vjp(fn, pullback, primals)
    for wrong in range(len(primals)):
        with pytest.raises(AssertionError, match="relative error"):
            check_vjp(fn, lambda g, w=wrong: [x * (1.001 if i == w else 1) for i, x in enumerate(pullback(g))], primals)


def test_one_primal_alone_gets_the_same_gradient():
    features, neighbors = values(50, 7), neighbors_of(random_rows(61, 50), 50)
    weights, grad = values(neighbors.num_pairs), values(61, 7)

    def fn(f, w):
        return kp.neighbor_reduce(f, neighbors, weights=w)

    both = kp.autodiff.vjp(fn, features, weights)[1](grad)
    (first,) = kp.autodiff.vjp(lambda f: fn(f, weights), features)[1](grad)
    (second,) = kp.autodiff.vjp(lambda w: fn(features, w), weights)[1](grad)
    assert_same_bits(first, both[0])
    assert_same_bits(second, both[1])


def test_weights_of_one_change_nothing():
    features, neighbors = values(50, 7), neighbors_of(random_rows(61, 50), 50)
    ones = np.ones(neighbors.num_pairs, np.float32)
    for reduce in ("mean", "sum"):
        plain = kp.neighbor_reduce(features, neighbors, reduce)
        assert_same_bits(kp.neighbor_reduce(features, neighbors, reduce, weights=ones), plain)


@both_dtypes
def test_the_sparse_matrix_computes_the_same(dtype):
    features, neighbors = values(50, 7, dtype=dtype), neighbors_of(random_rows(61, 50), 50)
    weights = values(neighbors.num_pairs, dtype=dtype)
    for w in (None, weights):
        got = kp.neighbor_reduce(features, neighbors, "sum", weights=w)
        assert_close(got, neighbors.to_sparse(w) @ features, tolerance(dtype))


# ---- nearest_upsample


@both_dtypes
@pytest.mark.parametrize("channels", [0, 1, 3, 64, 200])
def test_nearest_upsample(channels, dtype, isa):
    features, rows = values(50, channels, dtype=dtype), random_rows(301, 50, longest=3)
    features[::7] = -0.0  # copied, not summed
    out, pullback = kp.autodiff.vjp(lambda f: kp.nearest_upsample(f, neighbors_of(rows, 50)), features)
    expected = np.array([features[row[0]] if len(row) else np.zeros(channels, dtype) for row in rows])
    assert_same_bits(out, expected.reshape(301, channels))
    grad = values(301, channels, dtype=dtype)
    expected = np.zeros((50, channels))
    for q, row in enumerate(rows):
        if len(row):
            expected[row[0]] += grad[q]
    assert_close(pullback(grad)[0], expected, tolerance(dtype))


def test_upsampling_a_pyramid():
    points = clouds.uniform(2000)[0]
    fine, coarse = kp.build_pyramid(points, voxel_size=0.05, num_levels=2)
    features = values(len(coarse.points), 5)
    out, pullback = kp.autodiff.vjp(lambda f: kp.nearest_upsample(f, fine.upsamples), features)
    nearest = reference.squared_distances(coarse.points, fine.points).argmin(1)
    assert_same_bits(out, features[nearest])
    expected = np.zeros(features.shape)
    np.add.at(expected, nearest, out.astype(np.float64))
    assert_close(pullback(out)[0], expected, tolerance(np.float32))


def test_nearest_upsample_of_nothing():
    assert kp.nearest_upsample(np.empty((0, 3)), neighbors_of([[], []], 0)).tolist() == [[0, 0, 0]] * 2
    assert kp.nearest_upsample(np.empty((4, 3)), neighbors_of([], 4)).shape == (0, 3)
    unused = kp.Neighbors(np.array([1], np.int32), np.array([0, 0]), 4)  # an index longer than the rows
    assert kp.nearest_upsample(np.ones((4, 3)), unused).tolist() == [[0, 0, 0]]


# ---- gather


@both_dtypes
@pytest.mark.parametrize("index_type", [np.int32, np.int64])
@pytest.mark.parametrize("channels", [0, 1, 3, 64, 200])
def test_gather(channels, index_type, dtype, isa):
    features, index = values(50, channels, dtype=dtype), np.random.default_rng(0).integers(0, 50, 301, index_type)
    out, pullback = kp.autodiff.vjp(lambda f: kp.gather(f, index), features)
    assert_same_bits(out, features[index])
    grad, expected = values(301, channels, dtype=dtype), np.zeros((50, channels))
    np.add.at(expected, index, grad.astype(np.float64))
    assert_close(pullback(grad)[0], expected, tolerance(dtype))


def test_gather_of_nothing():
    assert kp.gather(np.empty((0, 3)), np.empty(0, int)).shape == (0, 3)
    _, pullback = kp.autodiff.vjp(lambda f: kp.gather(f, np.empty(0, int)), np.ones((4, 3)))
    assert pullback(np.empty((0, 3)))[0].tolist() == [[0, 0, 0]] * 4


@pytest.mark.parametrize("bad", [-1, 4, 2**32, -(2**63)])
def test_gather_takes_no_index_outside(bad):
    with pytest.raises(ValueError, match=f"index: expected values from 0 to 3 to match features, got {bad}"):
        kp.gather(np.ones((4, 3)), np.array([0, bad, 3]))


# ---- interpolate


def check_interpolate(points, queries, features, k=3, power=2, **splits):
    if not reference.is_measurable(points, queries, **splits):
        with pytest.raises(ValueError, match=r"points: expected .*distances that float.* rescale them"):
            kp.interpolate(points, queries, features, k, power, **splits)
        return
    rows, weights = inverse_distance_rows(points, queries, k, power, **splits)
    flat = np.concatenate([*weights, np.empty(0)])
    expected, _ = neighbor_reduce(features, rows, "sum", flat)
    out, pullback = kp.autodiff.vjp(lambda f: kp.interpolate(points, queries, f, k, power, **splits), features)
    allowed = tolerance(features.dtype, points.dtype)
    assert_close(out, expected, allowed, np.abs(features).max(initial=1))
    grad = values(*out.shape, dtype=features.dtype, seed=2)
    wanted, _ = neighbor_reduce_vjp(features, rows, grad, "sum", None, flat)
    assert_close(pullback(grad)[0], wanted, allowed, np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("feature_type", [np.float32, np.float64])
@pytest.mark.parametrize("geometry_type", [np.float32, np.float64])
@pytest.mark.parametrize("power", [2, 1, 0.5, 3.7])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_interpolate(k, power, geometry_type, feature_type):
    points, queries = clouds.uniform(200, dtype=geometry_type)[0], clouds.uniform(301, dtype=geometry_type, seed=1)[0]
    queries[::5] = points[:61]
    check_interpolate(points, queries, values(200, 17, dtype=feature_type), k, power)


@pytest.mark.parametrize("name", clouds.NASTY)
def test_interpolate_on_nasty_clouds(name):
    points = clouds.nasty(name, num=130)[0]
    check_interpolate(points, None, values(len(points), 5), 4)
    check_interpolate(points, points[::3] + np.float32(0.1), values(len(points), 5), 4)


def test_interpolate_in_batches_with_empty_clouds():
    points, queries = clouds.uniform(100)[0], clouds.uniform(90, seed=1)[0]
    splits = {"points_row_splits": np.array([0, 0, 2, 100]), "queries_row_splits": np.array([0, 20, 50, 90])}
    check_interpolate(points, queries, values(100, 5), **splits)
    out = kp.interpolate(points, queries, values(100, 5), **splits)
    assert not out[:20].any() and out[20:].any(1).all()
    assert kp.interpolate(points[:0], queries, np.empty((0, 5))).tolist() == np.zeros((90, 5)).tolist()
    assert kp.interpolate(points, queries[:0], values(100, 5)).shape == (0, 5)


def test_a_query_on_points_gets_their_mean_alone():
    points = np.array([[0.0], [0.0], [1e-30], [1.0]])
    features = np.array([[1.0], [3.0], [50.0], [70.0]])
    assert kp.interpolate(points, np.array([[0.0]]), features, k=4).tolist() == [[2.0]]


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("power", [1, 2, 9])
def test_scaling_the_points_by_a_power_of_two_changes_no_interpolation(power, factor):
    points, queries = clouds.uniform(100)[0], clouds.uniform(90, seed=1)[0]
    features, factor = values(100, 5), np.float32(factor)
    assert_same_bits(
        kp.interpolate(points * factor, queries * factor, features, power=power),
        kp.interpolate(points, queries, features, power=power),
    )


@pytest.mark.parametrize("power", [1, 2, 300])
def test_interpolation_of_a_constant_is_that_constant(power):
    points = clouds.nasty("mixed_density", num=300, dtype=np.float64)[0]
    out = kp.interpolate(points, points + 1e-9, np.full((300, 3), 0.7), k=8, power=power)
    assert np.abs(out - 0.7).max() < 1e-15


def test_interpolate_by_central_differences():
    points, queries = clouds.uniform(100, dtype=np.float64)[0], clouds.uniform(90, dtype=np.float64, seed=1)[0]
    features = values(100, 5, dtype=np.float64)

    def fn(f):
        return kp.interpolate(points, queries, f)

    check_vjp(fn, kp.autodiff.vjp(fn, features)[1], (features,))


# ---- segment_reduce


def check_segment_reduce(features, lengths, reduce, **options):
    splits = kp.row_splits(lengths)
    rows = [np.arange(first, last) for first, last in itertools.pairwise(splits)]
    expected, chosen = neighbor_reduce(features, rows, reduce, **options)
    out, pullback = kp.autodiff.vjp(lambda f: kp.segment_reduce(f, splits, reduce, **options), features)
    grad = values(*expected.shape, dtype=features.dtype, seed=2)
    wanted, _ = neighbor_reduce_vjp(features, rows, grad, reduce, chosen)
    if reduce in ("max", "min"):
        assert np.array_equal(out, expected.astype(out.dtype), equal_nan=True)
    else:
        magnitude, _ = neighbor_reduce(np.abs(features), rows, reduce, **options)
        assert_close(out, expected, {4: 1e-7, 8: 1e-13}[features.itemsize], magnitude)
    assert_close(pullback(grad)[0], wanted, 1e-7, np.abs(wanted).max(initial=1))


@both_dtypes
@each_reduce
@pytest.mark.parametrize("channels", CHANNELS)
def test_segments_of_any_channels(channels, reduce, dtype, isa):
    check_segment_reduce(values(400, channels, dtype=dtype), [100, 0, 1, 299, 0], reduce, empty=3.5)


LENGTHS = {
    "none": [],
    "empty": [0, 0],
    "one_block": [1024],
    "a_row_more": [1025, 1023, 0, 1, 2047, 2048, 2049],
    "long_among_short": [1, 2, 9000, 0, 3, 1, 5000],
    "thousands": [*range(1, 100)] * 20,
}


@each_reduce
@pytest.mark.parametrize("name", LENGTHS)
def test_segments_of_any_length(name, reduce):
    lengths = LENGTHS[name]
    check_segment_reduce(values(sum(lengths), 3).round(2), lengths, reduce)  # with equal ones
    check_segment_reduce(values(sum(lengths), 17).round(2), lengths, reduce)


@both_dtypes
@pytest.mark.parametrize("reduce", ["max", "min"])
def test_the_first_of_equals_among_blocks(reduce, dtype):
    features = np.zeros((5000, 3), dtype)
    features[[1500, 4000, 900], [0, 0, 1]] = NAN
    check_segment_reduce(features, [5000], reduce)
    _, pullback = kp.autodiff.vjp(lambda f: kp.segment_reduce(f, None, reduce), features)
    assert np.argwhere(pullback(np.ones((1, 3), dtype))[0]).tolist() == [[0, 2], [900, 1], [1500, 0]]


@pytest.mark.slow
def test_the_mean_of_ten_million_float32():
    features = np.random.default_rng(0).uniform(size=(10_000_000, 2)).astype(np.float32) + np.float32(100)
    expected = np.array([np.sum(column.astype(np.float64)) for column in features.T]) / 1e7
    assert np.abs(kp.segment_reduce(features, None)[0] / expected - 1).max() < 1e-7


@each_reduce
def test_segment_reduce_by_central_differences(reduce):
    features, splits = values(300, 5, dtype=np.float64), kp.row_splits([100, 0, 200])

    def fn(f):
        return kp.segment_reduce(f, splits, reduce)

    check_vjp(fn, kp.autodiff.vjp(fn, features)[1], (features,))


# ---- the same bits everywhere


@both_dtypes
@each_reduce
@pytest.mark.parametrize("channels", [3, 40])
def test_same_bits_with_any_number_of_threads(channels, reduce, dtype, isa, set_threads):
    features, rows = values(20_000, channels, dtype=dtype).round(1), random_rows(6000, 20_000)
    few = random_rows(6000, 9)  # many queries for each point
    index, splits = np.random.default_rng(0).integers(0, 20_000, 30_000), np.array([0, 9000, 9003, 20_000])
    points, queries = clouds.uniform(20_000)[0], clouds.uniform(9_000, seed=1)[0]

    def results():
        neighbors, of_few = neighbors_of(rows, 20_000), neighbors_of(few, 9)
        weights = values(neighbors.num_pairs, dtype=dtype) if reduce in ("mean", "sum") else None
        calls = [
            (lambda f: kp.neighbor_reduce(f, neighbors, reduce), features),
            (lambda f: kp.neighbor_reduce(f, of_few, reduce), features[:9]),
            (lambda f: kp.segment_reduce(f, splits, reduce), features),
            (lambda f: kp.nearest_upsample(f, neighbors), features),
            (lambda f: kp.gather(f, index), features),
            (lambda f: kp.interpolate(points, queries, f), features),
        ]
        if weights is not None:
            calls += [(lambda f, w: kp.neighbor_reduce(f, neighbors, reduce, weights=w), features, weights)]
        for fn, *primals in calls:
            out, pullback = kp.autodiff.vjp(fn, *primals)
            yield from (out, *pullback(out))

    set_threads(1)
    expected = list(results())
    for threads in (2, 3, 8):
        set_threads(threads)
        for got, want in zip(results(), expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_same_choice_with_any_instructions(reduce, isa, set_isa):
    features, neighbors = values(500, 33).round(1), neighbors_of(random_rows(600, 500), 500)
    features[::50, ::3] = NAN
    one = kp.autodiff.vjp(lambda f: kp.neighbor_reduce(f, neighbors, reduce), features)
    set_isa("base")
    other = kp.autodiff.vjp(lambda f: kp.neighbor_reduce(f, neighbors, reduce), features)
    assert_same_bits(one[0], other[0])
    assert_same_bits(one[1](np.ones_like(one[0]))[0], other[1](np.ones_like(one[0]))[0])


# ---- against PyTorch


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_reduce
def test_pytorch(reduce, dtype):
    torch = pytest.importorskip("torch")
    features, index = values(50, 33, dtype=dtype), np.random.default_rng(0).integers(0, 50, (61, 9))
    index = np.array(
        [np.unique(row)[[0, 1, 2, 3, 4]] for row in index]
    )  # no point twice: torch would share its gradient
    neighbors, grad = kp.Neighbors.from_padded(index, 50), values(61, 33, dtype=dtype)
    splits = np.array([0, 20, 20, 50])
    reduced = {"mean": "mean", "sum": "sum", "max": "amax", "min": "amin"}[reduce]
    cases = [
        (lambda f: kp.neighbor_reduce(f, neighbors, reduce), lambda f: getattr(f[index], reduced)(1), grad),
        (lambda f: kp.gather(f, index[:, 0].copy()), lambda f: f[index[:, 0]], grad),
        (
            lambda f: kp.segment_reduce(f, splits, reduce),
            lambda f: torch.segment_reduce(f, reduce, offsets=torch.from_numpy(splits), initial=None),
            grad[:3],
        ),
    ]
    for ours, theirs, g in cases:
        out, pullback = kp.autodiff.vjp(ours, features)
        tensor = torch.from_numpy(features).requires_grad_()
        wanted = theirs(tensor)
        there = torch.isfinite(wanted)  # for an empty item torch returns NaN or infinity, kpcore zero
        (gradient,) = torch.autograd.grad(wanted[there], tensor, torch.from_numpy(g)[there])
        assert_close(out, np.where(there, wanted.detach(), 0), tolerance(dtype))
        assert_close(pullback(g)[0], gradient.numpy(), tolerance(dtype))


# ---- the three point convolutions of docs/aggregation.md, against their formulas


def test_knn_mean():
    points, features = values(100, 3), values(100, 64)
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    indices = np.argsort(distances, axis=1)[:, 1:9]  # without the point itself
    nb = kp.knn_search(points, None, 8, ignore_query_point="index")
    assert_close(kp.neighbor_reduce(features, nb), features[indices].mean(1), tolerance(np.float32))


def test_radius_and_mlp():
    rng = np.random.default_rng(0)
    points, features = rng.normal(size=(100, 3)), rng.normal(size=(100, 16))
    w1, b1, w2, b2 = (rng.normal(size=shape) for shape in ((16, 32), 32, (32, 8), 8))

    def mlp(f):
        return np.maximum(f @ w1 + b1, 0) @ w2 + b2

    expected = np.stack([mlp(features[np.linalg.norm(points - p, axis=1) <= 0.8]).mean(0) for p in points])
    nb = kp.radius_search(points, None, 0.8)
    assert nb.counts.max() > 3
    assert_close(kp.neighbor_reduce(mlp(features), nb), expected, 1e-12)


def test_mlp_of_pairs():
    rng = np.random.default_rng(0)
    points, features, weights = rng.normal(size=(100, 3)), rng.normal(size=(100, 16)), rng.normal(size=(19, 8))
    expected = [
        np.maximum(np.hstack([points[near] - p, features[near]]) @ weights, 0).max(0)
        for p, near in ((p, np.linalg.norm(points - p, axis=1) <= 0.8) for p in points)
    ]
    nb = kp.radius_search(points, None, 0.8)
    relative = points[nb.index] - np.repeat(points, nb.counts, 0)
    pairs = np.maximum(np.hstack([relative, kp.gather(features, nb.index)]) @ weights, 0)
    assert_close(kp.segment_reduce(pairs, nb.row_splits, "max"), np.array(expected), 1e-12)


def test_sparse_matrix():
    points, features, k = values(100, 3), values(100, 64), 8
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    matrix = np.zeros((100, 100))
    np.put_along_axis(matrix, np.argsort(distances, axis=1)[:, 1 : k + 1], 1.0, 1)
    nb = kp.knn_search(points, None, k, ignore_query_point="index")
    for got in (kp.neighbor_reduce(features, nb, "sum") / k, nb.to_sparse() @ features / k):
        assert_close(got, matrix @ features / k, tolerance(np.float32))


# ---- Op.result


def test_shapes_and_dtypes_ahead():
    nb = neighbors_of(random_rows(61, 50), 50)
    of_one = kp.row_splits([50])
    cases = [
        *((OPS["neighbor_reduce"], {"neighbors": nb, "reduce": r, "weights": None, "empty": 0.0}) for r in REDUCES),
        (OPS["nearest_upsample"], {"neighbors": nb}),
        (OPS["gather"], {"index": np.arange(9)}),
        *((OPS["segment_reduce"], {"row_splits": s, "reduce": r}) for r in REDUCES for s in (None, of_one)),
    ]
    for op, given_arguments in cases:
        names = inspect.signature(getattr(kp, op.name)).parameters
        defaults = {name: p.default for name, p in names.items() if p.default is not p.empty}
        for dtype in (np.float32, np.float64):
            arguments = {**defaults, **given_arguments, "features": values(50, 7, dtype=dtype)}
            out, saved = examples.computed(op, arguments)
            got = [(a.shape, a.dtype) for a in (out, *saved)]
            assert op.result(Call(**arguments)) == got, op.name


@pytest.mark.parametrize("op", [OPS["nearest_upsample"], OPS["neighbor_reduce"]], ids=lambda op: op.name)
def test_neighbors_have_no_gradient(op):
    with pytest.raises(TypeError, match=f"neighbors: {op.name} cannot be differentiated in it"):
        kp.autodiff.vjp(lambda x: getattr(kp, op.name)(np.ones((2, 1)), x), np.ones(2))


def test_a_network_of_them():
    """Every operator of this family in one chain: pooling, global pooling, upsampling."""
    points = clouds.uniform(400, dtype=np.float64)[0]
    fine = kp.build_pyramid(points, voxel_size=0.1, num_levels=2)[0]
    features = values(len(fine.points), 4, dtype=np.float64)
    item = np.zeros(len(fine.points), np.int64)

    def fn(f):
        down = kp.neighbor_reduce(f, fine.pools, "max")
        up = kp.nearest_upsample(down, fine.upsamples)
        smooth = kp.interpolate(fine.points, None, up)
        return kp.gather(kp.segment_reduce(smooth, fine.row_splits), item)

    check_vjp(fn, kp.autodiff.vjp(fn, features)[1], (features,), step=1e-6)

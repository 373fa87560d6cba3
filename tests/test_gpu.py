"""The GPU against the CPU: the public functions give the same results and errors for CuPy arrays as for NumPy arrays.

Runs on a GPU if CuPy finds one, otherwise on the emulator with all of its checks, in two orders of threads and blocks.
Neighbours, voxels, choices among equals and the order of results must be the same to the bit; other values must agree
to a tolerance.
"""

import ast
import importlib
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import clouds
import numpy as np
import ops
import pytest
from reference import assert_same_bits
from test_deform2d import GRADIENTS, PROBLEMS, problem

sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))

import fake_cupy

try:
    import cupy

    EMULATED = fake_cupy.is_installed() or not cupy.cuda.is_available()
except ImportError:
    EMULATED = True
if EMULATED:
    cupy = fake_cupy.install()

import kpcore as kp
from kpcore import nn
from kpcore.backends import cpu, gpu, gpu_cell_conv, gpu_deform2d, gpu_kpconv, gpu_launch, gpu_search, gpu_sources
from kpcore.neighbors import Neighbors

pytestmark = pytest.mark.gpu
WIDE = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "two far clusters": lambda rng, shape: rng.choice([-1e4, 1e4], (shape[0], 1)) + 1e-3 * rng.normal(size=shape),
    "activations": lambda rng, shape: np.maximum(rng.normal(size=shape), 0) * (rng.random((shape[0], 1)) < 0.5),
    "equal": lambda rng, shape: np.full(shape, 0.1),
}
MODES = {"forward": {}, "random": {"order": "random", "seed": 1, "preempt": 20}} if EMULATED else {"gpu": {}}
emulated = pytest.mark.skipif(not EMULATED, reason="counted by the stand-in for CuPy")


@pytest.fixture(autouse=True, params=MODES, ids=MODES)
def mode(request, monkeypatch):
    monkeypatch.setattr(fake_cupy, "mode", MODES[request.param])


def map_arrays(fn, value):
    """A nest of tuples, lists and dicts with `fn` applied to each array and each Neighbors in it."""
    if isinstance(value, (np.ndarray, cupy.ndarray, Neighbors)):
        return fn(value)
    if isinstance(value, dict):
        return {name: map_arrays(fn, v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        values = [map_arrays(fn, v) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value


def to_device(value):
    return map_arrays(lambda a: a.to("cuda") if isinstance(a, Neighbors) else cupy.asarray(a), value)


def to_host(value):
    return map_arrays(lambda a: a.to("cpu") if isinstance(a, Neighbors) else a.get(), value)


def outcome(function, *args, **kwargs):
    """The result of the function, or (type, message) of the error that it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def assert_equal(got, expected, exactly=True, tolerance=1e-10):
    """Assert that a nest of device arrays equals a nest of host arrays.

    The unused end of the index of a Neighbors is not compared. If there is a float32 array among the values of a tuple
    or list, the tolerance of float32 is used for all of them, since they were computed from it.
    """
    if isinstance(expected, Neighbors):
        got, pairs = got.to("cpu"), expected.num_pairs
        assert_same_bits(got.row_splits, expected.row_splits)
        assert_same_bits(got.index[:pairs], expected.index[:pairs])
        assert (got.num_points, got.width) == (expected.num_points, expected.width)
        assert (got.distance is None) == (expected.distance is None)
        if expected.distance is not None:
            assert_same_bits(got.distance[:pairs], expected.distance[:pairs])
    elif isinstance(expected, kp.KernelMap):
        for name in ("neighbors", "kernel_index", "out_coords", "out_row_splits", "in_coords", "in_row_splits"):
            assert_equal(getattr(got, name), getattr(expected, name))
        assert got.kernel_size == expected.kernel_size
    elif isinstance(expected, np.ndarray):
        assert isinstance(got, cupy.ndarray)
        got = got.get()
        if exactly:
            assert_same_bits(got, expected)
        else:
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            tolerance = 2e-5 if expected.dtype == np.float32 else tolerance
            assert_same_bits(np.isnan(got), np.isnan(expected))
            difference = np.nan_to_num(np.abs(got - expected)).max(initial=0)
            assert difference <= tolerance * np.nan_to_num(np.abs(expected)).max(initial=0)
    elif isinstance(expected, (tuple, list)):
        assert type(got) is type(expected) and len(got) == len(expected)
        if any(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in expected):
            tolerance = 2e-5
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b, exactly, tolerance)
    else:
        assert got == expected


def check(function, *args, exactly=True, **kwargs):
    """Assert that a function returns the same result, or raises the same error, on the GPU as on the CPU."""
    expected = outcome(function, *args, **kwargs)
    assert_equal(outcome(function, *to_device(args), **to_device(kwargs)), expected, exactly)
    return expected


def check_gradients(function, *primals, exactly=False, seed=2, **kwargs):
    """Assert that a function has the same value and gradients on the GPU as on the CPU."""

    def differentiated(primals, kwargs, place):
        out, pullback = kp.autodiff.vjp(lambda *p: function(*p, **kwargs), *primals)
        grad = np.random.default_rng(seed).normal(size=out.shape).astype(out.dtype)
        return [out, *pullback(place(grad))]

    expected = differentiated(primals, kwargs, lambda a: a)
    assert_equal(differentiated(to_device(primals), to_device(kwargs), cupy.asarray), expected, exactly)


both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])
types = pytest.mark.parametrize("dim, dtype", [(3, np.float32), (2, np.float64)])
nasty = pytest.mark.parametrize("name", clouds.NASTY)
LABEL_TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


# ---- every operator


@pytest.mark.parametrize("geometry, features", [(np.float32, np.float32), (np.float64, np.float32), (np.float64,) * 2])
@pytest.mark.parametrize("num", [0, 1, 24])
@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_every_operator_and_its_gradients(variant, num, geometry, features):
    op, arguments = ops.call(variant, num, geometry, features)
    names = ops.diff(op, arguments)
    for_host = outcome(ops.vjp, op, arguments, names)
    for_device = outcome(ops.vjp, op, to_device(arguments), names)
    if isinstance(for_host[0], type):
        assert for_device == for_host
        return
    (out, pullback), (got, got_pullback) = for_host, for_device
    grad = np.asarray(ops.covector(out))
    assert_equal(
        [got, *got_pullback(cupy.asarray(grad))], [np.asarray(a) for a in (out, *pullback(grad))], exactly=False
    )


EMPTY = [v for v, (name, _) in ops.VARIANTS.items() if "neighbors" in ops.call(v)[1] or "row_splits" in ops.call(v)[1]]


@pytest.mark.parametrize("rows", ["none", "some"])
@pytest.mark.parametrize("variant", EMPTY)
def test_what_is_not_finite_does_not_reach_empty_rows(variant, rows):
    """The features of a point without queries must not be multiplied by zero, since 0 * NaN is NaN."""
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    if arguments.get("neighbors") is not None:
        queries, points = arguments["neighbors"].num_queries, arguments["neighbors"].num_points
        counts = np.arange(queries) % 2 * 2 * (rows == "some")
        index = np.arange(counts.sum(), dtype=np.int32) % (points // 2)  # the other points have no query
        arguments["neighbors"] = kp.Neighbors(index, kp.row_splits(counts), points)
        if arguments.get("weights") is not None and op.name == "neighbor_reduce":
            arguments["weights"] = np.ones(len(index))
        for name in ("neighbor_importances", "kernel_index"):
            if arguments.get(name) is not None:
                arguments[name] = np.resize(arguments[name], len(index))
    elif arguments["row_splits"] is None or rows == "none":
        num = len(arguments["features"])
        arguments["row_splits"] = np.array([0, 0, num, num])
        if np.ndim(arguments.get("origin")) == 2:
            arguments["origin"] = np.repeat(arguments["origin"][:1], 3, axis=0)
    if "features" in arguments:
        features = arguments["features"].copy()
        features[len(features) // 2 :] = np.nan
        arguments["features"] = features
    for_host, for_device = ops.vjp(op, arguments, names), ops.vjp(op, to_device(arguments), names)
    grad = np.asarray(ops.covector(for_host[0]))
    expected = [np.asarray(a) for a in (for_host[0], *for_host[1](grad))]
    assert_equal([for_device[0], *for_device[1](cupy.asarray(grad))], expected, exactly=False)


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_every_operator_twice_is_the_same_bits(variant):
    op, arguments = ops.call(variant, features=np.float32)
    names, arguments = ops.diff(op, arguments), to_device(arguments)
    results = []
    for _ in range(2):
        out, pullback = ops.vjp(op, arguments, names)
        results.append(to_host([out, *pullback(cupy.asarray(np.asarray(ops.covector(out))))]))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# How often the forward pass of an operator waits for the device, to check values (row_splits, labels, an index,
# coordinates) or to read the number of results. Backward passes never wait.
WAITS = {
    "grid_subsample": 1,
    "interpolate": 1,
    "segment_reduce": 1,
    "group_norm": 1,
    "gather": 1,
    "softmax_cross_entropy": 1,
    "to_dense": 2,
}
LAUNCHES = {
    "continuous_conv": 2, "continuous_conv_transpose": 4, "sparse_conv": 2, "sparse_conv_transpose": 4,
    "grid_subsample": 7, "kpconv": 2, "kpconvx": 2, "fitting_loss": 3, "repulsion_loss": 3, "neighbor_reduce": 1,
    "nearest_upsample": 1, "interpolate": 9, "segment_reduce": 3, "gather": 0, "linear": 0, "batch_norm": 4,
    "group_norm": 4, "softmax_cross_entropy": 5, "concatenate": 0, "add": 0, "to_dense": 2,
    "deformable_kernel_conv2d": 2, "conditional_conv2d": 2,
}  # fmt: skip  # largest number of launches of kpcore's kernels in the forward pass; 1 for the other operators


@emulated
@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_launches_and_waits(variant):
    op, arguments = ops.call(variant)
    arguments, names = to_device(arguments), ops.diff(op, arguments)
    counts = fake_cupy.counts
    counts.waits = counts.launches = counts.uploads = 0
    out, pullback = ops.vjp(op, arguments, names)
    unbatched = op.name in ("group_norm", "to_dense") and arguments["row_splits"] is None
    assert counts.waits == WAITS.get(op.name, 0) - unbatched
    assert counts.uploads == (op.name == "grid_subsample")  # voxel_size and origin
    assert counts.launches <= LAUNCHES.get(op.name, 1)
    grad = cupy.asarray(np.asarray(ops.covector(out)))
    counts.waits = counts.uploads = 0
    pullback(grad)
    assert (counts.waits, counts.uploads) == (0, 0)


# ---- search


@pytest.mark.parametrize("make", ["function", "KDTree", "GridIndex"])
@types
@nasty
def test_radius_search_of_nasty_clouds(name, dim, dtype, make):
    points, radius = clouds.nasty(name, dim, dtype, num=150)

    def search(points, queries, radius, **options):
        if make == "function":
            return kp.radius_search(points, queries, radius, **options)
        index = kp.KDTree(points) if make == "KDTree" else kp.GridIndex(points, radius)
        return index.radius_search(queries, radius, **options)

    check(search, points, None, radius, return_distances=True)
    check(search, points, points[::3].copy(), radius, sort="distance", metric="l1", ignore_query_point=True)
    check(search, points, points[::3].copy(), radius, metric="linf", count_only=True)


@types
@nasty
def test_knn_search_of_nasty_clouds(name, dim, dtype):
    points, radius = clouds.nasty(name, dim, dtype, num=100)  # 4 leaves, the last not full; 40 are more than a leaf
    for k in (1, 5, 40):
        check(kp.knn_search, points, None, k, return_distances=True)
    check(kp.knn_search, points, points[::3].copy(), 5, metric="linf", ignore_query_point=True)
    check(lambda p: kp.KDTree(p).knn_search(None, 5, ignore_query_point="index", return_distances=True), points)
    check(lambda p: kp.GridIndex(p, radius).knn_search(None, 3), points)


@pytest.mark.parametrize("queries_at_once", [32, 2048])
@pytest.mark.parametrize("name", ["normal", "two far clusters", "activations", "equal"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_knn_search_in_many_dimensions(name, dtype, queries_at_once, monkeypatch):
    monkeypatch.setattr(gpu_search, "_ROWS_AT_ONCE", queries_at_once)
    if queries_at_once < 2048:
        monkeypatch.setattr(gpu_search, "_PRODUCT_BYTES", 32 * 70 * 8)
    points = WIDE[name](np.random.default_rng(0), (150, 19)).astype(dtype)
    for k, ignore in ((1, False), (9, True), (9, "index"), (150, False)):
        check(kp.knn_search, points, None, k, ignore_query_point=ignore, return_distances=True)
    queries, splits = points[::2] + dtype(0.5), np.array([0, 0, 90, 95, 150, 150])
    check(kp.knn_search, points, queries, 7, return_distances=True)
    check(kp.knn_search, points, queries, 7, points_row_splits=splits,
          queries_row_splits=np.array([0, 5, 40, 40, 70, 75]), return_distances=True)  # fmt: skip
    check(kp.knn_search, points, points[::-1].copy(), 7, ignore_query_point="index", points_row_splits=splits,
          queries_row_splits=np.array([0, 0, 40, 100, 150, 150]), return_distances=True)  # fmt: skip
    for empty in (points[:0], points[:1]):
        check(kp.knn_search, empty, queries, 3)
        check(kp.knn_search, points, empty, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_many_dimensions_that_cannot_be_measured(bad):
    points, queries = np.zeros((2, 40, 33), np.float32)
    queries[7, 5] = bad
    for arguments in ((points, queries), (queries, None), (queries, points), (points[:0], queries)):
        check(kp.knn_search, *arguments, 3)
    check(kp.knn_search, points, None, 3, metric="l1")


@pytest.mark.parametrize("sort", ["index", "distance"])
@pytest.mark.parametrize("most", [0, 1, 7, 40])
def test_the_nearest_within_a_radius(most, sort):
    points, radius = clouds.nasty("lattice_ties", num=150)
    for make in (kp.radius_search, lambda p, q, r, **o: kp.GridIndex(p, r).radius_search(q, r, **o)):
        check(make, points, None, radius, max_neighbors=most, sort=sort, return_distances=True)
        check(make, points, points[::4].copy(), radius, max_neighbors=most, count_only=True)


@pytest.mark.parametrize(
    ("dim", "dtype", "metric"),
    [(dim, dtype, metric) for dim, dtype in ((2, np.float64), (3, np.float32)) for metric in ("l2", "l1", "linf")]
    + [(1, np.float32, "l2"), (4, np.float32, "l2")],
)
def test_an_exclusive_radius(dim, dtype, metric):
    points = np.random.default_rng(0).integers(0, {1: 40, 2: 7, 3: 4, 4: 3}[dim], (120, dim)).astype(dtype)
    options = {"metric": metric, "inclusive": False}
    radii = np.random.default_rng(1).integers(1, 4, 30).astype(dtype)
    for make in (kp.radius_search, lambda p, q, r, **o: kp.KDTree(p).radius_search(q, r, **o)):
        neighbors = check(make, points, None, 2.0, **options)
        assert neighbors.num_pairs < make(points, None, 2.0, metric=metric).num_pairs
        check(make, points, points[::4].copy(), radii, max_neighbors=7, return_distances=True, **options)
        check(make, points, points[::4].copy(), radii, count_only=True, **options)


def test_batches_and_a_radius_for_each():
    points, radius = clouds.nasty("duplicates", num=200)
    queries = np.concatenate([points[::2], points[:5] + np.float32(radius) / 3])
    batches = {
        "points_row_splits": np.array([0, 60, 60, 200]),
        "queries_row_splits": np.array([0, 50, 70, len(queries)]),
    }
    radii = np.random.default_rng(0).uniform(0.2, 1, len(queries)).astype(np.float32) * np.float32(radius)
    check(kp.radius_search, points, queries, radii, **batches)
    radii[::7] *= 20
    check(kp.radius_search, points, queries, radii, **batches)
    check(kp.knn_search, points, queries, 7, return_distances=True, **batches)
    check(kp.radius_search, points, queries, radius, max_neighbors=5, **batches)
    check(kp.radius_search, points, None, radius, points_row_splits=batches["points_row_splits"])


@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e30), (np.float32, 1e-30), (np.float64, 1e200)])
def test_squares_that_overflow_or_vanish(dtype, scale):
    points = (np.random.default_rng(0).uniform(0, 0.3, (80, 3)) * scale).astype(dtype)
    queries, splits, radius = points[::3].copy(), np.array([0, 40, 40, 80]), 1e18
    for found in (
        check(kp.knn_search, points, None, 3),
        check(kp.knn_search, np.zeros((1, 3), dtype), queries, 1),
        check(lambda p, q: kp.KDTree(p).knn_search(q, 3), points, queries),
        check(kp.interpolate, points, queries, np.ones((80, 2))),
        check(kp.farthest_point_sampling, points, 5),
        check(kp.farthest_point_sampling, points * (np.arange(80) > 39)[:, None].astype(dtype), 5, row_splits=splits),
    ):
        assert found[0] is ValueError and found[1].startswith("points: expected squared distances that ")
    check(kp.knn_search, points, None, 3, metric="l1")
    check(kp.knn_search, points, queries, 3, metric="linf")
    check(kp.knn_search, np.full((9, 3), scale, dtype), None, 3)
    check(kp.knn_search, points, queries[:0], 3)
    check(kp.knn_search, points, np.zeros((2, 3), dtype), 3, points_row_splits=splits,
          queries_row_splits=np.array([0, 0, 2, 2]))  # fmt: skip
    check(kp.radius_search, points, queries, radius, return_distances=scale > 1)
    if scale > 1:
        check(kp.radius_search, points, queries, radius, max_neighbors=3)


def test_a_pyramid_of_squares_that_overflow():
    points = np.random.default_rng(0).uniform(0, 1e22, (50, 3)).astype(np.float32)
    for subsampled in (False, True):
        error, text = check(kp.build_pyramid, points, voxel_size=9e18, num_levels=2, conv_radius=0.5,
                            subsampled=subsampled)  # fmt: skip
        assert error is ValueError and text.startswith("points: expected squared distances that float32 can hold")


def test_a_query_that_changes_after_it_was_counted(monkeypatch):
    points, radius = clouds.uniform(300)
    queries, count = cupy.asarray(points[:40] + 5), gpu_search._count

    def counted(search):
        found = count(search)
        queries[:20] = cupy.asarray(points[:20])  # more neighbours than counted
        return found

    monkeypatch.setattr(gpu_search, "_count", counted)
    assert kp.radius_search(cupy.asarray(points), queries, radius).num_pairs == 0
    queries[...] = cupy.asarray(points[:40])
    points[:20] += 7  # fewer
    found = kp.radius_search(cupy.asarray(points), queries, radius, return_distances=True)
    assert found.index.get().min() >= 0 and found.index.get().max() < 300


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_other_dimensions(dim):
    points, radius = clouds.uniform(120, dim)
    check(kp.radius_search, points, None, radius, return_distances=True)
    check(kp.knn_search, points, None, 6)


def test_many_levels_of_boxes():
    points, radius = clouds.uniform(2500)
    queries = points[::50].copy()
    check(lambda p, q: kp.KDTree(p).radius_search(q, radius), points, queries)
    check(kp.knn_search, points, queries, 40)


def test_an_index_is_searched_again():
    points, radius = clouds.uniform(300)

    def searches(points):
        grid, tree = kp.GridIndex(points, radius), kp.KDTree(points)
        return [
            index.radius_search(None, r, max_neighbors=most)
            for index in (grid, tree)
            for r in (radius / 2, radius, 2 * radius)
            for most in (None, 4)
        ]

    check(searches, points)


@emulated
def test_how_often_a_search_waits():
    points, radius = clouds.uniform(100)
    points = to_device(points)
    wide, splits = cupy.zeros((100, 17)), to_device(np.array([0, 40, 100]))
    grid, tree, counts = kp.GridIndex(points, radius), kp.KDTree(points), fake_cupy.counts
    for search, waits, launches in (
        (lambda: grid.radius_search(None, radius), 1, 5),
        (lambda: grid.radius_search(None, radius), 1, 2),
        (lambda: grid.radius_search(None, radius, max_neighbors=3), 0, 5),
        (lambda: tree.knn_search(None, 4), 1, 6),
        (lambda: tree.knn_search(None, 4), 1, 3),
        (lambda: tree.radius_search(None, radius, max_neighbors=3), 0, 2),
        (lambda: kp.radius_search(points, None, radius, count_only=True), 1, 4),
        (lambda: kp.knn_search(wide, None, 4), 1, 9),
        (lambda: kp.knn_search(wide, None, 4, points_row_splits=splits), 3, 15),
    ):
        counts.waits = counts.launches = 0
        search()
        assert (counts.waits, counts.launches) == (waits, launches)


@emulated
@pytest.mark.parametrize(
    ("options", "waits"), [({"num": 5}, 1), ({"min_distance": 0.4}, 2), ({"num": 5, "row_splits": [0, 40, 100]}, 3)]
)
def test_how_often_a_sampling_waits(options, waits):
    points, options = to_device(clouds.uniform(100)[0]), dict(options)
    if "row_splits" in options:
        options["row_splits"] = to_device(np.array(options["row_splits"]))
    fake_cupy.counts.waits = 0
    kp.farthest_point_sampling(points, **options)
    assert fake_cupy.counts.waits == waits


# ---- kernel maps

MAPS = {
    "submanifold": {"kernel_size": 3},
    "even": {"kernel_size": 2},
    "dilation": {"kernel_size": (3, 1, 4), "dilation": (1, 2, 3)},
    "spconv": {"kernel_size": 3, "stride": 2, "padding": 1, "rule": "spconv"},
    "spconv without stride": {"kernel_size": (2, 3, 1), "dilation": 2, "rule": "spconv"},
    "shape": {"kernel_size": 2, "stride": (2, 3, 1), "shape": (9, 9, 9), "rule": "spconv"},
    "minkowski": {"kernel_size": (3, 2, 3), "stride": 2, "rule": "minkowski"},
}


def map_and_transpose(coords, out_coords=None, **options):
    m = kp.kernel_map(coords, out_coords, **options)
    return m, m.transpose()


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_kernel_maps(options):
    rng, axes = np.random.default_rng(0), 3
    coords = rng.integers(0, 6, (80, axes)).astype(np.int32)
    row_splits = np.array([0, 30, 30, 80])
    for some in (coords, coords[:0]):
        check(map_and_transpose, some, **options)
    check(map_and_transpose, coords, row_splits=row_splits, **options)
    if "shape" not in options:
        check(map_and_transpose, coords - 3, coords[::-3].copy(), **options)
        check(map_and_transpose, coords, coords[:20], row_splits=row_splits, out_row_splits=np.array([0, 5, 9, 20]),
              **options)  # fmt: skip


@pytest.mark.parametrize("axes", [1, 2, 4])
def test_kernel_maps_along_other_numbers_of_axes(axes):
    coords = np.random.default_rng(0).integers(-4, 4, (50, axes)).astype(np.int32)
    for rule in ("submanifold", "spconv", "minkowski"):
        check(map_and_transpose, coords, kernel_size=3, stride=1 + (rule != "submanifold"), rule=rule)


def test_kernel_maps_at_the_ends_of_int32():
    coords = np.array([[-(2**31)], [0], [1], [2**31 - 2], [2**31 - 1]], np.int32)
    check(map_and_transpose, coords, kernel_size=3)
    check(map_and_transpose, coords, kernel_size=2, dilation=2**31 - 1)


@pytest.mark.parametrize(
    "options",
    [{"coords": np.zeros((5, 3))}, {"coords": np.full((2, 3), 9, np.int32), "shape": (9, 9, 9), "rule": "spconv"},
     {"coords": np.array([[0] * 3, [2**21] * 3], np.int32)}, {"row_splits": np.array([0, 4])}, {"stride": 2},
     {"coords": np.full((1, 3), -(2**31), np.int32), "stride": 3, "rule": "minkowski"}],
)  # fmt: skip
def test_errors_of_kernel_maps(options):
    arguments = {"coords": np.zeros((5, 3), np.int32), "kernel_size": 3} | options
    assert isinstance(check(kp.kernel_map, **arguments)[0], type)


@emulated
@pytest.mark.parametrize(("options", "waits"), [({}, 2), ({"rule": "spconv", "stride": 2}, 6),
                                                ({"rule": "minkowski", "stride": 2}, 3),
                                                ({"out_coords": np.zeros((4, 3), np.int32)}, 3),
                                                ({"row_splits": np.array([0, 20, 80])}, 3)])  # fmt: skip
def test_waits_of_kernel_maps(options, waits):
    coords = to_device(np.random.default_rng(0).integers(0, 6, (80, 3)).astype(np.int32))
    options, counts = to_device(options), fake_cupy.counts
    counts.waits = counts.uploads = 0
    m = kp.kernel_map(coords, kernel_size=3, **options)
    assert (counts.waits, counts.uploads) == (waits, 0)
    m.transpose()
    assert (counts.waits, counts.uploads) == (waits, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_coordinates_that_are_not_finite(value):
    good, bad = clouds.uniform(50)[0], clouds.uniform(50)[0]
    bad[17, 1] = value
    for points, queries in ((bad, None), (bad, good), (good, bad), (good[:0], bad)):
        check(kp.radius_search, points, queries, 0.1)
        check(kp.radius_search, points, queries, 0.1, count_only=True)
        check(kp.knn_search, points, queries, 3)
        check(lambda p, q: kp.KDTree(p).radius_search(q, 0.1), points, queries)
    check(kp.grid_subsample, bad, 0.1)
    check(kp.farthest_point_sampling, bad, 3)
    check(kp.interpolate, good, bad, good)
    for subsampled in (False, True):
        check(kp.build_pyramid, bad, voxel_size=0.1, num_levels=2, subsampled=subsampled)


@pytest.mark.parametrize("wrong", [{"features": np.ones((4, 2), np.float32)}, {"labels": np.zeros(3, np.int32)}])
def test_a_pyramid_of_rows_that_are_not_the_points(wrong):
    settings = {"voxel_size": 0.1, "num_levels": 1, "subsampled": True}
    error, message = check(kp.build_pyramid, np.zeros((5, 3), np.float32), **settings, **wrong)
    assert error is ValueError and message.startswith(f"{next(iter(wrong))}: expected (5,")


def test_bounded_searches_do_not_look_whether_coordinates_are_finite():
    """A check would wait for the device. Points that are not finite have no neighbours and are neighbours of none."""
    points, radius = clouds.uniform(60)
    odd = points.copy()
    odd[17, 1], odd[18, 0] = np.nan, np.inf
    found = kp.radius_search(to_device(odd), None, radius, max_neighbors=9).to("cpu")
    rest = np.delete(np.arange(60), [17, 18])
    expected = kp.radius_search(points[rest], points[rest], radius, max_neighbors=9)
    assert found.counts[17] == found.counts[18] == 0
    assert_same_bits(found.counts[rest], expected.counts)
    assert_same_bits(found.index[: found.num_pairs], rest[expected.index].astype(np.int32))


# ---- lists


def random_list(num_queries=61, num_points=40, longer=0, seed=0):
    rng = np.random.default_rng(seed)
    splits = kp.row_splits(rng.integers(0, 9, num_queries) * (rng.random(num_queries) < 0.8))
    index = rng.integers(0, num_points, splits[-1] + longer).astype(np.int32)
    return kp.Neighbors(index, splits, num_points, distance=rng.random(len(index)))


@pytest.mark.parametrize("longer", [0, 7])
def test_lists(longer):
    neighbors = random_list(longer=longer)
    check(lambda nb: nb, neighbors)
    check(lambda nb: nb.transpose(), neighbors)
    check(lambda nb: nb.transpose().transpose(), neighbors)
    check(lambda nb: nb.counts, neighbors)
    check(lambda nb: [nb.to_padded(), nb.to_padded(3), nb.to_padded(9, -1)], neighbors)
    check(lambda nb: kp.Neighbors.from_padded(nb.to_padded(9), 40), neighbors)
    check(lambda nb: kp.Neighbors(nb.index, nb.row_splits, 40, nb.distance), neighbors)
    check(lambda nb: kp.Neighbors(nb.index.astype(np.int64), nb.row_splits.astype(np.int32), 40), neighbors)
    check(lambda nb: [nb.to_padded(dtype=np.int64), nb.to_padded(3, 2**40, dtype=np.int64)], neighbors)
    check(lambda nb: [nb.with_transpose().transpose(), nb.with_width(9)], neighbors)
    check(lambda nb: kp.lengths(kp.row_splits(nb.counts)), neighbors)
    query = np.repeat(np.arange(61), neighbors.counts)[::-1].copy()
    check(kp.Neighbors.from_coo, query, neighbors.index[: len(query)][::-1].astype(np.int64), 61, 40)
    check(lambda nb: [nb.edge_index(), nb.edge_index("target_to_source")], neighbors)
    check(lambda nb: kp.Neighbors.from_edge_index(nb.edge_index()[:, ::-1], 40, 61, return_order=True), neighbors)
    check(lambda nb: kp.batch_to_row_splits(kp.row_splits_to_batch(nb.row_splits), 61), neighbors)
    assert repr(neighbors.to("cuda")) == repr(neighbors)


def test_lists_of_nothing():
    empty = kp.Neighbors(np.empty(0, np.int32), np.zeros(4, np.int64), 0)
    check(lambda nb: [nb.transpose(), nb.to_padded(), nb.to_padded(2), nb.counts], empty)
    check(kp.Neighbors.from_padded, np.empty((0, 3), np.int32), 5)
    check(kp.Neighbors.from_coo, np.empty(0, np.int32), np.empty(0, np.int32), 3, 0)


def test_lists_move_with_what_they_know():
    neighbors = random_list()
    assert neighbors.to("cpu") is neighbors
    device = neighbors.to("cuda")
    assert device.to("cuda") is device and device.stored_transposed is None
    neighbors.transpose()
    moved = neighbors.to("cuda")
    assert isinstance(moved.stored_transposed.index, cupy.ndarray)
    assert_equal(moved.transpose(), neighbors.transpose())
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'gpu'"):
        neighbors.to("gpu")


# ---- subsampling, sampling, pyramids


@types
@nasty
def test_grid_subsample_of_nasty_clouds(name, dim, dtype):
    points, radius = clouds.nasty(name, dim, dtype, num=150)
    if name in ("sparse_beyond_64_bits", "astronomic", "nothing_within"):
        radius = float(np.ptp(points)) / 1000 or 1.0
    rng, n = np.random.default_rng(0), len(points)
    features, labels = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 4, n).astype(np.uint8)
    check(kp.grid_subsample, points, radius, features=features, labels=labels)
    check(kp.grid_subsample, points, 2 * radius, features=features.astype(np.float64), feature="max", position="center",
          origin=0.25)  # fmt: skip
    check(kp.grid_subsample, points, 2 * radius, features=features, feature="nearest", position="nearest",
          labels=labels.astype(np.int64) - 1, ignore_label=1, row_splits=np.array([0, n // 3, n // 3, n]))  # fmt: skip
    for origin in ("published", rng.normal(size=(3, dim)).astype(dtype)):
        check(kp.grid_subsample, points, 2 * radius, features=features, feature="nearest", position="center",
              origin=origin, row_splits=np.array([0, n // 3, n // 3, n]))  # fmt: skip


@types
def test_origins_on_a_lattice(dtype, dim):
    # Where a fused or an inexact operation would move points to the next voxel.
    rng = np.random.default_rng(0)
    points = (np.array([0.3, -0.3, 12.7])[:, None, None] + rng.integers(0, 20, (3, 50, dim)) * 0.0125).astype(dtype)
    more = {"row_splits": np.array([0, 50, 100, 150]), "position": "nearest"}
    for multiple in (1, 2, 4, 0.5):
        check(kp.grid_subsample, points.reshape(-1, dim), 0.0125 * multiple, origin="published", **more)
        check(kp.grid_subsample, points.reshape(-1, dim), 0.0125 * multiple, origin=points.min(1), **more)


@pytest.mark.parametrize("bad", [np.nan, 1e38])
def test_origins_that_are_no_corners(bad):
    origin = np.zeros((3, 3), np.float32)
    origin[0] = np.nan  # of an item without points
    origin[2, 1] = bad
    points = clouds.uniform(50)[0]
    check(kp.grid_subsample, points, 0.1, origin=origin, row_splits=np.array([0, 0, 20, 50]))
    check(kp.grid_subsample, points, 0.1, origin=origin[:2], row_splits=np.array([0, 0, 20, 50]))


def test_more_voxels_than_can_be_numbered():
    points = clouds.uniform(50)[0]
    points[17, 1] = 1e9
    for splits in (None, np.array([0, 20, 50])):
        check(kp.grid_subsample, points, 0.1, row_splits=splits)
        check(kp.grid_subsample, points, 1e-30, row_splits=splits)


@both_types
@pytest.mark.parametrize("feature", ["mean", "max", "nearest"])
def test_gradients_of_grid_subsample(feature, dtype):
    points, radius = clouds.nasty("duplicates", num=150)
    features = np.random.default_rng(0).integers(0, 5, (150, 3)).astype(dtype)

    def function(features, points):
        return kp.grid_subsample(points, 2 * radius, features=features, feature=feature).features

    check_gradients(function, features, points=points, exactly=feature != "mean")


@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_labels_of_any_type_and_in_columns(label_type):
    points, (low, high) = clouds.uniform(200)[0], (np.iinfo(label_type).min, np.iinfo(label_type).max)
    values, splits = np.array([low, low + 1, 3, high - 1, high], label_type), np.array([0, 70, 70, 200])
    labels = values[np.random.default_rng(0).integers(0, 5, (200, 3))]
    for ignored in (None, high, low):
        for given in (labels, labels[:, 0].copy(), labels[:, :0]):
            check(kp.grid_subsample, points, 0.4, labels=given, ignore_label=ignored, row_splits=splits)
    check(kp.grid_subsample, points[:0], 0.4, labels=labels[:0])


@types
@nasty
def test_farthest_points_of_nasty_clouds(name, dim, dtype):
    points, _ = clouds.nasty(name, dim, dtype, num=150)
    n = len(points)
    check(kp.farthest_point_sampling, points, 20)
    splits = np.array([0, n // 3, n // 3, n])
    check(kp.farthest_point_sampling, points, n, row_splits=splits, start=np.array([0, 0, (n > 3) + 0]))
    least = min(max(float(np.ptp(points)) / 9, 1e-15), 1e15) if n else 1.0
    check(kp.farthest_point_sampling, points, 20, min_distance=least)
    check(kp.farthest_point_sampling, points, row_splits=splits, min_distance=least / 2)


@types
def test_farthest_points_that_keep_a_distance(dim, dtype):
    points = np.random.default_rng(0).integers(0, 4, (150, dim)).astype(dtype)
    for least in (1, 2**0.5, 2):
        check(kp.farthest_point_sampling, points, min_distance=least, row_splits=np.array([0, 60, 60, 61, 150]))
    check(kp.farthest_point_sampling, points[:0], min_distance=1, row_splits=np.array([0, 0, 0]))


@nasty
def test_surfaces_of_nasty_clouds(name):
    points, radius = clouds.nasty(name, 3, np.float32, num=40)
    splits = np.array([0, len(points) // 3, len(points) // 3, len(points)])
    check(kp.covariance_features, points, k=6, radius=radius, row_splits=splits)
    check(kp.normals, points.astype(np.float64), k=5, viewpoint=points[::-1].astype(np.float64))


def test_outliers():
    points, radius = clouds.uniform(60)
    splits = np.array([0, 20, 20, 60])
    check(kp.outlier_mask, points, mean_k=5, std_mul=0.5, row_splits=splits)
    check(kp.outlier_mask, points, radius=radius, min_points=15)
    check(kp.outlier_mask, points[:1], mean_k=5, std_mul=0.5)


def test_surfaces_in_blocks(monkeypatch):
    monkeypatch.setattr("kpcore.features._PAIRS", 300)
    monkeypatch.setattr("kpcore.features._LEAST_ROWS", 16)
    points, radius = clouds.uniform(100)
    batch = {"row_splits": np.array([0, 30, 30, 100])}
    check(kp.normals, points, radius=radius, viewpoint=np.array([0, 0, 9], np.float32), **batch)
    check(kp.outlier_mask, points, mean_k=7, std_mul=1.0, **batch)


@emulated
def test_how_often_surfaces_and_outliers_wait():
    points, radius = clouds.uniform(100)
    points = to_device(points)
    for call, waits in (
        (lambda: kp.normals(points), 1),
        (lambda: kp.normals(points, radius=radius), 4),
        (lambda: kp.outlier_mask(points, mean_k=5, std_mul=1.0), 6),
        (lambda: kp.outlier_mask(points, radius=radius, min_points=4), 1),
    ):
        fake_cupy.counts.waits = 0
        call()
        assert fake_cupy.counts.waits == waits


@pytest.mark.parametrize("limits", [None, (20, 9)])
def test_a_pyramid_with_an_exclusive_radius(limits):
    points = np.stack(np.meshgrid(*[np.arange(5, dtype=np.float32)] * 3), -1).reshape(-1, 3)
    settings = {"voxel_size": 1.0, "num_levels": 2, "conv_radius": 2.0, "upsample_levels": (0,), "subsampled": True}
    settings |= {"neighbor_limits": limits, "inclusive": False}
    got, expected = (kp.build_pyramid(each, **settings) for each in (to_device(points), points))
    for a, b in zip(got, expected, strict=True):
        assert_equal(tuple(a), tuple(b))


@pytest.mark.parametrize("limits", [None, (9, 12, 5)])
@pytest.mark.parametrize(("subsampled", "origin"), [(False, 0), (True, 0), (False, "published")])
def test_pyramids(subsampled, origin, limits):
    points, _ = clouds.uniform(400)
    rng, splits = np.random.default_rng(0), np.array([0, 150, 150, 400])
    settings = {"voxel_size": 0.08, "num_levels": 3, "origin": origin, "subsampled": subsampled, "deform_levels": (1,),
                "upsample_levels": (0,)}  # fmt: skip
    more = {"features": rng.random((400, 2)).astype(np.float32), "labels": rng.integers(0, 5, 400)}
    counts = fake_cupy.counts
    on_device = to_device({"points": points, "row_splits": splits, **more})
    counts.waits = 0
    got = kp.build_pyramid(**on_device, **settings, neighbor_limits=limits)
    if EMULATED:  # one wait for row_splits, one for each level's number of points, one for all lists without limits
        assert counts.waits == 3 - subsampled + (limits is None) + 1
    expected = kp.build_pyramid(points, row_splits=splits, **more, **settings, neighbor_limits=limits)
    for a, b in zip(got, expected, strict=True):
        assert_equal(tuple(a), tuple(b))
    if limits is None and not subsampled:
        check(lambda p: kp.calibrate_neighbor_limits([p], voxel_size=0.08, num_levels=3, origin=origin), points)


# ---- kpconv


KPCONVS = {
    "rigid": {},
    "gaussian": {"influence": "gaussian", "normalization": "count"},
    "constant": {"influence": "constant", "aggregation": "closest", "normalization": "positive"},
    "closest": {"aggregation": "closest"},
    "deformed": {"deformed": True},
    "deformed_gaussian": {
        "deformed": True,
        "influence": "gaussian",
        "aggregation": "closest",
        "normalization": "positive",
    },
    "groups": {"groups": 2, "channels": (140, 4)},
    "plane": {"dim": 2, "geometry": np.float64},
    "float64": {"features": np.float64, "channels": (1, 3)},
    "depthwise": {"depthwise": True, "deformed": True},
    "attention": {"depthwise": True, "factors": 3},
    "resampled": {"resampled": True},
    "resampled_deformed": {"resampled": True, "deformed": True, "aggregation": "closest", "normalization": "count"},
    "resampled_groups": {"resampled": True, "groups": 2, "channels": (140, 4), "influence": "gaussian"},
    "resampled_depthwise": {"resampled": True, "depthwise": True, "deformed": True},
    "resampled_plane": {"resampled": True, "dim": 2, "geometry": np.float64},
}


def kpconv_problem(dim=3, geometry=np.float32, features=np.float32, channels=(6, 4), groups=1, deformed=False,
                   depthwise=False, factors=0, resampled=False, **options):  # fmt: skip
    case = clouds.random_case(70, 37, dim, geometry, cin=channels[0], cout=channels[1], feature_type=features)
    index, splits, _ = case.csr()
    rng, kernels = np.random.default_rng(0), len(case.kernel_points)
    weights = case.weights[:, : channels[0] // groups].copy()
    primals = {
        "points": case.points,
        "queries": case.queries,
        "features": case.features,
        "weights": weights[:, :, 0].copy() if depthwise else weights,
        "kernel_points": case.kernel_points,
    }
    if deformed:
        primals["offsets"] = (rng.normal(size=(37, kernels, dim)) * case.extent / 4).astype(geometry)
        primals["modulations"] = rng.uniform(0, 2, (37, kernels)).astype(features)
    settings = {"neighbors": kp.Neighbors(index, splits, 70), "extent": case.extent}
    if resampled:
        primals["kernel_offsets"] = (rng.normal(size=(37, kernels, dim)) * case.extent / 2).astype(geometry)
        settings["kernel_extent"] = 1.3 * case.extent
    if factors:
        primals["attention"] = rng.uniform(0, 2, (37, kernels, factors)).astype(features)
        return kp.kpconvx, primals, settings | options
    return kp.kpconv, primals, settings | options | {"groups": groups}


@pytest.mark.parametrize("sums_bytes", [32 << 20, 5000])
@pytest.mark.parametrize("name", KPCONVS)
def test_kpconv(name, sums_bytes, monkeypatch):
    monkeypatch.setattr(gpu_kpconv, "_SUMS_BYTES", sums_bytes)
    function, primals, settings = kpconv_problem(**KPCONVS[name])
    everything = tuple(primals) if function is kp.kpconv else ("features", "weights", "attention")
    for names in (everything, ("weights",), ("features",), everything[:1]):
        constants = {n: a for n, a in primals.items() if n not in names}

        def call(*values, names=names, **more):
            return function(**dict(zip(names, values, strict=True)), **more)

        check_gradients(call, *(primals[n] for n in names), **constants, **settings)


@pytest.mark.parametrize("deformed", [False, True])
def test_the_first_of_equally_near_kernel_points(deformed):
    points, radius = clouds.nasty("dyadic_lattice", num=150)
    neighbors, rng = kp.radius_search(points, None, radius), np.random.default_rng(0)
    kernel_points = np.array([[1, 0, 0], [0, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 1, 1]], np.float32) * np.float32(radius)
    features, weights = (rng.normal(size=s).astype(np.float32) for s in ((len(points), 2), (5, 2, 3)))
    constants = {"points": points, "neighbors": neighbors, "kernel_points": kernel_points}
    constants["offsets"] = np.zeros((len(points), 5, 3), np.float32) if deformed else None

    def closest(features, weights, **constants):
        return kp.kpconv(
            queries=None, features=features, weights=weights, extent=radius, aggregation="closest", **constants
        )

    check_gradients(closest, features, weights, **constants)


def test_kpconv_of_points_among_themselves():
    _, primals, settings = kpconv_problem()
    neighbors = kp.radius_search(primals["points"], None, 2 * settings["extent"])

    def call(points, features, **more):
        return kp.kpconv(points, None, neighbors=more.pop("neighbors"), features=features, **more)

    more = {"weights": primals["weights"], "kernel_points": primals["kernel_points"], "extent": settings["extent"]}
    check_gradients(call, primals["points"], primals["features"], neighbors=neighbors, **more)


@emulated
@pytest.mark.parametrize("backward", [False, True])
def test_kpconv_takes_memory_for_some_queries_at_a_time(backward, monkeypatch):
    monkeypatch.setattr(gpu_kpconv, "_SUMS_BYTES", 1 << 14)
    monkeypatch.setattr(fake_cupy, "mode", {"check": False})
    points, radius = clouds.uniform(600)
    device, rng = to_device(points), np.random.default_rng(0)
    neighbors, kernel_points = kp.radius_search(device, None, radius), to_device(kp.kernel_points(15, radius))
    features, weights = (to_device(rng.normal(size=s).astype(np.float32)) for s in ((600, 16), (15, 16, 16)))
    neighbors.transpose()
    counts = fake_cupy.counts
    before = counts.peak = counts.live
    out, pullback = kp.autodiff.vjp(
        lambda f, w: kp.kpconv(device, None, neighbors, f, w, kernel_points, radius), features, weights
    )
    grads = pullback(out) if backward else ()
    results = sum(a.nbytes for a in (out, *grads))
    beyond = counts.peak - before - results
    assert 1 << 14 <= beyond <= (1 << 14) + 4 * weights.nbytes  # all sums would be 560 KiB


# ---- pooling


@both_types
@pytest.mark.parametrize("channels", [1, 33, 130])
def test_neighbor_reduce(channels, dtype):
    neighbors, rng = random_list(longer=5), np.random.default_rng(0)
    features = rng.normal(size=(40, channels)).astype(dtype)
    weights = rng.random(len(neighbors.index)).astype(dtype)
    padded = kp.Neighbors.from_padded(neighbors.to_padded(30), 40)
    for reduce in ("mean", "sum"):
        check_gradients(
            lambda f, w, nb, r=reduce: kp.neighbor_reduce(f, nb, r, weights=w), features, weights, nb=neighbors
        )
        check_gradients(lambda f, nb, r=reduce: kp.neighbor_reduce(f, nb, r, empty=-3.0), features, nb=neighbors)
    features[::7, 0], features[3::11] = np.nan, 1.5  # ties too
    for reduce in ("max", "min"):
        check_gradients(
            lambda f, nb, r=reduce: kp.neighbor_reduce(f, nb, r, empty=-3.0), features, nb=neighbors, exactly=True
        )
        check_gradients(
            lambda f, nb, r=reduce: kp.neighbor_reduce(f, nb, r, pad_value=0.25), features, nb=padded, exactly=True
        )
    check_gradients(lambda f, nb: kp.nearest_upsample(f, nb), np.nan_to_num(features), nb=neighbors)
    for index_type in (np.int32, np.int64):
        check_gradients(lambda f, i: kp.gather(f, i), np.nan_to_num(features), i=neighbors.index.astype(index_type))


@both_types
@pytest.mark.parametrize("splits", [[0, 2500], [0, 3, 3, 1030, 2500], [0, 0, 2500, 2500]])
def test_segment_reduce(splits, dtype):
    features, splits = np.random.default_rng(0).normal(size=(2500, 5)).astype(dtype), np.array(splits)
    for reduce in ("mean", "sum", "max", "min"):
        if reduce == "max":
            features[1900, 2], features[5, 0] = np.nan, np.nan
        check_gradients(lambda f, s, r=reduce: kp.segment_reduce(f, s, r, empty=-2.0), features, s=splits,
                        exactly=reduce in ("max", "min"))  # fmt: skip


@both_types
@pytest.mark.parametrize("power", [1.0, 2.0, 2.5])
def test_interpolate(power, dtype):
    points = clouds.nasty("duplicates", 3, np.float64, num=60)[0]
    queries = np.concatenate([points[::2], points[:9] + 0.01])
    features = np.random.default_rng(0).normal(size=(60, 7)).astype(dtype)
    check_gradients(lambda f, p, q: kp.interpolate(p, q, f, 4, power), features, p=points, q=queries)


# ---- rows


@both_types
@pytest.mark.parametrize("shape", [(37, 5), (3, 70), (1, 1), (2100, 3)])
def test_rows(shape, dtype):
    rng = np.random.default_rng(0)
    features, other = rng.normal(size=(2, *shape)).astype(dtype)
    weights, bias = rng.normal(size=(shape[1], 4)).astype(dtype), rng.normal(size=4).astype(dtype)
    check_gradients(kp.linear, features, weights, bias)
    check_gradients(kp.linear, features, weights)
    check_gradients(lambda f: kp.leaky_relu(f, 0.3), features, exactly=True)
    check_gradients(kp.relu, features, exactly=True)
    check_gradients(kp.relu6, 9 * features, exactly=True)
    check_gradients(kp.sigmoid, features)
    check_gradients(kp.add, features, other, exactly=True)
    check_gradients(kp.concatenate, features, other[:, :1].copy(), other, exactly=True)
    for rate in (0.0, 0.4, 1.0):
        check_gradients(lambda f, rate=rate: kp.dropout(f, rate, 2**40 + 7), features, exactly=True)
    check_gradients(kp.softmax, 10 * features)


@both_types
@pytest.mark.parametrize("splits", [[0, 60], [0, 7, 7, 60], [0, 2000], [0, 0]])
def test_normalisation(splits, dtype):
    rng, splits = np.random.default_rng(0), np.array(splits)
    features = rng.normal(size=(splits[-1], 6)).astype(dtype)
    features[:, 3] += 100
    scale, shift, mean, var = rng.uniform(0.5, 2, (4, 6)).astype(dtype)
    for groups in (1, 2, 6):
        check_gradients(lambda f, a, b, s, g=groups: kp.group_norm(f, g, a, b, row_splits=s, negative_slope=0.1),
                        features, scale, shift, s=splits)  # fmt: skip
    for training in (True, False)[len(features) < 2 :]:
        running = {"running_mean": mean, "running_var": var, "training": training}
        check_gradients(
            lambda f, a, b, **more: kp.batch_norm(f, a, b, **more).features, features, scale, shift, **running
        )
        check(kp.batch_norm, features, scale, shift, **running, exactly=False)


@both_types
@pytest.mark.parametrize("label_type", [np.uint8, np.int32, np.int64])
def test_cross_entropy(label_type, dtype):
    rng = np.random.default_rng(0)
    logits, labels = (5 * rng.normal(size=(1500, 40))).astype(dtype), rng.integers(0, 40, 1500).astype(label_type)
    weights = rng.uniform(0.5, 2, 40).astype(dtype)
    for ignore_index, class_weights in ((None, None), (3, weights)):
        for reduction in ("mean", "sum", "none"):
            check_gradients(kp.softmax_cross_entropy, logits, labels=labels, ignore_index=ignore_index,
                            class_weights=class_weights, reduction=reduction)  # fmt: skip
    labels[700] = 40
    check(kp.softmax_cross_entropy, logits, labels)
    labels[:] = 3
    check(kp.softmax_cross_entropy, logits, labels, ignore_index=3)


@types
@pytest.mark.parametrize("num_queries", [0, 1, 37])
def test_losses(num_queries, dim, dtype):
    case = clouds.random_case(150, 37, dim, dtype)
    index, splits, _ = case.csr()
    neighbors = kp.Neighbors(index, splits[: num_queries + 1], 150)
    rng = np.random.default_rng(0)
    offsets = (rng.normal(size=(num_queries, len(case.kernel_points), dim)) * case.extent).astype(dtype)
    given = {"points": case.points, "queries": case.queries[:num_queries], "neighbors": neighbors}
    for reduction in ("mean", "sum"):
        check_gradients(
            lambda k, o, r=reduction, **more: kp.fitting_loss(
                **more, kernel_points=k, offsets=o, extent=case.extent, reduction=r
            ),
            case.kernel_points,
            offsets,
            **given,
        )
        for detached in (True, False):
            check_gradients(
                lambda k, o, r=reduction, d=detached: kp.repulsion_loss(
                    k, o, case.extent, detach_others=d, reduction=r
                ),
                case.kernel_points,
                offsets,
            )


# ---- errors


def calls_that_fail():
    """{name: (function, arguments)}: calls of every operator with one array that is wrong in length, dtype or rank."""
    calls = {}
    for variant in ops.VARIANTS:
        op, arguments = ops.call(variant)
        function = getattr(kp, op.name)
        for name, value in arguments.items():
            if not isinstance(value, np.ndarray) or not value.ndim:
                continue
            for what, wrong in (("short", value[:-1].copy()), ("dtype", value.astype(np.int16)),
                                ("dimensions", value[..., None].copy()), ("list", value.tolist())):  # fmt: skip
                calls[f"{variant} {name} {what}"] = function, arguments | {name: wrong}
    points = np.zeros((4, 3))
    nb = kp.radius_search(points, None, 1.0)
    calls |= {
        "radius": (kp.radius_search, {"points": points, "queries": None, "radius": -1.0}),
        "radii": (kp.radius_search, {"points": points, "queries": None, "radius": np.array([1.0, 2.0, 0.0, 1.0])}),
        "k": (kp.knn_search, {"points": points, "queries": None, "k": 0}),
        "falling": (kp.radius_search, {"points": points, "queries": None, "radius": 1.0,
                                       "points_row_splits": np.array([0, 3, 2, 4])}),
        "ends": (kp.segment_reduce, {"features": points, "row_splits": np.array([0, 3])}),
        "start": (kp.farthest_point_sampling, {"points": points, "num": 2, "start": np.array([4])}),
        "index": (kp.Neighbors, {"index": np.array([0, 9], np.int32), "row_splits": np.array([0, 2]), "num_points": 3}),
        "gather": (kp.gather, {"features": points, "index": np.array([0, 4])}),
        "padded": (kp.Neighbors.from_padded, {"index": np.array([[0, 5], [7, -1]]), "num_points": 5}),
        "coo": (kp.Neighbors.from_coo, {"query": np.array([0, 3]), "point": np.array([0, 0]), "num_queries": 2,
                                        "num_points": 1}),
        "list": (kp.neighbor_reduce, {"features": points[:3].copy(), "neighbors": nb}),
        "too large": (kp.grid_subsample, {"points": points, "voxel_size": 1e200}),
    }  # fmt: skip
    return calls


def fails(expected):
    return isinstance(expected, tuple) and isinstance(expected[0], type)


# A cell that the filters do not have is an error on the CPU only; see test_a_wrong_cell_gives_nan.
ONLY_ON_THE_CPU = re.compile(r"sparse_conv.* filters short")
FAILING = {
    name: call
    for name, call in calls_that_fail().items()
    if fails(outcome(call[0], **call[1])) and not ONLY_ON_THE_CPU.match(name)
}


def test_most_of_them_fail():
    assert len(FAILING) > 0.85 * len(calls_that_fail()) > 150


@pytest.mark.parametrize("name", FAILING)
def test_errors_are_those_of_the_cpu(name):
    function, arguments = FAILING[name]
    assert outcome(function, **to_device(arguments)) == outcome(function, **arguments)


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_arrays_of_both_places_do_not_mix(variant):
    op, arguments = ops.call(variant)
    function, device = getattr(kp, op.name), to_device(arguments)
    arrays = [name for name, value in arguments.items() if isinstance(value, (np.ndarray, Neighbors))]
    for name in arrays:
        for given in (arguments | {name: device[name]}, device | {name: arguments[name]}):
            if len(arrays) > 1:
                with pytest.raises(TypeError, match="nothing is moved between devices by itself"):
                    function(**given)


def test_searches_do_not_mix_places():
    points = clouds.uniform(20)[0]
    device, splits = to_device(points), np.array([0, 20])
    for call in (
        lambda: kp.radius_search(device, points, 0.1),
        lambda: kp.radius_search(points, device, 0.1),
        lambda: kp.radius_search(device, None, np.full(20, 0.1, np.float32)),
        lambda: kp.radius_search(device, None, 0.1, points_row_splits=splits),
        lambda: kp.KDTree(device).knn_search(points, 1),
        lambda: kp.grid_subsample(device, 0.1, row_splits=splits),
        lambda: kp.farthest_point_sampling(device, 3, start=np.array([0])),
        lambda: kp.Neighbors(np.zeros(1, np.int32), to_device(np.array([0, 1])), 1),
    ):
        with pytest.raises(TypeError, match="nothing is moved between devices by itself"):
            call()


@emulated
def test_an_array_of_another_gpu(monkeypatch):
    points = to_device(clouds.uniform(20)[0])
    monkeypatch.setattr(fake_cupy, "current", fake_cupy.Device(1))
    monkeypatch.setattr(type(points), "device", fake_cupy.Device(0))
    with pytest.raises(
        ValueError, match=r"points: expected an array on the current GPU 1, got one on GPU 0; call within"
    ):
        kp.radius_search(points, None, 0.1)


def test_what_differentiates_wants_arrays_of_one_place():
    features = to_device(np.ones((3, 2)))
    _, pullback = kp.autodiff.vjp(kp.relu, features)
    with pytest.raises(TypeError, match="grad: expected a CuPy array, because the output is one, got a NumPy array"):
        pullback(np.ones((3, 2)))
    assert_equal(pullback(cupy.asarray(np.ones((3, 2))))[0], np.ones((3, 2)))
    value, (grad, unused) = kp.autodiff.value_and_grad(
        lambda f, g: kp.softmax_cross_entropy(0.5 * f, to_device(np.array([0, 1, 1]))), argnums=(0, 1)
    )(features, features)
    assert isinstance(value, cupy.ndarray) and isinstance(grad, cupy.ndarray)
    assert not unused.get().any()


def test_what_a_bug_report_says(capsys):
    kp.show_config()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GPU")]
    if EMULATED:
        assert line == "GPU              emulator, compute capability 90, driver for CUDA 13.0, CuPy 14.2.0"


# ---- how it is put together


CPU_ALONE = {"kernel_points", "lloyd"}


def test_a_launcher_for_every_kernel_of_the_cpu():
    assert set(gpu_launch.LAUNCHERS) == set(cpu.fields()) - CPU_ALONE


def attributes_of_fields():
    """{function: (attributes of `fields` that it reads, functions that it calls)} of the modules with launchers"""
    functions = {}
    for module in {launcher.__module__ for launcher in gpu_launch.LAUNCHERS.values()}:
        for function in ast.walk(ast.parse(Path(sys.modules[module].__file__).read_text())):
            if isinstance(function, ast.FunctionDef) and any(a.arg == "fields" for a in function.args.args):
                nodes = list(ast.walk(function))
                read = {
                    n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "fields"
                }
                called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
                functions[module, function.name] = read, {(module, name) for name in called}
    return functions


@pytest.mark.parametrize("name", gpu_launch.LAUNCHERS)
def test_a_launcher_reads_fields_of_its_kernel_alone(name):
    functions, seen = attributes_of_fields(), set()
    pending = {(gpu_launch.LAUNCHERS[name].__module__, name)}
    while pending:
        seen |= pending
        pending = set().union(*(functions[key][1] for key in pending)) & set(functions) - seen
    read = set().union(*(functions[key][0] for key in seen))
    assert read and read <= set(cpu.fields()[name])


@pytest.mark.parametrize("backend", [cpu, gpu])
def test_fields_are_taken_the_same_way_in_both_places(backend):
    rows = to_device(np.ones((2, 3))) if backend is gpu else np.ones((2, 3))
    sums = to_device(np.zeros(3)) if backend is gpu else np.zeros(3)
    backend.run("sum_rows", SimpleNamespace(rows=rows, reduce="an attribute that is no field"), sums=sums)
    assert sums.tolist() == [2, 2, 2] if backend is cpu else sums.get().tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match=r"^sum_rows: expected a field sums, got none$"):
        backend.run("sum_rows", SimpleNamespace(rows=rows))
    with pytest.raises(TypeError, match=r"^sum_rows: expected no fields but rows, sums, got rows, sums, total$"):
        backend.run("sum_rows", rows=rows, sums=rows[0].copy(), total=rows)


def test_parameters_of_a_kernel_are_bound_by_name_and_type():
    add = gpu_launch.kernels_of("layers.cu", KP_F="float")["sgd"]
    arrays = dict.fromkeys(("value", "grad", "moment"), cupy.asarray(np.ones(3, np.float32)))
    numbers = {"size": 3, "lr": 1, "momentum": 0, "weight_decay": 0}
    bound = add.bind(SimpleNamespace(momentum=7, unused=0, **arrays), numbers)
    assert [type(value) for value in bound[3:]] == [np.int64, np.float32, np.float32, np.float32]
    assert bound[5] == 0  # the value that is passed overrides the field
    assert add.rebind(bound, lr=2)[4] == 2 and bound[4] == 1
    assert add.bind(None, numbers | arrays | {"grad": None})[1] == 0  # a null pointer
    for values, text in (
        (numbers, r"^layers\.cu: sgd: expected a value for the parameter value, got none"),
        (numbers | arrays | {"n": 3}, r"^layers\.cu: sgd: expected values for value, grad, moment, size, lr, "),
    ):
        with pytest.raises(TypeError, match=text):
            add.bind(None, values)


def test_a_file_is_compiled_with_the_definitions_in_its_first_lines():
    for definitions in ({}, {"KP_T": "float"}, {"KP_F": "float", "KP_DIM": 3}):
        with pytest.raises(TypeError, match=r"^layers\.cu: expected the definitions KP_F, got "):
            gpu_launch.kernels_of("layers.cu", **definitions)
    for path in (gpu_sources.SOURCES / "cuda").glob("*.cu"):
        head = "".join(line for line in path.read_text().splitlines() if line.startswith("// compile:"))
        used = set(re.findall(r"\bKP_(?:[A-Z]|DIM|METRIC|TREE)\b", path.read_text().replace(head, "")))
        assert used == set().union(*gpu_sources.variants(path.name))


def test_scalar_types_behind_aliases():
    for kind, definitions, expected in (
        ("F", {"KP_F": "kp::Half"}, "float"),
        ("F", {"KP_F": "double"}, "double"),
        ("S", {"KP_F": "float"}, "float"),
        ("int64_t", {}, "int64_t"),
        ("Activation", {}, "int"),
    ):
        assert gpu_sources.scalar_type("layers.cu", kind, definitions) == expected
    assert gpu_sources.scalar_type("subsampling.cu", "F", {"KP_T": "double", "KP_S": "KP_T"}) == "double"


class Event:
    """A CUDA event on the emulator: host time, since a launch has finished when it returns."""

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


@emulated
@pytest.mark.parametrize("mode", ["forward"], indirect=True)  # its own is set below
def test_the_benchmark_runs_and_its_results_agree(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    monkeypatch.setattr(fake_cupy, "mode", {"check": False})
    monkeypatch.setattr(cupy.cuda, "Event", Event, raising=False)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda a, b: 1000 * (b.time - a.time), raising=False)
    pool = SimpleNamespace(free_all_blocks=lambda: None, total_bytes=lambda: 0, free_bytes=lambda: 0)
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool)
    gpu = importlib.import_module("gpu")
    rows = gpu.measure(quick=True)
    measured = {(row["case"], row["what"], row["against"]) for row in rows}
    need_gpu = {key for key in gpu.TARGETS if key[2] == "torch brute force" or "TF32" in key[1]}
    assert set(gpu.TARGETS) - need_gpu <= measured
    assert not any(row["target"] for row in rows)


# ---- convolutions with a filter of cells


@pytest.mark.parametrize("sums_bytes", [32 << 20, 9000])
@pytest.mark.parametrize("variant", [v for v in ops.VARIANTS if v.startswith(("continuous_conv", "sparse_conv"))])
def test_convolutions_in_several_parts(variant, sums_bytes, monkeypatch):
    """Some queries at a time, more cells than fit in shared memory, more channels than lanes."""
    monkeypatch.setattr(gpu_cell_conv, "_SUMS_BYTES", sums_bytes)
    op, arguments = ops.call(variant, 60, np.float32, np.float32)
    rng = np.random.default_rng(0)
    shape = (3, 4, 5) if "continuous" in variant else (61,)
    arguments["filters"] = rng.normal(size=(*shape, 35, 33)).astype(np.float32)
    arguments["features"] = rng.normal(size=(60, 35)).astype(np.float32)
    if "sparse" in variant:
        cells = rng.integers(0, 61, len(arguments["kernel_index"]))
        arguments["kernel_index"] = cells.astype(arguments["kernel_index"].dtype)
    names = ops.diff(op, arguments)
    (out, pullback), (got, got_pullback) = ops.vjp(op, arguments, names), ops.vjp(op, to_device(arguments), names)
    grad = np.asarray(ops.covector(out))
    assert_equal([got, *got_pullback(cupy.asarray(grad))], [out, *pullback(grad)], exactly=False)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_wrong_cell_gives_nan(dtype):
    """To raise an error as the CPU does, it would have to wait for the device."""
    _, arguments = ops.call("sparse_conv-1")
    neighbors = arguments["neighbors"]
    arguments["kernel_index"] = arguments["kernel_index"].astype(dtype)
    expected = kp.sparse_conv(**arguments)
    query = int(np.argmax(neighbors.counts))
    for cell in (-1, 6, np.iinfo(dtype).max, np.iinfo(dtype).min):
        arguments["kernel_index"][neighbors.row_splits[query]] = cell
        got = kp.sparse_conv(**to_device(arguments)).get()
        assert np.isnan(got[query]).all()
        np.testing.assert_allclose(np.delete(got, query, 0), np.delete(expected, query, 0), rtol=1e-12)


# ---- convolutions of images

IMAGES = PROBLEMS | {
    "many taps": {"kernel": (9, 10), "scope": (9, 3), "padding": 4, "size": (8, 9), "channels": 5, "data_groups": 5},
    "many taps, last": {"kernel": (9, 10), "scope": (9, 3), "padding": 4, "channels": 4, "layout": "NHWC"},
    "many taps, dense": {"form": "global", "kernel": (9, 10), "scope": 9, "padding": 4, "channels": 4,
                         "data_groups": 2},
    "many channels": {"channels": 140, "kernel_groups": 2, "data_groups": 1},
    "many channels, last": {"channels": 140, "layout": "NHWC", "data_groups": 2},
    "many channels, dense": {"kind": "data", "form": None, "channels": 66, "outputs": 6, "scope": 3, "groups": 2,
                             "data_groups": 1, "layout": "NHWC"},
    "wide scope": {"scope": 9, "channels": 6, "size": (12, 13), "data_groups": 1},
    "wide scope, last": {"scope": 9, "channels": 42, "size": (12, 13), "layout": "NHWC"},
    "each channel": {"channels": 7, "kernel_groups": 7, "data_groups": 7, "layout": "NHWC"},
    "classes without a channel": {"channels": 6, "kernel_groups": 3, "data_groups": 3, "batch": 3},
    "global, last": {"form": "global", "layout": "NHWC", "groups": 2, "experts": 2, "data_groups": 2},
    "global depthwise, last": {"form": "global", "groups": 6, "layout": "NHWC", "experts": 2, "modulated": True},
    "plain, last": {"kind": "data", "form": None, "scope": 3, "layout": "NHWC", "stride": 2, "bias": False},
}  # fmt: skip


@pytest.mark.parametrize("samples_bytes", [20000, 3000])
@pytest.mark.parametrize("name", IMAGES)
def test_convolutions_of_images(name, samples_bytes, monkeypatch):
    """Some images at a time, or some positions of one; the gradient of the kernel in several blocks of positions."""
    monkeypatch.setattr(gpu_deform2d, "_SAMPLES_BYTES", samples_bytes)
    monkeypatch.setattr(gpu_deform2d, "_KERNEL_BLOCK", 32)
    function, arguments = problem(**IMAGES[name])
    everything = [n for n in GRADIENTS if arguments.get(n) is not None]
    for names in (everything, *([n] for n in everything if samples_bytes == 20000)):
        constants = {n: a for n, a in arguments.items() if n not in names}

        def call(*values, names=names, **more):
            return function(**dict(zip(names, values, strict=True)), **more)

        check_gradients(call, *(arguments[n] for n in names), **constants)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["local, data groups", "local, fading", "data", "data, groups", "data, depthwise"])
def test_offsets_that_are_not_finite(name, value):
    function, arguments = problem(**PROBLEMS[name], dtype=np.float32)
    names = [n for n in GRADIENTS if arguments.get(n) is not None]
    for offsets in {"kernel_offsets", "data_offsets"}.intersection(names):
        arguments[offsets] = arguments[offsets].copy()
        arguments[offsets][0, 8, 3, 3] = value  # the row of the tap in the middle
    check_gradients(lambda *values, **more: function(**dict(zip(names, values, strict=True)), **more),
                    *(arguments.pop(n) for n in names), **arguments)  # fmt: skip


@emulated
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name.startswith("local")])
def test_local_deformable_kernels_are_one_launch(name):
    function, arguments = problem(**PROBLEMS[name])
    arguments, counts = to_device(arguments), fake_cupy.counts
    counts.launches = 0
    function(**arguments)
    assert counts.launches == 1 + ("weights" in arguments)


@emulated
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", ["global", "data"])
def test_convolutions_of_images_take_memory_for_some_samples_at_a_time(form, backward, monkeypatch):
    monkeypatch.setattr(gpu_deform2d, "_SAMPLES_BYTES", 1 << 15)
    monkeypatch.setattr(fake_cupy, "mode", {"check": False})
    more = {"form": "global"} if form == "global" else {"kind": "data", "form": None, "scope": 3, "data_groups": 1}
    function, arguments = problem(channels=16, size=(40, 40), dtype=np.float32, **more)
    arguments, counts = to_device(arguments), fake_cupy.counts
    names = [name for name in GRADIENTS if arguments.get(name) is not None]
    before = counts.peak = counts.live
    out, pullback = kp.autodiff.vjp(
        lambda *values: function(**arguments | dict(zip(names, values, strict=True))), *(arguments[n] for n in names)
    )
    grads = pullback(out) if backward else ()
    beyond = counts.peak - before - sum(a.nbytes for a in (out, *grads))
    # All samples would be 1.8 MiB. Backward, there are also the pairs of pixels and samples.
    assert 1 << 14 <= beyond <= (2 << 15 if backward else 1 << 15) + 4 * arguments["weight"].nbytes


# ---- 16 bits


def half_dtype(dtype):
    return (
        cupy.asarray(np.zeros(1, np.float16)).dtype
        if dtype == "float16"
        else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    )


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(
    "variant", [v for v, (name, _) in ops.VARIANTS.items() if name not in ("fitting_loss", "repulsion_loss")]
)
def test_features_of_16_bits(variant, dtype, tolerance):
    """Results equal those of float32 arrays with the same numbers, up to one rounding to 16 bits."""
    dtype = half_dtype(dtype)
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    kinds = {name for name, a in arguments.items() if isinstance(a, np.ndarray) and a.dtype == np.float32}
    kinds -= {"points", "queries", "kernel_points", "offsets", "origin", "extents", "offset"}
    if op.name == "kpconv":
        kinds -= {"kernel_offsets"}  # those of points; those of images have the dtype of the image
    small = {name: arguments[name].astype(dtype) for name in kinds}
    rounded = arguments | {name: a.astype(np.float32) for name, a in small.items()}
    names = ops.diff(op, arguments)
    out, pullback = ops.vjp(op, rounded, names)
    got, got_pullback = ops.vjp(op, to_device(arguments | small), names)
    grad = np.asarray(ops.covector(out)).astype(dtype)
    expected = [out, *pullback(grad.astype(np.float32))]
    for name, a, b in zip(("", *names), [got, *got_pullback(to_device(grad))], expected, strict=True):
        assert a.dtype == (dtype if not name or name in kinds else np.float32)
        a = a.get().astype(np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-3), name


def test_16_bits_are_for_features_on_the_gpu():
    for arrays, text in (
        (np.ones((3, 2), np.float16), "features: expected float32 or float64, got float16"),
        (to_device(np.ones((3, 2), np.float16)), None),
    ):
        if text:
            with pytest.raises(TypeError, match=text):
                kp.relu(arrays)
        else:
            assert kp.relu(arrays).dtype == np.float16
    with pytest.raises(TypeError, match="points: expected float32 or float64, got float16"):
        kp.radius_search(to_device(np.ones((3, 2), np.float16)), None, 1.0)


def test_every_number_of_16_bits():
    """Each 16-bit number is converted to float32 and back, and products are rounded to the nearest.

    Subnormal numbers are left out, since CuPy's compiler flushes them to zero.
    """
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype in (np.dtype(np.float16), half_dtype("bfloat16")):
        values = bits.view(dtype)
        same, wide = kp.leaky_relu(to_device(values), 1.0).get(), values.astype(np.float32)
        assert np.isnan(same[np.isnan(wide)].astype(np.float32)).all()
        normal = (np.abs(wide) >= 2**-120) | (wide == 0)
        assert normal.sum() > 63000 - 2048
        assert_same_bits(same[normal].view(np.uint16), bits[normal])
        for slope in (0.3, 1 + 2**-8, 1 + 2**-11):  # products of the last two are halfway between two numbers
            scaled = kp.leaky_relu(to_device(-np.abs(values[normal])), slope).get()
            with np.errstate(over="ignore"):
                expected = (-np.abs(wide[normal]) * np.float32(slope)).astype(dtype)
            assert_same_bits(scaled.view(np.uint16), expected.view(np.uint16))


def step_of_a_network(net, place):
    """The loss of one training step, parameters and state after it, and the logits that they give."""
    params, state = (place(part) for part in net.init(0, np.float64))
    points = np.random.default_rng(0).random((90, 3))
    pyramid = net.pyramid(place(points), row_splits=place(np.array([0, 40, 90])))
    number = len(pyramid[0].points)
    features, labels = place(points[:number, :2].copy()), place(np.arange(number) % 3)
    tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
    more = {} if getattr(net, "heads", None) is None else {"categories": place(np.array([1, 1]))}
    result = net(kp, tensors, state, pyramid, features, training=True, **more)
    loss = kp.softmax_cross_entropy(result.logits, labels)
    if result.regularization is not None:
        loss = loss + result.regularization
    loss.backward()
    grads = {name: tensor.grad for name, tensor in tensors.items()}
    nn.clip_by_norm(grads, 1.0)
    nn.clip_by_value(grads, 0.1)
    nn.sgd(params, lr_scales={"offset": 0.1}).step(grads, 0.5)
    logits = net(kp, params, result.state, pyramid, features, **more).logits
    return loss.value, *params.values(), *result.state.values(), logits


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "instance"}, {"norm": None}, {"learn_kernel_points": True}, {"heads": {"chair": 1, "table": 2}},
     {"heads": {"chair": 2, "table": 1}, "head_norm": True, "norm": "instance"}],
    ids=str,
)  # fmt: skip
def test_networks(options):
    architecture = nn.architecture(2, 2, deformable=1, upsample="kpconv" if "heads" in options else "nearest")
    net = nn.Network(architecture, 2, 3, 0.4, width=8, kernel_size=4, modulated=True, **options)
    assert_equal(step_of_a_network(net, to_device), step_of_a_network(net, lambda value: value), False)


@pytest.mark.parametrize("detach_offsets", [False, True])
def test_effective_receptive_fields(detach_offsets):
    net = nn.Network(nn.architecture(2, 2, deformable=1), 2, 3, 0.2, width=8, kernel_size=4, modulated=True)
    points = np.random.default_rng(0).random((90, 3))

    def fields(place, **options):
        params, state = (place(part) for part in net.init(0, np.float64))
        pyramid = net.pyramid(place(points), row_splits=place(np.array([0, 40, 90])))
        geometry = {"points": pyramid[0].points, "points_row_splits": pyramid[0].row_splits}
        return kp.effective_receptive_field(
            lambda x: net(kp, params, state, pyramid, x, detach_offsets=detach_offsets).logits,
            place(np.linspace(-1, 1, 2 * len(pyramid[0].points)).reshape(-1, 2)), place(np.array([3, 60])),
            **geometry, **options
        )  # fmt: skip

    on_device, expected = fields(to_device, reach=net.reach), fields(lambda value: value)
    assert isinstance(on_device, np.ndarray) and np.abs(on_device - expected).max() <= 1e-10 * expected.max()
    assert np.array_equal(on_device, fields(to_device))


@pytest.mark.parametrize("metric", ["l1", "l2", "linf"])
def test_relative_distances(metric):
    points, queries = np.random.default_rng(0).random((2, 40, 3))
    queries[3] += 5  # without neighbours
    nb = kp.radius_search(points, queries, 0.4)
    nb = Neighbors(np.append(nb.index, np.int32([-7, 1000])), nb.row_splits, 40)  # numbers of no point at the end
    case = (points, queries, nb), np.linspace(0.8, 1, 40)
    got = nn.blocks.relative_distances(kp, *to_device(case), metric)
    assert_equal(got, nn.blocks.relative_distances(kp, *case, metric))


def test_kpnext():
    net = nn.KPNeXt((1, 1), 2, 3, 0.4, 4, width=16, num_neighbors=(6, 6), shells=(1, 4))
    assert_equal(step_of_a_network(net, to_device), step_of_a_network(net, lambda value: value), False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [nn.sgd, nn.adamw])
def test_optimizers(make, dtype):
    rng = np.random.default_rng(0)
    sizes = {"a": (7, 5), "offset": 300, "none": 0}
    start = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    given = [{name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()} for _ in range(3)]

    def moved(place):
        params = {name: place(value.copy()) for name, value in start.items()}
        optimizer = make(params, lr_scales={"offset": 0.1})
        for grads in given:
            optimizer.step({name: place(value) for name, value in grads.items()}, 0.02)
        state = optimizer.state()
        assert int(state.pop("num_steps")) == 3
        return *params.values(), *state.values()

    assert_equal(moved(to_device), moved(lambda value: value), False)


def test_the_error_of_a_result_too_large_is_that_of_the_cpu():
    points = np.concatenate([np.linspace(0, 1, 90).reshape(30, 3), np.full((10, 3), 0.25)]).astype(np.float32)
    messages = []
    try:
        kp.set_memory_limit(100)
        for array in (points, cupy.asarray(points)):
            with pytest.raises(MemoryError) as refused:
                kp.radius_search(array, None, 0.01)
            messages.append(str(refused.value))
    finally:
        kp.set_memory_limit(None)
    assert messages[0] == messages[1]
    assert "of 40 queries the one at (0.25, 0.25, 0.25) has the most, 10" in messages[0]

"""The GPU backend against the CPU's: the same kernels and the same _gpu.py, on the emulator with all of its checks."""

import sys
from pathlib import Path

import clouds
import numpy as np
import pytest
from reference import assert_same_bits

sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))

import fake_cupy

cupy = fake_cupy.install()

import kpcore as kp  # noqa: E402
from kpcore import _cpu, _gpu  # noqa: E402
from kpcore.kpconv import Problem  # noqa: E402

MODES = {"forward": {}, "random": {"order": "random", "seed": 1, "preempt": 20}}


@pytest.fixture(autouse=True, params=MODES, ids=MODES)
def mode(request, monkeypatch):
    monkeypatch.setattr(fake_cupy, "mode", MODES[request.param])


def to_device(value):
    return cupy.asarray(value) if isinstance(value, np.ndarray) else value


def to_host(value):
    return value.get() if isinstance(value, cupy.ndarray) else value


def no_limit(*args, **kwargs):
    pass


# ---- search


def both(name, points, splits, cell, *arguments):
    """What a search returns, on the CPU and on the GPU."""
    return (
        getattr(_cpu, name)(_cpu.Index(points, splits, cell, 1), *arguments, no_limit, 1),
        tuple(map(to_host, getattr(_gpu, name)(_gpu.Index(to_device(points), to_device(splits), cell, 1),
                                               *map(to_device, arguments), no_limit, 1))),
    )  # fmt: skip


def check_radius_search(points, queries, radius, cell, *, splits=None, queries_splits=None, sort=1, metric=0, ignore=0):
    splits = np.array([0, len(points)]) if splits is None else splits
    if queries is not None and queries_splits is None:
        queries_splits = np.array([0, len(queries)])
    expected, got = both("radius_search", points, splits, cell, queries, queries_splits, radius, None, sort, metric,
                         ignore, True, False)  # fmt: skip
    for a, b in zip(expected, got, strict=True):
        assert_same_bits(b, a)


def check_knn_search(points, queries, k, *, splits=None, queries_splits=None, metric=0, ignore=0, radius=np.inf):
    splits = np.array([0, len(points)]) if splits is None else splits
    if queries is not None and queries_splits is None:
        queries_splits = np.array([0, len(queries)])
    (counts, *expected), (got_counts, *got) = both(
        "knn_search", points, splits, None, queries, queries_splits, radius, k, 2, metric, ignore, True
    )
    assert_same_bits(got_counts, counts)
    there = np.arange(k) < counts[:, None]
    for a, b in zip(expected, got, strict=True):
        assert_same_bits(b[there], a[there])


both_kinds = pytest.mark.parametrize("kind", ["cells", "boxes"])
nasty = pytest.mark.parametrize("name", clouds.NASTY)
types = pytest.mark.parametrize("dim, dtype", [(3, np.float32), (2, np.float64)])


@both_kinds
@types
@nasty
def test_radius_search_of_nasty_clouds(name, dim, dtype, kind):
    points, radius = clouds.nasty(name, dim, dtype, num=150)
    cell = radius if kind == "cells" else None
    check_radius_search(points, None, radius, cell)
    check_radius_search(points, points[::3].copy(), radius, cell, sort=2, metric=1, ignore=1)


@types
@nasty
def test_knn_search_of_nasty_clouds(name, dim, dtype):
    points, radius = clouds.nasty(name, dim, dtype, num=150)
    for k in (1, 5, 40):
        check_knn_search(points, None, min(k, len(points)))
        check_knn_search(points, points[::3].copy(), min(k, len(points)), metric=2, ignore=1)
    check_knn_search(points, None, min(5, len(points)), radius=radius, ignore=2)


@both_kinds
def test_batches_and_a_radius_for_each(kind):
    points, radius = clouds.nasty("duplicates", num=200)
    queries = np.concatenate([points[::2], points[:5] + np.float32(radius) / 3])
    splits, queries_splits = np.array([0, 60, 60, 200]), np.array([0, 50, 70, len(queries)])
    radii = np.random.default_rng(0).uniform(0.2, 1, len(queries)).astype(np.float32) * np.float32(radius)
    cell = radius if kind == "cells" else None
    check_radius_search(points, queries, radii, cell, splits=splits, queries_splits=queries_splits)
    check_knn_search(points, queries, 7, splits=splits, queries_splits=queries_splits)


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_other_dimensions(dim):
    points, radius = clouds.uniform(120, dim)
    check_radius_search(points, None, radius, None)
    check_knn_search(points, None, 6)


def test_many_levels_of_boxes():
    points, radius = clouds.uniform(2500)
    check_radius_search(points, points[::50].copy(), radius, None)
    check_knn_search(points, points[::50].copy(), 40)


def test_a_search_waits_once():
    points, radius = clouds.uniform(100)
    index = _gpu.Index(to_device(points), to_device(np.array([0, 100])), radius, 1)
    fake_cupy.counts.waits = fake_cupy.counts.launches = 0
    _gpu.radius_search(index, None, None, radius, None, 1, 0, 0, False, False, no_limit, 1)
    assert (fake_cupy.counts.waits, fake_cupy.counts.launches) == (1, 2)
    index = _gpu.Index(to_device(points), to_device(np.array([0, 100])), None, 1)
    fake_cupy.counts.waits = fake_cupy.counts.launches = 0
    _gpu.knn_search(index, None, None, np.inf, 4, 2, 0, 0, False, no_limit, 1)
    assert (fake_cupy.counts.waits, fake_cupy.counts.launches) == (0, 1)


# ---- subsampling


def check_grid_subsample(points, voxel_size, *, features=None, labels=None, splits=None, origin=0.0, position=0, feature=0,
                         ignore_label=None):  # fmt: skip
    splits = np.array([0, len(points)]) if splits is None else splits
    sizes = np.full(points.shape[1], voxel_size, points.dtype), np.full(points.shape[1], origin, points.dtype)
    by_nearest = position == 2 or (feature == 2 and features is not None)
    arguments = points, features, labels, splits, *sizes, position, feature, by_nearest, ignore_label
    on_device = [cupy.asarray(a) if isinstance(a, np.ndarray) and i < 4 else a for i, a in enumerate(arguments)]
    expected = _cpu.grid_subsample(*arguments, 1)
    for a, b in zip(expected, map(to_host, _gpu.grid_subsample(*on_device, 1)), strict=True):
        if a is None:
            assert b is None
        else:
            assert_same_bits(b, a)


@types
@nasty
def test_grid_subsample_of_nasty_clouds(name, dim, dtype):
    points, radius = clouds.nasty(name, dim, dtype, num=150)
    if name in ("sparse_beyond_64_bits", "astronomic", "nothing_within"):
        radius = float(np.ptp(points)) / 1000 or 1.0
    rng = np.random.default_rng(0)
    n = len(points)
    features, labels = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 4, n).astype(np.uint8)
    check_grid_subsample(points, radius, features=features, labels=labels)
    check_grid_subsample(points, 2 * radius, features=features.astype(np.float64), feature=1, position=1, origin=0.25)
    check_grid_subsample(points, 2 * radius, features=features, feature=2, position=2,
                         labels=labels.astype(np.int64) - 1, ignore_label=1,
                         splits=np.array([0, n // 3, n // 3, n]))  # fmt: skip


@pytest.mark.parametrize("value, error", [(np.nan, "NotFinite"), (np.inf, "NotFinite"), (1e9, "OutOfRange")])
def test_what_cannot_be_subsampled(value, error):
    points = clouds.uniform(50)[0]
    points[17, 1] = value
    for module in (_cpu, _gpu):
        with pytest.raises(getattr(module, error)):
            device = to_device if module is _gpu else lambda a: a
            module.grid_subsample(device(points), None, None, device(np.array([0, 50])), np.full(3, 0.1, np.float32),
                                  np.zeros(3, np.float32), 0, 0, False, None, 1)  # fmt: skip


# ---- lists


@pytest.mark.parametrize("longer", [0, 7])
def test_transpose(longer):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 60)
    splits = kp.row_splits(counts)
    index = rng.integers(0, 40, splits[-1] + longer).astype(np.int32)
    distance = rng.random(len(index))
    expected = _cpu.transpose(index[: splits[-1]], splits, distance[: splits[-1]], 40, 1)
    got = [to_host(a) for a in _gpu.transpose(*map(to_device, (index, splits, distance)), 40, 1)]
    pairs = splits[-1]
    for a, b in zip(expected, (got[0][:pairs], got[1], got[2][:pairs]), strict=True):
        assert_same_bits(b, a)


# ---- kpconv


def kpconv_problem(dim=3, geometry=np.float32, features=np.float32, *, channels=(6, 4), groups=1, deformed=False,
                   influence=0, aggregation=0, normalization=0, num=70, seed=0, depthwise=False, factors=1):  # fmt: skip
    case = clouds.random_case(num, 37, dim, geometry, seed, cin=channels[0], cout=channels[1], feature_type=features)
    index, splits, _ = case.csr()
    rng, kernels = np.random.default_rng(seed), len(case.kernel_points)
    offsets = (rng.normal(size=(37, kernels, dim)) * case.extent / 4).astype(geometry) if deformed else None
    modulations = rng.uniform(0, 2, (37, kernels)).astype(features) if deformed else None
    weights = case.weights[:, : channels[0] // groups].copy()
    grad = case.grad
    if depthwise:
        weights, grad = weights[:, :, 0].copy(), rng.normal(size=(37, channels[0])).astype(features)
    if factors > 1:
        modulations = rng.uniform(0, 2, (37, kernels, factors)).astype(features)
    return Problem(case.points, case.queries, index, splits, case.features, weights, case.kernel_points, offsets,
                   modulations, case.extent, influence, aggregation, normalization, groups, factors, 1), grad  # fmt: skip


KPCONVS = {
    "rigid": {},
    "gaussian": {"influence": 1, "normalization": 1},
    "constant": {"influence": 2, "aggregation": 1, "normalization": 2},
    "closest": {"aggregation": 1},
    "deformed": {"deformed": True},
    "deformed_gaussian": {"deformed": True, "influence": 1, "aggregation": 1, "normalization": 2},
    "groups": {"groups": 2, "channels": (140, 4)},
    "plane": {"dim": 2, "geometry": np.float64},
    "float64": {"features": np.float64, "channels": (1, 3)},
    "depthwise": {"depthwise": True, "deformed": True},
    "attention": {"depthwise": True, "factors": 3, "aggregation": 1},
}


def paired(expected, got):
    assert expected.keys() == got.keys()
    return [(expected[name], got[name]) for name in expected]


@pytest.mark.parametrize("sums_bytes", [32 << 20, 5000])
@pytest.mark.parametrize("name", KPCONVS)
def test_kpconv(name, sums_bytes, monkeypatch):
    monkeypatch.setattr(_gpu, "_SUMS_BYTES", sums_bytes)
    problem, grad = kpconv_problem(**KPCONVS[name])
    device = Problem(*map(to_device, problem))
    transposed = _cpu.transpose(problem.index, problem.row_splits, None, len(problem.points), 1)[:2]
    needs = {"weights", "points", "queries", "kernel_points"} if problem.factors == 1 else {"weights", "modulations"}
    if problem.offsets is not None:
        needs |= {"offsets", "modulations"}
    for expected, got in (
        (_cpu.kpconv(problem), _gpu.kpconv(device)),
        (_cpu.kpconv_grad_features(problem, *transposed, grad),
         _gpu.kpconv_grad_features(device, *map(to_device, (*transposed, grad)))),
        *((theirs, ours) for names in ({"weights"}, needs, needs - {"weights"}, {"points"} & needs)
          for theirs, ours in paired(_cpu.kpconv_grads(problem, grad, names),
                                     _gpu.kpconv_grads(device, to_device(grad), names))),
    ):  # fmt: skip
        got = got.get()
        assert got.dtype == expected.dtype and got.shape == expected.shape
        tolerance = 1e-10 if expected.dtype == problem.features.dtype == np.float64 else 2e-5
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


# ---- pooling


def check_close(got, expected, exactly=False):
    if expected is None:
        assert got is None
        return
    got = to_host(got)
    if exactly:
        return assert_same_bits(got, expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    tolerance = 2e-6 if expected.dtype == np.float32 else 1e-13
    assert np.abs(got - expected).max(initial=0) <= tolerance * max(1, np.abs(expected).max(initial=0))


def rows_and_lists(dtype, channels, num=90, queries=50, seed=0):
    rng = np.random.default_rng(seed)
    splits = kp.row_splits(rng.integers(0, 40, queries) * (rng.random(queries) < 0.8))
    features = rng.normal(size=(num, channels)).astype(dtype)
    return features, rng.integers(0, num, splits[-1]).astype(np.int32), splits, rng


real_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@real_types
@pytest.mark.parametrize("channels", [1, 33, 130])
def test_neighbor_reduce(channels, dtype):
    features, index, splits, rng = rows_and_lists(dtype, channels)
    features[::7, 0], features[3::11] = np.nan, 1.5  # ties too
    weights, shared = rng.random(len(index)).astype(dtype), kp.row_splits(rng.integers(1, 5, len(features)))
    grad = rng.normal(size=(len(splits) - 1, channels)).astype(dtype)
    clean = np.nan_to_num(features)
    for reduction in range(4):
        for width in (0, 30) if reduction > 1 else (0,):
            arguments = (index, splits, None, None, reduction, -3.0, 0.25, width, True)
            source = features if reduction > 1 else clean
            expected = _cpu.neighbor_reduce(source, *arguments, 1)
            got = _gpu.neighbor_reduce(to_device(source), *map(to_device, arguments), 1)
            check_close(got[0], expected[0], exactly=reduction > 1)
            check_close(got[1], expected[1] if reduction > 1 else None, exactly=True)
            if reduction > 1:
                unpooled = _cpu.unpool(expected[1], grad, len(features), 1)
                check_close(_gpu.unpool(got[1], to_device(grad), len(features), 1), unpooled, exactly=True)
    for options in ((weights, None, 0), (weights, shared, 1), (None, shared, 1)):
        arguments = (index, splits, *options, 0.0, 0.0, 0, False)
        expected = _cpu.neighbor_reduce(clean, *arguments, 1)[0]
        check_close(_gpu.neighbor_reduce(to_device(clean), *map(to_device, arguments), 1)[0], expected)
    arguments = clean, index, splits, 0, grad
    check_close(_gpu.neighbor_reduce_grad_weights(*map(to_device, arguments), 1),
                _cpu.neighbor_reduce_grad_weights(*arguments, 1))  # fmt: skip
    for rows, bounds in ((index, None), (index.astype(np.int64), None), (index, splits)):
        arguments = clean, rows, bounds
        check_close(_gpu.gather_rows(*map(to_device, arguments), 1), _cpu.gather_rows(*arguments, 1), exactly=True)


@real_types
def test_segment_reduce(dtype):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2500, 5)).astype(dtype)
    features[1900, 2], features[5, 0] = np.nan, np.nan
    for splits in (np.array([0, 2500]), np.array([0, 3, 3, 1030, 2500]), np.array([0, 0, 2500, 2500])):
        for reduction in range(4):
            arguments = features if reduction > 1 else np.nan_to_num(features), splits, reduction, -2.0, True
            expected = _cpu.segment_reduce(*arguments, 1)
            got = _gpu.segment_reduce(*map(to_device, arguments), 1)
            check_close(got[0], expected[0], exactly=reduction > 1)
            check_close(got[1], expected[1] if reduction > 1 else None, exactly=True)
            if reduction < 2:
                arguments = rng.normal(size=(len(splits) - 1, 5)).astype(dtype), splits, reduction
                check_close(_gpu.segment_reduce_grad(*map(to_device, arguments), 1),
                            _cpu.segment_reduce_grad(*arguments, 1), exactly=True)  # fmt: skip


@real_types
@pytest.mark.parametrize("power", [1.0, 2.0, 2.5])
def test_inverse_distance_weights(power, dtype):
    _, _, splits, rng = rows_and_lists(dtype, 1)
    distance = np.sort(rng.random(splits[-1])).astype(np.float64)
    distance[: splits[3]] = 0
    arguments = distance, splits, power, np.dtype(dtype)
    check_close(
        _gpu.inverse_distance_weights(*map(to_device, arguments), 1), _cpu.inverse_distance_weights(*arguments, 1)
    )


# ---- rows


def check_rows(name, *arguments, exactly=False):
    expected, got = getattr(_cpu, name)(*arguments, 1), getattr(_gpu, name)(*map(to_device, arguments), 1)
    if not isinstance(expected, list):
        expected, got = [expected], [got]
    for a, b in zip(expected, got, strict=True):
        check_close(b, a, exactly)


@real_types
@pytest.mark.parametrize("shape", [(37, 5), (3, 70), (1, 1), (2100, 3)])
def test_rows(shape, dtype):
    rng = np.random.default_rng(0)
    features, grad = rng.normal(size=(2, *shape)).astype(dtype)
    weights, bias = rng.normal(size=(shape[1], 4)).astype(dtype), rng.normal(size=4).astype(dtype)
    check_rows("linear", features, weights, bias)
    check_rows("linear", features, weights, None)
    check_rows("linear_grad_features", weights, features[:, :1] * bias)
    check_rows("linear_grad_weights", features, grad)
    check_rows("sum_rows", features)
    for activation in range(3):
        check_rows("activate", features, activation, 0.1, exactly=activation < 2)
        check_rows("activate_grad", features, activation, 0.1, grad, exactly=activation < 2)
    check_rows("add", features, grad, exactly=True)
    for rate in (0.0, 0.4, 1.0):
        check_rows("dropout", features, rate, 2**40 + 7, exactly=True)
    check_rows("softmax", 10 * features)
    check_rows("softmax_grad", 3 * features, grad)
    whole = _gpu.concatenate([to_device(features), to_device(weights[:1].repeat(shape[0], 0))], 1)
    check_close(whole, _cpu.concatenate([features, weights[:1].repeat(shape[0], 0)], 1), exactly=True)
    parts = _gpu.split(whole, [shape[1], 4], [False, True], 1)
    assert parts[0] is None
    check_close(parts[1], weights[:1].repeat(shape[0], 0), exactly=True)


# ---- losses of deformed kernel points


@types
@pytest.mark.parametrize("num_queries", [0, 1, 37])
def test_losses(num_queries, dim, dtype):
    case = clouds.random_case(150, 37, dim, dtype)
    index, splits, _ = case.csr()
    queries, splits = case.queries[:num_queries], splits[: num_queries + 1]
    kernels, rng = len(case.kernel_points), np.random.default_rng(0)
    offsets = (rng.normal(size=(num_queries, kernels, dim)) * case.extent).astype(dtype)
    kernel = case.kernel_points, offsets, case.extent
    weight = 0.3 / max(1, num_queries)
    fitting = case.points, queries, index, splits, *kernel, weight
    loss, nearest = _cpu.fitting_loss(*fitting, 1)
    got_loss, got_nearest = _gpu.fitting_loss(*map(to_device, fitting), 1)
    check_close(got_loss, loss)
    check_close(got_nearest, nearest, exactly=True)
    repulsion = *kernel, 1.2, weight
    check_close(_gpu.repulsion_loss(*map(to_device, repulsion), 1), _cpu.repulsion_loss(*repulsion, 1))
    for wanted in ((True, True), (True, False), (False, True)):
        for name, arguments in (("fitting_loss_grad", (*fitting, nearest, *wanted)),
                                ("repulsion_loss_grad", (*repulsion, *wanted))):  # fmt: skip
            expected, got = getattr(_cpu, name)(*arguments, 1), getattr(_gpu, name)(*map(to_device, arguments), 1)
            for a, b in zip(expected, got, strict=True):
                check_close(b, a)


# ---- normalisation and cross entropy


@real_types
@pytest.mark.parametrize("splits", [[0, 60], [0, 7, 7, 60], [0, 2000], [0, 0]])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_normalisation(groups, splits, dtype):
    rng, splits = np.random.default_rng(0), np.array(splits)
    features, grad = rng.normal(size=(2, splits[-1], 6)).astype(dtype)
    features[:, 3] += 100
    scale, shift = rng.uniform(0.5, 2, (2, 6)).astype(dtype)
    mean, variance = _cpu.moments(features, splits, groups, 1)
    for got, expected in zip(
        _gpu.moments(to_device(features), to_device(splits), groups, 1), (mean, variance), strict=True
    ):
        check_close(got, expected)
    inverse = 1 / np.sqrt(variance + 1e-5)
    given = features, splits, scale, shift, mean, inverse
    check_rows("normalize", *given, 0.1)
    for is_given in (False, True):
        for needs in ((True, True, True), (True, False, False), (False, False, True)):
            arguments = *given, is_given, 0.1, grad, *needs
            expected = _cpu.normalize_grad(*arguments, 1)
            for a, b in zip(expected, _gpu.normalize_grad(*map(to_device, arguments), 1), strict=True):
                check_close(b, a)


@real_types
@pytest.mark.parametrize("label_type", [np.uint8, np.int32, np.int64])
def test_cross_entropy(label_type, dtype):
    rng = np.random.default_rng(0)
    logits, labels = (5 * rng.normal(size=(1500, 40))).astype(dtype), rng.integers(0, 40, 1500).astype(label_type)
    weights = rng.uniform(0.5, 2, 40).astype(dtype)
    for ignore, class_weights in ((None, None), (3, weights)):
        for reduction in range(3):
            given = logits, labels, ignore, class_weights, reduction
            loss = _cpu.cross_entropy(*given, reduction == 2, 1)
            check_close(_gpu.cross_entropy(*map(to_device, given), reduction == 2, 1), loss)
            grad = np.asarray(rng.normal(size=loss.shape), dtype)
            check_rows("cross_entropy_grad", *given, grad)
    labels[700] = 40
    for module, place in ((_cpu, lambda a: a), (_gpu, to_device)):
        with pytest.raises(module.OutOfRange):
            module.cross_entropy(place(logits), place(labels), None, None, 0, False, 1)
    labels[:] = 3
    check_close(_gpu.cross_entropy(to_device(logits), to_device(labels), 3, None, 0, False, 1), np.zeros((), dtype))


# ---- the rest


@both_kinds
@pytest.mark.parametrize("sort", [1, 2])
@pytest.mark.parametrize("most", [0, 1, 7, 40])
def test_the_nearest_within_a_radius(most, sort, kind):
    points, radius = clouds.nasty("lattice_ties", num=150)
    expected = kp.radius_search(points, None, radius, max_neighbors=most, sort=(None, "index", "distance")[sort],
                                return_distances=True)  # fmt: skip
    index = _gpu.Index(to_device(points), to_device(np.array([0, len(points)])), radius if kind == "cells" else None, 1)
    got = _gpu.radius_search(index, None, None, radius, most, sort, 0, 0, True, False, no_limit, 1)
    pairs = expected.num_pairs
    assert_same_bits(got[0].get(), expected.row_splits)
    assert_same_bits(got[1].get()[:pairs], expected.index)
    assert_same_bits(got[2].get()[:pairs], expected.distance)


@real_types
@pytest.mark.parametrize("feature", range(3))
def test_grid_subsample_gradient(feature, dtype):
    points, radius = clouds.nasty("duplicates", num=150)
    rng = np.random.default_rng(0)
    features = rng.integers(0, 5, (150, 3)).astype(dtype)
    settings = np.full(3, 2 * radius, np.float32), np.zeros(3, np.float32), 0, feature, feature == 2, None
    *_, inverse, counts, nearest = _cpu.grid_subsample(points, features, None, np.array([0, len(points)]), *settings, 1)
    grad = rng.normal(size=(len(counts), 3)).astype(dtype)
    check_rows("grid_subsample_grad", features, inverse, counts, nearest, feature, grad, exactly=True)


def test_the_names_and_arguments_of_the_cpu():
    """All of _cpu.pyi but what has no meaning there."""
    import ast

    text = ast.parse(Path(_gpu.__file__).with_name("_cpu.pyi").read_text())
    cpu = {f.name: [a.arg for a in f.args.args] for f in text.body if isinstance(f, ast.FunctionDef)}
    of_the_cpu_alone = {"fma_rate", "has_openmp", "isa", "isas", "kernel_points", "lloyd", "pause_threads", "set_isa",
                        "version", "xla_arrays"}  # fmt: skip
    missing = {name for name in cpu if not hasattr(_gpu, name)} - of_the_cpu_alone
    assert missing == {"farthest_points"}  # not written yet
    for name in set(cpu) - missing - of_the_cpu_alone:
        code = getattr(_gpu, name).__code__
        assert list(code.co_varnames[: code.co_argcount]) == cpu[name], name

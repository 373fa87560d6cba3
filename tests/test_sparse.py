"""Sparse convolution and its transpose: values, every gradient, errors. Open3D's layers are in test_compat_open3d."""

import itertools

import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_close, assert_same_bits, tolerance

import kpcore as kp

DIFFERENTIABLE = ("features", "filters", "importances", "neighbor_importances")
FUNCTIONS = (kp.sparse_conv, kp.sparse_conv_transpose)
CHANNELS = [1, 2, 3, 15, 16, 17, 33, 64, 65, 130]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


# ---- the formulas in float64, pair by pair


def convolution(transposed, neighbors, kernel_index, features, filters, normalize=False, importances=None,
                neighbor_importances=None):  # fmt: skip
    """Either convolution in float64."""
    matrices = filters.astype(np.float64).reshape(-1, *filters.shape[-2:])
    index, query = neighbors.index, np.repeat(np.arange(neighbors.num_queries), neighbors.counts)
    factors = np.ones(len(index)) if neighbor_importances is None else neighbor_importances.astype(np.float64)
    owner, owners = (index, neighbors.num_points) if transposed else (query, neighbors.num_queries)
    sums = np.bincount(owner[: len(query)], factors[: len(query)], owners) if normalize else np.ones(owners)
    sums[sums == 0] = 1
    importances = (
        np.ones(neighbors.num_queries if transposed else neighbors.num_points) if importances is None else importances
    )
    out = np.zeros((neighbors.num_queries, filters.shape[-1]))
    for e, q in enumerate(query):
        factor = factors[e] * importances[q if transposed else index[e]] / sums[owner[e]]
        out[q] += factor * features[index[e]].astype(np.float64) @ matrices[kernel_index[e]]
    return out


# ---- problems


def problem(function=kp.sparse_conv, num_points=40, num_queries=23, cells=(3, 3, 3), cin=3, cout=4, longest=12,
            features=np.float64, seed=0, longer=0):  # fmt: skip
    """Arguments with every array set; some cells occur twice for a query, and a third of the queries have no pair."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, longest + 1, num_queries) * (rng.uniform(size=num_queries) > 0.3) * (num_points > 0)
    pairs = int(counts.sum()) + longer
    owners = num_queries if function is kp.sparse_conv_transpose else num_points
    index = rng.integers(0, max(1, num_points), pairs).astype(np.int32)
    return {
        "neighbors": kp.Neighbors(index, kp.row_splits(counts), num_points),
        "kernel_index": rng.integers(0, np.prod(cells), pairs).astype(np.int32),
        "features": rng.normal(size=(num_points, cin)).astype(features),
        "filters": rng.normal(size=(*cells, cin, cout)).astype(features),
        "importances": rng.normal(size=owners).astype(features),
        "neighbor_importances": rng.uniform(0.5, 2, pairs).astype(features),
    }


def check(function, arguments, **options):
    """Assert that the result is that of the formulas, and return it."""
    out = function(**arguments, **options)
    assert out.dtype == arguments["features"].dtype
    expected = convolution(function is kp.sparse_conv_transpose, **arguments, **options)
    assert_close(out, expected, tolerance(out.dtype))
    return out


def gradients(function, arguments, names=DIFFERENTIABLE, **options):
    """{name: gradient} of the arguments in `names` that are not None, and the result as "out"."""
    names = [name for name in names if arguments[name] is not None]
    out, pullback = kp.autodiff.vjp(
        lambda *values: function(**{**arguments, **dict(zip(names, values, strict=True))}, **options),
        *(arguments[name] for name in names),
    )
    grad = np.random.default_rng(7).normal(size=out.shape).astype(out.dtype)
    return dict(zip(names, pullback(grad), strict=True)) | {"out": out}


CALLS = {
    function.__name__: (
        lambda num, geometry, features, function=function: problem(
            function, num, 2 * num // 3, (2, 3), 3, 2, longest=4, features=features
        ),
        [
            {"normalize": True},
            {"importances": None, "neighbor_importances": None},
            lambda a: {
                "normalize": True,
                "neighbor_importances": None,
                "kernel_index": a["kernel_index"].astype(np.int64),
            },
        ],
    )
    for function in FUNCTIONS
}


# ---- values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cells", [(1,), (27,), (2, 2), (7, 7, 7)])
@each_function
def test_formulas(function, cells, normalize, dtype, isa):
    arguments = problem(function, cells=cells, features=dtype)
    check(function, arguments, normalize=normalize)
    check(function, arguments | {"importances": None, "neighbor_importances": None}, normalize=normalize)
    check(function, arguments | {"kernel_index": arguments["kernel_index"].astype(np.int64)}, normalize=normalize)


@pytest.mark.parametrize(("cin", "cout"), [*((c, 3) for c in CHANNELS), *((5, c) for c in CHANNELS), (64, 64)])
def test_channels(cin, cout, isa):
    check(kp.sparse_conv, problem(cin=cin, cout=cout, features=np.float32))


@pytest.mark.parametrize("num_queries", [0, 1, 12, 61, 121, 400])
@pytest.mark.parametrize("num_points", [0, 1, 300])
@each_function
def test_numbers_of_points_and_queries(function, num_points, num_queries):
    """Up to 300 neighbours are three chunks."""
    arguments = problem(function, num_points, num_queries, longest=300, longer=5)
    check(function, arguments, normalize=True)
    grads = gradients(function, arguments, normalize=True)
    assert not grads["neighbor_importances"][int(arguments["neighbors"].row_splits[-1]) :].any()


def test_neighbours_in_the_same_cell_are_summed():
    neighbors = kp.Neighbors(np.array([0, 1], np.int32), np.array([0, 2]), 2)
    arguments = {
        "neighbors": neighbors,
        "kernel_index": np.array([300, 300], np.int32),
        "importances": None,
        "features": np.array([[1.0], [10.0]]),
        "filters": np.full((343, 1, 1), 2.0),
        "neighbor_importances": None,
    }
    grads = gradients(kp.sparse_conv, arguments)
    assert grads["out"].tolist() == [[22.0]]
    covector = np.random.default_rng(7).normal()
    assert grads["filters"][300, 0, 0] == 11 * covector
    assert not np.delete(grads["filters"], 300, axis=0).any()


# ---- gradients


@pytest.mark.parametrize("normalize", [False, True])
@each_function
def test_gradients_by_central_differences(function, normalize):
    arguments = problem(function)
    _, pullback = kp.autodiff.vjp(
        lambda *values: function(
            arguments["neighbors"], arguments["kernel_index"], *values[:2], normalize=normalize, importances=values[2],
            neighbor_importances=values[3],
        ),
        *(arguments[name] for name in DIFFERENTIABLE),
    )  # fmt: skip
    for at, name in enumerate(DIFFERENTIABLE):
        check_vjp(
            lambda value, name=name: function(**arguments | {name: value}, normalize=normalize),
            lambda g, at=at: [pullback(g)[at]],
            [arguments[name]],
        )


@each_function
def test_only_the_gradients_that_are_needed(function):
    arguments = problem(function)
    everything = gradients(function, arguments, normalize=True)
    for name in DIFFERENTIABLE:
        alone = gradients(function, arguments, [name], normalize=True)
        assert_same_bits(alone[name], everything[name])


def test_the_transpose_is_the_adjoint():
    arguments = problem(cin=5) | {"importances": None, "neighbor_importances": None}
    neighbors, cells, rng = arguments["neighbors"], arguments["kernel_index"], np.random.default_rng(1)
    query = np.repeat(np.arange(neighbors.num_queries), neighbors.counts).astype(np.int32)
    order = np.argsort(neighbors.index, kind="stable")
    y = rng.normal(size=(neighbors.num_queries, 4))
    back = kp.sparse_conv_transpose(
        kp.Neighbors.from_coo(neighbors.index, query, neighbors.num_points, neighbors.num_queries), cells[order], y,
        arguments["filters"].swapaxes(-1, -2).copy(),
    )  # fmt: skip
    assert_close(np.vdot(kp.sparse_conv(**arguments), y), np.vdot(arguments["features"], back), 1e-12)


@each_function
def test_the_same_bits_with_any_number_of_threads(function, isa, set_threads):
    arguments = problem(function, 1500, 1300, longest=20, cin=17, cout=9, features=np.float32)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(gradients(function, arguments, normalize=True))
    for other in results[1:]:
        for name, value in other.items():
            assert_same_bits(value, results[0][name])


def test_what_is_not_finite_changes_only_queries_that_see_it():
    arguments = problem()
    before, features = kp.sparse_conv(**arguments), arguments["features"].copy()
    point = arguments["neighbors"].index[0]
    features[point] = np.nan
    after = kp.sparse_conv(**arguments | {"features": features})
    splits = arguments["neighbors"].row_splits
    sees = np.array([point in arguments["neighbors"].index[b:e] for b, e in itertools.pairwise(splits)])
    assert_same_bits(after[~sees], before[~sees])
    assert np.isnan(after[sees]).all()


# ---- errors


@pytest.mark.parametrize("cell", [-1, 27, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_cell_that_the_filters_do_not_have(cell, dtype):
    arguments = problem()
    arguments["kernel_index"] = arguments["kernel_index"].astype(dtype)
    arguments["kernel_index"][3] = cell
    with pytest.raises(ValueError, match=f"kernel_index: expected values from 0 to 26 to match filters, got {cell}"):
        kp.sparse_conv(**arguments)
    if dtype is np.int64:
        arguments["kernel_index"][3] = 2**40
        with pytest.raises(ValueError, match=f"got {2**40}"):
            kp.sparse_conv(**arguments)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"kernel_index": np.zeros(3, np.int32)}, ValueError, r"kernel_index: expected \(\d+,\) to match neighbors"),
    ({"kernel_index": problem()["kernel_index"].astype(np.uint8)}, TypeError, "kernel_index: expected int32 or int64"),
    ({"filters": np.ones((4, 4))}, ValueError, r"filters: expected \(K, 3, Cout\) to match features, got \(4, 4\)"),
    ({"filters": np.ones((27, 4, 4))}, ValueError, r"filters: expected \(K, 3, Cout\) .* got \(27, 4, 4\)"),
    ({"importances": np.ones(23)}, ValueError, r"importances: expected \(40,\) to match neighbors, got \(23,\)"),
    ({"neighbors": 3}, TypeError, "neighbors: expected kpcore.Neighbors, got int"),
])  # fmt: skip
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        kp.sparse_conv(**problem() | changes)

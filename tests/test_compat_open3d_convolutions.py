"""The convolutions of kpcore.compat.open3d against kpcore's operators and results of Open3D, stored and live."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from reference import assert_close

torch = pytest.importorskip("torch")

from test_compat_open3d import open3d  # noqa: E402, F401 - a fixture
from torch.autograd.gradcheck import gradcheck  # noqa: E402

import kpcore.torch as kpt  # noqa: E402
from kpcore.compat import open3d as ops  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
FUNCTIONS = ("continuous_conv", "continuous_conv_transpose", "sparse_conv", "sparse_conv_transpose")
MAPPINGS = ("ball_to_cube_radial", "ball_to_cube_volume_preserving", "identity")
INTERPOLATIONS = ("linear", "linear_border", "nearest_neighbor")
NONE = torch.zeros(0)


def golden_cases(function):
    with np.load(GOLDEN / f"open3d_{function}.npz") as data:
        return [(function, c, {k.partition("/")[2]: data[k] for k in data if k.startswith(c.split(",")[0] + "/")})
                for c in data["configs"].tolist()]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "configuration", "case"),
    [case for function in FUNCTIONS[:2] for case in golden_cases(function)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_golden(function, configuration, case):
    _, mapping, interpolation, align_corners, normalize = configuration.split(",")
    grad_out, out, *expected = (case.pop(name) for name in ("grad_out", "out", "grad_features", "grad_filters"))
    arguments = {name: torch.from_numpy(value) for name, value in case.items()}
    inputs = [arguments[name].requires_grad_() for name in ("inp_features", "filters")]
    got = getattr(ops, function)(
        **arguments, align_corners=align_corners == "True", coordinate_mapping=mapping, normalize=normalize == "True",
        interpolation=interpolation
    )  # fmt: skip
    grads = torch.autograd.grad(got, inputs, torch.from_numpy(grad_out))
    for left, right in zip((got.detach(), *grads), (out, *expected), strict=True):
        assert_close(left.numpy(), right, 2e-5)


# ---- calls of all four functions


def lists(num_points, num_queries, pairs, generator):
    """(index, row_splits, order): random pairs sorted by query, and the order that sorts them by point."""
    query = torch.randint(0, num_queries, (pairs,), generator=generator).sort()[0]
    index = torch.randint(0, num_points - 1, (pairs,), generator=generator)  # the last point has no pairs
    return index, query, torch.argsort(index, stable=True)


def splits_of(rows, number):
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=number).cumsum(0)])


def random_call(function, seed, importance="both", dtype=torch.float32, cells=(3, 2, 4), distinct=False):
    """The tensors of a call by name: 12 points, 9 queries, 40 pairs.

    importance: "none", "points" (or outputs), "pairs" or "both". distinct: no two pairs of a query have the same cell.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype) - 0.3

    points, queries, pairs = 12, 9, 40
    index, query, by_point = lists(points, queries, pairs, generator)
    is_transpose, is_sparse = function.endswith("transpose"), function.startswith("sparse")
    factors = rand(pairs) if importance in ("pairs", "both") else NONE.to(dtype)
    by_rows = rand(queries if is_transpose else points) if importance in ("points", "both") else NONE.to(dtype)
    call = {"filters": rand(*cells, 3, 5), "inp_features": rand(points, 3), "neighbors_index": index.int(),
            "neighbors_importance": factors, "neighbors_row_splits": splits_of(query, queries),
            ("out" if is_transpose else "inp") + "_importance": by_rows}  # fmt: skip
    if is_sparse:
        number = int(np.prod(cells))
        cell = torch.arange(pairs) % number if distinct else torch.randint(0, 2, (pairs,), generator=generator)
        call["neighbors_kernel_index"] = cell.to(torch.uint8)
    else:
        rows = (1, points if is_transpose else queries)[seed % 2]
        extents = 1 + rand(rows, (1, 3)[seed // 2 % 2])
        call |= {"out_positions": rand(queries, 3), "inp_positions": rand(points, 3), "extents": extents,
                 "offset": rand(3)}  # fmt: skip
    if is_transpose:
        sums = torch.zeros(points, dtype=dtype).index_add(0, index, factors) if len(factors) else factors
        call |= {"inp_neighbors_index": query[by_point].int(), "inp_neighbors_importance_sum": sums,
                 "inp_neighbors_row_splits": splits_of(index, points)}  # fmt: skip
    return call


def core(function, call, **options):
    """The operator of kpcore.torch for the same call."""
    names = {"filters": "filters", "inp_features": "features", "neighbors_importance": "neighbor_importances",
             "out_importance": "importances", "inp_importance": "importances", "offset": "offset", "extents": "extents",
             "inp_positions": "points", "out_positions": "queries"}  # fmt: skip
    arguments = {names[name]: value for name, value in call.items() if name in names and len(value)}
    neighbors = kpt.Neighbors(call["neighbors_index"].numpy(), call["neighbors_row_splits"].numpy(), 12)
    if "neighbors_kernel_index" in call:
        arguments["kernel_index"] = call["neighbors_kernel_index"].int()
    return getattr(kpt, function)(neighbors=neighbors, **arguments, **options)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("importance", ["none", "points", "pairs", "both"])
@pytest.mark.parametrize("normalize", [False, True])
def test_is_the_operator_of_the_core(function, importance, normalize):
    call = random_call(function, 1, importance, torch.float64)
    got = getattr(ops, function)(**call, normalize=normalize)
    options = {} if function.startswith("sparse") else {"align_corners": False}
    torch.testing.assert_close(got, core(function, call, normalize=normalize, **options))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_every_tensor(function):
    call = random_call(function, 3, "both", torch.float64, cells=(2, 1, 3))
    # The sum of an input that is exactly 0, of the one without pairs, is a case of its own.
    names = [
        n for n, v in call.items() if v.is_floating_point() and n not in ("offset", "inp_neighbors_importance_sum")
    ]
    tensors = [call[name].requires_grad_() for name in names]
    if function.endswith("transpose"):
        call["inp_neighbors_importance_sum"] += 7
        names, tensors = [*names, "inp_neighbors_importance_sum"], [*tensors, call["inp_neighbors_importance_sum"]]
        tensors[-1].requires_grad_()

    def run(*values):
        return getattr(ops, function)(**call | dict(zip(names, values, strict=True)), normalize=True)

    assert gradcheck(run, tensors, eps=1e-6, fast_mode=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_lists_may_have_other_dtypes_and_lengths(function):
    call = random_call(function, 0)
    expected = getattr(ops, function)(**call)
    assert torch.equal(getattr(ops, function)(**call | {"neighbors_index": call["neighbors_index"].long()}), expected)
    if function.startswith("sparse"):
        for dtype in (torch.int16, torch.int32, torch.int64):
            cells = {"neighbors_kernel_index": call["neighbors_kernel_index"].to(dtype)}
            assert torch.equal(getattr(ops, function)(**call | cells), expected)


@pytest.mark.parametrize("function", FUNCTIONS[2:])
def test_more_cells_than_bytes_can_number(function):
    call = random_call(function, 0, cells=(7, 7, 7))
    call["neighbors_kernel_index"] = torch.arange(40, dtype=torch.int16) + 300
    expected = getattr(ops, function)(**call | {"filters": call["filters"].flatten(0, 2)[300:340],
                                                "neighbors_kernel_index": torch.arange(40)})  # fmt: skip
    torch.testing.assert_close(getattr(ops, function)(**call), expected)


def test_sums_of_a_transpose_are_the_callers():
    """The features of an input are divided by the sum that was passed, by 1 where it is 0, and without sums by the
    lengths of the rows that were passed: Open3D too takes none of them from the list of the outputs."""
    call = random_call("sparse_conv_transpose", 0, "pairs")
    plain, features = ops.sparse_conv_transpose(**call), call["inp_features"]
    sums = torch.tensor([0.0, 2, -4] * 4)
    halved = {"inp_features": features / torch.tensor([1.0, 2, -4] * 4)[:, None]}
    assert not torch.equal(ops.sparse_conv_transpose(**call | halved), plain)
    torch.testing.assert_close(
        ops.sparse_conv_transpose(**call | {"inp_neighbors_importance_sum": sums}, normalize=True),
        ops.sparse_conv_transpose(**call | halved),
    )
    lengths = {"inp_neighbors_importance_sum": NONE, "inp_neighbors_row_splits": torch.arange(13) * 2}
    torch.testing.assert_close(ops.sparse_conv_transpose(**call | lengths, normalize=True), plain / 2)


ERRORS = {
    "inp_importance: invalid shape, expected (12,) to match inp_positions, got (13,)":
        ("continuous_conv", {"inp_importance": torch.zeros(13)}),
    "out_importance: invalid shape, expected (9,) to match out_positions, got (10,)":
        ("continuous_conv_transpose", {"out_importance": torch.zeros(10)}),
    "out_importance: invalid shape, expected (9,) to match neighbors_row_splits, got (10,)":
        ("sparse_conv_transpose", {"out_importance": torch.zeros(10)}),
    "inp_features: expected float32, got float64":
        ("sparse_conv", {"inp_features": torch.zeros(12, 3, dtype=torch.float64)}),
    "neighbors_index: expected values from 0 to 11 to match num_points, got 12":
        ("continuous_conv", {"neighbors_index": torch.full((40,), 12)}),
    "neighbors_index: expected int32 or int64, got int16":
        ("continuous_conv", {"neighbors_index": torch.zeros(40, dtype=torch.int16)}),
    "neighbors_row_splits: invalid shape, expected (10,) to match out_positions, got (11,)":
        ("continuous_conv", {"neighbors_row_splits": torch.zeros(11, dtype=torch.int64)}),
    "neighbors_kernel_index: invalid shape, expected (40,) to match neighbors_index, got (39,)":
        ("sparse_conv", {"neighbors_kernel_index": torch.zeros(39, dtype=torch.uint8)}),
    "kernel_index: expected values from 0 to 23 to match filters, got 24":
        ("sparse_conv", {"neighbors_kernel_index": torch.full((40,), 24)}),
    "inp_neighbors_row_splits: invalid shape, expected (13,) to match inp_features, got (12,)":
        ("sparse_conv_transpose", {"inp_neighbors_row_splits": torch.arange(12)}),
    "max_temp_mem_MB: expected an integer, got float": ("sparse_conv", {"max_temp_mem_MB": 0.5}),
    "allow_tf32: expected True or False, got int": ("continuous_conv", {"allow_tf32": 1}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    function, wrong = ERRORS[message]
    with pytest.raises((TypeError, ValueError)) as error:
        getattr(ops, function)(**random_call(function, 0) | wrong)
    assert str(error.value) == message


# ---- Open3D itself


def results(module, function, call, options):
    """The output and the gradients of features and filters."""
    inputs = [call[name].clone().requires_grad_() for name in ("inp_features", "filters")]
    out = getattr(module, function)(**call | dict(zip(("inp_features", "filters"), inputs, strict=True)), **options)
    generator = torch.Generator().manual_seed(9)
    return out.detach(), *torch.autograd.grad(out, inputs, torch.rand(out.shape, generator=generator).to(out))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_convolutions_of_open3d(open3d, function, seed):  # noqa: F811
    """Each of the importances with each of the options; extents of all four shapes come from the seed."""
    is_sparse, importances = function.startswith("sparse"), ("none", "points", "pairs", "both")
    shapes = [{}] if is_sparse else [
        {"coordinate_mapping": m, "interpolation": i, "align_corners": a}
        for m, i, a in itertools.product(MAPPINGS, INTERPOLATIONS, (False, True))
    ]  # fmt: skip
    for number, (options, normalize) in enumerate(itertools.product(shapes, (False, True))):
        call = random_call(function, seed, importances[(number + seed) % 4], distinct=True)
        options = {"normalize": normalize, **options}
        for left, right in zip(results(ops, function, call, options), results(open3d, function, call, options),
                                strict=True):  # fmt: skip
            assert_close(left.numpy(), right.numpy(), 2e-5)


def test_where_a_sum_is_zero_in_open3d(open3d):  # noqa: F811
    call = random_call("continuous_conv_transpose", 0, "pairs")
    call["inp_neighbors_importance_sum"] = torch.tensor([0.0, 2, -4] * 4)
    got, expected = (m.continuous_conv_transpose(**call, normalize=True) for m in (ops, open3d))
    torch.testing.assert_close(got, expected)


def test_repeated_cells_are_lost_in_the_gradient_of_open3d(open3d):  # noqa: F811
    call = random_call("sparse_conv", 0)
    (out, features, filters), (their_out, their_features, their_filters) = (
        results(m, "sparse_conv", call, {}) for m in (ops, open3d)
    )
    torch.testing.assert_close(out, their_out)
    torch.testing.assert_close(features, their_features)
    assert (filters - their_filters).abs().max() > 0.01

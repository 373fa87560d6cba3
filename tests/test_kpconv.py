"""kpconv and kpconvx: values and gradients against the formulas and the published code, and edge cases."""

from dataclasses import replace
from pathlib import Path

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

CHANNELS = [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 130]
KERNEL_SIZES = [1, 2, 3, 9, 15, 16, 17, 27, 43]
INFLUENCES, AGGREGATIONS, NORMALIZATIONS = (
    ["linear", "gaussian", "constant"],
    ["sum", "closest"],
    [None, "count", "positive"],
)
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_geometry_type = pytest.mark.parametrize("geometry_type", [np.float32, np.float64])
each_feature_type = pytest.mark.parametrize("feature_type", [np.float32, np.float64])


def run(case, neighbors=None, **options):
    """-> {"out", "grad_features", "grad_weights"} as the package computes them."""
    neighbors = neighbors or kp.Neighbors(*case.csr())
    out, pullback = kp.autodiff.vjp(
        lambda f, w: kp.kpconv(case.points, case.queries, neighbors, f, w, case.kernel_points, case.extent, **options),
        case.features,
        case.weights,
    )
    return dict(zip(("out", "grad_features", "grad_weights"), (out, *pullback(case.grad)), strict=True))


def check_kpconv(case, **options):
    got = run(case, **options)
    for name, (expected, magnitude) in case.reference(**options).items():
        assert got[name].dtype == case.features.dtype, name
        assert_close(got[name], expected, tolerance(case.points.dtype, case.features.dtype), magnitude)


# ---- example calls


def depthwise(call):
    return examples.deformed(call) | {"weights": call["weights"][:, :, 0].copy()}


def deformed_twice(call):
    return examples.deformed(call) | examples.resampled(call)


def kpconvx_arguments(num, geometry, features):
    call = examples.convolution(num, geometry, features)
    attention = np.random.default_rng(4).uniform(size=(len(call["queries"]), 4, 3)).astype(features)
    return call | {"weights": call["weights"][:, :, 0].copy(), "attention": attention}


CALLS = {
    "kpconv": (
        examples.convolution,
        [
            {},
            {"influence": "gaussian", "normalization": "count"},
            {"aggregation": "closest"},
            examples.deformed,
            depthwise,
            examples.resampled,
            deformed_twice,
        ],
    ),
    "kpconvx": (kpconvx_arguments, [{}]),
}


# ---- against the formulas


@each_feature_type
@each_geometry_type
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
def test_options_and_dtypes(influence, aggregation, normalization, geometry_type, feature_type):
    case = clouds.random_case(geometry_type=geometry_type, feature_type=feature_type)
    check_kpconv(case, influence=influence, aggregation=aggregation, normalization=normalization)


# Rows and columns of a product have their ends apart from each other.
@pytest.mark.parametrize(
    ("cin", "cout"), [(a, b) for a in CHANNELS for b in CHANNELS if {a, b} & {1, 17, 64} or a == b]
)
@each_feature_type
def test_channels(feature_type, cin, cout):
    check_kpconv(clouds.random_case(num_kernel=3, cin=cin, cout=cout, feature_type=feature_type))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("num_kernel", KERNEL_SIZES)
def test_kernel_sizes_and_dimensions(num_kernel, dim, aggregation):
    for dtype in (np.float32, np.float64):
        check_kpconv(clouds.random_case(dim=dim, num_kernel=num_kernel, geometry_type=dtype), aggregation=aggregation)


@pytest.mark.parametrize("cin", [1, 17, 64])
@pytest.mark.parametrize("num_queries", clouds.SIZES)
def test_numbers_of_queries(num_queries, cin):
    check_kpconv(clouds.random_case(num_queries=num_queries, cin=cin, num_kernel=9))


@pytest.mark.parametrize("num_points", [1, 2, *clouds.SIZES])
def test_numbers_of_points(num_points):
    check_kpconv(clouds.random_case(num_points=num_points))


@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("name", clouds.NASTY)
def test_nasty_clouds(name, influence):
    points, radius = clouds.nasty(name, num=130)
    rows, _ = reference.radius_search(points, None, radius)
    check_kpconv(clouds.kpconv_case(points, points, rows, radius), influence=influence, normalization="count")


@given(st.data())
def test_any_cloud_any_options(data):
    points, radius = data.draw(clouds.clouds(max_num=130))
    queries = points[:: data.draw(st.integers(1, 5))]
    max_neighbors = data.draw(st.none() | st.integers(1, 20))
    rows, _ = reference.radius_search(points, queries, radius, max_neighbors=max_neighbors)
    sizes = {name: data.draw(st.integers(1, 20)) for name in ("num_kernel", "cin", "cout")}
    feature_type = data.draw(clouds.float_types)
    case = clouds.kpconv_case(
        points, queries, rows, radius, feature_type=feature_type, seed=data.draw(clouds.seeds), **sizes
    )
    check_kpconv(
        case,
        influence=data.draw(st.sampled_from(INFLUENCES)),
        aggregation=data.draw(st.sampled_from(AGGREGATIONS)),
        normalization=data.draw(st.sampled_from(NORMALIZATIONS)),
    )


def with_rows(rows, num_points=5000, **sizes):
    points = clouds.uniform(num_points)[0]
    return clouds.kpconv_case(points, points[: len(rows)], [np.array(row, int) for row in rows], radius=1.0, **sizes)


ROWS = {
    "all_empty": [[]] * 70,
    "thousands_for_one": [[], range(5000), [], [3]],
    "thousands_for_some": [range(0, 5000, 1 + q % 7) if q % 20 == 5 else [q] for q in range(130)],
    "repeated_and_unsorted": [[7, 7, 3, 9, 3], [4999, 0, 4999]],
    "one_point_for_all": [[11]] * 200,
    "no_queries": [],
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ROWS)
def test_neighborhoods_of_any_size(name, aggregation):
    check_kpconv(with_rows(ROWS[name], cin=17, cout=33), aggregation=aggregation, normalization="positive")


def test_no_points():
    case = with_rows([[], []], num_points=2)
    case = clouds.kpconv_case(case.points[:0], case.points, case.rows, radius=1.0)
    check_kpconv(case)


def test_empty_neighborhoods_give_zeros():
    got = run(with_rows(ROWS["all_empty"]))
    assert not any(array.any() for array in got.values())


@pytest.mark.parametrize("influence", INFLUENCES)
def test_far_away(influence):
    points = clouds.uniform(200, dtype=np.float64)[0] * 4 + 5e6
    rows, _ = reference.radius_search(points, None, 1.0)
    check_kpconv(clouds.kpconv_case(points, points, rows, 1.0, feature_type=np.float64), influence=influence)


def test_queries_none_means_the_points():
    points, radius = clouds.uniform(130)
    neighbors = kp.radius_search(points, None, radius)
    case = clouds.kpconv_case(points, points, [], radius)
    args = neighbors, case.features, case.weights, case.kernel_points, case.extent
    assert_same_bits(kp.kpconv(points, None, *args), kp.kpconv(points, points, *args))


def test_padded_neighbors_give_the_same():
    case = clouds.random_case()
    neighbors = kp.Neighbors(*case.csr())
    padded = kp.Neighbors.from_padded(neighbors.to_padded(width=70), len(case.points))
    for got, expected in zip(run(case, padded).values(), run(case, neighbors).values(), strict=True):
        assert_same_bits(got, expected)


def test_an_unused_end_of_the_index_changes_nothing():
    case = clouds.random_case()
    index, row_splits, num_points = case.csr()
    longer = kp.Neighbors(np.concatenate([index, index[:9]]), row_splits, num_points)
    for got, expected in zip(run(case, longer).values(), run(case).values(), strict=True):
        assert_same_bits(got, expected)


# ---- the published code

GOLDEN = sorted((Path(__file__).parent / "golden").glob("rigid_*.npz"))


@both_dtypes
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, dtype):
    golden = np.load(path)
    points, queries, features, weights, kernel_points, grad = (
        golden[name].astype(dtype) for name in ("points", "queries", "features", "weights", "kernel_points", "grad_out")
    )
    neighbors = kp.Neighbors.from_padded(golden["neighbors_padded"], len(points))
    options = {name: str(golden[name]) for name in ("influence", "aggregation")}
    extent = float(golden["extent"])
    out, pullback = kp.autodiff.vjp(
        lambda f, w: kp.kpconv(points, queries, neighbors, f, w, kernel_points, extent, **options), features, weights
    )
    allowed = tolerance(np.float32 if options["influence"] == "gaussian" else dtype)
    for name, got in zip(("out", "grad_features", "grad_weights"), (out, *pullback(grad)), strict=True):
        assert_close(got, golden[name], allowed)


def test_golden_is_complete():
    assert len(GOLDEN) == 7


# ---- deformable, modulated, grouped, depthwise: see full_case


VARIANTS = {
    "deformed": {"deformed": True},
    "modulated": {"modulated": True},
    "both": {"deformed": True, "modulated": True},
    "groups": {"groups": 3},
    "depthwise": {"depthwise": True},
    "all in groups": {"deformed": True, "modulated": True, "groups": 2},
    "all depthwise": {"deformed": True, "modulated": True, "depthwise": True},
    "resampled": {"resampled": True},
    "resampled in groups": {"resampled": True, "deformed": True, "modulated": True, "groups": 2},
    "resampled depthwise": {"resampled": True, "deformed": True, "modulated": True, "depthwise": True},
}
ARGUMENTS = ("features", "weights", "offsets", "modulations", "points", "queries", "kernel_points", "kernel_offsets")


def full_case(deformed=False, modulated=False, groups=1, depthwise=False, resampled=False, wide=1, seed=0, **sizes):
    """Keyword arguments of kpconv without options.

    Extent and kernel points are divided by `wide`, so that with wide > 1 some neighbours are out of range. `resampled`:
    with kernel offsets.
    """
    sizes = {"cin": 6, "cout": 6} | sizes
    case = clouds.random_case(seed=seed, **sizes)
    rng = np.random.default_rng(seed + 7)
    num_queries, num_kernels, (_, dim) = len(case.queries), len(case.kernel_points), case.points.shape
    arguments = {name: getattr(case, name) for name in ("points", "queries", "features", "weights", "kernel_points")}
    arguments |= {"neighbors": kp.Neighbors(*case.csr()), "extent": case.extent / wide}
    arguments["kernel_points"] = case.kernel_points / case.kernel_points.dtype.type(wide)
    if deformed:
        offsets = rng.normal(size=(num_queries, num_kernels, dim)) * 0.4 * case.extent / wide
        arguments["offsets"] = offsets.astype(case.points.dtype)
    if modulated:
        arguments["modulations"] = rng.uniform(0, 2, (num_queries, num_kernels)).astype(case.features.dtype)
    if depthwise:
        arguments["weights"] = rng.normal(size=(num_kernels, sizes["cin"])).astype(case.features.dtype)
    elif groups > 1:
        arguments["groups"] = groups
        arguments["weights"] = arguments["weights"][:, : sizes["cin"] // groups].copy()
    if resampled:
        kernel_offsets = rng.normal(size=(num_queries, num_kernels, dim)) * 0.4 * case.extent / wide
        arguments["kernel_offsets"] = kernel_offsets.astype(case.points.dtype)
        arguments["kernel_extent"] = 1.3 * case.extent / wide
    return arguments


def with_reference(arguments, **options):
    """(result of kpconv, result of the reference)"""
    rows = np.split(arguments["neighbors"].index, arguments["neighbors"].row_splits[1:-1])[: len(arguments["queries"])]
    others = {name: value for name, value in arguments.items() if name != "neighbors"}
    return kp.kpconv(**arguments, **options), reference.full_kpconv(rows=rows, **others, **options)


def gradients(arguments, grad, **options):
    """-> {argument: gradient} of all differentiable arguments that are not None."""
    names = [name for name in ARGUMENTS if arguments.get(name) is not None]

    def fn(*values):
        return kp.kpconv(**arguments | dict(zip(names, values, strict=True)), **options)

    return dict(zip(names, kp.autodiff.vjp(fn, *(arguments[name] for name in names))[1](grad), strict=True))


@both_dtypes
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, influence, aggregation, dtype, isa):
    arguments = full_case(**VARIANTS[variant], geometry_type=dtype, feature_type=dtype)
    got, expected = with_reference(arguments, influence=influence, aggregation=aggregation, normalization="count")
    assert np.abs(expected).max() > 0.1
    assert_close(got, expected, tolerance(dtype))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_variants_by_central_differences(variant, influence, aggregation, normalization):
    arguments = full_case(**VARIANTS[variant], geometry_type=np.float64, feature_type=np.float64)
    rng, step, options = np.random.default_rng(3), 1e-7, {"influence": influence, "aggregation": aggregation}
    options["normalization"] = normalization
    shape = kp.kpconv(**arguments, **options).shape
    grad = rng.normal(size=shape)
    computed = gradients(arguments, grad, **options)
    for name, gradient in computed.items():
        direction = rng.normal(size=gradient.shape)
        ahead, behind = (
            kp.kpconv(**arguments | {name: arguments[name] + s * direction}, **options) for s in (step, -step)
        )
        numeric, analytic = np.vdot(grad, (ahead - behind) / (2 * step)), np.vdot(gradient, direction)
        # The slope jumps where a step crosses the end of an influence or, with offsets, of the range.
        assert abs(numeric - analytic) <= 2e-5 * np.linalg.norm(gradient) * np.linalg.norm(direction) + 1e-6, name
    if "kernel_offsets" in computed:  # through the weights, kernel points have a gradient with any influence
        assert computed.pop("kernel_offsets").any() and computed.pop("kernel_points").any()
    positions = [name for name in ("points", "queries", "kernel_points", "offsets") if name in computed]
    assert all(computed[name].any() != (influence == "constant") for name in positions)


@each_feature_type
@each_geometry_type
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_variants_in_any_dtype(variant, geometry_type, feature_type, isa):
    types = {"geometry_type": geometry_type, "feature_type": feature_type}
    arguments = full_case(**VARIANTS[variant], **types)
    exact = {
        name: a.astype(np.float64) if isinstance(a, np.ndarray) else a for name, a in arguments.items()
    }  # the same numbers
    grad = np.random.default_rng(0).normal(size=(len(arguments["queries"]), 6)).astype(feature_type)
    got, expected = gradients(arguments, grad), gradients(exact, grad.astype(np.float64))
    for name, gradient in got.items():
        assert gradient.dtype == arguments[name].dtype, name
        assert_close(gradient, expected[name], 10 * tolerance(geometry_type, feature_type))


@pytest.mark.parametrize("variant", ["both", "all depthwise", "all in groups", "resampled in groups"])
@pytest.mark.parametrize("num_kernel", [1, 2, 15, 16, 17, 43])
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_variants_of_any_size(dim, num_kernel, variant):
    sizes = {"dim": dim, "num_kernel": num_kernel, "cin": 34, "cout": 34}
    for influence in ("linear", "gaussian"):
        got, expected = with_reference(full_case(**VARIANTS[variant], **sizes), influence=influence)
        assert_close(got, expected, tolerance(np.float32))
    rigid = full_case(**VARIANTS[variant] | {"deformed": False}, **sizes)
    zeros = np.zeros((len(rigid["queries"]), num_kernel, dim), np.float32)
    grad = np.random.default_rng(1).normal(size=got.shape).astype(np.float32)
    offset_by_nothing = gradients(rigid | {"offsets": zeros}, grad)
    for name, gradient in gradients(rigid, grad).items():
        assert_close(offset_by_nothing[name], gradient, tolerance(np.float32))


@pytest.mark.parametrize("influence", INFLUENCES)
def test_neighbors_out_of_reach_of_a_deformed_kernel_do_not_count(influence, isa):
    arguments = full_case(deformed=True, wide=3, num_points=600)
    reached = with_reference(arguments, influence=influence)
    assert_close(*reached, tolerance(np.float32))
    rigid = {name: value for name, value in arguments.items() if name != "offsets"}
    same = np.allclose(with_reference(rigid, influence=influence)[0], reached[0])
    assert not same


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_same_bits_with_any_number_of_threads(variant, isa, set_threads):
    arguments = full_case(**VARIANTS[variant], num_points=3000, num_queries=1500, cin=12, cout=12)
    grad = np.random.default_rng(2).normal(size=(1500, 12)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append([kp.kpconv(**arguments), *gradients(arguments, grad).values()])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
def test_points_that_are_also_the_queries_get_both_gradients(influence, aggregation):
    points, radius = clouds.uniform(100, dtype=np.float64)
    arguments = full_case(num_points=100, geometry_type=np.float64, feature_type=np.float64)
    arguments |= {"points": points, "queries": points, "neighbors": kp.radius_search(points, None, radius)}
    grad = np.random.default_rng(0).normal(size=(100, 6))
    options = {"influence": influence, "aggregation": aggregation}
    apart, together = (gradients(arguments | {"queries": q}, grad, **options) for q in (points, None))
    assert_close(together["points"], apart["points"] + apart["queries"], 1e-13)


def test_the_gradient_of_a_distance_of_zero_is_zero():
    points = np.zeros((1, 3))
    nb = kp.Neighbors(np.zeros(1, np.int32), np.array([0, 1]), 1)
    arguments = {"points": points, "queries": points.copy(), "neighbors": nb, "features": np.ones((1, 1))}
    arguments |= {"weights": np.ones((1, 1, 1)), "kernel_points": np.zeros((1, 3)), "extent": 1.0}
    for name, gradient in gradients(arguments, np.ones((1, 1))).items():
        assert np.all(gradient == (name in ("features", "weights"))), name


@pytest.mark.parametrize("only", [None, "offsets", "weights", "kernel_offsets"])
def test_gradients_of_more_pairs_than_a_tile_keeps(only):
    """100 queries with 300 neighbors, all in range of all 15 kernel points: 450,000 pairs; a tile keeps 16,384."""
    arguments = full_case(num_points=300, num_queries=100, geometry_type=np.float64, feature_type=np.float64)
    rng = np.random.default_rng(5)
    arguments["neighbors"] = kp.Neighbors(
        np.concatenate([rng.permutation(300) for _ in range(100)]).astype(np.int32), 300 * np.arange(101), 300
    )
    arguments["modulations"] = rng.uniform(0, 2, (100, 15))
    names = (only,) if only else ("points", "queries", "features", "weights", "kernel_points", "modulations")
    if only == "offsets":
        arguments["offsets"] = rng.normal(size=(100, 15, 3)) * 0.1
    arguments["extent"] *= 3
    if only == "kernel_offsets":  # with an extent beyond all distances, at which the slope of a share jumps
        arguments |= {"kernel_offsets": rng.normal(size=(100, 15, 3)) * 0.1, "kernel_extent": 3.0}
        names = (only, "features", "kernel_points", "modulations")

    def fn(*values):
        changed = arguments | dict(zip(names, values, strict=True))
        return kp.kpconv(**changed, influence="gaussian", normalization="count")

    primals = [arguments[name] for name in names]
    check_vjp(fn, kp.autodiff.vjp(fn, *primals)[1], primals, step=1e-5)


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("name", ["all_empty", "thousands_for_one", "repeated_and_unsorted", "no_queries"])
def test_variants_of_neighborhoods_of_any_size(name, resampled):
    case = with_rows(ROWS[name], cin=6, cout=6)
    rng = np.random.default_rng(0)
    arguments = {n: getattr(case, n) for n in ("points", "queries", "features", "weights", "kernel_points", "extent")}
    arguments |= {"neighbors": kp.Neighbors(*case.csr())}
    arguments["offsets"] = (rng.normal(size=(len(case.queries), 15, 3)) * 0.1).astype(np.float32)
    arguments["modulations"] = rng.uniform(0, 2, (len(case.queries), 15)).astype(np.float32)
    if resampled:
        kernel_offsets = rng.normal(size=(len(case.queries), 15, 3)) * 0.2
        arguments |= {"kernel_offsets": kernel_offsets.astype(np.float32), "kernel_extent": 0.5}
    for influence in INFLUENCES:
        got, expected = with_reference(arguments, influence=influence)
        assert_close(got, expected, tolerance(np.float32))
        exact = {n: a.astype(np.float64) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        wanted = gradients(exact, case.grad.astype(np.float64), influence=influence)
        for argument, gradient in gradients(arguments, case.grad, influence=influence).items():
            assert_close(gradient, wanted[argument], 1e-3)


# ---- kernel offsets


def lattice_case(dtype=np.float32, **options):
    """A `full_case` with 8 kernel points, the corners of a cube of edge 0.25, whose differences are exact."""
    arguments = full_case(num_kernel=8, geometry_type=dtype, feature_type=dtype, **options)
    corners = np.stack(np.meshgrid(*3 * [[-0.125, 0.125]]), -1).reshape(8, 3).astype(dtype)
    return arguments | {"kernel_points": corners, "extent": 0.25}


@both_dtypes
@pytest.mark.parametrize("variant", ["modulated", "both", "all in groups", "all depthwise"])
def test_kernel_offsets_of_zero_change_nothing_up_to_the_least_distance(variant, dtype, isa):
    arguments = lattice_case(dtype, **VARIANTS[variant])
    zeros = np.zeros((len(arguments["queries"]), 8, 3), dtype)
    grad = np.random.default_rng(1).normal(size=(len(zeros), 6)).astype(dtype)
    expected = {"out": kp.kpconv(**arguments), **gradients(arguments, grad)}
    assert np.abs(expected["out"]).max() > 0.1
    for kernel_extent in (0.25, 0.1):
        resampled = arguments | {"kernel_offsets": zeros, "kernel_extent": kernel_extent}
        got = {"out": kp.kpconv(**resampled), **gradients(resampled, grad)}
        assert not got.pop("kernel_offsets").any()
        for name, value in got.items():
            assert_close(value, expected[name], tolerance(dtype), expected[name])
    above = arguments | {"kernel_offsets": zeros, "kernel_extent": 0.3}
    assert gradients(above, grad)["kernel_offsets"].any()
    assert np.abs(kp.kpconv(**above) - expected["out"]).max() > 0.1


@both_dtypes
@pytest.mark.parametrize("variant", ["modulated", "both", "all in groups", "all depthwise"])
def test_kernel_offsets_to_another_kernel_point_pick_its_weights(variant, dtype, isa):
    arguments = lattice_case(dtype, **VARIANTS[variant])
    corners, weights = arguments["kernel_points"], arguments["weights"]
    num, rng = len(arguments["queries"]), np.random.default_rng(2)
    picked = rng.integers(0, 8, (num, 8))
    grad = rng.normal(size=(num, 6)).astype(dtype)
    arguments |= {"kernel_offsets": corners[picked] - corners, "kernel_extent": 0.25}
    out, grads = kp.kpconv(**arguments), gradients(arguments, grad)
    row_splits, total = arguments["neighbors"].row_splits, np.zeros_like(weights, np.float64)
    for q in range(num):
        row = arguments["neighbors"].index[row_splits[q] : row_splits[q + 1]]
        one = {n: arguments[n][q : q + 1] for n in ("queries", "offsets", "modulations") if n in arguments}
        rest = {n: a for n, a in arguments.items() if n not in ("kernel_offsets", "kernel_extent")} | one
        rest |= {"neighbors": kp.Neighbors(row, np.array([0, len(row)]), len(arguments["points"]))}
        rest["weights"] = weights[picked[q]]
        assert_close(out[q : q + 1], kp.kpconv(**rest), tolerance(dtype), magnitude=out)
        np.add.at(total, picked[q], gradients(rest, grad[q : q + 1])["weights"])
    assert_close(grads["weights"], total, tolerance(dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_kernel_offsets_beyond_all_kernel_points_give_zeros(value, isa):
    arguments = full_case(resampled=True)
    arguments["kernel_offsets"][:30] = value
    out = kp.kpconv(**arguments)
    assert not out[:30].any() and np.isfinite(out).all() and out[30:].any()
    grads = gradients(arguments, np.ones_like(out))
    assert all(np.isfinite(gradient).all() for gradient in grads.values())
    assert not grads["kernel_offsets"][:30].any() and grads["kernel_offsets"][30:].any()


@pytest.mark.parametrize("variant", ["resampled", "resampled in groups", "resampled depthwise"])
def test_gradients_are_the_same_bits_whichever_others_are_computed(variant, isa):
    arguments = full_case(**VARIANTS[variant], num_points=500, num_queries=300)
    grad = np.random.default_rng(2).normal(size=(300, 6)).astype(np.float32)
    together = gradients(arguments, grad)
    for name, expected in together.items():

        def fn(value, name=name):
            return kp.kpconv(**arguments | {name: value})

        assert_same_bits(kp.autodiff.vjp(fn, arguments[name])[1](grad)[0], expected)


# ---- the published deformable layer

DEFORMABLE = sorted((Path(__file__).parent / "golden").glob("deform_*.npz"))


@pytest.mark.parametrize("path", DEFORMABLE, ids=lambda path: path.stem)
def test_golden_deformable(path):
    """The published deformable layer: offsets and modulations come from a rigid convolution."""
    golden = np.load(path)
    points, queries, features = golden["points"], golden["queries"], golden["features"]
    neighbors, extent = kp.Neighbors.from_padded(golden["neighbors_padded"], len(points)), float(golden["extent"])
    options = {name: str(golden[name]) for name in ("influence", "aggregation")}
    num_kernels = len(golden["kernel_points"])

    def to_offsets(features, weights):
        return kp.kpconv(
            points, queries, neighbors, features, weights, golden["offset_kernel_points"], extent, **options
        )

    raw, raw_pullback = kp.autodiff.vjp(to_offsets, features, golden["offset_weights"])
    raw = raw + golden["offset_bias"]
    allowed = tolerance(np.float32 if options["influence"] == "gaussian" else np.float64)
    assert_close(raw, golden["offset_features"], allowed)
    raw = golden["offset_features"]  # not ours, so that the difference of the gaussian does not enter twice
    logits = raw[:, 3 * num_kernels :]
    arguments = {
        "offsets": extent * raw[:, : 3 * num_kernels].reshape(-1, num_kernels, 3),
        "features": features,
        "weights": golden["weights"],
    }
    if golden["modulated"]:
        arguments["modulations"] = 2 / (1 + np.exp(-logits))
    assert_close(golden["kernel_points"] + arguments["offsets"], golden["deformed_kernel_points"], allowed)
    names = tuple(arguments)

    def layer(*values):
        return kp.kpconv(
            points, queries, neighbors, kernel_points=golden["kernel_points"], extent=extent, **options,
            **dict(zip(names, values, strict=True))
        )  # fmt: skip

    out, pullback = kp.autodiff.vjp(layer, *arguments.values())
    assert_close(out, golden["out"], allowed)
    grads = dict(zip(names, pullback(golden["grad_out"]), strict=True))
    assert_close(grads["weights"], golden["grad_weights"], allowed)
    grad_raw = np.zeros_like(raw)
    grad_raw[:, : 3 * num_kernels] = extent * grads["offsets"].reshape(len(raw), -1)
    if golden["modulated"]:
        m = arguments["modulations"]
        grad_raw[:, 3 * num_kernels :] = grads["modulations"] * m * (1 - m / 2)
    grad_features, grad_offset_weights = raw_pullback(grad_raw)
    assert_close(grad_raw.sum(0), golden["grad_offset_bias"], allowed)
    assert_close(grad_offset_weights, golden["grad_offset_weights"], allowed)
    assert_close(grad_features + grads["features"], golden["grad_features"], allowed)


def test_golden_deformable_is_complete():
    assert len(DEFORMABLE) == 3


# ---- KPConvX


@both_dtypes
@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("factors", [1, 2, 3, 4, 12])
def test_kpconvx(factors, influence, dtype, isa):
    case = full_case(depthwise=True, cin=12, cout=12, geometry_type=dtype, feature_type=dtype)
    rng = np.random.default_rng(4)
    attention = rng.uniform(size=(len(case["queries"]), 15, factors)).astype(dtype)
    rows = np.split(case["neighbors"].index, case["neighbors"].row_splits[1:-1])
    others = {name: value for name, value in case.items() if name != "neighbors"}
    expected = reference.full_kpconv(
        rows=rows, **others, modulations=attention, influence=influence, aggregation="closest"
    )
    assert_close(kp.kpconvx(**case, attention=attention, influence=influence), expected, tolerance(dtype))


@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("factors", [1, 3, 12])
def test_gradients_of_kpconvx_by_central_differences(factors, influence):
    case = full_case(depthwise=True, cin=12, cout=12, geometry_type=np.float64, feature_type=np.float64)
    attention = np.random.default_rng(4).uniform(size=(len(case["queries"]), 15, factors))
    features, weights = case.pop("features"), case.pop("weights")

    def fn(features, weights, attention):
        return kp.kpconvx(**case, features=features, weights=weights, attention=attention, influence=influence)

    primals = features, weights, attention
    check_vjp(fn, kp.autodiff.vjp(fn, *primals)[1], primals, step=1e-5)  # the product of three has a third derivative
    for i, primal in enumerate(primals):

        def one(value, i=i):
            return fn(*(value if j == i else other for j, other in enumerate(primals)))

        check_vjp(one, kp.autodiff.vjp(one, primal)[1], (primal,))


# ---- the nearest kernel point


def assignments(points, queries, kernel_points, dtype):
    """The kernel point that the only neighbour of each query is assigned to, read from a one-hot result."""
    num, num_kernel = len(points), len(kernel_points)
    neighbors = kp.Neighbors(np.arange(num, dtype=np.int32), np.arange(num + 1), num)
    one_hot = np.eye(num_kernel, dtype=np.float32)[:, None, :]
    features = np.ones((num, 1), np.float32)
    options = {"influence": "constant", "aggregation": "closest"}
    out = kp.kpconv(
        *(a.astype(dtype) for a in (points, queries)),
        neighbors,
        features,
        one_hot,
        kernel_points.astype(dtype),
        1.0,
        **options,
    )
    assert np.all((out == 1).sum(1) == 1) and np.all((out == 0).sum(1) == num_kernel - 1)
    return out.argmax(1)


@both_dtypes
@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize("num_kernel", KERNEL_SIZES)
def test_nearest_kernel_point(num_kernel, dim, dtype, isa):
    rng = np.random.default_rng(0)
    points, queries, kernel_points = (rng.normal(size=(n, dim)).astype(dtype) for n in (1000, 1000, num_kernel))
    expected = reference.nearest_kernel_point(points - queries, kernel_points)
    assert assignments(points, queries, kernel_points, dtype).tolist() == expected.tolist()


@both_dtypes
@pytest.mark.parametrize("spacing", [0.25, 0.1])
def test_nearest_kernel_point_of_ties_is_the_first(spacing, dtype, isa):
    # Points half-way between kernel points; with steps of 0.1, rounding breaks some ties and creates others.
    rng = np.random.default_rng(0)
    kernel_points = clouds.lattice(rng, 3, spacing, 27).astype(dtype)
    queries = rng.integers(-9, 9, (1000, 3)).astype(dtype) * dtype(spacing)
    points = (queries + clouds.lattice(rng, 3, spacing / 2, 1000)).astype(dtype)
    expected = reference.nearest_kernel_point(points - queries, kernel_points)
    assert assignments(points, queries, kernel_points, dtype).tolist() == expected.tolist()


@both_dtypes
def test_how_many_neighbors_each_kernel_point_gets(dtype, isa, set_threads):
    points, radius = clouds.nasty("lattice_ties", dtype=dtype, num=1000)
    neighbors = kp.radius_search(points, None, radius)
    kernel_points = clouds.lattice(np.random.default_rng(0), 3, 0.15, 27).astype(dtype)
    features, one_hot = np.ones((len(points), 1), np.float32), np.eye(27, dtype=np.float32)[:, None, :]
    expected = np.array(
        [
            np.bincount(reference.nearest_kernel_point(points[row] - query, kernel_points), minlength=27)
            for query, row in zip(points, np.split(neighbors.index, neighbors.row_splits[1:-1]), strict=True)
        ]
    )
    for threads in (1, 2, 3):
        set_threads(threads)
        out = kp.kpconv(
            points, None, neighbors, features, one_hot, kernel_points, 1.0, influence="constant", aggregation="closest"
        )
        assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("factors", [1, 4])
def test_kpconvx_gives_the_same_bits_with_any_number_of_threads(factors, isa, set_threads):
    case = full_case(depthwise=True, cin=12, cout=12, num_points=3000, num_queries=1500)
    rng = np.random.default_rng(4)
    attention = rng.uniform(size=(1500, 15, factors)).astype(np.float32)
    grad = rng.normal(size=(1500, 12)).astype(np.float32)
    features, weights = case.pop("features"), case.pop("weights")

    def fn(features, weights, attention):
        return kp.kpconvx(**case, features=features, weights=weights, attention=attention)

    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        out, pullback = kp.autodiff.vjp(fn, features, weights, attention)
        results.append([out, *pullback(grad)])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


# ---- the same bits everywhere


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@both_dtypes
@pytest.mark.parametrize("name", ["uniform", "uneven", "few_queries"])
def test_same_bits_with_any_number_of_threads(name, dtype, normalization, isa, set_threads):
    if name == "uneven":
        case = with_rows(ROWS["thousands_for_some"], cin=33, cout=17, feature_type=dtype)
    else:
        num_queries = 3000 if name == "uniform" else 241
        case = clouds.random_case(
            num_points=4097, num_queries=num_queries, cin=33, cout=65, geometry_type=dtype, feature_type=dtype
        )
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(case, normalization=normalization))
    for other in results[1:]:
        for part, expected in results[0].items():
            assert_same_bits(other[part], expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
@each_feature_type
def test_any_instructions(feature_type, influence, normalization, isa):
    check_kpconv(
        clouds.random_case(cin=33, cout=65, feature_type=feature_type), influence=influence, normalization=normalization
    )


@each_feature_type
def test_positive_means_the_same_with_any_instructions(feature_type, isa, set_isa):
    # Sums over channels that are zero up to rounding: their sign must not depend on the order of a SIMD sum.
    case = clouds.random_case(cin=64, feature_type=feature_type)
    features = np.random.default_rng(0).normal(size=case.features.shape)
    features[:, 32:] = -features[:, :32][:, np.random.default_rng(1).permutation(32)]
    case = replace(case, features=features.astype(feature_type))
    got = run(case, normalization="positive")["out"]
    set_isa("base")
    assert_close(got, run(case, normalization="positive")["out"], tolerance(np.float32, feature_type))


def test_positive_does_not_count_features_that_sum_to_zero():
    features = np.array([[1.0, -1], [2, -1], [-3, 4], [-3, 1], [0, 0]])
    points, kernel_points = np.zeros((5, 3)), np.zeros((1, 3))
    everyone = kp.Neighbors(np.arange(5, dtype=np.int32), np.array([0, 5]), 5)
    out = kp.kpconv(
        points, points[:1], everyone, features, np.eye(2)[None], kernel_points, 1.0, normalization="positive"
    )
    assert out.tolist() == [[-3 / 2, 3 / 2]]


# ---- metamorphic


def test_permuting_points_and_queries_permutes_the_result():
    case = clouds.random_case(geometry_type=np.float64, feature_type=np.float64)
    rng = np.random.default_rng(0)
    of_points, of_queries = rng.permutation(len(case.points)), rng.permutation(len(case.queries))
    new_index = np.argsort(of_points)
    permuted = clouds.Case(
        points=case.points[of_points],
        queries=case.queries[of_queries],
        rows=[new_index[case.rows[q]] for q in of_queries],
        features=case.features[of_points],
        weights=case.weights,
        kernel_points=case.kernel_points,
        extent=case.extent,
        grad=case.grad[of_queries],
    )
    expected, got = run(case), run(permuted)
    assert_close(got["out"], expected["out"][of_queries], 1e-12)
    assert_close(got["grad_features"], expected["grad_features"][of_points], 1e-12)
    assert_close(got["grad_weights"], expected["grad_weights"], 1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_scaling_the_geometry_by_a_power_of_two_changes_nothing(factor, influence, aggregation):
    case = clouds.random_case()
    geometry = {name: getattr(case, name) * np.float32(factor) for name in ("points", "queries", "kernel_points")}
    # The extent is rounded to the dtype first, so that scaling it by a power of two is exact.
    case = replace(case, extent=float(np.float32(case.extent)))
    scaled = replace(case, **geometry, extent=case.extent * factor)
    expected, got = (run(c, influence=influence, aggregation=aggregation) for c in (case, scaled))
    for name in expected:
        assert_close(got[name], expected[name], 1e-6)


def test_splitting_the_queries_splits_the_result():
    case = clouds.random_case(num_queries=257, cin=17)
    whole = run(case)["out"]
    for part in (slice(0, 1), slice(1, 62), slice(62, 257)):
        piece = replace(case, queries=case.queries[part], rows=case.rows[part], grad=case.grad[part])
        assert_close(run(piece)["out"], whole[part], 1e-6, magnitude=whole)


# ---- NaN


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@each_feature_type
def test_a_feature_that_is_not_finite_reaches_only_queries_that_see_it(feature_type, value, aggregation, isa):
    case = clouds.random_case(cin=17, feature_type=feature_type)
    bad = 42
    case.features[bad, 3] = value
    sees = np.array([bad in row for row in case.rows])
    assert 0 < sees.sum() < len(sees)
    options = {"influence": "constant", "aggregation": aggregation}  # every neighbour has an influence
    args = (
        case.points,
        case.queries,
        kp.Neighbors(*case.csr()),
        case.features,
        case.weights,
        case.kernel_points,
        case.extent,
    )
    out = kp.kpconv(*args, **options)
    assert not np.isfinite(out[sees]).any()
    assert np.isfinite(out[~sees]).all()


def test_a_gradient_that_is_not_finite_reaches_only_points_it_saw(isa):
    case = clouds.random_case(cin=17)
    case.grad[5, 2] = np.nan
    seen = np.isin(np.arange(len(case.points)), case.rows[5])
    grad = run(case, influence="constant")["grad_features"]
    assert np.isnan(grad[seen]).all()
    assert np.isfinite(grad[~seen]).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_coordinate_that_is_not_finite_changes_only_queries_that_see_it(value, influence, aggregation, isa):
    case = clouds.random_case()
    points = case.points.copy()
    points[42] = value
    sees = np.array([42 in row for row in case.rows])
    options = {"influence": influence, "aggregation": aggregation}
    expected, got = (run(c, **options)["out"] for c in (case, replace(case, points=points)))
    assert_close(got[~sees], expected[~sees], 1e-6)

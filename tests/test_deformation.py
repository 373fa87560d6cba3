"""The two losses of deformable kernels: against the formulas, the published code and torch, and edge cases."""

from dataclasses import replace
from pathlib import Path

import clouds
import examples
import numpy as np
import pytest
import reference
from gradcheck import check_vjp
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import assert_close, assert_same_bits, tolerance

import kpcore as kp
from kpcore.ops import OPS, Call

REDUCTIONS = ["mean", "points", "sum"]
KERNEL_SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 43]
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def random_offsets(case, spread=0.5, seed=0):
    """Random offsets, so large that many kernel points leave the neighbourhood and many come close to each other."""
    shape = len(case.queries), *case.kernel_points.shape
    return (np.random.default_rng(seed).normal(size=shape) * (spread * case.extent)).astype(case.points.dtype)


def fitting(case, reduction="mean"):
    """fitting_loss as a function of offsets and kernel points."""
    neighbors = kp.Neighbors(*case.csr())
    return lambda offsets, kernel_points=case.kernel_points: kp.fitting_loss(
        case.points, case.queries, neighbors, kernel_points, offsets, case.extent, reduction=reduction
    )


def repulsion(case, **options):
    """repulsion_loss as a function of offsets and kernel points."""
    return lambda offsets, kernel_points=case.kernel_points: kp.repulsion_loss(
        kernel_points, offsets, case.extent, **options
    )


def losses(case, **options):
    """Both losses by name; options that fitting_loss does not have go to repulsion_loss only."""
    only = {name: value for name, value in options.items() if name == "reduction"}
    return {"fitting": fitting(case, **only), "repulsion": repulsion(case, **options)}


def run(fn, *primals, grad=1.0):
    """-> [loss, gradients...]"""
    out, pullback = kp.autodiff.vjp(fn, *primals)
    return [out, *pullback(np.array(grad, out.dtype))]


def check(fn, expected, case, offsets):
    loss, grad_offsets, grad_kernel_points = run(fn, offsets, case.kernel_points)
    expected_loss, expected_grad = expected
    allowed = tolerance(case.points.dtype)
    for got, like in (loss, np.empty(())), (grad_offsets, offsets), (grad_kernel_points, case.kernel_points):
        assert (type(got), got.shape, got.dtype) == (np.ndarray, like.shape, case.points.dtype)
    assert_close(loss, expected_loss, allowed)
    assert_close(grad_offsets, expected_grad, allowed)
    assert_close(grad_kernel_points, expected_grad.sum(0), allowed, magnitude=np.abs(expected_grad).sum(0))


def check_losses(case, offsets=None, **options):
    offsets = random_offsets(case) if offsets is None else offsets
    reduction = {name: value for name, value in options.items() if name == "reduction"}
    arrays = case.points, case.queries, case.rows, case.kernel_points, offsets, case.extent
    check(fitting(case, **reduction), fitting_loss(*arrays, **reduction), case, offsets)
    check(repulsion(case, **options), repulsion_loss(*arrays[3:], **options), case, offsets)


# ---- the formulas in float64


def reduction_weight(reduction, num_queries, num_kernel):
    """The weight of each of the (M, K) terms of a loss."""
    return {"mean": 1 / max(1, num_queries * num_kernel), "points": 1 / max(1, num_queries), "sum": 1}[reduction]


def fitting_nearest(points, queries, rows, kernel_points, offsets):
    """(M, K) the neighbour nearest to each deformed kernel point, ties to the first in the row; -1 without neighbours.

    Distances are computed in the dtype of the points.
    """
    deformed = kernel_points + offsets
    nearest = np.full(deformed.shape[:2], -1)
    for q, row in enumerate(rows):
        if len(row):
            nearest[q] = row[reference.squared_distances(points[row] - queries[q], deformed[q]).argmin(1)]
    return nearest


def fitting_loss(points, queries, rows, kernel_points, offsets, extent, reduction="mean"):
    """-> (loss, gradient (M, K, D) of the offsets)"""
    nearest = fitting_nearest(points, queries, rows, kernel_points, offsets)[..., None]
    points, queries, offsets = (a.astype(np.float64) for a in (points, queries, offsets))
    relative = np.vstack([points, np.zeros((1, points.shape[1]))])[nearest[..., 0]] - queries[:, None]
    difference = np.where(nearest < 0, 0, kernel_points + offsets - relative) / extent
    weight = reduction_weight(reduction, *offsets.shape[:2])
    return weight * (difference**2).sum(), weight * 2 * difference / extent


def repulsion_loss(kernel_points, offsets, extent, repulse_extent=1.2, detach_others=True, reduction="mean"):
    """-> (loss, gradient (M, K, D) of the offsets)"""
    deformed = kernel_points.astype(np.float64) + offsets
    difference = deformed[:, :, None] - deformed[:, None]
    distance = np.linalg.norm(difference, axis=3)
    under = np.minimum(0, distance / extent - repulse_extent) * ~np.eye(len(kernel_points), dtype=bool)
    slope = under / np.where(distance > 0, distance, np.inf) / extent
    weight = reduction_weight(reduction, *offsets.shape[:2])
    gradient = weight * 2 * (slope[..., None] * difference).sum(2)
    return weight * (under**2).sum(), gradient if detach_others else 2 * gradient


# ---- example calls


def fitting_arguments(num, geometry, features):
    call = examples.convolution(num, geometry, features)
    names = "points", "queries", "neighbors", "kernel_points", "extent"
    return {name: call[name] for name in names} | {"offsets": examples.deformed(call)["offsets"]}


def repulsion_arguments(num, geometry, features):
    call = fitting_arguments(num, geometry, features)
    return {name: call[name] for name in ("kernel_points", "offsets", "extent")}


CALLS = {
    "fitting_loss": (fitting_arguments, [{}]),
    "repulsion_loss": (repulsion_arguments, [{"detach_others": False}]),
}


# ---- against the formulas


@pytest.mark.parametrize("detach_others", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 16])
@both_dtypes
@each_reduction
def test_options_dtypes_and_dimensions(reduction, dtype, dim, detach_others):
    case = clouds.random_case(dim=dim, geometry_type=dtype)
    check_losses(case, reduction=reduction, detach_others=detach_others)


@pytest.mark.parametrize("dim", [2, 3, 5])
@both_dtypes
@pytest.mark.parametrize("num_kernel", KERNEL_SIZES)
def test_kernel_sizes(num_kernel, dtype, dim, isa):
    check_losses(clouds.random_case(dim=dim, num_kernel=num_kernel, geometry_type=dtype))


@pytest.mark.parametrize("num_queries", [1, 2, 3, *clouds.SIZES])
def test_numbers_of_queries(num_queries):
    check_losses(clouds.random_case(num_queries=num_queries, num_kernel=9))


@pytest.mark.parametrize("num_queries", [65_536, 70_001])
def test_more_queries_than_the_least_blocks_hold(num_queries):
    points = clouds.uniform(100)[0]
    queries = np.random.default_rng(0).uniform(size=(num_queries, 3)).astype(np.float32)
    rows = np.random.default_rng(1).integers(0, 100, (num_queries, 2))
    check_losses(clouds.kpconv_case(points, queries, rows, radius=0.3, num_kernel=2))


@pytest.mark.parametrize("repulse_extent", [0.01, 0.5, 1, 3])
def test_repulse_extent(repulse_extent):
    check_losses(clouds.random_case(), repulse_extent=repulse_extent)


@both_dtypes
@pytest.mark.parametrize("name", clouds.NASTY)
def test_nasty_clouds(name, dtype):
    points, radius = clouds.nasty(name, dtype=dtype, num=130)
    rows, _ = reference.radius_search(points, None, radius)
    check_losses(clouds.kpconv_case(points, points, rows, radius))


@given(st.data())
def test_any_cloud_any_options(data):
    points, radius = data.draw(clouds.clouds(max_num=130))
    queries = points[:: data.draw(st.integers(1, 5))]
    max_neighbors = data.draw(st.none() | st.integers(1, 20))
    rows, _ = reference.radius_search(points, queries, radius, max_neighbors=max_neighbors)
    case = clouds.kpconv_case(
        points, queries, rows, radius, num_kernel=data.draw(st.integers(1, 20)), seed=data.draw(clouds.seeds)
    )
    offsets = random_offsets(case, data.draw(st.sampled_from([0, 0.1, 1, 3])), data.draw(clouds.seeds))
    options = {
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
        "detach_others": data.draw(st.booleans()),
        "repulse_extent": data.draw(st.sampled_from([0.3, 1, 1.2, 2])),
    }
    loss, _ = repulsion_loss(case.kernel_points, offsets, case.extent, **options | {"reduction": "sum"})
    # A repulsion loss near zero is mostly rounding error: its kernel points are about repulse_extent apart.
    assume(not 0 < loss < 1e-3 * len(offsets))
    check_losses(case, offsets, **options)


ROWS = {
    "all_empty": [[]] * 70,
    "thousands_for_one": [[], range(5000), [], [3]],
    "thousands_for_some": [range(0, 5000, 1 + q % 7) if q % 20 == 5 else [q] for q in range(130)],
    "repeated_and_unsorted": [[7, 7, 3, 9, 3], [4999, 0, 4999]],
    "one_point_for_all": [[11]] * 200,
    "no_queries": [],
}


@pytest.mark.parametrize("name", ROWS)
def test_neighborhoods_of_any_size(name):
    points, rows = clouds.uniform(5000)[0], [np.array(row, int) for row in ROWS[name]]
    check_losses(clouds.kpconv_case(points, points[: len(rows)], rows, radius=1.0))


def test_no_points():
    points = np.empty((0, 3))
    check_losses(clouds.kpconv_case(points, np.ones((2, 3)), [np.empty(0, int)] * 2, radius=1.0))


@both_dtypes
def test_no_queries_lose_nothing(dtype):
    case = clouds.random_case(num_queries=0, geometry_type=dtype)
    for fn in losses(case).values():
        loss, grad_offsets, grad_kernel_points = run(fn, random_offsets(case), case.kernel_points)
        assert_same_bits(loss, np.zeros((), dtype))
        assert grad_offsets.shape == (0, 15, 3) and not grad_kernel_points.any()


def test_a_query_without_neighbours_adds_nothing_but_counts():
    points, kernel_points = np.zeros((1, 3)), np.array([[1.0, 0, 0]])
    offsets = np.zeros((4, 1, 3))
    lonely = kp.Neighbors(np.zeros(1, np.int32), np.array([0, 0, 1, 1, 1]), 1)
    expected = {"mean": 1 / 4, "points": 1 / 4, "sum": 1}
    for reduction in REDUCTIONS:
        loss, grad = run(
            lambda o, reduction=reduction: kp.fitting_loss(
                points, np.zeros((4, 3)), lonely, kernel_points, o, 1.0, reduction=reduction
            ),
            offsets,
        )
        assert loss == expected[reduction]
        assert grad[:, 0, 0].tolist() == [0, 2 * expected[reduction], 0, 0]


def test_one_kernel_point_has_none_to_repel():
    case = clouds.random_case(num_kernel=1)
    loss, grad = run(repulsion(case), random_offsets(case))
    assert loss == 0 and not grad.any()


def test_queries_none_means_the_points():
    points, radius = clouds.uniform(130)
    neighbors = kp.radius_search(points, None, radius)
    case = clouds.kpconv_case(points, points, [], radius)
    rest = neighbors, case.kernel_points, random_offsets(case), case.extent
    assert_same_bits(kp.fitting_loss(points, None, *rest), kp.fitting_loss(points, points, *rest))


@pytest.mark.parametrize(
    "layout", [np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2], lambda a: a[::-1].copy()[::-1]]
)
def test_any_layout_and_read_only(layout):
    case = clouds.random_case()
    offsets = random_offsets(case)
    other = replace(case, **{name: layout(getattr(case, name)) for name in ("points", "queries", "kernel_points")})
    read_only = layout(offsets)
    read_only.flags.writeable = False
    for name, fn in losses(case).items():
        expected = run(fn, offsets, case.kernel_points)
        for got, want in zip(run(losses(other)[name], read_only, other.kernel_points), expected, strict=True):
            assert_same_bits(got, want)


# ---- decisions, zero distances, NaN


def nearest_of(points, queries, rows, kernel_points, offsets):
    case = clouds.kpconv_case(points, queries, rows, radius=1.0)
    arguments = {"points": points, "queries": queries, "neighbors": kp.Neighbors(*case.csr()),
                 "kernel_points": kernel_points, "offsets": offsets, "extent": 1.0}  # fmt: skip
    _, (nearest,) = examples.computed(OPS["fitting_loss"], arguments)
    return nearest


@both_dtypes
@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize("spacing", [0.25, 0.1])
def test_the_first_of_equally_near_neighbours(spacing, dim, dtype, isa):
    # Kernel points half-way between points; with steps of 0.1, rounding breaks some ties and creates others.
    rng = np.random.default_rng(0)
    points = clouds.lattice(rng, dim, spacing, 300).astype(dtype)
    kernel_points = clouds.lattice(rng, dim, spacing / 2, 27).astype(dtype)
    offsets = rng.integers(-2, 3, (len(points), len(kernel_points), dim)).astype(dtype) * dtype(spacing / 2)
    rows, _ = reference.radius_search(points, None, 3 * spacing)
    rows = [rng.permutation(row) for row in rows]
    expected = fitting_nearest(points, points, rows, kernel_points, offsets)
    assert_same_bits(nearest_of(points, points, rows, kernel_points, offsets), expected.astype(np.int32))


@both_dtypes
def test_a_kernel_point_on_a_neighbour_is_not_pulled(dtype):
    points = np.array([[0, 0, 0], [1, 2, 3]], dtype)
    everyone = kp.Neighbors(np.array([0, 1, 0, 1], np.int32), np.array([0, 2, 4]), 2)
    kernel_points = np.array([[0, 0, 0], [1, 1, 1]], dtype)
    offsets = np.array([[[0, 0, 0], [0, 1, 2]], [[-1, -2, -3], [-1, -1, -1]]], dtype)
    loss, grad = run(lambda o: kp.fitting_loss(points, None, everyone, kernel_points, o, 0.5), offsets)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("detach_others", [True, False])
@both_dtypes
def test_kernel_points_at_the_same_place_have_no_direction_to_part_in(dtype, detach_others):
    kernel_points, offsets = np.zeros((15, 3), dtype), np.zeros((20, 15, 3), dtype)
    loss, grad = run(
        lambda o: kp.repulsion_loss(kernel_points, o, 0.5, repulse_extent=1.5, detach_others=detach_others), offsets
    )
    assert loss == pytest.approx(14 * 1.5**2, rel=1e-7)
    assert_same_bits(np.abs(grad), np.zeros_like(offsets))


@pytest.mark.parametrize("place", [0, 1, -1])
def test_nan_makes_a_loss_nan(place, isa):
    case = clouds.random_case(num_queries=61)
    offsets = random_offsets(case)
    query = next(q for q, row in enumerate(case.rows) if len(row) > 2)
    points = case.points.copy()
    points[case.rows[query][place], 1] = np.nan
    assert np.isnan(fitting(replace(case, points=points))(offsets))
    offsets[query, place, 2] = np.nan
    for fn in losses(case).values():
        loss, grad = run(fn, offsets)
        assert np.isnan(loss) and np.isnan(grad[query, place]).any()
        assert np.isfinite(np.delete(grad, query, 0)).all()


@both_dtypes
def test_offsets_whose_squares_overflow(dtype):
    # Squares of distances overflow: the fitting loss is infinite, the repulsion loss stays finite; neither is NaN.
    case = clouds.random_case(geometry_type=dtype)
    offsets = np.full((len(case.queries), 15, 3), np.sqrt(np.finfo(dtype).max) * 4, dtype)
    offsets[:, ::2] *= -1
    assert fitting(case)(offsets) == np.inf
    assert np.isfinite(repulsion(case)(offsets))
    assert np.isfinite(run(repulsion(case), offsets)[1]).all()


# ---- gradients


@pytest.mark.parametrize("name", ["fitting", "repulsion"])
@each_reduction
def test_by_central_differences(reduction, name):
    case = clouds.random_case(geometry_type=np.float64)
    fn = losses(case, reduction=reduction, detach_others=False)[name]
    primals = random_offsets(case), case.kernel_points
    pullback = kp.autodiff.vjp(fn, *primals)[1]
    check_vjp(fn, pullback, primals, step=1e-7, tolerance=1e-5)
    for factors in (1.001, 1), (1, 1.001):
        with pytest.raises(AssertionError, match="relative error"):
            check_vjp(
                fn,
                lambda g, factors=factors: [grad * factor for grad, factor in zip(pullback(g), factors, strict=True)],
                primals,
                step=1e-7,
                tolerance=1e-5,
            )


def torch_fitting(torch, points, queries, rows, kernel_points, offsets, extent):
    deformed = kernel_points + offsets
    terms = [
        ((deformed[q][:, None] - (points[row] - queries[q])) ** 2).sum(2).min(1).values / extent**2
        for q, row in enumerate(rows)
        if len(row)
    ]
    return torch.stack(terms).sum()


def torch_repulsion(torch, kernel_points, offsets, extent, detach_others):
    total, deformed = 0, kernel_points + offsets
    for k in range(len(kernel_points)):
        others = torch.cat([deformed[:, :k], deformed[:, k + 1 :]], 1)
        distance = (deformed[:, k : k + 1] - (others.detach() if detach_others else others)).norm(dim=2)
        total = total + ((distance / extent - 1.2).clamp(max=0) ** 2).sum()
    return total


@pytest.mark.parametrize("detach_others", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_torch_autograd(dim, detach_others):
    torch = pytest.importorskip("torch")
    case = clouds.random_case(dim=dim, geometry_type=np.float64)
    offsets, kernel_points = random_offsets(case), case.kernel_points
    inputs = [torch.from_numpy(a.copy()).requires_grad_() for a in (offsets, kernel_points)]
    points, queries = map(torch.from_numpy, (case.points, case.queries))
    torch_losses = {
        "fitting": torch_fitting(torch, points, queries, case.rows, inputs[1], inputs[0], case.extent),
        "repulsion": torch_repulsion(torch, inputs[1], inputs[0], case.extent, detach_others),
    }
    for name, fn in losses(case, reduction="sum", detach_others=detach_others).items():
        expected = [torch_losses[name].detach(), *torch.autograd.grad(torch_losses[name], inputs)]
        for got, want in zip(run(fn, offsets, kernel_points), expected, strict=True):
            assert_close(got, want.numpy(), 1e-10)


@both_dtypes
def test_detaching_the_others_halves_the_gradient(dtype):
    case = clouds.random_case(geometry_type=dtype)
    published, true = (
        run(repulsion(case, detach_others=detach), random_offsets(case), case.kernel_points) for detach in (True, False)
    )
    assert_same_bits(true[0], published[0])
    for half, whole in zip(published[1:], true[1:], strict=True):
        assert_same_bits(2 * half, whole)


@pytest.mark.parametrize("name", ["fitting", "repulsion"])
def test_one_primal_alone_gets_the_same_gradient(name):
    case = clouds.random_case(num_queries=1000)
    fn, offsets = losses(case)[name], random_offsets(case)
    _, grad_offsets, grad_kernel_points = run(fn, offsets, case.kernel_points)
    assert_same_bits(run(fn, offsets)[1], grad_offsets)
    assert_same_bits(run(lambda p: fn(offsets, p), case.kernel_points)[1], grad_kernel_points)


@pytest.mark.parametrize("name", ["fitting", "repulsion"])
@both_dtypes
def test_the_gradient_of_the_loss_scales_the_gradients(name, dtype):
    case = clouds.random_case(geometry_type=dtype)
    fn, offsets = losses(case)[name], random_offsets(case)
    for once, twice in zip(run(fn, offsets)[1:], run(fn, offsets, grad=2.0)[1:], strict=True):
        assert_same_bits(2 * once, twice)


@pytest.mark.parametrize("argument", ["points", "queries"])
def test_what_has_no_gradient_says_so(argument):
    case = clouds.random_case()
    arrays = {name: getattr(case, name) for name in ("points", "queries", "kernel_points", "extent")}
    arrays |= {"neighbors": kp.Neighbors(*case.csr()), "offsets": random_offsets(case)}
    message = f"{argument}: fitting_loss cannot be differentiated in it, only in offsets, kernel_points"
    with pytest.raises(TypeError, match=message):
        kp.autodiff.vjp(lambda x: kp.fitting_loss(**{**arrays, argument: x}), arrays[argument])


@both_dtypes
def test_what_comes_out_is_known_ahead(dtype):
    case = clouds.random_case(geometry_type=dtype)
    common = {"kernel_points": case.kernel_points, "offsets": random_offsets(case), "extent": case.extent}
    common["reduction"] = "mean"
    of_points = {"points": case.points, "queries": case.queries, "neighbors": kp.Neighbors(*case.csr())}
    for op, arguments in (
        (OPS["fitting_loss"], common | of_points),
        (OPS["repulsion_loss"], common | {"repulse_extent": 1.2, "detach_others": True}),
    ):
        out, saved = examples.computed(op, arguments)
        assert op.result(Call(**arguments)) == [(a.shape, a.dtype) for a in (out, *saved)]


# ---- the published code

GOLDEN = sorted((Path(__file__).parent / "golden").glob("deform_*.npz"))


def test_golden_is_complete():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    """Losses, nearest distances, and gradients through the convolution that computes the offsets."""
    golden = np.load(path)
    points, queries, kernel_points = (golden[name] for name in ("points", "queries", "kernel_points"))
    extent, (num_kernel, dim) = float(golden["extent"]), kernel_points.shape
    neighbors = kp.Neighbors.from_padded(golden["neighbors_padded"], len(points))
    made = golden["offset_features"]
    offsets = extent * made[:, : num_kernel * dim].reshape(-1, num_kernel, dim)
    assert_close(kernel_points + offsets, golden["deformed_kernel_points"], 1e-10)

    arguments = {"points": points, "queries": queries, "neighbors": neighbors, "kernel_points": kernel_points}
    _, (nearest,) = examples.computed(OPS["fitting_loss"], arguments | {"offsets": offsets, "extent": extent})
    difference = points[nearest] - queries[:, None] - kernel_points - offsets
    assert_close((difference**2).sum(2), golden["min_d2"], 1e-10)

    options = {name: str(golden[name]) for name in ("influence", "aggregation")}
    make_offsets = kp.autodiff.vjp(
        lambda w: kp.kpconv(
            points, queries, neighbors, golden["features"], w, golden["offset_kernel_points"], extent, **options
        ),
        golden["offset_weights"],
    )[1]
    for fn, loss, gradient in (
        (lambda o: kp.fitting_loss(**arguments, offsets=o, extent=extent), "fitting_loss", "grad_fit"),
        (lambda o: kp.repulsion_loss(kernel_points, o, extent), "repulsive_loss", "grad_rep"),
    ):
        got, grad = run(fn, offsets)
        assert_close(got, golden[loss], 1e-10)
        grad_made = np.zeros_like(made)  # zero for the last channels, the modulations
        grad_made[:, : num_kernel * dim] = extent * grad.reshape(len(made), -1)
        assert_close(grad_made.sum(0), golden[f"{gradient}_offset_bias"], 1e-10)
        allowed = tolerance(np.float32 if options["influence"] == "gaussian" else np.float64)
        assert_close(make_offsets(grad_made)[0], golden[f"{gradient}_offset_weights"], allowed)


# ---- the same bits everywhere


@both_dtypes
@pytest.mark.parametrize("num_kernel", [1, 5, 15, 43])
def test_same_bits_with_any_instructions_and_threads(num_kernel, dtype, isa, set_isa, set_threads):
    case = clouds.random_case(num_points=2000, num_queries=3001, num_kernel=num_kernel, geometry_type=dtype)
    offsets = random_offsets(case)

    def results():
        return [array for fn in losses(case).values() for array in run(fn, offsets, case.kernel_points)]

    all_results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        all_results.append(results())
    set_isa("base")
    for other in (*all_results[1:], results()):
        for got, expected in zip(other, all_results[0], strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@both_dtypes
def test_scaling_by_a_power_of_two_changes_no_loss(dtype, factor):
    case = clouds.random_case(geometry_type=dtype)
    case = replace(case, extent=float(np.float32(case.extent)))
    geometry = {name: getattr(case, name) * dtype(factor) for name in ("points", "queries", "kernel_points")}
    scaled, offsets = replace(case, **geometry, extent=case.extent * factor), random_offsets(case)
    for name, fn in losses(case).items():
        loss, *grads = run(fn, offsets, case.kernel_points)
        scaled_loss, *scaled_grads = run(losses(scaled)[name], offsets * dtype(factor), scaled.kernel_points)
        assert_same_bits(scaled_loss, loss)
        for got, expected in zip(scaled_grads, grads, strict=True):
            assert_same_bits(got * dtype(factor), expected)


def test_permuting_the_queries_permutes_the_gradient():
    case = clouds.random_case(num_queries=257, geometry_type=np.float64)
    offsets, order = random_offsets(case), np.random.default_rng(1).permutation(257)
    permuted = replace(case, queries=case.queries[order], rows=[case.rows[q] for q in order])
    for name, fn in losses(case).items():
        loss, grad = run(fn, offsets)
        permuted_loss, permuted_grad = run(losses(permuted)[name], offsets[order])
        assert_close(permuted_loss, loss, 1e-13)
        assert_same_bits(permuted_grad, grad[order])

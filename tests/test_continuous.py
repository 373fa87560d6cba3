"""Continuous convolution and its transpose: values, every gradient, Open3D's released operators, dense convolutions."""

import itertools
import math
from pathlib import Path

import clouds
import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_close, assert_same_bits, tolerance

import kpcore as kp

MAPPINGS = ("ball_to_cube_radial", "ball_to_cube_volume_preserving", "identity")
INTERPOLATIONS = ("linear", "linear_border", "nearest_neighbor")
DIFFERENTIABLE = ("features", "filters", "importances", "neighbor_importances", "points", "queries", "extents")
FUNCTIONS = (kp.continuous_conv, kp.continuous_conv_transpose)
CHANNELS = [1, 2, 3, 15, 16, 17, 33, 64, 65, 130]
GOLDEN = Path(__file__).parent / "golden"
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
each_mapping = pytest.mark.parametrize("mapping", MAPPINGS)
each_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)


# ---- the formulas in float64, as dense arrays (pairs, cells)


def cube_position(relative, mapping):
    """The position in the cube [-1, 1]^3 of points (E, 3) in the unit ball."""
    norm = np.linalg.norm(relative, axis=1, keepdims=True)
    if mapping == "identity":
        return relative
    if mapping == "ball_to_cube_radial":
        largest = np.abs(relative).max(1, keepdims=True)
        return np.where(largest < 1e-8, 0, relative * norm / np.maximum(largest, 1e-300))
    out = np.zeros_like(relative)
    for row, (x, y, z), n in zip(out, relative, norm[:, 0], strict=True):
        if n * n < 1e-12:
            continue
        if 1.25 * z * z > x * x + y * y:
            stretch = math.sqrt(3 * n / (n + abs(z)))
            x, y, z = x * stretch, y * stretch, math.copysign(n, z)
        else:
            stretch = n / math.hypot(x, y)
            x, y, z = x * stretch, y * stretch, 1.5 * z
        radius = math.hypot(x, y)
        if radius * radius < 1e-12:
            x = y = 0
        elif abs(y) <= abs(x):
            x, y = math.copysign(radius, x), math.copysign(radius, x) * 4 / math.pi * math.atan(y / x)
        else:
            x, y = math.copysign(radius, y) * 4 / math.pi * math.atan(x / y), math.copysign(radius, y)
        row[:] = x, y, z
    return out


def cell_weights(relative, extents, shape, mapping, interpolation, align_corners, offset):
    """(E, depth * height * width) the weight of every cell of the filter for every pair."""
    sizes = np.array(shape[::-1])  # along x, y, z
    u = cube_position(2 * relative / extents, mapping) / 2
    c = (u + 0.5) * (sizes - 1) if align_corners else u * sizes + (sizes - 1) / 2 + offset
    by_axis = []
    for axis, size in enumerate(sizes):
        along, cells = c[:, axis, None], np.arange(size)
        if interpolation != "linear_border":
            along = np.clip(along, 0, size - 1)
        if interpolation == "nearest_neighbor":
            by_axis.append(1.0 * (np.minimum(np.floor(along + 0.5), size - 1) == cells))
        else:
            by_axis.append(np.maximum(0, 1 - np.abs(along - cells)))
    x, y, z = by_axis
    return np.einsum("ex,ey,ez->ezyx", x, y, z).reshape(len(c), math.prod(shape))


def convolution(transposed, points, queries, neighbors, features, filters, extents, *,
                coordinate_mapping="ball_to_cube_radial", interpolation="linear", align_corners=True, normalize=False,
                offset=None, importances=None, neighbor_importances=None):  # fmt: skip
    """Either convolution in float64."""
    queries = points if queries is None else queries
    pairs = int(neighbors.row_splits[-1])
    index, query = neighbors.index[:pairs], np.repeat(np.arange(len(queries)), neighbors.counts)
    relative = points.astype(np.float64)[index] - queries.astype(np.float64)[query]
    owner, num_owners = (index, len(points)) if transposed else (query, len(queries))
    extents = np.atleast_1d(np.asarray(extents, np.float64))
    extents = np.broadcast_to(extents if extents.ndim == 2 else extents[:, None], (num_owners, 3))[owner]
    offset = np.zeros(3) if offset is None else offset.astype(np.float64)
    weights = cell_weights(-relative if transposed else relative, extents, filters.shape[:3], coordinate_mapping,
                           interpolation, align_corners, offset)  # fmt: skip
    factors = np.ones(pairs) if neighbor_importances is None else neighbor_importances[:pairs].astype(np.float64)
    sums = np.bincount(owner, factors, num_owners) if normalize else np.ones(num_owners)
    sums[sums == 0] = 1
    scale = factors / sums[owner]
    if importances is not None:
        scale = scale * importances.astype(np.float64)[query if transposed else index]
    matrices = filters.astype(np.float64).reshape(-1, *filters.shape[3:])
    gathered = scale[:, None] * features.astype(np.float64)[index]
    sums_by_cell = np.zeros((len(queries), len(matrices), features.shape[1]))
    np.add.at(sums_by_cell, query, weights[:, :, None] * gathered[:, None, :])
    return np.einsum("qkc,kcd->qd", sums_by_cell, matrices)


# ---- problems


def problem(function=kp.continuous_conv, num_points=40, num_queries=23, sizes=(3, 4, 2), cin=3, cout=4, extents="one",
            geometry=np.float64, features=np.float64, radius=0.45, seed=0, same=False, longer=0):  # fmt: skip
    """Arguments with every array set: {name: value}."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(size=(num_points, 3)).astype(geometry)
    queries = None if same else rng.uniform(size=(num_queries, 3)).astype(geometry)
    neighbors = kp.radius_search(points, queries, radius)
    if longer:
        index = np.concatenate([neighbors.index, np.zeros(longer, np.int32)])
        neighbors = kp.Neighbors(index, neighbors.row_splits, num_points)
    transposed, num_queries = function is kp.continuous_conv_transpose, num_points if same else num_queries
    owners = num_points if transposed else num_queries
    shape = {"number": (), "one": (1,), "each": (owners,), "axes": (1, 3), "each_axes": (owners, 3)}[extents]
    return {
        "points": points,
        "queries": queries,
        "neighbors": neighbors,
        "features": rng.normal(size=(num_points, cin)).astype(features),
        "filters": rng.normal(size=(*sizes, cin, cout)).astype(features),
        "extents": rng.uniform(1.6 * radius, 2.4 * radius, shape).astype(geometry),
        "offset": rng.uniform(-0.5, 0.5, 3).astype(geometry),
        "importances": rng.normal(size=num_queries if transposed else num_points).astype(features),
        "neighbor_importances": rng.uniform(-0.5, 2, len(neighbors.index)).astype(features),
    }


def check(function, arguments, **options):
    """Assert that the result is that of the formulas, and return it."""
    out = function(**arguments, **options)
    transposed = function is kp.continuous_conv_transpose
    expected = convolution(transposed, **arguments, **options)
    assert out.dtype == arguments["features"].dtype
    assert_close(out, expected, tolerance(out.dtype, arguments["points"].dtype))
    return out


def gradients(function, arguments, grad, names=DIFFERENTIABLE, **options):
    """{name: gradient} of the arguments in `names` that are not None, and the result as "out"."""
    names = [name for name in names if arguments.get(name) is not None]
    out, pullback = kp.autodiff.vjp(
        lambda *values: function(**{**arguments, **dict(zip(names, values, strict=True))}, **options),
        *(arguments[name] for name in names),
    )
    return dict(zip(names, pullback(grad), strict=True)) | {"out": out}


def covector(function, arguments):
    queries = arguments["points"] if arguments["queries"] is None else arguments["queries"]
    shape = (len(queries), arguments["filters"].shape[-1])
    return np.random.default_rng(7).normal(size=shape).astype(arguments["features"].dtype)


CALLS = {
    function.__name__: (
        lambda num, geometry, features, function=function: problem(
            function, num, 2 * num // 3, (2, 3, 2), 3, 2, "each", geometry, features
        ),
        [
            {"coordinate_mapping": "ball_to_cube_volume_preserving", "normalize": True},
            {"importances": None, "neighbor_importances": None, "align_corners": False, "normalize": True},
            lambda a: {"interpolation": "linear_border", "coordinate_mapping": "identity", "align_corners": False,
                       "extents": np.stack([a["extents"]] * 3, 1), "neighbor_importances": None},
            {"interpolation": "nearest_neighbor", "offset": None},
        ],
    )
    for function in FUNCTIONS
}  # fmt: skip


# ---- values


@pytest.mark.parametrize("types", list(itertools.product([np.float32, np.float64], repeat=2)), ids=str)
@pytest.mark.parametrize("align_corners", [True, False])
@each_interpolation
@each_mapping
@each_function
def test_formulas(function, mapping, interpolation, align_corners, types):
    for sizes, normalize, extents in (((3, 4, 2), True, "each_axes"), ((1, 5, 3), False, "number")):
        arguments = problem(function, sizes=sizes, extents=extents, geometry=types[0], features=types[1])
        check(function, arguments, coordinate_mapping=mapping, interpolation=interpolation,
              align_corners=align_corners, normalize=normalize)  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 4), (2, 2, 2), (4, 4, 4), (5, 5, 5), (7, 7, 7), (1, 9, 9)])
@each_interpolation
@each_function
def test_kernel_sizes(function, interpolation, sizes, isa):
    arguments = problem(function, sizes=sizes, extents="each")
    check(function, arguments, interpolation=interpolation, align_corners=False)


@pytest.mark.parametrize(("cin", "cout"), [*((c, 3) for c in CHANNELS), *((5, c) for c in CHANNELS), (64, 64)])
def test_channels(cin, cout, isa):
    arguments = problem(cin=cin, cout=cout, features=np.float32)
    check(kp.continuous_conv, arguments)
    check(kp.continuous_conv, arguments, interpolation="nearest_neighbor")


@pytest.mark.parametrize("num_queries", [0, 1, 12, 61, 121, 400])
@pytest.mark.parametrize("num_points", [0, 1, 300])
@each_function
def test_numbers_of_points_and_queries(function, num_points, num_queries):
    """300 points within the radius are three chunks of neighbours."""
    arguments = problem(function, num_points, num_queries, radius=2.0, longer=5)
    out = check(function, arguments, normalize=True)
    assert out.shape == (num_queries, 4)
    grads = gradients(function, arguments, covector(function, arguments), normalize=True)
    assert not grads["neighbor_importances"][int(arguments["neighbors"].row_splits[-1]) :].any()


@pytest.mark.parametrize("name", ["all_equal", "duplicates", "dyadic_lattice", "along_axis", "planar", "far_away"])
@each_mapping
def test_nasty_clouds(name, mapping):
    points, radius = clouds.nasty(name, 3, np.float64, num=120)
    arguments = problem(num_points=len(points), num_queries=1) | {"points": points, "queries": None}
    arguments |= {"neighbors": kp.radius_search(points, None, radius), "extents": np.array([2 * radius])}
    arguments["neighbor_importances"] = np.random.default_rng(1).normal(size=len(arguments["neighbors"].index))
    check(kp.continuous_conv, arguments, coordinate_mapping=mapping)


def test_a_sum_of_importances_that_is_zero_does_not_divide():
    neighbors = kp.Neighbors(np.array([0, 1, 0], np.int32), kp.row_splits([2, 1, 0]), 2)
    arguments = problem(num_points=2, num_queries=3) | {"neighbors": neighbors}
    arguments["neighbor_importances"] = np.array([1.0, -1.0, -0.5])
    out = check(kp.continuous_conv, arguments, normalize=True)
    assert not out[2].any()
    assert_close(out[0], kp.continuous_conv(**arguments)[0], 1e-14)
    assert_close(out[1], -2 * kp.continuous_conv(**arguments)[1], 1e-14)


@pytest.mark.parametrize(("interpolation", "size", "values"), [
    ("linear", 4, [0, 0.5, 1.5, 2.5, 3]),
    ("linear", 5, [0, 0.75, 2, 3.25, 4]),
    ("nearest_neighbor", 4, [0, 1, 2, 3, 3]),
])  # fmt: skip
def test_how_a_filter_is_read(interpolation, size, values):
    """Without aligned corners the border of the shape is half a cell beyond the outer cells; halves are rounded up."""
    x = np.array([-0.5, -0.25, 0, 0.25, 0.5])
    ramp = np.arange(float(size)).reshape(1, 1, size, 1, 1)
    neighbors = kp.Neighbors(np.arange(5, dtype=np.int32), np.arange(6), 5)
    points = np.stack([x, np.zeros(5), np.zeros(5)], 1)
    out = kp.continuous_conv(points, np.zeros((5, 3)), neighbors, np.ones((5, 1)), ramp, 1.0, align_corners=False,
                             coordinate_mapping="identity", interpolation=interpolation)  # fmt: skip
    assert out.ravel().tolist() == values


# ---- the mapping that keeps ratios of volumes


def mapped(points):
    """Positions in the cube, read from a filter of two cells along each axis that holds their coordinates."""
    corners = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3, indexing="ij"), -1)[..., ::-1]
    neighbors = kp.Neighbors(np.arange(len(points), dtype=np.int32), np.arange(len(points) + 1), len(points))
    return kp.continuous_conv(
        points, np.zeros_like(points), neighbors, np.ones((len(points), 1)), corners[..., None, :].copy(), 2.0,
        coordinate_mapping="ball_to_cube_volume_preserving",
    )  # fmt: skip


def unmapped(cube):
    """The inverse of the mapping: cube to cylinder, cylinder to ball."""
    out = []
    for u, v, z in cube:
        radius, is_along_x = max(abs(u), abs(v)), abs(v) <= abs(u)
        angle = math.pi / 4 * (v / u if is_along_x else u / v)
        x, y = (u * math.cos(angle), u * math.sin(angle)) if is_along_x else (v * math.sin(angle), v * math.cos(angle))
        if abs(z) >= radius:  # a cap of the cylinder: |z| is the norm n, and radius^2 = 3 n (n - height)
            norm = abs(z)
            height = math.copysign(norm - radius * radius / (3 * norm), z)
        else:  # its side: the radius is the norm
            norm, height = radius, z / 1.5
        shrink = math.sqrt(norm * norm - height * height) / radius
        out.append((x * shrink, y * shrink, height))
    return np.array(out)


def in_ball(num, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(num, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True) * rng.uniform(size=(num, 1)) ** (1 / 3)


def test_the_volume_preserving_mapping_has_an_inverse():
    points = in_ball(1000)
    np.testing.assert_allclose(unmapped(mapped(points)), points, atol=1e-13)
    cube = np.random.default_rng(1).uniform(-1, 1, (1000, 3))
    np.testing.assert_allclose(mapped(unmapped(cube)), cube, atol=1e-13)


def test_the_volume_preserving_mapping_has_a_constant_determinant():
    points, step = in_ball(1000), 1e-6
    jacobian = np.stack([(mapped(points + d) - mapped(points - d)) / (2 * step) for d in step * np.eye(3)], -1)
    np.testing.assert_allclose(np.linalg.det(jacobian), 6 / math.pi, rtol=1e-7)


@pytest.mark.parametrize("mapping", MAPPINGS[:2])
def test_the_sphere_is_mapped_to_the_surface_of_the_cube(mapping):
    points = in_ball(300)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs(cube_position(points, mapping)).max(1), 1, rtol=1e-14)
    np.testing.assert_allclose(np.abs(mapped(points)).max(1), 1, rtol=1e-13)


# ---- Open3D's operators, as released


def golden_cases(name):
    with np.load(GOLDEN / f"open3d_{name}.npz") as data:
        configurations = data["configs"].tolist()
        return [
            (c, {k.split("/")[1]: data[k] for k in data if k.startswith(c.split(",")[0] + "/")}) for c in configurations
        ]


@pytest.mark.parametrize(
    ("function", "configuration", "case"),
    [(f, *case) for f in FUNCTIONS for case in golden_cases(f.__name__)],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_golden(function, configuration, case):
    _, mapping, interpolation, align_corners, normalize = configuration.split(",")
    name = "inp_importance" if function is kp.continuous_conv else "out_importance"
    arguments = {
        "points": case["inp_positions"],
        "queries": case["out_positions"],
        "neighbors": kp.Neighbors(case["neighbors_index"], case["neighbors_row_splits"], len(case["inp_positions"])),
        "features": case["inp_features"],
        "filters": case["filters"],
        "extents": case["extents"],
        "offset": case["offset"],
        "importances": case[name] if len(case[name]) else None,
        "neighbor_importances": case["neighbors_importance"] if len(case["neighbors_importance"]) else None,
    }
    options = {"coordinate_mapping": mapping, "interpolation": interpolation, "align_corners": align_corners == "True"}
    grads = gradients(function, arguments, case["grad_out"], normalize=normalize == "True", **options)
    for ours, theirs in (("out", "out"), ("features", "grad_features"), ("filters", "grad_filters")):
        assert_close(grads[ours], case[theirs], 2e-5, np.abs(case[theirs]).max())


def test_golden_is_complete():
    assert [len(golden_cases(f.__name__)) for f in FUNCTIONS] == [36, 36]


# ---- gradients


@pytest.mark.parametrize("extents", ["number", "one", "each", "axes", "each_axes"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS[:2])
@each_mapping
@each_function
def test_gradients_by_central_differences(function, mapping, interpolation, normalize, extents):
    for sizes, align_corners, same in (((3, 4, 2), True, False), ((1, 3, 5), False, True)):
        arguments = problem(function, 18, 11, sizes=sizes, extents=extents, same=same, seed=3)
        names = [name for name in DIFFERENTIABLE if arguments[name] is not None]

        def fn(*values, arguments=arguments, names=names, align_corners=align_corners):
            return function(**{**arguments, **dict(zip(names, values, strict=True))}, coordinate_mapping=mapping,
                            interpolation=interpolation, normalize=normalize, align_corners=align_corners)  # fmt: skip

        _, pullback = kp.autodiff.vjp(fn, *(arguments[name] for name in names))
        for at, name in enumerate(names):  # one by one, so that a small gradient is not hidden by a large one

            def alone(value, at=at, fn=fn, arguments=arguments, names=names):
                values = [arguments[n] for n in names]
                values[at] = value
                return fn(*values)

            check_vjp(alone, lambda g, at=at, pullback=pullback: [pullback(g)[at]], [arguments[name]], step=1e-8,
                      tolerance=1e-4)  # fmt: skip


@each_mapping
@each_function
def test_gradients_in_any_dtype(function, mapping, isa):
    """Gradients of each dtype are those of float64 arrays of the same values."""
    arguments = problem(function, geometry=np.float32, features=np.float32, cin=17, cout=9)
    options = {"coordinate_mapping": mapping, "normalize": True, "align_corners": False}
    single = gradients(function, arguments, covector(function, arguments), **options)
    for geometry, features in ((np.float64, np.float64), (np.float64, np.float32), (np.float32, np.float64)):
        converted = {}
        for name, value in arguments.items():
            dtype = geometry if name in ("points", "queries", "extents", "offset") else features
            converted[name] = value.astype(dtype) if isinstance(value, np.ndarray) else value
        grads = gradients(function, converted, covector(function, arguments).astype(features), **options)
        for name, grad in grads.items():
            assert grad.dtype == (features if name == "out" else converted[name].dtype)
            assert_close(single[name], grad, 1e-4, np.abs(grad).max())


@each_function
def test_only_the_gradients_that_are_needed(function):
    arguments = problem(function)
    everything = gradients(function, arguments, covector(function, arguments), normalize=True)
    for name in DIFFERENTIABLE:
        alone = gradients(function, arguments, covector(function, arguments), [name], normalize=True)
        assert_same_bits(alone[name], everything[name])


def test_nearest_cells_have_no_gradient_by_position():
    arguments = problem()
    grads = gradients(kp.continuous_conv, arguments, covector(kp.continuous_conv, arguments),
                      interpolation="nearest_neighbor")  # fmt: skip
    assert not any(grads[name].any() for name in ("points", "queries", "extents"))
    assert grads["features"].any()


@each_mapping
def test_the_gradient_at_the_query_itself(mapping):
    """The mappings have no derivative there, which counts as 0; the identity has one."""
    neighbors = kp.Neighbors(np.array([0], np.int32), np.array([0, 1]), 1)
    arguments = {
        "points": np.zeros((1, 3)),
        "queries": np.zeros((1, 3)),
        "neighbors": neighbors,
        "features": np.ones((1, 1)),
        "filters": np.arange(8.0).reshape(2, 2, 2, 1, 1),
        "extents": np.ones(1),
    }
    grads = gradients(kp.continuous_conv, arguments, np.ones((1, 1)), coordinate_mapping=mapping)
    assert grads["points"].tolist() == ([[1, 2, 4]] if mapping == "identity" else [[0, 0, 0]])


@pytest.mark.parametrize(("x", "linear", "border"), [
    (-0.75, 0, 0), (-0.375, 0, 0), (-0.25, 4, 4), (-0.125, 4, 4), (0.0, 4, 4), (0.25, 0, -8),
    (0.375, 0, -8), (0.75, 0, 0),
])  # fmt: skip
def test_the_gradient_where_interpolation_has_a_kink_is_that_of_the_upper_cell(x, linear, border):
    """A filter 0, 1, 2 along x in a box of size 1 whose cells are 0.25 wide (align_corners would be 0.5)."""
    neighbors, ramp = kp.Neighbors(np.array([0], np.int32), np.array([0, 1]), 1), np.arange(3.0).reshape(1, 1, 3, 1, 1)
    for interpolation, expected in (("linear", linear), ("linear_border", border)):
        arguments = {"points": np.array([[x, 0, 0]]), "queries": np.zeros((1, 3)), "neighbors": neighbors,
                     "features": np.ones((1, 1)), "filters": ramp, "extents": np.array([0.5])}  # fmt: skip
        grads = gradients(kp.continuous_conv, arguments, np.ones((1, 1)), coordinate_mapping="identity",
                          interpolation=interpolation)  # fmt: skip
        assert grads["points"][0, 0] == expected


# ---- adjoints, dense convolutions, invariances


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@each_mapping
def test_the_transpose_is_the_adjoint(mapping, interpolation):
    arguments = problem(cin=5, cout=4)
    options = {"coordinate_mapping": mapping, "interpolation": interpolation, "extents": arguments["extents"]}
    points, queries, neighbors, x = (arguments[name] for name in ("points", "queries", "neighbors", "features"))
    y = np.random.default_rng(5).normal(size=(len(queries), 4))
    forward = kp.continuous_conv(points, queries, neighbors, x, arguments["filters"], **options)
    filters = arguments["filters"].swapaxes(3, 4).copy()
    back = kp.continuous_conv_transpose(queries, points, neighbors.transpose(), y, filters, **options)
    assert_close(np.vdot(forward, y), np.vdot(x, back), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_dense_convolution(size):
    """On a grid, with the identity and the nearest cell, it is torch's convolution of an array."""
    torch = pytest.importorskip("torch")
    rng, side = np.random.default_rng(0), 6
    dense = rng.normal(size=(1, 3, side, side, side))
    filters = rng.normal(size=(size, size, size, 3, 2))
    z, y, x = np.meshgrid(*[np.arange(side)] * 3, indexing="ij")
    points = np.stack([x, y, z], -1).reshape(-1, 3) / 8
    shift = np.full(3, -0.5 if size % 2 == 0 else 0.0)
    neighbors = kp.radius_search(points, points - shift / 8, 0.51 * size / 8, metric="linf")
    out = kp.continuous_conv(
        points, points, neighbors, dense.reshape(3, -1).T.copy(), filters, size / 8, coordinate_mapping="identity",
        interpolation="nearest_neighbor", align_corners=False, offset=shift,
    )  # fmt: skip
    weights = torch.tensor(filters).permute(4, 3, 0, 1, 2)
    padded = torch.nn.functional.pad(torch.tensor(dense), ((size - 1) // 2, size // 2) * 3)
    expected = torch.nn.functional.conv3d(padded, weights)[0].reshape(2, -1).T
    assert_close(out, expected.numpy(), 1e-12)


@pytest.mark.parametrize("interpolation", ["linear", "nearest_neighbor"])
@each_function
def test_the_same_bits_with_any_number_of_threads(function, interpolation, isa, set_threads):
    arguments = problem(function, 1500, 1300, radius=0.2, cin=17, cout=9, geometry=np.float32, features=np.float32)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(gradients(function, arguments, covector(function, arguments), interpolation=interpolation,
                                 normalize=True))  # fmt: skip
    for other in results[1:]:
        for name, value in other.items():
            assert_same_bits(value, results[0][name])


@each_mapping
def test_the_same_cells_with_any_instructions(mapping, set_isa):
    """Which cell is nearest is decided by the same bits: equal features show equal cells."""
    from kpcore.backends import cpu

    arguments = problem(num_points=3000, num_queries=40, radius=0.5, cin=1, cout=1, geometry=np.float32)
    arguments |= {"importances": None, "neighbor_importances": None, "features": np.ones((3000, 1)),
                  "filters": 2.0 ** np.arange(24).reshape(2, 3, 4, 1, 1)}  # fmt: skip
    results = []
    for name in cpu.isas():
        set_isa(name)
        results.append(kp.continuous_conv(**arguments, coordinate_mapping=mapping, interpolation="nearest_neighbor"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["features", "points", "queries", "neighbor_importances"])
@each_interpolation
@each_mapping
def test_what_is_not_finite_changes_only_queries_that_see_it(mapping, interpolation, name, value):
    arguments = problem(cin=3)
    options = {"coordinate_mapping": mapping, "interpolation": interpolation}
    before = kp.continuous_conv(**arguments, **options)
    neighbors = arguments["neighbors"]
    query = int(np.argmax(neighbors.counts))
    at = {"queries": query, "neighbor_importances": neighbors.row_splits[query]}.get(
        name, neighbors.index[neighbors.row_splits[query]]
    )
    changed = arguments[name].copy()
    changed[at] = value
    after = kp.continuous_conv(**arguments | {name: changed}, **options)
    sees = {
        "queries": np.arange(len(before)) == query,
        "neighbor_importances": np.arange(len(before)) == query,
    }.get(name, np.array([at in neighbors.index[b:e] for b, e in itertools.pairwise(neighbors.row_splits)]))
    assert_same_bits(after[~sees], before[~sees])
    if not (
        name in ("points", "queries") and mapping == "identity" and value == np.inf
    ):  # clamped, or beyond the border
        assert np.isnan(after[query]).any() or np.isinf(after[query]).any()


# ---- errors


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"extents": np.ones(7)}, ValueError, r"extents: expected a number, \(1,\) or \(23,\) to match queries"),
    ({"extents": np.ones((23, 2))}, ValueError, r"extents: .*got \(23, 2\)"),
    ({"extents": np.ones((1, 3, 1))}, ValueError, r"extents: .*got \(1, 3, 1\)"),
    ({"extents": np.ones(1, np.float32)}, TypeError, "extents: expected float64 to match points, got float32"),
    ({"extents": -1.0}, ValueError, "extents: expected a finite number above zero, got -1.0"),
    ({"filters": np.ones((3, 3, 3, 4))}, ValueError, r"filters: expected \(depth, height, width, 3, Cout\)"),
    ({"filters": np.ones((3, 0, 3, 3, 4))}, ValueError, "filters: expected sizes of at least 1"),
    ({"offset": np.zeros(2)}, ValueError, r"offset: expected \(3,\).*got \(2,\)"),
    ({"importances": np.ones(23)}, ValueError, r"importances: expected \(40,\) to match points, got \(23,\)"),
    ({"neighbor_importances": np.ones(3)}, ValueError, r"neighbor_importances: expected .* neighbors, got \(3,\)"),
    ({"coordinate_mapping": "ball"}, ValueError, "coordinate_mapping: expected 'ball_to_cube_radial' or"),
    ({"interpolation": "cubic"}, ValueError, "interpolation: expected 'linear' or"),
    ({"normalize": 1}, TypeError, "normalize: expected True or False, got int"),
])  # fmt: skip
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        kp.continuous_conv(**problem() | changes)


def test_points_have_three_coordinates():
    points, arguments = np.zeros((4, 2)), problem()
    neighbors = kp.radius_search(points, None, 1.0)
    with pytest.raises(ValueError, match=r"points: expected \(N, 3\), got \(4, 2\)"):
        kp.continuous_conv(points, None, neighbors, np.ones((4, 3)), arguments["filters"], 1.0)


@pytest.mark.parametrize("framework", ["kpcore.torch", "kpcore.jax"])
@pytest.mark.parametrize("extent", [0.0, -1.0, np.nan, 1e-30, 10**400, 0.9, np.float32(0.9), np.int64(1)])
def test_an_extent_that_is_a_number_is_checked_in_every_framework(framework, extent):
    module = pytest.importorskip(framework)
    arguments = problem(geometry=np.float32, features=np.float32) | {"extents": extent, "offset": None}
    converted = dict(arguments)
    if framework == "kpcore.torch":
        from kpcore.torch.ops import to_tensor

        converted = {n: to_tensor(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    if extent > 0.5 and extent < 2:
        assert_same_bits(np.asarray(module.continuous_conv(**converted)), kp.continuous_conv(**arguments))
        return
    for function, values in ((kp.continuous_conv, arguments), (module.continuous_conv, converted)):
        with pytest.raises(ValueError, match=r"^extents: expected a"):
            function(**values)


def test_an_extent_that_jax_traces():
    jax, kpj = pytest.importorskip("jax"), pytest.importorskip("kpcore.jax")
    arguments = problem(geometry=np.float32, features=np.float32) | {"offset": None}

    def total(extent):
        return kpj.continuous_conv(**arguments | {"extents": extent}).sum()

    at = np.float32(0.9)
    expected, gradient = jax.value_and_grad(total)(at)
    for function in (jax.value_and_grad(total), jax.jit(jax.value_and_grad(total))):
        got = function(0.9)  # a number without a dtype of its own
        assert_close(np.asarray(got[0]), np.asarray(expected), 1e-6)
        assert_close(np.asarray(got[1]), np.asarray(gradient), 1e-6)


def test_an_extent_in_compiled_code():
    torch = pytest.importorskip("torch")
    import kpcore.torch as kpt
    from kpcore.torch.ops import to_tensor

    arguments = problem(geometry=np.float32, features=np.float32, longer=0) | {"offset": None}
    arguments = {n: to_tensor(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}

    def total(features, extent):
        return kpt.continuous_conv(**{**arguments, "features": features, "extents": extent}).sum()

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for extent in (0.9, 1.1, 0.8):
        assert torch.equal(compiled(arguments["features"], extent), total(arguments["features"], extent))
    wrong = torch.compile(lambda features: total(features, -1.0), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"expected a finite number above zero, got -1|Observed exception"):
        wrong(arguments["features"])

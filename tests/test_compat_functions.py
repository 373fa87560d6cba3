"""The functions of kpcore.compat against the released code of the projects that have them, and against brute force.

What that code returns is in golden/clients_functions_*.npz. Where it dies or is wrong (empty items, several columns of
classes in a batch), there is only brute force.
"""

import inspect
import itertools
from pathlib import Path

import clouds
import numpy as np
import pytest
import reference
from reference import assert_same_bits

import kpcore as kp
import kpcore.compat as compat
from kpcore.compat import cpp_wrappers

GOLDEN = {}
for project in ("kpconv", "geotransformer", "kpconvx", "easykpconv"):
    with np.load(Path(__file__).parent / "golden" / f"clients_functions_{project}.npz") as file:
        GOLDEN[project] = dict(file)
LENGTHS = [60, 0, 50, 40, 0, 0, 30]  # of batch items
TOLERANCE = 2e-7  # of float32 sums in the order of the input
EMPTY = [[], [0], [0, 0, 0], [0, 5], [5, 0], [0, 0, 5, 0, 0, 7, 0]]


def cases(*functions):
    """pytest parameters (project, function, case): all in the files for these functions."""
    names = {(project, *key.split("/")[:2]) for project, file in GOLDEN.items() for key in file}
    return [pytest.param(*name, id="/".join(name)) for name in sorted(names) if name[1] in functions]


def read(project, function, case):
    """(arguments, results) of a case, each by name; numbers as Python numbers, numbered arrays as lists."""
    parts = {"in": {}, "out": {}}
    for key in GOLDEN[project]:
        if key.startswith(f"{function}/{case}/"):
            part, name, *number = key.removeprefix(f"{function}/{case}/").split("/")
            value = GOLDEN[project][key]
            if number:
                parts[part].setdefault(name, []).append(value)
            else:
                parts[part][name] = value if value.ndim else value.item()
    return parts["in"], parts["out"]


def call(function, arguments):
    """The function with its positional arguments by position, as the projects call it."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in arguments]
    return function(*[arguments.pop(name) for name in positional], **arguments)


def same_voxels(points, lengths, expected, expected_lengths):
    """(V,) the number of the expected voxel of each point, after a check that both have the same ones in each item."""
    np.testing.assert_array_equal(lengths, expected_lengths)
    same = np.empty(len(points), int)
    for first, last in itertools.pairwise(clouds.splits(lengths)):
        distance = np.abs(points[first:last, None] - expected[None, first:last]).max(2)
        same[first:last] = first + distance.argmin(1)
    assert sorted(same) == list(range(len(expected))), "voxels are missing"
    np.testing.assert_allclose(points, expected[same], rtol=TOLERANCE, atol=TOLERANCE)
    return same


def assert_nearest_first(got, expected, queries, supports, rounded=False):
    """The same neighbours in the same order, except among equally near ones; the same padding.

    `rounded`: the expected order is that of rounded square roots, of which more are equal than of squares.
    """
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert np.array_equal(got == len(supports), expected == len(supports)), "padding"
    padded = np.concatenate([supports, np.full((1, 3), 1e6, supports.dtype)])

    def distance(index):
        d = padded[index] - queries[:, None]
        squares = (d[..., 0] * d[..., 0] + d[..., 1] * d[..., 1]) + d[..., 2] * d[..., 2]
        return np.sqrt(squares) if rounded else squares

    assert_same_bits(distance(got), distance(expected))
    assert np.array_equal(np.sort(got), np.sort(expected)), "another set of neighbours"


# ---- the released code


@pytest.mark.parametrize(
    "project, function, case",
    cases("subsample", "subsample_batch", "grid_subsample", "grid_subsample_batch", "grid_subsampling"),
)
def test_published_voxels(project, function, case):
    arguments, expected = read(project, function, case)
    max_p, whole = arguments.get("max_p", 0), function in ("subsample", "grid_subsample")
    original = dict(arguments)
    out = call(getattr(compat, function), arguments)
    out = dict(zip([name for name in expected if name != "class_tie"], out if isinstance(out, tuple) else (out,),
                   strict=True))  # fmt: skip
    for name, value in out.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
    batches = "lengths" if function == "grid_subsampling" else "batches"
    if max_p:  # which voxels are kept depends on the order: the first ones
        assert np.array_equal(out[batches], expected[batches])
        full = compat.subsample_batch(original["points"], original["batches"], sampleDl=original["sampleDl"])
        kept = [full[0][first : first + max_p] for first in clouds.splits(full[1])[:-1]]
        assert_same_bits(out["points"], np.concatenate(kept))
        return
    lengths = [[len(v["points"])] if whole else v[batches] for v in (out, expected)]
    same = same_voxels(out["points"], lengths[0], expected["points"], lengths[1])
    if "features" in expected:
        np.testing.assert_allclose(out["features"], expected["features"][same], rtol=TOLERANCE, atol=TOLERANCE)
    if "class_tie" in expected:
        clear = expected["class_tie"][same] == 0
        assert np.array_equal(out["classes"][clear], expected["classes"][same][clear])
        assert clear.any() and not clear.all()


def test_published_lattice_is_not_that_of_exact_arithmetic():
    """As the README of the files says; otherwise the test above would not see the order of operations."""
    (arguments, expected), size = read("kpconv", "subsample", "lattice_classes"), 0.025
    points = arguments["points"].astype(np.float64).round(6)
    assert len(expected["points"]) == 25 and len(np.unique(np.floor((points - 0.3) / size + 1e-6), axis=0)) == 41


@pytest.mark.parametrize("project, function, case", cases("batch_query", "batch_radius_neighbors", "radius_neighbors"))
def test_published_neighbors(project, function, case):
    arguments, expected = read(project, function, case)
    queries, supports = list(arguments.values())[:2]
    got = call(getattr(compat, function), dict(arguments))
    assert_nearest_first(got, expected["neighbors"], queries, supports)
    cut = call(getattr(compat, function), arguments | {"max_neighbors": 3})
    assert_same_bits(cut, np.ascontiguousarray(got[:, :3]))


@pytest.mark.parametrize("project, function, case", cases("batch_grid_partitionning"))
def test_published_partition(project, function, case):
    arguments, expected = read(project, function, case)
    points, lengths, pools, upsamples = call(compat.batch_grid_partitionning, arguments)
    same = same_voxels(points, lengths, expected["points"], expected["batches"])
    assert_same_bits(pools, expected["pools"][same])
    assert_same_bits(same.astype(np.int32)[upsamples], expected["upsamples"])
    assert lengths.dtype == upsamples.dtype == np.int32


@pytest.mark.parametrize("project, function, case", cases("furthest_point_sample"))
def test_published_furthest_points(project, function, case):
    arguments, expected = read(project, function, case)
    assert_same_bits(call(compat.furthest_point_sample, arguments), expected["index"])


@pytest.mark.parametrize("project, function, case", cases("batch_knn_neighbors"))
def test_published_nearest_neighbors(project, function, case):
    arguments, expected = read(project, function, case)
    index, squares = call(compat.batch_knn_neighbors, dict(arguments))
    assert squares.dtype == expected["sq_distances"].dtype
    np.testing.assert_allclose(squares, expected["sq_distances"], rtol=TOLERANCE)
    # Of equally near supports at the end of a row, the published search takes any.
    last = squares[:, -1:] * (1 - TOLERANCE)
    got, wanted = (np.where(squares < last, i, -1) for i in (index, expected["neighbors"]))
    assert index.dtype == expected["neighbors"].dtype and np.array_equal(np.sort(got), np.sort(wanted))
    full = index == len(arguments["supports"])
    assert np.array_equal(full, expected["neighbors"] == len(arguments["supports"])) and (squares[full] == 1e10).all()


@pytest.mark.parametrize("project, function, case", cases("grid_subsample_pack_mode"))
def test_published_voxels_in_pack_mode(project, function, case):
    arguments, expected = read(project, function, case)
    points, lengths = call(compat.grid_subsample_pack_mode, arguments)
    assert points.dtype == np.float32 and lengths.dtype == np.int64
    assert np.array_equal(lengths, expected["lengths"])
    np.testing.assert_allclose(points, expected["points"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("project, function, case", cases("radius_search_pack_mode"))
def test_published_neighbors_in_pack_mode(project, function, case):
    arguments, expected = read(project, function, case)
    got = call(compat.radius_search_pack_mode, dict(arguments))
    assert_nearest_first(got, expected["neighbors"], arguments["q_points"], arguments["s_points"], rounded=True)


@pytest.mark.parametrize("project, function, case", cases("radius_count_pack_mode"))
def test_published_counts_in_pack_mode(project, function, case):
    arguments, expected = read(project, function, case)
    assert_same_bits(call(compat.radius_count_pack_mode, arguments), expected["counts"])


def test_a_radius_at_which_points_lie():
    """exact_one has pairs at exactly the radius: inclusive in the search of pack mode, exclusive everywhere else."""
    arguments, _ = read("easykpconv", "radius_count_pack_mode", "exact_one")
    near = compat.radius_search_pack_mode(*arguments.values(), 10) < 64
    assert near.sum(1).max() == 7 and (compat.radius_count_pack_mode(*arguments.values()) == 1).all()
    assert compat.radius_neighbors(*arguments.values()).shape == (64, 1)


@pytest.mark.parametrize(
    "project, function, case, subsample, search",
    [
        ("geotransformer", "precompute_data_stack_mode", "pair", compat.grid_subsampling, compat.radius_neighbors),
        ("easykpconv", "build_grid_and_radius_graph_pyramid", "rooms", compat.grid_subsample_pack_mode,
         compat.radius_search_pack_mode),
    ],
)  # fmt: skip
def test_a_published_pyramid(project, function, case, subsample, search):
    """Each stage from the levels of the released code, with which the barycentres agree up to their rounding."""
    arguments, expected = read(project, function, case)
    limits = arguments["neighbor_limits"].tolist()
    radius = arguments.get("radius") or arguments["search_radius"]
    levels = list(zip(expected["points"], expected["lengths"], strict=True))
    for stage, (points, lengths) in enumerate(levels):
        if stage:
            same_voxels(*subsample(*levels[stage - 1], arguments["voxel_size"] * 2**stage), points, lengths)
        finer = levels[stage - 1] if stage else None
        lists = [("neighbors", stage, (points, lengths), (points, lengths), radius * 2**stage, limits[stage])]
        if finer is not None:
            below = radius * 2 ** (stage - 1)
            lists.append(("subsampling", stage - 1, (points, lengths), finer, below, limits[stage - 1]))
            lists.append(("upsampling", stage - 1, finer, (points, lengths), 2 * below, limits[stage]))
        for name, number, (q, q_lengths), (s, s_lengths), r, limit in lists:
            got = search(q, s, q_lengths, s_lengths, r, limit)
            assert_nearest_first(got, expected[name][number], q, s, rounded=project == "easykpconv")


# ---- brute force


def batch(seed, lengths=LENGTHS, dtype=np.float32, spacing=None):
    """Points of a batch, on a lattice if there is a spacing, on which many distances are equal."""
    rng = np.random.default_rng(seed)
    if spacing is None:
        return rng.random((sum(lengths), 3)).astype(dtype)
    return (rng.integers(-4, 5, (sum(lengths), 3)) * dtype(spacing)).astype(dtype)


def below(radius, dtype):
    """The largest square that is below that of the radius."""
    return np.nextafter(dtype(radius) * dtype(radius), dtype(0))


def padded(rows, num, width=None):
    out = np.full((len(rows), max(map(len, rows), default=0) if width is None else width), num)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row[: len(line)]
    return out


QUERIES = [0, 20, 30, 0, 10, 0, 25]  # lengths of items with other empty ones


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("limit", [None, 4])
def test_neighbors_with_empty_items(dtype, limit):
    supports, queries = batch(0, LENGTHS, dtype, 0.1), batch(1, QUERIES, dtype, 0.1)
    bounds = {"points_row_splits": clouds.splits(LENGTHS), "queries_row_splits": clouds.splits(QUERIES)}
    rows, _ = reference.search(
        supports, queries, np.full(len(queries), below(0.2, dtype)), sort="distance", most=limit, **bounds
    )
    expected = padded(rows, len(supports))
    assert expected.shape[1] > 3
    got = compat.batch_query(queries, supports, QUERIES, LENGTHS, radius=0.2, max_neighbors=limit)
    assert_same_bits(got, expected.astype(np.int32))
    got = compat.radius_neighbors(queries, supports, QUERIES, LENGTHS, 0.2, limit)
    assert_same_bits(got, expected.astype(np.int64))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pack_mode_compares_rounded_distances(dtype):
    """Radii at which points lie, for many of which the squares decide otherwise than the square roots."""
    supports, queries = batch(2, LENGTHS, dtype, 0.1), batch(3, QUERIES, dtype, 0.1)
    bounds = {"points_row_splits": clouds.splits(LENGTHS), "queries_row_splits": clouds.splits(QUERIES)}
    rows, distances = reference.search(
        supports, queries, np.full(len(queries), np.inf, dtype), sort="distance", **bounds
    )
    differ = 0
    for radius in np.unique(np.concatenate(distances))[1:30]:
        within = [row[d <= radius] for row, d in zip(rows, distances, strict=True)]
        got = compat.radius_search_pack_mode(queries, supports, QUERIES, LENGTHS, float(radius), 7)
        assert_same_bits(got, padded(within, len(supports), 7))
        counts = compat.radius_count_pack_mode(queries, supports, QUERIES, LENGTHS, float(radius))
        strict = np.array([(d < radius).sum() for d in distances])
        assert_same_bits(counts, strict)
        by_squares = kp.radius_search(supports, queries, float(radius), count_only=True, **bounds)
        differ += np.any(by_squares != [len(row) for row in within])
    assert differ > 3, "the test needs radii at which squares decide otherwise"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_neighbors_with_empty_items(dtype):
    supports, queries = batch(4, LENGTHS, dtype, 0.1), batch(5, QUERIES, dtype, 0.1)
    lengths = [5, 0, 3, *LENGTHS[3:]]  # fewer supports than neighbours
    supports = supports[: sum(lengths)]
    bounds = {"points_row_splits": clouds.splits(lengths), "queries_row_splits": clouds.splits(QUERIES)}
    rows, distances = reference.knn_search(supports, queries, 6, **bounds)
    index, squares = compat.batch_knn_neighbors(queries, supports, QUERIES, lengths, n_neighbors=6)
    assert_same_bits(index, padded(rows, len(supports), 6).astype(np.int32))
    expected = np.full((len(queries), 6), 1e10, dtype)
    for line, d in zip(expected, distances, strict=True):
        line[: len(d)] = d * d
    assert_same_bits(squares, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_of_several_columns_of_classes_with_empty_items(dtype):
    points, rng = batch(6, LENGTHS, dtype, 0.0125), np.random.default_rng(7)
    features = rng.random((len(points), 2)).astype(np.float32)
    classes = rng.integers(-3, 3, (len(points), 3)).astype(np.int32)
    expected = [
        reference.grid_subsample(points, 0.03, features, column, clouds.splits(LENGTHS), "published")
        for column in classes.T
    ]
    out = compat.subsample_batch(points, LENGTHS, features=features, classes=classes, sampleDl=0.03)
    np.testing.assert_allclose(out[0], expected[0]["points"], rtol=1e-6, atol=1e-8)
    assert_same_bits(out[1], np.diff(expected[0]["row_splits"]).astype(np.int32))
    np.testing.assert_allclose(out[2], expected[0]["features"], rtol=1e-6)
    assert_same_bits(out[3], np.stack([e["labels"] for e in expected], 1))
    assert out[0].dtype == dtype and out[2].dtype == np.float32
    _, _, pools, upsamples = compat.batch_grid_partitionning(points, LENGTHS, sampleDl=0.03)
    inverse = expected[0]["inverse"]
    assert_same_bits(upsamples, inverse[:, None].astype(np.int32))
    members = [np.flatnonzero(inverse == voxel) for voxel in range(len(pools))]
    assert_same_bits(pools, padded(members, len(points)).astype(np.int32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("far", [0, 1e6])
def test_voxels_in_pack_mode_with_empty_items(dtype, far):
    points = batch(8, LENGTHS, dtype, 0.0125) + dtype(far)
    cells = np.floor(points * dtype(1 / 0.03))
    items = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    voxels, inverse = np.unique(np.column_stack([items, cells]), axis=0, return_inverse=True)
    members = [np.flatnonzero(inverse.ravel() == voxel) for voxel in range(len(voxels))]
    got, lengths = compat.grid_subsample_pack_mode(points, LENGTHS, 0.03)
    np.testing.assert_allclose(got, reference.exact_means(points, members), rtol=2 * np.finfo(dtype).eps)
    assert_same_bits(lengths, np.bincount(voxels[:, 0].astype(int), minlength=len(LENGTHS)))
    assert got.dtype == dtype


def test_voxels_in_pack_mode_of_items_far_apart():
    """One number for each voxel, as in other batches, would not do here."""
    item = np.array([[3, 1, 2], [0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 1]]) + 0.5
    points = np.concatenate([item + far for far in (0, 1e7, 2e7)])
    got, _ = compat.grid_subsample_pack_mode(points, [5] * 3, 1.0)
    order = np.lexsort(item.T[::-1])
    assert_same_bits(got, np.concatenate([item[order] + far for far in (0, 1e7, 2e7)]))


@pytest.mark.parametrize("lengths", EMPTY)
def test_nothing_is_an_empty_result(lengths):
    points = batch(9, lengths, spacing=0.1)
    voxels, out = compat.subsample_batch(points, lengths, sampleDl=0.05)
    items = [points[first:last] for first, last in itertools.pairwise(clouds.splits(lengths))]
    assert out.tolist() == [len(np.unique(item, axis=0)) for item in items]
    assert compat.grid_subsampling(points, lengths, 0.05)[1].tolist() == out.tolist()
    assert compat.grid_subsample_pack_mode(points, lengths, 0.05)[1].tolist() == out.tolist()
    _, _, pools, upsamples = compat.batch_grid_partitionning(points, lengths, sampleDl=0.05)
    assert pools.shape[0] == len(voxels) and upsamples.shape == (len(points), 1)
    for q, q_lengths in ((points, lengths), (points[:0], [0] * len(lengths))):
        for s, s_lengths in ((points, lengths), (points[:0], [0] * len(lengths))):
            arguments = q, s, q_lengths, s_lengths
            alone = len(q) and len(s)
            assert (compat.batch_query(*arguments, radius=0.05).shape[1] == 0) == (not alone)
            assert len(compat.radius_neighbors(*arguments, 0.05)) == len(q)
            assert compat.radius_search_pack_mode(*arguments, 0.05, 3).shape == (len(q), 3)
            assert compat.radius_count_pack_mode(*arguments, 0.05).all() == bool(alone or not len(q))
            index, squares = compat.batch_knn_neighbors(*arguments, n_neighbors=2)
            assert index.shape == squares.shape == (len(q), 2)
            assert alone or ((index == len(s)).all() and (squares == 1e10).all())


def test_no_points_at_all():
    nothing = np.zeros((0, 3), np.float32)
    assert compat.subsample(nothing).shape == (0, 3)
    classes, features = np.zeros((0, 2), np.int32), np.zeros((0, 4), np.float32)
    assert [a.shape for a in compat.subsample(nothing, features=features, classes=classes)] == [(0, 3), (0, 4), (0, 2)]
    assert_same_bits(compat.furthest_point_sample(nothing, new_n=4), np.zeros(0, np.int32))


def test_furthest_points_of_copies():
    points = np.repeat(batch(10, [12]), 3, axis=0)
    expected = reference.farthest_points(points[::3], 12)[0] * 3
    got = compat.furthest_point_sample(points, new_n=20)
    assert got.tolist() == [*expected, *[expected[-1]] * 8]
    assert len(compat.furthest_point_sample(points)) == len(points)
    assert compat.furthest_point_sample(points, new_n=50, min_d=1e-3).tolist() == expected.tolist()
    assert compat.furthest_point_sample(points, new_n=0).tolist() == [0]
    assert compat.furthest_point_sample(points[:3], new_n=5, min_d=-1.0).tolist() == [0] * 5


# ---- kernel points and pooling


@pytest.mark.parametrize("dimension, num, fixed, lloyd", [(3, 15, "center", False), (2, 9, "verticals", False),
                                                          (2, 31, "center", False), (2, 4, "none", True),
                                                          (4, 12, "center", False)])  # fmt: skip
def test_load_kernels(dimension, num, fixed, lloyd):
    np.random.seed(3)  # noqa: NPY002 - what callers do
    points = compat.load_kernels(0.2, num, dimension, fixed, lloyd)
    assert points.dtype == np.float32 and points.shape == (num, dimension)
    method = "lloyd" if lloyd or num > 30 else "potential"
    still = kp.kernel_points(num, 0.2 * (1 if method == "lloyd" else 0.66), dimension=dimension, fixed=fixed,
                             method=method, dtype=np.float64)  # fmt: skip
    np.random.seed(3)  # noqa: NPY002
    angle, noise = np.random.rand() * 2 * np.pi, np.random.normal(scale=0.01, size=still.shape)  # noqa: NPY002
    turn = np.eye(dimension)
    if dimension < 4:
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    np.testing.assert_allclose(points, (still + 0.2 * noise) @ turn, atol=1e-7)
    assert not np.array_equal(points, compat.load_kernels(0.2, num, dimension, fixed, lloyd))


def pooling_case(seed=11, dtype=np.float32):
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, 31, (40, 5))
    index[:3], index[3, 0] = 30, 30
    return rng.normal(size=(30, 4)).astype(dtype), index


def test_pools_of_arrays():
    x, index = pooling_case()
    rows = np.concatenate([x, np.zeros((1, 4), x.dtype)])[index]  # index -1 takes the last row
    assert_same_bits(compat.max_pool(x, index), rows.max(1))
    assert_same_bits(compat.closest_pool(x, index), rows[:, 0])
    assert (rows.max(1) == 0).any() and not compat.max_pool(x, index[:, :0]).any()
    assert not compat.closest_pool(x, index[:, :0].astype(np.int32)).any()


# ---- kinds of arguments


def test_torch_is_not_imported(python):
    run = python(
        "import sys, numpy as np, kpcore.compat as compat\n"
        "points = np.random.default_rng(0).random((50, 3), np.float32)\n"
        "compat.batch_query(points, points, [50], [50], radius=0.2); compat.subsample(points, sampleDl=0.3)\n"
        "compat.load_kernels(1.0, 5, 3, 'center'); compat.max_pool(points, np.zeros((4, 2), int))\n"
        "from kpcore.compat import cpp_wrappers; cpp_wrappers.subsample(points, sampleDl=0.3)\n"
        "assert not {'torch', 'cupy', 'scipy'} & sys.modules.keys()"
    )
    assert run.returncode == 0, run.stderr


def test_colours_and_classes_of_small_dtypes():
    points = np.array([[0, 0, 0], [0.2, 0, 0]], np.float32)
    colours, classes = np.array([[255, 0], [0, 1]], np.uint8), np.array([7, 7], np.uint8)
    _, features, labels = compat.subsample(points, features=colours, classes=classes, sampleDl=1.0)
    assert_same_bits(features, np.array([[127.5, 0.5]], np.float32))
    assert_same_bits(labels, np.array([[7]], np.int32))
    labels = compat.subsample(points, classes=np.array([2**40, 2**40]), sampleDl=1.0)[1]
    assert_same_bits(labels, np.array([[2**40]]))
    features = compat.subsample(points, features=colours.astype(np.float64), sampleDl=1.0)[1]
    assert features.dtype == np.float64


def test_method_and_verbose_change_nothing():
    points = batch(12, [50])
    out = compat.subsample(points, sampleDl=0.3)
    assert_same_bits(compat.subsample(points, sampleDl=0.3, method="voxelcenters", verbose=1), out)
    assert compat.grid_subsample is compat.subsample and compat.batch_radius_neighbors is compat.batch_query


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint8])
def test_lengths_of_any_kind(kind):
    points = batch(13, [30, 20])
    lengths = kind([30, 20]) if kind in (list, tuple) else np.array([30, 20], kind)
    expected = compat.batch_query(points, points, np.array([30, 20]), np.array([30, 20]), radius=0.3)
    assert_same_bits(compat.batch_query(points, points, lengths, lengths, radius=0.3), expected)


CALLS = {  # function: positional arguments, keyword arguments; "P" points, "Q" queries, "L" lengths, "M" lengths of Q
    "subsample": ("P", {"sampleDl": 0.2, "features": "F", "classes": "C"}),
    "subsample_batch": ("PL", {"sampleDl": 0.2, "features": "F", "classes": "C", "max_p": 9}),
    "batch_grid_partitionning": ("PL", {"sampleDl": 0.2}),
    "furthest_point_sample": ("P", {"new_n": 20}),
    "batch_query": ("QPML", {"radius": 0.3}),
    "batch_knn_neighbors": ("QPML", {"n_neighbors": 6}),
    "grid_subsampling": ("PL", {"voxel_size": 0.2}),
    "radius_neighbors": ("QPML", {"radius": 0.3, "max_neighbors": 5}),
    "grid_subsample_pack_mode": ("PL", {"voxel_size": 0.2}),
    "radius_search_pack_mode": ("QPML", {"radius": 0.3, "neighbor_limit": 5}),
    "radius_count_pack_mode": ("QPML", {"radius": 0.3}),
    "max_pool": ("FI", {}),
    "closest_pool": ("FI", {}),
}


def arrays():
    rng = np.random.default_rng(14)
    return {
        "P": batch(14), "Q": batch(15, QUERIES), "L": np.array(LENGTHS), "M": np.array(QUERIES),
        "F": rng.normal(size=(sum(LENGTHS), 3)).astype(np.float32),
        "C": rng.integers(0, 4, (sum(LENGTHS), 2)).astype(np.int32),
        "I": rng.integers(-1, sum(LENGTHS) + 1, (30, 4)),
    }  # fmt: skip


def results(function, place=lambda name, array: array, module=compat):
    """What a call of CALLS returns, as a tuple, for arguments made by ``place(name, array)``."""
    letters, options = CALLS[function]
    values = {name: place(name, array) for name, array in arrays().items()}
    options = {name: values.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    out = getattr(module, function)(*(values[letter] for letter in letters), **options)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("function", CALLS)
def test_tensors_in_tensors_out(function):
    torch = pytest.importorskip("torch")
    for got, expected in zip(results(function, lambda _, a: torch.from_numpy(a)), results(function), strict=True):
        assert isinstance(got, torch.Tensor)
        assert_same_bits(got.numpy(), expected)


@pytest.mark.parametrize("function", [name for name, (letters, _) in CALLS.items() if "L" in letters])
def test_lengths_of_another_kind_than_the_points(function):
    torch = pytest.importorskip("torch")
    expected = results(function)
    for of_points, of_lengths in ((torch.from_numpy, list), (np.asarray, torch.from_numpy)):
        got = results(function, lambda name, a, p=of_points, k=of_lengths: (k if name in "LM" else p)(a))
        for a, b in zip(got, expected, strict=True):
            assert isinstance(a, torch.Tensor) == (of_points is torch.from_numpy)
            assert_same_bits(np.asarray(a), b)


def test_workers_do_not_import_all_of_kpcore_torch(python):
    """It takes a third of a second, which each new worker of a DataLoader would spend."""
    pytest.importorskip("torch")
    run = python(
        "import sys, torch, numpy as np, kpcore.compat as compat\n"
        "points, lengths = torch.rand(50, 3), torch.tensor([20, 30])\n"
        "got = compat.radius_neighbors(points, points, lengths, [20, 30], 0.3)\n"
        "voxels, counts = compat.grid_subsampling(points, lengths, 0.3)\n"
        "assert not isinstance(compat.grid_subsampling(points.numpy(), lengths, 0.3)[0], torch.Tensor)\n"
        "assert 'kpcore.torch' not in sys.modules\n"
        "for wrong in (points.numpy(), points.int(), points.clone().requires_grad_()):\n"
        "    try: compat.batch_knn_neighbors(points, wrong, lengths, lengths)\n"
        "    except TypeError as error: print(error)\n"
        "assert torch.equal(got, compat.radius_neighbors(points, points, lengths, lengths, 0.3))\n"
        "again = compat.grid_subsampling(points, lengths, 0.3)\n"
        "assert torch.equal(voxels, again[0]) and torch.equal(counts, again[1])"
    )
    assert run.returncode == 0, run.stderr
    array, dtype, gradient = run.stdout.splitlines()
    assert array == "supports: expected a torch tensor, got ndarray; convert it with torch.from_numpy"
    assert dtype == "supports: expected float32 or float64, got int32; convert it with supports.to(torch.float64)"
    assert gradient.startswith("supports: batch_knn_neighbors has no gradient; detach it with supports.detach()")


@pytest.mark.parametrize("function", [name for name in CALLS if hasattr(cpp_wrappers, name)])
def test_wrappers_return_arrays(function):
    """As the loaders of OverlapPredator and ml-kpconvx expect."""
    torch = pytest.importorskip("torch")
    tensors = results(function, lambda _, a: torch.from_numpy(a), cpp_wrappers)
    for got, expected in zip(tensors, results(function), strict=True):
        assert_same_bits(got, expected)
        assert torch.from_numpy(got).shape == expected.shape
    for got, expected in zip(results(function, module=cpp_wrappers), results(function), strict=True):
        assert_same_bits(got, expected)


def test_every_function_is_exported():
    assert set(CALLS) | {
        "load_kernels",
        "grid_subsample",
        "grid_subsample_batch",
        "batch_radius_neighbors",
        "cache",
    } == set(compat.__all__)
    assert set(cpp_wrappers.__all__) < set(compat.__all__)
    for name in cpp_wrappers.__all__:
        assert inspect.signature(getattr(cpp_wrappers, name)) == inspect.signature(getattr(compat, name))


def test_gradients_of_pools():
    torch = pytest.importorskip("torch")
    x, index = pooling_case(dtype=np.float64)
    x, index = torch.from_numpy(x).requires_grad_(), torch.from_numpy(index)
    rows = torch.cat([x, torch.zeros(1, 4, dtype=x.dtype)])[index]
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 4)))
    for got, expected in ((compat.max_pool(x, index), rows.max(1)[0]), (compat.closest_pool(x, index), rows[:, 0])):
        assert torch.equal(got, expected)
        for out in (got, expected):
            (out * weights).sum().backward(retain_graph=True)
            grad, x.grad = x.grad, None
            if out is got:
                first = grad
        assert torch.allclose(first, grad, rtol=0, atol=1e-12)


def test_tensors_that_require_a_gradient():
    torch = pytest.importorskip("torch")
    points = torch.rand(20, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"points: grid_subsampling has no gradient; detach it with points.detach\(\)"):
        compat.grid_subsampling(points, [20], 0.2)
    with torch.no_grad():
        assert not compat.grid_subsampling(points, [20], 0.2)[0].requires_grad
    assert compat.radius_neighbors(points, points, [20], [20], 0.2).dtype == torch.int64  # no gradient to lose


POINTS, LONG = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.int64)
ERRORS = [
    (lambda: compat.subsample(LONG), TypeError, "points: expected float32 or float64, got int64"),
    (lambda: compat.subsample(POINTS[0]), ValueError, r"points: expected \(N, D\), got \(3,\)"),
    (lambda: compat.subsample(POINTS.tolist()), TypeError, "points: expected a NumPy or CuPy array, got list"),
    (lambda: compat.subsample(POINTS, sampleDl=0.0), ValueError, "sampleDl: expected a finite number above zero"),
    (lambda: compat.subsample(POINTS, method="x"), ValueError, "method: expected 'barycenters' or 'voxelcenters'"),
    (lambda: compat.subsample(POINTS, features=LONG), TypeError, "features: expected float32 or float64, got int64"),
    (lambda: compat.subsample(POINTS, features=POINTS[0]), ValueError, r"features: expected \(4, C\)"),
    (lambda: compat.subsample(POINTS, classes=POINTS), TypeError, "classes: expected"),
    (lambda: compat.subsample(POINTS, classes=LONG[:2]), ValueError, "classes: expected"),
    (lambda: compat.subsample(POINTS + np.nan), ValueError, "points: expected finite coordinates"),
    (lambda: compat.subsample_batch(POINTS, [3]), ValueError,
     "batches: expected lengths that add up to 4 to match points, got 3"),
    (lambda: compat.subsample_batch(POINTS, [5, -1]), ValueError, "batches: expected numbers of at least 0, got -1"),
    (lambda: compat.subsample_batch(POINTS, [4.0]), TypeError, r"batches: expected integers \(B,\), got float64"),
    (lambda: compat.subsample_batch(POINTS, 4), TypeError, r"batches: expected integers \(B,\), got int64 \(\)"),
    (lambda: compat.subsample_batch(POINTS, [4], max_p=-1), ValueError, "max_p: expected at least 0, got -1"),
    (lambda: compat.grid_subsampling(POINTS, [4], -1.0), ValueError, "voxel_size: expected a finite number above"),
    (lambda: compat.grid_subsampling(POINTS, [1], 1.0), ValueError, "lengths: expected lengths that add up to 4"),
    (lambda: compat.grid_subsample_pack_mode(POINTS, [4], 0.0), ValueError, "voxel_size: expected a finite number"),
    (lambda: compat.batch_query(POINTS, POINTS, [4], [2, 2]), ValueError,
     r"q_batches: expected \(2,\) to match s_batches, got \(1,\)"),
    (lambda: compat.batch_query(POINTS, LONG, [4], [4]), TypeError, "supports: expected float32 or float64"),
    (lambda: compat.batch_query(POINTS, POINTS[0], [4], [4]), ValueError, r"supports: expected \(N, D\), got \(3,\)"),
    (lambda: compat.batch_query(POINTS.astype(float), POINTS, [4], [4]), TypeError,
     "queries: expected float32 to match supports, got float64"),
    (lambda: compat.batch_query(POINTS, POINTS + np.inf, [4], [4]), ValueError, "supports: expected finite"),
    (lambda: compat.batch_query(POINTS + np.nan, POINTS, [4], [4]), ValueError, "queries: expected finite coordinates"),
    (lambda: compat.batch_query(POINTS, POINTS, [4], [4], radius=-1.0), ValueError, "radius: expected a finite number"),
    (lambda: compat.batch_query(POINTS, POINTS, [4], [4], max_neighbors=0), ValueError,
     "max_neighbors: expected at least 1, got 0"),
    (lambda: compat.radius_neighbors(POINTS, LONG, [4], [4], 1.0), TypeError, "s_points: expected float32 or float64"),
    (lambda: compat.radius_search_pack_mode(POINTS, LONG, [4], [4], 1.0, 2), TypeError, "s_points: expected float32"),
    (lambda: compat.radius_search_pack_mode(POINTS, POINTS, [4], [4], 0.0, 2), ValueError, "radius: expected a finite"),
    (lambda: compat.radius_search_pack_mode(POINTS, POINTS, [4], [4], 1.0, 0), ValueError,
     "neighbor_limit: expected"),
    (lambda: compat.batch_knn_neighbors(POINTS, POINTS, [4], [4], n_neighbors=0), ValueError, "n_neighbors: expected"),
    (lambda: compat.furthest_point_sample(POINTS, new_n=1.5), TypeError, "new_n: expected an integer, got float"),
    (lambda: compat.furthest_point_sample(POINTS, min_d=np.inf), ValueError, "min_d: expected a finite number"),
    (lambda: compat.load_kernels(1.0, 0, 3, "center"), ValueError, "num_kpoints: expected"),
    (lambda: compat.load_kernels(1.0, 2, 3, "verticals"), ValueError, "num_kpoints: expected"),
    (lambda: compat.load_kernels(1.0, 15, 3, "vertical"), ValueError, "fixed: expected"),
    (lambda: compat.load_kernels(-1.0, 15, 3, "center"), ValueError, "radius: expected"),
    (lambda: compat.max_pool(POINTS, LONG + 5), ValueError, "inds: expected values from -1 to 4"),
    (lambda: compat.max_pool(LONG, LONG), TypeError, "x: expected float32 or float64, got int64"),
    (lambda: compat.closest_pool(POINTS, POINTS), TypeError, "inds: expected int32 or int64, got float32"),
    (lambda: compat.closest_pool(POINTS, LONG[0]), ValueError, r"inds: expected \(M, H\), got \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize("function, error, message", ERRORS)
def test_errors_name_the_argument(function, error, message):
    with pytest.raises(error, match="^" + message):
        function()


def test_errors_speak_of_tensors():
    torch = pytest.importorskip("torch")
    points = torch.zeros(4, 3)
    with pytest.raises(TypeError, match=r"^supports: expected a torch tensor, got ndarray; convert it with torch.from"):
        compat.batch_query(points, POINTS, [4], [4])
    with pytest.raises(TypeError, match=r"^supports: expected float32 to match queries|^queries: expected float64"):
        compat.batch_query(points, points.double(), [4], [4])
    with pytest.raises(
        TypeError, match=r"^points: expected float32 or float64, got int32; convert it with points.to\("
    ):
        compat.subsample(points.int())
    with pytest.raises(TypeError, match=r"^x: expected a torch tensor, got ndarray"):
        compat.max_pool(POINTS, torch.zeros(4, 2, dtype=torch.int64))


def test_numbers_in_tensors():
    torch = pytest.importorskip("torch")
    points, lengths = np.random.default_rng(0).random((30, 3), np.float32), [20, 10]
    expected = compat.batch_query(points, points, lengths, lengths, radius=0.5)
    assert_same_bits(compat.batch_query(points, points, lengths, lengths, radius=torch.tensor(0.5)), expected)
    tensor = torch.from_numpy(points)
    got = compat.batch_query(tensor, tensor, lengths, lengths, radius=torch.tensor(0.5))
    assert_same_bits(got.numpy(), expected)

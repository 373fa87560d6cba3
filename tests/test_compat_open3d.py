"""kpcore.compat.open3d against brute force, and against Open3D's own operators where they are installed."""

import importlib.util
import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
from reference import assert_same_bits

torch = pytest.importorskip("torch")

from torch.autograd.gradcheck import gradcheck  # noqa: E402

from kpcore.compat import open3d as ops  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
METRICS = ("L1", "L2", "Linf")
SPLITS = np.array([0, 60, 60, 150]), np.array([0, 40, 50, 100])  # of points and queries; the second item has no points


def lattice(num, dtype, seed):
    """Points at multiples of 0.1, many of them equal, or at exactly the radius from each other."""
    return (np.random.default_rng(seed).integers(-3, 4, (num, 3)) * dtype(0.1)).astype(dtype)


def cloud(num, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(num, 3)).astype(dtype)


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def measures(points, queries, metric):
    """(M, N) distances, squared for "L2", of the dtype of the points."""
    x, y, z = np.abs(points[None] - queries[:, None]).transpose(2, 0, 1)
    return {"L1": (x + y) + z, "L2": (x * x + y * y) + z * z, "Linf": np.maximum(np.maximum(x, y), z)}[metric]


def same_item(splits, queries_splits):
    """(M, N) bool: whether a query and a point are of one batch item."""
    items = [np.repeat(np.arange(len(s) - 1), np.diff(s)) for s in (queries_splits, splits)]
    return items[0][:, None] == items[1][None]


def equal_points(points, queries):
    return (points[None] == queries[:, None]).all(2)


def assert_rows(result, rows, distances):
    """That the result has these rows of indices, in this order, and these distances, to the bit."""
    np.testing.assert_array_equal(result.neighbors_row_splits, np.cumsum([0, *map(len, rows)]))
    np.testing.assert_array_equal(result.neighbors_index, np.concatenate(rows))
    assert_same_bits(result.neighbors_distance.numpy(), np.concatenate(distances))


# ---- searches


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ignore", [False, True])
def test_fixed_radius_search(dtype, metric, ignore):
    points, queries, radius = lattice(150, dtype, 0), lattice(100, dtype, 1), float(dtype(0.1) * dtype(2))
    within = measures(points, queries, metric)
    near = (within <= (radius * dtype(radius) if metric == "L2" else dtype(radius))) & same_item(*SPLITS)
    near &= ~(ignore & equal_points(points, queries))
    p, q, ps, qs = tensors(points, queries, *SPLITS)
    index, cells, splits = ops.build_spatial_hash_table(p, radius, ps, 1 / 8)
    result = ops.fixed_radius_search(
        p, q, radius, ps, qs, splits, index, cells, torch.int64, metric, ignore_query_point=ignore,
        return_distances=True
    )  # fmt: skip
    assert_rows(result, [row.nonzero()[0] for row in near], [d[row] for d, row in zip(within, near, strict=True)])
    assert result.neighbors_index.dtype == torch.int64
    short = ops.fixed_radius_search(p, q, radius, ps, qs, splits, index, cells, metric=metric)
    assert short.neighbors_index.dtype == torch.int32 and short.neighbors_distance.shape == (0,)


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_radius_search_is_strict(dtype, metric, ignore, normalize):
    points, queries = lattice(150, dtype, 2), lattice(100, dtype, 3)
    radii = (np.random.default_rng(4).integers(1, 4, 100) * dtype(0.1)).astype(dtype)
    bound = radii * radii if metric == "L2" else radii
    within, allowed = measures(points, queries, metric), same_item(*SPLITS)
    assert ((within == bound[:, None]) & allowed).sum() > 50, "the test needs pairs at exactly the radius"
    near = (within < bound[:, None]) & allowed & ~(ignore & equal_points(points, queries))
    p, q, r, ps, qs = tensors(points, queries, radii, *SPLITS)
    result = ops.radius_search(p, q, r, ps, qs, 4, metric, ignore, True, normalize)
    distances = within / bound[:, None] if normalize else within
    assert_rows(result, [row.nonzero()[0] for row in near], [d[row] for d, row in zip(distances, near, strict=True)])


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ignore", [False, True])
def test_knn_search_drops_after_k(dtype, metric, ignore):
    points, queries = lattice(150, dtype, 5), lattice(100, dtype, 6)
    within, allowed, equal = measures(points, queries, metric), same_item(*SPLITS), equal_points(points, queries)
    rows = [np.argsort(np.where(a, d, np.inf), kind="stable")[: min(5, a.sum())]
            for d, a in zip(within, allowed, strict=True)]  # fmt: skip
    if ignore:
        rows = [row[~equal[query][row]] for query, row in enumerate(rows)]
        assert {2, 4, 5} <= set(map(len, rows))
    p, q, ps, qs = tensors(points, queries, *SPLITS)
    result = ops.knn_search(p, q, 5, ps, qs, metric=metric, ignore_query_point=ignore, return_distances=True)
    assert_rows(result, rows, [within[query][row] for query, row in enumerate(rows)])


@pytest.mark.parametrize("num_points, num_queries", [(0, 5), (5, 0), (0, 0)])
def test_searches_of_nothing(num_points, num_queries):
    p, q = torch.zeros(num_points, 3), torch.zeros(num_queries, 3)
    ps, qs = torch.tensor([0, num_points]), torch.tensor([0, num_queries])
    table = ops.build_spatial_hash_table(p, 1.0, ps, 1 / 64)
    assert [len(part) for part in table] == [num_points, 2, 2]
    results = [
        ops.fixed_radius_search(p, q, 1.0, ps, qs, table[2], table[0], table[1]),
        ops.radius_search(p, q, torch.ones(num_queries), ps, qs),
        ops.knn_search(p, q, 3, ps, qs),
    ]
    for result in results:
        assert result.neighbors_index.shape == (0,) and result.neighbors_row_splits.tolist() == [0] * (num_queries + 1)


def test_distances_have_no_gradient():
    points, splits = torch.rand(9, 3, requires_grad=True), torch.tensor([0, 9])
    table = ops.build_spatial_hash_table(points, 0.5, splits, 1.0)
    results = [
        ops.fixed_radius_search(
            points, points, 0.5, splits, splits, table[2], table[0], table[1], return_distances=True
        ),
        ops.radius_search(points, points, torch.full((9,), 0.5), splits, splits, return_distances=True),
        ops.knn_search(points, points, 2, splits, splits, return_distances=True),
    ]
    assert all(len(r.neighbors_distance) >= 9 and not r.neighbors_distance.requires_grad for r in results)


def test_spatial_hash_table():
    """Far points too: the products of the hash wrap around in 32 bits, and the hash may be negative."""
    points, splits, radius = 40 * cloud(150, 7), SPLITS[0], 0.3
    index, cell_splits, table_splits = (a.numpy() for a in ops.build_spatial_hash_table(
        *tensors(points), radius, *tensors(splits), 1 / 4))  # fmt: skip
    assert [a.dtype for a in (index, cell_splits, table_splits)] == [np.int32] * 3
    sizes = [60 // 4, 1, 90 // 4]
    np.testing.assert_array_equal(table_splits, np.cumsum([0, *sizes]))
    voxels = np.floor(points * (np.float32(1) / (2 * np.float32(radius)))).astype(int)
    cells = [[] for _ in range(sum(sizes))]
    negative = 0
    for number, voxel in enumerate(voxels.tolist()):
        item = int(np.searchsorted(splits, number, "right")) - 1
        products = [c * f % 2**32 for c, f in zip(voxel, (73856096, 193649663, 83492791), strict=True)]
        hashed = products[0] ^ products[1] ^ products[2]
        negative += hashed >= 2**31
        hashed = hashed + 2**64 - 2**32 if hashed >= 2**31 else hashed
        cells[table_splits[item] + hashed % sizes[item]].append(number)
    assert 30 < negative < 120
    np.testing.assert_array_equal(cell_splits, np.cumsum([0, *map(len, cells)]))
    np.testing.assert_array_equal(index, np.concatenate(cells))
    assert len(ops.build_spatial_hash_table(*tensors(points), radius, *tensors(splits), 4, 3)[1]) == 8


# ---- lists


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_invert_neighbors_list(dtype, shape):
    rng = np.random.default_rng(8)
    index, splits = rng.integers(0, 7, 40).astype(np.int32), np.array([0, 5, 5, 30, 40])
    attributes = rng.integers(0, 100, (40, *shape)).astype(dtype)
    query = np.repeat(np.arange(4), np.diff(splits))
    order = np.argsort(index, kind="stable")
    result = ops.invert_neighbors_list(8, *tensors(index, splits, attributes))
    np.testing.assert_array_equal(result.neighbors_index, query[order])
    np.testing.assert_array_equal(result.neighbors_row_splits, np.searchsorted(index[order], np.arange(9)))
    assert_same_bits(result.neighbors_attributes.numpy(), attributes[order])
    assert result.neighbors_index.dtype == torch.int32
    none = ops.invert_neighbors_list(8, *tensors(index, splits, attributes[:0]))
    assert none.neighbors_attributes.shape == (0, *shape) and torch.equal(none.neighbors_index, result.neighbors_index)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_reduce_subarrays_sum(dtype):
    values, splits = np.array([2, 3, 4, 2**30, 2**30], dtype), np.array([0, 2, 2, 4, 5])
    sums = ops.reduce_subarrays_sum(*tensors(values, splits))
    assert_same_bits(sums.numpy(), np.array([5, 0, 2**30 + 4, 2**30], dtype))
    assert ops.reduce_subarrays_sum(*tensors(values, splits[:3])).tolist() == [5, 0]
    empty = ops.reduce_subarrays_sum(*tensors(values[:0], splits))
    assert empty.shape == (0,) and empty.dtype == sums.dtype


def test_sums_of_integers_wrap_around():
    values = torch.full((3,), 2**30, dtype=torch.int32)
    assert ops.reduce_subarrays_sum(values, torch.tensor([0, 3])).tolist() == [3 * 2**30 - 2**32]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_ragged_to_dense(shape, length):
    values = np.random.default_rng(9).integers(0, 99, (12, *shape)).astype(np.int16)
    splits, default = np.array([0, 2, 2, 9, 12]), np.full(shape, -1, np.int16)
    expected = np.full((4, length, *shape), -1, np.int16)
    for row, (begin, end) in enumerate(itertools.pairwise(splits)):
        cut = values[begin:end][:length]
        expected[row, : len(cut)] = cut
    assert_same_bits(ops.ragged_to_dense(*tensors(values, splits), length, torch.from_numpy(default)).numpy(), expected)


def test_ragged_to_dense_of_nothing():
    dense = ops.ragged_to_dense(torch.zeros(0, 2), torch.tensor([0, 0, 0]), 3, torch.tensor([1.0, 2.0]))
    assert dense.tolist() == [[[1, 2]] * 3] * 2


def test_gradients_of_lists():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    index, splits = torch.tensor([0, 2, 1, 0, 2, 2], dtype=torch.int32), torch.tensor([0, 2, 2, 6])
    assert gradcheck(lambda v: ops.invert_neighbors_list(3, index, splits, v).neighbors_attributes, values)
    assert gradcheck(lambda v: ops.reduce_subarrays_sum(v, splits), values)
    assert gradcheck(lambda v: ops.ragged_to_dense(v, splits, 3, torch.tensor(0.0, dtype=torch.float64)), values)


# ---- voxels


def voxels_by_item(points, splits, size, low, high, most_points, most_voxels):
    """[{voxel: its points}, ...], one for each batch item, sorted by the last coordinate first."""
    coords = ((points - low) * (1 / size)).astype(int)
    items = []
    for begin, end in itertools.pairwise(splits):
        voxels = {}
        for number in range(begin, end):
            if (points[number] >= low).all() and (points[number] <= high).all():
                voxels.setdefault(tuple(coords[number].tolist()), []).append(number)
        keys = sorted(voxels, key=lambda key: key[::-1])[:most_voxels]
        items.append({key: voxels[key][:most_points] for key in keys})
    return items


@DTYPES
@pytest.mark.parametrize("dimension", [1, 2, 3, 8])
@pytest.mark.parametrize("limits", [(), (2, 5), (0, 3), (3, 0)])
def test_voxelize(dtype, dimension, limits):
    """Integer coordinates put points on points_range_min and points_range_max."""
    rng = np.random.default_rng(10)
    points = np.concatenate([rng.integers(0, 5, (80, dimension)), rng.uniform(-1, 5, (70, dimension))]).astype(dtype)
    size, low, high = (np.full(dimension, value, dtype) for value in (1, 0, 4))
    result = ops.voxelize(*tensors(points, SPLITS[0], size, low, high), *limits)
    expected = voxels_by_item(points, SPLITS[0], size, low, high, *(limits or (999, 999)))
    assert any(4 in voxel for item in expected for voxel in item) or limits
    coords = [voxel for item in expected for voxel in item]
    indices = [voxel for item in expected for voxel in item.values()]
    np.testing.assert_array_equal(result.voxel_coords, np.reshape(coords, (-1, dimension)))
    np.testing.assert_array_equal(result.voxel_point_indices, np.concatenate([[], *indices]))
    np.testing.assert_array_equal(result.voxel_point_row_splits, np.cumsum([0, *map(len, indices)]))
    np.testing.assert_array_equal(result.voxel_batch_splits, np.cumsum([0, *map(len, expected)]))
    assert [part.dtype for part in result] == [torch.int32, torch.int64, torch.int64, torch.int64]


def test_voxelize_keeps_the_end_of_the_range_apart():
    points = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    result = ops.voxelize(points, torch.tensor([0, 2]), torch.ones(2), torch.zeros(2), torch.full((2,), 2.0))
    assert result.voxel_coords.tolist() == [[2, 0], [0, 1]] and result.voxel_point_row_splits.tolist() == [0, 1, 2]


def test_more_voxels_than_64_bits_can_number():
    """10**7 voxels along each of 8 axes: the numbers of voxels are 186 bits long."""
    points = np.random.default_rng(11).integers(0, 3, (200, 8)) * np.float64(4999999) + 0.5
    low, high, size = np.zeros(8), np.full(8, 1e7), np.ones(8)
    result = ops.voxelize(*tensors(points, np.array([0, 200]), size, low, high))
    expected = voxels_by_item(points, [0, 200], size, low, high, 999, 999)[0]
    np.testing.assert_array_equal(result.voxel_coords, list(expected))
    np.testing.assert_array_equal(result.voxel_point_indices, np.concatenate(list(expected.values())))


def pooled(positions, features, size, position_fn, feature_fn):
    """The voxel pooling of NumPy arrays, in float64 for floats."""
    scaled = np.floor(positions * (1 / positions.dtype.type(size)))
    center = scaled * positions.dtype.type(size) + positions.dtype.type(size) / 2
    voxels = {}
    for number, key in enumerate(map(tuple, scaled[:, ::-1].tolist())):
        voxels.setdefault(key, []).append(number)
    out_positions, out_features = [], []
    for _, rows in sorted(voxels.items()):
        nearest = rows[np.argmin(measures(positions[rows], center[rows[:1]], "L2"))]
        out_positions.append({"average": positions[rows].mean(0, np.float64), "center": center[rows[0]],
                              "nearest_neighbor": positions[nearest]}[position_fn])  # fmt: skip
        part = features[rows]
        mean = np.trunc(part.sum(0) / len(rows)) if features.dtype.kind == "i" else part.mean(0, np.float64)
        out_features.append({"average": mean, "max": part.max(0), "nearest_neighbor": features[nearest]}[feature_fn])
    return np.array(out_positions), np.array(out_features)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("position_fn", ["average", "nearest_neighbor", "center"])
@pytest.mark.parametrize("feature_fn", ["average", "nearest_neighbor", "max"])
def test_voxel_pooling(dtype, position_fn, feature_fn):
    positions = cloud(300, 12, np.float64 if dtype == np.float32 else np.float32)
    features = (100 * np.random.default_rng(13).normal(size=(300, 4)) - 150).astype(dtype)  # most are negative
    result = ops.voxel_pooling(*tensors(positions, features), 0.8, position_fn, feature_fn)
    expected = pooled(positions, features, 0.8, position_fn, feature_fn)
    assert result.pooled_positions.numpy().dtype == positions.dtype and result.pooled_features.numpy().dtype == dtype
    np.testing.assert_allclose(result.pooled_positions, expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(result.pooled_features, expected[1], rtol=1e-6)


@pytest.mark.parametrize("feature_fn", ["average", "nearest_neighbor", "max"])
@pytest.mark.parametrize("position_fn", ["average", "nearest_neighbor", "center"])
def test_gradient_of_voxel_pooling(position_fn, feature_fn):
    (positions,) = tensors(lattice(40, np.float32, 14))  # averages of points on the faces of voxels
    features = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda f: ops.voxel_pooling(positions, f, 0.2, position_fn, feature_fn).pooled_features, features)


def test_voxel_pooling_of_nothing():
    for features in (torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32)):
        for feature_fn in ("average", "nearest_neighbor", "max"):
            result = ops.voxel_pooling(torch.zeros(0, 3), features, 1.0, "average", feature_fn)
            assert [part.shape for part in result] == [(0, 3), (0, 2)]


# ---- batches of clouds


def batch(dtype, num, seed):
    """(3, num, 3): a random cloud, a lattice, and one of two places only."""
    places = np.random.default_rng(seed).integers(0, 2, num)[:, None] * np.ones(3)
    return np.stack([cloud(num, seed, dtype) / 3, lattice(num, dtype, seed), places.astype(dtype)])


@DTYPES
@pytest.mark.parametrize("num", [1, 20, 70])
def test_furthest_point_sampling(dtype, num):
    points = batch(dtype, 50, 15)
    expected = np.zeros((3, num), int)
    for item, cloud_of_item in enumerate(points):
        distance = np.full(50, np.inf)
        for step in range(1, num):
            last = cloud_of_item[expected[item, step - 1]][None]
            distance = np.minimum(distance, measures(cloud_of_item, last, "L2")[0])
            expected[item, step] = np.argmax(distance)
    index = ops.furthest_point_sampling(*tensors(points), num)
    assert index.dtype == torch.int32
    np.testing.assert_array_equal(index, expected)


@DTYPES
@pytest.mark.parametrize("nsample", [1, 4, 60])
def test_ball_query_is_strict(dtype, nsample):
    xyz, center, radius = batch(dtype, 50, 16), batch(dtype, 30, 17), float(dtype(0.1) * dtype(2))
    center[0, 3] += 100  # no point is near
    expected, at_radius = np.zeros((3, 30, nsample), int), 0
    for item in range(3):
        within, bound = measures(xyz[item], center[item], "L2"), dtype(radius) * dtype(radius)
        at_radius += (within == bound).sum()
        for number, row in enumerate(within < bound):
            hits = row.nonzero()[0][:nsample]
            expected[item, number] = hits[0] if len(hits) else 0
            expected[item, number, : len(hits)] = hits
    assert at_radius > 10
    index = ops.ball_query(*tensors(xyz, center), radius, nsample)
    assert index.dtype == torch.int32
    np.testing.assert_array_equal(index, expected)


@DTYPES
@pytest.mark.parametrize("num", [50, 2, 0])
def test_three_nn(dtype, num):
    query, data = batch(dtype, 30, 18), batch(dtype, 50, 19)[:, :num]
    distance, index = ops.three_nn(*tensors(query, data))
    within = np.stack([measures(*pair, "L2") for pair in zip(data, query, strict=True)])
    order = np.argsort(within, kind="stable")[..., :3]
    expected = np.full((3, 30, 3), np.finfo(dtype).max, dtype)
    expected[..., : min(num, 3)] = np.take_along_axis(within, order, 2)
    assert_same_bits(distance.numpy(), expected)
    np.testing.assert_array_equal(index, np.pad(order, [(0, 0), (0, 0), (0, 3 - min(num, 3))]))
    assert index.dtype == torch.int32


def interpolation(seed=20, num_points=6):
    rng = np.random.default_rng(seed)
    points, index, weights = rng.normal(size=(2, 4, num_points)), rng.integers(0, 5, (2, 7, 3)), rng.random((2, 7, 3))
    return tensors(points, index.astype(np.int32), weights)


def test_three_interpolate():
    points, index, weights = interpolation()
    sums = ops.three_interpolate(points, index, weights)
    expected = np.einsum("bcnk,bnk->bcn", np.stack([p[:, i] for p, i in zip(points, index, strict=True)]), weights)
    np.testing.assert_allclose(sums, expected, rtol=1e-13)
    points.requires_grad_(), weights.requires_grad_()
    assert gradcheck(lambda p, w: ops.three_interpolate(p, index, w), (points, weights))
    grad = torch.randn(2, 4, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad(ops.three_interpolate(points, index, weights), points, grad)
    np.testing.assert_allclose(ops.three_interpolate_grad(grad, index, weights, 6).detach(), expected, rtol=1e-13)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_trilinear_devoxelize(r):
    """torch's grid_sample has its coordinates in the opposite order, from -1 to 1."""
    rng = np.random.default_rng(21)
    coords = np.concatenate([rng.uniform(0, r - 1, (2, 3, 20)), rng.integers(0, r, (2, 3, 9))], 2)
    coords, features = tensors(coords, rng.normal(size=(2, 4, r, r, r)))
    features.requires_grad_()
    grid = (2 * coords / max(r - 1, 1) - 1).flip(1).transpose(1, 2)[:, :, None, None]
    expected = torch.nn.functional.grid_sample(features, grid, align_corners=True)[..., 0, 0]
    outs, inds, wgts = ops.trilinear_devoxelize_forward(r, True, coords, features)
    torch.testing.assert_close(outs, expected, rtol=1e-12, atol=1e-12)
    assert inds.shape == wgts.shape == (2, 8, 29) and inds.dtype == torch.int32
    assert int(inds.min()) >= 0 and int(inds.max()) < r**3
    grad = torch.randn_like(outs)
    (expected,) = torch.autograd.grad(expected, features, grad)
    torch.testing.assert_close(torch.autograd.grad(outs, features, grad)[0], expected, rtol=1e-12, atol=1e-12)
    backward = ops.trilinear_devoxelize_backward(grad, inds, wgts, r)
    torch.testing.assert_close(backward, expected.flatten(2), rtol=1e-12, atol=1e-12)
    brief = ops.trilinear_devoxelize(coords, features, r, False)
    assert torch.equal(brief[0], outs) and brief[1].shape == brief[2].shape == (1,)


# ---- RaggedTensor


def ragged(values=None, splits=(0, 2, 2, 5)):
    values = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]) if values is None else values
    return ops.RaggedTensor.from_row_splits(values, torch.tensor(splits))


def test_ragged_tensor():
    values = torch.arange(10.0).view(5, 2)
    r = ragged(values)
    assert (r.shape, len(r), r.dtype, r.device) == ([3, None, 2], 3, torch.float32, torch.device("cpu"))
    for number, (begin, end) in enumerate([(0, 2), (2, 2), (2, 5)]):
        assert torch.equal(r[number], values[begin:end]) and torch.equal(r[number - 3], values[begin:end])
        assert torch.equal(r.to_list()[number], values[begin:end])
    assert len(r.to_list()) == 3
    with pytest.raises(IndexError):
        r[3]
    from_lists = ops.RaggedTensor.from_row_splits([1, 2, 3], [0, 1, 3])
    assert from_lists.dtype == torch.float64 and from_lists[1].tolist() == [2, 3]
    assert ops.RaggedTensor.from_row_splits(np.arange(3), np.array([0, 3]))[0].tolist() == [0, 1, 2]


def test_ragged_tensor_copies_tensors():
    values, splits = torch.zeros(3), torch.tensor([0, 1, 3])
    copied = ops.RaggedTensor.from_row_splits(values, splits)
    shared = ops.RaggedTensor.from_row_splits(values, splits, copy=False)
    cloned = shared.clone()
    values += 1
    assert [r.values.tolist() for r in (copied, shared, cloned)] == [[0] * 3, [1] * 3, [0] * 3]


@pytest.mark.parametrize("operator", ["add", "sub", "mul", "truediv", "floordiv"])
@pytest.mark.parametrize("other", [2, 0.5, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "ragged"])
def test_ragged_arithmetic(operator, other):
    other = ragged(torch.full((5,), 2.0)) if other == "ragged" else other
    r, values = ragged(), ragged().values
    operand = other.values if isinstance(other, ops.RaggedTensor) else other
    result = getattr(r, f"__{operator}__")(other)
    expected = getattr(values, f"__{operator}__")(operand)
    assert torch.equal(result.values, expected) and result.dtype == torch.float32
    assert torch.equal(r.values, values) and torch.equal(result.row_splits, r.row_splits)
    before = r.values
    assert getattr(r, f"__i{operator}__")(other) is r and r.values is before and torch.equal(before, expected)


def test_ragged_gradient():
    r = ragged()
    r.requires_grad = True
    assert r.requires_grad
    (r * r).values.sum().backward()
    assert torch.equal(r.values.grad, 2 * r.values)


def test_ragged_concat():
    rows, items = ragged(torch.arange(5)[:, None]), ragged(torch.arange(3)[:, None], (0, 1, 3))
    assert rows.concat(rows, 1).values.tolist() == [[i, i] for i in range(5)]
    assert [item.flatten().tolist() for item in rows.concat(items, 0).to_list()] == [[0, 1], [], [2, 3, 4], [0], [1, 2]]


# ---- errors

POINTS, INT = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int32)
LONG = torch.tensor([0, 4])
ERRORS = {
    "points: invalid shape, expected (num_points, 3), got (4, 2)":
        lambda: ops.knn_search(POINTS[:, :2], POINTS, 1, LONG, LONG),
    "queries: expected float32, got float64": lambda: ops.knn_search(POINTS, POINTS.double(), 1, LONG, LONG),
    "points: expected float32 or float64, got float16": lambda: ops.knn_search(POINTS.half(), POINTS, 1, LONG, LONG),
    "points_row_splits: expected int64, got int32": lambda: ops.knn_search(POINTS, POINTS, 1, LONG.int(), LONG),
    "queries_row_splits: expected values from 0 to 4 to match queries, got from 0 to 3":
        lambda: ops.knn_search(POINTS, POINTS, 1, LONG, torch.tensor([0, 3])),
    "queries_row_splits: invalid shape, expected (2,) to match points_row_splits, got (3,)":
        lambda: ops.knn_search(POINTS, POINTS, 1, LONG, torch.tensor([0, 3, 4])),
    "metric: expected 'L1' or 'L2' or 'Linf', got 'l2'":
        lambda: ops.knn_search(POINTS, POINTS, 1, LONG, LONG, metric="l2"),
    "index_dtype: expected torch.int32 or torch.int64, got torch.int16":
        lambda: ops.knn_search(POINTS, POINTS, 1, LONG, LONG, torch.int16),
    "radii: invalid shape, expected (4,) to match queries, got (3,)":
        lambda: ops.radius_search(POINTS, POINTS, torch.ones(3), LONG, LONG),
    "radii: expected numbers above zero, got -1.0 in row 2":
        lambda: ops.radius_search(POINTS, POINTS, torch.tensor([1.0, 2.0, -1.0, 0.0]), LONG, LONG),
    "radius: expected a finite number above zero, got 0.0":
        lambda: ops.build_spatial_hash_table(POINTS, 0, LONG, 1.0),
    "hash_table_index: invalid shape, expected (4,) to match points, got (3,)":
        lambda: ops.fixed_radius_search(POINTS, POINTS, 1.0, LONG, LONG, LONG.int(), INT[:3], INT),
    "hash_table_splits: invalid shape, expected (2,) to match points_row_splits, got (4,)":
        lambda: ops.fixed_radius_search(POINTS, POINTS, 1.0, LONG, LONG, INT, INT, INT),
    "hash_table_cell_splits: expected int32, got int64":
        lambda: ops.fixed_radius_search(POINTS, POINTS, 1.0, LONG, LONG, LONG.int(), INT, LONG),
    "inp_neighbors_attributes: invalid shape, expected (4, ...) to match inp_neighbors_index, got (3,)":
        lambda: ops.invert_neighbors_list(1, INT, LONG, torch.zeros(3)),
    "inp_neighbors_index: expected values from 0 to 4 to match num_points, got 5":
        lambda: ops.invert_neighbors_list(5, INT + 5, LONG, torch.zeros(0)),
    "inp_neighbors_row_splits: expected values from 0 to 4 to match inp_neighbors_index, got from 0 to 5":
        lambda: ops.invert_neighbors_list(5, INT, torch.tensor([0, 5]), torch.zeros(0)),
    "row_splits: expected values from 0 to 4 to match values, got from 0 to 5":
        lambda: ops.reduce_subarrays_sum(torch.zeros(4), torch.tensor([0, 5])),
    "default_value: invalid shape, expected (3,), got ()":
        lambda: ops.ragged_to_dense(POINTS, LONG, 2, torch.tensor(0.0)),
    "voxel_size: expected numbers above zero, got [1.0, 1.0, 0.0]":
        lambda: ops.voxelize(POINTS, LONG, torch.tensor([1.0, 1.0, 0.0]), POINTS[0], POINTS[0]),
    "voxel_size: expected finite points and at most 2**31 voxels from the origin to a point, got nan":
        lambda: ops.voxel_pooling(POINTS / 0, POINTS, 1.0),
    "position_fn: expected 'average' or 'nearest_neighbor' or 'center', got 'max'":
        lambda: ops.voxel_pooling(POINTS, POINTS, 1.0, "max"),
    "points: expected (B, N, 3) with N of at least 1, got N = 0":
        lambda: ops.furthest_point_sampling(torch.zeros(2, 0, 3), 1),
    "center: invalid shape, expected (1, M, 3) to match xyz, got (2, 4, 3)":
        lambda: ops.ball_query(POINTS[None], POINTS.expand(2, 4, 3), 1.0, 2),
    "idx: expected values from 0 to 3 to match points, got -1":
        lambda: ops.three_interpolate(torch.zeros(1, 2, 4), INT[:3].view(1, 1, 3) - 1, torch.zeros(1, 1, 3)),
    "coords: expected numbers from 0 to r - 1 = 1, got 0.0 to 1.5":
        lambda: ops.trilinear_devoxelize_forward(2, True, torch.tensor([[[0.0], [1.5], [1.0]]]),
                                                 torch.zeros(1, 1, 2, 2, 2)),
    "RaggedTensor: expected a call of RaggedTensor.from_row_splits, got one of the class":
        lambda: ops.RaggedTensor(POINTS, LONG),
    "row_splits: expected values from 0 to 5 to match values, got from 0 to 4": lambda: ragged(splits=(0, 4)),
    "other: expected row_splits [0, 2, 2, 5], got [0, 5]": lambda: ragged() + ragged(splits=(0, 5)),
    "xyz: expected a torch tensor, got ndarray; convert it with torch.from_numpy":
        lambda: ops.ball_query(np.zeros((1, 4, 3)), POINTS[None], 1.0, 2),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ERRORS[message]()
    assert str(error.value) == message


def test_detection_is_not_here():
    for function in (ops.nms, ops.roi_pool):
        with pytest.raises(NotImplementedError, match=f"^{function.__name__}: detection, not here"):
            function(*[None] * len(inspect.signature(function).parameters))


# ---- Open3D itself


@pytest.fixture(scope="module")
def open3d():
    """torch.ops.open3d, without importing open3d, which needs graphics libraries."""
    spec = importlib.util.find_spec("open3d")
    if spec is None:
        pytest.skip("open3d is not installed (pip install open3d-cpu); this compares with its operators")
    library = Path(spec.submodule_search_locations[0]) / "open3d_torch_ops.so"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        pytest.skip(f"open3d's operators cannot be loaded with torch {torch.__version__}: {error.__cause__ or error}")
    return torch.ops.open3d


def test_names_and_signatures(open3d):
    schemas = {s.name[8:]: s for s in torch._C._jit_get_all_schemas() if s.name.startswith("open3d::")}
    for name in schemas:
        parameters = inspect.signature(getattr(ops, name)).parameters.values()
        expected = [(a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty)
                    for a in schemas[name].arguments]  # fmt: skip
        assert [(p.name, p.default) for p in parameters] == expected, name
    assert len(schemas) == 22


def sorted_rows(result):
    """(index, row_splits, distance) with the neighbours of a query in the order of their indices."""
    index, splits, distance = result
    query = torch.repeat_interleave(torch.arange(len(splits) - 1), torch.diff(splits))
    order = torch.argsort(query * (int(index.max()) + 1) + index)
    return index[order], splits, distance[order]


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ignore", [False, True])
def test_searches_of_open3d(open3d, dtype, metric, ignore):
    points = cloud(150, 30, dtype)
    p, q, ps, qs = tensors(points, np.concatenate([points[:60], cloud(40, 31, dtype)]), *SPLITS)
    table, other = ops.build_spatial_hash_table(p, 0.7, ps, 0.3), open3d.build_spatial_hash_table(p, 0.7, ps, 0.3)
    assert torch.equal(table[1], other[1]) and torch.equal(table[2], other[2])
    assert all(a.dtype == b.dtype for a, b in zip(table, other, strict=True))
    searches = [("fixed_radius_search", (0.7, ps, qs, table[2], table[0], table[1], 4))]
    if metric != "Linf":
        r = torch.rand(100, dtype=p.dtype) + 0.2
        searches += [("radius_search", (r, ps, qs, 3)), ("knn_search", (7, ps, qs, 4))]
    for name, arguments in searches:
        got = getattr(ops, name)(p, q, *arguments, metric, ignore, True)
        expected = getattr(open3d, name)(p, q, *arguments, metric, ignore, True)
        for left, right in zip(sorted_rows(got), sorted_rows(expected), strict=True):
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=4 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("metric", ["L1", "L2"])
def test_strictness_of_open3d(open3d, metric):
    p, q, ps, qs = tensors(lattice(150, np.float32, 2), lattice(100, np.float32, 3), *SPLITS)
    r = torch.randint(1, 4, (100,)).float() * 0.1
    got, expected = (m.radius_search(p, q, r, ps, qs, 3, metric, False, True) for m in (ops, open3d))
    for left, right in zip(sorted_rows(got), sorted_rows(expected), strict=True):
        assert torch.equal(left, right)


def assert_equal_results(got, expected):
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)


def test_batches_of_open3d(open3d):
    xyz, center = tensors(batch(np.float32, 50, 16), batch(np.float32, 30, 17))
    for num in (1, 20, 70):
        got = ops.furthest_point_sampling(xyz, num)  # Open3D's threads race: 11 of 3000 calls gave other points
        assert any(torch.equal(got, open3d.furthest_point_sampling(xyz, num)) for _ in range(50))
    for data in (xyz, xyz[:, :2].contiguous(), xyz[:, :0].contiguous()):
        assert_equal_results(ops.three_nn(center, data), open3d.three_nn(center, data))
    assert_equal_results([ops.ball_query(xyz, center, 0.2, 4)], [open3d.ball_query(xyz, center, 0.2, 4)])
    points, index, weights = interpolation()
    arguments = points.float(), index, weights.float()
    torch.testing.assert_close(ops.three_interpolate(*arguments), open3d.three_interpolate(*arguments))
    arguments = torch.randn(2, 4, 7), index, weights.float(), 6
    torch.testing.assert_close(ops.three_interpolate_grad(*arguments), open3d.three_interpolate_grad(*arguments))


@pytest.mark.parametrize("dimension", [1, 2, 3, 8])
@pytest.mark.parametrize("limits", [(), (2, 40), (0, 3)])
def test_voxels_of_open3d(open3d, dimension, limits):
    points = np.random.default_rng(32).uniform(0, 2, (150, dimension)).astype(np.float32)
    ends = (np.full(dimension, value, np.float32) for value in (0.3, 0.2, 1.7))
    arguments = *tensors(points, SPLITS[0], *ends), *limits
    assert_equal_results(ops.voxelize(*arguments), open3d.voxelize(*arguments))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("feature_fn", ["average", "nearest_neighbor", "max"])
@pytest.mark.parametrize("position_fn", ["average", "nearest_neighbor", "center"])
def test_voxel_pooling_of_open3d(open3d, dtype, position_fn, feature_fn):
    positions, features = tensors(cloud(300, 33), np.random.default_rng(34).uniform(0, 99, (300, 4)).astype(dtype))
    got, expected = (m.voxel_pooling(positions, features, 0.8, position_fn, feature_fn) for m in (ops, open3d))
    voxels = torch.floor(open3d.voxel_pooling(positions, features, 0.8, "nearest_neighbor")[0] / 0.8)
    order = np.lexsort(voxels.numpy().T)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right[order])


def test_lists_of_open3d(open3d):
    values, splits = torch.randint(0, 99, (40,)), torch.tensor([0, 5, 5, 30, 40])
    assert_equal_results([ops.reduce_subarrays_sum(values, splits)], [open3d.reduce_subarrays_sum(values, splits)])
    default = torch.tensor(-1)
    got, expected = (m.ragged_to_dense(values, splits, 7, default) for m in (ops, open3d))
    assert_equal_results([got], [expected])
    index = torch.randint(0, 7, (40,), dtype=torch.int32)
    got, expected = (sorted_rows(m.invert_neighbors_list(8, index, splits, values)) for m in (ops, open3d))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    # A query that is there twice in a row may have its two attributes in either order.
    assert torch.equal(got[2].sort()[0], expected[2].sort()[0])

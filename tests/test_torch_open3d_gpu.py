"""kpcore.compat.open3d on a GPU, or on tensors of the host standing for one as in test_torch_gpu."""

import numpy as np
import pytest
import test_compat_open3d as cases
import test_compat_open3d_convolutions as convolutions

torch = pytest.importorskip("torch")
from test_torch_gpu import REAL, device, place  # noqa: E402, F401 - device is a fixture of every test

from kpcore.compat import open3d as ops  # noqa: E402

pytestmark = pytest.mark.gpu


def results(place):
    """What every function returns, for arguments made by `place` from arrays; the row_splits are on the CPU."""
    rng = np.random.default_rng(0)
    points, queries = place(cases.lattice(150, np.float32, 1)), place(cases.lattice(100, np.float32, 2))
    splits, bounds = cases.tensors(*cases.SPLITS), {"return_distances": True}
    table = ops.build_spatial_hash_table(points, 0.2, splits[0], 0.2)
    yield from table
    hashed = table.hash_table_splits, table.hash_table_index, table.hash_table_cell_splits
    yield from ops.fixed_radius_search(points, queries, 0.2, *splits, *hashed, **bounds)
    yield from ops.radius_search(points, queries, place(np.full(100, 0.2, np.float32)), *splits, **bounds)
    yield from ops.knn_search(points, queries, 5, *splits, ignore_query_point=True, **bounds)

    index, values = place(rng.integers(0, 7, 40).astype(np.int32)), place(rng.random((40, 2)))
    (rows,) = cases.tensors(np.array([0, 5, 5, 40]))
    yield from ops.invert_neighbors_list(8, index, rows, values)
    yield from (ops.reduce_subarrays_sum(v, rows) for v in (values[:, 0], index))
    yield ops.ragged_to_dense(values, rows, 4, place(np.zeros(2)))
    ragged = ops.RaggedTensor.from_row_splits(values, rows) * 2
    yield from (ragged.values, ragged.row_splits, ragged[0])

    ends = (place(np.full(3, value, np.float32)) for value in (0.2, -0.3, 0.3))
    yield from ops.voxelize(points, splits[0], *ends, 2, 40)
    for features in (3 * points - 1, (30 * points).to(torch.int32)):
        for functions in (("average", "max"), ("center", "average"), ("nearest_neighbor", "nearest_neighbor")):
            yield from ops.voxel_pooling(points, features, 0.2, *functions)

    xyz, center = place(cases.batch(np.float32, 50, 3)), place(cases.batch(np.float32, 30, 4))
    yield ops.furthest_point_sampling(xyz, 60)
    yield ops.ball_query(xyz, center, 0.2, 5)
    yield from ops.three_nn(center, xyz)
    features, index, weights = (place(a.numpy()) for a in cases.interpolation())
    features.requires_grad_()
    interpolated = ops.three_interpolate(features, index, weights)
    yield interpolated.detach()
    yield torch.autograd.grad(interpolated.sum(), features)[0]
    yield ops.three_interpolate_grad(interpolated.detach(), index, weights, 6)
    coords, grid = place(rng.uniform(0, 2, (2, 3, 20))), place(rng.random((2, 4, 3, 3, 3)))
    outs, corners, weights = ops.trilinear_devoxelize_forward(3, True, coords, grid)
    yield from (outs, corners, weights, ops.trilinear_devoxelize_backward(outs, corners, weights, 3))
    for function in convolutions.FUNCTIONS:
        call = convolutions.random_call(function, 1, dtype=torch.float64)
        call = {name: a if name.endswith("row_splits") else place(a.numpy()) for name, a in call.items()}
        yield from convolutions.results(ops, function, call, {"normalize": True})


def test_results_of_the_cpu(monkeypatch):
    got = [(result.cpu().numpy(), result.is_cuda) for result in results(place)]
    if not REAL:
        monkeypatch.undo()
    expected = [result.numpy() for result in results(lambda array: torch.from_numpy(array.copy()))]
    on_cpu = [number for number, (_, is_cuda) in enumerate(got) if not is_cuda]
    assert on_cpu == ([2] if REAL else list(range(len(expected)))), "hash_table_splits alone are on the CPU"
    for (ours, _), theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)

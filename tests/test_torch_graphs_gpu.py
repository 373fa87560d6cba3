"""kpcore.compat.torch_cluster, pointops and frnn on a GPU, or on tensors of the host standing for one."""

import numpy as np
import pytest
import test_compat_graphs as cases

torch = pytest.importorskip("torch")
from test_torch_gpu import REAL, device, place  # noqa: E402, F401 - device is a fixture of every test

from kpcore.compat import frnn, pointops, torch_cluster  # noqa: E402

pytestmark = pytest.mark.gpu


def results(place):
    """What every function returns, for arguments made by `place` from arrays."""
    points, queries = place(cases.lattice(90, 0)), place(cases.lattice(40, 1))
    batches = [place(cases.batch_vector(lengths)) for lengths in cases.LENGTHS]
    yield torch_cluster.radius(points, queries, 0.5, *batches, 4)
    yield torch_cluster.radius_graph(points, 0.5, batches[0])
    yield torch_cluster.knn(points, queries, 5, *batches)
    yield torch_cluster.knn(points + 0.1, queries + 0.1, 5, *batches, cosine=True)
    yield torch_cluster.knn_graph(points, 3, batches[0], flow="target_to_source")
    yield torch_cluster.nearest(queries[:15], points[:40])
    yield torch_cluster.fps(points, batches[0], 0.3, random_start=False)
    yield torch_cluster.fps(points, None, place(np.float32([0.1])), random_start=False)
    yield torch_cluster.grid_cluster(points, place(np.float32([0.3, 0.4, 0.5])))

    offset, new_offset = (place(np.cumsum(lengths).astype(np.int32)) for lengths in cases.LENGTHS)
    searched = points, offset, queries, new_offset
    yield from pointops.knn_query(25, *searched)
    yield from pointops.ball_query(4, 0.5, 0.25, *searched)
    yield from (part.sort(1)[0] for part in pointops.random_ball_query(90, 0.5, 0.0, *searched))
    yield pointops.farthest_point_sampling(points, offset, place(np.array([7, 7, 37, 37], np.int32)))
    yield pointops.knnquery(25, points, queries, offset, new_offset)[0]
    yield from pointops.query_and_group(4, points, queries, points, None, offset, new_offset, 2)
    feat = place(cases.cloud(90, 2))
    feat.requires_grad_()
    for made in (pointops.knn_query_and_group(feat, *searched, nsample=25, with_xyz=True)[0],
                 pointops.interpolation(points, queries, feat, offset, new_offset)):  # fmt: skip
        yield made.detach()
        yield torch.autograd.grad(made.square().sum(), feat)[0]
    yield from (pointops.offset2batch(offset), pointops.batch2offset(batches[0]))

    clouds = [place(cases.lattice(3 * num, num).reshape(3, num, 3)) for num in (12, 30)]
    lengths = [place(np.array(each)) for each in ([12, 0, 7], [5, 9, 0])]
    for cloud in clouds:
        cloud.requires_grad_()
    for options in ((lengths[0], lengths[1], 4, place(np.float32([0.5, 0.75, 0.5]))), (None, None, 4, 0.5)):
        dists, idxs, nn, grid = frnn.frnn_grid_points(*clouds, *options, return_nn=True)
        yield from (dists.detach(), idxs, nn.detach(), *torch.autograd.grad(dists.sum() + nn.sum(), clouds))
        yield frnn.frnn_grid_points(*clouds, *options, grid=grid)[1]


def test_results_of_the_cpu(monkeypatch):
    got = [(result.cpu().numpy(), result.is_cuda) for result in results(place)]
    assert all(is_cuda == REAL for _, is_cuda in got)
    if not REAL:
        monkeypatch.undo()
    expected = [result.numpy() for result in results(lambda array: torch.from_numpy(array.copy()))]
    for (result, _), of_cpu in zip(got, expected, strict=True):
        assert result.dtype == of_cpu.dtype
        np.testing.assert_allclose(result, of_cpu, rtol=1e-6, atol=1e-6)

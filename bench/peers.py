"""The libraries that kpcore is measured against, each in the fastest form that its public interface offers.

A peer is (name, guard, setup, read). `guard()` imports what the peer needs and raises if that is missing.
`setup(**inputs)` wraps arrays and makes other preparations outside the measured time, and returns the function to time;
building an index is part of that function. `read(result)` converts a result to the NumPy form that the checks use.
run.py sets the number of threads of all of them.
"""

import importlib
import importlib.util
import os
import timeit
from collections import namedtuple
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np

Peer = namedtuple("Peer", "name guard setup read")

SHARED = Path(os.environ.get("KPCORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def missing(peer):
    """The reason why a peer cannot run here, or None."""
    try:
        peer.guard()
    except Exception as error:  # Open3D raises RuntimeError or OSError if its torch ops do not match torch
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def imports(*names):
    return lambda: [importlib.import_module(name) for name in names]


# Fixed-radius search: read() gives (index, row_splits).


def open3d_nns(points, radius):
    """core.nns.NearestNeighborSearch, a kd-tree on the CPU, with its fastest settings: int32 and unsorted."""
    import open3d.core as o3c

    cloud = o3c.Tensor.from_numpy(points)

    def run():
        search = o3c.nns.NearestNeighborSearch(cloud, o3c.int32)
        search.fixed_radius_index(radius)
        return search.fixed_radius_search(cloud, radius, sort=False)

    return run


def open3d_hash(points, radius):
    """ml.torch.layers.FixedRadiusSearch, a hash grid with cells of two radii; its results are unsorted."""
    import open3d.ml.torch as ml
    import torch

    cloud, search = torch.from_numpy(points), ml.layers.FixedRadiusSearch(return_distances=False)
    return lambda: search(cloud, cloud, radius)


def scipy_ball(points, radius):
    from scipy.spatial import cKDTree

    return lambda: cKDTree(points).query_ball_point(points, radius, workers=-1, return_sorted=False)


def read_lists(lists):
    row_splits = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, lists), np.int64, len(lists)), out=row_splits[1:])
    return np.fromiter(chain.from_iterable(lists), np.int32, row_splits[-1]), row_splits


def read_nns(result):
    index, _, row_splits = result
    return index.numpy(), row_splits.numpy()


def read_hash(result):
    return result.neighbors_index.numpy(), result.neighbors_row_splits.numpy()


def scipy_build(points, **_):
    """Only the build of a tree."""
    from scipy.spatial import cKDTree

    return lambda: cKDTree(points)


# k nearest neighbours: read() gives their distances (M, k).


def pykdtree_nearest(points, k):
    from pykdtree.kdtree import KDTree

    return lambda: KDTree(points).query(points, k)


def open3d_nearest(points, k):
    import open3d.core as o3c

    cloud = o3c.Tensor.from_numpy(points)

    def run():
        search = o3c.nns.NearestNeighborSearch(cloud, o3c.int32)
        search.knn_index()
        return search.knn_search(cloud, k)

    return run


def scipy_nearest(points, k):
    from scipy.spatial import cKDTree

    return lambda: cKDTree(points).query(points, k, workers=-1)


# k nearest in the space of features: as above.


def sklearn_nearest(points, k):
    from sklearn.neighbors import NearestNeighbors

    return lambda: NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors(points)


def torch_nearest(points, k):
    """cdist and topk of 2,000 queries at a time: all at once would take 40 GB for 100,000 points."""
    import torch

    cloud = torch.from_numpy(points)

    def run():
        with torch.inference_mode():
            parts = [torch.topk(torch.cdist(queries, cloud), k, largest=False) for queries in cloud.split(2000)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    return run


def product_alone(points, k):
    """Only the product of all queries with all points, 1,000 queries at a time; it finds nothing."""
    slab = np.empty((min(1000, len(points)), len(points)), points.dtype)

    def run():
        for first in range(0, len(points), 1000):
            queries = points[first : first + 1000]
            np.matmul(queries, points.T, out=slab[: len(queries)])

    return run


SKLEARN_KNN = Peer("scikit-learn brute", imports("sklearn.neighbors"), sklearn_nearest, lambda result: result[0])
TORCH_KNN = Peer("torch cdist + topk", imports("torch"), torch_nearest, lambda result: result[0].numpy())
PRODUCT_ALONE = Peer("NumPy X @ X.T", imports("numpy"), product_alone, lambda result: result)
SCIPY_BUILD = Peer("SciPy cKDTree", imports("scipy.spatial"), scipy_build, lambda tree: tree)
PYKDTREE = Peer("pykdtree", imports("pykdtree.kdtree"), pykdtree_nearest, lambda result: result[0])
OPEN3D_KNN = Peer("Open3D nns", imports("open3d.core"), open3d_nearest, lambda result: np.sqrt(result[1].numpy()))
SCIPY_KNN = Peer("SciPy cKDTree", imports("scipy.spatial"), scipy_nearest, lambda result: result[0])
OPEN3D_NNS = Peer("Open3D nns", imports("open3d.core"), open3d_nns, read_nns)
OPEN3D_HASH = Peer("Open3D ml.torch", imports("torch", "open3d.ml.torch"), open3d_hash, read_hash)
SCIPY_BALL = Peer("SciPy cKDTree", imports("scipy.spatial"), scipy_ball, read_lists)


# Voxel grid subsampling: read() gives the barycentres.


def gicp(points, voxel, threads):
    """voxelgrid_sampling; it takes float64, and with two or more threads may split a voxel in two."""
    import small_gicp

    return lambda: small_gicp.voxelgrid_sampling(points, voxel, num_threads=threads)


def open3d_voxel(points, voxel):
    import open3d

    cloud = open3d.t.geometry.PointCloud(open3d.core.Tensor.from_numpy(points))
    return lambda: cloud.voxel_down_sample(voxel)


SMALL_GICP = Peer("small_gicp", imports("small_gicp"), gicp, lambda cloud: np.asarray(cloud.points())[:, :3])
OPEN3D_VOXEL = Peer("Open3D tensor", imports("open3d"), open3d_voxel, lambda cloud: cloud.point.positions.numpy())


# Normals of the k nearest points: read() gives them as an array.


def open3d_normals(points, k):
    import open3d

    positions = open3d.core.Tensor.from_numpy(points)

    def run():
        cloud = open3d.t.geometry.PointCloud(positions)
        cloud.estimate_normals(max_nn=k)
        return cloud

    return run


OPEN3D_NORMALS = Peer("Open3D tensor", imports("open3d"), open3d_normals, lambda cloud: cloud.point.normals.numpy())


# The pyramid: read() gives the number of points of each level and of pairs of each list.


def open3d_pyramid(points, voxel, num_levels, published):
    """Subsampling, neighbours, pools and upsamples by Open3D's ops, which build a new tree for every list.

    If `published`, rows are sorted by distance, and the nearest coarse point is the first of all those within twice the
    radius, as in the published code. Otherwise nothing is sorted, and only the nearest coarse point is searched for.
    """
    import open3d.core as o3c
    from open3d.t.geometry import PointCloud

    def search(cloud, queries, radius):
        nns = o3c.nns.NearestNeighborSearch(cloud, o3c.int32)
        nns.fixed_radius_index(radius)
        return nns.fixed_radius_search(queries, radius, sort=published)

    def nearest(cloud, queries, radius):
        if published:
            index, _, starts = search(cloud, queries, 2 * radius)
            return index[starts[:-1]]
        nns = o3c.nns.NearestNeighborSearch(cloud, o3c.int32)
        nns.knn_index()
        return nns.knn_search(queries, 1)[0]

    def run():
        cloud, sizes = PointCloud(o3c.Tensor.from_numpy(points)), []
        for level in range(num_levels):
            size = voxel * 2**level
            positions, radius = cloud.point.positions, 2.5 * size
            sizes.append([len(positions), len(search(positions, positions, radius)[0])])
            if level + 1 < num_levels:
                coarse = cloud.voxel_down_sample(2 * size)
                sizes[-1].append(len(search(positions, coarse.point.positions, radius)[0]))
                nearest(coarse.point.positions, positions, radius)
                cloud = coarse
        return sizes

    return run


PUBLISHED_PYRAMID, OPEN3D_PYRAMID = (
    Peer(name, imports("open3d"), partial(open3d_pyramid, published=published), lambda sizes: sizes)
    for name, published in (("published steps, Open3D ops", True), ("least steps, Open3D ops", False))
)


# Farthest point sampling: read() gives the index.


def bucket_fps(points, num):
    """bucket_fps_kdline_sampling with the tree height that is fastest for 100,000 points; it takes float32."""
    import fpsample

    return lambda: fpsample.bucket_fps_kdline_sampling(points, num, h=7, start_idx=0)


FPSAMPLE = Peer("fpsample", imports("fpsample"), bucket_fps, np.asarray)


# Pooling over neighbours (M, H): read() gives the output, or the output and the gradient of the features.


def torch_pool(features, index, reduced):
    """Rows gathered into (M, H, C), in the fastest of the three ways that torch has, and reduced.

    Only the forward pass: with its gradient a call takes up to nine seconds, where embedding_bag takes one.
    """
    import torch

    index, features = torch.from_numpy(index).long(), torch.from_numpy(features)
    (m, h), c = index.shape, features.shape[1]
    by_row, flat = index.unsqueeze(2).expand(-1, -1, c), index.flatten()
    forms = [
        lambda f: f[index],
        lambda f: f.index_select(0, flat).view(m, h, c),
        lambda f: f.unsqueeze(1).expand(-1, h, -1).gather(0, by_row),
    ]
    calls = [lambda form=form: getattr(form(features), reduced)(1) for form in forms]
    return min(calls, key=lambda call: min(timeit.repeat(call, number=1, repeat=2)))


def torch_bag(features, index, reduced, grad_out=None):
    """embedding_bag, which gathers and reduces in one operator."""
    import torch

    index, features = torch.from_numpy(index).long(), torch.from_numpy(features)
    bag = partial(torch.nn.functional.embedding_bag, index, mode=reduced)
    if grad_out is None:
        return lambda: bag(features)
    leaf, grad_out = features.requires_grad_(), torch.from_numpy(grad_out)

    def run():
        out = bag(leaf)
        return out, torch.autograd.grad(out, leaf, grad_out)[0]

    return run


def bag_peer(reduced, read):
    return Peer("torch embedding_bag", imports("torch"), partial(torch_bag, reduced=reduced), read)


POOLING = {
    reduced: [
        Peer(f"torch gather + {name}", imports("torch"), partial(torch_pool, reduced=name), lambda out: out.numpy()),
        bag_peer(reduced, lambda out: out.numpy()),
    ]
    for reduced, name in (("max", "amax"), ("mean", "mean"))
}
POOLING_STEP = {
    reduced: bag_peer(reduced, lambda results: [part.detach().numpy() for part in results]) for reduced in POOLING
}


# KPConv: read() gives the output, or (gradient of features, gradient of weights).


def matmul(aggregated, weights):
    """The matrix product alone, without the time of aggregating the neighbourhoods."""
    flat = weights.reshape(aggregated.shape[1], -1)
    return lambda: aggregated @ flat


def open3d_cconv(points, features, filters, extent, index, row_splits, grad_out=None):
    """ml.torch.ops.continuous_conv; with grad_out the gradients of features and filters too."""
    import open3d.ml.torch as ml
    import torch

    points, features, filters = map(torch.from_numpy, (points, features, filters))
    index, row_splits = torch.from_numpy(index.copy()), torch.from_numpy(row_splits.copy())
    empty, extents = torch.empty(0), torch.full((1, 1), float(extent))

    def forward():
        return ml.ops.continuous_conv(
            filters=filters, out_positions=points, extents=extents, offset=torch.zeros(3), inp_positions=points,
            inp_features=features, inp_importance=empty, neighbors_index=index, neighbors_importance=empty,
            neighbors_row_splits=row_splits, align_corners=True, coordinate_mapping="ball_to_cube_radial",
            normalize=False, interpolation="linear",
        )  # fmt: skip

    if grad_out is None:
        return forward
    inputs, grad_out = [features.requires_grad_(), filters.requires_grad_()], torch.from_numpy(grad_out)
    return lambda: torch.autograd.grad(forward(), inputs, grad_out)


def open3d_sparse(coords, features, filters, index, row_splits, kernel_index):
    """ml.torch.ops.sparse_conv with the neighbours and their cells."""
    import open3d.ml.torch as ml
    import torch

    features, filters = map(torch.from_numpy, (features, filters))
    index, row_splits = torch.from_numpy(index.copy()), torch.from_numpy(row_splits.copy())
    cells, empty = torch.from_numpy(kernel_index.astype(np.uint8)), torch.empty(0)
    return lambda: ml.ops.sparse_conv(
        filters=filters, inp_features=features, inp_importance=empty, neighbors_index=index,
        neighbors_kernel_index=cells, neighbors_importance=empty, neighbors_row_splits=row_splits, normalize=False,
    )  # fmt: skip


def open3d_sparse_layer(coords, features, filters):
    """ml.torch.layers.SparseConv: its search, and a continuous convolution with the nearest cell."""
    import open3d.ml.torch as ml
    import torch

    channels = features.shape[1]
    layer = ml.layers.SparseConv(channels, channels, [3, 3, 3], use_bias=False)
    # Its cells are numbered from z, ours from the first axis.
    with torch.no_grad():
        layer.kernel.copy_(torch.from_numpy(filters.reshape(3, 3, 3, channels, channels).transpose(2, 1, 0, 3, 4)))
    features, positions = torch.from_numpy(features), torch.from_numpy(coords.astype(np.float32) + np.float32(0.5))

    def run():
        with torch.no_grad():
            return layer(features, positions, positions, 1.0)

    return run


def spconv_submanifold(coords, features, filters):
    """spconv's SubMConv3d, with its pairs kept under an indice_key."""
    import spconv.pytorch as spconv
    import torch

    channels, low = features.shape[1], coords.min(0)
    indices = np.concatenate([np.zeros((len(coords), 1), np.int32), coords - low], 1)
    shape = (np.ptp(coords, axis=0) + 1).tolist()
    inputs = spconv.SparseConvTensor(torch.from_numpy(features), torch.from_numpy(indices), shape, 1)
    layer = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="pairs")
    with torch.no_grad():  # its weights are (Cout, 3, 3, 3, Cin)
        cells = filters.reshape(3, 3, 3, channels, channels)
        layer.weight.copy_(torch.from_numpy(cells.transpose(4, 0, 1, 2, 3).copy()))
        layer(inputs)

    def run():
        with torch.no_grad():
            return layer(inputs)

    return run


OPEN3D = imports("torch", "open3d.ml.torch")
OPEN3D_CCONV = Peer("Open3D op", OPEN3D, open3d_cconv, lambda out: out.detach().numpy())
OPEN3D_CCONV_STEP = Peer("Open3D op", OPEN3D, open3d_cconv, lambda grads: [grad.numpy() for grad in grads])
OPEN3D_SPARSE = Peer("Open3D op", OPEN3D, open3d_sparse, lambda out: out.numpy())
OPEN3D_SPARSE_LAYER = Peer("Open3D op and search", OPEN3D, open3d_sparse_layer, lambda out: out.numpy())
SPCONV = Peer("spconv", imports("torch", "spconv.pytorch"), spconv_submanifold, lambda out: out.features.numpy())


def dense_module():
    import torch  # noqa: F401 - a missing torch is reported before a missing file

    path = SHARED / "peers" / "dense_kpconv.py"
    if not path.exists():
        raise FileNotFoundError("dense_kpconv.py: set KPCORE_SHARED to the folder that holds peers/dense_kpconv.py")
    spec = importlib.util.spec_from_file_location("dense_kpconv", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense_arguments(points, index, row_splits, features, weights, kernel_points, extent):
    import torch

    module = dense_module()
    points, features, weights, kernel_points = map(torch.from_numpy, (points, features, weights, kernel_points))
    neighbors = module.padded(index, row_splits, len(points))
    return module.kpconv, (points, points, neighbors, features, weights, kernel_points, extent)


def dense_forward(**problem):
    import torch

    kpconv, arguments = dense_arguments(**problem)

    def run():
        with torch.no_grad():
            return kpconv(*arguments)

    return run


def dense_step(grad_out, **problem):
    import torch

    kpconv, arguments = dense_arguments(**problem)
    inputs = [arguments[3].requires_grad_(), arguments[4].requires_grad_()]  # features, weights
    grad_out = torch.from_numpy(grad_out)
    return lambda: torch.autograd.grad(kpconv(*arguments), inputs, grad_out)


def dense_deformable(offset_weights, grad_out, **problem):
    """(the layer as a function of features, weights and weights of the offsets; these three arguments)."""
    import torch

    kpconv, (points, _, neighbors, features, weights, kernel_points, extent) = dense_arguments(**problem)

    def layer(features, weights, offset_weights):
        raw = kpconv(points, points, neighbors, features, offset_weights, kernel_points, extent)
        offsets = (extent * raw).reshape(len(points), -1, 3)
        return kpconv(points, points, neighbors, features, weights, kernel_points, extent, offsets)

    return layer, (features, weights, torch.from_numpy(offset_weights))


def dense_deformable_forward(**problem):
    import torch

    layer, inputs = dense_deformable(**problem)

    def run():
        with torch.no_grad():
            return layer(*inputs)

    return run


def dense_deformable_step(grad_out, **problem):
    import torch

    layer, inputs = dense_deformable(grad_out=grad_out, **problem)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grad_out = torch.from_numpy(grad_out)
    return lambda: torch.autograd.grad(layer(*inputs), inputs, grad_out)


def dense_resampled(kernel_offsets, kernel_extent, **problem):
    """(kpconv with kernel offsets, by an array (M, K, K) of all shares; its arguments features, weights, offsets)."""
    import torch

    module = dense_module()
    _, (points, _, neighbors, features, weights, kernel_points, extent) = dense_arguments(**problem)
    points = torch.cat([points, torch.full_like(points[:1], 1e6)])

    def layer(features, weights, kernel_offsets):
        relative = points[neighbors] - points[:-1].unsqueeze(1)
        distance = (relative.unsqueeze(2) - kernel_points).square().sum(3).sqrt()
        influence = (1 - distance / extent).clamp(min=0).transpose(1, 2)
        features = torch.cat([features, torch.zeros_like(features[:1])])
        sums = influence @ module._gather(features, neighbors)
        apart = (kernel_points + kernel_offsets).unsqueeze(2) - kernel_points
        shares = (1 - apart.square().sum(3).sqrt() / kernel_extent).clamp(min=0)
        mixed = torch.bmm(shares.transpose(1, 2), sums)
        return mixed.flatten(1) @ weights.flatten(0, 1)

    return layer, (features, weights, torch.from_numpy(kernel_offsets))


def dense_resampled_forward(**problem):
    import torch

    layer, inputs = dense_resampled(**problem)

    def run():
        with torch.no_grad():
            return layer(*inputs)

    return run


def dense_resampled_step(grad_out, **problem):
    import torch

    layer, inputs = dense_resampled(**problem)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grad_out = torch.from_numpy(grad_out)
    return lambda: torch.autograd.grad(layer(*inputs), inputs, grad_out)


DENSE_RESAMPLED = Peer("dense torch", dense_module, dense_resampled_forward, lambda out: out.numpy())
DENSE_RESAMPLED_STEP = Peer(
    "dense torch", dense_module, dense_resampled_step, lambda grads: [grad.numpy() for grad in grads]
)
DENSE_DEFORMABLE = Peer("dense torch", dense_module, dense_deformable_forward, lambda out: out.numpy())
DENSE_DEFORMABLE_STEP = Peer(
    "dense torch", dense_module, dense_deformable_step, lambda grads: [grad.numpy() for grad in grads]
)
NUMPY_MATMUL = Peer("NumPy A @ W", imports("numpy"), matmul, np.asarray)
DENSE_FORWARD = Peer("dense torch", dense_module, dense_forward, lambda out: out.numpy())
DENSE_STEP = Peer("dense torch", dense_module, dense_step, lambda grads: [grad.numpy() for grad in grads])


# Of these two, cases only ask whether they are installed.
TORCH = Peer("torch", imports("kpcore.torch"), None, None)
JAX = Peer("JAX", imports("kpcore.jax"), None, None)


def dense_losses(points, index, row_splits, kernel_points, offsets, extent):
    """Both losses of a deformable layer over padded neighbours, and their gradients, as in the published code."""
    import torch

    neighbors = dense_module().padded(index, row_splits, len(points))
    points, kernel_points, offsets = map(torch.from_numpy, (points, kernel_points, offsets))
    offsets.requires_grad_()
    with_padding = torch.cat([points, torch.full_like(points[:1], 1e6)])

    def fitting(deformed):
        relative = with_padding[neighbors] - points.unsqueeze(1)
        squared = (relative.unsqueeze(2) - deformed.unsqueeze(1)).square().sum(3)  # (M, H, K)
        return (squared.min(1).values / extent**2).mean()

    def repulsion(deformed):
        loss, apart = 0, deformed / extent
        for k in range(apart.shape[1]):
            others = torch.cat([apart[:, :k], apart[:, k + 1 :]], 1).detach()
            distance = (others - apart[:, k : k + 1]).square().sum(2).sqrt()
            loss = loss + (distance - 1.2).clamp(max=0).square().sum(1).mean()
        return loss / apart.shape[1]

    def run():
        out = []
        for loss in (fitting, repulsion):
            value = loss(kernel_points + offsets)
            out += [value.detach(), *torch.autograd.grad(value, offsets)]
        return out

    return run


DENSE_LOSSES = Peer("dense torch", dense_module, dense_losses, lambda out: [part.numpy() for part in out])


# Layers on rows: read() gives the output and the gradients.


def torch_batch_norm(features, scale, shift, mean, var, grad):
    import torch
    from torch.nn import functional

    inputs = [torch.from_numpy(a).requires_grad_() for a in (features, scale, shift)]
    mean, var, grad = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy()), torch.from_numpy(grad)

    def run():
        out = functional.batch_norm(inputs[0], mean, var, *inputs[1:], training=True, momentum=0.02)
        out = functional.leaky_relu(out, 0.1, inplace=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return run


def torch_cross_entropy(logits, labels):
    import torch

    logits, labels = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)

    def run():
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return [loss.detach(), *torch.autograd.grad(loss, [logits])]

    return run


def read_tensors(tensors):
    return [tensor.numpy() for tensor in tensors]


TORCH_BATCH_NORM = Peer("torch", imports("torch"), torch_batch_norm, read_tensors)
TORCH_CROSS_ENTROPY = Peer("torch", imports("torch"), torch_cross_entropy, read_tensors)
NUMPY_LINEAR = Peer("NumPy X @ W", imports("numpy"), lambda features, weights: lambda: features @ weights, np.asarray)


# ---- convolutions of images


def image_convolution(formulation, step=False):
    """A function that prepares a convolution of images, a formulation in torch: its result, or with `step` also its
    gradients by x, weight and offsets."""

    def prepare(x, weight, offsets, grad_out, depthwise=False):
        import torch

        primals = [torch.from_numpy(a).requires_grad_(step) for a in (x, weight, offsets)]
        grad_out = torch.from_numpy(grad_out)

        def run():
            out = formulation(torch, *primals, depthwise)
            return [out.detach(), *(torch.autograd.grad(out, primals, grad_out) if step else ())]

        return run

    return prepare


def grid_sampled_kernel(torch, x, weight, offsets, depthwise):
    """A local deformable kernel of 3 x 3 taps: unfold, and grid_sample of the kernel."""
    (batch, channels, height, width), scope = x.shape, weight.shape[-1]
    taps = torch.arange(3, dtype=x.dtype) + (scope - 3) / 2
    grid = torch.stack([taps.repeat_interleave(3), taps.repeat(3)], -1)
    at = (offsets.permute(0, 2, 3, 1).reshape(-1, 9, 2) + grid).clamp(0, scope - 1)
    grid = (at.flip(-1) * 2 / (scope - 1) - 1)[None]
    sampled = torch.nn.functional.grid_sample(weight.reshape(1, -1, scope, scope), grid, align_corners=True)
    sampled = sampled.reshape(channels, batch, height * width, 9).permute(1, 0, 3, 2)
    columns = torch.nn.functional.unfold(x, 3, padding=1).reshape(batch, channels, 9, height * width)
    return (columns * sampled).sum(2).reshape(x.shape)


def hat_weighted_kernel(torch, x, weight, offsets, depthwise):
    """The same as a product of hat weights (positions and taps, cells of the scope) with the kernel, times unfold."""
    (batch, channels, height, width), scope = x.shape, weight.shape[-1]
    taps, cells = torch.arange(3, dtype=x.dtype) + (scope - 3) / 2, torch.arange(scope, dtype=x.dtype)
    grid = torch.stack([taps.repeat_interleave(3), taps.repeat(3)], -1)
    at = (offsets.permute(0, 2, 3, 1).reshape(-1, 9, 2) + grid).clamp(0, scope - 1)
    rows, columns = ((1 - (at[..., axis, None] - cells).abs()).clamp(min=0) for axis in (0, 1))
    hats = (rows[..., :, None] * columns[..., None, :]).reshape(-1, scope**2)
    sampled = (hats @ weight.reshape(channels, -1).T).reshape(batch, height * width, 9, channels)
    unfolded = torch.nn.functional.unfold(x, 3, padding=1).reshape(batch, channels, 9, -1).permute(0, 3, 2, 1)
    return (unfolded * sampled).sum(2).permute(0, 2, 1).reshape(x.shape)


def grid_sampled_image(torch, x, weight, offsets, depthwise):
    """A deformable convolution of 3 x 3 taps: grid_sample of the image, times the kernel."""
    batch, channels, height, width = x.shape
    taps = torch.arange(-1, 2, dtype=x.dtype)
    offsets = offsets.reshape(batch, 9, 2, height, width)
    rows = torch.arange(height, dtype=x.dtype)[:, None] + taps.repeat_interleave(3)[:, None, None] + offsets[:, :, 0]
    columns = torch.arange(width, dtype=x.dtype) + taps.repeat(3)[:, None, None] + offsets[:, :, 1]
    grid = torch.stack([columns * 2 / (width - 1) - 1, rows * 2 / (height - 1) - 1], -1)
    sampled = torch.nn.functional.grid_sample(x, grid.reshape(batch, -1, width, 2), align_corners=True)
    sampled = sampled.reshape(batch, channels, 9, height * width)
    if depthwise:
        return (sampled * weight.reshape(channels, 9, 1)).sum(2).reshape(x.shape)
    kernel = weight.reshape(len(weight), -1)
    return (kernel @ sampled.reshape(batch, -1, height * width)).reshape(batch, -1, height, width)


def plain_convolution(torch, x, weight, offsets, depthwise):
    """torch.nn.functional.conv2d, without offsets."""
    return torch.nn.functional.conv2d(x, weight, padding=1, groups=x.shape[1] if depthwise else 1)


def torchvision_convolution(torch, x, weight, offsets, depthwise):
    from torchvision.ops import deform_conv2d

    return deform_conv2d(x, offsets, weight, padding=1)


def _image_peers(name, formulation, module="torch"):
    """(forward, forward and gradients) of a formulation."""
    return [Peer(name, imports(module), image_convolution(formulation, step), read_tensors) for step in (False, True)]


def grouped_convolution(torch, x, weights, more, depthwise):
    """Convolutions with a kernel for each image, the usual way: a group for each image of one convolution.

    The kernels are mixtures of experts (weights of 5 dimensions; `more`: the routing), or resampled from a larger one
    by a product with hat weights (`more`: the kernel offsets).
    """
    batch, channels, height, width = x.shape
    outputs, scope = weights.shape[-4], weights.shape[-1]
    if weights.ndim == 5:
        kernels = torch.einsum("be,eocuv->bocuv", more, weights)
    else:
        taps, cells = torch.arange(3, dtype=x.dtype) + (scope - 3) / 2, torch.arange(scope, dtype=x.dtype)
        at = (more.reshape(batch, 9, 2) + torch.stack([taps.repeat_interleave(3), taps.repeat(3)], -1)).clamp(
            0, scope - 1
        )
        rows, columns = ((1 - (at[..., axis, None] - cells).abs()).clamp(min=0) for axis in (0, 1))
        hats = (rows[..., :, None] * columns[..., None, :]).reshape(batch, 9, -1)
        kernels = torch.einsum("bks,ocs->bock", hats, weights.reshape(outputs, channels, -1))
    kernels = kernels.reshape(batch * outputs, channels, 3, 3)
    out = torch.nn.functional.conv2d(x.reshape(1, -1, height, width), kernels, padding=1, groups=batch)
    return out.reshape(batch, outputs, height, width)


IMAGE_PEERS = {
    "kernel": [_image_peers("unfold + grid_sample", grid_sampled_kernel),
               _image_peers("unfold + hat weights", hat_weighted_kernel)],
    "data": [_image_peers("grid_sample + product", grid_sampled_image),
             _image_peers("torchvision", torchvision_convolution, "torchvision")],
    "image": [_image_peers("kernels + grouped conv2d", grouped_convolution)],
}  # fmt: skip
TORCH_CONV2D = Peer("torch conv2d", imports("torch"), image_convolution(plain_convolution), read_tensors)


def openblas_core():
    """The kernels that NumPy's OpenBLAS runs ("Haswell", "SkylakeX"), or None without threadpoolctl or OpenBLAS."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return next(
        (
            pool["architecture"]
            for pool in threadpool_info()
            if pool["internal_api"] == "openblas" and "numpy" in pool["filepath"]
        ),
        None,
    )


# Whole networks over dense operators in PyTorch.


def dense_network(pyramid):
    """(operators, pyramid) for a network of `kpcore.nn` over dense operators, with padded neighbour lists."""
    import torch
    from torch.nn import functional

    dense = dense_module()

    def padded(neighbors):
        if neighbors is None:
            return None
        matrix = dense.padded(neighbors.index, neighbors.row_splits, neighbors.num_points)
        return SimpleNamespace(matrix=matrix, stored_index=neighbors.stored_index)

    def kpconv(points, queries, neighbors, features, weights, kernel_points, extent, *, offsets=None,
               modulations=None, influence="linear", aggregation="sum", normalization=None):  # fmt: skip
        assert (influence, aggregation, normalization) == ("linear", "sum", None)
        queries = points if queries is None else queries
        return dense.kpconv(points, queries, neighbors.matrix, features, weights, kernel_points, extent, offsets,
                            modulations)  # fmt: skip

    def batch_norm(features, scale, shift, mean, variance, *, training, momentum, negative_slope):
        mean, variance = mean.clone(), variance.clone()
        out = functional.batch_norm(features, mean, variance, scale, shift, training, momentum, 1e-5)
        return out if negative_slope is None else functional.leaky_relu(out, negative_slope), mean, variance

    def neighbor_reduce(features, neighbors, reduce, pad_value=None, empty=None):
        if reduce == "sum":  # the logits of a head, each at its point
            out = torch.full((neighbors.num_queries, features.shape[1]), empty)
            return out.index_copy(0, torch.from_numpy(neighbors.transpose().index).long(), features)
        assert (reduce, pad_value, empty) == ("max", None, None)
        low = torch.full_like(features[:1], -torch.inf)
        return dense._gather(torch.cat([features, low]), neighbors.matrix).amax(1)

    def nearest_upsample(features, neighbors):
        index = neighbors.matrix[:, 0] if hasattr(neighbors, "matrix") else torch.from_numpy(neighbors.index).long()
        return features[index]

    def segment_reduce(features, row_splits, reduce):
        assert reduce == "mean"
        return torch.stack([item.mean(0) for item in features.split(np.diff(row_splits).tolist())])

    def fitting_loss(points, queries, neighbors, kernel_points, offsets, extent):
        shadow = torch.cat([points, torch.full_like(points[:1], 1e6)])
        relative = shadow[neighbors.matrix] - (points if queries is None else queries).unsqueeze(1)
        squared = (relative.unsqueeze(2) - (kernel_points + offsets).unsqueeze(1)).square().sum(3)
        return (squared.amin(1) / extent**2).mean()

    def repulsion_loss(kernel_points, offsets, extent, *, repulse_extent):
        moved, num = (kernel_points + offsets) / extent, kernel_points.shape[0]
        total = 0
        for k in range(num):
            others = torch.cat([moved[:, :k], moved[:, k + 1 :]], 1).detach()
            distance = (others - moved[:, k : k + 1]).square().sum(2).sqrt()
            total = total + (distance - repulse_extent).clamp(max=0).square().sum(1).mean()
        return total / num

    operators = SimpleNamespace(
        kpconv=kpconv, batch_norm=batch_norm, neighbor_reduce=neighbor_reduce, fitting_loss=fitting_loss,
        repulsion_loss=repulsion_loss, leaky_relu=functional.leaky_relu, add=torch.add, sigmoid=torch.sigmoid,
        linear=lambda x, w, bias=None: x @ w if bias is None else torch.addmm(bias, x, w),
        nearest_upsample=nearest_upsample, segment_reduce=segment_reduce,
        concatenate=lambda *parts: torch.cat(parts, 1), softmax_cross_entropy=functional.cross_entropy,
    )  # fmt: skip
    levels = []
    for level in pyramid:
        lists = {name: padded(getattr(level, name)) for name in ("neighbors", "pools", "upsamples")}
        levels.append(level._replace(points=torch.from_numpy(level.points), **lists))
    return operators, levels


def dense_convolution(args, primals, grad):
    """A function that returns {name: gradient} of the arguments of a convolution that are in `primals`."""
    import torch

    dense = dense_module()
    points, queries, neighbors, features, weights, kernel_points, extent = args
    index = dense.padded(neighbors.index, neighbors.row_splits, neighbors.num_points)
    points, kernel_points, grad = (torch.from_numpy(a) for a in (points, kernel_points, grad))
    queries = points if queries is None else torch.from_numpy(queries)
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in primals.items()}
    arguments = {"features": torch.from_numpy(features), "weights": torch.from_numpy(weights)} | leaves

    def run():
        out = dense.kpconv(points, queries, index, kernel_points=kernel_points, extent=extent, **arguments)
        return dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], grad), strict=True))

    return run


DENSE_NETWORK = Peer("dense torch", dense_module, None, None)

"""Searches, operators and gradients as users write them, which a type checker in strict mode must accept.

It is checked by basedpyright and never run; what `assert_type` states is checked too.
"""

import numpy as np
import torch
from typing_extensions import assert_type

import kpcore as kp
import kpcore.torch as kpt
from kpcore.autodiff import Tensor


def searches(points: np.ndarray, queries: np.ndarray, count_only: bool) -> kp.Neighbors:
    """Lists of neighbours, or only their lengths."""
    nb = kp.radius_search(points, None, 0.5, metric="linf", sort=None, ignore_query_point="index")
    assert_type(nb, kp.Neighbors)
    assert_type(kp.radius_search(points, queries, 0.5, return_distances=True, count_only=False), kp.Neighbors)
    assert_type(kp.radius_search(points, queries, np.ones(3), count_only=True), np.ndarray)
    assert_type(kp.radius_search(points, None, 0.5, count_only=count_only), kp.Neighbors | np.ndarray)
    assert_type(kp.knn_search(points, queries, 3, metric="l1", return_distances=True), kp.Neighbors)
    tree, grid = kp.KDTree(points), kp.GridIndex(points, 0.5, row_splits=kp.row_splits([3, 4]))
    for index in (tree, grid):
        assert_type(index.radius_search(queries, 0.1, inclusive=False, sort="distance", max_neighbors=8), kp.Neighbors)
        assert_type(index.radius_search(queries, 0.1, count_only=True), np.ndarray)
        assert_type(index.knn_search(queries, 3, ignore_query_point=True), kp.Neighbors)
    return nb


def cells(points: np.ndarray, features: np.ndarray, filters: np.ndarray, coords: np.ndarray) -> None:
    """Convolutions with a filter of cells, with an extent that is a number or an array, and over a kernel map."""
    nb = kp.radius_search(points, None, 0.5)
    assert_type(kp.continuous_conv(points, None, nb, features, filters, 1.0), np.ndarray)
    assert_type(kp.continuous_conv(points, None, nb, features, Tensor(filters), np.ones((1, 3))), Tensor)
    assert_type(kp.continuous_conv_transpose(Tensor(points), None, nb, features, filters, 1), Tensor)
    m = kp.kernel_map(coords, kernel_size=3, stride=(2, 2, 1), rule="minkowski")
    assert_type(m.transpose(), kp.KernelMap[np.ndarray])
    out = kp.sparse_conv(m.neighbors, m.kernel_index, Tensor(features), filters, normalize=True)
    assert_type(out, Tensor)
    assert_type(kp.to_dense(m.out_coords, out, [8, 8, 8], m.out_row_splits), Tensor)


def cells_of_tensors(points: torch.Tensor, features: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    """The layers with Open3D's arguments, and those over a kernel map."""
    first = kpt.ContinuousConv(None, 16, [4, 4, 4], window_function=lambda r_sqr: (1 - r_sqr) ** 3)
    m = kpt.kernel_map(coords, kernel_size=3)
    hidden = first(features, points, points, 0.5)
    assert_type(kpt.SubmanifoldConv(16, 8, 3).forward(hidden, m), torch.Tensor)
    return first.regularization()


def lists(points: np.ndarray) -> np.ndarray:
    """What a list of neighbours is and what can be made of it."""
    nb = kp.Neighbors(np.array([0, 1, 1]), kp.row_splits([2, 0, 1]), num_points=2, width=3)
    assert_type(nb.index, np.ndarray)
    assert_type(nb.distance, np.ndarray | None)
    assert_type(nb.num_queries + nb.num_pairs + nb.num_points, int)
    assert_type(nb.width, int | None)
    for other in (nb.transpose(), nb.with_transpose(), nb.with_width(4), nb.to("cpu")):
        assert_type(other, kp.Neighbors)
    assert_type(kp.Neighbors.from_padded(nb.to_padded(4, dtype=np.int64), 2), kp.Neighbors)
    assert_type(kp.Neighbors.from_coo(nb.index, nb.index, 3, 2), kp.Neighbors)
    assert_type(kp.lengths(nb.row_splits), np.ndarray)
    edges = kp.knn_graph(points, 3, row_splits=kp.batch_to_row_splits(nb.index), flow="target_to_source")
    assert_type(kp.Neighbors.from_edge_index(edges, 2), kp.Neighbors)
    assert_type(kp.Neighbors.from_edge_index(nb.edge_index(), 2, return_order=True), tuple[kp.Neighbors, np.ndarray])
    assert_type(kpt.knn_graph(torch.ones(4, 3), 2), torch.Tensor)
    assert_type(kpt.to_sparse(nb, torch.ones(3)), torch.Tensor)
    return points[nb.index]


def convolutions() -> np.ndarray:
    """NumPy's arrays give NumPy's, whatever a type checker knows of the shapes and dtypes that go in."""
    points = np.random.default_rng(0).random((100, 3), np.float32)
    kernel_points = kp.kernel_points([1, 14], 0.13, method="shells", rotate="full", dtype=np.float32)
    assert_type(kernel_points, np.ndarray)
    nb = kp.radius_search(points, None, 0.2)
    features, weights = np.ones((100, 4), np.float32), np.ones((15, 4, 8), np.float32)
    out = kp.kpconv(points, None, nb, features, weights, kernel_points, 0.1, influence="gaussian", groups=1)
    assert_type(out, np.ndarray)
    attention = np.ones((100, 15, 2), np.float32)
    assert_type(kp.kpconvx(points, None, nb, out, out, attention, kernel_points, 0.1), np.ndarray)
    assert_type(kp.neighbor_reduce(features, nb, "max"), np.ndarray)
    assert_type(kp.segment_reduce(kp.gather(features, nb.index), None), np.ndarray)
    assert_type(kp.interpolate(points, None, features, k=1), np.ndarray)
    assert_type(kp.nearest_upsample(features, kp.knn_search(points, points, 1)), np.ndarray)
    offsets = np.zeros((100, 15, 3), np.float32)
    fitting = kp.fitting_loss(points, None, nb, kernel_points, offsets, 0.1)
    print(float(fitting + kp.repulsion_loss(kernel_points, offsets, 0.1)))
    return out


def layers(features: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Layers on rows of features."""
    ones = np.ones(features.shape[1])
    hidden = kp.dropout(kp.leaky_relu(kp.linear(features, weights, bias=None), 0.2), 0.5, seed=1)
    normed = kp.batch_norm(hidden, ones, ones, running_mean=ones, running_var=ones, negative_slope=0.1)
    assert_type(normed, kp.BatchNormed[np.ndarray, np.ndarray])
    both = kp.concatenate(kp.add(normed.features, hidden), kp.group_norm(hidden, 2, ones, ones))
    return kp.softmax_cross_entropy(both, labels, ignore_index=-1, class_weights=normed.running_var, reduction="none")


def subsampling(points: np.ndarray, labels: np.ndarray, features: Tensor) -> np.ndarray:
    """One point of each voxel, points far from each other, and the levels of a network."""
    bare = kp.grid_subsample(points, (0.1, 0.1, 0.2), position="nearest", origin="published")
    assert_type(bare.features, np.ndarray | None)
    sub = kp.grid_subsample(points, 0.1, features=features, labels=labels, feature="max", ignore_label=-1)
    assert_type(sub, kp.Subsampled[Tensor, np.ndarray])
    assert_type(sub.features, Tensor | None)
    chosen = kp.farthest_point_sampling(sub.points, 10, method="exact")
    assert_type(chosen.index, np.ndarray)
    assert_type(kp.farthest_point_sampling(sub.points, min_distance=0.2), kp.Sampled[np.ndarray])
    shape = kp.covariance_features(sub.points, radius=0.2, k=30)
    assert_type(shape, kp.CovarianceFeatures[np.ndarray])
    assert_type(kp.normals(sub.points, k=9, viewpoint=(0, 0, 5)), np.ndarray)
    assert_type(kp.outlier_mask(sub.points, mean_k=9, std_mul=2), np.ndarray)
    limits = kp.calibrate_neighbor_limits([points], voxel_size=0.1, num_levels=3, fraction=0.8)
    pyramid = kp.build_pyramid(points, voxel_size=0.1, num_levels=3, deform_levels=range(2), neighbor_limits=limits)
    assert_type(pyramid, kp.Pyramid)
    for level in pyramid:
        assert_type(level.points, np.ndarray)
        assert_type(level.pools, kp.Neighbors | None)
    points, *_, upsamples = pyramid[0]
    assert_type(upsamples, kp.Neighbors | None)
    return points[sub.inverse]


def gradients(points: np.ndarray, features: np.ndarray, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One Tensor among the arrays makes the result a Tensor; gradients are like what they belong to."""
    nb, kernel_points = kp.knn_search(points, None, 16), kp.kernel_points(15, 0.1)

    def conv(weights: Tensor) -> Tensor:
        out = kp.kpconv(points, None, nb, features, weights, kernel_points, 0.1)
        assert_type(out, Tensor)
        return kp.relu(0.5 * out.reshape(-1, 4)[:, 1:] + out)

    def loss(tensors: dict[str, Tensor], labels: np.ndarray) -> Tensor:
        normed = kp.batch_norm(conv(tensors["weights"]), tensors["scale"], features[0], features[0], features[0])
        assert_type(normed, kp.BatchNormed[Tensor, np.ndarray])
        return kp.softmax_cross_entropy(normed.features, labels)

    def loss_and_more(tensors: dict[str, Tensor], labels: np.ndarray) -> tuple[Tensor, int]:
        return loss(tensors, labels), len(labels)

    out, pullback = kp.autodiff.vjp(conv, params["weights"])
    assert_type(out, np.ndarray)
    assert_type(pullback(np.ones_like(out)), tuple[np.ndarray])
    labels = out.argmax(1)
    value, grads = kp.autodiff.value_and_grad(loss)(params, labels)
    assert_type(value, np.ndarray)
    assert_type(grads, dict[str, np.ndarray])
    assert_type(kp.autodiff.grad(conv)(out), np.ndarray)
    (value, _), grads = kp.autodiff.value_and_grad(loss_and_more, has_aux=True)(params, labels)
    assert_type(grads, dict[str, np.ndarray])
    tensor = Tensor(features)
    moved = kp.kpconv(Tensor(points), None, nb, features, out, kernel_points, 0.1)
    assert_type(moved, Tensor)
    (moved + kp.linear(tensor, out)).backward(out)
    assert_type(tensor.grad, np.ndarray | None)
    assert_type(tensor.ndim, int)
    return grads


def tensors(points: torch.Tensor, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same functions on tensors of PyTorch."""
    kernel_points = kpt.kernel_points(15, 0.1, dtype=torch.float64)
    assert_type(kernel_points, torch.Tensor)
    nb = kpt.radius_search(points, None, 0.2)
    assert_type(nb, kp.Neighbors)
    assert_type(kpt.radius_search(points, None, 0.2, count_only=True), torch.Tensor)
    assert_type(kpt.KDTree(points).radius_search(points, 0.2, count_only=True), torch.Tensor)
    out = kpt.kpconv(points, None, nb, features, weights, kernel_points, 0.1)
    assert_type(out, torch.Tensor)
    normed = kpt.batch_norm(out, out[0], out[0], out[0], out[0])
    assert_type(normed.running_mean, torch.Tensor)
    sub = kpt.grid_subsample(points, 0.1, features=normed.features)
    assert_type(sub.features, torch.Tensor | None)
    assert_type(sub.inverse, torch.Tensor)
    assert_type(kpt.farthest_point_sampling(points, 5).index, torch.Tensor)
    assert_type(kpt.covariance_features(points, viewpoint=points).curvature, torch.Tensor)
    assert_type(kpt.outlier_mask(points, radius=0.1, min_points=4), torch.Tensor)
    assert_type(kpt.build_pyramid(points, voxel_size=0.1, num_levels=2)[0].points, torch.Tensor)
    return kpt.dropout(normed.features, 0.5, seed=torch.tensor(3)).mean()

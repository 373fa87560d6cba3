"""Open3D's operations on batches of clouds of one size, (B, N, 3): those of PointNet++ and of PVCNN."""

from __future__ import annotations

from typing import NamedTuple

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import arguments
from kpcore.compat.open3d_search import measures, pairs
from kpcore.neighbors import Neighbors, transposed
from kpcore.torch.ops import numpy_dtype, on_stream_of, to_array, to_tensor

__all__ = [
    "ball_query", "furthest_point_sampling", "nms", "roi_pool", "three_interpolate", "three_interpolate_grad",
    "three_nn", "trilinear_devoxelize", "trilinear_devoxelize_backward", "trilinear_devoxelize_forward",
]  # fmt: skip

_DETECTION = "detection, not here; kpcore has no operations of object detection, take this one from Open3D"


class ThreeNearest(NamedTuple):
    """What `three_nn` returns."""

    dist: torch.Tensor  #: (B, N, 3) squared distances
    idx: torch.Tensor  #: (B, N, 3) int32


def _bounds(num_items, num_rows, device):
    """row_splits of items of `num_rows` rows each."""
    return torch.arange(num_items + 1, device=device) * num_rows


@torch.no_grad()
def furthest_point_sampling(points: torch.Tensor, sample_size: int) -> torch.Tensor:
    """Points chosen greedily to be far from each other, beginning with the first point of each cloud.

    Once every point is as near as 0 to a chosen one, all further indices are 0, as in Open3D.

    Parameters
    ----------
    points : (B, N, 3) float32 or float64
        N at least 1. Open3D takes float32 only.
    sample_size : int
        Number of indices S, at least 1.

    Returns
    -------
    (B, S) int32
    """
    points = arguments.tensor("points", points, "B N 3", arguments.REAL, {})
    num_items, num_points = points.shape[:2]
    sample_size = checks.integer("sample_size", sample_size, 1)
    if not num_points:
        raise ValueError("points: expected (B, N, 3) with N of at least 1, got N = 0")
    rows, splits = points.reshape(-1, 3), _bounds(num_items, num_points, points.device)
    chosen = kpt.farthest_point_sampling(rows, sample_size, row_splits=splits).index.to(torch.int64)
    num_chosen = min(sample_size, num_points)
    # A chosen point with the coordinates of one chosen before it was at distance 0, as were all others then.
    item = torch.arange(num_items, device=points.device).repeat_interleave(num_chosen)
    place = torch.unique(torch.cat([item[:, None].to(points.dtype), rows[chosen]], 1), dim=0, return_inverse=True)[1]
    number = torch.arange(len(chosen), device=points.device)
    first = torch.full_like(number, len(number)).scatter_reduce(0, place, number, "amin")
    index = torch.where(first[place] == number, chosen - item * num_points, 0)
    out = torch.zeros((num_items, sample_size), dtype=torch.int32, device=points.device)
    out[:, :num_chosen] = index.view(num_items, num_chosen)
    return out


@torch.no_grad()
def ball_query(xyz: torch.Tensor, center: torch.Tensor, radius: float, nsample: int) -> torch.Tensor:
    """The first points, by index, nearer to each centre than the radius, padded with the first of them.

    As in Open3D the radius is exclusive, ``d² < r²`` in the dtype of the points, and a centre without such a point gets
    zeros. All pairs within the radius are in memory for a moment.

    Parameters
    ----------
    xyz, center : (B, N, 3) and (B, M, 3), float32 or float64
        Open3D takes float32 only.
    radius : float
        Above zero.
    nsample : int
        Number of indices for each centre, at least 1.

    Returns
    -------
    (B, M, nsample) int32
    """
    sizes = {}
    xyz = arguments.tensor("xyz", xyz, "B N 3", arguments.REAL, sizes)
    center = arguments.tensor("center", center, "B M 3", (xyz.dtype,), sizes)
    num_items, num_points, num_centers = len(xyz), xyz.shape[1], center.shape[1]
    radius = checks.length("radius", float(radius), numpy_dtype("xyz", xyz.dtype))
    nsample = checks.integer("nsample", nsample, 1)
    points, queries = xyz.reshape(-1, 3), center.reshape(-1, 3)
    neighbors = kpt.radius_search(
        points, queries, radius, points_row_splits=_bounds(num_items, num_points, xyz.device),
        queries_row_splits=_bounds(num_items, num_centers, xyz.device), inclusive=False
    )  # fmt: skip
    point, _, splits = pairs(neighbors)
    counts, column = torch.diff(splits)[:, None], torch.arange(nsample, device=xyz.device)
    point = torch.cat([point, point.new_zeros(1)])  # so that an index exists where the last centres have no point
    index = point[splits[:-1, None] + torch.where(column < counts, column, 0)].view(num_items, num_centers, nsample)
    begin = _bounds(num_items, num_points, xyz.device)[:-1, None, None]
    return torch.where(counts.view(num_items, num_centers, 1) > 0, index - begin, 0).to(torch.int32)


@torch.no_grad()
def three_nn(query_pts: torch.Tensor, data_pts: torch.Tensor) -> ThreeNearest:
    """The three nearest data points of each query and their squared distances, by (distance, index).

    Where a cloud has fewer than three data points the rest is, as in Open3D, index 0 at the largest distance of the
    dtype.

    Parameters
    ----------
    query_pts, data_pts : (B, N, 3) and (B, M, 3), float32 or float64
        Open3D takes float32 only.

    Returns
    -------
    ThreeNearest
    """
    sizes = {}
    query_pts = arguments.tensor("query_pts", query_pts, "B N 3", arguments.REAL, sizes)
    data_pts = arguments.tensor("data_pts", data_pts, "B M 3", (query_pts.dtype,), sizes)
    num_items, num_queries, num_points = len(query_pts), query_pts.shape[1], data_pts.shape[1]
    points, queries, device = data_pts.reshape(-1, 3), query_pts.reshape(-1, 3), query_pts.device
    begins = _bounds(num_items, num_points, device)
    neighbors = kpt.knn_search(
        points, queries, 3, points_row_splits=begins, queries_row_splits=_bounds(num_items, num_queries, device)
    )
    point, query, _ = pairs(neighbors)
    shape = num_items, num_queries, min(num_points, 3)
    distance = measures(points, queries, point, query, "L2").view(shape)
    index = (point.view(shape) - begins[:-1, None, None]).to(torch.int32)
    missing = (0, 3 - shape[2])
    farthest = torch.finfo(query_pts.dtype).max
    pad = torch.nn.functional.pad
    return ThreeNearest(pad(distance, missing, value=farthest), pad(index, missing))


def three_interpolate(points: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of three points' features: ``out[b, c, n] = Σ_k weights[b, n, k] points[b, c, idx[b, n, k]]``.

    Differentiable in `points` and `weights`; Open3D's is in neither, and Open3D-ML calls `three_interpolate_grad`.

    Parameters
    ----------
    points : (B, C, M) float32 or float64
        Features. Open3D takes float32 only.
    idx : (B, N, 3) int32 or int64
        0 to M - 1.
    weights : (B, N, 3), dtype of the features

    Returns
    -------
    (B, C, N), dtype of the features
    """
    sizes = {}
    points = arguments.tensor("points", points, "B C M", arguments.REAL, sizes)
    idx = arguments.tensor("idx", idx, "B N 3", arguments.INTEGERS, sizes)
    weights = arguments.tensor("weights", weights, "B N 3", (points.dtype,), sizes)
    arguments.check_range("idx", idx, points.shape[2], "points")
    return _weighted_sums(points, idx, weights)


def three_interpolate_grad(points: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, N: int) -> torch.Tensor:
    """The gradient of `three_interpolate` with respect to its points.

    Parameters
    ----------
    points : (B, C, N) float32 or float64
        The gradient of the result of `three_interpolate`.
    idx : (B, N, 3) int32 or int64
        0 to `N` - 1.
    weights : (B, N, 3), dtype of `points`
    N : int
        Number of points that were interpolated: M of `three_interpolate`.

    Returns
    -------
    (B, C, M), dtype of `points`
    """
    sizes = {}
    points = arguments.tensor("points", points, "B C N", arguments.REAL, sizes)
    idx = arguments.tensor("idx", idx, "B N 3", arguments.INTEGERS, sizes)
    weights = arguments.tensor("weights", weights, "B N 3", (points.dtype,), sizes)
    num_points = checks.integer("N", N, 0, checks.MAX_POINTS)
    arguments.check_range("idx", idx, num_points, "N")
    return _weighted_sums_transposed(points, idx, weights, num_points)


def trilinear_devoxelize_forward(r: int, is_training: bool, coords: torch.Tensor, features: torch.Tensor
                                 ) -> list[torch.Tensor]:  # fmt: skip
    """Features of a grid interpolated at points, and the eight corners and weights of each point.

    The corners of a point are its coordinates rounded down and those plus one, the last axis fastest; the number of a
    corner is ``(x r + y) r + z``. On an axis where a coordinate is a whole number both corners are the same, of which
    the second has weight 0. Differentiable in the features. Open3D's runs on a GPU only and has no gradient.

    Parameters
    ----------
    r : int
        Cells of the grid along each axis.
    is_training : bool
        Whether corners and weights are returned.
    coords : (B, 3, N) float32 or float64
        In cells, 0 to r - 1; beyond these Open3D reads memory outside the grid.
    features : (B, C, r, r, r), dtype of the coordinates

    Returns
    -------
    [outs, inds, wgts]
        (B, C, N); (B, 8, N) int32 and (B, 8, N), or zeros (1,) unless `is_training`.
    """
    sizes = {"r": (checks.integer("r", r, 1, 1290), "r")}  # 1290**3 corners are the most that int32 numbers
    coords = arguments.tensor("coords", coords, "B 3 N", arguments.REAL, sizes)
    features = arguments.tensor("features", features, "B C r r r", (coords.dtype,), sizes)
    is_training = checks.boolean("is_training", is_training)
    coords = coords.detach()
    if not ((coords >= 0) & (coords <= r - 1)).all():
        raise ValueError(f"coords: expected numbers from 0 to r - 1 = {r - 1}, got {coords.min()} to {coords.max()}")
    low = torch.floor(coords)
    above = coords - low
    high = low + (above > 0)
    numbers, weights = [], []
    for corner in range(8):
        ends = [(corner >> (2 - axis)) & 1 for axis in range(3)]
        x, y, z = ((high if end else low)[:, axis].to(torch.int32) for axis, end in enumerate(ends))
        a, b, c = (above[:, axis] if end else 1 - above[:, axis] for axis, end in enumerate(ends))
        numbers.append((x * r + y) * r + z)
        weights.append(a * b * c)
    inds, wgts = torch.stack(numbers, 1), torch.stack(weights, 1)
    outs = _weighted_sums(features.flatten(2), inds.transpose(1, 2), wgts.transpose(1, 2))
    return [outs, inds, wgts] if is_training else [outs, inds.new_zeros(1), wgts.new_zeros(1)]


def trilinear_devoxelize_backward(grad_y: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, r: int
                                  ) -> torch.Tensor:  # fmt: skip
    """The gradient of `trilinear_devoxelize_forward` with respect to its features.

    Parameters
    ----------
    grad_y : (B, C, N) float32 or float64
    indices, weights : (B, 8, N) int32, and (B, 8, N) of the dtype of `grad_y`
        What the forward pass returned.
    r : int

    Returns
    -------
    (B, C, r³), dtype of `grad_y`
    """
    sizes = {}
    grad_y = arguments.tensor("grad_y", grad_y, "B C N", arguments.REAL, sizes)
    indices = arguments.tensor("indices", indices, "B 8 N", (torch.int32,), sizes)
    weights = arguments.tensor("weights", weights, "B 8 N", (grad_y.dtype,), sizes)
    num_corners = checks.integer("r", r, 1, 1290) ** 3
    arguments.check_range("indices", indices, num_corners, "r³")
    return _weighted_sums_transposed(grad_y, indices.transpose(1, 2), weights.transpose(1, 2), num_corners)


def trilinear_devoxelize(coords: torch.Tensor, features: torch.Tensor, resolution: int, is_training: bool = True
                         ) -> list[torch.Tensor]:  # fmt: skip
    """`trilinear_devoxelize_forward` under the name and in the argument order of ``open3d.ml.tf.ops``."""
    return trilinear_devoxelize_forward(resolution, is_training, coords, features)


def nms(boxes: torch.Tensor, scores: torch.Tensor, nms_overlap_thresh: float) -> torch.Tensor:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"nms: {_DETECTION}")


def roi_pool(xyz: torch.Tensor, boxes3d: torch.Tensor, pts_feature: torch.Tensor, sampled_pts_num: int) -> torch.Tensor:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"roi_pool: {_DETECTION}")


def _rows(features):
    """(B, C, M) as B * M rows of C."""
    return features.transpose(1, 2).reshape(-1, features.shape[1])


def _list(idx, num_points):
    """A list of the K rows of each n among B * num_points, from idx (B, N, K) that was checked."""
    num_items, num_rows, width = idx.shape
    index = (idx + _bounds(num_items, num_points, idx.device)[:-1, None, None]).to(torch.int32).reshape(-1)
    splits = _bounds(num_items * num_rows, width, idx.device)
    return Neighbors(to_array("idx", index), to_array("idx", splits), num_items * num_points)


def _weighted_sums(features, idx, weights):
    """``out[b, c, n] = Σ_k weights[b, n, k] features[b, c, idx[b, n, k]]``, differentiable in features and weights."""
    neighbors = on_stream_of(idx, _list, idx, features.shape[2])
    sums = kpt.neighbor_reduce(_rows(features), neighbors, "sum", weights=weights.reshape(-1))
    return sums.view(len(idx), idx.shape[1], features.shape[1]).transpose(1, 2).contiguous()


def _weighted_sums_transposed(grads, idx, weights, num_points):
    """``out[b, c, m] = Σ weights[b, n, k] grads[b, c, n]`` over all n and k with idx[b, n, k] = m."""

    def transpose():
        neighbors, moved = _list(idx, num_points), to_array("weights", weights.detach().reshape(-1))
        index, splits, moved = transposed(
            neighbors.stored_index, neighbors.stored_row_splits, moved, neighbors.num_points
        )
        return Neighbors(index, splits, neighbors.num_queries), to_tensor(moved)

    neighbors, moved = on_stream_of(idx, transpose)
    sums = kpt.neighbor_reduce(_rows(grads), neighbors, "sum", weights=moved)
    return sums.view(len(idx), num_points, grads.shape[1]).transpose(1, 2).contiguous()

"""Open3D's operations on voxels: which voxels hold points, and pooling of the points of each voxel."""

from __future__ import annotations

from typing import NamedTuple

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import arguments
from kpcore.neighbors import Neighbors
from kpcore.torch.ops import numpy_dtype, on_stream_of, to_array

__all__ = ["voxel_pooling", "voxelize"]

POSITIONS = ("average", "nearest_neighbor", "center")
FEATURES = ("average", "nearest_neighbor", "max")


class Voxels(NamedTuple):
    """What `voxelize` returns, for V voxels."""

    voxel_coords: torch.Tensor  #: (V, D) int32
    voxel_point_indices: torch.Tensor  #: (P,) int64 points, voxel after voxel
    voxel_point_row_splits: torch.Tensor  #: (V + 1,) int64 bounds of the voxels in it
    voxel_batch_splits: torch.Tensor  #: (B + 1,) int64 bounds of the batch items' voxels


class PooledVoxels(NamedTuple):
    """What `voxel_pooling` returns, for V voxels."""

    pooled_positions: torch.Tensor  #: (V, 3)
    pooled_features: torch.Tensor  #: (V, C)


@torch.no_grad()
def voxelize(points: torch.Tensor, row_splits: torch.Tensor, voxel_size: torch.Tensor, points_range_min: torch.Tensor,
             points_range_max: torch.Tensor, max_points_per_voxel: int = 9223372036854775807,
             max_voxels: int = 9223372036854775807) -> Voxels:  # fmt: skip
    """The voxels that hold points, and the points of each.

    Points with ``points_range_min <= p <= points_range_max`` on every axis are in voxel
    ``trunc((p - points_range_min) * (1 / voxel_size))``. The voxels of an item are sorted by their last coordinate,
    then by the one before it and so on; the points of a voxel by index.

    A point at points_range_max may be in a voxel just outside the range: in [0, 2] with voxels of 1, the point 2.0 is
    in voxel 2. That voxel is returned as what it is. Open3D merges it with voxel 0 of the next row, since it numbers
    two voxels a row.

    Parameters
    ----------
    points : (N, D) float32 or float64
        Open3D takes D = 1 to 8.
    row_splits : (B + 1,) int64
        Bounds of batch items.
    voxel_size : (D,), dtype of the points
        Above zero.
    points_range_min, points_range_max : (D,), dtype of the points
    max_points_per_voxel : int
        The points of a voxel beyond this number are left out.
    max_voxels : int
        The voxels of an item beyond this number are left out.

    Returns
    -------
    Voxels
    """
    sizes = {}
    points = arguments.tensor("points", points, "N D", arguments.REAL, sizes)
    row_splits = arguments.row_splits("row_splits", row_splits, len(points), "points", points.device)
    named = (("voxel_size", voxel_size), ("points_range_min", points_range_min), ("points_range_max", points_range_max))
    size, low, high = (arguments.tensor(name, value, "D", (points.dtype,), sizes) for name, value in named)
    if not (size > 0).all():
        raise ValueError(f"voxel_size: expected numbers above zero, got {size.tolist()}")
    most_points = checks.integer("max_points_per_voxel", max_points_per_voxel, 0)
    most_voxels = checks.integer("max_voxels", max_voxels, 0)

    num_items, device = len(row_splits) - 1, points.device
    item = torch.repeat_interleave(torch.arange(num_items, device=device), torch.diff(row_splits))
    inside = ((points >= low) & (points <= high)).all(1).nonzero()[:, 0]
    coords = _whole_numbers((points[inside] - low) * (1 / size))
    order, splits = _groups([item[inside], *coords.flip(1).unbind(1)])
    first = order[splits[:-1]]  # a point of each voxel
    voxel_item = item[inside][first]
    voxels_per_item = torch.bincount(voxel_item, minlength=num_items)
    begins = voxels_per_item.cumsum(0) - voxels_per_item
    number = torch.arange(len(first), device=device)
    is_kept = number - begins[voxel_item] < most_voxels
    counts = torch.diff(splits)
    voxel = torch.repeat_interleave(number, counts)
    is_taken = is_kept[voxel] & (torch.arange(len(order), device=device) - splits[voxel] < most_points)
    return Voxels(
        coords[first[is_kept]].to(torch.int32),
        inside[order[is_taken]],
        _splits(counts[is_kept].clamp(max=most_points)),
        _splits(voxels_per_item.clamp(max=most_voxels)),
    )


def voxel_pooling(positions: torch.Tensor, features: torch.Tensor, voxel_size: float, position_fn: str = "average",
                  feature_fn: str = "average", debug: bool = False) -> PooledVoxels:  # fmt: skip
    """One position and one row of features for each voxel that holds points.

    The voxel of a point is ``floor(p * (1 / voxel_size))``. Voxels are sorted by their last coordinate, then by the one
    before it; Open3D's order is that of a hash map. Differentiable in the features, as Open3D's.

    The maximum is that of the features; Open3D takes the maximum of them and 0, so that negative features pool to 0.

    Parameters
    ----------
    positions : (N, 3) float32 or float64
    features : (N, C) float32, float64, int32 or int64
    voxel_size : float
        Above zero.
    position_fn : {"average", "nearest_neighbor", "center"}
        The mean of the points of a voxel, its point nearest to the centre of the voxel (of equally near ones the
        first), or the centre.
    feature_fn : {"average", "nearest_neighbor", "max"}
        The mean over the points of a voxel, that of integers rounded towards zero; the features of its point nearest to
        the centre; or the largest value of each channel, NaN if one is NaN. The gradient of a maximum goes to the first
        of the points with that value.
    debug : bool
        Has no effect. With True Open3D checks that voxels can be numbered in 32 bits, which is always checked here.

    Returns
    -------
    PooledVoxels
    """
    sizes = {}
    positions = arguments.tensor("positions", positions, "N 3", arguments.REAL, sizes).detach()
    features = arguments.tensor("features", features, "N C", (*arguments.REAL, *arguments.INTEGERS), sizes)
    size = checks.length("voxel_size", float(voxel_size), numpy_dtype("positions", positions.dtype))
    by = (position_fn, feature_fn)
    checks.choice("position_fn", position_fn, POSITIONS)
    checks.choice("feature_fn", feature_fn, FEATURES)

    size = torch.tensor(size, dtype=positions.dtype)
    scaled = torch.floor(positions * (1 / size))
    order, splits = _groups([*_whole_numbers(scaled).flip(1).unbind(1)])
    center = scaled * size + 0.5 * size
    if "nearest_neighbor" in by:
        x, y, z = (center - positions).unbind(1)
        nearest = order[_first_smallest(((x * x + y * y) + z * z)[order], splits)]
    voxels = on_stream_of(positions, _points_of_voxels, order, splits)
    if position_fn == "average":
        pooled_positions = kpt.neighbor_reduce(positions, voxels, "mean")
    else:
        pooled_positions = center[order[splits[:-1]]] if position_fn == "center" else positions[nearest]
    if feature_fn == "nearest_neighbor":
        pooled_features = features[nearest]
    elif features.is_floating_point():
        pooled_features = kpt.neighbor_reduce(features, voxels, "max" if feature_fn == "max" else "mean")
    else:
        pooled_features = _pooled_integers(features[order], splits, feature_fn)
    return PooledVoxels(pooled_positions, pooled_features)


def _whole_numbers(scaled):
    """Voxel coordinates as int64; an error unless they fit in 32 bits, as voxel_coords are int32."""
    if not (scaled.abs() < 2**31).all():
        raise ValueError(
            "voxel_size: expected finite points and at most 2**31 voxels from the origin to a point, got "
            f"{float(scaled.abs().max()):.4g}"
        )
    return scaled.to(torch.int64)


def _groups(columns):
    """(order, splits): the rows of integer columns sorted, equal rows in their order, and the bounds of equal rows.

    The first column is the most significant.
    """
    key, size = torch.zeros_like(columns[0]), 1
    for column in columns if len(key) else ():
        low, high = (int(bound) for bound in torch.aminmax(column))
        if size * (high - low + 1) >= 2**63:
            key, size = torch.unique(key, return_inverse=True)[1], len(key)
        key, size = key * (high - low + 1) + (column - low), size * (high - low + 1)
    order = torch.argsort(key, stable=True)
    return order, _splits(torch.unique_consecutive(key[order], return_counts=True)[1])


def _points_of_voxels(order, splits):
    """A list with a row for each voxel: the points in it."""
    return Neighbors(to_array("order", order), to_array("splits", splits), len(order))


def _splits(counts):
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _first_smallest(values, splits):
    """The position of the smallest value of each row, of equal ones the first."""
    row = torch.repeat_interleave(torch.arange(len(splits) - 1, device=values.device), torch.diff(splits))
    smallest = values.new_full((len(splits) - 1,), float("inf")).scatter_reduce(0, row, values, "amin")
    position = torch.arange(len(values), device=values.device)
    position = torch.where(values == smallest[row], position, len(values))
    return torch.full_like(splits[1:], len(values)).scatter_reduce(0, row, position, "amin")


def _pooled_integers(features, splits, feature_fn):
    """The mean, rounded towards zero, or the maximum of each row of integer features."""
    if feature_fn == "average":
        sums = torch.cat([features.new_zeros((1, features.shape[1]), dtype=torch.int64), features.cumsum(0)])[splits]
        means = torch.div(torch.diff(sums, dim=0), torch.diff(splits)[:, None], rounding_mode="trunc")
        return means.to(features.dtype)
    row = torch.repeat_interleave(torch.arange(len(splits) - 1, device=features.device), torch.diff(splits))
    largest = features.new_full((len(splits) - 1, features.shape[1]), torch.iinfo(features.dtype).min)
    return largest.scatter_reduce(0, row[:, None].expand_as(features), features, "amax")

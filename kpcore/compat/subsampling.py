"""Grid subsampling and furthest points of KPConv-PyTorch, ml-kpconvx, GeoTransformer and Easy-KPConv."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import kpcore as kp
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray
from kpcore.compat.kinds import arrays_or_tensors, row_splits
from kpcore.neighbors import new_list, transposed

__all__ = ["batch_grid_partitionning", "furthest_point_sample", "grid_subsample", "grid_subsample_batch",
           "grid_subsample_pack_mode", "grid_subsampling", "subsample", "subsample_batch"]  # fmt: skip

_METHODS = ("barycenters", "voxelcenters")
_CORE = "kpcore.torch.grid_subsample"


@arrays_or_tensors(gradient=_CORE)
def subsample(points: AnyArray, *, features: AnyArray | None = None, classes: AnyArray | None = None,
              sampleDl: float = 0.1, method: str = "barycenters", verbose: int = 0
              ) -> Any:  # fmt: skip
    """One point for each occupied voxel: KPConv-PyTorch's ``subsample``, which ml-kpconvx calls ``grid_subsample``.

    The voxels are the published ones: they begin at ``floor(min * (1 / sampleDl)) * sampleDl``, and a point is in voxel
    ``floor((p - origin) / sampleDl)``, computed in the dtype of the points.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    features : (N, C) float32, float64, or a dtype that float32 holds, such as uint8 colours
        A voxel gets the mean.
    classes : (N,) or (N, L) integers
        A voxel gets the most frequent class of each column, of equally frequent ones the smallest.
    sampleDl : float
        Edge of a voxel, in the unit of the points.
    method : {"barycenters", "voxelcenters"}
        As published, both give barycentres.
    verbose : int
        Not used.

    Returns
    -------
    points : (M, 3), dtype of the points
        Barycentres, sorted along the Morton curve of the voxels.
    features : (M, C) float32 or float64
        Only if features were passed.
    classes : (M, L) int32, or the dtype of the classes if int32 does not hold it
        Only if classes were passed; L is 1 for classes (N,). A single result is not a tuple.

    Raises
    ------
    ValueError, TypeError
        For another `method`, for shapes or dtypes that do not agree, and as `kpcore.grid_subsample`.

    Notes
    -----
    The published order is that of a hash map, and so is its choice among equally frequent classes. The published
    process ends if there are no points; here the result is empty. Sums are float64, the published ones float32.

    Where the rounded reciprocal ``1 / sampleDl`` puts the lowest points into voxel -1, the published code merges that
    voxel with one on the other side of the cloud. Here it stays a voxel.

    Examples
    --------
    >>> import numpy as np
    >>> import kpcore.compat as cpp_subsampling
    >>> points = np.array([[0.0, 0, 0], [0.5, 0, 0], [1.5, 0, 0]], np.float32)
    >>> cpp_subsampling.subsample(points, sampleDl=1.0)
    array([[0.25, 0.  , 0.  ],
           [1.5 , 0.  , 0.  ]], dtype=float32)
    >>> _, classes = cpp_subsampling.subsample(points, classes=np.array([4, 4, 2]), sampleDl=1.0)
    >>> classes
    array([[4],
           [2]])
    """
    sub = _subsampled(points, None, features, classes, sampleDl, method)
    return sub[0] if len(sub) == 2 else (sub[0], *sub[2:])


grid_subsample = subsample


@arrays_or_tensors(gradient=_CORE)
def subsample_batch(points: AnyArray, batches: AnyArray, *, features: AnyArray | None = None,
                    classes: AnyArray | None = None, sampleDl: float = 0.1, method: str = "barycenters",
                    max_p: int = 0, verbose: int = 0) -> tuple[Any, ...]:  # fmt: skip
    """As `subsample`, for each item of a batch: ``subsample_batch`` of KPConv-PyTorch and OverlapPredator.

    Of ml-kpconvx, the same function is called `grid_subsample_batch`.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    batches : (B,) integers
        Lengths of the items, any of which may be empty.
    features, classes, sampleDl, method, verbose
        As for `subsample`.
    max_p : int
        Keep only the first `max_p` points of each item, as published; 0 keeps all. Since points are sorted along a
        curve, the first ones cover one end of the item.

    Returns
    -------
    points : (M, 3), dtype of the points
    batches : (B,) int32
        Lengths of the items.
    features, classes
        Only those that were passed.

    Raises
    ------
    ValueError, TypeError
        As `subsample`, and for lengths that do not add up to N.

    Notes
    -----
    The published process ends for an empty item. Its classes with several columns are wrong from the second item on.

    Examples
    --------
    >>> import numpy as np
    >>> import kpcore.compat as cpp_subsampling
    >>> points = np.array([[0.0, 0, 0], [0.5, 0, 0], [1.5, 0, 0], [0.2, 0, 0]], np.float32)
    >>> points, batches = cpp_subsampling.subsample_batch(points, np.array([3, 1], np.int32), sampleDl=1.0)
    >>> points[:, 0].tolist(), batches
    ([0.25, 1.5, 0.20000000298023224], array([2, 1], dtype=int32))
    """
    max_p = checks.integer("max_p", max_p, 0)
    points, splits, *rest = _subsampled(points, batches, features, classes, sampleDl, method)
    if max_p:
        kept = devices.namespace(points).arange(len(points)) - splits[kp.row_splits_to_batch(splits)] < max_p
        points, *rest = (values[kept] for values in (points, *rest))
    lengths = _lengths(splits)
    return points, (np.minimum(lengths, max_p) if max_p else lengths).astype(np.int32), *rest


grid_subsample_batch = subsample_batch


@arrays_or_tensors(gradient=_CORE)
def batch_grid_partitionning(points: AnyArray, batches: AnyArray, *, sampleDl: float = 0.1,
                             method: str = "barycenters") -> tuple[Any, ...]:  # fmt: skip
    """As `subsample_batch`, and which points are in which voxel: ``batch_grid_partitionning`` of ml-kpconvx.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    batches : (B,) integers
        Lengths of the items, any of which may be empty.
    sampleDl, method
        As for `subsample`.

    Returns
    -------
    points : (M, 3), dtype of the points
    batches : (B,) int32
        Lengths of the items.
    pools : (M, H) int32
        The points of each voxel in the order of their index, filled up with N; H is the largest number of them.
    upsamples : (N, 1) int32
        The voxel of each point.

    Raises
    ------
    ValueError, TypeError
        As `subsample_batch`.

    Notes
    -----
    The published process ends for an empty item.

    Examples
    --------
    >>> import numpy as np
    >>> import kpcore.compat as cpp_subsampling
    >>> points = np.array([[0.0, 0, 0], [1.5, 0, 0], [0.5, 0, 0]], np.float32)
    >>> _, _, pools, upsamples = cpp_subsampling.batch_grid_partitionning(points, [3], sampleDl=1.0)
    >>> pools, upsamples.ravel()
    (array([[0, 2],
           [1, 3]], dtype=int32), array([0, 1, 0], dtype=int32))
    """
    checks.choice("method", method, _METHODS)
    sub = _published(points, batches, sampleDl)
    lengths = _lengths(sub.row_splits).astype(np.int32)
    return sub.points, lengths, _points_of_voxels(sub).to_padded(), sub.inverse[:, None]


@arrays_or_tensors(gradient=_CORE)
def grid_subsampling(points: AnyArray, lengths: AnyArray, voxel_size: float) -> tuple[Any, Any]:
    """As `subsample_batch`, with the arguments of GeoTransformer's extension.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    lengths : (B,) integers
        Any of them may be 0.
    voxel_size : float

    Returns
    -------
    points : (M, 3), dtype of the points
    lengths : (B,) int64

    Raises
    ------
    ValueError, TypeError
        As `subsample_batch`.

    Notes
    -----
    The published process ends for an empty item. The order of the published points is that of a hash map.

    Examples
    --------
    >>> import torch
    >>> import kpcore.compat as ext_module
    >>> points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [1.5, 0, 0]])
    >>> ext_module.grid_subsampling(points, torch.tensor([3]), 1.0)
    (tensor([[0.2500, 0.0000, 0.0000],
            [1.5000, 0.0000, 0.0000]]), tensor([2]))
    """
    sub = _published(points, lengths, voxel_size, size="voxel_size", batches_name="lengths")
    return sub.points, _lengths(sub.row_splits)


@arrays_or_tensors(gradient=_CORE)
def grid_subsample_pack_mode(points: AnyArray, lengths: AnyArray, voxel_size: float) -> tuple[Any, Any]:
    """One point for each occupied voxel of a grid that begins at 0: Easy-KPConv's subsampling.

    A point is in voxel ``floor(p * (1 / voxel_size))``, computed in the dtype of the points as published.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    lengths : (B,) integers
        Any of them may be 0, for which the published code raises IndexError.
    voxel_size : float

    Returns
    -------
    points : (M, 3), dtype of the points
        Barycentres, sorted by item and then by x, y and z of the voxel.
    lengths : (B,) int64

    Raises
    ------
    ValueError, TypeError
        As `subsample_batch`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import grid_subsample_pack_mode
    >>> points = torch.tensor([[1.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.5, 0.0, 0.0]])
    >>> grid_subsample_pack_mode(points, torch.tensor([3]), 1.0)
    (tensor([[0.2500, 0.2500, 0.0000],
            [1.5000, 0.0000, 0.0000]]), tensor([2]))
    """
    points = checks.points_array("points", points, {})
    splits = row_splits("lengths", lengths, ("points", points))
    per_voxel = points.dtype.type(1 / checks.length("voxel_size", voxel_size, points.dtype))
    in_voxels = devices.namespace(points).asarray(points) * per_voxel  # of a subclass such as numpy.matrix too
    sub = kp.grid_subsample(in_voxels, 1.0, features=points, row_splits=splits)
    members, xp = _points_of_voxels(sub), devices.namespace(points)
    first = members.stored_index[members.stored_row_splits[:-1]]
    order = _ascending(xp.take(in_voxels, first, 0), sub.row_splits)
    return xp.take(sub.features, order, 0), _lengths(sub.row_splits)


@arrays_or_tensors(gradient=None)
def furthest_point_sample(points: AnyArray, *, new_n: int = -1, min_d: float = 0.0, verbose: int = 0) -> Any:
    """Points that are far from each other: ``furthest_point_sample`` of ml-kpconvx.

    The first is point 0, each next one the furthest from those chosen, of equally far ones the one with the smallest
    index. If only copies of chosen points are left, the last index is repeated until there are `new_n`, as published.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    new_n : int
        How many to choose; a negative number stands for N.
    min_d : float
        Stop before a point nearer than this to a chosen one. 0 or less: no limit.
    verbose : int
        Not used.

    Returns
    -------
    (S,) int32
        At least one index; none if there are no points, for which the published process ends.

    Raises
    ------
    ValueError, TypeError
        For numbers that are not finite or of another type, and as `kpcore.farthest_point_sampling`.

    Examples
    --------
    >>> import numpy as np
    >>> from kpcore.compat import furthest_point_sample
    >>> points = np.array([[0.0, 0, 0], [1, 0, 0], [9, 0, 0], [9, 0, 0]])
    >>> furthest_point_sample(points, new_n=2), furthest_point_sample(points), furthest_point_sample(points, min_d=5)
    (array([0, 2], dtype=int32), array([0, 2, 1, 1], dtype=int32), array([0, 2], dtype=int32))
    """
    points = checks.points_array("points", points, {})
    new_n = checks.integer("new_n", new_n, -checks.MAX_POINTS, checks.MAX_POINTS)
    num = len(points) if new_n < 0 else max(new_n, 1)
    if not len(points):
        return devices.namespace(points).empty(0, np.int32)
    min_d = checks.number("min_d", min_d, points.dtype)
    if min_d > 0:
        with checks.argument_names({"min_distance": "min_d"}):
            return kp.farthest_point_sampling(points, num, min_distance=min_d).index
    index = kp.farthest_point_sampling(points, num, min_distance=_smallest(points.dtype)).index
    if len(index) == num:
        return index
    xp = devices.namespace(index)
    return xp.concatenate([index, xp.broadcast_to(index[-1:], num - len(index))])


def _subsampled(points, batches, features, classes, size, method):
    """(points, row_splits), then the features and the classes of those that are not None."""
    checks.choice("method", method, _METHODS)
    rest = {"features": _safely(features, np.float32)}
    if (classes := _safely(classes, np.int32)) is not None and classes.ndim == 1:
        classes = classes[:, None]
    sub = _published(points, batches, size, **rest, labels=classes)
    return sub.points, sub.row_splits, *(values for values in (sub.features, sub.labels) if values is not None)


def _points_of_voxels(sub):
    """The list of the points of each voxel, in the order of their index."""
    num_points, xp = len(sub.inverse), devices.namespace(sub.inverse)
    one_voxel_each = xp.arange(num_points + 1, dtype=np.int64)  # row_splits of the list of the voxel of each point
    index, row_splits, _ = transposed(sub.inverse, one_voxel_each, None, len(sub.points))
    return new_list(index, row_splits, num_points)


def _lengths(row_splits):
    return row_splits[1:] - row_splits[:-1]  # not np.diff, which takes 5 us


def _safely(values, dtype):
    """The array in `dtype` if that holds all values of its dtype, as NumPy's C functions convert; else unchanged."""
    if devices.is_array(values) and values.dtype != dtype and np.can_cast(values.dtype, dtype, "safe"):
        return values.astype(dtype)
    return values


def _published(points, batches, voxel_size, *, size="sampleDl", batches_name="batches", features=None, labels=None):
    """kp.grid_subsample with the published origin; `size` and `batches_name` are the names of the arguments."""
    splits = None if batches is None else row_splits(batches_name, batches, ("points", points))
    with checks.argument_names({"voxel_size": size, "labels": "classes"}):
        return kp.grid_subsample(points, voxel_size, features=features, labels=labels, row_splits=splits,
                                 origin="published")  # fmt: skip


def _ascending(coordinates, row_splits):
    """The order of voxels by item and by their index along each axis; `coordinates` (M, D) are of a point in each."""
    xp = devices.namespace(coordinates)
    if not len(coordinates):
        return xp.arange(0)
    axes = [np.floor(coordinates[:, axis]).astype(np.int64) for axis in range(coordinates.shape[1])]
    columns = [kp.row_splits_to_batch(row_splits), *(axis - axis.min() for axis in axes)]
    lengths = (devices.on_host(xp.stack([column.max() for column in columns])) + 1).tolist()  # waits for a GPU once
    if math.prod(lengths) >= 2**63:  # too many for one number for each
        return xp.lexsort(xp.stack(columns[::-1]))
    key = columns[0]
    for column, length in zip(columns[1:], lengths[1:], strict=True):
        key = key * length + column
    return xp.argsort(key)


def _smallest(dtype):
    """A distance that only copies of a point are nearer than: its square is the smallest that lengths may have."""
    return float(np.sqrt(2 * np.finfo(dtype).tiny) * 1.0001)

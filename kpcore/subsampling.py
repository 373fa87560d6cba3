"""Grid subsampling: one point per occupied voxel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kpcore import _array, _cpu, config


class Subsampled(NamedTuple):
    """What `grid_subsample` returns, for V voxels."""

    points: np.ndarray  #: (V, D) barycentres
    features: np.ndarray | None  #: (V, C) means
    labels: np.ndarray | None  #: (V,) majorities
    row_splits: np.ndarray  #: (B + 1,) int64 bounds of the batch items
    inverse: np.ndarray  #: (N,) int32 voxel of each input point
    counts: np.ndarray  #: (V,) int32 points of each voxel


def grid_subsample(points, voxel_size, *, features=None, labels=None, row_splits=None, ignore_label=None):
    """Replace the points of each voxel by their barycentre.

    The voxel of a point is ``floor(p / voxel_size)``, by true division in the dtype of the points: the grid is anchored
    at the origin, so parts of a scene agree on it. Voxels come by batch item and then along the Morton curve of their
    index counted from the item's lowest voxel (x in the lowest bits), which keeps neighbours close in memory; an item's
    result does not depend on the others.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 2 or 3
    voxel_size : float
        Edge of a voxel, in the unit of the points, above zero.
    features : (N, C) float32 or float64, optional
        Averaged per voxel.
    labels : (N,) uint8, int32 or int64, optional
        The most frequent one of each voxel, the smallest of equals.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    ignore_label : int, optional
        Points of this label do not vote; a voxel of only such points gets it.

    Returns
    -------
    Subsampled

    Raises
    ------
    ValueError
        For coordinates that are NaN or infinite, for more than 2**21 voxels along an axis of an item, or for shapes
        that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Sums are float64 and taken relative to a voxel's first point, so barycentres are exact to the last bit far from the
    origin too; features likewise. No result depends on the number of threads.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.1, 0.0], [0.3, 0.2], [1.5, 0.5]])
    >>> sub = kp.grid_subsample(points, 1.0, labels=np.array([2, 1, 7]))
    >>> sub.points
    array([[0.2, 0.1],
           [1.5, 0.5]])
    >>> sub.labels, sub.inverse, sub.counts
    (array([1, 7]), array([0, 0, 1], dtype=int32), array([2, 1], dtype=int32))
    """
    sizes = {}
    points = _array.points_array("points", points, sizes)
    voxel_size = _array.length("voxel_size", voxel_size, points.dtype)
    if features is not None:
        features = _array.array("features", features, "N C", _array.REAL, sizes)
    if labels is not None:
        labels = _array.array("labels", labels, "N", _array.LABELS, sizes)
    if ignore_label is not None:
        if labels is None:
            raise ValueError("ignore_label: expected None, because there are no labels, got a number")
        limits = np.iinfo(labels.dtype)
        ignore_label = _array.integer("ignore_label", ignore_label, limits.min, limits.max)
    row_splits = _array.splits_array("row_splits", row_splits, len(points), "points")
    try:
        return Subsampled(
            *_cpu.grid_subsample(
                points, features, labels, row_splits, voxel_size, ignore_label, config.get_num_threads()
            )
        )
    except _cpu.NotFinite:
        raise _array.not_finite(points=points) from None
    except _cpu.OutOfRange:
        raise _too_many_voxels(points, voxel_size, row_splits) from None


def _too_many_voxels(points, voxel_size, row_splits):
    extent = [np.ptp(p.astype(np.float64), axis=0) for p in np.split(points, row_splits[1:-1]) if len(p)]
    extent = np.max(extent, axis=0)
    with np.errstate(over="ignore"):
        if not np.isfinite(np.abs(points).max() / points.dtype.type(voxel_size)):
            return ValueError(
                f"voxel_size: expected one that divides the points in {points.dtype}, got {voxel_size} for coordinates "
                f"of up to {np.abs(points).max():.4g}"
            )
    if extent.max() / voxel_size >= 2**21 - 1:
        return ValueError(
            f"voxel_size: expected at most 2**21 voxels along an axis, got {extent.max() / voxel_size:.4g} "
            f"(an extent of {extent.max():.4g} in voxels of {voxel_size:.4g})"
        )
    return ValueError(
        f"row_splits: expected items whose voxels can be numbered in 64 bits together, got {len(row_splits) - 1} items "
        f"of up to {' x '.join(f'{e / voxel_size:.4g}' for e in extent)} voxels; subsample them in smaller batches"
    )

"""Farthest point sampling: a given number of points, spread as far apart as a greedy choice gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, NamedTuple

import numpy as np

from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Buffer

__all__ = ["Sampled", "farthest_point_sampling"]

if TYPE_CHECKING:  # a named tuple can be generic from Python 3.11 on, but then torch does not take it for one

    class Sampled(NamedTuple, Generic[Buffer]):
        """What `farthest_point_sampling` returns."""

        index: Buffer
        row_splits: Buffer

else:

    class Sampled(NamedTuple):
        """What `farthest_point_sampling` returns, for S chosen points."""

        index: np.ndarray  #: (S,) int32 among the stacked points, in the order of choice
        row_splits: np.ndarray  #: (B + 1,) int64 bounds of the batch items


def farthest_point_sampling(points: AnyArray, num: int, *, row_splits: AnyArray | None = None,
                            start: int | AnyArray = 0, method: Literal["exact", "bucketed"] | None = None
                            ) -> Sampled[np.ndarray]:  # fmt: skip
    """Choose points that are far from each other: exactly the greedy choice, in 1 to 16 dimensions, batches.

    An item's first point is `start`; each next one is the point farthest from those chosen so far, the smallest index
    of equally far ones. The distance of a point is the smallest of its squared distances to the chosen ones, in the
    dtype of the points. No point is chosen twice, though one equal to it may be: where the points of an item are fewer
    than `num`, all of them are returned.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    num : int
        Points to choose of each batch item, at least 1.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    start : int or (B,) int64
        The first point of each item, counted within it. Of no meaning where an item is empty.
    method : {None, "exact", "bucketed"}
        How; the result is the same to the bit. "exact" computes all N distances for each chosen point. "bucketed"
        leaves out the buckets of points that are too far away to change. None takes the faster one.

    Returns
    -------
    Sampled
        ``points[index]`` are the chosen points.

    Raises
    ------
    ValueError
        For coordinates that are NaN or infinite, or so large or close together that squared distances overflow or
        vanish (as for `knn_search`), for a `start` outside its item, or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    The first k of n chosen points are the choice of k. The result is the same on every machine and with any number of
    threads, of which there is work for one per batch item; "exact" shares a single item's from 131 072 points on. On
    the GPU each item is one block's, whatever the method.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.0, 0], [1, 0], [9, 0], [10, 0], [4, 0]])
    >>> index, row_splits = kp.farthest_point_sampling(points, 3)
    >>> index
    array([0, 3, 4], dtype=int32)
    >>> kp.farthest_point_sampling(points, 2, row_splits=np.array([0, 2, 5])).index
    array([0, 1, 2, 4], dtype=int32)
    """
    sizes = {}
    points = checks.points_array("points", points, sizes, dimensions=checks.DIMENSIONS)
    num = checks.integer("num", num, 1)
    row_splits = checks.splits_array("row_splits", row_splits, len(points), "points", sizes)
    lengths = np.diff(devices.on_host(row_splits))
    start = _starts(start, lengths, sizes["device"])
    method = checks.choice("method", method, (None, "exact", "bucketed"))
    out_row_splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.minimum(lengths, num), out=out_row_splits[1:])
    index = devices.namespace(points).empty(int(out_row_splits[-1]), np.int32)
    backend = devices.backend(points)
    start, out_row_splits = devices.to_device_of(points, start), devices.to_device_of(points, out_row_splits)
    try:
        backend.run("farthest_points", points=points, row_splits=row_splits, start=start,
                    out_row_splits=out_row_splits, method=method, index=index)  # fmt: skip
    except backend.NotFinite:
        raise checks.not_measurable(points, row_splits) or checks.changed("points") from None
    return Sampled(index, out_row_splits)


def _starts(start, lengths, device):
    """(B,) int64 on the host, each within its item."""
    if devices.is_array(start):
        sizes = {"B": (len(lengths), "row_splits"), "device": device}
        start = devices.on_host(checks.array("start", start, "B", checks.SPLITS, sizes)).copy()
    else:
        start = np.full(len(lengths), checks.integer("start", start, 0, checks.MAX_POINTS))
    wrong = (lengths > 0) & ((start < 0) | (start >= lengths))
    if wrong.any():
        item = int(np.argmax(wrong))
        raise ValueError(f"start: expected 0 to {lengths[item] - 1} in item {item}, got {start[item]}")
    return start

"""Farthest point sampling: points chosen greedily to be far from each other, a number of them or down to a distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, NamedTuple

import numpy as np

from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Buffer

__all__ = ["Sampled", "farthest_point_sampling"]

if TYPE_CHECKING:  # generic here only: torch does not recognize a generic NamedTuple (Python 3.11) as a named tuple

    class Sampled(NamedTuple, Generic[Buffer]):
        """What `farthest_point_sampling` returns."""

        index: Buffer
        row_splits: Buffer

else:

    class Sampled(NamedTuple):
        """What `farthest_point_sampling` returns, for S chosen points."""

        index: np.ndarray  #: (S,) int32 index into the stacked points, in the order of choice
        row_splits: np.ndarray  #: (B + 1,) int64 bounds of the batch items


def farthest_point_sampling(points: AnyArray, num: int | AnyArray | None = None, *, min_distance: float = 0.0,
                            row_splits: AnyArray | None = None, start: int | AnyArray = 0,
                            method: Literal["exact", "bucketed"] | None = None) -> Sampled[np.ndarray]:  # fmt: skip
    """Choose points that are far from each other: exactly the greedy choice, in 1 to 16 dimensions, batches.

    The first point of each batch item is `start`. Each next one is the point farthest from the points chosen so far; of
    equally far points the one with the smallest index. The distance of a point is the smallest of its squared distances
    to the chosen points, in the dtype of the points. No index is chosen twice, but points with equal coordinates may
    both be, unless there is a `min_distance`. An item with fewer than `num` points has all of them in the result.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    num : int or (B,) int64, optional
        Number of points to choose in each batch item, at least 1, or one number of at least 0 for each item. None: all
        points of each item, in the order of choice.
    min_distance : float
        Zero, or a distance that chosen points keep from each other, in the unit of the points: the choice in an item
        ends before a point with a distance below ``min_distance * min_distance``, squared in the dtype of the points.
        So items may have fewer than `num` points.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    start : int or (B,) int64
        The first point of each item, counted from the first point of the item. Ignored for empty items.
    method : {None, "exact", "bucketed"}
        The algorithm; both give the same bits. "exact" computes all N distances for each chosen point. "bucketed" skips
        buckets of points that are too far from the chosen point for their distances to change. None takes the faster
        one.

    Returns
    -------
    Sampled
        ``points[index]`` are the chosen points.

    Raises
    ------
    ValueError
        For coordinates that are NaN or infinite, or so large or close together that squared distances overflow or
        vanish (as for `knn_search`), for a `start` outside its item, for a `min_distance` below zero or with a square
        that the dtype cannot hold, or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    The first k of n chosen points are those that a call with ``num=k`` chooses. With a `min_distance` they are the
    first of those that a call without it chooses. The result is the same on every machine and with any number of
    threads. Each batch item is computed by one thread, except that "exact" divides the points among threads if there is
    only one item, of at least 131 072 points. On the GPU each item is computed by one block, for both methods.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.0, 0], [1, 0], [9, 0], [10, 0], [4, 0]])
    >>> index, row_splits = kp.farthest_point_sampling(points, 3)
    >>> index
    array([0, 3, 4], dtype=int32)
    >>> kp.farthest_point_sampling(points, 2, row_splits=np.array([0, 2, 5])).index
    array([0, 1, 2, 4], dtype=int32)
    >>> kp.farthest_point_sampling(points, min_distance=4.0, row_splits=np.array([0, 2, 5]))
    Sampled(index=array([0, 2, 4], dtype=int32), row_splits=array([0, 1, 3]))
    """
    sizes = {}
    points = checks.points_array("points", points, sizes, dimensions=checks.DIMENSIONS)
    if checks.not_negative("min_distance", min_distance):
        min_distance = checks.length("min_distance", min_distance, points.dtype)
    is_one_item = row_splits is None
    row_splits = checks.splits_array("row_splits", row_splits, len(points), "points", sizes)
    lengths = np.array([len(points)]) if is_one_item else np.diff(devices.on_host(row_splits))
    start = _starts(start, lengths, sizes["device"])
    method = checks.choice("method", method, (None, "exact", "bucketed"))
    out_row_splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(_counts(num, lengths, sizes["device"]), out=out_row_splits[1:])
    xp, num_chosen = devices.namespace(points), int(out_row_splits[-1])
    index = xp.full(num_chosen, -1, np.int32) if min_distance else xp.empty(num_chosen, np.int32)
    backend = devices.backend(points)
    start, out_row_splits = devices.to_device_of(points, start), devices.to_device_of(points, out_row_splits)
    try:
        backend.run("farthest_points", points=points, row_splits=row_splits, start=start,
                    out_row_splits=out_row_splits, min_distance=min_distance, method=method, index=index)  # fmt: skip
    except backend.NotFinite:
        raise checks.not_measurable(points, row_splits) or checks.changed("points") from None
    if not min_distance:
        return Sampled(index, out_row_splits)
    is_chosen = index >= 0  # the others are after the end of their item
    sums = xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(is_chosen, dtype=np.int64)])
    return Sampled(index[is_chosen], sums[out_row_splits])


def _counts(num, lengths, device):
    """The number of points to choose in each item, (B,) int64 NumPy, at most as many as there are."""
    if devices.is_array(num):
        sizes = {"B": (len(lengths), "row_splits"), "device": device}
        num = devices.on_host(checks.array("num", num, "B", checks.SPLITS, sizes))
        if (num < 0).any():
            item = int(np.argmax(num < 0))
            raise ValueError(f"num: expected numbers of at least 0, got {num[item]} for item {item}")
    elif num is not None:
        num = checks.integer("num", num, 1)
    return lengths if num is None else np.minimum(lengths, num)


def _starts(start, lengths, device):
    """The first point of each item, (B,) int64 NumPy; an error for one that is outside its item."""
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

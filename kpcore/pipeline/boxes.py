"""Searches around a centre in points that are in the order of a space-filling curve, in memory or mapped."""

from __future__ import annotations

import numpy as np

import kpcore as kp

_RUN = 128  # points, or boxes, in a box
# The test of a pair rounds to float32, by less than 1e-6 of the distance: no point that passes it is in a box beyond.
_MARGIN = 1 + 1e-5


class Boxes:
    """An index of points in an order in which neighbours are close, as those of `kpcore.grid_subsample`.

    Each run of 128 consecutive points has its bounding box, and so has each run of 128 boxes. The index takes 0.2 bytes
    for a point, and a search reads the points of runs near the centre only.

    Parameters
    ----------
    points : (N, D) float32
    boxes : (runs, 2, D) float32, optional
        Those of `boxes_of`, if they are known.
    """

    def __init__(self, points: np.ndarray, boxes: np.ndarray | None = None) -> None:
        self.points = points
        self._levels = [boxes_of(points) if boxes is None else boxes]
        while len(self._levels[0]) > _RUN:
            low, high = self._levels[0].transpose(1, 0, 2)
            self._levels.insert(0, np.stack([_reduced(np.minimum, low), _reduced(np.maximum, high)], axis=1))

    def near(self, center: np.ndarray, radius: float) -> np.ndarray:
        """(n,) int64, in ascending order: the points of all runs that may have one within a radius of a (D,) centre."""
        numbers = np.arange(len(self._levels[0]))
        limit = (float(np.float32(radius)) * _MARGIN) ** 2
        for boxes, following in zip(self._levels, [*self._levels[1:], self.points], strict=True):
            low, high = boxes[numbers].astype(np.float64).transpose(1, 0, 2)
            gap = np.maximum(0, np.maximum(low - center, center - high))
            numbers = numbers[(gap**2).sum(axis=1) <= limit]
            numbers = (numbers[:, None] * _RUN + np.arange(_RUN)).ravel()
            numbers = numbers[numbers < len(following)]
        return numbers

    def within(self, center: np.ndarray, radius: float) -> np.ndarray:
        """(n,) int32, in ascending order: the points within a radius of a (D,) centre, as `KDTree.radius_search`."""
        numbers = self.near(center, radius)
        inside = kp.radius_search(self.points[numbers], center[None], radius).index
        return numbers[inside].astype(np.int32)


def boxes_of(points: np.ndarray) -> np.ndarray:
    """(runs, 2, D) the lowest and highest coordinates of each run of points."""
    return np.stack([_reduced(reduce, points) for reduce in (np.minimum, np.maximum)], axis=1)


def _reduced(reduce: np.ufunc, rows: np.ndarray) -> np.ndarray:
    return reduce.reduceat(rows, np.arange(0, len(rows), _RUN))

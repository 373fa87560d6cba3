"""Neighbour lists and the fixed-radius search that makes them."""

from __future__ import annotations

import numpy as np

from kpcore import _array, _cpu, config

_SORTS = (None, "index", "distance")


def row_splits(lengths):
    """Bounds of stacked items from their lengths.

    Parameters
    ----------
    lengths : sequence of int, (B,)

    Returns
    -------
    (B + 1,) int64, starting at 0

    Examples
    --------
    >>> import kpcore as kp
    >>> kp.row_splits([3, 0, 2])
    array([0, 3, 3, 5])
    """
    values = np.asarray(lengths)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"lengths: expected integers (B,), got {values.dtype} {values.shape}")
    if values.size and values.min() < 0:
        raise ValueError(f"lengths: expected no negative number, got {values.min()}")
    splits = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=splits[1:])
    return splits


def lengths(row_splits):
    """Lengths of stacked items from their bounds; the inverse of `row_splits`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.lengths(np.array([0, 3, 3, 5]))
    array([3, 0, 2])
    """
    values = _array.array("row_splits", row_splits, "B+1", _array.SPLITS, {})
    return np.diff(_array.splits_array("row_splits", values, values[-1] if len(values) else 0, "its last value"))


class Neighbors:
    """The neighbours of M queries among N points, as one list of rows (CSR).

    The neighbours of query ``q`` are ``index[row_splits[q]:row_splits[q + 1]]``. The order within a row is that of the
    function that made it. Frozen, checked once when made, compared by identity, picklable.

    Parameters
    ----------
    index : (E,) int32
        Point numbers, 0 to ``num_points - 1``. May be longer than ``row_splits[-1]``; the rest is not used.
    row_splits : (M + 1,) int64
    num_points : int
    distance : (E,) float32 or float64, optional
        True distances, never squared.
    width : int, optional
        The padded width the list came from.

    Raises
    ------
    ValueError, TypeError
        For an index outside the points, falling ``row_splits``, or other shapes or dtypes.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 1, 1], np.int32), kp.row_splits([2, 0, 1]), num_points=2)
    >>> nb.counts
    array([2, 0, 1])
    >>> nb.to_padded()
    array([[0, 1],
           [2, 2],
           [1, 2]], dtype=int32)
    """

    __slots__ = ("_transposed", "distance", "index", "num_points", "row_splits", "width")

    def __init__(self, index, row_splits, num_points, distance=None, width=None):
        num_points = _array.integer("num_points", num_points, 0, _array.MAX_POINTS)
        index = _array.array("index", index, "E", _array.INDEX, {})
        row_splits = _array.array("row_splits", row_splits, "M+1", _array.SPLITS, {})
        used = int(row_splits[-1]) if len(row_splits) else 0
        row_splits = _array.splits_array("row_splits", row_splits, used, "its last value")
        if used > len(index):
            raise ValueError(f"row_splits: expected a last value of at most {len(index)} to match index, got {used}")
        if used:
            low, high = int(index[:used].min()), int(index[:used].max())
            if low < 0 or high >= num_points:
                bad = low if low < 0 else high
                raise ValueError(f"index: expected values from 0 to {num_points - 1} to match num_points, got {bad}")
        if distance is not None:
            distance = _array.array("distance", distance, "E", _array.REAL, {"E": (len(index), "index")})
        if width is not None:
            width = _array.integer("width", width, 0)
        self._set(index, row_splits, num_points, distance, width)

    def _set(self, index, row_splits, num_points, distance=None, width=None):
        for name, value in (("index", index), ("row_splits", row_splits), ("num_points", num_points),
                            ("distance", distance), ("width", width), ("_transposed", None)):  # fmt: skip
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def _trusted(cls, *args, **kwargs):
        """A list that the library itself just made, which needs no check."""
        return object.__new__(cls)._set(*args, **kwargs)

    def __setattr__(self, name, value):
        raise AttributeError(f"Neighbors is frozen: cannot set {name}")

    def __delattr__(self, name):
        raise AttributeError(f"Neighbors is frozen: cannot delete {name}")

    def __repr__(self):
        return f"Neighbors({self.num_queries} queries, {self.num_points} points, {self.num_pairs} pairs)"

    def __reduce__(self):
        return _unpickle, (self.index, self.row_splits, self.num_points, self.distance, self.width)

    @property
    def num_queries(self):
        """M."""
        return len(self.row_splits) - 1

    @property
    def num_pairs(self):
        """Pairs in use, ``row_splits[-1]``."""
        return int(self.row_splits[-1])

    @property
    def counts(self):
        """(M,) int64: neighbours of each query."""
        return np.diff(self.row_splits)

    def to_padded(self, width=None, fill=None):
        """The rows as a matrix, the form of the published code.

        Parameters
        ----------
        width : int, optional
            Columns; the longest row if not given. Longer rows lose their last entries, so cut only lists that are
            sorted by distance.
        fill : int, optional
            Written where a row has no more neighbours; ``num_points`` if not given.

        Returns
        -------
        (M, width) int32
        """
        counts = self.counts
        if width is None:
            width = int(counts.max(initial=0))
        width = _array.integer("width", width, 0)
        fill = self.num_points if fill is None else _array.integer("fill", fill, -(2**31), 2**31 - 1)
        padded = np.full((self.num_queries, width), fill, np.int32)
        taken = np.minimum(counts, width)
        column = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        row = np.repeat(np.arange(self.num_queries), taken)
        padded[row, column] = self.index[np.repeat(self.row_splits[:-1], taken) + column]
        return padded

    @classmethod
    def from_padded(cls, index, num_points):
        """From a matrix of neighbours (M, width), int32 or int64; -1 and ``num_points`` mean none.

        The order of the columns is kept. Anything else outside the points is an error.
        """
        num_points = _array.integer("num_points", num_points, 0, _array.MAX_POINTS)
        index = _array.array("index", index, "M H", (np.dtype(np.int32), np.dtype(np.int64)), {})
        valid = (index >= 0) & (index < num_points)
        wrong = ~(valid | (index == -1) | (index == num_points))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"index: expected values from -1 to {num_points} to match num_points, got {index[row, column]} "
                f"in row {row}, column {column}"
            )
        return cls._trusted(index[valid].astype(np.int32), row_splits(valid.sum(1)), num_points, None, index.shape[1])

    @classmethod
    def from_coo(cls, query, point, num_queries, num_points):
        """From pairs (query, point), each (E,) int32 or int64, in any order; a row keeps the order of its pairs."""
        wide = (np.dtype(np.int32), np.dtype(np.int64))
        num_points = _array.integer("num_points", num_points, 0, _array.MAX_POINTS)
        num_queries = _array.integer("num_queries", num_queries, 0, _array.MAX_POINTS)
        sizes = {}
        query = _array.array("query", query, "E", wide, sizes)
        point = _array.array("point", point, "E", wide, sizes)
        for name, values, of, size in (("query", query, "num_queries", num_queries),
                                       ("point", point, "num_points", num_points)):  # fmt: skip
            if len(values) and (values.min() < 0 or values.max() >= size):
                bad = values.min() if values.min() < 0 else values.max()
                raise ValueError(f"{name}: expected values from 0 to {size - 1} to match {of}, got {bad}")
        order = np.argsort(query, kind="stable")
        splits = row_splits(np.bincount(query, minlength=num_queries))
        return cls._trusted(point[order].astype(np.int32), splits, num_points)

    def transpose(self):
        """The queries of each point: M and N change places. Made once and kept; rows are in rising order."""
        if self._transposed is None:
            index, splits, distance = _cpu.transpose(
                self.index, self.row_splits, self.distance, self.num_points, config.get_num_threads()
            )
            object.__setattr__(self, "_transposed", Neighbors._trusted(index, splits, self.num_queries, distance))
        return self._transposed

    def to_sparse(self, values=None):
        """A ``scipy.sparse.csr_array`` (M, N) with the given values (E,), or ones (float32)."""
        from scipy.sparse import csr_array

        pairs = self.num_pairs
        if values is None:
            values = np.ones(pairs, np.float32)
        else:
            values = _array.array("values", values, "E", _array.REAL, {"E": (pairs, "row_splits")})
        return csr_array((values, self.index[:pairs], self.row_splits), shape=(self.num_queries, self.num_points))

    def to(self, device):
        """This list on ``"cpu"``, which is where it is: the only device so far."""
        _array.choice("device", device, ("cpu",))
        return self


def _unpickle(index, row_splits, num_points, distance, width):
    return Neighbors(index, row_splits, num_points, distance, width)


def radius_search(points, queries, radius, *, points_row_splits=None, queries_row_splits=None, max_neighbors=None,
                  sort="index", return_distances=False, count_only=False):  # fmt: skip
    """All points within a radius of each query.

    A point x is a neighbour of q if ``|x - q| <= radius``, decided as ``(d0*d0 + d1*d1) + d2*d2 <= r*r`` with
    ``d = x - q`` in the dtype of the coordinates, on every machine alike. Where queries are points, each is its own
    neighbour.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 2 or 3
    queries : (M, D), same dtype, or None
        None: the points themselves.
    radius : float
        In the unit of the points, above zero, inclusive; rounded to the dtype of the points.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
        Batch items, given together; a query sees the points of its own item. With ``queries=None`` only the first.
    max_neighbors : int, optional
        Keep only so many, the nearest (of equally near ones those with the smallest index).
    sort : {"index", "distance", None}
        Order within a row: by point index; by (distance, index); or unspecified, which is fastest.
    return_distances : bool
        Also give ``Neighbors.distance``, in the dtype of the points.
    count_only : bool
        Return only the number of neighbours of each query, (M,) int64, which needs no room for them.

    Returns
    -------
    Neighbors

    Raises
    ------
    ValueError
        For coordinates that are NaN or infinite, shapes that do not agree, or a radius that is not above zero.
    TypeError
        For other dtypes.

    Notes
    -----
    Time is proportional to the points within 3 radii of each other, memory to the points and the result. Points much
    denser than the radius make neighbourhoods, and so results, that grow with the square of their number.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [3, 0, 0]], np.float32)
    >>> nb = kp.radius_search(points, None, 1.0, return_distances=True)
    >>> nb.index, nb.row_splits
    (array([0, 1, 0, 1, 2], dtype=int32), array([0, 2, 4, 5]))
    >>> nb.distance
    array([0., 1., 1., 0., 0.], dtype=float32)
    """
    sizes = {}
    points = _array.points_array("points", points, sizes)
    if queries is not None:
        queries = _array.points_array("queries", queries, sizes, like=("points", points))
    radius = _array.length("radius", radius, points.dtype)
    if max_neighbors is not None:
        max_neighbors = min(_array.integer("max_neighbors", max_neighbors, 0), len(points))
    if queries is None and queries_row_splits is not None:
        raise ValueError("queries_row_splits: expected None, because queries are the points, got an array")
    if queries is not None and (points_row_splits is None) != (queries_row_splits is None):
        missing = "points_row_splits" if points_row_splits is None else "queries_row_splits"
        raise ValueError(f"{missing}: expected an array, because the other side is in batches, got None")
    points_row_splits = _array.splits_array("points_row_splits", points_row_splits, len(points), "points")
    if queries is not None:
        queries_row_splits = _array.splits_array("queries_row_splits", queries_row_splits, len(queries), "queries")
        if len(queries_row_splits) != len(points_row_splits):
            raise ValueError(
                f"queries_row_splits: expected ({len(points_row_splits)},) to match points_row_splits, "
                f"got {queries_row_splits.shape}"
            )
    sort = _array.choice("sort", sort, _SORTS)
    try:
        splits, index, distance = _cpu.radius_search(
            points, queries, points_row_splits, queries_row_splits, radius, max_neighbors, sort,
            return_distances and not count_only, count_only, config.get_num_threads(),
        )  # fmt: skip
    except _cpu.NotFinite:
        raise _array.not_finite(points=points, queries=queries) from None
    return np.diff(splits) if count_only else Neighbors._trusted(index, splits, len(points), distance)

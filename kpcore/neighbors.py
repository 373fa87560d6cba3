"""Neighbour lists, and the searches that make them: within a radius, or the k nearest."""

from __future__ import annotations

import itertools
import math

import numpy as np

from kpcore import _array, _cpu, config

# What makes NumPy's arrays of a framework's, by their type, from (name, array): frameworks' modules add theirs.
TO_HOST = {}
_SORTS = (None, "index", "distance")
_METRICS = ("l2", "l1", "linf")
_IGNORES = (False, True, "index")
_GRID_DIMENSIONS = (2, 3)
_CROWDED = 8  # times max_neighbors in a cell: from here on the nearest are found without testing all of a radius


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
    values = lengths if _array.is_array(lengths) else np.asarray(lengths)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"lengths: expected integers (B,), got {values.dtype} {values.shape}")
    if values.size and values.min() < 0:
        raise ValueError(f"lengths: expected no negative number, got {values.min()}")
    return bounds_of(values)


def lengths(row_splits):
    """Lengths of stacked items from their bounds; the inverse of `row_splits`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.lengths(np.array([0, 3, 3, 5]))
    array([3, 0, 2])
    """
    values = _array.array("row_splits", row_splits, "B+1", _array.SPLITS, {})
    _check_bounds("row_splits", _array.on_host(values))
    return np.diff(values)


def _check_bounds(name, values):
    """An error unless they are bounds of as many rows as the last one says."""
    _array.check_splits(name, values, values[-1] if len(values) else 0, "its last value")


class Neighbors:
    """The neighbours of M queries among N points, as one list of rows (CSR).

    The neighbours of query ``q`` are ``index[row_splits[q]:row_splits[q + 1]]``. The order within a row is that of the
    function that made it. Frozen, compared by identity, picklable.

    Arrays of NumPy are copied, and those of the list are read-only: what was checked stays true. One that was put
    together again by something else, from a pickle or by a map over a pytree of JAX or torch, is checked when it is
    first used; of a list of JAX's arrays a method puts NumPy's in their place. CuPy's arrays cannot be made read-only:
    they are checked once and must not be changed afterwards.

    Parameters
    ----------
    index : (E,) int32 or int64
        Point numbers, 0 to ``num_points - 1``. May be longer than ``row_splits[-1]``; the rest is not used. The list
        has int32.
    row_splits : (M + 1,) int32 or int64
        Of which the list has int64.
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

    __slots__ = ("_distance", "_index", "_is_checked", "_leaves", "_row_splits", "_transposed", "carries_transpose",
                 "num_points", "width")  # fmt: skip

    def __init__(self, index, row_splits, num_points, distance=None, width=None):
        self._set(*_checked_fields("", index, row_splits, num_points, distance, width))

    def _set(self, index, row_splits, num_points, distance=None, width=None, transposed=None, carries_transpose=False,
             is_checked=True):  # fmt: skip
        fields = {"_index": index, "_row_splits": row_splits, "num_points": num_points, "_distance": distance,
                  "width": width, "_transposed": transposed, "carries_transpose": carries_transpose,
                  "_is_checked": is_checked, "_leaves": None}  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def _trusted(cls, *args, **kwargs):
        """A list of arrays that the library itself just made and that nobody else has, which needs no check."""
        return object.__new__(cls)._set(*args, **kwargs)

    @classmethod
    def _rebuilt(cls, *args, **kwargs):
        """A list of whatever something else made of its parts; checked when it is first used."""
        return object.__new__(cls)._set(*args, **kwargs, is_checked=False)

    @classmethod
    def _borrowed(cls, index, row_splits, num_points, width=None, transposed=None):
        """A list of arrays that are not ours, for the time of one call: checked, its index not copied.

        `transposed`: the index and row_splits of its transpose, or None.
        """
        index, row_splits = _checked_pairs("neighbors.", index, row_splits, num_points, copy=False)
        if transposed is not None:
            num_queries = len(row_splits) - 1
            back = _checked_pairs("the transpose of neighbors.", *transposed, num_queries, copy=False)
            if isinstance(index, np.ndarray):  # a GPU would have to be waited for
                expected, got = (num_points, int(row_splits[-1])), (len(back[1]) - 1, int(back[1][-1]))
                if expected != got:
                    raise ValueError(
                        f"neighbors: expected a transpose of {expected[0]} rows and {expected[1]} pairs, got {got[0]} "
                        f"and {got[1]}"
                    )
            transposed = cls._trusted(*back, num_queries)
        return cls._trusted(index, row_splits, num_points, None, width, transposed)

    # What others get of NumPy's arrays is read-only, and cannot be made writable: what was checked stays true.

    @property
    def index(self):
        """(E,) int32."""
        return _read_only(self._index)

    @property
    def row_splits(self):
        """(M + 1,) int64."""
        return _read_only(self._row_splits)

    @property
    def distance(self):
        """(E,) float32 or float64, or None."""
        return _read_only(self._distance)

    def __setattr__(self, name, value):
        raise AttributeError(f"Neighbors is frozen: cannot set {name}")

    def __delattr__(self, name):
        raise AttributeError(f"Neighbors is frozen: cannot delete {name}")

    def __repr__(self):
        if not self._is_checked:  # there may be no values, as while JAX traces, or nothing that makes a list
            index, row_splits = (getattr(a, "shape", a) for a in (self._index, self._row_splits))
            return f"Neighbors({self.num_points} points, index {index}, row_splits {row_splits}, not checked yet)"
        return f"Neighbors({self.num_queries} queries, {self.num_points} points, {self.num_pairs} pairs)"

    def __reduce__(self):
        index, row_splits, distance = _on_host(self)
        return _unpickle, (index, row_splits, self.num_points, distance, self.width, self.carries_transpose)

    @property
    def num_queries(self):
        """M."""
        return self._row_splits.shape[0] - 1

    @property
    def num_pairs(self):
        """Pairs in use, ``row_splits[-1]``; on the GPU this waits for it."""
        return int(checked(self)._row_splits[-1])

    @property
    def counts(self):
        """(M,) int64: neighbours of each query."""
        return np.diff(checked(self)._row_splits)

    def to_padded(self, width=None, fill=None, *, dtype=np.int32):
        """The rows as a matrix, the form of the published code.

        Parameters
        ----------
        width : int, optional
            Columns; the longest row if not given. Longer rows lose their last entries, so cut only lists that are
            sorted by distance.
        fill : int, optional
            Written where a row has no more neighbours; ``num_points`` if not given.
        dtype : int32 or int64
            Indexing a torch tensor with a matrix takes int64.

        Returns
        -------
        (M, width) of that dtype
        """
        checked(self)
        backend, threads = _array.backend(self._index), config.get_num_threads()
        dtype = np.dtype(dtype)
        if dtype not in _array.INTEGERS:
            raise TypeError(f"dtype: expected int32 or int64, got {dtype}")
        if width is None:
            width = backend.longest_row(self._row_splits, threads)
        width = _array.integer("width", width, 0)
        limits = np.iinfo(dtype)
        fill = self.num_points if fill is None else _array.integer("fill", fill, int(limits.min), int(limits.max))
        return backend.padded(self._index, self._row_splits, width, fill, dtype, threads)

    @classmethod
    def from_padded(cls, index, num_points):
        """From a matrix of neighbours (M, width), int32 or int64; -1 and ``num_points`` mean none.

        The order of the columns is kept. Anything else outside the points is an error.
        """
        num_points = _array.integer("num_points", num_points, 0, _array.MAX_POINTS)
        index = _array.array("index", index, "M H", _array.INTEGERS, {})
        backend = _array.backend(index)
        try:
            pairs, row_splits = backend.unpadded(index, num_points, config.get_num_threads())
        except backend.OutOfRange:
            wrong = ~(((index >= 0) & (index < num_points)) | (index == -1) | (index == num_points))
            if not wrong.any():
                raise _array.changed("index") from None
            row, column = divmod(int(wrong.argmax()), wrong.shape[1])
            raise ValueError(
                f"index: expected values from -1 to {num_points} to match num_points, got {int(index[row, column])} "
                f"in row {row}, column {column}"
            ) from None
        return cls._trusted(pairs, row_splits, num_points, None, index.shape[1])

    @classmethod
    def from_coo(cls, query, point, num_queries, num_points):
        """From pairs (query, point), each (E,) int32 or int64, in any order; a row keeps the order of its pairs."""
        num_points = _array.integer("num_points", num_points, 0, _array.MAX_POINTS)
        num_queries = _array.integer("num_queries", num_queries, 0, _array.MAX_POINTS)
        sizes = {}
        query = _array.array("query", query, "E", _array.INTEGERS, sizes)
        point = _array.array("point", point, "E", _array.INTEGERS, sizes)
        for name, values, of, size in (("query", query, "num_queries", num_queries),
                                       ("point", point, "num_points", num_points)):  # fmt: skip
            if len(values) and ((low := int(values.min())) < 0 or int(values.max()) >= size):
                bad = low if low < 0 else int(values.max())
                raise ValueError(f"{name}: expected values from 0 to {size - 1} to match {of}, got {bad}")
        order = _array.namespace(query).argsort(query, kind="stable")
        splits = bounds_of(_array.namespace(query).bincount(query, minlength=num_queries))
        return cls._trusted(point[order].astype(np.int32), splits, num_points)

    def transpose(self):
        """The queries of each point: M and N change places. Made once and kept; rows are in rising order."""
        if checked(self)._transposed is None:
            index, splits, distance = _array.backend(self._index).transpose(
                self._index, self._row_splits, self._distance, self.num_points, config.get_num_threads()
            )
            object.__setattr__(self, "_transposed", Neighbors._trusted(index, splits, self.num_queries, distance))
        return self._transposed

    def with_transpose(self, carries_transpose=True):
        """This list as one that has its transpose with it where JAX or torch take it apart into arrays.

        A compiled function sees a list's arrays only. The gradient of features needs the transpose, and makes it in
        each call unless it is among them. Lists with and without it are different inputs to such a function; whether
        `transpose` was ever called makes no difference.
        """
        transposed = self.transpose() if carries_transpose else checked(self)._transposed
        return self._trusted(self._index, self._row_splits, self.num_points, self._distance, self.width, transposed,
                             _array.boolean("carries_transpose", carries_transpose))  # fmt: skip

    def with_width(self, width):
        """This list as of a padded matrix of that width."""
        width = _array.integer("width", width, 0)
        checked(self)
        return self._trusted(self._index, self._row_splits, self.num_points, self._distance, width, self._transposed,
                             self.carries_transpose)  # fmt: skip

    def to_sparse(self, values=None):
        """A ``scipy.sparse.csr_array`` (M, N) with the given values (E,), or ones (float32).

        On the GPU a ``cupyx.scipy.sparse.csr_matrix``, which numbers its values in 32 bits.
        """
        pairs, xp = self.num_pairs, _array.namespace(self._index)
        if values is None:
            values = xp.ones(pairs, np.float32)
        else:
            sizes = {"E": (pairs, "row_splits")} | _array.device_of(("neighbors", self._index))
            values = _array.array("values", values, "E", _array.REAL, sizes)
        index, splits = self.index, self.row_splits
        if xp is np:
            from scipy.sparse import csr_array
        else:
            from cupyx.scipy.sparse import csr_matrix as csr_array

            if pairs > _array.MAX_POINTS:
                raise ValueError(f"neighbors: expected at most {_array.MAX_POINTS} pairs on the GPU, got {pairs}")
            splits = splits.astype(np.int32)
        return csr_array((values, index[:pairs], splits), shape=(self.num_queries, self.num_points))

    def to(self, device):
        """This list with its arrays on ``"cpu"`` (NumPy) or ``"cuda"`` (CuPy, on the current GPU).

        The list itself where it is there already, else a copy, with its transpose if that is known.
        """
        if (_array.choice("device", device, ("cpu", "cuda")) == 0) == isinstance(checked(self)._index, np.ndarray):
            return self
        move = config.cupy().asarray if device == "cuda" else _array.on_host
        transposed = self._transposed
        return self._trusted(
            move(self._index), move(self._row_splits), self.num_points,
            None if self._distance is None else move(self._distance), self.width,
            None if transposed is None else transposed.to(device), self.carries_transpose
        )  # fmt: skip


def _read_only(array):
    return _cpu.frozen(array) if type(array) is np.ndarray else array


def checked(neighbors):
    """The list itself, checked now if something else than the library put it together; an error if it is none."""
    if not isinstance(neighbors, Neighbors):
        raise TypeError(f"neighbors: expected kpcore.Neighbors, got {type(neighbors).__name__}")
    if not neighbors._is_checked:
        index, row_splits, distance = _on_host(neighbors)
        fields = index, row_splits, neighbors.num_points, distance, neighbors.width
        # Without the transpose, of which it would take as long to see whether it is one as to make it.
        neighbors._set(*_checked_fields("neighbors.", *fields), None, neighbors.carries_transpose)
    return neighbors


def _on_host(neighbors):
    """(index, row_splits, distance) of a list: of a framework's arrays the NumPy arrays, others as they are."""
    names = ("index", "row_splits", "distance")
    arrays = [getattr(neighbors, f"_{name}") for name in names]
    for at, array in enumerate(arrays):
        for kind, to_host in TO_HOST.items():
            if isinstance(array, kind):
                arrays[at] = to_host(f"neighbors.{names[at]}", array)
    return arrays


def _checked_fields(of, index, row_splits, num_points, distance, width):
    """(index, row_splits, num_points, distance, width) of a list; arrays of NumPy are copies."""
    num_points = _array.integer(f"{of}num_points", num_points, 0, _array.MAX_POINTS)
    index, row_splits = _checked_pairs(of, index, row_splits, num_points, copy=True)
    if distance is not None:
        sizes = {"E": (len(index), f"{of}index")} | _array.device_of((f"{of}index", index))
        distance = _array.array(f"{of}distance", distance, "E", _array.REAL, sizes)
        if isinstance(distance, np.ndarray):
            distance = distance.copy()
    if width is not None:
        width = _array.integer(f"{of}width", width, 0)
    return index, row_splits, num_points, distance, width


def _checked_pairs(of, index, row_splits, num_points, copy):
    """(index int32, row_splits int64) of a list; an error unless they are good.

    Of NumPy's arrays the row_splits are a copy, and the index where `copy` says so.
    """
    sizes, names = {}, (f"{of}index", f"{of}row_splits")
    index = _array.array(names[0], index, "E", _array.INTEGERS, sizes)
    row_splits = _array.array(names[1], row_splits, "M+1", _array.INTEGERS, sizes)
    backend = _array.backend(index)
    try:
        return backend.checked_list(index, row_splits, num_points, copy, config.get_num_threads())
    except backend.OutOfRange:
        raise _wrong_pairs(names, index, row_splits, num_points) from None


def _wrong_pairs(names, index, row_splits, num_points):
    """The error for a list whose arrays are not those of one."""
    row_splits = _array.on_host(row_splits)
    try:
        _check_bounds(names[1], row_splits)
    except ValueError as error:
        return error
    used = int(row_splits[-1])
    if used > len(index):
        return ValueError(f"{names[1]}: expected a last value of at most {len(index)} to match index, got {used}")
    low, high = (int(index[:used].min()), int(index[:used].max())) if used else (0, -1)
    if low < 0 or high >= num_points:
        bad = low if low < 0 else high
        return ValueError(f"{names[0]}: expected values from 0 to {num_points - 1} to match num_points, got {bad}")
    return _array.changed(names[0])


def bounds_of(counts):
    """`row_splits` of counts that are known to be fine, where they are."""
    splits = _array.namespace(counts).zeros(len(counts) + 1, np.int64)
    splits[1:] = np.cumsum(counts)
    return splits


def _unpickle(index, row_splits, num_points, distance, width, carries_transpose=False):
    return Neighbors._rebuilt(index, row_splits, num_points, distance, width, None, carries_transpose)


def radius_search(points, queries, radius, *, points_row_splits=None, queries_row_splits=None, metric="l2",
                  ignore_query_point=False, max_neighbors=None, sort="index", return_distances=False,
                  count_only=False):  # fmt: skip
    """All points within a radius of each query.

    A point x is a neighbour of q if ``|x - q| <= radius``. With d = x - q, in the dtype of the coordinates and on every
    machine alike, that is ``(d0*d0 + d1*d1) + d2*d2 <= r*r`` ("l2"), ``(|d0| + |d1|) + |d2| <= r`` ("l1") or
    ``max(|d0|, |d1|, |d2|) <= r`` ("linf"). Where queries are points, each is its own neighbour unless told otherwise.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        None: the points themselves.
    radius : float, or (M,) of the dtype of the points
        For all queries or for each; in the unit of the points, above zero, inclusive; a number is rounded to the dtype
        of the points.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
        Batch items, given together; a query sees the points of its own item. With ``queries=None`` only the first.
    metric : {"l2", "l1", "linf"}
    ignore_query_point : bool or "index"
        True: points of exactly the query's coordinates are no neighbours (as in Open3D). "index": point i is none of
        query i, which takes as many queries as points; others of its coordinates are.
    max_neighbors : int, optional
        Keep only so many, the nearest (of equally near ones those with the smallest index). On the GPU such a search
        waits for nothing: ``Neighbors.index`` is as long as it could become, and what is not finite, or vanishes, is no
        error.
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
        For coordinates that are NaN or infinite, shapes that do not agree, or a radius that is not above zero; with
        `max_neighbors` also for points so close together that distances vanish, as for `knn_search`.
    TypeError
        For other dtypes.
    MemoryError
        For a result larger than the free memory, or the limit of `set_memory_limit`, before it is made.

    Notes
    -----
    In two and three dimensions a grid of cells as wide as the radius is searched, otherwise, and where radii differ by
    more than 4 from their median or points lie 10^6 radii apart, a kd-tree; the result is the same. Time is
    proportional to the points within 3 radii of each other, memory to the points and the result. Points much denser
    than the radius make neighbourhoods, and so results, that grow with the square of their number.

    A distance that overflows is beyond any radius; one that vanishes (below 1e-19 in float32) is within it, and may be
    given as 0.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [3, 0, 0]], np.float32)
    >>> nb = kp.radius_search(points, None, 1.0, return_distances=True)
    >>> nb.index, nb.row_splits
    (array([0, 1, 0, 1, 2], dtype=int32), array([0, 2, 4, 5]))
    >>> nb.distance
    array([0., 1., 1., 0., 0.], dtype=float32)
    >>> kp.radius_search(points, None, 2.0, ignore_query_point="index").counts
    array([1, 2, 1])
    """
    cloud = _Cloud(points, points_row_splits, "points_row_splits", queries, queries_row_splits)
    radius, reach, even = cloud.radius(radius)
    cell = reach if even and cloud.points.shape[1] in _GRID_DIMENSIONS else None
    return _radius_search(cloud.index(cell), cloud, radius, metric, ignore_query_point, max_neighbors, sort,
                          return_distances, count_only)  # fmt: skip


def knn_search(points, queries, k, *, points_row_splits=None, queries_row_splits=None, metric="l2",
               ignore_query_point=False, return_distances=False):  # fmt: skip
    """The k nearest points of each query, by (distance, index).

    Distances are compared as `radius_search` computes them; of equally near points those with the smallest index come
    first. A row is shorter than k only where its batch item has fewer points to offer.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        None: the points themselves; each is then its own nearest neighbour, unless ignored.
    k : int
        At least 1.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
    metric : {"l2", "l1", "linf"}
    ignore_query_point : bool or "index"
        As in `radius_search`; the k nearest of the others are found.
    return_distances : bool

    Returns
    -------
    Neighbors

    Raises
    ------
    ValueError
        Also where distances would all be equal, because they overflow or vanish: if for some item the measure of the
        diagonal of the box around its points and queries, squared for "l2", is not zero and lies above the largest or
        below the smallest normal number of the dtype (for "l2" in float32, sides of some 1e19 and 1e-19).
    ValueError, TypeError, MemoryError
        As `radius_search`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.0], [1.0], [3.0]])
    >>> kp.knn_search(points, None, 2).to_padded()
    array([[0, 1],
           [1, 0],
           [2, 1]], dtype=int32)
    """
    cloud = _Cloud(points, points_row_splits, "points_row_splits", queries, queries_row_splits)
    return _knn_search(cloud.index(None), cloud, k, metric, ignore_query_point, return_distances)


def sizes_of(neighbors):
    """What `_array.array` is to know of a list: how many points it has, and where they are."""
    checked(neighbors)
    return {"N": (neighbors.num_points, "neighbors")} | _array.device_of(("neighbors", neighbors._index))


def geometry(points, queries, neighbors, sizes):
    """Points, queries (None: the points) and the list between them, checked; `sizes` as in `_array.array`."""
    points = _array.points_array("points", points, sizes, dimensions=_array.DIMENSIONS)
    if queries is None:
        queries = points
        sizes["M"] = (len(points), "points")
    else:
        like = ("points", points)
        queries = _array.points_array("queries", queries, sizes, dimensions=_array.DIMENSIONS, like=like)
    checked(neighbors)
    if isinstance(neighbors._index, np.ndarray) is not isinstance(points, np.ndarray):
        raise TypeError(
            f"neighbors: expected a list where {sizes['device'][1]} is, got one on another device; nothing is moved "
            "between devices by itself, move it with neighbors.to"
        )
    expected, got = (len(queries), len(points)), (neighbors.num_queries, neighbors.num_points)
    if expected != got:
        raise ValueError(
            f"neighbors: expected {expected[0]} queries and {expected[1]} points to match queries and points, "
            f"got {got[0]} and {got[1]}"
        )
    return points, queries


class KDTree:
    """Points ready for searches of any radius and of the k nearest, in 1 to 16 dimensions.

    Holds a copy of the points; may be searched from many threads at once, and pickled, which makes it anew. What it
    finds is what `radius_search` and `knn_search` find, to the bit.

    Parameters
    ----------
    points : (N, D) float32 or float64
    row_splits : (B + 1,) int64, optional
        Batch items; a query sees the points of its own.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> tree = kp.KDTree(np.random.default_rng(0).random((100, 5)))
    >>> tree.radius_search(None, 0.5).num_queries, tree.knn_search(None, 3).num_pairs
    (100, 300)
    """

    __slots__ = ("_cell", "_index", "_points", "_row_splits")
    _dimensions = _array.DIMENSIONS

    def __init__(self, points, *, row_splits=None):
        cloud = _Cloud(points, row_splits, "row_splits", None, None, self._dimensions)
        self._keep(cloud, None)

    def _keep(self, cloud, cell):
        cloud.points = cloud.points.copy()
        self._points, self._row_splits, self._cell = cloud.points, cloud.points_row_splits.copy(), cell
        self._index = cloud.index(cell)

    def __repr__(self):
        return f"{type(self).__name__}({len(self._points)} points, {self._points.shape[1]} dimensions)"

    def __reduce__(self):
        return _rebuilt, (type(self), self._points, self._row_splits, self._cell)

    def _with(self, queries, queries_row_splits):
        splits = self._row_splits if queries is None or queries_row_splits is not None else None
        if splits is None and len(self._row_splits) != 2:
            raise ValueError("queries_row_splits: expected an array, because the points are in batches, got None")
        return _Cloud(self._points, splits, "row_splits", queries, queries_row_splits, self._dimensions, known=True)

    def radius_search(self, queries, radius, *, queries_row_splits=None, metric="l2", ignore_query_point=False,
                      max_neighbors=None, sort="index", return_distances=False, count_only=False):  # fmt: skip
        """As the function `radius_search`, without making an index."""
        cloud = self._with(queries, queries_row_splits)
        radius, reach, _ = cloud.radius(radius)
        index = self._index
        if self._cell is not None and reach > self._cell:
            index = cloud.index(reach)
        return _radius_search(index, cloud, radius, metric, ignore_query_point, max_neighbors, sort, return_distances,
                              count_only)  # fmt: skip

    def knn_search(self, queries, k, *, queries_row_splits=None, metric="l2", ignore_query_point=False,
                   return_distances=False):  # fmt: skip
        """As the function `knn_search`, without making an index."""
        cloud = self._with(queries, queries_row_splits)
        return _knn_search(self._index, cloud, k, metric, ignore_query_point, return_distances)


class GridIndex(KDTree):
    """Points in cells, ready for searches with radii up to the cell, in two and three dimensions.

    Faster than a `KDTree` for queries as dense as the points. Points more than some 10^6 cells apart are searched as a
    `KDTree` does, unless they are sparse. For a radius larger than the cell a grid of its own is made each time, which
    is faster than looking through more of the smaller cells. The k nearest are found by a kd-tree made when first asked
    for.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 2 or 3
    cell : float
        Edge of a cell, in the unit of the points, above zero: the largest radius to search with.
    row_splits : (B + 1,) int64, optional

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> grid = kp.GridIndex(np.random.default_rng(0).random((100, 3)), 0.3)
    >>> [grid.radius_search(None, r).num_pairs > 100 for r in (0.2, 0.3, 0.5)]
    [True, True, True]
    """

    __slots__ = ("_tree",)
    _dimensions = _GRID_DIMENSIONS

    def __init__(self, points, cell, *, row_splits=None):
        cloud = _Cloud(points, row_splits, "row_splits", None, None, self._dimensions)
        self._keep(cloud, _array.length("cell", cell, cloud.points.dtype))
        self._tree = None

    def knn_search(self, queries, k, **options):
        """As the function `knn_search`."""
        if self._tree is None:
            self._tree = KDTree(self._points, row_splits=self._row_splits)
        return self._tree.knn_search(queries, k, **options)

    def _search_with(self, others, others_row_splits, radius, max_neighbors):
        """The lists of the points themselves and of other queries, as `radius_search` makes them one after the other.

        From one search, which gathers and sorts what is near a cell once for both: three quarters of the time.
        """
        cloud = self._with(others, others_row_splits)
        num_points = len(self._points)
        cloud.queries = np.concatenate([self._points, cloud.queries])
        cloud.queries_row_splits = np.concatenate([self._row_splits, num_points + cloud.queries_row_splits[1:]])
        cloud.num_queries = len(cloud.queries)
        both = _radius_search(
            self._index, cloud, cloud.radius(radius)[0], "l2", False, max_neighbors, "index", False, False
        )
        splits = both._row_splits
        own = splits[num_points]
        return (
            Neighbors._trusted(both._index[:own], splits[: num_points + 1], num_points),
            Neighbors._trusted(both._index[own:], splits[num_points:] - own, num_points),
        )


def _rebuilt(cls, points, row_splits, cell):
    return cls(points, row_splits=row_splits) if cell is None else cls(points, cell, row_splits=row_splits)


class _Cloud:
    """Points and queries of one search, checked."""

    def __init__(self, points, points_row_splits, name, queries, queries_row_splits, dimensions=_array.DIMENSIONS,
                 known=False):  # fmt: skip
        """`known`: the points' row_splits were checked before."""
        sizes = {}
        points = _array.points_array("points", points, sizes, dimensions=dimensions)
        if queries is not None:
            queries = _array.points_array("queries", queries, sizes, dimensions=dimensions, like=("points", points))
        elif queries_row_splits is not None:
            raise ValueError("queries_row_splits: expected None, because queries are the points, got an array")
        if queries is not None and (points_row_splits is None) != (queries_row_splits is None):
            missing = name if points_row_splits is None else "queries_row_splits"
            raise ValueError(f"{missing}: expected an array, because the other side is in batches, got None")
        points_row_splits = _array.splits_array(name, points_row_splits, len(points), "points", sizes, known=known)
        if queries is not None:
            queries_row_splits = _array.splits_array(
                "queries_row_splits", queries_row_splits, len(queries), "queries", sizes
            )
            if len(queries_row_splits) != len(points_row_splits):
                raise ValueError(
                    f"queries_row_splits: expected ({len(points_row_splits)},) to match {name}, "
                    f"got {queries_row_splits.shape}"
                )
        self.points, self.points_row_splits = points, points_row_splits
        self.queries, self.queries_row_splits = queries, queries_row_splits
        self.num_queries = len(points if queries is None else queries)

    def radius(self, radius):
        """(a number, or one for each query, the largest, whether they are much alike)"""
        if _array.is_array(radius) and radius.ndim:
            radius, on_host = _array.lengths("radius", radius, self.num_queries, ("points", self.points))
            reach = float(on_host.max(initial=0))
            return radius, reach, bool(len(on_host)) and reach <= 4 * np.median(on_host)
        radius = _array.length("radius", radius, self.points.dtype)
        return radius, radius, True

    def sample(self, num):
        """Up to `num` of the queries, evenly: their numbers, and their row_splits."""
        rows = np.unique(np.linspace(0, self.num_queries - 1, num).astype(np.int64))
        row_splits = self.points_row_splits if self.queries is None else self.queries_row_splits
        return rows, np.searchsorted(rows, row_splits)

    def ignored(self, ignore_query_point):
        if ignore_query_point == "index" and self.num_queries != len(self.points):
            raise ValueError(
                f"ignore_query_point: expected True or False for {self.num_queries} queries of {len(self.points)} "
                'points, got "index"'
            )
        return _array.choice("ignore_query_point", ignore_query_point, _IGNORES)

    def index(self, cell):
        backend = _array.backend(self.points)
        try:
            return backend.Index(self.points, self.points_row_splits, cell, config.get_num_threads())
        except backend.NotFinite:
            raise _array.not_finite(points=self.points) from None

    def error(self, metric, *, is_bounded):
        """The error for coordinates that a search could not take; `is_bounded` by a radius."""
        error = _array.not_measurable(
            self.points, self.points_row_splits, _METRICS[metric], self.queries, self.queries_row_splits,
            is_bounded=is_bounded
        )  # fmt: skip
        return error or _array.changed("points" if self.queries is None else "points or queries")


def _radius_search(index, cloud, radius, metric, ignore_query_point, max_neighbors, sort, return_distances,
                   count_only):  # fmt: skip
    num_points, backend = len(cloud.points), _array.backend(cloud.points)
    if max_neighbors is not None:
        max_neighbors = min(_array.integer("max_neighbors", max_neighbors, 0), num_points)
    metric, sort = _array.choice("metric", metric, _METRICS), _array.choice("sort", sort, _SORTS)
    ignored = cloud.ignored(ignore_query_point)
    crowding = index.crowding
    if max_neighbors is not None and not count_only and crowding > _CROWDED * (max_neighbors + 16):
        tree = index if np.isinf(crowding) else cloud.index(None)
        return _nearest(tree, cloud, radius, max_neighbors, sort or 1, metric, ignored, return_distances)

    def search(queries, queries_row_splits, radius, count_only):
        try:
            return backend.radius_search(
                index, queries, queries_row_splits, radius, max_neighbors, sort, metric, ignored,
                return_distances and not count_only, count_only, config.check_room, config.get_num_threads(),
            )  # fmt: skip
        except backend.NotFinite:
            raise cloud.error(metric, is_bounded=True) from None

    if not count_only and cloud.num_queries > 4096 and crowding * cloud.num_queries > 2**26:
        # Counting would take long before it could say so: 256 queries say it at once, to a factor of two.
        rows, queries_row_splits = cloud.sample(256)
        sampled = radius[rows] if np.ndim(radius) else radius
        counts = search(
            (cloud.points if cloud.queries is None else cloud.queries)[rows], queries_row_splits, sampled, True
        )
        expected = int(np.mean(np.diff(counts[0])) * cloud.num_queries)
        config.check_room(expected, 4 * expected, estimated=True)
    splits, found, distance = search(cloud.queries, cloud.queries_row_splits, radius, count_only)
    return np.diff(splits) if count_only else Neighbors._trusted(found, splits, num_points, distance)


def lists_of_levels(levels, radii, limits):
    """[(neighbors, pools, upsamples)] of each level, given as (points, row_splits), and the next coarser one.

    On the GPU all searches are asked for before their sizes are waited for, once.
    """
    coarser = [*levels[1:], None]
    if isinstance(levels[0][0], np.ndarray):
        return [_lists_of_level(*each) for each in zip(levels, coarser, radii, limits, strict=True)]
    backend, clouds, searches = _array.backend(levels[0][0]), [], []
    for points, row_splits in levels:
        clouds.append(_Cloud(points, row_splits, "row_splits", None, None, _GRID_DIMENSIONS, known=True))
    indices = [cloud.index(radius) for cloud, radius in zip(clouds, radii, strict=True)]
    options = _SORTS.index("index"), _METRICS.index("l2"), _IGNORES.index(False), False, False, config.check_room
    for number, (index, limit) in enumerate(zip(indices, limits, strict=True)):
        most = None if limit is None else min(limit, index.num_points)
        searches.append(backend.Search(index, None, None, radii[number], most, *options))
        if coarser[number]:
            searches.append(backend.Search(index, *coarser[number], radii[number], most, *options))
            searches.append(backend.Search(indices[number + 1], *levels[number], math.inf, 1, *options))
    try:
        found = backend.radius_searches(searches)
    except backend.NotFinite:
        of_pairs = (_array.not_measurable(*coarse, "l2", *fine) for fine, coarse in itertools.pairwise(levels))
        errors = filter(None, (_array.not_measurable(*levels[0], is_bounded=True), *of_pairs))
        raise next(errors, _array.changed("points")) from None
    lists = [
        Neighbors._trusted(index, splits, search.index.num_points)
        for search, (splits, index, _) in zip(searches, found, strict=True)
    ]
    return [(*lists[i : i + 3], None, None)[:3] for i in range(0, len(lists), 3)]


def _lists_of_level(level, coarser, radius, limit):
    index = GridIndex(level[0], radius, row_splits=level[1])
    if coarser is None:
        return index.radius_search(None, radius, max_neighbors=limit), None, None
    (points, row_splits), (coarse, splits) = level, coarser
    upsamples = knn_search(coarse, points, 1, points_row_splits=splits, queries_row_splits=row_splits)
    return *index._search_with(coarse, splits, radius, limit), upsamples


def _knn_search(index, cloud, k, metric, ignore_query_point, return_distances):
    k = min(_array.integer("k", k, 1), len(cloud.points))
    metric, ignored = _array.choice("metric", metric, _METRICS), cloud.ignored(ignore_query_point)
    return _nearest(index, cloud, math.inf, k, _SORTS.index("distance"), metric, ignored, return_distances)


def _nearest(tree, cloud, radius, k, sort, metric, ignored, return_distances):
    backend = _array.backend(cloud.points)
    try:
        splits, found, distance = backend.knn_search(
            tree, cloud.queries, cloud.queries_row_splits, radius, k, sort, metric, ignored, return_distances,
            config.check_room, config.get_num_threads(),
        )  # fmt: skip
    except backend.NotFinite:
        raise cloud.error(metric, is_bounded=np.ndim(radius) > 0 or math.isfinite(radius)) from None
    return Neighbors._trusted(found, splits, len(cloud.points), distance)

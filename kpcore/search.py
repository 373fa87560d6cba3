"""Neighbour searches, within a radius and for the k nearest points, and indexes that serve several searches."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias, TypedDict, overload

import numpy as np

from kpcore import config
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray
from kpcore.neighbors import Flow, Neighbors, new_list

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from typing_extensions import Unpack

__all__ = ["GridIndex", "KDTree", "knn_graph", "knn_search", "radius_search"]

Metric: TypeAlias = Literal["l2", "l1", "linf"]
Sort: TypeAlias = Literal["index", "distance"]
IgnoreQueryPoint: TypeAlias = Literal["index"] | bool

_SORTS = (None, "index", "distance")
_METRICS = ("l2", "l1", "linf")
_IGNORES = (False, True, "index")
_GRID_DIMENSIONS = (2, 3)
# Above 16 dimensions knn_search compares each query with every point: the cells and boxes of an index exclude few.
_KNN_DIMENSIONS = range(1, 1025)
# A search with max_neighbors takes a kd-tree, which need not test all points within the radius, if the cell of a point
# holds on average more than 8 * (max_neighbors + 16) points.
_CROWDED = 8


@overload
def radius_search(points: AnyArray, queries: AnyArray | None, radius: float | AnyArray, *,
                  points_row_splits: AnyArray | None = None, queries_row_splits: AnyArray | None = None,
                  inclusive: bool = True, metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                  max_neighbors: int | None = None, sort: Sort | None = "index", return_distances: bool = False,
                  count_only: Literal[False] = False) -> Neighbors: ...  # fmt: skip


@overload
def radius_search(points: AnyArray, queries: AnyArray | None, radius: float | AnyArray, *,
                  points_row_splits: AnyArray | None = None, queries_row_splits: AnyArray | None = None,
                  inclusive: bool = True, metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                  max_neighbors: int | None = None, sort: Sort | None = "index", return_distances: bool = False,
                  count_only: Literal[True]) -> np.ndarray: ...  # fmt: skip


def radius_search(points: AnyArray, queries: AnyArray | None, radius: float | AnyArray, *,
                  points_row_splits: AnyArray | None = None, queries_row_splits: AnyArray | None = None,
                  inclusive: bool = True, metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                  max_neighbors: int | None = None, sort: Sort | None = "index", return_distances: bool = False,
                  count_only: bool = False) -> Neighbors | np.ndarray:  # fmt: skip
    """All points within a radius of each query, or how many; L2, L1 or Linf, 1 to 16 dimensions, batches.

    A point x is a neighbour of q if ``|x - q| <= radius``. With d = x - q, in the dtype of the coordinates and on every
    machine alike, that is ``(d0*d0 + d1*d1) + d2*d2 <= r*r`` ("l2"), ``(|d0| + |d1|) + |d2| <= r`` ("l1") or
    ``max(|d0|, |d1|, |d2|) <= r`` ("linf"); with ``inclusive=False`` it is ``<`` in all of these. A query that is one
    of the points is a neighbour of itself, unless `ignore_query_point` says otherwise.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        None: the points themselves.
    radius : float, or (M,) of the dtype of the points
        One for all queries, or one for each; in the unit of the points, above zero. A number is rounded to the dtype of
        the points.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
        Batch items of points and queries, both or neither; a query's neighbours are points of the same item. With
        ``queries=None`` only ``points_row_splits``.
    inclusive : bool
        Whether points at exactly the radius are neighbours. The published code of KPConv, among others, searches with
        an exclusive radius: pass False for the same neighbours.
    metric : {"l2", "l1", "linf"}
    ignore_query_point : bool or "index"
        True: points with exactly the coordinates of the query are not its neighbours (as in Open3D). "index": point i
        is not a neighbour of query i, but other points with its coordinates are; needs as many queries as points.
    max_neighbors : int, optional
        Keep at most this many neighbours of each query, the nearest (of equally near ones those with the smallest
        index). On the GPU such a search does not wait for the device: ``Neighbors.index`` is allocated for the largest
        possible number of pairs, and coordinates that are not finite, or distances that vanish, are not an error.
    sort : {"index", "distance", None}
        Order within a row: by point index; by (distance, index); or unspecified, which is fastest.
    return_distances : bool
        Whether the result has ``Neighbors.distance``, in the dtype of the points.
    count_only : bool
        Return only the number of neighbours of each query, (M,) int64, which takes no memory for the neighbours.

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
        For a result larger than the free memory, or than the limit of `set_memory_limit`; raised before memory is
        allocated. The message has the place of the query with the most neighbours, as a result can be too large because
        of one place: 30,000 points within the radius of each other are 900,000,000 pairs.

    Notes
    -----
    In two and three dimensions the search uses a grid of cells as wide as the radius. It uses a kd-tree in other
    dimensions, if the largest radius is more than 4 times the median, and if points lie more than 10^6 radii apart; the
    result is the same. Time is proportional to the number of pairs of points within 3 radii of each other, memory to
    the points and the result. If a fixed volume holds more and more points, the number of pairs within a radius grows
    with the square of their number.

    A distance that overflows is beyond any radius. One that vanishes (below 1e-19 in float32) is within any radius, and
    may be returned as 0.

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
    >>> kp.radius_search(points, None, 2.0, ignore_query_point="index", inclusive=False).counts
    array([1, 1, 0])
    """
    cloud = _Cloud(points, points_row_splits, "points_row_splits", queries, queries_row_splits)
    radius, reach, even = cloud.radius(radius)
    cell = reach if even and cloud.points.shape[1] in _GRID_DIMENSIONS else None
    return _radius_search(cloud.index(cell), cloud, radius, inclusive, metric, ignore_query_point, max_neighbors, sort,
                          return_distances, count_only)  # fmt: skip


def knn_search(points: AnyArray, queries: AnyArray | None, k: int, *, points_row_splits: AnyArray | None = None,
               queries_row_splits: AnyArray | None = None,
               metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
               return_distances: bool = False) -> Neighbors:  # fmt: skip
    """The k nearest points of each query, by (distance, index); L2 in 1 to 1,024 dimensions, L1 or Linf in 1 to 16.

    Distances are computed and compared as in `radius_search`; of equally near points those with the smallest index come
    first. A row is shorter than k only if its batch item has fewer points.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 1,024
    queries : (M, D), same dtype, or None
        None: the points themselves; each is then its own nearest neighbour, unless `ignore_query_point` is set.
    k : int
        At least 1.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
        Batch items, as in `radius_search`.
    metric : {"l2", "l1", "linf"}
        In more than 16 dimensions only "l2".
    ignore_query_point : bool or "index"
        As in `radius_search`; the result has the k nearest of the other points.
    return_distances : bool

    Returns
    -------
    Neighbors

    Raises
    ------
    ValueError
        Also for coordinates whose distances overflow or vanish, so that they would compare equal: if for some batch
        item the length of the diagonal of the box around its points and queries, in the metric and squared for "l2", is
        not zero and lies above the largest or below the smallest normal number of the dtype (for "l2" in float32, for
        boxes larger than about 1e19 or smaller than about 1e-19).
    ValueError, TypeError, MemoryError
        As `radius_search`.

    Notes
    -----
    Up to 16 dimensions a kd-tree is searched. In more, as for features of a network, a tree would visit all its leaves,
    so each query is compared with all points of its batch item by a product of matrices, in time proportional to
    M * N * D. The product only selects: what it cannot exclude is measured by the formula of `radius_search`, so the
    result is exact and has the same bits on every machine. Memory beyond the result is some MiB for each thread, at
    most 64 MiB on the GPU; no (M, N) matrix exists. Where the rounding error of the product is larger than the
    differences of distances, as among very many nearly equal points, more is measured and the time may be ten times as
    long.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.0], [1.0], [3.0]])
    >>> kp.knn_search(points, None, 2).to_padded()
    array([[0, 1],
           [1, 0],
           [2, 1]], dtype=int32)
    """
    cloud = _Cloud(points, points_row_splits, "points_row_splits", queries, queries_row_splits, _KNN_DIMENSIONS)
    return _nearest_of_cloud(cloud, k, metric, ignore_query_point, return_distances)


def knn_graph(points: AnyArray, k: int, *, row_splits: AnyArray | None = None, loop: bool = False,
              flow: Flow = "source_to_target") -> np.ndarray:  # fmt: skip
    """The edges from the k nearest points to each point: `knn_search` in the form of PyTorch Geometric.

    Parameters
    ----------
    points : (N, D) float32 or float64, D as in `knn_search`
    k : int
        At least 1.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items, which edges do not leave; `batch_to_row_splits` makes them from a batch vector.
    loop : bool
        Whether a point may be its own neighbour. Other points with its coordinates always may.
    flow : {"source_to_target", "target_to_source"}
        The rows of the result are (neighbours, points), or (points, neighbours).

    Returns
    -------
    (2, E) int64
        The edges of point 0 first, the nearest neighbour first.

    Raises
    ------
    ValueError, TypeError, MemoryError
        As `knn_search`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.knn_graph(np.array([[0.0], [1.0], [3.0]]), 1)
    array([[1, 0, 1],
           [0, 1, 2]])
    """
    ignored = False if checks.boolean("loop", loop) else "index"
    cloud = _Cloud(points, row_splits, "row_splits", None, None, _KNN_DIMENSIONS)
    return _nearest_of_cloud(cloud, k, "l2", ignored, False).edge_index(flow)


class _KnnOptions(TypedDict, total=False):
    """The options of `KDTree.knn_search`."""

    queries_row_splits: AnyArray | None
    metric: Metric
    ignore_query_point: IgnoreQueryPoint
    return_distances: bool


class KDTree:
    """Points indexed once for searches of any radius and of the k nearest, in 1 to 16 dimensions.

    Holds a copy of the points; may be searched from many threads at once. A pickle holds the points only; the tree is
    rebuilt from them. Searches return the same bits as the functions `radius_search` and `knn_search`.

    Parameters
    ----------
    points : (N, D) float32 or float64
    row_splits : (B + 1,) int64, optional
        Bounds of batch items; a query's neighbours are points of the same item.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> tree = kp.KDTree(np.random.default_rng(0).random((100, 5)))
    >>> tree.radius_search(None, 0.5).num_queries, tree.knn_search(None, 3).num_pairs
    (100, 300)
    """

    __slots__ = ("_cell", "_index", "stored_points", "stored_row_splits")
    _dimensions: ClassVar[Sequence[int]] = checks.DIMENSIONS

    def __init__(self, points: AnyArray, *, row_splits: AnyArray | None = None) -> None:
        cloud = _Cloud(points, row_splits, "row_splits", None, None, self._dimensions)
        self._set_points(cloud, None)

    def _set_points(self, cloud, cell):
        """Copy the points of `cloud` and build the index: a grid of cells of this width, or a kd-tree for None."""
        cloud.points = cloud.points.copy()
        self.stored_points, self.stored_row_splits, self._cell = cloud.points, cloud.points_row_splits.copy(), cell
        self._index = cloud.index(cell)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.stored_points)} points, {self.stored_points.shape[1]} dimensions)"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.stored_points, self.stored_row_splits, self._cell)

    def _cloud(self, queries, queries_row_splits):
        """The indexed points and these queries, checked."""
        splits = self.stored_row_splits if queries is None or queries_row_splits is not None else None
        if splits is None and len(self.stored_row_splits) != 2:
            raise ValueError("queries_row_splits: expected an array, because the points are in batches, got None")
        return _Cloud(
            self.stored_points, splits, "row_splits", queries, queries_row_splits, self._dimensions, known=True
        )

    @overload
    def radius_search(self, queries: AnyArray | None, radius: float | AnyArray, *,
                      queries_row_splits: AnyArray | None = None,
                      inclusive: bool = True, metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                      max_neighbors: int | None = None, sort: Sort | None = "index", return_distances: bool = False,
                      count_only: Literal[False] = False) -> Neighbors: ...  # fmt: skip

    @overload
    def radius_search(self, queries: AnyArray | None, radius: float | AnyArray, *,
                      queries_row_splits: AnyArray | None = None,
                      inclusive: bool = True, metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                      max_neighbors: int | None = None, sort: Sort | None = "index", return_distances: bool = False,
                      count_only: Literal[True]) -> np.ndarray: ...  # fmt: skip

    def radius_search(self, queries: AnyArray | None, radius: float | AnyArray, *,
                      queries_row_splits: AnyArray | None = None,
                      inclusive: bool = True, metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                      max_neighbors: int | None = None, sort: Sort | None = "index", return_distances: bool = False,
                      count_only: bool = False) -> Neighbors | np.ndarray:  # fmt: skip
        """As the function `radius_search`, but with the index of this object."""
        cloud = self._cloud(queries, queries_row_splits)
        radius, reach, _ = cloud.radius(radius)
        index = self._index
        if self._cell is not None and reach > self._cell:
            index = cloud.index(reach)
        return _radius_search(index, cloud, radius, inclusive, metric, ignore_query_point, max_neighbors, sort,
                              return_distances, count_only)  # fmt: skip

    def knn_search(self, queries: AnyArray | None, k: int, *, queries_row_splits: AnyArray | None = None,
                   metric: Metric = "l2", ignore_query_point: IgnoreQueryPoint = False,
                   return_distances: bool = False) -> Neighbors:  # fmt: skip
        """As the function `knn_search`, but with the index of this object."""
        cloud = self._cloud(queries, queries_row_splits)
        return _knn_search(self._index, cloud, k, metric, ignore_query_point, return_distances)


class GridIndex(KDTree):
    """Points in cells, indexed once for searches with radii up to the cell, in two and three dimensions.

    Faster than a `KDTree` for queries as dense as the points. Points more than about 10^6 cells apart are indexed by a
    kd-tree, unless they are sparse. A search with a radius larger than the cell builds another grid in each call, which
    is faster than searching more of the smaller cells. The first call of `knn_search` builds a kd-tree and keeps it.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 2 or 3
    cell : float
        Edge of a cell, in the unit of the points, above zero: take the largest search radius.
    row_splits : (B + 1,) int64, optional

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> grid = kp.GridIndex(np.random.default_rng(0).random((100, 3)), 0.3)
    >>> [grid.radius_search(None, r).num_pairs > 100 for r in (0.2, 0.3, 0.5)]
    [True, True, True]
    """

    __slots__ = ("_tree",)
    _dimensions: ClassVar[Sequence[int]] = _GRID_DIMENSIONS

    def __init__(self, points: AnyArray, cell: float, *, row_splits: AnyArray | None = None) -> None:
        cloud = _Cloud(points, row_splits, "row_splits", None, None, self._dimensions)
        self._set_points(cloud, checks.length("cell", cell, cloud.points.dtype))
        self._tree = None

    def knn_search(self, queries: AnyArray | None, k: int, **options: Unpack[_KnnOptions]) -> Neighbors:
        """As the function `knn_search`, with a kd-tree that the first call builds."""
        if self._tree is None:
            self._tree = KDTree(self.stored_points, row_splits=self.stored_row_splits)
        return self._tree.knn_search(queries, k, **options)

    def _search_points_and(self, queries, queries_row_splits, radius, inclusive, max_neighbors):
        """(list of the points themselves, list of the queries): the results of two calls of `radius_search`.

        One search over both takes three quarters of the time of two, as it collects the points near a cell once.
        """
        cloud = self._cloud(queries, queries_row_splits)
        num_points = len(self.stored_points)
        cloud.queries = np.concatenate([self.stored_points, cloud.queries])
        cloud.queries_row_splits = np.concatenate([self.stored_row_splits, num_points + cloud.queries_row_splits[1:]])
        cloud.num_queries = len(cloud.queries)
        both = _radius_search(
            self._index, cloud, cloud.radius(radius)[0], inclusive, "l2", False, max_neighbors, "index", False, False
        )
        splits = both.stored_row_splits
        pairs_of_points = splits[num_points]
        return (
            new_list(both.stored_index[:pairs_of_points], splits[: num_points + 1], num_points),
            new_list(both.stored_index[pairs_of_points:], splits[num_points:] - pairs_of_points, num_points),
        )


def _rebuilt(cls, points, row_splits, cell):  # pickles name this function: it cannot be renamed
    made = cls.__new__(cls)
    if cell is None:  # not made.__init__: that of kpcore.torch takes tensors
        KDTree.__init__(made, points, row_splits=row_splits)
    else:
        GridIndex.__init__(made, points, cell, row_splits=row_splits)
    return made


class _Cloud:
    """Points and queries of one search, checked; with queries=None, `queries` and its row_splits stay None."""

    def __init__(self, points, points_row_splits, name, queries, queries_row_splits, dimensions=checks.DIMENSIONS,
                 known=False):  # fmt: skip
        """`known`: the points' row_splits were checked before."""
        sizes = {}
        points = checks.points_array("points", points, sizes, dimensions=dimensions)
        if queries is not None:
            queries = checks.points_array("queries", queries, sizes, dimensions=dimensions, like=("points", points))
        elif queries_row_splits is not None:
            raise ValueError("queries_row_splits: expected None, because queries are the points, got an array")
        if queries is not None and (points_row_splits is None) != (queries_row_splits is None):
            both = "queries_row_splits", name
            present, missing = both if points_row_splits is None else both[::-1]
            raise ValueError(f"{missing}: expected an array, because {present} is one, got None")
        points_row_splits = checks.splits_array(name, points_row_splits, len(points), "points", sizes, known=known)
        if queries is not None:
            queries_row_splits = checks.splits_array(
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
        """(checked radius, the largest of its values, whether that is at most 4 times the median)"""
        if devices.is_array(radius) and radius.ndim:
            radius, on_host = checks.lengths("radius", radius, self.num_queries, ("points", self.points))
            reach = float(on_host.max(initial=0))
            return radius, reach, bool(len(on_host)) and reach <= 4 * np.median(on_host)
        radius = checks.length("radius", radius, self.points.dtype)
        return radius, radius, True

    def sample(self, num):
        """(numbers of up to `num` queries, evenly spaced, and the row_splits of a batch of these)"""
        rows = np.unique(np.linspace(0, self.num_queries - 1, num).astype(np.int64))
        row_splits = self.points_row_splits if self.queries is None else self.queries_row_splits
        return rows, np.searchsorted(rows, row_splits)

    def fullest(self, counts, rows=None):
        """The query with the most of these neighbours, in words; `rows` has the queries if not all are counted.

        A result is too large because of a radius that is too large everywhere, or of one place: 30,000 points within it
        have 900,000,000 pairs.
        """
        place = int(counts.argmax())
        queries = self.points if self.queries is None else self.queries
        coordinates = devices.on_host(queries[place if rows is None else int(rows[place])])
        at = ", ".join(map(str, coordinates))
        return f"the one at ({at}) has the most, {int(counts[place])}"

    def ignored(self, ignore_query_point):
        """The number of the option in _IGNORES, checked."""
        if ignore_query_point == "index" and self.num_queries != len(self.points):
            raise ValueError(
                f"ignore_query_point: expected True or False for {self.num_queries} queries of {len(self.points)} "
                'points, got "index"'
            )
        return checks.choice("ignore_query_point", ignore_query_point, _IGNORES)

    def index(self, cell):
        """An index of the points: a grid of cells of this width, or a kd-tree for None."""
        backend = devices.backend(self.points)
        try:
            return backend.Index(self.points, self.points_row_splits, cell, config.get_num_threads())
        except backend.NotFinite:
            raise checks.not_finite(points=self.points) from None

    def error(self, metric, *, is_bounded):
        """The error for coordinates that are not finite, or whose distances overflow or vanish."""
        error = checks.not_measurable(
            self.points, self.points_row_splits, _METRICS[metric], self.queries, self.queries_row_splits,
            is_bounded=is_bounded
        )  # fmt: skip
        return error or checks.changed("points" if self.queries is None else "points or queries")


def _radius_search(index, cloud, radius, inclusive, metric, ignore_query_point, max_neighbors, sort, return_distances,
                   count_only):  # fmt: skip
    num_points, backend = len(cloud.points), devices.backend(cloud.points)
    inclusive = checks.boolean("inclusive", inclusive)
    if max_neighbors is not None:
        max_neighbors = min(checks.integer("max_neighbors", max_neighbors, 0), num_points)
    metric, sort = checks.choice("metric", metric, _METRICS), checks.choice("sort", sort, _SORTS)
    ignored = cloud.ignored(ignore_query_point)
    crowding = index.crowding
    if max_neighbors is not None and not count_only and crowding > _CROWDED * (max_neighbors + 16):
        tree = index if np.isinf(crowding) else cloud.index(None)
        return _nearest(tree, cloud, radius, inclusive, max_neighbors, sort or 1, metric, ignored, return_distances)

    def check_room(*size, **free):
        try:
            config.check_room(*size, **free)
        except MemoryError as error:
            if max_neighbors is not None:
                raise
            counts = np.diff(search(cloud.queries, cloud.queries_row_splits, radius, True)[0])
            raise MemoryError(f"{error}; of {len(counts)} queries {cloud.fullest(counts)}") from None

    def search(queries, queries_row_splits, radius, count_only):
        try:
            return backend.radius_search(
                index, queries, queries_row_splits, radius, inclusive, max_neighbors, sort, metric, ignored,
                return_distances and not count_only, count_only, check_room, config.get_num_threads(),
            )  # fmt: skip
        except backend.NotFinite:
            raise cloud.error(metric, is_bounded=True) from None

    if not count_only and cloud.num_queries > 4096 and crowding * cloud.num_queries > 2**26:
        # The result may exceed the memory, and counting its pairs would take minutes: estimate them from 256 queries,
        # which is right to a factor of two.
        rows, queries_row_splits = cloud.sample(256)
        sampled = radius[rows] if np.ndim(radius) else radius
        counts = search(
            (cloud.points if cloud.queries is None else cloud.queries)[rows], queries_row_splits, sampled, True
        )
        counts = np.diff(counts[0])
        expected = int(np.mean(counts) * cloud.num_queries)
        try:
            config.check_room(expected, 4 * expected, estimated=True)
        except MemoryError as error:
            raise MemoryError(f"{error}; of {len(rows)} queries {cloud.fullest(counts, rows)}") from None
    splits, neighbors, distance = search(cloud.queries, cloud.queries_row_splits, radius, count_only)
    return np.diff(splits) if count_only else new_list(neighbors, splits, num_points, distance)


def lists_of_levels(
    levels: Sequence[tuple[np.ndarray, np.ndarray]],
    radii: Sequence[float],
    limits: Sequence[int | None],
    upsample_levels: Collection[int] = (),
    inclusive: bool = True,
) -> list[tuple[Neighbors, Neighbors | None, Neighbors | None]]:
    """[(neighbors, pools, upsamples), ...], one for each level; `levels` are (points, row_splits), the finest first.

    `upsamples` of a level has the nearest point of the next level for each point, or on the levels in `upsample_levels`
    the points within the radius of the next level, at most as many as its limit. `inclusive` as in `radius_search`.

    On the GPU all searches are launched before the first size is read, so that this waits for the device once.
    """
    coarser = [*levels[1:], None]
    ups = [
        (radii[number + 1], limits[number + 1]) if number in upsample_levels else (math.inf, 1)
        for number in range(len(levels) - 1)
    ]
    if isinstance(levels[0][0], np.ndarray):
        each = zip(levels, coarser, radii, limits, [*ups, None], strict=True)
        return [_lists_of_level(*arguments, inclusive) for arguments in each]
    backend, clouds, searches = devices.backend(levels[0][0]), [], []
    for points, row_splits in levels:
        clouds.append(_Cloud(points, row_splits, "row_splits", None, None, _GRID_DIMENSIONS, known=True))
    indices = [cloud.index(radius) for cloud, radius in zip(clouds, radii, strict=True)]
    options = _SORTS.index("index"), _METRICS.index("l2"), _IGNORES.index(False), False, False, config.check_room
    for number, (index, limit) in enumerate(zip(indices, limits, strict=True)):
        most = _at_most(limit, index)
        searches.append(backend.Search(index, None, None, radii[number], inclusive, most, *options))
        if coarser[number]:
            searches.append(backend.Search(index, *coarser[number], radii[number], inclusive, most, *options))
            (radius, limit), above = ups[number], indices[number + 1]
            searches.append(backend.Search(above, *levels[number], radius, inclusive, _at_most(limit, above), *options))
    try:
        results = backend.radius_searches(searches)
    except backend.NotFinite:
        upsample_errors = (checks.not_measurable(*coarse, "l2", *fine) for fine, coarse in itertools.pairwise(levels))
        errors = filter(None, (checks.not_measurable(*levels[0], is_bounded=True), *upsample_errors))
        raise next(errors, checks.changed("points")) from None
    lists = [
        new_list(index, splits, search.index.num_points)
        for search, (splits, index, _) in zip(searches, results, strict=True)
    ]
    return [(*lists[i : i + 3], None, None)[:3] for i in range(0, len(lists), 3)]


def _at_most(limit, index):
    return None if limit is None else min(limit, index.num_points)


def _lists_of_level(level, coarser, radius, limit, up, inclusive):
    """(neighbors, pools, upsamples) of one level on the CPU."""
    index = GridIndex(level[0], radius, row_splits=level[1])
    if coarser is None:
        return index.radius_search(None, radius, inclusive=inclusive, max_neighbors=limit), None, None
    (points, row_splits), (coarse, splits) = level, coarser
    bounds = {"points_row_splits": splits, "queries_row_splits": row_splits}
    if up == (math.inf, 1):
        upsamples = knn_search(coarse, points, 1, **bounds)
    else:
        upsamples = radius_search(coarse, points, up[0], inclusive=inclusive, max_neighbors=up[1], **bounds)
    return *index._search_points_and(coarse, splits, radius, inclusive, limit), upsamples


def _knn_search(index, cloud, k, metric, ignore_query_point, return_distances):
    k = min(checks.integer("k", k, 1), len(cloud.points))
    metric, ignored = checks.choice("metric", metric, _METRICS), cloud.ignored(ignore_query_point)
    return _nearest(index, cloud, math.inf, True, k, _SORTS.index("distance"), metric, ignored, return_distances)


def _nearest_of_cloud(cloud, k, metric, ignore_query_point, return_distances):
    """The list of the k nearest points of each query, in any number of dimensions."""
    if cloud.points.shape[1] not in checks.DIMENSIONS:
        return _feature_search(cloud, k, metric, ignore_query_point, return_distances)
    return _knn_search(cloud.index(None), cloud, k, metric, ignore_query_point, return_distances)


def _feature_search(cloud, k, metric, ignore_query_point, return_distances):
    """The list of the k nearest points of each query, by a product of queries and points instead of an index."""
    k = min(checks.integer("k", k, 1), len(cloud.points))
    if _METRICS[checks.choice("metric", metric, _METRICS)] != "l2":
        raise ValueError(
            f"metric: expected 'l2' for points with more than {checks.DIMENSIONS[-1]} dimensions, got {metric!r} for "
            f"{cloud.points.shape[1]}"
        )
    ignored, backend = cloud.ignored(ignore_query_point), devices.backend(cloud.points)
    try:
        splits, neighbors, distance = backend.feature_search(
            cloud.points, cloud.points_row_splits, cloud.queries, cloud.queries_row_splits, k, ignored,
            return_distances, config.check_room, config.get_num_threads(),
        )  # fmt: skip
    except backend.NotFinite:
        raise cloud.error(_METRICS.index("l2"), is_bounded=False) from None
    return new_list(neighbors, splits, len(cloud.points), distance)


def _nearest(tree, cloud, radius, inclusive, k, sort, metric, ignored, return_distances):
    """The list of the k nearest points of each query within the radius."""
    backend = devices.backend(cloud.points)
    try:
        splits, neighbors, distance = backend.knn_search(
            tree, cloud.queries, cloud.queries_row_splits, radius, inclusive, k, sort, metric, ignored,
            return_distances, config.check_room, config.get_num_threads(),
        )  # fmt: skip
    except backend.NotFinite:
        raise cloud.error(metric, is_bounded=np.ndim(radius) > 0 or math.isfinite(radius)) from None
    return new_list(neighbors, splits, len(cloud.points), distance)

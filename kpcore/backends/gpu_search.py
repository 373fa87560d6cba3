"""Neighbor search on the GPU: builds an index of cells or boxes and launches searches; see neighbors.cu."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import cupy
import numpy as np

from kpcore.backends.gpu_launch import WARP, NotFinite, ctype, free_memory, kernels_of, launch, product, wait

_BY_INDEX, _BY_DISTANCE = 1, 2  # Sort
_EQUAL, _INDEX = 1, 2  # Ignore
_L2 = 0  # Metric.l2
# Of a search by products: 2,048 queries with 4,096 points at a time in float32; fewer queries if their lists are long.
_ROWS_AT_ONCE, _PRODUCT_BYTES, _LIST_BYTES = 2048, 32 << 20, 8 << 20
_NO_CELLS = {"starts": None, "inverse_cell": 0, "bits_x": 0, "bits_y": 0, "bits_z": 0}


class Index:
    """A search index of cells or of boxes along a curve: see neighbors.cu. It is built at the first search."""

    crowding = 0.0  # not computed: no choice on the GPU depends on it

    def __init__(self, points, row_splits, cell, threads):
        self.points, self.row_splits, self.cell = points, row_splits, cell
        self.num_points, self.dtype = len(points), points.dtype

    def kernels(self, metric):
        return kernels_of("neighbors.cu", KP_T=ctype(self.dtype), KP_DIM=self.points.shape[1], KP_METRIC=metric,
                          KP_TREE=int(self.cell is None))  # fmt: skip

    @functools.cached_property
    def tree(self):
        """An index of boxes over the same points."""
        return self if self.cell is None else Index(self.points, self.row_splits, None, None)

    def _located(self, order):
        words = (self.dtype.itemsize * self.points.shape[1] + 4) // 4
        words += words % (self.dtype.itemsize // 4)
        located = cupy.empty((self.num_points, words), np.uint32)
        launch(self.kernels(0)["locate"], self.num_points, points=self.points, order=order, num_points=self.num_points,
               located=located)  # fmt: skip
        return located

    @functools.cached_property
    def _cells(self):
        """({parameter of search kernels: value}, array of one: whether a coordinate is not finite)"""
        n, axes, kernels = self.num_points, min(3, self.points.shape[1]), self.kernels(0)
        total = max(axes, min(27, int(2 * n - 1).bit_length()))  # bits: the table has one or two cells for each point
        bits = {f"bits_{axis}": (total + axes - 1 - a) // axes if a < axes else 0 for a, axis in enumerate("xyz")}
        settings = {"inverse_cell": 1 / self.cell, **bits}
        keys, not_finite = cupy.empty(n, np.int32), cupy.zeros(1, np.uint32)
        launch(kernels["cell_keys"], n, points=self.points, num_points=n, **settings, keys=keys, not_finite=not_finite)
        order = cupy.argsort(keys)
        num_cells = 1 << sum(bits.values())
        starts = cupy.empty(num_cells + 1, np.int32)
        launch(kernels["cell_starts"], num_cells + 1, keys=keys[order], num_points=n, num_cells=num_cells,
               starts=starts)  # fmt: skip
        index = {"located": self._located(order), "starts": starts, **settings, "boxes": None, "num_points": n}
        return index, not_finite

    @functools.cached_property
    def _boxes(self):
        """(the same two as `_cells`, {parameter: value} for finding the position of a query on the curve)"""
        (n, dimension), kernels = self.points.shape, self.kernels(0)
        items = len(self.row_splits) - 1
        bits = min(21, (63 - items.bit_length()) // min(3, dimension))
        curve = {"low": cupy.amin(self.points, 0), "high": cupy.amax(self.points, 0), "bits": bits}
        keys, not_finite = cupy.empty(n, np.int64), cupy.zeros(1, np.uint32)
        launch(kernels["curve_keys"], n, points=self.points, num_points=n, row_splits=self.row_splits, num_items=items,
               **curve, keys=keys, not_finite=not_finite)  # fmt: skip
        order = cupy.argsort(keys)
        located = self._located(order)
        nodes = [-(-n // WARP)]
        while nodes[-1] > WARP:
            nodes.append(-(-nodes[-1] // WARP))
        boxes = cupy.empty((sum(nodes), 2, dimension), self.dtype)
        launch(kernels["leaf_boxes"], nodes[0] * WARP, located=located, num_points=n, boxes=boxes)
        first = 0
        for below, number in pairwise(nodes):
            launch(kernels["node_boxes"], number * dimension, below=boxes[first : first + below], num_below=below,
                   boxes=boxes[first + below : first + below + number])  # fmt: skip
            first += below
        index = {"located": located, "boxes": boxes, "num_points": n, **_NO_CELLS}
        return index, not_finite, {"keys": keys[order], **curve}

    def parameters(self, queries, queries_row_splits, radius, inclusive, ignore):
        """({parameter of search kernels: value}, array of one: whether a coordinate of the points is not finite)"""
        index, not_finite = (self._boxes if self.cell is None else self._cells)[:2]
        if queries is None:
            queries, queries_row_splits = self.points, self.row_splits
        per_query = isinstance(radius, cupy.ndarray)
        search = {"queries": queries, "num_queries": len(queries),
                 "radii": radius if per_query else cupy.full(1, radius, self.dtype), "radius_stride": per_query,
                 "is_inclusive": inclusive, "row_splits": self.row_splits, "queries_row_splits": queries_row_splits,
                 "num_items": len(queries_row_splits) - 1, "ignore": ignore}  # fmt: skip
        return index | search, not_finite

    def is_empty(self, queries):
        """Whether there are no points to search. Raises NotFinite if a query is not finite then."""
        if self.num_points or queries is None:
            return not self.num_points
        if len(queries) and not bool(cupy.isfinite(queries).all()):
            raise NotFinite
        return True


class Search(NamedTuple):
    """The arguments of `radius_search`, except `threads`."""

    index: Index
    queries: cupy.ndarray | None
    queries_row_splits: cupy.ndarray | None
    radius: float | cupy.ndarray
    inclusive: bool
    max_neighbors: int | None
    sort: int
    metric: int
    ignore: int
    return_distances: bool
    count_only: bool
    check_room: Callable

    @property
    def num_queries(self):
        return self.index.num_points if self.queries is None else len(self.queries)

    @property
    def is_unbounded(self):
        return not isinstance(self.radius, cupy.ndarray) and self.radius == math.inf

    def launch(self, index, kernel, /, **values):
        """Launch a kernel with a warp for each query. Returns an array of one: whether a point is not finite."""
        shared, not_finite = index.parameters(self.queries, self.queries_row_splits, self.radius, self.inclusive,
                                              self.ignore)  # fmt: skip
        launch(index.kernels(self.metric)[kernel], self.num_queries * WARP, **shared, **values)
        return not_finite

    def empty_result(self):
        """(row_splits, index, distance) without pairs"""
        return (cupy.zeros(self.num_queries + 1, np.int64), cupy.empty(0, np.int32),
                cupy.empty(0, self.index.dtype) if self.return_distances else None)  # fmt: skip


def radius_search(index, queries, queries_row_splits, radius, inclusive, max_neighbors, sort, metric, ignore,
                  return_distances, count_only, check_room, threads):  # fmt: skip
    """(row_splits, index, distance). Waits once, for the number of pairs; does not wait if max_neighbors is given."""
    return radius_searches([Search(index, queries, queries_row_splits, radius, inclusive, max_neighbors, sort, metric,
                                   ignore, return_distances, count_only, check_room)])[0]  # fmt: skip


def radius_searches(searches):
    """The results of several searches, waiting once for all of them.

    Searches with max_neighbors do not wait: coordinates that are not finite are reported only if another search waits.
    """
    results, counted, bounded_not_finite = [], [], []
    for place, search in enumerate(searches):
        results.append(None)
        bounded = search.max_neighbors is not None and not search.count_only
        if search.index.is_empty(search.queries) or (bounded and search.max_neighbors == 0):
            results[place] = search.empty_result()
        elif bounded:
            results[place], not_finite = _nearest_within(search)
            bounded_not_finite += not_finite
        else:
            counted.append((place, search, *_count(search)))
    if counted:
        sizes = (n for *_, splits, not_finite in counted for n in (splits[-1:], *not_finite))
        numbers = iter(wait(*bounded_not_finite, *sizes))
        if any(next(numbers) for _ in bounded_not_finite):
            raise NotFinite
        for place, search, splits, not_finite in counted:
            pairs, flags = next(numbers), [next(numbers) for _ in not_finite]
            if any(flags):
                raise NotFinite
            results[place] = (splits, None, None) if search.count_only else _fill(search, splits, pairs)
    return results


def _count(search):
    """(row_splits, two arrays of one: whether a coordinate of the points, of the queries, is not finite)"""
    splits, index = cupy.zeros(search.num_queries + 1, np.int64), search.index
    max_neighbors = index.num_points if search.max_neighbors is None else search.max_neighbors
    queries_not_finite = cupy.zeros(1, np.uint32)
    points_not_finite = search.launch(index, "radius_count", max_neighbors=max_neighbors, counts=splits[1:],
                                      not_finite=queries_not_finite)  # fmt: skip
    return cupy.cumsum(splits), (points_not_finite, queries_not_finite)


def _fill(search, splits, pairs):
    dtype, measured = search.index.dtype, search.return_distances or search.sort == _BY_DISTANCE
    search.check_room(pairs, pairs * (4 + search.return_distances * dtype.itemsize), free=free_memory)
    index, distance = cupy.empty(pairs, np.int32), cupy.empty(pairs, dtype) if measured else None
    search.launch(search.index, "radius_fill", out_row_splits=splits, sort=search.sort, index=index, distance=distance)
    return splits, index, distance if search.return_distances else None


def check_boxes(points, row_splits, metric, not_measurable, queries=None, queries_row_splits=None):
    """Set `not_measurable` to 1 if distances between a batch item's points and queries overflow or underflow.

    Returns the sides (items, D) of the boxes around them, which are only set where an item has points and queries.
    """
    (n, dimension), items = points.shape, len(row_splits) - 1
    kernels = kernels_of("boxes.cu", KP_T=ctype(points.dtype), KP_METRIC=metric)
    boxes, sides = cupy.full((items, 2, dimension), 2**64 - 1, np.uint64), cupy.empty((items, dimension), points.dtype)
    launch(kernels["grow_boxes"], n, points=points, num_points=n, dimension=dimension, row_splits=row_splits,
           num_items=items, boxes=boxes)  # fmt: skip
    if queries is not None:
        m = len(queries)
        launch(kernels["grow_boxes"], m, points=queries, num_points=m, dimension=dimension,
               row_splits=queries_row_splits, num_items=items, boxes=boxes)  # fmt: skip
    else:
        queries_row_splits = row_splits
    launch(kernels["check_boxes"], items, boxes=boxes, dimension=dimension, row_splits=row_splits,
           queries_row_splits=queries_row_splits, num_items=items, sides=sides,
           not_measurable=not_measurable)  # fmt: skip
    return sides


def _nearest(search, k, sort):
    """(counts (M,), index (M, k), distance (M, k), two arrays of one: whether points, or queries, are not finite)"""
    tree, dtype = search.index.tree, search.index.dtype
    search.check_room(search.num_queries * k, search.num_queries * k * (4 + dtype.itemsize), free=free_memory)
    counts = cupy.zeros(search.num_queries, np.int64)
    index, distance = cupy.empty((len(counts), k), np.int32), cupy.empty((len(counts), k), dtype)
    queries_not_finite = cupy.zeros(1, np.uint32)
    points_not_finite = search.launch(tree, "nearest", **tree._boxes[2], k=k, sort=sort, index=index,
                                      distance=distance, counts=counts, not_finite=queries_not_finite)  # fmt: skip
    if search.is_unbounded:
        check_boxes(tree.points, tree.row_splits, search.metric, queries_not_finite, search.queries,
                    search.queries_row_splits)  # fmt: skip
    return counts, index, distance, (points_not_finite, queries_not_finite)


def _packed(counts, index, distance, return_distances):
    """(row_splits, index, distance) from rows of k of which `counts` entries are used. Waits for nothing, so the arrays
    have room for all k entries of all rows."""
    kernels = kernels_of("lists.cu", KP_T=ctype(distance.dtype))
    splits = cupy.concatenate([cupy.zeros(1, np.int64), cupy.cumsum(counts)])
    packed = cupy.zeros(index.size, np.int32)
    packed_distance = cupy.zeros(index.size, distance.dtype) if return_distances else None
    launch(kernels["pack_rows"], index.size, index=index, distance=distance, width=index.shape[1], row_splits=splits,
           num_rows=len(counts), packed_index=packed, packed_distance=packed_distance)  # fmt: skip
    return splits, packed, packed_distance


def _nearest_within(search):
    """((row_splits, index, distance) of a search with max_neighbors, arrays of one: whether coordinates are not
    finite). Waits for nothing; see `_packed`."""
    *nearest, not_finite = _nearest(search, search.max_neighbors, search.sort or _BY_INDEX)
    return _packed(*nearest, search.return_distances), not_finite


def knn_search(index, queries, queries_row_splits, radius, inclusive, k, sort, metric, ignore, return_distances,
               check_room, threads):  # fmt: skip
    """(row_splits, index, distance). Waits once, for the number of pairs and whether all coordinates are finite."""
    search = Search(index, queries, queries_row_splits, radius, inclusive, k, sort, metric, ignore, return_distances,
                    False, check_room)  # fmt: skip
    if index.is_empty(queries):
        return search.empty_result()
    counts, nearest, distance, not_finite = _nearest(search, k, sort)
    return _finished(counts, nearest, distance, not_finite, return_distances)


def _finished(counts, nearest, distance, not_finite, return_distances):
    """(row_splits, index, distance) from rows of k of which `counts` entries are used. Waits."""
    k = nearest.shape[1]
    pairs, *flags = wait(counts.sum().reshape(1), *not_finite)
    if any(flags):
        raise NotFinite
    if pairs == nearest.size:
        splits = cupy.arange(len(counts) + 1) * k
        return splits, nearest.reshape(-1), distance.reshape(-1) if return_distances else None
    splits, nearest, distance = _packed(counts, nearest, distance, return_distances)
    return splits, nearest[:pairs].copy(), distance[:pairs].copy() if return_distances else None


def feature_search(points, row_splits, queries, queries_row_splits, k, ignore, return_distances, check_room, threads):
    """(row_splits, index, distance): the k nearest by L2 in any number of dimensions.

    Waits as `knn_search`, and in batches also for the row_splits, since each item has products of its own.
    """
    same, dtype = queries is None, points.dtype
    if same:
        queries, queries_row_splits = points, row_splits
    (n, dimension), m = points.shape, len(queries)
    check_room(m * k, m * k * (4 + dtype.itemsize), free=free_memory)
    counts, not_finite = cupy.zeros(m, np.int64), cupy.zeros(1, np.uint32)
    index, distance = cupy.empty((m, k), np.int32), cupy.empty((m, k), dtype)
    kernels = kernels_of("feature_neighbors.cu", KP_T=ctype(dtype))
    for rows in (points,) if same else (points, queries):
        launch(kernels["check_finite"], rows.size, points=rows, num_points=len(rows), dimension=dimension,
               not_finite=not_finite)  # fmt: skip
    if n and m:
        sides = check_boxes(points, row_splits, _L2, not_finite, None if same else queries, queries_row_splits)
        items = len(row_splits) - 1
        bounds, queries_bounds = [0, n], [0, m]
        if items > 1:
            both = cupy.concatenate([row_splits, queries_row_splits]).get().tolist()
            bounds, queries_bounds = both[: items + 1], both[items + 1 :]
        for item in range(items):
            begin, end = bounds[item : item + 2]
            first, last = queries_bounds[item : item + 2]
            if begin < end and first < last:
                ignored = first - begin if ignore == _INDEX else -m
                _search_item(kernels, points[begin:end], queries[first:last], sides[item], begin, k,
                             ignore == _EQUAL, ignored, index[first:last], distance[first:last],
                             counts[first:last])  # fmt: skip
    return _finished(counts, index, distance, (not_finite,), return_distances)


def _search_item(kernels, points, queries, sides, begin, k, drops_equal, ignored, index, distance, counts):
    """Write the rows of the queries of a batch item whose points are numbered from `begin` on.

    ignored: the number, in the item, of the point that the first query ignores; the other queries ignore the next ones.
    """
    (n, dimension), m, dtype = points.shape, len(queries), points.dtype
    center, scale = cupy.empty(dimension, dtype), cupy.empty(1, np.float64)
    launch(kernels["find_center"], dimension, points=points, num_points=n, dimension=dimension, sides=sides,
           center=center, scale=scale)  # fmt: skip
    room = 2 * k + 4 * WARP  # of a list, which is measured when it is nearly full
    at_once = max(WARP, min(_ROWS_AT_ONCE, _LIST_BYTES // (room * (4 + dtype.itemsize))))  # queries
    points_at_once = min(n, _PRODUCT_BYTES // (at_once * dtype.itemsize))
    at_once = min(m, at_once)
    packed_points, norms = cupy.empty((points_at_once, dimension), dtype), cupy.empty(points_at_once, dtype)
    packed_queries, query_norms = cupy.empty((at_once, dimension), dtype), cupy.empty(at_once, dtype)
    products = cupy.empty(at_once * points_at_once, dtype)
    lists = cupy.empty((at_once, 2 + 2 * dtype.itemsize // 4), np.int32)
    values, ids = cupy.empty((at_once, room), dtype), cupy.empty((at_once, room), np.int32)

    def pack(rows, packed, norms):
        launch(kernels["pack"], len(rows) * WARP, rows=rows, num_rows=len(rows), dimension=dimension, center=center,
               scale=scale, packed=packed, norms=norms)  # fmt: skip

    for first in range(0, m, at_once):
        rows = queries[first : first + at_once]
        pack(rows, packed_queries, query_norms)
        launch(kernels["clear_lists"], len(rows), norms=query_norms, num_queries=len(rows), lists=lists)
        state = {"points": points, "queries": rows, "num_queries": len(rows), "dimension": dimension, "k": k,
                 "drops_equal": drops_equal, "scale": scale, "lists": lists, "values": values, "ids": ids,
                 "room": room}  # fmt: skip
        for start in range(0, n, points_at_once):
            part = points[start : start + points_at_once]
            pack(part, packed_points, norms)
            block = products[: len(rows) * len(part)].reshape(len(rows), len(part))
            product(packed_queries[: len(rows)], packed_points[: len(part)].T, block)
            launch(kernels["collect"], len(rows) * WARP, **state, products=block, norms=norms, num_points=len(part),
                   first_point=start, ignored=ignored + first)  # fmt: skip
        launch(kernels["finish"], len(rows) * WARP, **state, first_point=begin, index=index[first:],
               distance=distance[first:], counts=counts[first:])  # fmt: skip

"""Neighbour searches of KPConv-PyTorch, ml-kpconvx, GeoTransformer and Easy-KPConv, under their names.

All return padded matrices: a row for each query, the nearest neighbour first (of equally near ones the one with the
smallest index), filled up with the number of supports of the whole batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import kpcore as kp
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray
from kpcore.compat.kinds import arrays_or_tensors, row_splits

__all__ = ["batch_knn_neighbors", "batch_query", "batch_radius_neighbors", "radius_count_pack_mode",
           "radius_neighbors", "radius_search_pack_mode"]  # fmt: skip

# Arguments of the searches of kpcore and their names in KPConv-PyTorch and in GeoTransformer.
_ARGUMENTS = ("queries", "points", "queries_row_splits", "points_row_splits")
_BATCHES = dict(zip(_ARGUMENTS, ("queries", "supports", "q_batches", "s_batches"), strict=True))
_LENGTHS = dict(zip(_ARGUMENTS, ("q_points", "s_points", "q_lengths", "s_lengths"), strict=True))


@arrays_or_tensors(gradient=None)
def batch_query(queries: AnyArray, supports: AnyArray, q_batches: AnyArray, s_batches: AnyArray, *,
                radius: float = 0.1, max_neighbors: int | None = None) -> Any:  # fmt: skip
    """The supports nearer to each query than the radius: KPConv-PyTorch's and OverlapPredator's ``batch_query``.

    Of ml-kpconvx, the same function is called `batch_radius_neighbors`. A support at exactly the radius is not a
    neighbour: the condition is ``(d0*d0 + d1*d1) + d2*d2 < r*r``, in float32 as published.

    Parameters
    ----------
    queries, supports : (M, 3) and (N, 3) float32, or both float64
    q_batches, s_batches : (B,) integers
        Lengths of the batch items, any of which may be empty; a query's neighbours are supports of the same item.
    radius : float
        Above zero, in the unit of the points.
    max_neighbors : int, optional
        Largest width of the result; the nearest are kept. The published functions return all, of which their callers
        take the first columns.

    Returns
    -------
    (M, H) int32
        H is the largest number of neighbours of a query. N where a row has fewer. Without any neighbours, or any
        queries, (M, 0).

    Raises
    ------
    ValueError, TypeError
        For shapes, dtypes or lengths that do not agree, and as `kpcore.radius_search`.

    Notes
    -----
    The published code raises RuntimeError if no query has a neighbour, and searches the wrong supports after an item
    without queries, unless it is the first or last one.

    Examples
    --------
    >>> import numpy as np
    >>> import kpcore.compat as cpp_neighbors
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0]], np.float32)
    >>> lengths = np.array([3, 1], np.int32)
    >>> cpp_neighbors.batch_query(points, points, lengths, lengths, radius=1.5)
    array([[0, 1, 4],
           [1, 0, 2],
           [2, 1, 4],
           [3, 4, 4]], dtype=int32)
    """
    return _padded(_BATCHES, (queries, supports, q_batches, s_batches), radius, max_neighbors, np.int32)


batch_radius_neighbors = batch_query


@arrays_or_tensors(gradient=None)
def radius_neighbors(q_points: AnyArray, s_points: AnyArray, q_lengths: AnyArray, s_lengths: AnyArray, radius: float,
                     max_neighbors: int | None = None) -> Any:  # fmt: skip
    """As `batch_query`, with the arguments and the int64 result of GeoTransformer's extension.

    Parameters
    ----------
    q_points, s_points : (M, 3) and (N, 3) float32, or both float64
    q_lengths, s_lengths : (B,) integers
    radius : float
        Exclusive.
    max_neighbors : int, optional
        Largest width of the result.

    Returns
    -------
    (M, H) int64

    Raises
    ------
    ValueError, TypeError
        As `batch_query`.

    Notes
    -----
    The published code ends the process if there are no queries.

    Examples
    --------
    >>> import torch
    >>> import kpcore.compat as ext_module
    >>> points, lengths = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]]), torch.tensor([3])
    >>> ext_module.radius_neighbors(points, points, lengths, lengths, 1.5)
    tensor([[0, 1, 3],
            [1, 0, 2],
            [2, 1, 3]])
    """
    return _padded(_LENGTHS, (q_points, s_points, q_lengths, s_lengths), radius, max_neighbors, np.int64)


@arrays_or_tensors(gradient="kpcore.torch.knn_search for the index alone")
def batch_knn_neighbors(queries: AnyArray, supports: AnyArray, q_batches: AnyArray, s_batches: AnyArray, *,
                        n_neighbors: int = 10) -> tuple[Any, Any]:  # fmt: skip
    """The nearest supports of each query and their squared distances: ``batch_knn_neighbors`` of ml-kpconvx.

    Parameters
    ----------
    queries, supports : (M, 3) and (N, 3) float32, or both float64
    q_batches, s_batches : (B,) integers
        Lengths of the batch items, any of which may be empty.
    n_neighbors : int
        At least 1.

    Returns
    -------
    neighbors : (M, n_neighbors) int32
        N where the item has fewer supports.
    sq_distances : (M, n_neighbors), dtype of the points
        1e10 there. The squares of the rounded distances.

    Raises
    ------
    ValueError, TypeError
        For shapes, dtypes or lengths that do not agree, and as `kpcore.knn_search`.

    Notes
    -----
    The published code finds nothing for the rows after an item without queries, unless it is the first or last one.

    Examples
    --------
    >>> import numpy as np
    >>> import kpcore.compat as cpp_neighbors
    >>> points, lengths = np.array([[0, 0, 0], [1, 0, 0], [3, 0, 0]], np.float32), [3]
    >>> neighbors, sq_distances = cpp_neighbors.batch_knn_neighbors(points, points, lengths, lengths, n_neighbors=2)
    >>> neighbors.tolist(), sq_distances.tolist()
    ([[0, 1], [1, 0], [2, 1]], [[0.0, 1.0], [0.0, 1.0], [0.0, 4.0]])
    """
    width = checks.integer("n_neighbors", n_neighbors, 1, checks.MAX_POINTS)
    points, queries, bounds = _with_bounds(_BATCHES, (queries, supports, q_batches, s_batches))
    with checks.argument_names(_BATCHES):
        nearest = kp.knn_search(points, queries, width, **bounds, return_distances=True)
    squares = nearest.stored_distance
    squares *= squares
    if len(squares) == nearest.num_queries * width:
        return nearest.to_padded(width), squares.reshape(-1, width)
    xp = devices.namespace(squares)
    padded = xp.full((nearest.num_queries, width), 1e10, squares.dtype)
    padded[xp.arange(width) < nearest.counts[:, None]] = squares
    return nearest.to_padded(width), padded


@arrays_or_tensors(gradient=None)
def radius_search_pack_mode(q_points: AnyArray, s_points: AnyArray, q_lengths: AnyArray, s_lengths: AnyArray,
                            radius: float, neighbor_limit: int, inf: float = 1e10) -> Any:  # fmt: skip
    """The nearest supports of each query up to a distance, at most `neighbor_limit`: Easy-KPConv's search.

    The radius is inclusive: distances are rounded square roots, as published, and compared with it.

    Parameters
    ----------
    q_points, s_points : (M, 3) and (N, 3) float32, or both float64
    q_lengths, s_lengths : (B,) integers
    radius : float
    neighbor_limit : int
        Width of the result, at least 1.
    inf : float
        Not used; the published code moves the padding of a batch there.

    Returns
    -------
    (M, neighbor_limit) int64
        N where a row has fewer neighbours.

    Raises
    ------
    ValueError, TypeError
        As `batch_query`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import radius_search_pack_mode
    >>> points, lengths = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]]), torch.tensor([3])
    >>> radius_search_pack_mode(points, points, lengths, lengths, 1.0, 2)
    tensor([[0, 1],
            [1, 0],
            [2, 1]])
    """
    limit = checks.integer("neighbor_limit", neighbor_limit, 1, checks.MAX_POINTS)
    packed = q_points, s_points, q_lengths, s_lengths
    around, distance, bound = _around(packed, radius, max_neighbors=limit, sort="distance")
    # Rows end with what is too far away, which is now padding. The kernel that pads does not look at the index.
    around.stored_index[distance > bound] = around.num_points
    return around.to_padded(limit, dtype=np.int64)


@arrays_or_tensors(gradient=None)
def radius_count_pack_mode(q_points: AnyArray, s_points: AnyArray, q_lengths: AnyArray, s_lengths: AnyArray,
                           radius: float, inf: float = 1e10) -> Any:  # fmt: skip
    """How many supports are nearer to each query than the radius: Easy-KPConv's count.

    As published the radius is exclusive here, whereas `radius_search_pack_mode` includes it.

    Parameters
    ----------
    q_points, s_points : (M, 3) and (N, 3) float32, or both float64
    q_lengths, s_lengths : (B,) integers
    radius : float
    inf : float
        Not used.

    Returns
    -------
    (M,) int64

    Raises
    ------
    ValueError, TypeError
        As `batch_query`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import radius_count_pack_mode
    >>> points, lengths = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]]), torch.tensor([3])
    >>> radius_count_pack_mode(points, points, lengths, lengths, 1.0)
    tensor([1, 1, 1])
    """
    around, distance, bound = _around((q_points, s_points, q_lengths, s_lengths), radius, sort=None)
    xp = devices.namespace(distance)
    before = xp.zeros(len(distance) + 1, np.int64)  # how many of the pairs before each one are near enough
    xp.cumsum(distance < bound, dtype=np.int64, out=before[1:])
    return xp.diff(before[around.stored_row_splits])


def _padded(names, arguments, radius, max_neighbors, dtype):
    points, queries, bounds = _with_bounds(names, arguments)
    if max_neighbors is not None:
        checks.integer("max_neighbors", max_neighbors, 1)
    options = {"inclusive": False, "sort": "distance", "max_neighbors": max_neighbors}
    with checks.argument_names(names):
        return kp.radius_search(points, queries, radius, **bounds, **options).to_padded(dtype=dtype)


def _around(arguments, radius, **options):
    """(list, distances, radius in the dtype of the points), where the list goes two steps of the dtype further.

    So no pair is missing of which the rounded square root is at most the radius, but the square above that of it.
    """
    points, queries, bounds = _with_bounds(_LENGTHS, arguments)
    points = checks.points_array("s_points", points, {})
    radius = wider = points.dtype.type(checks.length("radius", radius, points.dtype))
    for _ in range(2):
        wider = np.nextafter(wider, np.inf, dtype=points.dtype)
    options |= {"return_distances": True}
    with checks.argument_names(_LENGTHS):
        around = kp.radius_search(points, queries, float(wider), **bounds, **options)
    return around, around.stored_distance, radius


def _with_bounds(names, arguments):
    """(points, queries, {"points_row_splits", "queries_row_splits"}) from queries, supports and the lengths of both.

    Points and queries are checked by the search, under ``argument_names(names)``.
    """
    queries, points, *lengths = arguments
    bounds = {}
    for name, array, values in zip(("queries", "points"), (queries, points), lengths, strict=True):
        splits = f"{name}_row_splits"
        bounds[splits] = row_splits(names[splits], values, (names[name], array))
    q, s = (len(splits) - 1 for splits in bounds.values())
    if q != s:
        q_name, s_name = (names[splits] for splits in bounds)
        raise ValueError(f"{q_name}: expected ({s},) to match {s_name}, got ({q},)")
    return points, queries, bounds

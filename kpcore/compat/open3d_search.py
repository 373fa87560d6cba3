"""Open3D's searches: the hash table, neighbours within a radius and the k nearest points."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import NamedTuple

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import arguments
from kpcore.neighbors import Neighbors
from kpcore.torch.ops import numpy_dtype, to_tensor

__all__ = ["build_spatial_hash_table", "fixed_radius_search", "knn_search", "radius_search"]

METRICS = ("L1", "L2", "Linf")
# torch's operators take a dtype as its number, and Open3D's default is the number of int32.
_INDEX_DTYPES = {3: torch.int32, 4: torch.int64, torch.int32: torch.int32, torch.int64: torch.int64}


class SpatialHashTable(NamedTuple):
    """What `build_spatial_hash_table` returns."""

    hash_table_index: torch.Tensor  #: (N,) int32 points, cell after cell
    hash_table_cell_splits: torch.Tensor  #: (cells + 1,) int32 bounds of the cells in it
    hash_table_splits: torch.Tensor  #: (B + 1,) int32, on the CPU: bounds of the batch items' cells


class SearchResult(NamedTuple):
    """What the searches return, for M queries and E pairs."""

    neighbors_index: torch.Tensor  #: (E,) int32 or int64
    neighbors_row_splits: torch.Tensor  #: (M + 1,) int64
    neighbors_distance: torch.Tensor  #: (E,), squared for "L2"; (0,) unless distances were asked for


@torch.no_grad()
def build_spatial_hash_table(points: torch.Tensor, radius: float, points_row_splits: torch.Tensor,
                             hash_table_size_factor: float, max_hash_table_size: int = 33554432
                             ) -> SpatialHashTable:  # fmt: skip
    """Points sorted by the hash of their cell; cells have edges of twice the radius.

    The table is Open3D's, except that the points of a cell are in the order of their indices, whereas Open3D's order
    changes from run to run. `fixed_radius_search` takes it but does not read it.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    radius : float
        Above zero.
    points_row_splits : (B + 1,) int64
        On any device.
    hash_table_size_factor : float
        Cells for each point of an item; an item has at least one cell.
    max_hash_table_size : int
        The largest number of cells of an item.

    Returns
    -------
    SpatialHashTable
    """
    points = arguments.tensor("points", points, "N 3", arguments.REAL, {})
    splits = arguments.row_splits("points_row_splits", points_row_splits, len(points), "points", "cpu")
    radius = checks.length("radius", float(radius), numpy_dtype("points", points.dtype))
    counts = torch.diff(splits)
    cells = [min(max(int(hash_table_size_factor * n), 1), max_hash_table_size) for n in counts.tolist()]
    table_splits = torch.tensor([0, *itertools.accumulate(cells)], dtype=torch.int32)
    item = torch.repeat_interleave(torch.arange(len(cells)), counts).to(points.device)

    def per_point(values):
        return torch.as_tensor(values, dtype=torch.int64, device=points.device)[item]

    voxel = torch.floor(points * (1 / (2 * torch.tensor(radius, dtype=points.dtype)))).to(torch.int64)
    mixed = voxel[:, 0] * 73856096 ^ voxel[:, 1] * 193649663 ^ voxel[:, 2] * 83492791
    hashed, size = mixed.to(torch.int32).to(torch.int64), per_point(cells)
    # Open3D computes the hash in 32 bits with a sign and takes its remainder in 64 bits without one: -1 is 2**64 - 1.
    added = torch.where(hashed < 0, per_point([2**64 % n for n in cells]), 0)
    cell = torch.remainder(torch.remainder(hashed, size) + added, size) + per_point(table_splits[:-1])
    cell_splits = torch.zeros(int(table_splits[-1]) + 1, dtype=torch.int32, device=points.device)
    cell_splits[1:] = torch.bincount(cell, minlength=len(cell_splits) - 1).cumsum(0)
    return SpatialHashTable(torch.argsort(cell, stable=True).to(torch.int32), cell_splits, table_splits)


@torch.no_grad()
def fixed_radius_search(points: torch.Tensor, queries: torch.Tensor, radius: float, points_row_splits: torch.Tensor,
                        queries_row_splits: torch.Tensor, hash_table_splits: torch.Tensor,
                        hash_table_index: torch.Tensor, hash_table_cell_splits: torch.Tensor,
                        index_dtype: torch.dtype | int = 3, metric: str = "L2", ignore_query_point: bool = False,
                        return_distances: bool = False) -> SearchResult:  # fmt: skip
    """All points within a radius of each query: those at distance <= radius, in the order of their indices.

    Parameters
    ----------
    points, queries : (N, 3) and (M, 3), float32 or float64
    radius : float
        Above zero.
    points_row_splits, queries_row_splits : (B + 1,) int64
        On any device.
    hash_table_splits, hash_table_index, hash_table_cell_splits : (B + 1,), (N,) and (cells + 1,) int32
        From `build_spatial_hash_table`. Only their shapes and dtypes are checked; the search makes another grid.
    index_dtype : torch.int32, torch.int64, 3 or 4
        The dtype of the index, or torch's number for it.
    metric : {"L1", "L2", "Linf"}
    ignore_query_point : bool
        Leave out points with exactly the coordinates of the query.
    return_distances : bool
        Distances are squared for "L2". They have no gradient.

    Returns
    -------
    SearchResult
    """
    bounds = checked_bounds(points, queries, points_row_splits, queries_row_splits)
    check_hash_table(hash_table_splits, hash_table_index, hash_table_cell_splits, points, bounds[0])
    return within_fixed_radius(points, queries, radius, bounds, index_dtype, metric, ignore_query_point,
                               return_distances)  # fmt: skip


def check_hash_table(splits: object, index: object, cell_splits: object, points: torch.Tensor,
                     points_row_splits: torch.Tensor) -> None:  # fmt: skip
    """Check the shapes and dtypes of the three tensors of a hash table."""
    sizes = {"N": (len(points), "points"), "device": (points.device, "points")}
    arguments.tensor("hash_table_index", index, "N", (torch.int32,), sizes)
    arguments.tensor("hash_table_cell_splits", cell_splits, "cells+1", (torch.int32,), sizes)
    sizes = {"B+1": (len(points_row_splits), "points_row_splits")}
    arguments.tensor("hash_table_splits", splits, "B+1", (torch.int32,), sizes)


def within_fixed_radius(points, queries, radius, bounds, index_dtype, metric, ignore_query_point, return_distances):
    """What `fixed_radius_search` returns; `bounds`: the checked row_splits of points and queries."""
    index_dtype = checked_index_dtype(index_dtype)
    neighbors = _radius_search(points, queries, bounds, float(radius), metric, ignore_query_point)
    point, query, row_splits = pairs(neighbors)
    distance = measures(points, queries, point, query, metric) if return_distances else points.new_empty(0)
    return SearchResult(point.to(index_dtype), row_splits, distance)


@torch.no_grad()
def radius_search(points: torch.Tensor, queries: torch.Tensor, radii: torch.Tensor, points_row_splits: torch.Tensor,
                  queries_row_splits: torch.Tensor, index_dtype: torch.dtype | int = 3, metric: str = "L2",
                  ignore_query_point: bool = False, return_distances: bool = False,
                  normalize_distances: bool = False) -> SearchResult:  # fmt: skip
    """All points nearer to each query than its radius: at distance < radius, in the order of their indices.

    As in Open3D the radius is exclusive here, but inclusive in `fixed_radius_search`: for "L2" the condition is
    ``(d0*d0 + d1*d1) + d2*d2 < r*r``, in the dtype of the points.

    Parameters
    ----------
    points, queries : (N, 3) and (M, 3), float32 or float64
    radii : (M,), dtype of the points
        Above zero.
    points_row_splits, queries_row_splits : (B + 1,) int64
        On any device.
    index_dtype : torch.int32, torch.int64, 3 or 4
    metric : {"L1", "L2", "Linf"}
        Open3D has no "Linf" here.
    ignore_query_point : bool
        Leave out points with exactly the coordinates of the query.
    return_distances : bool
        Distances are squared for "L2". They have no gradient.
    normalize_distances : bool
        Divide the distances by the radius, squared ones by its square.

    Returns
    -------
    SearchResult
    """
    bounds = checked_bounds(points, queries, points_row_splits, queries_row_splits)
    sizes = {"num_queries": (len(queries), "queries"), "device": (points.device, "points")}
    radii = arguments.tensor("radii", radii, "num_queries", (points.dtype,), sizes)
    arguments.check_above_zero("radii", radii)
    index_dtype = checked_index_dtype(index_dtype)
    neighbors = _radius_search(points, queries, bounds, radii, metric, ignore_query_point, inclusive=False)
    point, query, row_splits = pairs(neighbors)
    distance = measures(points, queries, point, query, metric) if return_distances else points.new_empty(0)
    if return_distances and normalize_distances:
        distance = distance / (radii * radii if metric == "L2" else radii)[query]
    return SearchResult(point.to(index_dtype), row_splits, distance)


@torch.no_grad()
def knn_search(points: torch.Tensor, queries: torch.Tensor, k: int, points_row_splits: torch.Tensor,
               queries_row_splits: torch.Tensor, index_dtype: torch.dtype | int = 3, metric: str = "L2",
               ignore_query_point: bool = False, return_distances: bool = False) -> SearchResult:  # fmt: skip
    """The k nearest points of each query, in the order of (distance, index).

    Parameters
    ----------
    points, queries : (N, 3) and (M, 3), float32 or float64
    k : int
        At least 1. A query of an item with fewer points has all of them.
    points_row_splits, queries_row_splits : (B + 1,) int64
        On any device.
    index_dtype : torch.int32, torch.int64, 3 or 4
    metric : {"L1", "L2", "Linf"}
        Open3D has no "Linf" here.
    ignore_query_point : bool
        Leave out, of the k nearest points, those with exactly the coordinates of the query. As in Open3D no other
        points take their place: a query that is one of the points has k - 1 neighbours.
    return_distances : bool
        Distances are squared for "L2". They have no gradient.

    Returns
    -------
    SearchResult
    """
    bounds = checked_bounds(points, queries, points_row_splits, queries_row_splits)
    index_dtype = checked_index_dtype(index_dtype)
    checks.choice("metric", metric, METRICS)
    neighbors = kpt.knn_search(
        points, queries, k, points_row_splits=bounds[0], queries_row_splits=bounds[1], metric=metric.lower()
    )
    point, query, row_splits = pairs(neighbors)
    if checks.boolean("ignore_query_point", ignore_query_point):
        differ = (points.index_select(0, point) != queries.index_select(0, query)).any(1)
        point, query, row_splits = kept_pairs(differ, point, query, row_splits)
    distance = measures(points, queries, point, query, metric) if return_distances else points.new_empty(0)
    return SearchResult(point.to(index_dtype), row_splits, distance)


def checked_bounds(points, queries, points_row_splits, queries_row_splits):
    """(points_row_splits, queries_row_splits) on the device of the points, after a check of points and queries.

    The search checks the values of the row_splits.
    """
    sizes = {}
    arguments.tensor("points", points, "num_points 3", arguments.REAL, sizes)
    arguments.tensor("queries", queries, "num_queries 3", (points.dtype,), sizes)
    bounds = arguments.tensor("points_row_splits", points_row_splits, "B+1", arguments.SPLITS, {})
    sizes = {"B+1": (len(bounds), "points_row_splits")}
    queries_bounds = arguments.tensor("queries_row_splits", queries_row_splits, "B+1", arguments.SPLITS, sizes)
    return bounds.to(points.device), queries_bounds.to(points.device)


def checked_index_dtype(index_dtype):
    if index_dtype not in _INDEX_DTYPES:
        raise ValueError(f"index_dtype: expected torch.int32 or torch.int64, got {index_dtype}")
    return _INDEX_DTYPES[index_dtype]


def _radius_search(points, queries, bounds, radius, metric, ignore_query_point, inclusive=True):
    checks.choice("metric", metric, METRICS)
    return kpt.radius_search(
        points, queries, radius, points_row_splits=bounds[0], queries_row_splits=bounds[1], inclusive=inclusive,
        metric=metric.lower(), ignore_query_point=checks.boolean("ignore_query_point", ignore_query_point)
    )  # fmt: skip


def pairs(neighbors: Neighbors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(point, query, row_splits) of a list that a search just made: (E,) int32, (E,) int64 and (M + 1,) int64."""
    row_splits, num_pairs = to_tensor(neighbors.stored_row_splits), neighbors.num_pairs
    number = torch.arange(len(row_splits) - 1, device=row_splits.device)
    query = torch.repeat_interleave(number, torch.diff(row_splits), output_size=num_pairs)
    return to_tensor(neighbors.stored_index)[:num_pairs], query, row_splits


def measures(points: torch.Tensor, queries: torch.Tensor, point: torch.Tensor, query: torch.Tensor,
             metric: str) -> torch.Tensor:  # fmt: skip
    """The distances of pairs, squared for "L2": the bits that the search compared with the radius.

    The operations are those of `measure` in src/formulas/neighbors.h, in the same order.
    """
    d = points.index_select(0, point) - queries.index_select(0, query)
    d = d * d if metric == "L2" else d.abs()
    if metric == "Linf":
        return d.amax(1)
    return functools.reduce(operator.add, d.unbind(1))


def kept_pairs(kept: torch.Tensor, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns of the pairs where `kept` is true; the last column is row_splits, the one before it the queries."""
    if kept.all():  # the usual case, in which nothing is copied
        return columns
    *columns, row_splits = columns
    columns = [column[kept] for column in columns]
    counts = torch.bincount(columns[-1], minlength=len(row_splits) - 1)
    return *columns, torch.cat([row_splits[:1], counts.cumsum(0)])

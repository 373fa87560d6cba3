"""``frnn`` (lxxue/FRNN), the k nearest points within a radius in padded batches: the same names, arguments and results.

Code written for frnn runs with one import changed::

    from kpcore.compat import frnn      # in place of: import frnn

As in frnn, and different from the functions of `kpcore`:

* batches are padded, (N, P, D), with the number of points of each item in ``lengths``;
* distances are squared, and -1 where there is no neighbour, as is the index;
* the radius is inclusive, as in kpcore, in float32 (the dtype of the points).

Different from frnn:

* Every function works on the CPU too, and takes float64, any `K`, and 1 to 1,024 dimensions. frnn is float32 on CUDA.
* Of equally near points those with the smallest index are kept; frnn keeps any.
* Items may be empty, in which frnn fails.
* The grid that is returned holds an index of kpcore, and its fields are not those of frnn. The neighbours are those
  among the points that it was made of, and may be searched with another radius; distances are computed from `points2`.
  In more than 16 dimensions there is none, and None is returned.
* Gradients are the same in every run, to the bit. Second derivatives are an error.
* `return_sorted` and `radius_cell_ratio` have no effect: results are always sorted, in frnn too.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import numpy as np
import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import arguments
from kpcore.torch.ops import checked, numpy_dtype, on_stream_of, to_tensor

__all__ = ["frnn_gather", "frnn_grid_points"]

_GRID_DIMENSIONS = (2, 3)
_NAMES = {"points": "points2", "queries": "points1", "radius": "r", "cell": "r", "k": "K", "max_neighbors": "K"}


class Grid(NamedTuple):
    """What `frnn_grid_points` returns to be passed to it again."""

    index: kpt.KDTree  #: of the points of all items, stacked
    row_splits: torch.Tensor  #: (N + 1,) int64 bounds of the items


def frnn_grid_points(points1: torch.Tensor, points2: torch.Tensor, lengths1: torch.Tensor | None = None,
                     lengths2: torch.Tensor | None = None, K: int = -1, r: float | torch.Tensor = -1,
                     grid: Grid | None = None, return_nn: bool = False, return_sorted: bool = True,
                     radius_cell_ratio: float = 2.0
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Grid | None]:  # fmt: skip
    """The at most `K` nearest points of `points2` within the radius of each point of `points1`, by (distance, index).

    Squared distances are differentiable in `points1` and `points2`.

    Parameters
    ----------
    points1, points2 : (N, P1, D) and (N, P2, D), float32 or float64
        Queries and points, padded; D = 1 to 1,024.
    lengths1, lengths2 : (N,) int64, optional
        The numbers of points of the items, at most P1 and P2; by default all of them.
    K : int
        At least 1; required.
    r : float, or () or (1,) or (N,) tensor
        The radius, or one for each item, above zero, inclusive; required.
    grid : Grid, optional
        What an earlier call with the same `points2` and `lengths2` returned.
    return_nn : bool
        Whether the neighbours' coordinates are returned.
    return_sorted : bool
        Without effect.
    radius_cell_ratio : float
        Without effect.

    Returns
    -------
    dists : (N, P1, K), dtype of the points
        Squared; -1 where there is no neighbour.
    idxs : (N, P1, K) int64
        Rows of `points2` within the item; -1 where there is no neighbour.
    nn : (N, P1, K, D), or None
        ``frnn_gather(points2, idxs, lengths2)``.
    grid : Grid, or None in more than 16 dimensions

    Raises
    ------
    ValueError, TypeError
        For wrong shapes, dtypes or devices, lengths outside 0 to P, a grid of other points, and coordinates that are
        not finite.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import frnn
    >>> points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]])
    >>> dists, idxs, nn, grid = frnn.frnn_grid_points(points, points, K=2, r=1.5)
    >>> idxs
    tensor([[[ 0,  1],
             [ 1,  0],
             [ 2, -1]]])
    >>> dists
    tensor([[[ 0.,  1.],
             [ 0.,  1.],
             [ 0., -1.]]])
    """
    sizes = {}
    points1 = arguments.tensor("points1", points1, "N P1 D", arguments.REAL, sizes)
    points2 = arguments.tensor("points2", points2, "N P2 D", (points1.dtype,), sizes)
    K = checks.integer("K", K, 1)
    r = _radius(r, points1)
    queries, splits1, row = _stacked("lengths1", points1, lengths1)
    points, splits2, _ = _stacked("lengths2", points2, lengths2)
    radius = r
    if isinstance(r, torch.Tensor):
        radius = torch.repeat_interleave(r, torch.diff(splits1), output_size=len(queries))
    has_index = points.shape[1] in checks.DIMENSIONS
    with checks.argument_names(_NAMES):
        if has_index:
            grid = _grid(points, splits2, r) if grid is None else _checked_grid(grid, splits2)
            neighbors = grid.index.radius_search(
                queries, radius, queries_row_splits=splits1, max_neighbors=K, sort="distance"
            )
        else:
            neighbors = kpt.knn_search(points, queries, K, points_row_splits=splits2, queries_row_splits=splits1)
    index = on_stream_of(queries, lambda: to_tensor(neighbors.to_padded(K, -1, dtype=np.int64)))
    gathered = _rows_at(points, index.clamp(0).view(-1))
    difference = gathered.view(*index.shape, queries.shape[1]) - queries[:, None]
    squared = functools.reduce(operator.add, (difference * difference).unbind(2))
    if not has_index:
        radius = torch.as_tensor(radius, dtype=squared.dtype, device=squared.device).reshape(-1, 1)
        index = torch.where(squared <= radius * radius, index, -1)
    dists = torch.where(index < 0, -1, squared)
    if row is not None:
        rows = points1.shape[0] * points1.shape[1], K
        dists = dists.new_full(rows, -1).index_copy(0, row, dists)
        index = index.new_full(rows, -1).index_copy(0, row, index)
    shape = *points1.shape[:2], K
    dists, index = dists.view(shape), index.view(shape)
    idxs = torch.where(index < 0, -1, index - splits2[:-1, None, None])
    return dists, idxs, frnn_gather(points2, idxs) if checks.boolean("return_nn", return_nn) else None, grid


def frnn_gather(x: torch.Tensor, idxs: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """The rows of `x` that the index of `frnn_grid_points` names, zeros where it is -1.

    Differentiable in `x`.

    Parameters
    ----------
    x : (N, P2, U) float32 or float64
    idxs : (N, P1, K) int64 or int32
        -1, or 0 to P2 - 1.
    lengths : (N,) int64, optional
        Without effect, as in frnn.

    Returns
    -------
    (N, P1, K, U), dtype of `x`

    Raises
    ------
    ValueError, TypeError
        For other shapes and dtypes, and an index outside its range.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import frnn
    >>> frnn.frnn_gather(torch.tensor([[[5.0], [7.0]]]), torch.tensor([[[1, -1]]]))
    tensor([[[[7.],
              [0.]]]])
    """
    sizes = {}
    x = arguments.tensor("x", x, "N P2 U", arguments.REAL, sizes)
    idxs = arguments.tensor("idxs", idxs, "N P1 K", arguments.INTEGERS, sizes)
    num_items, num_points = x.shape[:2]
    if idxs.numel():
        low, high = (int(bound) for bound in torch.aminmax(idxs))
        if low < -1 or high >= num_points:
            bad = low if low < -1 else high
            raise ValueError(f"idxs: expected -1, or 0 to {num_points - 1} to match x, got {bad}")
    missing = idxs < 0
    begins = torch.arange(num_items, device=x.device)[:, None, None] * num_points
    gathered = _rows_at(x.flatten(0, 1), torch.where(missing, 0, idxs + begins).reshape(-1))
    return gathered.view(*idxs.shape, x.shape[2]).masked_fill(missing[..., None], 0)


def _rows_at(rows, index):
    """The rows that an index without errors names; a row of zeros if there are no rows, then named by 0."""
    if not len(rows):
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return kpt.gather(rows, index) if rows.requires_grad else rows.index_select(0, index)


def _radius(r, points):
    """The radius as a number, or as a tensor (N,) of the dtype and on the device of the points."""
    if not isinstance(r, torch.Tensor):
        return checks.length("r", r, numpy_dtype("points1", points.dtype))
    r = checked(None, "r", r)
    if r.shape not in ((), (1,), (len(points),)):
        raise ValueError(f"r: expected a number, (1,) or ({len(points)},) to match points1, got {tuple(r.shape)}")
    if r.numel() == 1:
        return checks.length("r", r.item(), numpy_dtype("points1", points.dtype))
    arguments.check_above_zero("r", r)
    return r.detach().to(points)


def _stacked(name, points, lengths):
    """(rows, row_splits, numbers of the rows among the padded ones or None for all) of a padded batch (N, P, D)."""
    num_items, padded = points.shape[:2]
    rows = points.flatten(0, 1)
    if lengths is not None:
        sizes = {"N": (num_items, "points1"), "device": (points.device, "points1")}
        lengths = arguments.tensor(name, lengths, "N", arguments.INTEGERS, sizes)
        low, high = (int(bound) for bound in torch.aminmax(lengths)) if num_items else (padded, padded)
        if low < 0 or high > padded:
            raise ValueError(f"{name}: expected 0 to {padded}, the padded number of points, got {low} to {high}")
        if low < padded:
            place = torch.arange(padded, device=points.device)
            number = (place < lengths[:, None]).reshape(-1).nonzero()[:, 0]
            splits = torch.cat([number.new_zeros(1), lengths.cumsum(0)])
            return _rows_at(rows, number), splits, number
    return rows, torch.arange(num_items + 1, device=points.device) * padded, None


def _grid(points, row_splits, r):
    """An index of the points for searches with these radii."""
    if points.shape[1] in _GRID_DIMENSIONS and len(points):
        cell = float(r.max()) if isinstance(r, torch.Tensor) else r
        return Grid(kpt.GridIndex(points, cell, row_splits=row_splits), row_splits)
    return Grid(kpt.KDTree(points, row_splits=row_splits), row_splits)


def _checked_grid(grid, row_splits):
    if not isinstance(grid, Grid):
        raise TypeError(f"grid: expected what frnn_grid_points of kpcore returned, got {type(grid).__name__}")
    if not torch.equal(grid.row_splits, row_splits):
        raise ValueError(
            f"grid: expected one of points2 and lengths2, with items that end at {row_splits[1:].tolist()}, got one "
            f"with items that end at {grid.row_splits[1:].tolist()}"
        )
    return grid

"""``torch_cluster``, the searches behind PyTorch Geometric: the same names, arguments, defaults and edges, on tensors.

Code written for torch_cluster runs with one import changed::

    from kpcore.compat import torch_cluster             # in place of: import torch_cluster
    from kpcore.compat.torch_cluster import knn_graph   # in place of: from torch_cluster import knn_graph

The functions of ``torch_geometric.nn`` with these names have the same arguments. Up to version 2.7 all of PyTorch
Geometric takes this module, if it stands under the name torch_cluster before torch_geometric is imported::

    import sys, kpcore.compat.torch_cluster
    sys.modules["torch_cluster"] = kpcore.compat.torch_cluster

Nothing depends on the version of torch. Every function works on the CPU and, where CuPy is installed, on a GPU. Results
are the same on both and in every run.

As in torch_cluster, and different from the functions of `kpcore`:

* the radius is exclusive: a point is a neighbour if its distance is smaller;
* `max_num_neighbors` is 32 unless another is passed;
* edges are int64, (queries, points) for `radius` and `knn`, and for the graphs as `flow` says.

Different from torch_cluster:

* If there are more points within the radius than `max_num_neighbors`, the nearest are kept (of equally near ones those
  with the smallest index); torch_cluster keeps any. `radius_graph` without loops has at most `max_num_neighbors` edges
  for each point, where torch_cluster 1.6.3 may have one more.
* The edges of a query are in the order of their index (`radius`) or distance (`knn`), which torch_cluster has on a GPU.
* `knn_graph` without loops has k edges for each point, also among equal points, unless its item has fewer others.
* `cosine=True` works on the CPU too; k may be larger than 100 on the GPU.
* A batch vector that is not sorted, or holds numbers from `batch_size` on, is an error, where torch_cluster returns
  wrong edges.
* `nearest` compares distances in the dtype of the points; on the CPU torch_cluster first scales the points to one unit,
  in float32, and may return another point.
* `fps` draws its random starts from torch's generator, so that `torch.manual_seed` repeats them; ratios are above 0 and
  at most 1, and items may be empty.
* `grid_cluster` raises an error for points outside `start` to `end`, to which torch_cluster gives the numbers of other
  voxels.
* Coordinates that are NaN or infinite are an error; so are integers, float16 and bfloat16.
* `graclus_cluster`, `random_walk` and `neighbor_sampler` raise NotImplementedError. Functions cannot be compiled by
  torch.jit.script.
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import numpy as np
import torch

import kpcore
from kpcore.backends import checks, devices
from kpcore.neighbors import splits_of_batch
from kpcore.torch.eager import eager
from kpcore.torch.ops import checked, on_arrays, on_stream_of, to_array, to_tensor

__all__ = [
    "fps", "graclus_cluster", "grid_cluster", "knn", "knn_graph", "nearest", "neighbor_sampler", "radius",
    "radius_graph", "random_walk",
]  # fmt: skip

_SEARCH = {"points": "x", "queries": "y", "radius": "r", "max_neighbors": "max_num_neighbors", "k": "k"}
_GRAPHS = "an operation on graphs, not on points, is not in kpcore; take it from torch_cluster or pyg-lib"


# `eager` passes arrays to these functions, which share memory with the tensors of the caller, and returns tensors. The
# annotations are those of the caller.


@eager
def radius(x: torch.Tensor, y: torch.Tensor, r: float, batch_x: torch.Tensor | None = None,
           batch_y: torch.Tensor | None = None, max_num_neighbors: int = 32, num_workers: int = 1,
           batch_size: int | None = None, ignore_same_index: bool = False, use_triton: bool = False
           ) -> torch.Tensor:  # fmt: skip
    """For each query in `y` the points of `x` nearer than `r`, at most `max_num_neighbors`.

    Parameters
    ----------
    x : (N, D) or (N,), float32 or float64, D = 1 to 16
        Points.
    y : (M, D) or (M,), dtype of `x`
        Queries.
    r : float
        Above zero, exclusive.
    batch_x, batch_y : (N,) and (M,) int64 or int32, optional
        The number of the batch item of each row, never decreasing. One of them may be missing if the other is all 0.
    max_num_neighbors : int
        The nearest are kept; of equally near points those with the smallest index.
    num_workers : int
        Without effect: `kpcore.set_num_threads` sets the number of threads.
    batch_size : int, optional
        Number of batch items; by default one more than the largest number in the batch vectors.
    ignore_same_index : bool
        Leave out pairs of the same index in `x` and `y`, which must have equally many rows.
    use_triton : bool
        Without effect.

    Returns
    -------
    (2, E) int64
        Rows of `y`, which never decrease, and rows of `x`, which rise within each row of `y`.

    Raises
    ------
    ValueError, TypeError
        For wrong shapes, dtypes or devices, batch vectors that are not sorted, and coordinates that are not finite.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import radius
    >>> x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> radius(x, y, 1.5, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0]))
    tensor([[0, 0, 1, 1],
            [0, 1, 2, 3]])
    """
    x, y = _rows("x", x), _rows("y", y)
    bounds = _bounds(("x", x, batch_x), ("y", y, batch_y), batch_size)
    if checks.boolean("ignore_same_index", ignore_same_index) and len(x) != len(y):
        raise ValueError(f"ignore_same_index: expected as many rows in x and y, got {len(x)} and {len(y)}")
    return _within(x, y, r, bounds, max_num_neighbors, ignore_same_index).edge_index("target_to_source")


@eager
def radius_graph(x: torch.Tensor, r: float, batch: torch.Tensor | None = None, loop: bool = False,
                 max_num_neighbors: int = 32, flow: str = "source_to_target", num_workers: int = 1,
                 batch_size: int | None = None, use_triton: bool = False) -> torch.Tensor:  # fmt: skip
    """The edges from the points nearer than `r` to each point, at most `max_num_neighbors`.

    Parameters
    ----------
    x : (N, D) or (N,), float32 or float64, D = 1 to 16
    r, batch, max_num_neighbors, num_workers, batch_size, use_triton
        As in `radius`.
    loop : bool
        Whether there are edges from points to themselves.
    flow : {"source_to_target", "target_to_source"}
        The rows of the result are (neighbours, points), or (points, neighbours).

    Returns
    -------
    (2, E) int64
        The edges of point 0 first.

    Raises
    ------
    ValueError, TypeError
        As `radius`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import radius_graph
    >>> x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> radius_graph(x, r=2.5)
    tensor([[1, 2, 0, 3, 0, 3, 1, 2],
            [0, 0, 1, 1, 2, 2, 3, 3]])
    """
    x = _rows("x", x)
    (row_splits,) = _bounds(("", x, batch), None, batch_size)
    ignore = not checks.boolean("loop", loop)
    return _within(x, None, r, (row_splits, None), max_num_neighbors, ignore).edge_index(flow)


@eager
def knn(x: torch.Tensor, y: torch.Tensor, k: int, batch_x: torch.Tensor | None = None,
        batch_y: torch.Tensor | None = None, cosine: bool = False, num_workers: int = 1,
        batch_size: int | None = None, use_triton: bool = False) -> torch.Tensor:  # fmt: skip
    """For each query in `y` the `k` nearest points of `x`, the nearest first.

    Parameters
    ----------
    x : (N, D) or (N,), float32 or float64, D = 1 to 1,024
        Points.
    y : (M, D) or (M,), dtype of `x`
        Queries.
    k : int
        At least 1. A query of an item with fewer points has all of them.
    batch_x, batch_y, num_workers, batch_size, use_triton
        As in `radius`.
    cosine : bool
        Nearest by the angle between rows instead of their distance. No row may then be zero.

    Returns
    -------
    (2, E) int64
        Rows of `y`, which never decrease, and rows of `x`, by (distance, index) within each row of `y`.

    Raises
    ------
    ValueError, TypeError
        As `radius`, and for points so far apart or so close together that squared distances overflow or vanish.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import knn
    >>> x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> knn(x, torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), 2)
    tensor([[0, 0, 1, 1],
            [1, 0, 2, 3]])
    """
    x, y = _rows("x", x), _rows("y", y)
    bounds = _bounds(("x", x, batch_x), ("y", y, batch_y), batch_size)
    return _nearest(x, y, k, bounds, cosine, False).edge_index("target_to_source")


@eager
def knn_graph(x: torch.Tensor, k: int, batch: torch.Tensor | None = None, loop: bool = False,
              flow: str = "source_to_target", cosine: bool = False, num_workers: int = 1,
              batch_size: int | None = None, use_triton: bool = False) -> torch.Tensor:  # fmt: skip
    """The edges from the `k` nearest points to each point.

    Parameters
    ----------
    x : (N, D) or (N,), float32 or float64, D = 1 to 1,024
    k, batch, cosine, num_workers, batch_size, use_triton
        As in `knn`.
    loop : bool
        Whether a point may be a neighbour of itself, one of the k. Other points with its coordinates always may.
    flow : {"source_to_target", "target_to_source"}
        The rows of the result are (neighbours, points), or (points, neighbours).

    Returns
    -------
    (2, E) int64
        The edges of point 0 first, the nearest neighbour first.

    Raises
    ------
    ValueError, TypeError
        As `knn`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import knn_graph
    >>> knn_graph(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), k=2, batch=torch.tensor([0, 0, 0, 1]))
    tensor([[1, 2, 0, 2, 1, 0],
            [0, 0, 1, 1, 2, 2]])
    """
    x = _rows("x", x)
    (row_splits,) = _bounds(("", x, batch), None, batch_size)
    ignore = not checks.boolean("loop", loop)
    return _nearest(x, None, k, (row_splits, None), cosine, ignore).edge_index(flow)


@eager
def nearest(x: torch.Tensor, y: torch.Tensor, batch_x: torch.Tensor | None = None,
            batch_y: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """For each point of `x` the index of the nearest point of `y`.

    Parameters
    ----------
    x : (N, D) or (N,), float32 or float64, D = 1 to 1,024
    y : (M, D) or (M,), dtype of `x`
        Every batch item that has points in `x` must have some in `y`.
    batch_x, batch_y : (N,) and (M,) int64 or int32, optional
        As in `radius`.

    Returns
    -------
    (N,) int64
        Of equally near points the one with the smallest index.

    Raises
    ------
    ValueError, TypeError
        As `knn`, and for an item without points in `y`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import nearest
    >>> nearest(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0.0, 1.0]))
    tensor([0, 0, 1])
    """
    x, y = _rows("x", x), _rows("y", y)
    x_splits, y_splits = _bounds(("x", x, batch_x), ("y", y, batch_y), None)
    with checks.argument_names({"points": "y", "queries": "x"}):
        neighbors = kpcore.knn_search(y, x, 1, points_row_splits=y_splits, queries_row_splits=x_splits)
    if neighbors.num_pairs != len(x):
        row = int((neighbors.counts == 0).argmax())
        where = "" if x_splits is None else f" in the batch item of row {row} of x"
        raise ValueError(f"y: expected at least one point{where}, got none")
    return neighbors.stored_index[: len(x)].astype(np.int64)


def fps(src: torch.Tensor, batch: torch.Tensor | None = None, ratio: float | torch.Tensor | None = None,
        random_start: bool = True, batch_size: int | None = None, ptr: torch.Tensor | list[int] | None = None
        ) -> torch.Tensor:  # fmt: skip
    """Farthest point sampling: a fraction of the points of each batch item, chosen greedily to be far from each other.

    Of an item with n points ``ceil(n * ratio)`` are chosen, computed as torch_cluster does on the CPU: in float32, or
    in the dtype of `ratio` if it has one number for each item. For a fixed number of points call
    `kpcore.torch.farthest_point_sampling`: rounding makes 101 of ``ceil(732 * (100 / 732))``.

    Parameters
    ----------
    src : (N, ...) float32 or float64
        Points; their coordinates are all axes but the first, 1 to 16 numbers.
    batch : (N,) int64 or int32, optional
        As in `radius`.
    ratio : float, () or (B,) float32 or float64
        Above 0, at most 1; by default 0.5.
    random_start : bool
        Whether the first point of each item is drawn by ``torch.rand`` on the CPU; otherwise it is that with the
        smallest index.
    batch_size : int, optional
        As in `radius`.
    ptr : (B + 1,) int64 or list of int, optional
        Bounds of the batch items, in place of `batch`.

    Returns
    -------
    (S,) int64
        Rows of `src`, item after item, each in the order of choice.

    Raises
    ------
    ValueError, TypeError
        As `knn`, and for a ratio outside its range.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import fps
    >>> src = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> fps(src, torch.tensor([0, 0, 0, 0]), ratio=0.5, random_start=False)
    tensor([0, 3])
    """
    columns = _columns(checked(None, "src", src))
    if ptr is not None and batch is not None:
        raise ValueError("ptr: expected None, because batch is passed, got both")
    random_start = checks.boolean("random_start", random_start)

    def compute() -> torch.Tensor:
        points = to_array("src", columns)
        if points.ndim != 2:
            checks.points_array("points", points, {}, dimensions=checks.DIMENSIONS)  # raises
        if ptr is None:
            rows = None if batch is None else to_array("batch", checked(None, "batch", batch))
            (row_splits,) = _bounds(("", points, rows), None, batch_size)
        else:
            bounds = ptr if isinstance(ptr, torch.Tensor) else torch.as_tensor(ptr, device=src.device)
            row_splits = to_array("ptr", checked(None, "ptr", bounds))
        on_host = np.array([0, len(points)]) if row_splits is None else devices.on_host(row_splits)
        lengths = np.diff(on_host)
        start: int | np.ndarray = 0
        if random_start:
            drawn = torch.rand(len(lengths), dtype=torch.float64, device="cpu").numpy()
            start = devices.to_device_of(points, (drawn * lengths).astype(np.int64))
        counts = devices.to_device_of(points, _counts(ratio, lengths))
        index, _ = kpcore.farthest_point_sampling(points, counts, row_splits=row_splits, start=start)
        return to_tensor(index).to(torch.int64)

    with checks.argument_names({"points": "src", "x": "src", "row_splits": "batch" if ptr is None else "ptr"}):
        return on_stream_of(src, on_arrays, compute)


def grid_cluster(pos: torch.Tensor, size: torch.Tensor, start: torch.Tensor | None = None,
                 end: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """The number of the voxel of each point in a grid, the first axis fastest.

    The voxel of a point is ``(pos - start) / size`` rounded down, in the dtype of the points, or exact if they are
    integers. Along an axis there are
    as many voxels as reach from `start` to `end`. With a column of batch numbers of size 1 this clusters a batch, as
    ``voxel_grid`` of PyTorch Geometric does.

    Parameters
    ----------
    pos : (N, D) or (N,), any real dtype
    size : (D,), dtype of `pos`
        Edges of a voxel, above zero.
    start, end : (D,), dtype of `pos`, optional
        The corners of the grid; by default the smallest and the largest coordinates.

    Returns
    -------
    (N,) int64

    Raises
    ------
    ValueError
        For points outside the grid, NaN among them, and for a grid of more than 2**63 - 1 voxels.
    TypeError
        For other dtypes.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.torch_cluster import grid_cluster
    >>> pos = torch.tensor([[0.0, 0.0], [11.0, 9.0], [2.0, 8.0], [2.0, 2.0], [8.0, 3.0]])
    >>> grid_cluster(pos, torch.tensor([5.0, 5.0]))
    tensor([0, 5, 3, 0, 1])
    """
    checked(None, "pos", pos)
    pos = _columns(pos)
    if pos.ndim != 2 or pos.is_complex() or pos.dtype == torch.bool:
        raise TypeError(f"pos: expected real numbers (N, D), got {str(pos.dtype)[6:]} {tuple(pos.shape)}")
    size = _corner("size", size, pos)
    if not (size > 0).all():
        raise ValueError(f"size: expected numbers above zero, got {size.tolist()}")
    if not len(pos):
        return torch.zeros(0, dtype=torch.int64, device=pos.device)
    start = None if start is None else _corner("start", start, pos)
    end = None if end is None else _corner("end", end, pos)
    if pos.is_floating_point():
        divided = torch.div
    else:  # exact; torch divides integers in float32, and their differences may not fit their dtype
        pos, size, start, end = (each if each is None else each.to(torch.int64) for each in (pos, size, start, end))
        divided = partial(torch.div, rounding_mode="floor")
    start, end = pos.amin(0) if start is None else start, pos.amax(0) if end is None else end
    extent, relative = divided(end - start, size), divided(pos - start, size)
    voxels, numbers = extent.to(torch.int64) + 1, relative.to(torch.int64)
    if extent.isfinite().all() and (extent.to(torch.float64) + 1).prod() >= 2**63:
        shown = (extent.to(torch.float64).floor() + 1).tolist()
        raise ValueError(f"size: expected a grid of at most 2**63 - 1 voxels, got {shown} along the axes")
    outside = ~((relative >= 0) & (relative < 2.0**62) & (numbers < voxels)).all(1)  # larger ones do not fit int64
    if outside.any():
        row = int(outside.to(torch.uint8).argmax())
        raise ValueError(
            f"pos: expected points from start = {start.tolist()} to end = {end.tolist()}, got {pos[row].tolist()} in "
            f"row {row}"
        )
    strides = torch.cat([torch.ones_like(voxels[:1]), voxels.cumprod(0)[:-1]])
    return (numbers * strides).sum(1)


def graclus_cluster(row: torch.Tensor, col: torch.Tensor, weight: torch.Tensor | None = None,
                    num_nodes: int | None = None) -> NoReturn:  # fmt: skip
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"graclus_cluster: {_GRAPHS}")


def random_walk(row: torch.Tensor, col: torch.Tensor, start: torch.Tensor, walk_length: int, p: float = 1,
                q: float = 1, coalesced: bool = True, num_nodes: int | None = None,
                return_edge_indices: bool = False) -> NoReturn:  # fmt: skip
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"random_walk: {_GRAPHS}")


def neighbor_sampler(start: torch.Tensor, rowptr: torch.Tensor, size: float) -> NoReturn:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"neighbor_sampler: {_GRAPHS}")


def _columns(tensor):
    """(N, ...) as (N, D)."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1) if tensor.ndim else tensor


def _rows(name, value):
    """Rows of coordinates (N, D), of a shape that searches take; they check the rest. Numbers (N,) become (N, 1)."""
    if getattr(value, "ndim", None) == 2:
        return value
    if getattr(value, "ndim", None) == 1:
        value = value.reshape(-1, 1)
    return checks.array(name, value, "N D", checks.REAL, {})


def _bounds(points, queries, batch_size):
    """row_splits of points and queries, (N, D) and batch vector of each; of the points only if `queries` is None.

    Both are None if there is one item. `points` and `queries`: (name, rows, batch vector or None).
    """
    clouds = [points] if queries is None else [points, queries]
    if batch_size is not None:
        batch_size = checks.integer("batch_size", batch_size, 1, checks.MAX_POINTS)
    names = [f"batch_{name}" if name else "batch" for name, *_ in clouds]
    known = []
    for name, (rows_name, rows, batch) in zip(names, clouds, strict=True):
        if batch is not None:
            batch = splits_of_batch(name, batch, "batch_size", batch_size, (len(rows), rows_name or "x"))
        known.append(batch)
    num_items = batch_size or max(1, *(len(splits) - 1 for splits in known if splits is not None), 1)
    if num_items == 1:
        return [None] * len(clouds)
    bounds = []
    for name, splits, (_, rows, _) in zip(names, known, clouds, strict=True):
        if splits is None:
            raise ValueError(f"{name}: expected a batch vector, because there are {num_items} batch items, got None")
        missing = num_items + 1 - len(splits)
        if missing:
            xp = devices.namespace(splits)
            splits = xp.concatenate([splits, xp.asarray([len(rows)] * missing)])
        bounds.append(splits)
    return bounds


def _within(x, y, r, bounds, max_num_neighbors, ignore):
    """The list of the points nearer than r to each query; `y` is None if the queries are the points."""
    with checks.argument_names(_SEARCH):
        return kpcore.radius_search(
            x, y, r, points_row_splits=bounds[0], queries_row_splits=bounds[1], inclusive=False,
            max_neighbors=max_num_neighbors, ignore_query_point="index" if ignore else False
        )  # fmt: skip


def _nearest(x, y, k, bounds, cosine, ignore):
    """The list of the k nearest points of each query; `y` is None if the queries are the points."""
    if checks.boolean("cosine", cosine):
        x, y = _directions("x", x), None if y is None else _directions("y", y)
    with checks.argument_names(_SEARCH):
        return kpcore.knn_search(
            x, y, k, points_row_splits=bounds[0], queries_row_splits=bounds[1],
            ignore_query_point="index" if ignore else False
        )  # fmt: skip


def _directions(name, rows):
    """Rows scaled to length 1: their squared distances are twice one minus the cosine of their angle."""
    rows = checks.array(name, rows, "N D", checks.REAL, {})
    norms = np.sqrt((rows * rows).sum(axis=1))
    zero = norms == 0
    if zero.any():
        raise ValueError(f"{name}: expected no rows of zeros with cosine=True, got one in row {int(zero.argmax())}")
    return rows / norms[:, None]


def _counts(ratio, lengths):
    """The number of points to choose in each item, (B,) int64, rounded as torch_cluster does on the CPU."""
    if isinstance(ratio, torch.Tensor):
        ratio = checked(None, "ratio", ratio)
        if ratio.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"ratio: expected float32 or float64, got {str(ratio.dtype)[6:]}")
        if ratio.numel() != 1 and ratio.shape != lengths.shape:
            expected = f"a number, or ({len(lengths)},) to match the batch"
            raise ValueError(f"ratio: expected {expected}, got {tuple(ratio.shape)}")
        ratio = ratio.detach().cpu().numpy()
    else:
        ratio = np.array(0.5 if ratio is None else checks.number("ratio", ratio, np.dtype(np.float64)))
    if not ((ratio > 0) & (ratio <= 1)).all():
        raise ValueError(f"ratio: expected numbers above 0 and at most 1, got {ratio}")
    return np.ceil(lengths.astype(np.float32) * (ratio if ratio.ndim else np.float32(ratio))).astype(np.int64)


def _corner(name, value, pos):
    """One number for each axis of `pos`, of its dtype and on its device."""
    value = checked(None, name, value)
    if value.numel() != pos.shape[1]:
        raise ValueError(f"{name}: expected ({pos.shape[1]},) to match pos, got {tuple(value.shape)}")
    if value.dtype != pos.dtype or value.device != pos.device:
        raise TypeError(
            f"{name}: expected {str(pos.dtype)[6:]} on {pos.device} to match pos, got {str(value.dtype)[6:]} on "
            f"{value.device}; convert it with {name}.to(pos)"
        )
    return value.reshape(-1)

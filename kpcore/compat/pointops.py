"""``pointops``, the operations of Point Transformer, with the names and arguments of Pointcept's ``libs/pointops``.

Code written for pointops runs with one import changed::

    from kpcore.compat import pointops      # in place of: import pointops

Batches are stacked; ``offset`` (B,) int32 or int64 has the end of each item, ``new_offset`` that of the queries.
Indices are int32 and count in the stacked points. Nothing is compiled, nothing depends on the version of torch, and
every function works on the CPU too.

`furthestsampling`, `knnquery` and `queryandgroup` are those of ``lib/pointops`` of the first Point Transformer
(POSTECH-CVLab/point-transformer), with another order of arguments; its ``grouping(input, idx)`` is `grouping2`, its
``interpolation`` and ``interpolation2`` are the same as here.

As in pointops, and different from the functions of `kpcore`:

* distances are not squared, but 100,000 where there is no neighbour; the index there is -1;
* `ball_query` is exclusive at `max_radius`, inclusive at `min_radius`, and always takes points closer than 0.00316
  (a squared distance of 1e-5), such as the query itself;
* `interpolation` weighs by 1 / (distance + 1e-8), not by the square.

Different from pointops:

* All functions take float64 too, coordinates of any number of axes from 1 to 16, and any `nsample`; pointops has room
  for 128 neighbours in `knn_query` and for 2,048 points within the radius in `ball_query`.
* Rows are ordered by (distance, index). `ball_query` of pointops calls a heap sort on what is no heap, so its order is
  another, and so is which points remain if there are more than `nsample`: here every so many-th by distance, as is
  meant. There it also returns their indices in place of their distances.
* `new_xyz` without `new_offset`, and the reverse, are an error in `knn_query` and the ball queries. pointops then
  searches the points themselves.
* Where an item has fewer points than `nsample` or `k`, `interpolation` uses those that there are; pointops adds a small
  part of the last point of the batch. `grouping2` gives zeros for an index of -1, where pointops reads outside of the
  features. `knnquery` repeats the first point of the item, as there.
* `farthest_point_sampling` chooses no point twice and takes the smallest index of equally far points. Items may be
  empty. Asking for more points than an item has is an error.
* Under autocast, features of 16 bits are taken in float32, and `grouping` and `interpolation` return float32.
* Gradients are the same in every run, to the bit.
* `subtraction`, `aggregation`, `attention_relation_step` and `attention_fusion_step` raise NotImplementedError: compute
  them in torch from the rows that `grouping2` gathers, as in ``input1[:, None] - grouping2(input2, idx)``.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat.open3d_search import kept_pairs, measures, pairs
from kpcore.torch.ops import checked, on_stream_of, to_tensor

__all__ = [
    "aggregation", "attention_fusion_step", "attention_relation_step", "ball_query", "ball_query_and_group",
    "batch2offset", "farthest_point_sampling", "furthestsampling", "grouping", "grouping2", "interpolation",
    "interpolation2", "knn_query", "knn_query_and_group", "knnquery", "offset2batch", "query_and_group",
    "queryandgroup", "random_ball_query", "subtraction",
]  # fmt: skip

_NAMES = {"points": "xyz", "queries": "new_xyz", "points_row_splits": "offset", "queries_row_splits": "new_offset",
          "features": "feat", "k": "nsample"}  # fmt: skip
_MISSING = 1e5  # the distance where there is no neighbour: the square root of 1e10
_ALWAYS = 1e-5  # squared distance up to which a ball query takes a point, whatever the radii
_NEAR = 1.001 * _ALWAYS**0.5


# ---- searches


def knn_query(nsample: int, xyz: torch.Tensor, offset: torch.Tensor, new_xyz: torch.Tensor | None = None,
              new_offset: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The `nsample` nearest points of each query, by (distance, index).

    Parameters
    ----------
    nsample : int
        At least 1.
    xyz : (N, D) float32 or float64
        Points.
    offset : (B,) int32 or int64
        Ends of the batch items of `xyz`.
    new_xyz : (M, D), dtype of `xyz`, optional
        Queries; by default the points themselves.
    new_offset : (B,) int32 or int64, optional
        Ends of the batch items of `new_xyz`, passed together with it.

    Returns
    -------
    idx : (M, nsample) int32
        -1 where the item has no more points.
    dist : (M, nsample), dtype of `xyz`
        Not squared; 100,000 where the item has no more points. Without gradient.

    Raises
    ------
    ValueError, TypeError
        For wrong shapes, dtypes or devices, offsets that do not match the points, and coordinates that are not finite.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> xyz, offset = torch.tensor([[0.0], [1.0], [3.0], [9.0]]), torch.tensor([3, 4], dtype=torch.int32)
    >>> pointops.knn_query(2, xyz, offset)
    (tensor([[ 0,  1],
            [ 1,  0],
            [ 2,  1],
            [ 3, -1]], dtype=torch.int32), tensor([[0.0000e+00, 1.0000e+00],
            [0.0000e+00, 1.0000e+00],
            [0.0000e+00, 2.0000e+00],
            [0.0000e+00, 1.0000e+05]]))
    """
    splits = _bounds(xyz, offset, new_xyz, new_offset)
    nsample = checks.integer("nsample", nsample, 1)
    neighbors = _nearest(nsample, xyz, new_xyz, splits)
    index = on_stream_of(xyz, lambda: to_tensor(neighbors.to_padded(nsample, -1)))
    distance = to_tensor(neighbors.stored_distance)
    if len(distance) == index.numel():
        return index, distance.view(index.shape)
    return index, _padded(index >= 0, distance, _MISSING)


@torch.no_grad()
def ball_query(nsample: int, max_radius: float, min_radius: float, xyz: torch.Tensor, offset: torch.Tensor,
               new_xyz: torch.Tensor | None = None, new_offset: torch.Tensor | None = None
               ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Up to `nsample` points between two radii of each query, by (distance, index).

    A point at distance d is taken if ``min_radius <= d < max_radius``, compared as squares in the dtype of the points,
    or if ``d² <= 1e-5``. If there are c > nsample of them, those numbered ``floor(i * c / nsample)`` are. All pairs
    within `max_radius` are in memory for a moment.

    Parameters
    ----------
    nsample, xyz, offset, new_xyz, new_offset
        As in `knn_query`; D = 1 to 16.
    max_radius, min_radius : float
        In the unit of the points; `min_radius` at least 0 and below `max_radius`.

    Returns
    -------
    idx, dist
        As `knn_query`.

    Raises
    ------
    ValueError, TypeError
        As `knn_query`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> xyz, offset = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([4], dtype=torch.int32)
    >>> pointops.ball_query(3, 3.0, 1.5, xyz, offset)[0]
    tensor([[ 0,  2, -1],
            [ 1,  3, -1],
            [ 2,  0, -1],
            [ 3,  1, -1]], dtype=torch.int32)
    """
    nsample, point, distance, row_splits = _between(nsample, max_radius, min_radius, xyz, offset, new_xyz, new_offset)
    counts, number = torch.diff(row_splits)[:, None], torch.arange(nsample, device=xyz.device)
    there = number < counts
    if not (counts > nsample).any():
        return _padded(there, point, -1), _padded(there, distance, _MISSING)
    # pointops computes these numbers in float32.
    spread = (counts.to(torch.float32) / nsample * number).to(torch.int64)
    number = torch.where(counts > nsample, torch.minimum(spread, counts - 1), number)
    return _rows_of_pairs(number, there, point, distance, row_splits)


@torch.no_grad()
def random_ball_query(nsample: int, max_radius: float, min_radius: float, xyz: torch.Tensor, offset: torch.Tensor,
                      new_xyz: torch.Tensor | None = None, new_offset: torch.Tensor | None = None
                      ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Up to `nsample` points between two radii of each query, drawn at random.

    As `ball_query`, but the points of a row are the first ones in a random order of all points, which is drawn by
    ``torch.randperm`` on the device of the points and is the same for all queries.

    Parameters
    ----------
    nsample, max_radius, min_radius, xyz, offset, new_xyz, new_offset
        As in `ball_query`.

    Returns
    -------
    idx, dist
        As `knn_query`, in the random order.
    """
    nsample, point, distance, row_splits = _between(nsample, max_radius, min_radius, xyz, offset, new_xyz, new_offset)
    counts = torch.diff(row_splits)
    query = torch.repeat_interleave(torch.arange(len(counts), device=xyz.device), counts, output_size=len(point))
    rank = torch.randperm(len(xyz), device=xyz.device)
    order = torch.argsort(query * len(xyz) + rank[point])
    number = torch.arange(nsample, device=xyz.device)
    return _rows_of_pairs(number, number < counts[:, None], point[order], distance[order], row_splits)


def farthest_point_sampling(xyz: torch.Tensor, offset: torch.Tensor, new_offset: torch.Tensor) -> torch.Tensor:
    """Points chosen greedily to be far from each other, beginning with the first of each batch item.

    Parameters
    ----------
    xyz : (N, D) float32 or float64, D = 1 to 16
    offset, new_offset : (B,) int32 or int64
        Ends of the batch items of `xyz` and of the result. No item may get more points than it has.

    Returns
    -------
    (S,) int32
        With S = ``new_offset[-1]``; item after item, each in the order of choice.

    Raises
    ------
    ValueError, TypeError
        As `knn_query`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> xyz = torch.tensor([[0.0], [1.0], [9.0], [10.0], [4.0]])
    >>> pointops.farthest_point_sampling(xyz, torch.tensor([5]), torch.tensor([3]))
    tensor([0, 3, 4], dtype=torch.int32)
    """
    splits, chosen = _splits("offset", offset), _splits("new_offset", new_offset)
    if splits.shape != chosen.shape:
        raise ValueError(f"new_offset: expected {tuple(offset.shape)} to match offset, got {tuple(new_offset.shape)}")
    lengths, counts = torch.diff(splits), torch.diff(chosen)
    wrong = (counts < 0) | (counts > lengths)
    if wrong.any():
        item = int(wrong.to(torch.uint8).argmax())
        raise ValueError(f"new_offset: expected 0 to {lengths[item]} points in item {item}, got {counts[item]}")
    with checks.argument_names({"points": "xyz", "row_splits": "offset"}):
        return kpt.farthest_point_sampling(xyz, counts, row_splits=splits).index


# ---- grouping


def grouping(idx: torch.Tensor, feat: torch.Tensor, xyz: torch.Tensor, new_xyz: torch.Tensor | None = None,
             with_xyz: bool = False) -> torch.Tensor:  # fmt: skip
    """The features of the neighbours of each query, zeros where the index is -1.

    Differentiable in `feat`, `xyz` and `new_xyz`.

    Parameters
    ----------
    idx : (M, nsample) int32 or int64
        As `knn_query` returns it: -1, or 0 to N - 1.
    feat : (N, C) float32 or float64
    xyz : (N, D), dtype of `feat`
        Points.
    new_xyz : (M, D), dtype of `feat`, optional
        Queries; by default the points.
    with_xyz : bool
        Whether the coordinates of the neighbours relative to the query come before the features, zeros too where the
        index is -1.

    Returns
    -------
    (M, nsample, C), or (M, nsample, D + C) with `with_xyz`

    Raises
    ------
    ValueError, TypeError
        For other shapes and dtypes, and an index outside its range.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> idx = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    >>> pointops.grouping(idx, torch.tensor([[5.0], [7.0]]), torch.tensor([[0.0], [1.0]]), with_xyz=True)
    tensor([[[0., 5.],
             [1., 7.]],
    <BLANKLINE>
            [[0., 7.],
             [0., 0.]]])
    """
    if isinstance(idx, torch.Tensor) and idx.is_floating_point():
        raise TypeError(
            "idx: expected int32 or int64, got features first; grouping(input, idx) of the first Point Transformer is "
            "grouping2"
        )
    if not checks.boolean("with_xyz", with_xyz):
        return _gathered("feat", feat, idx)[0]
    xyz, feat = checked(None, "xyz", xyz), _under_autocast(checked(None, "feat", feat))
    new_xyz = xyz if new_xyz is None else checked(None, "new_xyz", new_xyz)
    if xyz.ndim != 2 or feat.ndim != 2 or len(xyz) != len(feat):
        raise ValueError(f"feat: expected (N, C) to match xyz {tuple(xyz.shape)}, got {tuple(feat.shape)}")
    if new_xyz.shape != (len(idx), xyz.shape[1]):
        expected = len(idx), xyz.shape[1]
        raise ValueError(f"new_xyz: expected {expected} to match idx and xyz, got {tuple(new_xyz.shape)}")
    for name, other in (("feat", feat), ("new_xyz", new_xyz)):
        if other.dtype != xyz.dtype:
            raise TypeError(f"{name}: expected {str(xyz.dtype)[6:]} to match xyz, got {str(other.dtype)[6:]}")
    # Both are gathered at once and the queries subtracted in place, as the result is much larger than its parts.
    grouped, missing = _gathered("feat", torch.cat([xyz, feat], 1), idx)
    centers = new_xyz[:, None]
    grouped[:, :, : xyz.shape[1]] -= centers if missing is None else torch.where(missing, 0, centers)
    return grouped


def grouping2(input: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The rows of `input`, (N, C) float32 or float64, that `idx` names, zeros where it is -1; see `grouping`.

    Differentiable in `input`. The ``grouping`` of the first Point Transformer.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> pointops.grouping2(torch.tensor([[5.0], [7.0]]), torch.tensor([[1, -1]]))
    tensor([[[7.],
             [0.]]])
    """
    return _gathered("input", input, idx)[0]


def knn_query_and_group(feat: torch.Tensor, xyz: torch.Tensor, offset: torch.Tensor | None = None,
                        new_xyz: torch.Tensor | None = None, new_offset: torch.Tensor | None = None,
                        idx: torch.Tensor | None = None, nsample: int | None = None, with_xyz: bool = False
                        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`grouping` of the index of `knn_query`, or of `idx` if it is passed; returns (features, idx)."""
    if idx is None:
        _required(offset=offset, nsample=nsample)
        idx, _ = knn_query(nsample, xyz, offset, new_xyz, new_offset)
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


def ball_query_and_group(feat: torch.Tensor, xyz: torch.Tensor, offset: torch.Tensor | None = None,
                         new_xyz: torch.Tensor | None = None, new_offset: torch.Tensor | None = None,
                         idx: torch.Tensor | None = None, max_radio: float | None = None, min_radio: float = 0,
                         nsample: int | None = None, with_xyz: bool = False
                         ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`grouping` of the index of `ball_query`, or of `idx` if it is passed; returns (features, idx)."""
    if idx is None:
        _required(offset=offset, nsample=nsample, max_radio=max_radio)
        idx, _ = ball_query(nsample, max_radio, min_radio, xyz, offset, new_xyz, new_offset)
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


def query_and_group(nsample: int, xyz: torch.Tensor, new_xyz: torch.Tensor | None, feat: torch.Tensor,
                    idx: torch.Tensor | None, offset: torch.Tensor, new_offset: torch.Tensor | None, dilation: int = 0,
                    with_feat: bool = True, with_xyz: bool = True
                    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`grouping` of every (dilation + 1)-th of the nearest points of each query.

    The points are those numbered ``(dilation + 1) * i`` for i from 0 to nsample - 1. In an item with fewer than
    ``1 + (nsample - 1) * (dilation + 1)`` points they are spread over all n that there are, numbered
    ``floor(i * (n - 1) / (nsample - 1))``; some are then named twice.

    Parameters
    ----------
    nsample, xyz, new_xyz, offset, new_offset
        As in `knn_query`.
    feat, with_xyz
        As in `grouping`.
    idx : (M, nsample) int32 or int64, optional
        The index, if it is known.
    dilation : int
        At least 0.
    with_feat : bool
        False: return only the index.

    Returns
    -------
    (features, idx), or idx
    """
    if idx is None:
        nsample = checks.integer("nsample", nsample, 1)
        step = checks.integer("dilation", dilation, 0) + 1
        total = 1 + (nsample - 1) * step
        queries_offset = new_offset if new_xyz is not None else None
        nearest, _ = knn_query(total, xyz, offset, new_xyz, queries_offset)
        available = (nearest >= 0).sum(1, keepdim=True).to(torch.float64)
        # pointops computes the numbers in this way, in float64.
        spread = (available - 1) / max(nsample - 1, 1) - 1
        column = torch.arange(nsample, device=nearest.device)
        number = torch.where(available < total, ((spread + 1) * column).to(torch.int64).clamp(min=0), step * column)
        idx = nearest.gather(1, number)
    if not checks.boolean("with_feat", with_feat):
        return idx
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


# ---- interpolation


def interpolation(xyz: torch.Tensor, new_xyz: torch.Tensor, feat: torch.Tensor, offset: torch.Tensor,
                  new_offset: torch.Tensor, k: int = 3) -> torch.Tensor:  # fmt: skip
    """Features at the queries from those of the `k` nearest points, weighted by 1 / (distance + 1e-8).

    Differentiable in `feat`; weights are constants of the gradient.

    Parameters
    ----------
    xyz, new_xyz : (N, D) and (M, D), float32 or float64
        Points and queries.
    feat : (N, C) float32 or float64
        Features of the points.
    offset, new_offset : (B,) int32 or int64
        Ends of the batch items of points and queries.
    k : int
        At least 1. A query of an item with fewer points uses all of them; with none, its features are zero.

    Returns
    -------
    (M, C), dtype of `feat`

    Raises
    ------
    ValueError, TypeError
        As `knn_query`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> xyz, new_xyz, feat = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0]]), torch.tensor([[10.0], [40.0]])
    >>> pointops.interpolation(xyz, new_xyz, feat, torch.tensor([2]), torch.tensor([1]), k=2)
    tensor([[20.]])
    """
    feat = _under_autocast(checked(None, "feat", feat))
    with checks.argument_names({"nsample": "k"}):
        neighbors = _nearest(k, xyz, new_xyz, _bounds(xyz, offset, new_xyz, new_offset))
    inverse = 1 / (to_tensor(neighbors.stored_distance) + 1e-8)
    if len(inverse) == neighbors.num_queries * k:
        rows = inverse.view(-1, k)
        weights = rows / rows.sum(1, keepdim=True)
    else:
        row_splits = to_tensor(neighbors.stored_row_splits)
        total = kpt.segment_reduce(inverse[:, None], row_splits, "sum")[:, 0]
        weights = inverse / torch.repeat_interleave(total, torch.diff(row_splits), output_size=len(inverse))
    with checks.argument_names(_NAMES):
        return kpt.neighbor_reduce(feat, neighbors, "sum", weights=weights.view(-1).to(feat.dtype))


interpolation2 = interpolation


# ---- names of the first Point Transformer


furthestsampling = farthest_point_sampling


def knnquery(nsample: int, xyz: torch.Tensor, new_xyz: torch.Tensor | None, offset: torch.Tensor,
             new_offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`knn_query` in the order of arguments of the first Point Transformer.

    Where an item has too few points, the index is that of its first point, at distance 100,000.
    """
    idx, dist = knn_query(nsample, xyz, offset, new_xyz, None if new_xyz is None else new_offset)
    missing = idx < 0
    if missing.any():
        ends = (offset if new_xyz is None else new_offset).to(torch.int64)
        item = torch.searchsorted(ends, torch.arange(len(idx), device=idx.device), right=True)
        first = torch.cat([offset.new_zeros(1), offset])[item].to(torch.int32)
        idx = torch.where(missing, first[:, None], idx)
    return idx, dist


def queryandgroup(nsample: int, xyz: torch.Tensor, new_xyz: torch.Tensor | None, feat: torch.Tensor,
                  idx: torch.Tensor | None, offset: torch.Tensor, new_offset: torch.Tensor | None,
                  use_xyz: bool = True) -> torch.Tensor:  # fmt: skip
    """`grouping` of the index of `knnquery`, or of `idx` if it is passed; returns the features only."""
    if idx is None:
        idx, _ = knnquery(nsample, xyz, new_xyz, offset, new_offset)
    return grouping(idx, feat, xyz, new_xyz, use_xyz)


# ---- batches


def offset2batch(offset: torch.Tensor) -> torch.Tensor:
    """The number of the batch item of each row, (N,) int64, from the ends of the items.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> pointops.offset2batch(torch.tensor([2, 2, 5], dtype=torch.int32))
    tensor([0, 0, 2, 2, 2])
    """
    with checks.argument_names({"row_splits": "offset"}):
        return kpt.row_splits_to_batch(_splits("offset", offset))


def batch2offset(batch: torch.Tensor) -> torch.Tensor:
    """The ends of the batch items, (B,) int32, from the number of the item of each row, (N,), which never decreases.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import pointops
    >>> pointops.batch2offset(torch.tensor([0, 0, 2, 2, 2]))
    tensor([2, 2, 5], dtype=torch.int32)
    """
    return kpt.batch_to_row_splits(batch)[1:].to(torch.int32)


# ---- not available


_ATTENTION = "not in kpcore; compute it in torch from the rows that grouping2 gathers"


def subtraction(*_: object) -> NoReturn:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"subtraction: {_ATTENTION}")


def aggregation(*_: object) -> NoReturn:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"aggregation: {_ATTENTION}")


def attention_relation_step(*_: object) -> NoReturn:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"attention_relation_step: {_ATTENTION}")


def attention_fusion_step(*_: object) -> NoReturn:
    """Not available: raises NotImplementedError."""
    raise NotImplementedError(f"attention_fusion_step: {_ATTENTION}")


# ---- what they share


def _required(**values: Any) -> None:
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name}: expected a value, because idx is None, got None")


def _splits(name, offset):
    """row_splits (B + 1,) int64 from the ends of the items."""
    offset = checked(None, name, offset)
    if offset.ndim != 1 or offset.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64 (B,), got {str(offset.dtype)[6:]} {tuple(offset.shape)}")
    return torch.nn.functional.pad(offset.to(torch.int64), (1, 0))


def _bounds(xyz, offset, new_xyz, new_offset):
    """(row_splits of the points, row_splits of the queries or None); the search checks their values."""
    checked(None, "xyz", xyz)
    if (new_xyz is None) != (new_offset is None):
        missing, there = ("new_xyz", "new_offset") if new_xyz is None else ("new_offset", "new_xyz")
        raise ValueError(f"{missing}: expected a tensor, because {there} is one, got None")
    splits = _splits("offset", offset)
    if new_offset is None:
        return splits, None
    queries_splits = _splits("new_offset", new_offset)
    if queries_splits.shape != splits.shape:
        raise ValueError(f"new_offset: expected {tuple(offset.shape)} to match offset, got {tuple(new_offset.shape)}")
    return splits, queries_splits


def _under_autocast(feat):
    """Features of 16 bits in float32 under autocast, as the operators of kpcore.torch compute there."""
    is_half = feat.dtype in (torch.float16, torch.bfloat16)
    return feat.float() if is_half and torch.is_autocast_enabled(feat.device.type) else feat


def _nearest(k, xyz, new_xyz, splits):
    with checks.argument_names(_NAMES):
        return kpt.knn_search(
            xyz, new_xyz, k, points_row_splits=splits[0], queries_row_splits=splits[1], return_distances=True
        )


def _between(nsample, max_radius, min_radius, xyz, offset, new_xyz, new_offset):
    """(nsample, point, distance, row_splits) of the pairs of a ball query, by (distance, index)."""
    nsample = checks.integer("nsample", nsample, 1)
    splits = _bounds(xyz, offset, new_xyz, new_offset)
    dtype = np.dtype(np.float64)
    max_radius, min_radius = (
        checks.length("max_radius", max_radius, dtype),
        checks.not_negative("min_radius", min_radius),
    )
    if not min_radius < max_radius:
        raise ValueError(f"min_radius: expected less than max_radius = {max_radius}, got {min_radius}")
    # Without an inner radius these are the neighbours, unless points are always taken that are beyond the outer one.
    is_ball = min_radius == 0 and max_radius > _NEAR
    with checks.argument_names(_NAMES | {"radius": "max_radius"}):
        neighbors = kpt.radius_search(
            xyz, new_xyz, max(max_radius, _NEAR), points_row_splits=splits[0], queries_row_splits=splits[1],
            inclusive=not is_ball, sort="distance", return_distances=True
        )  # fmt: skip
    if is_ball:
        point, row_splits = to_tensor(neighbors.stored_index), to_tensor(neighbors.stored_row_splits)
        return nsample, point, to_tensor(neighbors.stored_distance), row_splits
    point, query, row_splits = pairs(neighbors)
    squared = measures(xyz, xyz if new_xyz is None else new_xyz, point, query, "L2")
    outer, inner = (torch.tensor(radius, dtype=xyz.dtype) for radius in (max_radius, min_radius))
    kept = (squared.to(torch.float64) <= _ALWAYS) | ((squared >= inner * inner) & (squared < outer * outer))
    # Distances are those of the search: torch's square root is not rounded to the nearest number everywhere.
    distance = to_tensor(neighbors.stored_distance)[: len(point)]
    point, distance, _, row_splits = kept_pairs(kept, point, distance, query, row_splits)
    return nsample, point, distance, row_splits


def _gathered(name, rows, idx):
    """(the rows (N, C) that `idx`, (M, nsample), names, zeros where it is -1; where that is, or None if nowhere)"""
    idx = checked(None, "idx", idx)
    if idx.ndim != 2 or idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"idx: expected int32 or int64 (M, nsample), got {str(idx.dtype)[6:]} {tuple(idx.shape)}")
    missing = idx == -1
    if missing.any():
        idx, missing = idx.masked_fill(missing, 0), missing[:, :, None]
        rows = rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])
    else:
        missing = None
    with checks.argument_names({"features": name, "index": "idx"}):
        gathered = kpt.gather(rows, idx.reshape(-1)).view(*idx.shape, rows.shape[1])
    return (gathered if missing is None else gathered.masked_fill(missing, 0)), missing


def _padded(there, values, fill):
    """The values in order where `there` is true, elsewhere `fill`."""
    return values.new_full(there.shape, fill).masked_scatter_(there, values)


def _rows_of_pairs(number, there, point, distance, row_splits):
    """(idx, dist) of the pairs with these numbers within their rows, padded with -1 and 100,000 unless `there`."""
    if not len(point):
        point, distance = point.new_zeros(1), distance.new_zeros(1)  # so that there is a row 0
    at = torch.where(there, row_splits[:-1, None] + number, 0)
    return torch.where(there, point[at], -1), torch.where(there, distance[at], _MISSING)

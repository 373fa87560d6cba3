"""Open3D's operations on lists of rows: their inverse, their sums, and dense tensors from them."""

from __future__ import annotations

from typing import NamedTuple

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import arguments
from kpcore.neighbors import transposed
from kpcore.torch.ops import on_stream_of, to_array, to_tensor

__all__ = ["invert_neighbors_list", "ragged_to_dense", "reduce_subarrays_sum"]

_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)


class InvertedNeighbors(NamedTuple):
    """What `invert_neighbors_list` returns."""

    neighbors_index: torch.Tensor  #: (E,) queries of each point
    neighbors_row_splits: torch.Tensor  #: (num_points + 1,) int64
    neighbors_attributes: torch.Tensor  #: (E, ...), or as short as the input if that has none


def invert_neighbors_list(num_points: int, inp_neighbors_index: torch.Tensor, inp_neighbors_row_splits: torch.Tensor,
                          inp_neighbors_attributes: torch.Tensor) -> InvertedNeighbors:  # fmt: skip
    """The queries of each point, from the neighbours of each query; the queries of a point are in rising order.

    Open3D's order is not deterministic, and the result has no gradient there; here it has one in the attributes.

    Parameters
    ----------
    num_points : int
        Number of points N.
    inp_neighbors_index : (E,) int32 or int64
        0 to N - 1. Open3D takes int32 only.
    inp_neighbors_row_splits : (M + 1,) int64
    inp_neighbors_attributes : (E, ...) or (0, ...)
        uint8, int8, int16, int32, int64, float32 or float64; values of each pair, carried to its place in the result.

    Returns
    -------
    InvertedNeighbors
    """
    num_points = checks.integer("num_points", num_points, 0, checks.MAX_POINTS)
    sizes = {}
    index = arguments.tensor("inp_neighbors_index", inp_neighbors_index, "E", arguments.INTEGERS, sizes)
    attributes = inp_neighbors_attributes
    if not (isinstance(attributes, torch.Tensor) and attributes.ndim and not len(attributes)):
        arguments.tensor("inp_neighbors_attributes", attributes, "E ...", _NUMBERS, sizes)
    row_splits = arguments.row_splits(
        "inp_neighbors_row_splits", inp_neighbors_row_splits, len(index), "inp_neighbors_index", index.device
    )
    arguments.check_range("inp_neighbors_index", index, num_points, "num_points")
    # The kernel carries one float for each pair: its number, which float64 holds exactly.
    number = torch.arange(len(index), dtype=torch.float64, device=index.device)

    def invert():
        arrays = [to_array("inp_neighbors", a.contiguous()) for a in (index.to(torch.int32), row_splits, number)]
        return [to_tensor(array) for array in transposed(*arrays, num_points)]

    queries, splits, number = on_stream_of(index, invert)
    if len(attributes):
        attributes = attributes[number.to(torch.int64)]
    return InvertedNeighbors(queries.to(index.dtype), splits, attributes)


def reduce_subarrays_sum(values: torch.Tensor, row_splits: torch.Tensor) -> torch.Tensor:
    """The sum of each row of values, 0 for an empty row.

    As in Open3D, and as its tests assert, no values give an empty result whatever `row_splits` say. Floats are summed
    in float64 and rounded once, and have a gradient, which Open3D's have not; integers wrap around.

    Parameters
    ----------
    values : (N,) int32, int64, float32 or float64
    row_splits : (R + 1,) int64
        Bounds of the rows, from 0 to at most N.

    Returns
    -------
    (R,), dtype of the values
    """
    values = arguments.tensor("values", values, "N", (*arguments.INTEGERS, *arguments.REAL), {})
    if not len(values):
        return torch.empty_like(values)
    row_splits = arguments.row_splits(
        "row_splits", row_splits, len(values), "values", values.device, may_end_before=True
    )
    if values.is_floating_point():
        return kpt.segment_reduce(values[: int(row_splits[-1]), None], row_splits, "sum")[:, 0]
    sums = torch.cat([values.new_zeros(1, dtype=torch.int64), values.cumsum(0)])[row_splits]
    return torch.diff(sums).to(values.dtype)


def ragged_to_dense(values: torch.Tensor, row_splits: torch.Tensor, out_col_size: int,
                    default_value: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Rows of a common length: longer rows are cut, shorter ones are filled with the default value.

    Open3D's has no gradient; here it has one in the values.

    Parameters
    ----------
    values : (N, ...) uint8, int8, int16, int32, int64, float32 or float64
    row_splits : (R + 1,) int64
        Bounds of the rows, from 0 to at most N.
    out_col_size : int
        Length of the rows of the result.
    default_value : (...), dtype of the values
        One item of the values: a 0-d tensor for values (N,).

    Returns
    -------
    (R, out_col_size, ...), dtype of the values
    """
    values = arguments.tensor("values", values, "N ...", _NUMBERS, {})
    row_splits = arguments.row_splits(
        "row_splits", row_splits, len(values), "values", values.device, may_end_before=True
    )
    length = checks.integer("out_col_size", out_col_size, 0)
    item = " ".join(map(str, values.shape[1:]))
    sizes = {"device": (values.device, "values")}
    default_value = arguments.tensor("default_value", default_value, item, (values.dtype,), sizes)
    position = row_splits[:-1, None] + torch.arange(length, device=values.device)
    inside = position < row_splits[1:, None]
    if not len(values):
        return default_value.expand(*inside.shape, *values.shape[1:]).clone()
    taken = values[position.clamp(max=len(values) - 1)]
    return torch.where(inside.view(*inside.shape, *[1] * (values.ndim - 1)), taken, default_value)

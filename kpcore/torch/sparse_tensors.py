"""Neighbour lists as sparse tensors of torch."""

from __future__ import annotations

import math
from typing import Any

import torch

from kpcore.backends import checks
from kpcore.neighbors import Neighbors
from kpcore.neighbors import checked as checked_list
from kpcore.torch import internals
from kpcore.torch.ops import checked, on_arrays, on_stream_of, to_array, to_tensor


def to_sparse(neighbors: Neighbors, values: torch.Tensor | None = None) -> torch.Tensor:
    """A sparse CSR tensor (M, N) on the device of the list that holds `values` (E,), by default ones (float32).

    Differentiable in `values`; a product is differentiable in what it multiplies too. Pairs keep their order, so the
    columns of a row may be in any order, and a pair that occurs twice counts twice.

    The gradient of ``A @ x`` in the values is a dense array (M, N) in torch, which holds for every sparse tensor:
    400 MB for 10,000 points. ``torch.sparse.mm(A, x, "sum")`` on the CPU, and `neighbor_reduce` with weights, need
    memory for the pairs only.

    Parameters
    ----------
    neighbors : Neighbors
        At most 2**31 - 1 pairs.
    values : (E,) float32 or float64 tensor, optional
        One for each pair, in the order of ``neighbors.index``. The result shares its memory.

    Examples
    --------
    >>> import numpy as np, torch, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 1, 1], np.int32), kp.row_splits([2, 0, 1]), num_points=2)
    >>> kp.torch.to_sparse(nb, torch.tensor([1.0, 2.0, 3.0])) @ torch.tensor([[10.0], [100.0]])
    tensor([[210.],
            [  0.],
            [300.]])
    """
    pairs = checked_list(neighbors).num_pairs
    if pairs > checks.MAX_POINTS:
        raise ValueError(f"neighbors: expected at most {checks.MAX_POINTS} pairs, got {pairs}")
    checked(None, "values", values, optional=True)
    index = to_tensor(neighbors.stored_index)
    shape = neighbors.num_queries, neighbors.num_points
    # Indices of one dtype, as torch requires. The gradient of torch.sparse.mm(A, x, "sum") in x numbers the places of
    # the whole matrix in this dtype: with int32 it is wrong, in silence, above 46,340 points (pytorch#99848).
    dtype = torch.int32 if math.prod(shape) < 2**31 else torch.int64

    def make() -> Any:
        # Copies, because the arrays of a list must not change.
        splits, columns = to_tensor(neighbors.stored_row_splits).to(dtype), index[:pairs].to(dtype, copy=True)
        if values is None:
            entries = torch.ones(pairs, device=index.device)
        else:
            sizes = {"E": (pairs, "neighbors")} | checks.device_of(("neighbors", neighbors.stored_index))
            on_arrays(checks.array, "values", to_array("values", values), "E", checks.REAL, sizes)
            entries = values
        return internals.apply(_Sparse, entries, splits, columns, shape)

    return on_stream_of(index, make)


class _Sparse(torch.autograd.Function):
    """torch.sparse_csr_tensor with a correct gradient: torch's is that of sorted columns without equal pairs."""

    @staticmethod
    def forward(values, row_splits, columns, shape):
        return torch.sparse_csr_tensor(row_splits, columns, values, shape, check_invariants=False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx, grad):
        row_splits, columns = ctx.saved_tensors
        if grad.layout is torch.sparse_csr:
            if torch.equal(grad.crow_indices(), row_splits) and torch.equal(grad.col_indices(), columns):
                return grad.values(), None, None, None
            grad = grad.to_dense()
        rows = torch.repeat_interleave(torch.diff(row_splits))
        return grad[rows, columns], None, None, None

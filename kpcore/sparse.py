"""Sparse convolution (SparseConv) and its transpose: each pair of a neighbour list names a cell of the filter."""

from __future__ import annotations

import math

from kpcore import cells
from kpcore.autodiff import operator
from kpcore.backends import checks
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.neighbors import Neighbors, point_sizes
from kpcore.ops import Call

__all__ = ["sparse_conv", "sparse_conv_transpose"]

_DIFFERENTIABLE = ("features", "filters", "importances", "neighbor_importances")


def _checked_call(is_transpose, neighbors, kernel_index, features, filters, normalize, importances,
                  neighbor_importances):  # fmt: skip
    sizes = point_sizes(neighbors) | {"M": (neighbors.num_queries, "neighbors")}
    pairs = {"device": sizes["device"], "E": (len(neighbors.stored_index), "neighbors")}
    kernel_index = checks.array("kernel_index", kernel_index, "E", checks.INTEGERS, pairs)
    features = checks.array("features", features, "N Cin", checks.FEATURES, sizes)
    axes = max(1, getattr(filters, "ndim", 3) - 2)
    shape = "K Cin Cout" if axes == 1 else " ".join(f"K{axis}" for axis in range(axes)) + " Cin Cout"
    filters = checks.array("filters", filters, shape, checks.FEATURES, sizes, like=("features", features))
    if 0 in filters.shape:
        raise ValueError(f"filters: expected sizes of at least 1, got {filters.shape}")
    if math.prod(filters.shape[:-2]) > cells.MAX_CELLS:
        raise ValueError(f"filters: expected at most {cells.MAX_CELLS} cells, got {math.prod(filters.shape[:-2])}")
    call = Call(
        points=None, queries=None, queries_are_points=False, neighbors=neighbors, index=neighbors.stored_index,
        row_splits=neighbors.stored_row_splits, features=features, filters=filters, extents=None, offset=None,
        kernel_index=kernel_index, depth=math.prod(filters.shape[:-2]), height=1, width=1, mapping=0, interpolation=0,
        align_corners=True, is_normalized=checks.boolean("normalize", normalize), transposed_filters=False,
    )  # fmt: skip
    return cells.with_factors(call, importances, neighbor_importances, is_transpose, sizes)


@operator(
    vjp=cells.gradients,
    diff=_DIFFERENTIABLE,
    result=cells.result,
    forward=cells.forward,
    copies=("kernel_index",),
)
def sparse_conv(neighbors: Neighbors, kernel_index: AnyArray, features: Array[Computed], filters: Array[Computed], *,
                normalize: bool = False, importances: Array[Computed] | None = None,
                neighbor_importances: Array[Computed] | None = None) -> Call[Computed]:  # fmt: skip
    """Sparse convolution: each neighbour is multiplied by the filter cell that its pair names.

    ``out[q] = 1/ψ_q Σ_i a_qi m_i f_i W[k_qi]`` over the neighbours i of q. `kernel_map` makes the list and the cells k
    from integer coordinates, by the rules of submanifold and strided convolutions. Differentiable in `features`,
    `filters`, `importances` and `neighbor_importances`; see `kpcore.autodiff`.

    Parameters
    ----------
    neighbors : Neighbors
        M rows, N points.
    kernel_index : (E,) int32 or int64
        The cell of each pair, 0 to K - 1, in the order of ``neighbors.index`` and as long. Several neighbours of a
        query may have the same cell: they are summed.
    features : (N, Cin) float32 or float64
    filters : (K, Cin, Cout) or (K_0, ..., K_n, Cin, Cout), dtype of the features
        Cells are numbered in C order.
    normalize : bool
        Whether ψ_q is the sum of the `neighbor_importances` of q, by default its number of neighbours, or 1. Where that
        sum is 0, ψ_q is 1.
    importances : (N,), dtype of the features, optional
        Factors m of the points.
    neighbor_importances : (E,), dtype of the features, optional
        Factors a of the pairs.

    Returns
    -------
    (M, Cout), dtype of the features
        Zero where a query has no neighbours.

    Raises
    ------
    ValueError
        For shapes that do not agree, or a cell that the filters do not have. On the GPU, where reading the cells would
        wait for it, the results of a query with such a cell are NaN instead.
    TypeError
        For other dtypes.

    Notes
    -----
    Memory beyond the output and a packed copy of the filters is at most 4 MiB per thread, 8 MiB for gradients, or 12
    times that of the filters for one output channel if that is more. Gradients of features and filters transpose the
    pairs in each call.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 1, 1], np.int32), kp.row_splits([2, 1]), num_points=2)
    >>> cells = np.array([0, 1, 0], np.int32)
    >>> kp.sparse_conv(nb, cells, np.array([[1.0], [10.0]]), np.array([[[2.0]], [[3.0]]]))
    array([[32.],
           [20.]])
    """
    return _checked_call(False, neighbors, kernel_index, features, filters, normalize, importances,
                         neighbor_importances)  # fmt: skip


@operator(
    vjp=cells.gradients,
    diff=_DIFFERENTIABLE,
    result=cells.result,
    forward=cells.forward,
    copies=("kernel_index",),
)
def sparse_conv_transpose(neighbors: Neighbors, kernel_index: AnyArray, features: Array[Computed],
                          filters: Array[Computed], *, normalize: bool = False,
                          importances: Array[Computed] | None = None,
                          neighbor_importances: Array[Computed] | None = None) -> Call[Computed]:  # fmt: skip
    """The transpose of `sparse_conv`: importances are those of the queries, and points are normalised.

    ``out[q] = m_q Σ_i a_qi/ψ_i f_i W[k_qi]`` over the neighbours i of q, with ψ_i over all queries that have point i as
    neighbour. Without `normalize` and `importances` it is the same sum as `sparse_conv`, which is what spconv calls an
    inverse convolution: call it with ``kernel_map(...).transpose()``. Differentiable in `features`, `filters`,
    `importances` and `neighbor_importances`.

    Parameters
    ----------
    neighbors, kernel_index, features, filters
        As in `sparse_conv`.
    normalize : bool
        Whether ψ_i is the sum of the `neighbor_importances` of point i over all queries, by default their number, or 1.
        Where that sum is 0, ψ_i is 1.
    importances : (M,), dtype of the features, optional
        Factors m of the queries.
    neighbor_importances : (E,), dtype of the features, optional
        Factors a of the pairs.

    Returns
    -------
    (M, Cout), dtype of the features

    Raises
    ------
    ValueError, TypeError
        As `sparse_conv`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 0], np.int32), kp.row_splits([1, 1]), num_points=1)
    >>> cells, filters = np.array([0, 1], np.int32), np.array([[[2.0]], [[3.0]]])
    >>> kp.sparse_conv_transpose(nb, cells, np.array([[10.0]]), filters, normalize=True)
    array([[10.],
           [15.]])
    """
    return _checked_call(True, neighbors, kernel_index, features, filters, normalize, importances,
                         neighbor_importances)  # fmt: skip

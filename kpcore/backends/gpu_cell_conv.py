"""Launchers of the convolutions with a filter of cells: a kernel sums features by cell, cuBLAS multiplies the sums."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import WARP, computed, ctype, kernels_of, launch, launcher, product
from kpcore.backends.gpu_lists import sum_by_point

_SUMS_BYTES = 32 << 20  # sums computed at a time: they fit the second-level cache of an H100 or H200


def _kernels(features, points=None):
    geometry = computed(features.dtype) if points is None else points.dtype
    return kernels_of("cell_conv.cu", KP_G=ctype(geometry), KP_F=ctype(features.dtype))


def _num_cells(fields):
    return fields.depth * fields.height * fields.width


def _parameters(fields):
    """Parameters of a kernel that are no fields."""
    extents, cells = fields.extents, fields.kernel_index
    rows, axes = (1, 1) if extents is None else (*extents.shape, 1, 1)[:2]
    is_long = cells is not None and cells.dtype == np.int64
    return {"extent_rows": rows, "extent_axes": axes, "channels": fields.features.shape[1],
            "kernel_index": None if is_long else cells, "long_kernel_index": cells if is_long else None}  # fmt: skip


def _queries_at_once(fields):
    return max(1, _SUMS_BYTES // (_num_cells(fields) * fields.features.shape[1] * fields.features.dtype.itemsize))


def _aggregated(fields):
    """Yield (first query, end, sums (rows, cells * channels)) for some thousand queries at a time.

    All sums share one buffer: launch what uses them before the next iteration.
    """
    features, queries = fields.features, len(fields.row_splits) - 1
    channels, at_once = features.shape[1], _queries_at_once(fields)
    buffer = cupy.empty((min(at_once, queries), _num_cells(fields) * channels), features.dtype)
    # Binding all arguments takes the host as long as the sums take the GPU, so only those that change are bound again.
    kernel = _kernels(features, fields.points)["aggregate_cells"]
    arguments = kernel.bind(fields, {"first": 0, "rows": 0, "sums": buffer, **_parameters(fields)})
    for first in range(0, queries, at_once):
        rows = min(at_once, queries - first)
        sums = buffer[:rows]
        kernel.start(rows * -(-channels // WARP) * WARP, kernel.rebind(arguments, first=first, rows=rows, sums=sums))
        yield first, first + rows, sums


def _matrices(fields):
    """The filters as (cells, Cin, Cout)."""
    return fields.filters.reshape(_num_cells(fields), -1, fields.filters.shape[-1])


@launcher
def cell_conv(fields):
    matrices = _matrices(fields)
    if fields.transposed_filters:
        matrices = cupy.ascontiguousarray(matrices.transpose(0, 2, 1))
    matrix, totals = matrices.reshape(-1, matrices.shape[-1]), None
    if fields.grad_filters is not None:
        totals = cupy.zeros(matrix.shape, computed(fields.features.dtype))
        has_pairs = fields.row_splits[1:, None] > fields.row_splits[:-1, None]
    for first, end, sums in _aggregated(fields):
        if fields.out is not None:
            product(sums, matrix, fields.out[first:end])
        if totals is not None:
            # The other rows are multiplied by sums of zero, and 0 * NaN is NaN.
            totals += sums.T @ cupy.where(has_pairs[first:end], fields.grad_out[first:end], 0)
    if totals is not None:
        fields.grad_filters[...] = totals.reshape(fields.grad_filters.shape)


@launcher
def inverse_sums(fields):
    queries, importances = len(fields.scale), fields.neighbor_importances
    kernels = _kernels(fields.scale if importances is None else importances)
    launch(kernels["inverse_sums"], queries, fields, num_queries=queries)


@launcher
def cell_conv_grads(fields):
    """Gradients of positions, extents and neighbor importances."""
    features, points, queries = fields.features, fields.points, len(fields.row_splits) - 1
    channels, pairs, dtype = features.shape[1], len(fields.index), computed(features.dtype)
    geometry = dtype if points is None else points.dtype
    parameters = _parameters(fields)

    def requested_or_scratch(grads, shape, kind):
        """The requested gradient, or scratch that is discarded."""
        return cupy.empty(shape, kind) if grads is None or grads.dtype != kind else grads

    importances = requested_or_scratch(fields.grad_neighbor_importances, (pairs,), dtype)
    pair_grads = None if points is None else cupy.empty((pairs, 3), geometry)
    outputs = {"pair_grads": pair_grads, "grad_neighbor_importances": importances, "grad_queries": None,
               "grad_extents": None}  # fmt: skip
    if points is not None:
        outputs["grad_queries"] = requested_or_scratch(fields.grad_queries, (queries, 3), geometry)
        shape = (queries, parameters["extent_axes"])
        outputs["grad_extents"] = requested_or_scratch(fields.grad_extents, shape, geometry)
    matrix = cupy.ascontiguousarray(_matrices(fields).transpose(2, 0, 1)).reshape(fields.filters.shape[-1], -1)
    at_once = _queries_at_once(fields)
    buffer = cupy.empty((min(at_once, queries), _num_cells(fields) * channels), features.dtype)
    kernel = _kernels(features, points)["cell_grads"]
    arguments = kernel.bind(fields, {"first": 0, "rows": 0, "products": buffer, **parameters, **outputs})
    for first in range(0, queries, at_once):
        rows = min(at_once, queries - first)
        products = buffer[:rows]
        product(fields.grad_out[first : first + rows], matrix, products)
        kernel.start(rows * WARP, kernel.rebind(arguments, first=first, rows=rows, products=products))
    if fields.grad_neighbor_importances is not None and importances is not fields.grad_neighbor_importances:
        fields.grad_neighbor_importances[...] = importances
    if fields.grad_points is not None:
        sum_by_point(fields.index, fields.row_splits, pair_grads, fields.grad_points)

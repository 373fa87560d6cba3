"""Launchers of KPConv: a kernel sums features by kernel point, cuBLAS multiplies the sums by the weights."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import WARP, computed, ctype, kernels_of, launch, launcher, product
from kpcore.backends.gpu_layers import sum_columns
from kpcore.backends.gpu_lists import sum_by_point

_SUMS_BYTES = 32 << 20  # sums computed at a time: they fit the second-level cache of an H100 or H200
_POSITIVE = 2  # Normalization.positive
_NONE, _QUERY, _NEIGHBOR = range(3)  # ParameterOwner in kpconv.cu


def _kernels(fields):
    return kernels_of("kpconv.cu", KP_G=ctype(fields.points.dtype), KP_F=ctype(fields.features.dtype),
                      KP_DIM=fields.points.shape[1])  # fmt: skip


def _normalization_scale(fields):
    """(M,) the factor of each query's sums; None without a normalization."""
    if not fields.normalization:
        return None
    kernels, queries, positive = _kernels(fields), len(fields.queries), None
    if fields.normalization == _POSITIVE:
        points, channels = fields.features.shape
        positive = cupy.empty(points, np.int32)
        launch(kernels["find_positive"], points, fields, num_points=points, channels=channels, positive=positive)
    scale = cupy.empty(queries, computed(fields.features.dtype))
    launch(kernels["normalize"], queries, fields, num_queries=queries, positive=positive, scale=scale)
    return scale


def _owners(fields, owner, scale):
    """Parameters that say whether offsets, modulations and scale belong to queries or neighbors, or are missing."""
    return {
        "offsets_owner": _NONE if fields.offsets is None else owner,
        "modulations_owner": _NONE if fields.modulations is None else owner,
        "scale": scale,
        "scale_owner": _NONE if scale is None else owner,
    }


def _queries_at_once(fields, channels):
    """How many queries to process at a time, each with K * channels sums."""
    return max(1, _SUMS_BYTES // (len(fields.kernel_points) * channels * fields.features.dtype.itemsize))


def _mix(fields, sums, mixed, first, transposed=False):
    """Write the shares of `sums` (groups, rows, K * channels of a group) by which the weights are multiplied.

    `first` is their first query. With `transposed`, mix products with the weights instead.
    """
    groups, rows, columns = sums.shape
    num_kernels = len(fields.kernel_points)
    launch(_kernels(fields)["mix"], rows * num_kernels * WARP, fields, sums=sums, num_kernels=num_kernels,
           channels=groups * columns // num_kernels, transposed=transposed, first=first, rows=rows,
           mixed=mixed)  # fmt: skip


def _aggregated(fields, transposed=False, mixes=True):
    """Yield (first query, end, sums (groups, rows, K * channels of a group)) for some thousand queries at a time.

    All sums share one buffer: launch what uses them before the next iteration. With `transposed`, the gradient of the
    output is summed over the transposed list instead. With kernel offsets the sums are mixed, unless `mixes` is False.
    """
    queries, features, owner, lists = fields.queries, fields.features, _QUERY, {}
    if transposed:
        queries, features, owner = fields.points, fields.grad_out, _NEIGHBOR
        lists = {"points": fields.queries, "queries": queries, "index": fields.transposed_index,
                 "row_splits": fields.transposed_row_splits, "features": features}  # fmt: skip
    groups, channels, num_kernels = fields.groups, features.shape[1], len(fields.kernel_points)
    at_once, columns = _queries_at_once(fields, channels), num_kernels * channels
    buffer = cupy.empty((min(at_once, len(queries)), columns), features.dtype)
    mixes = mixes and fields.kernel_offsets is not None
    mixed_buffer = cupy.empty_like(buffer) if mixes and not transposed else None
    # Binding all arguments takes the host as long as the sums take the GPU, so only those that change are bound again.
    kernel = _kernels(fields)["aggregate_mixed" if mixes and transposed else "aggregate"]
    values = {"channels": channels, "num_kernels": num_kernels, "sign": -1 if transposed else 1,
              "first": 0, "rows": 0, "sums": buffer, **lists}  # fmt: skip
    arguments = kernel.bind(fields, values | _owners(fields, owner, _normalization_scale(fields)))
    for first in range(0, len(queries), at_once):
        rows = min(at_once, len(queries) - first)
        sums = buffer[:rows].reshape(groups, rows, columns // groups)
        kernel.start(rows * WARP, kernel.rebind(arguments, first=first, rows=rows, sums=sums))
        if mixed_buffer is not None:
            mixed = mixed_buffer[:rows].reshape(sums.shape)
            _mix(fields, sums, mixed, first)
            sums = mixed
        yield first, first + rows, sums


def _group(array, g, groups):
    """The columns of group g."""
    width = array.shape[-1] // groups
    return array[..., g * width : (g + 1) * width]


def _write_product(a, b, out, g, groups):
    """Write ``a @ b`` to the columns of group g."""
    if groups == 1:
        product(a, b, out)
    else:
        _group(out, g, groups)[...] = a @ b


def _matrices(fields, transposed):
    """The weights of each group as a matrix (K * Cin, Cout), transposed (K * Cout, Cin)."""
    matrices = []
    for g in range(fields.groups):
        weights = _group(fields.weights, g, fields.groups)
        weights = cupy.ascontiguousarray(weights.transpose(0, 2, 1) if transposed else weights)
        matrices.append(weights.reshape(-1, weights.shape[-1]))
    return matrices


def _launch_depthwise(name, fields, threads, **values):
    """Launch a depthwise kernel."""
    num_kernels, channels = fields.weights.shape
    launch(_kernels(fields)[name], threads, fields, num_kernels=num_kernels, channels=channels, **values)


def _convolve(fields, out, transposed=False):
    channels, groups = out.shape[1], fields.groups
    matrices = None if fields.depthwise else _matrices(fields, transposed)
    factors = 1 if transposed else fields.factors
    for first, end, sums in _aggregated(fields, transposed):
        if matrices is None:
            _launch_depthwise("scale_sums", fields, (end - first) * channels, sums=sums, first=first, rows=end - first,
                              factors=factors, out=out)  # fmt: skip
            continue
        for g, matrix in enumerate(matrices):
            _write_product(sums[g], matrix, out[first:end], g, groups)


@launcher
def kpconv(fields):
    _convolve(fields, fields.out)


@launcher
def kpconv_grad_features(fields):
    _convolve(fields, fields.grad_features, transposed=True)


@launcher
def kpconv_grads(fields):
    """Gradients of all arrays except the features."""
    several_factors = fields.factors > 1
    if fields.grad_weights is not None or (several_factors and fields.grad_modulations is not None):
        _weight_gradients(fields)
    positions = (fields.grad_points, fields.grad_queries, fields.grad_kernel_points, fields.grad_offsets,
                 fields.grad_kernel_offsets)  # fmt: skip
    if any(grads is not None for grads in positions) or (not several_factors and fields.grad_modulations is not None):
        _position_gradients(fields)


def _weight_gradients(fields):
    """Gradients of the weights, and of modulations with several factors, which scale the sums."""
    weights, groups, dtype = fields.weights, fields.groups, fields.features.dtype
    totals = None
    if fields.grad_weights is not None:
        totals = fields.grad_weights.reshape(-1, weights.shape[-1])
        if computed(dtype) != dtype:
            totals = cupy.empty(totals.shape, computed(dtype))
        totals.fill(0)
    for first, end, sums in _aggregated(fields):
        rows, grad_out = end - first, fields.grad_out[first:end]
        slice_of_sums = {"sums": sums, "first": first, "rows": rows}
        if fields.factors > 1 and fields.grad_modulations is not None:
            _launch_depthwise("factors_grad", fields, rows * len(weights) * fields.factors, **slice_of_sums)
        if totals is not None and fields.depthwise:
            products, summed = cupy.empty((rows, weights.size), dtype), cupy.empty(weights.size, dtype)
            _launch_depthwise("weights_products", fields, products.size, **slice_of_sums, products=products)
            sum_columns(products, summed)
            totals += summed.reshape(totals.shape)
        elif totals is not None:
            for g in range(groups):
                part = _group(totals, g, groups)
                part += sums[g].T @ _group(grad_out, g, groups)
    if totals is not None and computed(dtype) != dtype:
        fields.grad_weights[...] = totals.reshape(weights.shape)


def _position_gradients(fields):
    """Gradients of points, queries, kernel points, offsets, kernel offsets, and of modulations with one factor."""
    points, queries, grad_out, groups = fields.points, fields.queries, fields.grad_out, fields.groups
    dimension, num_kernels, dtype = points.shape[1], len(fields.kernel_points), fields.features.dtype
    channels, kernels = fields.features.shape[1], _kernels(fields)

    def requested_or_scratch(grads, shape, kind):
        """The requested gradient, or scratch that is discarded."""
        return cupy.empty(shape, kind) if grads is None or grads.dtype != kind else grads

    kernel_shape = len(queries), num_kernels, dimension
    pair_grads = cupy.empty((len(fields.index), dimension), points.dtype)
    modulations = None if fields.factors > 1 else fields.grad_modulations
    grads = {
        "pair_grads": pair_grads,
        "grad_queries": requested_or_scratch(fields.grad_queries, queries.shape, points.dtype),
        "grad_offsets": requested_or_scratch(fields.grad_offsets, kernel_shape, points.dtype),
        "grad_modulations": requested_or_scratch(modulations, (len(queries), num_kernels), computed(dtype)),
    }
    at_once, matrices = _queries_at_once(fields, channels), []
    if not fields.depthwise:
        matrices = [cupy.ascontiguousarray(_group(fields.weights, g, groups).transpose(2, 0, 1)) for g in range(groups)]
        matrices = [matrix.reshape(len(matrix), -1) for matrix in matrices]
    buffer = cupy.empty((min(at_once, len(queries)), num_kernels * channels), dtype)
    values = {"channels": channels, "num_kernels": num_kernels, "first": 0, "rows": 0, "products": buffer}
    values |= grads | _owners(fields, _QUERY, _normalization_scale(fields))
    arguments = kernels["position_grads"].bind(fields, values)
    resampled, of_shares = fields.kernel_offsets is not None, {}
    if resampled:
        mixed_buffer, aggregated = cupy.empty_like(buffer), _aggregated(fields, mixes=False)
        grad_kernel_offsets = requested_or_scratch(fields.grad_kernel_offsets, kernel_shape, points.dtype)
        of_shares = {"grad_kernel_offsets": grad_kernel_offsets, "place_grads": cupy.empty(kernel_shape, points.dtype)}
    for first in range(0, len(queries), at_once):
        rows = min(at_once, len(queries) - first)
        products = buffer[:rows].reshape(groups, rows, num_kernels * channels // groups)
        for g, matrix in enumerate(matrices):
            product(_group(grad_out[first : first + rows], g, groups), matrix, products[g])
        if fields.depthwise:
            _launch_depthwise("grad_products", fields, products.size, first=first, rows=rows, products=products)
        if resampled:
            _, _, sums = next(aggregated)
            launch(kernels["share_grads"], rows * WARP, fields, sums=sums, products=products, num_kernels=num_kernels,
                   channels=channels, first=first, rows=rows, **of_shares)  # fmt: skip
            mixed = mixed_buffer[:rows].reshape(products.shape)
            _mix(fields, products, mixed, first, transposed=True)
            products = mixed
        kernel = kernels["position_grads"]
        kernel.start(rows * WARP, kernel.rebind(arguments, first=first, rows=rows, products=products))
    if modulations is not None and grads["grad_modulations"] is not modulations:
        modulations[...] = grads["grad_modulations"]
    if fields.grad_kernel_points is not None:
        rows = grads["grad_offsets"].reshape(len(queries), num_kernels * dimension)
        if resampled:
            rows = rows + of_shares["place_grads"].reshape(rows.shape)
        sum_columns(rows, fields.grad_kernel_points.reshape(-1))
    if fields.grad_points is not None:
        sum_by_point(fields.index, fields.row_splits, pair_grads, fields.grad_points)

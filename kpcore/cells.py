"""What the convolutions with a filter of cells share: ContinuousConv, SparseConv, and their transposes.

All are one sum over pairs (point i, query q), in which `filter(i, q)` is a matrix (Cin, Cout)::

    out[q] = s_q Σ_i a_qi t_i f_i filter(i, q)

The a are `neighbor_importances`. In a convolution t are the importances of the points, and with `normalize` s_q is the
inverse of the sum of the a of query q. In a transposed convolution s are the importances of the queries, and with
`normalize` t_i is the inverse of the sum of the a of point i.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kpcore.backends import checks, devices
from kpcore.neighbors import transposed
from kpcore.ops import empty_like

MAX_CELLS = 2**24  # numbers of cells are computed in float32
_BY_PAIR = ("neighbor_importances", "points", "queries", "extents")


class _Exchanged(NamedTuple):
    """The pairs of a call with points and queries exchanged: a list of the queries of each point."""

    index: np.ndarray
    row_splits: np.ndarray
    neighbor_importances: np.ndarray | None = None
    kernel_index: np.ndarray | None = None
    order: np.ndarray | None = None  # the place of each pair in the list of the call; None unless it was needed


def with_factors(call, importances, neighbor_importances, is_transpose, sizes):
    """The call with its factors of points, queries and pairs, checked."""
    owner, like = "M" if is_transpose else "N", ("features", call.features)
    if importances is not None:
        importances = checks.array("importances", importances, owner, checks.FEATURES, sizes, like=like)
    if neighbor_importances is not None:
        pairs = {"device": sizes["device"], "E": (len(call.index), "neighbors")}
        neighbor_importances = checks.array(
            "neighbor_importances", neighbor_importances, "E", checks.FEATURES, pairs, like=like
        )
    call.importances, call.neighbor_importances = importances, neighbor_importances
    call.is_transpose = call.reversed = is_transpose
    return call


def result(call):
    return [((call.neighbors.num_queries, call.filters.shape[-1]), call.features.dtype)]


def forward(call):
    ((shape, dtype),) = result(call)
    out = devices.namespace(call.features).empty(shape, dtype)
    _run("cell_conv", call, out=out, **_scales(call))
    return out, ()


def _run(kernel, call, **fields):
    backend = devices.backend(call.features)
    try:
        backend.run(kernel, call, **fields)
    except backend.OutOfRange:
        raise _cell_error(call) from None


def _cell_error(call):
    index, cells = call.kernel_index[: int(call.row_splits[-1])], call.depth * call.height * call.width
    low, high = int(index.min()), int(index.max())
    if low >= 0 and high < cells:
        return checks.changed("kernel_index")
    bad = low if low < 0 else high
    return ValueError(f"kernel_index: expected values from 0 to {cells - 1} to match filters, got {bad}")


def _scales(call, exchanged=None):
    """{"point_scale", "query_scale"}: the factors t and s of the formula above, or None.

    `exchanged`: the pairs of `_exchanged_pairs`, if they are known.
    """
    importances, sums = call.importances, None
    if importances is not None and importances.dtype.itemsize == 2:
        importances = importances.astype(np.float32)
    if call.is_normalized:
        row_splits, factors, owners = call.row_splits, call.neighbor_importances, call.neighbors.num_queries
        if call.is_transpose:
            exchanged = exchanged or _exchanged_pairs(call)
            row_splits, factors = exchanged.row_splits, exchanged.neighbor_importances
            owners = call.neighbors.num_points
        dtype = np.dtype(np.float32) if call.features.dtype.itemsize == 2 else call.features.dtype
        sums = devices.namespace(call.features).empty(owners, dtype)
        devices.backend(sums).run("inverse_sums", row_splits=row_splits, neighbor_importances=factors, scale=sums)
    points, queries = (sums, importances) if call.is_transpose else (importances, sums)
    return {"point_scale": points, "query_scale": queries}


def _exchanged_pairs(call, with_order=False):
    index, splits, neighbors = call.index, call.row_splits, call.neighbors
    factors, cells = call.neighbor_importances, call.kernel_index
    if factors is None and cells is None and not with_order:
        stored = neighbors.transpose()
        return _Exchanged(stored.stored_index, stored.stored_row_splits)
    if cells is None and not with_order:
        return _Exchanged(*transposed(index, splits, factors, neighbors.num_points))
    if factors is None and not with_order:
        index, splits, cells = transposed(index, splits, cells, neighbors.num_points)
        return _Exchanged(index, splits, kernel_index=cells)
    xp, pairs = devices.namespace(index), len(index)
    places = xp.arange(pairs, dtype=np.int32 if pairs <= checks.MAX_POINTS else np.int64)
    index, splits, order = transposed(index, splits, places, neighbors.num_points)
    factors, cells = (None if values is None else values[order] for values in (factors, cells))
    return _Exchanged(index, splits, factors, cells, order)


def gradients(call, saved, grad, needs):
    """Gradients of the arguments in `needs`; with queries=None that of the points includes that of the queries.

    Each is computed in the same way whatever else is needed, so that it has the same bits.
    """
    adds_queries = "points" in needs and call.queries_are_points
    computed = needs | {"queries"} if adds_queries else needs
    by_pair = [name for name in _BY_PAIR if name in computed]
    with_importances = "importances" in needs and not call.is_transpose
    by_points = needs & {"features", "filters"} or with_importances
    exchanged = None
    if by_points or (call.is_transpose and (by_pair or call.is_normalized)):
        exchanged = _exchanged_pairs(call, with_order=call.is_transpose and "neighbor_importances" in needs)
    scales, grads = _scales(call, exchanged), {}
    if by_points:
        grads |= _gradients_by_points(call, grad, exchanged, scales, needs)
    if "importances" in needs and call.is_transpose:
        out = devices.namespace(grad).empty(grad.shape, grad.dtype)
        _run("cell_conv", call, out=out, **scales | {"query_scale": None})
        grads["importances"] = _row_products(out, grad, call.row_splits)
    if by_pair:
        compute = _gradients_by_pair_of_transpose if call.is_transpose else _gradients_by_pair
        grads |= compute(call, grad, by_pair, exchanged, scales)
    if adds_queries:
        grads["points"] += grads["queries"]
    return {name: grads[name] for name in needs}


def _row_products(a, b, row_splits):
    """(N,) the dot products of the rows of two arrays (N, C); 0 for rows without pairs, in which b may be NaN."""
    real = np.float32 if a.dtype.itemsize == 2 else a.dtype
    products = (a.astype(real, copy=False) * b.astype(real, copy=False)).sum(1)
    return np.where(row_splits[1:] > row_splits[:-1], products, 0).astype(a.dtype, copy=False)


def _scaled(rows, factors, row_splits):
    """The rows (N, C) times factors (N,); rows without pairs as they are, since their factor may be infinite."""
    factors = np.where(row_splits[1:] > row_splits[:-1], factors, 1)
    return (rows * factors[:, None]).astype(rows.dtype, copy=False)


def _exchanged_fields(call, exchanged):
    """Fields of a kernel that gathers from the queries to the points."""
    fields = exchanged._asdict() | {"points": call.queries, "queries": call.points}
    del fields["order"]
    return fields


def _gradients_by_points(call, grad, exchanged, scales, needs):
    """Gradients of the features, of importances if they are those of the points, and of the filters.

    All use the gradient of the output summed by point and cell, so the filters' cost one product here, not a pass. The
    features are multiplied by the importances, so both follow from the gradient of that product.
    """
    features, xp, importances = call.features, devices.namespace(grad), None
    if not call.is_transpose and call.importances is not None:
        importances = scales["point_scale"]
    outputs = {}
    if needs & {"features", "importances"}:
        outputs["out"] = xp.empty(features.shape, grad.dtype)
    if "filters" in needs:
        outputs["grad_filters"] = xp.empty(call.filters.swapaxes(-1, -2).shape, grad.dtype)
        # The rows of this pass are the points: in the place of the gradient of its result stand the features.
        outputs["grad_out"] = features if importances is None else _scaled(features, importances, exchanged.row_splits)
    _run("cell_conv", call, **_exchanged_fields(call, exchanged), features=grad, reversed=not call.reversed,
         transposed_filters=True, point_scale=scales["query_scale"],
         query_scale=scales["point_scale"] if importances is None else None, **outputs)  # fmt: skip
    grads = {}
    if "filters" in needs:
        grads["filters"] = devices.contiguous(outputs["grad_filters"].swapaxes(-1, -2))
    if "importances" in needs and importances is not None:
        grads["importances"] = _row_products(outputs["out"], features, exchanged.row_splits)
    if "features" in needs:
        out = outputs["out"]
        grads["features"] = out if importances is None else _scaled(out, importances, exchanged.row_splits)
    return grads


def _gradients_by_pair(call, grad, names, exchanged, scales):
    arrays = _outputs(call, names)
    _run("cell_conv_grads", call, grad_out=grad, **arrays, **scales)
    return _gradients_of_outputs(call, arrays)


def _gradients_by_pair_of_transpose(call, grad, names, exchanged, scales):
    """As `_gradients_by_pair`.

    The product of a gradient g with the transposed convolution of f is, pair by pair, that of f with the convolution of
    g with transposed filters. So its gradients by pair are those of that convolution.
    """
    exchange = {"grad_points": "grad_queries", "grad_queries": "grad_points"}
    arrays = _outputs(call, names)
    _run("cell_conv_grads", call, **_exchanged_fields(call, exchanged), features=grad, grad_out=call.features,
         filters=devices.contiguous(call.filters.swapaxes(-1, -2)), reversed=False,
         point_scale=scales["query_scale"], query_scale=scales["point_scale"],
         **{exchange.get(name, name): array for name, array in arrays.items()})  # fmt: skip
    if "neighbor_importances" in names:
        by_place, order = arrays["grad_neighbor_importances"], exchanged.order
        arrays["grad_neighbor_importances"] = devices.namespace(grad).zeros(by_place.shape, by_place.dtype)
        arrays["grad_neighbor_importances"][order] = by_place[: len(order)]
    return _gradients_of_outputs(call, arrays)


def _outputs(call, names):
    """{"grad_<name>": array} that cell_conv_grads writes to."""
    arrays, xp = empty_like(call, names, set(names)), devices.namespace(call.features)
    if "neighbor_importances" in names:  # zeros: entries past the last pair belong to no pair and are not written
        arrays["grad_neighbor_importances"] = xp.zeros(len(call.index), call.features.dtype)
    if "extents" in names:  # the kernel writes a gradient for each point or query that has an extent
        owners = call.neighbors.num_points if call.is_transpose else call.neighbors.num_queries
        axes = call.extents.shape[1] if call.extents.ndim == 2 else 1
        arrays["grad_extents"] = xp.empty((owners, axes), call.extents.dtype)
    return arrays


def _gradients_of_outputs(call, arrays):
    grads = {name.removeprefix("grad_"): array for name, array in arrays.items()}
    if "extents" in grads:
        rows = grads["extents"]
        if call.extents.ndim == 0 or (len(call.extents) == 1 and len(rows) != 1):
            sums = devices.namespace(rows).empty(rows.shape[1], rows.dtype)
            devices.backend(rows).run("sum_rows", rows=rows, sums=sums)
            rows = sums
        grads["extents"] = rows.reshape(call.extents.shape)
    return grads

"""Launchers of the layers on rows of features, and of the optimizers' steps."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import (
    BLOCK_OF_ROWS,
    WARP,
    OutOfRange,
    computed,
    ctype,
    kernels_of,
    launch,
    launcher,
    product,
    wait,
)
from kpcore.backends.gpu_lists import blocks_of_items

_MEAN, _SUM, _NONE = range(3)  # CrossEntropyReduction


def _kernels(array):
    return kernels_of("layers.cu", KP_F=ctype(array.dtype))


# ---- linear


@launcher
def linear(fields):
    product(fields.features, fields.weights, fields.out)
    if fields.bias is not None:
        np.add(fields.out, fields.bias, out=fields.out)


@launcher
def linear_grad_features(fields):
    product(fields.grad_out, fields.weights.T, fields.grad_features)


@launcher
def linear_grad_weights(fields):
    product(fields.features.T, fields.grad_out, fields.grad_weights)


@launcher
def add(fields):
    np.add(fields.first, fields.second, out=fields.out)


def _parts(fields):
    parts = fields.first, fields.second, fields.third, fields.fourth
    return [part for part in parts if part is not None]


@launcher
def concatenate(fields):
    cupy.concatenate(_parts(fields), axis=1, out=fields.out)


@launcher
def split(fields):
    begin = 0
    for part in _parts(fields):
        end = begin + part.shape[1]
        if isinstance(part, cupy.ndarray):
            part[...] = fields.out[:, begin:end]
        begin = end


# ---- sums


def _sums_of_blocks(rows):
    blocks = -(-len(rows) // BLOCK_OF_ROWS)
    partial = cupy.empty((blocks, rows.shape[1]), np.float64)
    launch(_kernels(rows)["sum_blocks"], partial.size, rows=rows, num_rows=len(rows), columns=rows.shape[1],
           partial=partial)  # fmt: skip
    return partial


def sum_columns(rows, sums):
    """Write the sum of the rows to `sums`; computed in float64."""
    partial, columns = _sums_of_blocks(rows), rows.shape[1]
    launch(_kernels(sums)["join_sums"], columns, partial=partial, blocks=len(partial), columns=columns, sums=sums)


def total(values):
    """(1,) float64, the sum of all values."""
    sums = cupy.empty(1, np.float64)
    sum_columns(values.reshape(-1, 1), sums)
    return sums


@launcher
def sum_rows(fields):
    sum_columns(fields.rows, fields.sums)


@launcher
def sum_squares(fields):
    wide = fields.values.reshape(-1, 1).astype(np.float64)
    sum_columns(wide * wide, fields.sum)


# ---- activations


def _launch_each(name, fields, **values):
    """Launch a kernel with a thread for each value of the features."""
    size = fields.features.size
    launch(_kernels(fields.features)[name], size, fields, size=size, **values)


@launcher
def activate(fields):
    _launch_each("activate", fields)


@launcher
def activate_grad(fields):
    _launch_each("activate_grad", fields)


@launcher
def dropout(fields):
    if fields.rate >= 1:
        fields.out.fill(0)
        return
    size = fields.out.size
    launch(_kernels(fields.out)["dropout"], -(-size // 64) * 16, fields, size=size, threshold=fields.rate * 2**32,
           scale=1 / (1 - fields.rate))  # fmt: skip


def _launch_rows(name, fields):
    """Launch a kernel with a warp for each row of the features."""
    rows, columns = fields.features.shape
    launch(_kernels(fields.features)[name], rows * WARP * (columns > 0), fields, rows=rows, columns=columns)


@launcher
def softmax(fields):
    _launch_rows("softmax", fields)


@launcher
def softmax_grad(fields):
    _launch_rows("softmax_grad", fields)


# ---- normalization


@launcher
def moments(fields):
    (rows, columns), (items, groups) = fields.features.shape, fields.mean.shape
    kernels, (first_blocks, max_blocks) = _kernels(fields.features), blocks_of_items(rows, fields.row_splits)
    sums, squares = cupy.empty((max_blocks, columns), np.float64), cupy.empty((max_blocks, columns), np.float64)
    blocks = {"first_blocks": first_blocks, "columns": columns, "num_items": items, "sums": sums, "squares": squares}
    launch(kernels["moment_blocks"], sums.size, fields, max_blocks=max_blocks, **blocks)
    launch(kernels["join_moments"], items * groups, fields, groups=groups, **blocks)


def _sizes(fields):
    (rows, columns), (items, groups) = fields.features.shape, fields.mean.shape
    return {"rows": rows, "columns": columns, "num_items": items, "groups": groups}


@launcher
def normalize(fields):
    launch(_kernels(fields.features)["normalize"], fields.features.size, fields, **_sizes(fields))


@launcher
def normalize_grad(fields):
    features, kernels, sizes = fields.features, _kernels(fields.features), _sizes(fields)
    columns, (items, groups) = features.shape[1], fields.mean.shape
    item_sizes = {"columns": columns, "num_items": items, "groups": groups}
    x_slope, constant = cupy.zeros((2, items, groups), computed(features.dtype))
    if not (fields.statistics_fixed and fields.grad_scale is None and fields.grad_shift is None):
        first_blocks, max_blocks = blocks_of_items(len(features), fields.row_splits)
        shifts, scales = cupy.empty((max_blocks, columns), np.float64), cupy.empty((max_blocks, columns), np.float64)
        blocks = {"first_blocks": first_blocks, "shifts": shifts, "scales": scales, **item_sizes}
        launch(kernels["grad_blocks"], shifts.size, fields, max_blocks=max_blocks, **blocks)
        shift_grads, scale_grads = cupy.empty((items, columns), np.float64), cupy.empty((items, columns), np.float64)
        launch(kernels["join_grads"], items * columns, fields, shift_grads=shift_grads, scale_grads=scale_grads,
               **blocks)  # fmt: skip
        if not fields.statistics_fixed:
            launch(kernels["statistics_grads"], x_slope.size, fields, shift_grads=shift_grads, scale_grads=scale_grads,
                   x_slope=x_slope, constant=constant, **item_sizes)  # fmt: skip
        for item_grads, sums in ((scale_grads, fields.grad_scale), (shift_grads, fields.grad_shift)):
            if sums is not None:
                launch(kernels["sum_items"], columns, item_grads=item_grads, num_items=items, columns=columns,
                       sums=sums)  # fmt: skip
    if fields.grad_features is not None:
        launch(kernels["normalize_grad"], features.size, fields, x_slope=x_slope, constant=constant, **sizes)


# ---- cross entropy


def _launch_cross_entropy(name, fields, labels, **values):
    """Launch a kernel with a warp for each row of the logits."""
    rows, classes = fields.logits.shape
    launch(_kernels(fields.logits)[name], rows * WARP, fields, rows=rows, classes=classes, labels=labels,
           has_ignore_index=fields.ignore_index is not None, ignore_index=fields.ignore_index or 0,
           **values)  # fmt: skip


def _losses(fields):
    """(labels as int64, loss of each row, weight of each row, array of one: whether a label is not a class)"""
    rows, labels = len(fields.logits), fields.labels.astype(np.int64)
    losses, weights = cupy.empty(rows, np.float64), cupy.empty(rows, np.float64)
    invalid_label = cupy.zeros(1, np.uint32)
    _launch_cross_entropy(
        "cross_entropies", fields, labels, losses=losses, weights=weights, invalid_label=invalid_label
    )
    return labels, losses, weights, invalid_label


@launcher
def cross_entropy(fields):
    """Waits, to check that all labels are classes."""
    _, losses, weights, invalid_label = _losses(fields)
    if any(wait(invalid_label)):
        raise OutOfRange
    if fields.reduction == _NONE:
        fields.out[...] = losses
        return
    loss, weight = total(losses), total(weights)
    if fields.reduction == _MEAN:
        loss = cupy.where(weight != 0, loss / cupy.where(weight != 0, weight, 1.0), 0.0)
    fields.out[...] = loss.reshape(())


@launcher
def cross_entropy_grad(fields):
    """Does not wait: `cross_entropy` has checked the labels. A row whose label is not a class would get zeros."""
    labels, _, weights, _ = _losses(fields)
    _launch_cross_entropy("cross_entropies_grad", fields, labels, weights=weights, total=total(weights),
                      is_mean=fields.reduction == _MEAN, each=fields.reduction == _NONE)  # fmt: skip


# ---- optimizers


@launcher
def sgd(fields):
    launch(_kernels(fields.value)["sgd"], fields.value.size, fields, size=fields.value.size)


@launcher
def adamw(fields):
    launch(_kernels(fields.value)["adamw"], fields.value.size, fields, size=fields.value.size)

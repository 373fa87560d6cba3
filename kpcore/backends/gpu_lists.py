"""Launchers of neighbor lists (check, pad, transpose), and the division of batch items into blocks of rows."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import BLOCK_OF_ROWS, OutOfRange, ctype, kernels_of, launch, launcher


@launcher
def check_list(fields):
    """Waits, to check the values."""
    index, bounds = fields.index, fields.row_splits.get()
    if not len(bounds) or bounds[0] != 0 or bounds[-1] > len(index) or np.any(bounds[1:] < bounds[:-1]):
        raise OutOfRange
    used = index[: int(bounds[-1])]
    if len(used):
        low, high = cupy.stack([used.min(), used.max()]).get()
        if low < 0 or high >= fields.num_points:
            raise OutOfRange
    fields.checked_row_splits[...] = fields.row_splits
    if fields.checked_index is not None:
        fields.checked_index[...] = index


@launcher
def longest_row(fields):
    if len(fields.row_splits) > 1:
        fields.longest[...] = cupy.diff(fields.row_splits).max()
    else:
        fields.longest.fill(0)


@launcher
def pad_list(fields):
    """Waits, because indexing with a mask does."""
    padded, row_splits = fields.padded, fields.row_splits
    column = cupy.arange(padded.shape[1])
    is_pair = column < cupy.diff(row_splits)[:, None]
    padded.fill(fields.fill)
    padded[is_pair] = fields.index[(row_splits[:-1, None] + column)[is_pair]]


def _pairs_of_padded(fields):
    return (fields.padded >= 0) & (fields.padded < fields.num_points)


@launcher
def count_padded(fields):
    """Waits, to check that all entries are points or padding."""
    padded, is_pair = fields.padded, _pairs_of_padded(fields)
    if not (is_pair | (padded == -1) | (padded == fields.num_points)).all():
        raise OutOfRange
    fields.row_splits[:1] = 0
    fields.row_splits[1:] = cupy.cumsum(is_pair.sum(1))


@launcher
def unpad(fields):
    pairs = len(fields.index)
    order = cupy.argsort(_pairs_of_padded(fields).reshape(-1))  # stable: padding first, then the pairs in their order
    fields.index[...] = fields.padded.reshape(-1)[order[len(order) - pairs :]]


@launcher
def transpose(fields):
    order, queries = pairs_by_point(fields.index, fields.row_splits, fields.transposed_row_splits)
    cupy.take(queries, order, out=fields.transposed_index)
    if fields.values is not None:
        cupy.take(fields.values, order, out=fields.transposed_values)


def pairs_by_point(index, row_splits, begins):
    """(pairs sorted by point, query of each pair). Writes where each point's pairs begin to `begins`."""
    pairs, num_points, kernels = len(index), len(begins) - 1, kernels_of("lists.cu")
    points, queries = cupy.empty(pairs, np.int32), cupy.empty(pairs, np.int32)
    launch(kernels["rows_of_pairs"], pairs, index=index, num_pairs=pairs, row_splits=row_splits,
           num_queries=len(row_splits) - 1, num_points=num_points, points=points, queries=queries)  # fmt: skip
    return sort_by_key(points, begins), queries


def sort_by_key(keys, begins):
    """The order that sorts int32 keys. Writes where the entries of each key begin to `begins`."""
    order = cupy.argsort(keys)
    launch(kernels_of("lists.cu")["begins_of_keys"], len(begins), keys=keys[order], num_keys=len(keys),
           num_begins=len(begins), begins=begins)  # fmt: skip
    return order


def sum_by_point(index, row_splits, values, sums):
    """Write to `sums` (N, C) the sums of values (E, C) over the pairs of each point, in their order."""
    points, columns = sums.shape
    begins = cupy.empty(points + 1, np.int64)
    order, _ = pairs_by_point(index, row_splits, begins)
    launch(kernels_of("lists.cu", KP_T=ctype(values.dtype))["sum_pairs"], points * columns, values=values, order=order,
           begins=begins, num_points=points, columns=columns, sums=sums)  # fmt: skip


def blocks_of_items(rows, row_splits):
    """(number of each batch item's first block of rows, upper bound of the number of blocks)"""
    items = len(row_splits) - 1
    counts = cupy.zeros(items + 1, np.int64)
    launch(kernels_of("lists.cu")["count_blocks"], items, row_splits=row_splits, num_items=items, counts=counts[1:])
    return cupy.cumsum(counts), rows // BLOCK_OF_ROWS + items

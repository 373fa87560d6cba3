"""Launchers of kernel maps: numbers of cells, sorted and unique; the pairs of a map; and dense grids."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import ctype, kernels_of, launch, launcher

_FILE = "kernel_map.cu"


def _axes(fields, *names):
    """Arrays with a number for each axis, which are on the host, as parameters: low0, low1, low2, low3 and so on."""
    parameters = {}
    for name in names:
        values = getattr(fields, name).tolist()
        parameters |= {f"{name}{axis}": value for axis, value in enumerate([*values, *[1] * (4 - len(values))])}
    return parameters


@launcher
def cell_bounds(fields):
    fields.bounds[0] = fields.coords.min(0)
    fields.bounds[1] = fields.coords.max(0)


@launcher
def sort_cells(fields):
    rows, axes = fields.coords.shape
    cells = cupy.empty(rows, np.int64)
    launch(kernels_of(_FILE, KP_DIM=axes)["number_cells"], rows, coords=fields.coords, num_rows=rows,
           row_splits=fields.row_splits, num_items=len(fields.row_splits) - 1, cells=cells,
           **_axes(fields, "low", "sizes", "stride"))  # fmt: skip
    order = cupy.argsort(cells)
    cupy.take(cells, order, out=fields.cells)
    fields.order[...] = order.astype(np.int32)


@launcher
def spread_cells(fields):
    cells = len(fields.cells)
    launch(kernels_of(_FILE)["spread"], cells, fields, num_cells=cells, places=len(fields.spread) // max(cells, 1))


@launcher
def unique_cells(fields):
    num, kernels = len(fields.cells), kernels_of(_FILE)
    if not num:
        return  # num_unique is 0 already
    cells, heads = fields.cells[cupy.argsort(fields.cells)], cupy.empty(num, np.int32)
    launch(kernels["mark_heads"], num, fields, cells=cells, num_cells=num, heads=heads)
    numbers = cupy.cumsum(heads, dtype=np.int64)
    launch(kernels["keep_heads"], num, fields, cells=cells, num_cells=num, heads=heads, numbers=numbers)
    fields.num_unique[...] = numbers[-1:]


@launcher
def cell_coords(fields):
    (rows, axes), items = fields.coords.shape, len(fields.row_splits) - 1
    launch(kernels_of(_FILE, KP_DIM=axes)["coords_of_cells"], max(rows, items + 1), cells=fields.cells, num_cells=rows,
           num_items=items, coords=fields.coords, row_splits=fields.row_splits,
           **_axes(fields, "low", "sizes", "stride"))  # fmt: skip


def _pairs(kernel, fields, **more):
    outputs, axes = fields.out_coords.shape
    launch(kernels_of(_FILE, KP_DIM=axes)[kernel], outputs, cells=fields.cells, num_cells=len(fields.cells),
           out_coords=fields.out_coords, num_outputs=outputs, out_row_splits=fields.out_row_splits,
           num_items=len(fields.out_row_splits) - 1, **more,
           **_axes(fields, "low", "sizes", "kernel_size", "scale", "first", "dilation"))  # fmt: skip


@launcher
def count_pairs(fields):
    counts = cupy.empty(len(fields.out_coords), np.int64)
    _pairs("count_inputs", fields, counts=counts)
    fields.row_splits[:1] = 0
    fields.row_splits[1:] = cupy.cumsum(counts)


@launcher
def fill_pairs(fields):
    _pairs("write_inputs", fields, order=fields.order, row_splits=fields.row_splits, index=fields.index,
           kernel_index=fields.kernel_index)  # fmt: skip


@launcher
def sort_pairs(fields):
    pairs = len(fields.index)
    keys = cupy.empty(pairs, np.int64)
    launch(kernels_of(_FILE)["keys_of_pairs"], pairs, num_rows=len(fields.row_splits) - 1, num_pairs=pairs, keys=keys,
           row_splits=fields.row_splits, kernel_index=fields.kernel_index, num_kernels=fields.num_kernels)  # fmt: skip
    order = cupy.argsort(keys)
    fields.index[...] = fields.index[order]
    fields.kernel_index[...] = fields.kernel_index[order]


@launcher
def to_dense(fields):
    rows, channels = fields.features.shape
    fields.out.fill(0)
    launch(kernels_of(_FILE, KP_S=ctype(fields.out.dtype))["sum_cells"], rows * channels, cells=fields.cells,
           order=fields.order, num_rows=rows, features=fields.features, channels=channels, volume=fields.volume,
           out=fields.out)  # fmt: skip


@launcher
def to_dense_grad(fields):
    rows, channels = fields.grad_features.shape
    launch(kernels_of(_FILE, KP_S=ctype(fields.grad_out.dtype))["read_cells"], rows * channels, cells=fields.cells,
           order=fields.order, num_rows=rows, grad_out=fields.grad_out, channels=channels, volume=fields.volume,
           grad_features=fields.grad_features)  # fmt: skip

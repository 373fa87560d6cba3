"""Launchers of grid subsampling."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import NotFinite, OutOfRange, ctype, kernels_of, launch, launcher, wait

_CENTER = 1  # VoxelPoint.center
_MAX, _NEAREST = 1, 2  # VoxelFeature.max, VoxelFeature.nearest
_NOT_FINITE, _OUT_OF_RANGE = 1, 2  # InputError in subsampling.cu


def _voxel_kernels(points):
    return kernels_of("subsampling.cu", KP_T=ctype(points.dtype), KP_DIM=points.shape[1], KP_S="KP_T")


def _feature_kernels(features):
    return kernels_of("subsampling.cu", KP_T="float", KP_DIM=3, KP_S=ctype(features.dtype))


def grid_subsample(points, features, labels, row_splits, voxel_size, origin, position, feature, return_nearest,
                   ignore_label, threads):  # fmt: skip
    """(points, features, labels, row_splits, inverse, counts, nearest). Waits once, for the number of voxels."""
    n, dimension = points.shape
    items = len(row_splits) - 1
    kernels = _voxel_kernels(points)
    # The voxel size and a common origin, (D,) each, are on the host: one copy. Origins (B, D) are on the device.
    on_host = [voxel_size] if origin is None or origin.ndim == 2 else [voxel_size, origin]
    on_device = cupy.asarray(np.stack(on_host))
    origins = on_device[1:] if origin is None or origin.ndim == 1 else origin
    bounds = {"row_splits": row_splits, "num_items": items}
    cloud = {"points": points, "num_points": n, **bounds}
    grid = {"origins": origins, "num_origins": len(origins), "voxel_size": on_device,
            "lowest": cupy.full((items, dimension), 2**64 - 1, np.uint64)}  # fmt: skip
    keys, input_errors = cupy.empty(n, np.int64), cupy.zeros(1, np.uint32)
    launch(kernels["lowest_coordinates"], n, **cloud, lowest=grid["lowest"], input_errors=input_errors)
    launch(kernels["voxel_keys"], n, **cloud, **grid, keys=keys, input_errors=input_errors)
    order = cupy.argsort(keys)
    if items > 1:
        item_of_each = cupy.empty(n, np.int32)
        launch(kernels["items_of"], n, order=order, num_points=n, **bounds, items=item_of_each)
        order = order[cupy.argsort(item_of_each)]
    heads = cupy.empty(n, np.int32)
    launch(kernels["voxel_heads"], n, keys=keys, order=order, num_points=n, **bounds, heads=heads)
    numbers = cupy.cumsum(heads, dtype=np.int64)
    voxels, errors = wait(numbers[-1:], input_errors) if n else (0, 0)
    if errors & _NOT_FINITE:
        raise NotFinite
    if errors & _OUT_OF_RANGE:
        raise OutOfRange
    inverse, begins = cupy.empty(n, np.int32), cupy.empty(voxels + 1, np.int64)
    out_row_splits = cupy.empty(items + 1, np.int64) if n else cupy.zeros(items + 1, np.int64)
    launch(kernels["number_voxels"], max(n, items + 1) if n else 0, order=order, numbers=numbers, num_points=n,
           **bounds, inverse=inverse, begins=begins, out_row_splits=out_row_splits)  # fmt: skip
    in_voxels = {"begins": begins, "num_voxels": voxels}
    counts = cupy.empty(voxels, np.int32)
    launch(kernels["count_points"], voxels, **in_voxels, counts=counts)

    def reduced(kernel, rows):
        out = cupy.empty((voxels, rows.shape[1]), rows.dtype)
        launch(_feature_kernels(rows)[kernel], out.size, rows=rows, columns=rows.shape[1], order=order, **in_voxels,
               out=out)  # fmt: skip
        return out

    centers = cupy.empty((voxels, dimension), points.dtype) if position == _CENTER else None
    nearest = cupy.empty(voxels, np.int32) if return_nearest else None
    if centers is not None or nearest is not None:
        launch(kernels["use_centers"], voxels, points=points, **bounds, order=order, **in_voxels, **grid,
               centers=centers, nearest=nearest)  # fmt: skip
    out_points = (lambda: reduced("average", points), lambda: centers, lambda: points[nearest])[position]()
    out_features = out_labels = None
    if features is not None:
        out_features = features[nearest] if feature == _NEAREST else reduced(("average", "maximize")[feature], features)
    if labels is not None:
        out_labels = cupy.empty((voxels, *labels.shape[1:]), labels.dtype)
        columns, unsigned = labels.shape[1] if labels.ndim > 1 else 1, f"uint{8 * labels.dtype.itemsize}"
        for column in range(columns):
            of_points = labels if labels.ndim == 1 else labels[:, column]
            by_label = cupy.argsort(of_points)
            by_voxel = by_label[cupy.argsort(inverse[by_label])]
            launch(kernels[f"elect_{unsigned}"], voxels, labels=of_points[by_voxel].view(unsigned), **in_voxels,
                   has_ignore_label=ignore_label is not None, ignore_label=ignore_label or 0, column=column,
                   columns=columns, winners=out_labels.view(unsigned))  # fmt: skip
    return out_points, out_features, out_labels, out_row_splits, inverse, counts, nearest


@launcher
def grid_subsample_grad(fields):
    (n, columns), kernels, voxels = fields.features.shape, _feature_kernels(fields.features), len(fields.counts)
    if fields.feature == _MAX:
        begins = cupy.concatenate([cupy.zeros(1, np.int64), cupy.cumsum(fields.counts, dtype=np.int64)])
        launch(kernels["maximum_grad"], voxels * columns, fields, columns=columns, order=cupy.argsort(fields.inverse),
               begins=begins, num_voxels=voxels)  # fmt: skip
    else:
        nearest = fields.nearest if fields.feature == _NEAREST else None
        launch(kernels["mean_grad"], n * columns, fields, nearest=nearest, num_points=n, columns=columns)

"""Launchers of pooling: reductions over neighbors and batch items, gathering, and inverse-distance weights."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import WARP, OutOfRange, computed, ctype, kernels_of, launch, launcher, wait
from kpcore.backends.gpu_lists import blocks_of_items

_MAX = 2  # Reduction.max; it and Reduction.min (3) choose a row, mean and sum do not


def _kernels(features, distances="float"):
    return kernels_of("pooling.cu", KP_F=ctype(features), KP_G=distances)


@launcher
def neighbor_reduce(fields):
    queries, channels = fields.out.shape
    kernel = "sum_neighbors" if fields.reduction < _MAX else "choose_neighbors"
    launch(_kernels(fields.out.dtype)[kernel], queries * WARP, fields, channels=channels, num_queries=queries)


@launcher
def neighbor_reduce_grad_weights(fields):
    queries, channels = fields.grad_out.shape
    launch(_kernels(fields.features.dtype)["neighbor_products"], queries * WARP, fields, channels=channels,
           num_queries=queries)  # fmt: skip


@launcher
def unpool(fields):
    choice, grads = fields.choice, fields.grad_features
    kernels, (num_rows, channels) = _kernels(grads.dtype), grads.shape
    keys = cupy.empty(choice.size, np.int64)
    launch(kernels["chosen_values"], choice.size, fields, num_values=choice.size, channels=channels, num_rows=num_rows,
           keys=keys)  # fmt: skip
    order = cupy.argsort(keys)
    launch(kernels["sum_chosen"], grads.size, fields, keys=keys[order], order=order, num_keys=choice.size,
           num_values=grads.size)  # fmt: skip


@launcher
def gather_rows(fields):
    """Waits, to check the index, unless there are row_splits: neighbor lists have been checked."""
    features, index, out = fields.features, fields.index, fields.out
    if fields.row_splits is not None:
        queries, channels = out.shape
        launch(_kernels(out.dtype)["gather_first"], out.size, fields, channels=channels, num_queries=queries)
    elif len(index):
        low, high = wait(index.min().reshape(1), index.max().reshape(1))
        if low < 0 or high >= len(features):
            raise OutOfRange
        cupy.take(features, index, axis=0, out=out)


@launcher
def inverse_distance_weights(fields):
    queries, kernels = len(fields.row_splits) - 1, _kernels(fields.weights.dtype, ctype(fields.distance.dtype))
    launch(kernels["weigh_distances"], queries, fields, num_queries=queries)


@launcher
def segment_reduce(fields):
    features, row_splits, chooses = fields.features, fields.row_splits, fields.reduction >= _MAX
    (rows, channels), items, kernels = features.shape, len(row_splits) - 1, _kernels(features.dtype)
    first_blocks, max_blocks = blocks_of_items(rows, row_splits)
    sums = None if chooses else cupy.empty((max_blocks, channels), np.float64)
    bests = cupy.empty((max_blocks, channels), computed(features.dtype)) if chooses else None
    choices = cupy.empty((max_blocks, channels), np.int32) if chooses else None
    blocks = {"first_blocks": first_blocks, "channels": channels, "num_items": items, "sums": sums, "bests": bests,
              "choices": choices}  # fmt: skip
    launch(kernels["reduce_blocks"], max_blocks * channels, fields, max_blocks=max_blocks, **blocks)
    launch(kernels["join_blocks"], items * channels, fields, **blocks)


@launcher
def segment_reduce_grad(fields):
    num_rows, channels = fields.grad_features.shape
    launch(_kernels(fields.grad_out.dtype)["spread_items"], num_rows * channels, fields, channels=channels,
           num_items=len(fields.row_splits) - 1, num_rows=num_rows)  # fmt: skip

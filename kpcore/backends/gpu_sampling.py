"""Launcher of farthest point sampling."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import NotFinite, ctype, kernels_of, launcher, wait
from kpcore.backends.gpu_search import check_boxes

_L2 = 0  # Metric.l2
_BLOCK = 512  # threads of the block for each batch item


@launcher
def farthest_points(fields):
    """Waits, to check that all coordinates and distances are finite."""
    points, row_splits, not_finite = fields.points, fields.row_splits, cupy.zeros(1, np.uint32)
    if len(points):
        check_boxes(points, row_splits, _L2, not_finite)
        items = len(row_splits) - 1
        kernel = kernels_of("sampling.cu", KP_T=ctype(points.dtype), KP_DIM=points.shape[1])["farthest"]
        distances = cupy.empty(len(points), points.dtype)
        arguments = kernel.bind(fields, {"num_items": items, "distances": distances, "not_finite": not_finite})
        kernel.start(items * _BLOCK, arguments, block=_BLOCK)
    if any(wait(not_finite)):
        raise NotFinite

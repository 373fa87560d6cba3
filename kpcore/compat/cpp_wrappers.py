"""The compiled wrappers of KPConv-PyTorch, OverlapPredator and ml-kpconvx: NumPy arrays out, whatever comes in.

The functions of `kpcore.compat` return tensors for tensors. The compiled ones return NumPy arrays for tensors on the
CPU too, and the loaders of OverlapPredator and ml-kpconvx rely on it: they pass tensors and give the result to
``torch.from_numpy``. For these, import this module::

    import kpcore.compat.cpp_wrappers as cpp_subsampling    # in place of cpp_wrappers.cpp_subsampling.grid_subsampling
    import kpcore.compat.cpp_wrappers as cpp_neighbors      # in place of cpp_wrappers.cpp_neighbors.radius_neighbors

Everything else is as in `kpcore.compat`. Tensors share their memory with the arrays; one on a GPU is an error.

>>> import torch
>>> import kpcore.compat.cpp_wrappers as cpp_subsampling
>>> points, lengths = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [1.5, 0, 0]]), torch.tensor([3]).int()
>>> pool_points, pool_lengths = cpp_subsampling.subsample_batch(points, lengths, sampleDl=1.0)
>>> torch.from_numpy(pool_points).shape, pool_lengths
(torch.Size([2, 3]), array([2], dtype=int32))
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from kpcore.compat import searches, subsampling

__all__ = ["batch_grid_partitionning", "batch_knn_neighbors", "batch_query", "batch_radius_neighbors",
           "furthest_point_sample", "grid_subsample", "grid_subsample_batch", "subsample",
           "subsample_batch"]  # fmt: skip


def _returning_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_arrays(*args, **kwargs):
        tensor = getattr(sys.modules.get("torch"), "Tensor", ())
        args = [value.numpy() if isinstance(value, tensor) else value for value in args]
        kwargs = {name: value.numpy() if isinstance(value, tensor) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return on_arrays


batch_grid_partitionning = _returning_arrays(subsampling.batch_grid_partitionning)
batch_knn_neighbors = _returning_arrays(searches.batch_knn_neighbors)
batch_query = batch_radius_neighbors = _returning_arrays(searches.batch_query)
furthest_point_sample = _returning_arrays(subsampling.furthest_point_sample)
grid_subsample = subsample = _returning_arrays(subsampling.subsample)
grid_subsample_batch = subsample_batch = _returning_arrays(subsampling.subsample_batch)

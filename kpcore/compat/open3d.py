"""``open3d.ml.torch.ops`` and its class RaggedTensor: the same names, arguments, defaults and fields, on torch tensors.

Code written for Open3D's operations runs with one import changed::

    from kpcore.compat import open3d as ops    # in place of: import open3d.ml.torch.ops as ops
    from kpcore.compat import open3d as ml3d   # in place of: import open3d.ml.torch as ml3d

The second is for code that says ``ml3d.ops``, ``ml3d.layers`` and ``ml3d.classes``; the layers are those of
`kpcore.torch`.

Nothing depends on the version of torch. Every function works on the CPU and, where CuPy is installed, on a GPU, also
those that Open3D has on one of them only; float64 works everywhere, and so does int64 for indices.

As in Open3D, and different from the functions of `kpcore`:

* distances of the metric "L2" are squared, and the names of metrics are "L1", "L2" and "Linf";
* `fixed_radius_search` includes points at exactly the radius, `radius_search` and `ball_query` do not;
* `knn_search` with ignore_query_point leaves points out after it has taken the k nearest;
* `reduce_subarrays_sum` of no values is empty, whatever row_splits say;
* `ball_query` and `three_nn` fill up with indices of 0, or repeat the first, where there are too few points;
* row_splits may be on the CPU while the other tensors are on a GPU.

Different from Open3D:

* `voxelize` keeps the voxel of a point at points_range_max apart; Open3D merges it with the next row's first voxel.
* `voxel_pooling` takes the maximum of negative features, where Open3D takes 0. Its gradient is that of the voxels of
  the forward pass; Open3D computes them again from the pooled positions, which rounding may put into another voxel.
* `sparse_conv` sums neighbours of one output that have the same cell in its gradient too, where Open3D keeps the last
  of them, and on a GPU in the result. Kernels may have more than 256 cells, with any dtype of integers as their index.
* The convolutions have gradients in importances, positions and extents too, not only in filters and features, and also
  through the sums by which `normalize` divides.
* The transposed convolutions multiply by neighbors_importance whenever it is passed, Open3D only together with
  inp_neighbors_importance_sum.
* Results are the same in every run, those of the convolutions and of their gradients to the bit. Neighbours are in the
  order of their indices (the k nearest in that of their distances), inverted lists and the cells of a hash table too,
  and voxels are sorted.
* `three_interpolate`, `trilinear_devoxelize_forward`, `reduce_subarrays_sum`, `ragged_to_dense` and
  `invert_neighbors_list` have gradients.
* `fixed_radius_search` checks the hash table and does not read it. For "L2" it sums (x² + y²) + z² and Open3D
  x² + (y² + z²), so that for points at the radius, as on a lattice, rounding may decide otherwise. `radius_search` and
  `ball_query` decide as Open3D to the bit.
* What reads memory out of bounds in Open3D (indices, row_splits or coordinates outside their range) is an error, and so
  are coordinates that are NaN or infinite and radii that are not above zero.
* In `knn_search`, `three_nn` and `furthest_point_sampling`, so are clouds so large or so small that squared distances
  overflow or vanish, in float32 above 1e19 and below 1e-19.
* `nms` and `roi_pool` raise NotImplementedError: object detection is not what kpcore is for.
"""

import sys
from types import SimpleNamespace

import kpcore.torch as _torch
from kpcore.compat.open3d_batches import *  # noqa: F403
from kpcore.compat.open3d_convolutions import *  # noqa: F403
from kpcore.compat.open3d_lists import *  # noqa: F403
from kpcore.compat.open3d_ragged import *  # noqa: F403
from kpcore.compat.open3d_search import *  # noqa: F403
from kpcore.compat.open3d_voxels import *  # noqa: F403

__all__ = []
for _module in ("batches", "convolutions", "lists", "ragged", "search", "voxels"):
    __all__ += sys.modules[f"kpcore.compat.open3d_{_module}"].__all__

ops = classes = sys.modules[__name__]
layers = SimpleNamespace(
    **{name: getattr(_torch, name)
       for name in ("ContinuousConv", "FixedRadiusSearch", "KNNSearch", "RadiusSearch", "SparseConv",
                    "SparseConvTranspose", "VoxelPooling")}
)  # fmt: skip

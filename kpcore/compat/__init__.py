"""Other code bases' functions under the names and argument orders that they have there, computed by kpcore.

The functions here are the compiled ones of the code bases around KPConv, so that one import switches::

    import kpcore.compat as cpp_subsampling    # KPConv-PyTorch: cpp_wrappers.cpp_subsampling.grid_subsampling
    import kpcore.compat as cpp_neighbors      # KPConv-PyTorch: cpp_wrappers.cpp_neighbors.radius_neighbors
    import kpcore.compat as ext_module         # GeoTransformer: importlib.import_module("geotransformer.ext")

The same of OverlapPredator and ml-kpconvx are in `kpcore.compat.cpp_wrappers`, which returns NumPy arrays for tensors.

All of them take NumPy arrays, CuPy arrays or torch tensors on any device and return the same kind on the same device.
Neither torch nor CuPy is imported before a tensor or a CuPy array is passed. Batches are stacked and bounded by
lengths: integers (B,) in an array, a tensor or a sequence, where items may be empty. Points are float32 as published;
for float64 points everything is computed and returned in float64. Padded indices have the dtype that each code base
has: int32 for the wrappers of KPConv-PyTorch, OverlapPredator and ml-kpconvx, int64 for GeoTransformer and Easy-KPConv.

Other modules have the names of what they stand for: layers are in `kpcore.compat.kpconv_pytorch`, `predator`,
`geotransformer`, `easy_kpconv`, `kpconvx` and `open3d_ml`, functions in `torch_cluster`, `pointops`, `frnn`, `open3d`.
"""

import sys

from kpcore.compat.kernels import *  # noqa: F403
from kpcore.compat.pools import *  # noqa: F403
from kpcore.compat.searches import *  # noqa: F403
from kpcore.compat.subsampling import *  # noqa: F403


def cache(enabled: bool) -> None:
    """Whether the list made from a padded matrix, a tensor, is kept as long as the tensor; by default it is.

    ``cache(False)`` also drops all lists that are kept. `kpcore.compat.padded` says when a list is used again.
    """
    from kpcore.compat import padded  # imports torch

    padded.cache(enabled)


__all__ = ["cache"]
for _module in ("kernels", "pools", "searches", "subsampling"):
    __all__ += sys.modules[f"kpcore.compat.{_module}"].__all__

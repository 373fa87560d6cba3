"""kpcore on torch tensors: the same names as in `kpcore`, under autograd, torch.compile, torch.export and autocast.

Differentiable operators are torch operators (``torch.ops.kpcore``). Searches and `grid_subsample` run eagerly, because
the sizes of their results depend on values; so do functions that prepare a network (`build_pyramid`, `kernel_points`).
Tensors are on the CPU or on a GPU, where CuPy must be installed. They share memory with the arrays that kpcore computes
on, in both directions, and on a GPU kpcore uses torch's current stream. Neighbour lists are `kpcore.Neighbors`, of
which `to_sparse` makes a sparse tensor.
`KPConv`, `DeformableKPConv` and `KPConvX` are layers, `SubmanifoldConv`, `StridedConv` and `InverseConv` those over a
kernel map, and `ContinuousConv`, `SparseConv`, `SparseConvTranspose`, `FixedRadiusSearch`, `RadiusSearch`, `KNNSearch`
and `VoxelPooling` have the arguments of Open3D's. `LocalDeformableKernel2d`, `GlobalDeformableKernel2d`,
`DeformableConv2d`, `DeformableKernelConv2d` and `ConditionalConv2d` are layers over images with the arguments of
torch.nn.Conv2d. `Network` and `ImageNetwork` are networks of `kpcore.nn` as modules. `PyramidDataset` and
`PyramidCollate` build pyramids in the workers of a DataLoader, `to_device` moves them, and with `dynamic_shapes` a
program of torch.export takes pyramids of any size. After the import, ``torch.load(weights_only=True)`` reads lists and
pyramids, and NumPy arrays of numbers, of which they consist.
docs/frameworks.md describes all of it, and the limits.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("kpcore.torch needs PyTorch: pip install kpcore[torch]", name="torch") from None

import kpcore as _kpcore
from kpcore.neighbors import Neighbors
from kpcore.ops import EAGER as _EAGER
from kpcore.ops import OPS as _OPS
from kpcore.torch import eager as _eager
from kpcore.torch.data import PyramidCollate, PyramidDataset, dynamic_shapes, to_device
from kpcore.torch.deform2d_layers import (
    ConditionalConv2d,
    DeformableConv2d,
    DeformableKernelConv2d,
    GlobalDeformableKernel2d,
    LocalDeformableKernel2d,
)
from kpcore.torch.eager import GridIndex, KDTree
from kpcore.torch.layers import DeformableKPConv, KPConv, KPConvX
from kpcore.torch.networks import ImageNetwork, Network
from kpcore.torch.open3d_layers import ContinuousConv, SparseConv, SparseConvTranspose
from kpcore.torch.open3d_searches import FixedRadiusSearch, KNNSearch, RadiusSearch, VoxelPooling
from kpcore.torch.ops import define as _define
from kpcore.torch.ops import use_torch_allocator
from kpcore.torch.sparse_layers import InverseConv, StridedConv, SubmanifoldConv
from kpcore.torch.sparse_tensors import to_sparse

for _name, _op in _OPS.items():
    _make = _define if _op.result is not None else _eager.differentiable
    globals()[_name] = _make(_op, getattr(_kpcore, _name))
for _name in _EAGER:
    globals()[_name] = _eager.eager(getattr(_kpcore, _name))

__all__ = [
    "ConditionalConv2d",
    "ContinuousConv",
    "DeformableConv2d",
    "DeformableKPConv",
    "DeformableKernelConv2d",
    "FixedRadiusSearch",
    "GlobalDeformableKernel2d",
    "GridIndex",
    "ImageNetwork",
    "InverseConv",
    "KDTree",
    "KNNSearch",
    "KPConv",
    "KPConvX",
    "LocalDeformableKernel2d",
    "Neighbors",
    "Network",
    "PyramidCollate",
    "PyramidDataset",
    "RadiusSearch",
    "SparseConv",
    "SparseConvTranspose",
    "StridedConv",
    "SubmanifoldConv",
    "VoxelPooling",
    "dynamic_shapes",
    "to_device",
    "to_sparse",
    "use_torch_allocator",
    *_EAGER,
    *_OPS,
]
__all__.sort()

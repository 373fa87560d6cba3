"""kpcore: the numerical core of point convolutions, on plain arrays.

NumPy arrays in, NumPy arrays out, on all CPU cores; CuPy arrays in, CuPy arrays out, on the GPU. `kpcore.torch` and
`kpcore.jax` have the same functions for tensors and JAX arrays. CuPy, torch and JAX are not imported before they are
used. These conventions hold in every function:

Shapes
    N points (the supports), M queries, E neighbour pairs, H neighbours of a query, K kernel points, C channels, B batch
    items, D dimensions. ``points`` comes before ``queries``; ``queries=None`` means the points themselves. Batches are
    stacked along the first axis and bounded by ``row_splits`` (B + 1,) int64; items may be empty.
Dtypes
    Geometry (points, queries, kernel points) is float32 or float64, one dtype within a call; so are features and
    weights, whose dtype may differ from that of the geometry. On the GPU features and weights may also be float16 or
    bfloat16; computations with them are in float32. Integer or mixed input is an error that says which array to
    convert; so are arrays on two devices. Arrays that are not contiguous or aligned are copied. No argument is ever
    written to.
Neighbours
    Neighbour lists in CSR form, :class:`Neighbors`. By default a radius is inclusive and a point is a neighbour of
    itself. Lengths are in the unit of ``points``.
Decisions
    Which points are within the radius, which voxel a point is in, which kernel point is nearest: the same bits on every
    machine, instruction set, number of threads and GPU. Floating-point results do not depend on the number of threads,
    and agree between machines to 2e-5 (float32) or 1e-10 (float64) of the largest value.
Edges
    Empty input, empty neighbourhoods and equal points have defined results. NaN or infinite coordinates are an error in
    searches and subsampling. In searches for nearest points, so are coordinates so large or so close together that
    distances overflow or vanish. NaN features of a convolution affect only the queries that have such a neighbour.
    One call takes at most 2**31 - 1 points; pairs are counted in 64 bits.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from kpcore import _openmp, autodiff, moved  # noqa: F401 (_openmp first: it loads backends.cpu)
from kpcore.config import *  # noqa: F403
from kpcore.continuous import *  # noqa: F403
from kpcore.deform2d import *  # noqa: F403
from kpcore.deformation import *  # noqa: F403
from kpcore.dispositions import *  # noqa: F403
from kpcore.features import *  # noqa: F403
from kpcore.kernel_map import *  # noqa: F403
from kpcore.kpconv import *  # noqa: F403
from kpcore.layers import *  # noqa: F403
from kpcore.models import *  # noqa: F403
from kpcore.neighbors import *  # noqa: F403
from kpcore.pooling import *  # noqa: F403
from kpcore.pyramid import *  # noqa: F403
from kpcore.receptive_field import *  # noqa: F403
from kpcore.sampling import *  # noqa: F403
from kpcore.search import *  # noqa: F403
from kpcore.sparse import *  # noqa: F403
from kpcore.subsampling import *  # noqa: F403
from kpcore.terrain import *  # noqa: F403

if TYPE_CHECKING:
    from kpcore import compat, io, jax, nn, ops, pipeline, scenes, torch  # noqa: F401

_IMPORTED_WHEN_USED = ("compat", "io", "jax", "nn", "ops", "pipeline", "scenes", "torch")


def __getattr__(name: str) -> ModuleType:
    if name in _IMPORTED_WHEN_USED:
        return importlib.import_module(f"kpcore.{name}")
    raise AttributeError(f"module 'kpcore' has no attribute {name!r}")


# Modules whose `__all__` is exported here. They are looked up in sys.modules, since some names, such as kpconv, are
# here those of functions.
_EXPORTING = (
    *("config", "continuous", "deform2d", "deformation", "dispositions", "features", "kernel_map", "kpconv", "layers"),
    *("models", "neighbors", "pooling", "pyramid", "receptive_field", "sampling", "search", "sparse", "subsampling"),
    "terrain",
)
__all__ = ["autodiff"]
for _module in _EXPORTING:
    __all__ += sys.modules[f"kpcore.{_module}"].__all__
__all__.sort()

"""kpcore: the numerical core of point convolutions, on plain arrays.

NumPy arrays in, NumPy arrays out, on all CPU cores; CuPy arrays in, CuPy arrays out, on the GPU. `kpcore.torch` and
`kpcore.jax` have the same names for the arrays of those frameworks. None of the three is imported before it is used.
These conventions hold in every function:

Shapes
    N points (the supports), M queries, E neighbour pairs, H neighbours of a query, K kernel points, C channels, B batch
    items, D dimensions. ``points`` comes before ``queries``; ``queries=None`` means the points themselves. Batches are
    stacked along the first axis and bounded by ``row_splits`` (B + 1,) int64; items may be empty.
Dtypes
    Geometry (points, queries, kernel points) is float32 or float64, equal within a call; so are features and weights;
    the two groups may differ. On the GPU features and weights may also be float16 or bfloat16, computed with in
    float32. Integer or mixed input is an error that says which array to convert; so are arrays on two devices. Arrays
    that are not contiguous or aligned are copied; none is ever written to.
Neighbours
    A list of rows in CSR form, :class:`Neighbors`. A radius is inclusive and a point is its own neighbour. Lengths are
    in the unit of ``points``.
Decisions
    Which points are within the radius, which voxel a point is in, which kernel point is nearest: the same bits on every
    machine, instruction set, number of threads and GPU. Floating-point results do not depend on the number of threads,
    and agree between machines to 2e-5 (float32) or 1e-10 (float64) of the largest value.
Edges
    Empty input, empty neighbourhoods and equal points have defined results. NaN or infinite coordinates are an error in
    searches and subsampling, and so are, where nearest points are sought, coordinates so large or close together that
    distances overflow or vanish; convolutions let NaN features through to the queries that see them. One call takes at
    most 2**31 - 1 points; pairs are counted in 64 bits.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from kpcore import _openmp, autodiff, moved  # noqa: F401 (_openmp first: it loads backends.cpu)
from kpcore.config import *  # noqa: F403
from kpcore.deformation import *  # noqa: F403
from kpcore.dispositions import *  # noqa: F403
from kpcore.kpconv import *  # noqa: F403
from kpcore.layers import *  # noqa: F403
from kpcore.neighbors import *  # noqa: F403
from kpcore.pooling import *  # noqa: F403
from kpcore.pyramid import *  # noqa: F403
from kpcore.sampling import *  # noqa: F403
from kpcore.search import *  # noqa: F403
from kpcore.subsampling import *  # noqa: F403

if TYPE_CHECKING:
    from kpcore import io, jax, nn, ops, pipeline, scenes, torch  # noqa: F401

_IMPORTED_WHEN_USED = ("io", "jax", "nn", "ops", "pipeline", "scenes", "torch")


def __getattr__(name: str) -> ModuleType:
    if name in _IMPORTED_WHEN_USED:
        return importlib.import_module(f"kpcore.{name}")
    raise AttributeError(f"module 'kpcore' has no attribute {name!r}")


# What these modules export. Not by the modules' names: some, as kpconv, are here those of their functions.
_EXPORTING = (
    *("config", "deformation", "dispositions", "kpconv", "layers", "neighbors"),
    *("pooling", "pyramid", "sampling", "search", "subsampling"),
)
__all__ = ["autodiff"]
for _module in _EXPORTING:
    __all__ += sys.modules[f"kpcore.{_module}"].__all__
__all__.sort()

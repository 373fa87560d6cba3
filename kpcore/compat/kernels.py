"""Kernel points as the code bases around KPConv load them."""

from __future__ import annotations

from typing import Any

import numpy as np

import kpcore as kp
from kpcore.backends import checks

__all__ = ["load_kernels"]

_LARGEST_POTENTIAL = 30  # above that the published code takes Lloyd's relaxation
_MEAN_NORM = 0.66  # of the points other than the centre, in radii of the convolution


def load_kernels(radius: float, num_kpoints: int, dimension: int, fixed: str, lloyd: bool = False) -> np.ndarray:
    """Kernel points of a layer, turned and moved at random: ``load_kernels`` of KPConv-PyTorch and its descendants.

    The disposition is that of `kpcore.kernel_points`, computed once in a process: no file is read or written. As
    published it is turned about the last axis by a random angle (in the plane if the dimension is 2, not at all if it
    is 4 or more), and each coordinate is moved by a normal deviate of 0.01 `radius`. Both are drawn from NumPy's global
    generator, so that ``numpy.random.seed`` makes them reproducible.

    Parameters
    ----------
    radius : float
        Radius of the convolution: the points other than the centre are 0.66 of it from the centre on average, with
        Lloyd's method they fill the ball of this radius.
    num_kpoints : int
        K.
    dimension : int
        D, 2 to 8.
    fixed : {"center", "verticals", "none"}
        As in `kpcore.kernel_points`.
    lloyd : bool
        Place the points by Lloyd's relaxation, as for any K above 30.

    Returns
    -------
    (K, dimension) float32

    Raises
    ------
    ValueError, TypeError
        For an argument outside these ranges.

    Notes
    -----
    The standard deviation of ml-kpconvx is 0.001. Its layouts of shells are ``kpcore.kernel_points(method="shells")``.

    Examples
    --------
    >>> import numpy as np
    >>> from kpcore.compat import load_kernels
    >>> np.random.seed(0)
    >>> points = load_kernels(0.1, 15, dimension=3, fixed="center")
    >>> points.shape, points.dtype, bool(0.064 < np.linalg.norm(points[1:], axis=1).mean() < 0.068)
    ((15, 3), dtype('float32'), True)
    """
    radius = checks.length("radius", radius, np.dtype(np.float32))
    num = checks.integer("num_kpoints", num_kpoints, 1)
    places = disposition(num, 1.0, checks.boolean("lloyd", lloyd))
    with checks.argument_names({"num": "num_kpoints"}):
        points = kp.kernel_points(num, dimension=dimension, fixed=fixed, dtype=np.float64, **places)
    angle = np.random.rand() * 2 * np.pi  # noqa: NPY002 - the generator that the callers seed
    points = radius * (points + np.random.normal(scale=0.01, size=points.shape))  # noqa: NPY002
    if dimension in (2, 3):
        x, y = points[:, 0].copy(), points[:, 1].copy()
        points[:, 0], points[:, 1] = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return points.astype(np.float32)


def disposition(num_kpoints: int, radius: float, lloyd: bool = False) -> dict[str, Any]:
    """The arguments `method` and `radius` of `kpcore.kernel_points` for a published radius of the convolution."""
    if lloyd or num_kpoints > _LARGEST_POTENTIAL:
        return {"method": "lloyd", "radius": radius}
    return {"method": "potential", "radius": _MEAN_NORM * radius}

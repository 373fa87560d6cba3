"""Kernel point dispositions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kpcore import _array, _cpu, config

_FIXED = {"none": 0, "center": 1, "verticals": 3}


def kernel_points(num, radius=1.0, *, dimension=3, fixed="center", rotate=None, seed=0, dtype=np.float32):
    """Points spread regularly in a ball, where the weights of a KPConv sit.

    Points repel each other with the potential 1 / d and are drawn to the origin by 5 d² (Thomas et al. 2019,
    supplementary B, with the constants of the published code); of a hundred seeded starts the one that comes to rest
    best is kept. The same points on every machine; nothing is written to disk; kept in memory for the next call.

    Parameters
    ----------
    num : int
        K. At least 1, or 3 with ``fixed="verticals"``.
    radius : float
        Mean norm of the points other than the centre (of all with ``fixed="none"``). The published networks take 0.66
        of the search radius. A single centre stays at the origin.
    dimension : int
        D, 2 to 8.
    fixed : {"center", "verticals", "none"}
        "center": the first point is at the origin. "verticals": besides, the second and third are on the last axis,
        above and below it.
    rotate : {None, "vertical", "full"}
        A random rotation, drawn from `seed`: none, about the last axis (in the plane if D = 2), or uniform among all.
    seed : int
        0 to 2**64 - 1.
    dtype : float32 or float64

    Returns
    -------
    (num, dimension)

    Raises
    ------
    ValueError, TypeError
        For an argument outside these.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> p = kp.kernel_points(15, radius=0.066)
    >>> p.shape, np.linalg.norm(p[0])
    ((15, 3), np.float32(0.0))
    >>> round(float(np.linalg.norm(p[1:], axis=1).mean()), 4)
    0.066
    """
    dimension = _array.integer("dimension", dimension, 2, 8)
    _array.choice("fixed", fixed, tuple(_FIXED))
    num = _array.integer("num", num, max(1, _FIXED[fixed]), 4096)
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
    if dtype not in _array.REAL:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    radius = _array.length("radius", radius, dtype)
    _array.choice("rotate", rotate, (None, "vertical", "full"))
    seed = _array.integer("seed", seed, 0, 2**64 - 1)
    points = _unit(num, dimension, _FIXED[fixed], seed) * radius
    if rotate is not None:
        rotation = _rotation(dimension, rotate, seed)
        # Not a matrix product, whose sums differ from machine to machine.
        points = sum(points[:, a, None] * rotation[a] for a in range(dimension))
    return points.astype(dtype)


@lru_cache(maxsize=64)
def _unit(num, dimension, fixed, seed):
    points = _cpu.kernel_points(num, dimension, fixed, seed, config.get_num_threads())
    outer = points[1:] if fixed else points
    # One by one, in order: a mean by NumPy adds in an order that depends on the machine.
    norms = [np.sqrt(sum(float(x) * float(x) for x in p)) for p in outer]
    if norms and sum(norms) > 0:
        points = points / (sum(norms) / len(norms))
    points.flags.writeable = False
    return points


def _rotation(dimension, rotate, seed):
    """Rows are orthonormal: vectors uniform in the ball, made so one after another (Gram-Schmidt)."""
    random = np.random.PCG64(seed)
    turning = dimension if rotate == "full" or dimension == 2 else dimension - 1
    rows = []
    while len(rows) < turning:
        row = [float(x >> 11) / 2**52 - 1 for x in random.random_raw(turning).tolist()]
        if not 1e-4 < sum(x * x for x in row) < 1:
            continue
        for other in rows:
            along = sum(a * b for a, b in zip(row, other, strict=True))
            row = [a - along * b for a, b in zip(row, other, strict=True)]
        norm = np.sqrt(sum(x * x for x in row))
        if norm > 1e-3:
            rows.append([x / norm for x in row])
    rotation = np.eye(dimension)
    rotation[:turning, :turning] = rows
    if np.linalg.det(rotation) < 0:
        rotation[0] = -rotation[0]
    return rotation

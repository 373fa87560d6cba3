"""Kernel point dispositions: where the kernel points of a KPConv are placed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from kpcore.backends import checks, cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike

__all__ = ["kernel_points"]

_FIXED = {"none": 0, "center": 1, "verticals": 3}  # number of points that are not free to move
_METHODS = ("potential", "lloyd", "shells")
_MAX_STARTS = 8
_MAX_NUM = {"potential": 100, "lloyd": 4096}  # both take about 5 s on one core


def kernel_points(num: int | Sequence[int], radius: float = 1.0, *, dimension: int = 3,
                  fixed: Literal["none", "center", "verticals"] = "center",
                  method: Literal["potential", "lloyd", "shells"] = "potential",
                  rotate: Literal["vertical", "full"] | None = None, seed: int = 0,
                  dtype: DTypeLike = np.float32) -> np.ndarray:  # fmt: skip
    """Points spread regularly in a ball, where the weights of a KPConv sit: the published dispositions.

    The points are the same on every machine. The last 64 dispositions are kept in memory; nothing is written to disk.

    Parameters
    ----------
    num : int, or with ``method="shells"`` a sequence of int
        K, at most 100 with "potential", 4096 with "lloyd". At least 1, or 3 with ``fixed="verticals"``. With "shells":
        the number of points of each shell, from the centre outwards; the first is 1, and the sum at most 4096.
        [1, 14, 28] gives the 43 points of KPConvX.
    radius : float
        With "potential" the mean norm of the points other than the centre (of all with ``fixed="none"``); the published
        networks take 0.66 of the search radius. With "lloyd" and "shells" the radius of the ball that the points fill:
        take the search radius. If the centre is the only point, it stays at the origin.
    dimension : int
        D, 2 to 8.
    fixed : {"center", "verticals", "none"}
        "center": the first point is at the origin. "verticals": also, the second and third point are on the last axis,
        above and below the origin (with "shells", on the first shell after the centre, which needs at least 2 points).
        "none": all points are free; not possible with "shells".
    method : {"potential", "lloyd", "shells"}
        How the points are placed, see the notes.
    rotate : {None, "vertical", "full"}
        A random rotation, drawn from `seed`: none, about the last axis (in the plane if D = 2), or a uniform one.
    seed : int
        0 to 2**64 - 1.
    dtype : float32 or float64

    Returns
    -------
    (K, dimension)

    Raises
    ------
    ValueError, TypeError
        For an argument outside these ranges.

    Notes
    -----
    "potential" (Thomas et al. 2019, supplementary B, with the constants of the published code): points repel each other
    with the potential 1 / d and are attracted to the origin by 5 d²; of a hundred seeded starts the one with the
    smallest remaining gradient is kept. Made for tens of points: 60 take about 1 s on one core and 100 about 4 s; 400
    would take minutes, so more than 100 are an error.

    "lloyd", for more points (the published code switches to it above K = 30): Lloyd's relaxation of K points over
    65536 + 64 K seeded samples of the ball. Each sample belongs to the nearest point, and each point moves to the mean
    of its samples, a hundred times or until nothing changes. The published code takes 500 steps of a tenth of the way,
    with 5000 new samples each, from a start near the sphere. 4096 points in 3-D take about 5 s on one core.

    "shells" (Thomas et al. 2024, KPConvX): shell s of S has the radius 2 s / (2 S - 1) times `radius`; the ball ends
    half a spacing outside the last shell. Points repel each other as in "potential" and move on their shells only.
    Starts are uniform on the sphere; the published ones are denser at its poles. It takes as long as "potential".

    The spacing is checked: if two points are closer than a quarter of the ideal spacing, the method starts again from
    the next seed derived from `seed`; if eight starts fail, the one with the widest spacing is kept. The ideal spacing
    is 2 R / K**(1/D) for K points that fill a ball of radius R (the largest norm); for shells it is the smallest of the
    distance between shells and, for each shell of n points and radius r, 2 r / n**(1/(D-1)).

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> p = kp.kernel_points(15, radius=0.066)
    >>> p.shape, np.linalg.norm(p[0])
    ((15, 3), np.float32(0.0))
    >>> round(float(np.linalg.norm(p[1:], axis=1).mean()), 4)
    0.066
    >>> np.linalg.norm(kp.kernel_points([1, 3, 4], dimension=2, method="shells"), axis=1).round(3)
    array([0. , 0.4, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8], dtype=float32)
    """
    dimension = checks.integer("dimension", dimension, 2, 8)
    checks.choice("fixed", fixed, tuple(_FIXED))
    checks.choice("method", method, _METHODS)
    if method == "shells":
        sizes = _shell_sizes(num, fixed)
    else:
        sizes = (checks.integer("num", num, max(1, _FIXED[fixed]), _MAX_NUM["lloyd"]),)
        if sizes[0] > _MAX_NUM[method]:
            raise ValueError(
                f"num: expected at most {_MAX_NUM[method]} with method='potential', which would take minutes for more, "
                f"got {num}; take method='lloyd'"
            )
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
    if dtype not in checks.REAL:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    radius = checks.length("radius", radius, dtype)
    checks.choice("rotate", rotate, (None, "vertical", "full"))
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    points = _unit_points(sizes, dimension, _FIXED[fixed], method, seed) * radius
    if rotate is not None:
        points = rotated(points, random_rotation(dimension, rotate, seed))
    return points.astype(dtype)


def _shell_sizes(num, fixed):
    if not isinstance(num, (list, tuple, np.ndarray)) or not len(np.shape(num)):
        raise TypeError(
            f"num: expected a sequence of integers, the number of points of each shell, got {type(num).__name__}"
        )
    sizes = tuple(checks.integer(f"num[{shell}]", n, 1) for shell, n in enumerate(num))
    if sizes[:1] != (1,):
        raise ValueError(f"num: expected 1 point on the first shell, which is the centre, got {list(sizes)}")
    if sum(sizes) > 4096:
        raise ValueError(f"num: expected at most 4096 points in all, got {sum(sizes)}")
    if fixed == "none":
        raise ValueError("fixed: expected 'center' or 'verticals' with method='shells', got 'none'")
    if fixed == "verticals" and (*sizes, 0)[1] < 2:
        raise ValueError(
            f"num: expected at least 2 points on the first shell after the centre with fixed='verticals', got {num}"
        )
    return sizes


def _shell_radii(sizes):
    """(K,) the radius of each point's shell, in the unit ball."""
    return np.repeat([2 * shell / (2 * len(sizes) - 1) for shell in range(len(sizes))], sizes)


@lru_cache(maxsize=64)
def _unit_points(sizes, dimension, fixed, method, seed):
    """The points for radius 1. `sizes`: the number of points of each shell, or the 1-tuple (K,) for other methods."""
    num = sum(sizes)
    radii = _shell_radii(sizes) if method == "shells" else None
    widest, spacing = None, -1.0
    for attempt in range(_MAX_STARTS):
        start = (seed + attempt * 0x9E3779B97F4A7C15) % 2**64
        points = unscaled("lloyd" if method == "lloyd" else "kernel_points", num, dimension, fixed, start, radii)
        closest = _closest(points)
        if closest > spacing:
            widest, spacing = points, closest
        if _is_spaced(closest, points, sizes, radii):
            break
    points = widest
    if method == "potential":
        outer = points[1:] if fixed else points
        # A plain loop, since the order in which NumPy adds depends on the machine.
        norms = [np.sqrt(sum(float(x) * float(x) for x in p)) for p in outer]
        if norms and sum(norms) > 0:
            points = points / (sum(norms) / len(norms))
    points.flags.writeable = False
    return points


def unscaled(kernel: str, num: int, dimension: int, fixed: int, seed: int,
             radii: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """(num, dimension) points from one start of a kernel, "lloyd" or "kernel_points".

    Those of "lloyd", and those on shells (`radii`), lie in the unit ball; the others have no particular scale.
    """
    points = np.empty((num, dimension))
    cpu.run(kernel, num=num, dimension=dimension, fixed=fixed, radii=radii, seed=seed, out=points)
    return points


def _closest(points):
    """The squared distance between the two closest points."""
    columns = list(points.T)
    return min((float(sum((x[:i] - x[i]) ** 2 for x in columns).min()) for i in range(1, len(points))), default=np.inf)


def _is_spaced(closest, points, sizes, radii):
    """Whether the closest two points are at least a quarter of the ideal spacing apart; `closest` is their d².

    Tests n² (4 d²)**D >= (r²)**D, the square of n (2 d)**D >= r**D: no roots, which differ from machine to machine.
    """
    dimension, quadruple = points.shape[1], 4 * closest
    if radii is None:
        largest = max(sum(x * x for x in p) for p in points.tolist())
        return sizes[0] ** 2 * quadruple**dimension >= largest**dimension
    shells = zip(sizes[1:], np.unique(radii)[1:].tolist(), strict=True)
    return quadruple * (2 * len(sizes) - 1) ** 2 >= 1 or any(
        n**2 * quadruple ** (dimension - 1) >= (r * r) ** (dimension - 1) for n, r in shells
    )


def rotated(points, rotation):
    """``points @ rotation`` of arrays or tensors, as sums in a fixed order: those of BLAS differ between machines."""
    return sum(points[:, a, None] * row for a, row in enumerate(rotation))


def random_rotation(dimension, rotate, seed):
    """(D, D) random rotation about the last axis ("vertical", if D > 2) or uniform among all ("full").

    Gram-Schmidt orthonormalization of vectors that are uniform in the unit ball.
    """
    random = np.random.PCG64(seed)
    num_axes = dimension if rotate == "full" or dimension == 2 else dimension - 1  # axes that are rotated
    rows = []
    while len(rows) < num_axes:
        row = [float(x >> 11) / 2**52 - 1 for x in random.random_raw(num_axes).tolist()]
        if not 1e-4 < sum(x * x for x in row) < 1:
            continue
        for other in rows:
            along = sum(a * b for a, b in zip(row, other, strict=True))
            row = [a - along * b for a, b in zip(row, other, strict=True)]
        norm = np.sqrt(sum(x * x for x in row))
        if norm > 1e-3:
            rows.append([x / norm for x in row])
    rotation = np.eye(dimension)
    rotation[:num_axes, :num_axes] = rows
    if np.linalg.det(rotation) < 0:
        rotation[0] = -rotation[0]
    return rotation

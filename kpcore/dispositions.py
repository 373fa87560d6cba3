"""Kernel point dispositions."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from kpcore.backends import checks, cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike

__all__ = ["kernel_points"]

_FIXED = {"none": 0, "center": 1, "verticals": 3}
_METHODS = ("potential", "lloyd", "shells")
_STARTS = 8
_MOST = {"potential": 100, "lloyd": 4096}  # points, in some seconds of one core


def kernel_points(num: int | Sequence[int], radius: float = 1.0, *, dimension: int = 3,
                  fixed: Literal["none", "center", "verticals"] = "center",
                  method: Literal["potential", "lloyd", "shells"] = "potential",
                  rotate: Literal["vertical", "full"] | None = None, seed: int = 0,
                  dtype: DTypeLike = np.float32) -> np.ndarray:  # fmt: skip
    """Points spread regularly in a ball, where the weights of a KPConv sit: the published dispositions.

    The same points on every machine; nothing is written to disk; kept in memory for the next call.

    Parameters
    ----------
    num : int, or with ``method="shells"`` a sequence of int
        K, at most 100 with "potential", 4096 with "lloyd". At least 1, or 3 with ``fixed="verticals"``. On shells: how
        many points each has, from the centre outwards, so the first is 1, and at most 4096 in all; [1, 14, 28] are the
        43 points of KPConvX.
    radius : float
        With "potential" the mean norm of the points other than the centre (of all with ``fixed="none"``); the published
        networks take 0.66 of the search radius. With "lloyd" and "shells" that of the ball which the points share: take
        the search radius. A single centre stays at the origin.
    dimension : int
        D, 2 to 8.
    fixed : {"center", "verticals", "none"}
        "center": the first point is at the origin. "verticals": besides, the second and third are on the last axis,
        above and below it (shells: of the first after the centre, which has at least these two). "none": not on shells.
    method : {"potential", "lloyd", "shells"}
        How the points find their places, see the notes.
    rotate : {None, "vertical", "full"}
        A random rotation, drawn from `seed`: none, about the last axis (in the plane if D = 2), or uniform among all.
    seed : int
        0 to 2**64 - 1.
    dtype : float32 or float64

    Returns
    -------
    (K, dimension)

    Raises
    ------
    ValueError, TypeError
        For an argument outside these.

    Notes
    -----
    "potential" (Thomas et al. 2019, supplementary B, with the constants of the published code): points repel each other
    with the potential 1 / d and are drawn to the origin by 5 d²; of a hundred seeded starts the one that comes to rest
    best is kept. For tens of points: 60 take some 1 s of one core and 100 some 4 s; 400 would take minutes, so more are
    an error.

    "lloyd", for more (the published code goes over to it above K = 30): a uniform sample of the ball, 65536 + 64 K
    seeded points, is divided among the nearest of K others, which move to the mean of their part, a hundred times or
    until nothing changes. The published code takes 500 steps of a tenth of the way, with 5000 fresh samples each, from
    a start near the sphere. 4096 points in 3-D take some 5 s of one core.

    "shells" (Thomas et al. 2024, KPConvX): of S shells, shell s has radius 2 s / (2 S - 1) of the ball's; the ball ends
    half a spacing outside the last. Points repel each other as in "potential" and slide on their shells. Starts are
    uniform on the sphere; the published ones are denser at its poles. It takes as long as "potential".

    The spacing is checked: should two points be closer than a quarter of the ideal, the method starts again from the
    next seed derived from `seed`; of eight starts in all that fail it keeps the widest spaced. The ideal is
    2 R / K**(1/D) of K points that fill a ball of radius R (the largest norm); on shells the least of the shells'
    spacing and, for each shell of n points and radius r, 2 r / n**(1/(D-1)).

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
        sizes = (checks.integer("num", num, max(1, _FIXED[fixed]), _MOST["lloyd"]),)
        if sizes[0] > _MOST[method]:
            raise ValueError(
                f"num: expected at most {_MOST[method]} with method='potential', whose time grows faster than its "
                f"square, got {num}; take method='lloyd'"
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
    points = _unit(sizes, dimension, _FIXED[fixed], method, seed) * radius
    if rotate is not None:
        points = rotated(points, random_rotation(dimension, rotate, seed))
    return points.astype(dtype)


def _shell_sizes(num, fixed):
    if not isinstance(num, (list, tuple, np.ndarray)) or not len(np.shape(num)):
        raise TypeError(f"num: expected a sequence of integers, the points of each shell, got {type(num).__name__}")
    sizes = tuple(checks.integer(f"num[{shell}]", n, 1) for shell, n in enumerate(num))
    if sizes[:1] != (1,):
        raise ValueError(f"num: expected shells from the centre, of 1 point, outwards, got {list(sizes)}")
    if sum(sizes) > 4096:
        raise ValueError(f"num: expected at most 4096 points in all, got {sum(sizes)}")
    if fixed == "none":
        raise ValueError("fixed: expected 'center' or 'verticals' with shells, got 'none'")
    if fixed == "verticals" and (*sizes, 0)[1] < 2:
        raise ValueError(f"num: expected at least 2 points, the verticals, on the shell after the centre, got {num}")
    return sizes


def _shell_radii(sizes):
    """(K,) of each point, in the unit ball."""
    return np.repeat([2 * shell / (2 * len(sizes) - 1) for shell in range(len(sizes))], sizes)


@lru_cache(maxsize=64)
def _unit(sizes, dimension, fixed, method, seed):
    """The points in the unit ball, or of unit mean norm; `sizes` is (K,) or that of each shell."""
    num = sum(sizes)
    radii = _shell_radii(sizes) if method == "shells" else None
    widest, spacing = None, -1.0
    for attempt in range(_STARTS):
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
        # One by one, in order: a mean by NumPy adds in an order that depends on the machine.
        norms = [np.sqrt(sum(float(x) * float(x) for x in p)) for p in outer]
        if norms and sum(norms) > 0:
            points = points / (sum(norms) / len(norms))
    points.flags.writeable = False
    return points


def unscaled(kernel: str, num: int, dimension: int, fixed: int, seed: int,
             radii: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """(num, dimension) from one start: in the unit ball, of "lloyd" and of `radii`; else before any scaling."""
    points = np.empty((num, dimension))
    cpu.run(kernel, num=num, dimension=dimension, fixed=fixed, radii=radii, seed=seed, out=points)
    return points


def _closest(points):
    """The squared distance of the two points that are closest."""
    columns = list(points.T)
    return min((float(sum((x[:i] - x[i]) ** 2 for x in columns).min()) for i in range(1, len(points))), default=np.inf)


def _is_spaced(closest, points, sizes, radii):
    """Whether they are a quarter of the ideal spacing apart: n (2 d)**D >= r**D, squared; roots differ by machine."""
    dimension, quadruple = points.shape[1], 4 * closest
    if radii is None:
        largest = max(sum(x * x for x in p) for p in points.tolist())
        return sizes[0] ** 2 * quadruple**dimension >= largest**dimension
    shells = zip(sizes[1:], np.unique(radii)[1:].tolist(), strict=True)
    return quadruple * (2 * len(sizes) - 1) ** 2 >= 1 or any(
        n**2 * quadruple ** (dimension - 1) >= (r * r) ** (dimension - 1) for n, r in shells
    )


def rotated(points, rotation):
    """``points @ rotation`` of arrays or tensors; not a matrix product, whose sums differ from machine to machine."""
    return sum(points[:, a, None] * row for a, row in enumerate(rotation))


def random_rotation(dimension, rotate, seed):
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

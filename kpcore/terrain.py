"""Heights above the ground of scanned terrain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kpcore.backends import checks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

__all__ = ["height_above_ground"]

_MOST_CELLS = 2.0**50  # from the origin, which float64 tells apart
_TILE = 1024  # cells along the side of a tile; clouds of up to two tiles are one: 100 bytes a cell are 400 MB
_MARGIN = 1.5  # around a tile, in windows
_TIE = 1e-6  # heights in whole centimetres hit a limit exactly, above or below it by the rounding of a constant added
_WINDOW_GROWTH = 1.5  # windows of 3, 5, 7, 11, 15, ... cells; all odd sizes find the same ground within 0.3 % of points


def height_above_ground(
    points: ArrayLike, *, cell: float = 1.0, window: float = 40.0, slope: float = 0.15
) -> np.ndarray:
    """Height of each point above the ground, the lowest surface without what is narrower than a window; z is up.

    The lowest point of each cell of a lattice in x and y makes a surface of lowest heights. It is opened (minima over
    a square window, then maxima) with windows that grow up to `window`; a cell which an opening lowers by more than
    `slope` times half the window is on an object: a building, a tree, a bridge. The ground there, and in cells without
    points, is interpolated from the cells around; within a cell it is bilinear. [1]_

    A cell far below all cells around (more than two cells and a half below the median of 5 x 5) is noise of the
    scanner and no ground.

    Parameters
    ----------
    points : (N, 3) float32 or float64
        Cells begin at multiples of `cell`, so coordinates of a map, in float64, give all tiles of it one lattice.
    cell : float
        Side of a cell, in the unit of the points: where the ground has about one point a cell.
    window : float
        Width of the widest window: more than the width of the widest building.
    slope : float
        Rise over run of the steepest ground. A larger value keeps ridges and embankments, and wide low objects too.

    Returns
    -------
    (N,) float64
        Negative for points below the ground. A constant added to all z, or a multiple of `cell` to all x or y, changes
        nothing but roundings.

    Raises
    ------
    ValueError
        For NaN or infinite coordinates, and lengths that are not above zero or too small for the coordinates.
    TypeError
        For other dtypes.

    Notes
    -----
    The surface at a place depends on points within some one and a half windows, and further where cells are empty.
    Clouds of more than 2,048 cells along an axis are divided into tiles, each with a margin of one and a half windows.

    References
    ----------
    .. [1] K. Zhang et al., "A progressive morphological filter for removing nonground measurements from airborne LIDAR
       data", IEEE Transactions on Geoscience and Remote Sensing 41(4), 2003; thresholds that grow with the slope:
       T. J. Pingel, K. C. Clarke, W. A. McBride, "An improved simple morphological filter for the terrain
       classification of airborne LIDAR data", ISPRS Journal 77, 2013.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x, y = np.meshgrid(np.arange(40.0), np.arange(40.0))
    >>> z = 0.1 * x + np.where((abs(x - 20) < 5) & (abs(y - 20) < 5), 6.0, 0.0)  # a block on a slope
    >>> height = kp.height_above_ground(np.stack([x, y, z], axis=-1).reshape(-1, 3)).reshape(40, 40)
    >>> height[20, 20].round(1), abs(height[5]).max().round(2)  # on a slope to within its rise in half a cell
    (np.float64(6.0), np.float64(0.05))
    """
    return heights_above_ground_of(points, None, cell=cell, window=window, slope=slope)


def heights_above_ground_of(points: ArrayLike, around: np.ndarray | None, *, cell: float, window: float,
                            slope: float) -> np.ndarray:  # fmt: skip
    """The heights of points above the ground of these and of further points around them."""
    points = checks.points_array("points", points, {}, dimensions=(3,))
    number = len(points)
    if around is not None and len(around):
        points = np.concatenate([points, around])
    cell, window = (checks.length(name, value, points.dtype) for name, value in (("cell", cell), ("window", window)))
    slope = checks.not_negative("slope", slope)
    if not np.isfinite(points).all():
        raise checks.not_finite(points=points)
    if number == 0:
        return np.zeros(0)
    places = points[:, :2].astype(np.float64) / cell
    rows = np.floor(places)
    if not np.abs(rows).max() < _MOST_CELLS:
        raise ValueError(
            f"cell: expected a side with which the points lie within 2**50 cells of the origin, got {cell:g}"
        )
    first = rows.min(axis=0)
    shape = rows.max(axis=0) - first + 1
    limits = window / cell, slope * cell, 2.5 * cell
    margin = math.ceil(_MARGIN * window / cell) + 2
    if shape.max() <= max(2 * _TILE, 2 * margin):
        return points[:number, 2] - _ground_below(places[:number], rows, points[:, 2], *limits)
    out = np.empty(number)
    for inside, near in _tiles(rows, max(_TILE, margin), margin):
        if len(inside := inside[inside < number]) == 0:
            continue
        out[inside] = _ground_below(places[inside], rows[near], points[near, 2], *limits)
    return points[:number, 2] - out


def _tiles(rows: np.ndarray, side: int, margin: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(points in a tile, points in it and in the margin around it), in the order of their index, of each tile of cells.

    A point far from all others would take the memory of all cells between.
    """
    tiles = np.floor(rows / side)
    order = np.lexsort((tiles[:, 1], tiles[:, 0]))
    starts = np.flatnonzero((np.diff(tiles[order], axis=0, prepend=np.nan) != 0).any(axis=1))
    members = np.split(order, starts[1:])
    numbers = {(int(x), int(y)): number for number, (x, y) in enumerate(tiles[order[starts]])}
    for (x, y), number in numbers.items():
        around = [numbers[x + dx, y + dy] for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (x + dx, y + dy) in numbers]
        near = np.sort(np.concatenate([members[other] for other in around]))
        low = np.array([x, y]) * side
        kept = ((rows[near] >= low - margin) & (rows[near] < low + side + margin)).all(axis=1)
        yield np.sort(members[number]), near[kept]


def _ground_below(places: np.ndarray, rows: np.ndarray, heights: np.ndarray, window: float, rise: float,
                  noise: float) -> np.ndarray:  # fmt: skip
    """The height of the ground at `places`, from the heights of points in `rows`; all these and the window in cells."""
    from scipy import ndimage

    first = rows.min(axis=0)
    shape = tuple(map(int, rows.max(axis=0) - first + 1))
    ground = _ground(_lowest(rows - first, heights, shape), min(window, 2.0 * max(shape)), rise, noise)
    return ndimage.map_coordinates(ground, (places - 0.5 - first).T, order=1, mode="nearest")


def _lowest(rows: np.ndarray, heights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The lowest height in each cell, NaN in cells without points."""
    lowest = np.full(shape, np.inf)
    np.minimum.at(lowest.ravel(), np.ravel_multi_index(rows.T.astype(np.int64), shape), heights)
    lowest[np.isinf(lowest)] = np.nan
    return lowest


def _ground(lowest: np.ndarray, window: float, rise: float, noise: float) -> np.ndarray:
    """The height of the ground in each cell. `window` in cells; `rise`: of the steepest ground, from cell to cell."""
    from scipy import ndimage

    surface = _filled(lowest)
    # Only cells that are so far below one of the cells around can be so far below their median, which takes longer.
    is_noise = surface < ndimage.maximum_filter(surface, size=5, mode="nearest") - noise - _TIE
    around = np.lib.stride_tricks.sliding_window_view(np.pad(surface, 2, mode="edge"), (5, 5))[is_noise].reshape(-1, 25)
    median = np.partition(around, 12, axis=1)[:, 12]
    is_below = surface[is_noise] < median - noise - _TIE
    is_noise[is_noise] = is_below
    surface[is_noise] = median[is_below]
    is_ground = np.isfinite(lowest) & ~is_noise
    for half in _half_windows(window):
        opened = ndimage.grey_opening(surface, size=2 * half + 1, mode="nearest")
        is_ground &= surface - opened <= rise * half + _TIE
        surface = opened
    return _filled(np.where(is_ground, lowest, np.nan)) if is_ground.any() else surface


def _half_windows(window: float) -> list[int]:
    """Half of the growing windows, in cells."""
    last = max(1, int(np.ceil(window / 2)))
    halves = _WINDOW_GROWTH ** np.arange(np.ceil(np.log(last) / np.log(_WINDOW_GROWTH)))
    return sorted({*halves.round().astype(int).tolist(), last})


def _filled(values: np.ndarray) -> np.ndarray:
    """Cells that are NaN get the bilinear interpolation of means of 2 x 2 cells, of 4 x 4 where those are NaN, ..."""
    from scipy import ndimage

    known = np.isfinite(values)
    if known.all():
        return values.copy()
    half = tuple((size + 1) // 2 for size in values.shape)
    even = np.full((2 * half[0], 2 * half[1]), np.nan)
    even[: values.shape[0], : values.shape[1]] = values
    quarters = even.reshape(half[0], 2, half[1], 2)
    count = np.isfinite(quarters).sum(axis=(1, 3))
    total = np.nansum(quarters, axis=(1, 3))
    coarse = _filled(np.divide(total, count, out=np.full(half, np.nan), where=count > 0))
    places = np.meshgrid(*((np.arange(size) - 0.5) / 2 for size in values.shape), indexing="ij")
    return np.where(known, values, ndimage.map_coordinates(coarse, places, order=1, mode="nearest"))

"""The input of a KPConv network: levels of ever coarser points, and the neighbour lists within and between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, NamedTuple

import numpy as np

from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Buffer
from kpcore.neighbors import Neighbors
from kpcore.search import GridIndex, lists_of_levels
from kpcore.subsampling import checked_rows, common_origin, grid_subsample, subsample_level

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from typing_extensions import Self

__all__ = ["Level", "Pyramid", "build_pyramid", "calibrate_neighbor_limits"]


if TYPE_CHECKING:  # generic here only: torch does not recognize a generic NamedTuple (Python 3.11) as a named tuple

    class Level(NamedTuple, Generic[Buffer]):
        """One level of a `Pyramid`, of N points."""

        points: Buffer
        row_splits: Buffer
        features: Buffer | None
        labels: Buffer | None
        voxel_size: float
        radius: float
        neighbors: Neighbors
        pools: Neighbors | None
        upsamples: Neighbors | None

    class Pyramid(tuple[Level[Buffer], ...]):
        """What `build_pyramid` returns: a tuple of `Level`, the finest first; picklable."""

        def __new__(cls, levels: Iterable[Level[Buffer]]) -> Self: ...

else:

    class Level(NamedTuple):
        """One level of a `Pyramid`, of N points."""

        points: np.ndarray  #: (N, D)
        row_splits: np.ndarray  #: (B + 1,) int64 bounds of the batch items
        features: np.ndarray | None  #: (N, C) means of the features of the finer level
        labels: np.ndarray | None  #: (N,) or (N, L) majorities of the labels of the finer level
        voxel_size: float
        radius: float  #: search radius of `neighbors` and `pools`
        neighbors: Neighbors  #: queries are the points of this level
        pools: Neighbors | None  #: queries are the points of the next level, neighbours those of this; None on the last
        #: For each point of this level the nearest of the next, or those within its radius; None on the last.
        upsamples: Neighbors | None

    class Pyramid(tuple):
        """What `build_pyramid` returns: a tuple of `Level`, the finest first; picklable."""

        __slots__ = ()


def build_pyramid(points: AnyArray, *, voxel_size: float, num_levels: int, row_splits: AnyArray | None = None,
                  features: AnyArray | None = None, labels: AnyArray | None = None, subsampled: bool = False,
                  origin: Literal[0, "published"] = 0, conv_radius: float = 2.5, deform_radius: float = 5.0,
                  deform_levels: Collection[int] = (), neighbor_limits: Sequence[int] | None = None,
                  inclusive: bool = True, upsample_levels: Collection[int] = ()
                  ) -> Pyramid[np.ndarray]:  # fmt: skip
    """The levels of a network: points subsampled step by step, and the neighbours within and between levels.

    As in the published code (Thomas et al. 2019 and its data pipeline): the points of level l are the barycentres of
    the points of level l - 1 in voxels of ``voxel_size * 2**l``; radii are in units of the voxel size of their level.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 2 or 3
    voxel_size : float
        Edge of the voxels of level 0, in the unit of the points.
    num_levels : int
        At least 1.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    features : (N, C) float32 or float64, optional
        Averaged over the points of each voxel, from level to level.
    labels : (N,) or (N, L) of any integer dtype, optional
        The majority of each voxel, from level to level, in each column by itself.
    subsampled : bool
        Whether the points already are level 0, one for each voxel; otherwise level 0 is
        ``grid_subsample(points, voxel_size, origin=origin)``.
    origin : {0, "published"}
        Origin of the grids: 0 on all levels, or, as in the published code, computed on each level from the points that
        are subsampled, see `grid_subsample`.
    conv_radius, deform_radius : float
        Radius of the neighbourhoods in voxels; `deform_radius` on the levels in `deform_levels`, `conv_radius` on the
        others.
    deform_levels : sequence of int
        Levels that have a deformable convolution, which needs the larger radius.
    neighbor_limits : sequence of int, (num_levels,), optional
        Largest number of neighbours in the lists of each level; the nearest are kept. See `calibrate_neighbor_limits`.
    inclusive : bool
        Whether points at exactly the radius are neighbours. In the published code they are not.
    upsample_levels : sequence of int
        Levels, without the last, whose `upsamples` list the points of the next level within its radius, at most as many
        as its limit, for a convolution that upsamples; the other levels list the nearest one.

    Returns
    -------
    Pyramid

    Raises
    ------
    ValueError, TypeError, MemoryError
        As `grid_subsample` and `radius_search`.

    Notes
    -----
    On the GPU this function waits once for the number of points of each level, and without `neighbor_limits` once more
    for the numbers of neighbours of all levels. With `subsampled` and limits, coordinates that are not finite are not
    noticed there.

    Neighbours are in the order of their index, not of their distance. The published code rotates each cloud at random
    before it is subsampled; to do the same, rotate the points before, and the points of all levels back afterwards.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.random.default_rng(0).random((2000, 3), np.float32)
    >>> pyramid = kp.build_pyramid(points, voxel_size=0.1, num_levels=3)
    >>> [len(level.points) for level in pyramid]
    [862, 125, 27]
    >>> pyramid[0].pools
    Neighbors(125 queries, 862 points, 5279 pairs)
    """
    num_levels = checks.integer("num_levels", num_levels, 1, 64)
    sizes = {}
    points = checks.points_array("points", points, sizes)
    voxel_size = checks.length("voxel_size", voxel_size, points.dtype)
    origin = common_origin(origin)
    radii = _radii(points.dtype, voxel_size, num_levels, conv_radius, deform_radius, deform_levels)
    limits = _limits(neighbor_limits, num_levels)
    inclusive = checks.boolean("inclusive", inclusive)
    upsample_levels = {checks.integer("upsample_levels", level, 0, num_levels - 2) for level in upsample_levels}
    if subsampled:
        row_splits = checks.splits_array("row_splits", row_splits, len(points), "points", sizes)
        levels = [(points, *checked_rows(features, labels, sizes), row_splits)]
    else:
        attributes = {"features": features, "labels": labels, "row_splits": row_splits}
        levels = [grid_subsample(points, voxel_size, origin=origin, **attributes)[:4]]
    voxels = [voxel_size * 2**number for number in range(num_levels)]
    for voxel in voxels[1:]:
        levels.append(subsample_level(voxel, origin, *levels[-1]))
    lists = lists_of_levels(
        [(points, row_splits) for points, _, _, row_splits in levels], radii, limits, upsample_levels, inclusive
    )
    return Pyramid(
        Level(points, row_splits, features, labels, *more)
        for (points, features, labels, row_splits), *more in zip(
            levels, voxels, radii, *zip(*lists, strict=True), strict=True
        )
    )


def calibrate_neighbor_limits(clouds: Iterable[AnyArray], *, voxel_size: float, num_levels: int,
                              origin: Literal[0, "published"] = 0, conv_radius: float = 2.5,
                              deform_radius: float = 5.0, deform_levels: Collection[int] = (),
                              inclusive: bool = True, fraction: float = 0.9) -> list[int]:  # fmt: skip
    """Neighbour limits for `build_pyramid` that leave a fraction of the neighbourhoods of sample clouds untouched.

    The limit of a level is the smallest number such that at least `fraction` of its points have no more neighbours than
    that: the rule of the published code (0.9 in PyTorch, 0.8 in TensorFlow).

    Parameters
    ----------
    clouds : iterable of (N, D) arrays
        Typical inputs, with at least one point in all. Only one is held in memory at a time.
    voxel_size, num_levels, origin, conv_radius, deform_radius, deform_levels, inclusive
        As in `build_pyramid`.
    fraction : float
        Above 0, at most 1.

    Returns
    -------
    list of int, (num_levels,)

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> clouds = [np.random.default_rng(i).random((2000, 3), np.float32) for i in range(3)]
    >>> kp.calibrate_neighbor_limits(clouds, voxel_size=0.1, num_levels=3)
    [58, 59, 27]
    """
    if not 0 < checks.number("fraction", fraction, np.dtype(np.float64)) <= 1:
        raise ValueError(f"fraction: expected a number above 0 and at most 1, got {fraction}")
    num_levels, origin = checks.integer("num_levels", num_levels, 1, 64), common_origin(origin)
    histograms = [np.zeros(1, np.int64) for _ in range(num_levels)]
    for cloud in clouds:
        points = checks.points_array("clouds", cloud, {})
        size = checks.length("voxel_size", voxel_size, points.dtype)
        radii = _radii(points.dtype, size, num_levels, conv_radius, deform_radius, deform_levels)
        for number, radius in enumerate(radii):
            points = grid_subsample(points, size * 2**number, origin=origin).points
            counts = GridIndex(points, radius).radius_search(None, radius, inclusive=inclusive, count_only=True)
            counts = devices.on_host(counts)
            histogram = np.bincount(counts, minlength=len(histograms[number]))
            histogram[: len(histograms[number])] += histograms[number]
            histograms[number] = histogram
    if not histograms[0].any():
        raise ValueError("clouds: expected at least one point, got none")
    return [int(np.searchsorted(np.cumsum(h), fraction * h.sum())) for h in histograms]


def _radii(dtype, voxel_size, num_levels, conv_radius, deform_radius, deform_levels):
    conv_radius = checks.length("conv_radius", conv_radius, dtype)
    deform_radius = checks.length("deform_radius", deform_radius, dtype)
    deformable = {checks.integer("deform_levels", level, 0, num_levels - 1) for level in deform_levels}
    in_voxels = [deform_radius if level in deformable else conv_radius for level in range(num_levels)]
    return [radius * voxel_size * 2**level for level, radius in enumerate(in_voxels)]


def _limits(neighbor_limits, num_levels):
    if neighbor_limits is None:
        return [None] * num_levels
    limits = [checks.integer("neighbor_limits", limit, 0) for limit in neighbor_limits]
    if len(limits) != num_levels:
        raise ValueError(f"neighbor_limits: expected {num_levels} numbers to match num_levels, got {len(limits)}")
    return limits

"""Features of points that are computed from their neighbours: normals, shapes of the local surface, outliers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple

import numpy as np

from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Buffer
from kpcore.neighbors import row_splits_to_batch
from kpcore.pooling import segment_reduce
from kpcore.search import GridIndex, KDTree, radius_search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kpcore.neighbors import Neighbors

__all__ = ["CovarianceFeatures", "covariance_features", "normals", "outlier_mask"]

_K = 20  # nearest points of a neighbourhood, where neither k nor radius says otherwise
_PAIRS, _LEAST_ROWS = 2**24, 2**6  # neighbours, on average, and at least points, that are searched at a time

if TYPE_CHECKING:  # generic here only, as kpcore.sampling.Sampled

    class CovarianceFeatures(NamedTuple, Generic[Buffer]):
        """What `covariance_features` returns."""

        normals: Buffer
        eigenvalues: Buffer
        linearity: Buffer
        planarity: Buffer
        scattering: Buffer
        verticality: Buffer
        curvature: Buffer

else:

    class CovarianceFeatures(NamedTuple):
        """What `covariance_features` returns, in the dtype of the points."""

        normals: np.ndarray  #: (N, 3), as those of `normals`
        eigenvalues: np.ndarray  #: (N, 3), falling: variances in the squared unit of the points
        linearity: np.ndarray  #: (N,), 0 to 1
        planarity: np.ndarray  #: (N,), 0 to 1
        scattering: np.ndarray  #: (N,), 0 to 1
        verticality: np.ndarray  #: (N,), 0 to 1
        curvature: np.ndarray  #: (N,), 0 to 1/3


def normals(points: AnyArray, *, k: int | None = None, radius: float | None = None,
            viewpoint: AnyArray | Sequence[float] | None = None,
            row_splits: AnyArray | None = None) -> np.ndarray:  # fmt: skip
    """Unit normals of the surface at points: of the planes that fit their neighbourhoods best.

    The normal is the eigenvector of the smallest eigenvalue of the covariance of the neighbourhood, which holds the
    point itself [1]_. Its sign, which no covariance tells, is the one nearer to `viewpoint`; without one, or where it
    lies in the plane, nearer to +z; where the plane is vertical, to +y; where it is perpendicular to y too, to +x.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    k : int, optional
        The neighbourhood is the k nearest points, the point itself among them: at least 3. By default 20, or with a
        `radius` all points within it.
    radius : float, optional
        The neighbourhood is the points within this distance, with `k` the k nearest of these. In the unit of the
        points.
    viewpoint : (3,) or (N, 3), optional
        The place from which the points were seen, one for all or one for each, such as the positions of the scanner. An
        array has the dtype of the points; a sequence of three numbers is rounded to it.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items; neighbours are points of the same item.

    Returns
    -------
    (N, 3), dtype of the points

    Raises
    ------
    ValueError
        For coordinates that are NaN or infinite, `k` below 3, a `radius` that is not above zero, or shapes that do not
        agree; without a `radius` also for points so close together that distances vanish, as for `knn_search`.
    TypeError
        For other dtypes.

    Notes
    -----
    A neighbourhood may define no plane: one or two points, points on a line, equal points, points as far apart in all
    directions. Then the smallest eigenvalue has several eigenvectors, and the normal is the one nearest to the
    viewpoint or +z, +y, +x, in this order, as the sign is: of one point or equal points +z, of a slanting line the
    direction perpendicular to it that is steepest, of a vertical line +y. Directions are perpendicular if they are to
    within a millionth, or within the angle that rounding of the coordinates can make; eigenvalues are equal if rounding
    can make the difference. So points in float32 that are 500,000 m from the origin, where coordinates are rounded to
    3 cm, have upward normals where neighbourhoods are as small: subtract an origin first.

    Covariances (divided by the number of points) and eigenvectors (by Jacobi's method) are computed in float64 from
    coordinates relative to the point. The result has the same bits with any number of threads. Neighbours are searched
    for some points at a time, so that memory is bounded however large the neighbourhoods are.

    References
    ----------
    .. [1] H. Hoppe et al., "Surface reconstruction from unorganized points", SIGGRAPH 1992.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x, y = np.meshgrid(np.arange(8.0), np.arange(8.0))
    >>> roof = np.stack([x, y, 0.75 * x], axis=-1).reshape(-1, 3)
    >>> np.allclose(kp.normals(roof, k=9), [-0.6, 0, 0.8])
    True
    >>> np.allclose(kp.normals(roof, k=9, viewpoint=(3, 3, -100)), [0.6, 0, -0.8])
    True
    """
    return _fitted(points, k, radius, viewpoint, row_splits, with_eigenvalues=False)[0]


def covariance_features(points: AnyArray, *, k: int | None = None, radius: float | None = None,
                        viewpoint: AnyArray | Sequence[float] | None = None,
                        row_splits: AnyArray | None = None) -> CovarianceFeatures[np.ndarray]:  # fmt: skip
    """How the neighbours of points lie: along a line, on a plane or scattered, upright, curved; with the normals.

    With the eigenvalues ``l1 >= l2 >= l3`` of the covariance of the neighbourhood and the unit normal n:

    =========== ====================== ====
    linearity   (l1 - l2) / l1         [1]_
    planarity   (l2 - l3) / l1         [1]_
    scattering  l3 / l1                [1]_
    verticality 1 - abs(n[2])          [2]_
    curvature   l3 / (l1 + l2 + l3)    [3]_
    =========== ====================== ====

    The first three add up to 1.

    Parameters
    ----------
    points, k, radius, viewpoint, row_splits
        As for `normals`.

    Returns
    -------
    CovarianceFeatures
        normals and eigenvalues (N, 3), and each feature (N,); dtype of the points.

    Raises
    ------
    ValueError, TypeError
        As `normals`.

    Notes
    -----
    Of one point, or equal points, all eigenvalues and features are 0. Two points, or points on a line, have linearity 1
    and the other features 0, except for the verticality, which is that of the normal. `normals` says which normal that
    is, and how all this is computed.

    The definitions are those with eigenvalues. Demantké et al. [2]_ take their square roots, the standard deviations:
    ``s = np.sqrt(eigenvalues)``. Other features are sums of them too: omnivariance ``(l1 * l2 * l3) ** (1 / 3)``,
    anisotropy ``(l1 - l3) / l1``.

    References
    ----------
    .. [1] M. Weinmann et al., "Semantic point cloud interpretation based on optimal neighborhoods, relevant features
       and efficient classifiers", ISPRS Journal 105, 2015; after K. F. West et al., SPIE 5426, 2004.
    .. [2] J. Demantké et al., "Streamed vertical rectangle detection in terrestrial laser scans for facade database
       production", ISPRS Annals I-3, 2012; the square roots: "Dimensionality based scale selection in 3D lidar point
       clouds", ISPRS Archives XXXVIII-5/W12, 2011.
    .. [3] M. Pauly, M. Gross, L. P. Kobbelt, "Efficient simplification of point-sampled surfaces", IEEE Visualization
       2002: "surface variation".

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> y, z = np.meshgrid(np.arange(9.0), np.arange(9.0))
    >>> wall = np.stack([0 * y, y, z], axis=-1).reshape(-1, 3)
    >>> features = kp.covariance_features(wall, radius=2.0)
    >>> at = 40  # the middle
    >>> features.normals[at], features.planarity[at].round(3), features.verticality[at], features.curvature[at]
    (array([1., 0., 0.]), np.float64(1.0), np.float64(1.0), np.float64(0.0))
    """
    normal, eigenvalues = _fitted(points, k, radius, viewpoint, row_splits, with_eigenvalues=True)
    xp = devices.namespace(normal)
    largest = eigenvalues[:, 0]
    # Ratios instead of sums, which might overflow.
    second, third = (eigenvalues[:, 1:] / xp.where(largest > 0, largest, 1)[:, None]).T
    return CovarianceFeatures(
        normal,
        eigenvalues,
        linearity=xp.where(largest > 0, 1 - second, 0).astype(normal.dtype),
        planarity=second - third,
        scattering=third.copy(),
        verticality=1 - abs(normal[:, 2]),
        curvature=third / (1 + second + third),
    )


def outlier_mask(points: AnyArray, *, mean_k: int | None = None, std_mul: float | None = None,
                 radius: float | None = None, min_points: int | None = None,
                 row_splits: AnyArray | None = None) -> np.ndarray:  # fmt: skip
    """Which points are outliers: far from their nearest neighbours, or with few neighbours within a radius.

    Of the two rules one is chosen by its two arguments. Both are those of the Point Cloud Library:

    ``mean_k=, std_mul=`` (StatisticalOutlierRemoval) [1]_
        The mean distance of a point to its `mean_k` nearest other points is more than ``mean + std_mul * std`` of
        these mean distances over all points of the batch item; `std` is that of a sample, with N - 1.
    ``radius=, min_points=`` (RadiusOutlierRemoval)
        Fewer than `min_points` other points lie within `radius`, which is inclusive.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    mean_k : int
        At least 1; the point itself is not counted. PCL proposes 50.
    std_mul : float
        At least 0. PCL proposes 1.
    radius : float
        In the unit of the points.
    min_points : int
        At least 1; the point itself is not counted.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items; neighbours, mean and standard deviation are those of each item.

    Returns
    -------
    (N,) bool
        True for outliers: ``points[~mask]`` are the others.

    Raises
    ------
    ValueError
        Unless exactly one rule is chosen, with both of its arguments; for coordinates that are NaN or infinite; with
        `mean_k` also for points so close together that distances vanish, as for `knn_search`.
    TypeError
        For other dtypes.

    Notes
    -----
    An item with fewer than ``mean_k + 1`` points takes the mean over the other points there are. A single point has
    the distance 0 and is no outlier by the first rule, and is one by the second. Means and deviations are float64; a
    difference of 1e-12 of the limit, which may be rounding, makes no outlier. The result is the same with any number
    of threads.

    Open3D's remove_radius_outlier is the second rule; its remove_statistical_outlier counts the point itself among the
    neighbours.

    References
    ----------
    .. [1] R. B. Rusu et al., "Towards 3D point cloud based object maps for household environments", Robotics and
       Autonomous Systems 56(11), 2008.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [9.0]])
    >>> kp.outlier_mask(points, mean_k=2, std_mul=1.0)
    array([False, False, False, False, False,  True])
    >>> kp.outlier_mask(points, radius=1.0, min_points=2)
    array([ True, False, False, False,  True,  True])
    """
    rules = {"mean_k": mean_k, "std_mul": std_mul}, {"radius": radius, "min_points": min_points}
    chosen = [rule for rule in rules if any(value is not None for value in rule.values())]
    if len(chosen) != 1:
        names = ", ".join(name for rule in chosen for name, value in rule.items() if value is not None)
        raise ValueError(
            f"mean_k, radius: expected mean_k and std_mul, or radius and min_points, got {names or 'none of them'}"
        )
    if missing := [name for name, value in chosen[0].items() if value is None]:
        other = next(name for name in chosen[0] if name != missing[0])
        raise ValueError(f"{missing[0]}: expected a number, because {other} is one, got None")
    if radius is not None:
        least = checks.integer("min_points", min_points, 1)
        with checks.argument_names({"points_row_splits": "row_splits"}):
            counts = radius_search(points, None, radius, points_row_splits=row_splits, count_only=True)
        return counts <= least  # the point itself is counted
    mean_k = min(checks.integer("mean_k", mean_k, 1), checks.MAX_POINTS)
    std_mul = checks.not_negative("std_mul", std_mul)
    tree = KDTree(points, row_splits=row_splits)
    points, row_splits = tree.stored_points, tree.stored_row_splits
    distances = devices.namespace(points).zeros((len(points), 1))
    nearest = partial(tree.knn_search, k=mean_k + 1, return_distances=True)
    for rows, neighbors in _in_blocks(points, row_splits, mean_k + 1, nearest):
        others = np.maximum(neighbors.counts[:, None] - 1, 1)
        total = segment_reduce(
            neighbors.stored_distance[:, None].astype(np.float64), neighbors.stored_row_splits, "sum"
        )
        distances[rows] = total / others  # the distance of the point itself is 0
    item, counts = row_splits_to_batch(row_splits), row_splits[1:] - row_splits[:-1]
    mean = segment_reduce(distances, row_splits)
    squares = segment_reduce((distances - mean[item]) ** 2, row_splits, "sum")
    limit = mean[:, 0] + std_mul * (squares[:, 0] / np.maximum(counts - 1, 1)) ** 0.5
    return distances[:, 0] > (limit * (1 + 1e-12))[item]


def _fitted(points, k, radius, viewpoint, row_splits, *, with_eigenvalues):
    """(normals (N, 3), the eigenvalues of the covariances (N, 3) or None)"""
    sizes = {}
    points = checks.points_array("points", points, sizes, dimensions=(3,))
    if k is not None:
        k = checks.integer("k", k, 3)
    elif radius is None:
        k = _K
    viewpoints = None if viewpoint is None else _viewpoints(viewpoint, points, sizes)
    xp, backend = devices.namespace(points), devices.backend(points)
    if radius is None:
        index = KDTree(points, row_splits=row_splits)
        search = partial(index.knn_search, k=k)
    else:
        radius = checks.length("radius", radius, points.dtype)
        if k is not None and not xp.isfinite(points).all():  # on the GPU a search with max_neighbors does not notice
            raise checks.not_finite(points=points)
        index = GridIndex(points, radius, row_splits=row_splits)
        search = partial(index.radius_search, radius=radius, max_neighbors=k)
    points, row_splits = index.stored_points, index.stored_row_splits
    pairs = _mean_neighbors(index, radius) if k is None else min(k, len(points))
    normal, eigenvalues = xp.empty_like(points), xp.empty_like(points) if with_eigenvalues else None
    for rows, neighbors in _in_blocks(points, row_splits, pairs, search):
        backend.run(
            "fit_planes", points=points, queries=points[rows], index=neighbors.stored_index,
            row_splits=neighbors.stored_row_splits, normals=normal[rows],
            viewpoints=viewpoints if viewpoints is None or len(viewpoints) == 1 else viewpoints[rows],
            eigenvalues=None if eigenvalues is None else eigenvalues[rows],
        )  # fmt: skip
    return normal, eigenvalues


def _viewpoints(viewpoint, points, sizes):
    """Viewpoints, (1, 3) or (N, 3), in the dtype of the points."""
    if not devices.is_array(viewpoint):
        if not isinstance(viewpoint, (list, tuple)):
            raise TypeError(f"viewpoint: expected (3,) or (N, 3), got {type(viewpoint).__name__}")
        numbers = checks.per_axis("viewpoint", viewpoint, 3, checks.number, points.dtype)
        return devices.to_device_of(points, numbers)[None]
    shape = "N D" if viewpoint.ndim == 2 else "D"
    checked = checks.array("viewpoint", viewpoint, shape, checks.REAL, sizes, like=("points", points)).reshape(-1, 3)
    if not devices.namespace(checked).isfinite(checked).all():
        raise checks.not_finite(viewpoint=checked)
    return checked


def _in_blocks(points: np.ndarray, row_splits: np.ndarray, pairs: float,
               search: Callable[..., Neighbors]) -> Iterator[tuple[slice, Neighbors]]:  # fmt: skip
    """(rows, the neighbours of these points): all points at once, or as many as have some `_PAIRS` neighbours.

    `pairs`: the mean number of neighbours of a point. ``search(queries, queries_row_splits=...)`` returns them.
    """
    rows = max(_LEAST_ROWS, int(_PAIRS / max(pairs, 1)))
    if rows >= len(points):
        yield slice(0, len(points)), search(None)
        return
    for begin in range(0, len(points), rows):
        end = min(begin + rows, len(points))
        splits = np.minimum(np.maximum(row_splits, begin), end) - begin
        yield slice(begin, end), search(points[begin:end], queries_row_splits=splits)


def _mean_neighbors(index, radius):
    """The mean number of points within a radius of 256 of the points of an index, evenly spaced in their order."""
    points = index.stored_points
    if not len(points):
        return 0.0
    rows = devices.to_device_of(points, np.unique(np.linspace(0, len(points) - 1, 256).astype(np.int64)))
    splits = devices.namespace(points).searchsorted(rows, index.stored_row_splits)
    counts = index.radius_search(points[rows], radius, queries_row_splits=splits, count_only=True)
    return int(counts.sum()) / len(rows)

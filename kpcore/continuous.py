"""Continuous convolution (ContinuousConv) and its transpose: filters interpolated at the positions of neighbours."""

from __future__ import annotations

import math

from kpcore import cells
from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.neighbors import Neighbors, checked_geometry
from kpcore.ops import Call

__all__ = ["continuous_conv", "continuous_conv_transpose"]

# In the order of the C++ enums CoordinateMapping and Interpolation: kernels get their numbers.
MAPPINGS = ("ball_to_cube_radial", "ball_to_cube_volume_preserving", "identity")
INTERPOLATIONS = ("linear", "linear_border", "nearest_neighbor")
_DIFFERENTIABLE = ("features", "filters", "importances", "neighbor_importances", "points", "queries", "extents")


def checked_extents(extents, points, number, name, sizes):
    """The extents as an array: one, or one for each of the `number` rows of the array `name`; for all axes or each."""
    if not devices.is_array(extents):
        return devices.namespace(points).full((), checks.length("extents", extents, points.dtype), points.dtype)
    axes = " ".join(map(str, range(extents.ndim)))  # any shape: which ones are right is checked below
    extents = checks.array("extents", extents, axes, checks.REAL, {"device": sizes["device"]}, like=("points", points))
    rows, per_axis = (*extents.shape, 1, 1)[:2]
    if extents.ndim > 2 or rows not in (1, number) or per_axis not in (1, 3):
        raise ValueError(
            f"extents: expected a number, (1,) or ({number},) to match {name}, or for each axis (1, 3) or "
            f"({number}, 3), got {extents.shape}"
        )
    return extents


def _checked_call(is_transpose, points, queries, neighbors, features, filters, extents, coordinate_mapping,
                  interpolation, align_corners, normalize, offset, importances, neighbor_importances):  # fmt: skip
    sizes, queries_are_points = {}, queries is None
    points, queries = checked_geometry(points, queries, neighbors, sizes)
    if points.shape[1] != 3:
        raise ValueError(f"points: expected (N, 3), got {points.shape}")
    features = checks.array("features", features, "N Cin", checks.FEATURES, sizes)
    like = ("features", features)
    filters = checks.array("filters", filters, "depth height width Cin Cout", checks.FEATURES, sizes, like=like)
    if 0 in filters.shape:
        raise ValueError(f"filters: expected sizes of at least 1, got {filters.shape}")
    depth, height, width = filters.shape[:3]
    if math.prod(filters.shape[:3]) > cells.MAX_CELLS:
        raise ValueError(f"filters: expected at most {cells.MAX_CELLS} cells, got {depth} x {height} x {width}")
    owner = (len(points), "points") if is_transpose else (len(queries), "queries")
    extents = checked_extents(extents, points, *owner, sizes)
    if offset is not None:
        offset = checks.array("offset", offset, "3", checks.REAL, sizes | {"3": (3, "3")}, like=("points", points))
    call = Call(
        points=points, queries=queries, queries_are_points=queries_are_points, neighbors=neighbors,
        index=neighbors.stored_index, row_splits=neighbors.stored_row_splits, features=features, filters=filters,
        extents=extents, offset=offset, kernel_index=None, depth=depth, height=height, width=width,
        mapping=checks.choice("coordinate_mapping", coordinate_mapping, MAPPINGS),
        interpolation=checks.choice("interpolation", interpolation, INTERPOLATIONS),
        align_corners=checks.boolean("align_corners", align_corners),
        is_normalized=checks.boolean("normalize", normalize), transposed_filters=False,
    )  # fmt: skip
    return cells.with_factors(call, importances, neighbor_importances, is_transpose, sizes)


@operator(
    vjp=cells.gradients,
    diff=_DIFFERENTIABLE,
    result=cells.result,
    forward=cells.forward,
    transposes=("features", "filters", "importances"),
)
def continuous_conv(points: Array[Computed], queries: Array[Computed] | None, neighbors: Neighbors,
                    features: Array[Computed], filters: Array[Computed], extents: Array[Computed] | float, *,
                    coordinate_mapping: str = "ball_to_cube_radial", interpolation: str = "linear",
                    align_corners: bool = True, normalize: bool = False, offset: AnyArray | None = None,
                    importances: Array[Computed] | None = None, neighbor_importances: Array[Computed] | None = None
                    ) -> Call[Computed]:  # fmt: skip
    """Continuous convolution (ContinuousConv): a filter of cells, interpolated at the positions of the neighbours.

    ``out[q] = 1/ψ_q Σ_i a_qi m_i f_i g(Λ((x_i - x_q) / e_q))`` over the neighbours i of q (Ummenhofer and Koltun 2020,
    eq. 2). g interpolates the filter, a regular grid of matrices (Cin, Cout); Λ maps the neighbourhood to that grid.
    Differentiable in all its arrays but `offset`; see `kpcore.autodiff`.

    Parameters
    ----------
    points : (N, 3) float32 or float64
    queries : (M, 3), same dtype, or None
        Positions of the output. None: the points themselves.
    neighbors : Neighbors
        M rows, N points: usually those within half the extent.
    features : (N, Cin) float32 or float64
    filters : (depth, height, width, Cin, Cout), dtype of the features
        Cells along z, y and x: the last of the three belongs to x. Any sizes, even or odd, equal or not.
    extents : float, or array of the dtype of the points
        Size e of the filter: a diameter above zero, in the unit of the points. A number or (1,) for all queries, (M,)
        one for each query, (1, 3) or (M, 3) one for each axis. Values of an array are not checked: for those that are
        not above zero the result has no meaning.
    coordinate_mapping : {"ball_to_cube_radial", "ball_to_cube_volume_preserving", "identity"}
        Λ: the ball of diameter e is stretched to the cube of the filter along rays, or without changing ratios of
        volumes (Griepentrog et al. 2008; its axis is z); or the filter is a box of size e.
    interpolation : {"linear", "linear_border", "nearest_neighbor"}
        Trilinear between the eight cells around a position: with "linear" coordinates are clamped to those of the outer
        cells, with "linear_border" the filter is zero beyond the outer cells. Or the nearest cell; halves are rounded
        up.
    align_corners : bool
        Whether the border of the filter's shape is at the centres of the outer cells, or at their outer faces.
    normalize : bool
        Whether ψ_q is the sum of the `neighbor_importances` of q, by default its number of neighbours, or 1. Where that
        sum is 0, ψ_q is 1.
    offset : (3,), dtype of the points, optional
        Added to the coordinates (x, y, z) in the filter, in cells. Ignored with `align_corners`, as in Open3D.
    importances : (N,), dtype of the features, optional
        Factors m of the points.
    neighbor_importances : (E,), dtype of the features, optional
        Factors a of the pairs, in the order of ``neighbors.index`` and as long: for instance a window function of the
        distance.

    Returns
    -------
    (M, Cout), dtype of the features
        Zero where a query has no neighbours.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree. NaN is not an error: it affects only the queries that have it among
        their neighbours.

    Notes
    -----
    As Open3D's operators of the same names (0.20), with gradients that these do not have, in float64 too, and with any
    number of threads the same bits. It is a correlation: the filter is not flipped, and positions are those of the
    points relative to the query. Memory beyond the output, a packed copy of the filters (with channels padded to a
    vector of 16), and one number for each query (`normalize`) is at most 4 MiB per thread, 8 MiB for gradients, or 12
    times that of the filters for one output channel if that is more. The gradients of features and filters keep the
    transpose of `neighbors`, made once per list; with `neighbor_importances` the pairs are transposed in each call.

    Where the mapping or the interpolation has a kink, the derivative is one-sided: between cells that of the upper
    cell, and 0 where coordinates are clamped. It is 0 with "nearest_neighbor", and at the query itself unless the
    mapping is the identity.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.random.default_rng(0).random((1000, 3), np.float32)
    >>> nb = kp.radius_search(points, None, 0.1, return_distances=True)
    >>> features, filters = np.ones((1000, 4), np.float32), np.ones((4, 4, 4, 4, 8), np.float32)
    >>> kp.continuous_conv(points, None, nb, features, filters, 0.2).shape
    (1000, 8)

    With the window function (1 - (d / r)²)³ of fluid simulation:

    >>> window = (1 - (nb.distance / 0.1) ** 2) ** 3
    >>> kp.continuous_conv(points, None, nb, features, filters, 0.2, neighbor_importances=window).shape
    (1000, 8)
    """
    return _checked_call(
        False,
        points,
        queries,
        neighbors,
        features,
        filters,
        extents,
        coordinate_mapping,
        interpolation,
        align_corners,
        normalize,
        offset,
        importances,
        neighbor_importances,
    )


@operator(
    vjp=cells.gradients,
    diff=_DIFFERENTIABLE,
    result=cells.result,
    forward=cells.forward,
    transposes=_DIFFERENTIABLE,
)
def continuous_conv_transpose(points: Array[Computed], queries: Array[Computed] | None, neighbors: Neighbors,
                              features: Array[Computed], filters: Array[Computed], extents: Array[Computed] | float, *,
                              coordinate_mapping: str = "ball_to_cube_radial", interpolation: str = "linear",
                              align_corners: bool = True, normalize: bool = False, offset: AnyArray | None = None,
                              importances: Array[Computed] | None = None,
                              neighbor_importances: Array[Computed] | None = None) -> Call[Computed]:  # fmt: skip
    """The transpose of `continuous_conv`: every point spreads its features to the queries around it.

    ``out[q] = m_q Σ_i a_qi/ψ_i f_i g(Λ((x_q - x_i) / e_i))`` over the neighbours i of q: positions are those of the
    query relative to the point, in the extent of the point. With filters whose last two axes are exchanged, and without
    `normalize`, it is the adjoint of `continuous_conv` from the queries to the points over the transposed list.
    Differentiable in all its arrays but `offset`.

    Parameters
    ----------
    points, queries, neighbors, features, filters, coordinate_mapping, interpolation, align_corners, offset
        As in `continuous_conv`. The neighbours i of query q are usually those with ``|x_q - x_i| <= e_i / 2``.
    extents : float, or array of the dtype of the points
        As in `continuous_conv`, but of the points: (N,) or (N, 3) for each.
    normalize : bool
        Whether ψ_i is the sum of the `neighbor_importances` of point i over all queries, by default their number, or 1.
        Where that sum is 0, ψ_i is 1.
    importances : (M,), dtype of the features, optional
        Factors m of the queries.
    neighbor_importances : (E,), dtype of the features, optional
        Factors a of the pairs, in the order of ``neighbors.index``.

    Returns
    -------
    (M, Cout), dtype of the features

    Raises
    ------
    ValueError, TypeError
        As `continuous_conv`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> coarse, fine = np.random.default_rng(0).random((2, 500, 3), np.float32)
    >>> nb = kp.radius_search(coarse, fine, 0.1)
    >>> features, filters = np.ones((500, 4), np.float32), np.ones((3, 3, 3, 4, 8), np.float32)
    >>> kp.continuous_conv_transpose(coarse, fine, nb, features, filters, 0.2).shape
    (500, 8)
    """
    return _checked_call(
        True,
        points,
        queries,
        neighbors,
        features,
        filters,
        extents,
        coordinate_mapping,
        interpolation,
        align_corners,
        normalize,
        offset,
        importances,
        neighbor_importances,
    )

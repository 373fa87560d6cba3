"""Kernel point convolution (KPConv)."""

from __future__ import annotations

from kpcore import _array, _cpu, config
from kpcore._array import Array
from kpcore.autodiff import Op
from kpcore.neighbors import Neighbors

_INFLUENCES = ("linear", "gaussian", "constant")
_AGGREGATIONS = ("sum", "closest")
_NORMALIZATIONS = (None, "count", "positive")


def kpconv(points: Array, queries: Array | None, neighbors: Neighbors, features: Array, weights: Array,
           kernel_points: Array, extent: float, *, influence: str = "linear", aggregation: str = "sum",
           normalization: str | None = None) -> Array:  # fmt: skip
    """Rigid kernel point convolution.

    ``out[q] = Σ_k (Σ_i h(|x_i - q - p_k|) f_i) W_k`` over the neighbours i of q and the kernel points p_k
    (Thomas et al. 2019, eq. 1 to 4), without ever forming an array over neighbours and kernel points.
    Differentiable in `features` and `weights`; see `kpcore.autodiff`.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        Where the output lives. None: the points themselves.
    neighbors : Neighbors
        M rows, N points.
    features : (N, Cin) float32 or float64
    weights : (K, Cin, Cout), dtype of the features
    kernel_points : (K, D), dtype of the points
    extent : float
        Distance at which the linear influence reaches zero (σ in the paper), in the unit of the points.
    influence : {"linear", "gaussian", "constant"}
        h(d) = max(0, 1 - d / extent); exp(-d² / (2 (0.3 extent)²)), which has no end; or 1.
    aggregation : {"sum", "closest"}
        Whether a neighbour acts on all kernel points or on its nearest (the first of equals).
    normalization : {None, "count", "positive"}
        Divide a query's output by its number of neighbours, or by that of neighbours whose features sum to more than
        zero (as in Predator and GeoTransformer); at least by 1.

    Returns
    -------
    (M, Cout), dtype of the features
        Zero where a query has no neighbours.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree. NaN is not looked for: it reaches the queries that see it.

    Notes
    -----
    Memory beyond the output and a packed copy of the weights is at most 4 MiB per thread (and 4 bytes a query and one
    a point with a normalisation). The backward pass also keeps the transpose of `neighbors`, made once per list.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.random.default_rng(0).random((1000, 3), np.float32)
    >>> nb = kp.radius_search(points, None, 0.2)
    >>> weights = np.ones((15, 4, 8), np.float32)
    >>> kp.kpconv(points, None, nb, np.ones((1000, 4), np.float32), weights, kp.kernel_points(15, 0.13), 0.1).shape
    (1000, 8)
    """
    return OP(points=points, queries=queries, neighbors=neighbors, features=features, weights=weights,
              kernel_points=kernel_points, extent=extent, influence=influence, aggregation=aggregation,
              normalization=normalization)  # fmt: skip


def _checked(points, queries, neighbors, features, weights, kernel_points, extent, influence, aggregation,
             normalization):  # fmt: skip
    sizes = {}
    dimensions = range(1, 17)
    points = _array.points_array("points", points, sizes, dimensions=dimensions)
    if queries is None:
        queries = points
        sizes["M"] = (len(points), "points")
    else:
        queries = _array.points_array("queries", queries, sizes, dimensions=dimensions, like=("points", points))
    if not isinstance(neighbors, Neighbors):
        raise TypeError(f"neighbors: expected kpcore.Neighbors, got {type(neighbors).__name__}")
    expected, got = (len(queries), len(points)), (neighbors.num_queries, neighbors.num_points)
    if expected != got:
        raise ValueError(
            f"neighbors: expected {expected[0]} queries and {expected[1]} points to match queries and points, "
            f"got {got[0]} and {got[1]}"
        )
    features = _array.array("features", features, "N Cin", _array.REAL, sizes)
    weights = _array.array("weights", weights, "K Cin Cout", _array.REAL, sizes, like=("features", features))
    kernel_points = _array.array("kernel_points", kernel_points, "K D", _array.REAL, sizes, like=("points", points))
    if 0 in weights.shape:
        raise ValueError(f"weights: expected K, Cin and Cout of at least 1, got {weights.shape}")
    extent = _array.length("extent", extent, points.dtype)
    geometry = (points, queries, neighbors.index, neighbors.row_splits)
    settings = (
        kernel_points,
        extent,
        _array.choice("influence", influence, _INFLUENCES),
        _array.choice("aggregation", aggregation, _AGGREGATIONS),
        _array.choice("normalization", normalization, _NORMALIZATIONS),
    )
    return geometry, features, weights, settings


def _forward(**arguments):
    geometry, features, weights, settings = _checked(**arguments)
    return _cpu.kpconv(*geometry, features, weights, *settings, config.get_num_threads()), ()


def _vjp(arguments, saved, grad, needs):
    geometry, features, weights, settings = _checked(**arguments)
    threads = config.get_num_threads()
    grads = {}
    if "features" in needs:
        transposed = arguments["neighbors"].transpose()
        grads["features"] = _cpu.kpconv_grad_features(
            *geometry, transposed.index, transposed.row_splits, features, weights, *settings, grad, threads
        )
    if "weights" in needs:
        grads["weights"] = _cpu.kpconv_grad_weights(*geometry, features, weights, *settings, grad, threads)
    return grads


def _result(points, queries, features, weights, **_):
    return [(((points if queries is None else queries).shape[0], weights.shape[-1]), features.dtype)]


OP = Op("kpconv", _forward, _vjp, diff=("features", "weights"), result=_result, transposes=("features",))

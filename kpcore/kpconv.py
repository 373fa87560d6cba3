"""Kernel point convolution (KPConv): rigid, deformable, modulated, grouped, depthwise; with resampled weights; with
attention (KPConvX)."""

from __future__ import annotations

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.neighbors import Neighbors, checked_geometry
from kpcore.ops import OPS, Call, empty_like

__all__ = ["kpconv", "kpconvx"]

# In the order of the C++ enums Influence, Aggregation and Normalization: kernels get their numbers.
INFLUENCES = ("linear", "gaussian", "constant")
AGGREGATIONS = ("sum", "closest")
NORMALIZATIONS = (None, "count", "positive")
# Arguments whose gradients one kernel computes in one pass over all pairs; features have another, over the transpose.
_GRADIENTS_BY_QUERY = (
    "weights", "points", "queries", "kernel_points", "offsets", "modulations", "kernel_offsets"
)  # fmt: skip


def _result(call):
    queries = call.points if call.queries is None else call.queries
    return [((queries.shape[0], call.weights.shape[-1]), call.features.dtype)]


def _gradients(call, saved, grad, needs):
    """Gradients of the arguments in `needs`; with queries=None that of the points includes that of the queries."""
    adds_queries = "points" in needs and call.queries_are_points
    computed = needs | {"queries"} if adds_queries else needs
    backend, grads = devices.backend(grad), empty_like(call, ("features", *_GRADIENTS_BY_QUERY), computed)
    if "features" in needs:
        transposed = call.neighbors.transpose()
        backend.run("kpconv_grad_features", call, grad_out=grad, grad_features=grads["grad_features"],
                    transposed_index=transposed.stored_index,
                    transposed_row_splits=transposed.stored_row_splits)  # fmt: skip
    if by_query := {name: array for name, array in grads.items() if name != "grad_features"}:
        backend.run("kpconv_grads", call, grad_out=grad, **by_query)
    if adds_queries:
        grads["grad_points"] += grads["grad_queries"]
    return {name: grads[f"grad_{name}"] for name in needs}


@operator(
    vjp=_gradients,
    diff=("features", "weights", "offsets", "modulations", "points", "queries", "kernel_points", "kernel_offsets"),
    result=_result,
    transposes=("features",),
)
def kpconv(points: Array[Computed], queries: Array[Computed] | None, neighbors: Neighbors,
           features: Array[Computed], weights: Array[Computed], kernel_points: Array[Computed], extent: float, *,
           influence: str = "linear", aggregation: str = "sum", normalization: str | None = None, groups: int = 1,
           offsets: Array[Computed] | None = None, modulations: Array[Computed] | None = None,
           kernel_offsets: Array[Computed] | None = None, kernel_extent: float | None = None
           ) -> Call[Computed]:  # fmt: skip
    """Kernel point convolution (KPConv): rigid, deformable, modulated; strided; dense, grouped, depthwise.

    ``out[q] = Σ_k m_qk (Σ_i h(|x_i - q - p_k - o_qk|) f_i) W_k`` over the neighbours i of q and the kernel points p_k
    (Thomas et al. 2019, eq. 1 to 7), without ever forming an array over neighbours and kernel points. Without `offsets`
    and `modulations` the kernel is rigid: o = 0, m = 1.

    With `kernel_offsets` Δ, the weights are resampled around the kernel points for each query, as deformable kernels of
    images are (Gao et al. 2020): in the place of W_k, each query has
    ``w_k(q) = Σ_j max(0, 1 - |p_k + Δ_qk - p_j| / kernel_extent) W_j``, with j over the same kernel points. Offsets
    change on which neighbours a kernel point acts, kernel offsets only the weights by which it acts. The two can be
    combined.

    Differentiable in all its arrays; see `kpcore.autodiff`.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        Positions of the output. None: the points themselves.
    neighbors : Neighbors
        M rows, N points.
    features : (N, Cin) float32 or float64
    weights : (K, Cin / groups, Cout) or (K, C), dtype of the features
        (K, C): depthwise, with one weight for each kernel point and channel.
    kernel_points : (K, D), dtype of the points
    extent : float
        Distance at which the linear influence reaches zero (σ in the paper), in the unit of the points.
    influence : {"linear", "gaussian", "constant"}
        h(d) = max(0, 1 - d / extent); exp(-d² / (2 (0.3 extent)²)), which is above zero at any distance; or 1.
    aggregation : {"sum", "closest"}
        Whether a neighbour contributes to all kernel points or only to the nearest one (the first of equally near
        ones).
    normalization : {None, "count", "positive"}
        Divide the output of a query by its number of neighbours ("count"), or by the number of its neighbours whose
        features sum to more than zero ("positive", as in Predator and GeoTransformer); never by less than 1.
    groups : int
        Number of equal parts into which input and output channels are divided; part i of the output is computed from
        part i of the input only.
    offsets : (M, K, D), dtype of the points, optional
        Added to the kernel points of each query, in the unit of the points (the published layer multiplies the output
        of its offset convolution by `extent`). With offsets a neighbour contributes only if it is closer than `extent`
        to at least one deformed kernel point, for every influence, as in the published code.
    modulations : (M, K), dtype of the features, optional
        Factors of the kernel points of each query: m in the formula.
    kernel_offsets : (M, K, D), dtype of the points, optional
        Δ in the formula, in the unit of the points.
    kernel_extent : float, with `kernel_offsets` only
        Distance, in the unit of the points, from which on a kernel point has no share in the weights of another. Up to
        the least distance between two kernel points, kernel offsets of zero change nothing.

    Returns
    -------
    (M, Cout), dtype of the features
        Zero where a query has no neighbours.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree. NaN is not an error: NaN features affect only the queries that have
        them among their neighbours, and a kernel point with a NaN offset or kernel offset acts on none.

    Notes
    -----
    Memory beyond the output and a packed copy of the weights is at most 4 MiB per thread, 8 MiB for gradients of
    positions, offsets and modulations (and, with a normalisation, 4 bytes per query and one per point). Resampled
    weights are never formed, nor is an array over queries and pairs of kernel points. The backward pass also keeps the
    transpose of `neighbors`, made once per list, and while it runs the deformed kernel points.

    The choice of the nearest kernel point and of the neighbours in range has no gradient. The gradient of a distance is
    0 where the distance is 0. So kernel offsets of zero have a gradient only if `kernel_extent` is above the least
    distance between two kernel points.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.random.default_rng(0).random((1000, 3), np.float32)
    >>> nb = kp.radius_search(points, None, 0.2)
    >>> features, kernel_points = np.ones((1000, 4), np.float32), kp.kernel_points(15, 0.13)
    >>> kp.kpconv(points, None, nb, features, np.ones((15, 4, 8), np.float32), kernel_points, 0.1).shape
    (1000, 8)

    A deformable convolution, with offsets computed by a rigid one:

    >>> to_offsets = np.zeros((15, 4, 45), np.float32)
    >>> offsets = 0.1 * kp.kpconv(points, None, nb, features, to_offsets, kernel_points, 0.1).reshape(-1, 15, 3)
    >>> kp.kpconv(points, None, nb, features, np.ones((15, 4), np.float32), kernel_points, 0.1, offsets=offsets).shape
    (1000, 4)

    Kernel offsets from each kernel point to another one exchange their weights:

    >>> weights, order = np.random.default_rng(1).random((15, 4, 8), np.float32), np.arange(15)[::-1]
    >>> kernel_offsets = np.tile(kernel_points[order] - kernel_points, (1000, 1, 1))
    >>> out = kp.kpconv(points, None, nb, features, weights, kernel_points, 0.1, kernel_offsets=kernel_offsets,
    ...                 kernel_extent=0.1)
    >>> np.allclose(out, kp.kpconv(points, None, nb, features, weights[order], kernel_points, 0.1), rtol=1e-4)
    True
    """
    sizes, queries_are_points = {}, queries is None
    points, queries = checked_geometry(points, queries, neighbors, sizes)
    groups = checks.integer("groups", groups, 1)
    features = checks.array("features", features, "N Cin", checks.FEATURES, sizes)
    depthwise = devices.is_array(weights) and weights.ndim == 2
    shape = "K Cin" if depthwise else "K Cin Cout" if groups == 1 else "K Cin/groups Cout"
    if groups > 1:
        if depthwise:
            raise ValueError(f"groups: expected 1 for weights (K, C), got {groups}")
        if features.shape[1] % groups:
            raise ValueError(f"groups: expected a divisor of {features.shape[1]} channels of features, got {groups}")
        sizes["Cin/groups"] = (features.shape[1] // groups, "features")
    weights = checks.array("weights", weights, shape, checks.FEATURES, sizes, like=("features", features))
    if 0 in weights.shape:
        raise ValueError(f"weights: expected K, Cin and Cout of at least 1, got {weights.shape}")
    if weights.shape[-1] % groups:
        raise ValueError(f"groups: expected a divisor of {weights.shape[-1]} channels of weights, got {groups}")
    kernel_points = checks.array("kernel_points", kernel_points, "K D", checks.REAL, sizes, like=("points", points))
    if offsets is not None:
        offsets = checks.array("offsets", offsets, "M K D", checks.REAL, sizes, like=("points", points))
    if modulations is not None:
        modulations = checks.array(
            "modulations", modulations, "M K", checks.FEATURES, sizes, like=("features", features)
        )
    if (kernel_offsets is None) != (kernel_extent is None):
        missing = "kernel_offsets" if kernel_offsets is None else "kernel_extent"
        raise ValueError(f"{missing}: expected both kernel_offsets and kernel_extent or neither, got None")
    if kernel_offsets is not None:
        kernel_offsets = checks.array(
            "kernel_offsets", kernel_offsets, "M K D", checks.REAL, sizes, like=("points", points)
        )
        kernel_extent = checks.length("kernel_extent", kernel_extent, points.dtype)
    return Call(
        points=points, queries=queries, queries_are_points=queries_are_points, neighbors=neighbors,
        index=neighbors.stored_index, row_splits=neighbors.stored_row_splits, features=features, weights=weights,
        kernel_points=kernel_points,
        offsets=offsets, modulations=modulations, kernel_offsets=kernel_offsets, kernel_extent=kernel_extent or 0.0,
        extent=checks.length("extent", extent, points.dtype),
        influence=checks.choice("influence", influence, INFLUENCES),
        aggregation=checks.choice("aggregation", aggregation, AGGREGATIONS),
        normalization=checks.choice("normalization", normalization, NORMALIZATIONS), groups=groups, factors=1,
        depthwise=depthwise,
    )  # fmt: skip


def _gradients_x(call, saved, grad, needs):
    names = {name: "modulations" if name == "attention" else name for name in needs}
    grads = _gradients(call, saved, grad, frozenset(names.values()))
    return {name: grads[field] for name, field in names.items()}


@operator(
    vjp=_gradients_x,
    diff=("features", "weights", "attention"),
    result=_result,
    kernel="kpconv",
    transposes=("features",),
)
def kpconvx(points: AnyArray, queries: AnyArray | None, neighbors: Neighbors, features: Array[Computed],
            weights: Array[Computed], attention: Array[Computed], kernel_points: AnyArray, extent: float, *,
            influence: str = "linear") -> Call[Computed]:  # fmt: skip
    """KPConvX and KPConvD: depthwise kernel point convolution with attention over the kernel points.

    ``out[q, c] = Σ_i h(|x_i - q - p_k|) W[k, c] a[q, k, c A // C] f_i[c]`` over the neighbours i of q, where k is the
    kernel point nearest to i (KPConvX, Thomas et al. 2024; with no attention, KPConvD: ``kpconv`` with weights (K, C)
    and ``aggregation="closest"``). Differentiable in `features`, `weights` and `attention`.

    Parameters
    ----------
    points, queries, neighbors, features, kernel_points
        As in `kpconv`.
    weights : (K, C), dtype of the features
    attention : (M, K, A), dtype of the features
        One factor for each query, kernel point and group of C / A channels.
    extent : float
        As in `kpconv`; the published networks use the search radius.
    influence : {"linear", "gaussian", "constant"}

    Returns
    -------
    (M, C), dtype of the features

    Raises
    ------
    ValueError, TypeError
        As `kpconv`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.random.default_rng(0).random((100, 3), np.float32)
    >>> nb = kp.knn_search(points, None, 12)
    >>> kernel_points = kp.kernel_points([1, 14], 0.3, method="shells")
    >>> attention = np.full((100, 15, 4), 0.5, np.float32)
    >>> weights, features = np.ones((15, 8), np.float32), np.ones((100, 8), np.float32)
    >>> kp.kpconvx(points, None, nb, features, weights, attention, kernel_points, 0.4).shape
    (100, 8)
    """
    if devices.is_array(weights) and weights.ndim != 2:
        raise ValueError(f"weights: expected (K, C), got {weights.shape}")
    call = OPS["kpconv"].check(
        points, queries, neighbors, features, weights, kernel_points, extent, influence=influence, aggregation="closest"
    )
    sizes = {"M": (len(call.queries), "queries"), "K": (len(call.weights), "weights")}
    sizes |= checks.device_of(("points", call.points))
    like = ("features", call.features)
    attention = checks.array("attention", attention, "M K A", checks.FEATURES, sizes, like=like)
    channels, factors = call.features.shape[1], attention.shape[2]
    if factors == 0 or channels % factors:
        raise ValueError(
            f"attention: expected (M, K, A) with A a divisor of {channels} channels of features, got {attention.shape}"
        )
    call.attention = call.modulations = attention  # the kernel's modulations: here one for each kernel point and factor
    call.factors = factors
    return call

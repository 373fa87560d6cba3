"""Pooling and upsampling: features reduced over neighbours or batch items, gathered by index, and interpolated."""

from __future__ import annotations

import numpy as np

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.neighbors import Neighbors, point_sizes, splits_from_counts, transposed
from kpcore.ops import OPS, Call
from kpcore.search import knn_search

__all__ = ["gather", "interpolate", "nearest_upsample", "neighbor_reduce", "segment_reduce"]

_REDUCES = ("mean", "sum", "max", "min")


def _checked_features(features, neighbors):
    """The features, checked to have a row for each point of `neighbors`."""
    return checks.array("features", features, "N C", checks.FEATURES, point_sizes(neighbors))


def _check_num_rows(name, value):
    if len(value) > checks.MAX_POINTS:
        raise ValueError(f"{name}: expected at most {checks.MAX_POINTS} rows, got {len(value)}")
    return value


def _weighted_sum(features, index, row_splits, weights=None, forward_row_splits=None):
    """Sums over neighbours by the kernel neighbor_reduce; src/cpu/kernels.h describes its fields."""
    out = devices.namespace(features).empty((len(row_splits) - 1, features.shape[1]), features.dtype)
    devices.backend(features).run("neighbor_reduce", features=features, index=index, row_splits=row_splits,
                                  weights=weights, forward_row_splits=forward_row_splits,
                                  reduction=_REDUCES.index("sum"), empty=0.0, pad_value=0.0, width=0,
                                  out=out)  # fmt: skip
    return out


# ---- neighbor_reduce


def _neighbor_reduce_result(call):
    shape = (call.neighbors.num_queries, call.features.shape[1])
    choice = [(shape, np.dtype(np.int32))] if call.reduce in ("max", "min") else []
    return [(shape, call.features.dtype), *choice]


def _neighbor_reduce_vjp(call, saved, grad, needs):
    if saved:
        return {"features": _unpool(*saved, grad, call.features)}
    neighbors, index, splits, grads = call.neighbors, call.index, call.row_splits, {}
    if "features" in needs:
        if call.weights is None:
            stored = neighbors.transpose()
            transpose = stored.stored_index, stored.stored_row_splits, None
        else:
            transpose = transposed(index, splits, call.weights, neighbors.num_points)
        grads["features"] = _weighted_sum(grad, *transpose, splits if call.reduce == "mean" else None)
    if "weights" in needs:
        # Zeros, since weights beyond row_splits[-1] belong to no pair and the kernel does not write their gradients.
        grads["weights"] = devices.namespace(grad).zeros(call.weights.shape, grad.dtype)
        devices.backend(grad).run("neighbor_reduce_grad_weights", call, grad_out=grad, grad_weights=grads["weights"])
    return grads


def _unpool(choice, grad, features):
    """The gradient of a maximum or minimum: each value of `grad` goes to the row of features that `choice` names."""
    grads = devices.namespace(grad).empty(features.shape, grad.dtype)
    devices.backend(grad).run("unpool", choice=choice, grad_out=grad, grad_features=grads)
    return grads


@operator(
    vjp=_neighbor_reduce_vjp,
    diff=("features", "weights"),
    result=_neighbor_reduce_result,
    outputs=("out", "choice"),
    transposes=("features",),
)
def neighbor_reduce(features: Array[Computed], neighbors: Neighbors, reduce: str = "mean", *,
                    weights: Array[Computed] | None = None, empty: float = 0.0, pad_value: float | None = None
                    ) -> Call[Computed]:  # fmt: skip
    """The mean, sum, maximum or minimum of the features of each query's neighbours, weighted or not.

    With the n neighbours i of query q and weights w_qi (by default ones)::

        "mean"  out[q] = (Σ_i w_qi f_i) / n            "max"  out[q] = max_i f_i, channel by channel
        "sum"   out[q] = Σ_i w_qi f_i                  "min"  out[q] = min_i f_i

    A mean is divided by the number of neighbours, whatever the weights. For a weighted average, make the weights of
    each row sum to one and take the sum. Differentiable in `features` and `weights`; see `kpcore.autodiff`.

    Parameters
    ----------
    features : (N, C) float32 or float64
    neighbors : Neighbors
        M rows, N points.
    reduce : {"mean", "sum", "max", "min"}
    weights : (E,), dtype of the features, optional
        One for each pair, in the order of ``neighbors.index`` and as long; for a mean or sum only.
    empty : float
        The result of a query without neighbours.
    pad_value : float, optional
        For a maximum or minimum over a list made from a padded matrix: a value that takes part, in every channel, in
        each row shorter than ``neighbors.width``, including rows without neighbours. 0 gives the max-pooling of
        KPConv-PyTorch, which gathers a row of zeros where there is no neighbour, so that negative maxima of short rows
        become 0. Without it only the neighbours take part.

    Returns
    -------
    (M, C), dtype of the features

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree; for weights with a maximum or minimum; for a `pad_value` with a mean or
        sum, or with a list without a width.

    Notes
    -----
    A maximum or minimum is NaN if the feature of a neighbour is NaN. Its gradient goes to the first neighbour in the
    row that has this value (the first NaN if there is one), and to no neighbour where the value is `pad_value` or
    `empty`. Gradients are the same bits with any number of threads. The gradient of the features of a mean or sum keeps
    the transpose of `neighbors`, made once per list; with weights, the weights are transposed in each call.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 1, 1], np.int32), kp.row_splits([2, 0, 1]), num_points=2)
    >>> features = np.array([[1.0, -8.0], [3.0, -4.0]])
    >>> kp.neighbor_reduce(features, nb)
    array([[ 2., -6.],
           [ 0.,  0.],
           [ 3., -4.]])
    >>> kp.neighbor_reduce(features, nb, "sum", weights=np.array([0.25, 0.75, 1.0]))
    array([[ 2.5, -5. ],
           [ 0. ,  0. ],
           [ 3. , -4. ]])
    >>> padded = kp.Neighbors.from_padded(nb.to_padded(), num_points=2)
    >>> kp.neighbor_reduce(features, padded, "max", pad_value=0.0)
    array([[ 3., -4.],
           [ 0.,  0.],
           [ 3.,  0.]])
    """
    features = _checked_features(features, neighbors)
    reduction = checks.choice("reduce", reduce, _REDUCES)
    chooses = reduce in ("max", "min")
    if weights is not None:
        if chooses:
            raise ValueError(f"weights: expected None with reduce={reduce!r}, got {type(weights).__name__}")
        pairs = point_sizes(neighbors) | {"E": (len(neighbors.stored_index), "neighbors")}
        weights = checks.array("weights", weights, "E", checks.FEATURES, pairs, like=("features", features))
    empty, width = checks.number("empty", empty, features.dtype), 0
    if pad_value is None:
        pad_value = 0.0
    elif not chooses:
        raise ValueError(f"pad_value: expected None with reduce={reduce!r}, got {pad_value}")
    elif neighbors.width is None:
        raise ValueError(
            "pad_value: expected None for neighbors without a width, which Neighbors.from_padded and with_width set, "
            f"got {pad_value}"
        )
    else:
        pad_value, width = checks.number("pad_value", pad_value, features.dtype), neighbors.width
    return Call(
        features=features, neighbors=neighbors, index=neighbors.stored_index, row_splits=neighbors.stored_row_splits,
        weights=weights, reduce=reduce, reduction=reduction, empty=empty, pad_value=pad_value, width=width,
    )  # fmt: skip


# ---- nearest_upsample


def _nearest_upsample_result(call):
    return [((call.neighbors.num_queries, call.features.shape[1]), call.features.dtype)]


def _nearest_upsample_vjp(call, saved, grad, needs):
    neighbors, num_points = call.neighbors, call.neighbors.num_points
    counts, begins = neighbors.counts, call.row_splits[:-1]
    if isinstance(grad, np.ndarray):
        if np.all(counts == 1):
            transpose = neighbors.transpose()
            return {"features": _weighted_sum(grad, transpose.stored_index, transpose.stored_row_splits)}
        first, splits = call.index[begins[counts > 0]], splits_from_counts(np.minimum(counts, 1))
    elif not len(call.index):
        return {"features": devices.namespace(grad).zeros(call.features.shape, grad.dtype)}
    else:  # on a GPU, without waiting for the number of queries with neighbours: the others get an index of num_points
        index = call.index[np.minimum(begins, len(call.index) - 1)]
        first = np.where(counts > 0, index, np.int32(num_points)).astype(np.int32)
        splits = devices.namespace(grad).arange(len(counts) + 1)
    index, splits, _ = transposed(first, splits, None, num_points)
    return {"features": _weighted_sum(grad, index, splits)}


@operator(
    vjp=_nearest_upsample_vjp,
    diff=("features",),
    result=_nearest_upsample_result,
    kernel="gather_rows",
    transposes=("features",),
)
def nearest_upsample(features: Array[Computed], neighbors: Neighbors) -> Call[Computed]:
    """The features of the first neighbour of each query; zeros where there is none.

    With lists of the nearest coarse point of each fine point (``upsamples`` of `build_pyramid`, or `knn_search` with
    k = 1) this upsamples features to the finer level, as in KP-FCNN. In a list that is not sorted by distance the first
    neighbour is not the nearest. Differentiable in `features`.

    Parameters
    ----------
    features : (N, C) float32 or float64
    neighbors : Neighbors
        M rows, N points.

    Returns
    -------
    (M, C), dtype of the features

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> coarse, fine = np.array([[0.0], [1.0]]), np.array([[0.2], [0.4], [0.9]])
    >>> kp.nearest_upsample(np.array([[10.0], [20.0]]), kp.knn_search(coarse, fine, 1)).ravel()
    array([10., 10., 20.])
    """
    features = _checked_features(features, neighbors)
    return Call(
        features=features, neighbors=neighbors, index=neighbors.stored_index, row_splits=neighbors.stored_row_splits
    )  # fmt: skip


# ---- gather


def _gather_result(call):
    return [((call.index.shape[0], call.features.shape[1]), call.features.dtype)]


def _gather_forward(call):
    try:
        return OPS["gather"].run(call)
    except devices.backend(call.features).OutOfRange:
        raise _index_error(call.features, call.index) from None


def _index_error(features, index):
    index = devices.on_host(index)
    low, high = int(index.min()), int(index.max())
    if low >= 0 and high < len(features):
        return checks.changed("index")
    bad = low if low < 0 else high
    return ValueError(f"index: expected values from 0 to {len(features) - 1} to match features, got {bad}")


def _gather_vjp(call, saved, grad, needs):
    features, index = call.features, call.index
    if isinstance(index, np.ndarray):  # the caller may have changed it since the forward pass checked it
        index = index.copy()
        if len(index) and not (index.min() >= 0 and index.max() < len(features)):
            raise _index_error(features, index)
    if not features.shape[1]:
        return {"features": devices.namespace(grad).empty(features.shape, grad.dtype)}
    one_pair_each = devices.namespace(index).arange(len(index) + 1)  # row_splits of queries with one neighbour each
    index, splits, _ = transposed(index.astype(np.int32, copy=False), one_pair_each, None, len(features))
    return {"features": _weighted_sum(grad, index, splits)}


@operator(
    vjp=_gather_vjp,
    diff=("features",),
    result=_gather_result,
    forward=_gather_forward,
    kernel="gather_rows",
    copies=("index",),
)
def gather(features: Array[Computed], index: AnyArray) -> Call[Computed]:
    """The rows of an index: ``features[index]``, with a gradient.

    With ``neighbors.index`` it gives the features of the neighbour of each pair, for computations per pair that no
    other function offers; `segment_reduce` reduces pairs to queries. Differentiable in `features`: the gradient of a
    row is the sum of the gradients of its copies, in their order.

    Parameters
    ----------
    features : (N, C) float32 or float64
    index : (M,) int32 or int64
        0 to N - 1. No value means "no row": -1 and N are errors too.

    Returns
    -------
    (M, C), dtype of the features

    Raises
    ------
    ValueError
        For an index outside the rows, or other shapes.
    TypeError
        For other dtypes.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> rows, pullback = kp.autodiff.vjp(lambda f: kp.gather(f, np.array([1, 1, 0])), np.array([[10.0], [20.0]]))
    >>> rows.ravel(), pullback(np.array([[1.0], [2.0], [4.0]]))[0].ravel()
    (array([20., 20., 10.]), array([4., 3.]))
    """
    sizes = {}
    features = _check_num_rows("features", checks.array("features", features, "N C", checks.FEATURES, sizes))
    index = _check_num_rows("index", checks.array("index", index, "M", checks.INTEGERS, sizes))
    return Call(features=features, index=index)


# ---- interpolate


def _interpolate_forward(call):
    features, nearest = call.features, vars(call).pop("nearest")  # popped, so that the tape does not keep the list
    weights = devices.namespace(features).empty(len(nearest.stored_distance), features.dtype)
    devices.backend(features).run("inverse_distance_weights", distance=nearest.stored_distance,
                                  row_splits=nearest.stored_row_splits, power=call.power, weights=weights)  # fmt: skip
    out = _weighted_sum(features, nearest.stored_index, nearest.stored_row_splits, weights)
    return out, (nearest.stored_row_splits, nearest.stored_index, weights)


def _interpolate_vjp(call, saved, grad, needs):
    splits, index, weights = saved
    return {"features": _weighted_sum(grad, *transposed(index, splits, weights, call.features.shape[0]))}


@operator(vjp=_interpolate_vjp, diff=("features",), forward=_interpolate_forward, keeps=())
def interpolate(points: AnyArray, queries: AnyArray | None, features: Array[Computed], k: int = 3, power: float = 2, *,
                points_row_splits: AnyArray | None = None, queries_row_splits: AnyArray | None = None
                ) -> Call[Computed]:  # fmt: skip
    """Features at the queries from those of the k nearest points, weighted by inverse distance.

    ``out[q] = Σ_i w_qi f_i / Σ_i w_qi`` over the k nearest points i of q, with ``w_qi = 1 / |x_i - q|^power``: the
    feature propagation of PointNet++ (Qi et al. 2017, eq. 2). A query at exactly the place of one or more of these
    points gets the mean of their features, the limit of the formula. Differentiable in `features`.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        None: the points themselves.
    features : (N, C) float32 or float64
    k : int
        At least 1. A query of a batch item with fewer points uses all of them; with none, its features are zero.
    power : float
        Above zero.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
        Batch items of points and queries, both or neither; a query's neighbours are points of the same item. With
        ``queries=None`` only ``points_row_splits``.

    Returns
    -------
    (M, C), dtype of the features

    Raises
    ------
    ValueError
        For coordinates that are NaN or infinite, or too large or close together (as for `knn_search`), or shapes that
        do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    The points and their distances are those of `knn_search`. Weights are computed in float64, relative to the weight of
    the nearest point, so that no distance is too small or too large. The forward pass keeps the neighbour list and the
    weights for the gradient. To interpolate several features between the same points, call `knn_search` once, and
    `neighbor_reduce` with your weights for each.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points, queries = np.array([[0.0], [3.0], [9.0]]), np.array([[1.0], [3.0]])
    >>> kp.interpolate(points, queries, np.array([[10.0], [20.0], [70.0]]), k=2).ravel()
    array([12., 20.])
    """
    sizes = {}
    points = checks.points_array("points", points, sizes, dimensions=checks.DIMENSIONS)
    features = checks.array("features", features, "N C", checks.FEATURES, sizes)
    power = checks.length("power", power, np.dtype(np.float64))
    nearest = knn_search(points, queries, k, points_row_splits=points_row_splits,
                         queries_row_splits=queries_row_splits, return_distances=True)  # fmt: skip
    return Call(features=features, nearest=nearest, power=power)


# ---- segment_reduce


def _segment_reduce_result(call):
    row_splits = call.row_splits
    if row_splits is not None and len(row_splits.shape) != 1:
        # Checked here too, since a framework may drop a call whose result is empty before its arguments are checked.
        raise ValueError(f"row_splits: expected (B+1,), got {row_splits.shape}")
    shape = (1 if row_splits is None else row_splits.shape[0] - 1, call.features.shape[1])
    choice = [(shape, np.dtype(np.int32))] if call.reduce in ("max", "min") else []
    return [(shape, call.features.dtype), *choice]


def _segment_reduce_forward(call):
    return OPS["segment_reduce"].run(call, row_splits=checks.splits_of_call(call))


def _segment_reduce_vjp(call, saved, grad, needs):
    features = call.features
    row_splits = checks.splits_of_call(call, known=True)
    if saved:
        return {"features": _unpool(*saved, grad, features)}
    grads = devices.namespace(grad).empty(features.shape, grad.dtype)
    devices.backend(grad).run("segment_reduce_grad", row_splits=row_splits, reduction=call.reduction, empty=call.empty,
                              grad_out=grad, grad_features=grads)  # fmt: skip
    return {"features": grads}


@operator(
    vjp=_segment_reduce_vjp,
    diff=("features",),
    result=_segment_reduce_result,
    forward=_segment_reduce_forward,
    outputs=("out", "choice"),
    keeps=("row_splits",),
    copies=("row_splits",),
)
def segment_reduce(
    features: Array[Computed], row_splits: AnyArray | None, reduce: str = "mean", *, empty: float = 0.0
) -> Call[Computed]:
    """The mean, sum, maximum or minimum of the rows of each batch item: global pooling.

    ``out[b]`` reduces ``features[row_splits[b]:row_splits[b + 1]]``, channel by channel. Differentiable in `features`.

    Parameters
    ----------
    features : (N, C) float32 or float64
    row_splits : (B + 1,) int64, or None
        Bounds of batch items. None: all rows are one item.
    reduce : {"mean", "sum", "max", "min"}
    empty : float
        The result of an item without rows.

    Returns
    -------
    (B, C), dtype of the features

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree.

    Notes
    -----
    Sums are float64, over blocks of 1024 rows that are divided among the threads and then added in order: the mean of
    ten million float32 rows is right to its last digit, and the same bits with any number of threads. A maximum or
    minimum is NaN if a row is NaN; its gradient goes to the first row that has this value, or to the first NaN.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> features = np.array([[1.0, 5.0], [3.0, 3.0], [4.0, 0.0]])
    >>> kp.segment_reduce(features, kp.row_splits([2, 0, 1]), "max")
    array([[3., 5.],
           [0., 0.],
           [4., 0.]])
    """
    sizes = {}
    features = _check_num_rows("features", checks.array("features", features, "N C", checks.FEATURES, sizes))
    return Call(
        features=features, row_splits=checks.splits_shape("row_splits", row_splits, len(features), sizes),
        is_one_item=row_splits is None,
        reduce=reduce, reduction=checks.choice("reduce", reduce, _REDUCES),
        empty=checks.number("empty", empty, features.dtype),
    )  # fmt: skip

"""What networks need besides point operators: products, normalisation, activations, dropout, loss, on rows of features.

Every function is differentiable in its arrays of features, weights, scales, shifts and logits (`kpcore.autodiff`) and
uses all threads; no result depends on how many.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from kpcore import _array, config
from kpcore._array import Array
from kpcore.autodiff import Op

_ACTIVATIONS = ("leaky_relu", "relu", "sigmoid")
_REDUCTIONS = ("mean", "sum", "none")


# ---- linear


def linear(features: Array, weights: Array, bias: Array | None = None) -> Array:
    """``features @ weights + bias``: a 1 x 1 convolution, or a fully connected layer.

    Parameters
    ----------
    features : (N, Cin) float32 or float64
    weights : (Cin, Cout), dtype of the features
    bias : (Cout,), dtype of the features, optional

    Returns
    -------
    (N, Cout), dtype of the features
        The bias, or zeros, where Cin is 0.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.linear(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), np.array([0.5, 0.0, 0.0]))
    array([[1.5, 2. , 3. ]])
    """
    return LINEAR(features=features, weights=weights, bias=bias)


def _linear_arguments(features, weights, bias):
    sizes = {}
    features = _array.array("features", features, "N Cin", _array.FEATURES, sizes)
    weights = _array.array("weights", weights, "Cin Cout", _array.FEATURES, sizes, like=("features", features))
    if bias is not None:
        bias = _array.array("bias", bias, "Cout", _array.FEATURES, sizes, like=("features", features))
    return features, weights, bias


def _linear(**arguments):
    checked = _linear_arguments(**arguments)
    return _array.backend(checked[0]).linear(*checked, config.get_num_threads()), ()


def _linear_vjp(arguments, saved, grad, needs):
    features, weights, _ = _linear_arguments(**arguments)
    backend, threads, grads = _array.backend(grad), config.get_num_threads(), {}
    if "features" in needs:
        grads["features"] = backend.linear_grad_features(weights, grad, threads)
    if "weights" in needs:
        grads["weights"] = backend.linear_grad_weights(features, grad, threads)
    if "bias" in needs:
        grads["bias"] = backend.sum_rows(grad, threads)
    return grads


def _linear_result(features, weights, **_):
    return [((features.shape[0], weights.shape[1]), features.dtype)]


LINEAR = Op(
    "linear",
    _linear,
    _linear_vjp,
    diff=("features", "weights", "bias"),
    result=_linear_result,
    check=_linear_arguments,
)


# ---- normalisation


class BatchNormed(NamedTuple):
    """What `batch_norm` returns."""

    features: np.ndarray  #: (N, C) normalised
    running_mean: np.ndarray  #: (C,) for the next call
    running_var: np.ndarray  #: (C,)


def batch_norm(features: Array, scale: Array, shift: Array, running_mean: Array, running_var: Array, *,
               training: bool = True, momentum: float = 0.02, eps: float = 1e-5,
               negative_slope: float | None = None) -> BatchNormed:  # fmt: skip
    """Batch normalisation, and a leaky ReLU after it in the same pass over memory.

    ``(features - mean) / sqrt(var + eps) * scale + shift`` for each channel (Ioffe and Szegedy 2015), with the mean and
    the variance (over N) of the rows where `training`, else with the running ones. Nothing is written to: the new
    running statistics are in the result. Differentiable in `features`, `scale` and `shift`.

    Parameters
    ----------
    features : (N, C) float32 or float64
        At least two rows where `training`: of fewer there is no variance.
    scale, shift : (C,), dtype of the features
    running_mean, running_var : (C,), dtype of the features
    training : bool
    momentum : float, 0 to 1
        How far the running statistics go towards those of the rows: ``(1 - momentum) * running + momentum * batch``,
        where the batch's variance is the unbiased one, over N - 1.
    eps : float, above zero
    negative_slope : float, optional
        Multiplies what comes out negative, as `leaky_relu` does; 0 makes a ReLU.

    Returns
    -------
    BatchNormed
        Without `training`, the running statistics in it are copies.

    Raises
    ------
    ValueError
        For fewer than two rows where `training`, for a negative running variance where not (on the GPU its channel
        becomes NaN), or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Statistics are float64 sums about the first row: an offset far larger than the spread does no harm. A channel that
    is constant becomes its shift. Where statistics are those of the rows, the gradient goes through them.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> out = kp.batch_norm(x, np.ones(2), np.array([0.0, 7.0]), np.zeros(2), np.ones(2), momentum=0.5, eps=1e-12)
    >>> out.features.round(6)
    array([[-1.,  7.],
           [ 1.,  7.]])
    >>> out.running_mean, out.running_var
    (array([1., 5.]), array([1.5, 0.5]))
    """
    return BATCH_NORM(features=features, scale=scale, shift=shift, running_mean=running_mean, running_var=running_var,
                      training=training, momentum=momentum, eps=eps, negative_slope=negative_slope)  # fmt: skip


def _batch_norm_arguments(features, scale, shift, running_mean, running_var, training, momentum, eps, negative_slope):
    sizes = {}
    features = _array.array("features", features, "N C", _array.FEATURES, sizes)
    scale, shift, running_mean, running_var = (
        _array.array(name, value, "C", _array.FEATURES, sizes, like=("features", features))
        for name, value in (
            ("scale", scale),
            ("shift", shift),
            ("running_mean", running_mean),
            ("running_var", running_var),
        )
    )
    training = _array.boolean("training", training)
    momentum = _array.between("momentum", momentum, 0, 1)
    eps = _array.length("eps", eps, np.dtype(np.float64))
    if training and features.shape[0] < 2:
        raise ValueError(f"features: expected at least 2 rows where training, got {features.shape}")
    return features, scale, shift, running_mean, running_var, training, momentum, eps, _slope(negative_slope, features)


def _batch_norm(**arguments):
    features, scale, shift, running_mean, running_var, training, momentum, eps, slope = _batch_norm_arguments(
        **arguments
    )
    (n, channels), backend, threads = features.shape, _array.backend(features), config.get_num_threads()
    row_splits = _array.whole(n, _array.namespace(features))
    if training:
        mean, variance = backend.moments(features, row_splits, channels, threads)
        running_mean = _towards(running_mean, mean[0], momentum)
        running_var = _towards(running_var, n / (n - 1) * variance[0], momentum)
    else:
        # Not on the GPU, where to look is to wait for all that was asked for before: NaN in that channel there.
        if isinstance(running_var, np.ndarray) and (running_var < 0).any():
            at = int(np.argmax(running_var < 0))
            raise ValueError(f"running_var: expected no negative values, got {running_var[at]} in channel {at}")
        mean, variance = running_mean.astype(np.float64)[None], running_var.astype(np.float64)[None]
        running_mean, running_var = running_mean.copy(), running_var.copy()
    inverse_std = 1 / np.sqrt(variance + eps)
    out = backend.normalize(features, row_splits, scale, shift, mean, inverse_std, slope, threads)
    return BatchNormed(out, running_mean, running_var), _as_saved(mean, inverse_std)


def _towards(running, batch, momentum):
    with np.errstate(over="ignore"):  # infinite where the dtype ends
        return ((1 - momentum) * running.astype(np.float64) + momentum * batch).astype(running.dtype)


def _batch_norm_vjp(arguments, saved, grad, needs):
    features = _array.contiguous(arguments["features"])
    row_splits = _array.whole(len(features), _array.namespace(features))
    return _normalize_vjp(features, row_splits, not arguments["training"], arguments, saved, grad,
                          needs)  # fmt: skip


def _batch_norm_result(features, **_):
    channels = features.shape[1:]
    statistics = [(channels, features.dtype)] * 2
    return [(features.shape, features.dtype), *statistics, ((2, 1, 2 * channels[0]), np.dtype(np.int32))]


BATCH_NORM = Op(
    "batch_norm",
    _batch_norm,
    _batch_norm_vjp,
    diff=("features", "scale", "shift"),
    result=_batch_norm_result,
    check=_batch_norm_arguments,
    field="features",
    record=BatchNormed,
)


def group_norm(features: Array, num_groups: int, scale: Array, shift: Array, *, row_splits: Array | None = None,
               eps: float = 1e-5, negative_slope: float | None = None) -> Array:  # fmt: skip
    """Group normalisation, and a leaky ReLU after it in the same pass over memory.

    ``(features - mean) / sqrt(var + eps) * scale + shift`` (Wu and He 2018), where mean and variance are those of a
    batch item's rows and a group's channels together: with `row_splits` of each item, else of all rows, as in the
    published networks that normalise a whole pack of clouds. Differentiable in `features`, `scale` and `shift`.

    Parameters
    ----------
    features : (N, C) float32 or float64
    num_groups : int
        Divides C; group g has the channels from ``g * C / num_groups``.
    scale, shift : (C,), dtype of the features
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    eps : float, above zero
    negative_slope : float, optional
        Multiplies what comes out negative, as `leaky_relu` does; 0 makes a ReLU.

    Returns
    -------
    (N, C), dtype of the features
        The shift where all values of an item and group are equal.

    Raises
    ------
    ValueError
        For a number of groups that does not divide C, or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Statistics are float64 sums about an item's first row, as in `batch_norm`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x = np.array([[1.0, 3.0, 0.0, 4.0], [1.0, 3.0, 0.0, 4.0]])
    >>> kp.group_norm(x, 2, np.ones(4), np.zeros(4)).round(3)
    array([[-1.,  1., -1.,  1.],
           [-1.,  1., -1.,  1.]])
    """
    return GROUP_NORM(features=features, num_groups=num_groups, scale=scale, shift=shift, row_splits=row_splits,
                      eps=eps, negative_slope=negative_slope)  # fmt: skip


def _group_norm_arguments(features, num_groups, scale, shift, row_splits, eps, negative_slope, **splits):
    sizes = {}
    features = _array.array("features", features, "N C", _array.FEATURES, sizes)
    scale = _array.array("scale", scale, "C", _array.FEATURES, sizes, like=("features", features))
    shift = _array.array("shift", shift, "C", _array.FEATURES, sizes, like=("features", features))
    num_groups = _array.integer("num_groups", num_groups, 1)
    if num_groups > max(1, features.shape[1]) or features.shape[1] % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {features.shape[1]} channels, got {num_groups}")
    row_splits = _array.splits_array("row_splits", row_splits, len(features), "features", sizes, **splits)
    eps = _array.length("eps", eps, np.dtype(np.float64))
    return features, num_groups, scale, shift, row_splits, eps, _slope(negative_slope, features)


def _group_norm(**arguments):
    features, num_groups, scale, shift, row_splits, eps, slope = _group_norm_arguments(**arguments)
    threads, backend = config.get_num_threads(), _array.backend(features)
    mean, variance = backend.moments(features, row_splits, num_groups, threads)
    inverse_std = 1 / np.sqrt(variance + eps)
    out = backend.normalize(features, row_splits, scale, shift, mean, inverse_std, slope, threads)
    return out, _as_saved(mean, inverse_std)


def _group_norm_vjp(arguments, saved, grad, needs):
    features = _array.contiguous(arguments["features"])
    sizes = _array.device_of(("features", features))
    row_splits = _array.splits_array(
        "row_splits", arguments["row_splits"], len(features), "features", sizes, known=True
    )
    return _normalize_vjp(features, row_splits, False, arguments, saved, grad, needs)


def _group_norm_result(features, num_groups, row_splits, **_):
    items = 1 if row_splits is None else row_splits.shape[0] - 1
    return [(features.shape, features.dtype), ((2, items, 2 * num_groups), np.dtype(np.int32))]


GROUP_NORM = Op(
    "group_norm",
    _group_norm,
    _group_norm_vjp,
    diff=("features", "scale", "shift"),
    result=_group_norm_result,
    check=partial(_group_norm_arguments, traced=True),
    copies=("row_splits",),
)


def _as_saved(mean, inverse_std):
    """Both float64, as int32: JAX has no float64 unless it is asked for."""
    return (np.stack([mean, inverse_std]).view(np.int32),)


def _normalize_vjp(features, row_splits, is_given, arguments, saved, grad, needs):
    scale, shift = _array.contiguous(arguments["scale"]), _array.contiguous(arguments["shift"])
    names = ("features", "scale", "shift")
    slope = _slope(arguments["negative_slope"], features)
    mean, inverse_std = saved[0].view(np.float64)
    grads = _array.backend(features).normalize_grad(
        features, row_splits, scale, shift, mean, inverse_std, is_given, slope, grad,
        *(name in needs for name in names), config.get_num_threads()
    )  # fmt: skip
    return {name: g for name, g in zip(names, grads, strict=True) if name in needs}


def _slope(negative_slope, features):
    """1, which changes nothing, for None."""
    return 1.0 if negative_slope is None else _array.number("negative_slope", negative_slope, features.dtype)


# ---- element by element, of any shape


def leaky_relu(features: Array, negative_slope: float = 0.1) -> Array:
    """The features where they are positive, elsewhere `negative_slope` times them (Maas et al. 2013).

    Parameters
    ----------
    features : float32 or float64, of any shape
    negative_slope : float

    Returns
    -------
    An array like the features. NaN stays.

    Raises
    ------
    TypeError
        For other dtypes.

    Notes
    -----
    The derivative at zero is `negative_slope`. `batch_norm` and `group_norm` do the same in their own pass.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.leaky_relu(np.array([-2.0, 0.0, 2.0]), 0.25)
    array([-0.5,  0. ,  2. ])
    """
    return LEAKY_RELU(features=features, negative_slope=negative_slope)


def relu(features: Array) -> Array:
    """The features where they are positive, elsewhere zero.

    Parameters
    ----------
    features : float32 or float64, of any shape

    Returns
    -------
    An array like the features. NaN stays.

    Raises
    ------
    TypeError
        For other dtypes.

    Notes
    -----
    The derivative at zero is zero.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.relu(np.array([-2.0, 0.0, 2.0]))
    array([0., 0., 2.])
    """
    return RELU(features=features)


def sigmoid(features: Array) -> Array:
    """``1 / (1 + exp(-features))``, which never overflows.

    Parameters
    ----------
    features : float32 or float64, of any shape

    Returns
    -------
    An array like the features. NaN stays.

    Raises
    ------
    TypeError
        For other dtypes.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    return SIGMOID(features=features)


def _activation(name):
    """The row of an activation; all but the leaky ReLU have no slope."""
    code = _ACTIVATIONS.index(name)

    def check(features, negative_slope=0):
        features = _any_shape("features", features, {})
        return features, _array.number("negative_slope", negative_slope, features.dtype)

    def forward(**arguments):
        features, slope = check(**arguments)
        return _array.backend(features).activate(features, code, slope, config.get_num_threads()), ()

    def vjp(arguments, saved, grad, needs):
        features, slope = _array.contiguous(arguments["features"]), arguments.get("negative_slope", 0)
        grad, threads = _array.contiguous(_array.as_array(grad)), config.get_num_threads()
        return {"features": _array.backend(features).activate_grad(features, code, slope, grad, threads)}

    def by_result(arguments):
        # Its result has the sign of the features, and is what the next operator keeps anyway.
        return arguments["negative_slope"] >= 0 if name == "leaky_relu" else name == "relu"

    return Op(name, forward, vjp, diff=("features",), result=_like_features, check=check, by_result=by_result)


def _any_shape(name, value, sizes):
    """Any dimensions, named by their place."""
    dimensions = " ".join(map(str, range(getattr(value, "ndim", 0))))
    return _array.array(name, value, dimensions, _array.FEATURES, sizes)


def _like_features(features, **_):
    return [(features.shape, features.dtype)]


LEAKY_RELU, RELU, SIGMOID = map(_activation, _ACTIVATIONS)


def dropout(features: Array, rate: float, seed: int, *, training: bool = True) -> Array:
    """Sets a share of the features to zero, at random, and divides the others by ``1 - rate`` (Srivastava et al. 2014).

    Parameters
    ----------
    features : float32 or float64, of any shape
    rate : float, 0 to 1
        The probability of each value to be dropped.
    seed : int, 0 to 2**63 - 1
        Another one for every call: which values are dropped depends on nothing else but their place.
    training : bool
        Without it, nothing is dropped.

    Returns
    -------
    An array like the features
        A copy of them where nothing is dropped.

    Raises
    ------
    ValueError
        For a rate or a seed outside its range.
    TypeError
        For other dtypes.

    Notes
    -----
    Value i, counted in C order, is kept where word ``i // 16 % 4`` of Philox4x32-10 (Salmon et al. 2011) at the counter
    ``i // 64 * 16 + i % 16`` with the seed as its key is at least ``floor(rate * 2**32)``: the same on every machine,
    in both dtypes and with any number of threads. The gradient draws the same words again instead of keeping a mask.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.dropout(np.ones(8), 0.5, seed=0)
    array([0., 2., 0., 2., 2., 0., 2., 2.])
    """
    return DROPOUT(features=features, rate=rate, seed=seed, training=training)


def _dropout_arguments(features, rate, seed, training):
    features = _any_shape("features", features, {})
    rate = _array.between("rate", rate, 0, 1)
    seed = _array.integer("seed", seed, 0, 2**63 - 1)
    return features, rate, seed, _array.boolean("training", training)


def _dropout(**arguments):
    features, rate, seed, training = _dropout_arguments(**arguments)
    if not training:
        return features.copy(), ()
    return _array.backend(features).dropout(features, rate, seed, config.get_num_threads()), ()


def _dropout_vjp(arguments, saved, grad, needs):
    return {"features": _dropout(**{**arguments, "features": _array.as_array(grad)})[0]}


DROPOUT = Op("dropout", _dropout, _dropout_vjp, diff=("features",), result=_like_features, check=_dropout_arguments)


def add(first: Array, second: Array) -> Array:
    """``first + second``, of one shape and dtype: a residual connection.

    Parameters
    ----------
    first, second : float32 or float64, of any shape

    Returns
    -------
    An array like both

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree: nothing is broadcast.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.add(np.array([1.0, 2.0]), np.array([10.0, 20.0]))
    array([11., 22.])
    """
    return ADD(first=first, second=second)


def _add_arguments(first, second):
    # NumPy's arithmetic turns arrays without axes, such as losses, into scalars.
    first, second = _array.as_array(first), _array.as_array(second)
    sizes = {}
    first = _any_shape("first", first, sizes)
    second = _array.array(
        "second", second, " ".join(map(str, range(first.ndim))), _array.FEATURES, sizes, like=("first", first)
    )
    return first, second


def _add(**arguments):
    first, second = _add_arguments(**arguments)
    return _array.backend(first).add(first, second, config.get_num_threads()), ()


def _add_vjp(arguments, saved, grad, needs):
    return {name: grad.copy() for name in needs}  # each its own: who gets it may add to it in place


ADD = Op("add", _add, _add_vjp, diff=("first", "second"), result=lambda first, second: [(first.shape, first.dtype)],
         check=_add_arguments, keeps=())  # fmt: skip


# ---- along the channels


def concatenate(first: Array, second: Array, third: Array | None = None, fourth: Array | None = None) -> Array:
    """Two to four arrays of features side by side: a skip connection.

    Parameters
    ----------
    first, second : (N, C1), (N, C2) float32 or float64
    third, fourth : (N, C3), (N, C4), optional
        All of one dtype.

    Returns
    -------
    (N, C1 + C2 + C3 + C4)

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.concatenate(np.array([[1.0], [2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]))
    array([[1., 3., 4.],
           [2., 5., 6.]])
    """
    return CONCATENATE(first=first, second=second, third=third, fourth=fourth)


def _concatenate_arguments(**features):
    sizes, arrays = {}, []
    for name, value in features.items():
        if value is None and name in ("third", "fourth"):
            continue
        like = ("first", arrays[0]) if arrays else None
        arrays.append(_array.array(name, value, f"N C{len(arrays) + 1}", _array.FEATURES, sizes, like=like))
    return arrays


def _concatenate(**features):
    arrays = _concatenate_arguments(**features)
    return _array.backend(arrays[0]).concatenate(arrays, config.get_num_threads()), ()


def _concatenate_vjp(arguments, saved, grad, needs):
    given = {name: a.shape[1] for name, a in arguments.items() if a is not None}
    needed, threads = [name in needs for name in given], config.get_num_threads()
    parts = _array.backend(grad).split(grad, list(given.values()), needed, threads)
    return {name: part for name, part in zip(given, parts, strict=True) if part is not None}


def _concatenate_result(**features):
    given = [a for a in features.values() if a is not None]
    return [((given[0].shape[0], sum(a.shape[1] for a in given)), given[0].dtype)]


CONCATENATE = Op("concatenate", _concatenate, _concatenate_vjp, ("first", "second", "third", "fourth"),
                 _concatenate_result, check=_concatenate_arguments, keeps=())  # fmt: skip


def softmax(features: Array) -> Array:
    """``exp(features)`` over its sum along the last axis, which never overflows.

    Parameters
    ----------
    features : (..., C) float32 or float64

    Returns
    -------
    An array like the features
        NaN where one of the C values is NaN or plus infinity, or all are minus infinity.

    Raises
    ------
    ValueError, TypeError
        For an array without axes, or another dtype.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.softmax(np.array([[0.0, 0.0], [1000.0, 0.0]]))
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    return SOFTMAX(features=features)


def _as_rows(features):
    features = _any_shape("features", features, {})
    if not features.ndim:
        raise ValueError("features: expected (..., C), got ()")
    return features.reshape(math.prod(features.shape[:-1]), features.shape[-1])


def _softmax(features):
    rows = _as_rows(features)
    return _array.backend(rows).softmax(rows, config.get_num_threads()).reshape(features.shape), ()


def _softmax_vjp(arguments, saved, grad, needs):
    rows = _as_rows(arguments["features"])
    grads = _array.backend(rows).softmax_grad(rows, grad.reshape(rows.shape), config.get_num_threads())
    return {"features": grads.reshape(grad.shape)}


SOFTMAX = Op("softmax", _softmax, _softmax_vjp, diff=("features",), result=_like_features, check=_as_rows)


# ---- loss


def softmax_cross_entropy(logits: Array, labels: Array, *, ignore_index: int | None = None,
                          class_weights: Array | None = None, reduction: str = "mean") -> Array:  # fmt: skip
    """The cross entropy between labels and the softmax of logits.

    ``w[y] * (log(sum(exp(x))) - x[y])`` for a row x of label y. Differentiable in `logits`.

    Parameters
    ----------
    logits : (N, C) float32 or float64
    labels : (N,) uint8, int32 or int64
        0 to C - 1, or `ignore_index`.
    ignore_index : int, optional
        Rows of this label have no loss and no gradient.
    class_weights : (C,), dtype of the logits, optional
        w; 1 without.
    reduction : {"mean", "sum", "none"}
        The sum over the rows over the sum of their weights; the sum; or each row's. A mean over no weight at all, as
        of rows that are all ignored, is 0 and so is its gradient.

    Returns
    -------
    () or (N,), dtype of the logits

    Raises
    ------
    ValueError
        For a label that is neither a class nor `ignore_index`, with its row, or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Sums over rows are float64.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> logits = np.array([[0.0, 0.0], [5.0, 0.0], [3.0, 4.0]])
    >>> loss, pullback = kp.autodiff.vjp(
    ...     lambda x: kp.softmax_cross_entropy(x, np.array([1, 0, 9]), ignore_index=9), logits)
    >>> round(float(loss), 4), pullback(np.array(1.0))[0].round(4)
    (0.3499, array([[ 0.25  , -0.25  ],
           [-0.0033,  0.0033],
           [ 0.    ,  0.    ]]))
    """
    return SOFTMAX_CROSS_ENTROPY(logits=logits, labels=labels, ignore_index=ignore_index, class_weights=class_weights,
                                 reduction=reduction)  # fmt: skip


def _cross_entropy_arguments(logits, labels, ignore_index, class_weights, reduction):
    sizes = {}
    logits = _array.array("logits", logits, "N C", _array.FEATURES, sizes)
    labels = _array.array("labels", labels, "N", _array.LABELS, sizes)
    if ignore_index is not None:
        limits = np.iinfo(labels.dtype)
        ignore_index = _array.integer("ignore_index", ignore_index, limits.min, limits.max)
    if class_weights is not None:
        class_weights = _array.array(
            "class_weights", class_weights, "C", _array.FEATURES, sizes, like=("logits", logits)
        )
    return logits, labels, ignore_index, class_weights, _array.choice("reduction", reduction, _REDUCTIONS)


def _cross_entropy(**arguments):
    checked = _cross_entropy_arguments(**arguments)
    each, backend = arguments["reduction"] == "none", _array.backend(checked[0])
    try:
        return backend.cross_entropy(*checked, each, config.get_num_threads()), ()
    except backend.OutOfRange:
        raise _no_class(*checked[:3]) from None


def _cross_entropy_vjp(arguments, saved, grad, needs):
    checked = _cross_entropy_arguments(**arguments)
    backend, grad = _array.backend(checked[0]), _array.as_array(grad)
    try:
        return {"logits": backend.cross_entropy_grad(*checked, grad, config.get_num_threads())}
    except backend.OutOfRange:  # the labels were changed since the forward pass looked at them
        raise _no_class(*checked[:3]) from None


def _no_class(logits, labels, ignore_index):
    labels = _array.on_host(labels)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    expected = f"0 to {logits.shape[1] - 1}"
    if ignore_index is not None:
        wrong &= labels != ignore_index
        expected += f", or {ignore_index} to be ignored"
    if not wrong.any():
        return _array.changed("labels")
    row = int(np.argmax(wrong))
    return ValueError(f"labels: expected {expected}, got {labels[row]} in row {row}")


def _cross_entropy_result(logits, reduction, **_):
    return [(logits.shape[:1] if reduction == "none" else (), logits.dtype)]


SOFTMAX_CROSS_ENTROPY = Op(
    "softmax_cross_entropy",
    _cross_entropy,
    _cross_entropy_vjp,
    diff=("logits",),
    result=_cross_entropy_result,
    check=_cross_entropy_arguments,
    copies=("labels",),
)

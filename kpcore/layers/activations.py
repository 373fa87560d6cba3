"""Activations, softmax and dropout."""

from __future__ import annotations

import math

from kpcore import config
from kpcore.autodiff import Op
from kpcore.backends import checks, devices
from kpcore.backends.devices import Array

_ACTIVATIONS = ("leaky_relu", "relu", "sigmoid")


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


def _like_features(features, **_):
    return [(features.shape, features.dtype)]


def _activation(name):
    """The row of an activation; all but the leaky ReLU have no slope."""
    code = _ACTIVATIONS.index(name)

    def check(features, negative_slope=0):
        features = checks.any_shape("features", features, {})
        return features, checks.number("negative_slope", negative_slope, features.dtype)

    def forward(**arguments):
        features, slope = check(**arguments)
        return devices.backend(features).activate(features, code, slope, config.get_num_threads()), ()

    def vjp(arguments, saved, grad, needs):
        features, slope = devices.contiguous(arguments["features"]), arguments.get("negative_slope", 0)
        grad, threads = devices.contiguous(devices.as_array(grad)), config.get_num_threads()
        return {"features": devices.backend(features).activate_grad(features, code, slope, grad, threads)}

    def by_result(arguments):
        # Its result has the sign of the features, and is what the next operator keeps anyway.
        return arguments["negative_slope"] >= 0 if name == "leaky_relu" else name == "relu"

    return Op(name, forward, vjp, diff=("features",), result=_like_features, check=check, by_result=by_result)


LEAKY_RELU, RELU, SIGMOID = map(_activation, _ACTIVATIONS)


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
    features = checks.any_shape("features", features, {})
    if not features.ndim:
        raise ValueError("features: expected (..., C), got ()")
    return features.reshape(math.prod(features.shape[:-1]), features.shape[-1])


def _softmax(features):
    rows = _as_rows(features)
    return devices.backend(rows).softmax(rows, config.get_num_threads()).reshape(features.shape), ()


def _softmax_vjp(arguments, saved, grad, needs):
    rows = _as_rows(arguments["features"])
    grads = devices.backend(rows).softmax_grad(rows, grad.reshape(rows.shape), config.get_num_threads())
    return {"features": grads.reshape(grad.shape)}


SOFTMAX = Op("softmax", _softmax, _softmax_vjp, diff=("features",), result=_like_features, check=_as_rows)


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
    features = checks.any_shape("features", features, {})
    rate = checks.between("rate", rate, 0, 1)
    seed = checks.integer("seed", seed, 0, 2**63 - 1)
    return features, rate, seed, checks.boolean("training", training)


def _dropout(**arguments):
    features, rate, seed, training = _dropout_arguments(**arguments)
    if not training:
        return features.copy(), ()
    return devices.backend(features).dropout(features, rate, seed, config.get_num_threads()), ()


def _dropout_vjp(arguments, saved, grad, needs):
    return {"features": _dropout(**{**arguments, "features": devices.as_array(grad)})[0]}


DROPOUT = Op("dropout", _dropout, _dropout_vjp, diff=("features",), result=_like_features, check=_dropout_arguments)

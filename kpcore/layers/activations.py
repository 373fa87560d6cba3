"""Activations, softmax and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kpcore.autodiff import Parameters, operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import Array, Computed
from kpcore.ops import Call, Out

__all__ = ["dropout", "leaky_relu", "relu", "relu6", "sigmoid", "softmax"]

_ACTIVATIONS = ("leaky_relu", "relu", "relu6", "sigmoid")


def _like_features(call):
    return [(call.features.shape, call.features.dtype)]


def _activation_vjp(call, saved, grad, needs):
    grad = devices.contiguous(devices.as_array(grad))
    grads = devices.namespace(grad).empty(grad.shape, grad.dtype)
    devices.backend(grad).run("activate_grad", call, grad_out=grad, grad_features=grads)
    return {"features": grads}


def _activation(
    by_result: Callable[[Call[Any]], bool],
) -> Callable[[Callable[Parameters, Call[Out]]], Callable[Parameters, Out]]:
    """Declare an activation.

    `by_result` says whether the result has the sign of the features. Then the gradient can be computed from the result,
    and the tape keeps that instead of the features, since the next operator keeps it anyway.
    """
    return operator(vjp=_activation_vjp, diff=("features",), result=_like_features, kernel="activate",
                    by_result=by_result)  # fmt: skip


def _activation_call(name, features, negative_slope=0):
    features = checks.any_shape("features", features, {})
    slope = checks.number("negative_slope", negative_slope, features.dtype)
    return Call(features=features, activation=_ACTIVATIONS.index(name), negative_slope=slope)


@_activation(lambda call: call.negative_slope >= 0)
def leaky_relu(features: Array[Computed], negative_slope: float = 0.1) -> Call[Computed]:
    """The features where they are positive, elsewhere `negative_slope` times them.

    The leaky ReLU of Maas et al. (2013).

    Parameters
    ----------
    features : float32 or float64, of any shape
    negative_slope : float

    Returns
    -------
    An array like the features. NaN gives NaN.

    Raises
    ------
    TypeError
        For other dtypes.

    Notes
    -----
    The derivative at zero is `negative_slope`. `batch_norm` and `group_norm` can apply a leaky ReLU in the same pass.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.leaky_relu(np.array([-2.0, 0.0, 2.0]), 0.25)
    array([-0.5,  0. ,  2. ])
    """
    return _activation_call("leaky_relu", features, negative_slope)


@_activation(lambda call: True)
def relu(features: Array[Computed]) -> Call[Computed]:
    """The features where they are positive, elsewhere zero.

    Parameters
    ----------
    features : float32 or float64, of any shape

    Returns
    -------
    An array like the features. NaN gives NaN.

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
    return _activation_call("relu", features)


@_activation(lambda call: True)
def relu6(features: Array[Computed]) -> Call[Computed]:
    """``min(max(features, 0), 6)``, the activation of MobileNet-V2.

    Parameters
    ----------
    features : float32 or float64, of any shape

    Returns
    -------
    An array like the features. NaN gives NaN.

    Raises
    ------
    TypeError
        For other dtypes.

    Notes
    -----
    The derivative at zero and at six is zero, as in torch.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.relu6(np.array([-2.0, 2.0, 8.0]))
    array([0., 2., 6.])
    """
    return _activation_call("relu6", features)


@_activation(lambda call: False)
def sigmoid(features: Array[Computed]) -> Call[Computed]:
    """``1 / (1 + exp(-features))``, which never overflows.

    Parameters
    ----------
    features : float32 or float64, of any shape

    Returns
    -------
    An array like the features. NaN gives NaN.

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
    return _activation_call("sigmoid", features)


def _as_rows(array):
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _softmax_forward(call):
    out = devices.namespace(call.features).empty(call.features.shape, call.features.dtype)
    devices.backend(out).run("softmax", features=_as_rows(call.features), out=_as_rows(out))
    return out, ()


def _softmax_vjp(call, saved, grad, needs):
    grads = devices.namespace(grad).empty(grad.shape, grad.dtype)
    devices.backend(grad).run("softmax_grad", features=_as_rows(call.features), grad_out=_as_rows(grad),
                              grad_features=_as_rows(grads))  # fmt: skip
    return {"features": grads}


@operator(vjp=_softmax_vjp, diff=("features",), result=_like_features, forward=_softmax_forward)
def softmax(features: Array[Computed]) -> Call[Computed]:
    """``exp(features)`` over its sum along the last axis, which never overflows.

    Parameters
    ----------
    features : (..., C) float32 or float64

    Returns
    -------
    An array like the features
        A row is NaN if one of its C values is NaN or plus infinity, or all are minus infinity.

    Raises
    ------
    ValueError, TypeError
        For a 0-d array, or another dtype.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.softmax(np.array([[0.0, 0.0], [1000.0, 0.0]]))
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    features = checks.any_shape("features", features, {})
    if not features.ndim:
        raise ValueError("features: expected (..., C), got ()")
    return Call(features=features)


def _drop(call, features):
    """Apply dropout to the features or to their gradient; the seed drops the same values in both."""
    if not call.training:
        return features.copy()
    out = devices.namespace(features).empty(features.shape, features.dtype)
    devices.backend(features).run("dropout", call, features=features, out=out)
    return out


def _dropout_forward(call):
    return _drop(call, call.features), ()


def _dropout_vjp(call, saved, grad, needs):
    return {"features": _drop(call, devices.contiguous(devices.as_array(grad)))}


@operator(vjp=_dropout_vjp, diff=("features",), result=_like_features, forward=_dropout_forward, keeps=())
def dropout(features: Array[Computed], rate: float, seed: int, *, training: bool = True) -> Call[Computed]:
    """Sets a share of the features to zero, at random from a seed, and divides the others by ``1 - rate``.

    As Srivastava et al. (2014) propose, with the scaling moved to the features that are kept.

    Parameters
    ----------
    features : float32 or float64, of any shape
    rate : float, 0 to 1
        The probability with which each value is dropped.
    seed : int, 0 to 2**63 - 1
        Pass a different one in every call: which values are dropped depends only on the seed and on their positions.
    training : bool
        If False, nothing is dropped.

    Returns
    -------
    An array like the features
        A copy of them if nothing is dropped.

    Raises
    ------
    ValueError
        For a rate or a seed outside its range.
    TypeError
        For other dtypes.

    Notes
    -----
    Value i, counted in C order, is kept if word ``i // 16 % 4`` of Philox4x32-10 (Salmon et al. 2011), at the counter
    ``i // 64 * 16 + i % 16`` and with the seed as its key, is at least ``floor(rate * 2**32)``. So the same values are
    kept on every machine, in both dtypes and with any number of threads. The gradient draws the same words again
    instead of keeping a mask.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.dropout(np.ones(8), 0.5, seed=0)
    array([0., 2., 0., 2., 2., 0., 2., 2.])
    """
    return Call(
        features=checks.any_shape("features", features, {}), rate=checks.between("rate", rate, 0, 1),
        seed=checks.integer("seed", seed, 0, 2**63 - 1), training=checks.boolean("training", training),
    )  # fmt: skip

"""Products with weights, and what joins rows of features: sums and channels side by side."""

from __future__ import annotations

from kpcore import config
from kpcore.autodiff import Op
from kpcore.backends import checks, devices
from kpcore.backends.devices import Array


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
    features = checks.array("features", features, "N Cin", checks.FEATURES, sizes)
    weights = checks.array("weights", weights, "Cin Cout", checks.FEATURES, sizes, like=("features", features))
    if bias is not None:
        bias = checks.array("bias", bias, "Cout", checks.FEATURES, sizes, like=("features", features))
    return features, weights, bias


def _linear(**arguments):
    checked = _linear_arguments(**arguments)
    return devices.backend(checked[0]).linear(*checked, config.get_num_threads()), ()


def _linear_vjp(arguments, saved, grad, needs):
    features, weights, _ = _linear_arguments(**arguments)
    backend, threads, grads = devices.backend(grad), config.get_num_threads(), {}
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
    first, second = devices.as_array(first), devices.as_array(second)
    sizes = {}
    first = checks.any_shape("first", first, sizes)
    second = checks.array(
        "second", second, " ".join(map(str, range(first.ndim))), checks.FEATURES, sizes, like=("first", first)
    )
    return first, second


def _add(**arguments):
    first, second = _add_arguments(**arguments)
    return devices.backend(first).add(first, second, config.get_num_threads()), ()


def _add_vjp(arguments, saved, grad, needs):
    return {name: grad.copy() for name in needs}  # each its own: who gets it may add to it in place


ADD = Op("add", _add, _add_vjp, diff=("first", "second"), result=lambda first, second: [(first.shape, first.dtype)],
         check=_add_arguments, keeps=())  # fmt: skip


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
        arrays.append(checks.array(name, value, f"N C{len(arrays) + 1}", checks.FEATURES, sizes, like=like))
    return arrays


def _concatenate(**features):
    arrays = _concatenate_arguments(**features)
    return devices.backend(arrays[0]).concatenate(arrays, config.get_num_threads()), ()


def _concatenate_vjp(arguments, saved, grad, needs):
    given = {name: a.shape[1] for name, a in arguments.items() if a is not None}
    needed, threads = [name in needs for name in given], config.get_num_threads()
    parts = devices.backend(grad).split(grad, list(given.values()), needed, threads)
    return {name: part for name, part in zip(given, parts, strict=True) if part is not None}


def _concatenate_result(**features):
    given = [a for a in features.values() if a is not None]
    return [((given[0].shape[0], sum(a.shape[1] for a in given)), given[0].dtype)]


CONCATENATE = Op("concatenate", _concatenate, _concatenate_vjp, ("first", "second", "third", "fourth"),
                 _concatenate_result, check=_concatenate_arguments, keeps=())  # fmt: skip

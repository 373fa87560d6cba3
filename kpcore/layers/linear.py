"""Products of features with weights, sums of features, and concatenation of channels."""

from __future__ import annotations

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import Array, Computed
from kpcore.ops import Call, Shaped, empty_like

__all__ = ["add", "concatenate", "linear"]

_PARTS = ("first", "second", "third", "fourth")


def _linear_result(call):
    return [((call.features.shape[0], call.weights.shape[1]), call.features.dtype)]


def _linear_vjp(call, saved, grad, needs):
    backend, fields = devices.backend(grad), empty_like(call, ("features", "weights", "bias"), needs)
    for name in ("features", "weights"):
        if name in needs:
            backend.run(f"linear_grad_{name}", call, grad_out=grad, **{f"grad_{name}": fields[f"grad_{name}"]})
    if "bias" in needs:
        backend.run("sum_rows", rows=grad, sums=fields["grad_bias"])
    return {name: fields[f"grad_{name}"] for name in needs}


@operator(vjp=_linear_vjp, diff=("features", "weights", "bias"), result=_linear_result)
def linear(features: Array[Computed], weights: Array[Computed], bias: Array[Computed] | None = None) -> Call[Computed]:
    """``features @ weights + bias``: a 1 x 1 convolution, or a fully connected layer.

    Parameters
    ----------
    features : (N, Cin) float32 or float64
    weights : (Cin, Cout), dtype of the features
    bias : (Cout,), dtype of the features, optional

    Returns
    -------
    (N, Cout), dtype of the features
        If Cin is 0, each row is the bias, or zeros.

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
    sizes = {}
    features = checks.array("features", features, "N Cin", checks.FEATURES, sizes)
    weights = checks.array("weights", weights, "Cin Cout", checks.FEATURES, sizes, like=("features", features))
    if bias is not None:
        bias = checks.array("bias", bias, "Cout", checks.FEATURES, sizes, like=("features", features))
    return Call(features=features, weights=weights, bias=bias)


def _add_result(call):
    return [(call.first.shape, call.first.dtype)]


def _add_vjp(call, saved, grad, needs):
    return {name: grad.copy() for name in needs}  # a copy for each, since the caller may add to a gradient in place


@operator(vjp=_add_vjp, diff=("first", "second"), result=_add_result, keeps=())
def add(first: Array[Computed], second: Array[Computed]) -> Call[Computed]:
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
    # NumPy arithmetic turns 0-d arrays, such as losses, into scalars.
    first, second = devices.as_array(first), devices.as_array(second)
    sizes = {}
    first = checks.any_shape("first", first, sizes)
    axes = " ".join(map(str, range(first.ndim)))
    second = checks.array("second", second, axes, checks.FEATURES, sizes, like=("first", first))
    return Call(first=first, second=second)


def _concatenate_result(call):
    parts = [part for name in _PARTS if (part := getattr(call, name)) is not None]
    return [((parts[0].shape[0], sum(part.shape[1] for part in parts)), parts[0].dtype)]


def _concatenate_vjp(call, saved, grad, needs):
    xp, parts = devices.namespace(grad), {}
    for name in _PARTS:
        part = getattr(call, name)
        if part is not None:
            parts[name] = (xp.empty if name in needs else Shaped)(part.shape, part.dtype)
    devices.backend(grad).run("split", out=grad, **parts)
    return {name: parts[name] for name in needs}


@operator(vjp=_concatenate_vjp, diff=_PARTS, result=_concatenate_result, keeps=())
def concatenate(first: Array[Computed], second: Array[Computed], third: Array[Computed] | None = None,
                fourth: Array[Computed] | None = None) -> Call[Computed]:  # fmt: skip
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
    sizes, parts = {}, {}
    for number, (name, value) in enumerate(zip(_PARTS, (first, second, third, fourth), strict=True)):
        if value is not None or number < 2:
            like = ("first", parts["first"]) if parts else None
            value = checks.array(name, value, f"N C{number + 1}", checks.FEATURES, sizes, like=like)
        parts[name] = value
    return Call(**parts)

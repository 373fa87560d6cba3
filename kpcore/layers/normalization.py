"""Batch and group normalisation, optionally followed by a leaky ReLU in the same pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple

import numpy as np

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Buffer, Computed, Value
from kpcore.ops import Call, empty_like

__all__ = ["BatchNormed", "batch_norm", "group_norm"]

# Mean and inverse standard deviation, float64, are saved for the gradient as int32 arrays of the same bytes, because
# JAX has no float64 arrays unless jax_enable_x64 is on.
_STATISTICS = np.dtype(np.int32)


def _moments(features, row_splits, groups):
    """(mean, variance), (B, groups) float64 each, over all values of a batch item and group; 0 for an empty item."""
    mean, variance = devices.namespace(features).empty((2, len(row_splits) - 1, groups), np.float64)
    devices.backend(features).run("moments", features=features, row_splits=row_splits, mean=mean, variance=variance)
    return mean, variance


def _normalized(call, row_splits, mean, variance):
    """(normalised features, saved arrays), where the saved array holds mean and inverse standard deviation."""
    inverse_std = 1 / np.sqrt(variance + call.eps)
    out = devices.namespace(call.features).empty(call.features.shape, call.features.dtype)
    devices.backend(out).run("normalize", call, row_splits=row_splits, mean=mean, inverse_std=inverse_std, out=out)
    return out, (np.stack([mean, inverse_std]).view(_STATISTICS),)


def _gradients(call, row_splits, saved, grad, needs):
    mean, inverse_std = saved[0].view(np.float64)
    grads = empty_like(call, ("features", "scale", "shift"), needs)
    devices.backend(grad).run("normalize_grad", call, row_splits=row_splits, mean=mean, inverse_std=inverse_std,
                              grad_out=grad, **grads)  # fmt: skip
    return {name: grads[f"grad_{name}"] for name in needs}


def _slope(negative_slope, features):
    """The slope as a number; 1, which changes nothing, if it is None."""
    return 1.0 if negative_slope is None else checks.number("negative_slope", negative_slope, features.dtype)


if TYPE_CHECKING:  # generic here only: torch does not recognize a generic NamedTuple (Python 3.11) as a named tuple

    class BatchNormed(NamedTuple, Generic[Value, Buffer]):
        """The result of `batch_norm`."""

        features: Value
        running_mean: Buffer
        running_var: Buffer

else:

    class BatchNormed(NamedTuple):
        """The result of `batch_norm`."""

        features: Array  #: (N, C), normalised
        running_mean: np.ndarray  #: (C,), to pass in the next call
        running_var: np.ndarray  #: (C,), to pass in the next call


def _batch_norm_forward(call):
    features, running_mean, running_var = call.features, call.running_mean, call.running_var
    (n, channels), row_splits = features.shape, _one_item(features)
    if call.training:
        mean, variance = _moments(features, row_splits, channels)
        running_mean = _updated(running_mean, mean[0], call.momentum)
        running_var = _updated(running_var, n / (n - 1) * variance[0], call.momentum)
    else:
        # Not checked on the GPU, where the check would wait for all earlier kernels; there the channel becomes NaN.
        if isinstance(running_var, np.ndarray) and (running_var < 0).any():
            at = int(np.argmax(running_var < 0))
            raise ValueError(f"running_var: expected no negative values, got {running_var[at]} in channel {at}")
        mean, variance = running_mean.astype(np.float64)[None], running_var.astype(np.float64)[None]
        running_mean, running_var = running_mean.copy(), running_var.copy()
    out, saved = _normalized(call, row_splits, mean, variance)
    return BatchNormed(out, running_mean, running_var), saved


def _one_item(features):
    return checks.one_item(len(features), devices.namespace(features))


def _updated(running, batch, momentum):
    """The running statistics moved towards those of the batch."""
    with np.errstate(over="ignore"):  # the result is infinite if the dtype cannot hold it
        return ((1 - momentum) * running.astype(np.float64) + momentum * batch).astype(running.dtype)


def _batch_norm_vjp(call, saved, grad, needs):
    return _gradients(call, _one_item(call.features), saved, grad, needs)


def _batch_norm_result(call):
    features, channels = call.features, call.features.shape[1:]
    statistics = [(channels, features.dtype)] * 2
    return [(features.shape, features.dtype), *statistics, ((2, 1, 2 * channels[0]), _STATISTICS)]


@operator(
    vjp=_batch_norm_vjp,
    diff=("features", "scale", "shift"),
    result=_batch_norm_result,
    forward=_batch_norm_forward,
    field="features",
    record=BatchNormed,
)
def batch_norm(features: Array[Computed], scale: Array[Computed], shift: Array[Computed], running_mean: AnyArray,
               running_var: AnyArray, *, training: bool = True, momentum: float = 0.02, eps: float = 1e-5,
               negative_slope: float | None = None) -> Call[BatchNormed[Computed, np.ndarray]]:  # fmt: skip
    """Batch normalisation, and a leaky ReLU after it in the same pass over memory.

    ``(features - mean) / sqrt(var + eps) * scale + shift`` for each channel (Ioffe and Szegedy 2015). With `training`,
    mean and variance (over N) are those of the rows, else the running ones. No argument is changed: the new running
    statistics are in the result. Differentiable in `features`, `scale` and `shift`.

    Parameters
    ----------
    features : (N, C) float32 or float64
        At least two rows with `training`, because fewer have no variance.
    scale, shift : (C,), dtype of the features
    running_mean, running_var : (C,), dtype of the features
    training : bool
    momentum : float, 0 to 1
        Weight of the batch in the new running statistics, ``(1 - momentum) * running + momentum * batch``, where the
        variance of the batch is the unbiased one, over N - 1.
    eps : float, above zero
    negative_slope : float, optional
        Apply `leaky_relu` with this slope to the result; 0 is a ReLU.

    Returns
    -------
    BatchNormed
        Without `training`, the running statistics in it are copies.

    Raises
    ------
    ValueError
        For fewer than two rows with `training`; for a negative running variance without it (on the GPU its channel
        becomes NaN instead); for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Statistics are sums in float64 of differences from the first row, so an offset that is far larger than the spread
    costs no accuracy. A constant channel becomes its shift. With `training`, the gradient includes the dependence of
    the statistics on the features.

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
    sizes = {}
    features = checks.array("features", features, "N C", checks.FEATURES, sizes)
    scale, shift, running_mean, running_var = (
        checks.array(name, value, "C", checks.FEATURES, sizes, like=("features", features))
        for name, value in (
            ("scale", scale),
            ("shift", shift),
            ("running_mean", running_mean),
            ("running_var", running_var),
        )
    )
    training = checks.boolean("training", training)
    momentum = checks.between("momentum", momentum, 0, 1)
    eps = checks.length("eps", eps, np.dtype(np.float64))
    if training and features.shape[0] < 2:
        raise ValueError(f"features: expected at least 2 rows where training, got {features.shape}")
    return Call(
        features=features, scale=scale, shift=shift, running_mean=running_mean, running_var=running_var,
        training=training, momentum=momentum, eps=eps, statistics_fixed=not training,
        negative_slope=_slope(negative_slope, features),
    )  # fmt: skip


def _group_norm_forward(call):
    row_splits = checks.splits_of_call(call)
    return _normalized(call, row_splits, *_moments(call.features, row_splits, call.num_groups))


def _group_norm_vjp(call, saved, grad, needs):
    return _gradients(call, checks.splits_of_call(call, known=True), saved, grad, needs)


def _group_norm_result(call):
    items = 1 if call.row_splits is None else call.row_splits.shape[0] - 1
    return [(call.features.shape, call.features.dtype), ((2, items, 2 * call.num_groups), _STATISTICS)]


@operator(
    vjp=_group_norm_vjp,
    diff=("features", "scale", "shift"),
    result=_group_norm_result,
    forward=_group_norm_forward,
    copies=("row_splits",),
)
def group_norm(features: Array[Computed], num_groups: int, scale: Array[Computed], shift: Array[Computed], *,
               row_splits: AnyArray | None = None, eps: float = 1e-5, negative_slope: float | None = None
               ) -> Call[Computed]:  # fmt: skip
    """Group normalisation, and a leaky ReLU after it in the same pass over memory.

    ``(features - mean) / sqrt(var + eps) * scale + shift`` (Wu and He 2018), with one mean and variance over all rows
    of a batch item and all channels of a group. Without `row_splits` all rows are one item, as in the published
    networks that normalise all clouds of a batch together. Differentiable in `features`, `scale` and `shift`.

    Parameters
    ----------
    features : (N, C) float32 or float64
    num_groups : int
        A divisor of C; group g has the ``C / num_groups`` channels from ``g * C / num_groups`` on.
    scale, shift : (C,), dtype of the features
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    eps : float, above zero
    negative_slope : float, optional
        Apply `leaky_relu` with this slope to the result; 0 is a ReLU.

    Returns
    -------
    (N, C), dtype of the features
        If all values of an item and group are equal, they become the shift.

    Raises
    ------
    ValueError
        For a number of groups that does not divide C, or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Statistics are sums in float64 of differences from the first row of an item, as in `batch_norm`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x = np.array([[1.0, 3.0, 0.0, 4.0], [1.0, 3.0, 0.0, 4.0]])
    >>> kp.group_norm(x, 2, np.ones(4), np.zeros(4)).round(3)
    array([[-1.,  1., -1.,  1.],
           [-1.,  1., -1.,  1.]])
    """
    sizes = {}
    features = checks.array("features", features, "N C", checks.FEATURES, sizes)
    scale = checks.array("scale", scale, "C", checks.FEATURES, sizes, like=("features", features))
    shift = checks.array("shift", shift, "C", checks.FEATURES, sizes, like=("features", features))
    num_groups = checks.integer("num_groups", num_groups, 1)
    if num_groups > max(1, features.shape[1]) or features.shape[1] % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {features.shape[1]} channels, got {num_groups}")
    return Call(
        features=features, num_groups=num_groups, scale=scale, shift=shift,
        row_splits=checks.splits_shape("row_splits", row_splits, len(features), sizes), is_one_item=row_splits is None,
        eps=checks.length("eps", eps, np.dtype(np.float64)), statistics_fixed=False,
        negative_slope=_slope(negative_slope, features),
    )  # fmt: skip

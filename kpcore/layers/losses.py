"""The loss of a classification."""

from __future__ import annotations

import numpy as np

from kpcore import config
from kpcore.autodiff import Op
from kpcore.backends import checks, devices
from kpcore.backends.devices import Array

_REDUCTIONS = ("mean", "sum", "none")


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
    logits = checks.array("logits", logits, "N C", checks.FEATURES, sizes)
    labels = checks.array("labels", labels, "N", checks.LABELS, sizes)
    if ignore_index is not None:
        limits = np.iinfo(labels.dtype)
        ignore_index = checks.integer("ignore_index", ignore_index, limits.min, limits.max)
    if class_weights is not None:
        class_weights = checks.array(
            "class_weights", class_weights, "C", checks.FEATURES, sizes, like=("logits", logits)
        )
    return logits, labels, ignore_index, class_weights, checks.choice("reduction", reduction, _REDUCTIONS)


def _cross_entropy(**arguments):
    checked = _cross_entropy_arguments(**arguments)
    each, backend = arguments["reduction"] == "none", devices.backend(checked[0])
    try:
        return backend.cross_entropy(*checked, each, config.get_num_threads()), ()
    except backend.OutOfRange:
        raise _no_class(*checked[:3]) from None


def _cross_entropy_vjp(arguments, saved, grad, needs):
    checked = _cross_entropy_arguments(**arguments)
    backend, grad = devices.backend(checked[0]), devices.as_array(grad)
    try:
        return {"logits": backend.cross_entropy_grad(*checked, grad, config.get_num_threads())}
    except backend.OutOfRange:  # the labels were changed since the forward pass looked at them
        raise _no_class(*checked[:3]) from None


def _no_class(logits, labels, ignore_index):
    labels = devices.on_host(labels)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    expected = f"0 to {logits.shape[1] - 1}"
    if ignore_index is not None:
        wrong &= labels != ignore_index
        expected += f", or {ignore_index} to be ignored"
    if not wrong.any():
        return checks.changed("labels")
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

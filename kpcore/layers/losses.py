"""Losses of classification."""

from __future__ import annotations

import numpy as np

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.ops import OPS, Call, empty_like

__all__ = ["softmax_cross_entropy"]

_REDUCTIONS = ("mean", "sum", "none")


def _result(call):
    # `reduction` is the name in a call that is not checked yet, else its position in _REDUCTIONS.
    not_reduced = call.reduction in ("none", _REDUCTIONS.index("none"))
    return [(call.logits.shape[:1] if not_reduced else (), call.logits.dtype)]


def _wrong_label(logits, labels, ignore_index):
    """The error for the first label that is neither a class nor `ignore_index`."""
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


def _forward(call):
    try:
        return OPS["softmax_cross_entropy"].run(call)
    except devices.backend(call.logits).OutOfRange:
        raise _wrong_label(call.logits, call.labels, call.ignore_index) from None


def _vjp(call, saved, grad, needs):
    backend, grads = devices.backend(call.logits), empty_like(call, ("logits",), needs)
    try:
        backend.run("cross_entropy_grad", call, grad_out=devices.as_array(grad), **grads)
    except backend.OutOfRange:  # the labels were changed since the forward pass
        raise _wrong_label(call.logits, call.labels, call.ignore_index) from None
    return {"logits": grads["grad_logits"]}


@operator(vjp=_vjp, diff=("logits",), result=_result, forward=_forward, kernel="cross_entropy", copies=("labels",))
def softmax_cross_entropy(logits: Array[Computed], labels: AnyArray, *, ignore_index: int | None = None,
                          class_weights: AnyArray | None = None, reduction: str = "mean"
                          ) -> Call[Computed]:  # fmt: skip
    """The cross entropy between labels and the softmax of logits; ignored labels, class weights.

    ``w[y] * (log(sum(exp(x))) - x[y])`` for a row x of label y. Differentiable in `logits`.

    Parameters
    ----------
    logits : (N, C) float32 or float64
    labels : (N,) uint8, int32 or int64
        0 to C - 1, or `ignore_index`.
    ignore_index : int, optional
        Rows with this label have a loss and a gradient of zero.
    class_weights : (C,), dtype of the logits, optional
        The weights w of the classes; 1 by default.
    reduction : {"mean", "sum", "none"}
        "mean": the sum over all rows divided by the sum of their weights; "sum": the sum; "none": the loss of each row.
        If the weights sum to zero, for example because all rows are ignored, the mean and its gradient are 0.

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
    Sums over rows are computed in float64.

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
    return Call(
        logits=logits, labels=labels, ignore_index=ignore_index, class_weights=class_weights,
        reduction=checks.choice("reduction", reduction, _REDUCTIONS),
    )  # fmt: skip

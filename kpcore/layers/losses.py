"""The loss of a classification."""

from __future__ import annotations

import numpy as np

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.ops import OPS, Call, empty_like

__all__ = ["softmax_cross_entropy"]

_REDUCTIONS = ("mean", "sum", "none")


def _result(call):
    # `reduction` is a name in a call that was not checked, its code in one that was.
    each = call.reduction in ("none", _REDUCTIONS.index("none"))
    return [(call.logits.shape[:1] if each else (), call.logits.dtype)]


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


def _forward(call):
    try:
        return OPS["softmax_cross_entropy"].run(call)
    except devices.backend(call.logits).OutOfRange:
        raise _no_class(call.logits, call.labels, call.ignore_index) from None


def _vjp(call, saved, grad, needs):
    backend, grads = devices.backend(call.logits), empty_like(call, ("logits",), needs)
    try:
        backend.run("cross_entropy_grad", call, grad_out=devices.as_array(grad), **grads)
    except backend.OutOfRange:  # the labels were changed since the forward pass
        raise _no_class(call.logits, call.labels, call.ignore_index) from None
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

"""Losses that keep the kernel points of a deformable KPConv near points of the cloud and apart from each other."""

from __future__ import annotations

import numpy as np

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Computed
from kpcore.neighbors import Neighbors, checked_geometry
from kpcore.ops import Call, empty_like

__all__ = ["fitting_loss", "repulsion_loss"]

_REDUCTIONS = ("mean", "points", "sum")


def _loss_fields(kernel_points, offsets, extent, reduction, sizes, like=None):
    """The fields that both losses have: kernel points, offsets, extent, and the weight of each term of the loss."""
    kernel_points = checks.array("kernel_points", kernel_points, "K D", checks.REAL, sizes, like=like)
    if not len(kernel_points) or kernel_points.shape[1] not in checks.DIMENSIONS:
        raise ValueError(
            f"kernel_points: expected (K, D) with K of at least 1 and D = 1 to 16, got {kernel_points.shape}"
        )
    like = like or ("kernel_points", kernel_points)
    offsets = checks.array("offsets", offsets, "M K D", checks.REAL, sizes, like=like)
    queries, num = max(1, offsets.shape[0]), offsets.shape[1]
    weight = (1 / (queries * num), 1 / queries, 1.0)[checks.choice("reduction", reduction, _REDUCTIONS)]
    return {"kernel_points": kernel_points, "offsets": offsets,
            "extent": checks.length("extent", extent, kernel_points.dtype), "weight": weight}  # fmt: skip


def _loss_gradients(kernel, call, grad, needs, **fields):
    names = ("offsets", "kernel_points")
    grads = empty_like(call, names, needs)
    devices.backend(grad).run(kernel, call, grad_out=grad, **fields, **grads)
    return {name: grads[f"grad_{name}"] for name in names if name in needs}


def _fitting_result(call):
    return [((), call.offsets.dtype), (call.offsets.shape[:2], np.dtype(np.int32))]


def _fitting_vjp(call, saved, grad, needs):
    return _loss_gradients("fitting_loss_grad", call, grad, needs, nearest=saved[0])


@operator(vjp=_fitting_vjp, diff=("offsets", "kernel_points"), result=_fitting_result, outputs=("loss", "nearest"))
def fitting_loss(points: AnyArray, queries: AnyArray | None, neighbors: Neighbors, kernel_points: Array[Computed],
                 offsets: Array[Computed], extent: float, *, reduction: str = "mean"
                 ) -> Call[Computed]:  # fmt: skip
    """How far each deformed kernel point is from the nearest neighbour of its query: the published loss.

    ``Σ_q Σ_k min_i |x_i - q - (p_k + o_qk)|² / extent²`` over the neighbours i of q (L_fit of Thomas et al. 2019,
    section 3.2), reduced according to `reduction`, without ever forming an array over neighbours and kernel points. A
    kernel point that has drifted away from all points gets no gradient from the convolution; this loss pulls it back.
    Differentiable in `offsets` and `kernel_points`; see `kpcore.autodiff`.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 1 to 16
    queries : (M, D), same dtype, or None
        Positions of the output of the deformable layer. None: the points themselves.
    neighbors : Neighbors
        M rows, N points: all neighbours of the deformable layer, including those out of range of every kernel point.
    kernel_points : (K, D), dtype of the points
    offsets : (M, K, D), dtype of the points
        In the unit of the points (in the published code, in units of `extent`).
    extent : float
        Distance at which the linear influence reaches zero (σ in the paper), in the unit of the points.
    reduction : {"mean", "points", "sum"}
        The mean over queries and kernel points; the sum over kernel points of the mean over queries; or the sum.

    Returns
    -------
    () array, dtype of the points
        Zero without queries.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree. NaN is not an error: a NaN coordinate that is used makes the loss NaN.

    See Also
    --------
    repulsion_loss

    Notes
    -----
    A query without neighbours adds nothing to the sum, but counts in the mean. (In the published code its nearest point
    is the padding, at coordinates of 1e6, and each of its terms is some 1e12 / extent².)

    The nearest neighbour is the same on every machine: the squares of (x_i - q) - (p_k + o_qk) are summed in the order
    of the axes, in the dtype of the points, and of equally near neighbours the first in the row is taken. The gradient
    of a term comes from that neighbour alone, 2 (p_k + o_qk - (x_i - q)) / extent². Sums are float64; loss and
    gradients are the same bits with any number of threads and any instruction set.

    For every deformable layer, the published PyTorch code adds ``deform_fitting_power * (2 * fitting + repulsion)`` to
    the loss, both with "mean"; the TensorFlow code adds ``0.1 * (fitting + repulsion)``, with "points" and
    ``repulse_extent=1.5`` for the repulsion.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points, kernel_points = np.array([[0.0, 0], [1, 0]]), np.array([[0.0, 0], [0.5, 0]])
    >>> nb = kp.radius_search(points, None, 2.0)
    >>> loss = lambda offsets: kp.fitting_loss(points, None, nb, kernel_points, offsets, extent=0.5)
    >>> loss(np.zeros((2, 2, 2)))
    array(0.5)

    The first kernel point lies on its query; the second is half-way between two points and is pulled to the first:

    >>> out, pullback = kp.autodiff.vjp(loss, np.zeros((2, 2, 2)))
    >>> pullback(np.array(1.0))[0][0]
    array([[0., 0.],
           [1., 0.]])
    """
    sizes = {}
    points, queries = checked_geometry(points, queries, neighbors, sizes)
    fields = _loss_fields(kernel_points, offsets, extent, reduction, sizes, ("points", points))
    return Call(
        points=points, queries=queries, index=neighbors.stored_index, row_splits=neighbors.stored_row_splits,
        repulse_extent=0.0, **fields,
    )  # fmt: skip


def _repulsion_result(call):
    return [((), call.offsets.dtype)]


def _repulsion_vjp(call, saved, grad, needs):
    weight = call.weight * (1 if call.detach_others else 2)
    return _loss_gradients("repulsion_loss_grad", call, grad, needs, weight=weight)


@operator(vjp=_repulsion_vjp, diff=("offsets", "kernel_points"), result=_repulsion_result, outputs=("loss",))
def repulsion_loss(kernel_points: Array[Computed], offsets: Array[Computed], extent: float, *,
                   repulse_extent: float = 1.2, detach_others: bool = True, reduction: str = "mean"
                   ) -> Call[Computed]:  # fmt: skip
    """How close the deformed kernel points of each query are to each other: the published loss.

    ``Σ_q Σ_k Σ_{j≠k} min(0, |p_qk - p_qj| / extent - repulse_extent)²`` with ``p_qk = p_k + o_qk`` (L_rep of Thomas et
    al. 2019, section 3.2, where `repulse_extent` is 1), reduced according to `reduction`. Differentiable in `offsets`
    and `kernel_points`; see `kpcore.autodiff`.

    Parameters
    ----------
    kernel_points : (K, D) float32 or float64, D = 1 to 16
    offsets : (M, K, D), same dtype
        In the unit of the kernel points.
    extent : float
        Distance at which the linear influence reaches zero (σ in the paper), in the unit of the kernel points.
    repulse_extent : float
        Distance, in units of `extent`, from which on two kernel points do not repel each other; above zero.
    detach_others : bool
        Whether the gradient of the terms of a kernel point is taken with the other kernel points held fixed, as in the
        published code. Since each pair is in the sum twice, this gives half the derivative.
    reduction : {"mean", "points", "sum"}
        The mean over queries and kernel points k; the sum over kernel points of the mean over queries; or the sum.

    Returns
    -------
    () array, dtype of the kernel points
        Zero without queries and for a single kernel point.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree. NaN is not an error: it makes the loss NaN.

    See Also
    --------
    fitting_loss : its notes say how the published codes weight the two losses

    Notes
    -----
    Each of two kernel points at the same place adds repulse_extent² to the loss, but the gradient at distance zero has
    no direction and is 0. Sums are float64; loss and gradients are the same bits with any number of threads
    and any instruction set.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kernel_points, offsets = np.array([[0.0, 0], [1, 0]]), np.zeros((1, 2, 2))
    >>> kp.repulsion_loss(kernel_points, offsets, extent=1.0, repulse_extent=1.5)
    array(0.25)

    A step against the gradient moves the two apart:

    >>> loss = lambda o: kp.repulsion_loss(kernel_points, o, 1.0, repulse_extent=1.5, detach_others=False)
    >>> kp.autodiff.vjp(loss, offsets)[1](np.array(1.0))[0][0, :, 0]
    array([ 1., -1.])
    """
    fields = _loss_fields(kernel_points, offsets, extent, reduction, {})
    repulse_extent = checks.length("repulse_extent", repulse_extent, fields["kernel_points"].dtype)
    checks.choice("detach_others", detach_others, (False, True))
    return Call(repulse_extent=repulse_extent, detach_others=detach_others, **fields)

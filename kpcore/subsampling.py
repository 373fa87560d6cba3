"""Grid subsampling: one point per occupied voxel."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple

import numpy as np

from kpcore import config
from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Buffer, Computed, Value
from kpcore.ops import Call, empty_like

__all__ = ["Subsampled", "grid_subsample"]

_POSITIONS = ("barycenter", "center", "nearest")
_FEATURES = ("mean", "max", "nearest")
PUBLISHED: Literal["published"] = "published"


if TYPE_CHECKING:  # generic here only: torch does not recognize a generic NamedTuple (Python 3.11) as a named tuple

    class Subsampled(NamedTuple, Generic[Value, Buffer]):
        """What `grid_subsample` returns, for V voxels."""

        points: Buffer
        features: Value | None
        labels: Buffer | None
        row_splits: Buffer
        inverse: Buffer
        counts: Buffer

else:

    class Subsampled(NamedTuple):
        """What `grid_subsample` returns, for V voxels."""

        points: np.ndarray  #: (V, D) one for each voxel
        features: Array | None  #: (V, C)
        labels: np.ndarray | None  #: (V,) or (V, L) majorities
        row_splits: np.ndarray  #: (B + 1,) int64 bounds of the batch items
        inverse: np.ndarray  #: (N,) int32 voxel of each input point
        counts: np.ndarray  #: (V,) int32 number of points in each voxel


def _forward(call):
    backend, points, row_splits = devices.backend(call.points), call.points, call.row_splits
    try:
        *fields, nearest = backend.grid_subsample(
            points, call.features, call.labels, row_splits, call.voxel_size, call.origin, call.position, call.feature,
            call.by_nearest, call.ignore_label, config.get_num_threads()
        )  # fmt: skip
    except backend.NotFinite:
        raise checks.not_finite(points=points) from None
    except backend.OutOfRange:
        raise _error_of_grid(points, call.voxel_size, call.origin, row_splits) from None
    out = Subsampled(*fields)
    return out, (out.inverse, out.counts, nearest)


def _vjp(call, saved, grad, needs):
    inverse, counts, nearest = saved
    grads = empty_like(call, ("features",), needs)
    devices.backend(grad).run("grid_subsample_grad", call, inverse=inverse, counts=counts, nearest=nearest,
                              grad_out=grad, **grads)  # fmt: skip
    return {"features": grads["grad_features"]}


@operator(vjp=_vjp, diff=("features",), forward=_forward, field="features", keeps=("features",))
def grid_subsample(points: AnyArray, voxel_size: float | Sequence[float] | np.ndarray, *,
                   features: Array[Computed] | None = None, labels: AnyArray | None = None,
                   row_splits: AnyArray | None = None, origin: float | Sequence[float] | AnyArray | str = 0,
                   position: Literal["barycenter", "center", "nearest"] = "barycenter",
                   feature: Literal["mean", "max", "nearest"] = "mean", ignore_label: int | None = None
                   ) -> Call[Subsampled[Computed, np.ndarray]]:  # fmt: skip
    """Replace the points of each voxel by one: their barycentre, the voxel's centre or the point nearest that.

    The voxel of a point is ``floor((p - origin) / voxel_size)`` along each axis, with a true division, in the dtype of
    the points. By default all calls share one grid, so that parts of a scene have the same voxels. The result is sorted
    by batch item and then along the Morton curve of the voxel index, counted from the lowest voxel of the item (x in
    the lowest bits), which keeps neighbours close in memory. The result of an item does not depend on other items.
    Differentiable in `features`, through the field ``features`` of the result; see `kpcore.autodiff`.

    Parameters
    ----------
    points : (N, D) float32 or float64, D = 2 or 3
    voxel_size : float, or D of them
        Edge of a voxel, or its edge along each axis, in the unit of the points, above zero.
    features : (N, C) float32 or float64, optional
    labels : (N,) or (N, L) of any integer dtype, optional
        A voxel gets its most frequent label, of equally frequent ones the smallest; in each of the L columns by itself.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.
    origin : float, D of them, (B, D) of the dtype of the points, or "published"
        A corner of the grid: one for all items, or one for each (B, D). Numbers are rounded to the dtype of the points
        first, like `voxel_size`. "published": for each item ``floor(lowest * (1 / voxel_size)) * voxel_size``, computed
        in the dtype of the points, where `lowest` holds its lowest coordinates, as in the C++ code of KPConv and of the
        projects that copied it. If the points lie on a lattice, rounding decides on which side of a voxel boundary a
        point is, and voxels differ from those with origin 0.
    position : {"barycenter", "center", "nearest"}
        The point that replaces a voxel: the mean of its points; its centre ``(index + 0.5) * voxel_size + origin``,
        computed in float64 and rounded to the dtype of the points; or its point nearest to that centre before rounding
        (squared distances in float64, summed x first; of equally near points the one with the smallest index).
    feature : {"mean", "max", "nearest"}
        The features of a voxel: the mean over its points; the maximum of each channel, NaN if one of them is NaN; or
        the features of its point nearest to the centre. Ignored without `features`.
    ignore_label : int, optional
        Points with this label do not vote, in the columns where they have it; a voxel with no other points gets this
        label. The dtype of the labels must be able to hold it.

    Returns
    -------
    Subsampled

    Raises
    ------
    ValueError
        For coordinates or origins that are NaN or infinite, for more than 2**21 voxels along an axis of an item, or for
        shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Sums are float64 and taken relative to the first point of a voxel, so that barycentres are exact to the last bit far
    from the origin too; features likewise. No result depends on the number of threads; centres, nearest points and
    maxima are the same bits on every machine.

    The gradient of a mean is divided equally among the points of the voxel; that of a maximum goes to the point with
    the smallest index that has this value, the first NaN if there is one; that of "nearest" to the nearest point.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.array([[0.1, 0.0], [0.3, 0.2], [1.5, 0.5]])
    >>> sub = kp.grid_subsample(points, 1.0, labels=np.array([2, 1, 7]))
    >>> sub.points
    array([[0.2, 0.1],
           [1.5, 0.5]])
    >>> sub.labels, sub.inverse, sub.counts
    (array([1, 7]), array([0, 0, 1], dtype=int32), array([2, 1], dtype=int32))
    >>> kp.grid_subsample(points, (2.0, 1.0), origin=0.25, position="center").points
    array([[-0.75, -0.25],
           [ 1.25, -0.25],
           [ 1.25,  0.75]])

    The mean of a feature, and its gradient with respect to the feature of each point:

    >>> mean = lambda f: kp.grid_subsample(points, 1.0, features=f).features
    >>> out, pullback = kp.autodiff.vjp(mean, np.array([[10.0], [20.0], [30.0]]))
    >>> out.ravel(), pullback(np.ones_like(out))[0].ravel()
    (array([15., 30.]), array([0.5, 0.5, 1. ]))
    """
    return _call(points, voxel_size, features, labels, row_splits, origin, position, feature, ignore_label)


def _call(points, voxel_size, features, labels, row_splits, origin, position, feature, ignore_label, known=False):
    """The checked call of `grid_subsample`; `known`: the row_splits were checked before."""
    sizes = {}
    points = checks.points_array("points", points, sizes)
    voxel_size = checks.per_axis("voxel_size", voxel_size, points.shape[1], checks.length, points.dtype)
    features, labels = checked_rows(features, labels, sizes)
    if ignore_label is not None:
        if labels is None:
            raise ValueError("ignore_label: expected None, because there are no labels, got a number")
        limits = np.iinfo(labels.dtype)
        ignore_label = checks.integer("ignore_label", ignore_label, limits.min, limits.max)
        ignore_label -= 2**64 * (ignore_label >= 2**63)  # kernels take the same 64 bits as a signed integer
    row_splits = checks.splits_array("row_splits", row_splits, len(points), "points", sizes, known=known)
    return Call(
        points=points, features=features, labels=labels, row_splits=row_splits, voxel_size=voxel_size,
        origin=_origin(origin, points, len(row_splits) - 1, sizes),
        position=checks.choice("position", position, _POSITIONS),
        feature=checks.choice("feature", feature, _FEATURES),
        by_nearest=position == "nearest" or (feature == "nearest" and features is not None),
        ignore_label=ignore_label,
    )  # fmt: skip


def checked_rows(features: object, labels: object, sizes: checks.Sizes) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Features and labels, checked to have N rows, where `sizes` has N from the points; None stays None.

    Labels may have columns.
    """
    if features is not None:
        features = checks.array("features", features, "N C", checks.FEATURES, sizes)
    if labels is not None:
        shape = "N L" if getattr(labels, "ndim", 1) == 2 else "N"
        labels = checks.array("labels", labels, shape, checks.ANY_INTEGERS, sizes)
    return features, labels


def subsample_level(
    voxel_size: float,
    origin: Literal[0, "published"],
    points: np.ndarray,
    features: np.ndarray | None,
    labels: np.ndarray | None,
    row_splits: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]:
    """(points, features, labels, row_splits) of the next level of a pyramid; row_splits are not checked again."""
    call = _call(points, voxel_size, features, labels, row_splits, origin, "barycenter", "mean", None, known=True)
    return _forward(call)[0][:4]


def common_origin(origin: object) -> Literal[0, "published"]:
    """An origin for grids of several voxel sizes, checked: 0 or "published"."""
    if isinstance(origin, numbers.Real) and origin == 0:
        return 0
    checks.choice("origin", origin, (0, PUBLISHED))
    return PUBLISHED


def _origin(origin, points, num_items, sizes):
    """The checked origin: (D,) NumPy, or (B, D) on the device of the points; None for "published".

    The kernels compute the published origin.
    """
    if isinstance(origin, str):
        checks.choice("origin", origin, (PUBLISHED,))
        return None
    ndim = getattr(origin, "ndim", 0)
    if ndim > 1 or (ndim and not isinstance(origin, np.ndarray)):
        sizes = sizes | {"B": (num_items, "row_splits")}
        return checks.array("origin", origin, "B D", checks.REAL, sizes, like=("points", points))
    return checks.per_axis("origin", origin, points.shape[1], checks.number, points.dtype)


def _error_of_grid(points, voxel_size, origin, row_splits):
    """The error that says why the voxels of a call cannot be numbered: `origin`, `voxel_size` or `row_splits`."""
    points, row_splits = devices.on_host(points), devices.on_host(row_splits)
    if origin is None:
        origin = 0
    elif origin.ndim == 2:
        items = np.repeat(np.arange(len(origin)), np.diff(row_splits))
        origin = devices.on_host(origin)[items]
        bad = ~np.isfinite(origin).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            return ValueError(f"origin: expected finite numbers, got {origin[row].tolist()} in row {items[row]}")
    with np.errstate(over="ignore"):
        largest = np.abs(points - origin).max(0)
        overflowing = ~np.isfinite(largest / voxel_size)
    if overflowing.any():
        axis = int(np.argmax(overflowing))
        return ValueError(
            f"voxel_size: expected a size for which point / voxel_size does not overflow {points.dtype}, got "
            f"{voxel_size[axis]:.4g} for coordinates of up to {largest[axis]:.4g} from the origin"
        )
    extent = [np.ptp(p.astype(np.float64), axis=0) for p in np.split(points, row_splits[1:-1]) if len(p)]
    extent = np.max(extent, axis=0)
    voxels = extent / voxel_size
    if voxels.max() >= 2**21 - 1:
        axis = int(np.argmax(voxels))
        return ValueError(
            f"voxel_size: expected at most 2**21 voxels along an axis, got {voxels[axis]:.4g} "
            f"(an extent of {extent[axis]:.4g} in voxels of {voxel_size[axis]:.4g})"
        )
    return ValueError(
        f"row_splits: expected a batch whose voxels can be numbered in 64 bits, got {len(row_splits) - 1} items of up "
        f"to {' x '.join(f'{v:.4g}' for v in voxels)} voxels; subsample it in smaller batches"
    )

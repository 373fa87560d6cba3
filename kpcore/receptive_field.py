"""Effective receptive fields: how much each input point or pixel influences an output, and how large that region is.

The effective receptive field of an output position j (Luo et al. 2016; Thomas et al. 2019, section 4.4; Gao et al.
2020) is the size of the gradient ``d y_j / d x_i`` at each input position i. It lies within the theoretical receptive
field, the input positions from which any path leads to j, and is usually much smaller.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kpcore import autodiff
from kpcore.backends import checks, devices

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from kpcore.backends.devices import AnyArray

__all__ = [
    "effective_receptive_field",
    "receptive_field_moments",
    "receptive_field_radius",
    "receptive_field_share",
    "receptive_field_size",
]

_LAYOUTS = {None: 1, "NCHW": 1, "NHWC": 3}  # the axis of the channels; None: (N, C), features of points
# Searches compare distances with the radius in the dtype of the points, so that a neighbour may be farther away by the
# rounding of float32, 1e-7 of the radius, in each layer of a stack.
_MARGIN = 1 + 1e-5
# Gradients outside of the theoretical field are not noticed up to this many roundings of the largest value:
# convolutions by a transform (Winograd, FFT), which libraries for GPUs may choose, have no exact zeros there.
_ROUNDINGS = 16


def effective_receptive_field(fn: Callable[[Any], Any], x: AnyArray, where: ArrayLike, *,
                              layout: Literal["NCHW", "NHWC"] | None = None,
                              channels: int | Sequence[int] | None = None,
                              reduce: Literal["abs", "square"] = "abs", reach: float | None = None,
                              points: AnyArray | None = None, queries: AnyArray | None = None,
                              points_row_splits: AnyArray | None = None, queries_row_splits: AnyArray | None = None,
                              stride: float | Sequence[float] = 1, offset: float | Sequence[float] = 0
                              ) -> np.ndarray:  # fmt: skip
    """The effective receptive field of output positions: the sizes of the gradients of the outputs there.

    ``sum_c |d y_j / d x_ic|``, or with "square" the sum of the squares, for each input place i; ``y_j`` is the sum of
    the output channels `channels` at position j. `fn` is evaluated once, and differentiated once for each position, or
    with `reach` once for many positions.

    Parameters
    ----------
    fn : callable
        A function of one array: of NumPy or CuPy arrays, differentiated by the tape of `kpcore.autodiff`; of torch
        tensors; or of JAX arrays. For points it maps (N, C) to (M, C'), for images (B, C, H, W) to (B, C', H', W'), or
        both with the channels last. Parameters that it uses should not require a gradient: with torch call
        ``module.requires_grad_(False)``, on the tape pass arrays.
    x : (N, C) array, or with a `layout` (B, C, H, W) or (B, H, W, C), of floats
        Where `fn` is differentiated. It decides the framework.
    where : (P,) int, or with a `layout` (P, 3) int
        The output positions: rows of the output, or (image, row, column).
    layout : {None, "NCHW", "NHWC"}
        None: features of points. The others: images, as the input and the output of `fn` have them.
    channels : int or sequence of int, optional
        The output channels in the sum ``y_j``; all by default. Gradients of several channels may cancel each other.
    reduce : {"abs", "square"}
        What is summed over the input channels: absolute values or squares of the gradient.
    reach : float, optional
        Radius of the theoretical receptive field: of the points that an output can depend on, in the unit of `points`;
        or of its pixels along either axis, in pixels of the input. The networks of `kpcore.nn` state it as their
        `reach`. Positions in different batch items, or more than twice that apart, then share a pass: they are
        differentiated together, and each gets the gradient within `reach` around it. With ``math.inf`` only positions
        in different batch items do. Without `reach` none do, and the arguments below are not used.
    points : (N, D) array, optional
        Positions of the rows of `x`. Required with a finite `reach`.
    queries : (M, D) array, optional
        Positions of the rows of the output; by default it has the rows of `x`.
    points_row_splits, queries_row_splits : (B + 1,) int64, optional
        Bounds of the batch items in the rows of `x` and of the output; by default there is one item, and `queries` that
        are not given have those of the points.
    stride, offset : float, or a pair of them for rows and columns
        For images: the theoretical field of output pixel r is centred on the input pixel ``stride * r + offset``.
        Convolutions with an odd number K of taps that are padded by (K - 1) / 2 have the product of their strides, and
        0.

    Returns
    -------
    (P, N) float64 array, or (P, H, W) with a `layout`
        For each position, a value for each row of `x`, or for each pixel of its image. A NumPy array, in all
        frameworks; it is not normalised.

    Raises
    ------
    ValueError
        If the gradient is not zero at a place that is farther than `reach` from all positions of the pass, which shows
        that `reach` is too small, or in another image than that of the position; for positions or channels that the
        output does not have, shapes that do not agree, and a gradient that is not finite (as that of a square root at
        zero).
    TypeError
        If `x` is not an array of floats, or the result of `fn` is not computed from it by differentiable operations.
        JAX does not tell: there the field is zero.

    Notes
    -----
    Channels are summed in float64; gradients have the dtype of `x`. If `reach` is too small, but the gradient outside
    of it lies within `reach` of another position, it is counted there and is not noticed.

    The gradient is the full one. To keep offsets of deformable convolutions constant, as Gao et al. (2020) do, call the
    network with ``detach_offsets=True``.

    Examples
    --------
    The sum over neighbours within 1, twice: a place counts as often as there are paths from it.

    >>> import numpy as np, kpcore as kp
    >>> points = np.arange(8.0)[:, None]
    >>> nb = kp.radius_search(points, None, 1.0)
    >>> fn = lambda x: kp.neighbor_reduce(kp.neighbor_reduce(x, nb, "sum"), nb, "sum")
    >>> kp.effective_receptive_field(fn, np.ones((8, 1)), [3, 7])
    array([[0., 1., 2., 3., 2., 1., 0., 0.],
           [0., 0., 0., 0., 0., 1., 2., 2.]])
    """
    checks.choice("layout", layout, tuple(_LAYOUTS))
    checks.choice("reduce", reduce, ("abs", "square"))
    axis, is_image = _LAYOUTS[layout], layout is not None
    _check_input(x, is_image)
    out_shape, pullback = _differentiated(fn, x)
    _check_output(out_shape, tuple(x.shape), is_image)
    grid, out_grid = (shape[:axis] + shape[axis + 1 :] for shape in (tuple(x.shape), out_shape))
    where = _checked_positions(where, out_grid)
    channels = _checked_channels(channels, out_shape[axis])

    # The input places are rows; those of batch item b are bounds[b] to bounds[b + 1]. A field of an image has the rows
    # of its item, a field of points has all rows.
    shape = grid[1:] if is_image else grid
    bounds, items = np.array([0, *grid]), np.zeros(len(where), np.int64)
    if is_image:
        bounds, items = np.arange(grid[0] + 1) * math.prod(shape), where[:, 0]
    if reach is None:
        passes = [[position] for position in range(len(where))]
    else:
        reach = reach if reach == math.inf else _MARGIN * checks.not_negative("reach", reach)
        if is_image:
            places, centres = np.tile(_coordinates(shape), (grid[0], 1)), _centres(where[:, 1:], stride, offset)
        else:
            places, out_places, bounds, out_bounds = _checked_places(
                *grid, *out_grid, reach, points, queries, points_row_splits, queries_row_splits
            )
            centres, items = out_places[where[:, 0]], np.searchsorted(out_bounds, where[:, 0], side="right") - 1
        distance = partial(np.linalg.norm, ord=np.inf if is_image else 2, axis=-1)
        passes = _passes(items, centres, 2 * reach, distance)

    fields = np.zeros((len(where), math.prod(shape)))
    for positions in passes:
        seed = np.zeros((*out_grid, out_shape[axis]), np.float32)
        seed[(*where[positions].T[..., None], channels)] = 1
        gradient = pullback(np.moveaxis(seed, -1, axis))
        values = (np.abs(gradient) if reduce == "abs" else gradient * gradient).sum(axis=axis).reshape(-1)
        outside = values.copy()
        for position in positions:
            item = slice(bounds[items[position]], bounds[items[position] + 1])
            near = slice(None) if reach is None else distance(places[item] - centres[position]) <= reach
            fields[position, slice(None) if is_image else item][near] = values[item][near]
            outside[item][near] = 0
        _check_outside(outside, values, reduce, reach, x.dtype)
    return fields.reshape(len(where), *shape)


def _differentiated(fn, x):
    """(shape of fn(x), pullback), in the framework of x.

    The pullback takes the gradient of a number with respect to fn(x), a NumPy array, and returns that with respect to
    x, a float64 NumPy array. It may be called several times.
    """
    if devices.is_array(x):
        out, pullback = autodiff.vjp(fn, x)
        return out.shape, lambda seed: _on_host(pullback(devices.to_device_of(out, seed.astype(out.dtype)))[0])
    if _is_of("torch", "Tensor", x):
        return _differentiated_by_torch(fn, x)
    jax = sys.modules["jax"]
    out, pullback = jax.vjp(fn, x)
    if not isinstance(out, jax.Array):
        raise TypeError(f"fn: expected a JAX array as its result, got {type(out).__name__}")
    if not jax.numpy.issubdtype(out.dtype, np.floating):
        raise _not_computed_from_x()
    return out.shape, lambda seed: _on_host(pullback(jax.numpy.asarray(seed, out.dtype))[0])


def _differentiated_by_torch(fn, x):
    torch = sys.modules["torch"]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = fn(x)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"fn: expected a tensor as its result, got {type(out).__name__}")

    def pullback(seed):
        seed = torch.from_numpy(np.ascontiguousarray(seed)).to(out)
        (gradient,) = torch.autograd.grad(out, x, seed, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise _not_computed_from_x()
        return _on_host(gradient)

    if not out.requires_grad:
        raise _not_computed_from_x()
    return tuple(out.shape), pullback


def _not_computed_from_x():
    return TypeError("fn: expected a result computed from x by differentiable operations, got one without a gradient")


def _on_host(value):
    """An array of any framework as a NumPy array, in float64 if it holds floats."""
    if _is_of("torch", "Tensor", value):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    value = devices.on_host(value) if devices.is_array(value) else np.asarray(value)
    return value if value.dtype.kind in "iub" else value.astype(np.float64, copy=False)


def _is_of(framework, name, value):
    """Whether a value is of a type of torch or JAX, which are not imported for that."""
    module = sys.modules.get(framework)
    return module is not None and isinstance(value, getattr(module, name))


def _check_input(x, is_image):
    if devices.is_array(x):
        is_real = devices.is_real(x)
    elif _is_of("torch", "Tensor", x):
        is_real = x.is_floating_point()
    elif _is_of("jax", "Array", x):
        is_real = sys.modules["jax"].numpy.issubdtype(x.dtype, np.floating)
    else:
        raise TypeError(f"x: expected a NumPy, CuPy or JAX array or a torch tensor, got {type(x).__name__}")
    if not is_real:
        raise TypeError(f"x: expected floats, which have gradients, got {x.dtype}")
    if x.ndim != (4 if is_image else 2):
        expected = "four dimensions, because layout says that it holds images" if is_image else "(N, C)"
        raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")


def _check_output(out_shape, shape, is_image):
    if len(out_shape) != len(shape) or (is_image and out_shape[0] != shape[0]):
        expected = f"four dimensions with {shape[0]} images, as x" if is_image else "shape (M, C)"
        raise ValueError(f"fn: expected a result of {expected}, got {tuple(out_shape)}")


def _checked_positions(where, grid):
    """(P, 1) rows, or (P, 3) positions in images, each within `grid`, the shape of the output without channels."""
    where = _on_host(where)
    where = where.astype(np.int64) if not where.size else where
    if where.dtype.kind not in "iu":
        raise TypeError(f"where: expected integers, got {where.dtype}")
    if where.size and (where.ndim, where.shape[-1:]) != ((1, where.shape) if len(grid) == 1 else (2, (3,))):
        expected = "(P,), rows of the output" if len(grid) == 1 else "(P, 3), each an image, a row and a column"
        raise ValueError(f"where: expected {expected}, got {where.shape}")
    where = where.reshape(-1, len(grid)).astype(np.int64)
    bad = ((where < 0) | (where >= grid)).any(axis=1)
    if bad.any():
        number = int(np.argmax(bad))
        raise ValueError(f"where: expected positions in an output of {grid}, got {where[number].tolist()} at {number}")
    return where


def _checked_channels(channels, num):
    if channels is None:
        return np.arange(num)
    chosen = channels if isinstance(channels, (Sequence, np.ndarray)) else [channels]
    checked = [checks.integer("channels", channel, 0, num - 1) for channel in chosen]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"channels: expected different output channels, at least one, got {checked}")
    return np.array(checked)


def _checked_places(num, num_out, reach, points, queries, points_row_splits, queries_row_splits):
    """Positions of the rows of x and of the output, and for both the bounds of the batch items in these rows."""
    device = {"device": ("cpu", "points")}
    name, needed = ("queries", queries) if reach < math.inf else ("queries_row_splits", queries_row_splits)
    if needed is None and num_out != num:
        raise ValueError(f"{name}: expected those of the output, which has {num_out} rows and x has {num}, got None")
    splits, out_splits = (None if s is None else _on_host(s) for s in (points_row_splits, queries_row_splits))
    if queries is None and out_splits is None:
        out_splits = splits
    if reach == math.inf:  # positions of one item never share a pass, wherever they are
        points, queries = np.zeros((num, 0)), np.zeros((num_out, 0))
    elif points is None:
        raise ValueError("points: expected the positions of the rows of x, because reach is a distance, got None")
    else:
        sizes = {"N": (num, "x"), "M": (num_out, "the output")} | device
        points = checks.array("points", _on_host(points), "N D", checks.REAL, sizes)
        queries = points if queries is None else checks.array("queries", _on_host(queries), "M D", checks.REAL, sizes)
    splits = checks.splits_array("points_row_splits", splits, num, "x", device)
    out_splits = checks.splits_array("queries_row_splits", out_splits, num_out, "the output", device)
    if len(splits) != len(out_splits):
        raise ValueError(f"queries_row_splits: expected ({len(splits)},) to match points_row_splits, got "
                         f"({len(out_splits)},)")  # fmt: skip
    return points, queries, splits, out_splits


def _centres(pixels, stride, offset):
    """(P, 2) places in the input on which the theoretical fields of output pixels are centred."""
    real = np.dtype(np.float64)
    return pixels * checks.per_axis("stride", stride, 2, checks.length, real) + checks.per_axis(
        "offset", offset, 2, checks.number, real
    )


def _coordinates(size):
    """(H W, 2) float64 rows and columns of the pixels of an image."""
    return np.stack(np.indices(size), axis=-1).reshape(-1, len(size)).astype(np.float64)


def _passes(items, centres, apart, distance):
    """Lists of positions, in each of which those of one batch item are more than `apart` from each other.

    Each position goes into the first list in which it may be (greedy colouring).
    """
    passes, pass_of = [], np.zeros(len(items), np.int64)
    for position in range(len(items)):
        before = slice(position)
        near = (items[before] == items[position]) & (distance(centres[before] - centres[position]) <= apart)
        taken = set(pass_of[before][near].tolist())
        pass_of[position] = next(number for number in range(len(passes) + 1) if number not in taken)
        if pass_of[position] == len(passes):
            passes.append([])
        passes[pass_of[position]].append(position)
    return passes


def _check_outside(outside, values, reduce, reach, dtype):
    """Check that the gradient of a pass is finite, and zero at all places that belong to none of its positions."""
    if not np.isfinite(values).all():
        raise ValueError(f"fn: expected a finite gradient, got one with {np.count_nonzero(~np.isfinite(values))} of "
                         f"{values.size} places that are NaN or infinite")  # fmt: skip
    rounding = _ROUNDINGS * np.finfo(np.float64 if "float64" in str(dtype) else np.float32).eps
    largest = values.max(initial=0)
    if outside.max(initial=0) <= largest * (rounding if reduce == "abs" else rounding**2):
        return
    share = outside.sum() / values.sum()
    if reach is None:
        raise ValueError(f"fn: expected a result for each image that depends on that image alone, got {share:.2g} of a "
                         "gradient in other images; pass one image at a time")  # fmt: skip
    beyond = "farther away" if reach < math.inf else "in other batch items"
    raise ValueError(f"reach: expected the radius of the theoretical receptive field, got {reach / _MARGIN:.6g}; "
                     f"{share:.2g} of the gradient is {beyond}")  # fmt: skip


# ---- how large a field is


def receptive_field_size(fields: np.ndarray, *, level: float = 0.0455) -> np.ndarray:
    """The square root of the number of places with more than a fraction of the largest value, (P,).

    With the default fraction, that beyond two standard deviations of a normal distribution, it is the effective size of
    Luo et al. (2016), in pixels. For points on a surface with one point in each voxel it is in voxels.

    Parameters
    ----------
    fields : (P, N) or (P, H, W) float64
        As `effective_receptive_field` returns them; ``field[None]`` for a single one.
    level : float
        The fraction, from 0 to 1.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.receptive_field_size(np.array([[[0.0, 1, 2], [1, 30, 2], [0, 2, 2]]]))
    array([2.23606798])
    """
    fields, level = _checked_fields(fields), checks.between("level", level, 0, 1)
    return np.sqrt((fields > level * fields.max(axis=1, initial=0, keepdims=True)).sum(axis=1))


def receptive_field_radius(fields: np.ndarray, centres: ArrayLike, *, share: float = 0.95,
                           positions: AnyArray | None = None) -> np.ndarray:  # fmt: skip
    """The radius of the smallest ball around the centre that holds a share of the mass, (P,); NaN without any mass.

    Parameters
    ----------
    fields : (P, N) or (P, H, W) float64
        As `effective_receptive_field` returns them.
    centres : (P, D)
        The positions of the outputs among `positions`; of images in pixels of the input, rows first.
    share : float
        Above 0, at most 1.
    positions : (N, D) array
        The positions of the points; for images none, rows and columns are numbered.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.receptive_field_radius(np.array([[0.0, 1, 2, 1, 0]]), [[2.0]], positions=np.arange(5.0)[:, None])
    array([1.])
    """
    flat, positions = _checked_fields(fields), _field_positions(fields, positions)
    centres = _checked_centres(centres, flat, positions)
    if not 0 < checks.number("share", share, np.dtype(np.float64)) <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
    radii = np.full(len(flat), np.nan)
    for number, (field, centre) in enumerate(zip(flat, centres, strict=True)):
        distances = np.linalg.norm(positions - centre, axis=1)
        order = np.argsort(distances)
        mass = np.cumsum(field[order])
        if len(mass) and mass[-1] > 0:
            radii[number] = distances[order[np.argmax(mass >= share * mass[-1])]]
    return radii


def receptive_field_moments(fields: np.ndarray, centres: ArrayLike | None = None, *,
                            positions: AnyArray | None = None) -> np.ndarray:  # fmt: skip
    """The second moments of fields along each axis, (P, D): means of the squared differences from the centre.

    NaN without any mass. About its centroid they are the variances; n layers of K x K ones have n (K² - 1) / 12 each.

    Parameters
    ----------
    fields : (P, N) or (P, H, W) float64
        As `effective_receptive_field` returns them.
    centres : (P, D), optional
        By default the centroid of each field.
    positions : (N, D) array
        As in `receptive_field_radius`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.receptive_field_moments(np.array([[[0.0, 1, 0], [1, 1, 1], [0, 1, 0]]]))
    array([[0.4, 0.4]])
    """
    flat, positions = _checked_fields(fields), _field_positions(fields, positions)
    with np.errstate(invalid="ignore"):
        mass = flat / flat.sum(axis=1, keepdims=True)
    centres = mass @ positions if centres is None else _checked_centres(centres, flat, positions)
    moments = np.empty(centres.shape)
    for number, centre in enumerate(centres):
        moments[number] = mass[number] @ (positions - centre) ** 2
    return moments


def receptive_field_share(fields: np.ndarray, mask: ArrayLike) -> np.ndarray:
    """The share of the mass of fields that is inside a mask, such as that of an object, (P,); NaN without any mass.

    Parameters
    ----------
    fields : (P, N) or (P, H, W) float64
        As `effective_receptive_field` returns them.
    mask : bool, shape of `fields` or of one of them

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.receptive_field_share(np.array([[1.0, 2, 1, 0]]), [True, True, False, False])
    array([0.75])
    """
    flat, mask = _checked_fields(fields), _on_host(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    if mask.shape not in (fields.shape, fields.shape[1:]):
        raise ValueError(f"mask: expected {fields.shape[1:]} or {fields.shape} to match fields, got {mask.shape}")
    inside = np.where(mask, fields, 0).reshape(flat.shape).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return inside / flat.sum(axis=1)


def _checked_fields(fields):
    """Fields as (P, N), those of images as (P, H W) of images, in float64."""
    if not isinstance(fields, np.ndarray):
        raise TypeError(f"fields: expected a NumPy array, got {type(fields).__name__}")
    if fields.ndim not in (2, 3):
        raise ValueError(f"fields: expected (P, N) or (P, H, W), got {fields.shape}")
    if not ((fields >= 0) & (fields < np.inf)).all():
        raise ValueError(f"fields: expected finite numbers of at least zero, got {fields.min()} to {fields.max()}")
    return fields.reshape(len(fields), math.prod(fields.shape[1:])).astype(np.float64, copy=False)


def _field_positions(fields, positions):
    """(N, D) positions of the places of a field; of the pixels of an image if there are none."""
    if fields.ndim == 3:
        if positions is not None:
            raise ValueError("positions: expected None for fields of images, whose rows and columns are numbered")
        return _coordinates(fields.shape[1:])
    if positions is None:
        raise ValueError("positions: expected those of the points for fields (P, N), got None")
    return checks.array("positions", _on_host(positions), "N D", checks.REAL, {"N": (fields.shape[1], "fields")})


def _checked_centres(centres, fields, positions):
    sizes = {"P": (len(fields), "fields"), "D": (positions.shape[1], "the positions")}
    return checks.array("centres", np.asarray(_on_host(centres), np.float64), "P D", checks.REAL, sizes)

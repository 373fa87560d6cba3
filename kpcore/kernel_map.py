"""Kernel maps of sparse convolutions on integer coordinates, and dense grids from them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, Literal, NamedTuple

import numpy as np

from kpcore import config
from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Array, Buffer, Computed
from kpcore.neighbors import Neighbors, checked, new_list, transposed
from kpcore.ops import OPS, Call

__all__ = ["KernelMap", "kernel_map", "to_dense"]

_RULES = ("submanifold", "spconv", "minkowski")
_INT32 = (np.dtype(np.int32),)
_LARGEST = 2**31 - 1


class Kernel(NamedTuple):
    """What a kernel map was made for: the arguments of `kernel_map`, one number for each axis."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    rule: str


@dataclass(frozen=True, eq=False, repr=False)
class KernelMap(Generic[Buffer]):
    """Which inputs each output of a sparse convolution reads, and by which kernel cell; what `kernel_map` returns.

    Pair e of `neighbors` belongs to kernel cell ``kernel_index[e]``. A row is in order of the kernel cells, and the
    pairs of one cell (inputs with equal coordinates) in order of the inputs. Kernel cells are numbered in C order of
    the axes of the coordinates, so that filters (k0, k1, ..., Cin, Cout) are reshaped to (K, Cin, Cout). Frozen,
    compared by identity, picklable. One map serves all layers with the same coordinates and kernel, and pooling::

        kp.neighbor_reduce(features, m.neighbors, "max")  # sparse max pooling; "mean" for the mean of the inputs
    """

    neighbors: Neighbors  #: a row for each of M outputs, N inputs
    kernel_index: Buffer  #: (E,) int32, 0 to num_kernels - 1
    out_coords: Buffer  #: (M, D) int32
    out_row_splits: Buffer  #: (B + 1,) int64 bounds of the batch items of the outputs
    in_coords: Buffer  #: (N, D) int32
    in_row_splits: Buffer  #: (B + 1,) int64
    kernel: Kernel  #: size, stride, dilation, padding and rule
    is_transposed: bool = False  #: whether `transpose` made it
    # stored_transposed is None until transpose() is called; of the map that it makes, a weak reference to this one,
    # since maps that refer to each other are only freed by the garbage collector. stored_source: of a map with arrays
    # of a framework, the map with the arrays that they were converted from, and the function that converts them.
    stored_transposed: KernelMap[Buffer] | weakref.ref[KernelMap[Buffer]] | None = field(default=None, kw_only=True)
    stored_source: tuple[KernelMap[np.ndarray], Callable[[Any], Any]] | None = field(default=None, kw_only=True)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The number of kernel cells along each axis."""
        return self.kernel.size

    @property
    def num_kernels(self) -> int:
        """K, the number of kernel cells."""
        return math.prod(self.kernel_size)

    def __repr__(self) -> str:
        kernel = " x ".join(map(str, self.kernel_size))
        return f"KernelMap({self.neighbors.num_queries} outputs, {self.neighbors.num_points} inputs, kernel {kernel})"

    def __reduce__(self) -> tuple[object, ...]:
        if self.stored_source is not None:
            return KernelMap.converted, self.stored_source
        return KernelMap, (self.neighbors, self.kernel_index, self.out_coords, self.out_row_splits, self.in_coords,
                           self.in_row_splits, self.kernel, self.is_transposed)  # fmt: skip

    def transpose(self) -> KernelMap[Buffer]:
        """The map of the inverse layer: inputs and outputs exchanged, each pair with the kernel cell that it has.

        It brings features back to the coordinates from which a strided layer came, as SparseInverseConv3d and
        MinkowskiConvolutionTranspose do. Made once and kept; ``m.transpose().transpose()`` is ``m``.
        """
        back = self.stored_transposed
        if isinstance(back, weakref.ref):
            back = back()
        if back is None:
            if self.stored_source is None:
                back = self._transposed()
            else:
                source, convert = self.stored_source
                back = source.transpose().converted(convert)
            object.__setattr__(back, "stored_transposed", weakref.ref(self))
            object.__setattr__(self, "stored_transposed", back)
        return back

    def _transposed(self):
        neighbors = checked(self.neighbors)
        index, row_splits = neighbors.stored_index, neighbors.stored_row_splits
        sizes = {"E": (len(index), "neighbors")} | checks.device_of(("neighbors", index))
        kernel_index = checks.array("kernel_index", self.kernel_index, "E", _INT32, sizes)
        index, row_splits, kernel_index = transposed(index, row_splits, kernel_index, neighbors.num_points)
        devices.backend(index).run("sort_pairs", row_splits=row_splits, num_kernels=self.num_kernels, index=index,
                                   kernel_index=kernel_index)  # fmt: skip
        return KernelMap(new_list(index, row_splits, neighbors.num_queries), kernel_index, self.in_coords,
                         self.in_row_splits, self.out_coords, self.out_row_splits, self.kernel,
                         not self.is_transposed)  # fmt: skip

    def converted(self, convert: Callable[[Any], Any]) -> KernelMap[Any]:
        """This map with its arrays replaced by ``convert(array)``, those of a framework; so is its transpose."""
        arrays = self.kernel_index, self.out_coords, self.out_row_splits, self.in_coords, self.in_row_splits
        return KernelMap(self.neighbors, *map(convert, arrays), self.kernel, self.is_transposed,
                         stored_source=(self, convert))  # fmt: skip


def kernel_map(coords: AnyArray, out_coords: AnyArray | None = None, *, kernel_size: int | Sequence[int],
               stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
               shape: Sequence[int] | None = None,
               rule: Literal["submanifold", "spconv", "minkowski"] = "submanifold",
               row_splits: AnyArray | None = None, out_row_splits: AnyArray | None = None
               ) -> KernelMap[np.ndarray]:  # fmt: skip
    """Which inputs each output of a sparse convolution reads, and by which kernel cell.

    Along each axis, kernel cell k (0 to K - 1) of an output at o reads the inputs at i. A correlation: the kernel is
    not flipped. Where `out_coords` are not passed, the rule says which outputs there are::

        rule            i                                              outputs
        "submanifold"   o + (k - (K - 1) // 2) dilation                the inputs, in their order
        "spconv"        o stride - padding + k dilation                all o that read an input
        "minkowski"     o + (k - (K - 1) / 2) dilation for odd K,      the different floor(i / stride) stride
                        o + k dilation for even K

    "submanifold" is SubMConv3d of spconv and, for even K too, SparseConv of Open3D; "spconv" is SparseConv3d;
    "minkowski" is MinkowskiConvolution. Outputs of the last two are sorted by batch item and then by coordinates in
    lexicographic order.

    Parameters
    ----------
    coords : (N, D) int32, D = 1 to 4
        Voxels, such as ``floor(points / voxel_size)``; may be negative. Each of several inputs with equal coordinates
        makes a pair.
    out_coords : (M, D) int32, optional
        Coordinates of the outputs, in any order. Without them the rule says which outputs there are.
    kernel_size : int, or D of them
        Any number of cells, also along a single axis.
    stride, dilation : int, or D of them
        At least 1. "submanifold" has no stride. With "minkowski" and `out_coords` the stride has no effect.
    padding : int, or D of them
        Of "spconv" only.
    shape : D ints, optional
        Of "spconv" without `out_coords`: the inputs are from 0 to below `shape`, and the outputs from 0 to below
        ``(shape + 2 padding - dilation (K - 1) - 1) // stride + 1``, as in a dense convolution and in spconv, whose
        `spatial_shape` this is. Without it there is no border, and outputs may be negative.
    rule : {"submanifold", "spconv", "minkowski"}
    row_splits : (B + 1,) int64, optional
        Bounds of batch items of the inputs. Pairs are within an item.
    out_row_splits : (B + 1,) int64, optional
        Bounds of the batch items of `out_coords`, as many items as in `row_splits`.

    Returns
    -------
    KernelMap

    Raises
    ------
    ValueError
        For options that the rule does not have, for coordinates outside of `shape`, for outputs that int32 cannot hold,
        for coordinates so far apart that the cells of their bounding box, over all items, cannot be numbered in 63
        bits, or for shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    MinkowskiEngine multiplies dilations by the stride of the tensor. Here both are in the unit of the coordinates: the
    second level of a network, with coordinates that are multiples of 2, has ``stride=4, dilation=2`` where
    MinkowskiEngine has stride 2 and dilation 1.

    The result does not depend on the number of threads. On the GPU a call waits for the range of the coordinates, for
    the number of pairs and, with "spconv" D + 1 times and with "minkowski" once, for the number of outputs.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> coords = np.array([[0, 0], [0, 1], [5, 5]], np.int32)
    >>> m = kp.kernel_map(coords, kernel_size=3)
    >>> m.neighbors.to_padded(), m.kernel_index
    (array([[0, 1],
           [0, 1],
           [2, 3]], dtype=int32), array([4, 5, 3, 4, 4], dtype=int32))
    >>> kp.neighbor_reduce(np.array([[1.0], [2.0], [7.0]]), m.neighbors, "max").ravel()
    array([2., 2., 7.])

    The rules give a strided layer different outputs:

    >>> kp.kernel_map(coords, kernel_size=3, stride=2, rule="minkowski").out_coords.tolist()
    [[0, 0], [4, 4]]
    >>> kp.kernel_map(coords, kernel_size=3, stride=2, padding=1, shape=(6, 6), rule="spconv").out_coords.tolist()
    [[0, 0], [0, 1], [2, 2]]
    """
    sizes = {}
    coords = _coordinates("coords", coords, "N", sizes)
    axes = coords.shape[1]
    checks.choice("rule", rule, _RULES)
    kernel_size = checks.integers("kernel_size", kernel_size, axes, 1)
    stride, dilation = checks.integers("stride", stride, axes, 1), checks.integers("dilation", dilation, axes, 1)
    padding = checks.integers("padding", padding, axes, 0)
    num_kernels = math.prod(kernel_size.tolist())
    if num_kernels > _LARGEST:
        raise ValueError(f"kernel_size: expected at most 2**31 - 1 cells, got {num_kernels}")
    if rule == "submanifold" and (stride != 1).any():
        raise ValueError(f"stride: expected 1, because rule={rule!r} has no stride, got {stride.tolist()}")
    if rule != "spconv" and padding.any():
        raise ValueError(f"padding: expected 0 with rule={rule!r}, got {padding.tolist()}")
    if shape is not None and (rule != "spconv" or out_coords is not None):
        raise ValueError("shape: expected None, because only rule='spconv' without out_coords has one, got a shape")
    row_splits = checks.splits_array("row_splits", row_splits, len(coords), "coords", sizes)
    scale, first = _where_kernels_begin(rule, kernel_size, stride, dilation, padding)
    coords = coords.copy()  # the map keeps it, and kernels write where it says
    inputs, order = _sorted_cells("coords", coords, row_splits)
    out_order = None
    if out_coords is not None:
        out_coords = _coordinates("out_coords", out_coords, "M", sizes).copy()
        out_row_splits = checks.splits_array("out_row_splits", out_row_splits, len(out_coords), "out_coords", sizes)
        if len(out_row_splits) != len(row_splits):
            raise ValueError(
                f"out_row_splits: expected ({len(row_splits)},) to match row_splits, got {out_row_splits.shape}"
            )
        out_order = _sorted_cells("out_coords", out_coords, out_row_splits)[1]
    elif out_row_splits is not None:
        raise ValueError("out_row_splits: expected None without out_coords, got an array")
    elif rule == "submanifold":
        out_coords, out_row_splits, out_order = coords, row_splits, order
    elif rule == "minkowski":
        out_coords, out_row_splits = _coords_of_cells(_strided_cells(coords, inputs, row_splits, stride), row_splits)
    else:
        if shape is not None:
            shape = checks.integers("shape", _of_axes("shape", shape, axes), axes, 1)
            if len(coords):
                _check_within(coords, inputs.low, inputs.low + inputs.sizes - 1, shape)
        reached = _reached_cells(inputs, len(row_splits) - 1, kernel_size, stride, dilation, padding, shape)
        out_coords, out_row_splits = _coords_of_cells(reached, row_splits)

    backend, xp = devices.backend(coords), devices.namespace(coords)
    call = SimpleNamespace(
        cells=inputs.cells, order=order, low=inputs.low, sizes=inputs.sizes, out_coords=out_coords,
        out_row_splits=out_row_splits, out_order=out_order, kernel_size=kernel_size, scale=scale, first=first,
        dilation=dilation, row_splits=xp.empty(len(out_coords) + 1, np.int64),
    )  # fmt: skip
    backend.run("count_pairs", call)
    pairs = int(call.row_splits[-1])
    if xp is np:
        config.check_room(pairs, 8 * pairs)
    index, kernel_index = xp.empty(pairs, np.int32), xp.empty(pairs, np.int32)
    backend.run("fill_pairs", call, index=index, kernel_index=kernel_index)
    kernel = Kernel(*(tuple(numbers.tolist()) for numbers in (kernel_size, stride, dilation, padding)), rule)
    return KernelMap(new_list(index, call.row_splits, len(coords)), kernel_index, out_coords, out_row_splits, coords,
                     row_splits, kernel)  # fmt: skip


def _where_kernels_begin(rule, kernel_size, stride, dilation, padding):
    """(scale, first), (D,) int64 each: kernel cell k of output o reads ``scale * o + first + k * dilation``."""
    one = np.ones_like(stride)
    if rule == "submanifold":
        return one, -((kernel_size - 1) // 2) * dilation
    if rule == "spconv":
        return stride, -padding
    return one, np.where(kernel_size % 2, -(kernel_size // 2) * dilation, 0)


class _Cells(SimpleNamespace):
    """Sorted cells of a box, whose cells are numbered in C order, those of each batch item after those of the last.

    cells: (N,) int64 numbers; low, sizes: (D,) int64 the first cell of the box and its size; stride: (D,) int64 what
    coordinates of cells are multiplied with.
    """


def _sorted_cells(name, coords, row_splits):
    """(the `_Cells` of coordinates in their bounding box, the (N,) int32 order that sorts the coordinates)"""
    axes = coords.shape[1]
    low, high = _bounds(coords) if len(coords) else (np.zeros(axes, np.int64),) * 2
    return _sorted_in_box(name, coords, row_splits, low, high - low + 1, np.ones(axes, np.int64))


def _bounds(coords):
    """The lowest and the highest coordinate along each axis, (D,) int64 each. Waits for the GPU."""
    bounds = devices.namespace(coords).empty((2, coords.shape[1]), np.int32)
    devices.backend(coords).run("cell_bounds", coords=coords, bounds=bounds)
    return devices.on_host(bounds).astype(np.int64)


def _sorted_in_box(name, coords, row_splits, low, sizes, stride):
    """(the `_Cells` of ``floor(coords / stride)``, which lie in the box, the order that sorts them)"""
    _check_number_of_cells(name, len(row_splits) - 1, sizes)
    xp = devices.namespace(coords)
    cells, order = xp.empty(len(coords), np.int64), xp.empty(len(coords), np.int32)
    devices.backend(coords).run("sort_cells", coords=coords, row_splits=row_splits, low=low, sizes=sizes,
                                stride=stride, cells=cells, order=order)  # fmt: skip
    return _Cells(cells=cells, low=low, sizes=sizes, stride=stride), order


def _strided_cells(coords, inputs, row_splits, stride):
    """The different ``floor(coords / stride)`` of the rule "minkowski", as `_Cells`."""
    low, high = inputs.low // stride, (inputs.low + inputs.sizes - 1) // stride
    _check_outputs(low * stride, high * stride)
    cells, _ = _sorted_in_box("coords", coords, row_splits, low, high - low + 1, stride)
    cells.cells = _unique(cells.cells, (len(row_splits) - 1) * math.prod(cells.sizes.tolist()))
    return cells


def _reached_cells(inputs, num_items, kernel_size, stride, dilation, padding, shape):
    """The outputs of the rule "spconv" that read one of the inputs, as `_Cells`.

    Kernels are boxes, so they are spread one axis at a time, and equal cells merged after each: of a surface, a kernel
    of 3x3x3 makes 3 copies of about N, 2 N and 3 N cells instead of 27 copies of N.
    """
    reach = dilation * (kernel_size - 1)
    # The lowest output is rounded up, and the highest down.
    low, high = -((reach - padding - inputs.low) // stride), (inputs.low + inputs.sizes - 1 + padding) // stride
    if shape is not None:
        short = shape + 2 * padding <= reach
        if short.any():
            axis = int(np.argmax(short))
            raise ValueError(
                f"shape: expected at least {reach[axis] + 1 - 2 * padding[axis]} along axis {axis} for this kernel and "
                f"padding, got {shape[axis]}"
            )
        low, high = np.maximum(low, 0), np.minimum(high, (shape + 2 * padding - reach - 1) // stride)
    _check_outputs(low, high)
    sizes, out_sizes = inputs.sizes.copy(), np.maximum(high - low + 1, 0)
    cells = _unique(inputs.cells, num_items * math.prod(sizes.tolist()))
    for axis in reversed(range(len(sizes))):
        size, sizes[axis] = sizes[axis], out_sizes[axis]
        _check_number_of_cells("coords", num_items, sizes)
        end = num_items * math.prod(sizes.tolist())
        # An input is read through kernel cell k only if input + padding - k * dilation is a multiple of the stride,
        # which holds for at most one of `apart` successive k.
        apart = stride[axis] // math.gcd(int(stride[axis]), int(dilation[axis]))
        places = int(min(-(-kernel_size[axis] // apart), out_sizes[axis]))
        spread = devices.namespace(cells).empty(len(cells) * places, np.int64)
        devices.backend(cells).run(
            "spread_cells", cells=cells, inner=math.prod(sizes[axis + 1 :].tolist()), low=inputs.low[axis], size=size,
            out_low=low[axis], out_size=out_sizes[axis], kernel_size=kernel_size[axis], stride=stride[axis],
            dilation=dilation[axis], padding=padding[axis], end=end, spread=spread
        )  # fmt: skip
        cells = _unique(spread, end)
    return _Cells(cells=cells, low=low, sizes=sizes, stride=np.ones_like(stride))


def _unique(cells, end):
    """The different numbers below `end`, in rising order."""
    xp = devices.namespace(cells)
    unique, num_unique = xp.empty(len(cells), np.int64), xp.zeros(1, np.int64)
    devices.backend(cells).run("unique_cells", cells=cells, end=end, unique=unique, num_unique=num_unique)
    return unique[: int(num_unique[0])].copy()


def _coords_of_cells(cells, row_splits):
    """(coordinates, row_splits of their batch items) of `_Cells`."""
    xp = devices.namespace(row_splits)
    coords = xp.empty((len(cells.cells), len(cells.low)), np.int32)
    if len(coords) > checks.MAX_POINTS:
        raise ValueError(f"coords: expected at most {checks.MAX_POINTS} outputs, got {len(coords)}")
    out_row_splits = xp.empty(len(row_splits), np.int64)
    devices.backend(row_splits).run("cell_coords", cells, coords=coords, row_splits=out_row_splits)
    return coords, out_row_splits


# ---- checks


def _coordinates(name, value, rows, sizes):
    """Check integer coordinates (rows, D)."""
    dtype = getattr(value, "dtype", None)
    if getattr(dtype, "kind", None) == "f":
        raise TypeError(
            f"{name}: expected int32, got {dtype}; coordinates are integers here, such as floor(points / voxel_size)"
        )
    value = checks.array(name, value, f"{rows} D", _INT32, sizes)
    if not 1 <= value.shape[1] <= 4:
        raise ValueError(f"{name}: expected ({rows}, D) with D = 1 to 4, got {value.shape}")
    if len(value) > checks.MAX_POINTS:
        raise ValueError(f"{name}: expected at most {checks.MAX_POINTS} rows, got {len(value)}")
    return value


def _of_axes(name, value, axes):
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise TypeError(f"{name}: expected {axes} integers, got {type(value).__name__}")
    return value


def _check_within(coords, low, high, shape):
    """Check that coordinates, which are from `low` to `high`, are between 0 and `shape`."""
    if (low < 0).any() or (high >= shape).any():
        coords = devices.on_host(coords)
        wrong = ((coords < 0) | (coords >= shape)).any(axis=1)
        if not wrong.any():
            raise checks.changed("coords")
        row = int(np.argmax(wrong))
        raise ValueError(
            f"coords: expected coordinates from 0 to below {tuple(shape.tolist())} to match shape, got "
            f"{coords[row].tolist()} in row {row}"
        )


def _check_outputs(low, high):
    limits = np.iinfo(np.int32)
    wrong = (low < limits.min) | (high > limits.max)
    if wrong.any():
        axis = int(np.argmax(wrong))
        raise ValueError(
            f"coords: expected coordinates whose outputs int32 can hold, got outputs from {low[axis]} to {high[axis]} "
            f"along axis {axis}"
        )


def _check_number_of_cells(name, num_items, sizes):
    if num_items * math.prod(sizes.tolist()) >= 2**63:
        raise ValueError(
            f"{name}: expected coordinates whose cells can be numbered in 63 bits, got {num_items} items that span "
            f"{' x '.join(map(str, sizes.tolist()))} cells"
        )


# ---- to_dense


def _to_dense_result(call):
    num_items = 1 if call.row_splits is None else call.row_splits.shape[0] - 1
    return [((num_items, call.features.shape[1], *call.shape), call.features.dtype)]


def _cells_of_grid(call, known=False):
    """The fields of the kernels that say where each row goes; `known`: the values were checked in the forward pass."""
    row_splits, coords = checks.splits_of_call(call, known=known), call.coords
    sizes = np.array(call.shape, np.int64)
    if isinstance(coords, np.ndarray):
        coords, known = coords.copy(), False  # the caller may change it, and kernels write where it says
    if len(coords) and not known:
        _check_within(coords, *_bounds(coords), sizes)
    cells, order = _sorted_in_box("shape", coords, row_splits, np.zeros_like(sizes), sizes, np.ones_like(sizes))
    return {"cells": cells.cells, "order": order, "volume": math.prod(call.shape)}


def _to_dense_forward(call):
    return OPS["to_dense"].run(call, **_cells_of_grid(call))


def _to_dense_vjp(call, saved, grad, needs):
    grads = devices.namespace(grad).empty(call.features.shape, grad.dtype)
    devices.backend(grad).run("to_dense_grad", **_cells_of_grid(call, known=True), grad_out=grad, grad_features=grads)
    return {"features": grads}


@operator(
    vjp=_to_dense_vjp,
    diff=("features",),
    result=_to_dense_result,
    forward=_to_dense_forward,
    keeps=("coords", "row_splits"),
    copies=("coords", "row_splits"),
)
def to_dense(
    coords: AnyArray, features: Array[Computed], shape: Sequence[int], row_splits: AnyArray | None = None
) -> Call[Computed]:
    """A dense grid with the features of each voxel at its coordinates, and zeros elsewhere.

    ``out[b, :, i, j, k]`` is the sum of the features of the rows of batch item b with coordinates (i, j, k): the layout
    of dense convolutions, and the numbering of kernel cells of `kernel_map`. Differentiable in `features`.

    Parameters
    ----------
    coords : (N, D) int32, D = 1 to 4
        From 0 to below `shape`.
    features : (N, C) float32 or float64
    shape : D ints
        Number of cells along each axis.
    row_splits : (B + 1,) int64, optional
        Bounds of batch items.

    Returns
    -------
    (B, C, *shape), dtype of the features

    Raises
    ------
    ValueError
        For coordinates outside of `shape`, or shapes that do not agree.
    TypeError
        For other dtypes.

    Notes
    -----
    Features of equal coordinates are added in their order, by one thread: the result does not depend on the number of
    threads. On the GPU the forward pass waits for the range of the coordinates.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> coords = np.array([[0, 1], [1, 2], [1, 2]], np.int32)
    >>> kp.to_dense(coords, np.array([[1.0], [2.0], [4.0]]), (2, 3))
    array([[[[0., 1., 0.],
             [0., 0., 6.]]]])
    """
    sizes = {}
    coords = _coordinates("coords", coords, "N", sizes)
    features = checks.array("features", features, "N C", checks.FEATURES, sizes)
    shape = tuple(checks.integers("shape", _of_axes("shape", shape, coords.shape[1]), coords.shape[1], 1).tolist())
    return Call(
        coords=coords, features=features, shape=shape,
        row_splits=checks.splits_shape("row_splits", row_splits, len(coords), sizes), is_one_item=row_splits is None,
    )  # fmt: skip

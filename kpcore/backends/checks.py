"""Checks of arguments: an array has the named dimensions and an allowed dtype, a number is in its range.

An error names the argument, what was expected and what came.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import numpy as np

from kpcore.backends import devices
from kpcore.backends.devices import REAL

# Of the dimensions that were seen, the size and the name of the array that set it; of "device", where that array is.
Sizes: TypeAlias = dict[str, tuple[Any, str]]
Named: TypeAlias = tuple[str, np.ndarray]  # an array and its name

FEATURES = list(REAL)  # and on the GPU those of devices.HALVES
LABELS: tuple[np.dtype, ...] = (np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64))
INTEGERS: tuple[np.dtype, ...] = (np.dtype(np.int32), np.dtype(np.int64))
SPLITS: tuple[np.dtype, ...] = (np.dtype(np.int64),)
MAX_POINTS = 2**31 - 1
DIMENSIONS = range(1, 17)


def array(name: str, value: Any, shape: str, dtypes: Collection[np.dtype], sizes: Sizes, *,
          like: Named | None = None) -> np.ndarray:  # fmt: skip
    """The array, C-contiguous and aligned; an error unless it has the given dimensions and dtype.

    `shape` is a string of dimension names ("N D"). `sizes` maps those already seen to (size, name of the array that set
    it); the others are added, so that all arrays of a call agree; under "device" also on where they are. `like` is
    another (name, array) whose dtype this one must share.
    """
    where = "cpu" if type(value) is np.ndarray else _device(name, value)
    if sizes.setdefault("device", (where, name))[0] != where:
        raise _wrong_device(name, where, *sizes["device"])
    dimensions, dtype = shape.split(), value.dtype
    agree = value.ndim == len(dimensions)
    for size, d in zip(value.shape, dimensions, strict=False):
        seen = sizes.setdefault(d, (size, name))
        agree = agree and seen[0] == size
    if not agree:
        raise _wrong_shape(name, value, dimensions, sizes)
    halves = dtypes is FEATURES and where != "cpu" and dtype.name in devices.HALVES
    if dtype not in dtypes and not halves:  # nor is one that is not native
        names, to = " or ".join(d.name for d in dtypes), lossless(dtype, dtypes)
        advice = "" if to is None else f"; convert it with {name}.astype(numpy.{to.name})"
        raise TypeError(f"{name}: expected {names}, got {dtype if dtype.isnative else dtype.str}{advice}")
    if like is not None and dtype != like[1].dtype:
        raise _wrong_match(name, dtype, *like)
    flags = value.flags
    return value if flags.c_contiguous and (where != "cpu" or flags.aligned) else devices.contiguous(value)


def any_shape(name: str, value: Any, sizes: Sizes) -> np.ndarray:
    """An array of features with any axes, which are named by their place."""
    dimensions = " ".join(map(str, range(getattr(value, "ndim", 0))))
    return array(name, value, dimensions, FEATURES, sizes)


def lossless(dtype: np.dtype, dtypes: Collection[np.dtype]) -> np.dtype | None:
    """The first of the dtypes that holds all that another does, for the advice of an error: uint16 labels made uint8
    would turn 300 into 44. None if none does."""
    return next((to for to in dtypes if np.can_cast(dtype, to, "safe")), None)


def _wrong_match(name, dtype, other, array):
    advice = ""
    if " " not in name + other:  # an argument, not "the output"
        if lossless(dtype, [array.dtype]):
            advice = f"; convert it with {name}.astype({other}.dtype)"
        elif lossless(array.dtype, [dtype]):
            advice = f"; convert {other} with {other}.astype({name}.dtype)"
    return TypeError(f"{name}: expected {array.dtype} to match {other}, got {dtype}{advice}")


def _device(name, value):
    """ "cpu", or the number of the GPU, which must be the current one."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got MaskedArray; fill it with {name}.filled")
    if isinstance(value, np.ndarray):
        return "cpu"
    if not devices.is_array(value):
        framework = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}.get(type(value).__module__.partition(".")[0])
        advice = f"call kpcore.{framework}, which takes them" if framework else "convert it with numpy.asarray"
        raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(value).__name__}; {advice}")
    device, current = value.device.id, sys.modules["cupy"].cuda.Device().id
    if device != current:
        raise ValueError(
            f"{name}: expected an array on the current GPU {current}, got one on GPU {device}; "
            f"call within `with {name}.device:`"
        )
    return device


def _wrong_device(name, where, other, of):
    kinds = ("NumPy", "CuPy") if other == "cpu" else ("CuPy", "NumPy")
    move = f"cupy.asnumpy({name})" if other == "cpu" else f"cupy.asarray({name})"
    return TypeError(
        f"{name}: expected a {kinds[0]} array, because {of} is one, got a {kinds[1]} array; nothing is moved between "
        f"devices by itself, move it with {move}"
    )


def _wrong_shape(name, value, dimensions, sizes):
    known = {d: sizes[d] for d in dimensions if d in sizes and sizes[d][1] != name}  # by other arrays
    expected = ", ".join(str(known[d][0]) if d in known else d for d in dimensions) + "," * (len(dimensions) == 1)
    others = sorted({other for _, other in known.values()})
    matching = f" to match {' and '.join(others)}" if others else ""
    return ValueError(f"{name}: expected ({expected}){matching}, got {value.shape}")


def points_array(name: str, value: Any, sizes: Sizes, *, dimensions: Sequence[int] = (2, 3),
                 like: Named | None = None) -> np.ndarray:  # fmt: skip
    """Coordinates (N, D): real, D among `dimensions`, few enough to be numbered in 32 bits."""
    rows = "N" if name == "points" else "M"
    value = array(name, value, f"{rows} D", REAL, sizes, like=like)
    if value.shape[1] not in dimensions:
        allowed = " or ".join(map(str, dimensions)) if len(dimensions) < 4 else f"{dimensions[0]} to {dimensions[-1]}"
        raise ValueError(f"{name}: expected ({rows}, D) with D = {allowed}, got {value.shape}")
    if len(value) > MAX_POINTS:
        raise ValueError(f"{name}: expected at most {MAX_POINTS} rows, got {len(value)}")
    return value


def splits_array(name: str, value: Any, rows: int, of: str, sizes: Sizes, *, known: bool = False) -> np.ndarray:
    """`row_splits` (B + 1,) from 0 to `rows`, never falling; None is a single item. See `splits_values`."""
    splits = splits_shape(name, value, rows, sizes)
    return splits if value is None else splits_values(name, splits, rows, of, known=known)


def splits_shape(name: str, value: Any, rows: int, sizes: Sizes) -> np.ndarray:
    """`row_splits` (B + 1,) at whose values nobody has looked yet; None is a single item of so many rows."""
    if value is None:
        return one_item(rows, np if sizes["device"][0] == "cpu" else sys.modules["cupy"])
    return array(name, value, "B+1", SPLITS, {"device": sizes["device"]} if "device" in sizes else {})


def splits_values(name: str, value: np.ndarray, rows: int, of: str, *, known: bool = False) -> np.ndarray:
    """`row_splits` whose values go from 0 to `rows` and never fall.

    On the CPU a copy, which nobody else can change: they say where kernels read and write. Waits for the GPU to look at
    them, unless they are `known` to be good.
    """
    if isinstance(value, np.ndarray):
        value = value.copy()
        check_splits(name, value, rows, of)
    elif not known:
        check_splits(name, devices.on_host(value), rows, of)
    return value


def splits_of_call(call: Any, *, known: bool = False) -> np.ndarray:
    """The row_splits of a call over rows of features, whose check saw their shape alone; see `splits_values`."""
    if call.is_one_item:  # made for None, and so good
        return call.row_splits
    return splits_values("row_splits", call.row_splits, call.features.shape[0], "features", known=known)


def one_item(rows: int, xp: Any) -> np.ndarray:
    """row_splits of a single item with so many rows, in NumPy or CuPy."""
    return xp.arange(0, 2 * rows, rows, np.int64) if rows else xp.zeros(2, np.int64)  # one launch, and no copy to a GPU


def check_splits(name: str, value: np.ndarray, rows: int, of: str) -> None:
    """An error unless they are bounds of so many rows, as `splits_array` wants them."""
    if not len(value) or value[0] != 0 or value[-1] != rows:
        ends = f"from {value[0]} to {value[-1]}" if len(value) else "no values"
        raise ValueError(f"{name}: expected values from 0 to {rows} to match {of}, got {ends}")
    if (value[1:] < value[:-1]).any():
        at = int(np.argmax(value[1:] < value[:-1]))
        raise ValueError(f"{name}: expected values that never fall, got {value[at]} then {value[at + 1]} at {at}")


def _real(name, value):
    """A float; an error unless it is a number, and one that float64 reaches."""
    if type(value) is float:  # as it mostly is; to ask numbers takes 0.4 us
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that float64 can hold, got one beyond it") from None


def length(name: str, value: object, dtype: np.dtype) -> float:
    """A number above zero whose square and its inverse neither overflow nor lose digits in `dtype`."""
    number = _real(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a finite number above zero, got {value}")
    if not _square_fits(number, dtype):
        raise ValueError(f"{name}: expected a number whose square {dtype} can hold, got {value}")
    return number


@functools.lru_cache(maxsize=1024)  # errstate and finfo take as long as an operator on ten points
def _square_fits(number, dtype):
    with np.errstate(over="ignore", under="ignore"):
        square = dtype.type(number) * dtype.type(number)
    limits = np.finfo(dtype)
    return 2 * limits.tiny <= square <= limits.max


def device_of(named: Named) -> Sizes:
    """What `sizes` says of the device of an array, given as (its name, the array)."""
    name, value = named
    return {"device": ("cpu" if type(value) is np.ndarray else _device(name, value), name)}


def lengths(name: str, value: Any, rows: int, like: Named) -> tuple[np.ndarray, np.ndarray]:
    """An array (M,) of lengths, each as `length` wants it, of the dtype of `like`, (its name, the array); twice, the
    second time on the host."""
    given = array(name, value, "M", REAL, {"M": (rows, "the queries")} | device_of(like), like=like)
    value = devices.on_host(given)
    limits = np.finfo(value.dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bad = ~((value > 0) & (value * value >= 2 * limits.tiny) & (value * value <= limits.max))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name}: expected numbers above zero whose squares {value.dtype} can hold, got {value[row]} in row {row}"
        )
    return given, value


def number(name: str, value: object, dtype: np.dtype) -> float:
    """A finite number that `dtype` can hold."""
    number = _real(name, value)
    if not math.isfinite(number) or abs(number) > _largest(dtype):
        raise ValueError(f"{name}: expected a finite number that {dtype} can hold, got {value}")
    return number


def between(name: str, value: object, low: float, high: float) -> float:
    """A number from one to another."""
    number = _real(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
    return number


def not_negative(name: str, value: object) -> float:
    """A finite number of at least zero."""
    size = number(name, value, np.dtype(np.float64))
    if not size >= 0:
        raise ValueError(f"{name}: expected a number of at least zero, got {value}")
    return size


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


@functools.lru_cache(maxsize=16)  # a dtype's name takes 2 us, as long as a small operator
def _largest(dtype):
    return devices.HALVES.get(dtype.name) or float(np.finfo(dtype).max)


def per_axis(name: str, value: Any, dimension: int, check: Callable[[str, object, np.dtype], float],
             dtype: np.dtype) -> np.ndarray:  # fmt: skip
    """`value` for each axis: a number, or a sequence of one for each, all passed through `check`; (D,) of `dtype`."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return np.array([check(name, value, dtype)] * dimension, dtype)
    shape = value.shape if isinstance(value, np.ndarray) else (len(value),)
    if shape[:1] != (dimension,):
        raise ValueError(f"{name}: expected a number or {dimension} of them, got shape {shape}")
    return np.array([check(f"{name}[{axis}]", v, dtype) for axis, v in enumerate(value)], dtype)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer from `low` to `high`, which is the largest of 64 bits if not given."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if not low <= number <= (2**63 - 1 if high is None else high):
        end = "2**63 - 1" if high is None else high
        expected = f"at least {low}" if high is None and number < low else f"{low} to {end}"
        got = number if abs(number) < 2**64 else "one beyond 64 bits"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    return number


def choice(name: str, value: object, allowed: Sequence[object]) -> int:
    """The position of `value` among the allowed ones."""
    for i, a in enumerate(allowed):
        if value is a or (isinstance(value, str) and value == a):
            return i
    raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def changed(name: str) -> ValueError:
    """The error where what was wrong during a call is not so any more."""
    return ValueError(f"{name}: expected an array that stays as it is during the call, got one that was changed")


def not_finite(**arrays: np.ndarray | None) -> ValueError:
    """The error for the first row of the named arrays with a NaN or infinite coordinate."""
    return _not_finite(**arrays) or changed(" or ".join(name for name, value in arrays.items() if value is not None))


def not_measurable(points: np.ndarray, row_splits: np.ndarray, metric: str = "l2",
                   queries: np.ndarray | None = None, queries_row_splits: np.ndarray | None = None, *,
                   is_bounded: bool = False) -> ValueError | None:  # fmt: skip
    """The error for coordinates that are not finite, or whose distances overflow or vanish; None if all are fine.

    `is_bounded`: by a radius, as in src/neighbors.h.
    """
    if error := _not_finite(points=points, queries=queries):
        return error
    arrays, limits = [(devices.on_host(points), devices.on_host(row_splits))], np.finfo(points.dtype)
    if queries is not None:
        arrays.append((devices.on_host(queries), devices.on_host(queries_row_splits)))
    num_items = len(row_splits) - 1
    for item in range(num_items):
        parts = [values[bounds[item] : bounds[item + 1]] for values, bounds in arrays]
        if not all(map(len, parts)):
            continue
        with np.errstate(over="ignore", under="ignore"):
            sides = np.ptp(np.concatenate(parts), axis=0)
            of_axis = sides * sides if metric == "l2" else sides
            measured = of_axis.max() if metric == "linf" else functools.reduce(operator.add, of_axis)
        if not sides.any() or (limits.tiny <= measured and (is_bounded or measured <= limits.max)):
            continue
        return ValueError(
            f"points: expected {'squared ' * (metric == 'l2')}distances that {points.dtype} can hold, got "
            f"points{'' if queries is None else ' and queries'} up to {np.hypot.reduce(sides.astype(np.float64)):.3g} "
            f"apart{f' in item {item}' * (num_items > 1)}; "
            f"{'convert them to float64 or ' * (points.dtype == np.float32)}rescale them"
        )
    return None


def _not_finite(**arrays):
    for name, value in arrays.items():
        if value is None:
            continue
        value = devices.on_host(value)
        bad = ~np.isfinite(value).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            return ValueError(f"{name}: expected finite coordinates, got {value[row].tolist()} in row {row}")
    return None

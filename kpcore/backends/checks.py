"""Checks of arguments: shape, dtype and device of an array; type and range of a number.

An error names the argument, what was expected and what was passed.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from kpcore.backends import devices
from kpcore.backends.devices import REAL

# What the arrays of a call have to agree on: {dimension: (its size, name of the array that set it)}, and under "device"
# ("cpu" or the number of the GPU, name of the array that set it).
Sizes: TypeAlias = dict[str, tuple[Any, str]]
Named: TypeAlias = tuple[str, np.ndarray]  # (name of an argument, its array)

FEATURES = list(REAL)  # on the GPU also the dtypes in devices.HALVES
LABELS: tuple[np.dtype, ...] = (np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64))
ANY_INTEGERS: tuple[np.dtype, ...] = tuple(np.dtype(f"{u}int{bits}") for bits in (8, 16, 32, 64) for u in ("", "u"))
INTEGERS: tuple[np.dtype, ...] = (np.dtype(np.int32), np.dtype(np.int64))
SPLITS: tuple[np.dtype, ...] = (np.dtype(np.int64),)
MAX_POINTS = 2**31 - 1
DIMENSIONS = range(1, 17)


def array(name: str, value: Any, shape: str, dtypes: Collection[np.dtype], sizes: Sizes, *,
          like: Named | None = None) -> np.ndarray:  # fmt: skip
    """Check an array's shape, dtype and device, and return it C-contiguous and aligned.

    `shape` names the dimensions, separated by spaces ("N D"). Dimensions that are in `sizes` must have the size there;
    the others are added to it, so that all arrays of a call agree. The device is treated in the same way. With `like`,
    (name, array), the dtype must be that of the other array.
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
    if dtype not in dtypes and not halves:  # also true of a dtype with swapped byte order
        names, to = " or ".join(d.name for d in dtypes), lossless(dtype, dtypes)
        advice = "" if to is None else f"; convert it with {name}.astype(numpy.{to.name})"
        raise TypeError(f"{name}: expected {names}, got {dtype if dtype.isnative else dtype.str}{advice}")
    if like is not None and dtype != like[1].dtype:
        raise _wrong_match(name, dtype, *like)
    flags = value.flags
    return value if flags.c_contiguous and (where != "cpu" or flags.aligned) else devices.contiguous(value)


def any_shape(name: str, value: Any, sizes: Sizes) -> np.ndarray:
    """Check an array of features of any shape; its dimensions are named "0", "1" and so on."""
    dimensions = " ".join(map(str, range(getattr(value, "ndim", 0))))
    return array(name, value, dimensions, FEATURES, sizes)


def lossless(dtype: np.dtype, dtypes: Collection[np.dtype]) -> np.dtype | None:
    """The first of `dtypes` that holds every value of `dtype`, or None.

    Errors advise only such conversions: uint16 labels converted to uint8 would turn 300 into 44.
    """
    return next((to for to in dtypes if np.can_cast(dtype, to, "safe")), None)


def _wrong_match(name, dtype, other, array):
    advice = ""
    if " " not in name + other:  # both are names of arguments, not descriptions such as "the output"
        if lossless(dtype, [array.dtype]):
            advice = f"; convert it with {name}.astype({other}.dtype)"
        elif lossless(array.dtype, [dtype]):
            advice = f"; convert {other} with {other}.astype({name}.dtype)"
    return TypeError(f"{name}: expected {array.dtype} to match {other}, got {dtype}{advice}")


def _device(name, value):
    """Return "cpu" or the number of the GPU that holds the array, which must be the current one."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got MaskedArray; fill it with {name}.filled()")
    if isinstance(value, np.ndarray):
        return "cpu"
    if not devices.is_array(value):
        framework = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}.get(type(value).__module__.partition(".")[0])
        advice = "convert it with numpy.asarray"
        if framework:
            advice = f"call the function of kpcore.{framework}, which takes them; methods take numpy.asarray of it"
        raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(value).__name__}; {advice}")
    device, current = value.device.id, sys.modules["cupy"].cuda.Device().id
    if device != current:
        raise ValueError(
            f"{name}: expected an array on the current GPU {current}, got one on GPU {device}; "
            f"call within `with {name}.device:`"
        )
    return device


def _wrong_device(name, where, expected_device, other_name):
    kinds = ("NumPy", "CuPy") if expected_device == "cpu" else ("CuPy", "NumPy")
    move = f"cupy.asnumpy({name})" if expected_device == "cpu" else f"cupy.asarray({name})"
    return TypeError(
        f"{name}: expected a {kinds[0]} array, because {other_name} is one, got a {kinds[1]} array; nothing is moved "
        f"between devices by itself, move it with {move}"
    )


def _wrong_shape(name, value, dimensions, sizes):
    known = {d: sizes[d] for d in dimensions if d in sizes and sizes[d][1] != name}  # set by other arrays
    expected = ", ".join(str(known[d][0]) if d in known else d for d in dimensions) + "," * (len(dimensions) == 1)
    others = sorted({other for _, other in known.values()})
    matching = f" to match {' and '.join(others)}" if others else ""
    return ValueError(f"{name}: expected ({expected}){matching}, got {value.shape}")


def points_array(name: str, value: Any, sizes: Sizes, *, dimensions: Sequence[int] = (2, 3),
                 like: Named | None = None) -> np.ndarray:  # fmt: skip
    """Check coordinates (N, D): real, D in `dimensions`, and at most 2**31 - 1 rows, since indices are int32."""
    rows = "N" if name == "points" else "M"
    value = array(name, value, f"{rows} D", REAL, sizes, like=like)
    if value.shape[1] not in dimensions:
        allowed = " or ".join(map(str, dimensions)) if len(dimensions) < 4 else f"{dimensions[0]} to {dimensions[-1]}"
        raise ValueError(f"{name}: expected ({rows}, D) with D = {allowed}, got {value.shape}")
    if len(value) > MAX_POINTS:
        raise ValueError(f"{name}: expected at most {MAX_POINTS} rows, got {len(value)}")
    return value


def splits_array(name: str, value: Any, rows: int, rows_name: str, sizes: Sizes, *, known: bool = False) -> np.ndarray:
    """Check `row_splits` (B + 1,), shape and values; None stands for a single batch item. See `splits_values`."""
    splits = splits_shape(name, value, rows, sizes)
    return splits if value is None else splits_values(name, splits, rows, rows_name, known=known)


def splits_shape(name: str, value: Any, rows: int, sizes: Sizes) -> np.ndarray:
    """Check the shape and dtype of `row_splits` (B + 1,), not the values; None stands for one item with all `rows`."""
    if value is None:
        return one_item(rows, np if sizes["device"][0] == "cpu" else sys.modules["cupy"])
    return array(name, value, "B+1", SPLITS, {"device": sizes["device"]} if "device" in sizes else {})


def splits_values(name: str, value: np.ndarray, rows: int, rows_name: str, *, known: bool = False) -> np.ndarray:
    """Check that the values of `row_splits` go from 0 to `rows` and never decrease.

    On the CPU the result is a copy, because kernels read and write where these values say: another thread must not be
    able to change them. On the GPU the check waits for the device; with `known`, the values are known to be valid and
    the check is skipped there.
    """
    if isinstance(value, np.ndarray):
        value = value.copy()
        check_splits(name, value, rows, rows_name)
    elif not known:
        check_splits(name, devices.on_host(value), rows, rows_name)
    return value


def splits_of_call(call: Any, *, known: bool = False) -> np.ndarray:
    """Check the values of `call.row_splits`, of which `splits_shape` checked only the shape; see `splits_values`."""
    if call.is_one_item:  # made by `one_item`
        return call.row_splits
    return splits_values("row_splits", call.row_splits, call.features.shape[0], "features", known=known)


def one_item(rows: int, xp: Any) -> np.ndarray:
    """row_splits of a single item, [0, rows], made with `xp`, NumPy or CuPy."""
    return xp.arange(0, 2 * rows, rows, np.int64) if rows else xp.zeros(2, np.int64)  # on a GPU one launch, no copy


def check_splits(name: str, value: np.ndarray, rows: int, rows_name: str) -> None:
    """Check that `row_splits`, on the host, go from 0 to `rows`, the rows of `rows_name`, and never decrease."""
    if not len(value) or value[0] != 0 or value[-1] != rows:
        ends = f"from {value[0]} to {value[-1]}" if len(value) else "no values"
        raise ValueError(f"{name}: expected values from 0 to {rows} to match {rows_name}, got {ends}")
    if (value[1:] < value[:-1]).any():
        at = int(np.argmax(value[1:] < value[:-1]))
        raise ValueError(f"{name}: expected values that never decrease, got {value[at]} then {value[at + 1]} at {at}")


def _real(name, value):
    """Convert a real number to float."""
    if type(value) is float:  # the usual case; isinstance(value, numbers.Real) takes 0.4 us
        return value
    if not isinstance(value, numbers.Real):
        advice = f"; convert it with {name}.item()" if getattr(value, "shape", None) == () else ""
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}{advice}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that float64 can hold, got a larger integer") from None


def length(name: str, value: object, dtype: np.dtype) -> float:
    """Check a finite number above zero. In `dtype` the square and its inverse must not overflow or lose digits."""
    number = _real(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a finite number above zero, got {value}")
    if not _square_fits(number, dtype):
        raise ValueError(f"{name}: expected a number with a square that {dtype} holds, got {value}")
    return number


@functools.lru_cache(maxsize=1024)  # errstate and finfo together take as long as an operator on ten points
def _square_fits(number, dtype):
    with np.errstate(over="ignore", under="ignore"):
        square = dtype.type(number) * dtype.type(number)
    limits = np.finfo(dtype)
    return 2 * limits.tiny <= square <= limits.max


def device_of(named: Named) -> Sizes:
    """A `Sizes` that holds the device of an array, (name, array), and nothing else."""
    name, value = named
    return {"device": ("cpu" if type(value) is np.ndarray else _device(name, value), name)}


def lengths(name: str, value: Any, rows: int, like: Named) -> tuple[np.ndarray, np.ndarray]:
    """Check one length for each query, (M,), as `length` does, with the dtype of the array `like`.

    Returns the array and a copy of it on the host, which on the CPU is the array itself.
    """
    checked = array(name, value, "M", REAL, {"M": (rows, "queries")} | device_of(like), like=like)
    value = devices.on_host(checked)
    limits = np.finfo(value.dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bad = ~((value > 0) & (value * value >= 2 * limits.tiny) & (value * value <= limits.max))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name}: expected numbers above zero with squares that {value.dtype} holds, got {value[row]} in row {row}"
        )
    return checked, value


def number(name: str, value: object, dtype: np.dtype) -> float:
    """Check a finite number that `dtype` can hold."""
    number = _real(name, value)
    if not math.isfinite(number) or abs(number) > _largest(dtype):
        raise ValueError(f"{name}: expected a finite number that {dtype} can hold, got {value}")
    return number


def between(name: str, value: object, low: float, high: float) -> float:
    """Check a number from `low` to `high`, both included."""
    number = _real(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
    return number


def not_negative(name: str, value: object) -> float:
    """Check a finite number of at least zero."""
    size = number(name, value, np.dtype(np.float64))
    if not size >= 0:
        raise ValueError(f"{name}: expected a number of at least zero, got {value}")
    return size


def boolean(name: str, value: object) -> bool:
    """Check a bool of Python or NumPy."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


@functools.lru_cache(maxsize=16)  # dtype.name takes 2 us, as long as a small operator
def _largest(dtype):
    return devices.HALVES.get(dtype.name) or float(np.finfo(dtype).max)


def per_axis(name: str, value: Any, dimension: int, check: Callable[[str, object, np.dtype], float],
             dtype: np.dtype) -> np.ndarray:  # fmt: skip
    """One number for each axis, (D,) of `dtype`, from a single number or a sequence of D; `check` is called on each."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return np.array([check(name, value, dtype)] * dimension, dtype)
    shape = value.shape if isinstance(value, np.ndarray) else (len(value),)
    if shape[:1] != (dimension,):
        raise ValueError(f"{name}: expected a number or {dimension} of them, got shape {shape}")
    return np.array([check(f"{name}[{axis}]", v, dtype) for axis, v in enumerate(value)], dtype)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Check an integer from `low` to `high`, by default 2**63 - 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if not low <= number <= (2**63 - 1 if high is None else high):
        end = "2**63 - 1" if high is None else high
        expected = f"at least {low}" if high is None and number < low else f"{low} to {end}"
        got = number if abs(number) < 2**64 else "one of more than 64 bits"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    return number


def integers(name: str, value: Any, dimension: int, low: int) -> np.ndarray:
    """An integer from `low` to 2**31 - 1 for each axis, (D,) int64, from a single one or a sequence of D."""
    return per_axis(
        name, value, dimension, lambda name, number, _: integer(name, number, low, MAX_POINTS), np.dtype(np.int64)
    )


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """(rows, columns), from `low` to 2**31 - 1, from an integer or a sequence of one or two."""
    numbers = tuple(value) if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) else (value,)
    if len(numbers) not in (1, 2):
        raise ValueError(f"{name}: expected an integer, or one for each axis, got {len(numbers)} of them")
    rows, columns = [integer(name, number, low, MAX_POINTS) for number in numbers * (3 - len(numbers))]
    return rows, columns


def choice(name: str, value: object, allowed: Sequence[object]) -> int:
    """The position of `value` in `allowed`."""
    for position, option in enumerate(allowed):
        if value is option or (isinstance(value, str) and value == option):
            return position
    raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def changed(name: str) -> ValueError:
    """The error for an array in which a kernel met a wrong value that is no longer there afterwards."""
    return ValueError(f"{name}: expected an array that is not changed during the call, got one that was changed")


def not_finite(**arrays: np.ndarray | None) -> ValueError:
    """The error for the first row with a NaN or infinite coordinate, in the first of the named arrays that has one."""
    return _not_finite(**arrays) or changed(" or ".join(name for name, value in arrays.items() if value is not None))


def not_measurable(points: np.ndarray, row_splits: np.ndarray, metric: str = "l2",
                   queries: np.ndarray | None = None, queries_row_splits: np.ndarray | None = None, *,
                   is_bounded: bool = False) -> ValueError | None:  # fmt: skip
    """The error for coordinates that are not finite or have distances that overflow or vanish; None if there is none.

    `is_bounded`: the search has a radius, so distances may overflow; see is_measurable() in src/formulas/neighbors.h.
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
            terms = sides * sides if metric == "l2" else sides
            diagonal = terms.max() if metric == "linf" else functools.reduce(operator.add, terms)
        if not sides.any() or (limits.tiny <= diagonal and (is_bounded or diagonal <= limits.max)):
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
            got = value[row].tolist() if value.shape[1] <= DIMENSIONS[-1] else value[row][~np.isfinite(value[row])][0]
            return ValueError(f"{name}: expected finite coordinates, got {got} in row {row}")
    return None


@contextmanager
def argument_names(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, errors about arguments speak of ``names[argument]``, for functions that call them otherwise."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if names and error.args and isinstance(error.args[0], str):
            pattern = rf"\b({'|'.join(names)})\b"
            error.args = (re.sub(pattern, lambda match: names[match[0]], error.args[0]), *error.args[1:])
        raise

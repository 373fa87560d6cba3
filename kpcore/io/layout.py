"""Records of points of formats other than LAS: where each value is, and the points that decide for all of a file.

What `kpcore.io.read` makes of a file depends on all of its values in a few places: whether colours have 8 bits, 16 bits
or are fractions, whether columns without names are colours, whether a field holds labels. `telling` picks the few
points that settle these questions; a reader that gets them in front of other points of the file decides as for all.
"""

from __future__ import annotations

import itertools
import os
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kpcore.io.cloud import (
    COLORS,
    LABEL_ARRAYS,
    LABELS,
    Content,
    NamedArrays,
    ReadError,
    Request,
    checked_labels,
    first_name_index,
    from_columns,
    list_names,
    name_index,
)
from kpcore.io.las import BLOCK, Dimension
from kpcore.io.table import Column, Table, unique

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_MOST_BYTES = 1 << 26  # of records at a time
_LABELS = {*LABELS, *LABEL_ARRAYS}
_TELLING = {*itertools.chain(*COLORS), "rgb", "rgba", *_LABELS}  # names of fields that decide


class Layout(NamedTuple):
    """Where the values of a point are in the records of a file."""

    num: int  #: of points
    size: int  #: bytes of a record
    dimensions: tuple[Dimension, ...]  #: that a `Request` can name
    axes: tuple[Dimension, ...]  #: x, y and z
    deciding: tuple[Dimension, ...]  #: those with values that decide what all are
    about: Any = None  #: what the format needs besides; equal for the same file


def of_fields(num: int, size: int, dimensions: Sequence[Dimension]) -> Layout:
    """The Layout of records that are all fields by name."""
    names = [one.name for one in dimensions]
    if missing := [axis for axis in "xyz" if name_index(names, axis) is None]:
        raise ReadError(f"has no field {' '.join(missing)}; there are {list_names(names)}")
    axes = tuple(dimensions[name_index(names, axis)] for axis in "xyz")
    if not all(is_number(one) for one in axes):
        raise ReadError("x, y, z: expected one number for each point")
    return Layout(num, size, tuple(dimensions), axes, deciding(one for one in dimensions if one not in axes))


def content(layout: Layout, records: np.ndarray, request: Request) -> Content:
    """The Content of records that are all fields by name."""
    return from_columns(NamedArrays((one.name, one.read(records)) for one in layout.dimensions), request)


def rows_at_once(size: int) -> int:
    """The number of records that are read at a time."""
    return max(1, min(BLOCK, _MOST_BYTES // max(1, size)))


def ranges(num: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) rows of the blocks of a file."""
    step = rows_at_once(size)
    return ((first, min(num, first + step)) for first in range(0, num, step))


def named(dtype: np.dtype, at: int = 0) -> tuple[Dimension, ...]:
    """The fields of a structured type that starts at a byte of the records; one of several numbers cannot be read."""
    fields = ((name, *dtype.fields[name][:2]) for name in dtype.names)
    return tuple(Dimension(name, at + offset, kind.str) for name, kind, offset in fields)


def deciding(dimensions: Iterable[Dimension]) -> tuple[Dimension, ...]:
    """Those that may be colours or labels by their names."""
    return tuple(one for one in dimensions if plain_name(one) in _TELLING and is_number(one))


def plain_name(dimension: Dimension) -> str:
    """The name as `kpcore.io.cloud.name_index` compares it."""
    return dimension.name.lower().removeprefix("scalar_")


def is_number(dimension: Dimension) -> bool:
    return np.dtype(dimension.dtype).kind in "fiub"


def telling(dimensions: Iterable[Dimension], records: np.ndarray) -> np.ndarray:
    """The records that decide for all of these what `kpcore.io.cloud` makes of dimensions.

    They are for each dimension the smallest and the largest value, NaN, what is no label, such as a fraction, a label
    other than that of points without one or than in another field of labels, and packed colours other than black.
    Those of several blocks together decide for all blocks.
    """
    rows: set[int] = {0}
    of_labels: list[np.ndarray] = []  # of fields with usual names
    for dimension in dimensions:
        values = dimension.read(records)
        labels, valid = checked_labels(values)
        masks = [labels != -1, ~valid]
        if values.dtype.kind == "f":
            is_nan = np.isnan(values)
            masks.append(is_nan)
            low, high = np.where(is_nan, np.inf, values), np.where(is_nan, -np.inf, values)
        else:
            low = high = values
        rows |= {int(low.argmin()), int(high.argmax())}
        if values.dtype.itemsize == 4:  # packed colours of which some channel is not 0
            masks.append(values.astype(values.dtype.newbyteorder("=")).view(np.uint32) & np.uint32(0xFFFFFF) != 0)
        if plain_name(dimension) in _LABELS:
            masks += [labels != other for other in of_labels]
            of_labels.append(labels)
        rows |= {int(mask.argmax()) for mask in masks if mask.any()}
    return records[sorted(rows)]


def mapped(file: IO[bytes], dtype: np.dtype) -> np.ndarray:
    """The numbers in an open file, read as they are used."""
    file.flush()
    return np.memmap(file, dtype, "r") if file.seek(0, os.SEEK_END) else np.empty(0, dtype)


def table(layout: Layout, blocks: Callable[[], Iterator[np.ndarray]], missing: list[str]) -> Table:
    """The Table of records that are all fields by name; `blocks` yields them, and can be called again."""
    names = [one.name for one in layout.dimensions]
    places = [name_index(names, axis) for axis in "xyz"]
    used = [*layout.axes, *(one for at, one in enumerate(layout.dimensions) if at not in places)]
    columns: list[Column] = []
    for one, name in zip(used, ["x", "y", "z", *(one.name for one in used[3:])], strict=True):
        kind = np.dtype(one.dtype).newbyteorder("=")
        columns.append(Column(unique(name, [column.name for column in columns]), kind))

    def arrays() -> Iterator[list[np.ndarray]]:
        return ([one.read(records) for one in used] for records in blocks())

    usual = first_name_index(["x", "y", "z", *(one.name for one in used[3:])], LABELS)
    return Table(layout.num, columns, arrays, None if usual is None else columns[usual].name, missing)

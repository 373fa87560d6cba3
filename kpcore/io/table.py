"""All columns of a file at once, whatever its format: what is written anew in another format is made of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import ReadError, may_be_colors, name_index

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

BLOCK = 1_000_000  #: points handled at a time


class Column(NamedTuple):
    """A column of a table: `width` numbers of one type for each point."""

    name: str
    dtype: np.dtype
    width: int = 1


class Table(NamedTuple):
    """The columns of a file. The first three are x, y, z; names differ from each other."""

    num: int  #: number of points
    columns: list[Column]
    #: blocks() yields the arrays of some points at a time, in the order of the columns: (n,), or (n, width) if it is
    #: not 1. It can be called again.
    blocks: Callable[[], Iterator[list[np.ndarray]]]
    label: str | None  #: the column that holds labels by its name
    missing: list[str]  #: what the file has besides, in words

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)


def table_of(
    load: Callable[[], list[tuple[str, np.ndarray]]], label: Callable[[list[str]], int | None], missing: list[str]
) -> Table:
    """The Table of a file that `load` reads as a whole: [(name, values)], the first three x, y, z.

    The arrays are let go of when the first pass over the blocks ends, and loaded again for the next, so that they take
    no memory during long work in between.
    """
    missing = [*missing]
    first = load()
    held = [first]
    num = len(first[0][1])
    places, columns = [], []
    for at, (name, values) in enumerate(first):
        if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8 or values.ndim not in (1, 2):
            missing.append(f"{name} of {values.dtype.name}")
        elif len(values) != num:
            missing.append(f"{name} of {len(values)} values")
        elif values.ndim == 1 or values.shape[1]:
            width = 1 if values.ndim == 1 else values.shape[1]
            places.append(at)
            columns.append(Column(unique(name, [one.name for one in columns]), values.dtype.newbyteorder("="), width))

    def blocks() -> Iterator[list[np.ndarray]]:
        arrays = held.pop() if held else load()
        for begin in range(0, len(arrays[0][1]), BLOCK):
            yield [
                arrays[at][1][begin : begin + BLOCK].reshape(-1, *[column.width] * (column.width > 1))
                for at, column in zip(places, columns, strict=True)
            ]

    usual = label([first[at][0] for at in places])
    return Table(num, columns, blocks, None if usual is None else columns[usual].name, missing)


def unique(name: str, taken: Collection[str], fits: Callable[[str], str] = str, key: Callable[[str], str] = str) -> str:
    """The name, or the name with the first number from 2 on with which it is not among those taken.

    `fits` changes it to one that the format can hold, `key` to what is compared.
    """
    number, new = 1, fits(name)
    while key(new) in taken:
        number += 1
        ending = f"_{number}"
        new = fits(name + ending)
        if not new.endswith(ending):  # it has been cut
            new = fits(name)[: -len(ending)] + ending
    return new


def points_first(columns: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """The columns with x, y and z, whatever their case, in front."""
    names = [name for name, _ in columns]
    places = [name_index(names, axis) for axis in "xyz"]
    if None in places:
        raise ReadError(f"has no field {' '.join(axis for axis, at in zip('xyz', places, strict=True) if at is None)}")
    points = [(axis, columns[at][1]) for axis, at in zip("xyz", places, strict=True)]
    return points + [column for at, column in enumerate(columns) if at not in places]


def filled(kept: np.ndarray, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A new field: these values where `kept` is True, 0 elsewhere."""
    field = np.zeros(len(kept), dtype)
    field[kept] = values
    return field


def records(columns: Sequence[Column], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The bytes of the arrays as packed little-endian records, one for each point."""
    layout = [(str(at), one.dtype.newbyteorder("<"), (one.width,)[: one.width > 1]) for at, one in enumerate(columns)]
    table = np.empty(len(arrays[0]), layout)
    for at, values in enumerate(arrays):
        table[str(at)] = values
    return table.view(np.uint8)


def number_words(values: np.ndarray) -> list[str]:
    """The shortest text of each number that is read back as the same number of its type."""
    if values.dtype.kind == "f" and values.dtype.itemsize < 8:
        return [str(value) for value in values]  # as float64 0.1 of float32 would be 0.10000000149011612
    return [*map(repr, values.tolist())]


def nameless(table: np.ndarray) -> list[str]:
    """Names for the columns of a table that has none: x y z, colours if they can only be these, column_4 and so on."""
    width = table.shape[1]
    colored = width == 6 and may_be_colors(table[:, 3:])
    return ["x", "y", "z", *(("red", "green", "blue") if colored else (f"column_{at + 1}" for at in range(3, width)))]


def check_new_name(argument: str, name: str) -> None:
    """Raise an error unless the name of a new field is one word, as PLY, PCD and tables without separators need it."""
    if name.split() != [name] or not name.isprintable():
        raise ReadError(f"{argument}: expected one word as the name of a new field, got {name!r}")

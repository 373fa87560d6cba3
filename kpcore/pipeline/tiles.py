"""Points of files without an index by their place: one pass sorts records into square cells, in files on disk.

A cell is a quarter of a block wide, so that few points beyond a box are read with it. Records stay as they are in the
file, with their row in it, so nothing is rounded.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.files import replacing
from kpcore.io import ReadError, scans

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from kpcore.io.scans import Scan

CELLS_OF_BLOCK = 4  # along a side; a power of two, so that no quotient is rounded differently from that of a block
ROW = np.dtype("<u4")  # of a point, counted from the first row of its piece
_MOST_CELLS = 2**31  # along an axis
_ENTRY = np.dtype([
    ("x", "<i4"), ("y", "<i4"), ("file", "<i4"), ("count", "<i4"), ("record", "<i8"), ("row", "<i8"), ("first", "<i8"),
])  # fmt: skip
_INDEX, _RECORDS, _ROWS = "cells.npy", "records.bin", "rows.bin"


class Count(NamedTuple):
    """Points in cells."""

    cells: np.ndarray  #: (n, 2) int64, columns and rows
    points: np.ndarray  #: (n,) float64, estimates for files with an index


def bytes_on_disk(files: Iterable[Scan]) -> int:
    """The size of the cells of these files on disk."""
    return sum(scan.num_points * (scan.record_size + ROW.itemsize) for scan in files)


def build(folder: Path, files: Mapping[int, Scan], needed: Mapping[int, Collection[str]], side: float,
          scale: Sequence[float], memory: int, see: Callable[[int, np.ndarray], object],
          watch: Callable[[int], object] | None = None) -> dict[int, str]:  # fmt: skip
    """Sort the points of files into cells, and return {number of a file: why it cannot be read}.

    files, needed : the dimensions by the number of each file that is sorted; others may be 0 in the cells
    side : of a cell, in the unit of the network; `scale` are the factors of x, y and z to that unit
    memory : bytes of records that are sorted at once
    see : is called with (number, records) of every piece of a file
    watch : is called with the number of points after each piece
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, failed = [], {}
    with (folder / _RECORDS).open("wb") as to_records, (folder / _ROWS).open("wb") as to_rows:
        for number, names in needed.items():
            pieces = scans.records(files[number], names)
            try:
                of_file = _sort_file(
                    files[number], number, pieces, side, scale, memory, to_records, to_rows, see, watch
                )
            except ReadError as error:
                failed[number] = str(error)
                continue
            entries += of_file
        for file in (to_records, to_rows):
            file.flush()
            os.fsync(file.fileno())
    index = np.concatenate(entries) if entries else np.empty(0, _ENTRY)
    with replacing(folder / _INDEX) as part:
        np.save(part, index[np.lexsort((index["first"], index["file"], index["y"], index["x"]))])
    return failed


def _sort_file(scan, number, records_of, side, scale, memory, to_records, to_rows, see, watch) -> list[np.ndarray]:
    entries, pieces, held = [], [], 0
    for first, records in records_of:
        see(number, records)
        if pieces and (held + records.nbytes > memory or first + len(records) - pieces[0][0] > np.iinfo(ROW).max):
            entries.append(_sort_pieces(scan, number, side, scale, pieces, to_records, to_rows))
            pieces, held = [], 0
        pieces.append((first, records))
        held += records.nbytes
        if watch:
            watch(len(records))
    entries.append(_sort_pieces(scan, number, side, scale, pieces, to_records, to_rows))
    return entries


def _sort_pieces(scan, number, side, scale, pieces, to_records, to_rows) -> np.ndarray:
    """Append the records of consecutive pieces to the files, by cell; the entries of the index."""
    first, records = pieces[0][0], np.concatenate([of_piece for _, of_piece in pieces])
    points = scans.coordinates(scan, records)
    used = np.flatnonzero(scans.are_points(points))
    cells = np.floor(points[used, :2] * np.asarray(scale[:2]) / side)
    if np.abs(cells).max(initial=0) >= _MOST_CELLS:
        width = CELLS_OF_BLOCK * side
        raise ReadError(f"{scan.path}: its points lie in more than 2**32 columns of blocks of {width:g}")
    order = np.lexsort((cells[:, 1], cells[:, 0]))  # stable: rows of a cell ascend
    cells, order = cells[order], used[order]
    starts = np.flatnonzero((np.diff(cells, axis=0, prepend=np.nan) != 0).any(axis=1))
    entries = np.empty(len(starts), _ENTRY)
    entries["x"], entries["y"] = cells[starts].T
    entries["file"], entries["first"] = number, first
    entries["count"] = np.diff(starts, append=len(order))
    entries["record"] = to_records.tell() + starts * scan.record_size
    entries["row"] = to_rows.tell() // ROW.itemsize + starts
    to_records.write(records[order])
    to_rows.write(order.astype(ROW))
    return entries


def sizes(folder: Path) -> dict[str, int]:
    """The sizes of the files that `build` wrote; those that are missing have none."""
    paths = {name: folder / name for name in (_INDEX, _RECORDS, _ROWS)}
    return {name: path.stat().st_size for name, path in paths.items() if path.exists()}


class Tiles:
    """The cells that `build` wrote."""

    index: np.ndarray

    def __init__(self, folder: Path) -> None:
        self.index, self._folder = np.load(folder / _INDEX), folder

    def without(self, files: Iterable[int]) -> None:
        """Leave out the points of some files."""
        self.index = self.index[~np.isin(self.index["file"], [*files])]

    def entries(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The entries of the index for the cells from `low` to `high`, both included."""
        begin, end = np.searchsorted(self.index["x"], [low[0], high[0] + 1])
        columns = self.index[begin:end]
        return columns[(columns["y"] >= low[1]) & (columns["y"] <= high[1])]

    def read(self, entries: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows in the file, records) of entries of one file, which has records of this size.

        The files are read, not mapped: pages of mapped files would count as memory of this process.
        """
        places = np.concatenate([[0], np.cumsum(entries["count"], dtype=np.int64)])
        rows, records = np.empty(places[-1], ROW), np.empty((places[-1], size), np.uint8)
        with (self._folder / _RECORDS).open("rb") as from_records, (self._folder / _ROWS).open("rb") as from_rows:
            for entry, begin, end in zip(entries, places[:-1], places[1:], strict=True):
                from_records.seek(int(entry["record"]))
                from_rows.seek(ROW.itemsize * int(entry["row"]))
                count = from_records.readinto(records[begin:end]) + from_rows.readinto(rows[begin:end])
                if count != (end - begin) * (size + ROW.itemsize):
                    raise OSError(errno.EIO, "is shorter than it was written", str(self._folder / _RECORDS))
        return rows + np.repeat(entries["first"], entries["count"]), records

    def count(self) -> Count:
        """The number of points in each cell."""
        return summed(np.column_stack([self.index["x"], self.index["y"]]), self.index["count"])


def summed(cells: np.ndarray, points: np.ndarray) -> Count:
    """The points of equal cells added up."""
    unique, inverse = np.unique(cells.astype(np.int64), axis=0, return_inverse=True)
    return Count(unique, np.bincount(inverse.reshape(-1), points, len(unique)))

"""LAS, LAZ and COPC piece by piece, for surveys that do not fit into memory.

`opened` reads the headers of a file, `records` its points block by block as they are stored, `copc.records_in` those of
a box, and `decoded` makes coordinates, colours and fields of such records. What `kpcore.io.read` decides by all values
of a file, whether its colours have 8 or 16 bits and whether it has labels at all, is not decided here.
"""

from __future__ import annotations

import os
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io import las
from kpcore.io.cloud import (
    Content,
    ReadError,
    Request,
    color_bytes,
    fields_from,
    join_warnings,
    labels_of_some,
)
from kpcore.io.formats import checked_size, errors_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import BinaryIO

    from kpcore.io.reference import Reference

EXTENSIONS = (".las", ".laz")
_MOST_HEADERS = 64  # kept between calls; one has some hundred bytes to a megabyte


class Scan(NamedTuple):
    """What the headers of a LAS, LAZ or COPC state; equal for the same file with the same content."""

    path: str  #: absolute
    size: int  #: bytes
    modified: int  #: time of the last change in nanoseconds (st_mtime_ns)
    num_points: int
    record_size: int  #: bytes of a point
    #: the box of x, y and z as the header states it, rounded by the program that wrote it; None: it states none that
    #: can be right, see `measured`
    low: tuple[float, float, float] | None
    high: tuple[float, float, float] | None
    reference: Reference | None  #: coordinate reference system
    point_format: int
    is_compressed: bool
    is_copc: bool
    dimensions: tuple[las.Dimension, ...]
    warning: str | None = None  #: what may be read as the wrong thing

    @property
    def names(self) -> tuple[str, ...]:
        """Of all dimensions that a `Request` can name."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def state(self) -> tuple[int, int]:
        return self.size, self.modified

    @property
    def has_colors(self) -> bool:
        return "red" in self.names


def opened(path: str | os.PathLike[str]) -> Scan:
    """Read the headers of a LAS, LAZ or COPC; its points are not read.

    Raises
    ------
    ReadError
        The file is none of these, is damaged or truncated, or holds no points.
    """
    path = Path(path)
    with errors_name(path):
        size = checked_size(path, EXTENSIONS)
        with path.open("rb") as file:
            _, modified = las.state_of(file)
            head = las.read_header(file, size)
            reference, unsure = las.read_reference(file, head, size)
    low, high = las.box(head) or (None, None)
    first = head.records[0] if head.records else None
    is_copc = head.compressed and first is not None and (first.user, first.number) == (b"copc", 1)
    return Scan(
        os.path.abspath(path), size, modified, head.num, head.size, low, high, reference, head.point_format,
        head.compressed, is_copc, tuple(head.dimensions), join_warnings(head.warning, unsure),
    )  # fmt: skip


def measured(scan: Scan) -> Scan:
    """The scan with the box of its points, by a pass over them, in place of the one in its header.

    Points with a coordinate beyond float64 do not count.
    """
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for _, block in records(scan, "xyz"):
        places = coordinates(scan, block)
        is_finite = np.isfinite(places)
        low = np.minimum(low, places.min(axis=0, where=is_finite, initial=np.inf))
        high = np.maximum(high, places.max(axis=0, where=is_finite, initial=-np.inf))
    if not (low <= high).all():
        raise ReadError(f"{scan.path}: has no finite points")
    return scan._replace(low=tuple(low.tolist()), high=tuple(high.tolist()))


@contextmanager
def unchanged(scan: Scan) -> Iterator[tuple[BinaryIO, las.Header]]:
    """The open file of a scan and its header; a ReadError if the file has changed, before the block or meanwhile."""
    with errors_name(scan.path), open(scan.path, "rb") as file:
        las.check_unchanged(file, scan.state)
        yield file, _header(scan)
        las.check_unchanged(file, scan.state)


@lru_cache(_MOST_HEADERS)
def _header(scan: Scan) -> las.Header:
    with open(scan.path, "rb") as file:
        return las.read_header(file, scan.size)


def records(scan: Scan, names: Collection[str] | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (n, record_size) uint8) of all points in the order of the file, at most a million at a time.

    Of a LAZ in layers (point formats 6 to 10) only x, y and the dimensions `names` are unpacked, and the
    bytes of others are undefined.

    Raises
    ------
    ReadError
        The file is damaged, or has changed since `opened`.
    """
    with unchanged(scan) as (file, head):
        first = 0
        with closing(las.ahead(las.read_blocks(file, head, names))) as blocks:
            for block in blocks:
                las.check_unchanged(file, scan.state)
                yield first, block
                first += len(block)


def needed(scan: Scan, request: Request) -> set[str]:
    """The names of the dimensions that `decoded` needs for a request; an error if one that it names is missing."""
    with errors_name(scan.path):
        return las.selected(scan.dimensions, request).needed


def decoded(scan: Scan, records: np.ndarray, request: Request, wide_colors: bool | None = None) -> Content:
    """What `kpcore.io.read` makes of these records of a file, each by itself.

    Parameters
    ----------
    scan : Scan
    records : (n, record_size) uint8
    request : Request
    wide_colors : bool, optional
        Whether colours have 16 bits, by the largest of all values (see `widest_color`), or 8; None: none are read.

    Returns
    -------
    Content
        points : (n, 3) float64. Labels are there for every point, also where all are 0.

    Raises
    ------
    ReadError
        A requested field is missing, a label is no whole number of 32 bits, or a colour has more than 8 bits although
        `wide_colors` is False.
    """
    with errors_name(scan.path):
        chosen = las.selected(scan.dimensions, request)
        columns = chosen.columns(records)
        field = request.label or "classification"
        values = columns.find(field) if request.label else columns.at([*chosen.wanted].index(scan.names.index(field)))
        labels, reason = labels_of_some(values, f"field {field}", are_all=False)
        if labels is None:
            raise ReadError(reason)
        colors = None
        if chosen.channels and wide_colors is not None:
            colors = las.stacked(chosen.channels, records)
            if not wide_colors and colors.max(initial=0) > 255:
                raise ReadError(f"wide_colors: expected True for a colour of {colors.max()}, got False")
            colors = color_bytes(colors, wide_colors)
        return Content(las.stacked(chosen.axes, records), scan.names, fields_from(columns, request), colors, labels,
                       flags=chosen.flags(columns, request), reference=scan.reference)  # fmt: skip


def coordinates(scan: Scan, records: np.ndarray) -> np.ndarray:
    """(n, 3) float64 coordinates of records."""
    return las.stacked(las.selected(scan.dimensions, Request()).axes, records)


def widest_color(scan: Scan, records: np.ndarray) -> int:
    """The largest value of red, green and blue in these records; 0 if the point format has no colours."""
    channels = las.selected(scan.dimensions, Request()).channels
    return max((int(channel.read(records).max(initial=0)) for channel in channels), default=0)

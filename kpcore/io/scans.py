"""Files piece by piece that do not fit into memory: surveys of LAS, LAZ and COPC, and single PLY, NPY and NPZ.

`opened` reads the headers of a file, `records` its points block by block as they are stored, `copc.records_in` those of
a box, and `decoded` makes coordinates, colours and fields of such records. What `kpcore.io.read` decides by all values
of a file, whether its colours have 8 or 16 bits and whether it has labels at all, is not decided here for LAS, LAZ and
COPC; for other formats it is decided by `measured`, see `layout.telling`.
"""

from __future__ import annotations

import os
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io import las, layout
from kpcore.io.cloud import (
    Content,
    OtherColumns,
    ReadError,
    Request,
    check_fields,
    color_bytes,
    fields_from,
    join_warnings,
    labels_of_some,
    name_index,
)
from kpcore.io.convert import LAYOUTS
from kpcore.io.duplicates import left_out
from kpcore.io.formats import READERS, TABLES, checked_size, errors_name, why_no_pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from typing import BinaryIO

    from kpcore.io.layout import Layout
    from kpcore.io.reference import Reference

EXTENSIONS = (".las", ".laz")
_MOST_HEADERS = 64  # kept between calls; one has some hundred bytes to a megabyte


class Scan(NamedTuple):
    """What the headers of a file state; equal for the same file with the same content."""

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
    point_format: int | None  #: of a LAS, LAZ or COPC
    is_compressed: bool
    is_copc: bool
    dimensions: tuple[las.Dimension, ...]
    warning: str | None = None  #: what may be read as the wrong thing
    layout: Layout | None = None  #: of the records of other formats
    columns: tuple[str, ...] | None = None  #: names for the columns of a table without names
    telling: bytes = b""  #: records that decide for all of other formats, see `measured`

    @property
    def names(self) -> tuple[str, ...]:
        """Of all dimensions that a `Request` can name."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def state(self) -> tuple[int, int]:
        return self.size, self.modified

    @property
    def has_colors(self) -> bool:
        """Whether there are colours; in formats other than LAS, LAZ and COPC also whether any is not black."""
        return (
            "red" in self.names
            if self.layout is None
            else _content(self, self.no_records, Request())[0].colors is not None
        )

    @property
    def no_records(self) -> np.ndarray:
        return np.empty((0, self.record_size), np.uint8)


def opened(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Scan:
    """Read the headers of a LAS, LAZ, COPC, PLY, NPY or NPZ; its points are not read, unless a PLY has no fixed size.

    Parameters
    ----------
    path : path
    columns : sequence of str, optional
        Names for the columns of an NPY or NPZ that has none. Those that do not fit are not used.

    Raises
    ------
    ReadError
        The file is none of these, is damaged or truncated, or holds no points.
    """
    path = Path(path)
    with errors_name(path):
        if path.suffix.lower() in {*READERS} - {*EXTENSIONS, *LAYOUTS}:
            raise ReadError(why_no_pieces(path, path))
        if path.suffix.lower() in LAYOUTS:
            return _opened_other(path, None if columns is None else tuple(columns))
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


def _opened_other(path: Path, columns: tuple[str, ...] | None) -> Scan:
    suffix, size = path.suffix.lower(), checked_size(path, LAYOUTS)
    with path.open("rb") as file:
        _, modified = las.state_of(file)
    columns = columns if suffix in TABLES else None
    try:
        described = LAYOUTS[suffix][0](path, size, Request(columns=columns))
    except OtherColumns:
        described, columns = LAYOUTS[suffix][0](path, size, Request()), None
    if not described.num:
        raise ReadError("holds no points")
    return Scan(
        os.path.abspath(path), size, modified, described.num, described.size, None, None, None, None, False, False,
        described.dimensions, layout=described, columns=columns,
    )  # fmt: skip


def measured(scan: Scan, label: str | None = None) -> Scan:
    """The scan with the box of its points, by a pass over them, in place of the one in its header.

    Points with a coordinate beyond float64 do not count, in formats other than LAS, LAZ and COPC neither those beyond
    float32, see `are_points`. For these formats the result has what decides on colours and on labels, in the field
    `label` or in one of a usual name, and `decoded` needs it.
    """
    if scan.layout is not None:
        return _measured_other(scan, label)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for _, block in records(scan, "xyz"):
        places = coordinates(scan, block)
        is_finite = np.isfinite(places)
        low = np.minimum(low, places.min(axis=0, where=is_finite, initial=np.inf))
        high = np.maximum(high, places.max(axis=0, where=is_finite, initial=-np.inf))
    if not (low <= high).all():
        raise ReadError(f"{scan.path}: has no finite points")
    return scan._replace(low=tuple(low.tolist()), high=tuple(high.tolist()))


def _measured_other(scan: Scan, label: str | None) -> Scan:
    low, high, kept, num = np.full(3, np.inf), np.full(3, -np.inf), scan.no_records, 0
    labels = [] if label is None else [scan.dimensions[name_index(scan.names, label)]]
    deciding = (*scan.layout.deciding, *filter(layout.is_number, labels))
    for _, block in records(scan, {one.name for one in labels}):
        points = coordinates(scan, block)
        points = points[are_points(points)]
        num += len(points)
        low = np.minimum(low, points.min(axis=0, initial=np.inf))
        high = np.maximum(high, points.max(axis=0, initial=-np.inf))
        kept = layout.telling(deciding, np.concatenate([kept, layout.telling(deciding, block)]))
    if not (low <= high).all():
        raise ReadError(
            f"{scan.path}: has no finite points: all {scan.num_points} have a coordinate that is NaN, infinite "
            "or beyond float32"
        )
    scan = scan._replace(low=tuple(low.tolist()), high=tuple(high.tolist()), telling=kept.tobytes())
    with errors_name(scan.path):
        warning = _content(scan, scan.no_records, Request(label=label))[0].warning
    missing = left_out(scan.num_points - num, scan.num_points) if num < scan.num_points else None
    return scan._replace(warning=join_warnings(warning, missing))


def are_points(points: np.ndarray) -> np.ndarray:
    """True for each of (n, 3) coordinates that `kpcore.io.read` does not leave out: finite in float32."""
    return (np.abs(points) <= np.finfo(np.float32).max).all(axis=1)


def _content(scan: Scan, records: np.ndarray, request: Request) -> tuple[Content, int]:
    """(what the reader of the format makes of the records that decide and of others, the number of the first)."""
    if not scan.telling:
        raise ValueError(f"scan: expected one of `measured` for {scan.path}, got one of `opened`")
    telling = np.frombuffer(scan.telling, np.uint8).reshape(-1, scan.record_size)
    request = request._replace(columns=scan.columns, is_part=True)
    whole = np.concatenate([telling, records])
    with np.errstate(all="ignore"):  # as in `read`, of limits in float16
        return LAYOUTS[Path(scan.path).suffix.lower()][2](scan.layout, whole, request), len(telling)


@contextmanager
def unchanged(scan: Scan) -> Iterator[tuple[BinaryIO, las.Header | None]]:
    """The open file of a scan, and its header if it is a LAS, LAZ or COPC.

    A ReadError if the file has changed, before the block or meanwhile.
    """
    with errors_name(scan.path), open(scan.path, "rb") as file:
        las.check_unchanged(file, scan.state)
        yield file, _header(scan) if scan.layout is None else None
        las.check_unchanged(file, scan.state)


@lru_cache(_MOST_HEADERS)
def _header(scan: Scan) -> las.Header:
    with open(scan.path, "rb") as file:
        return las.read_header(file, scan.size)


def records(scan: Scan, names: Collection[str] | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (n, record_size) uint8) of all points in the order of the file, at most a million at a time.

    Of a LAZ in layers (point formats 6 to 10) only x, y and the dimensions `names` are unpacked, and the
    bytes of others are undefined. Of an NPZ only the points, colours, labels and the arrays `names` are read.

    Raises
    ------
    ReadError
        The file is damaged, or has changed since `opened`.
    """
    with unchanged(scan) as (file, head):
        first = 0
        if scan.layout is None:
            of_file = las.read_blocks(file, head, names)
        else:
            path = Path(scan.path)
            of_file = LAYOUTS[path.suffix.lower()][1](path, scan.size, scan.layout, names)
        with closing(of_file), closing(las.ahead(of_file)) as blocks:
            try:
                for block in blocks:
                    las.check_unchanged(file, scan.state)
                    yield first, block
                    first += len(block)
            except ReadError:
                las.check_unchanged(file, scan.state)  # rather than that it is damaged
                raise


def needed(scan: Scan, request: Request) -> set[str]:
    """The names of the dimensions that `decoded` needs for a request; an error if one that it names is missing."""
    with errors_name(scan.path):
        if scan.layout is None:
            return las.selected(scan.dimensions, request).needed
        check_fields(scan.names, request)
        wanted = (*request.fields, *([request.label] if request.label else []))
        wanted += tuple(one for one in request.ignore if isinstance(one, str))
        places = (name_index(scan.names, name) for name in wanted)
        return {scan.names[at] for at in places if at is not None}


def decoded(scan: Scan, records: np.ndarray, request: Request, wide_colors: bool | None = None) -> Content:
    """What `kpcore.io.read` makes of these records of a file, each by itself.

    Parameters
    ----------
    scan : Scan
    records : (n, record_size) uint8
    request : Request
    wide_colors : bool, optional
        Whether colours have 16 bits, by the largest of all values (see `widest_color`), or 8; None: none are read. For
        formats other than LAS, LAZ and COPC the scan says what colours are, and any other value than None is the same.

    Returns
    -------
    Content
        points : (n, 3) float64. Labels of a LAS, LAZ or COPC are there for every point, also where all are 0.

    Raises
    ------
    ReadError
        A requested field is missing, a label is no whole number of 32 bits, or a colour has more than 8 bits although
        `wide_colors` is False.
    """
    if scan.layout is not None:
        return _decoded_other(scan, records, request, wide_colors is not None)
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


def _decoded_other(scan: Scan, records: np.ndarray, request: Request, has_colors: bool) -> Content:
    with errors_name(scan.path):
        content, first = _content(scan, records, request)
    return content._replace(
        points=content.points[first:].astype(np.float64),
        fields={name: values[first:] for name, values in content.fields.items()},
        flags={name: values[first:] for name, values in (content.flags or {}).items()},
        colors=content.colors[first:] if has_colors and content.colors is not None else None,
        labels=None if content.labels is None else content.labels[first:],
    )


def coordinates(scan: Scan, records: np.ndarray) -> np.ndarray:
    """(n, 3) float64 coordinates of records."""
    if scan.layout is not None:
        return las.stacked(scan.layout.axes, records).astype(np.float64)
    return las.stacked(las.selected(scan.dimensions, Request()).axes, records)


def widest_color(scan: Scan, records: np.ndarray) -> int:
    """The largest value of red, green and blue in these records; 0 if the point format has no colours.

    In formats other than LAS, LAZ and COPC it is 255 if the scan has colours.
    """
    if scan.layout is not None:
        return 255 * scan.has_colors
    channels = las.selected(scan.dimensions, Request()).channels
    return max((int(channel.read(records).max(initial=0)) for channel in channels), default=0)

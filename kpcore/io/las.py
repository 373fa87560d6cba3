"""LAS 1.0 to 1.5 and LAZ files: reading dimensions by name, and writing labels with all other bytes kept.

Written from ASPRS LAS 1.4 R15; LASzip is unpacked and packed by lazrs. Not through laspy 2.7, which writes a new file
that has lost waveforms, minima of extra bytes and text that is not ASCII, and which reads a single extra-bytes record.
"""

from __future__ import annotations

import io
import math
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from kpcore.config import __version__, get_num_threads, require
from kpcore.io.cloud import (
    Content,
    LabelField,
    NamedArrays,
    ReadError,
    Request,
    check_columns,
    check_extra,
    check_fields,
    colors_of,
    decode_text,
    fields_from,
    flags_from,
    integer_range,
    join_warnings,
    labels_from,
    name_index,
    pieces_of,
)
from kpcore.io.reference import combined
from kpcore.io.table import Column, Table, unique

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from kpcore.io.cloud import Pieces
    from kpcore.io.reference import Reference

T = TypeVar("T")
BLOCK = 1_000_000  # points in memory at once
_LARGEST_CHUNK = 1 << 26  # bytes of points; every thread of lazrs holds one chunk, usually of 50,000 points
_SIZES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)  # bytes per point of point formats 0 to 10
# Types of extra bytes by their number in the file.
_TYPES = (None, "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
# The layer of a LAZ (point formats 6 to 10) that holds a dimension, in the names of lazrs. Others need all layers.
_LAYERS = {
    "x": "XY_RETURNS_CHANNEL", "y": "XY_RETURNS_CHANNEL", "z": "Z", "classification": "CLASSIFICATION",
    "intensity": "INTENSITY", "gps_time": "GPS_TIME", "red": "RGB", "green": "RGB", "blue": "RGB",
    "withheld": "FLAGS", "overlap": "FLAGS", "synthetic": "FLAGS", "key_point": "FLAGS",
}  # fmt: skip
_EPSILON = 2.0**-53  # rounding to float64, relative to the value
_VARYING = 2**32 - 1  # chunk size in a LASzip record whose chunks differ in their number of points
_MOST_RECORDS = 65_535  # extended records that are read; the header can declare 2**32 - 1
_LONGEST_TEXT = 1 << 18  # bytes of a coordinate reference system; those of real files have some thousand


class Dimension(NamedTuple):
    """A dimension of the points, and the place of its value in a point record."""

    name: str
    at: int  #: first byte in the record
    dtype: str
    shift: int = 0  #: number of the lowest bit
    bits: int = 0  #: number of bits; 0: all of the type
    scale: float | None = None  #: None: values are stored as they are, without scale and offset
    offset: float = 0.0
    #: (m, n) of a coordinate if n = 1 / scale and m = offset / scale are whole numbers: it is (stored + m) / n
    whole: tuple[int, int] | None = None

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def holds(self) -> np.dtype:
        """The largest type of which it holds every value; bool for fewer than 8 bits or values with a scale."""
        return np.dtype(bool if self.bits or self.scale is not None else self.dtype)

    def read(self, records: np.ndarray) -> np.ndarray:
        """The values in (n, size) uint8 records, with scale and offset applied."""
        values = self.stored(records)
        if self.bits:
            values = values >> self.shift & (1 << self.bits) - 1
        if self.scale is None:
            return values
        if self.whole is None:
            return values * self.scale + self.offset
        exact = values + float(self.whole[0])
        exact /= self.whole[1]
        return exact

    def stored(self, records: np.ndarray) -> np.ndarray:
        """A view of the stored numbers, all bits of the type."""
        return np.ndarray(len(records), self.dtype, records, self.at, records.strides[:1])

    def write(self, records: np.ndarray, chosen: np.ndarray, values: np.ndarray) -> None:
        """Store values in the records where `chosen` is True."""
        stored = self.stored(records)
        values = values.astype(self.dtype)
        if self.bits:
            other_bits = stored[chosen] & (255 - ((1 << self.bits) - 1 << self.shift))
            values = other_bits | values << self.shift
        stored[chosen] = values


class Record(NamedTuple):
    """A variable-length record (VLR)."""

    user: bytes  #: user ID
    number: int  #: record ID
    header: bytes
    data: bytes

    @property
    def raw(self) -> bytes:
        return self.header + self.data

    @property
    def is_extra_bytes(self) -> bool:
        """Whether it describes extra bytes, the dimensions after those of the point format."""
        return (self.user, self.number) == (b"LASF_Spec", 4)

    @property
    def is_laszip(self) -> bool:
        return (self.user, self.number) == (b"laszip encoded", 22204)

    def with_data(self, data: bytes) -> Record:
        """A copy with other data."""
        return self._replace(data=data, header=self.header[:20] + struct.pack("<H", len(data)) + self.header[22:])


class Header(NamedTuple):
    """The header of a file and its variable-length records."""

    raw: bytes  #: bytes of the file up to the first record
    records: list[Record]
    padding: bytes  #: bytes between the records and the points
    minor: int  #: version 1.minor
    point_format: int
    num: int  #: number of points
    size: int  #: bytes per point
    compressed: bool
    laszip: bytes  #: data of the LASzip record
    end: int  #: the byte after the points
    dimensions: list[Dimension]
    undescribed: int  #: bytes at the end of each point that no record describes
    may_grow: bool  #: whether a dimension can be appended: its description, in the VLRs, would be the last in the file
    chunks: list[tuple[int, int]] | None = None  #: (points, bytes) of each compressed chunk; None: not in chunks

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def start(self) -> int:
        """The byte at which the points start."""
        return len(self.raw) + sum(len(record.raw) for record in self.records) + len(self.padding)

    @property
    def chunk_bytes(self) -> float:
        """The size of the largest chunk when it is unpacked; infinity: not in chunks."""
        return math.inf if self.chunks is None else max(count for count, _ in self.chunks) * self.size

    @property
    def has_varying_chunks(self) -> bool:
        return self.chunks is not None and struct.unpack_from("<I", self.laszip, 12)[0] == _VARYING

    @property
    def warning(self) -> str | None:
        """What may have been read as the wrong thing."""
        if any(record.user == b"lascompatible" for record in self.records):
            return "it is in LASzip's compatibility mode: classes above 31, which are in extra bytes, were not read"
        return None


class Selection(NamedTuple):
    """The dimensions of a file that a `Request` needs."""

    names: tuple[str, ...]  #: of all dimensions
    axes: tuple[Dimension, ...]  #: x, y, z
    channels: tuple[Dimension, ...]  #: red, green, blue; empty if the point format has no colours
    wanted: dict[int, Dimension]  #: labels, fields and flags by their place among the names
    classification: int | None  #: the place of the standard one if points of class 12 are those with the flag overlap

    @property
    def needed(self) -> set[str]:
        """The names of what must be unpacked."""
        return {dimension.name for dimension in (*self.axes, *self.channels, *self.wanted.values())}

    def columns(self, records: np.ndarray) -> NamedArrays:
        """What is wanted of (n, size) uint8 records besides coordinates and colours, as a copy."""
        return NamedArrays((self.names[at], dimension.read(records).copy()) for at, dimension in self.wanted.items())

    def flags(self, columns: NamedArrays, request: Request) -> dict[str, np.ndarray]:
        """The requested flags.

        Point formats 0 to 5 have no bit for overlap: these points are of class 12 (LAS 1.1 to 1.4 R15).
        """
        flags = flags_from(columns, request)
        if self.classification is not None:
            flags["overlap"] = columns.at([*self.wanted].index(self.classification)) == 12
        return flags


def selected(dimensions: Sequence[Dimension], request: Request) -> Selection:
    """The dimensions that a request needs; an error if one that it names is missing."""
    names = tuple(dimension.name for dimension in dimensions)
    check_columns(names, request)
    check_fields(names, request)
    # Of dimensions with the same name the first counts, so that extra bytes never replace a standard dimension.
    standard = {dimension.name: dimension for dimension in reversed(dimensions)}
    requested = (*request.fields, *([request.label] if request.label else []))
    requested += tuple(name for name in request.ignore if isinstance(name, str) and name_index(names, name) is not None)
    wanted = {(at := name_index(names, name)): dimensions[at] for name in requested}
    by_class = "overlap" in request.ignore and name_index(names, "overlap") is None
    classification = names.index("classification")
    if not request.label or by_class:
        wanted.setdefault(classification, standard["classification"])
    channels = tuple(standard[name] for name in ("red", "green", "blue") if "red" in standard)
    return Selection(names, tuple(standard[axis] for axis in "xyz"), channels, wanted,
                     classification if by_class else None)  # fmt: skip


def stacked(dimensions: Sequence[Dimension], records: np.ndarray) -> np.ndarray:
    """(n, D): the values of these dimensions, of one type, in (n, size) uint8 records."""
    return np.column_stack([dimension.read(records) for dimension in dimensions])


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    with path.open("rb") as file:
        head = read_header(file, size)
    check_columns(head.names, request)
    return head.names


def read(path: Path, size: int, request: Request) -> Content:
    with path.open("rb") as file:
        head = read_header(file, size)
        reference, unsure = read_reference(file, head, size)
        chosen = selected(head.dimensions, request)
        points, colors, pieces = [], [], []
        for records in read_blocks(file, head, chosen.needed):
            points.append(stacked(chosen.axes, records))
            if chosen.channels:
                colors.append(stacked(chosen.channels, records))
            pieces.append(chosen.columns(records))
    columns = NamedArrays(
        (name, np.concatenate([piece.at(i) for piece in pieces])) for i, name in enumerate(pieces[0].names)
    )
    del pieces
    labels, unlabeled, _ = labels_from(columns, request, ("classification",))
    rgb, warning = colors_of(np.concatenate(colors)) if colors else (None, None)
    return Content(np.concatenate(points), head.names, fields_from(columns, request), rgb, labels, unlabeled,
                   flags=chosen.flags(columns, request), reference=reference,
                   warning=join_warnings(warning, head.warning, unsure))  # fmt: skip


# ---- the header and its records


def read_header(file: BinaryIO, size: int) -> Header:
    """Read the header and check that the file holds what it declares, before anything of that size is allocated."""
    head = read_at(file, 0, 375)
    if len(head) < 227:
        raise ReadError(f"truncated: expected a header of at least 227 bytes, got {len(head)}")
    major, minor = head[24], head[25]
    if major != 1 or minor > 5:
        raise ReadError(f"expected LAS 1.0 to 1.5, got {major}.{minor}")
    header_size, start, num_records, form, record_size, num = struct.unpack_from("<HIIBHI", head, 94)
    compressed, form = bool(form & 0xC0), form & 0x3F  # LASzip marks compression by the highest bit or the two highest
    min_header = {3: 235}.get(minor, 227 if minor < 3 else 375)
    if len(head) < min_header or not 227 <= header_size <= start <= size:
        raise ReadError(f"truncated: the points start at byte {start} of {size}")
    if header_size < min_header:
        raise ReadError(
            f"damaged: expected a header of at least {min_header} bytes for LAS 1.{minor}, got {header_size}"
        )
    if minor >= 4:
        num = struct.unpack_from("<Q", head, 247)[0] or num  # some writers fill in only the 32-bit count
    if num == 0:
        raise ReadError("holds no points")
    if form >= len(_SIZES) or record_size < _SIZES[form]:
        raise ReadError(f"damaged: point format {form} does not fit records of {record_size} bytes")
    numbers = struct.unpack_from("<6d", head, 131)
    if not np.isfinite(numbers).all() or 0 in numbers[:3]:
        raise ReadError(f"damaged: expected finite scales other than 0 and finite offsets, got {numbers}")

    before, at, records = read_at(file, 0, start), header_size, []
    for _ in range(num_records):
        if at + 54 > start:
            raise ReadError(f"damaged: {num_records} variable-length records do not fit {start - header_size} bytes")
        number, length = struct.unpack_from("<HH", before, at + 18)
        records.append(_record(before[at : at + 54], number, before[at + 54 : at + 54 + length]))
        at += 54 + length
    laszip = next((record.data for record in records if record.is_laszip), b"")
    described = [record.data for record in records if record.is_extra_bytes]
    extended = [
        (at, length) for at, length, record in extended_records(file, head, minor, size) if record.is_extra_bytes
    ]
    described_after = [read_at(file, at + 60, length) for at, length in extended]  # by records after the points
    extra, undescribed, fits = _extra_dimensions(b"".join(described + described_after), _SIZES[form], record_size)
    dimensions = [*_standard_dimensions(form, numbers[:3], numbers[3:]), *extra]
    header = Header(
        raw=before[:header_size], records=records, padding=before[at:], minor=minor, point_format=form, num=num,
        size=record_size, compressed=compressed, laszip=laszip, end=start + num * record_size, dimensions=dimensions,
        undescribed=undescribed, may_grow=fits and not described_after,
    )  # fmt: skip
    if not compressed:
        if header.end > size:
            raise ReadError(f"truncated: {num} points of {record_size} bytes from byte {start} exceed {size} bytes")
        return header
    end, chunks = _check_chunks(file, header, size)
    return header._replace(end=end, chunks=chunks)


def _record(header: bytes, number: int, data: bytes) -> Record:
    return Record(header[2:18].partition(b"\0")[0], number, header, data)


def extended_records(file: BinaryIO, head: bytes, minor: int, size: int) -> Iterator[tuple[int, int, Record]]:
    """(byte, data length, Record without data) of each extended record, up to the first that exceeds the file."""
    if minor < 4:
        return
    at, count = struct.unpack_from("<QI", head, 235)
    for _ in range(min(count, _MOST_RECORDS)):
        header = read_at(file, at, 60) if at < size else b""
        if len(header) < 60 or (length := struct.unpack_from("<Q", header, 20)[0]) > size - at - 60:
            return
        yield at, length, _record(header, struct.unpack_from("<H", header, 18)[0], b"")
        at += 60 + length


def read_reference(file: BinaryIO, head: Header, size: int) -> tuple[Reference | None, str | None]:
    """(the coordinate reference system in the records before or after the points, or None; a warning or None).

    Well-known text counts where the WKT bit of the global encoding is set, in point formats 6 to 10, which must set it
    (LAS 1.4 R15), and in LAS 1.5, which has no GeoTIFF keys; elsewhere GeoTIFF keys count. Record 4224 is a second text
    that PDAL writes, of version 2.
    """
    data: dict[int, bytes] = {}
    for record in head.records:
        if record.user == b"LASF_Projection":
            data.setdefault(record.number, record.data)
    for at, length, record in extended_records(file, head.raw.ljust(375, b"\0"), head.minor, size):
        if record.user == b"LASF_Projection":
            data.setdefault(record.number, read_at(file, at + 60, min(length, _LONGEST_TEXT)))
    keys = (data[34735], data.get(34736, b""), data.get(34737, b"")) if 34735 in data else None
    wkt_first = bool(head.raw[6] & 16) or head.point_format >= 6 or head.minor >= 5
    return combined(data.get(2112) or data.get(4224), keys, wkt_first)


def box(head: Header) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    """The lowest and the highest corner of the points as the header states them; None if these cannot be right.

    Some writers leave zeros or infinities there. Corners can only be where 32 bits reach from the offset.
    """
    bounds = struct.unpack_from("<6d", head.raw, 179)  # highest and lowest x, y, z
    low, high = bounds[1::2], bounds[::2]
    if not any(bounds):
        return None
    for dimension, lowest, highest in zip(head.dimensions[:3], low, high, strict=True):
        reach = (2**31 + 1) * abs(dimension.scale)
        if not dimension.offset - reach <= lowest <= highest <= dimension.offset + reach:
            return None
    return low, high


def _standard_dimensions(form: int, scales: Sequence[float], offsets: Sequence[float]) -> list[Dimension]:
    """The dimensions of a point format (LAS 1.4 R15, tables 7 to 17)."""
    dimensions = [
        Dimension(name, 4 * i, "<i4", scale=scales[i], offset=offsets[i], whole=_whole(scales[i], offsets[i]))
        for i, name in enumerate("xyz")
    ]
    if form < 6:
        flags = (
            ("return_number", 14, 0, 3), ("number_of_returns", 14, 3, 3), ("scan_direction_flag", 14, 6, 1),
            ("edge_of_flight_line", 14, 7, 1), ("classification", 15, 0, 5), ("synthetic", 15, 5, 1),
            ("key_point", 15, 6, 1), ("withheld", 15, 7, 1),
        )  # fmt: skip
        rest = [("scan_angle_rank", "i1"), ("user_data", "u1"), ("point_source_id", "<u2")]
    else:
        flags = (
            ("return_number", 14, 0, 4), ("number_of_returns", 14, 4, 4), ("synthetic", 15, 0, 1),
            ("key_point", 15, 1, 1), ("withheld", 15, 2, 1), ("overlap", 15, 3, 1), ("scanner_channel", 15, 4, 2),
            ("scan_direction_flag", 15, 6, 1), ("edge_of_flight_line", 15, 7, 1),
        )  # fmt: skip
        rest = [("classification", "u1"), ("user_data", "u1"), ("scan_angle", "<i2"), ("point_source_id", "<u2")]
    if form not in (0, 2):
        rest += [("gps_time", "<f8")]
    if form in (2, 3, 5, 7, 8, 10):
        rest += [("red", "<u2"), ("green", "<u2"), ("blue", "<u2")]
    if form in (8, 10):
        rest += [("nir", "<u2")]
    if form in (4, 5, 9, 10):
        rest += [
            ("wavepacket_index", "u1"), ("wavepacket_offset", "<u8"), ("wavepacket_size", "<u4"),
            ("return_point_wave_location", "<f4"), ("x_t", "<f4"), ("y_t", "<f4"), ("z_t", "<f4"),
        ]  # fmt: skip
    dimensions.append(Dimension("intensity", 12, "<u2"))
    dimensions += [Dimension(name, at, "u1", *bits) for name, at, *bits in flags]
    at = 16
    for name, dtype in rest:
        dimensions.append(Dimension(name, at, dtype))
        at += np.dtype(dtype).itemsize
    return dimensions


def _whole(scale: float, offset: float) -> tuple[int, int] | None:
    """(offset / scale, 1 / scale) if both are whole numbers but for rounding to float64; else None.

    Then a coordinate is the float64 nearest to a decimal number, the same in every file that holds this number: tiles
    of a survey differ in their offsets, and stored * scale + offset would differ in the last bit.
    """
    if not 0 < abs(1 / scale) < 2**31:
        return None
    steps = round(1 / scale)
    if steps == 0 or abs(scale * steps - 1) > 4 * _EPSILON:
        return None
    if abs(offset * steps) > 2**53 - 2**31:
        return None
    start = round(offset * steps)
    return (start, steps) if abs(start / steps - offset) <= 2 * _EPSILON * abs(offset) else None


def _extra_dimensions(described, at, record_size):
    """(dimensions, bytes per point without a description, whether all descriptions are valid and fit the records).

    `described` is the data of the extra-bytes records, 192 bytes for each dimension. `at` is the byte of a point record
    where the first of these dimensions starts.
    """
    dimensions = []
    for i in range(0, len(described) - 191, 192):
        kind, options = described[i + 2 : i + 4]
        name = decode_text(described[i + 4 : i + 36].partition(b"\0")[0])
        count = 1 + (kind - 1) // 10 if kind else 1  # types 11 to 30, now deprecated: two or three numbers
        dtype = f"<{_TYPES[(kind - 1) % 10 + 1]}" if 0 < kind <= 30 else "V"
        width = count * np.dtype(dtype).itemsize if dtype != "V" else options
        if kind > 30 or at + width > record_size:
            return dimensions, record_size - at, False
        if dtype != "V":
            scale, offset = (struct.unpack_from(f"<{count}d", described, i + place) for place in (112, 136))
            scaled, moved = options & 8, options & 16
            for n in range(count):
                factor = (scale[n] if scaled else 1.0) if scaled or moved else None
                part = name if count == 1 else f"{name} [{n}]"
                place = at + n * width // count
                dimensions.append(Dimension(part, place, dtype, 0, 0, factor, offset[n] if moved else 0.0))
        at += width
    return dimensions, record_size - at, len(described) % 192 == 0


def read_at(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


# ---- points


def state_of(file: BinaryIO) -> tuple[int, int]:
    """(size in bytes, time of the last change in nanoseconds) of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def check_unchanged(file: BinaryIO, state: tuple[int, int]) -> None:
    """Raise an error if an open file is not in this state, in which its header was read."""
    if state_of(file) != state:
        raise ReadError("has changed since its header was read")


def _check_chunks(file: BinaryIO, head: Header, size: int) -> tuple[int, list[tuple[int, int]] | None]:
    """Check the LASzip record and the chunk table, which lazrs does not check.

    Returns the byte where the compressed points end, and (points, bytes) of each chunk or None: see `Header.chunks`.
    """
    lazrs, laszip, start = require("lazrs", "io"), head.laszip, head.start
    if len(laszip) < 34:
        raise ReadError("damaged: compressed, but without a LASzip record")
    num_items = struct.unpack_from("<H", laszip, 32)[0]
    if len(laszip) < 34 + 6 * num_items:
        raise ReadError(f"damaged: the LASzip record declares {num_items} items in {len(laszip)} bytes")
    compressor, chunk_size = laszip[0], struct.unpack_from("<I", laszip, 12)[0]
    items = struct.unpack_from(f"<{3 * num_items}H", laszip, 34)  # (type, size, version) each
    if sum(items[1::3]) != head.size:
        raise ReadError(f"damaged: the LASzip items have {sum(items[1::3])} bytes, the points {head.size}")
    layered = any(kind >= 10 for kind in items[::3])  # types 10 to 14 belong to point formats 6 to 10
    if compressor not in (1, 2, 3) or (compressor == 3) != layered:
        raise ReadError(f"damaged: LASzip compressor {compressor} does not fit items of types {list(items[::3])}")
    if compressor == 1:  # of the first LASzip: point by point, without chunks or a chunk table
        return _next_pointer(head, start, size), None
    table = struct.unpack("<q", read_at(file, start, 8).ljust(8, b"\0"))[0]
    if table == -1:  # written to a pipe: the byte of the table is stored at the end of the file
        table = struct.unpack("<q", read_at(file, size - 8, 8))[0]
    if not start + 8 <= table <= size - 8:
        raise ReadError(f"truncated: the chunk table starts at byte {table} of {size}")
    num_chunks = struct.unpack_from("<I", read_at(file, table, 8), 4)[0]
    # Every chunk starts with one point that is not compressed.
    if num_chunks * head.size > table - start or head.num > num_chunks * chunk_size:
        raise ReadError(f"damaged: {head.num} points in {num_chunks} chunks do not fit {table - start} bytes")
    file.seek(start)
    chunks = lazrs.read_chunk_table(file, lazrs.LazVlr(laszip))
    if (end := start + 8 + sum(length for _, length in chunks)) != table:
        raise ReadError(f"damaged: the chunks end at byte {end}, but the chunk table starts at byte {table}")
    counts = [count for count, _ in chunks]
    if chunk_size == _VARYING and sum(counts) != head.num:
        raise ReadError(f"damaged: the header declares {head.num} points, the chunks have {sum(counts)}")
    if compressor == 3:  # a chunk: one point, the number of points, the byte length of each layer, the layers
        layers = {10: 9, 11: 1, 12: 2, 13: 1}  # layers of point, RGB, RGB + NIR, wave packet; each extra byte has one
        words = 1 + sum(layers.get(kind, width) for kind, width in zip(items[::3], items[1::3], strict=True))
        at, declared = start + 8, []
        while at < table:
            count, *lengths = struct.unpack(f"<{words}I", read_at(file, at + head.size, 4 * words))
            declared.append((count, head.size + 4 * words + sum(lengths)))
            at += declared[-1][1]
        total = sum(count for count, _ in declared)
        if (total, at) != (head.num, table):
            raise ReadError(
                f"damaged: expected {head.num} points up to byte {table}, the chunks have {total} up to byte {at}"
            )
        if chunk_size == _VARYING and declared != [chunk for chunk in chunks if chunk != (0, 0)]:
            raise ReadError("damaged: chunks have other numbers of points or bytes than the chunk table says")
    # lazrs does not tell where the table ends: that is known if writing it again gives the same bytes.
    rewritten = io.BytesIO()
    lazrs.write_chunk_table(rewritten, chunks, lazrs.LazVlr(laszip))
    is_same = read_at(file, table, len(rewritten.getvalue())) == rewritten.getvalue()
    return table + len(rewritten.getvalue()) if is_same else _next_pointer(head, table, size), chunks


def lazrs_class(name, chunk_bytes):
    """The lazrs class of this name: with threads, unless kpcore uses one thread or the largest chunk is too big.

    A chunk that declares 200 GB makes the class with threads abort the process; the other one raises an error. A forked
    child also uses the one without: the thread pool of lazrs does not survive a fork, and a call would wait forever.
    """
    threaded = chunk_bytes <= _LARGEST_CHUNK and get_num_threads() > 1 and not _forked
    return getattr(require("lazrs", "io"), f"Par{name}" if threaded else name)


def _note_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def layers(names: Collection[str] | None) -> Any:
    """What lazrs unpacks of a LAZ with layers: what these dimensions need, or all."""
    lazrs = require("lazrs", "io")
    parts = {"ALL"} if names is None else {"XY_RETURNS_CHANNEL", *(_LAYERS.get(name, "ALL") for name in names)}
    flags = np.bitwise_or.reduce([getattr(lazrs, f"SELECTIVE_DECOMPRESS_{part}") for part in parts])
    return lazrs.DecompressionSelection(int(flags))


def read_blocks(file: BinaryIO, head: Header, names: Collection[str] | None = None) -> Iterator[np.ndarray]:
    """The point records in file order, (n, size) uint8 at a time. Of a LAZ with layers only `names` are unpacked."""
    file.seek(head.start)
    unpack = None
    if head.compressed:
        unpacker = lazrs_class("LasZipDecompressor", head.chunk_bytes)
        unpack = unpacker(file, head.laszip, layers(names))
    for begin in range(0, head.num, BLOCK):
        shape = min(BLOCK, head.num - begin), head.size
        if unpack:
            records = np.zeros(shape, np.uint8)
            unpack.decompress_many(records.reshape(-1))
        else:
            records = np.fromfile(file, np.uint8, shape[0] * shape[1])
            if len(records) < shape[0] * shape[1]:  # it was longer when its header was read
                raise ReadError(f"truncated: ends in the points from {begin} to {begin + shape[0] - 1}")
            records = records.reshape(shape)
        yield records


def ahead(blocks: Iterator[T]) -> Generator[T, None, None]:
    """The same blocks; while one is used, a thread reads the next, unless kpcore uses one thread."""
    if get_num_threads() == 1:
        yield from blocks
        return
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = reader.submit(next, blocks, None)
            yield block


# ---- labels


def label_field(source: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype]) -> LabelField:
    with source.open("rb") as file:
        state = state_of(file)
        size, _ = state
        head = read_header(file, size)
        tail = _tail_parts(file, head, size)
    at, name = None, label if into is None else into
    if name is not None:
        at = name_index(head.names, name)
    if at is None and into is None:
        at = head.names.index("classification")  # the standard one, if an extra dimension has this name too
    new = []
    if at is None:
        new.append(_new_dimension("into", into, np.dtype("i4"), head.size))
    dimension = new[0] if at is None else head.dimensions[at]
    if dimension.scale is not None:
        raise ReadError(f"field {dimension.name} has a scale or an offset; expected one of whole numbers for labels")
    others = []
    for other, dtype in extra.items():
        at = name_index(head.names, other)
        if at is None:
            new.append(_new_dimension("extra", other, dtype, head.size + sum(one.itemsize for one in new)))
            others.append(new[-1])
        else:
            others.append(head.dimensions[at])
            check_extra(others[-1].name, others[-1].holds, dtype)
    if new:
        length = sum(len(record.data) for record in head.records if record.is_extra_bytes)
        is_long = (
            head.size + sum(one.itemsize for one in new) > 65_535 or length + len(_description(head, new)) > 65_535
        )
        if not head.may_grow or is_long:
            argument = "into" if new[0] is dimension else "extra"
            raise ReadError(
                f"{argument}: cannot add a field {new[0].name}, as its extra bytes are described after the points, "
                "wrongly or at too great length; choose an existing field"
            )
    smallest, largest = (0, (1 << dimension.bits) - 1) if dimension.bits else integer_range(dimension.dtype)

    def write_pieces(out: Path, pieces: Pieces) -> list[str]:
        with source.open("rb") as file:
            check_unchanged(file, state)
            _write(file, head, tail, (dimension, dict(zip(extra, others, strict=True))), new, out, pieces)
            check_unchanged(file, state)
        waves = head.point_format in (4, 5, 9, 10) and head.raw[6] & 4
        return ["its waveforms are in a separate .wdp file, which is not copied"] if waves else []

    def write(out: Path, labels: np.ndarray, kept: np.ndarray, values: Mapping[str, np.ndarray]) -> list[str]:
        return write_pieces(out, pieces_of(labels, kept, values))

    def check(out: Path) -> None:
        _check_packets(source, head, out)

    return LabelField(dimension.name, head.num, smallest, largest, write, check, write_pieces)


def check_plain(out: Path) -> None:
    """Raise an error if the name is that of a COPC, as no octree is written."""
    if out.name.lower().endswith(".copc.laz"):
        raise ReadError("labels are written to a plain LAZ: expected a name that does not end in .copc.laz")


def _new_dimension(argument: str, name: str, dtype: np.dtype, at: int) -> Dimension:
    """A new dimension in the extra bytes of each point record."""
    if not 0 < len(name.encode()) <= 32:
        raise ReadError(f"{argument}: expected a name of 1 to 32 bytes for a new field, got {name!r}")
    return Dimension(name, at, dtype.newbyteorder("<").str)


def _description(head: Header, new: Sequence[Dimension]) -> bytes:
    """Data for the extra-bytes record: descriptions of the bytes that have none, then those of new fields."""
    pieces = [min(255, head.undescribed - at) for at in range(0, head.undescribed, 255)]
    return b"".join(struct.pack("<2xBB188x", 0, piece) for piece in pieces) + _descriptions(new)


def _descriptions(new: Sequence[Dimension]) -> bytes:
    return b"".join(
        struct.pack("<2xBB32s156x", _TYPES.index(dimension.dtype[1:]), 0, dimension.name.encode()) for dimension in new
    )


def _tail_parts(file: BinaryIO, head: Header, size: int) -> tuple[list[tuple[int, int]], int]:
    """([(begin, end)] of the bytes after the points to copy, number of extended records left out).

    The octree of a COPC is left out: it stores byte positions of points, which differ in the new file.
    """
    if not any(record.user == b"copc" for record in head.records):
        return [(head.end, size)], 0
    parts, begin = [], head.end
    for at, length, record in extended_records(file, head.raw, head.minor, size):
        if record.user == b"copc" and at >= begin:
            parts.append((begin, at))
            begin = at + 60 + length
    return [*parts, (begin, size)], len(parts)


def _pointers(head: Header) -> list[tuple[int, int]]:
    """(place in the header, byte it points to): waveforms since LAS 1.3, extended records since LAS 1.4."""
    places = (227, 235)[: max(0, min(head.minor, 4) - 2)]
    return [(place, struct.unpack_from("<Q", head.raw, place)[0]) for place in places]


def _next_pointer(head: Header, at: int, size: int) -> int:
    """The first byte after `at` that the header points to; the end of the file if there is none."""
    return min((byte for _, byte in _pointers(head) if at < byte < size), default=size)


def _write(file, head, tail, edited, new, out, pieces):
    """Write the copy. Only labels, compressed points and byte positions in the header differ from the source.

    `edited` is (the dimension of the labels, {name: dimension} of further fields), `new` the dimensions that the source
    has not.
    """
    parts, left_out = tail
    compressed, added = out.suffix.lower() == ".laz", sum(dimension.itemsize for dimension in new)
    laszip = _laszip(head, head.size + added) if compressed else None
    records = _records(head, _description(head, new) if added else b"", laszip)
    header = bytearray(head.raw)
    start = len(header) + sum(len(record.raw) for record in records) + len(head.padding)
    form = header[104] if compressed == head.compressed else head.point_format | 0x80 * compressed
    struct.pack_into("<IIBH", header, 96, start, len(records), form, head.size + added)

    with out.open("wb") as written:
        target = _WriteErrors(written)
        target.write(bytes(header) + b"".join(record.raw for record in records) + head.padding)

        with closing(ahead(read_blocks(file, head))) as blocks:
            _write_points(target, _edited(blocks, edited, added, pieces), laszip)
        for low, high in parts:
            for place, byte in _pointers(head):
                if low <= byte <= high:
                    struct.pack_into("<Q", header, place, target.tell() + byte - low)
            file.seek(low)
            for byte in range(low, high, 1 << 24):
                target.write(file.read(min(1 << 24, high - byte)))
        if left_out:
            count = struct.unpack_from("<I", header, 243)[0] - left_out
            struct.pack_into("<QI", header, 235, struct.unpack_from("<Q", header, 235)[0] if count else 0, count)
        target.seek(0)
        target.write(bytes(header))


def _edited(blocks, edited, added, pieces) -> Iterator[np.ndarray]:
    """The blocks with labels and further fields in them; `added` bytes are appended to each record."""
    label, others = edited
    first_row = 0
    for block in blocks:
        read_only = block.view()
        read_only.flags.writeable = False
        chosen, labels, extra = pieces(first_row, read_only)
        first_row += len(block)
        records = np.pad(block, ((0, 0), (0, added))) if added else block
        label.write(records, chosen, labels)
        for name, dimension in others.items():
            dimension.write(records, chosen, extra[name])
        yield records


def _write_points(target: _WriteErrors, blocks: Iterable[np.ndarray], laszip: bytes | None) -> None:
    """Write point records to the end of a file, compressed unless `laszip` is None."""
    pack = None if laszip is None else _compressor(target, laszip)
    for block in blocks:
        if pack:
            target.call(pack.compress_many, block.reshape(-1))
        else:
            target.write(block)
    if pack:
        target.call(pack.done)
    target.seek(0, io.SEEK_END)


def _records(head: Header, description: bytes, laszip: bytes | None) -> list[Record]:
    """The VLRs of the copy: `description` added to the extra bytes, and `laszip` (None: not compressed) put in."""
    records = [record for record in head.records if record.user != b"copc"]
    if description:
        records = _with_data_added(records, lambda record: record.is_extra_bytes, b"LASF_Spec", 4, description)
    if laszip is None:
        return [record for record in records if not record.is_laszip]
    records = [record.with_data(b"") if record.is_laszip else record for record in records]
    return _with_data_added(records, lambda record: record.is_laszip, b"laszip encoded", 22204, laszip)


class _WriteErrors:
    """A file that keeps the OSError of a failed write, as lazrs only reports "Failed to call write"."""

    def __init__(self, file):
        self.file, self.error = file, None
        self.seek, self.tell, self.flush = file.seek, file.tell, file.flush

    def write(self, data: bytes | np.ndarray) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def call(self, function, *arguments):
        """Call a function of lazrs that writes; raise the OSError if that is why it failed."""
        try:
            function(*arguments)
        except BaseException:
            if self.error:
                raise self.error from None
            raise


def _with_data_added(
    records: list[Record], fits: Callable[[Record], bool], user: bytes, number: int, data: bytes
) -> list[Record]:
    """The records with `data` appended to the last one that fits, or in a new record."""
    at = max((i for i, record in enumerate(records) if fits(record)), default=len(records))
    if at == len(records):
        records = [*records, _record(struct.pack("<H16sHH32s", 0, user, number, 0, b""), number, b"")]
    return [*records[:at], records[at].with_data(records[at].data + data), *records[at + 1 :]]


def _laszip(head: Header, size: int) -> bytes:
    """The LASzip record for points of this size: that of the file if lazrs can write so, else the default of lazrs."""
    default = _default_laszip(head.point_format, size)
    same = head.compressed and (head.laszip[0], head.laszip[32:]) == (default[0], default[32:])
    return head.laszip if same and struct.unpack_from("<I", head.laszip, 12)[0] != _VARYING else default


def _default_laszip(form: int, size: int) -> bytes:
    return require("lazrs", "io").LazVlr.new_for_compression(form, size - _SIZES[form]).record_data()


def _compressor(target, laszip):
    layout = require("lazrs", "io").LazVlr(laszip)
    return lazrs_class("LasZipCompressor", layout.chunk_size() * layout.item_size())(target, layout)


def _check_packets(source: Path, head: Header, out: Path) -> None:
    """Raise an error if lazrs would lose wave packets: 0.8.2 does in formats 9 and 10 if scanner channels alternate."""
    if out.suffix.lower() != ".laz" or head.point_format not in (9, 10):
        return
    laszip = _laszip(head, head.size)
    with source.open("rb") as file:
        for block in read_blocks(file, head):
            packed, unpacked = io.BytesIO(), np.zeros_like(block)
            pack = _compressor(packed, laszip)
            pack.compress_many(block.reshape(-1))
            pack.done()
            packed.seek(0)
            require("lazrs", "io").LasZipDecompressor(packed, laszip).decompress_many(unpacked.reshape(-1))
            if not np.array_equal(block, unpacked):
                raise ReadError(
                    "its wave packets would be lost in a LAZ file, which lazrs cannot write; write a LAS file"
                )


# ---- a new file


class Frame(NamedTuple):
    """What the header of a new file says of its points."""

    scale: float
    offset: tuple[float, float, float]
    is_standard_time: bool  #: GPS times count from 1980, less a billion seconds; not from the start of a week


def table(path: Path, size: int) -> Table:
    """All dimensions of a file, scales applied; its coordinate reference system and waveforms are missing."""
    with path.open("rb") as file:
        head = read_header(file, size)
        records = [*head.records, *(record for _, _, record in extended_records(file, head.raw, head.minor, size))]
    missing = ["coordinate reference system"] * any(record.user == b"LASF_Projection" for record in records)
    missing += ["waveforms"] * (head.point_format in (4, 5, 9, 10))
    missing += [f"{head.undescribed} bytes of each point that no record describes"] * (head.undescribed > 0)
    ordinary = (b"LASF_Projection", b"copc", b"laszip encoded")
    others = sum(record.user not in ordinary and not record.is_extra_bytes for record in records)
    missing += [f"{others} record{'s' * (others > 1)} of the header"] * (others > 0)
    columns: list[Column] = []
    for dimension in head.dimensions:
        dtype = np.dtype("f8") if dimension.scale is not None else np.dtype(dimension.dtype).newbyteorder("=")
        columns.append(Column(unique(dimension.name, [one.name for one in columns]), dtype))

    def blocks() -> Iterator[list[np.ndarray]]:
        with path.open("rb") as file:
            for points in read_blocks(file, head):
                yield [dimension.read(points) for dimension in head.dimensions]

    return Table(head.num, columns, blocks, "classification", missing)


def standard_dimensions(form: int) -> list[Dimension]:
    """The dimensions of a point format other than coordinates."""
    return [one for one in _standard_dimensions(form, (1, 1, 1), (0, 0, 0)) if one.scale is None]


def create(out: Path, num: int | None, columns: Sequence[Column], blocks: Iterable[list[np.ndarray]], form: int,
           frame: Frame) -> None:  # fmt: skip
    """Write LAS 1.4, point format 6, 7 or 8; columns without a standard name are extra dimensions.

    `num` is the number of points; None: as many as `blocks` yields.
    """
    standard = {one.name: one for one in _standard_dimensions(form, (frame.scale,) * 3, frame.offset)}
    size, extra = _SIZES[form], []
    for column in columns:
        if column.name not in standard:
            extra.append(_new_dimension("extra", column.name, column.dtype, size))
            size += extra[-1].itemsize
    dimensions = {**standard, **{one.name: one for one in extra}}
    laszip = _default_laszip(form, size) if out.suffix.lower() == ".laz" else None
    records = []
    if extra:
        records = _with_data_added(records, lambda record: record.is_extra_bytes, b"LASF_Spec", 4, _descriptions(extra))
    if laszip is not None:
        records = _with_data_added(records, lambda record: record.is_laszip, b"laszip encoded", 22204, laszip)
    low, high, returns, counted = np.full(3, np.inf), np.full(3, -np.inf), np.zeros(16, np.uint64), 0

    def packed() -> Iterator[np.ndarray]:
        nonlocal counted
        for arrays in blocks:
            counted += len(arrays[0])
            points = np.zeros((len(arrays[0]), size), np.uint8)
            for axis, values in enumerate(arrays[:3]):
                whole = np.rint((values.astype(np.float64) - frame.offset[axis]) / frame.scale)
                dimensions["xyz"[axis]]._replace(scale=None).write(points, slice(None), whole)
                stored = dimensions["xyz"[axis]].read(points)
                low[axis], high[axis] = min(low[axis], stored.min()), max(high[axis], stored.max())
            for column, values in zip(columns[3:], arrays[3:], strict=True):
                dimensions[column.name].write(points, slice(None), values)
            returns[:] += np.bincount(standard["return_number"].read(points), minlength=16).astype(np.uint64)
            yield points

    def header() -> bytes:
        encoding = 16 | frame.is_standard_time  # 16: any coordinate reference system is WKT, as formats 6 to 10 demand
        start, today = 375 + sum(len(record.raw) for record in records), time.gmtime()
        software = f"kpcore {__version__}".encode()[:32]
        head = struct.pack(
            "<4sHH16xBB32s32sHH", b"LASF", 0, encoding, 1, 4, b"OTHER", software, today.tm_yday, today.tm_year
        )
        head += struct.pack("<HIIBH24x", 375, start, len(records), form | 0x80 * (laszip is not None), size)
        bounds = np.column_stack([high, low]).ravel() if np.isfinite(low).all() else np.zeros(6)
        head += struct.pack("<12d", *[frame.scale] * 3, *frame.offset, *bounds)
        return head + struct.pack("<QQIQ15Q", 0, 0, 0, counted if num is None else num, *map(int, returns[1:]))

    with out.open("wb") as written:
        target = _WriteErrors(written)
        target.write(header() + b"".join(record.raw for record in records))
        _write_points(target, packed(), laszip)
        target.seek(0)
        target.write(header())

"""LAS 1.0 to 1.4 and LAZ (ASPRS LAS 1.4 R15; LASzip through lazrs): points by name, and labels written among bytes that
stay as they are.

Not through laspy 2.7: it writes files anew, where waveforms, the minima of extra bytes and what is not ASCII are lost,
and knows one record of extra bytes.
"""

from __future__ import annotations

import io
import math
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.config import get_num_threads, require
from kpcore.io.cloud import (
    Asked,
    Columns,
    Content,
    LabelField,
    ReadError,
    check_columns,
    check_fields,
    colors_of,
    decoded,
    fields_from,
    joined,
    labels_from,
    position,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

_BLOCK = 1_000_000  # points in memory at once
_LARGEST_CHUNK = 1 << 26  # bytes of points, of which each thread has one in memory; usual are 50,000 points
_SIZES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)  # bytes of a point of each format
_TYPES = (None, "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")  # of extra bytes
# Which part of a layered LAZ a dimension is in, as lazrs names them; the others are unpacked with all.
_LAYERS = {
    "x": "XY_RETURNS_CHANNEL", "y": "XY_RETURNS_CHANNEL", "z": "Z", "classification": "CLASSIFICATION",
    "intensity": "INTENSITY", "gps_time": "GPS_TIME", "red": "RGB", "green": "RGB", "blue": "RGB",
}  # fmt: skip
_VARYING = 2**32 - 1  # the number of points in a chunk of no fixed number
_MOST_RECORDS = 65_535  # extended records that are looked at; 2**32 - 1 can be promised


class Dimension(NamedTuple):
    """What a record holds of a point."""

    name: str
    at: int  #: byte in the record
    dtype: str
    shift: int = 0  #: of its lowest bit
    bits: int = 0  #: how many; 0: all
    scale: float | None = None
    offset: float = 0.0

    def of(self, records: np.ndarray) -> np.ndarray:
        """Its values in (n, size) uint8 records, scaled where it is."""
        values = self.stored(records)
        if self.bits:
            values = values >> self.shift & (1 << self.bits) - 1
        return values if self.scale is None else values * self.scale + self.offset

    def stored(self, records: np.ndarray) -> np.ndarray:
        """A view of the records."""
        return np.ndarray(len(records), self.dtype, records, self.at, records.strides[:1])

    def put(self, records: np.ndarray, chosen: np.ndarray, values: np.ndarray) -> None:
        """Set those that are chosen."""
        stored = self.stored(records)
        values = values.astype(self.dtype)
        if self.bits:
            others = stored[chosen] & (255 - ((1 << self.bits) - 1 << self.shift))
            values = others | values << self.shift
        stored[chosen] = values


class Record(NamedTuple):
    """A variable-length record, with the bytes of its header."""

    user: bytes
    number: int
    header: bytes
    data: bytes

    @property
    def raw(self) -> bytes:
        return self.header + self.data

    @property
    def is_extra_bytes(self) -> bool:
        """Whether it describes what follows the dimensions of the point format."""
        return (self.user, self.number) == (b"LASF_Spec", 4)

    @property
    def is_laszip(self) -> bool:
        return (self.user, self.number) == (b"laszip encoded", 22204)

    def with_data(self, data: bytes) -> Record:
        """The same with other data."""
        return self._replace(data=data, header=self.header[:20] + struct.pack("<H", len(data)) + self.header[22:])


class Header(NamedTuple):
    """What the header and the records after it say."""

    raw: bytes  #: up to the first record
    records: list[Record]
    padding: bytes  #: between the records and the points
    minor: int  #: of the version, 1.minor
    point_format: int
    num: int
    size: int  #: of a point, in bytes
    compressed: bool
    laszip: bytes  #: the record of the compressor
    end: int  #: of the points in the file
    dimensions: list[Dimension]
    undescribed: int  #: bytes at the end of each point that nothing describes
    may_grow: bool  #: whether a new field would be described after all others: none is behind the points, or too many
    chunk: float = math.inf  #: points of the largest compressed chunk; infinity: not in chunks

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def start(self) -> int:
        """The byte where the points start."""
        return len(self.raw) + sum(len(record.raw) for record in self.records) + len(self.padding)


def read(path: Path, size: int, asked: Asked) -> Content:
    with path.open("rb") as file:
        head = _header(file, size)
        names = head.names
        check_columns(names, asked)
        check_fields(names, asked)
        standard = {one.name: one for one in reversed(head.dimensions)}  # an extra dimension never replaces them
        asked_names = (*asked.fields, *([asked.label] if asked.label else []))
        wanted = {(at := position(names, name)): head.dimensions[at] for name in asked_names}
        if not asked.label:
            wanted.setdefault(names.index("classification"), standard["classification"])
        points, colors, more = [], [], {at: [] for at in wanted}
        channels = ("red", "green", "blue") if "red" in standard else ()
        for records in _blocks(file, head, {*"xyz", *channels, *(dimension.name for dimension in wanted.values())}):
            points.append(np.column_stack([standard[axis].of(records) for axis in "xyz"]))
            if channels:
                colors.append(np.column_stack([standard[name].of(records) for name in channels]))
            for at, dimension in wanted.items():
                more[at].append(dimension.of(records).copy())
    columns = Columns((names[at], np.concatenate(values)) for at, values in more.items())
    labels, unlabeled, _ = labels_from(columns, asked, ("classification",))
    rgb, doubt = colors_of(np.concatenate(colors)) if colors else (None, None)
    if any(record.user == b"lascompatible" for record in head.records):
        doubt = joined(doubt, "it is in LASzip's compatibility mode: classes above 31, in extra bytes, were not read")
    fields = fields_from(columns, asked)
    return Content(np.concatenate(points), names, fields, rgb, labels, unlabeled, doubt=doubt)


# ---- the header and its records


def _header(file: BinaryIO, size: int) -> Header:
    """The Header, checked: what it promises is in the file. 4 billion records would keep readers busy for minutes."""
    head = _read_at(file, 0, 375)
    if len(head) < 227:
        raise ReadError("truncated: the header is cut")
    major, minor = head[24], head[25]
    if major != 1 or minor > 5:
        raise ReadError(f"is LAS {major}.{minor}; kpcore reads 1.0 to 1.5")
    header_size, start, num_records, form, record_size, num = struct.unpack_from("<HIIBHI", head, 94)
    compressed, form = bool(form & 0xC0), form & 0x3F  # LASzip sets the highest bit, or both
    least = {3: 235}.get(minor, 227 if minor < 3 else 375)
    if len(head) < least or not 227 <= header_size <= start <= size:
        raise ReadError(f"truncated: the points start at byte {start} of {size}")
    if header_size < least:
        raise ReadError(f"damaged: a header of {header_size} bytes, version 1.{minor} has {least}")
    if minor >= 4:
        num = struct.unpack_from("<Q", head, 247)[0] or num  # some writers fill in the old count alone
    if num == 0:
        raise ReadError("holds no points")
    if form >= len(_SIZES) or record_size < _SIZES[form]:
        raise ReadError(f"damaged: point format {form} in records of {record_size} bytes")
    numbers = struct.unpack_from("<6d", head, 131)
    if not np.isfinite(numbers).all() or 0 in numbers[:3]:
        raise ReadError(f"damaged: expected finite scales other than 0 and finite offsets, got {numbers}")

    before, at, records = _read_at(file, 0, start), header_size, []
    for _ in range(num_records):
        if at + 54 > start:
            raise ReadError(f"damaged: {num_records} variable-length records do not fit {start - header_size} bytes")
        number, length = struct.unpack_from("<HH", before, at + 18)
        records.append(_record(before[at : at + 54], number, before[at + 54 : at + 54 + length]))
        at += 54 + length
    laszip = next((record.data for record in records if record.is_laszip), b"")
    described = [record.data for record in records if record.is_extra_bytes]
    extended = [one for one in _extended(file, head, minor, size) if one[2].is_extra_bytes]
    behind = [_read_at(file, at + 60, length) for at, length, _ in extended]
    extra, undescribed, fits = _extra_dimensions(b"".join(described + behind), _SIZES[form], record_size)
    dimensions = [*_standard_dimensions(form, numbers[:3], numbers[3:]), *extra]
    header = Header(
        raw=before[:header_size], records=records, padding=before[at:], minor=minor, point_format=form, num=num,
        size=record_size, compressed=compressed, laszip=laszip, end=start + num * record_size, dimensions=dimensions,
        undescribed=undescribed, may_grow=fits and not behind,
    )  # fmt: skip
    if not compressed:
        if header.end > size:
            raise ReadError(f"truncated: {num} points of {record_size} bytes from byte {start} exceed {size} bytes")
        return header
    end, chunk = _check_chunks(file, header, size)
    return header._replace(end=end, chunk=chunk)


def _record(header: bytes, number: int, data: bytes) -> Record:
    return Record(header[2:18].partition(b"\0")[0], number, header, data)


def _extended(file: BinaryIO, head: bytes, minor: int, size: int) -> Iterator[tuple[int, int, Record]]:
    """(byte, length of the data, Record without it) of the extended records, up to the first that exceeds the file."""
    if minor < 4:
        return
    at, count = struct.unpack_from("<QI", head, 235)
    for _ in range(min(count, _MOST_RECORDS)):
        header = _read_at(file, at, 60) if at < size else b""
        if len(header) < 60 or (length := struct.unpack_from("<Q", header, 20)[0]) > size - at - 60:
            return
        yield at, length, _record(header, struct.unpack_from("<H", header, 18)[0], b"")
        at += 60 + length


def _standard_dimensions(form: int, scales: Sequence[float], offsets: Sequence[float]) -> list[Dimension]:
    """The dimensions of a point format (LAS 1.4 R15, tables 7 to 17)."""
    dimensions = [Dimension(name, 4 * i, "<i4", scale=scales[i], offset=offsets[i]) for i, name in enumerate("xyz")]
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


def _extra_dimensions(described, at, record_size):
    """([Dimension], bytes that nothing describes, whether all that is described is there) from a byte of records on."""
    dimensions = []
    for i in range(0, len(described) - 191, 192):
        kind, options = described[i + 2 : i + 4]
        name = decoded(described[i + 4 : i + 36].partition(b"\0")[0])
        count = 1 + (kind - 1) // 10 if kind else 1  # 11 to 30, of old: two or three numbers
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


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


# ---- points


def _check_chunks(file: BinaryIO, head: Header, size: int) -> tuple[int, float]:
    """What lazrs takes on trust; the byte where the compressed points end, and the points of the largest chunk."""
    lazrs, laszip, start = require("lazrs", "io"), head.laszip, head.start
    if len(laszip) < 34:
        raise ReadError("damaged: compressed, but without a LASzip record")
    num_items = struct.unpack_from("<H", laszip, 32)[0]
    if len(laszip) < 34 + 6 * num_items:
        raise ReadError("damaged: the LASzip record is cut")
    compressor, chunk_size = laszip[0], struct.unpack_from("<I", laszip, 12)[0]
    items = struct.unpack_from(f"<{3 * num_items}H", laszip, 34)  # (type, size, version) each
    if sum(items[1::3]) != head.size:
        raise ReadError(f"damaged: LASzip items of {sum(items[1::3])} bytes for points of {head.size}")
    layered = any(kind >= 10 for kind in items[::3])  # types 10 to 14 are of point formats 6 to 10
    if compressor not in (1, 2, 3) or (compressor == 3) != layered:
        raise ReadError(f"damaged: LASzip's compressor {compressor} for items of types {list(items[::3])}")
    if compressor == 1:  # point by point, of the first LASzip: no chunks, no table of these
        return _first_behind(head, start, size), math.inf
    table = struct.unpack("<q", _read_at(file, start, 8).ljust(8, b"\0"))[0]
    if table == -1:  # written to a pipe: the position stands at the end
        table = struct.unpack("<q", _read_at(file, size - 8, 8))[0]
    if not start + 8 <= table <= size - 8:
        raise ReadError(f"truncated: the chunk table starts at byte {table} of {size}")
    num_chunks = struct.unpack_from("<I", _read_at(file, table, 8), 4)[0]
    # Every chunk starts with one whole point.
    if num_chunks * head.size > table - start or head.num > num_chunks * chunk_size:
        raise ReadError(f"damaged: {head.num} points in {num_chunks} chunks do not fit {table - start} bytes")
    file.seek(start)
    chunks = lazrs.read_chunk_table(file, lazrs.LazVlr(laszip))
    if (promised := start + 8 + sum(length for _, length in chunks)) != table:
        raise ReadError(f"damaged: chunks up to byte {promised}, the chunk table starts at byte {table}")
    counts = [count for count, _ in chunks]
    if chunk_size == _VARYING and sum(counts) != head.num:
        raise ReadError(f"damaged: {head.num} points promised, {sum(counts)} in chunks")
    if compressor == 3:  # layered: a point, the chunk's number of points, the size of each layer, the layers
        layers = {10: 9, 11: 1, 12: 2, 13: 1}  # point, RGB, RGB and NIR, wave packet; extra bytes have one each
        words = 1 + sum(layers.get(kind, width) for kind, width in zip(items[::3], items[1::3], strict=True))
        at, total = start + 8, 0
        while at < table:
            count, *lengths = struct.unpack(f"<{words}I", _read_at(file, at + head.size, 4 * words))
            total, at = total + count, at + head.size + 4 * words + sum(lengths)
        if (total, at) != (head.num, table):
            raise ReadError(f"damaged: {head.num} points up to byte {table} promised, {total} up to byte {at} there")
    again = io.BytesIO()
    lazrs.write_chunk_table(again, chunks, lazrs.LazVlr(laszip))
    same = _read_at(file, table, len(again.getvalue())) == again.getvalue()
    return table + len(again.getvalue()) if same else _first_behind(head, table, size), max(counts)


def _lazrs(name, largest):
    """A class of lazrs: that for several threads, where kpcore has several and the largest chunk has that many bytes.

    A chunk that promises 200 GB makes the class for several threads end the process, where that for one raises. A
    forked child has one thread: those of its parent are not there, and lazrs would wait for them.
    """
    several = largest <= _LARGEST_CHUNK and get_num_threads() > 1 and not _forked
    return getattr(require("lazrs", "io"), f"Par{name}" if several else name)


def _note_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _blocks(file: BinaryIO, head: Header, names: set[str] | None = None) -> Iterator[np.ndarray]:
    """The points' records, (n, size) uint8 each, in their order; of a LAZ with layers perhaps only these dimensions."""
    file.seek(head.start)
    unpack = None
    if head.compressed:
        lazrs = require("lazrs", "io")
        parts = {"ALL"} if names is None else {"XY_RETURNS_CHANNEL", *(_LAYERS.get(name, "ALL") for name in names)}
        flags = np.bitwise_or.reduce([getattr(lazrs, f"SELECTIVE_DECOMPRESS_{part}") for part in parts])
        unpacker = _lazrs("LasZipDecompressor", head.chunk * head.size)
        unpack = unpacker(file, head.laszip, lazrs.DecompressionSelection(int(flags)))
    for begin in range(0, head.num, _BLOCK):
        shape = min(_BLOCK, head.num - begin), head.size
        if unpack:
            records = np.zeros(shape, np.uint8)
            unpack.decompress_many(records.reshape(-1))
        else:
            records = np.fromfile(file, np.uint8, shape[0] * shape[1]).reshape(shape)
        yield records


# ---- labels


def label_field(source: Path, label: str | None, into: str | None) -> LabelField:
    size = source.stat().st_size
    with source.open("rb") as file:
        head = _header(file, size)
        tail = _tail_parts(file, head, size)
    at, name = None, label if into is None else into
    if name is not None:
        at = position(head.names, name)
    if at is None and into is None:
        at = head.names.index("classification")  # the standard one, if an extra dimension has this name too
    dimension = _new_dimension(head, into) if at is None else head.dimensions[at]
    if dimension.scale is not None:
        raise ReadError(f"field {dimension.name} is scaled; expected one of whole numbers")
    least, most = (0, (1 << dimension.bits) - 1) if dimension.bits else span(dimension.dtype)

    def write(out: Path, labels: np.ndarray, kept: np.ndarray) -> None:
        _write(source, head, tail, dimension, out, labels, kept)

    def check(out: Path) -> None:
        if out.name.lower().endswith(".copc.laz"):
            raise ReadError(f"labels are written to a plain LAZ, which no name should call a COPC: {out.name}")
        _check_packets(source, head, out)

    doubt = None
    if head.point_format in (4, 5, 9, 10) and head.raw[6] & 4:
        doubt = "its waveforms are in a .wdp file beside it, which is not copied"
    return LabelField(dimension.name, head.num, least, most, write, check, doubt)


def _new_dimension(head: Header, name: str) -> Dimension:
    """A field at the end of each record."""
    if not 0 < len(name.encode()) <= 32:
        raise ReadError(f"expected a name of 1 to 32 bytes for a new field, got {name!r}")
    length = sum(len(record.data) for record in head.records if record.is_extra_bytes)
    if not head.may_grow or head.size + 4 > 65_535 or length + len(_description(head, name)) > 65_535:
        raise ReadError(
            f"cannot have a new field {name}: its extra bytes are described behind the points, or wrongly, or too many"
        )
    return Dimension(name, head.size, "<i4")


def _description(head: Header, name: str) -> bytes:
    """What describes the bytes that nothing described, and behind them a new field."""
    pieces = [min(255, head.undescribed - at) for at in range(0, head.undescribed, 255)]
    blank = b"".join(struct.pack("<2xBB188x", 0, piece) for piece in pieces)
    return blank + struct.pack("<2xBB32s156x", _TYPES.index("i4"), 0, name.encode())


def _tail_parts(file: BinaryIO, head: Header, size: int) -> tuple[list[tuple[int, int]], int]:
    """([(begin, end)] of what is to be copied from behind the points, number of extended records left out).

    A COPC's octree says where in the file its points are, which is elsewhere in another file.
    """
    if not any(record.user == b"copc" for record in head.records):
        return [(head.end, size)], 0
    parts, begin = [], head.end
    for at, length, record in _extended(file, head.raw, head.minor, size):
        if record.user == b"copc" and at >= begin:
            parts.append((begin, at))
            begin = at + 60 + length
    return [*parts, (begin, size)], len(parts)


def _pointers(head: Header) -> list[tuple[int, int]]:
    """(place in the header, byte) for what lies behind the points: waveforms from 1.3 on, extended records from 1.4."""
    places = (227, 235)[: max(0, min(head.minor, 4) - 2)]
    return [(place, struct.unpack_from("<Q", head.raw, place)[0]) for place in places]


def _first_behind(head: Header, at: int, size: int) -> int:
    """The first byte behind another that the header points to."""
    return min((byte for _, byte in _pointers(head) if at < byte < size), default=size)


def _write(source, head, tail, dimension, out, labels, kept):
    """The file again: other bytes are those of labels, compressed points, and what says where things are."""
    parts, left_out = tail
    compressed, added = out.suffix.lower() == ".laz", 4 if dimension.at == head.size else 0
    laszip = _laszip(head, head.size + added) if compressed else None
    records = _records(head, _description(head, dimension.name) if added else b"", laszip)
    header = bytearray(head.raw)
    start = len(header) + sum(len(record.raw) for record in records) + len(head.padding)
    form = header[104] if compressed == head.compressed else head.point_format | 0x80 * compressed
    struct.pack_into("<IIBH", header, 96, start, len(records), form, head.size + added)

    with source.open("rb") as file, out.open("wb") as written:
        target = _WriteErrors(written)
        target.write(bytes(header) + b"".join(record.raw for record in records) + head.padding)
        pack = _compressor(target, laszip) if compressed else None
        begin = done = 0
        for block in _blocks(file, head):
            if added:
                block = np.pad(block, ((0, 0), (0, added)))
            chosen = kept[begin : begin + len(block)]
            count = int(chosen.sum())
            dimension.put(block, chosen, labels[done : done + count])
            begin, done = begin + len(block), done + count
            if pack:
                target.call(pack.compress_many, block.reshape(-1))
            else:
                target.write(block)
        if pack:
            target.call(pack.done)
        target.seek(0, io.SEEK_END)
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


def _records(head: Header, description: bytes, laszip: bytes | None) -> list[Record]:
    """The records of a file with these points: with the description of a new field, for LASzip or for plain points."""
    records = [record for record in head.records if record.user != b"copc"]
    if description:
        records = _with(records, lambda record: record.is_extra_bytes, b"LASF_Spec", 4, description)
    if laszip is None:
        return [record for record in records if not record.is_laszip]
    records = [record.with_data(b"") if record.is_laszip else record for record in records]
    return _with(records, lambda record: record.is_laszip, b"laszip encoded", 22204, laszip)


class _WriteErrors:
    """A file that remembers why it could not be written, which lazrs does not tell: "Failed to call write"."""

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
        """Call a function of lazrs that writes."""
        try:
            function(*arguments)
        except BaseException:
            if self.error:
                raise self.error from None
            raise


def _with(records: list[Record], fits: Callable[[Record], bool], user: bytes, number: int, data: bytes) -> list[Record]:
    """The records with more data in the last that fits, or in a new one."""
    at = max((i for i, record in enumerate(records) if fits(record)), default=len(records))
    if at == len(records):
        records = [*records, _record(struct.pack("<H16sHH32s", 0, user, number, 0, b""), number, b"")]
    return [*records[:at], records[at].with_data(records[at].data + data), *records[at + 1 :]]


def _laszip(head: Header, size: int) -> bytes:
    """What says how points are compressed: as they were, if lazrs can."""
    fresh = (
        require("lazrs", "io")
        .LazVlr.new_for_compression(head.point_format, size - _SIZES[head.point_format])
        .record_data()
    )
    same = head.compressed and (head.laszip[0], head.laszip[32:]) == (fresh[0], fresh[32:])
    return head.laszip if same and struct.unpack_from("<I", head.laszip, 12)[0] != _VARYING else fresh


def _compressor(target, laszip):
    layout = require("lazrs", "io").LazVlr(laszip)
    return _lazrs("LasZipCompressor", layout.chunk_size() * layout.item_size())(target, layout)


def _check_packets(source: Path, head: Header, out: Path) -> None:
    """lazrs 0.8.2 loses wave packets of formats 9 and 10 where channels of the scanner alternate."""
    if out.suffix.lower() != ".laz" or head.point_format not in (9, 10):
        return
    laszip = _laszip(head, head.size)
    with source.open("rb") as file:
        for block in _blocks(file, head):
            packed, again = io.BytesIO(), np.zeros_like(block)
            pack = _compressor(packed, laszip)
            pack.compress_many(block.reshape(-1))
            pack.done()
            packed.seek(0)
            require("lazrs", "io").LasZipDecompressor(packed, laszip).decompress_many(again.reshape(-1))
            if not np.array_equal(block, again):
                raise ReadError("its wave packets would be lost in a LAZ file by lazrs; write a LAS file")

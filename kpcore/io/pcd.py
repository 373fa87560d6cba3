"""Point Cloud Library files (PCD): ascii, binary, binary_compressed."""

from __future__ import annotations

import re
import shutil
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import (
    LABELS,
    Content,
    LabelField,
    NamedArrays,
    ReadError,
    Request,
    are_integers,
    check_columns,
    check_extra,
    decode_text,
    first_name_index,
    from_columns,
    integer_range,
    name_index,
)
from kpcore.io.table import BLOCK, check_new_name, filled, points_first, records, table_of
from kpcore.io.text import check_lines, numbers, row_words, write_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from kpcore.io.table import Column, Table

KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")


class Header(NamedTuple):
    fields: list[tuple[str, np.dtype, int]]  #: (name, type, count of numbers) of each field
    num: int  #: number of points
    height: int  #: rows of an organized cloud (a depth image), or 1
    encoding: str
    num_lines: int
    start: int  #: the byte where the data starts
    viewpoint: list[str]  #: words of that line

    @property
    def record(self) -> int:
        """Bytes of a point in a binary file."""
        return sum(kind.itemsize * count for _, kind, count in self.fields)


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    names = tuple(name for name, _, _ in _header(path).fields if name != "_")
    check_columns(names, request)
    return names


def read(path: Path, size: int, request: Request) -> Content:
    # Not through pypcd4 1.5.1: it reads a truncated ascii file without an error, and rejects two spaces between
    # numbers, files without COUNT and versions before 0.7.
    header = _header(path)
    columns = [(name, table[:, 0] if table.shape[1] == 1 else table) for name, table in _fields(path, size, header)]
    content = from_columns(NamedArrays(one for one in columns if one[0] != "_"), request)
    camera = header.height > 1 and np.nanmin(content.points[:, 2]) > 0  # a depth image: x right, y down, z forward
    return content._replace(up=(0, -1, 0)) if camera else content


def _fields(path: Path, size: int, header: Header) -> list[tuple[str, np.ndarray]]:
    """[(name, (N, count) values)] of all fields, padding too."""
    body = size - header.start
    if header.encoding == "ascii":
        return _ascii(path, header, body)
    if header.encoding == "binary":
        if header.num * header.record > body:
            raise ReadError(f"truncated: {header.num} points need {header.num * header.record} bytes, got {body}")
        layout = [(f"{at}", kind, (count,)) for at, (_, kind, count) in enumerate(header.fields)]
        table = np.fromfile(path, layout, header.num, offset=header.start)
        return [(name, table[f"{at}"]) for at, (name, _, _) in enumerate(header.fields)]
    if header.encoding == "binary_compressed":
        return _compressed(path, header, body, header.record)
    raise ReadError(f"DATA: expected ascii, binary or binary_compressed, got {header.encoding}")


def _header(path: Path) -> Header:
    words, text = {}, b""
    with path.open("rb") as file:
        while "DATA" not in words:
            line = file.readline(4096)
            if not line or len(text) > 1 << 20:
                raise ReadError("is not a PCD file, or its header is truncated: it has no DATA line")
            text += line
            key, *values = decode_text(line).split() or ["#"]
            key = "FIELDS" if key == "COLUMNS" else key  # its name in version .5
            if key in words:
                raise ReadError(f"damaged: the header has two {key} lines")
            if key in KEYS:
                words[key] = values
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "DATA") if not words.get(key)]
    if missing or not (words.get("WIDTH") or words.get("POINTS")):
        raise ReadError(f"damaged: the header has no {' '.join(missing) or 'WIDTH'} line")
    names, kinds = words["FIELDS"], [kind.upper() for kind in words["TYPE"]]
    sizes, counts = _integers(words, "SIZE", 1), _integers(words, "COUNT", 0) or [1] * len(names)
    for key, values in (("SIZE", sizes), ("TYPE", kinds), ("COUNT", counts)):
        if len(values) != len(names):
            raise ReadError(f"damaged: FIELDS names {len(names)} fields, {key} has {len(values)}")
    fields = []
    for name, kind, size, count in zip(names, kinds, sizes, counts, strict=True):
        if size not in {"I": (1, 2, 4, 8), "U": (1, 2, 4, 8), "F": (4, 8)}.get(kind, ()):
            raise ReadError(f"damaged: field {name} has TYPE {kind} of SIZE {size}")
        if count:  # some drivers write padding as fields of COUNT 0
            fields.append((name, np.dtype(f"<{kind.lower()}{size}"), count))
    points = (_integers(words, "POINTS", 0) or [None])[0]
    height = (_integers(words, "HEIGHT", 0) or [1])[0]
    width = (_integers(words, "WIDTH", 0) or [points])[0]
    if points not in (None, width * height):
        raise ReadError(f"damaged: POINTS is {points}, but WIDTH x HEIGHT is {width} x {height}")
    if width * height == 0:
        raise ReadError("holds no points")
    num_lines = len(re.findall(rb"\r\n|\r|\n", text))  # counted as by files opened as text
    return Header(fields, width * height, height, words["DATA"][0], num_lines, len(text), words.get("VIEWPOINT", []))


def _integers(words: dict[str, list[str]], key: str, smallest: int) -> list[int]:
    """The whole numbers of a header line; [] if the line is missing."""
    values = words.get(key, [])
    for value in values:
        if not re.fullmatch(r"\+?\d{1,18}", value, re.ASCII) or int(value) < smallest:
            raise ReadError(f"damaged: {key} is {value[:40]}, expected a whole number of {smallest} or more")
    return [int(value) for value in values]


def _ascii(path: Path, header: Header, body: int) -> list[tuple[str, np.ndarray]]:
    width = sum(count for _, _, count in header.fields)
    if header.num * width * 2 - 1 > body:  # a number takes at least a digit and a space
        raise ReadError(f"truncated: declares {header.num} points of {width} numbers in {body} bytes")
    check_lines(path)
    table = numbers(path, skip=header.num_lines)
    if table.shape != (header.num, width):
        raise ReadError(f"declares {header.num} points of {width} numbers, holds a table of {table.shape}")
    columns, at = [], 0
    for name, kind, count in header.fields:
        values, at = table[:, at : at + count], at + count
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            valid = are_integers(values, limits.min, limits.max)
            if not valid.all():
                row, place = np.argwhere(~valid)[0]
                raise ReadError(f"field {name} is {values[row, place]:.15g} (point {row}), which is not {kind.name}")
            if kind.itemsize == 8 and np.abs(values).max() > 2**53:  # float64 has rounded these
                values = _exact_integers(path, header.num_lines, range(at - count, at), name, kind)
        columns.append((name, values.astype(kind, copy=False)))
    return columns


def _exact_integers(path: Path, skip: int, places: range, name: str, kind: np.dtype) -> np.ndarray:
    """NamedArrays of an ascii file read as 64-bit integers, without float64 in between."""
    try:
        return np.loadtxt(path, kind, skiprows=skip, usecols=places, ndmin=2, encoding="latin-1")
    except ValueError:
        raise ReadError(f"field {name} holds numbers that are not {kind.name}") from None


def _compressed(path: Path, header: Header, body: int, record: int) -> list[tuple[str, np.ndarray]]:
    with path.open("rb") as file:
        file.seek(header.start)
        data = file.read()
    if body < 8:
        raise ReadError(f"truncated: expected 8 bytes of sizes before the compressed data, got {body}")
    packed, unpacked = struct.unpack_from("<II", data)
    if packed > body - 8:
        raise ReadError(f"truncated: expected {packed} compressed bytes, got {body - 8}")
    if unpacked != header.num * record:
        raise ReadError(
            f"damaged: expected {header.num * record} bytes for {header.num} points, unpacked size is {unpacked}"
        )
    plain, at, columns = _lzf(data[8 : 8 + packed], unpacked), 0, []
    for name, kind, count in header.fields:  # one field after the other, each for all points
        columns.append((name, np.ndarray((header.num, count), kind, plain, at)))
        at += header.num * count * kind.itemsize
    return columns


def _lzf(data: bytes, size: int) -> bytes:
    """Unpack LibLZF data. 5 MB, a frame of a Kinect, take 0.15 s.

    A control byte below 32 starts a run of literal bytes, others copy bytes from up to 8 KiB before.
    """
    out, i, end = bytearray(), 0, len(data)
    data += bytes(2)  # so that reading beyond a truncated copy is no IndexError: the length is checked below
    while i < end and len(out) <= size:
        control, i = data[i], i + 1
        if control < 32:
            out += data[i : i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length, i = 7 + data[i], i + 1
        start, length, i = len(out) - ((control & 31) << 8) - data[i] - 1, length + 2, i + 1
        if start < 0:
            raise ReadError("damaged LZF data")
        while length > 0:  # source and copy may overlap
            part = out[start : start + length]
            out += part
            length -= len(part)
    if len(out) != size:
        raise ReadError("damaged LZF data")
    return bytes(out)


# ---- labels


def label_field(source: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype]) -> LabelField:
    """All bytes of other fields stay as they are; binary_compressed becomes binary."""
    header, size = _header(source), source.stat().st_size
    _fields(source, size, header)  # what is damaged is refused before long work
    names = [name for name, _, _ in header.fields]
    label = into or label
    at = name_index(names, label) if label else first_name_index(names, LABELS)
    name = (label or "label") if at is None else names[at]
    dtype = np.dtype("i4") if at is None else _number_type(header, at)
    places = {name: at, **{other: name_index(names, other) for other in extra}}  # of each field written; None: new
    new = {
        other: np.dtype("<i4") if other == name else extra[other] for other, place in places.items() if place is None
    }
    for other, kind in extra.items():
        if places[other] is not None:
            check_extra(names[places[other]], _number_type(header, places[other]), kind)
    for other in new:
        check_new_name("extra" if other in extra else "label, into", other)
        if other == "_":
            raise ReadError("expected a name for a new field, got '_', which is that of padding")

    def write(out: Path, labels: np.ndarray, kept: np.ndarray, extra: Mapping[str, np.ndarray]) -> list[str]:
        values = {name: labels, **extra}
        with source.open("rb") as file, out.open("wb") as copy:
            copy.write(b"".join(_header_line(line, new) for line in file.read(header.start).splitlines(keepends=True)))
        if header.encoding == "ascii":
            starts = np.cumsum([0, *(count for _, _, count in header.fields)])
            edits = [
                (int(starts[at]), row_words(values[one], kept, "")) for one, at in places.items() if at is not None
            ]
            added = [row_words(values[one], kept, "0") for one in new]
            with (
                source.open(encoding="latin-1", newline="") as file,
                out.open("a", encoding="latin-1", newline="") as copy,
            ):
                for _ in range(header.num_lines):
                    file.readline()
                write_rows(file, copy, None, header.num, int(starts[-1]), edits, added)
            return []
        starts = np.cumsum([0, *(kind.itemsize * count for _, kind, count in header.fields)])
        added = {one: filled(kept, values[one], kind.newbyteorder("<")) for one, kind in new.items()}
        with source.open("rb") as file, out.open("ab") as copy:
            done = 0
            for begin, rows in _records(source, file, header, size):
                chosen = kept[begin : begin + len(rows)]
                count = int(chosen.sum())
                for one, at in places.items():
                    if at is not None:
                        kind = header.fields[at][1]
                        cells = rows[:, starts[at] : starts[at] + kind.itemsize]
                        cells[chosen] = _bytes(values[one][done : done + count].astype(kind))
                cells = [_bytes(column[begin : begin + len(rows)]) for column in added.values()]
                copy.write(np.ascontiguousarray(np.concatenate([rows, *cells], axis=1)))
                done += count
            if header.encoding == "binary":
                shutil.copyfileobj(file, copy)
        return []

    return LabelField(name, header.num, *integer_range(dtype), write)


def _number_type(header: Header, at: int) -> np.dtype:
    name, kind, count = header.fields[at]
    if count != 1:
        raise ReadError(f"{name} has {count} numbers for each point; name another or a new field with into=")
    return kind


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.itemsize)


def _records(source: Path, file: BinaryIO, header: Header, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first point, (n, record) bytes) of some points at a time."""
    if header.encoding == "binary":
        file.seek(header.start)
        for begin in range(0, header.num, BLOCK):
            count = min(BLOCK, header.num - begin)
            yield begin, np.fromfile(file, np.uint8, count * header.record).reshape(count, header.record)
        return
    columns = [values for _, values in _fields(source, size, header)]
    for begin in range(0, header.num, BLOCK):
        parts = [np.ascontiguousarray(values[begin : begin + BLOCK]) for values in columns]
        yield begin, np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in parts], axis=1)


def _header_line(line: bytes, new: Mapping[str, np.dtype]) -> bytes:
    """A line of the header, with the words of new fields."""
    words = {
        b"FIELDS": list(new), b"COLUMNS": list(new), b"SIZE": [kind.itemsize for kind in new.values()],
        b"TYPE": [kind.kind.upper() for kind in new.values()], b"COUNT": [1] * len(new),
    }  # fmt: skip
    key = line.split()[:1]
    if key == [b"DATA"]:
        return line.replace(b"binary_compressed", b"binary")
    more = "".join(f" {word}" for word in words.get(key[0] if key else b"", ())).encode()
    text = line.rstrip()
    return text + more + line[len(text) :]


# ---- a new file


def table(path: Path, size: int) -> Table:
    """All fields of a file; the viewpoint and the rows of an organised cloud are missing."""
    header = _header(path)
    identity = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    missing = [f"its {header.num // header.height} x {header.height} layout"] * (header.height > 1)
    try:
        moved = bool(header.viewpoint) and [*map(float, header.viewpoint)] != identity
    except ValueError:
        moved = True
    missing += ["viewpoint"] * moved

    def load() -> list[tuple[str, np.ndarray]]:
        fields = [one for one in _fields(path, size, header) if one[0] != "_"]
        return points_first([(name, values[:, 0] if values.shape[1] == 1 else values) for name, values in fields])

    return table_of(load, lambda names: first_name_index(names, LABELS), missing)


def create(out: Path, num: int, columns: Sequence[Column], blocks: Iterable[list[np.ndarray]]) -> None:
    """Write a binary file with these fields."""
    lines = {
        "VERSION": ["0.7"],
        "FIELDS": [one.name for one in columns],
        "SIZE": [one.dtype.itemsize for one in columns],
        "TYPE": [one.dtype.kind.upper() for one in columns],
        "COUNT": [one.width for one in columns],
        "WIDTH": [num], "HEIGHT": [1], "VIEWPOINT": [0, 0, 0, 1, 0, 0, 0], "POINTS": [num], "DATA": ["binary"],
    }  # fmt: skip
    head = "".join(f"{key} {' '.join(map(str, words))}\n" for key, words in lines.items())
    with out.open("wb") as file:
        file.write(f"# .PCD v0.7 - Point Cloud Data file format\n{head}".encode())
        for arrays in blocks:
            file.write(records(columns, arrays))

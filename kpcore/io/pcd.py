"""Point Cloud Library files (PCD): ascii, binary, binary_compressed."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import (
    Content,
    NamedArrays,
    ReadError,
    Request,
    are_integers,
    check_columns,
    decode_text,
    from_columns,
)
from kpcore.io.text import check_lines, numbers

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")


class Header(NamedTuple):
    fields: list[tuple[str, np.dtype, int]]  #: (name, type, count of numbers) of each field
    num: int  #: number of points
    height: int  #: rows of an organized cloud (a depth image), or 1
    encoding: str
    num_lines: int
    start: int  #: the byte where the data starts


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    names = tuple(name for name, _, _ in _header(path).fields if name != "_")
    check_columns(names, request)
    return names


def read(path: Path, size: int, request: Request) -> Content:
    # Not through pypcd4 1.5.1: it reads a truncated ascii file without an error, and rejects two spaces between
    # numbers, files without COUNT and versions before 0.7.
    header = _header(path)
    body = size - header.start
    record = sum(kind.itemsize * count for _, kind, count in header.fields)
    if header.encoding == "ascii":
        columns = _ascii(path, header, body)
    elif header.encoding == "binary":
        if header.num * record > body:
            raise ReadError(f"truncated: {header.num} points need {header.num * record} bytes, got {body}")
        layout = [(f"{at}", kind, (count,)) for at, (_, kind, count) in enumerate(header.fields)]
        table = np.fromfile(path, layout, header.num, offset=header.start)
        columns = [(name, table[f"{at}"]) for at, (name, _, _) in enumerate(header.fields)]
    elif header.encoding == "binary_compressed":
        columns = _compressed(path, header, body, record)
    else:
        raise ReadError(f"DATA: expected ascii, binary or binary_compressed, got {header.encoding}")
    columns = [(name, table[:, 0] if table.shape[1] == 1 else table) for name, table in columns if name != "_"]
    content = from_columns(NamedArrays(columns), request)
    camera = header.height > 1 and np.nanmin(content.points[:, 2]) > 0  # a depth image: x right, y down, z forward
    return content._replace(up=(0, -1, 0)) if camera else content


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
    return Header(fields, width * height, height, words["DATA"][0], num_lines, len(text))


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

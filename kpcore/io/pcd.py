"""Point Cloud Library files (PCD): ascii, binary, binary_compressed."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import Asked, Columns, Content, ReadError, decoded, from_columns, whole
from kpcore.io.text import check_lines, numbers

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")


class Header(NamedTuple):
    fields: list[tuple[str, np.dtype, int]]  #: (name, type, how many numbers) each
    num: int  #: points
    height: int  #: rows of an image, or 1
    encoding: str
    num_lines: int
    start: int  #: the byte at which the data begins


def read(path: Path, size: int, asked: Asked) -> Content:
    # Not through pypcd4 1.5.1: it returns a cut ascii file as if it were whole, rejects two spaces between
    # numbers, files without COUNT and versions before 0.7.
    header = _header(path)
    body = size - header.start
    record = sum(kind.itemsize * count for _, kind, count in header.fields)
    if header.encoding == "ascii":
        columns = _ascii(path, header, body)
    elif header.encoding == "binary":
        if header.num * record > body:
            raise ReadError(f"truncated: {header.num} points need {header.num * record} bytes, {body} are there")
        layout = [(f"{at}", kind, (count,)) for at, (_, kind, count) in enumerate(header.fields)]
        table = np.fromfile(path, layout, header.num, offset=header.start)
        columns = [(name, table[f"{at}"]) for at, (name, _, _) in enumerate(header.fields)]
    elif header.encoding == "binary_compressed":
        columns = _compressed(path, header, body, record)
    else:
        raise ReadError(f"unknown DATA {header.encoding}")
    columns = [(name, table[:, 0] if table.shape[1] == 1 else table) for name, table in columns if name != "_"]
    content = from_columns(Columns(columns), asked)
    camera = header.height > 1 and np.nanmin(content.points[:, 2]) > 0  # an image: x right, y down, z forward
    return content._replace(up=(0, -1, 0)) if camera else content


def _header(path: Path) -> Header:
    words, text = {}, b""
    with path.open("rb") as file:
        while "DATA" not in words:
            line = file.readline(4096)
            if not line or len(text) > 1 << 20:
                raise ReadError("is not a PCD file, or its header is cut: it has no DATA line")
            text += line
            key, *values = decoded(line).split() or ["#"]
            key = "FIELDS" if key == "COLUMNS" else key  # the name in version .5
            if key in words:
                raise ReadError(f"damaged: the header has two lines {key}")
            if key in KEYS:
                words[key] = values
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "DATA") if not words.get(key)]
    if missing or not (words.get("WIDTH") or words.get("POINTS")):
        raise ReadError(f"damaged: the header has no {' '.join(missing) or 'WIDTH'}")
    names, kinds = words["FIELDS"], [kind.upper() for kind in words["TYPE"]]
    sizes, counts = _whole(words, "SIZE", 1), _whole(words, "COUNT", 0) or [1] * len(names)
    for key, values in (("SIZE", sizes), ("TYPE", kinds), ("COUNT", counts)):
        if len(values) != len(names):
            raise ReadError(f"damaged: FIELDS names {len(names)} fields, {key} has {len(values)}")
    fields = []
    for name, kind, size, count in zip(names, kinds, sizes, counts, strict=True):
        if size not in {"I": (1, 2, 4, 8), "U": (1, 2, 4, 8), "F": (4, 8)}.get(kind, ()):
            raise ReadError(f"damaged: field {name} has TYPE {kind} of SIZE {size}")
        if count:  # some lidars write padding of COUNT 0
            fields.append((name, np.dtype(f"<{kind.lower()}{size}"), count))
    points = (_whole(words, "POINTS", 0) or [None])[0]
    height = (_whole(words, "HEIGHT", 0) or [1])[0]
    width = (_whole(words, "WIDTH", 0) or [points])[0]
    if points not in (None, width * height):
        raise ReadError(f"promises {points} points but {width} x {height}")
    if width * height == 0:
        raise ReadError("holds no points")
    num_lines = len(re.findall(rb"\r\n|\r|\n", text))  # as files opened as text count them
    return Header(fields, width * height, height, words["DATA"][0], num_lines, len(text))


def _whole(words: dict[str, list[str]], key: str, least: int) -> list[int]:
    """The whole numbers of a line of the header, [] if it is not there."""
    values = words.get(key, [])
    for value in values:
        if not re.fullmatch(r"\+?\d{1,18}", value, re.ASCII) or int(value) < least:
            raise ReadError(f"damaged: {key} is {value[:40]}, expected a whole number of {least} or more")
    return [int(value) for value in values]


def _ascii(path: Path, header: Header, body: int) -> list[tuple[str, np.ndarray]]:
    width = sum(count for _, _, count in header.fields)
    if header.num * width * 2 - 1 > body:  # a digit and a space each
        raise ReadError(f"truncated: promises {header.num} points of {width} numbers in {body} bytes")
    check_lines(path)
    table = numbers(path, skip=header.num_lines)
    if table.shape != (header.num, width):
        raise ReadError(f"promises {header.num} points of {width} numbers, holds a table of {table.shape}")
    columns, at = [], 0
    for name, kind, count in header.fields:
        values, at = table[:, at : at + count], at + count
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            right = whole(values, limits.min, limits.max)
            if not right.all():
                row, place = np.argwhere(~right)[0]
                raise ReadError(f"field {name} is {values[row, place]:.15g} (point {row}), which is no {kind.name}")
            if kind.itemsize == 8 and np.abs(values).max() > 2**53:  # float64 cannot tell these from their neighbours
                values = _exact(path, header.num_lines, range(at - count, at), name, kind)
        columns.append((name, values.astype(kind, copy=False)))
    return columns


def _exact(path: Path, skip: int, places: range, name: str, kind: np.dtype) -> np.ndarray:
    try:
        return np.loadtxt(path, kind, skiprows=skip, usecols=places, ndmin=2, encoding="latin-1")
    except ValueError:
        raise ReadError(f"field {name} holds numbers that are no {kind.name}") from None


def _compressed(path: Path, header: Header, body: int, record: int) -> list[tuple[str, np.ndarray]]:
    with path.open("rb") as file:
        file.seek(header.start)
        data = file.read()
    if body < 8:
        raise ReadError(f"truncated: 8 bytes of sizes and compressed ones promised, {body} are there")
    packed, unpacked = struct.unpack_from("<II", data)
    if packed > body - 8:
        raise ReadError(f"truncated: {packed} compressed bytes promised, {body - 8} are there")
    if unpacked != header.num * record:
        raise ReadError(f"promises {header.num} points of {record} bytes but {unpacked} bytes")
    plain, at, columns = _lzf(data[8 : 8 + packed], unpacked), 0, []
    for name, kind, count in header.fields:  # one field after the other, each for all points
        columns.append((name, np.ndarray((header.num, count), kind, plain, at)))
        at += header.num * count * kind.itemsize
    return columns


def _lzf(data: bytes, size: int) -> bytes:
    """LibLZF's format: a literal run below 32, else a copy from up to 8 KiB back. A Kinect frame's 5 MB take 0.15 s."""
    out, i, end = bytearray(), 0, len(data)
    data += bytes(2)  # so that a cut copy is found by its result
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

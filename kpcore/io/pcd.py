"""Point Cloud Library files (PCD): ascii, binary, binary_compressed."""

from __future__ import annotations

import io
import struct

import numpy as np

from kpcore.io.cloud import Columns, ReadError, from_columns
from kpcore.io.text import numbers


def read(path, size, asked):
    # Not through pypcd4 1.5.1: it returns a cut ascii file as if it were whole, rejects two spaces between
    # numbers, files without COUNT and versions before 0.7.
    with path.open("rb") as file:
        header, num_lines = {}, 0
        while "DATA" not in header:
            line, num_lines = file.readline(4096), num_lines + 1
            if not line or len(header) > 100:
                raise ReadError("is not a PCD file, or its header is cut: it has no DATA line")
            key, *values = line.decode("latin-1").split() or ["#"]
            header[key] = values
        body = file.read()
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "WIDTH") if not header.get(key)]
    if missing or not header["DATA"]:
        raise ReadError(f"damaged: the header has no {' '.join(missing) or 'DATA'}")
    names, sizes, kinds = header["FIELDS"], header["SIZE"], header["TYPE"]
    counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
    fields = [
        (f"{name}{i}" if name == "_" else name, f"<{kind.lower()}{size}", (count,) if count != 1 else ())
        for i, (name, kind, size, count) in enumerate(zip(names, kinds, sizes, counts, strict=True))
    ]
    record = np.dtype(fields)
    width, height = int(header["WIDTH"][0]), int(header.get("HEIGHT", ["1"])[0])
    num = int(header.get("POINTS", [width * height])[0])
    if num != width * height:
        raise ReadError(f"promises {num} points but {width} x {height}")
    if num == 0:
        raise ReadError("holds no points")

    encoding = header["DATA"][0]
    if encoding == "ascii":
        empty = np.empty((0, sum(counts)))
        table = numbers(io.StringIO(body.decode()), before=num_lines) if body.strip() else empty
        if table.shape != (num, sum(counts)):
            raise ReadError(f"promises {num} points of {sum(counts)} numbers, holds a table of {table.shape}")
        starts = np.cumsum([0, *counts])
        columns = {name: table[:, at].astype(kind) for (name, kind, _), at in zip(fields, starts, strict=False)}
    elif encoding == "binary":
        if num * record.itemsize > len(body):
            raise ReadError(f"truncated: {num} points need {num * record.itemsize} bytes, {len(body)} are there")
        table = np.frombuffer(body, record, num)
        columns = {name: table[name] for name in record.names}
    elif encoding == "binary_compressed":
        packed, unpacked = struct.unpack_from("<II", body)
        if packed > len(body) - 8:
            raise ReadError(f"truncated: {packed} compressed bytes promised, {len(body) - 8} are there")
        if unpacked != num * record.itemsize:
            raise ReadError(f"promises {num} points of {record.itemsize} bytes but {unpacked} bytes")
        plain, at, columns = _lzf(body[8 : 8 + packed], unpacked), 0, {}
        for name in record.names:  # one field after the other, each for all points
            columns[name] = np.ndarray(num, record[name], plain, at)
            at += num * record[name].itemsize
    else:
        raise ReadError(f"unknown DATA {encoding}")

    content = from_columns(Columns(columns.items()), asked)
    camera = height > 1 and np.nanmin(content.points[:, 2]) > 0  # an image: x right, y down, z forward
    return content._replace(up=(0, -1, 0)) if camera else content


def _lzf(data, size):
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

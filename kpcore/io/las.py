"""LAS and LAZ."""

from __future__ import annotations

import struct

import numpy as np

from kpcore.config import require
from kpcore.io.cloud import Columns, ReadError, from_columns


def read(path, size, asked):
    _check_las(path, size)
    laspy = require("laspy", "io")
    las = laspy.read(path, laz_backend=laspy.LazBackend.Lazrs)
    columns = Columns((name, las[name]) for name in las.point_format.dimension_names if name not in "XYZ")
    columns.pairs += [(name, np.asarray(getattr(las, name))) for name in "xyz"]
    return from_columns(columns, asked)


def _check_las(path, size):
    """What laspy and lazrs take on trust: a header of 4 billion records keeps them busy for minutes."""
    with path.open("rb") as file:
        head = file.read(375)
        if len(head) < 227:
            raise ReadError("truncated: the header is cut")
        header_size, offset, num_vlrs, form, record, num = struct.unpack_from("<HIIBHI", head, 94)
        if head[25] >= 4:
            if len(head) < 375:
                raise ReadError("truncated: the header is cut")
            num = struct.unpack_from("<Q", head, 247)[0]
        if not 227 <= header_size <= offset <= size:
            raise ReadError(f"truncated: the points start at byte {offset} of {size}")
        if num == 0:
            raise ReadError("holds no points")
        vlrs, at, laszip = _at(file, 0, offset), header_size, b""
        for _ in range(num_vlrs):
            if at + 54 > offset:
                raise ReadError(f"damaged: {num_vlrs} variable-length records do not fit {offset - header_size} bytes")
            record_id, length = struct.unpack_from("<HH", vlrs, at + 18)
            if record_id == 22204 and vlrs.startswith(b"laszip encoded", at + 2):
                laszip = vlrs[at + 54 : at + 54 + length]
            at += 54 + length
        if not form & 0xC0:
            if offset + num * record > size:
                raise ReadError(f"truncated: {num} points of {record} bytes from byte {offset} exceed {size} bytes")
            return

        require("lazrs", "io")
        if len(laszip) < 34:
            raise ReadError("damaged: compressed, but without a LASzip record")
        chunk_size, num_items = struct.unpack_from("<I", laszip, 12)[0], struct.unpack_from("<H", laszip, 32)[0]
        items = struct.unpack_from(f"<{3 * num_items}H", laszip, 34)  # (type, size, version) each
        if sum(items[1::3]) != record:
            raise ReadError(f"damaged: LASzip items of {sum(items[1::3])} bytes for points of {record}")
        table = struct.unpack("<q", _at(file, offset, 8))[0]
        if table == -1:  # written to a pipe: the position stands at the end
            table = struct.unpack_from("<q", _at(file, size - 8, 8))[0]
        if not offset + 8 <= table <= size - 8:
            raise ReadError(f"truncated: the chunk table starts at byte {table} of {size}")
        num_chunks = struct.unpack_from("<I", _at(file, table, 8), 4)[0]
        # Every chunk starts with one whole point; the size 2**32 - 1 stands for chunks of varying size.
        if num_chunks * record > table - offset or num > num_chunks * chunk_size:
            raise ReadError(f"damaged: {num} points in {num_chunks} chunks do not fit {table - offset} bytes")
        if laszip[0] == 3:  # layered: a point, the chunk's number of points, the size of each layer, the layers
            layers = {10: 9, 11: 1, 12: 2, 13: 1}  # point, RGB, RGB and NIR, wave packet; extra bytes have one each
            words = 1 + sum(layers.get(kind, width) for kind, width in zip(items[::3], items[1::3], strict=True))
            at, found = offset + 8, 0
            while at < table:
                counts = struct.unpack(f"<{words}I", _at(file, at + record, 4 * words))
                found, at = found + counts[0], at + record + 4 * words + sum(counts[1:])
            if (found, at) != (num, table):
                raise ReadError(f"damaged: {num} points up to byte {table} promised, {found} up to byte {at} found")


def _at(file, position, count):
    file.seek(position)
    return file.read(count)


def label_field(source, label):
    raise ReadError("not yet")

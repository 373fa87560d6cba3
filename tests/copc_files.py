"""COPC files written byte by byte (copc.io, COPC 1.0), which laspy's CopcReader reads: for tests."""

import io
import struct

import numpy as np
import pytest

SIZES = {6: 30, 7: 36, 8: 38}


def records(points, form=7, scale=0.01, offset=(0.0, 0.0, 0.0), seed=0, **fields):
    """(n, size) uint8 records of a point format, coordinates rounded to steps, the rest random.

    `fields` may have classification, gps_time, return_number (n,) and colors (n, 3), of 16 bits.
    """
    rng = np.random.default_rng(seed)
    made = np.zeros((len(points), SIZES[form]), np.uint8)
    made[:, 12:14] = rng.integers(0, 256, (len(points), 2))
    made[:, :12] = np.rint((points - np.array(offset)) / scale).astype("<i4").view(np.uint8).reshape(-1, 12)
    made[:, 14] = fields.get("return_number", 1) | 16
    made[:, 16] = fields.get("classification", rng.integers(0, 9, len(points)))
    times = np.asarray(fields.get("gps_time", rng.random(len(points))), "<f8")
    made[:, 22:30] = np.ascontiguousarray(times).view(np.uint8).reshape(-1, 8)
    if form > 6:
        colors = np.asarray(fields.get("colors", rng.integers(0, 65_536, (len(points), 3))), "<u2")
        made[:, 30:36] = np.ascontiguousarray(colors).view(np.uint8).reshape(-1, 6)
    return made


def las(records, form=7, scale=0.01, offset=(0.0, 0.0, 0.0), vlrs=(), behind=b"", points=None):
    """The bytes of a LAS 1.4, or of a LAZ if the compressed `points` are passed.

    `vlrs` are (user ID, record ID, data), such as (b"LASF_Projection", 2112, WKT); `behind` is an extended record.
    """
    before = b"".join(struct.pack("<H16sHH32x", 0, user, number, len(data)) + data for user, number, data in vlrs)
    stored = records[:, :12].copy().view("<i4").reshape(-1, 3)
    body = records.tobytes() if points is None else points
    bounds = np.column_stack([stored.max(axis=0), stored.min(axis=0)]) * scale + np.array(offset)[:, None]
    start = 375 + len(before)
    head = struct.pack("<4sHH16xBB64xHH", b"LASF", 0, 17, 1, 4, 1, 2026)
    head += struct.pack("<HIIBH24x", 375, start, len(vlrs), form | 128 * (points is not None), records.shape[1])
    head += struct.pack("<12dQQIQ15Q", *[scale] * 3, *offset, *bounds.ravel(), 0, (start + len(body)) * bool(behind),
                        bool(behind), len(records), len(records), *[0] * 14)  # fmt: skip
    return head + before + body + behind


def copc(records, form=7, scale=0.01, offset=(0.0, 0.0, 0.0), depth=3, seed=0, cube=None):
    """The bytes of a COPC: each point at a random level up to `depth`, chunks in random order, a page for each octant.

    `cube` is the (low corner, side) of the octree; by default the smallest at the low corner of the points.
    """
    lazrs = pytest.importorskip("lazrs")
    rng = np.random.default_rng(seed)
    xyz = records[:, :12].copy().view("<i4").reshape(-1, 3) * scale + np.array(offset)
    low, side = (xyz.min(axis=0), (np.ptp(xyz, axis=0).max() or 1) * 1.0001) if cube is None else cube
    level = rng.integers(0, depth + 1, len(records))
    place = np.clip((xyz - low) / side * 2.0 ** level[:, None], 0, 2.0 ** level[:, None] - 1).astype(int)
    keys, of_point = np.unique(np.column_stack([level, place]), axis=0, return_inverse=True)
    chunks = [records[of_point.ravel() == node] for node in range(len(keys))]
    counts = {tuple(key): len(chunk) for key, chunk in zip(keys.tolist(), chunks, strict=True)}
    order = rng.permutation(len(keys))

    laszip = lazrs.LazVlr.new_for_compression(form, 0, True)
    start = 375 + 54 + 160 + 54 + len(laszip.record_data())
    stream = io.BytesIO()
    pack = lazrs.LasZipCompressor(stream, laszip)
    pack.compress_chunks([chunks[node].reshape(-1) for node in order])
    pack.done()
    stream.seek(0)
    *table, last = lazrs.read_chunk_table(stream, laszip)
    assert last == (0, 0)  # a chunk without points, as in files that laspy writes
    # lazrs stores positions from the start of the stream: those in the file are `start` more.
    packed = struct.pack("<q", start + struct.unpack("<q", stream.getvalue()[:8])[0]) + stream.getvalue()[8:]
    places, begin = {}, start + 8
    for node, (count, size) in zip(order.tolist(), table, strict=True):
        assert count == len(chunks[node])
        places[tuple(keys[node].tolist())] = (begin, size)
        begin += size

    present = {(level - up, x >> up, y >> up, z >> up) for level, x, y, z in counts for up in range(level + 1)}
    octants = sorted(key for key in present if key[0] == 1)
    pages = [[(0, 0, 0, 0)], *([key for key in sorted(present) if key[0] and under(key) == one] for one in octants)]
    root, sizes = start + len(packed) + 60, [32 * len(page) for page in pages]
    sizes[0] += 32 * len(octants)
    begins = root + np.cumsum(sizes) - sizes
    data = [b"".join(struct.pack("<4iQii", *key, *places.get(key, (0, 0)), counts.get(key, 0)) for key in page)
            for page in pages]  # fmt: skip
    further = zip(octants, begins[1:], sizes[1:], strict=True)
    data[0] += b"".join(struct.pack("<4iQii", *octant, begin, size, -1) for octant, begin, size in further)
    pages_data = b"".join(data)
    info = struct.pack("<5d2Q2d88x", *(low + side / 2), side / 2, side / 64, root, sizes[0], 0, 1)
    vlrs = [(b"copc", 1, info), (b"laszip encoded", 22204, laszip.record_data())]
    behind = struct.pack("<H16sHQ32x", 0, b"copc", 1000, len(pages_data)) + pages_data
    return las(records, form, scale, offset, vlrs, behind, packed)


def under(key):
    """The octant, a cube of level 1, that holds a cube."""
    level, *place = key
    return (1, *(one >> level - 1 for one in place))

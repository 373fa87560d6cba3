"""COPC 1.0: the points of a box, with their rows in the file, from the chunks of the octree that meet it.

A COPC is a LAZ in which each chunk holds the points of one cube of an octree; records say which (copc.io, COPC 1.0).
Labels are written by row, which laspy's CopcReader does not tell.
"""

from __future__ import annotations

import io
import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.config import require
from kpcore.io import las
from kpcore.io.cloud import ReadError, Request
from kpcore.io.scans import unchanged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import BinaryIO

    from numpy.typing import ArrayLike

    from kpcore.io.scans import Scan

_ENTRY = np.dtype([("key", "<i4", 4), ("begin", "<u8"), ("size", "<i4"), ("count", "<i4")])  # level x y z, ...
_PAGE = -1  # instead of a number of points: the entry is another page of the octree
_DEEPEST = 30  # levels, so that numbers of cubes are below 2**31
_MOST_OCTREES = 16  # kept between calls; one of 10**9 points has some 50,000 nodes


class Nodes(NamedTuple):
    """The nodes of an octree that hold points, in the order of the file: each is a chunk of the LAZ."""

    low: np.ndarray  #: (n, 3) float64, corners of the cubes, moved outwards by a step of the coordinates
    high: np.ndarray  #: (n, 3) float64
    first_row: np.ndarray  #: (n,) int64
    count: np.ndarray  #: (n,) int64, points
    begin: np.ndarray  #: (n,) int64, byte in the file
    size: np.ndarray  #: (n,) int64, compressed bytes

    def meeting(self, low: ArrayLike, high: ArrayLike) -> np.ndarray:
        """The indices of the nodes with cubes that meet a closed box of x and y."""
        return np.flatnonzero((self.low[:, :2] <= high).all(axis=1) & (self.high[:, :2] >= low).all(axis=1))


def num_points_in(scan: Scan, low: ArrayLike, high: ArrayLike) -> int:
    """The number of points in the cubes that meet a box of x and y, which `records_in` unpacks; at least its result."""
    octree = nodes(scan)
    return int(octree.count[octree.meeting(*_corners(low, high))].sum())


def records_in(
    scan: Scan, low: ArrayLike, high: ArrayLike, names: Collection[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, records) of the points in a box of x and y, its edges included.

    Parameters
    ----------
    scan : Scan
        Of a COPC.
    low, high : (2,) floats
        Coordinates as in the file; they may be infinite.
    names : collection of str, optional
        The dimensions that are unpacked besides x and y; bytes of others are undefined. By default all.

    Returns
    -------
    rows : (n,) int64, ascending
    records : (n, record_size) uint8

    Raises
    ------
    ReadError
        The file has changed since `scans.opened`, is damaged, or a point is outside of the cube of its node.
    """
    low, high = _corners(low, high)
    octree = nodes(scan)
    axes = las.selected(scan.dimensions, Request()).axes[:2]
    rows, parts = [np.zeros(0, np.int64)], [np.zeros((0, scan.record_size), np.uint8)]
    with unchanged(scan) as (file, head):
        for group in _groups(octree.meeting(low, high), octree.count):
            records = _unpacked(file, head, octree, group, names)
            counts = octree.count[group]
            begins = np.cumsum(counts) - counts
            is_in = np.ones(len(records), bool)
            for axis, dimension in enumerate(axes):
                values = dimension.read(records)
                is_beyond = np.minimum.reduceat(values, begins) < octree.low[group, axis]
                is_beyond |= np.maximum.reduceat(values, begins) > octree.high[group, axis]
                if is_beyond.any():  # a search by bounds would miss such points
                    row = octree.first_row[group][is_beyond.argmax()]
                    raise ReadError(f"damaged: points from {row} on are outside of their cube in the octree")
                is_in &= (values >= low[axis]) & (values <= high[axis])
            rows.append((np.repeat(octree.first_row[group] - begins, counts) + np.arange(len(records)))[is_in])
            parts.append(records[is_in])
    return np.concatenate(rows), np.concatenate(parts)


def _corners(low: ArrayLike, high: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if low.shape != (2,) or high.shape != (2,) or not (low <= high).all():
        raise ValueError(f"low, high: expected x and y of two corners, low <= high, got {low} and {high}")
    return low, high


def _groups(indices: np.ndarray, counts: np.ndarray) -> Iterator[np.ndarray]:
    """The indices in groups of at most a block of points, or of one node."""
    begin, total = 0, 0
    for at, count in enumerate(counts[indices].tolist()):
        if at > begin and total + count > las.BLOCK:
            yield indices[begin:at]
            begin, total = at, 0
        total += count
    if begin < len(indices):
        yield indices[begin:]


def _unpacked(
    file: BinaryIO, head: las.Header, octree: Nodes, group: np.ndarray, names: Collection[str] | None
) -> np.ndarray:
    """The records of some nodes.

    lazrs gets a LAZ of these chunks alone, as 0.8.2 seeks to wrong chunks if they differ in their number of points.
    """
    lazrs = require("lazrs", "io")
    chunks = [*zip(octree.count[group].tolist(), octree.size[group].tolist(), strict=True)]
    stream = io.BytesIO(struct.pack("<q", 8 + sum(size for _, size in chunks)))
    stream.seek(8)
    for begin, (_, size) in zip(octree.begin[group].tolist(), chunks, strict=True):
        stream.write(las.read_at(file, begin, size))
    lazrs.write_chunk_table(stream, chunks, lazrs.LazVlr(head.laszip))
    stream.seek(0)
    records = np.zeros((sum(count for count, _ in chunks), head.size), np.uint8)
    largest = max(count for count, _ in chunks) * head.size
    unpack = las.lazrs_class("LasZipDecompressor", largest)(stream, head.laszip, las.layers(names))
    unpack.decompress_many(records.reshape(-1))
    return records


@lru_cache(_MOST_OCTREES)
def nodes(scan: Scan) -> Nodes:
    """The nodes of the octree that hold points.

    Raises
    ------
    ReadError
        The scan is no COPC, or its octree is damaged: every node must be one chunk of the file, and every chunk a node.
    """
    with unchanged(scan) as (file, head):
        if not scan.is_copc or head.chunks is None or not head.has_varying_chunks:
            raise ReadError("expected a COPC, a LAZ with a record of an octree and chunks of varying numbers of points")
        info = head.records[0].data
        if len(info) < 56:
            raise ReadError(f"damaged: expected at least 56 bytes in the record of its octree, got {len(info)}")
        *center, half, _ = struct.unpack_from("<5d", info)
        if not all(map(math.isfinite, (*center, half))) or half < 0:
            raise ReadError(f"damaged: expected the finite centre and size of an octree, got {center} and {half}")
        entries = _entries(file, scan.size, *struct.unpack_from("<2Q", info, 40))
        entries = entries[np.argsort(entries["begin"], kind="stable")]

        chunks = np.array(head.chunks, np.int64).reshape(-1, 2)
        begins = head.start + 8 + np.cumsum(chunks[:, 1]) - chunks[:, 1]
        holds = chunks[:, 0] > 0
        begins, (count, size) = begins[holds], chunks[holds].T
        expected = (("begin", begins), ("size", size), ("count", count))
        if not all(np.array_equal(entries[name], values) for name, values in expected):
            raise ReadError(
                f"damaged: its octree has {len(entries)} nodes with {entries['count'].sum(dtype=np.int64)} points, "
                f"which are not its {len(count)} chunks with {scan.num_points} points"
            )
        level, key = entries["key"][:, :1], entries["key"][:, 1:]
        if not ((level >= 0) & (level <= _DEEPEST)).all() or not ((key >= 0) & (key < 2.0**level)).all():
            raise ReadError("damaged: a node of its octree is outside of the octree")
        side = 2 * half / 2.0**level
        low = np.array(center) - half + key * side
        high = low + side
        # Programs choose the node before they round coordinates to steps.
        step = np.abs([dimension.scale for dimension in las.selected(scan.dimensions, Request()).axes])
        margin = step + 4 * np.spacing(np.maximum(np.abs(low), np.abs(high)))
        return Nodes(low - margin, high + margin, np.cumsum(count) - count, count, begins, size)


def _entries(file: BinaryIO, file_size: int, begin: int, size: int) -> np.ndarray:
    """The entries with points of all pages of an octree; the first page is at byte `begin`."""
    pages, seen, entries, total = [(begin, size)], set(), [], 0
    while pages:
        begin, size = pages.pop()
        total += size
        if size <= 0 or size % _ENTRY.itemsize or begin + size > file_size:
            raise ReadError(f"damaged: a page of its octree has {size} bytes from byte {begin} of {file_size}")
        if begin in seen or total > file_size:  # or else pages that lie in each other could be endless
            raise ReadError(f"damaged: the page of its octree at byte {begin} is in another page or in itself")
        seen.add(begin)
        page = np.frombuffer(las.read_at(file, begin, size), _ENTRY)
        if (page["count"] < _PAGE).any():
            raise ReadError(f"damaged: a node of its octree has {page['count'].min()} points")
        others = page[page["count"] == _PAGE]
        pages += zip(others["begin"].tolist(), others["size"].tolist(), strict=True)
        entries.append(page[page["count"] > 0])
    return np.concatenate(entries)

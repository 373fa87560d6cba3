"""Object files (OFF, COFF, NOFF and others) in text: the coordinates of vertices, and the corners of faces."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kpcore.io.cloud import ReadError, decode_text

if TYPE_CHECKING:
    from pathlib import Path

HEADER = re.compile(rb"(?:ST)?C?N?(4?)(n?)OFF")


def read(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((n, 3) float64 vertices, the number of corners of each face, the vertices at these corners).

    Of a line only the coordinates and the corners are used: normals, colours and texture coordinates may follow. In
    files of ModelNet40 the counts follow OFF in its line without a space.
    """
    lines = []  #: (number in the file, words) of lines that are not blank
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if words := line.partition(b"#")[0].split():
            lines.append((number, words))
    start = HEADER.match(lines[0][1][0]) if lines else None
    if not start:
        raise ReadError("is not an OFF file: expected OFF in its first line")
    if start[1] or start[2] or b"BINARY" in lines[0][1]:
        got = decode_text(b" ".join(lines[0][1]))[:60]
        raise ReadError(f"expected OFF in text and of three dimensions, got {got!r}")
    lines[0] = lines[0][0], [word for word in (lines[0][1][0][start.end() :], *lines[0][1][1:]) if word]
    lines = lines if lines[0][1] else lines[1:]
    counts = [] if not lines else lines[0][1]
    if not 2 <= len(counts) <= 3 or not all(re.fullmatch(rb"\d{1,18}", count) for count in counts):
        got = decode_text(b" ".join(counts))[:60]
        raise ReadError(f"expected the numbers of vertices, faces and edges after OFF, got {got!r}")
    num_vertices, num_faces = map(int, counts[:2])
    if num_vertices + num_faces > len(lines) - 1:
        raise ReadError(
            f"truncated: declares {num_vertices} vertices and {num_faces} faces, has {len(lines) - 1} lines of them"
        )
    rows, faces = lines[1 : 1 + num_vertices], lines[1 + num_vertices : 1 + num_vertices + num_faces]
    try:
        vertices = np.array([words[:3] for _, words in rows], np.float64).reshape(-1, 3)
    except ValueError:
        raise _error(rows, _are_coordinates, "three coordinates") from None
    try:
        sizes = [int(words[0]) for _, words in faces]
        corners = np.array(
            [word for size, (_, words) in zip(sizes, faces, strict=True) for word in words[1 : 1 + size]]
        )
        corners = corners.astype(np.int64)
        if min(sizes, default=0) < 0 or len(corners) != sum(sizes):
            raise ValueError
    except (ValueError, OverflowError):
        raise _error(faces, _are_corners, "a number of corners and as many indices") from None
    return vertices, np.array(sizes, np.int64), corners


def _error(lines, fits, expected):
    number, words = next(line for line in lines if not fits(line[1]))
    return ReadError(f"line {number}: expected {expected}, got {decode_text(b' '.join(words))[:60]!r}")


def _are_coordinates(words):
    try:
        return len([float(word) for word in words[:3]]) == 3
    except ValueError:
        return False


def _are_corners(words):
    try:
        size = int(words[0])
        return 0 <= size == sum(abs(int(word)) < 2**63 for word in words[1 : 1 + size])
    except ValueError:
        return False

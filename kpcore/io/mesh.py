"""Meshes: triangles of an OFF or PLY file, and points sampled from them by area."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.backends import checks
from kpcore.io import off, ply
from kpcore.io.cloud import ReadError
from kpcore.io.formats import checked_size, errors_name

if TYPE_CHECKING:
    import os

    from numpy.typing import DTypeLike

READERS = {".off": off.read, ".ply": ply.read_faces}


class NoFaces(ReadError):
    """The file is valid, but has no faces."""


class Mesh(NamedTuple):
    """The triangles of a mesh; polygons of more corners are fans of triangles around their first corner."""

    vertices: np.ndarray  #: (n, 3) float64
    triangles: np.ndarray  #: (m, 3) int64, indices of vertices


def read_mesh(path: str | os.PathLike[str]) -> Mesh:
    """Read the faces of an OFF file, also of one with its counts in the first line (ModelNet40), or of a PLY file.

    Raises
    ------
    ReadError
        The file is damaged or truncated, has no faces, a coordinate that is NaN or infinite, or an index of no vertex.
    """
    path = Path(path)
    with errors_name(path):
        size = checked_size(path, READERS)
        vertices, counts, corners = READERS[path.suffix.lower()](path, size)
        if not (counts > 2).any():
            raise NoFaces("expected a mesh with faces, got none")
        if not (finite := np.isfinite(vertices).all(axis=1)).all():
            vertex = int(finite.argmin())
            raise ReadError(f"vertex {vertex}: expected finite coordinates, got {vertices[vertex].tolist()}")
        outside = (corners < 0) | (corners >= len(vertices))
        if outside.any():
            at = int(outside.argmax())
            face = int(np.searchsorted(np.cumsum(counts), at, "right"))
            raise ReadError(f"face {face}: expected indices below {len(vertices)}, got {corners[at]}")
    starts, fans = np.cumsum(counts) - counts, np.maximum(counts - 2, 0)  # faces of two corners have no area
    first = np.repeat(starts, fans)
    step = np.arange(len(first)) - np.repeat(np.cumsum(fans) - fans, fans)
    return Mesh(vertices, np.stack([corners[first], corners[first + step + 1], corners[first + step + 2]], axis=1))


def sample_mesh(path: str | os.PathLike[str], num_points: int, seed: int = 0,
                dtype: DTypeLike = np.float32) -> np.ndarray:  # fmt: skip
    """(num_points, 3) points of a mesh file, uniform by area; the same for the same seed.

    Faces of no area get no points. Coordinates are those of the file: of a mesh far from the origin, such as one in
    world coordinates, float32 loses digits, so take float64 and subtract the mean first.

    Raises
    ------
    ReadError
        See `read_mesh`; or all faces have no area; or `dtype` cannot hold a coordinate.
    """
    num_points = checks.integer("num_points", num_points, 1, 2**40)
    rng, dtype = np.random.default_rng(checks.integer("seed", seed, 0)), np.dtype(dtype)
    if dtype not in checks.REAL:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    mesh = read_mesh(path)
    corners = mesh.vertices[mesh.triangles]
    with errors_name(path):
        points, _ = sample_triangles(corners, num_points, rng)
        if (largest := np.abs(points).max()) > np.finfo(dtype).max:
            raise ReadError(f"expected coordinates that {dtype} can hold, got {largest:g}")
    return points.astype(dtype)


def sample_triangles(corners: np.ndarray, num_points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """((num_points, 3) points of triangles with corners (m, 3, 3), uniform by area; the triangle of each point).

    Sums are in the order in which they are written, so that points are the same bits on every machine.
    """
    origin, along, across = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    size = max(np.abs(along).max(initial=0), np.abs(across).max(initial=0)) or 1.0
    normal = np.cross(along / size, across / size)  # the fourth power of a length may not fit float64
    area = np.sqrt(normal[:, 0] ** 2 + normal[:, 1] ** 2 + normal[:, 2] ** 2)
    bounds = np.cumsum(area)
    if not 0 < bounds[-1] < np.inf:
        raise ReadError(f"expected faces with a finite area above 0, got {len(area)} without")
    # Of equal bounds, which faces of no area have, the first is that of a face with an area. A product that is rounded
    # up to the last bound would be beyond it.
    place = np.minimum(rng.random(num_points) * bounds[-1], np.nextafter(bounds[-1], 0))
    chosen = np.searchsorted(bounds, place, "right")
    u, v = rng.random((2, num_points))
    beyond = u + v > 1
    u, v = np.where(beyond, 1 - u, u)[:, None], np.where(beyond, 1 - v, v)[:, None]
    return origin[chosen] + u * along[chosen] + v * across[chosen], chosen

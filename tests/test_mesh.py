"""Meshes: OFF and PLY files, and points sampled from them."""

import struct

import numpy as np
import pytest

from kpcore.io import ReadError, read_mesh, sample_mesh
from kpcore.io.mesh import sample_triangles

# A square of two triangles beside a pentagon of area 5, all in z = 1; the last face has no area.
VERTICES = [(0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1), (4, 0, 1), (6, 0, 1), (6, 2, 1), (5, 3, 1), (4, 2, 1)]
FACES = [(0, 1, 2), (0, 2, 3), (4, 5, 6, 7, 8), (0, 1, 1)]
FANS = [[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7], [4, 7, 8], [0, 1, 1]]


def rows(values):
    return "".join(" ".join(map(str, row)) + "\n" for row in values)


def off(head="OFF\n9 4 0\n", vertices=VERTICES, faces=FACES, color=""):
    return head + rows(vertices) + "".join(f"{len(face)} {' '.join(map(str, face))}{color}\n" for face in faces)


def ply(form="binary_little_endian", count="uchar", index="int", vertex_first=True, name="vertex_indices"):
    """Faces also have a colour, before the list; vertices a list in text."""
    vertex = f"element vertex {len(VERTICES)}\nproperty float x\nproperty float y\nproperty float z\n"
    face = f"element face {len(FACES)}\nproperty uchar red\nproperty list {count} {index} {name}\n"
    head = f"ply\nformat {form} 1.0\n{vertex + face if vertex_first else face + vertex}end_header\n".encode()
    if form == "ascii":
        parts = [rows(VERTICES), rows([(9, len(face), *face) for face in FACES])]
        return head + "".join(parts if vertex_first else parts[::-1]).encode()
    order, codes = "<" if "little" in form else ">", {"uchar": "B", "int": "i", "ushort": "H"}
    parts = [
        b"".join(struct.pack(f"{order}3f", *vertex) for vertex in VERTICES),
        b"".join(struct.pack(f"{order}B{codes[count]}{len(f)}{codes[index]}", 9, len(f), *f) for f in FACES),
    ]
    return head + b"".join(parts if vertex_first else parts[::-1])


FILES = {
    "a.off": off(),
    "modelnet.off": off("OFF9 4 0\n"),
    "one_line.OFF": off("OFF 9 4 0\n"),
    "comments.off": off("# by hand\nOFF # a square\n\n9 4\n"),
    "colors.off": off("COFF\n9 4 0\n", [(*vertex, 255, 0, 0, 255) for vertex in VERTICES], color=" 0.5 0.5 1"),
    "windows.off": off().replace("\n", "\r\n"),
    "a.ply": ply(),
    "big.ply": ply("binary_big_endian", "int", "ushort"),
    "text.ply": ply("ascii", name="vertex_index"),
    "first.ply": ply(vertex_first=False),
    "first_text.ply": ply("ascii", vertex_first=False),
}


@pytest.mark.parametrize("name", FILES)
def test_polygons_are_read_as_fans(tmp_path, name):
    text = FILES[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    mesh = read_mesh(tmp_path / name)
    assert mesh.vertices.tolist() == [list(vertex) for vertex in VERTICES]
    assert mesh.triangles.tolist() == FANS


def test_points_are_uniform_by_area(tmp_path):
    (tmp_path / "a.off").write_text(off())
    points = sample_mesh(tmp_path / "a.off", 60_000, seed=1)
    assert points.shape == (60_000, 3) and points.dtype == np.float32 and (points[:, 2] == 1).all()
    square = points[points[:, 0] <= 1, :2]
    pentagon = points[points[:, 0] >= 4, :2]
    assert len(square) + len(pentagon) == 60_000 and (square >= 0).all() and (square <= 1).all()
    assert (pentagon.min(axis=0) >= (4, 0)).all() and (pentagon.sum(axis=1) <= 8 + 1e-5).all()
    # Five standard deviations of a binomial distribution.
    assert abs(len(square) - 10_000) < 5 * np.sqrt(60_000 * 5 / 36)
    cells = np.histogram2d(*square.T, bins=4, range=[(0, 1), (0, 1)])[0]
    assert abs(cells - len(square) / 16).max() < 5 * np.sqrt(len(square) / 16)
    np.testing.assert_array_equal(points, sample_mesh(tmp_path / "a.off", 60_000, seed=1))
    assert not np.array_equal(points, sample_mesh(tmp_path / "a.off", 60_000, seed=2))


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e150])
def test_meshes_of_any_size(tmp_path, size):
    vertices = np.array(VERTICES) * size
    (tmp_path / "a.off").write_text(off(vertices=vertices))
    mesh = read_mesh(tmp_path / "a.off")
    points, chosen = sample_triangles(mesh.vertices[mesh.triangles], 1000, np.random.default_rng(0))
    assert np.isfinite(points).all() and {*chosen} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.off", off(faces=[]).replace("9 4", "9 0"), "expected a mesh with faces, got none"),
        ("a.off", "OFF\n0 0 0\n", "expected a mesh with faces, got none"),
        ("a.off", off().replace("6 2 1\n", "6 nan 1\n"), r"vertex 6: expected finite coordinates, got \[6\.0, nan"),
        ("a.off", off().replace("6 2 1\n", "6 inf 1\n"), "vertex 6: expected finite coordinates"),
        ("a.off", off().replace("3 0 2 3", "3 0 2 9"), "face 1: expected indices below 9, got 9"),
        ("a.off", off().replace("3 0 2 3", "3 0 -2 3"), "face 1: expected indices below 9, got -2"),
        ("a.off", off(faces=[(0, 1)] * 4), "expected a mesh with faces, got none"),
        ("a.off", off(vertices=1e200 * np.array(VERTICES)), "expected coordinates that float32 can hold"),
        ("a.off", off(vertices=[(1, 1, 1)] * 9), "expected faces with a finite area above 0, got 6 without"),
        ("a.off", off().replace("9 4 0", "9 5 0"), "truncated: declares 9 vertices and 5 faces, has 13 lines"),
        ("a.off", off().replace("6 2 1\n", "6 2\n"), "line 9: expected three coordinates, got '6 2'"),
        ("a.off", off().replace("6 2 1\n", "6 2 x\n"), "line 9: expected three coordinates, got '6 2 x'"),
        ("a.off", off().replace("3 0 2 3", "3 0 2"), "line 13: expected a number of corners and as many indices"),
        ("a.off", off().replace("3 0 2 3", "3 0 2 3.5"), "line 13: expected a number of corners and as many indices"),
        ("a.off", off().replace("3 0 2 3", "3 0 2 " + 30 * "9"), "line 13: expected a number of corners"),
        ("a.off", off("PFF\n9 4 0\n"), "is not an OFF file: expected OFF in its first line"),
        ("a.off", off("OFF\n9\n"), "expected the numbers of vertices, faces and edges after OFF, got '9'"),
        ("a.off", off("OFF BINARY\n9 4 0\n"), "expected OFF in text and of three dimensions, got 'OFF BINARY'"),
        ("a.off", off("4OFF\n9 4 0\n"), "expected OFF in text and of three dimensions, got '4OFF'"),
        ("a.off", "OFF", "expected the numbers of vertices"),
        ("a.off", " \n", "is not an OFF file"),
        ("a.off", "", "is empty"),
        ("a.stl", "solid", r"unknown extension '\.stl'; expected one of \.off \.ply"),
        ("a.ply", ply("ascii").replace(b"face 4", b"edge 4"), "expected a mesh with faces, got none"),
        ("a.ply", ply("ascii").replace(b"3 0 2 3", b"3 0 2 3.5"), "line 21: expected the number of a vertex, got '3"),
        ("a.ply", ply("ascii").replace(b"3 0 2 3", b"3 0 2"), "line 21: expected 2 numbers and those of its lists"),
        ("a.ply", ply("ascii", index="float"), "vertex_indices: expected integers, got float32"),
        ("a.ply", ply()[:-3], "truncated or damaged: face 3 of 4"),
    ],
)  # fmt: skip
def test_meshes_that_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ReadError, match=rf"^{path}: .*{message}") as error:
        sample_mesh(path, 10)
    assert "\n" not in str(error.value)


def test_a_mesh_that_is_not_there(tmp_path):
    with pytest.raises(ReadError, match=r"none\.off: No such file"):
        read_mesh(tmp_path / "none.off")
    with pytest.raises(ValueError, match=r"^num_points: expected 1 to \d+, got 0$"):
        sample_mesh(tmp_path / "none.off", 0)

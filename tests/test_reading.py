"""What is asked of a file before and while it is read: names of its fields, points to leave out, what looks wrong."""

import numpy as np
import pytest
from files import FILES, LABELS, POINTS, las, npy, npz, ply
from test_las import described, made

from kpcore.io import ReadError, field_names, formats, read
from kpcore.io.cloud import Request

NAMELESS = ("table.npy", "table.npz", "spaces.xyz", "semicolons.csv")
LAS = "x y z intensity return_number number_of_returns scan_direction_flag edge_of_flight_line classification synthetic"


@pytest.mark.parametrize("name", FILES)
def test_names_are_those_that_the_reader_finds(write, name):
    path = write(name, FILES[name](POINTS))
    request = Request(columns=("a", *"xyz", "d", "e", "f")) if name in NAMELESS else Request()
    content = formats.READERS[path.suffix](path, path.stat().st_size, request)
    assert field_names(path, columns=request.columns) == content.names
    if name in NAMELESS:
        assert field_names(path)[:3] == ("x", "y", "z")
    for field in content.names:
        if field not in ("curve", "colors"):  # of several numbers for each point
            read(path, fields=[field], columns=request.columns)


def test_names_are_read_without_the_points(write):
    """Of files with points that cannot be read."""
    path = write("a.npz", npz(points=POINTS, y=LABELS, height=LABELS))
    assert field_names(path) == ("y", "height", "x", "z")
    assert field_names(path, columns=["x", "y", "z"]) == ("y", "height", "x", "y", "z")
    path = write("a.npz", npz(x=LABELS, y=LABELS, z=LABELS, Reflectance=LABELS))
    assert field_names(path) == ("x", "y", "z", "Reflectance")
    for text in (b"x;y;z;Height Above\n1;2;3;4\n", b"//x y z\n1 2 3\n", b"1 2 3\n"):
        path = write("a.txt", text + b"nonsense\n")
        with pytest.raises(ReadError):
            read(path)
        assert field_names(path) == (("x", "y", "z", "Height Above") if b";" in text else ("x", "y", "z"))
    data = FILES["ascii.ply"](POINTS)
    assert field_names(write("a.ply", data.replace(b"30", b"3O"))) == ("x", "y", "z", "red", "green", "blue", "label")
    assert " ".join(field_names(write("a.las", las(POINTS)))).startswith(LAS)
    assert field_names(write("b.las", made(6, 4, bytes(4), [described(b"Amplitude", 6)])))[-1] == "Amplitude"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"1\n1 2 3 4\n", "x y z intensity"),
        (b"1\n1 2 3 -400 40 50 60\n", "x y z intensity r g b"),
        (b"1\n1 2 3 40 50 60\n", "x y z r g b"),
        (b"1\n1 2 3 0.5 0.5 0.5\n", "x y z"),
        (b"1\n1 2 3\n", "x y z"),
    ],
)
def test_names_in_a_pts(write, text, names):
    path = write("a.pts", text)
    content = formats.READERS[".pts"](path, len(text), Request())
    assert field_names(path) == content.names == tuple(names.split())


@pytest.mark.parametrize("text", [b"x,y,z,\n1,2,3,\n", b"x,y,z,d\n1,2,3,\n", b"1,2,3,\n"])
def test_a_separator_behind_the_last_column(write, text):
    path = write("a.csv", text)
    assert field_names(path) == formats.READERS[".csv"](path, len(text), Request()).names


def test_names_of_what_is_no_point_cloud(write, tmp_path):
    for name, data, reason in (
        ("a.obj", b"v 1 2 3", "unknown extension '.obj'"),
        ("a.las", ply(POINTS), "is a PLY file"),
        ("a.npy", npy(np.ones(5)), r"expected an \(N, 3 or more\) table"),
        ("a.csv", b"x,y\n1,2\n", "line 1: expected numbers or the names x, y, z"),
        ("a.txt", b"1" * 3_000_000, "got a line of more than 1048576 bytes"),
        ("a.npz", npz(a=np.ones(3)), "no array named points"),
    ):
        with pytest.raises(ReadError, match=f"{name}: .*{reason}"):
            field_names(write(name, data))
    with pytest.raises(ReadError, match="No such file"):
        field_names(tmp_path / "none.las")
    path = write("t.npy", npy(np.ones((5, 4))))
    with pytest.raises(ReadError, match="has 4 columns, got 3 names in columns=: x y z"):
        field_names(path, columns=["x", "y", "z"])
    with pytest.raises(ReadError, match="its columns have names already"):
        field_names(write("a.las", las(POINTS)), columns=["x", "y", "z"])
    for wrong, error in (("x y z", TypeError), ([], ValueError), ([1], TypeError)):
        with pytest.raises(error, match="columns: expected"):
            field_names(path, columns=wrong)


HEIGHTS = np.array([0.5, 0, 12.25, 3])


def las_with_heights(name, form=6):
    extra = made(form, 4, bytes(8), [described(name, 10)], num=4)
    points = np.frombuffer(extra, np.uint8)[-4 * {0: 28, 6: 38}[form] :].reshape(4, -1).copy()
    points[:, -8:] = HEIGHTS.view(np.uint8).reshape(4, 8)
    return extra[: -points.size] + points.tobytes()


def heights(name):
    """Files that hold heights above the ground under this name."""
    table = np.zeros(4, [("x", "f8"), ("y", "f8"), ("z", "f8"), (name, "f8")])
    table["x"], table["y"], table["z"], table[name] = *POINTS.T, HEIGHTS
    head = "".join(f"property double {one}\n" for one in table.dtype.names)
    pcd = f"FIELDS x y z {name}\nSIZE 8 8 8 8\nTYPE F F F F\nWIDTH 4\nHEIGHT 1\nDATA binary\n".encode()
    return {
        "a.las": las_with_heights(name.encode()),
        "old.las": las_with_heights(name.encode(), 0),
        "a.ply": f"ply\nformat binary_little_endian 1.0\nelement vertex 4\n{head}end_header\n".encode()
        + table.tobytes(),
        "a.pcd": pcd + table.tobytes(),
        "a.npy": npy(table),
        "a.npz": npz(points=POINTS, **{name: HEIGHTS}),
        "a.csv": "\n".join(",".join(map(str, row)) for row in [table.dtype.names, *table.tolist()]).encode(),
    }


@pytest.mark.parametrize("name", ["HeightAboveGround", "height_above_ground", "scalar_HeightAboveGround"])
def test_heights_above_the_ground_under_either_name(write, name):
    """PDAL's dimension, also as CloudCompare writes it again."""
    for file, data in heights(name).items():
        path = write(file, data)
        assert name in field_names(path)
        for asked in ("HeightAboveGround", "height_above_ground", "heightAboveGround"):
            fields = read(path, fields=[asked]).fields
            assert fields.keys() == {asked.lower()}
            np.testing.assert_array_equal(fields[asked.lower()], HEIGHTS, file)


def test_no_other_names_are_taken_for_one_another(write):
    with pytest.raises(ReadError, match="has no field heightaboveground; there are x y z height_above"):
        read(write("a.csv", b"x,y,z,height_above\n1,2,3,4"), fields=["heightaboveground"])
    path = write("a.csv", b"x,y,z,height_above_ground,HeightAboveGround,t_1\n1,2,3,4,5,6")
    assert read(path, fields=["height_above_ground"]).fields["height_above_ground"] == 4
    assert read(path, fields=["heightAboveGround"]).fields["heightaboveground"] == 5
    with pytest.raises(ReadError, match="has no field t1"):
        read(path, fields=["t1"])

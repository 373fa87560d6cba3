"""Tables in text: what names their columns, what is a number, and what is refused."""

import tracemalloc

import numpy as np
import pytest
from files import refusal

from kpcore import scenes
from kpcore.io import text

ROWS = np.array([[1.5, 2.25, -3], [4, 0.125, 6], [1234.5, 8, 9]])
COLORS = np.array([[10, 20, 30], [40, 50, 60], [0, 0, 255]])


def lines(table, separator=" "):
    return "".join(separator.join(f"{number:.9g}" for number in row) + "\n" for row in table)


def columns(*parts):
    return np.column_stack(parts)


# A comment, the columns of the table after x y z, and the names of all if the comment names them.
COMMENTS = [
    ("# x y z label", 1, "x y z label"),
    ("#x,y,z,label", 1, "x y z label"),
    ("//X Y Z R G B Classification", 4, "X Y Z R G B Classification"),
    ("# label x y z", 1, "label x y z"),
    ("# x y z R G B Original_cloud_index", 4, "x y z R G B Original_cloud_index"),
    ("# Höhe unbekannt\n# x y z größe", 1, "x y z größe"),
    ("# x y z label\n# made by hand\n#", 1, "x y z label"),
    ("// Y X Z\n// exported by hand", 0, "Y X Z"),
    ("# x y z label\n# label x y z", 1, "label x y z"),  # the last that names
    ("# columns: x y z i", 2, None),
    ("# Format: X Y Z", 1, None),
    ("# scan in x y z metres", 3, None),
    ("# this file holds x y z in metres", 5, None),
    ("# columns: 1 2 3 are x y z", 5, None),
    ("# x y z in metres", 2, None),
    ("# x y z x", 1, None),
    ("# x y z 1", 1, None),
    ("# x y z label", 2, None),
    ("//X Y Z R G B Original cloud index Classification", 2, None),
]


@pytest.mark.parametrize(("comment", "more", "names"), COMMENTS)
def test_what_comments_name(write, comment, more, names):
    table = columns(ROWS, np.arange(1, 3 * more + 1).reshape(3, more) / 2)
    cloud = scenes.read(write("a.xyz", f"{comment}\n{lines(table)}".encode()))
    names = names and names.lower().split()
    order = [names.index(axis) for axis in "xyz"] if names else [0, 1, 2]
    np.testing.assert_array_equal(cloud.points, table[:, order].astype(np.float32))
    if names:
        last = scenes.read(write("a.xyz", f"{comment}\n{lines(table)}".encode()), fields=[names[-1]])
        np.testing.assert_array_equal(last.fields[names[-1]], table[:, -1])


def test_a_comment_that_may_name_the_columns_is_warned_of(write):
    path = write("a.xyz", b"# frame x y z\n7 1 2 3\n8 4 5 6\n")
    with pytest.warns(UserWarning, match="comment 'frame x y z' may name its columns"):
        assert scenes.read(path).points.tolist() == [[7, 1, 2], [8, 4, 5]]
    assert scenes.read(path, columns=["frame", "x", "y", "z"]).points.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("header", "separator"),
    [
        ("label,x,y,z", ","),
        ('"label"\t"x"\t"y"\t"z"', "\t"),
        ("Label;X;Y;Z", ";"),
        ("label x y z", ","),
        ("label,x,y,z", " "),
    ],
)
def test_header_lines(write, header, separator):
    cloud = scenes.read(write("a.csv", f"{header}\n{lines(columns([3, 4, 5], ROWS), separator)}".encode()))
    np.testing.assert_array_equal(cloud.points, ROWS)
    np.testing.assert_array_equal(cloud.labels, [3, 4, 5])


def test_columns_name_those_of_a_table_without_names(write):
    table = lines(columns([3, 4, 5], ROWS))
    for name, data in {"a.xyz": table, "b.xyz": f"class easting northing height\n{table}"}.items():
        cloud = scenes.read(write(name, data.encode()), columns=["label", "x", "y", "z"])
        np.testing.assert_array_equal(cloud.points, ROWS)
        np.testing.assert_array_equal(cloud.labels, [3, 4, 5])
    with pytest.raises(scenes.ReadError, match="has 4 columns, got 3 names in columns="):
        scenes.read(write("a.xyz", table.encode()), columns=[*"xyz"])
    with pytest.raises(scenes.ReadError, match="has 2 fields named x"):
        scenes.read(write("dup.csv", b"x,y,z,x\n1,2,3,9\n"))
    assert scenes.read(write("dup.csv", b"x,y,z,t,t\n1,2,3,9,8\n")).points.tolist() == [[1, 2, 3]]
    with pytest.raises(scenes.ReadError, match="has 2 fields named t"):
        scenes.read(write("dup.csv", b"x,y,z,t,t\n1,2,3,9,8\n"), fields=["t"])


# ---- point counts


@pytest.mark.parametrize("name", ["a.xyz", "a.txt", "a.pts"])
@pytest.mark.parametrize("head", ["3\n", "\n3\n", " 3 \n", "# x y z\n3\n", "//X Y Z\n3\n", "x y z\n3\n", "3\r\n"])
def test_a_line_with_the_number_of_points(write, name, head):
    path = write(name, (head + lines(ROWS)).encode())
    np.testing.assert_array_equal(scenes.read(path).points, ROWS)
    path = write(name, (head.replace("3", "2") + lines(ROWS)).encode())
    assert refusal(path) == "declares 2 points, holds 3"
    path = write(name, (head.replace("3", "9" * 18) + lines(ROWS)).encode())
    assert refusal(path) == f"declares {'9' * 18} points, holds 3"


PTS = {
    3: None,
    4: "intensity",
    6: "r g b",
    7: "intensity r g b",
}


@pytest.mark.parametrize("count", ["", "3\n"])
@pytest.mark.parametrize("width", PTS)
def test_columns_of_a_pts(write, width, count):
    parts = {3: [], 4: [[[7], [8], [9]]], 6: [COLORS], 7: [[[7], [8], [9]], COLORS]}[width]
    path = write("a.pts", (count + lines(columns(ROWS, *parts))).encode())
    cloud = scenes.read(path, fields=["intensity"] if width in (4, 7) else [])
    np.testing.assert_array_equal(cloud.points, ROWS)
    np.testing.assert_array_equal(cloud.colors, COLORS if width > 4 else None)
    assert cloud.labels is None
    if width in (4, 7):
        assert cloud.fields["intensity"].tolist() == [7, 8, 9]


def test_a_pts_with_black_colours_and_one_with_normals(write):
    black = columns(ROWS, [7, 8, 9], np.zeros((3, 3)))
    assert scenes.read(write("a.pts", lines(black).encode())).colors is None
    normals = columns(ROWS, np.eye(3) - 0.5)
    assert scenes.read(write("a.pts", lines(normals).encode())).colors is None


def test_scans_one_after_another(write):
    both = "3\n" + lines(ROWS) + "\n2\n" + lines(ROWS[:2] + 1)
    expected = np.concatenate([ROWS, ROWS[:2] + 1])
    np.testing.assert_array_equal(scenes.read(write("a.pts", both.encode())).points, expected)
    wrong = both.replace("3\n", "4\n", 1)
    assert refusal(write("a.pts", wrong.encode())) == "line 6: expected 4 points before the next count, got 3"
    assert refusal(write("a.pts", both[:-8].encode())).startswith(("declares 2 points, holds 1", "line 8"))
    assert refusal(write("a.xyz", (lines(ROWS) + "2\n" + lines(ROWS)).encode())) == "line 4: expected 3 numbers, got 1"


# ---- numbers

DATA = columns(ROWS, [10, 0.5, 7])
NAN = columns(ROWS, [10, np.nan, 7])


def mended(table, separator, mark=".", nan="", end=""):
    rows = [[nan if np.isnan(n) else f"{n:.9g}".replace(".", mark) for n in row] for row in table]
    return "".join(separator.join(row) + end + "\n" for row in rows)


QUOTED = "".join(",".join(f'"{n:.9g}"' for n in row) + "\n" for row in DATA)
READABLE = {
    "decimal comma, semicolon": (mended(DATA, ";", ","), DATA),
    "decimal comma, tab": (mended(DATA, "\t", ","), DATA),
    "decimal comma, space": (mended(DATA, " ", ","), DATA),
    "decimal comma, quoted": (QUOTED.replace(".", ","), DATA),
    "decimal comma, quoted, spaces": (QUOTED.replace('","', '", "').replace(".", ","), DATA),
    "trailing comma": (mended(DATA, ",", end=","), DATA),
    "trailing comma, spaces": (mended(DATA, " , ", end=" , "), DATA),
    "trailing semicolon, decimal comma": (mended(DATA, ";", ",", end=";"), DATA),
    "trailing tab": (mended(DATA, "\t", end="\t"), DATA),
    "empty cell": (mended(NAN, ","), NAN),
    "empty cell, semicolon": (mended(NAN, ";", ","), NAN),
    "empty cell, spaces": (mended(NAN, " , "), NAN),
    "empty cell, quoted": (mended(NAN, ",", nan='""'), NAN),
    **{nan: (mended(NAN, " ", nan=nan), NAN) for nan in ("nan", "NaN", "NA", "n/a", "null", "None", "-nan")},
    **{nan: (mended(NAN, " ", nan=nan), NAN) for nan in ("1.#QNAN", "-1.#IND00", "1.#SNAN", "nan(ind)", "-nan(snan)")},
    "quoted": (QUOTED, DATA),
    "quoted, tab": (QUOTED.replace(",", "\t"), DATA),
    "quoted, space": (QUOTED.replace(",", " "), DATA),
    "comments between": (mended(DATA, " ").replace("\n", "\n# one 1 2\n// two\n"), DATA),
    "comments after": (mended(DATA, " ").replace("\n", " # 1 2\n", 1).replace("\n4", "\n//3\n4"), DATA),
    "old Mac": (mended(DATA, " ").replace("\n", "\r"), DATA),
    "Windows": (mended(NAN, ",").replace("\n", "\r\n"), NAN),
    "blank lines": (mended(NAN, ",").replace("\n", "\n  \n\n"), NAN),
    "wide spaces": (" " + mended(DATA, "   \t"), DATA),
    "header": ("x,y,z,i\n" + mended(NAN, ","), NAN),
    "header, trailing": ("x,y,z,i,\n" + mended(NAN, ",", end=","), NAN),
    "data only, trailing": ("x,y,z,i\n" + mended(DATA, ",", end=","), DATA),
    "header only, trailing": ("x,y,z,i,\n" + mended(DATA, ","), DATA),
    "exponents": (mended(DATA, ";", ",").replace("1,5", "15,0E-1"), DATA),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("name", READABLE)
def test_tables_whose_meaning_is_clear(write, name, encoding):
    data, table = READABLE[name]
    path = write("a.csv", f"# Gelände, größer\n{data}".encode(encoding))
    cloud = scenes.read(path, columns=[*"xyzi"], fields=["i"])
    np.testing.assert_array_equal(cloud.points, table[:, :3])
    np.testing.assert_array_equal(cloud.fields["i"], table[:, 3])


def test_points_with_an_empty_coordinate_are_left_out(write):
    cloud = scenes.read(write("a.csv", b"x,y,z,label\n1,2,3,4\n1,,3,5\n,,,\n4,5,6,\n7,8,9,1\n"))
    assert cloud.left_out == 2 and cloud.points.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert cloud.labels.tolist() == [4, -1, 1]


def test_a_column_that_is_empty_is_one_if_it_has_a_name(write):
    cloud = scenes.read(write("a.csv", b"x,y,z,i\n1,2,3,\n4,5,6,\n"), fields=["i"])
    assert np.isnan(cloud.fields["i"]).all() and cloud.points.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_colours_of_cloudcompare_between_0_and_1(write):
    head = b"//X;Y;Z;Rf;Gf;Bf;Illuminance (PCV)\n2\n"
    cloud = scenes.read(write("a.txt", head + b"1;2;3;1;0.2;0;9\n4;5;6;0;0;0.4;8\n"), fields=["illuminance (pcv)"])
    assert cloud.colors.tolist() == [[255, 51, 0], [0, 0, 102]]
    assert cloud.fields["illuminance (pcv)"].tolist() == [9, 8]


REFUSED = {
    "1,234;5,678;9,012\n": "may be decimal marks or thousands separators",
    '"1,234","5,678","9,012"\n': "may be decimal marks or thousands separators",
    '"1,234,567","5","6"\n': "line 1: expected numbers or the names x, y, z",
    '1,2,3\n"1,234,567",5,6\n': "line 2: expected numbers, got '1,234,567'",
    "1.234,5;2;3\n": "line 1: expected numbers or the names x, y, z",
    "1;2;3\n1.234,5;2;3\n": "line 2: expected numbers, got '1.234,5'",
    "1,5;2.5;3\n": "has both decimal points and decimal commas: write decimal points",
    "1,5, 2,5, 3,5\n": "line 1: its commas may be decimal marks or separators: write decimal points",
    "x,y,z\n1,5,2,5,3,5\n": "names 3 columns, but its rows have 6: are its decimal marks commas?",
    "x,y,z\n1,2,3,4\n": "names 3 columns, but its rows have 4",
    "1 2 3\n4 5 6\n7 8 9 # c\n1 2 3 4\n": "line 4: expected 3 numbers, got 4",
    "1 2 3\n4 5 x\n": "line 2: expected numbers, got 'x'",
    "1 2 3\n1_0 5 6\n": "line 2: expected numbers, got '1_0'",
    "1,2,3\n4,5,6\n1,,a\n": "line 3: expected numbers, got 'a'",
    "1 2 3\n4 5 103.0\x100000\n": r"line 2: expected numbers, got '103.0\x100000'",
    "1 2 3\n\n# c\n185\x00187 5 6\n": r"line 4: expected numbers, got '185\x00187'",
    "x,y,z,name\n1,2,3,car\n": "line 2: expected numbers, got '1,2,3,car'",
    "lat,lon\n1,2\n": "line 1: expected numbers or the names x, y, z, got 'lat,lon'",
    "1 2 3 " * 20_000: "expected a row for each point, got (1, 60000): transpose the array",
    "1 2 3\n" + "1 2 3 " * 400_000: "expected a row for each point, got a line of more than 1048576 bytes",
    "# only\n# comments\n": "holds no points",
    "3\n": "holds no points",
    "1 2\n3 4\n": "expected an (N, 3 or more) table of numbers, got (2, 2)",
}


@pytest.mark.parametrize("data", REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_said(write, data):
    line = refusal(write("a.csv", data.encode()))
    assert REFUSED[data] in line and "usecols" not in line


def test_blocks_know_their_lines(write, monkeypatch):
    monkeypatch.setattr(text, "_BLOCK", 50)
    rows = np.arange(3000).reshape(-1, 3) / 4
    data = lines(rows, ";").replace(".", ",")
    np.testing.assert_array_equal(scenes.read(write("a.csv", data.encode())).points, rows)
    assert refusal(write("a.csv", (data + "1;2;bad\n").encode())) == "line 1001: expected numbers, got 'bad'"
    assert refusal(write("a.csv", (data + "1;2\n").encode())) == "line 1001: expected 3 numbers, got 2"
    assert (
        refusal(write("a.csv", (data + "1;2.5;3\n").encode()))
        == "has both decimal points and decimal commas: write decimal points"
    )


@pytest.mark.parametrize(("first", "row"), [("", "1 1 1\n"), ("1;2;3\n", "1;1;1,5\n"), ("1,2,3\n", "1,1,\n")])
def test_memory_of_reading(write, first, row):
    path = write("a.csv", (first + 300_000 * row).encode())
    tracemalloc.start()
    try:
        scenes.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * path.stat().st_size + 30e6

"""PLY files written here byte by byte, and by plyfile: what is read, what is refused, and labels written into them."""

import itertools
import re
import struct
import warnings

import numpy as np
import pytest
from files import COLORS, LABELS, POINTS, ply, refusal

from kpcore import scenes
from kpcore.io import formats
from kpcore.io import ply as reader
from kpcore.pipeline import segmentation

FORMATS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
LETTERS = {  # of struct
    "char": "b", "int8": "b", "uchar": "B", "uint8": "B", "short": "h", "int16": "h", "ushort": "H", "uint16": "H",
    "int": "i", "int32": "i", "uint": "I", "uint32": "I", "float": "f", "float32": "f", "double": "d", "float64": "d",
    "int64": "q", "uint64": "Q",
}  # fmt: skip
XYZ = [("float", "x"), ("float", "y"), ("float", "z")]
FACES = ("face", [("list uchar int", "vertex_indices"), ("uchar", "flags")])
FACE_ROWS = [([0, 1, 2], 7), ([0, 1, 2, 3], 10), ([], 0), ([2, 1, 3], 13)]
CAMERA = ("camera", [("float", "fx"), ("short", "width")])


def data(form, properties, rows, space=" ", end="\n"):
    """The rows of an element: a number for each property, or a sequence for a list."""
    out = b""
    for row in rows:
        for (kind, _), value in zip(properties, row, strict=True):
            types = kind.split()[1:] or [kind]
            values = [len(value), *value] if len(types) == 2 else [value]
            types = [types[0], *types[-1:] * (len(values) - 1)]
            if FORMATS[form] is None:
                out += "".join(f"{one}{space}" for one in values).encode()
            else:
                out += b"".join(struct.pack(FORMATS[form] + LETTERS[t], v) for t, v in zip(types, values, strict=True))
        out = out.removesuffix(space.encode()) + end.encode() if FORMATS[form] is None else out
    return out


def file(form, *elements, end="\n", space=" ", comment=b"comment by hand"):
    """A file of elements ((name, properties), rows)."""
    lines = [b"ply", b"format %b 1.0" % form.encode(), comment]
    for (name, properties), rows in elements:
        lines.append(f"element {name} {len(rows)}".encode())
        lines += [f"property {kind} {one}".encode() for kind, one in properties]
        lines.append(comment)
    head = b"".join(line + end.encode() for line in [*lines, b"end_header"])
    return head + b"".join(data(form, properties, rows, space, end) for (_, properties), rows in elements)


def vertices(*more):
    """The vertex element of POINTS and of (type, name, values)."""
    properties = [*XYZ, *((kind, name) for kind, name, _ in more)]
    columns = zip(POINTS.tolist(), *(values for *_, values in more), strict=True)
    return ("vertex", properties), [(*point, *rest) for point, *rest in columns]


LABELED = vertices(("uchar", "red", [1, 2, 3, 4]), ("short", "label", LABELS.tolist()))


# ---- headers


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"comment by hand", "comment Straße, 点云".encode()),
        (b"comment by hand", "comment Straße".encode("latin-1")),
        (b"comment by hand", "obj_info Straße".encode("latin-1")),
        (b"comment by hand", b""),
        (b"comment by hand", b"comment " + b"c" * 200_000),
        (b"ply\n", b"ply \n"),
        (b"float z\n", b"float z \t\n"),
        (b"property float y", b" property\tfloat  y"),
        (b"element vertex 4", b"element vertex  4 "),
        (b"end_header\n", b"end_header \n"),
        (b"end_header\n", b"end_header\r\n"),
    ],
)
def test_header_lines_that_are_read(write, form, old, new):
    content = file(form, LABELED)
    assert old in content
    cloud = scenes.read(write("a.ply", content.replace(old, new)))
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.labels, LABELS)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines(write, form, end):
    """The first byte of the data is that of a line end."""
    points = np.frombuffer(b"\n\r\n\r" * 3, np.float32).reshape(1, 3)
    content = file(form, (("vertex", XYZ), points.tolist()), end=end)
    np.testing.assert_array_equal(scenes.read(write("a.ply", content)).points, points)


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("name", ["scalar_Höhe", "scalar_a:b", "scalar_two words"])
def test_names_that_are_not_ascii_or_not_words(write, coding, name):
    content = file("ascii", vertices(("float", name, [5, 6, 7, 8]))).replace(name.encode(), name.encode(coding))
    cloud = scenes.read(write("a.ply", content), fields=[name.removeprefix("scalar_")])
    assert cloud.fields[name.removeprefix("scalar_").lower()].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", LETTERS)
def test_every_type(write, form, kind):
    letter = LETTERS[kind]
    if letter in "fd":
        values = [1.5, -2.25, 2.0**100, 0]
    else:
        bits = 8 * struct.calcsize("<" + letter)
        least, most = (0, 2**bits - 1) if letter.isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        values = [0, 1, max(least, -(2**53)), min(most, 2**53)]
    cloud = scenes.read(write("a.ply", file(form, vertices((kind, "other", values)))), fields=["other"])
    assert [float(value) for value in cloud.fields["other"]] == values


HEADER = file("ascii", LABELED)
FORMAT = "expected format ascii, binary_little_endian or binary_big_endian 1.0"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"float y", b"flaot y", "line 6: expected a type such as float or uchar, got 'flaot'"),
        (b"float y", b"list float int y", "line 6: expected a list length of type uchar or int, got float"),
        (b"float y", b"list uchar y", "line 6: expected property, element or end_header, got 'property list uchar y'"),
        (b"property float y", b"property", "line 6: expected property, element or end_header, got 'property'"),
        (b"property float y", b"propert\xff float y", "line 6: expected property, element or end_header, got 'prop"),
        (b"element vertex 4", b"element vertex -4", "line 4: expected element NAME COUNT, got 'element vertex -4'"),
        (b"element vertex 4", b"element vertex", "line 4: expected element NAME COUNT, got 'element vertex'"),
        (b"element vertex 4", b"element vertex " + b"9" * 19, "line 4: expected element NAME COUNT, got 'element vert"),
        (b"element vertex 4", b"element vertex " + b"9" * 18, f"truncated: declares {'9' * 18} vertex elements in "),
        (b"element vertex 4\n", b"", "line 4: expected element NAME COUNT, got 'property float x'"),
        (b"element vertex", b"element point", "expected one element vertex, got 0; there are point"),
        (b"comment by hand\nend", b"element vertex 4\nend", "expected one element vertex, got 2; there are vertex v"),
        (b"property float x\n", b"element vertex 1\nproperty float x\n", "expected one element vertex, got 2"),
        (b"element vertex 4", b"element vertex 4\nelement other 4", "its vertices have no properties"),
        (b"format ascii 1.0\n", b"", f"line 3: {FORMAT}, got"),
        (b"ascii 1.0", b"ascii 2.0", f"line 2: {FORMAT}, got"),
        (b"ascii", b"morse", f"line 2: {FORMAT}, got"),
        (b"ply\n", b"plywood\n", f"line 1: {FORMAT}, got 'plyw"),
        (HEADER[HEADER.index(b"end_header") :], b"", "damaged: expected end_header within the first "),
        (b"hand\nend", b"c" * (1 << 20) + b"\nend", "damaged: expected end_header within the first 1048576 bytes"),
        (b"float y", b"float x", "has 2 fields named x"),
        (b"float y", b"float Y2", "has no field y; there are x Y2 z red label"),
        (b"float y", b"float y\x1b[1m", "has no field y; there are x y\\x1b[1m z red label"),
        (b"float y", b"list uchar float y", "line 12: expected 5 numbers and those of its lists, got 5"),
    ],
)  # fmt: skip
def test_header_lines_that_are_refused(write, old, new, reason):
    assert old in HEADER
    assert refusal(write("a.ply", HEADER.replace(old, new, 1))).startswith(reason)


# ---- elements beside the vertices, and lists


@pytest.fixture(params=[16, 64, 1 << 14])
def blocks(monkeypatch, request):
    """Blocks so small that rows end at their edges and are longer than they are."""
    monkeypatch.setattr(reader, "LIST_BLOCK", request.param)
    monkeypatch.setattr(reader, "TEXT_BLOCK", request.param)
    monkeypatch.setattr(reader, "LABEL_BLOCK", 3)
    monkeypatch.setattr(reader, "COPY_BLOCK", request.param)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_elements_in_any_order(write, blocks, form, order):
    others = [LABELED, (FACES, FACE_ROWS), (CAMERA, [(1.5, 640), (2.5, 10)]), (("empty", []), [(), ()])]
    elements = [others[at] for at in order]
    content = file(form, *elements) if form != "ascii" else file(form, *elements).replace(b"\n\n", b"\n")
    cloud = scenes.read(write("a.ply", content))
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.labels, LABELS)


def lists(rng, num, most=9):
    return [rng.integers(-99, 99, rng.integers(0, most)).tolist() for _ in range(num)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", ["uchar", "char", "ushort", "short", "uint", "int"])
def test_rows_of_any_length(tmp_path, blocks, form, count):
    """Faces and vertices with lists before, between and after other properties; plyfile is the oracle."""
    plyfile = pytest.importorskip("plyfile")
    rng = np.random.default_rng(0)
    num = 40
    faces = ("face", [("uchar", "a"), (f"list {count} short", "b"), ("double", "c"), (f"list {count} char", "d")])
    rows = list(zip([3] * num, lists(rng, num), [0.5] * num, lists(rng, num, 60), strict=True))
    seen, more = (f"list {count} int", "seen"), (f"list {count} char", "more")
    vertex = ("vertex", [("float", "x"), seen, ("double", "y"), ("float", "z"), ("int", "label"), more])
    points, labels = rng.integers(-99, 99, (num, 3)).tolist(), rng.integers(0, 9, num).tolist()
    columns = zip(points, lists(rng, num), labels, lists(rng, num, 30), strict=True)
    vertex = vertex, [(x, seen, y, z, label, more) for (x, y, z), seen, label, more in columns]
    (tmp_path / "a.ply").write_bytes(file(form, (faces, rows), vertex))
    cloud = scenes.read(tmp_path / "a.ply")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plyfile's, about empty lists
        expected = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    np.testing.assert_array_equal(cloud.points, np.column_stack([expected[axis] for axis in "xyz"]).astype(np.float32))
    np.testing.assert_array_equal(cloud.points, np.array(points, np.float32))
    np.testing.assert_array_equal(cloud.labels, labels)


def test_faces_cost_no_python_for_each(write):
    """Triangles and quads before the vertices: 20,000 faces of 13 and 17 bytes in blocks of 16 KiB."""
    faces = [([0, 1, 2],), ([0, 1, 2, 3],)] * 10_000
    content = file("binary_little_endian", (("face", [("list uchar int", "vertex_indices")]), faces), LABELED)
    path = write("a.ply", content)
    with path.open("rb") as opened:
        header = reader._header(opened, len(content))
        blocks = [len(rows.stops) for rows in reader._list_rows(opened, header.elements[0], header.start, len(content))]
    assert sum(blocks) == 20_000 and len(blocks) <= 1 + 300_000 // (16_384 - 17)
    np.testing.assert_array_equal(scenes.read(path).labels, LABELS)


# ---- text


def text(*rows, kinds=("float", "float", "float")):
    names = ["x", "y", "z", "red", "label"]
    properties = "".join(f"property {kind} {name}\n" for kind, name in zip(kinds, names, strict=False))
    return f"ply\nformat ascii 1.0\nelement vertex {2}\n{properties}end_header\n".encode() + "\n".join(rows).encode()


@pytest.mark.parametrize(
    "rows",
    [
        ("1 2 3", "4 5 6"),
        ("1 2 3", "4 5 6", ""),
        ("1 2 3", "4 5 6", "7 8 9", "anything"),
        ("", " \t", "1 2 3", "\r", "4 5 6"),
        ("  1\t2   3 \r", "4 5 6 \r"),
        ("1.0 +2 3e0", "4. 0.5e1 .6E+1"),
    ],
)
def test_lines_of_text_that_are_read(write, blocks, rows):
    np.testing.assert_array_equal(scenes.read(write("a.ply", text(*rows))).points, [[1, 2, 3], [4, 5, 6]])


def test_words_of_text_that_are_no_finite_numbers(write):
    cloud = scenes.read(write("a.ply", text("nan -nan(ind) 1", "-inf 1 Infinity", "1 2 3").replace(b"ex 2", b"ex 3")))
    assert (cloud.left_out, cloud.points.tolist()) == (2, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("rows", "kinds", "reason"),
    [
        (["1 2", "3 4 5 6"], "fff", "line 8: expected 3 numbers, got 2"),
        (["1 2 3", "4 5 6 7"], "fff", "line 9: expected 3 numbers, got 4"),
        (["1 2 3", "", "45 6.5"], "fff", "line 10: expected 3 numbers, got 2"),
        (["1 2 3"], "fff", "truncated: declares 2 vertex elements in 105 bytes"),
        (["1 2.125 3.5"], "fff", "truncated: expected 2 vertex elements, got 1"),
        (["1 2 3", "4 5 x"], "fff", "line 9: expected numbers, got 'x'"),
        (["1 2 3", "x 5 6"], "fff", "line 9: expected numbers, got 'x'"),
        (["x 2 3", "4 5 6"], "fff", "line 8: expected numbers, got 'x'"),
        (["1 2 3", "4 5 6x"], "fff", "line 9: expected numbers, got '6x'"),
        (["1 2,5 3", "4 5 6"], "fff", "line 8: expected numbers, got '2,5'"),
        (["1 2 3", "4 5\0 6"], "fff", "line 9: expected numbers, got '5\\x00'"),
        (["1 2 3", "4 5 6", "7.5"], "fffB", "line 9: expected 4 numbers, got 3"),
        (["1 2 3 4", "4 5 6 300"], "fffB", "line 10: expected red to be an integer from 0 to 255, got '300'"),
        (["1 2 3 4", "4 5 6 -1"], "fffB", "line 10: expected red to be an integer from 0 to 255, got '-1'"),
        (["1 2 3 4", "4 5 6 nan"], "fffB", "line 10: expected red to be an integer from 0 to 255, got 'nan'"),
        (["1 2 3 4", "4 5 6 1.5"], "fffB", "line 10: expected red to be an integer from 0 to 255, got '1.5'"),
        (["1 2 3 4", "4 5 6 4294967296"], "fffI", "line 10: expected red to be an integer from 0 to 4294967295, got '"),
        (["1 2 3 4", f"4 5 6 {2**62}"], "fffq", f"line 10: expected red to be an integer from -{2**53} to {2**53}, "),
    ],
)  # fmt: skip
def test_lines_of_text_that_are_refused(write, blocks, rows, kinds, reason):
    kinds = [{"f": "float", "B": "uchar", "I": "uint", "q": "int64"}[letter] for letter in kinds]
    assert refusal(write("a.ply", text(*rows, kinds=kinds))).startswith(reason)


def test_a_line_without_an_end(write, monkeypatch):
    monkeypatch.setattr(reader, "MAX_LINE", 1000)
    monkeypatch.setattr(reader, "TEXT_BLOCK", 100)
    assert refusal(write("a.ply", text("1 2 3", "1 " * 600))) == "damaged: has a line of more than 1000 bytes"


# ---- truncated and damaged files


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("before", [[], [(CAMERA, [(1.5, 640)] * 3)], [(FACES, FACE_ROWS)]])
def test_a_file_cut_anywhere_before_the_last_number(write, blocks, form, before):
    content = file(form, *before, LABELED)
    for size in range(len(content) - 2):
        assert re.match("truncated|damaged|line|is not a PLY|is empty", refusal(write("a.ply", content[:size])))


@pytest.mark.parametrize("form", ["binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(
    ("kind", "length"), [("uchar", 255), ("char", -1), ("int", -5), ("int", 2**31 - 1), ("uint", 2**32 - 1)]
)
@pytest.mark.parametrize("number", ["char", "double"])
def test_damaged_lengths_of_lists(write, blocks, form, kind, length, number):
    faces = ("face", [("ushort", "a"), (f"list {kind} {number}", "b")])
    content = file(form, (faces, [(258, []), (259, [1, 2]), (260, [])]), (("vertex", XYZ), POINTS.tolist()))
    order = FORMATS[form]
    content = content.replace(
        struct.pack(f"{order}H{LETTERS[kind]}", 259, 2), struct.pack(f"{order}H{LETTERS[kind]}", 259, length)
    )
    reason = refusal(write("a.ply", content))
    assert re.fullmatch(
        rf"truncated or damaged: face 1 of 3, at byte \d+, does not end within {len(content)} bytes", reason
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("place", [0, 1])
def test_elements_that_cannot_be_there(write, form, place):
    content = [LABELED]
    content.insert(place, (FACES, FACE_ROWS))
    content = file(form, *content).replace(b"face 4", b"face 4000000000")
    assert refusal(write("a.ply", content)) == f"truncated: declares 4000000000 face elements in {len(content)} bytes"


# ---- what the columns mean


@pytest.mark.parametrize("form", FORMATS)
def test_points_without_a_label(write, form):
    for kind, none in (("float", float("nan")), ("uint", 2**32 - 1), ("int", -1)):
        cloud = scenes.read(write("a.ply", file(form, vertices((kind, "scalar_Label", [2, none, 6, 2])))))
        assert cloud.labels.tolist() == [2, -1, 6, 2]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["float", "int", "uint"])
def test_packed_colours(write, form, kind):
    """Colours in the bits of a float too, as PCL has them: in text they are whole numbers."""
    bits = (COLORS.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).astype(np.uint32)
    values = bits.view(np.float32).astype(float) if kind == "float" else bits
    cloud = scenes.read(write("a.ply", file(form, vertices((kind, "rgb", values.tolist())))))
    np.testing.assert_array_equal(cloud.colors, COLORS)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["scalar_x", "X", "scalar_X"])
@pytest.mark.parametrize("first", [True, False])
def test_a_property_beside_x(write, form, name, first):
    (_, properties), rows = vertices(("float", name, [9, 9, 9, 9]))
    if first:
        properties, rows = [properties[-1], *properties[:-1]], [(row[-1], *row[:-1]) for row in rows]
    cloud = scenes.read(write("a.ply", file(form, (("vertex", properties), rows))), fields=[name])
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert cloud.fields[name.lower()].tolist() == [9] * 4


# ---- labels


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ["uchar", "uint", "float", None])
@pytest.mark.parametrize("has_lists", [False, True])
def test_labels_change_no_other_byte(tmp_path, blocks, form, end, place, kind, has_lists):
    """Only the label of the points kept is another, or one is added, in text as a whole number after a space."""
    comment = "comment Straße \t".encode("latin-1")
    more = [("list uchar short", "seen", [[1], [], [2, 3], [4] * 40])] * has_lists + [
        ("float", "scalar_a:b", [0.1] * 4)
    ]
    more += [("list int uchar", "last", [[], [5] * 30, [6], []])] * has_lists
    kept, labels, old = np.array([True, False, True, True]), [250, 3, 100], [7, 8, 9, 6]

    def made(values, name="Label", kind=kind):
        """With the values of a property at its place, or of a new one behind the others."""
        at = 1 if name == "Label" else len(more)
        columns = [*more[:at], (kind, name, values), *more[at:]] if kind else more
        elements = [(FACES, FACE_ROWS), (CAMERA, [(1.5, 640)])]
        elements.insert(place, vertices(*columns))
        return file(form, *elements, end=end, comment=comment)

    (tmp_path / "a.ply").write_bytes(made(old))
    segmentation.write_labels(tmp_path / "a.ply", tmp_path / "b.ply", np.array(labels), kept=kept)
    new, zero = np.insert(labels, 1, 8).tolist(), np.insert(labels, 1, 0).tolist()
    expected = made(new) if kind else made(zero, "label", "int")
    if not kind:  # the comment behind the properties stays behind them
        line = f"property int label{end}".encode()
        assert line in expected
    assert (tmp_path / "b.ply").read_bytes() == expected
    segmentation.write_labels(tmp_path / "a.ply", tmp_path / "c.ply", np.array(labels), kept=kept, label="Straße")
    columns = [*more[:1], (kind, "Label", old), *more[1:]] if kind else more
    elements = [(FACES, FACE_ROWS), (CAMERA, [(1.5, 640)])]
    elements.insert(place, vertices(*columns, ("int", "Straße", zero)))
    assert (tmp_path / "c.ply").read_bytes() == file(form, *elements, end=end, comment=comment)


def test_spaces_in_text_stay(tmp_path):
    content = text(" 1  2\t3 4  5 \r", "", "6 7 8 9 10", "", "the rest", kinds=["float"] * 5)
    (tmp_path / "a.ply").write_bytes(content)
    segmentation.write_labels(tmp_path / "a.ply", tmp_path / "b.ply", np.array([123, -4]))
    assert (tmp_path / "b.ply").read_bytes() == content.replace(b"4  5 ", b"4  123 ").replace(b"9 10", b"9 -4")
    segmentation.write_labels(tmp_path / "a.ply", tmp_path / "b.ply", np.array([123, -4]), label="new")
    expected = content.replace(b"4  5 ", b"4  5 123 ").replace(b"9 10", b"9 10 -4")
    expected = expected.replace(b"end_header", b"property int new\nend_header")
    assert (tmp_path / "b.ply").read_bytes() == expected


@pytest.mark.parametrize(
    ("more", "label", "labels", "reason"),
    [
        ([("uchar", "label", [0] * 4)], None, [300] * 4, "label holds 0 to 255, got labels 300 to 300"),
        ([("char", "label", [0] * 4)], None, [-129] * 4, "label holds -128 to 127, got labels -129 to -129"),
        ([("float", "label", [0] * 4)], None, [2**24 + 1] * 4, f"label holds -{2**24} to {2**24}, got"),
        ([], None, [2**31] * 4, f"label holds -{2**31} to {2**31 - 1}, got"),
        (
            [("list uchar int", "label", [[]] * 4)],
            None,
            [1] * 4,
            "label is a list property, which cannot hold labels; name another",
        ),
        ([("int", "Label", [0] * 4), ("int", "LABEL", [0] * 4)], None, [1] * 4, "has 2 fields named label"),
        ([], "two words", [1] * 4, "label, into: expected one word as the name of a new field, got 'two words'"),
        ([], "\udcff", [1] * 4, "label, into: expected one word as the name of a new field, got '\\udcff'"),
        ([], "a\nelement", [1] * 4, "label, into: expected one word as the name of a new field, got 'a\\nelement'"),
        ([], None, [1] * 3, "has 4 points, got labels for 3"),
    ],
)
def test_labels_that_are_refused(tmp_path, more, label, labels, reason):
    (tmp_path / "a.ply").write_bytes(file("binary_little_endian", vertices(*more)))
    with pytest.raises(scenes.ReadError, match=rf"a\.ply: {re.escape(reason)}"):
        segmentation.write_labels(tmp_path / "a.ply", tmp_path / "b.ply", np.array(labels), label=label)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


@pytest.mark.parametrize("binary", [True, False])
def test_a_damaged_file_is_refused_before_the_work(tmp_path, binary):
    """Where the labels go is known, or an error, before anything is labelled."""
    content = ply(POINTS, binary)
    (tmp_path / "a.ply").write_bytes(content[:-4] if binary else content.replace(b" 0.25", b" what"))
    with pytest.raises(scenes.ReadError, match=r"a\.ply: (truncated|line 13: expected numbers, got 'what')"):
        formats.label_field(tmp_path / "a.ply", tmp_path / "b.ply", 4)

"""Point Cloud Library files: headers, types and counts."""

import struct

import numpy as np
import pytest
from files import lzf, refusal

from kpcore import scenes

XYZ = np.array([[1, 2, 3], [4, 5, 6.5], [7, 8, 9]], np.float32)


def pcd(data, fields="x y z", size="4 4 4", kind="F F F", count=None, encoding="ascii", **more):
    """A file of three points; what is None is left out of the header."""
    keys = {"VERSION": "0.7", "FIELDS": fields, "SIZE": size, "TYPE": kind, "COUNT": count}
    keys |= {"WIDTH": "3", "HEIGHT": "1", "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": "3", **more, "DATA": encoding}
    head = "".join(f"{key} {value}\n" for key, value in keys.items() if value is not None)
    return head.encode() + (data.encode() if isinstance(data, str) else data)


def rows(*columns):
    return "".join(" ".join(map(str, row)) + "\n" for row in zip(*XYZ.T.tolist(), *columns, strict=True))


READABLE = {
    "COLUMNS": pcd(rows(), fields=None, COLUMNS="x y z", VERSION=".5"),  # version .5
    "POINTS alone": pcd(rows(), WIDTH=None, HEIGHT=None),
    "WIDTH alone": pcd(rows(), POINTS=None, HEIGHT=None),
    "small letters": pcd(rows(), kind="f f F"),
    "no COUNT": pcd(rows()),
    "plus": pcd(rows(), POINTS="+3"),
    "umlauts": "# Höhe über Grund\n".encode() + pcd(rows(), VERSION="0.7 für alle"),
    "latin-1": "# Höhe\n".encode("latin-1") + pcd(rows() + "# Höhe\n"),
    "Windows": pcd(rows()).replace(b"\n", b"\r\n"),
    "lone return": b"# one\rtwo\n" + pcd(rows()),
    "unknown key": pcd(rows(), UNITS="m"),
    "no viewpoint": pcd(rows(), VIEWPOINT=None),
    "twice t": pcd(rows("123", "456"), "x y z t t", "4 4 4 1 1", "F F F U I"),
    "twice _": pcd(rows("123", "456"), "x y z _ _", "4 4 4 1 1", "F F F U I"),
    "COUNT 0": pcd(rows("123"), "x y z _ t", "4 4 4 1 1", "F F F U I", "1 1 1 0 1"),
    "Windows' NaN": pcd(rows(["1.#QNAN", "-1.#IND", "nan"]), "x y z t", "4 4 4 4", "F F F F"),
    "DATA in data": pcd(b"DATA" + XYZ.tobytes()[4:] + b"DATA binary\n", encoding="binary"),
}


@pytest.mark.parametrize("name", READABLE)
def test_headers_that_are_read(write, name):
    points = scenes.read(write("a.pcd", READABLE[name])).points
    np.testing.assert_array_equal(points[:, 1:], XYZ[:, 1:])
    first = np.float32(13.265934) if name == "DATA in data" else 1  # these four bytes are the number
    np.testing.assert_array_equal(points[:, 0], [first, 4, 7])


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_padding_and_fields_of_several_numbers(write, encoding):
    """As a Velodyne's driver writes them: x y z, 4 bytes, intensity, ring, 10 bytes."""
    intensity, ring, pads = np.array([0.5, 7, 9], "<f4"), np.array([5, 300, 65535], "<u2"), np.zeros((3, 14), np.uint8)
    table = [*XYZ.T, pads[:, :4], intensity, ring, pads[:, 4:]]
    if encoding == "ascii":
        data = "".join(
            " ".join(str(n) for part in table for n in np.ravel(part[row])) + "\n" for row in range(3)
        ).encode()
    elif encoding == "binary":
        data = b"".join(np.ascontiguousarray(part[row]).tobytes() for row in range(3) for part in table)
    else:
        plain = b"".join(np.ascontiguousarray(part).tobytes() for part in table)
        data = struct.pack("<II", len(lzf(plain)), len(plain)) + lzf(plain)
    data = pcd(data, "x y z _ intensity ring _", "4 4 4 1 4 2 1", "F F F U F U U", "1 1 1 4 1 1 10", encoding)
    cloud = scenes.read(write("a.pcd", data), fields=["intensity", "ring"])
    np.testing.assert_array_equal(cloud.points, XYZ)
    np.testing.assert_array_equal(cloud.fields["intensity"], intensity)
    np.testing.assert_array_equal(cloud.fields["ring"], ring)


LIMITS = {"I1": (-128, 127), "U1": (0, 255), "I2": (-32768, 32767), "U2": (0, 65535), "I4": (-(2**31), 2**31 - 1),
          "U4": (0, 2**32 - 1), "I8": (-(2**63), 2**63 - 1), "U8": (0, 2**64 - 1)}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS)
def test_integers_in_ascii_are_of_their_type(write, kind):
    least, most = LIMITS[kind]

    def file(value):
        return write("a.pcd", pcd(rows([1, value, 3]), "x y z t", f"4 4 4 {kind[1]}", f"F F F {kind[0]}"))

    for value in (least, most):
        if abs(value) < 2**53:
            assert scenes.read(file(value), fields=["t"]).fields["t"].tolist() == [1, value, 3]
    if kind == "U8":  # an unsigned -1 is no label
        assert scenes.read(file(most), label="t").labels.tolist() == [1, -1, 3]
    for value in (2 * least - 1, 2 * most + 2, "0.5", "nan", "inf"):
        line = refusal(file(value))
        assert line.startswith("field t is") and "(point 1)" in line and line.endswith(f"int{8 * int(kind[1])}")
    assert "1e3" not in refusal(file("x")) and "expected numbers, got 'x'" in refusal(file("x"))


def test_the_300_of_a_byte(write):
    data = pcd(rows([1, 300, 2]), "x y z label", "4 4 4 1", "F F F U")
    assert refusal(write("a.pcd", data)) == "field label is 300 (point 1), which is not uint8"


WHOLE = "expected a whole number of"
REFUSED = {
    "negative": (pcd(bytes(600), encoding="binary", WIDTH="-5", POINTS="-5"), f"POINTS is -5, {WHOLE} 0 or more"),
    "negative width": (pcd(rows(), WIDTH="-3"), f"WIDTH is -3, {WHOLE} 0 or more"),
    "negative height": (pcd(rows(), WIDTH="-3", HEIGHT="-1"), f"HEIGHT is -1, {WHOLE} 0 or more"),
    "fraction": (pcd(rows(), POINTS="3.0"), f"POINTS is 3.0, {WHOLE} 0 or more"),
    "word": (pcd(rows(), WIDTH="three"), f"WIDTH is three, {WHOLE} 0 or more"),
    "huge": (pcd(rows(), WIDTH="1" + "0" * 5000), f"WIDTH is 1{'0' * 39}, {WHOLE} 0 or more"),
    "wrong product": (pcd(rows(), HEIGHT="2"), "POINTS is 3, but WIDTH x HEIGHT is 3 x 2"),
    "negative count": (pcd(rows(), count="1 1 -1"), f"COUNT is -1, {WHOLE} 0 or more"),
    "absurd count": (pcd(XYZ.tobytes(), count="1 1 99999999999", encoding="binary"), "truncated: 3 points need 1"),
    "absurd count, ascii": (pcd(rows(), count="1 1 99999999999"), "truncated: declares 3 points of 1000"),
    "absurd count, packed": (
        pcd(bytes(8), count="1 1 99999999999", encoding="binary_compressed"),
        "unpacked size is 0",
    ),
    "no count": (pcd(rows(), count="1 1"), "FIELDS names 3 fields, COUNT has 2"),
    "no size": (pcd(rows(), size="4 4"), "FIELDS names 3 fields, SIZE has 2"),
    "no type": (pcd(rows(), kind="F F F F"), "FIELDS names 3 fields, TYPE has 4"),
    "zero size": (pcd(rows(), size="4 4 0"), f"SIZE is 0, {WHOLE} 1 or more"),
    "odd size": (pcd(rows(), size="4 4 3"), "field z has TYPE F of SIZE 3"),
    "half": (pcd(rows(), size="4 4 2"), "field z has TYPE F of SIZE 2"),
    "wide integer": (pcd(rows(), size="4 4 16", kind="F F U"), "field z has TYPE U of SIZE 16"),
    "odd type": (pcd(rows(), kind="F F S"), "field z has TYPE S of SIZE 4"),
    "long type": (pcd(rows(), kind="F F FF"), "field z has TYPE FF of SIZE 4"),
    "twice": (pcd(rows(), UNITS="m\nWIDTH 3"), "the header has two WIDTH lines"),
    "both names": (pcd(rows(), COLUMNS="x y z"), "the header has two FIELDS lines"),
    "x twice": (pcd(rows("123"), "x y z x", "4 4 4 1", "F F F U"), "has 2 fields named x"),
    "no DATA": (pcd(rows()).replace(b"DATA ascii\n", b""), "it has no DATA line"),
    "no sizes": (pcd(b"\0" * 7, encoding="binary_compressed"), "truncated: expected 8 bytes"),
    "no numbers": (pcd("# nothing\n" * 9), "holds a table of (0, 0)"),
    "none": (pcd("", WIDTH="0", POINTS="0"), "holds no points"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_headers_that_are_refused(write, name):
    data, reason = REFUSED[name]
    assert reason in refusal(write("a.pcd", data))

"""Copies with labels in the same format: text and bytes of everything else stay, and several fields are written."""

import os
import struct
import warnings
import zipfile

import numpy as np
import pytest
from files import COLORS, LABELS, POINTS, las, laz, lzf, npz, ply

from kpcore.io import ReadError, formats, read, write_labels

NEW = np.array([5, 6, 7])
KEPT = np.array([True, True, False, True])
PERCENT = np.uint8([99, 200, 1])


@pytest.fixture(autouse=True)
def without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


TABLES = {
    "names": ("x,y,z,label\n1,2,3,0\n4,5.50,6,1\n7,8,9,2\n1e3,0,0,3\n",
              "x,y,z,label,confidence\n1,2,3,5,99\n4,5.50,6,6,200\n7,8,9,2,0\n1e3,0,0,7,1\n"),
    "new": ("x,y,z\n1,2,3\n4,5,6\n7,8,9\n0,0,0\n",
            "x,y,z,label,confidence\n1,2,3,5,99\n4,5,6,6,200\n7,8,9,0,0\n0,0,0,7,1\n"),
    "windows": ("X;Y;Z;Class \r\n1 ; 2;3; 0\r\n\r\n4;5;6;1\r\n7;8;9;2 \r\n0;0;0; 3 ",
                "X;Y;Z;Class;confidence \r\n1 ; 2;3; 5;99\r\n\r\n4;5;6;6;200\r\n7;8;9;2;0 \r\n0;0;0; 7;1 "),
    "comment": ("# by hand\n// x y z label\n1  2\t3 0 # first\n# in between\n 4 5 6 1\n7 8 9 2\n0 0 0 3\n",
                "# by hand\n// x y z label confidence\n1  2\t3 5 99 # first\n# in between\n 4 5 6 6 200\n7 8 9 2 0\n"
                "0 0 0 7 1\n"),
    "nameless": ("1 2 3 40\n4 5 6 50\n7 8 9 60\n0 0 0 70\n",
                 "# x y z column_4 label confidence\n1 2 3 40 5 99\n4 5 6 50 6 200\n7 8 9 60 0 0\n0 0 0 70 7 1\n"),
    "colours": ("\n1 2 3 40 50 60\n4 5 6 50 1 1\n7 8 9 60 1 1\n0 0 0 70 1 1\n",
                "# x y z red green blue label confidence\n\n1 2 3 40 50 60 5 99\n4 5 6 50 1 1 6 200\n7 8 9 60 1 1 0 0\n"
                "0 0 0 70 1 1 7 1\n"),
    "quotes": ('"x","y","z","a, b","label"\n1,"2",3,4,"0"\n4,5,6,"",1\n7,8,9,NA,2\n0,0,0,,3\n',
               '"x","y","z","a, b","label",confidence\n1,"2",3,4,5,99\n4,5,6,"",6,200\n7,8,9,NA,2,0\n0,0,0,,7,1\n'),
    "trailing": ("x,y,z,\n1,2,3,\n4,5,6,\n7,8,9,\n0,0,0,\n",
                 "x,y,z,label,confidence,\n1,2,3,5,99,\n4,5,6,6,200,\n7,8,9,0,0,\n0,0,0,7,1,\n"),
    "count": ("x y z label\n4\n1 2 3 0\n4 5 6 1\n7 8 9 2\n0 0 0 3\n",
              "x y z label confidence\n4\n1 2 3 5 99\n4 5 6 6 200\n7 8 9 2 0\n0 0 0 7 1\n"),
    "tabs": ("x\ty\tz\tscalar_Label\tn\n1\t2\t3\t\t\n4\t5\t6\t1\t\n7\t8\t9\t2\t3\n0\t0\t0\t3\t1\n",
             "x\ty\tz\tscalar_Label\tn\tconfidence\n1\t2\t3\t5\t\t99\n4\t5\t6\t6\t\t200\n7\t8\t9\t2\t3\t0\n"
             "0\t0\t0\t7\t1\t1\n"),
    "no numbers": ("x y z label\n1.#QNAN 2 3 0\n4 5 6 1 // last\n7 8 -1.#INF 2\n0 0 0 3",
                   "x y z label confidence\n1.#QNAN 2 3 5 99\n4 5 6 6 200 // last\n7 8 -1.#INF 2 0\n0 0 0 7 1"),
}  # fmt: skip


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("name", TABLES)
def test_text_of_other_columns_stays(tmp_path, name, coding):
    before, after = TABLES[name]
    before, after = (f"# Höhe über Straße\n{part}" for part in (before, after))
    if name in ("nameless", "colours"):
        line, _, rest = after.partition("\n")
        new, _, rest = rest.partition("\n")
        after = f"{new}\n{line}\n{rest}"
    (tmp_path / "a.txt").write_bytes(before.encode(coding))
    write_labels(tmp_path / "a.txt", tmp_path / "b.txt", NEW, kept=KEPT, extra={"confidence": PERCENT})
    assert (tmp_path / "b.txt").read_bytes() == after.encode(coding)
    if "QNAN" not in after:
        cloud = read(tmp_path / "b.txt", fields=["confidence"])
        assert cloud.labels[KEPT].tolist() == NEW.tolist()
        assert cloud.fields["confidence"].tolist() == [99, 200, 0, 1]


def test_fractions_in_a_table_with_decimal_commas(tmp_path):
    (tmp_path / "a.csv").write_text("x;y;z\n1,25;2;3\n4;5;6\n")
    write_labels(tmp_path / "a.csv", tmp_path / "b.csv", [1, 2], extra={"share": np.float32([0.1, 1e-9])})
    assert (tmp_path / "b.csv").read_text() == "x;y;z;label;share\n1,25;2;3;1;0,1\n4;5;6;2;1e-09\n"
    assert read(tmp_path / "b.csv", fields=["share"]).fields["share"].astype(np.float32).tolist() == [
        np.float32(0.1),
        np.float32(1e-9),
    ]


def test_columns_of_a_table_without_names(tmp_path):
    """columns= names the field of the labels; names of other files' columns are not used."""
    (tmp_path / "a.xyz").write_text("1 2 3 4 0\n1 2 3 4 0\n")
    columns = ["x", "y", "z", "intensity", "class"]
    write_labels(tmp_path / "a.xyz", tmp_path / "b.xyz", [8, 9], columns=columns)
    assert (tmp_path / "b.xyz").read_text() == "1 2 3 4 8\n1 2 3 4 9\n"
    with np.load(written(tmp_path / "a.xyz", tmp_path / "b.npz", [8, 9], columns=columns)) as file:
        assert sorted(file.files) == ["intensity", "labels", "points"] and file["labels"].tolist() == [8, 9]
    write_labels(tmp_path / "a.xyz", tmp_path / "c.xyz", [8, 9], columns=["x", "y", "z", "class"])
    assert (tmp_path / "c.xyz").read_text() == "# x y z column_4 column_5 label\n1 2 3 4 0 8\n1 2 3 4 0 9\n"


def written(source, out, *args, **more):
    write_labels(source, out, *args, **more)
    return out


def a_pcd(
    encoding, fields="curve _ x y z rgb label", kinds="F U F F F F U", sizes="4 1 4 4 4 4 2", counts="2 3 1 1 1 1 1"
):
    head = (f"# by hand\r\nVERSION .7\nFIELDS {fields}\nSIZE {sizes}\nTYPE {kinds} \nCOUNT {counts}\n"
            f"WIDTH 2\nHEIGHT 2\nVIEWPOINT 1 0 0 1 0 0 0\nPOINTS 4\nDATA {encoding}\n").encode()  # fmt: skip
    points, rgb = POINTS.astype("<f4"), np.float32([1.5, 2, 3, 4])
    columns = [np.ones((4, 2), "<f4"), np.full((4, 3), 7, "u1"), points[:, 0], points[:, 1], points[:, 2], rgb,
               LABELS.astype("<u2")]  # fmt: skip
    return head, columns


def body_of(columns):
    return b"".join(b"".join(column[at].tobytes() for column in columns) for at in range(4))


@pytest.mark.parametrize("encoding", ["binary", "binary_compressed", "ascii"])
@pytest.mark.parametrize("into", [None, "truth"])
def test_bytes_of_other_fields_of_a_pcd_stay(tmp_path, encoding, into):
    head, columns = a_pcd(encoding)
    plain = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
    text = "".join(f"1 1  7 7 7 {' '.join(map(str, point))} {rgb} {label}  \n" for point, rgb, label in
                   zip(POINTS.tolist(), (1.5, 2.0, 3.0, 4.0), LABELS, strict=True))  # fmt: skip
    body = {"binary": body_of(columns) + b"tail", "ascii": text.encode(),
            "binary_compressed": struct.pack("<II", len(lzf(plain)), len(plain)) + lzf(plain)}[encoding]  # fmt: skip
    (tmp_path / "a.pcd").write_bytes(head + body)
    extra = {"confidence": PERCENT, "curvature": np.float64([0.1, 2, 3])}
    write_labels(tmp_path / "a.pcd", tmp_path / "b.pcd", NEW, kept=KEPT, into=into, extra=extra)

    new = [("truth", "4", "I")] * (into is not None) + [("confidence", "1", "U"), ("curvature", "8", "F")]
    head = head.replace(b"rgb label", " ".join(["rgb label", *(name for name, _, _ in new)]).encode())
    head = head.replace(b"4 4 4 2", " ".join(["4 4 4 2", *(size for _, size, _ in new)]).encode())
    head = head.replace(b"F F U ", " ".join(["F F U", *(kind for _, _, kind in new)]).encode() + b" ")
    head = head.replace(b"1 1 1 1 1\n", b"1 1 1 1 1" + b" 1" * len(new) + b"\n").replace(
        b"binary_compressed", b"binary"
    )
    labels = LABELS.astype("<u2") if into else np.array([5, 6, 7, 7], "<u2")
    percent, curvature = np.uint8([99, 200, 0, 1]), np.array([0.1, 2, 0, 3])
    truth = [np.array([5, 6, 0, 7], "<i4")] * (into is not None)
    if encoding == "ascii":
        rows = zip(
            POINTS.tolist(), (1.5, 2.0, 3.0, 4.0), labels, *truth, percent, ("0.1", "2.0", "0", "3.0"), strict=True
        )
        body = "".join(
            f"1 1  7 7 7 {' '.join(map(str, point))} {' '.join(map(str, rest))}  \n" for point, *rest in rows
        )
        assert (tmp_path / "b.pcd").read_bytes() == head + body.encode()
    else:
        body = body_of([*columns[:-1], labels, *truth, percent, curvature])
        assert (tmp_path / "b.pcd").read_bytes() == head + body + b"tail" * (encoding == "binary")


def test_refusals_of_a_pcd(tmp_path):
    head, columns = a_pcd("binary")
    (tmp_path / "a.pcd").write_bytes(head + body_of(columns))
    for more, reason in (
        ({"into": "curve"}, "curve has 2 numbers for each point"),
        ({"into": "a b"}, "expected one word as the name of a new field, got 'a b'"),
        ({"extra": {"curve": np.ones(4)}}, "curve has 2 numbers"),
        ({"extra": {"label": np.ones(4, np.uint8)}}, "extra: expected names other than that of the labels, got label"),
        (
            {"extra": {"rgb": np.ones(4, int)}, "into": "n"},
            "extra: field rgb is float32, which does not hold int64",
        ),
    ):
        with pytest.raises(ReadError, match=rf"a\.pcd: .*{reason}"):
            write_labels(tmp_path / "a.pcd", tmp_path / "b.pcd", LABELS, **more)
    with pytest.raises(ReadError, match="label holds 0 to 65535, got labels -1 to 7"):
        write_labels(tmp_path / "a.pcd", tmp_path / "b.pcd", LABELS - (LABELS == 0))
    assert os.listdir(tmp_path) == ["a.pcd"]


SAME = {
    "a.las": las, "a.laz": laz, "a.ply": ply, "b.ply": lambda points: ply(points, binary=False),
    "a.npz": lambda points: npz(points=points, label=LABELS, colors=COLORS),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_further_fields_in_one_pass(write, tmp_path, name):
    """New ones of every type; written again they are replaced in place, and no point moves."""
    path, out, again = write(name, SAME[name](POINTS)), tmp_path / f"c{name[1:]}", tmp_path / f"d{name[1:]}"
    extra = {"confidence": PERCENT, "share": np.float32([0.1, np.nan, 3]), "id": np.uint32([2**32 - 1, 0, 5]),
             "step": np.int16([-5, 6, 7]), "time": np.float64([0.1, 2e300, 3])}  # fmt: skip
    write_labels(path, out, NEW, kept=KEPT, extra=extra)
    cloud = read(out, fields=[*extra], label="classification" if "la" in name else "label")
    assert cloud.labels.tolist() == [5, 6, 7, 7] and np.array_equal(cloud.points, POINTS)
    for one, values in extra.items():
        np.testing.assert_array_equal(cloud.fields[one][KEPT].astype(values.dtype), values)
        assert cloud.fields[one][2] == 0
    new = {one: (values[::-1] + values.dtype.type(0)) for one, values in extra.items()}
    new["CONFIDENCE"] = new.pop("confidence")
    write_labels(out, again, NEW[::-1], kept=~KEPT | (np.arange(4) != 3), extra=new)
    cloud = read(again, fields=[*extra])
    assert cloud.labels.tolist() == [7, 6, 5, 7] and np.array_equal(cloud.points, POINTS)
    assert cloud.fields["confidence"].tolist() == [1, 200, 99, 1]
    assert cloud.fields["id"].tolist() == [5, 0, 2**32 - 1, 5] and cloud.fields["step"].tolist() == [7, 6, -5, 7]
    if name == "a.npz":
        assert len(zipfile.ZipFile(again).namelist()) == 8
    elif name != "b.ply":
        assert out.stat().st_size == again.stat().st_size or name == "a.laz"


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("form", ["ascii", "binary_big_endian"])
def test_a_property_is_replaced_beside_a_new_one(tmp_path, form, at):
    """Bytes of one row end where those of the next start."""
    plyfile = pytest.importorskip("plyfile")
    names = ["x", "y", "z"]
    names.insert(at, "label")
    table = np.zeros(4, [(name, "u1" if name == "label" else "f8") for name in names])
    table["x"], table["label"] = POINTS[:, 0], LABELS
    element = plyfile.PlyElement.describe(table, "vertex")
    plyfile.PlyData([element], text=form == "ascii", byte_order=">" if "big" in form else "=").write(tmp_path / "a.ply")
    extra = {"wide": np.float64([1.5, 2, 3]), "confidence": PERCENT}
    write_labels(tmp_path / "a.ply", tmp_path / "b.ply", NEW + 100, kept=KEPT, extra=extra)
    vertex = plyfile.PlyData.read(tmp_path / "b.ply")["vertex"]
    assert [one.name for one in vertex.properties] == [*names, "wide", "confidence"]
    assert vertex["label"].tolist() == [105, 106, 7, 107] and vertex["x"].tolist() == POINTS[:, 0].tolist()
    assert vertex["wide"].tolist() == [1.5, 2, 0, 3] and vertex["confidence"].tolist() == [99, 200, 0, 1]


def test_laspy_reads_further_fields(write, tmp_path):
    laspy = pytest.importorskip("laspy")
    path = write("a.las", las(POINTS))
    extra = {"confidence": PERCENT, "big": np.uint64([2**64 - 1, 2, 3]), "flag": np.array([True, False, True])}
    write_labels(path, tmp_path / "b.las", NEW, kept=KEPT, into="truth", extra=extra)
    data = laspy.read(tmp_path / "b.las")
    assert [*data.point_format.extra_dimension_names] == ["truth", "confidence", "big", "flag"]
    assert data["truth"].tolist() == [5, 6, 0, 7] and data["confidence"].tolist() == [99, 200, 0, 1]
    assert data["big"].tolist() == [2**64 - 1, 2, 0, 3] and data["flag"].tolist() == [1, 0, 0, 1]
    assert data["confidence"].dtype == np.uint8
    assert np.array_equal(data.classification, LABELS) and np.array_equal(data.xyz, POINTS)


def test_further_fields_that_are_refused(write, tmp_path):
    path = write("a.las", las(POINTS))
    for error, out, extra, reason in (
        (ValueError, "b.las", {"a": np.ones(3)}, r"extra: expected \(4,\) values of a, as labels, got \(3,\)"),
        (TypeError, "b.las", {"a": np.array(["1"] * 4)}, "extra: expected numbers of up to 64 bits, .* for a, got str"),
        (TypeError, "b.las", {"": np.ones(4)}, "extra: expected the name of a field, got ''"),
        (ValueError, "b.las", {"a": np.ones(4), "A": np.ones(4)}, "extra: expected names that differ in more"),
        (ReadError, "b.las", {"classification": np.ones(4)}, "extra: .*classification"),
        (ReadError, "b.las", {"intensity": np.ones(4)}, "extra: field intensity is uint16, which does not hold"),
        (ReadError, "b.las", {"return_number": np.ones(4, np.uint8)}, "extra: field return_number is bool, which does"),
        (ReadError, "b.las", {"é" * 17: np.ones(4)}, "extra: expected a name of 1 to 32 bytes"),
        (ReadError, "b.ply", {"a": np.ones(4, int)}, "a: expected a type of PLY, at most 32 bits for integers"),
        (ReadError, "b.npz", {"colors": np.ones(4)}, "extra: expected a name that a .npz file can hold and no other"),
        (ReadError, "b.npz", {"red": np.ones(4)}, "extra: expected a field of one number for each point, got red"),
        (ReadError, "b.pcd", {"a b": np.ones(4)}, "extra: expected a name that a .pcd file can hold"),
        (ValueError, "b.csv", {"Z": np.ones(4)}, "extra: expected names of fields, got 'Z', which is a coordinate"),
    ):  # fmt: skip
        with pytest.raises(error, match=reason):
            write_labels(path, tmp_path / out, LABELS, extra=extra)
        if error is ReadError:  # before long work, too
            kinds = {name: values.dtype for name, values in extra.items()}
            with pytest.raises(error, match=reason):
                formats.label_field(path, tmp_path / out, 4, values=LABELS, extra=kinds)
    with pytest.raises(ValueError, match="extra: expected names other than that of the labels, got 'A'"):
        write_labels(path, tmp_path / "b.las", LABELS, into="A", extra={"a": np.ones(4)})
    assert os.listdir(tmp_path) == ["a.las"]

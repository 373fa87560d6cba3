"""The rules by which columns of any format become points, colours, labels and fields."""

import re
import warnings

import numpy as np
import pytest
from files import COLORS, FILES, LABELS, POINTS, npy, npz, ply, refusal

from kpcore.io import ReadError, cloud, read

UTM = np.array([4.3e5, 5.41e6, 210.0])


@pytest.mark.parametrize("stray", [(0, 0, 0), (1e-3, 0, 0), (-3e7, 5, 1), (0, 0, 9e9)])
@pytest.mark.parametrize("strays", [1, 9])
def test_stray_points_do_not_switch_the_shift_off(write, stray, strays):
    """One at (0, 0, 0) cost the others 0.25 m."""
    rng = np.random.default_rng(0)
    points = UTM + rng.random((40, 3)) * 50
    alone = read(write("a.npy", npy(points)))
    points[::4][:strays] = stray
    made = read(write("b.npy", npy(points)))
    change = np.abs(made.points.astype(float) - (points - made.shift)).max(axis=1)
    assert np.delete(change, np.arange(0, 40, 4)[:strays]).max() < 1e-5
    assert np.abs(made.shift - alone.shift).max() <= 10
    assert made.rounding == change.max()


def test_most_points_may_be_zeros(write):
    """As pixels of a range image without a return."""
    points = np.zeros((1000, 3))
    points[::20] = UTM + np.random.default_rng(0).random((50, 3)) * 50
    made = read(write("a.npy", npy(points)))
    assert np.abs(made.points[::20] + made.shift - points[::20]).max() < 1e-5
    assert not read(write("b.npy", npy(np.zeros((5, 3))))).shift.any()


def test_the_shift_of_a_cloud_without_outliers_is_its_lowest_corner(write):
    """The least along each axis, also where nine tenths of the points are in one place, or on a line."""
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1), (100, 1, 0), (1000, 0, 0), (0, 0, 0)):
        points = UTM + rng.random((500, 3)) * shape
        np.testing.assert_array_equal(read(write("a.npy", npy(points))).shift, np.floor(points.min(axis=0)))
    points = UTM + rng.random((500, 3)) * np.where(np.arange(500) < 470, 1, 9.9)[:, None]
    np.testing.assert_array_equal(read(write("a.npy", npy(points))).shift, np.floor(points.min(axis=0)))


def test_what_rounding_to_float32_costs(write):
    assert read(write("a.npy", npy(POINTS))).rounding == 0
    points = POINTS + np.array([0.1, 0.01, 1e-3])
    assert read(write("b.npy", npy(points))).rounding == np.abs(points - points.astype(np.float32)).max() > 0


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (np.array([1, np.nan, 2, 0]), [1, -1, 2, 0]),
        (np.array([1, np.nan, 2, 0], np.float32), [1, -1, 2, 0]),
        (np.array([1, 2**32 - 1, 2, 0], np.uint32), [1, -1, 2, 0]),
        (np.array([1, 2**32 - 1, 2, 0], np.int64), [1, -1, 2, 0]),
        (np.array([1, 2**32 - 1, 2, 0], np.float64), [1, -1, 2, 0]),
        (np.array([1, 2**32 - 1, 2, 0], np.float32), [1, -1, 2, 0]),
        (np.array([1, 2**64 - 1, 2, 0], np.uint64), [1, -1, 2, 0]),
        (np.array([1, -1, 2, 0], np.int8), [1, -1, 2, 0]),
        (np.array([1, 65_535, 255, 0], ">u2"), [1, 65_535, 255, 0]),
        (np.array([[1], [3], [2], [0]]), [1, 3, 2, 0]),
        (np.array([True, False, True, True]), [1, 0, 1, 1]),
        (np.array([0, 0, 0, 0]), "is 0 throughout"),
        (np.array([np.nan] * 4), "is nan throughout"),
        (np.array([1, 2.5, 3, 3]), r"holds 2.5 \(point 1\)"),
        (np.array([1, np.inf, 3, 3]), r"holds inf \(point 1\)"),
        (np.array([1, 2, 3, 2**31]), r"holds 2147483648 \(point 3\)"),
        (np.array([1, 2, 3, -(2**31) - 1]), r"holds -2147483649 \(point 3\)"),
        (np.zeros((4, 2)), "expected one number for each point"),
        (np.array(["a", "b", "c", "d"]), "expected one number for each point"),
    ],
)
def test_labels_of_any_type(write, values, labels):
    """A point without a value, NaN or all bits set, is of no class; the others keep theirs."""
    path = write("a.npz", npz(points=POINTS, labels=values))
    made = read(path)
    if isinstance(labels, list):
        np.testing.assert_array_equal(made.labels, labels)
        assert made.labels.dtype == np.int32 and made.unlabeled is None
        np.testing.assert_array_equal(read(path, label="labels").labels, labels)
    else:
        assert made.labels is None
        assert re.search(labels, made.unlabeled)
        if "0 throughout" not in labels:
            with pytest.raises(ReadError, match=f"field labels:? {labels}"):
                read(path, label="labels")


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        ("u1", "f4"), ("i1", "f4"), ("?", "f4"), ("u2", "f4"), ("<i2", "f4"), (">f4", "f4"), ("f2", "f4"),
        ("<i4", "f8"), (">u4", "f8"), ("<f8", "f8"), ("<i8", "f8"), (">u8", "f8"),
    ],
)  # fmt: skip
def test_fields_keep_every_value(write, dtype, kept):
    """gps_time had 191 distinct values as float32 where the file has 138,682."""
    limits = {"i": np.iinfo, "u": np.iinfo, "f": np.finfo}.get(np.dtype(dtype).kind)
    most = 1 if limits is None else min(float(limits(np.dtype(dtype).newbyteorder("=")).max), 2**53)
    values = np.array([0, 1, most, most]).astype(dtype)
    if np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize > 2:
        values[2] = most - 1
    made = read(write("a.npz", npz(points=POINTS, time=values)), fields=["Time"]).fields["time"]
    assert made.dtype == np.dtype(kept)
    assert [float(one) for one in made] == [float(one) for one in values.tolist()]
    assert len(np.unique(made)) == len(np.unique(values))


def test_a_field_that_no_float_holds_is_refused(write):
    path = write("a.npz", npz(points=POINTS, time=np.array([0, 1, 2, 2**53 + 1])))
    with pytest.raises(ReadError, match="field time holds 9007199254740993, which float64 cannot represent"):
        read(path, fields=["time"])


def test_the_exact_name_wins():
    """A name is meant as it is written, else in any case, else after CloudCompare's scalar_."""
    names = ("scalar_X", "X", "x", "Scalar_Y", "y", "z", "scalar_Intensity", "Label", "LABEL")
    for name, at in (("x", 2), ("X", 1), ("y", 4), ("Y", 4), ("intensity", 6), ("scalar_x", 0), ("Label", 7)):
        assert cloud.name_index(names, name) == at
    assert cloud.name_index(names, "w") is None
    with pytest.raises(ReadError, match="has 2 fields named label"):
        cloud.name_index(names, "label")


@pytest.mark.parametrize(
    ("head", "rows"),
    [("x,y,z,scalar_x", "1,2,3,9"), ("scalar_x,x,y,z", "9,1,2,3"), ("X,x,y,z", "9,1,2,3"), ("x,X,y,z", "1,9,2,3")],
)
def test_no_other_field_replaces_a_coordinate(write, head, rows):
    assert read(write("a.csv", f"{head}\n{rows}\n".encode())).points.tolist() == [[1, 2, 3]]


def test_colours_packed_in_the_other_byte_order(write):
    table = np.zeros(4, [("x", ">f4"), ("y", ">f4"), ("z", ">f4"), ("rgb", ">u4")])
    table["x"], table["y"], table["z"] = POINTS.T
    table["rgb"] = COLORS.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    for array in (table, table.astype([(name, "<" + kind[1:]) for name, kind in table.dtype.descr])):
        np.testing.assert_array_equal(read(write("a.npy", npy(array))).colors, COLORS)


RGB = COLORS.astype(float)
MIXED = np.array([[300.0], [-5], [0.5], [9]])


@pytest.mark.parametrize(
    ("more", "colors", "doubtful"),
    [
        (RGB, COLORS, False),
        (np.column_stack([RGB, LABELS]), None, True),  # or intensity r g b
        (np.column_stack([LABELS, RGB]), None, True),
        (np.column_stack([MIXED, RGB]), None, True),  # or intensity, class, r g b
        (np.column_stack([RGB, MIXED]), None, True),
        (RGB // 9, None, True),  # or numbers of returns, rings, classes
        (np.column_stack([MIXED, MIXED, MIXED]), None, False),
        (LABELS[:, None], None, False),
    ],
)
def test_columns_without_names(write, more, colors, doubtful):
    """Never labels; colours where there are three more columns, and they can be nothing else."""
    path = write("a.npy", npy(np.column_stack([POINTS, more])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = read(path)
    assert len(caught) == doubtful
    if doubtful:
        width = 3 + more.shape[1]
        assert str(caught[0].message).startswith(f"{path}: its {width} columns have no names and may hold colours")
    assert made.labels is None and "columns=" in made.unlabeled
    np.testing.assert_array_equal(made.points, POINTS)
    assert (made.colors is None) == (colors is None)
    if colors is not None:
        np.testing.assert_array_equal(made.colors, colors)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npy", npy),
        ("a.npz", lambda table: npz(points=table)),
        ("a.xyz", lambda table: words(table, " ")),
        ("a.csv", lambda table: words(table, ",")),
    ],
)
def test_columns_that_the_caller_names(write, name, data):
    path = write(name, data(np.column_stack([LABELS, POINTS, RGB])))
    made = read(path, columns=("truth", "X", "Y", "Z", "red", "green", "blue"), label="truth", fields=["RED"])
    np.testing.assert_array_equal(made.points, POINTS)
    np.testing.assert_array_equal(made.colors, COLORS)
    np.testing.assert_array_equal(made.labels, LABELS)
    np.testing.assert_array_equal(made.fields["red"], COLORS[:, 0])
    with pytest.raises(ReadError, match="has 7 columns, got 3 names in columns=: x y z"):
        read(path, columns=["x", "y", "z"])


def words(table, separator):
    return "".join(separator.join(map(repr, map(float, row))) + "\n" for row in table).encode()


def test_coordinates_that_lie_on_their_side_are_refused(write):
    assert "expected a row for each point, got (3, 50): transpose" in refusal(write("a.npy", npy(np.ones((3, 50)))))
    assert len(read(write("a.npy", npy(np.ones((3, 9))))).points) == 3
    names = [*"xyz", *map(str, range(47))]
    assert len(read(write("a.npy", npy(np.ones((3, 50)))), columns=names).points) == 3


def test_a_field_that_is_not_there_is_answered_with_those_that_are(write):
    with pytest.raises(ReadError, match=r"has no field echo; there are x y z red green blue label$"):
        read(write("a.ply", ply(POINTS)), fields=["echo"])


@pytest.mark.parametrize("name", ["fields.npy", "plain.las", "binary.ply", "binary.pcd", "commas.csv", "fields.npz"])
def test_names_for_columns_that_have_some_are_refused(write, name):
    """They would be without effect; the very names are not refused."""
    made = {"fields.npz": lambda points: npz(x=points[:, 0], y=points[:, 1], z=points[:, 2])}
    path = write(name, {**FILES, **made}[name](POINTS))
    with pytest.raises(ReadError, match=r"its columns have names already, .*; columns= is for a table without names"):
        read(path, columns=["x", "y", "z", "truth"])
    if name == "commas.csv":
        assert read(path, columns=["X", "Y", "Z", "red", "green", "blue", "label"]).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("rgb", "colors", "warning"),
    [
        (RGB / 255, COLORS, None),
        (COLORS.astype(np.uint16) * 257, COLORS, None),
        (np.where(RGB == 10, np.nan, RGB), np.where(COLORS == 10, 0, COLORS), None),
        (RGB / 127.5 - 1, None, "-1 to 1, are neither"),  # as networks take them
        (RGB.astype(int) - 128, None, "-128 to 127, are neither"),
        (RGB / 250, None, "0 to 1.02, are neither"),
        (np.where(RGB == 10, np.inf, RGB), None, "0 to inf, are neither"),
        (RGB * 1000, None, "0 to 255000, are neither"),
        (
            np.where(COLORS == 255, 256, COLORS.astype(int)),
            COLORS * 0 + (COLORS == 255),
            "up to 256, were read as 16-bit",
        ),
    ],
)
def test_colours_of_any_kind(write, rgb, colors, warning):
    """Colours in no usual range are not read, rather than scaled into one."""
    path = write("a.npz", npz(points=POINTS, colors=rgb))
    if warning:
        with pytest.warns(UserWarning, match=warning):
            made = read(path)
    else:
        made = read(path)
    assert (made.colors is None) == (colors is None)
    if colors is not None:
        np.testing.assert_array_equal(made.colors, colors)


def test_packed_colours_of_any_type(write):
    packed = COLORS.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    rows = np.column_stack([POINTS, packed])
    text = "x,y,z,rgb\n" + "\n".join(",".join(f"{value:.17g}" for value in row) for row in rows)
    np.testing.assert_array_equal(read(write("a.csv", text.encode())).colors, COLORS)
    with pytest.warns(UserWarning, match="its field rgb does not hold packed colours"):
        assert read(write("a.csv", text.replace(",16", ",0.5").encode())).colors is None


@pytest.mark.parametrize("name", ["a.csv", "a.npz"])
def test_two_fields_of_labels(write, name):
    """As numbers of objects and classes (Paris-Lille-3D): the first counts, and the other is told of."""
    second = {"a.csv": "class", "a.npz": "classes"}[name]

    def file(first, other):
        if name == "a.npz":
            return npz(points=POINTS, label=first, classes=other)
        rows = np.column_stack([POINTS, first, other])
        return f"x,y,z,label,class\n{words(rows, ',').decode()}".encode()

    path = write(name, file(LABELS + 1000, LABELS))
    with pytest.warns(
        UserWarning, match=f"its labels were read from field label, but {second} holds others: choose one with label="
    ):
        assert read(path).labels.tolist() == (LABELS + 1000).tolist()
    assert read(path, label=second).labels.tolist() == LABELS.tolist()
    path = write(name, file(LABELS * 0, LABELS))
    with pytest.warns(UserWarning, match=f"its labels were read from field label, but {second} holds others"):
        assert read(path).unlabeled == "field label is 0 throughout"
    assert read(write(name, file(LABELS, LABELS))).labels.tolist() == LABELS.tolist()


def test_integers_that_no_float_holds_are_no_coordinates(write):
    with pytest.raises(ReadError, match="x holds 1152921504606846977, which float64 cannot represent"):
        read(write("a.npy", npy(np.array([[2**60 + 1, 0, 0], [2**60, 1, 1]]))))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double on this system")
def test_long_doubles_are_no_field(write):
    with pytest.raises(ReadError, match=r"field time is .*, which float64 cannot represent"):
        read(write("a.npz", npz(points=POINTS, time=np.ones(4, np.longdouble))), fields=["time"])

"""What is asked of a file before and while it is read: names of its fields, points to leave out, what looks wrong."""

import numpy as np
import pytest
from files import FILES, LABELS, POINTS, las, npy, npz, ply
from test_las import described, made

from kpcore.io import ReadError, duplicates, faults, field_names, formats, read, write_labels
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


# ---- points that are left out


def flagged(form, extended_flags=()):
    """A LAS of eight points: classes 1, 7, 12 and 18, each with and without the flags of the second four."""
    data = bytearray(made(form, 4 if form >= 6 else 2, num=8))
    size = {0: 20, 3: 34, 6: 30, 7: 36}[form]
    classes, start = [1, 7, 12, 18, 1, 1, 1, 1], len(data) - 8 * size
    for number, label in enumerate(classes):
        at = start + number * size
        if form < 6:
            data[at + 15] = label | {4: 32, 5: 64, 6: 128}.get(number, 0)  # synthetic, key point, withheld
        else:
            data[at + 15 : at + 17] = bytes([{4: 1, 5: 2, 6: 4, 7: 8}.get(number, 0), label])
    return bytes(data)


@pytest.mark.parametrize("out", ["las", "laz"])
@pytest.mark.parametrize("form", [0, 3, 6, 7])
def test_labels_and_flags_to_ignore(write, tmp_path, form, out):
    if out == "laz":
        pytest.importorskip("lazrs")
    source, path = write("source.las", flagged(form)), tmp_path / f"a.{out}"
    write_labels(source, path, read(source).labels)  # unpacked, or packed
    everything = read(path, fields=["intensity"], exact=True)
    overlap = [7] if form >= 6 else [2]
    for ignore, gone in (
        ((), {}),
        ((7, 18), {"7": [1], "18": [3]}),
        (("withheld",), {"withheld": [6]}),
        (("synthetic", "key_point"), {"synthetic": [4], "key_point": [5]}),
        (("overlap",), {"overlap": overlap}),
        ((12, "overlap"), {"12": [2], "overlap": overlap} if form >= 6 else {"12": [2]}),
        ((5, 255, -1), {}),
        ((7, 18, "withheld", "overlap", "synthetic", "key_point"),
         {"7": [1], "18": [3], "withheld": [6], "overlap": overlap, "synthetic": [4], "key_point": [5]}),
    ):  # fmt: skip
        cloud = read(path, fields=["intensity"], ignore=ignore, exact=True)
        there = np.delete(np.arange(8), [number for numbers in gone.values() for number in numbers])
        assert cloud.dropped == {name: len(numbers) for name, numbers in gone.items()}
        assert cloud.left_out == 0
        np.testing.assert_array_equal(np.arange(8) if cloud.kept is None else np.flatnonzero(cloud.kept), there)
        np.testing.assert_array_equal(cloud.labels, everything.labels[there])
        np.testing.assert_array_equal(cloud.fields["intensity"], everything.fields["intensity"][there])
        np.testing.assert_array_equal(cloud.exact, everything.exact[there])
        np.testing.assert_allclose(cloud.points + cloud.shift, cloud.exact, atol=cloud.rounding)


def test_points_that_are_left_out_keep_their_label(write, tmp_path):
    path = write("a.las", flagged(6))
    cloud = read(path, ignore=[7, 18, "withheld"])
    write_labels(path, tmp_path / "b.las", np.full(len(cloud.points), 2), kept=cloud.kept)
    assert read(tmp_path / "b.las").labels.tolist() == [2, 7, 2, 18, 2, 2, 1, 2]


def test_ignored_labels_are_those_that_are_read(write):
    """Also 0 where all are 0, which are else no labels, and of another field than the usual one."""
    path = write("a.npz", npz(points=POINTS, labels=LABELS, truth=np.array([7, 7, 1, 1])))
    assert read(path, ignore=[7]).dropped == {"7": 1}
    assert read(path, ignore=[7], label="truth").dropped == {"7": 2}
    assert read(path, ignore=[np.int64(3)]).labels.tolist() == [0, 7]
    path = write("a.npz", npz(points=POINTS, labels=LABELS * 0))
    assert read(path, ignore=[7]).kept is None
    with pytest.raises(ReadError, match=r"a.npz: has no points but those that are not read: 0 \(4\)$"):
        read(path, ignore=[7, 0])
    with pytest.raises(ReadError, match=r"a.las: has no points but those that are not read: 1 \(5\), .*12 \(1\)"):
        read(write("a.las", flagged(0)), ignore=[1, 7, 18, "withheld", 12, "overlap"])
    cloud = read(write("a.xyz", b"1 2 3\n4 5 6\n"), ignore=[0, 7, "withheld", "overlap"])
    assert (cloud.kept, cloud.dropped) == (None, {})


FLAGS = "x,y,z,label,Withheld,scalar_overlap\n0,0,0,7,0,0\n1,0,0,2,1,1\n2,0,0,2,0,nan\n3,0,0,2,0,2\nnan,0,0,7,1,1\n"


def test_flags_in_fields_of_other_formats(write):
    """A point is counted for the first reason only, and not if it is not finite."""
    rows = np.genfromtxt(FLAGS.splitlines(), delimiter=",", names=True)
    for path in (write("a.csv", FLAGS.encode()), write("a.npy", npy(rows)), write("a.npz", npz(points=rows))):
        cloud = read(path, ignore=["withheld", "overlap", 7])
        assert cloud.dropped == {"withheld": 1, "overlap": 1, "7": 1}
        assert (cloud.left_out, cloud.kept.tolist()) == (1, [False, False, True, False, False])
        assert read(path, ignore=["overlap", "withheld"]).dropped == {"overlap": 2}
        assert read(path, ignore=["synthetic", 7, 7]).dropped == {"7": 1}
    path = write("b.npz", npz(points=POINTS, withheld=np.array([0, 1, 0, 0])))
    assert read(path, ignore=["withheld"]).dropped == {"withheld": 1}
    with pytest.raises(ReadError, match="holds 4 points but 3 withheld"):
        read(write("b.npz", npz(points=POINTS, withheld=np.ones(3))), ignore=["withheld"])
    with pytest.raises(ReadError, match="field overlap: expected one number for each point"):
        read(write("b.npz", npz(points=POINTS, overlap=np.ones((4, 2)))), ignore=["overlap"])


@pytest.mark.parametrize("wrong", [["witheld"], ["7"], [7.0], [True], [np.True_], [None], [[7]], [np.ones(2)]])
def test_what_is_no_label_and_no_flag(write, wrong):
    path = write("a.xyz", b"1 2 3\n")
    message = (
        r"ignore: expected a sequence of labels \(integers\) and flags \(withheld, overlap, synthetic, key_point\), got"
    )
    with pytest.raises(ValueError, match=message):
        read(path, ignore=wrong)
    for sequence in ("withheld", 7, None):
        with pytest.raises(TypeError, match=message):
            read(path, ignore=sequence)
    with pytest.raises(TypeError, match="drop_zeros: expected True or False, got int"):
        read(path, drop_zeros=1)


ZEROS = np.array([[0, 0, 0], [5, 6, 7], [0, 0, 1], [-0.0, 0, -0.0], [np.nan, 0, 0], [9, 9, 9]])


def test_zeros_of_sweeps_are_dropped_and_of_others_only_if_asked(write):
    sweep = write("a.bin", np.column_stack([ZEROS, np.arange(6)]).astype(np.float32).tobytes())
    table = write("a.npy", npy(ZEROS))
    for path, drops in ((sweep, {}), (sweep, {"drop_zeros": True}), (table, {"drop_zeros": True}),
                        (sweep, {"columns": ["x", "y", "z", "time"]})):  # fmt: skip
        cloud = read(path, **drops)
        np.testing.assert_array_equal(cloud.points, [[5, 6, 7], [0, 0, 1], [9, 9, 9]])
        assert (cloud.dropped, cloud.left_out) == ({"zeros": 2}, 1)
        assert cloud.kept.tolist() == [False, True, True, False, False, True]
    for path, drops in ((table, {}), (sweep, {"drop_zeros": False})):
        cloud = read(path, **drops)
        assert (cloud.dropped, cloud.left_out, len(cloud.points)) == ({}, 1, 5)
    with pytest.raises(ReadError, match=r"has no points but those that are not read: zeros \(3\)"):
        read(write("b.bin", np.zeros(12, np.float32).tobytes()), columns=["x", "y", "z", "t"])


def test_zeros_are_those_of_the_file_not_of_the_shifted_cloud(write):
    points = np.array([[515368.0, 4918340, 2322], [0, 0, 0], [515369, 4918341, 2323], [515370, 4918342, 2322]])
    cloud = read(write("a.npy", npy(points)), drop_zeros=True)
    assert cloud.dropped == {"zeros": 1}
    np.testing.assert_array_equal(cloud.points + cloud.shift, points[[0, 2, 3]])


# ---- what looks wrong


def test_nothing_is_wrong_with_distinct_points(write):
    points = np.random.default_rng(0).random((5000, 3)) + 0.1
    for place in ([0, 0, 0], [515368.0, 4918340, 2322]):
        assert faults(read(write("a.npy", npy(points + place)))) == []
    assert faults(read(write("a.xyz", b"1 2 3\n"))) == []


def test_zeros_are_said_and_are_no_duplicates(write):
    """Also in a cloud with a shift, where they are not at zero; shares are of the points of the file."""
    rows = np.concatenate([np.zeros((300, 3)), np.random.default_rng(0).random((690, 3)), np.full((10, 3), np.nan)])
    nan = "10 of 1,000 points (1 %) left out, as a coordinate is NaN, infinite or too large for float32"
    there = "300 of 1,000 points (30 %) at (0, 0, 0), as pixels without a return are; drop_zeros leaves them out"
    dropped = "300 of 1,000 points (30 %) at (0, 0, 0) left out, as pixels without a return are there"
    for shift in (0, [515368.0, 4918340, 2322]):
        points = np.where(rows == 0, 0, rows + shift)
        path = write("a.npz", npz(points=points, labels=np.arange(1000) < 100))
        for exact in (False, True):
            assert faults(read(path, exact=exact)) == [nan, there]
            assert faults(read(path, exact=exact, drop_zeros=True)) == [nan, dropped]
        assert faults(read(path, ignore=[1])) == [nan, there.replace("300", "200").replace("30 %", "20 %")]


def test_a_single_point_at_the_origin_is_said_only_far_from_the_others(write):
    points = np.concatenate([np.zeros((1, 3)), np.random.default_rng(0).random((99, 3))])
    assert faults(read(write("a.npy", npy(points)))) == []
    points[1:] += [515368.0, 4918340, 2322]
    (sentence,) = faults(read(write("a.npy", npy(points))))
    assert sentence.startswith("1 of 100 points (1 %) at (0, 0, 0)")


def test_duplicates_above_a_share_and_the_most_crowded_place(write):
    rng = np.random.default_rng(0)
    parts = [rng.random((8000, 3)), rng.random((10, 3)).repeat(100, axis=0), np.full((1001, 3), (0.5, -0.25, 7))]
    points = rng.permutation(np.concatenate(parts)) + np.array([1000, 2000, 0])
    cloud = read(write("a.npy", npy(points)))
    num = len(points) - len(np.unique(points, axis=0))
    assert num == 990 + 1000
    duplicates = "1,990 of 10,001 points (19.9 %) at the position of an earlier point"
    place = "1,001 of 10,001 points (10 %) at one place, (1000.5, 1999.75, 7), all neighbours of each other"
    assert faults(cloud) == [duplicates, place]
    assert faults(cloud, share=num / 10_001) == [duplicates, place]
    assert faults(cloud, share=0.2) == [place]
    assert faults(read(write("a.npy", npy(points[points[:, 2] < 7]))), share=0.2) == []
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="share: expected a number from 0 to 1, got"):
            faults(cloud, share=wrong)


def test_positions_are_compared_as_a_search_would_or_exactly(write):
    points = np.array([[1e4, 0, 0], [1e4 + 1e-5, 0, 0], [1e4 + 1e-5, 0, 1e4]])
    path = write("a.npy", npy(points))
    assert faults(read(path)) == ["1 of 3 points (33.3 %) at the position of an earlier point"]
    assert faults(read(path, exact=True)) == []


@pytest.mark.parametrize("hashes", ["as they are", "one", "few"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distinct_positions_are_exact_whatever_the_hash(monkeypatch, hashes, dtype):
    if hashes != "as they are":
        of = {"one": lambda values: np.zeros(len(values)), "few": lambda values: np.abs(values) // 0.2 * 2.0**50}[
            hashes
        ]
        monkeypatch.setattr(duplicates, "_hashes", lambda columns: of(columns[0]).astype(np.uint64))
    rng = np.random.default_rng(0)
    for points in (rng.integers(-3, 4, (2000, 3)), rng.random((500, 3)), np.zeros((7, 3)), np.ones((1, 3))):
        points = points.astype(dtype) * rng.choice([-1, 1], (len(points), 1))  # minus zero is zero
        first, counts = duplicates.distinct(points)
        expected, number = np.unique(points + 0.0, axis=0, return_counts=True)
        assert all((points[:at] != points[at]).any(axis=1).all() for at in first[:50])  # the first of each
        order = np.lexsort((points[first] + 0.0).T[::-1])
        np.testing.assert_array_equal(points[first][order], expected)
        np.testing.assert_array_equal(counts[order], number)


def test_hashes_of_close_positions_differ():
    """Positions on a lattice, also of millimetres, whose bits differ in few places: no two of them have one hash."""
    lattice = np.stack(np.meshgrid(*[np.arange(50)] * 3), axis=-1).reshape(-1, 3)
    for points in (
        lattice.astype(np.float32),
        lattice.astype(float),
        (lattice / 1000).astype(np.float32),
        lattice / 1000,
    ):
        keys = np.sort(duplicates._hashes([np.ascontiguousarray(values) for values in points.T]))
        assert (keys[1:] != keys[:-1]).all()


def test_faults_of_real_files(shared):
    folder = shared / "data"
    nan, *_ = faults(read(folder / "region_growing_rgb_tutorial.pcd"))
    assert nan.startswith("47,353 of 307,200 points (15.4 %) left out, as a coordinate is NaN")
    (zeros,) = faults(read(folder / "source.ply"))  # all of its duplicates
    assert zeros.startswith("5,107 of 69,792 points (7.32 %) at (0, 0, 0), as pixels without a return")
    assert faults(read(folder / "source.ply", drop_zeros=True)) == [
        "5,107 of 69,792 points (7.32 %) at (0, 0, 0) left out, as pixels without a return are there"
    ]
    assert faults(read(folder / "car_cloud400.csv")) == []

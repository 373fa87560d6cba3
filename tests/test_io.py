"""The readers against files written here byte by byte, whole and damaged, and against real scans."""

import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from files import COLORS, FILES, LABELS, NEEDS, POINTS, TABLE, las, laz, lzf, npy, npz, patched, pcd, ply, refusal, text

from kpcore import scenes
from kpcore.io import formats, write_labels
from kpcore.io.pcd import _lzf

# Names for the columns of the tables that have none.
NAMELESS = dict.fromkeys(("table.npy", "table.npz", "spaces.xyz", "semicolons.csv"), (*"xyzrgb", "label"))
FAR = np.array([515368.0, 4918340.0, 2322.0])


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_values_written(write, name):
    cloud = scenes.read(str(write(name, FILES[name](POINTS))), columns=NAMELESS.get(name))
    assert cloud.points.dtype == np.float32
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.shift, np.zeros(3))
    assert (cloud.left_out, cloud.up, cloud.names) == (0, (0, 0, 1), None)
    if name == "scan.bin":
        assert cloud.colors is None
        assert cloud.labels is None
    else:
        assert (cloud.colors.dtype, cloud.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(cloud.colors, COLORS)
        np.testing.assert_array_equal(cloud.labels, LABELS)


# For each file a field that may be a feature, one that may be labels, and what they hold.
FIELDS = {
    **dict.fromkeys(("binary.ply", "ascii.ply", "commas.csv"), ("Red", COLORS[:, 0], "green", COLORS[:, 1])),
    **dict.fromkeys(("ascii.pcd", "binary.pcd", "compressed.pcd"), ("label", LABELS, "LABEL", LABELS)),
    **dict.fromkeys(
        ("plain.las", "packed.laz", "layered.laz"), ("RED", COLORS[:, 0] * 256.0, "Classification", LABELS)
    ),
    **dict.fromkeys(("table.npy", "table.npz", "spaces.xyz", "semicolons.csv"), ("g", COLORS[:, 1], "b", COLORS[:, 2])),
    **dict.fromkeys(("tabs.txt", "named.xyz"), ("R", COLORS[:, 0], "B", COLORS[:, 2])),
    "fields.npy": ("G", np.float32(COLORS[:, 1] / 255), "Class", LABELS),
    "arrays.npz": ("labels", LABELS, "Labels", LABELS),
    "scan.bin": ("Intensity", np.ones(4), "intensity", np.ones(4)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_every_format(write, name):
    field, values, label, labels = FIELDS[name]
    path, columns = write(name, FILES[name](POINTS)), NAMELESS.get(name)
    cloud = scenes.read(path, fields=[field], label=label, columns=columns)
    wide = name in ("table.npy", "table.npz", "arrays.npz") or name.endswith((".xyz", ".csv", ".txt"))
    assert cloud.fields.keys() == {field.lower()}
    assert cloud.fields[field.lower()].dtype == (np.float64 if wide else np.float32)
    np.testing.assert_array_equal(cloud.fields[field.lower()], values)
    np.testing.assert_array_equal(cloud.labels, labels)
    assert cloud.labels.dtype == np.int32 and cloud.kept is None
    for more in ({"fields": [field, "echo"]}, {"label": "echo"}):
        with pytest.raises(scenes.ReadError, match=f"(?i)has no field echo; there are .*{field}"):
            scenes.read(path, **more, columns=columns)


def test_fields_that_are_not_one_number_for_each_point(write):
    with pytest.raises(scenes.ReadError, match="field curve: expected one number for each point"):
        scenes.read(write("a.pcd", pcd(POINTS, "binary")), fields=["curve"])
    with pytest.raises(scenes.ReadError, match=r"field class holds 3\.5 \(point 0\), which is not a label"):
        scenes.read(write("a.npz", npz(points=POINTS, **{"class": LABELS + 0.5})), label="class")
    with pytest.raises(scenes.ReadError, match="holds 4 points but 3 echo"):
        scenes.read(write("b.npz", npz(points=POINTS, echo=np.ones(3))), fields=["echo"])


def test_labels_that_are_all_zero_are_some_where_they_are_named(write):
    path = write("a.npz", npz(points=POINTS, label=np.zeros(4, np.uint8)))
    assert scenes.read(path).labels is None
    assert scenes.read(path, label="label").labels.tolist() == [0] * 4


def test_coordinates_of_las_files_as_fields(write):
    for scale in (0.125, 0.0625):
        cloud = scenes.read(write("a.las", las(POINTS, scale=scale)), fields=["x", "Z"])
        np.testing.assert_array_equal(np.column_stack([*cloud.fields.values()]), POINTS[:, [0, 2]])


@pytest.mark.parametrize("name", ["double.ply", "table.npy", "arrays.npz", "spaces.xyz", "plain.las"])
def test_large_coordinates_are_shifted_in_float64(write, name):
    points = POINTS + FAR + 0.125  # float32 is 0.5 coarse at 4.9 million
    data = las(points, FAR) if name == "plain.las" else FILES[name](points)
    cloud = scenes.read(write(name, data), columns=NAMELESS.get(name))
    np.testing.assert_array_equal(cloud.shift, np.floor(points.min(axis=0)))
    np.testing.assert_array_equal(cloud.points + cloud.shift, points)


@pytest.mark.parametrize(
    "name", ["binary.ply", "ascii.pcd", "binary.pcd", "compressed.pcd", "table.npy", "tabs.txt", "scan.bin"]
)
def test_points_that_are_not_finite_are_left_out(write, name):
    points = POINTS.copy()
    points[1, 2], points[2, 0] = np.nan, -np.inf
    cloud = scenes.read(write(name, FILES[name](points)), columns=NAMELESS.get(name))
    assert cloud.left_out == 2
    np.testing.assert_array_equal(cloud.points, POINTS[[0, 3]])
    if cloud.colors is not None:
        np.testing.assert_array_equal(cloud.colors, COLORS[[0, 3]])
        np.testing.assert_array_equal(cloud.labels, LABELS[[0, 3]])
    assert "no finite points" in refusal(write(name, FILES[name](np.full((4, 3), np.nan))))


def test_values_beyond_float32_are_left_out(write):
    points = POINTS.copy()
    points[1, 2] = 1e300
    cloud = scenes.read(write("far.npy", npy(points)))
    assert cloud.left_out == 1
    np.testing.assert_array_equal(cloud.points, POINTS[[0, 2, 3]])


def test_an_organised_camera_cloud_has_y_down(write):
    points = np.abs(POINTS) + 1
    assert scenes.read(write("camera.pcd", pcd(points, "binary", 2, 2))).up == (0, -1, 0)
    assert scenes.read(write("lidar.pcd", pcd(POINTS, "binary", 2, 2))).up == (0, 0, 1)
    assert scenes.read(write("row.pcd", pcd(points, "binary"))).up == (0, 0, 1)


def test_normals_are_no_colours_and_blank_colours_none(write):
    for other in (np.eye(4, 3), 50.5 * np.eye(4, 3), -COLORS.astype(float)):  # normals, intensities
        assert scenes.read(write("other.npy", npy(np.column_stack([POINTS, other])))).colors is None
    black = np.column_stack([POINTS, np.zeros((4, 3))])
    assert (
        scenes.read(
            write("black.csv", b"x,y,z,r,g,b\n" + "\n".join(",".join(map(str, r)) for r in black).encode())
        ).colors
        is None
    )
    assert scenes.read(write("half.npz", npz(points=POINTS, labels=LABELS + 0.5))).labels is None


def test_lzf_copies_may_overlap_and_reach_far():
    far = bytes(range(256)) * 20
    assert _lzf(bytes([1]) + b"ab" + bytes([3 << 5, 1]), 7) == b"abababa"
    assert _lzf(bytes([0]) + b"x" + bytes([7 << 5, 20, 0]), 30) == b"x" * 30
    assert _lzf(lzf(far) + bytes([(1 << 5) | (4999 >> 8), 4999 & 255]), len(far) + 3)[-3:] == far[120:123]


@pytest.mark.parametrize(
    "data", [bytes([1 << 5, 0]), bytes([0, 65, 1 << 5, 1]), bytes([5, 65]), bytes([0, 65, 7 << 5])]
)
def test_damaged_lzf_is_refused(data):
    with pytest.raises(scenes.ReadError, match="LZF"):
        _lzf(data, 4)


@pytest.mark.filterwarnings("ignore:.*columns have no names:UserWarning")  # where the comment that names them is cut
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_or_a_valid_prefix(write, name):
    data = FILES[name](POINTS)
    words = name.startswith("ascii") or name.endswith((".xyz", ".csv", ".txt"))
    counted = not name.endswith((".xyz", ".csv", ".txt", ".bin"))  # the file says how many points it has
    for size in range(len(data)):
        path = write(name, data[:size])
        try:
            cloud = scenes.read(path, columns=NAMELESS.get(name))
        except scenes.ReadError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
            continue
        num = len(cloud.points)
        assert num == 4 or (num < 4 and not counted)
        sure = num - 1 if words else num  # the cut may go through the last number
        np.testing.assert_array_equal(cloud.points[:sure], POINTS[:sure])


EMPTY_PLY = b"ply\nformat ascii 1.0\nelement vertex 0\n" + b"property float %c\n" * 3 % tuple(b"xyz") + b"end_header\n"
MANY = 4_000_000_000
LIES = {
    "ascii.ply": lambda: FILES["ascii.ply"](POINTS).replace(b"vertex 4", b"vertex %d" % MANY),
    "binary.ply": lambda: FILES["binary.ply"](POINTS).replace(b"vertex 4", b"vertex %d" % MANY),
    "ascii.pcd": lambda: pcd(POINTS, "ascii").replace(b"WIDTH 4", b"WIDTH %d" % MANY).replace(b"TS 4", b"TS %d" % MANY),
    "binary.pcd": lambda: (
        pcd(POINTS, "binary").replace(b"WIDTH 4", b"WIDTH %d" % MANY).replace(b"TS 4", b"TS %d" % MANY)
    ),
    "compressed.pcd": lambda: (
        pcd(POINTS, "binary_compressed")
        .replace(b"WIDTH 4", b"WIDTH 100000000")
        .replace(b"TS 4", b"TS 100000000")
        .replace(struct.pack("<I", 104), struct.pack("<I", 2_600_000_000))
    ),
    "points.las": lambda: patched(las(POINTS), 107, "<I", MANY),
    "records.las": lambda: patched(las(POINTS), 100, "<I", MANY),
    "points.laz": lambda: patched(laz(POINTS), 107, "<I", MANY),
    "records.laz": lambda: patched(laz(POINTS), 100, "<I", MANY),
    "layers.laz": lambda: patched(
        laz(POINTS, 7), struct.unpack_from("<I", laz(POINTS, 7), 96)[0] + 8 + 36 + 4, "<I", MANY
    ),
    "table.npy": lambda: npy(TABLE).replace(b"(4, 7), }", b"(%d, 7), }" % MANY).replace(b" " * 12 + b"\n", b"   \n"),
    "arrays.npz": lambda: lying_npz(),
}


def lying_npz():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("points.npy", LIES["table.npy"]())
    return out.getvalue()


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_declares_too_much_allocates_nothing(write, name):
    path = write(name, LIES[name]())
    tracemalloc.start()
    try:
        line = refusal(path)
        assert "extension" not in line or "mmap length" in line  # found by looking, not by running into it
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize("suffix", [*formats.READERS, ".copc.laz", ".PLY"])
def test_rubbish_under_any_extension_is_refused(write, suffix):
    rubbish = np.random.default_rng(0).integers(128, 256, 1024).astype(np.uint8).tobytes()
    refusal(write(f"rubbish{suffix}", rubbish))
    assert refusal(write(f"empty{suffix}", b"")) == "is empty"
    refusal(write(f"zeros{suffix}", bytes(1000)))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("ply.las", lambda: ply(POINTS), "is a PLY file"),
        ("las.csv", lambda: las(POINTS), "is a LAS file"),
        ("npy.bin", lambda: npy(TABLE), "is a NPY file"),
        ("npz.npy", lambda: npz(points=POINTS), "is a NPZ file"),
        ("xyz.ply", lambda: text(POINTS, " "), "is not a PLY file"),
        ("what.obj", lambda: b"v 1 2 3", "unknown extension '.obj'"),
        (
            "faces.ply",
            lambda: b"ply\nformat ascii 1.0\nelement face 0\nproperty float x\nend_header\n",
            "expected one element vertex",
        ),
        ("flat.ply", lambda: ply(POINTS).replace(b"float z", b"float w"), "no field z"),
        ("none.ply", lambda: EMPTY_PLY, "holds no points"),
        (
            "none.pcd",
            lambda: pcd(POINTS, "ascii").replace(b"WIDTH 4", b"WIDTH 0").replace(b"TS 4", b"TS 0"),
            "no points",
        ),
        (
            "sizes.pcd",
            lambda: pcd(POINTS, "ascii").replace(b"HEIGHT 1", b"HEIGHT 3"),
            "POINTS is 4, but WIDTH x HEIGHT is 4 x 3",
        ),
        (
            "odd.pcd",
            lambda: pcd(POINTS, "ascii").replace(b"DATA ascii", b"DATA morse"),
            "DATA: expected ascii, binary or binary_compressed, got morse",
        ),
        ("more.pcd", lambda: pcd(POINTS, "ascii") + b"0 0 1 2 3 4 5\n", "declares 4 points"),
        ("cut.pcd", lambda: pcd(POINTS, "binary")[:-1], "truncated: 4 points need 104 bytes, got 103"),
        ("cut.pcd", lambda: pcd(POINTS, "binary_compressed")[:-1], "truncated: expected 108 compressed bytes, got 107"),
        (
            "size.pcd",
            lambda: pcd(POINTS, "binary_compressed").replace(struct.pack("<I", 104), struct.pack("<I", 105)),
            "105",
        ),
        ("cut.laz", lambda: laz(POINTS)[:-10], "truncated: the chunk table"),
        ("none.las", lambda: patched(las(POINTS), 107, "<I", 0), "holds no points"),
        ("text.npy", lambda: npy(np.array([["a", "b", "c"]])), "table of numbers"),
        ("objects.npy", lambda: npy(np.array([[None] * 3], object)), "objects"),
        ("thin.npy", lambda: npy(np.ones((5, 2))), "got (5, 2)"),
        ("none.npy", lambda: npy(np.ones((0, 3))), "holds no points"),
        ("other.npz", lambda: npz(a=np.ones(3)), "no array named points"),
        ("few.npz", lambda: npz(points=POINTS, labels=LABELS[:2]), "4 points but 2 labels"),
        ("words.xyz", lambda: b"# x y z\n1 2 3\n\n4 five 6\n", "line 4: expected numbers, got 'five'"),
        ("lines.csv", lambda: b"x,y,z\n1,2,3\n4,5\n", "line 3: expected 3 numbers, got 2"),
        (
            "lines.pcd",
            lambda: pcd(POINTS, "ascii").replace(b"DATA ascii\n", b"DATA ascii\n1 2 3 4 5 6 7\n1 2 3\n"),
            "line 13: expected 7 numbers, got 3",
        ),
        ("head.csv", lambda: b"lat,lon\n1,2\n", "line 1: expected numbers or the names x, y, z"),
        ("names.csv", lambda: b"x,y,z\n", "holds no points"),
        ("odd.bin", lambda: bytes(17), "17 bytes are not a multiple"),
        ("doubles.bin", lambda: np.random.default_rng(0).bytes(1600), "neither a KITTI nor"),
    ],
)
def test_what_is_wrong_is_said(write, name, data, reason):
    assert reason in refusal(write(name, data()))


def test_the_decompressor_adds_no_line_of_its_own(write):
    data = laz(POINTS)
    compressor = data.index(b"laszip encoded") + 52
    path = write("damaged.laz", patched(data, compressor, "<H", 119))
    code = f"import kpcore.cli; raise SystemExit(kpcore.cli.main(['demo', {str(path)!r}]))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path.parent)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)


def test_what_is_no_file_is_refused(tmp_path):
    assert refusal(tmp_path / "missing.ply") == "No such file or directory"
    assert refusal(tmp_path) == "is a directory"
    os.mkfifo(tmp_path / "pipe.xyz")
    assert refusal(tmp_path / "pipe.xyz") == "is not a regular file"


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.laz").write_bytes(laz(POINTS))
    monkeypatch.setitem(sys.modules, "lazrs", None)
    with pytest.raises(ModuleNotFoundError, match=r'^lazrs is not installed: pip install "kpcore\[io\]"$'):
        scenes.read(tmp_path / "a.laz")


def test_a_broken_package_says_what_is_wrong_with_it(tmp_path, monkeypatch):
    """It is there, but what it needs is not, or is another version."""
    (tmp_path / "a.laz").write_bytes(laz(POINTS))
    for cause in ("import a_library_that_is_not_there", "raise RuntimeError('built for another NumPy')"):
        (tmp_path / "lazrs.py").write_text(cause)
        monkeypatch.delitem(sys.modules, "lazrs", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match=r"^lazrs is installed but cannot be imported: ") as caught:
            scenes.read(tmp_path / "a.laz")
        said = "a_library_that_is_not_there" if "import" in cause else "RuntimeError: built for another NumPy"
        assert said in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["a.ply", "a.pcd", "a.npy", "a.xyz"])
def test_too_little_memory_is_no_damage(write, monkeypatch, name):
    made = {"a.ply": ply, "a.pcd": lambda p: pcd(p, "binary"), "a.npy": npy, "a.xyz": lambda p: text(p, " ")}
    path = write(name, made[name](POINTS))

    def refuse(*args, **kwargs):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(np, "column_stack", refuse)
    with pytest.raises(MemoryError, match="9 GiB"):
        scenes.read(path)


REAL = {  # points, left out, coloured, labels
    "ahn3_cropped_1.laz": (640_510, 0, False, {1, 2, 6, 9, 26}),
    "ign_50x100m.las": (70_840, 0, True, {1, 2, 6}),
    "lone-star.laz": (518_862, 0, False, None),
    "autzen_trim.laz": (110_000, 0, True, {1, 2}),
    "brighton_small.laz": (401_286, 0, True, {0, 2, 3, 6}),
    "region_growing_rgb_tutorial.pcd": (259_847, 47_353, True, None),
    "fragment.pcd": (113_662, 0, True, None),
    "source.ply": (69_792, 0, False, None),
    "car_cloud400.csv": (24_989, 0, False, None),
    "lion_takanawa.copc.laz": (341_989, 0, True, None),
    "isprs_terrain/samp11-utm.pcd": (38_010, 0, False, None),
    "isprs_terrain/samp12-utm.pcd": (52_119, 0, False, None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_scans(shared, name):
    pytest.importorskip(NEEDS.get(name[name.rindex(".") :], "numpy"))
    num, left_out, colored, labels = REAL[name]
    cloud = scenes.read(shared / "data" / name)
    assert (len(cloud.points), cloud.left_out, cloud.colors is not None) == (num, left_out, colored)
    assert (cloud.labels if labels is None else set(np.unique(cloud.labels))) == labels
    assert np.abs(cloud.points).max() < 1500
    if colored:
        assert cloud.colors.std() > 10
        assert 40 < cloud.colors.mean() < 200


def test_real_scans_lose_nothing_to_float32(shared):
    laspy = pytest.importorskip("laspy")
    cloud = scenes.read(shared / "data" / "lone-star.laz")
    stored = laspy.read(shared / "data" / "lone-star.laz").xyz
    assert np.abs(cloud.points + cloud.shift - stored).max() < 2e-6  # the file's own step is 2.5e-4


@pytest.mark.parametrize("name", ["a.las", "a.laz", "a.ply", "a.npz"])
def test_a_full_disk_is_one_line_that_names_the_file(write, tmp_path, name):
    """Also by lazrs, which says "Failed to call write"; nothing is left."""
    resource = pytest.importorskip("resource")
    points, labels = np.random.default_rng(0).random((40_000, 3)), np.random.default_rng(0).integers(0, 30, 40_000)
    path = write("points.npz", npz(points=points, labels=labels))
    if name != "a.npz":
        path = write(name, {"a.las": las, "a.laz": laz, "a.ply": ply}[name](POINTS))
    small = {"a.npz": 20_000}.get(name, 60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
    try:
        with pytest.raises(scenes.ReadError, match=rf"/out{name[1:]}: File too large$"):
            write_labels(path, tmp_path / f"out{name[1:]}", labels if name == "a.npz" else LABELS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [one for one in os.listdir(tmp_path) if one.startswith(("out", "."))]


def test_damaged_points_are_refused_by_what_writes_them_too(write, tmp_path):
    """Which is where points of a LAZ are unpacked first, if nobody has read them."""
    data = laz(POINTS)
    start = struct.unpack_from("<I", data, 96)[0]
    path = write("a.laz", data[: start + 8 + 26] + b"\xff" * 40 + data[start + 8 + 66 :])
    with pytest.raises(scenes.ReadError, match=r"a\.laz: damaged"):
        write_labels(path, tmp_path / "b.laz", LABELS)
    assert os.listdir(tmp_path) == ["a.laz"]


@pytest.mark.parametrize("name", ["a.las", "a.laz", "a.ply", "a.npz"])
@pytest.mark.parametrize("names", [{"into": "X"}, {"into": "y"}, {"label": "z"}])
def test_labels_never_overwrite_coordinates(write, tmp_path, name, names):
    made = {"a.las": las, "a.laz": laz, "a.ply": ply, "a.npz": lambda p: npz(**dict(zip("xyz", p.T, strict=True)))}
    path = write(name, made[name](POINTS))
    with pytest.raises(scenes.ReadError, match=rf"{name}: "):
        write_labels(path, tmp_path / f"b{name[1:]}", LABELS, **names)
    assert os.listdir(tmp_path) == [name]


def test_what_is_written_again_is_looked_at_as_what_is_read(write, tmp_path):
    """Its first bytes, and what kinds of files there are."""
    for name, data, out, reason in (
        ("a.las", ply(POINTS), "b.las", "a.las: is a PLY file"),
        ("a.npz", b"", "b.npz", "a.npz: is empty"),
        ("none.ply", None, "b.ply", "none.ply: No such file or directory"),
        ("a.off", b"OFF", "b.ply", "a.off: expected an extension of files that can be read, .ply .pcd .las .laz .npy"),
        (
            "a.ply",
            ply(POINTS),
            "b.npy",
            "b.npy: expected an extension of files that can be written, .las .laz .ply .npz",
        ),
        ("c.las", las(POINTS), "b", "b: expected an extension of files that can be written, .las .laz .ply .npz"),
        (
            "d.las",
            las(POINTS),
            "b.copc.laz",
            "b.copc.laz: labels are written to a plain LAZ: expected a name that does not end",
        ),
    ):
        path = tmp_path / name if data is None else write(name, data)
        with pytest.raises(scenes.ReadError, match=re.escape(reason)):
            write_labels(path, tmp_path / out, LABELS)
        assert not (tmp_path / out).exists()


def test_arguments_that_are_not_names(write):
    """A string would be taken letter by letter; names that differ only in case would be one field."""
    path = write("a.npz", npz(points=POINTS, Conf=np.ones(4), conf=np.zeros(4)))
    for error, reason, names in (
        (TypeError, "fields: expected a sequence of names, got 'intensity'", {"fields": "intensity"}),
        (TypeError, r"fields: expected a sequence of names, got \[1\]", {"fields": [1]}),
        (TypeError, "columns: expected a sequence of names, got 'x y z'", {"columns": "x y z"}),
        (TypeError, "label: expected the name of a field, got 6", {"label": 6}),
        (TypeError, "label: expected the name of a field, got ''", {"label": ""}),
        (ValueError, "columns: expected names, got none", {"columns": []}),
        (ValueError, "fields: expected names that differ in more than case", {"fields": ["Conf", "conf"]}),
    ):
        with pytest.raises(error, match=reason):
            scenes.read(path, **names)
    assert scenes.read(path, fields=["Conf"]).fields["conf"].tolist() == [1] * 4
    for name in ("label", "into"):
        with pytest.raises(TypeError, match=f"{name}: expected the name of a field, got ''"):
            write_labels(path, path.with_name("b.npz"), LABELS, **{name: ""})


def test_an_error_in_a_reader_is_not_hidden(write, monkeypatch):
    """The message quotes the error; the traceback shows where it was raised."""
    monkeypatch.setattr(np, "fromfile", lambda *args: 1 / 0)
    with pytest.raises(scenes.ReadError, match="division by zero") as caught:
        scenes.read(write("a.bin", FILES["scan.bin"](POINTS)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

"""Sweeps without a header: how many columns they have, and that none is read as another."""

import numpy as np
import pytest
from files import refusal

from kpcore import scenes

RNG = np.random.default_rng(0)
XYZ = RNG.uniform(-50, 50, (40, 3)).astype(np.float32)
INTENSITY = RNG.uniform(0, 1, 40).astype(np.float32)
RING = np.arange(40, dtype=np.float32) % 32


def sweep(*columns):
    return np.column_stack(columns).astype("<f4").tobytes()


@pytest.mark.parametrize("name", ["a.bin", "000000.bin", "LIDAR_TOP.pcd.bin", "A.PCD.BIN"])
@pytest.mark.parametrize("scale", [1, 255])
def test_five_columns_are_never_read_as_four(write, name, scale):
    """40 points of 5 numbers take as many bytes as 50 points of 4."""
    path = write(name, sweep(XYZ, np.floor(INTENSITY * scale), RING))
    cloud = scenes.read(path, fields=["intensity", "ring"])
    np.testing.assert_array_equal(cloud.points, XYZ)
    np.testing.assert_array_equal(cloud.fields["ring"], RING)
    np.testing.assert_array_equal(cloud.fields["intensity"], np.floor(INTENSITY * scale))


@pytest.mark.parametrize("num", [40, 39])
def test_four_columns(write, num):
    cloud = scenes.read(write("a.bin", sweep(XYZ, INTENSITY)[: 16 * num]), fields=["intensity"])
    np.testing.assert_array_equal(cloud.points, XYZ[:num])
    np.testing.assert_array_equal(cloud.fields["intensity"], INTENSITY[:num])


def test_a_sweep_that_may_be_both_needs_columns(write):
    path = write("a.bin", sweep(np.floor(np.abs(XYZ)), np.ones(40), RING))
    line = refusal(path)
    assert line.startswith("may hold 4 or 5 float32") and '"x y z intensity ring".split()' in line
    for columns, num in (("x y z intensity ring", 40), ("x y z intensity", 50)):
        assert len(scenes.read(path, columns=columns.split()).points) == num
    assert len(scenes.read(write("a.pcd.bin", path.read_bytes())).points) == 40


def test_other_columns(write):
    """A radar's: x y z, its cross-section, two velocities, time."""
    names = ("x", "y", "z", "rcs", "v", "v_compensated", "time")
    path = write("a.bin", sweep(XYZ, np.column_stack([XYZ, XYZ[:, 0]])))
    assert "is neither a KITTI nor a nuScenes sweep" in refusal(path)  # 1120 bytes are 70 points of 4, 56 of 5
    cloud = scenes.read(path, columns=names, fields=["rcs"])
    np.testing.assert_array_equal(cloud.points, XYZ)
    np.testing.assert_array_equal(cloud.fields["rcs"], XYZ[:, 0])
    with pytest.raises(
        scenes.ReadError, match="1120 bytes are not a multiple of 24, a record of 6 float32: x y z rcs v v_compensated"
    ):
        scenes.read(path, columns=names[:6])
    with pytest.raises(scenes.ReadError, match="has no field z; there are x y"):
        scenes.read(path, columns=["x", "y"])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.pcd.bin", sweep(XYZ, INTENSITY, RING)[:-16], "784 bytes are not a multiple of a record of 5 float32"),
        ("a.bin", sweep(XYZ, INTENSITY)[:-4], "636 bytes are not a multiple of a record of 4 or 5 float32"),
        ("a.pcd.bin", sweep(XYZ, INTENSITY), "rings that are not integers"),
        ("a.bin", bytes(1000), "is neither a KITTI nor a nuScenes sweep"),
        ("a.bin", sweep(XYZ * 1e5, INTENSITY), "coordinates beyond 100 km"),
    ],
)
def test_a_file_that_is_not_a_sweep(write, name, data, reason):
    assert reason in refusal(write(name, data))


def test_integers_are_not_a_sweep(write):
    """As float32 they are numbers of 1e-41."""
    path = write("a.bin", np.random.default_rng(0).integers(1, 99_999, (64, 4)).astype("<i4").tobytes())
    assert "is neither a KITTI nor a nuScenes sweep" in refusal(path)

"""Kernel points: the published method's known shapes, its energy, and the promises of the docstring."""

import subprocess
import sys

import numpy as np
import pytest

import kpcore as kp
from kpcore import _cpu


def unscaled(num, dimension=3, fixed=1, seed=0):
    return _cpu.kernel_points(num, dimension, fixed, seed, 2)


def gradient(points):
    """Of sum 1 / d + 5 |p|², from the formula, in float64."""
    difference = points[:, None] - points
    cubed = np.linalg.norm(difference, axis=2) ** 3
    np.fill_diagonal(cubed, np.inf)
    return 10 * points - (difference / cubed[:, :, None]).sum(1)


# Mean radii before scaling, as the published method reaches them (and two shells of K = 15: 2 and 12 points).
@pytest.mark.parametrize(
    ("num", "dimension", "fixed", "radii"),
    [
        (15, 3, 1, [0] + 2 * [0.8334] + 12 * [0.8424]),
        (15, 3, 3, [0] + 2 * [0.8334] + 12 * [0.8424]),
        (5, 3, 1, [0] + 4 * [0.5768]),
    ],
)
def test_known_shapes(num, dimension, fixed, radii):
    found = np.sort(np.linalg.norm(unscaled(num, dimension, fixed), axis=1))
    np.testing.assert_allclose(found, radii, atol=6e-5)


def test_known_mean_radius_of_25_points():
    assert np.linalg.norm(unscaled(25)[1:], axis=1).mean() == pytest.approx(1.0101, abs=1e-4)


@pytest.mark.parametrize("dimension", [2, 3, 4, 8])
@pytest.mark.parametrize(("fixed", "held"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("num", [2, 9, 20])
def test_free_points_rest(num, dimension, fixed, held):
    points = unscaled(num, dimension, fixed)
    # The method stops when no gradient norm changes by 1e-5 in a step; what is left of the gradient is small, not zero.
    assert np.linalg.norm(gradient(points)[held:], axis=1).max() < 0.05
    assert np.linalg.norm(points[:, None] - points, axis=2)[~np.eye(num, dtype=bool)].min() > 0.3


def test_verticals_stay_on_the_last_axis():
    points = kp.kernel_points(15, fixed="verticals", dtype=np.float64)
    assert not points[0].any()
    assert not points[1:3, :2].any()
    assert points[1, 2] > 0.5 > -0.5 > points[2, 2]


@pytest.mark.parametrize("fixed", ["center", "verticals", "none"])
@pytest.mark.parametrize("rotate", [None, "vertical", "full"])
def test_radius_is_the_mean_norm(fixed, rotate):
    points = kp.kernel_points(15, 0.066, fixed=fixed, rotate=rotate, dtype=np.float64)
    outer = points if fixed == "none" else points[1:]
    assert np.linalg.norm(outer, axis=1).mean() == pytest.approx(0.066, rel=1e-12)


@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_rotations_turn(dimension):
    plain = kp.kernel_points(9, dimension=dimension, dtype=np.float64)
    full = kp.kernel_points(9, dimension=dimension, rotate="full", dtype=np.float64)
    about_last = kp.kernel_points(9, dimension=dimension, rotate="vertical", dtype=np.float64)
    np.testing.assert_allclose(full @ full.T, plain @ plain.T, atol=1e-12)
    np.testing.assert_allclose(about_last @ about_last.T, plain @ plain.T, atol=1e-12)
    assert not np.allclose(full, plain, atol=0.01)
    assert not np.allclose(about_last, plain, atol=0.01)
    if dimension > 2:
        np.testing.assert_array_equal(about_last[:, -1], plain[:, -1])
        assert not np.allclose(full[:, -1], plain[:, -1], atol=0.01)


def test_seeds_differ_and_repeat():
    a, b = kp.kernel_points(15, seed=1), kp.kernel_points(15, seed=2)
    assert not np.array_equal(a, b)
    a[:] = 0  # the caller's own copy
    assert kp.kernel_points(15, seed=1).any()


def test_same_bits_for_any_instruction_set_and_threads(set_isa):
    expected = unscaled(15)
    for isa in _cpu.isas():
        set_isa(isa)
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(_cpu.kernel_points(15, 3, 1, 0, threads), expected)


def test_same_bits_as_when_it_was_written():
    # Every machine must give these; they change only with the method, which CHANGELOG must then say.
    expected = [
        "-0x1.246aa925ec1e4p-3",
        "-0x1.3d458b7c14122p-1",
        "0x1.1ade31b0c75a4p-1",
        "-0x1.9b9f69e6dfce4p-3",
        "0x1.e93690ddcf47ep-2",
        "-0x1.53ff313d9223ep-1",
    ]
    assert [x.hex() for x in unscaled(15)[[1, 14]].ravel()] == expected


def test_nothing_is_written(tmp_path):
    code = "import kpcore as kp; kp.kernel_points(15)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "float32"])
def test_dtype_and_shape(dtype):
    points = kp.kernel_points(7, dimension=4, dtype=dtype)
    assert points.dtype == dtype
    assert points.shape == (7, 4)
    assert points.flags.writeable


def test_one_point_is_the_centre():
    assert kp.kernel_points(1).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num": 0}, ValueError, "num: expected 1 to 4096, got 0"),
        ({"num": 2.0}, TypeError, "num: expected an integer, got float"),
        ({"num": 2, "fixed": "verticals"}, ValueError, "num: expected 3 to 4096, got 2"),
        (
            {"num": 9, "fixed": "vertical"},
            ValueError,
            "fixed: expected 'none' or 'center' or 'verticals', got 'vertical'",
        ),
        ({"num": 9, "dimension": 1}, ValueError, "dimension: expected 2 to 8, got 1"),
        ({"num": 9, "radius": 0}, ValueError, "radius: expected a finite number above zero, got 0"),
        ({"num": 9, "radius": "1m"}, TypeError, "radius: expected a number, got str"),
        ({"num": 9, "rotate": "all"}, ValueError, "rotate: expected None or 'vertical' or 'full', got 'all'"),
        ({"num": 9, "seed": -1}, ValueError, "seed: expected 0 to 18446744073709551615, got -1"),
        ({"num": 9, "dtype": np.float16}, TypeError, "dtype: expected float32 or float64, got float16"),
        ({"num": 9, "dtype": "real"}, TypeError, "dtype: expected float32 or float64, got 'real'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error) as caught:
        kp.kernel_points(**arguments)
    assert str(caught.value) == message

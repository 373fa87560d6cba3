"""Kernel points: known shapes and the energy of the published method, and what the docstring promises."""

import subprocess
import sys

import numpy as np
import pytest

import kpcore as kp
from kpcore import dispositions
from kpcore.backends import cpu


def unscaled(num, dimension=3, fixed=1, seed=0):
    return dispositions.unscaled("kernel_points", num, dimension, fixed, seed)


def gradient(points):
    """The gradient of the energy, sum of 1 / d over pairs + 5 |p|² over points, in float64."""
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
    norms = np.sort(np.linalg.norm(unscaled(num, dimension, fixed), axis=1))
    np.testing.assert_allclose(norms, radii, atol=6e-5)


def test_known_mean_radius_of_25_points():
    assert np.linalg.norm(unscaled(25)[1:], axis=1).mean() == pytest.approx(1.0101, abs=1e-4)


@pytest.mark.parametrize("dimension", [2, 3, 4, 8])
@pytest.mark.parametrize(("fixed", "held"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("num", [2, 9, 20])
def test_free_points_rest(num, dimension, fixed, held):
    points = unscaled(num, dimension, fixed)
    # The method stops when no gradient norm changes by 1e-5 in a step, so the remaining gradient is small but not zero.
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
    a[:] = 0  # each call returns a new array
    assert kp.kernel_points(15, seed=1).any()


def test_same_bits_for_any_instruction_set_and_threads(set_isa, set_threads):
    expected = unscaled(15)
    for isa in cpu.isas():
        set_isa(isa)
        for threads in (1, 2, 3):
            set_threads(threads)
            np.testing.assert_array_equal(unscaled(15), expected)


def test_same_bits_as_when_it_was_written():
    # The bits on every machine. They change only if the method does, and CHANGELOG must then say so.
    expected = [
        "-0x1.246aa925ec1e4p-3",
        "-0x1.3d458b7c14122p-1",
        "0x1.1ade31b0c75a4p-1",
        "-0x1.9b9f69e6dfce4p-3",
        "0x1.e93690ddcf47ep-2",
        "-0x1.53ff313d9223ep-1",
    ]
    assert [x.hex() for x in unscaled(15)[[1, 14]].ravel()] == expected


# ---- Lloyd's relaxation


def ball_sample(num, dimension, seed=0):
    """Points that are uniform in the unit ball."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(num, dimension))
    return directions / np.linalg.norm(directions, axis=1)[:, None] * rng.random((num, 1)) ** (1 / dimension)


@pytest.mark.parametrize(("dimension", "radius"), [(2, 4 / (3 * np.pi)), (3, 3 / 8)])
def test_two_lloyd_points_are_the_centroids_of_half_balls(dimension, radius):
    points = kp.kernel_points(2, dimension=dimension, fixed="none", method="lloyd", dtype=np.float64)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), radius, rtol=0.02)
    assert points[0] @ points[1] == pytest.approx(-(radius**2), rel=0.02)


@pytest.mark.parametrize(
    ("num", "dimension", "fixed"),
    [(9, 2, "center"), (31, 3, "center"), (60, 3, "none"), (60, 3, "verticals"), (9, 8, "none")],
)
def test_lloyd_points_are_the_centroids_of_their_cells(num, dimension, fixed):
    points = kp.kernel_points(num, dimension=dimension, fixed=fixed, method="lloyd", dtype=np.float64)
    sample = ball_sample(200_000, dimension)  # not the sample of the relaxation
    owner = ((sample**2).sum(1)[:, None] - 2 * sample @ points.T + (points**2).sum(1)).argmin(1)
    counts = np.bincount(owner, minlength=num)
    centroids = np.stack([np.bincount(owner, x, num) for x in sample.T], 1) / counts[:, None]
    held = {"none": 0, "center": 1, "verticals": 3}[fixed]
    assert np.linalg.norm(centroids - points, axis=1)[held:].max() < 0.1 * num ** (-1 / dimension)
    # Cells are of similar size; those of K random points without relaxation differ by a factor of ten.
    assert counts[held:].max() < 2 * counts[held:].min()


@pytest.mark.parametrize("fixed", ["center", "verticals", "none"])
def test_lloyd_points_fill_the_ball(fixed):
    points = kp.kernel_points(300, 2.5, fixed=fixed, method="lloyd", dtype=np.float64)
    norms = np.linalg.norm(points, axis=1)
    assert 0.85 < norms.max() / 2.5 < 1
    assert norms.mean() / 2.5 == pytest.approx(0.74, abs=0.03)  # 3/4 in the whole ball, less for centroids
    if fixed != "none":
        assert not points[0].any()
    if fixed == "verticals":
        assert not points[1:3, :2].any()
        assert points[1, 2] > 0 > points[2, 2]


@pytest.mark.slow
def test_4096_lloyd_points():
    points = kp.kernel_points(4096, method="lloyd")
    assert points.shape == (4096, 3)
    assert np.linalg.norm(points, axis=1).max() < 1


# ---- shells


@pytest.mark.parametrize(
    ("sizes", "radii"),
    [([1], [0]), ([1, 14], [0, 2 / 3]), ([1, 14, 28], [0, 0.4, 0.8]), ([1, 6, 9, 12], [0, 2 / 7, 4 / 7, 6 / 7])],
)
@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_shells_have_their_points_at_their_radii(sizes, radii, dimension):
    points = kp.kernel_points(sizes, 0.5, dimension=dimension, method="shells", dtype=np.float64)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 0.5 * np.repeat(radii, sizes), rtol=1e-12)


# Least energies of n charges on a sphere (Thomson's problem). The centre exerts no force along the sphere.
@pytest.mark.parametrize(
    ("num", "energy"), [(2, 0.5), (4, 3.674234614), (6, 9.985281374), (12, 49.165253058), (14, 69.306363297)]
)
def test_one_shell_solves_the_problem_of_thomson(num, energy):
    points = kp.kernel_points([1, num], 1.5, method="shells", dtype=np.float64)[1:]  # a sphere of radius 1
    distances = np.linalg.norm(points[:, None] - points, axis=2)[np.triu_indices(num, 1)]
    assert (1 / distances).sum() == pytest.approx(energy, abs=1e-6)


def test_a_shell_in_the_plane_is_a_regular_polygon():
    points = kp.kernel_points([1, 7], dimension=2, method="shells", dtype=np.float64)[1:]
    angles = np.sort(np.arctan2(points[:, 1], points[:, 0]))
    np.testing.assert_allclose(np.diff(angles), 2 * np.pi / 7, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1, 14, 28], (1, 5, 5), np.array([1, 3, 2, 4])])
def test_points_on_shells_rest(sizes):
    points = kp.kernel_points(sizes, method="shells", dtype=np.float64)
    force = gradient(points) - 10 * points
    outward = points / np.maximum(np.linalg.norm(points, axis=1), 1e-9)[:, None]
    sideways = force - (force * outward).sum(1)[:, None] * outward
    assert np.linalg.norm(sideways, axis=1)[1:].max() < 0.05


def test_verticals_on_shells():
    points = kp.kernel_points([1, 14, 28], fixed="verticals", method="shells", dtype=np.float64)
    np.testing.assert_allclose(points[:3], [[0, 0, 0], [0, 0, 0.4], [0, 0, -0.4]], atol=1e-12)


# ---- both


LARGE = [("lloyd", 40), ("shells", (1, 6, 9))]


@pytest.mark.parametrize(("method", "num"), LARGE)
def test_methods_have_seeds_and_rotations(method, num):
    plain = kp.kernel_points(num, method=method, dtype=np.float64)
    again, other, turned = (kp.kernel_points(num, method=method, dtype=np.float64, **o) for o in (
        {}, {"seed": 1}, {"rotate": "full"}))  # fmt: skip
    assert plain.tobytes() == again.tobytes()
    assert not np.allclose(plain, other, atol=0.01)
    assert not np.allclose(plain, turned, atol=0.01)
    np.testing.assert_allclose(turned @ turned.T, plain @ plain.T, atol=1e-12)


def test_methods_have_the_same_bits_for_any_instruction_set_and_threads(set_isa, set_threads):
    radii = np.repeat([0, 0.4, 0.8], [1, 6, 9])
    results = set()
    for isa in cpu.isas():
        set_isa(isa)
        for threads in (1, 2, 3):
            set_threads(threads)
            lloyd = dispositions.unscaled("lloyd", 50, 3, 1, 5)
            shells = dispositions.unscaled("kernel_points", 16, 3, 1, 5, radii)
            results.add(lloyd.tobytes() + shells.tobytes())
    assert len(results) == 1


def test_methods_have_the_same_bits_as_when_they_were_written():
    lloyd = dispositions.unscaled("lloyd", 50, 3, 1, 0)
    shells = dispositions.unscaled("kernel_points", 16, 3, 1, 0, np.repeat([0, 0.4, 0.8], [1, 6, 9]))
    expected = [
        [
            "-0x1.f84db7ad92c31p-5",
            "0x1.7e94fd62601b8p-2",
            "0x1.5fde5b5a5b428p-3",
            "0x1.43a3559a60183p-4",
            "-0x1.764de044ead97p-3",
            "-0x1.86c2b921478e5p-2",
        ],
        [
            "0x1.459a62b1a8727p-3",
            "-0x1.ced387a9c772dp-3",
            "-0x1.282b227245152p-2",
            "0x1.34ca8a2049347p-1",
            "-0x1.d4e88b003a2f6p-2",
            "0x1.083522625df1ap-2",
        ],
    ]
    assert [[x.hex() for x in points[[1, -1]].ravel()] for points in (lloyd, shells)] == expected


# ---- the check of the spacing


def spoiled(expected, starts, calls, unscaled=dispositions.unscaled):
    """A replacement of `unscaled` whose first `starts` results have two points too close; `calls` gets the seeds."""

    def call(kernel, num, dimension, fixed, seed, radii):
        assert kernel == expected
        points = unscaled(kernel, num, dimension, fixed, seed, radii)
        calls.append(seed)
        if len(calls) <= starts:
            points[-1] = points[-2] * (1 + len(calls) * 1e-3)
        return points

    return call


@pytest.mark.parametrize(("method", "num", "name"), [("potential", 9, "kernel_points"), ("lloyd", 33, "lloyd"),
                                                     ("shells", (1, 7), "kernel_points")])  # fmt: skip
def test_points_too_close_are_sought_again_from_the_next_seed(method, num, name, monkeypatch):
    calls, step = [], 0x9E3779B97F4A7C15
    expected = kp.kernel_points(num, method=method, seed=step)
    dispositions._unit_points.cache_clear()
    monkeypatch.setattr(dispositions, "unscaled", spoiled(name, 1, calls))
    np.testing.assert_array_equal(kp.kernel_points(num, method=method), expected)
    assert calls == [0, step]
    dispositions._unit_points.cache_clear()


def test_the_widest_of_eight_starts_that_fail(monkeypatch):
    calls = []
    monkeypatch.setattr(dispositions, "unscaled", spoiled("lloyd", 8, calls))
    dispositions._unit_points.cache_clear()
    points = kp.kernel_points(33, method="lloyd", dtype=np.float64)
    dispositions._unit_points.cache_clear()
    assert len(set(calls)) == len(calls) == 8
    spacing = np.linalg.norm(points[-1] - points[-2]) / np.linalg.norm(points[-2])
    assert spacing == pytest.approx(8e-3, rel=1e-6) or spacing == pytest.approx(7e-3, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "num", "dimension"),
    [("potential", 3, 2), ("potential", 20, 3), ("lloyd", 3, 8), ("lloyd", 100, 3), ("shells", (1, 2, 1), 2),
     ("shells", (1, 30), 3)],
)  # fmt: skip
def test_the_first_start_will_do(method, num, dimension, monkeypatch):
    name, calls = "lloyd" if method == "lloyd" else "kernel_points", []
    monkeypatch.setattr(dispositions, "unscaled", spoiled(name, 0, calls))
    dispositions._unit_points.cache_clear()
    kp.kernel_points(num, dimension=dimension, method=method)
    assert calls == [0]


# ---- other promises


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
        ({"num": 9, "method": "loyd"}, ValueError, "method: expected 'potential' or 'lloyd' or 'shells', got 'loyd'"),
        ({"num": [1, 14]}, TypeError, "num: expected an integer, got list"),
        (
            {"num": 101},
            ValueError,
            "num: expected at most 100 with method='potential', which would take minutes for more, got 101; "
            "take method='lloyd'",
        ),
        ({"num": 4097, "method": "lloyd"}, ValueError, "num: expected 1 to 4096, got 4097"),
        (
            {"num": 15, "method": "shells"},
            TypeError,
            "num: expected a sequence of integers, the number of points of each shell, got int",
        ),
        ({"num": [1, 14.0], "method": "shells"}, TypeError, "num[1]: expected an integer, got float"),
        ({"num": [1, 0], "method": "shells"}, ValueError, "num[1]: expected at least 1, got 0"),
        (
            {"num": [2, 14], "method": "shells"},
            ValueError,
            "num: expected 1 point on the first shell, which is the centre, got [2, 14]",
        ),
        (
            {"num": [], "method": "shells"},
            ValueError,
            "num: expected 1 point on the first shell, which is the centre, got []",
        ),
        ({"num": [1, 4096], "method": "shells"}, ValueError, "num: expected at most 4096 points in all, got 4097"),
        (
            {"num": [1, 4], "method": "shells", "fixed": "none"},
            ValueError,
            "fixed: expected 'center' or 'verticals' with method='shells', got 'none'",
        ),
        (
            {"num": [1, 1, 4], "method": "shells", "fixed": "verticals"},
            ValueError,
            "num: expected at least 2 points on the first shell after the centre with fixed='verticals', got [1, 1, 4]",
        ),
        ({"num": 9, "dtype": "real"}, TypeError, "dtype: expected float32 or float64, got 'real'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error) as caught:
        kp.kernel_points(**arguments)
    assert str(caught.value) == message

"""normals, covariance_features and outlier_mask against NumPy's eigh, brute force, Open3D and jakteristics."""

import re
from pathlib import Path

import clouds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_same_bits

import kpcore as kp
from kpcore import features

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SHAPES = ("linearity", "planarity", "scattering", "verticality", "curvature")
UTM = np.array([500_000.0, 5_300_000.0, 400.0])


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "surface_features.npz") as data:
        return dict(data)


def lists(points, k=None, radius=None, row_splits=None):
    """The rows of the neighbourhoods, as kpcore's searches, which have tests of their own, return them."""
    batch = {} if row_splits is None else {"points_row_splits": row_splits}
    if radius is None:
        found = kp.knn_search(points, None, 20 if k is None else k, **batch)
    else:
        found = kp.radius_search(points, None, radius, max_neighbors=k, **batch)
    return np.split(found.index, found.row_splits[1:-1])


def eigen(points, rows):
    """(eigenvalues, falling; the eigenvectors as rows) of the covariances, in float64."""
    out = []
    for row in rows:
        near = points[row].astype(np.float64)
        near = near - near[0]  # exactly, before the mean is rounded
        near = near - near.mean(axis=0)
        out.append(np.linalg.eigh(near.T @ near / len(row)))
    return np.array([values[::-1] for values, _ in out]), np.array([vectors.T[::-1] for _, vectors in out])


def check(points, viewpoint=None, gap=1e-3, **options):
    """Compare with eigh, where the smallest eigenvalue is simple; the sign by the rule."""
    found = kp.covariance_features(points, viewpoint=viewpoint, **options)
    assert_same_bits(found.normals, kp.normals(points, viewpoint=viewpoint, **options))
    if not len(points):
        assert all(len(value) == 0 for value in found)
        return 1.0
    values, vectors = eigen(points, lists(points, **options))
    exact = 1e-6 if points.dtype == np.float32 else 1e-12
    largest = np.maximum(values[:, :1], np.finfo(points.dtype).tiny)
    np.testing.assert_allclose(found.eigenvalues / largest, values / largest, atol=exact, rtol=0)
    unit = np.finfo(points.dtype).eps / 2
    apart = -np.diff(np.sqrt(values.clip(0)))[:, 1]  # further than the rounding of coordinates moves them
    simple = values[:, 1] - values[:, 2] > gap * largest[:, 0]
    rounding = 2 * unit * (abs(points.astype(np.float64)).max(axis=1) + np.sqrt(largest[:, 0]))
    simple &= apart > 1.1 * rounding
    least = (rounding / np.sqrt(values[:, 1].clip(1e-300))).clip(1e-6, 0.1)
    normal = vectors[:, 2]
    towards = [] if viewpoint is None else [np.asarray(viewpoint, np.float64) - points]
    towards += [np.tile(np.eye(3)[axis], (len(points), 1)) for axis in (2, 1, 0)]
    sign = np.zeros(len(points))
    for direction in towards:
        along = (normal * direction).sum(1) / np.maximum(np.linalg.norm(direction, axis=1), 1e-300)
        sign = np.where((sign == 0) & (abs(along) > least), np.sign(along), sign)
    np.testing.assert_allclose(found.normals[simple], (normal * sign[:, None])[simple], atol=exact / gap, rtol=0)
    l1, l2, l3 = found.eigenvalues.astype(np.float64).T
    whole = np.where(l1 > 0, l1, 1)
    expected = ((l1 - l2) / whole, (l2 - l3) / whole, l3 / whole, 1 - abs(found.normals[:, 2]), l3 / (whole + l2 + l3))
    for name, value in zip(SHAPES, expected, strict=True):
        one = getattr(found, name)
        assert one.dtype == points.dtype and one.flags.c_contiguous
        np.testing.assert_allclose(one, value, atol=exact, rtol=0, err_msg=name)
    return simple.mean()


# ---- against eigh


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 11}, {"radius": 0.2}, {"radius": 0.2, "k": 9}], ids=str)
def test_the_eigenvectors_of_numpy(options, dtype):
    points = clouds.uniform(700, 3, dtype)[0]
    for viewpoint in (None, (0.5, 0.5, 0.5), [1e9, -2e9, 0.0]):
        assert check(points, viewpoint, **options) > 0.5


def test_coordinates_of_a_map():
    """In float64 5,300 km from the origin a surface 1 mm rough over 10 cm is what it is at the origin."""
    points = np.random.default_rng(0).uniform(0, 1, (800, 3)) * [1, 1, 1e-3]
    points = np.round(points * 2**30) / 2**30  # which the sum holds exactly
    near, far = (kp.covariance_features(p) for p in (points, points + np.round(UTM)))
    for one, other in zip(near, far, strict=True):
        assert_same_bits(one, other)
    check(points + UTM, gap=1e-6)


@both_dtypes
@pytest.mark.parametrize("name", clouds.NASTY)
def test_nasty_clouds(name, dtype):
    points, radius = clouds.nasty(name, 3, dtype)
    for options in ({"radius": radius}, {"k": 7}, {"k": 7, "radius": radius}):
        try:
            found = kp.covariance_features(points, **options)
        except (ValueError, MemoryError) as error:
            assert name == "astronomic" and dtype == np.float32 and "distances that float32 can hold" in str(error)
            continue
        if dtype == np.float64 or name not in ("astronomic", "sparse_beyond_64_bits"):
            check(points, gap=0.01, **options)
        for value in found:
            assert np.isfinite(value).all()
        unit = 4 * np.finfo(dtype).eps
        np.testing.assert_allclose((found.normals.astype(np.float64) ** 2).sum(1), 1, atol=unit)
        np.testing.assert_allclose(found.linearity + found.planarity + found.scattering,
                                   found.eigenvalues[:, 0] > 0, atol=unit)  # fmt: skip
        assert (np.diff(found.eigenvalues) <= 0).all() and (found.eigenvalues >= 0).all()
        for value, most in zip(found[2:], (1, 1, 1, 1, 1 / 3), strict=True):
            assert (value >= 0).all() and (value <= most + unit).all()
        assert (found.normals[:, 2] > -0.101).all()


@settings(max_examples=settings().max_examples // 4)
@given(st.data())
def test_a_batch_is_its_items(data):
    points, radius = data.draw(clouds.clouds(dim=3, max_num=60))
    row_splits = data.draw(clouds.row_splits_of(len(points)))
    options = data.draw(st.sampled_from([{"k": 5}, {"radius": radius}, {"k": 5, "radius": radius}]))

    def outcome(call):
        try:
            return call()
        except ValueError:
            return None

    whole = outcome(lambda: kp.covariance_features(points, row_splits=row_splits, **options))
    each = [outcome(lambda p=p: kp.covariance_features(p, **options)) for p in np.split(points, row_splits[1:-1])]
    if whole is None or None in each:
        assert whole is None and None in each
        return
    for field, *parts in zip(whole, *each, strict=True):
        assert_same_bits(field, np.concatenate(parts))


@pytest.mark.parametrize("seed", range(5))
def test_turned_by_quarters(seed):
    """Points turned about z, or mirrored: the same features, and normals turned with them."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(60, 3)) * rng.uniform(0.01, 1, 3)
    before = kp.covariance_features(points, k=8)
    for matrix in ([[0, -1, 0], [1, 0, 0], [0, 0, 1]], [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]):
        after = kp.covariance_features(points @ np.transpose(matrix).astype(np.float64), k=8)
        assert after.normals == pytest.approx(before.normals @ np.transpose(matrix), abs=1e-6)
        for name in SHAPES:
            assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9)


# ---- where there is no plane

Z, Y, X = np.eye(3)[::-1]
LINE = np.arange(-4.0, 5)[:, None]
S = 0.5**0.5
CROSS = np.concatenate([np.eye(3), -np.eye(3), np.zeros((1, 3))])
NO_PLANE = {
    "one point": (np.full((1, 3), 7.0), Z, (0, 0)),
    "equal points": (np.full((9, 3), 0.1), Z, (0, 0)),
    "two points": (np.array([[0.0, 0, 0], [1, 0, 0]]), Z, (1, 0)),
    "line along x": (LINE * X, Z, (1, 0)),
    "line along y": (LINE * Y, Z, (1, 0)),
    "vertical line": (LINE * Z + 3, Y, (1, 0)),
    "steep line": (LINE * (X + Z), (Z - X) * S, (1, 0)),
    "line of thirds": (LINE / 3 * (X + Z) + UTM, (Z - X) * S, (1, 0)),
    "nearly vertical line": (LINE * (Z + 1e-7 * X), Y, (1, 0)),
    "no direction": (CROSS, Z, (0, 0)),
    "no direction, tenths": (CROSS / 10 + 5, Z, (0, 0)),
    "spindle": (CROSS * [3, 1, 1], Z, (8 / 9, 0)),
    "upright spindle": (CROSS * [1, 1, 3] / 10, Y, (8 / 9, 0)),
    "wall": (np.stack(np.meshgrid([2.0], LINE, LINE), -1).reshape(-1, 3), X, (0, 1)),
    "slanting wall": (np.stack(np.meshgrid(LINE, LINE), -1).reshape(-1, 2) @ np.array([X / 3 + Y / 3, Z]), (Y - X) * S,
                      (None, None)),
    "floor": (np.stack(np.meshgrid(LINE, LINE, [2.0]), -1).reshape(-1, 3), Z, (0, 1)),
}  # fmt: skip


@both_dtypes
@pytest.mark.parametrize("name", NO_PLANE)
def test_where_there_is_no_plane(name, dtype):
    points, normal, (linearity, planarity) = NO_PLANE[name]
    if dtype == np.float32 and abs(points).max() > 1e5:
        points = points - UTM
    found = kp.covariance_features(points.astype(dtype), radius=20.0)
    np.testing.assert_allclose(found.normals, np.tile(normal, (len(points), 1)), atol=2e-6)
    for value, expected in ((found.linearity, linearity), (found.planarity, planarity)):
        if expected is not None:
            np.testing.assert_allclose(value, expected, atol=1e-6)


def test_no_plane_seen_from_a_viewpoint():
    viewpoint = np.array([3.0, 4.0, 0.0])
    assert kp.normals(np.zeros((1, 3)), viewpoint=viewpoint)[0] == pytest.approx([0.6, 0.8, 0])
    assert kp.normals(np.zeros((2, 3)), viewpoint=(0, 0, 0)).tolist() == [[0, 0, 1]] * 2
    assert kp.normals(LINE * X, radius=9.0, viewpoint=(0, 5, 0))[4] == pytest.approx(Y)
    assert kp.normals(LINE * X, radius=9.0, viewpoint=(20, 0, 0))[4] == pytest.approx(Z)  # along the line: +z
    assert kp.normals(LINE * Z, radius=9.0, viewpoint=(0, 0, 9))[4] == pytest.approx(Y)


def test_a_viewpoint_in_the_plane_leaves_it_to_z():
    slope = np.stack(np.meshgrid(LINE, LINE), -1).reshape(-1, 2) @ np.array([X - Z, Y])
    assert kp.normals(slope, k=9, viewpoint=tuple(slope[0] + [7, 3, -7])) == pytest.approx(
        np.tile((X + Z) * S, (81, 1)), abs=1e-9
    )


def test_a_viewpoint_for_each_point():
    points = np.random.default_rng(0).normal(size=(50, 3))
    viewpoint = np.random.default_rng(1).normal(size=(50, 3)) * 10
    found = kp.normals(points, viewpoint=viewpoint)
    assert ((viewpoint - points) * found).sum(1).min() > 0
    alone = np.array([kp.normals(points, viewpoint=tuple(v))[i] for i, v in enumerate(viewpoint)])
    assert_same_bits(found, alone)


# ---- against other libraries; golden/README.md


@pytest.mark.parametrize(
    ("name", "options"), [("knn", {"k": 12}), ("radius", {"radius": 0.9}), ("hybrid", {"radius": 0.9, "k": 9})]
)
def test_the_normals_of_open3d(golden, name, options):
    points, expected = golden["points"], golden[f"open3d_{name}"]
    for dtype, offset, exact in ((np.float32, 0, 1e-6), (np.float64, 0, 1e-9), (np.float64, np.round(UTM), 1e-9)):
        found = kp.normals((points + offset).astype(dtype), **options)
        assert abs((found * expected).sum(1)) == pytest.approx(np.ones(500), abs=exact)


def test_the_features_of_jakteristics(golden):
    found = kp.covariance_features(golden["points"], radius=0.9)
    names = {"scattering": "sphericity", "curvature": "surface_variation"}
    for name in SHAPES:
        expected = golden[f"jakteristics_{names.get(name, name)}"]
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-6, err_msg=name)
    counts = kp.radius_search(golden["points"], None, 0.9, count_only=True)
    for i in range(3):  # which are those of a sample
        expected = golden[f"jakteristics_eigenvalue{i + 1}"] * (counts - 1) / counts
        np.testing.assert_allclose(found.eigenvalues[:, i], expected, atol=2e-6)


@pytest.mark.parametrize("least", [3, 8])
def test_the_radius_outliers_of_open3d(golden, least):
    """Its rule is that of PCL: more than nb_points within the radius, the point itself among them."""
    found = kp.outlier_mask(golden["points"], radius=0.5, min_points=least)
    assert found.tolist() == golden[f"open3d_radius_outlier_{least}"].tolist()
    assert 0 < found.sum() < 400


# ---- outliers


def statistical(points, mean_k, std_mul):
    """The rule of PCL, with all distances."""
    points = points.astype(np.float64)
    distances = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, 1 : mean_k + 1]
    means = distances.mean(axis=1) if distances.size else np.zeros(len(points))
    deviation = means.std(ddof=1) if len(points) > 1 else 0
    return means - (means.mean() if len(means) else 0) - std_mul * deviation


@both_dtypes
@pytest.mark.parametrize("name", ["uniform", *clouds.NASTY])
def test_statistical_outliers(name, dtype):
    points = clouds.uniform(300, 3, dtype)[0] if name == "uniform" else clouds.nasty(name, 3, dtype)[0]
    for mean_k, std_mul in ((1, 0.0), (8, 1.0), (50, 2.0), (1000, 0.5)):
        try:
            found = kp.outlier_mask(points, mean_k=mean_k, std_mul=std_mul)
        except ValueError as error:
            assert name == "astronomic" and dtype == np.float32 and "distances that float32 can hold" in str(error)
            continue
        excess = statistical(points, mean_k, std_mul)
        decided = abs(excess) > 1e-6 * (np.ptp(points) if len(points) else 0)
        assert found.dtype == bool
        assert found[decided].tolist() == (excess > 0)[decided].tolist()


@both_dtypes
@pytest.mark.parametrize("name", ["uniform", *clouds.NASTY])
def test_points_with_few_neighbours(name, dtype):
    points, radius = clouds.uniform(300, 3, dtype) if name == "uniform" else clouds.nasty(name, 3, dtype)
    counts = kp.radius_search(points, None, radius, ignore_query_point="index").counts
    for least in (1, 4, 20):
        assert_same_bits(kp.outlier_mask(points, radius=radius, min_points=least), counts < least)


def test_the_radius_of_outliers_is_inclusive():
    points = np.array([[0.0], [1.0], [2.0], [3.5]])
    assert kp.outlier_mask(points, radius=1.0, min_points=1).tolist() == [False, False, False, True]
    assert kp.outlier_mask(points, radius=1.0, min_points=2).tolist() == [True, False, True, True]


def test_roundings_make_no_outliers():
    """All points of a ring are as far from their neighbours."""
    angles = np.arange(1000) * (2 * np.pi / 1000)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) + 1.0
    assert not kp.outlier_mask(ring, mean_k=2, std_mul=0.0).any()


@settings(max_examples=settings().max_examples // 4)
@given(st.data())
def test_outliers_of_a_batch_are_those_of_its_items(data):
    points, radius = data.draw(clouds.clouds(max_num=60))
    row_splits = data.draw(clouds.row_splits_of(len(points)))
    rule = data.draw(st.sampled_from([{"mean_k": 6, "std_mul": 1.0}, {"radius": radius, "min_points": 3}]))
    try:
        whole = kp.outlier_mask(points, row_splits=row_splits, **rule)
    except ValueError as error:
        assert "distances that float32 can hold" in str(error)
        return
    each = [kp.outlier_mask(item, **rule) for item in np.split(points, row_splits[1:-1])]
    assert_same_bits(whole, np.concatenate(each))


# ---- any number of threads, any block of points


def results(points, radius):
    row_splits = np.array([0, len(points) // 3, len(points) // 3, len(points)])
    viewpoint = points[::-1] * 3
    for options in ({}, {"radius": radius}, {"k": 7, "radius": radius}):
        yield from kp.covariance_features(points, **options)
        yield kp.normals(points, row_splits=row_splits, viewpoint=viewpoint, **options)
    for batch in ({}, {"row_splits": row_splits}):
        yield kp.outlier_mask(points, mean_k=9, std_mul=1.0, **batch)


def test_any_number_of_threads(isa, set_threads):
    points, radius = clouds.uniform(5000)
    set_threads(1)
    expected = list(results(points, radius))
    for threads in (2, 3):
        set_threads(threads)
        for one, other in zip(results(points, radius), expected, strict=True):
            assert_same_bits(one, other)


def test_instruction_sets_agree(set_isa):
    points, radius = clouds.uniform(2000)
    found = []
    for name in kp.backends.cpu.isas():
        set_isa(name)
        found.append(kp.covariance_features(points, radius=radius))
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert_same_bits(one, expected)


def test_neighbours_are_searched_in_blocks(monkeypatch):
    """Memory is bounded: a search takes as many points as have a number of neighbours; results are the same bits."""
    points, radius = clouds.uniform(3000)
    expected = list(results(points, radius))
    sizes, in_blocks = [], features._in_blocks

    def watched(*arguments):
        for rows, neighbors in in_blocks(*arguments):
            sizes.append((rows, neighbors.num_pairs))
            yield rows, neighbors

    monkeypatch.setattr(features, "_PAIRS", 8000)
    monkeypatch.setattr(features, "_LEAST_ROWS", 16)
    monkeypatch.setattr(features, "_in_blocks", watched)
    for one, other in zip(results(points, radius), expected, strict=True):
        assert_same_bits(one, other)
    assert len(sizes) > 40 and max(pairs for _, pairs in sizes) < 3 * 8000


# ---- frameworks


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_frameworks(framework):
    module = pytest.importorskip(f"kpcore.{framework}")
    points = clouds.uniform(100)[0]
    array = pytest.importorskip("torch").from_numpy(points) if framework == "torch" else points
    found = module.covariance_features(array, k=9)
    for name, value in kp.covariance_features(points, k=9)._asdict().items():
        assert_same_bits(np.asarray(getattr(found, name)), value)
    assert_same_bits(np.asarray(module.normals(array, viewpoint=(0, 0, 9))), kp.normals(points, viewpoint=(0, 0, 9)))
    expected = kp.outlier_mask(points, mean_k=5, std_mul=1.0)
    assert_same_bits(np.asarray(module.outlier_mask(array, mean_k=5, std_mul=1.0)), expected)


# ---- errors

NAN = np.array([[0, 0, 0], [1, np.nan, 0], [2, 0, 0], [3, 0, 0]])
SURFACE_ERRORS = {
    "2-D": ({"points": np.zeros((5, 2))}, ValueError, "points: expected (N, D) with D = 3, got (5, 2)"),
    "integers": ({"points": np.zeros((5, 3), int)}, TypeError, "points: expected float32 or float64, got int64"),
    "k of 2": ({"k": 2}, ValueError, "k: expected at least 3, got 2"),
    "k of 2.5": ({"k": 2.5}, TypeError, "k: expected an integer, got float"),
    "radius": ({"radius": 0}, ValueError, "radius: expected a finite number above zero, got 0"),
    "radii": ({"radius": np.ones(5)}, TypeError, "radius: expected a number, got ndarray"),
    "row_splits": ({"row_splits": np.array([0, 4])}, ValueError, "row_splits: expected values from 0 to 5 to match"),
    "not finite": ({"points": NAN}, ValueError, "points: expected finite coordinates, got [1.0, nan, 0.0] in row 1"),
    "not finite within": ({"points": NAN, "radius": 1.0}, ValueError, "got [1.0, nan, 0.0] in row 1"),
    "not finite, both": ({"points": NAN, "radius": 1.0, "k": 3}, ValueError, "got [1.0, nan, 0.0] in row 1"),
    "scalar": ({"viewpoint": 1.0}, TypeError, "viewpoint: expected (3,) or (N, 3), got float"),
    "two numbers": ({"viewpoint": (1, 2)}, ValueError, "viewpoint: expected a number or 3 of them, got shape (2,)"),
    "NaN": ({"viewpoint": (1, 2, np.nan)}, ValueError, "viewpoint[2]: expected a finite number"),
    "NaN in an array": (
        {"viewpoint": np.array([1, np.inf, 2])},
        ValueError,
        "viewpoint: expected finite coordinates, got [1.0, inf, 2.0] in row 0",
    ),
    "other dtype": (
        {"viewpoint": np.zeros(3, np.float32)},
        TypeError,
        "viewpoint: expected float64 to match points, got float32",
    ),
    "four": ({"viewpoint": np.zeros((4, 3))}, ValueError, "viewpoint: expected (5, 3) to match points, got (4, 3)"),
    "planar": ({"viewpoint": np.zeros(2)}, ValueError, "viewpoint: expected (3,) to match points, got (2,)"),
}
RULE = {"mean_k": 3, "std_mul": 1.0}
OUTLIER_ERRORS = {
    "none": ({}, ValueError, "expected mean_k and std_mul, or radius and min_points, got none of them"),
    "both": (RULE | {"radius": 1.0}, ValueError, "or radius and min_points, got mean_k, std_mul, radius"),
    "mean_k": ({"mean_k": 3}, ValueError, "std_mul: expected a number, because mean_k is one, got None"),
    "std_mul": ({"std_mul": 3}, ValueError, "mean_k: expected a number, because std_mul is one, got None"),
    "radius": ({"radius": 3}, ValueError, "min_points: expected a number, because radius is one, got None"),
    "min_points": ({"min_points": 3}, ValueError, "radius: expected a number, because min_points is one, got None"),
    "mean_k of 0": (RULE | {"mean_k": 0}, ValueError, "mean_k: expected at least 1, got 0"),
    "std_mul below 0": (RULE | {"std_mul": -1}, ValueError, "std_mul: expected a number of at least zero, got -1"),
    "min_points of 0": ({"radius": 1.0, "min_points": 0}, ValueError, "min_points: expected at least 1, got 0"),
    "radius of 0": ({"radius": 0, "min_points": 1}, ValueError, "radius: expected a finite number above zero, got 0"),
    "not finite": (RULE | {"points": NAN}, ValueError, "points: expected finite coordinates, got [1.0, nan, 0.0]"),
    "row_splits": (
        {"radius": 1.0, "min_points": 1, "row_splits": np.array([0, 4])},
        ValueError,
        "row_splits: expected values from 0 to 5 to match points",
    ),
    "row_splits of the other": (
        RULE | {"row_splits": np.array([0, 4])},
        ValueError,
        "row_splits: expected values from 0 to 5 to match points",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), SURFACE_ERRORS.values(), ids=SURFACE_ERRORS)
def test_errors_of_surfaces_name_the_argument(changes, error, message):
    for function in (kp.normals, kp.covariance_features):
        with pytest.raises(error, match=re.escape(message)):
            function(**{"points": np.zeros((5, 3))} | changes)


@pytest.mark.parametrize(("arguments", "error", "message"), OUTLIER_ERRORS.values(), ids=OUTLIER_ERRORS)
def test_errors_of_outliers_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kp.outlier_mask(**{"points": np.zeros((5, 3))} | arguments)


def test_inputs_stay_as_they_are():
    points = clouds.uniform(200, 3, np.float64)[0]
    points.flags.writeable = False
    expected = kp.normals(points[::2].copy())
    assert_same_bits(kp.normals(points[::2]), expected)
    assert_same_bits(kp.normals(np.asfortranarray(points[::2])), expected)
    kp.outlier_mask(points, mean_k=3, std_mul=1.0)


# ---- real scans


def test_the_street_of_a_scan(shared):
    """Normals of a street as two libraries compute them: with float32 near the origin and float64 on the map."""
    cloud = kp.io.read(shared / "data" / "ahn3_cropped_1.laz")
    points = np.ascontiguousarray(cloud.points[:20_000])
    near, far = kp.covariance_features(points), kp.covariance_features(points + np.round(np.asarray(cloud.shift)))
    simple = near.eigenvalues[:, 1] - near.eigenvalues[:, 2] > 0.01 * near.eigenvalues[:, 0]
    assert np.median((near.normals * far.normals).sum(1)[simple]) > 1 - 1e-6
    assert (near.verticality < 0.1).mean() > 0.3 and (near.planarity > 0.5).mean() > 0.3

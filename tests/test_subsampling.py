"""grid_subsample. Voxels, their order, labels, centres, nearest points and maxima are compared exactly."""

import itertools
import re
from pathlib import Path

import clouds
import examples
import numpy as np
import pytest
import reference
from gradcheck import check_vjp
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, assert_same_bits

import kpcore as kp

both_dims = pytest.mark.parametrize("dim", [2, 3])
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
POSITIONS, FEATURES = ["barycenter", "center", "nearest"], ["mean", "max", "nearest"]
LABEL_TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]

# float32 results are rounded once, at the end; float64 ones are sums of up to some thousand equal terms.
MEAN_TOLERANCE = {np.dtype(np.float32): 6e-8, np.dtype(np.float64): 1e-13}


def check_subsample(points, voxel_size, **options):
    expected = reference.grid_subsample(points, voxel_size, **options)
    got = kp.grid_subsample(points, voxel_size, **options)
    for name, dtype in ("inverse", np.int32), ("counts", np.int32), ("row_splits", np.int64):
        assert_same_bits(getattr(got, name), expected[name].astype(dtype))
    assert got.points.dtype == points.dtype
    if options.get("position", "barycenter") == "barycenter":
        assert_close(got.points, expected["points"], MEAN_TOLERANCE[points.dtype])
    else:
        assert_same_bits(got.points, expected["points"])
    if options.get("features") is None:
        assert got.features is None
    elif options.get("feature", "mean") != "mean":
        assert_same_bits(got.features, expected["features"])
    else:
        assert got.features.dtype == options["features"].dtype
        assert_close(
            got.features, expected["features"], MEAN_TOLERANCE[got.features.dtype], magnitude=options["features"]
        )
    if options.get("labels") is None:
        assert got.labels is None
    else:
        assert_same_bits(got.labels, expected["labels"])


def attributes(num, seed=0, channels=3, feature_type=np.float32, label_type=np.int32, num_labels=4, columns=()):
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(num, channels)).astype(feature_type),
        "labels": rng.integers(0, num_labels, (num, *columns)).astype(label_type),
    }


# ---- example calls


def subsample_arguments(num, geometry, features):
    features = np.random.default_rng(1).normal(size=(num, 3)).astype(features)
    return {"points": examples.cloud(num, geometry)[0], "voxel_size": 0.4, "features": features}


def nearest_from_a_corner(call):
    return {"origin": np.full((1, 3), 0.1, call["points"].dtype), "feature": "nearest"}


CALLS = {
    "grid_subsample": (
        subsample_arguments,
        [{}, {"feature": "max"}, {"feature": "nearest"}, {"origin": "published"}, nearest_from_a_corner],
    ),
}


# ---- against the reference


def check_gradient(points, voxel_size, features, feature, **options):
    expected = reference.grid_subsample(points, voxel_size, features, feature=feature, **options)
    grad = np.random.default_rng(1).normal(size=expected["features"].shape).astype(features.dtype)
    got = gradient(points, voxel_size, features, grad, feature=feature, **options)
    assert_same_bits(got, reference.grid_subsample_vjp(expected, grad, feature))


def gradient(points, voxel_size, features, grad, **options):
    def fn(f):
        return kp.grid_subsample(points, voxel_size, features=f, **options).features

    return kp.autodiff.vjp(fn, features)[1](grad)[0]


# Voxels smaller and larger than the spacing of the points. Left out: grids of more than 2**21 voxels, an error.
VOXELS = {name: (radius / 2, radius * 3) for name, (_, radius) in clouds.NASTY.items() if name != "nothing_within"}
VOXELS |= {
    "cluster_and_outliers": (1e-2, 0.3),
    "sparse_beyond_64_bits": (1e3, 1e7),
    "all_equal": (0.1, 1e-3),
    "lattice_ties": (0.1, 0.3),
}


@pytest.mark.parametrize(("position", "feature"), list(zip(POSITIONS, FEATURES, strict=True)))
@pytest.mark.parametrize("which", [0, 1])
@both_dtypes
@both_dims
@pytest.mark.parametrize("name", VOXELS)
def test_nasty_clouds(name, dim, dtype, which, position, feature):
    points, _ = clouds.nasty(name, dim, dtype)
    check_subsample(points, VOXELS[name][which], position=position, feature=feature, **attributes(len(points)))


@pytest.mark.parametrize("num", clouds.SIZES)
def test_sizes(num):
    check_subsample(clouds.uniform(num)[0], 0.2, **attributes(num))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 17, 65])
@both_dtypes
@pytest.mark.parametrize("feature", FEATURES)
def test_channels(channels, dtype, feature, isa):
    features = attributes(257, channels=channels, feature_type=dtype)["features"]
    check_subsample(clouds.uniform(257)[0], 0.2, features=features, feature=feature)
    check_gradient(clouds.uniform(257)[0], 0.2, features, feature)


@given(st.data())
def test_any_cloud_any_options(data):
    name, seed = data.draw(st.sampled_from(list(VOXELS))), data.draw(clouds.seeds)
    points, _ = clouds.nasty(
        name, data.draw(clouds.dims), data.draw(clouds.float_types), data.draw(st.integers(1, 150)), seed
    )
    optional = attributes(
        len(points),
        seed,
        channels=data.draw(st.integers(1, 9)),
        feature_type=data.draw(clouds.float_types),
        label_type=data.draw(st.sampled_from(LABEL_TYPES)),
        num_labels=data.draw(st.integers(1, 5)),
        columns=data.draw(st.sampled_from([(), (1,), (3,)])),
    )
    optional |= {"row_splits": data.draw(clouds.row_splits_of(len(points)))}
    options = {name: value for name, value in optional.items() if data.draw(st.booleans())}
    row_splits = options.get("row_splits", np.array([0, len(points)]))
    if "labels" in options:
        options["ignore_label"] = data.draw(st.none() | st.integers(0, 5))
    voxel_size = data.draw(st.sampled_from(VOXELS[name]))
    per_axis = st.lists(st.sampled_from([1, 1.5, 2.7]), min_size=points.shape[1], max_size=points.shape[1])
    sizes = [voxel_size * factor for factor in data.draw(per_axis)]
    of_items = np.random.default_rng(seed).integers(-3, 4, (len(row_splits) - 1, points.shape[1])) * voxel_size * 0.3
    origins = [0, 0.3 * voxel_size, [-7 * size for size in sizes], "published", of_items.astype(points.dtype)]
    options |= {
        "origin": data.draw(st.sampled_from(origins)),
        "position": data.draw(st.sampled_from(POSITIONS)),
        "feature": data.draw(st.sampled_from(FEATURES)),
    }
    check_subsample(points, data.draw(st.sampled_from([voxel_size, sizes])), **options)


# ---- one rule each


@pytest.mark.parametrize("label_type", LABEL_TYPES)
@pytest.mark.parametrize(
    ("labels", "ignore_label", "expected"),
    [
        ([5, 3, 3], None, 3),
        ([5, 3, 3, 5], None, 3),  # a tie: the smallest
        ([2, 1, 0], None, 0),
        ([7, 7, 7, 4], 7, 4),
        ([7, 7, 7, 4, 4, 1, 1], 7, 1),
        ([7, 7], 7, 7),  # no votes
        ([0, 0, 1], 0, 1),
        ([127, 0, 127], None, 127),
    ],
)
def test_majority_label(labels, ignore_label, expected, label_type):
    points = np.zeros((len(labels), 3), np.float32)
    got = kp.grid_subsample(points, 1.0, labels=np.array(labels, label_type), ignore_label=ignore_label)
    assert got.labels.dtype == label_type
    assert got.labels.tolist() == [expected]


@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_negative_and_extreme_labels(label_type):
    low, high = np.iinfo(label_type).min, np.iinfo(label_type).max
    for labels, ignored, expected in (
        ([high, low, low], None, low),
        ([high, low], None, low),
        ([high, high - 1], None, high - 1),
        ([high, high, low, low + 1, low + 1], high, low + 1),
        ([high, high, low, low, low + 1], low, high),
        ([high, high], high, high),
        ([low], low, low),
    ):
        got = kp.grid_subsample(
            np.zeros((len(labels), 2)), 1.0, labels=np.array(labels, label_type), ignore_label=ignored
        )
        assert got.labels.dtype == label_type and got.labels.tolist() == [expected]
    points, wrong = np.zeros((1, 2)), np.zeros(1, label_type)
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"ignore_label: expected .*{high}"):
            kp.grid_subsample(points, 1.0, labels=wrong, ignore_label=value)


@pytest.mark.parametrize("spread", [5, 2**16, 2**63])  # counted; too far apart to count in large types: sorted
@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_columns_of_labels(label_type, spread):
    low, high = np.iinfo(label_type).min, np.iinfo(label_type).max
    values = np.array([low, low + 1, min(low + spread, high), high], label_type)
    labels = values[np.random.default_rng(0).integers(0, (3, 2, 4), (500, 3))]
    points, splits = clouds.uniform(500)[0], np.array([0, 100, 100, 500])
    for ignored in (None, low, int(values[2])):
        check_subsample(points, 0.3, labels=labels, row_splits=splits, ignore_label=ignored)
        check_subsample(points, 0.3, labels=labels[:, 2].copy(), row_splits=splits, ignore_label=ignored)


@pytest.mark.parametrize("columns", [0, 1, 2])
def test_how_many_columns(columns):
    got = kp.grid_subsample(np.zeros((3, 2)), 1.0, labels=np.ones((3, columns), np.int16))
    assert got.labels.shape == (1, columns) and got.labels.dtype == np.int16
    got = kp.grid_subsample(np.zeros((0, 2)), 1.0, labels=np.ones((0, columns), np.uint64))
    assert got.labels.shape == (0, columns) and got.labels.dtype == np.uint64
    pyramid = kp.build_pyramid(np.zeros((3, 2)), voxel_size=1.0, num_levels=2, labels=np.ones((3, columns), np.int16))
    assert [level.labels.tolist() for level in pyramid] == [[[1] * columns]] * 2


def test_labels_beyond_32_bits():
    labels = np.array([1, 2**32 + 1, 2**32 + 1, -(2**40)])
    assert kp.grid_subsample(np.zeros((4, 3)), 1.0, labels=labels).labels.tolist() == [2**32 + 1]


@pytest.mark.parametrize("case", ["uniform", "room", "lattice", "repeated"])
def test_two_columns_of_labels_of_released_code(case):
    prefix = f"kpconv/subsample/{case}_features_classes2/"
    with np.load(Path(__file__).parent / "golden" / "clients_core.npz") as file:
        g = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    got = kp.grid_subsample(g["in/points"], float(g["in/sampleDl"]), labels=g["in/classes"], origin="published")
    distance = np.abs(got.points[:, None] - g["out/points"][None]).max(-1)  # that code returns another order
    same = distance.argmin(1)
    assert sorted(same) == [*range(len(g["out/points"]))] and distance.min(1).max() < 2e-7
    tie = g["out/class_tie"][same] == 1  # of which it takes any
    assert tie.any() and (~tie).any()
    assert_same_bits(np.where(tie, 0, got.labels), np.where(tie, 0, g["out/classes"][same]))


def test_many_labels_in_one_voxel():
    check_subsample(
        np.zeros((5000, 3)), 1.0, labels=np.random.default_rng(0).integers(-(2**62), 2**62, 5000).repeat(2)[:5000]
    )


@both_dims
def test_voxels_come_in_morton_order(dim):
    cells = np.stack(np.meshgrid(*[np.arange(8)] * dim), -1).reshape(-1, dim)
    got = kp.grid_subsample(cells + 0.5, 1.0).points - 0.5
    assert got.tolist() == sorted(cells.tolist(), key=reference.morton_key)


@pytest.mark.parametrize("voxel_size", [0.1, 0.2, 0.3, 0.7])
@both_dtypes
def test_voxel_is_the_floor_of_the_true_quotient(dtype, voxel_size):
    # Multiples of the voxel size land on either side of the boundary; a product with the reciprocal moves some of them.
    points = np.zeros((2001, 2), dtype)
    points[:, 0] = (np.arange(-1000, 1001) * voxel_size).astype(dtype)
    check_subsample(points, voxel_size)


def test_negative_zero_and_negative_coordinates():
    check_subsample(np.array([[-0.0, 0.0], [0.0, -0.0], [-1e-30, 0.5], [-1.0, 0.999]]), 1.0)


@pytest.mark.parametrize("offset", [5e6, -5e6])
def test_exact_far_from_the_origin(offset):
    near = np.random.default_rng(0).integers(0, 2**20, (1000, 3)) / 2.0**20  # exact after the shift too
    far = kp.grid_subsample(near + offset, 0.25)
    got = kp.grid_subsample(near, 0.25)
    assert_same_bits(far.inverse, got.inverse)
    np.testing.assert_allclose(far.points - offset, got.points, rtol=0, atol=2e-9)  # two steps of float64 at 5e6


def test_2_21_voxels_along_an_axis_are_the_limit():
    last = 2.0**21 - 1
    got = kp.grid_subsample(np.array([[last, 0, 0], [0, last, 0], [0, 0, last], [0.0, 0, 0]]) + 0.5, 1.0)
    assert got.inverse.tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="voxel_size"):
        kp.grid_subsample(np.array([[0.5, 0], [2.0**21 + 0.5, 0]]), 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [1e12, 1e25, 1e38])
def test_far_too_many_voxels_are_an_error(spread, dtype):
    with pytest.raises(ValueError, match="voxel_size"):
        kp.grid_subsample(np.array([[0, 0, 0], [spread, 0, 0]], dtype), 0.5)


@pytest.mark.parametrize("points", [[[1e38, 0], [1e38, 0]], [[1e38, 0], [-1e38, 0]]])
def test_a_voxel_index_that_overflows_is_an_error(points):
    with pytest.raises(ValueError, match="voxel_size"):
        kp.grid_subsample(np.float32(points), 1e-10)


def test_a_feature_that_is_not_finite_stays_in_its_voxel():
    features = np.float32([[1, 2], [np.nan, 4], [5, 6]])
    got = kp.grid_subsample(np.array([[0.5, 0], [2.5, 0], [0.5, 0]]), 1.0, features=features)
    np.testing.assert_array_equal(got.features, [[3, 4], [np.nan, 4]])


def test_the_limit_counts_from_each_items_lowest_voxel():
    points = np.array([[0.5, 0.5], [1e12 + 0.5, 0.5]])
    assert kp.grid_subsample(points, 1.0, row_splits=np.array([0, 1, 2])).counts.tolist() == [1, 1]


def test_empty_input():
    got = kp.grid_subsample(np.empty((0, 3), np.float32), 0.1, features=np.empty((0, 5)), labels=np.empty(0, np.uint8))
    assert (got.points.shape, got.features.shape, got.labels.shape) == ((0, 3), (0, 5), (0,))
    assert got.row_splits.tolist() == [0, 0]


def test_features_without_channels():
    assert kp.grid_subsample(np.zeros((4, 3)), 1.0, features=np.empty((4, 0))).features.shape == (1, 0)


def test_a_batch_is_its_items_one_after_the_other():
    row_splits, (points, _) = kp.row_splits([40, 0, 1, 129, 0]), clouds.uniform(170)
    arrays = attributes(170)
    got = kp.grid_subsample(points, 0.2, row_splits=row_splits, **arrays)
    items = [slice(a, b) for a, b in itertools.pairwise(row_splits)]
    parts = [kp.grid_subsample(points[i], 0.2, **{name: array[i] for name, array in arrays.items()}) for i in items]
    for name in ("points", "features", "labels", "counts"):
        assert_same_bits(getattr(got, name), np.concatenate([getattr(part, name) for part in parts]))
    assert kp.lengths(got.row_splits).tolist() == [len(part.points) for part in parts]
    shifted = [part.inverse + np.int32(start) for part, start in zip(parts, got.row_splits[:-1], strict=True)]
    assert_same_bits(got.inverse, np.concatenate(shifted))


@pytest.mark.parametrize("name", VOXELS)
def test_permuting_the_points_permutes_the_inverse(name):
    points, _ = clouds.nasty(name)
    order = np.random.default_rng(1).permutation(len(points))
    expected, got = (kp.grid_subsample(p, VOXELS[name][0]) for p in (points, points[order]))
    assert_same_bits(got.inverse, expected.inverse[order])
    assert_close(got.points, expected.points, MEAN_TOLERANCE[points.dtype])


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_scaling_by_a_power_of_two_scales_the_barycentres(factor):
    points = clouds.uniform(500)[0]
    expected, got = (
        kp.grid_subsample(points, 0.2),
        kp.grid_subsample(points * np.float32(factor), np.float32(0.2) * factor),
    )
    assert_same_bits(got.points, expected.points * np.float32(factor))
    assert_same_bits(got.inverse, expected.inverse)


# ---- where the grid is, and what a voxel becomes


@both_dims
@both_dtypes
def test_a_number_is_the_same_for_each_axis(dim, dtype):
    points = clouds.uniform(300, dim, dtype)[0]
    expected = kp.grid_subsample(points, 0.2, origin=0.05)
    for sequence in (tuple, list, np.array, np.float32, lambda v: np.array(v, dtype)):
        got = kp.grid_subsample(points, sequence([0.2] * dim), origin=sequence([0.05] * dim))
        for a, b in zip(got, expected, strict=True):
            assert (a is None and b is None) or dtype == np.float64 or a.tobytes() == b.tobytes()


def test_each_axis_has_its_voxel_size_and_origin():
    points = np.array([[0.5, 0.5], [1.5, 0.5], [0.5, 1.5]])
    assert kp.grid_subsample(points, (2, 1)).inverse.tolist() == [0, 0, 1]
    assert kp.grid_subsample(points, [1, 2]).inverse.tolist() == [0, 1, 0]
    assert kp.grid_subsample(points, 2, origin=(1, 0)).inverse.tolist() == [0, 1, 0]
    assert kp.grid_subsample(points, 2, origin=np.array([0, 1])).inverse.tolist() == [0, 0, 1]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("origin", [0.1, -0.3, (0.1, 5e3, -5e3)])
@both_dtypes
def test_origin(dtype, origin, position):
    # Points on the corners of voxels, where the order of the operations decides.
    points = (np.arange(-300, 300).reshape(-1, 3) * 0.1).astype(dtype)
    check_subsample(points, (0.1, 0.2, 0.3), origin=origin, position=position)


LATTICES = {"float32": np.float32([0.3, -0.3, 12.7]), "float64": np.array([0.3, -0.3, 512345.7])}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("multiple", [1, 2, 4, 0.5])
@pytest.mark.parametrize("dtype", LATTICES)
def test_the_published_origin_on_lattices(dtype, multiple, position, isa):
    # Most points lie on faces of voxels, where one rounding more or less moves them into the next.
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 40, (3, 300, 3)).astype(dtype) * np.dtype(dtype).type(0.0125)
    points = (LATTICES[dtype][:, None, None] + steps).astype(dtype).reshape(-1, 3)
    splits = np.array([0, 0, 300, 600, 600, 900, 900])
    options = attributes(900) | {"row_splits": splits, "position": position, "feature": "nearest"}
    check_subsample(points, multiple * 0.0125, origin="published", **options)
    assert not np.array_equal(
        kp.grid_subsample(points, 0.0125 * multiple, origin="published", **options).inverse,
        kp.grid_subsample(points, 0.0125 * multiple, **options).inverse,
    )


def test_the_lowest_point_may_lie_below_the_published_origin():
    # In float32 0.45 times 20 is 9, and 9 times 0.05 is one step above 0.45.
    lowest, voxel = np.float32(0.45), np.float32(0.05)
    assert np.floor(lowest * (1 / voxel)) * voxel > lowest
    points = np.stack([lowest + np.float32([0, 0.01, 0.06]), np.zeros(3, np.float32)], 1)
    check_subsample(points, 0.05, origin="published")
    assert kp.grid_subsample(points, 0.05, origin="published").inverse.tolist() == [0, 1, 2]


@both_dims
@both_dtypes
@pytest.mark.parametrize("position", POSITIONS)
def test_each_item_has_its_origin(position, dtype, dim):
    # Items with no points, with one, and with more than a block of the kernel.
    row_splits = kp.row_splits([0, 130, 1, 1, 0, 200, 68, 0])
    points = clouds.uniform(400, dim, dtype)[0]
    origins = np.random.default_rng(0).normal(size=(8, dim)).astype(dtype)
    origins[[0, 4, 7]] = np.nan  # items without points
    options = attributes(400) | {"row_splits": row_splits, "position": position, "feature": "nearest"}
    check_subsample(points, 0.2, origin=origins, **options)
    got = kp.grid_subsample(points, 0.2, origin=origins, position=position, row_splits=row_splits)
    published = kp.grid_subsample(points, 0.2, origin="published", position=position, row_splits=row_splits)
    for item, (first, last) in enumerate(itertools.pairwise(row_splits)):
        if first == last:
            continue
        for whole, origin in ((got, origins[item].tolist()), (published, "published")):
            alone = kp.grid_subsample(points[first:last], 0.2, origin=origin, position=position)
            assert_same_bits(whole.points[slice(*whole.row_splits[item : item + 2])], alone.points)
    assert np.isfinite(published.points).all()


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("Published", "origin: expected 'published', got 'Published'"),
        (np.zeros((2, 3)), "origin: expected (3, 3) to match points and row_splits, got (2, 3)"),
        (np.zeros((3, 2)), "origin: expected (3, 3) to match points and row_splits, got (3, 2)"),
        (
            np.zeros((3, 3), np.float32),
            "origin: expected float64 to match points, got float32; convert it with origin.astype(points.dtype)",
        ),
        ([[0.0] * 3] * 3, "origin[0]: expected a number, got list"),
        (
            np.array([[0, 0, 0], [np.inf, 0, 0], [0, np.nan, 0]]),
            "origin: expected finite numbers, got [0.0, nan, 0.0] in row 2",
        ),
        (
            np.array([[0, 0, 0], [0, 0, 0], [0, 0, 1e308]]),
            "voxel_size: expected a size for which point / voxel_size does not overflow float64, got 0.1 for "
            "coordinates of up to 1e+308 from the origin",
        ),
    ],
)
def test_wrong_origins(origin, message):
    points = np.zeros((4, 3))
    with pytest.raises((ValueError, TypeError)) as caught:
        kp.grid_subsample(points, 0.1, row_splits=np.array([0, 2, 2, 4]), origin=origin)
    assert str(caught.value) == message


def test_errors_with_the_published_origin():
    with pytest.raises(ValueError, match=re.escape("points: expected finite coordinates, got [nan, 0.0] in row 1")):
        kp.grid_subsample(np.array([[0, 0], [np.nan, 0]]), 0.1, origin="published")
    for far in (2.0**21, 1e300):
        with pytest.raises(ValueError, match=re.escape("voxel_size: expected at most 2**21 voxels along an axis")):
            kp.grid_subsample(np.array([[0, 0], [far, 0]]), 1.0, origin="published")
    with pytest.raises(ValueError, match=r"voxel_size: expected a size .* does not overflow float32"):
        kp.grid_subsample(np.float32([[1e38, 0]]), 1e-10, origin="published")


@pytest.fixture(scope="module")
def published_grids():
    with np.load(Path(__file__).parent / "golden" / "published_grids.npz") as file:
        return dict(file)


CLOUDS = ["uniform", "room", "repeated", "lattice"]
PUBLISHED_GRIDS = [f"{code}/{name}" for code in ("kpconv", "geotransformer", "kpconvx") for name in CLOUDS]


@pytest.mark.parametrize(
    ("name", "origin"),
    [(name, "published") for name in (*PUBLISHED_GRIDS, "kpconv/lattice_half", "kpconv/lattice_wide")]
    # Easy-KPConv has origin 0 but multiplies by 1 / voxel_size, so lattices, where rounding decides, are left out.
    + [(f"easykpconv/{name}", 0) for name in CLOUDS[:3]],
)
def test_the_voxels_of_published_code(published_grids, name, origin):
    g = {key.removeprefix(f"{name}/"): value for key, value in published_grids.items() if key.startswith(f"{name}/")}
    arrays = {key: g[key] for key in ("features", "labels") if key in g}
    got = kp.grid_subsample(
        g["points"], float(g["voxel_size"]), row_splits=kp.row_splits(g["lengths"]), origin=origin, **arrays
    )
    assert kp.lengths(got.row_splits).tolist() == g["out_lengths"].tolist()
    for begin, end in itertools.pairwise(got.row_splits):
        # The published code returns another order, with sums in float32.
        distance = np.abs(got.points[begin:end, None] - g["out_points"][None, begin:end]).max(-1)
        published_index = distance.argmin(1) + begin
        assert sorted(published_index) == [*range(begin, end)] and distance.min(1).max() < 2e-7
        if arrays:
            assert_close(got.features[begin:end], g["out_features"][published_index], 2e-7)
            one = g["tie"][published_index, 0] == 0
            assert got.labels[begin:end][one].tolist() == g["out_labels"][published_index, 0][one].tolist()
        if "voxel_of_point" in g:
            item = slice(*kp.row_splits(g["lengths"])[np.searchsorted(got.row_splits, begin, "right") - 1 :][:2])
            assert published_index[got.inverse[item] - begin].tolist() == g["voxel_of_point"][item].tolist()


def test_the_centre_is_that_of_the_grid():
    points = np.array([[0.1, 0.1, -0.1], [7.9, 0.1, 0.1]])
    got = kp.grid_subsample(points, (1, 2, 4), origin=(0, -1, 1), position="center")
    assert got.points.tolist() == [[0.5, 0, -1], [7.5, 0, -1]]


@pytest.mark.parametrize("order", [[2, 3], [3, 2]])
def test_the_centre_is_not_rounded_before_the_nearest_point_is_found(order):
    # float32 steps are 1/16 here, and the centre is half-way between two points: rounded, it would be nearer to one.
    points = np.float32(524288.125 + np.array(order)[:, None] / 16 * [1, 1])
    got = kp.grid_subsample(points, 5 / 16, position="nearest")
    assert_same_bits(got.points, points[:1])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_first_of_equally_near_points(order):
    points = np.array([[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]])[list(order)]
    features = np.arange(4.0)[:, None]
    got = kp.grid_subsample(points, 1, features=features, position="nearest", feature="nearest")
    assert got.points.tolist() == [points[0].tolist()]
    assert got.features.tolist() == [[0]]


def test_nearest_features_go_with_any_position():
    points, features = np.array([[0.1, 0.1], [0.5, 0.6]]), np.array([[1.0], [2.0]])
    for position in POSITIONS:
        got = kp.grid_subsample(points, 1, features=features, position=position, feature="nearest")
        assert got.features.tolist() == [[2]]


NAN = float("nan")


@both_dtypes
@pytest.mark.parametrize(
    ("column", "which"),
    [
        ([1, 3, 2], 1),
        ([3, 3, 3], 0),
        ([-np.inf, -np.inf, -5], 2),
        ([-0.0, 0.0, -0.0], 0),  # equal
        ([0.0, -0.0, -1.0], 0),
        ([1, NAN, np.inf], 1),
        ([NAN, 1, NAN], 0),
        ([np.inf, 1, NAN], 2),
    ],
)
def test_maximum(column, which, dtype, isa):
    # Also as one of many channels, since whole SIMD vectors and remaining channels take different code.
    features = np.repeat(np.array(column, dtype)[:, None], 21, 1)
    for width in 1, 3, 21:
        got = kp.grid_subsample(np.zeros((3, 2)), 1.0, features=features[:, :width].copy(), feature="max")
        assert_same_bits(got.features, features[which : which + 1, :width])
        grad = gradient(np.zeros((3, 2)), 1.0, features[:, :width].copy(), np.ones((1, width), dtype), feature="max")
        assert (grad == (np.arange(3) == which)[:, None]).all()


def test_equal_maxima_with_different_nans_keep_the_first():
    nans = np.array([0x7FC00001, 0x7FC00002], np.uint32).view(np.float32)[:, None]
    for features in nans, nans[::-1].copy():
        got = kp.grid_subsample(np.zeros((2, 2)), 1.0, features=features, feature="max")
        assert_same_bits(got.features, features[:1])


# ---- gradients


@pytest.mark.parametrize("feature", FEATURES)
@both_dtypes
@pytest.mark.parametrize("name", VOXELS)
def test_gradient_on_nasty_clouds(name, dtype, feature):
    points, _ = clouds.nasty(name, 3, dtype)
    features = attributes(len(points), channels=5, feature_type=dtype)["features"].round(1)  # with equal maxima
    check_gradient(
        points,
        VOXELS[name][1],
        features,
        feature,
        row_splits=clouds.splits([len(points) // 3, 0, -(-2 * len(points) // 3)]),
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_gradient_by_central_differences(feature):
    points, features = clouds.uniform(300, dtype=np.float64)[0], attributes(300, feature_type=np.float64)["features"]

    def fn(f):
        return kp.grid_subsample(points, 0.2, features=f, feature=feature).features

    pullback = kp.autodiff.vjp(fn, features)[1]
    check_vjp(fn, pullback, (features,))
    with pytest.raises(AssertionError, match="relative error"):
        check_vjp(fn, lambda g: [1.001 * pullback(g)[0]], (features,))


def test_gradient_through_a_convolution_after_it():
    points, features = clouds.uniform(300, dtype=np.float64)[0], attributes(300, feature_type=np.float64)["features"]
    weights = np.random.default_rng(2).normal(size=(5, 3, 4))

    def fn(f, w):
        sub = kp.grid_subsample(points, 0.2, features=f, feature="max")
        nb = kp.radius_search(sub.points, None, 0.4)
        return kp.kpconv(sub.points, None, nb, sub.features, w, kp.kernel_points(5, 0.2, dtype=np.float64), 0.2)

    check_vjp(fn, kp.autodiff.vjp(fn, features, weights)[1], (features, weights))


def test_only_the_features_of_a_traced_result_are_traced():
    points = clouds.uniform(50)[0]
    arrays = attributes(50)
    plain = kp.grid_subsample(points, 0.2, **arrays)
    traced = []

    def fn(f):
        traced.append(kp.grid_subsample(points, 0.2, features=f, labels=arrays["labels"]))
        return traced[0].features

    out, _ = kp.autodiff.vjp(fn, arrays["features"])
    assert isinstance(traced[0], kp.Subsampled)
    assert_same_bits(out, plain.features)
    for name in ("points", "labels", "row_splits", "inverse", "counts"):
        assert_same_bits(getattr(traced[0], name), getattr(plain, name))


def test_gradients_of_nothing():
    empty = np.empty((0, 3), np.float32)
    for feature in FEATURES:
        assert gradient(empty, 0.1, np.empty((0, 5)), np.empty((0, 5)), feature=feature).shape == (0, 5)
        assert gradient(np.zeros((4, 3)), 0.1, np.empty((4, 0)), np.empty((1, 0)), feature=feature).shape == (4, 0)


@pytest.mark.parametrize("argument", ["points", "voxel_size", "labels", "origin"])
def test_what_has_no_gradient_says_so(argument):
    arguments = {"points": np.zeros((2, 3)), "voxel_size": 1.0, "labels": np.zeros(2, int), "origin": np.zeros(3)}
    with pytest.raises(TypeError, match=f"{argument}: grid_subsample cannot be differentiated in it, only in features"):
        kp.autodiff.vjp(lambda x: kp.grid_subsample(**{**arguments, argument: x}).points, np.zeros((2, 3)))


# ---- the same bits everywhere


@both_dtypes
@pytest.mark.parametrize(("position", "feature"), list(zip(POSITIONS, FEATURES, strict=True)))
@pytest.mark.parametrize(
    ("name", "origin"), [("uniform", 0), ("lattice", 0), ("one_voxel", 0), ("uniform", "published")]
)
def test_same_bits_with_any_instructions_and_threads(name, origin, dtype, position, feature, set_isa, set_threads):
    points, voxel_size = {
        "uniform": (clouds.uniform(40_000, dtype=dtype)[0], 0.05),
        "lattice": (clouds.nasty("lattice_ties", dtype=dtype, num=40_000)[0], 0.3),
        "one_voxel": (clouds.uniform(40_000, dtype=dtype)[0], 2.0),
    }[name]
    arrays = attributes(len(points), columns=(2,)) | {"position": position, "feature": feature, "origin": origin}
    check_subsample(points, voxel_size, **arrays)  # of the set and threads that are taken by default
    check_gradient(points, voxel_size, arrays["features"], feature)

    def results():
        got = kp.grid_subsample(points, voxel_size, **arrays)
        grad = np.random.default_rng(1).normal(size=got.features.shape).astype(got.features.dtype)
        pulled = gradient(points, voxel_size, arrays["features"], grad, feature=feature, origin=origin)
        return got.points, got.features, got.labels, got.row_splits, got.inverse, got.counts, pulled

    expected = results()
    for isa, threads in itertools.product(kp.backends.cpu.isas(), (1, 2, 3)):
        set_isa(isa)
        set_threads(threads)
        for got, other in zip(results(), expected, strict=True):
            assert_same_bits(got, other)


# ---- real scans


@both_dtypes
@pytest.mark.parametrize("name", clouds.SCANS)
def test_real_scans(shared, name, dtype):
    file, read, voxel = clouds.SCANS[name]
    points = read(shared / "data" / file)
    if dtype == np.float32:
        points = points - np.floor(points.mean(0))
    points = np.ascontiguousarray(points, dtype)
    check_subsample(points, voxel, **attributes(len(points)))


@pytest.mark.parametrize("ignore_label", [None, 1])
def test_real_labels(shared, ignore_label):
    points, labels = clouds.read_las(shared / "data" / "ign_50x100m.las")
    check_subsample(points, 2.0, labels=np.ascontiguousarray(labels), ignore_label=ignore_label)

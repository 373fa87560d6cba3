"""grid_subsample. Voxel membership, their order and the majority labels are compared exactly."""

import itertools

import clouds
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, assert_same_bits

import kpcore as kp

both_dims = pytest.mark.parametrize("dim", [2, 3])
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
LABEL_TYPES = [np.uint8, np.int32, np.int64]

# One rounding to float32 at the end; in float64 sums of some thousand equal terms.
MEAN_TOLERANCE = {np.dtype(np.float32): 6e-8, np.dtype(np.float64): 1e-13}


def check_subsample(points, voxel_size, **options):
    expected = reference.grid_subsample(points, voxel_size, **options)
    got = kp.grid_subsample(points, voxel_size, **options)
    for name, dtype in ("inverse", np.int32), ("counts", np.int32), ("row_splits", np.int64):
        assert_same_bits(getattr(got, name), expected[name].astype(dtype))
    assert got.points.dtype == points.dtype
    assert_close(got.points, expected["points"], MEAN_TOLERANCE[points.dtype])
    if options.get("features") is None:
        assert got.features is None
    else:
        assert got.features.dtype == options["features"].dtype
        assert_close(
            got.features, expected["features"], MEAN_TOLERANCE[got.features.dtype], magnitude=options["features"]
        )
    if options.get("labels") is None:
        assert got.labels is None
    else:
        assert_same_bits(got.labels, expected["labels"])


def attributes(num, seed=0, channels=3, feature_type=np.float32, label_type=np.int32, num_labels=4):
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(num, channels)).astype(feature_type),
        "labels": rng.integers(0, num_labels, num).astype(label_type),
    }


# ---- against the reference

# Finer and coarser than the cloud's own spacing. Left out: a grid of more than 2**21 voxels, which is an error.
VOXELS = {name: (radius / 2, radius * 3) for name, (_, radius) in clouds.NASTY.items() if name != "nothing_within"}
VOXELS |= {
    "cluster_and_outliers": (1e-2, 0.3),
    "sparse_beyond_64_bits": (1e3, 1e7),
    "all_equal": (0.1, 1e-3),
    "lattice_ties": (0.1, 0.3),
}


@pytest.mark.parametrize("which", [0, 1])
@both_dtypes
@both_dims
@pytest.mark.parametrize("name", VOXELS)
def test_nasty_clouds(name, dim, dtype, which):
    points, _ = clouds.nasty(name, dim, dtype)
    check_subsample(points, VOXELS[name][which], **attributes(len(points)))


@pytest.mark.parametrize("num", clouds.SIZES)
def test_sizes(num):
    check_subsample(clouds.uniform(num)[0], 0.2, **attributes(num))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 17, 65])
@both_dtypes
def test_channels(channels, dtype):
    check_subsample(
        clouds.uniform(257)[0], 0.2, features=attributes(257, channels=channels, feature_type=dtype)["features"]
    )


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
    )
    optional |= {"row_splits": data.draw(clouds.row_splits_of(len(points)))}
    options = {name: value for name, value in optional.items() if data.draw(st.booleans())}
    if "labels" in options:
        options["ignore_label"] = data.draw(st.none() | st.integers(0, 5))
    check_subsample(points, data.draw(st.sampled_from(VOXELS[name])), **options)


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
        ([7, 7], 7, 7),  # nobody votes
        ([0, 0, 1], 0, 1),
        ([255, 0, 255], None, 255),
    ],
)
def test_majority_label(labels, ignore_label, expected, label_type):
    points = np.zeros((len(labels), 3), np.float32)
    got = kp.grid_subsample(points, 1.0, labels=np.array(labels, label_type), ignore_label=ignore_label)
    assert got.labels.dtype == label_type
    assert got.labels.tolist() == [expected]


@pytest.mark.parametrize("labels", [[-1, -5, -5], [2**31 - 1, -(2**31), -(2**31)]])
@pytest.mark.parametrize("label_type", [np.int32, np.int64])
def test_negative_and_extreme_labels(labels, label_type):
    assert kp.grid_subsample(np.zeros((3, 2)), 1.0, labels=np.array(labels, label_type)).labels.tolist() == [labels[1]]


def test_labels_beyond_32_bits():
    labels = np.array([1, 2**32 + 1, 2**32 + 1, -(2**40)])
    assert kp.grid_subsample(np.zeros((4, 3)), 1.0, labels=labels).labels.tolist() == [2**32 + 1]


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


# ---- the same bits everywhere


@both_dtypes
@pytest.mark.parametrize("name", ["uniform", "lattice", "one_voxel"])
def test_same_bits_with_any_instructions_and_threads(name, dtype, isa, set_threads):
    points, voxel_size = {
        "uniform": (clouds.uniform(20_000, dtype=dtype)[0], 0.05),
        "lattice": (clouds.nasty("lattice_ties", dtype=dtype, num=8_000)[0], 0.3),
        "one_voxel": (clouds.uniform(20_000, dtype=dtype)[0], 2.0),
    }[name]
    arrays = attributes(len(points))
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(kp.grid_subsample(points, voxel_size, **arrays))
    for other in results[1:]:
        for part in ("points", "features", "labels", "row_splits", "inverse", "counts"):
            assert_same_bits(getattr(other, part), getattr(results[0], part))
    check_subsample(
        points, voxel_size, **arrays
    )  # decisions equal the reference's, so they are one for all instruction sets


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

"""The made-up flat."""

import numpy as np
import pytest

from kpcore import scenes


@pytest.fixture(scope="module")
def flat():
    return scenes.indoor(300_000, seed=3)


def test_the_flat_is_one_value_for_a_seed(flat):
    again, other = scenes.indoor(300_000, seed=3), scenes.indoor(300_000, seed=4)
    for name in ("points", "colors", "labels"):
        np.testing.assert_array_equal(getattr(flat, name), getattr(again, name))
        assert not np.array_equal(getattr(flat, name), getattr(other, name))


@pytest.mark.parametrize("num", [1, 10, 12_345])
def test_the_flat_has_as_many_points_as_asked(num):
    cloud = scenes.indoor(num)
    assert cloud.points.shape == cloud.colors.shape == (num, 3)
    assert cloud.labels.shape == (num,)
    assert (cloud.points.dtype, cloud.colors.dtype, cloud.labels.dtype) == (np.float32, np.uint8, np.int32)


def test_the_flat_needs_a_point():
    with pytest.raises(ValueError, match=r"^num_points: expected at least 1, got 0$"):
        scenes.indoor(0)


def test_the_flat_is_a_furnished_flat(flat):
    def of(name):
        return flat.points[flat.labels == flat.names.index(name)]

    assert set(np.unique(flat.labels)) == set(range(len(flat.names)))
    np.testing.assert_allclose(np.ptp(flat.points, axis=0), [11, 5.4, 2.7], atol=0.3)
    np.testing.assert_allclose(of("ceiling")[:, 2].mean(), 2.7, atol=0.001)
    np.testing.assert_allclose(of("ceiling")[:, 2].std(), 0.002, rtol=0.05)  # the scanner's noise
    assert np.percentile(of("floor")[:, 2], 99) < 0.03
    assert of("books")[:, 2].min() > 0.05
    assert of("lamp")[:, 2].max() > 2.5


def test_the_flat_is_denser_near_a_scanner_and_has_shadows(flat):
    floor = flat.points[(flat.labels == flat.names.index("floor")) & (flat.points[:, 2] < 0.011)]
    distance = np.linalg.norm(floor[:, :2] - [9.3, 2.4], axis=1)
    near, far = (distance < 0.8).sum() / 0.8**2, ((distance > 1.2) & (distance < 1.7)).sum() / (1.7**2 - 1.2**2)
    assert near > 1.3 * far
    under = (np.abs(floor[:, :2] - [7.6, 0.5]) < 0.15).all(axis=1)  # below a carton
    beside = (np.abs(floor[:, :2] - [8.8, 0.5]) < 0.15).all(axis=1)
    assert under.sum() < 0.2 * beside.sum()

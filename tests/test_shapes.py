"""Generated objects with parts."""

import hashlib

import numpy as np
import pytest

from kpcore.scenes import CATEGORIES, shapes


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_object_is_one_value_for_a_seed(category):
    one, again, other = (shapes(category, seed, 3000) for seed in (3, 3, 4))
    assert one.points.shape == (3000, 3) and one.labels.shape == (3000,) and one.names == CATEGORIES[category]
    assert (one.points.dtype, one.labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(one.points, again.points)
    np.testing.assert_array_equal(one.labels, again.labels)
    assert not np.array_equal(one.points, other.points)
    assert 0.2 < np.ptp(one.points, axis=0).max() < 5 and one.points[:, 2].min() > -0.3


def test_the_bits_are_those_of_every_machine():
    data = b"".join(shapes(category, 7, 500).points.astype("<f4").tobytes() for category in CATEGORIES)
    assert hashlib.sha256(data).hexdigest() == "47fddd004df88b4f46f48f1c689266c7eb24dcbf17dd84a2bdae162857e9a412"


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_part_is_there_and_apart(category):
    """Parts appear in some objects, the first one in all; no two have their points in the same places."""
    seen = np.zeros(len(CATEGORIES[category]), int)
    for seed in range(20):
        cloud = shapes(category, seed, 2000)
        counts = np.bincount(cloud.labels, minlength=len(seen))
        seen += counts > 0
        voxels = {}
        for label in np.flatnonzero(counts):
            voxels[label] = {*map(tuple, np.floor(cloud.points[cloud.labels == label] / 0.05))}
        shared = sum(len(voxels[a] & voxels[b]) for a in voxels for b in voxels if a < b)
        assert shared < 0.5 * len(set().union(*voxels.values()))
    assert seen[0] == 20 and seen.min() >= 3


def test_invalid_arguments():
    with pytest.raises(ValueError, match=r"^category: expected one of airplane, bed, .*, got 'spoon'$"):
        shapes("spoon")
    with pytest.raises(ValueError, match=r"^num_points: expected at least 1, got 0$"):
        shapes("mug", 0, 0)


def descriptor(points):
    """Extents, second and third moments, and histograms of height and of distance, of an object in the unit sphere."""
    points = points.astype(np.float64) - points.mean(axis=0)
    points /= np.linalg.norm(points, axis=1).max()
    height, distance = points[:, 2] - points[:, 2].min(), np.linalg.norm(points, axis=1)
    return np.concatenate([
        np.ptp(points, axis=0), np.cov(points.T)[np.triu_indices(3)], (points**3).mean(axis=0),
        np.histogram(height, 8, (0, height.max()))[0] / len(points), np.histogram(distance, 8, (0, 1))[0] / len(points),
    ])  # fmt: skip


def test_simple_descriptors_do_not_tell_categories_apart():
    """The nearest mean descriptor finds two objects of three; the network of test_objects.py finds nearly all."""

    def described(seeds):
        return np.array(
            [[descriptor(shapes(category, seed, 1000).points) for seed in seeds] for category in CATEGORIES]
        )

    known, unseen = described(range(30)), described(range(1000, 1020))
    center, scale = known.mean(axis=(0, 1)), known.std(axis=(0, 1))
    means = ((known - center) / scale).mean(axis=1)
    squared = ((((unseen - center) / scale)[:, :, None] - means) ** 2).sum(axis=-1)
    accuracy = (squared.argmin(axis=-1) == np.arange(len(CATEGORIES))[:, None]).mean()
    assert 0.5 < accuracy < 0.75

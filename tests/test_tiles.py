"""Scenes cut into tiles: the same voxels and the same pairs as of the whole, to the bit."""

import clouds
import numpy as np
import pytest
from reference import assert_same_bits

import kpcore as kp


def tiles_of(points, voxel, tile):
    """The points of each tile of that many voxels, by number; which voxel a point is in, the library's rule decides."""
    number = np.floor(np.floor(points / points.dtype.type(voxel)) / tile)
    for key in np.unique(number, axis=0):
        yield np.flatnonzero((number == key).all(1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["uniform", "lattice_ties", "far_away", "mixed_density"])
def test_voxels_of_tiles_are_those_of_the_whole(name, dtype):
    points = clouds.uniform(4000, dtype=dtype)[0] * 3 if name == "uniform" else clouds.nasty(name, dtype=dtype)[0]
    voxel = 0.11
    labels = np.random.default_rng(0).integers(0, 4, len(points))
    whole = kp.grid_subsample(points, voxel, labels=labels, features=points[:, :1].copy())
    parts = [
        kp.grid_subsample(points[rows], voxel, labels=labels[rows], features=points[rows, :1].copy())
        for rows in tiles_of(points, voxel, 5)
    ]
    assert len(parts) > 1
    joined = [np.concatenate([part[field] for part in parts]) for field in (0, 1, 2, 5)]
    # A barycentre may round into the next voxel; those of a tile and of the whole do so alike.
    ours, theirs = np.lexsort(joined[0].T), np.lexsort(whole.points.T)
    for part, field in zip(joined, (0, 1, 2, 5), strict=True):
        assert_same_bits(part[ours], whole[field][theirs])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["l2", "l1", "linf"])
@pytest.mark.parametrize("name", ["uniform", "lattice_ties", "far_away", "duplicates"])
def test_pairs_of_tiles_are_those_of_the_whole(name, metric, dtype):
    points, radius = clouds.uniform(3000, dtype=dtype) if name == "uniform" else clouds.nasty(name, dtype=dtype)
    whole = kp.radius_search(points, None, radius, metric=metric, return_distances=True)
    seen = np.zeros(len(points), int)
    for rows in tiles_of(points, radius, 2):
        low, high = points[rows].min(0), points[rows].max(0)
        halo = dtype(radius * 1.001)
        near = np.flatnonzero(((points >= low - halo) & (points <= high + halo)).all(1))
        part = kp.radius_search(points[near], points[rows], radius, metric=metric, return_distances=True)
        assert_same_bits(part.counts, whole.counts[rows])
        for q, row in enumerate(rows):
            ours = slice(part.row_splits[q], part.row_splits[q + 1])
            theirs = slice(whole.row_splits[row], whole.row_splits[row + 1])
            assert_same_bits(near[part.index[ours]].astype(np.int32), whole.index[theirs])
            assert_same_bits(part.distance[ours], whole.distance[theirs])
        seen[rows] += 1
    assert (seen == 1).all()

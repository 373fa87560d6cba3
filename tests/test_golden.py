"""Searches and sampling against what Open3D and scikit-learn return; see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest

import kpcore as kp

GOLDEN = Path(__file__).parent / "golden"
BATCHES = ("points_row_splits", "queries_row_splits")


@pytest.fixture(scope="module")
def open3d():
    with np.load(GOLDEN / "open3d_searches.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def sklearn():
    with np.load(GOLDEN / "sklearn_searches.npz") as data:
        return dict(data)


@pytest.mark.parametrize("make", [kp.KDTree, kp.GridIndex])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("metric", ["l2", "l1", "linf"])
def test_the_radius_search_of_open3d(open3d, metric, ignore, make):
    radius = float(open3d["radius"])
    index = make(open3d["points"], *((radius,) if make is kp.GridIndex else ()), row_splits=open3d[BATCHES[0]])
    found = index.radius_search(
        open3d["queries"], radius, queries_row_splits=open3d[BATCHES[1]], metric=metric, ignore_query_point=ignore,
        return_distances=True,
    )  # fmt: skip
    expected = f"radius_{metric}_{'ignore' if ignore else 'all'}"
    assert found.index.tolist() == open3d[f"{expected}_index"].tolist()
    assert found.row_splits.tolist() == open3d[f"{expected}_row_splits"].tolist()
    power = 2 if metric == "l2" else 1
    np.testing.assert_allclose(found.distance**power, open3d[f"{expected}_distance"], rtol=1e-6)
    assert (found.distance == open3d["radius"]).any()


@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_the_nearest_of_open3d(open3d, metric):
    found = kp.knn_search(
        open3d["knn_points"], open3d["knn_queries"], 7, **{name: open3d[name] for name in BATCHES}, metric=metric,
        return_distances=True,
    )  # fmt: skip
    assert found.index.tolist() == open3d[f"knn_{metric}_index"].tolist()
    assert found.row_splits.tolist() == open3d[f"knn_{metric}_row_splits"].tolist()
    power = 2 if metric == "l2" else 1
    np.testing.assert_allclose(found.distance**power, open3d[f"knn_{metric}_distance"], rtol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ("average_average", {}),
        ("center_max", {"position": "center", "feature": "max"}),
        ("nearest_neighbor_nearest_neighbor", {"position": "nearest", "feature": "nearest"}),
    ],
)
def test_the_voxel_pooling_of_open3d(open3d, theirs, options):
    found = kp.grid_subsample(open3d["knn_points"], 0.2, features=open3d["pool_features"], **options)
    expected = np.hstack([open3d[f"pool_{theirs}_positions"], open3d[f"pool_{theirs}_features"]])
    rows = np.hstack([found.points, found.features])
    np.testing.assert_allclose(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)], rtol=1e-6)


def test_the_furthest_points_of_open3d(open3d):
    found = kp.farthest_point_sampling(open3d["knn_points"], 100)
    assert found.index.tolist() == open3d["fps_index"].tolist()


@pytest.mark.parametrize("metric", ["l2", "l1", "linf"])
@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_the_searches_of_scikit_learn(sklearn, dim, metric):
    points, queries = sklearn[f"points_{dim}"], sklearn[f"queries_{dim}"]
    name = f"{metric}_{dim}"
    nearest = kp.knn_search(points, queries, 9, metric=metric, return_distances=True)
    assert nearest.index.tolist() == sklearn[f"knn_{name}_index"].ravel().tolist()
    np.testing.assert_allclose(nearest.distance, sklearn[f"knn_{name}_distance"].ravel(), rtol=1e-14)
    found = kp.radius_search(points, queries, float(sklearn[f"radius_{name}"]), metric=metric)
    assert found.index.tolist() == sklearn[f"radius_{name}_index"].tolist()
    assert found.row_splits.tolist() == sklearn[f"radius_{name}_row_splits"].tolist()

"""Arguments of small example calls, shared by the families of operators, and what computes such a call.

Every ``test_<family>.py`` lists an example call of each of its operators in CALLS; ops.py collects them.
"""

import numpy as np
from reference import radius_search

import kpcore as kp


def cloud(num, dtype):
    """-> points (num, 3), and 2 num / 3 queries, the first of which has no neighbors"""
    points, queries = np.random.default_rng(0).uniform(size=(2, num, 3)).astype(dtype)
    queries = queries[: 2 * num // 3]
    queries[:1] += 5
    return points, queries


def lists(points, queries, radius=0.4):
    """The neighbors within the radius, by brute force."""
    rows = radius_search(points, queries, radius)[0] if len(points) and len(queries) else [[]] * len(queries)
    index = np.concatenate([*rows, np.empty(0)]).astype(np.int32)
    return kp.Neighbors(index, kp.row_splits(list(map(len, rows))), len(points))


def convolution(num, geometry, features):
    """Arguments of a kpconv with 4 kernel points, from 3 to 2 channels."""
    rng = np.random.default_rng(1)
    points, queries = cloud(num, geometry)
    return {
        "points": points,
        "queries": queries,
        "neighbors": lists(points, queries),
        "features": rng.normal(size=(num, 3)).astype(features),
        "weights": rng.normal(size=(4, 3, 2)).astype(features),
        "kernel_points": rng.normal(size=(4, 3)).astype(geometry) / 5,
        "extent": 0.4,
    }


def deformed(arguments):
    """Offsets and modulations for the arguments of a kpconv."""
    rng, (num, dim) = np.random.default_rng(3), arguments["kernel_points"].shape
    num_queries, geometry, features = len(arguments["queries"]), arguments["points"].dtype, arguments["features"].dtype
    return {
        "offsets": rng.normal(size=(num_queries, num, dim)).astype(geometry) / 10,
        "modulations": rng.uniform(0, 2, (num_queries, num)).astype(features),
    }


def rows_of_features(num, geometry, features):
    """Features of 4 channels. Like every maker of arguments it gets both dtypes, and leaves that of the geometry."""
    return {"features": np.random.default_rng(1).normal(size=(num, 4)).astype(features)}


def computed(op, arguments):
    """(out, saved) of an operator, called with these arguments."""
    return op.compute(op.check(**arguments))

"""Arguments of small example calls, shared by the tests of several families of operators.

Every ``test_<family>.py`` lists example calls of its operators in CALLS; ops.py collects them.
"""

import numpy as np
from reference import radius_search

import kpcore as kp


def cloud(num, dtype):
    """-> (points, queries) of shapes (num, 3) and (2 num / 3, 3); the first query has no neighbors"""
    points, queries = np.random.default_rng(0).uniform(size=(2, num, 3)).astype(dtype)
    queries = queries[: 2 * num // 3]
    queries[:1] += 5
    return points, queries


def neighbor_list(points, queries, radius=0.4):
    """The neighbors of each query within the radius, by brute force."""
    rows = radius_search(points, queries, radius)[0] if len(points) and len(queries) else [[]] * len(queries)
    index = np.concatenate([*rows, np.empty(0)]).astype(np.int32)
    return kp.Neighbors(index, kp.row_splits(list(map(len, rows))), len(points))


def convolution(num, geometry, features):
    """Arguments of a kpconv with 4 kernel points, 3 input and 2 output channels."""
    rng = np.random.default_rng(1)
    points, queries = cloud(num, geometry)
    return {
        "points": points,
        "queries": queries,
        "neighbors": neighbor_list(points, queries),
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


def resampled(arguments):
    """Kernel offsets for the arguments of a kpconv, with several shares of each kernel point above zero."""
    rng, (num, dim) = np.random.default_rng(5), arguments["kernel_points"].shape
    offsets = rng.normal(size=(len(arguments["queries"]), num, dim)) / 10
    return {"kernel_offsets": offsets.astype(arguments["points"].dtype), "kernel_extent": 0.5}


def rows_of_features(num, geometry, features):
    """Features with 4 channels. Has the parameters of every `make` in CALLS; `geometry` is not used."""
    return {"features": np.random.default_rng(1).normal(size=(num, 4)).astype(features)}


def computed(op, arguments):
    """(out, saved) of the forward pass of an operator for these arguments."""
    return op.compute(op.check(**arguments))

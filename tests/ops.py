"""One call of every operator of the table, from which test_autodiff, test_torch and test_jax make their tests.

A new operator needs an entry in CALLS; without one those tests fail.
"""

import inspect

import numpy as np
from reference import radius_search

import kpcore as kp
from kpcore.ops import OPS


def cloud(num, dtype):
    """-> points (num, 3), and queries, two thirds as many, one of which sees nothing"""
    points, queries = np.random.default_rng(0).uniform(size=(2, num, 3)).astype(dtype)
    queries = queries[: 2 * num // 3]
    queries[:1] += 5
    return points, queries


def lists(points, queries, radius=0.4):
    """Their neighbours within the radius, found by brute force."""
    rows = radius_search(points, queries, radius)[0] if len(points) and len(queries) else [[]] * len(queries)
    index = np.concatenate([*rows, np.empty(0)]).astype(np.int32)
    return kp.Neighbors(index, kp.row_splits(list(map(len, rows))), len(points))


def kpconv(num, geometry, features):
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


def grid_subsample(num, geometry, features):
    points = cloud(num, geometry)[0]
    return {
        "points": points,
        "voxel_size": 0.4,
        "features": np.random.default_rng(1).normal(size=(num, 3)).astype(features),
    }


# name: (arguments from a number of points and the dtypes of geometry and features, options to try)
CALLS = {
    "grid_subsample": (grid_subsample, [{}, {"feature": "max"}, {"feature": "nearest"}]),
    "kpconv": (kpconv, [{}, {"influence": "gaussian", "normalization": "count"}, {"aggregation": "closest"}]),
}
# "name-0" and so on: an operator with each of its options
VARIANTS = {f"{name}-{i}": (name, i) for name, (_, options) in CALLS.items() for i in range(len(options))}
TRACED = [variant for variant, (name, _) in VARIANTS.items() if OPS[name].result is not None]


def call(variant, num=24, geometry=np.float64, features=np.float64):
    """-> the operator, and the arguments of a call, all of them, by name"""
    name, i = VARIANTS[variant]
    make, options = CALLS[name]
    defaults = {n: p.default for n, p in inspect.signature(getattr(kp, name)).parameters.items()}
    return OPS[name], defaults | make(num, geometry, features) | options[i]


def diff(op, arguments):
    """The names of the given arguments in which the operator is differentiable."""
    return [name for name in op.diff if arguments[name] is not None]


def output(op, out):
    """What of a result is differentiable."""
    return out if op.field is None else getattr(out, op.field)


def vjp(op, arguments, names):
    """(out, pullback) of the operator as a function of the named arguments, by the tape."""

    def fn(*values):
        return output(op, getattr(kp, op.name)(**{**arguments, **dict(zip(names, values, strict=True))}))

    return kp.autodiff.vjp(fn, *(arguments[name] for name in names))


def covector(out):
    return np.random.default_rng(2).normal(size=out.shape).astype(out.dtype)

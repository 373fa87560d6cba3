"""One call of every operator of the table, from which test_autodiff, test_torch and test_jax make their tests.

A new operator needs an entry in CALLS; without one those tests fail.
"""

import inspect
from typing import NamedTuple

import numpy as np
from reference import radius_search

import kpcore as kp
from kpcore.ops import OPS, Call, Op


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


def deformed(arguments):
    """Offsets and modulations for a kpconv."""
    rng, (num, dim) = np.random.default_rng(3), arguments["kernel_points"].shape
    num_queries, geometry, features = len(arguments["queries"]), arguments["points"].dtype, arguments["features"].dtype
    return {
        "offsets": rng.normal(size=(num_queries, num, dim)).astype(geometry) / 10,
        "modulations": rng.uniform(0, 2, (num_queries, num)).astype(features),
    }


def depthwise(arguments):
    return deformed(arguments) | {"weights": arguments["weights"][:, :, 0].copy()}


def kpconvx(num, geometry, features):
    arguments = kpconv(num, geometry, features)
    attention = np.random.default_rng(4).uniform(size=(len(arguments["queries"]), 4, 3)).astype(features)
    return arguments | {"weights": arguments["weights"][:, :, 0].copy(), "attention": attention}


def losses(num, geometry, features):
    arguments = kpconv(num, geometry, features)
    kept = {name: arguments[name] for name in ("points", "queries", "neighbors", "kernel_points", "extent")}
    return kept | {"offsets": deformed(arguments)["offsets"]}


def repulsion(num, geometry, features):
    arguments = losses(num, geometry, features)
    return {name: arguments[name] for name in ("kernel_points", "offsets", "extent")}


def pooling(num, geometry, features):
    arguments = kpconv(num, geometry, features)
    return {name: arguments[name] for name in ("neighbors", "features")}


def weighted_pooling(arguments):
    num_pairs = arguments["neighbors"].num_pairs
    return {"weights": np.random.default_rng(5).uniform(size=num_pairs).astype(arguments["features"].dtype)}


def interpolation(num, geometry, features):
    arguments = kpconv(num, geometry, features)
    return {name: arguments[name] for name in ("points", "queries", "features")}


def rows(num, geometry, features):
    return {"features": np.random.default_rng(1).normal(size=(num, 4)).astype(features)}


def items(num, geometry, features):
    return rows(num, geometry, features) | {"row_splits": np.array([0, num // 3, num // 3, num])}


def gathered(num, geometry, features):
    index = np.random.default_rng(1).integers(0, max(1, num), 2 * num).astype(np.int32)
    return rows(num, geometry, features) | {"index": index}


def linear(num, geometry, features):
    rng = np.random.default_rng(2)
    return rows(num, geometry, features) | {
        "weights": rng.normal(size=(4, 3)).astype(features),
        "bias": rng.normal(size=3).astype(features),
    }


def scaled(num, geometry, features):
    rng = np.random.default_rng(2)
    return rows(num, geometry, features) | {
        name: rng.uniform(0.5, 2, 4).astype(features) for name in ("scale", "shift")
    }


def batch_norm(num, geometry, features):
    running = {"running_mean": np.zeros(4, features), "running_var": np.ones(4, features)}
    return scaled(num, geometry, features) | running | {"training": num > 1}


def group_norm(num, geometry, features):
    return scaled(num, geometry, features) | {"num_groups": 2}


def dropout(num, geometry, features):
    return rows(num, geometry, features) | {"rate": 0.4, "seed": 7}


def pair(num, geometry, features):
    first = rows(num, geometry, features)["features"]
    return {"first": first, "second": first[:, ::-1].copy()}


def labelled(num, geometry, features):
    labels = np.random.default_rng(6).integers(0, 4, num).astype(np.int32)
    return {"logits": rows(num, geometry, features)["features"], "labels": labels}


def grid_subsample(num, geometry, features):
    points = cloud(num, geometry)[0]
    return {
        "points": points,
        "voxel_size": 0.4,
        "features": np.random.default_rng(1).normal(size=(num, 3)).astype(features),
    }


def origin_of_item(arguments):
    return {"origin": np.full((1, 3), 0.1, arguments["points"].dtype), "feature": "nearest"}


# name: (arguments from a number of points and the dtypes of geometry and features, options to try, or what makes them
# from the arguments)
CALLS = {
    "grid_subsample": (
        grid_subsample,
        [{}, {"feature": "max"}, {"feature": "nearest"}, {"origin": "published"}, origin_of_item],
    ),
    "kpconv": (
        kpconv,
        [{}, {"influence": "gaussian", "normalization": "count"}, {"aggregation": "closest"}, deformed, depthwise],
    ),
    "kpconvx": (kpconvx, [{}]),
    "fitting_loss": (losses, [{}]),
    "repulsion_loss": (repulsion, [{"detach_others": False}]),
    "neighbor_reduce": (pooling, [{}, {"reduce": "max"}, weighted_pooling]),
    "nearest_upsample": (pooling, [{}]),
    "interpolate": (interpolation, [{}]),
    "segment_reduce": (items, [{}, {"reduce": "min"}]),
    "gather": (gathered, [{}]),
    "linear": (linear, [{}, {"bias": None}]),
    "batch_norm": (batch_norm, [{}, {"negative_slope": 0.1}]),
    "group_norm": (group_norm, [{}]),
    "leaky_relu": (rows, [{}]),
    "relu": (rows, [{}]),
    "sigmoid": (rows, [{}]),
    "softmax": (rows, [{}]),
    "dropout": (dropout, [{}]),
    "concatenate": (pair, [{}]),
    "add": (pair, [{}]),
    "softmax_cross_entropy": (labelled, [{}, {"reduction": "none"}]),
}
ANY_SHAPE = ("add", "dropout", "leaky_relu", "relu", "sigmoid", "softmax")  # what takes arrays of any shape
# "name-0" and so on: an operator with each of its options
VARIANTS = {f"{name}-{i}": (name, i) for name, (_, options) in CALLS.items() for i in range(len(options))}
TRACED = [variant for variant, (name, _) in VARIANTS.items() if OPS[name].result is not None]


def call(variant, num=24, geometry=np.float64, features=np.float64):
    """-> the operator, and the arguments of a call, all of them, by name"""
    name, i = VARIANTS[variant]
    make, options = CALLS[name]
    defaults = {n: p.default for n, p in inspect.signature(getattr(kp, name)).parameters.items()}
    arguments = make(num, geometry, features)
    more = options[i](arguments) if callable(options[i]) else options[i]
    return OPS[name], defaults | arguments | more


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


def computed(op, arguments):
    """(out, saved)"""
    return op.compute(op.check(**arguments))


def covector(out):
    return np.random.default_rng(2).normal(size=out.shape).astype(out.dtype)


# ---- an operator of every kind of argument that returns a record and saves something, which the table may not have


class Weighted(NamedTuple):
    features: np.ndarray
    sums: np.ndarray


def weighted(features: "Array[Computed]", weights: "AnyArray | None" = None,  # noqa: F821
             neighbors: "Neighbors | None" = None,  # noqa: F821
             factor: "float" = 2.0, power: "int" = 1, negate: "bool" = False,
             name: "str | None" = None) -> Call:  # fmt: skip
    return Call(features=features, weights=weights, scale=factor**power * (-1 if negate else 1))


def _weighted(call):
    scale = np.full(call.features.shape[1], call.scale, call.features.dtype)
    if call.weights is not None:
        scale = scale * call.weights
    return Weighted(call.features * scale, np.arange(len(call.features), dtype=np.int32)), (scale,)


def _weighted_vjp(call, saved, grad, needs):
    one = saved[0] if call.weights is None else saved[0] / call.weights
    found = {"features": grad * saved[0], "weights": (grad * call.features).sum(0) * one}
    return {name: found[name] for name in needs}


def _weighted_result(call):
    num, channels = call.features.shape
    return [((num, channels), call.features.dtype), ((num,), np.int32), ((channels,), call.features.dtype)]


WEIGHTED = Op("weighted", weighted, _weighted_vjp, diff=("features", "weights"), result=_weighted_result,
              forward=_weighted, field="features", record=Weighted)  # fmt: skip

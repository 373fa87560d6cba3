"""Example calls of every operator, on which test_autodiff, test_torch, test_jax and test_gpu test all of them.

They are collected from CALLS in the tests of each family, test_<family>.py: {operator: (make, options)}, where
``make(num_points, geometry_dtype, features_dtype)`` returns the arguments as a dict, and `options` is a list of further
arguments to try, each a dict or a function from the arguments to a dict. Without an entry for a new operator these
tests fail.
"""

import importlib
import inspect
import math
from typing import NamedTuple

import numpy as np

import kpcore as kp
from kpcore.ops import OPS, Call, Op

# The family of an operator is the second part of its module's name: "layers" for kpcore.layers.linear.
FAMILIES = sorted({op.check.__module__.split(".")[1] for op in OPS.values()})
CALLS = {name: call for family in FAMILIES for name, call in importlib.import_module(f"test_{family}").CALLS.items()}
ANY_SHAPE = ("add", "dropout", "leaky_relu", "relu", "relu6", "sigmoid", "softmax")  # operators on arrays of any shape
# Arguments that may have several numbers of axes
SEVERAL_SHAPES = {
    "conditional_conv2d": ("weights", "kernel_offsets"),
    "continuous_conv": ("extents",),
    "continuous_conv_transpose": ("extents",),
    "deformable_conv2d": ("weight",),
    "deformable_kernel_conv2d": ("weight", "kernel_offsets"),
    "sparse_conv": ("filters",),
    "sparse_conv_transpose": ("filters",),
}
# {"gather-0": ("gather", 0), ...}: each operator with each of its options
VARIANTS = {f"{name}-{i}": (name, i) for name, (_, options) in CALLS.items() for i in range(len(options))}
TRACED = [variant for variant, (name, _) in VARIANTS.items() if OPS[name].result is not None]


def call(variant, num=24, geometry=np.float64, features=np.float64):
    """-> (operator, {argument: value}) of a variant, defaults included"""
    name, i = VARIANTS[variant]
    make, options = CALLS[name]
    defaults = {n: p.default for n, p in inspect.signature(getattr(kp, name)).parameters.items()}
    arguments = make(num, geometry, features)
    more = options[i](arguments) if callable(options[i]) else options[i]
    return OPS[name], defaults | arguments | more


def has_one_shape(op, argument):
    """Whether one more axis makes the argument wrong."""
    return op.name not in ANY_SHAPE and argument not in SEVERAL_SHAPES.get(op.name, ())


def diff(op, arguments):
    """The names of the arguments that the operator can be differentiated in and that are not None."""
    return [name for name in op.diff if arguments[name] is not None]


def output(op, out):
    """The differentiable part of a result: the result itself or one of its fields."""
    return out if op.field is None else getattr(out, op.field)


def vjp(op, arguments, names):
    """(out, pullback) of the operator on the tape, as a function of the arguments in `names`."""

    def fn(*values):
        return output(op, getattr(kp, op.name)(**{**arguments, **dict(zip(names, values, strict=True))}))

    return kp.autodiff.vjp(fn, *(arguments[name] for name in names))


def covector(out):
    return np.random.default_rng(2).normal(size=out.shape).astype(out.dtype)


# ---- a test operator that is not in the table: an argument of every kind, a named tuple as result, and a saved array


class Weighted(NamedTuple):
    features: np.ndarray
    sums: np.ndarray


def weighted(features: "Array[Computed]", weights: "AnyArray | None" = None,  # noqa: F821
             neighbors: "Neighbors | None" = None,  # noqa: F821
             factor: "float" = 2.0, power: "int" = 1, negate: "bool" = False,
             name: "str | None" = None, more: "Sequence[int] | None" = None) -> Call:  # noqa: F821  # fmt: skip
    more = () if more is None else more
    return Call(features=features, weights=weights, scale=factor**power * math.prod(more) * (-1 if negate else 1))


def _weighted(call):
    scale = np.full(call.features.shape[1], call.scale, call.features.dtype)
    if call.weights is not None:
        scale = scale * call.weights
    return Weighted(call.features * scale, np.arange(len(call.features), dtype=np.int32)), (scale,)


def _weighted_vjp(call, saved, grad, needs):
    scale = saved[0] if call.weights is None else saved[0] / call.weights
    gradients = {"features": grad * saved[0], "weights": (grad * call.features).sum(0) * scale}
    return {name: gradients[name] for name in needs}


def _weighted_result(call):
    num, channels = call.features.shape
    return [((num, channels), call.features.dtype), ((num,), np.int32), ((channels,), call.features.dtype)]


WEIGHTED = Op("weighted", weighted, _weighted_vjp, diff=("features", "weights"), result=_weighted_result,
              forward=_weighted, field="features", record=Weighted)  # fmt: skip

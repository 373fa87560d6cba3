"""The table of differentiable operators: kpcore.torch, kpcore.jax, their signatures and the generated tests look here.

An operator's arguments are those of its public function, the one of its name in `kpcore`, whose annotations say what
kind of thing each is: Array, Neighbors, float, int, bool or str, and whether it may be None ("Array | None"). The
adapters go by that: arrays and the arrays of a Neighbors are traced, the rest are settings.
"""

from __future__ import annotations

import inspect

import numpy as np

from kpcore.deformation import FITTING, REPULSION
from kpcore.kpconv import OP as KPCONV
from kpcore.kpconv import OPX as KPCONVX
from kpcore.layers.activations import DROPOUT, LEAKY_RELU, RELU, SIGMOID, SOFTMAX
from kpcore.layers.linear import ADD, CONCATENATE, LINEAR
from kpcore.layers.losses import SOFTMAX_CROSS_ENTROPY
from kpcore.layers.normalization import BATCH_NORM, GROUP_NORM
from kpcore.pooling import GATHER, INTERPOLATE, NEAREST_UPSAMPLE, NEIGHBOR_REDUCE, SEGMENT_REDUCE
from kpcore.subsampling import OP as GRID_SUBSAMPLE

OPS = {
    op.name: op
    for op in (
        *(GRID_SUBSAMPLE, KPCONV, KPCONVX, FITTING, REPULSION),
        *(NEIGHBOR_REDUCE, NEAREST_UPSAMPLE, INTERPOLATE, SEGMENT_REDUCE, GATHER),
        *(LINEAR, BATCH_NORM, GROUP_NORM, LEAKY_RELU, RELU, SIGMOID, SOFTMAX, DROPOUT, CONCATENATE, ADD),
        SOFTMAX_CROSS_ENTROPY,
    )
}

# Public functions without gradients, which no framework traces: their sizes depend on values.
EAGER = ("build_pyramid", "farthest_point_sampling", "kernel_points", "knn_search", "radius_search")

_SETTINGS = {"float": (float, int, np.floating, np.integer), "int": (int, np.integer), "bool": (bool,), "str": (str,)}
_NOUNS = {"float": "a number", "int": "an integer", "bool": "True or False", "str": "a string"}


def kinds(public):
    """{name: (kind, whether it may be None)} of the arguments of a public function, from its annotations."""
    found = {}
    for name, parameter in inspect.signature(public).parameters.items():
        kind, _, none = str(parameter.annotation).partition(" | ")
        if kind not in ("Array", "Neighbors", *_SETTINGS) or none not in ("", "None"):
            raise TypeError(
                f"{name}: expected an annotation in {public.__name__} that is Array, Neighbors, float, int, bool or "
                f"str, with or without | None, got {parameter.annotation}"
            )
        found[name] = kind, none == "None"
    return found


def binder(public):
    """A function that puts the arguments of a call, args and kwargs, in a dict by name, defaults filled in.

    A seventh of the time of `inspect.Signature.bind`, which would be a third of what a call costs.
    """
    signature = inspect.signature(public)
    parameters = signature.parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    positional = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def bind(args, kwargs):
        given = dict(zip(positional, args))  # noqa: B905 - more of them are found below
        bound = {**defaults, **given, **kwargs}
        wrong = len(args) > len(positional) or len(bound) != len(parameters)
        for name in kwargs:
            wrong = wrong or name in given or name not in parameters
        if wrong:
            signature.bind(*args, **kwargs)  # raises what Python does for such a call
        return bound

    return bind


def setting(name, kind, optional, value):
    """An argument that is no array, as a plain float, int, bool, str or None."""
    if value is None and optional:
        return None
    if not isinstance(value, _SETTINGS[kind]):
        raise TypeError(f"{name}: expected {_NOUNS[kind]}{' or None' * optional}, got {type(value).__name__}")
    return float(value) if kind == "float" else int(value) if kind == "int" else value

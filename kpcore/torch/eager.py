"""What is not traced, on torch tensors: searches and all else whose sizes depend on values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import kpcore
from kpcore.backends import devices
from kpcore.ops import Op
from kpcore.torch import internals
from kpcore.torch.ops import (
    NO_JVP,
    NO_SECOND,
    NO_VMAP,
    checked,
    numpy_dtype,
    on_arrays,
    on_stream_of,
    to_array,
    to_tensor,
)


def eager(public: Callable[..., Any]) -> Callable[..., Any]:
    """A function of kpcore that takes and returns tensors where that one has arrays."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)

        def computed():
            for name, value in given.arguments.items():
                given.arguments[name] = _given(name, value)
            return _returned(on_arrays(public, *given.args, **given.kwargs))

        return on_stream_of(_first_tensor(given.arguments), computed)

    return function


def differentiable(op: Op, public: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose shapes depend on values: its public function on tensors, with gradients."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        for name, value in arguments.items():
            if isinstance(value, (torch.Tensor, np.ndarray)):
                checked(op, name, value)
        tensors = [arguments[name] for name in op.diff]

        def computed():
            made = _Made()
            differentiated = internals.apply(_Forward, op, arguments, made, *tensors)
            if op.field is None:
                return differentiated
            fields = {name: _returned(value) for name, value in made.out._asdict().items() if name != op.field}
            return type(made.out)(**fields, **{op.field: differentiated})

        return on_stream_of(_first_tensor(arguments), computed)

    return function


class _Made:
    """What the forward pass of an operator leaves besides its differentiable result."""

    __slots__ = ("call", "out", "saved")


class _OfAnOperator(torch.autograd.Function):
    """Refuses transforms that are not supported, naming the operator."""

    @staticmethod
    def vmap(info, in_dims, op, *_):
        raise NotImplementedError(f"{op.name}: {NO_VMAP}")

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(f"{ctx.op.name}: {NO_JVP}")


class _Forward(_OfAnOperator):
    @staticmethod
    def forward(op, arguments, made, *tensors):
        arrays = {
            name: to_array(name, value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        made.call = on_arrays(op.check, **arrays)
        made.out, made.saved = on_arrays(op.compute_and_keep, made.call)
        out = made.out if op.field is None else getattr(made.out, op.field)
        return None if out is None else to_tensor(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, arguments, ctx.made, *_ = inputs
        ctx.save_for_backward(*[value for value in arguments.values() if isinstance(value, torch.Tensor)])

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors  # noqa: B018 - raises if one of them was changed in place
        needed = tuple(name for name, need in zip(ctx.op.diff, ctx.needs_input_grad[3:], strict=True) if need)
        found = iter(internals.apply(_Backward, ctx.op, ctx.made, needed, grad))
        return None, None, None, *(next(found) if need else None for need in ctx.needs_input_grad[3:])


class _Backward(_OfAnOperator):
    @staticmethod
    def forward(op, made, needed, grad):
        def gradients():
            array = devices.contiguous(to_array(f"gradient of {op.name}", grad))
            found = op.gradients(made.call, made.saved, array, frozenset(needed))
            return tuple(to_tensor(found[name]) for name in needed)

        return on_stream_of(grad, gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.op.name}: {NO_SECOND}")


class KDTree(kpcore.KDTree):
    __doc__ = kpcore.KDTree.__doc__
    __slots__ = ()
    __init__ = eager(kpcore.KDTree.__init__)
    radius_search = eager(kpcore.KDTree.radius_search)
    knn_search = eager(kpcore.KDTree.knn_search)


class GridIndex(kpcore.GridIndex):
    __doc__ = kpcore.GridIndex.__doc__
    __slots__ = ()
    __init__ = eager(kpcore.GridIndex.__init__)
    radius_search = eager(kpcore.GridIndex.radius_search)
    knn_search = eager(kpcore.GridIndex.knn_search)


def _first_tensor(arguments):
    """Which says where all are: one of the arguments, or the points of an index on a GPU; None without."""
    index = arguments.get("self")
    if index is not None and hasattr(index, "_points") and not isinstance(index._points, np.ndarray):
        return to_tensor(index._points)
    return next((a for a in arguments.values() if isinstance(a, torch.Tensor)), None)


def _given(name, value):
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return to_array(name, checked(None, name, value))
    if isinstance(value, torch.dtype):
        return numpy_dtype(name, value)
    if isinstance(value, dict):
        return {key: _given(key, v) for key, v in value.items()}
    return value


def _returned(value):
    if devices.is_array(value):
        return to_tensor(value)
    if isinstance(value, tuple):
        values = map(_returned, value)
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value

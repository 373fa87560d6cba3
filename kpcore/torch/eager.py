"""What is not traced, on torch tensors: searches and all else whose sizes depend on values."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import torch
from torch.autograd.function import once_differentiable

import kpcore
from kpcore import _array
from kpcore.torch.ops import checked, numpy_dtype, on_stream_of, to_array, to_tensor


def eager(public):
    """A function of kpcore that takes and returns tensors where that one has arrays."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)

        def computed():
            for name, value in given.arguments.items():
                given.arguments[name] = _given(None, name, value)
            return _returned(public(*given.args, **given.kwargs))

        return on_stream_of(_first_tensor(given.arguments), computed)

    return function


def differentiable(op, public):
    """An operator whose shapes depend on values: its public function on tensors, with gradients."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        tensors = [arguments[name] for name in op.diff]

        def computed():
            given = {name: _given(op, name, value) for name, value in arguments.items()}
            outs = []
            differentiated = _Function.apply(op, given, outs, *tensors)
            if op.field is None:
                return differentiated
            (out,) = outs
            fields = {name: _returned(value) for name, value in out._asdict().items() if name != op.field}
            return type(out)(**fields, **{op.field: differentiated})

        return on_stream_of(_first_tensor(arguments), computed)

    return function


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, arguments, outs, *tensors):
        out, saved = op.recorded(arguments)
        outs.append(out)
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.arguments, ctx.saved = op, arguments, saved
        out = out if op.field is None else getattr(out, op.field)
        return None if out is None else to_tensor(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.saved_tensors  # noqa: B018 - raises if one of them was changed in place
        needs = dict(zip(ctx.op.diff, ctx.needs_input_grad[3:], strict=True))
        needed = frozenset(name for name, need in needs.items() if need)

        def gradients():
            found = ctx.op.gradients(ctx.arguments, ctx.saved, _array.contiguous(to_array("grad", grad)), needed)
            return (None, None, None, *(to_tensor(found[name]) if need else None for name, need in needs.items()))

        return on_stream_of(grad, gradients)


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


def _given(op, name, value):
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return to_array(name, checked(op, name, value))
    if isinstance(value, torch.dtype):
        return numpy_dtype(name, value)
    if isinstance(value, dict):
        return {key: _given(op, key, v) for key, v in value.items()}
    return value


def _returned(value):
    if _array.is_array(value):
        return to_tensor(value)
    if isinstance(value, tuple):
        values = map(_returned, value)
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value

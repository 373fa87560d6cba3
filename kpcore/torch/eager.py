"""Functions on torch tensors that torch does not trace, because the sizes of their results depend on values."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import kpcore
from kpcore.backends import devices
from kpcore.ops import ITERABLES, Op
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
    """Wrap a function of kpcore that has no gradient: tensors take the place of its arrays."""
    signature = inspect.signature(public)
    positional = tuple(name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    @functools.wraps(public)
    def function(*args, **kwargs):
        arguments = {**dict(zip(positional, args)), **kwargs}  # noqa: B905 - too many args are noticed below
        if len(arguments) < len(args) + len(kwargs):
            signature.bind(*args, **kwargs)  # raises the TypeError that Python raises for such a call

        def compute():
            # The defaults are not filled in, and the signature not bound, which would take as long as a small search.
            values = [_to_arrays(name, value) for name, value in arguments.items()]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            return _to_tensors(on_arrays(public, *values[: len(args)], **named))

        return on_stream_of(_first_tensor(arguments), compute)

    return function


def differentiable(op: Op, public: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a differentiable operator whose shapes depend on values: tensors take the place of arrays, with autograd."""
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

        def compute():
            record = _ForwardRecord()
            differentiable = internals.apply(_Forward, op, arguments, record, *tensors)
            if op.field is None:
                return differentiable
            fields = {name: _to_tensors(value) for name, value in record.out._asdict().items() if name != op.field}
            return type(record.out)(**fields, **{op.field: differentiable})

        return on_stream_of(_first_tensor(arguments), compute)

    return function


class _ForwardRecord:
    """The checked call, the output and the saved arrays of a forward pass, kept for the backward pass."""

    __slots__ = ("call", "out", "saved")


class _OperatorFunction(torch.autograd.Function):
    """Base of the autograd functions: transforms that are not supported raise an error that names the operator."""

    @staticmethod
    def vmap(info, in_dims, op, *_):
        raise NotImplementedError(f"{op.name}: {NO_VMAP}")

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(f"{ctx.op.name}: {NO_JVP}")


class _Forward(_OperatorFunction):
    @staticmethod
    def forward(op, arguments, record, *tensors):
        arrays = {
            name: to_array(name, value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        record.call = on_arrays(op.check, **arrays)
        record.out, record.saved = on_arrays(op.compute_and_keep, record.call)
        out = record.out if op.field is None else getattr(record.out, op.field)
        return None if out is None else to_tensor(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, arguments, ctx.record, *_ = inputs
        ctx.save_for_backward(*[value for value in arguments.values() if isinstance(value, torch.Tensor)])

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors  # noqa: B018 - torch raises here if one of them was changed in place
        needed = tuple(name for name, need in zip(ctx.op.diff, ctx.needs_input_grad[3:], strict=True) if need)
        gradients = iter(internals.apply(_Backward, ctx.op, ctx.record, needed, grad))
        return None, None, None, *(next(gradients) if need else None for need in ctx.needs_input_grad[3:])


class _Backward(_OperatorFunction):
    @staticmethod
    def forward(op, record, needed, grad):
        def compute():
            array = devices.contiguous(to_array(f"gradient of {op.name}", grad))
            gradients = op.gradients(record.call, record.saved, array, frozenset(needed))
            return tuple(to_tensor(gradients[name]) for name in needed)

        return on_stream_of(grad, compute)

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
    """A tensor on the device of the call: the points of an index on a GPU, or the first tensor argument, or None."""
    index = arguments.get("self")
    if index is not None and hasattr(index, "stored_points") and not isinstance(index.stored_points, np.ndarray):
        return to_tensor(index.stored_points)
    for name in arguments.keys() & ITERABLES:  # the first of them is taken out and put back
        values = iter(arguments[name])
        first = list(itertools.islice(values, 1))
        arguments[name] = itertools.chain(first, values)
        if first and isinstance(first[0], torch.Tensor):
            return first[0]
    return next((a for a in arguments.values() if isinstance(a, torch.Tensor)), None)


def _to_arrays(name, value):
    """Replace tensors and torch dtypes by arrays and NumPy dtypes, also in a dict, and one by one in an iterable."""
    if name in ITERABLES and not isinstance(value, (torch.Tensor, np.ndarray)):
        return (to_array(name, checked(None, name, each)) for each in value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return to_array(name, checked(None, name, value))
    if isinstance(value, torch.dtype):
        return numpy_dtype(name, value)
    if isinstance(value, dict):
        return {key: _to_arrays(key, v) for key, v in value.items()}
    return value


def _to_tensors(value):
    """Replace arrays by tensors, also in tuples, named tuples, pyramids and kernel maps."""
    if devices.is_array(value):
        return to_tensor(value)
    if isinstance(value, kpcore.KernelMap):
        return value.converted(to_tensor)
    if isinstance(value, tuple):
        values = map(_to_tensors, value)
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value

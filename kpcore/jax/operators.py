"""The table of operators on JAX arrays: each row a `jax.custom_vjp` of two calls through XLA's FFI."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from kpcore.backends import checks
from kpcore.jax import ffi
from kpcore.neighbors import Neighbors, list_for_one_call, new_list
from kpcore.ops import OPS, Call, Op, Shaped, binder, kinds, setting

# ---- arrays divided among several devices


def _varying(array):
    """The axes of the mesh over which it differs from device to device, inside a shard_map that checks that."""
    if not hasattr(jax, "typeof"):  # before JAX 0.6, whose shard_map refuses every FFI call unless told not to check
        return frozenset()
    kind = jax.typeof(array)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # since JAX 0.10, before


def _unreduced(array):
    """Whether it is still to be summed over devices: JAX keeps that in two places, depending on its version."""
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    parts = getattr(getattr(kind, "sharding", None), "spec", None), getattr(kind, "manual_axis_type", None)
    return any(getattr(part, "unreduced", None) for part in parts)


def _made_varying(axes, array):
    missing = tuple(sorted(axes - _varying(array), key=str))
    if not missing:
        return array
    return jax.lax.pcast(array, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, missing)


def _placed_like(primal, gradient):
    """The gradient as the primal is divided among the devices of a mesh with Explicit axes."""
    if not hasattr(jax.sharding, "reshard"):  # before JAX 0.7
        return gradient
    sharding = jax.typeof(primal).sharding
    return gradient if jax.typeof(gradient).sharding == sharding else jax.sharding.reshard(gradient, sharding)


class _Traced(NamedTuple):
    """What is known when tracing: the operator and its settings, (name, value) pairs."""

    op: str
    settings: tuple


def define(op: Op, public: Callable[..., Any]) -> Callable[..., Any]:
    """The public function for JAX arrays."""
    of_argument, bind = kinds(public), binder(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound, arrays, settings = bind(args, kwargs), {}, []
        for name, (kind, optional) in of_argument.items():
            value = bound[name]
            if kind == "Array":
                arrays[name] = _checked(name, value, optional)
            elif kind != "Neighbors":
                settings.append((name, setting(name, kind, optional, value)))
            elif isinstance(value, Neighbors) or (value is None and optional):
                arrays[name] = value
            else:
                raise TypeError(f"{name}: expected kpcore.Neighbors, got {type(value).__name__}")
        out = _called(_Traced(op.name, tuple(settings)), arrays)
        if op.record is None:
            return out
        others = {field: jax.lax.stop_gradient(a) for field, a in out._asdict().items() if field != op.field}
        return out._replace(**others)

    return function


# In a jit, because a shard_map that is not jitted refuses a custom_vjp with symbolic zeros.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _called(call, arrays):
    # All arguments vary over the axes that any of them varies over: an argument that is made to do so gets the sum of
    # the gradients on all devices, which its own rule could not know of.
    axes = frozenset().union(*map(_varying, jax.tree.leaves(arrays)))
    return _differentiable(call, jax.tree.map(functools.partial(_made_varying, axes), arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call, arrays):
    return _forward(call, arrays)[0]


def _forward(call, arrays):
    """(out, saved)"""
    op = OPS[call.op]
    _check(op, call, arrays)
    shaped = jax.tree.map(lambda a: Shaped(tuple(a.shape), np.dtype(a.dtype)), arrays)
    outputs = _ffi_call(call, "forward", tuple(op.result(Call(**shaped, **dict(call.settings)))), arrays, [])
    if op.record is None:
        return outputs[0], outputs[1:]
    num_outputs = len(op.record._fields)
    return op.record(*outputs[:num_outputs]), outputs[num_outputs:]


def _check(op, call, arrays):
    """The operator's checks of dtypes and shapes, made on arrays that have no values: their memory is never touched."""
    if not all(isinstance(size, int) for a in jax.tree.leaves(arrays) for size in a.shape):
        return  # or sizes are those that jax.export leaves open: what is wrong is found when the call runs
    empty = {}
    for name, value in arrays.items():
        if isinstance(value, Neighbors):
            for part, shape in ("index", "E"), ("row_splits", "M+1"):
                checks.array(f"{name}.{part}", _empty(getattr(value, part)), shape, checks.INTEGERS, {})
            index, row_splits = np.empty(value.index.shape, np.int32), np.empty(value.row_splits.shape, np.int64)
            empty[name] = new_list(index, row_splits, value.num_points, None, value.width)
        else:
            empty[name] = None if value is None else _empty(value, is_splits(name, value))
    try:
        op.check(**empty, **dict(call.settings))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(".astype(numpy.", ".astype(jnp.")) from None


def _empty(array, as_int64=False):
    return np.empty(array.shape, np.int64 if as_int64 else array.dtype)


def is_splits(name: str, array: np.ndarray | jax.Array) -> bool:
    """Whether they are `row_splits` as they are where jax_enable_x64 is off."""
    return name.endswith("row_splits") and array.dtype == np.int32


def _forward_rule(call, primals):
    op, arrays = OPS[call.op], custom_vjp_primal_tree_values(primals)
    for name, primal in primals.items():
        if name not in op.diff and any(
            p.perturbed and jnp.issubdtype(p.value.dtype, jnp.floating) for p in jax.tree.leaves(primal)
        ):
            raise TypeError(f"{name}: {op.name} cannot be differentiated in it, only in {', '.join(op.diff)}")
    out, saved = _forward(call, arrays)
    needs = [arrays[name] is not None and primals[name].perturbed for name in op.diff]
    # As the size of an empty array: of a function that is traced once and differentiated in several ways JAX keeps one
    # structure of what is kept, that of the last way, and flags in it would be those of another gradient.
    return out, (arrays, saved, jnp.empty((sum(need << bit for bit, need in enumerate(needs)), 0)))


def _backward_rule(call, kept, grad):
    op, (arrays, saved, flags) = OPS[call.op], kept
    needs = tuple(name for bit, name in enumerate(op.diff) if flags.shape[0] >> bit & 1)
    if op.field is not None:
        grad = getattr(grad, op.field)
    gradients = dict.fromkeys(arrays)
    gradients.update({name: _zero_like(arrays[name]) for name in op.diff if arrays[name] is not None})
    if needs and not isinstance(grad, SymbolicZero):
        results = tuple((arrays[name].shape, arrays[name].dtype) for name in needs)
        found = _ffi_call(call, needs, results, arrays, [*saved, grad])
        gradients.update({n: _placed_like(arrays[n], g) for n, g in zip(needs, found, strict=True)})
    return (gradients,)


def _zero_like(array):
    """In place of None, because JAX before 0.8 expects results of one structure, too."""
    return SymbolicZero((jax.typeof if hasattr(jax, "typeof") else jax.core.get_aval)(array).to_tangent_aval())


_differentiable.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _ffi_call(call, what, results, arrays, more):
    """`what` is "forward", or the names whose gradients are asked for; `results` are pairs of shape and dtype."""
    names, buffers, lists = [], [], {}
    for name, value in arrays.items():
        if isinstance(value, Neighbors):
            transposed = None if what == "forward" else value.stored_transposed
            lists[name] = [transposed is not None, value.num_points, value.width]
            buffers += [value.index, value.row_splits]
            if transposed is not None:
                buffers += [transposed.stored_index, transposed.stored_row_splits]
        elif value is not None:
            names.append(name)
    buffers += [arrays[name] for name in names]
    absent = [name for name, value in arrays.items() if value is None]
    text = json.dumps([call.op, what, dict(call.settings) | dict.fromkeys(absent), lists, names])
    results = [jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype)) for shape, dtype in results]
    outputs = jax.ffi.ffi_call("kpcore", results, vmap_method="sequential")(*buffers, *more, call=text)
    axes = frozenset().union(*map(_varying, [*buffers, *more]))  # which ffi_call drops since JAX 0.8
    return [_made_varying(axes, output) for output in outputs]


@_ffi_call.defjvp
def _second_derivatives(call, *_):
    raise NotImplementedError(f"{call.op}: second derivatives are not supported")


def _checked(name, value, optional):
    if value is None and optional:
        return value
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected a JAX or NumPy array{' or None' * optional}, got {type(value).__name__}")
    if not isinstance(value.dtype, np.dtype):
        raise TypeError(f"{name}: expected an array of numbers, got {value.dtype}")
    if isinstance(value, jax.Array) and _unreduced(value):
        raise TypeError(f"{name}: expected an array, got a part of a sum over devices; sum it with jax.lax.psum")
    if value.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise TypeError(
            f"{name}: expected float32, because jax_enable_x64 is off, got float64; turn it on with "
            "jax.config.update('jax_enable_x64', True)"
        )
    if value.dtype == np.int64 and not jax.config.jax_enable_x64 and np.any(value != value.astype(np.int32)):
        raise ValueError(f"{name}: expected values that int32 can hold, because jax_enable_x64 is off, got others")
    return value


# ---- what XLA calls


class _Text(NamedTuple):
    """A decoded text."""

    op: object
    needs: tuple | None  # None: forward
    settings: dict
    lists: dict
    names: list
    num_buffers: int  # of the arguments; what was saved, and the gradient, follow


@functools.lru_cache(maxsize=4096)
def _decoded(text):
    name, what, settings, lists, names = json.loads(text)
    num_buffers = len(names) + sum(4 if transposed else 2 for transposed, _, _ in lists.values())
    return _Text(OPS[name], None if what == "forward" else frozenset(what), settings, lists, names, num_buffers)


def _compute(text, inputs):
    """The arrays that a call returns."""
    call = _decoded(text)
    op, arguments, given = call.op, dict(call.settings), iter(inputs)
    for name, (transposed, num_points, width) in call.lists.items():
        index, row_splits = next(given), next(given)
        back = (next(given), next(given)) if transposed else None
        arguments[name] = list_for_one_call(index, row_splits, num_points, width, back)
    for name in call.names:
        array = next(given)
        arguments[name] = array.astype(np.int64) if is_splits(name, array) else array
    if call.needs is None:
        out, saved = op.compute(op.check(**arguments))
        return (*(out if op.record is not None else (out,)), *saved)
    *saved, grad = given
    return op.gradients(op.check(**arguments), tuple(saved), grad, call.needs).values()


ffi.register(_compute)

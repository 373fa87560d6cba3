"""The operators of kpcore on JAX arrays: each `Op` becomes a `jax.custom_vjp` of two calls through XLA's FFI."""

import functools
import json
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from kpcore.backends import checks
from kpcore.jax import ffi
from kpcore.neighbors import Neighbors, list_for_one_call, new_list
from kpcore.ops import OPS, Call, Op, Shaped, arrays_or_numbers, binder, kinds, setting

# ---- arrays divided among several devices


def _varying(array):
    """The mesh axes over which an array differs between devices, as a shard_map with checks tracks them."""
    if not hasattr(jax, "typeof"):  # JAX 0.5, whose shard_map accepts FFI calls only without checks
        return frozenset()
    kind = jax.typeof(array)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # from 0.10 on, before


def _unreduced(array):
    """Whether an array still has to be summed over devices; versions of JAX store this in one of two places."""
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    parts = getattr(getattr(kind, "sharding", None), "spec", None), getattr(kind, "manual_axis_type", None)
    return any(getattr(part, "unreduced", None) for part in parts)


def _made_varying(axes, array):
    """Mark an array as varying over these mesh axes."""
    missing = tuple(sorted(axes - _varying(array), key=str))
    if not missing:
        return array
    return jax.lax.pcast(array, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, missing)


def _placed_like(primal, gradient):
    """Shard a gradient as its primal, which JAX requires in a mesh with Explicit axes."""
    if not hasattr(jax.sharding, "reshard"):  # before JAX 0.7, which has no gradients in such a mesh
        return gradient
    sharding = jax.typeof(primal).sharding
    return gradient if jax.typeof(gradient).sharding == sharding else jax.sharding.reshard(gradient, sharding)


class _StaticCall(NamedTuple):
    """The part of a call that is constant while JAX traces: the operator's name and its settings, (name, value)."""

    op: str
    settings: tuple


def define(op: Op, public: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the public function of an operator for JAX arrays."""
    argument_kinds, bind, arrays_or_numbers_of_op = kinds(public), binder(public), arrays_or_numbers(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound, arrays, settings = bind(args, kwargs), {}, []
        for name in arrays_or_numbers_of_op:
            bound[name] = _array_of_number(name, bound[name], bound["points"])
        for name, (kind, optional) in argument_kinds.items():
            value = bound[name]
            if kind == "Array":
                arrays[name] = checked(name, value, optional)
            elif kind != "Neighbors":
                settings.append((name, setting(name, kind, optional, value)))
            elif isinstance(value, Neighbors) or (value is None and optional):
                arrays[name] = value
            else:
                raise TypeError(f"{name}: expected kpcore.Neighbors, got {type(value).__name__}")
        out = _run(_StaticCall(op.name, tuple(settings)), arrays)
        if op.record is None:
            return out
        others = {field: jax.lax.stop_gradient(a) for field, a in out._asdict().items() if field != op.field}
        return out._replace(**others)

    return function


def _array_of_number(name, value, points):
    """A number as an array () with the dtype of the points, a number that JAX traces too; arrays as they are."""
    if getattr(value, "weak_type", False):
        return value.astype(points.dtype)
    if isinstance(value, numbers.Real) and isinstance(getattr(points, "dtype", None), np.dtype):
        return jnp.full((), checks.length(name, value, points.dtype), points.dtype)
    return value


# Under jit, because a shard_map outside of jit refuses a custom_vjp with symbolic zeros.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(call, arrays):
    # If one argument varies over a mesh axis, all are marked as varying over it. The transpose of that mark sums the
    # gradient of an argument that is the same on all devices, which the vjp of the operator could not do.
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
    """Run the operator's checks of dtypes and shapes while tracing, on uninitialised arrays whose memory they never
    read."""
    if not all(isinstance(size, int) for a in jax.tree.leaves(arrays) for size in a.shape):
        return  # symbolic sizes of jax.export; the checks are made when the call runs
    empty = {}
    for name, value in arrays.items():
        if isinstance(value, Neighbors):
            for part, shape in ("index", "E"), ("row_splits", "M+1"):
                checks.array(f"{name}.{part}", _empty(getattr(value, part)), shape, checks.INTEGERS, {})
            index, row_splits = np.empty(value.index.shape, np.int32), np.empty(value.row_splits.shape, np.int64)
            empty[name] = new_list(index, row_splits, value.num_points, None, value.width)
        else:
            empty[name] = None if value is None else _empty(value, is_int32_splits(name, value))
    try:
        op.check(**empty, **dict(call.settings))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(".astype(numpy.", ".astype(jnp.")) from None


def _empty(array, as_int64=False):
    return np.empty(array.shape, np.int64 if as_int64 else array.dtype)


def is_int32_splits(name: str, array: np.ndarray | jax.Array) -> bool:
    """Whether an array is `row_splits` in int32, the dtype they have in JAX unless jax_enable_x64 is on."""
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
    # Which gradients are needed is passed on as the size of an empty array. A function that is traced once may be
    # differentiated several times with respect to different arguments; JAX then keeps only the last pytree structure
    # of the residuals, so flags that are part of the structure would be those of another gradient.
    return out, (arrays, saved, jnp.empty((sum(need << bit for bit, need in enumerate(needs)), 0)))


def _backward_rule(call, residuals, grad):
    op, (arrays, saved, flags) = OPS[call.op], residuals
    needs = tuple(name for bit, name in enumerate(op.diff) if flags.shape[0] >> bit & 1)
    if op.field is not None:
        grad = getattr(grad, op.field)
    gradients = dict.fromkeys(arrays)
    gradients.update({name: _zero_like(arrays[name]) for name in op.diff if arrays[name] is not None})
    if needs and not isinstance(grad, SymbolicZero):
        results = tuple((arrays[name].shape, arrays[name].dtype) for name in needs)
        computed = _ffi_call(call, needs, results, arrays, [*saved, grad])
        gradients.update({name: _placed_like(arrays[name], g) for name, g in zip(needs, computed, strict=True)})
    return (gradients,)


def _zero_like(array):
    """A zero gradient for an array; JAX before 0.8 does not accept None for it."""
    return SymbolicZero((jax.typeof if hasattr(jax, "typeof") else jax.core.get_aval)(array).to_tangent_aval())


_differentiable.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _ffi_call(call, what, results, arrays, more):
    """Call the FFI target with the arrays, then `more` (saved arrays and the gradient of the output).

    `what` is "forward" or the names of the arguments whose gradients are needed. `results` are (shape, dtype) pairs.
    """
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
    axes = frozenset().union(*map(_varying, [*buffers, *more]))  # ffi_call drops these marks from JAX 0.8 on
    return [_made_varying(axes, output) for output in outputs]


@_ffi_call.defjvp
def _second_derivatives(call, *_):
    raise NotImplementedError(f"{call.op}: second derivatives are not supported")


def checked(name: str, value: Any, optional: bool) -> Any:
    """Check an array argument without looking at its shape, which the operator's checks do."""
    if value is None and optional:
        return value
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected a JAX or NumPy array{' or None' * optional}, got {type(value).__name__}")
    if not isinstance(value.dtype, np.dtype):
        raise TypeError(f"{name}: expected an array of numbers, got {value.dtype}")
    if isinstance(value, jax.Array) and _unreduced(value):
        raise TypeError(f"{name}: expected an array, got one that is not summed over devices yet; use jax.lax.psum")
    if value.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise TypeError(
            f"{name}: expected float32, because jax_enable_x64 is off, got float64; turn it on with "
            "jax.config.update('jax_enable_x64', True)"
        )
    if value.dtype == np.int64 and not jax.config.jax_enable_x64 and np.any(value != value.astype(np.int32)):
        raise ValueError(f"{name}: expected values that int32 can hold, because jax_enable_x64 is off, got larger ones")
    return value


# ---- computing a call of XLA


class _Description(NamedTuple):
    """A call as its text describes it."""

    op: Op
    needs: frozenset[str] | None  # names of the arguments whose gradients are needed; None for the forward pass
    settings: dict[str, Any]
    lists: dict[str, list[Any]]  # {argument: [whether its transpose is passed, num_points, width]}
    names: list[str]  # of the arrays, which follow the lists; then come saved arrays and the gradient of the output


@functools.lru_cache(maxsize=4096)
def decoded(text: bytes) -> _Description:
    """Decode the text of a call, which `_ffi_call` wrote."""
    name, what, settings, lists, names = json.loads(text)
    return _Description(OPS[name], None if what == "forward" else frozenset(what), settings, lists, names)


def _compute(text, inputs):
    """The results of a call: outputs and saved arrays, or gradients."""
    call = decoded(text)
    op, arguments, arrays = call.op, dict(call.settings), iter(inputs)
    for name, (transposed, num_points, width) in call.lists.items():
        index, row_splits = next(arrays), next(arrays)
        back = (next(arrays), next(arrays)) if transposed else None
        arguments[name] = list_for_one_call(index, row_splits, num_points, width, back)
    for name in call.names:
        array = next(arrays)
        arguments[name] = array.astype(np.int64) if is_int32_splits(name, array) else array
    if call.needs is None:
        out, saved = op.compute(op.check(**arguments))
        return (*(out if op.record is not None else (out,)), *saved)
    *saved, grad = arrays
    return op.gradients(op.check(**arguments), tuple(saved), grad, call.needs).values()


ffi.register(_compute)

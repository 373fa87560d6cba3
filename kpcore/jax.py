"""kpcore on JAX arrays: the same names as in `kpcore`, under jit, grad and vmap, on the CPU.

Differentiable operators are calls through XLA's foreign function interface (FFI), each a `jax.custom_vjp` whose
gradient is another such call. Searches and `grid_subsample`, whose results have sizes that depend on values, take and
return JAX arrays outside of jit. `kpcore.Neighbors` is a pytree. docs/frameworks.md shows all of it, and the limits.

One C function is registered with XLA, made by ctypes from `_handler`. XLA calls it with the addresses of a call's
buffers and one text, which says what to do: operator, settings, and what each buffer is. As the text says it all, a
compiled program can be kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ModuleNotFoundError("kpcore.jax needs JAX: pip install kpcore[jax]", name="jax") from None

import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

import kpcore
from kpcore import _array, _cpu
from kpcore.autodiff import Shaped
from kpcore.neighbors import TO_HOST, Neighbors
from kpcore.nn.networks import Result
from kpcore.ops import OPS, binder, kinds, setting
from kpcore.pyramid import Level, Pyramid
from kpcore.rows import BatchNormed
from kpcore.sampling import Sampled
from kpcore.subsampling import Subsampled

# ---- Neighbors as a pytree


def _flatten(neighbors):
    row_splits = neighbors.row_splits
    if type(row_splits).__module__.split(".")[0] == "cupy":
        raise TypeError(
            "neighbors: expected a list on the CPU, got one of CuPy's arrays; move it with neighbors.to('cpu')"
        )
    if isinstance(row_splits, np.ndarray) and row_splits.dtype == np.int64 and not jax.config.jax_enable_x64:
        if len(row_splits) and row_splits[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"neighbors: expected at most 2**31 - 1 pairs unless jax_enable_x64 is on, got {row_splits[-1]}"
            )
        row_splits = row_splits.astype(np.int32)
    transposed = None
    if neighbors.carries_transpose:
        transposed = neighbors.transpose() if neighbors._transposed is None else neighbors._transposed
    leaves = neighbors.index, row_splits, neighbors.distance, transposed
    return leaves, (neighbors.num_points, neighbors.width, neighbors.carries_transpose)


def _unflatten(sizes, leaves):
    index, row_splits, distance, transposed = leaves
    num_points, width, carries_transpose = sizes
    return Neighbors._rebuilt(index, row_splits, num_points, distance, width, transposed, carries_transpose)


def _to_host(name, array):
    """For what looks at the values of a list."""
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{name}: expected an array outside of jit, grad and vmap, got {array}; a list that is traced has no values"
        )
    if any(device.platform != "cpu" for device in array.devices()):
        raise TypeError(f"{name}: expected an array on the CPU, got one on {array.device}; {_ELSEWHERE}")
    return np.asarray(array)


TO_HOST[jax.Array] = _to_host
jax.tree_util.register_pytree_node(Neighbors, _flatten, _unflatten)
jax.tree_util.register_pytree_node(Pyramid, lambda levels: (tuple(levels), None), lambda _, levels: Pyramid(levels))


def _register_with_export():
    """For jax.export, which keeps a program with the structure of what it takes and gives."""
    export.register_pytree_node_serialization(
        Neighbors,
        serialized_name="kpcore.Neighbors",
        serialize_auxdata=lambda sizes: json.dumps(sizes).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )
    export.register_pytree_node_serialization(
        Pyramid,
        serialized_name="kpcore.Pyramid",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
    )
    for record in Level, BatchNormed, Subsampled, Sampled, Result:
        export.register_namedtuple_serialization(record, serialized_name=f"kpcore.{record.__name__}")


try:
    from jax import export
except ModuleNotFoundError as error:  # JAX 0.5 does not install what its export imports
    if error.name != "absl":
        raise
else:
    _register_with_export()


# ---- several devices


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


# ---- the operators


class _Call(NamedTuple):
    """What is known when tracing: the operator and its settings, (name, value) pairs."""

    op: str
    settings: tuple


def define(op, public):
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
        out = _called(_Call(op.name, tuple(settings)), arrays)
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
    outputs = _ffi_call(call, "forward", tuple(op.result(**shaped, **dict(call.settings))), arrays, [])
    if op.record is None:
        return outputs[0], outputs[1:]
    num_outputs = len(op.record._fields)
    return op.record(*outputs[:num_outputs]), outputs[num_outputs:]


def _check(op, call, arrays):
    """The operator's checks of dtypes and shapes, made on arrays that have no values: their memory is never touched."""
    if op.check is None or not all(isinstance(size, int) for a in jax.tree.leaves(arrays) for size in a.shape):
        return  # or sizes are those that jax.export leaves open: what is wrong is found when the call runs
    empty = {}
    for name, value in arrays.items():
        if isinstance(value, Neighbors):
            for part, shape in ("index", "E"), ("row_splits", "M+1"):
                _array.array(f"{name}.{part}", _empty(getattr(value, part)), shape, _array.INTEGERS, {})
            index, row_splits = np.empty(value.index.shape, np.int32), np.empty(value.row_splits.shape, np.int64)
            empty[name] = Neighbors._trusted(index, row_splits, value.num_points, None, value.width)
        else:
            empty[name] = None if value is None else _empty(value, _is_splits(name, value))
    try:
        op.check(**empty, **dict(call.settings))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(".astype(numpy.", ".astype(jnp.")) from None


def _empty(array, as_int64=False):
    return np.empty(array.shape, np.int64 if as_int64 else array.dtype)


def _is_splits(name, array):
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
            transposed = None if what == "forward" else value._transposed
            lists[name] = [transposed is not None, value.num_points, value.width]
            buffers += [value.index, value.row_splits]
            if transposed is not None:
                buffers += [transposed._index, transposed._row_splits]
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
    raise NotImplementedError(f"{call.op}: second derivatives are not there")


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
        arguments[name] = Neighbors._borrowed(index, row_splits, num_points, width, back)
    for name in call.names:
        array = next(given)
        arguments[name] = array.astype(np.int64) if _is_splits(name, array) else array
    if call.needs is None:
        out, saved = op.forward(**arguments)
        return (*(out if op.record is not None else (out,)), *saved)
    *saved, grad = given
    return op.gradients(arguments, tuple(saved), grad, call.needs).values()


# The structs of XLA's C interface that a handler sees, named as there; all fields up to the last one used.


class _Buffers(ctypes.Structure):  # XLA_FFI_Args and XLA_FFI_Rets; read by _cpu.xla_arrays
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
    ]


class _ByteSpan(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), ("len", ctypes.c_size_t)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(ctypes.POINTER(_ByteSpan))),
    ]


class _ApiVersion(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _ApiVersion), ("traits", ctypes.c_uint32)]


class _Extension(ctypes.Structure):  # XLA_FFI_Metadata_Extension
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


class _ErrorArguments(ctypes.Structure):  # XLA_FFI_Error_Create_Args
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    ]


_create_error = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))


class _Api(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("version", _ApiVersion),
        ("internal", ctypes.c_void_p),
        ("create_error", _create_error),
    ]


class _Frame(ctypes.Structure):  # XLA_FFI_CallFrame
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


_METADATA, _EXECUTE, _INVALID_ARGUMENT = 1, 3, 3
_DTYPES = {  # by XLA_FFI_DataType
    1: np.dtype(np.bool_),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.uint8),
    7: np.dtype(np.uint16),
    8: np.dtype(np.uint32),
    9: np.dtype(np.uint64),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    15: np.dtype(np.complex64),
    16: np.dtype(jnp.bfloat16),
    18: np.dtype(np.complex128),
}


def _handle(answer, frame):
    address, frame = frame, _Frame.from_address(frame)
    if frame.extension_start and frame.extension_start.contents.type == _METADATA:
        version = frame.extension_start.contents.metadata.contents.version
        version.major, version.minor = _major, _minor
        return None
    if frame.stage != _EXECUTE:
        return None
    return answer(address, frame)


def _compute_on_host(address, frame):
    try:
        text = frame.attributes.attributes[0].contents
        inputs = _cpu.xla_arrays(address + _Frame.arguments.offset, _DTYPES, False)
        found = _compute(ctypes.string_at(text.ptr, text.len), inputs)
        for to, array in zip(_cpu.xla_arrays(address + _Frame.results.offset, _DTYPES, True), found, strict=True):
            if to.shape != np.shape(array):
                raise AssertionError(f"expected a result {to.shape}, got {np.shape(array)}")
            to[...] = array
    except BaseException as error:
        return _error(frame, f"{type(error).__name__}: {error}")
    return None


def _refuse(address, frame):
    return _error(frame, f"TypeError: {_ELSEWHERE}")


def _error(frame, message):
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message.encode(), _INVALID_ARGUMENT)
    return frame.api.contents.create_error(arguments)


_ELSEWHERE = (
    "kpcore.jax computes on the CPU: move what it gets there, jax.device_put(x, jax.devices('cpu')[0]), or use CuPy's "
    "or torch's arrays for the GPU"
)
_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_handlers = {
    "cpu": _Handler(functools.partial(_handle, _compute_on_host)),
    "CUDA": _Handler(functools.partial(_handle, _refuse)),
}


# The version of the interface is that of the jaxlib that is there; up to now none changed the fields above.
_header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
_major, _minor = (int(re.search(rf"define XLA_FFI_API_{part} (\d+)", _header)[1]) for part in ("MAJOR", "MINOR"))
if _major != 0:
    raise ImportError(f"kpcore.jax: expected a jaxlib with version 0 of XLA's FFI, got {_major}")
if hasattr(jax, "typeof") and not any(hasattr(jax.typeof(0.0), name) for name in ("vma", "manual_axis_type")):
    raise ImportError(
        "kpcore.jax: expected a JAX whose types say over which axes of a mesh an array varies, as those of 0.6 to 0.10 "
        f"do, got {jax.__version__}"
    )
for _platform, _handler in _handlers.items():
    _capsule = jax.ffi.pycapsule(ctypes.cast(_handler, ctypes.c_void_p).value)
    jax.ffi.register_ffi_target("kpcore", _capsule, platform=_platform)


# ---- what is not traced


def eager(public):
    """A function of kpcore that takes and returns JAX arrays where that one has NumPy's, outside of jit."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        device = next(filter(None, map(_chosen_device, jax.tree.leaves(given.arguments))), None)
        for name, value in given.arguments.items():
            given.arguments[name] = _given(public.__name__, name, value)
        return _returned(public(*given.args, **given.kwargs), device)

    return function


def _chosen_device(value):
    """The device that an array was put on; None for others, which JAX moves to where they are used."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.committed:
        return next(iter(value.devices())) if len(value.devices()) == 1 else None
    return None


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


def _given(function, name, value):
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: {function} is not traced; expected an array outside of jit, grad and vmap, got {value}"
        )
    if isinstance(value, dict):
        return {key: _given(function, key, v) for key, v in value.items()}
    if isinstance(value, jax.Array):
        if not value.is_fully_replicated:
            raise TypeError(
                f"{name}: {function} is not divided among devices; expected an array on one device, got parts on "
                f"{len(value.devices())}"
            )
        array = _to_host(name, value)
        return array.astype(np.int64) if _is_splits(name, array) else array
    return value


def _returned(value, device):
    if isinstance(value, np.ndarray):
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            narrow = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
            if value.dtype.kind == "f" or np.any(narrow != value):
                raise TypeError(f"expected a result without {value.dtype}, because jax_enable_x64 is off")
            value = narrow
        return jnp.asarray(value) if device is None else jax.device_put(value, device)
    if isinstance(value, tuple):
        values = [_returned(v, device) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value


_EAGER = ("build_pyramid", "farthest_point_sampling", "kernel_points", "knn_search", "radius_search")
for _name, _op in OPS.items():
    globals()[_name] = (eager if _op.result is None else functools.partial(define, _op))(getattr(kpcore, _name))
for _name in _EAGER:
    globals()[_name] = eager(getattr(kpcore, _name))

__all__ = ["GridIndex", "KDTree", "Neighbors", *_EAGER, *OPS]
__all__.sort()

"""The C function through which XLA calls kpcore, a Python function wrapped by ctypes.

XLA passes the addresses of the buffers of a call and one text that describes it: operator, settings, and the meaning of
each buffer. Because the text holds the description by value, a compiled program can be stored on disk.
"""

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpcore.backends import cpu

# Structs of XLA's C interface (xla/ffi/api/c_api.h), each with its fields up to the last one that is used here.


class _Buffers(ctypes.Structure):  # XLA_FFI_Args and XLA_FFI_Rets; read by cpu.xla_arrays
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


def _handle(execute, frame):
    """Handle one call by XLA, in any of its stages; ``execute(address, frame)`` computes in the last one."""
    address, frame = frame, _Frame.from_address(frame)
    if frame.extension_start and frame.extension_start.contents.type == _METADATA:
        version = frame.extension_start.contents.metadata.contents.version
        version.major, version.minor = _major, _minor
        return None
    if frame.stage != _EXECUTE:
        return None
    return execute(address, frame)


def _execute_on_cpu(compute, address, frame):
    """Compute and copy the results into XLA's buffers; an exception becomes an error of XLA."""
    try:
        text = frame.attributes.attributes[0].contents
        inputs = cpu.xla_arrays(address + _Frame.arguments.offset, _DTYPES, False)
        arrays = compute(ctypes.string_at(text.ptr, text.len), inputs)
        buffers = cpu.xla_arrays(address + _Frame.results.offset, _DTYPES, True)
        for buffer, array in zip(buffers, arrays, strict=True):
            if buffer.shape != np.shape(array):
                raise AssertionError(f"expected a result {buffer.shape}, got {np.shape(array)}")
            buffer[...] = array
    except BaseException as error:
        return _error(frame, f"{type(error).__name__}: {error}")
    return None


def _refuse(address, frame):
    return _error(frame, f"TypeError: {ONLY_ON_CPU}")


def _error(frame, message):
    """Create an XLA error, the return value of a handler that fails."""
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message.encode(), _INVALID_ARGUMENT)
    return frame.api.contents.create_error(arguments)


ONLY_ON_CPU = (
    "kpcore.jax computes on the CPU: move its arguments there with jax.device_put(x, jax.devices('cpu')[0]), or use "
    "CuPy arrays or torch tensors on the GPU"
)
# The interface version of the installed jaxlib. No version so far has changed the fields above.
_header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
_major, _minor = (int(re.search(rf"define XLA_FFI_API_{part} (\d+)", _header)[1]) for part in ("MAJOR", "MINOR"))
if _major != 0:
    raise ImportError(f"kpcore.jax: expected a jaxlib with version 0 of XLA's FFI, got {_major}")
if hasattr(jax, "typeof") and not any(hasattr(jax.typeof(0.0), name) for name in ("vma", "manual_axis_type")):
    raise ImportError(
        "kpcore.jax: expected a JAX whose array types name the mesh axes over which an array varies, as in 0.6 to "
        f"0.10, got {jax.__version__}"
    )


def register(compute: Callable[[bytes, list[np.ndarray]], list[np.ndarray]]) -> None:
    """Register the target "kpcore" with XLA; ``compute(text, inputs)`` returns the results of a call."""
    for platform, execute in ("cpu", functools.partial(_execute_on_cpu, compute)), ("CUDA", _refuse):
        handler = _Handler(functools.partial(_handle, execute))
        handlers[platform] = handler
        capsule = jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value)
        jax.ffi.register_ffi_target("kpcore", capsule, platform=platform)


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
handlers: dict[str, Any] = {}  # by platform; they must stay alive, since XLA keeps only their addresses

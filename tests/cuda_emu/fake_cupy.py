"""A replacement for CuPy on top of NumPy and the emulator. It raises where CuPy would fail or be undefined.

It has only what kpcore uses; anything else is an AttributeError. `install()` makes ``import cupy`` find it.

- Arrays on host and device do not mix. Only `get` converts a device array to a NumPy array.
- Operations that make the host wait for the device are counted (`counts.waits`), as are launches, copies to the device
  and memory.
- Arrays from `empty` are marked as unwritten: a kernel that reads them fails.
- Assigning through an index with duplicates is an error: on a GPU any of the values may remain.
"""

import sys
import types
from dataclasses import dataclass
from typing import NamedTuple

import emulator
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


@dataclass
class Counts:
    launches: int = 0
    waits: int = 0
    uploads: int = 0
    live: int = 0  # bytes of all existing arrays
    peak: int = 0


@dataclass
class Flags:
    """The flags that CuPy arrays have."""

    numpy_flags: object
    c_contiguous = property(lambda self: self.numpy_flags.c_contiguous)
    f_contiguous = property(lambda self: self.numpy_flags.f_contiguous)
    owndata = property(lambda self: self.numpy_flags.owndata)


class Device(NamedTuple):
    id: int
    compute_capability: str = "90"


counts = Counts()
current = Device(0)
mode = {}  # keyword arguments of emulator.Module: check, order, seed, preempt


class ndarray(NDArrayOperatorsMixin):
    """An array on the device. `base` is the array that owns the memory; only it records whether it was written."""

    __module__ = "cupy"
    __array_priority__ = 100

    def __init__(self, array, base=None):
        self._array, self._base, self._written = array, base, True
        if base is None:
            counts.live += array.nbytes
            counts.peak = max(counts.peak, counts.live)

    def __del__(self):
        if self._base is None:
            counts.live -= self._array.nbytes

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    flags = property(lambda self: Flags(self._array.flags))
    device = property(lambda self: current)
    T = property(lambda self: ndarray(self._array.T, self._owner))

    @property
    def _owner(self):
        return self if self._base is None else self._base

    def __repr__(self):
        return f"cupy.{self._array!r}"

    def __len__(self):
        return len(self._array)

    # NumPy ufuncs work on device arrays only; other conversions to NumPy are errors.

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if method != "__call__":
            raise TypeError(f"{ufunc.__name__}.{method} is not in the stand-in")
        if ufunc.signature is not None:  # such as np.matmul
            return NotImplemented
        if out is not None:
            return out[0]._filled(ufunc(*map(_host, inputs), **kwargs))
        return _device(ufunc(*map(_host, inputs), **kwargs))

    def _filled(self, values):
        if np.shape(values) != self.shape:
            raise ValueError(f"expected an output of shape {np.shape(values)}, got {self.shape}")
        self._array[...] = values
        self._owner._written = True
        return self

    # Other NumPy functions call the function of this module with the same name.

    def __array_function__(self, function, types, args, kwargs):
        replacement = getattr(sys.modules["cupy"], function.__name__, None)
        if replacement is None or not all(issubclass(t, ndarray) for t in types):
            return NotImplemented
        return replacement(*args, **kwargs)

    def any(self, axis=None):
        return _device(self._array.any(axis))

    def all(self, axis=None):
        return _device(self._array.all(axis))

    def sum(self, axis=None):
        return _device(self._array.sum(axis))

    def min(self, axis=None):
        return _device(self._array.min(axis))

    def max(self, axis=None):
        return _device(self._array.max(axis))

    def argmax(self, axis=None):
        return _device(self._array.argmax(axis))

    # Operations that wait for the device.

    def get(self):
        counts.waits += 1
        return self._array.copy()

    def item(self):
        counts.waits += 1
        return self._array.item()

    def __int__(self):
        return int(self.item())

    def __float__(self):
        return float(self.item())

    def __bool__(self):
        return bool(self.item())

    def __index__(self):
        return self.item().__index__()

    def __iter__(self):
        if self.ndim < 2:
            raise TypeError("iterating over numbers on the device, which would wait for each of them in most uses")
        return (self[i] for i in range(len(self)))

    def tolist(self):
        raise TypeError("use `.get().tolist()`")

    def __matmul__(self, other):
        return matmul(self, other)

    # Views and copies.

    def __getitem__(self, key):
        key = _host(key)
        if _is_mask(key):
            counts.waits += 1  # for the size of the result
        part = self._array[key]
        is_view = isinstance(part, np.ndarray) and np.shares_memory(part, self._array)
        return ndarray(np.asarray(part), self._owner if is_view else None)

    def __setitem__(self, key, value):
        key, value = _host(key), _host(value)
        if isinstance(key, np.ndarray) and not _is_mask(key) and len(np.unique(key)) < key.size and np.ndim(value):
            raise ValueError("assignment through an index with a number twice is undefined")
        self._array[key] = value
        self._owner._written = True

    def transpose(self, *axes):
        return ndarray(self._array.transpose(*axes), self._owner)

    def swapaxes(self, first, second):
        return ndarray(self._array.swapaxes(first, second), self._owner)

    def reshape(self, *shape):
        return ndarray(self._array.reshape(*shape), self._owner)

    # For torch: a tensor on the host stands for one on the device.

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__()

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def view(self, dtype):
        return ndarray(self._array.view(dtype), self._owner)

    def astype(self, dtype, copy=True):
        return ndarray(self._array.astype(dtype, copy=True))

    def copy(self):
        return ndarray(self._array.copy())

    def fill(self, value):
        self._array.fill(value)
        self._owner._written = True


def _product(a, b):
    """``a @ b``; like cuBLAS, 16-bit types are summed in float32."""
    return a @ b if a.dtype.itemsize > 2 else (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype)


def matmul(a, b, out=None):
    product = _product(_host(a), _host(b))
    return _device(product) if out is None else out._filled(product)


def _is_mask(key):
    return any(isinstance(k, np.ndarray) and k.dtype == bool for k in (key if isinstance(key, tuple) else (key,)))


def _host(value):
    """The NumPy array behind a device array; an error for a host array."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, tuple):
        return tuple(map(_host, value))
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


def _device(value):
    """Results are always arrays, also without axes."""
    return ndarray(np.asarray(value))


def _function(name):
    """The NumPy function with this name, for device arrays only."""
    numpy_function = getattr(np, name)

    def function(*args, out=None, **kwargs):
        result = numpy_function(*map(_host, args), **{key: _host(value) for key, value in kwargs.items()})
        return _device(result) if out is None else out._filled(result)

    function.__name__ = name
    return function


def empty(shape, dtype=float):
    array = ndarray(np.empty(shape, dtype))
    array._array.reshape(-1).view(np.uint8)[...] = 0xFF
    array._written = array.size == 0
    return array


def empty_like(a, dtype=None):
    return empty(a.shape, dtype or a.dtype)


def asarray(a, dtype=None):
    if isinstance(a, ndarray):
        return a if dtype in (None, a.dtype) else a.astype(dtype)
    counts.uploads += 1
    return ndarray(np.array(a, dtype))


def from_dlpack(tensor):
    """A tensor on the host stands for one on the device."""
    return ndarray(tensor.numpy())


def asnumpy(a):
    return a.get()


def argsort(a, axis=-1, kind=None):
    """CuPy uses a radix sort, which is stable."""
    if kind not in (None, "stable"):
        raise ValueError(f"CuPy sorts in no other way than 'stable', not {kind}")
    return _device(np.argsort(_host(a), axis, kind="stable"))


def concatenate(arrays, axis=0, out=None):
    joined = np.concatenate([_host(a) for a in arrays], axis)
    return _device(joined) if out is None else out._filled(joined)


def may_share_memory(a, b):
    return np.may_share_memory(_host(a), _host(b))


def stack(arrays, axis=0):
    return _device(np.stack([_host(a) for a in arrays], axis))


class RawModule:
    def __init__(self, *, code, options=()):
        self._code, self._options, self._modules = code, options, {}

    def get_function(self, name):
        def launch(grid, block, arguments, *, shared_mem=0):
            counts.launches += 1
            key = tuple(sorted(mode.items()))
            if key not in self._modules:
                self._modules[key] = emulator.Module(self._code, self._options, **mode)
            kernel = self._modules[key].get_function(name)
            unwritten = [i for i, a in enumerate(arguments) if isinstance(a, ndarray) and not a._owner._written]
            kernel(grid, block, [_host(a) for a in arguments], shared_mem=shared_mem, uninitialized=unwritten)
            for a, parameter in zip(arguments, kernel.parameters, strict=True):
                if isinstance(a, ndarray) and not parameter.startswith("*c"):
                    a._owner._written = True

        return launch


def is_installed():
    """Whether `import cupy` finds this replacement."""
    return getattr(sys.modules.get("cupy"), "ndarray", None) is ndarray


def install():
    """Make `import cupy` find this replacement; return the module."""
    if is_installed():  # by another test file: kpcore may hold the module
        return sys.modules["cupy"]
    module = types.ModuleType("cupy")
    names = (
        "ndarray",
        "RawModule",
        "empty",
        "empty_like",
        "asarray",
        "asnumpy",
        "argsort",
        "from_dlpack",
        "may_share_memory",
    )
    module.__dict__.update({name: globals()[name] for name in names})
    module.concatenate, module.stack, module.matmul = concatenate, stack, matmul
    module.cuda = types.SimpleNamespace(
        Device=lambda: current,
        is_available=lambda: True,
        get_current_stream=lambda: types.SimpleNamespace(ptr=0),
        PythonFunctionAllocator=lambda allocate, free: types.SimpleNamespace(malloc=(allocate, free)),
        set_allocator=None,
        runtime=types.SimpleNamespace(
            memGetInfo=lambda: (1 << 37, 1 << 38),
            driverGetVersion=lambda: 13000,
            getDeviceProperties=lambda device: {"name": b"emulator", "totalGlobalMem": 1 << 38},
        ),
    )
    module.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 0)
    names = (
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "arange",
        "cumsum",
        "amin",
        "amax",
        "ascontiguousarray",
    )
    for name in (*names, "where", "diff", "isfinite", "minimum", "bincount", "searchsorted", "take"):
        setattr(module, name, _function(name))
    module.__version__ = "14.2.0"
    sys.modules["cupy"] = module
    return module

"""A stand-in for CuPy on NumPy arrays and the emulator, stricter wherever CuPy would fail, be undefined, or wait.

Only what kpcore uses is here; anything else is an AttributeError. `install()` puts it in place of the module `cupy`.

- Arrays of the host and of the device do not mix, and nothing becomes a NumPy array but by `get`.
- What makes the host wait for the device is counted: `counts.waits`. So are launches, copies to the device, and memory.
- What `empty` gives is known to be unwritten, and a kernel that reads it fails.
- Assignment through an index that has a number twice is an error: on a GPU any of the values may stay.
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
    live: int = 0  # bytes of all arrays there are
    peak: int = 0


@dataclass
class Flags:
    """All that CuPy's have."""

    of: object
    c_contiguous = property(lambda self: self.of.c_contiguous)
    f_contiguous = property(lambda self: self.of.f_contiguous)
    owndata = property(lambda self: self.of.owndata)


class Device(NamedTuple):
    id: int
    compute_capability: str = "90"


counts = Counts()
current = Device(0)
mode = {}  # of emulator.Module: check, order, seed, preempt


class ndarray(NDArrayOperatorsMixin):
    """An array on the device. `base` is the one that owns the memory, which knows whether it was written."""

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

    # NumPy's functions: none of them by itself.

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

    # And those that CuPy answers to, by its own ones of the same names.

    def __array_function__(self, function, types, args, kwargs):
        own = getattr(sys.modules["cupy"], function.__name__, None)
        if own is None or not all(issubclass(t, ndarray) for t in types):
            return NotImplemented
        return own(*args, **kwargs)

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

    # What waits.

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
            raise TypeError("iterating over numbers on the device: what would wait for each of them, in most uses")
        return (self[i] for i in range(len(self)))

    def tolist(self):
        raise TypeError("use `.get().tolist()`")

    def __matmul__(self, other):
        return matmul(self, other)

    # Views and copies.

    def __getitem__(self, key):
        key = _host(key)
        if _is_mask(key):
            counts.waits += 1  # for the size of what comes out
        found = self._array[key]
        shares = isinstance(found, np.ndarray) and np.shares_memory(found, self._array)
        return ndarray(np.asarray(found), self._owner if shares else None)

    def __setitem__(self, key, value):
        key, value = _host(key), _host(value)
        if isinstance(key, np.ndarray) and not _is_mask(key) and len(np.unique(key)) < key.size and np.ndim(value):
            raise ValueError("assignment through an index with a number twice is undefined")
        self._array[key] = value
        self._owner._written = True

    def transpose(self, *axes):
        return ndarray(self._array.transpose(*axes), self._owner)

    def reshape(self, *shape):
        return ndarray(self._array.reshape(*shape), self._owner)

    # torch's way: a tensor of the host stands for one of the device.

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
    """cuBLAS's of 16 bits: summed in float32."""
    return a @ b if a.dtype.itemsize > 2 else (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype)


def matmul(a, b, out=None):
    found = _product(_host(a), _host(b))
    return _device(found) if out is None else out._filled(found)


def _is_mask(key):
    return any(isinstance(k, np.ndarray) and k.dtype == bool for k in (key if isinstance(key, tuple) else (key,)))


def _host(value):
    """What is in an array of the device; an error for one of the host."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, tuple):
        return tuple(map(_host, value))
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


def _device(value):
    """Results are arrays, also those without axes."""
    return ndarray(np.asarray(value))


def _function(name, of=None):
    """NumPy's function of that name, on arrays of the device alone."""
    numpy_function = of or getattr(np, name)

    def function(*args, out=None, **kwargs):
        found = numpy_function(*map(_host, args), **{key: _host(value) for key, value in kwargs.items()})
        return _device(found) if out is None else out._filled(found)

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
    """A tensor of the host stands for one of the device."""
    return ndarray(tensor.numpy())


def asnumpy(a):
    return a.get()


def argsort(a, axis=-1, kind=None):
    """CuPy's is a radix sort, and so stable."""
    if kind not in (None, "stable"):
        raise ValueError(f"CuPy sorts in no other way than 'stable', not {kind}")
    return _device(np.argsort(_host(a), axis, kind="stable"))


def concatenate(arrays, axis=0, out=None):
    found = np.concatenate([_host(a) for a in arrays], axis)
    return _device(found) if out is None else out._filled(found)


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


def install():
    """Make `import cupy` find this; -> the module."""
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
    for name in (*names, "where", "diff", "isfinite", "minimum", "bincount", "take"):
        setattr(module, name, _function(name))
    module.__version__ = "14.2.0"
    sys.modules["cupy"] = module
    return module

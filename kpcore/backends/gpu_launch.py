"""Compiles CUDA files, binds kernel parameters by name, launches kernels, and registers launchers.

Kernels are plain CUDA C++ in src/cuda and share their formulas with the CPU. CuPy compiles a file for the types of the
arrays when one of its kernels is first launched, and caches the result on disk. All work goes to CuPy's current stream.
Functions that wait for the device say so.
"""

from __future__ import annotations

import functools
import operator

import cupy
import numpy as np

from kpcore.backends import gpu_sources

BLOCK = 128
BLOCK_OF_ROWS = gpu_sources.constant("launch.h", "block_of_rows")
MAX_BLOCKS = 1 << 15  # kernels have grid-stride loops, so more blocks are never needed
WARP = 32
_FLOAT = np.dtype(np.float32)
_NULL = np.uint64(0)  # CuPy and the emulator pass an 8-byte zero as a null pointer
_CTYPES = {"float32": "float", "float64": "double", "float16": "kp::Half", "bfloat16": "kp::Bfloat"}
_SCALARS = {
    "int": np.int32,
    "int32_t": np.int32,
    "int64_t": np.int64,
    "uint32_t": np.uint32,
    "uint64_t": np.uint64,
    "float": np.float32,
    "double": np.float64,
}

LAUNCHERS = {}


class NotFinite(Exception):
    """A coordinate is NaN or infinite, or distances overflow or underflow."""


class OutOfRange(Exception):
    """Too many voxels along an axis, a label that is not a class, or an index that is out of range."""


def launcher(function):
    """Register the GPU version of the CPU kernel with the same name: ``function(fields)`` writes the output arrays.

    `fields` has exactly the fields of that kernel in src/cpu/kernels.h. Missing optional arrays are None.
    """
    LAUNCHERS[function.__name__] = function
    return function


@functools.cache
def ctype(dtype):
    """The C type of the elements of an array."""
    return _CTYPES[dtype.name]


def computed(dtype):
    """The dtype in which kernels compute with arrays of `dtype`: float32 for 16-bit types, else `dtype` itself."""
    return dtype if dtype.itemsize > 2 else _FLOAT


class Kernel:
    """A compiled kernel, whose arguments are bound by the names of its parameters."""

    def __init__(self, file, name, definitions, function):
        self.name, self._function = f"{file}: {name}", function
        parameters = gpu_sources.parameters(file)[name]
        self._places = {parameter.name: place for place, parameter in enumerate(parameters)}
        self._values_of = operator.itemgetter(*self._places)
        self._pointers = [place for place, parameter in enumerate(parameters) if parameter.is_pointer]
        self._scalars = {
            place: _SCALARS[gpu_sources.scalar_type(file, parameter.type, definitions)]
            for place, parameter in enumerate(parameters)
            if not parameter.is_pointer
        }

    def bind(self, fields, values):
        """The list of arguments: each parameter is looked up by name in `values`, else in the attributes of `fields`.

        Numbers are converted to the types of the parameters; None becomes a null pointer.
        """
        by_name = values if fields is None else {**fields.__dict__, **values}
        try:
            arguments = list(self._values_of(by_name))
        except KeyError as error:
            raise TypeError(f"{self.name}: expected a value for the parameter {error.args[0]}, got none") from None
        if not values.keys() <= self._places.keys():
            raise TypeError(f"{self.name}: expected values for {', '.join(self._places)} only, got {', '.join(values)}")
        for place, scalar in self._scalars.items():
            arguments[place] = scalar(arguments[place])
        for place in self._pointers:
            if arguments[place] is None:
                arguments[place] = _NULL
        return arguments

    def rebind(self, arguments, **values):
        """Arguments from `bind` with new values for some parameters; much faster than `bind` for kernels with many."""
        arguments = list(arguments)
        for name, value in values.items():
            place = self._places[name]
            scalar = self._scalars.get(place)
            arguments[place] = value if scalar is None else scalar(value)
        return arguments

    def start(self, threads, arguments, block=BLOCK):
        """Launch the kernel with at least `threads` threads, in whole blocks; nothing for zero threads."""
        if threads:
            self._function((min(MAX_BLOCKS, -(-threads // block)),), (block,), tuple(arguments))


class Kernels(dict):
    """{name: Kernel} of a .cu file that is compiled with some macro definitions."""

    def __init__(self, file, definitions):
        super().__init__()
        names = [tuple(variant) for variant in gpu_sources.variants(file)]
        if tuple(definitions) not in names:
            expected = " or ".join(", ".join(each) or "none" for each in dict.fromkeys(names))
            raise TypeError(f"{file}: expected the definitions {expected}, got {', '.join(definitions) or 'none'}")
        self._file, self._definitions = file, definitions
        # No contraction (fmad), so that distances have the same bits as on the CPU.
        options = ("-std=c++17", "--fmad=false", *(f"-D{name}={value}" for name, value in definitions.items()))
        self._module = cupy.RawModule(code=gpu_sources.source(file), options=options)

    def __missing__(self, name):
        self[name] = Kernel(self._file, name, self._definitions, self._module.get_function(name))
        return self[name]


@functools.cache
def kernels_of(file, /, **definitions):
    """The kernels of a .cu file compiled with these macro definitions, which its lines "// compile:" list."""
    return Kernels(file, {name: str(value) for name, value in definitions.items()})


def launch(kernel, threads, fields=None, /, **values):
    """Launch a kernel with `threads` threads. Its parameters are bound to `values`, else to attributes of `fields`."""
    if threads:
        kernel.start(threads, kernel.bind(fields, values))


def wait(*numbers):
    """Copy arrays of one number each to the host. This waits for the device, so an operator calls it at most once."""
    return cupy.concatenate([n.astype(np.int64) for n in numbers]).get().tolist()


def free_memory():
    return cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()


def product(a, b, out):
    """out = ``a @ b``, by cuBLAS; zeros if there is nothing to sum."""
    if a.size and b.size:
        cupy.matmul(a, b, out=out)
    else:
        out.fill(0)

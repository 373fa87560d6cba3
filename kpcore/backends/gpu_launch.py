"""What all launches on the GPU share: compiled files, kernels with their parameters, and the table of launchers.

Kernels are the files in cuda/, plain CUDA C++ that shares its formulas with the CPU. A kernel is compiled by CuPy when
it is first launched, for the types at hand, and kept on disk. Everything here is launches on CuPy's current stream;
what waits for the device says so.
"""

from __future__ import annotations

import functools
import operator

import cupy
import numpy as np

from kpcore.backends import gpu_sources

BLOCK = 128
BLOCK_OF_ROWS = 1024  # of launch.h
MAX_BLOCKS = 1 << 15  # kernels go on to the next query themselves
WARP = 32
_FLOAT = np.dtype(np.float32)
_NULL = np.uint64(0)  # as CuPy and the emulator pass a null pointer
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
    """Coordinates that are NaN or infinite, or whose distances overflow or vanish."""


class OutOfRange(Exception):
    """More voxels along an axis than their keys can number, or a list with a number out of range."""


def launcher(function):
    """Register a function under its name, that of a CPU kernel: ``function(fields)`` writes into the output arrays.

    `fields` has exactly the fields of that kernel in src/cpu/kernels.h, None for an optional array that is not there.
    """
    LAUNCHERS[function.__name__] = function
    return function


@functools.cache
def ctype(dtype):
    """The C type of an array's numbers, as files are compiled for it."""
    return _CTYPES[dtype.name]


def computed(dtype):
    """The dtype that numbers of such arrays are computed in: float32 for those of 16 bits."""
    return dtype if dtype.itemsize > 2 else _FLOAT


class Kernel:
    """A kernel of a file that is compiled for some types."""

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
        """The arguments, by the names of the parameters: from the dict `values`, else attributes of `fields`.

        Numbers are converted to the types of the parameters; None is a null pointer.
        """
        known = values if fields is None else {**fields.__dict__, **values}
        try:
            arguments = list(self._values_of(known))
        except KeyError as error:
            raise TypeError(f"{self.name}: expected a value of the parameter {error.args[0]}, got none") from None
        if not values.keys() <= self._places.keys():
            raise TypeError(
                f"{self.name}: expected no values but of {', '.join(self._places)}, got {', '.join(values)}"
            )
        for place, scalar in self._scalars.items():
            arguments[place] = scalar(arguments[place])
        for place in self._pointers:
            if arguments[place] is None:
                arguments[place] = _NULL
        return arguments

    def rebind(self, arguments, **values):
        """Arguments of `bind` with other values of some parameters; much of the time of `bind` where they are many."""
        arguments = list(arguments)
        for name, value in values.items():
            place = self._places[name]
            scalar = self._scalars.get(place)
            arguments[place] = value if scalar is None else scalar(value)
        return arguments

    def start(self, threads, arguments, block=BLOCK):
        """Launch it for so many threads, in whole blocks; not at all for no threads."""
        if threads:
            self._function((min(MAX_BLOCKS, -(-threads // block)),), (block,), tuple(arguments))


class Kernels(dict):
    """The kernels of a .cu file by their names, compiled with some definitions."""

    def __init__(self, file, definitions):
        super().__init__()
        names = [tuple(variant) for variant in gpu_sources.variants(file)]
        if tuple(definitions) not in names:
            expected = " or ".join(", ".join(each) or "none" for each in dict.fromkeys(names))
            raise TypeError(f"{file}: expected the definitions {expected}, got {', '.join(definitions) or 'none'}")
        self._file, self._definitions = file, definitions
        # Not contracted: what decides is to be the same bits as on the CPU.
        options = ("-std=c++17", "--fmad=false", *(f"-D{name}={value}" for name, value in definitions.items()))
        self._module = cupy.RawModule(code=gpu_sources.source(file), options=options)

    def __missing__(self, name):
        self[name] = Kernel(self._file, name, self._definitions, self._module.get_function(name))
        return self[name]


@functools.cache
def kernels_of(file, /, **definitions):
    """The kernels of a .cu file, compiled with such definitions, of which its first lines tell the names."""
    return Kernels(file, {name: str(value) for name, value in definitions.items()})


def launch(kernel, threads, fields=None, /, **values):
    """Launch a kernel for so many threads; its parameters are bound by name to `values`, else to those of `fields`."""
    if threads:
        kernel.start(threads, kernel.bind(fields, values))


def wait(*numbers):
    """Arrays of one number each, on the host: what waits for the device, and so once a call at most."""
    return cupy.concatenate([n.astype(np.int64) for n in numbers]).get().tolist()


def free_memory():
    return cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()


def product(a, b, out):
    """``a @ b``, by cuBLAS; zeros where there is nothing to sum."""
    if a.size and b.size:
        cupy.matmul(a, b, out=out)
    else:
        out.fill(0)

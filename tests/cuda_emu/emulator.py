"""Runs CUDA C++ kernels on the CPU: ``Module(source).get_function(name)(grid, block, arguments)`` on NumPy arrays.

The source is the text that CuPy's RawModule takes. g++ compiles it after device.h and links it with runtime.cpp; the
library is called through ctypes and cached by a hash of everything that went into it. With ``check=True`` every load
and store is checked for bounds, alignment, initialization and races, at a fifth of the speed. Without, arrays end at a
page that traps and have guard bytes before them.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("KPCORE_EMU_CACHE", Path(tempfile.gettempdir()) / f"kpcore_cuda_emu_{os.getuid()}"))
COMMON = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off")
# No sanitizer libraries are linked: runtime.cpp defines the functions that -fsanitize=thread calls, and undefined
# behavior executes a trap instruction.
CHECKS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
          "-fsanitize=shift,bounds,alignment,float-cast-overflow,integer-divide-by-zero",
          "-fsanitize-undefined-trap-on-error",
          "-fno-crossjumping", "-fno-tree-tail-merge")  # fmt: skip  # otherwise all traps merge into one line
ORDERS = ("forward", "reverse", "random")

_launching = threading.Lock()


class EmulatorError(Exception):
    """An error in a kernel. The message names the kernel, block, thread, line and error."""


class _Argument(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("place", ctypes.c_int),
        ("element", ctypes.c_int),
        ("initialized", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("order", ctypes.c_int),
        ("preempt", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("arrays", ctypes.POINTER(_Argument)),
        ("num_arrays", ctypes.c_int),
    ]


class Module:
    """A compiled source.

    `options` are those of CuPy's RawModule; only -D matters. `order` is that of threads and blocks. `preempt`: out of a
    thousand memory accesses, how many let another thread run; for random order.
    """

    def __init__(self, source, options=(), *, check=True, order="forward", seed=0, preempt=0):
        self.path = _built(source, tuple(o for o in options if o.startswith("-D")), check)
        self.library = ctypes.CDLL(str(self.path))
        self.library.emu_launch.restype = ctypes.c_char_p
        self.library.emu_static_shared.restype = ctypes.c_size_t
        self.order, self.seed, self.preempt = ORDERS.index(order), seed, preempt

    def get_function(self, name):
        return Kernel(self, name)


class Kernel:
    """A kernel of a module; called like CuPy's, but on NumPy arrays and scalars whose types it checks."""

    def __init__(self, module, name):
        self.module, self.name = module, name
        self.call = getattr(module.library, f"emu_call_{name}")
        signature = getattr(module.library, f"emu_signature_{name}")
        signature.restype = ctypes.c_char_p
        self.parameters = signature().decode().split()

    def __call__(self, grid, block, arguments, *, shared_mem=0, uninitialized=()):
        """`uninitialized`: positions of array arguments that have not been written yet."""
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name}: expected {len(self.parameters)} arguments, got {len(arguments)}")
        grid, block = ((*size, 1, 1)[:3] for size in (grid, block))
        if min(*grid, *block) < 1 or np.prod(block) > 1024 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise ValueError(f"{self.name}: no GPU has a grid {grid} of blocks {block}")
        if shared_mem + self.module.library.emu_static_shared() > 48 << 10:
            raise ValueError(
                f"{self.name}: expected at most 48 KiB of shared memory, got {shared_mem} bytes of it dynamic"
            )
        scalars, arrays = [], []
        for place, (value, parameter) in enumerate(zip(arguments, self.parameters, strict=True)):
            if parameter.startswith("*") and _is_null(value):
                scalars.append(ctypes.c_void_p())
            elif parameter.startswith("*"):
                arrays.append(self._array(place, value, parameter, place not in uninitialized))
                scalars.append(ctypes.c_void_p())
            else:
                scalars.append(self._scalar(place, value, parameter))
        self._check_overlaps(arguments)
        pointers = (ctypes.c_void_p * max(1, len(scalars)))(*map(ctypes.addressof, scalars))
        launch = _Launch(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared_mem, self.module.order, self.module.preempt,
            self.module.seed, (_Argument * max(1, len(arrays)))(*arrays), len(arrays),
        )  # fmt: skip
        with _launching:
            error = self.module.library.emu_launch(self.call, pointers, ctypes.byref(launch))
        if error is not None:
            raise EmulatorError(f"{self.name}: {self._with_lines(error.decode())}")

    def _array(self, place, value, parameter, initialized):
        where, (kind, size) = f"{self.name}: argument {place}", _kind(parameter.lstrip("*"))
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{where}: expected an array, got {type(value).__name__}")
        if kind == "v":  # a vector type, or a struct
            if value.nbytes % size:
                raise ValueError(f"{where}: expected a multiple of {size} bytes, got {value.nbytes}")
        elif (_letter(value.dtype), value.dtype.itemsize) != (kind, size):
            raise TypeError(f"{where}: expected {kind}{size}, got an array of {value.dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{where}: expected a contiguous array, got strides {value.strides}")
        if not parameter.startswith("*c") and not value.flags.writeable:
            raise ValueError(f"{where}: expected an array that may be written, got a read-only one")
        return _Argument(value.ctypes.data, value.nbytes, place, min(4, value.dtype.itemsize), initialized)

    def _scalar(self, place, value, parameter):
        """CuPy passes a Python int as 64 bits whatever the parameter's type, so only NumPy scalars are allowed."""
        kind, size = _kind(parameter)
        if not isinstance(value, np.generic) or (
            kind != "v" and (_letter(value.dtype), value.dtype.itemsize) != (kind, size)
        ):
            raise TypeError(
                f"{self.name}: argument {place}: expected a NumPy scalar {kind}{size}, got {type(value).__name__}"
            )
        return ctypes.create_string_buffer(value.tobytes(), size)

    def _check_overlaps(self, arguments):
        """Arrays that are written may not share memory with other arguments: each is copied for a launch."""
        seen = []
        for place, (value, parameter) in enumerate(zip(arguments, self.parameters, strict=True)):
            if not parameter.startswith("*") or _is_null(value) or not value.nbytes:
                continue
            begin, constant = value.ctypes.data, parameter.startswith("*c")
            for other, (other_begin, other_end, other_constant) in seen:
                if begin < other_end and other_begin < begin + value.nbytes and not (constant and other_constant):
                    raise ValueError(f"{self.name}: argument {place} shares memory with argument {other}")
            seen.append((place, (begin, begin + value.nbytes, constant)))

    def _with_lines(self, text):
        """Replaces code addresses by source:line."""

        def line(match):
            command = ["addr2line", "-s", "-e", str(self.module.path), match[1]]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return output.split()[0]

        return re.sub(r"\{\{([0-9a-f]+)\}\}", line, text)


def _is_null(value):
    """Whether the argument is a null pointer, which CuPy takes as a number of eight bytes."""
    return isinstance(value, np.uint64) and value == 0


def _kind(parameter):
    return parameter.lstrip("c")[0], int(parameter.lstrip("c")[1:])


def _letter(dtype):
    return "f" if dtype.kind == "f" else dtype.kind


def _built(source, defines, check):
    # Preprocessed first, because an #if may exclude kernels.
    source = _compile("-E", "-D__CUDACC__", "-DCUDA_EMU", *defines, "-x", "c++", "-", text=source)
    names = re.findall(r'extern\s+"C"\s+__global__[^;{]*?\bvoid\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(', source)
    text = re.sub(r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\[\];", r"EMU_DYNAMIC_SHARED(\1, \2);", source)
    text += "\n" + "\n".join(f"EMU_EXPORT({name})" for name in names) + "\n"
    checks = CHECKS if check else ()
    ours = [(HERE / name).read_text() for name in ("runtime.h", "runtime.cpp", "device.h")]
    path = CACHE / f"{_hash(text, *ours, *COMMON, *checks, *defines)}.so"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    runtime = CACHE / f"{_hash(*ours[:2], *COMMON, *checks)}.o"
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder, "made")
        if not runtime.exists():
            defined = ("-DEMU_CHECK",) if check else ()
            _compile(*COMMON, *defined, "-Wall", "-Wextra", "-c", str(HERE / "runtime.cpp"), "-o", str(made))
            made.replace(runtime)
        kernels = Path(folder, "kernels.o")
        _compile(
            *COMMON,
            *checks,
            *defines,
            "-Wno-unknown-pragmas",
            "-include",
            str(HERE / "device.h"),
            "-x",
            "c++",
            "-c",
            "-",
            "-o",
            str(kernels),
            text=text,
        )
        _compile("-shared", "-Wl,--no-undefined", str(kernels), str(runtime), "-o", str(made), "-lm")
        made.replace(path)
    return path


def _compile(*options, text=None):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator of a GPU compiles with g++, which is not on the PATH")
    done = subprocess.run([compiler, *options], input=text, capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"does not compile:\n{done.stderr}")
    return done.stdout


def _hash(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]

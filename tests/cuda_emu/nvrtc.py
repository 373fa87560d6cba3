"""NVIDIA's compiler without a driver: what becomes of our kernels on real architectures.

From the wheel nvidia-cuda-nvrtc, called through ctypes. ``python nvrtc.py`` prints a table of all kernels.
"""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

from kpcore.backends import gpu_sources

ARCHITECTURES = (75, 80, 90, 100)
# What CuPy adds to the options it is given.
OPTIONS = ("--std=c++17", "--fmad=false", "-ftz=true", "--ptxas-options=-v")


class Kernel(NamedTuple):
    registers: int
    spills: int  # bytes, of stores and loads
    stack: int  # bytes
    shared: int  # bytes


class Compiled(NamedTuple):
    kernels: dict[str, Kernel]
    ptx: str
    log: str


def variants():
    """{file: the definitions that it is compiled with, a string for each time}, from the files' first lines"""
    names = sorted(path.name for path in (gpu_sources.SOURCES / "cuda").glob("*.cu"))
    return {
        name: [" ".join(f"{key}={value}" for key, value in each.items()) for each in gpu_sources.variants(name)]
        for name in names
    }


def library():
    """The compiler, or None where the wheel is not installed."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    for folder in importlib.util.find_spec("nvidia").submodule_search_locations:
        for path in sorted(Path(folder).rglob("libnvrtc.so*")):
            return ctypes.CDLL(str(path))
    return None


def compiled(nvrtc, source, architecture, definitions=(), options=OPTIONS):
    """-> Compiled; an error with the compiler's words where it does not compile"""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        given = [f"-arch=sm_{architecture}", *options, *(f"-D{d}" for d in definitions)]
        status = nvrtc.nvrtcCompileProgram(
            program, len(given), (ctypes.c_char_p * len(given))(*[o.encode() for o in given])
        )
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status:
            raise ValueError(f"does not compile for sm_{architecture} with {definitions}:\n{log}")
        ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    kernels = {}
    for part in log.split("Compiling entry function '")[1:]:

        def number(pattern, part=part):
            return sum(map(int, re.findall(pattern, part)))

        kernels[part.split("'")[0]] = Kernel(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill"),
            number(r"(\d+) bytes stack"),
            number(r"(\d+) bytes smem"),
        )
    return Compiled(kernels, ptx, log)


def _text(program, size_of, text_of):
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    text_of(program, text)
    return text.value.decode()


def table():
    """Lines: of each kernel registers / spills / stack / shared memory, in bytes, by architecture."""
    nvrtc = library()
    yield f"{'kernel':34} {'compiled for':34}" + "".join(f"{f'sm_{a}':>17}" for a in ARCHITECTURES)
    for name, each in variants().items():
        for variant in each:
            of = [compiled(nvrtc, gpu_sources.source(name), a, variant.split()).kernels for a in ARCHITECTURES]
            for kernel in of[0]:
                row = "".join(f"{'/'.join(map(str, found[kernel])):>17}" for found in of)
                yield f"{name[:-3] + ' ' + kernel:34} {variant.replace('KP_', ''):34}{row}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for line in table():
        print(line)

"""Compiles the kernels with NVRTC, which needs no GPU: registers, spills, stack and shared memory per architecture.

NVRTC comes from the wheel nvidia-cuda-nvrtc and is called through ctypes. ``python nvrtc.py`` prints a table of all
kernels.
"""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

from kpcore.backends import gpu_sources

ARCHITECTURES = (75, 80, 90, 100)
# The options of kpcore, and those that CuPy adds.
OPTIONS = ("--std=c++17", "--fmad=false", "-ftz=true", "--ptxas-options=-v")


class Kernel(NamedTuple):
    registers: int
    spills: int  # bytes of stores and loads
    stack: int  # bytes
    shared: int  # bytes


class Compiled(NamedTuple):
    kernels: dict[str, Kernel]
    ptx: str
    log: str


def variants():
    """{file: macro definitions that it is compiled with, a string for each variant}, from the lines "// compile:"."""
    names = sorted(path.name for path in (gpu_sources.SOURCES / "cuda").glob("*.cu"))
    return {
        name: [" ".join(f"{key}={value}" for key, value in each.items()) for each in gpu_sources.variants(name)]
        for name in names
    }


def library():
    """The NVRTC library, or None if the wheel is not installed."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    for folder in importlib.util.find_spec("nvidia").submodule_search_locations:
        for path in sorted(Path(folder).rglob("libnvrtc.so*")):
            return ctypes.CDLL(str(path))
    return None


def compiled(nvrtc, source, architecture, definitions=(), options=OPTIONS):
    """Compile a source for an architecture. Raises ValueError with the log if that fails."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        flags = [f"-arch=sm_{architecture}", *options, *(f"-D{d}" for d in definitions)]
        status = nvrtc.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
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
    """Lines of a table: registers / spills / stack / shared memory (bytes) of each kernel, by architecture."""
    nvrtc = library()
    yield f"{'kernel':34} {'compiled for':34}" + "".join(f"{f'sm_{a}':>17}" for a in ARCHITECTURES)
    for name, each in variants().items():
        for variant in each:
            results = [compiled(nvrtc, gpu_sources.source(name), a, variant.split()).kernels for a in ARCHITECTURES]
            for kernel in results[0]:
                row = "".join(f"{'/'.join(map(str, kernels[kernel])):>17}" for kernels in results)
                yield f"{name[:-3] + ' ' + kernel:34} {variant.replace('KP_', ''):34}{row}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for line in table():
        print(line)

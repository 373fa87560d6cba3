"""NVIDIA's compiler without a driver: what becomes of our kernels on real architectures.

From the wheel nvidia-cuda-nvrtc, called through ctypes. ``python nvrtc.py`` prints a table of all kernels.
"""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (75, 80, 90, 100)
# What CuPy adds to the options it is given.
OPTIONS = ("--std=c++17", "--fmad=false", "-ftz=true", "--ptxas-options=-v")
# Files, and the definitions that they are compiled with. Of the searches those for three dimensions stand for the
# others, and sixteen for the most registers.
VARIANTS = {
    "boxes.cu": ["KP_T=float KP_DIM=3 KP_METRIC=0", "KP_T=double KP_DIM=16 KP_METRIC=1"],
    "deformation.cu": ["KP_T=float KP_DIM=3", "KP_T=double KP_DIM=2"],
    "kpconv.cu": [
        f"KP_G={g} KP_F={f} KP_DIM=3"
        for g, f in (("float", "float"), ("float", "kp::Half"), ("float", "kp::Bfloat"), ("double", "double"))
    ],
    "lists.cu": ["", "KP_T=float", "KP_T=double"],
    "neighbors.cu": [
        f"KP_T={t} KP_DIM={d} KP_METRIC={m} KP_TREE={tree}"
        for t, d, m, tree in (
            ("float", 3, 0, 0),
            ("float", 3, 0, 1),
            ("float", 3, 1, 0),
            ("float", 3, 2, 1),
            ("double", 3, 0, 0),
            ("double", 3, 0, 1),
            ("float", 16, 0, 1),
            ("double", 16, 0, 1),
        )
    ],
    "pooling.cu": [f"KP_F={f} KP_G=float" for f in ("float", "double", "kp::Half", "kp::Bfloat")],
    "rows.cu": [f"KP_F={f}" for f in ("float", "double", "kp::Half", "kp::Bfloat")],
    "sampling.cu": ["KP_T=float KP_DIM=3", "KP_T=double KP_DIM=16"],
    "subsampling.cu": ["KP_T=float KP_DIM=3 KP_S=float", "KP_T=double KP_DIM=2 KP_S=kp::Half"],
}


class Kernel(NamedTuple):
    registers: int
    spills: int  # bytes, of stores and loads
    stack: int  # bytes
    shared: int  # bytes


class Compiled(NamedTuple):
    kernels: dict[str, Kernel]
    ptx: str
    log: str


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
    import fake_cupy

    fake_cupy.install()
    from kpcore.backends import gpu

    nvrtc = library()
    yield f"{'kernel':34} {'compiled for':34}" + "".join(f"{f'sm_{a}':>17}" for a in ARCHITECTURES)
    for name, variants in VARIANTS.items():
        for variant in variants:
            of = [compiled(nvrtc, gpu.source(name), a, variant.split()).kernels for a in ARCHITECTURES]
            for kernel in of[0]:
                row = "".join(f"{'/'.join(map(str, found[kernel])):>17}" for found in of)
                yield f"{name[:-3] + ' ' + kernel:34} {variant.replace('KP_', ''):34}{row}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for line in table():
        print(line)

"""Reads the CUDA sources: a file with its headers, the types it is compiled for, and the parameters of its kernels.

Parameter lists are written only in the .cu files: `gpu_launch` binds arguments by the names read here.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("sources")
if not SOURCES.is_dir():  # editable install
    SOURCES = Path(__file__).parents[2] / "src"


class Parameter(NamedTuple):
    """A parameter of a kernel. `type` is the C type without const and without the star of a pointer."""

    name: str
    type: str
    is_pointer: bool


def source(name, seen=None):
    """The text of a file with its headers inserted, each once: CuPy's cache looks only at this text.

    System headers, and headers inside ``#ifndef __CUDACC__``, are left out.
    """
    seen, for_cpu_only = {name} if seen is None else seen, False
    folder = "" if "/" in name else "cuda/"
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((SOURCES / (folder + name)).read_text().splitlines(), 1):
        for_cpu_only = line.startswith("#ifndef __CUDACC__") or (
            for_cpu_only and not line.startswith(("#endif", "#else"))
        )
        if for_cpu_only and line.startswith("#include"):
            lines.append("")
        elif line.startswith('#include "'):
            included = line.split('"')[1]
            if "/" not in included and "/" in name:
                included = f"{name.split('/')[0]}/{included}"
            if included not in seen:
                seen.add(included)
                lines += [source(included, seen), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if line.startswith(("#include <", "#pragma once")) else line)
    return "\n".join(lines)


def _text(name):
    return (SOURCES / "cuda" / name).read_text()


def constant(file, name):
    """The value of an integer constant that a file in src/cuda declares."""
    return int(re.search(rf"^constexpr \w+ {name} = (\d+);", _text(file), re.M)[1])


@functools.cache
def variants(name):
    """The macro definitions that a .cu file is compiled with: a dict for each line "// compile: NAME=VALUE ..." in it.

    Other values occur at run time, such as other dimensions; the tests compile these.
    """
    lines = re.findall(r"^// compile:(.*)$", _text(name), re.M)
    return [dict(definition.split("=") for definition in line.split()) for line in lines]


@functools.cache
def parameters(name):
    """{kernel: its parameters} of a .cu file"""
    text = re.sub(r"//.*", "", _text(name))
    macros = {macro: body.replace("\\\n", "") for macro, body in re.findall(r"#define (\w+) ((?:\\\n|.)*)\n", text)}
    by_kernel = {}
    declaration = r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(([^)]*)\)'
    for kernel, listed in re.findall(declaration, text):
        listed = re.sub(r"\w+", lambda word: macros.get(word[0], word[0]), listed)
        by_kernel[kernel] = tuple(_parameter(declared) for declared in listed.split(","))
    return by_kernel


def _parameter(declared):
    kind, star, name = re.fullmatch(r"\s*(?:const )?([\w: ]*\w)(\s*\*\s*|\s+)(\w+)\s*", declared).groups()
    return Parameter(name, kind, "*" in star)


@functools.cache
def _aliases(name):
    enumerations = re.findall(r"^enum class (\w+) : (\w+)", (SOURCES / "formulas/common.h").read_text(), re.M)
    return dict(enumerations + re.findall(r"^using (\w+) = (.+);", _text(name), re.M))


def scalar_type(name, kind, definitions):
    """The C type that an alias or enumeration stands for under these definitions; "float" for Real<S> of a 16-bit S."""
    if kind.startswith("Real<"):
        stored = scalar_type(name, kind[5:-1], definitions)
        return "float" if stored.startswith("kp::") else stored
    behind = _aliases(name).get(kind) or definitions.get(kind)
    return kind if behind is None else scalar_type(name, behind, definitions)

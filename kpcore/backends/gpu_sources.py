"""The CUDA files as text: a file with its headers, what it is compiled for, and the parameters of its kernels.

A kernel's parameter list in its .cu file is the only place that spells it: `gpu_launch` binds arguments by these names.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("sources")
if not SOURCES.is_dir():  # of an editable install
    SOURCES = Path(__file__).parents[2] / "src"


class Parameter(NamedTuple):
    """A parameter of a kernel: its C type without const and, of a pointer, without the star."""

    name: str
    type: str
    is_pointer: bool


def source(name, seen=None):
    """A file with what it includes, once each: CuPy's cache looks at the text alone.

    Headers of the system, and those that only the CPU has, are left out.
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


@functools.cache
def variants(name):
    """The definitions that a .cu file is compiled with, a dict for each line "// compile: NAME=VALUE ..." in it.

    The names are all that there are; of the values those by which the tests judge registers.
    """
    lines = re.findall(r"^// compile:(.*)$", _text(name), re.M)
    return [dict(definition.split("=") for definition in line.split()) for line in lines]


@functools.cache
def parameters(name):
    """{kernel: its parameters} of a .cu file"""
    text = re.sub(r"//.*", "", _text(name))
    macros = {macro: body.replace("\\\n", "") for macro, body in re.findall(r"#define (\w+) ((?:\\\n|.)*)\n", text)}
    found = {}
    for kernel, listed in re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', text):
        listed = re.sub(r"\w+", lambda word: macros.get(word[0], word[0]), listed)
        found[kernel] = tuple(_parameter(declared) for declared in listed.split(","))
    return found


def _parameter(declared):
    kind, star, name = re.fullmatch(r"\s*(?:const )?([\w: ]*\w)(\s*\*\s*|\s+)(\w+)\s*", declared).groups()
    return Parameter(name, kind, "*" in star)


@functools.cache
def _aliases(name):
    return dict(re.findall(r"^using (\w+) = (.+);", _text(name), re.M))


def scalar_type(name, kind, definitions):
    """The C type behind an alias of a file that is compiled with such definitions, "float" behind F = Real<S>."""
    if kind.startswith("Real<"):
        stored = scalar_type(name, kind[5:-1], definitions)
        return "float" if stored.startswith("kp::") else stored
    behind = _aliases(name).get(kind) or definitions.get(kind)
    return kind if behind is None else scalar_type(name, behind, definitions)

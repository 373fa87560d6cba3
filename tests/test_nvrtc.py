"""All kernels, compiled for real architectures by NVIDIA's compiler, without a GPU or a driver."""

import functools
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))

import nvrtc

from kpcore.backends import gpu_sources

LIBRARY = nvrtc.library()
needed = pytest.mark.skipif(LIBRARY is None, reason="the wheel nvidia-cuda-nvrtc is not installed")
EACH = [(name, variant) for name, variants in nvrtc.variants().items() for variant in variants]
# The first types of a file for all architectures, the others for the oldest.
COMPILED = [
    (name, variant, architecture)
    for name, variants in nvrtc.variants().items()
    for number, variant in enumerate(variants)
    for architecture in (nvrtc.ARCHITECTURES if number == 0 else nvrtc.ARCHITECTURES[:1])
]
DECIDING = (
    "lists.cu",
    "neighbors.cu",
    "feature_neighbors.cu",
    "sampling.cu",
    "subsampling.cu",
    "kpconv.cu",
    "cell_conv.cu",
)
THREADS = {"farthest": 512}  # of a block; 128 of all others


@functools.cache
def compiled(name, *definitions):
    """For the oldest architecture."""
    return nvrtc.compiled(LIBRARY, gpu_sources.source(name), nvrtc.ARCHITECTURES[0], definitions)


def test_every_file_says_for_which_types_it_is_compiled():
    assert all(nvrtc.variants().values())


@needed
@pytest.mark.parametrize("name, variant, architecture", COMPILED, ids=lambda value: str(value).replace(" ", ","))
def test_registers_spills_and_shared_memory(name, variant, architecture):
    if architecture == nvrtc.ARCHITECTURES[0]:
        made = compiled(name, *variant.split())
    else:
        made = nvrtc.compiled(LIBRARY, gpu_sources.source(name), architecture, variant.split())
    assert made.kernels and set(made.kernels) == set(re.findall(r"\.entry (\w+)", made.ptx))
    for kernel, found in made.kernels.items():
        threads = THREADS.get(kernel, 128)
        assert found.spills == 0, kernel
        # Of a multiprocessor's registers and shared memory enough for four blocks, which hides what loads take.
        assert 0 < found.registers * threads * (4 if threads == 128 else 1) <= 65536, kernel
        assert found.shared * 4 <= 65536, kernel
    assert "warning" not in made.log, made.log


@needed
@pytest.mark.parametrize(
    "name, variant",
    [(n, v) for n, v in EACH if n in DECIDING],
)
def test_what_decides_is_not_contracted(name, variant):
    # The exponential of a gaussian has fused operations of its own, and decides nothing.
    definitions = [*variant.split(), *(["exp(x)=(x)"] if name == "kpconv.cu" else [])]
    assert not re.search(r"\bfma\.|\bmad\.\w+\.f", compiled(name, *definitions).ptx)
    if name != "lists.cu" and variant == nvrtc.variants()[name][0]:  # that the pattern can match
        options = ("--std=c++17", "--fmad=true")
        contracted = nvrtc.compiled(LIBRARY, gpu_sources.source(name), nvrtc.ARCHITECTURES[0], definitions, options)
        assert re.search(r"\bfma\.", contracted.ptx)


@needed
def test_an_error_names_file_and_line():
    text = gpu_sources.source("neighbors.cu")
    wrong = text.replace(
        "double cell_of(double x, double inverse_cell) {", "double cell_of(double x, double inverse_cell) { wrong;"
    )
    assert wrong != text
    line = (gpu_sources.SOURCES / "cuda/neighbors.cu").read_text().split("cell_of(double x")[0].count("\n") + 1
    with pytest.raises(ValueError, match=rf"neighbors\.cu\({line}\): error: identifier \"wrong\" is undefined"):
        nvrtc.compiled(LIBRARY, wrong, 80, nvrtc.variants()["neighbors.cu"][0].split())
